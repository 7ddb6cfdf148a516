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
    context::{Context, Request, Response},
    error::{Error, Kind},
    fields::{self, Voice},
    routing::path,
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
            Ok(()) => Either::Left(self.inner.call(request)),
            Err(kind) => {
                request.discard();
                Either::Right(ready(Err(Error::new(kind))))
            }
        }
    }
}

fn sanitize(request: &mut Request) -> Result<(), Kind> {
    let Request { http, context } = request;
    if let Some(refused) = context.refused.get() {
        return Err(refused);
    }
    if http.method() == Method::CONNECT {
        return Err(Kind::BadRequest("`CONNECT` is not served here; this is no tunnel"));
    }
    let host = host(http)?;
    http.headers_mut().insert(header::HOST, host.clone());
    let _ = context.host.set(host.clone());

    let snapshot = context.snapshot();
    let trusted = !snapshot.trusted_proxies.is_empty() && snapshot.trusts(context.connection.peer.ip());
    let wants_websocket = strip(http.headers_mut(), trusted, context);
    if wants_websocket && http.version() == Version::HTTP_11 && http.method() == Method::GET {
        context.upgrade.set(true);
    }
    let headers = http.headers_mut();
    let client = forwarded::apply(
        headers,
        context.connection.peer.ip(),
        &context.connection.peer_value,
        &host,
        trusted,
        snapshot,
    );
    context.client.set(client.address);
    context.https.set(client.https);
    let _ = context.asked.set(client.asked);
    join_cookies(headers, context.version);
    request_id(headers, context);
    headers.append(header::VIA, HeaderValue::from_static(via(context.version)));

    if http.uri().path() == "*" && http.method() == Method::OPTIONS {
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
    Ok(())
}

fn owned<B: ?Sized + ToOwned>(text: std::borrow::Cow<'_, B>) -> Option<B::Owned> {
    match text {
        std::borrow::Cow::Owned(owned) => Some(owned),
        std::borrow::Cow::Borrowed(_) => None,
    }
}

/// The host that the client asks for: that of the target where it has one (RFC 9112 §3.2.2, RFC 9113 §8.3.1).
fn host<B>(request: &http::Request<B>) -> Result<HeaderValue, Kind> {
    let mut fields = request.headers().get_all(header::HOST).iter();
    let field = fields.next();
    if fields.next().is_some() {
        return Err(Kind::BadRequest("several `Host` fields; send one"));
    }
    match (request.uri().authority(), field) {
        (Some(authority), _) if authority.as_str().contains('@') => {
            Err(Kind::BadRequest("credentials in the request target; leave them out"))
        }
        (Some(authority), _) if !is_host(authority.as_str().as_bytes()) => {
            Err(Kind::BadRequest("malformed host in the request target"))
        }
        (Some(authority), _) => {
            HeaderValue::from_str(authority.as_str()).map_err(|_| Kind::BadRequest("malformed host"))
        }
        (None, Some(host)) => {
            if is_host(host.as_bytes()) {
                Ok(host.clone())
            } else {
                Err(Kind::BadRequest("malformed `Host`"))
            }
        }
        (None, None) if request.version() == Version::HTTP_11 => Err(Kind::BadRequest("no `Host` field; send one")),
        (None, None) => Ok(HeaderValue::from_static("")),
    }
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

/// Takes away what must not go on; says whether the client asks for a WebSocket.
fn strip(headers: &mut HeaderMap, trusted: bool, context: &Context) -> bool {
    let mut doomed: Vec<HeaderName> = Vec::new();
    let mut websocket = false;
    for (name, value) in &*headers {
        let text = name.as_str();
        if fields::is_hop_by_hop(text) {
            match *name {
                header::CONNECTION => fields::named_by(value, &mut doomed),
                header::UPGRADE => {
                    websocket |= fields::tokens(value).any(|token| token.eq_ignore_ascii_case(b"websocket"));
                }
                _ => {}
            }
            doomed.push(name.clone());
        } else if let Some(voice) = fields::voice(text) {
            if voice == Voice::Gateway || !trusted {
                doomed.push(name.clone());
            }
        } else if fields::is_method_override(text) {
            context.overridden.set(true);
        }
    }
    let asked = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(fields::tokens)
        .any(|token| token.eq_ignore_ascii_case(b"upgrade"));
    for name in doomed {
        headers.remove(name);
    }
    if headers.contains_key(fields::BAGGAGE) {
        strip_baggage(headers);
    }
    websocket && asked
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
        if let (false, Ok(value)) = (kept.is_empty(), HeaderValue::from_bytes(&kept.join(&b","[..]))) {
            headers.append(fields::BAGGAGE, value);
        }
    }
}

/// HTTP/2 may split a `Cookie` (RFC 9113 §8.2.3); HTTP/1.1 may not.
fn join_cookies(headers: &mut HeaderMap, version: Version) {
    if version != Version::HTTP_2 || headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let parts: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(value) = HeaderValue::from_bytes(&parts.join(&b"; "[..])) {
        headers.insert(header::COOKIE, value);
    }
}

/// Keeps a client's id where it is harmless in a log, makes one otherwise.
fn request_id(headers: &mut HeaderMap, context: &Context) {
    let sane = |value: &&HeaderValue| {
        (1..=128).contains(&value.len())
            && value.as_bytes().iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
    };
    let id = headers.get(fields::X_REQUEST_ID).filter(sane).cloned().unwrap_or_else(|| {
        let id = (u128::from(context.worker.random()) << 64) | u128::from(context.worker.random());
        let mut text = [0; 32];
        for (n, digit) in text.iter_mut().enumerate() {
            *digit = b"0123456789abcdef"[usize::try_from(id >> (124 - 4 * n) & 15).unwrap_or(0)];
        }
        HeaderValue::from_maybe_shared(Bytes::copy_from_slice(&text)).unwrap_or(HeaderValue::from_static("0"))
    });
    headers.insert(fields::X_REQUEST_ID, id.clone());
    let _ = context.request_id.set(id);
}

fn via(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0 gw",
        Version::HTTP_2 => "2.0 gw",
        _ => "1.1 gw",
    }
}

/// Gives the target its origin form, with another path where there is one.
fn set_target<B>(request: &mut http::Request<B>, forward: Option<String>) -> Result<(), Kind> {
    let uri = request.uri();
    if forward.is_none() && uri.scheme().is_none() && uri.authority().is_none() {
        return Ok(());
    }
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
        check(&["gateway-cohort=x;p=1"], &[]);
        check(&["a=gateway-cohort"], &["a=gateway-cohort"]);
    }

    #[test]
    fn the_target_names_the_host_where_it_has_one() {
        let request = |target: &str, hosts: &[&str]| {
            let mut request = http::Request::builder().uri(target);
            for host in hosts {
                request = request.header("host", *host);
            }
            host(&request.body(()).unwrap())
        };
        assert_eq!(request("http://a.example/x", &["b.example"]).unwrap(), "a.example");
        assert_eq!(request("/x", &["b.example:80"]).unwrap(), "b.example:80");
        assert!(request("/x", &[]).is_err());
        assert!(request("/x", &["a", "a"]).is_err());
        for odd in ["a/b", "a b", "a:80:80", "a:b", "[::1", "[::1]x", "a%2fb", "a@b"] {
            assert!(!is_host(odd.as_bytes()), "{odd}");
        }
        for host in ["a", "a:80", "A.b-c:", "[::1]", "[::1]:80", "192.0.2.1:1", ""] {
            assert!(is_host(host.as_bytes()), "{host}");
        }
    }
}
