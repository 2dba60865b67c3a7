//! Where a packed ring goes on that was served by somebody who ended without a word, and who kept nothing of it.
//!
//! No side of a packed ring stores its place there. But each descriptor's USED flag is the device's alone: a device that
//! writes one turns it over, and a driver that makes it available again leaves it as it is. So where chains have one
//! descriptor each, all before the place have the flag of its lap, and all behind it that of the lap before. The rest of a
//! longer chain is not written by the device, and looks as if it were behind: then the ring tells nothing, and whoever
//! says where it goes on is believed.

use std::sync::atomic::Ordering;

use super::{Place, Rest, DESC_NEXT, DESC_USED};
use crate::mem::{Access, Memory};
use crate::ring::device::part;
use crate::ring::{DESC_BYTES, MAX_SIZE};

/// Where the ring of `size` descriptors at the driver's address `desc` goes on, of which a front-end that may know no
/// better says `said`: as `DeviceRing::next` and `Setup::resume` say it.
///
/// For rings whose requests were used in the order in which they were made available, each by a used descriptor of its
/// own, and with one descriptor each, as a rule (VIRTIO_F_INDIRECT_DESC). Where that is not so, and the front-end is
/// right, it is believed all the same. What the driver writes meanwhile changes nothing.
pub fn find_place(memory: &Memory, desc: u64, size: u32, said: u32) -> u32 {
    let table = memory.snapshot();
    let bytes = DESC_BYTES * size as usize;
    if size == 0 || size > MAX_SIZE || said as u16 != (said >> 16) as u16 {
        return said;
    }
    // What is wrong with it, a ring says when it starts.
    let Ok(window) = part(&table, ("descriptor ring", desc, bytes), (16, 8), Access::Read) else {
        return said;
    };
    let slots = (0..size as usize).map(|index| Rest(window.load64(DESC_BYTES * index + 8, Ordering::Acquire)));
    match search(&slots.collect::<Vec<_>>(), Place::from_word(said as u16)) {
        Some(place) => u32::from(place.word()) * 0x1_0001,
        None => said,
    }
}

/// The place, if the descriptors tell another than the one that is said.
fn search(slots: &[Rest], said: Place) -> Option<Place> {
    let size = slots.len() as u16;
    let is_open = |slot: &Rest| slot.is_available(true) || slot.is_available(false);
    if slots.iter().any(|slot| is_open(slot) && slot.has(DESC_NEXT)) {
        return None;
    }
    let wrap = slots[0].has(DESC_USED);
    let before = slots.iter().take_while(|slot| slot.has(DESC_USED) == wrap).count();
    if slots[before..].iter().any(|slot| slot.has(DESC_USED) == wrap) {
        return None;
    }
    let place = Place { index: 0, wrap }.after(before as u16, size);
    // The second of two descriptors may look so: of the last chain, behind which that is, or of one a lap before, which is
    // next. But a ring that is as it began has none.
    let is_second = |at: Place| slots[usize::from(at.index)].is_available(at.wrap);
    let believed = place == said
        || place.after(1, size) == said && is_second(place)
        || said.after(1, size) == place && is_second(Place { wrap: !said.wrap, ..said }) && said != Place::FIRST;
    (!believed).then_some(place)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::ring::DESC_WRITE;

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

        fn found(&self, said: Place) -> Place {
            search(&self.slots, said).unwrap_or(said)
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
                let before = said.after(1, size) == model.used && said != Place::FIRST;
                if !before && said != model.used.after(1, size) {
                    prop_assert_eq!(model.found(said), model.used);
                }
            }
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
        assert_eq!(search(&[used, free, free, free], said), Some(Place { index: 1, wrap: true }));
        assert_eq!(search(&[used, free, used, free], said), None);
        assert_eq!(search(&[used, free, goes_on, free], said), None);
        assert_eq!(search(&[used, free, free, free], Place { index: 2, wrap: true }), None);
    }
}
