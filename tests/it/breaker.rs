//! The circuit breaker: when it opens, what it lets through, how it closes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tests::{Gateway, Load, Origin, Reply, send, until};

fn yaml(legacy: &Origin, service: &str, breaker: &str, route: &str) -> String {
    format!(
        "upstreams:\n  legacy: {{url: \"{}\"}}\n  orders: {{url: \"{service}\", breaker: {breaker}}}\n\
         routes:\n  - {{name: orders, match: /orders/**, upstream: orders, stage: migrated{route}}}\n",
        legacy.url()
    )
}

async fn state(gateway: &Gateway) -> String {
    let status = gateway.api("/api/status").await;
    let upstreams = status["upstreams"].as_array().unwrap();
    let orders = upstreams.iter().find(|upstream| upstream["name"] == "orders").unwrap();
    orders["breaker"]["state"].as_str().unwrap_or("none").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_opens_at_its_ratio_refuses_with_a_time_and_closes_again() {
    let legacy = Origin::named("legacy").await;
    let good = Arc::new(AtomicBool::new(false));
    let answers = good.clone();
    let orders = Origin::start(move |_| {
        if answers.load(SeqCst) { Reply::ok("ok") } else { Reply::new("500 Internal Server Error", &[], "no") }
    })
    .await;
    let breaker = "{min_requests: 5, open_for: 2s, half_open_requests: 2}";
    let gateway = Gateway::start(&yaml(&legacy, &orders.url(), breaker, ", fallback: none")).await;
    for _ in 0..5 {
        assert_eq!(send(gateway.address, "POST", "/orders", &[], "x").await.status, 500);
    }
    assert_eq!(state(&gateway).await, "open");
    let refused = send(gateway.address, "GET", "/orders", &[], "").await;
    assert_eq!((refused.status, refused.field("retry-after")), (503, "2"));
    assert_eq!(refused.field("proxy-status"), "gw; error=destination_unavailable; next-hop=orders");
    assert_eq!(
        (refused.json()["retry_after"].as_u64(), refused.json()["error"].as_str()),
        (Some(2), Some("destination_unavailable"))
    );
    assert_eq!(orders.count(), 5, "nothing reaches it while it is open");
    assert_eq!(gateway.metric("gateway_upstream_breaker_opened_total{upstream=\"orders\"}").await, Some(1.0));
    gateway.log_line("the circuit breaker opened").await;
    good.store(true, SeqCst);
    until("it closes", async || {
        send(gateway.address, "GET", "/orders", &[], "").await;
        state(&gateway).await == "closed"
    })
    .await;
    gateway.log_line("the circuit breaker closed").await;
    assert_eq!(send(gateway.address, "GET", "/orders", &[], "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_cut_short_slow_heads_and_time_limits_count() {
    let legacy = Origin::named("legacy").await;
    let cut = Reply::Last(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf".to_vec());
    let slow = Reply::Pieces(
        vec![Vec::new(), b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_vec()],
        Duration::from_millis(150),
    );
    for (reply, breaker, route) in [
        (cut, "{min_requests: 3, open_for: 1m}", ""),
        (slow, "{min_requests: 3, open_for: 1m, slow_call: 50ms}", ""),
        (Reply::Hang, "{min_requests: 3, open_for: 1m}", ", timeout: {request: 100ms}"),
        (Reply::Hang, "{min_requests: 3, open_for: 1m}", ", timeout: {attempt: 100ms}"),
    ] {
        let told = format!("{reply:?} {route}");
        let orders = Origin::start(move |_| reply.clone()).await;
        let gateway = Gateway::start(&yaml(&legacy, &orders.url(), breaker, &format!(", fallback: none{route}"))).await;
        for _ in 0..3 {
            tests::raw(gateway.address, b"GET /orders HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", |_| false)
                .await;
        }
        until("it opens", async || state(&gateway).await == "open").await;
        assert_eq!(orders.count(), 3, "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn its_state_lives_on_across_reloads_that_are_about_something_else() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::start(|_| Reply::new("500 Internal Server Error", &[], "no")).await;
    let file = |max: u32, ratio: u32| {
        let breaker = format!("{{min_requests: 3, open_for: 1h, failure_ratio: {ratio}%}}, max_requests: {max}");
        yaml(&legacy, &orders.url(), &breaker, ", fallback: none")
    };
    let gateway = Gateway::start(&file(10, 50)).await;
    for _ in 0..3 {
        send(gateway.address, "GET", "/orders", &[], "").await;
    }
    assert_eq!(state(&gateway).await, "open");
    gateway.flip(&file(11, 50)).await;
    assert_eq!(state(&gateway).await, "open");
    gateway.flip(&file(11, 60)).await;
    assert_eq!(state(&gateway).await, "closed", "another breaker begins anew");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_monolith_has_none_unless_the_file_says_so() {
    let legacy = Origin::start(|_| Reply::new("500 Internal Server Error", &[], "no")).await;
    let gateway = Gateway::start(&crate::yaml(&[("legacy", legacy.url())], "")).await;
    for n in 1..=60 {
        assert_eq!(send(gateway.address, "GET", "/", &[], "").await.status, 500);
        assert_eq!(legacy.count(), n);
    }
}

/// A service dies at full load: the breaker opens, the monolith takes over, and when it is back the service sees no
/// stampede.
#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_dies_under_load_is_left_alone_and_comes_back_gently() {
    const PROBES: usize = 3;
    let legacy = Origin::named("legacy").await;
    let dead = Arc::new(AtomicBool::new(false));
    let most = Arc::new(AtomicUsize::new(0));
    let (is_dead, high) = (dead.clone(), most.clone());
    // Since it came back: requests that arrived, and those that were answered.
    let recovering = Arc::new(AtomicBool::new(false));
    let (watched, arrived, answered) =
        (recovering.clone(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let address = Origin::listen(move |mut tcp| {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (dead, high, watched) = (is_dead.clone(), high.clone(), watched.clone());
        let (arrived, answered) = (arrived.clone(), answered.clone());
        async move {
            let mut chunk = [0; 4096];
            while let Ok(1..) = tcp.read(&mut chunk).await {
                if dead.load(SeqCst) {
                    return;
                }
                if watched.load(SeqCst) {
                    let (arrived, answered_before) = (arrived.fetch_add(1, SeqCst) + 1, answered.load(SeqCst));
                    if answered_before < PROBES {
                        high.fetch_max(arrived - answered_before, SeqCst);
                        // Long enough for others to come, if they were let through.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    answered.fetch_add(1, SeqCst);
                }
                let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            }
        }
    })
    .await;
    let breaker = format!("{{open_for: 300ms, half_open_requests: {PROBES}}}");
    let route = ", fallback: {when: [unavailable, 5xx]}";
    let gateway = Gateway::start(&yaml(&legacy, &format!("http://{address}"), &breaker, route)).await;
    let load = Load::start(gateway.address, 16, "/orders/1").await;
    dead.store(true, SeqCst);
    until("the breaker opens", async || state(&gateway).await == "open").await;
    until("the monolith takes over", async || legacy.count() > 200).await;
    // It opens again and again while the service is dead, and lets through a few each time.
    recovering.store(true, SeqCst);
    dead.store(false, SeqCst);
    until("it closes again", async || state(&gateway).await == "closed").await;
    let at_once = most.load(SeqCst);
    let counts = load.stop().await;
    let told = counts.failures.lock().unwrap().clone();
    let gets: Vec<_> = told.iter().filter(|failure| !failure.starts_with("POST")).collect();
    assert!(gets.is_empty(), "{gets:?}");
    let (good, failures) = (counts.good.load(SeqCst), told.len());
    println!("a service died under load: {failures} failed and {good} answered; {at_once} probes at once");
    // POSTs that may have been sent are told that they failed; GETs never.
    assert!(failures <= counts.posts.load(SeqCst) && failures * 5 < good, "{failures} of {good}");
    assert!((1..=PROBES).contains(&at_once), "{at_once} at once");
}
