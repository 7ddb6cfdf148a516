//! What the routes did of late: rates, shares of failures and percentiles of the last minute, out of counters that only grow.

use std::{collections::VecDeque, sync::Arc};

use serde::Serialize;

use crate::telemetry::metrics::{Arm, ArmTotals, RouteStats, quantile};

/// Looks that are kept; with one each five seconds, a minute.
const LOOKS: usize = 13;

/// What one arm did of late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct ArmNow {
    /// Requests a second.
    pub rps: f64,
    /// The share of failures, in percent.
    pub errors: f64,
    /// The 99th percentile of the durations, in milliseconds.
    pub p99_ms: Option<f64>,
}

/// The monolith, and the service.
pub type Both = [ArmNow; 2];

/// The counters of one route at the last looks.
#[derive(Debug)]
pub struct Recent {
    stats: Arc<RouteStats>,
    /// The oldest first, with when it was, in seconds.
    looks: VecDeque<(f64, [ArmTotals; 2])>,
}

/// The arms that are compared.
const ARMS: [Arm; 2] = [Arm::Legacy, Arm::Service];

impl Recent {
    /// Of a route's counters, from now on.
    pub fn new(stats: Arc<RouteStats>, now: f64) -> Self {
        let mut this = Self { stats, looks: VecDeque::with_capacity(LOOKS) };
        this.look(now);
        this
    }

    /// Whether these are its counters: a route that went and came again has others.
    pub fn is_of(&self, stats: &Arc<RouteStats>) -> bool {
        Arc::ptr_eq(&self.stats, stats)
    }

    /// Notes how far the counters are; every five seconds.
    pub fn look(&mut self, now: f64) {
        if self.looks.len() == LOOKS {
            self.looks.pop_front();
        }
        self.looks.push_back((now, ARMS.map(|arm| self.stats.totals(arm))));
    }

    /// What happened since the oldest look.
    pub fn now(&self, now: f64) -> Both {
        let Some((then, before)) = self.looks.front() else { return Both::default() };
        let mut both = Both::default();
        for ((arm, before), told) in ARMS.into_iter().zip(before).zip(&mut both) {
            *told = since(before, &self.stats.totals(arm), (now - then).max(1.0));
        }
        both
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts")]
fn since(before: &ArmTotals, after: &ArmTotals, seconds: f64) -> ArmNow {
    let count = |class: usize| after.classes[class].saturating_sub(before.classes[class]) as f64;
    let all: f64 = (0..after.classes.len()).map(count).sum();
    if all == 0.0 {
        return ArmNow::default();
    }
    let mut durations = after.durations;
    for (after, before) in durations.iter_mut().zip(before.durations) {
        *after = after.saturating_sub(before);
    }
    let round = |number: f64| (number * 100.0).round() / 100.0;
    ArmNow {
        rps: round(all / seconds),
        errors: round(count(4) / all * 100.0),
        p99_ms: quantile(&durations, 0.99).map(|seconds| round(seconds * 1000.0)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_older_than_a_minute_does_not_count() {
        let stats = Arc::new(RouteStats::new(1));
        let mut recent = Recent::new(stats.clone(), 0.0);
        for _ in 0..100 {
            stats.record(0, Arm::Service, 4, false, Duration::from_secs(2));
        }
        let [legacy, service] = recent.now(10.0);
        assert_eq!(legacy, ArmNow::default());
        assert_eq!((service.rps, service.errors), (10.0, 100.0));
        assert!(service.p99_ms.is_some_and(|p99| (1_000.0..2_500.0).contains(&p99)), "{service:?}");
        for n in (1..=LOOKS).filter_map(|n| u32::try_from(n).ok()) {
            recent.look(f64::from(n) * 5.0);
        }
        stats.record(0, Arm::Service, 1, false, Duration::from_millis(3));
        let [_, service] = recent.now(66.0);
        assert!(service.errors < 0.01);
        assert!(service.p99_ms.is_some_and(|p99| p99 <= 5.0), "{service:?}");
    }
}
