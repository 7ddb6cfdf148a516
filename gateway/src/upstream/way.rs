//! How a request goes to one upstream, over all of its tries, and how far it came.

use std::{
    cell::{Cell, RefCell},
    time::Duration,
};

use http::HeaderValue;
use tokio::time::Instant;

use super::Upstream;
use crate::{http1::write::Overrides, resilience::bulkhead::Lane};

/// How a request goes to an upstream, and how far it came.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "each says one thing, and none excludes another")]
pub struct Way {
    /// Who goes first where it is full.
    pub lane: Lane,
    /// Whether nobody else can answer, so that an endpoint that is out is better than none.
    pub last_resort: bool,
    /// How its head differs from the client's.
    pub overrides: Overrides,
    /// The context of the try, where it is traced.
    pub traceparent: RefCell<Option<HeaderValue>>,
    /// Whether its host is the endpoint's own.
    pub own_host: bool,
    /// Whether its body goes in chunks.
    pub chunked: bool,
    /// Whether it is a copy, which keeps places from nobody and of which nobody learns.
    pub copy: bool,
    /// Whether its method means what it says.
    pub may_repeat: bool,
    /// The longest pause of an upload that outlives its response.
    pub idle: Option<Duration>,
    /// Anything.
    pub random: Cell<u64>,
    /// What is kept together.
    pub hash: u64,
    /// Endpoints that were tried.
    pub tried: RefCell<Tried>,
    /// When the try began.
    pub begun: Cell<Instant>,
    /// Whether a try without a connection is followed by another.
    pub more: Cell<bool>,
    /// Whether one whose connection broke is, where it may be.
    pub mends: Cell<bool>,
    /// Whether a connection that had served before broke: the next try has a new one.
    pub fresh: Cell<bool>,
    /// When the last try had its place.
    pub departed: Cell<Option<Instant>>,
    /// Whether the upstream may have seen some of it.
    pub sent: Cell<bool>,
}

/// Endpoints that a request has tried: as many as there may be tries.
#[derive(Debug, Default)]
pub struct Tried {
    ids: [u64; 11],
    count: usize,
}

impl Tried {
    /// Adds one.
    pub(super) fn push(&mut self, id: u64) {
        if let Some(place) = self.ids.get_mut(self.count) {
            *place = id;
            self.count += 1;
        }
    }

    /// Which.
    pub(super) fn ids(&self) -> &[u64] {
        &self.ids[..self.count]
    }
}

impl Way {
    /// Whether a healthy endpoint has yet to be tried.
    pub fn has_another(&self, upstream: &Upstream, now: u64) -> bool {
        let tried = self.tried.borrow();
        let endpoints = upstream.endpoints.load();
        endpoints.len() > 1
            && endpoints.iter().any(|endpoint| {
                endpoint.vitals.is_up() && !endpoint.vitals.is_ejected(now) && !tried.ids().contains(&endpoint.id)
            })
    }
}
