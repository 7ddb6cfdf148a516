//! How many requests of one kind a route lets through; the rest are answered 429.
//!
//! Twice in the stack: before the door what needs no token, since signatures are dear; after it what
//! is counted by a claim.
//!
//! Every answer of the route says what is left (draft-ietf-httpapi-ratelimit-headers). What an
//! upstream says of its own limits stays beside it.

use std::sync::atomic::Ordering::Relaxed;

use bytes::BytesMut;
use futures_util::future::Either;
use http::{HeaderMap, HeaderValue};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    context::{Exchange, Request, Response},
    error::{Error, Kind},
    fields,
    resilience::gcra::Decision,
    routing::key::{Found, Key},
    snapshot::RateLimit,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct LimitRate<S> {
    inner: S,
    claims: bool,
}

impl<S> LimitRate<S> {
    /// Around all that costs more than a look at a table.
    pub fn new(inner: S) -> Self {
        Self { inner, claims: false }
    }

    /// The limits that count by what a token claims.
    pub fn by_claim(inner: S) -> Self {
        Self { inner, claims: true }
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
        if context.route().rate_limit.is_none() && context.guards.borrow().is_empty() {
            return Either::Left(self.inner.call(request));
        }
        let (told, refused) = check(&context, request.http.headers(), self.claims);
        if let Some(seconds) = refused {
            request.discard();
            let error = Error { retry_after: Some(seconds), fields: told, ..Error::new(Kind::RateLimited) };
            return Either::Right(Box::pin(std::future::ready(Err(error))));
        }
        let future = self.inner.call(request);
        Either::Right(Box::pin(async move {
            match future.await {
                Ok(mut response) => {
                    for (name, value) in told {
                        response.headers_mut().append(name, value);
                    }
                    Ok(response)
                }
                Err(mut error) => {
                    error.fields.extend(told);
                    Err(error)
                }
            }
        }))
    }
}

type Fields = Vec<(http::HeaderName, HeaderValue)>;

/// Asks the route's limit, and those of the routes that would have had the request but for their predicates. What is told of
/// them, and when to come back where one refuses.
fn check(context: &Exchange, headers: &HeaderMap, claims: bool) -> (Fields, Option<u64>) {
    let mut told = Vec::new();
    let routes = &context.snapshot().routes;
    let guards = context.guards.borrow();
    let all = guards.iter().map(|index| (*index, true)).chain([(context.route.get(), false)]);
    for (route, guards) in all.map(|(index, guards)| (&routes[index], guards)) {
        let Some(limit) = &route.rate_limit else { continue };
        // What `defaults` say of a guard holds wherever it falls.
        if matches!(limit.per, Some(Key::Claim(_))) != claims || (guards && !limit.own) {
            continue;
        }
        let decision = ask(limit, context, headers);
        told.extend(said(limit, decision));
        if !decision.allowed {
            route.stats.rare.limited.fetch_add(1, Relaxed);
            return (told, Some(decision.reset));
        }
    }
    (told, None)
}

fn ask(limit: &RateLimit, context: &Exchange, headers: &HeaderMap) -> Decision {
    let now = u64::try_from(context.started.saturating_duration_since(limit.begin).as_nanos()).unwrap_or(u64::MAX);
    let client = context.client.get();
    let claimed = match &limit.per {
        Some(Key::Claim(name)) => context.claims.get().and_then(|claims| claims.text(name)),
        _ => None,
    };
    // Whoever leaves out what is counted is counted by address.
    let key = limit.per.as_ref().map(|per| {
        let claimed = claimed.as_deref().map(|text| Found::Said(text.as_bytes()));
        claimed.or_else(|| per.find(headers, client)).unwrap_or_else(|| Found::network(client))
    });
    limit.limiter.check(&key, now)
}

/// `RateLimit-Policy` and `RateLimit`.
fn said(limit: &RateLimit, decision: Decision) -> [(http::HeaderName, HeaderValue); 2] {
    let mut text = BytesMut::with_capacity(limit.name.len() + 48);
    text.extend_from_slice(limit.name.as_bytes());
    for (key, number) in [(";r=", decision.remaining), (";t=", decision.reset)] {
        text.extend_from_slice(key.as_bytes());
        text.extend_from_slice(itoa::Buffer::new().format(number).as_bytes());
    }
    let told = HeaderValue::from_maybe_shared(text.freeze()).unwrap_or(HeaderValue::from_static(""));
    [(fields::RATELIMIT_POLICY, limit.policy.clone()), (fields::RATELIMIT, told)]
}
