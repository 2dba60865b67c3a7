//! Virtqueues (virtio 1.x, section 2.6): what every layout of a ring has in common is the chain it carries.
//!
//! The device side turns what a driver made available into `Chain`s: read once, checked, translated. The driver side
//! turns buffers into descriptors. Both decide by themselves when the other side is to be notified, and say so by their
//! return value; a caller that is told to notify does so after it has let go of its locks.
//!
//! Ring memory is shared with a side that is not trusted. Both sides keep everything they need to know in private
//! memory and read of the shared one only what the other side alone can know.

mod chain;
pub mod split;

pub use chain::Chain;

/// Largest size of a split ring (section 2.7).
pub const MAX_SIZE: u32 = 32768;
