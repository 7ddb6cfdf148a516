//! Each bug that was found, with its story.

use std::sync::atomic::Ordering::SeqCst;

use tests::{Gateway, Origin, Reply, raw, send, until};

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
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
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
            (504, "gw; error=http_response_timeout; next-hop=legacy")
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
    let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
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
    let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
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
        let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
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
    let tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
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
