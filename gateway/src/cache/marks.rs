//! What was invalidated, and when: an answer that was asked for before is never used after.
//!
//! A write to a URL leaves a mark in a table of fixed size, in a slot that several URLs may share: then an answer
//! is asked for once more, never used once too often. A purge removes what is there, and is remembered as a rule for what is still on
//! its way. Times are counters: `local`, this process's own, for what lies in its memory; `shared`, the position in the log that all
//! gateways on one Redis read, for what lies there.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
};

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::key::{self, Parts};

/// Slots of the table.
const SLOTS: usize = 1 << 16;
/// Rules that are remembered.
const RULES: usize = 1_000;
/// Not known yet, and so later than everything.
pub const UNKNOWN: u64 = u64::MAX;

/// A moment on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Of this process.
    pub local: u64,
    /// Of the log.
    pub shared: u64,
}

/// What is to be used no more.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Purge {
    /// A URL, with its query. An empty host is every host.
    Url(String, String),
    /// All URLs of a path that begin so.
    Prefix(String, String),
    /// All answers of a route.
    Route(String),
    /// All answers with a tag.
    Tag(String),
    /// All.
    All,
}

impl Purge {
    /// Whether an answer is meant.
    pub fn means(&self, key: &[u8], tags: &[Box<str>]) -> bool {
        let Parts { host, target, route } = key::parts(key);
        // Without a port any is meant.
        let at = |wanted: &String| {
            let wanted = wanted.as_bytes();
            let host = if without_port(wanted).len() == wanted.len() { without_port(host) } else { host };
            wanted.is_empty() || wanted.eq_ignore_ascii_case(host)
        };
        match self {
            Self::Url(host, wanted) => at(host) && wanted.as_bytes() == target,
            Self::Prefix(host, wanted) => at(host) && target.starts_with(wanted.as_bytes()),
            Self::Route(wanted) => wanted.as_bytes() == route,
            Self::Tag(wanted) => tags.iter().any(|tag| **tag == **wanted),
            Self::All => true,
        }
    }
}

/// What was invalidated.
pub struct Marks {
    local: AtomicU64,
    slots: Box<[Slot]>,
    rules: Mutex<Rules>,
    /// The newest rule, on the local clock.
    newest: AtomicU64,
}

#[derive(Default)]
struct Slot {
    /// The last write, on the local clock.
    local: AtomicU64,
    /// The last that the log told of.
    shared: AtomicU64,
    /// Our own last, on the local clock, while the log has not told of it.
    pending: AtomicU64,
}

#[derive(Default)]
struct Rules {
    all: VecDeque<(Position, Purge)>,
    /// Nothing older is used, since nobody remembers what was purged then.
    floor: Position,
    /// The newest of our own purges that was forgotten before the log told of it: until it does, nothing in Redis is used.
    blind: u64,
}

impl std::fmt::Debug for Marks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Marks").field("local", &self.local).finish_non_exhaustive()
    }
}

impl Default for Marks {
    fn default() -> Self {
        let slots = (0..SLOTS).map(|_| Slot::default()).collect();
        Self { local: AtomicU64::new(1), slots, rules: Mutex::default(), newest: AtomicU64::new(0) }
    }
}

/// The slot of a URL, the same in every process.
pub fn slot(host: &[u8], target: &[u8]) -> u32 {
    slot_of_lower(&host.to_ascii_lowercase(), target)
}

/// Ports tell no URLs apart: one that is left out is the same as one that is said.
fn slot_of_lower(host: &[u8], target: &[u8]) -> u32 {
    let seed = XxHash3_64::oneshot(without_port(host));
    u32::try_from(XxHash3_64::oneshot_with_seed(seed, target) % SLOTS as u64).unwrap_or(0)
}

/// The slot of a key's URL.
pub fn slot_of(key: &[u8]) -> u32 {
    let Parts { host, target, .. } = key::parts(key);
    slot_of_lower(host, target)
}

/// A host's name alone.
pub fn without_port(host: &[u8]) -> &[u8] {
    match host.iter().rposition(|byte| *byte == b':') {
        // In `[::1]` the last colon belongs to the address.
        Some(colon) if !host[colon..].contains(&b']') => &host[..colon],
        _ => host,
    }
}

impl Marks {
    /// Now, on the local clock.
    pub fn now(&self) -> u64 {
        self.local.load(SeqCst)
    }

    /// Marks a URL's slot; the moment. On the log it is later than everything until [`Marks::logged`] says when it was.
    pub fn mark(&self, slot: u32) -> u64 {
        let now = self.local.fetch_add(1, SeqCst) + 1;
        let slot = &self.slots[slot as usize % SLOTS];
        slot.pending.fetch_max(now, SeqCst);
        slot.local.fetch_max(now, SeqCst);
        now
    }

    /// A mark that came by the log; `own` is the local moment where it was this process's.
    pub fn logged(&self, slot: u32, at: u64, own: Option<u64>) {
        let slot = &self.slots[slot as usize % SLOTS];
        slot.shared.fetch_max(at, SeqCst);
        if let Some(moment) = own {
            // Unless a later one of our own is still on its way.
            let _ = slot.pending.compare_exchange(moment, 0, SeqCst, SeqCst);
        } else {
            let now = self.local.fetch_add(1, SeqCst) + 1;
            slot.local.fetch_max(now, SeqCst);
        }
    }

    /// Notes a purge; the moment.
    pub fn purge(&self, purge: Purge, shared: u64) -> u64 {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.local.fetch_add(1, SeqCst) + 1;
        rules.all.push_back((Position { local: now, shared }, purge));
        if rules.all.len() > RULES
            && let Some((old, _)) = rules.all.pop_front()
        {
            rules.floor.local = old.local;
            if old.shared == UNKNOWN {
                rules.blind = old.local;
            } else {
                rules.floor.shared = rules.floor.shared.max(old.shared);
            }
        }
        self.newest.store(now, SeqCst);
        now
    }

    /// A purge of this process's has come back by the log.
    pub fn purge_logged(&self, own: u64, at: u64) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        // What came before it is older than it, whether that was told or given up.
        if rules.blind != 0 && rules.blind <= own {
            rules.blind = 0;
            rules.floor.shared = rules.floor.shared.max(at);
        }
        let all = rules.all.iter().any(|(position, purge)| position.local == own && *purge == Purge::All);
        for (position, _) in &mut rules.all {
            if position.shared == UNKNOWN && (position.local == own || (all && position.local < own)) {
                position.shared = at;
            }
        }
        drop(rules);
        if all {
            for slot in &self.slots {
                let pending = slot.pending.load(SeqCst);
                if pending != 0 && pending <= own {
                    slot.shared.fetch_max(at, SeqCst);
                    let _ = slot.pending.compare_exchange(pending, 0, SeqCst, SeqCst);
                }
            }
        }
    }

    /// Nothing in Redis that is older than this can be trusted: the log begins here.
    pub fn set_floor(&self, shared: u64) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.floor.shared = rules.floor.shared.max(shared);
    }

    /// Whether what lies in memory, and passed [`Marks::admits`] when it came there, may still be used.
    pub fn is_good(&self, slot: u32, born: u64) -> bool {
        self.slots[slot as usize % SLOTS].local.load(SeqCst) <= born
    }

    /// Whether nothing that may mean a key was invalidated since a moment, whatever tags its answer has.
    pub fn is_calm(&self, key: &[u8], since: u64) -> bool {
        self.newest.load(SeqCst) <= since && self.is_good(slot_of(key), since)
    }

    /// Whether an answer that was asked for at a moment may come into memory now.
    pub fn admits(&self, key: &[u8], tags: &[Box<str>], born: u64) -> bool {
        if !self.is_good(slot_of(key), born) {
            return false;
        }
        if self.newest.load(SeqCst) <= born {
            return true;
        }
        let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.floor.local <= born
            && !rules.all.iter().any(|(position, purge)| position.local > born && purge.means(key, tags))
    }

    /// Whether an answer that lies in Redis may be used.
    pub fn admits_shared(&self, key: &[u8], tags: &[Box<str>], born: u64) -> bool {
        let slot = &self.slots[slot_of(key) as usize % SLOTS];
        if slot.pending.load(SeqCst) != 0 || slot.shared.load(SeqCst) > born {
            return false;
        }
        let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.floor.shared <= born
            && rules.blind == 0
            && !rules.all.iter().any(|(position, purge)| position.shared > born && purge.means(key, tags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::key::Builder;

    fn key(target: &str) -> Vec<u8> {
        Builder::new(b"Shop.example", target.as_bytes()).part(b"orders").finish()
    }

    #[test]
    fn what_was_asked_for_before_a_write_is_not_used_after() {
        let marks = Marks::default();
        let (a, b) = (key("/a"), key("/b"));
        let before = marks.now();
        assert!(marks.admits(&a, &[], before));
        marks.mark(slot(b"SHOP.example", b"/a"));
        assert!(!marks.admits(&a, &[], before) && !marks.is_good(slot_of(&a), before));
        assert!(marks.admits(&b, &[], before));
        assert!(marks.admits(&a, &[], marks.now()));
    }

    #[test]
    fn purges_hold_for_what_is_on_its_way() {
        let tags: Vec<Box<str>> = vec!["p1".into()];
        for (purge, meant) in [
            (Purge::Url("shop.example".into(), "/a?x=1".into()), true),
            (Purge::Url(String::new(), "/a?x=1".into()), true),
            (Purge::Url("other.example".into(), "/a?x=1".into()), false),
            (Purge::Url(String::new(), "/a".into()), false),
            (Purge::Prefix(String::new(), "/a".into()), true),
            (Purge::Prefix(String::new(), "/b".into()), false),
            (Purge::Route("orders".into()), true),
            (Purge::Route("order".into()), false),
            (Purge::Tag("p1".into()), true),
            (Purge::Tag("p".into()), false),
            (Purge::All, true),
        ] {
            let marks = Marks::default();
            let before = marks.now();
            marks.purge(purge.clone(), UNKNOWN);
            let key = key("/a?x=1");
            assert_eq!(marks.admits(&key, &tags, before), !meant, "{purge:?}");
            assert_eq!(marks.admits_shared(&key, &tags, 7), !meant, "{purge:?}");
            assert!(marks.admits(&key, &tags, marks.now()), "{purge:?}");
        }
    }

    /// Until the log has said when our own write was, nothing that lies in Redis can be known to be newer.
    #[test]
    fn our_own_write_is_later_than_everything_until_it_is_logged() {
        let marks = Marks::default();
        let key = key("/a");
        let first = marks.mark(slot_of(&key));
        assert!(!marks.admits_shared(&key, &[], 100));
        let second = marks.mark(slot_of(&key));
        marks.logged(slot_of(&key), 50, Some(first));
        assert!(!marks.admits_shared(&key, &[], 100));
        marks.logged(slot_of(&key), 60, Some(second));
        assert!(marks.admits_shared(&key, &[], 60) && !marks.admits_shared(&key, &[], 59));
        // Another's write is later than what lies here, too.
        let born = marks.now();
        marks.logged(slot_of(&key), 70, None);
        assert!(!marks.admits(&key, &[], born) && !marks.admits_shared(&key, &[], 69));
    }

    /// A thousand purges while Redis was away once closed it for good.
    #[test]
    fn purges_that_were_given_up_are_made_good_by_a_later_one() {
        let marks = Marks::default();
        let key = key("/a");
        marks.mark(slot_of(&key));
        for n in 0..=RULES {
            marks.purge(Purge::Tag(format!("t{n}")), UNKNOWN);
        }
        let all = marks.purge(Purge::All, UNKNOWN);
        assert!(!marks.admits_shared(&key, &[], 1_000));
        marks.purge_logged(all, 500);
        assert!(!marks.admits_shared(&key, &[], 499));
        assert!(marks.admits_shared(&key, &[], 500));
    }

    #[test]
    fn what_nobody_remembers_is_not_used() {
        let marks = Marks::default();
        let before = marks.now();
        for n in 0..=RULES {
            marks.purge(Purge::Tag(format!("t{n}")), n as u64 + 1);
        }
        assert!(!marks.admits(&key("/a"), &[], before));
        assert!(marks.admits(&key("/a"), &[], marks.now()));
        assert!(!marks.admits_shared(&key("/a"), &[], 0));
        marks.set_floor(5_000);
        assert!(!marks.admits_shared(&key("/a"), &[], 4_999) && marks.admits_shared(&key("/a"), &[], 5_000));
    }
}
