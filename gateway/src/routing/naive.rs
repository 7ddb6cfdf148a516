//! The oracle: a linear search that compares rules in pairs, straight from the language's text.
//!
//! Shares no code with the table but the types, the predicates and their rank.

use super::{
    pattern::{Part, segments},
    predicate::Head,
    table::{Found, HostPattern, Rule},
};

/// How specific the best of a rule's hosts that takes this one is; `None` where none does.
fn host_rank(rule: &Rule, host: &[u8]) -> Option<(u8, usize)> {
    rule.host_patterns()
        .filter_map(|pattern| match pattern {
            HostPattern::Exact(name) => (**name == *host).then_some((2, name.len())),
            HostPattern::Below(suffix) => {
                (host.ends_with(suffix) && host.len() > suffix.len()).then_some((1, suffix.len()))
            }
            HostPattern::Any => Some((0, 0)),
        })
        .max()
}

/// Per segment 3 for a literal, 2 for a parameter, 1 for the rest, and 2 for an end where the other goes on with `**`.
fn path_rank(rule: &Rule, key: &[u8]) -> Option<Vec<u8>> {
    let mut path = segments(key);
    let mut rank = Vec::new();
    for part in rule.pattern.parts() {
        match part {
            Part::Rest => {
                rank.push(1);
                return Some(rank);
            }
            Part::Param => rank.push(path.next().map(|_| 2)?),
            Part::Literal(literal) => rank.push(path.next().filter(|segment| **segment == **literal).map(|_| 3)?),
        }
    }
    rank.push(2);
    path.next().is_none().then_some(rank)
}

/// The answer, by trying everything.
pub fn find(rules: &[Rule], head: &Head<'_>) -> Found {
    let mut candidates: Vec<_> = rules
        .iter()
        .enumerate()
        .filter_map(|(index, rule)| {
            // A rule whose several hosts take the request is tried once for each: the best counts.
            let host = host_rank(rule, head.host)?;
            Some(((host, path_rank(rule, head.key)?), index))
        })
        .collect();
    candidates.sort_by(|a, b| b.0.cmp(&a.0));
    for group in candidates.chunk_by(|a, b| a.0 == b.0) {
        let mut holding: Vec<_> =
            group.iter().filter(|(_, index)| rules[*index].predicates.check(head).is_ok()).collect();
        holding.sort_by_key(|(_, index)| rules[*index].predicates.rank(rules[*index].priority));
        if let Some((_, index)) = holding.first() {
            return Found::Rule(*index);
        }
        let mut terminal: Vec<_> = group.iter().filter(|(_, index)| rules[*index].terminal).collect();
        terminal.sort_by_key(|(_, index)| rules[*index].predicates.rank(rules[*index].priority));
        if let Some((_, index)) = terminal.first() {
            return Found::Refused(*index);
        }
    }
    Found::Nothing
}

/// Drops rules that tie with an earlier one, as the checks would refuse them, and repeated hosts.
pub fn without_ties(rules: Vec<Rule>) -> Vec<Rule> {
    let mut kept: Vec<Rule> = Vec::new();
    for rule in rules {
        let ties = kept.iter().any(|other| {
            other.pattern == rule.pattern
                && other.host_patterns().any(|host| rule.host_patterns().any(|theirs| host == theirs))
                && other.predicates.rank(other.priority).cmp(&rule.predicates.rank(rule.priority)).is_eq()
        });
        if !ties {
            kept.push(rule);
        }
    }
    kept
}
