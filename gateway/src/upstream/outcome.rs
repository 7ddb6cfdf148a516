//! What a try came to, for the upstream's breaker: told once, at the earliest moment at which it is known.
//!
//! A failure is known at once. A success is known when the body has ended, or when as much of it
//! has come that its end is the client's affair; of a body without a known length, and of a
//! tunnel, at its head. The time that a client takes to send is nobody's. What is dropped before says nothing, unless a time limit
//! has dropped it, or it had been slow already.

use std::sync::Arc;

use tokio::time::Instant;

use super::Upstream;
use crate::resilience::{
    breaker::{Change, Pass, State},
    millis,
};

/// Bytes of a body after which a try counts as a success.
pub const ENOUGH: u64 = 64 * 1024;

/// A try that a breaker let through.
#[derive(Debug)]
pub struct Outcome {
    upstream: Arc<Upstream>,
    pass: Option<Pass>,
}

impl Outcome {
    /// Asks the breaker; how many seconds to wait where it refuses. Nothing where there is none.
    pub fn admit(upstream: &Arc<Upstream>, now: Instant) -> Result<Option<Self>, u64> {
        let Some(breaker) = &upstream.breaker else { return Ok(None) };
        match breaker.admit(millis(now)) {
            Ok((pass, change)) => {
                tell(upstream, change);
                Ok(Some(Self { upstream: upstream.clone(), pass: Some(pass) }))
            }
            Err(refused) => {
                upstream.stats.refused.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                Err(refused.retry_after.div_ceil(1000).max(1))
            }
        }
    }

    /// Whether a head that took this long came too late.
    pub fn is_slow(&self, taken: std::time::Duration) -> bool {
        self.upstream.breaker.as_ref().and_then(|breaker| breaker.settings().slow_call).is_some_and(|slow| taken > slow)
    }

    /// Its head was there, and good.
    pub fn answer(&mut self) {
        if let (Some(breaker), Some(pass)) = (&self.upstream.breaker, &mut self.pass) {
            breaker.answer(pass);
        }
    }

    /// It is known.
    pub fn tell(mut self, succeeded: bool) {
        if let (Some(breaker), Some(pass)) = (&self.upstream.breaker, self.pass.take()) {
            tell(&self.upstream, breaker.record(millis(Instant::now()), pass, succeeded));
        }
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        if let (Some(breaker), Some(pass)) = (&self.upstream.breaker, self.pass.take()) {
            breaker.give_back(&pass);
        }
    }
}

/// A change of state is an event.
fn tell(upstream: &Upstream, change: Option<Change>) {
    let Some(Change { from, to }) = change else { return };
    let (name, from_word, to_word) = (&*upstream.name, from.word(), to.word());
    match to {
        State::Open(_) => {
            upstream.stats.opened.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tracing::warn!(upstream = name, from = from_word, to = to_word, "the circuit breaker opened");
        }
        State::HalfOpen => {
            tracing::info!(upstream = name, from = from_word, to = to_word, "the circuit breaker lets a few through");
        }
        State::Closed => tracing::info!(upstream = name, from = from_word, to = to_word, "the circuit breaker closed"),
    }
}
