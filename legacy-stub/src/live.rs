//! Notifications as they happen: server-sent events, and a WebSocket that echoes.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming},
    header,
};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

/// Frames as they are made.
pub(crate) struct Stream(mpsc::Receiver<Result<Frame<Bytes>, std::io::Error>>);

impl Stream {
    /// A stream and its source; an error cuts the response off.
    pub(crate) fn new() -> (mpsc::Sender<Result<Frame<Bytes>, std::io::Error>>, Self) {
        let (sender, receiver) = mpsc::channel(1);
        (sender, Self(receiver))
    }
}

impl Body for Stream {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        self.0.poll_recv(cx)
    }
}

/// Notifications, one `every` so often, so many.
pub(crate) fn events(every: Duration, count: u64, make: impl Fn(u64) -> String + Send + 'static) -> Stream {
    let (sender, stream) = Stream::new();
    tokio::spawn(async move {
        for n in 1..=count {
            let event = format!("id: {n}\ndata: {}\n\n", make(n));
            if sender.send(Ok(Frame::data(event.into()))).await.is_err() {
                return;
            }
            tokio::time::sleep(every).await;
        }
    });
    stream
}

/// Answers a WebSocket handshake and echoes what comes, until the other side closes.
pub(crate) fn websocket(mut request: Request<Incoming>) -> Option<Response<()>> {
    let key = request.headers().get(header::SEC_WEBSOCKET_KEY)?;
    let accept = derive_accept_key(key.as_bytes());
    tokio::spawn(async move {
        let Ok(upgraded) = hyper::upgrade::on(&mut request).await else { return };
        let mut socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        while let Some(Ok(message)) = socket.next().await {
            let echoed = match message {
                Message::Text(_) | Message::Binary(_) => socket.send(message).await,
                _ => Ok(()),
            };
            if echoed.is_err() {
                return;
            }
        }
    });
    Response::builder()
        .status(101)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_ACCEPT, accept)
        .body(())
        .ok()
}

/// Never fails: for bodies that are whole.
pub(crate) fn whole(never: Infallible) -> std::io::Error {
    match never {}
}
