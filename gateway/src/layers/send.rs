//! The innermost service: sends to the upstream that the arm chose, and streams back.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use http_body::Body as _;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    context::{Context, Counted, Request, Response},
    error::{Error, Kind},
    fields,
    upstream::{Upstream, download::UpstreamBody, pool::Lease, tunnel, upload::RequestBody},
};

/// The service.
#[derive(Clone, Copy, Debug)]
pub struct Send;

impl Service<Request> for Send {
    type Response = Response;
    type Error = Error;
    type Future = Later;

    always_ready!();

    fn call(&mut self, request: Request) -> Later {
        Box::pin(send(request))
    }
}

async fn send(request: Request) -> Result<Response, Error> {
    let Request { mut http, context } = request;
    let pool = context.upstream.get().and_then(|index| context.local.pools.get(index)).cloned();
    let pool = pool.ok_or_else(|| Error::new(Kind::Internal))?;
    // Nothing but a WebSocket that the route allows is ever upgraded.
    let upgrade = context.upgrade.borrow_mut().take().filter(|_| context.route().websocket);
    if upgrade.is_some() {
        http.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        http.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    frame(&mut http);
    let (mut response, lease) = pool.send(http, !context.overridden.get()).await?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return switch(response, lease, upgrade, &context);
    }
    strip(response.headers_mut());
    one_length(&mut response);
    *response.version_mut() = Version::HTTP_11;
    let (timer, idle) = (context.worker.timer.clone(), context.route().limits.idle);
    Ok(response.map(|incoming| ResponseBody::Upstream(Box::new(UpstreamBody::new(incoming, lease, timer, idle)))))
}

/// Says how long the body is where the client's protocol did it in another way: hyper would send a GET's without saying so.
fn frame(request: &mut http::Request<RequestBody>) {
    let ended = request.body().is_end_stream();
    let expects_body = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH);
    let headers = request.headers_mut();
    if headers.contains_key(header::CONTENT_LENGTH) {
        return;
    }
    if !ended {
        headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    } else if expects_body {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
}

/// Takes away what belongs to the upstream's connection, and a length that chunks contradict (RFC 9112 §6.3).
fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(header::TRANSFER_ENCODING) {
        headers.remove(header::CONTENT_LENGTH);
    }
    let mut doomed: Vec<HeaderName> = Vec::new();
    for (name, value) in &*headers {
        if fields::is_hop_by_hop(name.as_str()) {
            if *name == header::CONNECTION {
                fields::named_by(value, &mut doomed);
            }
            doomed.push(name.clone());
        }
    }
    for name in doomed {
        headers.remove(name);
    }
}

/// Several equal lengths are one (RFC 9110 §8.6).
fn one_length(response: &mut http::Response<Incoming>) {
    let lengths = response.headers().get_all(header::CONTENT_LENGTH);
    let odd = lengths.iter().nth(1).is_some() || lengths.iter().any(|value| value.as_bytes().contains(&b','));
    if let (true, Some(length)) = (odd, response.body().size_hint().exact()) {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
}

/// Joins the two connections after a 101 that answers what was asked; refuses any other.
fn switch(
    mut response: http::Response<Incoming>,
    lease: Lease,
    asked: Option<OnUpgrade>,
    context: &Context,
) -> Result<Response, Error> {
    let upstream: Arc<Upstream> = lease.upstream().clone();
    let refuse = |why: &str| Err(Error::upstream(Kind::Upgrade, &upstream.name, true, why));
    let Some(client) = asked else {
        return refuse("a 101 that nobody asked for");
    };
    let offered = response.headers().get(header::UPGRADE).map(HeaderValue::as_bytes);
    if !offered.is_some_and(|protocol| protocol.eq_ignore_ascii_case(b"websocket")) {
        return refuse("a 101 to another protocol");
    }
    let server = hyper::upgrade::on(&mut response);
    let held = context.clone();
    // Counted before the client's connection is counted out: a drain must not miss it.
    let count = Counted::one(held.worker.store.process.clone(), |process| &process.tunnels);
    tokio::task::spawn_local(async move {
        let _count = count;
        let joined = futures_util::future::try_join(client, server).await;
        if let Ok((client, server)) = joined {
            let (timer, idle) = (held.worker.timer.clone(), held.route().limits.idle);
            let (_, down) = tunnel::carry(TokioIo::new(client), TokioIo::new(server), &timer, idle).await;
            held.sent.set(down);
        }
        // The connection is spent with the tunnel; its place in the pool is free only now.
        drop(lease);
    });
    strip(response.headers_mut());
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    *response.version_mut() = Version::HTTP_11;
    Ok(response.map(|_| ResponseBody::Empty))
}
