//! Durations in buckets of 3 to 6 %, from a microsecond to two minutes. Pure.

use std::time::Duration;

/// Buckets of each doubling.
const PARTS: u64 = 16;
/// How many buckets there are.
pub const BUCKETS: usize = 400;

/// The bucket of a duration.
pub fn bucket(duration: Duration) -> usize {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let index = if micros < PARTS {
        micros
    } else {
        let doublings = u64::from(micros.ilog2()) - 4;
        (doublings + 1) * PARTS + ((micros >> doublings) - PARTS)
    };
    usize::try_from(index).unwrap_or(usize::MAX).min(BUCKETS - 1)
}

/// Where a bucket begins.
pub fn begin(bucket: usize) -> Duration {
    let index = bucket as u64;
    let micros = if index < PARTS { index } else { (PARTS + index % PARTS) << (index / PARTS - 1) };
    Duration::from_micros(micros)
}

/// How many durations there are in each bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    counts: Box<[u64]>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS].into(), total: 0 }
    }
}

impl Histogram {
    /// Adds some.
    pub fn add(&mut self, bucket: usize, count: u64) {
        self.counts[bucket] += count;
        self.total += count;
    }

    /// Both together.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let counts = self.counts.iter().zip(&other.counts).map(|(a, b)| a + b).collect();
        Self { counts, total: self.total + other.total }
    }

    /// How many there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The bucket of the n-th in order, counted from one.
    fn at(&self, rank: u64) -> Option<usize> {
        let mut below = 0;
        self.counts.iter().position(|count| {
            below += count;
            below >= rank
        })
    }

    /// The n-th in order is at least this long.
    pub fn at_least(&self, rank: u64) -> Option<Duration> {
        self.at(rank).map(begin)
    }

    /// The n-th in order is at most this long.
    pub fn at_most(&self, rank: u64) -> Option<Duration> {
        self.at(rank).map(|bucket| begin(bucket + 1))
    }

    /// About how long the given share of them is at most.
    pub fn quantile(&self, quantile: f64) -> Option<Duration> {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a count"
        )]
        let rank = (self.total as f64 * quantile).ceil() as u64;
        (self.total > 0).then(|| self.at_most(rank.max(1))).flatten()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_duration_lies_in_its_bucket(micros in 0_u64..100_000_000) {
            let duration = Duration::from_micros(micros);
            let index = bucket(duration);
            prop_assert!(begin(index) <= duration && duration < begin(index + 1));
            let width = begin(index + 1).saturating_sub(begin(index));
            prop_assert!(width.as_micros() == 1 || width.as_secs_f64() / begin(index).as_secs_f64() <= 1.0 / 16.0);
        }
    }

    #[test]
    fn quantiles_are_found_by_rank() {
        let mut histogram = Histogram::default();
        for millis in 1..=100 {
            histogram.add(bucket(Duration::from_millis(millis)), 1);
        }
        let p99 = histogram.quantile(0.99).unwrap();
        assert!((99..106).contains(&p99.as_millis()), "{p99:?}");
        assert!(histogram.at_least(50).unwrap() <= Duration::from_millis(50));
        assert_eq!(histogram.at_least(101), None);
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
    }
}
