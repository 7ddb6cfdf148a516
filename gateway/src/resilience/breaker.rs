//! The circuit breaker of one upstream, without a lock.
//!
//! The whole state is one word: closed; open until a moment; or half-open, with the
//! tries that are on their way and those that succeeded. Each change of state begins a new generation, and
//! a try's verdict counts only in the generation that let it through: what was sent before
//! it opened says nothing about what comes after.

use std::time::Duration;

use super::{
    sync::atomic::{
        AtomicU64,
        Ordering::{AcqRel, Acquire},
    },
    window::Window,
};

/// When it opens, and how it closes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The share of failures at which it opens, of 10,000.
    pub failure_ratio: u64,
    /// Verdicts in the window before it may.
    pub min_requests: u64,
    /// How far back it looks, in milliseconds.
    pub window: u64,
    /// How long it stays open, in milliseconds.
    pub open_for: u64,
    /// How many tries must then succeed, and may be on their way.
    pub half_open: u64,
    /// A response's head that takes longer is a failure.
    pub slow_call: Option<Duration>,
}

/// What it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It lets everything through.
    Closed,
    /// It lets nothing through before this moment.
    Open(u64),
    /// It lets a few through.
    HalfOpen,
}

impl State {
    /// The word in logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open(_) => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// What the word says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Word {
    generation: u16,
    state: Held,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Closed,
    Open { until: u64 },
    HalfOpen { flying: u64, succeeded: u64 },
}

const LOW: u32 = 23;
const COUNT: u64 = (1 << LOW) - 1;
const MOMENT: u64 = (1 << (2 * LOW)) - 1;

impl Word {
    fn read(word: u64) -> Self {
        let generation = u16::try_from((word >> (2 * LOW)) & 0xFFFF).unwrap_or(0);
        let state = match word >> 62 {
            0 => Held::Closed,
            1 => Held::Open { until: word & MOMENT },
            _ => Held::HalfOpen { flying: word & COUNT, succeeded: (word >> LOW) & COUNT },
        };
        Self { generation, state }
    }

    fn write(self) -> u64 {
        let (kind, rest) = match self.state {
            Held::Closed => (0, 0),
            Held::Open { until } => (1, until.min(MOMENT)),
            Held::HalfOpen { flying, succeeded } => (2, succeeded << LOW | flying),
        };
        kind << 62 | u64::from(self.generation) << (2 * LOW) | rest
    }

    fn next(self, state: Held) -> Self {
        Self { generation: self.generation.wrapping_add(1), state }
    }
}

/// A try that was let through. It wants a verdict, or to be given back.
#[derive(Debug)]
#[must_use]
pub struct Pass {
    generation: u16,
}

/// It does not let this one through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// How long until it may, in milliseconds.
    pub retry_after: u64,
}

/// A change of state, for whoever tells of it. Each is given to one caller only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What it was.
    pub from: State,
    /// What it is.
    pub to: State,
}

/// The breaker.
#[derive(Debug)]
pub struct Breaker {
    word: AtomicU64,
    window: Window,
    settings: Settings,
}

/// Half a second is the least that a refused client is told to wait where nobody knows better.
const SOON: u64 = 500;

impl Breaker {
    /// A closed one, whose window has so many buckets.
    pub fn new(settings: Settings, buckets: u64) -> Self {
        let closed = Word { generation: 0, state: Held::Closed };
        Self { word: AtomicU64::new(closed.write()), window: Window::new(settings.window, buckets), settings }
    }

    /// When it opens.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What it does now.
    pub fn state(&self) -> State {
        match Word::read(self.word.load(Acquire)).state {
            Held::Closed => State::Closed,
            Held::Open { until } => State::Open(until),
            Held::HalfOpen { .. } => State::HalfOpen,
        }
    }

    /// Verdicts in its window: all, and failures.
    pub fn counts(&self, now: u64) -> (u64, u64) {
        let counts = self.window.sum(now);
        (counts.all, counts.some)
    }

    /// Lets a try through, or not.
    pub fn admit(&self, now: u64) -> Result<(Pass, Option<Change>), Refused> {
        let mut seen = self.word.load(Acquire);
        loop {
            let word = Word::read(seen);
            let (next, change) = match word.state {
                Held::Closed => return Ok((Pass { generation: word.generation }, None)),
                Held::Open { until } if now < until => return Err(Refused { retry_after: until - now }),
                Held::Open { until } => {
                    let change = Change { from: State::Open(until), to: State::HalfOpen };
                    (word.next(Held::HalfOpen { flying: 1, succeeded: 0 }), Some(change))
                }
                Held::HalfOpen { flying, succeeded } if flying + succeeded < self.settings.half_open => {
                    (Word { state: Held::HalfOpen { flying: flying + 1, succeeded }, ..word }, None)
                }
                Held::HalfOpen { .. } => return Err(Refused { retry_after: SOON }),
            };
            match self.word.compare_exchange_weak(seen, next.write(), AcqRel, Acquire) {
                Ok(_) => return Ok((Pass { generation: next.generation }, change)),
                Err(now) => seen = now,
            }
        }
    }

    /// A try's verdict.
    #[allow(clippy::needless_pass_by_value, reason = "a pass has one verdict")]
    pub fn record(&self, now: u64, pass: Pass, succeeded: bool) -> Option<Change> {
        let mut seen = self.word.load(Acquire);
        let mut counted = false;
        loop {
            let word = Word::read(seen);
            if word.generation != pass.generation {
                return None;
            }
            let until = now.saturating_add(self.settings.open_for);
            let open = |from| (word.next(Held::Open { until }), Change { from, to: State::Open(until) });
            let (next, change) = match word.state {
                Held::Closed => {
                    if !counted {
                        self.window.add(now, 1, u64::from(!succeeded));
                        counted = true;
                    }
                    if succeeded || !self.is_too_much(now) {
                        return None;
                    }
                    let (next, change) = open(State::Closed);
                    (next, Some(change))
                }
                Held::HalfOpen { .. } if !succeeded => {
                    let (next, change) = open(State::HalfOpen);
                    (next, Some(change))
                }
                Held::HalfOpen { succeeded, .. } if succeeded + 1 >= self.settings.half_open => {
                    // What was counted before it opened is of another time.
                    self.window.clear();
                    (word.next(Held::Closed), Some(Change { from: State::HalfOpen, to: State::Closed }))
                }
                Held::HalfOpen { flying, succeeded } => {
                    let state = Held::HalfOpen { flying: flying.saturating_sub(1), succeeded: succeeded + 1 };
                    (Word { state, ..word }, None)
                }
                // Nothing is let through while it is open, so no pass is of this generation.
                Held::Open { .. } => return None,
            };
            match self.word.compare_exchange_weak(seen, next.write(), AcqRel, Acquire) {
                Ok(_) => return change,
                Err(now) => seen = now,
            }
        }
    }

    /// A try that came to nothing says nothing; its place is free again.
    pub fn give_back(&self, pass: &Pass) {
        let mut seen = self.word.load(Acquire);
        loop {
            let word = Word::read(seen);
            let Held::HalfOpen { flying, succeeded } = word.state else { return };
            if word.generation != pass.generation {
                return;
            }
            let state = Held::HalfOpen { flying: flying.saturating_sub(1), succeeded };
            match self.word.compare_exchange_weak(seen, Word { state, ..word }.write(), AcqRel, Acquire) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    fn is_too_much(&self, now: u64) -> bool {
        let counts = self.window.sum(now);
        counts.all >= self.settings.min_requests && counts.some * 10_000 >= counts.all * self.settings.failure_ratio
    }
}
