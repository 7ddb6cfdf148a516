//! Routes: names, stages, cohorts, rewrites.

use std::collections::HashMap;

use http::{HeaderName, Uri};

use super::{
    UNROUTED,
    auth::{check_auth, check_claims, check_cors},
    cache::check_route_cache,
    headers::check_headers,
    matching::{check_match, header_name, header_value, must_arrive},
    overlaps::{groups, ties_and_unreachable},
    policies::{Policies, check_policies},
    rollout::check_evidence,
    telemetry::check_tags,
};
use crate::{
    config::{
        Config,
        file::{CanaryConfig, GoneConfig, KeySource, PredicateConfig, RouteConfig, Stage, is_token},
        policy::FallbackOn,
        source::{At, Item, Sources, did_you_mean},
        values::OrNone,
    },
    routing::{
        path::PathPolicy,
        pattern::{Part, Pattern},
        table::Rule,
    },
};

/// Checks each route; the rules of those without an error in their match.
pub(super) fn check_routes(sources: &mut Sources, items: &[Item<RouteConfig>], paths: PathPolicy) -> Vec<Option<Rule>> {
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
        check_tags(sources, &item.at, &item.value);
        check_route(sources, item, rule.as_ref(), paths);
    }
    groups(sources, items);
    let known: Vec<(usize, &Rule)> =
        rules.iter().enumerate().filter_map(|(n, rule)| Some((n, rule.as_ref()?))).collect();
    ties_and_unreachable(sources, items, &known);
    rules
}

fn check_route(sources: &mut Sources, item: &Item<RouteConfig>, rule: Option<&Rule>, paths: PathPolicy) {
    let Item { at, value: route } = item;
    if route.stage.names_service() && route.upstream.is_none() {
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
            if route.rollout.is_some() {
                "add `canary: {by: [sticky]}`"
            } else {
                "add `canary: {percent: 1%, by: [sticky]}`"
            },
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
    check_policies(
        sources,
        at,
        &Policies {
            retry: route.retry.as_ref(),
            fallback: route.fallback.as_ref(),
            rate_limit: route.rate_limit.as_ref(),
            replay_body: route.replay_body.as_ref(),
            timeout: route.timeout.as_ref(),
        },
    );
    if let Some(OrNone::Some(auth)) = &route.auth {
        check_auth(sources, &at.down("auth"), auth);
    }
    if let Some(OrNone::Some(cors)) = &route.cors {
        check_cors(sources, &at.down("cors"), cors);
    }
    if let Some(OrNone::Some(cache)) = &route.cache {
        check_route_cache(sources, &at.down("cache"), cache);
    }
    check_evidence(sources, at, route, paths);
    check_claims(sources, item);
    let defaults = sources.file.defaults.clone();
    let fallback = route.fallback.as_ref().or(defaults.fallback.as_ref()).and_then(OrNone::as_option);
    let timeout = route.timeout.as_ref().or(defaults.timeout.as_ref()).and_then(OrNone::as_option);
    let attempt = timeout.and_then(|timeout| timeout.attempt.limit());
    if fallback.is_some_and(|fallback| fallback.when.contains(&FallbackOn::ServerError))
        && attempt.is_none()
        && matches!(route.stage, Stage::Canary | Stage::Migrated)
    {
        let at = if route.fallback.is_some() { at.down("fallback").at_key() } else { at.down("stage") };
        sources.warn(
            &at,
            "fallback on `5xx` without a limit for a try".to_owned(),
            "a service that hangs uses up all of `timeout.request`, and nothing is left for the monolith; add `timeout: {attempt: 5s}`",
        );
    }
    if route.stage == Stage::Retired && matches!(route.fallback, Some(OrNone::Some(_))) {
        sources.warn(
            &at.down("fallback").at_key(),
            "fallback of a retired route".to_owned(),
            "the monolith's code may be gone: a retired route never falls back; remove it, or write `stage: migrated`",
        );
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
    if predicate.header.is_empty() && predicate.cookie.is_empty() && predicate.claim.is_empty() {
        sources.error(
            at,
            "predicate that holds for every request".to_owned(),
            "name a `header:`, a `cookie:` or a `claim:` and its value",
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
