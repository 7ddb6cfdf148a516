//! One request's state, and the worker that it runs on.
//!
//! An [`Exchange`] begins with a request's head and ends when nobody holds it any more:
//! not the response's body, not the tunnel. Its end writes the access-log line and counts, so
//! each request is told once, however it went.

use std::{
    cell::{Cell, OnceCell, RefCell},
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::{
        Arc,
        atomic::Ordering::Relaxed,
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderValue, Method, Uri, Version};
use slab::Slab;
use tokio::time::Instant;

use crate::{
    body::ResponseBody,
    error::Kind,
    inbound::Inbound,
    routing::cohort::Why,
    snapshot::{Route, Snapshot, Store},
    telemetry::{
        access_log::{AccessLog, Line},
        metrics::{ABORTED, Arm, class_of},
    },
    timer::Timer,
    upstream::{
        Upstream,
        pool::Pool,
        upload::{RequestBody, Upload},
    },
};

/// A request on its way through the layers.
pub struct Request {
    /// The message.
    pub http: http::Request<RequestBody>,
    /// What is known of it.
    pub context: Context,
}

impl Request {
    /// Reads what is left of a stream's body for a little while: a client that still writes might never see the answer.
    /// A connection of HTTP/1.1 sees to that itself.
    pub fn discard(self) {
        if self.context.inbound.is_none() && !self.http.body().upload().is_done() {
            let timer = self.context.worker.timer.clone();
            tokio::task::spawn_local(self.http.into_body().discard(timer));
        }
    }
}

/// A response on its way back.
pub type Response = http::Response<ResponseBody>;

/// A request's state, shared by all who take part in it.
pub type Context = Rc<Exchange>;

/// A snapshot as one worker sees it: with the worker's own pools beside it.
pub struct Local {
    /// What runs.
    pub snapshot: Arc<Snapshot>,
    /// A pool for each of its upstreams.
    pub pools: Vec<Rc<Pool>>,
}

/// One thread that serves.
pub struct Worker {
    /// Its number, which is that of its shards.
    pub index: usize,
    /// Its time limits.
    pub timer: Timer,
    /// Its end of the access log.
    pub log: AccessLog,
    /// What runs.
    pub store: Arc<Store>,
    /// Whether responses are a connection's last.
    pub draining: Cell<bool>,
    local: RefCell<Rc<Local>>,
    random: Cell<u64>,
    second: RefCell<(u64, String)>,
}

impl Worker {
    /// A worker on this thread.
    pub fn new(index: usize, store: Arc<Store>, log: AccessLog, seed: u64) -> Rc<Self> {
        let snapshot = store.current();
        let pools = snapshot.upstreams.iter().cloned().map(Pool::new).collect();
        Rc::new(Self {
            index,
            timer: Timer::start(),
            log,
            store,
            draining: Cell::new(false),
            local: RefCell::new(Rc::new(Local { snapshot, pools })),
            random: Cell::new(seed),
            second: RefCell::default(),
        })
    }

    /// What runs now. Pools of upstreams that a reload left alone live on.
    pub fn local(&self) -> Rc<Local> {
        if self.local.borrow().snapshot.generation != self.store.generation() {
            let snapshot = self.store.current();
            let old = self.local.borrow().clone();
            let kept = |upstream: &Arc<Upstream>| {
                old.pools.iter().find(|pool| Arc::ptr_eq(pool.upstream(), upstream)).cloned()
            };
            let pools: Vec<_> =
                snapshot.upstreams.iter().map(|u| kept(u).unwrap_or_else(|| Pool::new(u.clone()))).collect();
            let new = Rc::new(Local { snapshot, pools });
            for gone in old.pools.iter().filter(|pool| !new.pools.iter().any(|kept| Rc::ptr_eq(kept, pool))) {
                gone.retire();
            }
            *self.local.borrow_mut() = new;
        }
        self.local.borrow().clone()
    }

    /// `SplitMix64`: for ids and new sessions, not for secrets.
    pub fn random(&self) -> u64 {
        let state = self.random.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.random.set(state);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A moment as RFC 3339 with milliseconds; the seconds are formatted once each.
    fn with_time<T>(&self, then: SystemTime, write: impl FnOnce(&str) -> T) -> T {
        let since = then.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut cached = self.second.borrow_mut();
        if cached.0 != since.as_secs() || cached.1.is_empty() {
            let second = i64::try_from(since.as_secs()).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
            let text = second.map(|second| second.to_string()).unwrap_or_default();
            *cached = (since.as_secs(), text.trim_end_matches('Z').to_owned());
        }
        let length = cached.1.len();
        let _ = write!(cached.1, ".{:03}Z", since.subsec_millis());
        let result = write(&cached.1);
        cached.1.truncate(length);
        result
    }
}

/// One client's connection.
pub struct ClientConnection {
    /// Where it comes from.
    pub peer: SocketAddr,
    /// The same address as a field's value.
    pub peer_value: HeaderValue,
    /// Requests in flight on it.
    pub in_flight: Cell<usize>,
    /// When the last request began or ended.
    pub active: Cell<Instant>,
    /// How long its writes may be stuck: the idle limit of its last request.
    pub idle: Cell<Option<Duration>>,
    /// Since when HTTP/2 streams hold a frame that their client's window has no room for.
    pub held: RefCell<Slab<Instant>>,
}

impl ClientConnection {
    /// A connection that has asked for nothing yet.
    pub fn new(peer: SocketAddr, value: HeaderValue) -> Self {
        Self {
            peer,
            peer_value: value,
            in_flight: Cell::new(0),
            active: Cell::new(Instant::now()),
            idle: Cell::new(Some(Duration::from_mins(1))),
            held: RefCell::default(),
        }
    }
}

impl ClientConnection {
    /// For how long a stream has held a frame that its client's window has no room for.
    pub fn held_for(&self) -> Option<Duration> {
        self.held.borrow().iter().map(|(_, since)| since.elapsed()).max()
    }
}

/// What is known of one request.
pub struct Exchange {
    /// The worker that serves it.
    pub worker: Rc<Worker>,
    /// What ran when it began.
    pub local: Rc<Local>,
    /// Its connection.
    pub connection: Rc<ClientConnection>,
    /// When it began.
    pub started: Instant,
    wall: SystemTime,
    /// The method, as it came.
    pub method: Method,
    /// The target, as it came.
    pub uri: Uri,
    /// The protocol, as it came.
    pub version: Version,
    /// The host asked for.
    pub host: OnceCell<HeaderValue>,
    /// The host that the client asked for, which a trusted proxy may have replaced in `Host`.
    pub asked: OnceCell<HeaderValue>,
    /// The id in log and upstream request.
    pub request_id: OnceCell<HeaderValue>,
    /// The client's address, as far as it can be believed.
    pub client: Cell<IpAddr>,
    /// Whether the client came by https.
    pub https: Cell<bool>,
    /// The matched form of the path, where it is not the path itself.
    pub key: OnceCell<Vec<u8>>,
    /// The other matched form, where an allowed separator can be read as part of a segment.
    pub literal: OnceCell<Vec<u8>>,
    /// Whether the client asks for another method than it says: then nothing may be repeated.
    pub overridden: Cell<bool>,
    /// Whether the client asks for a WebSocket.
    pub upgrade: Cell<bool>,
    /// The client's connection, where it is one of HTTP/1.1.
    pub inbound: Option<Rc<Inbound>>,
    /// Why it is refused, where its head says enough.
    pub refused: Cell<Option<Kind>>,
    /// What is known of its body.
    pub upload: Rc<Upload>,
    /// The index of its route.
    pub route: Cell<usize>,
    /// Who answers.
    pub arm: Cell<Arm>,
    /// Why.
    pub why: Cell<Why>,
    /// The cohort bucket.
    pub bucket: Cell<Option<u16>>,
    /// The index of the upstream asked.
    pub upstream: Cell<Option<usize>>,
    /// The response's status.
    pub status: Cell<u16>,
    /// When the response's head was there.
    pub head: Cell<Option<Duration>>,
    /// Bytes of body that went to the client.
    pub sent: Cell<u64>,
    /// Whether the client had all of it.
    pub complete: Cell<bool>,
    /// What went wrong.
    pub failure: RefCell<Option<(Kind, String)>>,
    counted: Cell<bool>,
}

impl Exchange {
    /// Begins an exchange.
    pub fn begin(
        worker: &Rc<Worker>,
        connection: &Rc<ClientConnection>,
        inbound: Option<&Rc<Inbound>>,
        request: &http::Request<RequestBody>,
    ) -> Context {
        let now = Instant::now();
        let local = worker.local();
        connection.in_flight.set(connection.in_flight.get() + 1);
        connection.active.set(now);
        let context = Rc::new(Self {
            worker: worker.clone(),
            connection: connection.clone(),
            started: now,
            wall: SystemTime::now(),
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            host: OnceCell::new(),
            asked: OnceCell::new(),
            request_id: OnceCell::new(),
            client: Cell::new(connection.peer.ip()),
            https: Cell::new(false),
            key: OnceCell::new(),
            literal: OnceCell::new(),
            overridden: Cell::new(false),
            upgrade: Cell::new(false),
            inbound: inbound.cloned(),
            refused: Cell::new(None),
            upload: request.body().upload().clone(),
            route: Cell::new(local.snapshot.unrouted()),
            arm: Cell::new(Arm::Gateway),
            why: Cell::new(Why::Stage),
            bucket: Cell::new(None),
            upstream: Cell::new(None),
            status: Cell::new(0),
            head: Cell::new(None),
            sent: Cell::new(0),
            complete: Cell::new(false),
            failure: RefCell::new(None),
            counted: Cell::new(false),
            local,
        });
        // The exchange is not over while its body still comes in, whatever was answered.
        context.upload.hold(context.clone());
        context
    }

    /// What runs for this request.
    pub fn snapshot(&self) -> &Snapshot {
        &self.local.snapshot
    }

    /// Its route.
    pub fn route(&self) -> &Route {
        &self.local.snapshot.routes[self.route.get()]
    }

    /// The upstream asked.
    pub fn upstream(&self) -> Option<&Arc<Upstream>> {
        self.upstream.get().map(|index| &self.local.snapshot.upstreams[index])
    }

    /// Settles who answers.
    pub fn decide(&self, arm: Arm, why: Why, upstream: usize) {
        self.arm.set(arm);
        self.why.set(why);
        self.upstream.set(Some(upstream));
        self.counted.set(true);
        self.route().stats.begin(self.worker.index, arm);
    }

    fn finish(&self) {
        let duration = self.started.elapsed();
        self.connection.in_flight.set(self.connection.in_flight.get() - 1);
        self.connection.active.set(Instant::now());
        let route = self.route();
        let status = self.status.get();
        let class = match http::StatusCode::from_u16(status) {
            Ok(status) if self.complete.get() => class_of(status),
            // The client left; unless it was the upstream that broke off.
            _ if self.failure.borrow().is_none() => ABORTED,
            _ => class_of(http::StatusCode::BAD_GATEWAY),
        };
        route.stats.record(self.worker.index, self.arm.get(), class, duration);
        if self.counted.get() {
            route.stats.end(self.worker.index, self.arm.get());
        }
        let text = |value: Option<&HeaderValue>| {
            value.and_then(|value| value.to_str().ok().map(str::to_owned)).unwrap_or_default()
        };
        let failure = self.failure.borrow();
        let millis = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        self.worker.with_time(self.wall, |time| {
            self.worker.log.write(&Line {
                time,
                request_id: &text(self.request_id.get()),
                client: self.client.get(),
                method: self.method.as_str(),
                host: &text(self.host.get()),
                path: self.uri.path(),
                protocol: if self.version == Version::HTTP_2 {
                    "HTTP/2.0"
                } else if self.version == Version::HTTP_10 {
                    "HTTP/1.0"
                } else {
                    "HTTP/1.1"
                },
                status,
                route: &route.name,
                stage: route.stage.word(),
                arm: self.arm.get().word(),
                why: self.why.get().word(),
                bucket: self.bucket.get(),
                upstream: self.upstream().map(|upstream| &*upstream.name),
                duration_ms: millis(duration),
                head_ms: self.head.get().map(millis),
                bytes_in: self.upload.bytes(),
                bytes_out: self.sent.get(),
                complete: self.complete.get(),
                error: failure.as_ref().map(|(kind, _)| kind.word()),
                detail: failure.as_ref().map_or("", |(_, detail)| detail),
            });
        });
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Counts something while it lives.
pub struct Counted(
    Arc<crate::telemetry::metrics::ProcessStats>,
    fn(&crate::telemetry::metrics::ProcessStats) -> &std::sync::atomic::AtomicI64,
);

impl Counted {
    /// Counts one more until it is dropped.
    pub fn one(
        stats: Arc<crate::telemetry::metrics::ProcessStats>,
        gauge: fn(&crate::telemetry::metrics::ProcessStats) -> &std::sync::atomic::AtomicI64,
    ) -> Self {
        gauge(&stats).fetch_add(1, Relaxed);
        Self(stats, gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        (self.1)(&self.0).fetch_sub(1, Relaxed);
    }
}
