//! The board's files and what it is sent. What it does with that is tested in a real Chromium: `tests/browser`.

use serde_json::Value;
use tests::{Gateway, Origin, get, raw, send};

use crate::yaml;

#[tokio::test(flavor = "multi_thread")]
async fn its_files_are_served_strictly_and_without_a_token() {
    let legacy = Origin::named("legacy").await;
    let file = format!("admin: {{listen: 127.0.0.1:0, token: s3cret}}\n{}", yaml(&[("legacy", legacy.url())], ""));
    let gateway = Gateway::start(&file).await;
    let page = get(gateway.admin, "/").await;
    assert_eq!((page.status, page.field("content-type")), (200, "text/html; charset=utf-8"));
    let policy = page.field("content-security-policy");
    for part in ["default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"] {
        assert!(policy.contains(part) && !policy.contains("unsafe"), "{policy}");
    }
    // Nothing in it is from elsewhere, and nothing is in the page itself.
    let text = page.text();
    for name in ["/board.css", "/board.js", "/uplot.js", "/uplot.css", "/fig.svg", "/uplot.LICENSE"] {
        assert!(text.contains(name), "{name}");
        let file = get(gateway.admin, name).await;
        assert_eq!((file.status, file.field("x-content-type-options")), (200, "nosniff"), "{name}");
        let tag = file.field("etag").to_owned();
        let again = send(gateway.admin, "GET", name, &[("host", "localhost"), ("if-none-match", &tag)], "").await;
        assert_eq!((again.status, again.body.len()), (304, 0), "{name}");
    }
    assert!(!text.contains("//cdn") && !text.contains("style=") && !text.contains("<script>"), "{text}");
    assert_eq!(send(gateway.admin, "POST", "/", &[("authorization", "Bearer s3cret")], "").await.status, 405);
    // What it shows is for those with the token alone.
    for path in ["/api/board", "/api/inventory", "/api/progress"] {
        assert_eq!(get(gateway.admin, path).await.status, 401, "{path}");
    }
    // A page of another site can neither frame it nor read it.
    let frame = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")];
    assert_eq!(send(gateway.admin, "GET", "/", &frame, "").await.status, 403);
    let link = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
    assert_eq!(send(gateway.admin, "GET", "/", &link, "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_sent_all_at_first_and_then_what_changes() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let upstreams = [("legacy", legacy.url()), ("orders", orders.url())];
    let routes = "routes:\n  - {name: orders, match: /orders/**, upstream: orders, stage: legacy}\n  - {name: users, match: /users/**, stage: legacy}\n";
    let gateway = Gateway::start(&yaml(&upstreams, routes)).await;
    let ask = format!("GET /api/board HTTP/1.1\r\nhost: {}\r\n\r\n", gateway.admin);
    let admin = gateway.admin;
    let (looks, looked) = tokio::sync::watch::channel(false);
    let reading = tokio::spawn(async move {
        let enough = |text: &str| {
            looks.send_replace(text.contains("event: state"));
            text.contains("\"migrated\"")
        };
        raw(admin, ask.as_bytes(), enough).await
    });
    tests::until("somebody looks", async || *looked.borrow()).await;
    gateway.flip(&yaml(&upstreams, &routes.replacen("stage: legacy", "stage: migrated", 1))).await;
    let text = reading.await.unwrap();
    let states: Vec<Value> = text
        .split("event: state\ndata: ")
        .skip(1)
        .map(|part| serde_json::from_str(part.split('\n').next().unwrap()).unwrap_or_default())
        .collect();
    let names = |state: &Value| -> Vec<String> {
        state["routes"].as_array().unwrap().iter().map(|route| route["name"].as_str().unwrap().to_owned()).collect()
    };
    assert!(states.len() >= 2, "{text}");
    assert_eq!(names(&states[0]), ["orders", "users", "unrouted"]);
    assert_eq!(states[0]["upstreams"].as_array().unwrap().len(), 2);
    let last = states.last().unwrap();
    assert_eq!((names(last), last["routes"][0]["stage"].as_str()), (vec!["orders".to_owned()], Some("migrated")));
    assert!(text.contains("event: progress\ndata: {"), "{text}");
}
