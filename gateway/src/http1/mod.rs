//! HTTP/1.1 on the wire (RFC 9112): bytes in, messages out, and back. No sockets, no tasks, no time.
//!
//! One parser reads each message, strictly, and what goes on is written anew from what
//! it understood: there are no two readings of one byte (`docs/decisions/0004-own-http1.md`).
//! What is not exactly as the grammar has it is refused; nothing is repaired.

pub mod body;
pub mod head;
pub mod outbox;
pub mod write;

use std::cell::RefCell;

/// What is read at a time before it is known how much is coming.
pub const READ: usize = 16 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into_boxed_slice());
}

/// Lends this thread's read buffer, so that a connection that waits needs none of its own.
pub fn with_scratch<T>(read: impl FnOnce(&mut [u8]) -> T) -> T {
    SCRATCH.with_borrow_mut(|scratch| read(scratch))
}
