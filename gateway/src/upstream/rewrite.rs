//! What upstreams say about their own address, said so that clients can follow it.
//!
//! `Location` and `Content-Location` that name an upstream are given the host that
//! the client asked; a stripped prefix comes back; cookies lose an upstream's `Domain` and
//! regain the prefix in their `Path`.

use std::{collections::HashSet, net::IpAddr};

use super::Upstream;
use crate::routing::table::normalise_host;

/// The addresses and names of all upstreams: what clients must never see.
#[derive(Debug, Default)]
pub struct Addresses {
    /// `host:port`, lower case.
    authorities: HashSet<String>,
    hosts: HashSet<String>,
}

impl Addresses {
    /// Those of these upstreams.
    pub fn new<'a>(upstreams: impl Iterator<Item = &'a Upstream>) -> Self {
        let mut this = Self::default();
        for upstream in upstreams {
            for url in &upstream.urls {
                this.authorities.insert(full(&url.host, url.port));
                this.hosts.insert(url.host.clone());
            }
        }
        this
    }
}

fn full(host: &str, port: u16) -> String {
    format!("{host}:{port}")
}

/// How a response must look from outside.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The upstream that answers.
    pub upstream: &'a Upstream,
    /// All that must not be seen.
    pub addresses: &'a Addresses,
    /// `http` or `https`, as the client came.
    pub scheme: &'a str,
    /// The host that the client asked for, with its port.
    pub host: &'a str,
    /// The prefix that the upstream did not see.
    pub prefix: Option<&'a str>,
}

impl View<'_> {
    /// A `Location` or `Content-Location` for the client; nothing where it may stay.
    pub fn location(&self, value: &str) -> Option<String> {
        let Some((scheme, rest)) = split_scheme(value) else {
            return value.starts_with('/').then(|| self.with_prefix(value)).flatten();
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(end);
        let authority = authority.rsplit('@').next().unwrap_or(authority);
        let (host, port) = split_port(authority, scheme.unwrap_or(self.scheme));
        let own = self.upstream.urls.iter().any(|url| host == url.host && port == url.port);
        let asked = normalise_host(self.host.as_bytes()) == host.as_bytes();
        let hidden = self.addresses.authorities.contains(&full(&host, port));
        let prefixed = if own || (asked && !hidden) { self.with_prefix(path) } else { None };
        if hidden && !(asked && authority.eq_ignore_ascii_case(self.host)) {
            let path = prefixed.as_deref().unwrap_or(path);
            // An HTTP/1.0 client may not have said which host it asked: then the path alone is right.
            if self.host.is_empty() {
                return Some(if path.is_empty() { "/".to_owned() } else { path.to_owned() });
            }
            return Some(format!("{}://{}{path}", self.scheme, self.host));
        }
        prefixed.map(|path| format!("{}//{authority}{path}", scheme.map(|s| format!("{s}:")).unwrap_or_default()))
    }

    /// A path with the stripped prefix, unless it has it already, as from a service that reads `X-Forwarded-Prefix`.
    fn with_prefix(&self, path: &str) -> Option<String> {
        let prefix = self.prefix?;
        let has = path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']));
        (!has).then(|| format!("{prefix}{path}"))
    }

    /// A `Set-Cookie` for the client; nothing where it may stay.
    pub fn set_cookie(&self, value: &str) -> Option<String> {
        let mut parts = value.split(';');
        let mut out = parts.next()?.to_owned();
        let mut changed = false;
        let client = String::from_utf8(normalise_host(self.host.as_bytes())).ok()?;
        for part in parts {
            let (name, argument) = part.split_once('=').unwrap_or((part, ""));
            let argument = argument.trim();
            if name.trim().eq_ignore_ascii_case("domain") {
                let domain = argument.trim_start_matches('.').to_ascii_lowercase();
                if domain != client && self.addresses.hosts.contains(&domain) {
                    changed = true;
                    // A cookie for a bare name or an address can only be the host's own: no `Domain`.
                    if client.contains('.') && client.parse::<IpAddr>().is_err() {
                        out.push_str("; Domain=");
                        out.push_str(&client);
                    }
                    continue;
                }
            } else if name.trim().eq_ignore_ascii_case("path") && argument.starts_with('/') {
                let path = if argument == "/" { "" } else { argument };
                if let Some(path) = self.with_prefix(path) {
                    changed = true;
                    out.push_str("; Path=");
                    out.push_str(&path);
                    continue;
                }
            }
            out.push(';');
            out.push_str(part);
        }
        changed.then_some(out)
    }
}

/// The scheme and what follows `//`; nothing for a reference without an authority.
fn split_scheme(value: &str) -> Option<(Option<&str>, &str)> {
    if let Some(rest) = value.strip_prefix("//") {
        return Some((None, rest));
    }
    let (scheme, rest) = value.split_once("://")?;
    (scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")).then_some((Some(scheme), rest))
}

fn split_port(authority: &str, scheme: &str) -> (String, u16) {
    let default = if scheme.eq_ignore_ascii_case("https") { 443 } else { 80 };
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.parse().unwrap_or(default)),
        _ => (authority, default),
    };
    (host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase(), port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UpstreamConfig;

    fn upstream(name: &str, url: &str) -> Upstream {
        let config = UpstreamConfig { url: Some(url.to_owned()), ..UpstreamConfig::default() };
        Upstream::new(name, &config, std::path::Path::new(""), 1, None, std::sync::Arc::default()).unwrap()
    }

    fn check(prefix: Option<&str>, test: impl Fn(View<'_>)) {
        let orders = upstream("orders", "http://orders.internal:9001");
        let legacy = upstream("legacy", "http://127.0.0.1:9000");
        let addresses = Addresses::new([&orders, &legacy].into_iter());
        test(View { upstream: &orders, addresses: &addresses, scheme: "https", host: "shop.example.com", prefix });
    }

    #[test]
    fn locations_show_the_host_that_the_client_asked() {
        check(None, |view| {
            let location = |value| view.location(value);
            assert_eq!(
                location("http://orders.internal:9001/x?y#z").as_deref(),
                Some("https://shop.example.com/x?y#z")
            );
            assert_eq!(location("HTTP://ORDERS.internal:9001").as_deref(), Some("https://shop.example.com"));
            assert_eq!(location("http://127.0.0.1:9000/login").as_deref(), Some("https://shop.example.com/login"));
            assert_eq!(location("//orders.internal:9001/x").as_deref(), Some("https://shop.example.com/x"));
            for stays in [
                "/x",
                "x",
                "?y",
                "https://other.example.com/x",
                "http://orders.internal/x",
                "https://shop.example.com/x",
                "mailto:a@b",
            ] {
                assert_eq!(location(stays), None, "{stays}");
            }
        });
    }

    #[test]
    fn a_stripped_prefix_comes_back() {
        check(Some("/api"), |view| {
            let location = |value| view.location(value);
            assert_eq!(location("/orders/1").as_deref(), Some("/api/orders/1"));
            assert_eq!(
                location("http://orders.internal:9001/orders").as_deref(),
                Some("https://shop.example.com/api/orders")
            );
            assert_eq!(location("http://127.0.0.1:9000/login").as_deref(), Some("https://shop.example.com/login"));
            assert_eq!(
                location("https://shop.example.com/orders").as_deref(),
                Some("https://shop.example.com/api/orders")
            );
            assert_eq!(location("/api/orders/1"), None);
            assert_eq!(location("/apis").as_deref(), Some("/api/apis"));
        });
    }

    #[test]
    fn cookies_lose_the_upstreams_domain_and_regain_the_prefix() {
        check(Some("/api"), |view| {
            let cookie = |value| view.set_cookie(value);
            assert_eq!(
                cookie("a=b; Domain=orders.internal; Path=/orders; HttpOnly").as_deref(),
                Some("a=b; Domain=shop.example.com; Path=/api/orders; HttpOnly")
            );
            assert_eq!(cookie("a=b;path=/").as_deref(), Some("a=b; Path=/api"));
            assert_eq!(cookie("a=b; Domain=example.com; Secure"), None);
        });
        check(None, |mut view| {
            view.host = "localhost:8080";
            assert_eq!(view.set_cookie("a=b; Domain=.127.0.0.1; Path=/").as_deref(), Some("a=b; Path=/"));
            assert_eq!(view.set_cookie("a=b; Path=/"), None);
        });
    }
}
