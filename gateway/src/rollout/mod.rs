//! Rollouts: evidence, verdict, steps, and what is written down of them.

pub mod bounds;
pub mod contest;
pub mod controller;
pub mod evidence;
pub mod journal;
pub mod latency;
pub mod overlay;
pub mod race;
pub mod steps;
pub mod verdict;
pub mod webhook;
