//! How many requests of one kind a route lets through; the rest are answered 429.
//!
//! Every answer of the route says what is left (draft-ietf-httpapi-ratelimit-headers). What an
//! upstream says of its own limits stays beside it.

use std::sync::atomic::Ordering::Relaxed;

use futures_util::future::Either;
use http::{HeaderMap, HeaderValue};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    context::{Exchange, Request, Response},
    error::{Error, Kind},
    fields,
    resilience::gcra::Decision,
    routing::key::Found,
    snapshot::RateLimit,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct LimitRate<S> {
    inner: S,
}

impl<S> LimitRate<S> {
    /// Around all that costs more than a look at a table.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for LimitRate<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        let context = request.context.clone();
        let Some(limit) = &context.route().rate_limit else {
            return Either::Left(self.inner.call(request));
        };
        let decision = check(limit, &context, request.http.headers());
        if !decision.allowed {
            context.route().stats.rare.limited.fetch_add(1, Relaxed);
            request.discard();
            let told = told(limit, decision);
            let error = Error { retry_after: Some(decision.reset), fields: told, ..Error::new(Kind::RateLimited) };
            return Either::Right(Box::pin(std::future::ready(Err(error))));
        }
        let future = self.inner.call(request);
        Either::Right(Box::pin(async move {
            let told = || context.route().rate_limit.as_ref().map(|limit| told(limit, decision)).unwrap_or_default();
            match future.await {
                Ok(mut response) => {
                    for (name, value) in told() {
                        response.headers_mut().append(name, value);
                    }
                    Ok(response)
                }
                Err(mut error) => {
                    error.fields.extend(told());
                    Err(error)
                }
            }
        }))
    }
}

fn check(limit: &RateLimit, context: &Exchange, headers: &HeaderMap) -> Decision {
    let now = u64::try_from(context.started.saturating_duration_since(limit.begin).as_micros()).unwrap_or(u64::MAX);
    let client = context.client.get();
    // Whoever leaves out what is counted is counted by address.
    let key = limit.per.as_ref().map(|per| per.find(headers, client).unwrap_or_else(|| Found::network(client)));
    limit.limiter.check(&key, now)
}

/// `RateLimit-Policy` and `RateLimit`.
fn told(limit: &RateLimit, decision: Decision) -> Vec<(http::HeaderName, HeaderValue)> {
    let mut all = vec![(fields::RATELIMIT_POLICY, limit.policy.clone())];
    let text = format!("{};r={};t={}", limit.name, decision.remaining, decision.reset);
    if let Ok(value) = HeaderValue::try_from(text) {
        all.push((fields::RATELIMIT, value));
    }
    all
}
