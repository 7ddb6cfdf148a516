//! Clients: each connection asks, waits, asks again; or so many a second, however long answers take.

use std::{
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// What is asked for.
#[derive(Clone, Copy)]
pub(crate) enum Shape {
    /// A path.
    Get(&'static str),
    /// A path, and so many bytes.
    Post(&'static str, usize),
    /// A path that is refused with 503.
    Refused(&'static str),
    /// A path, by one who takes what is kept: without cookies, and not asking for anything newer.
    Kept(&'static str),
    /// A path, with a token.
    Token(&'static str),
}

impl Shape {
    /// The request, with the eight fields of a browser.
    pub(crate) fn bytes(self) -> Vec<u8> {
        let (method, path, length) = match self {
            Self::Get(path) | Self::Refused(path) | Self::Kept(path) | Self::Token(path) => ("GET", path, None),
            Self::Post(path, length) => ("POST", path, Some(length)),
        };
        let framing = length.map(|length| format!("content-length: {length}\r\n")).unwrap_or_default();
        let own = match self {
            Self::Kept(_) => "dnt: 1\r\nupgrade-insecure-requests: 1\r\n".to_owned(),
            Self::Token(_) => {
                format!("authorization: Bearer {}\r\ncache-control: max-age=0\r\n", crate::peers::token())
            }
            _ => "cookie: session=0123456789abcdef; theme=dark\r\ncache-control: max-age=0\r\n".to_owned(),
        };
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: shop.example.com\r\n\
             user-agent: Mozilla/5.0 (X11; Linux x86_64; rv:109.0) Gecko/20100101 Firefox/115.0\r\n\
             accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8\r\n\
             accept-language: en-US,en;q=0.5\r\naccept-encoding: gzip, deflate, br\r\n\
             referer: http://shop.example.com/products\r\n\
             {own}{framing}\r\n"
        );
        [head.into_bytes(), vec![b'x'; length.unwrap_or(0)]].concat()
    }

    /// How a good answer begins.
    fn begins(self) -> &'static str {
        match self {
            Self::Get(_) | Self::Post(..) | Self::Kept(_) | Self::Token(_) => "HTTP/1.1 2",
            Self::Refused(_) => "HTTP/1.1 503",
        }
    }
}

/// What a turn is.
#[derive(Clone, Copy)]
pub(crate) struct Plan {
    /// Connections that ask.
    pub(crate) connections: usize,
    /// What for.
    pub(crate) shape: Shape,
    /// Requests a second, whatever comes back; as fast as answers come without it.
    pub(crate) rate: Option<u64>,
    /// Connections that asked once and wait.
    pub(crate) idle: usize,
    /// Connections that download without end.
    pub(crate) heavy: usize,
    /// How long.
    pub(crate) turn: Duration,
    /// How many requests in all, at most.
    pub(crate) requests: Option<u64>,
}

/// What came of it.
pub(crate) struct Told {
    /// Answers.
    pub(crate) completed: u64,
    /// Anything else.
    pub(crate) failures: u64,
    /// Of each answer; in an open loop from when it should have been asked.
    pub(crate) latencies: Vec<Duration>,
}

impl Told {
    /// The latency that so many per mille of the answers stay under.
    pub(crate) fn quantile(&self, per_mille: usize) -> Duration {
        let at = self.latencies.len().saturating_sub(1) * per_mille / 1000;
        self.latencies.get(at).copied().unwrap_or_default()
    }
}

struct Shared {
    left: Cell<u64>,
    completed: Cell<u64>,
    failures: Cell<u64>,
    latencies: RefCell<Vec<Duration>>,
}

/// Runs a turn; calls `mark` at its beginning, when all is set up, and at its end.
pub(crate) fn run(address: SocketAddr, plan: &Plan, mark: &mut dyn FnMut()) -> anyhow::Result<Told> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())?;
    runtime.block_on(turn(address, *plan, mark))
}

/// Asks once, and reads to the end; how many bytes that were.
pub(crate) fn once(address: SocketAddr, path: &str) -> anyhow::Result<usize> {
    use std::io::{Read as _, Write as _};
    let mut tcp = std::net::TcpStream::connect(address)?;
    tcp.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(tcp, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
    let mut got = Vec::new();
    tcp.read_to_end(&mut got)?;
    Ok(got.len())
}

/// Opens connections that ask once; closed when dropped.
pub(crate) fn idle(address: SocketAddr, count: usize) -> anyhow::Result<Vec<std::net::TcpStream>> {
    use std::io::{Read as _, Write as _};
    let request = Shape::Get("/a/1k").bytes();
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        let mut tcp = std::net::TcpStream::connect(address)?;
        tcp.set_read_timeout(Some(Duration::from_secs(10)))?;
        tcp.write_all(&request)?;
        let mut got = 0;
        let mut chunk = [0; 4096];
        while got < 1024 {
            match tcp.read(&mut chunk)? {
                0 => bail!("closed"),
                count => got += count,
            }
        }
        held.push(tcp);
    }
    Ok(held)
}

async fn turn(address: SocketAddr, plan: Plan, mark: &mut dyn FnMut()) -> anyhow::Result<Told> {
    let held = idle(address, plan.idle)?;
    let begins = plan.shape.begins();
    let shared = Rc::new(Shared {
        left: Cell::new(plan.requests.unwrap_or(u64::MAX)),
        completed: Cell::new(0),
        failures: Cell::new(0),
        latencies: RefCell::default(),
    });
    let request: Rc<[u8]> = plan.shape.bytes().into();
    let mut clients = Vec::new();
    for _ in 0..plan.connections {
        let mut client = Client { tcp: connect(address).await?, buffer: vec![0; 64 * 1024], filled: 0, begins };
        // One each first, so that no turn pays for what is made once.
        client.ask(&request).await?;
        clients.push(client);
    }
    for _ in 0..plan.heavy {
        let mut client =
            Client { tcp: connect(address).await?, buffer: vec![0; 64 * 1024], filled: 0, begins: "HTTP/1.1 2" };
        tokio::task::spawn_local(async move {
            let endless = Shape::Get("/a/1m").bytes();
            while client.ask(&endless).await.is_ok() {}
        });
    }
    mark();
    let start = Instant::now();
    let until = start + plan.turn;
    let count = clients.len();
    let mut tasks = Vec::new();
    for (n, client) in clients.into_iter().enumerate() {
        let (shared, request) = (shared.clone(), request.clone());
        let pace = plan.rate.map(|rate| {
            let every = Duration::from_secs_f64(count as f64 / rate as f64);
            (start + every.mul_f64(n as f64 / count as f64), every)
        });
        tasks.push(tokio::task::spawn_local(ask_on(client, request, shared, until, pace)));
    }
    for task in tasks {
        task.await.context("a client panicked")?;
    }
    mark();
    drop(held);
    let mut latencies = shared.latencies.take();
    latencies.sort_unstable();
    Ok(Told { completed: shared.completed.get(), failures: shared.failures.get(), latencies })
}

async fn ask_on(
    mut client: Client,
    request: Rc<[u8]>,
    shared: Rc<Shared>,
    until: Instant,
    mut pace: Option<(Instant, Duration)>,
) {
    loop {
        let due = match &mut pace {
            None => Instant::now(),
            Some((next, every)) => {
                let due = *next;
                *next += *every;
                tokio::time::sleep_until(due.into()).await;
                due
            }
        };
        if due >= until || shared.left.get() == 0 {
            return;
        }
        shared.left.set(shared.left.get() - 1);
        let asked = client.ask(&request).await;
        if asked.is_err() {
            shared.failures.set(shared.failures.get() + 1);
            return;
        }
        shared.completed.set(shared.completed.get() + 1);
        shared.latencies.borrow_mut().push(due.elapsed());
    }
}

async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

struct Client {
    tcp: TcpStream,
    buffer: Vec<u8>,
    filled: usize,
    /// How a good answer begins.
    begins: &'static str,
}

impl Client {
    /// Asks once and reads the whole answer, which must have a length and begin as expected.
    async fn ask(&mut self, request: &[u8]) -> anyhow::Result<()> {
        self.tcp.write_all(request).await?;
        self.filled = 0;
        let (head, length) = loop {
            self.read().await?;
            if let Some(head) = find(&self.buffer[..self.filled]) {
                let text = std::str::from_utf8(&self.buffer[..head])?;
                if !text.starts_with(self.begins) {
                    bail!("answered {}", text.lines().next().unwrap_or_default());
                }
                let length = text.split("\r\n").find_map(|line| {
                    let (name, value) = line.split_once(':')?;
                    name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
                });
                break (head, length.context("no length")?);
            }
        };
        let mut left = (head + length).saturating_sub(self.filled);
        while left > 0 {
            self.filled = 0;
            self.read().await?;
            left = left.saturating_sub(self.filled);
        }
        Ok(())
    }

    async fn read(&mut self) -> anyhow::Result<()> {
        match self.tcp.read(&mut self.buffer[self.filled..]).await? {
            0 => bail!("closed"),
            count => self.filled += count,
        }
        Ok(())
    }
}

fn find(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}
