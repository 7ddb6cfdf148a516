//! The route's header edits, whoever answers.

use futures_util::future::Either;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    context::{Request, Response},
    error::Error,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Edit<S> {
    inner: S,
}

impl<S> Edit<S> {
    /// Around whoever answers.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Edit<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Later>;

    always_ready!();

    fn call(&mut self, mut request: Request) -> Self::Future {
        let context = request.context.clone();
        context.route().edit_request.apply(request.http.headers_mut());
        let future = self.inner.call(request);
        if context.route().edit_response.is_empty() {
            return Either::Left(future);
        }
        Either::Right(Box::pin(async move {
            let mut response = future.await?;
            context.route().edit_response.apply(response.headers_mut());
            Ok(response)
        }))
    }
}
