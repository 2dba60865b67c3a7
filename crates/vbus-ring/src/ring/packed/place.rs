//! Where a packed ring goes on that was served by somebody who ended without a word, and who kept nothing of it.
//!
//! No side of a packed ring stores its place there. But each descriptor's USED flag is the device's alone: a device that
//! writes one turns it over, and a driver that makes it available again leaves it as it is. So where chains have one
//! descriptor each, all before the place have the flag of its lap, and all behind it that of the lap before. The rest of a
//! longer chain is not written by the device, and looks as if it were behind: then the ring tells nothing, and whoever
//! says where it goes on is believed.
//!
//! A batch is shown by its first used descriptor, which is written last. Whoever ended before that leaves some behind it
//! that are written and that no driver has seen: there what the driver had put is lost, so they cannot be taken back, and
//! of the first nobody knows how much was written. All of them are then given back as if nothing had been.

use std::sync::atomic::Ordering;

use super::{Place, Rest, DESC_NEXT, DESC_USED};
use crate::mem::{Access, Memory};
use crate::ring::device::part;
use crate::ring::{DESC_BYTES, MAX_SIZE};

/// Where the ring of `size` descriptors at the driver's address `desc` goes on, of which a front-end that may know no
/// better says `said`: as `DeviceRing::next` and `Setup::resume` say it. Before that, a batch that was being shown is given
/// back, with no bytes written; the driver has to be notified.
///
/// For rings whose requests were used in the order in which they were made available, each by a used descriptor of its
/// own, and with one descriptor each, as a rule (VIRTIO_F_INDIRECT_DESC). Where that is not so, and the front-end is
/// right, it is believed all the same, but that the ring is as it began. What the driver writes meanwhile changes nothing.
pub fn recover_place(memory: &Memory, desc: u64, size: u32, said: u32) -> u32 {
    let table = memory.snapshot();
    let bytes = DESC_BYTES * size as usize;
    if size == 0 || size > MAX_SIZE || said as u16 != (said >> 16) as u16 {
        return said;
    }
    // What is wrong with it, a ring says when it starts.
    let Ok(window) = part(&table, ("descriptor ring", desc, bytes), (16, 8), Access::Write) else {
        return said;
    };
    let rest_at = |index: u16| DESC_BYTES * usize::from(index) + 8;
    let slots = (0..size as u16).map(|index| Rest(window.load64(rest_at(index), Ordering::Acquire)));
    let slots = slots.collect::<Vec<_>>();
    let Some(found) = search(&slots, Place::from_word(said as u16)) else {
        return said;
    };
    // The first comes last, and shows the others.
    for number in (0..found.unshown).rev() {
        let place = found.place.after(number, size as u16);
        let rest = Rest::new(0, slots[usize::from(place.index)].id(), place.used());
        window.store64(rest_at(place.index), rest.0, Ordering::Release);
    }
    if found.unshown > 0 {
        // A log that is too small is said when the ring starts.
        let _ = memory.written(|| [(desc, bytes as u64)]);
    }
    u32::from(found.place.after(found.unshown, size as u16).word()) * 0x1_0001
}

/// Descriptors of the longest chains that drivers make where they might have made an indirect one (Linux: of the fragments
/// of a frame).
const LONGEST: u16 = 18;

/// What the descriptors tell.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Found {
    /// Behind all that the driver may have seen as used.
    place: Place,
    /// Descriptors from there on of a batch that was being shown.
    unshown: u16,
}

/// What the descriptors tell, if it is another place than the one that is said.
fn search(slots: &[Rest], said: Place) -> Option<Found> {
    let size = slots.len() as u16;
    let is_open = |slot: &Rest| slot.is_available(true) || slot.is_available(false);
    if slots.iter().any(|slot| is_open(slot) && slot.has(DESC_NEXT)) {
        return None;
    }
    let wrap = slots[0].has(DESC_USED);
    let before = slots.iter().take_while(|slot| slot.has(DESC_USED) == wrap).count();
    if slots[before..].iter().any(|slot| slot.has(DESC_USED) == wrap) {
        // The rest of a longer chain, between what is used and not looked at, may look so, and another be behind it.
        let believed = |found: &Found| {
            let beyond = found.place.after(found.unshown, size).count_to(said, size);
            said != Place::FIRST && beyond.is_some_and(|beyond| beyond < LONGEST)
        };
        return find_unshown(slots).filter(|found| !believed(found));
    }
    let place = Place { index: 0, wrap }.after(before as u16, size);
    // The second of two descriptors may look so: of the last chain, behind which that is, or of one a lap before, which is
    // next. But who says that a ring is as it began may just know nothing.
    let is_second = |at: Place| slots[usize::from(at.index)].is_available(at.wrap);
    let believed = place == said
        || said != Place::FIRST
            && (place.after(1, size) == said && is_second(place)
                || said.after(1, size) == place && is_second(Place { wrap: !said.wrap, ..said }));
    (!believed).then_some(Found { place, unshown: 0 })
}

/// The batch that was being shown: its first descriptor still is available, between others that are used. Of several that
/// it may be, the shortest.
fn find_unshown(slots: &[Rest]) -> Option<Found> {
    let size = slots.len() as u16;
    let used = |index: usize| slots[index].has(DESC_USED);
    let alone = |index: &usize| {
        let (before, after) = (index.wrapping_sub(1), index + 1);
        (*index == 0 || used(before) != used(*index)) && (after == slots.len() || used(after) != used(*index))
    };
    // A batch, and one that ends no less than a lap later, leave four stretches of equal flags at most.
    let first = (0..slots.len()).filter(alone).take(4);
    let batches = first.filter_map(|index| {
        let place = Place { index: index as u16, wrap: !used(index) };
        let at = |number| place.after(number, size);
        let is_written = |at: &Place| slots[usize::from(at.index)].is_used(at.wrap);
        let unshown = 1 + (1..size).map(at).take_while(is_written).count() as u16;
        let is_before = |at: Place| slots[usize::from(at.index)].has(DESC_USED) != at.wrap;
        let consistent = slots[index].is_available(place.wrap) && (unshown..size).map(at).all(is_before);
        (unshown > 1 && consistent).then_some(Found { place, unshown })
    });
    batches.min_by_key(|found| found.unshown)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use std::cell::RefCell;
    use std::fs::File;
    use std::os::fd::{AsFd, FromRawFd};
    use std::rc::Rc;
    use std::sync::Arc;

    use super::*;
    use crate::mem::{watch, Mapping, Window};
    use crate::ring::{packed::DeviceRing, Features, Setup, DESC_WRITE};

    /// A ring, as both sides write it: where its device uses and its driver offers, and the chains between.
    struct Model {
        slots: Vec<Rest>,
        used: Place,
        next: Place,
        spans: std::collections::VecDeque<u16>,
    }

    impl Model {
        fn new(size: u16) -> Self {
            let slots = vec![Rest(0); usize::from(size)];
            Self { slots, used: Place::FIRST, next: Place::FIRST, spans: Default::default() }
        }

        fn offer(&mut self, span: u16) {
            let size = self.slots.len() as u16;
            if self.spans.iter().sum::<u16>() + span > size {
                return;
            }
            for left in (0..span).rev() {
                let flags = self.next.available() | if left > 0 { DESC_NEXT } else { DESC_WRITE };
                self.slots[usize::from(self.next.index)] = Rest::new(100, 7, flags);
                self.next = self.next.after(1, size);
            }
            self.spans.push_back(span);
        }

        fn complete(&mut self) {
            if let Some(span) = self.spans.pop_front() {
                self.slots[usize::from(self.used.index)] = Rest::new(100, 7, self.used.used() | DESC_WRITE);
                self.used = self.used.after(span, self.slots.len() as u16);
            }
        }

        /// End before a batch of so many is shown.
        fn complete_unshown(&mut self, count: u16) {
            let first = usize::from(self.used.index);
            let rest = self.slots[first];
            for _ in 0..count {
                self.complete();
            }
            self.slots[first] = rest;
        }

        fn found(&self, said: Place) -> Place {
            search(&self.slots, said).map_or(said, |found| found.place.after(found.unshown, self.slots.len() as u16))
        }
    }

    proptest! {
        /// Of chains of one descriptor each, whatever is said, but for the places beside the right one.
        #[test]
        fn the_ring_tells_where_it_goes_on(
            size in 1..20u16,
            ops in vec(any::<bool>(), 0..200),
            (index, wrap) in (0..20u16, any::<bool>()),
        ) {
            let mut model = Model::new(size);
            for offer in ops {
                if offer {
                    model.offer(1);
                } else {
                    model.complete();
                }
                let said = Place { index: index % size, wrap };
                let beside = said.after(1, size) == model.used || said == model.used.after(1, size);
                if !beside || said == Place::FIRST {
                    prop_assert_eq!(model.found(said), model.used);
                }
            }
        }

        /// Of batches that are no more than half of the ring, whatever is made available before, and after.
        #[test]
        fn a_batch_that_was_being_shown_is_found(
            (size, unshown) in (4..40u16).prop_flat_map(|size| (Just(size), 2..=size / 2)),
            ops in vec(any::<bool>(), 0..200),
            more in 0..40,
        ) {
            let mut model = Model::new(size);
            for offer in ops {
                if offer {
                    model.offer(1);
                } else {
                    model.complete();
                }
            }
            while model.spans.len() < usize::from(unshown) {
                model.offer(1);
            }
            let place = model.used;
            model.complete_unshown(unshown);
            for _ in 0..more {
                // What has not been seen as used, a driver cannot make available again.
                if model.spans.len() < usize::from(size - unshown) {
                    model.offer(1);
                }
            }
            prop_assert_eq!(search(&model.slots, Place::FIRST), Some(Found { place, unshown }));
        }

        /// Of any chains, but where a ring is as it began after two laps.
        #[test]
        fn whoever_is_right_is_believed(size in 1..20u16, ops in vec((0..4u16, 1..6u16), 0..200)) {
            let mut model = Model::new(size);
            for (op, span) in ops {
                if op < 2 {
                    model.offer(if op == 0 { 1 } else { span });
                } else {
                    model.complete();
                }
                if model.used != Place::FIRST {
                    prop_assert_eq!(model.found(model.used), model.used);
                }
            }
        }
    }

    #[test]
    fn what_tells_nothing_is_not_listened_to() {
        let said = Place { index: 2, wrap: false };
        let [free, used] = [Rest::new(1, 1, Place::FIRST.available()), Rest::new(1, 1, Place::FIRST.used())];
        let goes_on = Rest::new(1, 1, Place::FIRST.available() | DESC_NEXT);
        let place = Place { index: 1, wrap: true };
        assert_eq!(search(&[used, free, free, free], said), Some(Found { place, unshown: 0 }));
        assert_eq!(search(&[used, free, used, free, used], said), None);
        assert_eq!(search(&[used, free, goes_on, free], said), None);
        assert_eq!(search(&[used, free, free, free], Place { index: 2, wrap: true }), None);
    }

    /// Wherever a device ends that keeps nothing, the next one goes on where its driver looks.
    #[test]
    fn a_batch_that_no_driver_saw_is_given_back_with_nothing_in_it() {
        const SIZE: u16 = 8;
        const BASE: u64 = 0x10_0000;
        let ring = 16 * usize::from(SIZE);
        let [driver, device] = [ring, ring + 16].map(|at| BASE + at as u64);
        // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(0x1000).unwrap();
        let mapping = Arc::new(Mapping::new(file.as_fd(), 0x1000, 0, true).unwrap());
        let window = Window::new(mapping.clone(), 0, 0x1000);
        let memory = Arc::new(Memory::new(1, 1 << 20));
        memory.add(BASE, &mapping, 0, 0x1000, true).unwrap();
        let slot = |index: u16| 16 * usize::from(index) + 8;
        let offer = |place: Place| {
            window.store64(slot(place.index) - 8, BASE + 0x800, Ordering::Relaxed);
            let rest = Rest::new(100, place.index + 50, place.available() | DESC_WRITE);
            window.store64(slot(place.index), rest.0, Ordering::Release);
        };
        let starts = (0..2 * SIZE).map(|count| Place::FIRST.after(count % SIZE, SIZE).after(count / SIZE * SIZE, SIZE));
        for start in starts {
            // As a lap that came here would have left it.
            for number in 0..SIZE {
                let place = start.after(number, SIZE);
                let before = Place { wrap: !place.wrap, ..place };
                window.store64(slot(place.index), Rest::new(0, 0, before.used()).0, Ordering::Relaxed);
                offer(place);
            }
            let whole = || (0..SIZE).map(|index| window.load64(slot(index), Ordering::Relaxed)).collect::<Vec<_>>();
            let setup = Setup {
                size: u32::from(SIZE),
                desc: BASE,
                driver,
                device,
                features: Features { packed: true, ..Features::default() },
                resume: Some(u32::from(start.word()) * 0x1_0001),
            };
            let mut served = DeviceRing::new(memory.clone(), setup.size, setup).unwrap();
            let mut chains = Vec::new();
            served.take(4, &mut chains).unwrap();
            let ends = Rc::new(RefCell::new(Vec::new()));
            let into = ends.clone();
            let look = window.clone();
            let seen = move || {
                let words = (0..SIZE).map(|index| look.load64(slot(index), Ordering::Relaxed)).collect::<Vec<_>>();
                into.borrow_mut().push(words);
            };
            watch::stores(seen, || {
                let _ = served.complete(chains.iter().map(|chain| (chain.head(), 77)));
            });
            ends.borrow_mut().push(whole());
            assert!(ends.borrow().len() > 4);
            for words in ends.take() {
                for (index, word) in words.iter().enumerate() {
                    window.store64(slot(index as u16), *word, Ordering::Relaxed);
                }
                let found = recover_place(&memory, BASE, setup.size, u32::from(Place::FIRST.word()) * 0x1_0001);
                let mut reaped = start;
                let mut written = Vec::new();
                loop {
                    let rest = Rest(window.load64(slot(reaped.index), Ordering::Relaxed));
                    if !rest.is_used(reaped.wrap) {
                        break;
                    }
                    assert_eq!(rest.id(), reaped.index + 50);
                    written.push(rest.size());
                    reaped = reaped.after(1, SIZE);
                }
                assert_eq!(found, u32::from(reaped.word()) * 0x1_0001, "from {start:?}");
                assert!([&[][..], &[0; 4], &[0; 3], &[0; 2], &[77; 4]].contains(&&written[..]), "{written:?}");
                // Whoever is next finds all that is left.
                let mut next =
                    DeviceRing::new(memory.clone(), setup.size, Setup { resume: Some(found), ..setup }).unwrap();
                let mut chains = Vec::new();
                next.take(100, &mut chains).unwrap();
                assert_eq!(chains.len(), usize::from(SIZE) - written.len());
            }
        }
    }
}
