//! Virtqueues (virtio 1.x, section 2.6), both sides of both layouts: split (2.7) and packed (2.8).
//!
//! The device side turns what a driver made available into `Chain`s: read once, checked, translated. The driver side
//! turns buffers into descriptors. Both decide by themselves when the other side is to be notified, and say so by their
//! return value; a caller that is told to notify does so after it has let go of its locks.
//!
//! Ring memory is shared with a side that is not trusted. Both sides keep everything they need to know in private
//! memory and read of the shared one only what the other side alone can know.
//!
//! What a side does is written once, generic over the layout, and compiled once for each: `DeviceRing` and `DriverRing`
//! choose between the two at every call, and a call serves a batch.

mod burst;
mod chain;
mod device;
mod driver;
mod indirect;
mod inflight;
pub mod packed;
pub mod split;

use std::sync::Arc;

use crate::area::LayoutError;
use crate::mem::{Mapping, Memory};
use crate::violation::Violation;

pub use burst::{copy_in, copy_out, read_once, read_words, Burst, Piece};
pub use chain::Chain;
pub use device::{Shown, HEAVY, MAX_BUFFERS};
pub use driver::{AddError, INDIRECT_ENTRIES};

/// Bytes that the region takes in which a ring of `size` keeps what is in flight.
pub const fn inflight_bytes(size: u16, packed: bool) -> usize {
    if packed {
        packed::inflight_bytes(size)
    } else {
        split::inflight_bytes(size)
    }
}

/// Largest size of a ring (sections 2.7 and 2.8.10.1).
pub const MAX_SIZE: u32 = 32768;

/// Bytes of a descriptor, in both layouts.
const DESC_BYTES: usize = 16;

/// Flags of a descriptor, in both layouts.
const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

/// What was negotiated of the features that a ring heeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// VIRTIO_F_RING_PACKED: which of the two layouts it is.
    pub packed: bool,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER: buffers are used in the order in which they were made available.
    pub in_order: bool,
}

/// What a driver says about its ring before it is used.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Descriptors: a power of two in a split ring, any number in a packed one.
    pub size: u32,
    /// Driver address of the descriptor table, or of the descriptor ring.
    pub desc: u64,
    /// Driver address of the available ring, or of the driver's event suppression.
    pub driver: u64,
    /// Driver address of the used ring, or of the device's event suppression.
    pub device: u64,
    /// What was negotiated.
    pub features: Features,
    /// Where to go on in a ring that was in use before, as `DeviceRing::next` says it. None: a new ring. A tracked ring
    /// knows better.
    pub resume: Option<u32>,
}

/// The device side of a running ring, of either layout: see `split::DeviceRing`, whose methods these are.
pub enum DeviceRing {
    /// Section 2.7.
    Split(split::DeviceRing),
    /// Section 2.8.
    Packed(packed::DeviceRing),
}

macro_rules! either {
    ($ring:ident, $inner:ident => $call:expr) => {
        match $ring {
            Self::Split($inner) => $call,
            Self::Packed($inner) => $call,
        }
    };
}

impl DeviceRing {
    /// Start at the beginning, or go on, with notifications on.
    ///
    /// Violation: queue-size, ring-position, ring-misaligned, ring-outside-memory, region-lost, log-too-small.
    pub fn new(memory: Arc<Memory>, max_size: u32, setup: Setup) -> Result<Self, Violation> {
        Ok(if setup.features.packed {
            Self::Packed(packed::DeviceRing::new(memory, max_size, setup)?)
        } else {
            Self::Split(split::DeviceRing::new(memory, max_size, setup)?)
        })
    }

    /// As `new`, with the region at `offset` of a writable mapping in which what is in flight is kept for whoever serves
    /// the ring after this one.
    ///
    /// Violation: as `new`; inflight-*.
    pub fn tracked(
        memory: Arc<Memory>,
        max_size: u32,
        setup: Setup,
        mapping: &Arc<Mapping>,
        offset: u64,
    ) -> Result<Self, Violation> {
        Ok(if setup.features.packed {
            Self::Packed(packed::DeviceRing::tracked(memory, max_size, setup, mapping, offset)?)
        } else {
            Self::Split(split::DeviceRing::tracked(memory, max_size, setup, mapping, offset)?)
        })
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// Where another could go on, once nothing is in flight.
    pub fn next(&self) -> u32 {
        either!(self, ring => ring.next())
    }

    /// Where another could go on such that it is given again what is in flight; None when there is no such place.
    pub fn unused(&self) -> Option<u32> {
        either!(self, ring => ring.unused())
    }

    /// Chains taken and not shown as used.
    pub fn in_flight(&self) -> usize {
        either!(self, ring => ring.in_flight())
    }

    /// Append the next chains, at most `limit`, to `chains`; ask for notifications when there are none.
    pub fn take(&mut self, limit: usize, chains: &mut Vec<Chain>) -> Result<(), Violation> {
        either!(self, ring => ring.take(limit, chains))
    }

    /// As `take`, for whoever comes again by itself: notifications are not asked for.
    pub fn poll(&mut self, limit: usize, chains: &mut Vec<Chain>) -> Result<(), Violation> {
        either!(self, ring => ring.poll(limit, chains))
    }

    /// As `take` or, unless `ask`, `poll`, for whoever is done with the chains soon. Fewer than there are come when they
    /// weigh `HEAVY` together.
    pub fn burst(&mut self, limit: usize, burst: &mut Burst, ask: bool) -> Result<(), Violation> {
        either!(self, ring => ring.burst(limit, burst, ask))
    }

    /// As `complete_chains`, for the chains of a burst from `first` on, as many as there are numbers of bytes written.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete_burst(&mut self, burst: &Burst, first: usize, written: &[u32]) -> Result<bool, Violation> {
        either!(self, ring => ring.complete_burst(burst, first, written))
    }

    /// The first half of `complete_burst`: for whoever has chains of several rings to give back, and does so at the price of
    /// one full fence, which comes behind this, and before `say_burst` of the same chains. (A fence waits until all stores
    /// before it are seen, by a processor that may have their lines.)
    #[inline]
    pub fn show_burst(&mut self, burst: &Burst, first: usize, written: &[u32]) -> Result<Shown, Violation> {
        either!(self, ring => ring.show_burst(burst, first, written))
    }

    /// The second half of `complete_burst`: true when the driver is to be notified.
    #[inline]
    pub fn say_burst(&mut self, shown: Shown, burst: &Burst, first: usize, written: &[u32]) -> Result<bool, Violation> {
        either!(self, ring => ring.say_burst(shown, burst, first, written))
    }

    /// As `complete_chains`, by their heads; `buffers`: driver address and bytes of all that may have been written.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete_heads(
        &mut self,
        chains: impl Iterator<Item = (u16, u32)>,
        buffers: impl Iterator<Item = (u64, u64)>,
    ) -> Result<bool, Violation> {
        either!(self, ring => ring.put(chains, buffers))
    }

    /// Give chains back, each with the bytes written, and show them all at once. True when the driver is to be notified.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete_chains<'a>(
        &mut self,
        chains: impl Iterator<Item = (&'a Chain, u32)> + Clone,
    ) -> Result<bool, Violation> {
        either!(self, ring => ring.complete_chains(chains))
    }
}

/// The driver side of a ring, of either layout, in memory of its own: see `split::DriverRing`, whose methods these are.
pub enum DriverRing {
    /// Section 2.7.
    Split(split::DriverRing),
    /// Section 2.8.
    Packed(packed::DriverRing),
}

impl DriverRing {
    /// Bytes of the arena that a ring of this size takes, with its indirect tables.
    pub fn bytes_needed(size: u32, packed: bool) -> Result<usize, LayoutError> {
        if packed {
            packed::DriverRing::bytes_needed(size)
        } else {
            split::DriverRing::bytes_needed(size)
        }
    }

    /// An empty ring at `offset` of `arena`, whose first byte has the driver address `address`; interrupts are on.
    pub fn new(
        arena: &Arc<Mapping>,
        offset: usize,
        address: u64,
        size: u32,
        features: Features,
    ) -> Result<Self, LayoutError> {
        Ok(if features.packed {
            Self::Packed(packed::DriverRing::new(arena, offset, address, size, features)?)
        } else {
            Self::Split(split::DriverRing::new(arena, offset, address, size, features)?)
        })
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        either!(self, ring => ring.size())
    }

    /// Driver address of the descriptor table, or of the descriptor ring.
    pub fn desc(&self) -> u64 {
        either!(self, ring => ring.desc())
    }

    /// Driver address of the available ring, or of the driver's event suppression.
    pub fn driver(&self) -> u64 {
        either!(self, ring => ring.driver())
    }

    /// Driver address of the used ring, or of the device's event suppression.
    pub fn device(&self) -> u64 {
        either!(self, ring => ring.device())
    }

    /// Descriptors that are free: a request takes one for each buffer, or one with an indirect table.
    pub fn free(&self) -> usize {
        either!(self, ring => ring.free())
    }

    /// Requests that the device has.
    pub fn outstanding(&self) -> usize {
        either!(self, ring => ring.outstanding())
    }

    /// Queue a request, unpublished. Its token, or None when there is no room now.
    pub fn add(&mut self, readable: &[(u64, u64)], writable: &[(u64, u64)]) -> Result<Option<u16>, AddError> {
        either!(self, ring => ring.add(readable, writable))
    }

    /// Show the device what was added. True when it is to be notified.
    #[must_use = "the device may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Append finished requests, each a token and the bytes written, at most `limit`.
    pub fn reap(&mut self, limit: usize, finished: &mut Vec<(u16, u32)>) -> Result<(), Violation> {
        either!(self, ring => ring.reap(limit, finished))
    }

    /// As `reap`, for whoever comes again by itself: when there are none, interrupts stay off.
    pub fn poll(&mut self, limit: usize, finished: &mut Vec<(u16, u32)>) -> Result<(), Violation> {
        either!(self, ring => ring.poll(limit, finished))
    }
}
