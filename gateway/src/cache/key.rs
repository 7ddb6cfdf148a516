//! What a stored answer is found by: everything that may have made it what it is.
//!
//! The URL comes first, then what tells ways to it apart: scheme, route, arm, upstream, and the
//! fields in which the gateway told the upstream who asks. The parts are separated by a byte that none of them can have, so no two
//! requests share a key.

use http::HeaderValue;

/// The parts of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts<'k> {
    /// The host, in lower case.
    pub host: &'k [u8],
    /// Path and query, as they go on.
    pub target: &'k [u8],
    /// The route's name.
    pub route: &'k [u8],
}

/// Makes a key.
pub struct Builder(Vec<u8>);

impl Builder {
    /// For a URL.
    pub fn new(host: &[u8], target: &[u8]) -> Self {
        let mut key = Vec::with_capacity(host.len() + target.len() + 96);
        key.extend(host.iter().map(u8::to_ascii_lowercase));
        Self(key).part(target)
    }

    /// With one more part.
    #[must_use]
    pub fn part(mut self, part: &[u8]) -> Self {
        self.0.push(0);
        self.0.extend_from_slice(part);
        self
    }

    /// With a field in which the gateway speaks.
    #[must_use]
    pub fn field(self, name: &str, value: Option<&HeaderValue>) -> Self {
        let this = self.part(name.as_bytes());
        match value {
            Some(value) => this.part(b"=").part(value.as_bytes()),
            None => this.part(b""),
        }
    }

    /// The key.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// The parts of a key that purges ask for.
pub fn parts(key: &[u8]) -> Parts<'_> {
    let mut parts = key.split(|byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    Parts { host: next(), target: next(), route: next() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A request's parts, as the layer puts them together.
    fn key(host: &str, target: &str, parts: &[String; 4], fields: &[Option<String>; 2]) -> Vec<u8> {
        let mut builder = Builder::new(host.as_bytes(), target.as_bytes());
        for part in parts {
            builder = builder.part(part.as_bytes());
        }
        for (name, value) in ["x-user-id", "x-tenant"].into_iter().zip(fields) {
            let value = value.as_ref().map(|value| HeaderValue::from_str(value).unwrap());
            builder = builder.field(name, value.as_ref());
        }
        builder.finish()
    }

    proptest! {
        #[test]
        fn no_two_requests_share_a_key(
            hosts in ["[a-zA-Z.:]{0,4}", "[a-zA-Z.:]{0,4}"],
            targets in ["/[a-z?=&/]{0,4}", "/[a-z?=&/]{0,4}"],
            parts in [["[a-z=]{0,2}", "[a-z=]{0,2}", "[a-z=]{0,2}", "[a-z=]{0,2}"], ["[a-z=]{0,2}", "[a-z=]{0,2}", "[a-z=]{0,2}", "[a-z=]{0,2}"]],
            fields in [[proptest::option::of("[a-z=]{0,2}"), proptest::option::of("[a-z=]{0,2}")], [proptest::option::of("[a-z=]{0,2}"), proptest::option::of("[a-z=]{0,2}")]],
        ) {
            let one = key(&hosts[0], &targets[0], &parts[0], &fields[0]);
            let two = key(&hosts[1], &targets[1], &parts[1], &fields[1]);
            let same = hosts[0].eq_ignore_ascii_case(&hosts[1])
                && (&targets[0], &parts[0], &fields[0]) == (&targets[1], &parts[1], &fields[1]);
            prop_assert_eq!(one == two, same);
            let found = super::parts(&one);
            prop_assert_eq!(found.host.to_vec(), hosts[0].to_ascii_lowercase().into_bytes());
            prop_assert_eq!((found.target, found.route), (targets[0].as_bytes(), parts[0][0].as_bytes()));
        }
    }
}
