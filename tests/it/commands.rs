//! The commands that do not serve.

use tests::gateway::run;

const FILE: &str = "upstreams:
  legacy: {url: \"http://127.0.0.1:9000\"}
  orders: {url: \"http://127.0.0.1:9001\"}
routes:
  - name: orders
    match: {path: /api/orders/**, methods: [GET, POST]}
    upstream: orders
    stage: canary
    rewrite: {strip_prefix: /api, host: upstream}
    canary: {percent: 50%, by: [cookie:session], never: [{header: {x-plan: old}}]}
  - {name: old, match: /old/**, stage: gone}
  - {name: done, match: {path: /done, methods: [GET]}, upstream: orders, stage: retired}
";

fn file(folder: &tempfile::TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    path.to_string_lossy().into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_says_who_answers_and_why_the_others_lost() {
    let folder = tests::folder();
    let path = file(&folder, "routes.yaml", FILE);
    let explain = async |arguments: &[&str]| {
        let mut all = vec!["explain", "--config", &path, "--json"];
        all.extend(arguments);
        let (code, out, err) = run(&all).await;
        assert_eq!(code, 0, "{err}");
        serde_json::from_str::<serde_json::Value>(&out).unwrap()
    };
    let outcome = |told: &serde_json::Value, route: &str| {
        let tried = told["tried"].as_array().unwrap().iter().find(|tried| tried["route"] == route).unwrap();
        tried["outcome"].as_str().unwrap().to_owned()
    };
    let told = explain(&["GET", "http://shop.example.com//api/orders/1/?x=1", "-H", "cookie: session=7"]).await;
    assert_eq!((told["route"].as_str(), told["matched_path"].as_str()), (Some("orders"), Some("/api/orders/1")));
    let bucket = told["cohort"]["bucket"].as_u64().unwrap();
    let service = bucket < 5000;
    assert_eq!(told["arm"], if service { "service" } else { "legacy" });
    assert_eq!(told["upstream"], if service { "orders" } else { "legacy" });
    let never = explain(&["GET", "/api/orders/1", "-H", "x-plan: old"]).await;
    assert_eq!((never["arm"].as_str(), never["why"].as_str()), (Some("legacy"), Some("a predicate in `never` holds")));
    let fallen = explain(&["DELETE", "/api/orders/1"]).await;
    assert_eq!((fallen["route"].as_str(), fallen["upstream"].as_str()), (Some("unrouted"), Some("legacy")));
    assert_eq!(outcome(&fallen, "orders"), "method differs: takes GET, POST");
    assert_eq!(outcome(&fallen, "old"), "path differs");
    let star = explain(&["OPTIONS", "*"]).await;
    assert_eq!((star["upstream"].as_str(), star["route"].as_str()), (Some("legacy"), Some("unrouted")));
    assert_eq!(explain(&["GET", "/old/x"]).await["status"], 410);
    assert_eq!(explain(&["POST", "/done"]).await["status"], 405);
    assert_eq!(explain(&["GET", "/x%2fy"]).await["status"], 400);
    let (code, text, _) = run(&["explain", "--config", &path, "GET", "/api/orders/1", "-H", "cookie: session=7"]).await;
    assert_eq!(code, 0);
    assert!(text.contains(&format!("bucket {bucket} of group `orders`")), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_explained_is_what_happens() {
    let legacy = tests::Origin::named("legacy").await;
    let orders = tests::Origin::named("orders").await;
    let text = FILE.replace("http://127.0.0.1:9000", &legacy.url()).replace("http://127.0.0.1:9001", &orders.url());
    let gateway = tests::Gateway::start(&text).await;
    let path = gateway.file.to_string_lossy().into_owned();
    for session in 0..40 {
        let cookie = format!("session=s{session}");
        let field = format!("cookie: {cookie}");
        let (_, told, _) = run(&["explain", "--json", "--config", &path, "GET", "/api/orders/1", "-H", &field]).await;
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        let answer = tests::send(gateway.address, "GET", "/api/orders/1", &[("cookie", &cookie)], "").await;
        assert_eq!(told["upstream"], answer.field("x-served-by"));
    }
    assert!(legacy.count() > 0 && orders.count() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn diff_says_which_requests_go_elsewhere() {
    let folder = tests::folder();
    let old = file(&folder, "old.yaml", FILE);
    let diff = async |new: &str| {
        let new = file(&folder, "new.yaml", new);
        run(&["diff", &old, &new]).await
    };
    assert_eq!(diff(&format!("# a comment\n{FILE}")).await.0, 0);
    let (code, out, _) = diff(&FILE.replace("stage: canary", "stage: migrated")).await;
    assert_eq!(code, 1);
    assert!(
        out.contains("GET /api/orders/**: orders without /api for 50% of group `orders` by cookie:session")
            && out.contains("→ orders without /api"),
        "{out}"
    );
    assert!(!out.contains("/old"), "what stays is not told: {out}");
    let (code, out, _) = diff(&FILE.replace("  - {name: old, match: /old/**, stage: gone}\n", "")).await;
    assert_eq!(code, 1);
    assert!(out.contains("GET /old/**: 410 → legacy"), "{out}");
    let (code, out, _) = diff(&FILE.replace("methods: [GET, POST]", "methods: [GET]")).await;
    assert!(code == 1 && out.contains("POST /api/orders/**") && !out.contains("\nGET /api"), "{out}");
    let (code, out, _) = diff(&FILE.replace("127.0.0.1:9001", "127.0.0.1:9002")).await;
    assert!(code == 1 && out.contains("upstream `orders`: http://127.0.0.1:9001 → http://127.0.0.1:9002"), "{out}");
    assert_eq!(diff("nonsense: 1\n").await.0, 78);
    // What one rule takes away from another shows only where both meet.
    let base = "upstreams:\n  legacy: {url: \"http://a\"}\n  orders: {url: \"http://b\"}\n";
    let plain = format!("{base}routes:\n  - {{name: o, match: /orders/**, upstream: orders, stage: migrated}}\n");
    let param = plain.replace("/orders/**", "\"/{x}/b\"");
    let cased = plain.replace("/orders/**", "/Orders/**");
    let more = |text: &str, route: &str| format!("{text}  - {{name: n, {route}, stage: legacy}}\n");
    for (old, new, told) in [
        (
            &plain,
            more(&plain, "match: {path: /**, hosts: [shop.example.com]}"),
            "GET shop.example.com/orders/**: orders → legacy",
        ),
        (&param, more(&param, "match: /a/**"), "GET /a/b: orders → legacy"),
        (&plain, more(&plain, "match: {path: /orders/**, headers: {x-old: \"1\"}}"), "with x-old: 1: orders → legacy"),
        (&plain, format!("case_insensitive: true\n{plain}"), "paths that are spelled unusually"),
    ] {
        let (old, new) = (file(&folder, "a.yaml", old), file(&folder, "b.yaml", &new));
        let (code, out, err) = run(&["diff", &old, &new]).await;
        assert!(code == 1 && out.contains(told), "{told}: {out}{err}");
    }
    let folded = file(&folder, "b.yaml", &format!("case_insensitive: true\n{cased}"));
    let (_, out, _) = run(&["diff", &file(&folder, "a.yaml", &cased), &folded]).await;
    assert!(out.contains("GET /orders/**: legacy → orders"), "{out}");
    assert!(!out.contains("/Orders") && !out.contains("orders → legacy"), "what stays is not told: {out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exit_codes_are_what_they_say() {
    let folder = tests::folder();
    let good = file(&folder, "good.yaml", FILE);
    let bad = file(&folder, "bad.yaml", "routes: 1\n");
    assert_eq!(run(&["check", &good]).await.0, 0);
    for command in
        [&["check", &bad][..], &["run", &bad], &["explain", "GET", "/", "--config", &bad], &["check", "/no/such/file"]]
    {
        let (code, _, err) = run(command).await;
        assert!(code == 78 && err.contains("error:"), "{command:?}: {code} {err}");
    }
    let (code, out, _) = run(&["check", "--json", &bad]).await;
    let told: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, told["ok"].as_bool()), (78, Some(false)));
    assert_eq!(run(&["nonsense"]).await.0, 2);
    for command in ["run", "check", "schema", "explain", "diff", "demo"] {
        let (code, out, _) = run(&[command, "--help"]).await;
        assert!(code == 0 && out.contains("Example: gateway"), "{command}: {out}");
    }
    // A port that is taken is no fault of the file.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap();
    let busy = file(&folder, "busy.yaml", &format!("listen: {port}\n{FILE}"));
    let (code, _, err) = run(&["run", &busy]).await;
    assert!(code == 1 && err.contains(&format!("cannot listen on `{port}`")), "{code} {err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demo_shows_what_it_says() {
    let (code, out, err) = run(&["demo", "--once"]).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("100 flips took effect") && !out.contains('✗'), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stub_plays_its_part_with_its_defects() {
    use legacy_stub::{Defect, Options, Part};
    let play = async |part: Part, defects: &[(&str, Defect)]| {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let defect = defects.iter().map(|(name, defect)| ((*name).to_owned(), *defect)).collect();
        let options = Options { listen: address, play: part, defect, seed: 1, follow_stdin: false };
        tokio::spawn(async move { legacy_stub::serve(listener, &options).await });
        address
    };
    let monolith = play(Part::Monolith, &[]).await;
    let service = play(Part::Orders, &[]).await;
    let broken = play(Part::Orders, &[("orders", Defect::Number)]).await;
    let down = play(Part::Monolith, &[("users", Defect::Error)]).await;
    let get = |address, path| tests::get(address, path);
    let (truth, same, wrong) =
        (get(monolith, "/api/orders/3").await, get(service, "/orders/3").await, get(broken, "/orders/3").await);
    assert_eq!(truth.json(), same.json());
    assert_ne!(truth.json(), wrong.json());
    assert_eq!((truth.field("x-served-by"), same.field("x-served-by")), ("monolith", "orders"));
    assert_eq!(get(service, "/users/1").await.status, 404);
    assert_eq!((get(down, "/api/users/1").await.status, get(down, "/api/orders/1").await.status), (500, 200));
    let login = tests::send(monolith, "POST", "/login?user=7", &[], "").await;
    assert_eq!(login.field("location"), format!("http://{monolith}/account"));
    let cookie = login.field("set-cookie").split(';').next().unwrap().to_owned();
    assert!(tests::send(monolith, "GET", "/account", &[("cookie", &cookie)], "").await.text().contains("Hello"));
    assert_eq!(get(monolith, "/account").await.status, 302);
}
