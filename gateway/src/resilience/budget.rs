//! How many retries an upstream is sent: a share of its requests.
//!
//! The words and constants are those of the Gateway API's retry budget (GEP-3388): a
//! percentage over an interval of ten seconds, and a least rate of ten a second,
//! which is there so that a quiet upstream has retries at all. It never adds to the
//! percentage: where the percentage allows more, it is the limit.

use super::window::Window;

/// The interval, in milliseconds.
const INTERVAL: u64 = 10_000;
/// Buckets of a second each.
const SECONDS: u64 = 10;
/// Retries a second that are always allowed.
const LEAST: u64 = 10;

/// The budget of one upstream.
#[derive(Debug)]
pub struct Budget {
    /// Requests, and retries beside them.
    window: Window,
}

impl Default for Budget {
    fn default() -> Self {
        Self { window: Window::new(INTERVAL, SECONDS) }
    }
}

impl Budget {
    /// A request that is no retry.
    pub fn deposit(&self, now: u64) {
        self.window.add(now, 1, 0);
    }

    /// Takes a retry, if there is one to take. `share` is of 10,000; a share of nothing allows none.
    pub fn withdraw(&self, now: u64, share: u16) -> bool {
        if share == 0 {
            return false;
        }
        self.window.add_if(now, |all, second| {
            let part = all.all * u64::from(share) / 10_000;
            all.some < part || (all.some < LEAST * SECONDS && second.some < LEAST)
        })
    }
}
