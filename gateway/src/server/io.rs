//! The socket of an HTTP/2 client, with what was read to find out its protocol, and a note of when its writes got stuck.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

/// Since when a socket takes no more bytes. Shared with the connection, which ends what is stuck for too long.
#[derive(Clone, Debug)]
pub(super) struct Stuck {
    base: Instant,
    /// Milliseconds after `base`, plus one; zero while writes move.
    since: Arc<AtomicU64>,
}

impl Stuck {
    pub(super) fn new() -> Self {
        Self { base: Instant::now(), since: Arc::default() }
    }

    /// For how long nothing could be written.
    pub(super) fn lasts(&self) -> Option<Duration> {
        let since = self.since.load(Relaxed).checked_sub(1)?;
        Some(self.base.elapsed().saturating_sub(Duration::from_millis(since)))
    }

    fn note(&self, polled: &Poll<io::Result<usize>>) {
        match polled {
            Poll::Pending if self.since.load(Relaxed) == 0 => {
                let now = u64::try_from(self.base.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
                self.since.store(now + 1, Relaxed);
            }
            Poll::Ready(_) if self.since.load(Relaxed) != 0 => self.since.store(0, Relaxed),
            _ => {}
        }
    }
}

/// The socket of an HTTP/2 client.
pub(super) struct ClientIo {
    tcp: TcpStream,
    /// Read already, not yet seen by hyper.
    first: BytesMut,
    stuck: Stuck,
}

impl ClientIo {
    pub(super) fn new(tcp: TcpStream, first: BytesMut, stuck: Stuck) -> Self {
        Self { tcp, first, stuck }
    }
}

impl AsyncRead for ClientIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.first.is_empty() {
            return Pin::new(&mut self.tcp).poll_read(cx, buf);
        }
        let fits = self.first.len().min(buf.remaining());
        let first = self.first.split_to(fits);
        buf.put_slice(&first);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ClientIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write(cx, buf);
        self.stuck.note(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs);
        self.stuck.note(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
