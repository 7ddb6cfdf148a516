//! By what requests are kept together: a cookie, a field, the client's address.

use std::net::IpAddr;

use http::{HeaderMap, HeaderName, HeaderValue, header};
use twox_hash::XxHash3_64;

/// Where a key comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// A cookie.
    Cookie(Box<str>),
    /// A field.
    Header(HeaderName),
    /// The client's address, IPv6 by /64.
    Ip,
    /// A claim of a verified token.
    Claim(Box<str>),
}

/// A request's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Found<'h> {
    /// What a cookie or a field says.
    Said(&'h [u8]),
    /// The client's network.
    Network(u64),
}

impl Key {
    /// The key of a request, if it has one.
    pub fn find<'h>(&self, headers: &'h HeaderMap, client: IpAddr) -> Option<Found<'h>> {
        let said = match self {
            Self::Cookie(name) => cookies(headers, name).next(),
            Self::Header(name) => headers.get(name).map(HeaderValue::as_bytes),
            Self::Ip => return Some(Found::network(client)),
            // Known to whoever has the claims.
            Self::Claim(_) => None,
        };
        said.filter(|value| !value.is_empty()).map(Found::Said)
    }
}

impl Found<'_> {
    /// A client's network: its address, or the /64 of an IPv6 address.
    pub fn network(client: IpAddr) -> Self {
        Self::Network(match client.to_canonical() {
            IpAddr::V4(address) => u64::from(address.to_bits()),
            IpAddr::V6(address) => u64::try_from(address.to_bits() >> 64).unwrap_or(0),
        })
    }

    /// The same in every gateway.
    pub fn hash(&self) -> u64 {
        match self {
            Self::Said(bytes) => XxHash3_64::oneshot(bytes),
            Self::Network(network) => XxHash3_64::oneshot(&network.to_be_bytes()),
        }
    }
}

/// The values of a cookie. As bytes: browsers send cookies that are no ASCII, and one must not hide the others.
pub fn cookies<'h>(headers: &'h HeaderMap, name: &str) -> impl Iterator<Item = &'h [u8]> {
    let lines = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes);
    lines
        .flat_map(|line| line.split(|byte| *byte == b';'))
        .filter_map(move |pair| pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}
