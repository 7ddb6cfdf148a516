//! What is kept and what is not: each test names the section that it is about.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tests::{
    Answer, Client, Gateway, Origin, Reply,
    client::request,
    raw, send,
    token::{Signer, claims},
    until,
};

type Fields = Vec<(String, String)>;
/// Fields of one request or answer.
type Pairs<'a> = Vec<(&'a str, &'a str)>;
/// What is said of it, the status, the fields, and whether it is kept.
type Said<'a> = (&'a str, &'a str, Pairs<'a>, bool);
/// The directives, the fields of two requests, and whether the second has the first's answer.
type Whose<'a> = (&'a str, [&'a [(&'a str, &'a str)]; 2], bool);
/// The request's fields, and status, body and `Content-Range` of its answer.
type Parts<'a> = (Pairs<'a>, u16, &'a str, &'a str);

/// An origin that says what it is told to and counts, and a gateway that keeps.
struct Kept {
    origin: Origin,
    gateway: Gateway,
    says: Arc<Mutex<(String, Fields)>>,
    made: Arc<AtomicUsize>,
}

/// A route that keeps what answers allow.
pub(crate) const KEEP: &str = "routes:\n  - {name: kept, match: /k/**, cache: {}}\n";

impl Kept {
    async fn start(rest: &str) -> Self {
        let says = Arc::new(Mutex::new(("200 OK".to_owned(), Fields::new())));
        let made = Arc::new(AtomicUsize::new(0));
        let (told, counted) = (says.clone(), made.clone());
        let origin = Origin::start(move |received| {
            let (status, fields) = told.lock().unwrap().clone();
            let number = counted.fetch_add(1, SeqCst) + 1;
            let pairs: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (&**name, &**value)).collect();
            let known = pairs.iter().find(|(name, _)| *name == "etag").map(|(_, tag)| *tag);
            if known.is_some() && received.fields("if-none-match") == known.into_iter().collect::<Vec<_>>() {
                let fields: String = pairs.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
                return Reply::Bytes(format!("HTTP/1.1 304 Not Modified\r\n{fields}\r\n").into_bytes());
            }
            if received.line().starts_with("HEAD") {
                let fields: String = pairs.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
                return Reply::Bytes(format!("HTTP/1.1 {status}\r\n{fields}content-length: 9\r\n\r\n").into_bytes());
            }
            Reply::new(&status, &pairs, &format!("answer {number}."))
        })
        .await;
        let gateway = Gateway::start(&crate::yaml(&[("legacy", origin.url())], rest)).await;
        Self { origin, gateway, says, made }
    }

    fn says(&self, fields: &[(&str, &str)]) {
        self.says_status("200 OK", fields);
    }

    fn says_status(&self, status: &str, fields: &[(&str, &str)]) {
        let fields = fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        *self.says.lock().unwrap() = (status.to_owned(), fields);
    }

    async fn ask(&self, path: &str, fields: &[(&str, &str)]) -> Answer {
        send(self.gateway.address, "GET", path, fields, "").await
    }

    async fn method(&self, method: &str, path: &str) -> Answer {
        send(self.gateway.address, method, path, &[], "").await
    }

    /// Whether a second request has the first's answer, once the origin has said this.
    async fn reuses(&self, path: &str, status: &str, said: &[(&str, &str)], asks: [&[(&str, &str)]; 2]) -> bool {
        self.says_status(status, said);
        let first = self.ask(path, asks[0]).await;
        let second = self.ask(path, asks[1]).await;
        let same = first.body == second.body;
        assert_eq!(second.field("cache-status").starts_with("gw; hit"), same, "{said:?}: {:?}", second.headers);
        same
    }
}

fn date(offset: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let then = UNIX_EPOCH + Duration::from_secs(now.checked_add_signed(offset).unwrap());
    httpdate::fmt_http_date(then)
}

/// RFC 9111 §3, §4.2, §5.2.2, §5.3; RFC 9213 §2.
#[tokio::test(flavor = "multi_thread")]
async fn what_says_that_it_may_be_kept_is_and_nothing_else() {
    let kept = Kept::start(KEEP).await;
    let (past, long_past, future, invalid) = (date(-100), date(-10_000), date(100), "0".to_owned());
    let now = date(0);
    let cases: Vec<Said<'_>> = vec![
        ("§4.2.1", "200 OK", vec![("cache-control", "max-age=60")], true),
        ("§4.2.1", "200 OK", vec![("cache-control", "s-maxage=60")], true),
        ("§5.2.2.10 before max-age", "200 OK", vec![("cache-control", "max-age=0, s-maxage=60")], true),
        ("§5.2.2.10 before max-age", "200 OK", vec![("cache-control", "max-age=60, s-maxage=0")], false),
        ("§5.3", "200 OK", vec![("expires", &future), ("date", &now)], true),
        ("§5.3", "200 OK", vec![("expires", &past), ("date", &now)], false),
        ("§5.3 invalid", "200 OK", vec![("expires", &invalid), ("date", &now)], false),
        ("§5.3 max-age first", "200 OK", vec![("expires", &past), ("cache-control", "max-age=60")], true),
        ("§5.3 max-age first", "200 OK", vec![("expires", &future), ("cache-control", "max-age=0")], false),
        ("§4.2 says nothing", "200 OK", vec![], false),
        ("§4.2.2", "200 OK", vec![("last-modified", &long_past), ("date", &now)], true),
        ("§4.2.2 too new", "200 OK", vec![("last-modified", &now), ("date", &now)], false),
        ("§4.2.2", "404 Not Found", vec![("last-modified", &long_past), ("date", &now)], true),
        ("§4.2.2 not of itself", "201 Created", vec![("last-modified", &long_past), ("date", &now)], false),
        ("§4.2.2 public", "201 Created", vec![("last-modified", &long_past), ("cache-control", "public")], true),
        ("§3 any final status", "404 Not Found", vec![("cache-control", "max-age=60")], true),
        ("§3 any final status", "299 Odd", vec![("cache-control", "max-age=60")], true),
        ("§3 any final status", "503 Service Unavailable", vec![("cache-control", "max-age=60")], true),
        ("§5.2.2.3", "299 Odd", vec![("cache-control", "max-age=60, must-understand")], false),
        ("§5.2.2.3", "200 OK", vec![("cache-control", "max-age=60, no-store, must-understand")], true),
        ("§5.2.2.5", "200 OK", vec![("cache-control", "max-age=60, no-store")], false),
        ("§5.2.2.5", "200 OK", vec![("cache-control", "NO-STORE"), ("expires", &future)], false),
        ("§5.2.2.7", "200 OK", vec![("cache-control", "max-age=60, private")], false),
        ("§5.2.2.7", "200 OK", vec![("cache-control", "max-age=60, private=\"x-a\"")], false),
        ("§5.2.2.4", "200 OK", vec![("cache-control", "max-age=60, no-cache")], false),
        ("§4.2.3 Age", "200 OK", vec![("cache-control", "max-age=60"), ("age", "59")], true),
        ("§4.2.3 Age", "200 OK", vec![("cache-control", "max-age=60"), ("age", "60")], false),
        ("§5.1 not a number", "200 OK", vec![("cache-control", "max-age=60"), ("age", "abc")], true),
        ("§4.2.3 Date", "200 OK", vec![("cache-control", "max-age=60"), ("date", &past)], false),
        ("§4.1 Vary: *", "200 OK", vec![("cache-control", "max-age=60"), ("vary", "accept, *")], false),
        ("§7.3 Set-Cookie", "200 OK", vec![("cache-control", "max-age=60"), ("set-cookie", "a=b")], false),
        ("§5.4 Pragma in a response", "200 OK", vec![("cache-control", "max-age=60"), ("pragma", "no-cache")], true),
        ("RFC 9213", "200 OK", vec![("cache-control", "no-store"), ("cdn-cache-control", "max-age=60")], true),
        ("RFC 9213", "200 OK", vec![("cache-control", "max-age=60"), ("cdn-cache-control", "no-store")], false),
        ("RFC 9213 Expires", "200 OK", vec![("expires", &future), ("cdn-cache-control", "max-age=0")], false),
        (
            "RFC 9213 no dictionary",
            "200 OK",
            vec![("cache-control", "max-age=60"), ("cdn-cache-control", "no-store, &")],
            true,
        ),
        (
            "§3 206",
            "206 Partial Content",
            vec![("cache-control", "max-age=60"), ("content-range", "bytes 0-8/20")],
            false,
        ),
        (
            "event streams",
            "200 OK",
            vec![("cache-control", "max-age=60"), ("content-type", "text/event-stream")],
            false,
        ),
    ];
    for (n, (section, status, said, expected)) in cases.iter().enumerate() {
        let reused = kept.reuses(&format!("/k/{n}"), status, said, [&[], &[]]).await;
        assert_eq!(reused, *expected, "{section}: {status} {said:?}");
    }
    // Nothing is kept where the route does not say so.
    kept.says(&[("cache-control", "public, max-age=60")]);
    let first = kept.ask("/else", &[]).await;
    assert_ne!(first.body, kept.ask("/else", &[]).await.body);
    assert_eq!(first.field("cache-status"), "");
}

/// RFC 9111 §3.5, and what this cache asks beyond it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_one_clients_own_is_nobody_elses() {
    let kept = Kept::start(KEEP).await;
    let (auth, other) = ([("authorization", "Basic YTpi")], [("authorization", "Basic YzpkCg==")]);
    let (cookie, no) = ([("cookie", "session=1")], [("x", "y")]);
    let cases: Vec<Whose<'_>> = vec![
        ("max-age=60", [&auth, &other], false),
        ("max-age=60", [&auth, &no], false),
        ("max-age=60", [&no, &auth], false),
        ("max-age=60, public", [&auth, &other], true),
        ("max-age=60, must-revalidate", [&auth, &no], true),
        ("s-maxage=60", [&no, &auth], true),
        ("max-age=60", [&cookie, &no], false),
        ("max-age=60", [&no, &cookie], false),
        ("max-age=60, must-revalidate", [&cookie, &no], false),
        ("max-age=60, public", [&cookie, &no], true),
        ("s-maxage=60", [&no, &cookie], true),
    ];
    for (n, (said, asks, expected)) in cases.into_iter().enumerate() {
        let reused = kept.reuses(&format!("/k/{n}"), "200 OK", &[("cache-control", said)], asks).await;
        assert_eq!(reused, expected, "{said} {asks:?}");
    }
    // Host, scheme and query tell resources apart; the case of a host does not.
    kept.says(&[("cache-control", "max-age=60")]);
    let ask = async |host: &str, path: &str| kept.ask(path, &[("host", host)]).await.text();
    let first = ask("a.example", "/k/x?a=1").await;
    assert_eq!(ask("A.example", "/k/x?a=1").await, first);
    assert_ne!(ask("b.example", "/k/x?a=1").await, first);
    assert_ne!(ask("a.example", "/k/x?a=2").await, first);
    assert_ne!(ask("a.example", "/k/x").await, first);
}

/// The claims that upstreams are told are part of the key, and the client's own token decides although it does not go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_does_not_go_on_still_makes_an_answer_its_own() {
    let secret = "a secret that is long enough to be one";
    let rest = format!(
        "auth:\n  main: {{issuer: \"https://id.example.com/\", audience: [shop], secret: {secret:?}}}\nroutes:\n  \
         - {{name: kept, match: /k/**, auth: {{jwt: main, forward: {{sub: x-user-id}}}}, cache: {{}}}}\n"
    );
    let kept = Kept::start(&rest).await;
    let signer = Signer::with_secret("HS256", secret.as_bytes());
    let [alice, bob] = ["alice", "bob"].map(|sub| format!("Bearer {}", signer.token(&claims(sub))));
    kept.says(&[("cache-control", "max-age=60")]);
    let ask = async |path: &str, bearer: &str| kept.ask(path, &[("authorization", bearer)]).await;
    let first = ask("/k/own", &alice).await;
    assert!(kept.origin.last().fields("authorization").is_empty());
    assert_ne!(ask("/k/own", &alice).await.body, first.body);
    kept.says(&[("cache-control", "public, max-age=60")]);
    let first = ask("/k/public", &alice).await;
    assert_eq!(ask("/k/public", &alice).await.body, first.body);
    assert_ne!(ask("/k/public", &bob).await.body, first.body);
    // Who is not let in has nothing of it.
    assert_eq!(kept.ask("/k/public", &[]).await.status, 401);
}

/// RFC 9111 §4.1.
#[tokio::test(flavor = "multi_thread")]
async fn answers_vary_by_what_they_say() {
    let kept = Kept::start(KEEP).await;
    kept.says(&[("cache-control", "max-age=60"), ("vary", "Accept-Language"), ("vary", "x-a")]);
    let ask = async |fields: &[(&str, &str)]| kept.ask("/k/1", fields).await.text();
    let de = ask(&[("accept-language", "de, en")]).await;
    let none = ask(&[]).await;
    assert_ne!(de, none);
    assert_eq!(ask(&[("accept-language", "de,en")]).await, de);
    assert_eq!(ask(&[("accept-language", "de, en"), ("x-b", "1")]).await, de);
    assert_eq!(ask(&[]).await, none);
    assert_ne!(ask(&[("accept-language", "de, en"), ("x-a", "1")]).await, de);
    let miss = kept.ask("/k/1", &[("accept-language", "fr")]).await;
    assert_eq!(miss.field("cache-status"), "gw; fwd=vary-miss; fwd-status=200; stored");
    assert_eq!(kept.origin.count(), 4);
}

/// RFC 9111 §4.3, §3.2; RFC 9110 §13.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_stale_is_asked_about_and_what_the_client_has_is_not_sent() {
    let kept = Kept::start(KEEP).await;
    kept.says(&[("cache-control", "no-cache"), ("etag", "\"one\""), ("x-a", "1"), ("content-type", "text/a")]);
    let first = kept.ask("/k/1", &[]).await;
    kept.says(&[("cache-control", "no-cache"), ("etag", "\"one\""), ("x-a", "2"), ("content-type", "text/b")]);
    let second = kept.ask("/k/1", &[]).await;
    assert_eq!(kept.origin.last().field("if-none-match"), "\"one\"");
    assert_eq!((second.status, &second.body), (200, &first.body));
    assert_eq!((second.field("x-a"), second.field("content-type")), ("2", "text/a"));
    assert_eq!(second.field("cache-status"), "gw; fwd=stale; fwd-status=304; stored; ttl=0");
    // The client's own condition is answered here, whatever the upstream was asked.
    let current = kept.ask("/k/1", &[("if-none-match", "\"x\", W/\"one\"")]).await;
    assert_eq!((current.status, current.text().as_str(), current.field("etag")), (304, "", "\"one\""));
    assert_eq!(current.field("content-length"), "");
    assert_eq!(kept.ask("/k/1", &[("if-none-match", "\"x\"")]).await.status, 200);
    // What has changed is sent anew.
    kept.says(&[("cache-control", "max-age=60"), ("etag", "\"two\"")]);
    let third = kept.ask("/k/1", &[]).await;
    assert_ne!(third.body, first.body);
    assert_eq!(kept.ask("/k/1", &[("if-none-match", "\"two\"")]).await.status, 304);
    assert_eq!(kept.ask("/k/1", &[("if-none-match", "*")]).await.status, 304);
    // By date.
    let modified = date(-1000);
    kept.says(&[("cache-control", "max-age=60"), ("last-modified", &modified)]);
    kept.ask("/k/2", &[]).await;
    for (since, status) in [(date(-1000), 304), (date(-500), 304), (date(-1001), 200), ("nonsense".to_owned(), 200)] {
        assert_eq!(kept.ask("/k/2", &[("if-modified-since", &since)]).await.status, status, "{since}");
    }
    // Tags come first.
    let both = [("if-none-match", "\"x\""), ("if-modified-since", &*date(-500))];
    assert_eq!(kept.ask("/k/2", &both).await.status, 200);
    // What only the origin can judge is not judged here (§4.3.2).
    let count = kept.origin.count();
    let passed = kept.ask("/k/2", &[("if-match", "\"x\"")]).await;
    assert_eq!((kept.origin.count(), passed.field("cache-status")), (count + 1, "gw; fwd=bypass"));
    // A condition goes on where nothing is kept, and its answer is its sender's.
    kept.says(&[("cache-control", "max-age=60"), ("etag", "\"three\"")]);
    assert_eq!(kept.ask("/k/3", &[("if-none-match", "\"three\"")]).await.status, 304);
    assert_eq!(kept.ask("/k/3", &[]).await.status, 200);
}

/// RFC 9111 §4.3.5, §4; RFC 9110 §9.3.2.
#[tokio::test(flavor = "multi_thread")]
async fn head_is_answered_from_what_get_brought() {
    let kept = Kept::start(KEEP).await;
    kept.says(&[("cache-control", "max-age=60"), ("etag", "\"a\"")]);
    let first = kept.ask("/k/1", &[]).await;
    let head =
        raw(kept.gateway.address, b"HEAD /k/1 HTTP/1.1\r\nhost: shop.example.com\r\nconnection: close\r\n\r\n", |_| {
            false
        })
        .await;
    assert!(head.starts_with("HTTP/1.1 200 ") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(head.contains("content-length: 9\r\n") && head.contains("cache-status: gw; hit"), "{head}");
    assert_eq!(kept.origin.count(), 1);
    // One that brings word of another ends what is kept.
    kept.says(&[("cache-control", "no-cache"), ("etag", "\"a\"")]);
    let kept_one = kept.ask("/k/2", &[]).await;
    kept.says(&[("cache-control", "no-cache"), ("etag", "\"b\"")]);
    raw(kept.gateway.address, b"HEAD /k/2 HTTP/1.1\r\nhost: shop.example.com\r\nconnection: close\r\n\r\n", |_| false)
        .await;
    assert_ne!(kept.ask("/k/2", &[]).await.body, kept_one.body);
    assert!(kept.origin.last().fields("if-none-match").is_empty());
    // What HEAD brings is no answer to GET.
    kept.says(&[("cache-control", "max-age=60")]);
    raw(kept.gateway.address, b"HEAD /k/3 HTTP/1.1\r\nhost: shop.example.com\r\nconnection: close\r\n\r\n", |_| false)
        .await;
    assert_eq!(kept.ask("/k/3", &[]).await.text().len(), first.text().len());
}

/// RFC 9110 §14.
#[tokio::test(flavor = "multi_thread")]
async fn parts_come_from_what_is_kept_whole() {
    let kept = Kept::start(KEEP).await;
    let modified = date(-1000);
    kept.says(&[("cache-control", "max-age=60"), ("etag", "\"a\""), ("last-modified", &modified)]);
    let whole = kept.ask("/k/1", &[]).await.text();
    let cases: Vec<Parts<'_>> = vec![
        (vec![("range", "bytes=0-2")], 206, &whole[0..3], "bytes 0-2/9"),
        (vec![("range", "bytes=-2")], 206, &whole[7..], "bytes 7-8/9"),
        (vec![("range", "bytes=5-")], 206, &whole[5..], "bytes 5-8/9"),
        (vec![("range", "bytes=9-")], 416, "", "bytes */9"),
        (vec![("range", "bytes=0-1,3-4")], 200, &whole, ""),
        (vec![("range", "nonsense")], 200, &whole, ""),
        (vec![("range", "bytes=0-2"), ("if-range", "\"a\"")], 206, &whole[0..3], "bytes 0-2/9"),
        (vec![("range", "bytes=0-2"), ("if-range", "W/\"a\"")], 200, &whole, ""),
        (vec![("range", "bytes=0-2"), ("if-range", "\"b\"")], 200, &whole, ""),
        (vec![("range", "bytes=0-2"), ("if-range", &modified)], 206, &whole[0..3], "bytes 0-2/9"),
        (vec![("range", "bytes=0-2"), ("if-none-match", "\"a\"")], 304, "", ""),
    ];
    for (fields, status, body, range) in cases {
        let answer = kept.ask("/k/1", &fields).await;
        assert_eq!(
            (answer.status, &*answer.text(), answer.field("content-range")),
            (status, body, range),
            "{fields:?}"
        );
    }
    assert_eq!(kept.origin.count(), 1);
    // Where nothing is kept it goes on as it is, and what comes is a part.
    kept.says_status("206 Partial Content", &[("cache-control", "max-age=60"), ("content-range", "bytes 0-8/20")]);
    assert_eq!(kept.ask("/k/2", &[("range", "bytes=0-8")]).await.status, 206);
    assert_eq!(kept.origin.last().field("range"), "bytes=0-8");
    kept.says(&[("cache-control", "max-age=60")]);
    assert_eq!(kept.ask("/k/2", &[]).await.status, 200);
    kept.says_status("416 Range Not Satisfiable", &[("cache-control", "max-age=60")]);
    assert_eq!(kept.ask("/k/3", &[("range", "bytes=90-")]).await.status, 416);
    kept.says(&[("cache-control", "max-age=60")]);
    assert_eq!(kept.ask("/k/3", &[]).await.status, 200);
}

/// RFC 9111 §5.2.1, §5.4.
#[tokio::test(flavor = "multi_thread")]
async fn clients_may_ask_for_less_or_for_nothing_else() {
    let kept = Kept::start(KEEP).await;
    let said = [("cache-control", "max-age=60"), ("age", "30")];
    let cases: [(&str, &str, bool); 9] = [
        ("cache-control", "no-cache", false),
        ("pragma", "no-cache", false),
        ("cache-control", "max-age=0", false),
        ("cache-control", "max-age=10", false),
        ("cache-control", "max-age=40", true),
        ("cache-control", "min-fresh=10", true),
        ("cache-control", "min-fresh=50", false),
        ("cache-control", "only-if-cached", true),
        ("cache-control", "x", true),
    ];
    for (n, (name, value, expected)) in cases.into_iter().enumerate() {
        let asked = [(name, value)];
        let reused = kept.reuses(&format!("/k/{n}"), "200 OK", &said, [&[], &asked]).await;
        assert_eq!(reused, expected, "{name}: {value}");
    }
    let stale = [("cache-control", "max-age=10"), ("age", "30")];
    for (asked, expected) in [("max-stale=30", true), ("max-stale", true), ("max-stale=10", false)] {
        let asks: [&[(&str, &str)]; 2] = [&[], &[("cache-control", asked)]];
        // Kept for its tag alone.
        let said: Vec<_> = stale.iter().copied().chain([("etag", "\"never\"")]).collect();
        kept.says(&said);
        let path = format!("/k/stale-{asked}");
        let first = kept.ask(&path, asks[0]).await;
        kept.says(&stale);
        assert_eq!(kept.ask(&path, asks[1]).await.body == first.body, expected, "{asked}");
    }
    let count = kept.origin.count();
    let nothing = kept.ask("/k/nothing", &[("cache-control", "only-if-cached")]).await;
    assert_eq!((nothing.status, kept.origin.count()), (504, count));
    // What must not be kept of a request is not.
    assert!(!kept.reuses("/k/no-store", "200 OK", &said, [&[("cache-control", "no-store")], &[]]).await);
}

/// RFC 9111 §4.4.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_ends_what_is_kept_of_its_url() {
    let rest = "routes:\n  - {name: kept, match: {path: /k/**, methods: [GET]}, cache: {}}\n";
    let kept = Kept::start(rest).await;
    for (n, (method, status, expected)) in [
        ("POST", "200 OK", false),
        ("PUT", "204 No Content", false),
        ("DELETE", "200 OK", false),
        ("PATCH", "303 See Other", false),
        ("PROPPATCH", "200 OK", false),
        ("POST", "404 Not Found", true),
        ("POST", "500 Internal Server Error", true),
        ("OPTIONS", "200 OK", true),
    ]
    .into_iter()
    .enumerate()
    {
        kept.says(&[("cache-control", "max-age=60")]);
        let path = format!("/k/{n}");
        let first = kept.ask(&path, &[]).await;
        kept.says_status(status, &[]);
        kept.method(method, &path).await;
        kept.says(&[("cache-control", "max-age=60")]);
        assert_eq!(kept.ask(&path, &[]).await.body == first.body, expected, "{method} {status}");
    }
    // What the answer names on the same host ends, too; elsewhere it has no say.
    kept.says(&[("cache-control", "max-age=60")]);
    for (name, value, expected) in [
        ("location", "/k/named", false),
        ("content-location", "http://shop.example.com/k/named", false),
        ("location", "http://other.example/k/named", true),
    ] {
        kept.says(&[("cache-control", "max-age=60")]);
        let first = kept.ask("/k/named", &[]).await;
        kept.says_status("201 Created", &[(name, value)]);
        kept.method("POST", "/elsewhere").await;
        kept.says(&[("cache-control", "max-age=60")]);
        assert_eq!(kept.ask("/k/named", &[]).await.body == first.body, expected, "{name}: {value}");
    }
}

/// RFC 5861, RFC 9111 §4.2.4.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_serves_while_a_new_one_is_fetched() {
    let kept = Kept::start(KEEP).await;
    kept.says(&[("cache-control", "max-age=1, stale-while-revalidate=60")]);
    let first = kept.ask("/k/1", &[]).await;
    until("it is stale", async || {
        let answer = kept.ask("/k/1", &[]).await;
        assert!(answer.body == first.body || kept.made.load(SeqCst) > 1);
        answer.field("cache-status").contains("ttl=-") || answer.field("cache-status").contains("ttl=0")
    })
    .await;
    until("the new one is there", async || kept.ask("/k/1", &[]).await.body != first.body).await;
    // Nobody waited for it, and one fetched it: the log has a line of its own.
    assert!(kept.made.load(SeqCst) >= 2);
    kept.gateway.access_line(|line| line["cache"] == "stale").await;
    // Where the answer forbids it, nobody has it stale.
    for said in ["max-age=1, stale-while-revalidate=60, must-revalidate", "s-maxage=1, stale-while-revalidate=60"] {
        kept.says(&[("cache-control", said), ("age", "5"), ("etag", "\"x\"")]);
        let path = format!("/k/{}", said.len());
        let first = kept.ask(&path, &[]).await;
        kept.says(&[("cache-control", said), ("age", "5"), ("etag", "\"y\"")]);
        assert_ne!(kept.ask(&path, &[]).await.body, first.body, "{said}");
    }
}

/// RFC 5861 §4: while the monolith is down, what it said before may do.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_old_serves_where_the_upstream_fails() {
    let rest = "defaults: {retry: none, timeout: {request: 2s}}\nroutes:\n  - {name: kept, match: /k/**, cache: {stale_if_error: 10m}}\n";
    let kept = Kept::start(rest).await;
    let old = [("cache-control", "max-age=10"), ("age", "30")];
    for status in ["500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable", "504 Gateway Timeout"] {
        let path = format!("/k/{}", &status[..3]);
        kept.says(&old);
        let first = kept.ask(&path, &[]).await;
        kept.says_status(status, &[]);
        let answer = kept.ask(&path, &[]).await;
        assert_eq!((answer.status, &answer.body), (200, &first.body), "{status}");
        let told = answer.field("cache-status");
        assert!(told.starts_with("gw; fwd=stale; fwd-status=50") && told.contains("ttl=-"), "{told}");
        // For a moment nobody waits for that again; then one looks.
        let count = kept.origin.count();
        let again = kept.ask(&path, &[]).await;
        assert_eq!((again.status, &again.body, kept.origin.count()), (200, &first.body, count));
        kept.says(&[("cache-control", "max-age=60")]);
        until("it is asked again", async || kept.ask(&path, &[]).await.body != first.body).await;
    }
    for status in ["404 Not Found", "501 Not Implemented"] {
        let path = format!("/k/{}", &status[..3]);
        kept.says(&old);
        kept.ask(&path, &[]).await;
        kept.says_status(status, &[("cache-control", "no-store")]);
        assert_ne!(kept.ask(&path, &[]).await.status, 200, "{status}");
    }
    // Not what must be asked about.
    let strict = [("cache-control", "max-age=10, must-revalidate"), ("age", "30"), ("etag", "\"a\"")];
    kept.says(&strict);
    kept.ask("/k/2", &[]).await;
    kept.says_status("503 Service Unavailable", &[]);
    assert_eq!(kept.ask("/k/2", &[]).await.status, 503);
    kept.says(&old);
    kept.ask("/k/3", &[]).await;
    kept.ask("/k/4", &[]).await;
    let Kept { gateway, origin, .. } = kept;
    // It is gone altogether, and then it says nothing.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let hung = dead.local_addr().unwrap();
    let address = origin.address.to_string();
    gateway.flip(&crate::yaml(&[("legacy", "http://127.0.0.1:1".to_owned())], rest)).await;
    let answer = send(gateway.address, "GET", "/k/3", &[], "").await;
    assert_eq!(answer.status, 200);
    assert!(answer.field("cache-status").contains("detail=connection_refused"), "{:?}", answer.headers);
    gateway.flip(&crate::yaml(&[("legacy", format!("http://{hung}"))], rest)).await;
    let answer = send(gateway.address, "GET", "/k/4", &[], "").await;
    assert_eq!(answer.status, 200);
    assert!(answer.field("cache-status").contains("detail=http_response_timeout"), "{:?}", answer.headers);
    assert_eq!(send(gateway.address, "GET", "/k/never", &[], "").await.status, 504);
    drop((dead, address));
}

/// The key has the arm: a flip or a rollback acts at once, and no answer crosses over.
#[tokio::test(flavor = "multi_thread")]
async fn no_answer_crosses_over_to_the_other_arm() {
    let fresh = |name: &'static str| {
        Origin::start(move |_| {
            Reply::new("200 OK", &[("cache-control", "public, max-age=600"), ("etag", "\"1\"")], name)
        })
    };
    let (legacy, orders) = (fresh("legacy").await, fresh("orders").await);
    let text = |rest: &str| {
        crate::yaml(
            &[("legacy", legacy.url()), ("orders", orders.url())],
            &format!("routes:\n  - {{name: kept, match: /k/**, upstream: orders, cache: {{}}, {rest}}}\n"),
        )
    };
    let legacy_stage = text("stage: legacy");
    let migrated = text("stage: migrated");
    let canary = text("stage: canary, canary: {percent: 50%, by: [\"header:x-user\"]}");
    let gateway = Gateway::start(&legacy_stage).await;
    let ask = async |user: &str| send(gateway.address, "GET", "/k/1", &[("x-user", user)], "").await.text();
    assert_eq!(ask("a").await, "legacy");
    gateway.flip(&migrated).await;
    assert_eq!(ask("a").await, "orders");
    gateway.flip(&legacy_stage).await;
    assert_eq!(ask("a").await, "legacy");
    assert_eq!((legacy.count(), orders.count()), (1, 1));
    gateway.flip(&canary).await;
    for user in 0..50 {
        let answer = send(gateway.address, "GET", "/k/1", &[("x-user", &user.to_string())], "").await;
        let line = gateway.file.to_str().unwrap();
        assert!(["legacy", "orders"].contains(&&*answer.text()), "{line}");
        assert!(answer.field("cache-status").starts_with("gw; hit"));
    }
    assert_eq!((legacy.count(), orders.count()), (1, 1));
    // A write through either arm ends what is kept of both.
    send(gateway.address, "POST", "/k/1", &[("x-user", "1")], "x").await;
    let (before_legacy, before_orders) = (legacy.count(), orders.count());
    for user in 0..50 {
        ask(&user.to_string()).await;
    }
    assert_eq!((legacy.count(), orders.count()), (before_legacy + 1, before_orders + 1));
    // What the monolith says in the service's place is the monolith's.
    let dead = |rest: &str| text(rest).replace(&orders.url(), "http://127.0.0.1:1");
    gateway.flip(&dead("stage: migrated, timeout: {attempt: 1s}")).await;
    let fallen = send(gateway.address, "GET", "/k/2", &[], "").await;
    assert_eq!(fallen.text(), "legacy");
    gateway.flip(&migrated).await;
    assert_eq!(send(gateway.address, "GET", "/k/2", &[], "").await.text(), "orders");
    // A tag that both systems use proves nothing about the other's answer.
    let stale = |name: &'static str| {
        Origin::start(move |received| {
            if received.fields("if-none-match") == ["\"1\""] {
                return Reply::Bytes(b"HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\n\r\n".to_vec());
            }
            Reply::new("200 OK", &[("cache-control", "public, no-cache"), ("etag", "\"1\"")], name)
        })
    };
    let (old, new) = (stale("old").await, stale("new").await);
    let upstreams = |new: String| {
        crate::yaml(
            &[("legacy", old.url()), ("orders", new)],
            "routes:\n  - {name: kept, match: /k/**, upstream: orders, stage: migrated, cache: {}}\n",
        )
    };
    gateway.flip(&upstreams(new.url())).await;
    assert_eq!(send(gateway.address, "GET", "/k/3", &[], "").await.text(), "new");
    gateway.flip(&upstreams("http://127.0.0.1:1".to_owned())).await;
    let answer = send(gateway.address, "GET", "/k/3", &[], "").await;
    assert_eq!((answer.status, &*answer.text()), (200, "old"));
}

/// RFC 9111 §5.1, RFC 9211.
#[tokio::test(flavor = "multi_thread")]
async fn every_answer_says_how_old_it_is_and_whose() {
    let kept = Kept::start("routes:\n  - {name: kept, match: /k/**, cache: {default_ttl: 60s}}\n").await;
    kept.says(&[("age", "7"), ("cache-status", "cdn; fwd=miss"), ("date", &date(0)), ("surrogate-key", "a b")]);
    let first = kept.ask("/k/1", &[]).await;
    let statuses = |answer: &Answer| -> Vec<String> {
        answer.headers.get_all("cache-status").iter().map(|value| value.to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(statuses(&first), ["cdn; fwd=miss", "gw; fwd=uri-miss; fwd-status=200; stored"]);
    assert_eq!(first.field("age"), "7");
    let second = kept.ask("/k/1", &[]).await;
    let age: u64 = second.field("age").parse().unwrap();
    assert!((7..30).contains(&age));
    assert_eq!(statuses(&second), [format!("gw; hit; ttl={}", 60 - age)]);
    assert_eq!(second.field("date"), first.field("date"));
    let posted = kept.method("POST", "/k/1").await;
    assert!(posted.field("cache-status").starts_with("cdn; fwd=miss"));
    assert_eq!(statuses(&posted).last().unwrap(), "gw; fwd=method");
    let line = kept.gateway.access_line(|line| line["cache"] == "hit").await;
    assert_eq!((line["arm"].as_str(), line.get("upstream")), (Some("gateway"), None));
    assert_eq!(kept.gateway.metric("gateway_cache_requests_total{route=\"kept\",result=\"hit\"}").await, Some(1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_act_at_once_by_url_prefix_route_and_tag() {
    let rest = "routes:\n  - {name: kept, match: /k/**, cache: {}}\n  - {name: other, match: /o/**, cache: {}}\n";
    let kept = Kept::start(rest).await;
    let purge = async |body: &str| {
        let host = kept.gateway.admin.to_string();
        let fields = [("host", &*host), ("x-gateway-admin", "1")];
        send(kept.gateway.admin, "POST", "/api/cache/purge", &fields, body).await
    };
    let paths = ["/k/a?x=1", "/k/a", "/k/ab", "/o/1"];
    for (body, gone) in [
        (r#"{"url": "http://shop.example.com/k/a?x=1"}"#, vec!["/k/a?x=1"]),
        (r#"{"url": "/k/a"}"#, vec!["/k/a"]),
        (r#"{"url": "http://elsewhere.example/k/a"}"#, vec![]),
        (r#"{"prefix": "http://shop.example.com/k/a"}"#, vec!["/k/a?x=1", "/k/a", "/k/ab"]),
        (r#"{"prefix": "/o"}"#, vec!["/o/1"]),
        (r#"{"route": "other"}"#, vec!["/o/1"]),
        (r#"{"tag": "even"}"#, vec!["/k/a?x=1", "/k/ab"]),
        (r#"{"all": true}"#, paths.to_vec()),
    ] {
        let mut before = Vec::new();
        for (n, path) in paths.iter().enumerate() {
            let tag = if n % 2 == 0 { "even x" } else { "odd" };
            kept.says(&[("cache-control", "max-age=600"), ("surrogate-key", tag)]);
            before.push(kept.ask(path, &[]).await.body);
        }
        let answer = purge(body).await;
        assert_eq!((answer.status, answer.json()["resources"].as_u64()), (200, Some(gone.len() as u64)), "{body}");
        for (path, before) in paths.iter().zip(&before) {
            assert_eq!(kept.ask(path, &[]).await.body != *before, gone.contains(path), "{body} {path}");
        }
        purge(r#"{"all": true}"#).await;
    }
    for bad in
        ["", "{}", "[]", r#"{"url": "x y"}"#, r#"{"url": "/a", "tag": "b"}"#, r#"{"all": false}"#, r#"{"uri": "/a"}"#]
    {
        let answer = purge(bad).await;
        assert_eq!(answer.status, 400, "{bad}");
        assert!(answer.json()["detail"].as_str().unwrap().contains("surrogate key"), "{bad}");
    }
    assert_eq!(purge(r#"{"route": "none"}"#).await.status, 404);
    // Not without the field that no page can send.
    let host = kept.gateway.admin.to_string();
    assert_eq!(send(kept.gateway.admin, "POST", "/api/cache/purge", &[("host", &host)], "{}").await.status, 403);
}

/// A hit is a request that the origin does not have: Zipf's traffic over more than there is memory for.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_hit_is_what_the_origin_is_spared() {
    const RESOURCES: u32 = 2_000;
    const REQUESTS: u32 = 20_000;
    let body = "x".repeat(4_000);
    let origin = Origin::start(move |_| Reply::new("200 OK", &[("cache-control", "max-age=600")], &body)).await;
    // Room for about a quarter of it.
    let text = format!("cache: {{memory: 2MiB}}\n{}", crate::yaml(&[("legacy", origin.url())], KEEP));
    let gateway = Gateway::start(&text).await;
    // The n-th most popular is asked for as often as 1/n says.
    let total: f64 = (1..=RESOURCES).map(|n| 1.0 / f64::from(n)).sum();
    let popular = move |draw: f64| {
        let mut left = draw * total;
        (1..=RESOURCES).find(|n| {
            left -= 1.0 / f64::from(*n);
            left <= 0.0
        })
    };
    let clients: Vec<_> = (0..8_u64)
        .map(|seed| {
            let address = gateway.address;
            tokio::spawn(async move {
                let (mut client, mut hits) = (Client::new(address), 0);
                let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
                for _ in 0..REQUESTS / 8 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let draw = f64::from(u32::try_from(state >> 32).unwrap()) / f64::from(u32::MAX);
                    let path = format!("/k/{}", popular(draw).unwrap_or(RESOURCES));
                    let answer = client.send(request("GET", &path, &[], "")).await.unwrap();
                    assert_eq!(answer.body.len(), 4_000);
                    let told = answer.field("cache-status");
                    hits += u32::from(told.starts_with("gw; hit") || told.contains("collapsed"));
                }
                hits
            })
        })
        .collect();
    let mut hits = 0;
    for client in clients {
        hits += client.await.unwrap();
    }
    let rate = f64::from(hits) / f64::from(REQUESTS);
    println!("{hits} of {REQUESTS} hit ({:.1} %), the origin had {}", rate * 100.0, origin.count());
    assert_eq!(origin.count(), (REQUESTS - hits) as usize);
    assert!(rate >= 0.7, "{rate}");
    let bytes = gateway.api("/api/status").await["cache"]["bytes"].as_u64().unwrap();
    assert!(bytes <= 2 * 1024 * 1024, "{bytes}");
}

/// A visitor with a cookie, or with `no-store`, once emptied the cache for everybody; and a site's own sessions kept others from waiting.
#[tokio::test(flavor = "multi_thread")]
async fn what_one_client_asks_ends_nobodys_copy() {
    let kept = Kept::start(KEEP).await;
    for (n, (asked, answered)) in [
        (("cookie", "session=1"), "max-age=60"),
        (("cookie", "session=1"), "private"),
        (("authorization", "Basic YTpi"), "no-store"),
        (("cache-control", "no-store, no-cache"), "max-age=60"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("/k/{n}");
        kept.says(&[("cache-control", "max-age=60"), ("etag", "\"a\"")]);
        let first = kept.ask(&path, &[]).await;
        kept.says(&[("cache-control", answered)]);
        assert_ne!(kept.ask(&path, &[asked]).await.body, first.body);
        assert_eq!(kept.ask(&path, &[]).await.body, first.body, "{asked:?} {answered}");
    }
    // Nor where the upstream says that what is kept is still good.
    let old = [("cache-control", "max-age=10"), ("age", "30"), ("etag", "\"a\"")];
    kept.says(&old);
    let first = kept.ask("/k/old", &[]).await;
    kept.ask("/k/old", &[("cache-control", "no-store")]).await;
    kept.ask("/k/old", &[]).await;
    assert_eq!(kept.origin.last().field("if-none-match"), "\"a\"");
    assert_eq!(kept.ask("/k/old", &[]).await.body, first.body);
    // An answer that is no longer for others ends what was.
    kept.says(&[("cache-control", "private"), ("etag", "\"b\"")]);
    kept.ask("/k/old", &[]).await;
    kept.ask("/k/old", &[]).await;
    assert!(kept.origin.last().fields("if-none-match").is_empty());
}

/// What a 304 brings of its own reaches its client, and one about another answer is not believed.
#[tokio::test(flavor = "multi_thread")]
async fn a_304_is_about_what_it_names() {
    let first = AtomicUsize::new(0);
    let origin = Origin::start(move |received| {
        let path = received.line().split(' ').nth(1).unwrap_or_default().to_owned();
        let number = first.fetch_add(1, SeqCst);
        let asked = !received.fields("if-none-match").is_empty() || !received.fields("if-modified-since").is_empty();
        match &*path {
            "/k/cookie" if asked => {
                Reply::Bytes(b"HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\nset-cookie: a=b\r\n\r\n".to_vec())
            }
            "/k/other" if asked => Reply::Bytes(b"HTTP/1.1 304 Not Modified\r\netag: \"2\"\r\n\r\n".to_vec()),
            "/k/private" if asked => {
                Reply::Bytes(b"HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\ncache-control: private\r\n\r\n".to_vec())
            }
            _ => {
                let fields = [("cache-control", "public, no-cache"), ("etag", "\"1\"")];
                Reply::new("200 OK", &fields, &format!("answer {number}"))
            }
        }
    })
    .await;
    let gateway = Gateway::start(&crate::yaml(&[("legacy", origin.url())], KEEP)).await;
    let ask = async |path: &str| send(gateway.address, "GET", path, &[], "").await;
    let one = ask("/k/cookie").await;
    let two = ask("/k/cookie").await;
    assert_eq!((two.status, &two.body, two.field("set-cookie")), (200, &one.body, "a=b"));
    assert_eq!(send(gateway.address, "GET", "/k/cookie", &[("if-none-match", "\"1\"")], "").await.status, 304);
    // Its tag is another's: the whole is asked for.
    let one = ask("/k/other").await;
    let two = ask("/k/other").await;
    assert_eq!((two.status, two.field("etag")), (200, "\"1\""));
    assert_ne!(two.body, one.body);
    // What must not be kept any more is said as it is now.
    let one = ask("/k/private").await;
    let two = ask("/k/private").await;
    assert_eq!((&two.body, two.field("cache-control")), (&one.body, "private"));
    assert_ne!(ask("/k/private").await.body, one.body);
}

/// A HEAD that the monolith answered in the service's place once carried the service's body to the monolith's arm; what the monolith
/// said to the service's cohort went to the others.
#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_for_the_service_stays_with_the_services_cohort() {
    let legacy = Origin::start(|received| {
        if received.line().starts_with("HEAD") {
            return Reply::Bytes(b"HTTP/1.1 200 OK\r\ncache-control: public, max-age=60\r\n\r\n".to_vec());
        }
        let cohort = received.field("x-gateway-cohort");
        Reply::new("200 OK", &[("cache-control", "public, max-age=60")], &format!("legacy for {cohort}"))
    })
    .await;
    let orders =
        Origin::start(|_| Reply::new("200 OK", &[("cache-control", "public, no-cache"), ("etag", "\"1\"")], "orders"))
            .await;
    let text = |url: String| {
        let routes = "routes:\n  - {name: kept, match: /k/**, upstream: orders, stage: canary, cache: {}, canary: {percent: 0%, by: [\"header:x-user\"], always: [{header: {x-beta: \"1\"}}]}}\n";
        crate::yaml(&[("legacy", legacy.url()), ("orders", url)], routes)
    };
    let gateway = Gateway::start(&text(orders.url())).await;
    let beta = [("x-beta", "1")];
    assert_eq!(send(gateway.address, "GET", "/k/1", &beta, "").await.text(), "orders");
    gateway.flip(&text("http://127.0.0.1:1".to_owned())).await;
    let head = b"HEAD /k/1 HTTP/1.1\r\nhost: shop.example.com\r\nx-beta: 1\r\nconnection: close\r\n\r\n";
    assert!(raw(gateway.address, head, |_| false).await.starts_with("HTTP/1.1 200"));
    assert_eq!(send(gateway.address, "GET", "/k/2", &beta, "").await.text(), "legacy for kept=service");
    assert_eq!(send(gateway.address, "GET", "/k/1", &[], "").await.text(), "legacy for kept=legacy");
    assert_eq!(send(gateway.address, "GET", "/k/2", &[], "").await.text(), "legacy for kept=legacy");
}
