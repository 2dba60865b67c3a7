//! The device side of a ring, whatever its layout: what is taken, what is in flight, and what is shown as used.

use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use super::chain::{Gather, Taken};
use super::{Burst, Chain, Setup, MAX_SIZE};
use crate::guard::losses;
use crate::mem::{Access, Memory, Table, Window};
use crate::violation::{Rule, Violation};

/// Pieces of memory that the chains in flight may have together: what a queue can make this process remember. Without
/// it, a large ring of chains that are each as long as the ring would take gigabytes.
pub const MAX_BUFFERS: usize = 1 << 20;

/// The weight of a burst at which it takes no further chain: long ones shall not keep others waiting.
pub const HEAVY: usize = 4096;

/// What came of completing chains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// None of them was in flight.
    Nothing,
    /// All wait for one before them.
    Waits,
    /// Some are used now.
    Used,
}

/// Chains of one descriptor that are taken at once.
const SINGLES: usize = 32;

/// A chain that is used, as a layout shows it to the driver.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    /// By what the driver knows it.
    pub head: u16,
    /// How many places of the ring it has.
    pub span: u16,
    /// Whether any of it is the device's to write.
    pub writable: bool,
    /// Bytes that were written.
    pub written: u32,
}

/// A chain of one descriptor, as it was read, once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Single {
    /// By what the driver knows it.
    pub head: u16,
    /// Driver address and bytes of its buffer.
    pub address: u64,
    /// As above.
    pub size: u32,
    /// Whether it is the device's to write.
    pub write: bool,
}

/// One layout's half of it: where things are, and how they are read and written. Nothing here is kept of a chain.
pub trait Layout {
    /// What sizes there are, for people.
    const SIZES: &'static str;

    /// Whether a ring can have as many descriptors, which are 1 to 32768.
    fn has_size(size: u32) -> bool;

    /// Of the memory in which the parts were found.
    fn generation(&self) -> u64;

    /// Follow the parts when the driver's memory has changed.
    fn follow(&mut self, table: &Table, setup: &Setup) -> Result<(), Violation>;

    /// Whether there is a chain to take.
    fn look(&mut self) -> Result<bool, Violation>;

    /// Have what describes the next chains near, which `look` has seen, at most so many. A hint.
    fn approach(&self, _limit: usize) {}

    /// By what the next chain, which `look` has seen, is known until it is read.
    fn name(&self) -> u16;

    /// Read the next chain, which `look` has seen, into one that is new and has its name.
    fn chain(&mut self, table: &Table, setup: &Setup, chain: &mut impl Gather) -> Result<(), Violation>;

    /// Read the next chains, the first of which `look` has seen, as far as they are one descriptor each with a buffer of
    /// its own, and there is room for them; how many. What is wrong with one is told when it is read by `chain`, anew.
    fn singles(&mut self, into: &mut [Single]) -> usize;

    /// They were good, and are taken.
    fn took(&mut self, singles: &[Single]);

    /// The chain was good, and is taken.
    fn taken(&mut self, chain: Taken);

    /// Ask for notifications, from the next chain on, or for none. Whether anything was written for it.
    ///
    /// Whoever asks for them looks again after a full fence. Asking for none is a hint, that the driver may see late.
    fn ask(&mut self, notify: bool) -> bool;

    /// Driver address and bytes of what `ask` writes.
    fn asked(&self) -> (u64, u64);

    /// So many chains were taken, and may be used soon: have near what is written then. Not where the driver looks again
    /// and again for the first of them: it would only take that back.
    fn prepare(&self, count: usize);

    /// Let the driver see chains as used, all at once; false when that are none.
    fn show(&mut self, used: &[Used]) -> bool;

    /// Driver addresses and bytes of what was written for what was shown last.
    fn shown(&self) -> [(u64, u64); 3];

    /// Whether the driver wants to hear of what was shown last.
    fn is_awaited(&self) -> bool;

    /// Whether memory of its own was lost. Violation: region-lost.
    fn sound(&self) -> Result<(), Violation> {
        Ok(())
    }

    /// Where another could go on.
    fn next(&self) -> u32;

    /// Where another could go on such that it is given again what is in flight: so many chains, the last that were taken.
    /// None when there is no such place.
    fn unused(&self, in_flight: usize) -> Option<u32>;
}

/// Where chains go that are taken: what is gathered is of the last.
pub(super) trait Chains: Gather {
    fn count(&self) -> usize;

    /// Forget all but the first of them.
    fn truncate(&mut self, count: usize);

    /// A new chain of this name, in memory of this table.
    fn open(&mut self, table: &Arc<Table>, name: u16);

    /// Whether `open_singles` takes any.
    const SINGLES: bool = false;

    /// New chains of one descriptor each, as long as each keeps all rules and its buffer lies in one region, and they weigh
    /// less than `light`; how many.
    fn open_singles(&mut self, _table: &Arc<Table>, _singles: &[Single], _light: usize) -> usize {
        0
    }

    /// The table that the last ones were in, when it is kept at hand.
    fn kept(&self) -> Option<&Arc<Table>> {
        None
    }

    /// How long serving them takes, where as many are taken together as that allows.
    fn weight(&self) -> usize {
        0
    }
}

/// What is in flight of one chain: as few words as it takes, for each is written and read once a request.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// The how manieth that was taken.
    number: u32,
    cost: u32,
    written: u32,
    span: u16,
    state: u16,
}

/// In a slot's state: it is in flight; it is completed, and not yet shown, because one before it is not; some of it is the
/// device's to write.
const TAKEN: u16 = 1;
const DONE: u16 = 2;
const WRITABLE: u16 = 4;

impl Slot {
    /// It is shown: nothing of it is in flight any more.
    #[inline(always)]
    fn used(&mut self, head: u16, written: u32) -> Used {
        let writable = self.state & WRITABLE != 0;
        self.state = 0;
        Used { head, span: self.span, writable, written }
    }
}

/// What is in flight.
struct Book {
    /// By head. In a packed ring that is any number of the driver's choice: as long as the largest that was seen.
    slots: Vec<Slot>,
    in_flight: usize,
    buffers: usize,
    /// Chains taken, modulo 2^32.
    count: u32,
    /// Whether one was used before another that was taken earlier and is in flight still.
    overtaken: bool,
    /// With IN_ORDER: heads by the number that they were taken with, modulo as many as there are places here, of which
    /// there are no fewer than descriptors.
    order: Option<Box<[u16]>>,
    /// How many are completed and wait for one before them.
    waiting: usize,
}

impl Book {
    fn new(size: u16, in_order: bool) -> Self {
        let slots = vec![Slot::default(); usize::from(size)];
        let order = in_order.then(|| vec![0; usize::from(size).next_power_of_two()].into());
        Self { slots, in_flight: 0, buffers: 0, count: 0, overtaken: false, order, waiting: 0 }
    }

    /// Remember that a chain is in flight.
    #[inline(always)]
    fn begin(&mut self, chain: Taken) -> Result<(), Violation> {
        let head = usize::from(chain.head);
        if head >= self.slots.len() {
            self.grow(head);
        }
        let slot = &mut self.slots[head];
        // Also what bounds the requests in flight: without it a driver could make one chain available for ever.
        if slot.state & TAKEN != 0 || self.buffers + chain.cost > MAX_BUFFERS {
            return Err(Self::refusal(head, slot.state & TAKEN != 0));
        }
        self.buffers += chain.cost;
        self.in_flight += 1;
        let state = if chain.writable { TAKEN | WRITABLE } else { TAKEN };
        *slot = Slot { number: self.count, cost: chain.cost as u32, written: 0, span: chain.span, state };
        if let Some(order) = &mut self.order {
            let place = self.count as usize & (order.len() - 1);
            order[place] = chain.head;
        }
        self.count = self.count.wrapping_add(1);
        Ok(())
    }

    /// As `begin`, of chains of one descriptor each, for as long as nothing is wrong with them; how many.
    #[inline(always)]
    fn begin_singles(&mut self, singles: &[Single]) -> usize {
        let Self { slots, count, .. } = self;
        let room = MAX_BUFFERS - self.buffers;
        let mut begun = 0;
        for single in singles.iter().take(room) {
            let Some(slot) = slots.get_mut(usize::from(single.head)).filter(|slot| slot.state & TAKEN == 0) else {
                break;
            };
            let state = if single.write { TAKEN | WRITABLE } else { TAKEN };
            *slot = Slot { number: count.wrapping_add(begun as u32), cost: 1, written: 0, span: 1, state };
            begun += 1;
        }
        if let Some(order) = &mut self.order {
            let mask = order.len() - 1;
            for (ahead, single) in singles[..begun].iter().enumerate() {
                order[count.wrapping_add(ahead as u32) as usize & mask] = single.head;
            }
        }
        self.buffers += begun;
        self.in_flight += begun;
        *count = count.wrapping_add(begun as u32);
        begun
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self, head: usize) {
        self.slots.resize((head + 1).next_power_of_two(), Slot::default());
    }

    #[cold]
    #[inline(never)]
    fn refusal(head: usize, in_use: bool) -> Violation {
        if in_use {
            return Violation::new(Rule::DescriptorInUse, format!("{head}"));
        }
        Violation::new(Rule::TooManyBuffers, format!("more than {MAX_BUFFERS} in flight"))
    }

    /// Chains are completed, each with the bytes written: put into `used` what is to be shown, and tell how many that are.
    /// What is not in flight is left out; None when there was nothing else. There is room in `used` for all in flight.
    #[inline(always)]
    fn complete(&mut self, heads: impl Iterator<Item = (u16, u32)>, used: &mut [Used]) -> Option<usize> {
        let Self { slots, overtaken, .. } = self;
        let oldest = self.count.wrapping_sub(self.in_flight as u32);
        let (mut shown, mut cost, mut waiting) = (0, 0, 0);
        for (head, written) in heads {
            let Some(slot) = slots.get_mut(usize::from(head)).filter(|slot| slot.state & (TAKEN | DONE) == TAKEN)
            else {
                continue;
            };
            if slot.number != oldest.wrapping_add(shown as u32) {
                if self.order.is_some() {
                    slot.written = written;
                    slot.state |= DONE;
                    waiting += 1;
                    continue;
                }
                *overtaken = true;
            }
            used[shown] = slot.used(head, written);
            cost += slot.cost as usize;
            shown += 1;
        }
        let any = shown + waiting > 0;
        self.buffers -= cost;
        self.in_flight -= shown;
        self.overtaken &= self.in_flight > 0;
        self.waiting += waiting;
        if self.waiting > 0 {
            shown += self.complete_in_order(&mut used[shown..]);
        }
        any.then_some(shown)
    }

    /// With IN_ORDER: those that have waited, and are the oldest now.
    #[inline(never)]
    fn complete_in_order(&mut self, used: &mut [Used]) -> usize {
        let Some(order) = &self.order else { return 0 };
        let mut shown = 0;
        while self.waiting > 0 && self.in_flight > 0 {
            let head = order[self.count.wrapping_sub(self.in_flight as u32) as usize & (order.len() - 1)];
            let slot = &mut self.slots[usize::from(head)];
            if slot.state & DONE == 0 {
                break;
            }
            used[shown] = slot.used(head, slot.written);
            self.buffers -= slot.cost as usize;
            self.in_flight -= 1;
            self.waiting -= 1;
            shown += 1;
        }
        shown
    }

    /// Nothing is in flight any more.
    fn clear(&mut self) {
        self.slots.fill(Slot::default());
        (self.in_flight, self.buffers, self.overtaken, self.waiting) = (0, 0, false, 0);
    }
}

/// The device side of a running ring.
///
/// `take` chains, answer them, `complete` them; when it says so, notify the driver. When `take` gives nothing, wait for
/// the driver's notification. A ring whose driver broke a rule gives nothing any more: make a new one.
pub struct Ring<L> {
    memory: Arc<Memory>,
    setup: Setup,
    layout: L,
    book: Book,
    /// Those that are being taken, and shown: nothing in between.
    singles: [Single; SINGLES],
    used: Box<[Used]>,
    /// Whether what we asked for was written and is not in the log of written pages.
    asked: bool,
    /// Why this ring gives nothing any more, until it was told.
    violation: Option<Violation>,
    broken: bool,
}

impl<L: Layout> Ring<L> {
    /// Start with a layout that is found in the driver's memory.
    pub(super) fn start(
        memory: Arc<Memory>,
        max_size: u32,
        setup: Setup,
        find: impl FnOnce(&Table, &Setup) -> Result<L, Violation>,
    ) -> Result<Self, Violation> {
        let table = memory.snapshot();
        let ring = Self::prepare(memory.clone(), &table, max_size, setup, find);
        // First: what is wrong with zeroes is not the fault of who wrote something else there.
        memory.sound(&table)?;
        ring
    }

    fn prepare(
        memory: Arc<Memory>,
        table: &Table,
        max_size: u32,
        setup: Setup,
        find: impl FnOnce(&Table, &Setup) -> Result<L, Violation>,
    ) -> Result<Self, Violation> {
        if setup.size == 0 || setup.size > max_size.min(MAX_SIZE) || !L::has_size(setup.size) {
            let detail = format!("{}, must be {} up to {max_size}", setup.size, L::SIZES);
            return Err(Violation::new(Rule::QueueSize, detail));
        }
        let layout = find(table, &setup)?;
        let book = Book::new(setup.size as u16, setup.features.in_order);
        let singles = [Single::default(); SINGLES];
        let used = vec![Used::default(); setup.size as usize].into();
        let mut ring =
            Self { memory, setup, layout, book, singles, used, asked: false, violation: None, broken: false };
        ring.asked = ring.layout.ask(true);
        // See `Memory::written`.
        fence(Ordering::SeqCst);
        ring.log_asked()?;
        Ok(ring)
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.setup.size as u16
    }

    /// Where another could go on, once nothing is in flight: in a split ring, the index of the next available entry to
    /// take; in a packed one, the place of the next descriptor to take (15 bits) and its wrap counter (1), and the same of
    /// the next to use, above. What another left in flight and was not taken again counts as not taken.
    pub fn next(&self) -> u32 {
        self.layout.next()
    }

    /// As `next`, counting what is in flight as not taken, so that it is given again. None when there is no such place,
    /// because a chain was used before one that was taken earlier and is in flight.
    pub fn unused(&self) -> Option<u32> {
        if self.book.overtaken {
            return None;
        }
        self.layout.unused(self.book.in_flight)
    }

    /// Chains taken and not shown as used.
    pub fn in_flight(&self) -> usize {
        self.book.in_flight
    }

    /// Append the next chains, at most `limit`, to `chains`.
    ///
    /// Notifications are off from the first chain until a call gives none, so whoever got some calls again before it
    /// waits. A violation comes after the chains before it: with them the call succeeds, and the next one fails. After
    /// that there are none. region-lost comes before all others, and without chains.
    pub fn take(&mut self, limit: usize, chains: &mut Vec<Chain>) -> Result<(), Violation> {
        self.take_or_poll(limit, chains, true)
    }

    /// As `take`, for whoever comes again by itself: when there are none, notifications stay as they were.
    pub fn poll(&mut self, limit: usize, chains: &mut Vec<Chain>) -> Result<(), Violation> {
        self.take_or_poll(limit, chains, false)
    }

    /// As `take` or, unless `ask`, `poll`, for whoever is done with the chains soon: see `Burst`.
    pub fn burst(&mut self, limit: usize, burst: &mut Burst, ask: bool) -> Result<(), Violation> {
        self.take_or_poll(limit, burst, ask)
    }

    fn take_or_poll(&mut self, limit: usize, chains: &mut impl Chains, ask: bool) -> Result<(), Violation> {
        let before = chains.count();
        if self.broken || limit == 0 {
            return self.violation.take().map_or(Ok(()), Err);
        }
        let mut table = None;
        let result = self.take_some(&mut table, limit, chains, ask).and_then(|()| self.log_asked());
        if let Err(lost) = self.sound(table.as_deref()) {
            self.broken = true;
            // They may be made of zeroes.
            chains.truncate(before);
            return Err(lost);
        }
        match result {
            Ok(()) => Ok(()),
            Err(violation) => {
                self.broken = true;
                if chains.count() == before {
                    return Err(violation);
                }
                self.violation = Some(violation);
                Ok(())
            }
        }
    }

    /// `table` is filled in as soon as one is needed: who looks in vain, as often as it likes, takes no lock.
    fn take_some(
        &mut self,
        table: &mut Option<Arc<Table>>,
        limit: usize,
        chains: &mut impl Chains,
        ask: bool,
    ) -> Result<(), Violation> {
        if self.memory.generation() != self.layout.generation() {
            self.layout.follow(table.insert(self.memory.snapshot()), &self.setup)?;
        }
        if !self.layout.look()? {
            if !ask {
                return Ok(());
            }
            self.asked |= self.layout.ask(true);
            // The driver makes a chain available and then looks whether we want to hear of it; we have said that we want
            // to, and now look for chains. Each side's store comes before its load only with a full fence between them:
            // then one of the two at least sees the other's store, and no wakeup is lost.
            fence(Ordering::SeqCst);
            if !self.layout.look()? {
                return Ok(());
            }
        }
        self.asked |= self.layout.ask(false);
        let table = table.get_or_insert_with(|| {
            chains.kept().filter(|kept| self.memory.is_current(kept)).cloned().unwrap_or_else(|| self.memory.snapshot())
        });
        // It may have changed at this very moment: chains and the ring are found in one and the same.
        self.layout.follow(table, &self.setup)?;
        let light = chains.weight() + HEAVY;
        let first = chains.count();
        self.layout.approach(limit);
        while chains.count() - first < limit && chains.weight() < light && self.layout.look()? {
            let before = chains.count();
            if self.take_singles(table, limit - (before - first), light, chains) > 0 {
                continue;
            }
            let Self { layout, book, setup, .. } = self;
            chains.open(table, layout.name());
            let begun = layout.chain(table, setup, chains).and_then(|()| book.begin(chains.taken()));
            if let Err(violation) = begun {
                chains.truncate(before);
                return Err(violation);
            }
            layout.taken(chains.taken());
        }
        self.layout.prepare(chains.count() - first);
        Ok(())
    }

    /// Take chains of one descriptor, as nearly all are of a network, all at once: they are read, then found in memory,
    /// then remembered, each of which is a loop that has its few words in registers. How many; what is wrong with the one
    /// behind them, or what it is otherwise, is for `take_some` to find.
    #[inline(always)]
    fn take_singles<C: Chains>(&mut self, table: &Arc<Table>, limit: usize, light: usize, chains: &mut C) -> usize {
        if !C::SINGLES {
            return 0;
        }
        let Self { layout, book, singles, .. } = self;
        let most = limit.min(singles.len());
        let read = layout.singles(&mut singles[..most]);
        let before = chains.count();
        let opened = chains.open_singles(table, &singles[..read], light);
        let begun = book.begin_singles(&singles[..opened]);
        if begun < opened {
            chains.truncate(before + begun);
        }
        layout.took(&singles[..begun]);
        begun
    }

    /// Whether all memory that this ring uses, this table's or the present one's, is still that of its files.
    fn sound(&self, table: Option<&Table>) -> Result<(), Violation> {
        match table {
            Some(table) => self.memory.sound(table)?,
            None if losses() > 0 => self.memory.sound(&self.memory.snapshot())?,
            None => (),
        }
        self.layout.sound()
    }

    /// Give chains back, each with the bytes written, and show them all at once. True when the driver is to be notified.
    /// All of their writable memory counts as written.
    ///
    /// Those that are not in flight are left out. With IN_ORDER a chain is shown as soon as all before it are.
    /// Violation: ring-outside-memory, ring-misaligned (the memory has changed); then nothing is completed, now or
    /// later. log-too-small, region-lost: they are completed as far as that goes, and the ring gives nothing any more.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete_chains<'a>(
        &mut self,
        chains: impl Iterator<Item = (&'a Chain, u32)> + Clone,
    ) -> Result<bool, Violation> {
        let ranges = chains.clone().flat_map(|(chain, _)| chain.writable().ranges());
        self.put(chains.map(|(chain, written)| (chain.head(), written)), ranges)
    }

    /// As `complete_chains`, for the chains of a burst from `first` on, as many as there are numbers of bytes written.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete_burst(&mut self, burst: &Burst, first: usize, written: &[u32]) -> Result<bool, Violation> {
        let shown = self.show_burst(burst, first, written)?;
        fence(Ordering::SeqCst);
        self.say_burst(shown, burst, first, written)
    }

    /// The first half of `complete_burst`. A full fence comes behind it, if anything was completed, and then `say_burst`.
    #[inline]
    pub fn show_burst(&mut self, burst: &Burst, first: usize, written: &[u32]) -> Result<Shown, Violation> {
        self.show(burst.heads(first, written.len()).zip(written.iter().copied()))
    }

    /// The second half of `complete_burst`.
    #[inline]
    pub fn say_burst(&mut self, shown: Shown, burst: &Burst, first: usize, written: &[u32]) -> Result<bool, Violation> {
        self.say(shown, (first..first + written.len()).flat_map(|chain| burst.ranges(chain)))
    }

    /// As `complete_chains` by their heads, where nobody logs what is written: of that, only the ring's own is said.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) -> Result<bool, Violation> {
        self.put(chains, std::iter::empty())
    }

    /// As `complete_chains`, by their heads; `buffers`: driver address and bytes of all that may have been written.
    pub(super) fn put(
        &mut self,
        heads: impl IntoIterator<Item = (u16, u32)>,
        buffers: impl Iterator<Item = (u64, u64)>,
    ) -> Result<bool, Violation> {
        let shown = self.show(heads.into_iter())?;
        // What was shown must be out before we look whether the driver waits for it; the driver does the reverse. See
        // `take_some` for why nothing less than a full fence will do.
        fence(Ordering::SeqCst);
        self.say(shown, buffers)
    }

    #[inline(always)]
    fn show(&mut self, heads: impl Iterator<Item = (u16, u32)>) -> Result<Shown, Violation> {
        if self.memory.generation() != self.layout.generation() {
            if let Err(violation) = self.layout.follow(&self.memory.snapshot(), &self.setup) {
                self.broken = true;
                // Nothing is in flight any more, even if the memory comes back.
                self.book.clear();
                return Err(violation);
            }
        }
        let Some(count) = self.book.complete(heads, &mut self.used) else { return Ok(Shown::Nothing) };
        Ok(if self.layout.show(&self.used[..count]) { Shown::Used } else { Shown::Waits })
    }

    /// Behind the fence, and so after what is shown: see `Memory::written`. What a chain wrote that has to wait for one
    /// before it is in its memory, too.
    #[inline(always)]
    fn say(&mut self, shown: Shown, buffers: impl Iterator<Item = (u64, u64)>) -> Result<bool, Violation> {
        if shown == Shown::Nothing {
            return Ok(false);
        }
        let shown = shown == Shown::Used;
        let ring = shown.then(|| self.layout.shown()).into_iter().flatten();
        let said = self.memory.written(|| buffers.chain(ring));
        if let Err(violation) = self.sound(None).and(said) {
            self.broken = true;
            return Err(violation);
        }
        Ok(shown && self.layout.is_awaited())
    }

    /// Say in the log that we have written what we ask the driver for. Silence is not fenced from this: should a log
    /// begin at this very moment, it may be missing there; but whoever goes on with the ring asks anew.
    fn log_asked(&mut self) -> Result<(), Violation> {
        if !std::mem::replace(&mut self.asked, false) {
            return Ok(());
        }
        self.memory.written(|| [self.layout.asked()])
    }
}

/// A part of a ring, which is in one region: its name for people, its address, bytes, alignment, and its widest word.
pub(super) fn part(
    table: &Table,
    (what, address, bytes): (&str, u64, usize),
    (align, word): (u64, usize),
    access: Access,
) -> Result<Window, Violation> {
    // Alignment is checked twice: as the driver sees it, which is the rule (sections 2.7 and 2.8.10.1), and as it comes
    // to lie in this process, which atomics need, and which a region at an odd offset of its file spoils.
    if address % align != 0 {
        let detail = format!("the {what} at {address:#x} must be aligned to {align} bytes");
        return Err(Violation::new(Rule::RingMisaligned, detail));
    }
    let window = table.window(address, bytes as u64, access).ok_or_else(|| {
        let detail = format!("the {what}, {bytes} bytes at {address:#x}");
        Violation::new(Rule::RingOutsideMemory, detail)
    })?;
    if !window.is_aligned(word) {
        let detail = format!("the {what} at {address:#x} lies at an odd place of its file");
        return Err(Violation::new(Rule::RingMisaligned, detail));
    }
    Ok(window)
}
