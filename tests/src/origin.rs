//! An origin that remembers every byte that it was sent, and answers as it is told.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Received {
    /// Request line and fields, as they came.
    pub head: String,
    /// The body, without its chunks' framing.
    pub body: Vec<u8>,
    /// The lines after the last chunk.
    pub trailers: String,
}

impl Received {
    /// The request line.
    pub fn line(&self) -> &str {
        self.head.lines().next().unwrap_or_default()
    }

    /// The values of a field.
    pub fn fields(&self, name: &str) -> Vec<&str> {
        let pairs = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        pairs.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).collect()
    }

    /// The only value of a field; empty where it is missing.
    pub fn field(&self, name: &str) -> String {
        let fields = self.fields(name);
        assert!(fields.len() <= 1, "{name} came {} times", fields.len());
        fields.first().copied().unwrap_or_default().to_owned()
    }
}

/// What an origin does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Sends these bytes and goes on.
    Bytes(Vec<u8>),
    /// Sends these bytes and closes.
    Last(Vec<u8>),
    /// Closes without a word.
    Close,
    /// Says nothing, until the other side closes.
    Hang,
    /// Sends these bytes, then echoes what comes.
    Echo(Vec<u8>),
    /// Sends pieces with pauses between them, then goes on.
    Pieces(Vec<Vec<u8>>, Duration),
}

impl Reply {
    /// A whole answer.
    pub fn new(status: &str, fields: &[(&str, &str)], body: &str) -> Self {
        let fields: String = fields.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        Self::Bytes(format!("HTTP/1.1 {status}\r\n{fields}content-length: {}\r\n\r\n{body}", body.len()).into_bytes())
    }

    /// `200` with a text.
    pub fn ok(body: &str) -> Self {
        Self::new("200 OK", &[], body)
    }
}

type Handler = dyn Fn(&Received) -> Reply + Send + Sync;

/// A running origin.
pub struct Origin {
    /// Where it listens.
    pub address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
    /// Connections made to it.
    pub connections: Arc<AtomicUsize>,
    /// Connections open now.
    pub open: Arc<AtomicUsize>,
}

impl Origin {
    /// An origin that answers each request so.
    pub async fn start(answer: impl Fn(&Received) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_with(None, answer).await
    }

    /// An origin that says its name.
    pub async fn named(name: &'static str) -> Self {
        Self::start(move |_| Reply::new("200 OK", &[("x-served-by", name)], name)).await
    }

    /// An origin that answers each connection before it has read more than a head. Its address, and how many
    /// connections are open.
    pub async fn start_early(answer: &'static [u8]) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let open = Arc::new(AtomicUsize::new(0));
        let counted = open.clone();
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                counted.fetch_add(1, SeqCst);
                let counted = counted.clone();
                tokio::spawn(async move {
                    let mut chunk = [0; 4096];
                    let _ = tcp.read(&mut chunk).await;
                    let _ = tcp.write_all(answer).await;
                    while let Ok(1..) = tcp.read(&mut chunk).await {}
                    counted.fetch_sub(1, SeqCst);
                });
            }
        });
        (address, open)
    }

    /// An origin that is whatever `serve` makes of each connection.
    pub async fn listen<F>(serve: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let _ = tcp.set_nodelay(true);
                tokio::spawn(serve(tcp));
            }
        });
        address
    }

    /// An origin behind TLS, where there is a configuration.
    pub async fn start_with(
        tls: Option<Arc<rustls::ServerConfig>>,
        answer: impl Fn(&Received) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self {
            address: listener.local_addr().unwrap(),
            received: Arc::default(),
            connections: Arc::default(),
            open: Arc::default(),
        };
        let (received, connections, open) = (this.received.clone(), this.connections.clone(), this.open.clone());
        let answer: Arc<Handler> = Arc::new(answer);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                connections.fetch_add(1, SeqCst);
                let (received, answer, open, tls) = (received.clone(), answer.clone(), open.clone(), tls.clone());
                tokio::spawn(async move {
                    open.fetch_add(1, SeqCst);
                    serve(tcp, tls, &received, &*answer).await;
                    open.fetch_sub(1, SeqCst);
                });
            }
        });
        this
    }

    /// Its address as an upstream's url.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What it got so far.
    pub fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// How much it got so far.
    pub fn count(&self) -> usize {
        self.received.lock().unwrap().len()
    }

    /// The last that it got.
    pub fn last(&self) -> Received {
        self.received().pop().expect("it got a request")
    }
}

async fn serve(
    tcp: TcpStream,
    tls: Option<Arc<rustls::ServerConfig>>,
    received: &Mutex<Vec<Received>>,
    answer: &Handler,
) {
    let _ = tcp.set_nodelay(true);
    match tls {
        None => converse(tcp, received, answer).await,
        Some(config) => {
            if let Ok(stream) = tokio_rustls::TlsAcceptor::from(config).accept(tcp).await {
                converse(stream, received, answer).await;
            }
        }
    }
}

async fn converse<T: AsyncRead + AsyncWrite + Unpin>(mut io: T, received: &Mutex<Vec<Received>>, answer: &Handler) {
    let mut buffer = BytesMut::new();
    while let Some(request) = read_request(&mut io, &mut buffer).await {
        let reply = answer(&request);
        received.lock().unwrap().push(request);
        let sent = match reply {
            Reply::Bytes(bytes) => io.write_all(&bytes).await,
            Reply::Last(bytes) => {
                let _ = io.write_all(&bytes).await;
                let _ = io.shutdown().await;
                return;
            }
            Reply::Close => return,
            Reply::Hang => {
                let _ = io.read(&mut [0; 1]).await;
                return;
            }
            Reply::Echo(bytes) => {
                let _ = io.write_all(&bytes).await;
                let mut chunk = [0; 4096];
                while let Ok(read @ 1..) = io.read(&mut chunk).await {
                    if io.write_all(&chunk[..read]).await.is_err() {
                        return;
                    }
                }
                return;
            }
            Reply::Pieces(pieces, pause) => {
                for piece in pieces {
                    if io.write_all(&piece).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(pause).await;
                }
                Ok(())
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn read_request<T: AsyncRead + Unpin>(io: &mut T, buffer: &mut BytesMut) -> Option<Received> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if io.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&buffer.split_to(end)).into_owned();
    let mut request = Received { head, body: Vec::new(), trailers: String::new() };
    let length: usize = request.field("content-length").parse().unwrap_or(0);
    if request.field("transfer-encoding").eq_ignore_ascii_case("chunked") {
        loop {
            let size = usize::from_str_radix(&read_line(io, buffer).await?, 16).ok()?;
            fill(io, buffer, size).await?;
            request.body.extend_from_slice(&buffer.split_to(size));
            loop {
                let line = read_line(io, buffer).await?;
                if line.is_empty() {
                    break;
                }
                request.trailers.push_str(&line);
                request.trailers.push_str("\r\n");
            }
            if size == 0 {
                return Some(request);
            }
        }
    }
    fill(io, buffer, length).await?;
    request.body.extend_from_slice(&buffer.split_to(length));
    Some(request)
}

async fn fill<T: AsyncRead + Unpin>(io: &mut T, buffer: &mut BytesMut, length: usize) -> Option<()> {
    while buffer.len() < length {
        if io.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    Some(())
}

/// Reads until a text has come, and gives back all that came.
pub async fn read_until<T: AsyncRead + Unpin>(io: &mut T, text: &str) -> String {
    let mut got = Vec::new();
    let found = |got: &[u8]| got.windows(text.len()).any(|window| window == text.as_bytes());
    while !found(&got) {
        if !matches!(io.read_buf(&mut got).await, Ok(1..)) {
            break;
        }
    }
    String::from_utf8_lossy(&got).into_owned()
}

async fn read_line<T: AsyncRead + Unpin>(io: &mut T, buffer: &mut BytesMut) -> Option<String> {
    loop {
        if let Some(at) = buffer.windows(2).position(|window| window == b"\r\n") {
            let line = buffer.split_to(at + 2);
            return Some(String::from_utf8_lossy(&line[..at]).into_owned());
        }
        if io.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}
