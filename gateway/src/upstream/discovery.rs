//! Endpoints by name: addresses (A, AAAA) or services (SRV), asked for again when their time to live is over.
//!
//! What a name server cannot say changes nothing: the last good answer stands. An endpoint
//! that has gone gets no new request, and what is on its way to it ends in peace.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use hickory_resolver::{
    Resolver as Hickory, TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolverConfig},
    lookup::Lookup,
    net::runtime::TokioRuntimeProvider,
    proto::rr::{Name, RData, RecordType},
};

use super::Upstream;
use crate::config::Url;

/// An answer is believed for as long at least, whatever it says.
const LEAST: Duration = Duration::from_secs(1);
/// An answer is believed for as long at most: a hosts file has no time to live.
const MOST: Duration = Duration::from_mins(5);
/// The first pause after a failure; it doubles.
const AGAIN: Duration = Duration::from_millis(500);
/// The longest pause after a failure.
const PATIENCE: Duration = Duration::from_secs(10);
/// Endpoints of one upstream, at most.
const ENDPOINTS: usize = 1_000;

/// Asks name servers.
#[derive(Clone)]
pub struct Resolver(TokioResolver);

impl Resolver {
    /// Asks these, or those of the system where there are none.
    pub fn new(servers: &[SocketAddr]) -> Result<Self, String> {
        let provider = TokioRuntimeProvider::default();
        let mut builder = if servers.is_empty() {
            Hickory::builder(provider).map_err(|error| error.to_string())?
        } else {
            let server = |address: &SocketAddr| {
                let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()]
                    .map(|mut connection| {
                        connection.port = address.port();
                        connection
                    })
                    .to_vec();
                NameServerConfig::new(address.ip(), true, connections)
            };
            let config = ResolverConfig::from_parts(None, Vec::new(), servers.iter().map(server).collect());
            Hickory::builder_with_config(config, provider)
        };
        // What it keeps is kept here, for as long as it may be.
        builder.options_mut().cache_size = 0;
        builder.options_mut().timeout = Duration::from_secs(2);
        builder.options_mut().attempts = 2;
        builder.build().map(Self).map_err(|error| error.to_string())
    }

    /// The addresses of a name, and for how long. None is an answer, too. Where addresses of one family are not told
    /// although some are `known`, they are asked for once more: half an answer takes nothing away.
    async fn addresses(&self, name: Name, known: &[IpAddr]) -> Result<(Vec<IpAddr>, Duration), String> {
        let found = match self.0.lookup_ip(name).await {
            Ok(found) => found,
            Err(error) if error.is_no_records_found() => return Ok((Vec::new(), MOST)),
            Err(error) => return Err(error.to_string()),
        };
        let ttl = |lookup: &Lookup| lookup.answers().iter().map(|record| record.ttl).min().unwrap_or(0);
        let mut lasts = Duration::from_secs(ttl(found.as_lookup()).into());
        let mut addresses: Vec<IpAddr> = found.iter().collect();
        for kind in [RecordType::A, RecordType::AAAA] {
            let is = |address: &IpAddr| address.is_ipv4() == (kind == RecordType::A);
            if addresses.iter().any(is) || !known.iter().any(is) {
                continue;
            }
            match self.0.lookup(found.query().name().clone(), kind).await {
                Ok(more) => {
                    lasts = lasts.min(Duration::from_secs(ttl(&more).into()));
                    addresses.extend(more.answers().iter().filter_map(|record| record.data.ip_addr()));
                }
                Err(error) if error.is_no_records_found() => {}
                Err(_) => {
                    lasts = LEAST;
                    addresses.extend(known.iter().copied().filter(is));
                }
            }
        }
        Ok((addresses, lasts))
    }

    /// The endpoints of an upstream, and for how long.
    async fn endpoints(&self, upstream: &Upstream) -> Result<(Vec<Url>, Duration), String> {
        let Some(discovery) = &upstream.discovery else { return Err("nothing to look up".to_owned()) };
        let known = upstream.url();
        let endpoints = upstream.endpoints.load();
        // At this port only: what is kept must be an endpoint that there is, not one target's address at another's port.
        let had = |port: u16| -> Vec<IpAddr> {
            endpoints.iter().filter(|known| known.url.port == port).filter_map(|known| known.address).collect()
        };
        let url = |ip: IpAddr, port| Url { host: ip.to_string(), port, ..known.clone() };
        if !discovery.srv {
            let (addresses, ttl) = self.addresses(name(&discovery.name)?, &had(known.port)).await?;
            return Ok((addresses.into_iter().map(|ip| url(ip, known.port)).collect(), ttl));
        }
        let asked = self.0.lookup(name(&discovery.name)?, RecordType::SRV).await;
        let found = asked.map_err(|error| error.to_string())?;
        let mut ttl = u32::MAX;
        let mut services = Vec::new();
        for record in found.answers() {
            if let RData::SRV(service) = &record.data {
                ttl = ttl.min(record.ttl);
                services.push((service.priority, service.target.clone(), service.port));
            }
        }
        // A target of "." says that the service is not there (RFC 2782).
        services.retain(|(_, target, port)| !target.is_root() && *port > 0);
        let first = services.iter().map(|(priority, ..)| *priority).min();
        let mut ttl = Duration::from_secs(ttl.into());
        let mut urls = Vec::new();
        for (_, target, port) in services.into_iter().filter(|(priority, ..)| Some(*priority) == first) {
            // A target without an address is out of service; one that could not be asked might be in.
            let (addresses, lasts) = self.addresses(target, &had(port)).await?;
            ttl = ttl.min(lasts);
            urls.extend(addresses.into_iter().map(|ip| url(ip, port)));
        }
        Ok((urls, ttl))
    }
}

/// A name as DNS has it: also one with an underscore, as containers have.
fn name(text: &str) -> Result<Name, String> {
    Name::from_ascii(text).map_err(|error| error.to_string())
}

/// Follows an upstream's name for ever.
pub async fn follow(upstream: Arc<Upstream>, resolver: Resolver) {
    let mut pause = AGAIN;
    loop {
        let told = resolver.endpoints(&upstream).await.and_then(|(mut urls, ttl)| {
            if urls.is_empty() {
                return Err("it has no address".to_owned());
            }
            urls.sort_by(|a, b| (&a.host, a.port).cmp(&(&b.host, b.port)));
            urls.dedup();
            urls.truncate(ENDPOINTS);
            let changed = upstream.set_endpoints(&urls, &upstream.endpoints.load())?;
            Ok((changed, urls, ttl))
        });
        let wait = match told {
            Ok((changed, urls, ttl)) => {
                if changed {
                    let endpoints: Vec<String> = urls.iter().map(|url| format!("{}:{}", url.host, url.port)).collect();
                    tracing::info!(upstream = &*upstream.name, ?endpoints, "the endpoints have changed");
                }
                pause = AGAIN;
                ttl.clamp(LEAST, MOST)
            }
            Err(why) => {
                upstream.give_up_finding();
                tracing::warn!(
                    upstream = &*upstream.name,
                    why,
                    "its name could not be looked up; what was known stands"
                );
                let wait = pause;
                pause = (pause * 2).min(PATIENCE);
                wait
            }
        };
        tokio::time::sleep(wait).await;
    }
}
