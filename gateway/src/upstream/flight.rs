//! A request at one of several endpoints: what the balance and the ejection learn from it.

use std::{cell::Cell, rc::Rc, sync::Arc};

use http::StatusCode;
use tokio::time::Instant;

use super::{Upstream, endpoint::Endpoint, upload::Upload};
use crate::{
    error::Error,
    resilience::{millis, vitals::Vitals},
};

/// A request at one of several endpoints. Of an only one nothing needs to be known.
pub(super) struct Flight(Option<Flying>);

struct Flying {
    upstream: Arc<Upstream>,
    endpoint: Arc<Endpoint>,
    upload: Rc<Upload>,
    departed: Instant,
    /// Whether it is known how it went, and whether it failed.
    told: Cell<bool>,
    failed: Cell<bool>,
}

impl Flight {
    /// One of which nobody learns.
    pub(super) fn untold() -> Self {
        Self(None)
    }

    pub(super) fn begin(
        upstream: &Arc<Upstream>,
        endpoint: &Arc<Endpoint>,
        upload: &Rc<Upload>,
        departed: Instant,
    ) -> Self {
        if upstream.endpoints.load().len() < 2 {
            return Self(None);
        }
        endpoint.vitals.begin();
        Self(Some(Flying {
            upstream: upstream.clone(),
            endpoint: endpoint.clone(),
            upload: upload.clone(),
            departed,
            told: Cell::new(false),
            failed: Cell::new(false),
        }))
    }

    pub(super) fn answered(&self, status: StatusCode) {
        let Some(flying) = &self.0 else { return };
        flying.told.set(true);
        flying.note(Vitals::observe);
        if status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED {
            flying.fail();
        } else {
            flying.endpoint.vitals.succeed();
        }
    }

    pub(super) fn failed(&self, error: &Error) {
        let Some(flying) = &self.0 else { return };
        flying.told.set(true);
        if error.kind.is_upstreams() {
            flying.fail();
        }
    }

    /// The response broke off.
    pub(super) fn broke(&self) {
        if let Some(flying) = &self.0 {
            flying.fail();
        }
    }
}

impl Flying {
    /// Notes how long the endpoint took, or takes, from the moment at which it had the whole request.
    fn note(&self, how: impl Fn(&Vitals, u64, u64)) {
        if let Some(waited) = self.upload.waited(self.departed) {
            let micros = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
            how(&self.endpoint.vitals, millis(Instant::now()), micros);
        }
    }

    fn fail(&self) {
        if self.failed.replace(true) {
            return;
        }
        let Self { upstream, endpoint, .. } = self;
        let now = millis(Instant::now());
        if endpoint.vitals.fail(now, upstream.outlier.as_ref()) {
            upstream.eject(endpoint, now);
        }
    }
}

impl Drop for Flying {
    /// Nobody waits any more: for a time limit the endpoint is to blame; that a client left says how long it took at least.
    fn drop(&mut self) {
        if !self.told.get() {
            if self.upload.is_expired() {
                self.fail();
            }
            self.note(Vitals::outlast);
        }
        self.endpoint.vitals.end();
    }
}
