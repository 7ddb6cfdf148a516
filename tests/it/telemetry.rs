//! What the gateway tells about itself: traces to a collector, the access log, metrics for a real Prometheus.

use std::{process::Stdio, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::any_value::Value as Any,
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message as _;
use serde_json::Value;
use tests::{Gateway, Origin, Reply, gateway::run, get, send, until};

use crate::yaml;

/// A collector of traces; what it was sent.
struct Collector(Origin);

impl Collector {
    async fn start() -> Self {
        Self(Origin::start(|_| Reply::new("200 OK", &[("content-type", "application/x-protobuf")], "")).await)
    }

    fn spans(&self) -> Vec<Span> {
        let calls = self.0.received();
        let read = |body: &[u8]| ExportTraceServiceRequest::decode(body).unwrap();
        let spans = calls.iter().flat_map(|call| read(&call.body).resource_spans).flat_map(|of| of.scope_spans);
        spans.flat_map(|scope| scope.spans).collect()
    }

    async fn wait(&self, count: usize) -> Vec<Span> {
        until(&format!("there are {count} spans"), async || self.spans().len() >= count).await;
        self.spans()
    }
}

fn text(span: &Span, key: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    match found.and_then(|attribute| attribute.value.as_ref()?.value.clone()) {
        Some(Any::StringValue(text)) => text,
        Some(Any::IntValue(number)) => number.to_string(),
        Some(Any::BoolValue(value)) => value.to_string(),
        _ => String::new(),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[tokio::test(flavor = "multi_thread")]
async fn a_traced_request_is_a_span_and_each_try_another() {
    let collector = Collector::start().await;
    let legacy = Origin::named("legacy").await;
    let orders = Origin::start(|request| match request.line() {
        line if line.contains("/bad") => Reply::new("503 Service Unavailable", &[], ""),
        _ => Reply::ok("fine"),
    })
    .await;
    let routes = format!(
        "tracing: {{otlp: \"{}\", sample: 100%, service: edge, headers: {{x-tenant: shop}}}}\nroutes:\n  - {{name: orders, match: \"/orders/{{id}}\", upstream: orders, stage: migrated, retry: {{retries: 1, when: [503]}}, fallback: {{when: [unavailable, 5xx]}}}}\n",
        collector.0.url()
    );
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], &routes)).await;
    let answer = send(
        gateway.address,
        "GET",
        "/orders/bad?secret=1",
        &[("traceparent", PARENT), ("tracestate", "vendor=1")],
        "",
    )
    .await;
    // Two tries at the service, and the monolith in its place.
    assert_eq!((answer.status, answer.field("x-served-by"), orders.count()), (200, "legacy", 2));
    let spans = collector.wait(4).await;
    let server = spans.iter().find(|span| span.kind == SpanKind::Server as i32).unwrap();
    assert_eq!((server.name.as_str(), hex(&server.trace_id)), ("GET /orders/{id}", PARENT[3..35].to_owned()));
    assert_eq!(hex(&server.parent_span_id), PARENT[36..52]);
    for (key, value) in [
        ("http.route", "/orders/{id}"),
        ("http.response.status_code", "200"),
        ("url.path", "/orders/bad"),
        ("gateway.route", "orders"),
        ("gateway.arm", "legacy"),
        ("gateway.fallback", "5xx"),
        ("client.address", "127.0.0.1"),
    ] {
        assert_eq!(text(server, key), value, "{key}");
    }
    assert!(!format!("{spans:?}").contains("secret"), "no query is told");
    let tries: Vec<&Span> = spans.iter().filter(|span| span.kind == SpanKind::Client as i32).collect();
    let told: Vec<(String, String)> =
        tries.iter().map(|span| (text(span, "gateway.upstream"), text(span, "http.response.status_code"))).collect();
    let is = |upstream: &str, status: &str| (upstream.to_owned(), status.to_owned());
    assert_eq!(told, [is("orders", "503"), is("orders", "503"), is("legacy", "200")]);
    // Each upstream is told the span of its own try.
    let mut given: Vec<String> = orders.received().iter().map(|request| request.field("traceparent")).collect();
    given.push(legacy.received()[0].field("traceparent"));
    for (span, given) in tries.iter().zip(&given) {
        assert_eq!(given, &format!("00-{}-{}-01", hex(&server.trace_id), hex(&span.span_id)));
        assert_eq!((&span.parent_span_id, &span.trace_id), (&server.span_id, &server.trace_id));
        assert!(
            span.start_time_unix_nano >= server.start_time_unix_nano
                && span.end_time_unix_nano <= server.end_time_unix_nano
        );
    }
    assert_eq!(tries[0].status.as_ref().unwrap().code, StatusCode::Error as i32);
    assert_eq!(text(tries[1], "http.request.resend_count"), "1");
    assert_eq!(legacy.received()[0].field("tracestate"), "vendor=1");
    let call = &collector.0.received()[0];
    assert_eq!((call.line(), call.field("x-tenant").as_str()), ("POST /v1/traces HTTP/1.1", "shop"));
    let resource = ExportTraceServiceRequest::decode(&*call.body).unwrap().resource_spans[0].resource.clone().unwrap();
    assert!(format!("{resource:?}").contains("StringValue(\"edge\")"), "{resource:?}");
    // The log has the trace's id.
    let line = gateway.access_line(|line| line["path"] == "/orders/bad").await;
    assert_eq!(line["trace_id"], PARENT[3..35]);
    until("they are counted", async || {
        gateway.metric("gateway_trace_spans_total{result=\"exported\"}").await == Some(4.0)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_traced_is_drawn_and_strangers_cannot_say() {
    let collector = Collector::start().await;
    let legacy = Origin::named("legacy").await;
    let file = |tracing: &str, more: &str| format!("{more}{}", yaml(&[("legacy", legacy.url())], tracing));
    let never = format!("tracing: {{otlp: \"{}\", sample: 0%}}\n", collector.0.url());
    let gateway = Gateway::start(&file(&never, "")).await;
    let given = |n: usize| legacy.received()[n].field("traceparent");
    send(gateway.address, "GET", "/0", &[("traceparent", PARENT)], "").await;
    assert!(
        given(0).starts_with(&PARENT[..36]) && given(0).ends_with("-00") && given(0)[36..52] != PARENT[36..52],
        "{}",
        given(0)
    );
    // Two of them, or nonsense, are no context: a new trace begins, and what vendors added goes.
    let both = [("traceparent", PARENT), ("traceparent", PARENT), ("tracestate", "vendor=1")];
    send(gateway.address, "GET", "/1", &both, "").await;
    send(gateway.address, "GET", "/2", &[("traceparent", "00-nonsense"), ("tracestate", "vendor=1")], "").await;
    for n in [1, 2] {
        assert!(given(n).len() == 55 && given(n)[3..35] != PARENT[3..35], "{}", given(n));
        assert_eq!(legacy.received()[n].fields("tracestate").len(), 0);
    }
    // A trusted proxy says who is traced.
    gateway.flip(&file(&never, "trusted_proxies: [127.0.0.0/8]\n")).await;
    send(gateway.address, "GET", "/3", &[("traceparent", PARENT)], "").await;
    assert!(given(3).ends_with("-01"), "{}", given(3));
    let spans = collector.wait(2).await;
    assert_eq!((spans.len(), hex(&spans[0].trace_id)), (2, PARENT[3..35].to_owned()));
    // Without `tracing:` it passes as it is.
    gateway.flip(&file("", "")).await;
    send(gateway.address, "GET", "/4", &[("traceparent", PARENT), ("tracestate", "vendor=1")], "").await;
    assert_eq!((given(4).as_str(), legacy.received()[4].field("tracestate").as_str()), (PARENT, "vendor=1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_answer_costs_spans_and_nothing_else() {
    let legacy = Origin::named("legacy").await;
    let gateway =
        Gateway::start(&yaml(&[("legacy", legacy.url())], "tracing: {otlp: \"http://127.0.0.1:9\", sample: 100%}\n"))
            .await;
    for n in 0..50 {
        assert_eq!(get(gateway.address, &format!("/{n}")).await.status, 200);
    }
    until("they are counted as lost", async || {
        gateway.metric("gateway_trace_spans_total{result=\"failed\"}").await >= Some(100.0)
    })
    .await;
    assert_eq!(gateway.log().matches("the collector does not take spans").count(), 1, "{}", gateway.log());
}

fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_goes_to_a_file_that_may_be_rotated() {
    let legacy = Origin::named("legacy").await;
    let folder = tests::folder();
    let file = folder.path().join("routes.yaml");
    let whole = |log: &str| Gateway::whole(&format!("access_log: {log}\n{}", yaml(&[("legacy", legacy.url())], "")));
    std::fs::write(&file, whole("access.log")).unwrap();
    let mut gateway = Gateway::start_on(&file, &[]).await;
    let log = folder.path().join("access.log");
    get(gateway.address, "/1").await;
    until("the line is there", async || lines(&log).len() == 1).await;
    // As logrotate does it.
    let old = folder.path().join("access.log.1");
    std::fs::rename(&log, &old).unwrap();
    get(gateway.address, "/2").await;
    until("the line is in the old file still", async || lines(&old).len() == 2).await;
    gateway.signal("USR1");
    gateway.log_line("the access log is opened anew").await;
    get(gateway.address, "/3").await;
    until("the line is in the new file", async || lines(&log).len() == 1).await;
    assert_eq!(lines(&log)[0]["path"], "/3");
    // Elsewhere by a reload; where that cannot be, what ran before goes on.
    gateway.put(&whole("other.log"));
    let other = folder.path().join("other.log");
    until("the other file is there", async || other.exists()).await;
    get(gateway.address, "/4").await;
    until("the line is there", async || lines(&other).len() == 1).await;
    let told = gateway.refuse(&whole("no-such-folder/access.log")).await;
    assert!(told.contains("access_log") && told.contains("no-such-folder"), "{told}");
    get(gateway.address, "/5").await;
    until("the line is where it was", async || lines(&other).len() == 2).await;
    gateway.put(&whole("none"));
    until("nothing is logged", async || gateway.config().await["current"] == true).await;
    get(gateway.address, "/6").await;
    gateway.signal("TERM");
    assert!(gateway.end().await.success());
    assert_eq!((lines(&other).len(), lines(&log).len(), gateway.access().len()), (2, 1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_access_log_samples_what_went_well_and_tells_less_where_it_should() {
    let legacy = Origin::start(|request| match request.line() {
        line if line.contains("fails") => Reply::new("500 Internal Server Error", &[], ""),
        _ => Reply::ok(""),
    })
    .await;
    let log = "access_log: {to: stdout, sample: 0%, redact: [client, path, host]}\ntrusted_proxies: [127.0.0.1]\nroutes:\n  - {name: users, match: \"/users/{name}/orders/**\", stage: legacy}\n";
    let mut gateway = Gateway::start(&yaml(&[("legacy", legacy.url())], log)).await;
    let from = [("x-forwarded-for", "2001:db8:1:2::3")];
    for n in 0..20 {
        send(gateway.address, "GET", &format!("/fine/{n}"), &from, "").await;
    }
    send(gateway.address, "GET", "//users/./alice/orders;sid=1/4711/fails/bob", &from, "").await;
    // Nobody's route: nothing is told.
    send(gateway.address, "GET", "/account/alice/fails", &from, "").await;
    gateway.access_line(|line| line["path"] == "/*/*/*").await;
    let line = gateway.access_line(|line| line["route"] == "users").await;
    assert_eq!(
        (line["path"].as_str(), line["client"].as_str(), line["host"].as_str()),
        (Some("/users/*/orders/*/*/*"), Some("2001:db8:1::"), Some("*"))
    );
    gateway.signal("TERM");
    gateway.end().await;
    assert_eq!(gateway.access().len(), 2, "{:?}", gateway.access());
}

fn root() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

async fn promtool(arguments: &[&str]) {
    let folder = root().join("deploy/prometheus");
    let output = tokio::process::Command::new("promtool").args(arguments).current_dir(folder).output().await.unwrap();
    let told = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "promtool {arguments:?}: {}", String::from_utf8_lossy(&told));
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_and_the_page_itself_are_good_to_promtool() {
    promtool(&["check", "config", "prometheus.yml"]).await;
    promtool(&["check", "rules", "gateway.rules.yml"]).await;
    promtool(&["test", "rules", "gateway.test.yml"]).await;
}

/// A real Prometheus that scrapes the gateway, and ends with the test.
struct Prometheus {
    address: std::net::SocketAddr,
    _process: tokio::process::Child,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    async fn start(gateway: &Gateway) -> Self {
        let folder = tests::folder();
        // The same rules, looked at as often as a test has patience.
        let rules = std::fs::read_to_string(root().join("deploy/prometheus/gateway.rules.yml")).unwrap();
        let copy = folder.path().join("gateway.rules.yml");
        std::fs::write(&copy, rules.replace("interval: 30s", "interval: 1s")).unwrap();
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [\"{}\"]\nscrape_configs: [{{job_name: gateway, static_configs: [{{targets: [\"{}\"]}}]}}]\n",
            copy.display(),
            gateway.admin
        );
        let file = folder.path().join("prometheus.yml");
        std::fs::write(&file, config).unwrap();
        // It cannot say which port it got: the gap until it is bound is ours to lose.
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let process = tokio::process::Command::new("prometheus")
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("Prometheus is installed; tests/run does that");
        let this = Self { address, _process: process, _folder: folder };
        until("Prometheus is ready", async || {
            tokio::net::TcpStream::connect(address).await.is_ok() && get(address, "/-/ready").await.status == 200
        })
        .await;
        this
    }

    async fn query(&self, query: &str) -> Value {
        let query: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        get(self.address, &format!("/api/v1/query?query={query}")).await.json()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_query_of_the_dashboard_and_every_rule_runs_in_a_real_prometheus() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::start(|request| match request.line() {
        line if line.contains("/fails") => Reply::new("500 Internal Server Error", &[], ""),
        _ => Reply::ok("other"),
    })
    .await;
    let routes = "routes:
  - {name: orders, match: /orders/**, upstream: orders, stage: canary, canary: {percent: 50%, by: [header:x-user]}, shadow: {}, retry: {retries: 1, when: [500]}, fallback: {when: [unavailable, 5xx]}, timeout: {attempt: 5s}}
";
    let gateway = Gateway::start(&yaml(&[("legacy", legacy.url()), ("orders", orders.url())], routes)).await;
    let prometheus = Prometheus::start(&gateway).await;
    let dashboard: Value =
        serde_json::from_str(&std::fs::read_to_string(root().join("deploy/grafana/gateway.json")).unwrap()).unwrap();
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().unwrap() {
            let query = target["expr"].as_str().unwrap().replace("$__rate_interval", "10s").replace("$route", ".*");
            assert!(!query.contains('$'), "a variable that Grafana would not have: {query}");
            queries.push((panel["title"].as_str().unwrap().to_owned(), query));
        }
    }
    assert!(queries.len() >= 20, "{}", queries.len());
    let address = gateway.address;
    let load = tokio::spawn(async move {
        for n in 0.. {
            let user = (n % 50).to_string();
            let path = if n % 5 == 0 { "/orders/fails" } else { "/orders/1" };
            let method = if n % 7 == 0 { "POST" } else { "GET" };
            send(address, method, path, &[("x-user", &user)], "").await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    // What nothing of this test makes: a gateway that is well has none of these.
    let quiet = ["gateway_timeouts_total"];
    for (title, query) in queries {
        let mut told = Value::Null;
        until(&format!("`{title}` has an answer to {query}"), async || {
            told = prometheus.query(&query).await;
            assert_eq!(told["status"], "success", "{query}: {told}");
            let some = told["data"]["result"].as_array().is_some_and(|result| !result.is_empty());
            some || quiet.iter().any(|name| query.contains(name))
        })
        .await;
    }
    for recorded in [
        "gateway:requests:rate5m",
        "gateway:errors:ratio5m",
        "gateway:duration_seconds:p99_5m",
        "gateway:strangled:ratio5m",
        "gateway:mismatches:ratio5m",
    ] {
        until(&format!("{recorded} is recorded"), async || {
            let told = prometheus.query(recorded).await;
            told["data"]["result"].as_array().is_some_and(|result| !result.is_empty())
        })
        .await;
    }
    load.abort();
    let rules = get(prometheus.address, "/api/v1/rules").await.json();
    let groups = rules["data"]["groups"].as_array().unwrap();
    let all: Vec<&Value> = groups.iter().flat_map(|group| group["rules"].as_array().unwrap()).collect();
    assert!(all.len() >= 16, "{}", all.len());
    for rule in all {
        assert_eq!(rule["health"], "ok", "{rule}");
    }
    // The example of the folder is good by itself, too.
    let (code, _, err) = run(&["check", &gateway.file.to_string_lossy()]).await;
    assert_eq!(code, 0, "{err}");
}
