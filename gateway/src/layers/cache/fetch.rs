//! Asks the upstream, or waits for another who does; what its answer means for what is kept.

use std::{future::poll_fn, pin::pin, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use http_body::Body as _;
use tower::Service;

use super::{
    CONDITIONS, Filling, Look, answer, copy, key, look, millis,
    take::{keep, plan, store},
    tell,
};
use crate::{
    body::ResponseBody,
    cache::{
        flight::{Flight, Lead, Outcome, Place},
        marks::Position,
        policy::{self, Judgement, Times},
        shared::Found,
        stored::{self, CACHE_STATUS, Stored},
        vary,
    },
    context::{Context, Request, Response, Served},
    error::{Error, Kind},
    upstream::upload::RequestBody,
};

/// Fetches a newer answer; nobody waits for it (RFC 5861 §3).
pub(super) fn revalidate<S>(inner: S, context: &Context, request: http::Request<RequestBody>, filling: Filling)
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
pub(super) async fn fetch<S>(inner: S, request: Request, mut filling: Filling) -> Result<Response, Error>
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

/// What a HEAD says of what is kept (RFC 9111 §4.3.5).
fn freshen(filling: &Filling, key: &[u8], response: &Response, now: u64, born: Position, times: Times) {
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
