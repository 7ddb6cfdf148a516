//! What is counted of one endpoint and one arm.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::telemetry::metrics::{BUCKETS, quantile};

/// Parts of the last hour.
const PARTS: usize = 12;
/// The same, as a number of them that went by.
const ALL: u32 = 12;
/// How long one is, in seconds.
const PART: u32 = 300;

/// Seconds of Unix time; enough until 2106.
pub type Seconds = u32;

/// A moment in the seconds that are kept of it.
pub fn seconds(moment: Timestamp) -> Seconds {
    u32::try_from(moment.as_second()).unwrap_or(0)
}

/// One request, as far as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The status; 0 where the client left before there was one.
    pub status: u16,
    /// Whether its client did not have all of it.
    pub aborted: bool,
    /// How long it took, in microseconds, where that is known.
    pub micros: Option<u32>,
    /// When.
    pub at: Seconds,
}

/// What is counted of one endpoint and one arm.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Requests.
    pub requests: u64,
    /// Those answered 5xx.
    #[serde(skip_serializing_if = "is_zero")]
    pub errors: u64,
    /// Those answered 4xx.
    #[serde(skip_serializing_if = "is_zero")]
    pub client_errors: u64,
    /// Those whose client left.
    #[serde(skip_serializing_if = "is_zero")]
    pub aborted: u64,
    /// When the last one came, in seconds of Unix time.
    pub last: Seconds,
    /// Requests of parts of the last hour, in a ring.
    recent: [u32; PARTS],
    /// Durations, by the buckets of the metrics.
    durations: [u32; BUCKETS.len() + 1],
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde wants it")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Counts {
    /// Takes in a request.
    pub fn take(&mut self, seen: Seen) {
        self.requests = self.requests.saturating_add(1);
        match seen.status {
            _ if seen.aborted => self.aborted += 1,
            500.. => self.errors += 1,
            400.. => self.client_errors += 1,
            _ => {}
        }
        let part = seen.at / PART;
        if part > self.last / PART {
            self.move_on(part);
        }
        self.last = self.last.max(seen.at);
        // What is older than the ring comes out of a log that is not in order.
        if self.last / PART - part < ALL {
            let count = &mut self.recent[part as usize % PARTS];
            *count = count.saturating_add(1);
        }
        if let Some(micros) = seen.micros {
            let bucket = BUCKETS.partition_point(|bound| *bound < u64::from(micros));
            self.durations[bucket] = self.durations[bucket].saturating_add(1);
        }
    }

    /// Forgets what is older than an hour when this part begins.
    fn move_on(&mut self, part: u32) {
        for old in (self.last / PART + 1..=part).take(PARTS) {
            self.recent[old as usize % PARTS] = 0;
        }
    }

    /// Requests an hour: of the last hour, or of as much of it as was watched since `first`.
    #[allow(clippy::cast_precision_loss, reason = "counts")]
    pub fn per_hour(&self, first: Seconds, now: Seconds) -> f64 {
        let age = (now / PART).saturating_sub(self.last / PART) as usize;
        if age >= PARTS {
            return 0.0;
        }
        // The parts of the ring that are older than an hour now have not been overwritten.
        let part = (now / PART) as usize + PARTS;
        let sum: u64 = (0..PARTS - age).map(|back| u64::from(self.recent[(part - age - back) % PARTS])).sum();
        // The newest part has only begun.
        let watched = (ALL - 1) * PART + now % PART;
        let watched = watched.min(now.saturating_sub(first)).max(60);
        sum as f64 * 3600.0 / f64::from(watched)
    }

    /// About how many milliseconds the given share of them took at most.
    pub fn quantile_ms(&self, share: f64) -> Option<f64> {
        let counts: Vec<u64> = self.durations.iter().map(|count| u64::from(*count)).collect();
        quantile(&counts, share).map(|seconds| (seconds * 1e5).round() / 100.0)
    }

    /// Believes no moment after this one.
    pub fn clamp(&mut self, now: Seconds) {
        if self.last > now {
            (self.last, self.recent) = (now, [0; PARTS]);
        }
    }

    /// Takes in what was counted elsewhere.
    pub fn merge(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.errors = self.errors.saturating_add(other.errors);
        self.client_errors = self.client_errors.saturating_add(other.client_errors);
        self.aborted = self.aborted.saturating_add(other.aborted);
        let newest = self.last.max(other.last);
        let mut merged = [0_u32; PARTS];
        let newest_part = (newest / PART) as usize;
        for counts in [&*self, other] {
            let part = (counts.last / PART) as usize;
            for back in 0..PARTS.min(part + 1) {
                if newest_part - (part - back) < PARTS {
                    let place = (part - back) % PARTS;
                    merged[place] = merged[place].saturating_add(counts.recent[place]);
                }
            }
        }
        (self.recent, self.last) = (merged, newest);
        for (mine, theirs) in self.durations.iter_mut().zip(other.durations) {
            *mine = mine.saturating_add(theirs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(at: Seconds) -> Seen {
        Seen { status: 200, aborted: false, micros: Some(3_000), at }
    }

    #[test]
    fn a_rate_is_of_the_last_hour() {
        let mut counts = Counts::default();
        let begin = 1_000_000 * PART;
        for n in 0..7_200 {
            counts.take(at(begin + n));
        }
        #[allow(clippy::cast_possible_truncation, reason = "rates of a test")]
        let whole = |rate: f64| rate.round() as i64;
        let rate = |now| whole(counts.per_hour(begin, now));
        assert!((3_500..3_700).contains(&rate(begin + 7_199)), "{}", rate(begin + 7_199));
        assert!((1_700..2_000).contains(&rate(begin + 7_200 + 1_799)), "{}", rate(begin + 8_999));
        assert_eq!(rate(begin + 7_200 + 3_600), 0);
        // What was watched for a minute only is no less.
        let mut young = Counts::default();
        (0..60).for_each(|n| young.take(at(begin + n)));
        assert_eq!(whole(young.per_hour(begin, begin + 60)), 3_600);
        assert_eq!(counts.quantile_ms(0.5), Some(3.75));
    }

    #[test]
    fn what_two_have_counted_adds_up() {
        let begin = 1_000_000 * PART;
        let (mut a, mut b, mut both) = (Counts::default(), Counts::default(), Counts::default());
        for n in 0..3_600 {
            let seen = Seen { status: if n % 10 == 0 { 500 } else { 404 }, ..at(begin + n) };
            if n % 3 == 0 {
                a.take(seen);
            } else {
                b.take(seen);
            }
            both.take(seen);
        }
        a.merge(&b);
        assert_eq!(a, both);
        // What is old does not make the rate of what is new.
        let mut old = Counts::default();
        old.take(at(begin - 100 * PART));
        a.merge(&old);
        assert_eq!((a.requests, a.recent), (3_601, both.recent));
    }
}
