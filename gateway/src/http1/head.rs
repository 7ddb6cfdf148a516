//! Heads of requests and responses (RFC 9112 §2 to §6).
//!
//! A head is refused where two recipients could read it differently: lines that end in
//! anything but CRLF, whitespace where none belongs, folded lines, controls in values, several or odd
//! lengths, a length beside a transfer coding, codings other than a single `chunked`.

use std::{
    cell::{Cell, RefCell},
    ops::Range,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use memchr::{memchr, memmem};

/// Fields of one message, at most.
pub const MAX_FIELDS: usize = 100;

/// How large a head may be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The whole of it, in bytes.
    pub head: usize,
    /// The target of a request, in bytes.
    pub target: usize,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is not HTTP/1.1, or not clearly; the text says what is wrong and what to do.
    Malformed(&'static str),
    /// The target is too long.
    Target,
    /// The fields are too large, or too many.
    Fields,
    /// Another version than 1.0 and 1.1.
    Version,
}

/// How a message's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// After so many bytes.
    Length(u64),
    /// With the last chunk and its trailers.
    Chunked,
    /// With the connection. Responses only.
    Close,
}

/// A request's head.
#[derive(Debug)]
pub struct RequestHead {
    /// Method, target and fields. A transfer coding is not among the fields: it was consumed.
    pub request: http::Request<()>,
    /// How the body ends.
    pub framing: Framing,
    /// Whether the client wants to send another request after this one.
    pub keep_alive: bool,
}

/// A response's head.
#[derive(Debug)]
pub struct ResponseHead {
    /// The status.
    pub status: StatusCode,
    /// The fields, less those of the upstream's connection.
    pub headers: HeaderMap,
    /// How the body ends.
    pub framing: Framing,
    /// Whether there is none whatever the fields say.
    pub bodyless: bool,
    /// Whether the connection may be used again.
    pub keep_alive: bool,
    /// What the upstream switches to, after a 101.
    pub upgrade: Option<HeaderValue>,
}

/// Whether bytes hold a whole head, of which the first `seen` bytes did not.
///
/// A line that ends in a bare LF is refused as soon as it is seen: its sender may take it for the end
/// of the head and wait.
pub fn is_whole(bytes: &[u8], seen: usize) -> Result<bool, Refused> {
    if bytes.ends_with(b"\r\n\r\n") {
        return Ok(true);
    }
    let new = &bytes[seen.saturating_sub(3).min(bytes.len())..];
    if memmem::find(new, b"\r\n\r\n").is_some() {
        return Ok(true);
    }
    if has_bare_lf(&bytes[seen.saturating_sub(1).min(bytes.len())..], seen == 0) {
        return Err(Refused::Malformed("a line ends in LF alone; end each in CRLF"));
    }
    Ok(false)
}

/// `first`: whether the first byte has none before it.
fn has_bare_lf(bytes: &[u8], first: bool) -> bool {
    let mut at = 0;
    while let Some(lf) = memchr(b'\n', &bytes[at..]) {
        let lf = at + lf;
        if lf == 0 {
            if first {
                return true;
            }
        } else if bytes[lf - 1] != b'\r' {
            return true;
        }
        at = lf + 1;
    }
    false
}

/// Reads a request's head; how many bytes it took, or nothing where it is not whole.
pub fn parse_request(bytes: &[u8], limits: Limits) -> Result<Option<(RequestHead, usize)>, Refused> {
    let mut lines = Lines::new(bytes, limits.head);
    let Some(line) = lines.next()? else { return Ok(None) };
    let (method, target, minor) = request_line(line, limits.target)?;
    let Some(spots) = lines.fields()? else { return Ok(None) };
    let length = lines.at;
    // The fields point into one copy of the head, so that the buffer is free again.
    let head = Bytes::copy_from_slice(&bytes[..length]);
    let mut framing = Seen::default();
    let mut headers = take_map();
    spots.read(&head, |name, length, mut value| {
        if framing.note(&name, length, &mut value)? {
            headers.append(name, value);
        }
        Ok(())
    })?;
    let method = match method {
        b"GET" => Method::GET,
        other => Method::from_bytes(other).map_err(|_| Refused::Malformed("the method is no token"))?,
    };
    let uri = Uri::from_maybe_shared(head.slice(target))
        .map_err(|_| Refused::Malformed("malformed request target; escape what is no URI character"))?;
    let keep_alive = framing.keep_alive(minor);
    let framing = match framing.body(minor)? {
        Framing::Close => Framing::None,
        framing => framing,
    };
    if method == Method::TRACE && framing != Framing::None && framing != Framing::Length(0) {
        return Err(Refused::Malformed("a TRACE has no body"));
    }
    let mut request = http::Request::new(());
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    *request.version_mut() = if minor == 0 { http::Version::HTTP_10 } else { http::Version::HTTP_11 };
    *request.headers_mut() = headers;
    Ok(Some((RequestHead { request, framing, keep_alive }, length)))
}

/// Reads a response's head; how many bytes it took, or nothing where it is not whole.
///
/// Fields of the upstream's connection are left out, with all that `Connection` names.
pub fn parse_response(bytes: &[u8], limit: usize, method: &Method) -> Result<Option<(ResponseHead, usize)>, Refused> {
    let mut lines = Lines::new(bytes, limit);
    let Some(line) = lines.next()? else { return Ok(None) };
    let (status, minor) = status_line(line)?;
    let Some(spots) = lines.fields()? else { return Ok(None) };
    let length = lines.at;
    let head = Bytes::copy_from_slice(&bytes[..length]);
    let mut framing = Seen { lenient_length: true, ..Seen::default() };
    let mut headers = take_map();
    let mut named = Vec::new();
    let mut upgrade = None;
    spots.read(&head, |name, length, mut value| {
        let kept = framing.note(&name, length, &mut value)?;
        if !crate::fields::is_hop_by_hop(name.as_str()) {
            if kept {
                headers.append(name, value);
            }
        } else if name == header::CONNECTION {
            crate::fields::named_by(&value, &mut named);
        } else if name == header::UPGRADE {
            upgrade = Some(value);
        }
        Ok(())
    })?;
    for name in named {
        headers.remove(name);
    }
    let keep_alive = framing.keep_alive(minor);
    let bodyless = *method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    let mut framing = framing.body(minor)?;
    if bodyless {
        if status == StatusCode::NO_CONTENT || status.is_informational() {
            // RFC 9110 §8.6: it has no place there, and some recipients believe it.
            headers.remove(header::CONTENT_LENGTH);
        }
        framing = Framing::None;
    }
    let keep_alive = keep_alive && framing != Framing::Close;
    Ok(Some((ResponseHead { status, headers, framing, bodyless, keep_alive, upgrade }, length)))
}

/// Reads the fields after a last chunk; how many bytes they took, or nothing where they are not whole.
pub fn parse_trailers(bytes: &[u8], limit: usize) -> Result<Option<(HeaderMap, usize)>, Refused> {
    let mut lines = Lines::new(bytes, limit);
    let Some(spots) = lines.fields()? else { return Ok(None) };
    let length = lines.at;
    let head = Bytes::copy_from_slice(&bytes[..length]);
    let mut headers = HeaderMap::new();
    spots.read(&head, |name, _, value| {
        if !crate::fields::is_forbidden_in_trailers(&name) {
            headers.append(name, value);
        }
        Ok(())
    })?;
    Ok(Some((headers, length)))
}

/// The lines of a head.
struct Lines<'a> {
    bytes: &'a [u8],
    at: usize,
    limit: usize,
}

impl<'a> Lines<'a> {
    fn new(bytes: &'a [u8], limit: usize) -> Self {
        Self { bytes, at: 0, limit }
    }

    /// The next line without its end.
    fn next(&mut self) -> Result<Option<&'a [u8]>, Refused> {
        let rest = &self.bytes[self.at..];
        let Some(lf) = memchr(b'\n', rest) else {
            return if self.bytes.len() > self.limit { Err(Refused::Fields) } else { Ok(None) };
        };
        self.at += lf + 1;
        if self.at > self.limit {
            return Err(Refused::Fields);
        }
        match rest[..lf].split_last() {
            Some((b'\r', line)) => Ok(Some(line)),
            _ => Err(Refused::Malformed("a line ends in LF alone; end each in CRLF")),
        }
    }

    /// Finds the fields up to the empty line, if it is there.
    fn fields(&mut self) -> Result<Option<Spots>, Refused> {
        let mut spots = Spots(SPOTS.take());
        loop {
            let from = self.at;
            let Some(line) = self.next()? else { return Ok(None) };
            let Some(first) = line.first() else { return Ok(Some(spots)) };
            if is_blank(*first) {
                return Err(Refused::Malformed("a folded line; put each field on one line"));
            }
            let colon = memchr(b':', line).ok_or(Refused::Malformed("a field without a colon"))?;
            if spots.0.len() == MAX_FIELDS {
                return Err(Refused::Fields);
            }
            spots.0.push((from, from + colon, from + line.len()));
        }
    }
}

/// Where the fields of a head are: a name's begin, its colon, and its value's end.
struct Spots(Vec<(usize, usize, usize)>);

thread_local! {
    static SPOTS: Cell<Vec<(usize, usize, usize)>> = const { Cell::new(Vec::new()) };
    static MAPS: RefCell<Vec<HeaderMap>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Spots {
    fn drop(&mut self) {
        self.0.clear();
        let _ = SPOTS.try_with(|spots| spots.set(std::mem::take(&mut self.0)));
    }
}

/// Maps that wait for their next message, at most.
const SPARE: usize = 64;

/// An empty map, if possible one that has been used: making one costs more than all lookups in it.
pub fn take_map() -> HeaderMap {
    MAPS.with_borrow_mut(Vec::pop).unwrap_or_else(|| HeaderMap::with_capacity(16))
}

/// Keeps the map of a message that was written.
pub fn reuse_map(mut map: HeaderMap) {
    if map.capacity() > 2 * MAX_FIELDS {
        return;
    }
    MAPS.with_borrow_mut(|maps| {
        if maps.len() < SPARE {
            map.clear();
            maps.push(map);
        }
    });
}

impl Spots {
    /// Reads them out of the head.
    fn read(
        &self,
        head: &Bytes,
        mut each: impl FnMut(HeaderName, usize, HeaderValue) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        for (begin, colon, end) in &self.0 {
            let name = HeaderName::from_bytes(&head[*begin..*colon])
                .map_err(|_| Refused::Malformed("a field name with a space or another character that is no token"))?;
            let (mut from, mut to) = (*colon + 1, *end);
            while from < to && is_blank(head[from]) {
                from += 1;
            }
            while to > from && is_blank(head[to - 1]) {
                to -= 1;
            }
            let value = HeaderValue::from_maybe_shared(head.slice(from..to))
                .map_err(|_| Refused::Malformed("a control character in a field's value"))?;
            each(name, colon - begin, value)?;
        }
        Ok(())
    }
}

/// The method, where the target is, and the minor version.
fn request_line(line: &[u8], limit: usize) -> Result<(&[u8], Range<usize>, u8), Refused> {
    let malformed = Refused::Malformed("malformed request line; it is `METHOD target HTTP/1.1` with single spaces");
    let first = memchr(b' ', line).ok_or(malformed)?;
    let last = memchr::memrchr(b' ', line).filter(|last| *last > first).ok_or(malformed)?;
    let (method, target, version) = (&line[..first], &line[first + 1..last], &line[last + 1..]);
    if method.is_empty() || target.is_empty() {
        return Err(malformed);
    }
    if target.len() > limit {
        return Err(Refused::Target);
    }
    let minor = minor_version(version).ok_or(malformed)??;
    // A fragment is never sent; a byte outside ASCII, a space or a control never belongs here.
    if target.iter().any(|byte| !byte.is_ascii_graphic() || *byte == b'#') {
        return Err(Refused::Malformed("malformed request target; escape what is no URI character"));
    }
    Ok((method, first + 1..last, minor))
}

/// Nothing where it is no version at all.
fn minor_version(version: &[u8]) -> Option<Result<u8, Refused>> {
    match version {
        b"HTTP/1.1" => Some(Ok(1)),
        b"HTTP/1.0" => Some(Ok(0)),
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor] if major.is_ascii_digit() && minor.is_ascii_digit() => {
            Some(Err(Refused::Version))
        }
        _ => None,
    }
}

fn status_line(line: &[u8]) -> Result<(StatusCode, u8), Refused> {
    let malformed = Refused::Malformed("malformed status line");
    let (version, rest) = line.split_at_checked(8).ok_or(malformed)?;
    let minor = minor_version(version).ok_or(malformed)??;
    let (code, reason) = rest.strip_prefix(b" ").and_then(|rest| rest.split_at_checked(3)).ok_or(malformed)?;
    // Many servers leave out the space before an empty reason; nothing else can be meant.
    let reason = match reason {
        [] => reason,
        [b' ', reason @ ..] => reason,
        _ => return Err(malformed),
    };
    if reason.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err(malformed);
    }
    let status = StatusCode::from_bytes(code).map_err(|_| malformed)?;
    Ok((status, minor))
}

fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// What the fields say about framing and the connection.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "what was seen and what was not")]
struct Seen {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    stays: bool,
    /// Whether equal lengths are one (RFC 9110 §8.6): said by an upstream, they were never forwarded as two.
    lenient_length: bool,
}

impl Seen {
    /// Notes a field; whether it is to be kept. `length` is its name's.
    fn note(&mut self, name: &HeaderName, length: usize, value: &mut HeaderValue) -> Result<bool, Refused> {
        // Told apart by length first: this runs for every field of every message.
        if !matches!(length, 10 | 14 | 17) {
            return Ok(true);
        }
        if *name == header::CONTENT_LENGTH {
            let length = self::length(value.as_bytes())
                .ok_or(Refused::Malformed("malformed `Content-Length`; send one number"))?;
            if value.as_bytes().starts_with(b"0") {
                // Some read a number with a leading zero as an octal one.
                *value = HeaderValue::from(length);
            }
            return match self.length.replace(length) {
                None => Ok(true),
                Some(before) if self.lenient_length && before == length => Ok(false),
                Some(_) => Err(Refused::Malformed("several `Content-Length`; send one")),
            };
        }
        if *name == header::TRANSFER_ENCODING {
            if self.chunked {
                return Err(Refused::Malformed("several transfer codings; send `chunked` alone"));
            }
            if !value.as_bytes().eq_ignore_ascii_case(b"chunked") {
                return Err(Refused::Malformed("an unknown transfer coding; send `chunked` alone"));
            }
            self.chunked = true;
            return Ok(false);
        }
        if *name == header::CONNECTION {
            for token in crate::fields::tokens(value) {
                self.close |= token.eq_ignore_ascii_case(b"close");
                self.stays |= token.eq_ignore_ascii_case(b"keep-alive");
            }
        }
        Ok(true)
    }

    fn keep_alive(&self, minor: u8) -> bool {
        !self.close && (minor == 1 || self.stays)
    }

    fn body(&self, minor: u8) -> Result<Framing, Refused> {
        match (self.chunked, self.length) {
            (true, Some(_)) => Err(Refused::Malformed("`Transfer-Encoding` beside `Content-Length`; send one of them")),
            (true, None) if minor == 0 => Err(Refused::Malformed("`Transfer-Encoding` in HTTP/1.0, which has none")),
            (true, None) => Ok(Framing::Chunked),
            (false, Some(0)) => Ok(Framing::None),
            (false, Some(length)) => Ok(Framing::Length(length)),
            (false, None) => Ok(Framing::Close),
        }
    }
}

/// A plain decimal number.
pub fn length(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 19 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    text.iter().try_fold(0_u64, |number, digit| number.checked_mul(10)?.checked_add(u64::from(digit - b'0')))
}
