//! How a ring says "look at this queue".
//!
//! A ring decides by itself whether the other side wants to hear of something (flags, EVENT_IDX); what saying it costs,
//! and which way it goes, is the connector's choice. This trait is all that the two know of each other.

/// Where what marks a key of a scheduler goes instead.
pub trait Route: Send + Sync {
    /// It was marked. Called from any thread with locks held: never blocks, and calls no scheduler.
    fn call(&self);
}

/// One source of notifications. Called by rings after their own suppression, from any thread.
pub trait Notify: Send + Sync {
    /// Say it. Never blocks.
    fn notify(&self);
    /// Since this was made: events signalled, events sent, doorbells rung.
    fn counters(&self) -> [u64; 3];
}
