//! Counts of the last while, without a lock.
//!
//! A ring of buckets. Each is one word, which says of which time it is and holds two
//! counts, so that a bucket of an earlier round is emptied and counted in one step: no count is lost
//! and none is taken for another time's.

use super::sync::atomic::{AtomicU64, Ordering::Relaxed};

const BITS: u32 = 22;
const MOST: u64 = (1 << BITS) - 1;
const EPOCHS: u64 = (1 << 20) - 1;

/// Two counts over a sliding window.
#[derive(Debug)]
pub struct Window {
    buckets: Box<[AtomicU64]>,
    /// Milliseconds a bucket.
    span: u64,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
    pub all: u64,
    /// Some of them.
    pub some: u64,
}

impl Counts {
    fn of(word: u64) -> Self {
        Self { all: word & MOST, some: (word >> BITS) & MOST }
    }

    /// With so many more; a full bucket keeps the share that it has.
    fn word(self, epoch: u64) -> u64 {
        let Self { mut all, mut some } = self;
        if all > MOST || some > MOST {
            (all, some) = (all / 2, some / 2);
        }
        epoch << (2 * BITS) | some << BITS | all
    }
}

impl Window {
    /// So many milliseconds, in so many buckets.
    pub fn new(millis: u64, buckets: u64) -> Self {
        let buckets = buckets.max(1);
        Self { buckets: (0..buckets).map(|_| AtomicU64::new(0)).collect(), span: (millis / buckets).max(1) }
    }

    /// The time's own number, which is never that of an empty bucket.
    fn tick(&self, now: u64) -> u64 {
        now / self.span + 1
    }

    /// Whether one epoch comes after another; they wrap around.
    fn is_newer(epoch: u64, than: u64) -> bool {
        epoch != 0 && epoch != than && (epoch.wrapping_sub(than) & EPOCHS) < EPOCHS / 2
    }

    fn bucket(&self, tick: u64) -> &AtomicU64 {
        let index = tick % self.buckets.len() as u64;
        // Less than the length, which fits.
        &self.buckets[usize::try_from(index).unwrap_or(0)]
    }

    /// Counts.
    pub fn add(&self, now: u64, all: u64, some: u64) {
        let tick = self.tick(now);
        let (bucket, epoch) = (self.bucket(tick), tick & EPOCHS);
        let mut word = bucket.load(Relaxed);
        loop {
            // Whoever comes so late that the bucket is another time's already is not worth its counts.
            if Self::is_newer(word >> (2 * BITS), epoch) {
                return;
            }
            let before = if word >> (2 * BITS) == epoch { Counts::of(word) } else { Counts::default() };
            let after = Counts { all: before.all + all, some: before.some + some }.word(epoch);
            match bucket.compare_exchange_weak(word, after, Relaxed, Relaxed) {
                Ok(_) => return,
                Err(now) => word = now,
            }
        }
    }

    /// Counts one of the second kind, if it is allowed by what the window has and what the current bucket has.
    pub fn add_if(&self, now: u64, allowed: impl Fn(Counts, Counts) -> bool) -> bool {
        let tick = self.tick(now);
        let (bucket, epoch) = (self.bucket(tick), tick & EPOCHS);
        loop {
            let word = bucket.load(Relaxed);
            if Self::is_newer(word >> (2 * BITS), epoch) {
                return false;
            }
            let before = if word >> (2 * BITS) == epoch { Counts::of(word) } else { Counts::default() };
            let past = self.sum_but(tick, Some(bucket));
            let sum = Counts { all: past.all + before.all, some: past.some + before.some };
            if !allowed(sum, before) {
                return false;
            }
            let after = Counts { some: before.some + 1, ..before }.word(epoch);
            if bucket.compare_exchange_weak(word, after, Relaxed, Relaxed).is_ok() {
                return true;
            }
        }
    }

    /// What the window has.
    pub fn sum(&self, now: u64) -> Counts {
        self.sum_but(self.tick(now), None)
    }

    fn sum_but(&self, tick: u64, but: Option<&AtomicU64>) -> Counts {
        let oldest = (tick + 1).saturating_sub(self.buckets.len() as u64);
        let mut sum = Counts::default();
        for tick in oldest..=tick {
            let bucket = self.bucket(tick);
            if but.is_some_and(|but| std::ptr::eq(but, bucket)) {
                continue;
            }
            let word = bucket.load(Relaxed);
            if word >> (2 * BITS) == tick & EPOCHS {
                let counts = Counts::of(word);
                sum.all += counts.all;
                sum.some += counts.some;
            }
        }
        sum
    }

    /// Forgets everything.
    pub fn clear(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Relaxed);
        }
    }
}
