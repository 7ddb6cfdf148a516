//! Many that ask for the same: one request for all, and nobody who waits in vain.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tests::{Answer, Client, Gateway, Origin, Reply, client::request, send, until};

use crate::cache::KEEP;

/// An origin that answers when it is let.
struct Gate {
    origin: Origin,
    open: Arc<(Mutex<bool>, std::sync::Condvar)>,
}

impl Gate {
    async fn start(answer: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Self {
        let open = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
        let waited = open.clone();
        let count = AtomicUsize::new(0);
        let origin = Origin::start(move |_| {
            let number = count.fetch_add(1, SeqCst) + 1;
            let (lock, condition) = &*waited;
            tokio::task::block_in_place(|| {
                let _open = condition.wait_while(lock.lock().unwrap(), |open| !*open).unwrap();
            });
            answer(number)
        })
        .await;
        Self { origin, open }
    }

    fn open(&self) {
        *self.open.0.lock().unwrap() = true;
        self.open.1.notify_all();
    }
}

/// Clients of one gateway that ask at the same time.
fn together(
    gateway: &Gateway,
    count: usize,
    fields: &'static [(&'static str, &'static str)],
) -> Vec<tokio::task::JoinHandle<Answer>> {
    let address = gateway.address;
    (0..count).map(|_| tokio::spawn(async move { send(address, "GET", "/k/1", fields, "").await })).collect()
}

async fn in_flight(gateway: &Gateway, count: u64) {
    until("all have come", async || gateway.api("/api/status").await["requests"].as_u64() == Some(count)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_that_ask_for_the_same_make_one_request() {
    for fields in
        [&[("cache-control", "max-age=60")][..], &[("cache-control", "max-age=60"), ("transfer-encoding", "chunked")]]
    {
        let chunked = fields.len() > 1;
        let gate = Gate::start(move |number| {
            if chunked {
                let body = format!("HTTP/1.1 200 OK\r\ncache-control: max-age=60\r\ntransfer-encoding: chunked\r\n\r\n8\r\nanswer {number}\r\n0\r\n\r\n");
                return Reply::Bytes(body.into_bytes());
            }
            Reply::new("200 OK", &[("cache-control", "max-age=60")], &format!("answer {number}"))
        })
        .await;
        let gateway = Gateway::start(&crate::yaml(&[("legacy", gate.origin.url())], KEEP)).await;
        let asking = together(&gateway, 30, &[]);
        in_flight(&gateway, 30).await;
        gate.open();
        let mut collapsed = 0;
        for asked in asking {
            let answer = asked.await.unwrap();
            assert_eq!((answer.status, &*answer.text()), (200, "answer 1"));
            collapsed += usize::from(answer.field("cache-status").contains("collapsed"));
        }
        assert_eq!((gate.origin.count(), collapsed), (1, 29));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_not_for_others_keeps_nobody_waiting() {
    let gate =
        Gate::start(|number| Reply::new("200 OK", &[("cache-control", "private")], &format!("answer {number}"))).await;
    let gateway = Gateway::start(&crate::yaml(&[("legacy", gate.origin.url())], KEEP)).await;
    let asking = together(&gateway, 10, &[]);
    in_flight(&gateway, 10).await;
    assert_eq!(gate.origin.count(), 0);
    gate.open();
    let mut bodies = std::collections::HashSet::new();
    for asked in asking {
        bodies.insert(asked.await.unwrap().text());
    }
    assert_eq!(bodies.len(), 10);
    // From now on nobody waits for another's.
    *gate.open.0.lock().unwrap() = false;
    let asking = together(&gateway, 10, &[]);
    let connections = &gate.origin.open;
    until("each asks for itself", async || connections.load(SeqCst) >= 10).await;
    gate.open();
    for asked in asking {
        assert_eq!(asked.await.unwrap().status, 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whoever_asked_first_may_leave_and_waiting_has_an_end() {
    let gate =
        Gate::start(|number| Reply::new("200 OK", &[("cache-control", "max-age=60")], &format!("answer {number}")))
            .await;
    let rest = "routes:\n  - {name: kept, match: /k/**, cache: {collapse: 200ms}}\n";
    let gateway = Gateway::start(&crate::yaml(&[("legacy", gate.origin.url())], rest)).await;
    let first = together(&gateway, 1, &[]).remove(0);
    until("it asks", async || gate.origin.open.load(SeqCst) == 1).await;
    let second = together(&gateway, 1, &[]).remove(0);
    // Another does not wait longer than the file says.
    until("the second asks for itself", async || gate.origin.open.load(SeqCst) == 2).await;
    first.abort();
    gate.open();
    assert_eq!(second.await.unwrap().status, 200);
    // One that is left while others wait: one of them asks.
    let gate =
        Gate::start(|number| Reply::new("200 OK", &[("cache-control", "max-age=60")], &format!("answer {number}")))
            .await;
    let gateway = Gateway::start(&crate::yaml(&[("legacy", gate.origin.url())], KEEP)).await;
    let first = together(&gateway, 1, &[]).remove(0);
    until("it asks", async || gate.origin.open.load(SeqCst) == 1).await;
    let others = together(&gateway, 5, &[]);
    in_flight(&gateway, 6).await;
    first.abort();
    until("another asks", async || gate.origin.connections.load(SeqCst) == 2).await;
    gate.open();
    for other in others {
        assert_eq!(other.await.unwrap().status, 200);
    }
    assert!(gate.origin.connections.load(SeqCst) == 2, "one for all that were left");
}

#[tokio::test(flavor = "multi_thread")]
async fn long_answers_stream_and_broken_ones_are_not_kept() {
    let pieces = |head: &str| {
        let mut all = vec![format!("{head}cache-control: max-age=60\r\n\r\n").into_bytes()];
        all.extend((0..20).map(|_| vec![b'x'; 100_000]));
        all
    };
    let known = pieces("HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n");
    let short = [known[0].clone(), known[1].clone()].concat();
    let mut chunked =
        vec![b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncache-control: max-age=60\r\n\r\n".to_vec()];
    chunked.extend((0..20).map(|_| [b"186a0\r\n".to_vec(), vec![b'y'; 100_000], b"\r\n".to_vec()].concat()));
    chunked.push(b"0\r\n\r\n".to_vec());
    let origin = Origin::start(move |received| {
        let line = received.line();
        if line.contains("/known") {
            Reply::Pieces(known.clone(), Duration::from_millis(2))
        } else if line.contains("/chunked") {
            Reply::Pieces(chunked.clone(), Duration::from_millis(2))
        } else {
            Reply::Last(short.clone())
        }
    })
    .await;
    let text =
        |memory: &str| format!("cache: {{memory: {memory}}}\n{}", crate::yaml(&[("legacy", origin.url())], KEEP));
    let gateway = Gateway::start(&text("64MiB")).await;
    for path in ["/k/known", "/k/chunked"] {
        let count = origin.count();
        let asking: Vec<_> = (0..8)
            .map(|_| {
                let address = gateway.address;
                tokio::spawn(async move { send(address, "GET", path, &[], "").await })
            })
            .collect();
        for asked in asking {
            let answer = asked.await.unwrap();
            assert_eq!((answer.status, answer.body.len()), (200, 2_000_000));
        }
        assert_eq!(origin.count(), count + 1, "{path}");
        assert!(send(gateway.address, "GET", path, &[], "").await.field("cache-status").starts_with("gw; hit"));
    }
    // Half an answer is nobody's.
    for _ in 0..2 {
        let count = origin.count();
        assert!(Client::new(gateway.address).send(request("GET", "/k/broken", &[], "")).await.is_err());
        assert_eq!(origin.count(), count + 1);
    }
    // What is too large passes, whether that is known before or not.
    gateway.flip(&text("8MiB")).await;
    for path in ["/k/known", "/k/chunked"] {
        for _ in 0..2 {
            let answer = send(gateway.address, "GET", path, &[], "").await;
            assert_eq!((answer.status, answer.body.len()), (200, 2_000_000));
            assert!(!answer.field("cache-status").starts_with("gw; hit"), "{path}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_its_way_when_it_is_purged_or_written_is_not_kept() {
    let gate =
        Gate::start(|number| Reply::new("200 OK", &[("cache-control", "max-age=60")], &format!("answer {number}")))
            .await;
    let writes = Origin::named("writes").await;
    let text = crate::yaml(
        &[("legacy", gate.origin.url()), ("writes", writes.url())],
        "routes:\n  - {name: kept, match: {path: /k/**, methods: [GET]}, cache: {}}\n  - {name: writes, match: {path: /k/**, methods: [POST]}, upstream: writes, stage: retired}\n",
    );
    let gateway = Gateway::start(&text).await;
    let first = together(&gateway, 1, &[]).remove(0);
    until("it is on its way", async || gate.origin.open.load(SeqCst) == 1).await;
    assert_eq!(send(gateway.address, "POST", "/k/1", &[], "x").await.status, 200);
    // Whoever asks after the write does not get what was asked for before it.
    let second = together(&gateway, 1, &[]).remove(0);
    until("the second asks for itself", async || gate.origin.open.load(SeqCst) == 2).await;
    gate.open();
    let (first, second) = (first.await.unwrap().text(), second.await.unwrap().text());
    assert_ne!(first, second);
    let third = send(gateway.address, "GET", "/k/1", &[], "").await;
    assert_ne!(third.text(), first);
}
