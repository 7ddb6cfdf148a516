//! What runs differently from what the file says, as requests see it: one relaxed load.

use std::{
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering::Relaxed},
    },
};

use super::evidence::Recorder;
use crate::{config::RouteConfig, routing::cohort::BUCKETS};

/// Whether a person has put a route back. By the route's name, whatever is edited.
#[derive(Debug, Default)]
pub struct Hold(AtomicBool);

impl Hold {
    /// Whether it is held at the monolith.
    pub fn is_held(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Holds it there, or lets go.
    pub fn set(&self, held: bool) {
        self.0.store(held, Relaxed);
    }
}

/// The share that a rollout has come to. By the route and by what is said of its rollout: an edit starts afresh.
#[derive(Debug)]
pub struct Ramp {
    /// What is said of it, in one number.
    pub fingerprint: u64,
    share: AtomicU16,
    /// Whether it was taken back: then nobody is an exception.
    back: AtomicBool,
    /// What requests leave behind.
    pub recorder: Recorder,
}

impl Ramp {
    /// A rollout that has not begun.
    pub fn new(fingerprint: u64) -> Self {
        Self { fingerprint, share: AtomicU16::new(0), back: AtomicBool::new(false), recorder: Recorder::default() }
    }

    /// The share that runs.
    pub fn share(&self) -> u16 {
        self.share.load(Relaxed)
    }

    /// Runs another share from now on; taken back, it is the monolith's altogether.
    pub fn set(&self, share: u16, back: bool) {
        self.back.store(back, Relaxed);
        self.share.store(share.min(BUCKETS), Relaxed);
    }
}

/// What runs differently from what the file says.
#[derive(Clone, Debug)]
pub struct Overlay {
    /// Whether a person has put it back.
    pub hold: Arc<Hold>,
    /// The rollout, where the route has one.
    pub ramp: Option<Arc<Ramp>>,
}

impl Overlay {
    /// Whether the monolith answers everything, whatever the file says.
    pub fn is_back(&self) -> bool {
        self.hold.is_held() || self.ramp.as_ref().is_some_and(|ramp| ramp.back.load(Relaxed))
    }

    /// The share of a canary: the file's own, or the rollout's.
    pub fn share(&self, own: u16) -> u16 {
        self.ramp.as_ref().map_or(own, |ramp| ramp.share())
    }
}

/// What a route says that a rollout hangs on, in one number: its stage, its canary, its rollout and the two that are compared.
pub fn fingerprint(route: &RouteConfig) -> u64 {
    let mut hasher = twox_hash::XxHash3_64::with_seed(0);
    let said =
        format!("{:?} {:?} {:?} {:?} {:?}", route.stage, route.canary, route.rollout, route.upstream, route.baseline);
    said.hash(&mut hasher);
    // What is not shown of it.
    let webhook = route.rollout.as_ref().and_then(|rollout| rollout.gates.webhook.as_ref());
    webhook.map(|webhook| (&webhook.secret, webhook.timeout.0)).hash(&mut hasher);
    hasher.finish()
}
