//! What the admin calls answer.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{json, problem, text};
use crate::{
    cache::marks::Purge,
    claims::Claims,
    config::values::Share,
    inventory::import,
    resilience::{breaker::State, millis},
    rollout::controller::{Done, Refused, Wish},
    routing::path::{self, PathPolicy},
    server::Control,
    shadow::record::Recorder,
    snapshot::{Reloaded, Route, Snapshot, explain},
    telemetry::metrics::{self, Arm, FALLBACKS, SERVED},
    upstream::{Upstream, endpoint::Endpoint},
};

/// The page for a scrape, made by a thread that gives way to those that serve: with many routes it takes milliseconds.
pub(super) async fn metrics(control: &Control, turns: &Arc<Semaphore>) -> Response<Bytes> {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let (store, numbers) = (control.store.clone(), control.keeper.numbers());
    // One after the other: each would make the others slower.
    let Ok(turn) = turns.clone().acquire_owned().await else {
        return problem(StatusCode::SERVICE_UNAVAILABLE, "the gateway is stopping");
    };
    let (reply, page) = oneshot::channel();
    let begun = std::thread::Builder::new().name("metrics".to_owned()).spawn(move || {
        // Of this thread alone, as Linux has it.
        let _ = rustix::process::nice(19);
        let _ = reply.send(metrics::encode(store, numbers).map_err(|error| error.to_string()));
        drop(turn);
    });
    let page = match begun {
        Ok(_) => page.await.unwrap_or_else(|_| Err("making the page panicked".to_owned())),
        Err(error) => Err(error.to_string()),
    };
    match page {
        Ok(page) => text(StatusCode::OK, kind, page),
        Err(why) => problem(StatusCode::INTERNAL_SERVER_ERROR, &why),
    }
}

pub(super) fn status(control: &Control) -> Value {
    let snapshot = control.store.current();
    let status = control.store.status();
    let process = &control.store.process;
    let public = control.public.lock().map(|address| address.to_string()).unwrap_or_default();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "started": control.started.to_string(),
        "ready": control.ready.load(Relaxed),
        "workers": control.store.workers,
        "listen": public,
        "connections": process.clients.load(Relaxed),
        "tunnels": process.tunnels.load(Relaxed),
        "config": {
            "file": control.store.path().display().to_string(),
            "files": status.seen.files,
            // The one that workers look at: it is told once they can see it.
            "generation": control.store.generation(),
            "hash": format!("{:016x}", snapshot.hash),
            "loaded": snapshot.loaded.to_string(),
            "current": status.error.is_none(),
            "error": status.error,
            "diagnostics": status.refused.map(|report| report.diagnostics),
            "warnings": status.warnings.diagnostics,
        },
        "requests": process.requests.load(Relaxed),
        "upstreams": snapshot.upstreams.iter().map(|upstream| describe_upstream(upstream)).collect::<Vec<_>>(),
        "cache": snapshot.cache.as_ref().map(|cache| {
            let (resources, bytes) = cache.occupancy();
            let redis = cache.shared().map(|shared| if shared.is_up() { "up" } else { "down" });
            json!({"resources": resources, "bytes": bytes, "redis": redis})
        }),
        "verifiers": snapshot.verifiers.iter().map(|verifier| json!({"name": *verifier.name, "keys": verifier.count(), "failures": verifier.failures()})).collect::<Vec<_>>(),
        "recording": control.store.recorder().is_some(),
        "state": {
            "folder": control.store.state.display().to_string(),
            "error": control.rollouts.trouble(),
            "inventory_error": control.keeper.trouble(),
        },
        "routes": routes(control),
    })
}

pub(super) fn describe_upstream(upstream: &Upstream) -> Value {
    let now = millis(tokio::time::Instant::now());
    let breaker = upstream.breaker.as_ref().map(|breaker| {
        let (requests, failures) = breaker.counts(now);
        let state = breaker.state();
        let retry_after = match state {
            State::Open(until) => Some(until.saturating_sub(now)),
            State::Closed | State::HalfOpen => None,
        };
        json!({"state": state.word(), "requests": requests, "failures": failures, "retry_after_ms": retry_after})
    });
    let (in_flight, pending) = upstream.bulkhead.occupancy();
    let places = json!({
        "in_flight": in_flight, "max": upstream.max_requests, "pending": pending, "max_pending": upstream.max_pending,
    });
    let endpoint = |endpoint: &Arc<Endpoint>| {
        let vitals = &endpoint.vitals;
        let state = match (vitals.is_up(), vitals.is_ejected(now)) {
            (false, _) => "unhealthy",
            (true, true) => "ejected",
            (true, false) => "healthy",
        };
        json!({"address": *endpoint.name, "state": state, "in_flight": vitals.flying()})
    };
    json!({
        "name": *upstream.name,
        "url": upstream.address(),
        "connections": upstream.stats.open.load(Relaxed),
        "connects_failed": upstream.stats.failed.load(Relaxed),
        "breaker": breaker,
        "requests": places,
        "endpoints": upstream.endpoints.load().iter().map(endpoint).collect::<Vec<_>>(),
    })
}

pub(super) fn routes(control: &Control) -> Value {
    let snapshot = control.store.current();
    snapshot.routes.iter().map(|route| describe(route, &snapshot, &control.rollouts.view(&route.name))).collect()
}

/// A name may be a path: accepted as it is and percent-encoded.
fn find<'s>(snapshot: &'s Snapshot, name: &str) -> Result<&'s Route, Response<Bytes>> {
    let decoded = percent_decode(name);
    let found = snapshot.routes.iter().find(|route| &*route.name == name || *route.name == *decoded);
    found.ok_or_else(|| {
        let name = decoded.escape_debug();
        problem(StatusCode::NOT_FOUND, &format!("no route is called `{name}`; `/api/routes` lists them"))
    })
}

pub(super) fn route(control: &Control, name: &str) -> Response<Bytes> {
    let snapshot = control.store.current();
    match find(&snapshot, name) {
        Ok(route) => json(StatusCode::OK, &describe(route, &snapshot, &control.rollouts.view(&route.name))),
        Err(refusal) => refusal,
    }
}

pub(super) fn shadow(snapshot: &Snapshot, name: &str) -> Response<Bytes> {
    let route = match find(snapshot, name) {
        Ok(route) => route,
        Err(refusal) => return refusal,
    };
    match &route.shadow {
        Some(shadow) => {
            let mut told = shadow.describe();
            told["route"] = (*route.name).into();
            json(StatusCode::OK, &told)
        }
        None => problem(
            StatusCode::NOT_FOUND,
            &format!(
                "route `{}` sends no copies; write `stage: shadow`, or `shadow:` beside its `canary:`",
                route.name
            ),
        ),
    }
}

/// What a path asks to be done, and of which route.
pub(super) fn wish(path: &str) -> Option<(&str, Wish)> {
    let (name, word) = path.strip_prefix("/api/routes/")?.rsplit_once('/')?;
    let wish = match word {
        "rollback" => Wish::Rollback { force: false },
        "promote" => Wish::Promote { from: None },
        "resume" => Wish::Resume,
        _ => return None,
    };
    Some((name, wish))
}

/// Who wants it, and why.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Signed {
    who: String,
    why: String,
    force: bool,
    /// The share that a promotion begins at.
    from: Option<Share>,
}

/// What a person says about themselves, at most.
const SAID: usize = 500;

pub(super) async fn grant(control: &Control, name: &str, wish: Wish, body: &Bytes) -> Response<Bytes> {
    let signed = if body.trim_ascii().is_empty() { Ok(Signed::default()) } else { serde_json::from_slice(body) };
    let Signed { who, why, force, from } = match signed {
        Ok(signed) => signed,
        Err(error) => {
            let help = "send {\"who\": \"name\", \"why\": \"reason\"}, or nothing";
            return problem(StatusCode::BAD_REQUEST, &format!("{error}; {help}"));
        }
    };
    let told = |text: String, else_: &str| {
        let text: String = text.chars().filter(|char| !char.is_control()).take(SAID).collect();
        if text.is_empty() { else_.to_owned() } else { text }
    };
    let wish = match wish {
        Wish::Rollback { .. } => Wish::Rollback { force },
        Wish::Promote { .. } => Wish::Promote { from },
        Wish::Resume => Wish::Resume,
    };
    let snapshot = control.store.current();
    let name = match find(&snapshot, name) {
        Ok(route) => route.name.to_string(),
        Err(refusal) => return refusal,
    };
    let who = told(who, "admin API");
    match control.rollouts.wish(name, wish, who, told(why, "no reason given")).await {
        Ok(Done { entry: Some(entry), warning }) => {
            json(StatusCode::OK, &json!({"result": "done", "change": entry, "warning": warning}))
        }
        Ok(Done { entry: None, .. }) => json(StatusCode::OK, &json!({"result": "unchanged"})),
        Err(Refused::Unknown(why)) => problem(StatusCode::NOT_FOUND, &why),
        Err(Refused::Conflict(why)) => problem(StatusCode::CONFLICT, &why),
        Err(Refused::Failed(why)) => problem(StatusCode::SERVICE_UNAVAILABLE, &why),
    }
}

/// Changes that are shown where nobody says how many.
const CHANGES: usize = 100;

pub(super) async fn history(control: &Control, query: &str) -> Response<Bytes> {
    let (mut route, mut limit) = (None, CHANGES);
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match name {
            "route" => route = Some(percent_decode(value)),
            "limit" => match value.parse() {
                Ok(number @ 1..=10_000) => limit = number,
                _ => return problem(StatusCode::BAD_REQUEST, "`limit` is a number from 1 to 10000"),
            },
            _ => {}
        }
    }
    match control.rollouts.history(route, limit).await {
        Ok(entries) => json(StatusCode::OK, &json!({"changes": entries})),
        Err(why) => problem(StatusCode::SERVICE_UNAVAILABLE, &why),
    }
}

pub(super) async fn inventory(control: &Control) -> Response<Bytes> {
    match control.keeper.document().await.map(|document| serde_json::to_vec(&document)) {
        Ok(Ok(text)) => text_of(text),
        Ok(Err(error)) => problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        Err(why) => problem(StatusCode::SERVICE_UNAVAILABLE, &why),
    }
}

fn text_of(json: Vec<u8>) -> Response<Bytes> {
    text(StatusCode::OK, "application/json", json)
}

pub(super) async fn progress(control: &Control) -> Response<Bytes> {
    match control.keeper.progress(0).await {
        Ok(told) => text_of(told.to_string().into_bytes()),
        Err(why) => problem(StatusCode::SERVICE_UNAVAILABLE, &why),
    }
}

/// Adds an OpenAPI document, or another inventory.
pub(super) async fn import(control: &Control, body: &Bytes) -> Response<Bytes> {
    if !control.store.current().inventory {
        return problem(StatusCode::CONFLICT, "the file says `inventory: none`; nothing is kept");
    }
    // Reading it may take a while, and this thread serves all calls.
    let text = body.clone();
    let read = tokio::task::spawn_blocking(move || {
        std::str::from_utf8(&text).map_err(|error| error.to_string()).and_then(import::document)
    });
    let document = match read.await {
        Ok(Ok(document)) => document,
        Ok(Err(why)) => return problem(StatusCode::BAD_REQUEST, &why),
        Err(error) => return problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    };
    match control.keeper.import(document).await {
        Ok(endpoints) => json(StatusCode::OK, &json!({"result": "imported", "endpoints": endpoints})),
        Err(why) => problem(StatusCode::SERVICE_UNAVAILABLE, &why),
    }
}

fn percent_decode(text: &str) -> String {
    String::from_utf8_lossy(&path::decode(text)).into_owned()
}

pub(super) fn describe(route: &Route, snapshot: &Snapshot, overlay: &Value) -> Value {
    let name = |index: usize| &*snapshot.upstreams[index].name;
    let arms: serde_json::Map<String, Value> = Arm::ALL
        .into_iter()
        .map(|arm| {
            let totals = route.stats.totals(arm);
            let [_, ok, redirected, client, server, aborted] = totals.classes;
            let p99 = route.stats.quantile(arm, 0.99).map(|p99| (p99 * 1e5).round() / 100.0);
            let counts = json!({"2xx": ok, "3xx": redirected, "4xx": client, "5xx": server, "aborted": aborted, "in_flight": totals.in_flight, "p99_ms": p99});
            (arm.word().to_owned(), counts)
        })
        .collect();
    json!({
        "name": *route.name,
        "match": *route.path,
        "tags": route.tags,
        "stage": route.stage.word(),
        "service": route.service.map(name),
        "baseline": name(route.baseline),
        "runs": route.runs().word(),
        "share": route.share().map(|share| Share(share).to_string()),
        "overlay": overlay_text(route, overlay),
        "held": overlay["held"],
        "rollout": overlay["rollout"],
        "shadow": route.shadow.as_ref().map(|shadow| {
            let ledger = shadow.ledger();
            let mut told = json!({"compared": ledger.compared, "mismatched": ledger.mismatched, "parity_percent": ledger.parity()});
            drop(ledger);
            for (name, count) in shadow.counts() {
                told[name] = count.into();
            }
            told
        }),
        "group": route.cohort.as_ref().map(|values| values.cohort.group.to_string()),
        "requests": arms,
        "retries": route.stats.rare.retries.load(Relaxed),
        "auth_refused": route.stats.rare.unauthorized.load(Relaxed),
        "rate_limited": route.stats.rare.limited.load(Relaxed),
        "auth": route.auth.as_ref().map(|auth| auth.verifier.name.to_string()),
        "cache": route.cache.map(|_| SERVED.into_iter().zip(&route.stats.rare.cache).map(|(word, count)| (word.to_owned(), count.load(Relaxed).into())).collect::<serde_json::Map<String, Value>>()),
        "fallbacks": FALLBACKS.into_iter().zip(&route.stats.rare.fallbacks).map(|(reason, count)| (reason.to_owned(), count.load(Relaxed).into())).collect::<serde_json::Map<String, Value>>(),
    })
}

/// How what runs differs from what the file says, in words.
fn overlay_text(route: &Route, overlay: &Value) -> Option<String> {
    let stage = route.stage.word();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    // To the second, as people say it.
    let moment = |value: &Value| {
        text(value).parse().map_or_else(|_| text(value), |at: jiff::Timestamp| at.strftime("%FT%TZ").to_string())
    };
    if route.overlay.hold.is_held() {
        let held = &overlay["held"];
        return Some(format!(
            "the file says {stage}; put back to the monolith {} by {}: {}",
            moment(&held["at"]),
            text(&held["who"]),
            text(&held["why"])
        ));
    }
    let rollout = overlay.get("rollout").filter(|rollout| !rollout.is_null())?;
    let how = match rollout["phase"].as_str() {
        Some("rolled_back") => "rolled back ",
        Some("frozen") => "frozen ",
        Some("complete") => "complete ",
        _ => "since ",
    };
    Some(format!(
        "the file says {stage} with rollout; running at {}, {how}{}: {}",
        text(&rollout["share"]),
        moment(&rollout["since"]),
        text(&rollout["why"])
    ))
}

pub(super) async fn reload(control: &Arc<Control>) -> Response<Bytes> {
    match control.reload("POST /api/reload").await {
        Ok(Reloaded::Loaded(generation)) => {
            json(StatusCode::OK, &json!({"result": "reloaded", "generation": generation}))
        }
        Ok(Reloaded::Unchanged) => json(StatusCode::OK, &json!({"result": "unchanged"})),
        Err(report) => {
            let told = json!({
                "type": "about:blank",
                "title": "The file was refused",
                "status": 422,
                "detail": "what ran before goes on running; mend the file and reload again",
                "errors": report.diagnostics,
            });
            crate::error::problem_response(StatusCode::UNPROCESSABLE_ENTITY, &told)
        }
    }
}

/// A request to explain.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    #[serde(default = "get")]
    method: String,
    url: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    /// What its token would say, taken for verified.
    #[serde(default)]
    claims: serde_json::Map<String, Value>,
    client: Option<IpAddr>,
}

/// What to forget: one of these.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ToPurge {
    url: Option<String>,
    prefix: Option<String>,
    route: Option<String>,
    tag: Option<String>,
    all: Option<bool>,
}

impl ToPurge {
    fn read(self, paths: PathPolicy) -> Result<Purge, String> {
        let Self { url, prefix, route, tag, all } = self;
        // A host that is left out is every host.
        let place = |text: &str| {
            let uri: Uri = text.parse().ok().filter(|_| !text.is_empty())?;
            let host = uri.authority().map(ToString::to_string).unwrap_or_default();
            let target = uri.path_and_query().filter(|target| target.as_str().starts_with('/'))?;
            // As it goes on, so as it is kept.
            let path = path::read(target.path(), paths).ok()?.forward.into_owned();
            let target = target.query().map_or(path.clone(), |query| format!("{path}?{query}"));
            Some((host.to_ascii_lowercase(), target))
        };
        let wrong = |text: &str| format!("not a URL: `{text}`; write `https://shop.example.com/path?query` or `/path`");
        match (url, prefix, route, tag, all) {
            (Some(url), None, None, None, None) => {
                place(&url).map(|(host, target)| Purge::Url(host, target)).ok_or_else(|| wrong(&url))
            }
            (None, Some(prefix), None, None, None) => {
                place(&prefix).map(|(host, target)| Purge::Prefix(host, target)).ok_or_else(|| wrong(&prefix))
            }
            (None, None, Some(route), None, None) => Ok(Purge::Route(route)),
            (None, None, None, Some(tag), None) => Ok(Purge::Tag(tag)),
            (None, None, None, None, Some(true)) => Ok(Purge::All),
            _ => Err("say one thing to forget".to_owned()),
        }
    }
}

pub(super) async fn purge(snapshot: &Snapshot, body: &Bytes) -> Response<Bytes> {
    let read = serde_json::from_slice(body).map_err(|error| error.to_string());
    let read = read.and_then(|asked: ToPurge| asked.read(snapshot.paths));
    let purge = match read {
        Ok(purge) => purge,
        Err(why) => {
            let help = "send one of {\"url\": \"https://host/path?query\"}, {\"prefix\": \"https://host/path\"}, {\"route\": \"name\"}, {\"tag\": \"surrogate key\"}, {\"all\": true}";
            return problem(StatusCode::BAD_REQUEST, &format!("{why}; {help}"));
        }
    };
    if let Purge::Route(name) = &purge
        && !snapshot.routes.iter().any(|route| *route.name == **name)
    {
        let name = name.escape_debug();
        return problem(StatusCode::NOT_FOUND, &format!("no route is called `{name}`; `/api/routes` lists them"));
    }
    let Some(cache) = &snapshot.cache else {
        return json(StatusCode::OK, &json!({"result": "purged", "resources": 0, "gateways": "this"}));
    };
    let (resources, told) = cache.purge(purge).await;
    match told {
        Some(false) => {
            let told = json!({
                "type": "about:blank",
                "title": "Only this gateway has purged",
                "status": 503,
                "detail": "Redis does not answer; the others are told when it does. To know that they were, purge again",
                "resources": resources,
            });
            crate::error::problem_response(StatusCode::SERVICE_UNAVAILABLE, &told)
        }
        told => {
            let gateways = if told.is_some() { "all" } else { "this" };
            json(StatusCode::OK, &json!({"result": "purged", "resources": resources, "gateways": gateways}))
        }
    }
}

/// How long one may take.
const RECORDING: std::time::Duration = std::time::Duration::from_hours(1);
/// Lines of a recording that wait for their reader.
const LINES: usize = 64;

/// Begins a recording; what it brings.
pub(super) fn record(control: &Control, query: &str) -> Result<mpsc::Receiver<Bytes>, Response<Bytes>> {
    let wrong = |text: String| problem(StatusCode::BAD_REQUEST, &text);
    let (lines, receiver) = mpsc::channel(LINES);
    let mut recorder = Recorder {
        share: 100,
        route: None,
        headers: Vec::new(),
        query: Vec::new(),
        until: tokio::time::Instant::now() + RECORDING,
        lines,
    };
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        let value = percent_decode(value);
        match name {
            "percent" => recorder.share = value.parse::<Share>().map_err(wrong)?.0,
            "route" => recorder.route = Some(find(&control.store.current(), &value)?.name.to_string()),
            "header" => match value.parse() {
                Ok(header) => recorder.headers.push(header),
                Err(_) => return Err(wrong(format!("not a header's name: `{value}`"))),
            },
            "query" => recorder.query.push(value),
            _ => {
                return Err(wrong(format!(
                    "unknown parameter: `{name}`; known: `percent`, `route`, `header`, `query`"
                )));
            }
        }
    }
    match control.store.record(recorder) {
        Ok(()) => Ok(receiver),
        Err(_) => Err(problem(StatusCode::CONFLICT, "somebody records already; one recording at a time")),
    }
}

fn get() -> String {
    "GET".to_owned()
}

pub(super) fn explain(snapshot: &Snapshot, body: &Bytes) -> Response<Bytes> {
    let told = serde_json::from_slice(body).map_err(|error| error.to_string()).and_then(|asked: Asked| {
        let method =
            Method::from_bytes(asked.method.as_bytes()).map_err(|_| format!("not a method: `{}`", asked.method))?;
        let url: Uri = asked.url.parse().map_err(|_| format!("not a URL: `{}`", asked.url))?;
        let mut headers = HeaderMap::new();
        for (name, value) in asked.headers {
            let pair = (name.parse::<HeaderName>(), HeaderValue::try_from(value));
            let (Ok(name), Ok(value)) = pair else { return Err(format!("not a header: `{name}`")) };
            headers.append(name, value);
        }
        let client = asked.client.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let claims = asked.claims.into_iter().map(|(name, value)| (name.into(), value)).collect();
        serde_json::to_value(explain::explain(snapshot, &method, &url, headers, &Claims::new(claims), client))
            .map_err(|error| error.to_string())
    });
    match told {
        Ok(told) => json(StatusCode::OK, &told),
        Err(why) => problem(
            StatusCode::BAD_REQUEST,
            &format!("{why}; send {{\"method\": \"GET\", \"url\": \"/path\", \"headers\": {{}}}}"),
        ),
    }
}
