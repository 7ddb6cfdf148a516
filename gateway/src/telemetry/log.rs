//! The gateway's own log: text on standard error, by `RUST_LOG`, `info` by default.

use std::io;

use tracing_subscriber::EnvFilter;

/// Starts the log. Standard output belongs to the access log.
pub fn start() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A second start, in a test, changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_target(false)
        .try_init();
}
