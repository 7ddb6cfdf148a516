//! A client's HTTP/1.1 connection as both its loop and its request's body see it.
//!
//! The body reads from the socket itself, when it is asked: what nobody asks for stays in
//! the kernel, and the client feels it. Reading ahead is bounded by one read.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body::Frame;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_util::io::poll_read_buf;

use crate::{
    error::Kind,
    http1::{
        READ,
        body::{Decoded, Decoder},
        head::Refused,
        with_scratch, write,
    },
};

/// What is read at a time of a body whose length is known.
pub const LARGE: usize = 128 * 1024;
/// Interim responses that may wait for a client that does not read them.
const INTERIM: usize = 16 * 1024;

/// How much to read for a body: to its end and a byte beyond, so that the read is a short one and the next need not ask
/// the system in vain.
pub fn read_size(decoder: Decoder) -> usize {
    match decoder {
        Decoder::Length(left) => usize::try_from(left).unwrap_or(LARGE).min(LARGE) + 1,
        decoder => {
            let left = decoder.expects().and_then(|left| usize::try_from(left).ok()).unwrap_or(0);
            (left.min(LARGE) + 16).max(READ)
        }
    }
}

/// A piece of a request's body, or what is wrong with it: for the client, and more for the log.
pub type Piece = Result<Frame<Bytes>, (Kind, String)>;

/// A client's connection.
pub struct Inbound {
    /// The socket.
    pub tcp: RefCell<TcpStream>,
    /// Bytes read, not yet understood.
    pub kept: RefCell<BytesMut>,
    /// Where in the request's body the next byte belongs.
    pub decoder: Cell<Decoder>,
    /// Whether the client has ended its side.
    pub ended: Cell<bool>,
    interim: RefCell<Vec<u8>>,
    /// Whether the client understands interim responses, and none can come too late.
    pub takes_interim: Cell<bool>,
}

impl Inbound {
    /// A connection of which nothing was read.
    pub fn new(tcp: TcpStream) -> Self {
        Self {
            tcp: RefCell::new(tcp),
            kept: RefCell::default(),
            decoder: Cell::new(Decoder::Done),
            ended: Cell::new(false),
            interim: RefCell::default(),
            takes_interim: Cell::new(false),
        }
    }

    /// The next piece of the request's body.
    pub fn poll_body(&self, cx: &mut Context<'_>) -> Poll<Option<Piece>> {
        loop {
            if let Some(decoded) = self.decode() {
                return Poll::Ready(decoded);
            }
            match ready!(self.poll_read(cx, read_size(self.decoder.get()))) {
                Ok(0) => {
                    let told = (Kind::ClientAborted, "the connection ended before the body did".to_owned());
                    return Poll::Ready(Some(Err(told)));
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err((Kind::ClientAborted, error.to_string())))),
            }
        }
    }

    /// The next piece of what was read already; nothing where more must be read.
    #[allow(clippy::option_option, reason = "nothing yet, no more, or a frame")]
    fn decode(&self) -> Option<Option<Piece>> {
        let mut decoder = self.decoder.get();
        let decoded = decoder.decode(&mut self.kept.borrow_mut());
        self.decoder.set(decoder);
        match decoded {
            Ok(Decoded::More) => None,
            Ok(Decoded::Data(data)) => Some(Some(Ok(Frame::data(data)))),
            Ok(Decoded::Trailers(trailers)) => Some(Some(Ok(Frame::trailers(trailers)))),
            Ok(Decoded::End) => Some(None),
            Err(Refused::Malformed(why)) => Some(Some(Err((Kind::BadRequest(why), String::new())))),
            Err(_) => Some(Some(Err((Kind::BadRequest("malformed body"), String::new())))),
        }
    }

    /// Throws away what was read of a body that nobody wants; whether that was all of it.
    pub fn skip_body(&self) -> bool {
        loop {
            match self.decode() {
                Some(None) => return true,
                Some(Some(Ok(_))) => {}
                Some(Some(Err(_))) | None => return self.decoder.get().is_done(),
            }
        }
    }

    /// Reads more; how much came. 0 is the end of what the client sends.
    pub fn poll_read(&self, cx: &mut Context<'_>, size: usize) -> Poll<io::Result<usize>> {
        let mut kept = self.kept.borrow_mut();
        kept.reserve(size);
        let polled = poll_read_buf(Pin::new(&mut *self.tcp.borrow_mut()), cx, &mut *kept);
        if kept.is_empty() {
            // Whoever waits holds no buffer.
            *kept = BytesMut::new();
        }
        if let Poll::Ready(Ok(0)) = polled {
            self.ended.set(true);
        }
        polled
    }

    /// Reads what comes into this thread's buffer, and keeps it.
    pub fn poll_read_ahead(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.poll_read_with(cx, |_| Ok::<Option<((), usize)>, ()>(None)).map_ok(|(count, _)| count)
    }

    /// Reads what comes into this thread's buffer and offers it to `parse`, which takes the first part of it or nothing.
    /// The rest is kept.
    #[allow(clippy::type_complexity, reason = "how much was read, and what was made of it")]
    pub fn poll_read_with<T, E>(
        &self,
        cx: &mut Context<'_>,
        parse: impl FnOnce(&[u8]) -> Result<Option<(T, usize)>, E>,
    ) -> Poll<io::Result<(usize, Result<Option<T>, E>)>> {
        with_scratch(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut *self.tcp.borrow_mut()).poll_read(cx, &mut buffer))?;
            let bytes = buffer.filled();
            if bytes.is_empty() {
                self.ended.set(true);
                return Poll::Ready(Ok((0, Ok(None))));
            }
            let (rest, parsed) = match parse(bytes) {
                Ok(Some((parsed, length))) => (&bytes[length..], Ok(Some(parsed))),
                Ok(None) => (bytes, Ok(None)),
                Err(error) => (bytes, Err(error)),
            };
            if !rest.is_empty() {
                self.kept.borrow_mut().extend_from_slice(rest);
            }
            Poll::Ready(Ok((bytes.len(), parsed)))
        })
    }

    /// Asks the system whether the client has ended its side, or is gone, without reading what may come before that.
    pub fn look(&self) -> Left {
        use rustix::event::{PollFd, PollFlags, poll};
        let tcp = self.tcp.borrow();
        let mut polled = [PollFd::new(&*tcp, PollFlags::RDHUP)];
        if poll(&mut polled, Some(&rustix::event::Timespec::default())).is_err() {
            return Left::No;
        }
        let flags = polled[0].revents();
        if flags.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            Left::Gone
        } else if flags.contains(PollFlags::RDHUP) {
            Left::HalfClosed
        } else {
            Left::No
        }
    }

    /// Passes on an interim response; too late, or more than the client reads, and it is dropped.
    pub fn interim(&self, status: StatusCode, headers: &HeaderMap) {
        let mut waiting = self.interim.borrow_mut();
        if self.takes_interim.get() && waiting.len() < INTERIM {
            write::interim(&mut waiting, status, headers);
        }
    }

    /// Writes the interim responses that wait.
    pub fn poll_interim(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut waiting = self.interim.borrow_mut();
        while !waiting.is_empty() {
            let written = ready!(Pin::new(&mut *self.tcp.borrow_mut()).poll_write(cx, &waiting))?;
            waiting.drain(..written);
        }
        Poll::Ready(Ok(()))
    }

    /// What no interim response has taken with it: it goes before the final one.
    pub fn take_interim(&self) -> Vec<u8> {
        self.takes_interim.set(false);
        std::mem::take(&mut *self.interim.borrow_mut())
    }
}

/// Whether a client has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It is there.
    No,
    /// It sends no more. It may be gone or wait for its answer.
    HalfClosed,
    /// It is gone.
    Gone,
}

/// The socket, for a tunnel.
pub struct Socket<'a>(pub &'a Inbound);

impl AsyncRead for Socket<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.tcp.borrow_mut()).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.tcp.borrow_mut()).poll_write(cx, buf)
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.tcp.borrow_mut()).poll_flush(cx)
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.tcp.borrow_mut()).poll_shutdown(cx)
    }
}
