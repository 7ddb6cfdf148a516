//! One client's connection of HTTP/1.1, from its first request to its last.
//!
//! Requests are answered one after the other, in order. While one is answered the
//! socket is watched, so that a client's leaving reaches the upstream at once. A client that ends only
//! its own side is told from one that has left by the reset that the next bytes draw
//! (`docs/decisions/0005-half-close.md`).

use std::{
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, BytesMut};
use http::{HeaderMap, Method, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use tokio::{io::AsyncWrite as _, net::TcpStream, time::Instant};
use tower::Service;

use crate::{
    context::{ClientConnection, Counted, Exchange, Request, Worker},
    error::Kind,
    http1::{
        body::Decoder,
        head::{self, Limits, Refused, RequestHead},
        outbox::Outbox,
        write::{self, Ending},
    },
    inbound::{Inbound, Left, Socket},
    layers::observe::Observed,
    snapshot::ClientLimits,
    timer::Alarm,
    upstream::upload::{RequestBody, Upload},
};

/// How long a drain leaves a client between two requests the time to send one.
pub(super) const LINGER: Duration = Duration::from_secs(1);
/// What is read of a client that was told to go, at most, before the connection is closed under it.
const DISCARDED: usize = 1024 * 1024;
/// Writes of one response before others have their turn.
const TURN: usize = 8;
/// Requests that a client may send ahead, in bytes.
const AHEAD: usize = 64 * 1024;
/// How soon after its end a client is looked at again: soon at first, then at leisure.
const LOOK: Duration = Duration::from_millis(20);
const LOOK_AGAIN: Duration = Duration::from_millis(640);

/// A connection.
pub(super) struct Http1<S> {
    worker: Rc<Worker>,
    connection: Rc<ClientConnection>,
    inbound: Rc<Inbound>,
    stack: S,
    limits: ClientLimits,
    alarm: Alarm,
    /// When the first byte of a head came, and how many were looked at in vain.
    begun: Option<(Instant, usize)>,
    /// Whether an empty line before it was skipped.
    skipped: bool,
    /// When the drain was noticed.
    draining: Option<Instant>,
    half_closed: Option<HalfClosed>,
}

/// A client that has ended its side while it is being answered.
struct HalfClosed {
    next: Instant,
    pause: Duration,
    looks: u32,
    /// Bytes that had been written when its end was noticed.
    written: u64,
    /// Whether it has ended its side, or is only looked at.
    ended: bool,
    /// Whether it was sent something since, which would draw a reset.
    judged: bool,
}

/// A connection of which only the beginning was read.
pub(super) struct Begun<S> {
    pub(super) worker: Rc<Worker>,
    pub(super) connection: Rc<ClientConnection>,
    pub(super) tcp: TcpStream,
    pub(super) first: BytesMut,
    pub(super) limits: ClientLimits,
    pub(super) stack: S,
}

/// What a request says about its response.
struct Asked {
    method: Method,
    version: Version,
    keep_alive: bool,
}

/// A request that is being answered.
struct Started<F> {
    future: F,
    asked: Asked,
    upload: Rc<Upload>,
}

impl<S> Http1<S>
where
    S: Service<Request, Response = Response<Observed>, Error = Infallible>,
    S::Future: Unpin,
{
    pub(super) fn new(
        worker: Rc<Worker>,
        connection: Rc<ClientConnection>,
        tcp: TcpStream,
        limits: ClientLimits,
        stack: S,
    ) -> Self {
        let alarm = worker.timer.alarm();
        let inbound = Rc::new(Inbound::new(tcp));
        Self {
            worker,
            connection,
            inbound,
            stack,
            limits,
            alarm,
            begun: None,
            skipped: false,
            draining: None,
            half_closed: None,
        }
    }

    /// What another protocol needs to go on.
    pub(super) fn into_parts(self) -> Option<Begun<S>> {
        let Self { worker, connection, inbound, stack, limits, .. } = self;
        let inbound = Rc::into_inner(inbound)?;
        let (tcp, first) = (inbound.tcp.into_inner(), inbound.kept.into_inner());
        Some(Begun { worker, connection, tcp, first, limits, stack })
    }

    /// Reads until it is clear whether the client begins with these bytes; nothing where it never says.
    pub(super) async fn begins_with(&mut self, preface: &[u8]) -> Option<bool> {
        poll_fn(|cx| {
            loop {
                {
                    let kept = self.inbound.kept.borrow();
                    if kept.len() >= preface.len() || !preface.starts_with(&kept) {
                        return Poll::Ready(Some(kept.starts_with(preface)));
                    }
                    if !kept.is_empty() && self.begun.is_none() {
                        self.begun = Some((Instant::now(), 0));
                    }
                }
                match self.inbound.poll_read_ahead(cx) {
                    Poll::Ready(Ok(1..)) => {}
                    Poll::Ready(_) => return Poll::Ready(None),
                    Poll::Pending => {
                        let since = self.begun.map(|(since, _)| since);
                        return if self.is_late(cx, since) { Poll::Ready(None) } else { Poll::Pending };
                    }
                }
            }
        })
        .await
    }

    /// Serves the connection to its end.
    pub(super) async fn serve(&mut self) {
        while let Some(started) = poll_fn(|cx| self.poll_start(cx)).await {
            // On the heap, so that a connection that waits is small.
            if !Box::pin(self.finish(started)).await {
                return;
            }
        }
    }

    /// Waits for the next request and begins it; nothing at the connection's end.
    fn poll_start(&mut self, cx: &mut Context<'_>) -> Poll<Option<Started<S::Future>>> {
        Poll::Ready(match ready!(self.poll_head(cx)) {
            Ok(Some(head)) => Some(self.begin(head)),
            Ok(None) => None,
            Err(refused) => Some(self.begin_refusal(refused)),
        })
    }

    /// Waits for a request's head.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<RequestHead>, Kind>> {
        let limits = Limits { head: self.limits.max_header, target: self.limits.max_uri };
        loop {
            let mut kept = self.inbound.kept.borrow_mut();
            // One empty line before a request is a habit of old clients (RFC 9112 §2.2).
            if !self.skipped && kept.starts_with(b"\r\n") {
                kept.advance(2);
                self.skipped = true;
                self.begun = None;
            }
            if !kept.is_empty() {
                let (since, seen) = self.begun.unwrap_or_else(|| (Instant::now(), 0));
                let parsed = head::is_whole(&kept, seen)
                    .and_then(|whole| if whole { head::parse_request(&kept, limits) } else { Ok(None) });
                match parsed {
                    Ok(Some((head, length))) => {
                        kept.advance(length);
                        if kept.is_empty() {
                            *kept = BytesMut::new();
                        }
                        self.begun = None;
                        return Poll::Ready(Ok(Some(head)));
                    }
                    Ok(None) if kept.len() > limits.head => return Poll::Ready(Err(Kind::HeaderTooLarge)),
                    Ok(None) => self.begun = Some((since, kept.len())),
                    Err(refused) => return Poll::Ready(Err(kind(refused))),
                }
            }
            let empty = kept.is_empty();
            drop(kept);
            // Nearly always the whole head comes at once: then it is read where it is.
            let parse = |bytes: &[u8]| {
                if empty && !bytes.starts_with(b"\r") { head::parse_request(bytes, limits) } else { Ok(None) }
            };
            match self.inbound.poll_read_with(cx, parse) {
                Poll::Ready(Ok((_, Ok(Some(head))))) => return Poll::Ready(Ok(Some(head))),
                Poll::Ready(Ok((_, Err(refused)))) => return Poll::Ready(Err(kind(refused))),
                Poll::Ready(Ok((1.., Ok(None)))) => {}
                // Half a head is nobody's request.
                Poll::Ready(Ok((0, _)) | Err(_)) => return Poll::Ready(Ok(None)),
                Poll::Pending => {
                    let since = self.begun.map(|(since, _)| since);
                    return match self.is_late(cx, since) {
                        false => Poll::Pending,
                        true if since.is_some() => Poll::Ready(Err(Kind::HeaderTimeout)),
                        true => Poll::Ready(Ok(None)),
                    };
                }
            }
        }
    }

    /// Whether a client has let its time pass: to begin a request, or to end the head that it began at `since`.
    fn is_late(&mut self, cx: &Context<'_>, since: Option<Instant>) -> bool {
        let active = self.connection.active.get();
        let due = match since {
            Some(since) => since + self.limits.header_timeout,
            None => active + self.limits.keep_alive,
        };
        let due = if self.worker.draining.get() {
            let noticed = *self.draining.get_or_insert_with(Instant::now);
            due.min(noticed.max(active) + LINGER)
        } else {
            due
        };
        self.alarm.set(due, cx) && Instant::now() >= due
    }

    /// Begins the answer to a head that is no request.
    fn begin_refusal(&mut self, refused: Kind) -> Started<S::Future> {
        let mut http = Box::new(http::Request::new(RequestBody::empty()));
        // Not a method that anybody sent: what was sent could not be read.
        *http.method_mut() = Method::from_bytes(b"-").unwrap_or_default();
        *http.uri_mut() = Uri::from_static("*");
        let context = Exchange::begin(&self.worker, &self.connection, Some(&self.inbound), &http);
        context.refused.set(Some(refused));
        let upload = context.upload.clone();
        let asked = Asked { method: Method::GET, version: Version::HTTP_11, keep_alive: false };
        // What else was sent is not for anybody.
        self.inbound.decoder.set(Decoder::Close);
        Started { future: self.stack.call(Request { http, context }), asked, upload }
    }

    /// Begins a request.
    fn begin(&mut self, head: RequestHead) -> Started<S::Future> {
        let RequestHead { request, framing, keep_alive } = head;
        self.inbound.decoder.set(Decoder::new(framing));
        let asked = Asked { method: request.method().clone(), version: request.version(), keep_alive };
        self.inbound.takes_interim.set(asked.version == Version::HTTP_11);
        let http = Box::new(request.map(|()| RequestBody::http1(&self.inbound)));
        let context = Exchange::begin(&self.worker, &self.connection, Some(&self.inbound), &http);
        let upload = context.upload.clone();
        Started { future: self.stack.call(Request { http, context }), asked, upload }
    }

    /// Answers a request to its end; whether another may follow.
    async fn finish(&mut self, started: Started<S::Future>) -> bool {
        let Started { future, asked, upload } = started;
        match self.respond(future, &asked, &upload).await {
            Some(true) => true,
            Some(false) => {
                Box::pin(self.linger(&upload)).await;
                false
            }
            None => false,
        }
    }

    /// Waits for a response and writes it; whether the connection stays open, or nothing where it broke.
    async fn respond(&mut self, mut future: S::Future, asked: &Asked, upload: &Upload) -> Option<bool> {
        self.half_closed = None;
        self.skipped = false;
        let response = poll_fn(|cx| {
            if let Poll::Ready(result) = Pin::new(&mut future).poll(cx) {
                return Poll::Ready(match result {
                    Ok(response) => Some(response),
                    Err(never) => match never {},
                });
            }
            if let Poll::Ready(Err(_)) = self.inbound.poll_interim(cx) {
                return Poll::Ready(None);
            }
            if self.has_left(cx, upload, None) { Poll::Ready(None) } else { Poll::Pending }
        })
        .await?;
        drop(future);
        let (parts, mut body) = response.into_parts();
        let status = parts.status;
        let mut outbox = Outbox::default();
        outbox.flat().append(&mut self.inbound.take_interim());
        let told = write::begin_response(outbox.flat(), status, &parts.headers);
        let ending = ending(asked, status, told.length.or_else(|| body.size_hint().exact()));
        let keep_alive = asked.keep_alive
            && ending != Ending::Close
            && !self.worker.draining.get()
            && !body.is_last()
            && (upload.is_done() || (!upload.is_unfinished() && self.inbound.skip_body()));
        write::end_response(outbox.flat(), told, asked.version, ending, keep_alive);
        head::reuse_map(parts.headers);
        let mut left = match ending {
            Ending::Length(length) => Some(length),
            Ending::None => Some(0),
            Ending::Chunked | Ending::Close => None,
        };
        let mut ended = left == Some(0);
        let mut broken = false;
        let mut stuck: Option<(Instant, u64)> = None;
        let sent = poll_fn(|cx| {
            for _ in 0..TURN {
                let mut starved = false;
                while !ended && outbox.has_room() {
                    match Pin::new(&mut body).poll_frame(cx) {
                        Poll::Pending => {
                            starved = true;
                            break;
                        }
                        Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                            Ok(data) => {
                                // More than was promised would be taken for the next response.
                                broken = left.is_some_and(|left| left < data.len() as u64);
                                left = left.map(|left| left.saturating_sub(data.len() as u64));
                                ended = broken || left == Some(0);
                                if !broken {
                                    outbox.push(data, ending == Ending::Chunked);
                                }
                            }
                            Err(frame) => {
                                if ending == Ending::Chunked {
                                    write::last_chunk(outbox.flat(), frame.trailers_ref());
                                }
                                ended = true;
                            }
                        },
                        Poll::Ready(None) => {
                            if ending == Ending::Chunked {
                                write::last_chunk(outbox.flat(), None);
                            }
                            ended = true;
                        }
                        Poll::Ready(Some(Err(_))) => (ended, broken) = (true, true),
                    }
                }
                broken |= ended && left.is_some_and(|left| left > 0);
                let flushed = outbox.poll_flush(cx, Pin::new(&mut *self.inbound.tcp.borrow_mut()));
                match flushed {
                    Poll::Ready(Ok(())) if ended => return Poll::Ready(Some(())),
                    Poll::Ready(Ok(())) => stuck = None,
                    Poll::Ready(Err(_)) => return Poll::Ready(None),
                    Poll::Pending => {
                        let late = self.is_stuck(cx, &mut stuck, outbox.taken());
                        return if late { Poll::Ready(None) } else { Poll::Pending };
                    }
                }
                if starved {
                    let left = self.has_left(cx, upload, Some(outbox.taken()));
                    return if left { Poll::Ready(None) } else { Poll::Pending };
                }
            }
            // A long body must not keep others waiting.
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        if (broken || sent.is_none()) && ending == Ending::Close {
            self.reset();
        }
        if broken || sent.is_none() {
            body.cut();
            return None;
        }
        if status == StatusCode::SWITCHING_PROTOCOLS {
            Box::pin(self.tunnel(body)).await;
            return None;
        }
        // The log's line is written when the body goes, before the next request is read.
        drop(body);
        Some(keep_alive)
    }

    /// Carries bytes both ways after a 101.
    async fn tunnel(&mut self, body: Observed) {
        let Some((tunnel, context)) = body.into_tunnel() else { return };
        let _count = Counted::one(self.worker.store.process.clone(), |process| &process.tunnels);
        let early = self.inbound.kept.take();
        let idle = context.route().limits.idle;
        let down = tunnel.carry(Socket(&self.inbound), early, &self.worker.timer, idle).await;
        context.sent.set(down);
    }

    /// Whether the client takes no more of its response for longer than the route lets it pause.
    fn is_stuck(&mut self, cx: &Context<'_>, stuck: &mut Option<(Instant, u64)>, taken: u64) -> bool {
        let Some(idle) = self.connection.idle.get() else { return false };
        let (since, before) = *stuck.get_or_insert_with(|| (Instant::now(), taken));
        if taken > before {
            *stuck = Some((Instant::now(), taken));
        }
        let due = stuck.map_or(since, |(since, _)| since) + idle;
        self.alarm.set(due, cx) && Instant::now() >= due
    }

    /// Whether the client has left. `written` counts what it was sent of a response that has begun.
    fn has_left(&mut self, cx: &mut Context<'_>, upload: &Upload, written: Option<u64>) -> bool {
        if written.is_some() && upload.failure() == Some(Kind::ClientAborted) {
            return true;
        }
        if upload.awaits_client() && upload.poll_end(cx).is_pending() {
            // Whoever reads the body sees it.
            return false;
        }
        let whole = !upload.is_unfinished() && self.inbound.decoder.get().is_done();
        while whole && !self.inbound.ended.get() && self.inbound.kept.borrow().len() < AHEAD {
            match self.inbound.poll_read_ahead(cx) {
                Poll::Pending => return false,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(_)) => return true,
            }
        }
        // Of one that has ended its side, more may be in the kernel than was read yet: then that end is none to its request.
        self.looks_gone(cx, written, whole || written.is_none())
    }

    /// Looks at a client from time to time that cannot be heard of by reading: it has ended its side, or sent more than is read now.
    ///
    /// One that has only ended its side is told from one that is gone by the reset that bytes draw from the latter.
    /// Before the response there is an interim one to send; in a response that pauses there is nothing. Only a reset counts unless
    /// `judge`.
    fn looks_gone(&mut self, cx: &mut Context<'_>, written: Option<u64>, judge: bool) -> bool {
        let now = Instant::now();
        let bytes = written.unwrap_or(0);
        let fresh =
            |ended| HalfClosed { next: now + LOOK, pause: LOOK, written: bytes, ended, looks: 0, judged: false };
        let look = self.half_closed.get_or_insert_with(|| fresh(false));
        // What was sent before its end says nothing about who is there after it.
        if !look.ended && self.inbound.ended.get() {
            *look = fresh(true);
        }
        if now >= look.next {
            look.looks += 1;
            match self.inbound.look() {
                Left::Gone => return true,
                Left::HalfClosed if !judge => look.pause = (look.pause * 2).min(2 * LOOK),
                Left::No => look.pause = (look.pause * 2).min(2 * LOOK),
                Left::HalfClosed if !look.ended => *look = fresh(true),
                Left::HalfClosed if look.judged => look.pause = (look.pause * 2).min(LOOK_AGAIN),
                Left::HalfClosed => match written {
                    None if !self.inbound.takes_interim.get() => return true,
                    None => {
                        look.judged = true;
                        self.inbound.interim(StatusCode::CONTINUE, &HeaderMap::new());
                        if let Poll::Ready(Err(_)) = self.inbound.poll_interim(cx) {
                            return true;
                        }
                    }
                    // What was written meanwhile drew no reset.
                    Some(bytes) if bytes > look.written => look.judged = true,
                    // The second look is for what was just on its way at the first.
                    Some(_) if look.looks > 1 => return true,
                    Some(_) => {}
                },
            }
            look.next = now + look.pause;
        }
        let next = look.next;
        self.alarm.set(next, cx);
        false
    }

    /// Closes so that the client sees its answer: closing under one that still writes would reset the connection.
    async fn linger(&mut self, upload: &Upload) {
        // Somebody may still want the rest of its request, and limits its pauses.
        poll_fn(|cx| {
            if upload.poll_end(cx).is_pending() && !self.looks_gone(cx, Some(0), false) {
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        upload.abandon();
        let whole = upload.is_done() && self.inbound.decoder.get().is_done();
        if whole && self.inbound.kept.borrow().is_empty() {
            let more = poll_fn(|cx| Poll::Ready(self.inbound.poll_read_ahead(cx))).await;
            if more.is_pending() {
                return;
            }
        }
        let inbound = &self.inbound;
        let closed = poll_fn(|cx| Pin::new(&mut *inbound.tcp.borrow_mut()).poll_shutdown(cx)).await;
        if closed.is_err() || inbound.ended.get() {
            return;
        }
        let until = Instant::now() + LINGER;
        let mut discarded = 0;
        poll_fn(|cx| {
            while discarded < DISCARDED {
                inbound.kept.take();
                match inbound.poll_read_ahead(cx) {
                    Poll::Ready(Ok(count @ 1..)) => discarded += count,
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => break,
                }
            }
            // Beyond that it is left in the kernel, and the client has the time to read its answer.
            if self.alarm.set(until, cx) && Instant::now() >= until { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Nothing but a reset tells an HTTP/1.0 client that its body broke off.
    fn reset(&self) {
        let _ = socket2::SockRef::from(&*self.inbound.tcp.borrow()).set_linger(Some(Duration::ZERO));
    }
}

fn kind(refused: Refused) -> Kind {
    match refused {
        Refused::Malformed(why) => Kind::BadRequest(why),
        Refused::Target => Kind::UriTooLong,
        Refused::Fields => Kind::HeaderTooLarge,
        Refused::Version => Kind::Version,
    }
}

/// How the client learns where the body ends.
fn ending(asked: &Asked, status: StatusCode, length: Option<u64>) -> Ending {
    let bodyless = asked.method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    match length {
        _ if bodyless => Ending::None,
        Some(length) => Ending::Length(length),
        None if asked.version == Version::HTTP_11 => Ending::Chunked,
        None => Ending::Close,
    }
}
