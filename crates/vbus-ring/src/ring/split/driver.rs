//! The driver side of a split ring, in memory of its own.

use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use super::{
    avail_bytes, passes, used_bytes, Desc, DESC_BYTES, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, ENTRIES, INDEX, SUPPRESS,
    USED_BYTES,
};
use crate::area::{check_range, LayoutError};
use crate::mem::{Mapping, Window};
use crate::ring::MAX_SIZE;
use crate::violation::{Rule, Violation};

/// Entries of the indirect table that each descriptor has. Longer chains use the descriptors of the ring.
pub const INDIRECT_ENTRIES: usize = 8;

/// Bytes of a cache line: the two sides write to lines of their own.
const LINE: usize = 64;

/// Why buffers cannot be a request: defects of the caller, not of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Nothing to do.
    #[error("a request needs at least one buffer")]
    NoBuffers,
    /// More buffers than a chain may have.
    #[error("a request of {count} buffers does not fit a ring of {size}, ever")]
    TooManyBuffers {
        /// Buffers of the request.
        count: usize,
        /// Descriptors of the ring.
        size: u16,
    },
    /// A buffer that a descriptor cannot describe.
    #[error("a buffer has 1 to 4294967295 bytes, not {0}")]
    BufferSize(u64),
    /// A used length could not be told.
    #[error("a request has at most 4294967295 bytes")]
    RequestSize,
}

/// Where the parts lie, in bytes from the start of the ring.
struct Layout {
    avail: usize,
    used: usize,
    tables: usize,
    total: usize,
}

impl Layout {
    const fn of(size: u16) -> Self {
        let avail = DESC_BYTES * size as usize;
        let used = (avail + avail_bytes(size) + 2).next_multiple_of(LINE);
        let tables = (used + used_bytes(size) + 2).next_multiple_of(LINE);
        Self { avail, used, tables, total: tables + size as usize * INDIRECT_ENTRIES * DESC_BYTES }
    }
}

/// What the driver knows of a head; nothing of it is ever read back from the ring.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    state: State,
    /// Descriptors of the ring that its chain has.
    descriptors: u16,
    /// Bytes that the device may write.
    writable: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Free,
    Added,
    Published,
}

/// The driver side of a split ring.
///
/// `add` requests, then `publish` them; when it says so, notify the device. `reap` what the device has used. The
/// buffers themselves are the caller's, and stay the device's until their request was reaped.
pub struct DriverRing {
    window: Window,
    layout: Layout,
    address: u64,
    size: u16,
    event_idx: bool,
    indirect: bool,
    slots: Vec<Slot>,
    /// Links of the chains and of the list of free descriptors.
    links: Vec<u16>,
    first_free: u16,
    free: u16,
    /// Added and not published, in order.
    added: Vec<u16>,
    /// Our own available index; the one in memory is written, never read.
    avail: u16,
    published: u16,
    /// Index of the next used element.
    next: u16,
    /// The used index as last read.
    seen: u16,
    /// Without EVENT_IDX: what the available ring's flags say.
    suppressing: bool,
    /// Why this ring gives nothing any more, until it was told.
    violation: Option<Violation>,
    broken: bool,
}

impl DriverRing {
    /// Bytes of the arena that a ring of this size takes, with its indirect tables.
    pub fn bytes_needed(size: u32) -> Result<usize, LayoutError> {
        Ok(Layout::of(Self::check_size(size)?).total)
    }

    fn check_size(size: u32) -> Result<u16, LayoutError> {
        if !size.is_power_of_two() || size > MAX_SIZE {
            return Err(LayoutError::Count("a ring's size is a power of two, 1 to 32768"));
        }
        Ok(size as u16)
    }

    /// An empty ring at `offset` of `arena`, whose first byte has the driver address `address`; interrupts are on.
    pub fn new(
        arena: &Arc<Mapping>,
        offset: usize,
        address: u64,
        size: u32,
        event_idx: bool,
        indirect: bool,
    ) -> Result<Self, LayoutError> {
        let size = Self::check_size(size)?;
        let layout = Layout::of(size);
        check_range("a ring", arena.size(), offset, 1, layout.total, 16)?;
        if !arena.writable() {
            return Err(LayoutError::Count("a ring needs a writable arena"));
        }
        if address % 16 != 0 || address.checked_add(arena.size() as u64).is_none() {
            return Err(LayoutError::Count("an arena's address is a multiple of 16 and does not wrap"));
        }
        let window = Window::new(arena.clone(), offset, layout.total);
        // Both sides start from zeroes (section 2.7.10.1); the arena may have been used before.
        for place in (0..layout.tables).step_by(8) {
            window.store64(place, 0, Ordering::Relaxed);
        }
        Ok(Self {
            window,
            layout,
            address: address + offset as u64,
            size,
            event_idx,
            indirect,
            slots: vec![Slot::default(); usize::from(size)],
            links: (1..=size).collect(),
            first_free: 0,
            free: size,
            added: Vec::new(),
            avail: 0,
            published: 0,
            next: 0,
            seen: 0,
            suppressing: false,
            violation: None,
            broken: false,
        })
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Driver address of the descriptor table.
    pub fn desc(&self) -> u64 {
        self.address
    }

    /// Driver address of the available ring.
    pub fn driver(&self) -> u64 {
        self.address + self.layout.avail as u64
    }

    /// Driver address of the used ring.
    pub fn device(&self) -> u64 {
        self.address + self.layout.used as u64
    }

    /// Descriptors that are free: a request takes one for each buffer, or one with an indirect table.
    pub fn free(&self) -> usize {
        usize::from(self.free)
    }

    /// Requests that the device has.
    pub fn outstanding(&self) -> usize {
        // Every published entry comes back exactly once, or the ring is broken.
        usize::from(self.published.wrapping_sub(self.next))
    }

    /// Queue a request, unpublished. Its token, or None when there is no room now.
    pub fn add(&mut self, readable: &[(u64, u64)], writable: &[(u64, u64)]) -> Result<Option<u16>, AddError> {
        let count = readable.len() + writable.len();
        let room = self.check(readable, writable, count)?;
        let in_table = self.indirect && (2..=INDIRECT_ENTRIES.min(usize::from(self.size))).contains(&count);
        let descriptors = if in_table { 1 } else { count as u16 };
        if descriptors > self.free {
            return Ok(None);
        }
        let head = self.first_free;
        let mut last = head;
        let buffers =
            readable.iter().map(|buffer| (buffer, 0)).chain(writable.iter().map(|buffer| (buffer, DESC_WRITE)));
        for (position, (&(address, size), flags)) in buffers.enumerate() {
            let more = if position + 1 < count { DESC_NEXT } else { 0 };
            let desc = |next| Desc { address, size: size as u32, flags: flags | more, next };
            if in_table {
                let next = if more == 0 { 0 } else { position as u16 + 1 };
                self.write(self.table(head) + DESC_BYTES * position, desc(next));
            } else {
                last = if position == 0 { head } else { self.links[usize::from(last)] };
                let next = if more == 0 { 0 } else { self.links[usize::from(last)] };
                self.write(DESC_BYTES * usize::from(last), desc(next));
            }
        }
        if in_table {
            let address = self.address + self.table(head) as u64;
            let size = (DESC_BYTES * count) as u32;
            self.write(DESC_BYTES * usize::from(head), Desc { address, size, flags: DESC_INDIRECT, next: 0 });
        }
        self.first_free = self.links[usize::from(last)];
        self.free -= descriptors;
        self.slots[usize::from(head)] = Slot { state: State::Added, descriptors, writable: room };
        let place = self.layout.avail + ENTRIES + 2 * usize::from(self.avail & (self.size - 1));
        self.window.store16(place, head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
        self.added.push(head);
        Ok(Some(head))
    }

    /// The writable bytes of a request that a chain can describe.
    fn check(&self, readable: &[(u64, u64)], writable: &[(u64, u64)], count: usize) -> Result<u32, AddError> {
        if count == 0 {
            return Err(AddError::NoBuffers);
        }
        if count > usize::from(self.size) {
            return Err(AddError::TooManyBuffers { count, size: self.size });
        }
        let sum = |buffers: &[(u64, u64)]| {
            buffers.iter().try_fold(0u64, |sum, &(_, size)| match size {
                1..=0xffff_ffff => Ok(sum + size),
                _ => Err(AddError::BufferSize(size)),
            })
        };
        let (readable, writable) = (sum(readable)?, sum(writable)?);
        if readable + writable > u64::from(u32::MAX) {
            return Err(AddError::RequestSize);
        }
        Ok(writable as u32)
    }

    /// Offset of the indirect table of a descriptor.
    fn table(&self, head: u16) -> usize {
        self.layout.tables + usize::from(head) * INDIRECT_ENTRIES * DESC_BYTES
    }

    fn write(&self, place: usize, desc: Desc) {
        // Relaxed: `publish` releases it.
        self.window.store64(place, desc.address, Ordering::Relaxed);
        self.window.store64(place + 8, desc.rest(), Ordering::Relaxed);
    }

    /// Show the device what was added. True when it is to be notified.
    #[must_use = "the device may be waiting for a notification"]
    pub fn publish(&mut self) -> bool {
        if self.added.is_empty() {
            return false;
        }
        for head in self.added.drain(..) {
            self.slots[usize::from(head)].state = State::Published;
        }
        let old = std::mem::replace(&mut self.published, self.avail);
        // Release: whoever sees the index sees the entries, the descriptors and what is in the buffers.
        self.window.store16(self.layout.avail + INDEX, self.avail, Ordering::Release);
        // The index must be out before we look whether the device waits for it, and the device does the reverse: it
        // asks for notifications, then looks at the index. Only full fences make one of the two see the other's store.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.window.load16(self.layout.used + used_bytes(self.size), Ordering::Relaxed);
            passes(event, self.published, old)
        } else {
            self.window.load16(self.layout.used, Ordering::Relaxed) & SUPPRESS == 0
        }
    }

    /// Append finished requests, each a token and the bytes written, at most `limit`.
    ///
    /// When it gives fewer than `limit` there are no more, and interrupts are on. A violation comes after the requests
    /// before it: with them the call succeeds, and the next one fails. After that there are none.
    ///
    /// Violation: used-index-jump, used-id-unknown, used-length.
    pub fn reap(&mut self, limit: usize, finished: &mut Vec<(u16, u32)>) -> Result<(), Violation> {
        self.reap_or_poll(limit, finished, true)
    }

    /// As `reap`, for whoever comes again by itself: when there are none, interrupts stay as they were.
    pub fn poll(&mut self, limit: usize, finished: &mut Vec<(u16, u32)>) -> Result<(), Violation> {
        self.reap_or_poll(limit, finished, false)
    }

    fn reap_or_poll(&mut self, limit: usize, finished: &mut Vec<(u16, u32)>, ask: bool) -> Result<(), Violation> {
        let before = finished.len();
        if self.broken || limit == 0 {
            return self.violation.take().map_or(Ok(()), Err);
        }
        match self.reap_some(before.saturating_add(limit), finished, ask) {
            Ok(()) => Ok(()),
            Err(violation) => {
                self.broken = true;
                if finished.len() == before {
                    return Err(violation);
                }
                self.violation = Some(violation);
                Ok(())
            }
        }
    }

    fn reap_some(&mut self, last: usize, finished: &mut Vec<(u16, u32)>, ask: bool) -> Result<(), Violation> {
        loop {
            while self.look()? {
                if finished.len() == last {
                    self.ask_for_silence();
                    return Ok(());
                }
                finished.push(self.finish()?);
            }
            if !ask {
                self.ask_for_silence();
                return Ok(());
            }
            self.ask_for_interrupts();
            // As in `publish`, with the sides exchanged: the device writes its index, then looks whether we want to
            // hear of it; we have said that we do, and now look at its index.
            fence(Ordering::SeqCst);
            if !self.look()? {
                return Ok(());
            }
        }
    }

    /// Whether there is a used element to take.
    fn look(&mut self) -> Result<bool, Violation> {
        if self.next != self.seen {
            return Ok(true);
        }
        // Acquire: elements and buffers that the device wrote before it moved its index are seen after it.
        let index = self.window.load16(self.layout.used + INDEX, Ordering::Acquire);
        let ahead = index.wrapping_sub(self.next);
        if usize::from(ahead) > self.outstanding() {
            let detail = format!("from {} to {index} with {} outstanding", self.next, self.outstanding());
            return Err(Violation::new(Rule::UsedIndexJump, detail));
        }
        self.seen = index;
        Ok(ahead != 0)
    }

    /// Take the next used element, whose chain is free again.
    fn finish(&mut self) -> Result<(u16, u32), Violation> {
        let place = self.layout.used + ENTRIES + USED_BYTES * usize::from(self.next & (self.size - 1));
        // Each word is loaded once: what was checked is what is used.
        let id = self.window.load32(place, Ordering::Relaxed);
        let written = self.window.load32(place + 4, Ordering::Relaxed);
        let unknown = || Violation::new(Rule::UsedIdUnknown, format!("{id}"));
        let head = u16::try_from(id).map_err(|_| unknown())?;
        let slot = self.slots.get_mut(usize::from(head)).ok_or_else(unknown)?;
        if slot.state != State::Published {
            return Err(unknown());
        }
        if written > slot.writable {
            let detail = format!("{written} bytes written of {} in request {id}", slot.writable);
            return Err(Violation::new(Rule::UsedLength, detail));
        }
        slot.state = State::Free;
        let last = (1..slot.descriptors).fold(head, |last, _| self.links[usize::from(last)]);
        self.links[usize::from(last)] = self.first_free;
        self.first_free = head;
        self.free += slot.descriptors;
        self.next = self.next.wrapping_add(1);
        Ok((head, written))
    }

    /// Interrupts on, from the next element on. The caller looks again after a full fence.
    fn ask_for_interrupts(&mut self) {
        if self.event_idx {
            let place = self.layout.avail + avail_bytes(self.size);
            self.window.store16(place, self.next, Ordering::Relaxed);
        } else if self.suppressing {
            self.window.store16(self.layout.avail, 0, Ordering::Relaxed);
        }
        self.suppressing = false;
    }

    /// Interrupts off: a hint, that the device may see late.
    fn ask_for_silence(&mut self) {
        // With EVENT_IDX the event lies behind the index now, which says the same.
        if !self.event_idx && !self.suppressing {
            self.window.store16(self.layout.avail, SUPPRESS, Ordering::Relaxed);
        }
        self.suppressing = true;
    }
}
