//! The driver side of a split ring, in memory of its own.

use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use super::{avail_bytes, passes, used_bytes, Desc, ENTRIES, INDEX, SUPPRESS, USED_BYTES};
use crate::area::LayoutError;
use crate::mem::{Mapping, Window};
use crate::ring::driver::{buffers, check_size, place, AddError, Finished, Layout, Need, Requests, Ring, LINE};
use crate::ring::{Features, DESC_BYTES, DESC_INDIRECT, DESC_NEXT, INDIRECT_ENTRIES};
use crate::violation::{Rule, Violation};

/// The driver side of a split ring.
pub type DriverRing = Ring<Split>;

/// Where the parts lie, in bytes from the start of the ring.
struct Parts {
    avail: usize,
    used: usize,
    tables: usize,
    total: usize,
}

impl Parts {
    const fn of(size: u16) -> Self {
        let avail = DESC_BYTES * size as usize;
        let used = (avail + avail_bytes(size) + 2).next_multiple_of(LINE);
        let tables = (used + used_bytes(size) + 2).next_multiple_of(LINE);
        Self { avail, used, tables, total: tables + size as usize * INDIRECT_ENTRIES * DESC_BYTES }
    }
}

/// The layout, from the driver's side.
pub struct Split {
    window: Window,
    parts: Parts,
    address: u64,
    size: u16,
    features: Features,
    requests: Requests,
    /// Links of the chains and of the list of free descriptors. With IN_ORDER they never change: descriptors are taken
    /// and come back in the order of the table, round and round.
    links: Vec<u16>,
    first_free: u16,
    free: u16,
    /// Our own available index; the one in memory is written, never read.
    avail: u16,
    published: u16,
    /// Index of the next used element.
    next: u16,
    /// The used index as last read.
    seen: u16,
    /// Without EVENT_IDX: what the available ring's flags say.
    suppressing: bool,
}

impl Ring<Split> {
    /// Bytes of the arena that a ring of this size takes, with its indirect tables.
    pub fn bytes_needed(size: u32) -> Result<usize, LayoutError> {
        Ok(Parts::of(size_of(size)?).total)
    }

    /// An empty ring at `offset` of `arena`, whose first byte has the driver address `address`; interrupts are on.
    pub fn new(
        arena: &Arc<Mapping>,
        offset: usize,
        address: u64,
        size: u32,
        features: Features,
    ) -> Result<Self, LayoutError> {
        let size = size_of(size)?;
        let parts = Parts::of(size);
        let window = place(arena, offset, address, parts.total, parts.tables)?;
        Ok(Self::of(Split {
            window,
            parts,
            address: address + offset as u64,
            size,
            features,
            requests: Requests::new(size, features.in_order),
            links: (0..size).map(|index| (index + 1) & (size - 1)).collect(),
            first_free: 0,
            free: size,
            avail: 0,
            published: 0,
            next: 0,
            seen: 0,
            suppressing: false,
        }))
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Driver address of the descriptor table.
    pub fn desc(&self) -> u64 {
        self.layout.address
    }

    /// Driver address of the available ring.
    pub fn driver(&self) -> u64 {
        self.layout.address + self.layout.parts.avail as u64
    }

    /// Driver address of the used ring.
    pub fn device(&self) -> u64 {
        self.layout.address + self.layout.parts.used as u64
    }

    /// Descriptors that are free: a request takes one for each buffer, or one with an indirect table.
    pub fn free(&self) -> usize {
        usize::from(self.layout.free)
    }

    /// Requests that the device has.
    pub fn outstanding(&self) -> usize {
        self.layout.requests.outstanding()
    }

    /// Queue a request, unpublished. Its token, or None when there is no room now.
    pub fn add(&mut self, readable: &[(u64, u64)], writable: &[(u64, u64)]) -> Result<Option<u16>, AddError> {
        self.layout.add(readable, writable)
    }

    /// Show the device what was added. True when it is to be notified.
    #[must_use = "the device may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        self.layout.publish()
    }
}

fn size_of(size: u32) -> Result<u16, LayoutError> {
    check_size(size)
        .filter(|size| size.is_power_of_two())
        .ok_or(LayoutError::Count("a split ring's size is a power of two, 1 to 32768"))
}

impl Split {
    fn add(&mut self, readable: &[(u64, u64)], writable: &[(u64, u64)]) -> Result<Option<u16>, AddError> {
        let need = Need::of(readable, writable, self.size, self.features)?;
        if need.descriptors > self.free {
            return Ok(None);
        }
        let head = self.first_free;
        let mut last = head;
        for (position, (address, size, flags)) in buffers(readable, writable).enumerate() {
            let more = if position + 1 < need.count { DESC_NEXT } else { 0 };
            let desc = |next| Desc { address, size, flags: flags | more, next };
            if need.in_table {
                let next = if more == 0 { 0 } else { position as u16 + 1 };
                self.write(self.table(head) + DESC_BYTES * position, desc(next));
            } else {
                last = if position == 0 { head } else { self.links[usize::from(last)] };
                let next = if more == 0 { 0 } else { self.links[usize::from(last)] };
                self.write(DESC_BYTES * usize::from(last), desc(next));
            }
        }
        if need.in_table {
            let address = self.address + self.table(head) as u64;
            let size = (DESC_BYTES * need.count) as u32;
            self.write(DESC_BYTES * usize::from(head), Desc { address, size, flags: DESC_INDIRECT, next: 0 });
        }
        self.first_free = self.links[usize::from(last)];
        self.free -= need.descriptors;
        self.requests.add(head, &need);
        let place = self.parts.avail + ENTRIES + 2 * usize::from(self.avail & (self.size - 1));
        self.window.store16(place, head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Offset of the indirect table of a descriptor.
    fn table(&self, head: u16) -> usize {
        self.parts.tables + usize::from(head) * INDIRECT_ENTRIES * DESC_BYTES
    }

    fn write(&self, place: usize, desc: Desc) {
        // Relaxed: `publish` releases it.
        self.window.store64(place, desc.address, Ordering::Relaxed);
        self.window.store64(place + 8, desc.rest(), Ordering::Relaxed);
    }

    fn publish(&mut self) -> bool {
        if !self.requests.publish() {
            return false;
        }
        let old = std::mem::replace(&mut self.published, self.avail);
        // Release: whoever sees the index sees the entries, the descriptors and what is in the buffers.
        self.window.store16(self.parts.avail + INDEX, self.avail, Ordering::Release);
        // The index must be out before we look whether the device waits for it, and the device does the reverse: it
        // asks for notifications, then looks at the index. Only full fences make one of the two see the other's store.
        fence(Ordering::SeqCst);
        if self.features.event_idx {
            let event = self.window.load16(self.parts.used + used_bytes(self.size), Ordering::Relaxed);
            passes(event, self.published, old)
        } else {
            self.window.load16(self.parts.used, Ordering::Relaxed) & SUPPRESS == 0
        }
    }
}

impl Layout for Split {
    #[inline]
    fn look(&mut self) -> Result<bool, Violation> {
        if self.next != self.seen || self.requests.has_used() {
            return Ok(true);
        }
        // Acquire: elements and buffers that the device wrote before it moved its index are seen after it.
        let index = self.window.load16(self.parts.used + INDEX, Ordering::Acquire);
        let ahead = index.wrapping_sub(self.next);
        if usize::from(ahead) > self.requests.outstanding() {
            let detail = format!("from {} to {index} with {} outstanding", self.next, self.requests.outstanding());
            return Err(Violation::new(Rule::UsedIndexJump, detail));
        }
        self.seen = index;
        Ok(ahead != 0)
    }

    fn finish(&mut self) -> Result<Finished, Violation> {
        if !self.requests.has_used() {
            let place = self.parts.used + ENTRIES + USED_BYTES * usize::from(self.next & (self.size - 1));
            // Each word is loaded once: what was checked is what is used.
            let id = self.window.load32(place, Ordering::Relaxed);
            let written = self.window.load32(place + 4, Ordering::Relaxed);
            let count = self.requests.use_up(id, written)?;
            let ahead = self.seen.wrapping_sub(self.next);
            if count > usize::from(ahead) {
                let detail = format!("{id} is the next but {}, and the index only {ahead} ahead", count - 1);
                return Err(Violation::new(Rule::UsedIndexJump, detail));
            }
        }
        let Some(finished) = self.requests.take_back() else {
            return Err(Violation::new(Rule::UsedIdUnknown, "nothing is outstanding"));
        };
        if !self.features.in_order {
            let Finished { token, descriptors, .. } = finished;
            let last = (1..descriptors).fold(token, |last, _| self.links[usize::from(last)]);
            self.links[usize::from(last)] = self.first_free;
            self.first_free = token;
        }
        self.free += finished.descriptors;
        self.next = self.next.wrapping_add(1);
        Ok(finished)
    }

    #[inline]
    fn ask(&mut self, interrupt: bool) {
        let was = std::mem::replace(&mut self.suppressing, !interrupt);
        if self.features.event_idx {
            // For silence there is nothing to write: the event lies behind the index now, which says the same.
            if interrupt {
                self.window.store16(self.parts.avail + avail_bytes(self.size), self.next, Ordering::Relaxed);
            }
        } else if was == interrupt {
            self.window.store16(self.parts.avail, if interrupt { 0 } else { SUPPRESS }, Ordering::Relaxed);
        }
    }
}
