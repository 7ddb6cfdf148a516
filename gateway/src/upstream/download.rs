//! The response's body on its way from an upstream.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::{call::BrokenBody, pool::Lease};
use crate::{
    error::{Error, Kind},
    timer::{Sleep, Timer},
};

/// An upstream's body. Its connection goes back to the pool at its end, and is closed if it never comes.
pub struct UpstreamBody {
    lease: Option<Lease>,
    timer: Timer,
    idle: Option<Duration>,
    sleep: Option<Sleep>,
    moved: bool,
}

impl UpstreamBody {
    /// The body that is on a connection; `idle` bounds each of its pauses.
    pub fn new(lease: Lease, timer: Timer, idle: Option<Duration>) -> Self {
        let mut this = Self { lease: Some(lease), timer, idle, sleep: None, moved: false };
        this.release_at_end();
        this
    }

    fn release_at_end(&mut self) {
        if self.lease.as_ref().is_some_and(|lease| lease.call().is_downloaded())
            && let Some(lease) = self.lease.take()
        {
            lease.release();
        }
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(idle) = self.idle else { return Poll::Pending };
        let sleep = self.sleep.get_or_insert_with(|| self.timer.sleep(idle));
        if std::mem::take(&mut self.moved) {
            sleep.reset(idle);
        }
        while Pin::new(&mut *sleep).poll(cx).is_ready() {
            // Who is still being told something need not answer yet.
            let told = self.lease.as_ref().map(Lease::upload).filter(|upload| upload.is_unfinished());
            match told.and_then(|upload| idle.checked_sub(upload.quiet())) {
                Some(left) if !left.is_zero() => *sleep = self.timer.sleep(left),
                _ => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(lease) = &self.lease else { return Poll::Ready(None) };
        let polled = lease.call().poll_body(cx);
        match polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.moved = true;
                self.release_at_end();
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(broken))) => {
                let (kind, detail) = match broken {
                    BrokenBody::Cut(detail) => (Kind::Terminated, detail),
                    BrokenBody::Protocol(detail) => (Kind::Protocol, detail.to_owned()),
                };
                let upstream = self.lease.take().map(|lease| lease.upstream().name.clone());
                Poll::Ready(Some(Err(Error { upstream, detail, ..Error::new(kind) })))
            }
            Poll::Ready(None) => {
                self.release_at_end();
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
        self.lease.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.lease.is_none() { SizeHint::with_exact(0) } else { SizeHint::default() }
    }
}
