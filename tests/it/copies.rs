//! Copies of requests: after the answer, marked, bounded, never of what writes; and how answers are compared.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use serde_json::{Value, json};
use tests::{Client, Gateway, Origin, Reply, client::request, get, send, until};

use crate::yaml;

fn file(legacy: &Origin, orders: &Origin, stage: &str, more: &str) -> String {
    let route =
        format!("routes:\n  - name: orders\n    match: /orders/**\n    upstream: orders\n    stage: {stage}\n{more}");
    yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &route)
}

fn json_reply(body: &Value) -> Reply {
    Reply::new("200 OK", &[("content-type", "application/json")], &body.to_string())
}

/// Waits until so many pairs were compared; what the ledger says then.
async fn compared(gateway: &Gateway, count: u64) -> Value {
    let mut told = Value::Null;
    until("the answers were compared", async || {
        told = gateway.api("/api/shadow/orders").await;
        told["compared"].as_u64() >= Some(count)
    })
    .await;
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_marked_has_the_credentials_and_is_seen_by_nobody() {
    let legacy = Origin::named("legacy").await;
    let orders =
        Origin::start(|_| Reply::new("200 OK", &[("set-cookie", "stolen=1"), ("x-served-by", "orders")], "legacy"))
            .await;
    let gateway = Gateway::start(&file(&legacy, &orders, "shadow", "    shadow: {exclude: [/orders/logout]}\n")).await;
    let fields = [
        ("authorization", "Bearer t"),
        ("cookie", "session=1"),
        ("x-gateway-shadow", "forged"),
        ("if-none-match", "\"a\""),
    ];
    let answer = send(gateway.address, "GET", "/orders/1?a=b", &fields, "").await;
    assert_eq!((answer.status, answer.field("x-served-by"), answer.field("set-cookie")), (200, "legacy", ""));
    compared(&gateway, 1).await;
    let copy = orders.last();
    assert_eq!(copy.line(), "GET /orders/1?a=b HTTP/1.1");
    assert_eq!(
        (copy.field("x-gateway-shadow"), copy.field("authorization"), copy.field("cookie")),
        ("1".to_owned(), "Bearer t".to_owned(), "session=1".to_owned())
    );
    // Whoever asks by condition may get less than the whole: the copy asks for all of it.
    assert_eq!(copy.field("if-none-match"), "");
    assert_eq!(copy.field("x-request-id"), legacy.last().field("x-request-id"));
    assert_eq!(legacy.last().field("x-gateway-shadow"), "");
    // What writes, what was excluded (in any spelling), and what asks for another method is not copied.
    for (method, target, fields) in [
        ("POST", "/orders/1", vec![]),
        ("DELETE", "/orders/1", vec![]),
        ("GET", "/orders/logout", vec![]),
        ("GET", "/orders/x/../%6cogout/", vec![]),
        ("GET", "/orders/2", vec![("x-http-method-override", "DELETE")]),
        ("GET", "/orders/2", vec![("range", "bytes=0-1")]),
    ] {
        assert_eq!(send(gateway.address, method, target, &fields, "").await.status, 200);
    }
    assert_eq!(send(gateway.address, "HEAD", "/orders/3", &[], "").await.status, 200);
    let told = compared(&gateway, 2).await;
    assert_eq!((told["matched"].as_u64(), told["parity_percent"].as_f64()), (Some(2), Some(100.0)));
    assert_eq!(gateway.metric("gateway_shadow_copies_total{route=\"orders\",result=\"copied\"}").await, Some(2.0));
    assert_eq!(gateway.metric("gateway_shadow_compared_total{route=\"orders\",result=\"matched\"}").await, Some(2.0));
    assert_eq!(orders.count(), 2, "{:?}", orders.received());
    // Copies are no requests: nothing counts them as such.
    let route = gateway.api("/api/routes/orders").await;
    assert_eq!(route["requests"]["service"]["2xx"], 0);
    assert_eq!(route["requests"]["legacy"]["2xx"], 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_defect_in_two_percent_of_answers_is_named_and_noise_is_not() {
    let number = Arc::new(AtomicUsize::new(0));
    let answer = move |defect: bool| {
        let number = number.clone();
        move |_: &tests::origin::Received| {
            let n = number.fetch_add(1, SeqCst);
            let mut items = vec![json!({"sku": "a", "price": 10}), json!({"sku": "b", "price": 20})];
            items.rotate_left(n % 2);
            let total = if defect && n.is_multiple_of(50) { 31 } else { 30 };
            Reply::new(
                "200 OK",
                &[("content-type", "application/json"), ("date", &format!("Sun, 22 Nov 2026 00:00:{:02} GMT", n % 60))],
                &json!({"id": format!("req-{n}"), "generated_at": n, "order": {"total": total}, "items": items})
                    .to_string(),
            )
        }
    };
    let (legacy, orders) = (Origin::start(answer(false)).await, Origin::start(answer(true)).await);
    let shadow = "    shadow: {noise: 25%, unordered: [/items], headers: [content-type]}\n";
    let gateway = Gateway::start(&file(&legacy, &orders, "shadow", shadow)).await;
    let mut client = Client::new(gateway.address);
    for _ in 0..2_000 {
        assert_eq!(client.send(request("GET", "/orders/1", &[], "")).await.unwrap().status, 200);
    }
    // The monolith also drew from the same counter, so about every fiftieth answer of the service is wrong.
    let mut told = Value::Null;
    until("every copy has come back", async || {
        told = gateway.api("/api/shadow/orders").await;
        told["waiting"] == 0 && told["compared"].as_u64() == told["copied"].as_u64()
    })
    .await;
    let judged = |judgement: &str| {
        let fields = told["fields"].as_array().unwrap().iter().filter(|field| field["judgement"] == judgement);
        fields.map(|field| field["field"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(judged("reported"), ["/order/total"], "{told:#}");
    let mut noise = judged("noise");
    noise.sort();
    assert_eq!(noise, ["/generated_at", "/id"], "{told:#}");
    let mut ignore: Vec<&str> =
        told["suggest"]["ignore"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    ignore.sort_unstable();
    assert_eq!(ignore, ["/generated_at", "/id"]);
    let parity = told["parity_percent"].as_f64().unwrap();
    assert!((95.0..99.9).contains(&parity), "{parity}");
    println!("compared {}, asked twice {}, parity {parity} %", told["compared"], told["asked_twice"]);
    let example = &told["fields"][0]["examples"][0];
    assert!(example["request"].as_str().unwrap().starts_with("GET, request id "), "{example}");
    assert_eq!((&example["control"], &example["candidate"]), (&json!("99"), &json!("99")), "examples are redacted");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_hangs_costs_its_clients_nothing() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::start(|_| Reply::Hang).await;
    let shadow = "    shadow: {max_requests: 2, max_pending: 3}\n    timeout: {request: 1m}\n";
    let gateway = Gateway::start(&file(&legacy, &orders, "shadow", shadow)).await;
    let mut client = Client::new(gateway.address);
    // `REQUESTS` says how many, for a look at the latencies, which are printed: with copies that hang, and without any.
    let count: usize = std::env::var("REQUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let mut p99 = async || {
        let mut taken = Vec::new();
        for _ in 0..count {
            let begun = std::time::Instant::now();
            let answer = client.send(request("GET", "/orders/1", &[], "")).await.unwrap();
            taken.push(begun.elapsed());
            assert_eq!((answer.status, answer.field("x-served-by")), (200, "legacy"));
        }
        taken.sort();
        (taken[count / 2], taken[count * 99 / 100])
    };
    let with = p99().await;
    // Two hang, three wait, all others were dropped: the last of them after its client had its answer.
    until("every copy has left or was dropped", async || {
        let told = gateway.api("/api/shadow/orders").await;
        (told["copied"].as_u64(), told["dropped"].as_u64()) == (Some(5), Some(count as u64 - 5))
    })
    .await;
    assert_eq!(orders.connections.load(SeqCst), 2);
    assert_eq!(legacy.count(), count);
    gateway.flip(&file(&legacy, &orders, "legacy", "")).await;
    println!("median and p99 of {count}: {with:?} with copies that hang, {:?} without copies", p99().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_without_an_answer_differs_whatever_is_ignored() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::start(|_| Reply::Close).await;
    let gateway = Gateway::start(&file(&legacy, &orders, "shadow", "    shadow: {ignore: [/**], noise: 100%}\n")).await;
    get(gateway.address, "/orders/1").await;
    let told = compared(&gateway, 1).await;
    assert_eq!((told["failed"].as_u64(), told["fields"][0]["field"].as_str()), (Some(1), Some("answer")));
    assert_eq!((told["mismatched"].as_u64(), orders.count()), (Some(1), 1), "a copy is sent once");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_are_copied_with_their_bodies_only_where_that_is_accepted() {
    let echo = |name: &'static str| {
        Origin::start(move |request| json_reply(&json!({"by": name, "got": String::from_utf8_lossy(&request.body)})))
    };
    let (legacy, orders) = (echo("legacy").await, echo("orders").await);
    let shadow = "    shadow: {methods: [POST], side_effects: accepted, max_body: 1KiB, ignore: [/by]}\n";
    let gateway = Gateway::start(&file(&legacy, &orders, "shadow", shadow)).await;
    assert_eq!(send(gateway.address, "POST", "/orders", &[], "a=1").await.json()["by"], "legacy");
    let chunked = "POST /orders HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n3\r\nb=2\r\n0\r\n\r\n";
    assert!(tests::raw(gateway.address, chunked.as_bytes(), |_| false).await.contains("b=2"));
    let told = compared(&gateway, 2).await;
    assert_eq!((told["matched"].as_u64(), orders.count()), (Some(2), 2), "{told:#}");
    let mut bodies: Vec<_> =
        orders.received().iter().map(|copy| String::from_utf8_lossy(&copy.body).into_owned()).collect();
    bodies.sort();
    assert_eq!(bodies, ["a=1", "b=2"]);
    assert!(orders.received().iter().all(|copy| copy.field("content-length") == "3"));
    // Longer than what is kept: the client is served, and nothing is copied.
    let long = "x".repeat(2_000);
    assert_eq!(send(gateway.address, "POST", "/orders", &[], &long).await.status, 200);
    until("it was counted", async || gateway.api("/api/shadow/orders").await["too_long"] == 1).await;
    assert_eq!((orders.count(), legacy.count()), (2, 3));
}

/// A monolith that answered before it had read all of an upload left half of a body behind, and the service was sent that half as a
/// whole request.
#[tokio::test(flavor = "multi_thread")]
async fn half_a_body_is_never_sent_on() {
    let answer = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 2\r\nconnection: close\r\n\r\nno";
    let (legacy, _) = Origin::start_early(answer).await;
    let orders = Origin::named("orders").await;
    let shadow = "routes:\n  - {name: orders, match: /orders/**, upstream: orders, stage: shadow, retry: none, shadow: {methods: [POST], side_effects: accepted}}\n";
    let gateway =
        Gateway::start(&yaml(&[("legacy", format!("http://{legacy}")), ("orders", orders.url())], shadow)).await;
    // The rest of it never comes.
    let half = "POST /orders HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nhalf";
    let got = tests::raw(gateway.address, half.as_bytes(), |got| got.ends_with("no")).await;
    assert!(got.starts_with("HTTP/1.1 401"), "{got}");
    until("it was left out", async || gateway.api("/api/shadow/orders").await["skipped"] == 1).await;
    assert_eq!(orders.count(), 0);
}

/// Copies had the same places as clients: a few slow ones kept everybody else from a service that serves few at a time.
#[tokio::test(flavor = "multi_thread")]
async fn copies_get_only_what_is_to_spare() {
    let legacy = Origin::named("legacy").await;
    let orders =
        Origin::start(
            |request| if request.field("x-gateway-shadow") == "1" { Reply::Hang } else { Reply::ok("orders") },
        )
        .await;
    let route = "routes:\n  - {name: orders, match: /orders/**, upstream: orders, stage: shadow}\n  - {name: other, match: /other, upstream: orders, stage: retired}\n";
    let gateway = Gateway::start(&format!(
        "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{}\", max_requests: 4}}\n{route}",
        legacy.url(),
        orders.url()
    ))
    .await;
    for _ in 0..10 {
        assert_eq!(get(gateway.address, "/orders/1").await.status, 200);
    }
    until("copies hang, the rest was dropped", async || {
        let told = gateway.api("/api/shadow/orders").await;
        told["dropped"].as_u64() == Some(8) && orders.count() == 2
    })
    .await;
    assert_eq!(get(gateway.address, "/other").await.text(), "orders");
    let told = gateway.api("/api/shadow/orders").await;
    assert_eq!(
        (told["compared"].as_u64(), told["failed"].as_u64()),
        (Some(0), Some(0)),
        "what was refused here is not held against the service"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_compared_by_what_they_say() {
    // The same JSON: compressed and in other words here, plain there; and one that is really different.
    let gzip: &[u8] =
        &[31, 139, 8, 0, 0, 0, 0, 0, 2, 255, 171, 86, 74, 84, 178, 82, 48, 172, 5, 0, 151, 142, 161, 251, 8, 0, 0, 0];
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: {}\r\n\r\n",
        gzip.len()
    );
    let packed = [head.as_bytes(), gzip].concat();
    let legacy = Origin::start(|_| {
        Reply::new("200 OK", &[("content-type", "application/json; charset=utf-8")], "{ \"a\" : 1.0 }")
    })
    .await;
    let orders = Origin::start(move |request| match request.line() {
        line if line.contains("/packed") => Reply::Bytes(packed.clone()),
        _ => json_reply(&json!({"a": 2})),
    })
    .await;
    let gateway = Gateway::start(&file(&legacy, &orders, "shadow", "    shadow: {headers: []}\n")).await;
    get(gateway.address, "/orders/packed").await;
    let told = compared(&gateway, 1).await;
    assert_eq!(told["matched"], 1, "{told:#}");
    get(gateway.address, "/orders/plain").await;
    let told = compared(&gateway, 2).await;
    assert_eq!((told["mismatched"].as_u64(), told["fields"][0]["field"].as_str()), (Some(1), Some("/a")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_copies_the_others_requests() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::named("orders").await;
    let canary = "    canary: {percent: 50%, by: [header:x-user]}\n    shadow: {headers: [x-served-by]}\n";
    let gateway = Gateway::start(&file(&legacy, &orders, "canary", canary)).await;
    let mut served = 0;
    for user in 0..40 {
        let answer = send(gateway.address, "GET", "/orders/1", &[("x-user", &user.to_string())], "").await;
        served += u64::from(answer.field("x-served-by") == "orders");
    }
    assert!(served > 0 && served < 40);
    compared(&gateway, 40 - served).await;
    assert_eq!(orders.count(), 40, "each request arrived there once: as itself or as a copy");
    let copies =
        orders.received().into_iter().filter(|request| request.field("x-gateway-shadow") == "1").collect::<Vec<_>>();
    assert_eq!(copies.len() as u64, 40 - served);
    assert!(copies.iter().all(|copy| copy.field("x-gateway-cohort").contains("service")), "{:?}", copies[0]);
}
