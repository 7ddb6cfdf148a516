//! Endpoints that die and come back under load, in every way: no GET fails that had an answer elsewhere, no POST
//! arrives twice.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tests::{Client, Fault, Faulty, Gateway, Origin, client::request};

/// Every way to fail, in turns.
const FAULTS: [Fault; 8] = [
    Fault::Refuse,
    Fault::Reset,
    Fault::HalfClose,
    Fault::Refuse,
    Fault::Garbage,
    Fault::Hang,
    Fault::Slow(Duration::from_millis(20)),
    Fault::Refuse,
];

#[derive(Default)]
struct Seen {
    sent: AtomicUsize,
    posts: AtomicUsize,
    posts_failed: AtomicUsize,
    failures: std::sync::Mutex<Vec<String>>,
}

/// `REQUESTS` says how many; the test of every day sends fewer than the one that is told of.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_three_endpoints_is_always_dying() {
    let requests: usize = std::env::var("REQUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000);
    let origins = [Origin::named("a").await, Origin::named("b").await, Origin::named("c").await];
    let proxies: Arc<[Faulty]> = origins.iter().map(|origin| Faulty::start(origin.address)).collect();
    let urls = proxies.iter().map(|proxy| format!("\"{}\"", proxy.url())).collect::<Vec<_>>().join(", ");
    let file = format!(
        "upstreams:\n  legacy: {{urls: [{urls}], outlier: {{base_ejection: 500ms}}, slow_start: 1s}}\n\
         defaults:\n  retry: {{retries: 3}}\n  timeout: {{attempt: 1s, request: 10s}}\n"
    );
    let gateway = Gateway::start(&file).await;
    let address = gateway.address;
    let (done, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Seen::default()));
    let (over, dying, turns) = (done.clone(), proxies.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = turns.clone();
    let killer = tokio::spawn(async move {
        let mut turn = 0;
        while !over.load(SeqCst) {
            let proxy = &dying[turn % dying.len()];
            proxy.set(FAULTS[turn % FAULTS.len()]);
            tokio::time::sleep(Duration::from_millis(if requests > 20_000 { 1_000 } else { 200 })).await;
            proxy.set(Fault::None);
            turn += 1;
            counted.store(turn, SeqCst);
        }
    });
    let clients: Vec<_> = (0..16)
        .map(|client| {
            let (seen, turns) = (seen.clone(), turns.clone());
            tokio::spawn(async move {
                let mut connection = Client::new(address);
                loop {
                    let n = seen.sent.fetch_add(1, SeqCst);
                    // Each fault has had its turn.
                    if n >= requests && turns.load(SeqCst) >= FAULTS.len() {
                        return;
                    }
                    let post = n % 4 == 0;
                    seen.posts.fetch_add(usize::from(post), SeqCst);
                    let target = format!("/{client}/{n}");
                    let (method, body) = if post { ("POST", "a body") } else { ("GET", "") };
                    match connection.send(request(method, &target, &[], body)).await {
                        Ok(answer) if answer.status == 200 => {}
                        Ok(_) if post => {
                            seen.posts_failed.fetch_add(1, SeqCst);
                        }
                        Ok(answer) => seen.failures.lock().unwrap().push(format!("{target}: {}", answer.text())),
                        Err(error) => seen.failures.lock().unwrap().push(format!("{target}: {error}")),
                    }
                }
            })
        })
        .collect();
    for client in clients {
        client.await.unwrap();
    }
    done.store(true, SeqCst);
    killer.await.unwrap();
    let mut posts: HashMap<String, usize> = HashMap::new();
    for received in origins.iter().flat_map(Origin::received).filter(|received| received.line().starts_with("POST")) {
        assert_eq!(received.body, b"a body");
        *posts.entry(received.line().to_owned()).or_default() += 1;
    }
    let doubled = posts.values().filter(|count| **count > 1).count();
    let failures = seen.failures.lock().unwrap().clone();
    println!(
        "{} requests while one of three endpoints died {} times: {} GETs failed; of the POSTs {} were told \
         that they failed and {doubled} arrived twice",
        seen.sent.load(SeqCst),
        turns.load(SeqCst),
        failures.len(),
        seen.posts_failed.load(SeqCst),
    );
    assert!(failures.is_empty(), "{} GETs failed: {:?}", failures.len(), &failures[..failures.len().min(5)]);
    assert_eq!(doubled, 0);
    // What was told to have failed was sent all the same, once: the faults take requests before they fail.
    let (sent, failed) = (seen.posts.load(SeqCst), seen.posts_failed.load(SeqCst));
    assert!(
        failed > 0 && posts.len() <= sent && posts.len() + failed >= sent,
        "{} of {sent}, {failed} failed",
        posts.len()
    );
}

/// A body that is cut short is told to the client, and counts against the endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_is_not_taken_for_whole() {
    for fault in [Fault::ResetAfter(50), Fault::WrongLength] {
        let origin = Origin::named("a").await;
        let proxy = Faulty::start(origin.address);
        proxy.set(fault);
        let gateway = Gateway::start(&crate::yaml(&[("legacy", proxy.url())], "")).await;
        let mut client = Client::new(gateway.address);
        let told = client.send(request("GET", "/", &[], "")).await;
        let cut = match &told {
            Err(_) => true,
            Ok(answer) => answer.status == 502,
        };
        assert!(cut, "{fault:?}: {told:?}");
        let line = gateway.access_line(|line| line["path"] == "/").await;
        assert_eq!(line["error"], "connection_terminated", "{fault:?}");
    }
}
