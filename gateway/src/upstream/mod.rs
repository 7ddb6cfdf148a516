//! The systems behind the gateway: how they are reached, and what comes back from them.
//!
//! An [`Upstream`] is shared by all workers and lives on across reloads that leave
//! it alone; each worker has a [`pool::Pool`] of its own for it, since a connection belongs
//! to the thread that made it.

pub mod call;
pub mod connect;
pub mod discovery;
pub mod download;
pub mod endpoint;
mod flight;
pub mod health;
pub mod outcome;
pub mod pool;
pub mod rewrite;
pub mod tunnel;
pub mod upload;
pub mod way;

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::sync::{Notify, Semaphore};

use self::endpoint::Endpoint;
use crate::{
    config::{
        UpstreamConfig, Url,
        file::KeySource,
        parse_name, parse_url,
        upstream::{Balance, BreakerConfig, HealthConfig, OutlierConfig},
        values::{OrNone, Span},
    },
    resilience::{
        balance::may_eject,
        breaker::{Breaker, Settings},
        budget::Budget,
        bulkhead::Bulkhead,
        millis,
        vitals::Outlier,
    },
    routing::key::Key,
    telemetry::metrics::{UpstreamNow, UpstreamStats},
};

/// Name lookups at a time.
const LOOKUPS: usize = 4;
/// Buckets of a breaker's window.
const BUCKETS: u64 = 10;

/// A system behind the gateway.
#[derive(Debug)]
pub struct Upstream {
    /// Its name in the file.
    pub name: Arc<str>,
    /// Where the file says that it is: its endpoints, or the name to look up.
    pub urls: Vec<Url>,
    /// How its endpoints are found, where the file does not name them.
    pub discovery: Option<Discovery>,
    /// Its endpoints now.
    pub endpoints: ArcSwap<Vec<Arc<Endpoint>>>,
    /// Whether they have been looked up, and who waits for that.
    found: AtomicBool,
    finding: Notify,
    /// How connections to it are encrypted, but for the name.
    pub roots: Option<connect::Roots>,
    /// Which endpoint gets a request.
    pub balance: Balance,
    /// What `ring_hash` keeps together.
    pub hash_by: Vec<Key>,
    /// Whose turn it is.
    pub turn: AtomicUsize,
    /// How long an endpoint warms up.
    pub slow_start: u64,
    /// Active checks.
    pub health: Option<HealthConfig>,
    /// Passive ones.
    pub outlier: Option<Outlier>,
    /// One ejection at a time.
    ejecting: Mutex<()>,
    /// Its circuit breaker.
    pub breaker: Option<Arc<Breaker>>,
    /// Its retries.
    pub budget: Arc<Budget>,
    /// Its requests in flight.
    pub bulkhead: Arc<Bulkhead>,
    /// How many those may be, if there is a limit.
    pub max_requests: Option<u32>,
    /// How many may wait, for whatever they wait.
    pub max_pending: u32,
    /// How many do.
    pub pending: AtomicUsize,
    /// How long one may wait.
    pub pending_timeout: Duration,
    /// The connections of one worker.
    pub connections: Connections,
    /// Our own listeners: no name may resolve to them.
    pub prohibited: Arc<ArcSwap<Vec<SocketAddr>>>,
    /// Places for name lookups.
    pub lookups: Arc<Semaphore>,
    /// What is counted of it.
    pub stats: Arc<UpstreamStats>,
}

/// How endpoints are found.
#[derive(Clone, Debug)]
pub struct Discovery {
    /// The name to look up, whose service's domain is the upstream's host.
    pub name: String,
    /// Whether its SRV records are asked for.
    pub srv: bool,
}

/// The limits of one worker's pool.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// How many at most.
    pub max: usize,
    /// How long an unused one is kept.
    pub idle: Duration,
    /// How old one may grow.
    pub max_age: Duration,
    /// How long making one may take.
    pub connect_timeout: Duration,
}

fn span(span: Span) -> u64 {
    u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX)
}

fn breaker(config: &BreakerConfig) -> Settings {
    Settings {
        failure_ratio: config.failure_ratio.0.into(),
        min_requests: config.min_requests.into(),
        window: span(config.window),
        open_for: span(config.open_for),
        half_open: config.half_open_requests.into(),
        slow_call: config.slow_call.limit(),
    }
}

fn key(source: &KeySource) -> Option<Key> {
    match source {
        KeySource::Cookie(name) => Some(Key::Cookie(name.as_str().into())),
        KeySource::Header(name) => name.parse().ok().map(Key::Header),
        KeySource::Ip => Some(Key::Ip),
        // Refused by the check.
        KeySource::Sticky | KeySource::Claim(_) => None,
    }
}

fn outlier(config: &OutlierConfig) -> Outlier {
    Outlier {
        consecutive: config.consecutive_5xx,
        interval: span(config.interval),
        base: span(config.base_ejection),
        max_ejected: config.max_ejected.0.into(),
    }
}

impl Upstream {
    /// An upstream from its checked configuration. `folder` is the main file's; what `before` has learned is taken over as far as it
    /// is still about the same.
    pub fn new(
        name: &str,
        config: &UpstreamConfig,
        folder: &Path,
        workers: usize,
        before: Option<&Self>,
        prohibited: Arc<ArcSwap<Vec<SocketAddr>>>,
    ) -> Result<Self, String> {
        let listed: Vec<Url> =
            config.url.iter().chain(&config.urls).map(|url| parse_url(url)).collect::<Result<_, _>>()?;
        let named =
            [(&config.dns, false), (&config.srv, true)].into_iter().find_map(|(text, srv)| Some((text.as_ref()?, srv)));
        let (urls, discovery) = match named {
            None => (listed, None),
            Some((text, srv)) => {
                let bare = text.split_once("://").map_or(text.as_str(), |(_, rest)| rest);
                let name = if srv { bare } else { bare.rsplit_once(':').map_or(bare, |(name, _)| name) };
                (vec![parse_name(text, srv)?], Some(Discovery { name: name.to_owned(), srv }))
            }
        };
        let tls = urls.first().ok_or("no address")?.tls;
        let roots = if tls {
            Some(connect::Roots::new(config.ca.as_ref().map(|ca| folder.join(ca)).as_deref())?)
        } else {
            None
        };
        let limit = |span: Span| span.limit().unwrap_or(Duration::MAX);
        let several = discovery.is_some() || urls.len() > 1;
        let breaker = match &config.breaker {
            Some(OrNone::Some(config)) => Some(breaker(config)),
            None if name != "legacy" => Some(breaker(&BreakerConfig::default())),
            Some(OrNone::None) | None => None,
        };
        // What was learned of other addresses says nothing of these.
        let same = |settings: &Settings| {
            let before = before.filter(|before| {
                let found =
                    |discovery: &Option<Discovery>| discovery.as_ref().map(|known| (known.name.clone(), known.srv));
                found(&before.discovery) == found(&discovery) && before.urls.iter().any(|url| urls.contains(url))
            })?;
            before.breaker.clone().filter(|before| before.settings() == settings)
        };
        let this = Self {
            name: name.into(),
            endpoints: ArcSwap::default(),
            found: AtomicBool::new(discovery.is_none()),
            finding: Notify::new(),
            balance: config.balance,
            hash_by: config.hash_by.iter().filter_map(key).collect(),
            turn: AtomicUsize::new(0),
            slow_start: span(config.slow_start),
            health: config.health.clone(),
            outlier: match &config.outlier {
                Some(OrNone::Some(config)) => Some(outlier(config)),
                None if several => Some(outlier(&OutlierConfig::default())),
                Some(OrNone::None) | None => None,
            },
            ejecting: Mutex::default(),
            breaker: breaker
                .map(|settings| same(&settings).unwrap_or_else(|| Arc::new(Breaker::new(settings, BUCKETS)))),
            budget: before.map(|before| before.budget.clone()).unwrap_or_default(),
            // Who is in flight is in flight, whatever the file says now.
            bulkhead: before.map(|before| before.bulkhead.clone()).unwrap_or_default(),
            max_requests: config.max_requests,
            max_pending: config.max_pending,
            pending: AtomicUsize::new(0),
            pending_timeout: config.pending_timeout.0,
            connections: Connections {
                max: (config.connections.max as usize).div_ceil(workers).max(1),
                idle: limit(config.connections.idle),
                max_age: limit(config.connections.max_age),
                connect_timeout: config.connections.connect_timeout.0,
            },
            prohibited,
            lookups: Arc::new(Semaphore::new(LOOKUPS)),
            stats: before.map(|before| before.stats.clone()).unwrap_or_default(),
            roots,
            urls,
            discovery,
        };
        let known = before.map(|before| before.endpoints.load_full()).unwrap_or_default();
        // The same name still has the same addresses, until it is asked again.
        if let (Some(discovery), Some(before)) = (&this.discovery, before)
            && let Some(earlier) = &before.discovery
            && (&earlier.name, earlier.srv, before.url().port, before.url().tls)
                == (&discovery.name, discovery.srv, this.url().port, tls)
            && !known.is_empty()
        {
            let urls: Vec<Url> = known.iter().map(|endpoint| endpoint.url.clone()).collect();
            this.set_endpoints(&urls, &known)?;
        } else if this.discovery.is_none() {
            this.set_endpoints(&this.urls, &known)?;
        }
        Ok(this)
    }

    /// The first of its addresses, or the name.
    pub fn url(&self) -> &Url {
        &self.urls[0]
    }

    /// Where it is, as the file says it.
    pub fn address(&self) -> String {
        let scheme = if self.url().tls { "https" } else { "http" };
        match &self.discovery {
            Some(discovery) if discovery.srv => format!("{scheme}://{}", discovery.name),
            _ => {
                let all: Vec<String> = self.urls.iter().map(|url| format!("{scheme}://{}", url.authority)).collect();
                all.join(", ")
            }
        }
    }

    /// Puts endpoints in the place of those that there are. Those that stay keep their state; whether anything changed.
    pub fn set_endpoints(&self, urls: &[Url], known: &[Arc<Endpoint>]) -> Result<bool, String> {
        let now = millis(tokio::time::Instant::now());
        let mut endpoints = Vec::with_capacity(urls.len());
        for url in urls {
            let same = known.iter().find(|endpoint| endpoint.url == *url && endpoint.is_for(self));
            endpoints.push(match same {
                Some(endpoint) => endpoint.clone(),
                // Where others are there already, it warms up.
                None => Arc::new(Endpoint::new(self, url.clone(), (!known.is_empty()).then_some(now))?),
            });
        }
        let before = self.endpoints.load();
        let changed = before.len() != endpoints.len() || !before.iter().zip(&endpoints).all(|(a, b)| Arc::ptr_eq(a, b));
        if changed {
            self.endpoints.store(Arc::new(endpoints));
        }
        self.found.store(true, Relaxed);
        self.finding.notify_waiters();
        Ok(changed)
    }

    /// How it does at the moment.
    pub fn now(&self) -> UpstreamNow {
        let now = millis(tokio::time::Instant::now());
        let endpoints = self.endpoints.load();
        let down = endpoints.iter().filter(|endpoint| !endpoint.vitals.is_up()).count();
        let ejected =
            endpoints.iter().filter(|endpoint| endpoint.vitals.is_up() && endpoint.vitals.is_ejected(now)).count();
        UpstreamNow {
            breaker: self.breaker.as_ref().map(|breaker| breaker.state().word()),
            endpoints: (endpoints.len(), down, ejected),
            occupancy: self.bulkhead.occupancy(),
        }
    }

    /// Waits until its endpoints have been looked up once.
    pub async fn is_found(&self) {
        let mut found = std::pin::pin!(self.finding.notified());
        found.as_mut().enable();
        if !self.found.load(Relaxed) {
            found.await;
        }
    }

    /// Leaves out an endpoint that has failed often enough, unless too many are out already.
    pub fn eject(&self, endpoint: &Endpoint, now: u64) {
        let Some(outlier) = &self.outlier else { return };
        // One at a time, or two would take the last place.
        let _ejecting = self.ejecting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !may_eject(&self.endpoints.load(), now, outlier) {
            return;
        }
        if let Some(lasts) = endpoint.vitals.eject(now, outlier).map(Duration::from_millis) {
            self.stats.ejections.fetch_add(1, Relaxed);
            tracing::warn!(upstream = &*self.name, endpoint = &*endpoint.name, ?lasts, "an endpoint was ejected");
        }
    }

    /// It runs from now on: what it shares with the one before follows its limits.
    pub fn take_effect(&self) {
        self.bulkhead.set_max(self.max_requests.unwrap_or(u32::MAX));
        for endpoint in self.endpoints.load().iter() {
            endpoint.vitals.absolve(self.health.is_some(), self.outlier.is_some());
        }
    }

    /// Looked up in vain: who waits is told so, and who comes does not wait.
    pub fn give_up_finding(&self) {
        self.found.store(true, Relaxed);
        self.finding.notify_waiters();
    }
}
