//! Asks the upstream, or waits for another who does; what its answer means for what is kept.

use std::{future::poll_fn, pin::pin, sync::Arc};

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body::Body as _;
use tower::Service;

use super::{
    CONDITIONS, Filling, LONGEST, Look, Said, answer, copy, key, look, millis,
    take::{keep, plan, store},
    tell,
};
use crate::{
    body::ResponseBody,
    cache::{
        flight::{Flight, Lead, Outcome, Place},
        lying::Found,
        marks::Position,
        policy::{self, Asks, Judgement, Times},
        range,
        stored::{self, CACHE_STATUS, Stored},
        vary,
    },
    context::{Context, Request, Response, Served},
    error::{Error, Kind},
    upstream::upload::{RequestBody, within},
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
    let limits = context.route().limits;
    tokio::task::spawn_local(async move {
        let (done, started) = (again.clone(), again.started);
        let upload = again.upload.clone();
        let fetched = ask(inner, Request { http: Box::new(request), context: again }, filling, Some(lead));
        let limit = Some(limits.request.unwrap_or(LONGEST));
        // Until the head, as for everybody; then each pause has its own limit.
        match within(&timer, &upload, limit, limits.idle, Kind::RequestTimeout, started, fetched).await {
            Ok(response) => {
                done.status.set(response.status().as_u16());
                let mut body = pin!(response.into_body());
                let ended = loop {
                    match poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
                        Some(Ok(_)) => {}
                        Some(Err(error)) => break Some(error),
                        None => break None,
                    }
                };
                done.complete.set(ended.is_none());
                *done.failure.borrow_mut() = ended.map(|error| (error.kind, error.detail));
            }
            Err(error) => {
                done.status.set(error.kind.status().as_u16());
                done.complete.set(true);
                *done.failure.borrow_mut() = Some((error.kind, error.detail));
            }
        }
        // Nobody was served by it.
        done.cache.set(None);
    });
}

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
        && !filling.cache.is_passing(&filling.key, millis())
        && let Some(stored) = second_tier(&filling, headers()).await
    {
        let now = millis();
        match filling.asks.judge(&stored.terms, stored.age(now)) {
            Judgement::Validate => (filling.stored, filling.why) = (Some(stored), "stale"),
            judgement => {
                let served = if judgement == Judgement::Fresh { Served::Hit } else { Served::Stale };
                return Ok(answer(&context, &stored, headers(), head, now, served, &Said::Shared));
            }
        }
    }
    if filling.asks.only_if_cached() {
        context.cache.set(Some(Served::Miss));
        context.answered_here();
        let fields = vec![(CACHE_STATUS, HeaderValue::from_static("gw; detail=only-if-cached"))];
        request.discard();
        return Err(Error { fields, ..Error::new(Kind::NotCached) });
    }
    // Whoever is known by more than the URL waits for nobody, and has nobody wait.
    let together = !head
        && !filling.asks.is_somebodys()
        && !filling.asks.no_store()
        && !filling.asks.no_cache()
        // What is asked of a part, or on a condition, brings nothing for others.
        && (filling.stored.is_some() || !CONDITIONS.iter().any(|name| headers().contains_key(name)))
        && !filling.keep.collapse.is_zero()
        && !filling.cache.is_passing(&filling.key, millis());
    let mut lead = None;
    if together {
        let until = tokio::time::Instant::now() + filling.keep.collapse;
        loop {
            let outcome = match filling.cache.join(&filling.key) {
                Place::First(first) => {
                    lead = Some(first);
                    // Another may have brought it between the look and this.
                    Some(Outcome::Stored)
                }
                Place::Behind(flight) => wait(&flight, context.worker.timer.sleep_until(until)).await,
            };
            let now = millis();
            match outcome {
                Some(Outcome::Abandoned) => continue,
                Some(Outcome::Streaming(fill)) => {
                    let age = fill.head.age(now);
                    if vary::matches(fill.selection(), headers())
                        && filling.asks.may_have(&fill.head.terms)
                        && filling.asks.judge(&fill.head.terms, age) == Judgement::Fresh
                        && let Some(reader) = fill.read(None)
                    {
                        context.cache.set(Some(Served::Collapsed));
                        context.answered_here();
                        let mut response = fill.response(ResponseBody::Filling(Box::new(reader)));
                        response.headers_mut().insert(header::AGE, HeaderValue::from(age));
                        tell(response.headers_mut(), &format!("gw; fwd={}; collapsed", filling.why));
                        return Ok(response);
                    }
                }
                Some(Outcome::Stored) => match look(&filling.cache, &filling.key, headers(), &filling.asks, now) {
                    Look::Use(stored, _) => {
                        let first = lead.take().is_some();
                        let (served, said) = if first {
                            (Served::Hit, Said::Hit)
                        } else {
                            (Served::Collapsed, Said::Forwarded(filling.why, "; collapsed"))
                        };
                        return Ok(answer(&context, &stored, headers(), head, now, served, &said));
                    }
                    Look::Validate(stored) => filling.stored = Some(stored),
                    Look::Nothing(_) => {}
                },
                // It failed, or takes too long: what is kept may do.
                Some(Outcome::Failed) | None => {
                    if let Some(stored) = filling.stored.as_ref().filter(|stored| filling.may_replace(stored, now)) {
                        let said = Said::Forwarded("stale", "; collapsed; detail=stale-if-error");
                        return Ok(answer(&context, stored, headers(), head, now, Served::Stale, &said));
                    }
                }
                Some(Outcome::Private) => {}
            }
            break;
        }
    }
    ask(inner, request, filling, lead).await
}

async fn wait(flight: &Flight, sleep: crate::timer::Sleep) -> Option<Outcome> {
    tokio::select! {
        outcome = flight.outcome() => Some(outcome),
        () = sleep => None,
    }
}

/// Looks in the second tier; what is there comes into memory.
async fn second_tier(filling: &Filling, headers: &HeaderMap) -> Option<Arc<Stored>> {
    let shared = filling.cache.shared()?;
    let local = filling.cache.marks.now();
    let asked = tokio::time::Instant::now();
    let found = match shared.get(&filling.key, b"", asked).await? {
        Found::By(names) => shared.get(&filling.key, &vary::tag(&vary::select(&names, headers)), asked).await?,
        found @ Found::Answer(_) => found,
    };
    let Found::Answer(mut stored) = found else { return None };
    stored.born.local = local;
    let stored: Arc<Stored> = Arc::from(stored);
    let usable = vary::matches(&stored.selection, headers) && filling.asks.may_have(&stored.terms);
    (filling.cache.put(&filling.key, &stored) && usable).then_some(stored)
}

/// Asks the upstream, keeps its answer if that may be, and gives an older one where it fails and that may be.
async fn ask<S>(mut inner: S, mut request: Request, filling: Filling, mut lead: Option<Lead>) -> Result<Response, Error>
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
    let replaces = filling.stored.clone().filter(|stored| filling.may_replace(stored, before.1));
    let called = inner.call(request);
    let limits = context.route().limits;
    let result = match (&replaces, limits.request) {
        // Before the whole request is given up, what is kept will do.
        (Some(_), Some(limit)) => {
            let (timer, upload) = (context.worker.timer.clone(), context.upload.clone());
            let limit = Some(limit.mul_f64(0.9));
            within(&timer, &upload, limit, limits.idle, Kind::RequestTimeout, context.started, called).await
        }
        _ => called.await,
    };
    let now = millis();
    let failed = match &result {
        Ok(response) if policy::is_failure(response.status()) => {
            Some(format!("; fwd-status={}; detail=stale-if-error", response.status().as_u16()))
        }
        Err(error) if error.kind.is_upstreams() || error.kind.is_unavailable() => {
            Some(format!("; detail={}", error.kind.word()))
        }
        _ => None,
    };
    if let Some(failed) = &failed {
        filling.cache.fail(&filling.key, now);
        if let Some(lead) = &mut lead {
            lead.settle(Outcome::Failed);
        }
        if let Some(stored) = &replaces
            && filling.may_replace(stored, now)
        {
            context.let_down.set(true);
            match result {
                Ok(response) => response.into_body().drain(),
                // Whoever looks at the log sees why.
                Err(error) => {
                    context.count_limit(error.kind);
                    *context.failure.borrow_mut() = Some((error.kind, error.detail));
                }
            }
            let said = Said::Forwarded(filling.why, failed);
            return Ok(answer(&context, stored, &asked_headers, head, now, Served::Stale, &said));
        }
    }
    if failed.is_none() {
        filling.cache.recover(&filling.key);
    }
    context.cache.set(Some(Served::Miss));
    let mut response = match result {
        Ok(response) => response,
        Err(mut error) => {
            // Each asks for itself, at once.
            if let Some(lead) = &mut lead {
                lead.settle(Outcome::Failed);
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
        let tags = (response.headers().get(header::ETAG), stored.headers.get(header::ETAG));
        let another = matches!(tags, (Some(new), Some(known)) if range::opaque(new.as_bytes()) != range::opaque(known.as_bytes()));
        if key != filling.key || another {
            // It says that of another answer than the one that is kept.
            if let Some(lead) = &mut lead {
                lead.settle(Outcome::Private);
            }
            let Some(spare) = spare else { return Err(Error::new(Kind::Internal)) };
            return once_more(inner, &context, spare).await;
        }
        let (refreshed, storable) =
            filling.refresh(&stored, response.headers(), &asked_headers, times, (now, before.0));
        let refreshed = Arc::new(refreshed);
        let kept = if storable {
            !filling.asks.no_store() && store(&filling, &key, &refreshed, now)
        } else {
            filling.cache.forget(&key, &stored);
            false
        };
        if let Some(lead) = &mut lead {
            lead.settle(if kept { Outcome::Stored } else { Outcome::Private });
        }
        let said = if kept { "; fwd-status=304; stored" } else { "; fwd-status=304" };
        let said = Said::Forwarded(filling.why, said);
        let mut answered = answer(&context, &refreshed, &asked_headers, head, now, Served::Revalidated, &said);
        // What is its client's alone is not kept, and not lost.
        for cookie in response.headers().get_all(header::SET_COOKIE) {
            answered.headers_mut().append(header::SET_COOKIE, cookie.clone());
        }
        return Ok(answered);
    }
    let mut said = format!("gw; fwd={}; fwd-status={}", filling.why, status.as_u16());
    if head {
        if key == filling.key {
            freshen(&filling, &response, &asked_headers, times, (now, before.0));
        }
        tell(response.headers_mut(), &said);
        return Ok(response);
    }
    let plan = plan(&filling, &asked_headers, &mut response, now, before.0, times);
    let (fill, length) = match plan {
        Ok(plan) => plan,
        Err(why) => {
            // What one client's credentials brought says nothing of what others get.
            let of_request = why == "part" || filling.asks.no_store() || filling.asks.is_somebodys();
            if !of_request && !policy::is_failure(status) && status != StatusCode::NOT_MODIFIED {
                // What was kept is not what is there now.
                if let Some(stored) = &filling.stored {
                    filling.cache.forget(&key, stored);
                }
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
    let (always, left) = (fill.terms.always_validate, fill.left(now));
    if key == filling.key && !always && left > 0 {
        filling.cache.collapse(&filling.key);
    } else {
        // An answer of another system, or one that each must ask about, is nobody's who waits here.
        filling.cache.pass(&filling.key, now);
        if let Some(lead) = &mut lead {
            lead.settle(Outcome::Private);
        }
        lead = None;
    }
    Ok(keep(filling, key, fill, length, response, lead, &said))
}

/// Asks once more for all of it.
async fn once_more<S>(mut inner: S, context: &Context, request: http::Request<RequestBody>) -> Result<Response, Error>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    let again = context.again(&request);
    let answered = inner.call(Request { http: Box::new(request), context: again.clone() }).await;
    match &answered {
        Ok(response) => again.status.set(response.status().as_u16()),
        Err(error) => {
            again.status.set(error.kind.status().as_u16());
            *again.failure.borrow_mut() = Some((error.kind, error.detail.clone()));
        }
    }
    again.complete.set(true);
    answered.map(|mut response| {
        tell(response.headers_mut(), "gw; fwd=miss");
        response
    })
}

impl Filling {
    /// Whether an answer may stand in for a failure, and was not invalidated since.
    pub(super) fn may_replace(&self, stored: &Stored, now: u64) -> bool {
        stored.may_replace(now) && self.cache.marks.admits(&self.key, &stored.tags, stored.born.local)
    }

    /// An answer with what a 304, or a HEAD, says anew; and whether it may be kept so.
    fn refresh(
        &self,
        stored: &Stored,
        new: &HeaderMap,
        request: &HeaderMap,
        times: Times,
        (came, born): (u64, Position),
    ) -> (Stored, bool) {
        let mut headers = stored.headers.clone();
        policy::update(&mut headers, &stored::keepable(new));
        // It was made now, unless it says otherwise; its age on the way is its own.
        if !new.contains_key(header::DATE)
            && let Ok(date) = HeaderValue::try_from(httpdate::fmt_http_date(std::time::SystemTime::now()))
        {
            headers.insert(header::DATE, date);
        }
        if let Some(age) = new.get(header::AGE) {
            headers.insert(header::AGE, age.clone());
        }
        // The client's own cookie goes to it; what is kept has none.
        headers.remove(header::SET_COOKIE);
        let terms = policy::terms(stored.status, &headers, &Asks::default(), &self.keep, times);
        headers.remove(header::AGE);
        let (names, tags) = (vary::names(&headers), stored::tags(&headers));
        let storable = terms.is_ok() && names.is_some() && tags.is_some();
        let refreshed = Stored {
            status: stored.status,
            selection: names.map_or_else(|| stored.selection.clone(), |names| vary::select(&names, request)),
            tags: tags.unwrap_or_default(),
            body: stored.body.clone(),
            terms: terms.unwrap_or(policy::Terms {
                always_validate: true,
                never_stale: true,
                ..policy::Terms::default()
            }),
            headers,
            came,
            born,
        };
        (refreshed, storable)
    }
}

/// What a HEAD says of what is kept (RFC 9111 §4.3.5): each validator that it brings must be the one that is known.
fn freshen(filling: &Filling, response: &Response, request: &HeaderMap, times: Times, at: (u64, Position)) {
    let Some(stored) = filling.stored.as_ref().filter(|_| response.status() == StatusCode::OK) else { return };
    let length = response.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    let mut compared = length.map(|length: usize| length == stored.body.len());
    for name in [header::ETAG, header::LAST_MODIFIED] {
        if let Some(new) = response.headers().get(&name) {
            compared = Some(compared.unwrap_or(true) && stored.headers.get(&name) == Some(new));
        }
    }
    match compared {
        Some(false) => filling.cache.forget(&filling.key, stored),
        Some(true) => {
            let (refreshed, storable) = filling.refresh(stored, response.headers(), request, times, at);
            if storable {
                store(filling, &filling.key, &Arc::new(refreshed), at.0);
            }
        }
        None => {}
    }
}
