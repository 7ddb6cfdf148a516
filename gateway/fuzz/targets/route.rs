//! The table of routes against a linear search that compares rules in pairs.
#![no_main]

use arbitrary::Arbitrary;
use gateway::routing::{
    naive,
    pattern::Pattern,
    predicate::{Head, Predicates},
    table::{Found, HostPattern, Outcome, Rule, Table},
};
use http::{HeaderMap, Method};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Segment {
    A,
    B,
    Long,
    Param,
}

impl Segment {
    fn text(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::Long => "abc",
            Self::Param => "{x}",
        }
    }
}

#[derive(Arbitrary, Debug)]
struct AnyRule {
    segments: Vec<Segment>,
    rest: bool,
    hosts: Vec<u8>,
    post: Option<bool>,
    header: Option<bool>,
    query: Option<bool>,
    priority: bool,
    terminal: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    rules: Vec<AnyRule>,
    key: Vec<Segment>,
    host: u8,
    post: bool,
    header: Option<bool>,
    query: Option<bool>,
}

const HOSTS: [&str; 4] = ["h", "x.h", "y.x.h", "z"];

fn flag(value: bool) -> &'static str {
    if value { "1" } else { "2" }
}

fuzz_target!(|input: Input| {
    if input.rules.len() > 24 || input.key.len() > 8 {
        return;
    }
    let rules = input.rules.iter().filter_map(|rule| {
        if rule.segments.len() > 6 || rule.hosts.len() > 3 {
            return None;
        }
        let mut path: String = rule.segments.iter().map(|segment| format!("/{}", segment.text())).collect();
        path.push_str(if rule.rest { "/**" } else { "" });
        let path = if path.is_empty() { "/" } else { &path };
        let host = |byte: &u8| match byte % 6 {
            n @ 0..4 => HostPattern::Exact(HOSTS[usize::from(n)].as_bytes().into()),
            4 => HostPattern::Below((*b".h").into()),
            _ => HostPattern::Below((*b".x.h").into()),
        };
        Some(Rule {
            hosts: rule.hosts.iter().map(host).collect(),
            pattern: Pattern::parse(path, false).ok()?,
            predicates: Predicates {
                methods: rule.post.map(|post| if post { Method::POST } else { Method::GET }).into_iter().collect(),
                headers: rule.header.map(|value| ("h1".parse().unwrap(), flag(value).as_bytes().into())).into_iter().collect(),
                query: rule.query.map(|value| (b"q1"[..].into(), flag(value).as_bytes().into())).into_iter().collect(),
            },
            priority: rule.priority.into(),
            terminal: rule.terminal,
        })
    });
    let rules = naive::without_ties(rules.collect());
    let mut headers = HeaderMap::new();
    if let Some(value) = input.header {
        headers.insert("h1", flag(value).parse().unwrap());
    }
    let query = input.query.map(|value| format!("q1={}", flag(value))).unwrap_or_default();
    let key: Vec<&str> = input.key.iter().map(|segment| segment.text().trim_matches(['{', '}'])).collect();
    let key = key.join("/");
    let method = if input.post { Method::POST } else { Method::GET };
    let host = HOSTS[usize::from(input.host % 4)].as_bytes();
    let head = Head { host, key: key.as_bytes(), method: &method, headers: &headers, query: &query };
    let table = Table::new(rules.clone());
    let expected = naive::find(&rules, &head);
    assert_eq!(table.find(&head).found, expected, "{rules:?} {key}");
    let told = table.explain(&head);
    let winner = told.iter().find(|(_, outcome)| matches!(outcome, Outcome::Wins | Outcome::Refuses));
    match expected {
        Found::Nothing => assert!(winner.is_none()),
        Found::Rule(index) | Found::Refused(index) => assert_eq!(winner.map(|(found, _)| *found), Some(index)),
    }
});
