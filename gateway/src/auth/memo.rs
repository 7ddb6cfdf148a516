//! Tokens that were verified already: a warm request costs no signature.
//!
//! Each worker has its own, bounded by bytes and by time. A token is known by its SHA-256; what was found out about it is
//! good until it expires, until the verifier's keys change, and for a minute.

use std::rc::Rc;

use aws_lc_rs::digest;
use quick_cache::{Weighter, unsync::Cache};

use super::{Verified, Verifier};
use crate::claims::Claims;

/// What one worker's memo takes, in bytes.
const MEMORY: u64 = 8 * 1024 * 1024;
/// About as many tokens.
const TOKENS: usize = 8 * 1024;
/// How long one is believed, in seconds.
const LIFE: u64 = 60;

/// Of a verifier and a token.
type Key = (u64, [u8; 32]);

/// Verified tokens.
pub struct Memo(Cache<Key, Rc<Known>, Bytes>);

#[derive(Clone)]
struct Bytes;

/// A verified token.
struct Known {
    claims: Rc<Claims>,
    /// Of the keys that it was checked with.
    generation: u64,
    /// In seconds of Unix time.
    until: u64,
    size: u64,
}

impl Weighter<Key, Rc<Known>> for Bytes {
    fn weight(&self, _: &Key, known: &Rc<Known>) -> u64 {
        known.size
    }
}

impl Default for Memo {
    fn default() -> Self {
        Self(Cache::with_weighter(TOKENS, MEMORY, Bytes))
    }
}

impl Memo {
    /// What a token is known by.
    pub fn key(verifier: &Verifier, token: &[u8]) -> Key {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, token).as_ref());
        (verifier.id, hash)
    }

    /// What a token that is still good claims.
    pub fn get(&mut self, verifier: &Verifier, key: &Key, now: u64) -> Option<Rc<Claims>> {
        let known = self.0.get(key)?;
        if known.generation == verifier.generation() && now < known.until {
            return Some(known.claims.clone());
        }
        self.0.remove(key);
        None
    }

    /// Remembers a token that was just verified.
    pub fn put(&mut self, key: Key, verified: Verified, now: u64) -> Rc<Claims> {
        let Verified { claims, until, generation } = verified;
        let claims = Rc::new(claims);
        let known = Known {
            size: claims.size() as u64 + 200,
            until: until.min(now + LIFE),
            claims: claims.clone(),
            generation,
        };
        self.0.insert(key, Rc::new(known));
        claims
    }
}
