//! The harness: the real gateway, origins that remember every byte, clients that repeat nothing.
//!
//! Nothing here sleeps to let something happen: it waits for a condition, and gives up
//! after [`PATIENCE`]. Every port is one that the system chose.
#![allow(clippy::missing_panics_doc, clippy::unwrap_used, clippy::expect_used, reason = "a harness fails by panicking")]

pub mod client;
pub mod dns;
pub mod fault;
pub mod gateway;
pub mod http2;
pub mod load;
pub mod origin;
pub mod redis;
pub mod token;

use std::time::Duration;

pub use client::{Answer, Client, get, raw, send};
pub use dns::Dns;
pub use fault::{Fault, Faulty};
pub use gateway::Gateway;
pub use load::Load;
pub use origin::{Origin, Reply, read_until};

/// How long any wait may take before a test has failed. Long, for slow machines: nothing waits for it to pass.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until something holds.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "waited in vain until {what}");
}

/// A temporary folder that lives as long as its owner.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}
