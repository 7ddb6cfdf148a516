//! What the evidence of one step says: it passes, it fails, or there is not enough of it.
//!
//! Failing means proof that the service is worse: [`Race`] for its share of failures and of 4xx, disjoint confidence
//! bounds for the 99th percentile, a lower bound beyond the limit for mismatches. Passing means proof that it is no worse than the stated margin:
//! the upper bound of each difference lies under it. Proof of neither holds; so silence neither promotes nor aborts. `alpha` is divided among what
//! is judged and among the steps, so that the chance of failing a service that is no worse is at most `alpha` over the whole
//! rollout, however often one looks. Pure; time is given.

use std::time::Duration;

use serde::Serialize;

use super::{
    bounds,
    latency::Histogram,
    race::{CLASSES, Moment, Race},
};

/// What must hold for a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms {
    /// The chance of a false failure over the whole rollout.
    pub alpha: f64,
    /// How many steps share it.
    pub steps: usize,
    /// Points of failures.
    pub errors: f64,
    /// Points of 4xx.
    pub client_errors: f64,
    /// The relative margin of the 99th percentile.
    pub p99: f64,
    /// The share of compared answers that may differ, where answers are compared.
    pub mismatches: Option<f64>,
    /// How long the step lasts at least.
    pub every: Duration,
    /// Requests of the service, at least.
    pub min_requests: u64,
}

impl Terms {
    /// The chance that each judgement has for itself.
    fn alpha(&self) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "a few")]
        let judgements = (self.gates() * self.steps.max(1)) as f64;
        self.alpha / judgements
    }

    fn gates(&self) -> usize {
        3 + usize::from(self.mismatches.is_some())
    }
}

/// What happened to one arm's requests since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// All of them.
    pub all: u64,
    /// Those that count: a key's share is capped.
    pub counted: u64,
    /// Failures among those.
    pub failed: u64,
    /// 4xx among those.
    pub refused: u64,
    /// Failures among those, by class of weight.
    pub errors: [u32; CLASSES],
    /// 4xx among those, by class of weight.
    pub client_errors: [u32; CLASSES],
    /// How many took how long, by bucket.
    pub latencies: Vec<(u16, u32)>,
}

/// The monolith's part and the service's.
pub type Arms<T> = [T; 2];

/// What has happened during a step.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    /// When it began.
    pub since: Duration,
    /// Races before the one that runs: each has its own part of `alpha`.
    round: u32,
    round_since: Duration,
    /// Those that lasted their time.
    lasted: u32,
    /// Keys that have failed, and that were answered 4xx, during this race.
    spent: [u64; 2],
    errors: Race,
    client_errors: Race,
    pending: Arms<Seen>,
    pending_since: Option<Duration>,
    totals: Arms<Totals>,
    /// Whether the step leaves the monolith nothing: requests of before may still come in.
    alone: bool,
    /// What the monolith did when it was last asked, for such a step.
    reference: Totals,
}

/// An arm's numbers.
#[derive(Clone, Debug, Default)]
struct Totals {
    all: u64,
    counted: u64,
    errors: u64,
    client_errors: u64,
    /// In turns of ten seconds: what is so in both halves is so for longer than a moment.
    latencies: [Histogram; 2],
}

impl Totals {
    fn latencies(&self) -> Histogram {
        let [first, second] = &self.latencies;
        first.with(second)
    }
}

/// Answers that were compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// How many.
    pub all: u64,
    /// Those that differ.
    pub differing: u64,
}

/// What the evidence says.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It is no worse than it may be.
    Pass,
    /// It is worse: in what, in words.
    Fail(String),
    /// Not enough is known: what is missing, in words.
    Hold(Vec<String>),
}

/// A summary, for people and for the journal.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Evidence {
    /// Requests of the monolith and of the service during the step.
    pub requests: Arms<u64>,
    /// Those that count.
    pub counted: Arms<u64>,
    /// Shares of failures, in percent.
    pub errors: Arms<f64>,
    /// Shares of 4xx, in percent.
    pub client_errors: Arms<f64>,
    /// 99th percentiles of the time to the head, in milliseconds.
    pub p99_ms: Arms<Option<f64>>,
    /// Answers compared, and those that differ.
    pub compared: Arms<u64>,
}

/// A moment has so many requests of the service: a run of failures falls into one or two.
const ENOUGH: u64 = 4;
/// Or at least one of either, and this age.
const LONG_MOMENT: Duration = Duration::from_secs(20);
/// Or it is let go of.
const LONGEST_MOMENT: Duration = Duration::from_mins(1);
/// Slack where nothing of the monolith's is there to compare with.
const WITHOUT_CONTROL: f64 = 0.05;
/// Differences of the 99th percentile that are nobody's concern: proof of less than a tenth or a millisecond more is no failure.
const LATENCY_FAILS: (f64, Duration) = (1.1, Duration::from_millis(1));
/// And what passes in any case.
const LATENCY_PASSES: Duration = Duration::from_millis(5);
/// How long each half of the latencies is looked at in turn, in seconds.
const WINDOW: u64 = 10;
/// How long the first race lasts, at least; each of the next has fewer chances and twice the time.
const ROUND: Duration = Duration::from_mins(10);
/// A race is over when so many keys have failed, or were answered 4xx: there would soon be none left to bet on.
pub const ENOUGH_KEYS: u64 = 1 << 15;
/// What the service is answering is judged by its 99th percentile.
const QUANTILE: f64 = 0.99;

const NAMES: Arms<usize> = [0, 1];

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn float(n: u64) -> f64 {
    n as f64
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { (float(part) / float(whole) * 1e4).round() / 100.0 }
}

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e5).round() / 100.0
}

impl Trial {
    /// A step that begins now. `alone` where it leaves the monolith nothing: then what the monolith did before is what it is judged by.
    pub fn begin(now: Duration, before: Option<&Self>, alone: bool) -> Self {
        let reference = before.map(|before| before.measured()[0].clone()).unwrap_or_default();
        Self { since: now, round_since: now, alone, reference, ..Self::default() }
    }

    /// Takes in what was seen since the last look.
    pub fn take(&mut self, now: Duration, seen: &Arms<Seen>) {
        let half = usize::from((now.as_secs() / WINDOW) % 2 == 1);
        for arm in NAMES {
            let (totals, seen) = (&mut self.totals[arm], &seen[arm]);
            totals.all += seen.all;
            totals.counted += seen.counted;
            totals.errors += seen.failed;
            totals.client_errors += seen.refused;
            for (bucket, count) in &seen.latencies {
                totals.latencies[half].add(usize::from(*bucket), u64::from(*count));
            }
            self.spent[0] += u64::from(seen.errors[0]);
            self.spent[1] += u64::from(seen.client_errors[0]);
            let pending = &mut self.pending[arm];
            pending.counted += seen.counted;
            for class in 0..CLASSES {
                pending.errors[class] += seen.errors[class];
                pending.client_errors[class] += seen.client_errors[class];
            }
        }
        if self.alone {
            return;
        }
        let since = *self.pending_since.get_or_insert(now);
        // Whether a moment is over depends on requests alone, never on how they went.
        let [monolith, service] = [self.pending[0].counted, self.pending[1].counted];
        let age = now.saturating_sub(since);
        let long = age >= LONG_MOMENT && monolith > 0 && service > 0;
        if (monolith > 0 && service >= ENOUGH) || long || age >= LONGEST_MOMENT {
            let requests = [float(self.pending[0].counted), float(self.pending[1].counted)];
            let [monolith, service] = &self.pending;
            self.errors.run(&Moment { requests, events: [monolith.errors, service.errors] });
            self.client_errors.run(&Moment { requests, events: [monolith.client_errors, service.client_errors] });
            self.pending = Arms::default();
            self.pending_since = None;
        }
    }

    /// Begins another race where this one has lasted long enough; then keys may contribute anew. So a service that goes bad after
    /// hours is found out although all who ask it have had their share.
    pub fn renew(&mut self, now: Duration, every: Duration) -> bool {
        // Each twice as long as the one before: there are few of them, and little is proved late on a quiet route.
        let length = every.max(ROUND).saturating_mul(1 << self.lasted.min(20));
        let lasted = now.saturating_sub(self.round_since) >= length;
        if !lasted && self.spent.iter().all(|keys| *keys < ENOUGH_KEYS) {
            return false;
        }
        self.lasted += u32::from(lasted);
        self.round += 1;
        self.round_since = now;
        self.spent = [0; 2];
        (self.errors, self.client_errors) = (Race::default(), Race::default());
        (self.pending, self.pending_since) = (Arms::default(), None);
        true
    }

    /// What it says now.
    pub fn verdict(&self, terms: &Terms, compared: Compared, now: Duration) -> Verdict {
        let alpha = terms.alpha();
        let mut lacks = Vec::new();
        let [_, service] = &self.totals;
        if let Some(limit) = terms.mismatches {
            #[allow(clippy::cast_precision_loss, reason = "a few")]
            // These count over the whole rollout.
            let bound =
                bounds::share(float(compared.differing), float(compared.all), terms.alpha / terms.gates() as f64);
            let told = || {
                format!("{}% of {} compared answers differ", percent(compared.differing, compared.all), compared.all)
            };
            if bound.low > limit {
                return Verdict::Fail(format!("{}; {}% may", told(), limit * 100.0));
            }
            if bound.high >= limit {
                lacks.push(format!("mismatches: {}, and it is not shown that at most {}% do", told(), limit * 100.0));
            }
        }
        let judged = [
            ("failures", &self.errors, terms.errors, (|totals| totals.errors) as fn(&Totals) -> u64),
            ("4xx", &self.client_errors, terms.client_errors, |totals| totals.client_errors),
        ];
        for (name, race, margin, hits) in judged {
            let told = || {
                let [monolith, service] = self.measured().map(|totals| percent(hits(totals), totals.counted));
                format!("{name} {service}% against {monolith}%")
            };
            if self.fails(race, hits, alpha) {
                return Verdict::Fail(told());
            }
            if self.worst_case(hits, alpha) >= margin {
                lacks.push(format!("{}, and it is not shown to be within {} points", told(), margin * 100.0));
            }
        }
        match self.latency(terms, alpha) {
            Ok(None) => {}
            Ok(Some(lack)) => lacks.push(lack),
            Err(failure) => return Verdict::Fail(failure),
        }
        if service.counted < terms.min_requests {
            lacks.push(format!("{} of {} requests", service.counted, terms.min_requests));
        }
        if let Some(left) = terms.every.checked_sub(now.saturating_sub(self.since)).filter(|left| !left.is_zero()) {
            lacks.push(format!("{} s of the step are left", left.as_secs_f64().ceil()));
        }
        if lacks.is_empty() { Verdict::Pass } else { Verdict::Hold(lacks) }
    }

    /// The monolith as it is compared with, and the service.
    fn measured(&self) -> Arms<&Totals> {
        let [monolith, service] = &self.totals;
        [if self.alone { &self.reference } else { monolith }, service]
    }

    fn fails(&self, race: &Race, hits: fn(&Totals) -> u64, alpha: f64) -> bool {
        // The n-th race has 1 / n(n + 1) of the chances: all of them together have one.
        let round = f64::from(self.round) + 1.0;
        if race.is_lost(alpha / (round * (round + 1.0))) {
            return true;
        }
        let [monolith, service] = self.measured();
        if !self.alone || monolith.counted == 0 {
            return false;
        }
        let known = bounds::share(float(hits(service)), float(service.counted), alpha).low;
        let reference = bounds::share(float(hits(monolith)), float(monolith.counted), alpha).high;
        known > reference + WITHOUT_CONTROL
    }

    /// The most that the service's share may lie above the monolith's.
    fn worst_case(&self, hits: fn(&Totals) -> u64, alpha: f64) -> f64 {
        let [monolith, service] = self.measured();
        let most = bounds::share(float(hits(service)), float(service.counted), alpha).high;
        let least = match (self.alone, monolith.counted) {
            (false, _) => bounds::share(float(hits(monolith)), float(monolith.counted), alpha).low,
            // Nobody to compare with: a person must say.
            (true, 0) => -1.0,
            (true, _) => float(hits(monolith)) / float(monolith.counted),
        };
        most - least
    }

    /// What lacks, or how it fails.
    fn latency(&self, terms: &Terms, alpha: f64) -> Result<Option<String>, String> {
        let [monolith, service] = self.measured();
        if self.alone && monolith.counted == 0 {
            return Ok(Some(
                "there is nothing to compare it with; `gateway promote` ends it, or write `stage: migrated`".to_owned(),
            ));
        }
        // Two bounds are at stake each time.
        let bound = |latencies: &Histogram| {
            let (low, high) = bounds::ranks(QUANTILE, latencies.total(), alpha / 2.0);
            let low = low.and_then(|rank| latencies.at_least(rank));
            (low, high.and_then(|rank| latencies.at_most(rank)))
        };
        let told = || {
            let [monolith, service] = self.measured().map(|totals| totals.latencies().quantile(QUANTILE));
            let show = |p99: Option<Duration>| p99.map_or("nothing".to_owned(), |p99| format!("{} ms", millis(p99)));
            format!("p99 {} against {}", show(service), show(monolith))
        };
        let (factor, slack) = if self.alone { (2.0, LATENCY_FAILS.1) } else { LATENCY_FAILS };
        let is_slower = |half: usize| {
            let most = bound(&monolith.latencies[half]).1;
            let least = bound(&service.latencies[half]).0;
            matches!((least, most), (Some(least), Some(most)) if least > most.mul_f64(factor).max(most + slack))
        };
        // One stall is in one half.
        if is_slower(0) && is_slower(1) {
            return Err(told());
        }
        let (least, service_most) = (bound(&monolith.latencies()).0, bound(&service.latencies()).1);
        let passes = matches!((service_most, least), (Some(most), Some(least))
            if most <= least.mul_f64(1.0 + terms.p99).max(least + LATENCY_PASSES));
        Ok((!passes).then(|| format!("{}, and it is not shown to be within {}%", told(), terms.p99 * 100.0)))
    }

    /// A summary.
    pub fn evidence(&self, compared: Compared) -> Evidence {
        let measured = self.measured();
        Evidence {
            requests: [self.totals[0].all, self.totals[1].all],
            counted: measured.map(|totals| totals.counted),
            errors: measured.map(|totals| percent(totals.errors, totals.counted)),
            client_errors: measured.map(|totals| percent(totals.client_errors, totals.counted)),
            p99_ms: measured.map(|totals| totals.latencies().quantile(QUANTILE).map(millis)),
            compared: [compared.all, compared.differing],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        alpha: 0.01,
        steps: 5,
        errors: 0.005,
        client_errors: 0.01,
        p99: 0.5,
        mismatches: None,
        every: Duration::from_mins(1),
        min_requests: 500,
    };
    const NONE: Compared = Compared { all: 0, differing: 0 };

    fn seen(all: u64, errors: u32, client_errors: u32, millis: u64) -> Seen {
        let bucket = u16::try_from(super::super::latency::bucket(Duration::from_millis(millis))).unwrap();
        let first = |count| [count, 0, 0, 0];
        Seen {
            all,
            counted: all,
            failed: u64::from(errors),
            refused: u64::from(client_errors),
            errors: first(errors),
            client_errors: first(client_errors),
            latencies: vec![(bucket, u32::try_from(all).unwrap())],
        }
    }

    /// What a step says after so many quarters of a second of this, and when it said it.
    fn run(terms: &Terms, looks: u64, alone: bool, seen: &Arms<Seen>) -> (u64, Verdict) {
        let mut before = Trial::begin(Duration::ZERO, None, false);
        before.take(Duration::ZERO, &[self::seen(5_000, 25, 0, 20), self::seen(5_000, 25, 0, 20)]);
        let mut trial = Trial::begin(Duration::ZERO, Some(&before), alone);
        let mut verdict = Verdict::Hold(Vec::new());
        for look in 1..=looks {
            let now = Duration::from_millis(250 * look);
            trial.take(now, seen);
            verdict = trial.verdict(terms, NONE, now);
            if !matches!(verdict, Verdict::Hold(_)) {
                return (look, verdict);
            }
        }
        (looks, verdict)
    }

    #[test]
    fn no_worse_passes_once_it_is_shown_and_the_time_is_over() {
        let good = [seen(75, 0, 1, 20), seen(25, 0, 0, 20)];
        assert_eq!(run(&TERMS, 1_000, false, &good), (240, Verdict::Pass));
        let Verdict::Hold(lacks) = run(&TERMS, 30, false, &good).1 else { panic!() };
        assert!(
            lacks.iter().any(|lack| lack.contains("s of the step"))
                && lacks.iter().any(|lack| lack.contains("failures"))
        );
    }

    #[test]
    fn worse_fails_in_whatever_it_is_worse() {
        let fails = |service: Seen, word: &str| {
            let (look, verdict) = run(&TERMS, 2_000, false, &[seen(75, 0, 1, 20), service]);
            let Verdict::Fail(why) = verdict else { panic!("{word}: {verdict:?}") };
            assert!(why.starts_with(word), "{why}");
            look
        };
        assert!(fails(seen(25, 25, 0, 20), "failures") <= 12, "within three seconds");
        assert!(fails(seen(25, 0, 25, 20), "4xx") <= 12);
        fails(seen(25, 1, 0, 20), "failures");
        fails(seen(25, 0, 0, 40), "p99");
    }

    #[test]
    fn silence_holds_for_ever() {
        for seen in [[seen(0, 0, 0, 20), seen(0, 0, 0, 20)], [seen(100, 1, 0, 20), seen(0, 0, 0, 20)]] {
            assert!(matches!(run(&TERMS, 100_000, false, &seen).1, Verdict::Hold(_)));
        }
        // Nobody to compare with, though there could be.
        assert!(matches!(run(&TERMS, 1_000, false, &[seen(0, 0, 0, 20), seen(100, 0, 0, 20)]).1, Verdict::Hold(_)));
    }

    /// Requests that the monolith still had when the last step began stood in for all that was known of it, and no last step ever passed.
    #[test]
    fn the_last_step_is_judged_by_what_the_monolith_did_before() {
        let strays = |errors| [seen(1, 0, 0, 1), seen(100, errors, 0, 20)];
        assert_eq!(run(&TERMS, 1_000, true, &strays(0)), (240, Verdict::Pass));
        assert!(matches!(run(&TERMS, 1_000, true, &strays(20)).1, Verdict::Fail(_)));
        // After a restart nothing is known of before: that is no failure, and no proof either.
        let mut trial = Trial::begin(Duration::ZERO, None, true);
        trial.take(Duration::ZERO, &[seen(0, 0, 0, 20), seen(100_000, 0, 10_000, 20)]);
        assert!(matches!(trial.verdict(&TERMS, NONE, Duration::from_hours(1)), Verdict::Hold(_)));
    }

    /// Keys that had failed four times were no news any more, and a service that failed them for ever was taken for a good one.
    #[test]
    fn few_users_who_always_fail_are_never_proof_of_health() {
        let mut trial = Trial::begin(Duration::ZERO, None, false);
        for look in 1..20_000 {
            let now = Duration::from_millis(250 * look);
            let spent = Seen { errors: [0; CLASSES], ..seen(1, 1, 0, 20) };
            trial.take(now, &[seen(3, 0, 0, 20), spent]);
            assert!(!matches!(trial.verdict(&TERMS, NONE, now), Verdict::Pass), "{look}");
        }
    }

    /// One request a minute, and each fails: that takes longer than the first race.
    #[test]
    fn a_quiet_service_that_fails_is_found_out_too() {
        let mut trial = Trial::begin(Duration::ZERO, None, false);
        let failed = (1..24 * 60).find(|minute| {
            let now = Duration::from_mins(*minute);
            trial.take(now, &[seen(99, 0, 0, 20), seen(1, 1, 0, 20)]);
            let verdict = trial.verdict(&TERMS, NONE, now);
            trial.renew(now, TERMS.every);
            matches!(verdict, Verdict::Fail(_))
        });
        assert!(failed.is_some_and(|minutes| minutes < 120), "{failed:?}");
    }

    /// A pause of a second in one arm is no proof that it is slower.
    #[test]
    fn one_stall_is_no_proof() {
        let mut trial = Trial::begin(Duration::ZERO, None, false);
        for look in 1..400 {
            let now = Duration::from_millis(250 * look);
            let stalls = (20..24).contains(&look);
            trial.take(now, &[seen(75, 0, 0, 20), seen(25, 0, 0, if stalls { 900 } else { 20 })]);
            let verdict = trial.verdict(&TERMS, NONE, now);
            assert!(!matches!(verdict, Verdict::Fail(_)), "{verdict:?}");
        }
    }

    /// After hours of good times, with everybody known: found out all the same, and soon.
    #[test]
    fn a_service_that_goes_bad_late_is_found_out() {
        let mut trial = Trial::begin(Duration::ZERO, None, false);
        let mut looks = 0;
        for look in 1..60_000 {
            let now = Duration::from_millis(250 * look);
            let errors = u32::from(look % 4 == 0);
            trial.renew(now, TERMS.every);
            trial.take(now, &[seen(75, 3 * errors, 0, 20), seen(25, if look > 50_000 { 25 } else { errors }, 0, 20)]);
            if let Verdict::Fail(why) = trial.verdict(&TERMS, NONE, now) {
                assert!(look > 50_000 && why.starts_with("failures"), "{look}: {why}");
                looks = look - 50_000;
                break;
            }
        }
        assert!((1..100).contains(&looks), "{looks}");
    }

    #[test]
    fn mismatches_are_held_against_a_limit() {
        let terms = Terms { mismatches: Some(0.01), every: Duration::ZERO, ..TERMS };
        let mut trial = Trial::begin(Duration::ZERO, None, false);
        let verdict =
            |trial: &Trial, all, differing| trial.verdict(&terms, Compared { all, differing }, Duration::ZERO);
        assert!(
            matches!(verdict(&trial, 1_000, 50), Verdict::Fail(why) if why.contains("1000 compared answers differ"))
        );
        trial.take(Duration::ZERO, &[seen(20_000, 0, 0, 20), seen(20_000, 0, 0, 20)]);
        assert!(matches!(verdict(&trial, 0, 0), Verdict::Hold(_)));
        assert_eq!(verdict(&trial, 10_000, 10), Verdict::Pass);
    }
}
