//! Clients that send what they are told, once.

use std::net::SocketAddr;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::PATIENCE;

/// A response.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its fields.
    pub headers: http::HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    /// A field's value; empty where it is missing.
    pub fn field(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.text()))
    }
}

/// A request with fields and a body.
pub fn request(method: &str, target: &str, fields: &[(&str, &str)], body: &str) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(target);
    if !fields.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request = request.header("host", "shop.example.com");
    }
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(Full::new(Bytes::copy_from_slice(body.as_bytes()))).unwrap()
}

/// One keep-alive connection.
pub struct Client {
    address: SocketAddr,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// A client without a connection yet.
    pub fn new(address: SocketAddr) -> Self {
        Self { address, sender: None }
    }

    /// Sends once, over the connection if the server has left it open.
    pub async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Answer, String> {
        let told = |error: &dyn std::fmt::Debug| format!("{error:?}");
        let mut sender = match self.sender.take().filter(|sender| !sender.is_closed()) {
            Some(sender) => sender,
            None => self.connect().await?,
        };
        if sender.ready().await.is_err() {
            sender = self.connect().await?;
        }
        let response = sender.send_request(request).await.map_err(|error| told(&error))?;
        let (head, body) = response.into_parts();
        let closes = head.headers.get("connection").is_some_and(|value| value == "close");
        let body = body.collect().await.map_err(|error| told(&error))?.to_bytes();
        // A client that was told to close does not use the connection again.
        self.sender = (!closes).then_some(sender);
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let tcp = TcpStream::connect(self.address).await.map_err(|error| format!("connect: {error}"))?;
        let _ = tcp.set_nodelay(true);
        let (sender, connection) = handshake(TokioIo::new(tcp)).await.map_err(|error| format!("{error:?}"))?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }
}

/// Sends one request over a connection of its own.
pub async fn send(address: SocketAddr, method: &str, target: &str, fields: &[(&str, &str)], body: &str) -> Answer {
    let mut client = Client::new(address);
    let sent = tokio::time::timeout(PATIENCE, client.send(request(method, target, fields, body)));
    sent.await.expect("an answer in time").unwrap_or_else(|error| panic!("{method} {target}: {error}"))
}

/// `GET`. The host is the address, as the admin listener wants it.
pub async fn get(address: SocketAddr, target: &str) -> Answer {
    let host = address.to_string();
    send(address, "GET", target, &[("host", &host)], "").await
}

/// Sends bytes as they are, and gives back all that comes until the server closes or `enough` holds.
pub async fn raw(address: SocketAddr, bytes: &[u8], enough: impl Fn(&str) -> bool) -> String {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(bytes).await.unwrap();
    let mut got = Vec::new();
    let read = tokio::time::timeout(PATIENCE, async {
        while !enough(&String::from_utf8_lossy(&got)) {
            if !matches!(tcp.read_buf(&mut got).await, Ok(1..)) {
                break;
            }
        }
    });
    read.await.unwrap_or_else(|_| panic!("no end of {:?}", String::from_utf8_lossy(&got)));
    String::from_utf8_lossy(&got).into_owned()
}
