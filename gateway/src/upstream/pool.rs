//! One worker's connections to one upstream.
//!
//! A connection serves one request at a time and comes back only when request and
//! response are both over, whole. The newest idle one is used first, so that the rest
//! can age. A reused connection that was closed before the request went out is replaced
//! silently: hyper hands back what it has not sent. One that breaks while the
//! request may be out is replaced once, for an idempotent request without a body (RFC 9110 §9.2.2).

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use http::{Method, Request, Response};
use hyper::{
    body::Incoming,
    client::conn::http1::{Builder, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::AbortHandle,
    time::Instant,
};

use super::{
    Upstream, connect,
    upload::{RequestBody, Upload},
};
use crate::{
    error::{Error, Kind},
    telemetry::metrics::UpstreamStats,
};

/// Requests that may wait for a connection, per worker and upstream.
const WAITING: usize = 1024;

/// How often a connection whose upload outlives its response is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What hyper may hold of one message, either way.
const BUFFER: usize = 64 * 1024;

/// One worker's connections to one upstream.
pub struct Pool {
    upstream: Arc<Upstream>,
    idle: RefCell<Vec<Connection>>,
    /// One permit a request in flight: as many as connections are allowed.
    permits: Arc<Semaphore>,
    waiting: Cell<usize>,
    /// Whether a reload has put another in its place.
    retired: Cell<bool>,
}

/// A connection: how to send on it, and its own task, which ends with it.
struct Connection {
    sender: SendRequest<RequestBody>,
    task: AbortHandle,
    born: Instant,
    idle_since: Instant,
}

impl Drop for Connection {
    /// Dropping the sender alone lets hyper go on with what it has begun.
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Pool {
    /// A pool without connections yet.
    pub fn new(upstream: Arc<Upstream>) -> Rc<Self> {
        let permits = Arc::new(Semaphore::new(upstream.connections.max.min(Semaphore::MAX_PERMITS)));
        Rc::new(Self { upstream, idle: RefCell::default(), permits, waiting: Cell::new(0), retired: Cell::new(false) })
    }

    /// Whose connections these are.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.upstream
    }

    /// Sends a request and waits for the response's head.
    pub async fn send(
        self: &Rc<Self>,
        mut request: Request<RequestBody>,
        may_repeat: bool,
    ) -> Result<(Response<Incoming>, Lease), Error> {
        let upload = request.body().upload().clone();
        let may_repeat = may_repeat && upload.is_empty() && is_idempotent(request.method());
        let permit = self.permit().await?;
        let mut fresh = false;
        loop {
            let idle = if fresh { None } else { self.take_idle() };
            let reused = idle.is_some();
            let mut connection = match idle {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            // hyper consumes the head, so only a copy can be sent again.
            let spare = (reused && may_repeat).then(|| copy(&request, &upload));
            let mut failed = match connection.sender.try_send_request(request).await {
                Ok(response) => {
                    if reused {
                        self.upstream.stats.reused.fetch_add(1, Relaxed);
                    }
                    let lease = Lease { pool: self.clone(), connection, upload, _permit: permit };
                    return Ok((response, lease));
                }
                Err(failed) => failed,
            };
            match (failed.take_message(), spare) {
                // Not a byte of it was sent.
                (Some(unsent), _) if reused => request = unsent,
                (Some(_), _) => return Err(self.failure(&failed.into_error(), &upload, false)),
                (None, Some(copy)) if broke(failed.error()) => {
                    request = copy;
                    fresh = true;
                }
                (None, _) => return Err(self.failure(&failed.into_error(), &upload, true)),
            }
        }
    }

    /// Waits for its turn.
    async fn permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            return Ok(permit);
        }
        let full = || Error::upstream(Kind::ConnectionLimit, &self.upstream.name, false, "every connection is in use");
        if self.waiting.get() >= WAITING {
            return Err(full());
        }
        self.waiting.set(self.waiting.get() + 1);
        let waiting = Waiting(&self.waiting);
        let permit = self.permits.clone().acquire_owned().await;
        drop(waiting);
        permit.map_err(|_| full())
    }

    /// The newest idle connection that is still good.
    fn take_idle(&self) -> Option<Connection> {
        let limits = self.upstream.connections;
        let mut idle = self.idle.borrow_mut();
        while let Some(connection) = idle.pop() {
            if connection.sender.is_ready()
                && connection.born.elapsed() < limits.max_age
                && connection.idle_since.elapsed() < limits.idle
            {
                return Some(connection);
            }
        }
        None
    }

    async fn connect(&self) -> Result<Connection, Error> {
        let stats = self.upstream.stats.clone();
        let made = match connect::connect(&self.upstream).await {
            Ok(io) => Builder::new()
                .max_buf_size(BUFFER)
                .handshake(TokioIo::new(io))
                .await
                .map_err(|error| Error::upstream(Kind::Terminated, &self.upstream.name, false, error)),
            Err(error) => Err(error),
        };
        let (sender, connection) = match made {
            Ok(made) => made,
            Err(error) => {
                stats.failed.fetch_add(1, Relaxed);
                return Err(error);
            }
        };
        stats.connected.fetch_add(1, Relaxed);
        let open = Open::one(stats);
        let task = tokio::task::spawn_local(async move {
            let _open = open;
            // Its errors reach the request that they belong to; an idle connection's matter to nobody.
            let _ = connection.with_upgrades().await;
        });
        let now = Instant::now();
        Ok(Connection { sender, task: task.abort_handle(), born: now, idle_since: now })
    }

    /// A reload has put another in its place: what is idle is closed, what is in use will be.
    pub fn retire(&self) {
        self.retired.set(true);
        self.idle.take();
    }

    /// Closes what is idle for too long, too old, or closed by the other side.
    pub fn sweep(&self) {
        let limits = self.upstream.connections;
        self.idle.borrow_mut().retain(|connection| {
            !connection.sender.is_closed()
                && connection.born.elapsed() < limits.max_age
                && connection.idle_since.elapsed() < limits.idle
        });
    }

    fn failure(&self, error: &hyper::Error, upload: &Upload, sent: bool) -> Error {
        // The client's side of it is told first: the upstream only saw the consequence.
        if let Some(kind) = upload.failure() {
            return Error { detail: error.to_string(), sent, ..Error::new(kind) };
        }
        let kind = if error.is_parse() { Kind::Protocol } else { Kind::Terminated };
        let mut detail = error.to_string();
        if let Some(cause) = std::error::Error::source(error) {
            detail = format!("{detail}: {cause}");
        }
        Error::upstream(kind, &self.upstream.name, sent, detail)
    }
}

/// Counts an open connection until its task ends, however it ends.
struct Open(Arc<UpstreamStats>);

impl Open {
    fn one(stats: Arc<UpstreamStats>) -> Self {
        stats.open.fetch_add(1, Relaxed);
        Self(stats)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// Counts a waiting request, also one that gives up.
struct Waiting<'a>(&'a Cell<usize>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Whether the connection broke before a response: nothing else is worth a second try.
fn broke(error: &hyper::Error) -> bool {
    let io = std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<std::io::Error>);
    error.is_incomplete_message() || error.is_closed() || error.is_canceled() || (io && !error.is_parse())
}

/// RFC 9110 §9.2.2.
fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

fn copy(request: &Request<RequestBody>, upload: &Rc<Upload>) -> Request<RequestBody> {
    let mut copy = Request::new(RequestBody::again(upload));
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    copy.headers_mut().clone_from(request.headers());
    copy
}

/// A connection in use. Dropped without [`Lease::release`], it is closed.
pub struct Lease {
    pool: Rc<Pool>,
    connection: Connection,
    upload: Rc<Upload>,
    _permit: OwnedSemaphorePermit,
}

impl Lease {
    /// Whose connection it is.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.pool.upstream
    }

    /// The response is over: the connection goes back as soon as the request is over too.
    ///
    /// Until then it keeps its place; an upload that pauses for longer than `idle` loses it.
    pub fn release(self, idle: Option<Duration>) {
        if self.connection.sender.is_closed() {
            return;
        }
        if self.upload.is_done() && self.connection.sender.is_ready() {
            self.put_back();
            return;
        }
        tokio::task::spawn_local(async move {
            let mut this = self;
            loop {
                let wait = idle.unwrap_or(LOOK).saturating_sub(this.upload.quiet()).max(LOOK);
                match tokio::time::timeout(wait, this.connection.sender.ready()).await {
                    Ok(Ok(())) if this.upload.is_done() => return this.put_back(),
                    Err(_) if !this.upload.is_done() && idle.is_none_or(|idle| this.upload.quiet() < idle) => {}
                    // Closed, ended otherwise, or stuck.
                    _ => return,
                }
            }
        });
    }

    fn put_back(self) {
        let Self { pool, mut connection, .. } = self;
        if !pool.retired.get() {
            connection.idle_since = Instant::now();
            pool.idle.borrow_mut().push(connection);
        }
    }
}
