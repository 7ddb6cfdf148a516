//! The gateway's lock-free engines, compiled with loom's atomics in the place of the system's.
//!
//! loom runs each test under every order in which its threads could run. The sources are the
//! gateway's own files; only `sync` differs.
#![cfg(test)]
#![allow(dead_code, unreachable_pub, reason = "the engines are here for their models")]

#[path = "../../src/resilience/breaker.rs"]
mod breaker;
#[path = "../../src/resilience/bulkhead.rs"]
mod bulkhead;
#[path = "../../src/resilience/window.rs"]
mod window;

mod sync {
    pub(super) use loom::sync::{Mutex, MutexGuard, atomic};
}

use std::sync::Arc;

use loom::thread;

use crate::{
    breaker::{Breaker, Settings, State},
    bulkhead::{Bulkhead, Lane},
    window::Window,
};

fn settings(half_open: u64) -> Settings {
    Settings { failure_ratio: 5_000, min_requests: 2, window: 10, open_for: 10, half_open, slow_call: None }
}

/// An open breaker, whose time is over at 11.
fn open() -> Breaker {
    let breaker = Breaker::new(settings(1), 1);
    for _ in 0..2 {
        if let Ok((pass, _)) = breaker.admit(1) {
            breaker.record(1, pass, false);
        }
    }
    assert_eq!(breaker.state(), State::Open(11));
    breaker
}

/// Two threads do the same; what both came to.
fn both<T: 'static>(work: impl Fn() -> T + Clone + 'static) -> [T; 2] {
    let other = work.clone();
    let thread = thread::spawn(other);
    let one = work();
    [one, thread.join().unwrap_or_else(|_| panic!("a thread panicked"))]
}

#[test]
fn no_count_is_lost_when_a_bucket_begins_anew() {
    loom::model(|| {
        let window = Arc::new(Window::new(10, 1));
        window.add(1, 5, 5);
        let shared = window.clone();
        both(move || shared.add(11, 1, 1));
        assert_eq!(window.sum(11).all, 2);
    });
}

#[test]
fn a_budget_is_never_taken_twice() {
    loom::model(|| {
        let window = Arc::new(Window::new(10, 1));
        window.add(1, 1, 0);
        let shared = window.clone();
        let taken = both(move || shared.add_if(1, |sum, _| sum.some < 1));
        assert_eq!(taken.into_iter().filter(|taken| *taken).count(), 1);
    });
}

#[test]
fn it_opens_once() {
    loom::model(|| {
        let breaker = Arc::new(Breaker::new(settings(1), 1));
        let shared = breaker.clone();
        let changes = both(move || shared.admit(1).ok().and_then(|(pass, _)| shared.record(1, pass, false)));
        assert_eq!(changes.into_iter().flatten().count(), 1);
        assert_eq!(breaker.state(), State::Open(11));
    });
}

#[test]
fn half_open_lets_through_no_more_than_it_says() {
    loom::model(|| {
        let breaker = Arc::new(open());
        let shared = breaker.clone();
        let passes = both(move || shared.admit(11).ok());
        let passes: Vec<_> = passes.into_iter().flatten().collect();
        assert_eq!(passes.len(), 1);
        assert_eq!(passes.iter().filter(|(_, change)| change.is_some()).count(), 1);
    });
}

#[test]
fn a_place_that_is_given_back_is_there_for_another_and_no_third() {
    loom::model(|| {
        let breaker = Arc::new(open());
        let shared = breaker.clone();
        both(move || {
            if let Ok((pass, _)) = shared.admit(11) {
                shared.give_back(&pass);
            }
        });
        assert!(breaker.admit(11).is_ok());
        assert!(breaker.admit(11).is_err());
    });
}

#[test]
fn a_verdict_of_before_changes_nothing_after() {
    loom::model(|| {
        let breaker = Arc::new(Breaker::new(settings(1), 1));
        let Ok((early, _)) = breaker.admit(1) else { panic!("it is closed") };
        for _ in 0..2 {
            if let Ok((pass, _)) = breaker.admit(1) {
                breaker.record(1, pass, false);
            }
        }
        let shared = breaker.clone();
        let thread = thread::spawn(move || shared.admit(11).is_ok());
        breaker.record(11, early, true);
        assert!(thread.join().unwrap_or(false));
        assert_eq!(breaker.state(), State::HalfOpen);
    });
}

#[test]
fn a_place_is_never_given_twice_nor_lost() {
    loom::model(|| {
        let bulkhead = Arc::new(Bulkhead::default());
        bulkhead.set_max(1);
        assert!(bulkhead.try_enter());
        let shared = bulkhead.clone();
        let leaver = thread::spawn(move || shared.leave());
        let entering = bulkhead.enter(1, Lane::Direct).unwrap_or_else(|_| panic!("there is a queue"));
        // Whoever left before is seen at once, whoever leaves later hands the place on, and wakes: or this waits for ever.
        assert_eq!(loom::future::block_on(entering), Ok(()));
        leaver.join().unwrap_or_else(|_| panic!("a thread panicked"));
        assert_eq!(bulkhead.occupancy(), (1, 0));
        bulkhead.leave();
        assert_eq!(bulkhead.occupancy(), (0, 0));
    });
}

#[test]
fn giving_up_while_a_place_is_handed_over_leaves_it_free() {
    loom::model(|| {
        let bulkhead = Arc::new(Bulkhead::default());
        bulkhead.set_max(1);
        assert!(bulkhead.try_enter());
        let shared = bulkhead.clone();
        let leaver = thread::spawn(move || shared.leave());
        if let Ok(entering) = bulkhead.enter(1, Lane::Last) {
            drop(entering);
        }
        leaver.join().unwrap_or_else(|_| panic!("a thread panicked"));
        assert_eq!(bulkhead.occupancy(), (0, 0));
        assert!(bulkhead.try_enter());
    });
}

#[test]
fn an_evicted_one_hears_of_it_and_the_place_goes_to_the_other() {
    loom::model(|| {
        let bulkhead = Arc::new(Bulkhead::default());
        bulkhead.set_max(1);
        assert!(bulkhead.try_enter());
        let shared = bulkhead.clone();
        let last = thread::spawn(move || match shared.enter(1, Lane::Last) {
            Ok(entering) => loom::future::block_on(entering).is_ok(),
            Err(_) => false,
        });
        let direct = bulkhead.enter(1, Lane::Direct);
        bulkhead.leave();
        let entered = match direct {
            Ok(entering) => loom::future::block_on(entering).is_ok(),
            Err(_) => false,
        };
        assert!(entered, "who goes first always finds a place in the queue");
        bulkhead.leave();
        if last.join().unwrap_or_else(|_| panic!("a thread panicked")) {
            bulkhead.leave();
        }
        assert_eq!(bulkhead.occupancy(), (0, 0));
    });
}

#[test]
fn a_higher_limit_is_seen_by_who_begins_to_wait() {
    loom::model(|| {
        let bulkhead = Arc::new(Bulkhead::default());
        bulkhead.set_max(1);
        assert!(bulkhead.try_enter());
        let shared = bulkhead.clone();
        let raiser = thread::spawn(move || shared.set_max(2));
        let entering = bulkhead.enter(1, Lane::Direct).unwrap_or_else(|_| panic!("there is a queue"));
        assert_eq!(loom::future::block_on(entering), Ok(()));
        raiser.join().unwrap_or_else(|_| panic!("a thread panicked"));
        assert_eq!(bulkhead.occupancy(), (2, 0));
    });
}
