//! Upstreams that fail, stall, lie or close: what the client is told, and what is never sent twice.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tests::{Answer, Client, Gateway, Origin, Reply, client::request, raw, send, until};

use crate::yaml;

fn assert_failed(answer: &Answer, status: u16, error: &str) {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.field("content-type"), "application/problem+json");
    let limit = match answer.json()["limit"].as_str() {
        Some(limit) => format!("; details=\"the limit `{limit}` fired\""),
        None => String::new(),
    };
    assert_eq!(answer.field("proxy-status"), format!("gw; error={error}; next-hop=legacy{limit}"));
    assert_eq!(
        (answer.json()["status"].as_u64(), answer.json()["upstream"].as_str()),
        (Some(u64::from(status)), Some("legacy"))
    );
    assert!(!answer.text().contains("127.0.0.1"), "no address for the client");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_has_its_own_name() {
    let legacy = Origin::start(|request| match request.line().split_whitespace().nth(1).unwrap() {
        "/close" => Reply::Close,
        "/hang" => Reply::Hang,
        "/garbage" => Reply::Last(b"SSH-2.0-OpenSSH\r\n\r\n".to_vec()),
        _ => Reply::ok("ok"),
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "defaults: {timeout: {request: 300ms}}\n")).await;
    assert_failed(&send(gateway.address, "POST", "/close", &[], "x").await, 502, "connection_terminated");
    assert_failed(&send(gateway.address, "GET", "/hang", &[], "").await, 504, "http_response_timeout");
    assert_failed(&send(gateway.address, "GET", "/garbage", &[], "").await, 502, "http_protocol_error");
    let line = gateway.access_line(|line| line["path"] == "/hang").await;
    assert_eq!(
        (line["status"].as_u64(), line["error"].as_str(), line["arm"].as_str()),
        (Some(504), Some("http_response_timeout"), Some("legacy"))
    );

    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    gateway.flip(&yaml(&[("legacy", format!("http://{free}"))], "")).await;
    assert_failed(&send(gateway.address, "GET", "/", &[], "").await, 502, "connection_refused");
    gateway.flip(&yaml(&[("legacy", "http://no-such-name.invalid:80".to_owned())], "")).await;
    assert_failed(&send(gateway.address, "GET", "/", &[], "").await, 502, "dns_error");
    // A listener whose queue is full takes no more connections.
    let full = socket_that_accepts_nobody();
    gateway
        .flip(&format!(
            "upstreams:\n  legacy: {{url: \"http://{}\", connections: {{connect_timeout: 200ms}}}}\n",
            full.0
        ))
        .await;
    assert_failed(&send(gateway.address, "GET", "/", &[], "").await, 504, "connection_timeout");
}

pub(crate) fn socket_that_accepts_nobody() -> (std::net::SocketAddr, std::net::TcpListener, Vec<std::net::TcpStream>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(tcp) = std::net::TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
        queued.push(tcp);
    }
    (address, listener, queued)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_has_a_limit_of_its_own_and_bodies_have_none_but_pauses() {
    let legacy = Origin::start(|request| {
        if request.line().contains("/hang") {
            return Reply::Hang;
        }
        let mut pieces = vec![b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n".to_vec()];
        pieces.extend((0..if request.line().contains("/stall") { 5 } else { 10 }).map(|_| b"x".to_vec()));
        if request.line().contains("/stall") {
            return Reply::Pieces(pieces, Duration::from_millis(1)).then_hang();
        }
        Reply::Pieces(pieces, Duration::from_millis(100))
    })
    .await;
    let file = yaml(&[("legacy", legacy.url())], "defaults: {timeout: {request: 10s, attempt: 200ms, idle: 400ms}}\n");
    let gateway = Gateway::start(&file).await;
    assert_failed(&send(gateway.address, "GET", "/hang", &[], "").await, 504, "http_response_timeout");
    assert_eq!(
        send(gateway.address, "GET", "/slow", &[], "").await.text(),
        "xxxxxxxxxx",
        "a second of body under limits of less"
    );
    let got = raw(gateway.address, b"GET /stall HTTP/1.1\r\nhost: a\r\n\r\n", |_| false).await;
    assert!(got.ends_with("\r\n\r\nxxxxx"), "cut off, visibly: {got}");
    let line = gateway.access_line(|line| line["path"] == "/stall").await;
    assert_eq!((line["complete"].as_bool(), line["status"].as_u64()), (Some(false), Some(200)));
    // The upstream broke off, not the client: two failures of its.
    assert_eq!(
        gateway.metric("gateway_requests_total{route=\"unrouted\",arm=\"legacy\",status=\"5xx\"}").await,
        Some(2.0)
    );
}

trait ThenHang {
    fn then_hang(self) -> Reply;
}

impl ThenHang for Reply {
    /// A body that stops halfway.
    fn then_hang(self) -> Reply {
        match self {
            Reply::Pieces(pieces, _) => Reply::Echo(pieces.concat()),
            other => other,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upload_is_bounded_by_its_pauses_alone() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let legacy = Origin::named("legacy").await;
    let gateway =
        Gateway::start(&yaml(&[("legacy", legacy.url())], "defaults: {timeout: {request: 300ms, idle: 600ms}}\n"))
            .await;
    let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\n").await.unwrap();
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        tcp.write_all(b"x").await.unwrap();
    }
    let mut got = vec![0; 15];
    tcp.read_exact(&mut got).await.unwrap();
    assert_eq!(got, b"HTTP/1.1 200 OK");
    let stalled = raw(gateway.address, b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\n\r\nx", |got| {
        got.contains("\r\n\r\n")
    })
    .await;
    assert!(stalled.starts_with("HTTP/1.1 408"), "{stalled}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_the_upstream_closes_cost_no_request() {
    // Every connection serves two requests and closes: right away, or when the third is already on its way.
    let served = Arc::new(AtomicUsize::new(0));
    let counted = served.clone();
    let legacy = Origin::start(move |_| {
        let n = counted.fetch_add(1, SeqCst);
        let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_vec();
        if n % 2 == 1 { Reply::Last(answer) } else { Reply::Bytes(answer) }
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut client = Client::new(gateway.address);
    for n in 0..300 {
        let method = if n % 3 == 0 { "POST" } else { "GET" };
        let answer = client.send(request(method, "/", &[], if n % 3 == 0 { "x" } else { "" })).await.unwrap();
        assert_eq!(answer.status, 200, "{n}: {}", answer.text());
    }
    assert_eq!(legacy.count(), 300, "nothing was sent twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_have_been_sent_is_repeated_only_where_that_is_harmless() {
    // The second request on a connection is read, and the connection closed without an answer.
    let legacy =
        Origin::start(|request| if request.line().contains("/again") { Reply::Close } else { Reply::ok("ok") }).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    for (method, override_field, arrivals) in
        [("GET", None, 2), ("PUT", None, 2), ("POST", None, 1), ("PATCH", None, 1), ("GET", Some("POST"), 1)]
    {
        let mut client = Client::new(gateway.address);
        client.send(request("GET", "/first", &[], "")).await.unwrap();
        let before = legacy.count();
        let fields: Vec<_> = override_field.map(|method| ("x-http-method-override", method)).into_iter().collect();
        let answer = client.send(request(method, "/again", &fields, "")).await.unwrap();
        assert_failed(&answer, 502, "connection_terminated");
        assert_eq!(legacy.count() - before, arrivals, "{method} {override_field:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_request_along() {
    use tokio::io::AsyncWriteExt as _;
    let legacy = Origin::start(|_| Reply::Hang).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    until("the request is at the origin", async || legacy.count() == 1).await;
    drop(tcp);
    until("the origin's connection is closed", async || legacy.open.load(SeqCst) == 0).await;
    let line = gateway.access_line(|line| line["complete"] == false).await;
    assert_eq!(line["status"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_capped_and_shared_fairly() {
    let open = Arc::new(AtomicUsize::new(0));
    let most = Arc::new(AtomicUsize::new(0));
    let (now, high) = (open.clone(), most.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let (now, high) = (now.clone(), high.clone());
            tokio::spawn(async move {
                let mut chunk = [0; 4096];
                while let Ok(1..) = tcp.read(&mut chunk).await {
                    high.fetch_max(now.fetch_add(1, SeqCst) + 1, SeqCst);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    now.fetch_sub(1, SeqCst);
                    tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                }
            });
        }
    });
    let file = format!("upstreams:\n  legacy: {{url: \"http://{address}\", connections: {{max: 4}}}}\n");
    let gateway = Gateway::start(&file).await;
    let asking: Vec<_> = (0..40)
        .map(|_| {
            let address = gateway.address;
            tokio::spawn(async move { send(address, "GET", "/", &[], "").await.status })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap(), 200);
    }
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cap = 4_usize.div_ceil(workers) * workers;
    assert!(most.load(SeqCst) <= cap, "{} at once, {cap} allowed", most.load(SeqCst));
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_are_closed() {
    let legacy = Origin::named("legacy").await;
    let file = format!("upstreams:\n  legacy: {{url: \"{}\", connections: {{idle: 500ms}}}}\n", legacy.url());
    let gateway = Gateway::start(&file).await;
    send(gateway.address, "GET", "/", &[], "").await;
    assert_eq!(legacy.open.load(SeqCst), 1);
    until("the idle connection is closed", async || legacy.open.load(SeqCst) == 0).await;
    until("it is counted out", async || {
        gateway.metric("gateway_upstream_connections{upstream=\"legacy\"}").await == Some(0.0)
    })
    .await;
}
