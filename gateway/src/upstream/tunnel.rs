//! A tunnel after a 101: bytes both ways until either side ends or both pause for too long.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::Instant,
};

use super::{call::Wire, pool::Lease};
use crate::timer::Timer;

/// The upstream's side of a tunnel, and its place in the pool, which is free only at its end.
pub struct Tunnel {
    wire: Wire,
    _lease: Lease,
}

impl Tunnel {
    /// Takes over a connection whose last response was a 101.
    pub fn new(lease: Lease) -> Option<Self> {
        let wire = lease.call().take_wire()?;
        Some(Self { wire, _lease: lease })
    }

    /// Carries bytes both ways until the end; how many went to the client. `early` was read of the client already.
    pub async fn carry<T>(self, client: T, early: BytesMut, timer: &Timer, idle: Option<Duration>) -> u64
    where
        T: AsyncRead + AsyncWrite + Unpin,
    {
        let (io, first, _open) = self.wire.into_parts();
        let client = Early { first: early, io: client };
        let upstream = Early { first, io };
        carry(client, upstream, timer, idle).await.1
    }
}

/// A socket of which something was read already.
struct Early<T> {
    first: BytesMut,
    io: T,
}

impl<T: AsyncRead + Unpin> AsyncRead for Early<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buf);
        }
        let fits = self.first.len().min(buf.remaining());
        buf.put_slice(&self.first.split_to(fits));
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Early<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Copies one direction to its end. Its end, or its failure, is not the other's: what was said before it is still to be heard.
async fn one_way(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let _ = tokio::io::copy(&mut from, &mut to).await;
    let _ = to.shutdown().await;
}

/// Bytes that came out of one side, and when the last did.
#[derive(Debug)]
struct Flow {
    bytes: Cell<u64>,
    moved: Rc<Cell<Instant>>,
}

struct Side<T> {
    io: T,
    flow: Rc<Flow>,
    /// Whether it broke.
    failed: Rc<Cell<bool>>,
}

/// Carries bytes both ways; returns what came from the client and from the upstream.
async fn carry<A, B>(client: A, upstream: B, timer: &Timer, idle: Option<Duration>) -> (u64, u64)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let moved = Rc::new(Cell::new(Instant::now()));
    let flow = || Rc::new(Flow { bytes: Cell::new(0), moved: moved.clone() });
    let (up, down) = (flow(), flow());
    let client_failed: Rc<Cell<bool>> = Rc::default();
    let (from_client, to_client) =
        tokio::io::split(Side { io: client, flow: up.clone(), failed: client_failed.clone() });
    let (from_upstream, to_upstream) =
        tokio::io::split(Side { io: upstream, flow: down.clone(), failed: Rc::default() });
    let pause = async {
        match idle {
            None => std::future::pending().await,
            Some(idle) => {
                while let Some(left) = idle.checked_sub(moved.get().elapsed()).filter(|left| !left.is_zero()) {
                    timer.sleep(left).await;
                }
            }
        }
    };
    let failed = client_failed.clone();
    tokio::select! {
        biased;
        // Whether it ended well or was cut, each side saw it for itself.
        _ = futures_util::future::join(one_way(from_client, to_upstream), one_way(from_upstream, to_client)) => {}
        // Its end is not the other side's, but its failure is: nobody is there to be told.
        () = std::future::poll_fn(|_| if failed.get() { Poll::Ready(()) } else { Poll::Pending }) => {}
        () = pause => {}
    }
    (up.bytes.get(), down.bytes.get())
}

impl<T: AsyncRead + Unpin> AsyncRead for Side<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.io).poll_read(cx, buf);
        let read = buf.filled().len() - before;
        if read > 0 {
            self.flow.bytes.set(self.flow.bytes.get() + read as u64);
            self.flow.moved.set(Instant::now());
        }
        if let Poll::Ready(Err(_)) = result {
            self.failed.set(true);
        }
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Side<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.io).poll_write(cx, buf);
        if let Poll::Ready(Err(_)) = result {
            self.failed.set(true);
        }
        result
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
