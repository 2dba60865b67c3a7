//! The device side of a split ring.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::inflight::Inflight;
use super::{avail_bytes, passes, used_bytes, Desc, ENTRIES, INDEX, SUPPRESS, USED_BYTES};
use crate::mem::{Access, Mapping, Memory, Table, Window};
use crate::ring::chain::{Gather, Taken};
use crate::ring::device::{part, Layout, Ring, Single, Used};
use crate::ring::indirect::Entries;
use crate::ring::inflight::{lost, sound};
use crate::ring::{Setup, DESC_BYTES, DESC_INDIRECT, DESC_NEXT, DESC_WRITE};
use crate::violation::{Rule, Violation};

/// The device side of a running split ring.
pub type DeviceRing = Ring<Split>;

/// The three parts, as they lie in the memory of one generation.
struct Parts {
    generation: u64,
    desc: Window,
    avail: Window,
    used: Window,
}

impl Parts {
    fn find(table: &Table, setup: &Setup) -> Result<Self, Violation> {
        let size = setup.size as u16;
        let event = if setup.features.event_idx { 2 } else { 0 };
        let desc = ("descriptor table", setup.desc, DESC_BYTES * usize::from(size));
        let avail = ("available ring", setup.driver, avail_bytes(size) + event);
        let used = ("used ring", setup.device, used_bytes(size) + event);
        Ok(Self {
            generation: table.generation(),
            desc: part(table, desc, (16, 8), Access::Read)?,
            avail: part(table, avail, (2, 2), Access::Read)?,
            used: part(table, used, (4, 4), Access::Write)?,
        })
    }
}

/// The layout, from the device's side.
pub struct Split {
    parts: Parts,
    /// Driver address of the used ring.
    device: u64,
    size: u16,
    /// The size, less one: beside the size, its load would take in what was stored a moment ago, and wait for it.
    mask: usize,
    event_idx: bool,
    /// Index of the next entry to take.
    next: u16,
    /// The available index as last read: entries before it may be taken without reading it again.
    seen: u16,
    /// Our own used index; the one in memory is written, never read.
    used: u16,
    /// What it was before it was shown last.
    before: u16,
    /// Whether notifications are off: without EVENT_IDX, what the used ring's flags say.
    suppressing: bool,
    /// Where others find what is in flight.
    inflight: Option<Inflight>,
    /// Heads that were in flight before this ring started, to be taken first; entries before `next` named them.
    again: VecDeque<u16>,
}

impl Ring<Split> {
    /// Start at index 0, or go on, with notifications on. A ring that goes on has its used index in memory: whoever
    /// served it before wrote it, and if the driver did since, only its own requests are lost.
    ///
    /// Violation: queue-size (0, not a power of two, above `max_size`), ring-position (above 16 bits), ring-misaligned,
    /// ring-outside-memory, region-lost, log-too-small.
    pub fn new(memory: Arc<Memory>, max_size: u32, setup: Setup) -> Result<Self, Violation> {
        Self::start(memory, max_size, setup, |table, setup| {
            let parts = Parts::find(table, setup)?;
            let (next, used) = match setup.resume {
                None => (0, 0),
                Some(next) => {
                    let next = u16::try_from(next)
                        .map_err(|_| Violation::new(Rule::RingPosition, format!("index {next:#x}")))?;
                    (next, parts.used.load16(INDEX, Ordering::Acquire))
                }
            };
            Ok(Split::new(parts, setup, next, used, None, VecDeque::new()))
        })
    }

    /// As `new`, with the region at `offset` of a writable mapping in which the heads in flight are kept for whoever
    /// serves the ring after this one: those that the one before left are taken again, before all others.
    ///
    /// Where the ring goes on follows from the region and the used ring's index, and `resume` is not looked at. The next
    /// available entry is always the used index and the number of heads in flight, for the next one to count from. So
    /// a new region begins at the used index, too: whatever was taken beyond it nobody remembers, and it is taken again.
    ///
    /// Violation: as `new`; inflight-misaligned, inflight-size, inflight-version, inflight-features,
    /// inflight-used-index, inflight-next, inflight-loop, inflight-counter, inflight-too-many.
    pub fn tracked(
        memory: Arc<Memory>,
        max_size: u32,
        setup: Setup,
        mapping: &Arc<Mapping>,
        offset: u64,
    ) -> Result<Self, Violation> {
        let ring = Self::start(memory.clone(), max_size, setup, |table, setup| {
            let parts = Parts::find(table, setup)?;
            let used = parts.used.load16(INDEX, Ordering::Acquire);
            let (inflight, again) = Inflight::open(mapping, offset, setup.size as u16, used)?;
            let made = parts.avail.load16(INDEX, Ordering::Acquire).wrapping_sub(used);
            if again.len() > usize::from(made) {
                let detail = format!("{} of {made} that are available", again.len());
                return Err(Violation::new(Rule::InflightTooMany, detail));
            }
            let next = used.wrapping_add(again.len() as u16);
            Ok(Split::new(parts, setup, next, used, Some(inflight), again))
        });
        sound(mapping, ring)
    }
}

impl Split {
    fn new(
        parts: Parts,
        setup: &Setup,
        next: u16,
        used: u16,
        inflight: Option<Inflight>,
        again: VecDeque<u16>,
    ) -> Self {
        Self {
            parts,
            device: setup.device,
            size: setup.size as u16,
            mask: setup.size as usize - 1,
            event_idx: setup.features.event_idx,
            next,
            seen: next,
            used,
            before: used,
            suppressing: true,
            inflight,
            again,
        }
    }

    /// The entries of an indirect table (section 2.7.5.3), in place of the descriptor that refers to it.
    fn indirect(&self, table: &Table, setup: &Setup, chain: &mut impl Gather, desc: &Desc) -> Result<(), Violation> {
        let violation = |rule| {
            let detail = format!("{} bytes at {:#x}, in the chain of {}", desc.size, desc.address, chain.head());
            Violation::new(rule, detail)
        };
        if !setup.features.indirect {
            return Err(violation(Rule::IndirectNotNegotiated));
        }
        if desc.has(DESC_NEXT) {
            return Err(violation(Rule::IndirectNext));
        }
        let entries = Entries::find(table, desc.address, desc.size, self.size, chain)?;
        let count = entries.count();
        let mut index = 0;
        for _ in 0..count {
            if index >= count {
                let detail = format!("{index} in an indirect table of {count}");
                return Err(Violation::new(Rule::DescriptorOutOfRange, detail));
            }
            let desc = Desc::from_words(entries.words(index));
            if desc.has(DESC_INDIRECT) {
                return Err(Violation::new(Rule::IndirectNested, format!("in the chain of {}", chain.head())));
            }
            chain.push(table, desc.address, desc.size, desc.has(DESC_WRITE), self.size)?;
            if !desc.has(DESC_NEXT) {
                return Ok(());
            }
            index = u32::from(desc.next);
        }
        let detail = format!("in the indirect table of the chain of {}", chain.head());
        Err(Violation::new(Rule::DescriptorLoop, detail))
    }

    /// An entry of the available ring: it was written before the index that `look` acquired.
    #[inline(always)]
    fn entry(&self, index: u16) -> u16 {
        self.parts.avail.load16(ENTRIES + 2 * (usize::from(index) & self.mask), Ordering::Relaxed)
    }

    /// Read a descriptor, once.
    #[inline(always)]
    fn desc(&self, index: u16) -> Desc {
        let place = DESC_BYTES * usize::from(index);
        // Relaxed: ordered by the index, see `look`. Two words, each loaded once: what was checked is what is used.
        Desc::from_words([0, 8].map(|at| self.parts.desc.load64(place + at, Ordering::Relaxed)))
    }
}

impl Layout for Split {
    const SIZES: &'static str = "a power of two";

    fn has_size(size: u32) -> bool {
        size.is_power_of_two()
    }

    #[inline]
    fn generation(&self) -> u64 {
        self.parts.generation
    }

    #[inline]
    fn follow(&mut self, table: &Table, setup: &Setup) -> Result<(), Violation> {
        if table.generation() != self.parts.generation {
            self.parts = Parts::find(table, setup)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn look(&mut self) -> Result<bool, Violation> {
        if self.next != self.seen || !self.again.is_empty() {
            return Ok(true);
        }
        // Acquire: entries and descriptors that the driver wrote before it moved its index are seen after it.
        let index = self.parts.avail.load16(INDEX, Ordering::Acquire);
        let ahead = index.wrapping_sub(self.next);
        if ahead > self.size {
            let detail = format!("from {} to {index} in a ring of {}", self.next, self.size);
            return Err(Violation::new(Rule::IndexJump, detail));
        }
        self.seen = index;
        Ok(ahead != 0)
    }

    /// Descriptors lie anywhere in their table, and the driver has just written them: one after the other, each would be
    /// waited for.
    #[inline]
    fn approach(&self, limit: usize) {
        let most = u16::try_from(limit).unwrap_or(u16::MAX);
        for ahead in 0..self.seen.wrapping_sub(self.next).min(most) {
            let place = self.next.wrapping_add(ahead) & (self.size - 1);
            let head = self.parts.avail.load16(ENTRIES + 2 * usize::from(place), Ordering::Relaxed);
            // Only to come near it. What is used is read later, once, and checked.
            self.parts.desc.prefetch(DESC_BYTES * usize::from(head & (self.size - 1)));
        }
    }

    #[inline(always)]
    fn name(&self) -> u16 {
        match self.again.front() {
            Some(&head) => head,
            None => self.entry(self.next),
        }
    }

    #[inline]
    fn chain(&mut self, table: &Table, setup: &Setup, chain: &mut impl Gather) -> Result<(), Violation> {
        // Its own, and not the driver's once more.
        let head = chain.head();
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                let detail = format!("{index} in a ring of {}", self.size);
                return Err(Violation::new(Rule::DescriptorOutOfRange, detail));
            }
            let desc = self.desc(index);
            if desc.has(DESC_INDIRECT) {
                return self.indirect(table, setup, chain, &desc);
            }
            chain.push(table, desc.address, desc.size, desc.has(DESC_WRITE), self.size)?;
            if !desc.has(DESC_NEXT) {
                return Ok(());
            }
            index = desc.next;
        }
        // As many as there are, and one more: some came twice.
        Err(Violation::new(Rule::DescriptorLoop, format!("in the chain of {head}")))
    }

    #[inline(always)]
    fn singles(&mut self, into: &mut [Single]) -> usize {
        // What others left in flight comes before what the driver's index says.
        if !self.again.is_empty() {
            return 0;
        }
        let words = self.parts.desc.words64(0, 2 * usize::from(self.size));
        let load = |at: usize| u64::from_le(words[at].load(Ordering::Relaxed));
        let most = into.len().min(usize::from(self.seen.wrapping_sub(self.next)));
        for (ahead, single) in into[..most].iter_mut().enumerate() {
            let head = self.entry(self.next.wrapping_add(ahead as u16));
            if head >= self.size {
                return ahead;
            }
            let at = 2 * usize::from(head);
            let desc = Desc::from_words([load(at), load(at + 1)]);
            if desc.has(DESC_NEXT | DESC_INDIRECT) {
                return ahead;
            }
            *single = Single { head, address: desc.address, size: desc.size, write: desc.has(DESC_WRITE) };
        }
        most
    }

    #[inline(always)]
    fn took(&mut self, singles: &[Single]) {
        if let Some(inflight) = &mut self.inflight {
            singles.iter().for_each(|single| inflight.take(single.head));
        }
        self.next = self.next.wrapping_add(singles.len() as u16);
    }

    #[inline(always)]
    fn taken(&mut self, chain: Taken) {
        if !self.again.is_empty() {
            self.again.pop_front();
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.take(chain.head);
        }
        self.next = self.next.wrapping_add(1);
    }

    #[inline]
    fn ask(&mut self, notify: bool) -> bool {
        let was = std::mem::replace(&mut self.suppressing, !notify);
        if self.event_idx {
            // For silence there is nothing to write: the event lies behind the index now, and a driver that passes it
            // again, 65536 entries later, notifies once too often at worst.
            if notify {
                self.parts.used.store16(used_bytes(self.size), self.next, Ordering::Relaxed);
            }
            return notify;
        }
        if was == notify {
            self.parts.used.store16(0, if notify { 0 } else { SUPPRESS }, Ordering::Relaxed);
        }
        was == notify
    }

    fn asked(&self) -> (u64, u64) {
        (self.device + if self.event_idx { used_bytes(self.size) as u64 } else { 0 }, 2)
    }

    #[inline]
    fn prepare(&self, count: usize) {
        let place = usize::from(self.used) & self.mask;
        self.parts.used.prepare(ENTRIES + USED_BYTES * place, USED_BYTES * count, true);
    }

    #[inline(always)]
    fn show(&mut self, used: &[Used]) -> bool {
        if used.is_empty() {
            return false;
        }
        for (ahead, used) in used.iter().enumerate() {
            let place = ENTRIES + USED_BYTES * (usize::from(self.used.wrapping_add(ahead as u16)) & self.mask);
            self.parts.used.store32(place, u32::from(used.head), Ordering::Relaxed);
            self.parts.used.store32(place + 4, used.written, Ordering::Relaxed);
        }
        if let Some(inflight) = &mut self.inflight {
            used.iter().for_each(|used| inflight.link(used.head));
        }
        (self.before, self.used) = (self.used, self.used.wrapping_add(used.len() as u16));
        // Release: whoever sees the index sees the elements, and what was written into the buffers.
        self.parts.used.store16(INDEX, self.used, Ordering::Release);
        if let Some(inflight) = &mut self.inflight {
            inflight.shown(self.used);
        }
        true
    }

    /// The entries, and the index.
    fn shown(&self) -> [(u64, u64); 3] {
        let place = self.before & (self.size - 1);
        let count = self.used.wrapping_sub(self.before);
        let first = count.min(self.size - place);
        let entries = self.device + ENTRIES as u64;
        [
            (entries + (USED_BYTES * usize::from(place)) as u64, (USED_BYTES * usize::from(first)) as u64),
            (entries, (USED_BYTES * usize::from(count - first)) as u64),
            (self.device + INDEX as u64, 2),
        ]
    }

    #[inline]
    fn is_awaited(&self) -> bool {
        if self.event_idx {
            let event = self.parts.avail.load16(avail_bytes(self.size), Ordering::Relaxed);
            passes(event, self.used, self.before)
        } else {
            self.parts.avail.load16(0, Ordering::Relaxed) & SUPPRESS == 0
        }
    }

    fn sound(&self) -> Result<(), Violation> {
        match &self.inflight {
            Some(inflight) if inflight.lost() => Err(lost()),
            _ => Ok(()),
        }
    }

    fn next(&self) -> u32 {
        u32::from(self.next.wrapping_sub(self.again.len() as u16))
    }

    fn unused(&self, in_flight: usize) -> Option<u32> {
        Some(u32::from((self.next() as u16).wrapping_sub(in_flight as u16)))
    }
}
