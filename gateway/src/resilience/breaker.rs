//! The circuit breaker of one upstream, without a lock.
//!
//! The whole state is one word: closed; open until a moment; or half-open, with the
//! tries that are on their way, those that have answered and those that succeeded. Each change of state begins a new generation, and
//! a try's verdict counts only in the generation that let it through: what was sent before
//! it opened says nothing about what comes after.

use std::time::Duration;

use super::{
    sync::atomic::{
        AtomicU64,
        Ordering::{AcqRel, Acquire, Release},
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
    Open {
        until: u64,
    },
    HalfOpen {
        /// Without an answer yet.
        flying: u64,
        /// With a good head, and a body that may yet break off.
        answered: u64,
        succeeded: u64,
    },
}

/// Bits of a count, of which there are three.
const BITS: u32 = 15;
const COUNT: u64 = (1 << BITS) - 1;
/// Bits below the generation.
const LOW: u32 = 46;
const MOMENT: u64 = (1 << LOW) - 1;

impl Word {
    fn read(word: u64) -> Self {
        let generation = u16::try_from((word >> LOW) & 0xFFFF).unwrap_or(0);
        let state = match word >> 62 {
            0 => Held::Closed,
            1 => Held::Open { until: word & MOMENT },
            _ => Held::HalfOpen {
                flying: word & COUNT,
                answered: (word >> BITS) & COUNT,
                succeeded: (word >> (2 * BITS)) & COUNT,
            },
        };
        Self { generation, state }
    }

    fn write(self) -> u64 {
        let (kind, rest) = match self.state {
            Held::Closed => (0, 0),
            Held::Open { until } => (1, until.min(MOMENT)),
            Held::HalfOpen { flying, answered, succeeded } => (2, succeeded << (2 * BITS) | answered << BITS | flying),
        };
        kind << 62 | u64::from(self.generation) << LOW | rest
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
    /// Whether its head was there, and good.
    answered: bool,
}

impl Pass {
    /// The counts without this one.
    fn leave(&self, flying: u64, answered: u64) -> (u64, u64) {
        if self.answered { (flying, answered.saturating_sub(1)) } else { (flying.saturating_sub(1), answered) }
    }
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
    /// When it last became half-open.
    half_open: AtomicU64,
    window: Window,
    settings: Settings,
}

/// Half a second is the least that a refused client is told to wait where nobody knows better.
const SOON: u64 = 500;

impl Breaker {
    /// A closed one, whose window has so many buckets.
    pub fn new(settings: Settings, buckets: u64) -> Self {
        let closed = Word { generation: 0, state: Held::Closed };
        Self {
            word: AtomicU64::new(closed.write()),
            half_open: AtomicU64::new(0),
            window: Window::new(settings.window, buckets),
            settings,
        }
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

    /// Whether it lets everything through.
    pub fn is_closed(&self) -> bool {
        matches!(Word::read(self.word.load(Acquire)).state, Held::Closed)
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
            let pass = |word: Word| Pass { generation: word.generation, answered: false };
            let (next, change) = match word.state {
                Held::Closed => return Ok((pass(word), None)),
                Held::Open { until } if now < until => return Err(Refused { retry_after: until - now }),
                Held::Open { until } => {
                    self.half_open.store(now, Release);
                    let change = Change { from: State::Open(until), to: State::HalfOpen };
                    (word.next(Held::HalfOpen { flying: 1, answered: 0, succeeded: 0 }), Some(change))
                }
                Held::HalfOpen { flying, answered, succeeded }
                    if flying + answered + succeeded < self.settings.half_open =>
                {
                    (Word { state: Held::HalfOpen { flying: flying + 1, answered, succeeded }, ..word }, None)
                }
                // All have answered, and only slow readers keep the last of it from being known.
                Held::HalfOpen { flying: 0, .. } if now >= self.half_open.load(Acquire) + self.settings.open_for => {
                    self.window.clear();
                    (word.next(Held::Closed), Some(Change { from: State::HalfOpen, to: State::Closed }))
                }
                Held::HalfOpen { .. } => return Err(Refused { retry_after: SOON }),
            };
            match self.word.compare_exchange_weak(seen, next.write(), AcqRel, Acquire) {
                Ok(_) => return Ok((pass(next), change)),
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
                Held::HalfOpen { flying, answered, succeeded } => {
                    let (flying, answered) = pass.leave(flying, answered);
                    let state = Held::HalfOpen { flying, answered, succeeded: succeeded + 1 };
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

    /// A try's head was there, and good; its body may yet break off.
    pub fn answer(&self, pass: &mut Pass) {
        let moved = self.change(pass, |flying, answered| (flying.saturating_sub(1), answered + 1));
        pass.answered = moved;
    }

    /// A try that came to nothing says nothing; its place is free again.
    pub fn give_back(&self, pass: &Pass) {
        self.change(pass, |flying, answered| pass.leave(flying, answered));
    }

    /// Changes the counts of those on their way, if they are this one's.
    fn change(&self, pass: &Pass, to: impl Fn(u64, u64) -> (u64, u64)) -> bool {
        let mut seen = self.word.load(Acquire);
        loop {
            let word = Word::read(seen);
            let Held::HalfOpen { flying, answered, succeeded } = word.state else { return false };
            if word.generation != pass.generation {
                return false;
            }
            let (flying, answered) = to(flying, answered);
            let state = Held::HalfOpen { flying, answered, succeeded };
            match self.word.compare_exchange_weak(seen, Word { state, ..word }.write(), AcqRel, Acquire) {
                Ok(_) => return true,
                Err(now) => seen = now,
            }
        }
    }

    fn is_too_much(&self, now: u64) -> bool {
        let counts = self.window.sum(now);
        counts.all >= self.settings.min_requests && counts.some * 10_000 >= counts.all * self.settings.failure_ratio
    }
}
