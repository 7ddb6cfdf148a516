//! Looks at the evidence, takes steps and takes them back, and does what a person says; all on one thread, one thing after the other.
//!
//! A change is journaled before it takes effect. Where the journal cannot be written nothing is advanced; what takes a
//! route back takes effect all the same, and says that it will not outlive the process.

use std::{
    collections::{HashMap, HashSet},
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, oneshot};

use super::{
    bounds,
    journal::{Entry, Held, Journal, Record, Recorded},
    overlay::Ramp,
    steps::{Phase, Position},
    verdict::{Compared, Terms, Trial, Verdict},
    webhook::Message,
};
use crate::{
    config::{Stage, rollout::RolloutConfig, values::Share},
    routing::cohort::BUCKETS,
    shadow::Shadow,
    snapshot::{Route, Snapshot, Store},
};

/// How often it looks.
const TICK: Duration = Duration::from_millis(200);
/// Commands that wait, at most.
const COMMANDS: usize = 64;
/// Events that a slow reader may be behind.
const EVENTS: usize = 256;
/// Messages to webhooks that wait, at most.
const MESSAGES: usize = 1024;
/// How soon a gate that said no is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// Changes that wait to be written down, at most.
const UNWRITTEN: usize = 1024;
/// How often a journal that cannot be opened is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// What a person wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To the monolith, now.
    Rollback {
        /// Also where the monolith's code may be gone.
        force: bool,
    },
    /// The next step, now.
    Promote {
        /// The share that whoever wants it has seen, if said.
        from: Option<Share>,
    },
    /// As the file says, again.
    Resume,
}

/// Why a wish is not granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// No route is called so.
    Unknown(String),
    /// It makes no sense as things are.
    Conflict(String),
    /// It could not be done.
    Failed(String),
}

/// What was done.
#[derive(Clone, Debug, PartialEq)]
pub struct Done {
    /// What happened, if anything had to.
    pub entry: Option<Entry>,
    /// What is wrong all the same.
    pub warning: Option<String>,
}

enum Command {
    Wish { route: String, wish: Wish, who: String, why: String, reply: oneshot::Sender<Result<Done, Refused>> },
    History { route: Option<String>, limit: usize, reply: oneshot::Sender<Result<Vec<Entry>, String>> },
    Answer { route: String, question: u64, answer: Result<(), String> },
    Stop(oneshot::Sender<()>),
}

/// Rollouts and rollbacks, for whoever asks about them.
pub struct Rollouts {
    commands: SyncSender<Command>,
    events: broadcast::Sender<Arc<str>>,
    views: Mutex<HashMap<Arc<str>, Value>>,
    trouble: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Rollouts {
    /// Starts the thread. What it has to tell others goes into the channel.
    pub fn start(store: Arc<Store>) -> std::io::Result<(Arc<Self>, mpsc::Receiver<Message>)> {
        let (commands, received) = sync_channel(COMMANDS);
        let (messages, told) = mpsc::channel(MESSAGES);
        let this = Arc::new(Self {
            commands,
            events: broadcast::Sender::new(EVENTS),
            views: Mutex::default(),
            trouble: Mutex::default(),
        });
        let (journal, records) = store.take_journal();
        let mut controller = Controller {
            shared: this.clone(),
            folder: store.state.clone(),
            store,
            messages,
            journal,
            tried: None,
            records,
            running: HashMap::new(),
            unwritten: Vec::new(),
            seen: HashSet::new(),
            begun: Instant::now(),
            questions: 0,
        };
        // How everything stands is known before anybody asks.
        controller.look();
        std::thread::Builder::new().name("rollouts".to_owned()).spawn(move || controller.run(&received))?;
        Ok((this, told))
    }

    /// Does what a person says.
    pub async fn wish(&self, route: String, wish: Wish, who: String, why: String) -> Result<Done, Refused> {
        let (reply, answer) = oneshot::channel();
        let gone = || Refused::Failed("the gateway is stopping".to_owned());
        self.send(Command::Wish { route, wish, who, why, reply }).map_err(Refused::Failed)?;
        answer.await.map_err(|_| gone())?
    }

    /// The newest changes, newest first.
    pub async fn history(&self, route: Option<String>, limit: usize) -> Result<Vec<Entry>, String> {
        let (reply, answer) = oneshot::channel();
        self.send(Command::History { route, limit, reply })?;
        answer.await.map_err(|_| "the gateway is stopping".to_owned())?
    }

    /// What a gate has answered.
    pub fn answer(&self, route: String, question: u64, answer: Result<(), String>) {
        // Where it does not arrive the gate is asked again.
        let _ = self.send(Command::Answer { route, question, answer });
    }

    /// Lets go of the journal, for whoever comes after.
    pub async fn stop(&self) {
        let (reply, stopped) = oneshot::channel();
        if self.send(Command::Stop(reply)).is_ok() {
            let _ = stopped.await;
        }
    }

    /// Tells those who listen of something that is in no history.
    pub fn announce(&self, kind: &str, data: &Value) {
        let _ = self.events.send(json!({"type": kind, "data": data}).to_string().into());
    }

    /// What happens from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<str>> {
        self.events.subscribe()
    }

    /// How a route's rollout stands, and whether it was put back.
    pub fn view(&self, route: &str) -> Value {
        lock(&self.views).get(route).cloned().unwrap_or_default()
    }

    /// Why nothing can be written down, if so.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.trouble).clone()
    }

    fn send(&self, command: Command) -> Result<(), String> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => "too many calls at a time; try again".to_owned(),
            TrySendError::Disconnected(_) => "the gateway is stopping".to_owned(),
        })
    }
}

/// A rollout that runs.
struct Running {
    ramp: Arc<Ramp>,
    config: Arc<RolloutConfig>,
    steps: Vec<u16>,
    position: Position,
    trial: Trial,
    /// What had been compared before it began, and by whom.
    compared: Compared,
    shadow: Option<Arc<Shadow>>,
    /// What the last look came to.
    verdict: Verdict,
    /// Closed gates, in words.
    gates: Vec<String>,
    asked: Asked,
    since: Timestamp,
    why: String,
}

/// How far the question to a webhook is.
#[derive(Clone, Debug, PartialEq)]
enum Asked {
    NotYet,
    Waiting(u64, Instant),
    Yes,
    No(String, Instant),
}

struct Controller {
    shared: Arc<Rollouts>,
    store: Arc<Store>,
    folder: PathBuf,
    messages: mpsc::Sender<Message>,
    journal: Option<Journal>,
    tried: Option<Instant>,
    records: HashMap<String, Record>,
    running: HashMap<Arc<str>, Running>,
    /// What took effect, but could not be written down.
    unwritten: Vec<Entry>,
    /// Rollouts that this process has run: what comes again after an edit starts afresh.
    seen: HashSet<Arc<str>>,
    begun: Instant,
    questions: u64,
}

/// The gateway's own name in the history.
const ITSELF: &str = "gateway";

impl Controller {
    fn run(mut self, commands: &Receiver<Command>) {
        let mut next = Instant::now();
        loop {
            match commands.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(Command::Stop(reply)) => {
                    self.tried = None;
                    self.catch_up();
                    self.journal = None;
                    let _ = reply.send(());
                    return;
                }
                Ok(command) => self.survive(|this| this.obey(command)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if Instant::now() >= next {
                self.survive(Self::look);
                next = Instant::now() + TICK;
            }
        }
    }

    /// A bug in one look must not be the end of all: nobody could put anything back any more.
    fn survive(&mut self, what: impl FnOnce(&mut Self)) {
        if std::panic::catch_unwind(AssertUnwindSafe(|| what(self))).is_err() {
            tracing::error!("a look at the rollouts panicked; the next goes on");
            *lock(&self.shared.trouble) = Some("a look at the rollouts panicked: see the log".to_owned());
            // What it had in hand is taken up where the records have it, not afresh.
            let Self { seen, running, .. } = self;
            seen.retain(|name| running.contains_key(name));
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Wish { route, wish, who, why, reply } => {
                // A file that was just saved counts.
                let snapshot = self.store.current();
                self.follow(&snapshot);
                let done = self.grant(&route, wish, who, why);
                self.show();
                let _ = reply.send(done);
            }
            Command::History { route, limit, reply } => {
                let read = match &self.journal {
                    Some(journal) => journal.history(route.as_deref(), limit).map_err(|error| error.to_string()),
                    None => Ok(Vec::new()),
                };
                let _ = reply.send(read);
            }
            Command::Answer { route, question, answer } => {
                if let Some(running) = self.running.get_mut(&*route)
                    && matches!(running.asked, Asked::Waiting(asked, _) if asked == question)
                {
                    running.asked = match answer {
                        Ok(()) => Asked::Yes,
                        Err(why) => Asked::No(why, Instant::now()),
                    };
                }
            }
            Command::Stop(_) => {}
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The journal, opened where it is not.
    fn journal(&mut self) -> Result<&Journal, String> {
        if self.journal.is_none() && self.tried.is_none_or(|tried| tried.elapsed() >= TRY_AGAIN) {
            self.tried = Some(Instant::now());
            // Another file may be there than the one that was: what is known here is in it from now on.
            let opened =
                Journal::open(&self.folder).and_then(|journal| journal.restore(&self.records).map(|()| journal));
            match opened {
                Ok(journal) => self.journal = Some(journal),
                Err(failure) => self.fail(&failure.to_string()),
            }
        }
        self.journal.as_ref().ok_or_else(|| lock(&self.shared.trouble).clone().unwrap_or_default())
    }

    fn fail(&self, why: &str) {
        let mut trouble = lock(&self.shared.trouble);
        if trouble.as_deref() != Some(why) {
            tracing::error!(
                why,
                "the journal cannot be written: no rollout advances, and what is put back by hand will not outlive the process"
            );
        }
        *trouble = Some(why.to_owned());
    }

    /// Writes a change down.
    fn write(&mut self, record: Record, entry: Entry) -> Result<Entry, String> {
        let route = entry.route.clone();
        let written = match self.journal() {
            Ok(journal) => journal.write(&record, entry).map_err(|failure| failure.to_string()),
            Err(why) => Err(why),
        };
        match written {
            Ok(entry) => {
                *lock(&self.shared.trouble) = None;
                self.records.insert(route, record);
                Ok(entry)
            }
            Err(why) => {
                // A store that failed once fails for ever; another look at the same file may not.
                if self.journal.take().is_some() {
                    self.tried = Some(Instant::now());
                }
                self.fail(&why);
                Err(why)
            }
        }
    }

    fn record(&self, route: &Route) -> Record {
        self.records.get(&*route.name).cloned().unwrap_or_default()
    }

    /// Notes what took effect, to be written down as soon as that can be done.
    fn keep(&mut self, record: Record, entry: Entry) {
        self.records.insert(entry.route.clone(), record);
        if self.unwritten.len() < UNWRITTEN {
            self.unwritten.push(entry);
        }
    }

    /// Writes down what took effect without that.
    fn catch_up(&mut self) {
        for entry in std::mem::take(&mut self.unwritten) {
            // With what is so now: it may have changed again.
            let record = self.records.get(&entry.route).cloned().unwrap_or_default();
            if self.write(record, entry.clone()).is_err() {
                self.unwritten.push(entry);
            }
        }
    }

    /// Tells everybody what has taken effect.
    fn tell(&self, entry: &Entry) {
        let Entry { route, action, who, why, from, to, .. } = entry;
        let (from, to) = (from.as_deref().unwrap_or("–"), to.as_deref().unwrap_or("–"));
        if matches!(action.as_str(), "rollback" | "freeze") {
            tracing::warn!(route, action, who, why, from, to, "a route has changed");
        } else {
            tracing::info!(route, action, who, why, from, to, "a route has changed");
        }
        let text = json!({"type": "route.changed", "data": entry}).to_string();
        let _ = self.shared.events.send(text.as_str().into());
        if self.messages.try_send(Message::Event { id: entry.id, at: entry.at, body: text }).is_err() {
            tracing::warn!("too many messages wait for webhooks; one is lost");
        }
    }

    /// Takes in what was seen, and moves what can be moved.
    fn look(&mut self) {
        let snapshot = self.store.current();
        if !self.unwritten.is_empty() && self.tried.is_none_or(|tried| tried.elapsed() >= TRY_AGAIN) {
            self.catch_up();
        }
        self.follow(&snapshot);
        let now = self.now();
        for route in &snapshot.routes {
            let Some(mut running) = self.running.remove(&route.name) else { continue };
            let seen = running.ramp.recorder.drain();
            if route.overlay.hold.is_held() {
                running.verdict =
                    Verdict::Hold(vec!["it was put back by hand; `gateway resume` follows the file again".to_owned()]);
            } else {
                running.trial.take(now, &seen);
                self.judge(route, &mut running, now);
            }
            self.running.insert(route.name.clone(), running);
        }
        self.show();
    }

    /// Begins and ends rollouts as the file says.
    fn follow(&mut self, snapshot: &Snapshot) {
        let ramps: HashMap<&str, &Arc<Ramp>> =
            snapshot.routes.iter().filter_map(|route| Some((&*route.name, route.overlay.ramp.as_ref()?))).collect();
        let ended: Vec<String> = self
            .records
            .iter()
            .filter(|(name, record)| {
                let known = record.rollout.as_ref().map(|rollout| rollout.fingerprint);
                known.is_some() && ramps.get(&***name).is_none_or(|ramp| Some(ramp.fingerprint) != known)
            })
            .map(|(name, _)| name.clone())
            .collect();
        for name in ended {
            self.running.remove(&*name);
            let Some(record) = self.records.get(&name).cloned() else { continue };
            let share = record.rollout.as_ref().map(|rollout| Share(rollout.share).to_string());
            let why = "the file was edited: it no longer says this rollout";
            let entry = entry(&name, "end", ITSELF, why, share, None, Value::Null);
            if let Ok(entry) = self.write(Record { rollout: None, ..record }, entry) {
                self.tell(&entry);
            }
        }
        self.running.retain(|name, running| ramps.get(&**name).is_some_and(|ramp| Arc::ptr_eq(ramp, &running.ramp)));
        for route in &snapshot.routes {
            // Whatever a reload did at the same time: what was put back is back.
            if self.records.get(&*route.name).is_some_and(|record| record.hold.is_some()) {
                route.overlay.hold.set(true);
            }
            let (Some(ramp), Some(config)) = (&route.overlay.ramp, &route.rollout) else { continue };
            if self.running.contains_key(&route.name) {
                continue;
            }
            let steps: Vec<u16> = config.steps.iter().map(|step| step.0).collect();
            let record = self.record(route);
            let known = record
                .rollout
                .clone()
                .filter(|known| known.fingerprint == ramp.fingerprint && !self.seen.contains(&route.name));
            self.seen.insert(route.name.clone());
            let fresh = known.is_none();
            let (position, since, why) = if let Some(known) = known {
                (known.position, known.since, known.why)
            } else {
                let why = "a rollout that the journal does not know starts at 0%".to_owned();
                (Position::START, Timestamp::now(), why)
            };
            let running = Running {
                ramp: ramp.clone(),
                position,
                trial: Trial::begin(self.now(), None, part(position.share(&steps))),
                steps,
                compared: compared(route),
                shadow: route.shadow.clone(),
                verdict: Verdict::Hold(Vec::new()),
                gates: Vec::new(),
                asked: Asked::NotYet,
                since,
                why: why.clone(),
                config: config.clone(),
            };
            let share = running.position.share(&running.steps);
            let recorded = running.recorded();
            ramp.set(share, position.phase == Phase::RolledBack);
            self.running.insert(route.name.clone(), running);
            if fresh {
                let entry = entry(&route.name, "start", ITSELF, &why, None, Some(Share(0).to_string()), Value::Null);
                if let Ok(entry) = self.write(Record { rollout: Some(recorded), ..record }, entry) {
                    self.tell(&entry);
                }
            }
        }
    }

    /// Judges one rollout, and moves it where that says so.
    fn judge(&mut self, route: &Route, running: &mut Running, now: Duration) {
        let terms = terms(&running.config, route);
        running.follow(route);
        let compared = running.compared();
        running.verdict =
            if running.position.step.is_none() { Verdict::Pass } else { running.trial.verdict(&terms, compared, now) };
        if !matches!(running.verdict, Verdict::Fail(_)) {
            running.ramp.recorder.renew(running.trial.renew(now, terms.every));
        }
        running.gates.clear();
        if running.verdict == Verdict::Pass
            && running.position.phase == Phase::Running
            && let Some(next) = running.position.next(&running.steps)
        {
            self.gates(route, running, next, compared, &terms);
        }
        // A yes is to the evidence that was shown.
        if running.verdict != Verdict::Pass && running.asked == Asked::Yes {
            running.asked = Asked::NotYet;
        }
        let open = running.gates.is_empty();
        let Some(next) = running.position.after(&running.verdict, &running.steps, open, running.config.on_failure)
        else {
            return;
        };
        let why = match (&running.verdict, next.phase) {
            (Verdict::Fail(why), _) => why.clone(),
            (_, Phase::Complete) => "the last step passed".to_owned(),
            _ if running.position.step.is_none() => "the first step".to_owned(),
            _ => "the step passed".to_owned(),
        };
        let action = match next.phase {
            Phase::Running => "step",
            Phase::Complete => "complete",
            Phase::Frozen => "freeze",
            Phase::RolledBack => "rollback",
        };
        // What cannot be written down is tried again at the next look.
        let _ = self.advance(route, running, next, action, ITSELF, &why);
    }

    /// Finds the closed gates before a step.
    fn gates(&mut self, route: &Route, running: &mut Running, next: usize, compared: Compared, terms: &Terms) {
        let gates = &running.config.gates;
        let share = running.config.steps[next];
        if let Some(parity) = gates.parity {
            #[allow(clippy::cast_precision_loss, reason = "counts")]
            let differing = bounds::share(compared.differing as f64, compared.all as f64, terms.alpha).high;
            if 1.0 - differing < f64::from(parity.0) / 10_000.0 {
                let Compared { all, differing } = compared;
                running.gates.push(format!(
                    "parity: {differing} of {all} compared answers differ, and {parity} is not shown yet"
                ));
            }
        }
        if gates.manual.contains(&share) {
            running.gates.push(format!("a person: `gateway promote {}` takes it to {share}", route.name));
        }
        let Some(webhook) = gates.webhook.as_ref().filter(|_| running.gates.is_empty()) else { return };
        match &running.asked {
            Asked::Yes => {}
            Asked::Waiting(_, since) if since.elapsed() < webhook.timeout.0 + ASK_AGAIN => {
                running.gates.push("the webhook was asked".to_owned());
            }
            Asked::No(why, when) if when.elapsed() < ASK_AGAIN => {
                running.gates.push(format!("the webhook holds it: {why}"));
            }
            Asked::NotYet | Asked::No(..) | Asked::Waiting(..) => {
                self.questions += 1;
                let body = json!({
                    "type": "rollout.gate",
                    "data": {
                        "route": *route.name,
                        "from": Share(running.position.share(&running.steps)).to_string(),
                        "to": share.to_string(),
                        "evidence": running.trial.evidence(compared),
                    },
                });
                let question = Message::Question {
                    webhook: webhook.clone(),
                    route: route.name.to_string(),
                    number: self.questions,
                    body: body.to_string(),
                };
                running.gates.push("the webhook is asked".to_owned());
                if self.messages.try_send(question).is_ok() {
                    running.asked = Asked::Waiting(self.questions, Instant::now());
                }
            }
        }
    }

    /// Writes a new position down, and runs it.
    fn advance(
        &mut self,
        route: &Route,
        running: &mut Running,
        next: Position,
        action: &str,
        who: &str,
        why: &str,
    ) -> Result<Done, String> {
        let share = |position: Position| Share(position.share(&running.steps)).to_string();
        // Put back by hand, it was the monolith's whatever its position says.
        let from = if route.overlay.is_back() { Share(0).to_string() } else { share(running.position) };
        let to = share(next);
        let evidence = serde_json::to_value(running.trial.evidence(running.compared())).unwrap_or_default();
        let entry = entry(&route.name, action, who, why, Some(from), Some(to), evidence);
        let (before, since, reason) = (running.position, running.since, running.why.clone());
        (running.position, running.since, running.why) = (next, entry.at, why.to_owned());
        let record = self.record(route);
        let written = self.write(Record { rollout: Some(running.recorded()), ..record }, entry.clone());
        let back = next.phase == Phase::RolledBack;
        let (entry, warning) = match written {
            Ok(entry) => (entry, None),
            // What is safe is done in any case.
            Err(warning) if back => {
                self.keep(Record { rollout: Some(running.recorded()), ..self.record(route) }, entry.clone());
                (entry, Some(warning))
            }
            Err(why) => {
                (running.position, running.since, running.why) = (before, since, reason);
                return Err(why);
            }
        };
        // Requests count that were drawn at the share that runs when they end: so first that, and then all anew.
        running.ramp.set(next.share(&running.steps), back);
        if next.step != before.step || next.phase == Phase::RolledBack || before.phase == Phase::Frozen {
            let share = part(next.share(&running.steps));
            running.trial = Trial::begin(self.now(), Some(&running.trial), share);
            running.ramp.recorder.restart();
        }
        running.asked = Asked::NotYet;
        running.gates.clear();
        running.verdict = Verdict::Hold(Vec::new());
        self.tell(&entry);
        Ok(Done { entry: Some(entry), warning })
    }

    /// Does what a person says.
    fn grant(&mut self, name: &str, wish: Wish, who: String, why: String) -> Result<Done, Refused> {
        let snapshot = self.store.current();
        let route = snapshot.routes.iter().find(|route| &*route.name == name);
        let route = route.ok_or_else(|| {
            Refused::Unknown(format!("no route is called `{}`; `gateway status` lists them", name.escape_debug()))
        })?;
        match wish {
            Wish::Rollback { force } => self.put_back(route, force, who, why),
            Wish::Promote { from } => self.promote(route, from, &who, &why),
            Wish::Resume => self.resume(route, &who, &why),
        }
    }

    fn put_back(&mut self, route: &Route, force: bool, who: String, why: String) -> Result<Done, Refused> {
        let conflict = |text: String| Err(Refused::Conflict(text));
        match route.stage {
            Stage::Legacy | Stage::Shadow => {
                let stage = route.stage.word();
                return conflict(format!("the monolith answers `{}` already: its stage is {stage}", route.name));
            }
            Stage::Retired | Stage::Gone if !force => {
                let stage = route.stage.word();
                return conflict(format!(
                    "`{}` is {stage}: the monolith's code may be gone; where it is not, say `--force`",
                    route.name
                ));
            }
            _ => {}
        }
        if route.overlay.hold.is_held() {
            return Ok(Done { entry: None, warning: None });
        }
        let share = route.share().map_or_else(|| Share(10_000).to_string(), |share| Share(share).to_string());
        let entry = entry(&route.name, "rollback", &who, &why, Some(share), Some(Share(0).to_string()), Value::Null);
        let mut record = self.record(route);
        record.hold = Some(Held { at: entry.at, who, why });
        let (entry, warning) = match self.write(record.clone(), entry.clone()) {
            Ok(entry) => (entry, None),
            Err(why) => {
                self.keep(record, entry.clone());
                (entry, Some(format!("it will not outlive the process until the journal can be written: {why}")))
            }
        };
        route.overlay.hold.set(true);
        self.tell(&entry);
        Ok(Done { entry: Some(entry), warning })
    }

    fn promote(&mut self, route: &Route, from: Option<Share>, who: &str, why: &str) -> Result<Done, Refused> {
        let conflict = |text: &str| Err(Refused::Conflict(format!("`{}` {text}", route.name)));
        if route.overlay.hold.is_held() {
            return conflict("was put back by hand; `gateway resume` first");
        }
        let Some(mut running) = self.running.remove(&route.name) else {
            return conflict("has no rollout; write its `stage:` or its `canary.percent` in the file");
        };
        let result = match (running.position.phase, running.position.next(&running.steps)) {
            (Phase::RolledBack, _) => conflict("was rolled back; `gateway resume` starts it afresh"),
            _ if from.is_some_and(|from| from.0 != running.position.share(&running.steps)) => {
                let share = Share(running.position.share(&running.steps));
                conflict(&format!("is at {share} by now; look again, and promote it where that is still what you want"))
            }
            (Phase::Complete, None) => conflict("is complete; write `stage: migrated` in the file"),
            (_, None) => {
                let next = Position { phase: Phase::Complete, ..running.position };
                self.advance(route, &mut running, next, "complete", who, why).map_err(Refused::Failed)
            }
            (_, next) => {
                let next = Position { phase: Phase::Running, step: next };
                self.advance(route, &mut running, next, "promote", who, why).map_err(Refused::Failed)
            }
        };
        self.running.insert(route.name.clone(), running);
        result
    }

    fn resume(&mut self, route: &Route, who: &str, why: &str) -> Result<Done, Refused> {
        let held = route.overlay.hold.is_held();
        let running = self.running.remove(&route.name);
        let stopped = |running: &Running| matches!(running.position.phase, Phase::RolledBack | Phase::Frozen);
        if !held && !running.as_ref().is_some_and(stopped) {
            if let Some(running) = running {
                self.running.insert(route.name.clone(), running);
            }
            return Err(Refused::Conflict(format!("`{}` runs as the file says", route.name)));
        }
        let Some(mut running) = running else {
            let own = match route.stage {
                Stage::Canary => route.cohort.as_ref().map_or(0, |values| values.cohort.share),
                _ => 10_000,
            };
            let to = Some(Share(own).to_string());
            let entry = entry(&route.name, "resume", who, why, Some(Share(0).to_string()), to, Value::Null);
            let record = self.record(route);
            let entry = self.write(Record { hold: None, ..record }, entry).map_err(Refused::Failed)?;
            route.overlay.hold.set(false);
            self.tell(&entry);
            return Ok(Done { entry: Some(entry), warning: None });
        };
        // What was frozen goes on where it was; what was taken back starts afresh.
        let next = match running.position.phase {
            Phase::Frozen if !held => Position { phase: Phase::Running, ..running.position },
            _ => Position::START,
        };
        let held = self.records.get_mut(&*route.name).and_then(|record| record.hold.take());
        let result = self.advance(route, &mut running, next, "resume", who, why);
        running.compared = compared(route);
        self.running.insert(route.name.clone(), running);
        match result {
            Ok(done) => {
                route.overlay.hold.set(false);
                Ok(done)
            }
            Err(why) => {
                self.records.entry(route.name.to_string()).or_default().hold = held;
                Err(Refused::Failed(why))
            }
        }
    }

    /// Shows how everything stands.
    fn show(&self) {
        let snapshot = self.store.current();
        let mut views = HashMap::new();
        for route in &snapshot.routes {
            let hold = route.overlay.hold.is_held().then(|| self.records.get(&*route.name)?.hold.as_ref()).flatten();
            let rollout = self.running.get(&route.name).map(Running::show);
            if route.overlay.hold.is_held() || rollout.is_some() {
                let held = route.overlay.hold.is_held().then(|| json!(hold));
                views.insert(route.name.clone(), json!({"held": held, "rollout": rollout}));
            }
        }
        *lock(&self.shared.views) = views;
    }
}

impl Running {
    fn recorded(&self) -> Recorded {
        Recorded {
            fingerprint: self.ramp.fingerprint,
            position: self.position,
            share: self.position.share(&self.steps),
            since: self.since,
            why: self.why.clone(),
        }
    }

    /// What was compared since it began, or since how it is compared was edited.
    fn compared(&self) -> Compared {
        let Some(shadow) = &self.shadow else { return Compared::default() };
        let now = shadow.compared();
        let all = now.all.saturating_sub(self.compared.all);
        Compared { all, differing: now.differing.saturating_sub(self.compared.differing).min(all) }
    }

    /// Looks at another ledger where there is one.
    fn follow(&mut self, route: &Route) {
        let same = match (&self.shadow, &route.shadow) {
            (Some(known), Some(shadow)) => Arc::ptr_eq(known, shadow),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.shadow.clone_from(&route.shadow);
            self.compared = Compared::default();
        }
    }

    fn show(&self) -> Value {
        let (verdict, why) = match &self.verdict {
            Verdict::Pass => ("pass", Vec::new()),
            Verdict::Fail(why) => ("fail", vec![why.clone()]),
            Verdict::Hold(why) => ("hold", why.clone()),
        };
        json!({
            "phase": self.position.phase,
            "step": self.position.step.map(|step| step + 1),
            "steps": self.config.steps.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "share": Share(self.position.share(&self.steps)).to_string(),
            "since": self.since.to_string(),
            "why": self.why,
            "verdict": verdict,
            "lacks": why,
            "gates": self.gates,
            "evidence": self.trial.evidence(self.compared()),
        })
    }
}

/// A share of the keys, of one.
fn part(share: u16) -> f64 {
    f64::from(share) / f64::from(BUCKETS)
}

fn entry(
    route: &str,
    action: &str,
    who: &str,
    why: &str,
    from: Option<String>,
    to: Option<String>,
    evidence: Value,
) -> Entry {
    Entry {
        id: 0,
        at: Timestamp::now(),
        route: route.to_owned(),
        action: action.to_owned(),
        who: who.to_owned(),
        why: why.to_owned(),
        from,
        to,
        evidence,
    }
}

fn terms(config: &RolloutConfig, route: &Route) -> Terms {
    let part = |share: Share| f64::from(share.0) / 10_000.0;
    Terms {
        alpha: part(config.alpha),
        steps: config.steps.len(),
        errors: part(config.margin.errors),
        client_errors: part(config.margin.client_errors),
        p99: part(config.margin.p99),
        mismatches: route.shadow.as_ref().map(|_| part(config.mismatches)),
        every: config.every.0,
        min_requests: config.min_requests,
    }
}

/// What was compared of a route's answers.
fn compared(route: &Route) -> Compared {
    route.shadow.as_ref().map(|shadow| shadow.compared()).unwrap_or_default()
}
