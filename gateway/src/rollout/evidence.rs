//! What requests leave behind of a route with a rollout: a few relaxed operations each, no lock.
//!
//! Only requests that were drawn into an arm by their key count: those that `always` and `never` name, and those without a key, were not
//! drawn, and the arms would differ by who they are. What one key contributes is capped: so many requests in a window, and an
//! event of the same key bets with less each time (`race`); all that is counted counts in shares.

use std::{
    fmt,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::{
    latency,
    race::CLASSES,
    verdict::{Arms, ENOUGH_KEYS, Seen},
};

/// Keys that are told apart; those that share a place share its cap. At the end of the longest race half of the places are taken.
///
/// Both arms share all of them: the arm with more keys would else have more of them in each place, its events would weigh less,
/// and the other would look worse for that alone.
const PLACES: u64 = 2 * ENOUGH_KEYS;
/// The window in which a key's requests are counted.
const WINDOW: u64 = 10;
/// Requests of one key that count in a window.
const REQUESTS: u64 = 8;

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

#[derive(Default)]
struct Counters {
    all: AtomicU64,
    counted: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
    errors: [AtomicU32; CLASSES],
    client_errors: [AtomicU32; CLASSES],
}

/// What is seen of a route.
pub struct Recorder {
    arms: Arms<Counters>,
    latencies: Arms<Box<[AtomicU32]>>,
    /// For each place: the step, the window, requests in it, failures and 4xx during the step.
    places: Box<[AtomicU64]>,
    step: AtomicU64,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

impl Default for Recorder {
    fn default() -> Self {
        let zeros = || (0..latency::BUCKETS).map(|_| AtomicU32::new(0)).collect();
        Self {
            arms: Arms::default(),
            latencies: [zeros(), zeros()],
            places: (0..PLACES).map(|_| AtomicU64::new(0)).collect(),
            step: AtomicU64::new(1),
        }
    }
}

/// One place, unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    step: u64,
    window: u64,
    requests: u64,
    errors: u64,
    client_errors: u64,
}

impl Place {
    fn read(word: u64) -> Self {
        Self {
            step: word >> 48,
            window: (word >> 24) & 0xFF_FFFF,
            requests: (word >> 16) & 0xFF,
            errors: (word >> 8) & 0xFF,
            client_errors: word & 0xFF,
        }
    }

    fn word(self) -> u64 {
        let Self { step, window, requests, errors, client_errors } = self;
        step << 48 | window << 24 | requests << 16 | errors.min(0xFF) << 8 | client_errors.min(0xFF)
    }

    /// Counts a request; the classes of weight of its failure and its 4xx. Nothing where the key has had its share.
    fn count(&mut self, step: u64, window: u64, outcome: Outcome) -> Option<(Option<usize>, Option<usize>)> {
        if self.step != step {
            *self = Self { step, ..Self::default() };
        }
        if self.window != window {
            (self.window, self.requests) = (window, 0);
        }
        if self.requests >= REQUESTS {
            return None;
        }
        self.requests += 1;
        let event = |count: &mut u64, happened: bool| {
            if !happened {
                return None;
            }
            let class = usize::try_from(*count).unwrap_or(CLASSES);
            *count += 1;
            Some(class)
        };
        Some((
            event(&mut self.errors, outcome == Outcome::Failed),
            event(&mut self.client_errors, outcome == Outcome::ClientError),
        ))
    }
}

impl Recorder {
    /// A request of an arm (0: the monolith's, 1: the service's) is over.
    pub fn record(&self, arm: usize, key: u64, now: Duration, outcome: Outcome, head: Duration) {
        let counters = &self.arms[arm];
        counters.all.fetch_add(1, Relaxed);
        #[allow(clippy::cast_possible_truncation, reason = "a place of the table")]
        let place = &self.places[(key % PLACES) as usize];
        let mut read = Place::read(place.load(Relaxed));
        // Two workers may count the same key at once and one of them be forgotten: it has a little more than its share then.
        let counted = read.count(self.step.load(Relaxed), (now.as_secs() / WINDOW) & 0xFF_FFFF, outcome);
        let Some((error, client_error)) = counted else { return };
        place.store(read.word(), Relaxed);
        counters.counted.fetch_add(1, Relaxed);
        self.latencies[arm][latency::bucket(head)].fetch_add(1, Relaxed);
        if let Some(class) = error {
            counters.failed.fetch_add(1, Relaxed);
            counters.errors.get(class).map(|count| count.fetch_add(1, Relaxed));
        }
        if let Some(class) = client_error {
            counters.refused.fetch_add(1, Relaxed);
            counters.client_errors.get(class).map(|count| count.fetch_add(1, Relaxed));
        }
    }

    /// What was seen since the last time.
    pub fn drain(&self) -> Arms<Seen> {
        let take = |counts: &[AtomicU32; CLASSES]| counts.each_ref().map(|count| count.swap(0, Relaxed));
        [0, 1].map(|arm| {
            let counters = &self.arms[arm];
            // What happened is read before how many there were: a request in between is in neither or in the second alone.
            let (errors, client_errors) = (take(&counters.errors), take(&counters.client_errors));
            let (failed, refused) = (counters.failed.swap(0, Relaxed), counters.refused.swap(0, Relaxed));
            let counted = counters.counted.swap(0, Relaxed);
            let latencies = if counted == 0 {
                Vec::new()
            } else {
                let counts = self.latencies[arm].iter().enumerate();
                counts
                    .filter(|(_, count)| count.load(Relaxed) > 0)
                    .filter_map(|(n, count)| Some((u16::try_from(n).ok()?, count.swap(0, Relaxed))))
                    .collect()
            };
            Seen { all: counters.all.swap(0, Relaxed), counted, failed, refused, errors, client_errors, latencies }
        })
    }

    /// Another step begins: what keys have contributed is forgotten, and what has not been looked at.
    pub fn restart(&self) {
        self.drain();
        self.step.fetch_update(Relaxed, Relaxed, |step| Some(step % 0xFFFF + 1)).ok();
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
            recorder.record(1, 7, NOW, Outcome::Failed, HEAD);
        }
        for key in 100..110 {
            recorder.record(1, key, NOW, Outcome::Failed, HEAD);
        }
        let [monolith, service] = recorder.drain();
        assert_eq!(monolith, Seen::default());
        assert_eq!((service.all, service.counted), (110, 18));
        // The one key's later failures weigh less and less, and then nothing.
        assert_eq!((service.errors, service.failed), ([11, 1, 1, 1], 18));
        // The next window has new requests, but the key's failures are known.
        recorder.record(1, 7, NOW + Duration::from_secs(10), Outcome::Failed, HEAD);
        let service = recorder.drain()[1].clone();
        assert_eq!((service.errors, service.failed), ([0; CLASSES], 1), "it is no news any more, but it is a failure");
        recorder.restart();
        recorder.record(1, 7, NOW + Duration::from_secs(10), Outcome::ClientError, HEAD);
        let service = &recorder.drain()[1];
        assert_eq!((service.counted, service.client_errors), (1, [1, 0, 0, 0]));
        assert_eq!(service.latencies.iter().map(|(_, count)| count).sum::<u32>(), 1);
    }

    /// A million users at 4,000 requests a second, of whom 1 % are the service's: the arms had places of their own, the monolith's were taken
    /// after two minutes, 4xx of new users weighed nothing there any more, and a service that was just as good was taken back.
    #[test]
    fn a_large_arm_does_not_look_better_for_being_large() {
        let terms = Terms {
            alpha: 0.01,
            steps: 5,
            errors: 0.005,
            client_errors: 0.01,
            p99: 0.5,
            mismatches: None,
            every: Duration::from_mins(10),
            min_requests: 500,
        };
        let (recorder, mut trial, mut state) = (Recorder::default(), Trial::begin(Duration::ZERO, None, false), 1_u64);
        let (mut races, mut heard) = (1, 0);
        for look in 1..=2_400 {
            let now = Duration::from_millis(250 * look);
            for _ in 0..1_000 {
                // Knuth's MMIX.
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let (drawn, key) = (state >> 33, state >> 20);
                let outcome = match drawn % 1_000 {
                    0..5 => Outcome::Failed,
                    5..35 => Outcome::ClientError,
                    _ => Outcome::Good,
                };
                recorder.record(usize::from(drawn / 1_000 % 100 == 0), key, now, outcome, HEAD);
            }
            let seen = recorder.drain();
            heard = seen.iter().map(|seen| seen.client_errors[0]).sum();
            trial.take(now, &seen);
            let verdict = trial.verdict(&terms, Compared::default(), now);
            assert!(!matches!(verdict, Verdict::Fail(_)), "after {now:?}: {verdict:?}");
            if trial.renew(now, terms.every) {
                recorder.restart();
                races += 1;
            }
        }
        // Nor does it become deaf.
        assert!(races > 1 && heard > 5, "{races} races, {heard} heard of at the end");
    }

    #[test]
    fn places_are_packed_and_unpacked() {
        let place = Place { step: 0xFFFF, window: 0xFF_FFFF, requests: 8, errors: 255, client_errors: 3 };
        assert_eq!(Place::read(place.word()), place);
    }
}
