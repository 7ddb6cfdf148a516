//! Each bug that was found, with its story.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tests::{
    Gateway, Origin, Reply,
    http2::{self, DATA, END_HEADERS, END_STREAM, HEADERS, RST_STREAM},
    raw, read_until, send, until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::yaml;

/// A file that could not be read, or was no YAML at all, left the checks without any text to
/// point into: they panicked, and the reload was neither told nor counted. And what happened to the file
/// between loading it and watching it was taken for seen: here it vanishes as soon as the gateway listens.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_vanishes_is_refused_like_any_other() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let text = std::fs::read(&gateway.file).unwrap();
    std::fs::remove_file(&gateway.file).unwrap();
    until("the loss is told", async || gateway.config().await["current"] == false).await;
    let error = gateway.config().await["error"].as_str().unwrap().to_owned();
    assert!(error.contains("cannot read"), "{error}");
    assert_eq!(send(gateway.address, "GET", "/", &[], "").await.status, 200);
    std::fs::write(&gateway.file, text).unwrap();
    until("it is back", async || gateway.config().await["current"] == true).await;
}

/// inotify tells of reads too. The watcher read the file to see whether it had changed, was told of
/// its own read, and read again: an idle gateway burnt a core. So did one whose log lay beside its file.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_gateway_leaves_its_file_alone() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let reads = || {
        let io = std::fs::read_to_string(format!("/proc/{}/io", gateway.process.id().unwrap())).unwrap();
        io.lines().find_map(|line| line.strip_prefix("syscr: ")?.parse::<u64>().ok()).unwrap()
    };
    let (start, before) = (std::time::Instant::now(), reads());
    let mut beside = std::fs::File::create(gateway.file.with_extension("log")).unwrap();
    for _ in 0..100 {
        std::io::Write::write_all(&mut beside, b"a line\n").unwrap();
        tests::get(gateway.admin, "/healthz").await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Each call reads a few times; the loop read thousands of times a second.
    let allowed = 100 * 10 + 200 * start.elapsed().as_secs().max(1);
    assert!(reads() - before < allowed, "{} reads", reads() - before);
}

/// hyper sends a GET without a length as one without a body. A search with a chunked body reached the
/// upstream as another request than the client's, and its bytes were lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_get_with_a_body_keeps_it() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let request = b"GET /_search HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nquery\r\n0\r\n\r\n";
    let got = raw(gateway.address, request, |got| got.ends_with("legacy")).await;
    assert!(got.starts_with("HTTP/1.1 200"), "{got}");
    assert_eq!(
        (legacy.last().body.as_slice(), legacy.last().field("transfer-encoding").as_str()),
        (&b"query"[..], "chunked")
    );
    // And a POST without one says so: some servers answer 411 otherwise.
    raw(gateway.address, b"POST / HTTP/1.1\r\nhost: a\r\n\r\n", |got| got.ends_with("legacy")).await;
    assert_eq!(legacy.last().field("content-length"), "0");
}

/// An upstream that sends both chunks and a length was believed in the length towards the client: a longer body was cut
/// off silently, and the rest of the connection was out of step. Two answers in one are none.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_beside_a_length_are_no_answer() {
    let legacy = Origin::start(|_| {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n";
        Reply::Bytes(format!("{head}5\r\nwhole\r\n0\r\n\r\n").into_bytes())
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let answer = send(gateway.address, "GET", "/", &[], "").await;
    assert_eq!((answer.status, answer.json()["upstream"].as_str()), (502, Some("legacy")));
    assert_eq!(answer.field("proxy-status"), "gw; error=http_protocol_error; next-hop=legacy");
}

/// A second signal while the drain's delay ran left the acceptor alive and the workers waiting for it: the process served on
/// and could only be killed.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_at_once() {
    let legacy = Origin::named("legacy").await;
    let mut gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "drain: {delay: 1h}\n")).await;
    let mut client = tests::Client::new(gateway.address);
    client.send(tests::client::request("GET", "/", &[], "")).await.unwrap();
    gateway.signal("TERM");
    gateway.log_line("draining").await;
    gateway.signal("TERM");
    assert!(gateway.end().await.success());
}

/// A body that nobody had asked for yet counted as one that streams. So the limits of a POST did not run while it
/// waited for a connection, and it was told that the upstream did not read.
#[tokio::test(flavor = "multi_thread")]
async fn limits_run_while_a_post_waits_for_a_connection() {
    let legacy = Origin::start(|_| Reply::Hang).await;
    let file = format!(
        "upstreams:\n  legacy: {{url: \"{}\", connections: {{max: 1}}}}\ndefaults: {{timeout: {{request: 500ms}}}}\n",
        legacy.url()
    );
    let folder = tests::folder();
    let path = folder.path().join("routes.yaml");
    std::fs::write(&path, Gateway::whole(&file)).unwrap();
    let gateway = Gateway::start_on(&path, &["--workers", "1"]).await;
    let address = gateway.address;
    let asking: Vec<_> =
        (0..3).map(|_| tokio::spawn(async move { send(address, "POST", "/", &[], "x").await })).collect();
    for asked in asking {
        let answer = asked.await.unwrap();
        assert_eq!(
            (answer.status, answer.field("proxy-status")),
            (504, "gw; error=http_response_timeout; next-hop=legacy; details=\"the limit `request` fired\"")
        );
    }
}

/// An answer that came before its request was over gave the connection's place away while hyper went on pumping the
/// body: outside the cap, and without a limit.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_outlives_its_answer_keeps_its_place_and_its_limit() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let legacy = Origin::start_early(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\n\r\nno").await;
    let file = yaml(&[("legacy", format!("http://{}", legacy.0))], "defaults: {timeout: {idle: 500ms}}\n");
    let gateway = Gateway::start(&file).await;
    let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nx").await.unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"no") {
        assert!(tcp.read_buf(&mut got).await.unwrap() > 0);
    }
    // The client never sends the rest. Its upstream connection ends all the same.
    until("the stuck upload is cut off", async || legacy.1.load(SeqCst) == 0).await;
    until("it is counted out", async || {
        gateway.metric("gateway_upstream_connections{upstream=\"legacy\"}").await == Some(0.0)
    })
    .await;
}

/// hyper never looks again after trailers, so a response that ended in them counted as broken off, and its connection was closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_ends_in_trailers_is_complete() {
    let legacy = Origin::start(|_| {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n";
        Reply::Bytes(format!("{head}2\r\nok\r\n0\r\nx-sum: 1\r\n\r\n").into_bytes())
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut client = tests::Client::new(gateway.address);
    for _ in 0..3 {
        assert_eq!(client.send(tests::client::request("GET", "/", &[], "")).await.unwrap().text(), "ok");
    }
    let line = gateway.access_line(|line| line["status"] == 200).await;
    assert_eq!(line["complete"], true);
    assert_eq!(legacy.connections.load(SeqCst), 1);
}

/// HTTP/1.0 knows no end but the connection's: a body that broke off looked whole. Only a reset tells.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_body_is_a_reset_for_an_old_client() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let legacy =
        Origin::start(|_| Reply::Last(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n".to_vec()))
            .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut got = Vec::new();
    let ended = tcp.read_to_end(&mut got).await;
    assert_eq!(
        ended.map_err(|error| error.kind()),
        Err(std::io::ErrorKind::ConnectionReset),
        "{}",
        String::from_utf8_lossy(&got)
    );
}

/// The gateway answered 413 and closed under a client that was still writing: the reset took the answer away.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upload_sees_its_answer() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "defaults: {max_body: 1KiB}\n")).await;
    for _ in 0..20 {
        let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
        tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 500000\r\n\r\n").await.unwrap();
        for _ in 0..50 {
            tcp.write_all(&[b'x'; 10_000]).await.unwrap();
        }
        let mut got = vec![0; 12];
        tcp.read_exact(&mut got).await.unwrap();
        assert_eq!(got, b"HTTP/1.1 413");
    }
}

/// A reload that was refused at its last step had already changed what lives on: the next good one closed all
/// connections and forgot the counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_reload_changes_nothing_that_lives_on() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let file = |routes: &str| yaml(&[("legacy", legacy.url()), ("orders", orders.url())], routes);
    let route = "routes:\n  - {name: orders, match: /orders, upstream: orders, stage: migrated}\n";
    let gateway = Gateway::start(&file(route)).await;
    let mut client = tests::Client::new(gateway.address);
    let mut ask = async || client.send(tests::client::request("GET", "/orders", &[], "")).await.unwrap();
    ask().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let bad = format!("listen: {}\nadmin: 127.0.0.1:0\n{}", taken.local_addr().unwrap(), file(""));
    let error = gateway.refuse(&bad).await;
    assert!(error.contains("cannot listen on"), "{error}");
    gateway.save(&file(&format!("{route}# flipped\n")));
    until("the good file runs", async || gateway.generation().await == 2).await;
    ask().await;
    assert_eq!(orders.connections.load(SeqCst), 1);
    let counted = "gateway_requests_total{route=\"orders\",arm=\"service\",status=\"2xx\"}";
    until("both are counted", async || gateway.metric(counted).await == Some(2.0)).await;
}

/// After a refusal only the includes of the last good file were watched: mending a new one did nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_include_is_noticed_when_it_comes() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let text = format!("{}include: [more/orders.yaml]\n", Gateway::whole(&yaml(&[("legacy", legacy.url())], "")));
    let error = gateway.refuse(&text).await;
    assert!(error.contains("included file not found: `more/orders.yaml`"), "{error}");
    let folder = gateway.file.parent().unwrap().join("more");
    std::fs::create_dir(&folder).unwrap();
    let route = "routes:\n  - {match: /orders, upstream: orders, stage: migrated}\n";
    std::fs::write(folder.join("orders.yaml"), yaml(&[("orders", orders.url())], route)).unwrap();
    until("the include runs", async || {
        send(gateway.address, "GET", "/orders", &[], "").await.field("x-served-by") == "orders"
    })
    .await;
}

/// A client of HTTP/2 that gives its streams no window keeps hyper from polling the body, and with it the idle limit: a few
/// connections held every place at an upstream for ever.
#[tokio::test(flavor = "multi_thread")]
async fn streams_without_a_window_do_not_hold_an_upstream() {
    let legacy = Origin::start(|_| Reply::ok(&"x".repeat(1_000_000))).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "defaults: {timeout: {idle: 1s}}\n")).await;
    let tcp = TcpStream::connect(gateway.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new())
        .initial_stream_window_size(1)
        .handshake(hyper_util::rt::TokioIo::new(tcp))
        .await
        .unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("http://a/").body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(legacy.open.load(SeqCst), 1);
    until("the upstream's connection is given up", async || legacy.open.load(SeqCst) == 0).await;
    drop(response);
}

/// Status codes as the static table of HPACK has them (RFC 7541 appendix A).
fn status(payload: &[u8]) -> &'static str {
    match payload.first() {
        Some(0x88) => "200",
        Some(0x8c) => "400",
        _ => "another",
    }
}

/// What goes on of an HTTP/2 request is HTTP/1.1, and was not held to its rules: an empty length went beside chunks, equal lengths as two
/// fields, and trailers could say what only the gateway says.
#[tokio::test(flavor = "multi_thread")]
async fn requests_of_http2_go_on_by_the_rules_of_http1() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut tcp = http2::connect(gateway.address).await;
    let mut stream = 1;
    for bad in [
        &[("content-length", "")][..],
        &[("content-length", "1"), ("content-length", "1")],
        &[("content-length", "1"), ("content-length", "01")],
        &[("content-length", "+1")],
        &[("host", "b")],
    ] {
        tcp.write_all(&http2::frame(HEADERS, END_HEADERS, stream, &http2::head("POST", "/", bad))).await.unwrap();
        tcp.write_all(&http2::frame(DATA, END_STREAM, stream, b"x")).await.unwrap();
        let (kind, _, payload) = http2::next_of(&mut tcp, stream).await.unwrap();
        // Refused by the library or by the gateway.
        assert!(kind == RST_STREAM || (kind == HEADERS && status(&payload) == "400"), "{bad:?}: {kind} {payload:?}");
        while kind == HEADERS
            && http2::next_of(&mut tcp, stream).await.is_some_and(|(_, flags, _)| flags & END_STREAM == 0)
        {}
        stream += 2;
    }
    assert_eq!(legacy.count(), 0, "{:?}", legacy.received());
    for bad in ["/\u{e9}", "?x"] {
        tcp.write_all(&http2::frame(HEADERS, END_HEADERS | END_STREAM, stream, &http2::head("GET", bad, &[])))
            .await
            .unwrap();
        let (kind, _, payload) = http2::next_of(&mut tcp, stream).await.unwrap();
        assert!(kind == RST_STREAM || (kind == HEADERS && status(&payload) == "400"), "{bad:?}: {kind} {payload:?}");
        while kind == HEADERS
            && http2::next_of(&mut tcp, stream).await.is_some_and(|(_, flags, _)| flags & END_STREAM == 0)
        {}
        stream += 2;
    }
    assert_eq!(legacy.count(), 0, "{:?}", legacy.received());
    let trailers = [
        ("x-sum", "1"),
        ("x-gateway-cohort", "x=service"),
        ("x-forwarded-for", "1.2.3.4"),
        ("authorization", "Basic x"),
        ("host", "b"),
        ("content_length", "9"),
    ];
    tcp.write_all(&http2::frame(HEADERS, END_HEADERS, stream, &http2::head("POST", "/", &[]))).await.unwrap();
    tcp.write_all(&http2::frame(DATA, 0, stream, b"body")).await.unwrap();
    tcp.write_all(&http2::frame(HEADERS, END_HEADERS | END_STREAM, stream, &http2::fields(&trailers))).await.unwrap();
    until("it arrived", async || legacy.count() == 1).await;
    assert_eq!(legacy.last().body, b"body");
    assert_eq!(legacy.last().trailers, "x-sum: 1\r\n");
}

/// hyper takes a reset without an error for the end of a body: half an upload reached the upstream as a whole one.
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_upload_of_http2_is_not_whole() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut tcp = http2::connect(gateway.address).await;
    for (stream, length) in [(1, None), (3, Some("1000"))] {
        let length: Vec<_> = length.map(|length| ("content-length", length)).into_iter().collect();
        let head = http2::head("POST", "/half", &length);
        tcp.write_all(&http2::frame(HEADERS, END_HEADERS, stream, &head)).await.unwrap();
        tcp.write_all(&http2::frame(DATA, 0, stream, b"half")).await.unwrap();
        until("it is on its way", async || legacy.open.load(SeqCst) == 1).await;
        tcp.write_all(&http2::frame(RST_STREAM, 0, stream, &[0; 4])).await.unwrap();
        until("its connection is closed", async || legacy.open.load(SeqCst) == 0).await;
    }
    assert_eq!(legacy.count(), 0, "{:?}", legacy.received());
}

/// A whole target without a path went on without one: `GET ?x HTTP/1.1`.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_without_a_path_gets_one() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    for (target, line) in [("http://a?x=1", "GET /?x=1 HTTP/1.1"), ("http://a", "GET / HTTP/1.1")] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: a\r\n\r\n");
        raw(gateway.address, request.as_bytes(), |got| got.ends_with("legacy")).await;
        assert_eq!(legacy.last().line(), line);
    }
}

/// A client that left after its answer had begun, before its request was over, was noticed by nobody.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_an_early_answer_is_noticed() {
    let open = Arc::new(AtomicUsize::new(0));
    let counted = open.clone();
    let origin = Origin::listen(move |mut tcp| {
        let open = counted.clone();
        async move {
            open.fetch_add(1, SeqCst);
            read_until(&mut tcp, "\r\n\r\n").await;
            tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n").await.unwrap();
            while let Ok(1..) = tcp.read(&mut [0; 4096]).await {}
            open.fetch_sub(1, SeqCst);
        }
    })
    .await;
    let rest = "defaults: {timeout: {idle: 0s}}\n";
    let gateway = Gateway::start(&yaml(&[("legacy", format!("http://{origin}"))], rest)).await;
    for (head, ends) in
        [("transfer-encoding: chunked\r\n\r\n1\r\nx\r\n", ""), ("transfer-encoding: chunked\r\n\r\n", "0\r\n\r\n")]
    {
        let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
        tcp.write_all(format!("POST /x HTTP/1.1\r\nhost: a\r\n{head}").as_bytes()).await.unwrap();
        assert!(read_until(&mut tcp, "hi").await.ends_with("hi\r\n"));
        tcp.write_all(ends.as_bytes()).await.unwrap();
        drop(tcp);
        until("the upstream is let go", async || open.load(SeqCst) == 0).await;
    }
}

/// A request whose client left while it waited for a connection was sent all the same when it had one: an order that nobody waits for.
#[tokio::test(flavor = "multi_thread")]
async fn a_post_that_waits_is_not_sent_for_a_client_that_left() {
    let legacy =
        Origin::start(|request| if request.line().contains("/hold") { Reply::Hang } else { Reply::ok("ok") }).await;
    let file = format!("upstreams: {{legacy: {{url: \"{}\", connections: {{max: 1}}}}}}\n", legacy.url());
    let folder = tests::folder();
    let path = folder.path().join("routes.yaml");
    std::fs::write(&path, Gateway::whole(&file)).unwrap();
    let gateway = Gateway::start_on(&path, &["--workers", "1"]).await;
    let mut holder = TcpStream::connect(gateway.address).await.unwrap();
    holder.write_all(b"GET /hold HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    until("the only connection is taken", async || legacy.open.load(SeqCst) == 1).await;
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    client.write_all(b"POST /order HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\norder").await.unwrap();
    until("it waits", async || gateway.metric("gateway_client_connections").await == Some(2.0)).await;
    drop(client);
    until("its leaving is noticed", async || gateway.metric("gateway_client_connections").await == Some(1.0)).await;
    drop(holder);
    let answer = send(gateway.address, "GET", "/next", &[], "").await;
    assert_eq!(answer.text(), "ok");
    assert!(legacy.received().iter().all(|request| !request.line().contains("/order")), "{:?}", legacy.received());
}

/// A body that ends with its connection looked whole when the reset that ended it had been told to a write before.
#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_no_end_of_a_body_that_ends_with_its_connection() {
    let origin = Origin::listen(|mut tcp| async move {
        read_until(&mut tcp, "\r\n\r\n").await;
        tcp.write_all(b"HTTP/1.1 200 OK\r\n\r\nhalf").await.unwrap();
        // The client's next bytes are not read: the close is a reset.
        let mut byte = [0; 1];
        while tcp.peek(&mut byte).await.is_err() {}
        #[allow(deprecated, reason = "a reset is what is wanted")]
        tcp.set_linger(Some(Duration::ZERO)).unwrap();
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", format!("http://{origin}"))], "")).await;
    for _ in 0..20 {
        let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
        tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
        let mut got = read_until(&mut tcp, "half").await;
        for _ in 0..5 {
            let _ = tcp.write_all(b"3\r\nabc\r\n").await;
        }
        let _ = tcp.read_to_string(&mut got).await;
        assert!(!got.ends_with("0\r\n\r\n"), "{got}");
    }
}

/// A WebSocket's request with a body would mix what is left of it with what follows the upgrade.
#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_has_no_body() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let request =
        b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\ncontent-length: 3\r\n\r\nabc";
    raw(gateway.address, request, |got| got.ends_with("legacy")).await;
    assert_eq!((legacy.last().field("upgrade"), legacy.last().body), (String::new(), b"abc".to_vec()));
}

/// The last bytes of an upload over TLS stayed in the layer that encrypts, when the socket took no more just then, and were never written.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_over_tls_is_flushed_to_its_end() {
    let (ca, config) = crate::tls::authority(&["localhost"]);
    let folder = tests::folder();
    let file = folder.path().join("ca.pem");
    std::fs::write(&file, ca).unwrap();
    let legacy = Origin::start_with(Some(config), |request| Reply::ok(&request.body.len().to_string())).await;
    let upstream = format!(
        "upstreams: {{legacy: {{url: \"https://localhost:{}\", ca: \"{}\"}}}}\n",
        legacy.address.port(),
        file.display()
    );
    let gateway = Gateway::start(&upstream).await;
    for size in [1, 70_000, 3_000_000, 5_000_001] {
        let answer = send(gateway.address, "POST", "/", &[], &"x".repeat(size)).await;
        assert_eq!((answer.status, answer.text()), (200, size.to_string()));
    }
}

/// The log said that a client had all of an answer that it never read.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_nobody_read_is_not_complete() {
    let body = "x".repeat(20 << 20);
    let legacy = Origin::start(move |_| Reply::ok(&body)).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    read_until(&mut tcp, "\r\n\r\n").await;
    drop(tcp);
    let line = gateway.access_line(|line| line["status"] == 200).await;
    assert_eq!(line["complete"], false);
}

/// The retries remembered only the last try: one that was never sent made the fallback believe that none had been. So a
/// service that did what a DELETE said, and died before it answered, had the monolith do it as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_the_service_may_have_done_is_never_the_monoliths() {
    for (method, fields, retry) in [
        ("DELETE", vec![], "retries: 1"),
        ("PUT", vec![], "retries: 3"),
        ("POST", vec![("idempotency-key", "k")], "retries: 1, idempotency_key: honoured"),
    ] {
        let legacy = Origin::named("legacy").await;
        // It takes the request, does what it says, and is killed before it answers.
        let service = Origin::start(|_| Reply::Hang).await;
        let proxy = tests::Faulty::start(service.address);
        let gateway = Gateway::start(&format!(
            "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{}\"}}\n\
             routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: migrated, retry: {{{retry}}}}}\n",
            legacy.url(),
            proxy.url()
        ))
        .await;
        let address = gateway.address;
        let asked = tokio::spawn(async move { send(address, method, "/orders", &fields, "x").await });
        until("the service has it", async || service.count() > 0).await;
        proxy.set(tests::Fault::Refuse);
        let answer = asked.await.unwrap();
        assert_eq!((answer.status, legacy.count()), (502, 0), "{method}: {}", answer.text());
    }
}

/// The same inside of one try: a connection that had served before broke after it took the request, it was replaced
/// silently, the new one was refused, and only that was told.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_a_broken_connection_took_is_never_the_monoliths() {
    let legacy = Origin::named("legacy").await;
    let service =
        Origin::start(|request| if request.line().starts_with("DELETE") { Reply::Hang } else { Reply::ok("ok") }).await;
    let proxy = tests::Faulty::start(service.address);
    let gateway = Gateway::start(&format!(
        "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{}\"}}\n\
         routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: migrated, retry: none}}\n",
        legacy.url(),
        proxy.url()
    ))
    .await;
    let address = gateway.address;
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // A connection that is used again, at each worker.
    for _ in 0..4 * workers {
        assert_eq!(send(address, "GET", "/orders", &[], "").await.status, 200);
    }
    let before = service.count();
    let asked = tokio::spawn(async move { send(address, "DELETE", "/orders", &[], "").await });
    until("the service has it", async || service.count() > before).await;
    proxy.set(tests::Fault::Refuse);
    let answer = asked.await.unwrap();
    assert_eq!((answer.status, legacy.count()), (502, 0), "{}", answer.text());
}

/// A client that paused its body was taken for a time limit, for which the upstream is to blame: a few such clients opened
/// its breaker.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stall_or_send_slowly_do_not_open_the_breaker() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let legacy = Origin::named("legacy").await;
    let breaker = "breaker: {min_requests: 3, slow_call: 100ms, open_for: 1m}";
    let gateway = Gateway::start(&format!(
        "upstreams:\n  legacy: {{url: \"{}\", {breaker}}}\ndefaults: {{timeout: {{idle: 500ms}}}}\n",
        legacy.url()
    ))
    .await;
    let begin = async || {
        let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
        tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 4\r\n\r\nab").await.unwrap();
        tcp
    };
    for slow in [false, true] {
        let mut clients = Vec::new();
        for _ in 0..5 {
            clients.push(begin().await);
        }
        if slow {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        for tcp in &mut clients {
            if slow {
                tcp.write_all(b"cd").await.unwrap();
            }
            let mut got = String::new();
            tcp.read_to_string(&mut got).await.unwrap();
            assert!(got.starts_with(if slow { "HTTP/1.1 200" } else { "HTTP/1.1 408" }), "{got}");
        }
    }
    let breaker = gateway.api("/api/status").await["upstreams"][0]["breaker"].clone();
    assert_eq!((breaker["state"].as_str(), breaker["failures"].as_u64()), (Some("closed"), Some(0)));
}

/// What a health check had called out stayed out for ever when the file no longer asked for checks.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_no_longer_checked_is_in() {
    let origin = Origin::start(|request| {
        if request.line().contains("wrong") { Reply::new("404 Not Found", &[], "") } else { Reply::ok("ok") }
    })
    .await;
    let file = |health: &str| {
        format!(
            "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{}\"{health}}}\n\
             routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: migrated, fallback: none}}\n",
            origin.url(),
            origin.url().replace("127.0.0.1", "localhost")
        )
    };
    let gateway = Gateway::start(&file(", health: {path: /wrong, every: 100ms, unhealthy_after: 1}")).await;
    gateway.log_line("an endpoint is unhealthy").await;
    gateway.flip(&file("")).await;
    assert_eq!(send(gateway.address, "GET", "/orders", &[], "").await.status, 200);
    until("it is in", async || gateway.api("/api/status").await["upstreams"][1]["endpoints"][0]["state"] == "healthy")
        .await;
}

/// A request that a route's predicates refused was not counted by its limit: a PUT where only GET was named went on to the
/// monolith without end.
#[tokio::test(flavor = "multi_thread")]
async fn falling_through_does_not_shed_the_rate_limit() {
    let legacy = Origin::named("legacy").await;
    let rest = "routes:\n  - {name: api, match: {path: /api, methods: [GET]}, rate_limit: {limit: 2/h}}\n";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], rest)).await;
    let mut told = Vec::new();
    for method in ["GET", "PUT", "PUT", "GET"] {
        told.push(send(gateway.address, method, "/api", &[], "").await.status);
    }
    assert_eq!((told, legacy.count()), (vec![200, 200, 429, 429], 2));
}

/// A hanging endpoint was never told of: the time limit that ended its tries dropped them without a word, and the balance
/// took it for the quickest of all.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_hangs_is_ejected() {
    let good = Origin::named("good").await;
    let hung = Origin::start(|_| Reply::Hang).await;
    let gateway = Gateway::start(&format!(
        "upstreams:\n  legacy: {{urls: [\"{}\", \"{}\"], balance: round_robin, outlier: {{consecutive_5xx: 3, base_ejection: 1h}}}}\n\
         defaults: {{timeout: {{attempt: 100ms}}}}\n",
        good.url(),
        hung.url()
    ))
    .await;
    for _ in 0..20 {
        send(gateway.address, "POST", "/", &[], "x").await;
    }
    assert_eq!((hung.count(), good.count()), (3, 17));
}

/// The body of a large upload that found no connection in time was said to be one that the upstream did not read, and so
/// was nobody's to take over.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_upload_that_was_never_sent_falls_back_like_a_small_one() {
    let legacy = Origin::named("legacy").await;
    // A listener whose queue is full takes no more connections.
    let full = crate::upstreams::socket_that_accepts_nobody();
    let gateway = Gateway::start(&format!(
        "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"http://{}\", connections: {{connect_timeout: 30s}}}}\n\
         routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: migrated, timeout: {{attempt: 200ms}}}}\n",
        legacy.url(),
        full.0
    ))
    .await;
    for size in [10, 1_000_000] {
        let answer = send(gateway.address, "POST", "/orders", &[], &"x".repeat(size)).await;
        assert_eq!((answer.status, legacy.last().body.len()), (200, size), "{}", answer.text());
    }
}

/// Clients that sent slowly kept all places of a half-open breaker, and everybody else was refused although the service was
/// well again.
#[tokio::test(flavor = "multi_thread")]
async fn slow_uploads_do_not_keep_a_breaker_half_open() {
    let legacy = Origin::named("legacy").await;
    let broken = Arc::new(AtomicUsize::new(1));
    let is_broken = broken.clone();
    let service = Origin::start(move |_| {
        if is_broken.load(SeqCst) == 1 { Reply::new("500 Internal Server Error", &[], "") } else { Reply::ok("ok") }
    })
    .await;
    let gateway = Gateway::start(&format!(
        "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{}\", breaker: {{min_requests: 2, open_for: 500ms}}}}\n\
         routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: retired}}\n",
        legacy.url(),
        service.url()
    ))
    .await;
    for _ in 0..2 {
        assert_eq!(send(gateway.address, "GET", "/orders", &[], "").await.status, 500);
    }
    broken.store(0, SeqCst);
    let mut slow = Vec::new();
    for _ in 0..6 {
        let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
        let head = "POST /orders HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 4\r\n\r\nab";
        tcp.write_all(head.as_bytes()).await.unwrap();
        slow.push(tcp);
    }
    until("it closes while others still send", async || {
        send(gateway.address, "GET", "/orders", &[], "").await;
        gateway.api("/api/status").await["upstreams"][1]["breaker"]["state"] == "closed"
    })
    .await;
    for mut tcp in slow {
        tcp.write_all(b"cd").await.unwrap();
        let got = read_until(&mut tcp, "ok").await;
        assert!(got.starts_with("HTTP/1.1 200"), "{got}");
    }
}

/// A client that waited to be asked for its body was taken for one that pauses it: no limit of the upstream ran, and the
/// client was told that it had been slow.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_to_be_asked_does_not_pause() {
    let legacy = Origin::listen(|mut tcp| async move {
        let _ = read_until(&mut tcp, "\r\n\r\n").await;
        // It neither asks for the body nor answers.
        let _ = tcp.read(&mut [0; 1]).await;
    })
    .await;
    let rest = "defaults: {timeout: {request: 300ms}}\n";
    let gateway = Gateway::start(&yaml(&[("legacy", format!("http://{legacy}"))], rest)).await;
    let head = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n";
    let got = raw(gateway.address, head.as_bytes(), |_| false).await;
    assert!(got.contains("HTTP/1.1 504") && got.contains("the limit `request` fired"), "{got}");
}

/// A reload that was refused for a listener that could not be bound had already forgiven the endpoints of what ran.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_reload_brings_no_endpoint_back() {
    let sick = Origin::start(|request| {
        if request.line().contains("healthz") {
            Reply::new("500 Internal Server Error", &[], "")
        } else {
            Reply::ok("sick")
        }
    })
    .await;
    let legacy = Origin::named("legacy").await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let file = |health: &str, listen: &str| {
        format!(
            "{listen}upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{}\"{health}}}\n\
             routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: migrated}}\n",
            legacy.url(),
            sick.url()
        )
    };
    let checked = ", health: {path: /healthz, every: 1h, unhealthy_after: 1}";
    let gateway = Gateway::start(&file(checked, "")).await;
    gateway.log_line("an endpoint is unhealthy").await;
    let bad = Gateway::whole(&file("", &format!("health: {}\n", taken.local_addr().unwrap())));
    assert!(gateway.refuse(&bad).await.contains("cannot listen"));
    assert_eq!(send(gateway.address, "GET", "/orders", &[], "").await.field("x-served-by"), "legacy");
}
