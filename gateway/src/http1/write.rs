//! Heads as they go out: written anew from what was understood, one field a line.

use std::{cell::RefCell, io::Write as _, time::SystemTime};

use http::{HeaderMap, HeaderValue, StatusCode, Version, header, uri::PathAndQuery};

use crate::fields::{TRACEPARENT, X_FORWARDED_PREFIX};

/// How the end of a response's body is told to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// There is no body.
    None,
    /// After so many bytes.
    Length(u64),
    /// By a last chunk.
    Chunked,
    /// By the end of the connection.
    Close,
}

/// How a request's head differs from what the client sent, for the system that gets it.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// The target.
    pub target: Option<PathAndQuery>,
    /// The host.
    pub host: Option<HeaderValue>,
    /// `X-Forwarded-Prefix`.
    pub prefix: Option<HeaderValue>,
    /// `traceparent`.
    pub traceparent: Option<HeaderValue>,
}

/// Writes a request's head. The target is in origin form already.
pub fn request_head(out: &mut Vec<u8>, parts: &http::request::Parts, overrides: &Overrides) {
    out.extend_from_slice(parts.method.as_str().as_bytes());
    out.push(b' ');
    match overrides.target.as_ref().or(parts.uri.path_and_query()) {
        Some(target) => out.extend_from_slice(target.as_str().as_bytes()),
        None => out.push(b'*'),
    }
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let Overrides { host, prefix, traceparent, .. } = overrides;
    if host.is_none() && prefix.is_none() && traceparent.is_none() {
        fields(out, &parts.headers);
    } else {
        let replaced = [(header::HOST, host), (X_FORWARDED_PREFIX, prefix), (TRACEPARENT, traceparent)];
        for (name, value) in &parts.headers {
            if !replaced.iter().any(|(known, value)| value.is_some() && known == name) {
                field(out, name.as_str().as_bytes(), value);
            }
        }
        for (name, value) in replaced {
            if let Some(value) = value {
                field(out, name.as_str().as_bytes(), value);
            }
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// What a response's fields say about its framing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Told {
    /// The length.
    pub length: Option<u64>,
    date: bool,
    connection: bool,
}

/// Begins a response's head: the status and its fields. What they say decides how it ends.
pub fn begin_response(out: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap) -> Told {
    let mut told = Told::default();
    status_line(out, status);
    for (name, value) in headers {
        if *name == header::CONTENT_LENGTH {
            told.length = value.to_str().ok().and_then(|text| text.parse().ok());
        } else if *name == header::DATE {
            told.date = true;
        } else if *name == header::CONNECTION {
            told.connection = true;
        }
        field(out, name.as_str().as_bytes(), value);
    }
    told
}

/// Ends it: with a length or a coding where the fields told none, a `Date` where they had none.
pub fn end_response(out: &mut Vec<u8>, told: Told, version: Version, ending: Ending, keep_alive: bool) {
    if !told.date {
        out.extend_from_slice(b"date: ");
        with_date(|date| out.extend_from_slice(date));
        out.extend_from_slice(b"\r\n");
    }
    match ending {
        Ending::Chunked => out.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        Ending::Length(length) if told.length.is_none() => {
            let _ = write!(out, "content-length: {length}\r\n");
        }
        Ending::Length(_) | Ending::None | Ending::Close => {}
    }
    if !told.connection {
        if !keep_alive {
            out.extend_from_slice(b"connection: close\r\n");
        } else if version == Version::HTTP_10 {
            out.extend_from_slice(b"connection: keep-alive\r\n");
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Writes an interim response (RFC 9110 §15.2).
pub fn interim(out: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap) {
    status_line(out, status);
    fields(out, headers);
    out.extend_from_slice(b"\r\n");
}

/// Writes the last chunk.
pub fn last_chunk(out: &mut Vec<u8>, trailers: Option<&HeaderMap>) {
    out.extend_from_slice(b"0\r\n");
    if let Some(trailers) = trailers {
        fields(out, trailers);
    }
    out.extend_from_slice(b"\r\n");
}

fn status_line(out: &mut Vec<u8>, status: StatusCode) {
    if status == StatusCode::OK {
        out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
        return;
    }
    out.extend_from_slice(b"HTTP/1.1 ");
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(status.canonical_reason().unwrap_or_default().as_bytes());
    out.extend_from_slice(b"\r\n");
}

fn fields(out: &mut Vec<u8>, headers: &HeaderMap) {
    for (name, value) in headers {
        field(out, name.as_str().as_bytes(), value);
    }
}

fn field(out: &mut Vec<u8>, name: &[u8], value: &HeaderValue) {
    // One reservation, then plain copies.
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// The time as `Date` has it, formatted once a second.
fn with_date<T>(write: impl FnOnce(&[u8]) -> T) -> T {
    thread_local! {
        static DATE: RefCell<(u64, Vec<u8>)> = const { RefCell::new((0, Vec::new())) };
    }
    let now = SystemTime::now();
    let second = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    DATE.with_borrow_mut(|(cached, text)| {
        if *cached != second {
            *cached = second;
            text.clear();
            let _ = write!(text, "{}", httpdate::HttpDate::from(now));
        }
        write(text)
    })
}
