//! What the lock-free engines are built on; in `gateway/model` it is loom's.

pub(super) use std::sync::{Mutex, MutexGuard, atomic};
