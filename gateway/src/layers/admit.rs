//! The gateway's own limit: what comes beyond it is refused before anything is done for it.
//!
//! A request counts until its response's body has ended, a tunnel until it closes.

use std::sync::atomic::Ordering::Relaxed;

use futures_util::future::{Either, Ready, ready};
use tower::Service;

use super::always_ready;
use crate::{
    context::{Request, Response},
    error::{Error, Kind},
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Admit<S> {
    inner: S,
}

impl<S> Admit<S> {
    /// Around everything that costs something.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Admit<S>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Ready<Result<Response, Error>>>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        let context = &request.context;
        let process = &context.worker.store.process;
        if process.requests.fetch_add(1, Relaxed) >= context.snapshot().clients.max_requests {
            // What is refused takes nobody's place.
            process.requests.fetch_sub(1, Relaxed);
            process.shed.fetch_add(1, Relaxed);
            request.discard();
            return Either::Right(ready(Err(Error::new(Kind::Overloaded))));
        }
        // The exchange counts it out at its end, whatever becomes of it.
        context.admitted.set(true);
        Either::Left(self.inner.call(request))
    }
}
