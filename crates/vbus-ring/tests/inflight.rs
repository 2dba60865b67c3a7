//! The region in which a ring keeps what is in flight: its layout, and regions that a hostile front-end has written.
#![cfg(not(loom))]

mod memory;

use std::sync::atomic::Ordering;
use std::sync::Arc;

use memory::mapping;
use proptest::prelude::*;

use vbus_ring::mem::{Mapping, Memory, Window};
use vbus_ring::ring::split::{inflight_bytes, DeviceRing};
use vbus_ring::ring::{Chain, Features, Setup};
use vbus_ring::violation::Violation;

const SIZE: u16 = 8;
const BASE: u64 = 0x10_0000;
const AVAIL: usize = 0x100;
const USED: usize = 0x200;
const BYTES: u64 = 0x1000;
/// Offset of the region in its mapping.
const REGION: u64 = 0x80;

/// A ring of 8 one-byte buffers, and a region in a mapping of its own.
struct World {
    memory: Arc<Memory>,
    ring: Window,
    mapping: Arc<Mapping>,
    region: Window,
}

impl World {
    fn new() -> Self {
        let arena = mapping(BYTES, true);
        let memory = Arc::new(Memory::new(1, BYTES));
        memory.add(BASE, &arena, 0, BYTES, true).unwrap();
        let ring = Window::new(arena, 0, BYTES as usize);
        for head in 0..usize::from(SIZE) {
            ring.store64(16 * head, BASE, Ordering::Relaxed);
            ring.store64(16 * head + 8, 1, Ordering::Relaxed);
        }
        let mapping = mapping(BYTES, true);
        let region = Window::new(mapping.clone(), REGION as usize, inflight_bytes(SIZE));
        Self { memory, ring, mapping, region }
    }

    fn start_at(&self, mapping: &Arc<Mapping>, offset: u64) -> Result<DeviceRing, Violation> {
        let size = u32::from(SIZE);
        let (driver, device) = (BASE + AVAIL as u64, BASE + USED as u64);
        let setup = Setup { size, desc: BASE, driver, device, features: Features::default(), resume: None };
        DeviceRing::tracked(self.memory.clone(), size, setup, mapping, offset)
    }

    fn start(&self) -> Result<DeviceRing, Violation> {
        self.start_at(&self.mapping, REGION)
    }

    /// Indices of the available and of the used ring.
    fn indices(&self, avail: u16, used: u16) {
        self.ring.store16(AVAIL + 2, avail, Ordering::Relaxed);
        self.ring.store16(USED + 2, used, Ordering::Relaxed);
    }

    /// Offer each head once, from entry 0 on.
    fn offer_all(&self) {
        for head in 0..SIZE {
            self.ring.store16(AVAIL + 4 + 2 * usize::from(head), head, Ordering::Relaxed);
        }
        self.indices(SIZE, 0);
    }

    fn header(&self, version: u16, count: u16, last: u16, used: u16) {
        for (place, word) in [(8, version), (10, count), (12, last), (14, used)] {
            self.region.store16(place, word, Ordering::Relaxed);
        }
    }

    fn state(&self, head: u16, inflight: u8, next: u16, counter: u64) {
        let place = 16 + 16 * usize::from(head);
        self.region.store8(place, inflight, Ordering::Relaxed);
        self.region.store16(place + 6, next, Ordering::Relaxed);
        self.region.store64(place + 8, counter, Ordering::Relaxed);
    }

    /// (inflight, next, counter) of a head.
    fn seen(&self, head: u16) -> (u8, u16, u64) {
        let place = 16 + 16 * usize::from(head);
        let load = Ordering::Relaxed;
        (self.region.load8(place, load), self.region.load16(place + 6, load), self.region.load64(place + 8, load))
    }

    /// (version, desc_num, last_batch_head, used_idx).
    fn seen_header(&self) -> [u16; 4] {
        [8, 10, 12, 14].map(|place| self.region.load16(place, Ordering::Relaxed))
    }
}

fn take(ring: &mut DeviceRing, limit: usize) -> Result<Vec<u16>, Violation> {
    let mut chains = Vec::new();
    ring.take(limit, &mut chains).map(|()| chains.iter().map(Chain::head).collect())
}

fn name<T>(result: Result<T, Violation>) -> &'static str {
    result.err().expect("a violation").name()
}

#[test]
fn the_size_of_a_region() {
    assert_eq!([1, 2, 4, 8, 256, 32768].map(inflight_bytes), [64, 64, 128, 192, 4160, 524_352]);
}

#[test]
fn the_layout_is_that_of_the_specification() {
    let world = World::new();
    world.state(3, 1, 77, 99);
    world.offer_all();
    let mut ring = world.start().unwrap();
    assert_eq!(world.seen_header(), [1, SIZE, 0, 0]);
    assert_eq!(world.seen(3).0, 0, "a region that was never used has nothing in flight");
    assert_eq!(take(&mut ring, 3).unwrap(), [0, 1, 2]);
    assert_eq!([0, 1, 2].map(|head| (world.seen(head).0, world.seen(head).2)), [(1, 0), (1, 1), (1, 2)]);
    let _ = ring.complete([(2, 0), (0, 0)]).unwrap();
    assert_eq!([0, 1, 2].map(|head| world.seen(head).0), [0, 1, 0]);
    assert_eq!((world.seen_header(), world.seen(0).1), ([1, SIZE, 0, 2], 2), "0 was the last, and 2 before it");
    assert_eq!(ring.next(), 3);
}

#[test]
fn a_new_region_begins_at_the_used_index() {
    let world = World::new();
    world.indices(5, 3);
    let mut ring = world.start().unwrap();
    assert_eq!((world.seen_header(), ring.next()), ([1, SIZE, 0, 3], 3));
    assert_eq!(take(&mut ring, 1).unwrap(), [0]);
}

#[test]
fn what_was_in_flight_comes_first_and_in_its_order() {
    let world = World::new();
    world.offer_all();
    // Five were taken; the batch of 3, then 1, is shown and half unmarked; 4, 2, 0 remain, taken in this order.
    world.indices(6, 2);
    world.header(1, SIZE, 1, 0);
    world.state(1, 1, 3, 40);
    world.state(3, 0, 6, 41);
    [(4, 7), (2, 9), (0, 12)].into_iter().for_each(|(head, counter)| world.state(head, 1, 0, counter));
    let mut ring = world.start().unwrap();
    assert_eq!((world.seen_header()[3], world.seen(1).0, ring.in_flight()), (2, 0, 0));
    assert_eq!(ring.next(), 2, "whoever goes on without the region takes them again");
    assert_eq!(take(&mut ring, 2).unwrap(), [4, 2]);
    assert_eq!((ring.in_flight(), ring.next()), (2, 4));
    assert_eq!(take(&mut ring, 2).unwrap(), [0, 5]);
    assert_eq!(world.seen(5), (1, 0, 13), "after the last of them");
    assert_eq!((take(&mut ring, 9).unwrap(), ring.next()), (vec![], 6));
}

#[test]
fn a_region_that_is_not_in_its_mapping() {
    let world = World::new();
    for offset in [BYTES, BYTES - 128, BYTES - 143, u64::MAX - 7, 1 << 63] {
        assert_eq!(name(world.start_at(&world.mapping, offset)), "inflight-size", "{offset:#x}");
    }
    assert!(world.start_at(&world.mapping, BYTES - 144).is_ok());
    assert_eq!(name(world.start_at(&world.mapping, 4)), "inflight-misaligned");
}

#[test]
fn headers_that_do_not_fit() {
    let world = World::new();
    for version in [2, 256, u16::MAX] {
        world.header(version, SIZE, 0, 0);
        assert_eq!(name(world.start()), "inflight-version");
    }
    for count in [0, 7, 9, 16, u16::MAX] {
        world.header(1, count, 0, 0);
        assert_eq!(name(world.start()), "inflight-size");
    }
    world.header(1, SIZE, 0, 0);
    world.region.store64(0, 1 << 63, Ordering::Relaxed);
    assert_eq!(name(world.start()), "inflight-features");
}

#[test]
fn batches_that_there_cannot_have_been() {
    let world = World::new();
    world.offer_all();
    world.indices(SIZE, 3);
    for used in [4, 65530, 30000] {
        world.header(1, SIZE, 0, used);
        assert_eq!(name(world.start()), "inflight-used-index", "{used}");
    }
    world.header(1, SIZE, SIZE, 0);
    assert_eq!(name(world.start()), "inflight-next");
    world.header(1, SIZE, 0, 0);
    world.state(0, 1, 1, 0);
    world.state(1, 1, u16::MAX, 1);
    assert_eq!(name(world.start()), "inflight-next");
    world.state(1, 1, 0, 1);
    assert_eq!(name(world.start()), "inflight-loop");
    world.state(0, 1, 0, 1);
    assert_eq!(name(world.start()), "inflight-loop");
    world.state(0, 1, 1, 0);
    world.state(1, 1, 2, 0);
    world.state(2, 1, 9999, 0);
    assert!(world.start().is_ok(), "what the last one links is from another batch");
}

#[test]
fn what_cannot_be_in_flight() {
    let world = World::new();
    world.offer_all();
    world.header(1, SIZE, 0, 0);
    world.state(1, 1, 0, 5);
    world.state(6, 1, 0, 5);
    assert_eq!(name(world.start()), "inflight-counter");
    world.state(6, 1, 0, u64::MAX);
    assert_eq!(name(world.start()), "inflight-counter");
    world.state(6, 0x80, 0, 4);
    assert_eq!(take(&mut world.start().unwrap(), 2).unwrap(), [6, 1]);
    world.indices(1, 0);
    assert_eq!(name(world.start()), "inflight-too-many");
    world.indices(2, 0);
    let mut ring = world.start().unwrap();
    assert_eq!(take(&mut ring, 9).unwrap(), [6, 1]);
    world.indices(3, 0);
    world.ring.store16(AVAIL + 4 + 2 * 2, 6, Ordering::Relaxed);
    assert_eq!(name(take(&mut ring, 9)), "descriptor-in-use");
}

#[test]
fn what_a_front_end_writes_later_is_not_looked_at() {
    let world = World::new();
    world.offer_all();
    let mut ring = world.start().unwrap();
    assert_eq!(take(&mut ring, 2).unwrap(), [0, 1]);
    world.header(99, 1, 0xffff, 0x1234);
    (0..SIZE).for_each(|head| world.state(head, 0xff, 0xffff, u64::MAX));
    let _ = ring.complete([(1, 0), (0, 0)]).unwrap();
    assert_eq!(take(&mut ring, 9).unwrap(), [2, 3, 4, 5, 6, 7]);
    assert_eq!((world.seen_header()[3], world.seen(0), world.seen(7).2), (2, (0, 1, u64::MAX), 7));
}

proptest! {
    /// Whatever a region says, a ring is refused by a name of its own, or gives each head once.
    #[test]
    fn no_region_makes_a_head_come_twice(
        header in (0..3u16, prop_oneof![Just(SIZE), any::<u16>()], 0..10u16, 0..12u16),
        states in proptest::collection::vec((0..2u8, 0..10u16, prop_oneof![0..20u64, any::<u64>()]), 8),
        (avail, used) in (0..20u16, 0..12u16),
    ) {
        let world = World::new();
        world.offer_all();
        world.indices(avail, used);
        world.header(header.0, header.1, header.2, header.3);
        for (head, (inflight, next, counter)) in states.into_iter().enumerate() {
            world.state(head as u16, inflight, next, counter);
        }
        match world.start() {
            Err(violation) => prop_assert!(violation.name().starts_with("inflight-")),
            Ok(mut ring) => {
                let mut given = Vec::new();
                loop {
                    match take(&mut ring, 3) {
                        Ok(heads) if heads.is_empty() => break,
                        Ok(heads) => given.extend(heads),
                        Err(violation) => {
                            prop_assert!(["index-jump", "descriptor-in-use"].contains(&violation.name()));
                            break;
                        }
                    }
                }
                let count = given.len();
                given.sort_unstable();
                given.dedup();
                prop_assert_eq!(given.len(), count);
                prop_assert_eq!(ring.in_flight(), count);
            }
        }
    }
}
