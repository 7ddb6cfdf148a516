//! Rollouts on the real executable: forward on proof, back on proof or by hand, and what the journal keeps of it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tests::{Answer, Client, Gateway, Load, Origin, Reply, client::request, folder, gateway::run, get, send, until};

use crate::yaml;

/// Steps that go as fast as the evidence allows.
const QUICK: &str = "every: 0s, min_requests: 10, alpha: 50%, margin: {errors: 20%, client_errors: 20%, p99: 100%}";

fn file(legacy: &Origin, orders: &Origin, rollout: &str) -> String {
    let route = format!(
        "routes:\n  - name: orders\n    match: /orders/**\n    upstream: orders\n    stage: canary\n    canary: {{by: [header:x-user]}}\n    fallback: none\n    retry: none\n    rollout: {{{rollout}}}\n"
    );
    yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &route)
}

async fn rollout(gateway: &Gateway) -> Value {
    gateway.api("/api/routes/orders").await["rollout"].take()
}

async fn phase(gateway: &Gateway, wanted: &str) -> Value {
    let mut told = Value::Null;
    until(&format!("the rollout is {wanted}"), async || {
        told = rollout(gateway).await;
        told["phase"] == wanted
    })
    .await;
    told
}

async fn history(gateway: &Gateway) -> Vec<Value> {
    let mut told = gateway.api("/api/history?limit=10000").await["changes"].as_array().unwrap().clone();
    told.reverse();
    told
}

async fn wish(gateway: &Gateway, word: &str, body: &str) -> Answer {
    let host = gateway.admin.to_string();
    let fields = [("host", host.as_str()), ("x-gateway-admin", "1")];
    send(gateway.admin, "POST", &format!("/api/routes/orders/{word}"), &fields, body).await
}

/// Clients that never end, each request another user's; answers by who gave them, and those that failed.
struct Users {
    stop: Arc<AtomicBool>,
    failed: Arc<AtomicUsize>,
    all: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Users {
    fn start(gateway: &Gateway, clients: usize, pause: Duration) -> Self {
        let this = Self { stop: Arc::default(), failed: Arc::default(), all: Arc::default(), tasks: Vec::new() };
        let tasks = (0..clients).map(|client| {
            let (stop, failed, all, address) =
                (this.stop.clone(), this.failed.clone(), this.all.clone(), gateway.address);
            tokio::spawn(async move {
                let mut connection = Client::new(address);
                for n in 0.. {
                    if stop.load(SeqCst) {
                        return;
                    }
                    let user = format!("{client}-{n}");
                    let answer = connection.send(request("GET", "/orders/1", &[("x-user", &user)], "")).await;
                    all.fetch_add(1, SeqCst);
                    if answer.is_err() || answer.is_ok_and(|answer| answer.status >= 500) {
                        failed.fetch_add(1, SeqCst);
                    }
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                }
            })
        });
        let tasks = tasks.collect();
        Self { tasks, ..this }
    }

    async fn stop(self) -> (usize, usize) {
        self.stop.store(true, SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        (self.all.load(SeqCst), self.failed.load(SeqCst))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_service_is_taken_forward_step_by_step() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let gateway = Gateway::start(&file(&legacy, &orders, &format!("steps: [20%, 50%, 100%], {QUICK}"))).await;
    let users = Users::start(&gateway, 8, Duration::ZERO);
    let told = phase(&gateway, "complete").await;
    let (_, failed) = users.stop().await;
    assert_eq!((told["share"].as_str(), failed), (Some("100%"), 0));
    let changes = history(&gateway).await;
    let steps: Vec<(&str, &str, &str)> = changes
        .iter()
        .map(|change| ["action", "from", "to"].map(|name| change[name].as_str().unwrap_or("–")).into())
        .collect();
    let expected = [
        ("start", "–", "0%"),
        ("step", "0%", "20%"),
        ("step", "20%", "50%"),
        ("step", "50%", "100%"),
        ("complete", "100%", "100%"),
    ];
    assert_eq!(steps, expected);
    // Each with what was known, both arms over the same time.
    assert!(
        changes[2]["evidence"]["requests"][0].as_u64() > Some(100)
            && changes[2]["evidence"]["requests"][1].as_u64() > Some(100)
    );
    let (code, told, _) = run(&["status", "--admin", &gateway.admin.to_string()]).await;
    assert!(code == 0 && told.contains("the file says canary with rollout; running at 100%, complete"), "{told}");
    let (_, told, _) = run(&["history", "orders", "--limit", "1", "--admin", &gateway.admin.to_string()]).await;
    assert!(told.contains("orders  complete  100% → 100%  by gateway: the last step passed"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_canary_that_fails_every_request_is_taken_back_and_stays_back() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::start(|_| Reply::new("500 Internal Server Error", &[], "no")).await;
    let folder = folder();
    let path = folder.path().join("routes.yaml");
    let text =
        file(&legacy, &orders, "steps: [25%, 100%], every: 10m, min_requests: 500").replace("    fallback: none\n", "");
    std::fs::write(&path, Gateway::whole(&text)).unwrap();
    let gateway = Gateway::start_on(&path, &[]).await;
    let mut events = tokio::net::TcpStream::connect(gateway.admin).await.unwrap();
    let ask = format!("GET /api/events HTTP/1.1\r\nhost: {}\r\n\r\n", gateway.admin);
    tokio::io::AsyncWriteExt::write_all(&mut events, ask.as_bytes()).await.unwrap();
    // About 1,000 requests a second, each another user's.
    let begun = std::time::Instant::now();
    let users = Users::start(&gateway, 16, Duration::from_millis(16));
    let told = phase(&gateway, "rolled_back").await;
    let taken = begun.elapsed();
    let (all, failed) = users.stop().await;
    assert!(told["why"].as_str().unwrap().contains("failures 100% against 0%"), "{told}");
    let asked = orders.count();
    assert_eq!(failed, asked, "every failure that a client saw was one answer of the service");
    println!("back at 0 % {taken:?} after the first request: {all} requests, {failed} client-visible errors");
    for user in 0..100 {
        let answer = send(gateway.address, "GET", "/orders/1", &[("x-user", &user.to_string())], "").await;
        assert_eq!(answer.field("x-served-by"), "legacy");
    }
    let status = gateway.api("/api/routes/orders").await;
    assert!(
        status["overlay"]
            .as_str()
            .unwrap()
            .starts_with("the file says canary with rollout; running at 0%, rolled back"),
        "{status}"
    );
    let heard = tests::read_until(&mut events, "\"rollback\"").await;
    assert!(heard.contains("content-type: text/event-stream") && heard.contains("data: {"), "{heard}");
    // A restart does not forget it, and a reload of another route does not either.
    drop(events);
    drop(gateway);
    let gateway = Gateway::start_on(&path, &[]).await;
    for user in 0..100 {
        let answer = send(gateway.address, "GET", "/orders/1", &[("x-user", &user.to_string())], "").await;
        assert_eq!(answer.field("x-served-by"), "legacy");
    }
    assert_eq!(rollout(&gateway).await["phase"], "rolled_back");
    // An edit of the rollout starts afresh.
    let edited = file(&legacy, &orders, "steps: [30%, 100%], every: 10m, min_requests: 500");
    gateway.flip(&edited).await;
    until("it has begun again", async || rollout(&gateway).await["share"] == "30%").await;
    let actions: Vec<String> =
        history(&gateway).await.iter().map(|change| change["action"].as_str().unwrap().to_owned()).collect();
    assert_eq!(actions, ["start", "step", "rollback", "end", "start", "step"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_answers_404_to_everything_fails() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::start(|_| Reply::new("404 Not Found", &[], "no")).await;
    let gateway =
        Gateway::start(&file(&legacy, &orders, "steps: [50%], every: 10m, min_requests: 10, on_failure: freeze")).await;
    let users = Users::start(&gateway, 8, Duration::ZERO);
    let told = phase(&gateway, "frozen").await;
    users.stop().await;
    assert!(told["why"].as_str().unwrap().contains("4xx 100% against 0%"), "{told}");
    assert_eq!(told["share"], "50%", "frozen is not taken back");
    assert_eq!(wish(&gateway, "resume", "").await.status, 200);
    assert_eq!(rollout(&gateway).await["share"], "50%");
}

/// A cache of its own asks each arm once in a while, however many ask it: of a page that neither has, the service seemed to
/// have no fewer 404 than the monolith, with a tenth of the requests.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_cache_has_is_the_answer_of_its_arm() {
    let lost = || Reply::new("404 Not Found", &[("cache-control", "max-age=600")], "no");
    let (legacy, orders) = (Origin::start(move |_| lost()).await, Origin::start(move |_| lost()).await);
    let text = file(&legacy, &orders, "steps: [10%, 100%], min_requests: 100000")
        .replace("    retry: none\n", "    retry: none\n    cache: {}\n");
    let gateway = Gateway::start(&text).await;
    until("the first step", async || rollout(&gateway).await["share"] == "10%").await;
    let mut client = Client::new(gateway.address);
    for n in 0..1_000 {
        let user = n.to_string();
        let answer = client.send(request("GET", "/orders/1", &[("x-user", &user)], "")).await.unwrap();
        assert_eq!(answer.status, 404);
    }
    let mut evidence = Value::Null;
    until("all of them count", async || {
        evidence = rollout(&gateway).await["evidence"].take();
        evidence["counted"].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum::<u64>() == 1_000
    })
    .await;
    let asked = legacy.count() + orders.count();
    assert!(asked < 10, "{asked}");
    assert_eq!(evidence["client_errors"], json!([100.0, 100.0]), "{evidence}");
    let service = evidence["counted"][1].as_u64().unwrap();
    assert!((50..=160).contains(&service), "{evidence}");
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_neither_promotes_nor_aborts() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let gateway = Gateway::start(&file(&legacy, &orders, &format!("steps: [50%, 100%], {QUICK}"))).await;
    until("the first step is there", async || rollout(&gateway).await["share"] == "50%").await;
    for user in 0..40 {
        send(gateway.address, "GET", "/orders/1", &[("x-user", &user.to_string())], "").await;
    }
    // Several looks later it still holds, and says what it lacks.
    until("it was looked at", async || rollout(&gateway).await["evidence"]["requests"][1].as_u64() > Some(5)).await;
    let told = rollout(&gateway).await;
    assert_eq!((told["verdict"].as_str(), told["share"].as_str()), (Some("hold"), Some("50%")), "{told}");
    assert!(told["lacks"].to_string().contains("not shown"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn put_back_by_hand_under_load_loses_nothing_and_holds_whatever_is_edited() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let stage = |stage: &str| {
        let route =
            format!("routes:\n  - name: orders\n    match: /orders/**\n    upstream: orders\n    stage: {stage}\n");
        yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &route)
    };
    let folder = folder();
    let path = folder.path().join("routes.yaml");
    std::fs::write(&path, Gateway::whole(&stage("migrated"))).unwrap();
    let gateway = Gateway::start_on(&path, &[]).await;
    let load = Load::start(gateway.address, 8, "/orders/1").await;
    let by = async |gateway: &Gateway| get(gateway.address, "/orders/1").await.field("x-served-by").to_owned();
    for _ in 0..20 {
        assert_eq!(wish(&gateway, "rollback", r#"{"who": "ann", "why": "totals"}"#).await.status, 200);
        // Once it was said, nobody is the service's any more.
        assert_eq!(by(&gateway).await, "legacy");
        assert_eq!(wish(&gateway, "resume", r#"{"who": "ann", "why": "mended"}"#).await.status, 200);
        assert_eq!(by(&gateway).await, "orders");
    }
    let admin = gateway.admin.to_string();
    let (code, told, _) = run(&["rollback", "orders", "--why", "again", "--who", "bea", "--admin", &admin]).await;
    assert!(code == 0 && told.contains("orders  rollback  100% → 0%  by bea: again"), "{told}");
    load.grow(50).await;
    let counts = load.stop_without_failures().await;
    assert_eq!(legacy.count() + orders.count(), counts.good.load(SeqCst) + 40, "each request arrived exactly once");
    // Twice is once; edits change nothing; a restart neither.
    let again = wish(&gateway, "rollback", "").await;
    assert_eq!((again.status, again.json()["result"].as_str()), (200, Some("unchanged")));
    gateway.flip(&stage("canary\n    canary: {percent: 100%, by: [ip]}")).await;
    assert_eq!(by(&gateway).await, "legacy");
    gateway.flip(&stage("retired")).await;
    assert_eq!(by(&gateway).await, "legacy");
    let (code, told, _) = run(&["explain", "GET", "/orders/1", "--config", path.to_str().unwrap()]).await;
    assert!(code == 0 && told.contains("service"), "offline the file alone is known: {told}");
    drop(gateway);
    let gateway = Gateway::start_on(&path, &[]).await;
    assert_eq!(by(&gateway).await, "legacy");
    let status = gateway.api("/api/routes/orders").await;
    let overlay = status["overlay"].as_str().unwrap();
    assert!(
        overlay.contains("the file says retired; put back to the monolith") && overlay.contains("by bea: again"),
        "{overlay}"
    );
    assert_eq!(status["runs"], "legacy");
    let (code, told, _) =
        run(&["resume", "orders", "--config", path.to_str().unwrap(), "--admin", &gateway.admin.to_string()]).await;
    assert_eq!(code, 0, "{told}");
    assert_eq!(by(&gateway).await, "orders");
    // Retired: the monolith may not have it any more.
    let refused = wish(&gateway, "rollback", "").await;
    assert!(refused.status == 409 && refused.text().contains("--force"), "{}", refused.text());
    assert_eq!(by(&gateway).await, "orders");
    assert_eq!(wish(&gateway, "rollback", r#"{"force": true}"#).await.status, 200);
    assert_eq!(by(&gateway).await, "legacy");
    let changes = history(&gateway).await;
    assert_eq!(changes.len(), 43);
    assert_eq!((&changes[0]["who"], &changes[0]["why"]), (&json!("ann"), &json!("totals")));
}

#[tokio::test(flavor = "multi_thread")]
async fn wishes_that_make_no_sense_are_refused_and_say_what_to_do() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let route = "routes:\n  - {name: orders, match: /orders/**, upstream: orders, stage: shadow}\n  - {name: /a b, match: /a, upstream: orders, stage: migrated}\n";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], route)).await;
    for (word, body, status, text) in [
        ("rollback", "", 409, "its stage is shadow"),
        ("resume", "", 409, "runs as the file says"),
        ("promote", "", 409, "has no rollout"),
        ("rollback", "{", 400, "send {"),
        ("rollback", r#"{"whom": "x"}"#, 400, "unknown field"),
    ] {
        let answer = wish(&gateway, word, body).await;
        assert!(answer.status == status && answer.text().contains(text), "{word} {body}: {}", answer.text());
    }
    let host = gateway.admin.to_string();
    let fields = [("host", host.as_str()), ("x-gateway-admin", "1")];
    assert_eq!(send(gateway.admin, "POST", "/api/routes/none/rollback", &fields, "").await.status, 404);
    assert_eq!(send(gateway.admin, "GET", "/api/routes/orders/rollback", &fields, "").await.status, 405);
    assert_eq!(send(gateway.admin, "POST", "/api/routes/orders/rollback", &fields[..1], "").await.status, 403);
    assert_eq!(get(gateway.admin, "/api/shadow/unrouted").await.status, 404);
    // A name that is a path.
    assert_eq!(send(gateway.admin, "POST", "/api/routes/%2Fa%20b/rollback", &fields, "").await.status, 200);
    assert_eq!(get(gateway.address, "/a").await.field("x-served-by"), "legacy");
    // A file that is half edited: the command finds the gateway all the same.
    let admin = gateway.admin;
    let text = format!("admin: {{listen: \"{admin}\"}}\nupstreams: {{}}\nroutes: [{{nonsense: 1}}]\n");
    let folder = folder();
    let broken = folder.path().join("routes.yaml");
    std::fs::write(&broken, text).unwrap();
    let (code, told, error) = run(&["resume", "/a b", "--config", broken.to_str().unwrap()]).await;
    assert_eq!(code, 0, "{told}{error}");
    let (code, _, error) = run(&["status", "--admin", "127.0.0.1:9"]).await;
    assert!(code == 1 && error.contains("does not answer"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gates_hold_a_step_and_webhooks_are_told_until_they_listen() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let (open, deaf) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (gate, listening) = (open.clone(), deaf.clone());
    let hook = Origin::start(move |request| {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let good = match body["type"].as_str() {
            Some("rollout.gate") => gate.load(SeqCst),
            // The first message is lost, and comes again.
            _ => listening.fetch_add(1, SeqCst) > 0,
        };
        Reply::new(if good { "204 No Content" } else { "503 Service Unavailable" }, &[], "")
    })
    .await;
    let rollout_text = format!(
        "steps: [20%, 60%], {QUICK}, gates: {{manual: [60%], webhook: {{url: \"{}/gate\", secret: key}}}}",
        hook.url()
    );
    let text = file(&legacy, &orders, &rollout_text);
    let text =
        format!("webhooks: [{{url: \"{}/told\", secret: whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw}}]\n{text}", hook.url());
    let gateway = Gateway::start(&text).await;
    let asked = |path: &str| {
        let path = path.to_owned();
        hook.received().into_iter().filter(move |request| request.line().contains(&path)).collect::<Vec<_>>()
    };
    until("the gate was asked", async || !asked("/gate").is_empty()).await;
    until("it holds", async || rollout(&gateway).await["gates"].to_string().contains("status 503")).await;
    assert_eq!(rollout(&gateway).await["share"], "0%");
    let question: Value = serde_json::from_slice(&asked("/gate")[0].body).unwrap();
    assert_eq!((&question["data"]["route"], &question["data"]["to"]), (&json!("orders"), &json!("20%")));
    assert!(asked("/gate")[0].field("webhook-signature").starts_with("v1,"));
    // A person may go ahead of a gate.
    assert_eq!(wish(&gateway, "promote", r#"{"who": "ann"}"#).await.status, 200);
    open.store(true, SeqCst);
    let users = Users::start(&gateway, 8, Duration::ZERO);
    until("it waits for a person", async || rollout(&gateway).await["gates"].to_string().contains("a person")).await;
    assert_eq!(rollout(&gateway).await["share"], "20%");
    // Who has seen another share wants another step.
    let late = wish(&gateway, "promote", r#"{"from": "10%"}"#).await;
    assert!(late.status == 409 && late.text().contains("is at 20% by now"), "{}", late.text());
    let (code, told, _) = run(&["promote", "orders", "--admin", &gateway.admin.to_string(), "--who", "bea"]).await;
    assert!(code == 0 && told.contains("promote  20% → 60%  by bea"), "{told}");
    phase(&gateway, "complete").await;
    users.stop().await;
    // Each change was told, the first of them twice, under the same id.
    let count = history(&gateway).await.len();
    until("all was told", async || asked("/told").len() > count).await;
    let mut ids: HashMap<String, usize> = HashMap::new();
    for told in asked("/told") {
        *ids.entry(told.field("webhook-id")).or_default() += 1;
        assert_eq!(told.field("content-type"), "application/json");
        assert!(told.field("webhook-signature").starts_with("v1,") && !told.field("webhook-timestamp").is_empty());
    }
    assert_eq!((ids.len(), ids.values().filter(|count| **count == 2).count()), (count, 1), "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_journal_nothing_advances_and_a_rollback_works_all_the_same() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let text = file(&legacy, &orders, &format!("steps: [50%], {QUICK}"));
    let text =
        format!("{text}  - {{name: other, match: /other, upstream: orders, stage: migrated}}\nstate: /proc/nowhere\n");
    let gateway = Gateway::start(&text).await;
    gateway.log_line("the journal cannot be written").await;
    let users = Users::start(&gateway, 4, Duration::ZERO);
    until("requests were served", async || users.all.load(SeqCst) > 300).await;
    let (_, failed) = users.stop().await;
    assert_eq!((orders.count(), failed), (0, 0), "what was not journaled is not served");
    let status = gateway.api("/api/status").await;
    assert!(status["state"]["error"].as_str().unwrap().contains("/proc/nowhere"), "{}", status["state"]);
    let host = gateway.admin.to_string();
    let fields = [("host", host.as_str()), ("x-gateway-admin", "1")];
    let done = send(gateway.admin, "POST", "/api/routes/other/rollback", &fields, "").await;
    assert!(
        done.status == 200 && done.json()["warning"].as_str().unwrap().contains("will not outlive"),
        "{}",
        done.text()
    );
    assert_eq!(get(gateway.address, "/other").await.field("x-served-by"), "legacy");
}

/// What took effect while the disk was full is written down once it is not: a restart after that does not undo it.
#[tokio::test(flavor = "multi_thread")]
async fn what_could_not_be_journaled_is_once_it_can() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let route = "routes:\n  - {name: orders, match: /orders/**, upstream: orders, stage: migrated}\n";
    let folder = folder();
    let path = folder.path().join("routes.yaml");
    std::fs::write(&path, Gateway::whole(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], route))).unwrap();
    let gateway = Gateway::start_on(&path, &[]).await;
    // A folder is where the file should be: `state/` itself is there, since the inventory makes it before anybody is served.
    let journal = folder.path().join("state/journal.redb");
    std::fs::create_dir_all(&journal).unwrap();
    // A rollout that tries to begin all the time does not keep the journal from being tried again.
    let ramp = "  - {name: ramp, match: /ramp, upstream: orders, stage: canary, canary: {by: [header:x-user]}, rollout: {steps: [50%]}}\n";
    let both = format!("{route}{ramp}");
    gateway.flip(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &both)).await;
    gateway.log_line("the journal cannot be written").await;
    let done = wish(&gateway, "rollback", r#"{"who": "ann"}"#).await;
    assert!(done.json()["warning"].as_str().unwrap().contains("will not outlive"), "{}", done.text());
    assert_eq!(get(gateway.address, "/orders/1").await.field("x-served-by"), "legacy");
    std::fs::remove_dir(&journal).unwrap();
    until("it is written down", async || history(&gateway).await.iter().any(|change| change["who"] == "ann")).await;
    until("the rollout begins", async || gateway.api("/api/routes/ramp").await["share"] == "50%").await;
    assert!(gateway.api("/api/status").await["state"]["error"].is_null());
    drop(gateway);
    let gateway = Gateway::start_on(&path, &[]).await;
    assert_eq!(get(gateway.address, "/orders/1").await.field("x-served-by"), "legacy");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_belongs_to_one_gateway_and_is_handed_over() {
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let folder = folder();
    let path = folder.path().join("routes.yaml");
    std::fs::write(&path, Gateway::whole(&file(&legacy, &orders, "steps: [50%]"))).unwrap();
    let mut gateway = Gateway::start_on(&path, &[]).await;
    until("it has begun", async || rollout(&gateway).await["share"] == "50%").await;
    let (code, _, error) = run(&["run", path.to_str().unwrap()]).await;
    assert!(code == 1 && error.contains("belongs to another running gateway"), "{code} {error}");
    // The old one drains while the new one starts: it has let go of the journal.
    let slow = tokio::net::TcpStream::connect(gateway.address).await.unwrap();
    gateway.signal("TERM");
    let next = Gateway::start_on(&path, &[]).await;
    assert_eq!(rollout(&next).await["share"], "50%");
    drop(slow);
    gateway.end().await;
}

/// Kills the gateway at random moments of a rollout that people push on and put back. `REQUESTS` says how often.
#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_the_journal_is_what_runs() {
    let rounds: usize = std::env::var("REQUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let (legacy, orders) = (Origin::named("legacy").await, Origin::named("orders").await);
    let folder = folder();
    let path = folder.path().join("routes.yaml");
    let steps: Vec<String> = (1..=20).map(|n| format!("{}%", n * 5)).collect();
    std::fs::write(&path, Gateway::whole(&file(&legacy, &orders, &format!("steps: [{}]", steps.join(", "))))).unwrap();
    let mut seed = 42_u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    // Whether somebody was told that it is put back, or that it is not any more; nothing while that is under way.
    let mut back = Some(false);
    let (mut seen, mut wishes) = (0, 0);
    for round in 0..rounds {
        let gateway = Gateway::start_on(&path, &["--workers", "1"]).await;
        let held = !gateway.api("/api/routes/orders").await["held"].is_null();
        assert!(back.is_none_or(|back| back == held), "round {round}: acknowledged {back:?}, runs {held}");
        back = Some(held);
        let told = rollout(&gateway).await;
        let share = |text: &Value| text.as_str().unwrap_or("0%").trim_end_matches('%').parse::<u64>().unwrap();
        let changes = history(&gateway).await;
        // Where each change begins the one before it has ended: no step is repeated, none is left out.
        for pair in changes.windows(2) {
            let (before, after) = (&pair[0], &pair[1]);
            let moved = |change: &Value| (share(&change["from"]), share(&change["to"]));
            let ((_, to), (from, next)) = (moved(before), moved(after));
            assert!(to == from, "{before} {after}");
            assert!(after["action"] != "promote" && after["action"] != "step" || next == from + 5, "{after}");
        }
        // What runs is what was journaled last, or what the start of this very process made of it.
        let last = changes.last().map_or(0, |change| share(&change["to"]));
        assert!(held || share(&told["share"]) == last || share(&told["share"]) == last + 5, "{told} {changes:?}");
        // By number: the journal keeps only so many.
        let number = |change: &Value| change["id"].as_u64().unwrap();
        let before = changes.last().map_or(0, number);
        // Requests of users all over the cohort, while somebody pushes it on and puts it back.
        let users = {
            let (address, stop) = (gateway.address, Arc::new(AtomicBool::new(false)));
            let stopped = stop.clone();
            let task = tokio::spawn(async move {
                let mut most = None;
                let mut client = Client::new(address);
                for n in 0_u64.. {
                    if stopped.load(SeqCst) {
                        break;
                    }
                    let user = format!("user-{}", n % 500);
                    match client.send(request("GET", "/orders/1", &[("x-user", &user)], "")).await {
                        Ok(answer) if answer.field("x-served-by") == "orders" => most = most.max(Some(user)),
                        Ok(_) => {}
                        Err(_) => break,
                    }
                }
                most
            });
            (task, stop)
        };
        let pause = Duration::from_millis(random(40));
        let acts = tokio::time::timeout(pause, async {
            loop {
                let word = match (random(8), back) {
                    (0, Some(false)) => "rollback",
                    (0..4, Some(true) | None) => "resume",
                    _ => "promote",
                };
                if word != "promote" {
                    back = None;
                }
                let answer = wish(&gateway, word, "").await;
                wishes += 1;
                match (word, answer.status) {
                    ("rollback", 200) => back = Some(true),
                    ("resume", 200 | 409) => back = Some(false),
                    _ => {}
                }
            }
        });
        let _ = acts.await;
        gateway.signal("KILL");
        let mut gateway = gateway;
        gateway.end().await;
        users.1.store(true, SeqCst);
        let served = users.0.await.unwrap();
        seen += usize::from(served.is_some());
        drop(gateway);
        // No user was the service's at a share that is not in the journal: all shares since are known from the next start's history.
        if let Some(user) = served {
            let gateway = Gateway::start_on(&path, &["--workers", "1"]).await;
            let host = gateway.admin.to_string();
            let ask = json!({"method": "GET", "url": "/orders/1", "headers": {"x-user": user}}).to_string();
            let fields = [("host", host.as_str()), ("x-gateway-admin", "1")];
            let told = send(gateway.admin, "POST", "/api/explain", &fields, &ask).await.json();
            let changes = history(&gateway).await;
            let since = changes.iter().filter(|change| number(change) >= before);
            let most = since.map(|change| share(&change["to"])).max().unwrap_or(0);
            if let Some(bucket) = told["cohort"]["bucket"].as_u64() {
                assert!(bucket < most * 100, "{user} with bucket {bucket} was served at {most}%");
            }
            back = Some(!gateway.api("/api/routes/orders").await["held"].is_null())
                .filter(|held| back.is_none_or(|back| back == *held))
                .or_else(|| panic!("a rollback was lost"));
        }
    }
    println!("{rounds} kills, {wishes} wishes granted or refused, the service had requests in {seen} rounds");
}
