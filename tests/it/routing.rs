//! No spelling of a path slips past a route that must have it.

use tests::{Gateway, Origin, raw};

use crate::yaml;

/// Spellings of `/admin/users` that some server reads as it.
const SPELLINGS: [&str; 23] = [
    "/admin/users",
    "/admin/users/",
    "//admin/users",
    "/admin//users",
    "/./admin/users",
    "/admin/./users",
    "/x/../admin/users",
    "/admin/x/../users",
    "/../admin/users",
    "/%61dmin/users",
    "/admin/%75sers",
    "/%2e/admin/users",
    "/x/%2e%2e/admin/users",
    "/x/.%2E/admin/users",
    "/admin;a=b/users",
    "/admin/users;a=b",
    "/;/admin/users",
    "/admin%3ba/users",
    "/ADMIN/users",
    "/Admin/Users/",
    "/%41dmin/users",
    "/admin/users?x=/../..",
    "http://shop.example.com/admin/users",
];

/// Spellings that servers read in different ways: refused.
const REFUSED: [&str; 15] = [
    "/admin%2fusers",
    "/x/..%2fadmin/users",
    "/admin%5cusers",
    "/admin\\users",
    "/x\\..\\admin\\users",
    "/admin/users%00",
    "/admin/users%0a",
    "/x/..;/admin/users",
    "/x/..;a=b/admin/users",
    "/x/.;/admin/users",
    "/x/%2e%2e;/admin/users",
    "/x/..%3b/admin/users",
    "/admin/users%",
    "/admin/users#fragment",
    "/x%c0%afadmin/users",
];

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_slips_past_a_retired_or_gone_route() {
    let (legacy, service) = (Origin::named("legacy").await, Origin::named("service").await);
    let file = |stage: &str| {
        let route = format!(
            "case_insensitive: true\nroutes:\n  - {{name: admin, match: /admin/**, upstream: service, stage: {stage}}}\n  - {{name: post, match: {{path: /admin/users, methods: [POST]}}, upstream: service, stage: migrated}}\n"
        );
        yaml(&[("legacy", legacy.url()), ("service", service.url())], &route)
    };
    let gateway = Gateway::start(&file("retired")).await;
    let ask = async |target: &str| {
        let request = format!("GET {target} HTTP/1.1\r\nhost: shop.example.com\r\nconnection: close\r\n\r\n");
        raw(gateway.address, request.as_bytes(), |_| false).await
    };
    for (stage, status) in [("retired", "200"), ("gone", "410")] {
        if stage == "gone" {
            gateway.flip(&file(stage)).await;
        }
        for target in SPELLINGS {
            let got = ask(target).await;
            assert!(got.starts_with(&format!("HTTP/1.1 {status}")), "{stage} {target}: {got}");
        }
        for target in REFUSED {
            let got = ask(target).await;
            assert!(got.starts_with("HTTP/1.1 400"), "{stage} {target}: {got}");
        }
    }
    assert_eq!(legacy.count(), 0, "{:?}", legacy.received());
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_methods_fields_and_queries_choose() {
    let legacy = Origin::named("legacy").await;
    let names = ["exact", "wild", "post", "beta", "v2", "param", "rest"];
    let mut origins = vec![("legacy", legacy.url())];
    let mut running = Vec::new();
    for name in names {
        let origin = Origin::named(name).await;
        origins.push((name, origin.url()));
        running.push(origin);
    }
    let routes = "routes:
  - {name: rest, match: /a/**, upstream: rest, stage: migrated}
  - {name: param, match: \"/a/{id}\", upstream: param, stage: migrated}
  - name: post
    match: {path: \"/a/{id}\", methods: [POST]}
    upstream: post
    stage: migrated
  - name: beta
    match: {path: \"/a/{id}\", headers: {x-beta: \"1\"}}
    upstream: beta
    stage: migrated
  - name: v2
    match: {path: /a/b, query: {v: \"2\"}}
    upstream: v2
    stage: migrated
  - name: exact
    match: {path: /**, hosts: [api.example.com]}
    upstream: exact
    stage: migrated
  - name: wild
    match: {path: /**, hosts: [\"*.example.com\"]}
    upstream: wild
    stage: migrated
";
    let gateway = Gateway::start(&yaml(&origins, routes)).await;
    let by = async |method: &str, target: &str, fields: &[(&str, &str)]| {
        let mut fields = fields.to_vec();
        if !fields.iter().any(|(name, _)| *name == "host") {
            fields.push(("host", "other"));
        }
        tests::send(gateway.address, method, target, &fields, "").await.field("x-served-by").to_owned()
    };
    assert_eq!(by("GET", "/b", &[]).await, "legacy");
    assert_eq!(by("GET", "/a", &[]).await, "rest");
    assert_eq!(by("GET", "/a/1/2", &[]).await, "rest");
    assert_eq!(by("GET", "/a/1", &[]).await, "param");
    assert_eq!(by("POST", "/a/1", &[]).await, "post");
    assert_eq!(by("GET", "/a/1", &[("x-beta", "1")]).await, "beta");
    assert_eq!(by("POST", "/a/1", &[("x-beta", "1")]).await, "post", "a method outranks fields");
    assert_eq!(by("GET", "/a/b?v=2", &[]).await, "v2");
    assert_eq!(by("GET", "/a/b?v=3", &[]).await, "param", "what fails falls to the next best");
    assert_eq!(by("GET", "/a/1", &[("host", "API.example.com:80")]).await, "exact");
    assert_eq!(by("GET", "/a/1", &[("host", "x.y.example.com")]).await, "wild");
    assert_eq!(by("GET", "/b", &[("host", "example.com")]).await, "legacy");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allowed_separator_slips_past_neither_reading() {
    let (legacy, service) = (Origin::named("legacy").await, Origin::named("service").await);
    let routes = "allow_in_paths: [encoded_slash]
routes:
  - {name: file, match: \"/files/{id}\", stage: gone}
  - {name: admin, match: /admin/**, stage: gone}
  - {name: package, match: \"/packages/{name}\", upstream: service, stage: migrated}
";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("service", service.url())], routes)).await;
    for (target, status) in [
        ("/files/a%2fb", 410),
        ("/files%2fa", 410),
        ("/x%2f..%2fadmin/users", 400),
        ("/admin%2fusers", 410),
        ("/packages/@scope%2fname", 200),
        ("/other%2fx", 200),
    ] {
        let answer = tests::send(gateway.address, "GET", target, &[], "").await;
        assert_eq!(answer.status, status, "{target}");
    }
    assert_eq!(
        (service.last().line(), legacy.last().line()),
        ("GET /packages/@scope%2fname HTTP/1.1", "GET /other%2fx HTTP/1.1")
    );
}
