//! From a request's head to a route and an arm: pure functions, no I/O, no clock.
//!
//! `path` reads a path as widely as any upstream would, `pattern` says which paths
//! a rule takes, `table` finds the most specific rule that holds, `predicate` says
//! what else a rule asks for, `cohort` picks the arm inside a canary.

pub mod cohort;
pub mod key;
#[cfg(any(test, fuzzing))]
pub mod naive;
pub mod path;
pub mod pattern;
pub mod predicate;
pub mod table;
