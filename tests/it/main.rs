//! The real executable over real sockets: given a file and origins, when so many requests come, then counts.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod admin;
mod auth;
mod board;
mod breaker;
mod bulkheads;
mod cache;
mod collapse;
mod commands;
mod copies;
mod drain;
mod endpoints;
mod fallback;
mod faults;
mod flips;
mod forwarding;
mod inventory;
mod language;
mod limits;
mod rates;
mod record;
mod regression;
mod reload;
mod retries;
mod rollouts;
mod routing;
mod semantics;
mod shared;
mod streams;
mod strict;
mod telemetry;
mod tls;
mod upstreams;

/// A file with a monolith and services at these urls, and these routes.
fn yaml(upstreams: &[(&str, String)], rest: &str) -> String {
    let upstreams: String = upstreams.iter().map(|(name, url)| format!("  {name}: {{url: \"{url}\"}}\n")).collect();
    format!("upstreams:\n{upstreams}{rest}")
}
