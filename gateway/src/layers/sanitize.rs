//! Makes sure that router, cache and upstream all see the same request, and only what its sender may say.
//!
//! One pass over the names finds what goes: fields of the connection, fields in which
//! only the gateway speaks, forwarding fields of strangers. The path loses what could be read
//! in two ways, or the request is refused.

use std::future::{Ready, ready};

use bytes::Bytes;
use futures_util::future::Either;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header, uri::PathAndQuery};
use tower::Service;

use super::{always_ready, forwarded};
use crate::{
    body::ResponseBody,
    context::{Context, Request, Response},
    error::{Error, Kind},
    fields::{self, ClaimFields, Voice},
    http1::head::{self, MAX_FIELDS},
    routing::path,
    telemetry::trace,
    upstream::upload::RequestBody,
};

/// The layer.
#[derive(Clone, Debug)]
pub struct Sanitize<S> {
    inner: S,
}

impl<S> Sanitize<S> {
    /// Around all that looks at the request.
    pub fn new(inner: S) -> Self {
        Self { inner }
    }
}

impl<S> Service<Request> for Sanitize<S>
where
    S: Service<Request, Response = Response, Error = Error>,
{
    type Response = Response;
    type Error = Error;
    type Future = Either<S::Future, Ready<Result<Response, Error>>>;

    always_ready!();

    fn call(&mut self, mut request: Request) -> Self::Future {
        match sanitize(&mut request) {
            Ok(None) => Either::Left(self.inner.call(request)),
            Ok(Some(answer)) => {
                request.discard();
                Either::Right(ready(Ok(answer)))
            }
            Err(kind) => {
                request.discard();
                Either::Right(ready(Err(Error::new(kind))))
            }
        }
    }
}

/// Makes the request one that has a single reading; an answer where it asks the gateway itself.
fn sanitize(request: &mut Request) -> Result<Option<Response>, Kind> {
    let Request { http, context } = request;
    if let Some(refused) = context.refused.get() {
        return Err(refused);
    }
    if http.method() == Method::CONNECT {
        return Err(Kind::BadRequest("`CONNECT` is not served here; this is no tunnel"));
    }
    let snapshot = context.snapshot();
    let trusted = !snapshot.trusted_proxies.is_empty() && snapshot.trusts(context.connection.peer);
    let seen = look(http.headers(), trusted, context, &snapshot.claim_fields);
    context.authorized.set(seen.authorized);
    context.cookies.set(seen.cookies > 0);
    http.body_mut().forbid(&snapshot.claim_fields);
    if http.version() == Version::HTTP_2 {
        hold_to_http1(http, &seen, snapshot.clients.max_uri)?;
    }
    if seen.looped {
        return Err(Kind::Loop);
    }
    let host = host(http, &seen, |host| context.connection.has_said(host))?;
    let _ = context.host.set(host.clone());
    if let Some(answer) = max_forwards(http, &seen, &host)? {
        return Ok(Some(answer));
    }
    let headers = http.headers_mut();
    for name in seen.doomed {
        headers.remove(name);
    }
    if seen.host.as_ref() != Some(&host) {
        headers.insert(header::HOST, host.clone());
    }
    if seen.baggage {
        strip_baggage(headers);
    }
    if seen.cookies > 1 && context.version == Version::HTTP_2 {
        join_cookies(headers);
    }
    if seen.trailers {
        // What says that trailers are welcome is of each connection, and must be named as such (RFC 9110 §10.1.4).
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
    }
    let client = forwarded::apply(headers, &context.connection, &host, trusted, snapshot);
    context.client.set(client.address);
    context.https.set(client.https);
    let _ = context.asked.set(client.asked);
    request_id(headers, seen.id, context);
    if let Some(tracer) = &snapshot.tracer {
        // Two are none (W3C Trace Context §3.2).
        let given = seen.traceparent.as_ref().filter(|_| seen.traceparents == 1);
        let random = || context.worker.random();
        let trace = trace::begin(headers, given, seen.tracestate, trusted, tracer.sample, &random);
        context.trace.set(Some(trace));
    }
    headers.append(header::VIA, context.worker.via.of(context.version));
    let is_get = *http.method() == Method::GET;
    // One with a body would have to be told apart from what follows the upgrade.
    let upgrade = seen.websocket && seen.asks_upgrade && http.version() == Version::HTTP_11 && is_get;
    context.upgrade.set(upgrade && context.upload.is_empty());

    if http.uri().path() == "*" {
        if http.method() != Method::OPTIONS {
            return Err(Kind::BadRequest("only `OPTIONS` asks for `*`"));
        }
        // The server as a whole: the monolith's to answer.
        *http.uri_mut() = Uri::from_static("*");
    } else {
        let (forward, key, literal) = {
            let read = path::read(http.uri().path(), snapshot.paths).map_err(Kind::Path)?;
            (owned(read.forward), owned(read.key), read.literal)
        };
        if let Some(literal) = literal {
            let _ = context.literal.set(literal);
        }
        if let Some(key) = key {
            let _ = context.key.set(key);
        }
        set_target(http, forward)?;
    }
    *http.version_mut() = Version::HTTP_11;
    Ok(None)
}

fn owned<B: ?Sized + ToOwned>(text: std::borrow::Cow<'_, B>) -> Option<B::Owned> {
    match text {
        std::borrow::Cow::Owned(owned) => Some(owned),
        std::borrow::Cow::Borrowed(_) => None,
    }
}

/// The host that the client asks for: that of the target where it has one (RFC 9112 §3.2.2, RFC 9113 §8.3.1).
fn host<B>(request: &http::Request<B>, seen: &Seen, said: impl Fn(&HeaderValue) -> bool) -> Result<HeaderValue, Kind> {
    if seen.hosts > 1 {
        return Err(Kind::BadRequest("several `Host` fields; send one"));
    }
    let uri = request.uri();
    let Some(authority) = uri.authority().map(http::uri::Authority::as_str) else {
        return match &seen.host {
            Some(host) if said(host) || is_host(host.as_bytes()) => Ok(host.clone()),
            Some(_) => Err(Kind::BadRequest("malformed `Host`")),
            None if request.version() == Version::HTTP_10 => Ok(HeaderValue::from_static("")),
            None => Err(Kind::BadRequest("no `Host` field; send one")),
        };
    };
    if !matches!(uri.scheme_str(), Some("http" | "https")) {
        return Err(Kind::BadRequest("malformed request target; it begins with `/`, or with `http://`"));
    }
    if authority.contains('@') {
        return Err(Kind::BadRequest("credentials in the request target; leave them out"));
    }
    if !is_host(authority.as_bytes()) || authority.is_empty() {
        return Err(Kind::BadRequest("malformed host in the request target"));
    }
    let host = seen.host.as_ref();
    // RFC 9113 §8.3.1 has no rule for which of two would be believed; RFC 9112 §3.2.2 has.
    if request.version() == Version::HTTP_2
        && host.is_some_and(|host| !host.as_bytes().eq_ignore_ascii_case(authority.as_bytes()))
    {
        return Err(Kind::BadRequest("`Host` differs from `:authority`; leave it out"));
    }
    if request.version() == Version::HTTP_11 && host.is_none_or(|host| !is_host(host.as_bytes())) {
        return Err(Kind::BadRequest("no `Host` field, or a malformed one; send it also with a whole target"));
    }
    HeaderValue::from_str(authority).map_err(|_| Kind::BadRequest("malformed host"))
}

/// Whether a text is a name or an address with at most one port: what two servers could read as two hosts is none.
fn is_host(host: &[u8]) -> bool {
    let (name, rest) = match host.strip_prefix(b"[") {
        Some(inside) => match inside.iter().position(|byte| *byte == b']') {
            Some(end) => (&inside[..end], &inside[end + 1..]),
            None => return false,
        },
        None => host.split_at(host.iter().position(|byte| *byte == b':').unwrap_or(host.len())),
    };
    let bracketed = host.starts_with(b"[");
    let valid =
        |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=".contains(byte) || (bracketed && *byte == b':');
    let port = rest.strip_prefix(b":").unwrap_or(rest);
    name.iter().all(valid) && (rest.is_empty() || rest.starts_with(b":")) && port.iter().all(u8::is_ascii_digit)
}

/// Holds a request of HTTP/2 to the rules that the reader of HTTP/1.1 has: it goes on as such.
fn hold_to_http1(request: &mut http::Request<RequestBody>, seen: &Seen, max_uri: usize) -> Result<(), Kind> {
    let target = request.uri().path_and_query().map_or("", PathAndQuery::as_str);
    if target.len() > max_uri {
        return Err(Kind::UriTooLong);
    }
    if !target.bytes().all(|byte| byte.is_ascii_graphic()) || !target.starts_with(['/', '*']) {
        return Err(Kind::BadRequest("malformed request target; escape what is no URI character"));
    }
    // A cookie may come in crumbs, and goes on as one.
    if request.headers().len() - seen.cookies.saturating_sub(1) > MAX_FIELDS {
        return Err(Kind::HeaderTooLarge);
    }
    if *request.method() == Method::TRACE && !request.body().upload().is_empty() {
        return Err(Kind::BadRequest("a TRACE has no body"));
    }
    let Some(length) = &seen.length else { return Ok(()) };
    let number = head::length(length.as_bytes()).filter(|_| seen.lengths == 1);
    let number = number.ok_or(Kind::BadRequest("malformed `Content-Length`; send one number"))?;
    request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(number));
    Ok(())
}

/// What one look at all fields found.
#[derive(Default)]
#[allow(clippy::struct_excessive_bools, reason = "what was found and what was not")]
struct Seen {
    length: Option<HeaderValue>,
    lengths: usize,
    host: Option<HeaderValue>,
    hosts: usize,
    /// What must not go on.
    doomed: Vec<HeaderName>,
    websocket: bool,
    asks_upgrade: bool,
    trailers: bool,
    baggage: bool,
    cookies: usize,
    authorized: bool,
    id: Option<HeaderValue>,
    traceparent: Option<HeaderValue>,
    traceparents: usize,
    tracestate: bool,
    max_forwards: Option<HeaderValue>,
    looped: bool,
}

/// Looks at every field once.
fn look(headers: &HeaderMap, trusted: bool, context: &Context, claims: &ClaimFields) -> Seen {
    let mut seen = Seen::default();
    for (name, value) in headers {
        let text = name.as_str();
        if fields::is_hop_by_hop(text) {
            match *name {
                header::CONNECTION => {
                    fields::named_by(value, &mut seen.doomed);
                    seen.asks_upgrade |= fields::tokens(value).any(|token| token.eq_ignore_ascii_case(b"upgrade"));
                }
                header::UPGRADE => {
                    seen.websocket |= fields::tokens(value).any(|token| token.eq_ignore_ascii_case(b"websocket"));
                }
                header::TE => {
                    seen.trailers |= fields::tokens(value).any(|token| token.eq_ignore_ascii_case(b"trailers"));
                }
                _ => {}
            }
            seen.doomed.push(name.clone());
            continue;
        }
        // Told apart by length first: this runs for every field of every request.
        match text.len() {
            3 if *name == header::VIA => seen.looped |= context.worker.via.is_in(value.as_bytes()),
            4 if *name == header::HOST => {
                seen.hosts += 1;
                seen.host = Some(value.clone());
            }
            6 if *name == header::COOKIE => seen.cookies += 1,
            // RFC 9110 §10.1.1: an old client cannot wait for an answer to it.
            6 if *name == header::EXPECT && context.version == Version::HTTP_10 => seen.doomed.push(name.clone()),
            7 if *name == fields::BAGGAGE => seen.baggage = true,
            13 if *name == header::AUTHORIZATION => seen.authorized = true,
            14 if *name == header::CONTENT_LENGTH => {
                seen.lengths += 1;
                seen.length = Some(value.clone());
            }
            11 if *name == fields::TRACEPARENT => {
                seen.traceparents += 1;
                seen.traceparent = Some(value.clone());
            }
            10 if *name == fields::TRACESTATE => seen.tracestate = true,
            12 if *name == header::MAX_FORWARDS => seen.max_forwards = Some(value.clone()),
            12 if *name == fields::X_REQUEST_ID => {
                if seen.id.is_none() {
                    seen.id = Some(value.clone());
                }
            }
            _ if claims.have(text) => seen.doomed.push(name.clone()),
            _ => match fields::voice(text) {
                Some(voice) if voice == Voice::Gateway || !trusted => seen.doomed.push(name.clone()),
                None if fields::is_method_override(text) => context.overridden.set(true),
                Some(_) | None => {}
            },
        }
    }
    seen
}

/// Counts `Max-Forwards` down, and answers at its end as the last who is asked (RFC 9110 §7.6.2).
fn max_forwards<B>(request: &mut http::Request<B>, seen: &Seen, host: &HeaderValue) -> Result<Option<Response>, Kind> {
    let Some(value) = &seen.max_forwards else { return Ok(None) };
    if !matches!(*request.method(), Method::OPTIONS | Method::TRACE) {
        return Ok(None);
    }
    let left: Option<u64> =
        value.to_str().ok().filter(|text| !text.starts_with('+')).and_then(|text| text.parse().ok());
    match left {
        None => Err(Kind::BadRequest("malformed `Max-Forwards`; send one number")),
        Some(0) => Ok(Some(last_asked(request, host))),
        Some(left) => {
            request.headers_mut().insert(header::MAX_FORWARDS, HeaderValue::from(left - 1));
            Ok(None)
        }
    }
}

/// The gateway's own answer to `OPTIONS` and `TRACE`.
fn last_asked<B>(request: &http::Request<B>, host: &HeaderValue) -> Response {
    let mut text = Vec::new();
    if request.method() == Method::TRACE {
        let target = request.uri().path_and_query().map_or("*", PathAndQuery::as_str);
        text.extend_from_slice(format!("TRACE {target} HTTP/1.1\r\n").as_bytes());
        let secret = [header::AUTHORIZATION, header::PROXY_AUTHORIZATION, header::COOKIE];
        for (name, value) in request.headers().iter().filter(|(name, _)| !secret.contains(name)) {
            let value = if *name == header::HOST { host } else { value };
            text.extend_from_slice(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
        text.extend_from_slice(b"\r\n");
    }
    let mut response = http::Response::new(ResponseBody::Full(text.into()));
    let (name, value) = match *request.method() {
        Method::TRACE => (header::CONTENT_TYPE, "message/http"),
        _ => (header::ALLOW, "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE"),
    };
    response.headers_mut().insert(name, HeaderValue::from_static(value));
    response
}

/// Takes our member out of a client's `baggage`.
fn strip_baggage(headers: &mut HeaderMap) {
    let ours = |member: &&[u8]| {
        let key = member.split(|byte| matches!(byte, b'=' | b';')).next().unwrap_or_default();
        key.trim_ascii().eq_ignore_ascii_case(fields::BAGGAGE_MEMBER.as_bytes())
    };
    let values: Vec<HeaderValue> = headers.get_all(fields::BAGGAGE).iter().cloned().collect();
    headers.remove(fields::BAGGAGE);
    for value in values {
        let members = || value.as_bytes().split(|byte| *byte == b',');
        if !members().any(|member| ours(&member)) {
            headers.append(fields::BAGGAGE, value);
            continue;
        }
        let kept: Vec<&[u8]> = members().filter(|member| !ours(member)).collect();
        // Its reader takes the blanks around it away, so nobody sees another value than was meant.
        if let (false, Ok(value)) = (kept.is_empty(), HeaderValue::from_bytes(kept.join(&b","[..]).trim_ascii())) {
            headers.append(fields::BAGGAGE, value);
        }
    }
}

/// HTTP/2 may split a `Cookie` (RFC 9113 §8.2.3); HTTP/1.1 may not.
fn join_cookies(headers: &mut HeaderMap) {
    let values = headers.get_all(header::COOKIE).iter().map(|value| value.as_bytes().trim_ascii());
    let parts: Vec<&[u8]> = values.filter(|value| !value.is_empty()).collect();
    if let Ok(value) = HeaderValue::from_bytes(&parts.join(&b"; "[..])) {
        headers.insert(header::COOKIE, value);
    }
}

/// Keeps a client's id where it is harmless in a log, makes one otherwise.
fn request_id(headers: &mut HeaderMap, given: Option<HeaderValue>, context: &Context) {
    let sane = |value: &HeaderValue| {
        (1..=128).contains(&value.len())
            && value.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
    };
    let id = given.filter(sane).unwrap_or_else(|| {
        let id = (u128::from(context.worker.random()) << 64) | u128::from(context.worker.random());
        HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&fields::hex(id)))
            .unwrap_or(HeaderValue::from_static("0"))
    });
    headers.insert(fields::X_REQUEST_ID, id.clone());
    let _ = context.request_id.set(id);
}

/// Gives the target its origin form, with another path where there is one.
fn set_target<B>(request: &mut http::Request<B>, forward: Option<String>) -> Result<(), Kind> {
    let uri = request.uri();
    if forward.is_none() && uri.scheme().is_none() && uri.authority().is_none() {
        return Ok(());
    }
    // `http://host?query` has no path of its own.
    let whole = uri.path_and_query().is_some_and(|target| target.as_str().starts_with('/'));
    let forward = forward.or_else(|| (!whole).then(|| uri.path().to_owned()));
    let target = match (forward, uri.query()) {
        (Some(path), Some(query)) => PathAndQuery::try_from(format!("{path}?{query}")),
        (Some(path), None) => PathAndQuery::try_from(path),
        (None, _) => Ok(uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"))),
    };
    *request.uri_mut() = Uri::from(target.map_err(|_| Kind::BadRequest("malformed request target"))?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_baggage_member_is_taken_out_of_a_clients() {
        let check = |before: &[&str], after: &[&str]| {
            let mut headers: HeaderMap = before.iter().map(|v| (fields::BAGGAGE, v.parse().unwrap())).collect();
            strip_baggage(&mut headers);
            assert_eq!(headers.get_all(fields::BAGGAGE).iter().collect::<Vec<_>>(), after);
        };
        check(&["a=1, gateway-cohort=x:service, b=2"], &["a=1, b=2"]);
        check(&["Gateway-Cohort = x", "a=1"], &["a=1"]);
        check(&["gateway-cohort=x, a=1 "], &["a=1"]);
        check(&["gateway-cohort=x;p=1"], &[]);
        check(&["a=gateway-cohort"], &["a=gateway-cohort"]);
    }

    /// An empty one left a blank at the end, which the next reader took away: two values for one field.
    #[test]
    fn cookies_are_joined_without_what_is_empty() {
        let cookies = ["a=b", "", "c=d"].map(|value| (header::COOKIE, HeaderValue::from_static(value)));
        let mut headers = HeaderMap::from_iter(cookies);
        join_cookies(&mut headers);
        assert_eq!(headers.get_all(header::COOKIE).iter().collect::<Vec<_>>(), ["a=b; c=d"]);
    }

    #[test]
    fn the_target_names_the_host_where_it_has_one() {
        let request = |target: &str, hosts: &[&str]| {
            let request = http::Request::builder().uri(target).body(()).unwrap();
            let first = hosts.first().map(|host| HeaderValue::from_str(host).unwrap());
            host(&request, &Seen { host: first, hosts: hosts.len(), ..Seen::default() }, |_| false)
        };
        assert_eq!(request("http://a.example/x", &["b.example"]).unwrap(), "a.example");
        assert_eq!(request("/x", &["b.example:80"]).unwrap(), "b.example:80");
        assert!(request("/x", &[]).is_err());
        assert!(request("http://a.example/x", &[]).is_err());
        assert!(request("http://a.example/x", &["a/b"]).is_err());
        assert!(request("ftp://a.example/x", &["a.example"]).is_err());
        assert!(request("a.example:80", &["a.example"]).is_err());
        assert!(request("/x", &["a", "a"]).is_err());
        for odd in ["a/b", "a b", "a:80:80", "a:b", "[::1", "[::1]x", "a%2fb", "a@b"] {
            assert!(!is_host(odd.as_bytes()), "{odd}");
        }
        for host in ["a", "a:80", "A.b-c:", "[::1]", "[::1]:80", "192.0.2.1:1", ""] {
            assert!(is_host(host.as_bytes()), "{host}");
        }
    }
}
