//! Rate limits: what is counted, what is told, and who is not counted with whom.

use tests::{Gateway, Origin, send};

async fn start(policy: &str) -> (Origin, Gateway) {
    let legacy = Origin::named("legacy").await;
    let rest =
        format!("trusted_proxies: [127.0.0.1]\nroutes:\n  - {{name: api, match: /api/**, rate_limit: {policy}}}\n");
    let gateway = Gateway::start(&crate::yaml(&[("legacy", legacy.url())], &rest)).await;
    (legacy, gateway)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_is_told_and_what_is_beyond_is_refused() {
    let (legacy, gateway) = start("{limit: 60/h, burst: 3}").await;
    for left in [2, 1, 0] {
        let answer = send(gateway.address, "GET", "/api/1", &[], "").await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.field("ratelimit-policy"), "\"ip\";q=60;w=3600");
        let told = answer.field("ratelimit").to_owned();
        assert!(told.starts_with(&format!("\"ip\";r={left};t=")), "{told}");
    }
    let refused = send(gateway.address, "POST", "/api/1", &[], "x").await;
    assert_eq!(refused.status, 429);
    let wait: u64 = refused.field("retry-after").parse().unwrap();
    assert!((50..=60).contains(&wait), "{wait}");
    assert_eq!(refused.field("ratelimit"), format!("\"ip\";r=0;t={wait}"));
    assert_eq!(refused.field("ratelimit-policy"), "\"ip\";q=60;w=3600");
    assert_eq!(
        (refused.field("content-type"), refused.json()["status"].as_u64()),
        ("application/problem+json", Some(429))
    );
    assert_eq!(legacy.count(), 3);
    // A burst beyond the rate is a quota of its own.
    let (_, burst) = start("{limit: 10/s, burst: 25}").await;
    assert_eq!(send(burst.address, "GET", "/api/1", &[], "").await.field("ratelimit-policy"), "\"ip\";q=25;w=3");
    // Other routes are not counted.
    let other = send(gateway.address, "GET", "/", &[], "").await;
    assert_eq!((other.status, other.field("ratelimit")), (200, ""));
    assert_eq!(gateway.metric("gateway_rate_limited_total{route=\"api\"}").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_is_counted_by_its_own_key() {
    let by = |fields: &'static [(&'static str, &'static str)]| fields;
    for (per, mine, same, other) in [
        (
            "ip",
            by(&[("x-forwarded-for", "192.0.2.1")]),
            by(&[("x-forwarded-for", "192.0.2.1")]),
            by(&[("x-forwarded-for", "192.0.2.2")]),
        ),
        (
            "ip",
            by(&[("x-forwarded-for", "2001:db8::1")]),
            by(&[("x-forwarded-for", "2001:db8::ffff:1")]),
            by(&[("x-forwarded-for", "2001:db8:0:1::1")]),
        ),
        (
            "header:x-api-key",
            by(&[("x-api-key", "a")]),
            by(&[("x-api-key", "a"), ("x-forwarded-for", "192.0.2.9")]),
            by(&[("x-api-key", "b")]),
        ),
        (
            "cookie:session",
            by(&[("cookie", "session=a")]),
            by(&[("cookie", "x=y; session=a")]),
            by(&[("cookie", "session=b")]),
        ),
        // Whoever leaves the key out is counted by address.
        ("header:x-api-key", by(&[]), by(&[("x-api-key", "")]), by(&[("x-api-key", "b")])),
    ] {
        let (_, gateway) = start(&format!("{{limit: 1/h, per: \"{per}\"}}")).await;
        let ask = async |fields: &[(&str, &str)]| send(gateway.address, "GET", "/api", fields, "").await.status;
        assert_eq!((ask(mine).await, ask(same).await, ask(other).await), (200, 429, 200), "{per}");
    }
    let (_, gateway) = start("{limit: 1/h, per: route}").await;
    let ask = async |from: &str| send(gateway.address, "GET", "/api", &[("x-forwarded-for", from)], "").await.status;
    assert_eq!((ask("192.0.2.1").await, ask("192.0.2.2").await), (200, 429));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_stays_used_across_reloads_and_a_new_limit_begins_anew() {
    let (legacy, gateway) = start("{limit: 1/h}").await;
    let file = |limit: &str, more: &str| {
        let rest = format!(
            "trusted_proxies: [127.0.0.1]\nroutes:\n  - {{name: api, match: /api/**, rate_limit: {{limit: {limit}}}}}\n{more}"
        );
        crate::yaml(&[("legacy", legacy.url())], &rest)
    };
    assert_eq!(send(gateway.address, "GET", "/api", &[], "").await.status, 200);
    gateway.flip(&file("1/h", "  - {name: other, match: /other}\n")).await;
    assert_eq!(send(gateway.address, "GET", "/api", &[], "").await.status, 429);
    gateway.flip(&file("2/h", "")).await;
    assert_eq!(send(gateway.address, "GET", "/api", &[], "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstreams_own_limits_stay_beside_it() {
    let legacy = Origin::start(|_| tests::Reply::new("200 OK", &[("ratelimit", "\"own\";r=1;t=1")], "ok")).await;
    let rest = "routes:\n  - {name: api, match: /api/**, rate_limit: {limit: 10/s}}\n";
    let gateway = Gateway::start(&crate::yaml(&[("legacy", legacy.url())], rest)).await;
    let answer = send(gateway.address, "GET", "/api", &[], "").await;
    let all: Vec<_> = answer.headers.get_all("ratelimit").iter().map(|value| value.to_str().unwrap()).collect();
    assert_eq!(all, ["\"own\";r=1;t=1", "\"ip\";r=9;t=1"]);
}

/// Each rule of a path has the limit of `defaults`, and so has what it falls to: it is counted there, once.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_all_routes_is_counted_once_where_a_request_falls() {
    let legacy = Origin::named("legacy").await;
    let rest = "defaults: {rate_limit: {limit: 10/h}}\nroutes:\n  - {name: read, match: {path: /api, methods: [GET]}}\n  \
                - {name: remove, match: {path: /api, methods: [DELETE]}}\n";
    let gateway = Gateway::start(&crate::yaml(&[("legacy", legacy.url())], rest)).await;
    let answer = send(gateway.address, "PUT", "/api", &[], "x").await;
    assert_eq!((answer.status, answer.headers.get_all("ratelimit").iter().count()), (200, 1));
    assert!(send(gateway.address, "GET", "/api", &[], "").await.field("ratelimit").contains("r=9"));
}
