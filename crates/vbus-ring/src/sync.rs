//! Atomics that a model checker can stand in for.
//!
//! The lockless code takes its atomics and its full fence from here: in production the standard library's, under
//! `--cfg loom` loom's, so that loom explores the functions that ship and not a copy of them. The full fence takes the
//! place where it stands, so that a model can leave one out and prove that it is needed.

pub use std::sync::atomic::Ordering;

#[cfg(not(loom))]
pub use std::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64};

#[cfg(loom)]
pub use loom::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64};

/// Counters for people. They order nothing, so a model leaves them out: always the standard library's.
pub type Counter = std::sync::atomic::AtomicU64;

/// The places of the event ring's full fences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// Producer: between the queue's state and the look at `taken`.
    Published,
    /// Producer: between the slot and the look at `sleep_seq`.
    Sent,
    /// Consumer: between `taken` and the service of the queues.
    Taken,
    /// Consumer: between `sleep_seq` and the last look at the slots.
    Asleep,
}

#[cfg(loom)]
std::thread_local! {
    static LEFT_OUT: std::cell::Cell<Option<Site>> = const { std::cell::Cell::new(None) };
}

/// Leave out the fences of one place, for models that run on the calling thread.
#[cfg(loom)]
pub fn leave_out(site: Option<Site>) {
    LEFT_OUT.with(|left_out| left_out.set(site));
}

/// A fence that orders earlier stores before later loads, which nothing weaker does.
#[inline(always)]
pub fn full_fence(site: Site) {
    #[cfg(loom)]
    if LEFT_OUT.with(|left_out| left_out.get()) == Some(site) {
        return;
    }
    let _ = site;
    fence(Ordering::SeqCst);
}
