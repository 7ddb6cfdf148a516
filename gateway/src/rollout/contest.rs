//! One kind of event over a step: its races, one after the other.
//!
//! Keys that have spent their bets would be blind spots, so another race begins after a while, in which keys count anew. The n-th has
//! `1 / n(n + 1)` of `alpha`: all of them together have one. Pure; time is given.

use std::time::Duration;

use super::{
    bounds,
    race::{CLASSES, Moment, Race},
    verdict::Arms,
};

/// How long the first race lasts, at least; each of the next has fewer chances and twice the time.
const ROUND: Duration = Duration::from_mins(10);
/// A race is over when so many keys have had an event: there would soon be none left to bet on.
pub const ENOUGH_KEYS: u64 = 1 << 15;
/// By how much a service must be worse in a race to be so whatever its requests have to do with each other.
const GROSS: f64 = 0.5;
/// And how many keys must have seen it.
const GROSS_KEYS: u64 = 5;

/// What is seen of one kind of event, in one arm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Requests that count.
    pub requests: u64,
    /// Those with an event.
    pub hits: u64,
    /// By class of weight.
    pub classes: [u32; CLASSES],
}

impl Events {
    fn add(&mut self, more: &Self) {
        self.requests += more.requests;
        self.hits += more.hits;
        for (count, more) in self.classes.iter_mut().zip(more.classes) {
            *count += more;
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    fn share(&self) -> f64 {
        if self.requests == 0 { 0.0 } else { self.hits as f64 / self.requests as f64 }
    }
}

/// The race that runs, and how many there were.
#[derive(Clone, Debug, Default)]
pub struct Contest {
    race: Race,
    since: Duration,
    /// Races before this one.
    round: u32,
    /// Those of them that lasted their time.
    lasted: u32,
    /// What has happened during this race.
    seen: Arms<Events>,
    /// What has happened since the last moment.
    pending: Arms<Events>,
}

impl Contest {
    /// One that begins now.
    pub fn begin(now: Duration) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// Takes in what was seen of an arm.
    pub fn take(&mut self, arm: usize, events: &Events) {
        self.seen[arm].add(events);
        self.pending[arm].add(events);
    }

    /// A moment is over; `share` of the keys were drawn into the service.
    pub fn moment(&mut self, share: f64) {
        let [monolith, service] = std::mem::take(&mut self.pending);
        let worse = service.share() > monolith.share();
        self.race.run(&Moment { share, worse, events: [monolith.classes, service.classes] });
    }

    /// Begins another race where this one has lasted long enough. So a service that goes bad after
    /// hours is found out although all who ask it have had their share.
    pub fn renew(&mut self, now: Duration, every: Duration) -> bool {
        // Each twice as long as the one before: there are few of them, and little is proved late on a quiet route.
        let length = every.max(ROUND).saturating_mul(1 << self.lasted.min(20));
        let lasted = now.saturating_sub(self.since) >= length;
        let keys: u64 = self.seen.iter().map(|events| u64::from(events.classes[0])).sum();
        if !lasted && keys < ENOUGH_KEYS {
            return false;
        }
        *self = Self { since: now, round: self.round + 1, lasted: self.lasted + u32::from(lasted), ..Self::default() };
        true
    }

    /// Whether the service was shown to have more, but for a chance of `alpha`.
    pub fn is_lost(&self, alpha: f64) -> bool {
        let round = f64::from(self.round) + 1.0;
        let alpha = alpha / (round * (round + 1.0));
        self.race.is_lost(alpha) || self.is_gross(alpha)
    }

    /// A few keys can never prove much, since each bets but once; where half of all that they ask goes wrong for them alone, that needs no bet.
    fn is_gross(&self, alpha: f64) -> bool {
        let [monolith, service] = &self.seen;
        #[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
        let bound = |events: &Events| bounds::any_share(events.hits as f64, events.requests as f64, alpha);
        u64::from(service.classes[0]) >= GROSS_KEYS
            && service.share() > monolith.share() + GROSS
            && bound(service).low > bound(monolith).high + GROSS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(requests: u64, classes: [u32; CLASSES], hits: u64) -> Events {
        Events { requests, hits, classes }
    }

    /// Each of ten clients had failed so often that it was no news any more, and the service went on failing all of them.
    #[test]
    fn few_clients_whom_the_service_always_fails_are_heard() {
        let mut contest = Contest::begin(Duration::ZERO);
        let mut lost = None;
        for moment in 0..100 {
            let classes =
                if moment < 4 { std::array::from_fn(|class| if class == moment { 10 } else { 0 }) } else { [0; 4] };
            contest.take(0, &events(10, [0; CLASSES], 0));
            contest.take(1, &events(10, classes, 10));
            contest.moment(0.5);
            if contest.is_lost(0.0005) {
                lost = Some(moment);
                break;
            }
        }
        assert!(lost.is_some_and(|moment| moment < 10), "{lost:?}");
    }

    /// Of three users one fails always, and is the service's.
    #[test]
    fn one_client_is_no_proof() {
        let mut contest = Contest::begin(Duration::ZERO);
        for moment in 0..10_000 {
            contest.take(0, &events(2, [0; CLASSES], 0));
            contest.take(1, &events(1, [u32::from(moment == 0), 0, 0, 0], 1));
            contest.moment(0.5);
            assert!(!contest.is_lost(0.0005), "{moment}");
        }
    }

    #[test]
    fn a_race_ends_with_its_time_or_its_keys() {
        let mut contest = Contest::begin(Duration::ZERO);
        let minutes = Duration::from_mins;
        assert!(!contest.renew(minutes(9), minutes(1)) && contest.renew(minutes(10), minutes(1)));
        assert!(!contest.renew(minutes(29), minutes(1)) && contest.renew(minutes(30), minutes(1)));
        contest.take(0, &events(1 << 20, [1 << 14; 4], 1 << 16));
        assert!(!contest.renew(minutes(31), minutes(1)));
        contest.take(1, &events(1 << 20, [1 << 14; 4], 1 << 16));
        assert!(contest.renew(minutes(31), minutes(1)));
        // Ended by its keys, it has not made the next longer.
        assert!(!contest.renew(minutes(70), minutes(1)) && contest.renew(minutes(71), minutes(1)));
    }
}
