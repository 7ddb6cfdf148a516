//! Where the endpoints of an inventory go, by what runs, and what another file would change for them.

use std::collections::{BTreeSet, HashMap};

use http::Method;
use serde::Serialize;

use super::{Route, Snapshot, diff::Probe};
use crate::{
    config::Stage,
    inventory::{
        Document, Place, Standing,
        tree::{METHODS, Step, steps},
    },
    routing::table::{Found, HostPattern, Rule},
};

/// Says where the requests of endpoints go, by what runs.
pub struct Locator<'s> {
    snapshot: &'s Snapshot,
    by_name: HashMap<&'s str, usize>,
    /// Hosts that any rule names: of what comes from a log or a document, nobody knows the host.
    hosts: Vec<&'s HostPattern>,
}

/// Hosts that are tried for that.
const HOSTS: usize = 16;

impl<'s> Locator<'s> {
    /// For a snapshot.
    pub fn new(snapshot: &'s Snapshot) -> Self {
        let by_name = snapshot.routes.iter().enumerate().map(|(index, route)| (&*route.name, index)).collect();
        let named: BTreeSet<&HostPattern> = snapshot.table.rules().iter().flat_map(|rule| &rule.hosts).collect();
        Self { snapshot, by_name, hosts: named.into_iter().take(HOSTS).collect() }
    }

    /// Where an endpoint's requests go: a route is found as a request would find it, with the host and the fields that the route
    /// wants under which it was counted.
    pub fn locate(&self, method: &str, steps: &[Step], counted: Option<&str>) -> Place {
        let probe = self.probe(method, steps, counted);
        let mut found = self.find(&probe);
        if counted.is_none() && found.is_none() {
            found = self.hosts.iter().find_map(|host| self.find(&probe.at(host)));
        }
        let Some(route) = found else { return Place { route: None, standing: Standing::Legacy, tags: Vec::new() } };
        Place {
            route: Some(route.name.to_string()),
            standing: standing(route),
            tags: route.tags.iter().map(ToString::to_string).collect(),
        }
    }

    fn find(&self, probe: &Probe) -> Option<&'s Route> {
        match probe.find(self.snapshot)?.found {
            Found::Rule(index) | Found::Refused(index) => Some(&self.snapshot.routes[index]),
            Found::Nothing => None,
        }
    }

    fn probe(&self, method: &str, steps: &[Step], counted: Option<&str>) -> Probe {
        let index = counted.and_then(|name| self.by_name.get(name));
        let rule: Option<&Rule> = index.and_then(|index| self.snapshot.table.rules().get(*index));
        // One of those that are not told apart: such as the rule itself names.
        let unusual = || rule?.predicates.methods.iter().find(|method| !METHODS.contains(&method.as_str()));
        let method = match unusual().filter(|_| method == "OTHER") {
            Some(named) => named.clone(),
            None => Method::from_bytes(method.as_bytes()).unwrap_or(Method::GET),
        };
        Probe::endpoint(&method, steps, rule)
    }
}

/// What a route is, in one number: what it takes, and who answers it.
pub fn about(snapshot: &Snapshot, index: usize) -> u64 {
    let route = &snapshot.routes[index];
    let name = |upstream: usize| &*snapshot.upstreams[upstream].name;
    let rule = snapshot.table.rules().get(index);
    let text = format!("{rule:?} {:?} {}", route.service.map(name), name(route.baseline));
    twox_hash::XxHash3_64::oneshot(text.as_bytes())
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
    let locator = Locator::new(old);
    let mut shifts: Vec<Shift> = inventory
        .endpoints
        .iter()
        .filter_map(|endpoint| {
            let steps = steps(&endpoint.path, old.paths.case_insensitive);
            let probe = locator.probe(&endpoint.method, &steps, endpoint.counted.as_deref());
            let (from, to) = (probe.target(old), probe.target(new));
            let requests = format!("{} {}", endpoint.method, endpoint.path);
            (from != to).then_some(Shift { requests, per_hour: endpoint.per_hour, from, to })
        })
        .collect();
    shifts.sort_by(|a, b| b.per_hour.total_cmp(&a.per_hour).then_with(|| a.requests.cmp(&b.requests)));
    shifts
}
