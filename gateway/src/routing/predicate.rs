//! What a rule asks of a request beside its path: method, headers, query.

use std::{borrow::Cow, cmp::Reverse};

use http::{HeaderMap, HeaderName, Method};

/// What a rule is matched against.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// The host, as the client wrote it.
    pub host: &'a [u8],
    /// The path in its matched form.
    pub key: &'a [u8],
    /// The method.
    pub method: &'a Method,
    /// The fields.
    pub headers: &'a HeaderMap,
    /// The query, without `?`.
    pub query: &'a str,
}

/// A query parameter's name and value.
pub type Parameter = (Box<[u8]>, Box<[u8]>);

/// What a rule asks for; all of it must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Predicates {
    /// Any of these; every method where empty.
    pub methods: Vec<Method>,
    /// Fields with exactly this value.
    pub headers: Vec<(HeaderName, Box<[u8]>)>,
    /// Parameters whose first value is exactly this.
    pub query: Vec<Parameter>,
}

/// The first predicate that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failed<'t> {
    /// The method is not listed.
    Method,
    /// This field is missing or differs.
    Header(&'t HeaderName),
    /// This parameter is missing or differs.
    Query(&'t [u8]),
}

impl Predicates {
    /// Whether all hold, or the first that does not.
    pub fn check<'t>(&'t self, head: &Head<'_>) -> Result<(), Failed<'t>> {
        if !self.methods.is_empty() && !self.methods.contains(head.method) {
            return Err(Failed::Method);
        }
        for (name, value) in &self.headers {
            if !has_header(head.headers, name, value) {
                return Err(Failed::Header(name));
            }
        }
        for (name, value) in &self.query {
            if first_parameter(head.query, name).is_none_or(|found| *found != **value) {
                return Err(Failed::Query(name));
            }
        }
        Ok(())
    }

    /// Gateway API's order among rules of one path: a method, more headers, more parameters, then our `priority`. The smaller wins.
    pub fn rank(&self, priority: i32) -> impl Ord + use<> {
        (self.methods.is_empty(), Reverse(self.headers.len()), Reverse(self.query.len()), Reverse(priority))
    }

    /// Whether some request could satisfy both.
    pub fn overlaps(&self, other: &Self) -> bool {
        fn disjoint<K: PartialEq, V: PartialEq>(a: &[(K, V)], b: &[(K, V)]) -> bool {
            a.iter().any(|(name, value)| b.iter().any(|(other, wanted)| name == other && value != wanted))
        }
        let methods = self.methods.is_empty()
            || other.methods.is_empty()
            || self.methods.iter().any(|method| other.methods.contains(method));
        methods && !disjoint(&self.headers, &other.headers) && !disjoint(&self.query, &other.query)
    }

    /// Whether every request that satisfies `other`'s headers and query satisfies these.
    pub fn fields_cover(&self, other: &Self) -> bool {
        self.headers.iter().all(|header| other.headers.contains(header))
            && self.query.iter().all(|parameter| other.query.contains(parameter))
    }
}

/// Whether a field is there and each of its lines has exactly this value, so that no request has two values.
pub fn has_header(headers: &HeaderMap, name: &HeaderName, value: &[u8]) -> bool {
    let mut lines = headers.get_all(name).iter().peekable();
    lines.peek().is_some() && lines.all(|found| found.as_bytes() == value)
}

/// The first value of a query parameter, decoded.
fn first_parameter<'q>(query: &'q str, name: &[u8]) -> Option<Cow<'q, [u8]>> {
    query.split('&').find_map(|pair| {
        let (found, value) = pair.split_once('=').unwrap_or((pair, ""));
        (*form_decode(found) == *name).then(|| form_decode(value))
    })
}

fn form_decode(text: &str) -> Cow<'_, [u8]> {
    let bytes = text.as_bytes();
    if !bytes.iter().any(|byte| matches!(byte, b'%' | b'+')) {
        return Cow::Borrowed(bytes);
    }
    let digit = |at: usize| bytes.get(at).and_then(|&byte| char::from(byte).to_digit(16));
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match (byte, digit(at), digit(at + 1)) {
            (b'%', Some(high), Some(low)) => {
                out.extend(u8::try_from(high * 16 + low));
                at += 2;
            }
            (b'+', ..) => out.push(b' '),
            _ => out.push(byte),
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_decoded_and_the_first_counts() {
        let first = |query: &'static str| first_parameter(query, b"a b").map(Cow::into_owned);
        assert_eq!(first("x=1&a+b=1%202&a%20b=3"), Some(b"1 2".to_vec()));
        assert_eq!(first("a%20b"), Some(Vec::new()));
        assert_eq!(first("a=1"), None);
        assert_eq!(first("a+b=%zz%"), Some(b"%zz%".to_vec()));
    }
}
