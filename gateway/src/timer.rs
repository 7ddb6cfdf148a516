//! Time limits for many waits at little cost: one coarse ticker a worker.
//!
//! A wait registers only when it is first pending and costs a slot in a slab; a task
//! wakes the expired ones together, once a tick. So a limit fires up to a tick late,
//! never early. While nothing is due, nothing ticks.

use std::{
    cell::{Cell, RefCell},
    future::Future,
    pin::Pin,
    rc::{Rc, Weak},
    task::{Context, Poll, Waker},
    time::Duration,
};

use slab::Slab;
use tokio::{sync::Notify, time::Instant};

/// How late a limit may fire.
pub const TICK: Duration = Duration::from_millis(20);

/// A deadline that nobody waits for.
const FAR: Duration = Duration::from_hours(24);

/// A worker's ticker.
#[derive(Clone)]
pub struct Timer(Rc<Inner>);

struct Inner {
    waits: RefCell<Slab<Wait>>,
    /// No wait ends before this; nothing where none has one to wait for.
    next: Cell<Option<Instant>>,
    sooner: Notify,
}

struct Wait {
    /// Nothing once it has passed: whoever is woken arms it again.
    deadline: Option<Instant>,
    waker: Waker,
}

impl Inner {
    fn hear_of(&self, deadline: Instant) {
        if self.next.get().is_none_or(|next| deadline < next) {
            self.next.set(Some(deadline));
            self.sooner.notify_one();
        }
    }
}

impl Timer {
    /// Starts the ticker on this worker's runtime.
    pub fn start() -> Self {
        let inner = Rc::new(Inner { waits: RefCell::new(Slab::new()), next: Cell::new(None), sooner: Notify::new() });
        tokio::task::spawn_local(tick(Rc::downgrade(&inner)));
        Self(inner)
    }

    /// Wakes every wait, for whoever else has something to look at.
    pub fn wake_all(&self) {
        let wakers: Vec<Waker> = self.0.waits.borrow().iter().map(|(_, wait)| wait.waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// An alarm that is not set yet.
    pub fn alarm(&self) -> Alarm {
        Alarm { timer: self.clone(), slot: None }
    }

    /// A wait until then; nothing is registered before it is polled.
    pub fn sleep_until(&self, deadline: Instant) -> Sleep {
        Sleep { alarm: self.alarm(), deadline }
    }

    /// A wait; nothing is registered before it is polled.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        let now = Instant::now();
        // What has no end in sight need not have one: the clock's own limits are not asked for.
        Sleep { alarm: self.alarm(), deadline: now.checked_add(duration).unwrap_or(now + FAR) }
    }
}

/// Wakes what has expired, until the timer is gone.
async fn tick(inner: Weak<Inner>) {
    let mut expired = Vec::new();
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let next = strong.next.get();
        let now = Instant::now();
        match next {
            // Waits are looked at together, once a tick.
            Some(next) if next <= now => drop(strong),
            Some(next) => {
                tokio::select! {
                    () = tokio::time::sleep_until(next.max(now + TICK)) => {}
                    () = strong.sooner.notified() => continue,
                }
            }
            None => {
                strong.sooner.notified().await;
                continue;
            }
        }
        let Some(strong) = inner.upgrade() else { return };
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for (_, wait) in strong.waits.borrow_mut().iter_mut() {
            match wait.deadline {
                Some(deadline) if deadline <= now => {
                    wait.deadline = None;
                    expired.push(wait.waker.clone());
                }
                Some(deadline) => next = Some(next.map_or(deadline, |next| next.min(deadline))),
                None => {}
            }
        }
        strong.next.set(next);
        drop(strong);
        expired.drain(..).for_each(Waker::wake);
        tokio::time::sleep(TICK).await;
    }
}

/// A deadline that moves: set again and again at the cost of a comparison, for a wait that nearly always ends otherwise.
pub struct Alarm {
    timer: Timer,
    slot: Option<usize>,
}

impl Alarm {
    /// Sees to it that this task is woken when `due` has passed, or before. True where the time may have come: whoever
    /// sets it looks at the clock then.
    pub fn set(&mut self, due: Instant, cx: &Context<'_>) -> bool {
        let inner = &self.timer.0;
        let mut waits = inner.waits.borrow_mut();
        let Some(wait) = self.slot.and_then(|slot| waits.get_mut(slot)) else {
            self.slot = Some(waits.insert(Wait { deadline: Some(due), waker: cx.waker().clone() }));
            inner.hear_of(due);
            return false;
        };
        wait.waker.clone_from(cx.waker());
        let fired = wait.deadline.is_none();
        if wait.deadline.is_none_or(|deadline| deadline > due) {
            wait.deadline = Some(due);
            inner.hear_of(due);
        }
        fired
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.timer.0.waits.borrow_mut().try_remove(slot);
        }
    }
}

/// Resolves once its time has passed.
pub struct Sleep {
    alarm: Alarm,
    deadline: Instant,
}

impl Sleep {
    /// Starts anew.
    pub fn reset(&mut self, duration: Duration) {
        self.deadline = Instant::now() + duration;
        // Where it was waited for with an earlier deadline, it is polled in vain once.
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let due = self.deadline;
        if self.alarm.set(due, cx) && Instant::now() >= due {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paused(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build_local(tokio::runtime::LocalOptions::default())
            .unwrap();
        runtime.block_on(test);
    }

    #[test]
    fn a_wait_is_at_most_a_tick_late_and_never_early() {
        paused(async {
            let timer = Timer::start();
            for millis in [0, 1, 20, 250, 5_000] {
                let start = Instant::now();
                timer.sleep(Duration::from_millis(millis)).await;
                let passed = start.elapsed();
                assert!(passed >= Duration::from_millis(millis), "{passed:?}");
                assert!(passed <= Duration::from_millis(millis) + 2 * TICK, "{passed:?}");
            }
        });
    }

    #[test]
    fn dropped_and_reset_waits() {
        paused(async {
            let timer = Timer::start();
            let start = Instant::now();
            let mut long = Box::pin(timer.sleep(Duration::from_millis(100)));
            {
                let short = timer.sleep(Duration::from_millis(50));
                tokio::select! { () = &mut long => panic!("too early"), () = short => {} }
            }
            long.as_mut().get_mut().reset(Duration::from_millis(200));
            long.await;
            assert!(start.elapsed() >= Duration::from_millis(250));
            assert!(timer.0.waits.borrow().is_empty());
        });
    }
}
