//! One worker's connections to one upstream.
//!
//! A connection serves one request at a time and comes back only when request and
//! response are both over, whole. The newest idle one is used first, so that the rest
//! can age. A reused connection that was closed before a byte of the request was taken is
//! replaced silently. What breaks later is for the retries to mend.

use std::{
    cell::{Cell, RefCell, RefMut},
    future::poll_fn,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::Poll,
    time::Duration,
};

use http::{HeaderMap, StatusCode, request::Parts};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
    time::Instant,
};

use super::{
    Upstream,
    call::{Call, Failed, Wire},
    connect,
    endpoint::Endpoint,
    flight::Flight,
    upload::{RequestBody, Upload},
    way::Way,
};
use crate::{
    error::{Error, Kind},
    http1::{
        head::ResponseHead,
        outbox::Outbox,
        write::{self, Overrides},
    },
    resilience::{
        balance::{Balance, Choice},
        bulkhead::{Bulkhead, Lane},
        millis,
    },
};

/// Uploads that may wait for a place among those that are still coming in, per worker and upstream.
const WAITING_UPLOADS: usize = 4096;

/// How long an unused connection is taken to be good without a look, where a look is not worth it each time.
const TIRED: Duration = Duration::from_millis(100);

/// How often an upload that outlives its response is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// One worker's connections to one upstream.
pub struct Pool {
    upstream: Arc<Upstream>,
    idle: RefCell<Vec<Wire>>,
    /// One permit a request in flight: as many as connections are allowed.
    permits: Arc<Semaphore>,
    /// Half of them, for requests that are still coming in: clients that send slowly must not keep out the others.
    uploads: Arc<Semaphore>,
    waiting_uploads: Cell<usize>,
    /// Whether a reload has put another in its place.
    retired: Cell<bool>,
}

impl Pool {
    /// A pool without connections yet.
    pub fn new(upstream: Arc<Upstream>) -> Rc<Self> {
        let max = upstream.connections.max.min(Semaphore::MAX_PERMITS);
        let places = |max| Arc::new(Semaphore::new(max));
        Rc::new(Self {
            upstream,
            idle: RefCell::default(),
            permits: places(max),
            uploads: places(max.div_ceil(2)),
            waiting_uploads: Cell::new(0),
            retired: Cell::new(false),
        })
    }

    /// Whose connections these are.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Sends a request and waits for the response's head. `interim` is told of each interim response.
    pub async fn send(
        self: &Rc<Self>,
        parts: &Parts,
        mut body: Option<RequestBody>,
        upload: Rc<Upload>,
        way: &Way,
        interim: impl Fn(StatusCode, &HeaderMap),
    ) -> Result<(ResponseHead, Lease), Error> {
        // What will not be tried again is worth a look at the socket itself: always where it must not be, else where the
        // connection has waited long enough for its other end to have tired of it.
        let repeatable = way.may_repeat && body.is_none() && parts.method.is_idempotent();
        let careful = match (repeatable, way.mends.get()) {
            (false, _) => Some(Duration::ZERO),
            (true, false) => Some(TIRED),
            (true, true) => None,
        };
        // What is rare is kept apart: this future is moved for every request.
        let mut place = match &mut body {
            Some(body) if !upload.is_done() => match self.uploads.clone().try_acquire_owned() {
                Ok(place) => Some(place),
                Err(_) => Box::pin(self.wait_for_upload(body)).await?,
            },
            _ => None,
        };
        if way.copy && !self.has_spare() {
            return Err(self.shed(Kind::ConnectionLimit, "copies get only what is to spare"));
        }
        let (permit, departed) = match self.try_enter() {
            Some(permit) => (permit, way.begun.get()),
            None => (Box::pin(meanwhile(&mut body, self.enter(way.lane))).await?, Instant::now()),
        };
        way.departed.set(Some(departed));
        let endpoint = match self.pick(way, departed) {
            Ok(endpoint) => endpoint,
            Err(None) => Box::pin(self.find(way)).await?,
            Err(Some(error)) => return Err(error),
        };
        let flight =
            if way.copy { Flight::untold() } else { Flight::begin(&self.upstream, &endpoint, &upload, departed) };
        let mut outbox = Outbox::default();
        let own_host = way.own_host && way.overrides.host.is_none();
        let traceparent = way.traceparent.borrow().clone();
        if own_host || traceparent.is_some() {
            let mut overrides = Overrides { traceparent, ..way.overrides.clone() };
            if own_host {
                overrides.host = Some(endpoint.authority.clone());
            }
            write::request_head(outbox.flat(), parts, &overrides);
        } else {
            write::request_head(outbox.flat(), parts, &way.overrides);
        }
        loop {
            let kept = if way.fresh.get() { None } else { self.take_idle(&endpoint, careful) };
            let reused = kept.is_some();
            let wire = match kept {
                Some(wire) => wire,
                None => match Box::pin(meanwhile(&mut body, self.connect(&endpoint))).await {
                    Ok(wire) => wire,
                    Err(error) => {
                        flight.failed(&error);
                        return Err(error);
                    }
                },
            };
            way.sent.set(true);
            let call = Rc::new(RefCell::new(Call::new(wire, outbox, body, way.chunked, place)));
            match poll_fn(|cx| call.borrow_mut().poll_head(cx, &parts.method, &interim)).await {
                Ok(head) => {
                    if reused {
                        self.upstream.stats.reused.fetch_add(1, Relaxed);
                    }
                    flight.answered(head.status);
                    let shared = Shared { pool: self.clone(), call, flight, _permit: permit };
                    return Ok((head, Lease::new(Rc::new(shared), upload, way.idle)));
                }
                // Not a byte of it was sent.
                Err(Failed::Unsent(_)) if reused => {
                    (outbox, body, place) = call.borrow_mut().take_unsent();
                    way.sent.set(false);
                }
                Err(failed) => {
                    // Where one connection broke, those beside it may have, too.
                    way.fresh.set(reused);
                    let error = self.failure(failed, &upload, &endpoint);
                    way.sent.set(error.sent);
                    flight.failed(&error);
                    return Err(error);
                }
            }
        }
    }

    /// The endpoint; nothing where they have yet to be found.
    fn pick(&self, way: &Way, now: Instant) -> Result<Arc<Endpoint>, Option<Error>> {
        let upstream = &self.upstream;
        let endpoints = upstream.endpoints.load();
        let chosen = match &endpoints[..] {
            [] => return Err(None),
            [only] if only.vitals.is_up() || way.last_resort => Some(0),
            [_] => None,
            several => Choice {
                balance: upstream.balance,
                slow_start: upstream.slow_start,
                now: millis(now),
                random: way.random.replace(way.random.get().rotate_left(17).wrapping_mul(0x9E37_79B9_7F4A_7C15)),
                turn: match upstream.balance {
                    Balance::RoundRobin => upstream.turn.fetch_add(1, Relaxed),
                    Balance::P2c | Balance::RingHash => 0,
                },
                hash: way.hash,
                tried: way.tried.borrow().ids(),
                last_resort: way.last_resort,
                ejects: upstream.outlier.is_some(),
            }
            .pick(several),
        };
        let none = || Error::upstream(Kind::NoEndpoint, &upstream.name, false, "no endpoint is healthy");
        let endpoint = endpoints[chosen.ok_or_else(|| Some(none()))?].clone();
        if endpoints.len() > 1 {
            way.tried.borrow_mut().push(endpoint.id);
        }
        Ok(endpoint)
    }

    /// Waits until its endpoints have been looked up for the first time.
    async fn find(&self, way: &Way) -> Result<Arc<Endpoint>, Error> {
        let upstream = &self.upstream;
        let _ = tokio::time::timeout(upstream.connections.connect_timeout, upstream.is_found()).await;
        let none = || Error::upstream(Kind::Dns, &upstream.name, false, "its name has no address");
        self.pick(way, Instant::now()).map_err(|error| error.unwrap_or_else(none))
    }

    /// Whether half of all places are free, so that a copy keeps nobody waiting.
    fn has_spare(&self) -> bool {
        let upstream = &self.upstream;
        let (inside, waiting) = upstream.bulkhead.occupancy();
        waiting == 0
            && upstream.max_requests.is_none_or(|max| inside * 2 < u64::from(max))
            && self.permits.available_permits() * 2 > upstream.connections.max.min(Semaphore::MAX_PERMITS)
    }

    /// A place, if there is one at once.
    fn try_enter(&self) -> Option<Permit> {
        let connection = self.permits.clone().try_acquire_owned().ok()?;
        let place = self.upstream.bulkhead.try_enter().then(|| Place(self.upstream.bulkhead.clone()))?;
        Some(Permit { _place: place, _connection: connection })
    }

    /// Waits for a place, within the upstream's limit.
    async fn enter(&self, lane: Lane) -> Result<Permit, Error> {
        let upstream = &self.upstream;
        let shed = |kind, why: &str| self.shed(kind, why);
        self.in_time(async {
            // The shared place first: a connection is kept from nobody while its taker waits.
            let full = |_| shed(Kind::ConnectionLimit, "as many requests as it may have, and enough wait");
            upstream.bulkhead.enter(upstream.max_pending, lane).map_err(full)?.await.map_err(full)?;
            let place = Place(upstream.bulkhead.clone());
            let connection = if let Ok(connection) = self.permits.clone().try_acquire_owned() {
                connection
            } else {
                let full = || shed(Kind::ConnectionLimit, "every connection is in use, and enough requests wait");
                let _waiting = Pending::new(upstream).ok_or_else(full)?;
                self.permits.clone().acquire_owned().await.map_err(|_| full())?
            };
            Ok(Permit { _place: place, _connection: connection })
        })
        .await
    }

    /// Waits for a place, but not for longer than the upstream's limit.
    async fn in_time<T>(&self, wait: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let limit = self.upstream.pending_timeout;
        tokio::time::timeout(limit, wait)
            .await
            .unwrap_or_else(|_| Err(self.shed(Kind::PendingTimeout, &format!("no place within {limit:?}"))))
    }

    fn shed(&self, kind: Kind, why: &str) -> Error {
        self.upstream.stats.shed.fetch_add(1, Relaxed);
        Error::upstream(kind, &self.upstream.name, false, why)
    }

    /// Waits for a place among those that are still coming in; none is needed by what is whole meanwhile.
    async fn wait_for_upload(&self, body: &mut RequestBody) -> Result<Option<OwnedSemaphorePermit>, Error> {
        let mut place = std::pin::pin!(self.in_time(self.wait_among_uploads()));
        poll_fn(|cx| {
            if let Poll::Ready(whole) = body.poll_whole(cx) {
                return Poll::Ready(whole.map(|()| None));
            }
            place.as_mut().poll(cx).map_ok(Some)
        })
        .await
    }

    async fn wait_among_uploads(&self) -> Result<OwnedSemaphorePermit, Error> {
        let full = || self.shed(Kind::ConnectionLimit, "too many uploads wait");
        if self.waiting_uploads.get() >= WAITING_UPLOADS {
            return Err(full());
        }
        self.waiting_uploads.set(self.waiting_uploads.get() + 1);
        let _waiting = Waiting(&self.waiting_uploads);
        self.uploads.clone().acquire_owned().await.map_err(|_| full())
    }

    /// The newest idle connection to an endpoint that is still good.
    fn take_idle(&self, endpoint: &Arc<Endpoint>, careful: Option<Duration>) -> Option<Wire> {
        let limits = self.upstream.connections;
        let mut idle = self.idle.borrow_mut();
        let now = Instant::now();
        while let Some(place) = idle.iter().rposition(|wire| Arc::ptr_eq(&wire.endpoint, endpoint)) {
            let mut wire = idle.remove(place);
            if now.duration_since(wire.born) < limits.max_age
                && now.duration_since(wire.idle_since) < limits.idle
                && wire.is_quiet()
                && !wire.was_closed(careful.is_some_and(|since| now.duration_since(wire.idle_since) >= since))
            {
                return Some(wire);
            }
        }
        None
    }

    async fn connect(&self, endpoint: &Arc<Endpoint>) -> Result<Wire, Error> {
        // Idle ones to other endpoints count, too.
        let most = self.upstream.connections.max;
        let busy = most.saturating_sub(self.permits.available_permits());
        let spare = {
            let mut idle = self.idle.borrow_mut();
            (idle.len() + busy > most && !idle.is_empty()).then(|| idle.remove(0))
        };
        drop(spare);
        let stats = &self.upstream.stats;
        match connect::connect(&self.upstream, endpoint).await {
            Ok(io) => {
                stats.connected.fetch_add(1, Relaxed);
                Ok(Wire::new(io, endpoint.clone(), stats.clone()))
            }
            Err(error) => {
                stats.failed.fetch_add(1, Relaxed);
                Err(error)
            }
        }
    }

    /// A reload has put another in its place: what is idle is closed, what is in use will be.
    pub fn retire(&self) {
        self.retired.set(true);
        self.idle.take();
    }

    /// Closes what is idle for too long, too old, closed by the other side, or leads where the upstream is no more.
    pub fn sweep(&self) {
        let limits = self.upstream.connections;
        let endpoints = self.upstream.endpoints.load();
        self.idle.borrow_mut().retain_mut(|wire| {
            endpoints.iter().any(|endpoint| Arc::ptr_eq(endpoint, &wire.endpoint))
                && wire.is_quiet()
                && wire.born.elapsed() < limits.max_age
                && wire.idle_since.elapsed() < limits.idle
        });
    }

    fn failure(&self, failed: Failed, upload: &Upload, endpoint: &Endpoint) -> Error {
        let error = |kind, sent, detail: String| {
            let detail = format!("{}: {detail}", endpoint.name);
            // The client's side of it is told first: the upstream only saw the consequence.
            match upload.failure() {
                Some(kind) => Error { sent, detail, ..Error::new(kind) },
                None => Error::upstream(kind, &self.upstream.name, sent, detail),
            }
        };
        match failed {
            Failed::Unsent(detail) => error(Kind::Terminated, false, detail),
            Failed::Silent(detail) | Failed::Broken(detail) => error(Kind::Terminated, true, detail),
            Failed::Body(failed) => Error { sent: true, ..failed },
            Failed::Protocol(detail) => error(Kind::Protocol, true, detail.to_owned()),
        }
    }
}

/// Waits, and reads on in the body meanwhile: so a client that leaves is noticed.
async fn meanwhile<T>(
    body: &mut Option<RequestBody>,
    wait: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let mut wait = std::pin::pin!(wait);
    poll_fn(|cx| {
        if let Some(body) = body
            && let Poll::Ready(Err(error)) = body.poll_whole(cx)
        {
            return Poll::Ready(Err(error));
        }
        wait.as_mut().poll(cx)
    })
    .await
}

/// A request's place at the upstream, and its connection.
struct Permit {
    _place: Place,
    _connection: OwnedSemaphorePermit,
}

/// A place in the upstream's bulkhead.
struct Place(Arc<Bulkhead>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Counts a request that waits for a connection, over all workers.
struct Pending<'a>(&'a Upstream);

impl<'a> Pending<'a> {
    fn new(upstream: &'a Upstream) -> Option<Self> {
        if upstream.pending.fetch_add(1, Relaxed) >= upstream.max_pending as usize {
            upstream.pending.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Self(upstream))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Relaxed);
    }
}

/// Counts a waiting upload, also one that gives up.
struct Waiting<'a>(&'a Cell<usize>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A connection in use, and its place at the upstream.
struct Shared {
    pool: Rc<Pool>,
    call: Rc<RefCell<Call>>,
    flight: Flight,
    _permit: Permit,
}

impl Drop for Shared {
    /// Back to the pool, if both sides of it are over; closed otherwise.
    fn drop(&mut self) {
        if !self.pool.retired.get()
            && let Some(mut wire) = self.call.borrow_mut().take_finished()
        {
            wire.idle_since = Instant::now();
            self.pool.idle.borrow_mut().push(wire);
        }
    }
}

/// A response's hold on its connection. Dropped before the response has ended, it closes the connection.
pub struct Lease {
    shared: Rc<Shared>,
    upload: Rc<Upload>,
    /// Sends on what is left of the request.
    pump: Option<AbortHandle>,
}

impl Lease {
    fn new(shared: Rc<Shared>, upload: Rc<Upload>, idle: Option<Duration>) -> Self {
        let pump = (!shared.call.borrow().is_uploaded()).then(|| {
            let pump = tokio::task::spawn_local(pump(shared.clone(), upload.clone(), idle)).abort_handle();
            upload.set_pump(pump.clone());
            pump
        });
        Self { shared, upload, pump }
    }

    /// Whose connection it is.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.shared.pool.upstream
    }

    /// What is known of the request's body.
    pub fn upload(&self) -> &Upload {
        &self.upload
    }

    /// The connection, and what was read of it.
    pub fn call(&self) -> RefMut<'_, Call> {
        self.shared.call.borrow_mut()
    }

    /// The response broke off.
    pub fn broke(&self) {
        self.shared.flight.broke();
    }

    /// The response is over: the connection goes back as soon as the request is over too.
    pub fn release(mut self) {
        self.pump = None;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(pump) = &self.pump {
            pump.abort();
        }
    }
}

/// Sends on what is left of a request whose response has begun. It keeps its place; pausing for longer than `idle` loses it.
async fn pump(shared: Rc<Shared>, upload: Rc<Upload>, idle: Option<Duration>) {
    let sending = async {
        let sent = poll_fn(|cx| shared.call.borrow_mut().poll_upload(cx)).await;
        match sent {
            Ok(()) => {}
            Err(Failed::Body(error)) => shared.call.borrow_mut().spoil(error),
            // It may have answered all the same.
            Err(_) => shared.call.borrow_mut().give_up(),
        }
    };
    let mut sending = std::pin::pin!(sending);
    let look = idle.map_or(LOOK, |idle| (idle / 4).clamp(LOOK / 20, LOOK));
    let progress = || (upload.bytes(), shared.call.borrow().taken());
    let (mut seen, mut since) = (progress(), Instant::now());
    while tokio::time::timeout(look, sending.as_mut()).await.is_err() {
        let now = progress();
        if now != seen {
            (seen, since) = (now, Instant::now());
        } else if idle.is_some_and(|idle| since.elapsed() >= idle) {
            let mut call = shared.call.borrow_mut();
            // Half a request is nobody's to answer.
            if upload.is_unfinished() {
                call.spoil(Error::new(Kind::ClientStalled));
            } else {
                call.give_up();
            }
            return;
        }
    }
}
