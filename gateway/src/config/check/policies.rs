//! Retries, fallback and rate limits: numbers that mean something, and policies that can take effect.

use std::time::Duration;

use super::matching::must_arrive;
use crate::config::{
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
}

/// Tries beside the first, at most: more than that is load, not help.
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
        let (number, none) = ((1..=RETRIES).contains(&retry.retries), "from 1 to 10; `retry: none` switches it off");
        wrong(at.down("retries"), number, "not a number of retries", none);
        wrong(at.down("when"), !retry.when.is_empty(), "no reason to try again", "name one, or write `retry: none`");
        let backoff = at.down("backoff");
        let (base, max) = (retry.backoff.base.0, retry.backoff.max.0);
        wrong(backoff.down("max"), base <= max, "shorter than `base`", "write at least what `base` says");
        let hour = max <= Duration::from_hours(1);
        wrong(backoff.down("max"), hour, "a pause too long", "write `1h` or less");
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
    if let Some(OrNone::Some(size)) = policies.replay_body
        && size.0 > REPLAY
    {
        let help = "it is kept in memory for each request in flight; write `16MiB` or less";
        sources.error(&at.down("replay_body"), format!("more than may be kept: `{size}`"), help);
    }
}
