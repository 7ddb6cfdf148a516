//! WebSocket, server-sent events, and bodies that stream both ways.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::BodyExt as _;
use tests::{Gateway, Origin, Reply, raw, until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_tungstenite::{WebSocketStream, client_async, tungstenite::Message};

use crate::yaml;

async fn stub() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let options = legacy_stub::Options {
        listen: ([127, 0, 0, 1], 0).into(),
        play: legacy_stub::Part::Monolith,
        defect: Vec::new(),
        seed: 1,
        follow_stdin: false,
    };
    tokio::spawn(async move { legacy_stub::serve(listener, &options).await });
    url
}

async fn websocket(gateway: &Gateway) -> WebSocketStream<TcpStream> {
    let tcp = TcpStream::connect(gateway.address).await.unwrap();
    client_async("ws://shop.example.com/api/notifications/ws", tcp).await.unwrap().0
}

async fn echoed(socket: &mut WebSocketStream<TcpStream>, text: &str) {
    socket.send(Message::text(text)).await.unwrap();
    let answer = tokio::time::timeout(tests::PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(answer.into_text().unwrap().as_str(), text);
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_of_any_route_survive_every_reload() {
    let (legacy, other) = (stub().await, stub().await);
    let file = |route: &str| yaml(&[("legacy", legacy.clone()), ("other", other.clone())], route);
    let on = |stage: &str| {
        file(&format!("routes:\n  - {{name: n, match: /api/notifications/**, upstream: other, stage: {stage}}}\n"))
    };
    let gateway = Gateway::start(&on("legacy")).await;
    let mut first = websocket(&gateway).await;
    echoed(&mut first, "one").await;
    gateway.flip(&on("migrated")).await;
    let mut second = websocket(&gateway).await;
    echoed(&mut second, "two").await;
    gateway.flip(&file("")).await;
    // Even the upstream is another now.
    gateway.flip(&yaml(&[("legacy", other.clone())], "")).await;
    echoed(&mut first, "still the first").await;
    echoed(&mut second, "still the second").await;
    assert_eq!(gateway.metric("gateway_tunnels").await, Some(2.0));
    first.close(None).await.unwrap();
    drop(first);
    let line = gateway.access_line(|line| line["status"] == 101).await;
    assert!(line["bytes_out"].as_u64() > Some(10), "{line}");
    until("the tunnel is gone", async || gateway.metric("gateway_tunnels").await == Some(1.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_an_allowed_websocket_is_upgraded() {
    let legacy = Origin::start(|request| {
        if request.line().contains("/unasked") {
            return Reply::Bytes(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n".to_vec(),
            );
        }
        if request.line().contains("/other") {
            return Reply::Echo(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n".to_vec(),
            );
        }
        Reply::ok("plain")
    })
    .await;
    let routes = "routes:\n  - {match: /off/**, upgrades: none}\n  - {match: /empty/**, upgrades: []}\n";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], routes)).await;
    let ask = async |path: &str, protocol: &str| {
        let text = format!(
            "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: {protocol}\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        );
        raw(gateway.address, text.as_bytes(), |got| got.contains("\r\n\r\n")).await
    };
    for (path, protocol) in [("/x", "h2c"), ("/off/x", "websocket"), ("/empty/x", "websocket"), ("/x", "foo")] {
        let got = ask(path, protocol).await;
        assert!(got.starts_with("HTTP/1.1 200"), "{path} {protocol}: {got}");
        let received = legacy.last();
        assert_eq!(
            (received.field("upgrade"), received.field("connection"), received.field("http2-settings")),
            Default::default()
        );
    }
    ask("/x", "websocket").await;
    assert_eq!(
        (legacy.last().field("upgrade").as_str(), legacy.last().field("connection").as_str()),
        ("websocket", "Upgrade")
    );
    let got = ask("/other", "websocket").await;
    assert!(got.starts_with("HTTP/1.1 502") && got.contains("error=http_upgrade_failed"), "{got}");
    let got = raw(gateway.address, b"GET /unasked HTTP/1.1\r\nhost: a\r\n\r\n", |got| got.contains("\r\n\r\n")).await;
    assert!(got.starts_with("HTTP/1.1 502"), "{got}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_one_by_one_and_across_reloads() {
    let legacy = stub().await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.clone())], "")).await;
    let tcp = TcpStream::connect(gateway.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake::<_, http_body_util::Empty<bytes::Bytes>>(
        hyper_util::rt::TokioIo::new(tcp),
    )
    .await
    .unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("/api/notifications/stream?every_ms=100&count=20")
        .header("host", "a")
        .body(http_body_util::Empty::new())
        .unwrap();
    let mut response = sender.send_request(request).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut events = 0;
    while let Some(frame) = response.frame().await {
        let data = frame.unwrap().into_data().unwrap();
        // Each event comes alone, as it was made: nothing gathers them up.
        assert_eq!(String::from_utf8_lossy(&data).matches("data: ").count(), 1);
        events += 1;
        if events % 5 == 0 {
            gateway.flip(&yaml(&[("legacy", legacy.clone())], &format!("# {events}\n"))).await;
        }
    }
    assert_eq!(events, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_stream_both_ways_at_once() {
    // The origin answers with the first half of the request before the second half was sent.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut got = Vec::new();
        while !got.windows(5).any(|w| w == b"first") {
            tcp.read_buf(&mut got).await.unwrap();
        }
        tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await.unwrap();
        while !got.ends_with(b"0\r\n\r\n") {
            tcp.read_buf(&mut got).await.unwrap();
        }
        tcp.write_all(b"6\r\nsecond\r\n0\r\n\r\n").await.unwrap();
        let _ = tcp.read(&mut [0; 1]).await;
    });
    let gateway = Gateway::start(&yaml(&[("legacy", url)], "")).await;
    let mut tcp = TcpStream::connect(gateway.address).await.unwrap();
    tcp.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n").await.unwrap();
    let mut got = Vec::new();
    let read = tokio::time::timeout(tests::PATIENCE, async {
        while !got.windows(5).any(|w| w == b"first") {
            tcp.read_buf(&mut got).await.unwrap();
        }
    });
    read.await.expect("the first half of the answer, before the second half of the request");
    tcp.write_all(b"6\r\nsecond\r\n0\r\n\r\n").await.unwrap();
    let read = tokio::time::timeout(tests::PATIENCE, async {
        while !got.ends_with(b"0\r\n\r\n") {
            tcp.read_buf(&mut got).await.unwrap();
        }
    });
    read.await.expect("the rest");
    assert!(String::from_utf8_lossy(&got).contains("second"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_tunnel_ends() {
    let legacy = stub().await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy)], "defaults: {timeout: {idle: 300ms}}\n")).await;
    let mut socket = websocket(&gateway).await;
    echoed(&mut socket, "one").await;
    let end = tokio::time::timeout(Duration::from_secs(10), socket.next()).await.expect("it ends");
    assert!(end.is_none_or(|message| message.is_err()));
}
