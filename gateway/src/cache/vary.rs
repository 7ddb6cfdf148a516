//! Which stored answer of a resource a request may have (RFC 9111 §4.1).

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// The fields that an answer depended on, each with what its request said there.
pub type Selection = Vec<(HeaderName, Option<Box<[u8]>>)>;

/// Fields that an answer may depend on, at most.
const MOST: usize = 20;

/// The names in all lines of `Vary`; nothing where no request is ever like another (`*`), or nobody can tell.
pub fn names(headers: &HeaderMap) -> Option<Vec<HeaderName>> {
    let mut names = Vec::new();
    for line in headers.get_all(header::VARY) {
        for token in line.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            if token.is_empty() {
                continue;
            }
            let name = HeaderName::from_bytes(token).ok().filter(|_| token != b"*")?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names.sort_unstable_by(|a: &HeaderName, b| a.as_str().cmp(b.as_str()));
    (names.len() <= MOST).then_some(names)
}

/// What a request says in these fields.
pub fn select(names: &[HeaderName], request: &HeaderMap) -> Selection {
    names.iter().map(|name| (name.clone(), said(name, request))).collect()
}

/// Whether a request says the same.
pub fn matches(selection: &Selection, request: &HeaderMap) -> bool {
    selection.iter().all(|(name, value)| said(name, request) == *value)
}

/// A selection as bytes that no other has.
pub fn tag(selection: &Selection) -> Vec<u8> {
    let mut tag = Vec::new();
    for (name, value) in selection {
        tag.extend_from_slice(name.as_str().as_bytes());
        match value {
            // No field has these bytes.
            Some(value) => [&b"\0="[..], value, b"\0"].iter().for_each(|part| tag.extend_from_slice(part)),
            None => tag.push(0),
        }
    }
    tag
}

/// What the lines of a field say together, without the blanks that mean nothing.
fn said(name: &HeaderName, request: &HeaderMap) -> Option<Box<[u8]>> {
    let mut lines = request.get_all(name).iter().map(HeaderValue::as_bytes).peekable();
    lines.peek()?;
    let mut text = Vec::new();
    for part in lines.flat_map(|line| line.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii) {
        if !text.is_empty() {
            text.push(b',');
        }
        text.extend_from_slice(part);
    }
    Some(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)));
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(name, value);
        }
        map
    }

    #[test]
    fn names_of_all_lines_and_a_star_among_them() {
        let of = |pairs: &[(&'static str, &'static str)]| names(&headers(pairs)).map(|names| names.len());
        assert_eq!(of(&[]), Some(0));
        assert_eq!(of(&[("vary", "Accept, accept-language"), ("vary", "ACCEPT,,")]), Some(2));
        assert_eq!(of(&[("vary", "*")]), None);
        assert_eq!(of(&[("vary", "accept, *")]), None);
        assert_eq!(of(&[("vary", "accept"), ("vary", "*")]), None);
        assert_eq!(of(&[("vary", "a b")]), None);
    }

    #[test]
    fn a_request_is_like_another_by_what_it_says() {
        let names = [header::ACCEPT];
        let is = |first: &[(&'static str, &'static str)], second: &[(&'static str, &'static str)]| {
            matches(&select(&names, &headers(first)), &headers(second))
        };
        assert!(is(&[], &[("x", "y")]));
        assert!(is(&[("accept", "a, b")], &[("accept", "a,b")]));
        assert!(is(&[("accept", "a, b")], &[("accept", "a"), ("accept", "b")]));
        assert!(!is(&[("accept", "a")], &[]));
        assert!(!is(&[], &[("accept", "")]));
        assert!(!is(&[("accept", "a")], &[("accept", "b")]));
        assert!(!is(&[("accept", "a, b")], &[("accept", "b, a")]));
    }
}
