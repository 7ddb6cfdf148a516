//! One address of an upstream.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use http::HeaderValue;
use twox_hash::XxHash3_64;

use super::{Upstream, connect::Tls};
use crate::{
    config::Url,
    resilience::{balance::Candidate, vitals::Vitals},
};

/// One address of an upstream, with how it does.
#[derive(Debug)]
pub struct Endpoint {
    /// Its own number, among all that ever were.
    pub id: u64,
    /// Where it is.
    pub url: Url,
    /// Host and port, for logs and for who may see addresses.
    pub name: Box<str>,
    /// Its own host and port, as `Host` has them.
    pub authority: HeaderValue,
    /// Its address, where the url has no name.
    pub address: Option<IpAddr>,
    /// How connections to it are encrypted.
    pub tls: Option<Tls>,
    /// How it does.
    pub vitals: Vitals,
    hash: u64,
}

impl Endpoint {
    /// An endpoint that comes now, or that always was.
    pub(super) fn new(upstream: &Upstream, url: Url, since: Option<u64>) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Where a name was looked up, its own is what certificates and `Host` have.
        let official = if upstream.discovery.is_some() { upstream.url() } else { &url };
        let name = if url.host.contains(':') {
            format!("[{}]:{}", url.host, url.port)
        } else {
            format!("{}:{}", url.host, url.port)
        };
        Ok(Self {
            id: NEXT.fetch_add(1, Relaxed),
            authority: HeaderValue::try_from(official.authority.as_str()).map_err(|error| error.to_string())?,
            address: url.host.parse().ok(),
            tls: upstream.roots.as_ref().map(|roots| roots.named(&official.host)).transpose()?,
            vitals: since.map_or_else(Vitals::default, Vitals::newcomer),
            hash: XxHash3_64::oneshot(name.as_bytes()),
            name: name.into(),
            url,
        })
    }

    /// Whether an upstream would make this one of the same url.
    pub(super) fn is_for(&self, upstream: &Upstream) -> bool {
        let roots = upstream.roots.as_ref();
        self.tls.is_some() == roots.is_some()
            && self.tls.as_ref().is_none_or(|tls| roots.is_some_and(|roots| tls.is_of(roots)))
    }
}

impl Candidate for Arc<Endpoint> {
    fn id(&self) -> u64 {
        self.id
    }

    fn vitals(&self) -> &Vitals {
        &self.vitals
    }

    fn hash(&self) -> u64 {
        self.hash
    }
}
