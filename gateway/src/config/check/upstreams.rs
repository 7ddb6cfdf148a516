//! The systems behind the gateway: their addresses and certificates.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use http::Uri;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};

use super::Addresses;
use crate::config::{
    file::{UpstreamConfig, is_token},
    source::{At, Item, Sources},
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

fn check_upstream(sources: &mut Sources, at: &At, config: &UpstreamConfig, addresses: Option<&Addresses>) {
    let url_at = at.down("url");
    match parse_url(&config.url) {
        Err(why) => sources.error(
            &url_at,
            format!("not an upstream's url: {why}"),
            "write `http://host:port` or `https://host:port`, without a path",
        ),
        Ok(url) => {
            if url.tls && ServerName::try_from(url.host.as_str()).is_err() {
                sources.error(
                    &url_at,
                    "not a name that a certificate can have".to_owned(),
                    "write the host's DNS name or IP address",
                );
            }
            if config.ca.is_some() && !url.tls {
                sources.error(
                    &at.down("ca"),
                    "`ca` without `https://`".to_owned(),
                    "write the url with `https://`, or remove `ca`",
                );
            }
            let own = addresses.into_iter().flat_map(|a| [Some(a.listen), Some(a.admin), a.health]).flatten();
            let ip = if url.host == "localhost" { Some(IpAddr::from([127, 0, 0, 1])) } else { url.host.parse().ok() };
            if ip.is_some_and(|ip| own.clone().any(|own| is_same_listener(own, SocketAddr::new(ip, url.port)))) {
                sources.error(
                    &url_at,
                    format!("upstream that is the gateway itself: `{}`", config.url),
                    "point it at the system behind the gateway",
                );
            }
        }
    }
    if let Some(ca) = &config.ca
        && let Err(why) = read_ca(&sources.report.files[0].parent().unwrap_or(Path::new("")).join(ca))
    {
        sources.error(
            &at.down("ca"),
            format!("cannot read certificates from `{ca}`: {why}"),
            "name a PEM file, relative to the main file",
        );
    }
    let connections = at.down("connections");
    if config.connections.max == 0 {
        sources.error(&connections.down("max"), "no connections at all".to_owned(), "allow at least 1");
    }
    if config.connections.connect_timeout.0.is_zero() {
        sources.error(
            &connections.down("connect_timeout"),
            "connecting without a limit".to_owned(),
            "write a duration like `1s`",
        );
    }
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
