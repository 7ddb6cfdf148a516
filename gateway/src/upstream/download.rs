//! The response's body on its way from an upstream.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::pool::Lease;
use crate::{
    error::{Error, Kind},
    timer::{Sleep, Timer},
};

/// An upstream's body. Its connection goes back to the pool at its end, and is closed if it never comes.
pub struct UpstreamBody {
    incoming: Incoming,
    lease: Option<Lease>,
    timer: Timer,
    idle: Option<Duration>,
    sleep: Option<Sleep>,
    moved: bool,
}

impl UpstreamBody {
    /// Wraps a response's body; `idle` bounds each of its pauses.
    pub fn new(incoming: Incoming, lease: Lease, timer: Timer, idle: Option<Duration>) -> Self {
        let mut this = Self { incoming, lease: Some(lease), timer, idle, sleep: None, moved: false };
        this.release_at_end();
        this
    }

    fn release_at_end(&mut self) {
        if self.incoming.is_end_stream()
            && let Some(lease) = self.lease.take()
        {
            lease.release(self.idle);
        }
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(idle) = self.idle else { return Poll::Pending };
        let sleep = self.sleep.get_or_insert_with(|| self.timer.sleep(idle));
        if std::mem::take(&mut self.moved) {
            sleep.reset(idle);
        }
        Pin::new(sleep).poll(cx)
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                self.moved = true;
                if frame.is_trailers() {
                    // Nobody looks for an end after them.
                    if let Some(lease) = self.lease.take() {
                        lease.release(self.idle);
                    }
                }
                self.release_at_end();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                let mut told = Error::new(Kind::Terminated);
                told.detail = error.to_string();
                if let Some(lease) = self.lease.take() {
                    told.upstream = Some(lease.upstream().name.clone());
                }
                Poll::Ready(Some(Err(told)))
            }
            Poll::Ready(None) => {
                if let Some(lease) = self.lease.take() {
                    lease.release(self.idle);
                }
                Poll::Ready(None)
            }
            Poll::Pending => match self.poll_idle(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => {
                    let upstream = self.lease.take().map(|lease| lease.upstream().name.clone());
                    let detail = "the body paused for too long".to_owned();
                    Poll::Ready(Some(Err(Error { upstream, detail, ..Error::new(Kind::AttemptTimeout) })))
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}
