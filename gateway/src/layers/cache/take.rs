//! Takes an answer in while its client reads it.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body::Body as _;

use super::{CONDITIONS, Filling, tell};
use crate::{
    body::ResponseBody,
    cache::{
        fill::{End, Fill, Rest},
        flight::{Lead, Outcome},
        marks::Position,
        policy::{self, Times},
        stored::{self, Stored},
        vary,
    },
    context::Response,
    error::{Error, Kind},
};

/// Puts an answer where all find it; whether it is kept here.
pub(super) fn store(filling: &Filling, key: &[u8], stored: &Arc<Stored>, now: u64) -> bool {
    let kept = filling.cache.put(key, stored);
    if kept && let Some(shared) = filling.cache.shared() {
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
    let tags = stored::tags(&headers).ok_or("tags")?;
    Ok((
        Stored {
            status,
            tags,
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

/// Takes an answer in while its client reads it. `said` is its `Cache-Status` so far.
pub(super) fn keep(
    filling: Filling,
    key: Vec<u8>,
    head: Stored,
    length: Option<u64>,
    response: Response,
    mut lead: Option<Lead>,
    said: &str,
) -> Response {
    let now = head.came;
    let first = usize::try_from(length.unwrap_or(FIRST)).unwrap_or(usize::MAX);
    let (mut parts, mut body) = response.into_parts();
    let Some(reserved) = filling.cache.reserve(first) else {
        // There is no memory for it now; the next may find some, and nobody waits for that.
        if let Some(lead) = &mut lead {
            lead.settle(Outcome::Private);
        }
        tell(&mut parts.headers, &format!("{said}; detail=busy"));
        return http::Response::from_parts(parts, body);
    };
    let fill = Fill::new(head, length, reserved, first);
    // The usual answer is there whole already.
    let mut cx = Context::from_waker(Waker::noop());
    let mut end = (length == Some(0) || body.is_end_stream()).then_some(End::Whole);
    while end.is_none()
        && let Poll::Ready(frame) = Pin::new(&mut body).poll_frame(&mut cx)
    {
        end = take(&fill, &body, frame, filling.cache.max_object);
    }
    let whole = length.is_none_or(|length| length == fill.bytes() as u64);
    if matches!(end, Some(End::Whole)) && whole {
        let stored = Arc::new(Stored { body: fill.join(), ..fill.head.clone() });
        let kept = store(&filling, &key, &stored, now);
        if let Some(lead) = &mut lead {
            lead.settle(if kept { Outcome::Stored } else { Outcome::Private });
        }
        tell(&mut parts.headers, &if kept { format!("{said}; stored") } else { format!("{said}; detail=outdated") });
        return http::Response::from_parts(parts, ResponseBody::Full(stored.body.clone()));
    }
    let rest = Rest::default();
    let Some(reader) = fill.read(Some(rest.clone())) else {
        return http::Response::from_parts(parts, ResponseBody::Empty);
    };
    if end.is_none()
        && length.is_some()
        && let Some(lead) = &mut lead
    {
        lead.settle(Outcome::Streaming(fill.clone()));
    }
    tell(
        &mut parts.headers,
        &if end.is_none() { format!("{said}; stored") } else { format!("{said}; detail=too-large") },
    );
    let taking = Taking { filling, key, fill, body, rest, lead, ended: false };
    match end {
        Some(end) => taking.end(end, now),
        None => drop(tokio::task::spawn_local(taking.run(now))),
    }
    http::Response::from_parts(parts, ResponseBody::Filling(Box::new(reader)))
}

/// What is reserved at a time for an answer whose length is not known.
const FIRST: u64 = 64 * 1024;

/// Takes one frame; how it ends, if it does.
fn take(
    fill: &Fill,
    body: &ResponseBody,
    frame: Option<Result<http_body::Frame<Bytes>, Error>>,
    most: usize,
) -> Option<End> {
    let frame = match frame {
        None => return Some(End::Whole),
        Some(Err(error)) => return Some(End::Broken(error.kind, error.detail)),
        Some(Ok(frame)) => frame,
    };
    // Trailers that nobody announced may be left out (RFC 9110 §6.5.2).
    let Ok(data) = frame.into_data() else { return Some(End::Whole) };
    let room = fill.has_room(data.len());
    let bytes = fill.push(data);
    if body.is_end_stream() || fill.length.is_some_and(|length| bytes as u64 >= length) {
        return Some(End::Whole);
    }
    (!room || bytes > most).then_some(End::Rest)
}

/// An answer that is being taken in.
struct Taking {
    filling: Filling,
    key: Vec<u8>,
    fill: Arc<Fill>,
    body: ResponseBody,
    rest: Rest,
    lead: Option<Lead>,
    ended: bool,
}

impl Drop for Taking {
    /// Whoever reads it must not wait for ever, whatever happened.
    fn drop(&mut self) {
        if !self.ended {
            self.fill.end(End::Broken(Kind::Internal, "it was not taken in to its end".to_owned()));
        }
    }
}

impl Taking {
    /// Takes it in to its end, as long as anybody reads it.
    async fn run(mut self, now: u64) {
        let end = loop {
            let frame = poll_fn(|cx| {
                if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
                    return Poll::Ready(Some(frame));
                }
                self.fill.poll_left(cx).map(|()| None)
            });
            // Nobody reads it: the upstream need not go on.
            let Some(frame) = frame.await else { return };
            if let Some(end) = take(&self.fill, &self.body, frame, self.filling.cache.max_object) {
                break end;
            }
        };
        self.end(end, now);
    }

    fn end(mut self, end: End, now: u64) {
        self.ended = true;
        let whole = self.fill.length.is_none_or(|length| length == self.fill.bytes() as u64);
        let outcome = match &end {
            End::Whole if whole => {
                let stored = Arc::new(Stored { body: self.fill.join(), ..self.fill.head.clone() });
                // Those who read it are done first.
                self.fill.end(end.clone());
                if store(&self.filling, &self.key, &stored, now) { Outcome::Stored } else { Outcome::Private }
            }
            End::Rest => {
                // The next would be no shorter.
                self.filling.cache.pass(&self.filling.key, now);
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
