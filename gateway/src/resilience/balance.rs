//! Which endpoint gets a request.
//!
//! What its checks call out, or what was ejected, gets none; what this request has tried already gets
//! it only where there is no other: then an ejected one comes before it. Where more than half would be out by ejection, the
//! ejections are not believed (Envoy's panic threshold): then it is not the endpoints that fail.

use super::vitals::{Outlier, Vitals};
pub use crate::config::upstream::Balance;

/// What a choice hangs on.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// How it is chosen.
    pub balance: Balance,
    /// How long an endpoint warms up, in milliseconds.
    pub slow_start: u64,
    /// The time.
    pub now: u64,
    /// Anything.
    pub random: u64,
    /// The next number, one after the other.
    pub turn: usize,
    /// What is kept together.
    pub hash: u64,
    /// Endpoints that this request has tried.
    pub tried: &'a [u64],
    /// Whether an endpoint that is out is better than none.
    pub last_resort: bool,
    /// Whether endpoints are ejected at all.
    pub ejects: bool,
}

/// An endpoint, as far as it matters here.
pub trait Candidate {
    /// Its own number, among all that ever were.
    fn id(&self) -> u64;
    /// How it does.
    fn vitals(&self) -> &Vitals;
    /// Of its address, the same in every gateway.
    fn hash(&self) -> u64;
}

impl Choice<'_> {
    /// The endpoint; none where all are out.
    pub fn pick<T: Candidate>(&self, all: &[T]) -> Option<usize> {
        let up = |index: usize| all[index].vitals().is_up();
        let ups = (0..all.len()).filter(|index| up(*index)).count();
        let out = |index: usize| self.ejects && all[index].vitals().is_ejected(self.now);
        let ejected = (0..all.len()).filter(|index| up(*index) && out(*index)).count();
        let panics = ejected * 2 > ups;
        let untried = |index: usize| !self.tried.contains(&all[index].id());
        let good = |index: usize| up(index) && (panics || !out(index));
        self.among(all, &|index| good(index) && untried(index))
            // One that failed a while ago is a better guess than one that has just failed this request.
            .or_else(
                || if self.tried.is_empty() { None } else { self.among(all, &|index| up(index) && untried(index)) },
            )
            .or_else(|| self.among(all, &good))
            .or_else(|| if self.last_resort { self.among(all, &|_| true) } else { None })
    }

    fn among<T: Candidate>(&self, all: &[T], takes_part: &dyn Fn(usize) -> bool) -> Option<usize> {
        let count = (0..all.len()).filter(|index| takes_part(*index)).count();
        let nth = |n: usize| (0..all.len()).filter(|index| takes_part(*index)).nth(n);
        if count < 2 {
            return nth(0);
        }
        let below = |random: u64, count: usize| {
            // Of 32 bits: as good as even.
            usize::try_from(((random & 0xFFFF_FFFF) * count as u64) >> 32).unwrap_or(0)
        };
        match self.balance {
            Balance::P2c => {
                let first = below(self.random, count);
                let second = below(self.random >> 32, count - 1);
                let (a, b) = (nth(first)?, nth(if second >= first { second + 1 } else { second })?);
                let load = |index: usize, other: usize| {
                    all[index].vitals().load(self.now, self.slow_start, all[other].vitals())
                };
                Some(if load(b, a) < load(a, b) { b } else { a })
            }
            Balance::RoundRobin => {
                let chosen = nth(self.turn % count)?;
                // One that warms up passes on what is beyond its share.
                let weight = all[chosen].vitals().weight(self.now, self.slow_start);
                if self.random % 1_000 < weight { Some(chosen) } else { nth((self.turn + 1) % count) }
            }
            // The highest of all hashes (rendezvous hashing): who leaves moves only what was its own.
            Balance::RingHash => (0..all.len()).filter(|index| takes_part(*index)).max_by_key(|index| {
                let mixed = (all[*index].hash() ^ self.hash).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                let mixed = (mixed ^ (mixed >> 32)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                mixed ^ (mixed >> 29)
            }),
        }
    }
}

/// Whether one more may be left out: a share of all, and one always.
pub fn may_eject<T: Candidate>(all: &[T], now: u64, outlier: &Outlier) -> bool {
    let out = all.iter().filter(|endpoint| endpoint.vitals().is_ejected(now)).count() as u64;
    let most = (all.len() as u64 * outlier.max_ejected / 10_000).max(1);
    all.len() > 1 && out < most
}
