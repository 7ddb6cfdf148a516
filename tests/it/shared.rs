//! Gateways that share a Redis: what one keeps the others have, what one ends ends everywhere, and what Redis does hurts nobody.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
};

use tests::{Client, Gateway, Origin, Reply, client::request, redis::Redis, send, until};

async fn origin() -> Origin {
    let count = AtomicUsize::new(0);
    Origin::start(move |received| {
        let number = count.fetch_add(1, SeqCst) + 1;
        let mut fields = vec![("cache-control", "max-age=600"), ("surrogate-key", "all"), ("etag", "\"1\"")];
        if received.line().contains("/k/vary") {
            fields.push(("vary", "accept-language"));
        }
        Reply::new("200 OK", &fields, &format!("answer {number}"))
    })
    .await
}

/// One that waits for Redis as long as it takes: what is told of here is not how long.
async fn gateway(origin: &Origin, redis: &Redis) -> Gateway {
    start(origin, redis, ", redis_timeout: 1s").await
}

async fn start(origin: &Origin, redis: &Redis, more: &str) -> Gateway {
    let routes = "routes:\n  - {name: kept, match: /k/**, cache: {}}\n";
    let text =
        format!("cache: {{redis: \"{}\"{more}}}\n{}", redis.url(), crate::yaml(&[("legacy", origin.url())], routes));
    let gateway = Gateway::start(&text).await;
    is(&gateway, "up").await;
    gateway
}

async fn is(gateway: &Gateway, state: &str) {
    until(&format!("Redis is {state}"), async || gateway.api("/api/status").await["cache"]["redis"] == state).await;
}

async fn ask(gateway: &Gateway, path: &str) -> String {
    send(gateway.address, "GET", path, &[], "").await.text()
}

async fn purge(gateway: &Gateway, body: &str) -> tests::Answer {
    let host = gateway.admin.to_string();
    send(gateway.admin, "POST", "/api/cache/purge", &[("host", &host), ("x-gateway-admin", "1")], body).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_gateway_keeps_the_others_have() {
    let (origin, redis) = (origin().await, Redis::start().await);
    let (one, two) = (gateway(&origin, &redis).await, gateway(&origin, &redis).await);
    // It is laid there without anybody waiting: who asks too soon has an answer of its own.
    let mut number = 0;
    until("the other has it", async || {
        number += 1;
        let path = format!("/k/{number}");
        ask(&one, &path).await == ask(&two, &path).await
    })
    .await;
    let path = format!("/k/{number}");
    let line = two.access_line(|line| line["path"] == *path && line["cache"] == "hit").await;
    assert_eq!(line["status"], 200);
    // Each language its own, also for who has never seen the resource.
    let by = async |gateway: &Gateway, language: &str| {
        send(gateway.address, "GET", "/k/vary", &[("accept-language", language)], "").await
    };
    let (german, french) = (by(&one, "de").await.text(), by(&one, "fr").await.text());
    assert_ne!(german, french);
    let three = gateway(&origin, &redis).await;
    assert_eq!((by(&three, "fr").await.text(), by(&three, "de").await.text()), (french, german));
    let shared = by(&gateway(&origin, &redis).await, "de").await;
    assert!(shared.field("cache-status").ends_with("detail=shared"), "{:?}", shared.headers);
    assert_eq!(shared.field("vary"), "accept-language");
    let age: u64 = shared.field("age").parse().unwrap();
    assert!(age < 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_or_a_purge_at_one_gateway_ends_it_at_all() {
    let (origin, redis) = (origin().await, Redis::start().await);
    let (one, two) = (gateway(&origin, &redis).await, gateway(&origin, &redis).await);
    for (n, body) in
        [r#"{"url": "/k/0"}"#, r#"{"prefix": "/k/1"}"#, r#"{"route": "kept"}"#, r#"{"tag": "all"}"#, r#"{"all": true}"#]
            .into_iter()
            .enumerate()
    {
        let path = format!("/k/{n}");
        // The same, or each its own.
        let (here, there) = (ask(&one, &path).await, ask(&two, &path).await);
        let answer = purge(&one, body).await;
        assert_eq!((answer.status, answer.json()["gateways"].as_str()), (200, Some("all")), "{body}");
        assert_ne!(ask(&one, &path).await, here, "{body}");
        until("it has ended at the other", async || ask(&two, &path).await != there).await;
        // Nor does who comes later find it there.
        let late = ask(&gateway(&origin, &redis).await, &path).await;
        assert!(late != here && late != there, "{body}");
    }
    let (here, there) = (ask(&one, "/k/write").await, ask(&two, "/k/write").await);
    send(one.address, "POST", "/k/write", &[], "x").await;
    assert_ne!(ask(&one, "/k/write").await, here);
    until("it has ended at the other", async || ask(&two, "/k/write").await != there).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_gateway_ends_while_redis_is_away_ends_everywhere_when_it_is_back() {
    let (origin, mut redis) = (origin().await, Redis::start().await);
    let (one, two) = (gateway(&origin, &redis).await, gateway(&origin, &redis).await);
    let (first, tagged) = (ask(&two, "/k/1").await, ask(&two, "/k/2").await);
    redis.kill().await;
    is(&one, "down").await;
    is(&two, "down").await;
    // What is kept goes on being used; a write ends it here at once.
    assert_eq!(ask(&two, "/k/1").await, first);
    send(one.address, "POST", "/k/1", &[], "x").await;
    let refused = purge(&one, r#"{"tag": "all"}"#).await;
    assert_eq!(refused.status, 503);
    assert!(refused.json()["detail"].as_str().unwrap().contains("purge again"));
    assert_eq!(ask(&two, "/k/1").await, first);
    assert!(redis.run().await);
    until("the write has ended it at the other", async || ask(&two, "/k/1").await != first).await;
    until("so has the purge", async || ask(&two, "/k/2").await != tagged).await;
}

/// Redis is killed, started and frozen under load: nobody has an error, and nobody waits long for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_redis_does_hurts_nobody() {
    let (origin, mut redis) = (origin().await, Redis::start().await);
    let (one, two) = (start(&origin, &redis, "").await, start(&origin, &redis, "").await);
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|n| {
            let stop = stop.clone();
            let address = if n % 2 == 0 { one.address } else { two.address };
            tokio::spawn(async move {
                let mut client = Client::new(address);
                let (mut done, mut failed) = (0_u32, Vec::new());
                while !stop.load(SeqCst) {
                    let path = format!("/k/{}", (done * 7 + n) % 50);
                    let (method, body) = if done % 50 == 49 { ("POST", "x") } else { ("GET", "") };
                    match client.send(request(method, &path, &[], body)).await {
                        Ok(answer) if answer.status == 200 => {}
                        other => failed.push(format!("{other:?}")),
                    }
                    done += 1;
                }
                (done, failed)
            })
        })
        .collect();
    let served = async || origin.count();
    for _ in 0..2 {
        redis.kill().await;
        is(&one, "down").await;
        let before = served().await;
        until("requests go on without it", async || served().await > before + 5).await;
        assert!(redis.run().await);
        is(&one, "up").await;
        is(&two, "up").await;
        redis.pause(true);
        let before = served().await;
        until("requests go on while it says nothing", async || served().await > before + 5).await;
        redis.pause(false);
        until("the other learns of a write again", async || {
            let first = ask(&two, "/k/x").await;
            send(one.address, "POST", "/k/x", &[], "x").await;
            let mut learned = false;
            for _ in 0..20 {
                learned |= ask(&two, "/k/x").await != first;
            }
            learned
        })
        .await;
    }
    stop.store(true, SeqCst);
    let mut all = 0;
    for client in clients {
        let (done, failed) = client.await.unwrap();
        assert!(failed.is_empty(), "{failed:?}");
        all += done;
    }
    println!("{all} requests, none failed; the origin had {}", origin.count());
}
