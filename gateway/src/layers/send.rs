//! The innermost service: sends to one upstream, and streams back.

use std::rc::Rc;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    context::{Leg, Response},
    error::{Error, Kind},
    http1::head::ResponseHead,
    upstream::{download::UpstreamBody, pool::Lease, tunnel::Tunnel},
};

/// The service.
#[derive(Clone, Copy, Debug)]
pub struct Send;

impl Service<Rc<Leg>> for Send {
    type Response = Response;
    type Error = Error;
    type Future = Later;

    always_ready!();

    fn call(&mut self, leg: Rc<Leg>) -> Later {
        Box::pin(send(leg))
    }
}

async fn send(leg: Rc<Leg>) -> Result<Response, Error> {
    let context = &leg.context;
    let pool = context.local.pools.get(leg.upstream).ok_or_else(|| Error::new(Kind::Internal))?;
    let parts = context.parts.get().ok_or_else(|| Error::new(Kind::Internal))?;
    let body = match context.home.get() {
        None => None,
        // A head that announces a body must not go without it.
        Some(home) => Some(home.take().ok_or_else(|| {
            Error::upstream(Kind::Internal, &leg.upstream().name, true, "the body of an earlier try has not come back")
        })?),
    };
    let interim = |status: StatusCode, headers: &HeaderMap| {
        if let Some(inbound) = &context.inbound {
            inbound.interim(status, headers);
        }
    };
    let (head, lease) = pool.send(parts, body, context.upload.clone(), &leg.way, interim).await?;
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return switch(head, lease, context.upgrade.get() && context.route().websocket);
    }
    let timer = context.worker.timer.clone();
    let body = UpstreamBody::new(lease, timer, leg.way.idle);
    let mut response = http::Response::new(ResponseBody::Upstream(Box::new(body)));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    Ok(response)
}

/// Joins the two connections after a 101 that answers what was asked; refuses any other.
fn switch(mut head: ResponseHead, lease: Lease, asked: bool) -> Result<Response, Error> {
    let upstream = lease.upstream().clone();
    let refuse = |why: &str| {
        lease.broke();
        Err(Error::upstream(Kind::Upgrade, &upstream.name, true, why))
    };
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
