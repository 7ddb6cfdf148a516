//! The thread that keeps the inventory and the progress: takes in what workers noted, looks at the counters, writes both down.
//!
//! One thread owns all of it, so nothing here is locked but the lock of the folder. What it looks at for people may be lost
//! with the process, a minute of it at most.

use std::{
    collections::HashMap,
    fs::File,
    io::Write as _,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{
    Document, Inventory,
    counts::{Seconds, seconds},
    feed::{Block, Feed},
    progress::{EVERY, Heard, Point, Progress, Tally, What},
    recent::{Both, Recent},
    tree::steps,
};
use crate::{
    config::{Stage, UNROUTED},
    snapshot::{
        Route, Snapshot, Store,
        traffic::{self, Locator},
    },
    telemetry::metrics::{Arm, InventoryNow, RouteStats},
};

/// Blocks and calls that wait, at most.
const WAITING: usize = 256;
/// How often rates are made anew.
const LOOK: Duration = Duration::from_secs(1);
/// How often both are written down, in seconds.
const WRITE: u32 = 60;
/// Endpoints that are sorted by where they stand at each look; more are once a minute.
const FEW: usize = 2_048;
/// How many generations of names are known: a block may be older than the file.
const GENERATIONS: usize = 4;
/// The files in the folder of `state:`.
const INVENTORY: &str = "inventory.json";
const PROGRESS: &str = "progress.json";
const LOCK: &str = "inventory.lock";

/// What the thread is sent.
pub enum Message {
    /// What a worker noted.
    Block(Block),
    /// Asks for the inventory.
    Document(oneshot::Sender<Document>),
    /// Asks for the progress, with the points after a moment.
    Progress(Seconds, oneshot::Sender<Value>),
    /// Adds what is known elsewhere.
    Import(Box<Document>, oneshot::Sender<Result<usize, String>>),
    /// Writes all down, and ends.
    Stop,
}

/// What routes did of late, by name.
pub type Lately = HashMap<Arc<str>, Both>;

/// The thread, for whoever feeds or asks it.
pub struct Keeper {
    sender: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
    lately: ArcSwap<Lately>,
    numbers: ArcSwap<InventoryNow>,
    trouble: Mutex<Option<String>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Keeper {
    /// Starts the thread.
    pub fn start(store: &Arc<Store>) -> std::io::Result<Arc<Self>> {
        let (sender, receiver) = sync_channel(WAITING);
        let this = Arc::new(Self {
            sender,
            dropped: Arc::default(),
            lately: ArcSwap::default(),
            numbers: ArcSwap::default(),
            trouble: Mutex::default(),
            thread: Mutex::default(),
        });
        let books = Books::open(this.clone(), store.clone());
        let thread = std::thread::Builder::new().name("inventory".to_owned()).spawn(move || books.run(&receiver))?;
        *this.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(this)
    }

    /// A worker's end.
    pub fn feed(&self) -> Feed {
        Feed::new(self.sender.clone(), self.dropped.clone())
    }

    /// The inventory as it is.
    pub async fn document(&self) -> Result<Document, String> {
        let (reply, answer) = oneshot::channel();
        self.ask(Message::Document(reply), answer).await
    }

    /// The progress as it is, with the points after a moment.
    pub async fn progress(&self, after: Seconds) -> Result<Value, String> {
        let (reply, answer) = oneshot::channel();
        self.ask(Message::Progress(after, reply), answer).await
    }

    /// Adds what is known elsewhere; how many endpoints that were.
    pub async fn import(&self, document: Document) -> Result<usize, String> {
        let (reply, answer) = oneshot::channel();
        self.ask(Message::Import(Box::new(document), reply), answer).await?
    }

    async fn ask<T>(&self, message: Message, answer: oneshot::Receiver<T>) -> Result<T, String> {
        self.sender.try_send(message).map_err(|_| "the inventory is busy; try again".to_owned())?;
        answer.await.map_err(|_| "the gateway is stopping".to_owned())
    }

    /// What routes did of late.
    pub fn lately(&self) -> Arc<Lately> {
        self.lately.load_full()
    }

    /// What the inventory knows, in numbers.
    pub fn numbers(&self) -> InventoryNow {
        **self.numbers.load()
    }

    /// Why nothing can be written down, if so.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes all down and ends, or is left alone after a while: a disk that hangs must not hold up the exit. What workers
    /// noted must have been sent off.
    pub fn stop(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut message = Message::Stop;
        while let Err(TrySendError::Full(back)) = self.sender.try_send(message) {
            if Instant::now() >= until {
                return;
            }
            message = back;
            std::thread::sleep(Duration::from_millis(1));
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        while thread.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn tell(&self, why: Option<String>) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(why) = &why
            && trouble.as_ref() != Some(why)
        {
            tracing::warn!(why, "inventory and progress cannot be written down");
        }
        *trouble = why;
    }
}

/// What is known of a route's counters.
struct Watched {
    stats: Arc<RouteStats>,
    legacy: u64,
    service: u64,
    /// What the service answered, but for failures.
    served: u64,
    legacy_writes: u64,
    service_writes: u64,
    /// What its predicates refused, and what another answered in the service's place.
    detours: u64,
}

struct Books {
    shared: Arc<Keeper>,
    store: Arc<Store>,
    inventory: Inventory,
    progress: Progress,
    recent: HashMap<Arc<str>, Recent>,
    watched: HashMap<Arc<str>, Watched>,
    /// Counters of routes that the file does not have any more, as long as the monolith still answers a request of theirs.
    orphans: Vec<Arc<RouteStats>>,
    /// The numbers of the names of routes, by generation.
    names: Vec<(u64, Vec<u32>)>,
    /// The generation whose patterns are known.
    pinned: u64,
    /// Endpoints by tag, as of a moment.
    endpoints: Vec<(String, (u64, u64))>,
    counted: (u64, Seconds),
    lock: Option<File>,
    begun: Instant,
    /// When it was last looked at, in seconds since it began.
    looked: Option<f64>,
    written: Seconds,
}

fn now() -> Seconds {
    seconds(Timestamp::now())
}

impl Books {
    fn open(shared: Arc<Keeper>, store: Arc<Store>) -> Self {
        let at = now();
        let mut this = Self {
            shared,
            store,
            inventory: Inventory::new(at),
            progress: Progress::default(),
            recent: HashMap::new(),
            watched: HashMap::new(),
            orphans: Vec::new(),
            names: Vec::new(),
            pinned: 0,
            endpoints: Vec::new(),
            counted: (0, 0),
            lock: None,
            begun: Instant::now(),
            looked: None,
            written: at,
        };
        // What patterns say is known before what was learned is taken up.
        this.follow();
        this.take_up();
        this
    }

    /// Takes up what was kept, once no other process writes it; what was seen until then is added to that.
    fn take_up(&mut self) {
        let folder = self.store.state.clone();
        if self.lock.is_some() {
            return;
        }
        let taken = self.lock(&folder).and_then(|()| {
            let paths = self.store.current().paths;
            if let Some(document) = load(&folder.join(INVENTORY), Document::is_known)? {
                self.inventory.merge(&document, paths.case_insensitive, now())?;
                self.counted = (0, 0);
            }
            let kept = load::<Progress>(&folder.join(PROGRESS), Progress::is_known)?;
            self.progress = kept.unwrap_or_default().resume(std::mem::take(&mut self.progress));
            // Whoever is killed from now on has not closed the books.
            self.progress.close(false);
            save(&folder.join(PROGRESS), &self.progress)
        });
        if taken.is_err() {
            // What cannot be marked as open could be believed after a crash.
            self.lock = None;
        }
        self.shared.tell(taken.err());
    }

    fn run(mut self, messages: &Receiver<Message>) {
        let mut next = Instant::now();
        loop {
            match messages.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Message::Stop) => {
                    self.survive(|this| {
                        let snapshot = this.follow();
                        this.mark(&snapshot);
                    });
                    self.write(true);
                    return;
                }
                Ok(message) => self.survive(|this| this.obey(message)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= next {
                self.survive(Self::look);
                next = Instant::now() + LOOK;
            }
        }
    }

    /// A bug in one look must not be the end of all.
    fn survive(&mut self, what: impl FnOnce(&mut Self)) {
        if std::panic::catch_unwind(AssertUnwindSafe(|| what(self))).is_err() {
            tracing::error!("a look at the inventory panicked; the next goes on");
        }
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::Block(block) => self.count(&block),
            Message::Document(reply) => {
                let _ = reply.send(self.document());
            }
            Message::Progress(after, reply) => {
                let _ = reply.send(self.describe(after));
            }
            Message::Import(document, reply) => {
                let case_insensitive = self.store.current().paths.case_insensitive;
                let _ = reply.send(self.inventory.merge(&document, case_insensitive, now()));
                self.counted = (0, 0);
            }
            Message::Stop => {}
        }
    }

    fn count(&mut self, block: &Block) {
        let snapshot = &block.snapshot;
        if !self.names.iter().any(|(generation, _)| *generation == snapshot.generation) {
            let names = snapshot.routes.iter().map(|route| &*route.name);
            let numbers = names.map(|name| self.inventory.number(if name == UNROUTED { "" } else { name })).collect();
            self.names.push((snapshot.generation, numbers));
            if self.names.len() > GENERATIONS {
                self.names.remove(0);
            }
        }
        let Some((_, names)) = self.names.iter().find(|(generation, _)| *generation == snapshot.generation) else {
            return;
        };
        for (route, path, mut request) in block.requests() {
            request.route = names.get(route).copied().unwrap_or_default();
            self.inventory.take(&String::from_utf8_lossy(path), request);
        }
    }

    /// Takes up the patterns of another file.
    fn follow(&mut self) -> Arc<Snapshot> {
        let snapshot = self.store.current();
        if self.pinned != snapshot.generation {
            self.pinned = snapshot.generation;
            for route in &snapshot.routes {
                self.inventory.pin(&steps(&route.path, snapshot.paths.case_insensitive));
            }
            let known = |name: &str| snapshot.routes.iter().any(|route| &*route.name == name);
            self.progress.keep_only(&known);
            self.recent.retain(|name, _| known(name));
            let gone = self.watched.extract_if(|name, _| !known(name)).map(|(_, watched)| watched.stats);
            self.orphans.extend(gone);
        }
        snapshot
    }

    /// Looks at the counters.
    fn look(&mut self) {
        let snapshot = self.follow();
        let at = now();
        let seconds = self.begun.elapsed().as_secs_f64();
        let due = self.looked.is_none_or(|looked| seconds >= looked + f64::from(EVERY));
        let mut lately = Lately::with_capacity(snapshot.routes.len());
        for route in &snapshot.routes {
            if !self.recent.get(&route.name).is_some_and(|recent| recent.is_of(&route.stats)) {
                self.recent.insert(route.name.clone(), Recent::new(route.stats.clone(), seconds));
            }
            let Some(recent) = self.recent.get_mut(&route.name) else { continue };
            if due {
                recent.look(seconds);
            }
            lately.insert(route.name.clone(), recent.now(seconds));
        }
        self.shared.lately.store(Arc::new(lately));
        self.inventory.drop_some(self.shared.dropped.swap(0, Relaxed));
        if !due {
            return;
        }
        self.take_up();
        self.mark(&snapshot);
        if at >= self.written.saturating_add(WRITE) || at < self.written {
            self.written = at;
            self.write(false);
        }
    }

    /// Adds a point to the series.
    fn mark(&mut self, snapshot: &Snapshot) {
        let (at, seconds) = (now(), self.begun.elapsed().as_secs_f64());
        // By the clock that does not jump; what was not looked at was not watched.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "ten seconds at most")]
        let elapsed =
            self.looked.map_or(0, |looked| (seconds - looked).round().clamp(0.0, f64::from(2 * EVERY)) as u32);
        self.looked = Some(seconds);
        self.orphans.retain(|stats| Arc::strong_count(stats) > 1 && stats.totals(Arm::Legacy).in_flight > 0);
        let haunted = !self.orphans.is_empty();
        let mut point = Point { at, ..Point::default() };
        for (index, route) in snapshot.routes.iter().enumerate() {
            let (tally, mut heard) = self.since(route);
            heard.answered |= haunted;
            (heard.about, heard.elapsed) = (traffic::about(snapshot, index), elapsed);
            self.progress.hear(&route.name, heard, at);
            for tag in route.tags.iter().map(|tag| &**tag).chain([""]) {
                point.add(tag, tally);
            }
        }
        let often = self.inventory.len() <= FEW;
        if self.counted.0 != snapshot.generation || often || at >= self.counted.1.saturating_add(WRITE) {
            self.counted = (snapshot.generation, at);
            let locator = Locator::new(snapshot);
            let mut by_tag: HashMap<String, (u64, u64)> = HashMap::new();
            for (_, _, of) in self.inventory.endpoints(&|method, steps, counted| locator.locate(method, steps, counted))
            {
                if of.row.requests() == 0 {
                    continue;
                }
                for tag in of.place.tags.into_iter().chain([String::new()]) {
                    let known = by_tag.entry(tag).or_default();
                    known.0 += u64::from(of.place.standing.is_moved());
                    known.1 += 1;
                }
            }
            self.endpoints = by_tag.into_iter().collect();
            self.endpoints.sort();
        }
        let (moved, endpoints) = self.endpoints.first().filter(|(tag, _)| tag.is_empty()).map_or((0, 0), |of| of.1);
        let numbers = InventoryNow { moved, endpoints, dropped: self.inventory.dropped() };
        self.shared.numbers.store(Arc::new(numbers));
        for (tag, endpoints) in &self.endpoints {
            point.add(tag, Tally { endpoints: *endpoints, ..Tally::default() });
        }
        self.progress.push(point);
    }

    /// What happened on a route since the last look: the tally, and whether the monolith had a part in it.
    fn since(&mut self, route: &Route) -> (Tally, Heard) {
        let [legacy, service] = [Arm::Legacy, Arm::Service].map(|arm| route.stats.totals(arm));
        let rare = &route.stats.rare;
        let fallbacks: u64 = rare.fallbacks.iter().map(|count| count.load(Relaxed)).sum();
        let new = Watched {
            stats: route.stats.clone(),
            legacy: legacy.requests(),
            service: service.requests(),
            served: service.classes[1..=3].iter().sum(),
            legacy_writes: legacy.writes,
            service_writes: service.writes,
            detours: rare.fell.load(Relaxed) + fallbacks,
        };
        let old = self.watched.get(&route.name);
        // Counters that are others than before: a route that went and came again.
        let same = old.is_none_or(|old| Arc::ptr_eq(&old.stats, &new.stats));
        if let Some(old) = old.filter(|_| !same) {
            self.orphans.push(old.stats.clone());
        }
        let old = old.filter(|_| same);
        // The first look counts from the beginning of the counters.
        let grown = |get: fn(&Watched) -> u64| get(&new).saturating_sub(old.map_or(0, get));
        let (off, on) = (grown(|w| w.service), grown(|w| w.legacy));
        let (off_writes, on_writes) = (grown(|w| w.service_writes), grown(|w| w.legacy_writes));
        let heard = Heard {
            answered: !same || !route.runs().is_alone() || on > 0 || legacy.in_flight > 0 || grown(|w| w.detours) > 0,
            served: grown(|w| w.served),
            ..Heard::default()
        };
        let tally =
            Tally { endpoints: (0, 0), requests: (off, off + on), writes: (off_writes, off_writes + on_writes) };
        self.watched.insert(route.name.clone(), new);
        (tally, heard)
    }

    fn document(&self) -> Document {
        let snapshot = self.store.current();
        let locator = Locator::new(&snapshot);
        self.inventory.document(now(), &|method, steps, counted| locator.locate(method, steps, counted))
    }

    fn describe(&self, after: Seconds) -> Value {
        let snapshot = self.store.current();
        let at = now();
        let shares = |of: &std::collections::BTreeMap<String, Tally>| -> Value {
            of.iter().map(|(tag, tally)| (tag.clone(), share(tally))).collect::<serde_json::Map<_, _>>().into()
        };
        let points: Vec<Value> = self
            .progress
            .points()
            .into_iter()
            .filter(|point| point.at > after)
            .map(|point| json!({"at": point.at, "of": point.of}))
            .collect();
        let silence: Vec<Value> = snapshot
            .routes
            .iter()
            .filter(|route| matches!(route.stage, Stage::Migrated | Stage::Retired))
            .filter_map(|route| self.silence(route, &snapshot))
            .collect();
        json!({
            "now": self.progress.newest().map(|point| shares(&point.of)),
            "forecasts": self.progress.forecasts(at),
            "silence": silence,
            "points": points,
        })
    }

    /// What is known of the monolith's silence on a route.
    fn silence(&self, route: &Route, snapshot: &Snapshot) -> Option<Value> {
        let silence = self.progress.silence(&route.name)?;
        let (hours, needed) = (f64::from(silence.watched) / 3600.0, snapshot.retire_after);
        let needed = needed.as_secs_f64() / 3600.0;
        let ripe =
            route.stage == Stage::Migrated && !route.overlay.hold.is_held() && hours >= needed && silence.served > 0;
        let told = match (ripe, silence.served) {
            (true, served) => format!(
                "the monolith had no part in it for {}, and the service answered {served} requests: `stage: retired` would change nothing for them",
                told_hours(hours)
            ),
            (false, 0) if hours >= needed => {
                format!("nobody has asked for {}: that says nothing of who would answer", told_hours(hours))
            }
            (false, _) => format!("the monolith had no part in it for {} of {}", told_hours(hours), told_hours(needed)),
        };
        Some(json!({
            "route": *route.name,
            "stage": route.stage.word(),
            "since": Timestamp::from_second(i64::from(silence.since)).ok().map(|since| since.to_string()),
            "last_legacy_answer_seen": silence.heard,
            "hours": (hours * 100.0).round() / 100.0,
            "needed_hours": needed,
            "served": silence.served,
            "propose": ripe.then_some("retired"),
            "told": told,
        }))
    }

    /// Writes both down, unless another process does.
    fn write(&mut self, closed: bool) {
        // Who has not taken up what was kept must not write over it.
        if self.lock.is_none() {
            return;
        }
        let folder = self.store.state.clone();
        self.progress.close(closed);
        let inventory = self.store.current().inventory;
        let written = if inventory { save(&folder.join(INVENTORY), &self.document()) } else { Ok(()) };
        self.shared.tell(written.and_then(|()| save(&folder.join(PROGRESS), &self.progress)).err());
    }

    fn lock(&mut self, folder: &Path) -> Result<(), String> {
        if self.lock.is_some() {
            return Ok(());
        }
        let path = folder.join(LOCK);
        let told = |error: &dyn std::fmt::Display| format!("`{}`: {error}", path.display());
        std::fs::create_dir_all(folder).map_err(|error| told(&error))?;
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(|error| told(&error))?;
        file.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => {
                told(&"another running gateway has it; give each a `state:` of its own")
            }
            std::fs::TryLockError::Error(error) => told(&error),
        })?;
        self.lock = Some(file);
        Ok(())
    }
}

fn told_hours(hours: f64) -> String {
    match hours {
        48.0.. => format!("{:.1} days", hours / 24.0),
        2.0.. => format!("{hours:.1} hours"),
        _ => format!("{:.1} minutes", hours * 60.0),
    }
}

/// A tally with its shares, in percent.
fn share(tally: &Tally) -> Value {
    let of = |what: What, (off, all): (u64, u64)| {
        let percent = what.share(tally).map(|share| (share * 1e4).round() / 100.0);
        json!({"off": off, "all": all, "percent": percent})
    };
    json!({
        "endpoints": of(What::Endpoints, tally.endpoints),
        "requests": of(What::Requests, tally.requests),
        "writes": of(What::Writes, tally.writes),
    })
}

/// What was kept, if it is there. What makes no sense, or is of a later version, is put aside; what cannot be read now may be read later.
fn load<T: DeserializeOwned>(path: &Path, is_known: impl Fn(&T) -> bool) -> Result<Option<T>, String> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("`{}`: {error}", path.display())),
    };
    let why = match serde_json::from_slice(&text) {
        Ok(read) if is_known(&read) => return Ok(Some(read)),
        Ok(_) => "it is of a later version of the gateway".to_owned(),
        Err(error) => error.to_string(),
    };
    let aside = path.with_extension(format!("broken-{}", Timestamp::now().as_second()));
    let moved = std::fs::rename(path, &aside).map_or_else(|e| e.to_string(), |()| aside.display().to_string());
    tracing::error!(file = %path.display(), why, %moved, "what was kept cannot be taken up; it begins anew");
    Ok(None)
}

/// Writes a file that takes the place of the old one when it is whole.
fn save(path: &Path, what: &impl Serialize) -> Result<(), String> {
    let new: PathBuf = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(what)?)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        // The name, too, must be there after a power cut.
        path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    write().map_err(|error| format!("`{}`: {error}", path.display()))
}
