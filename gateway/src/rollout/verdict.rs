//! What the evidence of one step says: it passes, it fails, or there is not enough of it.
//!
//! Failing means proof that the service is worse: [`Contest`] for its share of failures and of 4xx, disjoint confidence
//! bounds for the 99th percentile, a lower bound beyond the limit for mismatches. Passing means proof that it is no worse than the stated margin:
//! the upper bound of each difference lies under it. Proof of neither holds; so silence neither promotes nor aborts. `alpha` is divided among what
//! is judged and among the steps, so that the chance of failing a service that is no worse is at most `alpha` over the whole
//! rollout, however often one looks. Pure; time is given.

use std::time::Duration;

use serde::Serialize;

use super::{
    bounds,
    contest::{Contest, ENOUGH_KEYS, Events},
    latency::Histogram,
    race::CLASSES,
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

/// For failures, and for 4xx.
pub type Kinds<T> = [T; 2];

const KINDS: Kinds<&str> = ["failures", "4xx"];

/// What happened to one arm's requests since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// All of them.
    pub all: u64,
    /// Those that count: a key's share is capped.
    pub counted: u64,
    /// Failures and 4xx among those.
    pub hits: Kinds<u64>,
    /// The same, by class of weight.
    pub classes: Kinds<[u32; CLASSES]>,
    /// How many took how long, by bucket.
    pub times: Vec<(u16, u32)>,
    /// The same of one request of each key.
    pub firsts: Vec<(u16, u32)>,
}

/// The monolith's part and the service's.
pub type Arms<T> = [T; 2];

/// What has happened during a step.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    /// When it began.
    pub since: Duration,
    /// The share of keys that the service has.
    share: f64,
    contests: Kinds<Contest>,
    /// Keys that were timed since they were last begun anew.
    timed: u64,
    /// Requests since the last moment, and when the first of them were seen.
    pending: u64,
    pending_since: Option<Duration>,
    totals: Arms<Totals>,
    /// What the monolith did when it was last asked, for such a step.
    reference: Totals,
}

/// An arm's numbers.
#[derive(Clone, Debug, Default)]
struct Totals {
    all: u64,
    counted: u64,
    hits: Kinds<u64>,
    /// Those that are some of the first of their key.
    fresh: Kinds<u64>,
    times: Histogram,
    /// One request of each key, in turns of ten seconds: what is so in both halves is so for longer than a moment.
    firsts: [Histogram; 2],
}

/// What keys may contribute to anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// The races of failures, and of 4xx.
    pub events: Kinds<bool>,
    /// Times.
    pub times: bool,
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
/// Or this age.
const LONG_MOMENT: Duration = Duration::from_secs(20);
/// Slack where nothing of the monolith's is there to compare with.
const WITHOUT_CONTROL: f64 = 0.05;
/// Differences of the 99th percentile that are nobody's concern: proof of less than a tenth or a millisecond more is no failure.
const LATENCY_FAILS: (f64, Duration) = (1.1, Duration::from_millis(1));
/// And what passes in any case.
const LATENCY_PASSES: Duration = Duration::from_millis(5);
/// How long each half of the latencies is looked at in turn, in seconds.
const WINDOW: u64 = 10;
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
    /// A step that begins now, and gives the service this share of the keys. Where that leaves the monolith nothing, what the monolith did
    /// before is what the service is judged by.
    pub fn begin(now: Duration, before: Option<&Self>, share: f64) -> Self {
        let reference = before.map(|before| before.measured()[0].clone()).unwrap_or_default();
        let contests = [(); 2].map(|()| Contest::begin(now));
        Self { since: now, share, contests, reference, ..Self::default() }
    }

    /// Whether the step leaves the monolith nothing: requests of before may still come in.
    fn is_alone(&self) -> bool {
        self.share >= 1.0
    }

    /// Takes in what was seen since the last look.
    pub fn take(&mut self, now: Duration, seen: &Arms<Seen>) {
        let half = usize::from((now.as_secs() / WINDOW) % 2 == 1);
        for arm in NAMES {
            let (totals, seen) = (&mut self.totals[arm], &seen[arm]);
            totals.all += seen.all;
            totals.counted += seen.counted;
            for (bucket, count) in &seen.times {
                totals.times.add(usize::from(*bucket), u64::from(*count));
            }
            for (bucket, count) in &seen.firsts {
                totals.firsts[half].add(usize::from(*bucket), u64::from(*count));
                self.timed += u64::from(*count);
            }
            for (kind, contest) in self.contests.iter_mut().enumerate() {
                let (hits, classes) = (seen.hits[kind], seen.classes[kind]);
                totals.hits[kind] += hits;
                totals.fresh[kind] += classes.iter().map(|count| u64::from(*count)).sum::<u64>();
                contest.take(arm, &Events { requests: seen.counted, hits, classes });
            }
        }
        // Whether a moment is over depends on requests alone, never on how they went.
        self.pending += seen[1].counted;
        let since = *self.pending_since.get_or_insert(now);
        if self.pending >= ENOUGH || now.saturating_sub(since) >= LONG_MOMENT {
            for contest in &mut self.contests {
                contest.moment(self.share);
            }
            (self.pending, self.pending_since) = (0, None);
        }
    }

    /// Begins other races where those of a kind have lasted long enough; then keys may contribute anew.
    pub fn renew(&mut self, now: Duration, every: Duration) -> Renewed {
        let events = self.contests.each_mut().map(|contest| contest.renew(now, every));
        let times = events[0] || self.timed >= ENOUGH_KEYS;
        if times {
            self.timed = 0;
        }
        Renewed { events, times }
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
        for (kind, name) in KINDS.into_iter().enumerate() {
            let told = || {
                let [monolith, service] = self.measured().map(|totals| percent(totals.hits[kind], totals.counted));
                format!("{name} {service}% against {monolith}%")
            };
            if self.fails(kind, alpha) {
                return Verdict::Fail(told());
            }
            let margin = [terms.errors, terms.client_errors][kind];
            if self.worst_case(kind, alpha, terms.min_requests) >= margin {
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
        [if self.is_alone() { &self.reference } else { monolith }, service]
    }

    fn fails(&self, kind: usize, alpha: f64) -> bool {
        if !self.is_alone() {
            return self.contests[kind].is_lost(alpha);
        }
        let [monolith, service] = self.measured();
        if monolith.counted == 0 {
            return false;
        }
        let bound = |totals: &Totals| bounds::share(float(totals.hits[kind]), float(totals.counted), alpha);
        bound(service).low > bound(monolith).high + WITHOUT_CONTROL
    }

    /// The most that the service's share may lie above the monolith's. So of all events and of each key's first: a few who always
    /// fail with the monolith excuse nothing.
    fn worst_case(&self, kind: usize, alpha: f64, enough: u64) -> f64 {
        let [monolith, service] = self.measured();
        let differ = |events: fn(&Totals) -> &Kinds<u64>| {
            let [theirs, ours] = [monolith, service].map(|totals| float(events(totals)[kind]));
            let most = bounds::share(ours, float(service.counted), alpha).high;
            let least = if !self.is_alone() {
                bounds::share(theirs, float(monolith.counted), alpha).low
            } else if self.knows_before(enough) {
                theirs / float(monolith.counted)
            } else {
                // Nobody to compare with: a person must say.
                -1.0
            };
            most - least
        };
        differ(|totals| &totals.hits).max(differ(|totals| &totals.fresh))
    }

    /// Whether so much is known of the monolith that a step without it can be judged by that.
    fn knows_before(&self, enough: u64) -> bool {
        self.reference.counted >= enough.max(1)
    }

    /// What lacks, or how it fails.
    fn latency(&self, terms: &Terms, alpha: f64) -> Result<Option<String>, String> {
        let [monolith, service] = self.measured();
        if self.is_alone() && !self.knows_before(terms.min_requests) {
            return Ok(Some(format!(
                "{} requests of the monolith's are too few to compare it with; `gateway promote` ends it, or write `stage: migrated`",
                monolith.counted
            )));
        }
        // Two bounds are at stake each time.
        let bound = |latencies: &Histogram| {
            let (low, high) = bounds::ranks(QUANTILE, latencies.total(), alpha / 2.0);
            let low = low.and_then(|rank| latencies.at_least(rank));
            (low, high.and_then(|rank| latencies.at_most(rank)))
        };
        let told = |times: fn(&Totals) -> Histogram| {
            let show = |p99: Option<Duration>| p99.map_or("nothing".to_owned(), |p99| format!("{} ms", millis(p99)));
            let [monolith, service] = [monolith, service].map(|totals| show(times(totals).quantile(QUANTILE)));
            format!("p99 {service} against {monolith}")
        };
        let (factor, slack) = if self.is_alone() { (2.0, LATENCY_FAILS.1) } else { LATENCY_FAILS };
        let is_slower = |half: usize| {
            let most = bound(&monolith.firsts[half]).1;
            let least = bound(&service.firsts[half]).0;
            matches!((least, most), (Some(least), Some(most)) if least > most.mul_f64(factor).max(most + slack))
        };
        // One stall is in one half, and one slow client is one.
        if is_slower(0) && is_slower(1) {
            return Err(told(|totals| totals.firsts[0].with(&totals.firsts[1])));
        }
        let (least, most) = (bound(&monolith.times).0, bound(&service.times).1);
        let passes = matches!((most, least), (Some(most), Some(least))
            if most <= least.mul_f64(1.0 + terms.p99).max(least + LATENCY_PASSES));
        let lack = || {
            format!("{}, and it is not shown to be within {}%", told(|totals| totals.times.clone()), terms.p99 * 100.0)
        };
        Ok((!passes).then(lack))
    }

    /// A summary.
    pub fn evidence(&self, compared: Compared) -> Evidence {
        let measured = self.measured();
        Evidence {
            requests: [self.totals[0].all, self.totals[1].all],
            counted: measured.map(|totals| totals.counted),
            errors: measured.map(|totals| percent(totals.hits[0], totals.counted)),
            client_errors: measured.map(|totals| percent(totals.hits[1], totals.counted)),
            p99_ms: measured.map(|totals| totals.times.quantile(QUANTILE).map(millis)),
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
            hits: [errors, client_errors].map(u64::from),
            classes: [errors, client_errors].map(first),
            times: vec![(bucket, u32::try_from(all).unwrap())],
            firsts: vec![(bucket, u32::try_from(all).unwrap())],
        }
    }

    /// What a step says after so many quarters of a second of this, and when it said it.
    fn run(terms: &Terms, looks: u64, alone: bool, seen: &Arms<Seen>) -> (u64, Verdict) {
        let mut before = Trial::begin(Duration::ZERO, None, 0.25);
        before.take(Duration::ZERO, &[self::seen(5_000, 25, 0, 20), self::seen(5_000, 25, 0, 20)]);
        let mut trial = Trial::begin(Duration::ZERO, Some(&before), if alone { 1.0 } else { 0.25 });
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
        let mut trial = Trial::begin(Duration::ZERO, None, 1.0);
        trial.take(Duration::ZERO, &[seen(0, 0, 0, 20), seen(100_000, 0, 10_000, 20)]);
        assert!(matches!(trial.verdict(&TERMS, NONE, Duration::from_hours(1)), Verdict::Hold(_)));
    }

    /// By hand the last step comes after as few requests as one likes: one failure of fifty excused a service that failed as often.
    #[test]
    fn little_that_is_known_of_before_is_no_reference() {
        for (known, passes) in [(50, false), (500, true)] {
            let mut before = Trial::begin(Duration::ZERO, None, 0.5);
            before.take(Duration::ZERO, &[seen(known, 0, 0, 20), seen(50, 0, 0, 20)]);
            let mut trial = Trial::begin(Duration::ZERO, Some(&before), 1.0);
            trial.take(Duration::ZERO, &[seen(0, 0, 0, 20), seen(20_000, 0, 0, 20)]);
            let verdict = trial.verdict(&TERMS, NONE, Duration::from_hours(1));
            assert_eq!(verdict == Verdict::Pass, passes, "{known}: {verdict:?}");
        }
    }

    /// Bots that are answered 404 by the monolith all the time made its share so large that a worse service passed.
    #[test]
    fn bots_of_the_monolith_are_no_excuse() {
        let step = |bots: u64| {
            let mut trial = Trial::begin(Duration::ZERO, None, 0.05);
            trial.take(Duration::ZERO, &[seen(100_000, 0, 3_000, 20), seen(20_000, 0, 900, 20)]);
            let bots = Seen { all: bots, counted: bots, hits: [0, bots], ..Seen::default() };
            trial.take(Duration::ZERO, &[bots, Seen::default()]);
            // What is lost is another matter.
            trial.contests = Default::default();
            trial.verdict(&TERMS, NONE, Duration::from_hours(1))
        };
        for bots in [0, 5_000] {
            let verdict = step(bots);
            assert!(matches!(&verdict, Verdict::Hold(lacks) if lacks[0].starts_with("4xx")), "{bots}: {verdict:?}");
        }
    }

    /// Keys that had failed four times were no news any more, and a service that failed them for ever was taken for a good one.
    #[test]
    fn few_users_who_always_fail_are_never_proof_of_health() {
        let mut trial = Trial::begin(Duration::ZERO, None, 0.25);
        for look in 1..20_000 {
            let now = Duration::from_millis(250 * look);
            let spent = Seen { classes: [[0; CLASSES]; 2], ..seen(1, 1, 0, 20) };
            trial.take(now, &[seen(3, 0, 0, 20), spent]);
            assert!(!matches!(trial.verdict(&TERMS, NONE, now), Verdict::Pass), "{look}");
        }
    }

    /// One request a minute, and each fails: that takes longer than the first race.
    #[test]
    fn a_quiet_service_that_fails_is_found_out_too() {
        let mut trial = Trial::begin(Duration::ZERO, None, 0.25);
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
        let mut trial = Trial::begin(Duration::ZERO, None, 0.25);
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
        let mut trial = Trial::begin(Duration::ZERO, None, 0.25);
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
        let mut trial = Trial::begin(Duration::ZERO, None, 0.25);
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
