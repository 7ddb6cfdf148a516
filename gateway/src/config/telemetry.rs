//! What the file says of what the gateway tells about itself and learns of its traffic.

use std::{collections::BTreeMap, fmt};

use schemars::JsonSchema;
use serde::Deserialize;

use super::values::{Share, ShortForm, Span};

/// One JSON line a request. Short form: where it goes.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct AccessLogConfig {
    /// `stdout`, `none`, or a file, relative to this one, to which lines are added; SIGUSR1 has it opened anew, for those who rotate logs.
    pub to: String,
    /// The share of requests that went well of which there is a line. Failures (5xx, and what the client did not get to its end) always have one.
    #[schemars(extend("default" = "100%"))]
    pub sample: Share,
    /// What lines do not tell.
    pub redact: Vec<RedactField>,
}

impl Default for AccessLogConfig {
    fn default() -> Self {
        Self { to: "stdout".to_owned(), sample: Share(10_000), redact: Vec::new() }
    }
}

impl ShortForm for AccessLogConfig {
    const WHAT: &'static str = "`stdout`, `none` or a file, or a map with `to`, `sample` and `redact`";
    fn from_short(text: &str) -> Result<Self, String> {
        Ok(Self { to: text.to_owned(), ..Self::default() })
    }
}

/// What the access log does not tell.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum RedactField {
    /// The client's address: its network is told, `/24` of IPv4 and `/48` of IPv6.
    Client,
    /// The path: only what the route's own pattern names is told, each other segment as `*`.
    Path,
    /// The host asked for.
    Host,
}

/// What clients ask for, learned: endpoints as templates, kept in `state:`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct InventoryConfig {
    /// How long the monolith must not have answered for a route at `migrated` before `retired` is proposed.
    #[schemars(extend("default" = "168h"))]
    pub retire_after: Span,
}

impl Default for InventoryConfig {
    fn default() -> Self {
        Self { retire_after: Span::secs(168 * 3600) }
    }
}

/// Traces for OpenTelemetry: a span a request and one for each try. Without it `traceparent` passes as it is.
#[derive(Clone, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct TracingConfig {
    /// The collector, for OTLP over HTTP (protobuf): a URL; one without a path gets `/v1/traces`.
    pub otlp: String,
    /// The share of requests that are traced. What comes from `trusted_proxies` with a `traceparent` is traced if that says so.
    #[serde(default = "sample")]
    #[schemars(extend("default" = "1%"))]
    pub sample: Share,
    /// `service.name` of the spans.
    #[serde(default = "service")]
    #[schemars(extend("default" = "gateway"))]
    pub service: String,
    /// Header fields of each call, such as a token of the collector.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
}

fn sample() -> Share {
    Share(100)
}
fn service() -> String {
    "gateway".to_owned()
}

impl fmt::Debug for TracingConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TracingConfig").field("otlp", &self.otlp).finish_non_exhaustive()
    }
}
