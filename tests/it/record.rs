//! Recording traffic, and replaying it elsewhere.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};
use tests::{Gateway, Origin, Reply, folder, gateway::run, send, until};

use crate::yaml;

fn service(price: u64) -> impl Fn(&tests::origin::Received) -> Reply {
    move |request| {
        let body = json!({"path": request.line(), "price": price, "user": request.field("authorization")});
        Reply::new("200 OK", &[("content-type", "application/json"), ("set-cookie", "secret=1")], &body.to_string())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_recorded_is_asked_again_elsewhere_and_compared() {
    let legacy = Origin::start(service(10)).await;
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], "")).await;
    let folder = folder();
    let file = folder.path().join("traffic.jsonl");
    let (path, admin) = (file.to_str().unwrap().to_owned(), gateway.admin.to_string());
    let arguments =
        ["record", &path, "--admin", &admin, "--percent", "100%", "--requests", "3", "--for", "30s", "--query", "page"]
            .map(str::to_owned);
    let recording = tokio::spawn(async move { run(&arguments.each_ref().map(String::as_str)).await });
    until("somebody records", async || gateway.api("/api/status").await["recording"] == true).await;
    for (method, target, fields) in [
        ("GET", "/a?page=1", vec![("x-secret", "unheard-of"), ("accept", "application/json")]),
        ("POST", "/b", vec![]),
        ("GET", "/c", vec![("authorization", "Bearer t")]),
        ("GET", "/c", vec![("cookie", "session=1")]),
        ("GET", "/d?token=secret", vec![]),
        ("HEAD", "/e", vec![]),
        ("GET", "/f?page=2", vec![]),
    ] {
        assert_eq!(send(gateway.address, method, target, &fields, "").await.status, 200);
    }
    let (code, told, error) = recording.await.unwrap();
    assert_eq!((code, error.as_str()), (0, ""), "{told}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut targets: Vec<&str> = lines.iter().map(|line| line["target"].as_str().unwrap()).collect();
    // An exchange ends after its client has the answer: the next may end first.
    targets.sort_unstable();
    assert_eq!(targets, ["/a?page=1", "/e", "/f?page=2"]);
    assert!(!text.contains("unheard-of") && !text.contains("secret") && !text.contains("Bearer"), "{text}");

    // The same answers; others; a service that is not there.
    let (same, other) = (Origin::start(service(10)).await, Origin::start(service(11)).await);
    let (code, told, _) = run(&["replay", path_of(&file), "--to", &same.url()]).await;
    assert_eq!((code, same.count()), (0, 3), "{told}");
    assert_eq!(same.last().field("x-gateway-shadow"), "1");
    let (code, told, _) = run(&["replay", path_of(&file), "--to", &other.url()]).await;
    assert_eq!(code, 1);
    assert!(told.contains("3 answers compared, 2 differ") && told.contains("/price  2 times"), "{told}");
    let (code, _, _) = run(&["replay", path_of(&file), "--to", &other.url(), "--ignore", "/price"]).await;
    assert_eq!(code, 0);
    let (code, told, _) = run(&["replay", path_of(&file), "--to", "http://127.0.0.1:9", "--json"]).await;
    assert_eq!((code, serde_json::from_str::<Value>(&told).unwrap()["failed"].as_u64()), (1, Some(3)));

    // A file that says otherwise makes nobody write.
    std::fs::write(&file, text.replacen("\"GET\"", "\"DELETE\"", 1)).unwrap();
    let before = same.count();
    let (code, told, _) = run(&["replay", path_of(&file), "--to", &same.url()]).await;
    assert_eq!((code, same.count()), (0, before + 2), "{told}");
    std::fs::write(&file, "nonsense\n").unwrap();
    let (code, _, error) = run(&["replay", path_of(&file), "--to", &same.url()]).await;
    assert!(code == 1 && error.contains("traffic.jsonl:1:"), "{error}");
}

fn path_of(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}
