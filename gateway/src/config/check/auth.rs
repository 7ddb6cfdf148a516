//! Verifiers, doors, and what pages of other origins may do.

use http::{HeaderName, Uri};

use super::{
    matching::{header_name, header_value},
    upstreams::{parse_url, read_ca},
};
use crate::{
    auth::{cors::Origin, keys},
    config::{
        Config,
        auth::{Algorithm, AuthConfig, CorsConfig, VerifierConfig},
        file::{KeySource, RouteConfig, Stage},
        policy::{Per, RateLimitConfig},
        source::{At, Item, Sources, did_you_mean},
        values::OrNone,
    },
    fields,
};

/// Clocks are not further apart than this (RFC 7519 §4.1.4: "a few minutes" at most).
const LEEWAY: u64 = 60;

pub(super) fn check_verifiers(sources: &mut Sources) {
    let verifiers = sources.file.auth.clone();
    for (name, config) in &verifiers {
        let at = At::root(0).down("auth").down(name.as_str());
        // It is said in a quoted text, to clients.
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
            let help = "use letters, digits, `-`, `_` and `.`";
            sources.error(&at.clone().at_key(), format!("not a name: `{name}`"), help);
        }
        check_verifier(sources, &at, config);
    }
}

fn check_verifier(sources: &mut Sources, at: &At, config: &VerifierConfig) {
    let given = [
        ("jwks", config.jwks.is_some()),
        ("jwks_file", config.jwks_file.is_some()),
        ("secret", config.secret.is_some()),
    ];
    let given: Vec<&str> = given.into_iter().filter(|(_, is)| *is).map(|(key, _)| key).collect();
    match given[..] {
        [] => sources.error(
            &at.clone().at_key(),
            "verifier without keys".to_owned(),
            "say where they are: `jwks: https://…`, `jwks_file: keys.json` or `secret: ${…}`",
        ),
        [_] => {}
        [_, second, ..] => sources.error(
            &at.down(second).at_key(),
            format!("verifier with keys from two places: `{}`", given.join("` and `")),
            "keep one of them",
        ),
    }
    if let Some(url) = &config.jwks
        && let Err(help) = parse_jwks(url)
    {
        sources.error(&at.down("jwks"), format!("not the URL of a JWK Set: `{url}`"), &help);
    }
    if config.ca.is_some() && !config.jwks.as_deref().is_some_and(|url| url.starts_with("https:")) {
        let help = "it is for `jwks:` with `https://`; remove it";
        sources.error(&at.down("ca").at_key(), "authorities that nothing asks".to_owned(), help);
    }
    if let Some(ca) = &config.ca
        && let Err(why) = read_ca(&sources.beside(ca))
    {
        sources.error(&at.down("ca"), why, "write the path of a PEM file, relative to this file");
    }
    if let Some(file) = &config.jwks_file {
        let read = std::fs::read(sources.beside(file)).map_err(|error| format!("cannot read `{file}`: {error}"));
        if let Err(why) = read.and_then(|text| keys::read(&text, config.algorithms(), true).map(|_| ())) {
            sources.error(&at.down("jwks_file"), why, "write the path of a JWK Set (RFC 7517), relative to this file");
        }
    }
    let leeway = config.leeway.0.as_secs() <= LEEWAY && config.leeway.0.subsec_millis() == 0;
    if !leeway {
        let help = "whole seconds, `60s` at most: a token that has expired is one that was taken back";
        sources.error(&at.down("leeway"), format!("leeway out of bounds: `{}`", config.leeway), help);
    }
    let cooldown = config.cooldown.0.as_millis();
    if !(100..=600_000).contains(&cooldown) {
        let help = "from `100ms` to `10m`";
        sources.error(&at.down("cooldown"), format!("pause out of bounds: `{}`", config.cooldown), help);
    }
    let secret = config.secret.as_deref();
    for (n, algorithm) in config.algorithms.iter().enumerate() {
        let at = at.down("algorithms").down(n);
        if config.algorithms[..n].contains(algorithm) {
            sources.error(&at, format!("algorithm listed twice: `{}`", algorithm.word()), "remove one");
        }
        let keyed = algorithm.secret().is_some();
        if keyed && config.jwks.is_some() {
            let help = "a set that anybody can fetch has no secrets; use `secret:` or `jwks_file:`, or remove it";
            sources.error(&at, format!("secret key from a URL: `{}`", algorithm.word()), help);
        }
        if !keyed && secret.is_some() {
            let help = "with `secret:` there are `HS256`, `HS384` and `HS512`";
            sources.error(&at, format!("algorithm that needs a key pair: `{}`", algorithm.word()), help);
        }
    }
    if secret.is_some() && config.algorithms.len() > 1 {
        let help = "one key, one algorithm (RFC 8725 §3.1): keep the one that the issuer uses";
        sources.error(&at.down("algorithms"), "several algorithms for one secret".to_owned(), help);
    }
    let mut texts: Vec<(At, &str)> = Vec::new();
    texts.extend(config.issuer.iter().map(|text| (at.down("issuer"), text.as_str())));
    texts.extend(config.typ.iter().map(|text| (at.down("typ"), text.as_str())));
    for (key, list) in [("audience", &config.audience), ("required_claims", &config.required_claims)] {
        texts.extend(list.iter().enumerate().map(|(n, text)| (at.down(key).down(n), text.as_str())));
    }
    for (at, _) in texts.into_iter().filter(|(_, text)| text.is_empty()) {
        sources.error(&at, "an empty text".to_owned(), "no token has that; write what it is, or remove the key");
    }
    if let Some(secret) = secret
        && let Some(least) = config.algorithms().iter().filter_map(|algorithm| Algorithm::secret(*algorithm)).max()
        && secret.len() < least
    {
        let help = format!(
            "its algorithms need {least} bytes (RFC 7518 §3.2); make a random one: `openssl rand -hex {least}`"
        );
        sources.error(&at.down("secret"), format!("secret of {} bytes", secret.len()), &help);
    }
    let bare = [("issuer", config.issuer.is_none(), "iss"), ("audience", config.audience.is_empty(), "aud")];
    for (key, missing, claim) in bare {
        if missing {
            sources.warn(
                &at.clone().at_key(),
                format!("verifier without `{key}`"),
                &format!("a token that was made for somebody else is taken too; say what `{claim}` must be (RFC 8725 §3.8, §3.9)"),
            );
        }
    }
}

/// Splits the URL of a set: where it is, and what is asked for there. Who can change it on the way chooses who comes in.
pub fn parse_jwks(url: &str) -> Result<(String, String), String> {
    let uri: Uri =
        url.parse().map_err(|_| "write it like `https://id.example.com/.well-known/jwks.json`".to_owned())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err("write it like `https://id.example.com/.well-known/jwks.json`".to_owned());
    };
    let base = format!("{scheme}://{authority}");
    let place = parse_url(&base)?;
    let loopback = place.host == "localhost" || place.host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    if !place.tls && !loopback {
        return Err("use `https://`: whoever can change the keys on the way chooses who comes in".to_owned());
    }
    let target = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    Ok((base, target.to_owned()))
}

pub(super) fn check_auth(sources: &mut Sources, at: &At, auth: &AuthConfig) {
    let names = sources.verifier_names.clone();
    if !names.contains(&auth.jwt) && !sources.incomplete {
        let known = names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let help = match did_you_mean(&auth.jwt, names.iter().map(String::as_str)) {
            Some(close) => format!("did you mean `{close}`? known verifiers: {known}"),
            None if names.is_empty() => "add it under `auth:`, at the top of the file".to_owned(),
            None => format!("add it under `auth:`; known verifiers: {known}"),
        };
        sources.error(&at.down("jwt"), format!("unknown verifier: `{}`", auth.jwt), &help);
    }
    for (n, scope) in auth.scopes.iter().enumerate() {
        // RFC 6749 §3.3
        if scope.is_empty() || !scope.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"\\".contains(&byte)) {
            let help = "use visible characters without blanks, quotes and backslashes";
            sources.error(&at.down("scopes").down(n), format!("not a scope: `{scope}`"), help);
        }
    }
    let mut carried: Vec<String> = Vec::new();
    for (claim, name) in &auth.forward {
        let at = at.down("forward").down(claim.as_str());
        // Servers that fold `_` see one field.
        let folded = name.to_ascii_lowercase().replace('_', "-");
        if carried.contains(&folded) {
            sources.error(&at, format!("header that carries two claims: `{name}`"), "give each a header of its own");
        }
        carried.push(folded);
        if claim.is_empty() {
            sources.error(&at.clone().at_key(), "an empty text".to_owned(), "name the claim");
        }
        if let Some(name) = header_name(sources, &at, name)
            && !may_carry(&name)
        {
            let help = "it means something else already, and would be stripped from every client's request; use a name like `x-user-id`";
            sources.error(&at, format!("header that cannot carry a claim: `{name}`"), help);
        }
    }
}

/// Whether a field can be the gateway's alone.
fn may_carry(name: &HeaderName) -> bool {
    let text = name.as_str();
    text.starts_with("x-")
        && fields::voice(text).is_none()
        && !fields::is_method_override(text)
        && !matches!(text, "x-request-id" | "x-requested-with" | "x-csrf-token" | "x-xsrf-token")
        || !text.starts_with("x-") && !fields::is_forbidden_in_trailers(name) && !is_standard(name.as_str())
}

/// Fields that clients send for a reason of their own.
fn is_standard(name: &str) -> bool {
    let known = [
        "dnt",
        "last-event-id",
        "upgrade-insecure-requests",
        "origin",
        "referer",
        "date",
        "from",
        "range",
        "prefer",
        "priority",
        "idempotency-key",
        "ratelimit",
    ];
    let families = ["accept", "if-", "content-", "access-control-", "sec-", "proxy-", "cache-", "trace", "user-agent"];
    known.contains(&name) || families.iter().any(|family| name.starts_with(family)) || name == "pragma"
}

pub(super) fn check_cors(sources: &mut Sources, at: &At, cors: &CorsConfig) {
    let any = |list: &[String]| list.iter().any(|item| item == "*");
    if cors.origins.is_empty() {
        sources.error(&at.down("origins"), "no origin".to_owned(), "name one, like `https://app.example.com`");
    }
    for (n, origin) in cors.origins.iter().enumerate() {
        let default = [("https://", ":443"), ("http://", ":80")];
        if default.iter().any(|(scheme, port)| origin.starts_with(scheme) && origin.ends_with(port)) {
            let help = "browsers leave out the scheme's own port; so must this";
            sources.error(&at.down("origins").down(n), format!("origin that no browser sends: `{origin}`"), help);
        }
        if origin != "*" && Origin::parse(origin).is_none() {
            let help = "write scheme and host, like `https://app.example.com` or `https://*.example.com`";
            sources.error(&at.down("origins").down(n), format!("not an origin: `{origin}`"), help);
        }
    }
    if any(&cors.expose) && cors.credentials {
        let help = "with cookies a browser takes `*` for a name; name the fields";
        sources.error(&at.down("expose"), "all fields, with cookies".to_owned(), help);
    }
    if any(&cors.origins) && cors.credentials {
        let help = "every page could act as its reader; name the origins";
        sources.error(&at.down("credentials"), "cookies for pages of every origin".to_owned(), help);
    }
    let lists =
        [("origins", &cors.origins), ("methods", &cors.methods), ("headers", &cors.headers), ("expose", &cors.expose)];
    for (key, list) in lists {
        if any(list) && list.len() > 1 {
            let help = "`\"*\"` is all of them; remove the others";
            sources.error(&at.down(key), "`*` beside others".to_owned(), help);
        }
    }
    for (n, method) in cors.methods.iter().enumerate().filter(|(_, method)| *method != "*") {
        let valid = http::Method::from_bytes(method.as_bytes()).is_ok() && method.to_ascii_uppercase() == *method;
        if !valid {
            let help = format!("methods are upper case: write `{}`", method.to_ascii_uppercase());
            sources.error(&at.down("methods").down(n), format!("not a method: `{method}`"), &help);
        }
    }
    for (key, list) in [("headers", &cors.headers), ("expose", &cors.expose)] {
        for (n, name) in list.iter().enumerate().filter(|(_, name)| *name != "*") {
            let at = at.down(key).down(n);
            if HeaderName::from_bytes(name.as_bytes()).is_err() {
                sources.error(&at, format!("not a header's name: `{name}`"), "use letters, digits and `-`");
            } else {
                header_value(sources, &at, name);
            }
        }
    }
}

/// What a route takes from a token, where it has none.
pub(super) fn check_claims(sources: &mut Sources, item: &Item<RouteConfig>) {
    let Item { at, value: route } = item;
    let defaults = sources.file.defaults.clone();
    let auth = route.auth.as_ref().or(defaults.auth.as_ref()).and_then(OrNone::as_option);
    let limit = |limit: Option<&OrNone<RateLimitConfig>>| match limit {
        Some(OrNone::Some(RateLimitConfig { per: Per::Claim(name), .. })) => Some(name.clone()),
        _ => None,
    };
    let help = "only verified tokens count: add `auth: {jwt: …}` to the route";
    if auth.is_none()
        && route.stage != Stage::Gone
        && let Some(name) = limit(route.rate_limit.as_ref().or(defaults.rate_limit.as_ref()))
    {
        let at = if route.rate_limit.is_some() { at.down("rate_limit").down("per") } else { at.down("match") };
        sources.error(&at, format!("limit by a claim without a token: `claim:{name}`"), help);
    }
    let Some(canary) = &route.canary else { return };
    let at = at.down("canary");
    if canary.by.is_empty() && auth.is_none() {
        sources.error(
            &at.down("by"),
            "no cohort key".to_owned(),
            "name where it comes from: `by: [sticky]`, `cookie:NAME`, `header:NAME` or `ip`; with `auth:` it is `claim:sub`",
        );
    }
    if auth.is_some() {
        return;
    }
    for (n, source) in canary.by.iter().enumerate() {
        if let KeySource::Claim(name) = source {
            sources.error(&at.down("by").down(n), format!("cohort by a claim without a token: `claim:{name}`"), help);
        }
    }
    for (list, key) in [(&canary.always, "always"), (&canary.never, "never")] {
        for (n, predicate) in list.iter().enumerate() {
            if let Some(name) = predicate.claim.keys().next() {
                let at = at.down(key).down(n).down("claim");
                sources.error(&at, format!("predicate on a claim without a token: `{name}`"), help);
            }
        }
    }
}

/// What no route claims has no door but that of `defaults`.
pub(super) fn check_unrouted(sources: &mut Sources) {
    let defaults = sources.file.defaults.clone();
    if let Some(OrNone::Some(RateLimitConfig { per: Per::Claim(name), .. })) = &defaults.rate_limit
        && defaults.auth.as_ref().and_then(OrNone::as_option).is_none()
    {
        let at = At::root(0).down("defaults").down("rate_limit").down("per");
        let help = "what no route claims brings no verified token: add `defaults: {auth: …}`, or say it on the routes that have one";
        sources.error(&at, format!("limit by a claim without a token: `claim:{name}`"), help);
    }
}

/// Fields that carry claims are stripped from every request before it is matched.
pub(super) fn check_claim_fields(sources: &mut Sources, items: &[Item<RouteConfig>]) {
    let of = |auth: Option<&OrNone<AuthConfig>>| -> Vec<HeaderName> {
        let auth = auth.and_then(OrNone::as_option);
        auth.into_iter().flat_map(|auth| auth.forward.values()).filter_map(|name| name.parse().ok()).collect()
    };
    let mut names = of(sources.file.defaults.auth.as_ref());
    names.extend(items.iter().flat_map(|item| of(item.value.auth.as_ref())));
    let names = fields::ClaimFields::new(names);
    for Item { at, value: route } in items {
        for name in route.matching.headers.keys().filter(|name| names.have(&name.to_ascii_lowercase())) {
            let help = "it carries a claim, so the gateway strips it from every client's request; claims choose the arm inside a route, never the route";
            let at = at.down("match").down("headers").down(name.as_str()).at_key();
            sources.error(&at, format!("header that is never matched: `{name}`"), help);
        }
    }
    for (name, at, instead) in keys(sources, items) {
        if names.have(&name) {
            let help = format!("it carries a claim, and clients' own are stripped: write `{instead}`");
            sources.error(&at, format!("header that no client sends: `{name}`"), &help);
        }
    }
    for (name, at) in edits(sources, items) {
        if names.have(&name.to_ascii_lowercase()) {
            let help = "it carries a claim: what is set here would be taken for one; use another name";
            sources.error(&at, format!("header that cannot be edited: `{name}`"), help);
        }
    }
}

/// The fields by which routes count requests or choose an arm, and what to write in their place where they carry claims.
fn keys(sources: &Sources, items: &[Item<RouteConfig>]) -> Vec<(String, At, &'static str)> {
    let root = At::root(0).down("defaults");
    let limits = items.iter().map(|item| (&item.at, item.value.rate_limit.as_ref()));
    let mut found = Vec::new();
    for (at, limit) in limits.chain([(&root, sources.file.defaults.rate_limit.as_ref())]) {
        if let Some(OrNone::Some(RateLimitConfig { per: Per::Header(name), .. })) = limit {
            found.push((name.clone(), at.down("rate_limit").down("per"), "per: \"claim:NAME\""));
        }
    }
    for Item { at, value: route } in items {
        let Some(canary) = &route.canary else { continue };
        let at = at.down("canary");
        for (n, source) in canary.by.iter().enumerate() {
            if let KeySource::Header(name) = source {
                found.push((name.clone(), at.down("by").down(n), "claim:NAME"));
            }
        }
        for (list, key) in [(&canary.always, "always"), (&canary.never, "never")] {
            for (n, predicate) in list.iter().enumerate() {
                for name in predicate.header.keys() {
                    let at = at.down(key).down(n).down("header").down(name.as_str()).at_key();
                    found.push((name.to_ascii_lowercase(), at, "claim: {NAME: value}"));
                }
            }
        }
    }
    found
}

/// The request fields that routes edit.
fn edits(sources: &Sources, items: &[Item<RouteConfig>]) -> Vec<(String, At)> {
    let root = At::root(0).down("defaults");
    let all = items.iter().map(|item| (&item.at, item.value.headers.as_ref()));
    let mut found = Vec::new();
    for (at, headers) in all.chain([(&root, sources.file.defaults.headers.as_ref())]) {
        let Some(headers) = headers.and_then(OrNone::as_option) else { continue };
        for (key, map) in [("set", &headers.request.set), ("add", &headers.request.add)] {
            let at = at.down("headers").down("request").down(key);
            found.extend(map.keys().map(|name| (name.clone(), at.down(name.as_str()).at_key())));
        }
    }
    found
}

/// The routes that anybody may ask, in a file whose others have a door. In its words the caller says it.
pub fn open_routes(config: &Config) -> Option<Vec<&str>> {
    let default = config.file.defaults.auth.as_ref();
    let open = |route: &&RouteConfig| {
        !matches!(route.stage, Stage::Gone) && route.auth.as_ref().or(default).and_then(OrNone::as_option).is_none()
    };
    let has = |route: &RouteConfig| route.stage != Stage::Gone && !open(&route);
    let closed = config.routes.iter().any(has) || default.is_some_and(|d| d.as_option().is_some());
    let mut names: Vec<&str> = config.routes.iter().filter(open).map(Config::route_name).collect();
    if default.and_then(OrNone::as_option).is_none() {
        names.push(super::UNROUTED);
    }
    closed.then_some(names)
}
