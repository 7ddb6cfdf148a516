//! One thread that accepts for all workers and gives each connection to the least busy one.
//!
//! A listener that is closed or replaced is emptied first: whoever the kernel has
//! already accepted is served.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, atomic::Ordering::Relaxed},
    thread::JoinHandle,
    time::Duration,
};

use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};
use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
};

use super::worker::{Handed, Handle, Place};
use crate::snapshot::Store;

/// Connections that the kernel may hold for us.
const BACKLOG: i32 = 4096;
/// How long to wait when no file descriptor is left.
const PAUSE: Duration = Duration::from_millis(50);

/// Binds a listener that does not block.
pub(super) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart need not wait for the old connections' TIME_WAIT. Never SO_REUSEPORT: a second
    // gateway on the same port must fail, not take half of the requests.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// What the acceptor is told.
pub(super) enum Command {
    /// Listens here from now on.
    Replace(TcpListener),
    /// Empties and closes the listener, says so, and ends.
    Close(oneshot::Sender<()>),
}

/// Starts the thread.
pub(super) fn start(
    listener: TcpListener,
    workers: Vec<Handle>,
    store: Arc<Store>,
) -> io::Result<(mpsc::Sender<Command>, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel(4);
    let thread = std::thread::Builder::new().name("acceptor".to_owned()).spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        let result = runtime.and_then(|runtime| runtime.block_on(accept(listener, &workers, &store, receiver)));
        if let Err(error) = result {
            tracing::error!(%error, "the acceptor ended");
        }
    })?;
    Ok((sender, thread))
}

async fn accept(
    listener: TcpListener,
    workers: &[Handle],
    store: &Store,
    mut commands: mpsc::Receiver<Command>,
) -> io::Result<()> {
    let mut listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        tokio::select! {
            biased;
            command = commands.recv() => match command {
                Some(Command::Replace(new)) => {
                    let old = std::mem::replace(&mut listener, tokio::net::TcpListener::from_std(new)?);
                    empty(&old.into_std()?, workers, store);
                }
                Some(Command::Close(closed)) => {
                    empty(&listener.into_std()?, workers, store);
                    let _ = closed.send(());
                    return Ok(());
                }
                None => return Ok(()),
            },
            accepted = listener.accept() => match accepted.and_then(|(tcp, peer)| Ok((tcp.into_std()?, peer))) {
                Ok((tcp, peer)) => hand(tcp, peer, workers, store),
                Err(error) => survive(&error).await,
            },
        }
    }
}

/// Lets nobody in any more. Between the last look and the close the kernel would still accept, and reset whom it had:
/// a filter that drops every packet leaves them to try again, and find the listener closed.
fn shut(listener: &TcpListener) {
    /// `BPF_RET | BPF_K` with 0: keep nothing of the packet.
    const DROP: SockFilter = SockFilter::new(0x06, 0, 0, 0);
    if let Err(error) = SockRef::from(listener).attach_filter(&[DROP]) {
        tracing::debug!(%error, "cannot filter the listener; a client may be reset");
    }
}

/// Takes all that the kernel has accepted. One that left meanwhile, or a moment without descriptors, ends nothing.
fn empty(listener: &TcpListener, workers: &[Handle], store: &Store) {
    shut(listener);
    let mut patience = 20;
    loop {
        match listener.accept() {
            Ok((tcp, peer)) if tcp.set_nonblocking(true).is_ok() => hand(tcp, peer, workers, store),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if has_left(&error) => {}
            Err(_) if patience > 0 => {
                patience -= 1;
                std::thread::sleep(PAUSE);
            }
            Err(error) => {
                tracing::warn!(%error, "the listener was closed before everybody was accepted");
                return;
            }
        }
    }
}

fn has_left(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

/// A client that left is nothing; no descriptor left is a pause, never an end.
async fn survive(error: &io::Error) {
    if !has_left(error) {
        tracing::warn!(%error, "cannot accept; raise the limit of open files (`ulimit -n`)");
        tokio::time::sleep(PAUSE).await;
    }
}

fn hand(tcp: TcpStream, peer: SocketAddr, workers: &[Handle], store: &Store) {
    let stats = &store.process;
    stats.accepted.fetch_add(1, Relaxed);
    if stats.clients.load(Relaxed) >= store.current().clients.max_connections {
        // Told once a thousand: a flood must not flood the log too.
        if stats.refused_clients.fetch_add(1, Relaxed).is_multiple_of(1000) {
            tracing::warn!("too many connections; one was closed at once (`clients: max_connections`)");
        }
        return;
    }
    let mut order: Vec<&Handle> = workers.iter().collect();
    order.sort_by_key(|worker| worker.connections.load(Relaxed));
    let mut waiting = Some((tcp, peer));
    for worker in order {
        let Some((tcp, peer)) = waiting.take() else { return };
        match worker.sender.try_send(Handed { tcp, peer, place: Place::take(worker, stats) }) {
            Ok(()) => return,
            Err(TrySendError::Full(back) | TrySendError::Closed(back)) => waiting = Some((back.tcp, back.peer)),
        }
    }
    tracing::warn!("every worker has its hands full; a connection was closed");
}
