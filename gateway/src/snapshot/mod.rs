//! What runs: a checked file, compiled so that no request formats, hashes or looks up what could be known before.
//!
//! A [`Snapshot`] never changes; a request keeps the one that it began with to its end, so
//! no request sees half a flip. What must outlive it (counters, upstreams and with
//! them their pools) belongs to the registry in `store`.

mod compile;
pub mod diff;
pub mod explain;
mod store;
pub mod traffic;

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use ipnet::IpNet;
use tokio::time::Instant;

pub use self::{
    compile::compile,
    store::{OpenError, Registry, Reloaded, Status, Store},
};
use crate::{
    auth::{Verifier, cors::Cors},
    cache::Cache,
    config::{
        Stage,
        file::HostRewrite,
        policy::FallbackOn,
        rollout::{RolloutConfig, WebhookConfig},
    },
    fields::ClaimFields,
    resilience::{gcra::Limiter, learned::Learned},
    rollout::overlay::Overlay,
    routing::{cohort::Cohort, key::Key, path::PathPolicy, table::Table},
    shadow::Shadow,
    telemetry::{metrics::RouteStats, trace::Tracer},
    upstream::{Upstream, rewrite::Addresses},
};

/// Everything that runs.
#[derive(Debug)]
pub struct Snapshot {
    /// Counts up with each reload.
    pub generation: u64,
    /// Of the text of all files.
    pub hash: u64,
    /// When it was loaded.
    pub loaded: jiff::Timestamp,
    /// The compiled rules; a rule's index is its route's.
    pub table: Table,
    /// The routes, and last the implicit one for what no route claims.
    pub routes: Vec<Route>,
    /// The upstreams.
    pub upstreams: Vec<Arc<Upstream>>,
    /// The addresses that clients must not see.
    pub addresses: Addresses,
    /// The verifiers.
    pub verifiers: Vec<Arc<Verifier>>,
    /// The fields in which upstreams are told what tokens claim.
    pub claim_fields: Arc<ClaimFields>,
    /// The names of the gateway's own cookies.
    pub own_cookies: Vec<Box<str>>,
    /// Whether any route says what pages of other origins may do.
    pub cors: bool,
    /// What is kept, where any route keeps something.
    pub cache: Option<Arc<Cache>>,
    /// How paths are read.
    pub paths: PathPolicy,
    /// Whose forwarding headers are believed.
    pub trusted_proxies: Vec<IpNet>,
    /// What SIGTERM does.
    pub drain: Drain,
    /// Limits of clients' connections.
    pub clients: ClientLimits,
    /// The listeners.
    pub listeners: Listeners,
    /// The name servers asked for `dns:` and `srv:`; the system's where there are none.
    pub resolver: Vec<SocketAddr>,
    /// Whether what clients ask for is learned.
    pub inventory: bool,
    /// How long the monolith must be silent before `retired` is proposed.
    pub retire_after: Duration,
    /// Where the access log goes, and what is in it.
    pub access_log: AccessLog,
    /// Who takes traces, if anybody does.
    pub tracer: Option<Arc<Tracer>>,
    /// Who is told of changes.
    pub webhooks: Vec<WebhookConfig>,
    /// The token of the admin listener.
    pub admin_token: Option<Box<str>>,
}

/// The addresses to listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listeners {
    /// Clients.
    pub public: SocketAddr,
    /// API and metrics.
    pub admin: SocketAddr,
    /// Probes.
    pub health: Option<SocketAddr>,
}

/// What SIGTERM does.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// How long to go on accepting.
    pub delay: Duration,
    /// How long what is in flight may take.
    pub limit: Duration,
}

/// Limits of clients' connections.
#[derive(Clone, Copy, Debug)]
pub struct ClientLimits {
    /// Connections at a time.
    pub max_connections: i64,
    /// Requests at a time on one HTTP/2 connection.
    pub max_streams: u32,
    /// Requests at a time, of all clients together.
    pub max_requests: i64,
    /// The bytes of a request's head.
    pub max_header: usize,
    /// The bytes of a request's target.
    pub max_uri: usize,
    /// How long a head may take.
    pub header_timeout: Duration,
    /// How long a connection may wait for a request.
    pub keep_alive: Duration,
}

impl Listeners {
    /// Those that there are.
    pub fn all(&self) -> Vec<SocketAddr> {
        [Some(self.public), Some(self.admin), self.health].into_iter().flatten().collect()
    }
}

impl Snapshot {
    /// The index of the implicit route.
    pub fn unrouted(&self) -> usize {
        self.routes.len() - 1
    }

    /// Whether a peer's forwarding headers are believed.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|net| net.contains(&peer))
    }
}

/// A route that runs.
#[derive(Debug)]
pub struct Route {
    /// Its name in logs, metrics and commands.
    pub name: Arc<str>,
    /// Its path, as written.
    pub path: Box<str>,
    /// Its stage.
    pub stage: Stage,
    /// What its progress is counted under.
    pub tags: Vec<Box<str>>,
    /// The index of its service.
    pub service: Option<usize>,
    /// The index of what stands in for the monolith.
    pub baseline: usize,
    /// Whose requests the service answers, at stage `canary`.
    pub cohort: Option<CohortValues>,
    /// What runs differently from what the file says.
    pub overlay: Overlay,
    /// Copies of its requests for the service.
    pub shadow: Option<Arc<Shadow>>,
    /// The steps of its rollout, and what they hang on.
    pub rollout: Option<Arc<RolloutConfig>>,
    /// Its time limits.
    pub limits: Limits,
    /// What is tried again.
    pub retry: Option<Retry>,
    /// When the monolith answers in the service's place.
    pub fallback: Option<Fallback>,
    /// How much of a body is kept so that it can be sent again.
    pub replay_body: usize,
    /// How many requests are let through.
    pub rate_limit: Option<RateLimit>,
    /// Who may ask.
    pub auth: Option<Auth>,
    /// What pages of other origins may do.
    pub cors: Option<Cors>,
    /// What is kept.
    pub cache: Option<Keep>,
    /// Of what the file says about its requests: an answer to a request of another shape is another answer.
    pub shape: Box<[u8]>,
    /// How the service's requests differ.
    pub rewrite: Option<Rewrite>,
    /// Edits of the request's fields.
    pub edit_request: Edits,
    /// Edits of the response's fields.
    pub edit_response: Edits,
    /// Whether a client may upgrade to a WebSocket.
    pub websocket: bool,
    /// The largest request body.
    pub max_body: u64,
    /// The fields of a 410.
    pub gone: HeaderMap,
    /// What is counted of it.
    pub stats: Arc<RouteStats>,
}

/// A cohort with what is said about it.
#[derive(Debug)]
pub struct CohortValues {
    /// Who is in.
    pub cohort: Cohort,
    /// `x-gateway-cohort` for the monolith and for the service.
    pub header: [HeaderValue; 2],
    /// The member of `baggage` for the monolith and for the service.
    pub baggage: [HeaderValue; 2],
}

/// Where the access log goes, and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessLog {
    /// Where to.
    pub to: LogTo,
    /// The share of requests that went well of which there is a line, of 10,000.
    pub sample: u16,
    /// What is not told.
    pub redact: Redact,
}

/// Where the access log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTo {
    /// Nowhere.
    Nowhere,
    /// Standard output.
    Stdout,
    /// A file, to which lines are added.
    File(PathBuf),
}

/// What the access log does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Redact {
    /// The client's address; its network is told.
    pub client: bool,
    /// What varies in the path.
    pub path: bool,
    /// The host.
    pub host: bool,
}

/// Time limits; none where switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Over all tries.
    pub request: Option<Duration>,
    /// Of one try.
    pub attempt: Option<Duration>,
    /// Of each pause of a body.
    pub idle: Option<Duration>,
}

/// What is tried again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Tries beside the first.
    pub retries: u32,
    /// Where there was no connection.
    pub connect: bool,
    /// Where it broke before a response.
    pub reset: bool,
    /// Statuses.
    pub statuses: Vec<StatusCode>,
    /// The longest first pause.
    pub base: Duration,
    /// The longest pause.
    pub max: Duration,
    /// The share of an upstream's requests that may be retries, of 10,000.
    pub budget: u16,
    /// Whether `Idempotency-Key` makes a request idempotent.
    pub keys_honoured: bool,
}

/// When the monolith answers in the service's place.
#[derive(Debug)]
pub struct Fallback {
    /// The reasons.
    pub when: Vec<FallbackOn>,
    /// Whether both systems know each other's idempotency keys.
    pub keys_shared: bool,
    /// What the service was seen not to have.
    pub learned: Arc<Learned>,
}

impl Fallback {
    /// Whether absences are learned.
    pub fn learns(&self) -> bool {
        self.on(FallbackOn::NotFound) || self.on(FallbackOn::NotImplemented)
    }

    /// Whether this is a reason.
    pub fn on(&self, reason: FallbackOn) -> bool {
        self.when.contains(&reason)
    }
}

/// How many requests are let through.
#[derive(Debug)]
pub struct RateLimit {
    /// Whether the route itself says so, and not `defaults`.
    pub own: bool,
    /// What is counted; all requests together where there is nothing.
    pub per: Option<Key>,
    /// Since when its time is counted.
    pub begin: Instant,
    /// Who has used how much.
    pub limiter: Arc<Limiter>,
    /// The policy's name, quoted.
    pub name: Box<str>,
    /// `RateLimit-Policy`.
    pub policy: HeaderValue,
}

/// Who may ask.
#[derive(Debug)]
pub struct Auth {
    /// Whose tokens are taken.
    pub verifier: Arc<Verifier>,
    /// Scopes that a token must all have.
    pub scopes: Vec<Box<str>>,
    /// Claims, and the fields that carry them on.
    pub forward: Vec<(Box<str>, HeaderName)>,
    /// Whether the token goes on.
    pub forward_token: bool,
}

/// What is kept of a route's answers, where they do not say it themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// How long one is fresh.
    pub ttl: Duration,
    /// For how long it may be served while a new one is fetched.
    pub while_revalidate: Duration,
    /// For how long it may be served where the upstream fails.
    pub if_error: Duration,
    /// How long a request waits for another that asks for the same.
    pub collapse: Duration,
}

/// How a service's requests differ from the client's.
#[derive(Debug)]
pub struct Rewrite {
    /// The prefix that it does not see, in its matched form.
    pub prefix: Vec<Box<[u8]>>,
    /// The same as written.
    pub prefix_text: Option<Box<str>>,
    /// The same for `X-Forwarded-Prefix`.
    pub prefix_header: Option<HeaderValue>,
    /// Whose host it sees.
    pub host: HostRewrite,
}

/// Edits of one header section, in this order.
#[derive(Debug, Default)]
pub struct Edits {
    /// Fields to take away.
    pub remove: Vec<HeaderName>,
    /// Fields to replace.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Fields to add.
    pub add: Vec<(HeaderName, HeaderValue)>,
}

impl Route {
    /// The stage as it runs: put back, it is the monolith's.
    pub fn runs(&self) -> Stage {
        if self.overlay.is_back() { Stage::Legacy } else { self.stage }
    }

    /// The share as it runs.
    pub fn share(&self) -> Option<u16> {
        self.cohort
            .as_ref()
            .map(|values| if self.overlay.is_back() { 0 } else { self.overlay.share(values.cohort.share) })
    }
}

impl Edits {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.set.is_empty() && self.add.is_empty()
    }

    /// Whether they say something about a field.
    pub fn name(&self, name: &HeaderName) -> bool {
        let pairs = self.set.iter().chain(&self.add).map(|(name, _)| name);
        self.remove.iter().chain(pairs).any(|known| known == name)
    }

    /// Applies them.
    pub fn apply(&self, headers: &mut HeaderMap) {
        for name in &self.remove {
            headers.remove(name);
        }
        for (name, value) in &self.set {
            headers.insert(name, value.clone());
        }
        for (name, value) in &self.add {
            headers.append(name, value.clone());
        }
    }
}
