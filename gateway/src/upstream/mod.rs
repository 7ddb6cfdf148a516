//! The systems behind the gateway: how they are reached, and what comes back from them.
//!
//! An [`Upstream`] is shared by all workers and lives on across reloads that leave
//! it alone; each worker has a [`pool::Pool`] of its own for it, since a connection belongs
//! to the thread that made it.

pub mod call;
pub mod connect;
pub mod download;
pub mod pool;
pub mod rewrite;
pub mod tunnel;
pub mod upload;

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use http::HeaderValue;
use tokio::sync::Semaphore;

use crate::{
    config::{UpstreamConfig, Url, parse_url},
    telemetry::metrics::UpstreamStats,
};

/// Name lookups at a time.
const LOOKUPS: usize = 4;

/// A system behind the gateway.
#[derive(Debug)]
pub struct Upstream {
    /// Its name in the file.
    pub name: Arc<str>,
    /// Where it is.
    pub url: Url,
    /// Its own host and port, as `Host` has them.
    pub authority: HeaderValue,
    /// Its address, where the url has no name.
    pub address: Option<IpAddr>,
    /// How connections to it are encrypted.
    pub tls: Option<connect::Tls>,
    /// The connections of one worker.
    pub connections: Connections,
    /// Our own listeners: no name may resolve to them.
    pub prohibited: Arc<ArcSwap<Vec<SocketAddr>>>,
    /// Places for name lookups.
    pub lookups: Arc<Semaphore>,
    /// What is counted of it.
    pub stats: Arc<UpstreamStats>,
}

/// The limits of one worker's pool.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// How many at most.
    pub max: usize,
    /// How long an unused one is kept.
    pub idle: Duration,
    /// How old one may grow.
    pub max_age: Duration,
    /// How long making one may take.
    pub connect_timeout: Duration,
}

impl Upstream {
    /// An upstream from its checked configuration. `folder` is the main file's.
    pub fn new(
        name: &str,
        config: &UpstreamConfig,
        folder: &Path,
        workers: usize,
        stats: Arc<UpstreamStats>,
        prohibited: Arc<ArcSwap<Vec<SocketAddr>>>,
    ) -> Result<Self, String> {
        let url = parse_url(&config.url)?;
        let tls = if url.tls {
            Some(connect::Tls::new(&url.host, config.ca.as_ref().map(|ca| folder.join(ca)).as_deref())?)
        } else {
            None
        };
        let limit = |span: crate::config::values::Span| span.limit().unwrap_or(Duration::MAX);
        Ok(Self {
            name: name.into(),
            authority: HeaderValue::try_from(url.authority.as_str()).map_err(|error| error.to_string())?,
            address: url.host.parse().ok(),
            tls,
            connections: Connections {
                max: (config.connections.max as usize).div_ceil(workers).max(1),
                idle: limit(config.connections.idle),
                max_age: limit(config.connections.max_age),
                connect_timeout: config.connections.connect_timeout.0,
            },
            prohibited,
            lookups: Arc::new(Semaphore::new(LOOKUPS)),
            stats,
            url,
        })
    }
}
