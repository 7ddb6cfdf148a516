//! The whole stack on one screen, outermost first.
//!
//! Each layer is one file under `layers/`; what a route does not use costs a branch.

use std::convert::Infallible;

use http::Response;
use tower::{Service, ServiceBuilder, layer::layer_fn};

use crate::{
    context::Request,
    layers::{
        arm::PickArm,
        attempt::Attempt,
        deadline::Deadline,
        observe::{Observe, Observed},
        recover::Recover,
        rewrite::Translate,
        route::FindRoute,
        sanitize::Sanitize,
        send::Send,
    },
};

/// The stack that every request goes through.
pub fn pipeline()
-> impl Service<Request, Response = Response<Observed>, Error = Infallible, Future: Unpin + 'static> + Clone {
    ServiceBuilder::new()
        // Sees every outcome, refusals and panics too; ends when the response's body ends.
        .layer(layer_fn(Observe::new))
        // A bug is a counted 500, not a dropped connection. Below here errors are errors.
        .layer(layer_fn(Recover::new))
        // Router and upstream must see the same path and fields, and only what the client may say.
        .layer(layer_fn(Sanitize::new))
        // One snapshot a request; matches without claims. Answers 405, 410 and 413 itself.
        .layer(layer_fn(FindRoute::new))
        // Covers the wait for a connection and every try; never a tunnel after its 101.
        .layer(layer_fn(Deadline::new))
        // Who answers must be known before anything depends on it.
        .layer(layer_fn(PickArm::new))
        // Below the arm, or the monolith would get the service's path.
        .layer(layer_fn(Translate::new))
        // The limit of one try.
        .layer(layer_fn(Attempt::new))
        // The pool: a connection that died before the request was sent is replaced silently.
        .service(Send)
}
