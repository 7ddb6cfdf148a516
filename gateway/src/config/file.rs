//! What the file says: one strict type per map of the language, no logic.
//!
//! The doc comments here are the reference: the JSON Schema and
//! `docs/configuration.md` are made from them. A key stands here only when the
//! behaviour behind it exists.

use std::{borrow::Cow, collections::BTreeMap};

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer};

use super::{
    auth::{AuthConfig, CorsConfig, VerifierConfig},
    cache::{CacheConfig, RouteCacheConfig},
    policy::{FallbackConfig, RateLimitConfig, RetryConfig},
    rollout::{RolloutConfig, ShadowConfig, WebhookConfig},
    telemetry::{AccessLogConfig, InventoryConfig, TracingConfig},
    upstream::UpstreamConfig,
    values::{OrNone, Share, ShortForm, Size, Span, short_or_full, short_or_full_schema},
};

/// routes.yaml: who answers what, today.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FileConfig {
    /// The version of the language: 1.
    pub version: u32,
    /// Where clients connect: HTTP/1.1, and HTTP/2 with prior knowledge.
    pub listen: String,
    /// The admin listener: API and metrics. Short form: the address.
    #[serde(deserialize_with = "short_or_full")]
    #[schemars(schema_with = "short_or_full_schema::<AdminConfig>")]
    pub admin: AdminConfig,
    /// An address with `/healthz` and `/readyz` alone, without a token, for probes. Default: none.
    pub health: Option<String>,
    /// Networks whose `Forwarded` and `X-Forwarded-*` are believed. Default: nobody's.
    pub trusted_proxies: Vec<String>,
    /// Whether paths match without regard to case, for monoliths that read them so.
    pub case_insensitive: bool,
    /// Spellings in paths that are let through although upstreams may read them differently. Default: none, they are answered 400.
    pub allow_in_paths: Vec<AllowInPaths>,
    /// The folder of what must outlive the process: steps of rollouts, rollbacks, their history, the inventory, the progress. Relative to this file. It belongs to one gateway.
    pub state: String,
    /// One JSON line a request. Short form: where it goes, `stdout`, `none` or a file.
    #[serde(deserialize_with = "short_or_full")]
    #[schemars(schema_with = "short_or_full_schema::<AccessLogConfig>")]
    pub access_log: AccessLogConfig,
    /// What clients ask for, learned: endpoints as templates. `none` learns nothing.
    pub inventory: OrNone<InventoryConfig>,
    /// Traces for OpenTelemetry. Default: none.
    pub tracing: Option<TracingConfig>,
    /// Who is told of each change of a share: a `POST` of JSON, tried again where it fails.
    pub webhooks: Vec<WebhookConfig>,
    /// More files with `routes:` and `upstreams:`, as glob patterns relative to this file; part of the same all-or-nothing.
    pub include: Vec<String>,
    /// What SIGTERM does.
    pub drain: DrainConfig,
    /// What clients may ask of the gateway's own resources.
    pub clients: ClientsConfig,
    /// Name servers for `dns:` and `srv:`, as addresses with a port. Default: the system's.
    pub resolver: Vec<String>,
    /// The systems behind the gateway, by name. `legacy`, the monolith, is required: whatever no route claims is its.
    pub upstreams: BTreeMap<String, UpstreamConfig>,
    /// Verifiers of tokens, by name, for routes to name in `auth: {jwt: NAME}`.
    pub auth: BTreeMap<String, VerifierConfig>,
    /// Where answers are kept, for the routes that say `cache:`.
    pub cache: CacheConfig,
    /// Policies for every route and for what no route claims. A policy of a route replaces the one here whole.
    pub defaults: DefaultsConfig,
    /// The routes. Their order means nothing: the most specific match wins.
    pub routes: Vec<RouteConfig>,
}

impl Default for FileConfig {
    fn default() -> Self {
        Self {
            version: 1,
            listen: "0.0.0.0:8080".to_owned(),
            admin: AdminConfig::default(),
            health: None,
            trusted_proxies: Vec::new(),
            case_insensitive: false,
            allow_in_paths: Vec::new(),
            state: "state".to_owned(),
            access_log: AccessLogConfig::default(),
            inventory: OrNone::Some(InventoryConfig::default()),
            tracing: None,
            webhooks: Vec::new(),
            include: Vec::new(),
            drain: DrainConfig::default(),
            clients: ClientsConfig::default(),
            resolver: Vec::new(),
            upstreams: BTreeMap::new(),
            auth: BTreeMap::new(),
            cache: CacheConfig::default(),
            defaults: DefaultsConfig::default(),
            routes: Vec::new(),
        }
    }
}

/// An included file: `routes:` and `upstreams:`, nothing else.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IncludedConfig {
    /// More upstreams.
    pub upstreams: BTreeMap<String, UpstreamConfig>,
    /// More routes.
    pub routes: Vec<RouteConfig>,
}

/// The admin listener. An address that is not loopback needs a token.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// The address.
    pub listen: String,
    /// The bearer token that each call must bring. Empty: none, on loopback only.
    pub token: String,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { listen: "127.0.0.1:9901".to_owned(), token: String::new() }
    }
}

impl ShortForm for AdminConfig {
    const WHAT: &'static str = "an address like `127.0.0.1:9901`, or a map with `listen` and `token`";
    fn from_short(text: &str) -> Result<Self, String> {
        Ok(Self { listen: text.to_owned(), ..Self::default() })
    }
}

/// A spelling in a path that upstreams read differently.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum AllowInPaths {
    /// `%2f`; matched as `/`.
    EncodedSlash,
    /// `\`; matched as `/`.
    Backslash,
    /// `%5c`; matched as `/`.
    EncodedBackslash,
    /// `%00` to `%1f` and `%7f`; matched as such.
    EncodedControl,
    /// `.;` and `..;`; matched as dot segments.
    DotParams,
    /// A `%` that two hexadecimal digits do not follow, and overlong UTF-8; matched as such.
    BadEscape,
}

/// At SIGTERM: readiness fails, `delay` passes, listeners close, and what is in flight finishes within `limit`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainConfig {
    /// How long to go on accepting after readiness fails, for balancers to notice.
    #[schemars(extend("default" = "0s"))]
    pub delay: Span,
    /// How long requests in flight may take to finish.
    #[schemars(extend("default" = "30s"))]
    pub limit: Span,
}

impl Default for DrainConfig {
    fn default() -> Self {
        Self { delay: Span::secs(0), limit: Span::secs(30) }
    }
}

/// Limits of clients' connections. A change holds for new connections.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClientsConfig {
    /// Connections at a time, at most; those beyond are closed at once, and counted.
    pub max_connections: u32,
    /// Requests at a time on one HTTP/2 connection, at most.
    pub max_streams: u32,
    /// Requests at a time, of all clients together; those beyond are answered 503 before anything is done for them.
    pub max_requests: u32,
    /// A request's head, at most; a larger one is answered 431. A head has at most 100 fields.
    #[schemars(extend("default" = "64KiB"))]
    pub max_header: Size,
    /// A request's target, at most; a longer one is answered 414.
    #[schemars(extend("default" = "16KiB"))]
    pub max_uri: Size,
    /// How long a head may take from its first byte to its last; a later one is answered 408.
    #[schemars(extend("default" = "10s"))]
    pub header_timeout: Span,
    /// How long a connection may wait for its first or next request.
    #[schemars(extend("default" = "75s"))]
    pub keep_alive: Span,
}

impl Default for ClientsConfig {
    fn default() -> Self {
        Self {
            max_connections: 50_000,
            max_streams: 128,
            max_requests: 50_000,
            max_header: Size(64 * 1024),
            max_uri: Size(16 * 1024),
            header_timeout: Span::secs(10),
            keep_alive: Span::secs(75),
        }
    }
}

/// Policies for every route.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DefaultsConfig {
    /// Time limits.
    pub timeout: Option<OrNone<TimeoutConfig>>,
    /// Retries. Default: `{retries: 1, when: [connect, reset]}`; a policy without `when` adds 502, 503 and 504.
    pub retry: Option<OrNone<RetryConfig>>,
    /// When the monolith answers in the service's place. Default: when the service is unavailable.
    pub fallback: Option<OrNone<FallbackConfig>>,
    /// How much of a request's body is kept so that it can be sent again. Default: `64KiB`.
    pub replay_body: Option<OrNone<Size>>,
    /// How many requests are let through. Default: all.
    pub rate_limit: Option<OrNone<RateLimitConfig>>,
    /// Who may ask. Default: anybody.
    pub auth: Option<OrNone<AuthConfig>>,
    /// What pages of other origins may do. Default: what the upstream says.
    pub cors: Option<OrNone<CorsConfig>>,
    /// Which answers are kept. Default: none.
    pub cache: Option<OrNone<RouteCacheConfig>>,
    /// Header edits.
    pub headers: Option<OrNone<HeadersConfig>>,
    /// Protocols that a client may upgrade to. Default: `[websocket]`.
    pub upgrades: Option<OrNone<Vec<Upgrade>>>,
    /// The largest request body. Default: no limit; bodies are never held in memory.
    pub max_body: Option<OrNone<Size>>,
}

/// Time limits of a request. `0s` switches one off.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct TimeoutConfig {
    /// From the end of the request to the response's headers, over all tries.
    #[schemars(extend("default" = "30s"))]
    pub request: Span,
    /// The same for one try.
    #[schemars(extend("default" = "0s"))]
    pub attempt: Span,
    /// Each pause of a body, in either direction, and of a tunnel.
    #[schemars(extend("default" = "60s"))]
    pub idle: Span,
}

impl Default for TimeoutConfig {
    fn default() -> Self {
        Self { request: Span::secs(30), attempt: Span::secs(0), idle: Span::secs(60) }
    }
}

impl TimeoutConfig {
    /// No limit at all: what `timeout: none` stands for.
    pub const NONE: Self = Self { request: Span::secs(0), attempt: Span::secs(0), idle: Span::secs(0) };
}

/// Header edits, on both arms of a route.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct HeadersConfig {
    /// Edits of the request that an upstream gets.
    pub request: EditConfig,
    /// Edits of the response that the client gets.
    pub response: EditConfig,
}

/// Edits of one header section: `remove`, then `set`, then `add`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct EditConfig {
    /// Fields to give exactly this value.
    pub set: BTreeMap<String, String>,
    /// Fields to add beside what is there.
    pub add: BTreeMap<String, String>,
    /// Fields to take away.
    pub remove: Vec<String>,
}

/// A protocol that a client may upgrade to. Nothing else is ever upgraded; h2c never.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Upgrade {
    /// RFC 6455.
    Websocket,
}

/// Who answers some of the paths.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RouteConfig {
    /// The route's name in logs, metrics and commands. Default: the path. Required with `canary`, whose cohorts hang on it.
    pub name: Option<String>,
    /// Which requests. Short form: the path.
    #[serde(rename = "match", deserialize_with = "short_or_full")]
    #[schemars(schema_with = "short_or_full_schema::<MatchConfig>")]
    pub matching: MatchConfig,
    /// What its progress is counted under beside the whole: teams, parts of the system.
    #[serde(default)]
    pub tags: Vec<String>,
    /// Decides where two rules overlap and neither is more specific: the higher number wins.
    #[serde(default)]
    pub priority: i32,
    /// The service. Required unless the stage is `legacy` or `gone`.
    pub upstream: Option<String>,
    /// What stands in for the monolith on this route. Default: `legacy`.
    pub baseline: Option<String>,
    /// The one word that you flip.
    #[serde(default)]
    #[schemars(extend("default" = "legacy"))]
    pub stage: Stage,
    /// The cohort that the service answers. Required when the stage is `canary`.
    pub canary: Option<CanaryConfig>,
    /// How the cohort grows by itself, on evidence; instead of `canary.percent`.
    pub rollout: Option<RolloutConfig>,
    /// Copies of the monolith's requests for the service, at stage `shadow` (where it may be left out) and at stage `canary`.
    pub shadow: Option<OrNone<ShadowConfig>>,
    /// What the 410 of stage `gone` says.
    pub gone: Option<GoneConfig>,
    /// Time limits.
    pub timeout: Option<OrNone<TimeoutConfig>>,
    /// Retries. Default: `{retries: 1, when: [connect, reset]}`; a policy without `when` adds 502, 503 and 504.
    pub retry: Option<OrNone<RetryConfig>>,
    /// When the monolith answers in the service's place. Default: when the service is unavailable.
    pub fallback: Option<OrNone<FallbackConfig>>,
    /// How much of a request's body is kept so that it can be sent again. Default: `64KiB`.
    pub replay_body: Option<OrNone<Size>>,
    /// How many requests are let through. Default: all.
    pub rate_limit: Option<OrNone<RateLimitConfig>>,
    /// Who may ask. Default: anybody. Falling through to a less specific route does not shed it.
    pub auth: Option<OrNone<AuthConfig>>,
    /// What pages of other origins may do. Default: what the upstream says.
    pub cors: Option<OrNone<CorsConfig>>,
    /// Which answers are kept. Default: none.
    pub cache: Option<OrNone<RouteCacheConfig>>,
    /// How the service's requests differ from the client's. The monolith always gets the request as it came.
    pub rewrite: Option<RewriteConfig>,
    /// Header edits.
    pub headers: Option<OrNone<HeadersConfig>>,
    /// Protocols that a client may upgrade to.
    pub upgrades: Option<OrNone<Vec<Upgrade>>>,
    /// The largest request body.
    pub max_body: Option<OrNone<Size>>,
}

/// Which requests a route takes: all that is given must hold.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MatchConfig {
    /// `/orders` is exact, `/orders/{id}` takes one segment, `/orders/**` takes `/orders` and all below it.
    pub path: String,
    /// Default: every method.
    #[serde(default)]
    pub methods: Vec<String>,
    /// Host names, exact or `*.example.com`. Default: every host.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// Header fields and their exact values.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Query parameters and their exact values.
    #[serde(default)]
    pub query: BTreeMap<String, String>,
}

impl ShortForm for MatchConfig {
    const WHAT: &'static str = "a path like `/orders/**`, or a map with `path`, `methods`, `hosts`, `headers`, `query`";
    fn from_short(text: &str) -> Result<Self, String> {
        Ok(Self {
            path: text.to_owned(),
            methods: Vec::new(),
            hosts: Vec::new(),
            headers: BTreeMap::new(),
            query: BTreeMap::new(),
        })
    }
}

/// Who answers a route.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq, Hash)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The monolith.
    #[default]
    Legacy,
    /// The monolith; the service gets copies, and the answers are compared.
    Shadow,
    /// The service for its cohort, the monolith for the rest.
    Canary,
    /// The service.
    Migrated,
    /// The service alone; the monolith's code may be deleted. A request that the route's predicates refuse is answered 405, never by the monolith.
    Retired,
    /// The gateway: 410.
    Gone,
}

impl Stage {
    /// The word in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Shadow => "shadow",
            Self::Canary => "canary",
            Self::Migrated => "migrated",
            Self::Retired => "retired",
            Self::Gone => "gone",
        }
    }

    /// Whether some of the route's requests go to its service.
    pub fn uses_service(self) -> bool {
        matches!(self, Self::Canary | Self::Migrated | Self::Retired)
    }

    /// Whether the monolith has no part in the route's requests any more.
    pub fn is_alone(self) -> bool {
        matches!(self, Self::Migrated | Self::Retired | Self::Gone)
    }

    /// Whether the route needs a service.
    pub fn names_service(self) -> bool {
        self.uses_service() || self == Self::Shadow
    }

    /// Whether nothing less specific may answer in the route's place.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Retired | Self::Gone)
    }
}

/// The cohort of a canary. Raising the share never moves anybody back.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CanaryConfig {
    /// The share of keys whose requests the service answers, in steps of 0.01%. Required unless the route has a `rollout:`.
    pub percent: Option<Share>,
    /// Where a request's key comes from; the first that the request has counts: `claim:NAME` (of the route's verified token), `cookie:NAME`, `header:NAME`, `ip`, or `sticky`, a cookie that the gateway sets once, so that only new sessions move. A request without a key is the monolith's. Default: `[claim:sub]` where the route has `auth:`; else required.
    #[serde(default)]
    pub by: Vec<KeySource>,
    /// Requests that the service answers whatever their key.
    #[serde(default)]
    pub always: Vec<PredicateConfig>,
    /// Requests that the monolith answers whatever their key; stronger than `always`.
    #[serde(default)]
    pub never: Vec<PredicateConfig>,
    /// Routes of one group share cohorts. Default: the route's name.
    pub group: Option<String>,
}

/// Where a cohort key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A cookie's value.
    Cookie(String),
    /// A header's value.
    Header(String),
    /// A claim of the verified token.
    Claim(String),
    /// The client's address.
    Ip,
    /// The gateway's own cookie.
    Sticky,
}

impl std::str::FromStr for KeySource {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("cookie", name)) if is_token(name) => Ok(Self::Cookie(name.to_owned())),
            Some(("header", name)) if is_token(name) => Ok(Self::Header(name.to_ascii_lowercase())),
            Some(("claim", name)) if !name.is_empty() => Ok(Self::Claim(name.to_owned())),
            None if text == "ip" => Ok(Self::Ip),
            None if text == "sticky" => Ok(Self::Sticky),
            _ => Err(format!(
                "unknown cohort key: `{text}`; known: `claim:NAME`, `cookie:NAME`, `header:NAME`, `ip`, `sticky`"
            )),
        }
    }
}

impl<'de> Deserialize<'de> for KeySource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for KeySource {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "KeySource".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({"type": "string", "pattern": r"^(claim:.+|cookie:.+|header:.+|ip|sticky)$|\$\{"})
    }
}

/// Requests by what they carry: all that is given must hold.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
#[derive(Default)]
pub struct PredicateConfig {
    /// Header fields and their exact values.
    pub header: BTreeMap<String, String>,
    /// Cookies and their exact values.
    pub cookie: BTreeMap<String, String>,
    /// Claims of the route's verified token and their exact values; of a list, one of its values.
    pub claim: BTreeMap<String, String>,
}

/// What the answer of stage `gone` says.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct GoneConfig {
    /// When the resource was deprecated, as `2026-01-31` or `2026-01-31T12:00:00Z`: the `Deprecation` field (RFC 9745).
    pub deprecation: Option<String>,
    /// When it went: the `Sunset` field (RFC 8594).
    pub sunset: Option<String>,
    /// The URL of what replaces it: the `Link` field with `rel="successor-version"`.
    pub successor: Option<String>,
}

/// How the service's requests differ from the client's.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct RewriteConfig {
    /// Leading segments that the service does not see. `Location`, `Content-Location` and the `Path` of cookies get them back.
    pub strip_prefix: Option<String>,
    /// The `Host` that the service sees: the `client`'s, or the `upstream`'s own.
    pub host: HostRewrite,
}

/// The `Host` that a service sees.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum HostRewrite {
    /// The one that the client asked for.
    #[default]
    Client,
    /// The host and port of the upstream's url.
    Upstream,
}

/// Whether a text is a token of RFC 9110, as names of fields and cookies are.
pub fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}
