//! One request and its response on one connection to an upstream.
//!
//! Both directions are driven by whoever waits for the response, without a task of
//! their own: dropping the call closes the connection, and that is how a client's leaving reaches
//! the upstream. Only an upload that outlives the response's head gets a task (`pool`).

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{HeaderMap, Method, StatusCode};
use http_body::{Body as _, Frame};
use tokio::{
    io::{AsyncRead as _, ReadBuf},
    sync::OwnedSemaphorePermit,
    time::Instant,
};
use tokio_util::io::poll_read_buf;

use super::{connect::Io, endpoint::Endpoint, upload::RequestBody};
use crate::{
    error::Error,
    http1::{
        body::{Decoded, Decoder},
        head::{self, Framing, Refused, ResponseHead},
        outbox::Outbox,
        with_scratch, write,
    },
    inbound::read_size,
    telemetry::metrics::UpstreamStats,
};

/// A response's head, at most.
const MAX_HEAD: usize = 64 * 1024;
/// Writes of one request before others have their turn.
const TURN: usize = 8;
/// Interim responses before a final one, at most.
const MAX_INTERIM: usize = 100;

/// A connection to an upstream.
pub struct Wire {
    io: Io,
    /// Where it leads.
    pub endpoint: Arc<Endpoint>,
    /// Read, not yet understood.
    kept: BytesMut,
    /// When it was made.
    pub born: Instant,
    /// When it was last used.
    pub idle_since: Instant,
    /// Whether its last response had no body where another would have one: some upstreams send it all the same.
    suspect: bool,
    open: Open,
}

impl Wire {
    /// A new connection, counted until it is closed.
    pub fn new(io: Io, endpoint: Arc<Endpoint>, stats: Arc<UpstreamStats>) -> Self {
        stats.open.fetch_add(1, Relaxed);
        let now = Instant::now();
        Self { io, endpoint, kept: BytesMut::new(), born: now, idle_since: now, suspect: false, open: Open(stats) }
    }

    /// Whether an idle connection is as it was left: neither closed nor spoken on. Asks the system only where the runtime
    /// has heard of something.
    pub fn is_quiet(&mut self) -> bool {
        let mut byte = [0; 1];
        let mut cx = Context::from_waker(Waker::noop());
        Pin::new(&mut self.io).poll_read(&mut cx, &mut ReadBuf::new(&mut byte)).is_pending()
    }

    /// Asks the system whether the other side has closed or spoken, which the runtime may not have heard of yet. Worth it
    /// for a request that must not be sent twice, and after a response that may have more to it.
    pub fn was_closed(&self, careful: bool) -> bool {
        if !careful && !self.suspect {
            return false;
        }
        let mut byte = [std::mem::MaybeUninit::uninit(); 1];
        let peeked = socket2::SockRef::from(self.io.tcp()).peek(&mut byte);
        // Encrypted, a close is told in bytes, too.
        !peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The socket and what was read of it, for a tunnel; and what counts it as open.
    pub fn into_parts(self) -> (Io, BytesMut, Open) {
        (self.io, self.kept, self.open)
    }
}

/// Counts an open connection until it is closed.
pub struct Open(Arc<UpstreamStats>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// Why a call has no response.
#[derive(Debug)]
pub enum Failed {
    /// The connection broke before a byte of the request was taken.
    Unsent(String),
    /// The connection broke before a byte of a response came.
    Silent(String),
    /// The connection broke in the middle.
    Broken(String),
    /// The request's body broke off.
    Body(Error),
    /// What came is no response.
    Protocol(&'static str),
}

/// A request on its way, and its response.
pub struct Call {
    wire: Option<Wire>,
    outbox: Outbox,
    /// What is still to be sent.
    body: Option<RequestBody>,
    chunked: bool,
    /// Its place among the uploads, until it is none any more.
    place: Option<OwnedSemaphorePermit>,
    decoder: Decoder,
    reusable: bool,
    /// Whether anything came back yet.
    answered: bool,
    interim: usize,
    write_error: Option<io::Error>,
    /// How much of a head was looked at in vain.
    seen: usize,
    /// Why the response must not go on, although the upstream might send it.
    spoilt: Option<Error>,
    /// Who waits for the response's body.
    reader: Option<Waker>,
}

impl Call {
    /// A request whose head is in the outbox.
    pub fn new(
        wire: Wire,
        outbox: Outbox,
        body: Option<RequestBody>,
        chunked: bool,
        place: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self {
            wire: Some(wire),
            outbox,
            body,
            chunked,
            place,
            decoder: Decoder::Done,
            reusable: false,
            answered: false,
            interim: 0,
            write_error: None,
            seen: 0,
            spoilt: None,
            reader: None,
        }
    }

    /// What a connection that broke has not sent.
    pub fn take_unsent(&mut self) -> (Outbox, Option<RequestBody>, Option<OwnedSemaphorePermit>) {
        self.outbox.rewind();
        (std::mem::take(&mut self.outbox), self.body.take(), self.place.take())
    }

    /// Whether all of the request went out.
    pub fn is_uploaded(&self) -> bool {
        self.body.is_none() && self.outbox.is_done()
    }

    /// Bytes of the request that the system has taken.
    pub fn taken(&self) -> u64 {
        self.outbox.taken()
    }

    /// The request is not sent on, and the connection not used again.
    pub fn give_up(&mut self) {
        self.body = None;
        self.place = None;
        self.reusable = false;
    }

    /// The request broke off: what comes back is not for anybody.
    pub fn spoil(&mut self, why: Error) {
        self.give_up();
        self.spoilt = Some(why);
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// The connection, where request and response are over and another request may follow.
    pub fn take_finished(&mut self) -> Option<Wire> {
        let over = self.reusable && self.decoder.is_done() && self.is_uploaded();
        // What came after the response answers nothing: the next request must not get it.
        let mut wire = self.wire.take().filter(|wire| over && wire.kept.is_empty())?;
        wire.kept = BytesMut::new();
        Some(wire)
    }

    /// The connection, whatever is on it.
    pub fn take_wire(&mut self) -> Option<Wire> {
        self.wire.take()
    }

    /// Sends on the request.
    pub fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        let Some(wire) = &mut self.wire else { return Poll::Ready(Ok(())) };
        for _ in 0..TURN {
            let mut starved = false;
            while let Some(body) = &mut self.body
                && self.outbox.has_room()
            {
                match Pin::new(&mut *body).poll_frame(cx) {
                    Poll::Pending => {
                        starved = true;
                        break;
                    }
                    Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                        Ok(data) => {
                            self.outbox.push(data, self.chunked);
                            if !self.chunked && body.is_end_stream() {
                                self.body = None;
                            }
                        }
                        Err(frame) => {
                            if self.chunked {
                                write::last_chunk(self.outbox.flat(), frame.trailers_ref());
                            }
                            self.body = None;
                        }
                    },
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(Failed::Body(error))),
                    Poll::Ready(None) => {
                        if self.chunked {
                            write::last_chunk(self.outbox.flat(), None);
                        }
                        self.body = None;
                    }
                }
            }
            if let Err(error) = ready!(self.outbox.poll_flush(cx, Pin::new(&mut wire.io))) {
                let told = error.to_string();
                self.write_error = Some(error);
                let failed = if self.is_unsent() { Failed::Unsent(told) } else { Failed::Broken(told) };
                return Poll::Ready(Err(failed));
            }
            if self.body.is_none() {
                self.place = None;
                return Poll::Ready(Ok(()));
            }
            if starved {
                return Poll::Pending;
            }
        }
        // A long body must not keep others waiting.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Sends, and waits for the head of the final response.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
        interim: &impl Fn(StatusCode, &HeaderMap),
    ) -> Poll<Result<ResponseHead, Failed>> {
        if self.write_error.is_none() && !self.is_uploaded() {
            match self.poll_upload(cx) {
                // It may have said why before it closed: what it said is read below.
                Poll::Ready(Err(Failed::Broken(_))) => self.give_up(),
                Poll::Ready(Err(failed)) => return Poll::Ready(Err(failed)),
                Poll::Ready(Ok(())) | Poll::Pending => {}
            }
        }
        loop {
            let head = ready!(self.poll_read_head(cx, method))?;
            if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS {
                self.interim += 1;
                if self.interim > MAX_INTERIM {
                    return Poll::Ready(Err(Failed::Protocol("too many interim responses")));
                }
                interim(head.status, &head.headers);
                continue;
            }
            self.decoder = Decoder::new(head.framing);
            if let Some(wire) = &mut self.wire {
                wire.suspect = head.bodyless;
            }
            self.reusable =
                head.keep_alive && self.write_error.is_none() && head.status != StatusCode::SWITCHING_PROTOCOLS;
            return Poll::Ready(Ok(head));
        }
    }

    fn poll_read_head(&mut self, cx: &mut Context<'_>, method: &Method) -> Poll<Result<ResponseHead, Failed>> {
        let Some(wire) = &mut self.wire else { return Poll::Pending };
        let refused = |refused| match refused {
            Refused::Malformed(why) => Failed::Protocol(why),
            Refused::Fields | Refused::Target => Failed::Protocol("the response's head is too large"),
            Refused::Version => Failed::Protocol("another version of HTTP than 1.0 and 1.1"),
        };
        loop {
            // An interim response may have brought the next along.
            if !wire.kept.is_empty()
                && head::is_whole(&wire.kept, self.seen).map_err(refused)?
                && let Some((head, length)) = head::parse_response(&wire.kept, MAX_HEAD, method).map_err(refused)?
            {
                wire.kept.advance(length);
                self.seen = 0;
                return Poll::Ready(Ok(head));
            }
            if wire.kept.len() > MAX_HEAD {
                return Poll::Ready(Err(refused(Refused::Fields)));
            }
            self.seen = wire.kept.len();
            let read = with_scratch(|scratch| {
                let mut buffer = ReadBuf::new(scratch);
                ready!(Pin::new(&mut wire.io).poll_read(cx, &mut buffer)).map_err(Ok)?;
                let bytes = buffer.filled();
                // Nearly always the whole head comes at once: then it is read where it is.
                if wire.kept.is_empty()
                    && !bytes.is_empty()
                    && let Some((head, length)) = head::parse_response(bytes, MAX_HEAD, method).map_err(Err)?
                {
                    let rest = &bytes[length..];
                    if let Framing::Length(whole) = head.framing
                        && whole > rest.len() as u64
                    {
                        // Room for what follows, so that it all goes on in one piece.
                        wire.kept.reserve(read_size(Decoder::Length(whole)));
                    }
                    wire.kept.extend_from_slice(rest);
                    return Poll::Ready(Ok((bytes.len(), Some(head))));
                }
                wire.kept.extend_from_slice(bytes);
                Poll::Ready(Ok::<_, Result<io::Error, Refused>>((bytes.len(), None)))
            });
            match ready!(read) {
                Ok((0, _)) => {
                    let told =
                        self.write_error.as_ref().map_or("it closed the connection".to_owned(), io::Error::to_string);
                    return Poll::Ready(Err(self.broken(told)));
                }
                Ok((_, head)) => {
                    self.answered = true;
                    if let Some(head) = head {
                        return Poll::Ready(Ok(head));
                    }
                }
                Err(Ok(error)) => return Poll::Ready(Err(self.broken(error.to_string()))),
                Err(Err(malformed)) => {
                    self.answered = true;
                    return Poll::Ready(Err(refused(malformed)));
                }
            }
        }
    }

    /// Whether certainly not a byte of the request went out.
    fn is_unsent(&self) -> bool {
        let encrypted = self.wire.as_ref().is_some_and(|wire| wire.io.is_encrypted());
        self.outbox.taken() == 0 && !(encrypted && self.outbox.tried())
    }

    fn broken(&self, told: String) -> Failed {
        if self.answered {
            Failed::Broken(told)
        } else if self.is_unsent() {
            Failed::Unsent(told)
        } else {
            Failed::Silent(told)
        }
    }

    /// Whether the length of the response's body is known.
    pub fn is_measured(&self) -> bool {
        matches!(self.decoder, Decoder::Length(_) | Decoder::Done)
    }

    /// Whether the response's body is over.
    pub fn is_downloaded(&self) -> bool {
        self.decoder.is_done()
    }

    /// The next piece of the response's body.
    pub fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenBody>>> {
        if let Some(why) = self.spoilt.take() {
            return Poll::Ready(Some(Err(BrokenBody::Request(why))));
        }
        let Some(wire) = &mut self.wire else { return Poll::Ready(None) };
        // What came with the head goes on together with what is there by now.
        if let Decoder::Length(left) = self.decoder
            && !wire.kept.is_empty()
            && (wire.kept.len() as u64) < left
            && wire.kept.capacity() > wire.kept.len()
        {
            let _ = poll_read_buf(Pin::new(&mut wire.io), cx, &mut wire.kept);
        }
        loop {
            match self.decoder.decode(&mut wire.kept) {
                Ok(Decoded::Data(data)) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Decoded::Trailers(trailers)) => return Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                Ok(Decoded::End) => return Poll::Ready(None),
                Ok(Decoded::More) => {}
                Err(Refused::Malformed(why)) => return Poll::Ready(Some(Err(BrokenBody::Protocol(why)))),
                Err(_) => return Poll::Ready(Some(Err(BrokenBody::Protocol("malformed body")))),
            }
            wire.kept.reserve(read_size(self.decoder));
            let polled = poll_read_buf(Pin::new(&mut wire.io), cx, &mut wire.kept);
            if wire.kept.is_empty() {
                // Whoever waits holds no buffer.
                wire.kept = BytesMut::new();
            }
            if polled.is_pending() && !(self.body.is_none() && self.outbox.is_done()) {
                self.reader = Some(cx.waker().clone());
            }
            // A reset that a write was told of is an end to whoever reads. Only a broken pipe was an end before.
            let reset = self.write_error.as_ref().is_some_and(|error| error.kind() != io::ErrorKind::BrokenPipe);
            match ready!(polled) {
                Ok(0) if self.decoder == Decoder::Close && !reset => {
                    self.decoder = Decoder::Done;
                    return Poll::Ready(None);
                }
                Ok(0) => return Poll::Ready(Some(Err(BrokenBody::Cut("it closed the connection".to_owned())))),
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(BrokenBody::Cut(error.to_string())))),
            }
        }
    }
}

/// Why a body has no end.
#[derive(Debug)]
pub enum BrokenBody {
    /// The connection ended first.
    Cut(String),
    /// What came is no body.
    Protocol(&'static str),
    /// The request broke off, and its response is for nobody.
    Request(Error),
}
