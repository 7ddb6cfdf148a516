//! What the file says of how a route's requests are protected: retries, fallback, rate limits.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};

use super::{
    file::is_token,
    upstream::Rate,
    values::{Share, Span},
};

/// Retries. What may have reached the upstream is tried again only where its method is idempotent (RFC 9110 §9.2.2),
/// and nothing once a response has begun.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct RetryConfig {
    /// Tries beside the first, each on another endpoint where there is one.
    pub retries: u32,
    /// What is tried again: `connect` (no connection), `reset` (the connection broke before a response), and statuses of the upstream. A time limit counts as `504`, an answer that is not HTTP as `502`.
    #[schemars(extend("default" = ["connect", "reset", 502, 503, 504]))]
    pub when: Vec<RetryOn>,
    /// The pause before a retry. None where the request was never sent and another endpoint is there.
    pub backoff: BackoffConfig,
    /// Retries per upstream in ten seconds, as a share of its requests; at least 10 a second are allowed, unless it is `0%`. What was never sent is exempt while another endpoint is healthy.
    #[schemars(extend("default" = "20%"))]
    pub budget: Share,
    #[schemars(extend("default" = "ignored"))]
    /// Whether the service honours `Idempotency-Key`: then a request that has one counts as idempotent.
    pub idempotency_key: IdempotencyKey,
}

impl Default for RetryConfig {
    fn default() -> Self {
        Self {
            retries: 1,
            when: vec![
                RetryOn::Connect,
                RetryOn::Reset,
                RetryOn::Status(502),
                RetryOn::Status(503),
                RetryOn::Status(504),
            ],
            backoff: BackoffConfig::default(),
            budget: Share(2_000),
            idempotency_key: IdempotencyKey::default(),
        }
    }
}

/// Pauses between tries: drawn between nothing and `base` times 2ⁿ − 1 before the n-th retry, at most `max`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct BackoffConfig {
    /// The longest first pause.
    #[schemars(extend("default" = "25ms"))]
    pub base: Span,
    /// The longest pause. A response whose `Retry-After` is longer is not tried again. Default: ten times `base`.
    pub max: Option<Span>,
}

impl BackoffConfig {
    /// The longest pause.
    pub fn longest(&self) -> std::time::Duration {
        self.max.map_or_else(|| self.base.0.saturating_mul(10), |max| max.0)
    }
}

impl Default for BackoffConfig {
    fn default() -> Self {
        Self { base: Span(std::time::Duration::from_millis(25)), max: None }
    }
}

/// What an upstream does with `Idempotency-Key`.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum IdempotencyKey {
    /// Nothing that could be relied on.
    #[default]
    Ignored,
    /// A second request with the same key does nothing again.
    Honoured,
}

/// What is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryOn {
    /// There was no connection.
    Connect,
    /// It broke before a response.
    Reset,
    /// A status.
    Status(u16),
}

/// A word or a status, which YAML reads as a number.
struct Word<T>(&'static str, fn(&str) -> Option<T>);

impl<T> Visitor<'_> for Word<T> {
    type Value = T;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.1)(text).ok_or_else(|| E::custom(format!("unknown condition: `{text}`; expected {}", self.0)))
    }
    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

const RETRY_WORDS: &str = "`connect`, `reset`, or a status from 400 to 599";

impl<'de> Deserialize<'de> for RetryOn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Word(RETRY_WORDS, |text| match text {
            "connect" => Some(Self::Connect),
            "reset" => Some(Self::Reset),
            _ => text.parse().ok().filter(|status| (400..=599).contains(status)).map(Self::Status),
        }))
    }
}

impl JsonSchema for RetryOn {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "RetryOn".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"title": RETRY_WORDS, "anyOf": [
            {"const": "connect"}, {"const": "reset"}, {"type": "integer", "title": "a status", "minimum": 400, "maximum": 599},
        ]})
    }
}

/// When the monolith answers in the service's place, at stage `canary` and `migrated`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct FallbackConfig {
    /// `unavailable`: the request was never sent, since there was no connection, no healthy endpoint, no place, or the breaker is open. `5xx`, `404`, `501`: the service failed, or says that it does not have this; for safe methods only.
    #[schemars(extend("default" = ["unavailable"]))]
    pub when: Vec<FallbackOn>,
    #[schemars(extend("default" = "separate"))]
    /// Whether both systems share their idempotency keys: then a request with `Idempotency-Key` may fall back whatever its method.
    pub idempotency: Idempotency,
}

impl Default for FallbackConfig {
    fn default() -> Self {
        Self { when: vec![FallbackOn::Unavailable], idempotency: Idempotency::default() }
    }
}

/// Whose idempotency keys are known to whom.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Idempotency {
    /// Each system knows its own.
    #[default]
    Separate,
    /// What one has done the other knows.
    Shared,
}

/// When the monolith answers in the service's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallbackOn {
    /// The request was never sent.
    Unavailable,
    /// The service failed.
    ServerError,
    /// It says that it does not have this.
    NotFound,
    /// It says that it cannot do this.
    NotImplemented,
}

impl FallbackOn {
    /// The word in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::ServerError => "5xx",
            Self::NotFound => "404",
            Self::NotImplemented => "501",
        }
    }
}

const FALLBACK_WORDS: &str = "`unavailable`, `5xx`, `404` or `501`";

impl<'de> Deserialize<'de> for FallbackOn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Word(FALLBACK_WORDS, |text| match text {
            "unavailable" => Some(Self::Unavailable),
            "5xx" => Some(Self::ServerError),
            "404" => Some(Self::NotFound),
            "501" => Some(Self::NotImplemented),
            _ => None,
        }))
    }
}

impl JsonSchema for FallbackOn {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "FallbackOn".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"title": FALLBACK_WORDS, "enum": ["unavailable", "5xx", "404", "501", 404, 501]})
    }
}

/// How many requests of one kind are let through (the generic cell rate algorithm); the rest are answered 429.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RateLimitConfig {
    /// The rate that may go on for ever: `100/s`, `5000/m`, `10/h`.
    pub limit: Rate,
    /// How many may come at once after a pause. Default: as many as `limit` says.
    pub burst: Option<u32>,
    /// What is counted: `ip` (IPv6 by /64), `header:NAME` or `cookie:NAME` each by its value, or `route`, all requests together. A request without the header or cookie is counted by its address.
    #[serde(default)]
    pub per: Per,
}

/// What is counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Per {
    /// The client's address.
    #[default]
    Ip,
    /// A header's value.
    Header(String),
    /// A cookie's value.
    Cookie(String),
    /// A claim of the route's verified token.
    Claim(String),
    /// The route.
    Route,
}

impl fmt::Display for Per {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip => f.write_str("ip"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
            Self::Claim(name) => write!(f, "claim:{name}"),
            Self::Route => f.write_str("route"),
        }
    }
}

impl std::str::FromStr for Per {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("header", name)) if is_token(name) => Ok(Self::Header(name.to_ascii_lowercase())),
            Some(("cookie", name)) if is_token(name) => Ok(Self::Cookie(name.to_owned())),
            Some(("claim", name)) if is_claim(name) => Ok(Self::Claim(name.to_owned())),
            None if text == "ip" => Ok(Self::Ip),
            None if text == "route" => Ok(Self::Route),
            _ => Err(format!(
                "unknown kind of count: `{text}`; known: `ip`, `claim:NAME`, `header:NAME`, `cookie:NAME`, `route`"
            )),
        }
    }
}

/// A name that a quoted text can carry.
fn is_claim(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\".contains(&byte))
}

impl<'de> Deserialize<'de> for Per {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl serde::Serialize for Per {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for Per {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Per".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": r"^(ip|route|claim:.+|header:.+|cookie:.+)$|\$\{"})
    }
}
