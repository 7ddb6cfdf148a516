//! What clients ask for: endpoints as templates, by who answers them; learned, imported, and bounded.
//!
//! Pure but for [`keeper`], the thread that feeds it. Counts here are what people look at: blocks of a worker that
//! find no room are dropped, and counted. What must be exact (that the monolith is silent) hangs on the counters of the routes.

pub mod counts;
pub mod feed;
pub mod import;
pub mod keeper;
pub mod progress;
pub mod recent;
mod segment;
pub mod tree;

use std::collections::BTreeMap;

use hashbrown::HashMap;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::segment::{Kind, kind};
use self::{
    counts::{Counts, Seconds, seconds},
    tree::{METHODS, Request, Row, Step, Tree, steps, template},
};
use crate::telemetry::metrics::Arm;

/// The version of the document.
const VERSION: u32 = 1;
/// Names of routes that are told apart, those of earlier files among them.
const NAMES: usize = 65_536;

/// All that is known, as it is kept and as others get it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Document {
    /// The version of the document: 1.
    pub version: u32,
    /// Since when it is watched, and until when.
    pub since: Option<Timestamp>,
    /// Until when.
    pub until: Option<Timestamp>,
    /// Requests to nothing: answered 404, 405, 410 or 501, by the gateway, or left by their client, where no endpoint is known.
    pub unmatched: u64,
    /// Requests for whose endpoints there was no room.
    pub beyond: u64,
    /// Requests that were not counted here, since the thread that counts did not keep up.
    pub dropped: u64,
    /// How many endpoints stand where.
    pub summary: Summary,
    /// The endpoints, what is asked for most first.
    pub endpoints: Vec<Endpoint>,
}

impl Document {
    /// Whether this gateway can read it.
    pub fn is_known(&self) -> bool {
        self.version <= VERSION
    }
}

/// How many endpoints stand where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    /// All that were called.
    pub endpoints: u64,
    /// Those that the monolith answers.
    pub legacy: u64,
    /// Those whose cohort the service answers.
    pub canary: u64,
    /// Those that the monolith does not answer any more.
    pub moved: u64,
    /// Those that no route claims.
    pub unrouted: u64,
    /// Those that a document has and nobody calls.
    pub never_called: u64,
}

/// One endpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Endpoint {
    /// The method; `OTHER` for any that is not among those told apart.
    pub method: String,
    /// The template.
    pub path: String,
    /// The route that claims it now; nothing where none does.
    pub route: Option<String>,
    /// Under which route its requests were counted.
    pub counted: Option<String>,
    /// Where it stands.
    pub state: Standing,
    /// Whether an OpenAPI document has it.
    pub documented: bool,
    /// When it was first seen.
    pub first_seen: Option<Timestamp>,
    /// When it was last seen.
    pub last_seen: Option<Timestamp>,
    /// Requests an hour, of all arms.
    pub per_hour: f64,
    /// By who answered.
    pub arms: BTreeMap<String, ArmView>,
}

/// What one arm did for an endpoint.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ArmView {
    /// Requests an hour, of the last hour.
    pub per_hour: f64,
    /// The median of the durations, about.
    pub p50_ms: Option<f64>,
    /// The 99th percentile, about.
    pub p99_ms: Option<f64>,
    /// When the last request came.
    pub last_seen: Option<Timestamp>,
    /// What is counted.
    pub counts: Counts,
}

/// Where an endpoint stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The monolith answers it.
    #[default]
    Legacy,
    /// The monolith answers it, and the service is compared.
    Shadow,
    /// The service answers its cohort.
    Canary,
    /// The service answers it.
    Migrated,
    /// The service alone.
    Retired,
    /// Nobody.
    Gone,
    /// A document has it, and nobody calls it.
    NeverCalled,
}

impl Standing {
    /// Whether the monolith is not asked any more.
    pub fn is_moved(self) -> bool {
        matches!(self, Self::Migrated | Self::Retired | Self::Gone)
    }

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Legacy => "legacy",
            Self::Shadow => "shadow",
            Self::Canary => "canary",
            Self::Migrated => "migrated",
            Self::Retired => "retired",
            Self::Gone => "gone",
            Self::NeverCalled => "never called",
        }
    }
}

/// Where requests of an endpoint go, by what runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The route; nothing where none claims it.
    pub route: Option<String>,
    /// Where that stands.
    pub standing: Standing,
    /// What the route is counted under beside its name.
    pub tags: Vec<String>,
}

/// Says where an endpoint's requests go: by method, template, and the route under which they were counted.
pub type Locate<'l> = &'l dyn Fn(&str, &[Step], Option<&str>) -> Place;

/// The inventory.
#[derive(Debug)]
pub struct Inventory {
    tree: Tree,
    names: Vec<Box<str>>,
    numbers: HashMap<Box<str>, u32>,
    since: Seconds,
    dropped: u64,
    /// The time that files are about which it is read from.
    span: Option<(Seconds, Seconds)>,
}

/// An endpoint as it is claimed now.
#[derive(Clone, Debug)]
pub struct Claimed {
    /// Where it stands.
    pub place: Place,
    /// The route under which most of its requests were counted.
    pub counted: Option<String>,
    /// What is counted.
    pub row: Row,
}

/// The number of the name of no route.
const NOBODY: u32 = 0;

impl Inventory {
    /// An empty one that begins now.
    pub fn new(now: Seconds) -> Self {
        let mut this = Self {
            tree: Tree::default(),
            names: Vec::new(),
            numbers: HashMap::new(),
            since: now,
            dropped: 0,
            span: None,
        };
        this.number("");
        this
    }

    /// The number of a route's name; the empty name is that of no route.
    pub fn number(&mut self, name: &str) -> u32 {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        if self.names.len() >= NAMES {
            return NOBODY;
        }
        let number = u32::try_from(self.names.len()).unwrap_or(NOBODY);
        self.names.push(name.into());
        self.numbers.insert(name.into(), number);
        number
    }

    /// Takes in a request; its path in its matched form, without the leading `/`.
    pub fn take(&mut self, path: &str, request: Request) {
        self.tree.take(path, request);
    }

    /// Has rates be those over all the time that some files are about.
    pub fn spans(&mut self, from: Seconds, to: Seconds) {
        let (known_from, known_to) = self.span.unwrap_or((from, to));
        self.span = Some((known_from.min(from), known_to.max(to)));
        self.since = self.since.min(from);
    }

    /// Counts what was not counted.
    pub fn drop_some(&mut self, requests: u64) {
        self.dropped += requests;
    }

    /// Requests that were not counted.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Makes sure that the segments of a pattern keep their names, and its open ones are open.
    pub fn pin(&mut self, steps: &[Step]) {
        self.tree.pin(steps);
    }

    /// How many endpoints there are: cheap enough to ask often.
    pub fn len(&self) -> usize {
        self.tree.size().1
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The endpoints as they are claimed now: what was counted under several routes that are one by now is one endpoint.
    pub fn endpoints(&self, locate: Locate<'_>) -> Vec<(u8, String, Claimed)> {
        let mut claimed: HashMap<(u8, String, Option<String>), Claimed> = HashMap::new();
        let mut documented: HashMap<(u8, String), bool> = HashMap::new();
        self.tree.each(|steps, row| {
            let path = template(steps);
            *documented.entry((row.method, path.clone())).or_default() |= row.documented;
            let place = locate(METHODS[usize::from(row.method)], steps, self.name(row));
            match claimed.entry((row.method, path, place.route.clone())) {
                hashbrown::hash_map::Entry::Occupied(mut known) => {
                    let known = known.get_mut();
                    if row.requests() > known.row.requests() {
                        known.counted = self.name(row).map(str::to_owned);
                    }
                    known.row.merge(row);
                }
                hashbrown::hash_map::Entry::Vacant(new) => {
                    let counted = self.name(row).map(str::to_owned);
                    new.insert(Claimed { place, counted, row: row.clone() });
                }
            }
        });
        // What only a document has is not a second endpoint where it is called by way of some route.
        let called: hashbrown::HashSet<(u8, String)> = claimed
            .iter()
            .filter(|(_, claimed)| claimed.row.requests() > 0)
            .map(|((method, path, _), _)| (*method, path.clone()))
            .collect();
        let mut endpoints: Vec<_> = claimed
            .into_iter()
            .map(|((method, path, _), mut claimed)| {
                claimed.row.documented = documented.get(&(method, path.clone())) == Some(&true);
                (method, path, claimed)
            })
            .filter(|(method, path, of)| of.row.requests() > 0 || !called.contains(&(*method, path.clone())))
            .collect();
        endpoints.sort_by(|a, b| (&a.1, a.0, &a.2.place.route).cmp(&(&b.1, b.0, &b.2.place.route)));
        endpoints
    }

    fn name(&self, row: &Row) -> Option<&str> {
        Some(&*self.names[row.route as usize]).filter(|name| !name.is_empty())
    }

    /// All that is known, at a moment.
    pub fn document(&self, now: Seconds, locate: Locate<'_>) -> Document {
        let timestamp = |seconds: Seconds| Timestamp::from_second(i64::from(seconds)).ok();
        let round = |rate: f64| (rate * 10.0).round() / 10.0;
        let mut endpoints = Vec::new();
        let mut summary = Summary::default();
        // Of files: over all the time that they are about.
        let span = self.span.map(|(from, to)| f64::from(to.saturating_sub(from).max(60)) / 3600.0);
        for (method, path, Claimed { place, counted, row }) in self.endpoints(locate) {
            let mut last = 0;
            let mut per_hour = 0.0;
            let arms = Arm::ALL.into_iter().zip(&row.arms).filter_map(|(arm, counts)| {
                let counts = counts.as_deref()?;
                last = last.max(counts.last);
                #[allow(clippy::cast_precision_loss, reason = "a count that is shown")]
                let rate = span.map_or_else(|| counts.per_hour(row.first, now), |hours| counts.requests as f64 / hours);
                per_hour += rate;
                let view = ArmView {
                    per_hour: round(rate),
                    p50_ms: counts.quantile_ms(0.5),
                    p99_ms: counts.quantile_ms(0.99),
                    last_seen: timestamp(counts.last),
                    counts: counts.clone(),
                };
                Some((arm.word().to_owned(), view))
            });
            let arms = arms.collect();
            let state = if row.requests() == 0 { Standing::NeverCalled } else { place.standing };
            let counter = match state {
                Standing::NeverCalled => &mut summary.never_called,
                Standing::Legacy | Standing::Shadow => &mut summary.legacy,
                Standing::Canary => &mut summary.canary,
                Standing::Migrated | Standing::Retired | Standing::Gone => &mut summary.moved,
            };
            *counter += 1;
            if state != Standing::NeverCalled {
                summary.endpoints += 1;
                summary.unrouted += u64::from(place.route.is_none());
            }
            endpoints.push(Endpoint {
                method: METHODS[usize::from(method)].to_owned(),
                path,
                route: place.route,
                counted,
                state,
                documented: row.documented,
                first_seen: (row.first > 0).then(|| timestamp(row.first)).flatten(),
                last_seen: (last > 0).then(|| timestamp(last)).flatten(),
                per_hour: round(per_hour),
                arms,
            });
        }
        let requests = |endpoint: &Endpoint| endpoint.arms.values().map(|arm| arm.counts.requests).sum::<u64>();
        endpoints.sort_by(|a, b| {
            let rate = b.per_hour.total_cmp(&a.per_hour);
            let texts = || (&a.path, &a.method).cmp(&(&b.path, &b.method));
            rate.then_with(|| requests(b).cmp(&requests(a))).then_with(texts)
        });
        Document {
            version: VERSION,
            since: timestamp(self.since),
            until: timestamp(now),
            unmatched: self.tree.unmatched,
            beyond: self.tree.beyond,
            dropped: self.dropped,
            summary,
            endpoints,
        }
    }

    /// Adds what is known elsewhere: what was kept, and what is imported.
    pub fn merge(&mut self, document: &Document, case_insensitive: bool, now: Seconds) -> Result<usize, String> {
        if document.version > VERSION {
            return Err(format!("a document of version {}; this gateway reads version {VERSION}", document.version));
        }
        let mut added = 0;
        for endpoint in &document.endpoints {
            let method = METHODS.iter().position(|known| *known == endpoint.method).unwrap_or(METHODS.len() - 1);
            let route = endpoint.counted.as_deref().map_or(NOBODY, |name| self.number(name));
            let mut row = Row {
                method: u8::try_from(method).unwrap_or(0),
                route,
                first: endpoint.first_seen.map_or(0, seconds),
                documented: endpoint.documented,
                ..Row::default()
            };
            for (arm, place) in Arm::ALL.into_iter().zip(&mut row.arms) {
                *place = endpoint.arms.get(arm.word()).map(|view| Box::new(view.counts.clone()));
            }
            row.clamp(now);
            self.tree.add(&steps(&endpoint.path, case_insensitive), row);
            added += 1;
        }
        if let Some(since) = document.since {
            self.since = self.since.min(seconds(since));
        }
        self.tree.unmatched = self.tree.unmatched.saturating_add(document.unmatched);
        self.tree.beyond = self.tree.beyond.saturating_add(document.beyond);
        self.dropped = self.dropped.saturating_add(document.dropped);
        Ok(added)
    }
}

#[cfg(test)]
mod tests;
