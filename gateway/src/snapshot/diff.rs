//! Which requests would go elsewhere under another file.
//!
//! By rules: each rule of either file, and each pair of rules whose paths and hosts meet, gives requests that stand
//! for all that they take. Where the two files send one elsewhere, it is told; each file reads the request's path in its own way.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
};

use http::{HeaderMap, Method};
use serde::Serialize;

use super::{Route, Snapshot};
use crate::{
    config::{Stage, values::Share},
    inventory::tree::Step,
    routing::{
        cohort::{Cohort, KeySource, Traits},
        path,
        pattern::Part,
        predicate::Head,
        table::{Found, HostPattern, Match, Rule},
    },
};

/// One kind of request that goes elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Move {
    /// Which requests.
    pub requests: String,
    /// Where the old file sends them.
    pub from: String,
    /// Where the new one does.
    pub to: String,
}

/// What differs between two files.
#[derive(Debug, Default, Serialize)]
pub struct Difference {
    /// The requests that would go elsewhere.
    pub moves: Vec<Move>,
    /// Upstreams whose address changes: all their requests go elsewhere.
    pub upstreams: Vec<Move>,
    /// Changes in how every path is read.
    pub paths: Vec<Move>,
}

impl Difference {
    /// Whether any request goes elsewhere.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty() && self.upstreams.is_empty() && self.paths.is_empty()
    }
}

/// Compares two files, compiled.
pub fn diff(old: &Snapshot, new: &Snapshot) -> Difference {
    let rules: Vec<(&Rule, Option<&str>)> = [old, new]
        .into_iter()
        .flat_map(|side| {
            // As it is written, unless the file takes it for more than that.
            let routes = side.routes.iter().map(|route| (!side.paths.case_insensitive).then_some(&*route.path));
            side.table.rules().iter().zip(routes)
        })
        .collect();
    let mut moves = BTreeSet::new();
    let mut try_on = |probe: Probe| {
        let (from, to) = (probe.target(old), probe.target(new));
        if from != to {
            moves.insert(Move { requests: probe.label, from, to });
        }
    };
    for (n, (rule, path)) in rules.iter().enumerate() {
        probes(rule, rule, *path).into_iter().for_each(&mut try_on);
        for other in meeting(rule, n, &rules) {
            probes(rule, rules[other].0, *path).into_iter().for_each(&mut try_on);
        }
    }
    let url = |snapshot: &Snapshot, name: &str| {
        let found = snapshot.upstreams.iter().find(|upstream| &*upstream.name == name)?;
        Some(found.address())
    };
    let upstreams = old
        .upstreams
        .iter()
        .filter_map(|upstream| {
            let (from, to) = (url(old, &upstream.name)?, url(new, &upstream.name)?);
            (from != to).then(|| Move { requests: format!("upstream `{}`", upstream.name), from, to })
        })
        .collect();
    let reading = |snapshot: &Snapshot| format!("{:?}", snapshot.paths);
    let paths = (old.paths != new.paths).then(|| Move {
        requests: "paths that are spelled unusually".to_owned(),
        from: reading(old),
        to: reading(new),
    });
    Difference { moves: moves.into_iter().collect(), upstreams, paths: paths.into_iter().collect() }
}

/// Rules that share requests with this one. With thousands of rules only those whose first segment can be the same are looked at.
fn meeting<'r>(rule: &'r Rule, n: usize, rules: &'r [(&Rule, Option<&str>)]) -> impl Iterator<Item = usize> + 'r {
    rules
        .iter()
        .enumerate()
        .filter(move |(other, (theirs, _))| {
            *other != n
                && first_meets(rule.pattern.parts().first(), theirs.pattern.parts().first())
                && meet(rule.pattern.parts(), theirs.pattern.parts()).is_some()
        })
        .map(|(other, _)| other)
}

fn first_meets(a: Option<&Part>, b: Option<&Part>) -> bool {
    match (a, b) {
        (Some(Part::Literal(a)), Some(Part::Literal(b))) => a == b,
        _ => true,
    }
}

/// A path that both patterns take, as specific as they are together.
fn meet(a: &[Part], b: &[Part]) -> Option<Vec<Part>> {
    match (a, b) {
        ([Part::Rest], rest) | (rest, [Part::Rest]) => Some(rest.to_vec()),
        ([], []) => Some(Vec::new()),
        ([first, a @ ..], [second, b @ ..]) => {
            let part = match (first, second) {
                (Part::Literal(a), Part::Literal(b)) if a != b => return None,
                (Part::Literal(_), _) => first,
                _ => second,
            };
            let mut parts = vec![part.clone()];
            parts.extend(meet(a, b)?);
            Some(parts)
        }
        _ => None,
    }
}

/// A request that stands for all that a rule takes, or for those that another takes too, or for those of an endpoint.
pub(super) struct Probe {
    label: String,
    host: Vec<u8>,
    path: String,
    method: Method,
    headers: HeaderMap,
    query: String,
}

/// A segment, a host and a method that no file names.
const OTHER: &str = "other-0f3a";

/// Requests that `rule` takes, with the hosts, methods and fields of `other` added where both can hold.
fn probes(rule: &Rule, other: &Rule, written: Option<&str>) -> Vec<Probe> {
    let Some(parts) = meet(rule.pattern.parts(), other.pattern.parts()) else { return Vec::new() };
    let mut methods: Vec<Method> = rule.predicates.methods.iter().chain(&other.predicates.methods).cloned().collect();
    if rule.predicates.methods.is_empty() {
        methods.push(Method::GET);
    }
    methods.extend(Method::from_bytes(OTHER.as_bytes()));
    methods.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    methods.dedup();
    let hosts: BTreeSet<&HostPattern> = rule.host_patterns().chain(other.host_patterns()).collect();
    let fields = [&[][..], &[rule], &[other], &[rule, other]];
    let mut probes = Vec::new();
    for host in hosts {
        for method in &methods {
            for of in fields.iter().take(if std::ptr::eq(rule, other) { 2 } else { 4 }) {
                for (tail, shown) in paths(&parts) {
                    let shown = written.filter(|_| std::ptr::eq(rule, other)).map_or(shown, str::to_owned);
                    probes.push(probe(&shown, host, method, of, tail));
                }
            }
        }
    }
    probes
}

fn probe(shown: &str, host: &HostPattern, method: &Method, of: &[&Rule], path: String) -> Probe {
    let (host, shown_host) = match host {
        HostPattern::Any => (OTHER.as_bytes().to_vec(), String::new()),
        HostPattern::Exact(name) => (name.to_vec(), String::from_utf8_lossy(name).into_owned()),
        HostPattern::Below(suffix) => {
            ([OTHER.as_bytes(), suffix].concat(), format!("*{}", String::from_utf8_lossy(suffix)))
        }
    };
    let mut headers = HeaderMap::new();
    let mut query: HashMap<&[u8], &[u8]> = HashMap::new();
    let mut fields = String::new();
    for rule in of {
        for (name, value) in &rule.predicates.headers {
            if let (false, Ok(value)) = (headers.contains_key(name), http::HeaderValue::from_bytes(value)) {
                fields.push_str(&format!(" with {name}: {}", String::from_utf8_lossy(value.as_bytes())));
                headers.insert(name, value);
            }
        }
        for (name, value) in &rule.predicates.query {
            if !query.contains_key(&**name) {
                fields.push_str(&format!(" with ?{}={}", encode(name), encode(value)));
                query.insert(name, value);
            }
        }
    }
    let method_shown = if method.as_str() == OTHER { "other methods" } else { method.as_str() };
    let query: Vec<String> = query.iter().map(|(name, value)| format!("{}={}", encode(name), encode(value))).collect();
    Probe {
        label: format!("{method_shown} {shown_host}{shown}{fields}"),
        host,
        path,
        method: method.clone(),
        headers,
        query: query.join("&"),
    }
}

/// Paths that a pattern takes, each with how it is shown: for `**` its root and something below.
fn paths(parts: &[Part]) -> Vec<(String, String)> {
    let (mut path, mut shown) = (String::new(), String::new());
    for part in parts {
        match part {
            Part::Literal(literal) => {
                path.push_str(&format!("/{}", encode(literal)));
                shown.push_str(&format!("/{}", String::from_utf8_lossy(literal)));
            }
            Part::Param => {
                path.push_str(&format!("/{OTHER}"));
                shown.push_str("/{…}");
            }
            Part::Rest => {
                let root = if path.is_empty() { "/".to_owned() } else { path.clone() };
                shown.push_str("/**");
                return vec![(root, shown.clone()), (format!("{path}/{OTHER}"), shown)];
            }
        }
    }
    if path.is_empty() {
        path.push('/');
        shown.push('/');
    }
    vec![(path, shown)]
}

fn encode(text: &[u8]) -> String {
    text.iter()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) {
                char::from(*byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect()
}

impl Probe {
    /// One of an endpoint's requests; with the host and the fields that a rule wants, if it is counted under one.
    pub(super) fn endpoint(method: &Method, steps: &[Step], rule: Option<&Rule>) -> Self {
        let mut path = String::new();
        for step in steps {
            match step {
                Step::Literal(name) => path.push_str(&format!("/{}", encode(name.as_bytes()))),
                Step::Open(_) => path.push_str(&format!("/{OTHER}")),
            }
        }
        let path = if path.is_empty() { "/".to_owned() } else { path };
        let host = rule.and_then(|rule| rule.host_patterns().next()).unwrap_or(&HostPattern::Any);
        let rules: Vec<&Rule> = rule.into_iter().collect();
        probe(&path, host, method, &rules, path.clone())
    }

    /// The same at another host.
    pub(super) fn at(&self, host: &HostPattern) -> Self {
        let path = self.path.clone();
        probe(&path, host, &self.method, &[], path.clone())
    }

    /// What a file makes of it; nothing where it refuses the path.
    pub(super) fn find(&self, snapshot: &Snapshot) -> Option<Match> {
        let read = path::read(&self.path, snapshot.paths).ok()?;
        let (key, method) = (&read.key, &self.method);
        Some(snapshot.table.find(&Head { host: &self.host, key, method, headers: &self.headers, query: &self.query }))
    }

    /// Where a file sends it, in words that are equal exactly when nothing changes for the request.
    pub(super) fn target(&self, snapshot: &Snapshot) -> String {
        if let Err(oddity) = path::read(&self.path, snapshot.paths) {
            return format!("400: {oddity}");
        }
        let Some(Match { found, guards }) = self.find(snapshot) else { return "400".to_owned() };
        match found {
            Found::Rule(index) => guarded(&snapshot.routes[index], &guards, snapshot),
            Found::Nothing => guarded(&snapshot.routes[snapshot.unrouted()], &guards, snapshot),
            Found::Refused(index) => format!("405 by route `{}`", snapshot.routes[index].name),
        }
    }
}

/// Whoever needs a token now, or none any more, is somebody else.
fn guarded(route: &Route, guards: &[usize], snapshot: &Snapshot) -> String {
    let mut target = target(route, snapshot);
    if route.stage == Stage::Gone {
        return target;
    }
    let doors =
        guards.iter().map(|guard| &snapshot.routes[*guard]).chain([route]).filter_map(|route| route.auth.as_ref());
    let mut told: Vec<String> = Vec::new();
    for auth in doors {
        let scopes = if auth.scopes.is_empty() { String::new() } else { format!(" for {}", auth.scopes.join(" ")) };
        let door = format!(", with a token of `{}`{scopes}", auth.verifier.name);
        if !told.contains(&door) {
            target.push_str(&door);
            told.push(door);
        }
    }
    target
}

fn target(route: &Route, snapshot: &Snapshot) -> String {
    let name = |index: usize| {
        let mut text = snapshot.upstreams[index].name.to_string();
        if let Some(prefix) = route.rewrite.as_ref().and_then(|rewrite| rewrite.prefix_text.as_deref())
            && text != "legacy"
        {
            text.push_str(&format!(" without {prefix}"));
        }
        text
    };
    let service = || name(route.service.unwrap_or(route.baseline));
    match (route.stage, &route.cohort) {
        (Stage::Gone, _) => "410".to_owned(),
        (_, Some(values)) if let Some(rollout) = &route.rollout => {
            let steps: Vec<String> = rollout.steps.iter().map(ToString::to_string).collect();
            format!(
                "{} for {} in steps of {}, else {}",
                service(),
                cohort(&values.cohort),
                steps.join(", "),
                name(route.baseline)
            )
        }
        // Nobody is in it.
        (_, Some(values)) if values.cohort.share == 0 && values.cohort.always.is_empty() => name(route.baseline),
        (_, Some(values)) => format!("{} for {}, else {}", service(), cohort(&values.cohort), name(route.baseline)),
        (stage, None) if stage.uses_service() => service(),
        _ => name(route.baseline),
    }
}

fn cohort(cohort: &Cohort) -> String {
    let by: Vec<String> = cohort.by.iter().map(source).collect();
    let mut text = format!("{} of group `{}` by {}", Share(cohort.share), cohort.group, by.join(", "));
    for (word, list) in [("always", &cohort.always), ("never", &cohort.never)] {
        for traits in list {
            text.push_str(&format!(", {word} {}", describe(traits)));
        }
    }
    text
}

fn describe(traits: &Traits) -> String {
    let headers = traits.headers.iter().map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value)));
    let cookies = traits.cookies.iter().map(|(name, value)| format!("cookie {name}={value}"));
    let claims = traits.claims.iter().map(|(name, value)| format!("claim {name}={value}"));
    headers.chain(cookies).chain(claims).collect::<Vec<_>>().join(" and ")
}

fn source(source: &KeySource) -> String {
    match source {
        KeySource::Cookie(name) => format!("cookie:{name}"),
        KeySource::Header(name) => format!("header:{name}"),
        KeySource::Claim(name) => format!("claim:{name}"),
        KeySource::Ip => "ip".to_owned(),
        KeySource::Sticky => "sticky".to_owned(),
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "no request goes elsewhere");
        }
        for Move { requests, from, to } in self.paths.iter().chain(&self.upstreams).chain(&self.moves) {
            writeln!(f, "{requests}: {from} → {to}")?;
        }
        Ok(())
    }
}
