//! Who may call: against pages on other sites, names that are rebound to us, and strangers.

use std::net::IpAddr;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header, request::Parts};

use super::problem;
use crate::routing::table::normalise_host;

/// The field that each POST must have: a form on another site cannot send it.
const CUSTOM: HeaderName = HeaderName::from_static("x-gateway-admin");

/// Lets a call through, or gives the refusal. `local` says whether it came to a loopback address.
pub(super) fn check(parts: &Parts, token: Option<&str>, local: bool) -> Result<(), Response<Bytes>> {
    let headers = &parts.headers;
    let refuse = |detail: &str| Err(problem(StatusCode::FORBIDDEN, detail));
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let bearer = bearer(headers);
    // A connection may be older than the file that took the token away.
    if token.is_none() && !local {
        return refuse("without a token only calls on loopback are answered");
    }
    let authorised = match (token, bearer) {
        (None, _) => false,
        (Some(token), Some(given)) if same(token.as_bytes(), given.as_bytes()) => true,
        (Some(_), given) => {
            let error = if given.is_some() { "Bearer error=\"invalid_token\"" } else { "Bearer" };
            let mut response =
                problem(StatusCode::UNAUTHORIZED, "send `Authorization: Bearer TOKEN` with the token of `admin:`");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(error));
            return Err(response);
        }
    };
    // A name can be made to point here by whoever owns it; an address and `localhost` cannot. The token cannot be guessed.
    if !authorised && !is_ours(host) {
        return refuse("call the admin listener by an IP address or by `localhost`");
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let same_site = origin
            .to_str()
            .ok()
            .and_then(|origin| origin.split_once("://"))
            .is_some_and(|(_, rest)| rest.eq_ignore_ascii_case(host));
        if !same_site {
            return refuse("pages of other origins may not call the admin listener");
        }
    }
    if let Some(site) = headers.get("sec-fetch-site")
        && site != "same-origin"
        && site != "none"
    {
        return refuse("pages of other sites may not call the admin listener");
    }
    if parts.method == Method::POST && !authorised && !headers.contains_key(CUSTOM) {
        return refuse("send the field `X-Gateway-Admin: 1` with each POST");
    }
    Ok(())
}

/// Lets a call for the board's own files through: they say nothing of what runs, and a browser that follows a link brings no token.
pub(super) fn check_page(parts: &Parts, token: Option<&str>, local: bool) -> Result<(), Response<Bytes>> {
    let said = |name: &str| parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut asked = parts.clone();
    if said("sec-fetch-mode") == "navigate" && said("sec-fetch-dest") == "document" {
        asked.headers.remove("sec-fetch-site");
    }
    if let Some(token) = token
        && let Ok(bearer) = HeaderValue::try_from(format!("Bearer {token}"))
    {
        asked.headers.insert(header::AUTHORIZATION, bearer);
    }
    check(&asked, token, local)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Compares without telling by its time how much was right.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

fn is_ours(host: &str) -> bool {
    let name = normalise_host(host.as_bytes());
    let name = String::from_utf8_lossy(&name);
    name == "localhost" || name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(method: Method, token: Option<&str>, fields: &[(&str, &str)]) -> u16 {
        let mut request = http::Request::builder().method(method).uri("/api/reload");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        check(&parts, token, true).err().map_or(200, |refusal| refusal.status().as_u16())
    }

    #[test]
    fn without_a_token_only_local_same_site_calls_pass() {
        let get = |fields: &[(&str, &str)]| status(Method::GET, None, fields);
        assert_eq!(get(&[("host", "127.0.0.1:9901")]), 200);
        assert_eq!(get(&[("host", "[::1]:9901")]), 200);
        assert_eq!(
            get(&[("host", "localhost:9901"), ("origin", "http://localhost:9901"), ("sec-fetch-site", "same-origin")]),
            200
        );
        assert_eq!(get(&[]), 403);
        assert_eq!(get(&[("host", "evil.example:9901")]), 403);
        assert_eq!(get(&[("host", "localhost:9901"), ("origin", "http://evil.example")]), 403);
        assert_eq!(get(&[("host", "localhost:9901"), ("origin", "null")]), 403);
        assert_eq!(get(&[("host", "localhost:9901"), ("sec-fetch-site", "cross-site")]), 403);
        let (parts, ()) = http::Request::get("/").header("host", "192.0.2.1:9901").body(()).unwrap().into_parts();
        assert!(check(&parts, None, false).is_err() && check(&parts, None, true).is_ok());
        assert_eq!(status(Method::POST, None, &[("host", "localhost")]), 403);
        assert_eq!(status(Method::POST, None, &[("host", "localhost"), ("x-gateway-admin", "1")]), 200);
    }

    #[test]
    fn the_boards_own_files_need_no_token_but_no_stranger_gets_them_into_a_page() {
        let page = |token: Option<&str>, fields: &[(&str, &str)]| {
            let mut request = http::Request::get("/");
            for (name, value) in fields {
                request = request.header(*name, *value);
            }
            let (parts, ()) = request.body(()).unwrap().into_parts();
            check_page(&parts, token, true).err().map_or(200, |refusal| refusal.status().as_u16())
        };
        let link = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
        let frame = [("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")];
        let of = |host: &'static str, more: &[(&'static str, &'static str)]| [&[("host", host)], more].concat();
        assert_eq!(page(None, &of("localhost:9901", &link)), 200);
        assert_eq!(page(None, &of("rebound.example.com", &link)), 403);
        assert_eq!(page(None, &of("localhost:9901", &frame)), 403);
        assert_eq!(page(Some("secret"), &of("gateway.internal", &link)), 200);
        assert_eq!(page(Some("secret"), &of("gateway.internal", &[("sec-fetch-site", "cross-site")])), 403);
    }

    #[test]
    fn with_a_token_nothing_passes_without_it() {
        let get = |fields: &[(&str, &str)]| status(Method::GET, Some("secret"), fields);
        assert_eq!(get(&[("host", "localhost")]), 401);
        assert_eq!(get(&[("host", "localhost"), ("authorization", "Bearer wrong!")]), 401);
        assert_eq!(get(&[("host", "gateway.internal"), ("authorization", "bearer secret")]), 200);
        assert_eq!(get(&[("host", "a"), ("authorization", "Bearer secret"), ("origin", "http://b")]), 403);
        assert_eq!(status(Method::POST, Some("secret"), &[("host", "a"), ("authorization", "Bearer secret")]), 200);
    }
}
