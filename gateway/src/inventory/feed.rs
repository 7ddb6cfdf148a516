//! A worker's end of the inventory: what it noted of its requests goes off in blocks.
//!
//! A request costs a few copies into a buffer of the worker's own. Where the thread that counts does not keep up, blocks
//! are dropped, and their requests counted as such: nothing waits.

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{SyncSender, TrySendError},
    },
};

use jiff::Timestamp;

use super::{
    counts::{Seconds, Seen, seconds},
    tree::Request,
};
use crate::{snapshot::Snapshot, telemetry::metrics::Arm};

/// A block that goes off at once.
const BLOCK: usize = 32 * 1024;
/// What is noted of a path.
const PATH: usize = 512;
/// The bytes of an entry before its path.
const HEAD: usize = 16;

/// What a worker noted.
pub struct Block {
    /// What ran: the entries' routes are indices into it.
    pub snapshot: Arc<Snapshot>,
    /// When it went off.
    pub at: Seconds,
    bytes: Vec<u8>,
}

/// A worker's end.
pub struct Feed {
    notes: RefCell<Option<(Arc<Snapshot>, Vec<u8>)>>,
    sender: SyncSender<super::keeper::Message>,
    dropped: Arc<AtomicU64>,
}

impl Feed {
    /// An end of the channel to the thread that counts, and where what is lost is counted.
    pub fn new(sender: SyncSender<super::keeper::Message>, dropped: Arc<AtomicU64>) -> Self {
        Self { notes: RefCell::default(), sender, dropped }
    }

    /// Notes a request: by the index of its route, and its path in its matched form.
    pub fn note(&self, snapshot: &Arc<Snapshot>, route: usize, path: &[u8], request: &Request) {
        let mut notes = self.notes.borrow_mut();
        if notes.as_ref().is_some_and(|(noted, bytes)| bytes.len() >= BLOCK || !Arc::ptr_eq(noted, snapshot)) {
            self.send(notes.take());
        }
        let (_, bytes) = notes.get_or_insert_with(|| (snapshot.clone(), Vec::with_capacity(BLOCK + HEAD + PATH)));
        let path = &path[..path.len().min(PATH)];
        let Seen { status, aborted, micros, .. } = request.seen;
        let mut head = [0; HEAD];
        #[allow(clippy::cast_possible_truncation, reason = "a path of 512 bytes, an index of a route")]
        {
            head[..2].copy_from_slice(&(path.len() as u16).to_le_bytes());
            head[2..6].copy_from_slice(&(route as u32).to_le_bytes());
            head[6..10].copy_from_slice(&micros.unwrap_or(u32::MAX).to_le_bytes());
            head[10..12].copy_from_slice(&status.to_le_bytes());
            head[12] = request.method;
            head[13] = request.arm as u8;
        }
        head[14] = u8::from(aborted);
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(path);
    }

    /// Sends off what there is.
    pub fn flush(&self) {
        self.send(self.notes.borrow_mut().take());
    }

    fn send(&self, notes: Option<(Arc<Snapshot>, Vec<u8>)>) {
        let Some((snapshot, bytes)) = notes else { return };
        // Blocks are young: when one went off is when its requests ended.
        let block = Block { snapshot, at: seconds(Timestamp::now()), bytes };
        if let Err(TrySendError::Full(super::keeper::Message::Block(block))) =
            self.sender.try_send(super::keeper::Message::Block(block))
        {
            self.dropped.fetch_add(block.requests().count() as u64, Relaxed);
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.flush();
    }
}

impl Block {
    /// Each of its requests, with the index of its route and its path.
    pub fn requests(&self) -> impl Iterator<Item = (usize, &[u8], Request)> {
        let mut rest = &self.bytes[..];
        std::iter::from_fn(move || {
            let (head, after) = rest.split_first_chunk::<HEAD>()?;
            let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
            let length = usize::from(u16::from_le_bytes([head[0], head[1]]));
            let (path, after) = after.split_at_checked(length)?;
            rest = after;
            let seen = Seen {
                status: u16::from_le_bytes([head[10], head[11]]),
                aborted: head[14] == 1,
                micros: Some(number(6)),
                at: self.at,
            };
            // The number of the route is that of its name once it is counted.
            let arm = *Arm::ALL.get(usize::from(head[13]))?;
            Some((number(2) as usize, path, Request { method: head[12], route: 0, arm, seen }))
        })
    }
}
