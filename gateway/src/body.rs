//! A response's body: made by the gateway, or streamed from an upstream.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::{
    cache::fill::Reader,
    error::Error,
    shadow::Taken,
    upstream::{download::UpstreamBody, tunnel::Tunnel},
};

/// What is given at a time of a body that is there.
const PIECE: usize = 64 * 1024;

/// A response's body.
pub enum ResponseBody {
    /// Nothing.
    Empty,
    /// The gateway's own words.
    Full(Bytes),
    /// An upstream's.
    Upstream(Box<UpstreamBody>),
    /// One that comes into the cache meanwhile.
    Filling(Box<Reader>),
    /// One of which a copy is taken meanwhile.
    Watched(Box<Watched>),
    /// None: the connection becomes a tunnel to the upstream after this head.
    Tunnel(Box<Tunnel>),
}

/// A body of which a copy is taken while its client reads it.
pub struct Watched {
    inner: ResponseBody,
    /// The copy.
    taken: Rc<RefCell<Taken>>,
}

impl ResponseBody {
    /// Takes a copy of it while its client reads it.
    #[must_use]
    pub fn watched(self, taken: &Rc<RefCell<Taken>>) -> Self {
        if self.is_end_stream() {
            taken.borrow_mut().end();
        }
        Self::Watched(Box::new(Watched { inner: self, taken: taken.clone() }))
    }

    /// Takes what is there of one that nobody wants; so an upstream's connection may serve another.
    pub fn drain(self) {
        match self {
            Self::Upstream(body) => body.drain(),
            Self::Watched(body) => body.inner.drain(),
            Self::Empty | Self::Full(_) | Self::Filling(_) | Self::Tunnel(_) => {}
        }
    }
}

impl Watched {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        let mut taken = self.taken.borrow_mut();
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(data) = frame.data_ref() {
                    taken.take(data);
                }
                if frame.is_trailers() || self.inner.is_end_stream() {
                    taken.end();
                }
            }
            Poll::Ready(None) => taken.end(),
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        drop(taken);
        polled
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match &mut *self {
            Self::Empty | Self::Tunnel(_) => Poll::Ready(None),
            Self::Full(bytes) => {
                // In pieces, so that whoever takes them slowly is seen to.
                let piece = bytes.split_to(bytes.len().min(PIECE));
                Poll::Ready((!piece.is_empty()).then(|| Ok(Frame::data(piece))))
            }
            Self::Upstream(body) => Pin::new(&mut **body).poll_frame(cx),
            Self::Filling(body) => Pin::new(&mut **body).poll_frame(cx),
            Self::Watched(body) => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty | Self::Tunnel(_) => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Upstream(body) => body.is_end_stream(),
            Self::Filling(body) => body.is_end_stream(),
            Self::Watched(body) => body.inner.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty | Self::Tunnel(_) => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Upstream(body) => body.size_hint(),
            Self::Filling(body) => body.size_hint(),
            Self::Watched(body) => body.inner.size_hint(),
        }
    }
}
