//! What a packed ring has in flight, in its region: see `ring::inflight`.
//!
//! A chain's place in the ring is written over by what is used, so that its descriptors are copied into entries of the
//! region, which come off a list of free ones and go back to it. The header has the head of that list and the used place
//! twice: as they become, and as they were at the last end of a batch. Taking a chain counts when the old head of the
//! list is the new one. A batch counts when the driver sees it, which the first of its used descriptors tells: whoever
//! comes next either completes what is left to do of it, or takes back what was done.
//!
//! Fields that belong together are stored at once, so that no end comes between them. Others do not, as DPDK does not.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::{Place, Rest, DESC_NEXT};
use crate::mem::{Mapping, Window};
use crate::ring::inflight::{find, sort, ALIGN, FEATURES, THE_VERSION, VERSION};
use crate::violation::{Rule, Violation};

/// One word: version, u16 descriptors, u16 head of the free entries, u16 the same before.
const LISTS: usize = VERSION;
/// One word: u16 used index, u16 the same before, u8 wrap counter of the used index, u8 the same before; nothing.
const USED: usize = 16;
const DESCS: usize = 32;

const DESC_BYTES: usize = 32;
/// One word: u8 mark, nothing, u16 next entry; of the first of a chain: u16 last entry, u16 descriptors.
const STATE: usize = 0;
const NEXT: usize = 2;
const COUNTER: usize = 8;
/// One word: u16 id, u16 flags, u32 length: those of a descriptor of the ring, the halves the other way round.
const REST: usize = 16;
const ADDRESS: usize = 24;

/// Bytes that the region of a queue of `size` takes.
pub const fn inflight_bytes(size: u16) -> usize {
    (DESCS + DESC_BYTES * size as usize).next_multiple_of(ALIGN)
}

/// A chain that a predecessor took.
pub(super) struct Again {
    /// Its first entry.
    entry: u16,
    /// Its descriptors: address, and what else they say.
    pub descs: Vec<(u64, Rest)>,
}

/// What a region says of a ring that was served before.
pub(super) struct Left {
    /// Where the next used descriptor goes.
    pub used: Place,
    /// What is in flight, in the order in which it was taken.
    pub again: VecDeque<Again>,
}

/// What the entries of a region say.
struct Found {
    /// Chains in flight, each behind its counter.
    again: Vec<(u64, Again)>,
    /// Free entries with the mark of what is in flight.
    marked: Vec<u16>,
}

/// The region of one queue.
pub(super) struct Inflight {
    window: Window,
    size: u16,
    /// The number of the next chain that is taken.
    counter: u64,
    /// The head of the free entries, and what it was when the last batch ended.
    free: u16,
    free_before: u16,
    /// Where the next used descriptor went, when the last batch ended.
    used: Place,
    /// By entry: the one behind it, in a chain or in the list of free ones, which ends with what is no entry; of the first
    /// of a chain, the last.
    next: Vec<u16>,
    last: Vec<u16>,
    /// First entries, by the buffer id of their chain.
    entries: Vec<u16>,
    /// First entries of the batch that is about to be shown.
    batch: Vec<u16>,
    /// The descriptors of the chain that is about to be taken.
    descs: Vec<(u64, Rest)>,
}

impl Inflight {
    /// The region at `offset` of a writable mapping, for a ring of `size`: begun when it was never used, with `start` as
    /// the place where the next used descriptor goes, else recovered. `slot` reads a descriptor of the ring.
    ///
    /// Violation: inflight-misaligned, inflight-size, inflight-version, inflight-features, inflight-used-index,
    /// inflight-next, inflight-loop, inflight-counter; what `start` says.
    pub fn open(
        mapping: &Arc<Mapping>,
        offset: u64,
        size: u16,
        start: impl FnOnce() -> Result<Place, Violation>,
        slot: impl FnOnce(u16) -> Rest,
    ) -> Result<(Self, Left), Violation> {
        let (window, before) = find(mapping, offset, DESCS + DESC_BYTES * usize::from(size), size)?;
        let mut region = Self {
            window,
            size,
            counter: 0,
            free: 0,
            free_before: 0,
            used: Place::FIRST,
            next: (1..=size).collect(),
            last: vec![0; usize::from(size)],
            entries: Vec::new(),
            batch: Vec::new(),
            descs: Vec::new(),
        };
        let again = if before {
            region.recover(slot)?
        } else {
            region.begin(start()?);
            VecDeque::new()
        };
        let used = region.used;
        Ok((region, Left { used, again }))
    }

    /// Make a region that says that nothing is in flight. The version comes last: until then it is none.
    fn begin(&mut self, used: Place) {
        self.used = used;
        self.window.store64(FEATURES, 0, Ordering::Release);
        for entry in 0..self.size {
            self.store_state(entry, 0, 0, 0);
        }
        self.store_used(used);
        self.store_lists();
    }

    /// Complete, or take back, what a predecessor was about; what is then in flight, in order.
    fn recover(&mut self, slot: impl FnOnce(u16) -> Rest) -> Result<VecDeque<Again>, Violation> {
        let lists = self.window.load64(LISTS, Ordering::Acquire);
        let used = self.window.load64(USED, Ordering::Acquire);
        let (free, free_before) = ((lists >> 32) as u16, (lists >> 48) as u16);
        let now = (used as u16, (used >> 32) as u8);
        let before = ((used >> 16) as u16, (used >> 40) as u8);
        let place = self.place(before)?;
        // DPDK stores the wrap counter behind the index: then they tell nothing of the batch, which it has ended.
        let ending = now.0 == before.0 && free == free_before;
        let shown = now != before && (ending || !slot(before.0).is_available(place.wrap));
        if shown {
            self.used = self.place(now)?;
            if place.count_to(self.used, self.size).is_none() {
                let detail = format!("from {place:?} to {:?} in a ring of {}", self.used, self.size);
                return Err(Violation::new(Rule::InflightUsedIndex, detail));
            }
            self.free = free;
        } else {
            self.used = place;
            self.free = free_before;
        }
        let Found { mut again, marked } = self.look()?;
        self.counter = sort(&mut again)?;
        self.free_before = self.free;
        // In this order, each is as far as a batch that ends, or one that was only linked.
        if shown {
            self.store_lists();
            self.store_used(self.used);
        } else {
            self.store_used(self.used);
            self.store_lists();
        }
        for entry in marked {
            self.store_mark(entry, 0);
        }
        Ok(again.into_iter().map(|(_, again)| again).collect())
    }

    fn place(&self, (index, wrap): (u16, u8)) -> Result<Place, Violation> {
        if index >= self.size || wrap > 1 {
            let detail = format!("{index}, with a wrap counter of {wrap}, in a ring of {}", self.size);
            return Err(Violation::new(Rule::InflightUsedIndex, detail));
        }
        Ok(Place { index, wrap: wrap == 1 })
    }

    /// Read all entries, each once. Each is free, or belongs to one chain.
    fn look(&mut self) -> Result<Found, Violation> {
        let states: Vec<u64> =
            (0..self.size).map(|entry| self.window.load64(at(entry) + STATE, Ordering::Acquire)).collect();
        let is_marked = |entry: u16| states[usize::from(entry)] as u8 != 0;
        self.next = states.iter().map(|state| (state >> 16) as u16).collect();
        let mut seen = vec![false; usize::from(self.size)];
        let mut see = |entry: u16| {
            if std::mem::replace(&mut seen[usize::from(entry)], true) {
                return Err(Violation::new(Rule::InflightLoop, format!("entry {entry} comes twice")));
            }
            Ok(())
        };
        let mut free = vec![false; usize::from(self.size)];
        let mut entry = self.free;
        // What is no entry ends the list.
        while entry < self.size {
            see(entry)?;
            free[usize::from(entry)] = true;
            entry = self.next[usize::from(entry)];
        }
        let mut again = Vec::new();
        for first in (0..self.size).filter(|entry| is_marked(*entry) && !free[usize::from(*entry)]) {
            let state = states[usize::from(first)];
            let (last, count) = ((state >> 32) as u16, (state >> 48) as u16);
            let wrong =
                || Violation::new(Rule::InflightNext, format!("a chain of {count} entries from {first} to {last}"));
            let mut descs = Vec::new();
            let mut entry = first;
            for number in 1..=count {
                if entry >= self.size {
                    return Err(wrong());
                }
                see(entry)?;
                let rest = self.window.load64(at(entry) + REST, Ordering::Acquire).rotate_left(32);
                descs.push((self.window.load64(at(entry) + ADDRESS, Ordering::Acquire), Rest(rest)));
                if Rest(rest).has(DESC_NEXT) != (number < count) || (entry == last) != (number == count) {
                    return Err(wrong());
                }
                entry = self.next[usize::from(entry)];
            }
            if descs.is_empty() {
                return Err(wrong());
            }
            self.last[usize::from(first)] = last;
            let counter = self.window.load64(at(first) + COUNTER, Ordering::Acquire);
            again.push((counter, Again { entry: first, descs }));
        }
        if let Some(entry) = seen.iter().position(|seen| !seen) {
            let detail = format!("entry {entry} is neither free nor in flight");
            return Err(Violation::new(Rule::InflightNext, detail));
        }
        let marked = (0..self.size).filter(|entry| is_marked(*entry) && free[usize::from(*entry)]).collect();
        Ok(Found { again, marked })
    }

    /// Whether its mapping is.
    pub fn lost(&self) -> bool {
        self.window.lost()
    }

    /// A chain is about to be read.
    #[inline]
    pub fn open_chain(&mut self) {
        self.descs.clear();
    }

    /// One of its descriptors.
    #[inline]
    pub fn read(&mut self, address: u64, rest: Rest) {
        self.descs.push((address, rest));
    }

    /// The chain that was read is taken.
    pub fn take(&mut self, id: u16) {
        let first = self.free;
        let mut last = first;
        for number in 0..self.descs.len() {
            let (address, rest) = self.descs[number];
            last = self.free;
            self.window.store64(at(last) + REST, rest.0.rotate_left(32), Ordering::Release);
            self.window.store64(at(last) + ADDRESS, address, Ordering::Release);
            self.free = self.next[usize::from(last)];
        }
        self.window.store64(at(first) + COUNTER, self.counter, Ordering::Release);
        self.counter += 1;
        self.last[usize::from(first)] = last;
        self.store_state(first, 1, last, self.descs.len() as u16);
        self.free_before = self.free;
        self.store_lists();
        self.name(id, first);
    }

    /// A chain that a predecessor took is taken again.
    pub fn take_again(&mut self, id: u16, again: &Again) {
        self.name(id, again.entry);
    }

    fn name(&mut self, id: u16, entry: u16) {
        let id = usize::from(id);
        if id >= self.entries.len() {
            self.entries.resize((id + 1).next_power_of_two(), 0);
        }
        self.entries[id] = entry;
    }

    /// A chain joins the batch that is about to be shown.
    pub fn link(&mut self, id: u16) {
        let first = self.entries[usize::from(id)];
        let last = self.last[usize::from(first)];
        self.next[usize::from(last)] = self.free;
        self.window.store16(at(last) + NEXT, self.free, Ordering::Release);
        self.free = first;
        self.store_lists();
        self.batch.push(first);
    }

    /// The batch is shown next: behind it, the next used descriptor goes to `used`.
    pub fn show(&self, used: Place) {
        self.store_used(used);
    }

    /// The batch is shown.
    pub fn shown(&mut self, used: Place) {
        for entry in std::mem::take(&mut self.batch) {
            self.store_mark(entry, 0);
        }
        self.free_before = self.free;
        self.store_lists();
        self.used = used;
        self.store_used(used);
    }

    fn store_mark(&self, entry: u16, mark: u8) {
        self.window.store8(at(entry) + STATE, mark, Ordering::Release);
    }

    fn store_state(&self, entry: u16, mark: u8, last: u16, count: u16) {
        let next = self.next[usize::from(entry)];
        let state = u64::from(mark) | u64::from(next) << 16 | u64::from(last) << 32 | u64::from(count) << 48;
        self.window.store64(at(entry) + STATE, state, Ordering::Release);
    }

    fn store_lists(&self) {
        let words = [THE_VERSION, self.size, self.free, self.free_before];
        let lists = words.into_iter().rev().fold(0, |lists, word| lists << 16 | u64::from(word));
        self.window.store64(LISTS, lists, Ordering::Release);
    }

    /// `now`, and what was before.
    fn store_used(&self, now: Place) {
        let before = self.used;
        let indices = u64::from(now.index) | u64::from(before.index) << 16;
        let wraps = u64::from(now.wrap) | u64::from(before.wrap) << 8;
        self.window.store64(USED, indices | wraps << 32, Ordering::Release);
    }
}

/// Offset of an entry.
const fn at(entry: u16) -> usize {
    DESCS + DESC_BYTES * entry as usize
}

#[cfg(test)]
mod tests {
    //! A process that ends after any of its stores: what is left is looked at around each of them, and whoever goes on
    //! from there must give every request once more, or find it completed, and never both.

    use std::cell::RefCell;
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::os::fd::{AsFd, FromRawFd};
    use std::rc::Rc;

    use super::*;
    use crate::mem::{watch, Memory, VolatileSlice};
    use crate::ring::{packed::DeviceRing, Features, Setup, DESC_WRITE};

    const SIZE: u16 = 7;
    const BASE: u64 = 0x10_0000;
    const DRIVER: usize = 0x100;
    const DEVICE: usize = 0x110;
    const REGION: usize = 0x200;
    const BYTES: usize = 0x400;

    /// The memory of a ring and of its region, in one piece.
    struct World {
        mapping: Arc<Mapping>,
        window: Window,
        features: Features,
    }

    impl World {
        fn new(bytes: &[u8], in_order: bool) -> Self {
            // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
            let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
            file.set_len(BYTES as u64).unwrap();
            let mapping = Arc::new(Mapping::new(file.as_fd(), BYTES, 0, true).unwrap());
            mapping.slice(0, BYTES).copy_from(bytes);
            let features = Features { packed: true, event_idx: true, in_order, ..Features::default() };
            Self { window: Window::new(mapping.clone(), 0, BYTES), mapping, features }
        }

        /// A ring that goes on at `start`, if its region does not know better.
        fn ring(&self, start: Place) -> DeviceRing {
            let memory = Arc::new(Memory::new(1, 1 << 20));
            memory.add(BASE, &self.mapping, 0, BYTES as u64, true).unwrap();
            let [driver, device] = [DRIVER, DEVICE].map(|at| BASE + at as u64);
            let (size, features) = (u32::from(SIZE), self.features);
            let resume = Some(u32::from(start.word()) * 0x1_0001);
            let setup = Setup { size, desc: BASE, driver, device, features, resume };
            DeviceRing::tracked(memory, size, setup, &self.mapping, REGION as u64).unwrap()
        }

        fn bytes(&self) -> Vec<u8> {
            let mut bytes = vec![0; BYTES];
            self.mapping.slice(0, BYTES).copy_to_volatile_slice(VolatileSlice::from(&mut bytes[..]));
            bytes
        }

        /// What is left before and after each store of `run`.
        fn ends(&self, run: impl FnOnce()) -> Vec<Vec<u8>> {
            let ends = Rc::new(RefCell::new(Vec::new()));
            let (into, mapping) = (ends.clone(), self.mapping.clone());
            let look = Self { window: self.window.clone(), mapping, features: self.features };
            watch::stores(move || into.borrow_mut().push(look.bytes()), run);
            ends.take()
        }
    }

    /// The driver: where it offers next, where it looks next, and its chains, each an id and its descriptors.
    #[derive(Clone)]
    struct Driver {
        start: Place,
        next: Place,
        used: Place,
        chains: Vec<(u16, u16)>,
    }

    impl Driver {
        fn new(start: Place) -> Self {
            Self { start, next: start, used: start, chains: Vec::new() }
        }

        /// Make chains available; with `write`, all but the last descriptor of a chain are the device's to read.
        fn offer(&mut self, world: &World, chains: &[(u16, u16)], write: bool) {
            for &(id, span) in chains {
                for left in (0..span).rev() {
                    let flags = self.next.available()
                        | if left > 0 { DESC_NEXT } else { 0 }
                        | if left == 0 && write { DESC_WRITE } else { 0 };
                    let at = 16 * usize::from(self.next.index);
                    // Only the last tells the id.
                    let rest = Rest::new(1, if left == 0 { id } else { 0xbad }, flags);
                    world.window.store64(at, BASE + u64::from(self.next.index), Ordering::Relaxed);
                    world.window.store64(at + 8, rest.0, Ordering::Relaxed);
                    self.next = self.next.after(1, SIZE);
                }
            }
            self.chains.extend(chains);
        }

        /// The ids that it finds used.
        fn reap(&mut self, world: &World) -> Vec<u16> {
            let mut found = Vec::new();
            loop {
                let rest = Rest(world.window.load64(16 * usize::from(self.used.index) + 8, Ordering::Relaxed));
                if !rest.is_used(self.used.wrap) {
                    return found;
                }
                let at = self.chains.iter().position(|(id, _)| *id == rest.id()).expect("an id that is in flight");
                let first = if world.features.in_order { 0 } else { at };
                for (id, span) in self.chains.drain(first..=at) {
                    found.push(id);
                    self.used = self.used.after(span, SIZE);
                }
            }
        }
    }

    fn heads(ring: &mut DeviceRing, limit: usize) -> Vec<u16> {
        let mut chains = Vec::new();
        ring.take(limit, &mut chains).unwrap();
        chains.iter().map(crate::ring::Chain::head).collect()
    }

    fn complete(ring: &mut DeviceRing, heads: &[u16]) {
        let _ = ring.complete(heads.iter().map(|head| (*head, 0)));
    }

    fn ids(chains: &[(u16, u16)]) -> Vec<u16> {
        chains.iter().map(|(id, _)| *id).collect()
    }

    /// What a driver goes on with, and what it has found.
    type Seen = (World, Driver, Vec<u16>);

    /// Go on from `end`, where a driver had made available what it has, and see that each request is completed once, and
    /// that what is given again comes in the order in which it was offered. With `more`, the driver has used the places
    /// of what was completed for something else by then.
    fn goes_on(end: &[u8], driver: &Driver, in_order: bool, more: bool) -> Seen {
        let world = World::new(end, in_order);
        let mut driver = driver.clone();
        let before = driver.reap(&world);
        if more {
            let free: Vec<_> = before.iter().map(|id| (id + 1000, 1)).collect();
            driver.offer(&world, &free, true);
        }
        let missing = ids(&driver.chains);
        let mut ring = world.ring(driver.start);
        let next = ring.next();
        let given = heads(&mut ring, 100);
        assert_eq!(given, missing, "after {before:?}");
        assert_eq!(heads(&mut ring, 100), [] as [u16; 0]);
        assert_eq!(ring.in_flight(), missing.len());
        if let (Some(unused), false) = (ring.unused(), more) {
            assert_eq!(Place::from_word((next >> 16) as u16), driver.used);
            assert_eq!(unused, u32::from(driver.used.word()) * 0x1_0001);
        }
        // Not all at once: whatever is behind the first must not be seen already.
        let (first, rest) = given.split_at(given.len().min(1));
        let mut found = Vec::new();
        for part in [first, rest] {
            complete(&mut ring, part);
            let now = driver.reap(&world);
            assert_eq!(now.iter().collect::<BTreeSet<_>>(), part.iter().collect(), "after {before:?}, {found:?}");
            found.extend(now);
        }
        assert_eq!(driver.chains, []);
        assert_eq!(driver.used, driver.next);
        assert_eq!(ring.next(), u32::from(driver.next.word()) * 0x1_0001);
        drop(ring);
        assert_eq!(heads(&mut world.ring(driver.start), 100), [] as [u16; 0], "nothing is left");
        (world, driver, [before, found].concat())
    }

    const STARTS: [Place; 3] = [Place::FIRST, Place { index: 5, wrap: false }, Place { index: 3, wrap: true }];
    /// All of the ring.
    const OFFERED: [(u16, u16); 5] = [(40, 2), (7, 1), (300, 1), (9, 2), (2, 1)];

    /// Look at all ends of `run`, and at those of whoever goes on from each of them.
    fn wherever(in_order: bool, write: bool, run: impl Fn(&mut DeviceRing)) {
        for start in STARTS {
            let world = World::new(&[], in_order);
            let mut driver = Driver::new(start);
            driver.offer(&world, &OFFERED, write);
            let ends = world.ends(|| run(&mut world.ring(start)));
            assert!(ends.len() > 100);
            for end in &ends {
                let second = World::new(end, in_order);
                let again = second.ends(|| {
                    let mut ring = second.ring(start);
                    let given = heads(&mut ring, 100);
                    let (late, early) = given.split_at(given.len() / 2);
                    complete(&mut ring, early);
                    complete(&mut ring, late);
                });
                for end in again.iter().chain([end]) {
                    for more in [false, true] {
                        goes_on(end, &driver, in_order, more);
                    }
                }
            }
        }
    }

    #[test]
    fn wherever_it_ends_no_request_is_lost_and_none_is_completed_twice() {
        wherever(false, true, |ring| {
            assert_eq!(heads(ring, 2), [40, 7]);
            complete(ring, &[7]);
            assert_eq!(heads(ring, 100), [300, 9, 2]);
            complete(ring, &[2, 40, 300]);
            complete(ring, &[9]);
        });
    }

    #[test]
    fn a_batch_may_be_all_of_the_ring() {
        wherever(false, true, |ring| {
            assert_eq!(heads(ring, 100), ids(&OFFERED));
            complete(ring, &[9, 2, 40, 300, 7]);
        });
    }

    #[test]
    fn used_descriptors_that_stand_for_others_are_no_different() {
        for write in [false, true] {
            wherever(true, write, |ring| {
                assert_eq!(heads(ring, 3), [40, 7, 300]);
                complete(ring, &[300]);
                complete(ring, &[40]);
                assert_eq!(heads(ring, 100), [9, 2]);
                complete(ring, &[7, 9]);
                complete(ring, &[2]);
            });
        }
    }

    #[test]
    fn it_goes_on_with_new_requests_after_any_end() {
        let world = World::new(&[], false);
        let mut driver = Driver::new(Place::FIRST);
        driver.offer(&world, &[(2, 3), (5, 1)], true);
        let ends = world.ends(|| {
            let mut ring = world.ring(Place::FIRST);
            assert_eq!(heads(&mut ring, 100), [2, 5]);
            complete(&mut ring, &[5, 2]);
        });
        for end in &ends {
            let (world, mut driver, _) = goes_on(end, &driver, false, false);
            for _ in 0..5 {
                driver.offer(&world, &[(5, 2), (4, 3), (0xffff, 1)], true);
                let (_, after, found) = goes_on(&world.bytes(), &driver, false, false);
                assert_eq!(found, [5, 4, 0xffff]);
                let mut ring = world.ring(driver.start);
                assert_eq!(heads(&mut ring, 2), [5, 4]);
                complete(&mut ring, &[4]);
                assert_eq!(heads(&mut ring, 9), [0xffff]);
                complete(&mut ring, &[0xffff, 5]);
                assert_eq!(driver.reap(&world), [4, 0xffff, 5]);
                assert_eq!(driver.next, after.next);
            }
        }
    }
}
