//! Where the endpoints of an inventory go, by what runs, and what another file would change for them.

use http::Method;
use serde::Serialize;

use super::{Route, Snapshot, diff::Probe};
use crate::{
    config::Stage,
    inventory::{
        Document, Place, Standing,
        tree::{Step, steps},
    },
    routing::table::{Found, Match, Rule},
};

/// Where an endpoint's requests go: a route is found as a request would find it, with the fields that the route wants under which it was counted.
pub fn locate(snapshot: &Snapshot, method: &str, steps: &[Step], counted: Option<&str>) -> Place {
    let probe = probe(snapshot, method, steps, counted);
    let route = probe.find(snapshot).and_then(|Match { found, .. }| match found {
        Found::Rule(index) | Found::Refused(index) => Some(&snapshot.routes[index]),
        Found::Nothing => None,
    });
    let Some(route) = route else { return Place { route: None, standing: Standing::Legacy, tags: Vec::new() } };
    Place {
        route: Some(route.name.to_string()),
        standing: standing(route),
        tags: route.tags.iter().map(ToString::to_string).collect(),
    }
}

fn standing(route: &Route) -> Standing {
    match route.runs() {
        Stage::Legacy => Standing::Legacy,
        Stage::Shadow => Standing::Shadow,
        Stage::Canary => Standing::Canary,
        Stage::Migrated => Standing::Migrated,
        Stage::Retired => Standing::Retired,
        Stage::Gone => Standing::Gone,
    }
}

fn probe(snapshot: &Snapshot, method: &str, steps: &[Step], counted: Option<&str>) -> Probe {
    let index = counted.and_then(|name| snapshot.routes.iter().position(|route| &*route.name == name));
    let rule: Option<&Rule> = index.and_then(|index| snapshot.table.rules().get(index));
    Probe::endpoint(&Method::from_bytes(method.as_bytes()).unwrap_or(Method::GET), steps, rule)
}

/// An endpoint whose requests would go elsewhere.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shift {
    /// The endpoint.
    pub requests: String,
    /// How many of them there are in an hour.
    pub per_hour: f64,
    /// Where the old file sends them.
    pub from: String,
    /// Where the new one does.
    pub to: String,
}

/// The endpoints whose requests would go elsewhere, those with most of them first.
pub fn shifts(old: &Snapshot, new: &Snapshot, inventory: &Document) -> Vec<Shift> {
    let mut shifts: Vec<Shift> = inventory
        .endpoints
        .iter()
        .filter_map(|endpoint| {
            let steps = steps(&endpoint.path, old.paths.case_insensitive);
            let probe = probe(old, &endpoint.method, &steps, endpoint.counted.as_deref());
            let (from, to) = (probe.target(old), probe.target(new));
            let requests = format!("{} {}", endpoint.method, endpoint.path);
            (from != to).then_some(Shift { requests, per_hour: endpoint.per_hour, from, to })
        })
        .collect();
    shifts.sort_by(|a, b| b.per_hour.total_cmp(&a.per_hour).then_with(|| a.requests.cmp(&b.requests)));
    shifts
}
