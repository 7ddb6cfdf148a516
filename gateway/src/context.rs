//! One request's state, and the worker that it runs on.
//!
//! An [`Exchange`] begins with a request's head and ends when nobody holds it any more:
//! not the response's body, not the tunnel. Its end writes the access-log line and counts, so
//! each request is told once, however it went.

use std::{
    borrow::Cow,
    cell::{Cell, OnceCell, RefCell},
    net::IpAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderValue, Method, Uri, Version, header, uri::PathAndQuery};
use http_body::Body as _;
use opentelemetry::KeyValue;
use slab::Slab;
use tokio::time::Instant;

use crate::{
    auth::memo::Memo,
    body::ResponseBody,
    claims::Claims,
    error::{Kind, TimeLimit},
    fields::{self, TRACEPARENT, TRACESTATE},
    http1::{head::reuse_map, write::Overrides},
    inbound::Inbound,
    inventory::{
        self,
        counts::Seen,
        feed::Feed,
        tree::{METHODS, method_number, writes},
    },
    resilience::{balance::Balance, bulkhead::Lane},
    rollout::evidence::{Outcome, Recorder},
    routing::{
        cohort::Why,
        predicate::Head,
        table::{Found, Match},
    },
    snapshot::{LogTo, Route, Snapshot, Store},
    telemetry::{
        access_log::{AccessLog, Line},
        metrics::{ABORTED, Arm, FALLBACKS, SERVED, class_of},
        trace::{self, TRIES, Told, Trace, Try, traceparent},
    },
    timer::Timer,
    upstream::{
        Upstream,
        pool::Pool,
        upload::{Home, RequestBody, Upload},
        way::Way,
    },
};

/// A request on its way through the layers.
pub struct Request {
    /// The message.
    pub http: Box<http::Request<RequestBody>>,
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

/// A request on its way to one upstream. Its head lies in the exchange and does not change any more; each try reads it there.
pub struct Leg {
    /// What is known of the request.
    pub context: Context,
    /// The index of the upstream.
    pub upstream: usize,
    /// How it goes there.
    pub way: Way,
}

impl Leg {
    /// Towards an upstream. `last_resort` where nobody else can answer, `chunked` where the body has no length.
    pub fn new(context: &Context, upstream: usize, lane: Lane, last_resort: bool, chunked: bool) -> Self {
        let known = &context.local.snapshot.upstreams[upstream];
        let several = known.urls.len() > 1 || known.discovery.is_some();
        let hash = || {
            let headers = &context.parts.get()?.headers;
            known.hash_by.iter().find_map(|key| key.find(headers, context.client.get())).map(|found| found.hash())
        };
        let way = Way {
            lane,
            last_resort,
            overrides: Overrides::default(),
            traceparent: RefCell::default(),
            own_host: false,
            chunked,
            copy: context.shadow.get(),
            may_repeat: !context.overridden.get(),
            idle: context.route().limits.idle,
            random: Cell::new(if several { context.worker.random() } else { 0 }),
            hash: if known.balance == Balance::RingHash {
                hash().unwrap_or_else(|| context.worker.random())
            } else {
                0
            },
            tried: RefCell::default(),
            // The clock is dear: what had nothing to wait for begins when it came.
            begun: Cell::new(if lane == Lane::Direct && context.upload.is_empty() {
                context.started
            } else {
                Instant::now()
            }),
            more: Cell::new(false),
            mends: Cell::new(false),
            fresh: Cell::new(false),
            departed: Cell::new(None),
            sent: Cell::new(false),
        };
        Self { context: context.clone(), upstream, way }
    }

    /// Where it goes.
    pub fn upstream(&self) -> &Arc<Upstream> {
        &self.context.local.snapshot.upstreams[self.upstream]
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
    /// Its end of the inventory.
    pub feed: Feed,
    /// What requests carry on that have been here.
    pub via: Via,
    /// What runs.
    pub store: Arc<Store>,
    /// Whether responses are a connection's last.
    pub draining: Cell<bool>,
    /// When it began.
    pub born: Instant,
    /// Tokens that were verified already.
    pub memo: RefCell<Memo>,
    local: RefCell<Rc<Local>>,
    random: Cell<u64>,
    wall: RefCell<Wall>,
}

/// What the clock on the wall said at one moment of the other, and the text of its second.
struct Wall {
    at: Instant,
    then: SystemTime,
    second: u64,
    text: String,
}

/// The gateway's name in `Via`, its own among all gateways: a request that brings it has been here (RFC 9110 §7.6.3).
pub struct Via {
    name: String,
    values: [HeaderValue; 3],
}

impl Via {
    fn new(id: u32) -> Self {
        let name = format!("gw-{id:08x}");
        let value = |version: &str| {
            HeaderValue::try_from(format!("{version} {name}")).unwrap_or(HeaderValue::from_static("1.1 gw"))
        };
        Self { values: [value("1.1"), value("1.0"), value("2.0")], name }
    }

    /// The value for a request that came by this version.
    pub fn of(&self, version: Version) -> HeaderValue {
        match version {
            Version::HTTP_10 => self.values[1].clone(),
            Version::HTTP_2 => self.values[2].clone(),
            _ => self.values[0].clone(),
        }
    }

    /// Whether a value has it.
    pub fn is_in(&self, value: &[u8]) -> bool {
        value.split(|byte| b", \t".contains(byte)).any(|word| word == self.name.as_bytes())
    }
}

/// How long a look at the clock on the wall is believed.
const WALL: Duration = Duration::from_secs(1);

impl Worker {
    /// A worker on this thread.
    pub fn new(index: usize, store: Arc<Store>, log: AccessLog, feed: Feed, seed: u64) -> Rc<Self> {
        let snapshot = store.current();
        let pools = snapshot.upstreams.iter().cloned().map(Pool::new).collect();
        Rc::new(Self {
            index,
            timer: Timer::start(),
            log,
            feed,
            via: Via::new(store.process.id),
            store,
            draining: Cell::new(false),
            born: Instant::now(),
            memo: RefCell::default(),
            local: RefCell::new(Rc::new(Local { snapshot, pools })),
            random: Cell::new(seed),
            wall: RefCell::new(Wall {
                at: Instant::now(),
                then: SystemTime::now(),
                second: u64::MAX,
                text: String::new(),
            }),
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

    /// What the clock on the wall says, in seconds of Unix time.
    pub fn unix_time(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
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

    /// What the clock on the wall said at a moment; it is looked at once a second.
    fn since_epoch(&self, moment: Instant) -> Duration {
        let mut wall = self.wall.borrow_mut();
        if moment.saturating_duration_since(wall.at) > WALL {
            (wall.at, wall.then) = (Instant::now(), SystemTime::now());
        }
        let then = wall.then.duration_since(UNIX_EPOCH).unwrap_or_default();
        match moment.checked_duration_since(wall.at) {
            Some(after) => then + after,
            None => then.saturating_sub(wall.at.duration_since(moment)),
        }
    }

    /// A moment as RFC 3339 has its second, and its milliseconds. A second is formatted once.
    fn with_time<T>(&self, moment: Instant, write: impl FnOnce((&str, u32)) -> T) -> T {
        let since = self.since_epoch(moment);
        let mut wall = self.wall.borrow_mut();
        if wall.second != since.as_secs() {
            let second = i64::try_from(since.as_secs()).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
            let text = second.map(|second| second.to_string()).unwrap_or_default();
            text.trim_end_matches('Z').clone_into(&mut wall.text);
            wall.second = since.as_secs();
        }
        write((&wall.text, since.subsec_millis()))
    }
}

/// Streams that a client may reset before they are answered, beside as many as were.
const RESETS: u32 = 100;

/// One client's connection.
pub struct ClientConnection {
    /// Where it comes from.
    pub peer: IpAddr,
    /// The same address as a field's value.
    pub peer_value: HeaderValue,
    /// Requests in flight on it.
    pub in_flight: Cell<usize>,
    /// When the last request began or ended.
    pub active: Cell<Instant>,
    /// The last host asked on it, and `Forwarded` as it was said then.
    pub forwarded: RefCell<Option<(HeaderValue, HeaderValue)>>,
    /// How long its writes may be stuck: the idle limit of its last request.
    pub idle: Cell<Option<Duration>>,
    /// Streams of HTTP/2 that were answered.
    served: Cell<u32>,
    /// Streams of HTTP/2 that their client reset before.
    cut: Cell<u32>,
    /// Since when HTTP/2 streams hold a frame that their client's window has no room for.
    pub held: RefCell<Slab<Instant>>,
}

impl ClientConnection {
    /// A connection that has asked for nothing yet.
    pub fn new(peer: IpAddr, value: HeaderValue) -> Self {
        Self {
            peer,
            peer_value: value,
            in_flight: Cell::new(0),
            active: Cell::new(Instant::now()),
            forwarded: RefCell::default(),
            idle: Cell::new(Some(Duration::from_mins(1))),
            served: Cell::new(0),
            cut: Cell::new(0),
            held: RefCell::default(),
        }
    }
}

impl ClientConnection {
    /// Whether its last request asked this host, so that it needs no second look.
    pub fn has_said(&self, host: &HeaderValue) -> bool {
        self.forwarded.borrow().as_ref().is_some_and(|(before, _)| before == host)
    }

    /// Whether its client asks in order to take it back: each time costs a request, and the client nothing (CVE-2023-44487).
    pub fn is_abused(&self) -> bool {
        self.cut.get() > RESETS && self.cut.get() > self.served.get()
    }

    /// For how long a stream has held a frame that its client's window has no room for.
    pub fn held_for(&self) -> Option<Duration> {
        self.held.borrow().iter().map(|(_, since)| since.elapsed()).max()
    }
}

/// What the cache did for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It had the answer.
    Hit,
    /// It had an old one, which had to do.
    Stale,
    /// It had one that the upstream says is still good.
    Revalidated,
    /// Another request brought the answer.
    Collapsed,
    /// It had none.
    Miss,
    /// It was not asked.
    Bypass,
}

impl Served {
    /// Whether the answer was kept from another request.
    fn is_kept(self) -> bool {
        matches!(self, Self::Hit | Self::Stale | Self::Collapsed)
    }

    /// The word in logs and metrics.
    pub fn word(self) -> &'static str {
        SERVED[self as usize]
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
    /// Whether its connection serves no other after it.
    pub last: Cell<bool>,
    /// What is known of its body.
    pub upload: Rc<Upload>,
    /// Its head, once nothing in it changes any more.
    pub parts: OnceCell<http::request::Parts>,
    /// Where its body waits between tries, if it has one.
    pub home: OnceCell<Rc<Home>>,
    /// Tries at upstreams.
    pub attempts: Cell<u32>,
    /// The index of the service in whose place another answered, and why: an index of `FALLBACKS`.
    pub fallback: Cell<Option<(usize, usize)>>,
    /// The time limit that fired last, also where another try or another system answered all the same.
    pub limit: Cell<Option<TimeLimit>>,
    /// Routes whose predicates refused it: their limits and doors hold wherever it falls.
    pub guards: RefCell<Vec<usize>>,
    /// What the token says that it brought, once that is verified.
    pub claims: OnceCell<Rc<Claims>>,
    /// Whether it brought credentials of its own: nobody else may have an answer to it that does not say so.
    pub authorized: Cell<bool>,
    /// Whether it brought cookies.
    pub cookies: Cell<bool>,
    /// Path and query as they go on, where anything is kept.
    pub target: OnceCell<PathAndQuery>,
    /// What the cache did for it, where the route has one.
    pub cache: Cell<Option<Served>>,
    /// Whether who was asked failed, and what is kept stood in.
    pub let_down: Cell<bool>,
    /// Whether it counts as one of the requests in flight.
    pub admitted: Cell<bool>,
    /// The index of its route.
    pub route: Cell<usize>,
    /// Who answers.
    pub arm: Cell<Arm>,
    /// Who was to answer, before any fallback.
    pub decided: Cell<Arm>,
    /// Why.
    pub why: Cell<Why>,
    /// The cohort bucket.
    pub bucket: Cell<Option<u16>>,
    /// Which of the keys of its bucket it has, and the share at which it was drawn.
    pub cohort_key: Cell<Option<(u64, u16)>>,
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
    /// Its part in a trace, where there are any.
    pub trace: Cell<Option<Trace>>,
    /// Its tries, where it is traced.
    pub tries: RefCell<Vec<Try>>,
    /// What there is to do once its client has its answer.
    pub after: RefCell<Option<After>>,
    /// Whether it is a copy: nobody's request, and counted nowhere as such.
    pub shadow: Cell<bool>,
    counted: Cell<bool>,
    /// Whether it is the gateway's own doing, for which no client asked.
    twin: Cell<bool>,
}

/// What there is to do once a client has its answer.
pub type After = Box<dyn FnOnce(&Exchange)>;

impl Exchange {
    /// Begins an exchange.
    pub fn begin(
        worker: &Rc<Worker>,
        connection: &Rc<ClientConnection>,
        inbound: Option<&Rc<Inbound>>,
        request: &http::Request<RequestBody>,
    ) -> Context {
        let context = Rc::new(Self::new(worker, connection, inbound, request, worker.local()));
        if !context.upload.is_empty() && request.headers().contains_key(header::EXPECT) {
            context.upload.set_expects();
        }
        // The exchange is not over while its body still comes in, whatever was answered.
        context.upload.hold(context.clone());
        context
    }

    fn new(
        worker: &Rc<Worker>,
        connection: &Rc<ClientConnection>,
        inbound: Option<&Rc<Inbound>>,
        request: &http::Request<RequestBody>,
        local: Rc<Local>,
    ) -> Self {
        let now = Instant::now();
        connection.in_flight.set(connection.in_flight.get() + 1);
        connection.active.set(now);
        Self {
            worker: worker.clone(),
            connection: connection.clone(),
            started: now,
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            host: OnceCell::new(),
            asked: OnceCell::new(),
            request_id: OnceCell::new(),
            client: Cell::new(connection.peer),
            https: Cell::new(false),
            key: OnceCell::new(),
            literal: OnceCell::new(),
            overridden: Cell::new(false),
            upgrade: Cell::new(false),
            inbound: inbound.cloned(),
            refused: Cell::new(None),
            last: Cell::new(false),
            upload: request.body().upload().clone(),
            parts: OnceCell::new(),
            home: OnceCell::new(),
            attempts: Cell::new(0),
            fallback: Cell::new(None),
            limit: Cell::new(None),
            guards: RefCell::default(),
            claims: OnceCell::new(),
            authorized: Cell::new(false),
            cookies: Cell::new(false),
            target: OnceCell::new(),
            cache: Cell::new(None),
            let_down: Cell::new(false),
            admitted: Cell::new(false),
            route: Cell::new(local.snapshot.unrouted()),
            arm: Cell::new(Arm::Gateway),
            decided: Cell::new(Arm::Gateway),
            why: Cell::new(Why::Stage),
            bucket: Cell::new(None),
            cohort_key: Cell::new(None),
            upstream: Cell::new(None),
            status: Cell::new(0),
            head: Cell::new(None),
            sent: Cell::new(0),
            complete: Cell::new(false),
            failure: RefCell::new(None),
            trace: Cell::new(None),
            tries: RefCell::default(),
            after: RefCell::default(),
            shadow: Cell::new(false),
            counted: Cell::new(false),
            twin: Cell::new(false),
            local,
        }
    }

    /// The same request once more, for the gateway's own sake: it goes where this one would have gone, and nobody waits for it.
    pub fn again(&self, request: &http::Request<RequestBody>) -> Context {
        let this = self.twin(request);
        if let Some(upstream) = self.upstream.get() {
            this.decide(self.arm.get(), self.why.get(), upstream);
            this.decided.set(self.decided.get());
        }
        Rc::new(this)
    }

    /// A copy of the request for one system, which counts nowhere as a request.
    pub fn copy(&self, request: &http::Request<RequestBody>, arm: Arm, upstream: usize) -> Context {
        let this = self.twin(request);
        this.shadow.set(true);
        this.arm.set(arm);
        this.decided.set(arm);
        this.upstream.set(Some(upstream));
        Rc::new(this)
    }

    fn twin(&self, request: &http::Request<RequestBody>) -> Self {
        let connection = ClientConnection::new(self.connection.peer, self.connection.peer_value.clone());
        let mut this = Self::new(&self.worker, &Rc::new(connection), None, request, self.local.clone());
        this.twin.set(true);
        this.version = self.version;
        this.host = self.host.clone();
        this.asked = self.asked.clone();
        this.request_id = self.request_id.clone();
        this.key = self.key.clone();
        this.literal = self.literal.clone();
        this.claims = self.claims.clone();
        this.target = self.target.clone();
        this.client.set(self.client.get());
        this.https.set(self.https.get());
        this.route.set(self.route.get());
        this.authorized.set(self.authorized.get());
        this.cookies.set(self.cookies.get());
        this.bucket.set(self.bucket.get());
        this
    }

    /// Puts the request where every try finds it; whether its body goes in chunks.
    pub fn park(&self, http: http::Request<RequestBody>) -> bool {
        let (mut parts, body) = http.into_parts();
        if self.twin.get() && self.snapshot().tracer.is_some() {
            // Not the request that was traced, if that was.
            let random = || self.worker.random();
            parts.headers.remove(TRACESTATE);
            trace::begin(&mut parts.headers, None, false, false, 0, &random);
        }
        let mut chunked = false;
        if body.upload().is_empty() {
            // Says that there is no body where one is expected.
            let expected = matches!(parts.method, Method::POST | Method::PUT | Method::PATCH);
            if expected && !parts.headers.contains_key(header::CONTENT_LENGTH) {
                parts.headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
            }
        } else {
            // Says how the body ends where it has no length.
            if body.size_hint().exact().is_none() {
                chunked = true;
                parts.headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
            let route = self.route();
            let again = route.retry.is_some() || route.fallback.is_some();
            let _ = self.home.set(Home::new(body, if again { route.replay_body } else { 0 }));
        }
        // Nothing but a WebSocket that the route allows is ever upgraded.
        if self.upgrade.get() && self.route().websocket {
            parts.headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
            parts.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        }
        let _ = self.parts.set(parts);
        chunked
    }

    /// What runs for this request.
    pub fn snapshot(&self) -> &Snapshot {
        &self.local.snapshot
    }

    /// Which rule a request has, should it come by this method.
    pub fn find(&self, http: &http::Request<RequestBody>, method: &Method) -> Match {
        let path = http.uri().path().as_bytes();
        let head = Head {
            host: self.host.get().map_or(b"", HeaderValue::as_bytes),
            key: self.key.get().map_or_else(|| path.get(1..).unwrap_or_default(), Vec::as_slice),
            method,
            headers: http.headers(),
            query: http.uri().query().unwrap_or_default(),
        };
        let table = &self.snapshot().table;
        match self.literal.get() {
            // `OPTIONS *` asks the server as a whole: the monolith's to answer.
            _ if path == b"*" => Match { found: Found::Nothing, guards: Vec::new() },
            None => table.find(&head),
            Some(literal) => table.find_either(&Head { key: literal, ..head }, &head),
        }
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
        self.decided.set(arm);
        self.why.set(why);
        self.upstream.set(Some(upstream));
        self.counted.set(true);
        self.route().stats.begin(self.worker.index, arm);
    }

    /// Another answers than was decided.
    pub fn decide_anew(&self, arm: Arm, upstream: usize) {
        let stats = &self.route().stats;
        stats.end(self.worker.index, self.arm.get());
        stats.begin(self.worker.index, arm);
        self.arm.set(arm);
        self.upstream.set(Some(upstream));
    }

    /// The gateway answers from what it keeps: no upstream's merit, and no upstream's fault.
    pub fn answered_here(&self) {
        let stats = &self.route().stats;
        stats.end(self.worker.index, self.arm.get());
        stats.begin(self.worker.index, Arm::Gateway);
        self.arm.set(Arm::Gateway);
        self.upstream.set(None);
    }

    /// Whether its client says by a key that it is the same as another with that key.
    pub fn is_keyed(&self) -> bool {
        let key = self.parts.get().and_then(|parts| parts.headers.get(fields::IDEMPOTENCY_KEY));
        key.is_some_and(|key| !key.is_empty())
    }

    /// Counts a time limit that fired, if one did.
    pub fn count_limit(&self, kind: Kind) {
        if let Some(limit) = kind.limit() {
            self.limit.set(Some(limit));
            self.route().stats.rare.timeouts[limit as usize].fetch_add(1, Relaxed);
        }
    }

    /// What this request says of the arm that it was drawn into.
    fn testify(&self, recorder: &Recorder, key: u64, duration: Duration) {
        let decided = self.decided.get();
        let let_down = self.let_down.get();
        // What an arm's cache has is the arm's answer. Else the same 404 would come once from each, however many ask for it.
        let kept = self.arm.get() == Arm::Gateway && self.cache.get().is_some_and(Served::is_kept);
        // What the gateway has answered itself says nothing of either.
        if (self.arm.get() == Arm::Gateway && !let_down && !kept) || decided == Arm::Gateway {
            return;
        }
        let outcome = match (&*self.failure.borrow(), self.fallback.get(), self.status.get()) {
            _ if let_down => Outcome::Failed,
            // Neither was at fault.
            (Some((kind, _)), None, _) if !kind.is_upstreams() && !kind.is_unavailable() => return,
            // Where the monolith does not have it either, the service was right.
            (_, Some((_, 2..)), status) if status >= 400 => outcome_of(status),
            // Who leaves before the head has waited for it: as likely with either, if they are as fast.
            (Some(_), ..) | (_, Some(_), _) | (None, None, 0) => Outcome::Failed,
            (None, None, status) => outcome_of(status),
        };
        let now = self.started.duration_since(self.worker.born) + duration;
        let head = (!kept).then(|| self.head.get().unwrap_or(duration));
        recorder.record(usize::from(decided == Arm::Service), key, now, outcome, head);
    }

    fn finish(&self) {
        let now = Instant::now();
        let duration = now.duration_since(self.started);
        self.connection.in_flight.set(self.connection.in_flight.get() - 1);
        self.connection.active.set(now);
        if self.shadow.get() {
            return;
        }
        if let Some(after) = self.after.take() {
            after(self);
        }
        let route = self.route();
        let status = self.status.get();
        if self.version == Version::HTTP_2 {
            let count = if status == 0 { &self.connection.cut } else { &self.connection.served };
            count.set(count.get().saturating_add(1));
        }
        let class = match http::StatusCode::from_u16(status) {
            Ok(status) if self.complete.get() => class_of(status),
            // The client left, or its request broke off; unless it was the upstream that did.
            _ => match &*self.failure.borrow() {
                Some((kind, _)) if kind.is_upstreams() || *kind == Kind::Internal => {
                    class_of(http::StatusCode::BAD_GATEWAY)
                }
                _ => ABORTED,
            },
        };
        let method = method_number(&self.method);
        route.stats.record(self.worker.index, self.arm.get(), class, writes(method), duration);
        if self.snapshot().inventory && !self.twin.get() {
            self.note(method, class == ABORTED, duration);
        }
        if let (Some(ramp), Some((key, share))) = (&route.overlay.ramp, self.cohort_key.get())
            // Who was drawn at another share is not comparable with those of this one.
            && ramp.share() == share
        {
            self.testify(&ramp.recorder, key, duration);
        }
        if self.counted.get() {
            route.stats.end(self.worker.index, self.arm.get());
        }
        if self.admitted.get() {
            self.worker.store.process.requests.fetch_sub(1, Relaxed);
        }
        if let Some(served) = self.cache.get() {
            route.stats.rare.cache[served as usize].fetch_add(1, Relaxed);
        }
        if let Some((kind, _)) = &*self.failure.borrow() {
            self.count_limit(*kind);
        }
        if let Some(trace) = self.trace.get().filter(|trace| trace.sampled) {
            self.tell_trace(trace, class, duration);
        }
        let log = &self.snapshot().access_log;
        // What failed always has its line.
        let wanted = log.sample == EVERYTHING
            || !matches!(class, 0..=3)
            || self.worker.random() % u64::from(EVERYTHING) < u64::from(log.sample);
        if wanted && log.to != LogTo::Nowhere {
            self.log(duration);
        }
    }

    /// Tells the inventory.
    fn note(&self, method: u8, aborted: bool, duration: Duration) {
        let path = self.uri.path().as_bytes();
        let path = self.key.get().map_or_else(|| path.get(1..).unwrap_or_default(), Vec::as_slice);
        let micros = u32::try_from(duration.as_micros()).unwrap_or(u32::MAX);
        let seen = Seen { status: self.status.get(), aborted, micros: Some(micros), at: 0 };
        let request = inventory::tree::Request { method, route: 0, arm: self.arm.get(), seen };
        self.worker.feed.note(&self.local.snapshot, self.route.get(), path, &request);
    }

    /// Whether it is traced.
    pub fn is_traced(&self) -> bool {
        self.trace.get().is_some_and(|trace| trace.sampled)
    }

    /// Begins a try's span, where it is traced, and tells whoever is asked; it and when it began.
    pub fn begin_try(&self, way: &Way) -> Option<(u64, Duration)> {
        let trace = self.trace.get().filter(|trace| trace.sampled)?;
        let span = self.worker.random().max(1);
        // Where the route says something else of the field, that stands.
        let given = self.parts.get().and_then(|parts| parts.headers.get(TRACEPARENT));
        if given.is_some_and(|given| *given == traceparent(trace.trace, trace.span, true)) {
            *way.traceparent.borrow_mut() = Some(traceparent(trace.trace, span, true));
        }
        Some((span, self.started.elapsed()))
    }

    /// Ends it.
    pub fn end_try(&self, (span, begun): (u64, Duration), upstream: &Upstream, result: Result<u16, &'static str>) {
        let mut tries = self.tries.borrow_mut();
        if tries.len() < TRIES {
            tries.push(Try { span, upstream: upstream.name.clone(), at: (begun, self.started.elapsed()), result });
        }
    }

    fn tell_trace(&self, trace: Trace, class: usize, duration: Duration) {
        let Some(tracer) = &self.snapshot().tracer else { return };
        let mut tries = self.tries.take();
        // Before anything is made for it.
        if !tracer.reserve(1 + tries.len()) {
            return;
        }
        let failure = self.failure.borrow();
        // The try whose answer went on lasted as long as its body, and failed with it.
        if let Some(last) = tries.last_mut().filter(|last| last.result == Ok(self.status.get())) {
            last.at.1 = duration;
            if let Some((kind, _)) = failure.as_ref().filter(|(kind, _)| kind.is_upstreams()) {
                last.result = Err(kind.word());
            }
        }
        let route = self.route();
        let redact = self.snapshot().access_log.redact;
        let text = |value: Option<&HeaderValue>| {
            value.map(|value| cut(&String::from_utf8_lossy(value.as_bytes()))).unwrap_or_default()
        };
        // What anybody may invent is none of a span's names.
        let known = METHODS[usize::from(method_number(&self.method))];
        let method = if known == "OTHER" { "_OTHER" } else { known };
        let version = match self.version {
            Version::HTTP_2 => "2",
            Version::HTTP_10 => "1.0",
            _ => "1.1",
        };
        let mut attributes = vec![
            KeyValue::new("http.request.method", method),
            KeyValue::new("url.path", cut(&self.told_path(redact.path))),
            KeyValue::new("url.scheme", if self.https.get() { "https" } else { "http" }),
            KeyValue::new("client.address", self.told_client(redact.client)),
            KeyValue::new("network.protocol.version", version),
            KeyValue::new("gateway.request_id", text(self.request_id.get())),
            KeyValue::new("gateway.route", route.name.to_string()),
            KeyValue::new("gateway.stage", route.stage.word()),
            KeyValue::new("gateway.arm", self.arm.get().word()),
            KeyValue::new("gateway.complete", self.complete.get()),
        ];
        if !redact.host {
            attributes.push(KeyValue::new("server.address", text(self.host.get())));
        }
        let spoken = if method == "_OTHER" { "HTTP" } else { method };
        let name = if route.path.is_empty() {
            spoken.to_owned()
        } else {
            attributes.push(KeyValue::new("http.route", route.path.to_string()));
            format!("{spoken} {}", route.path)
        };
        if self.status.get() > 0 {
            attributes.push(KeyValue::new("http.response.status_code", i64::from(self.status.get())));
        }
        if let Some((service, reason)) = self.fallback.get() {
            attributes.push(KeyValue::new("gateway.fallback", FALLBACKS[reason]));
            attributes
                .push(KeyValue::new("gateway.fallback_from", self.snapshot().upstreams[service].name.to_string()));
        }
        if let Some(served) = self.cache.get() {
            attributes.push(KeyValue::new("gateway.cache", served.word()));
        }
        let failed = class == class_of(http::StatusCode::BAD_GATEWAY);
        let error = failed.then(|| match &*failure {
            Some((kind, _)) => kind.word().to_owned(),
            None => self.status.get().to_string(),
        });
        let started = UNIX_EPOCH + self.worker.since_epoch(self.started);
        tracer.take(trace, &tries, Told { started, duration, method: spoken, name, attributes, error });
    }

    fn told_client(&self, redact: bool) -> String {
        let client = self.client.get();
        if redact { network_of(client).to_string() } else { client.to_string() }
    }

    /// The path as it may be told.
    fn told_path(&self, redact: bool) -> Cow<'_, str> {
        let path = self.uri.path();
        if !redact {
            return Cow::Borrowed(path);
        }
        // As it was matched, or its segments are not those of the pattern.
        let path = path.as_bytes();
        let key = self.key.get().map_or_else(|| path.get(1..).unwrap_or_default(), Vec::as_slice);
        Cow::Owned(masked(key, &self.route().path))
    }

    fn log(&self, duration: Duration) {
        let redact = self.snapshot().access_log.redact;
        let route = self.route();
        let failure = self.failure.borrow();
        let told;
        let client = if self.client.get() == self.connection.peer && !redact.client {
            self.connection.peer_value.as_bytes()
        } else {
            told = self.told_client(redact.client);
            told.as_bytes()
        };
        self.worker.with_time(self.started, |time| {
            self.worker.log.write(&Line {
                time,
                request_id: self.request_id.get().map_or(b"", HeaderValue::as_bytes),
                trace: self.trace.get().map(|trace| trace.trace),
                client,
                method: self.method.as_str(),
                host: if redact.host { b"*" } else { self.host.get().map_or(b"", HeaderValue::as_bytes) },
                path: &self.told_path(redact.path),
                protocol: if self.version == Version::HTTP_2 {
                    "HTTP/2.0"
                } else if self.version == Version::HTTP_10 {
                    "HTTP/1.0"
                } else {
                    "HTTP/1.1"
                },
                status: self.status.get(),
                route: &route.name,
                stage: route.stage.word(),
                arm: self.arm.get().word(),
                why: self.why.get().word(),
                bucket: self.bucket.get(),
                upstream: self.upstream().map(|upstream| &*upstream.name),
                duration,
                head: self.head.get(),
                bytes_in: self.upload.bytes(),
                bytes_out: self.sent.get(),
                complete: self.complete.get(),
                attempts: self.attempts.get(),
                fallback: self
                    .fallback
                    .get()
                    .map(|(service, reason)| (&*self.snapshot().upstreams[service].name, FALLBACKS[reason])),
                cache: self.cache.get().map(Served::word),
                limit: self.limit.get().map(TimeLimit::word),
                error: failure.as_ref().map(|(kind, _)| kind.word()),
                detail: failure.as_ref().map_or("", |(_, detail)| detail),
            });
        });
    }
}

/// All of them, in hundredths of a percent.
const EVERYTHING: u16 = 10_000;

/// The network of an address: what is told of a client that is not told.
fn network_of(address: IpAddr) -> IpAddr {
    let length = if address.is_ipv4() { 24 } else { 48 };
    ipnet::IpNet::new(address, length).map_or(address, |net| net.network())
}

/// A path of which only that is told which the route's pattern says: who is not routed yet is told nothing of.
fn masked(key: &[u8], pattern: &str) -> String {
    let mut pattern = pattern.split('/').skip(1);
    let mut out = String::with_capacity(pattern.size_hint().0 + key.len());
    for _ in key.split(|byte| *byte == b'/').filter(|segment| !segment.is_empty()) {
        out.push('/');
        out.push_str(pattern.next().filter(|part| !part.starts_with('{') && *part != "**").unwrap_or("*"));
    }
    if out.is_empty() { "/".to_owned() } else { out }
}

/// What a span says of a text that clients write, at most.
const TOLD: usize = 1024;

fn cut(text: &str) -> String {
    let end = text.char_indices().map(|(at, _)| at).find(|at| *at >= TOLD).unwrap_or(text.len());
    text[..end].to_owned()
}

fn outcome_of(status: u16) -> Outcome {
    match status {
        500.. => Outcome::Failed,
        400.. => Outcome::ClientError,
        _ => Outcome::Good,
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.finish();
        if let Some(parts) = self.parts.take() {
            reuse_map(parts.headers);
        }
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
