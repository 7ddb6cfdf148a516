//! Answers from what is kept, and keeps what may be (RFC 9111); tells with `Cache-Status` (RFC 9211) what it did.
//!
//! Inside of the choice of the arm, so that an answer never crosses over to the other, and outside of the fallback: what the
//! monolith gave in the service's place is kept as the monolith's. A write through any route, to either system, ends what was kept of its
//! URL, wherever it is kept.

mod fetch;
mod take;
mod write;

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::future::Either;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, uri::PathAndQuery};
use tower::Service;

use self::{
    fetch::{fetch, revalidate},
    write::write,
};
use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    cache::{
        Cache,
        key::Builder,
        policy::{Asks, Judgement},
        stored::{CACHE_STATUS, Stored},
    },
    context::{Exchange, Request, Response, Served},
    error::Error,
    fields,
    snapshot::Keep,
    upstream::upload::RequestBody,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Remember<S> {
    inner: S,
}

impl<S> Remember<S> {
    /// Around whoever is asked where nothing is kept.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Remember<S>
where
    S: Service<Request, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        let context = request.context.clone();
        let snapshot = context.snapshot();
        let keep = context.route().cache;
        let safe = context.method.is_safe() && !context.overridden.get();
        if snapshot.cache.is_none() || (safe && keep.is_none()) {
            return Either::Left(self.inner.call(request));
        }
        let Some(cache) = snapshot.cache.clone() else { return Either::Left(self.inner.call(request)) };
        let target = request.http.uri().path_and_query().cloned();
        let _ = context.target.set(target.unwrap_or(PathAndQuery::from_static("/")));
        let (true, Some(keep)) = (safe, keep) else {
            return Either::Right(Box::pin(write(self.inner.clone(), request, cache, keep.is_some())));
        };
        if !is_ours(&request) {
            context.cache.set(Some(Served::Bypass));
            let word = if context.method == Method::GET { "gw; fwd=bypass" } else { "gw; fwd=method" };
            return Either::Right(Box::pin(pass(self.inner.clone(), request, word)));
        }
        let now = millis();
        let cookies = context.cookies.get() && has_cookies(&context, request.http.headers());
        let asks = Asks::new(request.http.headers(), context.authorized.get(), cookies);
        let key = key(&context, request.http.headers());
        let head = context.method == Method::HEAD;
        let limit = context.route().limits.request.unwrap_or(LONGEST);
        let look = match look(&cache, &key, request.http.headers(), &asks, now) {
            Look::Use(stored, judgement) => {
                let served = if judgement == Judgement::Fresh { Served::Hit } else { Served::Stale };
                if judgement == Judgement::WhileRevalidate && !cache.is_failing(&key, now, limit) {
                    let this = Filling { cache, keep, asks, key, stored: Some(stored.clone()), why: "stale" };
                    revalidate(self.inner.clone(), &context, copy(&request), this);
                }
                let answer = answer(&context, &stored, request.http.headers(), head, now, served, &Said::Hit);
                return Either::Right(Box::pin(std::future::ready(Ok(answer))));
            }
            Look::Validate(stored) => {
                let why = if asks.wants_new(&stored.terms, stored.age(now)) { "request" } else { "stale" };
                let this = Filling { cache, keep, asks, key, stored: Some(stored), why };
                // Its upstream failed a moment ago: nobody waits for that again.
                if let Some(stored) = this.stored.clone().filter(|stored| {
                    this.may_replace(stored, now) && !asks.no_cache() && this.cache.is_failing(&this.key, now, limit)
                }) {
                    let said = Said::Forwarded("stale", "; collapsed; detail=stale-if-error");
                    let answer = answer(&context, &stored, request.http.headers(), head, now, Served::Stale, &said);
                    return Either::Right(Box::pin(std::future::ready(Ok(answer))));
                }
                return Either::Right(Box::pin(fetch(self.inner.clone(), request, this)));
            }
            Look::Nothing(why) => (None, why),
        };
        let (stored, why) = look;
        let this = Filling { cache, keep, asks, key, stored, why };
        Either::Right(Box::pin(fetch(self.inner.clone(), request, this)))
    }
}

/// How long an answer may take that nobody waits for, where the route has no limit.
const LONGEST: Duration = Duration::from_secs(30);

/// Whether the cache has a say: a plain GET or HEAD.
fn is_ours(request: &Request) -> bool {
    let Request { http, context } = request;
    let headers = http.headers();
    matches!(context.method, Method::GET | Method::HEAD)
        && context.upload.is_empty()
        && !(context.upgrade.get() && context.route().websocket)
        // They ask the origin, not a cache (RFC 9111 §4.3.2).
        && !headers.contains_key(header::IF_MATCH)
        && !headers.contains_key(header::IF_UNMODIFIED_SINCE)
}

fn millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// What may have made an answer what it is.
fn key(context: &Exchange, headers: &HeaderMap) -> Vec<u8> {
    let host = context.host.get().map_or(&b""[..], HeaderValue::as_bytes);
    let route = context.route();
    let upstream = context.upstream().map_or("", |upstream| &*upstream.name);
    let mut key = Builder::new(host, target(context).as_bytes())
        .part(route.name.as_bytes())
        .part(&route.shape)
        .part(if context.https.get() { b"https" } else { b"http" })
        // Whom it was for, and who answers: the monolith may stand in for the service, and know it.
        .part(context.decided.get().word().as_bytes())
        .part(upstream.as_bytes())
        .part(match context.asked.get() {
            Some(asked) if asked.as_bytes() != host => asked.as_bytes(),
            _ => b"",
        });
    // What a trusted proxy says of the way may be in the answer's links.
    if !context.snapshot().trusted_proxies.is_empty() {
        for name in [&fields::X_FORWARDED_PREFIX, &X_FORWARDED_PORT] {
            key = key.field(name.as_str(), headers.get(name));
        }
    }
    for (_, name) in route.auth.iter().flat_map(|auth| &auth.forward) {
        key = key.field(name.as_str(), headers.get(name));
    }
    key.finish()
}

/// `x-forwarded-port`
const X_FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");

/// Path and query, as they go on.
fn target(context: &Exchange) -> &str {
    context.target.get().map_or("/", PathAndQuery::as_str)
}

/// Whether a request has cookies beside the gateway's own, of which the arm is all that matters.
fn has_cookies(context: &Exchange, headers: &HeaderMap) -> bool {
    let own = &context.snapshot().own_cookies;
    let lines = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes);
    lines.flat_map(|line| line.split(|byte| *byte == b';')).map(<[u8]>::trim_ascii).any(|pair| {
        let name = pair.split(|byte| *byte == b'=').next().unwrap_or_default();
        !pair.is_empty() && !own.iter().any(|own| own.as_bytes() == name)
    })
}

/// What is kept for a request.
enum Look {
    /// An answer that will do.
    Use(Arc<Stored>, Judgement),
    /// One that the upstream must be asked about.
    Validate(Arc<Stored>),
    /// None, and why.
    Nothing(&'static str),
}

fn look(cache: &Cache, key: &[u8], headers: &HeaderMap, asks: &Asks, now: u64) -> Look {
    let Some(resource) = cache.get(key) else { return Look::Nothing("uri-miss") };
    let Some(stored) = resource.select(headers) else { return Look::Nothing("vary-miss") };
    if !asks.may_have(&stored.terms) {
        return Look::Nothing("request");
    }
    match asks.judge(&stored.terms, stored.age(now)) {
        Judgement::Validate => Look::Validate(stored.clone()),
        judgement => Look::Use(stored.clone(), judgement),
    }
}

/// How what is kept came to be the answer (RFC 9211 §2): a hit was not forwarded.
enum Said<'s> {
    /// It was in memory.
    Hit,
    /// It was in Redis.
    Shared,
    /// The upstream was asked: why, and what came of that.
    Forwarded(&'s str, &'s str),
}

/// The response from what is kept.
fn answer(
    context: &Exchange,
    stored: &Stored,
    headers: &HeaderMap,
    head: bool,
    now: u64,
    served: Served,
    said: &Said<'_>,
) -> Response {
    context.cache.set(Some(served));
    if served != Served::Revalidated {
        context.answered_here();
    }
    let mut response = stored.answer(headers, head, now).map(ResponseBody::Full);
    let mut text = String::with_capacity(64);
    match said {
        Said::Hit | Said::Shared => text.push_str("gw; hit"),
        Said::Forwarded(why, more) => ["gw; fwd=", why, more].into_iter().for_each(|part| text.push_str(part)),
    }
    text.push_str("; ttl=");
    let left = stored.left(now);
    if left < 0 {
        text.push('-');
    }
    text.push_str(itoa::Buffer::new().format(left.unsigned_abs()));
    if matches!(said, Said::Shared) {
        text.push_str("; detail=shared");
    }
    tell(response.headers_mut(), &text);
    response
}

/// Says what the cache did, after what others did (RFC 9211 §2).
fn tell(headers: &mut HeaderMap, text: &str) {
    if let Ok(value) = HeaderValue::from_str(text) {
        headers.append(CACHE_STATUS, value);
    }
}

/// Lets a request pass that the cache has no say in.
async fn pass<S>(mut inner: S, request: Request, word: &'static str) -> Result<Response, Error>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    match inner.call(request).await {
        Ok(mut response) => {
            tell(response.headers_mut(), word);
            Ok(response)
        }
        Err(mut error) => {
            error.fields.push((CACHE_STATUS, HeaderValue::from_static(word)));
            Err(error)
        }
    }
}

/// The head of a request once more.
fn copy(request: &Request) -> http::Request<RequestBody> {
    let mut again = http::Request::new(RequestBody::empty());
    *again.method_mut() = request.http.method().clone();
    *again.uri_mut() = request.http.uri().clone();
    *again.headers_mut() = request.http.headers().clone();
    // The whole of it is wanted, whatever the client has.
    for name in CONDITIONS {
        again.headers_mut().remove(name);
    }
    again
}

/// What makes a request ask for less than the whole.
const CONDITIONS: [HeaderName; 4] = [header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE, header::IF_RANGE, header::RANGE];

/// A request on its way to an answer that may be kept.
struct Filling {
    cache: Arc<Cache>,
    keep: Keep,
    asks: Asks,
    key: Vec<u8>,
    /// What is kept already, and must be asked about.
    stored: Option<Arc<Stored>>,
    /// Why the upstream is asked (RFC 9211 §2.2).
    why: &'static str,
}
