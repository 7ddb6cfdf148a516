//! What a service was seen not to have, although the monolith has it: there the detour is skipped for a while.
//!
//! A path counts by its template, so that one answer about `/orders/17` says something about `/orders/18`.
//! It is believed only after several such answers in a row without one that says
//! otherwise, for a bounded time, and any write to the route makes it forgotten.

use std::{
    collections::HashMap,
    hash::{BuildHasher, Hash as _, Hasher as _, RandomState},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

/// Answers in a row before it is believed.
const ENOUGH: u32 = 3;
/// For how long, in milliseconds.
const BELIEVED: u64 = 60_000;
/// Templates of one route, at most.
const MOST: usize = 1024;
/// A segment of this length or more is one of many.
const LONG: usize = 32;

#[derive(Clone, Copy, Debug)]
struct Absence {
    seen: u32,
    until: u64,
}

/// What one route's service does not have.
#[derive(Debug, Default)]
pub struct Learned {
    /// How many there are: nearly always none, and then nothing is looked up.
    count: AtomicUsize,
    absent: Mutex<HashMap<u64, Absence>>,
    hasher: RandomState,
    /// Which segments of the route's pattern are open.
    open: Vec<bool>,
}

impl Learned {
    /// Nothing yet, below a pattern like `/orders/{id}/**`.
    pub fn new(pattern: &str) -> Self {
        Self { open: pattern.split('/').map(|segment| segment.starts_with('{')).collect(), ..Self::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Absence>> {
        self.absent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template of a method and path: what the route's own pattern leaves open, segments with a digit, and long ones are one
    /// of many.
    fn key(&self, method: &str, path: &str) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        method.hash(&mut hasher);
        for (n, segment) in path.split('/').enumerate() {
            let many = self.open.get(n).is_some_and(|open| *open)
                || segment.len() >= LONG
                || segment.bytes().any(|byte| byte.is_ascii_digit());
            if many { "{}" } else { segment }.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// Whether the service is known not to have it.
    pub fn is_absent(&self, method: &str, path: &str, now: u64) -> bool {
        if self.count.load(Relaxed) == 0 {
            return false;
        }
        let key = self.key(method, path);
        self.lock().get(&key).is_some_and(|absence| absence.seen >= ENOUGH && now < absence.until)
    }

    /// The service did not have it, and the monolith did.
    pub fn missed(&self, method: &str, path: &str, now: u64) {
        let key = self.key(method, path);
        let mut absent = self.lock();
        if absent.len() >= MOST && !absent.contains_key(&key) {
            absent.retain(|_, absence| now < absence.until);
            if absent.len() >= MOST {
                return;
            }
        }
        let absence = absent.entry(key).or_insert(Absence { seen: 0, until: 0 });
        if absence.seen >= ENOUGH && now >= absence.until {
            // It was believed for long enough: one look was due, and it said the same.
            absence.seen = ENOUGH - 1;
        }
        *absence = Absence { seen: absence.seen.saturating_add(1), until: now + BELIEVED };
        self.count.store(absent.len(), Relaxed);
    }

    /// The service has it.
    pub fn found(&self, method: &str, path: &str) {
        if self.count.load(Relaxed) == 0 {
            return;
        }
        let key = self.key(method, path);
        let mut absent = self.lock();
        absent.remove(&key);
        self.count.store(absent.len(), Relaxed);
    }

    /// Something was written: what was not there may be there now.
    pub fn forget(&self) {
        if self.count.load(Relaxed) != 0 {
            self.lock().clear();
            self.count.store(0, Relaxed);
        }
    }
}
