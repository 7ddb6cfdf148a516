//! What the gateway says about itself: metrics, the access log, its own log.

pub mod access_log;
pub mod log;
pub mod metrics;
pub mod trace;
