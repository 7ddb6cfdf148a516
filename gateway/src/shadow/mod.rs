//! Copies of requests for a service that does not answer yet, and how its answers compare.
//!
//! The engine behind `layers/shadow`: what is copied, how much of it there may be at a time, and what came of it.

pub mod compare;
pub mod decode;
pub mod ledger;
pub mod pointer;
pub mod record;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use bytes::BytesMut;
use http::{HeaderName, Method};
use serde_json::Value;
use tokio::sync::Semaphore;

use self::{
    compare::{Body, Rules},
    ledger::Ledger,
};
use crate::{
    config::rollout::ShadowConfig,
    rollout::verdict::Compared,
    routing::{path::PathPolicy, pattern},
};

/// What all copies may keep of bodies together.
const MEMORY: i64 = 64 * 1024 * 1024;

/// Copies of one route's requests.
pub struct Shadow {
    /// The share of requests that are copied, of 10,000.
    pub share: u16,
    /// The methods that are.
    pub methods: Vec<Method>,
    /// The paths that are not.
    exclude: Vec<pattern::Pattern>,
    /// What may differ.
    pub rules: Rules,
    /// The share of copies for which the monolith is asked again, of 10,000.
    pub noise: u16,
    /// What is kept of a body.
    pub max_body: usize,
    /// Copies in flight.
    pub places: Arc<Semaphore>,
    max_pending: i64,
    pending: AtomicI64,
    ledger: Mutex<Ledger>,
    counts: Counts,
}

/// What became of requests that were to be copied.
#[derive(Debug, Default)]
struct Counts {
    copied: AtomicU64,
    dropped: AtomicU64,
    too_long: AtomicU64,
    skipped: AtomicU64,
}

impl fmt::Debug for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shadow").field("share", &self.share).finish_non_exhaustive()
    }
}

/// Why a request was not copied, or its answers not compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// Enough copies wait already, or hold memory.
    Busy,
    /// Its body is longer than what is kept.
    TooLong,
    /// The monolith did not answer, its client left, or the answer is to a condition.
    Moot,
}

impl Shadow {
    /// As the file says.
    pub fn new(config: &ShadowConfig, paths: PathPolicy) -> Self {
        let pointers = |list: &[String]| list.iter().filter_map(|text| pointer::Pattern::parse(text).ok()).collect();
        let pattern = |text: &String| pattern::Pattern::parse(text, paths.case_insensitive).ok();
        Self {
            share: config.percent.0,
            methods: config.methods.iter().filter_map(|method| method.parse().ok()).collect(),
            exclude: config.exclude.iter().filter_map(pattern).collect(),
            rules: Rules {
                ignore: pointers(&config.ignore),
                unordered: pointers(&config.unordered),
                tolerance: config.tolerance,
                headers: config.headers.iter().filter_map(|name| HeaderName::try_from(name).ok()).collect(),
            },
            noise: config.noise.0,
            max_body: usize::try_from(config.max_body.0).unwrap_or(usize::MAX),
            places: Arc::new(Semaphore::new(config.max_requests as usize)),
            max_pending: i64::from(config.max_pending),
            pending: AtomicI64::new(0),
            ledger: Mutex::new(Ledger::new(config.noise.0 > 0)),
            counts: Counts::default(),
        }
    }

    /// Whether requests with this method and path, in its matched form, are copied.
    pub fn wants(&self, method: &Method, key: &[u8]) -> bool {
        self.methods.contains(method) && !self.exclude.iter().any(|pattern| pattern.matches(key))
    }

    /// A place among those that wait; none where there are enough.
    pub fn wait(self: &Arc<Self>) -> Option<Waiting> {
        if self.pending.fetch_add(1, Relaxed) >= self.max_pending {
            self.pending.fetch_sub(1, Relaxed);
            self.skip(Skip::Busy);
            return None;
        }
        self.counts.copied.fetch_add(1, Relaxed);
        Some(Waiting(self.clone()))
    }

    /// Counts what is not copied.
    pub fn skip(&self, why: Skip) {
        let counter = match why {
            Skip::Busy => &self.counts.dropped,
            Skip::TooLong => &self.counts.too_long,
            Skip::Moot => &self.counts.skipped,
        };
        counter.fetch_add(1, Relaxed);
    }

    /// What comparisons came to.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same in two numbers.
    pub fn compared(&self) -> Compared {
        let ledger = self.ledger();
        Compared { all: ledger.matched + ledger.mismatched, differing: ledger.mismatched }
    }

    /// Copies that left, that were dropped, that were too long, and that had nothing to be compared with.
    pub fn counts(&self) -> [(&'static str, u64); 4] {
        let Counts { copied, dropped, too_long, skipped } = &self.counts;
        [("copied", copied), ("dropped", dropped), ("too_long", too_long), ("skipped", skipped)]
            .map(|(name, count)| (name, count.load(Relaxed)))
    }

    /// All of it, for people.
    pub fn describe(&self) -> Value {
        let mut told = self.ledger().describe();
        for (name, count) in self.counts() {
            told[name] = count.into();
        }
        told["waiting"] = self.pending.load(Relaxed).into();
        told
    }
}

/// A copy's place among those that wait.
pub struct Waiting(Arc<Shadow>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Relaxed);
    }
}

/// What was taken of a body while it went by.
pub struct Taken {
    data: BytesMut,
    /// What it holds of what all may hold.
    size: i64,
    most: usize,
    /// Whether it was more than that.
    over: bool,
    /// Whether all together had too much already.
    starved: bool,
    /// Whether that was all.
    ended: bool,
    /// What all of them hold.
    held: Arc<AtomicI64>,
}

impl Taken {
    /// Takes no more than so many bytes, of those that all copies may have together.
    pub fn new(most: usize, held: Arc<AtomicI64>) -> Self {
        Self { data: BytesMut::new(), size: 0, most, over: false, starved: false, ended: false, held }
    }

    /// Takes what goes by.
    pub fn take(&mut self, data: &[u8]) {
        if self.over || self.starved || data.is_empty() {
            return;
        }
        let more = i64::try_from(data.len()).unwrap_or(i64::MAX);
        if self.data.len() + data.len() > self.most {
            self.over = true;
        } else if self.held.fetch_add(more, Relaxed) + more > MEMORY {
            self.held.fetch_sub(more, Relaxed);
            self.starved = true;
        } else {
            self.data.extend_from_slice(data);
            self.size += more;
            return;
        }
        self.release();
    }

    /// That was all.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// All of it, once. What it holds is given back when this is dropped.
    pub fn whole(&mut self) -> Body {
        match (self.starved || !(self.ended || self.over), self.over) {
            (true, _) => Body::Unknown,
            (_, true) => Body::TooLong,
            _ => Body::Whole(self.data.split().freeze()),
        }
    }

    /// Whether no more of it is wanted.
    pub fn is_full(&self) -> bool {
        self.over || self.starved
    }

    fn release(&mut self) {
        self.held.fetch_sub(std::mem::take(&mut self.size), Relaxed);
        self.data = BytesMut::new();
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.release();
    }
}
