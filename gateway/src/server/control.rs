//! The process: starts workers and listeners, follows the file and the signals, drains.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context as _;
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

use super::{
    acceptor::{self, Command, bind},
    sentry,
    watch::Watch,
    worker::{self, Phase},
};
use crate::{
    admin::{self, Admin},
    config::Report,
    inventory::keeper::Keeper,
    rollout::{controller::Rollouts, webhook},
    snapshot::{Listeners, Reloaded, Snapshot, Store},
    telemetry::access_log::{self, Redirect, Writer},
};

/// How long the last spans of a process may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// What the command line says.
pub struct Options {
    /// How many workers.
    pub workers: usize,
    /// Whether the end of standard input means the same as SIGTERM.
    pub follow_stdin: bool,
}

/// The running process, for whoever may change it.
pub struct Control {
    /// What runs.
    pub store: Arc<Store>,
    /// Whether the gateway wants traffic.
    pub ready: AtomicBool,
    /// When it started.
    pub started: jiff::Timestamp,
    /// Where clients connect, as bound.
    pub public: std::sync::Mutex<SocketAddr>,
    /// Rollouts and rollbacks.
    pub rollouts: Arc<Rollouts>,
    /// Inventory and progress.
    pub keeper: Arc<Keeper>,
    log: Redirect,
    acceptor: mpsc::Sender<Command>,
    admin: mpsc::Sender<(admin::Kind, Option<TcpListener>)>,
}

impl Control {
    /// Reads the file again, on a thread of its own; all or nothing, a changed listener included.
    pub async fn reload(self: &Arc<Self>, why: &'static str) -> Result<Reloaded, Report> {
        let this = self.clone();
        let result = tokio::task::spawn_blocking(move || this.store.reload(|old, new| this.rebind(old, new))).await;
        let result = match result {
            Ok(result) => result,
            Err(panic) => Err(self.store.fail(format!("reading the file panicked: {panic}"))),
        };
        let file = self.store.path().display();
        match &result {
            Ok(Reloaded::Loaded(generation)) => {
                tracing::info!(%file, generation, why, "reloaded");
                self.rollouts.announce("config.loaded", &json!({"generation": generation, "why": why}));
            }
            Ok(Reloaded::Unchanged) => tracing::debug!(%file, why, "read again; nothing has changed"),
            Err(report) => {
                tracing::error!("the file was refused ({why}); what ran before goes on running\n{report}");
                self.rollouts.announce("config.refused", &json!({"error": report.to_string(), "why": why}));
            }
        }
        result
    }

    /// Binds the listeners that changed before anything else happens; the result makes them take over.
    fn rebind(self: &Arc<Self>, old: &Snapshot, new: &Snapshot) -> Result<impl FnOnce() + use<>, String> {
        let bound = |changed: bool, address: SocketAddr| {
            let listener = changed.then(|| bind(address)).transpose();
            listener.map_err(|error| format!("cannot listen on `{address}`: {error}"))
        };
        let Listeners { public, admin, health } = new.listeners;
        let before = old.listeners;
        let public = bound(public != before.public, public)?;
        let admin_listener = bound(admin != before.admin, admin)?;
        let health_changed = health != before.health;
        let health = health.map(|address| bound(health_changed, address)).transpose()?.flatten();
        let log = &new.access_log.to;
        let sink = (*log != old.access_log.to).then(|| access_log::open(log)).transpose();
        let sink = sink.map_err(|error| format!("`access_log`: {log:?}: {error}"))?;
        let this = self.clone();
        Ok(move || {
            let Self { acceptor, admin, public: known, .. } = &*this;
            if let Some(sink) = sink {
                this.log.to(sink);
            }
            if let Some(listener) = public {
                if let (Ok(address), Ok(mut known)) = (listener.local_addr(), known.lock()) {
                    *known = address;
                }
                let _ = acceptor.blocking_send(Command::Replace(listener));
            }
            if let Some(listener) = admin_listener {
                let _ = admin.blocking_send((admin::Kind::Admin, Some(listener)));
            }
            if health_changed {
                let _ = admin.blocking_send((admin::Kind::Health, health));
            }
        })
    }
}

impl Control {
    /// Opens the file of the access log anew: somebody has moved the old one away. On a thread of its own, since that may hang.
    async fn reopen(self: &Arc<Self>) {
        let this = self.clone();
        let _ = tokio::task::spawn_blocking(move || this.reopen_now()).await;
    }

    fn reopen_now(&self) {
        let to = self.store.current().access_log.to.clone();
        match access_log::open(&to) {
            Ok(sink) => {
                self.log.to(sink);
                tracing::info!(?to, "the access log is opened anew");
            }
            Err(error) => {
                tracing::error!(?to, %error, "the access log cannot be opened anew; lines go where they went");
            }
        }
    }
}

/// Serves until told to stop.
pub async fn run(store: Store, options: Options) -> anyhow::Result<()> {
    let store = Arc::new(store);
    let snapshot = store.current();
    let listen = |address: SocketAddr| bind(address).with_context(|| format!("cannot listen on `{address}`"));
    let public = listen(snapshot.listeners.public)?;
    let admin_listener = listen(snapshot.listeners.admin)?;
    let health = snapshot.listeners.health.map(listen).transpose()?;
    let public_address = public.local_addr()?;
    let admin_address = admin_listener.local_addr()?;
    let health_address = health.as_ref().and_then(|listener| listener.local_addr().ok());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let mut reopen = signal(SignalKind::user_defined1())?;

    raise_open_files();
    let log = &snapshot.access_log.to;
    let sink = access_log::open(log).with_context(|| format!("`access_log`: {log:?}"))?;
    let writer = Writer::start(sink, store.process.clone())?;
    let keeper = Keeper::start(&store)?;
    let (phase, watched) = watch::channel(Phase::Running);
    let mut workers = Vec::new();
    let mut threads = Vec::new();
    for index in 0..options.workers {
        let log = writer.log(store.process.clone());
        let (handle, thread) = worker::start(index, store.clone(), log, keeper.feed(), watched.clone())?;
        workers.push(handle);
        threads.push(thread);
    }
    let (acceptor, accepting) = acceptor::start(public, workers, store.clone())?;
    let (admin, commands) = mpsc::channel(4);
    let (rollouts, messages) = Rollouts::start(store.clone())?;
    tokio::task::spawn_local(webhook::deliver(store.clone(), rollouts.clone(), messages));
    let control = Arc::new(Control {
        store: store.clone(),
        ready: AtomicBool::new(true),
        started: jiff::Timestamp::now(),
        public: std::sync::Mutex::new(public_address),
        rollouts: rollouts.clone(),
        keeper: keeper.clone(),
        log: writer.redirect(),
        acceptor: acceptor.clone(),
        admin,
    });
    tokio::task::spawn_local(sentry::watch(store.clone()));
    tokio::task::spawn_local(Admin::new(control.clone()).serve(admin_listener, health, commands));
    for warning in &store.status().warnings.diagnostics {
        tracing::warn!("{warning}");
    }
    tracing::info!(
        public = %public_address,
        admin = %admin_address,
        health = %health_address.map_or_else(|| "none".to_owned(), |address| address.to_string()),
        workers = options.workers,
        routes = snapshot.routes.len() - 1,
        "listening"
    );
    drop(snapshot);

    let mut stdin = std::pin::pin!(end_of_stdin(options.follow_stdin));
    let mut file = Watch::start(store.path(), store.status().seen.include_patterns);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = &mut stdin, if options.follow_stdin => break,
            _ = reopen.recv() => { tokio::task::spawn_local({ let control = control.clone(); async move { control.reopen().await } }); }
            _ = hangup.recv() => { let _ = control.reload("SIGHUP").await; }
            () = file.changed() => { let _ = control.reload("the file changed").await; }
        }
        file.follow(Some(store.status().seen.include_patterns));
    }
    // Whoever takes this one's place needs the journal.
    rollouts.stop().await;
    let drained = drain(&control, &acceptor, &phase);
    tokio::select! {
        () = drained => {}
        _ = terminate.recv() => tracing::warn!("told to stop a second time; leaving at once"),
        _ = interrupt.recv() => tracing::warn!("told to stop a second time; leaving at once"),
    }
    let _ = phase.send(Phase::Stopping);
    drop(acceptor);
    let _ = accepting;
    for thread in threads {
        let _ = thread.join();
    }
    for tracer in store.tracers() {
        tracer.finish(GOODBYE);
    }
    writer.finish();
    keeper.stop(GOODBYE);
    Ok(())
}

/// Every connection is a file to the system, and its customary limit is for programs that have few.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files (`ulimit -n`)");
    }
}

async fn end_of_stdin(follow: bool) {
    if follow {
        let _ = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())).await;
    }
}

/// Fails readiness, waits, closes the listener, and lets what is in flight finish.
async fn drain(control: &Control, acceptor: &mpsc::Sender<Command>, phase: &watch::Sender<Phase>) {
    let drain = control.store.current().drain;
    control.ready.store(false, Relaxed);
    let process = &control.store.process;
    let open = || process.clients.load(Relaxed);
    tracing::info!(connections = open(), delay = ?drain.delay, limit = ?drain.limit, "draining");
    tokio::time::sleep(drain.delay).await;
    // The listener first: a response that asks its client to close sends it to the listener again.
    let (closed, closing) = oneshot::channel();
    if acceptor.send(Command::Close(closed)).await.is_ok() {
        let _ = closing.await;
    }
    let _ = phase.send(Phase::Draining);
    let until = Instant::now() + drain.limit;
    while open() > 0 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    match open() {
        0 => tracing::info!("drained"),
        left => tracing::warn!(connections = left, "the drain's limit is over; closing what is left"),
    }
}
