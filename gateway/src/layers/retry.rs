//! Retries, and the time limit of each try.
//!
//! What may have reached the upstream is sent again only where that changes nothing (RFC 9110
//! §9.2.2), and nothing once a response's head went on. One budget an upstream keeps retries from
//! becoming the load that brings it down.

use std::{
    rc::Rc,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, SystemTime},
};

use futures_util::future::Either;
use http::{HeaderMap, header};
use tokio::time::Instant;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    context::{Exchange, Leg, Response},
    error::{Error, Kind},
    resilience::millis,
    snapshot::Retry as Policy,
    upstream::upload::within,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Retry<S> {
    inner: S,
}

impl<S> Retry<S> {
    /// Around each try.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Rc<Leg>> for Retry<S>
where
    S: Service<Rc<Leg>, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, leg: Rc<Leg>) -> Self::Future {
        let route = leg.context.route();
        if route.retry.is_none() && route.limits.attempt.is_none() && !leg.context.is_traced() {
            leg.context.attempts.set(leg.context.attempts.get() + 1);
            return Either::Left(self.inner.call(leg));
        }
        let inner = self.inner.clone();
        Either::Right(Box::pin(tries(inner, leg)))
    }
}

async fn tries<S>(mut inner: S, leg: Rc<Leg>) -> Result<Response, Error>
where
    S: Service<Rc<Leg>, Response = Response, Error = Error>,
{
    let context = &leg.context;
    let policy = context.route().retry.as_ref();
    if policy.is_some() {
        leg.upstream().budget.deposit(millis(leg.way.begun.get()));
    }
    let mut retries = 0;
    // Whether any try may have reached the upstream: what one that never did comes to does not change that.
    let mut sent = false;
    let tell = |result: Result<Response, Error>, sent: bool| {
        result.map_err(|mut error| {
            error.sent |= sent;
            error
        })
    };
    loop {
        let left = policy.filter(|policy| retries < policy.retries);
        leg.way.more.set(left.is_some_and(|policy| policy.connect));
        leg.way.mends.set(left.is_some_and(|policy| policy.reset));
        let result = one(&mut inner, &leg).await;
        let Some(policy) = left else { return tell(result, sent) };
        let Some(pause) = next(&leg, policy, retries + 1, &result) else { return tell(result, sent) };
        retries += 1;
        sent |= result.as_ref().map_or_else(|error| error.sent, |_| true);
        match result {
            Ok(response) => {
                if let ResponseBody::Upstream(body) = response.into_body() {
                    body.drain();
                }
            }
            Err(error) => context.count_limit(error.kind),
        }
        context.route().stats.rare.retries.fetch_add(1, Relaxed);
        if !pause.is_zero() {
            context.worker.timer.sleep(pause).await;
        }
        leg.way.begun.set(Instant::now());
    }
}

async fn one<S>(inner: &mut S, leg: &Rc<Leg>) -> Result<Response, Error>
where
    S: Service<Rc<Leg>, Response = Response, Error = Error>,
{
    let context = &leg.context;
    context.attempts.set(context.attempts.get() + 1);
    leg.way.sent.set(false);
    leg.way.departed.set(None);
    context.upload.set_expired(false);
    // Told also where whoever waits gives up before there is an answer.
    let tried = Tried::begin(leg);
    let result = match context.route().limits.attempt {
        None => inner.call(leg.clone()).await,
        Some(limit) => limited(inner, leg, limit).await,
    };
    if let Some(tried) = tried {
        tried.end(result.as_ref().map(|response| response.status().as_u16()).map_err(|error| error.kind.word()));
    }
    result
}

/// A try of a request that is traced.
struct Tried<'l> {
    leg: &'l Leg,
    begun: (u64, Duration),
    result: Result<u16, &'static str>,
}

impl<'l> Tried<'l> {
    fn begin(leg: &'l Leg) -> Option<Self> {
        let begun = leg.context.begin_try(&leg.way)?;
        Some(Self { leg, begun, result: Err("cancelled") })
    }

    fn end(mut self, result: Result<u16, &'static str>) {
        self.result = result;
    }
}

impl Drop for Tried<'_> {
    fn drop(&mut self) {
        self.leg.context.end_try(self.begun, self.leg.upstream(), self.result);
    }
}

async fn limited<S>(inner: &mut S, leg: &Rc<Leg>, limit: Duration) -> Result<Response, Error>
where
    S: Service<Rc<Leg>, Response = Response, Error = Error>,
{
    let context = &leg.context;
    let start = leg.way.begun.get();
    let future = inner.call(leg.clone());
    let timer = &context.worker.timer;
    let result = Box::pin(within(timer, &context.upload, Some(limit), None, Kind::AttemptTimeout, start, future)).await;
    result.map_err(|mut error| {
        if error.upstream.is_none() && matches!(error.kind, Kind::AttemptTimeout | Kind::WriteTimeout) {
            error.upstream = Some(leg.upstream().name.clone());
            error.sent = leg.way.sent.get();
            if !error.sent {
                // Nobody was there to take it.
                error.kind = Kind::AttemptTimeout;
            }
        }
        error
    })
}

/// Whether the request's body, if it has one, is as it was at first.
fn is_whole(context: &Exchange) -> bool {
    context.home.get().is_none_or(|home| home.rewind())
}

/// How long to wait before the next try; nothing where there is to be none.
fn next(leg: &Leg, policy: &Policy, number: u32, result: &Result<Response, Error>) -> Option<Duration> {
    let context = &leg.context;
    let (sent, asked) = match result {
        Ok(response) => {
            if !policy.statuses.contains(&response.status()) {
                return None;
            }
            (true, retry_after(response.headers()))
        }
        Err(error) => {
            if !matches(policy, error) {
                return None;
            }
            (error.sent, None)
        }
    };
    let now = millis(Instant::now());
    let another = leg.way.has_another(leg.upstream(), now);
    if sent && !is_repeatable(leg, policy) {
        return None;
    }
    // The upstream knows best when to come back; whoever cannot wait so long passes on what it said.
    if asked.is_some_and(|asked| asked > policy.max) {
        return None;
    }
    // Where some of it is still on its way, or was too much to be kept, an answer is passed on as it is.
    if !is_whole(context) {
        return None;
    }
    let free = !sent && another;
    if !free && !leg.upstream().budget.withdraw(now, policy.budget) {
        context.route().stats.rare.unaffordable.fetch_add(1, Relaxed);
        return None;
    }
    Some(if free {
        Duration::ZERO
    } else {
        pause(policy, number, context.worker.random()).max(asked.unwrap_or_default())
    })
}

/// A failure counts by its own word, and as the status that the client would get for it.
fn matches(policy: &Policy, error: &Error) -> bool {
    if error.kind.is_connect() && policy.connect {
        return true;
    }
    match error.kind {
        // It is full, or left alone: another try would find it so.
        Kind::ConnectionLimit | Kind::PendingTimeout | Kind::NoEndpoint | Kind::CircuitOpen => false,
        Kind::Terminated if policy.reset || (!error.sent && policy.connect) => true,
        kind if kind.is_upstreams() => policy.statuses.contains(&kind.status()),
        _ => false,
    }
}

fn is_repeatable(leg: &Leg, policy: &Policy) -> bool {
    let context = &leg.context;
    if context.overridden.get() {
        return false;
    }
    // What the service does with keys says nothing about the monolith.
    let asked = context.route().service.is_none_or(|service| service == leg.upstream);
    context.method.is_idempotent() || (policy.keys_honoured && asked && context.is_keyed())
}

/// Full jitter: between nothing and what doubles with each retry (Envoy's formula).
fn pause(policy: &Policy, number: u32, random: u64) -> Duration {
    let most = policy.base.saturating_mul((1 << number.min(20)) - 1).min(policy.max);
    let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX);
    Duration::from_micros(if micros == 0 { 0 } else { random % (micros + 1) })
}

/// `Retry-After`, as seconds or as a date (RFC 9110 §10.2.3).
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;

    fn policy() -> Policy {
        Policy {
            retries: 3,
            connect: true,
            reset: false,
            statuses: vec![StatusCode::GATEWAY_TIMEOUT],
            base: Duration::from_millis(25),
            max: Duration::from_millis(250),
            budget: 2_000,
            keys_honoured: false,
        }
    }

    #[test]
    fn pauses_grow_to_their_limit_and_use_all_of_it() {
        let longest = |number| {
            let pauses = (0..10_000_u64).map(|n| pause(&policy(), number, n.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
            pauses.max().unwrap_or_default()
        };
        let near = |number, millis: u64| {
            let longest = longest(number);
            let most = Duration::from_millis(millis);
            assert!(longest <= most && longest >= most * 98 / 100, "{longest:?} of {most:?}");
        };
        near(1, 25);
        near(2, 75);
        near(3, 175);
        near(4, 250);
        near(40, 250);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(read("2"), Some(Duration::from_secs(2)));
        assert_eq!(read("soon"), None);
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let later = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        assert!(read(&later).is_some_and(|wait| wait > Duration::from_secs(90)));
    }

    #[test]
    fn a_failure_counts_by_its_word_and_by_its_status() {
        let error = |kind, sent| Error::upstream(kind, &"orders".into(), sent, "");
        assert!(matches(&policy(), &error(Kind::ConnectionRefused, false)));
        assert!(matches(&policy(), &error(Kind::AttemptTimeout, true)));
        assert!(matches(&policy(), &error(Kind::Terminated, false)));
        assert!(!matches(&policy(), &error(Kind::Terminated, true)));
        assert!(!matches(&policy(), &error(Kind::CircuitOpen, false)));
        assert!(!matches(&policy(), &error(Kind::ClientAborted, false)));
        let only_statuses = Policy { connect: false, ..policy() };
        assert!(matches(&only_statuses, &error(Kind::ConnectTimeout, false)));
        assert!(!matches(&only_statuses, &error(Kind::ConnectionRefused, false)));
    }
}
