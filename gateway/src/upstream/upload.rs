//! The request's body on its way to an upstream, and the time limits that hang on it.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::{task::AbortHandle, time::Instant};

use crate::{
    error::{Error, Kind},
    fields::{self, ClaimFields},
    http1::body::Decoder,
    inbound::{Inbound, Piece},
    shadow::Taken,
    timer::{Sleep, Timer},
};

/// What is known of a request's body.
#[derive(Debug)]
pub struct Upload {
    bytes: Cell<u64>,
    limit: Cell<u64>,
    state: Cell<State>,
    /// When it last moved, or ended. Nothing where there was nothing to wait for.
    moved: Cell<Option<Instant>>,
    /// Whether the last look for more found none yet.
    client_paused: Cell<bool>,
    /// Whether anybody has asked for it yet.
    begun: Cell<bool>,
    /// Who must not end before it does.
    holder: RefCell<Option<Rc<dyn Any>>>,
    /// Who waits for its end.
    waiter: RefCell<Option<Waker>>,
    /// What sends it on after its response has begun.
    pump: RefCell<Option<AbortHandle>>,
    /// Whether a time limit has ended the try.
    expired: Cell<bool>,
    /// Whether its client waits to be asked for it (`Expect: 100-continue`).
    expects: Cell<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Streaming,
    Done,
    /// Nobody wants the rest.
    Dropped,
    Failed(Kind),
}

impl Upload {
    fn new(state: State) -> Rc<Self> {
        Rc::new(Self {
            bytes: Cell::new(0),
            limit: Cell::new(u64::MAX),
            state: Cell::new(state),
            moved: Cell::new((state == State::Streaming).then(Instant::now)),
            client_paused: Cell::new(false),
            begun: Cell::new(false),
            holder: RefCell::new(None),
            waiter: RefCell::new(None),
            pump: RefCell::new(None),
            expired: Cell::new(false),
            expects: Cell::new(false),
        })
    }

    /// Bytes that went on.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Lets through no more than this.
    pub fn set_limit(&self, bytes: u64) {
        self.limit.set(bytes);
    }

    /// Whether all of it went on.
    pub fn is_done(&self) -> bool {
        self.state.get() == State::Done
    }

    /// Whether there was nothing to send.
    pub fn is_empty(&self) -> bool {
        self.is_done() && self.bytes.get() == 0
    }

    /// Why it broke off, if it did.
    pub fn failure(&self) -> Option<Kind> {
        match self.state.get() {
            State::Failed(kind) => Some(kind),
            State::Streaming | State::Done | State::Dropped => None,
        }
    }

    /// Keeps something alive until the body has ended.
    pub fn hold(&self, holder: Rc<dyn Any>) {
        if self.state.get() == State::Streaming {
            *self.holder.borrow_mut() = Some(holder);
        }
    }

    /// Whether a time limit has ended the try.
    pub fn is_expired(&self) -> bool {
        self.expired.get()
    }

    /// Its client waits to be asked for it.
    pub fn set_expects(&self) {
        self.expects.set(true);
    }

    /// A try begins.
    pub fn set_expired(&self, expired: bool) {
        self.expired.set(expired);
    }

    /// Names the task that sends it on.
    pub fn set_pump(&self, pump: AbortHandle) {
        *self.pump.borrow_mut() = Some(pump);
    }

    /// Nobody sends it on any more.
    pub fn abandon(&self) {
        if let Some(pump) = self.pump.take() {
            pump.abort();
        }
    }

    /// Resolves at its end, however it ended.
    pub fn poll_end(&self, cx: &Context<'_>) -> Poll<()> {
        if self.is_unfinished() {
            *self.waiter.borrow_mut() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(())
    }

    /// Whether its reader waits for the client to send more.
    pub fn awaits_client(&self) -> bool {
        self.is_streaming() && self.client_paused.get()
    }

    fn is_streaming(&self) -> bool {
        // Who has yet to be asked for it does not pause.
        let waits = self.expects.get() && self.bytes.get() == 0;
        self.begun.get() && !waits && self.state.get() == State::Streaming
    }

    /// Whether more may come, and somebody wants it.
    pub fn is_unfinished(&self) -> bool {
        self.state.get() == State::Streaming
    }

    /// For how long the upstream has had all of it, of the time since then; nothing while it has not.
    pub fn waited(&self, since: Instant) -> Option<Duration> {
        (!self.is_unfinished()).then(|| self.moved.get().map_or(since, |moved| moved.max(since)).elapsed())
    }

    /// For how long it has not moved.
    pub fn quiet(&self) -> Duration {
        self.moved.get().map_or(Duration::MAX, |moved| moved.elapsed())
    }

    fn step(&self, state: State) {
        self.moved.set(Some(Instant::now()));
        self.state.set(state);
        if state != State::Streaming {
            if let Some(waiter) = self.waiter.take() {
                waiter.wake();
            }
            let holder = self.holder.take();
            // Last, since it may own all of this.
            drop(holder);
        }
    }
}

/// Where a body comes from.
enum Source {
    /// Nowhere: there is none.
    Empty,
    /// A connection of HTTP/1.1.
    Http1(Rc<Inbound>),
    /// A stream of HTTP/2.
    Http2(Incoming),
}

impl Source {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Piece>> {
        match self {
            Self::Empty => Poll::Ready(None),
            Self::Http1(inbound) => inbound.poll_body(cx),
            Self::Http2(incoming) => match ready!(Pin::new(&mut *incoming).poll_frame(cx)) {
                // A reset without an error ends the stream, but not the body.
                None if !incoming.is_end_stream() => {
                    Poll::Ready(Some(Err((Kind::ClientAborted, "the stream was reset".to_owned()))))
                }
                None => Poll::Ready(None),
                Some(Ok(frame)) => Poll::Ready(Some(Ok(harmless(frame)))),
                Some(Err(error)) => Poll::Ready(Some(Err((Kind::ClientAborted, error.to_string())))),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Http1(inbound) => inbound.decoder.get().is_done(),
            Self::Http2(incoming) => incoming.is_end_stream(),
        }
    }
}

/// Trailers without what has no place there; those of HTTP/1.1 were read so.
fn harmless(frame: Frame<Bytes>) -> Frame<Bytes> {
    match frame.into_trailers() {
        Ok(mut trailers) => {
            let doomed: Vec<_> =
                trailers.keys().filter(|name| fields::is_forbidden_in_trailers(name)).cloned().collect();
            for name in doomed {
                trailers.remove(name);
            }
            Frame::trailers(trailers)
        }
        Err(frame) => frame,
    }
}

/// A request's body.
pub struct RequestBody {
    source: Source,
    /// What was read before anybody could take it, and what ended it.
    ahead: BytesMut,
    ahead_trailers: Option<HeaderMap>,
    /// What has gone on, where it may be wanted again.
    tape: Option<Tape>,
    /// Where it goes when a try is over.
    home: Option<Rc<Home>>,
    /// Fields that only the gateway says, after a body too.
    forbidden: Option<Arc<ClaimFields>>,
    /// Who takes what goes by, too.
    taken: Option<Rc<RefCell<Taken>>>,
    upload: Rc<Upload>,
}

/// What has gone on of a body.
#[derive(Default)]
struct Tape {
    data: BytesMut,
    trailers: Option<HeaderMap>,
    /// How much may be kept.
    limit: usize,
    /// Whether it was more than that.
    torn: bool,
}

/// Where a body waits between two tries.
#[derive(Default)]
pub struct Home {
    body: RefCell<Option<RequestBody>>,
    /// Whether another try may come.
    open: Cell<bool>,
}

impl Home {
    /// The home of a body that may be sent again as long as it is no longer than this.
    pub fn new(mut body: RequestBody, limit: usize) -> Rc<Self> {
        let this = Rc::new(Self { body: RefCell::new(None), open: Cell::new(true) });
        body.tape = Some(Tape { limit, ..Tape::default() });
        body.home = Some(this.clone());
        this.body.replace(Some(body));
        this
    }

    /// The body, for a try.
    pub fn take(&self) -> Option<RequestBody> {
        self.body.take()
    }

    /// Whether it is here and as it was at first; makes it so.
    pub fn rewind(&self) -> bool {
        self.body.borrow_mut().as_mut().is_some_and(RequestBody::rewind)
    }

    /// Reads ahead until the body is whole; not where it is too long for that.
    pub async fn is_whole(&self) -> Result<bool, Error> {
        // Dropped before its end, it comes home.
        let Some(mut body) = self.take() else { return Ok(false) };
        poll_fn(|cx| {
            let whole = body.poll_whole(cx);
            if whole.is_pending() && body.upload.bytes() >= AHEAD {
                return Poll::Ready(Ok(false));
            }
            whole.map_ok(|()| true)
        })
        .await
    }

    /// No other try will come.
    pub fn close(&self) {
        self.open.set(false);
        // Outside of the borrow: its end may end all of the exchange.
        let body = self.body.take();
        drop(body);
    }
}

/// What may be read ahead of a body, about.
const AHEAD: u64 = 64 * 1024;

impl RequestBody {
    fn new(source: Source) -> Self {
        let state = if source.is_end_stream() { State::Done } else { State::Streaming };
        Self {
            source,
            ahead: BytesMut::new(),
            ahead_trailers: None,
            tape: None,
            home: None,
            forbidden: None,
            taken: None,
            upload: Upload::new(state),
        }
    }

    /// None.
    pub fn empty() -> Self {
        Self::new(Source::Empty)
    }

    /// What a client sends on a connection.
    pub fn http1(inbound: &Rc<Inbound>) -> Self {
        if inbound.decoder.get().is_done() { Self::empty() } else { Self::new(Source::Http1(inbound.clone())) }
    }

    /// What a client sends on a stream.
    pub fn http2(incoming: Incoming) -> Self {
        Self::new(Source::Http2(incoming))
    }

    /// Reads ahead, within a bound; ready once the body is whole.
    pub fn poll_whole(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while self.upload.is_unfinished() && self.upload.bytes() < AHEAD {
            match ready!(self.poll_source(cx)) {
                // Together, however small the pieces are.
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.ahead.extend_from_slice(&data),
                    Err(frame) => self.ahead_trailers = frame.into_trailers().ok(),
                },
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => break,
            }
        }
        if self.upload.is_unfinished() { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    /// A body that is there whole.
    pub fn whole(data: &[u8]) -> Self {
        let mut this = Self::new(Source::Empty);
        this.ahead = BytesMut::from(data);
        this.upload.bytes.set(data.len() as u64);
        this
    }

    /// Takes what goes by of it, too.
    pub fn watch(&mut self, taken: Rc<RefCell<Taken>>) {
        self.taken = Some(taken);
    }

    /// These fields do not come after it.
    pub fn forbid(&mut self, fields: &Arc<ClaimFields>) {
        self.forbidden = (!fields.is_empty()).then(|| fields.clone());
    }

    /// What is known of it.
    pub fn upload(&self) -> &Rc<Upload> {
        &self.upload
    }
}

/// What is read of a body that nobody wants, at most.
const DISCARDED: u64 = 1024 * 1024;
/// For how long.
const DISCARDING: Duration = Duration::from_secs(1);

impl RequestBody {
    /// Reads on for a little while.
    pub async fn discard(mut self, timer: Timer) {
        let limit = self.upload.bytes() + DISCARDED;
        self.upload.set_limit(limit);
        let ended = async { while let Some(Ok(_)) = poll_fn(|cx| Pin::new(&mut self).poll_frame(cx)).await {} };
        tokio::select! {
            () = ended => {}
            () = timer.sleep(DISCARDING) => {}
        }
    }
}

impl RequestBody {
    /// Back to its beginning, if all that has gone on was kept.
    fn rewind(&mut self) -> bool {
        let Some(tape) = &mut self.tape else { return false };
        if tape.torn || self.upload.failure().is_some() {
            return false;
        }
        if !tape.data.is_empty() {
            let mut data = std::mem::take(&mut tape.data);
            data.extend_from_slice(&self.ahead);
            self.ahead = data;
        }
        if let Some(trailers) = tape.trailers.take() {
            self.ahead_trailers = Some(trailers);
        }
        true
    }

    /// Keeps what goes on, as long as there is room.
    fn keep(&mut self, frame: &Frame<Bytes>) {
        let Some(tape) = self.tape.as_mut().filter(|tape| !tape.torn) else { return };
        // Whoever closed the home wants nothing again.
        let wanted = self.home.as_ref().is_some_and(|home| home.open.get());
        match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) if wanted && tape.data.len() + data.len() <= tape.limit => {
                tape.data.extend_from_slice(data);
            }
            (None, Some(trailers)) if wanted => tape.trailers = Some(trailers.clone()),
            _ => *tape = Tape { torn: true, ..Tape::default() },
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(home) = self.home.take_if(|home| home.open.get()) {
            let body = Self {
                source: std::mem::replace(&mut self.source, Source::Empty),
                ahead: std::mem::take(&mut self.ahead),
                ahead_trailers: self.ahead_trailers.take(),
                tape: self.tape.take(),
                home: Some(home.clone()),
                forbidden: self.forbidden.clone(),
                taken: self.taken.take(),
                upload: self.upload.clone(),
            };
            *home.body.borrow_mut() = Some(body);
            return;
        }
        if self.upload.is_unfinished() {
            self.upload.step(State::Dropped);
        }
    }
}

impl RequestBody {
    /// Reads on. Once the body has ended it lets go of where it came from: what comes there next is another's.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let mut polled = self.poll_next(cx);
        if let (Some(forbidden), Poll::Ready(Some(Ok(frame)))) = (&self.forbidden, &mut polled)
            && let Some(trailers) = frame.trailers_mut()
        {
            forbidden.strip(trailers);
        }
        if !self.upload.is_unfinished() {
            self.source = Source::Empty;
        }
        polled
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = self;
        let upload = &this.upload;
        if !upload.begun.replace(true) {
            upload.moved.set(Some(Instant::now()));
        }
        match this.source.poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = upload.bytes.get() + frame.data_ref().map_or(0, |data| data.len() as u64);
                if bytes > upload.limit.get() {
                    upload.step(State::Failed(Kind::BodyTooLarge));
                    return Poll::Ready(Some(Err(Error::new(Kind::BodyTooLarge))));
                }
                upload.bytes.set(bytes);
                if let (Some(taken), Some(data)) = (&this.taken, frame.data_ref()) {
                    taken.borrow_mut().take(data);
                }
                upload.client_paused.set(false);
                // With a length, and after trailers, the end is known without another look.
                let ended = frame.is_trailers() || this.source.is_end_stream();
                upload.step(if ended { State::Done } else { State::Streaming });
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err((kind, detail)))) => {
                upload.step(State::Failed(kind));
                Poll::Ready(Some(Err(Error { detail, ..Error::new(kind) })))
            }
            Poll::Ready(None) => {
                if upload.is_unfinished() {
                    upload.step(State::Done);
                }
                Poll::Ready(None)
            }
            Poll::Pending => {
                upload.client_paused.set(true);
                Poll::Pending
            }
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let polled = if !self.ahead.is_empty() {
            Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.ahead).freeze()))))
        } else if let Some(trailers) = self.ahead_trailers.take() {
            Poll::Ready(Some(Ok(Frame::trailers(trailers))))
        } else {
            self.poll_source(cx)
        };
        if self.tape.is_some()
            && let Poll::Ready(Some(Ok(frame))) = &polled
        {
            self.keep(frame);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.ahead.is_empty() && self.ahead_trailers.is_none() && self.source.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Http1(inbound) => match inbound.decoder.get() {
                Decoder::Length(left) => SizeHint::with_exact(left),
                Decoder::Done => SizeHint::with_exact(0),
                Decoder::Chunked(_) | Decoder::Close => SizeHint::default(),
            },
            Source::Http2(incoming) => incoming.size_hint(),
        }
    }
}

/// Waits for response headers within a time limit.
///
/// The limit runs from `start`, or from the end of the request where that comes later: a slow upload is bounded by its pauses
/// (`idle`), not by its length. `expired` is the error when the limit fires.
pub async fn within<T>(
    timer: &Timer,
    upload: &Upload,
    limit: Option<Duration>,
    idle: Option<Duration>,
    expired: Kind,
    start: Instant,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut future = pin!(future);
    let mut sleep: Option<Sleep> = None;
    poll_fn(|cx| {
        if let Poll::Ready(result) = future.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        loop {
            // Nothing to look at the clock for: the usual request has no body.
            if sleep.is_none()
                && upload.is_empty()
                && let Some(limit) = limit
            {
                sleep = Some(timer.sleep_until(start + limit));
            }
            if let Some(sleeping) = &mut sleep {
                if Pin::new(sleeping).poll(cx).is_pending() {
                    return Poll::Pending;
                }
                sleep = None;
            }
            let left = match time_left(upload, start, limit, idle) {
                Ok(Some(left)) => left,
                Ok(None) => return Poll::Pending,
                Err(stalled) => {
                    // For a client's pause nobody else is to blame.
                    upload.set_expired(stalled != Some(Kind::ClientStalled));
                    return Poll::Ready(Err(Error::new(stalled.unwrap_or(expired))));
                }
            };
            sleep = Some(timer.sleep(left));
        }
    })
    .await
}

/// When to look again, if ever; an error where the time is up: with whose pause is to blame, or none for the limit itself.
fn time_left(
    upload: &Upload,
    start: Instant,
    limit: Option<Duration>,
    idle: Option<Duration>,
) -> Result<Option<Duration>, Option<Kind>> {
    if upload.is_streaming() {
        // Without a limit for pauses, the client may take its time; an upstream that does not read may not.
        let bound = if upload.client_paused.get() { idle } else { idle.or(limit) };
        let quiet = upload.moved.get().map_or(start, |moved| moved.max(start)).elapsed();
        let left = bound.map(|bound| bound.saturating_sub(quiet));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(Some(if upload.client_paused.get() { Kind::ClientStalled } else { Kind::WriteTimeout }));
        }
        // No later than the limit: the upload may have ended meanwhile.
        return Ok(left.into_iter().chain(limit).min());
    }
    let Some(limit) = limit else {
        // Its body may yet begin, and then pause.
        return Ok(idle.filter(|_| upload.is_unfinished()));
    };
    let left = limit.saturating_sub(upload.moved.get().map_or(start, |moved| moved.max(start)).elapsed());
    // A body that has yet to begin may pause before the limit is over.
    let look = idle.filter(|_| upload.is_unfinished()).map_or(left, |idle| left.min(idle));
    if left.is_zero() { Err(None) } else { Ok(Some(look)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body that had been read ahead to its end looked at its connection again when it was sent, and took the next request's body
    /// for more of its own: bytes that nobody had looked at went to an upstream.
    #[test]
    fn a_body_that_has_ended_takes_nothing_of_the_next() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default())
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let _client = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let inbound = Rc::new(Inbound::new(listener.accept().await.unwrap().0));
            inbound.decoder.set(Decoder::Length(5));
            inbound.kept.borrow_mut().extend_from_slice(b"firstnext!");
            let mut body = RequestBody::http1(&inbound);
            poll_fn(|cx| body.poll_whole(cx)).await.unwrap();
            assert!(body.upload().is_done() && !body.is_end_stream());
            // The next request begins.
            inbound.decoder.set(Decoder::Length(5));
            let first = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
            assert_eq!(first.unwrap().unwrap().into_data().unwrap(), "first");
            assert!(body.is_end_stream());
            assert!(poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.is_none());
            let mut next = RequestBody::http1(&inbound);
            let data = poll_fn(|cx| Pin::new(&mut next).poll_frame(cx)).await;
            assert_eq!(data.unwrap().unwrap().into_data().unwrap(), "next!");
        });
    }
}
