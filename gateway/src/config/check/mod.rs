//! What the types cannot say: names that must exist, rules that tie, routes that can never match.
//!
//! Every check goes on after an error, so that one report shows all of them. Here are the
//! file's own keys; `upstreams`, `routes`, what they match and how they overlap have a file each.

mod auth;
mod cache;
mod headers;
mod matching;
mod overlaps;
mod policies;
mod rollout;
mod routes;
mod telemetry;
mod upstreams;

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use ipnet::IpNet;

pub use self::{
    auth::{open_routes, parse_jwks},
    rollout::split_url,
    routes::{parse_date, prefix_segments},
    upstreams::{Url, is_same_listener, parse_name, parse_url, read_ca},
};
use super::{
    Config, Report,
    file::AllowInPaths,
    source::{At, Sources},
    values::{OrNone, Size, Span},
};
use crate::routing::path::{Oddity, PathPolicy};

/// The name under which requests that no route claims are counted.
pub const UNROUTED: &str = "unrouted";

/// Checks what was read and joins it.
pub(super) fn check(mut sources: Sources) -> Result<Config, Report> {
    if sources.is_empty() {
        return Err(sources.report);
    }
    let paths = path_policy(&sources);
    let addresses = addresses(&mut sources);
    let trusted_proxies = trusted_proxies(&mut sources);
    let resolver = resolver(&mut sources);
    client_limits(&mut sources);
    auth::check_verifiers(&mut sources);
    cache::check_cache(&mut sources);
    rollout::check_webhooks(&mut sources);
    telemetry::check_telemetry(&mut sources);
    upstreams::check_upstreams(&mut sources, addresses.as_ref());
    let defaults = sources.file.defaults.clone();
    if let Some(OrNone::Some(headers)) = &defaults.headers {
        headers::check_headers(&mut sources, &At::root(0).down("defaults").down("headers"), headers);
    }
    let at = At::root(0).down("defaults");
    policies::check_policies(
        &mut sources,
        &at,
        &policies::Policies {
            retry: defaults.retry.as_ref(),
            fallback: defaults.fallback.as_ref(),
            rate_limit: defaults.rate_limit.as_ref(),
            replay_body: defaults.replay_body.as_ref(),
            timeout: defaults.timeout.as_ref(),
        },
    );
    if let Some(OrNone::Some(auth)) = &defaults.auth {
        auth::check_auth(&mut sources, &at.down("auth"), auth);
    }
    if let Some(OrNone::Some(cors)) = &defaults.cors {
        auth::check_cors(&mut sources, &at.down("cors"), cors);
    }
    if let Some(OrNone::Some(cache)) = &defaults.cache {
        cache::check_route_cache(&mut sources, &at.down("cache"), cache);
    }
    let items = sources.routes.clone();
    let rules = routes::check_routes(&mut sources, &items, paths);
    auth::check_claim_fields(&mut sources, &items);
    auth::check_unrouted(&mut sources);
    // A route that could not be read may be the one that uses it.
    if !sources.report.has_errors() {
        overlaps::unused_upstreams(&mut sources, &items);
    }
    sources.report.sort();
    let (Some(addresses), false) = (addresses, sources.report.has_errors()) else {
        return Err(sources.report);
    };
    let Sources { report, file, upstreams, routes, hash, .. } = sources;
    Ok(Config {
        file,
        upstreams: upstreams.into_iter().map(|item| item.value).collect(),
        routes: routes.into_iter().map(|item| item.value).collect(),
        rules: rules.into_iter().flatten().collect(),
        warnings: report,
        hash,
        listen: addresses.listen,
        admin: addresses.admin,
        health: addresses.health,
        paths,
        trusted_proxies,
        resolver,
    })
}

fn resolver(sources: &mut Sources) -> Vec<SocketAddr> {
    let texts = sources.file.resolver.clone();
    let at = At::root(0).down("resolver");
    texts.iter().enumerate().filter_map(|(n, text)| address(sources, &at.down(n), text)).collect()
}

fn path_policy(sources: &Sources) -> PathPolicy {
    let mut policy = PathPolicy::default();
    policy.case_insensitive = sources.file.case_insensitive;
    for allowed in &sources.file.allow_in_paths {
        policy = policy.allowing(match allowed {
            AllowInPaths::EncodedSlash => Oddity::EncodedSlash,
            AllowInPaths::Backslash => Oddity::Backslash,
            AllowInPaths::EncodedBackslash => Oddity::EncodedBackslash,
            AllowInPaths::EncodedControl => Oddity::EncodedControl,
            AllowInPaths::DotParams => Oddity::DotParams,
            AllowInPaths::BadEscape => Oddity::BadEscape,
        });
    }
    policy
}

struct Addresses {
    listen: SocketAddr,
    admin: SocketAddr,
    health: Option<SocketAddr>,
}

fn addresses(sources: &mut Sources) -> Option<Addresses> {
    let root = At::root(0);
    let file = sources.file.clone();
    if file.version != 1 {
        sources.error(
            &root.down("version"),
            format!("unknown version of the language: {}", file.version),
            "this gateway reads `version: 1`",
        );
    }
    let admin_at = root.down("admin").down("listen");
    let listen = address(sources, &root.down("listen"), &file.listen);
    let admin = address(sources, &admin_at, &file.admin.listen);
    let health_at = root.down("health");
    let health = file.health.as_deref().map(|text| address(sources, &health_at, text));
    let health = health.flatten();
    if let Some(admin) = admin.filter(|admin| !admin.ip().is_loopback() && file.admin.token.is_empty()) {
        sources.error(
            &admin_at,
            format!("admin listener open to others without a token: `{admin}`"),
            "set `admin: {listen: …, token: \"${ADMIN_TOKEN}\"}`, or listen on `127.0.0.1`",
        );
    }
    if !file.admin.token.bytes().all(|b| b.is_ascii_graphic()) {
        sources.error(
            &root.down("admin").down("token"),
            "token with characters that a header cannot carry".to_owned(),
            "use letters, digits and punctuation, without spaces",
        );
    }
    let clash = |a: SocketAddr, b: SocketAddr| {
        a.port() != 0
            && a.port() == b.port()
            && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
    };
    if let (Some(listen), Some(admin)) = (listen, admin)
        && clash(listen, admin)
    {
        sources.error(
            &admin_at,
            format!("address in use by `listen`: `{admin}`"),
            "give the admin listener a port of its own",
        );
    }
    if let Some(health) = health
        && [listen, admin].into_iter().flatten().any(|other| clash(health, other))
    {
        sources.error(
            &health_at,
            format!("address in use by another listener: `{health}`"),
            "give the probes a port of their own",
        );
    }
    Some(Addresses { listen: listen?, admin: admin?, health })
}

fn address(sources: &mut Sources, at: &At, text: &str) -> Option<SocketAddr> {
    let parsed = text.parse().ok();
    if parsed.is_none() {
        sources.error(
            at,
            format!("not an address: `{text}`"),
            "write an IP address and a port, like `0.0.0.0:8080` or `[::]:8080`",
        );
    }
    parsed
}

/// A limit that nothing passes would be an outage; one without an end, none.
fn client_limits(sources: &mut Sources) {
    let clients = sources.file.clients.clone();
    let at = At::root(0).down("clients");
    let mut bounds = |key: &'static str, holds: bool, found: String, hint: &'static str| {
        if !holds {
            sources.error(&at.down(key), format!("limit out of bounds: `{found}`"), hint);
        }
    };
    let size = |size: Size, from: u64, to: u64| (from..=to).contains(&size.0);
    let seconds = |span: Span, to: u64| span.0 >= Duration::from_millis(100) && span.0 <= Duration::from_secs(to);
    bounds("max_connections", clients.max_connections >= 1, clients.max_connections.to_string(), "1 or more");
    bounds("max_requests", clients.max_requests >= 1, clients.max_requests.to_string(), "1 or more");
    bounds("max_streams", clients.max_streams >= 1, clients.max_streams.to_string(), "1 or more");
    let (header, uri) = (clients.max_header, clients.max_uri);
    bounds("max_header", size(header, 1024, 1 << 20), header.to_string(), "from `1KiB` to `1MiB`");
    bounds("max_uri", size(uri, 256, header.0), uri.to_string(), "from `256B` to `max_header`");
    let (head, idle) = (clients.header_timeout, clients.keep_alive);
    bounds("header_timeout", seconds(head, 300), head.to_string(), "from `100ms` to `5m`");
    bounds("keep_alive", seconds(idle, 3600), idle.to_string(), "from `100ms` to `1h`");
}

fn trusted_proxies(sources: &mut Sources) -> Vec<IpNet> {
    let mut nets = Vec::new();
    for (n, text) in sources.file.trusted_proxies.clone().iter().enumerate() {
        match text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)) {
            Ok(net) => nets.push(net.trunc()),
            Err(_) => sources.error(
                &At::root(0).down("trusted_proxies").down(n),
                format!("not a network: `{text}`"),
                "write it like `10.0.0.0/8`, `192.0.2.1` or `2001:db8::/32`",
            ),
        }
    }
    nets
}
