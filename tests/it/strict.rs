//! Nothing that two parsers could read differently goes on, in either direction (RFC 9112 §2.2, §5, §6.1, §6.3, §7.1, §11).

use tests::{Gateway, Origin, Reply, raw, send, until};

use crate::yaml;

/// Requests that are no requests: answered with this status, and the connection closed.
const REFUSED: &[(&str, &str)] = &[
    // Length and coding (RFC 9112 §6.1, §6.3).
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ntransfer-encoding: identity\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: identity\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked;q=1\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \"chunked\"\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding : chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding\t: chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\n transfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3, 3\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3, 4\r\n\r\nabcd"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +3\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -3\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x3\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3 3\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3.0\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: \"3\"\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: three\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551619\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\tx\r\n\r\nabc"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length : 3\r\n\r\nabc"),
    // Lines and fields (§2.2, §5).
    ("400", "GET / HTTP/1.1\nhost: a\n\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\n\n"),
    ("400", "GET / HTTP/1.1\nhost: a\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx: y\rz: w\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx: y\r\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx\r: y\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx: y\0z\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx\0: y\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx: y\x01\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx: y\x0b\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx: y\x7f\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx : y\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx y: z\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\n: y\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n z\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\n x: y\r\nhost: a\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx[]: y\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nx\u{e9}: y\r\n\r\n"),
    // The request line (§3).
    ("400", "GET  / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /  HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET\t/ HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", " GET / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET / HTTP/1.1 \r\nhost: a\r\n\r\n"),
    ("400", "GET / a HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /\r\nhost: a\r\n\r\n"),
    ("400", "GET / http/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET / HTTP/11\r\nhost: a\r\n\r\n"),
    ("400", "GET / HTTP/1.1a\r\nhost: a\r\n\r\n"),
    ("400", "GET / XHTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "G\0T / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "G(T / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /\0 HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /\x01 HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /\x7f HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /\u{e9} HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /a#b HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET /a\r/b HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "\nGET / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("505", "GET / HTTP/2.0\r\nhost: a\r\n\r\n"),
    ("505", "GET / HTTP/1.2\r\nhost: a\r\n\r\n"),
    ("505", "GET / HTTP/0.9\r\nhost: a\r\n\r\n"),
    ("400", "\x16\x03\x01\x02\r\n\r\n"),
    // Targets and hosts (§3.2, §3.3).
    ("400", "GET / HTTP/1.1\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\r\nHost: b\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a, b\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a/b\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a b\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: user@a\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a:b\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a:80:80\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: [::1\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a\\b\r\n\r\n"),
    ("400", "GET / HTTP/1.1\r\nhost: a%00b\r\n\r\n"),
    ("400", "GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n\r\n"),
    ("400", "GET http://a/ HTTP/1.1\r\n\r\n"),
    ("400", "GET http://a/ HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"),
    ("400", "GET http://user@a/ HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET http:/// HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET http://a:80:80/ HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET ftp://a/ HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET http:a HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET a HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET a:80 HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET //a@b HTTP/1.1\r\nhost: a b\r\n\r\n"),
    ("400", "GET * HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "GET ?a HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n"),
    ("400", "CONNECT / HTTP/1.1\r\nhost: a\r\n\r\n"),
    ("400", "TRACE / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx"),
    ("400", "OPTIONS / HTTP/1.1\r\nhost: a\r\nmax-forwards: x\r\n\r\n"),
    ("400", "OPTIONS / HTTP/1.1\r\nhost: a\r\nmax-forwards: +1\r\n\r\n"),
    // Bodies (§7.1). The head may be on its way, the request never is.
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nx\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1;a\nb\r\na\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1;a\0b\r\na\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1 \r\na\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n 1\r\na\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\na\r\n0\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx : y\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: y\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: y\r\n z\r\n\r\n"),
    ("400", "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\r\n"),
];

#[tokio::test(flavor = "multi_thread")]
async fn what_two_parsers_could_read_differently_goes_no_further() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    for (status, request) in REFUSED {
        // Something that must not be taken for a request of its own follows each.
        let bytes = format!("{request}GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n");
        // To the end: the connection is closed.
        let got = raw(gateway.address, bytes.as_bytes(), |_| false).await;
        assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {got}");
        assert_eq!(got.to_ascii_lowercase().matches("connection: close").count(), 1, "{request:?}: {got}");
        assert!(got.contains("application/problem+json"), "{request:?}: {got}");
        assert_eq!(legacy.count(), 0, "{request:?}: {:?}", legacy.received());
    }
    // And the log tells of each.
    until("each is told", async || gateway.access().len() == REFUSED.len()).await;
    assert!(gateway.access().iter().all(|line| line["error"] == "http_request_error"));
}

/// The same one byte at a time: no answer depends on how the bytes come.
#[tokio::test(flavor = "multi_thread")]
async fn pieces_of_any_size_are_one_request() {
    use tokio::io::AsyncWriteExt as _;
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    for (status, request) in REFUSED.iter().filter(|(_, request)| request.len() < 60) {
        let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        for byte in request.as_bytes() {
            // It may have been refused already.
            if tcp.write_all(&[*byte]).await.is_err() {
                break;
            }
        }
        let _ = tcp.shutdown().await;
        let mut got = Vec::new();
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut tcp, &mut got).await;
        let got = String::from_utf8_lossy(&got).into_owned();
        assert!(got.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {got}");
    }
    let request = b"\r\nPOST /a?b=c HTTP/1.1\r\nHost:a\r\nTransfer-Encoding:\tCHUNKED \r\nX-A:  b \t c\t\r\n\r\n3;x=\"1\r\nabc\r\n0\r\nX-T: 1\r\n\r\n";
    let request = String::from_utf8_lossy(request).replace("\"1\r\n", "\"1\"\r\n");
    let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    for byte in request.as_bytes() {
        tcp.write_all(&[*byte]).await.unwrap();
        tokio::task::yield_now().await;
    }
    until("it arrived", async || legacy.count() == 1).await;
    let received = legacy.last();
    assert_eq!(received.line(), "POST /a?b=c HTTP/1.1");
    assert_eq!((received.body.as_slice(), received.field("x-a").as_str()), (&b"abc"[..], "b \t c"));
}

/// What goes on is written anew, byte by byte.
#[tokio::test(flavor = "multi_thread")]
async fn what_goes_on_is_written_anew() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let got = async |request: &str| {
        let before = legacy.count();
        let got = raw(gateway.address, request.as_bytes(), |got| got.ends_with("legacy")).await;
        assert!(got.starts_with("HTTP/1.1 200 OK\r\n"), "{request:?}: {got}");
        assert_eq!(legacy.count(), before + 1);
        let received = legacy.last();
        let own = ["via:", "x-request-id:"];
        let lines = received.head.split("\r\n").filter(|line| !own.iter().any(|name| line.starts_with(name)));
        (lines.collect::<Vec<_>>().join("\n"), String::from_utf8_lossy(&received.body).into_owned())
    };
    let added = "x-forwarded-for: 127.0.0.1\nx-forwarded-proto: http\nx-forwarded-host: a\nforwarded: for=127.0.0.1;proto=http;host=\"a\"";
    let cases = [
        ("GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\nhost: a\nADDED\n\n", ""),
        ("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\nhost: a\nADDED\n\n", ""),
        ("GET / HTTP/1.1\r\nHOST:a\r\nX:\t b  c \t\r\n\r\n", "GET / HTTP/1.1\nhost: a\nx: b  c\nADDED\n\n", ""),
        ("GET http://a/b?c HTTP/1.1\r\nHost: other\r\n\r\n", "GET /b?c HTTP/1.1\nhost: a\nADDED\n\n", ""),
        ("GET http://a HTTP/1.1\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\nhost: a\nADDED\n\n", ""),
        ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * HTTP/1.1\nhost: a\nADDED\n\n", ""),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0003\r\n\r\nabc",
            "POST / HTTP/1.1\nhost: a\ncontent-length: 3\nADDED\n\n",
            "abc",
        ),
        (
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\nTrailer: x\r\n\r\n003;a=b\r\nabc\r\n00\r\n\r\n",
            "POST / HTTP/1.1\nhost: a\ntrailer: x\nADDED\ntransfer-encoding: chunked\n\n",
            "abc",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nProxy-Connection: x\r\nUpgrade: h2c\r\nTE: gzip\r\n\r\n",
            "GET / HTTP/1.1\nhost: a\nADDED\n\n",
            "",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nTE: trailers, deflate\r\nConnection: TE\r\n\r\n",
            "GET / HTTP/1.1\nhost: a\nte: trailers\nconnection: te\nADDED\n\n",
            "",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nConnection: host, content-length, transfer-encoding\r\n\r\n",
            "GET / HTTP/1.1\nhost: a\nADDED\n\n",
            "",
        ),
        (
            "OPTIONS / HTTP/1.1\r\nHost: a\r\nMax-Forwards: 7\r\n\r\n",
            "OPTIONS / HTTP/1.1\nhost: a\nmax-forwards: 6\nADDED\n\n",
            "",
        ),
        (
            "GET / HTTP/1.1\r\nHost: a\r\nMax-Forwards: 0\r\n\r\n",
            "GET / HTTP/1.1\nhost: a\nmax-forwards: 0\nADDED\n\n",
            "",
        ),
    ];
    for (request, head, body) in cases {
        let head = head.replace("ADDED", added);
        assert_eq!(got(request).await, (head, body.to_owned()), "{request:?}");
    }
}

/// What an upstream sends, and what becomes of it: a 502, or a body that visibly breaks off.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_with_two_readings_is_none() {
    const BAD: &[&str] = &[
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
        "HTTP/1.1 200 OK\r\ncontent-length: 3, 4\r\n\r\nabcd",
        "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: identity\r\n\r\nabc",
        "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\ncontent-length: 3\n\nabc",
        "HTTP/1.1 200 OK\r\nx: y\r\n z\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nx : y\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nx: y\0\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nx: y\rz\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\nnothing\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 20 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 2000 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1  200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/2.0 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "HTTP/1.1 200 O\0K\r\ncontent-length: 3\r\n\r\nabc",
        "\r\nHTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
        "ICY 200 OK\r\n\r\nabc",
        "<html>\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-le",
        "",
    ];
    const CUT: &[&str] = &[
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nx\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx : y\r\n\r\n",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n",
    ];
    let all: Vec<&str> = BAD.iter().chain(CUT).copied().collect();
    let legacy = Origin::start(move |request| {
        let number: usize = request.line().split(['/', ' ']).nth(2).unwrap().parse().unwrap();
        Reply::Last(all[number].as_bytes().to_vec())
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    for (number, bad) in BAD.iter().enumerate() {
        let answer = send(gateway.address, "POST", &format!("/{number}"), &[], "x").await;
        assert_eq!(answer.status, 502, "{bad:?}: {}", answer.text());
        assert_eq!(answer.json()["upstream"], "legacy", "{bad:?}");
    }
    for (number, cut) in CUT.iter().enumerate() {
        let number = number + BAD.len();
        let request = format!("POST /{number} HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n");
        let got = raw(gateway.address, request.as_bytes(), |_| false).await;
        // A length that is not reached, or chunks without an end.
        let whole = got.ends_with("\r\n0\r\n\r\n") || got.starts_with("HTTP/1.1 502");
        assert!(!got.contains("\r\n0\r\n") && !whole || got.starts_with("HTTP/1.1 502"), "{cut:?}: {got}");
        let old = format!("GET /{number} HTTP/1.0\r\nhost: a\r\n\r\n");
        let mut tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut tcp, old.as_bytes()).await.unwrap();
        let mut got = Vec::new();
        let read = tokio::io::AsyncReadExt::read_to_end(&mut tcp, &mut got).await;
        let text = String::from_utf8_lossy(&got);
        assert!(read.is_err() || text.contains("content-length: 10") || text.contains(" 502 "), "{cut:?}: {text}");
    }
    // Each once: nothing was asked again.
    assert_eq!(legacy.count(), BAD.len() + 2 * CUT.len());
}

/// Answers with more than one request's worth on them: the next request must not get what is left over.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_after_an_answer_answer_nobody() {
    let legacy = Origin::start(|request| {
        let poison = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison";
        match request.line() {
            "HEAD / HTTP/1.1" => {
                Reply::Bytes(format!("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong{poison}").into())
            }
            "GET /empty HTTP/1.1" => {
                Reply::Bytes(format!("HTTP/1.1 204 No Content\r\ncontent-length: 5\r\n\r\n{poison}").into())
            }
            "GET /not HTTP/1.1" => {
                Reply::Bytes(format!("HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n{poison}").into())
            }
            "GET /twice HTTP/1.1" => {
                Reply::Bytes(format!("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ngood{poison}").into())
            }
            _ => Reply::ok("good"),
        }
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    for (method, path, status) in
        [("HEAD", "/", 200), ("GET", "/empty", 204), ("GET", "/not", 304), ("GET", "/twice", 200)]
    {
        let answer = send(gateway.address, method, path, &[], "").await;
        assert_eq!(answer.status, status);
        assert!(!answer.text().contains("poison") && !answer.text().contains("wrong"));
        for _ in 0..3 {
            let next = send(gateway.address, "POST", "/next", &[], "").await;
            assert_eq!((next.status, next.text().as_str()), (200, "good"), "after {method} {path}");
        }
    }
}
