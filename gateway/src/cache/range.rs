//! A part of a stored answer (RFC 9110 §14), and whether a request still has the whole (§13).

use http::{HeaderMap, HeaderValue, header};

/// What a `Range` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it: there is no range, or one that may be ignored (§14.2).
    Whole,
    /// From one byte to another, the latter included.
    Bytes(u64, u64),
    /// Nothing that is there.
    Nothing,
}

/// The part of `length` bytes that is asked for. Several ranges at once are answered with the whole.
pub fn part(range: &[u8], length: u64) -> Part {
    let Some((unit, set)) = range.split_at_checked(6) else { return Part::Whole };
    let set = set.trim_ascii();
    if !unit.eq_ignore_ascii_case(b"bytes=") || set.contains(&b',') {
        return Part::Whole;
    }
    let Some(dash) = set.iter().position(|byte| *byte == b'-') else { return Part::Whole };
    let (first, last) = (&set[..dash], &set[dash + 1..]);
    match (first, last) {
        (b"", b"") => Part::Whole,
        (b"", suffix) => match number(suffix) {
            None => Part::Whole,
            Some(0) => Part::Nothing,
            Some(_) if length == 0 => Part::Nothing,
            Some(suffix) => Part::Bytes(length.saturating_sub(suffix), length - 1),
        },
        (first, last) => {
            let last = if last.is_empty() { Some(u64::MAX) } else { number(last) };
            match (number(first), last) {
                (Some(first), Some(last)) if first > last => Part::Whole,
                (Some(first), Some(_)) if first >= length => Part::Nothing,
                (Some(first), Some(last)) => Part::Bytes(first, last.min(length - 1)),
                _ => Part::Whole,
            }
        }
    }
}

fn number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    // More than can be counted is as good as all.
    digits.then(|| std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or(u64::MAX))
}

/// Whether `If-Range` holds, if there is one (§13.1.5): a strong tag, or to the letter the date that was said. A date is strong only
/// where the answer was made well after (§8.8.2.2).
pub fn holds(request: &HeaderMap, stored: &HeaderMap) -> bool {
    let Some(condition) = request.get(header::IF_RANGE) else { return true };
    let condition = condition.as_bytes().trim_ascii();
    if condition.starts_with(b"\"") || condition.starts_with(b"W/") {
        return stored.get(header::ETAG).is_some_and(|tag| tag.as_bytes() == condition && condition.starts_with(b"\""));
    }
    let date = |name| stored.get(name).and_then(date);
    let strong = match (date(header::LAST_MODIFIED), date(header::DATE)) {
        (Some(modified), Some(made)) => made >= modified + 60,
        _ => false,
    };
    strong && stored.get(header::LAST_MODIFIED).is_some_and(|known| known.as_bytes() == condition)
}

/// Whether the client has what is stored already (§13.1.2, §13.1.3; RFC 9111 §4.3.2).
pub fn is_current(request: &HeaderMap, stored: &HeaderMap, received: u64) -> bool {
    if request.contains_key(header::IF_NONE_MATCH) {
        let known = stored.get(header::ETAG).map(|tag| opaque(tag.as_bytes()));
        let mut lines = request.get_all(header::IF_NONE_MATCH).iter();
        return lines.any(|line| any_tag(line.as_bytes(), |tag| tag == b"*" || Some(opaque(tag)) == known));
    }
    let Some(since) = request.get(header::IF_MODIFIED_SINCE).and_then(date) else { return false };
    let modified = stored.get(header::LAST_MODIFIED).or_else(|| stored.get(header::DATE)).map_or(Some(received), date);
    modified.is_some_and(|modified| modified <= since)
}

/// Whether one tag of a list holds. Tags may have commas in them.
fn any_tag(mut text: &[u8], holds: impl Fn(&[u8]) -> bool) -> bool {
    loop {
        text = text.trim_ascii_start();
        if text.is_empty() {
            return false;
        }
        let quote = text.iter().position(|byte| *byte == b'"');
        let comma = text.iter().position(|byte| *byte == b',');
        let end = match (quote, comma) {
            (Some(open), comma) if comma.is_none_or(|comma| open < comma) => {
                let close = text[open + 1..].iter().position(|byte| *byte == b'"');
                close.map_or(text.len(), |close| open + close + 2)
            }
            (_, comma) => comma.unwrap_or(text.len()),
        };
        if holds(text[..end].trim_ascii()) {
            return true;
        }
        text = text[end..].trim_ascii_start();
        text = text.strip_prefix(b",").unwrap_or(text);
    }
}

/// A tag without the mark of a weak one (§8.8.3.2).
pub fn opaque(tag: &[u8]) -> &[u8] {
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// A date in one of its three forms, in seconds of Unix time.
pub fn date(value: &HeaderValue) -> Option<u64> {
    let date = httpdate::parse_http_date(value.to_str().ok()?.trim()).ok()?;
    date.duration_since(std::time::UNIX_EPOCH).ok().map(|since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 9110 §14.1.2, §14.2
    #[test]
    fn one_range_is_served_and_nonsense_ignored() {
        for (range, expected) in [
            ("bytes=0-0", Part::Bytes(0, 0)),
            ("Bytes=2-4", Part::Bytes(2, 4)),
            ("bytes=2-", Part::Bytes(2, 9)),
            ("bytes=2-99", Part::Bytes(2, 9)),
            ("bytes=-3", Part::Bytes(7, 9)),
            ("bytes=-99", Part::Bytes(0, 9)),
            ("bytes=10-", Part::Nothing),
            ("bytes=-0", Part::Nothing),
            ("bytes=99999999999999999999999-", Part::Nothing),
            ("bytes=4-2", Part::Whole),
            ("bytes=0-1,4-5", Part::Whole),
            ("bytes=", Part::Whole),
            ("bytes=-", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("items=0-1", Part::Whole),
            ("", Part::Whole),
        ] {
            assert_eq!(part(range.as_bytes(), 10), expected, "{range}");
        }
        assert_eq!(part(b"bytes=0-", 0), Part::Nothing);
        assert_eq!(part(b"bytes=-1", 0), Part::Nothing);
    }

    #[test]
    fn tags_are_compared_whole() {
        let is = |asked: &'static str, tag: &'static str| {
            let request = HeaderMap::from_iter([(header::IF_NONE_MATCH, HeaderValue::from_static(asked))]);
            let stored = HeaderMap::from_iter([(header::ETAG, HeaderValue::from_static(tag))]);
            is_current(&request, &stored, 0)
        };
        assert!(is("\"a\"", "\"a\""));
        assert!(is("W/\"a\"", "\"a\""));
        assert!(is("\"x\", \"a\"", "W/\"a\""));
        assert!(is("\"x,y\",\"a\"", "\"a\""));
        assert!(is("*", "\"a\""));
        assert!(!is("\"x,a\"", "\"a\""));
        assert!(!is("\"\"a\"", "\"b\""));
        assert!(!is("\"A\"", "\"a\""));
        assert!(!is("", "\"a\""));
        assert!(!is("\"a", "\"b\""));
    }
}
