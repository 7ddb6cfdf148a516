//! What the types cannot say: names that must exist, rules that tie, routes that can never match.
//!
//! Every check goes on after an error, so that one report shows all of them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use http::{HeaderName, HeaderValue, Method, Uri};
use ipnet::IpNet;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};

use super::{
    Config, Report,
    file::{
        AllowInPaths, CanaryConfig, EditConfig, GoneConfig, HeadersConfig, KeySource, MatchConfig, PredicateConfig,
        RouteConfig, Stage, UpstreamConfig, is_token,
    },
    source::{At, Item, Sources, did_you_mean},
    values::OrNone,
};
use crate::{
    fields,
    routing::{
        path::{Oddity, PathPolicy},
        pattern::{Part, Pattern},
        predicate::Predicates,
        table::{HostPattern, Rule, normalise_host},
    },
};

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
    check_upstreams(&mut sources, addresses.as_ref());
    let defaults = sources.file.defaults.clone();
    if let Some(OrNone::Some(headers)) = &defaults.headers {
        check_headers(&mut sources, &At::root(0).down("defaults").down("headers"), headers);
    }
    let items = sources.routes.clone();
    let rules = check_routes(&mut sources, &items, paths);
    // A route that could not be read may be the one that uses it.
    if !sources.report.has_errors() {
        unused_upstreams(&mut sources, &items);
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
    })
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

fn check_upstreams(sources: &mut Sources, addresses: Option<&Addresses>) {
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

/// Checks each route; the rules of those without an error in their match.
fn check_routes(sources: &mut Sources, items: &[Item<RouteConfig>], paths: PathPolicy) -> Vec<Option<Rule>> {
    let rules: Vec<Option<Rule>> = items.iter().map(|item| check_match(sources, item, paths)).collect();
    let mut names: HashMap<&str, &At> = HashMap::new();
    for (item, rule) in items.iter().zip(&rules) {
        let name = Config::route_name(&item.value);
        let at = match item.value.name {
            Some(_) => item.at.down("name"),
            None => item.at.down("match"),
        };
        if name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
            sources.error(
                &at,
                format!("not a name: `{}`", name.escape_debug()),
                "use a short text without control characters",
            );
        }
        if name == UNROUTED {
            sources.error(&at, format!("reserved name: `{name}`"), "it counts what no route claims; choose another");
        }
        if let Some(first) = names.insert(name, &item.at) {
            let line = sources.line(first);
            sources.error(
                &at,
                format!("duplicate route name: `{name}`"),
                &format!("it is at {line}; give one of the two another `name:`"),
            );
        }
        check_route(sources, item, rule.as_ref(), paths);
    }
    groups(sources, items);
    let known: Vec<(usize, &Rule)> =
        rules.iter().enumerate().filter_map(|(n, rule)| Some((n, rule.as_ref()?))).collect();
    ties_and_unreachable(sources, items, &known);
    rules
}

fn check_match(sources: &mut Sources, item: &Item<RouteConfig>, paths: PathPolicy) -> Option<Rule> {
    let MatchConfig { path, methods, hosts, headers, query } = &item.value.matching;
    let errors = sources.report.errors();
    let at = item.at.down("match");
    let pattern = match Pattern::parse(path, paths.case_insensitive) {
        Ok(pattern) => Some(pattern),
        Err((message, help)) => {
            sources.error(&at.down("path"), message, &help);
            None
        }
    };
    let mut predicates = Predicates::default();
    for (n, text) in methods.iter().enumerate() {
        let at = at.down("methods").down(n);
        let upper = text.to_ascii_uppercase();
        match Method::from_bytes(text.as_bytes()) {
            Ok(Method::CONNECT) => sources.error(
                &at,
                "method that is never routed: `CONNECT`".to_owned(),
                "remove it; the gateway is no tunnel",
            ),
            Ok(method) if upper == *text => {
                if predicates.methods.contains(&method) {
                    sources.error(&at, format!("method listed twice: `{text}`"), "remove one");
                }
                predicates.methods.push(method);
            }
            _ => sources.error(
                &at,
                format!("not a method: `{text}`"),
                &format!("methods are upper case: write `{upper}`"),
            ),
        }
    }
    let mut patterns = Vec::new();
    for (n, text) in hosts.iter().enumerate() {
        let at = at.down("hosts").down(n);
        match host_pattern(text) {
            Ok(host) if patterns.contains(&host) => {
                sources.error(&at, format!("host listed twice: `{text}`"), "remove one");
            }
            Ok(host) => patterns.push(host),
            Err(help) => sources.error(&at, format!("not a host: `{text}`"), help),
        }
    }
    for (name, value) in headers {
        let at = at.down("headers").down(name.as_str());
        if let Some(name) = header_name(sources, &at, name) {
            if name == http::header::HOST {
                sources.error(&at.clone().at_key(), "host matched as a header".to_owned(), "match hosts with `hosts:`");
            }
            if predicates.headers.iter().any(|(known, _)| *known == name) {
                sources.error(&at.clone().at_key(), format!("header listed twice: `{name}`"), "keep one of the two");
            }
            must_arrive(sources, &at.clone().at_key(), &name);
            header_value(sources, &at, value);
            predicates.headers.push((name, value.as_bytes().into()));
        }
    }
    predicates.query = query.iter().map(|(name, value)| (name.as_bytes().into(), value.as_bytes().into())).collect();
    (sources.report.errors() == errors).then_some(Rule {
        hosts: patterns,
        pattern: pattern?,
        predicates,
        priority: item.value.priority,
        terminal: item.value.stage.is_terminal(),
    })
}

fn host_pattern(text: &str) -> Result<HostPattern, &'static str> {
    let (name, wildcard) = match text.strip_prefix("*.") {
        Some(name) => (name, true),
        None => (text, false),
    };
    let is_ipv6 = name
        .strip_prefix('[')
        .and_then(|n| n.strip_suffix(']'))
        .is_some_and(|n| n.parse::<std::net::Ipv6Addr>().is_ok());
    if name == "*" {
        return Err("leave `hosts:` out to take every host");
    }
    if !is_ipv6 && name.contains(':') {
        return Err("leave the port out: ports are ignored");
    }
    let valid =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if !is_ipv6 && !name.trim_end_matches('.').split('.').all(valid) {
        return Err("write a name like `shop.example.com` or `*.example.com`");
    }
    let name = normalise_host(name.as_bytes());
    Ok(if wildcard {
        HostPattern::Below([b".", name.as_slice()].concat().into())
    } else {
        HostPattern::Exact(name.into())
    })
}

/// A field that the gateway strips before anything looks at it can decide nothing.
fn must_arrive(sources: &mut Sources, at: &At, name: &HeaderName) {
    if fields::is_hop_by_hop(name.as_str()) || fields::voice(name.as_str()) == Some(fields::Voice::Gateway) {
        let help = "the gateway strips it from every request before it matches; choose another";
        sources.error(at, format!("header that is never matched: `{name}`"), help);
    }
}

fn header_name(sources: &mut Sources, at: &At, name: &str) -> Option<HeaderName> {
    let parsed = HeaderName::from_bytes(name.as_bytes()).ok();
    if parsed.is_none() {
        sources.error(&at.clone().at_key(), format!("not a header's name: `{name}`"), "use letters, digits and `-`");
    }
    parsed
}

fn header_value(sources: &mut Sources, at: &At, value: &str) {
    if HeaderValue::from_str(value).is_err() || value.trim() != value {
        sources.error(at, "not a header's value".to_owned(), "use visible characters, without spaces at either end");
    }
}

fn check_route(sources: &mut Sources, item: &Item<RouteConfig>, rule: Option<&Rule>, paths: PathPolicy) {
    let Item { at, value: route } = item;
    if route.stage.uses_service() && route.upstream.is_none() {
        sources.error(
            &at.down("stage"),
            format!("stage `{}` without a service", route.stage.word()),
            "name it: `upstream: …`, or write `stage: legacy`",
        );
    }
    for (key, name) in [("upstream", &route.upstream), ("baseline", &route.baseline)] {
        if let Some(name) = name {
            known_upstream(sources, &at.down(key), name);
        }
    }
    if route.upstream.is_some() && route.upstream.as_deref() == Some(route.baseline.as_deref().unwrap_or("legacy")) {
        sources.error(
            &at.down("upstream"),
            "service and baseline are the same upstream".to_owned(),
            "name the extracted service in `upstream:`, or remove the route: what no route claims is the monolith's",
        );
    }
    match &route.canary {
        None if route.stage == Stage::Canary => sources.error(
            &at.down("stage"),
            "stage `canary` without a `canary:`".to_owned(),
            "add `canary: {percent: 1%, by: [sticky]}`",
        ),
        None => {}
        Some(canary) => check_canary(sources, &at.down("canary"), route, canary),
    }
    if let Some(gone) = &route.gone {
        check_gone(sources, &at.down("gone"), gone);
    }
    if let Some(prefix) = route.rewrite.as_ref().and_then(|rewrite| rewrite.strip_prefix.as_deref()) {
        let at = at.down("rewrite").down("strip_prefix");
        match prefix_segments(prefix, paths) {
            Err(help) => sources.error(&at, format!("not a prefix: `{prefix}`"), &help),
            Ok(segments) if rule.is_some_and(|rule| !rule.pattern.is_below(&segments)) => sources.error(
                &at,
                format!("prefix that the route's paths do not have: `{prefix}`"),
                &format!("the route takes `{}`; strip leading segments of that", route.matching.path),
            ),
            Ok(_) => {}
        }
    }
    if let Some(OrNone::Some(headers)) = &route.headers {
        check_headers(sources, &at.down("headers"), headers);
    }
}

/// The segments of a prefix, in their matched form.
pub fn prefix_segments(prefix: &str, paths: PathPolicy) -> Result<Vec<Box<[u8]>>, String> {
    let pattern =
        Pattern::parse(prefix, paths.case_insensitive).map_err(|(message, help)| format!("{message}; {help}"))?;
    let literals: Option<Vec<_>> = pattern
        .parts()
        .iter()
        .map(|part| match part {
            Part::Literal(literal) => Some(literal.clone()),
            _ => None,
        })
        .collect();
    literals.filter(|segments| !segments.is_empty()).ok_or_else(|| "write leading segments like `/api`".to_owned())
}

fn known_upstream(sources: &mut Sources, at: &At, name: &str) {
    if sources.incomplete || sources.upstream_names.iter().any(|known| known == name) {
        return;
    }
    let mut names: Vec<&str> = sources.upstream_names.iter().map(String::as_str).collect();
    names.sort_unstable();
    let known = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let help = match did_you_mean(name, names.iter().copied()) {
        Some(close) => format!("did you mean `{close}`? known upstreams: {known}"),
        None => format!("add it under `upstreams:`; known upstreams: {known}"),
    };
    sources.error(at, format!("unknown upstream: `{name}`"), &help);
}

fn check_canary(sources: &mut Sources, at: &At, route: &RouteConfig, canary: &CanaryConfig) {
    let group = canary.group.as_deref().or(route.name.as_deref());
    match group {
        None => sources.error(
            &at.clone().at_key(),
            "canary without a `name:`".to_owned(),
            "name the route: its cohorts hang on the name, and a path may change",
        ),
        Some(group) if !is_token(group) => {
            let at = if canary.group.is_some() { at.down("group") } else { at.clone().at_key() };
            sources.error(
                &at,
                format!("not a group's name: `{group}`"),
                "cohorts need a name of letters, digits, `-`, `_` and `.`: set `name:` or `group:`",
            );
        }
        Some(_) => {}
    }
    if canary.by.is_empty() {
        sources.error(
            &at.down("by"),
            "no cohort key".to_owned(),
            "name where it comes from: `by: [sticky]`, `cookie:NAME`, `header:NAME` or `ip`",
        );
    }
    if canary.by == [KeySource::Ip] {
        sources.warn(
            &at.down("by"),
            "cohorts by address alone".to_owned(),
            "many users share one address, and one user has several; put `sticky` or a cookie in its place",
        );
    }
    if let Some(n) = canary.by.iter().position(|key| matches!(key, KeySource::Ip | KeySource::Sticky))
        && n + 1 < canary.by.len()
    {
        sources.warn(
            &at.down("by").down(n + 1),
            "cohort key that is never reached".to_owned(),
            "every request has the one before it; put this one first",
        );
    }
    for (n, source) in canary.by.iter().enumerate() {
        if let KeySource::Header(name) = source {
            let at = at.down("by").down(n);
            if let Ok(name) = HeaderName::from_bytes(name.as_bytes()) {
                must_arrive(sources, &at, &name);
            }
        }
    }
    for (list, key) in [(&canary.always, "always"), (&canary.never, "never")] {
        for (n, predicate) in list.iter().enumerate() {
            check_predicate(sources, &at.down(key).down(n), predicate);
        }
    }
}

fn check_predicate(sources: &mut Sources, at: &At, predicate: &PredicateConfig) {
    if predicate.header.is_empty() && predicate.cookie.is_empty() {
        sources.error(
            at,
            "predicate that holds for every request".to_owned(),
            "name a `header:` or a `cookie:` and its value",
        );
    }
    for (name, value) in &predicate.header {
        let at = at.down("header").down(name.as_str());
        if let Some(name) = header_name(sources, &at, name) {
            must_arrive(sources, &at.clone().at_key(), &name);
        }
        header_value(sources, &at, value);
    }
    for name in predicate.cookie.keys() {
        if !is_token(name) {
            sources.error(
                &at.down("cookie").down(name.as_str()).at_key(),
                format!("not a cookie's name: `{name}`"),
                "use letters, digits, `-` and `_`",
            );
        }
    }
}

fn check_gone(sources: &mut Sources, at: &At, gone: &GoneConfig) {
    for (key, value) in [("deprecation", &gone.deprecation), ("sunset", &gone.sunset)] {
        if let Some(text) = value
            && parse_date(text).is_none_or(|date| date < jiff::Timestamp::UNIX_EPOCH)
        {
            sources.error(
                &at.down(key),
                format!("not a date: `{text}`"),
                "write it like `2026-01-31` or `2026-01-31T12:00:00Z`",
            );
        }
    }
    if let Some(successor) = &gone.successor
        && (successor.parse::<Uri>().is_err() || successor.contains(['<', '>', '"', ' ']))
    {
        sources.error(
            &at.down("successor"),
            format!("not a URL: `{successor}`"),
            "write it like `/v2/orders` or `https://shop.example.com/v2/orders`",
        );
    }
}

/// A date at midnight UTC, or a moment.
pub fn parse_date(text: &str) -> Option<jiff::Timestamp> {
    let date = || {
        let date: jiff::civil::Date = text.parse().ok().filter(|_| text.len() == 10)?;
        date.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
    };
    text.parse().ok().or_else(date)
}

fn check_headers(sources: &mut Sources, at: &At, headers: &HeadersConfig) {
    for (side, edit) in [("request", &headers.request), ("response", &headers.response)] {
        check_edit(sources, &at.down(side), edit);
    }
}

fn check_edit(sources: &mut Sources, at: &At, edit: &EditConfig) {
    for (key, map) in [("set", &edit.set), ("add", &edit.add)] {
        for (name, value) in map {
            let at = at.down(key).down(name.as_str());
            if let Some(name) = header_name(sources, &at, name) {
                editable(sources, &at.clone().at_key(), &name);
                header_value(sources, &at, value);
            }
        }
    }
    for (n, name) in edit.remove.iter().enumerate() {
        let at = at.down("remove").down(n);
        if let Some(name) = header_name(sources, &at, name) {
            editable(sources, &at, &name);
        }
    }
}

fn editable(sources: &mut Sources, at: &At, name: &HeaderName) {
    let framing = matches!(name.as_str(), "host" | "content-length" | "trailer" | "via");
    if framing || fields::is_hop_by_hop(name.as_str()) || name.as_str().starts_with("x-gateway-") {
        let help = if name == http::header::HOST {
            "set it with `rewrite: {host: upstream}`"
        } else {
            "it belongs to the gateway; remove this line"
        };
        sources.error(at, format!("header that cannot be edited: `{name}`"), help);
    }
}

fn ties_and_unreachable(sources: &mut Sources, items: &[Item<RouteConfig>], rules: &[(usize, &Rule)]) {
    let mut groups: BTreeMap<(&HostPattern, &Pattern), Vec<(usize, &Rule)>> = BTreeMap::new();
    for (n, rule) in rules {
        for host in rule.host_patterns() {
            groups.entry((host, &rule.pattern)).or_default().push((*n, rule));
        }
    }
    let name = |n: usize| Config::route_name(&items[n].value);
    let mut tied = HashSet::new();
    // A route is unreachable when it is so under each of its hosts.
    let mut covered: HashMap<usize, (usize, usize)> = HashMap::new();
    for group in groups.values() {
        for (at, (n, rule)) in group.iter().enumerate() {
            let rank = rule.predicates.rank(rule.priority);
            let mut better = Vec::new();
            let mut told = false;
            for (place, (other, theirs)) in group.iter().enumerate() {
                if place == at || !rule.predicates.overlaps(&theirs.predicates) {
                    continue;
                }
                match theirs.predicates.rank(theirs.priority).cmp(&rank) {
                    // One tie a rule is enough to say, and bounds the work.
                    std::cmp::Ordering::Equal if place < at && !told && tied.insert((*other, *n)) => {
                        told = true;
                        let line = sources.line(&items[*other].at.down("match"));
                        sources.error(
                            &items[*n].at.down("match"),
                            format!("route `{}` ties with route `{}`", name(*n), name(*other)),
                            &format!("both match some request, see {line}: give one a higher `priority:`, or another method, header or query"),
                        );
                    }
                    std::cmp::Ordering::Less if theirs.predicates.fields_cover(&rule.predicates) => {
                        better.push((*other, *theirs));
                    }
                    _ => {}
                }
            }
            let all = better.iter().any(|(_, theirs)| theirs.predicates.methods.is_empty());
            let listed = !rule.predicates.methods.is_empty()
                && rule
                    .predicates
                    .methods
                    .iter()
                    .all(|method| better.iter().any(|(_, theirs)| theirs.predicates.methods.contains(method)));
            if let (true, Some((by, _))) = (all || listed, better.first()) {
                covered.entry(*n).or_insert((0, *by)).0 += 1;
            }
        }
    }
    for (n, rule) in rules {
        if let Some((hosts, by)) = covered.get(n)
            && *hosts == rule.host_patterns().count()
        {
            let line = sources.line(&items[*by].at.down("match"));
            sources.error(
                &items[*n].at.down("match"),
                format!("route `{}` can never match", name(*n)),
                &format!(
                    "route `{}` at {line} takes all its requests first; remove one of the two or change a `priority:`",
                    name(*by)
                ),
            );
        }
    }
}

/// Routes of one group share cohorts only while they ask for the same key and share.
fn groups(sources: &mut Sources, items: &[Item<RouteConfig>]) {
    let mut seen: HashMap<&str, (&CanaryConfig, &At)> = HashMap::new();
    for Item { at, value } in items.iter().filter(|item| item.value.stage == Stage::Canary) {
        let Some(canary) = &value.canary else { continue };
        let Some(group) = canary.group.as_deref().or(value.name.as_deref()) else { continue };
        let (first, first_at) = *seen.entry(group).or_insert((canary, at));
        if first.by != canary.by || first.percent != canary.percent {
            let line = sources.line(&first_at.down("canary"));
            sources.warn(
                &at.down("canary").at_key(),
                format!("routes of group `{group}` differ in `by` or `percent`"),
                &format!("see {line}: a user may be on the service here and on the monolith there"),
            );
        }
    }
}

fn unused_upstreams(sources: &mut Sources, items: &[Item<RouteConfig>]) {
    let used: HashSet<&str> = items
        .iter()
        .flat_map(|item| [item.value.upstream.as_deref(), item.value.baseline.as_deref()])
        .flatten()
        .chain(["legacy"])
        .collect();
    for Item { at, value: (name, _) } in sources.upstreams.clone() {
        if !used.contains(name.as_str()) {
            sources.warn(
                &at.at_key(),
                format!("unused upstream: `{name}`"),
                "name it in a route's `upstream:`, or remove it",
            );
        }
    }
}
