//! The generic cell rate algorithm (ITU-T I.371), over a table that a flood of keys cannot make grow.
//!
//! Of each key one number is kept, the moment at which its debt is paid. The table is an
//! array of sets of eight; where a set is full, the key whose debt is paid first gives way. So
//! a flood of keys costs the table nothing, and others at most what they had used up already.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    sync::{Mutex, PoisonError},
};

/// Keys of a set.
const WAYS: usize = 8;
/// Sets: 131,072 keys in 2 MiB.
const SETS: usize = 16 * 1024;

/// A rate, and what may come at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Microseconds that a request costs.
    pub cost: u64,
    /// Requests at once.
    pub burst: u64,
}

impl Quota {
    /// So many in so many seconds.
    pub fn new(count: u32, seconds: u32, burst: u32) -> Self {
        Self {
            cost: (u64::from(seconds) * 1_000_000).div_ceil(u64::from(count.max(1))).max(1),
            burst: u64::from(burst.max(1)),
        }
    }

    /// Seconds until a burst is there again after a whole one.
    pub fn window(&self) -> u64 {
        (self.cost * self.burst).div_ceil(1_000_000).max(1)
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
    /// When the debt is paid, in microseconds.
    paid: u64,
}

/// The keys of one limit.
pub struct Limiter {
    quota: Quota,
    sets: Box<[Mutex<[Slot; WAYS]>]>,
    hasher: RandomState,
}

impl std::fmt::Debug for Limiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limiter").field("quota", &self.quota).finish_non_exhaustive()
    }
}

impl Limiter {
    /// Nobody has used anything yet.
    pub fn new(quota: Quota, keyed: bool) -> Self {
        let sets = if keyed { SETS } else { 1 };
        Self { quota, sets: (0..sets).map(|_| Mutex::default()).collect(), hasher: RandomState::new() }
    }

    /// What it allows.
    pub fn quota(&self) -> Quota {
        self.quota
    }

    /// Lets one through, or not. `now` is in microseconds.
    pub fn check(&self, key: &(impl Hash + ?Sized), now: u64) -> Decision {
        let hash = self.hasher.hash_one(key);
        // The least is kept for empty slots.
        let (key, set) = (hash | 1, usize::try_from(hash >> 32).unwrap_or(0) % self.sets.len());
        let mut slots = self.sets[set].lock().unwrap_or_else(PoisonError::into_inner);
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
        Decision { allowed, remaining, reset: wait.div_ceil(1_000_000).max(1) }
    }
}
