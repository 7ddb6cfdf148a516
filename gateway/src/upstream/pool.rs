//! One worker's connections to one upstream.
//!
//! A connection serves one request at a time and comes back only when request and
//! response are both over, whole. The newest idle one is used first, so that the rest
//! can age. A reused connection that was closed before the request went out is replaced
//! silently. One that breaks while the request may be out is replaced once, for an
//! idempotent request without a body (RFC 9110 §9.2.2).

use std::{
    cell::{Cell, RefCell, RefMut},
    future::poll_fn,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::Poll,
    time::Duration,
};

use http::{HeaderMap, Method, Request, StatusCode};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
    time::Instant,
};

use super::{
    Upstream,
    call::{Call, Failed, Wire},
    connect,
    upload::{RequestBody, Upload},
};
use crate::{
    error::{Error, Kind},
    http1::{
        head::{ResponseHead, reuse_map},
        outbox::Outbox,
        write,
    },
};

/// Requests that may wait for a connection, per worker and upstream.
const WAITING: usize = 1024;

/// Uploads that may wait for a place among those that are still coming in, per worker and upstream.
const WAITING_UPLOADS: usize = 4096;

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
    waiting: Cell<usize>,
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
            waiting: Cell::new(0),
            waiting_uploads: Cell::new(0),
            retired: Cell::new(false),
        })
    }

    /// Whose connections these are.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Sends a request and waits for the response's head. `chunked` is how its body goes; `idle` bounds the pauses of an upload that outlives its
    /// response; `interim` is told of each interim response.
    pub async fn send(
        self: &Rc<Self>,
        request: Request<RequestBody>,
        chunked: bool,
        may_repeat: bool,
        idle: Option<Duration>,
        interim: impl Fn(StatusCode, &HeaderMap),
    ) -> Result<(ResponseHead, Lease), Error> {
        let upload = request.body().upload().clone();
        let (parts, body) = request.into_parts();
        let idempotent = is_idempotent(&parts.method);
        let may_repeat = may_repeat && upload.is_empty() && idempotent;
        let mut outbox = Outbox::default();
        write::request_head(outbox.flat(), &parts);
        reuse_map(parts.headers);
        let method = parts.method;
        let mut body = (!upload.is_empty()).then_some(body);
        // What is rare is kept apart: this future is moved for every request.
        let mut place = match &mut body {
            Some(body) if !upload.is_done() => match self.uploads.clone().try_acquire_owned() {
                Ok(place) => Some(place),
                Err(_) => Box::pin(self.wait_for_upload(body)).await?,
            },
            _ => None,
        };
        let permit = match self.permits.clone().try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => Box::pin(meanwhile(&mut body, self.wait(&self.permits, &self.waiting, WAITING))).await?,
        };
        let mut fresh = false;
        loop {
            // What must not be sent twice is worth a look at the socket itself.
            let kept = if fresh { None } else { self.take_idle(!may_repeat) };
            let reused = kept.is_some();
            let wire = match kept {
                Some(wire) => wire,
                None => Box::pin(meanwhile(&mut body, self.connect())).await?,
            };
            let call = Rc::new(RefCell::new(Call::new(wire, outbox, body, chunked, place)));
            match poll_fn(|cx| call.borrow_mut().poll_head(cx, &method, &interim)).await {
                Ok(head) => {
                    if reused {
                        self.upstream.stats.reused.fetch_add(1, Relaxed);
                    }
                    let shared = Shared { pool: self.clone(), call, _permit: permit };
                    return Ok((head, Lease::new(Rc::new(shared), upload, idle)));
                }
                // Not a byte of it was sent.
                Err(Failed::Unsent(_)) if reused => (outbox, body, place) = call.borrow_mut().take_unsent(),
                Err(Failed::Silent(_)) if reused && may_repeat => {
                    (outbox, body, place) = call.borrow_mut().take_unsent();
                    fresh = true;
                }
                Err(failed) => return Err(self.failure(failed, &upload)),
            }
        }
    }

    /// Waits for a place among those that are still coming in; none is needed by what is whole meanwhile.
    async fn wait_for_upload(&self, body: &mut RequestBody) -> Result<Option<OwnedSemaphorePermit>, Error> {
        let mut place = std::pin::pin!(self.wait(&self.uploads, &self.waiting_uploads, WAITING_UPLOADS));
        poll_fn(|cx| {
            if let Poll::Ready(whole) = body.poll_whole(cx) {
                return Poll::Ready(whole.map(|()| None));
            }
            place.as_mut().poll(cx).map_ok(Some)
        })
        .await
    }

    /// Waits for its turn.
    async fn wait(
        &self,
        places: &Arc<Semaphore>,
        waiting: &Cell<usize>,
        most: usize,
    ) -> Result<OwnedSemaphorePermit, Error> {
        let full = || Error::upstream(Kind::ConnectionLimit, &self.upstream.name, false, "every connection is in use");
        if waiting.get() >= most {
            return Err(full());
        }
        waiting.set(waiting.get() + 1);
        let waiting = Waiting(waiting);
        let permit = places.clone().acquire_owned().await;
        drop(waiting);
        permit.map_err(|_| full())
    }

    /// The newest idle connection that is still good.
    fn take_idle(&self, careful: bool) -> Option<Wire> {
        let limits = self.upstream.connections;
        let mut idle = self.idle.borrow_mut();
        let now = Instant::now();
        while let Some(mut wire) = idle.pop() {
            if now.duration_since(wire.born) < limits.max_age
                && now.duration_since(wire.idle_since) < limits.idle
                && wire.is_quiet()
                && !wire.was_closed(careful)
            {
                return Some(wire);
            }
        }
        None
    }

    async fn connect(&self) -> Result<Wire, Error> {
        let stats = &self.upstream.stats;
        match connect::connect(&self.upstream).await {
            Ok(io) => {
                stats.connected.fetch_add(1, Relaxed);
                Ok(Wire::new(io, stats.clone()))
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

    /// Closes what is idle for too long, too old, or closed by the other side.
    pub fn sweep(&self) {
        let limits = self.upstream.connections;
        self.idle.borrow_mut().retain_mut(|wire| {
            wire.is_quiet() && wire.born.elapsed() < limits.max_age && wire.idle_since.elapsed() < limits.idle
        });
    }

    fn failure(&self, failed: Failed, upload: &Upload) -> Error {
        let error = |kind, sent, detail: String| {
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

/// Counts a waiting request, also one that gives up.
struct Waiting<'a>(&'a Cell<usize>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// RFC 9110 §9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

/// A connection in use, and its place at the upstream.
struct Shared {
    pool: Rc<Pool>,
    call: Rc<RefCell<Call>>,
    _permit: OwnedSemaphorePermit,
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
            Err(Failed::Body(error)) => shared.call.borrow_mut().spoil(error.to_string()),
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
                call.spoil("the request's body paused for too long".to_owned());
            } else {
                call.give_up();
            }
            return;
        }
    }
}
