//! The device side of a packed ring.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::inflight::{Again, Inflight, Left};
use super::{
    is_awaited, Place, Rest, DESC_AVAIL, DESC_INDIRECT, DESC_NEXT, DESC_USED, DESC_WRITE, EVENT_BYTES, EVENT_DESC,
    EVENT_DISABLE, EVENT_ENABLE,
};
use crate::mem::{Access, Mapping, Memory, Table, Window};
use crate::ring::chain::{Gather, Taken};
use crate::ring::device::{part, Layout, Ring, Single, Used};
use crate::ring::indirect::Entries;
use crate::ring::inflight::{lost, sound};
use crate::ring::{Setup, DESC_BYTES};
use crate::violation::{Rule, Violation};

/// The device side of a running packed ring.
pub type DeviceRing = Ring<Packed>;

/// The three parts, as they lie in the memory of one generation.
struct Parts {
    generation: u64,
    desc: Window,
    driver: Window,
    device: Window,
}

impl Parts {
    fn find(table: &Table, setup: &Setup) -> Result<Self, Violation> {
        let desc = ("descriptor ring", setup.desc, DESC_BYTES * setup.size as usize);
        let driver = ("driver's event suppression", setup.driver, EVENT_BYTES);
        let device = ("device's event suppression", setup.device, EVENT_BYTES);
        Ok(Self {
            generation: table.generation(),
            desc: part(table, desc, (16, 8), Access::Write)?,
            driver: part(table, driver, (4, 4), Access::Read)?,
            device: part(table, device, (4, 4), Access::Write)?,
        })
    }
}

/// The layout, from the device's side.
pub struct Packed {
    parts: Parts,
    /// Driver addresses of the descriptor ring and of the device's event suppression.
    desc: u64,
    device: u64,
    size: u16,
    event_idx: bool,
    in_order: bool,
    /// The next descriptor to take, and where the next used one goes.
    next: Place,
    used: Place,
    /// Descriptors from `used` to `next`: of chains that were taken and not used.
    span: u16,
    /// The second word of the descriptor at `next`, once it was seen to be available.
    seen: Option<Rest>,
    /// Where the batch began that was shown last, and how many descriptors it has.
    before: Place,
    shown: u16,
    /// What our event suppression says.
    event: Option<u32>,
    /// What it takes to keep what is in flight for others.
    tracked: Option<Box<Tracked>>,
}

/// What is in flight, for whoever serves the ring next, and from whoever did before.
struct Tracked {
    inflight: Inflight,
    /// What was in flight before this ring started, to be taken first; `span` has its descriptors.
    again: VecDeque<Again>,
    /// Whether that is not what the ring has from `used` on, because some of it was overtaken; until all of it is used.
    moved: bool,
}

impl Tracked {
    /// What `look` has seen while there is something to be taken again: nothing of the ring.
    fn seen(&self) -> Option<Rest> {
        self.again.front().map(|chain| chain.descs[0].1)
    }
}

impl Ring<Packed> {
    /// Start at the first descriptor, or go on, with notifications on.
    ///
    /// What is between the two places of `resume`, taken and not used, is nobody's: its driver does not get it back.
    ///
    /// Violation: queue-size (0, above `max_size`), ring-position, ring-misaligned, ring-outside-memory, region-lost,
    /// log-too-small.
    pub fn new(memory: Arc<Memory>, max_size: u32, setup: Setup) -> Result<Self, Violation> {
        Self::start(memory, max_size, setup, |table, setup| {
            let parts = Parts::find(table, setup)?;
            let (next, used, span) = Packed::resume(setup)?;
            Ok(Packed::new(parts, setup, next, used, span))
        })
    }

    /// As `new`, with the region at `offset` of a writable mapping in which the chains in flight are kept for whoever
    /// serves the ring after this one: those that the one before left are taken again, before all others, as they were.
    ///
    /// Where the ring goes on follows from the region, and `resume` is not looked at, except for a new one: that begins
    /// where the next used descriptor goes. The next available descriptor is always there plus what is in flight. So
    /// whatever was taken beyond it nobody remembers, and it is taken again.
    ///
    /// Violation: as `new`; inflight-misaligned, inflight-size, inflight-version, inflight-features,
    /// inflight-used-index, inflight-next, inflight-loop, inflight-counter.
    pub fn tracked(
        memory: Arc<Memory>,
        max_size: u32,
        setup: Setup,
        mapping: &Arc<Mapping>,
        offset: u64,
    ) -> Result<Self, Violation> {
        let mut taken_back = false;
        let ring = Self::start(memory.clone(), max_size, setup, |table, setup| {
            let parts = Parts::find(table, setup)?;
            let slot = |index| Rest(parts.desc.load64(DESC_BYTES * usize::from(index) + 8, Ordering::Acquire));
            let start = || Packed::resume(setup).map(|(_, used, _)| used);
            let (inflight, left) = Inflight::open(mapping, offset, setup.size as u16, start, slot)?;
            let packed = Packed::recovered(parts, setup, inflight, left);
            taken_back = packed.take_back();
            Ok(packed)
        });
        let ring = sound(mapping, ring)?;
        if taken_back {
            memory.written(|| [(setup.desc, u64::from(setup.size) * DESC_BYTES as u64)])?;
        }
        Ok(ring)
    }
}

impl Packed {
    fn new(parts: Parts, setup: &Setup, next: Place, used: Place, span: u16) -> Self {
        Self {
            parts,
            desc: setup.desc,
            device: setup.device,
            size: setup.size as u16,
            event_idx: setup.features.event_idx,
            in_order: setup.features.in_order,
            next,
            used,
            span,
            seen: None,
            before: used,
            shown: 0,
            event: None,
            tracked: None,
        }
    }

    /// Where to take next and where to use next, and how many descriptors are between. Violation: ring-position.
    fn resume(setup: &Setup) -> Result<(Place, Place, u16), Violation> {
        let size = setup.size as u16;
        let (next, used) = match setup.resume {
            None => (Place::FIRST, Place::FIRST),
            Some(words) => (Place::from_word(words as u16), Place::from_word((words >> 16) as u16)),
        };
        match used.count_to(next, size) {
            Some(span) if next.index < size && used.index < size => Ok((next, used, span)),
            _ => {
                let detail = format!("from {used:?} to {next:?} in a ring of {size}");
                Err(Violation::new(Rule::RingPosition, detail))
            }
        }
    }

    /// As a predecessor left it, with what it had in flight.
    fn recovered(parts: Parts, setup: &Setup, inflight: Inflight, left: Left) -> Self {
        let Left { used, again } = left;
        let span = again.iter().map(|chain| chain.descs.len()).sum::<usize>() as u16;
        let next = used.after(span, setup.size as u16);
        let mut packed = Self::new(parts, setup, next, used, span);
        let mut place = used;
        let mut moved = false;
        for (address, rest) in again.iter().flat_map(|chain| &chain.descs) {
            let at = DESC_BYTES * usize::from(place.index);
            moved |= packed.parts.desc.load64(at, Ordering::Relaxed) != *address || packed.slot(place) != *rest;
            place = place.after(1, packed.size);
        }
        let tracked = Tracked { inflight, again, moved };
        packed.seen = tracked.seen();
        packed.tracked = Some(Box::new(tracked));
        packed
    }

    /// Take back used descriptors of a batch that was never shown: the driver would find them behind the next one. True
    /// when there are any.
    fn take_back(&self) -> bool {
        let mut place = self.used;
        let mut any = false;
        for _ in 0..self.span {
            let rest = self.slot(place);
            if rest.is_used(place.wrap) {
                any = true;
                let rest = Rest::new(rest.size(), rest.id(), place.available());
                self.store(place, rest, Ordering::Release);
            }
            place = place.after(1, self.size);
        }
        any
    }

    fn slot(&self, place: Place) -> Rest {
        Rest(self.parts.desc.load64(DESC_BYTES * usize::from(place.index) + 8, Ordering::Acquire))
    }

    /// One descriptor of a chain.
    #[inline]
    fn gather(
        &self,
        table: &Table,
        setup: &Setup,
        chain: &mut impl Gather,
        (address, rest): (u64, Rest),
    ) -> Result<(), Violation> {
        if rest.has(DESC_INDIRECT) {
            return self.indirect(table, setup, chain, address, rest);
        }
        chain.push(table, address, rest.size(), rest.has(DESC_WRITE), self.size)
    }

    /// The entries of an indirect table (section 2.8.7), in place of the descriptor that refers to it.
    fn indirect(
        &self,
        table: &Table,
        setup: &Setup,
        chain: &mut impl Gather,
        address: u64,
        rest: Rest,
    ) -> Result<(), Violation> {
        let violation =
            |rule| Violation::new(rule, format!("{} bytes at {address:#x}, at {:?}", rest.size(), self.next));
        if !setup.features.indirect {
            return Err(violation(Rule::IndirectNotNegotiated));
        }
        if rest.has(DESC_NEXT) {
            return Err(violation(Rule::IndirectNext));
        }
        let entries = Entries::find(table, address, rest.size(), self.size, chain)?;
        for index in 0..entries.count() {
            // One after the other, and no flag but this means anything there.
            let [address, rest] = entries.words(index);
            chain.push(table, address, Rest(rest).size(), Rest(rest).has(DESC_WRITE), self.size)?;
        }
        Ok(())
    }

    /// Read the next chain from the ring, and say what each of its descriptors was.
    #[inline]
    fn read(
        &self,
        table: &Table,
        setup: &Setup,
        chain: &mut impl Gather,
        mut keep: impl FnMut(u64, Rest),
    ) -> Result<(), Violation> {
        let mut place = self.next;
        let mut seen = self.seen;
        for span in 1..=self.size - self.span {
            let at = DESC_BYTES * usize::from(place.index);
            // Relaxed: written before the flags of the first, see `look`. Each word is loaded once.
            let rest = seen.take().unwrap_or_else(|| Rest(self.parts.desc.load64(at + 8, Ordering::Relaxed)));
            let address = self.parts.desc.load64(at, Ordering::Relaxed);
            if !rest.is_available(place.wrap) {
                let detail = format!("{} of the chain at {}", place.index, self.next.index);
                return Err(Violation::new(Rule::DescriptorNotAvailable, detail));
            }
            keep(address, rest);
            self.gather(table, setup, chain, (address, rest))?;
            if !rest.has(DESC_NEXT) {
                chain.end(rest.id(), span);
                return Ok(());
            }
            place = place.after(1, self.size);
        }
        let (rule, what) = if self.span == 0 {
            (Rule::ChainTooLong, "is as long as the ring, and goes on")
        } else {
            (Rule::DescriptorInUse, "goes on in what is in flight")
        };
        Err(Violation::new(rule, format!("the chain at {} {what}", self.next.index)))
    }

    /// The next chain, of a predecessor or from the ring.
    fn chain_tracked(
        &self,
        table: &Table,
        setup: &Setup,
        chain: &mut impl Gather,
        tracked: &mut Tracked,
    ) -> Result<(), Violation> {
        let Some(again) = tracked.again.front() else {
            tracked.inflight.open_chain();
            return self.read(table, setup, chain, |address, rest| tracked.inflight.read(address, rest));
        };
        for desc in &again.descs {
            self.gather(table, setup, chain, *desc)?;
        }
        let last = again.descs[again.descs.len() - 1].1;
        chain.end(last.id(), again.descs.len() as u16);
        Ok(())
    }

    #[inline(always)]
    fn store(&self, place: Place, rest: Rest, order: Ordering) {
        self.parts.desc.store64(DESC_BYTES * usize::from(place.index) + 8, rest.0, order);
    }
}

impl Layout for Packed {
    const SIZES: &'static str = "1 or more,";

    fn has_size(_size: u32) -> bool {
        true
    }

    #[inline]
    fn generation(&self) -> u64 {
        self.parts.generation
    }

    #[inline]
    fn follow(&mut self, table: &Table, setup: &Setup) -> Result<(), Violation> {
        if table.generation() != self.parts.generation {
            self.parts = Parts::find(table, setup)?;
            // Of the memory from before.
            self.seen = self.tracked.as_ref().and_then(|tracked| tracked.seen());
        }
        Ok(())
    }

    #[inline(always)]
    fn look(&mut self) -> Result<bool, Violation> {
        if self.seen.is_some() {
            return Ok(true);
        }
        // All of the ring is taken: this is the first descriptor of that, whatever it says.
        if self.span == self.size {
            return Ok(false);
        }
        // Acquire: the rest of the chain, and its buffers, which the driver wrote before these flags, are seen after them.
        // One load: the flags that were looked at are of the length and the id that are used.
        let place = DESC_BYTES * usize::from(self.next.index) + 8;
        let rest = Rest(self.parts.desc.load64(place, Ordering::Acquire));
        if rest.is_available(self.next.wrap) {
            self.seen = Some(rest);
        }
        Ok(self.seen.is_some())
    }

    #[inline]
    fn approach(&self, limit: usize) {
        // A caller may want all that there is.
        let most = limit.min(usize::from(self.size));
        self.parts.desc.prepare(DESC_BYTES * usize::from(self.next.index) + 1, DESC_BYTES * most, false);
    }

    /// What it is called, the last descriptor says; until then the place of the first, for people.
    #[inline(always)]
    fn name(&self) -> u16 {
        self.next.index
    }

    #[inline]
    fn chain(&mut self, table: &Table, setup: &Setup, chain: &mut impl Gather) -> Result<(), Violation> {
        let Some(mut tracked) = self.tracked.take() else {
            return self.read(table, setup, chain, |_, _| ());
        };
        let read = self.chain_tracked(table, setup, chain, &mut tracked);
        self.tracked = Some(tracked);
        read
    }

    #[inline(always)]
    fn singles(&mut self, into: &mut [Single]) -> usize {
        // What is kept for others is kept of every descriptor.
        if self.tracked.is_some() {
            return 0;
        }
        let most = into.len().min(usize::from(self.size - self.span));
        let (mut free, mut count, mut seen) = (into[..most].iter_mut(), 0, self.seen);
        // To the end of the ring, and from its beginning, in the next lap.
        let (before, behind) =
            self.parts.desc.words64(0, 2 * usize::from(self.size)).split_at(2 * usize::from(self.next.index));
        let available = self.next.available();
        for (words, available) in [(behind, available), (before, available ^ (DESC_AVAIL | DESC_USED))] {
            for words in words.chunks_exact(2) {
                let Some(single) = free.next() else { return count };
                // Acquire: as in `look`, of which each is the next.
                let rest = seen.take().unwrap_or_else(|| Rest(u64::from_le(words[1].load(Ordering::Acquire))));
                if !rest.is(available) || rest.has(DESC_NEXT | DESC_INDIRECT) {
                    return count;
                }
                // Relaxed: written before the flags.
                let address = u64::from_le(words[0].load(Ordering::Relaxed));
                *single = Single { head: rest.id(), address, size: rest.size(), write: rest.has(DESC_WRITE) };
                count += 1;
            }
        }
        count
    }

    #[inline(always)]
    fn took(&mut self, singles: &[Single]) {
        if !singles.is_empty() {
            let count = singles.len() as u16;
            self.seen = None;
            self.span += count;
            self.next = self.next.after(count, self.size);
        }
    }

    #[inline(always)]
    fn taken(&mut self, chain: Taken) {
        self.seen = None;
        if let Some(tracked) = &mut self.tracked {
            if let Some(again) = tracked.again.pop_front() {
                tracked.inflight.take_again(chain.head, &again);
                self.seen = tracked.seen();
                return;
            }
            tracked.inflight.take(chain.head);
        }
        self.span += chain.span;
        self.next = self.next.after(chain.span, self.size);
    }

    #[inline]
    fn ask(&mut self, notify: bool) -> bool {
        let event = match (notify, self.event_idx) {
            (false, _) => EVENT_DISABLE << 16,
            (true, false) => EVENT_ENABLE << 16,
            (true, true) => EVENT_DESC << 16 | u32::from(self.next.word()),
        };
        if self.event == Some(event) {
            return false;
        }
        self.event = Some(event);
        // Both halves at once: a driver never sees a place with the flags of another. (It loads them in one, or the flags
        // first, and finds the place that was written with them or after.)
        self.parts.device.store32(0, event, Ordering::Relaxed);
        true
    }

    fn asked(&self) -> (u64, u64) {
        (self.device, EVENT_BYTES as u64)
    }

    #[inline]
    fn prepare(&self, count: usize) {
        self.parts.desc.prepare(DESC_BYTES * usize::from(self.used.index), DESC_BYTES * count, true);
    }

    #[inline(always)]
    fn show(&mut self, used: &[Used]) -> bool {
        let (mut place, mut first, mut chains) = (self.used, None, used.iter());
        while let Some(mut used) = chains.next() {
            let at = place;
            place = place.after(used.span, self.size);
            // With IN_ORDER the next may stand for one of which nothing is lost by that.
            while self.in_order && !used.writable {
                let Some(next) = chains.next() else { break };
                place = place.after(next.span, self.size);
                used = next;
            }
            // A length is one only where something could be written.
            let flags = at.used() | if used.written > 0 { DESC_WRITE } else { 0 };
            let rest = Rest::new(used.written, used.head, flags);
            // The driver reads no used descriptor before those that come before it, and skips as many as the chain of each
            // had: all but the first may be written at once, and are seen when that one is, whose store releases them.
            match first {
                None => first = Some((at, rest)),
                Some(_) => self.store(at, rest, Ordering::Relaxed),
            }
        }
        if first.is_none() {
            return false;
        }
        let span = used.iter().map(|used| used.span).sum();
        (self.before, self.used) = (self.used, place);
        self.shown = span;
        self.span -= span;
        if let Some(tracked) = &mut self.tracked {
            used.iter().for_each(|used| tracked.inflight.link(used.head));
            tracked.moved &= self.span > 0;
            tracked.inflight.show(place);
        }
        if let Some((at, rest)) = first {
            // Release: whoever sees these flags sees the used descriptors behind it, and what was written into the buffers.
            self.store(at, rest, Ordering::Release);
        }
        if let Some(tracked) = &mut self.tracked {
            tracked.inflight.shown(place);
        }
        true
    }

    /// All descriptors of the chains that were used.
    fn shown(&self) -> [(u64, u64); 3] {
        let first = self.shown.min(self.size - self.before.index);
        let bytes = |count| u64::from(count) * DESC_BYTES as u64;
        [(self.desc + bytes(self.before.index), bytes(first)), (self.desc, bytes(self.shown - first)), (self.desc, 0)]
    }

    #[inline]
    fn is_awaited(&self) -> bool {
        let event = self.parts.driver.load32(0, Ordering::Relaxed);
        is_awaited(event, self.event_idx, self.used, self.shown, self.size)
    }

    fn sound(&self) -> Result<(), Violation> {
        match &self.tracked {
            Some(tracked) if tracked.inflight.lost() => Err(lost()),
            _ => Ok(()),
        }
    }

    fn next(&self) -> u32 {
        let next = match &self.tracked {
            Some(tracked) if !tracked.moved => {
                let again: usize = tracked.again.iter().map(|chain| chain.descs.len()).sum();
                self.used.after(self.span - again as u16, self.size)
            }
            _ => self.next,
        };
        u32::from(next.word()) | u32::from(self.used.word()) << 16
    }

    fn unused(&self, _in_flight: usize) -> Option<u32> {
        let moved = self.tracked.as_ref().is_some_and(|tracked| tracked.moved);
        (!moved).then(|| u32::from(self.used.word()) * 0x1_0001)
    }
}
