//! Takes an answer in while its client reads it.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body::Body as _;

use super::{CONDITIONS, Filling};
use crate::{
    body::ResponseBody,
    cache::{
        Reserved,
        fill::{End, Fill, Rest},
        flight::{Lead, Outcome},
        marks::Position,
        policy::{self, Times},
        stored::{self, Stored},
        vary,
    },
    context::Response,
};

/// Puts an answer where all find it; whether it is kept here.
pub(super) fn store(filling: &Filling, key: &[u8], stored: &Arc<Stored>, now: u64) -> bool {
    let kept = filling.cache.put(key, stored);
    if kept && let Some(shared) = &filling.cache.shared {
        shared.put(key, &vary::tag(&stored.selection), stored, now);
    }
    kept
}

/// How an answer will be kept, and its length if that is known; or why not.
pub(super) fn plan(
    filling: &Filling,
    request: &HeaderMap,
    response: &mut Response,
    now: u64,
    born: Position,
    times: Times,
) -> Result<(Stored, Option<u64>), &'static str> {
    let status = response.status();
    // What was said of a part, or to a condition, is not said of the whole.
    let part = CONDITIONS.iter().any(|name| request.contains_key(name)) && status != StatusCode::OK;
    if part || matches!(status, StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE) {
        return Err("part");
    }
    let terms = policy::terms(status, response.headers(), &filling.asks, &filling.keep, times)?;
    if matches!(response.body(), ResponseBody::Tunnel(_)) {
        return Err("tunnel");
    }
    let kind = response.headers().get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    if kind.len() >= 17 && kind[..17].eq_ignore_ascii_case(b"text/event-stream") {
        return Err("event stream");
    }
    if response.headers().contains_key(header::TRAILER) {
        return Err("trailers");
    }
    let length = response.headers().get(header::CONTENT_LENGTH);
    let length: Option<u64> = length.and_then(|length| length.to_str().ok()?.parse().ok());
    let length = length.or_else(|| response.body().size_hint().exact());
    if length.is_some_and(|length| length > filling.cache.max_object as u64) {
        return Err("too large");
    }
    // It says when it was made, now and whenever it is used (RFC 9110 §6.6.1).
    if !response.headers().contains_key(header::DATE)
        && let Ok(date) = HeaderValue::try_from(httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_millis(now)))
    {
        response.headers_mut().insert(header::DATE, date);
    }
    let headers = stored::keepable(response.headers());
    let names = vary::names(&headers).ok_or("vary")?;
    Ok((
        Stored {
            status,
            tags: stored::tags(&headers),
            headers,
            body: Bytes::new(),
            selection: vary::select(&names, request),
            terms,
            came: now,
            born,
        },
        length,
    ))
}

/// Takes an answer in while its client reads it.
pub(super) fn keep(
    filling: Filling,
    key: Vec<u8>,
    head: Stored,
    length: Option<u64>,
    response: Response,
    mut lead: Option<Lead>,
    now: u64,
) -> Response {
    let first = usize::try_from(length.unwrap_or(FIRST)).unwrap_or(usize::MAX);
    let (parts, mut body) = response.into_parts();
    let Some(reserved) = filling.cache.reserve(first) else {
        // There is no memory for it now; the next may find some.
        return http::Response::from_parts(parts, body);
    };
    let fill = Fill::new(head, length);
    // The usual answer is there whole already.
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let mut whole = length == Some(0) || body.is_end_stream();
    let mut odd = None;
    while !whole && odd.is_none() {
        match Pin::new(&mut body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => {
                    let bytes = fill.push(data);
                    whole = body.is_end_stream() || length.is_some_and(|length| bytes as u64 >= length);
                    if bytes > filling.cache.max_object {
                        odd = Some(End::Rest);
                    }
                }
                // Trailers that nobody announced may be left out (RFC 9110 §6.5.2).
                Err(_) => whole = true,
            },
            Poll::Ready(Some(Err(error))) => odd = Some(End::Broken(error.kind, error.detail)),
            Poll::Ready(None) => whole = true,
            Poll::Pending => break,
        }
    }
    if whole && length.is_none_or(|length| length == fill.bytes() as u64) {
        let stored = Arc::new(Stored { body: fill.join(), ..fill.head.clone() });
        let kept = store(&filling, &key, &stored, now);
        if let Some(lead) = &mut lead {
            lead.settle(if kept { Outcome::Stored } else { Outcome::Private });
        }
        return http::Response::from_parts(parts, ResponseBody::Full(stored.body.clone()));
    }
    let rest = Rest::default();
    let Some(reader) = fill.read(Some(rest.clone())) else {
        return http::Response::from_parts(parts, ResponseBody::Empty);
    };
    if let Some(end) = odd {
        *rest.borrow_mut() = Some(body);
        fill.end(end);
        if let Some(lead) = &mut lead {
            lead.settle(Outcome::Private);
        }
    } else {
        if length.is_some()
            && key == filling.key
            && let Some(lead) = &mut lead
        {
            lead.settle(Outcome::Streaming(fill.clone()));
        }
        let fill = fill.clone();
        let taking = Taking { filling, key, fill, body, rest, lead, reserved, left: first };
        tokio::task::spawn_local(taking.run(now));
    }
    http::Response::from_parts(parts, ResponseBody::Filling(Box::new(reader)))
}

/// What is reserved at a time for an answer whose length is not known.
const FIRST: u64 = 64 * 1024;

/// An answer that is being taken in.
struct Taking {
    filling: Filling,
    key: Vec<u8>,
    fill: Arc<Fill>,
    body: ResponseBody,
    rest: Rest,
    lead: Option<Lead>,
    reserved: Reserved,
    /// What is left of the memory that was reserved.
    left: usize,
}

impl Taking {
    /// Takes it in to its end, as long as anybody reads it.
    async fn run(mut self, now: u64) {
        let before = self.fill.bytes();
        self.left = self.left.saturating_sub(before);
        let end = loop {
            let frame = poll_fn(|cx| {
                if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
                    return Poll::Ready(Some(frame));
                }
                self.fill.poll_left(cx).map(|()| None)
            });
            match frame.await {
                // Nobody reads it: the upstream need not go on.
                None => return,
                Some(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { break End::Whole };
                    let size = data.len();
                    let bytes = self.fill.push(data);
                    if self.body.is_end_stream() || self.fill.length.is_some_and(|length| bytes as u64 >= length) {
                        break End::Whole;
                    }
                    let room = match self.left.checked_sub(size) {
                        Some(left) => {
                            self.left = left;
                            true
                        }
                        None => self.reserved.grow(size),
                    };
                    if !room || bytes > self.filling.cache.max_object {
                        break End::Rest;
                    }
                }
                Some(Some(Err(error))) => break End::Broken(error.kind, error.detail),
                Some(None) => break End::Whole,
            }
        };
        let whole = self.fill.length.is_none_or(|length| length == self.fill.bytes() as u64);
        let outcome = match &end {
            End::Whole if whole => {
                let stored = Arc::new(Stored { body: self.fill.join(), ..self.fill.head.clone() });
                let kept = store(&self.filling, &self.key, &stored, now);
                if kept { Outcome::Stored } else { Outcome::Private }
            }
            End::Rest => {
                *self.rest.borrow_mut() = Some(std::mem::replace(&mut self.body, ResponseBody::Empty));
                Outcome::Private
            }
            _ => Outcome::Private,
        };
        if let Some(lead) = &mut self.lead {
            lead.settle(outcome);
        }
        self.fill.end(end);
    }
}
