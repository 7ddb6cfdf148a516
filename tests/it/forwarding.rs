//! What upstreams get and what clients get back, field by field.

use tests::{Gateway, Origin, Reply, raw, send};

use crate::yaml;

async fn alone(rest: &str) -> (Origin, Gateway) {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], rest)).await;
    (legacy, gateway)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_cannot_say_who_it_is() {
    let (legacy, gateway) = alone("").await;
    let forged = [
        ("x-forwarded-for", "1.2.3.4"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "evil"),
        ("x-forwarded-port", "1"),
        ("forwarded", "for=1.2.3.4"),
        ("x-real-ip", "1.2.3.4"),
        ("x_forwarded_for", "1.2.3.4"),
        ("x-original-url", "/admin"),
        ("x-rewrite-url", "/admin"),
        ("x_original_url", "/admin"),
        ("x-gateway-shadow", "1"),
    ];
    send(gateway.address, "GET", "/x?y=1", &forged, "").await;
    let got = legacy.last();
    assert_eq!(got.line(), "GET /x?y=1 HTTP/1.1");
    assert_eq!(got.field("x-forwarded-for"), "127.0.0.1");
    assert_eq!(got.field("x-forwarded-proto"), "http");
    assert_eq!(got.field("x-forwarded-host"), "shop.example.com");
    assert_eq!(got.field("forwarded"), "for=127.0.0.1;proto=http;host=\"shop.example.com\"");
    assert_eq!(got.field("host"), "shop.example.com");
    assert!(got.field("via").starts_with("1.1 gw-"));
    assert_eq!(got.field("x-request-id").len(), 32);
    for name in [
        "x-forwarded-port",
        "x-real-ip",
        "x_forwarded_for",
        "x-original-url",
        "x-rewrite-url",
        "x_original_url",
        "x-gateway-shadow",
    ] {
        assert_eq!(got.field(name), "", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_proxy_is_believed_and_extended() {
    let (legacy, gateway) = alone("trusted_proxies: [127.0.0.0/8, 10.0.0.0/8]\n").await;
    let said = [
        ("x-forwarded-for", "198.51.100.7, 203.0.113.9, 10.1.1.1"),
        ("x-forwarded-proto", "https, http"),
        ("x-forwarded-host", "www.example.com"),
        ("forwarded", "for=9.9.9.9"),
        ("x_forwarded_for", "6.6.6.6"),
        ("x-request-id", "given-1"),
    ];
    send(gateway.address, "GET", "/x", &said, "").await;
    let got = legacy.last();
    assert_eq!(got.field("x-forwarded-for"), "198.51.100.7, 203.0.113.9, 10.1.1.1, 127.0.0.1");
    assert_eq!(got.field("x-forwarded-proto"), "https");
    assert_eq!(got.field("x-forwarded-host"), "www.example.com");
    assert_eq!(
        got.field("forwarded"),
        "for=198.51.100.7;proto=https;host=\"www.example.com\", for=203.0.113.9, for=10.1.1.1, for=127.0.0.1"
    );
    assert_eq!((got.field("x_forwarded_for").as_str(), got.field("x-request-id").as_str()), ("", "given-1"));
    let line = gateway.access_line(|line| line["request_id"] == "given-1").await;
    assert_eq!(line["client"], "203.0.113.9", "the nearest that is no trusted proxy");
    send(gateway.address, "GET", "/x", &[("forwarded", "for=\"[2001:db8::1]:99\";proto=https")], "").await;
    let got = legacy.last();
    assert_eq!(
        (got.field("x-forwarded-for").as_str(), got.field("x-forwarded-proto").as_str()),
        ("2001:db8::1, 127.0.0.1", "https")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_of_one_connection_stay_on_it() {
    let legacy = Origin::start(|_| {
        let fields = [
            ("connection", "x-inner, keep-alive"),
            ("x-inner", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "x"),
            ("upgrade", "h2c"),
            ("x-kept", "1"),
        ];
        Reply::new("200 OK", &fields, "ok")
    })
    .await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let fields = [
        ("connection", "x-secret, close"),
        ("x-secret", "1"),
        ("keep-alive", "timeout=5"),
        ("proxy-connection", "keep-alive"),
        ("proxy-authorization", "Basic x"),
        ("te", "gzip"),
        ("x-kept", "1"),
    ];
    let answer = send(gateway.address, "GET", "/", &fields, "").await;
    let got = legacy.last();
    for name in ["x-secret", "keep-alive", "proxy-connection", "proxy-authorization", "te", "connection"] {
        assert_eq!(got.field(name), "", "{name}");
    }
    assert_eq!((got.field("x-kept").as_str(), answer.field("x-kept")), ("1", "1"));
    for name in ["x-inner", "keep-alive", "proxy-connection", "upgrade"] {
        assert_eq!(answer.field(name), "", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_in_every_form_reach_the_origin_in_one() {
    let (legacy, gateway) = alone("").await;
    for (target, host, line, seen) in [
        ("http://www.example.com/a?b", "ignored.example.com", "GET /a?b HTTP/1.1", "www.example.com"),
        ("http://www.example.com:8080", "x", "GET / HTTP/1.1", "www.example.com:8080"),
        ("/a/./b/../%63?q=%41", "h", "GET /a/c?q=%41 HTTP/1.1", "h"),
        ("/a//b/;x=1/", "h", "GET /a//b/;x=1/ HTTP/1.1", "h"),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        let got = raw(gateway.address, request.as_bytes(), |_| false).await;
        assert!(got.starts_with("HTTP/1.1 200"), "{target}: {got}");
        let received = legacy.last();
        assert_eq!((received.line(), received.field("host").as_str()), (line, seen), "{target}");
    }
    let before = legacy.count();
    for request in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a b\r\n\r\n",
        "GET http://user@a/ HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a:80:80\r\n\r\n",
        "CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
        "CONNECT /path HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        let got = raw(gateway.address, request.as_bytes(), |got| got.contains("\r\n\r\n")).await;
        assert!(got.starts_with("HTTP/1.1 400"), "{request:?}: {got}");
    }
    assert_eq!(legacy.count(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_clients_and_new_ones_are_served() {
    let (legacy, gateway) = alone("").await;
    let got = raw(gateway.address, b"GET /old HTTP/1.0\r\n\r\n", |_| false).await;
    assert!(got.starts_with("HTTP/1.1 200") && got.ends_with("legacy"), "{got}");
    let received = legacy.last();
    assert!(received.field("via").starts_with("1.0 gw-"));
    assert_eq!(received.field("host"), legacy.address.to_string());

    let tcp = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, hyper_util::rt::TokioIo::new(tcp)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::post("http://shop.example.com/new?a=b")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(http_body_util::Full::new(bytes::Bytes::from_static(b"body")))
        .unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
    let received = legacy.last();
    assert_eq!(received.line(), "POST /new?a=b HTTP/1.1");
    assert_eq!((received.field("host").as_str(), received.field("cookie").as_str()), ("shop.example.com", "a=1; b=2"));
    assert!(received.body == b"body" && received.field("via").starts_with("2.0 gw-"));
}

#[tokio::test(flavor = "multi_thread")]
async fn rewrites_show_the_service_its_own_paths_and_the_client_the_public_ones() {
    let legacy =
        Origin::start(|_| Reply::new("302 Found", &[("location", "/login"), ("set-cookie", "s=1; Path=/app")], ""))
            .await;
    let orders = Origin::start(|request| {
        let own = request.field("x-own");
        let fields = [
            ("location", format!("http://{own}/orders/7?x=1")),
            ("content-location", "/orders/7".to_owned()),
            ("set-cookie", "a=1; Domain=127.0.0.1; Path=/orders; HttpOnly".to_owned()),
        ];
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (*name, value.as_str())).collect();
        Reply::new("201 Created", &fields, "")
    })
    .await;
    let route = |stage: &str| {
        let text = format!(
            "routes:\n  - name: orders\n    match: /api/orders/**\n    upstream: orders\n    stage: {stage}\n    rewrite: {{strip_prefix: /api, host: upstream}}\n    headers:\n      request: {{set: {{x-tenant: shop}}, remove: [x-debug], add: {{x-extra: \"2\"}}}}\n      response: {{set: {{x-answer: edited}}}}\n"
        );
        yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &text)
    };
    let gateway = Gateway::start(&route("migrated")).await;
    let own = orders.address.to_string();
    let fields = [("x-own", own.as_str()), ("x-debug", "1"), ("x-extra", "1")];
    let answer = send(gateway.address, "POST", "//api//orders/?q=1", &fields, "x").await;
    let got = orders.last();
    assert_eq!(got.line(), "POST /orders/?q=1 HTTP/1.1");
    assert_eq!((got.field("host"), got.field("x-forwarded-host")), (own.clone(), "shop.example.com".to_owned()));
    assert_eq!(
        (got.field("x-forwarded-prefix").as_str(), got.field("x-tenant").as_str(), got.field("x-debug").as_str()),
        ("/api", "shop", "")
    );
    assert_eq!(got.fields("x-extra"), ["1", "2"]);
    assert_eq!(answer.field("location"), "http://shop.example.com/api/orders/7?x=1");
    assert_eq!(answer.field("content-location"), "/api/orders/7");
    assert_eq!(answer.field("set-cookie"), "a=1; Domain=shop.example.com; Path=/api/orders; HttpOnly");
    assert_eq!(answer.field("x-answer"), "edited");
    // The monolith gets what came and says what it always said; edits are the route's, whoever answers.
    gateway.flip(&route("legacy")).await;
    let answer = send(gateway.address, "POST", "/api/orders", &fields, "x").await;
    let got = legacy.last();
    assert_eq!(got.line(), "POST /api/orders HTTP/1.1");
    assert_eq!(
        (got.field("host").as_str(), got.field("x-forwarded-prefix").as_str(), got.field("x-tenant").as_str()),
        ("shop.example.com", "", "shop")
    );
    assert_eq!(
        (answer.field("location"), answer.field("set-cookie"), answer.field("x-answer")),
        ("/login", "s=1; Path=/app", "edited")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_beyond_the_limit_are_refused() {
    let (legacy, gateway) = alone("defaults: {max_body: 1KiB}\n").await;
    let small = "x".repeat(1024);
    assert_eq!(send(gateway.address, "POST", "/", &[], &small).await.status, 200);
    assert_eq!(legacy.last().body.len(), 1024);
    let large = send(gateway.address, "POST", "/", &[], &"x".repeat(1025)).await;
    assert_eq!(large.status, 413);
    assert_eq!(legacy.count(), 1, "a length that says too much is not even begun");
    let chunks = format!(
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n401\r\n{}\r\n0\r\n\r\n",
        "x".repeat(1025)
    );
    let got = raw(gateway.address, chunks.as_bytes(), |got| got.contains("\r\n\r\n")).await;
    assert!(got.starts_with("HTTP/1.1 413"), "{got}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_one_line_a_request_and_no_secret() {
    let (_legacy, gateway) = alone("").await;
    let secrets = [("authorization", "Bearer topsecret"), ("cookie", "session=topsecret")];
    send(gateway.address, "POST", "/x?token=topsecret", &secrets, "topsecret").await;
    send(gateway.address, "GET", "/y", &[], "").await;
    let line = gateway.access_line(|line| line["path"] == "/x").await;
    gateway.access_line(|line| line["path"] == "/y").await;
    let lines = gateway.access();
    assert_eq!(lines.len(), 2);
    assert!(!lines.iter().any(|line| line.to_string().contains("topsecret")));
    for (key, value) in [
        ("method", "POST"),
        ("route", "unrouted"),
        ("stage", "legacy"),
        ("arm", "legacy"),
        ("upstream", "legacy"),
        ("why", "stage"),
        ("host", "shop.example.com"),
    ] {
        assert_eq!(line[key], value, "{key}");
    }
    assert_eq!(
        (line["status"].as_u64(), line["bytes_in"].as_u64(), line["bytes_out"].as_u64()),
        (Some(200), Some(9), Some(6))
    );
    assert!(line["duration_ms"].as_f64() >= line["head_ms"].as_f64() && line["complete"] == true, "{line}");
}
