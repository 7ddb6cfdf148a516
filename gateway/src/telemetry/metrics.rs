//! Counters that cost two relaxed operations a request, and their Prometheus text.
//!
//! Each worker writes its own shard, so nothing contends; a scrape adds the shards up.
//! Labels are bounded by the file: route names, three arms, six classes of status.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet},
    metrics::MetricType,
    registry::{Registry, Unit},
};

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
pub enum Arm {
    /// The monolith, or what stands in for it.
    Legacy,
    /// The extracted service.
    Service,
    /// The gateway itself.
    #[default]
    Gateway,
}

impl Arm {
    /// All, in the order of the shards.
    pub const ALL: [Self; 3] = [Self::Legacy, Self::Service, Self::Gateway];

    /// The word in logs and labels.
    pub fn word(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Service => "service",
            Self::Gateway => "gateway",
        }
    }
}

/// Upper bounds of the duration buckets, in microseconds.
pub const BUCKETS: [u64; 14] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000,
];

/// `1xx` to `5xx`, and what the client never saw the end of.
pub const CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "aborted"];

/// The class that counts what a client gave up.
pub const ABORTED: usize = 5;

#[derive(Default)]
struct ArmShard {
    classes: [AtomicU64; 6],
    buckets: [AtomicU64; BUCKETS.len() + 1],
    micros: AtomicU64,
    writes: AtomicU64,
    in_flight: AtomicI64,
}

/// Adds to a counter that only this thread writes.
fn bump(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(by), Relaxed);
}

/// What is counted of one route. Lives on across reloads, by the route's name.
pub struct RouteStats {
    shards: Box<[[ArmShard; 3]]>,
    /// What is rare, and counted where it happens.
    pub rare: RareStats,
}

/// Why the monolith answered in the service's place.
pub const FALLBACKS: [&str; 5] = ["unavailable", "5xx", "404", "501", "learned"];

/// The time limits, in the order of their counters.
const LIMITS: [&str; 5] = ["connect", "pending", "attempt", "request", "idle"];

/// What happens to few of a route's requests.
#[derive(Debug, Default)]
pub struct RareStats {
    /// Tries beside the first.
    pub retries: AtomicU64,
    /// Tries that the budget did not allow.
    pub unaffordable: AtomicU64,
    /// Answers of the monolith in the service's place, by reason.
    pub fallbacks: [AtomicU64; 5],
    /// Time limits that fired.
    pub timeouts: [AtomicU64; 5],
    /// Requests beyond the rate limit.
    pub limited: AtomicU64,
    /// Requests that were not let in.
    pub unauthorized: AtomicU64,
    /// What the cache did, in the order of its words.
    pub cache: [AtomicU64; 6],
    /// Requests of its path that its predicates refused, and somebody else answered.
    pub fell: AtomicU64,
}

/// What the cache did for a request.
pub const SERVED: [&str; 6] = ["hit", "stale", "revalidated", "collapsed", "miss", "bypass"];

impl fmt::Debug for RouteStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouteStats").finish_non_exhaustive()
    }
}

/// The class of a status code.
pub fn class_of(status: http::StatusCode) -> usize {
    usize::from(status.as_u16() / 100).clamp(1, 5) - 1
}

/// What a route's arm has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArmTotals {
    /// Requests by class.
    pub classes: [u64; 6],
    /// Requests in flight.
    pub in_flight: i64,
    /// Those that wrote.
    pub writes: u64,
    /// Durations by bucket.
    pub durations: [u64; BUCKETS.len() + 1],
    /// How long they took together, in microseconds.
    pub micros: u64,
}

impl ArmTotals {
    /// Requests of all classes.
    pub fn requests(&self) -> u64 {
        self.classes.iter().sum()
    }
}

impl RouteStats {
    /// Counters for so many workers.
    pub fn new(workers: usize) -> Self {
        Self { shards: (0..workers).map(|_| <[ArmShard; 3]>::default()).collect(), rare: RareStats::default() }
    }

    /// A request has its arm.
    pub fn begin(&self, worker: usize, arm: Arm) {
        let gauge = &self.shards[worker][arm as usize].in_flight;
        gauge.store(gauge.load(Relaxed) + 1, Relaxed);
    }

    /// A request that began is over.
    pub fn end(&self, worker: usize, arm: Arm) {
        let gauge = &self.shards[worker][arm as usize].in_flight;
        gauge.store(gauge.load(Relaxed) - 1, Relaxed);
    }

    /// A request is over.
    pub fn record(&self, worker: usize, arm: Arm, class: usize, writes: bool, duration: Duration) {
        let shard = &self.shards[worker][arm as usize];
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        bump(&shard.classes[class], 1);
        bump(&shard.buckets[BUCKETS.partition_point(|bound| *bound < micros)], 1);
        bump(&shard.micros, micros);
        if writes {
            bump(&shard.writes, 1);
        }
    }

    /// What an arm has done so far.
    pub fn totals(&self, arm: Arm) -> ArmTotals {
        let mut totals = ArmTotals::default();
        for shard in &self.shards {
            let shard = &shard[arm as usize];
            for (total, class) in totals.classes.iter_mut().zip(&shard.classes) {
                *total += class.load(Relaxed);
            }
            for (total, bucket) in totals.durations.iter_mut().zip(&shard.buckets) {
                *total += bucket.load(Relaxed);
            }
            totals.micros = totals.micros.wrapping_add(shard.micros.load(Relaxed));
            totals.writes += shard.writes.load(Relaxed);
            totals.in_flight += shard.in_flight.load(Relaxed);
        }
        totals
    }

    /// About how many seconds the given share of an arm's requests took at most: by buckets, so roughly.
    pub fn quantile(&self, arm: Arm, share: f64) -> Option<f64> {
        quantile(&self.totals(arm).durations, share)
    }
}

/// About how many seconds the given share of requests took at most, whose durations are in these buckets: evenly within each.
#[allow(clippy::cast_precision_loss, reason = "counts")]
pub fn quantile(counts: &[u64], share: f64) -> Option<f64> {
    let rank = counts.iter().sum::<u64>() as f64 * share;
    let (mut below, mut from) = (0, 0.0);
    for (bound, inside) in bounds().zip(counts) {
        if *inside > 0 && (below + inside) as f64 >= rank {
            // The last has no end.
            let to = if bound.is_finite() { bound } else { from };
            return Some(from + (to - from) * ((rank - below as f64) / *inside as f64).clamp(0.0, 1.0));
        }
        (below, from) = (below + inside, bound);
    }
    None
}

/// The upper bounds of the duration buckets, in seconds.
#[allow(clippy::cast_precision_loss, reason = "small numbers")]
fn bounds() -> impl Iterator<Item = f64> {
    BUCKETS.iter().map(|micros| *micros as f64 / 1e6).chain([f64::INFINITY])
}

/// What is counted of one upstream. Lives as long as its pools.
#[derive(Debug, Default)]
pub struct UpstreamStats {
    /// Connections open.
    pub open: AtomicI64,
    /// Connections made.
    pub connected: AtomicU64,
    /// Connections that failed.
    pub failed: AtomicU64,
    /// Requests sent on a connection that had served another.
    pub reused: AtomicU64,
    /// Requests that found no place, or whose turn did not come in time.
    pub shed: AtomicU64,
    /// Tries that the breaker refused.
    pub refused: AtomicU64,
    /// How often the breaker opened.
    pub opened: AtomicU64,
    /// Endpoints ejected.
    pub ejections: AtomicU64,
}

/// How an upstream does at the moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct UpstreamNow {
    /// The breaker's state, if it has one.
    pub breaker: Option<&'static str>,
    /// Endpoints: all, those that checks call out, and those ejected.
    pub endpoints: (usize, usize, usize),
    /// Requests in flight and waiting.
    pub occupancy: (u64, u64),
}

/// What is counted of the process.
#[derive(Debug, Default)]
pub struct ProcessStats {
    /// Tells this process from every other gateway.
    pub id: u32,
    /// Requests in flight.
    pub requests: AtomicI64,
    /// Requests refused since there were too many.
    pub shed: AtomicU64,
    /// Clients connected.
    pub clients: AtomicI64,
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Connections closed at once, being too many.
    pub refused_clients: AtomicU64,
    /// Tunnels open.
    pub tunnels: AtomicI64,
    /// Reloads that took effect.
    pub reloads: AtomicU64,
    /// Reloads that were refused.
    pub refused_reloads: AtomicU64,
    /// Whether the newest file is the one that runs: 1 or 0.
    pub reload_ok: AtomicI64,
    /// When the file that runs was loaded, in Unix seconds.
    pub loaded_at: AtomicI64,
    /// Lines that the access log had no room for.
    pub log_dropped: AtomicU64,
    /// Spans that the collector took, those that it did not take, and those for which there was no room.
    pub spans: [AtomicU64; 3],
    /// What copies of requests hold of bodies.
    pub copied: Arc<AtomicI64>,
    /// Panics caught.
    pub panics: AtomicU64,
}

/// Counts by word.
pub type Counts<'c> = &'c [(&'static str, u64)];

/// Everything that a scrape reads.
pub trait Source: Send + Sync + 'static {
    /// Calls back for each route.
    fn routes(&self, visit: &mut dyn FnMut(&str, &RouteStats));
    /// Calls back for each canary, with the share that runs.
    fn shares(&self, visit: &mut dyn FnMut(&str, f64));
    /// Calls back for each route with a service, with whether it was put back to the monolith.
    fn holds(&self, visit: &mut dyn FnMut(&str, bool));
    /// Calls back for each route that sends copies: what became of them, and how answers compare.
    fn copies(&self, visit: &mut dyn FnMut(&str, Counts<'_>, Counts<'_>));
    /// Calls back for each upstream.
    fn upstreams(&self, visit: &mut dyn FnMut(&str, &UpstreamStats, UpstreamNow));
    /// The process's own.
    fn process(&self) -> &ProcessStats;
}

/// What the inventory knows, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InventoryNow {
    /// Endpoints that the monolith has no part in any more.
    pub moved: u64,
    /// All endpoints that were called.
    pub endpoints: u64,
    /// Requests that were not counted in it.
    pub dropped: u64,
}

/// The Prometheus text (`OpenMetrics` 1.0) of everything.
pub fn encode(source: Arc<dyn Source>, inventory: InventoryNow) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("gateway");
    registry.register_collector(Box::new(All(source, inventory)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

struct All(Arc<dyn Source>, InventoryNow);

impl fmt::Debug for All {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("All")
    }
}

impl Collector for All {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        // Shards are added up once.
        let mut known: Vec<(String, Arm, ArmTotals)> = Vec::new();
        self.0.routes(&mut |route, stats| {
            for arm in Arm::ALL {
                let totals = stats.totals(arm);
                if totals.in_flight != 0 || totals.requests() > 0 {
                    known.push((route.to_owned(), arm, totals));
                }
            }
        });
        {
            let help = "Requests, by route, by who answered and by class of status";
            let mut metric = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
            for (route, arm, totals) in &known {
                // Failures from zero on: what appears with its first value has not grown, to who asks for rates.
                let told = CLASSES.iter().zip(totals.classes).filter(|(class, count)| *count > 0 || **class == "5xx");
                for (class, count) in told {
                    counter(&mut metric, &[("route", route), ("arm", arm.word()), ("status", class)], count)?;
                }
            }
        }
        {
            let help = "Requests that write, by route and by who answered";
            let mut metric = encoder.encode_descriptor("writes", help, None, MetricType::Counter)?;
            for (route, arm, totals) in known.iter().filter(|(.., totals)| totals.writes > 0) {
                counter(&mut metric, &[("route", route), ("arm", arm.word())], totals.writes)?;
            }
        }
        {
            let mut metric =
                encoder.encode_descriptor("requests_in_flight", "Requests in flight", None, MetricType::Gauge)?;
            for (route, arm, totals) in known.iter().filter(|(_, arm, _)| *arm != Arm::Gateway) {
                gauge(&mut metric, &[("route", route), ("arm", arm.word())], totals.in_flight)?;
            }
        }
        {
            let help = "From the request's head to the end of the response's body";
            let unit = Some(&Unit::Seconds);
            let mut metric = encoder.encode_descriptor("request_duration", help, unit, MetricType::Histogram)?;
            for (route, arm, totals) in known.iter().filter(|(.., totals)| totals.requests() > 0) {
                let buckets: Vec<(f64, u64)> = bounds().zip(totals.durations).collect();
                #[allow(clippy::cast_precision_loss, reason = "a sum of seconds for a graph")]
                let sum = totals.micros as f64 / 1e6;
                metric
                    .encode_family(&[("route", route.as_str()), ("arm", arm.word())])?
                    .encode_histogram::<NoLabelSet>(sum, totals.durations.iter().sum(), &buckets, None)?;
            }
        }
        self.encode_rare(&mut encoder)?;
        self.encode_evidence(&mut encoder)?;
        self.encode_inventory(&mut encoder)?;
        self.encode_upstreams(&mut encoder)?;
        self.encode_process(&mut encoder)
    }
}

/// One counter of several.
type Of<T> = fn(&T) -> &AtomicU64;
/// Several that one label tells apart.
type Several = fn(&RareStats) -> &[AtomicU64];
/// Those who are in, or those who wait.
type Side = fn((u64, u64)) -> u64;

impl All {
    /// Counters of routes that nearly always are zero, and then left out.
    fn encode_rare(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let plain: [(&str, &str, Of<RareStats>); 4] = [
            ("auth_refused", "Requests without a token that is taken, answered 401 or 403", |rare| &rare.unauthorized),
            ("retries", "Tries beside the first", |rare| &rare.retries),
            ("retries_over_budget", "Tries that the retry budget did not allow", |rare| &rare.unaffordable),
            ("rate_limited", "Requests beyond the rate limit, answered 429", |rare| &rare.limited),
        ];
        for (name, help, get) in plain {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.each_route(|route, stats| match get(&stats.rare).load(Relaxed) {
                0 => Ok(()),
                count => counter(&mut metric, &[("route", route)], count),
            })?;
        }
        let labelled: [(&str, &str, &str, &[&str], Several); 3] = [
            ("fallbacks", "Answers of the monolith in the service's place", "reason", &FALLBACKS, |rare| {
                &rare.fallbacks
            }),
            ("timeouts", "Time limits that fired", "limit", &LIMITS, |rare| &rare.timeouts),
            ("cache_requests", "Requests of routes with a cache, by what it did", "result", &SERVED, |rare| {
                &rare.cache
            }),
        ];
        for (name, help, label, words, get) in labelled {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.each_route(|route, stats| {
                // From zero on, too, where it may happen.
                let whole = label == "reason" && stats.totals(Arm::Service).requests() > 0;
                for (word, count) in words.iter().zip(get(&stats.rare)) {
                    match count.load(Relaxed) {
                        0 if !whole => {}
                        count => counter(&mut metric, &[("route", route), (label, word)], count)?,
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Shares of canaries, and copies.
    fn encode_evidence(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut result = Ok(());
        {
            let help = "The share of a canary that runs, from 0 to 1";
            let mut metric = encoder.encode_descriptor("route_share", help, None, MetricType::Gauge)?;
            self.0.shares(&mut |route, share| {
                if result.is_ok() {
                    result = metric.encode_family(&[("route", route)]).and_then(|mut m| m.encode_gauge(&share));
                }
            });
        }
        {
            let help = "Whether a route was put back to the monolith, by hand or by its rollout";
            let mut metric = encoder.encode_descriptor("route_held", help, None, MetricType::Gauge)?;
            self.0.holds(&mut |route, held| {
                if result.is_ok() {
                    result = gauge(&mut metric, &[("route", route)], i64::from(held));
                }
            });
        }
        for (name, help, second) in [
            ("shadow_copies", "Requests that were to be copied, by what became of the copy", false),
            ("shadow_compared", "Answers that were compared", true),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.0.copies(&mut |route, copies, compared| {
                for (word, count) in if second { compared } else { copies } {
                    if result.is_ok() {
                        result = counter(&mut metric, &[("route", route), ("result", word)], *count);
                    }
                }
            });
        }
        result
    }

    fn encode_inventory(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let InventoryNow { moved, endpoints, dropped } = self.1;
        {
            let help = "Endpoints that clients call, by whether the monolith has a part in them";
            let mut metric = encoder.encode_descriptor("inventory_endpoints", help, None, MetricType::Gauge)?;
            for (state, count) in [("moved", moved), ("legacy", endpoints.saturating_sub(moved))] {
                gauge(&mut metric, &[("state", state)], i64::try_from(count).unwrap_or(i64::MAX))?;
            }
        }
        encoder
            .encode_descriptor(
                "inventory_dropped",
                "Requests that are not in the inventory",
                None,
                MetricType::Counter,
            )?
            .encode_counter::<NoLabelSet, _, u64>(&dropped, None)
    }

    fn each_route(&self, mut visit: impl FnMut(&str, &RouteStats) -> fmt::Result) -> fmt::Result {
        let mut result = Ok(());
        self.0.routes(&mut |name, stats| {
            if result.is_ok() {
                result = visit(name, stats);
            }
        });
        result
    }

    fn each_upstream(&self, mut visit: impl FnMut(&str, &UpstreamStats, UpstreamNow) -> fmt::Result) -> fmt::Result {
        let mut result = Ok(());
        self.0.upstreams(&mut |name, stats, now| {
            if result.is_ok() {
                result = visit(name, stats, now);
            }
        });
        result
    }

    fn encode_upstreams(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut metric =
            encoder.encode_descriptor("upstream_connections", "Connections open", None, MetricType::Gauge)?;
        self.each_upstream(|name, stats, _| gauge(&mut metric, &[("upstream", name)], stats.open.load(Relaxed)))?;
        let mut metric =
            encoder.encode_descriptor("upstream_connects", "Connections made, by result", None, MetricType::Counter)?;
        self.each_upstream(|name, stats, _| {
            counter(&mut metric, &[("upstream", name), ("result", "ok")], stats.connected.load(Relaxed))?;
            counter(&mut metric, &[("upstream", name), ("result", "failed")], stats.failed.load(Relaxed))
        })?;
        let counters: [(&str, &str, Of<UpstreamStats>); 5] = [
            ("upstream_reuses", "Requests on a connection that had served another", |stats| &stats.reused),
            ("upstream_shed", "Requests that found no place, or whose turn did not come in time", |stats| &stats.shed),
            ("upstream_breaker_refused", "Tries that the circuit breaker refused", |stats| &stats.refused),
            ("upstream_breaker_opened", "How often the circuit breaker opened", |stats| &stats.opened),
            ("upstream_ejections", "Endpoints ejected for their failures", |stats| &stats.ejections),
        ];
        for (name, help, get) in counters {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.each_upstream(|name, stats, _| counter(&mut metric, &[("upstream", name)], get(stats).load(Relaxed)))?;
        }
        let mut metric = encoder.encode_descriptor(
            "upstream_breaker_state",
            "The circuit breaker's state: 1 for the one that it has",
            None,
            MetricType::Gauge,
        )?;
        self.each_upstream(|name, _, now| {
            for state in ["closed", "open", "half_open"] {
                if let Some(has) = now.breaker {
                    gauge(&mut metric, &[("upstream", name), ("state", state)], i64::from(has == state))?;
                }
            }
            Ok(())
        })?;
        let mut metric =
            encoder.encode_descriptor("upstream_endpoints", "Endpoints, by state", None, MetricType::Gauge)?;
        self.each_upstream(|name, _, now| {
            let (all, down, ejected) = now.endpoints;
            let healthy = all.saturating_sub(down + ejected);
            for (state, count) in [("healthy", healthy), ("unhealthy", down), ("ejected", ejected)] {
                gauge(&mut metric, &[("upstream", name), ("state", state)], i64::try_from(count).unwrap_or(i64::MAX))?;
            }
            Ok(())
        })?;
        let occupancies: [(&str, &str, Side); 2] = [
            ("upstream_requests_in_flight", "Requests in flight", |(inside, _)| inside),
            ("upstream_requests_pending", "Requests that wait for a place", |(_, waiting)| waiting),
        ];
        for (name, help, side) in occupancies {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            self.each_upstream(|name, _, now| {
                gauge(&mut metric, &[("upstream", name)], i64::try_from(side(now.occupancy)).unwrap_or(i64::MAX))
            })?;
        }
        Ok(())
    }

    fn encode_process(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let stats = self.0.process();
        {
            let mut metric = encoder.encode_descriptor(
                "config_reloads",
                "Readings of a changed file, by result",
                None,
                MetricType::Counter,
            )?;
            counter(&mut metric, &[("result", "ok")], stats.reloads.load(Relaxed))?;
            counter(&mut metric, &[("result", "refused")], stats.refused_reloads.load(Relaxed))?;
        }
        for (name, help, value) in [
            ("config_last_reload_successful", "Whether the newest file is the one that runs", &stats.reload_ok),
            ("config_loaded_timestamp", "When the file that runs was loaded, in Unix seconds", &stats.loaded_at),
            ("client_requests", "Requests in flight, of all clients together", &stats.requests),
            ("client_connections", "Clients connected", &stats.clients),
            ("tunnels", "Upgraded connections", &stats.tunnels),
        ] {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value.load(Relaxed))?;
        }
        {
            let help = "Spans of traces, by what became of them";
            let mut metric = encoder.encode_descriptor("trace_spans", help, None, MetricType::Counter)?;
            for (word, count) in ["exported", "failed", "dropped"].into_iter().zip(&stats.spans) {
                counter(&mut metric, &[("result", word)], count.load(Relaxed))?;
            }
        }
        for (name, help, value) in [
            ("client_requests_shed", "Requests refused, being too many", &stats.shed),
            ("client_connections_accepted", "Connections accepted", &stats.accepted),
            ("client_connections_refused", "Connections closed at once, being too many", &stats.refused_clients),
            ("access_log_dropped", "Lines that the access log had no room for", &stats.log_dropped),
            ("panics", "Panics caught, each answered 500", &stats.panics),
        ] {
            encoder
                .encode_descriptor(name, help, None, MetricType::Counter)?
                .encode_counter::<NoLabelSet, _, u64>(&value.load(Relaxed), None)?;
        }
        Ok(())
    }
}

fn gauge<const N: usize>(metric: &mut MetricEncoder<'_>, labels: &[(&str, &str); N], value: i64) -> fmt::Result {
    metric.encode_family(labels)?.encode_gauge(&value)
}

fn counter<const N: usize>(metric: &mut MetricEncoder<'_>, labels: &[(&str, &str); N], value: u64) -> fmt::Result {
    metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct One(RouteStats, UpstreamStats, ProcessStats);

    impl Source for One {
        fn shares(&self, _: &mut dyn FnMut(&str, f64)) {}
        fn holds(&self, _: &mut dyn FnMut(&str, bool)) {}
        fn copies(&self, _: &mut dyn FnMut(&str, Counts<'_>, Counts<'_>)) {}
        fn routes(&self, visit: &mut dyn FnMut(&str, &RouteStats)) {
            visit("a \"quoted\" name", &self.0);
        }
        fn upstreams(&self, visit: &mut dyn FnMut(&str, &UpstreamStats, UpstreamNow)) {
            visit("legacy", &self.1, UpstreamNow::default());
        }
        fn process(&self) -> &ProcessStats {
            &self.2
        }
    }

    #[test]
    fn shards_add_up_and_labels_are_escaped() {
        let stats = RouteStats::new(2);
        stats.begin(0, Arm::Service);
        stats.record(0, Arm::Service, class_of(http::StatusCode::OK), false, Duration::from_millis(3));
        stats.record(1, Arm::Service, class_of(http::StatusCode::CREATED), true, Duration::from_mins(1));
        let one = One(stats, UpstreamStats::default(), ProcessStats::default());
        let text = encode(Arc::new(one), InventoryNow { moved: 2, endpoints: 7, dropped: 1 }).unwrap();
        assert!(text.contains(r#"gateway_writes_total{route="a \"quoted\" name",arm="service"} 1"#), "{text}");
        assert!(text.contains(r#"gateway_inventory_endpoints{state="legacy"} 5"#), "{text}");
        assert!(
            text.contains(r#"gateway_requests_total{route="a \"quoted\" name",arm="service",status="2xx"} 2"#),
            "{text}"
        );
        assert!(text.contains(r#"gateway_requests_in_flight{route="a \"quoted\" name",arm="service"} 1"#), "{text}");
        assert!(text.contains(r#"le="0.005",route="a \"quoted\" name",arm="service"} 1"#), "{text}");
        assert!(text.contains(r#"le="+Inf",route="a \"quoted\" name",arm="service"} 2"#), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }
}
