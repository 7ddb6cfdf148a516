//! Which route, why the others lost, who answers and why: the same words offline and from a running gateway.

use std::{fmt, net::IpAddr};

use http::{HeaderMap, Method, Uri};
use serde::Serialize;

use super::{Route, Snapshot};
use crate::{
    auth::cors,
    claims::Claims,
    config::{
        Stage,
        file::HostRewrite,
        values::{Share, Span},
    },
    fields::{self, Voice},
    routing::{
        cohort::Why,
        path,
        predicate::{Failed, Head},
        table::{Found, Outcome},
    },
};

/// What would happen to a request.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// The method.
    pub method: String,
    /// The URL, as asked.
    pub url: String,
    /// The status, where the gateway answers by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// What the gateway says then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The path that rules are matched against.
    pub matched_path: String,
    /// The route's name.
    pub route: String,
    /// Its stage.
    pub stage: &'static str,
    /// Who answers: `legacy`, `service`, `gateway`, or `either` for a session that has still to begin.
    pub arm: &'static str,
    /// Why that one.
    pub why: String,
    /// The cohort, where the stage is `canary`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cohort: Option<CohortPlace>,
    /// The upstream asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<String>,
    /// The request line that it gets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream_target: Option<String>,
    /// The route's policies.
    pub policies: Vec<String>,
    /// Each rule, in the order in which they are tried.
    pub tried: Vec<Tried>,
}

/// A request's place in a cohort.
#[derive(Debug, Serialize)]
pub struct CohortPlace {
    /// The group.
    pub group: String,
    /// The bucket of its key, of 10,000.
    pub bucket: Option<u16>,
    /// The share; buckets below it are in.
    pub share: u16,
}

/// How one rule fared.
#[derive(Debug, Serialize)]
pub struct Tried {
    /// The route's name.
    pub route: String,
    /// Its path.
    pub path: String,
    /// Whether it answers, or why not.
    pub outcome: String,
}

/// Explains a request. `client` is the address that it comes from, `claims` what its token would say once it is verified.
pub fn explain(
    snapshot: &Snapshot,
    method: &Method,
    url: &Uri,
    mut headers: HeaderMap,
    claims: &Claims,
    client: IpAddr,
) -> Explanation {
    forward(&mut headers, url, client, snapshot);
    let mut told = Explanation {
        method: method.to_string(),
        url: url.to_string(),
        status: None,
        reason: None,
        matched_path: String::new(),
        route: crate::config::UNROUTED.to_owned(),
        stage: Stage::Legacy.word(),
        arm: "gateway",
        why: String::new(),
        cohort: None,
        upstream: None,
        upstream_target: None,
        policies: Vec::new(),
        tried: Vec::new(),
    };
    if url.path() == "*" && *method == Method::OPTIONS {
        let route = &snapshot.routes[snapshot.unrouted()];
        told.arm = "legacy";
        "`OPTIONS *` asks the server as a whole".clone_into(&mut told.why);
        told.upstream = Some(snapshot.upstreams[route.baseline].name.to_string());
        return told;
    }
    let read = match path::read(url.path(), snapshot.paths) {
        Ok(read) => read,
        Err(oddity) => {
            told.status = Some(400);
            told.reason = Some(oddity.to_string());
            "the path is refused before any rule is tried".clone_into(&mut told.why);
            return told;
        }
    };
    told.matched_path = format!("/{}", String::from_utf8_lossy(&read.key));
    let host = match url.authority() {
        Some(authority) => authority.as_str().as_bytes(),
        None => headers.get(http::header::HOST).map_or(&b""[..], |host| host.as_bytes()),
    };
    let query = url.query().unwrap_or_default();
    let head = Head { host, key: &read.key, method, headers: &headers, query };
    let outcomes = snapshot.table.explain(&head);
    told.tried = outcomes
        .iter()
        .map(|(index, outcome)| {
            let route = &snapshot.routes[*index];
            Tried {
                route: route.name.to_string(),
                path: route.path.to_string(),
                outcome: say(outcome, snapshot, &head, *index),
            }
        })
        .collect();
    let decided = outcomes.iter().find(|(_, outcome)| matches!(outcome, Outcome::Wins | Outcome::Refuses));
    let route = &snapshot.routes[decided.map_or(snapshot.unrouted(), |(index, _)| *index)];
    told.route = route.name.to_string();
    told.stage = route.stage.word();
    told.policies = policies(route);
    for guard in snapshot.table.find(&head).guards {
        let guard = &snapshot.routes[guard];
        if let Some(auth) = guard.auth.as_ref().filter(|_| guard.name != route.name) {
            told.policies.push(format!("auth of `{}`, whose path it has: jwt {}", guard.name, auth.verifier.name));
        }
    }
    if let Some((index, Outcome::Refuses)) = decided {
        told.status = Some(405);
        told.reason = Some(format!("allows {}", snapshot.table.allowed(*index).join(", ")));
        told.why = format!("the route is {}: what it refuses falls to nobody else", route.stage.word());
        return told;
    }
    if route.runs() == Stage::Gone {
        told.status = Some(410);
        "the route is gone".clone_into(&mut told.why);
        return told;
    }
    if let Some(asked) = cors::preflight(method, &headers)
        && let Some(answer) = preflight(snapshot, &head, &asked)
    {
        (told.status, told.reason) = answer;
        "a preflight is answered by the `cors:` of the route that it asks about".clone_into(&mut told.why);
        return told;
    }
    let upstream = pick(route, &headers, claims, client, &mut told);
    if decided.is_none() {
        "no route claims it".clone_into(&mut told.why);
    }
    let Some(upstream) = upstream.map(|index| &snapshot.upstreams[index]) else { return told };
    told.upstream = Some(upstream.name.to_string());
    let mut target = read.forward.to_string();
    let mut host = String::from_utf8_lossy(host).into_owned();
    if let Some(rewrite) = route.rewrite.as_ref().filter(|_| &*upstream.name != "legacy") {
        if let Some(rest) = path::strip_prefix(&target, &rewrite.prefix, snapshot.paths) {
            target = rest.to_owned();
        }
        if rewrite.host == HostRewrite::Upstream {
            upstream.url().authority.clone_into(&mut host);
        }
    }
    let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
    told.upstream_target = Some(format!("{method} {target}{query} with Host: {host}"));
    told
}

/// The fields as rules see them: what the client may not say is gone, what the gateway says in its place is there.
fn forward(headers: &mut HeaderMap, url: &Uri, client: IpAddr, snapshot: &Snapshot) {
    let trusted = snapshot.trusts(client);
    let stripped: Vec<_> = headers
        .keys()
        .filter(|name| match fields::voice(name.as_str()) {
            Some(Voice::Gateway) => true,
            Some(Voice::Proxy) => !trusted,
            None => snapshot.claim_fields.have(name.as_str()),
        })
        .cloned()
        .collect();
    for name in stripped {
        headers.remove(name);
    }
    let host = url.authority().map(ToString::to_string);
    let said = [
        (fields::X_FORWARDED_FOR, Some(client.to_string())),
        (fields::X_FORWARDED_PROTO, Some("http".to_owned())),
        (fields::X_FORWARDED_HOST, host),
    ];
    for (name, value) in said {
        if let (false, Some(Ok(value))) = (headers.contains_key(&name), value.map(http::HeaderValue::try_from)) {
            headers.insert(name, value);
        }
    }
}

/// The answer to a preflight, where the route of the request that it asks about has a policy.
fn preflight(snapshot: &Snapshot, head: &Head<'_>, asked: &Method) -> Option<(Option<u16>, Option<String>)> {
    let index = match snapshot.table.find(&Head { method: asked, ..*head }).found {
        Found::Rule(index) | Found::Refused(index) => index,
        Found::Nothing => snapshot.unrouted(),
    };
    Some(match snapshot.routes[index].cors.as_ref()?.answer(asked, head.headers) {
        Ok(_) => (Some(204), None),
        Err(why) => (Some(403), Some(why.to_owned())),
    })
}

/// Who answers, as the arm layer picks it; nobody yet for a session that has still to begin.
fn pick(route: &Route, headers: &HeaderMap, claims: &Claims, client: IpAddr, told: &mut Explanation) -> Option<usize> {
    let service = route.service.unwrap_or(route.baseline);
    let (upstream, arm) = match (&route.cohort, route.runs()) {
        _ if route.overlay.is_back() => {
            told.why = format!("the file says {}; it was put back to the monolith", route.stage.word());
            (route.baseline, "legacy")
        }
        (Some(values), Stage::Canary) => {
            // A new session's bucket is drawn when it begins; offline there is only "new".
            let own = route.overlay.share(values.cohort.share);
            let decision = values.cohort.decide(own, headers, route.auth.as_ref().map(|_| claims), client, || 0);
            let share = Share(decision.share);
            let group = &values.cohort.group;
            told.why = match (decision.why, decision.bucket) {
                (Why::Sticky, _) if decision.begin.is_some() => {
                    told.arm = "either";
                    let cookie = &values.cohort.cookie;
                    format!("a new session: the service's with a chance of {share}, then kept by the cookie `{cookie}`")
                }
                (Why::Sticky, _) if share.0 == 0 => "at 0% no session is the service's".to_owned(),
                (why, Some(bucket)) => format!(
                    "its {} has bucket {bucket} of group `{group}`: {} {share} ({}{})",
                    why.word(),
                    if decision.service { "below" } else { "not below" },
                    share.0,
                    if share.0 < own { ", the share when its session began" } else { "" },
                ),
                (Why::Never, _) => "a predicate in `never` holds".to_owned(),
                (Why::Always, _) => "a predicate in `always` holds".to_owned(),
                _ => "it has no cohort key".to_owned(),
            };
            let known = decision.begin.is_none() && !(decision.why == Why::Sticky && share.0 == 0);
            let bucket = decision.bucket.filter(|_| known);
            told.cohort = Some(CohortPlace { group: group.to_string(), bucket, share: share.0 });
            if told.arm == "either" {
                return None;
            }
            if decision.service { (service, "service") } else { (route.baseline, "legacy") }
        }
        (_, stage) => {
            told.why = format!("stage {}", stage.word());
            if stage.uses_service() { (service, "service") } else { (route.baseline, "legacy") }
        }
    };
    told.arm = arm;
    Some(upstream)
}

fn policies(route: &Route) -> Vec<String> {
    let limit = |name: &str, limit: Option<std::time::Duration>| {
        format!("{name} {}", limit.map_or_else(|| "none".to_owned(), |limit| Span(limit).to_string()))
    };
    let mut all = vec![format!(
        "timeout: {}, {}, {}",
        limit("request", route.limits.request),
        limit("attempt", route.limits.attempt),
        limit("idle", route.limits.idle)
    )];
    if let Some(prefix) = route.rewrite.as_ref().and_then(|rewrite| rewrite.prefix_text.as_deref()) {
        all.push(format!("rewrite: strip_prefix {prefix}"));
    }
    if route.max_body != u64::MAX {
        all.push(format!("max_body: {} bytes", route.max_body));
    }
    if let Some(rollout) = &route.rollout {
        let steps: Vec<String> = rollout.steps.iter().map(ToString::to_string).collect();
        let share = Share(route.share().unwrap_or(0));
        all.push(format!("rollout: steps {}, running at {share}", steps.join(", ")));
    }
    if let Some(shadow) = &route.shadow {
        all.push(format!("shadow: {} of the monolith's requests are copied", Share(shadow.share)));
    }
    if let Some(retry) = &route.retry {
        let words = [(retry.connect, "connect"), (retry.reset, "reset")];
        let mut when: Vec<String> = words.into_iter().filter(|(is, _)| *is).map(|(_, word)| word.to_owned()).collect();
        when.extend(retry.statuses.iter().map(|status| status.as_u16().to_string()));
        all.push(format!("retry: {} on {}, budget {}", retry.retries, when.join(", "), Share(retry.budget)));
    } else {
        all.push("retry: none".to_owned());
    }
    if let Some(fallback) = &route.fallback {
        let when: Vec<&str> = fallback.when.iter().map(|on| on.word()).collect();
        all.push(format!("fallback: when {}", when.join(", ")));
    } else if route.stage.uses_service() {
        all.push("fallback: none".to_owned());
    }
    if let Some(auth) = &route.auth {
        let scopes = if auth.scopes.is_empty() { String::new() } else { format!(", scopes {}", auth.scopes.join(" ")) };
        let forward: Vec<String> = auth.forward.iter().map(|(claim, name)| format!("{claim} in {name}")).collect();
        let told = if forward.is_empty() { String::new() } else { format!(", tells upstreams {}", forward.join(", ")) };
        let token = if auth.forward_token { ", the token goes on" } else { "" };
        all.push(format!("auth: jwt {}{scopes}{told}{token}", auth.verifier.name));
    }
    if let Some(keep) = &route.cache {
        let span = |duration| Span(duration).to_string();
        all.push(format!(
            "cache: default_ttl {}, stale_while_revalidate {}, stale_if_error {}",
            span(keep.ttl),
            span(keep.while_revalidate),
            span(keep.if_error)
        ));
    }
    if route.cors.is_some() {
        all.push("cors: preflights are answered here".to_owned());
    }
    if let Some(limit) = &route.rate_limit {
        all.push(format!("rate_limit: {}", limit.policy.to_str().unwrap_or_default()));
    }
    all.push(format!("upgrades: {}", if route.websocket { "websocket" } else { "none" }));
    all
}

fn say(outcome: &Outcome<'_>, snapshot: &Snapshot, head: &Head<'_>, index: usize) -> String {
    let rule = &snapshot.table.rules()[index];
    match outcome {
        Outcome::Wins => "answers".to_owned(),
        Outcome::Refuses => "has the path, refuses the request: 405".to_owned(),
        Outcome::Failed(Failed::Method) => {
            let methods: Vec<&str> = rule.predicates.methods.iter().map(Method::as_str).collect();
            format!("method differs: takes {}", methods.join(", "))
        }
        Outcome::Failed(Failed::Header(name)) if head.headers.contains_key(*name) => {
            format!("header differs: `{name}`")
        }
        Outcome::Failed(Failed::Header(name)) => format!("header missing: `{name}`"),
        Outcome::Failed(Failed::Query(name)) => format!("query differs: `{}`", String::from_utf8_lossy(name)),
        Outcome::LessSpecific(winner) => format!("less specific than `{}`", snapshot.routes[*winner].name),
        Outcome::HostDiffers => "host differs".to_owned(),
        Outcome::PathDiffers => "path differs".to_owned(),
    }
}

/// Rules for other paths, of which a text shows no more than these.
const OTHERS: usize = 20;

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {}", self.method, self.url)?;
        if !self.matched_path.is_empty() {
            writeln!(f, "  path      {}", self.matched_path)?;
        }
        writeln!(f, "  route     {}, stage {}", self.route, self.stage)?;
        writeln!(f, "  answers   {}: {}", self.arm, self.why)?;
        if let Some(status) = self.status {
            writeln!(
                f,
                "  status    {status}{}",
                self.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default()
            )?;
        }
        if let (Some(upstream), Some(target)) = (&self.upstream, &self.upstream_target) {
            writeln!(f, "  upstream  {upstream}: {target}")?;
        }
        for policy in &self.policies {
            writeln!(f, "  policy    {policy}")?;
        }
        let width = self.tried.iter().map(|tried| tried.route.len()).max().unwrap_or(0).min(40);
        let (near, far): (Vec<_>, Vec<_>) = self.tried.iter().partition(|tried| tried.outcome != "path differs");
        for tried in near.iter().chain(far.iter().take(OTHERS)) {
            writeln!(f, "  tried     {:width$}  {:24}  {}", tried.route, tried.path, tried.outcome)?;
        }
        if let Some(more @ 1..) = far.len().checked_sub(OTHERS) {
            writeln!(f, "  tried     and {more} more for other paths")?;
        }
        Ok(())
    }
}
