//! JWT at the door (RFC 7519, RFC 7515, RFC 8725, RFC 6750), and pages of other origins.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use serde_json::{Value, json};
use tests::{
    Answer, Gateway, Origin, Reply, get, raw, send,
    token::{ALGORITHMS, Signer, base64, changed, claims, jwks, now},
    until,
};

const SECRET: &str = "a secret that is long enough to be one, and then some for HS512";

/// A verifier with the tests' secret.
const SHARED: &str = "secret: \"a secret that is long enough to be one, and then some for HS512\", algorithms: [HS256]";

/// A file whose verifier `main` has these keys and whose route `/api/**` this policy, with a verifier's usual terms.
fn file(legacy: &Origin, keys: &str, auth: &str, rest: &str) -> String {
    let verifier = format!("auth:\n  main: {{issuer: \"https://id.example.com/\", audience: [shop], {keys}}}\n");
    let routes = format!("routes:\n  - {{name: api, match: /api/**, auth: {{jwt: main{auth}}}}}\n{rest}");
    crate::yaml(&[("legacy", legacy.url())], &format!("{verifier}{routes}"))
}

async fn ask(gateway: &Gateway, token: &str) -> Answer {
    let value = format!("Bearer {token}");
    send(gateway.address, "GET", "/api/1", &[("authorization", &value)], "").await
}

fn signer() -> Signer {
    Signer::with_secret("HS256", SECRET.as_bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_every_algorithm_are_taken_with_their_own_key_only() {
    let legacy = Origin::named("legacy").await;
    let folder = tests::folder();
    let signers: Vec<Signer> = ALGORITHMS.iter().map(|name| Signer::new(name, &format!("key-{name}"))).collect();
    let all: Vec<&Signer> = signers.iter().collect();
    std::fs::write(folder.path().join("keys.json"), jwks(&all)).unwrap();
    let path = folder.path().join("routes.yaml");
    let keys = format!("jwks_file: keys.json, algorithms: [{}]", ALGORITHMS.join(", "));
    std::fs::write(&path, Gateway::whole(&file(&legacy, &keys, "", ""))).unwrap();
    let gateway = Gateway::start_on(&path, &[]).await;
    for (name, signer) in ALGORITHMS.iter().zip(&signers) {
        assert_eq!(ask(&gateway, &signer.token(&claims("alice"))).await.status, 200, "{name}");
        // Without a name every key of the algorithm is tried.
        let nameless = signer.with_header(&json!({"alg": name}), &claims("alice"));
        assert_eq!(ask(&gateway, &nameless).await.status, 200, "{name}");
        for other in ALGORITHMS {
            if other != *name {
                // RFC 8725 §3.1: one key, one algorithm.
                let header = json!({"alg": other, "kid": format!("key-{name}")});
                let crossed = signer.with_header(&header, &claims("alice"));
                assert_eq!(ask(&gateway, &crossed).await.status, 401, "{name} as {other}");
            }
        }
    }
    // RFC 8725 §2.1: a public key, taken for a secret.
    let rsa = &signers[0];
    for secret in [rsa.public(), rsa.jwk().to_string().into_bytes()] {
        let forger = Signer::with_secret("HS256", &secret);
        let forged = forger.with_header(&json!({"alg": "HS256", "kid": "key-RS256"}), &claims("root"));
        assert_eq!(ask(&gateway, &forged).await.status, 401);
    }
    assert_eq!(legacy.count(), 2 * ALGORITHMS.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn attacks_on_tokens_are_refused() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&file(&legacy, &format!("{SHARED}, leeway: 0s"), "", "")).await;
    let signer = signer();
    let good = signer.token(&claims("alice"));
    assert_eq!(ask(&gateway, &good).await.status, 200);
    let unsigned = |header: &str| format!("{}.{}.", base64(header), base64(claims("root").to_string()));
    let parts: Vec<&str> = good.split('.').collect();
    let with = |header: Value| signer.with_header(&header, &claims("root"));
    let saying = |with: Value| signer.token(&changed("alice", &with));
    let stranger = Signer::with_secret("HS256", b"another secret that is long enough to be one");
    let bad: Vec<(&str, String)> = vec![
        // RFC 8725 §2.1, §3.1, §3.2
        ("none", unsigned(r#"{"alg":"none"}"#)),
        ("None", unsigned(r#"{"alg":"None"}"#)),
        ("no signature", unsigned(r#"{"alg":"HS256"}"#)),
        ("no alg", unsigned(r#"{"typ":"JWT"}"#)),
        ("alg that the file does not allow", with(json!({"alg": "HS512"}))),
        ("alg in another case", with(json!({"alg": "hs256"}))),
        ("another's key", stranger.token(&claims("root"))),
        ("changed claims", format!("{}.{}.{}", parts[0], base64(claims("root").to_string()), parts[2])),
        ("cut signature", format!("{}.{}.{}", parts[0], parts[1], &parts[2][..20])),
        ("signature twice", format!("{good}.{}", parts[2])),
        // RFC 8725 §3.10: keys that the token brings along, or says where to find.
        ("jwk", stranger.with_header(&json!({"alg": "HS256", "jwk": stranger.jwk()}), &claims("root"))),
        ("jku", stranger.with_header(&json!({"alg": "HS256", "jku": "http://127.0.0.1:1/keys"}), &claims("root"))),
        ("x5u", stranger.with_header(&json!({"alg": "HS256", "x5u": "http://127.0.0.1:1/keys"}), &claims("root"))),
        ("kid as a path", stranger.with_header(&json!({"alg": "HS256", "kid": "../../../dev/null"}), &claims("root"))),
        // RFC 7515 §4.1.11
        ("crit", with(json!({"alg": "HS256", "crit": ["exp"]}))),
        ("b64", with(json!({"alg": "HS256", "b64": false, "crit": ["b64"]}))),
        // RFC 7515 §4, RFC 7519 §4
        ("two algs", signer.raw(r#"{"alg":"HS256","alg":"HS256"}"#, &claims("a").to_string())),
        ("two subs", signer.raw(r#"{"alg":"HS256"}"#, &claims("a").to_string().replacen('{', r#"{"sub":"b","#, 1))),
        ("not JSON", signer.raw(r#"{"alg":"HS256"}"#, "hello")),
        ("a list", signer.raw(r#"{"alg":"HS256"}"#, "[]")),
        // RFC 7519 §4.1
        ("expired", saying(json!({"exp": now() - 1}))),
        ("expires at this moment", saying(json!({"exp": now()}))),
        ("never expires", saying(json!({"exp": null}))),
        ("exp as a text", saying(json!({"exp": format!("{}", now() + 600)}))),
        ("exp as a list", saying(json!({"exp": [now() + 600]}))),
        ("not yet", saying(json!({"nbf": now() + 60}))),
        ("nbf as a text", saying(json!({"nbf": "0"}))),
        ("another issuer", saying(json!({"iss": "https://id.example.com"}))),
        ("no issuer", saying(json!({"iss": null}))),
        ("issuers", saying(json!({"iss": ["https://id.example.com/"]}))),
        ("another audience", saying(json!({"aud": "shop2"}))),
        ("other audiences", saying(json!({"aud": ["a", "b"]}))),
        ("an audience that is none", saying(json!({"aud": {"shop": true}}))),
        ("no audience", saying(json!({"aud": null}))),
        // RFC 8725 §3.6 would compress; five parts are a JWE.
        ("JWE", "a.b.c.d.e".to_owned()),
        ("padding", format!("{good}=")),
        ("empty", String::new()),
        ("long", format!("{good}{}", "A".repeat(20_000))),
    ];
    let before = legacy.count();
    for (what, token) in &bad {
        let answer = ask(&gateway, token).await;
        assert_eq!(answer.status, 401, "{what}");
        let challenge = answer.field("www-authenticate");
        assert!(challenge.starts_with("Bearer realm=\"main\""), "{what}: {challenge}");
        assert_eq!(challenge.contains("error=\"invalid_token\""), *what != "empty", "{what}: {challenge}");
        let told = answer.text();
        assert!(!told.contains(SECRET) && !told.contains("root"), "{what}: {told}");
    }
    assert_eq!(legacy.count(), before);
    // What is good all the same.
    for (what, with) in [
        ("several audiences", json!({"aud": ["a", "shop"]})),
        ("a fraction of a second", json!({"exp": 4_000_000_000.5})),
        ("already valid", json!({"nbf": now() - 1})),
        ("issued tomorrow", json!({"iat": now() + 86_400})),
    ] {
        assert_eq!(ask(&gateway, &saying(with)).await.status, 200, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clocks_may_differ_a_little_and_types_and_claims_may_be_required() {
    let legacy = Origin::named("legacy").await;
    let keys = format!("{SHARED}, leeway: 30s, typ: at+jwt, required_claims: [tenant]");
    let gateway = Gateway::start(&file(&legacy, &keys, "", "")).await;
    let signer = signer();
    let token =
        |kind: &str, with: &Value| signer.with_header(&json!({"alg": "HS256", "typ": kind}), &changed("alice", with));
    for (kind, with, expected) in [
        ("at+jwt", json!({"tenant": "acme"}), 200),
        ("application/at+JWT", json!({"tenant": 7}), 200),
        ("at+jwt", json!({"tenant": "acme", "exp": now() - 10, "nbf": now() + 10}), 200),
        ("at+jwt", json!({"tenant": "acme", "exp": now() - 31}), 401),
        ("at+jwt", json!({"tenant": "acme", "nbf": now() + 60}), 401),
        ("JWT", json!({"tenant": "acme"}), 401),
        ("at+jwt", json!({}), 401),
    ] {
        assert_eq!(ask(&gateway, &token(kind, &with)).await.status, expected, "{kind} {with}");
    }
    let untyped = signer.with_header(&json!({"alg": "HS256"}), &changed("alice", &json!({"tenant": "acme"})));
    assert_eq!(ask(&gateway, &untyped).await.status, 401);
}

/// RFC 6750 §3.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_not_let_in_is_told_why() {
    let legacy = Origin::named("legacy").await;
    let gateway = Gateway::start(&file(&legacy, SHARED, ", scopes: [orders:read, orders:list]", "")).await;
    let challenge = |answer: &Answer| answer.field("www-authenticate").to_owned();
    // Nothing was sent: no error is named.
    for fields in [&[][..], &[("authorization", "Basic YTpi")], &[("authorization", "Bearer")]] {
        let answer = send(gateway.address, "POST", "/api/1", fields, "x").await;
        assert_eq!((answer.status, &*challenge(&answer)), (401, "Bearer realm=\"main\""));
        assert_eq!(answer.field("content-type"), "application/problem+json");
        assert_eq!(answer.json()["status"], 401);
        assert!(answer.json()["detail"].as_str().unwrap().contains("Authorization: Bearer"));
    }
    let expired = ask(&gateway, &signer().token(&changed("a", &json!({"exp": 1})))).await;
    assert_eq!(
        challenge(&expired),
        "Bearer realm=\"main\", error=\"invalid_token\", error_description=\"the token has expired\""
    );
    assert_eq!(expired.json()["detail"], "the token has expired");
    for (scope, expected) in [
        (json!({"scope": "orders:read"}), 403),
        (json!({"scope": "orders:readorders:list"}), 403),
        (json!({}), 403),
        (json!({"scope": "orders:list x orders:read"}), 200),
        (json!({"scp": ["orders:list", "orders:read"]}), 200),
    ] {
        let answer = ask(&gateway, &signer().token(&changed("a", &scope))).await;
        assert_eq!(answer.status, expected, "{scope}");
        if expected == 403 {
            let told = challenge(&answer);
            assert!(told.contains("error=\"insufficient_scope\""), "{told}");
            assert!(told.ends_with("scope=\"orders:read orders:list\""), "{told}");
        }
    }
    // Two tokens are none. In the query they are not looked for.
    let token = signer().token(&changed("a", &json!({"scope": "orders:read orders:list"})));
    let twice = format!(
        "GET /api/1 HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\nauthorization: Bearer {token}\r\n\r\n"
    );
    let answer = raw(gateway.address, twice.as_bytes(), |got| got.contains("several")).await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("error=\"invalid_request\""), "{answer}");
    assert_eq!(get(gateway.address, &format!("/api/1?access_token={token}")).await.status, 401);
    // The scheme is no matter of case.
    let lower = format!("bearer  {token}");
    assert_eq!(send(gateway.address, "GET", "/api/1", &[("authorization", &lower)], "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn upstreams_are_told_who_asks_and_by_nobody_else() {
    let legacy = Origin::named("legacy").await;
    let rest = "  - {name: token, match: /token, auth: {jwt: main, forward_token: true}}\n";
    let auth = ", forward: {sub: x-user-id, roles: x-roles, tenant: x-tenant}";
    let gateway = Gateway::start(&file(&legacy, SHARED, auth, rest)).await;
    let claims = changed("alice", &json!({"roles": ["a", "b"], "tenant": "x\r\nx-admin: 1"}));
    let bearer = format!("Bearer {}", signer().token(&claims));
    let forged =
        [("x-user-id", "root"), ("x_user_id", "root"), ("X-Roles", "root"), ("x-tenant", "t"), ("x_tenant", "t")];
    let mut fields = vec![("authorization", &*bearer), ("x-mine", "kept")];
    fields.extend(forged);
    assert_eq!(send(gateway.address, "GET", "/api/1", &fields, "").await.status, 200);
    let got = legacy.last();
    assert_eq!(
        (got.field("x-user-id"), got.field("x-roles"), got.field("x-mine")),
        ("alice".into(), "a,b".into(), "kept".into())
    );
    for name in ["x_user_id", "x-tenant", "x_tenant", "x-admin", "authorization"] {
        assert_eq!(got.fields(name), Vec::<&str>::new(), "{name}");
    }
    // On every route, with or without a door; the token is none of the gateway's business where it has no door.
    for (path, token) in [("/", 1), ("/token", 1)] {
        assert_eq!(send(gateway.address, "GET", path, &fields, "").await.status, 200);
        let got = legacy.last();
        assert_eq!(got.fields("authorization").len(), token, "{path}");
        for (name, _) in forged {
            assert_eq!(got.fields(name), Vec::<&str>::new(), "{path} {name}");
        }
    }
    // Nor after the body.
    let trailing = format!(
        "POST /api/1 HTTP/1.1\r\nhost: a\r\nauthorization: {bearer}\r\ntransfer-encoding: chunked\r\ntrailer: x-user-id\r\n\r\n1\r\nx\r\n0\r\nx-user-id: root\r\nx-roles: root\r\nx-sum: 1\r\n\r\n"
    );
    raw(gateway.address, trailing.as_bytes(), |got| got.ends_with("legacy")).await;
    let got = legacy.last();
    assert!(got.trailers.contains("x-sum: 1") && !got.trailers.contains("root"), "{got:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn falling_through_sheds_no_door() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::named("orders").await;
    let text = crate::yaml(
        &[("legacy", legacy.url()), ("orders", orders.url())],
        &format!(
            "auth:\n  main: {{issuer: \"https://id.example.com/\", audience: [shop], {SHARED}}}\nroutes:\n  \
             - {{name: read, match: {{path: /api/**, methods: [GET]}}, upstream: orders, stage: migrated, auth: {{jwt: main, scopes: [read]}}}}\n  \
             - {{name: open, match: /api/open/**, auth: none}}\n"
        ),
    );
    let gateway = Gateway::start(&text).await;
    let bearer = format!("Bearer {}", signer().token(&changed("a", &json!({"scope": "read"}))));
    let lesser = format!("Bearer {}", signer().token(&claims("a")));
    let status = async |method: &str, path: &str, fields: &[(&str, &str)]| {
        send(gateway.address, method, path, fields, "").await.status
    };
    // The method is another, the door is the same.
    assert_eq!(status("POST", "/api/1", &[]).await, 401);
    assert_eq!(status("POST", "/api/1", &[("authorization", &lesser)]).await, 403);
    assert_eq!(legacy.count(), 0);
    assert_eq!(status("POST", "/api/1", &[("authorization", &bearer)]).await, 200);
    assert_eq!(legacy.last().field("authorization"), bearer);
    assert_eq!(status("GET", "/api/open/1", &[]).await, 200);
    // Dot segments, escapes and the like lead to the same door.
    for path in ["/api//1", "/x/../api/1", "/%61pi/1", "/api/1/", "/api;x/1", "/api/./1"] {
        assert_eq!(status("GET", path, &[]).await, 401, "{path}");
    }
    // A preflight brings no token; one that asks for another method by the way is none.
    let preflight = [("origin", "https://a.example"), ("access-control-request-method", "PUT")];
    assert_eq!(status("OPTIONS", "/api/1", &preflight).await, 200);
    let mut unasked = preflight.to_vec();
    unasked.push(("authorization", "Bearer whatever"));
    assert_eq!(status("OPTIONS", "/api/1", &unasked).await, 200);
    let mut disguised = preflight.to_vec();
    disguised.push(("x-http-method-override", "DELETE"));
    assert_eq!(status("OPTIONS", "/api/1", &disguised).await, 401);
    assert_eq!(status("OPTIONS", "/api/1", &[]).await, 401);
    // A door for all, and one of none.
    gateway.flip(&text.replace("routes:\n", "defaults: {auth: {jwt: main}}\nroutes:\n")).await;
    assert_eq!(status("GET", "/elsewhere", &[]).await, 401);
    assert_eq!(status("GET", "/api/open/1", &[]).await, 200);
}

/// A path that upstreams read in two ways passed by the door of one of them; and of two doors on the way down only the first was met.
#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_and_no_other_rule_leads_around_a_door() {
    let legacy = Origin::named("legacy").await;
    let text = crate::yaml(
        &[("legacy", legacy.url())],
        &format!(
            "allow_in_paths: [encoded_slash, backslash, encoded_backslash]\nauth:\n  main: {{issuer: \"https://id.example.com/\", audience: [shop], {SHARED}}}\nroutes:\n  \
             - {{name: admin, match: /admin/**, auth: {{jwt: main}}}}\n  \
             - {{name: id, match: \"/orders/{{id}}/admin\", auth: {{jwt: main}}}}\n  \
             - {{name: export, match: {{path: /api/export, methods: [GET]}}}}\n  \
             - {{name: api, match: {{path: /api/**, methods: [GET, POST]}}, auth: {{jwt: main}}}}\n"
        ),
    );
    let gateway = Gateway::start(&text).await;
    let status = async |method: &str, path: &str| {
        let got = raw(
            gateway.address,
            format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").as_bytes(),
            |_| false,
        )
        .await;
        got.split(' ').nth(1).unwrap_or_default().to_owned()
    };
    for path in [
        "/admin/users",
        "/admin%2fusers",
        "/admin%2Fusers",
        "/admin%5cusers",
        "/admin\\users",
        "/orders/a%2fadmin",
        "/orders/a/admin",
    ] {
        assert_eq!(status("GET", path).await, "401", "{path}");
    }
    assert_eq!(status("GET", "/orders/a%2fb").await, "200");
    assert_eq!(status("GET", "/api/export").await, "200");
    assert_eq!(status("DELETE", "/api/export").await, "401");
    let file = gateway.file.to_str().unwrap();
    let (_, told, _) = tests::gateway::run(&["explain", "DELETE", "/api/export", "--config", file]).await;
    assert!(told.contains("auth of `api`, whose path it has: jwt main"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_choose_the_arm_and_are_counted() {
    let legacy = Origin::named("legacy").await;
    let orders = Origin::named("orders").await;
    let text = crate::yaml(
        &[("legacy", legacy.url()), ("orders", orders.url())],
        &format!(
            "auth:\n  main: {{issuer: \"https://id.example.com/\", audience: [shop], {SHARED}}}\nroutes:\n  \
             - name: api\n    match: /api/**\n    upstream: orders\n    stage: canary\n    auth: {{jwt: main}}\n    \
             canary: {{percent: 50%, always: [{{claim: {{plan: beta}}}}], never: [{{claim: {{tenant: acme}}}}]}}\n  \
             - {{name: counted, match: /counted, auth: {{jwt: main}}, rate_limit: {{limit: 1/h, per: \"claim:sub\"}}}}\n"
        ),
    );
    let gateway = Gateway::start(&text).await;
    let arm = async |claims: &Value| ask(&gateway, &signer().token(claims)).await.text();
    let mut arms = Vec::new();
    for n in 0..40 {
        let first = arm(&claims(&format!("user-{n}"))).await;
        assert_eq!(arm(&claims(&format!("user-{n}"))).await, first);
        arms.push(first);
    }
    let share = arms.iter().filter(|arm| *arm == "orders").count();
    assert!((8..=32).contains(&share), "{share}");
    assert_eq!(arm(&changed("user-0", &json!({"plan": "beta"}))).await, "orders");
    assert_eq!(arm(&changed("user-0", &json!({"plan": ["x", "beta"]}))).await, "orders");
    assert_eq!(arm(&changed("user-0", &json!({"plan": "beta", "tenant": "acme"}))).await, "legacy");
    // Without a subject the monolith answers.
    assert_eq!(arm(&changed("", &json!({"sub": null}))).await, "legacy");
    let line = gateway.access_line(|line| line["route"] == "api" && line["why"] == "claim").await;
    assert!(line["bucket"].is_u64());
    // Offline the same, for a token that would say so.
    let file = gateway.file.to_str().unwrap();
    let (code, told, _) =
        tests::gateway::run(&["explain", "GET", "/api/1", "--claim", "sub=user-3", "--config", file, "--json"]).await;
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((code, told["upstream"].as_str()), (0, Some(&*arms[3])));
    let counted = async |sub: &str| {
        let bearer = format!("Bearer {}", signer().token(&claims(sub)));
        let answer = send(gateway.address, "GET", "/counted", &[("authorization", &bearer)], "").await;
        (answer.status, answer.field("ratelimit-policy").to_owned())
    };
    assert_eq!(counted("alice").await, (200, "\"claim:sub\";q=1;w=3600".to_owned()));
    assert_eq!(counted("alice").await.0, 429);
    assert_eq!(counted("bob").await.0, 200);
    // Whoever is not let in is not counted.
    assert_eq!(get(gateway.address, "/counted").await.status, 401);
}

/// A provider that answers as it is told, and counts.
struct Provider {
    origin: Origin,
    answer: Arc<Mutex<Reply>>,
    asked: Arc<AtomicUsize>,
}

impl Provider {
    async fn start(first: Reply) -> Self {
        let answer = Arc::new(Mutex::new(first));
        let asked = Arc::new(AtomicUsize::new(0));
        let (told, counted) = (answer.clone(), asked.clone());
        let origin = Origin::start(move |_| {
            counted.fetch_add(1, SeqCst);
            told.lock().unwrap().clone()
        })
        .await;
        Self { origin, answer, asked }
    }

    fn says(&self, reply: Reply) {
        *self.answer.lock().unwrap() = reply;
    }

    fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    fn keys(&self, more: &str) -> String {
        format!("jwks: \"{}/keys\"{more}", self.origin.url())
    }
}

fn set(signers: &[&Signer]) -> Reply {
    Reply::new("200 OK", &[("content-type", "application/json")], &jwks(signers))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_loses_no_request_and_is_fetched_once() {
    let legacy = Origin::named("legacy").await;
    let (old, new) = (Signer::new("ES256", "old"), Signer::new("ES256", "new"));
    let provider = Provider::start(set(&[&old])).await;
    let gateway = Gateway::start(&file(&legacy, &provider.keys(", cooldown: 500ms"), "", "")).await;
    assert_eq!(ask(&gateway, &old.token(&claims("a"))).await.status, 200);
    assert_eq!(provider.asked(), 1);
    provider.says(set(&[&new, &old]));
    // Many at once, under a key that nobody has seen: one fetch.
    let asking: Vec<_> = (0..50)
        .map(|n| {
            let value = format!("Bearer {}", new.token(&claims(&format!("user-{n}"))));
            let address = gateway.address;
            tokio::spawn(async move { send(address, "GET", "/api/1", &[("authorization", &value)], "").await.status })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap(), 200);
    }
    assert_eq!(provider.asked(), 2);
    assert_eq!(ask(&gateway, &old.token(&claims("a"))).await.status, 200);
    // Once more, just while strangers use up the cool-down: whoever is right waits, and has it.
    let third = Signer::new("ES256", "third");
    provider.says(set(&[&third]));
    let stranger = Signer::new("ES256", "nobody's");
    assert_eq!(ask(&gateway, &stranger.token(&claims("x"))).await.status, 401);
    assert_eq!(ask(&gateway, &third.token(&claims("a"))).await.status, 200);
    // Who is gone from the set is gone.
    until("the old key is gone", async || ask(&gateway, &old.token(&claims("a"))).await.status == 401).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_cause_one_fetch_however_many_they_are() {
    let legacy = Origin::named("legacy").await;
    let (ours, stranger) = (Signer::new("ES256", "ours"), Signer::new("ES256", "x"));
    let provider = Provider::start(set(&[&ours])).await;
    let gateway = Gateway::start(&file(&legacy, &provider.keys(", cooldown: 10m"), "", "")).await;
    assert_eq!(ask(&gateway, &ours.token(&claims("a"))).await.status, 200);
    let asking: Vec<_> = (0..40)
        .map(|_| {
            let value = format!("Bearer {}", stranger.token(&claims("a")));
            let address = gateway.address;
            tokio::spawn(async move { send(address, "GET", "/api/1", &[("authorization", &value)], "").await.status })
        })
        .collect();
    for asked in asking {
        assert_eq!(asked.await.unwrap(), 401);
    }
    assert_eq!(ask(&gateway, &stranger.token(&claims("a"))).await.status, 401);
    assert_eq!(provider.asked(), 2);
    assert_eq!(ask(&gateway, &ours.token(&claims("b"))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_good_set_survives_a_provider_that_is_down_slow_or_lies() {
    let legacy = Origin::named("legacy").await;
    let ours = Signer::new("RS256", "ours");
    let evil = Signer::new("HS256", "ours");
    let elsewhere = Provider::start(set(&[&evil])).await;
    let provider = Provider::start(set(&[&ours])).await;
    let gateway = Gateway::start(&file(&legacy, &provider.keys(", cooldown: 100ms"), "", "")).await;
    assert_eq!(ask(&gateway, &ours.token(&claims("a"))).await.status, 200);
    let redirect = format!("{}/keys", elsewhere.origin.url());
    let large = format!("{{\"keys\": [], \"x\": \"{}\"}}", "x".repeat(600_000));
    let lies = [
        Reply::new("500 Internal Server Error", &[], "no"),
        Reply::new("302 Found", &[("location", &redirect)], ""),
        Reply::ok("<html>"),
        Reply::ok("{}"),
        Reply::ok("{\"keys\": []}"),
        Reply::ok("{\"keys\": [{\"kty\": \"RSA\"}, 7, null]}"),
        // A secret that everybody can read.
        set(&[&evil]),
        Reply::ok(&large),
        Reply::Close,
        Reply::Last(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{\"keys\"".to_vec()),
        Reply::Bytes(b"\x00\x01\x02 nonsense\r\n\r\n".to_vec()),
    ];
    for (n, lie) in lies.into_iter().enumerate() {
        provider.says(lie);
        let before = provider.asked();
        // Each under a name of its own: one that was not found of late is not asked for.
        let stranger = Signer::new("ES256", &format!("stranger-{n}"));
        let header = json!({"alg": "RS256", "kid": format!("stranger-{n}")});
        // It may be good: nobody knows.
        assert_eq!(ask(&gateway, &stranger.with_header(&header, &claims("a"))).await.status, 503);
        assert!(provider.asked() > before, "{n}");
        assert_eq!(ask(&gateway, &ours.token(&claims(&format!("a{n}")))).await.status, 200, "{n}");
    }
    assert_eq!(elsewhere.asked(), 0);
    // Other terms are no reason to forget its keys.
    let text = file(&legacy, &provider.keys(", cooldown: 100ms, leeway: 5s"), "", "");
    gateway.flip(&text).await;
    assert_eq!(ask(&gateway, &ours.token(&claims("reloaded"))).await.status, 200);
    assert_eq!(gateway.api("/api/status").await["verifiers"][0]["keys"], 1);
    // It says nothing at all; nobody who is known waits for it.
    provider.says(Reply::Hang);
    let forged = evil.with_header(&json!({"alg": "HS256", "kid": "ours"}), &claims("root"));
    assert_eq!(ask(&gateway, &forged).await.status, 401);
    assert_eq!(ask(&gateway, &ours.token(&claims("late"))).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_any_keys_nobody_comes_in_until_there_are_some() {
    let legacy = Origin::named("legacy").await;
    let ours = Signer::new("ES256", "ours");
    let provider = Provider::start(Reply::new("503 Service Unavailable", &[], "")).await;
    let gateway = Gateway::start(&file(&legacy, &provider.keys(""), "", "")).await;
    let token = ours.token(&claims("a"));
    let answer = ask(&gateway, &token).await;
    assert_eq!((answer.status, answer.field("retry-after")), (503, "1"));
    assert!(answer.field("www-authenticate").is_empty());
    // What needs no key is judged all the same, and other routes are open.
    assert_eq!(get(gateway.address, "/api/1").await.status, 401);
    assert_eq!(get(gateway.address, "/").await.status, 200);
    provider.says(set(&[&ours]));
    until("the keys are there", async || ask(&gateway, &token).await.status == 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_come_by_tls_from_whom_the_file_says() {
    let legacy = Origin::named("legacy").await;
    let ours = Signer::new("ES384", "ours");
    let (pem, config) = crate::tls::authority(&["localhost"]);
    let (_, stranger) = crate::tls::authority(&["localhost"]);
    let text = jwks(&[&ours]);
    let (good, bad) = (text.clone(), text);
    let good = Origin::start_with(Some(config), move |_| Reply::ok(&good)).await;
    let bad = Origin::start_with(Some(stranger), move |_| Reply::ok(&bad)).await;
    let folder = tests::folder();
    std::fs::write(folder.path().join("ca.pem"), pem).unwrap();
    let path = folder.path().join("routes.yaml");
    let keys = |origin: &Origin| {
        format!("jwks: \"https://localhost:{}/keys?x=1\", ca: ca.pem, algorithms: [ES384]", origin.address.port())
    };
    std::fs::write(&path, Gateway::whole(&file(&legacy, &keys(&good), "", ""))).unwrap();
    let gateway = Gateway::start_on(&path, &[]).await;
    assert_eq!(ask(&gateway, &ours.token(&claims("a"))).await.status, 200);
    assert_eq!(good.last().line(), "GET /keys?x=1 HTTP/1.1");
    gateway.flip(&file(&legacy, &keys(&bad), "", "")).await;
    assert_eq!(ask(&gateway, &ours.token(&claims("a"))).await.status, 503);
    assert_eq!(bad.count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_taken_once_is_not_taken_for_ever() {
    let legacy = Origin::named("legacy").await;
    let text = file(&legacy, &format!("{SHARED}, leeway: 0s"), "", "");
    let gateway = Gateway::start(&text).await;
    let token = signer().token(&changed("a", &json!({"exp": now() + 2})));
    assert_eq!(ask(&gateway, &token).await.status, 200);
    assert_eq!(ask(&gateway, &token).await.status, 200);
    until("it has expired", async || ask(&gateway, &token).await.status == 401).await;
    // Another audience is another verifier, whatever was found out before.
    let token = signer().token(&claims("a"));
    assert_eq!(ask(&gateway, &token).await.status, 200);
    gateway.flip(&text.replace("[shop]", "[other]")).await;
    assert_eq!(ask(&gateway, &token).await.status, 401);
    gateway.flip(&text).await;
    assert_eq!(ask(&gateway, &token).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_of_keys_is_read_again_without_a_reload() {
    let legacy = Origin::named("legacy").await;
    let folder = tests::folder();
    let (old, new) = (Signer::new("EdDSA", "1"), Signer::new("EdDSA", "2"));
    let keys = folder.path().join("keys.json");
    std::fs::write(&keys, jwks(&[&old])).unwrap();
    let path = folder.path().join("routes.yaml");
    let text = file(&legacy, "jwks_file: keys.json, algorithms: [EdDSA]", "", "");
    std::fs::write(&path, Gateway::whole(&text)).unwrap();
    let gateway = Gateway::start_on(&path, &[]).await;
    assert_eq!(ask(&gateway, &old.token(&claims("a"))).await.status, 200);
    std::fs::write(&keys, "half a fil").unwrap();
    std::fs::write(&keys, jwks(&[&new])).unwrap();
    until("the new key is read", async || ask(&gateway, &new.token(&claims("a"))).await.status == 200).await;
    assert_eq!(ask(&gateway, &old.token(&claims("a"))).await.status, 401);
}

/// The Fetch standard's CORS protocol.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_other_origins_do_what_the_route_says() {
    let legacy = Origin::start(|_| {
        Reply::new("200 OK", &[("access-control-allow-origin", "*"), ("access-control-max-age", "9")], "legacy")
    })
    .await;
    let text = crate::yaml(
        &[("legacy", legacy.url()), ("done", "http://127.0.0.1:1".to_owned())],
        &format!(
            "auth:\n  main: {{issuer: \"https://id.example.com/\", audience: [shop], {SHARED}}}\nroutes:\n  \
             - name: api\n    match: {{path: /api/**, methods: [GET, PUT]}}\n    auth: {{jwt: main}}\n    \
             cors: {{origins: [\"https://app.example.com\", \"https://*.example.org\"], methods: [PUT], headers: [authorization, x-a], expose: [x-b], credentials: true, max_age: 10m}}\n  \
             - {{name: any, match: /any, cors: {{origins: [\"*\"], headers: [\"*\"]}}}}\n  \
             - {{name: done, match: {{path: /done, methods: [GET]}}, upstream: done, stage: retired, cors: {{origins: [\"https://app.example.com\"]}}}}\n"
        ),
    );
    let gateway = Gateway::start(&text).await;
    let preflight = async |path: &str, origin: &str, method: &str, headers: &str| {
        let mut fields = vec![("origin", origin), ("access-control-request-method", method)];
        if !headers.is_empty() {
            fields.push(("access-control-request-headers", headers));
        }
        send(gateway.address, "OPTIONS", path, &fields, "").await
    };
    let good = preflight("/api/1", "https://app.example.com", "PUT", "Authorization,x-a").await;
    let told = |answer: &Answer, name: &str| answer.field(&format!("access-control-{name}")).to_owned();
    assert_eq!(good.status, 204);
    assert_eq!(told(&good, "allow-origin"), "https://app.example.com");
    assert_eq!(told(&good, "allow-methods"), "GET, HEAD, POST, PUT");
    assert_eq!(told(&good, "allow-headers"), "authorization, x-a");
    assert_eq!((&*told(&good, "allow-credentials"), &*told(&good, "max-age")), ("true", "600"));
    assert!(good.field("vary").starts_with("Origin"));
    assert_eq!(preflight("/api/1", "https://a.b.example.org", "GET", "").await.status, 204);
    for (origin, method, headers) in [
        ("https://evil.example", "PUT", ""),
        ("null", "PUT", ""),
        ("http://app.example.com", "PUT", ""),
        ("https://app.example.com", "GET", "x-other"),
    ] {
        let answer = preflight("/api/1", origin, method, headers).await;
        assert_eq!((answer.status, &*told(&answer, "allow-origin")), (403, ""), "{origin} {method} {headers}");
        assert_eq!(answer.json()["status"], 403);
    }
    let any = preflight("/any", "null", "DELETE", "x-y").await;
    let said = ["allow-origin", "allow-methods", "allow-headers", "allow-credentials"].map(|name| told(&any, name));
    assert_eq!(said, ["*", "DELETE", "x-y", ""]);
    // Also where the preflight itself would be refused, and what is refused may be read.
    assert_eq!(preflight("/done", "https://app.example.com", "GET", "").await.status, 204);
    let refused = send(gateway.address, "PUT", "/done", &[("origin", "https://app.example.com")], "").await;
    assert_eq!((refused.status, &*told(&refused, "allow-origin")), (405, "https://app.example.com"));
    // What all may read says so also where nobody asked.
    assert_eq!(legacy.count(), 0);
    let plain = send(gateway.address, "GET", "/any", &[], "").await;
    assert_eq!((plain.status, &*told(&plain, "allow-origin"), plain.field("vary")), (200, "*", ""));
    // What is no route's with a policy is the upstream's to answer.
    let other = preflight("/elsewhere", "https://evil.example", "GET", "").await;
    assert_eq!((other.status, &*told(&other, "max-age")), (200, "9"));
    // Answers and refusals alike may be read by whom the policy names, and by nobody else.
    let bearer = format!("Bearer {}", signer().token(&claims("a")));
    for (origin, allowed) in [("https://app.example.com", "https://app.example.com"), ("https://evil.example", "")] {
        for (fields, status) in [(vec![("authorization", &*bearer)], 200), (vec![], 401)] {
            let mut fields = fields;
            fields.push(("origin", origin));
            let answer = send(gateway.address, "GET", "/api/1", &fields, "").await;
            assert_eq!((answer.status, &*told(&answer, "allow-origin")), (status, allowed));
            assert_eq!(told(&answer, "max-age"), "");
            assert_eq!(answer.field("vary"), "Origin");
            assert_eq!(told(&answer, "expose-headers"), if allowed.is_empty() { "" } else { "x-b" });
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn check_lists_what_is_open() {
    let legacy = Origin::named("legacy").await;
    let folder = tests::folder();
    let path = folder.path().join("routes.yaml");
    let rest = "  - {name: open, match: /open}\n  - {name: gone, match: /gone, stage: gone}\n";
    std::fs::write(&path, file(&legacy, SHARED, "", rest)).unwrap();
    let (code, told, _) = tests::gateway::run(&["check", path.to_str().unwrap()]).await;
    assert!(code == 0 && told.ends_with("reachable without auth: `open`, `unrouted`\n"), "{told}");
    let (_, told, _) = tests::gateway::run(&["check", path.to_str().unwrap(), "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&told).unwrap()["without_auth"], json!(["open", "unrouted"]));
}
