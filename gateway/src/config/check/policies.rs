//! Retries, fallback and rate limits: numbers that mean something, and policies that can take effect.

use std::time::Duration;

use super::matching::must_arrive;
use crate::config::{
    file::TimeoutConfig,
    policy::{FallbackConfig, Per, RateLimitConfig, RetryConfig},
    source::{At, Sources},
    values::{OrNone, Size},
};

/// The policies of a route, or of all.
pub(super) struct Policies<'a> {
    pub(super) retry: Option<&'a OrNone<RetryConfig>>,
    pub(super) fallback: Option<&'a OrNone<FallbackConfig>>,
    pub(super) rate_limit: Option<&'a OrNone<RateLimitConfig>>,
    pub(super) replay_body: Option<&'a OrNone<Size>>,
    pub(super) timeout: Option<&'a OrNone<TimeoutConfig>>,
}

/// Tries beside the first, at most.
const RETRIES: u32 = 10;
/// What may be kept of a body.
const REPLAY: u64 = 16 * 1024 * 1024;

pub(super) fn check_policies(sources: &mut Sources, at: &At, policies: &Policies<'_>) {
    if let Some(OrNone::Some(retry)) = policies.retry {
        let at = at.down("retry");
        let mut wrong = |at: At, holds: bool, what: &str, help: &str| {
            if !holds {
                sources.error(&at, what.to_owned(), help);
            }
        };
        let (number, none) = (retry.retries <= RETRIES, "10 at most: more is load, not help");
        wrong(at.down("retries"), number, "not a number of retries", none);
        wrong(at.down("when"), !retry.when.is_empty(), "no reason to try again", "name one, or write `retry: none`");
        let backoff = at.down("backoff");
        let (base, longest) = (retry.backoff.base.0, retry.backoff.longest());
        let key = if retry.backoff.max.is_some() { "max" } else { "base" };
        wrong(backoff.down(key), base <= longest, "`max` shorter than `base`", "write at least what `base` says");
        let hour = longest <= Duration::from_hours(1);
        wrong(
            backoff.down(key),
            hour,
            "a pause too long",
            "a pause is `1h` at most, and ten times `base` if `max` is not given",
        );
    }
    if let Some(OrNone::Some(fallback)) = policies.fallback
        && fallback.when.is_empty()
    {
        let at = at.down("fallback").down("when");
        sources.error(&at, "no reason to fall back".to_owned(), "name one, or write `fallback: none`");
    }
    if let Some(OrNone::Some(limit)) = policies.rate_limit {
        let at = at.down("rate_limit");
        if limit.burst == Some(0) {
            sources.error(&at.down("burst"), "a burst of nothing".to_owned(), "1 or more");
        }
        if let Per::Header(name) = &limit.per
            && let Ok(name) = http::HeaderName::from_bytes(name.as_bytes())
        {
            must_arrive(sources, &at.down("per"), &name);
        }
    }
    if let Some(OrNone::Some(timeout)) = policies.timeout
        && let (Some(attempt), Some(request)) = (timeout.attempt.limit(), timeout.request.limit())
        && attempt > request
    {
        sources.warn(
            &at.down("timeout").down("attempt"),
            "limit of a try longer than that of the request".to_owned(),
            &format!("it never fires: `request` is {}; make it shorter", timeout.request),
        );
    }
    if let Some(OrNone::Some(size)) = policies.replay_body
        && size.0 > REPLAY
    {
        let help = "it is kept in memory for each request in flight; write `16MiB` or less";
        sources.error(&at.down("replay_body"), format!("more than may be kept: `{size}`"), help);
    }
}
