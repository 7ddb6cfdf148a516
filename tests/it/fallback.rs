//! The monolith in the service's place: each sentence of the language about it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use tests::{Answer, Client, Fault, Faulty, Gateway, Origin, Reply, client::request, send, until};

fn yaml(legacy: &Origin, service: &str, route: &str) -> String {
    format!(
        "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{service}\"}}\n\
         routes:\n  - {{name: orders, match: /api/orders/**, upstream: orders, {route}}}\n",
        legacy.url()
    )
}

fn is_monoliths(answer: &Answer) -> bool {
    answer.status == 200 && answer.field("x-served-by") == "legacy"
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_sent_is_the_monoliths_whatever_its_method() {
    let legacy = Origin::named("legacy").await;
    let service = Origin::named("orders").await;
    let dead = Faulty::start(service.address);
    dead.set(Fault::Refuse);
    let route =
        "stage: migrated, rewrite: {strip_prefix: /api, host: upstream}, headers: {request: {set: {x-shop: a}}}";
    let gateway = Gateway::start(&yaml(&legacy, &dead.url(), route)).await;
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
        let answer = send(gateway.address, method, "/api/orders/1?a=b", &[], "a body").await;
        assert!(is_monoliths(&answer), "{method}: {}", answer.text());
        let told = "gw; error=connection_refused; next-hop=orders, gw; next-hop=legacy; details=\"fallback from orders: unavailable\"";
        assert_eq!(answer.field("proxy-status"), told);
        let got = legacy.last();
        // The original: neither the service's path nor its host nor its prefix.
        assert_eq!(got.line(), format!("{method} /api/orders/1?a=b HTTP/1.1"));
        assert_eq!((got.field("host").as_str(), got.field("x-forwarded-prefix").as_str()), ("shop.example.com", ""));
        assert_eq!((got.field("x-shop").as_str(), got.body.as_slice()), ("a", &b"a body"[..]));
    }
    assert_eq!((legacy.count(), service.count()), (5, 0));
    let line = gateway.access_line(|line| line["method"] == "POST").await;
    assert_eq!(
        (line["arm"].as_str(), line["fallback"].as_str(), line["fallback_from"].as_str(), line["upstream"].as_str()),
        (Some("legacy"), Some("unavailable"), Some("orders"), Some("legacy"))
    );
    let metric = "gateway_fallbacks_total{route=\"orders\",reason=\"unavailable\"}";
    assert_eq!(gateway.metric(metric).await, Some(5.0));
    // It comes back, and is asked again.
    dead.set(Fault::None);
    until("the service answers", async || {
        send(gateway.address, "GET", "/api/orders/1", &[], "").await.field("x-served-by") == "orders"
    })
    .await;
    assert_eq!(service.last().line(), "GET /orders/1 HTTP/1.1");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_stages_that_have_a_monolith_behind_them_fall_back() {
    let legacy = Origin::named("legacy").await;
    let dead = Faulty::start(legacy.address);
    dead.set(Fault::Refuse);
    let url = dead.url();
    let gateway = Gateway::start(&yaml(&legacy, &url, "stage: canary, canary: {percent: 100%, by: [ip]}")).await;
    assert!(is_monoliths(&send(gateway.address, "POST", "/api/orders", &[], "x").await));
    for route in ["stage: retired", "stage: migrated, fallback: none", "stage: migrated, fallback: {when: [404]}"] {
        gateway.flip(&yaml(&legacy, &url, route)).await;
        let answer = send(gateway.address, "GET", "/api/orders", &[], "").await;
        assert_eq!(answer.status, 502, "{route}");
        assert_eq!(answer.field("proxy-status"), "gw; error=connection_refused; next-hop=orders");
    }
    assert_eq!(legacy.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_is_the_monoliths_only_if_safe_and_said_so() {
    let legacy = Origin::named("legacy").await;
    // Each answer is its connection's last: what breaks on a connection that was used before is repeated in any case.
    let last = |status: &str| {
        Reply::Last(format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").into_bytes())
    };
    let service = Origin::start(move |request| match request.line().split_whitespace().nth(1).unwrap() {
        "/api/orders/500" => last("500 Internal Server Error"),
        "/api/orders/404" => last("404 Not Found"),
        "/api/orders/501" => last("501 Not Implemented"),
        "/api/orders/close" => Reply::Close,
        "/api/orders/hang" => Reply::Hang,
        _ => Reply::ok("ok"),
    })
    .await;
    let words = ["[unavailable]", "[unavailable, 5xx]", "[404, 501]"];
    let falls = |word: &str, method: &str, what: &str| {
        method == "GET"
            && match what {
                "500" | "close" | "hang" => word.contains("5xx"),
                "501" => word.contains("5xx") || word.contains("501"),
                _ => word.contains("404"),
            }
    };
    let gateway = Gateway::start(&yaml(&legacy, &service.url(), "stage: migrated")).await;
    for word in words {
        let route = format!("stage: migrated, retry: none, timeout: {{attempt: 200ms}}, fallback: {{when: {word}}}");
        let text = yaml(&legacy, &service.url(), &route).replace("\"}\nroutes", "\", breaker: none}\nroutes");
        gateway.flip(&text).await;
        for what in ["500", "404", "501", "close", "hang"] {
            for method in ["POST", "PUT", "GET"] {
                let before = (legacy.count(), service.count());
                let answer = send(gateway.address, method, &format!("/api/orders/{what}"), &[], "").await;
                let after = (legacy.count() - before.0, service.count() - before.1);
                let fell = falls(word, method, what);
                assert_eq!(after, (usize::from(fell), 1), "{word} {method} {what}");
                assert_eq!(is_monoliths(&answer), fell, "{word} {method} {what}");
            }
        }
        // An override says that it is not what it seems.
        let overridden = [("x-http-method-override", "DELETE")];
        let answer = send(gateway.address, "GET", "/api/orders/500", &overridden, "").await;
        assert_eq!(answer.status, 500);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_crosses_over_only_where_both_systems_share_it() {
    let legacy = Origin::named("legacy").await;
    let service = Origin::start(|_| Reply::new("500 Internal Server Error", &[], "broken")).await;
    let gateway = Gateway::start(&yaml(&legacy, &service.url(), "stage: migrated")).await;
    for (policy, key, falls) in [("separate", "k", false), ("shared", "k", true), ("separate", "", false)] {
        let route = format!("stage: migrated, fallback: {{when: [5xx], idempotency: {policy}}}");
        gateway.flip(&yaml(&legacy, &service.url(), &route)).await;
        let before = legacy.count();
        let fields = if key.is_empty() { vec![] } else { vec![("idempotency-key", key)] };
        send(gateway.address, "POST", "/api/orders", &fields, "pay").await;
        assert_eq!(legacy.count() - before, usize::from(falls), "{policy} {key:?}");
        if falls {
            assert_eq!(legacy.last().body, b"pay");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_was_not_kept_whole_does_not_fall_back() {
    let legacy = Origin::named("legacy").await;
    // Reads some of the body and resets: never more than part of it is anybody's.
    let service = Origin::named("orders").await;
    let faulty = Faulty::start(service.address);
    let route = "stage: migrated, fallback: {when: [unavailable, 5xx], idempotency: shared}, replay_body: 1KiB";
    let gateway = Gateway::start(&yaml(&legacy, &faulty.url(), route)).await;
    faulty.set(Fault::Reset);
    let key = [("idempotency-key", "k")];
    let small = send(gateway.address, "PUT", "/api/orders", &key, &"x".repeat(1000)).await;
    assert!(is_monoliths(&small), "{}", small.text());
    assert_eq!(legacy.last().body.len(), 1000);
    let large = send(gateway.address, "PUT", "/api/orders", &key, &"x".repeat(2000)).await;
    assert_eq!((large.status, legacy.count()), (502, 1));
    // Never sent, it is whole whatever its size: nothing was read of it.
    faulty.set(Fault::Refuse);
    let unsent = send(gateway.address, "POST", "/api/orders", &[], &"x".repeat(2000)).await;
    assert!(is_monoliths(&unsent), "{}", unsent.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_breaker_goes_straight_to_the_monolith_and_a_fallback_counts_as_a_failure() {
    let legacy = Origin::named("legacy").await;
    let service = Origin::start(|_| Reply::new("500 Internal Server Error", &[], "broken")).await;
    let gateway =
        Gateway::start(&yaml(&legacy, &service.url(), "stage: migrated, fallback: {when: [unavailable, 5xx]}")).await;
    let mut client = Client::new(gateway.address);
    for n in 0..100 {
        let answer = client.send(request("GET", "/api/orders", &[], "")).await.unwrap();
        assert!(is_monoliths(&answer), "{n}");
    }
    // As many as the breaker needs to see.
    assert_eq!((service.count(), legacy.count()), (20, 100));
    let posted = client.send(request("POST", "/api/orders", &[], "x")).await.unwrap();
    assert!(is_monoliths(&posted), "what the breaker held back was never sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_honest_404_costs_two_requests_and_is_no_failure() {
    let legacy = Origin::start(|_| Reply::new("404 Not Found", &[], "nor here")).await;
    let service = Origin::start(|_| Reply::new("404 Not Found", &[], "not here")).await;
    let gateway = Gateway::start(&yaml(&legacy, &service.url(), "stage: migrated, fallback: {when: [404]}")).await;
    for n in 1..=40 {
        let answer = send(gateway.address, "GET", "/api/orders/17", &[], "").await;
        assert_eq!((answer.status, answer.text().as_str()), (404, "nor here"));
        assert_eq!((service.count(), legacy.count()), (n, n), "the breaker stays closed, and nothing is learned");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_service_does_not_have_is_learned_and_forgotten_at_a_write() {
    let legacy = Origin::named("legacy").await;
    let service = Origin::start(|request| {
        if request.line().contains("/export") { Reply::new("404 Not Found", &[], "") } else { Reply::ok("ok") }
    })
    .await;
    let gateway = Gateway::start(&yaml(&legacy, &service.url(), "stage: migrated, fallback: {when: [404]}")).await;
    let get = async |path: &str| send(gateway.address, "GET", path, &[], "").await;
    for n in 0..10 {
        assert!(is_monoliths(&get(&format!("/api/orders/{n}/export")).await));
    }
    assert_eq!((service.count(), legacy.count()), (3, 10), "three answers, then the detour is skipped");
    assert_eq!(get("/api/orders/1").await.text(), "ok");
    assert_eq!(
        get("/api/orders/9/export").await.field("proxy-status"),
        "gw; next-hop=legacy; details=\"fallback from orders: learned\""
    );
    assert_eq!(service.count(), 4);
    send(gateway.address, "POST", "/api/orders", &[], "x").await;
    assert!(is_monoliths(&get("/api/orders/9/export").await));
    assert_eq!(service.count(), 6, "after a write it is asked again");
}

#[tokio::test(flavor = "multi_thread")]
async fn absences_that_the_monolith_fills_count_against_the_service() {
    let legacy = Origin::named("legacy").await;
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    let service = Origin::start(move |_| {
        counted.fetch_add(1, SeqCst);
        Reply::new("501 Not Implemented", &[], "")
    })
    .await;
    let gateway = Gateway::start(&yaml(&legacy, &service.url(), "stage: migrated, fallback: {when: [501]}")).await;
    // Each at a path of its own, so that nothing is learned.
    for n in 0..60 {
        let name: String = n.to_string().bytes().map(|digit| char::from(digit + 49)).collect();
        assert!(
            is_monoliths(&send(gateway.address, "GET", &format!("/api/orders/{name}"), &[], "").await)
                || seen.load(SeqCst) == 20
        );
    }
    assert_eq!(seen.load(SeqCst), 20, "the breaker opened");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_everything_is_down_the_answer_names_who_failed_how_and_when_to_come_back() {
    let nobody = Origin::named("nobody").await;
    let dead = [Faulty::start(nobody.address), Faulty::start(nobody.address)];
    for dead in &dead {
        dead.set(Fault::Refuse);
    }
    let (legacy, orders) = (dead[0].url(), dead[1].url());
    let file = |route: &str| {
        format!(
            "upstreams:\n  legacy: {{url: \"{legacy}\"}}\n  orders: {{url: \"{orders}\", breaker: {{min_requests: 2, open_for: 30s}}}}\n\
             routes:\n  - {{name: orders, match: /orders, upstream: orders, {route}}}\n"
        )
    };
    let gateway = Gateway::start(&file("stage: migrated")).await;
    let answer = send(gateway.address, "POST", "/orders", &[], "x").await;
    assert_eq!((answer.status, answer.field("content-type")), (502, "application/problem+json"));
    let told = answer.json();
    assert_eq!((told["upstream"].as_str(), told["retry_after"].as_u64()), (Some("legacy"), Some(1)));
    assert_eq!(told["fallback_from"]["upstream"], "orders");
    assert_eq!(told["fallback_from"]["error"], "connection_refused");
    assert_eq!(answer.field("proxy-status"), "gw; error=connection_refused; next-hop=legacy");
    assert!(!answer.text().contains("127.0.0.1"));
    // What has nobody to fall back on says how long the breaker stays open.
    gateway.flip(&file("stage: retired")).await;
    let mut answer = answer;
    until("the breaker is open", async || {
        answer = send(gateway.address, "GET", "/orders", &[], "").await;
        answer.status == 503
    })
    .await;
    let wait: u64 = answer.field("retry-after").parse().unwrap();
    assert!((25..=30).contains(&wait), "{wait}");
    assert_eq!(
        (answer.json()["upstream"].as_str(), answer.json()["retry_after"].as_u64()),
        (Some("orders"), Some(wait))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_learned_of_others_does_not_hide_what_only_the_service_has() {
    // The old ones are in the monolith, the new ones in the service.
    let legacy = Origin::start(|request| {
        if request.line().contains("/new") { Reply::new("404 Not Found", &[], "") } else { Reply::ok("old") }
    })
    .await;
    let service = Origin::start(|request| {
        if request.line().contains("/new") { Reply::ok("new") } else { Reply::new("404 Not Found", &[], "") }
    })
    .await;
    let gateway = Gateway::start(&yaml(&legacy, &service.url(), "stage: migrated, fallback: {when: [404]}")).await;
    let get = async |path: &str| send(gateway.address, "GET", path, &[], "").await;
    for n in 0..5 {
        assert_eq!(get(&format!("/api/orders/old{n}")).await.text(), "old");
    }
    assert_eq!(service.count(), 3);
    let answer = get("/api/orders/new1").await;
    assert_eq!((answer.status, answer.text().as_str(), answer.field("proxy-status")), (200, "new", ""));
    let line = gateway.access_line(|line| line["path"] == "/api/orders/new1").await;
    assert_eq!((line["arm"].as_str(), line["upstream"].as_str()), (Some("service"), Some("orders")));
    assert!(line["fallback"].is_null());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_for_the_monolith_answers_in_the_services_place() {
    let (legacy, first) = (Origin::named("legacy").await, Origin::named("first").await);
    let dead = Faulty::start(first.address);
    dead.set(Fault::Refuse);
    let gateway = Gateway::start(&format!(
        "upstreams:\n  legacy: {{url: \"{}\"}}\n  v1: {{url: \"{}\"}}\n  v2: {{url: \"{}\"}}\n\
         routes:\n  - {{name: orders, match: /orders, upstream: v2, baseline: v1, stage: migrated}}\n",
        legacy.url(),
        first.url(),
        dead.url()
    ))
    .await;
    let answer = send(gateway.address, "POST", "/orders", &[], "x").await;
    assert_eq!((answer.field("x-served-by"), legacy.count()), ("first", 0));
}
