//! An answer on its way into the cache, which several may read as it comes.
//!
//! It is taken from the upstream as fast as that gives it, so that a slow client keeps nobody waiting; what that takes in memory
//! is reserved before. One whose length is not known, and that turns out too long, goes on from where it is to the one who
//! asked for it.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::{HeaderMap, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use slab::Slab;

use super::{Reserved, stored::Stored, vary::Selection};
use crate::{
    body::ResponseBody,
    error::{Error, Kind},
};

/// An answer on its way.
#[derive(Debug)]
pub struct Fill {
    /// Its head, as it will be kept: the body is not there yet.
    pub head: Stored,
    /// Its length, where it is known.
    pub length: Option<u64>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    chunks: Vec<Bytes>,
    bytes: usize,
    end: Option<End>,
    /// Those who read it, as far as they wait.
    waiting: Slab<Waker>,
    /// Whoever takes it in, and looks whether anybody reads it.
    taking: Option<Waker>,
    readers: usize,
    /// The memory that it takes, as long as anybody reads it.
    reserved: Option<Reserved>,
    /// What is left of that.
    left: usize,
}

/// Pieces below this are copied.
const SMALL: usize = 8 * 1024;

/// How it ended.
#[derive(Clone, Debug)]
pub enum End {
    /// It is whole.
    Whole,
    /// It broke.
    Broken(Kind, String),
    /// The rest is for the one who asked for it.
    Rest,
}

impl Fill {
    /// One that begins.
    pub fn new(head: Stored, length: Option<u64>, reserved: Reserved, left: usize) -> Arc<Self> {
        let state = State { reserved: Some(reserved), left, ..State::default() };
        Arc::new(Self { head, length, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a request must say to have it.
    pub fn selection(&self) -> &Selection {
        &self.head.selection
    }

    /// One more piece; how many bytes there are.
    pub fn push(&self, chunk: Bytes) -> usize {
        // A small piece would keep all of the buffer that it was read into.
        let chunk = if chunk.len() < SMALL { Bytes::copy_from_slice(&chunk) } else { chunk };
        let mut state = self.lock();
        state.bytes += chunk.len();
        state.chunks.push(chunk);
        let bytes = state.bytes;
        wake(&state);
        bytes
    }

    /// Whether there is memory for what came.
    pub fn has_room(&self, size: usize) -> bool {
        let mut state = self.lock();
        match state.left.checked_sub(size) {
            Some(left) => {
                state.left = left;
                true
            }
            None => state.reserved.as_mut().is_some_and(|reserved| reserved.grow(size)),
        }
    }

    /// It ends.
    pub fn end(&self, end: End) {
        let mut state = self.lock();
        state.end = Some(end);
        wake(&state);
    }

    /// How many bytes there are.
    pub fn bytes(&self) -> usize {
        self.lock().bytes
    }

    /// All that came, in one piece.
    pub fn join(&self) -> Bytes {
        super::stored::join(&self.lock().chunks)
    }

    /// Waits until nobody reads it any more: then it is broken off, and nobody begins to.
    pub fn poll_left(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        if state.readers == 0 {
            state.end = Some(End::Broken(Kind::ClientAborted, String::new()));
            return Poll::Ready(());
        }
        state.taking = Some(cx.waker().clone());
        Poll::Pending
    }

    /// One who reads it from its beginning; nobody, where it broke already. `rest` is where the rest of a long one will be.
    pub fn read(self: &Arc<Self>, rest: Option<Rest>) -> Option<Reader> {
        let mut state = self.lock();
        if matches!(state.end, Some(End::Broken(..))) {
            return None;
        }
        state.readers += 1;
        Some(Reader { fill: self.clone(), next: 0, given: 0, slot: None, rest, own: None })
    }

    /// Its head as a response.
    pub fn response(&self, body: ResponseBody) -> Response<ResponseBody> {
        let mut response = Response::new(body);
        *response.status_mut() = self.status();
        *response.headers_mut() = self.head.headers.clone();
        response
    }

    /// Its status.
    pub fn status(&self) -> StatusCode {
        self.head.status
    }

    /// Its fields.
    pub fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }
}

/// Wakes those who wait for more.
fn wake(state: &State) {
    state.waiting.iter().for_each(|(_, waker)| waker.wake_by_ref());
}

/// Where the rest of a body is that was too long to be kept.
pub type Rest = Rc<RefCell<Option<ResponseBody>>>;

/// One who reads an answer as it comes.
pub struct Reader {
    fill: Arc<Fill>,
    next: usize,
    given: u64,
    /// Where its waker is.
    slot: Option<usize>,
    rest: Option<Rest>,
    own: Option<Box<ResponseBody>>,
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.fill.lock();
        state.readers -= 1;
        if let Some(slot) = self.slot {
            state.waiting.try_remove(slot);
        }
        let taking = if state.readers == 0 { state.taking.take() } else { None };
        drop(state);
        if let Some(taking) = taking {
            taking.wake();
        }
    }
}

impl Body for Reader {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        if let Some(own) = &mut this.own {
            return Pin::new(&mut **own).poll_frame(cx);
        }
        let mut state = this.fill.lock();
        if let Some(chunk) = state.chunks.get(this.next) {
            this.next += 1;
            this.given += chunk.len() as u64;
            return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
        }
        match &state.end {
            None => {
                match this.slot {
                    Some(slot) => state.waiting[slot].clone_from(cx.waker()),
                    None => this.slot = Some(state.waiting.insert(cx.waker().clone())),
                }
                Poll::Pending
            }
            Some(End::Whole) => Poll::Ready(None),
            Some(End::Broken(kind, detail)) => {
                Poll::Ready(Some(Err(Error { detail: detail.clone(), ..Error::new(*kind) })))
            }
            Some(End::Rest) => {
                drop(state);
                let Some(rest) = this.rest.take().and_then(|rest| rest.take()) else {
                    return Poll::Ready(Some(Err(Error::new(Kind::Internal))));
                };
                let own = this.own.insert(Box::new(rest));
                Pin::new(&mut **own).poll_frame(cx)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        if let Some(own) = &self.own {
            return own.is_end_stream();
        }
        // With a length nobody looks for the end again.
        if self.fill.length == Some(self.given) {
            return true;
        }
        let state = self.fill.lock();
        matches!(state.end, Some(End::Whole)) && self.next == state.chunks.len()
    }

    fn size_hint(&self) -> SizeHint {
        match self.fill.length {
            Some(length) if self.next == 0 => SizeHint::with_exact(length),
            _ => SizeHint::default(),
        }
    }
}
