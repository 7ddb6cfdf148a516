//! What a route matches: its path, methods, hosts, fields and query, made into a rule.

use http::{HeaderName, HeaderValue, Method};

use crate::{
    config::{
        file::{MatchConfig, RouteConfig},
        source::{At, Item, Sources},
    },
    fields,
    routing::{
        path::PathPolicy,
        pattern::Pattern,
        predicate::Predicates,
        table::{HostPattern, Rule, normalise_host},
    },
};

pub(super) fn check_match(sources: &mut Sources, item: &Item<RouteConfig>, paths: PathPolicy) -> Option<Rule> {
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
pub(super) fn must_arrive(sources: &mut Sources, at: &At, name: &HeaderName) {
    if fields::is_hop_by_hop(name.as_str()) || fields::voice(name.as_str()) == Some(fields::Voice::Gateway) {
        let help = "the gateway strips it from every request before it matches; choose another";
        sources.error(at, format!("header that is never matched: `{name}`"), help);
    }
}

pub(super) fn header_name(sources: &mut Sources, at: &At, name: &str) -> Option<HeaderName> {
    let parsed = HeaderName::from_bytes(name.as_bytes()).ok();
    if parsed.is_none() {
        sources.error(&at.clone().at_key(), format!("not a header's name: `{name}`"), "use letters, digits and `-`");
    }
    parsed
}

pub(super) fn header_value(sources: &mut Sources, at: &At, value: &str) {
    if HeaderValue::from_str(value).is_err() || value.trim() != value {
        sources.error(at, "not a header's value".to_owned(), "use visible characters, without spaces at either end");
    }
}
