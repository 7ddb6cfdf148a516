//! The layer that makes a request one with a single reading: what comes out of it carries nothing that must not go on,
//! and is read as itself when it is written.
#![no_main]

use std::{cell::RefCell, convert::Infallible, rc::Rc, sync::Arc, task::Poll};

use gateway::{
    body::ResponseBody,
    context::{ClientConnection, Exchange, Request, Worker},
    error::Error,
    fields,
    http1::{
        head::{Limits, MAX_FIELDS, parse_request},
        write,
    },
    inventory::feed::Feed,
    layers::sanitize::Sanitize,
    snapshot::Store,
    telemetry::access_log::Writer,
    upstream::upload::RequestBody,
};
use http::HeaderValue;
use libfuzzer_sys::fuzz_target;
use tower::Service;

type Caught = Rc<RefCell<Option<http::request::Parts>>>;

/// Keeps what comes out of the layer.
struct Catch(Caught);

impl Service<Request> for Catch {
    type Response = gateway::context::Response;
    type Error = Error;
    type Future = std::future::Ready<Result<Self::Response, Error>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        *self.0.borrow_mut() = Some(request.http.into_parts().0);
        std::future::ready(Ok(http::Response::new(ResponseBody::Empty)))
    }
}

struct Stage {
    runtime: tokio::runtime::LocalRuntime,
    worker: Rc<Worker>,
}

fn stage() -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("routes.yaml");
    std::fs::write(&file, "upstreams: {legacy: {url: \"http://127.0.0.1:9\"}}\ntrusted_proxies: [10.0.0.0/8]\n").unwrap();
    let store = Arc::new(Store::open(&file, 1).unwrap());
    let writer = Writer::start(Box::new(std::io::sink()), store.process.clone()).unwrap();
    let feed = Feed::new(std::sync::mpsc::sync_channel(1).0, Arc::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default()).unwrap();
    let worker = runtime.block_on(async { Worker::new(0, store.clone(), writer.log(store.process.clone()), feed, 1) });
    Stage { runtime, worker }
}

thread_local! {
    static STAGE: Stage = stage();
}

const LIMITS: Limits = Limits { head: 4096, target: 1024 };

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let Ok(Some((head, _))) = parse_request(bytes, LIMITS) else { return };
    // The layer adds some: what is at the limit before is over it after.
    if head.request.headers().len() > MAX_FIELDS - 10 {
        return;
    }
    STAGE.with(|stage| {
        let worker = stage.worker.clone();
        stage.runtime.block_on(async move {
            // Some come from a proxy that is trusted, some by HTTP/2.
            let peer = if first & 1 == 0 { [10, 0, 0, 1] } else { [192, 0, 2, 1] };
            let mut request = head.request;
            if first & 2 == 2 {
                *request.version_mut() = http::Version::HTTP_2;
            }
            let value = HeaderValue::try_from(std::net::IpAddr::from(peer).to_string()).unwrap();
            let connection = Rc::new(ClientConnection::new(peer.into(), value));
            let http = Box::new(request.map(|()| RequestBody::empty()));
            let context = Exchange::begin(&worker, &connection, None, &http);
            let caught = Caught::default();
            let mut layer = Sanitize::new(Catch(caught.clone()));
            let _: Result<_, Error> = layer.call(Request { http, context }).await;
            let Some(parts) = caught.take() else { return Ok::<_, Infallible>(()) };
            let names = |name: &str| parts.headers.get_all(name).iter().count();
            assert_eq!(names("host"), 1);
            for name in ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded", "x-request-id"] {
                assert_eq!(names(name), 1, "{name}: {parts:?}");
            }
            for (name, value) in &parts.headers {
                let te = name == "te" && value == "trailers" || name == "connection" && value == "te";
                assert!(te || !fields::is_hop_by_hop(name.as_str()), "{name}: {parts:?}");
                assert_ne!(fields::voice(name.as_str()), Some(fields::Voice::Gateway), "{name}");
            }
            let mut out = Vec::new();
            write::request_head(&mut out, &parts, &write::Overrides::default());
            let limits = Limits { head: 64 * 1024, target: 64 * 1024 };
            let (anew, length) = parse_request(&out, limits).unwrap().unwrap();
            assert_eq!(length, out.len());
            let (anew, ()) = anew.request.into_parts();
            assert_eq!((&parts.method, &parts.headers), (&anew.method, &anew.headers));
            assert_eq!(parts.uri.path_and_query(), anew.uri.path_and_query());
            Ok(())
        })
    })
    .unwrap_or_else(|never| match never {});
});
