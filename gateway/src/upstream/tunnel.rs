//! A tunnel after a 101: bytes both ways until either side ends or both pause for too long.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use crate::timer::Timer;

/// Bytes that came out of one side, and when the last did.
#[derive(Debug)]
pub struct Flow {
    /// Bytes read from this side.
    pub bytes: Cell<u64>,
    moved: Rc<Cell<Instant>>,
}

struct Side<T> {
    io: T,
    flow: Rc<Flow>,
}

/// Carries bytes both ways; returns what came from the client and from the upstream.
pub async fn carry<A, B>(client: A, upstream: B, timer: &Timer, idle: Option<Duration>) -> (u64, u64)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let moved = Rc::new(Cell::new(Instant::now()));
    let flow = || Rc::new(Flow { bytes: Cell::new(0), moved: moved.clone() });
    let (up, down) = (flow(), flow());
    let mut client = Side { io: client, flow: up.clone() };
    let mut upstream = Side { io: upstream, flow: down.clone() };
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
    tokio::select! {
        // Whether it ended well or was cut, each side saw it for itself.
        _ = tokio::io::copy_bidirectional(&mut client, &mut upstream) => {}
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
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Side<T> {
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
