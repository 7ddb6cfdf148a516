//! An answer that is kept, and the responses that are made from it.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};

use super::{
    marks::Position,
    policy::Terms,
    range::{self, Part},
    vary::Selection,
};
use crate::fields;

/// `cache-status` (RFC 9211).
pub const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");
/// Tags of an answer, by blanks.
pub const SURROGATE_KEY: HeaderName = HeaderName::from_static("surrogate-key");
/// Tags of an answer, by commas.
const CACHE_TAG: HeaderName = HeaderName::from_static("cache-tag");
/// `proxy-authentication-info`
const PROXY_AUTHENTICATION_INFO: HeaderName = HeaderName::from_static("proxy-authentication-info");
/// Tags of one answer, at most.
const TAGS: usize = 100;

/// An answer that is kept.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its status.
    pub status: StatusCode,
    /// Its fields, without those that are said anew each time.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// What it depended on.
    pub selection: Selection,
    /// What it can be purged by.
    pub tags: Vec<Box<str>>,
    /// On what terms it is kept.
    pub terms: Terms,
    /// When it came, in milliseconds of Unix time.
    pub came: u64,
    /// What had been invalidated before it was asked for.
    pub born: Position,
}

impl Stored {
    /// Its age, in seconds.
    pub fn age(&self, now: u64) -> u64 {
        self.terms.age.saturating_add(now.saturating_sub(self.came) / 1000)
    }

    /// For how long it stays fresh; less than nothing where it is stale.
    pub fn left(&self, now: u64) -> i64 {
        i64::try_from(self.terms.lifetime).unwrap_or(i64::MAX) - i64::try_from(self.age(now)).unwrap_or(i64::MAX)
    }

    /// Whether it may stand in for a failure.
    pub fn may_replace(&self, now: u64) -> bool {
        let late = self.age(now).saturating_sub(self.terms.lifetime);
        !self.terms.never_stale && !self.terms.always_validate && late < self.terms.if_error
    }

    /// For how long it is of any use without its upstream's word, in seconds.
    pub fn useful(&self, now: u64) -> u64 {
        let stale = self.terms.while_revalidate.max(self.terms.if_error);
        self.terms.lifetime.saturating_add(stale).saturating_sub(self.age(now))
    }

    /// About how much memory it takes.
    pub fn size(&self) -> usize {
        let fields: usize = self.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64).sum();
        let tags: usize = self.tags.iter().map(|tag| tag.len() + 16).sum();
        let selection: usize = self.selection.iter().map(|(_, value)| value.as_ref().map_or(0, |v| v.len()) + 48).sum();
        300 + fields + tags + selection + self.body.len()
    }

    /// The response to a request that may have it, with its age: whole, a part, or word that the client has it already.
    pub fn answer(&self, request: &HeaderMap, head: bool, now: u64) -> Response<Bytes> {
        let mut response = Response::new(Bytes::new());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        *headers = crate::http1::head::take_map();
        headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        headers.insert(header::AGE, HeaderValue::from(self.age(now)));
        if self.status != StatusCode::OK {
            if !head {
                *response.body_mut() = self.body.clone();
            }
            return response;
        }
        if range::is_current(request, &self.headers, self.came / 1000) {
            for name in OF_BODY {
                headers.remove(name);
            }
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            return response;
        }
        let length = self.body.len() as u64;
        let asked = request.get(header::RANGE).filter(|_| !head && range::holds(request, &self.headers));
        let part = asked.map_or(Part::Whole, |asked| range::part(asked.as_bytes(), length));
        let (status, body, told) = match part {
            Part::Whole => {
                if !head {
                    *response.body_mut() = self.body.clone();
                }
                return response;
            }
            Part::Bytes(first, last) => {
                let from = usize::try_from(first).unwrap_or(usize::MAX).min(self.body.len());
                let to = usize::try_from(last).unwrap_or(usize::MAX).saturating_add(1).min(self.body.len());
                let told = format!("bytes {first}-{last}/{length}");
                (StatusCode::PARTIAL_CONTENT, self.body.slice(from..to), told)
            }
            Part::Nothing => {
                // It says nothing of the whole, nor may anybody keep it for that.
                for name in OF_WHOLE {
                    headers.remove(name);
                }
                (StatusCode::RANGE_NOT_SATISFIABLE, Bytes::new(), format!("bytes */{length}"))
            }
        };
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        if let Ok(told) = HeaderValue::try_from(told) {
            headers.insert(header::CONTENT_RANGE, told);
        }
        *response.status_mut() = status;
        *response.body_mut() = body;
        response
    }
}

/// Fields of a body that a 304 does not have.
const OF_BODY: [HeaderName; 5] = [
    header::CONTENT_LENGTH,
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_RANGE,
];

/// Fields of a whole answer that word of a bad range does not have.
const OF_WHOLE: [HeaderName; 8] = [
    header::CACHE_CONTROL,
    header::EXPIRES,
    header::ETAG,
    header::LAST_MODIFIED,
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    super::policy::CDN_CACHE_CONTROL,
];

/// The fields of an answer that are kept.
pub fn keepable(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        let passing = *name == header::AGE
            || *name == header::TRAILER
            || *name == header::PROXY_AUTHENTICATE
            || *name == PROXY_AUTHENTICATION_INFO
            || *name == fields::PROXY_STATUS
            || *name == CACHE_STATUS
            || *name == fields::RATELIMIT
            || *name == fields::RATELIMIT_POLICY
            || fields::is_hop_by_hop(name.as_str());
        if !passing {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

/// What an answer can be purged by; nothing where not all of it can be remembered.
pub fn tags(headers: &HeaderMap) -> Option<Vec<Box<str>>> {
    let mut tags: Vec<Box<str>> = Vec::new();
    for name in [SURROGATE_KEY, CACHE_TAG] {
        let commas = name == CACHE_TAG;
        let ends = |byte: &u8| if commas { *byte == b',' } else { byte.is_ascii_whitespace() };
        for line in headers.get_all(&name) {
            for tag in line.as_bytes().split(ends).map(<[u8]>::trim_ascii).filter(|tag| !tag.is_empty()) {
                tags.push(std::str::from_utf8(tag).ok()?.into());
            }
        }
    }
    (tags.len() <= TAGS).then_some(tags)
}

/// All kept answers of one resource, for one way to it; the newest first.
#[derive(Debug, Default)]
pub struct Resource {
    /// The answers.
    pub variants: Vec<Arc<Stored>>,
    /// About how much memory they take, the key included.
    pub size: usize,
}

/// Answers of one resource, at most.
const VARIANTS: usize = 32;

impl Resource {
    /// The newest that a request may have by what it depended on (RFC 9111 §4.1).
    pub fn select(&self, request: &HeaderMap) -> Option<&Arc<Stored>> {
        self.variants.iter().find(|stored| super::vary::matches(&stored.selection, request))
    }

    /// With one more, in the place of any that answered the same requests; the oldest go where there is not `room` for all.
    #[must_use]
    pub fn with(&self, new: &Arc<Stored>, key: usize, room: usize) -> Self {
        let others = self.variants.iter().filter(|stored| stored.selection != new.selection);
        let mut size = key + 100;
        let fits = |stored: &&Arc<Stored>| {
            size += stored.size();
            size <= room
        };
        let variants = std::iter::once(new).chain(others).take(VARIANTS).take_while(fits).cloned();
        let variants: Vec<_> = variants.collect();
        Self { size: key + 100 + variants.iter().map(|stored| stored.size()).sum::<usize>(), variants }
    }

    /// Without what does not hold.
    #[must_use]
    pub fn only(&self, holds: impl Fn(&Stored) -> bool, key: usize) -> Self {
        let variants: Vec<_> = self.variants.iter().filter(|stored| holds(stored)).cloned().collect();
        Self { size: key + 100 + variants.iter().map(|stored| stored.size()).sum::<usize>(), variants }
    }
}

/// A body in one piece.
pub fn join(chunks: &[Bytes]) -> Bytes {
    if let [one] = chunks {
        return one.clone();
    }
    let mut whole = BytesMut::with_capacity(chunks.iter().map(Bytes::len).sum());
    for chunk in chunks {
        whole.extend_from_slice(chunk);
    }
    whole.freeze()
}
