//! What the file says of evidence: copies of requests and how answers are compared, rollouts and who is told of them.

use std::fmt;

use schemars::JsonSchema;
use serde::Deserialize;

use super::values::{Share, Size, Span};

/// Copies of the requests that the monolith answers, for the service; its answers are compared with the monolith's and
/// then thrown away. A copy leaves after the client has its answer, and carries `x-gateway-shadow: 1`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub struct ShadowConfig {
    /// The share of requests that are copied.
    #[schemars(extend("default" = "100%"))]
    pub percent: Share,
    /// The methods that are copied. Any but `GET`, `HEAD`, `OPTIONS` and `TRACE` needs `side_effects: accepted`.
    #[schemars(extend("default" = ["GET", "HEAD"]))]
    pub methods: Vec<String>,
    /// Says that the service may do twice what these methods do: without it nothing that writes is ever copied.
    pub side_effects: Option<Accepted>,
    /// Paths that are not copied, written as in `match:`: logouts, links that work once.
    pub exclude: Vec<String>,
    /// Fields of JSON that may differ, as JSON Pointers (RFC 6901) with `*` for any one member and a final `**` for all below.
    pub ignore: Vec<String>,
    /// Arrays of JSON whose order does not matter, as such pointers.
    pub unordered: Vec<String>,
    /// How far apart two numbers may be.
    pub tolerance: f64,
    /// The header fields that are compared, beside the status and the body.
    #[schemars(extend("default" = ["content-type", "location"]))]
    pub headers: Vec<String>,
    /// The share of copied requests for which the monolith is asked a second time as well: what differs between its own two answers
    /// is noise. It costs the monolith that share of requests.
    #[schemars(extend("default" = "0%"))]
    pub noise: Share,
    /// How much of a request's and of an answer's body is kept for it; longer requests are not copied, longer answers are compared by status and fields alone.
    #[schemars(extend("default" = "1MiB"))]
    pub max_body: Size,
    /// Copies in flight at a time, of all workers together.
    pub max_requests: u32,
    /// Copies that wait for their turn, at most; those beyond are dropped, and counted.
    pub max_pending: u32,
}

impl Default for ShadowConfig {
    fn default() -> Self {
        Self {
            percent: Share(10_000),
            methods: vec!["GET".to_owned(), "HEAD".to_owned()],
            side_effects: None,
            exclude: Vec::new(),
            ignore: Vec::new(),
            unordered: Vec::new(),
            tolerance: 0.0,
            headers: vec!["content-type".to_owned(), "location".to_owned()],
            noise: Share(0),
            max_body: Size(1024 * 1024),
            max_requests: 16,
            max_pending: 256,
        }
    }
}

/// The word `accepted`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Accepted {
    /// It is.
    Accepted,
}

/// How a canary's share grows by itself, on evidence. Takes the place of `canary.percent`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// The shares, growing.
    pub steps: Vec<Share>,
    /// How long each step lasts at least.
    #[serde(default = "every")]
    #[schemars(extend("default" = "10m"))]
    pub every: Span,
    /// How many requests the service has answered at a step before the next, at least.
    #[serde(default = "min_requests")]
    #[schemars(extend("default" = 500))]
    pub min_requests: u64,
    /// The chance of taking back a service that is no worse than the monolith, over all steps and all that is judged, however often it looks.
    #[serde(default = "alpha")]
    #[schemars(extend("default" = "1%"))]
    pub alpha: Share,
    /// What happens when the service is shown to be worse.
    #[serde(default)]
    #[schemars(extend("default" = "rollback"))]
    pub on_failure: OnFailure,
    /// How much worse than the monolith a step may at most be shown to be to pass.
    #[serde(default)]
    pub margin: MarginConfig,
    /// The share of compared answers that may differ, where the route has `shadow:`.
    #[serde(default = "mismatches")]
    #[schemars(extend("default" = "1%"))]
    pub mismatches: Share,
    /// What must be so before a step is taken, beside the evidence.
    #[serde(default)]
    pub gates: GatesConfig,
}

fn every() -> Span {
    Span::secs(600)
}
fn min_requests() -> u64 {
    500
}
fn alpha() -> Share {
    Share(100)
}
fn mismatches() -> Share {
    Share(100)
}

/// What happens when the service is shown to be worse.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// The monolith answers everything again.
    #[default]
    Rollback,
    /// The share stays as it is until a person decides.
    Freeze,
}

/// By how much the service may be worse and still pass.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct MarginConfig {
    /// Points of its share of failures: 5xx, time limits, broken answers, fallbacks.
    #[schemars(extend("default" = "0.5%"))]
    pub errors: Share,
    /// Points of its share of 4xx.
    #[schemars(extend("default" = "1%"))]
    pub client_errors: Share,
    /// By how much its 99th percentile of the time to the response's head may be longer; 5 ms in any case.
    #[schemars(extend("default" = "50%"))]
    pub p99: Share,
}

impl Default for MarginConfig {
    fn default() -> Self {
        Self { errors: Share(50), client_errors: Share(100), p99: Share(5_000) }
    }
}

/// What must be so before a step is taken.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields, default)]
pub struct GatesConfig {
    /// The share of compared answers that match, at least, before each step, the first too; needs `shadow:`.
    pub parity: Option<Share>,
    /// A URL that is asked before each step by `POST`, with the evidence; 2xx lets it pass, anything else holds it and it is asked again.
    pub webhook: Option<WebhookConfig>,
    /// Steps that wait for `gateway promote ROUTE`.
    pub manual: Vec<Share>,
}

/// Where to send what happens, or to ask. Signed as Standard Webhooks has it where there is a secret.
#[derive(Clone, Deserialize, JsonSchema, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// The URL, `http://` or `https://`.
    pub url: String,
    /// The key of the signature: a text, or `whsec_` and base64.
    #[serde(default)]
    pub secret: Option<String>,
    /// How long an answer may take.
    #[serde(default = "webhook_timeout")]
    #[schemars(extend("default" = "5s"))]
    pub timeout: Span,
}

fn webhook_timeout() -> Span {
    Span::secs(5)
}

impl fmt::Debug for WebhookConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookConfig").field("url", &self.url).finish_non_exhaustive()
    }
}
