//! The driver side of a ring, whatever its layout: what a request may be, and what is known of those under way.

use std::collections::VecDeque;
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use super::{Features, DESC_WRITE, MAX_SIZE};
use crate::area::{check_range, LayoutError};
use crate::mem::{Mapping, Window};
use crate::violation::{Rule, Violation};

/// Entries of the indirect table that each descriptor has. Longer chains use the descriptors of the ring.
pub const INDIRECT_ENTRIES: usize = 8;

/// Bytes of a cache line: the two sides write to lines of their own.
pub const LINE: usize = 64;

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

/// What a request needs.
pub struct Need {
    /// Buffers.
    pub count: usize,
    /// Bytes that the device may write.
    pub writable: u32,
    /// Whether they are in an indirect table.
    pub in_table: bool,
    /// Descriptors of the ring.
    pub descriptors: u16,
}

impl Need {
    /// What these buffers need in a ring.
    pub fn of(
        readable: &[(u64, u64)],
        writable: &[(u64, u64)],
        size: u16,
        features: Features,
    ) -> Result<Self, AddError> {
        let count = readable.len() + writable.len();
        if count == 0 {
            return Err(AddError::NoBuffers);
        }
        if count > usize::from(size) {
            return Err(AddError::TooManyBuffers { count, size });
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
        let in_table = features.indirect && (2..=INDIRECT_ENTRIES.min(usize::from(size))).contains(&count);
        let descriptors = if in_table { 1 } else { count as u16 };
        Ok(Self { count, writable: writable as u32, in_table, descriptors })
    }
}

/// The buffers of a request in order: address, bytes, and DESC_WRITE or 0.
#[inline]
pub fn buffers<'a>(
    readable: &'a [(u64, u64)],
    writable: &'a [(u64, u64)],
) -> impl Iterator<Item = (u64, u32, u16)> + 'a {
    let readable = readable.iter().map(|&(address, size)| (address, size as u32, 0));
    readable.chain(writable.iter().map(|&(address, size)| (address, size as u32, DESC_WRITE)))
}

/// The place of a ring of `bytes` bytes in an arena, of which the first `zeroed` are zero from now on.
pub fn place(
    arena: &Arc<Mapping>,
    offset: usize,
    address: u64,
    bytes: usize,
    zeroed: usize,
) -> Result<Window, LayoutError> {
    check_range("a ring", arena.size(), offset, 1, bytes, 16)?;
    if !arena.writable() {
        return Err(LayoutError::Count("a ring needs a writable arena"));
    }
    if address % 16 != 0 || address.checked_add(arena.size() as u64).is_none() {
        return Err(LayoutError::Count("an arena's address is a multiple of 16 and does not wrap"));
    }
    let window = Window::new(arena.clone(), offset, bytes);
    // Both sides start from zeroes (sections 2.7.10.1 and 2.8.10.1); the arena may have been used before.
    for place in (0..zeroed).step_by(8) {
        window.store64(place, 0, Ordering::Relaxed);
    }
    Ok(window)
}

/// A size that a ring can have.
pub fn check_size(size: u32) -> Option<u16> {
    (1..=MAX_SIZE).contains(&size).then_some(size as u16)
}

/// What the driver knows of a request; nothing of it is ever read back from the ring.
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

/// A request that the device has finished.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Which.
    pub token: u16,
    /// Descriptors of the ring that its chain had.
    pub descriptors: u16,
    /// Bytes that were written.
    pub written: u32,
}

/// The requests of a ring, by token.
pub struct Requests {
    slots: Vec<Slot>,
    /// Added and not published, in order.
    added: Vec<u16>,
    outstanding: usize,
    /// With IN_ORDER: what was published, in this order.
    order: Option<VecDeque<u16>>,
    /// What the device said last that it has used, and with it, with IN_ORDER, all before it: taken back one by one.
    used: Option<(u16, u32)>,
}

impl Requests {
    /// None yet, of so many tokens.
    pub fn new(size: u16, in_order: bool) -> Self {
        let slots = vec![Slot::default(); usize::from(size)];
        Self { slots, added: Vec::new(), outstanding: 0, order: in_order.then(VecDeque::new), used: None }
    }

    /// One that is added.
    pub fn add(&mut self, token: u16, need: &Need) {
        let &Need { descriptors, writable, .. } = need;
        self.slots[usize::from(token)] = Slot { state: State::Added, descriptors, writable };
        self.added.push(token);
    }

    /// Those that were added are the device's; false when there are none.
    pub fn publish(&mut self) -> bool {
        if self.added.is_empty() {
            return false;
        }
        self.outstanding += self.added.len();
        for token in self.added.drain(..) {
            self.slots[usize::from(token)].state = State::Published;
            if let Some(order) = &mut self.order {
                order.push_back(token);
            }
        }
        true
    }

    /// Requests that the device has.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Whether something that is used was not taken back.
    pub fn has_used(&self) -> bool {
        self.used.is_some()
    }

    /// The device says that it has used a request: how many that makes. Violation: used-id-unknown, used-length.
    pub fn use_up(&mut self, id: u32, written: u32) -> Result<usize, Violation> {
        let unknown = || Violation::new(Rule::UsedIdUnknown, format!("{id}"));
        let token = u16::try_from(id).map_err(|_| unknown())?;
        let slot = self.slots.get(usize::from(token)).ok_or_else(unknown)?;
        if slot.state != State::Published {
            return Err(unknown());
        }
        if written > slot.writable {
            let detail = format!("{written} bytes written of {} in request {id}", slot.writable);
            return Err(Violation::new(Rule::UsedLength, detail));
        }
        self.used = Some((token, written));
        match &self.order {
            None => Ok(1),
            Some(order) => Ok(1 + order.iter().position(|first| *first == token).ok_or_else(unknown)?),
        }
    }

    /// Take the next one back that is used.
    pub fn take_back(&mut self) -> Option<Finished> {
        let (last, written) = self.used?;
        let token = match &mut self.order {
            None => last,
            Some(order) => order.pop_front()?,
        };
        let slot = &mut self.slots[usize::from(token)];
        slot.state = State::Free;
        self.outstanding -= 1;
        // Of those before the last nothing was said: they were used as far as they could be (section 2.7.9).
        let written = if token == last { written } else { slot.writable };
        if token == last {
            self.used = None;
        }
        Some(Finished { token, descriptors: slot.descriptors, written })
    }
}

/// One layout's half of it.
pub trait Layout {
    /// Whether there is a finished request to take.
    fn look(&mut self) -> Result<bool, Violation>;

    /// Take the next one, which `look` has seen; its descriptors are free again.
    fn finish(&mut self) -> Result<Finished, Violation>;

    /// Ask for interrupts, from the next one on, or for none, which is a hint. Whoever asks looks again after a full
    /// fence.
    fn ask(&mut self, interrupt: bool);
}

/// The driver side of a ring.
///
/// `add` requests, then `publish` them; when it says so, notify the device. `reap` what the device has used. The
/// buffers themselves are the caller's, and stay the device's until their request was reaped.
pub struct Ring<L> {
    pub(super) layout: L,
    /// Why this ring gives nothing any more, until it was told.
    violation: Option<Violation>,
    broken: bool,
}

impl<L: Layout> Ring<L> {
    pub(super) fn of(layout: L) -> Self {
        Self { layout, violation: None, broken: false }
    }

    /// Append finished requests, each a token and the bytes written, at most `limit`.
    ///
    /// When it gives fewer than `limit` there are no more, and interrupts are on. A violation comes after the requests
    /// before it: with them the call succeeds, and the next one fails. After that there are none. With IN_ORDER a device
    /// may say of several requests only that the last was used: then the others were written whole.
    ///
    /// Violation: used-index-jump, used-id-unknown, used-length.
    pub fn reap(&mut self, limit: usize, finished: &mut Vec<(u16, u32)>) -> Result<(), Violation> {
        self.reap_or_poll(limit, finished, true)
    }

    /// As `reap`, for whoever comes again by itself: when there are none, interrupts stay off.
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
            while self.layout.look()? {
                if finished.len() == last {
                    self.layout.ask(false);
                    return Ok(());
                }
                let Finished { token, written, .. } = self.layout.finish()?;
                finished.push((token, written));
            }
            self.layout.ask(ask);
            if !ask {
                return Ok(());
            }
            // As in `publish`, with the sides exchanged: the device shows what is used, then looks whether we want to
            // hear of it; we have said that we do, and now look at what it shows.
            fence(Ordering::SeqCst);
            if !self.layout.look()? {
                return Ok(());
            }
        }
    }
}
