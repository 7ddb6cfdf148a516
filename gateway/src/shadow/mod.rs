//! Copies of requests for a service that does not answer yet, and how its answers compare.

pub mod pointer;
