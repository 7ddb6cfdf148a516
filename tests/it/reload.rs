//! Saving the file: live or refused, never in between, whatever writes it.

use std::{os::unix::fs::symlink, sync::atomic::Ordering::SeqCst};

use tests::{Gateway, Load, Origin, folder, get, send, until};

use crate::yaml;

fn routed(legacy: &Origin, orders: &Origin, stage: &str) -> String {
    let route = format!("routes:\n  - name: orders\n    match: /orders/**\n    upstream: orders\n    stage: {stage}\n");
    yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &route)
}

async fn served_by(gateway: &Gateway) -> String {
    send(gateway.address, "GET", "/orders/1", &[], "").await.field("x-served-by").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_file_changes_nothing_and_is_told_everywhere() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let good = routed(&legacy, &orders, "migrated");
    let gateway = Gateway::start(&good).await;
    let load = Load::start(gateway.address, 4, "/orders/1").await;
    for (bad, told) in [
        ("", "no upstream called `legacy`"),
        ("routes: [", "not valid YAML"),
        ("upstreams:\n  legacy:\n", "expected a map of keys"),
        (&good.replace("stage: migrated", "stage: migratd"), "did you mean `migrated`?"),
        (&good.replace("upstream: orders", "upstream: order"), "did you mean `orders`?"),
    ] {
        let error = gateway.refuse(bad).await;
        assert!(error.contains(told), "{error}");
        assert_eq!(served_by(&gateway).await, "orders");
        gateway.save(&good);
        until("the old text is good again", async || gateway.config().await["current"] == true).await;
    }
    gateway.log_line("the file was refused").await;
    // A file that changes while it is being read is read once more.
    assert!(gateway.metric("gateway_config_reloads_total{result=\"refused\"}").await >= Some(5.0));
    assert_eq!(gateway.generation().await, 1, "the same text is no new generation");
    load.stop_without_failures().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_written_slowly_is_taken_whole() {
    use std::io::Write as _;
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let gateway = Gateway::start(&routed(&legacy, &orders, "legacy")).await;
    let load = Load::start(gateway.address, 4, "/orders/1").await;
    // Truncated, then byte by byte: what is half written is not good, or is never looked at.
    let text = Gateway::whole(&routed(&legacy, &orders, "migrated"));
    let mut file = std::fs::File::create(&gateway.file).unwrap();
    for byte in text.as_bytes() {
        file.write_all(&[*byte]).unwrap();
        file.flush().unwrap();
        tokio::task::yield_now().await;
    }
    drop(file);
    until("the new file runs", async || served_by(&gateway).await == "orders").await;
    load.stop_without_failures().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configmap_swaps_its_link() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let folder = folder();
    let version = |name: &str, stage: &str| {
        let data = folder.path().join(name);
        std::fs::create_dir(&data).unwrap();
        std::fs::write(data.join("routes.yaml"), Gateway::whole(&routed(&legacy, &orders, stage))).unwrap();
    };
    version("..1", "legacy");
    symlink("..1", folder.path().join("..data")).unwrap();
    symlink("..data/routes.yaml", folder.path().join("routes.yaml")).unwrap();
    let gateway = Gateway::start_on(&folder.path().join("routes.yaml"), &[]).await;
    let load = Load::start(gateway.address, 4, "/orders/1").await;
    for (n, (stage, by)) in
        [("migrated", "orders"), ("legacy", "legacy"), ("migrated", "orders")].into_iter().enumerate()
    {
        let name = format!("..{}", n + 2);
        version(&name, stage);
        symlink(&name, folder.path().join("..data_tmp")).unwrap();
        std::fs::rename(folder.path().join("..data_tmp"), folder.path().join("..data")).unwrap();
        until("the new link is followed", async || served_by(&gateway).await == by).await;
        std::fs::remove_dir_all(folder.path().join(format!("..{}", n + 1))).unwrap();
    }
    load.stop_without_failures().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn included_files_are_part_of_the_same_all_or_nothing() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let folder = folder();
    let main = folder.path().join("routes.yaml");
    let text = format!("{}include: [routes.d/*.yaml]\n", Gateway::whole(&yaml(&[("legacy", legacy.url())], "")));
    std::fs::write(&main, text).unwrap();
    std::fs::create_dir(folder.path().join("routes.d")).unwrap();
    let gateway = Gateway::start_on(&main, &[]).await;
    assert_eq!(served_by(&gateway).await, "legacy");
    let included = folder.path().join("routes.d/orders.yaml");
    std::fs::write(
        &included,
        routed(&legacy, &orders, "migrated").replace(&format!("  legacy: {{url: \"{}\"}}\n", legacy.url()), ""),
    )
    .unwrap();
    until("the included route runs", async || served_by(&gateway).await == "orders").await;
    std::fs::write(&included, "listen: 127.0.0.1:1\n").unwrap();
    until("the included file is refused", async || gateway.config().await["current"] == false).await;
    let error = gateway.config().await["error"].as_str().unwrap().to_owned();
    assert!(error.contains("orders.yaml:1:1") && error.contains("unknown key: `listen`"), "{error}");
    assert_eq!(served_by(&gateway).await, "orders");
    std::fs::remove_file(&included).unwrap();
    until("the removed file is forgotten", async || served_by(&gateway).await == "legacy").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_and_a_call_read_the_file_too() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let gateway = Gateway::start(&routed(&legacy, &orders, "legacy")).await;
    std::fs::write(&gateway.file, "nonsense: 1\n").unwrap();
    gateway.signal("HUP");
    gateway.log_line("refused (SIGHUP)").await;
    let host = gateway.admin.to_string();
    let fields = [("host", host.as_str()), ("x-gateway-admin", "1")];
    let refused = send(gateway.admin, "POST", "/api/reload", &fields, "").await;
    assert_eq!(refused.status, 422);
    assert!(refused.text().contains("unknown key: `nonsense`"), "{}", refused.text());
    std::fs::write(&gateway.file, Gateway::whole(&routed(&legacy, &orders, "migrated"))).unwrap();
    let loaded = send(gateway.admin, "POST", "/api/reload", &fields, "").await;
    assert_eq!(loaded.status, 200, "{}", loaded.text());
    until("it runs", async || served_by(&gateway).await == "orders").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_listener_is_bound_before_the_old_one_closes() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let text = routed(&legacy, &orders, "migrated");
    let gateway = Gateway::start(&text).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = |address: std::net::SocketAddr| {
        format!("listen: {address}\n{}", Gateway::whole(&text).replacen("listen: 127.0.0.1:0\n", "", 1))
    };
    let error = gateway.refuse(&to(taken.local_addr().unwrap())).await;
    assert!(error.contains("cannot listen on"), "{error}");
    assert_eq!(served_by(&gateway).await, "orders", "the old listener goes on");
    let free = taken.local_addr().unwrap();
    drop(taken);
    let load = Load::start(gateway.address, 4, "/orders/1").await;
    // The text is what was refused before: only the port is free now.
    gateway.signal("HUP");
    until("the new listener answers", async || std::net::TcpStream::connect(free).is_ok()).await;
    assert_eq!(send(free, "GET", "/orders/1", &[], "").await.field("x-served-by"), "orders");
    until("the old listener is closed", async || std::net::TcpStream::connect(gateway.address).is_err()).await;
    // Connections that were there go on.
    load.grow(100).await;
    load.stop_without_failures().await;
    assert_eq!(get(gateway.admin, "/api/status").await.json()["listen"], free.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn untouched_upstreams_keep_their_connections_and_routes_their_counts() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let gateway = Gateway::start(&routed(&legacy, &orders, "migrated")).await;
    let mut client = tests::Client::new(gateway.address);
    let mut ask = async || client.send(tests::client::request("GET", "/orders/1", &[], "")).await.unwrap();
    ask().await;
    let before = orders.connections.load(SeqCst);
    for n in 0..10 {
        gateway.flip(&format!("{}# {n}\n", routed(&legacy, &orders, "migrated"))).await;
        ask().await;
    }
    assert_eq!(orders.connections.load(SeqCst), before, "one connection served all generations");
    let counted = "gateway_requests_total{route=\"orders\",arm=\"service\",status=\"2xx\"}";
    until("all are counted", async || gateway.metric(counted).await == Some(11.0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_routes_reload_under_load() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let many = |stage: &str| {
        let mut text = routed(&legacy, &orders, stage);
        for n in 0..10_000 {
            text.push_str(&format!("  - {{match: /r{n}/**, upstream: orders, stage: migrated}}\n"));
        }
        text
    };
    let gateway = Gateway::start(&routed(&legacy, &orders, "legacy")).await;
    let load = Load::start(gateway.address, 4, "/orders/1").await;
    for stage in ["migrated", "legacy", "migrated"] {
        gateway.flip(&many(stage)).await;
        load.grow(20).await;
    }
    assert_eq!(send(gateway.address, "GET", "/r9999/x", &[], "").await.field("x-served-by"), "orders");
    load.stop_without_failures().await;
}
