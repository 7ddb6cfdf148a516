//! The systems behind the gateway: their addresses and certificates.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use http::Uri;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};

use super::{Addresses, matching::must_arrive};
use crate::config::{
    file::{KeySource, is_token},
    source::{At, Item, Sources},
    upstream::{Balance, UpstreamConfig},
    values::{OrNone, Span},
};

/// An upstream's address, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Url {
    /// Whether it is `https`.
    pub tls: bool,
    /// A name, or an IP address; IPv6 without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Host and port as `Host` has them: without the scheme's own port.
    pub authority: String,
}

/// Reads an upstream's URL.
pub fn parse_url(text: &str) -> Result<Url, String> {
    let uri: Uri = text.parse().map_err(|_| "not a URL".to_owned())?;
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err("neither `http://` nor `https://`".to_owned()),
    };
    let authority = uri.authority().ok_or("no host")?;
    if authority.as_str().contains('@') {
        return Err("credentials do not belong here".to_owned());
    }
    if uri.path() != "/" || uri.query().is_some() || text.ends_with('/') {
        return Err("a path does not belong here".to_owned());
    }
    let bracketed = uri.host().unwrap_or_default();
    let host = bracketed.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    if host.is_empty() {
        return Err("no host".to_owned());
    }
    let port_text = &authority.as_str()[bracketed.len()..];
    let default = if tls { 443 } else { 80 };
    let port = match port_text.strip_prefix(':') {
        None => default,
        Some(text) => text.parse().ok().filter(|port| *port > 0).ok_or("not a port")?,
    };
    let name = bracketed.to_ascii_lowercase();
    let authority = if port == default { name } else { format!("{name}:{port}") };
    Ok(Url { tls, host, port, authority })
}

pub(super) fn check_upstreams(sources: &mut Sources, addresses: Option<&Addresses>) {
    if !sources.incomplete && !sources.upstream_names.iter().any(|name| name == "legacy") {
        sources.error(
            &At::root(0).down("upstreams"),
            "no upstream called `legacy`".to_owned(),
            "name the monolith: `upstreams:`, below it `legacy:`, below it `url: http://127.0.0.1:9000`",
        );
    }
    let mut seen = HashMap::new();
    for Item { at, value: (name, config) } in sources.upstreams.clone() {
        if let Some(first) = seen.insert(name.clone(), at.clone())
            && first.source != at.source
        {
            let line = sources.line(&first.clone().at_key());
            sources.error(
                &at.clone().at_key(),
                format!("duplicate upstream: `{name}`"),
                &format!("it is defined at {line}; keep one of the two"),
            );
        }
        // A token that starts with a letter is what `Proxy-Status` can name as the next hop.
        if !is_token(&name) || !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            sources.error(
                &at.clone().at_key(),
                format!("not a name: `{name}`"),
                "start with a letter; use letters, digits, `-`, `_` and `.`",
            );
        }
        check_upstream(sources, &at, &config, addresses);
    }
}

/// Where an upstream says it is.
fn addresses_of(config: &UpstreamConfig) -> Vec<(Place, &str)> {
    let url = config.url.iter().map(|text| (Place::Key("url"), text.as_str()));
    let urls = config.urls.iter().enumerate().map(|(n, text)| (Place::Item("urls", n), text.as_str()));
    url.chain(urls).collect()
}

/// A place below an upstream.
enum Place {
    Key(&'static str),
    Item(&'static str, usize),
}

impl Place {
    fn below(&self, at: &At) -> At {
        match self {
            Self::Key(key) => at.down(*key),
            Self::Item(key, n) => at.down(*key).down(*n),
        }
    }
}

fn check_upstream(sources: &mut Sources, at: &At, config: &UpstreamConfig, addresses: Option<&Addresses>) {
    let given = [
        ("url", config.url.is_some()),
        ("urls", !config.urls.is_empty()),
        ("dns", config.dns.is_some()),
        ("srv", config.srv.is_some()),
    ];
    let given: Vec<&str> = given.into_iter().filter(|(_, is)| *is).map(|(key, _)| key).collect();
    match given[..] {
        [] => sources.error(
            &at.clone().at_key(),
            "upstream without an address".to_owned(),
            "say where it is: `url: http://host:port`, or `urls:`, `dns:`, `srv:` for several endpoints",
        ),
        [_] => {}
        [_, second, ..] => sources.error(
            &at.down(second).at_key(),
            format!("upstream with two addresses: `{}`", given.join("` and `")),
            "keep one of them",
        ),
    }
    let mut tls = None;
    let mut seen = std::collections::HashSet::new();
    for (place, text) in addresses_of(config) {
        let url_at = place.below(at);
        match parse_url(text) {
            Err(why) => sources.error(
                &url_at,
                format!("not an upstream's url: {why}"),
                "write `http://host:port` or `https://host:port`, without a path",
            ),
            Ok(url) => {
                if !seen.insert((url.host.clone(), url.port)) {
                    sources.error(&url_at, format!("endpoint listed twice: `{text}`"), "remove one");
                }
                if tls.is_some_and(|tls| tls != url.tls) {
                    let help = "write all of an upstream's `urls` with the same scheme";
                    sources.error(&url_at, "endpoints with and without encryption".to_owned(), help);
                }
                tls = Some(url.tls);
                check_url(sources, &url_at, text, &url, addresses);
            }
        }
    }
    for (key, text, srv) in [("dns", &config.dns, false), ("srv", &config.srv, true)] {
        let Some(text) = text else { continue };
        match parse_name(text, srv) {
            Ok(url) => {
                tls = Some(url.tls);
                if url.tls && ServerName::try_from(url.host.as_str()).is_err() {
                    let help = "write the name that the endpoints' certificates have";
                    sources.error(&at.down(key), "not a name that a certificate can have".to_owned(), help);
                }
            }
            Err(why) => sources.error(&at.down(key), format!("not a name to look up: `{text}`"), why),
        }
    }
    if config.ca.is_some() && tls == Some(false) {
        sources.error(
            &at.down("ca"),
            "`ca` without `https://`".to_owned(),
            "write the url with `https://`, or remove `ca`",
        );
    }
    if let Some(ca) = &config.ca
        && let Err(why) = read_ca(&sources.beside(ca))
    {
        sources.error(
            &at.down("ca"),
            format!("cannot read certificates from `{ca}`: {why}"),
            "name a PEM file, relative to the main file",
        );
    }
    check_limits(sources, at, config);
}

fn check_url(sources: &mut Sources, at: &At, text: &str, url: &Url, addresses: Option<&Addresses>) {
    if url.tls && ServerName::try_from(url.host.as_str()).is_err() {
        sources.error(
            at,
            "not a name that a certificate can have".to_owned(),
            "write the host's DNS name or IP address",
        );
    }
    let own = addresses.into_iter().flat_map(|a| [Some(a.listen), Some(a.admin), a.health]).flatten();
    let ip = if url.host == "localhost" { Some(IpAddr::from([127, 0, 0, 1])) } else { url.host.parse().ok() };
    if ip.is_some_and(|ip| own.clone().any(|own| is_same_listener(own, SocketAddr::new(ip, url.port)))) {
        sources.error(
            at,
            format!("upstream that is the gateway itself: `{text}`"),
            "point it at the system behind the gateway",
        );
    }
}

/// Limits that nothing passes, and numbers that mean nothing.
fn check_limits(sources: &mut Sources, at: &At, config: &UpstreamConfig) {
    let mut wrong = |at: At, holds: bool, what: &str, help: &str| {
        if !holds {
            sources.error(&at, what.to_owned(), help);
        }
    };
    let span = |span: Span| !span.0.is_zero();
    let connections = at.down("connections");
    wrong(connections.down("max"), config.connections.max > 0, "no connections at all", "allow at least 1");
    let connect = span(config.connections.connect_timeout);
    wrong(connections.down("connect_timeout"), connect, "connecting without a limit", "write a duration like `1s`");
    let places = config.max_requests != Some(0);
    wrong(at.down("max_requests"), places, "no requests at all", "allow at least 1, or remove it for no limit");
    let waits = span(config.pending_timeout);
    wrong(
        at.down("pending_timeout"),
        waits,
        "waiting without a limit",
        "write a duration like `5s`; `max_pending: 0` lets nobody wait",
    );
    let hashed = config.balance == Balance::RingHash;
    wrong(
        at.down("hash_by"),
        hashed || config.hash_by == [KeySource::Ip],
        "`hash_by` without `ring_hash`",
        "write `balance: ring_hash`, or remove it",
    );
    wrong(
        at.down("hash_by"),
        !config.hash_by.is_empty(),
        "nothing to hash",
        "name `cookie:NAME`, `header:NAME` or `ip`",
    );
    let claim = config.hash_by.iter().any(|source| matches!(source, KeySource::Claim(_)));
    wrong(
        at.down("hash_by"),
        !claim,
        "a claim chooses the arm, not the endpoint",
        "name `cookie:NAME`, `header:NAME` or `ip`; `auth: {forward: …}` puts a claim into a header",
    );
    let sticky = config.hash_by.contains(&KeySource::Sticky);
    wrong(
        at.down("hash_by"),
        !sticky,
        "`sticky` chooses the arm, not the endpoint",
        "name `cookie:NAME`, `header:NAME` or `ip`",
    );
    for (n, source) in config.hash_by.iter().enumerate() {
        if let KeySource::Header(name) = source
            && let Ok(name) = http::HeaderName::from_bytes(name.as_bytes())
        {
            must_arrive(sources, &at.down("hash_by").down(n), &name);
        }
    }
    let mut wrong = |at: At, holds: bool, what: &str, help: &str| {
        if !holds {
            sources.error(&at, what.to_owned(), help);
        }
    };
    if let Some(health) = &config.health {
        let at = at.down("health");
        let path = health.path.starts_with('/') && health.path.parse::<http::uri::PathAndQuery>().is_ok();
        wrong(at.down("path"), path, "not a path", "write it like `/healthz`");
        let often = health.every.0 >= Duration::from_millis(10);
        wrong(at.down("every"), often, "checks too often", "write `10ms` or more");
        wrong(at.down("timeout"), span(health.timeout), "a check without a limit", "write a duration like `1s`");
        wrong(at.down("healthy_after"), health.healthy_after > 0, "not a number of checks: 0", "1 or more");
        wrong(at.down("unhealthy_after"), health.unhealthy_after > 0, "not a number of checks: 0", "1 or more");
    }
    if let Some(OrNone::Some(outlier)) = &config.outlier {
        let at = at.down("outlier");
        let (least, out) = (outlier.consecutive_5xx > 0, span(outlier.base_ejection));
        wrong(at.down("consecutive_5xx"), least, "not a number of failures: 0", "1 or more, or `outlier: none`");
        wrong(at.down("base_ejection"), out, "an ejection that does not last", "write a duration like `30s`");
        wrong(at.down("interval"), span(outlier.interval), "not an interval: `0s`", "write a duration like `10s`");
    }
    if let Some(OrNone::Some(breaker)) = &config.breaker {
        let at = at.down("breaker");
        let within =
            |span: Span, from: u64, to: u64| (Duration::from_millis(from)..=Duration::from_secs(to)).contains(&span.0);
        let (ratio, half) = (breaker.failure_ratio.0 > 0, (1..=10_000).contains(&breaker.half_open_requests));
        wrong(
            at.down("failure_ratio"),
            ratio,
            "a breaker that is always open",
            "write a share like `50%`, or `breaker: none`",
        );
        wrong(at.down("min_requests"), breaker.min_requests > 0, "not a number of requests: 0", "1 or more");
        wrong(at.down("half_open_requests"), half, "not a number of requests", "from 1 to 10000");
        wrong(at.down("window"), within(breaker.window, 100, 3600), "window out of bounds", "from `100ms` to `1h`");
        wrong(at.down("open_for"), within(breaker.open_for, 10, 3600), "time out of bounds", "from `10ms` to `1h`");
    }
}

/// Reads a name to look up, with its scheme where it has one. An SRV record brings the port.
pub fn parse_name(text: &str, srv: bool) -> Result<Url, &'static str> {
    let (tls, rest) = match text.split_once("://") {
        None => (false, text),
        Some(("http", rest)) => (false, rest),
        Some(("https", rest)) => (true, rest),
        Some(_) => return Err("only `http://` and `https://` may stand before it"),
    };
    let help = if srv {
        "write it like `_http._tcp.orders.svc`, without a port"
    } else {
        "write it like `orders.svc:9001`, with a port and without a path"
    };
    let (name, port) = match rest.rsplit_once(':') {
        Some((name, port)) if !srv => (name, port.parse().ok().filter(|port| *port > 0).ok_or(help)?),
        None if srv => (rest, 0),
        _ => return Err(help),
    };
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    let labels: Vec<&str> = name.split('.').collect();
    let service = labels.iter().take_while(|label| label.starts_with('_')).count();
    if name.len() > 253 || !labels.iter().all(|text| label(text)) || (srv && (service != 2 || labels.len() < 3)) {
        return Err(help);
    }
    // The name that certificates are checked for is that of the service's domain (RFC 9525 §6.3).
    let host = if srv { labels[2..].join(".") } else { name };
    let authority = if srv { host.clone() } else { format!("{host}:{port}") };
    Ok(Url { tls, host, port, authority })
}

/// Whether a connection to `target` would reach a listener of ours at `own`.
pub fn is_same_listener(own: SocketAddr, target: SocketAddr) -> bool {
    let local = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
    own.port() == target.port()
        && own.port() != 0
        && (own.ip().to_canonical() == target.ip().to_canonical()
            || (local(own.ip()) && local(target.ip()) && (own.ip().is_unspecified() || target.ip().is_unspecified())))
}

/// The certificates of a PEM file.
pub fn read_ca(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(|error| error.to_string())?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in &certificates {
        roots.add(certificate.clone()).map_err(|error| error.to_string())?;
    }
    if certificates.is_empty() { Err("it has none".to_owned()) } else { Ok(certificates) }
}
