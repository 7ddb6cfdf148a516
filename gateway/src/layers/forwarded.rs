//! Who the client is, and how upstreams learn it: `X-Forwarded-*` and `Forwarded` (RFC 7239), always in agreement.
//!
//! What a trusted proxy says is kept and extended; what anybody else says was
//! stripped before. Where both kinds of field come in, `X-Forwarded-For` is the one believed and
//! `Forwarded` is made from it: a proxy that manages one of them may pass the other through unread.

use std::{fmt::Write as _, net::IpAddr};

use http::{HeaderMap, HeaderValue, header};

use crate::{context::ClientConnection, fields, snapshot::Snapshot};

/// What the fields came to.
pub(super) struct Client {
    /// The nearest address that is no trusted proxy's.
    pub(super) address: IpAddr,
    /// Whether it came by https.
    pub(super) https: bool,
    /// The host that it asked for.
    pub(super) asked: HeaderValue,
}

/// Writes the fields for the upstream. `trusted` says whether what is there may be believed.
pub(super) fn apply(
    headers: &mut HeaderMap,
    connection: &ClientConnection,
    host: &HeaderValue,
    trusted: bool,
    snapshot: &Snapshot,
) -> Client {
    let peer = connection.peer;
    if !trusted {
        headers.insert(fields::X_FORWARDED_FOR, connection.peer_value.clone());
        headers.insert(fields::X_FORWARDED_PROTO, HeaderValue::from_static("http"));
        headers.insert(fields::X_FORWARDED_HOST, host.clone());
        // A client asks one host again and again.
        let mut said = connection.forwarded.borrow_mut();
        if said.as_ref().is_none_or(|(before, _)| before != host) {
            // A copy: what came in holds the whole head that it is part of.
            let copy = HeaderValue::from_bytes(host.as_bytes()).unwrap_or(HeaderValue::from_static(""));
            *said = forwarded(&[peer], "http", host.to_str().unwrap_or_default()).map(|value| (copy, value));
        }
        if let Some((_, value)) = &*said {
            headers.insert(header::FORWARDED, value.clone());
        }
        return Client { address: peer, https: false, asked: host.clone() };
    }
    let mut chain = x_forwarded_for(headers).unwrap_or_else(|| forwarded_for(headers));
    chain.push(peer);
    let address = chain.iter().rev().find(|ip| !snapshot.trusts(**ip)).or(chain.first()).copied().unwrap_or(peer);
    // Of a chain of proxies the first speaks of the client.
    let first =
        |value: &HeaderValue| value.as_bytes().split(|byte| *byte == b',').next().map(|p| p.trim_ascii().to_vec());
    let proto = match headers.get(fields::X_FORWARDED_PROTO).and_then(first) {
        Some(value) if value.eq_ignore_ascii_case(b"https") => "https",
        None if forwarded_proto(headers).is_some_and(|proto| proto.eq_ignore_ascii_case("https")) => "https",
        _ => "http",
    };
    let asked = headers.get(fields::X_FORWARDED_HOST).unwrap_or(host).clone();
    let list = chain.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if let Ok(value) = HeaderValue::try_from(list) {
        headers.insert(fields::X_FORWARDED_FOR, value);
    }
    headers.insert(fields::X_FORWARDED_PROTO, HeaderValue::from_static(proto));
    if let Some(value) = forwarded(&chain, proto, asked.to_str().unwrap_or_default()) {
        headers.insert(header::FORWARDED, value);
    }
    headers.insert(fields::X_FORWARDED_HOST, asked.clone());
    Client { address, https: proto == "https", asked }
}

/// The addresses of `X-Forwarded-For`; nothing where the field is missing. What is no address ends what can be believed.
fn x_forwarded_for(headers: &HeaderMap) -> Option<Vec<IpAddr>> {
    let mut chain = Vec::new();
    for value in headers.get_all(fields::X_FORWARDED_FOR) {
        for part in value.to_str().unwrap_or_default().split(',') {
            push(&mut chain, part.trim());
        }
    }
    headers.contains_key(fields::X_FORWARDED_FOR).then_some(chain)
}

/// The `for` addresses of `Forwarded`.
fn forwarded_for(headers: &HeaderMap) -> Vec<IpAddr> {
    let mut chain = Vec::new();
    for pair in pairs(headers) {
        if let Some(value) = parameter(pair, "for") {
            push(&mut chain, value);
        }
    }
    chain
}

/// The first `proto` of `Forwarded`: that of the client's own connection.
fn forwarded_proto(headers: &HeaderMap) -> Option<&str> {
    pairs(headers).find_map(|pair| parameter(pair, "proto"))
}

fn pairs(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(header::FORWARDED).iter();
    values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split([',', ';']))
}

fn parameter<'a>(pair: &'a str, name: &str) -> Option<&'a str> {
    let (found, value) = pair.trim().split_once('=')?;
    found.eq_ignore_ascii_case(name).then(|| value.trim_matches('"'))
}

/// Adds an address with or without a port. `unknown` and the like cut off what came before them.
fn push(chain: &mut Vec<IpAddr>, text: &str) {
    if text.is_empty() {
        return;
    }
    let bare = text.trim_start_matches('[');
    let bare = bare.split(']').next().unwrap_or(bare);
    let address = bare.parse().or_else(|_| match bare.rsplit_once(':') {
        Some((host, _)) => host.parse(),
        None => bare.parse(),
    });
    match address {
        Ok(address) => chain.push(address),
        Err(_) => chain.clear(),
    }
}

fn forwarded(chain: &[IpAddr], proto: &str, host: &str) -> Option<HeaderValue> {
    let mut text = String::with_capacity(64);
    for (n, address) in chain.iter().enumerate() {
        let _ = match address {
            IpAddr::V4(address) => write!(text, "for={address}"),
            IpAddr::V6(address) => write!(text, "for=\"[{address}]\""),
        };
        if n == 0 {
            let _ = write!(text, ";proto={proto}");
            // A host with a port or brackets is no token.
            if !host.is_empty() && !host.contains(['"', '\\']) {
                let _ = write!(text, ";host=\"{host}\"");
            }
        }
        if n + 1 < chain.len() {
            text.push_str(", ");
        }
    }
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(text: &str) -> Vec<String> {
        let headers = HeaderMap::from_iter([(fields::X_FORWARDED_FOR, text.parse().unwrap())]);
        x_forwarded_for(&headers).unwrap().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn chains_are_read_in_every_spelling() {
        assert_eq!(chain("192.0.2.1, 10.0.0.1"), ["192.0.2.1", "10.0.0.1"]);
        assert_eq!(chain("192.0.2.1:4711,[2001:db8::1]:80, 2001:db8::2"), ["192.0.2.1", "2001:db8::1", "2001:db8::2"]);
        assert_eq!(chain("192.0.2.1,, 10.0.0.1,"), ["192.0.2.1", "10.0.0.1"]);
        assert_eq!(chain("198.51.100.9, unknown, 192.0.2.1"), ["192.0.2.1"]);
        let headers = HeaderMap::from_iter([(
            header::FORWARDED,
            "for=192.0.2.1;proto=https, For=\"[2001:db8::1]:4711\"".parse().unwrap(),
        )]);
        assert_eq!(forwarded_for(&headers).len(), 2);
        assert_eq!(forwarded_proto(&headers), Some("https"));
    }

    #[test]
    fn the_field_is_written_as_rfc_7239_says() {
        let chain = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        assert_eq!(
            forwarded(&chain, "https", "shop.example.com:8443").unwrap(),
            "for=192.0.2.1;proto=https;host=\"shop.example.com:8443\", for=\"[2001:db8::1]\""
        );
    }
}
