//! What clients ask for, on the real executable: learned, kept, imported, bounded; what is made of it.

use serde_json::{Value, json};
use tests::{Gateway, Origin, Reply, gateway::run, get, send, until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::yaml;

const ROUTES: &str = "routes:
  - {name: orders, match: /api/orders/**, upstream: orders, stage: migrated, tags: [checkout]}
  - {name: users, match: /api/users/**, stage: legacy, tags: [team-a]}
";

/// An origin that has what it is asked for, but for what is called `missing`.
async fn shop(name: &'static str) -> Origin {
    Origin::start(move |request| match request.line() {
        line if line.contains("missing") => Reply::new("404 Not Found", &[], "no"),
        _ => Reply::new("200 OK", &[("x-served-by", name)], name),
    })
    .await
}

fn endpoint<'v>(document: &'v Value, method: &str, path: &str) -> Option<&'v Value> {
    let all = document["endpoints"].as_array().unwrap();
    all.iter().find(|endpoint| endpoint["method"] == method && endpoint["path"] == path)
}

/// The inventory, once it has so many requests, those to nothing among them.
async fn learned(gateway: &Gateway, requests: u64) -> Value {
    let mut document = Value::Null;
    until(&format!("{requests} requests are counted"), async || {
        document = gateway.api("/api/inventory").await;
        let of = |arm: &Value| arm["counts"]["requests"].as_u64().unwrap();
        let arms = |endpoint: &Value| endpoint["arms"].as_object().unwrap().values().map(of).sum::<u64>();
        let all: u64 = document["endpoints"].as_array().unwrap().iter().map(arms).sum();
        let others = ["unmatched", "beyond", "dropped"].map(|name| document[name].as_u64().unwrap());
        all + others.iter().sum::<u64>() >= requests
    })
    .await;
    document
}

async fn ask(gateway: &Gateway, method: &str, paths: &[&str]) {
    for path in paths {
        send(gateway.address, method, path, &[], "").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_learned_as_templates_by_who_answers() {
    let (legacy, orders) = (shop("legacy").await, shop("orders").await);
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], ROUTES)).await;
    ask(
        &gateway,
        "GET",
        &["/api/orders/1", "/api/orders/2?x=1", "/api/orders/17/", "/login", "/missing", "/.git/missing"],
    )
    .await;
    ask(&gateway, "POST", &["/api/orders", "/api/users"]).await;
    let document = learned(&gateway, 8).await;
    let order = endpoint(&document, "GET", "/api/orders/{id}").unwrap();
    assert_eq!(
        (order["route"].as_str(), order["state"].as_str(), &order["arms"]["service"]["counts"]["requests"]),
        (Some("orders"), Some("migrated"), &json!(3))
    );
    assert!(order["arms"]["legacy"].is_null() && order["last_seen"].is_string());
    assert!(order["arms"]["service"]["p99_ms"].as_f64().unwrap() > 0.0);
    let login = endpoint(&document, "GET", "/login").unwrap();
    assert_eq!((&login["route"], login["state"].as_str()), (&Value::Null, Some("legacy")));
    assert_eq!(endpoint(&document, "POST", "/api/users").unwrap()["route"], "users");
    let paths: Vec<&str> =
        document["endpoints"].as_array().unwrap().iter().map(|e| e["path"].as_str().unwrap()).collect();
    assert!(!paths.iter().any(|path| path.contains("missing")), "{paths:?}");
    assert_eq!(document["unmatched"], 2);
    let summary = json!({"endpoints": 4, "legacy": 2, "canary": 0, "moved": 2, "unrouted": 1, "never_called": 0});
    assert_eq!(document["summary"], summary);
    // The command says the same, in lists.
    let address = gateway.admin.to_string();
    let (code, out, err) = run(&["inventory", "--admin", &address]).await;
    assert_eq!(code, 0, "{err}");
    for line in ["still on the monolith, by traffic (2)", "moved (2)", "claimed by no route (1)"] {
        assert!(out.contains(line), "{line} in\n{out}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_learned_and_imported_outlives_the_process() {
    let (legacy, orders) = (shop("legacy").await, shop("orders").await);
    let folder = tests::folder();
    let file = folder.path().join("routes.yaml");
    let text = yaml(&[("legacy", legacy.url()), ("orders", orders.url())], ROUTES);
    std::fs::write(&file, Gateway::whole(&text)).unwrap();
    let mut gateway = Gateway::start_on(&file, &[]).await;
    ask(&gateway, "GET", &["/api/orders/1", "/reports/monthly"]).await;
    learned(&gateway, 2).await;
    let openapi = folder.path().join("openapi.yaml");
    std::fs::write(
        &openapi,
        "openapi: 3.0.3\nservers: [{url: /api}]\npaths:\n  /orders/{orderId}: {get: {}}\n  /orders/{orderId}/refund: {post: {operationId: refund}}\n",
    )
    .unwrap();
    let log = folder.path().join("access.log");
    let line = |n: usize| {
        format!(
            "192.0.2.1 - - [28/Nov/2026:13:{:02}:36 +0000] \"GET /catalogue/{n}?page=2 HTTP/1.1\" 200 512 \"-\" \"curl\"\n",
            n % 60
        )
    };
    std::fs::write(&log, (0..100).map(line).collect::<String>() + "nonsense\n").unwrap();
    let address = gateway.admin.to_string();
    for (path, told) in [(&openapi, "2 endpoints"), (&log, "101 lines, 1 of them not readable; 1 endpoints")] {
        let (code, out, err) = run(&["inventory", "--admin", &address, "--import", &path.to_string_lossy()]).await;
        assert!(code == 0 && out.contains(told), "{out}{err}");
    }
    let check = |document: &Value| {
        let refund = endpoint(document, "POST", "/api/orders/{orderId}/refund").unwrap();
        assert_eq!((refund["state"].as_str(), refund["documented"].as_bool()), (Some("never_called"), Some(true)));
        // What was called before it was documented is the same endpoint.
        let order = endpoint(document, "GET", "/api/orders/{orderId}").unwrap();
        assert_eq!(
            (&order["arms"]["service"]["counts"]["requests"], order["state"].as_str()),
            (&json!(1), Some("migrated"))
        );
        let catalogue = endpoint(document, "GET", "/catalogue/{id}").unwrap();
        assert_eq!(catalogue["arms"]["legacy"]["counts"]["requests"], 100);
        assert_eq!(endpoint(document, "GET", "/reports/monthly").unwrap()["arms"]["legacy"]["counts"]["requests"], 1);
        assert_eq!(document["summary"]["never_called"], 1);
    };
    check(&gateway.api("/api/inventory").await);
    gateway.signal("TERM");
    assert!(gateway.end().await.success());
    let gateway = Gateway::start_on(&file, &[]).await;
    check(&gateway.api("/api/inventory").await);
    // Bad documents are refused, with what to do; nothing else is changed.
    let host = gateway.admin.to_string();
    let fields = [("host", host.as_str()), ("x-gateway-admin", "1")];
    for (body, told) in [
        ("{\"a\": 1}", "no `paths`"),
        ("a: [", "neither JSON nor YAML"),
        ("{\"endpoints\": [{\"arms\": 7}]}", "invalid type"),
    ] {
        let answer = send(gateway.admin, "POST", "/api/inventory", &fields, body).await;
        assert!(answer.status == 400 && answer.text().contains(told), "{}", answer.text());
    }
    check(&gateway.api("/api/inventory").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn diff_counts_the_requests_that_would_go_elsewhere() {
    let (legacy, orders) = (shop("legacy").await, shop("orders").await);
    let upstreams = [("legacy", legacy.url()), ("orders", orders.url())];
    let before = "routes:\n  - {name: orders, match: /orders/**, upstream: orders, stage: legacy}\n  - {name: beta, match: {path: /orders/**, headers: {x-beta: \"1\"}}, upstream: orders, stage: migrated}\n";
    let gateway = Gateway::start(&yaml(&upstreams, before)).await;
    let paths: Vec<String> = (0..40).map(|n| format!("/orders/{n}")).collect();
    ask(&gateway, "GET", &paths.iter().map(String::as_str).collect::<Vec<_>>()).await;
    ask(&gateway, "GET", &["/users/1"]).await;
    send(gateway.address, "GET", "/orders/7", &[("x-beta", "1")], "").await;
    learned(&gateway, 42).await;
    let folder = tests::folder();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_string_lossy().into_owned()
    };
    let inventory = write("inventory.json", &get(gateway.admin, "/api/inventory").await.text());
    let old = write("old.yaml", &yaml(&upstreams, before));
    let new = write("new.yaml", &yaml(&upstreams, &before.replace("stage: legacy", "stage: migrated")));
    let (code, out, err) = run(&["diff", &old, &new, "--inventory", &inventory]).await;
    assert_eq!(code, 1, "{err}");
    // Forty of them within a minute are 2,400 an hour. Those with the field of the other route stay where they are.
    assert!(
        out.starts_with(
            "GET /orders/{id}: 2,400 requests an hour, legacy → orders\n1 of 3 known endpoints and 95.2 % of"
        ),
        "{out}"
    );
    let (code, out, _) = run(&["diff", &old, &new, "--inventory", &inventory, "--json"]).await;
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (code, &told["traffic"][0]["per_hour"], told["traffic"].as_array().unwrap().len()),
        (1, &json!(2400.0), 1)
    );
    assert_eq!(run(&["diff", &old, &old, "--inventory", &inventory]).await.0, 0);
    let bad = write("bad.json", "{}");
    let (code, _, err) = run(&["diff", &old, &new, "--inventory", &bad]).await;
    assert!(code == 78 && err.contains("no `paths`"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_file_is_drafted_and_good() {
    let folder = tests::folder();
    let log = folder.path().join("access.log");
    let mut text = String::new();
    let mut line = |target: &str, method: &str| {
        text.push_str(&format!(
            "h - - [28/Nov/2026:13:55:36 +0000] \"{method} {target} HTTP/1.1\" 200 1 \"-\" \"-\"\n"
        ));
    };
    for n in 0..50 {
        line(&format!("/api/v1/orders/{n}"), "GET");
        line("/api/v1/orders", "POST");
        line(&format!("/api/v1/users/{n}/avatar"), "GET");
        line("/", "GET");
        line("/on", "GET");
        line("/api/unrouted", "GET");
        line("/odd:", "GET");
        line("/login.php", "GET");
        line(&format!("/{n}"), "GET");
        line("/%22%7D%0a%24%7BHOME%7D-x", "GET");
    }
    std::fs::write(&log, text).unwrap();
    // What a shell has emptied to write into it.
    let nowhere = folder.path().join("none.yaml").to_string_lossy().into_owned();
    std::fs::write(&nowhere, "").unwrap();
    let log = log.to_string_lossy().into_owned();
    let (code, draft, err) =
        run(&["suggest", "--config", &nowhere, "--from", &log, "--legacy", "http://127.0.0.1:9000"]).await;
    assert_eq!(code, 0, "{err}");
    for expected in [
        "match: /api/v1/orders/**\n",
        "match: /api/v1/users/**\n",
        "match: /login.php\n",
        "match: /\n",
        "name: \"on\"\n    match: /on\n",
        "name: unrouted-\n    match: /api/unrouted\n",
        "match: \"/odd:\"\n",
        "50 % of them writes",
        "POST /api/v1/orders  3,000 an hour",
        "#   GET /{id}\n",
    ] {
        assert!(draft.contains(expected), "{expected} in\n{draft}");
    }
    let file = folder.path().join("routes.yaml");
    std::fs::write(&file, &draft).unwrap();
    let (code, _, err) = run(&["check", &file.to_string_lossy()]).await;
    assert_eq!(code, 0, "{err}\n{draft}");
    // Everything is the monolith's still; what has a control character in it is answered 400, and is nobody's.
    let (_, told, _) = run(&["inventory", "--config", &file.to_string_lossy(), "--from", &log, "--json"]).await;
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["summary"]["moved"], &told["summary"]["unrouted"]), (&json!(0), &json!(1)), "{told}");
}

/// Shares are sums of what was counted, and silence is proof only where the monolith had no part in anything.
#[tokio::test(flavor = "multi_thread")]
async fn progress_is_counted_and_retired_is_proposed_on_silence_alone() {
    let (legacy, orders) = (shop("legacy").await, shop("orders").await);
    let routes = "inventory: {retire_after: 1s}\nroutes:
  - {name: orders, match: {path: /api/orders/**, methods: [GET]}, upstream: orders, stage: migrated, tags: [checkout]}
  - {name: quiet, match: /quiet, upstream: orders, stage: migrated}
  - {name: users, match: /api/users/**, stage: legacy, tags: [team-a]}
";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], routes)).await;
    ask(&gateway, "GET", &["/api/orders/1", "/api/orders/2", "/api/orders/3", "/api/users/1"]).await;
    ask(&gateway, "POST", &["/api/users"]).await;
    let silence = |progress: &Value, route: &str| {
        progress["silence"].as_array().unwrap().iter().find(|one| one["route"] == route).cloned().unwrap_or_default()
    };
    let mut progress = Value::Null;
    until("the monolith was silent for long enough", async || {
        progress = gateway.api("/api/progress").await;
        silence(&progress, "orders")["propose"] == "retired"
    })
    .await;
    let sum = |tag: &str, what: &str, n: usize| -> u64 {
        let points = progress["points"].as_array().unwrap();
        points.iter().map(|point| point["of"][tag][what][n].as_u64().unwrap_or(0)).sum()
    };
    assert_eq!((sum("", "requests", 0), sum("", "requests", 1)), (3, 5));
    assert_eq!((sum("", "writes", 0), sum("", "writes", 1)), (0, 1));
    assert_eq!((sum("checkout", "requests", 0), sum("checkout", "requests", 1)), (3, 3));
    assert_eq!((sum("team-a", "requests", 0), sum("team-a", "writes", 1)), (0, 1));
    let newest = progress["points"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&newest["of"][""]["endpoints"], &newest["of"]["checkout"]["endpoints"]),
        (&json!([1, 3]), &json!([1, 1]))
    );
    // Nobody has asked: that is no proof.
    let quiet = silence(&progress, "quiet");
    assert!(quiet["propose"].is_null() && quiet["told"].as_str().unwrap().contains("nobody has asked"), "{quiet}");
    // `retired` would answer these 405: the monolith is not silent on the path.
    ask(&gateway, "DELETE", &["/api/orders/1"]).await;
    until("the silence is over", async || {
        let silence = silence(&gateway.api("/api/progress").await, "orders");
        silence["propose"].is_null() && silence["last_legacy_answer_seen"] == true
    })
    .await;
    let (code, out, _) = run(&["status", "--admin", &gateway.admin.to_string()]).await;
    assert!(code == 0 && out.contains("off the monolith, of late:"), "{out}");
}

/// Memory in KiB.
fn resident(gateway: &Gateway) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", gateway.process.id().unwrap())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Sends `GET`s of these paths, many at a time, over one connection.
async fn flood(address: std::net::SocketAddr, paths: impl Iterator<Item = String>) -> usize {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    let mut paths = paths.peekable();
    let mut answered = 0;
    let mut buffer = vec![0; 64 * 1024];
    while paths.peek().is_some() {
        let some: Vec<String> = paths.by_ref().take(100).collect();
        let requests: String = some.iter().map(|path| format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).collect();
        tcp.write_all(requests.as_bytes()).await.unwrap();
        let (mut seen, mut tail) = (0, Vec::new());
        while seen < some.len() {
            let read = tcp.read(&mut buffer).await.unwrap();
            assert!(read > 0, "closed after {answered}");
            tail.extend_from_slice(&buffer[..read]);
            let needle = b"HTTP/1.1 200 OK";
            seen += tail.windows(needle.len()).filter(|window| window == needle).count();
            // What may be the first part of the next one.
            tail.drain(..tail.len().saturating_sub(needle.len() - 1));
        }
        answered += seen;
    }
    answered
}

/// A monolith that answers 200 whatever it is asked, and clients that ask for everything once: nothing grows beyond its bound, and
/// what people really use stays listed. CI runs it with `REQUESTS=200000` and the release build.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_paths_take_no_more_memory_than_there_is_for_them() {
    let legacy = Origin::start(|_| Reply::ok("")).await;
    let gateway = Gateway::start(&format!("access_log: none\n{}", yaml(&[("legacy", legacy.url())], ""))).await;
    let all: u64 = std::env::var("REQUESTS").map_or(20_000, |text| text.parse().unwrap());
    let real = ["/orders", "/orders/1/items", "/login", "/account/settings", "/cart.php"];
    let used = |n: usize| (0..n).map(move |at| real[at % real.len()].to_owned());
    flood(gateway.address, used(1_000)).await;
    let before = resident(&gateway);
    let letters = |mut n: u64| -> String {
        n = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        (0..9).map(|at| char::from(b'a' + u8::try_from((n >> (at * 5)) % 26).unwrap())).collect()
    };
    let hostile = |n: u64| match n % 5 {
        0 => format!("/{}", letters(n)),
        1 => format!("/{}/{}/{}", letters(n), letters(n + 1), letters(n + 2)),
        2 => format!("/orders/{}-{}", letters(n), letters(n + 7)),
        3 => format!("/{}.php?x={n}", letters(n)),
        _ => format!("/%7B{}%7D/{n:x}/<script>{}", letters(n), "/a".repeat(20)).replace('<', "%3C").replace('>', "%3E"),
    };
    let halves = [0..all / 2, all / 2..all];
    for half in halves {
        let sent = flood(gateway.address, half.map(hostile)).await;
        assert_eq!(sent as u64, all / 2);
        // Real ones go on meanwhile.
        flood(gateway.address, used(500)).await;
    }
    let document = learned(&gateway, all + 2_000).await;
    for path in ["/orders", "/orders/{id}/items", "/login", "/account/settings", "/cart.php"] {
        assert!(endpoint(&document, "GET", path).is_some(), "{path}");
    }
    let listed = document["endpoints"].as_array().unwrap().len();
    assert!(listed <= 16_384, "{listed}");
    // 16,384 nodes and rows of half a KiB and less, the blocks on their way, and what the allocator keeps.
    let grown = resident(&gateway).saturating_sub(before);
    println!(
        "{all} hostile paths: {listed} endpoints listed, {grown} KiB more than before, {} dropped",
        document["dropped"]
    );
    assert!(grown < 64 * 1024, "{grown} KiB");
    assert_eq!(get(gateway.admin, "/healthz").await.status, 200);
}
