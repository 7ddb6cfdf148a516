//! Answers preflights by the route's `cors:`, and says with every answer who may read it.
//!
//! Outside of all that may refuse a request but for its form: a page must be able to read why.

use futures_util::future::Either;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    auth::cors::{self, Cors},
    body::ResponseBody,
    context::{Request, Response},
    error::{Error, Kind},
    routing::table::Found,
    snapshot::Route,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct AllowOrigins<S> {
    inner: S,
}

impl<S> AllowOrigins<S> {
    /// Around all that a page may be told.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for AllowOrigins<S>
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
        if !context.snapshot().cors {
            return Either::Left(self.inner.call(request));
        }
        if let Some(answer) = preflight(&request) {
            request.discard();
            return Either::Right(Box::pin(std::future::ready(answer)));
        }
        let origin = request.http.headers().get(header::ORIGIN).cloned();
        let future = self.inner.call(request);
        // Its route was found meanwhile, also where it refuses.
        let Some(cors) = &context.route().cors else { return Either::Left(future) };
        let told = cors.told(origin.as_ref());
        Either::Right(Box::pin(async move {
            match future.await {
                Ok(mut response) => {
                    let headers = response.headers_mut();
                    Cors::clear(headers);
                    for (name, value) in told {
                        headers.append(name, value);
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

/// The answer to a preflight, if the route of the request that it asks about has a policy.
fn preflight(request: &Request) -> Option<Result<Response, Error>> {
    let Request { http, .. } = request;
    let asked = cors::preflight(http.method(), http.headers())?;
    let route = meant(request, &asked);
    let cors = route.cors.as_ref()?;
    Some(match cors.answer(&asked, http.headers()) {
        Ok(told) => {
            let mut response = http::Response::new(ResponseBody::Empty);
            *response.status_mut() = StatusCode::NO_CONTENT;
            *response.headers_mut() = told;
            vary(response.headers_mut());
            Ok(response)
        }
        Err(why) => {
            let mut fields = HeaderMap::new();
            vary(&mut fields);
            let fields = fields.into_iter().filter_map(|(name, value)| Some((name?, value))).collect();
            Err(Error { detail: why.to_owned(), fields, ..Error::new(Kind::OriginRefused) })
        }
    })
}

fn vary(headers: &mut HeaderMap) {
    let names = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers";
    headers.insert(header::VARY, HeaderValue::from_static(names));
}

/// The route that the request will have which a preflight asks about: it comes by another method.
fn meant<'r>(request: &'r Request, method: &http::Method) -> &'r Route {
    let snapshot = request.context.snapshot();
    match request.context.find(&request.http, method).found {
        Found::Rule(index) | Found::Refused(index) => &snapshot.routes[index],
        Found::Nothing => &snapshot.routes[snapshot.unrouted()],
    }
}
