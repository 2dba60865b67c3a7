//! Driver memory, split and packed rings, event rings and link rings: the parts of vbus that run once per descriptor or
//! per event.

pub mod area;
pub mod dirty;
pub mod doorbell;
pub mod event;
pub mod guard;
pub mod link;
pub mod mem;
pub mod ring;
pub mod schedule;
pub mod signal;
pub mod sync;
pub mod violation;
