//! What is kept of upstreams' answers (RFC 9111), in memory, and in a Redis that gateways share.
//!
//! All workers share one [`Cache`]. What lies in it is used only through [`Cache::get`], which knows what was
//! invalidated; what comes in, only through [`Cache::put`], which knows what was invalidated while it was on its way. The rules
//! themselves are pure and lie in `policy`, `directives`, `vary` and `range`.

pub mod directives;
pub mod fill;
pub mod flight;
pub mod key;
pub mod lying;
pub mod marks;
pub mod policy;
pub mod range;
pub mod shared;
pub mod stored;
pub mod vary;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter, sync};

use self::{
    flight::Flight,
    marks::{Marks, Position, Purge},
    shared::Shared,
    stored::{Resource, Stored},
};
use crate::config::cache::CacheConfig;

/// Flights are kept in so many tables.
const SHARDS: usize = 16;
/// Resources that are known not to be kept.
const PASSING: usize = 64 * 1024;
/// For how long that is believed, in milliseconds.
const PASS: u64 = 60_000;
/// For how long an upstream's failure is remembered, in milliseconds.
const FAIL: u64 = 1_000;
/// Memory for answers on their way, as a share of the whole.
const FILLING: u64 = 4;

/// What is kept.
pub struct Cache {
    memory: sync::Cache<Box<[u8]>, Arc<Resource>, BySize>,
    /// Resources whose last answer was not kept, with the moment until which nobody waits for another's.
    passing: sync::Cache<u64, u64>,
    flights: Vec<Mutex<Flights>>,
    /// One answer is put after the other, where they share a lock.
    puts: Vec<Mutex<()>>,
    /// What was invalidated.
    pub marks: Arc<Marks>,
    /// The largest answer.
    pub max_object: usize,
    /// Bytes of answers on their way, and how many those may be.
    filling: AtomicU64,
    max_filling: u64,
    /// The tier that gateways share.
    shared: OnceLock<Shared>,
    /// Its URL, and how long a request may wait for it.
    redis: Option<(String, Duration)>,
    /// The largest resource.
    room: usize,
    /// Resources whose upstream failed of late, with the moment until which what is kept does without a look.
    failing: sync::Cache<u64, u64>,
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("resources", &self.memory.len()).finish_non_exhaustive()
    }
}

/// Requests that others may wait for, by key.
type Flights = HashMap<Box<[u8]>, Arc<Flight>>;

#[derive(Clone)]
struct BySize;

impl Weighter<Box<[u8]>, Arc<Resource>> for BySize {
    fn weight(&self, _: &Box<[u8]>, resource: &Arc<Resource>) -> u64 {
        resource.size as u64
    }
}

impl Cache {
    /// An empty one. What was invalidated `before` stays so.
    pub fn new(config: &CacheConfig, workers: usize, before: Option<&Self>) -> Arc<Self> {
        let memory = config.memory.0;
        let marks = before.map(|before| before.marks.clone()).unwrap_or_default();
        let max_object = config.max_object.0.min(memory / 8).max(1);
        // Each part has room for several of the largest.
        let most = usize::try_from(memory / (2 * max_object)).unwrap_or(1);
        let parts = 1 << (workers * 4).min(most).max(1).ilog2();
        let items = usize::try_from(memory / 8192).unwrap_or(usize::MAX).max(1024);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(items)
            .weight_capacity(memory)
            .shards(parts)
            .build()
            .unwrap_or_else(|_| unreachable!("both capacities are given"));
        let memory_of = sync::Cache::with_options(
            options,
            BySize,
            DefaultHashBuilder::default(),
            sync::DefaultLifecycle::default(),
        );
        Arc::new(Self {
            memory: memory_of,
            passing: sync::Cache::new(PASSING),
            flights: (0..SHARDS).map(|_| Mutex::default()).collect(),
            puts: (0..SHARDS).map(|_| Mutex::default()).collect(),
            max_object: usize::try_from(max_object).unwrap_or(usize::MAX),
            room: usize::try_from(memory / parts as u64 / 10 * 9).unwrap_or(usize::MAX),
            failing: sync::Cache::new(PASSING),
            filling: AtomicU64::new(0),
            max_filling: memory / FILLING,
            shared: OnceLock::new(),
            redis: config.redis.as_ref().map(|url| (url.clone(), config.redis_timeout.0)),
            marks,
        })
    }

    /// It is what runs: begins to share what it keeps.
    pub fn take_effect(self: &Arc<Self>) {
        if let Some((url, budget)) = &self.redis {
            self.shared.get_or_init(|| Shared::start(url, *budget, self.marks.clone(), Arc::downgrade(self)));
        }
    }

    /// The tier that gateways share.
    pub fn shared(&self) -> Option<&Shared> {
        self.shared.get()
    }

    /// Forgets all: another runs in its place.
    pub fn clear(&self) {
        self.memory.clear();
    }

    /// Now, for an answer that is about to be asked for.
    pub fn position(&self) -> Position {
        Position { local: self.marks.now(), shared: self.shared().map_or(0, Shared::position) }
    }

    /// What is kept for a key, if none of it was invalidated since.
    pub fn get(&self, key: &[u8]) -> Option<Arc<Resource>> {
        let resource = self.memory.get(key)?;
        let slot = marks::slot_of(key);
        if resource.variants.iter().all(|stored| self.marks.is_good(slot, stored.born.local)) {
            return Some(resource);
        }
        let rest = resource.only(|stored| self.marks.is_good(slot, stored.born.local), key.len());
        // What others put there meanwhile stays.
        let _put = self.lock_put(key);
        if self.memory.peek(key).is_some_and(|now| Arc::ptr_eq(&now, &resource)) {
            if rest.variants.is_empty() {
                self.memory.remove(key);
                return None;
            }
            let rest = Arc::new(rest);
            self.memory.insert(key.into(), rest.clone());
            // A purge may have come and gone between the look and the insertion.
            if !self.admits_all(key, &rest) {
                self.memory.remove(key);
                return None;
            }
            return Some(rest);
        }
        (!rest.variants.is_empty()).then(|| Arc::new(rest))
    }

    /// Keeps an answer, unless it was invalidated on its way; whether it is kept.
    pub fn put(&self, key: &[u8], stored: &Arc<Stored>) -> bool {
        let _put = self.lock_put(key);
        if !self.marks.admits(key, &stored.tags, stored.born.local) {
            return false;
        }
        let known = self.memory.peek(key);
        // One that came later is newer, however long this one took to come in.
        let same = |other: &&Arc<Stored>| other.selection == stored.selection && other.came > stored.came;
        let slot = marks::slot_of(key);
        if known.as_ref().is_some_and(|known| {
            known.variants.iter().find(same).is_some_and(|newer| self.marks.is_good(slot, newer.born.local))
        }) {
            return false;
        }
        let good = |stored: &Stored| self.marks.is_good(slot, stored.born.local);
        let known = known.map(|known| known.only(good, key.len())).unwrap_or_default();
        let resource = known.with(stored, key.len(), self.room);
        if resource.variants.is_empty() {
            return false;
        }
        let resource = Arc::new(resource);
        self.memory.insert(key.into(), resource.clone());
        // A purge may have come and gone between the look and the insertion.
        if self.admits_all(key, &resource) {
            return true;
        }
        self.memory.remove(key);
        false
    }

    fn admits_all(&self, key: &[u8], resource: &Resource) -> bool {
        resource.variants.iter().all(|stored| self.marks.admits(key, &stored.tags, stored.born.local))
    }

    /// Forgets an answer; the resource's others stay.
    pub fn forget(&self, key: &[u8], stored: &Arc<Stored>) {
        let _put = self.lock_put(key);
        let Some(known) = self.memory.peek(key) else { return };
        let rest = known.only(|other| other.selection != stored.selection, key.len());
        if rest.variants.is_empty() {
            self.memory.remove(key);
        } else if rest.variants.len() < known.variants.len() {
            self.memory.insert(key.into(), Arc::new(rest));
        }
    }

    fn shard(key: &[u8]) -> usize {
        usize::try_from(twox_hash::XxHash3_64::oneshot(key) % SHARDS as u64).unwrap_or(0)
    }

    fn lock_put(&self, key: &[u8]) -> std::sync::MutexGuard<'_, ()> {
        self.puts[Self::shard(key)].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing that was kept of a URL is used any more, however it came: after a write (RFC 9111 §4.4).
    pub fn invalidate(&self, host: &[u8], target: &[u8]) {
        let slot = marks::slot(host, target);
        let moment = self.marks.mark(slot);
        if let Some(shared) = self.shared() {
            shared.tell_mark(slot, moment);
        }
    }

    /// Purges here, in one walk; how many resources had any of it.
    fn purge_here(&self, purges: &[Purge]) -> usize {
        let means = |key: &[u8], stored: &Stored| purges.iter().any(|purge| purge.means(key, &stored.tags));
        let gone = Cell::new(0);
        let changed = RefCell::new(Vec::new());
        self.memory.retain(|key, resource| {
            let meant = resource.variants.iter().filter(|stored| means(key, stored)).count();
            if meant == 0 {
                return true;
            }
            gone.set(gone.get() + 1);
            if meant < resource.variants.len() {
                changed.borrow_mut().push((key.clone(), resource.clone()));
            }
            false
        });
        // A tag may mean one answer of a resource and not another.
        for (key, resource) in changed.into_inner() {
            let rest = resource.variants.iter().rev().filter(|stored| !means(&key, stored));
            for stored in rest {
                self.put(&key, stored);
            }
        }
        gone.get()
    }

    /// Purges, here at once and on every other gateway as soon as the log has it: how many resources here, and whether the others
    /// were told.
    pub async fn purge(&self, purge: Purge) -> (usize, Option<bool>) {
        let moment = self.marks.purge(purge.clone(), marks::UNKNOWN);
        let gone = self.purge_here(std::slice::from_ref(&purge));
        let told = match self.shared() {
            Some(shared) => Some(shared.tell_purge(purge, moment).await),
            None => None,
        };
        (gone, told)
    }

    /// Resources, and the bytes that they take.
    pub fn occupancy(&self) -> (usize, u64) {
        (self.memory.len(), self.memory.weight())
    }

    /// Notes that a resource's answers are not kept, so that nobody waits for another's.
    pub fn pass(&self, key: &[u8], now: u64) {
        self.passing.insert(twox_hash::XxHash3_64::oneshot(key), now + PASS);
    }

    /// Notes that a resource's upstream fails.
    pub fn fail(&self, key: &[u8], now: u64) {
        let hash = twox_hash::XxHash3_64::oneshot(key);
        self.failing.insert(hash, now + FAIL);
        // Nor does anybody wait for another's failure.
        if !self.is_passing(key, now) {
            self.passing.insert(hash, now + FAIL);
        }
    }

    /// Whether it did of late, so that an older answer does without a look. Once in a while one is to look all the same, for
    /// whom it has not: the others have the older answer meanwhile, for `limit` at most.
    pub fn is_failing(&self, key: &[u8], now: u64, limit: Duration) -> bool {
        let hash = twox_hash::XxHash3_64::oneshot(key);
        let Some(until) = self.failing.get(&hash) else { return false };
        if now < until {
            return true;
        }
        self.failing.insert(hash, now + u64::try_from(limit.as_millis()).unwrap_or(u64::MAX / 2));
        false
    }

    /// Notes that it answers.
    pub fn recover(&self, key: &[u8]) {
        self.failing.remove(&twox_hash::XxHash3_64::oneshot(key));
    }

    /// Notes that they are, after all.
    pub fn collapse(&self, key: &[u8]) {
        let hash = twox_hash::XxHash3_64::oneshot(key);
        self.passing.remove(&hash);
    }

    /// Whether a resource's answers were not kept of late.
    pub fn is_passing(&self, key: &[u8], now: u64) -> bool {
        self.passing.get(&twox_hash::XxHash3_64::oneshot(key)).is_some_and(|until| now < until)
    }

    /// Joins whoever asks for this already, or is the first.
    pub fn join(self: &Arc<Self>, key: &[u8]) -> flight::Place {
        let mut flights = self.flights[Self::shard(key)].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(key) {
            // One that began before what was asked for changed is joined no more.
            if self.marks.is_calm(key, flight.born()) {
                return flight::Place::Behind(flight.clone());
            }
        }
        let flight = Flight::new(self.marks.now());
        flights.insert(key.into(), flight.clone());
        flight::Place::First(flight::Lead::new(self.clone(), key.into(), flight))
    }

    /// Nobody joins a flight any more. Another may have begun under the same key.
    fn land(&self, key: &[u8], flight: &Arc<Flight>) {
        let mut flights = self.flights[Self::shard(key)].lock().unwrap_or_else(PoisonError::into_inner);
        if flights.get(key).is_some_and(|known| Arc::ptr_eq(known, flight)) {
            flights.remove(key);
        }
    }

    /// Takes memory for an answer on its way, if there is some.
    pub fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reserved> {
        let before = self.filling.fetch_add(bytes as u64, Relaxed);
        let reserved = Reserved { cache: self.clone(), bytes: bytes as u64 };
        (before + bytes as u64 <= self.max_filling).then_some(reserved)
    }
}

/// Memory of an answer on its way.
#[derive(Debug)]
pub struct Reserved {
    cache: Arc<Cache>,
    bytes: u64,
}

impl Reserved {
    /// Takes more, if there is some.
    pub fn grow(&mut self, bytes: usize) -> bool {
        self.bytes += bytes as u64;
        let before = self.cache.filling.fetch_add(bytes as u64, Relaxed);
        before + bytes as u64 <= self.cache.max_filling
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.cache.filling.fetch_sub(self.bytes, Relaxed);
    }
}
