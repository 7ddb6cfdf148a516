//! Reading a path: what upstreams get, and what rules are matched against.
//!
//! The invariant: whatever an upstream makes of the path that it gets, a rule for
//! that resource matches. So the matched form is wider than any single reading:
//! escapes decoded, dot segments resolved, empty segments and `;params` dropped, a
//! trailing `/` ignored. What no form can cover is refused by name. The path that
//! goes on loses only its dot segments and its needless escapes.

use std::{borrow::Cow, fmt};

/// A spelling that upstreams read differently; refused unless allowed by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Oddity {
    /// `%2f`
    EncodedSlash = 1,
    /// `\`
    Backslash = 2,
    /// `%5c`
    EncodedBackslash = 4,
    /// `%00` to `%1f`, `%7f`
    EncodedControl = 8,
    /// `.;` and `..;`
    DotParams = 16,
    /// A `%` without two hexadecimal digits, or overlong UTF-8.
    BadEscape = 32,
    /// Not a path at all: it does not start with `/`.
    NoPath = 64,
}

impl fmt::Display for Oddity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EncodedSlash => "the path has an encoded `/`; send it as `/`, or allow `encoded_slash` in `allow_in_paths`",
            Self::Backslash => "the path has a backslash; send `/`, or allow `backslash` in `allow_in_paths`",
            Self::EncodedBackslash => "the path has an encoded backslash; send `/`, or allow `encoded_backslash` in `allow_in_paths`",
            Self::EncodedControl => "the path has an encoded control character; leave it out, or allow `encoded_control` in `allow_in_paths`",
            Self::DotParams => "the path has a dot segment with parameters; leave them out, or allow `dot_params` in `allow_in_paths`",
            Self::BadEscape => "the path has a malformed escape; write `%` and two hexadecimal digits, or allow `bad_escape` in `allow_in_paths`",
            Self::NoPath => "the request target is not a path; start it with `/`",
        })
    }
}

/// How paths are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PathPolicy {
    /// Fold letters.
    pub case_insensitive: bool,
    allowed: u8,
}

impl PathPolicy {
    /// Lets a spelling through.
    #[must_use]
    pub fn allowing(mut self, oddity: Oddity) -> Self {
        self.allowed |= oddity as u8;
        self
    }

    fn check(self, oddity: Oddity) -> Result<(), Oddity> {
        if self.allowed & oddity as u8 == 0 { Err(oddity) } else { Ok(()) }
    }
}

/// A path, read.
#[derive(Debug, PartialEq, Eq)]
pub struct ReadPath<'a> {
    /// What upstreams get.
    pub forward: Cow<'a, str>,
    /// What rules are matched against: segments joined by `/`, without a leading one. Empty for the root.
    pub key: Cow<'a, [u8]>,
    /// The same where an allowed separator is part of a segment, as some upstreams read it; nothing where there is none.
    pub literal: Option<Vec<u8>>,
}

/// Stands for a separator inside a segment: no pattern has it.
const INNER: u8 = 0;

/// Reads the path of a request target (without its query).
pub fn read(path: &str, policy: PathPolicy) -> Result<ReadPath<'_>, Oddity> {
    let bytes = path.as_bytes();
    if bytes.first() != Some(&b'/') {
        return Err(Oddity::NoPath);
    }
    if is_plain(bytes, policy.case_insensitive) {
        return Ok(ReadPath { forward: Cow::Borrowed(path), key: Cow::Borrowed(&bytes[1..]), literal: None });
    }
    let forward = remove_dot_segments(&decode_unreserved(path, policy)?);
    let mut key = Vec::with_capacity(forward.len());
    let mut literal = Vec::new();
    let mut split = false;
    for segment in forward.split('/') {
        split |= push_segment(&mut key, segment, policy)?;
    }
    for segment in forward.split('/').filter(|_| split) {
        let joined: Vec<u8> =
            decode(segment).iter().map(|byte| if is_separator(byte) { INNER } else { *byte }).collect();
        push_name(&mut literal, joined.split(|&byte| byte == b';').next().unwrap_or_default(), policy);
    }
    let literal = split.then_some(literal);
    let forward = if forward == path { Cow::Borrowed(path) } else { Cow::Owned(forward) };
    Ok(ReadPath { forward, key: Cow::Owned(key), literal })
}

/// Whether a path is its own matched form: the usual case, one pass and no copy.
fn is_plain(bytes: &[u8], fold: bool) -> bool {
    let mut last = b'/';
    for &byte in &bytes[1..] {
        match byte {
            b'%' | b';' | b'\\' => return false,
            b'/' | b'.' if last == b'/' => return false,
            b'A'..=b'Z' | 0x80.. if fold => return false,
            _ => {}
        }
        last = byte;
    }
    last != b'/' || bytes.len() == 1
}

/// Decodes escapes of unreserved characters (RFC 3986 §6.2.2.2); refuses what may be read in two ways.
fn decode_unreserved(path: &str, policy: PathPolicy) -> Result<String, Oddity> {
    let bytes = path.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'\\' => policy.check(Oddity::Backslash)?,
            b'%' => {
                let Some(value) = escape(&bytes[at - 1..]) else {
                    policy.check(Oddity::BadEscape)?;
                    // As what it stands for, or decoding what follows could make an escape of it.
                    out.extend_from_slice(b"%25");
                    continue;
                };
                match value {
                    b'/' => policy.check(Oddity::EncodedSlash)?,
                    b'\\' => policy.check(Oddity::EncodedBackslash)?,
                    0..0x20 | 0x7f => policy.check(Oddity::EncodedControl)?,
                    // What starts overlong forms of shorter UTF-8, such as a `/` of three bytes.
                    0xc0 | 0xc1 => policy.check(Oddity::BadEscape)?,
                    0xe0 | 0xf0 => {
                        let least = if value == 0xe0 { 0xa0 } else { 0x90 };
                        if escape(&bytes[at + 2..]).is_some_and(|next| (0x80..least).contains(&next)) {
                            policy.check(Oddity::BadEscape)?;
                        }
                    }
                    _ if is_unreserved(value) => {
                        out.push(value);
                        at += 2;
                        continue;
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        out.push(byte);
    }
    // Whole ASCII bytes were replaced by ASCII bytes, so this never fails.
    String::from_utf8(out).map_err(|_| Oddity::BadEscape)
}

/// RFC 3986 §5.2.4 for an absolute path; empty segments are kept.
fn remove_dot_segments(path: &str) -> String {
    let mut out: Vec<&str> = Vec::new();
    let mut segments = path[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." | ".." => {
                if segment == ".." {
                    out.pop();
                }
                if last {
                    out.push("");
                }
            }
            _ => out.push(segment),
        }
    }
    let mut path = String::with_capacity(path.len());
    for segment in out {
        path.push('/');
        path.push_str(segment);
    }
    if path.is_empty() {
        path.push('/');
    }
    path
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as `split` and `any` want it")]
fn is_separator(byte: &u8) -> bool {
    matches!(byte, b'/' | b'\\')
}

/// Appends one segment of the forwarded path in its matched form; says whether a separator inside it made several of it.
fn push_segment(key: &mut Vec<u8>, segment: &str, policy: PathPolicy) -> Result<bool, Oddity> {
    let decoded = decode(segment);
    let splits = decoded.iter().any(is_separator);
    for part in decoded.split(is_separator) {
        let name = part.split(|&byte| byte == b';').next().unwrap_or(part);
        match name {
            b"" => {}
            b"." | b".." => {
                // A dot segment that an encoded separator makes is never honest.
                policy.check(if splits { Oddity::EncodedSlash } else { Oddity::DotParams })?;
                if splits {
                    return Err(Oddity::EncodedSlash);
                }
                if name == b".." {
                    let end = key.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                    key.truncate(end);
                }
            }
            _ => push_name(key, name, policy),
        }
    }
    Ok(splits)
}

fn push_name(key: &mut Vec<u8>, name: &[u8], policy: PathPolicy) {
    if name.is_empty() {
        return;
    }
    if !key.is_empty() {
        key.push(b'/');
    }
    if policy.case_insensitive { push_folded(key, name) } else { key.extend_from_slice(name) }
}

fn push_folded(key: &mut Vec<u8>, name: &[u8]) {
    match std::str::from_utf8(name) {
        // Up and down again: some servers compare in upper case, where `ſ` is an `S`.
        Ok(text) if !text.is_ascii() => {
            let mut letter = [0; 4];
            for c in text.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase) {
                key.extend_from_slice(c.encode_utf8(&mut letter).as_bytes());
            }
        }
        _ => key.extend(name.iter().map(u8::to_ascii_lowercase)),
    }
}

/// Decodes every well-formed escape.
pub fn decode(text: &str) -> Cow<'_, [u8]> {
    let bytes = text.as_bytes();
    if !bytes.contains(&b'%') {
        return Cow::Borrowed(bytes);
    }
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if let Some(value) = escape(&bytes[at..]) {
            out.push(value);
            at += 3;
        } else {
            out.push(byte);
            at += 1;
        }
    }
    Cow::Owned(out)
}

/// The value of the escape that a text starts with.
fn escape(bytes: &[u8]) -> Option<u8> {
    let [b'%', high, low, ..] = bytes else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16);
    u8::try_from(digit(*high)? * 16 + digit(*low)?).ok()
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// The matched form of a literal in a pattern or of a prefix: its segments, or why it can match nothing.
pub fn literal_segment(text: &str, case_insensitive: bool) -> Result<Vec<u8>, String> {
    let policy = PathPolicy { case_insensitive, allowed: 0 };
    let told = |why: &str| Err(format!("no path is ever read as `{text}`: {why}"));
    match read(&format!("/{text}"), policy) {
        Err(oddity) => told(&oddity.to_string()),
        Ok(_) if text.contains(';') => told("parameters after `;` are not matched; leave them out"),
        Ok(path) if path.key.is_empty() || path.key.contains(&b'/') => told("it is not one segment"),
        Ok(path) => Ok(path.key.into_owned()),
    }
}

/// A forwarded path without its leading segments; nothing where it does not have them.
///
/// It starts with one `/`: several would be read as a host by some.
pub fn strip_prefix<'a>(forward: &'a str, prefix: &[Box<[u8]>], policy: PathPolicy) -> Option<&'a str> {
    let rest = &forward[after_prefix(forward, prefix, policy)?..];
    let extra = rest.len() - rest.trim_start_matches('/').len();
    Some(if rest.is_empty() { "/" } else { &rest[extra.saturating_sub(1)..] })
}

/// Where a forwarded path goes on after leading segments, as an offset at a `/` or at the end.
fn after_prefix(forward: &str, prefix: &[Box<[u8]>], policy: PathPolicy) -> Option<usize> {
    let mut offset = 0;
    let mut wanted = prefix.iter();
    let mut next = wanted.next()?;
    let mut key = Vec::new();
    for segment in forward[1..].split('/') {
        offset += 1 + segment.len();
        key.clear();
        push_segment(&mut key, segment, policy).ok()?;
        if key.is_empty() {
            continue;
        }
        if *key != **next {
            return None;
        }
        match wanted.next() {
            Some(more) => next = more,
            None => return Some(offset),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(path: &str) -> Result<String, Oddity> {
        read(path, PathPolicy::default()).map(|read| String::from_utf8_lossy(&read.key).into_owned())
    }

    fn forward(path: &str) -> String {
        read(path, PathPolicy::default()).unwrap().forward.into_owned()
    }

    /// Every spelling here is `/admin/users` to some upstream. None may miss a rule for it.
    #[test]
    fn spellings_of_one_resource_share_a_key() {
        for path in [
            "/admin/users",
            "/admin/users/",
            "//admin//users//",
            "/./admin/./users/.",
            "/x/../admin/users",
            "/%61dmin/user%73",
            "/%2e/admin/users",
            "/x/%2e%2E/admin/users",
            "/../../admin/users",
            "/admin;jsessionid=1/users;v=2",
            "/;x/admin/users",
            "/admin%3bx/users",
            "/admin/x/y/../../users",
            "/admin//./users",
        ] {
            assert_eq!(key(path).as_deref(), Ok("admin/users"), "{path}");
        }
    }

    #[test]
    fn what_upstreams_read_differently_is_refused() {
        for (path, oddity) in [
            ("/admin%2fusers", Oddity::EncodedSlash),
            ("/admin%2Fusers", Oddity::EncodedSlash),
            ("/admin\\users", Oddity::Backslash),
            ("/admin%5cusers", Oddity::EncodedBackslash),
            ("/admin%00", Oddity::EncodedControl),
            ("/admin%0a", Oddity::EncodedControl),
            ("/x/..;/admin", Oddity::DotParams),
            ("/x/..;a=b/admin", Oddity::DotParams),
            ("/x/.;/admin", Oddity::DotParams),
            ("/x/%2e%2e;/admin", Oddity::DotParams),
            ("/x/..%3b/admin", Oddity::DotParams),
            ("/admin%", Oddity::BadEscape),
            ("/admin%2", Oddity::BadEscape),
            ("/admin%zz", Oddity::BadEscape),
            ("/x%c0%afadmin", Oddity::BadEscape),
            ("/x/%c0%ae%c0%ae/admin", Oddity::BadEscape),
            ("/x%e0%80%afadmin", Oddity::BadEscape),
            ("/x%f0%80%80%afadmin", Oddity::BadEscape),
            ("admin", Oddity::NoPath),
            ("*", Oddity::NoPath),
            ("", Oddity::NoPath),
        ] {
            assert_eq!(read(path, PathPolicy::default()).unwrap_err(), oddity, "{path}");
        }
    }

    #[test]
    fn allowed_spellings_are_matched_at_their_widest() {
        let policy = PathPolicy::default()
            .allowing(Oddity::EncodedSlash)
            .allowing(Oddity::EncodedBackslash)
            .allowing(Oddity::Backslash)
            .allowing(Oddity::DotParams)
            .allowing(Oddity::BadEscape);
        let read = |path| read(path, policy).map(|read| String::from_utf8_lossy(&read.key).into_owned());
        assert_eq!(read("/a%2fb").as_deref(), Ok("a/b"));
        assert_eq!(read("/a%5cb").as_deref(), Ok("a/b"));
        assert_eq!(read("/a\\b").as_deref(), Ok("a/b"));
        assert_eq!(read("/x/..;/a").as_deref(), Ok("a"));
        assert_eq!(read("/100%").as_deref(), Ok("100%"));
        assert_eq!(read("/x%2%66admin").as_deref(), Ok("x%2fadmin"));
        let forged = super::read("/x%2%66admin%0%30", policy).unwrap();
        assert_eq!(forged.forward, "/x%252fadmin%2500", "no new escape is made");
        let literal = |path| super::read(path, policy).unwrap().literal.map(|key| key.split(|b| *b == b'/').count());
        assert_eq!((literal("/files/a%2fb"), literal("/files/ab")), (Some(2), None));
        assert_eq!(read("/x/..%2fadmin"), Err(Oddity::EncodedSlash));
        assert_eq!(read("/x/%2e%2e%2fadmin"), Err(Oddity::EncodedSlash));
    }

    #[test]
    fn upstreams_get_the_path_but_for_dots_and_needless_escapes() {
        for (path, expected) in [
            ("/a/b", "/a/b"),
            ("/a//b/", "/a//b/"),
            ("/a;v=1/b", "/a;v=1/b"),
            ("/a%20b%c3%a9", "/a%20b%c3%a9"),
            ("/%61/%7euser", "/a/~user"),
            ("/a/./b/../c", "/a/c"),
            ("/a/..", "/"),
            ("/a/b/.", "/a/b/"),
            ("/A/%41", "/A/A"),
            ("/%252e%252e/a", "/%252e%252e/a"),
        ] {
            assert_eq!(forward(path), expected, "{path}");
        }
    }

    #[test]
    fn letters_fold_only_where_told() {
        assert_eq!(key("/Admin").as_deref(), Ok("Admin"));
        let fold = PathPolicy { case_insensitive: true, allowed: 0 };
        assert_eq!(&*read("/ADMIN/%C3%89", fold).unwrap().key, "admin/é".as_bytes());
        assert_eq!(&*read("/u%C5%BFers", fold).unwrap().key, b"users");
    }

    #[test]
    fn prefixes_are_found_in_any_spelling() {
        let prefix = [Box::from(&b"api"[..]), Box::from(&b"v1"[..])];
        let rest = |path| strip_prefix(path, &prefix, PathPolicy::default());
        assert_eq!(rest("/api/v1/orders"), Some("/orders"));
        assert_eq!(rest("/api/v1"), Some("/"));
        assert_eq!(rest("/api/v1/"), Some("/"));
        assert_eq!(rest("//api//v1;x///orders//1/"), Some("/orders//1/"));
        assert_eq!(rest("/api/v2/orders"), None);
        assert_eq!(rest("/api"), None);
    }

    proptest! {
        /// Reading what was read changes nothing: the forwarded path has the same key and is its own forward form.
        #[test]
        fn reading_is_idempotent(path in r"/([a-cA-C./;%~\\]|%2e|%2E|%61|%3b|%41|%20|//|\.\.){0,12}") {
            if let Ok(once) = read(&path, PathPolicy::default()) {
                let forward = once.forward.clone().into_owned();
                let twice = read(&forward, PathPolicy::default()).unwrap();
                prop_assert_eq!(&twice.forward, &forward);
                prop_assert_eq!(once.key, twice.key);
            }
        }

        /// A key has no empty and no dot segment, so no rule can be missed by one.
        #[test]
        fn keys_are_clean(path in r"/([a-c./;%]|%2e|%2E|%61|%3b|//|\.\.){0,12}") {
            if let Ok(read) = read(&path, PathPolicy::default()) {
                for segment in read.key.split(|&byte| byte == b'/') {
                    prop_assert!(read.key.is_empty() || !matches!(segment, b"" | b"." | b".."));
                }
            }
        }
    }
}
