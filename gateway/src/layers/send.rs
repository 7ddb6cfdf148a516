//! The innermost service: sends to the upstream that the arm chose, and streams back.

use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use http_body::Body as _;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    context::{Request, Response},
    error::{Error, Kind},
    http1::head::ResponseHead,
    upstream::{download::UpstreamBody, pool::Lease, tunnel::Tunnel, upload::RequestBody},
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
    let upgrade = context.upgrade.get() && context.route().websocket;
    if upgrade {
        http.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        http.headers_mut().insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    }
    let chunked = frame(&mut http);
    let idle = context.route().limits.idle;
    let interim = |status: StatusCode, headers: &HeaderMap| {
        if let Some(inbound) = &context.inbound {
            inbound.interim(status, headers);
        }
    };
    let (head, lease) = pool.send(*http, chunked, !context.overridden.get(), idle, interim).await?;
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return switch(head, lease, upgrade);
    }
    let mut response = http::Response::new(ResponseBody::Upstream(Box::new(UpstreamBody::new(
        lease,
        context.worker.timer.clone(),
        idle,
    ))));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    Ok(response)
}

/// Says how the body ends where it has no length, and that there is none where one is expected. Whether it is chunked.
fn frame(request: &mut http::Request<RequestBody>) -> bool {
    if !request.body().upload().is_empty() {
        if request.body().size_hint().exact().is_some() {
            return false;
        }
        request.headers_mut().insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        return true;
    }
    let expects_body = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH);
    if expects_body && !request.headers().contains_key(header::CONTENT_LENGTH) {
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    false
}

/// Joins the two connections after a 101 that answers what was asked; refuses any other.
fn switch(mut head: ResponseHead, lease: Lease, asked: bool) -> Result<Response, Error> {
    let upstream = lease.upstream().clone();
    let refuse = |why: &str| Err(Error::upstream(Kind::Upgrade, &upstream.name, true, why));
    if !asked {
        return refuse("a 101 that nobody asked for");
    }
    if !head.upgrade.is_some_and(|protocol| protocol.as_bytes().eq_ignore_ascii_case(b"websocket")) {
        return refuse("a 101 to another protocol");
    }
    let Some(tunnel) = Tunnel::new(lease) else { return Err(Error::new(Kind::Internal)) };
    head.headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    head.headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    let mut response = http::Response::new(ResponseBody::Tunnel(Box::new(tunnel)));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    Ok(response)
}
