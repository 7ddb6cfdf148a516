//! The clients of the demo: a steady load, and each session's own view of who answers.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    net::SocketAddr,
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, sync::watch, time::sleep};

use super::SESSIONS;

/// Connections that ask at the same time.
const CLIENTS: usize = 16;
/// How long each waits between two requests.
const PAUSE: Duration = Duration::from_millis(6);
/// Failures that are told one by one.
const TOLD: usize = 5;

#[derive(Default)]
struct Counts {
    total: Cell<usize>,
    failed: Cell<usize>,
    posts: Cell<u64>,
    busy: Cell<usize>,
    failures: RefCell<Vec<String>>,
}

/// A steady load, paused until told.
pub(super) struct Load {
    gateway: SocketAddr,
    counts: Rc<Counts>,
    running: watch::Sender<bool>,
}

impl Load {
    /// Starts the clients; they wait for [`Load::resume`].
    pub(super) fn start(gateway: SocketAddr) -> Self {
        let counts = Rc::new(Counts::default());
        let (running, watched) = watch::channel(false);
        for client in 0..CLIENTS {
            tokio::task::spawn_local(ask_on(gateway, client, counts.clone(), watched.clone()));
        }
        Self { gateway, counts, running }
    }

    /// Lets the clients ask.
    pub(super) fn resume(&self) {
        let _ = self.running.send(true);
    }

    /// Stops the clients and waits for their last answers.
    pub(super) async fn pause(&self) {
        let _ = self.running.send(false);
        while self.counts.busy.get() > 0 {
            sleep(PAUSE).await;
        }
    }

    /// Lets the clients ask for a while.
    pub(super) async fn run(&self, time: Duration) {
        self.resume();
        sleep(time).await;
        self.pause().await;
    }

    /// Asks for an order once in each session; the sessions that the service answered.
    pub(super) async fn each_session_once(&self) -> BTreeSet<usize> {
        let mut client = Client { gateway: self.gateway, sender: None };
        let mut on_service = BTreeSet::new();
        for session in 0..SESSIONS {
            let asked = client.ask(Method::GET, "/api/orders/1", session).await;
            if self.counts.count(&asked) == Some("orders") {
                on_service.insert(session);
            }
        }
        on_service
    }

    pub(super) fn total(&self) -> usize {
        self.counts.total.get()
    }

    pub(super) fn failed(&self) -> usize {
        self.counts.failed.get()
    }

    pub(super) fn posts(&self) -> u64 {
        self.counts.posts.get()
    }

    pub(super) fn failures(&self) -> Vec<String> {
        self.counts.failures.borrow().clone()
    }
}

impl Counts {
    /// Counts an answer; who gave it, if it is good.
    fn count<'a>(&self, answer: &'a Result<(u16, String), String>) -> Option<&'a str> {
        self.total.set(self.total.get() + 1);
        let failure = match answer {
            Ok((status, by)) if *status < 400 => return Some(by),
            Ok((status, by)) => format!("status {status} by {by:?}"),
            Err(error) => error.clone(),
        };
        self.failed.set(self.failed.get() + 1);
        let mut failures = self.failures.borrow_mut();
        if failures.len() < TOLD {
            failures.push(failure);
        }
        None
    }
}

async fn ask_on(gateway: SocketAddr, number: usize, counts: Rc<Counts>, mut running: watch::Receiver<bool>) {
    let mut client = Client { gateway, sender: None };
    for n in 0_usize.. {
        if running.wait_for(|running| *running).await.is_err() {
            return;
        }
        counts.busy.set(counts.busy.get() + 1);
        let n = n * CLIENTS + number;
        let (method, path) = match n % 10 {
            0..5 => (Method::GET, format!("/api/orders/{}", 1 + n % 200)),
            5 => (Method::POST, "/api/orders".to_owned()),
            6 | 7 => (Method::GET, format!("/api/products/{}", 1 + n % 200)),
            8 => (Method::GET, format!("/api/users/{}", 1 + n % 200)),
            _ => (Method::GET, "/login".to_owned()),
        };
        if method == Method::POST {
            counts.posts.set(counts.posts.get() + 1);
        }
        let answer = client.ask(method, &path, n % SESSIONS).await;
        counts.count(&answer);
        counts.busy.set(counts.busy.get() - 1);
        sleep(PAUSE).await;
    }
}

/// One client with one connection.
struct Client {
    gateway: SocketAddr,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    /// Asks once; never repeats anything.
    async fn ask(&mut self, method: Method, path: &str, session: usize) -> Result<(u16, String), String> {
        let fail = |error: &dyn std::fmt::Display| format!("{path}: {error}");
        let mut sender = if let Some(sender) = self.sender.take().filter(|sender| !sender.is_closed()) {
            sender
        } else {
            let tcp = TcpStream::connect(self.gateway).await.map_err(|e| fail(&e))?;
            let (sender, connection) = handshake(TokioIo::new(tcp)).await.map_err(|e| fail(&e))?;
            tokio::task::spawn_local(connection);
            sender
        };
        sender.ready().await.map_err(|e| fail(&e))?;
        let body =
            if method == Method::POST { Bytes::from_static(b"{\"product\":7,\"quantity\":1}") } else { Bytes::new() };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "shop.example.com")
            .header("cookie", format!("session=s-{session}"))
            .body(Full::new(body))
            .map_err(|e| fail(&e))?;
        let response = sender.send_request(request).await.map_err(|e| fail(&e))?;
        let by = response.headers().get("x-served-by").and_then(|by| by.to_str().ok()).unwrap_or_default().to_owned();
        let status = response.status().as_u16();
        response.into_body().collect().await.map_err(|e| fail(&e))?;
        self.sender = Some(sender);
        Ok((status, by))
    }
}
