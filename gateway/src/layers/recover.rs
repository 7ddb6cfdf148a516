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
    http1::head::take_map,
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
            let response = error.response(take_map()).map(ResponseBody::Full);
            // Whoever sends what is no request may mean something else by what follows, too.
            context.last.set(error.kind.is_malformed());
            *context.failure.borrow_mut() = Some((error.kind, error.detail));
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        context::{ClientConnection, Exchange, Worker},
        inventory::feed::Feed,
        snapshot::Store,
        telemetry::access_log::Writer,
        upstream::upload::RequestBody,
    };

    struct Inner<F>(fn(Request) -> F);

    impl<F: Future<Output = Result<Response, Error>>> Service<Request> for Inner<F> {
        type Response = Response;
        type Error = Error;
        type Future = F;

        always_ready!();

        fn call(&mut self, request: Request) -> F {
            (self.0)(request)
        }
    }

    /// Asks a layer around `inner` once; the status, and how many panics were counted.
    fn ask<F>(inner: fn(Request) -> F) -> (u16, u64)
    where
        F: Future<Output = Result<Response, Error>> + 'static,
    {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("routes.yaml");
        std::fs::write(&file, "upstreams: {legacy: {url: \"http://127.0.0.1:9\"}}\n").unwrap();
        let store = Arc::new(Store::open(&file, 1).unwrap());
        let writer = Writer::start(Box::new(std::io::sink()), store.process.clone()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default())
            .unwrap();
        let status = runtime.block_on(async {
            let feed = Feed::new(std::sync::mpsc::sync_channel(1).0, Arc::default());
            let worker = Worker::new(0, store.clone(), writer.log(store.process.clone()), feed, 1);
            let peer = [127, 0, 0, 1].into();
            let connection = std::rc::Rc::new(ClientConnection::new(peer, http::HeaderValue::from_static("127.0.0.1")));
            let http = Box::new(http::Request::new(RequestBody::empty()));
            let context = Exchange::begin(&worker, &connection, None, &http);
            let response = Recover::new(Inner(inner)).call(Request { http, context }).await;
            response.map_or(0, |response| response.status().as_u16())
        });
        (status, store.process.panics.load(Relaxed))
    }

    #[test]
    fn panics_and_errors_are_answers() {
        assert_eq!(ask(|_| async { Ok(http::Response::new(ResponseBody::Empty)) }), (200, 0));
        assert_eq!(ask(|_| async { Err(Error::new(Kind::ConnectTimeout)) }), (504, 0));
        assert_eq!(ask(|_| async { panic!("later") }), (500, 1));
        assert_eq!(ask(|_| -> std::future::Ready<_> { panic!("at once") }), (500, 1));
    }
}
