//! Picks who answers: by the stage, and in a canary by the cohort; tells the services behind.

use futures_util::future::Either;
use http::{HeaderValue, header};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    config::Stage,
    context::{Request, Response},
    error::{Error, Kind},
    fields,
    routing::cohort::Why,
    telemetry::metrics::Arm,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct PickArm<S> {
    inner: S,
}

impl<S> PickArm<S> {
    /// Around all that depends on who answers.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for PickArm<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, mut request: Request) -> Self::Future {
        match pick(&mut request) {
            Ok(None) => Either::Left(self.inner.call(request)),
            Ok(Some(cookie)) => {
                let future = self.inner.call(request);
                Either::Right(Box::pin(async move {
                    let mut response = future.await?;
                    response.headers_mut().append(header::SET_COOKIE, cookie);
                    Ok(response)
                }))
            }
            Err(error) => Either::Right(Box::pin(std::future::ready(Err(error)))),
        }
    }
}

/// Settles the arm; the cookie with which a new session begins.
fn pick(request: &mut Request) -> Result<Option<HeaderValue>, Error> {
    let Request { http, context } = request;
    let route = context.route();
    let service = || route.service.ok_or_else(|| Error::new(Kind::Internal));
    // Read once: no request sees half a flip.
    match (route.runs(), &route.cohort) {
        (Stage::Legacy | Stage::Shadow, _) => context.decide(Arm::Legacy, Why::Stage, route.baseline),
        (Stage::Canary, Some(values)) => {
            let decision = values.cohort.decide(
                route.overlay.share(values.cohort.share),
                http.headers(),
                context.claims.get().map(|claims| &**claims),
                context.client.get(),
                || context.worker.random(),
            );
            context.cohort_key.set(decision.key.map(|key| (key, decision.share)));
            let (arm, upstream) =
                if decision.service { (Arm::Service, service()?) } else { (Arm::Legacy, route.baseline) };
            context.bucket.set(decision.bucket);
            context.decide(arm, decision.why, upstream);
            let headers = http.headers_mut();
            headers.insert(fields::COHORT, values.header[arm as usize].clone());
            headers.append(fields::BAGGAGE, values.baggage[arm as usize].clone());
            return Ok(decision.begin.and_then(|session| {
                let secure = if context.https.get() { "; Secure" } else { "" };
                let cookie =
                    format!("{}={}; Path=/; HttpOnly; SameSite=Lax{secure}", values.cohort.cookie, session.value());
                HeaderValue::try_from(cookie).ok()
            }));
        }
        (Stage::Migrated | Stage::Retired, _) => context.decide(Arm::Service, Why::Stage, service()?),
        // `gone` was answered by the route; a canary without a cohort does not compile.
        (Stage::Canary | Stage::Gone, _) => return Err(Error::new(Kind::Internal)),
    }
    Ok(None)
}
