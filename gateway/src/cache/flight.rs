//! One request to the upstream for all that ask for the same at the same time.
//!
//! The first asks; the others wait, for a bounded time, until it is clear what comes of it: an answer that they
//! may have too, as it streams in, or one that is not for others, and then each asks for itself, at once and together.

use std::{
    future::poll_fn,
    sync::{Arc, Mutex, PoisonError},
    task::{Poll, Waker},
};

use super::{Cache, fill::Fill};

/// What came of a flight.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The answer is kept.
    Stored,
    /// It comes in, is of known length, and will be kept.
    Streaming(Arc<Fill>),
    /// It is not for others.
    Private,
    /// The upstream failed: an older answer may do.
    Failed,
    /// Whoever asked has left before there was an answer.
    Abandoned,
}

/// A request that others may wait for.
#[derive(Debug)]
pub struct Flight {
    /// When it began, on the local clock of what was invalidated.
    born: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    waiting: Vec<Waker>,
}

impl Flight {
    pub(super) fn new(born: u64) -> Arc<Self> {
        Arc::new(Self { born, state: Mutex::default() })
    }

    pub(super) fn born(&self) -> u64 {
        self.born
    }

    /// Waits until it is clear what comes of it.
    pub async fn outcome(&self) -> Outcome {
        poll_fn(|cx| {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(outcome) = &state.outcome {
                return Poll::Ready(outcome.clone());
            }
            if !state.waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
                state.waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    fn settle(&self, outcome: Outcome) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.outcome = Some(outcome);
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// A request's place among those that ask for the same.
pub enum Place {
    /// It is the first.
    First(Lead),
    /// Another asks already.
    Behind(Arc<Flight>),
}

/// Whoever asks for all. Dropped without a word, it has left.
pub struct Lead {
    cache: Arc<Cache>,
    key: Box<[u8]>,
    flight: Arc<Flight>,
    settled: bool,
}

impl Lead {
    pub(super) fn new(cache: Arc<Cache>, key: Box<[u8]>, flight: Arc<Flight>) -> Self {
        Self { cache, key, flight, settled: false }
    }

    /// Says what comes of it. While an answer streams in, who comes later may have it too.
    pub fn settle(&mut self, outcome: Outcome) {
        self.settled = true;
        if !matches!(outcome, Outcome::Streaming(_)) {
            self.cache.land(&self.key, &self.flight);
        }
        self.flight.settle(outcome);
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        self.cache.land(&self.key, &self.flight);
        if !self.settled {
            self.flight.settle(Outcome::Abandoned);
        }
    }
}
