//! Keeps a verifier's keys: fetches them again in time, and when a token names one that is not there.
//!
//! One task a verifier, beside the workers. Whatever a provider does (is down, stalls, talks nonsense),
//! the last good set stays.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Source, Verifier};
use crate::{
    cache::{directives::CacheControl, range},
    upstream::{Upstream, connect},
};

/// How long one fetch may take, from the name to the last byte.
const FETCH: Duration = Duration::from_secs(5);
/// The largest set.
const LARGEST: usize = 512 * 1024;
/// When a set is fetched again whose answer says nothing of it.
const FRESH: Duration = Duration::from_mins(10);
/// Bounds of what the answer says.
const SOONEST: Duration = Duration::from_mins(1);
const LATEST: Duration = Duration::from_hours(24);
/// How often a file is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// The least time between two looks that requests ask for.
const FILE: Duration = Duration::from_millis(100);
/// The first and the longest pause after a failure.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_LATEST: Duration = Duration::from_mins(1);

/// Keeps the keys for ever.
pub async fn keep(verifier: Arc<Verifier>) {
    // When requests may ask for the next fetch.
    let mut allowed = Instant::now();
    for number in 1.. {
        verifier.progress.send_modify(|progress| {
            progress.started = number;
            progress.allowed = allowed;
        });
        let fetched = match verifier.source() {
            Source::Fixed => return,
            Source::File(path) => {
                read(path).await.and_then(|text| verifier.take(&text, true)).map(|changed| (changed, LOOK))
            }
            Source::Url(upstream, target) => match timeout(FETCH, fetch(upstream, target)).await {
                Ok(Ok((text, fresh))) => verifier.take(&text, false).map(|changed| (changed, fresh)),
                Ok(Err(why)) => Err(why),
                Err(_) => Err(format!("no whole answer within {} s", FETCH.as_secs())),
            },
        };
        let failed = fetched.is_err();
        let pause = tell(&verifier, fetched);
        verifier.note_absent(number, failed);
        verifier.progress.send_modify(|progress| {
            progress.ended = number;
            progress.failed = failed;
        });
        // Not all gateways at the same moment.
        let next = Instant::now() + pause.mul_f64(1.0 - f64::from(spread(number)) / 1000.0);
        let mut wanted = false;
        loop {
            tokio::select! {
                () = sleep_until(next) => break,
                () = verifier.wanted.notified(), if !wanted => wanted = true,
                () = sleep_until(allowed), if wanted => break,
            }
        }
        // Whoever asked is served by a fetch that was due anyway, too.
        if wanted {
            // A file is nobody else's to spare.
            let pause = if matches!(verifier.source(), Source::File(_)) { FILE } else { verifier.cooldown };
            allowed = Instant::now() + pause;
        }
    }
}

/// Says how it went; when to fetch again.
fn tell(verifier: &Verifier, fetched: Result<(bool, Duration), String>) -> Duration {
    let name = &*verifier.name;
    match fetched {
        Ok((changed, pause)) => {
            let failures = verifier.failures.swap(0, Relaxed);
            if changed || failures > 0 {
                tracing::info!(verifier = name, keys = verifier.count(), changed, "the keys were read");
            }
            pause
        }
        Err(why) => {
            let failures = verifier.failures.fetch_add(1, Relaxed) + 1;
            let kept = if verifier.generation() > 0 { "the last good ones stay" } else { "there are none" };
            tracing::warn!(verifier = name, why, failures, "the keys cannot be had; {kept}");
            let doubled = RETRY.saturating_mul(1 << (failures - 1).min(10));
            if matches!(verifier.source(), Source::File(_)) { LOOK } else { doubled.min(RETRY_LATEST) }
        }
    }
}

/// A number below a hundred.
fn spread(number: u64) -> u32 {
    let hash = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), number);
    u32::try_from(hash % 100).unwrap_or(0)
}

async fn read(path: &Path) -> Result<Vec<u8>, String> {
    let size = tokio::fs::metadata(path).await.map_err(|error| error.to_string())?.len();
    if size > LARGEST as u64 {
        return Err(format!("larger than {LARGEST} bytes"));
    }
    tokio::fs::read(path).await.map_err(|error| error.to_string())
}

/// Asks for a set; for how long it is fresh.
async fn fetch(upstream: &Upstream, target: &str) -> Result<(Bytes, Duration), String> {
    let endpoints = upstream.endpoints.load();
    let endpoint = endpoints.first().ok_or("no address")?;
    let io = connect::connect(upstream, endpoint).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(|error| error.to_string())?;
    let connection = Running(tokio::task::spawn_local(connection).abort_handle());
    let request = Request::get(target)
        .header(header::HOST, endpoint.authority.clone())
        .header(header::USER_AGENT, "gateway-jwks")
        .header(header::ACCEPT, "application/jwk-set+json, application/json")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| error.to_string())?;
    let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
    // A redirect is an answer like any other that is no set (RFC 8725 §3.10).
    if response.status() != StatusCode::OK {
        return Err(format!("status {}", response.status().as_u16()));
    }
    let fresh = freshness(response.headers());
    let body = Limited::new(response.into_body(), LARGEST).collect().await;
    let text = body.map_err(|error| format!("the body broke off or is larger than {LARGEST} bytes: {error}"))?;
    drop(connection);
    Ok((text.to_bytes(), fresh))
}

/// A task that ends with whoever waits for it.
struct Running(tokio::task::AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// When a set is to be fetched again.
fn freshness(headers: &HeaderMap) -> Duration {
    let control = CacheControl::of(headers.get_all(header::CACHE_CONTROL));
    let age = headers.get(header::AGE).and_then(|age: &HeaderValue| age.to_str().ok()?.parse().ok()).unwrap_or(0);
    let date = |name| headers.get(name).and_then(range::date);
    let expires = || Some(date(header::EXPIRES)?.saturating_sub(date(header::DATE)?));
    let said = control.max_age.or_else(expires).map(|seconds| Duration::from_secs(seconds.saturating_sub(age)));
    let said = if control.no_store || control.no_cache { Some(SOONEST) } else { said };
    said.unwrap_or(FRESH).clamp(SOONEST, LATEST)
}
