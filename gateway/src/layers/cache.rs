//! Answers from what is kept, and keeps what may be (RFC 9111); tells with `Cache-Status` (RFC 9211) what it did.
//!
//! Inside of the choice of the arm, so that an answer never crosses over to the other, and outside of the fallback: what the
//! monolith gave in the service's place is kept as the monolith's. A write through any route, to either system, ends what was kept of its
//! URL, wherever it is kept.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::future::Either;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header, uri::PathAndQuery};
use http_body::Body as _;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    cache::{
        Cache, Reserved,
        fill::{End, Fill, Rest},
        flight::{Flight, Lead, Outcome, Place},
        key::Builder,
        policy::{self, Asks, Judgement, Times},
        shared::Found,
        stored::{self, CACHE_STATUS, Stored},
        vary,
    },
    context::{Context, Exchange, Request, Response, Served},
    error::{Error, Kind},
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
        let Some(cache) = context.local.snapshot.cache.clone() else { return Either::Left(self.inner.call(request)) };
        let keep = context.route().cache;
        let _ =
            context.target.set(request.http.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/")));
        if !context.method.is_safe() || context.overridden.get() {
            return Either::Right(Box::pin(write(self.inner.clone(), request, cache, keep.is_some())));
        }
        let Some(keep) = keep else { return Either::Left(self.inner.call(request)) };
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
        let look = match look(&cache, &key, request.http.headers(), &asks, now) {
            Look::Use(stored, judgement) => {
                let served = if judgement == Judgement::Fresh { Served::Hit } else { Served::Stale };
                if judgement == Judgement::WhileRevalidate {
                    let this = Filling { cache, keep, asks, key, stored: Some(stored.clone()), why: "stale" };
                    revalidate(self.inner.clone(), &context, copy(&request), this);
                }
                let answer = answer(&context, &stored, request.http.headers(), head, now, served, "");
                return Either::Right(Box::pin(std::future::ready(Ok(answer))));
            }
            Look::Validate(stored) => (Some(stored), "stale"),
            Look::Nothing(why) => (None, why),
        };
        if asks.only_if_cached() {
            context.cache.set(Some(Served::Miss));
            request.discard();
            return Either::Right(Box::pin(std::future::ready(Err(Error::new(Kind::NotCached)))));
        }
        let (stored, why) = look;
        let this = Filling { cache, keep, asks, key, stored, why };
        Either::Right(Box::pin(fetch(self.inner.clone(), request, this)))
    }
}

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
        .part(if context.https.get() { b"https" } else { b"http" })
        .part(context.arm.get().word().as_bytes())
        .part(upstream.as_bytes())
        .part(match context.asked.get() {
            Some(asked) if asked.as_bytes() != host => asked.as_bytes(),
            _ => b"",
        });
    for (_, name) in route.auth.iter().flat_map(|auth| &auth.forward) {
        key = key.field(name.as_str(), headers.get(name));
    }
    key.finish()
}

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

/// The response from what is kept.
fn answer(
    context: &Exchange,
    stored: &Stored,
    headers: &HeaderMap,
    head: bool,
    now: u64,
    served: Served,
    more: &str,
) -> Response {
    context.cache.set(Some(served));
    if served != Served::Revalidated {
        context.answered_here();
    }
    let mut response = stored.answer(headers, head, now).map(ResponseBody::Full);
    let mut text = String::with_capacity(48);
    text.push_str("gw; hit; ttl=");
    let left = stored.left(now);
    if left < 0 {
        text.push('-');
    }
    text.push_str(itoa::Buffer::new().format(left.unsigned_abs()));
    text.push_str(more);
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

/// Lets a write pass. Once it may have happened, what is kept of its URL is used no more (RFC 9111 §4.4).
async fn write<S>(inner: S, request: Request, cache: Arc<Cache>, kept: bool) -> Result<Response, Error>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    let context = request.context.clone();
    let mut ended = Ended { context: context.clone(), cache, armed: true };
    let result = if kept {
        context.cache.set(Some(Served::Bypass));
        pass(inner, request, "gw; fwd=method").await
    } else {
        let mut inner = inner;
        inner.call(request).await
    };
    match &result {
        Ok(response) => {
            let status = response.status();
            ended.armed = status.is_success() || status.is_redirection();
            if ended.armed {
                for name in [header::LOCATION, header::CONTENT_LOCATION] {
                    ended.also(response.headers().get(name));
                }
            }
        }
        // It may have been done all the same.
        Err(error) => ended.armed = error.sent,
    }
    result
}

/// Ends what is kept of a URL when it goes: also where the client has left, and nobody knows what came of its write.
struct Ended {
    context: Context,
    cache: Arc<Cache>,
    armed: bool,
}

impl Ended {
    fn host(&self) -> &[u8] {
        self.context.host.get().map_or(&b""[..], HeaderValue::as_bytes)
    }

    /// The same for a URL that the answer names, on this host.
    fn also(&self, value: Option<&HeaderValue>) {
        let Some(uri) = value.and_then(|value| value.to_str().ok()?.parse::<Uri>().ok()) else { return };
        let here = match uri.authority() {
            Some(authority) => authority.as_str().as_bytes().eq_ignore_ascii_case(self.host()),
            None => true,
        };
        if here && let Some(target) = uri.path_and_query().filter(|target| target.as_str().starts_with('/')) {
            self.cache.invalidate(self.host(), target.as_str().as_bytes());
        }
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        if self.armed {
            self.cache.invalidate(self.host(), target(&self.context).as_bytes());
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

/// Fetches a newer answer; nobody waits for it (RFC 5861 §3).
fn revalidate<S>(inner: S, context: &Context, request: http::Request<RequestBody>, filling: Filling)
where
    S: Service<Request, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    let Place::First(lead) = filling.cache.join(&filling.key) else { return };
    let mut request = request;
    *request.method_mut() = Method::GET;
    // Who asked is answered; what is asked now has its own time.
    let again = context.again(&request);
    let timer = context.worker.timer.clone();
    let limit = context.route().limits.request.unwrap_or(LONGEST);
    tokio::task::spawn_local(async move {
        let done = again.clone();
        let fetched = ask(inner, Request { http: Box::new(request), context: again }, filling, Some(lead), "");
        let ended = async {
            match fetched.await {
                Ok(response) => {
                    done.status.set(response.status().as_u16());
                    let mut body = pin!(response.into_body());
                    while let Some(Ok(_)) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {}
                    done.complete.set(true);
                }
                Err(error) => {
                    done.status.set(error.kind.status().as_u16());
                    *done.failure.borrow_mut() = Some((error.kind, error.detail));
                }
            }
        };
        tokio::select! {
            () = ended => {}
            () = timer.sleep(limit) => {}
        }
    });
}

/// How long an answer may take that nobody waits for, where the route has no limit.
const LONGEST: Duration = Duration::from_secs(30);

/// Waits for another who asks for the same, or asks.
async fn fetch<S>(inner: S, request: Request, mut filling: Filling) -> Result<Response, Error>
where
    S: Service<Request, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    let context = request.context.clone();
    let head = context.method == Method::HEAD;
    let headers = || request.http.headers();
    if filling.stored.is_none()
        && filling.why != "request"
        && let Some(stored) = second_tier(&filling, headers()).await
    {
        let now = millis();
        match filling.asks.judge(&stored.terms, stored.age(now)) {
            Judgement::Validate => (filling.stored, filling.why) = (Some(stored), "stale"),
            judgement => {
                let served = if judgement == Judgement::Fresh { Served::Hit } else { Served::Stale };
                return Ok(answer(&context, &stored, headers(), head, now, served, "; detail=shared"));
            }
        }
    }
    // Whoever is known by more than the URL waits for nobody, and has nobody wait.
    let together = !head
        && !filling.asks.is_somebodys()
        && !filling.asks.no_store()
        && !filling.asks.no_cache()
        && !headers().contains_key(header::RANGE)
        && !filling.keep.collapse.is_zero()
        && !filling.cache.is_passing(&filling.key, millis());
    let mut lead = None;
    if together {
        let until = tokio::time::Instant::now() + filling.keep.collapse;
        loop {
            match filling.cache.join(&filling.key) {
                Place::First(first) => {
                    lead = Some(first);
                    break;
                }
                Place::Alone => break,
                Place::Behind(flight) => {
                    let sleep = context.worker.timer.sleep_until(until);
                    let Some(outcome) = wait(&flight, sleep).await else { break };
                    match outcome {
                        Outcome::Abandoned => {}
                        Outcome::Private => break,
                        Outcome::Streaming(fill) => {
                            if vary::matches(fill.selection(), headers())
                                && filling.asks.may_have(&fill.head.terms)
                                && let Some(reader) = fill.read(None)
                            {
                                context.cache.set(Some(Served::Collapsed));
                                context.answered_here();
                                let mut response = fill.response(ResponseBody::Filling(Box::new(reader)));
                                tell(response.headers_mut(), &format!("gw; fwd={}; collapsed", filling.why));
                                return Ok(response);
                            }
                            break;
                        }
                        Outcome::Stored => {
                            let now = millis();
                            if let Look::Use(stored, _) =
                                look(&filling.cache, &filling.key, headers(), &filling.asks, now)
                            {
                                let more = "; collapsed";
                                return Ok(answer(&context, &stored, headers(), head, now, Served::Collapsed, more));
                            }
                            break;
                        }
                    }
                }
            }
        }
    }
    ask(inner, request, filling, lead, "").await
}

async fn wait(flight: &Flight, sleep: crate::timer::Sleep) -> Option<Outcome> {
    tokio::select! {
        outcome = flight.outcome() => Some(outcome),
        () = sleep => None,
    }
}

/// Looks in the second tier; what is there comes into memory.
async fn second_tier(filling: &Filling, headers: &HeaderMap) -> Option<Arc<Stored>> {
    let shared = filling.cache.shared.as_ref()?;
    let local = filling.cache.marks.now();
    let found = match shared.get(&filling.key, b"").await? {
        Found::By(names) => shared.get(&filling.key, &vary::tag(&vary::select(&names, headers))).await?,
        found @ Found::Answer(_) => found,
    };
    let Found::Answer(mut stored) = found else { return None };
    stored.born.local = local;
    let stored: Arc<Stored> = Arc::from(stored);
    let usable = vary::matches(&stored.selection, headers) && filling.asks.may_have(&stored.terms);
    (filling.cache.put(&filling.key, &stored) && usable).then_some(stored)
}

/// Asks the upstream, keeps its answer if that may be, and gives an older one where it fails and that may be.
async fn ask<S>(
    mut inner: S,
    mut request: Request,
    filling: Filling,
    mut lead: Option<Lead>,
    more: &'static str,
) -> Result<Response, Error>
where
    S: Service<Request, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    let context = request.context.clone();
    let head = context.method == Method::HEAD;
    let asked_headers = request.http.headers().clone();
    let before = (filling.cache.position(), millis());
    let mut conditional = false;
    if let Some(stored) = &filling.stored {
        let headers = request.http.headers_mut();
        let (tag, modified) = (stored.headers.get(header::ETAG), stored.headers.get(header::LAST_MODIFIED));
        conditional = !head && (tag.is_some() || modified.is_some());
        if conditional {
            for name in CONDITIONS {
                headers.remove(name);
            }
            for (name, value) in [(header::IF_NONE_MATCH, tag), (header::IF_MODIFIED_SINCE, modified)] {
                if let Some(value) = value {
                    headers.insert(name, value.clone());
                }
            }
        }
    }
    // The head goes on into the exchange; this is one that asks for all of it, should the answer be about another's.
    let spare = conditional.then(|| copy(&request));
    let replaces = filling.stored.clone().filter(|stored| stored.may_replace(before.1));
    let called = inner.call(request);
    let result = match (&replaces, context.route().limits.request) {
        // Before the whole request is given up, what is kept will do.
        (Some(_), Some(limit)) => {
            let sleep = context.worker.timer.sleep_until(context.started + limit.mul_f64(0.9));
            tokio::select! {
                result = called => result,
                () = sleep => Err(Error { sent: true, ..Error::new(Kind::AttemptTimeout) }),
            }
        }
        _ => called.await,
    };
    let now = millis();
    let failed = match &result {
        Ok(response) if policy::is_failure(response.status()) => {
            Some(format!("; fwd-status={}", response.status().as_u16()))
        }
        Err(error) if error.kind.is_upstreams() || error.kind.is_unavailable() => {
            Some(format!("; detail={}", error.kind.word()))
        }
        _ => None,
    };
    if let (Some(failed), Some(stored)) = (&failed, &replaces)
        && stored.may_replace(now)
    {
        if let Ok(response) = result
            && let ResponseBody::Upstream(body) = response.into_body()
        {
            body.drain();
        }
        if let Some(lead) = &mut lead {
            lead.settle(Outcome::Private);
        }
        let more = format!("; fwd={}{failed}", filling.why);
        return Ok(answer(&context, stored, &asked_headers, head, now, Served::Stale, &more));
    }
    context.cache.set(Some(Served::Miss));
    let mut response = match result {
        Ok(response) => response,
        Err(mut error) => {
            // Each asks for itself, at once.
            if let Some(lead) = &mut lead {
                lead.settle(Outcome::Private);
            }
            if let Ok(value) = HeaderValue::try_from(format!("gw; fwd={}", filling.why)) {
                error.fields.push((CACHE_STATUS, value));
            }
            return Err(error);
        }
    };
    // Who answered may not be whom the request was for.
    let key = key(&context, &asked_headers);
    let status = response.status();
    let times = Times { asked: before.1 / 1000, came: now / 1000 };
    if conditional && status == StatusCode::NOT_MODIFIED {
        let Some(stored) = filling.stored.clone() else { return Err(Error::new(Kind::Internal)) };
        if key != filling.key {
            // It says that of its own answer, not of the other's.
            drop(lead);
            let Some(spare) = spare else { return Err(Error::new(Kind::Internal)) };
            let again = context.again(&spare);
            let answered = inner.call(Request { http: Box::new(spare), context: again.clone() }).await;
            again.status.set(answered.as_ref().map_or(0, |response| response.status().as_u16()));
            again.complete.set(true);
            return answered.map(|mut response| {
                tell(response.headers_mut(), "gw; fwd=miss");
                response
            });
        }
        let mut headers = HeaderMap::clone(&stored.headers);
        policy::update(&mut headers, &stored::keepable(response.headers()));
        let refreshed = policy::terms(stored.status, &headers, &filling.asks, &filling.keep, times).map(|terms| {
            Arc::new(Stored {
                tags: stored::tags(&headers),
                selection: stored.selection.clone(),
                body: stored.body.clone(),
                status: stored.status,
                headers,
                terms,
                came: now,
                born: before.0,
            })
        });
        let kept = if let Ok(new) = &refreshed {
            store(&filling, &key, new, now)
        } else {
            filling.cache.remove(&key);
            false
        };
        if let Some(lead) = &mut lead {
            lead.settle(if kept { Outcome::Stored } else { Outcome::Private });
        }
        let more = format!("; fwd={}; fwd-status=304{}", filling.why, if kept { "; stored" } else { "" });
        let current = refreshed.as_ref().unwrap_or(&stored);
        return Ok(answer(&context, current, &asked_headers, head, now, Served::Revalidated, &more));
    }
    let mut said = format!("gw; fwd={}; fwd-status={}{more}", filling.why, status.as_u16());
    if head {
        freshen(&filling, &key, &response, now, before.0, times);
        tell(response.headers_mut(), &said);
        return Ok(response);
    }
    let plan = plan(&filling, &asked_headers, &mut response, now, before.0, times);
    let (fill, length) = match plan {
        Ok(plan) => plan,
        Err(why) => {
            // What was kept is not what is there now.
            if status == StatusCode::OK {
                filling.cache.remove(&key);
            }
            let of_request = matches!(why, "authorization" | "cookie" | "part") || filling.asks.no_store();
            if !of_request && !policy::is_failure(status) && status != StatusCode::NOT_MODIFIED {
                filling.cache.pass(&filling.key, now);
            }
            if let Some(lead) = &mut lead {
                lead.settle(Outcome::Private);
            }
            said.push_str("; detail=");
            said.push_str(&why.replace(' ', "-"));
            tell(response.headers_mut(), &said);
            return Ok(response);
        }
    };
    filling.cache.collapse(&filling.key);
    said.push_str("; stored");
    tell(response.headers_mut(), &said);
    // An answer of another system is nobody's who waits here.
    if key != filling.key
        && let Some(lead) = &mut lead
    {
        lead.settle(Outcome::Private);
    }
    Ok(keep(filling, key, fill, length, response, lead, now))
}

/// Puts an answer where all find it; whether it is kept here.
fn store(filling: &Filling, key: &[u8], stored: &Arc<Stored>, now: u64) -> bool {
    let kept = filling.cache.put(key, stored);
    if kept && let Some(shared) = &filling.cache.shared {
        shared.put(key, &vary::tag(&stored.selection), stored, now);
    }
    kept
}

/// What a HEAD says of what is kept (RFC 9111 §4.3.5).
fn freshen(
    filling: &Filling,
    key: &[u8],
    response: &Response,
    now: u64,
    born: crate::cache::marks::Position,
    times: Times,
) {
    let Some(stored) = filling.stored.as_ref().filter(|_| response.status() == StatusCode::OK) else { return };
    let same = |name: &HeaderName| match (response.headers().get(name), stored.headers.get(name)) {
        (Some(new), Some(known)) => new == known,
        _ => true,
    };
    let length = response.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let whole = length.is_none_or(|length: usize| length == stored.body.len());
    if !whole || ![header::ETAG, header::LAST_MODIFIED].iter().all(same) {
        filling.cache.remove(key);
        return;
    }
    let mut headers = stored.headers.clone();
    policy::update(&mut headers, &stored::keepable(response.headers()));
    if let Ok(terms) = policy::terms(stored.status, &headers, &filling.asks, &filling.keep, times) {
        let new = Stored {
            tags: stored::tags(&headers),
            selection: stored.selection.clone(),
            body: stored.body.clone(),
            status: stored.status,
            headers,
            terms,
            came: now,
            born,
        };
        store(filling, key, &Arc::new(new), now);
    }
}

/// How an answer will be kept, and its length if that is known; or why not.
fn plan(
    filling: &Filling,
    request: &HeaderMap,
    response: &mut Response,
    now: u64,
    born: crate::cache::marks::Position,
    times: Times,
) -> Result<(Stored, Option<u64>), &'static str> {
    let status = response.status();
    // What was said of a part, or to a condition, is not said of the whole.
    let part = CONDITIONS.iter().any(|name| request.contains_key(name)) && status != StatusCode::OK;
    if part || matches!(status, StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE) {
        return Err("part");
    }
    let terms = policy::terms(status, response.headers(), &filling.asks, &filling.keep, times)?;
    if matches!(response.body(), ResponseBody::Tunnel(_)) {
        return Err("tunnel");
    }
    let kind = response.headers().get(header::CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    if kind.len() >= 17 && kind[..17].eq_ignore_ascii_case(b"text/event-stream") {
        return Err("event stream");
    }
    if response.headers().contains_key(header::TRAILER) {
        return Err("trailers");
    }
    let length = response.headers().get(header::CONTENT_LENGTH);
    let length: Option<u64> = length.and_then(|length| length.to_str().ok()?.parse().ok());
    let length = length.or_else(|| response.body().size_hint().exact());
    if length.is_some_and(|length| length > filling.cache.max_object as u64) {
        return Err("too large");
    }
    // It says when it was made, now and whenever it is used (RFC 9110 §6.6.1).
    if !response.headers().contains_key(header::DATE)
        && let Ok(date) = HeaderValue::try_from(httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_millis(now)))
    {
        response.headers_mut().insert(header::DATE, date);
    }
    let headers = stored::keepable(response.headers());
    let names = vary::names(&headers).ok_or("vary")?;
    Ok((
        Stored {
            status,
            tags: stored::tags(&headers),
            headers,
            body: Bytes::new(),
            selection: vary::select(&names, request),
            terms,
            came: now,
            born,
        },
        length,
    ))
}

/// Takes an answer in while its client reads it.
fn keep(
    filling: Filling,
    key: Vec<u8>,
    head: Stored,
    length: Option<u64>,
    response: Response,
    mut lead: Option<Lead>,
    now: u64,
) -> Response {
    let first = usize::try_from(length.unwrap_or(FIRST)).unwrap_or(usize::MAX);
    let (parts, mut body) = response.into_parts();
    let Some(reserved) = filling.cache.reserve(first) else {
        // There is no memory for it now; the next may find some.
        return http::Response::from_parts(parts, body);
    };
    let fill = Fill::new(head, length);
    // The usual answer is there whole already.
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let mut whole = length == Some(0) || body.is_end_stream();
    let mut odd = None;
    while !whole && odd.is_none() {
        match Pin::new(&mut body).poll_frame(&mut cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => {
                    let bytes = fill.push(data);
                    whole = body.is_end_stream() || length.is_some_and(|length| bytes as u64 >= length);
                    if bytes > filling.cache.max_object {
                        odd = Some(End::Rest);
                    }
                }
                // Trailers that nobody announced may be left out (RFC 9110 §6.5.2).
                Err(_) => whole = true,
            },
            Poll::Ready(Some(Err(error))) => odd = Some(End::Broken(error.kind, error.detail)),
            Poll::Ready(None) => whole = true,
            Poll::Pending => break,
        }
    }
    if whole && length.is_none_or(|length| length == fill.bytes() as u64) {
        let stored = Arc::new(Stored { body: fill.join(), ..fill.head.clone() });
        let kept = store(&filling, &key, &stored, now);
        if let Some(lead) = &mut lead {
            lead.settle(if kept { Outcome::Stored } else { Outcome::Private });
        }
        return http::Response::from_parts(parts, ResponseBody::Full(stored.body.clone()));
    }
    let rest = Rest::default();
    let Some(reader) = fill.read(Some(rest.clone())) else {
        return http::Response::from_parts(parts, ResponseBody::Empty);
    };
    if let Some(end) = odd {
        *rest.borrow_mut() = Some(body);
        fill.end(end);
        if let Some(lead) = &mut lead {
            lead.settle(Outcome::Private);
        }
    } else {
        if length.is_some()
            && key == filling.key
            && let Some(lead) = &mut lead
        {
            lead.settle(Outcome::Streaming(fill.clone()));
        }
        let fill = fill.clone();
        let taking = Taking { filling, key, fill, body, rest, lead, reserved, left: first };
        tokio::task::spawn_local(taking.run(now));
    }
    http::Response::from_parts(parts, ResponseBody::Filling(Box::new(reader)))
}

/// What is reserved at a time for an answer whose length is not known.
const FIRST: u64 = 64 * 1024;

/// An answer that is being taken in.
struct Taking {
    filling: Filling,
    key: Vec<u8>,
    fill: Arc<Fill>,
    body: ResponseBody,
    rest: Rest,
    lead: Option<Lead>,
    reserved: Reserved,
    /// What is left of the memory that was reserved.
    left: usize,
}

impl Taking {
    /// Takes it in to its end, as long as anybody reads it.
    async fn run(mut self, now: u64) {
        let before = self.fill.bytes();
        self.left = self.left.saturating_sub(before);
        let end = loop {
            let frame = poll_fn(|cx| {
                if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
                    return Poll::Ready(Some(frame));
                }
                self.fill.poll_left(cx).map(|()| None)
            });
            match frame.await {
                // Nobody reads it: the upstream need not go on.
                None => return,
                Some(Some(Ok(frame))) => {
                    let Ok(data) = frame.into_data() else { break End::Whole };
                    let size = data.len();
                    let bytes = self.fill.push(data);
                    if self.body.is_end_stream() || self.fill.length.is_some_and(|length| bytes as u64 >= length) {
                        break End::Whole;
                    }
                    let room = match self.left.checked_sub(size) {
                        Some(left) => {
                            self.left = left;
                            true
                        }
                        None => self.reserved.grow(size),
                    };
                    if !room || bytes > self.filling.cache.max_object {
                        break End::Rest;
                    }
                }
                Some(Some(Err(error))) => break End::Broken(error.kind, error.detail),
                Some(None) => break End::Whole,
            }
        };
        let whole = self.fill.length.is_none_or(|length| length == self.fill.bytes() as u64);
        let outcome = match &end {
            End::Whole if whole => {
                let stored = Arc::new(Stored { body: self.fill.join(), ..self.fill.head.clone() });
                let kept = store(&self.filling, &self.key, &stored, now);
                if kept { Outcome::Stored } else { Outcome::Private }
            }
            End::Rest => {
                *self.rest.borrow_mut() = Some(std::mem::replace(&mut self.body, ResponseBody::Empty));
                Outcome::Private
            }
            _ => Outcome::Private,
        };
        if let Some(lead) = &mut self.lead {
            lead.settle(outcome);
        }
        self.fill.end(end);
    }
}
