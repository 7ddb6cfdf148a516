//! The gateway's own calls to others: webhooks, the admin listener of another process, what is replayed.
//!
//! One connection a call: none of them is in a request's way.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;

use crate::{
    config::{UpstreamConfig, split_url, upstream::ConnectionsConfig, values::Span},
    upstream::{Upstream, connect},
};

/// A server that the gateway calls.
pub struct Outbound {
    upstream: Upstream,
}

/// An answer whose body still comes; its connection ends with it.
pub struct Open {
    /// The head and the body.
    pub response: Response<Incoming>,
    _connection: Running,
}

/// A task that ends with whoever waits for it.
struct Running(tokio::task::AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How long making a connection may take.
const CONNECT: Duration = Duration::from_secs(5);

impl Outbound {
    /// The server of a URL, and the target that the URL names there.
    pub fn new(url: &str) -> Result<(Self, String), String> {
        let (base, target) = split_url(url)?;
        let connections = ConnectionsConfig { connect_timeout: Span(CONNECT), ..ConnectionsConfig::default() };
        let config = UpstreamConfig { url: Some(base), connections, ..UpstreamConfig::default() };
        let upstream = Upstream::new("outbound", &config, Path::new(""), 1, None, Arc::default())?;
        Ok((Self { upstream }, target))
    }

    /// Sends a request; `Host` is the server's own where the request names none.
    pub async fn open(&self, mut request: Request<Full<Bytes>>) -> Result<Open, String> {
        let endpoints = self.upstream.endpoints.load();
        let endpoint = endpoints.first().ok_or("no address")?;
        let io = connect::connect(&self.upstream, endpoint).await.map_err(|error| error.to_string())?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(|error| error.to_string())?;
        let running = Running(tokio::task::spawn_local(connection).abort_handle());
        let headers = request.headers_mut();
        if !headers.contains_key(header::HOST) {
            headers.insert(header::HOST, endpoint.authority.clone());
        }
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        Ok(Open { response, _connection: running })
    }

    /// Sends a request and takes its whole answer, within a time and a size.
    pub async fn send(
        &self,
        request: Request<Full<Bytes>>,
        limit: Duration,
        most: usize,
    ) -> Result<Response<Bytes>, String> {
        let answer = async {
            let open = self.open(request).await?;
            let (parts, body) = open.response.into_parts();
            let body = Limited::new(body, most).collect().await;
            let body =
                body.map_err(|error| format!("the answer broke off, or is larger than {most} bytes: {error}"))?;
            Ok(Response::from_parts(parts, body.to_bytes()))
        };
        tokio::time::timeout(limit, answer).await.unwrap_or_else(|_| Err(format!("no answer within {limit:?}")))
    }
}
