//! The admin listener: who may call, and what it says.

use tests::{Gateway, Origin, get, send};

use crate::yaml;

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_only_local_same_site_calls_pass() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let host = gateway.admin.to_string();
    let status = async |method: &str, path: &str, fields: &[(&str, &str)]| {
        send(gateway.admin, method, path, fields, "").await.status
    };
    for path in ["/", "/healthz", "/readyz", "/metrics", "/api/status", "/api/routes", "/api/routes/unrouted"] {
        assert_eq!(get(gateway.admin, path).await.status, 200, "{path}");
    }
    assert_eq!(status("GET", "/api/status", &[("host", "rebound.example.com")]).await, 403);
    assert_eq!(status("GET", "/api/status", &[("host", &host), ("origin", "http://evil.example.com")]).await, 403);
    assert_eq!(status("GET", "/api/status", &[("host", &host), ("sec-fetch-site", "cross-site")]).await, 403);
    assert_eq!(status("POST", "/api/reload", &[("host", &host)]).await, 403);
    assert_eq!(status("POST", "/api/reload", &[("host", &host), ("x-gateway-admin", "1")]).await, 200);
    assert_eq!(status("GET", "/api/reload", &[("host", &host)]).await, 405);
    assert_eq!(status("GET", "/nothing", &[("host", &host)]).await, 404);
    assert_eq!(status("GET", "/api/routes/nobody", &[("host", &host)]).await, 404);
    assert_eq!(legacy.count(), 0);
    // The public listener has none of it.
    assert_eq!(get(gateway.address, "/api/status").await.field("x-served-by"), "legacy");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_token_nothing_passes_without_it() {
    let legacy = Origin::named("legacy").await;
    let file = format!("admin: {{listen: 127.0.0.1:0, token: s3cret}}\n{}", yaml(&[("legacy", legacy.url())], ""));
    let gateway = Gateway::start(&file).await;
    let refused = send(gateway.admin, "GET", "/metrics", &[("host", "localhost")], "").await;
    assert_eq!((refused.status, refused.field("www-authenticate")), (401, "Bearer"));
    let wrong = send(gateway.admin, "GET", "/metrics", &[("authorization", "Bearer s3creT")], "").await;
    assert_eq!((wrong.status, wrong.field("www-authenticate")), (401, "Bearer error=\"invalid_token\""));
    let right = [("authorization", "Bearer s3cret")];
    assert_eq!(send(gateway.admin, "GET", "/metrics", &right, "").await.status, 200);
    assert_eq!(send(gateway.admin, "POST", "/api/reload", &right, "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_and_metrics_tell_what_runs() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let route = "routes:\n  - {name: orders, match: /orders/**, upstream: orders, stage: canary, canary: {percent: 12.5%, by: [header:x-user]}}\n";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], route)).await;
    for n in 0..200 {
        let user = n.to_string();
        send(gateway.address, "GET", "/orders/1", &[("x-user", &user)], "").await;
    }
    tests::until("all are counted", async || {
        let route = gateway.api("/api/routes/orders").await;
        let of = |arm: &str| route["requests"][arm]["2xx"].as_u64().unwrap();
        assert_eq!(
            (route["stage"].as_str(), route["share"].as_str(), route["service"].as_str()),
            (Some("canary"), Some("12.5%"), Some("orders"))
        );
        of("legacy") == legacy.count() as u64
            && of("service") == orders.count() as u64
            && of("legacy") + of("service") == 200
    })
    .await;
    let page = get(gateway.admin, "/metrics").await;
    assert!(page.field("content-type").starts_with("application/openmetrics-text"));
    let page = page.text();
    assert!(page.ends_with("# EOF\n"));
    for line in [
        format!("gateway_requests_total{{route=\"orders\",arm=\"service\",status=\"2xx\"}} {}", orders.count()),
        format!("gateway_request_duration_seconds_count{{route=\"orders\",arm=\"legacy\"}} {}", legacy.count()),
        format!("le=\"+Inf\",route=\"orders\",arm=\"legacy\"}} {}", legacy.count()),
        "gateway_config_last_reload_successful 1".to_owned(),
    ] {
        assert!(page.contains(&line), "{line} in\n{page}");
    }
    let host = gateway.admin.to_string();
    let asked = r#"{"method": "GET", "url": "http://shop.example.com/orders/1", "headers": {"x-user": "7"}}"#;
    let told = send(gateway.admin, "POST", "/api/explain", &[("host", &host), ("x-gateway-admin", "1")], asked).await;
    assert_eq!((told.status, told.json()["route"].as_str()), (200, Some("orders")));
    let bad = send(gateway.admin, "POST", "/api/explain", &[("host", &host), ("x-gateway-admin", "1")], "{}").await;
    assert_eq!(bad.status, 400);
}
