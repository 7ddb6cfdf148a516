//! How many requests an upstream has at a time, exactly, over all workers; and who waits.
//!
//! Whoever finds room and nobody waiting goes in by one atomic step. The rest
//! wait in order: those who were sent to the upstream by their route first, those who come
//! in another's place (fallback) last. A full queue drops the last of those to take one of the
//! first.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, PoisonError},
    task::{Context, Poll, Waker},
};

use super::sync::{
    Mutex, MutexGuard,
    atomic::{
        AtomicU8, AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Release},
    },
};

/// Who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Sent here by the route.
    Direct,
    /// In another's place.
    Last,
}

const WAITING: u8 = 0;
const GRANTED: u8 = 1;
const EVICTED: u8 = 2;

#[derive(Debug)]
struct Ticket {
    state: AtomicU8,
    waker: Mutex<Option<Waker>>,
}

impl Ticket {
    fn settle(&self, state: u8) {
        self.state.store(state, Release);
        if let Some(waker) = lock(&self.waker).take() {
            waker.wake();
        }
    }
}

#[derive(Debug, Default)]
struct Queue {
    direct: VecDeque<Arc<Ticket>>,
    last: VecDeque<Arc<Ticket>>,
}

impl Queue {
    fn next(&mut self) -> Option<&mut VecDeque<Arc<Ticket>>> {
        if self.direct.is_empty() {
            Some(&mut self.last).filter(|last| !last.is_empty())
        } else {
            Some(&mut self.direct)
        }
    }

    fn len(&self) -> usize {
        self.direct.len() + self.last.len()
    }
}

/// The places of one upstream.
#[derive(Debug)]
pub struct Bulkhead {
    /// Who waits, and who is in.
    word: AtomicU64,
    /// How many may be in.
    max: AtomicU32,
    queue: Mutex<Queue>,
}

/// The queue is full, or a place in it was needed for somebody who goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

const ONE_WAITING: u64 = 1 << 32;
const INSIDE: u64 = ONE_WAITING - 1;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here panics with the lock in hand.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Bulkhead {
    fn default() -> Self {
        Self { word: AtomicU64::new(0), max: AtomicU32::new(u32::MAX), queue: Mutex::new(Queue::default()) }
    }
}

impl Bulkhead {
    /// How many are in, and how many wait.
    pub fn occupancy(&self) -> (u64, u64) {
        let word = self.word.load(Acquire);
        (word & INSIDE, word >> 32)
    }

    /// Lets in so many from now on; who waits comes in where there is more room.
    pub fn set_max(&self, max: u32) {
        self.max.store(max, Release);
        self.grant(&mut lock(&self.queue));
    }

    /// Goes in, if there is room and nobody waits.
    pub fn try_enter(&self) -> bool {
        let max = u64::from(self.max.load(Acquire));
        let mut seen = self.word.load(Acquire);
        while seen < max {
            match self.word.compare_exchange_weak(seen, seen + 1, AcqRel, Acquire) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Waits for a place among so many others. Resolves to nothing: whoever went in leaves by [`Bulkhead::leave`].
    pub fn enter(&self, pending: u32, lane: Lane) -> Result<Entering<'_>, Full> {
        let ticket = Arc::new(Ticket { state: AtomicU8::new(WAITING), waker: Mutex::new(None) });
        let mut queue = lock(&self.queue);
        if queue.len() >= pending as usize {
            // Somebody may have left since there was no room.
            if self.try_enter() {
                ticket.settle(GRANTED);
                return Ok(Entering { bulkhead: self, ticket, done: false });
            }
            let evicted = if lane == Lane::Direct { queue.last.pop_back() } else { None };
            let Some(evicted) = evicted else { return Err(Full) };
            evicted.settle(EVICTED);
            self.word.fetch_sub(ONE_WAITING, AcqRel);
        }
        match lane {
            Lane::Direct => queue.direct.push_back(ticket.clone()),
            Lane::Last => queue.last.push_back(ticket.clone()),
        }
        self.word.fetch_add(ONE_WAITING, AcqRel);
        // From here on who leaves takes the lock; who left before has made room that is seen now.
        self.grant(&mut queue);
        drop(queue);
        Ok(Entering { bulkhead: self, ticket, done: false })
    }

    /// Leaves; the first who waits comes in.
    pub fn leave(&self) {
        let mut seen = self.word.load(Acquire);
        while seen >> 32 == 0 {
            match self.word.compare_exchange_weak(seen, seen - 1, AcqRel, Acquire) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
        let mut queue = lock(&self.queue);
        self.word.fetch_sub(1, AcqRel);
        self.grant(&mut queue);
    }

    fn grant(&self, queue: &mut Queue) {
        while let Some(lane) = queue.next() {
            let seen = self.word.load(Acquire);
            if seen & INSIDE >= u64::from(self.max.load(Acquire)) {
                return;
            }
            if self.word.compare_exchange(seen, seen + 1 - ONE_WAITING, AcqRel, Acquire).is_ok()
                && let Some(ticket) = lane.pop_front()
            {
                ticket.settle(GRANTED);
            }
        }
    }
}

/// Somebody who waits. Gives up when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct Entering<'a> {
    bulkhead: &'a Bulkhead,
    ticket: Arc<Ticket>,
    done: bool,
}

impl Future for Entering<'_> {
    type Output = Result<(), Full>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        // Under the lock of the waker, so that it is not called between a look and its storing.
        let mut waker = lock(&self.ticket.waker);
        let result = match self.ticket.state.load(Acquire) {
            WAITING => {
                *waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            GRANTED => Ok(()),
            _ => Err(Full),
        };
        drop(waker);
        self.done = true;
        Poll::Ready(result)
    }
}

impl Drop for Entering<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let mut queue = lock(&self.bulkhead.queue);
        match self.ticket.state.load(Acquire) {
            WAITING => {
                let ticket = &self.ticket;
                queue.direct.retain(|waiting| !Arc::ptr_eq(waiting, ticket));
                queue.last.retain(|waiting| !Arc::ptr_eq(waiting, ticket));
                self.bulkhead.word.fetch_sub(ONE_WAITING, AcqRel);
            }
            GRANTED => {
                drop(queue);
                self.bulkhead.leave();
            }
            _ => {}
        }
    }
}
