//! Sees every outcome: what the client got, when its head was there, and whether it had all of it.
//!
//! The exchange is held by the response's body, so it ends when the body does.

use std::{
    pin::Pin,
    task::{Context as Task, Poll},
};

use bytes::Bytes;
use http::Version;
use http_body::{Body, Frame, SizeHint};
use tokio::time::Instant;
use tower::Service;

use super::{Later, always_ready};
use crate::{
    body::ResponseBody,
    context::{Context, Request, Response},
    error::Error,
    upstream::tunnel::Tunnel,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Observe<S> {
    inner: S,
}

impl<S> Observe<S> {
    /// Around what turns every failure into a response.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Observe<S>
where
    S: Service<Request, Response = Response, Error = std::convert::Infallible>,
    S::Future: 'static,
{
    type Response = http::Response<Observed>;
    type Error = std::convert::Infallible;
    type Future = Later<Self::Response, Self::Error>;

    always_ready!();

    fn call(&mut self, request: Request) -> Self::Future {
        let context = request.context.clone();
        let future = self.inner.call(request);
        Box::pin(async move {
            let response = match future.await {
                Ok(response) => response,
                Err(never) => match never {},
            };
            context.status.set(response.status().as_u16());
            context.head.set(Some(context.started.elapsed()));
            Ok(response.map(|body| Observed::new(body, context)))
        })
    }
}

/// A body that knows how much of it went to the client.
pub struct Observed {
    body: ResponseBody,
    context: Context,
    /// Where the connection notes the frame that was handed out last.
    held: Option<usize>,
}

impl Observed {
    fn new(body: ResponseBody, context: Context) -> Self {
        // hyper never polls a body that is at its end: of a HEAD, a 204, an empty answer.
        context.complete.set(body.is_end_stream() || context.method == http::Method::HEAD);
        Self { body, context, held: None }
    }
}

impl Observed {
    /// The client did not have all of it after all.
    pub fn cut(&self) {
        self.context.complete.set(false);
    }

    /// Whether the connection serves no other request after this one.
    pub fn is_last(&self) -> bool {
        self.context.last.get()
    }

    /// The tunnel that follows this head, if one does, and whose it is.
    pub fn into_tunnel(mut self) -> Option<(Tunnel, Context)> {
        match std::mem::replace(&mut self.body, ResponseBody::Empty) {
            ResponseBody::Tunnel(tunnel) => Some((*tunnel, self.context.clone())),
            _ => None,
        }
    }

    fn let_go(&mut self) {
        if let Some(held) = self.held.take() {
            self.context.connection.held.borrow_mut().try_remove(held);
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.let_go();
    }
}

impl Body for Observed {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Task<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        this.let_go();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
                this.context.sent.set(this.context.sent.get() + bytes);
                // With a length hyper does not look for the end again.
                if frame.is_trailers() || this.body.is_end_stream() {
                    this.context.complete.set(true);
                }
                // Until it is polled again, a stream of HTTP/2 may be waiting for its client's window.
                if this.context.version == Version::HTTP_2 {
                    this.held = Some(this.context.connection.held.borrow_mut().insert(Instant::now()));
                }
            }
            Poll::Ready(None) => this.context.complete.set(true),
            Poll::Ready(Some(Err(error))) => {
                *this.context.failure.borrow_mut() = Some((error.kind, error.detail.clone()));
            }
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
