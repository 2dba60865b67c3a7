//! What a split ring has in flight, in its region: see `ring::inflight`.
//!
//! Each head that was taken has a mark and a number there; a batch of completions is linked before the used index moves
//! and unmarked after it, so that whoever comes next can tell the completed from the rest wherever its predecessor ended.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::mem::{Mapping, Window};
use crate::ring::inflight::{find, sort, ALIGN, DESC_NUM, FEATURES, THE_VERSION, VERSION};
use crate::violation::{Rule, Violation};

const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const DESCS: usize = 16;

const DESC_BYTES: usize = 16;
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Bytes that the region of a queue of `size` takes.
pub const fn inflight_bytes(size: u16) -> usize {
    (DESCS + DESC_BYTES * size as usize).next_multiple_of(ALIGN)
}

/// The region of one queue.
pub(super) struct Inflight {
    window: Window,
    /// The number of the next head that is taken.
    counter: u64,
    /// The head that was completed last.
    last: u16,
    /// The heads of the batch that is about to be shown.
    batch: Vec<u16>,
}

impl Inflight {
    /// The region at `offset` of a writable mapping, for a ring of `size` whose used index is `used`: begun when it was
    /// never used, else recovered. Also the heads in flight, in the order in which they were taken.
    ///
    /// Violation: inflight-misaligned, inflight-size, inflight-version, inflight-features, inflight-used-index,
    /// inflight-next, inflight-loop, inflight-counter.
    pub fn open(mapping: &Arc<Mapping>, offset: u64, size: u16, used: u16) -> Result<(Self, VecDeque<u16>), Violation> {
        let (window, before) = find(mapping, offset, DESCS + DESC_BYTES * usize::from(size), size)?;
        let mut region = Self { window, counter: 0, last: 0, batch: Vec::new() };
        if before {
            let again = region.recover(size, used)?;
            return Ok((region, again));
        }
        region.begin(size, used);
        Ok((region, VecDeque::new()))
    }

    /// Make a region that says that nothing is in flight. The version comes last: until then it is none.
    fn begin(&mut self, size: u16, used: u16) {
        self.window.store64(FEATURES, 0, Ordering::Release);
        for head in 0..size {
            self.window.store8(place(head) + INFLIGHT, 0, Ordering::Release);
        }
        self.window.store16(DESC_NUM, size, Ordering::Release);
        self.window.store16(LAST_BATCH_HEAD, 0, Ordering::Release);
        self.window.store16(USED_IDX, used, Ordering::Release);
        self.window.store16(VERSION, THE_VERSION, Ordering::Release);
    }

    /// Finish the batch that a predecessor has shown to the driver and not unmarked; what is then in flight, in order.
    fn recover(&mut self, size: u16, used: u16) -> Result<VecDeque<u16>, Violation> {
        let load = |offset| self.window.load16(offset, Ordering::Acquire);
        let last = load(LAST_BATCH_HEAD);
        let before = load(USED_IDX);
        let batch = used.wrapping_sub(before);
        if batch > size {
            let detail = format!("from {before} to {used} in a ring of {size}");
            return Err(Violation::new(Rule::InflightUsedIndex, detail));
        }
        let mut shown = vec![false; usize::from(size)];
        let mut head = last;
        for done in 0..batch {
            if head >= size {
                return Err(Violation::new(Rule::InflightNext, format!("{head} in a ring of {size}")));
            }
            if std::mem::replace(&mut shown[usize::from(head)], true) {
                return Err(Violation::new(Rule::InflightLoop, format!("{done} of a batch of {batch}, then {head}")));
            }
            head = load(place(head) + NEXT);
        }
        let mut again = Vec::new();
        for head in (0..size).filter(|head| !shown[usize::from(*head)]) {
            if self.window.load8(place(head) + INFLIGHT, Ordering::Acquire) != 0 {
                again.push((self.window.load64(place(head) + COUNTER, Ordering::Acquire), head));
            }
        }
        self.counter = sort(&mut again)?;
        // Where the links of the next batch end, which nobody follows so far.
        self.last = last;
        for head in (0..size).filter(|head| shown[usize::from(*head)]) {
            self.window.store8(place(head) + INFLIGHT, 0, Ordering::Release);
        }
        self.window.store16(USED_IDX, used, Ordering::Release);
        Ok(again.into_iter().map(|(_, head)| head).collect())
    }

    /// Whether its mapping is.
    pub fn lost(&self) -> bool {
        self.window.lost()
    }

    /// A head is taken off the available ring.
    pub fn take(&mut self, head: u16) {
        self.window.store64(place(head) + COUNTER, self.counter, Ordering::Release);
        self.counter += 1;
        self.window.store8(place(head) + INFLIGHT, 1, Ordering::Release);
    }

    /// A head joins the batch that is about to be shown.
    pub fn link(&mut self, head: u16) {
        self.window.store16(place(head) + NEXT, self.last, Ordering::Release);
        self.window.store16(LAST_BATCH_HEAD, head, Ordering::Release);
        self.last = head;
        self.batch.push(head);
    }

    /// The batch is shown: the used index is `used`.
    pub fn shown(&mut self, used: u16) {
        for head in self.batch.drain(..) {
            self.window.store8(place(head) + INFLIGHT, 0, Ordering::Release);
        }
        self.window.store16(USED_IDX, used, Ordering::Release);
    }
}

/// Offset of a descriptor's state.
const fn place(head: u16) -> usize {
    DESCS + DESC_BYTES * head as usize
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
    use crate::ring::{split::DeviceRing, Features, Setup};

    const SIZE: u16 = 8;
    const BASE: u64 = 0x10_0000;
    const AVAIL: usize = 0x100;
    const USED: usize = 0x200;
    const REGION: usize = 0x400;
    const BYTES: usize = 0x800;

    /// The memory of a ring and of its region, in one piece.
    struct World {
        mapping: Arc<Mapping>,
        window: Window,
    }

    impl World {
        fn new(bytes: &[u8]) -> Self {
            // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
            let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
            file.set_len(BYTES as u64).unwrap();
            let mapping = Arc::new(Mapping::new(file.as_fd(), BYTES, 0, true).unwrap());
            mapping.slice(0, BYTES).copy_from(bytes);
            Self { window: Window::new(mapping.clone(), 0, BYTES), mapping }
        }

        /// A ring whose indices begin at `start`, with a descriptor for each head.
        fn fresh(start: u16) -> Self {
            let world = Self::new(&[]);
            for head in 0..usize::from(SIZE) {
                world.window.store64(16 * head, BASE, Ordering::Relaxed);
                world.window.store64(16 * head + 8, 1, Ordering::Relaxed);
            }
            world.window.store16(AVAIL + 2, start, Ordering::Relaxed);
            world.window.store16(USED + 2, start, Ordering::Relaxed);
            world
        }

        fn ring(&self) -> DeviceRing {
            let memory = Arc::new(Memory::new(1, 1 << 20));
            memory.add(BASE, &self.mapping, 0, BYTES as u64, true).unwrap();
            let (driver, device) = (BASE + AVAIL as u64, BASE + USED as u64);
            let size = u32::from(SIZE);
            let features = Features { event_idx: true, ..Features::default() };
            let setup = Setup { size, desc: BASE, driver, device, features, resume: Some(999) };
            DeviceRing::tracked(memory, size, setup, &self.mapping, REGION as u64).unwrap()
        }

        fn offer(&self, heads: &[u16]) {
            let index = self.window.load16(AVAIL + 2, Ordering::Relaxed);
            for (count, head) in heads.iter().enumerate() {
                let place = index.wrapping_add(count as u16) % SIZE;
                self.window.store16(AVAIL + 4 + 2 * usize::from(place), *head, Ordering::Relaxed);
            }
            self.window.store16(AVAIL + 2, index.wrapping_add(heads.len() as u16), Ordering::Relaxed);
        }

        /// The heads that the driver sees completed, from used index `start` on.
        fn used(&self, start: u16) -> Vec<u16> {
            let index = self.window.load16(USED + 2, Ordering::Relaxed);
            (0..index.wrapping_sub(start))
                .map(|count| {
                    let place = start.wrapping_add(count) % SIZE;
                    self.window.load32(USED + 4 + 8 * usize::from(place), Ordering::Relaxed) as u16
                })
                .collect()
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
            let look = Self { window: self.window.clone(), mapping };
            watch::stores(move || into.borrow_mut().push(look.bytes()), run);
            ends.take()
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

    /// Go on from `end`, where all of `offered` was made available from index `start` on, and see that each request is
    /// completed once, and that what is given again comes in the order in which it was offered.
    fn goes_on(end: &[u8], start: u16, offered: &[u16]) -> World {
        let world = World::new(end);
        let before = world.used(start);
        let mut ring = world.ring();
        let given = heads(&mut ring, 100);
        assert_eq!(heads(&mut ring, 100), [] as [u16; 0]);
        let missing: Vec<u16> = offered.iter().copied().filter(|head| !before.contains(head)).collect();
        assert_eq!(given, missing, "after {before:?}");
        complete(&mut ring, &given);
        let used = world.used(start);
        assert_eq!(used.len(), offered.len(), "{used:?}");
        assert_eq!(used.iter().collect::<BTreeSet<_>>(), offered.iter().collect());
        assert_eq!(ring.next(), u32::from(start.wrapping_add(offered.len() as u16)));
        drop(ring);
        assert_eq!(heads(&mut world.ring(), 100), [] as [u16; 0], "nothing is left");
        world
    }

    #[test]
    fn wherever_it_ends_no_request_is_lost_and_none_is_completed_twice() {
        // The second over the end of the indices.
        for start in [0, 65533] {
            let world = World::fresh(start);
            let offered = [3, 0, 6, 1, 7];
            world.offer(&offered);
            let ends = world.ends(|| {
                let mut ring = world.ring();
                assert_eq!(heads(&mut ring, 2), [3, 0]);
                complete(&mut ring, &[0]);
                assert_eq!(heads(&mut ring, 100), [6, 1, 7]);
                complete(&mut ring, &[7, 3]);
                complete(&mut ring, &[1, 6]);
            });
            assert!(ends.len() > 40);
            let mut seen = BTreeSet::new();
            for end in &ends {
                seen.insert(World::new(end).used(start).len());
                // Whoever goes on may end anywhere as well.
                let second = World::new(end);
                let again = second.ends(|| {
                    let mut ring = second.ring();
                    let given = heads(&mut ring, 100);
                    let (late, early) = given.split_at(given.len() / 2);
                    complete(&mut ring, early);
                    complete(&mut ring, late);
                });
                goes_on(end, start, &offered);
                again.iter().for_each(|end| drop(goes_on(end, start, &offered)));
            }
            assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 3, 5]);
        }
    }

    #[test]
    fn it_goes_on_with_new_requests_after_any_end() {
        let world = World::fresh(0);
        world.offer(&[2, 5]);
        let ends = world.ends(|| {
            let mut ring = world.ring();
            assert_eq!(heads(&mut ring, 100), [2, 5]);
            complete(&mut ring, &[5, 2]);
        });
        for end in &ends {
            let world = goes_on(end, 0, &[2, 5]);
            world.offer(&[5, 4]);
            goes_on(&world.bytes(), 2, &[5, 4]);
        }
    }
}
