//! What may be kept, for how long, and what a request asks of what is kept (RFC 9111, RFC 5861, RFC 9213): pure.
//!
//! Where the standard leaves a choice, the answer is the one that never shows one client what was meant for
//! another, and never an old answer for a new one.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::{directives::CacheControl, range::date, vary};
use crate::{fields, snapshot::Keep};

/// The targeted field that counts here (RFC 9213).
pub const CDN_CACHE_CONTROL: HeaderName = HeaderName::from_static("cdn-cache-control");
/// The share of an answer's age for which it is taken to be fresh where nothing is said (RFC 9111 §4.2.2), and how long at most.
const HEURISTIC: u64 = 10;
const HEURISTIC_MOST: u64 = 24 * 60 * 60;

/// What a request asks of what is kept (RFC 9111 §5.2.1).
#[derive(Clone, Copy, Debug, Default)]
pub struct Asks {
    control: CacheControl,
    /// Whether it brought credentials, or a cookie: what is kept must be for everybody then.
    authorized: bool,
    cookies: bool,
}

impl Asks {
    /// Of a request's fields.
    pub fn new(headers: &HeaderMap, authorized: bool, cookies: bool) -> Self {
        let mut control = CacheControl::default();
        if headers.contains_key(header::CACHE_CONTROL) {
            control = CacheControl::of(headers.get_all(header::CACHE_CONTROL));
        } else if let Some(pragma) = headers.get(header::PRAGMA) {
            // RFC 9111 §5.4
            control.no_cache = fields::tokens(pragma).any(|token| token.eq_ignore_ascii_case(b"no-cache"));
        }
        Self { control, authorized, cookies }
    }

    /// Whether only what is kept will do.
    pub fn only_if_cached(&self) -> bool {
        self.control.only_if_cached
    }

    /// Whether it is the request that wants a newer answer, and not the answer that is old.
    pub fn wants_new(&self, terms: &Terms, age: u64) -> bool {
        !terms.always_validate && terms.lifetime > age
    }

    /// Whether only a new answer will do.
    pub fn no_cache(&self) -> bool {
        self.control.no_cache
    }

    /// Whether it is known by more than what it asks for.
    pub fn is_somebodys(&self) -> bool {
        self.authorized || self.cookies
    }

    /// Whether its answer must not be kept.
    pub fn no_store(&self) -> bool {
        self.control.no_store
    }

    /// Whether it may be answered by others' answers at all.
    pub fn may_have(&self, terms: &Terms) -> bool {
        (!self.authorized || terms.for_authorized) && (!self.cookies || terms.for_cookies)
    }

    /// How an answer of this age may be used.
    pub fn judge(&self, terms: &Terms, age: u64) -> Judgement {
        let fresh = !terms.always_validate
            && terms.lifetime > age
            // Zero asks for a new one, also within the second.
            && self.control.max_age.is_none_or(|most| most > 0 && age <= most)
            && self.control.min_fresh.is_none_or(|least| terms.lifetime - age >= least);
        if fresh && !self.control.no_cache {
            return Judgement::Fresh;
        }
        let late = age.saturating_sub(terms.lifetime);
        // What the client refuses is not given to it for the upstream's sake.
        let refuses = self.control.no_cache
            || self.control.max_age.is_some_and(|most| most == 0 || age > most)
            || self.control.max_stale.is_some_and(|most| late > most)
            || self.control.min_fresh.is_some_and(|least| terms.lifetime.saturating_sub(age) < least);
        if terms.never_stale || terms.always_validate || refuses {
            return Judgement::Validate;
        }
        if self.control.max_stale.is_some_and(|most| late <= most) {
            return Judgement::Stale;
        }
        if late < terms.while_revalidate { Judgement::WhileRevalidate } else { Judgement::Validate }
    }
}

/// How an answer may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// As it is.
    Fresh,
    /// As it is, though it is stale: the client says so.
    Stale,
    /// As it is, once more, while another is fetched.
    WhileRevalidate,
    /// Once the upstream says that it is still good.
    Validate,
}

/// On what terms an answer is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a rule of its own")]
pub struct Terms {
    /// For how many seconds it is fresh.
    pub lifetime: u64,
    /// Its age when it came.
    pub age: u64,
    /// For how long after it may be used while another is fetched.
    pub while_revalidate: u64,
    /// For how long after it may be used where the upstream fails.
    pub if_error: u64,
    /// Never used stale.
    pub never_stale: bool,
    /// Never used without asking the upstream.
    pub always_validate: bool,
    /// Whether requests with credentials may have it (§3.5).
    pub for_authorized: bool,
    /// Whether requests with cookies may have it.
    pub for_cookies: bool,
}

/// When an answer was asked for and came, in seconds of Unix time.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// When it was asked for.
    pub asked: u64,
    /// When it came.
    pub came: u64,
}

/// The terms on which an answer to a GET may be kept; why not, where it may not.
pub fn terms(
    status: StatusCode,
    headers: &HeaderMap,
    asks: &Asks,
    keep: &Keep,
    times: Times,
) -> Result<Terms, &'static str> {
    let targeted = CacheControl::targeted(headers.get_all(CDN_CACHE_CONTROL));
    let control = targeted.unwrap_or_else(|| CacheControl::of(headers.get_all(header::CACHE_CONTROL)));
    if status.is_informational() || matches!(status, StatusCode::PARTIAL_CONTENT | StatusCode::NOT_MODIFIED) {
        return Err("status");
    }
    if control.must_understand && !is_understood(status) {
        return Err("must-understand");
    }
    if (control.no_store && !control.must_understand) || asks.no_store() {
        return Err("no-store");
    }
    if control.private {
        return Err("private");
    }
    if headers.contains_key(header::SET_COOKIE) {
        return Err("set-cookie");
    }
    if vary::names(headers).is_none() {
        return Err("vary");
    }
    let for_cookies = control.public || control.s_maxage.is_some();
    let for_authorized = for_cookies || control.must_revalidate;
    if asks.authorized && !for_authorized {
        return Err("authorization");
    }
    if asks.cookies && !for_cookies {
        return Err("cookie");
    }
    let made = headers.get(header::DATE).and_then(date);
    let expires = || {
        let expires = headers.get(header::EXPIRES)?;
        // What is no date is in the past (RFC 9111 §5.3).
        Some(date(expires).map_or(0, |expires| expires.saturating_sub(made.unwrap_or(times.came))))
    };
    let explicit = control.s_maxage.or(control.max_age).or_else(|| if targeted.is_some() { None } else { expires() });
    let lifetime = match explicit {
        Some(lifetime) => lifetime,
        None if !is_heuristic(status) && !control.public => return Err("no freshness"),
        None if keep.ttl.as_secs() > 0 && is_heuristic(status) => keep.ttl.as_secs(),
        None => {
            let modified = headers.get(header::LAST_MODIFIED).and_then(date);
            let age = modified.map_or(0, |modified| made.unwrap_or(times.came).saturating_sub(modified));
            (age / HEURISTIC).min(HEURISTIC_MOST)
        }
    };
    let never_stale = control.must_revalidate || control.proxy_revalidate || control.s_maxage.is_some();
    let stale = |said: Option<u64>, ours: std::time::Duration| {
        if never_stale || control.no_cache { 0 } else { said.unwrap_or(ours.as_secs()) }
    };
    let told = headers.get(header::AGE).map_or(0, |age| {
        let first = age.as_bytes().split(|byte| *byte == b',').next().unwrap_or_default().trim_ascii();
        super::directives::seconds(first)
    });
    // RFC 9111 §4.2.3
    let apparent = made.map_or(0, |made| times.came.saturating_sub(made));
    let terms = Terms {
        lifetime: if control.no_cache { 0 } else { lifetime },
        age: apparent.max(told + times.came.saturating_sub(times.asked)),
        while_revalidate: stale(control.stale_while_revalidate, keep.while_revalidate),
        if_error: stale(control.stale_if_error, keep.if_error),
        never_stale,
        always_validate: control.no_cache,
        for_authorized,
        for_cookies,
    };
    let validator = headers.contains_key(header::ETAG) || headers.contains_key(header::LAST_MODIFIED);
    // An error is not kept for the sake of a worse one.
    let stale = !status.is_client_error() && !status.is_server_error();
    let useful = terms.lifetime > terms.age || (stale && (terms.while_revalidate > 0 || terms.if_error > 0));
    if useful || validator { Ok(terms) } else { Err("stale at once") }
}

/// Statuses that say of themselves that they may be kept (RFC 9110 §15.1).
fn is_heuristic(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501)
}

/// Statuses whose meaning for a cache is known here (RFC 9111 §5.2.2.3).
fn is_understood(status: StatusCode) -> bool {
    is_heuristic(status) || matches!(status.as_u16(), 302 | 303 | 307 | 400 | 401 | 403 | 500 | 502 | 503 | 504)
}

/// Failures in whose place an older answer may be given (RFC 5861 §4).
pub fn is_failure(status: StatusCode) -> bool {
    matches!(status.as_u16(), 500 | 502 | 503 | 504)
}

/// Takes over what a 304, or a HEAD, says anew (RFC 9111 §3.2): not what tells how the stored body is to be read.
pub fn update(stored: &mut HeaderMap, new: &HeaderMap) {
    for name in new.keys() {
        let of_body = matches!(
            *name,
            header::CONTENT_LENGTH | header::CONTENT_ENCODING | header::CONTENT_TYPE | header::CONTENT_RANGE
        );
        if of_body || fields::is_hop_by_hop(name.as_str()) {
            continue;
        }
        let values: Vec<HeaderValue> = new.get_all(name).iter().cloned().collect();
        stored.remove(name);
        for value in values {
            stored.append(name.clone(), value);
        }
    }
}

#[cfg(test)]
mod tests;
