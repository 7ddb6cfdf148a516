//! Turns errors and panics into responses, so that a bug costs one request and not a connection.
//!
//! tower-http's `CatchPanic` asks for bodies that are `Send`; ours stay on their worker.

use std::{convert::Infallible, panic::AssertUnwindSafe, sync::atomic::Ordering::Relaxed};

use futures_util::FutureExt as _;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    context::{Request, Response},
    error::{Error, Kind},
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Recover<S> {
    inner: S,
}

impl<S> Recover<S> {
    /// Around everything that can fail.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Recover<S>
where
    S: Service<Request, Response = Response, Error = Error>,
    S::Future: 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Later<Response, Infallible>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        let context = request.context.clone();
        let called = std::panic::catch_unwind(AssertUnwindSafe(|| self.inner.call(request)));
        Box::pin(async move {
            let result = match called {
                Ok(future) => AssertUnwindSafe(future).catch_unwind().await,
                Err(panic) => Err(panic),
            };
            let error = match result {
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => error,
                Err(panic) => {
                    context.worker.store.process.panics.fetch_add(1, Relaxed);
                    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                    tracing::error!(panic = text, path = context.uri.path(), "a request panicked; it was answered 500");
                    Error { detail: text, ..Error::new(Kind::Internal) }
                }
            };
            let response = error.response().map(ResponseBody::Full);
            *context.failure.borrow_mut() = Some((error.kind, error.detail));
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    // The panic path needs a whole exchange; `tests/` drives it through the executable.
}
