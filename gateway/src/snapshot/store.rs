//! The snapshot that runs, how a new one takes its place, and what lives on across them.
//!
//! A reload is all or nothing: read, check, compile, prepare (listeners), then swap.
//! Whatever fails before the swap leaves everything as it was, and is remembered for
//! `/api/status`.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use thiserror::Error;
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};

use super::{Route, Snapshot, compile};
use crate::{
    auth::Verifier,
    cache::Cache,
    config::{
        self, Report, RouteConfig, Stage, UpstreamConfig,
        auth::VerifierConfig,
        cache::CacheConfig,
        parse_jwks,
        policy::Per,
        rollout::ShadowConfig,
        telemetry::TracingConfig,
        upstream::ConnectionsConfig,
        values::{OrNone, Span},
    },
    resilience::{
        gcra::{Limiter, Quota, Table},
        learned::Learned,
    },
    rollout::{
        journal::{Failure, Journal, Record},
        overlay::{self, Hold, Overlay, Ramp},
        steps::Phase,
    },
    routing::path::PathPolicy,
    shadow::{Shadow, record::Recorder},
    telemetry::{
        metrics::{Counts, ProcessStats, RouteStats, Source, UpstreamNow, UpstreamStats},
        trace::Tracer,
    },
    upstream::Upstream,
};

/// What lives on across reloads, by name and by its own configuration.
///
/// A reload works on a copy, which takes the place of the old one when nothing can fail any more.
#[derive(Clone)]
pub struct Registry {
    workers: usize,
    stats: HashMap<Arc<str>, Arc<RouteStats>>,
    upstreams: HashMap<Arc<str>, Known>,
    /// What each route's rate limit has counted, with what it is about.
    limiters: HashMap<Arc<str>, (Per, Arc<Limiter>)>,
    /// What each route's service was seen not to have.
    learned: HashMap<Arc<str>, (String, Arc<Learned>)>,
    /// Who has used how much of which; nothing where nothing is limited.
    used: Option<Arc<Table>>,
    /// Since when rate limits count their time.
    pub(super) begin: Instant,
    /// The verifiers with what they are about, the text of their authorities too.
    verifiers: HashMap<Arc<str>, KnownVerifier>,
    /// What is kept, and where.
    cache: Option<(CacheConfig, Arc<Cache>)>,
    /// What comparisons have come to, with what they are about.
    shadows: HashMap<Arc<str>, (Compares, Arc<Shadow>)>,
    /// Routes that a person has put back.
    holds: HashMap<Arc<str>, Arc<Hold>>,
    /// What rollouts have come to.
    ramps: HashMap<Arc<str>, Arc<Ramp>>,
    /// What the journal knew at the start, as long as nobody has asked for it.
    recorded: HashMap<String, Record>,
    /// Who takes traces, with what the file says of it.
    tracer: Option<(TracingConfig, Arc<Tracer>)>,
    /// What is counted of the process.
    process: Arc<ProcessStats>,
    /// Our own listeners: no upstream may resolve to them.
    own: Arc<ArcSwap<Vec<SocketAddr>>>,
}

/// A verifier with its configuration and the text of its authorities.
type KnownVerifier = (VerifierConfig, Option<Vec<u8>>, Arc<Verifier>);

/// How answers are compared, and whose.
type Compares = (ShadowConfig, Option<String>, Option<String>);

#[derive(Clone)]
struct Known {
    config: UpstreamConfig,
    ca: Option<Vec<u8>>,
    upstream: Arc<Upstream>,
}

impl Registry {
    /// An empty registry.
    pub fn new(workers: usize) -> Self {
        Self {
            workers,
            stats: HashMap::new(),
            upstreams: HashMap::new(),
            limiters: HashMap::new(),
            learned: HashMap::new(),
            used: None,
            verifiers: HashMap::new(),
            cache: None,
            shadows: HashMap::new(),
            holds: HashMap::new(),
            ramps: HashMap::new(),
            recorded: HashMap::new(),
            tracer: None,
            process: Arc::default(),
            begin: Instant::now(),
            own: Arc::default(),
        }
    }

    pub(super) fn stats(&mut self, name: &str) -> Arc<RouteStats> {
        if let Some(stats) = self.stats.get(name) {
            return stats.clone();
        }
        let stats = Arc::new(RouteStats::new(self.workers));
        self.stats.insert(name.into(), stats.clone());
        stats
    }

    pub(super) fn limiter(&mut self, route: &str, per: &Per, quota: Quota) -> Arc<Limiter> {
        if let Some((known, limiter)) = self.limiters.get(route)
            && known == per
            && limiter.quota() == quota
        {
            return limiter.clone();
        }
        let limiter = Arc::new(Limiter::new(quota, self.used.get_or_insert_default()));
        self.limiters.insert(route.into(), (per.clone(), limiter.clone()));
        limiter
    }

    pub(super) fn overlay(&mut self, name: &str, route: &RouteConfig) -> Overlay {
        let Record { hold: held, rollout: recorded } = self.recorded.remove(name).unwrap_or_default();
        let hold = self.holds.entry(name.into()).or_default().clone();
        if held.is_some() {
            hold.set(true);
        }
        let ramp = (route.stage == Stage::Canary && route.rollout.is_some()).then(|| {
            let fingerprint = overlay::fingerprint(route);
            match self.ramps.get(name) {
                Some(known) if known.fingerprint == fingerprint => known.clone(),
                _ => {
                    let new = Arc::new(Ramp::new(fingerprint));
                    if let Some(known) = recorded.filter(|known| known.fingerprint == fingerprint) {
                        new.set(known.share, known.position.phase == Phase::RolledBack);
                    }
                    self.ramps.insert(name.into(), new.clone());
                    new
                }
            }
        });
        if ramp.is_none() {
            self.ramps.remove(name);
        }
        Overlay { hold, ramp }
    }

    pub(super) fn shadow(&mut self, name: &str, route: &RouteConfig, paths: PathPolicy) -> Option<Arc<Shadow>> {
        let config = match (&route.shadow, route.stage) {
            (Some(OrNone::Some(config)), Stage::Shadow | Stage::Canary) => config.clone(),
            (None, Stage::Shadow) => ShadowConfig::default(),
            _ => return None,
        };
        let about = (config, route.upstream.clone(), route.baseline.clone());
        if let Some((known, shadow)) = self.shadows.get(name)
            && *known == about
        {
            return Some(shadow.clone());
        }
        let shadow = Arc::new(Shadow::new(&about.0, paths));
        self.shadows.insert(name.into(), (about, shadow.clone()));
        Some(shadow)
    }

    /// A rollout that the file did not have at the start is a fresh one when it comes.
    fn forget_rollouts(&mut self) {
        self.recorded.values_mut().for_each(|record| record.rollout = None);
    }

    pub(super) fn learned(&mut self, route: &str, pattern: &str, service: &str) -> Arc<Learned> {
        // A space is in neither.
        let about = format!("{pattern} {service}");
        if let Some((known, learned)) = self.learned.get(route)
            && *known == about
        {
            return learned.clone();
        }
        let learned = Arc::new(Learned::new(pattern));
        self.learned.insert(route.into(), (about, learned.clone()));
        learned
    }

    pub(super) fn upstream(
        &mut self,
        name: &str,
        config: &UpstreamConfig,
        folder: &Path,
    ) -> Result<Arc<Upstream>, String> {
        let ca = config
            .ca
            .as_ref()
            .map(|ca| std::fs::read(folder.join(ca)))
            .transpose()
            .map_err(|error| error.to_string())?;
        if let Some(known) = self.upstreams.get(name)
            && known.config == *config
            && known.ca == ca
        {
            return Ok(known.upstream.clone());
        }
        // What it has counted and learned goes on under its name, as far as it is still about the same.
        let before = self.upstreams.get(name).map(|known| &*known.upstream);
        let upstream = Arc::new(Upstream::new(name, config, folder, self.workers, before, self.own.clone())?);
        let known = Known { config: config.clone(), ca, upstream: upstream.clone() };
        self.upstreams.insert(name.into(), known);
        Ok(upstream)
    }

    pub(super) fn verifier(
        &mut self,
        name: &str,
        config: &VerifierConfig,
        folder: &Path,
    ) -> Result<Arc<Verifier>, String> {
        let ca = config.ca.as_ref().map(|ca| std::fs::read(folder.join(ca))).transpose();
        let ca = ca.map_err(|error| error.to_string())?;
        if let Some((known, known_ca, verifier)) = self.verifiers.get(name)
            && known == config
            && *known_ca == ca
        {
            return Ok(verifier.clone());
        }
        let (workers, own) = (self.workers, self.own.clone());
        let server = |url: &str| {
            let (base, target) = parse_jwks(url)?;
            let connections = ConnectionsConfig { connect_timeout: Span::secs(5), ..ConnectionsConfig::default() };
            let server =
                UpstreamConfig { url: Some(base), ca: config.ca.clone(), connections, ..UpstreamConfig::default() };
            let upstream = Upstream::new(&format!("jwks-{name}"), &server, folder, workers, None, own)?;
            Ok((Arc::new(upstream), target.into()))
        };
        // What came from the same place is good until something else comes.
        let before =
            self.verifiers.get(name).filter(|(known, known_ca, _)| known.jwks == config.jwks && *known_ca == ca);
        let before = before.map(|(_, _, verifier)| &**verifier);
        let verifier = Arc::new(Verifier::new(name, config, folder, before, server)?);
        self.verifiers.insert(name.into(), (config.clone(), ca, verifier.clone()));
        Ok(verifier)
    }

    pub(super) fn keep_verifiers(&mut self, used: &[Arc<Verifier>]) {
        self.verifiers.retain(|_, (_, _, known)| used.iter().any(|used| Arc::ptr_eq(used, known)));
    }

    pub(super) fn cache(&mut self, config: &CacheConfig) -> Arc<Cache> {
        match &self.cache {
            Some((known, cache)) if known == config => cache.clone(),
            _ => {
                let before = self.cache.as_ref().map(|(_, cache)| &**cache);
                let cache = Cache::new(config, self.workers, before);
                self.cache = Some((config.clone(), cache.clone()));
                cache
            }
        }
    }

    pub(super) fn tracer(&mut self, config: &TracingConfig) -> Result<Arc<Tracer>, String> {
        match &self.tracer {
            Some((known, tracer)) if known == config => Ok(tracer.clone()),
            _ => {
                let tracer = Arc::new(Tracer::new(config, self.process.clone())?);
                self.tracer = Some((config.clone(), tracer.clone()));
                Ok(tracer)
            }
        }
    }

    pub(super) fn keep_tracer(&mut self, used: bool) {
        if !used {
            self.tracer = None;
        }
    }

    pub(super) fn keep_cache(&mut self, used: Option<&Arc<Cache>>) {
        if used.is_none() {
            self.cache = None;
        }
    }

    /// Whether a `ca:` file has other content under the same name.
    fn certificates_changed(&self, config: &config::Config) -> bool {
        let verifiers = config.file.auth.iter().any(|(name, verifier)| {
            let known = self.verifiers.get(name.as_str()).and_then(|(_, ca, _)| ca.clone());
            verifier.ca.as_ref().is_some_and(|ca| std::fs::read(config.resolve(ca)).ok() != known)
        });
        verifiers
            || config.upstreams.iter().any(|(name, upstream)| {
                let known = self.upstreams.get(name.as_str());
                upstream
                    .ca
                    .as_ref()
                    .is_some_and(|ca| known.is_none_or(|known| std::fs::read(config.resolve(ca)).ok() != known.ca))
            })
    }

    pub(super) fn retain(&mut self, upstream: impl Fn(&Arc<Upstream>) -> bool, routes: &HashSet<&str>) {
        self.upstreams.retain(|_, known| upstream(&known.upstream));
        self.stats.retain(|name, _| routes.contains(&**name));
        self.limiters.retain(|name, _| routes.contains(&**name));
        self.learned.retain(|name, _| routes.contains(&**name));
        self.shadows.retain(|name, _| routes.contains(&**name));
        self.ramps.retain(|name, _| routes.contains(&**name));
        // Put back is put back, also for a route that is taken out of the file and comes again.
        self.holds.retain(|name, hold| hold.is_held() || routes.contains(&**name));
    }
}

/// What a reload came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reloaded {
    /// The file is what runs already.
    Unchanged,
    /// The new file runs, with this generation.
    Loaded(u64),
}

/// How the last reading of the file went.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Why the newest file is not what runs.
    pub refused: Option<Report>,
    /// The same as text, also where it was no fault of the file.
    pub error: Option<String>,
    /// What is allowed but looks wrong in the file that runs.
    pub warnings: Report,
    /// The last report, good or bad: its files and include patterns are what to watch.
    pub seen: Report,
}

/// Why nothing can run.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The file is refused.
    #[error(transparent)]
    Refused(#[from] Report),
    /// What must outlive the process is not ours.
    #[error(transparent)]
    State(#[from] Failure),
}

/// The journal with what it knows.
type Kept = (Option<Journal>, HashMap<String, Record>);

/// The snapshot that runs.
pub struct Store {
    path: PathBuf,
    /// The folder of what must outlive the process.
    pub state: PathBuf,
    /// The journal, until somebody keeps it.
    journal: Mutex<Kept>,
    current: ArcSwap<Snapshot>,
    generation: AtomicU64,
    registry: Mutex<Registry>,
    /// Snapshots that a request or a tunnel may still hold.
    retired: Mutex<Vec<Arc<Snapshot>>>,
    status: Mutex<Status>,
    /// Turns of comparing answers, which takes memory.
    pub comparing: Arc<Semaphore>,
    /// Whether anything is recorded, and what.
    recording: AtomicBool,
    recorder: ArcSwapOption<Recorder>,
    /// What is counted of the process.
    pub process: Arc<ProcessStats>,
    /// How many workers there are.
    pub workers: usize,
    /// Told when another snapshot runs.
    pub changed: Notify,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Pairs of answers that are compared at a time.
const COMPARING: usize = 2;

/// What a reload that failed without a line of the file to blame has to say.
const KEPT: &str = "what ran before goes on running";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while reloading leaves the registry whole: entries are added one by one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Loads a file for the first time.
    pub fn open(path: &Path, workers: usize) -> Result<Self, OpenError> {
        let config = config::load_with_env(path)?;
        let mut registry = Registry::new(workers);
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), std::process::id());
        let process =
            Arc::new(ProcessStats { id: u32::try_from(random >> 32).unwrap_or(1), ..ProcessStats::default() });
        registry.process = process.clone();
        let state = config.resolve(&config.file.state);
        // Before anything runs: what was put back stays put back.
        let (journal, records) =
            Journal::resume(&state)?.map(|(journal, records)| (Some(journal), records)).unwrap_or_default();
        registry.recorded.clone_from(&records);
        let snapshot =
            compile(&config, &mut registry, 1).map_err(|why| Report::of(path, why, "mend that and start again"))?;
        registry.own.store(Arc::new(snapshot.listeners.all()));
        start_tracer(&snapshot).map_err(|why| Report::of(path, why, "mend that and start again"))?;
        for upstream in &snapshot.upstreams {
            upstream.take_effect();
        }
        if let Some(cache) = &snapshot.cache {
            cache.take_effect();
        }
        process.reload_ok.store(1, Ordering::Relaxed);
        process.loaded_at.store(snapshot.loaded.as_second(), Ordering::Relaxed);
        let status = Status { seen: config.warnings.clone(), warnings: config.warnings, ..Status::default() };
        // Routes that the file does not have now may come back.
        registry.forget_rollouts();
        Ok(Self {
            path: path.to_owned(),
            state,
            journal: Mutex::new((journal, records)),
            current: ArcSwap::from_pointee(snapshot),
            generation: AtomicU64::new(1),
            registry: Mutex::new(registry),
            retired: Mutex::default(),
            status: Mutex::new(status),
            comparing: Arc::new(Semaphore::new(COMPARING)),
            recording: AtomicBool::new(false),
            recorder: ArcSwapOption::empty(),
            process,
            workers,
            changed: Notify::new(),
        })
    }

    /// The journal with what it knew at the start, for whoever keeps it.
    pub fn take_journal(&self) -> (Option<Journal>, HashMap<String, Record>) {
        std::mem::take(&mut *lock(&self.journal))
    }

    /// Whether anything may have to be recorded: cheap enough to ask for each request.
    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// What is to be recorded; nothing most of the time.
    pub fn recorder(&self) -> Option<Arc<Recorder>> {
        if !self.is_recording() {
            return None;
        }
        let recorder =
            self.recorder.load_full().filter(|recorder| !recorder.lines.is_closed() && Instant::now() < recorder.until);
        if recorder.is_none() {
            self.recording.store(false, Ordering::Relaxed);
            // Whoever reads it is told by its end.
            self.recorder.store(None);
        }
        recorder
    }

    /// Records from now on; not where somebody does already.
    pub fn record(&self, recorder: Recorder) -> Result<(), Recorder> {
        if self.recorder().is_some() {
            return Err(recorder);
        }
        self.recorder.store(Some(Arc::new(recorder)));
        self.recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The main file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The snapshot that runs.
    pub fn current(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// The generation of the snapshot that runs: cheap enough to ask for each request.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// How the last reading of the file went.
    pub fn status(&self) -> Status {
        lock(&self.status).clone()
    }

    /// Reads the file again. `prepare` makes ready what the new snapshot needs, with the
    /// old one beside it, and gives back what makes it take effect.
    pub fn reload<C: FnOnce()>(
        &self,
        prepare: impl FnOnce(&Snapshot, &Snapshot) -> Result<C, String>,
    ) -> Result<Reloaded, Report> {
        // One reload at a time: the lock is held from reading to swapping.
        let mut kept = lock(&self.registry);
        let mut registry = kept.clone();
        let old = self.current.load_full();
        let config = match config::load_with_env(&self.path) {
            Ok(config) => config,
            Err(report) => return Err(self.refuse(report)),
        };
        if config.hash == old.hash && !registry.certificates_changed(&config) {
            self.accept(config);
            return Ok(Reloaded::Unchanged);
        }
        let generation = old.generation + 1;
        let prepared = compile(&config, &mut registry, generation)
            .and_then(|snapshot| start_tracer(&snapshot).map(|()| snapshot))
            .and_then(|snapshot| prepare(&old, &snapshot).map(|commit| (snapshot, commit)));
        let (snapshot, commit) = match prepared {
            Ok(prepared) => prepared,
            Err(why) => {
                let report = Report::of(&self.path, why, KEPT);
                return Err(self.refuse(report));
            }
        };
        self.process.loaded_at.store(snapshot.loaded.as_second(), Ordering::Relaxed);
        registry.own.store(Arc::new(snapshot.listeners.all()));
        *kept = registry;
        for upstream in &snapshot.upstreams {
            upstream.take_effect();
        }
        if let Some(cache) = &snapshot.cache {
            cache.take_effect();
        }
        // What nobody finds any more takes no memory.
        if let Some(cache) = &old.cache
            && snapshot.cache.as_ref().is_none_or(|new| !Arc::ptr_eq(new, cache))
        {
            cache.clear();
        }
        self.current.store(Arc::new(snapshot));
        self.generation.store(generation, Ordering::Release);
        commit();
        self.changed.notify_one();
        self.process.reloads.fetch_add(1, Ordering::Relaxed);
        self.accept(config);
        drop(kept);
        // The last owner frees it; with thousands of routes that takes long enough to be felt by a request. So the
        // last owner is a later reload, which has time.
        let mut retired = lock(&self.retired);
        retired.push(old);
        retired.retain(|old| Arc::strong_count(old) > 1);
        Ok(Reloaded::Loaded(generation))
    }

    /// Those who take traces, of this file and of earlier ones whose requests are not over.
    pub fn tracers(&self) -> Vec<Arc<Tracer>> {
        let current = self.current.load_full();
        let retired = lock(&self.retired);
        retired.iter().chain([&current]).filter_map(|snapshot| snapshot.tracer.clone()).collect()
    }

    fn accept(&self, config: config::Config) {
        self.process.reload_ok.store(1, Ordering::Relaxed);
        let seen = config.warnings.clone();
        *lock(&self.status) = Status { refused: None, error: None, warnings: config.warnings, seen };
    }

    /// Notes that a reload failed for a reason that no check foresaw.
    pub fn fail(&self, why: String) -> Report {
        self.refuse(Report::of(&self.path, why, KEPT))
    }

    fn refuse(&self, report: Report) -> Report {
        self.process.reload_ok.store(0, Ordering::Relaxed);
        self.process.refused_reloads.fetch_add(1, Ordering::Relaxed);
        let mut status = lock(&self.status);
        status.error = Some(report.to_string());
        if !report.files.is_empty() {
            status.seen = report.clone();
        }
        status.refused = Some(report.clone());
        report
    }
}

/// Before any request has spans for it.
fn start_tracer(snapshot: &Snapshot) -> Result<(), String> {
    snapshot.tracer.as_ref().map_or(Ok(()), |tracer| tracer.start())
}

impl Source for Store {
    fn routes(&self, visit: &mut dyn FnMut(&str, &RouteStats)) {
        for Route { name, stats, .. } in &self.current.load().routes {
            visit(name, stats);
        }
    }

    fn shares(&self, visit: &mut dyn FnMut(&str, f64)) {
        for route in &self.current.load().routes {
            if let Some(share) = route.share() {
                visit(&route.name, f64::from(share) / 10_000.0);
            }
        }
    }

    fn holds(&self, visit: &mut dyn FnMut(&str, bool)) {
        for route in self.current.load().routes.iter().filter(|route| route.service.is_some()) {
            visit(&route.name, route.overlay.is_back());
        }
    }

    fn copies(&self, visit: &mut dyn FnMut(&str, Counts<'_>, Counts<'_>)) {
        for route in &self.current.load().routes {
            let Some(shadow) = &route.shadow else { continue };
            let [matched, mismatched, undecided] = {
                let ledger = shadow.ledger();
                [ledger.matched, ledger.mismatched, ledger.compared - ledger.matched - ledger.mismatched]
            };
            let compared = [("matched", matched), ("mismatched", mismatched), ("undecided", undecided)];
            visit(&route.name, &shadow.counts(), &compared);
        }
    }

    fn upstreams(&self, visit: &mut dyn FnMut(&str, &UpstreamStats, UpstreamNow)) {
        for upstream in &self.current.load().upstreams {
            visit(&upstream.name, &upstream.stats, upstream.now());
        }
    }

    fn process(&self) -> &ProcessStats {
        &self.process
    }
}
