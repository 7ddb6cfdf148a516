//! Sends copies of the monolith's requests to the service, and compares.
//!
//! Inside of the cache, so that there is one copy of what the monolith was asked, and none of what was kept; outside of the fallback, so
//! that what is compared is the answer that the client gets. A copy leaves once the client has its answer; it is bounded in number, time and
//! memory, and dropped rather than waited for. It takes a way of its own: no retries, no part in the breaker, last where it is full.

use std::{cell::RefCell, collections::BTreeMap, future::poll_fn, pin::pin, rc::Rc, sync::Arc, time::Duration};

use futures_util::future::Either;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use http_body::Body as _;
use tokio::time::Instant;
use tower::Service;

use super::{Later, always_ready, rewrite::Translate, send::Send};
use crate::{
    body::ResponseBody,
    config::Stage,
    context::{Context, Exchange, Leg, Request, Response},
    error::{Error, Kind},
    fields,
    resilience::bulkhead::Lane,
    shadow::{
        Shadow, Skip, Taken,
        compare::{Answer, Body, Compared, Difference, compare},
        ledger::FAILED,
        record::{self, Recorded, Recorder},
    },
    telemetry::metrics::Arm,
    upstream::upload::{Home, RequestBody, within},
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Copy<S> {
    inner: S,
}

impl<S> Copy<S> {
    /// Around whoever answers.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Copy<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        let (route, store) = (request.context.route(), &request.context.worker.store);
        if route.shadow.is_none() && !store.is_recording() {
            return Either::Left(self.inner.call(request));
        }
        let context = request.context.clone();
        if let Some(recorder) = context.worker.store.recorder()
            && let Some(recording) = Recording::of(&request, recorder)
        {
            let future = self.copy(request);
            return Either::Right(Box::pin(async move { Ok(recording.watch(future.await?, &context)) }));
        }
        self.copy(request)
    }
}

impl<S> Copy<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    fn copy(&mut self, mut request: Request) -> Either<S::Future, Later> {
        let context = request.context.clone();
        let route = context.route();
        let Some(shadow) = route.shadow.as_ref().filter(|shadow| is_wanted(shadow, &request)) else {
            return Either::Left(self.inner.call(request));
        };
        let Some(original) = Original::of(&mut request, shadow) else {
            return Either::Left(self.inner.call(request));
        };
        let future = self.inner.call(request);
        Either::Right(Box::pin(async move {
            match future.await {
                Ok(response) => Ok(watch(response, original, &context)),
                Err(error) => {
                    original.shadow.skip(Skip::Moot);
                    Err(error)
                }
            }
        }))
    }
}

/// Whether a request is one to copy.
fn is_wanted(shadow: &Shadow, request: &Request) -> bool {
    let Request { http, context } = request;
    let path = http.uri().path().as_bytes();
    let key = context.key.get().map_or_else(|| path.get(1..).unwrap_or_default(), Vec::as_slice);
    context.arm.get() == Arm::Legacy
        && matches!(context.route().stage, Stage::Shadow | Stage::Canary)
        && shadow.wants(&context.method, key)
        && !context.route().overlay.hold.is_held()
        && context.literal.get().is_none_or(|literal| shadow.wants(&context.method, literal))
        // Nobody knows what it does.
        && !context.overridden.get()
        && !context.upgrade.get()
        && !http.headers().contains_key(header::RANGE)
        && (shadow.share == 10_000 || context.worker.random() % 10_000 < u64::from(shadow.share))
}

/// A request that is recorded.
struct Recording {
    recorder: Arc<Recorder>,
    recorded: Recorded,
}

impl Recording {
    fn of(request: &Request, recorder: Arc<Recorder>) -> Option<Self> {
        let Request { http, context } = request;
        let drawn = || recorder.share == 10_000 || context.worker.random() % 10_000 < u64::from(recorder.share);
        let route = &context.route().name;
        if recorder.route.as_ref().is_some_and(|wanted| **wanted != **route)
            || !context.upload.is_empty()
            || context.overridden.get()
            || context.upgrade.get()
            || CONDITIONS.iter().any(|name| http.headers().contains_key(name))
            || http.headers().contains_key(header::RANGE)
            || !drawn()
        {
            return None;
        }
        // The door may have taken the token, which a replay could not bring then.
        let personal = context.authorized.get() || context.claims.get().is_some();
        let hidden = personal && !http.headers().contains_key(header::AUTHORIZATION);
        if hidden || recorder.lines.capacity() == 0 {
            return None;
        }
        let headers = recorder.admit(http.method(), http.uri().query(), http.headers())?;
        let recorded = Recorded {
            at: jiff::Timestamp::now(),
            route: route.to_string(),
            arm: context.arm.get().word().to_owned(),
            method: http.method().to_string(),
            target: http.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned(),
            headers,
            status: 0,
            answer_headers: BTreeMap::new(),
            text: None,
            base64: None,
        };
        Some(Self { recorder, recorded })
    }

    fn watch(self, response: Response, context: &Exchange) -> Response {
        let Self { recorder, mut recorded } = self;
        if matches!(response.body(), ResponseBody::Tunnel(_)) {
            return response;
        }
        let taken = Rc::new(RefCell::new(Taken::new(record::BODY, context.worker.store.process.copied.clone())));
        let (status, headers) = (response.status(), response.headers().clone());
        let answer = taken.clone();
        then(context, move |context| {
            let body = answer.borrow_mut().whole();
            if context.complete.get()
                && let Body::Whole(body) = body
            {
                recorded.status = status.as_u16();
                recorded.answered(&headers, &body);
                let mut line = serde_json::to_vec(&recorded).unwrap_or_default();
                line.push(b'\n');
                // Who reads slowly has fewer.
                let _ = recorder.lines.try_send(line.into());
            }
        });
        response.map(|body| body.watched(&taken))
    }
}

/// Does something once the client has its answer, after what is to be done already.
fn then(context: &Exchange, next: impl FnOnce(&Exchange) + 'static) {
    let before = context.after.take();
    *context.after.borrow_mut() = Some(Box::new(move |context| {
        if let Some(before) = before {
            before(context);
        }
        next(context);
    }));
}

/// What asks for something else than the whole answer.
const CONDITIONS: [HeaderName; 5] =
    [header::IF_MATCH, header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE, header::IF_UNMODIFIED_SINCE, header::IF_RANGE];

/// A request as it went to the monolith.
struct Original {
    shadow: Arc<Shadow>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    /// Its body, if it has one.
    body: Option<Rc<RefCell<Taken>>>,
}

impl Original {
    /// Takes what a copy will need; nothing where it is too long.
    fn of(request: &mut Request, shadow: &Arc<Shadow>) -> Option<Self> {
        let body = request.http.body_mut();
        let held = request.context.worker.store.process.copied.clone();
        let body = if body.upload().is_empty() {
            None
        } else {
            if body.size_hint().lower() > shadow.max_body as u64 {
                shadow.skip(Skip::TooLong);
                return None;
            }
            let taken = Rc::new(RefCell::new(Taken::new(shadow.max_body, held)));
            body.watch(taken.clone());
            Some(taken)
        };
        let mut headers = request.http.headers().clone();
        for name in CONDITIONS.iter().chain([&header::EXPECT, &header::TRANSFER_ENCODING, &header::CONTENT_LENGTH]) {
            headers.remove(name);
        }
        headers.insert(fields::SHADOW, HeaderValue::from_static("1"));
        let (method, uri) = (request.http.method().clone(), request.http.uri().clone());
        Some(Self { shadow: shadow.clone(), method, uri, headers, body })
    }
}

/// Takes the answer while its client reads it; what is to be done once the client has it.
fn watch(response: Response, original: Original, context: &Exchange) -> Response {
    let status = response.status();
    // An answer to a part or to a condition is not the whole; a tunnel is none.
    let moot =
        matches!(status, StatusCode::NOT_MODIFIED | StatusCode::PARTIAL_CONTENT | StatusCode::PRECONDITION_FAILED)
            || matches!(response.body(), ResponseBody::Tunnel(_));
    let stream = response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| {
        kind.as_bytes().get(..17).is_some_and(|kind| kind.eq_ignore_ascii_case(b"text/event-stream"))
    });
    if moot || stream {
        original.shadow.skip(Skip::Moot);
        return response;
    }
    let held = context.worker.store.process.copied.clone();
    let taken = Rc::new(RefCell::new(Taken::new(original.shadow.max_body, held)));
    let headers = response.headers().clone();
    let answer = taken.clone();
    then(context, move |context| {
        let body = answer.borrow_mut().whole();
        // Of what was not sent to its end, or read to its end, a copy would be something else; nobody knows what the rest was.
        if !context.complete.get() || !context.upload.is_done() || body == Body::Unknown {
            return original.shadow.skip(Skip::Moot);
        }
        let control = Answer { status: status.as_u16(), headers, body };
        leave(original, control, answer, context);
    });
    response.map(|body| body.watched(&taken))
}

/// How long a copy may take where the route has no limit.
const LONGEST: Duration = Duration::from_secs(30);

/// Sends a copy on its way, if there is room for it.
fn leave(original: Original, control: Answer, held: Rc<RefCell<Taken>>, context: &Exchange) {
    let Original { shadow, method, uri, headers, body } = original;
    let sent = match body.as_ref().map(|body| {
        let mut body = body.borrow_mut();
        body.end();
        body.whole()
    }) {
        None => None,
        Some(Body::Whole(sent)) => Some(sent),
        Some(Body::TooLong) => return shadow.skip(Skip::TooLong),
        Some(Body::Unknown) => return shadow.skip(Skip::Busy),
    };
    let route = context.route();
    let Some(service) = route.service else { return };
    let Some(waiting) = shadow.wait() else { return };
    let copy = |arm: Arm, upstream: usize| {
        let mut http =
            http::Request::new(sent.as_ref().map_or_else(RequestBody::empty, |sent| RequestBody::whole(sent)));
        *http.method_mut() = method.clone();
        *http.uri_mut() = uri.clone();
        *http.headers_mut() = headers.clone();
        if let Some(sent) = &sent {
            http.headers_mut().insert(header::CONTENT_LENGTH, sent.len().into());
        }
        if let Some(values) = &route.cohort {
            let said = &values.baggage[Arm::Legacy as usize];
            let others: Vec<_> =
                headers.get_all(fields::BAGGAGE).iter().filter(|value| *value != said).cloned().collect();
            let told = http.headers_mut();
            told.insert(fields::COHORT, values.header[arm as usize].clone());
            told.insert(fields::BAGGAGE, values.baggage[arm as usize].clone());
            for other in others {
                told.append(fields::BAGGAGE, other);
            }
        }
        let again = context.copy(&http, arm, upstream);
        let chunked = again.park(http);
        Sending { home: again.home.get().cloned(), leg: Some(Leg::new(&again, upstream, Lane::Last, true, chunked)) }
    };
    let candidate = copy(Arm::Service, service);
    // Both at the same time, so that what changes with time changes for both.
    let twice = shadow.noise > 0 && method.is_safe() && context.worker.random() % 10_000 < u64::from(shadow.noise);
    let second = twice.then(|| copy(Arm::Legacy, route.baseline));
    // Its line in the access log says the rest: a path may name somebody.
    let id = context.request_id.get().and_then(|id| id.to_str().ok()).unwrap_or_default();
    let request = format!("{method}, request id {id}");
    let comparing = context.worker.store.comparing.clone();
    let begun = Instant::now();
    tokio::task::spawn_local(async move {
        let Ok(place) = shadow.places.clone().acquire_owned().await else { return };
        drop(waiting);
        // What is old would be compared with what was true then, and credentials expire.
        if begun.elapsed() > OLDEST || is_left_alone(&candidate) || second.as_ref().is_some_and(is_left_alone) {
            return shadow.skip(Skip::Busy);
        }
        let most = shadow.max_body;
        let asked = async {
            match second {
                Some(second) => Some(ask(second, most).await),
                None => None,
            }
        };
        let (candidate, second) = futures_util::future::join(ask(candidate, most), asked).await;
        // Refused here, not there.
        if candidate.as_ref().is_err_and(|error| !error.kind.is_upstreams()) {
            return shadow.skip(Skip::Busy);
        }
        let Ok(turn) = comparing.acquire_owned().await else { return };
        // Not on the thread that serves clients: it may take a while.
        let compared = tokio::task::spawn_blocking(move || {
            let found = match &candidate {
                Ok(candidate) => compare(&shadow.rules, &control, candidate),
                Err(error) => failed(&control, error),
            };
            let noise = second.and_then(Result::ok).map(|second| compare(&shadow.rules, &control, &second));
            shadow.ledger().take(&request, found, noise);
        });
        let _ = compared.await;
        drop((turn, place, held, body));
    });
}

/// How old a request may be before its copy leaves.
const OLDEST: Duration = Duration::from_secs(5);

/// Whether its upstream is left alone by clients' requests, or its route was put back by hand: then copies leave it alone, too.
fn is_left_alone(sending: &Sending) -> bool {
    let Some(leg) = &sending.leg else { return true };
    let breaker = leg.upstream().breaker.as_ref();
    breaker.is_some_and(|breaker| !breaker.is_closed()) || leg.context.route().overlay.hold.is_held()
}

/// One side without an answer is a difference whatever else is ignored.
fn failed(control: &Answer, error: &Error) -> Compared {
    let difference =
        Difference { control: control.status.to_string(), candidate: error.kind.word().to_owned(), order: false };
    Compared { found: BTreeMap::from([(FAILED.to_owned(), difference)]), partial: false }
}

/// A copy on its way. Its body is let go of with it, wherever it is then.
struct Sending {
    leg: Option<Leg>,
    home: Option<Rc<Home>>,
}

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            home.close();
        }
    }
}

/// Asks one system for a copy's sake.
async fn ask(mut sending: Sending, most: usize) -> Result<Answer, Error> {
    let Some(leg) = sending.leg.take() else { return Err(Error::new(Kind::Internal)) };
    leg.way.begun.set(Instant::now());
    let context: Context = leg.context.clone();
    let limits = context.route().limits;
    let timer = context.worker.timer.clone();
    let limit = Some(limits.request.unwrap_or(LONGEST));
    let started = Instant::now();
    let answered = Translate::new(Send).call(leg);
    let (idle, kind) = (limits.idle, Kind::RequestTimeout);
    let response = within(&timer, &context.upload, limit, idle, kind, started, answered).await?;
    let (parts, body) = response.into_parts();
    let mut taken = Taken::new(most, context.worker.store.process.copied.clone());
    let mut body = pin!(body);
    // As long as the head may take: a stream without an end is no answer.
    let read = async {
        while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            if let Ok(data) = frame?.into_data() {
                taken.take(&data);
                if taken.is_full() {
                    return Ok(());
                }
            }
        }
        taken.end();
        Ok(())
    };
    within(&timer, &context.upload, limit, idle, kind, Instant::now(), read).await?;
    Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body: taken.whole() })
}
