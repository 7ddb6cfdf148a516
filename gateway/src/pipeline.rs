//! The whole stack on one screen, outermost first.
//!
//! Each layer is one file under `layers/`; what a route does not use costs a branch.

use std::convert::Infallible;

use http::Response;
use tower::{Service, ServiceBuilder, layer::layer_fn};

use crate::{
    context::Request,
    layers::{
        admit::Admit,
        arm::PickArm,
        auth::Authenticate,
        breaker::Break,
        cache::Remember,
        cors::AllowOrigins,
        deadline::Deadline,
        edit::Edit,
        fallback::Fallback,
        observe::{Observe, Observed},
        rate_limit::LimitRate,
        recover::Recover,
        retry::Retry,
        rewrite::Translate,
        route::FindRoute,
        sanitize::Sanitize,
        send::Send,
        shadow::Copy,
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
        // Before any work: what the gateway has no room for costs it little.
        .layer(layer_fn(Admit::new))
        // Router and upstream must see the same path and fields, and only what the client may say.
        .layer(layer_fn(Sanitize::new))
        // What a page may be told, refusals too; a preflight asks about another request's route.
        .layer(layer_fn(AllowOrigins::new))
        // One snapshot a request; matches without claims. Answers 405, 410 and 413 itself.
        .layer(layer_fn(FindRoute::new))
        // Covers the wait for a connection and every try; never a tunnel after its 101.
        .layer(layer_fn(Deadline::new))
        // A cheap shield before what is dear.
        .layer(layer_fn(LimitRate::new))
        // Before anything that is somebody's: signatures are dear, a stored answer may be private.
        .layer(layer_fn(Authenticate::new))
        // Needs to know who asks.
        .layer(layer_fn(LimitRate::by_claim))
        // Who answers must be known before anything depends on it.
        .layer(layer_fn(PickArm::new))
        // Whoever answers, the route's edits hold.
        .layer(layer_fn(Edit::new))
        // What is kept is one arm's, and what the monolith says in the service's place is the monolith's.
        .layer(layer_fn(Remember::new))
        // Once its client has the answer: copies of what the monolith was asked, for the service.
        .layer(layer_fn(Copy::new))
        // After the retries are spent or the breaker is open: the original request, to the monolith.
        .layer(layer_fn(Fallback::new))
        // Inside of the fallback, or the monolith would get the service's path.
        .layer(layer_fn(Translate::new))
        // Each try on another endpoint, within its own limit; none once a head went on.
        .layer(layer_fn(Retry::new))
        // Each try counts; an open breaker is final.
        .layer(layer_fn(Break::new))
        // Balance and pool: a connection that died before the request was sent is replaced silently.
        .service(Send)
}
