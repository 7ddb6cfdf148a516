//! The time limit of the whole request: over all tries, until response headers arrive.

use tower::Service;

use super::{Later, always_ready};
use crate::{
    context::{Request, Response},
    error::{Error, Kind},
    upstream::upload::within,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Deadline<S> {
    inner: S,
}

impl<S> Deadline<S> {
    /// Around queues, tries and fallbacks; never around a tunnel after its 101.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Deadline<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Error;
    type Future = Later;

    always_ready!();

    fn call(&mut self, request: Request) -> Later {
        let context = request.context.clone();
        let future = self.inner.call(request);
        Box::pin(async move {
            let limits = context.route().limits;
            let timer = context.worker.timer.clone();
            let result = within(
                &timer,
                &context.upload,
                limits.request,
                limits.idle,
                Kind::RequestTimeout,
                context.started,
                future,
            )
            .await;
            result.map_err(|mut error| {
                if error.upstream.is_none() && matches!(error.kind, Kind::RequestTimeout | Kind::WriteTimeout) {
                    error.upstream = context.upstream().map(|upstream| upstream.name.clone());
                    // Nobody is asked after this limit, whether the request was sent or not.
                    error.sent = true;
                }
                error
            })
        })
    }
}
