//! What the file says of answers that are kept.

use schemars::JsonSchema;
use serde::Deserialize;

use super::values::{Size, Span};

/// Where answers are kept (RFC 9111), for the routes that say `cache:`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// How much memory answers may take.
    #[schemars(extend("default" = "256MiB"))]
    pub memory: Size,
    /// The largest answer that is kept; an eighth of `memory` at most.
    #[schemars(extend("default" = "8MiB"))]
    pub max_object: Size,
    /// A Redis that all gateways share, as `redis://HOST:PORT/DB`. Answers up to 1 MiB, invalidations and purges go through it. Default: none.
    pub redis: Option<String>,
    /// How long a request may wait for Redis. What is slower counts as not there, and Redis is then left alone for a second.
    #[schemars(extend("default" = "25ms"))]
    pub redis_timeout: Span,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            memory: Size(256 * 1024 * 1024),
            max_object: Size(8 * 1024 * 1024),
            redis: None,
            redis_timeout: Span(std::time::Duration::from_millis(25)),
        }
    }
}

/// Which answers of a route are kept: those that say so, as RFC 9111 has it for a shared cache.
///
/// `CDN-Cache-Control` (RFC 9213) counts in place of `Cache-Control` and `Expires`. A request with `Authorization` is answered
/// from the cache, and its answer kept, only where the answer says `public`, `must-revalidate` or `s-maxage`; one with `Cookie` only where it
/// says `public` or `s-maxage`. An answer with `Set-Cookie` is never kept.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct RouteCacheConfig {
    /// How long an answer is fresh that does not say it. `0s`: a tenth of its age where it says `Last-Modified`, else not at all.
    #[schemars(extend("default" = "0s"))]
    pub default_ttl: Span,
    /// For how long after that it may be served while a new one is fetched, where it does not say (RFC 5861 §3).
    #[schemars(extend("default" = "0s"))]
    pub stale_while_revalidate: Span,
    /// For how long after that it may be served where the upstream fails, where it does not say (RFC 5861 §4).
    #[schemars(extend("default" = "0s"))]
    pub stale_if_error: Span,
    /// How long a request waits for another that asks for the same; then it asks for itself.
    #[schemars(extend("default" = "5s"))]
    pub collapse: Span,
}

impl Default for RouteCacheConfig {
    fn default() -> Self {
        Self {
            default_ttl: Span::secs(0),
            stale_while_revalidate: Span::secs(0),
            stale_if_error: Span::secs(0),
            collapse: Span::secs(5),
        }
    }
}
