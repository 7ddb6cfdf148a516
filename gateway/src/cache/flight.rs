//! One request to the upstream for all that ask for the same at the same time.
//!
//! The first asks; the others wait, for a bounded time, until it is clear what comes of it: an answer that they
//! may have too, as it streams in, or one that is not for others, and then each asks for itself, at once and together.

use std::sync::Arc;

use tokio::sync::watch;

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
    outcome: watch::Sender<Option<Outcome>>,
}

impl Flight {
    pub(super) fn new(born: u64) -> Arc<Self> {
        Arc::new(Self { born, outcome: watch::Sender::new(None) })
    }

    pub(super) fn born(&self) -> u64 {
        self.born
    }

    /// Waits until it is clear what comes of it. Whoever leaves before leaves nothing behind.
    pub async fn outcome(&self) -> Outcome {
        let mut outcome = self.outcome.subscribe();
        let told = outcome.wait_for(Option::is_some).await;
        // The sender is ours, and cannot be gone.
        told.ok().and_then(|told| told.clone()).unwrap_or(Outcome::Abandoned)
    }

    fn settle(&self, outcome: Outcome) {
        self.outcome.send_replace(Some(outcome));
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// Their wakers once stayed, each with the memory of its task, for as long as the upstream took.
    #[tokio::test]
    async fn who_leaves_leaves_nothing_behind() {
        let flight = Flight::new(1);
        for _ in 0..1_000 {
            assert!(flight.outcome().now_or_never().is_none());
        }
        assert_eq!(flight.outcome.receiver_count(), 0);
        let (outcome, ()) = tokio::join!(biased; flight.outcome(), async { flight.settle(Outcome::Private) });
        assert!(matches!(outcome, Outcome::Private));
        assert!(matches!(flight.outcome().await, Outcome::Private));
    }
}
