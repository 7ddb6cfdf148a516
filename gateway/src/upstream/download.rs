//! The response's body on its way from an upstream.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::{
    call::BrokenBody,
    outcome::{ENOUGH, Outcome},
    pool::Lease,
};
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
    /// What the breaker has yet to be told.
    outcome: Option<Outcome>,
    passed: u64,
}

impl UpstreamBody {
    /// The body that is on a connection; `idle` bounds each of its pauses.
    pub fn new(lease: Lease, timer: Timer, idle: Option<Duration>) -> Self {
        let mut this = Self { lease: Some(lease), timer, idle, sleep: None, moved: false, outcome: None, passed: 0 };
        this.release_at_end();
        this
    }

    /// Tells the breaker how it ends. Where that is known already, or will not be, it is told at once; unless it is to `wait`.
    pub fn watch(&mut self, mut outcome: Outcome, wait: bool) {
        let ends = self.lease.as_ref().is_some_and(|lease| lease.call().is_measured());
        if ends || wait {
            outcome.answer();
            self.outcome = Some(outcome);
        } else {
            outcome.tell(true);
        }
    }

    /// What the breaker has yet to be told, for whoever knows better.
    pub fn take_outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }

    /// Takes what is there of a response that nobody wants; so its connection may serve another.
    pub fn drain(mut self) {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        while self.passed < ENOUGH {
            match Pin::new(&mut self).poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(_))) => {}
                _ => return,
            }
        }
    }

    fn tell(&mut self, succeeded: bool) {
        if let Some(outcome) = self.outcome.take() {
            outcome.tell(succeeded);
        }
    }

    fn broke(&mut self) -> Option<std::sync::Arc<str>> {
        self.tell(false);
        let lease = self.lease.take()?;
        lease.broke();
        Some(lease.upstream().name.clone())
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

impl Drop for UpstreamBody {
    /// A response that had no body, or of which nobody looked for the end, was a success all the same.
    fn drop(&mut self) {
        if self.lease.is_none() {
            self.tell(true);
        }
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
                self.passed += frame.data_ref().map_or(0, Bytes::len) as u64;
                if self.lease.is_none() || self.passed >= ENOUGH {
                    self.tell(true);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(broken))) => {
                let (kind, detail) = match broken {
                    BrokenBody::Cut(detail) => (Kind::Terminated, detail),
                    BrokenBody::Protocol(detail) => (Kind::Protocol, detail.to_owned()),
                    BrokenBody::Request(error) => {
                        // Not the upstream's fault: nobody is told.
                        self.outcome = None;
                        self.lease = None;
                        return Poll::Ready(Some(Err(error)));
                    }
                };
                let upstream = self.broke();
                Poll::Ready(Some(Err(Error { upstream, detail, ..Error::new(kind) })))
            }
            Poll::Ready(None) => {
                self.release_at_end();
                self.tell(true);
                Poll::Ready(None)
            }
            Poll::Pending => match self.poll_idle(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => {
                    let upstream = self.broke();
                    let detail = "the body paused for too long".to_owned();
                    Poll::Ready(Some(Err(Error { upstream, detail, ..Error::new(Kind::IdleTimeout) })))
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
