//! Several endpoints: who gets a request, who is left out, and how they are found.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tests::{Client, Dns, Fault, Faulty, Gateway, Load, Origin, Reply, client::request, dns::Answer, send, until};

fn several(urls: &[String], upstream: &str) -> String {
    let urls = urls.iter().map(|url| format!("\"{url}\"")).collect::<Vec<_>>().join(", ");
    format!("upstreams:\n  legacy: {{urls: [{urls}], {upstream}}}\n")
}

async fn states(gateway: &Gateway) -> HashMap<String, String> {
    let status = gateway.api("/api/status").await;
    let endpoints = status["upstreams"][0]["endpoints"].as_array().unwrap().clone();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    endpoints.iter().map(|endpoint| (text(&endpoint["address"]), text(&endpoint["state"]))).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_after_the_other_and_by_key() {
    let (a, b, c) = (Origin::named("a").await, Origin::named("b").await, Origin::named("c").await);
    let urls = [a.url(), b.url(), c.url()];
    let gateway = Gateway::start(&several(&urls, "balance: round_robin")).await;
    for _ in 0..30 {
        send(gateway.address, "GET", "/", &[], "").await;
    }
    assert_eq!((a.count(), b.count(), c.count()), (10, 10, 10));
    gateway.flip(&several(&urls, "balance: ring_hash, hash_by: [\"header:x-user\", ip]")).await;
    let mut used = HashMap::new();
    for round in 0..3 {
        for user in 0..30 {
            let user = format!("u-{user}");
            let answer = send(gateway.address, "GET", "/", &[("x-user", &user)], "").await;
            let by = answer.field("x-served-by").to_owned();
            assert_eq!(*used.entry(user).or_insert(by.clone()), by, "round {round}");
        }
    }
    assert_eq!(used.values().collect::<std::collections::HashSet<_>>().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slower_of_two_gets_less() {
    let quick = Origin::named("quick").await;
    let origin = Origin::named("slow").await;
    let slow = Faulty::start(origin.address);
    slow.set(Fault::Slow(Duration::from_millis(30)));
    let gateway = Gateway::start(&several(&[quick.url(), slow.url()], "balance: p2c")).await;
    let load = Load::start(gateway.address, 4, "/").await;
    load.grow(400).await;
    load.stop_without_failures().await;
    assert!(quick.count() > 4 * origin.count(), "{} and {}", quick.count(), origin.count());
}

#[tokio::test(flavor = "multi_thread")]
async fn checks_take_an_endpoint_out_and_bring_it_back() {
    let healthy = Arc::new(AtomicBool::new(true));
    let told = healthy.clone();
    let sick = Origin::start(move |request| match request.line() {
        "GET /healthz HTTP/1.1" if !told.load(SeqCst) => Reply::new("500 Internal Server Error", &[], ""),
        _ => Reply::new("200 OK", &[("x-served-by", "sick")], "sick"),
    })
    .await;
    let good = Origin::named("good").await;
    let health = "balance: round_robin, slow_start: 0s, health: {path: /healthz, every: 100ms, healthy_after: 2, unhealthy_after: 2}";
    let gateway = Gateway::start(&several(&[sick.url(), good.url()], health)).await;
    let state = async || states(&gateway).await[&sick.address.to_string()].clone();
    let asked =
        |origin: &Origin| origin.received().iter().filter(|request| !request.line().contains("healthz")).count();
    healthy.store(false, SeqCst);
    until("it is out", async || state().await == "unhealthy").await;
    gateway.log_line("an endpoint is unhealthy").await;
    let before = asked(&sick);
    for _ in 0..20 {
        assert_eq!(send(gateway.address, "GET", "/", &[], "").await.field("x-served-by"), "good");
    }
    assert_eq!(asked(&sick), before);
    assert_eq!(gateway.metric("gateway_upstream_endpoints{upstream=\"legacy\",state=\"unhealthy\"}").await, Some(1.0));
    healthy.store(true, SeqCst);
    until("it is in again", async || state().await == "healthy").await;
    until("it is asked again", async || {
        send(gateway.address, "GET", "/", &[], "").await.field("x-served-by") == "sick"
    })
    .await;
    let check = good.received().into_iter().find(|request| request.line().contains("healthz")).unwrap();
    assert_eq!(check.field("host"), good.address.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_healthy_endpoint_the_monolith_answers_and_whoever_is_alone_is_asked_all_the_same() {
    let legacy = Origin::named("legacy").await;
    let sick = Origin::start(|request| {
        if request.line().contains("healthz") {
            Reply::new("500 Internal Server Error", &[], "")
        } else {
            Reply::ok("sick")
        }
    })
    .await;
    let file = |stage: &str| {
        format!(
            "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{}\", health: {{path: /healthz, every: 100ms, unhealthy_after: 1}}}}\n\
             routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: {stage}}}\n",
            legacy.url(),
            sick.url()
        )
    };
    let gateway = Gateway::start(&file("migrated")).await;
    gateway.log_line("an endpoint is unhealthy").await;
    let answer = send(gateway.address, "POST", "/orders", &[], "x").await;
    assert_eq!(answer.field("x-served-by"), "legacy");
    assert!(answer.field("proxy-status").contains("error=destination_unavailable"));
    gateway.flip(&file("retired")).await;
    assert_eq!(
        send(gateway.address, "GET", "/orders", &[], "").await.text(),
        "sick",
        "a wrong check must not close it"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_fails_is_ejected_and_asked_again_later() {
    let failing = Arc::new(AtomicBool::new(true));
    let fails = failing.clone();
    let bad = Origin::start(move |_| {
        if fails.load(SeqCst) {
            Reply::new("500 Internal Server Error", &[], "")
        } else {
            Reply::new("200 OK", &[("x-served-by", "bad")], "")
        }
    })
    .await;
    let good = Origin::named("good").await;
    let outlier = "balance: round_robin, slow_start: 0s, outlier: {consecutive_5xx: 3, base_ejection: 1s}";
    let gateway = Gateway::start(&several(&[bad.url(), good.url()], outlier)).await;
    let mut failed = 0;
    until("it is ejected", async || {
        failed += usize::from(send(gateway.address, "GET", "/", &[], "").await.status == 500);
        states(&gateway).await[&bad.address.to_string()] == "ejected"
    })
    .await;
    assert_eq!((failed, bad.count()), (3, 3));
    gateway.log_line("an endpoint was ejected").await;
    assert_eq!(gateway.metric("gateway_upstream_ejections_total{upstream=\"legacy\"}").await, Some(1.0));
    failing.store(false, SeqCst);
    until("it is asked again", async || {
        let answer = send(gateway.address, "GET", "/", &[], "").await;
        assert_eq!(answer.status, 200);
        answer.field("x-served-by") == "bad"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_dead_endpoint_does_not_open_the_breaker() {
    let (a, b) = (Origin::named("a").await, Origin::named("b").await);
    let dead = Faulty::start(a.address);
    dead.set(Fault::Refuse);
    let file = several(&[dead.url(), a.url(), b.url()], "breaker: {min_requests: 5}, balance: round_robin");
    let gateway = Gateway::start(&file).await;
    let load = Load::start(gateway.address, 4, "/").await;
    load.grow(500).await;
    load.stop_without_failures().await;
    assert_eq!(gateway.api("/api/status").await["upstreams"][0]["breaker"]["state"], "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_followed_without_losing_a_request() {
    // The same port on two addresses.
    let first = Origin::named("first").await;
    let port = first.address.port();
    let second_seen = Arc::new(AtomicUsize::new(0));
    let seen = second_seen.clone();
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::new(127, 0, 0, 2), port)).await.unwrap();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        while let Ok((mut tcp, _)) = listener.accept().await {
            let seen = seen.clone();
            tokio::spawn(async move {
                let mut chunk = [0; 4096];
                while let Ok(1..) = tcp.read(&mut chunk).await {
                    seen.fetch_add(1, SeqCst);
                    let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                }
            });
        }
    });
    let dns = Dns::start(1).await;
    let (one, two) = (Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2));
    dns.set("orders.test", Answer::A(vec![one]));
    let file = format!("resolver: [\"{}\"]\nupstreams:\n  legacy: {{dns: \"orders.test:{port}\"}}\n", dns.address);
    let gateway = Gateway::start(&file).await;
    let load = Load::start(gateway.address, 4, "/").await;
    let has = async |wanted: &[Ipv4Addr]| {
        let mut known: Vec<_> = states(&gateway).await.into_keys().collect();
        known.sort();
        known == wanted.iter().map(|ip| format!("{ip}:{port}")).collect::<Vec<_>>()
    };
    dns.set("orders.test", Answer::A(vec![one, two]));
    until("there are two", async || has(&[one, two]).await).await;
    until("the second is asked", async || second_seen.load(SeqCst) > 20).await;
    dns.set("orders.test", Answer::A(vec![two]));
    until("the first is gone", async || has(&[two]).await).await;
    let before = first.count();
    load.grow(100).await;
    assert!(first.count() <= before + 4, "nothing new goes where it is no more");
    // A name server that fails, or knows nothing any more, changes nothing.
    for answer in [Answer::Failure, Answer::A(Vec::new())] {
        dns.set("orders.test", answer);
        let asked = dns.queries.load(SeqCst);
        until("it was asked again", async || dns.queries.load(SeqCst) > asked + 4).await;
        load.grow(50).await;
        assert!(has(&[two]).await);
    }
    load.stop_without_failures().await;
    gateway.log_line("what was known stands").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_found_by_their_records() {
    let (a, b, spare) = (Origin::named("a").await, Origin::named("b").await, Origin::named("spare").await);
    let dns = Dns::start(1).await;
    dns.set("host.test", Answer::A(vec![Ipv4Addr::LOCALHOST]));
    let service = |priority: u16, origin: &Origin| (priority, origin.address.port(), "host.test".to_owned());
    dns.set("_http._tcp.orders.test", Answer::Srv(vec![service(1, &a), service(1, &b), service(2, &spare)]));
    let file = format!(
        "resolver: [\"{}\"]\nupstreams:\n  legacy: {{srv: _http._tcp.orders.test, balance: round_robin, slow_start: 0s}}\n",
        dns.address
    );
    let gateway = Gateway::start(&file).await;
    let mut client = Client::new(gateway.address);
    for _ in 0..20 {
        assert_eq!(client.send(request("GET", "/", &[], "")).await.unwrap().status, 200);
    }
    assert_eq!((a.count(), b.count(), spare.count()), (10, 10, 0));
    // A target that has gone does not keep the others from being found, nor does a name with an underscore.
    dns.set("my_host.test", Answer::A(vec![Ipv4Addr::LOCALHOST]));
    let gone = (1, 9, "gone.test".to_owned());
    dns.set("_http._tcp.orders.test", Answer::Srv(vec![gone, (1, spare.address.port(), "my_host.test".to_owned())]));
    until("the other is asked", async || {
        client.send(request("GET", "/", &[], "")).await.unwrap().field("x-served-by") == "spare"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_not_known_is_told_and_a_reload_to_one_that_is_loses_nothing() {
    let origin = Origin::named("orders").await;
    let dns = Dns::start(60).await;
    dns.set("orders.test", Answer::A(vec![Ipv4Addr::LOCALHOST]));
    let file = |name: &str| {
        let port = origin.address.port();
        format!("resolver: [\"{}\"]\nupstreams:\n  legacy: {{dns: \"{name}:{port}\"}}\n", dns.address)
    };
    let gateway = Gateway::start(&file("unknown.test")).await;
    let answer = send(gateway.address, "GET", "/", &[], "").await;
    assert_eq!((answer.status, answer.field("proxy-status")), (502, "gw; error=dns_error; next-hop=legacy"));
    gateway.flip(&file("orders.test")).await;
    assert_eq!(send(gateway.address, "GET", "/", &[], "").await.status, 200, "the first request waits for the name");
}
