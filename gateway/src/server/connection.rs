//! One client's connection: which protocol it speaks, and when it ends.
//!
//! A connection without a request is closed after [`KEEP_ALIVE`]; one whose client takes
//! no bytes, after the idle limit. In a drain each response is the connection's last, and
//! one that waits between requests is left [`LINGER`] to send another: closing it under a
//! request that is on its way would lose that request.

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
use hyper::{
    body::Incoming,
    rt::Executor,
    server::conn::{http1, http2},
};
use hyper_util::rt::TokioIo;
use tokio::{io::AsyncReadExt as _, net::TcpStream, time::Instant};
use tower::Service;

use super::io::{ClientIo, Stuck};
use crate::{
    context::{ClientConnection, Exchange, Request, Worker},
    layers::observe::Observed,
    upstream::upload::RequestBody,
};

/// How long a client may wait between two requests, or take over a request's head.
const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// How often a connection looks at its limits.
const CHECK: Duration = Duration::from_secs(15);
/// How often it does in a drain.
const DRAIN_CHECK: Duration = Duration::from_millis(100);
/// How long a drain leaves a client between two requests the time to send one.
const LINGER: Duration = Duration::from_secs(1);
/// What hyper may hold of one message, either way.
const BUFFER: usize = 64 * 1024;
/// How an HTTP/2 connection begins (RFC 9113 §3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Serves a connection to its end.
pub(super) async fn serve<S>(worker: Rc<Worker>, tcp: TcpStream, peer: SocketAddr, stack: S)
where
    S: Service<Request, Response = Response<Observed>, Error = Infallible> + 'static,
    S::Future: 'static,
{
    let _ = tcp.set_nodelay(true);
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let Ok(value) = HeaderValue::try_from(peer.ip().to_string()) else { return };
    let connection = Rc::new(ClientConnection::new(peer, value));
    let mut tcp = tcp;
    let Some(first) = begin(&mut tcp, &worker).await else { return };
    let is_http2 = first == PREFACE;
    let stuck = Stuck::new();
    let io = TokioIo::new(ClientIo::new(tcp, first, stuck.clone(), connection.reset.clone()));
    let service = Serve { worker: worker.clone(), connection: connection.clone(), stack: RefCell::new(stack) };
    if is_http2 {
        let mut builder = http2::Builder::new(LocalExecutor);
        builder.max_send_buf_size(BUFFER);
        let conn = std::pin::pin!(builder.serve_connection(io, service));
        guard(conn, http2::Connection::graceful_shutdown, Duration::ZERO, &worker, &connection, &stuck).await;
    } else {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(BUFFER);
        let conn = std::pin::pin!(builder.serve_connection(io, service).with_upgrades());
        guard(conn, http1::UpgradeableConnection::graceful_shutdown, LINGER, &worker, &connection, &stuck).await;
    }
}

/// Reads until it is clear which protocol the client speaks; nothing where it never says.
async fn begin(tcp: &mut TcpStream, worker: &Worker) -> Option<Vec<u8>> {
    let mut buffer = [0; PREFACE.len()];
    let mut filled = 0;
    let opened = Instant::now();
    let mut draining: Option<Instant> = None;
    loop {
        let wait = match draining {
            None => KEEP_ALIVE.saturating_sub(opened.elapsed()),
            Some(since) => LINGER.saturating_sub(since.elapsed()),
        };
        tokio::select! {
            biased;
            read = tcp.read(&mut buffer[filled..]) => {
                let Ok(read @ 1..) = read else { return None };
                filled += read;
                if filled == PREFACE.len() || !PREFACE.starts_with(&buffer[..filled]) {
                    return Some(buffer[..filled].to_vec());
                }
            }
            () = worker.timer.sleep(wait) => return None,
            () = drains(worker), if draining.is_none() => draining = Some(Instant::now()),
        }
    }
}

/// Resolves once the worker drains. Costs a look at a flag: when it changes, the worker wakes whoever waits for time to pass.
async fn drains(worker: &Worker) {
    poll_fn(|_| if worker.draining.get() { Poll::Ready(()) } else { Poll::Pending }).await;
}

/// Drives a connection and ends it when its time is up.
async fn guard<C, E>(
    mut conn: Pin<&mut C>,
    shutdown: impl Fn(Pin<&mut C>),
    linger: Duration,
    worker: &Worker,
    connection: &ClientConnection,
    stuck: &Stuck,
) where
    C: Future<Output = Result<(), E>>,
{
    let mut draining: Option<Instant> = None;
    let mut asked_to_close: Option<Instant> = None;
    let mut check = worker.timer.sleep(CHECK);
    loop {
        tokio::select! {
            biased;
            // Its errors are the client's: a reset, or bytes that are no HTTP and were answered 400.
            _ = conn.as_mut() => return,
            () = drains(worker), if draining.is_none() => draining = Some(Instant::now()),
            () = &mut check => {}
        }
        check = worker.timer.sleep(if draining.is_some() { DRAIN_CHECK } else { CHECK });
        let writing = stuck.lasts();
        if connection
            .idle
            .get()
            .is_some_and(|idle| writing.max(connection.held_for()).is_some_and(|lasts| lasts >= idle))
        {
            return;
        }
        let waiting = connection.in_flight.get() == 0 && writing.is_none();
        let active = connection.active.get();
        let over = match draining {
            Some(since) if linger.is_zero() => since.elapsed() >= linger,
            Some(since) => waiting && since.max(active).elapsed() >= linger,
            None => waiting && active.elapsed() >= KEEP_ALIVE,
        };
        match asked_to_close {
            None if over => {
                shutdown(conn.as_mut());
                asked_to_close = Some(Instant::now());
            }
            // It neither went on nor went: a head that never ends.
            Some(since) if waiting && since.max(active).elapsed() >= CHECK => return,
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
        let http = request.map(RequestBody::new);
        let context = Exchange::begin(&self.worker, &self.connection, &http);
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
