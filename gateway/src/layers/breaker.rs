//! The circuit breaker: asks before each try, and sees to it that the try's outcome is told.
//!
//! Inside of the retries, so that each try counts; an open breaker is final and goes straight to
//! the fallback.

use std::rc::Rc;

use futures_util::future::Either;
use http::StatusCode;
use tokio::time::Instant;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    context::{Leg, Response},
    error::{Error, Kind},
    resilience::millis,
    upstream::outcome::Outcome,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Break<S> {
    inner: S,
}

impl<S> Break<S> {
    /// Around one try.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Rc<Leg>> for Break<S>
where
    S: Service<Rc<Leg>, Response = Response, Error = Error> + Clone + 'static,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, leg: Rc<Leg>) -> Self::Future {
        if !leg.context.upload.is_done() && !is_closed(&leg) {
            // What is still coming in is no probe: a slow client would keep its place from the others.
            let mut inner = self.inner.clone();
            return Either::Right(Box::pin(async move {
                let whole = match leg.context.home.get() {
                    Some(home) => home.is_whole().await?,
                    None => true,
                };
                match admit(&leg, Instant::now()) {
                    Ok(_) if !whole && !is_closed(&leg) => Err(refused(&leg, 1)),
                    Ok(Some(outcome)) => {
                        try_once(inner.call(leg.clone()), Trying { leg, outcome: Some(outcome) }).await
                    }
                    Ok(None) => inner.call(leg).await,
                    Err(error) => Err(error),
                }
            }));
        }
        match admit(&leg, leg.way.begun.get()) {
            Ok(None) => Either::Left(self.inner.call(leg)),
            Ok(Some(outcome)) => {
                let trying = Trying { leg: leg.clone(), outcome: Some(outcome) };
                Either::Right(Box::pin(try_once(self.inner.call(leg), trying)))
            }
            Err(error) => Either::Right(Box::pin(std::future::ready(Err(error)))),
        }
    }
}

fn is_closed(leg: &Leg) -> bool {
    leg.upstream().breaker.as_ref().is_none_or(|breaker| breaker.is_closed())
}

fn admit(leg: &Leg, now: Instant) -> Result<Option<Outcome>, Error> {
    Outcome::admit(leg.upstream(), now).map_err(|seconds| refused(leg, seconds))
}

fn refused(leg: &Leg, seconds: u64) -> Error {
    let error = Error::upstream(Kind::CircuitOpen, &leg.upstream().name, false, "the breaker is open");
    Error { retry_after: Some(seconds), ..error }
}

async fn try_once(
    future: impl Future<Output = Result<Response, Error>>,
    mut trying: Trying,
) -> Result<Response, Error> {
    match future.await {
        Ok(mut response) => {
            trying.answered(&mut response);
            Ok(response)
        }
        Err(error) => {
            trying.failed(&error);
            Err(error)
        }
    }
}

/// A try whose outcome is not known yet.
struct Trying {
    leg: Rc<Leg>,
    outcome: Option<Outcome>,
}

impl Trying {
    fn is_slow(&self) -> bool {
        let taken = self.leg.way.departed.get().and_then(|departed| self.leg.context.upload.waited(departed));
        taken.zip(self.outcome.as_ref()).is_some_and(|(taken, outcome)| outcome.is_slow(taken))
    }

    fn answered(&mut self, response: &mut Response) {
        let slow = self.is_slow();
        let Some(outcome) = self.outcome.take() else { return };
        let status = response.status();
        if slow || (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED) {
            outcome.tell(false);
            return;
        }
        // Whether these are failures, the monolith's answer may say.
        let wait = matches!(status, StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED);
        match response.body_mut() {
            ResponseBody::Upstream(body) => body.watch(outcome, wait),
            // Only what an upstream sends comes from here.
            _ => {
                outcome.tell(true);
            }
        }
    }

    /// One endpoint that nobody can connect to is not the upstream, as long as another is asked in its place.
    fn goes_elsewhere(&self, sent: bool) -> bool {
        let way = &self.leg.way;
        !sent && way.more.get() && way.has_another(self.leg.upstream(), millis(Instant::now()))
    }

    fn failed(&mut self, error: &Error) {
        let elsewhere = self.goes_elsewhere(error.sent);
        if let Some(outcome) = self.outcome.take().filter(|_| error.kind.is_upstreams() && !elsewhere) {
            outcome.tell(false);
        }
    }
}

impl Drop for Trying {
    /// Nobody waits any more: for a time limit the upstream is to blame, for a client that left only if it was slow already.
    fn drop(&mut self) {
        let slow = self.is_slow();
        let departed = self.leg.way.departed.get().is_some();
        let expired = self.leg.context.upload.is_expired() && departed && !self.goes_elsewhere(self.leg.way.sent.get());
        if let Some(outcome) = self.outcome.take().filter(|_| slow || expired) {
            outcome.tell(false);
        }
    }
}
