//! The rules, compiled for one walk from the most to the least specific.
//!
//! Precedence does not depend on the order of the list: the most specific host
//! first, then segment by segment a literal beats `{id}` beats `**`, then a method,
//! more headers, more query matches, then `priority`. A rule whose predicates fail falls
//! through to the next best, but not past a terminal one (`retired`, `gone`).

use std::ops::ControlFlow;

use hashbrown::HashMap;

use super::{
    pattern::{Part, Pattern},
    predicate::{Failed, Head, Predicates},
};

/// Which hosts a rule takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostPattern {
    /// This very name, lower case.
    Exact(Box<[u8]>),
    /// Any name below this one, which starts with its dot.
    Below(Box<[u8]>),
    /// Every host.
    Any,
}

/// One rule of a table.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Any of these; every host where empty.
    pub hosts: Vec<HostPattern>,
    /// The paths.
    pub pattern: Pattern,
    /// What else must hold.
    pub predicates: Predicates,
    /// The last word between rules that nothing else tells apart.
    pub priority: i32,
    /// Whether a request that fails the predicates may not fall through.
    pub terminal: bool,
}

impl Rule {
    /// The host patterns, `Any` where none is given.
    pub fn host_patterns(&self) -> impl Iterator<Item = &HostPattern> {
        let any = self.hosts.is_empty().then_some(&HostPattern::Any);
        self.hosts.iter().chain(any)
    }
}

/// An index into the rules of a table.
pub type RuleIndex = usize;

/// A rule in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    rule: u32,
    /// Whether the path alone decides. Then the rule itself, which may lie anywhere in memory, need not be looked at.
    plain: bool,
}

impl Entry {
    /// Which rule.
    pub fn rule(self) -> RuleIndex {
        self.rule as usize
    }
}

/// Rules that share host and pattern, best first: a stretch of their trie's entries.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    start: u32,
    len: u32,
}

/// What a request matches.
#[derive(Debug, PartialEq, Eq)]
pub struct Match {
    /// Which rule answers.
    pub found: Found,
    /// The rules whose path matched and whose predicates failed before one answered: what guards them guards the request wherever
    /// it falls.
    pub guards: Vec<RuleIndex>,
}

/// Which rule answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// This one.
    Rule(RuleIndex),
    /// No rule: the monolith.
    Nothing,
    /// This terminal rule has the path, but refuses the method or fields.
    Refused(RuleIndex),
}

/// The compiled rules.
#[derive(Debug, Default)]
pub struct Table {
    rules: Vec<Rule>,
    exact: HashMap<Box<[u8]>, Trie>,
    below: HashMap<Box<[u8]>, Trie>,
    any: Trie,
}

impl Table {
    /// Compiles rules; their indices stay what they were.
    pub fn new(rules: Vec<Rule>) -> Self {
        let mut exact: HashMap<Box<[u8]>, Builder> = HashMap::new();
        let mut below: HashMap<Box<[u8]>, Builder> = HashMap::new();
        let mut any = Builder::default();
        for (index, rule) in rules.iter().enumerate() {
            for host in rule.host_patterns() {
                let trie = match host {
                    HostPattern::Exact(name) => exact.entry(name.clone()).or_default(),
                    HostPattern::Below(suffix) => below.entry(suffix.clone()).or_default(),
                    HostPattern::Any => &mut any,
                };
                trie.insert(rule.pattern.parts(), index);
            }
        }
        let finish = |tries: HashMap<Box<[u8]>, Builder>| {
            tries.into_iter().map(|(host, trie)| (host, trie.finish(&rules))).collect()
        };
        Self { exact: finish(exact), below: finish(below), any: any.finish(&rules), rules }
    }

    /// The rules, in their order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Finds the most specific rule that holds.
    pub fn find(&self, head: &Head<'_>) -> Match {
        let mut guards = Vec::new();
        let found = self.walk(head, &mut |group| {
            for entry in group {
                if entry.plain || self.rules[entry.rule()].predicates.check(head).is_ok() {
                    return ControlFlow::Break(Found::Rule(entry.rule()));
                }
            }
            guards.extend(group.iter().map(|entry| entry.rule()));
            match group.iter().find(|entry| self.rules[entry.rule()].terminal) {
                Some(terminal) => ControlFlow::Break(Found::Refused(terminal.rule())),
                None => ControlFlow::Continue(()),
            }
        });
        let found = found.break_value().unwrap_or(Found::Nothing);
        Match { found, guards }
    }

    /// Finds the rule of a path that upstreams read in two ways: a terminal one in either way, else that of the first way. What
    /// guards either reading guards the request.
    pub fn find_either(&self, first: &Head<'_>, second: &Head<'_>) -> Match {
        let is_terminal = |found: Found| match found {
            Found::Refused(_) => true,
            Found::Rule(index) => self.rules[index].terminal,
            Found::Nothing => false,
        };
        let (first, second) = (self.find(first), self.find(second));
        let swap = is_terminal(second.found) && !is_terminal(first.found);
        let (mut answers, other) = if swap { (second, first) } else { (first, second) };
        let others = match other.found {
            Found::Rule(index) | Found::Refused(index) => Some(index),
            Found::Nothing => None,
        };
        for guard in other.guards.into_iter().chain(others) {
            if answers.found != Found::Rule(guard) && !answers.guards.contains(&guard) {
                answers.guards.push(guard);
            }
        }
        answers
    }

    /// The methods that terminal rules of the same paths as this one take. A rule for every method refuses by its
    /// fields: then the usual methods stand for all.
    pub fn allowed(&self, refusing: RuleIndex) -> Vec<&str> {
        let pattern = &self.rules[refusing].pattern;
        let mut methods: Vec<&str> = Vec::new();
        for rule in self.rules.iter().filter(|rule| rule.terminal && rule.pattern == *pattern) {
            if rule.predicates.methods.is_empty() {
                return vec!["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
            }
            methods.extend(rule.predicates.methods.iter().map(http::Method::as_str));
        }
        methods.sort_unstable();
        methods.dedup();
        methods
    }

    /// Visits the groups of rules whose host and path match, from the most to the least specific.
    fn walk<'t, B>(&'t self, head: &Head<'_>, visit: &mut impl FnMut(&'t [Entry]) -> ControlFlow<B>) -> ControlFlow<B> {
        if !self.exact.is_empty() || !self.below.is_empty() {
            let host = normalise_host(head.host);
            if let Some(trie) = self.exact.get(&*host) {
                trie.walk(head.key, visit)?;
            }
            if !self.below.is_empty() {
                // From the longest suffix to the shortest; never the bare domain itself.
                for (dot, _) in host.iter().enumerate().filter(|(at, byte)| **byte == b'.' && *at > 0) {
                    if let Some(trie) = self.below.get(&host[dot..]) {
                        trie.walk(head.key, visit)?;
                    }
                }
            }
        }
        self.any.walk(head.key, visit)
    }

    /// Every rule, the candidates in the order in which they are tried, with why each lost.
    pub fn explain(&self, head: &Head<'_>) -> Vec<(RuleIndex, Outcome<'_>)> {
        let mut told = Vec::new();
        let mut decided = None;
        let _ = self.walk(head, &mut |group| {
            for index in group.iter().map(|entry| entry.rule()) {
                if told.iter().any(|(known, _)| *known == index) {
                    continue;
                }
                let outcome = match (decided, self.rules[index].predicates.check(head)) {
                    (Some(winner), _) => Outcome::LessSpecific(winner),
                    (None, Ok(())) => {
                        decided = Some(index);
                        Outcome::Wins
                    }
                    (None, Err(failed)) => Outcome::Failed(failed),
                };
                told.push((index, outcome));
            }
            if decided.is_none()
                && let Some(terminal) = group.iter().map(|entry| entry.rule()).find(|index| self.rules[*index].terminal)
            {
                decided = Some(terminal);
                for (index, outcome) in &mut told {
                    if *index == terminal {
                        *outcome = Outcome::Refuses;
                    }
                }
            }
            ControlFlow::<()>::Continue(())
        });
        for (index, rule) in self.rules.iter().enumerate() {
            if !told.iter().any(|(known, _)| *known == index) {
                let path = rule.pattern.matches(head.key);
                told.push((index, if path { Outcome::HostDiffers } else { Outcome::PathDiffers }));
            }
        }
        told
    }
}

/// Why a rule answers or does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome<'t> {
    /// It answers.
    Wins,
    /// It has the path and refuses the rest: 405.
    Refuses,
    /// A predicate failed; the next rule is tried.
    Failed(Failed<'t>),
    /// It would do, but this one is more specific.
    LessSpecific(RuleIndex),
    /// It is for other hosts.
    HostDiffers,
    /// It is for other paths.
    PathDiffers,
}

/// A host without port and trailing dot, in lower case.
pub fn normalise_host(host: &[u8]) -> Vec<u8> {
    let name = match host.iter().rposition(|&byte| byte == b':') {
        // In `[::1]` the last colon belongs to the address.
        Some(colon) if !host[colon..].contains(&b']') => &host[..colon],
        _ => host,
    };
    name.strip_suffix(b".").unwrap_or(name).to_ascii_lowercase()
}

/// A trie while rules are added to it: each node with its rules for the exact path and for all below.
#[derive(Debug)]
struct Builder {
    nodes: Vec<Node>,
    groups: Vec<[Vec<RuleIndex>; 2]>,
}

/// A trie, laid out so that a lookup touches little memory. Without rules it has not even a root.
#[derive(Debug, Default)]
struct Trie {
    nodes: Vec<Node>,
    entries: Vec<Entry>,
}

#[derive(Debug, Default)]
struct Node {
    /// Boxed, since most nodes are leaves: thousands of them lie closer together so.
    literals: Option<Box<HashMap<Box<[u8]>, u32>>>,
    param: Option<u32>,
    exact: Group,
    rest: Group,
}

impl Default for Builder {
    fn default() -> Self {
        Self { nodes: vec![Node::default()], groups: vec![<[Vec<RuleIndex>; 2]>::default()] }
    }
}

/// An index as it is kept: no file has four thousand million routes.
fn narrow(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

impl Builder {
    fn insert(&mut self, parts: &[Part], rule: RuleIndex) {
        let mut at = 0;
        for part in parts {
            let fresh = narrow(self.nodes.len());
            let node = &mut self.nodes[at];
            let next = match part {
                Part::Literal(literal) => {
                    *node.literals.get_or_insert_default().entry(literal.clone()).or_insert(fresh)
                }
                Part::Param => *node.param.get_or_insert(fresh),
                Part::Rest => return self.groups[at][1].push(rule),
            };
            if next == fresh {
                self.nodes.push(Node::default());
                self.groups.push(<[Vec<RuleIndex>; 2]>::default());
            }
            at = next as usize;
        }
        self.groups[at][0].push(rule);
    }

    /// Puts each group's best rule first, and all groups side by side.
    fn finish(self, rules: &[Rule]) -> Trie {
        let mut trie = Trie { nodes: self.nodes, entries: Vec::new() };
        for (node, groups) in trie.nodes.iter_mut().zip(self.groups) {
            let [exact, rest] = groups.map(|mut group| {
                group.sort_by_key(|&index| rules[index].predicates.rank(rules[index].priority));
                let start = narrow(trie.entries.len());
                trie.entries.extend(group.iter().map(|&index| Entry {
                    rule: narrow(index),
                    plain: rules[index].predicates == Predicates::default(),
                }));
                Group { start, len: narrow(group.len()) }
            });
            (node.exact, node.rest) = (exact, rest);
        }
        trie
    }
}

impl Trie {
    fn group(&self, group: Group) -> &[Entry] {
        &self.entries[group.start as usize..(group.start + group.len) as usize]
    }

    fn walk<'t, B>(&'t self, key: &[u8], visit: &mut impl FnMut(&'t [Entry]) -> ControlFlow<B>) -> ControlFlow<B> {
        if self.nodes.is_empty() {
            return ControlFlow::Continue(());
        }
        self.step(0, (!key.is_empty()).then_some(key), visit)
    }

    fn step<'t, B>(
        &'t self,
        at: u32,
        key: Option<&[u8]>,
        visit: &mut impl FnMut(&'t [Entry]) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        let node = &self.nodes[at as usize];
        if let Some(key) = key {
            let (segment, rest) = match key.iter().position(|&byte| byte == b'/') {
                Some(slash) => (&key[..slash], Some(&key[slash + 1..])),
                None => (key, None),
            };
            if let Some(&child) = node.literals.as_ref().and_then(|literals| literals.get(segment)) {
                self.step(child, rest, visit)?;
            }
            if let Some(child) = node.param {
                self.step(child, rest, visit)?;
            }
        } else if node.exact.len > 0 {
            visit(self.group(node.exact))?;
        }
        if node.rest.len > 0 {
            visit(self.group(node.rest))?;
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, Method};
    use proptest::prelude::*;

    use super::*;
    use crate::routing::naive;

    fn rule(path: &str) -> Rule {
        Rule {
            hosts: Vec::new(),
            pattern: Pattern::parse(path, false).unwrap(),
            predicates: Predicates::default(),
            priority: 0,
            terminal: false,
        }
    }

    fn find(table: &Table, method: &Method, key: &str) -> Match {
        let headers = HeaderMap::new();
        table.find(&Head { host: b"", key: key.as_bytes(), method, headers: &headers, query: "" })
    }

    #[test]
    fn the_most_specific_path_wins() {
        let table = Table::new(["/**", "/a/**", "/a/{x}", "/a/b", "/{x}/b"].map(rule).into());
        for (key, index) in [("", 0), ("z", 0), ("a", 1), ("a/c/d", 1), ("a/c", 2), ("a/b", 3), ("z/b", 4)] {
            assert_eq!(find(&table, &Method::GET, key).found, Found::Rule(index), "{key}");
        }
    }

    #[test]
    fn falling_through_keeps_the_guard_and_stops_at_terminal_rules() {
        let mut get = rule("/a/b");
        get.predicates.methods.push(Method::GET);
        let mut gone = rule("/gone/**");
        gone.predicates.methods.push(Method::GET);
        gone.terminal = true;
        let table = Table::new(vec![get, rule("/a/**"), gone, rule("/**")]);
        let fallen = find(&table, &Method::POST, "a/b");
        assert_eq!((fallen.found, fallen.guards), (Found::Rule(1), vec![0]));
        assert_eq!(find(&table, &Method::POST, "gone/x").found, Found::Refused(2));
        assert_eq!(find(&table, &Method::GET, "gone/x").found, Found::Rule(2));
    }

    #[test]
    fn hosts_lose_ports_dots_and_case() {
        for (host, name) in
            [("A.example:80", "a.example"), ("a.example.", "a.example"), ("[::1]:80", "[::1]"), ("[::1]", "[::1]")]
        {
            assert_eq!(normalise_host(host.as_bytes()), name.as_bytes());
        }
    }

    prop_compose! {
        fn any_rule()(
            path in prop::sample::select(vec!["/", "/**", "/a", "/a/**", "/a/{x}", "/a/b", "/a/b/**", "/{x}", "/{x}/b", "/{x}/**", "/a/{x}/c", "/{x}/{y}/c"]),
            hosts in prop::collection::vec(prop::sample::select(vec!["h", "x.h", ".h", ".x.h"]), 0..2),
            methods in prop::collection::vec(prop::sample::select(vec![Method::GET, Method::POST]), 0..2),
            headers in prop::collection::btree_map(prop::sample::select(vec!["h1", "h2"]), prop::sample::select(vec!["1", "2"]), 0..2),
            query in prop::collection::btree_map(prop::sample::select(vec!["q1", "q2"]), prop::sample::select(vec!["1", "2"]), 0..2),
            priority in 0..2,
            terminal in prop::bool::weighted(0.2),
        ) -> Rule {
            Rule {
                hosts: hosts.iter().map(|host| match host.strip_prefix('.') {
                    Some(_) => HostPattern::Below(host.as_bytes().into()),
                    None => HostPattern::Exact(host.as_bytes().into()),
                }).collect(),
                pattern: Pattern::parse(path, false).unwrap(),
                predicates: Predicates {
                    methods,
                    headers: headers.into_iter().map(|(k, v)| (k.parse().unwrap(), v.as_bytes().into())).collect(),
                    query: query.into_iter().map(|(k, v)| (k.as_bytes().into(), v.as_bytes().into())).collect(),
                },
                priority,
                terminal,
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        /// The table and a linear search by pairwise comparison agree on every request, whatever the order of the rules.
        #[test]
        fn agrees_with_a_naive_linear_matcher(
            rules in prop::collection::vec(any_rule(), 0..8),
            host in prop::sample::select(vec!["h", "x.h", "y.x.h", "z"]),
            key in prop::sample::select(vec!["", "a", "b", "a/b", "a/c", "b/b", "a/b/c", "b/b/c", "a/b/c/d"]),
            method in prop::sample::select(vec![Method::GET, Method::POST, Method::PUT]),
            h1 in prop::option::of(prop::sample::select(vec!["1", "2"])),
            query in prop::sample::select(vec!["", "q1=1", "q1=2&q2=1"]),
        ) {
            let rules = naive::without_ties(rules);
            let mut headers = HeaderMap::new();
            if let Some(value) = h1 {
                headers.insert("h1", value.parse().unwrap());
            }
            let head = Head { host: host.as_bytes(), key: key.as_bytes(), method: &method, headers: &headers, query };
            let table = Table::new(rules.clone());
            let expected = naive::find(&rules, &head);
            prop_assert_eq!(table.find(&head).found, expected);
            let told = table.explain(&head);
            let winner = told.iter().find(|(_, outcome)| matches!(outcome, Outcome::Wins | Outcome::Refuses));
            match expected {
                Found::Nothing => prop_assert_eq!(winner, None),
                Found::Rule(index) | Found::Refused(index) => prop_assert_eq!(winner.map(|(found, _)| *found), Some(index)),
            }
            prop_assert_eq!(told.len(), rules.len());
        }
    }
}
