//! What clients may take of the gateway: bytes, time, connections, streams; and that nobody else notices those who take more.

use std::{path::Path, time::Duration};

use tests::{
    Client, Gateway, Origin, PATIENCE, Reply,
    http2::{self, CONTINUATION, END_HEADERS, END_STREAM, HEADERS, REQUEST, RST_STREAM, frame},
    raw, read_until, send, until,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::yaml;

async fn gateway(rest: &str) -> (Origin, Gateway) {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], rest)).await;
    (legacy, gateway)
}

/// Memory that a process holds, in bytes.
fn resident(gateway: &Gateway) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", gateway.process.id().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

async fn connect(gateway: &Gateway) -> TcpStream {
    let tcp = TcpStream::connect(gateway.address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    tcp
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_have_a_size() {
    let (legacy, gateway) = gateway("clients: {max_header: 4KiB, max_uri: 1KiB}\n").await;
    let get = async |target: usize, field: usize, fields: usize| {
        let many: String = (0..fields).map(|n| format!("x{n}: 1\r\n")).collect();
        let (target, field) = ("a".repeat(target), "b".repeat(field));
        let request = format!("GET /{target} HTTP/1.1\r\nhost: a\r\nx: {field}\r\n{many}connection: close\r\n\r\n");
        raw(gateway.address, request.as_bytes(), |_| false).await[..12].to_owned()
    };
    assert_eq!(get(1000, 1000, 90).await, "HTTP/1.1 200");
    assert_eq!(get(1100, 1, 1).await, "HTTP/1.1 414");
    assert_eq!(get(1, 4100, 1).await, "HTTP/1.1 431");
    assert_eq!(get(1, 1, 100).await, "HTTP/1.1 431");
    // One that never ends is refused as soon as it is too large, and is not kept.
    let mut tcp = connect(&gateway).await;
    let endless = tokio::spawn(async move {
        let (mut read, mut write) = tcp.split();
        let _ = write.write_all(b"GET / HTTP/1.1\r\n").await;
        let writing =
            async { while write.write_all(b"x: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n").await.is_ok() {} };
        let (_, got) = tokio::join!(timeout(PATIENCE, writing), read_until(&mut read, "connection: close"));
        got
    });
    assert!(timeout(PATIENCE, endless).await.unwrap().unwrap().starts_with("HTTP/1.1 431 "));
    assert_eq!(legacy.count(), 1);
}

/// Clients that send their heads slowly are told to go in time, and nobody waits for them meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn slow_heads_disturb_nobody() {
    let (_legacy, gateway) = gateway("clients: {header_timeout: 2s, keep_alive: 2s}\n").await;
    let mut slow = Vec::new();
    for n in 0..1000 {
        let mut tcp = connect(&gateway).await;
        // Some send a head in drops, some nothing at all.
        if n % 4 > 0 {
            tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nx-slow: ").await.unwrap();
        }
        slow.push(tcp);
    }
    let mut client = Client::new(gateway.address);
    for _ in 0..100 {
        let answer = client.send(tests::client::request("GET", "/", &[], "")).await.unwrap();
        assert_eq!(answer.status, 200);
    }
    for (n, mut tcp) in slow.into_iter().enumerate() {
        let mut got = String::new();
        // Another drop does not win time.
        if n % 4 > 0 {
            let _ = tcp.write_all(b"y").await;
        }
        let ended = timeout(PATIENCE, tcp.read_to_string(&mut got)).await.expect("it is told to go");
        // A drop that crosses with the end may draw a reset.
        let told = if n % 4 > 0 { got.starts_with("HTTP/1.1 408 ") } else { got.is_empty() };
        assert!(told || ended.is_err(), "{n}: {got}");
    }
    until("their connections are gone", async || gateway.metric("gateway_client_connections").await <= Some(1.0)).await;
}

/// Clients that send their bodies slowly take no more than half of an upstream's connections: the rest is for the others.
#[tokio::test(flavor = "multi_thread")]
async fn slow_bodies_disturb_nobody() {
    let legacy = Origin::named("legacy").await;
    let file = format!(
        "upstreams: {{legacy: {{url: \"{}\", connections: {{max: 8}}}}}}\ndefaults: {{timeout: {{request: 5s}}}}\n",
        legacy.url()
    );
    let gateway = Gateway::start(&file).await;
    let mut slow = Vec::new();
    for _ in 0..200 {
        let mut tcp = connect(&gateway).await;
        tcp.write_all(b"POST /slow HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\na").await.unwrap();
        slow.push(tcp);
    }
    for _ in 0..5 {
        let answer = send(gateway.address, "GET", "/", &[], "").await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        // Also for one that has a body, but a quick one.
        let answer = send(gateway.address, "POST", "/", &[], &"x".repeat(10_000)).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    // And the slow ones are served when they are done, all of them.
    for tcp in &mut slow {
        tcp.write_all(b"bcd").await.unwrap();
    }
    for mut tcp in slow {
        let got = timeout(PATIENCE, read_until(&mut tcp, "\r\n\r\nlegacy")).await.unwrap();
        assert!(got.starts_with("HTTP/1.1 200 "), "{got}");
    }
    let slow = legacy.received().into_iter().filter(|request| request.line() == "POST /slow HTTP/1.1");
    assert!(slow.map(|request| request.body).eq(std::iter::repeat_n(b"abcd".to_vec(), 200)));
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_are_closed_at_once() {
    let (_legacy, gateway) = gateway("clients: {max_connections: 3}\n").await;
    let mut clients: Vec<TcpStream> = Vec::new();
    for _ in 0..3 {
        let mut tcp = connect(&gateway).await;
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        assert!(read_until(&mut tcp, "legacy").await.starts_with("HTTP/1.1 200 "));
        clients.push(tcp);
    }
    let mut fourth = connect(&gateway).await;
    let ended = timeout(PATIENCE, fourth.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    assert_eq!(gateway.metric("gateway_client_connections_refused_total").await, Some(1.0));
    drop(clients);
    until("there is room again", async || {
        let mut tcp = connect(&gateway).await;
        let _ = tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        read_until(&mut tcp, "legacy").await.contains("200")
    })
    .await;
}

/// No file descriptor left: whoever is there is served, and whoever comes is, as soon as one is free.
#[tokio::test(flavor = "multi_thread")]
async fn running_out_of_files_is_survived() {
    let legacy = Origin::named("legacy").await;
    let folder = tests::folder();
    let file = folder.path().join("routes.yaml");
    std::fs::write(&file, Gateway::whole(&yaml(&[("legacy", legacy.url())], ""))).unwrap();
    let gateway = Gateway::start_under(&["prlimit", "--nofile=90:90"], &file, &["--workers", "2"]).await;
    let mut first = Client::new(gateway.address);
    let ask = || tests::client::request("GET", "/", &[], "");
    assert_eq!(first.send(ask()).await.unwrap().status, 200);
    let mut crowd = Vec::new();
    for _ in 0..150 {
        crowd.push(connect(&gateway).await);
    }
    gateway.log_line("cannot accept").await;
    assert_eq!(first.send(ask()).await.unwrap().status, 200);
    drop(crowd);
    until("others are served again", async || {
        let mut client = Client::new(gateway.address);
        let answer = timeout(Duration::from_secs(5), client.send(ask())).await;
        matches!(answer, Ok(Ok(answer)) if answer.status == 200)
    })
    .await;
}

/// Writes until the other side has had enough, or all is written; then reads to the end, if there is one.
async fn flood(tcp: &mut TcpStream, frames: impl Iterator<Item = Vec<u8>>) {
    let (mut read, mut write) = tcp.split();
    let writing = async {
        for frame in frames {
            if write.write_all(&frame).await.is_err() {
                return;
            }
        }
    };
    let reading = async { while let Ok(1..) = read.read(&mut [0; 4096]).await {} };
    timeout(PATIENCE, async { tokio::join!(writing, reading) }).await.expect("the connection is closed");
}

/// Streams that are opened to be reset (CVE-2023-44487): the connection is closed, and the upstream hears of few.
#[tokio::test(flavor = "multi_thread")]
async fn rapid_resets_end_a_connection() {
    let legacy = Origin::start(|_| Reply::Hang).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let mut tcp = http2::connect(gateway.address).await;
    let pairs = (0..20_000).map(|n| {
        let stream = 2 * n + 1;
        let reset = frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
        [frame(HEADERS, END_STREAM | END_HEADERS, stream, REQUEST), reset].concat()
    });
    flood(&mut tcp, pairs).await;
    let asked = legacy.connections.load(std::sync::atomic::Ordering::SeqCst);
    assert!(asked <= 400, "{asked}");
    assert_eq!(gateway.metric("gateway_client_connections").await, Some(0.0));
}

/// A head in ever more pieces (CVE-2024-27316).
#[tokio::test(flavor = "multi_thread")]
async fn continuations_have_an_end() {
    let (legacy, gateway) = gateway("").await;
    let mut tcp = http2::connect(gateway.address).await;
    let field = [&[0x00, 0x01, b'x', 0x7f, 0x81, 0x01][..], &[b'y'; 256]].concat();
    let first = frame(HEADERS, END_STREAM, 1, REQUEST);
    let more = frame(CONTINUATION, 0, 1, &field.repeat(16));
    flood(&mut tcp, std::iter::once(first).chain(std::iter::repeat_n(more, 10_000))).await;
    assert_eq!(legacy.count(), 0);
    assert!(resident(&gateway) < 100 << 20);
}

/// One byte of a head a second is a slow head too when the protocol is HTTP/2: the connection does not last.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_head_of_http2_does_not_last() {
    let (_legacy, gateway) = gateway("clients: {header_timeout: 1s, keep_alive: 1s}\n").await;
    let mut tcp = http2::connect(gateway.address).await;
    tcp.write_all(&frame(HEADERS, END_STREAM, 1, REQUEST)).await.unwrap();
    let ended = timeout(PATIENCE, async { while let Ok(1..) = tcp.read(&mut [0; 4096]).await {} }).await;
    assert!(ended.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_of_one_connection_are_limited() {
    let legacy = Origin::start(|_| Reply::Hang).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "clients: {max_streams: 5}\n")).await;
    let mut tcp = http2::connect(gateway.address).await;
    for n in 0..20 {
        tcp.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, 2 * n + 1, REQUEST)).await.unwrap();
    }
    until("five are there", async || legacy.connections.load(std::sync::atomic::Ordering::SeqCst) == 5).await;
    // The others are refused (REFUSED_STREAM), one frame each: whoever gets it may ask again.
    let mut got = Vec::new();
    let refused = |got: &[u8]| got.windows(4).filter(|window| **window == 7_u32.to_be_bytes()).count();
    timeout(PATIENCE, async {
        while refused(&got) < 15 {
            assert!(tcp.read_buf(&mut got).await.unwrap() > 0);
        }
    })
    .await
    .expect("15 are refused");
    assert_eq!(legacy.connections.load(std::sync::atomic::Ordering::SeqCst), 5);
}

/// A gibibyte each way, through memory that stays as it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_gibibyte_flows_through_flat_memory() {
    const SIZE: u64 = 1 << 30;
    let origin = Origin::listen(|mut tcp| async move {
        let head = read_until(&mut tcp, "\r\n\r\n").await;
        if head.starts_with("GET") {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n");
            tcp.write_all(head.as_bytes()).await.unwrap();
            let chunk = vec![b'x'; 1 << 16];
            for _ in 0..SIZE >> 16 {
                tcp.write_all(&chunk).await.unwrap();
            }
        } else {
            let mut got = head.split_once("\r\n\r\n").unwrap().1.len() as u64;
            let mut chunk = vec![0; 1 << 16];
            while got < SIZE {
                got += tcp.read(&mut chunk).await.unwrap() as u64;
            }
            tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nall").await.unwrap();
        }
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", format!("http://{origin}"))], "")).await;
    let before = resident(&gateway);
    let mut tcp = connect(&gateway).await;
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut got = read_until(&mut tcp, "\r\n\r\n").await.split_once("\r\n\r\n").unwrap().1.len() as u64;
    let mut chunk = vec![0; 1 << 16];
    let mut most = 0;
    while got < SIZE {
        got += tcp.read(&mut chunk).await.unwrap() as u64;
        if got.is_multiple_of(1024) {
            most = most.max(resident(&gateway));
        }
    }
    assert_eq!(got, SIZE);
    let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {SIZE}\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.unwrap();
    for _ in 0..SIZE >> 16 {
        tcp.write_all(&chunk).await.unwrap();
    }
    assert!(read_until(&mut tcp, "all").await.starts_with("HTTP/1.1 200 "));
    most = most.max(resident(&gateway));
    assert!(most < before + (16 << 20), "{before} {most}");
}

/// A client that reads nothing holds its upstream back, not the gateway's memory; and in the end it is let go.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_its_upstream_back() {
    let written = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = written.clone();
    let origin = Origin::listen(move |mut tcp| {
        let counted = counted.clone();
        async move {
            read_until(&mut tcp, "\r\n\r\n").await;
            tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n").await.unwrap();
            let chunk = vec![b'x'; 1 << 16];
            while tcp.write_all(&chunk).await.is_ok() {
                counted.fetch_add(1 << 16, std::sync::atomic::Ordering::SeqCst);
            }
        }
    })
    .await;
    let rest = "defaults: {timeout: {idle: 2s}}\n";
    let gateway = Gateway::start(&yaml(&[("legacy", format!("http://{origin}"))], rest)).await;
    let before = resident(&gateway);
    let mut tcp = connect(&gateway).await;
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let line = gateway.access_line(|line| line["status"] == 200).await;
    assert_eq!(line["complete"], false);
    let written = written.load(std::sync::atomic::Ordering::SeqCst);
    // What the kernel's buffers of two connections hold.
    assert!(written < 64 << 20, "{written}");
    assert!(resident(&gateway) < before + (16 << 20));
    drop(tcp);
}

/// An idle connection costs no buffer: ten thousand of them are a few megabytes, and in nobody's way.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_idle_clients_are_nearly_free() {
    // This process has their other ends.
    let id = std::process::id().to_string();
    let raised = std::process::Command::new("prlimit").args(["--pid", &id, "--nofile=12000:"]).status();
    assert!(open_files() >= 12_000, "the limit of open files is {}: {raised:?}", open_files());
    let (_legacy, gateway) = gateway("clients: {keep_alive: 5m}\n").await;
    let mut idle = Vec::new();
    let mut baseline = 0;
    for n in 0..10_000 {
        if n == 100 {
            baseline = resident(&gateway);
        }
        let mut tcp = connect(&gateway).await;
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        let mut chunk = [0; 1024];
        assert!(tcp.read(&mut chunk).await.unwrap() > 0);
        idle.push(tcp);
    }
    assert_eq!(gateway.metric("gateway_client_connections").await, Some(10_000.0));
    let each = (resident(&gateway) - baseline) / 9_900;
    assert!(each < 4096, "{each} bytes a connection");
    for _ in 0..100 {
        assert_eq!(send(gateway.address, "GET", "/", &[], "").await.status, 200);
    }
}

fn open_files() -> u64 {
    let limits = std::fs::read_to_string(Path::new("/proc/self/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap_or(0)
}

/// The same when each stream is accepted, and on its way to the upstream, before it is reset.
#[tokio::test(flavor = "multi_thread")]
async fn resets_of_accepted_streams_end_a_connection_too() {
    let legacy = Origin::start(|_| Reply::Hang).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let asked = || legacy.connections.load(std::sync::atomic::Ordering::SeqCst);
    let mut tcp = http2::connect(gateway.address).await;
    let mut streams = 0;
    // A stream that is not asked for any more is told by the connection's end.
    while streams < 1000 {
        let before = asked();
        let stream = 2 * streams + 1;
        if tcp.write_all(&frame(HEADERS, END_STREAM | END_HEADERS, stream, REQUEST)).await.is_err() {
            break;
        }
        let reached = timeout(Duration::from_secs(2), async {
            while asked() == before {
                tokio::task::yield_now().await;
            }
        });
        if reached.await.is_err() {
            break;
        }
        let _ = tcp.write_all(&frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())).await;
        streams += 1;
    }
    assert!((50..400).contains(&streams), "{streams}");
    until("the connection is closed", async || gateway.metric("gateway_client_connections").await == Some(0.0)).await;
}
