//! Time limits for many waits at little cost: one coarse ticker a worker.
//!
//! A wait registers only when it is first pending and costs a slot in a slab; a task
//! wakes the expired ones every tick. So a limit fires up to one tick late, never
//! early. While nothing waits, nothing ticks.

use std::{
    cell::RefCell,
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
    first: Notify,
}

struct Wait {
    deadline: Instant,
    waker: Waker,
}

impl Timer {
    /// Starts the ticker on this worker's runtime.
    pub fn start() -> Self {
        let inner = Rc::new(Inner { waits: RefCell::new(Slab::new()), first: Notify::new() });
        tokio::task::spawn_local(tick(Rc::downgrade(&inner)));
        Self(inner)
    }

    /// Wakes every wait, for whoever else has something to look at.
    pub fn wake_all(&self) {
        let wakers: Vec<Waker> = self.0.waits.borrow().iter().map(|(_, wait)| wait.waker.clone()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// A wait; nothing is registered before it is polled.
    pub fn sleep(&self, duration: Duration) -> Sleep {
        Sleep { timer: self.clone(), deadline: Instant::now() + duration, slot: None }
    }
}

/// Wakes what has expired, until the timer is gone.
async fn tick(inner: Weak<Inner>) {
    let mut expired = Vec::new();
    loop {
        let Some(strong) = inner.upgrade() else { return };
        if strong.waits.borrow().is_empty() {
            strong.first.notified().await;
        }
        drop(strong);
        tokio::time::sleep(TICK).await;
        let Some(strong) = inner.upgrade() else { return };
        let now = Instant::now();
        for (_, wait) in strong.waits.borrow_mut().iter_mut().filter(|(_, wait)| wait.deadline <= now) {
            // Woken once: whoever is polled asks its own deadline.
            wait.deadline = now + FAR;
            expired.push(wait.waker.clone());
        }
        expired.drain(..).for_each(Waker::wake);
    }
}

/// Resolves once its time has passed.
pub struct Sleep {
    timer: Timer,
    deadline: Instant,
    slot: Option<usize>,
}

impl Sleep {
    /// Starts anew.
    pub fn reset(&mut self, duration: Duration) {
        self.deadline = Instant::now() + duration;
        let mut waits = self.timer.0.waits.borrow_mut();
        if let Some(wait) = self.slot.and_then(|slot| waits.get_mut(slot)) {
            wait.deadline = self.deadline;
        }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.deadline {
            return Poll::Ready(());
        }
        let deadline = self.deadline;
        let inner = self.timer.0.clone();
        let mut waits = inner.waits.borrow_mut();
        if let Some(wait) = self.slot.and_then(|slot| waits.get_mut(slot)) {
            wait.waker.clone_from(cx.waker());
            wait.deadline = deadline;
        } else {
            if waits.is_empty() {
                inner.first.notify_one();
            }
            self.slot = Some(waits.insert(Wait { deadline, waker: cx.waker().clone() }));
        }
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(slot) = self.slot {
            self.timer.0.waits.borrow_mut().try_remove(slot);
        }
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
