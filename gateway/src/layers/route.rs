//! Finds the route of a request, and answers what a route refuses: 410, 405, 413.

use std::{
    future::{Ready, ready},
    sync::atomic::Ordering::Relaxed,
};

use futures_util::future::Either;
use http::{HeaderValue, StatusCode};
use http_body::Body as _;
use tower::Service;

use super::always_ready;
use crate::{
    body::ResponseBody,
    config::Stage,
    context::{Request, Response},
    error::{Error, Kind, problem_response},
    routing::table::{Found, Match},
    snapshot::Route,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct FindRoute<S> {
    inner: S,
}

impl<S> FindRoute<S> {
    /// Around all that depends on the route.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for FindRoute<S>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Ready<Result<Response, Error>>>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        match find(&request) {
            None => Either::Left(self.inner.call(request)),
            Some(answer) => {
                request.discard();
                Either::Right(ready(answer))
            }
        }
    }
}

/// Settles the route; an answer where the route itself gives it.
fn find(request: &Request) -> Option<Result<Response, Error>> {
    let Request { http, context } = request;
    let snapshot = context.snapshot();
    let Match { found, guards } = context.find(http, http.method());
    if !guards.is_empty() {
        // Retired, these routes would answer it 405, whoever answers it now.
        if !matches!(found, Found::Refused(_)) {
            for guard in &guards {
                snapshot.routes[*guard].stats.rare.fell.fetch_add(1, Relaxed);
            }
        }
        // What `defaults` say of limits holds wherever it falls. A door is met again, also where the other route has none.
        let own = |rule: &usize| {
            let route = &snapshot.routes[*rule];
            route.rate_limit.as_ref().is_some_and(|limit| limit.own) || route.auth.is_some()
        };
        context.guards.borrow_mut().extend(guards.into_iter().filter(own));
    }
    let index = match found {
        Found::Rule(index) => index,
        Found::Nothing => snapshot.unrouted(),
        Found::Refused(index) => {
            context.route.set(index);
            return Some(Err(refused(context.route(), &snapshot.table.allowed(index))));
        }
    };
    context.route.set(index);
    let route = context.route();
    context.connection.idle.set(route.limits.idle);
    if route.stage == Stage::Gone && !route.overlay.hold.is_held() {
        return Some(Ok(gone(route)));
    }
    context.upload.set_limit(route.max_body);
    if http.body().size_hint().lower() > route.max_body {
        return Some(Err(Error::new(Kind::BodyTooLarge)));
    }
    None
}

fn refused(route: &Route, methods: &[&str]) -> Error {
    let detail = format!(
        "route `{}` is {} and takes only requests that match it whole; see its `match:`",
        route.name,
        route.stage.word()
    );
    let allow = HeaderValue::try_from(methods.join(", ")).ok().map(|methods| (http::header::ALLOW, methods));
    Error { detail, fields: allow.into_iter().collect(), ..Error::new(Kind::NotAllowed) }
}

fn gone(route: &Route) -> Response {
    let problem = serde_json::json!({
        "type": "about:blank",
        "title": "Gone",
        "status": 410,
        "detail": "what was here has been retired for good",
    });
    let mut response = problem_response(StatusCode::GONE, &problem).map(ResponseBody::Full);
    response.headers_mut().extend(route.gone.clone());
    response
}
