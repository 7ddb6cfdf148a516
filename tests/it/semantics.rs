//! The whole of HTTP's semantics: interim responses, trailers, bodies that are none, early answers, clients that leave (RFC 9110, 9112).

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http_body_util::BodyExt as _;
use tests::{Gateway, Origin, PATIENCE, Reply, raw, read_until, send, until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};

use crate::yaml;

async fn before(address: std::net::SocketAddr) -> Gateway {
    Gateway::start(&yaml(&[("legacy", format!("http://{address}"))], "")).await
}

async fn connect(gateway: &Gateway) -> TcpStream {
    let tcp = TcpStream::connect(gateway.address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

/// Reads from a client's socket until a text has come.
async fn expect(tcp: &mut TcpStream, text: &str) -> String {
    timeout(PATIENCE, read_until(tcp, text)).await.unwrap_or_else(|_| panic!("no {text:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_origin_decides_whether_to_continue() {
    let origin = Origin::listen(|mut tcp| async move {
        loop {
            let head = read_until(&mut tcp, "\r\n\r\n").await;
            if head.is_empty() {
                return;
            }
            assert!(head.contains("expect: 100-continue"), "{head}");
            // The body must not be there before we say so.
            if head.starts_with("PUT /no") {
                let no = b"HTTP/1.1 417 Expectation Failed\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno";
                tcp.write_all(no).await.unwrap();
                return;
            }
            tcp.write_all(b"HTTP/1.1 100 Continue\r\nx-why: asked\r\n\r\n").await.unwrap();
            assert_eq!(read_until(&mut tcp, "body").await, "body");
            tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        }
    })
    .await;
    let gateway = before(origin).await;
    let mut tcp = connect(&gateway).await;
    for _ in 0..2 {
        tcp.write_all(b"PUT /yes HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n")
            .await
            .unwrap();
        let got = expect(&mut tcp, "\r\n\r\n").await;
        assert_eq!(got, "HTTP/1.1 100 Continue\r\nx-why: asked\r\n\r\n");
        tcp.write_all(b"body").await.unwrap();
        let got = expect(&mut tcp, "\r\n\r\nok").await;
        assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{got}");
    }
    tcp.write_all(b"PUT /no HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n").await.unwrap();
    let got = expect(&mut tcp, "\r\n\r\nno").await;
    assert!(got.starts_with("HTTP/1.1 417 "), "{got}");
    // Whether the body follows is not known: nothing may be read after it.
    assert!(got.contains("connection: close"), "{got}");
}

#[tokio::test(flavor = "multi_thread")]
async fn early_hints_are_passed_on_but_not_to_old_clients() {
    let hints = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nconnection: x-hop\r\nx-hop: 1\r\n\r\n";
    let legacy = Origin::start(move |_| {
        Reply::Bytes(format!("{hints}{hints}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").into())
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let got = raw(gateway.address, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", |got| got.ends_with("ok")).await;
    let passed = "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n";
    assert!(got.starts_with(&format!("{passed}{passed}HTTP/1.1 200 OK\r\n")), "{got}");
    let got = raw(gateway.address, b"GET / HTTP/1.0\r\nhost: a\r\n\r\n", |_| false).await;
    assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{got}");
    let line = gateway.access_line(|line| line["protocol"] == "HTTP/1.1").await;
    assert_eq!(line["status"], 200);
}

/// A hint is there before the answer is: nothing waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hint_does_not_wait_for_the_answer() {
    let (go, wait) = mpsc::channel::<()>(1);
    let wait = Arc::new(tokio::sync::Mutex::new(wait));
    let origin = Origin::listen(move |mut tcp| {
        let wait = wait.clone();
        async move {
            read_until(&mut tcp, "\r\n\r\n").await;
            tcp.write_all(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n").await.unwrap();
            wait.lock().await.recv().await;
            tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        }
    })
    .await;
    let gateway = before(origin).await;
    let mut tcp = connect(&gateway).await;
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    assert!(expect(&mut tcp, "\r\n\r\n").await.starts_with("HTTP/1.1 103 "));
    go.send(()).await.unwrap();
    assert!(expect(&mut tcp, "ok").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn interim_answers_have_an_end() {
    let origin = Origin::listen(|mut tcp| async move {
        read_until(&mut tcp, "\r\n\r\n").await;
        while tcp.write_all(b"HTTP/1.1 102 Processing\r\n\r\n").await.is_ok() {}
    })
    .await;
    let gateway = before(origin).await;
    let got = raw(gateway.address, b"POST / HTTP/1.1\r\nhost: a\r\n\r\n", |got| got.contains("502")).await;
    assert!(got.contains("HTTP/1.1 502 Bad Gateway"), "{got}");
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_go_both_ways() {
    let origin = Origin::listen(|mut tcp| async move {
        let got = read_until(&mut tcp, "x-sum: 6\r\n\r\n").await;
        let (_, body) = got.split_once("\r\n\r\n").unwrap();
        assert_eq!(body, "3\r\nabc\r\n0\r\nx-sum: 6\r\n\r\n", "{got}");
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-out\r\n\r\n";
        let body = "2\r\nok\r\n0\r\nX-Out: 1\r\ncontent-length: 9\r\nset-cookie: a=b\r\nx-gateway-y: 1\r\n\r\n";
        tcp.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    })
    .await;
    let gateway = before(origin).await;
    let mut tcp = connect(&gateway).await;
    let head = "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te\r\ntransfer-encoding: chunked\r\n\r\n";
    let body = "3\r\nabc\r\n0\r\nX-Sum: 6\r\nhost: b\r\nx-forwarded-for: 1.2.3.4\r\nconnection: close\r\n\r\n";
    tcp.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
    let got = expect(&mut tcp, "\r\n\r\n").await;
    assert!(got.contains("trailer: x-out\r\n") && got.contains("transfer-encoding: chunked\r\n"), "{got}");
    let (_, mut body) = got.split_once("\r\n\r\n").map(|(head, body)| (head.to_owned(), body.to_owned())).unwrap();
    while !body.ends_with("\r\n\r\n") {
        body += &expect(&mut tcp, "\n").await;
    }
    assert_eq!(body, "2\r\nok\r\n0\r\nx-out: 1\r\n\r\n");
}

/// The same from HTTP/2, as gRPC needs it.
#[tokio::test(flavor = "multi_thread")]
async fn trailers_reach_clients_of_http2() {
    let legacy = Origin::start(|request| {
        assert_eq!(request.field("te"), "trailers");
        Reply::Bytes(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\ngrpc-status: 0\r\n\r\n".to_vec(),
        )
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let executor = hyper_util::rt::TokioExecutor::new();
    let io = hyper_util::rt::TokioIo::new(connect(&gateway).await);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("http://a/x").header("te", "trailers");
    let request = request.body(http_body_util::Full::new(bytes::Bytes::from_static(b"in"))).unwrap();
    let collected = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
    assert_eq!(collected.to_bytes(), "ok");
    assert_eq!(legacy.last().body, b"in");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_without_a_body_have_none() {
    let legacy = Origin::start(|request| match request.line() {
        "HEAD /length HTTP/1.1" => Reply::Bytes(b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\n\r\n".to_vec()),
        "HEAD /chunks HTTP/1.1" => Reply::Bytes(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec()),
        "GET /none HTTP/1.1" => Reply::Bytes(b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()),
        "GET /same HTTP/1.1" => {
            Reply::Bytes(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\netag: \"a\"\r\n\r\n".to_vec())
        }
        "GET /empty HTTP/1.1" => Reply::Bytes(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_vec()),
        _ => Reply::ok("last"),
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    // All on one connection, sent ahead: were there a body, the next answer would be out of step.
    let paths = ["HEAD /length", "HEAD /chunks", "GET /none", "GET /same", "GET /empty", "GET /last"];
    let requests: String = paths.iter().map(|path| format!("{path} HTTP/1.1\r\nhost: a\r\n\r\n")).collect();
    let got = raw(gateway.address, requests.as_bytes(), |got| got.ends_with("last")).await;
    let answers: Vec<&str> = got.split("\r\n\r\n").collect();
    assert_eq!(answers.len(), 7, "{got}");
    for (answer, start) in answers.iter().zip([
        "HTTP/1.1 200 OK\r\ncontent-length: 12345",
        "HTTP/1.1 200 OK\r\ndate",
        "HTTP/1.1 204 No Content\r\ndate",
        "HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\netag: \"a\"",
        "HTTP/1.1 200 OK\r\ncontent-length: 0",
        "HTTP/1.1 200 OK\r\ncontent-length: 4",
        "last",
    ]) {
        assert!(answer.starts_with(start), "{start}: {answer}");
    }
    assert_eq!(legacy.connections.load(SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_answered_in_order() {
    let legacy = Origin::start(|request| {
        let path = request.line().split(' ').nth(1).unwrap().to_owned();
        Reply::Pieces(
            vec![
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", path.len() + request.body.len()).into(),
                path.into(),
                request.body.clone(),
            ],
            Duration::from_millis(1),
        )
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let requests: String =
        (0..50).map(|n| format!("POST /{n} HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n={n:03}\n")).collect();
    let got = raw(gateway.address, requests.as_bytes(), |got| got.ends_with("/49=049\n")).await;
    let bodies: Vec<&str> = got.split("\r\n\r\n").skip(1).map(|part| part.split("HTTP").next().unwrap()).collect();
    let expected: Vec<String> = (0..50).map(|n| format!("/{n}={n:03}\n")).collect();
    assert_eq!(bodies, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_clients_get_bodies_that_they_can_end() {
    let legacy = Origin::start(|request| match request.line() {
        "GET /chunks HTTP/1.1" => Reply::Bytes(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n".to_vec(),
        ),
        _ => Reply::ok("whole"),
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let got =
        raw(gateway.address, b"GET /chunks HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\n\r\n", |_| false).await;
    assert!(got.ends_with("\r\n\r\nabcde") && !got.contains("chunked") && got.contains("connection: close"), "{got}");
    let twice = b"GET /a HTTP/1.0\r\nhost: a\r\nconnection: Keep-Alive\r\n\r\nGET /b HTTP/1.0\r\nhost: a\r\n\r\n";
    let got = raw(gateway.address, twice, |_| false).await;
    assert_eq!(got.matches("whole").count(), 2, "{got}");
    assert!(got.contains("connection: keep-alive") && got.contains("connection: close"), "{got}");
}

/// An answer that comes before the request is over reaches the client, whether its origin reads on or not.
#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_is_an_answer() {
    let origin = Origin::listen(|mut tcp| async move {
        let head = read_until(&mut tcp, "\r\n\r\n").await;
        let answer: &[u8] = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 4\r\nconnection: close\r\n\r\nmuch";
        tcp.write_all(answer).await.unwrap();
        if head.starts_with("POST /read") {
            while let Ok(1..) = tcp.read(&mut [0; 4096]).await {}
        }
        // Otherwise it is closed with bytes unread: a reset.
    })
    .await;
    let gateway = before(origin).await;
    for path in ["/read", "/reset"] {
        for _ in 0..20 {
            let mut tcp = connect(&gateway).await;
            let head = format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 3000000\r\n\r\n");
            tcp.write_all(head.as_bytes()).await.unwrap();
            let (mut read, mut write) = tcp.into_split();
            let writing = tokio::spawn(async move {
                for _ in 0..300 {
                    if write.write_all(&[b'x'; 10_000]).await.is_err() {
                        return;
                    }
                }
            });
            let got = timeout(PATIENCE, read_until(&mut read, "much")).await.unwrap();
            assert!(got.starts_with("HTTP/1.1 413 ") && got.ends_with("much"), "{path}: {got}");
            drop(read);
            writing.await.unwrap();
        }
    }
}

/// Both directions stream at once: what the client sends comes back while it still sends.
#[tokio::test(flavor = "multi_thread")]
async fn both_directions_stream_at_once() {
    let origin = Origin::listen(|mut tcp| async move {
        let head = read_until(&mut tcp, "\r\n\r\n").await;
        assert!(head.contains("transfer-encoding: chunked"));
        tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let mut chunk = [0; 4096];
        let mut seen = Vec::new();
        while let Ok(count @ 1..) = tcp.read(&mut chunk).await {
            // The framing is the same both ways.
            tcp.write_all(&chunk[..count]).await.unwrap();
            seen.extend_from_slice(&chunk[..count]);
            if seen.ends_with(b"0\r\n\r\n") {
                return;
            }
        }
    })
    .await;
    let gateway = before(origin).await;
    let mut tcp = connect(&gateway).await;
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
    expect(&mut tcp, "\r\n\r\n").await;
    for n in 0..20 {
        let word = format!("word{n:02}");
        tcp.write_all(format!("6\r\n{word}\r\n").as_bytes()).await.unwrap();
        let got = expect(&mut tcp, &word).await;
        assert!(got.contains(&word), "{got}");
    }
    tcp.write_all(b"0\r\n\r\n").await.unwrap();
    expect(&mut tcp, "0\r\n\r\n").await;
    let line = gateway.access_line(|line| line["status"] == 200).await;
    assert_eq!((&line["bytes_in"], &line["bytes_out"], &line["complete"]), (&120.into(), &120.into(), &true.into()));
}

/// A client that ends its own side and waits is answered, however slow the upstream is.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_only_half_closes_is_answered() {
    let legacy = Origin::start(|request| {
        let pause = Duration::from_millis(if request.line().contains("slow") { 400 } else { 0 });
        Reply::Pieces(
            vec![Vec::new(), b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n".to_vec(), b"legacy".to_vec()],
            pause,
        )
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    for path in ["/fast", "/slow"] {
        let mut tcp = connect(&gateway).await;
        tcp.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut got = String::new();
        timeout(PATIENCE, tcp.read_to_string(&mut got)).await.unwrap().unwrap();
        // The slow one is asked with an interim response whether it is still there.
        let answer = got.strip_prefix("HTTP/1.1 100 Continue\r\n\r\n").unwrap_or(&got);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("legacy"), "{path}: {got}");
        assert_eq!(got.contains("100 Continue"), path == "/slow", "{got}");
    }
}

/// A client that leaves takes its request with it: the upstream sees its connection end, and soon.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_request_along() {
    let (told, mut heard) = mpsc::channel::<&'static str>(16);
    let origin = Origin::listen(move |mut tcp| {
        let told = told.clone();
        async move {
            let head = read_until(&mut tcp, "\r\n\r\n").await;
            if head.starts_with("GET /stream") {
                tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await.unwrap();
            }
            told.send("asked").await.unwrap();
            while let Ok(1..) = tcp.read(&mut [0; 4096]).await {}
            told.send("left").await.unwrap();
        }
    })
    .await;
    let gateway = before(origin).await;
    let body = "POST /upload HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nhalf";
    for request in [
        "GET /wait HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET /stream HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET /wait HTTP/1.0\r\n\r\n",
        body,
    ] {
        let mut tcp = connect(&gateway).await;
        tcp.write_all(request.as_bytes()).await.unwrap();
        assert_eq!(timeout(PATIENCE, heard.recv()).await.unwrap(), Some("asked"));
        if request.contains("stream") {
            expect(&mut tcp, "abc").await;
        }
        drop(tcp);
        assert_eq!(timeout(PATIENCE, heard.recv()).await.unwrap(), Some("left"), "{request}");
    }
    until("all are told", async || gateway.access().len() == 4).await;
    // The upload that broke off was answered 400, should anybody be there to read it.
    let lines = gateway.access();
    assert!(lines.iter().all(|line| line["complete"] == false || line["status"] == 400), "{lines:?}");
}

/// An upstream that resets in the middle of a body: the client sees that it is not whole.
#[tokio::test(flavor = "multi_thread")]
async fn an_upstreams_reset_reaches_the_client() {
    let origin = Origin::listen(|mut tcp| async move {
        read_until(&mut tcp, "\r\n\r\n").await;
        tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n").await.unwrap();
        #[allow(deprecated, reason = "a reset is what is wanted")]
        tcp.set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    let gateway = before(origin).await;
    let got = raw(gateway.address, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", |_| false).await;
    assert!(!got.ends_with("0\r\n\r\n"), "{got}");
    let line = gateway.access_line(|line| line["status"] == 200).await;
    assert_eq!((&line["complete"], &line["error"]), (&false.into(), &"connection_terminated".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_who_is_asked_answers_itself() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let answer = send(gateway.address, "OPTIONS", "/x", &[("max-forwards", "0")], "").await;
    assert_eq!((answer.status, answer.text().as_str()), (200, ""));
    assert!(answer.field("allow").contains("OPTIONS"));
    let secret = [("max-forwards", "0"), ("authorization", "Basic x"), ("cookie", "a=b"), ("x-mine", "1")];
    let answer = send(gateway.address, "TRACE", "/x?y", &secret, "").await;
    assert_eq!((answer.status, answer.field("content-type")), (200, "message/http"));
    let text = answer.text();
    assert!(text.starts_with("TRACE /x?y HTTP/1.1\r\n") && text.contains("x-mine: 1\r\n"), "{text}");
    assert!(!text.contains("Basic") && !text.contains("cookie"), "{text}");
    assert_eq!(legacy.count(), 0);
    send(gateway.address, "TRACE", "/x", &[("max-forwards", "1")], "").await;
    assert_eq!(legacy.last().field("max-forwards"), "0");
}

/// An upstream that sends requests back here would do so for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_comes_back_is_refused() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let target = Arc::new(std::sync::OnceLock::<std::net::SocketAddr>::new());
    let known = target.clone();
    // A proxy that hands everything on to the gateway.
    let origin = Origin::listen(move |mut tcp| {
        counted.fetch_add(1, SeqCst);
        let address = *known.get().unwrap();
        async move {
            let mut back = TcpStream::connect(address).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut tcp, &mut back).await;
        }
    })
    .await;
    let gateway = before(origin).await;
    target.set(gateway.address).unwrap();
    let answer = send(gateway.address, "GET", "/", &[], "").await;
    assert_eq!((answer.status, answer.field("proxy-status")), (502, "gw; error=proxy_loop_detected"));
    assert_eq!(asked.load(SeqCst), 1);
    // Another gateway's mark is none of ours.
    let other = Origin::named("other").await;
    let gateway = Gateway::start(&yaml(&[("legacy", other.url())], "")).await;
    let answer = send(gateway.address, "GET", "/", &[("via", "1.1 gw-00000000, 1.1 gw")], "").await;
    assert_eq!(answer.status, 200);
    assert_eq!(other.last().fields("via").len(), 2);
}
