//! The time limit of one try, until response headers arrive.

use futures_util::future::Either;
use tokio::time::Instant;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    context::{Request, Response},
    error::{Error, Kind},
    upstream::upload::within,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Attempt<S> {
    inner: S,
}

impl<S> Attempt<S> {
    /// Around one try.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Attempt<S>
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
        let Some(limit) = context.route().limits.attempt else {
            return Either::Left(self.inner.call(request));
        };
        let start = Instant::now();
        let future = self.inner.call(request);
        Either::Right(Box::pin(async move {
            let timer = context.worker.timer.clone();
            let result = within(&timer, &context.upload, Some(limit), None, Kind::AttemptTimeout, start, future).await;
            result.map_err(|mut error| {
                if error.kind == Kind::AttemptTimeout && error.upstream.is_none() {
                    error.upstream = context.upstream().map(|upstream| upstream.name.clone());
                    error.sent = true;
                }
                error
            })
        }))
    }
}
