//! The second tier: a Redis that all gateways share.
//!
//! It lives on a thread of its own, so that whatever Redis does, requests only ever wait for their small
//! budget. Answers lie there under the hash of their key. Invalidations and purges go through one stream, the log, which each gateway
//! reads from where it was: what it missed while Redis was away it reads when that is back, and what it had to say itself
//! meanwhile it says then. An answer carries the position in the log at which it was asked for; one that an entry after that position
//! means, or that is older than the log, is not used.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst},
    },
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, Client, Cmd, RedisError, Value,
    aio::MultiplexedConnection,
    streams::{StreamId, StreamRangeReply, StreamReadReply},
};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Builder,
    sync::{Notify, mpsc, oneshot},
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Cache,
    lying::{Found, decode, encode, encode_names, name},
    marks::{Marks, Purge, UNKNOWN},
    stored::Stored,
};

/// The log.
const LOG: &str = "gateway:log";
/// Entries that the log keeps, about.
const LOG_LENGTH: usize = 50_000;
/// What this gateway has yet to say.
const BACKLOG: usize = 20_000;
/// Calls that wait for the thread.
const CALLS: usize = 1_024;
/// The largest answer, as it lies there.
const LARGEST: usize = 1024 * 1024;
/// How long Redis is left alone after it did not answer in time, in milliseconds.
const PAUSE: u64 = 1_000;
/// How long a connection may take, and an answer that nobody waits for.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long the log is waited for at a time.
const BLOCK: Duration = Duration::from_millis(500);

/// The gateway's end of it.
pub struct Shared {
    calls: mpsc::Sender<Call>,
    state: Arc<State>,
    budget: Duration,
    begin: Instant,
}

/// What is known of it on both sides.
struct State {
    marks: Arc<Marks>,
    /// Who we are in the log.
    id: String,
    up: AtomicBool,
    position: AtomicU64,
    /// Until when it is left alone, in milliseconds since the beginning.
    paused: AtomicU64,
    /// What we have yet to say.
    backlog: Mutex<Backlog>,
    waiting: Notify,
    /// Whose second tier it is.
    cache: Weak<Cache>,
    /// Bytes that are on their way there.
    laying: AtomicU64,
    /// Calls that came back too late, or not at all.
    failed: AtomicU64,
}

#[derive(Default)]
struct Backlog {
    queue: VecDeque<Saying>,
    /// What is being said; once more, where the connection breaks meanwhile: twice is as good as once.
    said: Vec<Saying>,
}

/// Something to say in the log.
struct Saying {
    note: Note,
    /// Ours, on the local clock.
    moment: u64,
    told: Option<oneshot::Sender<()>>,
}

/// An entry of the log.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
enum Note {
    /// A write to a URL of this slot.
    Mark(u32),
    /// A purge.
    Purge(Purge),
    /// The log begins.
    Begin,
}

enum Call {
    Get { key: String, told: oneshot::Sender<Option<Vec<u8>>> },
    Put { key: String, value: Vec<u8>, life: Duration, laying: Laying },
}

/// Memory of an answer on its way there.
struct Laying(Arc<State>, u64);

/// Bytes on their way there, at most.
const LAYING: u64 = 32 * 1024 * 1024;

impl Laying {
    fn begin(state: &Arc<State>, bytes: u64) -> Option<Self> {
        let before = state.laying.fetch_add(bytes, Relaxed);
        let this = Self(state.clone(), bytes);
        (before + bytes <= LAYING).then_some(this)
    }
}

impl Drop for Laying {
    fn drop(&mut self) {
        self.0.laying.fetch_sub(self.1, Relaxed);
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    /// Starts the thread. It ends when this is dropped.
    pub fn start(url: &str, budget: Duration, marks: Arc<Marks>, cache: Weak<Cache>) -> Self {
        let (calls, receiver) = mpsc::channel(CALLS);
        let random = |n: u32| std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), n);
        let state = Arc::new(State {
            marks,
            id: format!("{:016x}{:016x}", random(1), random(2)),
            up: AtomicBool::new(false),
            position: AtomicU64::new(0),
            paused: AtomicU64::new(0),
            backlog: Mutex::default(),
            waiting: Notify::new(),
            cache,
            laying: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let (client, task_state) = (Client::open(url), state.clone());
        let started = std::thread::Builder::new().name("cache-redis".to_owned()).spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build();
            match (runtime, client) {
                (Ok(runtime), Ok(client)) => {
                    runtime.block_on(serve(&client, &task_state, receiver));
                    runtime.shutdown_background();
                }
                (Err(error), _) => tracing::error!(%error, "the thread for Redis could not start"),
                (_, Err(error)) => tracing::error!(%error, "the URL of Redis cannot be used"),
            }
        });
        if let Err(error) = started {
            tracing::error!(%error, "the thread for Redis could not start");
        }
        Self { calls, state, budget, begin: Instant::now() }
    }

    /// Where this gateway is in the log.
    pub fn position(&self) -> u64 {
        self.state.position.load(SeqCst)
    }

    /// Whether it answers.
    pub fn is_up(&self) -> bool {
        self.state.up.load(Relaxed)
    }

    /// Whether it answers in time.
    fn is_free(&self) -> bool {
        self.is_up() && self.since() >= self.state.paused.load(Relaxed)
    }

    /// Calls that failed.
    pub fn failed(&self) -> u64 {
        self.state.failed.load(Relaxed)
    }

    fn since(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// What lies under a key, if it may be used. `tag` tells answers to different requests apart; the budget runs from when it
    /// was first `asked`.
    pub async fn get(&self, key: &[u8], tag: &[u8], asked: Instant) -> Option<Found> {
        if !self.is_free() {
            return None;
        }
        let (told, telling) = oneshot::channel();
        self.calls.try_send(Call::Get { key: name(key, tag), told }).ok()?;
        let Ok(answered) = timeout_at(asked + self.budget, telling).await else {
            self.state.failed.fetch_add(1, Relaxed);
            self.state.paused.store(self.since() + PAUSE, Relaxed);
            return None;
        };
        let (found, born) = decode(&answered.ok()??, key)?;
        let tags = match &found {
            Found::Answer(stored) => &stored.tags[..],
            Found::By(_) => &[],
        };
        self.state.marks.admits_shared(key, tags, born).then_some(found)
    }

    /// Lays an answer there, if it is not too large; nobody waits for it. `tag` is what its request said in the fields that it depends on.
    pub fn put(&self, key: &[u8], tag: &[u8], stored: &Stored, now: u64) {
        let life = stored.useful(now);
        if !self.is_free() || stored.born.shared == 0 || life == 0 || stored.size() > LARGEST {
            return;
        }
        let life = Duration::from_secs(life);
        let send = |value: Option<Vec<u8>>, tag: &[u8]| {
            let Some(value) = value else { return };
            // Where nobody has the time for it, it is not laid there.
            if let Some(laying) = Laying::begin(&self.state, value.len() as u64) {
                let _ = self.calls.try_send(Call::Put { key: name(key, tag), value, life, laying });
            }
        };
        if !stored.selection.is_empty() {
            send(encode_names(key, stored), b"");
        }
        send(encode(key, stored), tag);
    }

    /// Tells the others of a write.
    pub fn tell_mark(&self, slot: u32, moment: u64) {
        self.say(Saying { note: Note::Mark(slot), moment, told: None });
    }

    /// Tells the others of a purge; whether it is in the log.
    pub async fn tell_purge(&self, purge: Purge, moment: u64) -> bool {
        let (told, telling) = oneshot::channel();
        self.say(Saying { note: Note::Purge(purge), moment, told: Some(told) });
        matches!(timeout(PATIENCE, telling).await, Ok(Ok(())))
    }

    fn say(&self, saying: Saying) {
        let mut backlog = self.state.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        if backlog.queue.len() >= BACKLOG {
            // Too much to remember each: all is said at once.
            backlog.queue.clear();
            let moment = self.state.marks.purge(Purge::All, UNKNOWN);
            backlog.queue.push_back(Saying { note: Note::Purge(Purge::All), moment, told: None });
        }
        backlog.queue.push_back(saying);
        drop(backlog);
        self.state.waiting.notify_one();
    }
}

/// Serves calls and follows the log for ever.
async fn serve(client: &Client, state: &Arc<State>, mut calls: mpsc::Receiver<Call>) {
    let mut pause = Duration::from_millis(50);
    let mut said = false;
    loop {
        match session(client, state, &mut calls).await {
            Ended::Dropped => return,
            Ended::Broken(error, worked) => {
                state.up.store(false, Relaxed);
                if worked {
                    pause = Duration::from_millis(50);
                }
                if worked || !said {
                    tracing::warn!(%error, "Redis is not there; what is kept here goes on being used");
                    said = true;
                }
                // Nobody waits for what cannot be had.
                let until = Instant::now() + pause;
                loop {
                    tokio::select! {
                        () = tokio::time::sleep_until(until) => break,
                        call = calls.recv() => if call.is_none() { return },
                    }
                }
                pause = (pause * 2).min(Duration::from_secs(1));
            }
        }
    }
}

enum Ended {
    Dropped,
    Broken(RedisError, bool),
}

/// One connection, until it breaks.
async fn session(client: &Client, state: &Arc<State>, calls: &mut mpsc::Receiver<Call>) -> Ended {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(PATIENCE))
        .set_response_timeout(Some(BLOCK + PATIENCE));
    let connect = || client.get_multiplexed_async_connection_with_config(&config);
    let (commands, mut log) = match (connect().await, connect().await) {
        (Ok(commands), Ok(log)) => (commands, log),
        (Err(error), _) | (_, Err(error)) => return Ended::Broken(error, false),
    };
    if let Err(error) = catch_up(state, &mut log).await {
        return Ended::Broken(error, false);
    }
    state.up.store(true, Relaxed);
    tracing::info!("Redis is there");
    let following = follow(state, &mut log);
    let saying = say(state, commands.clone());
    let mut following = std::pin::pin!(following);
    let mut saying = std::pin::pin!(saying);
    loop {
        tokio::select! {
            error = &mut following => return Ended::Broken(error, true),
            error = &mut saying => return Ended::Broken(error, true),
            call = calls.recv() => {
                let Some(call) = call else { return Ended::Dropped };
                tokio::spawn(answer(commands.clone(), call, state.clone()));
            }
        }
    }
}

async fn answer(mut commands: MultiplexedConnection, call: Call, state: Arc<State>) {
    let failed = match call {
        Call::Get { key, told } => {
            let got: Result<Option<Vec<u8>>, _> = Cmd::new().arg("GET").arg(&key).query_async(&mut commands).await;
            let failed = got.is_err();
            let _ = told.send(got.unwrap_or_default());
            failed
        }
        Call::Put { key, value, life, laying } => {
            let millis = u64::try_from(life.as_millis()).unwrap_or(u64::MAX);
            let put = Cmd::new().arg("SET").arg(&key).arg(value).arg("PX").arg(millis).query_async(&mut commands).await;
            let put: Result<Value, _> = put;
            drop(laying);
            put.is_err()
        }
    };
    if failed {
        state.failed.fetch_add(1, Relaxed);
    }
}

/// A position as one number: milliseconds, and the number within.
fn position(id: &str) -> Option<u64> {
    let (millis, number) = id.split_once('-')?;
    let (millis, number): (u64, u64) = (millis.parse().ok()?, number.parse().ok()?);
    Some((millis << 20) | number.min((1 << 20) - 1))
}

fn id(position: u64) -> String {
    format!("{}-{}", position >> 20, position & ((1 << 20) - 1))
}

/// One end of the log: where it is, and what stands there.
async fn end(log: &mut MultiplexedConnection, command: &str) -> Result<Option<(u64, Option<Note>)>, RedisError> {
    let bounds = if command == "XRANGE" { ["-", "+"] } else { ["+", "-"] };
    let mut asked = Cmd::new();
    asked.arg(command).arg(LOG).arg(&bounds).arg("COUNT").arg(1);
    let entries: StreamRangeReply = asked.query_async(log).await?;
    let entry = entries.ids.into_iter().next();
    Ok(entry.and_then(|entry| {
        let note = entry.get::<String>("note").and_then(|text| serde_json::from_str(&text).ok());
        Some((position(&entry.id)?, note))
    }))
}

/// Reads what was said while we were away, and sees to it that there is a log at all.
async fn catch_up(state: &State, log: &mut MultiplexedConnection) -> Result<(), RedisError> {
    if end(log, "XRANGE").await?.is_none() {
        let _: Value = add(state, &Note::Begin, 0).query_async(log).await?;
    }
    let (Some((oldest, first)), Some((newest, _))) = (end(log, "XRANGE").await?, end(log, "XREVRANGE").await?) else {
        return Ok(());
    };
    let before = state.position.load(SeqCst);
    // A log of another time, whose clock is behind.
    let backward = newest < before;
    if backward {
        state.position.store(0, SeqCst);
    }
    if backward || before < oldest {
        // What is older than the log cannot be known to be good.
        state.marks.set_floor(oldest);
    }
    // Where it begins with its beginning nothing was cut off: what Redis lost, it lost with all that lay there.
    if backward || (before < oldest && first != Some(Note::Begin)) {
        state.forget_all(oldest);
    }
    while read(state, log, None).await? > 0 {}
    Ok(())
}

impl State {
    /// Something was missed: nothing that is kept here can be known to be good.
    fn forget_all(&self, at: u64) {
        self.marks.purge(Purge::All, at);
        if let Some(cache) = self.cache.upgrade() {
            cache.purge_here(&[Purge::All]);
        }
    }
}

fn add(state: &State, note: &Note, moment: u64) -> Cmd {
    let mut command = Cmd::new();
    let text = serde_json::to_string(note).unwrap_or_default();
    command.arg("XADD").arg(LOG).arg("MAXLEN").arg("~").arg(LOG_LENGTH).arg("*");
    command.arg("g").arg(&state.id).arg("n").arg(moment).arg("note").arg(text);
    command
}

/// Follows the log until it breaks.
async fn follow(state: &State, log: &mut MultiplexedConnection) -> RedisError {
    loop {
        if let Err(error) = read(state, log, Some(BLOCK)).await {
            return error;
        }
    }
}

/// Reads on; how many entries came.
async fn read(state: &State, log: &mut MultiplexedConnection, wait: Option<Duration>) -> Result<usize, RedisError> {
    let mut command = Cmd::new();
    command.arg("XREAD").arg("COUNT").arg(1_000);
    if let Some(wait) = wait {
        command.arg("BLOCK").arg(u64::try_from(wait.as_millis()).unwrap_or(500));
    }
    command.arg("STREAMS").arg(LOG).arg(id(state.position.load(SeqCst)));
    let reply: Option<StreamReadReply> = command.query_async(log).await?;
    let entries = reply.into_iter().flat_map(|reply| reply.keys).flat_map(|key| key.ids);
    let mut count = 0;
    let mut purges = Vec::new();
    for entry in entries {
        count += 1;
        if let Some(at) = position(&entry.id) {
            take(state, &entry, at, &mut purges);
            state.position.store(at, SeqCst);
        }
    }
    if let Some(cache) = state.cache.upgrade().filter(|_| !purges.is_empty()) {
        cache.purge_here(&purges);
    }
    Ok(count)
}

/// Takes over an entry.
fn take(state: &State, entry: &StreamId, at: u64, purges: &mut Vec<Purge>) {
    let text = |name: &str| entry.get::<String>(name).unwrap_or_default();
    // What a newer gateway says is taken for the worst.
    let note = serde_json::from_str::<Note>(&text("note")).unwrap_or(Note::Purge(Purge::All));
    let own = (text("g") == state.id).then(|| text("n").parse().unwrap_or(0));
    match (note, own) {
        (Note::Begin, _) => {}
        (Note::Mark(slot), own) => state.marks.logged(slot, at, own),
        (Note::Purge(_), Some(moment)) => state.marks.purge_logged(moment, at),
        (Note::Purge(purge), None) => {
            state.marks.purge(purge.clone(), at);
            purges.push(purge);
        }
    }
}

/// Entries that are said at a time.
const BATCH: usize = 200;

/// Says what there is to say until it breaks.
async fn say(state: &State, mut commands: MultiplexedConnection) -> RedisError {
    loop {
        let mut pipe = redis::pipe();
        let some = {
            let mut backlog = state.backlog.lock().unwrap_or_else(PoisonError::into_inner);
            let Backlog { queue, said } = &mut *backlog;
            let more = queue.len().min(BATCH.saturating_sub(said.len()));
            said.extend(queue.drain(..more));
            for saying in said.iter() {
                pipe.add_command(add(state, &saying.note, saying.moment));
            }
            !said.is_empty()
        };
        if !some {
            state.waiting.notified().await;
            continue;
        }
        let said: Result<Vec<String>, RedisError> = pipe.query_async(&mut commands).await;
        match said {
            Ok(_) => {
                let mut backlog = state.backlog.lock().unwrap_or_else(PoisonError::into_inner);
                let done = std::mem::take(&mut backlog.said);
                drop(backlog);
                for told in done.into_iter().filter_map(|done| done.told) {
                    let _ = told.send(());
                }
            }
            Err(error) => {
                // One that refuses (full, read-only) would be asked again at once.
                if !error.is_io_error() && !error.is_timeout() && !error.is_connection_dropped() {
                    sleep(PATIENCE).await;
                }
                return error;
            }
        }
    }
}
