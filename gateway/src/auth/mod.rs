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
    collections::{HashMap, HashSet},
    fmt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
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

/// Requests that wait for keys of one verifier, at most.
const WAITING: usize = 1_000;
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
    /// Of the text that they were read from.
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
    /// Fetches that ended, well or not.
    ended: u64,
    /// Those of them that an unknown key had asked for.
    sought: u64,
    /// When the next of those may begin.
    allowed: Instant,
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
    waiting: AtomicUsize,
    /// Names that requests wait for.
    sought: Mutex<HashSet<Box<str>>>,
    /// Names that a fetch did not bring, and when it was found out.
    absent: Mutex<HashMap<Box<str>, Instant>>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Verifier {
    /// A verifier as the file says. `server` makes the upstream of a URL's host. Keys of a file are read here, so that a bad one is
    /// refused with the file.
    pub fn new(
        name: &str,
        config: &VerifierConfig,
        folder: &Path,
        server: impl FnOnce(&str) -> Result<(Arc<Upstream>, Box<str>), String>,
    ) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let algorithms = config.algorithms().to_vec();
        let mut first = Keys::default();
        let source = if let Some(secret) = &config.secret {
            let key = |algorithm: &Algorithm| Key::secret(secret.as_bytes(), *algorithm);
            first = Keys { generation: 1, all: algorithms.iter().filter_map(key).collect(), hash: 0 };
            Source::Fixed
        } else if let Some(file) = &config.jwks_file {
            let path = folder.join(file);
            let text = std::fs::read(&path).map_err(|error| format!("`{}`: {error}", path.display()))?;
            let keys = keys::read(&text, &algorithms, true).map_err(|why| format!("`{}`: {why}", path.display()))?;
            first = Keys { generation: 1, all: keys, hash: hash(&text) };
            Source::File(path)
        } else {
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
            progress: watch::Sender::new(Progress { ended: 0, sought: 0, allowed: Instant::now() }),
            waiting: AtomicUsize::new(0),
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

    /// Waits for the keys that a refusal misses; whether looking again may help.
    pub async fn wait(&self, missing: &Refusal) -> bool {
        let mut progress = self.progress.subscribe();
        let before = *progress.borrow_and_update();
        match missing {
            Refusal::Invalid(_) => return false,
            // The first fetch has failed already, and the next will come by itself.
            Refusal::NoKeys if before.ended > 0 => return self.generation() > 0,
            Refusal::NoKeys => {}
            Refusal::UnknownKey(id) => {
                // Names are as long as their sender likes, and a fetch may not be allowed for long.
                let far = before.allowed.saturating_duration_since(Instant::now()) > PATIENCE;
                if !matches!(self.source, Source::Url(..)) || self.is_absent(id) || far || id.len() > NAME {
                    return false;
                }
            }
        }
        let Some(_place) = Waiting::begin(&self.waiting) else { return false };
        let Refusal::UnknownKey(id) = missing else {
            let _ = progress.wait_for(|now| now.ended > before.ended).await;
            return self.generation() > 0;
        };
        {
            let mut sought = self.sought.lock().unwrap_or_else(PoisonError::into_inner);
            if sought.len() >= ABSENT {
                return false;
            }
            sought.insert(id.clone());
        }
        self.wanted.notify_one();
        let _ = progress.wait_for(|now| now.sought > before.sought).await;
        self.keys.load().has(id)
    }

    /// Whether a fetch of late did not bring this key.
    fn is_absent(&self, id: &str) -> bool {
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        absent.get(id).is_some_and(|since| since.elapsed() < self.cooldown)
    }

    /// A fetch has ended: what it did not bring is not asked for again at once.
    fn note_absent(&self) {
        let sought = std::mem::take(&mut *self.sought.lock().unwrap_or_else(PoisonError::into_inner));
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        if absent.len() + sought.len() > ABSENT {
            absent.clear();
        }
        let keys = self.keys.load();
        let now = Instant::now();
        absent.extend(sought.into_iter().filter(|id| !keys.has(id)).map(|id| (id, now)));
    }

    /// Takes over a set, if it is another; whether it was.
    fn take(&self, text: &[u8], secrets: bool) -> Result<bool, String> {
        let old = self.keys.load();
        let hash = hash(text);
        if old.generation > 0 && old.hash == hash {
            return Ok(false);
        }
        let keys = keys::read(text, &self.algorithms, secrets)?;
        self.keys.store(Arc::new(Keys { generation: old.generation + 1, all: keys, hash }));
        Ok(true)
    }
}

/// A place among those that wait.
struct Waiting<'v>(&'v AtomicUsize);

impl<'v> Waiting<'v> {
    fn begin(count: &'v AtomicUsize) -> Option<Self> {
        let place = Self(count);
        (count.fetch_add(1, Relaxed) < WAITING).then_some(place)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

fn hash(text: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(text)
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
