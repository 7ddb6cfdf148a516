//! The strangler-fig gateway: stands in front of a monolith from the day its replacement begins.

pub mod admin;
pub mod auth;
pub mod body;
pub mod cache;
pub mod claims;
pub mod cli;
pub mod config;
pub mod context;
pub mod error;
pub mod fields;
pub mod http1;
pub mod inbound;
pub mod inventory;
pub mod layers;
pub mod outbound;
pub mod pipeline;
pub mod resilience;
pub mod rollout;
pub mod routing;
pub mod server;
pub mod shadow;
pub mod snapshot;
pub mod telemetry;
pub mod timer;
pub mod upstream;
