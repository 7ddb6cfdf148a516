//! What routes do to each other: ties, routes that can never match, groups that disagree, upstreams that nobody uses.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::{
    config::{
        Config,
        file::{CanaryConfig, RouteConfig, Stage},
        source::{At, Item, Sources},
    },
    routing::{
        pattern::Pattern,
        table::{HostPattern, Rule},
    },
};

pub(super) fn ties_and_unreachable(sources: &mut Sources, items: &[Item<RouteConfig>], rules: &[(usize, &Rule)]) {
    let mut groups: BTreeMap<(&HostPattern, &Pattern), Vec<(usize, &Rule)>> = BTreeMap::new();
    for (n, rule) in rules {
        for host in rule.host_patterns() {
            groups.entry((host, &rule.pattern)).or_default().push((*n, rule));
        }
    }
    let name = |n: usize| Config::route_name(&items[n].value);
    let mut tied = HashSet::new();
    // A route is unreachable when it is so under each of its hosts.
    let mut covered: HashMap<usize, (usize, usize)> = HashMap::new();
    for group in groups.values() {
        for (at, (n, rule)) in group.iter().enumerate() {
            let rank = rule.predicates.rank(rule.priority);
            let mut better = Vec::new();
            let mut told = false;
            for (place, (other, theirs)) in group.iter().enumerate() {
                if place == at || !rule.predicates.overlaps(&theirs.predicates) {
                    continue;
                }
                match theirs.predicates.rank(theirs.priority).cmp(&rank) {
                    // One tie a rule is enough to say, and bounds the work.
                    std::cmp::Ordering::Equal if place < at && !told && tied.insert((*other, *n)) => {
                        told = true;
                        let line = sources.line(&items[*other].at.down("match"));
                        sources.error(
                            &items[*n].at.down("match"),
                            format!("route `{}` ties with route `{}`", name(*n), name(*other)),
                            &format!("both match some request, see {line}: give one a higher `priority:`, or another method, header or query"),
                        );
                    }
                    std::cmp::Ordering::Less if theirs.predicates.fields_cover(&rule.predicates) => {
                        better.push((*other, *theirs));
                    }
                    _ => {}
                }
            }
            let all = better.iter().any(|(_, theirs)| theirs.predicates.methods.is_empty());
            let listed = !rule.predicates.methods.is_empty()
                && rule
                    .predicates
                    .methods
                    .iter()
                    .all(|method| better.iter().any(|(_, theirs)| theirs.predicates.methods.contains(method)));
            if let (true, Some((by, _))) = (all || listed, better.first()) {
                covered.entry(*n).or_insert((0, *by)).0 += 1;
            }
        }
    }
    for (n, rule) in rules {
        if let Some((hosts, by)) = covered.get(n)
            && *hosts == rule.host_patterns().count()
        {
            let line = sources.line(&items[*by].at.down("match"));
            sources.error(
                &items[*n].at.down("match"),
                format!("route `{}` can never match", name(*n)),
                &format!(
                    "route `{}` at {line} takes all its requests first; remove one of the two or change a `priority:`",
                    name(*by)
                ),
            );
        }
    }
}

/// Routes of one group share cohorts only while they ask for the same key and share.
pub(super) fn groups(sources: &mut Sources, items: &[Item<RouteConfig>]) {
    let mut seen: HashMap<&str, (&CanaryConfig, &At)> = HashMap::new();
    for Item { at, value } in items.iter().filter(|item| item.value.stage == Stage::Canary) {
        let Some(canary) = &value.canary else { continue };
        let Some(group) = canary.group.as_deref().or(value.name.as_deref()) else { continue };
        let (first, first_at) = *seen.entry(group).or_insert((canary, at));
        if first.by != canary.by || first.percent != canary.percent {
            let line = sources.line(&first_at.down("canary"));
            sources.warn(
                &at.down("canary").at_key(),
                format!("routes of group `{group}` differ in `by` or `percent`"),
                &format!("see {line}: a user may be on the service here and on the monolith there"),
            );
        }
    }
}

pub(super) fn unused_upstreams(sources: &mut Sources, items: &[Item<RouteConfig>]) {
    let used: HashSet<&str> = items
        .iter()
        .flat_map(|item| [item.value.upstream.as_deref(), item.value.baseline.as_deref()])
        .flatten()
        .chain(["legacy"])
        .collect();
    for Item { at, value: (name, _) } in sources.upstreams.clone() {
        if !used.contains(name.as_str()) {
            sources.warn(
                &at.at_key(),
                format!("unused upstream: `{name}`"),
                "name it in a route's `upstream:`, or remove it",
            );
        }
    }
}
