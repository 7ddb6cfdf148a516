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
    errors: Race,
    client_errors: Race,
    pending: Arms<Seen>,
    pending_since: Option<Duration>,
    totals: Arms<Totals>,
    /// What the monolith did when it was last asked, for a step that leaves it nothing.
    reference: Option<Totals>,
}

/// An arm's numbers.
#[derive(Clone, Debug, Default)]
struct Totals {
    all: u64,
    counted: u64,
    errors: u64,
    client_errors: u64,
    latencies: Histogram,
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
const LONGEST_MOMENT: Duration = Duration::from_secs(60);
/// Slack where nothing of the monolith's is there to compare with.
const WITHOUT_CONTROL: f64 = 0.05;
/// Differences of the 99th percentile that are nobody's concern: proof of less is no failure.
const LATENCY_FAILS: Duration = Duration::from_millis(1);
/// And what passes in any case.
const LATENCY_PASSES: Duration = Duration::from_millis(5);
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
    /// A step that begins now. What the monolith did before is what a step is judged by that leaves it nothing.
    pub fn begin(now: Duration, before: Option<&Self>) -> Self {
        let reference = before.and_then(|before| {
            let [monolith, _] = &before.totals;
            if monolith.counted > 0 { Some(monolith.clone()) } else { before.reference.clone() }
        });
        Self { since: now, reference, ..Self::default() }
    }

    /// Takes in what was seen since the last look.
    pub fn take(&mut self, now: Duration, seen: &Arms<Seen>) {
        for arm in NAMES {
            let (totals, seen) = (&mut self.totals[arm], &seen[arm]);
            totals.all += seen.all;
            totals.counted += seen.counted;
            totals.errors += seen.errors.iter().map(|n| u64::from(*n)).sum::<u64>();
            totals.client_errors += seen.client_errors.iter().map(|n| u64::from(*n)).sum::<u64>();
            for (bucket, count) in &seen.latencies {
                totals.latencies.add(usize::from(*bucket), u64::from(*count));
            }
            let pending = &mut self.pending[arm];
            pending.counted += seen.counted;
            for class in 0..CLASSES {
                pending.errors[class] += seen.errors[class];
                pending.client_errors[class] += seen.client_errors[class];
            }
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

    /// What it says now.
    pub fn verdict(&self, terms: &Terms, compared: Compared, now: Duration) -> Verdict {
        let alpha = terms.alpha();
        let mut lacks = Vec::new();
        let [_, service] = &self.totals;
        if let Some(limit) = terms.mismatches {
            #[allow(clippy::cast_precision_loss, reason = "a few")]
            // These count over the whole rollout.
            let bound = bounds::share(
                float(compared.differing),
                float(compared.all),
                terms.alpha / terms.gates() as f64,
            );
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
        if service.all < terms.min_requests {
            lacks.push(format!("{} of {} requests", service.all, terms.min_requests));
        }
        if let Some(left) = terms.every.checked_sub(now.saturating_sub(self.since)).filter(|left| !left.is_zero()) {
            lacks.push(format!("{} s of the step are left", left.as_secs_f64().ceil()));
        }
        if lacks.is_empty() { Verdict::Pass } else { Verdict::Hold(lacks) }
    }

    /// The monolith as it is compared with, and the service.
    fn measured(&self) -> Arms<&Totals> {
        let [monolith, service] = &self.totals;
        [self.reference.as_ref().filter(|_| monolith.counted == 0).unwrap_or(monolith), service]
    }

    fn has_control(&self) -> bool {
        self.totals[0].counted > 0
    }

    fn fails(&self, race: &Race, hits: fn(&Totals) -> u64, alpha: f64) -> bool {
        if race.is_lost(alpha) {
            return true;
        }
        let [monolith, service] = self.measured();
        let known = bounds::share(float(hits(service)), float(service.counted), alpha).low;
        let reference = if monolith.counted == 0 { 0.0 } else { float(hits(monolith)) / float(monolith.counted) };
        !self.has_control() && known > reference + WITHOUT_CONTROL
    }

    /// The most that the service's share may lie above the monolith's.
    fn worst_case(&self, hits: fn(&Totals) -> u64, alpha: f64) -> f64 {
        let [monolith, service] = self.measured();
        let most = bounds::share(float(hits(service)), float(service.counted), alpha).high;
        let least = if self.has_control() {
            bounds::share(float(hits(monolith)), float(monolith.counted), alpha).low
        } else if monolith.counted == 0 {
            0.0
        } else {
            float(hits(monolith)) / float(monolith.counted)
        };
        most - least
    }

    /// What lacks, or how it fails.
    fn latency(&self, terms: &Terms, alpha: f64) -> Result<Option<String>, String> {
        let [monolith, service] = self.measured();
        if monolith.counted == 0 && service.counted > 0 {
            // Nobody to compare with, now or before.
            return Ok(None);
        }
        // Two bounds are at stake each time.
        let bound = |totals: &Totals| {
            let (low, high) = bounds::ranks(QUANTILE, totals.latencies.total(), alpha / 2.0);
            let low = low.and_then(|rank| totals.latencies.at_least(rank));
            (low, high.and_then(|rank| totals.latencies.at_most(rank)))
        };
        let ((least, most), (service_least, service_most)) = (bound(monolith), bound(service));
        let told = || {
            let [monolith, service] = self.measured().map(|totals| totals.latencies.quantile(QUANTILE));
            let show = |p99: Option<Duration>| p99.map_or("nothing".to_owned(), |p99| format!("{} ms", millis(p99)));
            format!("p99 {} against {}", show(service), show(monolith))
        };
        if let (Some(least), Some(most)) = (service_least, most)
            && least > most + LATENCY_FAILS
            && (self.has_control() || least > most * 2)
        {
            return Err(told());
        }
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
            p99_ms: measured.map(|totals| totals.latencies.quantile(QUANTILE).map(millis)),
            compared: [compared.all, compared.differing],
        }
    }
}
