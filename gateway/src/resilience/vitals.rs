//! How one endpoint does: its latency, what is on its way to it, whether it is out.
//!
//! Shared by all workers; every field is an atomic of its own, since none decides
//! anything together with another.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};

/// The time in which an old latency loses half of its weight, in milliseconds. Finagle's peak EWMA decays by e in 10 s.
const HALF_LIFE: u64 = 7_000;
/// What is younger changes an average by too little to be counted, in milliseconds.
const STEP: u64 = 64;
/// Each failure in a row doubles what an endpoint seems to be loaded with so often, up to a limit; each second since halves
/// it again. A quick error must not look like a quick answer, and one that was never asked again would never recover.
const DOUBLINGS: u64 = 3;
/// The limit.
const MOST: u64 = 15;
/// What is quicker is not told apart, in microseconds.
const LEAST_LATENCY: u64 = 100;
/// The longest ejection, in milliseconds (Envoy's `max_ejection_time`).
const LONGEST: u64 = 300_000;
/// The least share of an endpoint that comes back, of 1,000 (Envoy's `min_weight_percent`).
const LEAST: u64 = 100;

/// When an endpoint is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outlier {
    /// Failures in a row.
    pub consecutive: u32,
    /// How long it must have been in for its next ejection to be one step shorter, in milliseconds.
    pub interval: u64,
    /// The first ejection, in milliseconds.
    pub base: u64,
    /// How many may be out, of 10,000.
    pub max_ejected: u64,
}

#[derive(Debug, Default)]
struct Ejection {
    /// How often, less what time has forgiven.
    times: u64,
    /// When the last was to end.
    end: u64,
}

/// One endpoint's state.
#[derive(Debug, Default)]
pub struct Vitals {
    flying: AtomicU32,
    /// Milliseconds (32 bits, wrapping) and microseconds (32 bits).
    latency: AtomicU64,
    /// Whether its checks say that it is out.
    down: AtomicBool,
    failures: AtomicU32,
    /// When it last failed.
    failed: AtomicU64,
    /// Since when it is in; nothing for one that always was.
    since: AtomicU64,
    /// Until when it is out.
    ejected: AtomicU64,
    ejection: Mutex<Ejection>,
}

impl Vitals {
    /// One that comes to others that are there already.
    pub fn newcomer(now: u64) -> Self {
        Self { since: AtomicU64::new(now), ..Self::default() }
    }

    /// A request is on its way.
    pub fn begin(&self) {
        self.flying.fetch_add(1, Relaxed);
    }

    /// It is over.
    pub fn end(&self) {
        self.flying.fetch_sub(1, Relaxed);
    }

    /// Requests on their way.
    pub fn flying(&self) -> u32 {
        self.flying.load(Relaxed)
    }

    /// A response's head took so long. A peak counts at once and is forgotten slowly, whatever the rate.
    pub fn observe(&self, now: u64, micros: u64) {
        let micros = micros.min(u64::from(u32::MAX));
        let _ = self.latency.try_update(Relaxed, Relaxed, |word| {
            let (before, age) = Self::aged(word, now);
            let kept = if before <= micros {
                micros
            } else if age < STEP {
                return None;
            } else {
                let raw = word & u64::from(u32::MAX);
                before + micros * (raw - before) / raw
            };
            Some(now << 32 | kept)
        });
    }

    /// Nobody waited for its answer any longer: it takes so long at least, which may be more than was known, never less.
    pub fn outlast(&self, now: u64, micros: u64) {
        if Self::aged(self.latency.load(Relaxed), now).0 < micros {
            self.observe(now, micros);
        }
    }

    /// What it was, forgotten as far as time has gone on; and how old it is.
    fn aged(word: u64, now: u64) -> (u64, u64) {
        let (stamp, micros) = (word >> 32, word & u64::from(u32::MAX));
        let age = (now & u64::from(u32::MAX)).wrapping_sub(stamp) & u64::from(u32::MAX);
        // Another worker's clock may have been read a little later.
        let age = if age > u64::from(u32::MAX / 2) { 0 } else { age };
        let (whole, part) = (age / HALF_LIFE, age % HALF_LIFE);
        let halved = if whole >= 32 { 0 } else { micros >> whole };
        (halved - halved * part / (2 * HALF_LIFE), age)
    }

    /// What a request would wait for, about: its latency times what is on its way, more while it fails or warms up.
    /// Of what has never answered it is as slow as another.
    pub fn load(&self, now: u64, slow_start: u64, other: &Self) -> u64 {
        let known = |vitals: &Self| vitals.latency.load(Relaxed);
        let word = if known(self) == 0 { known(other) } else { known(self) };
        let (micros, _) = Self::aged(word, now);
        let load = micros.max(LEAST_LATENCY) * (u64::from(self.flying()) + 1);
        let doublings = match u64::from(self.failures.load(Relaxed)) {
            0 => 0,
            failures => {
                let seconds = now.saturating_sub(self.failed.load(Relaxed)) / 1_000;
                (failures * DOUBLINGS).min(MOST).saturating_sub(seconds)
            }
        };
        load.saturating_mul(1_000 << doublings) / self.weight(now, slow_start)
    }

    /// Its share, of 1,000: it grows from a tenth while it warms up.
    pub fn weight(&self, now: u64, slow_start: u64) -> u64 {
        let since = self.since.load(Relaxed);
        if since == 0 || slow_start == 0 {
            return 1_000;
        }
        (now.saturating_sub(since) * 1_000 / slow_start).clamp(LEAST, 1_000)
    }

    /// Its checks' verdict. Whether that is news.
    pub fn set_down(&self, down: bool, now: u64) -> bool {
        if self.down.swap(down, Relaxed) == down {
            return false;
        }
        if !down {
            self.welcome(now);
        }
        true
    }

    fn welcome(&self, now: u64) {
        self.ejected.store(0, Relaxed);
        self.failures.store(0, Relaxed);
        self.since.store(now, Relaxed);
    }

    /// It has answered a check: an ejection is over.
    pub fn pardon(&self, now: u64) {
        if self.is_ejected(now) {
            self.welcome(now);
        }
    }

    /// Nobody looks after it any more: what was held against it is void.
    pub fn absolve(&self, checked: bool, watched: bool) {
        if !checked {
            self.down.store(false, Relaxed);
        }
        if !watched {
            self.ejected.store(0, Relaxed);
        }
    }

    /// Whether its checks say that it is in.
    pub fn is_up(&self) -> bool {
        !self.down.load(Relaxed)
    }

    /// Whether it is left out for its failures.
    pub fn is_ejected(&self, now: u64) -> bool {
        self.ejected.load(Relaxed) > now
    }

    /// It answered.
    pub fn succeed(&self) {
        // A look is cheaper than a write that others must hear of.
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
        }
    }

    /// It failed. Whether it has failed often enough in a row to be left out.
    pub fn fail(&self, now: u64, outlier: Option<&Outlier>) -> bool {
        self.failed.store(now, Relaxed);
        let failures = self.failures.fetch_add(1, Relaxed).saturating_add(1);
        outlier.is_some_and(|outlier| failures >= outlier.consecutive) && !self.is_ejected(now)
    }

    /// Leaves it out; for how long, in milliseconds. Nothing where another has done so.
    pub fn eject(&self, now: u64, outlier: &Outlier) -> Option<u64> {
        let mut ejection = self.ejection.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ejected.load(Relaxed) > now {
            return None;
        }
        let forgiven = now.saturating_sub(ejection.end) / outlier.interval.max(1);
        ejection.times = ejection.times.saturating_sub(forgiven) + 1;
        let lasts = (outlier.base * ejection.times).min(LONGEST.max(outlier.base));
        self.failures.store(0, Relaxed);
        ejection.end = now + lasts;
        self.ejected.store(now + lasts, Relaxed);
        // When it comes back it warms up.
        self.since.store(now + lasts, Relaxed);
        Some(lasts)
    }
}
