//! What the file says of the systems behind the gateway: where they are, and how they are spared.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Deserialize;

use super::{
    file::KeySource,
    values::{OrNone, Share, ShortForm, Span, short_or_full, short_or_full_schema},
};

/// A system behind the gateway. One of `url`, `urls`, `dns` and `srv` says where it is.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct UpstreamConfig {
    /// `http://host:port` or `https://host:port`, without a path. The name that a certificate must have is the host written here.
    pub url: Option<String>,
    /// Several endpoints that answer alike, each written like `url`.
    pub urls: Vec<String>,
    /// A name whose addresses are the endpoints, with a port: `orders.svc:9001`, or `https://orders.svc:9001`. Asked again when the records' TTL is over.
    pub dns: Option<String>,
    /// A name whose SRV records (RFC 2782) are the endpoints: `_http._tcp.orders.svc`, or `https://_http._tcp.orders.svc`. Of several priorities the lowest is used; weights are ignored.
    pub srv: Option<String>,
    /// A PEM file with the certificate authorities to trust for `https://`, relative to the main file. Default: the system's.
    pub ca: Option<String>,
    /// Which endpoint gets a request.
    #[schemars(extend("default" = "p2c"))]
    pub balance: Balance,
    /// What `ring_hash` keeps together; the first that the request has counts: `cookie:NAME`, `header:NAME` or `ip`.
    #[schemars(extend("default" = ["ip"]))]
    pub hash_by: Vec<KeySource>,
    /// Active health checks. Short form: the path. Default: none.
    #[serde(deserialize_with = "optional_health")]
    #[schemars(schema_with = "health_schema")]
    pub health: Option<HealthConfig>,
    /// Passive health: an endpoint that fails is left out for a while. Default: on, with the defaults of [outlier](#outlier), where there are several endpoints.
    pub outlier: Option<OrNone<OutlierConfig>>,
    /// How long an endpoint that is new or comes back takes to get its full share, from a tenth of it. `0s` switches it off.
    #[schemars(extend("default" = "10s"))]
    pub slow_start: Span,
    /// The circuit breaker. Default: on, with the defaults of [breaker](#breaker); for `legacy` it is `none`, since an open breaker would close the whole site.
    pub breaker: Option<OrNone<BreakerConfig>>,
    /// Requests in flight at a time, over all workers, exactly; those beyond wait. Default: no limit but `connections`.
    pub max_requests: Option<u32>,
    /// Requests that may wait for a place; those beyond are answered 503 at once (the default is Envoy's).
    pub max_pending: u32,
    /// How long one may wait for a place before it is answered 503.
    #[schemars(extend("default" = "5s"))]
    pub pending_timeout: Span,
    /// The connections kept to it.
    pub connections: ConnectionsConfig,
    /// What is spoken to it.
    #[schemars(extend("default" = "http1"))]
    pub protocol: Protocol,
}

/// What is spoken to an upstream.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// HTTP/1.1.
    #[default]
    Http1,
}

impl Default for UpstreamConfig {
    fn default() -> Self {
        Self {
            url: None,
            urls: Vec::new(),
            dns: None,
            srv: None,
            ca: None,
            balance: Balance::default(),
            hash_by: vec![KeySource::Ip],
            health: None,
            outlier: None,
            slow_start: Span::secs(10),
            breaker: None,
            max_requests: None,
            max_pending: 1024,
            pending_timeout: Span::secs(5),
            connections: ConnectionsConfig::default(),
            protocol: Protocol::default(),
        }
    }
}

fn optional_health<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<HealthConfig>, D::Error> {
    short_or_full(deserializer).map(Some)
}

fn health_schema(generator: &mut SchemaGenerator) -> Schema {
    short_or_full_schema::<HealthConfig>(generator)
}

/// Which endpoint gets a request.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The better of two drawn at random, by peak EWMA: its latency, of which a peak counts at once and is forgotten slowly, times its requests in flight.
    #[default]
    P2c,
    /// One after the other.
    RoundRobin,
    /// By what `hash_by` says, so that the same goes to the same (consistent hashing).
    RingHash,
}

/// Active health checks: `GET` of a path. A status of 200 to 399 is good.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct HealthConfig {
    /// The path asked.
    pub path: String,
    /// How often.
    #[serde(default = "five_seconds")]
    #[schemars(extend("default" = "5s"))]
    pub every: Span,
    /// How long an answer may take, connecting included.
    #[serde(default = "one_second")]
    #[schemars(extend("default" = "1s"))]
    pub timeout: Span,
    /// Good answers in a row until an endpoint that was out is in again.
    #[serde(default = "two")]
    pub healthy_after: u32,
    /// Bad ones in a row until it is out.
    #[serde(default = "three")]
    pub unhealthy_after: u32,
}

fn five_seconds() -> Span {
    Span::secs(5)
}

fn one_second() -> Span {
    Span::secs(1)
}

fn two() -> u32 {
    2
}

fn three() -> u32 {
    3
}

impl ShortForm for HealthConfig {
    const WHAT: &'static str =
        "a path like `/healthz`, or a map with `path`, `every`, `timeout`, `healthy_after`, `unhealthy_after`";
    fn from_short(text: &str) -> Result<Self, String> {
        Ok(Self {
            path: text.to_owned(),
            every: five_seconds(),
            timeout: one_second(),
            healthy_after: two(),
            unhealthy_after: three(),
        })
    }
}

/// Outlier detection (the defaults are Envoy's): what fails so often in a row is left out for a while.
///
/// Where more than half of the endpoints would be out, all are used again.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct OutlierConfig {
    /// Failures in a row: statuses of 500 and above but 501, connections that fail or break, and time limits.
    pub consecutive_5xx: u32,
    /// How long an endpoint must have been in again until its next ejection is one step shorter.
    #[schemars(extend("default" = "10s"))]
    pub interval: Span,
    /// How long it is out the first time; the second time twice as long, and so on up to 5 minutes.
    #[schemars(extend("default" = "30s"))]
    pub base_ejection: Span,
    /// The share of endpoints that may be out at a time; one may always.
    #[schemars(extend("default" = "10%"))]
    pub max_ejected: Share,
}

impl Default for OutlierConfig {
    fn default() -> Self {
        Self { consecutive_5xx: 5, interval: Span::secs(10), base_ejection: Span::secs(30), max_ejected: Share(1_000) }
    }
}

/// The circuit breaker: an upstream that fails too often is left alone for a while.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct BreakerConfig {
    /// The share of failed tries in the window at which it opens: statuses of 500 and above but 501, connections that fail or break, also in the middle of a body, and time limits.
    #[schemars(extend("default" = "50%"))]
    pub failure_ratio: Share,
    /// Tries in the window before it may open.
    pub min_requests: u32,
    /// How far back it looks.
    #[schemars(extend("default" = "10s"))]
    pub window: Span,
    /// How long it stays open.
    #[schemars(extend("default" = "5s"))]
    pub open_for: Span,
    /// Then so many tries are let through; when all succeed it closes, when one fails it opens again.
    pub half_open_requests: u32,
    /// A response whose head takes longer counts as a failure. Default: none.
    #[schemars(extend("default" = "0s"))]
    pub slow_call: Span,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        Self {
            failure_ratio: Share(5_000),
            min_requests: 20,
            window: Span::secs(10),
            open_for: Span::secs(5),
            half_open_requests: 3,
            slow_call: Span::secs(0),
        }
    }
}

/// A pool of connections.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct ConnectionsConfig {
    /// How many at most, divided among the workers and rounded up. Requests beyond wait like those beyond `max_requests`.
    pub max: u32,
    /// How long an unused one is kept.
    #[schemars(extend("default" = "90s"))]
    pub idle: Span,
    /// How old one may grow before it is no longer reused.
    #[schemars(extend("default" = "10m"))]
    pub max_age: Span,
    /// How long connecting may take, the name lookup and TLS included.
    #[schemars(extend("default" = "1s"))]
    pub connect_timeout: Span,
}

impl Default for ConnectionsConfig {
    fn default() -> Self {
        Self { max: 1024, idle: Span::secs(90), max_age: Span::secs(600), connect_timeout: Span::secs(1) }
    }
}

/// A rate: `100/s`, `5000/m`, `10/h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// How many.
    pub count: u32,
    /// In so many seconds.
    pub seconds: u32,
}

impl std::str::FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("not a rate: `{text}`; write it like `100/s`, `5000/m` or `10/h`");
        let (count, unit) = text.split_once('/').ok_or_else(wrong)?;
        let seconds = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return Err(wrong()),
        };
        let digits = !count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit());
        let count =
            count.parse().ok().filter(|count| digits && (1..=1_000_000_000).contains(count)).ok_or_else(wrong)?;
        Ok(Self { count, seconds })
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let unit = match self.seconds {
            1 => "s",
            60 => "m",
            _ => "h",
        };
        write!(f, "{}/{unit}", self.count)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Rate {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Rate".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({"type": "string", "title": "a rate like `100/s`", "pattern": r"^[0-9]+/[smh]$|\$\{"})
    }
}
