//! The generic cell rate algorithm (ITU-T I.371), over a table that a flood of keys cannot make grow.
//!
//! Of each key one number is kept, the moment at which its debt is paid. The table, one for all
//! limits, is an array of sets of eight; where a set is full, the key whose debt is paid first gives
//! way. So a flood of keys costs the table nothing, and others at most what they had used up already.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// Keys of a set.
const WAYS: usize = 8;
/// Sets: half a million keys in 9 MiB, once there is a limit at all.
const SETS: usize = 64 * 1024;
/// Nanoseconds of a second.
const SECOND: u64 = 1_000_000_000;

/// A rate, and what may come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Nanoseconds that a request costs.
    pub cost: u64,
    /// Requests at once.
    pub burst: u64,
}

impl Quota {
    /// So many in so many seconds.
    pub fn new(count: u32, seconds: u32, burst: u32) -> Self {
        let cost = (u64::from(seconds) * SECOND / u64::from(count.max(1))).max(1);
        // What would take centuries to come back is as good as what takes one.
        Self { cost, burst: u64::from(burst.max(1)).min(u64::MAX / 4 / cost) }
    }
}

/// What a key has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether this one is let through.
    pub allowed: bool,
    /// How many more would be.
    pub remaining: u64,
    /// Seconds until the next would be let through where none would be now; else until all of them would be. Rounded up.
    pub reset: u64,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    key: u64,
    /// When the debt is paid, in nanoseconds.
    paid: u64,
}

/// The keys of all limits.
pub struct Table {
    sets: Box<[Mutex<[Slot; WAYS]>]>,
    hasher: RandomState,
    limits: AtomicU64,
}

impl Default for Table {
    fn default() -> Self {
        let sets = (0..SETS).map(|_| Mutex::default()).collect();
        Self { sets, hasher: RandomState::new(), limits: AtomicU64::new(0) }
    }
}

/// One limit.
pub struct Limiter {
    quota: Quota,
    /// Tells its keys from those of others.
    id: u64,
    table: Arc<Table>,
}

impl std::fmt::Debug for Limiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limiter").field("quota", &self.quota).finish_non_exhaustive()
    }
}

impl Limiter {
    /// Nobody has used anything yet.
    pub fn new(quota: Quota, table: &Arc<Table>) -> Self {
        Self { quota, id: table.limits.fetch_add(1, Relaxed), table: table.clone() }
    }

    /// What it allows.
    pub fn quota(&self) -> Quota {
        self.quota
    }

    /// Lets one through, or not. `now` is in nanoseconds.
    pub fn check(&self, key: &(impl Hash + ?Sized), now: u64) -> Decision {
        let hash = self.table.hasher.hash_one((self.id, key));
        // The least is kept for empty slots.
        let (key, set) = (hash | 1, usize::try_from(hash >> 32).unwrap_or(0) % self.table.sets.len());
        let mut slots = self.table.sets[set].lock().unwrap_or_else(PoisonError::into_inner);
        let found = slots.iter().position(|slot| slot.key == key);
        let paid = found.map_or(0, |found| slots[found].paid).max(now);
        let Quota { cost, burst } = self.quota;
        let whole = cost * burst;
        let after = paid + cost;
        let allowed = after - now <= whole;
        if allowed {
            let place = found.or_else(|| (0..WAYS).min_by_key(|place| slots[*place].paid));
            if let Some(place) = place {
                slots[place] = Slot { key, paid: after };
            }
        }
        drop(slots);
        let debt = if allowed { after - now } else { paid - now };
        let remaining = (whole - debt.min(whole)) / cost;
        let wait = if remaining == 0 { (debt + cost).saturating_sub(whole) } else { debt };
        Decision { allowed, remaining, reset: wait.div_ceil(SECOND).max(1) }
    }
}
