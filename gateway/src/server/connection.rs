//! One client's connection: which protocol it speaks. HTTP/1.1 is served in `http1`, HTTP/2 by hyper here.
//!
//! An HTTP/2 connection without a request is asked to close after the keep-alive
//! limit; one whose client takes no bytes is closed after the idle limit. In a drain the client is
//! told which streams will still be served, and the rest it sends elsewhere.

use std::{
    cell::RefCell,
    convert::Infallible,
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::Poll,
    time::Duration,
};

use http::{HeaderValue, Response};
use hyper::{body::Incoming, rt::Executor, server::conn::http2};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::Instant};
use tower::Service;

use super::{
    http1::{Begun, Http1},
    io::{ClientIo, Stuck},
    worker::Place,
};
use crate::{
    context::{ClientConnection, Exchange, Request, Worker},
    layers::observe::Observed,
    upstream::upload::RequestBody,
};

/// How often a connection of HTTP/2 looks at its limits.
const CHECK: Duration = Duration::from_secs(1);
/// What hyper may hold of one message, either way.
const BUFFER: usize = 64 * 1024;
/// Streams that a client may open and reset, or get reset for an error of its own, before it is told to go.
const RESETS: usize = 32;
/// How long a client that was asked to close may take none of what is left for it, where no route says how long.
const STUCK: Duration = Duration::from_mins(1);
/// How long a client that was asked to close may take.
const LEAVE: Duration = Duration::from_secs(5);
/// How an HTTP/2 connection begins (RFC 9113 §3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Begins to serve a connection.
pub(super) fn begin<S>(worker: &Rc<Worker>, tcp: TcpStream, peer: SocketAddr, place: Place, stack: &S)
where
    S: Service<Request, Response = Response<Observed>, Error = Infallible> + Clone + 'static,
    S::Future: Unpin + 'static,
{
    let _ = tcp.set_nodelay(true);
    let peer = peer.ip().to_canonical();
    let Ok(value) = HeaderValue::try_from(peer.to_string()) else { return };
    let connection = Rc::new(ClientConnection::new(peer, value));
    let limits = worker.local().snapshot.clients;
    let http1 = Http1::new(worker.clone(), connection, tcp, limits, stack.clone());
    tokio::task::spawn_local(serve(http1, place));
}

/// Serves a connection to its end.
async fn serve<S>(mut http1: Http1<S>, _place: Place)
where
    S: Service<Request, Response = Response<Observed>, Error = Infallible> + Clone + 'static,
    S::Future: Unpin + 'static,
{
    match http1.begins_with(PREFACE).await {
        None => {}
        Some(false) => http1.serve().await,
        // What an HTTP/2 connection needs is kept apart: most are of HTTP/1.1, and many of those idle.
        Some(true) => Box::pin(serve_http2(http1)).await,
    }
}

async fn serve_http2<S>(http1: Http1<S>)
where
    S: Service<Request, Response = Response<Observed>, Error = Infallible> + Clone + 'static,
    S::Future: Unpin + 'static,
{
    let Some(Begun { worker, connection, tcp, first, limits, stack }) = http1.into_parts() else { return };
    let stuck = Stuck::new();
    let io = TokioIo::new(ClientIo::new(tcp, first, stuck.clone()));
    let service = Serve { worker: worker.clone(), connection: connection.clone(), stack: RefCell::new(stack) };
    let mut builder = http2::Builder::new(LocalExecutor);
    builder
        .max_send_buf_size(BUFFER)
        .max_concurrent_streams(limits.max_streams)
        .max_header_list_size(u32::try_from(limits.max_header).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS);
    let conn = std::pin::pin!(builder.serve_connection(io, service));
    guard(conn, http2::Connection::graceful_shutdown, &worker, &connection, &stuck, limits.keep_alive).await;
}

/// Resolves once the worker drains. Costs a look at a flag: when it changes, the worker wakes whoever waits for time to pass.
async fn drains(worker: &Worker) {
    poll_fn(|_| if worker.draining.get() { Poll::Ready(()) } else { Poll::Pending }).await;
}

/// Drives a connection of HTTP/2 and ends it when its time is up.
async fn guard<C, E>(
    mut conn: Pin<&mut C>,
    shutdown: impl Fn(Pin<&mut C>),
    worker: &Worker,
    connection: &ClientConnection,
    stuck: &Stuck,
    keep_alive: Duration,
) where
    C: Future<Output = Result<(), E>>,
{
    let mut asked_to_close: Option<Instant> = None;
    let mut check = worker.timer.sleep(CHECK);
    loop {
        tokio::select! {
            biased;
            // Its errors are the client's.
            _ = conn.as_mut() => return,
            // Looked at whenever the client has sent something.
            () = poll_fn(|_| if connection.is_abused() { Poll::Ready(()) } else { Poll::Pending }) => return,
            () = drains(worker), if asked_to_close.is_none() => {}
            () = &mut check => {}
        }
        check = worker.timer.sleep(CHECK);
        let writing = stuck.lasts();
        if connection
            .idle
            .get()
            .is_some_and(|idle| writing.max(connection.held_for()).is_some_and(|lasts| lasts >= idle))
        {
            return;
        }
        let waiting = connection.in_flight.get() == 0;
        let active = connection.active.get();
        match asked_to_close {
            // A stream that was on its way is still served, and no other.
            None if worker.draining.get() || (waiting && active.elapsed() >= keep_alive) => {
                shutdown(conn.as_mut());
                asked_to_close = Some(Instant::now());
            }
            // It neither went on nor went.
            Some(since) if waiting && writing.is_none() && since.max(active).elapsed() >= LEAVE => return,
            Some(_) if waiting && writing.is_some_and(|lasts| lasts >= STUCK) => return,
            _ => {}
        }
    }
}

/// The pipeline as hyper's service.
struct Serve<S> {
    worker: Rc<Worker>,
    connection: Rc<ClientConnection>,
    stack: RefCell<S>,
}

impl<S> hyper::service::Service<http::Request<Incoming>> for Serve<S>
where
    S: Service<Request, Response = Response<Observed>, Error = Infallible>,
{
    type Response = Response<Observed>;
    type Error = Infallible;
    type Future = S::Future;

    fn call(&self, request: http::Request<Incoming>) -> S::Future {
        let http = Box::new(request.map(RequestBody::http2));
        let context = Exchange::begin(&self.worker, &self.connection, None, &http);
        // The borrow ends before the future is polled.
        self.stack.borrow_mut().call(Request { http, context })
    }
}

/// Spawns the streams of an HTTP/2 connection on its own worker.
#[derive(Clone, Copy, Debug)]
struct LocalExecutor;

impl<F> Executor<F> for LocalExecutor
where
    F: Future + 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move {
            future.await;
        });
    }
}
