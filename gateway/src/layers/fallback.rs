//! The monolith in the service's place, where that cannot write twice.
//!
//! A request that the service never saw may be anybody's, whatever its method, as long as its body is
//! whole. One that it may have seen is repeated elsewhere only if its method is safe, and only where
//! the route says so; an `Idempotency-Key` protects inside one system, not across two, unless the
//! route says that they share their keys.
//!
//! From here on the request's head does not change any more: it lies in the exchange, and its body
//! waits there between tries. So what the monolith gets is what the client sent.

use std::{
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use futures_util::future::Either;
use http::{HeaderValue, StatusCode};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    config::policy::FallbackOn,
    context::{Context, Leg, Request, Response},
    error::{Earlier, Error, Kind},
    fields,
    resilience::{bulkhead::Lane, learned::Learned, millis},
    snapshot::Fallback as Policy,
    telemetry::metrics::{Arm, FALLBACKS},
    upstream::{outcome::Outcome, upload::Home},
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Fallback<S> {
    inner: S,
}

impl<S> Fallback<S> {
    /// Around what sends to one upstream.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Fallback<S>
where
    S: Service<Leg, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        let Request { http, context } = request;
        let chunked = context.park(*http);
        let open = context.home.get().cloned().map(Closing);
        let Some(upstream) = context.upstream.get() else {
            return Either::Right(Box::pin(std::future::ready(Err(Error::new(Kind::Internal)))));
        };
        let route = context.route();
        let writes = !context.method.is_safe() || context.overridden.get();
        // Whoever writes: what was not there may be there, now and when it is done.
        let forget = route.fallback.as_ref().filter(|policy| writes && policy.learns()).map(Forget::new);
        let policy = route.fallback.as_ref().filter(|_| context.arm.get() == Arm::Service);
        if policy.is_none() {
            let future = self.inner.call(Leg::new(&context, upstream, Lane::Direct, true, chunked));
            if open.is_none() && forget.is_none() {
                return Either::Left(future);
            }
            return Either::Right(Box::pin(async move {
                let result = future.await;
                drop((open, forget));
                result
            }));
        }
        let inner = self.inner.clone();
        Either::Right(Box::pin(async move {
            let result = ask(inner, &context, upstream, chunked).await;
            drop((open, forget));
            result
        }))
    }
}

/// While it lives, a body whose try is over comes back to be sent again.
struct Closing(Rc<Home>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Forgets what was learned, at the beginning of a write and at its end.
struct Forget(Arc<Learned>);

impl Forget {
    fn new(policy: &Policy) -> Self {
        policy.learned.forget();
        Self(policy.learned.clone())
    }
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.0.forget();
    }
}

/// An index of `FALLBACKS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Unavailable,
    ServerError,
    NotFound,
    NotImplemented,
    Learned,
}

async fn ask<S>(mut inner: S, context: &Context, service: usize, chunked: bool) -> Result<Response, Error>
where
    S: Service<Leg, Response = Response, Error = Error>,
{
    let Some(policy) = &context.route().fallback else { return Err(Error::new(Kind::Internal)) };
    let path = context.uri.path();
    let method = context.method.as_str();
    let absences = policy.learns();
    let now = || millis(tokio::time::Instant::now());
    if absences && may_repeat(context, policy) && policy.learned.is_absent(method, path, now()) {
        let answer = instead(&mut inner, context, service, Reason::Learned, chunked, Failure::None).await;
        let whole = || context.home.get().is_none_or(|home| home.rewind());
        if !has_it(&answer) && whole() {
            // The service may have what the monolith does not: what was learned of others is not true of this one.
            policy.learned.found(method, path);
            if let Ok(answer) = answer {
                let_go(answer);
            }
            context.fallback.set(None);
            context.decide_anew(Arm::Service, service);
            return inner.call(Leg::new(context, service, Lane::Direct, true, chunked)).await;
        }
        return answer;
    }
    let result =
        inner.call(Leg::new(context, service, Lane::Direct, !policy.on(FallbackOn::Unavailable), chunked)).await;
    let Some(reason) = reason(context, policy, &result) else {
        if absences
            && let Ok(response) = &result
            && (response.status().is_success() || response.status().is_redirection())
        {
            policy.learned.found(method, path);
        }
        return result;
    };
    // What was sent must not have been changed, and must be whole.
    if !context.home.get().is_none_or(|home| home.rewind()) {
        return result;
    }
    let (outcome, failure) = match result {
        Ok(response) => {
            let status = response.status();
            (let_go(response), Failure::Answered(status))
        }
        Err(error) => {
            context.count_limit(error.kind);
            (None, Failure::Error(error))
        }
    };
    let answer = instead(&mut inner, context, service, reason, chunked, failure).await;
    let absent = matches!(reason, Reason::NotFound | Reason::NotImplemented);
    if absent && has_it(&answer) {
        policy.learned.missed(method, path, now());
    }
    if let Some(outcome) = outcome {
        // Where the monolith does not have it either, the service was right.
        outcome.tell(absent && !has_it(&answer));
    }
    answer
}

fn has_it(answer: &Result<Response, Error>) -> bool {
    answer.as_ref().is_ok_and(|answer| answer.status().is_success() || answer.status().is_redirection())
}

/// How the service failed, if it was asked.
enum Failure {
    None,
    Answered(StatusCode),
    Error(Error),
}

/// Takes what is there of an answer that nobody gets; what the breaker has yet to hear of it.
fn let_go(response: Response) -> Option<Outcome> {
    let ResponseBody::Upstream(mut body) = response.into_body() else { return None };
    let outcome = body.take_outcome();
    body.drain();
    outcome
}

/// Asks the monolith.
async fn instead<S>(
    inner: &mut S,
    context: &Context,
    service: usize,
    reason: Reason,
    chunked: bool,
    failure: Failure,
) -> Result<Response, Error>
where
    S: Service<Leg, Response = Response, Error = Error>,
{
    let route = context.route();
    let baseline = route.baseline;
    route.stats.rare.fallbacks[reason as usize].fetch_add(1, Relaxed);
    context.fallback.set(Some((service, reason as usize)));
    context.decide_anew(Arm::Legacy, baseline);
    let name = &context.local.snapshot.upstreams[service].name;
    let answer = inner.call(Leg::new(context, baseline, Lane::Last, true, chunked)).await;
    match answer {
        Ok(mut response) => {
            let told = said(name, &context.local.snapshot.upstreams[baseline].name, reason, &failure);
            if let Ok(value) = HeaderValue::try_from(told) {
                response.headers_mut().append(fields::PROXY_STATUS, value);
            }
            Ok(response)
        }
        Err(mut error) => {
            if let Failure::Error(failed) = failure {
                // Either may be back first.
                error.retry_after = error.retry_after().into_iter().chain(failed.retry_after()).min();
                error.earlier = Some(Earlier { upstream: name.clone(), kind: failed.kind });
            }
            Err(error)
        }
    }
}

/// `Proxy-Status` of an answer that another gave (RFC 9209): how the service failed, then who answered.
fn said(service: &Arc<str>, baseline: &Arc<str>, reason: Reason, failure: &Failure) -> String {
    let failed = match failure {
        Failure::None => String::new(),
        Failure::Answered(status) => format!("gw; received-status={}; next-hop={service}, ", status.as_u16()),
        Failure::Error(error) => match error.kind.limit() {
            Some(limit) => {
                let (word, limit) = (error.kind.word(), limit.word());
                format!("gw; error={word}; next-hop={service}; details=\"the limit `{limit}` fired\", ")
            }
            None => format!("gw; error={}; next-hop={service}, ", error.kind.word()),
        },
    };
    format!("{failed}gw; next-hop={baseline}; details=\"fallback from {service}: {}\"", FALLBACKS[reason as usize])
}

/// Whether the monolith may get what the service may have seen.
fn may_repeat(context: &Context, policy: &Policy) -> bool {
    if context.overridden.get() {
        return false;
    }
    context.method.is_safe() || (policy.keys_shared && context.is_keyed())
}

/// Why the monolith is to be asked; nothing where the answer stands.
fn reason(context: &Context, policy: &Policy, result: &Result<Response, Error>) -> Option<Reason> {
    match result {
        Err(error)
            if !error.sent
                && (error.kind.is_unavailable() || error.kind == Kind::AttemptTimeout)
                && policy.on(FallbackOn::Unavailable) =>
        {
            Some(Reason::Unavailable)
        }
        Err(error) => {
            // Also where only an earlier try was sent, and the last found the service left alone.
            let failed = error.kind.is_upstreams() || error.kind.is_unavailable();
            let falls = policy.on(FallbackOn::ServerError) && failed && may_repeat(context, policy);
            falls.then_some(Reason::ServerError)
        }
        Ok(response) => {
            let reason = match response.status() {
                StatusCode::NOT_FOUND if policy.on(FallbackOn::NotFound) => Reason::NotFound,
                StatusCode::NOT_IMPLEMENTED if policy.on(FallbackOn::NotImplemented) => Reason::NotImplemented,
                status if status.is_server_error() && policy.on(FallbackOn::ServerError) => Reason::ServerError,
                _ => return None,
            };
            may_repeat(context, policy).then_some(reason)
        }
    }
}
