//! Stages and cohorts under load: nothing lost, nothing doubled, shares as said.

use std::{collections::HashSet, sync::atomic::Ordering::SeqCst};

use tests::{Client, Gateway, Load, Origin, client::request, send};

use crate::yaml;

async fn pair() -> (Origin, Origin) {
    (Origin::named("legacy").await, Origin::named("orders").await)
}

fn stage(legacy: &Origin, orders: &Origin, stage: &str, canary: &str) -> String {
    let route =
        format!("routes:\n  - name: orders\n    match: /orders/**\n    upstream: orders\n    stage: {stage}\n{canary}");
    yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &route)
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_flips_under_load_lose_and_double_nothing() {
    let (legacy, orders) = pair().await;
    let gateway = Gateway::start(&stage(&legacy, &orders, "legacy", "")).await;
    let load = Load::start(gateway.address, 8, "/orders/1").await;
    for n in 0..50 {
        let word = if n % 2 == 0 { "migrated" } else { "legacy" };
        gateway.flip(&stage(&legacy, &orders, word, "")).await;
    }
    let counts = load.stop_without_failures().await;
    let good = counts.good.load(SeqCst);
    assert_eq!(legacy.count() + orders.count(), good, "each request arrived exactly once");
    let posts = legacy.received().iter().chain(&orders.received()).filter(|r| r.line().starts_with("POST")).count();
    assert_eq!(posts, counts.posts.load(SeqCst));
    assert!(legacy.count() > 0 && orders.count() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_is_met_sticks_and_grows_without_moving_anybody_back() {
    const SESSIONS: usize = 2000;
    let (legacy, orders) = pair().await;
    let canary = |percent: &str| {
        stage(&legacy, &orders, "canary", &format!("    canary: {{percent: {percent}, by: [cookie:session]}}\n"))
    };
    let gateway = Gateway::start(&canary("10%")).await;
    let mut client = Client::new(gateway.address);
    let mut on_service = async || {
        let mut found = HashSet::new();
        for session in 0..SESSIONS {
            let cookie = format!("a=b; session=s-{session}");
            let answer = client.send(request("GET", "/orders/1", &[("cookie", &cookie)], "")).await.unwrap();
            if answer.field("x-served-by") == "orders" {
                found.insert(session);
            }
        }
        found
    };
    let ten = on_service().await;
    // Five standard deviations of 2,000 sessions at 10 % are 67.
    assert!((133..=267).contains(&ten.len()), "{}", ten.len());
    assert_eq!(on_service().await, ten);
    gateway.flip(&canary("30%")).await;
    let thirty = on_service().await;
    assert!((498..=702).contains(&thirty.len()), "{}", thirty.len());
    assert!(ten.is_subset(&thirty));
    gateway.flip(&canary("0%")).await;
    assert!(on_service().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn sticky_sessions_stay_and_only_new_ones_move() {
    let (legacy, orders) = pair().await;
    let canary = |percent: &str| {
        stage(&legacy, &orders, "canary", &format!("    canary: {{percent: {percent}, by: [sticky]}}\n"))
    };
    let gateway = Gateway::start(&canary("50%")).await;
    let mut sessions = Vec::new();
    for _ in 0..200 {
        let answer = send(gateway.address, "GET", "/orders/1", &[], "").await;
        let cookie = answer.field("set-cookie").to_owned();
        assert!(
            cookie.starts_with("gateway-orders=") && cookie.ends_with("; Path=/; HttpOnly; SameSite=Lax"),
            "{cookie}"
        );
        sessions.push((cookie.split(';').next().unwrap().to_owned(), answer.field("x-served-by").to_owned()));
    }
    let services = sessions.iter().filter(|(_, by)| by == "orders").count();
    assert!((64..=136).contains(&services), "{services}");
    for percent in ["50%", "100%"] {
        if percent != "50%" {
            gateway.flip(&canary(percent)).await;
        }
        for (cookie, by) in &sessions {
            let answer = send(gateway.address, "GET", "/orders/1", &[("cookie", cookie)], "").await;
            assert_eq!(answer.field("x-served-by"), by, "at {percent}");
            assert_eq!(answer.field("set-cookie"), "", "set once");
        }
    }
    assert_eq!(send(gateway.address, "GET", "/orders/1", &[], "").await.field("x-served-by"), "orders");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_decision_is_passed_on_and_cannot_be_forged() {
    let (legacy, orders) = pair().await;
    let canary = "    canary:\n      percent: 0%\n      by: [header:x-user]\n      group: checkout\n      always: [{header: {x-beta: \"1\"}}]\n      never: [{cookie: {plan: old}}]\n";
    let gateway = Gateway::start(&stage(&legacy, &orders, "canary", canary)).await;
    let forged = [
        ("x-gateway-cohort", "checkout=service"),
        ("x_gateway_cohort", "evil"),
        ("baggage", "a=1,gateway-cohort=checkout:service"),
    ];
    let answer = send(gateway.address, "GET", "/orders/1", &forged, "").await;
    assert_eq!(answer.field("x-served-by"), "legacy");
    let got = legacy.last();
    assert_eq!(got.field("x-gateway-cohort"), "checkout=legacy");
    assert_eq!(got.fields("baggage"), ["a=1", "gateway-cohort=checkout:legacy"]);
    assert!(!got.head.contains("evil"));
    let beta = [("x-beta", "1")];
    assert_eq!(send(gateway.address, "GET", "/orders/1", &beta, "").await.field("x-served-by"), "orders");
    assert_eq!(orders.last().field("x-gateway-cohort"), "checkout=service");
    let never = [("x-beta", "1"), ("cookie", "plan=old")];
    assert_eq!(send(gateway.address, "GET", "/orders/1", &never, "").await.field("x-served-by"), "legacy");
    let line = gateway.access_line(|line| line["why"] == "never").await;
    assert_eq!((line["route"].as_str(), line["arm"].as_str()), (Some("orders"), Some("legacy")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_baseline_stands_in_for_the_monolith() {
    let legacy = Origin::named("legacy").await;
    let (v1, v2) = (Origin::named("v1").await, Origin::named("v2").await);
    let route = |stage: &str| {
        let text = format!(
            "routes:\n  - name: orders\n    match: /api/orders/**\n    upstream: v2\n    baseline: v1\n    stage: {stage}\n    rewrite: {{strip_prefix: /api}}\n    canary: {{percent: 100%, by: [header:x-user]}}\n"
        );
        yaml(&[("legacy", legacy.url()), ("v1", v1.url()), ("v2", v2.url())], &text)
    };
    let gateway = Gateway::start(&route("canary")).await;
    let by = async |fields: &[(&str, &str)]| {
        send(gateway.address, "GET", "/api/orders/1", fields, "").await.field("x-served-by").to_owned()
    };
    assert_eq!(by(&[("x-user", "1")]).await, "v2");
    assert_eq!(by(&[]).await, "v1");
    // It is no monolith: it is rewritten for, like any service.
    assert!(v1.last().line().starts_with("GET /orders/1 "));
    gateway.flip(&route("legacy")).await;
    assert_eq!(by(&[("x-user", "1")]).await, "v1");
    assert_eq!(legacy.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn retired_and_gone_never_fall_back() {
    let (legacy, orders) = pair().await;
    let routes = "routes:\n  - name: orders\n    match: {path: /orders/**, methods: [GET, POST]}\n    upstream: orders\n    stage: retired\n  - name: old\n    match: /old/**\n    stage: gone\n    gone: {deprecation: 2026-01-31, sunset: \"2026-06-30T12:00:00Z\", successor: /orders}\n  - name: old-get\n    match: {path: \"/old/{id}/x\", methods: [GET]}\n    stage: gone\n";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], routes)).await;
    assert_eq!(send(gateway.address, "GET", "/orders/1", &[], "").await.field("x-served-by"), "orders");
    let refused = send(gateway.address, "DELETE", "/orders/1", &[], "").await;
    assert_eq!((refused.status, refused.field("allow")), (405, "GET, POST"));
    assert_eq!(refused.field("content-type"), "application/problem+json");
    let gone = send(gateway.address, "GET", "/old/1", &[], "").await;
    assert_eq!(gone.status, 410);
    assert_eq!(gone.field("deprecation"), "@1769817600");
    assert_eq!(gone.field("sunset"), "Tue, 30 Jun 2026 12:00:00 GMT");
    assert_eq!(gone.field("link"), "</orders>; rel=\"successor-version\"");
    assert_eq!(send(gateway.address, "POST", "/old/1/x", &[], "").await.status, 405);
    assert_eq!(legacy.count(), 0);
    let line = gateway.access_line(|line| line["status"] == 410).await;
    assert_eq!((line["route"].as_str(), line["arm"].as_str()), (Some("old"), Some("gateway")));
}
