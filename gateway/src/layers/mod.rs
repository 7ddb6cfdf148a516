//! One tower layer a file, in the order in which they run; `pipeline` says why in that order.
//!
//! `poll_ready` is always ready: the gateway sheds, it never queues there. Layers don't
//! import each other; what they share travels in the request's context.

pub mod admit;
pub mod arm;
pub mod auth;
pub mod breaker;
pub mod cache;
pub mod cors;
pub mod deadline;
pub mod edit;
pub mod fallback;
mod forwarded;
pub mod observe;
pub mod rate_limit;
pub mod recover;
pub mod retry;
pub mod rewrite;
pub mod route;
pub mod sanitize;
pub mod send;
pub mod shadow;

use std::{future::Future, pin::Pin};

use crate::{context::Response, error::Error};

/// The future of a layer that has something left to do when the response comes.
pub type Later<T = Response, E = Error> = Pin<Box<dyn Future<Output = Result<T, E>>>>;

/// The `poll_ready` of every layer.
macro_rules! always_ready {
    () => {
        fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
            std::task::Poll::Ready(Ok(()))
        }
    };
}
use always_ready;
