//! Who asks: tokens and the keys that they are checked with (RFC 7519, RFC 7515, RFC 8725).
//!
//! A [`Verifier`] answers from the keys that it has, at once; it never fetches while a request
//! waits, but tells [`jwks`] what is missing. What a token says about how to check it (`alg`, `kid`) only ever
//! narrows what the file allows.

pub mod cors;
pub mod jwks;
pub mod keys;
pub mod memo;
pub mod token;

use std::{
    collections::HashMap,
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use self::{keys::Key, token::Token};
use crate::{
    claims::Claims,
    config::auth::{Algorithm, VerifierConfig},
    upstream::Upstream,
};

/// Unknown names of keys that are remembered.
const ABSENT: usize = 2_000;
/// The longest of them.
const NAME: usize = 200;
/// How long a request waits until a fetch may begin, at most.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a token is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is no good, and for what reason: in words that its sender may see.
    Invalid(&'static str),
    /// It names a key that is not there; another fetch may bring it.
    UnknownKey(Box<str>),
    /// There are no keys at all yet.
    NoKeys,
}

/// A token that was taken.
#[derive(Debug)]
pub struct Verified {
    /// What it claims.
    pub claims: Claims,
    /// Until when it is good, in seconds of Unix time.
    pub until: u64,
    /// Of the keys that it was checked with.
    pub generation: u64,
}

/// The keys that there are now.
#[derive(Debug, Default)]
pub struct Keys {
    /// Counts up whenever they change; 0 while there never were any.
    pub generation: u64,
    all: Vec<Key>,
    /// What they were read from.
    text: Box<[u8]>,
    /// Of what it says, in whatever order.
    hash: u64,
}

impl Keys {
    /// Whether one has this name.
    fn has(&self, id: &str) -> bool {
        self.all.iter().any(|key| key.is_named(id))
    }
}

/// Where keys come from.
#[derive(Debug)]
pub enum Source {
    /// The file itself; they never change.
    Fixed,
    /// Another file.
    File(PathBuf),
    /// A server, with the path and query that it is asked for.
    Url(Arc<Upstream>, Box<str>),
}

/// What has happened to the keys so far.
#[derive(Clone, Copy, Debug)]
struct Progress {
    /// The number of the fetch that began last.
    started: u64,
    /// The number of the one that ended last.
    ended: u64,
    /// Whether that one failed.
    failed: bool,
    /// When the next that requests ask for may begin.
    allowed: Instant,
    /// Whether nobody fetches any more.
    closed: bool,
}

/// What waiting for keys came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// They are there: look again.
    Again,
    /// There is no such key.
    Absent,
    /// Nobody knows: the keys cannot be had.
    Unavailable,
}

/// A named verifier.
pub struct Verifier {
    /// Its name in the file.
    pub name: Arc<str>,
    /// Its own among all verifiers of this process.
    pub id: u64,
    issuer: Option<Box<str>>,
    audience: Vec<Box<str>>,
    algorithms: Vec<Algorithm>,
    leeway: u64,
    kind: Option<Box<str>>,
    required: Vec<Box<str>>,
    cooldown: Duration,
    source: Source,
    keys: ArcSwap<Keys>,
    wanted: Notify,
    progress: watch::Sender<Progress>,
    failures: AtomicU64,
    /// Names that requests wait for, and the fetch that will tell.
    sought: Mutex<HashMap<Box<str>, u64>>,
    /// Names that a fetch did not bring, when that was found out, and whether it had failed.
    absent: Mutex<HashMap<Box<str>, (Instant, bool)>>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Verifier {
    /// A verifier as the file says. `server` makes the upstream of a URL's host; `before` is one whose keys came from the same URL. Keys of a file are read here, so that a bad one is
    /// refused with the file.
    pub fn new(
        name: &str,
        config: &VerifierConfig,
        folder: &Path,
        before: Option<&Self>,
        server: impl FnOnce(&str) -> Result<(Arc<Upstream>, Box<str>), String>,
    ) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let algorithms = config.algorithms().to_vec();
        let mut first = Keys::default();
        let source = if let Some(secret) = &config.secret {
            let key = |algorithm: &Algorithm| Key::secret(secret.as_bytes(), *algorithm);
            first = Keys { generation: 1, all: algorithms.iter().filter_map(key).collect(), ..Keys::default() };
            Source::Fixed
        } else if let Some(file) = &config.jwks_file {
            let path = folder.join(file);
            let text = std::fs::read(&path).map_err(|error| format!("`{}`: {error}", path.display()))?;
            let keys = keys::read(&text, &algorithms, true).map_err(|why| format!("`{}`: {why}", path.display()))?;
            first = Keys { generation: 1, all: keys, hash: keys::fingerprint(&text), text: text.into() };
            Source::File(path)
        } else {
            // The last good set of the same place is good for other terms, too.
            if let Some(text) = before.map(|before| before.keys.load().text.clone()).filter(|text| !text.is_empty())
                && let Ok(keys) = keys::read(&text, &algorithms, false)
            {
                first = Keys { generation: 1, all: keys, hash: keys::fingerprint(&text), text };
            }
            let (upstream, target) = server(config.jwks.as_deref().unwrap_or_default())?;
            Source::Url(upstream, target)
        };
        let boxed = |texts: &[String]| texts.iter().map(|text| text.as_str().into()).collect();
        Ok(Self {
            name: name.into(),
            id: NEXT.fetch_add(1, Relaxed),
            issuer: config.issuer.as_deref().map(Into::into),
            audience: boxed(&config.audience),
            algorithms,
            leeway: config.leeway.0.as_secs(),
            kind: config.typ.as_deref().map(|kind| bare(kind).to_ascii_lowercase().into()),
            required: boxed(&config.required_claims),
            cooldown: config.cooldown.0,
            source,
            keys: ArcSwap::from_pointee(first),
            wanted: Notify::new(),
            progress: watch::Sender::new(Progress {
                started: 0,
                ended: 0,
                failed: false,
                allowed: Instant::now(),
                closed: false,
            }),
            failures: AtomicU64::new(0),
            sought: Mutex::default(),
            absent: Mutex::default(),
        })
    }

    /// Where its keys come from.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// Counts up whenever the keys change.
    pub fn generation(&self) -> u64 {
        self.keys.load().generation
    }

    /// How many keys there are.
    pub fn count(&self) -> usize {
        self.keys.load().all.len()
    }

    /// Checks a token at a moment, in seconds of Unix time.
    pub fn verify(&self, text: &[u8], now: u64) -> Result<Verified, Refusal> {
        let token = Token::parse(text).map_err(Refusal::Invalid)?;
        let algorithm = Algorithm::parse(&token.algorithm).filter(|known| self.algorithms.contains(known));
        let algorithm = algorithm.ok_or(Refusal::Invalid("the token's algorithm is not allowed here"))?;
        if let Some(kind) = &self.kind
            && token.kind.as_deref().is_none_or(|told| !bare(told).eq_ignore_ascii_case(kind))
        {
            return Err(Refusal::Invalid("the token is of another type"));
        }
        let Token { key: id, claims, message, signature, .. } = token;
        let claims = Claims::new(claims);
        // Cheap, and said of a forged token it tells its sender nothing new.
        let until = self.check(&claims, now)?;
        let keys = self.keys.load();
        if keys.generation == 0 {
            return Err(Refusal::NoKeys);
        }
        // A secret of the file has no name.
        let id = id.as_deref().filter(|_| !matches!(self.source, Source::Fixed));
        if keys.all.iter().any(|key| key.fits(id, algorithm) && key.signed(message, &signature)) {
            return Ok(Verified { claims, until, generation: keys.generation });
        }
        match id {
            Some(id) if !keys.has(id) => Err(Refusal::UnknownKey(id.into())),
            // One that names no key may be of one that is not there yet.
            None if !matches!(self.source, Source::Fixed) => Err(Refusal::UnknownKey("".into())),
            _ => Err(Refusal::Invalid("the token's signature does not fit")),
        }
    }

    /// Checks what a token claims (RFC 7519 §4.1); until when it is good.
    fn check(&self, claims: &Claims, now: u64) -> Result<u64, Refusal> {
        let invalid = |why| Err(Refusal::Invalid(why));
        let Some(expiry) = claims.get("exp") else { return invalid("the token does not say when it expires") };
        let Some(expiry) = seconds(expiry) else { return invalid(token::MALFORMED) };
        // At the moment itself it is over (RFC 7519 §4.1.4).
        let until = expiry.saturating_add(self.leeway);
        if now >= until {
            return invalid("the token has expired");
        }
        if let Some(begin) = claims.get("nbf") {
            let Some(begin) = seconds(begin) else { return invalid(token::MALFORMED) };
            if now.saturating_add(self.leeway) < begin {
                return invalid("the token is not valid yet");
            }
        }
        if let Some(issuer) = &self.issuer
            && claims.get("iss").and_then(Value::as_str) != Some(issuer)
        {
            return invalid("the token is of another issuer");
        }
        if !self.audience.is_empty() {
            let ours = |value: &Value| value.as_str().is_some_and(|text| self.audience.iter().any(|us| **us == *text));
            let named = match claims.get("aud") {
                Some(Value::Array(all)) => all.iter().all(Value::is_string) && all.iter().any(ours),
                Some(one) => ours(one),
                None => false,
            };
            if !named {
                return invalid("the token is for another audience");
            }
        }
        if self.required.iter().any(|name| claims.get(name).is_none_or(Value::is_null)) {
            return invalid("the token lacks a claim that is required here");
        }
        Ok(until)
    }

    /// Waits for the keys that a refusal misses.
    pub async fn wait(&self, missing: &Refusal) -> Waited {
        let mut progress = self.progress.subscribe();
        let before = *progress.borrow_and_update();
        let generation = self.generation();
        let id = match missing {
            Refusal::Invalid(_) => return Waited::Absent,
            // They came in between.
            Refusal::NoKeys if generation > 0 => return Waited::Again,
            Refusal::UnknownKey(id) if self.keys.load().has(id) => return Waited::Again,
            Refusal::NoKeys if before.closed || before.ended > 0 => {
                // Not as late as it would come by itself.
                self.wanted.notify_one();
                return Waited::Unavailable;
            }
            Refusal::NoKeys => "",
            Refusal::UnknownKey(id) => &**id,
        };
        let mut needed = 1;
        if matches!(missing, Refusal::UnknownKey(_)) {
            // No key has such a name, or none will come.
            if matches!(self.source, Source::Fixed) || id.len() > NAME {
                return Waited::Absent;
            }
            match self.absence(id) {
                None => {}
                Some(true) => return Waited::Unavailable,
                Some(false) => return Waited::Absent,
            }
            let far = before.allowed.saturating_duration_since(Instant::now()) > PATIENCE;
            needed = match (far, before.started > before.ended) {
                // One that began before may have been answered before the key was there.
                (false, _) => before.started + 1,
                (true, true) => before.started,
                (true, false) => return Waited::Absent,
            };
            if !self.seek(id, needed) {
                return Waited::Unavailable;
            }
            if !far {
                self.wanted.notify_one();
            }
        }
        loop {
            if progress.changed().await.is_err() {
                return Waited::Unavailable;
            }
            let now = *progress.borrow_and_update();
            let keys = self.keys.load();
            if keys.has(id) || (id.is_empty() && keys.generation > generation) {
                return Waited::Again;
            }
            if now.closed || now.ended >= needed {
                return if now.failed || now.closed { Waited::Unavailable } else { Waited::Absent };
            }
        }
    }

    /// Whether a fetch of late did not bring this key; whether it failed.
    fn absence(&self, id: &str) -> Option<bool> {
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, failed) = absent.get(id)?;
        (since.elapsed() < self.cooldown).then_some(*failed)
    }

    /// Notes that requests wait for a key, and for which fetch; not where too many are waited for.
    fn seek(&self, id: &str, needed: u64) -> bool {
        let mut sought = self.sought.lock().unwrap_or_else(PoisonError::into_inner);
        if !sought.contains_key(id) && sought.len() >= ABSENT {
            return false;
        }
        sought.entry(id.into()).or_insert(needed);
        true
    }

    /// A fetch has ended: what it did not bring is not asked for again at once.
    fn note_absent(&self, fetch: u64, failed: bool) {
        let mut sought = self.sought.lock().unwrap_or_else(PoisonError::into_inner);
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        if absent.len() + sought.len() > 2 * ABSENT {
            absent.clear();
        }
        let keys = self.keys.load();
        let now = Instant::now();
        sought.retain(|id, needed| {
            if fetch < *needed {
                return true;
            }
            if !keys.has(id) {
                absent.insert(id.clone(), (now, failed));
            }
            false
        });
    }

    /// Nobody fetches any more: whoever waits need not.
    pub fn close(&self) {
        self.progress.send_modify(|progress| progress.closed = true);
    }

    /// Fetches that failed since the last that did not.
    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// Takes over a set, if it is another; whether it was.
    fn take(&self, text: &[u8], secrets: bool) -> Result<bool, String> {
        let old = self.keys.load();
        let hash = keys::fingerprint(text);
        if old.generation > 0 && old.hash == hash {
            return Ok(false);
        }
        let keys = keys::read(text, &self.algorithms, secrets)?;
        self.keys.store(Arc::new(Keys { generation: old.generation + 1, all: keys, hash, text: text.into() }));
        Ok(true)
    }
}

/// A media type without the prefix that a token may leave out (RFC 7515 §4.1.9).
fn bare(kind: &str) -> &str {
    match kind.get(..12) {
        Some(prefix) if prefix.eq_ignore_ascii_case("application/") => &kind[12..],
        _ => kind,
    }
}

/// A `NumericDate` (RFC 7519 §2), rounded down.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "what is too large is as good as for ever")]
fn seconds(value: &Value) -> Option<u64> {
    let number = value.as_number()?;
    number.as_u64().or_else(|| number.as_f64().filter(|number| number.is_finite()).map(|number| number.max(0.0) as u64))
}

#[cfg(test)]
mod tests;
