//! Places: how many requests an upstream and the gateway have at a time, who waits, who is refused.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tests::{Client, Gateway, Origin, Reply, client::request, send, until};

/// An origin that takes its time; how many requests it has and had at most.
async fn busy(time: Duration) -> (String, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (flying, high) = (now.clone(), most.clone());
    let address = Origin::listen(move |mut tcp| {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (flying, high) = (flying.clone(), high.clone());
        async move {
            let mut chunk = [0; 4096];
            while let Ok(1..) = tcp.read(&mut chunk).await {
                high.fetch_max(flying.fetch_add(1, SeqCst) + 1, SeqCst);
                tokio::time::sleep(time).await;
                flying.fetch_sub(1, SeqCst);
                if tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
                    break;
                }
            }
        }
    })
    .await;
    (format!("http://{address}"), now, most)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_place_waits_in_a_queue_that_is_bounded_in_number_and_time() {
    let legacy =
        Origin::start(|request| if request.line().contains("/hang") { Reply::Hang } else { Reply::ok("ok") }).await;
    let file = format!(
        "upstreams:\n  legacy: {{url: \"{}\", max_requests: 1, max_pending: 1, pending_timeout: 1s}}\n",
        legacy.url()
    );
    let gateway = Gateway::start(&file).await;
    let address = gateway.address;
    let held = tokio::spawn(async move { send(address, "GET", "/hang", &[], "").await });
    until("the place is taken", async || legacy.count() == 1).await;
    let queued = tokio::spawn(async move { send(address, "POST", "/", &[], "x").await });
    let pending = "gateway_upstream_requests_pending{upstream=\"legacy\"}";
    until("one waits", async || gateway.metric(pending).await == Some(1.0)).await;
    let refused = send(address, "GET", "/", &[], "").await;
    assert_eq!((refused.status, refused.field("retry-after")), (503, "1"));
    assert_eq!(refused.field("proxy-status"), "gw; error=connection_limit_reached; next-hop=legacy");
    let late = queued.await.unwrap();
    assert_eq!((late.status, late.json()["limit"].as_str()), (503, Some("pending")));
    assert_eq!(legacy.count(), 1, "what was refused was never sent");
    assert_eq!(gateway.metric("gateway_upstream_shed_total{upstream=\"legacy\"}").await, Some(2.0));
    held.abort();
    until("its place is free when the client has left", async || {
        gateway.metric("gateway_upstream_requests_in_flight{upstream=\"legacy\"}").await == Some(0.0)
    })
    .await;
    assert_eq!(send(address, "GET", "/", &[], "").await.status, 200);
}

/// The ceiling is exact over all workers, and across a reload that changes it.
#[tokio::test(flavor = "multi_thread")]
async fn an_overloaded_monolith_never_has_more_than_its_ceiling() {
    const CLIENTS: usize = 2_000;
    let time = Duration::from_millis(20);
    let (url, _, most) = busy(time).await;
    let file = |max: u32| {
        format!(
            "upstreams:\n  legacy: {{url: \"{url}\", max_requests: {max}, max_pending: 100, pending_timeout: 500ms}}\n"
        )
    };
    let gateway = Gateway::start(&file(50)).await;
    let address = gateway.address;
    let mut alone = Vec::new();
    let mut client = Client::new(address);
    for _ in 0..50 {
        let begun = Instant::now();
        assert_eq!(client.send(request("GET", "/", &[], "")).await.unwrap().status, 200);
        alone.push(begun.elapsed());
    }
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            tokio::spawn(async move {
                let mut client = Client::new(address);
                let mut told = Vec::new();
                for _ in 0..3 {
                    let begun = Instant::now();
                    let answer = client.send(request("GET", "/", &[], "")).await.unwrap();
                    told.push((answer.status, begun.elapsed()));
                    if answer.status != 200 {
                        assert_eq!((answer.status, answer.field("retry-after")), (503, "1"));
                        // Some clients do as they are told.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
                told
            })
        })
        .collect();
    let mut told = Vec::new();
    for client in clients {
        told.extend(client.await.unwrap());
    }
    let p99 = |mut times: Vec<Duration>| {
        times.sort();
        times[(times.len() * 99 / 100).min(times.len() - 1)]
    };
    let took = |status: u16| told.iter().filter(|(got, _)| *got == status).map(|(_, took)| *took).collect::<Vec<_>>();
    let (admitted, shed) = (took(200), took(503));
    println!(
        "overload: {} admitted, p99 {:?} (alone {:?}); {} refused, p99 {:?}; at most {} at once",
        admitted.len(),
        p99(admitted.clone()),
        p99(alone),
        shed.len(),
        p99(shed.clone()),
        most.load(SeqCst)
    );
    assert!(most.load(SeqCst) <= 50, "{} at once", most.load(SeqCst));
    assert!(admitted.len() > 100 && shed.len() > 100);
    // A lower ceiling holds from the reload on, whoever was in flight.
    gateway.flip(&file(5)).await;
    until("nothing is in flight", async || {
        gateway.metric("gateway_upstream_requests_in_flight{upstream=\"legacy\"}").await == Some(0.0)
    })
    .await;
    most.store(0, SeqCst);
    let clients: Vec<_> =
        (0..50).map(|_| tokio::spawn(async move { send(address, "GET", "/", &[], "").await })).collect();
    for client in clients {
        assert_eq!(client.await.unwrap().status, 200);
    }
    assert!(most.load(SeqCst) <= 5, "{} at once", most.load(SeqCst));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_route_sends_goes_before_what_falls_back() {
    let legacy =
        Origin::start(|request| if request.line().contains("/hang") { Reply::Hang } else { Reply::ok("ok") }).await;
    let dead = tests::Faulty::start(legacy.address);
    dead.set(tests::Fault::Refuse);
    let file = format!(
        "upstreams:\n  legacy: {{url: \"{}\", max_requests: 1, max_pending: 1, pending_timeout: 20s}}\n  orders: {{url: \"{}\"}}\n\
         routes:\n  - {{name: orders, match: /orders, upstream: orders, stage: migrated}}\n",
        legacy.url(),
        dead.url()
    );
    let gateway = Gateway::start(&file).await;
    let address = gateway.address;
    let held = tokio::spawn(async move { send(address, "GET", "/hang", &[], "").await });
    until("the place is taken", async || legacy.count() == 1).await;
    let fallen = tokio::spawn(async move { send(address, "GET", "/orders", &[], "").await });
    let pending = "gateway_upstream_requests_pending{upstream=\"legacy\"}";
    until("the fallback waits", async || gateway.metric(pending).await == Some(1.0)).await;
    let direct = tokio::spawn(async move { send(address, "GET", "/", &[], "").await });
    // The queue has one place, which it gives up.
    let evicted = fallen.await.unwrap();
    assert_eq!((evicted.status, evicted.json()["upstream"].as_str()), (503, Some("legacy")));
    assert_eq!(evicted.json()["fallback_from"]["upstream"], "orders");
    held.abort();
    assert_eq!(direct.await.unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_gateway_itself_has_a_limit() {
    let legacy = Origin::start(|_| Reply::Hang).await;
    let gateway = Gateway::start(&crate::yaml(&[("legacy", legacy.url())], "clients: {max_requests: 2}\n")).await;
    let address = gateway.address;
    let held: Vec<_> = (0..2).map(|_| tokio::spawn(async move { send(address, "GET", "/", &[], "").await })).collect();
    until("both are there", async || legacy.count() == 2).await;
    let mut client = Client::new(address);
    for method in ["GET", "POST"] {
        let refused = client.send(request(method, "/", &[], "x")).await.unwrap();
        assert_eq!((refused.status, refused.field("retry-after")), (503, "1"));
        assert_eq!(refused.field("content-type"), "application/problem+json");
        assert!(refused.field("proxy-status").starts_with("gw; error="));
    }
    for held in held {
        held.abort();
    }
    until("there is room again", async || gateway.metric("gateway_client_requests").await == Some(0.0)).await;
    assert_eq!(gateway.metric("gateway_client_requests_shed_total").await, Some(2.0));
    assert_eq!(legacy.count(), 2);
}
