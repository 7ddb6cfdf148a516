//! Bytes on their way out of a connection: heads and small bodies flattened into one
//! write, large pieces gathered without a copy.

use std::{
    cell::RefCell,
    io::{self, IoSlice, Write as _},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use tokio::io::AsyncWrite;

/// A piece up to this size is copied behind what is there: cheaper than a second segment of a write.
const FLAT: usize = 8 * 1024;
/// Copied bytes that may wait.
const ROOM: usize = 16 * 1024;

/// Buffers that wait for their next use, at most.
const SPARE: usize = 16;
/// The largest that is kept.
const SPARE_SIZE: usize = 64 * 1024;

thread_local! {
    static SPARES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// What is to be written, in order: copied bytes, then one large piece, then what ends it.
///
/// Its buffer is borrowed from its thread, so that a connection that waits has none.
#[derive(Debug)]
pub struct Outbox {
    flat: Vec<u8>,
    written: usize,
    piece: Bytes,
    end: &'static [u8],
    taken: u64,
    /// Whether anything was tried to be written.
    tried: bool,
    /// Whether the layers below have passed on all that they took.
    flushed: bool,
}

impl Drop for Outbox {
    fn drop(&mut self) {
        let mut flat = std::mem::take(&mut self.flat);
        if (1..=SPARE_SIZE).contains(&flat.capacity()) {
            flat.clear();
            // At a thread's end there is nobody to keep it for.
            let _ = SPARES.try_with(|spares| {
                let mut spares = spares.borrow_mut();
                if spares.len() < SPARE {
                    spares.push(flat);
                }
            });
        }
    }
}

impl Default for Outbox {
    fn default() -> Self {
        let flat = SPARES.with_borrow_mut(Vec::pop).unwrap_or_else(|| Vec::with_capacity(2048));
        Self { flat, written: 0, piece: Bytes::new(), end: b"", taken: 0, tried: false, flushed: true }
    }
}

impl Outbox {
    /// Whether everything is on its way, and nothing waits in a layer below.
    pub fn is_done(&self) -> bool {
        self.flushed && self.is_empty()
    }

    /// Whether everything is written.
    fn is_empty(&self) -> bool {
        self.written == self.flat.len() && self.piece.is_empty() && self.end.is_empty()
    }

    /// Whether more may be put in before something is written.
    pub fn has_room(&self) -> bool {
        self.piece.is_empty() && self.end.is_empty() && self.flat.len() - self.written < ROOM
    }

    /// Bytes that the system has taken.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether anything was tried to be written. Encrypted, some of it may have gone out although nothing was taken.
    pub fn tried(&self) -> bool {
        self.tried
    }

    /// Where to write a head. Only while there is room.
    pub fn flat(&mut self) -> &mut Vec<u8> {
        // What was written stays until there is more, for whoever must say it again.
        if self.written == self.flat.len() {
            self.flat.clear();
            self.written = 0;
        } else if self.written > ROOM {
            // A socket that never takes all of it must not make this grow.
            self.flat.drain(..self.written);
            self.written = 0;
        }
        self.flushed = false;
        &mut self.flat
    }

    /// Starts anew with the same bytes, which must have been only a head so far.
    pub fn rewind(&mut self) {
        self.written = 0;
        self.taken = 0;
        self.tried = false;
        self.flushed = false;
    }

    /// Adds some of a body. Only while there is room.
    pub fn push(&mut self, data: Bytes, chunked: bool) {
        if data.is_empty() {
            return;
        }
        let flat = self.flat();
        let end: &[u8] = if chunked {
            let _ = write!(flat, "{:X}\r\n", data.len());
            b"\r\n"
        } else {
            b""
        };
        if data.len() <= FLAT {
            flat.extend_from_slice(&data);
            flat.extend_from_slice(end);
        } else {
            self.piece = data;
            self.end = end;
        }
    }

    /// Writes until nothing is left or the socket takes no more.
    pub fn poll_flush<W: AsyncWrite + ?Sized>(
        &mut self,
        cx: &mut Context<'_>,
        mut io: Pin<&mut W>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            self.tried = true;
            let flat = &self.flat[self.written..];
            let mut count = if self.piece.is_empty() && self.end.is_empty() {
                ready!(io.as_mut().poll_write(cx, flat))?
            } else if flat.is_empty() && self.end.is_empty() {
                ready!(io.as_mut().poll_write(cx, &self.piece))?
            } else {
                let slices = [IoSlice::new(flat), IoSlice::new(&self.piece), IoSlice::new(self.end)];
                ready!(io.as_mut().poll_write_vectored(cx, &slices))?
            };
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.taken += count as u64;
            let of_flat = count.min(flat.len());
            self.written += of_flat;
            count -= of_flat;
            let of_piece = count.min(self.piece.len());
            self.piece.advance(of_piece);
            self.end = &self.end[count - of_piece..];
            if self.piece.is_empty() {
                self.piece = Bytes::new();
            }
        }
        // Encrypted, what was written may still wait.
        if !self.flushed {
            ready!(io.poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    /// Takes so many bytes at each turn, then none until the next.
    struct Narrow {
        each: usize,
        left: usize,
        got: Vec<u8>,
    }

    impl AsyncWrite for Narrow {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            let count = buf.len().min(self.left);
            if count == 0 {
                return Poll::Pending;
            }
            self.left -= count;
            self.got.extend_from_slice(&buf[..count]);
            Poll::Ready(Ok(count))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// What was written stayed in the buffer until all of it was: a body in small pieces to a slow client was kept whole.
    #[test]
    fn a_socket_that_never_takes_all_does_not_make_it_grow() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut outbox = Outbox::default();
        let mut io = Narrow { each: 10_000, left: 0, got: Vec::new() };
        let mut put = Vec::new();
        let mut most = 0;
        for round in 0..1000_u32 {
            while outbox.has_room() {
                let piece = Bytes::from(vec![u8::try_from(round % 251).unwrap(); 5000]);
                put.extend_from_slice(&piece);
                outbox.push(piece, false);
            }
            io.left = io.each;
            assert!(outbox.poll_flush(&mut cx, Pin::new(&mut io)).is_pending());
            most = most.max(outbox.flat.len());
        }
        assert!(most < 64 * 1024, "{most}");
        io.left = usize::MAX;
        assert!(outbox.poll_flush(&mut cx, Pin::new(&mut io)).is_ready());
        assert!(outbox.is_done() && io.got == put);
        assert_eq!(outbox.taken(), put.len() as u64);
    }
}
