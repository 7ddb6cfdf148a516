//! The board: a page that shows the migration, and what it shows, as it changes.
//!
//! The files are in the executable, of this project but for the chart library; no build step, nothing from elsewhere. The page
//! gets everything by the calls that anybody can make; what it shows of traffic it sets as text, never as markup.

use std::{
    cell::RefCell,
    collections::HashMap,
    rc::Rc,
    sync::{Arc, OnceLock, atomic::Ordering::Relaxed},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::{
    sync::{broadcast::error::RecvError, mpsc},
    time::Instant,
};

use super::{api, problem};
use crate::server::Control;

/// How often what changed is sent.
const TICK: Duration = Duration::from_secs(1);
/// How often the progress is, in ticks.
const PROGRESS: u64 = 5;

/// How long a reader may take none of it.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// The files: path, type, content.
const FILES: [(&str, &str, &[u8]); 7] = [
    ("/", "text/html; charset=utf-8", include_bytes!("board/index.html")),
    ("/board.css", "text/css; charset=utf-8", include_bytes!("board/board.css")),
    ("/board.js", "text/javascript; charset=utf-8", include_bytes!("board/board.js")),
    ("/fig.svg", "image/svg+xml", include_bytes!("board/fig.svg")),
    ("/uplot.css", "text/css; charset=utf-8", include_bytes!("board/uplot.min.css")),
    ("/uplot.js", "text/javascript; charset=utf-8", include_bytes!("board/uplot.min.js")),
    ("/uplot.LICENSE", "text/plain; charset=utf-8", include_bytes!("board/uplot.LICENSE")),
];

/// Nothing but these files, no script or style in the page itself, no frame around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

/// Whether it is one of the files.
pub(super) fn has(path: &str) -> bool {
    FILES.iter().any(|(name, ..)| *name == path)
}

/// One of the files.
pub(super) fn file(parts: &http::request::Parts) -> Response<Bytes> {
    static TAGS: OnceLock<Vec<HeaderValue>> = OnceLock::new();
    let tags = TAGS.get_or_init(|| {
        let tag = |content: &[u8]| format!("\"{:016x}\"", twox_hash::XxHash3_64::oneshot(content));
        FILES.iter().filter_map(|(_, _, content)| HeaderValue::try_from(tag(content)).ok()).collect()
    });
    let found = FILES.iter().zip(tags).find(|((name, ..), _)| *name == parts.uri.path());
    let Some(((_, kind, content), tag)) = found else { return problem(StatusCode::NOT_FOUND, "no such file") };
    if !matches!(parts.method, Method::GET | Method::HEAD) {
        let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, "use GET, HEAD");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let known = parts.headers.get(header::IF_NONE_MATCH).is_some_and(|known| known == tag);
    let mut response = Response::new(if known { Bytes::new() } else { Bytes::from_static(content) });
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, *kind),
        (header::CACHE_CONTROL, "no-cache"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert("cross-origin-opener-policy", HeaderValue::from_static("same-origin"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    headers.insert(header::ETAG, tag.clone());
    response
}

/// A name with what is to be shown under it, as JSON.
type Row = (Arc<str>, Arc<str>);

/// What all boards show at a moment.
#[derive(Default)]
struct Picture {
    meta: Arc<str>,
    routes: Vec<Row>,
    upstreams: Vec<Row>,
}

/// What boards show, made once a tick for all of them.
#[derive(Default)]
pub(super) struct Shown(RefCell<Option<(Instant, Rc<Picture>)>>);

impl Shown {
    fn now(&self, control: &Control) -> Rc<Picture> {
        let mut known = self.0.borrow_mut();
        match &*known {
            Some((when, picture)) if when.elapsed() < TICK / 2 => picture.clone(),
            _ => {
                let picture = Rc::new(draw(control));
                *known = Some((Instant::now(), picture.clone()));
                picture
            }
        }
    }
}

fn draw(control: &Control) -> Picture {
    let snapshot = control.store.current();
    let status = control.store.status();
    let lately = control.keeper.lately();
    let trouble: Vec<String> = [control.rollouts.trouble(), control.keeper.trouble()].into_iter().flatten().collect();
    let meta = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "started": control.started.to_string(),
        "ready": control.ready.load(Relaxed),
        "config": {
            "file": control.store.path().display().to_string(),
            "generation": control.store.generation(),
            "loaded": snapshot.loaded.to_string(),
            "current": status.error.is_none(),
            "error": status.error,
            "warnings": status.warnings.diagnostics.len(),
        },
        "trouble": trouble,
    });
    let row = |name: &Arc<str>, value: Value| (name.clone(), Arc::from(value.to_string()));
    let routes = snapshot.routes.iter().map(|route| {
        let mut told = api::describe(route, &snapshot, &control.rollouts.view(&route.name));
        let [legacy, service] = lately.get(&route.name).copied().unwrap_or_default();
        told["now"] = json!({"legacy": legacy, "service": service});
        row(&route.name, told)
    });
    let upstreams = snapshot.upstreams.iter().map(|upstream| row(&upstream.name, api::describe_upstream(upstream)));
    Picture { meta: meta.to_string().into(), routes: routes.collect(), upstreams: upstreams.collect() }
}

/// What one board has been sent.
#[derive(Default)]
struct Sent {
    meta: Arc<str>,
    routes: HashMap<Arc<str>, Arc<str>>,
    upstreams: HashMap<Arc<str>, Arc<str>>,
    order: [Vec<Arc<str>>; 2],
}

impl Sent {
    /// What is new since then, as an event; nothing where nothing is.
    fn follow(&mut self, picture: &Picture) -> Option<Bytes> {
        let meta = (self.meta != picture.meta).then(|| picture.meta.clone());
        let order = [&picture.routes, &picture.upstreams]
            .map(|rows| rows.iter().map(|(name, _)| name.clone()).collect::<Vec<Arc<str>>>());
        let differs = |n: usize| {
            (self.order[n] != order[n]).then(|| json!(order[n].iter().map(|name| &**name).collect::<Vec<_>>()))
        };
        let (names, systems) = (differs(0), differs(1));
        let changed = |known: &mut HashMap<Arc<str>, Arc<str>>, rows: &[Row], others: bool| -> Vec<Arc<str>> {
            if others {
                known.retain(|name, _| rows.iter().any(|(row, _)| row == name));
            }
            rows.iter()
                .filter(|(name, text)| known.insert(name.clone(), text.clone()).as_ref() != Some(text))
                .map(|(_, text)| text.clone())
                .collect()
        };
        let routes = changed(&mut self.routes, &picture.routes, names.is_some());
        let upstreams = changed(&mut self.upstreams, &picture.upstreams, systems.is_some());
        if meta.is_none() && names.is_none() && systems.is_none() && routes.is_empty() && upstreams.is_empty() {
            return None;
        }
        self.meta = picture.meta.clone();
        self.order = order;
        let meta = meta.unwrap_or_else(|| "null".into());
        let (names, systems) = (names.unwrap_or_default(), systems.unwrap_or_default());
        let (routes, upstreams) = (routes.join(","), upstreams.join(","));
        Some(
            format!(
                "event: state\ndata: {{\"meta\":{meta},\"names\":{names},\"systems\":{systems},\"routes\":[{routes}],\"upstreams\":[{upstreams}]}}\n\n"
            )
            .into(),
        )
    }
}

/// Shows what is and what changes, for as long as somebody looks who may.
pub(super) async fn show(control: Arc<Control>, shown: Rc<Shown>, lines: mpsc::Sender<Bytes>) {
    let token = control.store.current().admin_token.clone();
    let mut sent = Sent::default();
    let mut events = control.rollouts.subscribe();
    let mut after = 0;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for n in 0_u64.. {
        // Who came with a token that is none any more comes again.
        if control.store.current().admin_token != token {
            return;
        }
        let mut text = sent.follow(&shown.now(&control)).unwrap_or_else(|| Bytes::from_static(b": alive\n\n"));
        if n.is_multiple_of(PROGRESS)
            && let Ok(progress) = control.keeper.progress(after).await
        {
            let newest = progress["points"].as_array().and_then(|points| points.last()?["at"].as_u64());
            after = newest.and_then(|at| u32::try_from(at).ok()).unwrap_or(after);
            text = [&text[..], b"event: progress\ndata: ", progress.to_string().as_bytes(), b"\n\n"].concat().into();
        }
        if lines.send_timeout(text, PATIENCE).await.is_err() {
            return;
        }
        loop {
            tokio::select! {
                _ = tick.tick() => break,
                () = lines.closed() => return,
                event = events.recv() => {
                    let text: Bytes = match event {
                        Ok(event) => format!("event: change\ndata: {event}\n\n").into(),
                        Err(RecvError::Lagged(missed)) => format!("event: missed\ndata: {missed}\n\n").into(),
                        Err(RecvError::Closed) => return,
                    };
                    if lines.send_timeout(text, PATIENCE).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}
