//! The request's body on its way to an upstream, and the time limits that hang on it.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::Instant;

use crate::{
    error::{Error, Kind},
    timer::{Sleep, Timer},
};

/// What is known of a request's body.
#[derive(Debug)]
pub struct Upload {
    bytes: Cell<u64>,
    limit: Cell<u64>,
    state: Cell<State>,
    /// When it last moved, or ended.
    moved: Cell<Instant>,
    /// Whether the last look for more found none yet.
    client_paused: Cell<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Streaming,
    Done,
    Failed(Kind),
}

impl Upload {
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
            State::Streaming | State::Done => None,
        }
    }

    fn end(&self, state: State) {
        self.state.set(state);
        self.moved.set(Instant::now());
    }
}

/// A request's body.
pub struct RequestBody {
    incoming: Option<Incoming>,
    upload: Rc<Upload>,
}

impl RequestBody {
    /// Wraps what a client sends.
    pub fn new(incoming: Incoming) -> Self {
        let state = if incoming.is_end_stream() { State::Done } else { State::Streaming };
        let upload = Rc::new(Upload {
            bytes: Cell::new(0),
            limit: Cell::new(u64::MAX),
            state: Cell::new(state),
            moved: Cell::new(Instant::now()),
            client_paused: Cell::new(false),
        });
        Self { incoming: Some(incoming), upload }
    }

    /// The empty body of a request whose body was empty the first time.
    pub fn again(upload: &Rc<Upload>) -> Self {
        Self { incoming: None, upload: upload.clone() }
    }

    /// What is known of it.
    pub fn upload(&self) -> &Rc<Upload> {
        &self.upload
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        let Some(incoming) = &mut this.incoming else { return Poll::Ready(None) };
        let upload = &this.upload;
        match Pin::new(&mut *incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = upload.bytes.get() + frame.data_ref().map_or(0, |data| data.len() as u64);
                if bytes > upload.limit.get() {
                    upload.end(State::Failed(Kind::BodyTooLarge));
                    return Poll::Ready(Some(Err(Error::new(Kind::BodyTooLarge))));
                }
                upload.bytes.set(bytes);
                upload.client_paused.set(false);
                // With a length the end is known without another look.
                upload.end(if incoming.is_end_stream() { State::Done } else { State::Streaming });
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                upload.end(State::Failed(Kind::ClientAborted));
                let mut told = Error::new(Kind::ClientAborted);
                told.detail = error.to_string();
                Poll::Ready(Some(Err(told)))
            }
            Poll::Ready(None) => {
                if upload.state.get() == State::Streaming {
                    upload.end(State::Done);
                }
                Poll::Ready(None)
            }
            Poll::Pending => {
                upload.client_paused.set(true);
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

/// Waits for response headers within a time limit.
///
/// The limit runs from the end of the request: a slow upload is bounded by its pauses
/// (`idle`), not by its length. `expired` is the error when the limit fires.
pub async fn within<T>(
    timer: &Timer,
    upload: &Upload,
    limit: Option<Duration>,
    idle: Option<Duration>,
    expired: Kind,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut future = pin!(future);
    let start = Instant::now();
    let mut sleep: Option<Sleep> = None;
    poll_fn(|cx| {
        if let Poll::Ready(result) = future.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        loop {
            let streaming = upload.state.get() == State::Streaming;
            let (from, wait) = match (streaming, limit, idle) {
                (false, Some(limit), _) => (upload.moved.get().max(start), limit),
                (true, limit, Some(idle)) => {
                    if upload.moved.get().elapsed() >= idle {
                        let kind = if upload.client_paused.get() { Kind::ClientStalled } else { Kind::WriteTimeout };
                        return Poll::Ready(Err(Error::new(kind)));
                    }
                    // Looks again no later than the limit: the upload may have ended meanwhile.
                    (Instant::now(), limit.map_or(idle, |limit| limit.min(idle)))
                }
                (true, Some(limit), None) => (Instant::now(), limit),
                (_, None, _) => return Poll::Pending,
            };
            let left = wait.saturating_sub(from.elapsed());
            if left.is_zero() {
                return Poll::Ready(Err(Error::new(expired)));
            }
            let sleeping = sleep.get_or_insert_with(|| timer.sleep(left));
            if Pin::new(&mut *sleeping).poll(cx).is_pending() {
                return Poll::Pending;
            }
            sleep = None;
        }
    })
    .await
}
