//! The driver side of a packed ring, in memory of its own.

use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use super::{
    is_awaited, Place, Rest, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, EVENT_BYTES, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE,
};
use crate::area::LayoutError;
use crate::mem::{Mapping, Window};
use crate::ring::driver::{buffers, check_size, place, AddError, Finished, Layout, Need, Requests, Ring, LINE};
use crate::ring::{Features, DESC_BYTES, INDIRECT_ENTRIES};
use crate::violation::{Rule, Violation};

/// The driver side of a packed ring.
pub type DriverRing = Ring<Packed>;

/// Where the parts lie, in bytes from the start of the ring. The two sides' event suppressions have lines of their own.
struct Parts {
    driver: usize,
    device: usize,
    tables: usize,
    total: usize,
}

impl Parts {
    const fn of(size: u16) -> Self {
        let driver = (DESC_BYTES * size as usize).next_multiple_of(LINE);
        let device = (driver + EVENT_BYTES).next_multiple_of(LINE);
        let tables = (device + EVENT_BYTES).next_multiple_of(LINE);
        Self { driver, device, tables, total: tables + size as usize * INDIRECT_ENTRIES * DESC_BYTES }
    }
}

/// The layout, from the driver's side.
pub struct Packed {
    window: Window,
    parts: Parts,
    address: u64,
    size: u16,
    features: Features,
    requests: Requests,
    /// Buffer ids that are free: as many as descriptors, of which every request takes one at least.
    ids: Vec<u16>,
    free: u16,
    /// Where the next descriptor goes, and the next used one will be.
    next: Place,
    used: Place,
    /// The second word of the descriptor at `used`, once it was seen to be a used one.
    seen: Option<Rest>,
    /// The first descriptor that was added and not published, whose flags show it and all behind it.
    first: Option<(u16, Rest)>,
    /// Descriptors that were added and not published.
    added: u16,
    /// What our event suppression says.
    event: u32,
}

impl Ring<Packed> {
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
        let mut layout = Packed {
            window,
            parts,
            address: address + offset as u64,
            size,
            features,
            requests: Requests::new(size, features.in_order),
            ids: (0..size).rev().collect(),
            free: size,
            next: Place::FIRST,
            used: Place::FIRST,
            seen: None,
            first: None,
            added: 0,
            // What zeroes say.
            event: EVENT_ENABLE << 16,
        };
        layout.ask(true);
        Ok(Self::of(layout))
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Driver address of the descriptor ring.
    pub fn desc(&self) -> u64 {
        self.layout.address
    }

    /// Driver address of the driver's event suppression.
    pub fn driver(&self) -> u64 {
        self.layout.address + self.layout.parts.driver as u64
    }

    /// Driver address of the device's event suppression.
    pub fn device(&self) -> u64 {
        self.layout.address + self.layout.parts.device as u64
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
    check_size(size).ok_or(LayoutError::Count("a packed ring's size is 1 to 32768"))
}

impl Packed {
    fn add(&mut self, readable: &[(u64, u64)], writable: &[(u64, u64)]) -> Result<Option<u16>, AddError> {
        let need = Need::of(readable, writable, self.size, self.features)?;
        if need.descriptors > self.free {
            return Ok(None);
        }
        let Some(id) = self.ids.pop() else {
            return Ok(None);
        };
        if need.in_table {
            let table = self.parts.tables + usize::from(id) * INDIRECT_ENTRIES * DESC_BYTES;
            for (position, (address, size, flags)) in buffers(readable, writable).enumerate() {
                let place = table + DESC_BYTES * position;
                // Relaxed, here and below: `publish` releases it.
                self.window.store64(place, address, Ordering::Relaxed);
                self.window.store64(place + 8, Rest::new(size, 0, flags).0, Ordering::Relaxed);
            }
            self.write(self.address + table as u64, (DESC_BYTES * need.count) as u32, id, DESC_INDIRECT);
        } else {
            for (position, (address, size, flags)) in buffers(readable, writable).enumerate() {
                let more = if position + 1 < need.count { DESC_NEXT } else { 0 };
                self.write(address, size, id, flags | more);
            }
        }
        self.free -= need.descriptors;
        self.requests.add(id, &need);
        Ok(Some(id))
    }

    /// Write the next descriptor. The device comes to it only behind the first that was added, so that one's flags alone
    /// wait for `publish`.
    #[inline]
    fn write(&mut self, address: u64, size: u32, id: u16, flags: u16) {
        let place = DESC_BYTES * usize::from(self.next.index);
        let rest = Rest::new(size, id, flags | self.next.available());
        self.window.store64(place, address, Ordering::Relaxed);
        match self.first {
            None => self.first = Some((self.next.index, rest)),
            Some(_) => self.window.store64(place + 8, rest.0, Ordering::Relaxed),
        }
        self.next = self.next.after(1, self.size);
        self.added += 1;
    }

    fn publish(&mut self) -> bool {
        let Some((index, rest)) = self.first.take() else {
            return false;
        };
        self.requests.publish();
        let added = std::mem::take(&mut self.added);
        // Release: whoever sees these flags sees the descriptors behind it, the tables and what is in the buffers.
        self.window.store64(DESC_BYTES * usize::from(index) + 8, rest.0, Ordering::Release);
        // The flags must be out before we look whether the device waits for them, and the device does the reverse: it
        // asks for notifications, then looks at the flags. Only full fences make one of the two see the other's store.
        fence(Ordering::SeqCst);
        let event = self.window.load32(self.parts.device, Ordering::Relaxed);
        is_awaited(event, self.features.event_idx, self.next, added, self.size)
    }
}

impl Layout for Packed {
    #[inline]
    fn look(&mut self) -> Result<bool, Violation> {
        if self.requests.has_used() {
            return Ok(true);
        }
        if self.seen.is_none() {
            // Acquire: what the device wrote into the buffers before these flags is seen after them. One load: the flags
            // that were looked at are of the id and the length that are used.
            let rest = Rest(self.window.load64(DESC_BYTES * usize::from(self.used.index) + 8, Ordering::Acquire));
            self.seen = rest.is_used(self.used.wrap).then_some(rest);
        }
        Ok(self.seen.is_some())
    }

    fn finish(&mut self) -> Result<Finished, Violation> {
        if let Some(rest) = self.seen.take() {
            let written = if rest.has(DESC_WRITE) { rest.size() } else { 0 };
            self.requests.use_up(rest.id().into(), written)?;
        }
        let Some(finished) = self.requests.take_back() else {
            return Err(Violation::new(Rule::UsedIdUnknown, "nothing is outstanding"));
        };
        self.ids.push(finished.token);
        self.free += finished.descriptors;
        self.used = self.used.after(finished.descriptors, self.size);
        Ok(finished)
    }

    #[inline]
    fn ask(&mut self, interrupt: bool) {
        let event = match (interrupt, self.features.event_idx) {
            (false, _) => EVENT_DISABLE << 16,
            (true, false) => EVENT_ENABLE << 16,
            (true, true) => EVENT_DESC << 16 | u32::from(self.used.word()),
        };
        if std::mem::replace(&mut self.event, event) != event {
            // Both halves at once: a device never sees a place with the flags of another.
            self.window.store32(self.parts.driver, event, Ordering::Relaxed);
        }
    }
}
