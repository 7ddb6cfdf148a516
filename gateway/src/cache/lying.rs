//! An answer as it lies in Redis.
//!
//! It says of itself what it answers and when it was asked for: what lies under a hash may be another's, or another version's,
//! and then it is nothing.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use super::{marks::Position, policy::Terms, stored::Stored};

/// The version of what lies there: gateways of another do not read it.
const VERSION: u8 = 1;

/// An answer as it lies there.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Lying<'a> {
    version: u8,
    key: &'a [u8],
    born: u64,
    #[serde(borrow)]
    answer: Answer<'a>,
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
enum Answer<'a> {
    /// This one.
    One(#[serde(borrow)] Whole<'a>),
    /// Several, by what their requests said in these fields.
    By(#[serde(borrow)] Vec<&'a str>),
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Whole<'a> {
    status: u16,
    #[serde(borrow)]
    headers: Vec<(&'a str, &'a [u8])>,
    #[serde(borrow)]
    selection: Vec<(&'a str, Option<&'a [u8]>)>,
    #[serde(borrow)]
    tags: Vec<&'a str>,
    came: u64,
    terms: [u64; 4],
    flags: [bool; 4],
    body: &'a [u8],
}

/// What lies under a key.
pub enum Found {
    /// An answer.
    Answer(Box<Stored>),
    /// Answers by these fields.
    By(Vec<HeaderName>),
}

/// An answer as it is laid there.
pub(super) fn encode(key: &[u8], stored: &Stored) -> Option<Vec<u8>> {
    let Terms { lifetime, age, while_revalidate, if_error, .. } = stored.terms;
    let Terms { never_stale, always_validate, for_authorized, for_cookies, .. } = stored.terms;
    let whole = Whole {
        status: stored.status.as_u16(),
        headers: stored.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect(),
        selection: stored.selection.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect(),
        tags: stored.tags.iter().map(|tag| &**tag).collect(),
        came: stored.came,
        terms: [lifetime, age, while_revalidate, if_error],
        flags: [never_stale, always_validate, for_authorized, for_cookies],
        body: &stored.body,
    };
    let answer = Answer::One(whole);
    postcard::to_allocvec(&Lying { version: VERSION, key, born: stored.born.shared, answer }).ok()
}

/// Word of what it depends on, as it is laid there.
pub(super) fn encode_names(key: &[u8], stored: &Stored) -> Option<Vec<u8>> {
    let answer = Answer::By(stored.selection.iter().map(|(name, _)| name.as_str()).collect());
    postcard::to_allocvec(&Lying { version: VERSION, key, born: stored.born.shared, answer }).ok()
}

/// What lies under a key, and the position at which it was asked for; nothing where it is not for this key.
pub fn decode(value: &[u8], key: &[u8]) -> Option<(Found, u64)> {
    let lying = postcard::from_bytes::<Lying<'_>>(value).ok()?;
    // Two keys may have one hash.
    if lying.version != VERSION || lying.key != key {
        return None;
    }
    let found = match lying.answer {
        Answer::One(whole) => {
            let tags = whole.tags.iter().map(|tag| (*tag).into()).collect();
            Found::Answer(Box::new(restore(whole, tags, lying.born)?))
        }
        Answer::By(names) => {
            let names: Result<Vec<HeaderName>, _> = names.into_iter().map(str::parse).collect();
            Found::By(names.ok()?)
        }
    };
    Some((found, lying.born))
}

/// The name under which an answer lies.
pub(super) fn name(key: &[u8], tag: &[u8]) -> String {
    let mut whole = key.to_vec();
    whole.extend_from_slice(b"\0\0");
    whole.extend_from_slice(tag);
    format!("gateway:{:032x}", XxHash3_128::oneshot(&whole))
}

/// An answer as it was, as far as it is one.
fn restore(whole: Whole<'_>, tags: Vec<Box<str>>, born: u64) -> Option<Stored> {
    let mut headers = HeaderMap::with_capacity(whole.headers.len());
    for (name, value) in whole.headers {
        headers.append(name.parse::<HeaderName>().ok()?, HeaderValue::from_bytes(value).ok()?);
    }
    let field = |(name, value): (&str, Option<&[u8]>)| Some((name.parse().ok()?, value.map(Into::into)));
    let [lifetime, age, while_revalidate, if_error] = whole.terms;
    let [never_stale, always_validate, for_authorized, for_cookies] = whole.flags;
    Some(Stored {
        status: StatusCode::from_u16(whole.status).ok()?,
        headers,
        body: Bytes::copy_from_slice(whole.body),
        selection: whole.selection.into_iter().map(field).collect::<Option<_>>()?,
        tags,
        terms: Terms {
            lifetime,
            age,
            while_revalidate,
            if_error,
            never_stale,
            always_validate,
            for_authorized,
            for_cookies,
        },
        came: whole.came,
        born: Position { local: 0, shared: born },
    })
}
