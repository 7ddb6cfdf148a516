//! The admin listener: the board, health, metrics, status, reload. Never on the public listener.
//!
//! Each call passes the same gate before anything else: a Host that no foreign page
//! can point at us, no cross-site request, the token where there is one, and on each POST a
//! field that a cross-site form cannot send.

mod api;
mod board;
mod gate;

use std::{
    convert::Infallible,
    net::TcpListener,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame};
use http_body_util::{BodyExt as _, Either, Full, Limited};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::{Semaphore, broadcast::error::RecvError, mpsc};

use self::board::Shown;
use crate::{error::problem_response, server::Control};

/// Connections to one admin listener at a time.
const CONNECTIONS: usize = 256;
/// The largest body of a call, and of an inventory that is imported.
const BODY: usize = 64 * 1024;
const IMPORT: usize = 32 * 1024 * 1024;
/// How long a caller may take over a head, or between two calls.
const HEAD: Duration = Duration::from_secs(30);

/// Which listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Everything, behind the gate.
    Admin,
    /// `/healthz` and `/readyz` alone, for probes.
    Health,
}

/// The admin side of the process.
#[derive(Clone)]
pub struct Admin {
    control: Arc<Control>,
    /// What boards show, made once for all of them.
    shown: Rc<Shown>,
    /// Turns of making the page of metrics.
    scraping: Arc<Semaphore>,
}

impl Admin {
    /// For this process.
    pub fn new(control: Arc<Control>) -> Self {
        Self { control, shown: Rc::default(), scraping: Arc::new(Semaphore::new(1)) }
    }

    /// Serves both listeners, and whatever takes their place.
    pub async fn serve(
        self,
        admin: TcpListener,
        health: Option<TcpListener>,
        mut commands: mpsc::Receiver<(Kind, Option<TcpListener>)>,
    ) {
        let spawn = |kind: Kind, listener: TcpListener| tokio::task::spawn_local(self.clone().listen(kind, listener));
        let mut running = [Some(spawn(Kind::Admin, admin)), health.map(|listener| spawn(Kind::Health, listener))];
        while let Some((kind, listener)) = commands.recv().await {
            let old = std::mem::replace(&mut running[kind as usize], listener.map(|listener| spawn(kind, listener)));
            if let Some(old) = old {
                old.abort();
            }
        }
    }

    async fn listen(self, kind: Kind, listener: TcpListener) {
        let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let tcp = match listener.accept().await {
                Ok((tcp, _)) => tcp,
                Err(error) => {
                    tracing::warn!(%error, "the admin listener cannot accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let this = self.clone();
            let local = tcp.local_addr().is_ok_and(|address| address.ip().is_loopback());
            tokio::task::spawn_local(async move {
                let service = service_fn(|request| this.answer(kind, local, request));
                let mut builder = http1::Builder::new();
                builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BODY);
                // A caller that hangs up is no news.
                let _ = builder.serve_connection(TokioIo::new(tcp), service).await;
                drop(place);
            });
        }
    }

    async fn answer(
        &self,
        kind: Kind,
        local: bool,
        request: Request<Incoming>,
    ) -> Result<Response<Either<Full<Bytes>, Lines>>, Infallible> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path();
        let mut response = match (kind, path) {
            (Kind::Health, "/healthz" | "/readyz") => self.health(path),
            (Kind::Health, _) => problem(StatusCode::NOT_FOUND, "this listener has `/healthz` and `/readyz` alone"),
            (Kind::Admin, _) if board::has(path) => {
                let token = self.control.store.current().admin_token.clone();
                match gate::check_page(&parts, token.as_deref(), local) {
                    Err(refusal) => refusal,
                    // What is the same in all gateways of a version may be kept by who asks each time whether it is.
                    Ok(()) => return Ok(board::file(&parts).map(|body| Either::Left(Full::new(body)))),
                }
            }
            (Kind::Admin, _) => {
                let token = self.control.store.current().admin_token.clone();
                match gate::check(&parts, token.as_deref(), local) {
                    Err(refusal) => refusal,
                    Ok(()) if path == "/api/events" && parts.method == Method::GET => return Ok(self.events()),
                    Ok(()) if path == "/api/board" && parts.method == Method::GET => {
                        let (lines, receiver) = mpsc::channel(4);
                        let viewer = board::show(self.control.clone(), self.shown.clone(), lines);
                        tokio::task::spawn_local(viewer);
                        return Ok(stream("text/event-stream", receiver));
                    }
                    Ok(()) if path == "/api/record" && parts.method == Method::GET => {
                        match api::record(&self.control, parts.uri.query().unwrap_or_default()) {
                            Ok(lines) => return Ok(stream("application/x-ndjson", lines)),
                            Err(refusal) => refusal,
                        }
                    }
                    Ok(()) => {
                        let most = if path == "/api/inventory" { IMPORT } else { BODY };
                        match Limited::new(body, most).collect().await {
                            Ok(body) => self.call(&parts, &body.to_bytes()).await,
                            Err(_) => {
                                problem(StatusCode::PAYLOAD_TOO_LARGE, &format!("send at most {} KiB", most / 1024))
                            }
                        }
                    }
                }
            }
        };
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        Ok(response.map(|body| Either::Left(Full::new(body))))
    }

    async fn call(&self, parts: &http::request::Parts, body: &Bytes) -> Response<Bytes> {
        let path = parts.uri.path();
        let allowed = match path {
            "/api" | "/healthz" | "/readyz" | "/metrics" | "/api/status" | "/api/routes" | "/api/history"
            | "/api/progress" => "GET, HEAD",
            "/api/inventory" => "GET, HEAD, POST",
            "/api/events" | "/api/record" | "/api/board" => "GET",
            "/api/reload" | "/api/explain" | "/api/cache/purge" => "POST",
            _ if api::wish(path).is_some() => "POST",
            _ if path.starts_with("/api/routes/") || path.starts_with("/api/shadow/") => "GET, HEAD",
            _ => return problem(StatusCode::NOT_FOUND, "no such call; `/api` lists them"),
        };
        if !allowed.split(", ").any(|method| method == parts.method.as_str()) {
            let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, &format!("use {allowed}"));
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
            return response;
        }
        match path {
            "/api" => text(StatusCode::OK, "text/plain; charset=utf-8", INDEX),
            "/api/progress" => api::progress(&self.control).await,
            "/api/inventory" if parts.method == Method::POST => api::import(&self.control, body).await,
            "/api/inventory" => api::inventory(&self.control).await,
            "/healthz" | "/readyz" => self.health(path),
            "/metrics" => api::metrics(&self.control, &self.scraping).await,
            "/api/status" => json(StatusCode::OK, &api::status(&self.control)),
            "/api/routes" => json(StatusCode::OK, &api::routes(&self.control)),
            "/api/history" => api::history(&self.control, parts.uri.query().unwrap_or_default()).await,
            "/api/reload" => api::reload(&self.control).await,
            "/api/cache/purge" => api::purge(&self.control.store.current(), body).await,
            "/api/explain" => api::explain(&self.control.store.current(), body),
            _ => match (api::wish(path), path.strip_prefix("/api/shadow/")) {
                (Some((route, wish)), _) => api::grant(&self.control, route, wish, body).await,
                (_, Some(name)) => api::shadow(&self.control.store.current(), name),
                _ => api::route(&self.control, path.strip_prefix("/api/routes/").unwrap_or_default()),
            },
        }
    }

    /// What happens, for as long as somebody listens.
    fn events(&self) -> Response<Either<Full<Bytes>, Lines>> {
        let (lines, receiver) = mpsc::channel(16);
        let control = self.control.clone();
        let mut events = control.rollouts.subscribe();
        tokio::task::spawn_local(async move {
            let token = control.store.current().admin_token.clone();
            let mut text = Bytes::from_static(b": the gateway's events\n\n");
            // Who came with a token that is none any more comes again.
            while control.store.current().admin_token == token
                && lines.send_timeout(text, board::PATIENCE).await.is_ok()
            {
                text = tokio::select! {
                    event = events.recv() => match event {
                        Ok(event) => format!("data: {event}\n\n").into(),
                        Err(RecvError::Lagged(missed)) => format!("event: missed\ndata: {missed}\n\n").into(),
                        Err(RecvError::Closed) => return,
                    },
                    () = tokio::time::sleep(ALIVE) => Bytes::from_static(b": alive\n\n"),
                    () = lines.closed() => return,
                };
            }
        });
        stream("text/event-stream", receiver)
    }

    fn health(&self, path: &str) -> Response<Bytes> {
        let ready = self.control.ready.load(std::sync::atomic::Ordering::Relaxed);
        if path == "/healthz" || ready {
            text(StatusCode::OK, "text/plain; charset=utf-8", "ok\n")
        } else {
            text(StatusCode::SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", "draining\n")
        }
    }
}

/// How often a stream of events says that it lives.
const ALIVE: Duration = Duration::from_secs(15);

/// A body that comes line by line.
struct Lines(mpsc::Receiver<Bytes>);

impl Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

fn stream(kind: &'static str, lines: mpsc::Receiver<Bytes>) -> Response<Either<Full<Bytes>, Lines>> {
    let mut response = Response::new(Either::Right(Lines(lines)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

const INDEX: &str = "\
The gateway's admin listener.

GET  /                   the board, for browsers
GET  /healthz            whether the process lives
GET  /readyz             whether it wants traffic
GET  /metrics            Prometheus metrics
GET  /api/status         what runs
GET  /api/routes[/NAME]  the routes, with their counts
GET  /api/shadow/NAME    how the service's answers compare with the monolith's
GET  /api/history        who changed what, when and why: ?route=NAME, ?limit=N
GET  /api/inventory      what clients ask for, endpoint by endpoint
POST /api/inventory      adds what is known elsewhere: an OpenAPI document, or another inventory
GET  /api/progress       how much of the monolith is gone, over time
GET  /api/board          what the board shows, as server-sent events
GET  /api/events         what happens, as server-sent events
GET  /api/record         a sample of requests with their answers, line by line; see `gateway record`
POST /api/routes/NAME/rollback, promote, resume    {\"who\", \"why\", \"force\"}: to the monolith, the next step, as the file says
POST /api/explain        {\"method\", \"url\", \"headers\"}: what would happen to a request
POST /api/cache/purge    {\"url\"}, {\"prefix\"}, {\"route\"}, {\"tag\"} or {\"all\": true}: forget answers
POST /api/reload         read the file again

A POST needs the field `X-Gateway-Admin: 1`, or the token.
";

fn text(status: StatusCode, kind: &'static str, text: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn json(status: StatusCode, value: &serde_json::Value) -> Response<Bytes> {
    text(status, "application/json", format!("{value:#}\n"))
}

fn problem(status: StatusCode, detail: &str) -> Response<Bytes> {
    let title = status.canonical_reason().unwrap_or("Error");
    let problem =
        serde_json::json!({"type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail});
    problem_response(status, &problem)
}
