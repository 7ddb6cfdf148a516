//! From a socket to the pipeline, and everything around it: workers, accepting, reload, drain.
//!
//! One thread a core, each with its own runtime, its connections and its pools, so
//! that a request never crosses threads. One thread accepts for all, one socket a
//! listener: the least busy worker gets the connection, and closing the socket loses nobody who
//! waits on another (`docs/decisions/0001-one-acceptor.md`).

mod acceptor;
mod connection;
mod control;
mod http1;
mod io;
mod sentry;
mod watch;
mod worker;

pub use control::{Control, Options, run};
