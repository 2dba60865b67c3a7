//! The device side of a split ring.

use std::collections::VecDeque;
use std::sync::atomic::{fence, Ordering};
use std::sync::Arc;

use super::inflight::Inflight;
use super::{
    avail_bytes, passes, used_bytes, Desc, DESC_BYTES, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, ENTRIES, INDEX, SUPPRESS,
    USED_BYTES,
};
use crate::mem::{Access, Mapping, Memory, Segments, Table, Window};
use crate::ring::{Chain, MAX_SIZE};
use crate::violation::{Rule, Violation};

/// Pieces of memory that the chains in flight may have together: what a queue can make this process remember. Without
/// it, a large ring of chains that are each as long as the ring would take gigabytes.
pub const MAX_BUFFERS: usize = 1 << 20;

/// What a driver says about its ring before it is used.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Descriptors: a power of two.
    pub size: u32,
    /// Driver address of the descriptor table.
    pub desc: u64,
    /// Driver address of the available ring.
    pub driver: u64,
    /// Driver address of the used ring.
    pub device: u64,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// Where to go on in a ring that was in use before: the index of the next available entry. None: a new ring. A
    /// tracked ring knows better.
    pub resume: Option<u16>,
}

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
        let event = if setup.event_idx { 2 } else { 0 };
        // Alignment is checked twice: as the driver sees it, which is the rule (section 2.7), and as it comes to lie in
        // this process, which atomics need, and which a region at an odd offset of its file spoils.
        let part = |what, address: u64, bytes: usize, align: usize, word: usize, access| {
            if address % align as u64 != 0 {
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
        };
        Ok(Self {
            generation: table.generation(),
            desc: part("descriptor table", setup.desc, DESC_BYTES * size as usize, 16, 8, Access::Read)?,
            avail: part("available ring", setup.driver, avail_bytes(size) + event, 2, 2, Access::Read)?,
            used: part("used ring", setup.device, used_bytes(size) + event, 4, 4, Access::Write)?,
        })
    }
}

/// The device side of a running split ring.
///
/// `take` chains, answer them, `complete` them; when it says so, notify the driver. When `take` gives nothing, wait for
/// the driver's notification. A ring whose driver broke a rule gives nothing any more: make a new one.
pub struct DeviceRing {
    memory: Arc<Memory>,
    setup: Setup,
    parts: Parts,
    size: u16,
    /// Index of the next entry to take.
    next: u16,
    /// The available index as last read: entries before it may be taken without reading it again.
    seen: u16,
    /// Our own used index; the one in memory is written, never read.
    used: u16,
    /// Without EVENT_IDX: what the used ring's flags say.
    suppressing: bool,
    /// Whether what we asked for was written and is not in the log of written pages.
    asked: bool,
    /// A bit a head: taken and not completed.
    taken: Vec<u64>,
    in_flight: usize,
    /// Pieces of memory a head has in flight.
    costs: Vec<u32>,
    buffers: usize,
    /// Where others find what is in flight.
    inflight: Option<Inflight>,
    /// Heads that were in flight before this ring started, to be taken first; entries before `next` named them.
    again: VecDeque<u16>,
    /// Why this ring gives nothing any more, until it was told.
    violation: Option<Violation>,
    broken: bool,
}

impl DeviceRing {
    /// Start at index 0, or go on, with notifications on. A ring that goes on has its used index in memory: whoever
    /// served it before wrote it, and if the driver did since, only its own requests are lost.
    ///
    /// Violation: queue-size (0, not a power of two, above `max_size`), ring-misaligned, ring-outside-memory,
    /// region-lost, log-too-small.
    pub fn new(memory: Arc<Memory>, max_size: u32, setup: Setup) -> Result<Self, Violation> {
        Self::start(memory, max_size, setup, None)
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
        Self::start(memory, max_size, setup, Some((mapping, offset)))
    }

    fn start(
        memory: Arc<Memory>,
        max_size: u32,
        setup: Setup,
        region: Option<(&Arc<Mapping>, u64)>,
    ) -> Result<Self, Violation> {
        let table = memory.snapshot();
        let ring = Self::prepare(memory.clone(), &table, max_size, setup, region);
        // First: what is wrong with zeroes is not the fault of who wrote something else there.
        memory.sound(&table)?;
        if region.is_some_and(|(mapping, _)| mapping.lost()) {
            return Err(inflight_lost());
        }
        ring
    }

    fn prepare(
        memory: Arc<Memory>,
        table: &Table,
        max_size: u32,
        setup: Setup,
        region: Option<(&Arc<Mapping>, u64)>,
    ) -> Result<Self, Violation> {
        if !setup.size.is_power_of_two() || setup.size > max_size.min(MAX_SIZE) {
            let detail = format!("{}, must be a power of two up to {max_size}", setup.size);
            return Err(Violation::new(Rule::QueueSize, detail));
        }
        let size = setup.size as u16;
        let parts = Parts::find(table, &setup)?;
        let used_index = || parts.used.load16(INDEX, Ordering::Acquire);
        let (next, used, inflight, again) = match (region, setup.resume) {
            (Some((mapping, offset)), _) => {
                let used = used_index();
                let (inflight, again) = Inflight::open(mapping, offset, size, used)?;
                let made = parts.avail.load16(INDEX, Ordering::Acquire).wrapping_sub(used);
                if again.len() > usize::from(made) {
                    let detail = format!("{} of {made} that are available", again.len());
                    return Err(Violation::new(Rule::InflightTooMany, detail));
                }
                (used.wrapping_add(again.len() as u16), used, Some(inflight), again)
            }
            (None, None) => (0, 0, None, VecDeque::new()),
            (None, Some(next)) => (next, used_index(), None, VecDeque::new()),
        };
        let mut ring = Self {
            memory,
            setup,
            parts,
            size,
            next,
            seen: next,
            used,
            suppressing: true,
            asked: false,
            taken: vec![0; (size as usize).div_ceil(64)],
            in_flight: 0,
            costs: vec![0; size as usize],
            buffers: 0,
            inflight,
            again,
            violation: None,
            broken: false,
        };
        ring.ask_for_notifications();
        // See `Memory::written`.
        fence(Ordering::SeqCst);
        ring.log_asked()?;
        Ok(ring)
    }

    /// Descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Index of the next available entry to take: where another could go on, once nothing is in flight. What another
    /// left in flight and was not taken again counts as not taken.
    pub fn next(&self) -> u16 {
        self.next.wrapping_sub(self.again.len() as u16)
    }

    /// Chains taken and not completed.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Append the next chains, at most `limit`, to `chains`.
    ///
    /// Notifications are off from the first chain until a call gives none, so whoever got some calls again before it
    /// waits. A violation comes after the chains before it: with them the call succeeds, and the next one fails. After
    /// that there are none. region-lost comes before all others, and without chains.
    pub fn take(&mut self, limit: usize, chains: &mut Vec<Chain>) -> Result<(), Violation> {
        let before = chains.len();
        if self.broken || limit == 0 {
            return self.violation.take().map_or(Ok(()), Err);
        }
        let table = self.memory.snapshot();
        let result = self.take_some(&table, limit, chains).and_then(|()| self.log_asked());
        if let Err(lost) = self.sound(&table) {
            self.broken = true;
            // They may be made of zeroes.
            chains.truncate(before);
            return Err(lost);
        }
        match result {
            Ok(()) => Ok(()),
            Err(violation) => {
                self.broken = true;
                if chains.len() == before {
                    return Err(violation);
                }
                self.violation = Some(violation);
                Ok(())
            }
        }
    }

    fn take_some(&mut self, table: &Table, limit: usize, chains: &mut Vec<Chain>) -> Result<(), Violation> {
        self.find_again(table)?;
        if self.again.is_empty() && !self.look()? {
            self.ask_for_notifications();
            // The driver adds an entry and then looks whether we want to hear of it; we have said that we want to, and
            // now look for entries. Each side's store comes before its load only with a full fence between them: then
            // one of the two at least sees the other's store, and no wakeup is lost.
            fence(Ordering::SeqCst);
            if !self.look()? {
                return Ok(());
            }
        }
        self.ask_for_silence();
        let last = chains.len().saturating_add(limit);
        while chains.len() < last {
            if let Some(&head) = self.again.front() {
                let chain = self.chain(table, head)?;
                self.begin(&chain)?;
                self.again.pop_front();
                chains.push(chain);
                continue;
            }
            if !self.look()? {
                break;
            }
            // The entry was written before the index that `look` acquired.
            let place = ENTRIES + 2 * usize::from(self.next & (self.size - 1));
            let head = self.parts.avail.load16(place, Ordering::Relaxed);
            let chain = self.chain(table, head)?;
            self.begin(&chain)?;
            if let Some(inflight) = &mut self.inflight {
                inflight.take(head);
            }
            self.next = self.next.wrapping_add(1);
            chains.push(chain);
        }
        Ok(())
    }

    /// Whether all memory that this ring uses is still that of its files.
    fn sound(&self, table: &Table) -> Result<(), Violation> {
        self.memory.sound(table)?;
        match &self.inflight {
            Some(inflight) if inflight.lost() => Err(inflight_lost()),
            _ => Ok(()),
        }
    }

    /// Whether there is an entry to take.
    #[inline]
    fn look(&mut self) -> Result<bool, Violation> {
        if self.next != self.seen {
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

    /// Follow the parts when the driver's memory has changed.
    #[inline]
    fn find_again(&mut self, table: &Table) -> Result<(), Violation> {
        if table.generation() != self.parts.generation {
            self.parts = Parts::find(table, &self.setup)?;
        }
        Ok(())
    }

    fn chain(&self, table: &Table, head: u16) -> Result<Chain, Violation> {
        let mut chain = Chain::new(head);
        let mut index = head;
        for _ in 0..self.size {
            if index >= self.size {
                let detail = format!("{index} in a ring of {}", self.size);
                return Err(Violation::new(Rule::DescriptorOutOfRange, detail));
            }
            let desc = self.desc(index);
            if desc.has(DESC_INDIRECT) {
                self.indirect(table, &mut chain, &desc)?;
                return Ok(chain);
            }
            self.push(table, &mut chain, &desc)?;
            if !desc.has(DESC_NEXT) {
                return Ok(chain);
            }
            index = desc.next;
        }
        // As many as there are, and one more: some came twice.
        Err(Violation::new(Rule::DescriptorLoop, format!("in the chain of {head}")))
    }

    /// The entries of an indirect table (section 2.7.5.3), in place of the descriptor that refers to it.
    fn indirect(&self, table: &Table, chain: &mut Chain, desc: &Desc) -> Result<(), Violation> {
        let violation = |rule| {
            let detail = format!("{} bytes at {:#x}, in the chain of {}", desc.size, desc.address, chain.head());
            Violation::new(rule, detail)
        };
        if !self.setup.indirect {
            return Err(violation(Rule::IndirectNotNegotiated));
        }
        if desc.has(DESC_NEXT) {
            return Err(violation(Rule::IndirectNext));
        }
        if desc.size == 0 || desc.size % DESC_BYTES as u32 != 0 {
            return Err(violation(Rule::IndirectTableSize));
        }
        let count = desc.size / DESC_BYTES as u32;
        if count > u32::from(self.size) {
            return Err(violation(Rule::IndirectTableTooLong));
        }
        let entries = Entries::find(table, desc)?;
        let mut index = 0;
        for _ in 0..count {
            if index >= count {
                let detail = format!("{index} in an indirect table of {count}");
                return Err(Violation::new(Rule::DescriptorOutOfRange, detail));
            }
            let desc = entries.desc(index as usize);
            if desc.has(DESC_INDIRECT) {
                return Err(Violation::new(Rule::IndirectNested, format!("in the chain of {}", chain.head())));
            }
            self.push(table, chain, &desc)?;
            if !desc.has(DESC_NEXT) {
                return Ok(());
            }
            index = u32::from(desc.next);
        }
        let detail = format!("in the indirect table of the chain of {}", chain.head());
        Err(Violation::new(Rule::DescriptorLoop, detail))
    }

    #[inline]
    fn push(&self, table: &Table, chain: &mut Chain, desc: &Desc) -> Result<(), Violation> {
        chain.push(table, desc.address, desc.size, desc.has(DESC_WRITE))?;
        if chain.descriptors() > u32::from(self.size) {
            let detail = format!("in a ring of {}, the chain of {}", self.size, chain.head());
            return Err(Violation::new(Rule::ChainTooLong, detail));
        }
        Ok(())
    }

    /// Read a descriptor, once.
    #[inline]
    fn desc(&self, index: u16) -> Desc {
        let place = DESC_BYTES * usize::from(index);
        // Relaxed: ordered by the index, see `look`. Two words, each loaded once: what was checked is what is used.
        let address = self.parts.desc.load64(place, Ordering::Relaxed);
        Desc::from_words(address, self.parts.desc.load64(place + 8, Ordering::Relaxed))
    }

    /// Remember that a chain is in flight.
    fn begin(&mut self, chain: &Chain) -> Result<(), Violation> {
        let (word, bit) = bit(chain.head());
        // Also what bounds the requests in flight: without it a driver could make one chain available for ever.
        if self.taken[word] & bit != 0 {
            return Err(Violation::new(Rule::DescriptorInUse, format!("{}", chain.head())));
        }
        if self.buffers + chain.cost() > MAX_BUFFERS {
            return Err(Violation::new(Rule::TooManyBuffers, format!("more than {MAX_BUFFERS} in flight")));
        }
        self.taken[word] |= bit;
        self.in_flight += 1;
        self.buffers += chain.cost();
        self.costs[usize::from(chain.head())] = chain.cost() as u32;
        Ok(())
    }

    /// Put chains, each with the bytes written, into the used ring, and show them all at once. True when the driver is
    /// to be notified. All of their writable memory counts as written.
    ///
    /// Those that are not in flight are left out. Violation: ring-outside-memory, ring-misaligned (the memory has
    /// changed); then nothing is completed, now or later. log-too-small, region-lost: they are completed as far as that
    /// goes, and the ring gives nothing any more.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete_chains<'a>(
        &mut self,
        chains: impl Iterator<Item = (&'a Chain, u32)> + Clone,
    ) -> Result<bool, Violation> {
        self.put(chains.clone().map(|(chain, written)| (chain.head(), written)), chains.map(|(chain, _)| chain))
    }

    /// As `complete_chains` by their heads, where nobody logs what is written: of that, only the ring's own is said.
    #[must_use = "the driver may be waiting for a notification"]
    pub fn complete(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) -> Result<bool, Violation> {
        self.put(chains, std::iter::empty())
    }

    fn put<'a>(
        &mut self,
        heads: impl IntoIterator<Item = (u16, u32)>,
        chains: impl Iterator<Item = &'a Chain>,
    ) -> Result<bool, Violation> {
        let table = self.memory.snapshot();
        if let Err(violation) = self.find_again(&table) {
            self.broken = true;
            // Nothing is in flight any more, even if the memory comes back.
            self.taken.fill(0);
            (self.in_flight, self.buffers) = (0, 0);
            return Err(violation);
        }
        let old = self.used;
        for (head, written) in heads {
            let (word, bit) = bit(head);
            if head >= self.size || self.taken[word] & bit == 0 {
                continue;
            }
            self.taken[word] &= !bit;
            self.in_flight -= 1;
            self.buffers -= self.costs[usize::from(head)] as usize;
            let place = ENTRIES + USED_BYTES * usize::from(self.used & (self.size - 1));
            self.parts.used.store32(place, u32::from(head), Ordering::Relaxed);
            self.parts.used.store32(place + 4, written, Ordering::Relaxed);
            if let Some(inflight) = &mut self.inflight {
                inflight.link(head);
            }
            self.used = self.used.wrapping_add(1);
        }
        if self.used == old {
            return Ok(false);
        }
        // Release: whoever sees the index sees the elements, and what was written into the buffers.
        self.parts.used.store16(INDEX, self.used, Ordering::Release);
        if let Some(inflight) = &mut self.inflight {
            inflight.shown(self.used);
        }
        // The index must be out before we look whether the driver waits for it; the driver does the reverse. See
        // `take_some` for why nothing less than a full fence will do.
        fence(Ordering::SeqCst);
        // Behind the fence, and so after the used index: see `Memory::written`.
        let ring = self.used_ranges(old);
        let buffers = chains.flat_map(|chain| chain.writable().ranges());
        let said = self.memory.written(|| buffers.chain(ring));
        if let Err(violation) = self.sound(&table).and(said) {
            self.broken = true;
            return Err(violation);
        }
        Ok(if self.setup.event_idx {
            let event = self.parts.avail.load16(avail_bytes(self.size), Ordering::Relaxed);
            passes(event, self.used, old)
        } else {
            self.parts.avail.load16(0, Ordering::Relaxed) & SUPPRESS == 0
        })
    }

    /// What the used ring has of its entries from `old` on, and its index: driver addresses and bytes.
    fn used_ranges(&self, old: u16) -> [(u64, u64); 3] {
        let place = old & (self.size - 1);
        let count = self.used.wrapping_sub(old);
        let first = count.min(self.size - place);
        let entries = self.setup.device + ENTRIES as u64;
        [
            (entries + (USED_BYTES * usize::from(place)) as u64, (USED_BYTES * usize::from(first)) as u64),
            (entries, (USED_BYTES * usize::from(count - first)) as u64),
            (self.setup.device + INDEX as u64, 2),
        ]
    }

    /// Say in the log that we have written what we ask the driver for. Silence is not fenced from this: should a log
    /// begin at this very moment, it may be missing there; but whoever goes on with the ring asks anew.
    fn log_asked(&mut self) -> Result<(), Violation> {
        if !std::mem::replace(&mut self.asked, false) {
            return Ok(());
        }
        let place = if self.setup.event_idx { used_bytes(self.size) as u64 } else { 0 };
        self.memory.written(|| [(self.setup.device + place, 2)])
    }

    /// Notifications on, from the next entry on. The caller looks again after a full fence.
    fn ask_for_notifications(&mut self) {
        if self.setup.event_idx {
            self.parts.used.store16(used_bytes(self.size), self.next, Ordering::Relaxed);
            self.asked = true;
        } else if self.suppressing {
            self.parts.used.store16(0, 0, Ordering::Relaxed);
            self.asked = true;
        }
        self.suppressing = false;
    }

    /// Notifications off: a hint, that the driver may see late.
    fn ask_for_silence(&mut self) {
        // With EVENT_IDX there is nothing to write: the event lies behind the index now, and a driver that passes it
        // again, 65536 entries later, notifies once too often at worst.
        if !self.setup.event_idx && !self.suppressing {
            self.parts.used.store16(0, SUPPRESS, Ordering::Relaxed);
            self.asked = true;
        }
        self.suppressing = true;
    }
}

fn inflight_lost() -> Violation {
    Violation::new(Rule::RegionLost, "the file of what is in flight was truncated")
}

fn bit(head: u16) -> (usize, u64) {
    (usize::from(head / 64), 1 << (head % 64))
}

/// An indirect table in the driver's memory: aligned or not, in one piece or several.
enum Entries {
    Words(Window),
    Bytes(Segments),
}

impl Entries {
    fn find(table: &Table, desc: &Desc) -> Result<Self, Violation> {
        let size = u64::from(desc.size);
        match table.window(desc.address, size, Access::Read) {
            Some(window) if window.is_aligned(8) => Ok(Self::Words(window)),
            _ => {
                let mut segments = Segments::default();
                table.translate(desc.address, size, Access::Read, &mut segments)?;
                Ok(Self::Bytes(segments))
            }
        }
    }

    /// Read an entry, once.
    fn desc(&self, index: usize) -> Desc {
        let place = DESC_BYTES * index;
        match self {
            // Relaxed: see `DeviceRing::desc`.
            Self::Words(window) => {
                Desc::from_words(window.load64(place, Ordering::Relaxed), window.load64(place + 8, Ordering::Relaxed))
            }
            Self::Bytes(segments) => {
                let mut bytes = [0; DESC_BYTES];
                segments.read_once(place as u64, &mut bytes);
                let [low, high] = [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte])));
                Desc::from_words(low, high)
            }
        }
    }
}
