//! Which requests would go elsewhere under another file.
//!
//! By rules: each rule of either file gives a request that it takes, and requests that
//! fail each of its predicates; where the two files send one elsewhere, it is told. So what
//! is told is always true, and every rule of both files is tried.

use std::{collections::BTreeSet, fmt};

use http::{HeaderMap, Method};
use serde::Serialize;

use super::{Route, Snapshot};
use crate::{
    config::values::Share,
    routing::{
        cohort::KeySource,
        pattern::{Part, Pattern},
        predicate::Head,
        table::{Found, HostPattern, Rule},
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
}

impl Difference {
    /// Whether any request goes elsewhere.
    pub fn is_empty(&self) -> bool {
        self.moves.is_empty() && self.upstreams.is_empty()
    }
}

/// Compares two files, compiled.
pub fn diff(old: &Snapshot, new: &Snapshot) -> Difference {
    let mut moves = BTreeSet::new();
    for side in [old, new] {
        for (index, rule) in side.table.rules().iter().enumerate() {
            for probe in probes(rule, &side.routes[index].path, [old, new]) {
                let (from, to) = (probe.target(old), probe.target(new));
                if from != to {
                    moves.insert(Move { requests: probe.label, from, to });
                }
            }
        }
    }
    let url = |snapshot: &Snapshot, name: &str| {
        let found = snapshot.upstreams.iter().find(|upstream| &*upstream.name == name)?;
        Some(format!("{}://{}", if found.url.tls { "https" } else { "http" }, found.url.authority))
    };
    let upstreams = old
        .upstreams
        .iter()
        .filter_map(|upstream| {
            let (from, to) = (url(old, &upstream.name)?, url(new, &upstream.name)?);
            (from != to).then(|| Move { requests: format!("upstream `{}`", upstream.name), from, to })
        })
        .collect();
    Difference { moves: moves.into_iter().collect(), upstreams }
}

/// A request that stands for all that a rule takes.
struct Probe {
    label: String,
    host: Vec<u8>,
    key: Vec<u8>,
    method: Method,
    headers: HeaderMap,
    query: String,
}

/// A segment that no literal of either file is.
const OTHER: &[u8] = b"\xffother";

fn probes(rule: &Rule, path: &str, sides: [&Snapshot; 2]) -> Vec<Probe> {
    let mut methods = rule.predicates.methods.clone();
    if methods.is_empty() {
        methods.push(Method::GET);
    }
    // Methods that rules of either file for the same path tell apart, and one that none names.
    for side in sides {
        for other in side.table.rules().iter().filter(|other| other.pattern == rule.pattern) {
            methods.extend(other.predicates.methods.iter().cloned());
        }
    }
    methods.extend(Method::from_bytes(b"OTHER"));
    methods.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    methods.dedup();
    let mut probes = Vec::new();
    for host in rule.host_patterns() {
        for method in &methods {
            for with_fields in [true, false] {
                let fields = !rule.predicates.headers.is_empty() || !rule.predicates.query.is_empty();
                if !with_fields && !fields {
                    continue;
                }
                for key in keys(&rule.pattern) {
                    probes.push(probe(rule, path, host, method, with_fields && fields, key));
                }
            }
        }
    }
    probes
}

fn probe(rule: &Rule, path: &str, host: &HostPattern, method: &Method, with_fields: bool, key: Vec<u8>) -> Probe {
    let (host, shown) = match host {
        HostPattern::Any => (b"\xffother".to_vec(), String::new()),
        HostPattern::Exact(name) => (name.to_vec(), String::from_utf8_lossy(name).into_owned()),
        HostPattern::Below(suffix) => ([b"other", &**suffix].concat(), format!("*{}", String::from_utf8_lossy(suffix))),
    };
    let mut headers = HeaderMap::new();
    let mut query = Vec::new();
    let mut shown_fields = String::new();
    if with_fields {
        for (name, value) in &rule.predicates.headers {
            if let Ok(value) = http::HeaderValue::from_bytes(value) {
                headers.insert(name, value);
            }
            shown_fields.push_str(&format!(" with {name}: {}", String::from_utf8_lossy(value)));
        }
        for (name, value) in &rule.predicates.query {
            let pair = format!("{}={}", encode(name), encode(value));
            shown_fields.push_str(&format!(" with ?{pair}"));
            query.push(pair);
        }
    }
    let method_shown = if method.as_str() == "OTHER" { "other methods" } else { method.as_str() };
    Probe {
        label: format!("{method_shown} {shown}{path}{shown_fields}"),
        host,
        key,
        method: method.clone(),
        headers,
        query: query.join("&"),
    }
}

/// Paths that a pattern takes: for `**` its root and something below.
fn keys(pattern: &Pattern) -> Vec<Vec<u8>> {
    let mut key: Vec<&[u8]> = Vec::new();
    for part in pattern.parts() {
        match part {
            Part::Literal(literal) => key.push(literal),
            Part::Param => key.push(OTHER),
            Part::Rest => {
                let root = key.join(&b'/');
                key.push(OTHER);
                return vec![root, key.join(&b'/')];
            }
        }
    }
    vec![key.join(&b'/')]
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
    /// Where a file sends it, in words that are equal exactly when nothing changes for the request.
    fn target(&self, snapshot: &Snapshot) -> String {
        let head =
            Head { host: &self.host, key: &self.key, method: &self.method, headers: &self.headers, query: &self.query };
        match snapshot.table.find(&head).found {
            Found::Rule(index) => target(&snapshot.routes[index], snapshot),
            Found::Nothing => target(&snapshot.routes[snapshot.unrouted()], snapshot),
            Found::Refused(index) => format!("405 by route `{}`", snapshot.routes[index].name),
        }
    }
}

fn target(route: &Route, snapshot: &Snapshot) -> String {
    let name = |index: usize| snapshot.upstreams[index].name.to_string();
    let service = || {
        let mut text = name(route.service.unwrap_or(route.baseline));
        if let Some(prefix) = route.rewrite.as_ref().and_then(|rewrite| rewrite.prefix_text.as_deref()) {
            text.push_str(&format!(" without {prefix}"));
        }
        text
    };
    match (route.stage, &route.cohort) {
        (crate::config::Stage::Gone, _) => "410".to_owned(),
        (_, Some(values)) => {
            let by: Vec<String> = values.cohort.by.iter().map(source).collect();
            let exceptions = match (values.cohort.always.len(), values.cohort.never.len()) {
                (0, 0) => String::new(),
                _ => format!(", exceptions {:?}/{:?}", values.cohort.always, values.cohort.never),
            };
            format!(
                "{} for {} of group `{}` by {}{exceptions}, else {}",
                service(),
                Share(values.cohort.share),
                values.cohort.group,
                by.join(", "),
                name(route.baseline)
            )
        }
        (stage, None) if stage.uses_service() => service(),
        _ => name(route.baseline),
    }
}

fn source(source: &KeySource) -> String {
    match source {
        KeySource::Cookie(name) => format!("cookie:{name}"),
        KeySource::Header(name) => format!("header:{name}"),
        KeySource::Ip => "ip".to_owned(),
        KeySource::Sticky => "sticky".to_owned(),
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "no request goes elsewhere");
        }
        for Move { requests, from, to } in self.upstreams.iter().chain(&self.moves) {
            writeln!(f, "{requests}: {from} → {to}")?;
        }
        Ok(())
    }
}
