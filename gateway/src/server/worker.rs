//! A worker: a thread with its own runtime, which serves the connections that it is given.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{mpsc, watch},
};

use super::connection::begin;
use crate::{
    context::Worker,
    inventory::feed::Feed,
    pipeline::pipeline,
    snapshot::Store,
    telemetry::{access_log::AccessLog, metrics::ProcessStats},
};

/// How often a worker hands over its log and closes what is idle for too long.
const FLUSH: Duration = Duration::from_millis(50);
/// Sweeps come once in so many flushes.
const SWEEP: u32 = 20;
/// Connections on their way to a worker.
const HANDED: usize = 1024;

/// What the process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Serving.
    Running,
    /// Finishing what is in flight.
    Draining,
    /// Leaving.
    Stopping,
}

/// A connection for a worker.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) tcp: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) place: Place,
}

/// The acceptor's end of a worker.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) sender: mpsc::Sender<Handed>,
    /// Connections that it has, those on their way included.
    pub(super) connections: Arc<AtomicUsize>,
}

/// Starts a worker.
pub(super) fn start(
    index: usize,
    store: Arc<Store>,
    log: AccessLog,
    feed: Feed,
    phase: watch::Receiver<Phase>,
) -> io::Result<(Handle, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel(HANDED);
    let handle = Handle { sender, connections: Arc::default() };
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        match runtime {
            Ok(runtime) => {
                runtime.block_on(work(index, store, log, feed, phase, receiver));
                // A name lookup that hangs must not hold up the exit.
                runtime.shutdown_background();
            }
            Err(error) => tracing::error!(%error, "a worker could not start"),
        }
    })?;
    Ok((handle, thread))
}

async fn work(
    index: usize,
    store: Arc<Store>,
    log: AccessLog,
    feed: Feed,
    mut phase: watch::Receiver<Phase>,
    mut receiver: mpsc::Receiver<Handed>,
) {
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), index);
    let worker = Worker::new(index, store, log, feed, seed);
    tokio::task::spawn_local(housekeeping(worker.clone()));
    let stack = pipeline();
    let mut stopping = phase.clone();
    loop {
        tokio::select! {
            biased;
            handed = receiver.recv() => {
                let Some(Handed { tcp, peer, place }) = handed else { break };
                if let Ok(tcp) = tokio::net::TcpStream::from_std(tcp) {
                    begin(&worker, tcp, peer, place, &stack);
                }
            }
            _ = phase.wait_for(|phase| *phase != Phase::Running), if !worker.draining.get() => drain(&worker),
            // Also where nobody has told the acceptor to close.
            _ = stopping.wait_for(|phase| *phase == Phase::Stopping) => break,
        }
    }
    // The acceptor is gone: what is here goes on until the process says stop.
    let _ = phase.wait_for(|phase| *phase != Phase::Running).await;
    drain(&worker);
    let _ = stopping.wait_for(|phase| *phase == Phase::Stopping).await;
    worker.log.flush();
    worker.feed.flush();
}

/// From now on each response is its connection's last; whoever waits looks up.
fn drain(worker: &Worker) {
    worker.draining.set(true);
    worker.timer.wake_all();
}

/// A connection's place at its worker, from the moment it is accepted: a drain must not miss one on its way.
#[derive(Debug)]
pub(super) struct Place {
    worker: Arc<AtomicUsize>,
    process: Arc<ProcessStats>,
}

impl Place {
    pub(super) fn take(worker: &Handle, process: &Arc<ProcessStats>) -> Self {
        worker.connections.fetch_add(1, Relaxed);
        process.clients.fetch_add(1, Relaxed);
        Self { worker: worker.connections.clone(), process: process.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.worker.fetch_sub(1, Relaxed);
        self.process.clients.fetch_sub(1, Relaxed);
    }
}

/// Hands over the log, closes old connections, and lets go of snapshots that nobody uses.
async fn housekeeping(worker: Rc<Worker>) {
    let mut round = 0_u32;
    loop {
        tokio::time::sleep(FLUSH).await;
        worker.log.flush();
        worker.feed.flush();
        round = round.wrapping_add(1);
        if round.is_multiple_of(SWEEP) {
            for pool in &worker.local().pools {
                pool.sweep();
            }
        }
    }
}
