//! Retries: what is sent again, where to, how often, and what never is.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use tests::{Client, Fault, Faulty, Gateway, Origin, Reply, client::request, send};

/// A monolith at these urls.
fn several(urls: &[String], upstream: &str, rest: &str) -> String {
    let urls = urls.iter().map(|url| format!("\"{url}\"")).collect::<Vec<_>>().join(", ");
    format!("upstreams:\n  legacy: {{urls: [{urls}]{upstream}}}\n{rest}")
}

/// Fails the first so many requests.
async fn failing(first: usize, how: Reply) -> Origin {
    let seen = AtomicUsize::new(0);
    Origin::start(move |_| if seen.fetch_add(1, SeqCst) < first { how.clone() } else { Reply::ok("ok") }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_is_tried_again_for_idempotent_methods_only() {
    for (method, status, arrivals) in
        [("GET", 200, 2), ("PUT", 200, 2), ("DELETE", 200, 2), ("POST", 503, 1), ("PATCH", 503, 1)]
    {
        let legacy = failing(1, Reply::new("503 Service Unavailable", &[], "busy")).await;
        let gateway = Gateway::start(&several(&[legacy.url()], "", "defaults: {retry: {retries: 1}}\n")).await;
        let answer = send(gateway.address, method, "/x", &[], "a body").await;
        assert_eq!((answer.status, legacy.count()), (status, arrivals), "{method}");
        for received in legacy.received() {
            assert_eq!(received.body, b"a body", "{method}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_policy_nothing_that_was_answered_is_tried_again() {
    let legacy = failing(1, Reply::new("503 Service Unavailable", &[], "busy")).await;
    let gateway = Gateway::start(&several(&[legacy.url()], "", "")).await;
    let answer = send(gateway.address, "GET", "/x", &[], "").await;
    assert_eq!((answer.status, answer.text().as_str(), legacy.count()), (503, "busy", 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_counts_where_the_upstream_honours_it() {
    for (policy, key, arrivals) in [("honoured", Some("k-1"), 2), ("honoured", None, 1), ("ignored", Some("k-1"), 1)] {
        let legacy = failing(1, Reply::new("503 Service Unavailable", &[], "busy")).await;
        let rest = format!("defaults: {{retry: {{idempotency_key: {policy}}}}}\n");
        let gateway = Gateway::start(&several(&[legacy.url()], "", &rest)).await;
        let fields: Vec<_> = key.map(|key| ("idempotency-key", key)).into_iter().collect();
        send(gateway.address, "POST", "/x", &fields, "pay").await;
        assert_eq!(legacy.count(), arrivals, "{policy} {key:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_override_is_never_tried_again() {
    let legacy = failing(1, Reply::new("503 Service Unavailable", &[], "busy")).await;
    let gateway = Gateway::start(&several(&[legacy.url()], "", "defaults: {retry: {retries: 3}}\n")).await;
    let answer = send(gateway.address, "GET", "/x", &[("x-http-method-override", "POST")], "").await;
    assert_eq!((answer.status, legacy.count()), (503, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_try_goes_to_another_endpoint() {
    let busy = || async { Origin::start(|_| Reply::new("503 Service Unavailable", &[], "busy")).await };
    let (a, b, good) = (busy().await, busy().await, Origin::named("good").await);
    let rest = "defaults: {retry: {retries: 2, budget: 100%, backoff: {base: 1ms}}}\n";
    let gateway = Gateway::start(&several(&[a.url(), b.url(), good.url()], ", outlier: none", rest)).await;
    for n in 0..30 {
        let answer = send(gateway.address, "GET", "/", &[], "").await;
        assert_eq!(answer.status, 200, "{n}: three tries at three endpoints find the good one");
    }
    assert_eq!(good.count(), 30);
    let line = gateway.access_line(|line| line["attempts"].as_u64() > Some(1)).await;
    assert_eq!(line["status"], 200);
    let retries = gateway.metric("gateway_retries_total{route=\"unrouted\"}").await;
    #[allow(clippy::cast_precision_loss, reason = "a few")]
    let expected = (a.count() + b.count()) as f64;
    assert_eq!(retries, Some(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_never_sent_goes_to_another_endpoint_whatever_its_method() {
    let good = Origin::named("good").await;
    let dead = Faulty::start(good.address);
    dead.set(Fault::Refuse);
    let upstream = ", balance: round_robin, outlier: none";
    let rest = "defaults: {retry: {budget: 0%}}\n";
    let gateway = Gateway::start(&several(&[dead.url(), good.url()], upstream, rest)).await;
    let mut client = Client::new(gateway.address);
    for n in 0..60 {
        let method = if n % 2 == 0 { "POST" } else { "GET" };
        let answer = client.send(request(method, "/", &[], "x")).await.unwrap();
        assert_eq!(answer.status, 200, "{n}: {}", answer.text());
    }
    assert_eq!(good.count(), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_that_may_have_been_sent_is_not_sent_again() {
    for fault in [Fault::Reset, Fault::HalfClose, Fault::Garbage] {
        let origin = Origin::named("good").await;
        let faulty = Faulty::start(origin.address);
        faulty.set(fault);
        let rest = "defaults: {retry: {retries: 3}}\n";
        let gateway = Gateway::start(&several(&[faulty.url(), origin.url()], ", balance: round_robin", rest)).await;
        let mut failed = 0;
        for _ in 0..10 {
            let answer = send(gateway.address, "POST", "/", &[], "x").await;
            failed += usize::from(answer.status == 502);
        }
        // The proxy takes a request before it fails: each arrived once, whatever its client was told.
        assert_eq!(origin.count(), 10, "{fault:?}");
        assert!(failed > 0, "{fault:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_sent_again_whole_and_only_as_far_as_they_were_kept() {
    let whole = "0123456789".repeat(6_000);
    for (size, limit, chunked, status, arrivals) in [
        (60_000, "64KiB", false, 200, 2),
        (60_000, "64KiB", true, 200, 2),
        (60_000, "16KiB", false, 503, 1),
        (5, "none", false, 503, 1),
    ] {
        let legacy = failing(1, Reply::new("503 Service Unavailable", &[], "busy")).await;
        let rest = format!("defaults: {{retry: {{retries: 1}}, replay_body: {limit}}}\n");
        let gateway = Gateway::start(&several(&[legacy.url()], "", &rest)).await;
        let body = &whole[..size];
        let framed = if chunked {
            format!(
                "PUT / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{size:x}\r\n{body}\r\n0\r\n\r\n"
            )
        } else {
            format!("PUT / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n{body}")
        };
        let got = tests::raw(gateway.address, framed.as_bytes(), |_| false).await;
        assert!(got.starts_with(&format!("HTTP/1.1 {status}")), "{got}");
        let received = legacy.received();
        assert_eq!(received.len(), arrivals, "{size} {limit} {chunked}");
        assert!(received.iter().all(|received| received.body == body.as_bytes()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_respected() {
    let legacy = failing(1, Reply::new("503 Service Unavailable", &[("retry-after", "7")], "busy")).await;
    let gateway = Gateway::start(&several(&[legacy.url()], "", "defaults: {retry: {retries: 1}}\n")).await;
    let answer = send(gateway.address, "GET", "/", &[], "").await;
    assert_eq!((answer.status, answer.field("retry-after"), legacy.count()), (503, "7", 1));
    // As long as the longest pause it is waited for.
    let legacy = failing(1, Reply::new("503 Service Unavailable", &[("retry-after", "1")], "busy")).await;
    let rest = "defaults: {retry: {retries: 1, backoff: {max: 1s}}}\n";
    let gateway = Gateway::start(&several(&[legacy.url()], "", rest)).await;
    let begun = std::time::Instant::now();
    assert_eq!(send(gateway.address, "GET", "/", &[], "").await.status, 200);
    assert!(begun.elapsed() >= std::time::Duration::from_secs(1), "not before the upstream said");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_try_that_takes_too_long_is_tried_elsewhere_and_says_so_where_it_cannot() {
    let good = Origin::named("good").await;
    let hung = Faulty::start(good.address);
    hung.set(Fault::Hang);
    let rest = "defaults: {retry: {retries: 1}, timeout: {attempt: 200ms}}\n";
    let gateway = Gateway::start(&several(&[hung.url(), good.url()], ", balance: round_robin", rest)).await;
    for _ in 0..4 {
        assert_eq!(send(gateway.address, "GET", "/", &[], "").await.status, 200);
    }
    let mut late = 0;
    for _ in 0..4 {
        let answer = send(gateway.address, "POST", "/", &[], "x").await;
        if answer.status == 504 {
            late += 1;
            assert_eq!(answer.json()["limit"], "attempt");
            assert!(answer.field("proxy-status").ends_with("details=\"the limit `attempt` fired\""));
        }
    }
    assert!(late > 0);
    let line = gateway.access_line(|line| line["limit"] == "attempt" && line["method"] == "POST").await;
    assert_eq!(line["status"], 504);
    assert!(
        gateway.metric("gateway_timeouts_total{route=\"unrouted\",limit=\"attempt\"}").await >= Some(f64::from(late))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn interim_and_early_answers_do_not_confuse_a_retry() {
    // Before its 503 it sends a hint; the second try sends another.
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = seen.clone();
    let legacy = Origin::start(move |_| {
        let n = counted.fetch_add(1, SeqCst);
        let hint = format!("HTTP/1.1 103 Early Hints\r\nlink: <{n}>\r\n\r\n");
        let last = if n == 0 { "503 Service Unavailable" } else { "200 OK" };
        Reply::Bytes(format!("{hint}HTTP/1.1 {last}\r\ncontent-length: 2\r\n\r\nok").into_bytes())
    })
    .await;
    let gateway = Gateway::start(&several(&[legacy.url()], "", "defaults: {retry: {retries: 1}}\n")).await;
    let got = tests::raw(gateway.address, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", |_| false).await;
    assert!(got.contains("HTTP/1.1 200 OK") && !got.contains("503"), "{got}");
    assert_eq!(seen.load(SeqCst), 2);
}

/// An upstream that answers 503 to everything under load sees at most a fifth more than was asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_storm_is_bounded_by_the_budget() {
    const CLIENTS: usize = 20;
    const EACH: usize = 150;
    let legacy = Origin::start(|_| Reply::new("503 Service Unavailable", &[], "busy")).await;
    let rest = "defaults: {retry: {retries: 3, backoff: {base: 1ms, max: 1ms}}}\n";
    let gateway = Gateway::start(&several(&[legacy.url()], "", rest)).await;
    let address = gateway.address;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            tokio::spawn(async move {
                let mut client = Client::new(address);
                for _ in 0..EACH {
                    assert_eq!(client.send(request("GET", "/", &[], "")).await.unwrap().status, 503);
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    let (offered, seen) = (CLIENTS * EACH, legacy.count());
    println!("retry storm: {offered} offered, {seen} seen");
    assert!(seen > offered && seen * 10 <= offered * 12, "{seen} of {offered}");
    assert!(gateway.metric("gateway_retries_over_budget_total{route=\"unrouted\"}").await > Some(0.0));
}

/// Connections that were used before and break after they took a request were replaced beside the budget: twice as many
/// requests as were asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_resets_on_kept_connections_is_bounded_too() {
    const ASKED: usize = 1_500;
    // Every second request on a connection finds it broken.
    let legacy =
        Origin::start(|request| if request.line().contains("/even") { Reply::ok("ok") } else { Reply::Close }).await;
    for (policy, most) in [("none", ASKED), ("{retries: 3, backoff: {base: 1ms, max: 1ms}}", ASKED * 12 / 10)] {
        let rest = format!("defaults: {{retry: {policy}}}\n");
        let gateway = Gateway::start(&several(&[legacy.url()], "", &rest)).await;
        let before = legacy.count();
        let mut client = Client::new(gateway.address);
        for n in 0..ASKED {
            let target = if n % 2 == 0 { "/even" } else { "/odd" };
            client.send(request("GET", target, &[], "")).await.unwrap();
        }
        let seen = legacy.count() - before;
        assert!(seen >= ASKED && seen <= most, "{policy}: {seen} of {ASKED}");
    }
}
