//! The engines behind the layers: when an upstream is left alone, who waits, which endpoint gets a request.
//!
//! Pure: no socket, no clock of their own, no runtime. The time is given, in
//! milliseconds since the process began. What is lock-free is model-checked in `gateway/model`.

pub mod balance;
pub mod breaker;
pub mod budget;
pub mod bulkhead;
pub mod gcra;
pub mod learned;
mod sync;
#[cfg(test)]
mod tests;
pub mod vitals;
pub mod window;

use std::sync::LazyLock;

use tokio::time::Instant;

static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The time that the engines are given: milliseconds since the process began, and 1 at its beginning.
pub fn millis(now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(*BEGIN).as_millis()).unwrap_or(u64::MAX).saturating_add(1)
}
