//! What the stub answers.
//!
//! Any request may ask for trouble in its query: `stub_delay_ms=200`, `stub_status=503`,
//! `stub_cut=1` (the response breaks off in its body). `PUT /_stub/defects` with `orders=number` as its body gives it a defect, or
//! with an empty one takes them all away; `GET /_stub/counts` says what it was asked.

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header,
};
use serde_json::{Value, json};

use crate::{Defect, Part, Stub, live};

type Answer = Response<BoxBody<Bytes, std::io::Error>>;

/// A request, taken apart.
struct Asked<'a> {
    method: &'a Method,
    path: &'a str,
    query: &'a str,
    headers: &'a hyper::HeaderMap,
}

impl Asked<'_> {
    fn parameter(&self, name: &str) -> Option<&str> {
        self.query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.parameter(name)?.parse().ok()
    }
}

pub(crate) async fn answer(stub: Arc<Stub>, request: Request<Incoming>) -> Result<Answer, Infallible> {
    let path = request.uri().path().to_owned();
    if path == "/_stub/counts" {
        let counts = stub.counts.lock().map(|counts| json!(*counts)).unwrap_or_default();
        return Ok(json_answer(StatusCode::OK, &counts));
    }
    let resource = path.strip_prefix("/api").unwrap_or(&path).trim_matches('/').to_owned();
    if resource == "notifications/ws" {
        stub.count("GET notifications/ws");
        return Ok(match live::websocket(request) {
            Some(response) => response.map(|()| full("")),
            None => html(StatusCode::UPGRADE_REQUIRED, "this is a WebSocket"),
        });
    }
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    if path == "/_stub/defects" && parts.method == Method::PUT {
        return Ok(match stub.spoil(&String::from_utf8_lossy(&body)) {
            Ok(()) => json_answer(StatusCode::OK, &json!({"ok": true})),
            Err(why) => json_answer(StatusCode::BAD_REQUEST, &json!({"error": why})),
        });
    }
    let asked = Asked {
        method: &parts.method,
        path: &path,
        query: parts.uri.query().unwrap_or_default(),
        headers: &parts.headers,
    };
    let endpoint = resource.split('/').next().unwrap_or_default().to_owned();
    stub.count("requests");
    stub.count(&format!("{} {endpoint}", asked.method));
    if let Some(delay) = asked.number("stub_delay_ms") {
        tokio::time::sleep(Duration::from_millis(delay.min(600_000))).await;
    }
    let defect = stub.defect(&endpoint);
    if defect == Some(Defect::Slow) {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let mut response = match (asked.number("stub_status"), defect) {
        (Some(status), _) => {
            let status = u16::try_from(status).ok().and_then(|status| StatusCode::from_u16(status).ok());
            json_answer(status.unwrap_or(StatusCode::IM_A_TEAPOT), &json!({"asked": "for it"}))
        }
        (None, Some(defect)) if defect == Defect::Error || (defect == Defect::Reads && asked.method.is_safe()) => {
            json_answer(StatusCode::INTERNAL_SERVER_ERROR, &json!({"error": "database is locked"}))
        }
        (None, Some(Defect::Missing)) => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not found"})),
        (None, defect) => find(&stub, &asked, &resource, &body, defect),
    };
    if asked.parameter("stub_cut").is_some() {
        response = cut();
    }
    if let Ok(value) = stub.part.word().parse() {
        response.headers_mut().insert("x-served-by", value);
    }
    Ok(response)
}

fn find(stub: &Stub, asked: &Asked<'_>, resource: &str, body: &Bytes, defect: Option<Defect>) -> Answer {
    let segments: Vec<&str> = resource.split('/').collect();
    let plays = |part: Part| stub.part == Part::Monolith || stub.part == part;
    let is_get = matches!(*asked.method, Method::GET | Method::HEAD);
    let monolith = stub.part == Part::Monolith;
    match segments.as_slice() {
        ["echo", ..] => echo(asked, body),
        ["healthz"] => json_answer(StatusCode::OK, &json!({"ok": true})),
        [""] if monolith && is_get => {
            html(StatusCode::OK, "<a href=\"/api/products\">products</a> <a href=\"/login\">log in</a>")
        }
        ["login"] if monolith => login(stub, asked),
        ["account"] if monolith && is_get => account(stub, asked),
        ["users", rest @ ..] if plays(Part::Users) && is_get => things(rest, defect, |id| stub.shop().user(id)),
        ["products", rest @ ..] if plays(Part::Products) && is_get => {
            things(rest, defect, |id| stub.shop().product(id))
        }
        ["orders", rest @ ..] if plays(Part::Orders) => orders(stub, asked, rest, body, defect),
        ["payments", rest @ ..] if plays(Part::Payments) && is_get => {
            things(rest, defect, |id| stub.shop().payment(id))
        }
        ["notifications", "stream"] if plays(Part::Notifications) && is_get => stream(stub, asked),
        ["notifications", rest @ ..] if plays(Part::Notifications) && is_get => {
            things(rest, defect, |id| Some(stub.shop().notification(id)))
        }
        _ => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not found", "path": asked.path})),
    }
}

/// One thing, or the first ten.
fn things(rest: &[&str], defect: Option<Defect>, make: impl Fn(u64) -> Option<Value>) -> Answer {
    let spoil = |mut thing: Value| {
        if let Some(map) = thing.as_object_mut() {
            let numbers: Vec<String> = map.keys().filter(|key| *key != "id" && map[*key].is_u64()).cloned().collect();
            match (defect, map.keys().next_back().cloned(), numbers.first()) {
                (Some(Defect::Field), Some(last), _) => {
                    map.remove(&last);
                }
                (Some(Defect::Number), _, Some(key)) => {
                    map.insert(key.clone(), json!(map[key].as_u64().unwrap_or_default() + 1));
                }
                _ => {}
            }
        }
        thing
    };
    match rest {
        [] => json_answer(StatusCode::OK, &(1..=10).filter_map(|id| make(id).map(spoil)).collect()),
        [id] => match id.parse().ok().and_then(&make) {
            Some(thing) => json_answer(StatusCode::OK, &spoil(thing)),
            None => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not found"})),
        },
        _ => json_answer(StatusCode::NOT_FOUND, &json!({"error": "not found"})),
    }
}

fn orders(stub: &Stub, asked: &Asked<'_>, rest: &[&str], body: &Bytes, defect: Option<Defect>) -> Answer {
    let id = || rest.first().and_then(|id| id.parse::<u64>().ok());
    match (asked.method, rest) {
        (&Method::POST, []) => {
            let asked: Value = serde_json::from_slice(body).unwrap_or_default();
            let order =
                stub.shop().place(asked["product"].as_u64().unwrap_or(1), asked["quantity"].as_u64().unwrap_or(1));
            let mut response = json_answer(StatusCode::CREATED, &order);
            // As so many monoliths do: an absolute URL with its own address.
            located(&mut response, &format!("http://{}/api/orders/{}", stub.address, order["id"]));
            response
        }
        (&Method::PUT, [_]) => {
            let status: Value = serde_json::from_slice(body).unwrap_or_default();
            let changed =
                id().and_then(|id| stub.shop().change(id, Some(status["status"].as_str().unwrap_or("changed"))));
            changed.map_or_else(missing, |order| json_answer(StatusCode::OK, &order))
        }
        (&Method::DELETE, [_]) => {
            let deleted = id().and_then(|id| stub.shop().change(id, None));
            deleted.map_or_else(missing, |_| {
                let mut response = html(StatusCode::NO_CONTENT, "");
                *response.body_mut() = full("");
                response.headers_mut().remove(header::CONTENT_TYPE);
                response
            })
        }
        (&Method::GET | &Method::HEAD, _) => things(rest, defect, |id| stub.shop().order(id)),
        _ => json_answer(StatusCode::METHOD_NOT_ALLOWED, &json!({"error": "method not allowed"})),
    }
}

fn missing() -> Answer {
    json_answer(StatusCode::NOT_FOUND, &json!({"error": "not found"}))
}

fn located(response: &mut Answer, url: &str) {
    if let Ok(value) = url.parse() {
        response.headers_mut().insert(header::LOCATION, value);
    }
}

fn login(stub: &Stub, asked: &Asked<'_>) -> Answer {
    if *asked.method != Method::POST {
        return html(StatusCode::OK, "<form method=\"post\"><input name=\"user\"><button>log in</button></form>");
    }
    let mut response = html(StatusCode::SEE_OTHER, "");
    located(&mut response, &format!("http://{}/account", stub.address));
    let cookie =
        format!("session=s-{}; Domain={}; Path=/; HttpOnly", asked.number("user").unwrap_or(1), stub.address.ip());
    if let Ok(value) = cookie.parse() {
        response.headers_mut().append(header::SET_COOKIE, value);
    }
    response
}

fn account(stub: &Stub, asked: &Asked<'_>) -> Answer {
    let cookies = asked.headers.get(header::COOKIE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let user = cookies.split(';').find_map(|pair| pair.trim().strip_prefix("session=s-"));
    if let Some(user) = user.and_then(|id| id.parse().ok()).and_then(|id| stub.shop().user(id)) {
        html(StatusCode::OK, &format!("Hello {}", user["name"].as_str().unwrap_or_default()))
    } else {
        let mut response = html(StatusCode::FOUND, "");
        located(&mut response, &format!("http://{}/login", stub.address));
        response
    }
}

fn stream(stub: &Stub, asked: &Asked<'_>) -> Answer {
    let every = Duration::from_millis(asked.number("every_ms").unwrap_or(1000));
    let notes: Vec<Value> = (1..=10).map(|id| stub.shop().notification(id)).collect();
    let make = move |n: u64| notes[usize::try_from(n % 10).unwrap_or(0)].to_string();
    let events = live::events(every, asked.number("count").unwrap_or(1000), make);
    let mut response = Response::new(BoxBody::new(events));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream"));
    response
}

/// The request as it came in: what a test wants to see.
fn echo(asked: &Asked<'_>, body: &Bytes) -> Answer {
    let headers: Vec<(String, String)> = asked
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let target = if asked.query.is_empty() { asked.path.to_owned() } else { format!("{}?{}", asked.path, asked.query) };
    json_answer(
        StatusCode::OK,
        &json!({"method": asked.method.as_str(), "target": target, "headers": headers, "body": String::from_utf8_lossy(body)}),
    )
}

/// A response whose body breaks off.
fn cut() -> Answer {
    let (sender, stream) = live::Stream::new();
    tokio::spawn(async move {
        let _ = sender.send(Ok(Frame::data(Bytes::from_static(b"{\"half\":")))).await;
        let _ = sender.send(Err(std::io::Error::other("cut on demand"))).await;
    });
    Response::new(BoxBody::new(stream))
}

fn full(text: impl Into<Bytes>) -> BoxBody<Bytes, std::io::Error> {
    Full::new(text.into()).map_err(live::whole).boxed()
}

fn json_answer(status: StatusCode, value: &Value) -> Answer {
    let mut response = Response::new(full(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}

fn html(status: StatusCode, inner: &str) -> Answer {
    let page = format!("<!doctype html><title>The shop</title><h1>The shop</h1><p>{inner}</p>\n");
    let mut response = Response::new(full(page));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/html; charset=utf-8"));
    response
}
