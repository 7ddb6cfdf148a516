//! The engines under a clock that the test sets.

use std::{
    collections::HashSet,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};

use proptest::prelude::*;

use super::{
    balance::{Balance, Candidate, Choice, may_eject},
    breaker::{Breaker, Pass, Settings, State},
    budget::Budget,
    bulkhead::{Bulkhead, Full, Lane},
    gcra::{Limiter, Quota},
    learned::Learned,
    vitals::{Outlier, Vitals},
    window::{Counts, Window},
};

const SETTINGS: Settings =
    Settings { failure_ratio: 5_000, min_requests: 20, window: 10_000, open_for: 5_000, half_open: 3, slow_call: None };

fn breaker() -> Breaker {
    Breaker::new(SETTINGS, 10)
}

fn try_at(breaker: &Breaker, now: u64, succeeds: bool) -> bool {
    match breaker.admit(now) {
        Ok((pass, _)) => {
            breaker.record(now, pass, succeeds);
            true
        }
        Err(_) => false,
    }
}

fn opened_at(now: u64) -> Breaker {
    let breaker = breaker();
    for _ in 0..20 {
        assert!(try_at(&breaker, now, false));
    }
    assert_eq!(breaker.state(), State::Open(now + 5_000));
    breaker
}

fn pass(breaker: &Breaker, now: u64) -> Pass {
    breaker.admit(now).map(|(pass, _)| pass).unwrap()
}

#[test]
fn the_breaker_opens_at_its_ratio_and_not_before_enough_was_seen() {
    let few = breaker();
    for _ in 0..19 {
        assert!(try_at(&few, 1, false));
    }
    assert_eq!(few.state(), State::Closed);
    let half = breaker();
    for n in 0..100 {
        // 49 of 100, the failures last.
        assert!(try_at(&half, 1, n < 51));
    }
    assert_eq!(half.state(), State::Closed);
    assert!(try_at(&half, 1, false) && try_at(&half, 1, false));
    assert_eq!(half.state(), State::Open(5_001));
    assert!(!try_at(&half, 5_000, true));
}

#[test]
fn what_is_older_than_the_window_does_not_count() {
    let breaker = breaker();
    for n in 0..19 {
        assert!(try_at(&breaker, 1 + n, false));
    }
    assert!(try_at(&breaker, 11_000, false));
    assert_eq!((breaker.state(), breaker.counts(11_000)), (State::Closed, (1, 1)));
}

#[test]
fn half_open_lets_through_so_many_and_closes_when_all_succeed() {
    let breaker = opened_at(1);
    assert_eq!(breaker.admit(5_000).map(|_| ()).unwrap_err().retry_after, 1);
    let passes: Vec<Pass> = (0..3).map(|_| pass(&breaker, 5_001)).collect();
    assert!(breaker.admit(5_001).is_err());
    for (n, pass) in passes.into_iter().enumerate() {
        assert_eq!(breaker.state(), State::HalfOpen);
        // A verdict makes no room for a fourth.
        assert!(breaker.admit(5_002).is_err());
        assert_eq!(breaker.record(5_002, pass, true).is_some(), n == 2);
    }
    assert_eq!((breaker.state(), breaker.counts(5_002)), (State::Closed, (0, 0)));
}

#[test]
fn half_open_opens_again_at_the_first_failure_and_late_verdicts_are_ignored() {
    let breaker = breaker();
    let early = pass(&breaker, 1);
    for _ in 0..20 {
        try_at(&breaker, 1, false);
    }
    let (one, two) = (pass(&breaker, 5_001), pass(&breaker, 5_001));
    assert_eq!(breaker.record(5_001, early, false), None);
    assert!(breaker.record(5_002, one, false).is_some());
    assert_eq!(breaker.state(), State::Open(10_002));
    assert_eq!(breaker.record(5_003, two, true), None);
    assert_eq!(breaker.state(), State::Open(10_002));
}

#[test]
fn slow_readers_do_not_keep_it_half_open() {
    let breaker = opened_at(1);
    let mut passes: Vec<Pass> = (0..3).map(|_| pass(&breaker, 5_001)).collect();
    for pass in &mut passes {
        breaker.answer(pass);
    }
    // Their bodies may yet break off; but not for ever.
    assert!(breaker.admit(10_000).is_err());
    assert!(breaker.admit(10_001).is_ok());
    assert_eq!(breaker.state(), State::Closed);
    for pass in passes {
        assert_eq!(breaker.record(10_002, pass, false), None);
    }
    let breaker = opened_at(1);
    let mut passes: Vec<Pass> = (0..3).map(|_| pass(&breaker, 5_001)).collect();
    breaker.answer(&mut passes[0]);
    breaker.answer(&mut passes[1]);
    // One has no answer yet: no matter how long that takes.
    assert!(breaker.admit(1_000_000).is_err());
    let last = passes.pop().unwrap();
    breaker.record(1_000_000, last, true);
    breaker.give_back(&passes[0]);
    assert!(breaker.admit(1_000_000).is_ok());
    assert!(breaker.admit(1_000_000).is_err());
    let broken = passes.pop().unwrap();
    assert!(breaker.record(1_000_000, broken, false).is_some());
}

#[test]
fn a_try_that_came_to_nothing_makes_room_for_another() {
    let breaker = opened_at(1);
    let passes: Vec<Pass> = (0..3).map(|_| pass(&breaker, 5_001)).collect();
    breaker.give_back(&passes[0]);
    let again = pass(&breaker, 5_001);
    assert!(breaker.admit(5_001).is_err());
    for pass in passes.into_iter().skip(1).chain([again]) {
        breaker.record(5_001, pass, true);
    }
    assert_eq!(breaker.state(), State::Closed);
}

proptest! {
    #[test]
    fn a_window_counts_as_a_list_would(steps in prop::collection::vec((0_u64..3_000, any::<bool>()), 1..200)) {
        let window = Window::new(10_000, 10);
        let mut all: Vec<(u64, bool)> = Vec::new();
        let mut now = 1;
        for (step, some) in steps {
            now += step;
            window.add(now, 1, u64::from(some));
            all.push((now, some));
            // Of whole buckets: from nine seconds before this one's beginning.
            let since = (now / 1_000).saturating_sub(9) * 1_000;
            let inside: Vec<bool> = all.iter().filter(|(at, _)| *at >= since).map(|(_, some)| *some).collect();
            let some = inside.iter().filter(|some| **some).count() as u64;
            prop_assert_eq!(window.sum(now), Counts { all: inside.len() as u64, some });
        }
    }

    #[test]
    fn retries_never_exceed_the_budget(steps in prop::collection::vec((0_u64..50, 0_usize..20), 100..400)) {
        let budget = Budget::default();
        let (mut now, mut requests, mut retries) = (1, 0_u64, 0_u64);
        for (step, wanted) in steps {
            now += step;
            budget.deposit(now);
            requests += 1;
            retries += (0..wanted).filter(|_| budget.withdraw(now, 2_000)).count() as u64;
        }
        // Less than the window long, so nothing is forgotten.
        prop_assert!(now > 10_000 || retries <= (requests / 5).max(100));
    }

    #[test]
    fn gcra_lets_through_what_the_rate_allows(steps in prop::collection::vec(0_u64..200_000_000, 1..300)) {
        let limiter = Limiter::new(Quota::new(10, 1, 5), &Arc::default());
        let (mut now, mut allowed) = (0_u64, Vec::new());
        for step in steps {
            now += step;
            let decision = limiter.check("key", now);
            if decision.allowed {
                allowed.push(now);
            }
            // In any span: the burst, and what the rate gives in that span.
            for (n, first) in allowed.iter().enumerate() {
                let count = (allowed.len() - n) as u64;
                let last = allowed.last().copied().unwrap_or(now);
                prop_assert!(count <= 5 + (last - first) / 100_000_000);
            }
        }
    }
}

#[test]
fn a_busy_upstream_has_a_fifth_and_a_quiet_one_ten_a_second() {
    let budget = Budget::default();
    for _ in 0..1_000 {
        budget.deposit(1);
    }
    assert_eq!((0..5_000).filter(|_| budget.withdraw(1, 2_000)).count(), 200);
    // The least rate does not come on top.
    assert!(!budget.withdraw(5_000, 2_000));
    assert!(!Budget::default().withdraw(1, 0), "nothing is nothing");
    let quiet = Budget::default();
    quiet.deposit(1);
    assert_eq!((0..100).filter(|_| quiet.withdraw(1, 2_000)).count(), 10);
    assert_eq!((0..100).filter(|_| quiet.withdraw(1_500, 2_000)).count(), 10);
}

#[test]
fn a_flood_of_keys_keeps_nobody_from_its_own_limit() {
    let limiter = Limiter::new(Quota::new(1, 3600, 3), &Arc::default());
    for _ in 0..3 {
        assert!(limiter.check("steady", 1).allowed);
    }
    for n in 0..1_000_000_u32 {
        limiter.check(&n, 2);
    }
    // Whoever owes most stays known longest: the flood's keys owe a third of what this one does.
    assert!(!limiter.check("steady", 3).allowed);
}

#[test]
fn what_is_left_and_when_it_is_back() {
    let limiter = Limiter::new(Quota::new(60, 60, 2), &Arc::default());
    let seen: Vec<_> = (0..3).map(|_| limiter.check("key", 0)).map(|d| (d.allowed, d.remaining, d.reset)).collect();
    assert_eq!(seen, [(true, 1, 1), (true, 0, 1), (false, 0, 1)]);
    let later = limiter.check("key", 1_000_000_000);
    assert_eq!((later.allowed, later.remaining), (true, 0));
    // A cost that is no whole number of microseconds is met as nearly as nanoseconds can.
    let odd = Limiter::new(Quota::new(600_000, 1, 2), &Arc::default());
    let met = (0..1_000_000_u64).filter(|micros| odd.check("key", micros * 1_000).allowed).count();
    assert!((599_000..601_000).contains(&met), "{met}");
    let even = Limiter::new(Quota::new(1_000_000, 1, 1), &Arc::default());
    assert_eq!((0..1_000_000_u64).filter(|micros| even.check("key", micros * 1_000).allowed).count(), 1_000_000);
    assert!(Limiter::new(Quota::new(1, 3600, u32::MAX), &Arc::default()).check("key", u64::MAX / 4).allowed);
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn the_bulkhead_is_exact_and_the_route_goes_before_the_fallback() {
    let bulkhead = Bulkhead::default();
    bulkhead.set_max(2);
    assert!(bulkhead.try_enter() && bulkhead.try_enter() && !bulkhead.try_enter());
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let mut cx = Context::from_waker(&waker);
    let mut last = pin!(bulkhead.enter(2, Lane::Last).unwrap());
    let mut other_last = pin!(bulkhead.enter(2, Lane::Last).unwrap());
    assert!(last.as_mut().poll(&mut cx).is_pending() && other_last.as_mut().poll(&mut cx).is_pending());
    assert_eq!(bulkhead.enter(2, Lane::Last).map(|_| ()), Err(Full));
    // A place in the queue is made for one that the route sends.
    let mut direct = pin!(bulkhead.enter(2, Lane::Direct).unwrap());
    assert_eq!(other_last.as_mut().poll(&mut cx), Poll::Ready(Err(Full)));
    assert!(direct.as_mut().poll(&mut cx).is_pending());
    assert_eq!(bulkhead.occupancy(), (2, 2));
    bulkhead.leave();
    assert_eq!(woken.0.load(SeqCst), 2);
    assert_eq!(direct.as_mut().poll(&mut cx), Poll::Ready(Ok(())));
    assert!(last.as_mut().poll(&mut cx).is_pending());
    bulkhead.leave();
    assert_eq!(last.as_mut().poll(&mut cx), Poll::Ready(Ok(())));
    assert_eq!(bulkhead.occupancy(), (2, 0));
    bulkhead.leave();
    bulkhead.leave();
    assert_eq!(bulkhead.occupancy(), (0, 0));
}

#[test]
fn whoever_gives_up_takes_nothing_along() {
    let bulkhead = Bulkhead::default();
    bulkhead.set_max(1);
    assert!(bulkhead.try_enter());
    drop(bulkhead.enter(2, Lane::Direct).unwrap());
    assert_eq!(bulkhead.occupancy(), (1, 0));
    // Granted, and not looked at any more.
    let granted = bulkhead.enter(2, Lane::Direct).unwrap();
    bulkhead.leave();
    assert_eq!(bulkhead.occupancy(), (1, 0));
    drop(granted);
    assert_eq!(bulkhead.occupancy(), (0, 0));
    // With a queue of none there is still a place.
    let entering = pin!(bulkhead.enter(0, Lane::Direct).unwrap());
    assert!(Pin::new(&mut { entering }).poll(&mut Context::from_waker(Waker::noop())).is_ready());
    assert!(bulkhead.enter(0, Lane::Direct).is_err());
    // A higher limit lets in who waits.
    let mut waiting = pin!(bulkhead.enter(1, Lane::Last).unwrap());
    assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    bulkhead.set_max(2);
    assert!(waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready());
}

struct Fake {
    id: u64,
    vitals: Vitals,
}

impl Candidate for Fake {
    fn id(&self) -> u64 {
        self.id
    }
    fn vitals(&self) -> &Vitals {
        &self.vitals
    }
    fn hash(&self) -> u64 {
        twox_hash::XxHash3_64::oneshot(&self.id.to_be_bytes())
    }
}

fn fakes(count: u64) -> Vec<Fake> {
    (0..count).map(|id| Fake { id, vitals: Vitals::default() }).collect()
}

fn choice(balance: Balance) -> Choice<'static> {
    Choice { balance, slow_start: 0, now: 1, random: 0, turn: 0, hash: 0, tried: &[], last_resort: false, ejects: true }
}

fn random(n: u64) -> u64 {
    let mixed = (n + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

const OUTLIER: Outlier = Outlier { consecutive: 5, interval: 10_000, base: 30_000, max_ejected: 1_000 };

#[test]
fn the_quicker_of_two_gets_more_and_a_failing_one_little() {
    let all = fakes(3);
    all[0].vitals.observe(1, 1_000);
    all[1].vitals.observe(1, 50_000);
    all[2].vitals.observe(1, 1_000);
    all[2].vitals.fail(1, None);
    let mut counts = [0; 3];
    for n in 0..3_000 {
        counts[Choice { random: random(n), ..choice(Balance::P2c) }.pick(&all).unwrap()] += 1;
    }
    // Two of three draws have the quick one among them; the one that failed once counts eight times.
    assert!(counts[0] > 1_900 && counts[1] < 50 && counts[2] > 900, "{counts:?}");
    all[2].vitals.fail(1, None);
    let pick = |now| {
        (0..3_000).filter(|n| Choice { random: random(*n), now, ..choice(Balance::P2c) }.pick(&all) == Some(2)).count()
    };
    assert_eq!(pick(1), 0, "sixty-four times is slower than the slow one");
    assert!(pick(3_001) > 900, "and is asked again after a while");
}

#[test]
fn one_after_the_other() {
    let all = fakes(3);
    let picked: Vec<_> = (0..6).filter_map(|turn| Choice { turn, ..choice(Balance::RoundRobin) }.pick(&all)).collect();
    assert_eq!(picked, [0, 1, 2, 0, 1, 2]);
}

#[test]
fn a_key_stays_where_it_is_when_another_endpoint_leaves() {
    let all = fakes(5);
    let of = |hash| Choice { hash: random(hash), ..choice(Balance::RingHash) }.pick(&all).unwrap();
    let before: Vec<_> = (0..10_000).map(of).collect();
    for (endpoint, _) in all.iter().enumerate() {
        let share = before.iter().filter(|picked| **picked == endpoint).count();
        assert!((1_700..2_300).contains(&share), "{share} of 10,000 at one of five");
    }
    all[3].vitals.set_down(true, 1);
    for (key, picked) in (0..10_000).map(of).zip(before).filter(|(_, before)| *before != 3) {
        assert_eq!(key, picked);
    }
}

#[test]
fn what_was_tried_or_is_out_comes_last() {
    let all = fakes(3);
    all[0].vitals.set_down(true, 1);
    let pick = |tried: &[u64], last_resort| {
        let picks =
            (0..200).map(|n| Choice { random: random(n), tried, last_resort, ..choice(Balance::P2c) }.pick(&all));
        picks.collect::<HashSet<_>>()
    };
    assert_eq!(pick(&[], false), HashSet::from([Some(1), Some(2)]));
    assert_eq!(pick(&[1], false), HashSet::from([Some(2)]));
    assert_eq!(pick(&[1, 2], false), HashSet::from([Some(1), Some(2)]));
    // What this request has seen fail comes after what was ejected for others' failures.
    all[2].vitals.eject(1, &OUTLIER);
    assert_eq!((pick(&[], false), pick(&[1], false)), (HashSet::from([Some(1)]), HashSet::from([Some(2)])));
    all[1].vitals.set_down(true, 1);
    all[2].vitals.set_down(true, 1);
    assert_eq!(pick(&[], false), HashSet::from([None]));
    assert_eq!(pick(&[], true), HashSet::from([Some(0), Some(1), Some(2)]));
}

#[test]
fn ejection_has_a_cap_grows_and_is_not_believed_of_most() {
    let all = fakes(10);
    for _ in 0..4 {
        assert!(!all[0].vitals.fail(1, Some(&OUTLIER)));
    }
    all[0].vitals.succeed();
    for _ in 0..4 {
        assert!(!all[0].vitals.fail(1, Some(&OUTLIER)));
    }
    assert!(all[0].vitals.fail(1, Some(&OUTLIER)) && may_eject(&all, 1, &OUTLIER));
    assert_eq!((all[0].vitals.eject(1, &OUTLIER), all[0].vitals.eject(1, &OUTLIER)), (Some(30_000), None));
    // A tenth of ten is out already.
    assert!(!may_eject(&all, 1, &OUTLIER) && may_eject(&all, 30_001, &OUTLIER));
    assert!(!may_eject(&fakes(1), 1, &OUTLIER));
    // Right after it is back, the next one is longer; long after, it is forgotten.
    assert_eq!(all[0].vitals.eject(30_002, &OUTLIER), Some(60_000));
    assert_eq!(all[0].vitals.eject(1_000_000, &OUTLIER), Some(30_000));
    for endpoint in &all[1..6] {
        endpoint.vitals.eject(1_000_000, &OUTLIER);
    }
    // Six of ten: more than half.
    let picked: HashSet<_> = (0..500)
        .filter_map(|n| Choice { random: random(n), now: 1_000_001, ..choice(Balance::P2c) }.pick(&all))
        .collect();
    assert_eq!(picked.len(), 10);
}

#[test]
fn a_clock_that_was_read_earlier_forgets_nothing() {
    let vitals = Vitals::default();
    vitals.observe(1_001, 50_000);
    assert_eq!(vitals.load(1_000, 0, &vitals), 50_000);
    vitals.observe(1_000, 1_000);
    assert_eq!(vitals.load(1_001, 0, &vitals), 50_000);
    let window = Window::new(10_000, 10);
    window.add(20_000, 3, 1);
    window.add(9_999, 5, 5);
    window.add(10_000, 5, 5);
    assert_eq!(window.sum(20_000), Counts { all: 3, some: 1 });
}

#[test]
fn clients_that_leave_early_make_nothing_look_quicker() {
    let vitals = Vitals::default();
    vitals.observe(1, 50_000);
    vitals.outlast(200, 1_000);
    assert!(vitals.load(200, 0, &vitals) > 49_000);
    vitals.outlast(200, 90_000);
    assert_eq!(vitals.load(200, 0, &vitals), 90_000);
}

#[test]
fn what_nobody_looks_after_any_more_is_in() {
    let vitals = Vitals::default();
    vitals.set_down(true, 1);
    vitals.eject(1, &OUTLIER);
    vitals.absolve(true, true);
    assert!(!vitals.is_up() && vitals.is_ejected(2));
    vitals.absolve(false, false);
    assert!(vitals.is_up() && !vitals.is_ejected(2));
    vitals.eject(3, &OUTLIER);
    vitals.pardon(4);
    assert!(!vitals.is_ejected(4));
}

#[test]
fn a_newcomer_is_taken_for_as_quick_as_others_and_warms_up() {
    let mut all = fakes(2);
    all[0].vitals.observe(1_000, 5_000);
    all[1].vitals = Vitals::newcomer(1_000);
    let pick = |now| {
        let choice = |n| Choice { random: random(n), now, slow_start: 10_000, ..choice(Balance::P2c) };
        (0..1_000).filter(|n| choice(*n).pick(&all) == Some(1)).count()
    };
    assert_eq!(pick(1_000), 0, "a tenth of the weight is ten times the load");
    assert!((300..700).contains(&pick(20_000)), "{}", pick(20_000));
}

#[test]
fn an_endpoint_that_comes_back_warms_up() {
    let vitals = Vitals::newcomer(1_000);
    assert_eq!(vitals.weight(1_000, 10_000), 100);
    assert_eq!(vitals.weight(6_000, 10_000), 500);
    assert_eq!(vitals.weight(60_000, 10_000), 1_000);
    assert_eq!(vitals.weight(1_000, 0), 1_000);
    assert!(vitals.load(1_000, 10_000, &vitals) > vitals.load(11_000, 10_000, &vitals));
}

#[test]
fn a_peak_is_forgotten_slowly_whatever_the_rate() {
    for step in [1, 10, 1_000] {
        let vitals = Vitals::default();
        vitals.observe(1, 100_000);
        let mut now = 1;
        while now < 7_001 {
            now += step;
            vitals.observe(now, 1_000);
        }
        // About half of it after the half-life.
        let load = vitals.load(now, 0, &vitals);
        assert!((40_000..65_000).contains(&load), "{load} at a step of {step} ms");
    }
}

#[test]
fn an_absence_is_learned_slowly_believed_for_a_while_and_forgotten_at_a_write() {
    let learned = Learned::default();
    let absent = |path, now| learned.is_absent("GET", path, now);
    for n in 0..2 {
        learned.missed("GET", &format!("/orders/{n}/export"), 1);
    }
    assert!(!absent("/orders/9/export", 2));
    learned.missed("GET", "/orders/2/export", 2);
    assert!(
        absent("/orders/9/export", 3) && !absent("/orders/9", 3) && !learned.is_absent("HEAD", "/orders/9/export", 3)
    );
    assert!(!absent("/orders/9/export", 60_002));
    // One more look at the end of that time is enough.
    learned.missed("GET", "/orders/3/export", 60_003);
    assert!(absent("/orders/9/export", 60_004));
    learned.found("GET", "/orders/1/export");
    assert!(!absent("/orders/9/export", 60_005));
    for _ in 0..3 {
        learned.missed("GET", "/a", 1);
    }
    assert!(absent("/a", 2));
    learned.forget();
    assert!(!absent("/a", 2));
}

#[test]
fn what_the_pattern_leaves_open_is_one_of_many() {
    let learned = Learned::new("/users/{name}/**");
    for name in ["ann", "bob", "eve"] {
        learned.missed("GET", &format!("/users/{name}/avatar"), 1);
    }
    assert!(learned.is_absent("GET", "/users/joe/avatar", 2) && !learned.is_absent("GET", "/users/joe/mail", 2));
}

#[test]
fn a_flood_of_paths_is_not_kept() {
    let learned = Learned::default();
    let name = |n: u32| n.to_string().bytes().map(|digit| char::from(digit + 64)).collect::<String>();
    let miss = |n: u32, now| (0..3).for_each(|_| learned.missed("GET", &format!("/{}", name(n)), now));
    (0..10_000).for_each(|n| miss(n, 1));
    let known = (0..10_000).filter(|n| learned.is_absent("GET", &format!("/{}", name(*n)), 2)).count();
    assert_eq!(known, 1_024);
    // Later there is room again.
    miss(9_999, 70_000);
    assert!(learned.is_absent("GET", &format!("/{}", name(9_999)), 70_001));
}
