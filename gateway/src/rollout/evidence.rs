//! What requests leave behind of a route with a rollout: a few relaxed operations each, no lock.
//!
//! Only requests that were drawn into an arm by their key count: those that `always` and `never` name, and those without a key, were not
//! drawn, and the arms would differ by who they are. What one key contributes is capped: so many requests in a window, and an
//! event of the same key bets with less each time (`race`); all that is counted counts in shares.

use std::{
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::{
    contest::ENOUGH_KEYS,
    latency,
    race::CLASSES,
    verdict::{Arms, Kinds, Renewed, Seen},
};

/// Keys that are told apart; those that share a place share its cap. At the end of the longest race half of the places are taken.
///
/// Both arms share all of them: the arm with more keys would else have more of them in each place, its events would weigh less,
/// and the other would look worse for that alone.
const PLACES: u64 = 2 * ENOUGH_KEYS;
/// The window in which a key's requests are counted, in seconds.
const WINDOW: u64 = 10;
/// Requests of one key that count in a window.
const REQUESTS: u32 = 8;

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Good,
    /// The client was told that it was wrong.
    ClientError,
    /// It failed.
    Failed,
}

impl Outcome {
    fn kind(self) -> Option<usize> {
        match self {
            Self::Good => None,
            Self::Failed => Some(0),
            Self::ClientError => Some(1),
        }
    }
}

/// How often each key has come since an epoch began: 24 bits of the epoch, and eight of the count. Made with the first key: 256 KiB.
#[derive(Default)]
struct Keys(OnceLock<Box<[AtomicU32]>>);

impl Keys {
    /// How often it has come before; counts it.
    fn count(&self, key: u64, epoch: u32) -> u32 {
        let places = self.0.get_or_init(|| (0..PLACES).map(|_| AtomicU32::new(0)).collect());
        #[allow(clippy::cast_possible_truncation, reason = "a place of the table")]
        let place = &places[(key % PLACES) as usize];
        let word = place.load(Relaxed);
        let before = if word >> 8 == epoch & 0xFF_FFFF { word & 0xFF } else { 0 };
        // Two workers may count the same key at once and one of them be forgotten: it has a little more than its share then.
        place.store(epoch << 8 | (before + 1).min(0xFF), Relaxed);
        before
    }
}

#[derive(Default)]
struct Counters {
    all: AtomicU64,
    counted: AtomicU64,
    hits: Kinds<AtomicU64>,
    classes: Kinds<[AtomicU32; CLASSES]>,
    times: Times,
    firsts: Times,
}

/// Counts by bucket.
struct Times(Box<[AtomicU32]>);

impl Default for Times {
    fn default() -> Self {
        Self((0..latency::BUCKETS).map(|_| AtomicU32::new(0)).collect())
    }
}

impl Times {
    fn add(&self, bucket: usize) {
        self.0[bucket].fetch_add(1, Relaxed);
    }

    fn drain(&self) -> Vec<(u16, u32)> {
        let counts = self.0.iter().enumerate().filter(|(_, count)| count.load(Relaxed) > 0);
        counts.filter_map(|(n, count)| Some((u16::try_from(n).ok()?, count.swap(0, Relaxed)))).collect()
    }
}

/// What is seen of a route.
#[derive(Default)]
pub struct Recorder {
    arms: Arms<Counters>,
    /// Requests of a window.
    requests: Keys,
    /// Failures and 4xx of a race.
    events: Kinds<Keys>,
    races: Kinds<AtomicU32>,
    /// Requests whose time stands for the key's.
    timed: Keys,
    times: AtomicU32,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

impl Recorder {
    /// A request of an arm (0: the monolith's, 1: the service's) is over; `head` is how long it took to the head, unless a cache had it.
    pub fn record(&self, arm: usize, key: u64, now: Duration, outcome: Outcome, head: Option<Duration>) {
        let counters = &self.arms[arm];
        counters.all.fetch_add(1, Relaxed);
        // Windows do not begin at once for all, or all that count would come in their first moments.
        #[allow(clippy::cast_possible_truncation, reason = "24 bits are kept")]
        let window = ((now.as_secs() + key % WINDOW) / WINDOW) as u32;
        if self.requests.count(key, window) >= REQUESTS {
            return;
        }
        counters.counted.fetch_add(1, Relaxed);
        if let Some(head) = head {
            let bucket = latency::bucket(head);
            counters.times.add(bucket);
            if self.timed.count(key, self.times.load(Relaxed)) == 0 {
                counters.firsts.add(bucket);
            }
        }
        if let Some(kind) = outcome.kind() {
            counters.hits[kind].fetch_add(1, Relaxed);
            let class = self.events[kind].count(key, self.races[kind].load(Relaxed));
            let class = usize::try_from(class).unwrap_or(CLASSES);
            counters.classes[kind].get(class).map(|count| count.fetch_add(1, Relaxed));
        }
    }

    /// What was seen since the last time.
    pub fn drain(&self) -> Arms<Seen> {
        self.arms.each_ref().map(|counters| {
            // What happened is read before how many there were: a request in between is in neither or in the second alone.
            let classes =
                counters.classes.each_ref().map(|counts| counts.each_ref().map(|count| count.swap(0, Relaxed)));
            let hits = counters.hits.each_ref().map(|count| count.swap(0, Relaxed));
            let counted = counters.counted.swap(0, Relaxed);
            let [times, firsts] =
                [&counters.times, &counters.firsts].map(|times| if counted == 0 { Vec::new() } else { times.drain() });
            Seen { all: counters.all.swap(0, Relaxed), counted, hits, classes, times, firsts }
        })
    }

    /// Another step begins: what keys have contributed is forgotten, and what has not been looked at.
    pub fn restart(&self) {
        self.drain();
        self.renew(Renewed { events: [true; 2], times: true });
    }

    /// What keys have contributed to these is forgotten.
    pub fn renew(&self, renewed: Renewed) {
        for (race, renewed) in self.races.iter().zip(renewed.events) {
            race.fetch_add(u32::from(renewed), Relaxed);
        }
        self.times.fetch_add(u32::from(renewed.times), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::verdict::{Compared, Terms, Trial, Verdict};

    const NOW: Duration = Duration::from_secs(100);
    const HEAD: Duration = Duration::from_millis(5);

    #[test]
    fn a_key_has_its_share_and_no_more() {
        let recorder = Recorder::default();
        for _ in 0..100 {
            recorder.record(1, 7, NOW, Outcome::Failed, Some(HEAD));
        }
        for key in 100..110 {
            recorder.record(1, key, NOW, Outcome::Failed, Some(HEAD));
        }
        let [monolith, service] = recorder.drain();
        assert_eq!(monolith, Seen::default());
        assert_eq!((service.all, service.counted), (110, 18));
        // The one key's later failures weigh less and less, and then nothing.
        assert_eq!((service.classes[0], service.hits), ([11, 1, 1, 1], [18, 0]));
        // The next window has new requests, but the key's failures are known.
        recorder.record(1, 7, NOW + Duration::from_secs(10), Outcome::Failed, Some(HEAD));
        let service = recorder.drain()[1].clone();
        assert_eq!(
            (service.classes[0], service.hits),
            ([0; CLASSES], [1, 0]),
            "it is no news any more, but it is a failure"
        );
        recorder.restart();
        recorder.record(1, 7, NOW + Duration::from_secs(10), Outcome::ClientError, Some(HEAD));
        let service = &recorder.drain()[1];
        assert_eq!((service.counted, service.classes[1]), (1, [1, 0, 0, 0]));
        assert_eq!(service.times.iter().map(|(_, count)| count).sum::<u32>(), 1);
    }

    const TERMS: Terms = Terms {
        alpha: 0.01,
        steps: 5,
        errors: 0.005,
        client_errors: 0.01,
        p99: 0.5,
        mismatches: None,
        every: Duration::from_mins(10),
        min_requests: 500,
    };

    /// Knuth's MMIX.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }
    }

    /// So many looks at a step with so many requests each: where it failed, if it did, and the races that there were.
    fn step(
        share: f64,
        looks: u64,
        requests: u64,
        mut one: impl FnMut() -> (usize, u64, Outcome, Duration),
    ) -> (Option<(u64, String)>, usize) {
        let (recorder, mut trial, mut races) = (Recorder::default(), Trial::begin(Duration::ZERO, None, share), 1);
        for look in 1..=looks {
            let now = Duration::from_millis(250 * look);
            for _ in 0..requests {
                let (arm, key, outcome, head) = one();
                recorder.record(arm, key, now, outcome, Some(head));
            }
            trial.take(now, &recorder.drain());
            if let Verdict::Fail(why) = trial.verdict(&TERMS, Compared::default(), now) {
                return (Some((look, why)), races);
            }
            let renewed = trial.renew(now, TERMS.every);
            recorder.renew(renewed);
            races += usize::from(renewed.events[1]);
        }
        (None, races)
    }

    /// A million users at 4,000 requests a second, of whom 1 % are the service's: the arms had places of their own, the monolith's were taken
    /// after two minutes, 4xx of new users weighed nothing there any more, and a service that was just as good was taken back.
    #[test]
    fn a_large_arm_does_not_look_better_for_being_large() {
        let mut random = Random(1);
        let (failed, races) = step(0.01, 2_400, 1_000, || {
            let outcome = match random.below(1_000) {
                0..5 => Outcome::Failed,
                5..35 => Outcome::ClientError,
                _ => Outcome::Good,
            };
            (usize::from(random.below(100) == 0), random.below(1 << 40), outcome, HEAD)
        });
        // Nor does it become deaf.
        assert!(failed.is_none() && races > 1, "{failed:?}, {races} races");
    }

    /// Twelve that ask a lot and are never refused were the monolith's by chance. What they asked made its part of all requests large,
    /// and each 4xx of others looked as if it should have been its.
    #[test]
    fn clients_that_ask_a_lot_do_not_move_the_odds() {
        let mut random = Random(1);
        let (failed, _) = step(0.25, 4 * 3_600, 12, || {
            if random.below(12) < 10 {
                return (0, random.below(12), Outcome::Good, HEAD);
            }
            let outcome = if random.below(10) == 0 { Outcome::ClientError } else { Outcome::Good };
            (usize::from(random.below(4) == 0), 100 + random.below(1 << 40), outcome, HEAD)
        });
        assert!(failed.is_none(), "{failed:?}");
    }

    /// One client that asks for reports was more than a hundredth of a small arm.
    #[test]
    fn one_slow_client_is_no_slow_service() {
        let mut random = Random(1);
        let (failed, _) = step(0.05, 4 * 1_800, 12, || match random.below(60) {
            0 => (1, 7, Outcome::Good, Duration::from_secs(2)),
            1..4 => (1, 100 + random.below(1 << 40), Outcome::Good, HEAD),
            _ => (0, 100 + random.below(1 << 40), Outcome::Good, HEAD),
        });
        assert!(failed.is_none(), "{failed:?}");
    }

    /// So many 4xx that their races were over each few seconds ended the races of failures as well, which then never found anything.
    #[test]
    fn many_4xx_do_not_hide_failures() {
        let mut random = Random(1);
        let (failed, _) = step(0.01, 480, 5_000, || {
            let arm = usize::from(random.below(100) == 0);
            let outcome = match random.below(1_000) {
                n if n < 5 + 10 * arm as u64 => Outcome::Failed,
                100..500 => Outcome::ClientError,
                _ => Outcome::Good,
            };
            (arm, random.below(1 << 40), outcome, HEAD)
        });
        assert!(failed.as_ref().is_some_and(|(_, why)| why.starts_with("failures")), "{failed:?}");
    }
}
