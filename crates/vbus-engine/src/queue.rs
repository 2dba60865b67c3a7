//! The device's side of a ring, shared by whoever starts, pauses and stops it and whoever serves it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vbus_ring::ring::{Burst, Chain, DeviceRing};
use vbus_ring::signal::Notify;
use vbus_ring::violation::Violation;

/// A ring that runs, and how its driver is notified.
pub struct Running {
    /// The ring.
    pub ring: DeviceRing,
    /// To be called without the lock.
    pub signal: Arc<dyn Notify>,
    /// Taken by an engine that serves no more: the device model's next.
    pub(crate) left: VecDeque<Chain>,
    /// Taken by a turn of the device model that made room before it came to them, from the first of them on.
    put_off: Option<(Arc<Burst>, usize)>,
}

impl Running {
    /// A ring from which nothing was taken.
    pub fn new(ring: DeviceRing, signal: Arc<dyn Notify>) -> Self {
        Self { ring, signal, left: VecDeque::new(), put_off: None }
    }
}

/// What a turn of the device model begins with; `run`: which run of the queue it is of.
pub enum Begun {
    /// There is nothing to do. The burst is given back, for its allocations.
    Nothing(Burst),
    /// Just taken off the ring.
    Fresh {
        /// All of them.
        burst: Burst,
        /// Their run.
        run: u64,
    },
    /// Put off by an earlier turn.
    Again {
        /// Some of them were handled then.
        burst: Arc<Burst>,
        /// Those were before this one.
        first: usize,
        /// Their run.
        run: u64,
    },
}

/// A device's queue.
///
/// Its lock is held shortly, except by an engine, which holds it for a batch: whoever stops the queue knows then that
/// the engine touches none of its memory any more.
#[derive(Default)]
pub struct Queue {
    running: Mutex<Option<Running>>,
    /// How many wait for the lock, beside an engine.
    waiting: AtomicU32,
    run: AtomicU64,
    paused: AtomicBool,
    draining: AtomicBool,
    native: AtomicBool,
    /// Requests completed.
    pub completed: AtomicU64,
    /// Bytes that were the device's to read in those.
    pub bytes_readable: AtomicU64,
    /// Bytes that it wrote.
    pub bytes_written: AtomicU64,
}

impl Queue {
    /// The ring, when the queue runs.
    pub fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        match self.running.try_lock() {
            Ok(running) => return running,
            // Every change under the lock is complete before anything can panic.
            Err(TryLockError::Poisoned(error)) => return error.into_inner(),
            Err(TryLockError::WouldBlock) => (),
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        running
    }

    /// As `lock`, for an engine, which comes again and again: others go first.
    #[inline]
    pub fn serve(&self) -> MutexGuard<'_, Option<Running>> {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begin another run, or none.
    pub fn replace(&self, running: Option<Running>) {
        let old = {
            let mut current = self.lock();
            self.run.fetch_add(1, Ordering::Relaxed);
            std::mem::replace(&mut *current, running)
        };
        // Outside the lock: it may be the last user of its memory, and unmapping takes time.
        drop(old);
    }

    /// Something is wrong with the run that there is: it gives nothing any more, until it is replaced. Which run it is.
    pub fn fail(&self) -> u64 {
        let (old, run) = {
            let mut current = self.lock();
            (current.take(), self.run())
        };
        drop(old);
        run
    }

    /// Counts starts and stops: a request of another run is nobody's any more. It changes under the lock.
    pub fn run(&self) -> u64 {
        self.run.load(Ordering::Relaxed)
    }

    /// Take up to `limit` chains, first of those that an engine left, and which run they are of.
    pub fn take(&self, limit: usize, chains: &mut Vec<Chain>) -> Result<u64, Violation> {
        // The run is read under the lock: who stops the queue meanwhile ends the run that these are of.
        let mut current = self.lock();
        if let Some(Running { ring, left, .. }) = current.as_mut() {
            chains.extend(left.drain(..limit.min(left.len())));
            if chains.is_empty() {
                ring.take(limit, chains)?;
            }
        }
        Ok(self.run())
    }

    /// Those that wait for a turn, in their order; when there are none, up to `limit` from the ring, which go into
    /// `burst`. None when there are none at all; then, if `ask`, notifications are asked for.
    pub fn begin(&self, limit: usize, mut burst: Burst, ask: bool) -> Result<Begun, Violation> {
        burst.clear();
        let mut current = self.lock();
        let run = self.run();
        let Some(running) = current.as_mut() else { return Ok(Begun::Nothing(burst)) };
        if let Some((burst, first)) = running.put_off.take() {
            return Ok(Begun::Again { burst, first, run });
        }
        running.ring.burst(limit, &mut burst, ask)?;
        Ok(if burst.is_empty() { Begun::Nothing(burst) } else { Begun::Fresh { burst, run } })
    }

    /// Chains of this run, from `first` on, wait for another turn, before all others.
    pub fn put_off(&self, run: u64, burst: Arc<Burst>, first: usize) {
        let mut current = self.lock();
        if self.run() == run {
            if let Some(running) = current.as_mut() {
                running.put_off = Some((burst, first));
            }
        }
    }

    /// Whether an engine has nothing to take off the ring for now.
    #[inline]
    pub fn held(&self) -> bool {
        self.paused() || self.draining() || !self.native.load(Ordering::Acquire)
    }

    /// Whether an engine serves it.
    pub fn native(&self) -> bool {
        self.native.load(Ordering::Acquire)
    }

    /// Have it served by an engine, or not.
    pub fn set_native(&self, native: bool) {
        self.native.store(native, Ordering::Release);
    }

    /// Whether its driver has it paused.
    pub fn paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Pause it, or let it go on.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Release);
    }

    /// Whether its device is about to leave.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Let requests under way end, and take no more.
    pub fn drain(&self, draining: bool) {
        self.draining.store(draining, Ordering::Release);
    }

    /// Requests were completed. With the lock held: nobody else counts.
    #[inline]
    pub fn count(&self, completed: u64, readable: u64, written: u64) {
        let add = |counter: &AtomicU64, more| counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        add(&self.completed, completed);
        add(&self.bytes_readable, readable);
        add(&self.bytes_written, written);
    }
}
