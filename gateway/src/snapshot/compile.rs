//! From a checked file to what runs: names become indices, texts become header values.

use std::{collections::HashMap, path::Path, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

use super::{
    AccessLog, Auth, ClientLimits, CohortValues, Drain, Edits, Fallback, Keep, Limits, Listeners, LogTo, RateLimit,
    Redact, Registry, Retry, Rewrite, Route, Snapshot,
};
use crate::{
    auth::{
        Verifier,
        cors::{Cors, Origin, Origins},
    },
    cache::Cache,
    config::{
        Config, RouteConfig, Stage, UNROUTED,
        auth::{AuthConfig, CorsConfig},
        cache::RouteCacheConfig,
        file::{
            CanaryConfig, ClientsConfig, EditConfig, GoneConfig, HeadersConfig, KeySource, PredicateConfig,
            RewriteConfig, TimeoutConfig, Upgrade,
        },
        parse_date,
        policy::{FallbackConfig, Idempotency, IdempotencyKey, Per, RateLimitConfig, RetryConfig, RetryOn},
        prefix_segments,
        telemetry::{AccessLogConfig, RedactField},
        upstream::Rate,
        values::{OrNone, Size},
    },
    fields::{BAGGAGE_MEMBER, ClaimFields, X_FORWARDED_PREFIX},
    resilience::{gcra::Quota, learned::Learned},
    rollout::overlay::Overlay,
    routing::{
        cohort::{self, Cohort, Traits},
        key::Key,
        path::PathPolicy,
        table::Table,
    },
    telemetry::metrics::Arm,
    upstream::rewrite::Addresses,
};

/// Compiles a file. What the registry has already is taken over.
pub fn compile(config: &Config, registry: &mut Registry, generation: u64) -> Result<Snapshot, String> {
    let folder = config.warnings.files.first().and_then(|main| main.parent()).unwrap_or(Path::new(""));
    let listeners = Listeners { public: config.listen, admin: config.admin, health: config.health };
    let mut upstreams = Vec::new();
    let mut index = HashMap::new();
    for (name, upstream) in &config.upstreams {
        index.insert(name.as_str(), upstreams.len());
        let upstream = registry.upstream(name, upstream, folder).map_err(|why| format!("upstream `{name}`: {why}"))?;
        upstreams.push(upstream);
    }
    let find = |name: &str| index.get(name).copied().ok_or_else(|| format!("unknown upstream: `{name}`"));
    let legacy = find("legacy")?;
    let defaults = &config.file.defaults;
    let mut verifiers = HashMap::new();
    for (name, verifier) in &config.file.auth {
        let made = registry.verifier(name, verifier, folder).map_err(|why| format!("verifier `{name}`: {why}"))?;
        verifiers.insert(name.as_str(), made);
    }
    let auth = |own: Option<&OrNone<AuthConfig>>| auth(own.or(defaults.auth.as_ref()), &verifiers);
    let cors = |own: Option<&OrNone<CorsConfig>>| cors(own.or(defaults.cors.as_ref()));
    let cache = |own: Option<&OrNone<RouteCacheConfig>>| keep(own.or(defaults.cache.as_ref()));
    let mut routes = Vec::with_capacity(config.routes.len() + 1);
    for route in &config.routes {
        let name = Config::route_name(route);
        let mut compiled = Route {
            stage: route.stage,
            overlay: registry.overlay(name, route),
            shadow: registry.shadow(name, route, config.paths),
            rollout: route.rollout.clone().filter(|_| route.stage == Stage::Canary).map(Arc::new),
            service: route.upstream.as_deref().map(find).transpose()?,
            baseline: route.baseline.as_deref().map_or(Ok(legacy), find)?,
            path: route.matching.path.as_str().into(),
            tags: route.tags.iter().map(|tag| tag.as_str().into()).collect(),
            limits: limits(route.timeout.as_ref().or(defaults.timeout.as_ref())),
            websocket: websocket(route.upgrades.as_ref().or(defaults.upgrades.as_ref())),
            max_body: max_body(route.max_body.as_ref().or(defaults.max_body.as_ref())),
            retry: retry(route.retry.as_ref().or(defaults.retry.as_ref())),
            replay_body: replay_body(route.replay_body.as_ref().or(defaults.replay_body.as_ref())),
            rate_limit: rate_limit(name, route.rate_limit.as_ref(), defaults.rate_limit.as_ref(), registry)?,
            auth: auth(route.auth.as_ref())?,
            cors: cors(route.cors.as_ref())?,
            cache: cache(route.cache.as_ref()),
            shape: shape(route, defaults.headers.as_ref(), defaults.auth.as_ref()),
            ..bare(name, legacy, registry)
        };
        if matches!(route.stage, Stage::Canary | Stage::Migrated) {
            let config = route.fallback.as_ref().or(defaults.fallback.as_ref());
            let service = route.upstream.as_deref().unwrap_or_default();
            compiled.fallback = fallback(config, || registry.learned(name, &route.matching.path, service));
        }
        headers(&mut compiled, route.headers.as_ref().or(defaults.headers.as_ref()))?;
        compiled.rewrite = route.rewrite.as_ref().map(|rewrite| self::rewrite(rewrite, config.paths)).transpose()?;
        if let Some(rewrite) = compiled.rewrite.as_mut().filter(|_| compiled.edit_request.name(&X_FORWARDED_PREFIX)) {
            // What the route says of the field stands.
            rewrite.prefix_header = None;
        }
        if route.stage == Stage::Canary {
            let canary = route.canary.as_ref().ok_or("stage `canary` without a `canary:`")?;
            compiled.cohort = Some(cohort(canary, route)?);
        }
        compiled.gone = route.gone.as_ref().map_or_else(|| Ok(HeaderMap::new()), gone)?;
        routes.push(compiled);
    }
    let mut unrouted = Route {
        limits: limits(defaults.timeout.as_ref()),
        websocket: websocket(defaults.upgrades.as_ref()),
        max_body: max_body(defaults.max_body.as_ref()),
        retry: retry(defaults.retry.as_ref()),
        replay_body: replay_body(defaults.replay_body.as_ref()),
        rate_limit: rate_limit(UNROUTED, None, defaults.rate_limit.as_ref(), registry)?,
        auth: auth(None)?,
        cors: cors(None)?,
        cache: cache(None),
        ..bare(UNROUTED, legacy, registry)
    };
    headers(&mut unrouted, defaults.headers.as_ref())?;
    routes.push(unrouted);
    let names = |route: &Route| {
        route.auth.iter().flat_map(|auth| auth.forward.clone()).map(|(_, name)| name).collect::<Vec<_>>()
    };
    let claim_fields = Arc::new(ClaimFields::new(routes.iter().flat_map(names)));
    let cache = routes.iter().any(|route| route.cache.is_some()).then(|| registry.cache(&config.file.cache));
    registry.keep_tracer(config.file.tracing.is_some());
    let verifiers: Vec<_> = verifiers.into_values().collect();
    registry.keep_only(&upstreams, &verifiers, cache.as_ref(), &routes);
    Ok(Snapshot {
        generation,
        hash: config.hash,
        loaded: jiff::Timestamp::now(),
        table: Table::new(config.rules.clone()),
        addresses: Addresses::new(upstreams.iter().map(|upstream| &**upstream)),
        own_cookies: routes.iter().filter_map(|route| Some(route.cohort.as_ref()?.cohort.cookie.clone())).collect(),
        cors: routes.iter().any(|route| route.cors.is_some()),
        claim_fields,
        cache,
        verifiers,
        routes,
        upstreams,
        paths: config.paths,
        trusted_proxies: config.trusted_proxies.clone(),
        drain: Drain { delay: config.file.drain.delay.0, limit: config.file.drain.limit.0 },
        clients: client_limits(&config.file.clients),
        listeners,
        resolver: config.resolver.clone(),
        inventory: config.file.inventory.as_option().is_some(),
        retire_after: config.file.inventory.as_option().cloned().unwrap_or_default().retire_after.0,
        access_log: access_log(config),
        tracer: config.file.tracing.as_ref().map(|tracing| registry.tracer(tracing)).transpose()?,
        webhooks: config.file.webhooks.clone(),
        admin_token: (!config.file.admin.token.is_empty()).then(|| config.file.admin.token.as_str().into()),
    })
}

fn access_log(config: &Config) -> AccessLog {
    let AccessLogConfig { to, sample, redact } = &config.file.access_log;
    AccessLog {
        to: match to.as_str() {
            "none" => LogTo::Nowhere,
            "stdout" => LogTo::Stdout,
            file => LogTo::File(config.resolve(file)),
        },
        sample: sample.0,
        redact: Redact {
            client: redact.contains(&RedactField::Client),
            path: redact.contains(&RedactField::Path),
            host: redact.contains(&RedactField::Host),
        },
    }
}

fn client_limits(config: &ClientsConfig) -> ClientLimits {
    let size = |size: Size| usize::try_from(size.0).unwrap_or(usize::MAX);
    ClientLimits {
        max_connections: i64::from(config.max_connections),
        max_streams: config.max_streams,
        max_requests: i64::from(config.max_requests),
        max_header: size(config.max_header),
        max_uri: size(config.max_uri),
        header_timeout: config.header_timeout.0,
        keep_alive: config.keep_alive.0,
    }
}

/// A route of the monolith without any policy.
fn bare(name: &str, legacy: usize, registry: &mut Registry) -> Route {
    Route {
        name: name.into(),
        path: "".into(),
        stage: Stage::Legacy,
        tags: Vec::new(),
        service: None,
        baseline: legacy,
        shadow: None,
        cohort: None,
        overlay: Overlay { hold: Arc::default(), ramp: None },
        rollout: None,
        limits: limits(None),
        retry: retry(None),
        fallback: None,
        replay_body: replay_body(None),
        rate_limit: None,
        auth: None,
        cors: None,
        cache: None,
        shape: Box::default(),
        rewrite: None,
        edit_request: Edits::default(),
        edit_response: Edits::default(),
        websocket: true,
        max_body: u64::MAX,
        gone: HeaderMap::new(),
        stats: registry.stats(name),
    }
}

fn limits(config: Option<&OrNone<TimeoutConfig>>) -> Limits {
    let default = TimeoutConfig::default();
    let config = match config {
        None => &default,
        Some(OrNone::None) => &TimeoutConfig::NONE,
        Some(OrNone::Some(config)) => config,
    };
    Limits { request: config.request.limit(), attempt: config.attempt.limit(), idle: config.idle.limit() }
}

/// Where nothing is said, only what the upstream has not answered is tried again.
fn retry(config: Option<&OrNone<RetryConfig>>) -> Option<Retry> {
    let default = RetryConfig { when: vec![RetryOn::Connect, RetryOn::Reset], ..RetryConfig::default() };
    let config = match config {
        None => &default,
        Some(OrNone::None) => return None,
        Some(OrNone::Some(config)) => config,
    };
    let status = |on: &RetryOn| match on {
        RetryOn::Status(status) => StatusCode::from_u16(*status).ok(),
        RetryOn::Connect | RetryOn::Reset => None,
    };
    Some(Retry {
        retries: config.retries,
        connect: config.when.contains(&RetryOn::Connect),
        reset: config.when.contains(&RetryOn::Reset),
        statuses: config.when.iter().filter_map(status).collect(),
        base: config.backoff.base.0,
        max: config.backoff.longest(),
        budget: config.budget.0,
        keys_honoured: config.idempotency_key == IdempotencyKey::Honoured,
    })
}

fn fallback(config: Option<&OrNone<FallbackConfig>>, learned: impl FnOnce() -> Arc<Learned>) -> Option<Fallback> {
    let default = FallbackConfig::default();
    let config = match config {
        None => &default,
        Some(OrNone::None) => return None,
        Some(OrNone::Some(config)) => config,
    };
    Some(Fallback {
        when: config.when.clone(),
        keys_shared: config.idempotency == Idempotency::Shared,
        learned: learned(),
    })
}

fn replay_body(config: Option<&OrNone<Size>>) -> usize {
    match config {
        None => 64 * 1024,
        Some(OrNone::None) => 0,
        Some(OrNone::Some(size)) => usize::try_from(size.0).unwrap_or(usize::MAX),
    }
}

fn rate_limit(
    route: &str,
    own: Option<&OrNone<RateLimitConfig>>,
    default: Option<&OrNone<RateLimitConfig>>,
    registry: &mut Registry,
) -> Result<Option<RateLimit>, String> {
    let Some(config) = own.or(default).and_then(OrNone::as_option) else { return Ok(None) };
    let burst = config.burst.unwrap_or(config.limit.count);
    let quota = Quota::new(config.limit.count, config.limit.seconds, burst);
    let per = match &config.per {
        Per::Ip => Some(Key::Ip),
        Per::Header(header) => Some(Key::Header(name(header)?)),
        Per::Cookie(cookie) => Some(Key::Cookie(cookie.as_str().into())),
        Per::Claim(claim) => Some(Key::Claim(claim.as_str().into())),
        Per::Route => None,
    };
    let label = format!("\"{}\"", config.per);
    // What may come at once is a quota, too, where it is more than the rate says: over the time in which it comes back.
    let Rate { count, seconds } = config.limit;
    let (count, window) = match burst.cmp(&count) {
        std::cmp::Ordering::Greater => (burst, (u64::from(burst) * u64::from(seconds)).div_ceil(u64::from(count))),
        _ => (count, u64::from(seconds)),
    };
    Ok(Some(RateLimit {
        own: own.is_some(),
        policy: value(&format!("{label};q={count};w={window}"))?,
        name: label.into(),
        begin: registry.begin,
        limiter: registry.limiter(route, &config.per, quota),
        per,
    }))
}

fn auth(config: Option<&OrNone<AuthConfig>>, verifiers: &HashMap<&str, Arc<Verifier>>) -> Result<Option<Auth>, String> {
    let Some(config) = config.and_then(OrNone::as_option) else { return Ok(None) };
    let verifier = verifiers.get(config.jwt.as_str());
    let forward = config.forward.iter().map(|(claim, field)| Ok((claim.as_str().into(), name(field)?)));
    Ok(Some(Auth {
        verifier: verifier.ok_or_else(|| format!("unknown verifier: `{}`", config.jwt))?.clone(),
        scopes: config.scopes.iter().map(|scope| scope.as_str().into()).collect(),
        forward: forward.collect::<Result<_, String>>()?,
        forward_token: config.forward_token,
    }))
}

fn cors(config: Option<&OrNone<CorsConfig>>) -> Result<Option<Cors>, String> {
    let Some(config) = config.and_then(OrNone::as_option) else { return Ok(None) };
    let any = |list: &[String]| list.iter().any(|item| item == "*");
    let origin = |text: &String| Origin::parse(text).ok_or_else(|| format!("not an origin: `{text}`"));
    let methods: Vec<Method> = config.methods.iter().filter_map(|method| method.parse().ok()).collect();
    let simple = ["GET", "HEAD", "POST"].map(str::to_owned);
    let told: Vec<_> =
        simple.iter().chain(config.methods.iter().filter(|method| !simple.contains(method))).cloned().collect();
    Ok(Some(Cors {
        origins: if any(&config.origins) {
            Origins::Any
        } else {
            Origins::Some(config.origins.iter().map(origin).collect::<Result<_, _>>()?)
        },
        methods: if any(&config.methods) || config.methods.is_empty() {
            None
        } else {
            Some((methods, value(&told.join(", "))?))
        },
        headers: if any(&config.headers) {
            None
        } else {
            let names = config.headers.iter().map(|field| name(field)).collect::<Result<_, _>>()?;
            Some((names, value(&config.headers.join(", "))?))
        },
        expose: (!config.expose.is_empty()).then(|| value(&config.expose.join(", "))).transpose()?,
        credentials: config.credentials,
        max_age: HeaderValue::from(config.max_age.0.as_secs()),
    }))
}

fn keep(config: Option<&OrNone<RouteCacheConfig>>) -> Option<Keep> {
    config.and_then(OrNone::as_option).map(|config| Keep {
        ttl: config.default_ttl.0,
        while_revalidate: config.stale_while_revalidate.0,
        if_error: config.stale_if_error.0,
        collapse: config.collapse.0,
    })
}

/// Of what upstreams are told by this route: the same in all gateways that have the same file.
fn shape(route: &RouteConfig, headers: Option<&OrNone<HeadersConfig>>, auth: Option<&OrNone<AuthConfig>>) -> Box<[u8]> {
    let edits = route.headers.as_ref().or(headers).and_then(OrNone::as_option).map(|headers| &headers.request);
    let forward = route.auth.as_ref().or(auth).and_then(OrNone::as_option).map(|auth| &auth.forward);
    let text = format!("{:?} {edits:?} {forward:?}", route.rewrite);
    format!("{:016x}", twox_hash::XxHash3_64::oneshot(text.as_bytes())).into_bytes().into()
}

fn websocket(config: Option<&OrNone<Vec<Upgrade>>>) -> bool {
    config.is_none_or(|upgrades| upgrades.as_option().is_some_and(|list| list.contains(&Upgrade::Websocket)))
}

fn max_body(config: Option<&OrNone<Size>>) -> u64 {
    config.and_then(OrNone::as_option).map_or(u64::MAX, |size| size.0)
}

fn value(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|_| format!("not a header's value: `{}`", text.escape_debug()))
}

fn name(text: &str) -> Result<HeaderName, String> {
    text.parse().map_err(|_| format!("not a header's name: `{}`", text.escape_debug()))
}

fn headers(route: &mut Route, config: Option<&OrNone<HeadersConfig>>) -> Result<(), String> {
    if let Some(config) = config.and_then(OrNone::as_option) {
        route.edit_request = edits(&config.request)?;
        route.edit_response = edits(&config.response)?;
    }
    Ok(())
}

fn edits(config: &EditConfig) -> Result<Edits, String> {
    let pairs = |map: &std::collections::BTreeMap<String, String>| {
        map.iter().map(|(key, text)| Ok((name(key)?, value(text)?))).collect::<Result<Vec<_>, String>>()
    };
    Ok(Edits {
        remove: config.remove.iter().map(|key| name(key)).collect::<Result<_, _>>()?,
        set: pairs(&config.set)?,
        add: pairs(&config.add)?,
    })
}

fn rewrite(config: &RewriteConfig, paths: PathPolicy) -> Result<Rewrite, String> {
    let prefix = config.strip_prefix.as_deref();
    Ok(Rewrite {
        prefix: prefix.map_or_else(|| Ok(Vec::new()), |prefix| prefix_segments(prefix, paths))?,
        prefix_text: prefix.map(Into::into),
        prefix_header: prefix.map(value).transpose()?,
        host: config.host,
    })
}

fn cohort(config: &CanaryConfig, route: &RouteConfig) -> Result<CohortValues, String> {
    let group = config.group.as_deref().unwrap_or(Config::route_name(route));
    // The check sees to it that there is a token to take it from.
    let default = [KeySource::Claim("sub".to_owned())];
    let by = if config.by.is_empty() { &default[..] } else { &config.by };
    let by = by
        .iter()
        .map(|source| {
            Ok(match source {
                KeySource::Cookie(name) => cohort::KeySource::Cookie(name.as_str().into()),
                KeySource::Header(key) => cohort::KeySource::Header(name(key)?),
                KeySource::Claim(claim) => cohort::KeySource::Claim(claim.as_str().into()),
                KeySource::Ip => cohort::KeySource::Ip,
                KeySource::Sticky => cohort::KeySource::Sticky,
            })
        })
        .collect::<Result<_, String>>()?;
    let mut cohort = Cohort::new(group, config.percent.map_or(0, |percent| percent.0), by);
    cohort.always = config.always.iter().map(traits).collect::<Result<_, _>>()?;
    cohort.never = config.never.iter().map(traits).collect::<Result<_, _>>()?;
    let header = |arm: Arm| value(&format!("{group}={}", arm.word()));
    let baggage = |arm: Arm| value(&format!("{BAGGAGE_MEMBER}={group}:{}", arm.word()));
    Ok(CohortValues {
        header: [header(Arm::Legacy)?, header(Arm::Service)?],
        baggage: [baggage(Arm::Legacy)?, baggage(Arm::Service)?],
        cohort,
    })
}

fn traits(config: &PredicateConfig) -> Result<Traits, String> {
    Ok(Traits {
        headers: config
            .header
            .iter()
            .map(|(key, text)| Ok((name(key)?, text.as_bytes().into())))
            .collect::<Result<_, String>>()?,
        cookies: config.cookie.iter().map(|(key, text)| (key.as_str().into(), text.as_str().into())).collect(),
        claims: config.claim.iter().map(|(key, text)| (key.as_str().into(), text.as_str().into())).collect(),
    })
}

fn gone(config: &GoneConfig) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    let date = |text: &str| parse_date(text).ok_or_else(|| format!("not a date: `{text}`"));
    if let Some(text) = &config.deprecation {
        headers.insert(HeaderName::from_static("deprecation"), value(&format!("@{}", date(text)?.as_second()))?);
    }
    if let Some(text) = &config.sunset {
        let moment = std::time::SystemTime::from(date(text)?);
        headers.insert(HeaderName::from_static("sunset"), value(&httpdate::fmt_http_date(moment))?);
    }
    if let Some(url) = &config.successor {
        headers.insert(header::LINK, value(&format!("<{url}>; rel=\"successor-version\""))?);
    }
    Ok(headers)
}

impl Registry {
    /// Forgets what nothing uses any more.
    fn keep_only(
        &mut self,
        upstreams: &[Arc<crate::upstream::Upstream>],
        verifiers: &[Arc<Verifier>],
        cache: Option<&Arc<Cache>>,
        routes: &[Route],
    ) {
        self.keep_verifiers(verifiers);
        self.keep_cache(cache);
        self.retain(
            |upstream| upstreams.iter().any(|kept| Arc::ptr_eq(kept, upstream)),
            &routes.iter().map(|route| &*route.name).collect(),
        );
    }
}
