//! The region in which a packed ring keeps what is in flight: its layout, what another back-end leaves there, and regions
//! that a hostile front-end has written.
#![cfg(not(loom))]

mod memory;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use memory::mapping;
use proptest::prelude::*;

use vbus_ring::mem::{Mapping, Memory, Window};
use vbus_ring::ring::packed::{inflight_bytes, DeviceRing};
use vbus_ring::ring::{Chain, Features, Setup};
use vbus_ring::violation::Violation;

const SIZE: u16 = 8;
const BASE: u64 = 0x10_0000;
const DRIVER: u64 = 0x100;
const DEVICE: u64 = 0x200;
const BYTES: u64 = 0x1000;
/// Offset of the region in its mapping.
const REGION: u64 = 0x80;
/// Offset of indirect tables.
const TABLES: u64 = 0x800;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 0x80;
const USED: u16 = 0x8000;

/// The head that ends a list of free entries.
const END: u16 = SIZE;

/// What a header says: heads of the free entries, now and before; used places, each an index and a wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    free: [u16; 2],
    used: [(u16, u8); 2],
}

/// An entry: mark, next, last, descriptors, counter; id, flags, length, address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    mark: u8,
    next: u16,
    last: u16,
    count: u16,
    counter: u64,
    id: u16,
    flags: u16,
    size: u32,
    address: u64,
}

/// A ring of 8, and a region in a mapping of its own.
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
        let mapping = mapping(BYTES, true);
        let region = Window::new(mapping.clone(), REGION as usize, inflight_bytes(SIZE));
        Self { memory, ring, mapping, region }
    }

    fn start_at(&self, mapping: &Arc<Mapping>, offset: u64, resume: Option<u32>) -> Result<DeviceRing, Violation> {
        let size = u32::from(SIZE);
        let (driver, device) = (BASE + DRIVER, BASE + DEVICE);
        let features = Features { packed: true, indirect: true, ..Features::default() };
        let setup = Setup { size, desc: BASE, driver, device, features, resume };
        DeviceRing::tracked(self.memory.clone(), size, setup, mapping, offset)
    }

    fn start(&self) -> Result<DeviceRing, Violation> {
        self.start_at(&self.mapping, REGION, None)
    }

    fn desc(&self, place: u64, address: u64, size: u32, id: u16, flags: u16) {
        let rest = u64::from(size) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.ring.store64(place as usize, address, Ordering::Relaxed);
        self.ring.store64(place as usize + 8, rest, Ordering::Relaxed);
    }

    /// A descriptor of the ring, in the first lap, with buffer id `100 + index`.
    fn offer(&self, index: u16, flags: u16) {
        let index64 = u64::from(index);
        self.desc(16 * index64, BASE + 0x400 + 8 * index64, 8, 100 + index, AVAIL | flags);
    }

    fn offer_all(&self) {
        (0..SIZE).for_each(|index| self.offer(index, 0));
    }

    /// Id and flags of a descriptor of the ring.
    fn slot(&self, index: u16) -> (u16, u16) {
        let rest = self.ring.load64(16 * usize::from(index) + 8, Ordering::Relaxed);
        ((rest >> 32) as u16, (rest >> 48) as u16)
    }

    fn version(&self, version: u16, count: u16) {
        self.region.store16(8, version, Ordering::Relaxed);
        self.region.store16(10, count, Ordering::Relaxed);
    }

    fn header(&self, header: Header) {
        self.version(1, SIZE);
        for number in 0..2 {
            self.region.store16(12 + 2 * number, header.free[number], Ordering::Relaxed);
            self.region.store16(16 + 2 * number, header.used[number].0, Ordering::Relaxed);
            self.region.store8(20 + number, header.used[number].1, Ordering::Relaxed);
        }
    }

    fn seen_header(&self) -> Header {
        let load = Ordering::Relaxed;
        Header {
            free: [12, 14].map(|at| self.region.load16(at, load)),
            used: [(16, 20), (18, 21)].map(|(at, wrap)| (self.region.load16(at, load), self.region.load8(wrap, load))),
        }
    }

    fn entry(&self, index: u16, entry: Entry) {
        let at = 32 + 32 * usize::from(index);
        let store = Ordering::Relaxed;
        self.region.store8(at, entry.mark, store);
        for (place, word) in [(2, entry.next), (4, entry.last), (6, entry.count), (16, entry.id), (18, entry.flags)] {
            self.region.store16(at + place, word, store);
        }
        self.region.store64(at + 8, entry.counter, store);
        self.region.store32(at + 20, entry.size, store);
        self.region.store64(at + 24, entry.address, store);
    }

    fn seen(&self, index: u16) -> Entry {
        let at = 32 + 32 * usize::from(index);
        let load = Ordering::Relaxed;
        let [next, last, count, id, flags] = [2, 4, 6, 16, 18].map(|place| self.region.load16(at + place, load));
        Entry {
            mark: self.region.load8(at, load),
            next,
            last,
            count,
            counter: self.region.load64(at + 8, load),
            id,
            flags,
            size: self.region.load32(at + 20, load),
            address: self.region.load64(at + 24, load),
        }
    }

    /// Nothing in flight, as DPDK begins.
    fn free(&self) {
        self.header(Header { free: [0, 0], used: [(0, 1), (0, 1)] });
        (0..SIZE).for_each(|index| self.entry(index, Entry { next: index + 1, ..Entry::default() }));
    }

    /// A chain of one, in flight, beside what `free` says of the list.
    fn hold(&self, index: u16, counter: u64, next: u16) {
        let address = BASE + 0x400 + 8 * u64::from(index);
        let (id, flags) = (100 + index, AVAIL);
        self.entry(index, Entry { mark: 1, next, last: index, count: 1, counter, id, flags, size: 8, address });
    }

    fn unmark(&self, index: u16) {
        self.region.store8(32 + 32 * usize::from(index), 0, Ordering::Relaxed);
    }

    fn marks(&self) -> [u8; SIZE as usize] {
        std::array::from_fn(|index| self.seen(index as u16).mark)
    }
}

fn take(ring: &mut DeviceRing, limit: usize) -> Result<Vec<u16>, Violation> {
    let mut chains = Vec::new();
    ring.take(limit, &mut chains).map(|()| chains.iter().map(Chain::head).collect())
}

fn name<T>(result: Result<T, Violation>) -> &'static str {
    result.err().expect("a violation").name()
}

/// Where a ring goes on: (next to take, next to use), each an index and a wrap counter.
fn places(ring: &DeviceRing) -> [(u16, u8); 2] {
    let next = ring.next();
    [next as u16, (next >> 16) as u16].map(|word| (word & 0x7fff, (word >> 15) as u8))
}

#[test]
fn the_size_of_a_region() {
    // As DPDK counts: 29 bytes, and 32 an entry, rounded up.
    for size in [1, 2, 3, 7, 8, 256, 32768] {
        assert_eq!(inflight_bytes(size), (29 + 32 * usize::from(size)).next_multiple_of(64), "{size}");
    }
}

#[test]
fn the_layout_is_that_of_the_specification() {
    let world = World::new();
    [(0, NEXT), (1, WRITE), (2, 0), (3, WRITE)].into_iter().for_each(|(index, flags)| world.offer(index, flags));
    world.entry(3, Entry { mark: 1, next: 77, counter: 99, ..Entry::default() });
    let mut ring = world.start().unwrap();
    assert_eq!([8, 10].map(|at| world.region.load16(at, Ordering::Relaxed)), [1, SIZE]);
    assert_eq!(world.seen_header(), Header { free: [0, 0], used: [(0, 1), (0, 1)] });
    assert_eq!(world.marks(), [0; 8], "a region that was never used has nothing in flight");
    assert_eq!(take(&mut ring, 3).unwrap(), [101, 102, 103]);
    assert_eq!(world.seen_header(), Header { free: [4, 4], used: [(0, 1), (0, 1)] });
    let first = Entry {
        mark: 1,
        next: 1,
        last: 1,
        count: 2,
        counter: 0,
        id: 100,
        flags: AVAIL | NEXT,
        size: 8,
        address: BASE + 0x400,
    };
    assert_eq!(world.seen(0), first);
    let second = world.seen(1);
    assert_eq!((second.id, second.flags, second.size, second.address), (101, AVAIL | WRITE, 8, BASE + 0x408));
    assert_eq!((world.seen(2).counter, world.seen(3).counter), (1, 2));
    assert_eq!(world.marks(), [1, 0, 1, 1, 0, 0, 0, 0]);
    // Two are used, out of turn: the last of them comes first in the list, and the rest of its chain behind it.
    let _ = ring.complete([(102, 0), (101, 5)]).unwrap();
    assert_eq!(world.seen_header(), Header { free: [0, 0], used: [(3, 1), (3, 1)] });
    assert_eq!([0, 1, 2, 4].map(|index| world.seen(index).next), [1, 2, 4, 5]);
    assert_eq!(world.marks(), [0, 0, 0, 1, 0, 0, 0, 0]);
    assert_eq!(places(&ring), [(4, 1), (3, 1)]);
}

#[test]
fn a_new_region_begins_where_the_ring_does() {
    let world = World::new();
    world.desc(16 * 5, BASE + 0x400, 8, 1, USED);
    // What was taken and not used before there was a region is taken again.
    let mut ring = world.start_at(&world.mapping, REGION, Some(0x0006 | 0x0005 << 16)).unwrap();
    assert_eq!((world.seen_header().used, places(&ring)), ([(5, 0), (5, 0)], [(5, 0), (5, 0)]));
    assert_eq!(take(&mut ring, 9).unwrap(), [1]);
    let place = |resume| name(World::new().start_at(&world.mapping, REGION + 0x200, Some(resume)));
    assert_eq!(place(0x8008), "ring-position");
}

#[test]
fn what_a_front_end_says_of_a_ring_that_was_used_is_not_looked_at() {
    let world = World::new();
    world.offer_all();
    let mut ring = world.start().unwrap();
    assert_eq!(take(&mut ring, 3).unwrap(), [100, 101, 102]);
    let _ = ring.complete([(101, 0)]).unwrap();
    for resume in [None, Some(0), Some(0x8000_8000), Some(u32::MAX)] {
        let mut ring = world.start_at(&world.mapping, REGION, resume).unwrap();
        assert_eq!(take(&mut ring, 9).unwrap(), [100, 102, 103, 104, 105, 106, 107]);
        assert_eq!(places(&ring), [(0, 0), (1, 1)]);
        // As the one before left it.
        (3..SIZE).for_each(|index| world.unmark(index));
        world.header(Header { free: [1, 1], used: [(1, 1), (1, 1)] });
        world.region.store16(32 + 32 + 2, 3, Ordering::Relaxed);
    }
}

#[test]
fn a_chain_is_read_again_from_the_region() {
    let world = World::new();
    // A table, in memory still, and a chain of two; the ring's own descriptors are written over by what is used.
    world.desc(TABLES, BASE + 0x400, 16, 0, 0);
    world.desc(TABLES + 16, BASE + 0x440, 5, 0, WRITE);
    world.desc(0, BASE + 0x480, 1, 7, AVAIL);
    world.desc(16, BASE + TABLES, 32, 8, AVAIL | INDIRECT);
    world.desc(32, BASE + 0x4c0, 3, 0, AVAIL | NEXT);
    world.desc(48, BASE + 0x500, 4, 9, AVAIL | WRITE);
    world.desc(64, BASE + 0x540, 1, 10, AVAIL);
    let mut ring = world.start().unwrap();
    assert_eq!(take(&mut ring, 9).unwrap(), [7, 8, 9, 10]);
    let _ = ring.complete([(10, 0)]).unwrap();
    let _ = ring.complete([(7, 0)]).unwrap();
    assert_eq!([0, 1].map(|index| world.slot(index)), [(10, AVAIL | USED), (7, AVAIL | USED)]);
    // Their driver has seen them, and uses the places.
    world.desc(0, BASE, 1, 11, USED);
    world.desc(16, BASE, 1, 12, USED);
    let mut ring = world.start().unwrap();
    assert_eq!(ring.unused(), None, "two lie where one is to be used");
    let mut chains = Vec::new();
    ring.take(2, &mut chains).unwrap();
    let totals = |chain: &Chain| (chain.head(), chain.readable().total(), chain.writable().total());
    assert_eq!(chains.iter().map(totals).collect::<Vec<_>>(), [(8, 16, 5), (9, 3, 4)]);
    assert_eq!(places(&ring), [(5, 1), (2, 1)]);
    let _ = ring.complete([(9, 4), (8, 5)]).unwrap();
    assert_eq!([2, 4].map(|index| world.slot(index)), [(9, AVAIL | USED | WRITE), (8, AVAIL | USED | WRITE)]);
    assert_eq!((places(&ring), ring.unused()), ([(5, 1), (5, 1)], Some(0x8005_8005)));
    assert_eq!(world.marks(), [0; 8]);
}

#[test]
fn where_nothing_was_overtaken_another_may_go_on_without_the_region() {
    let world = World::new();
    world.offer_all();
    let mut ring = world.start().unwrap();
    assert_eq!(take(&mut ring, 4).unwrap(), [100, 101, 102, 103]);
    let _ = ring.complete([(100, 0)]).unwrap();
    let mut ring = world.start().unwrap();
    assert_eq!((places(&ring), ring.unused()), ([(1, 1), (1, 1)], Some(0x8001_8001)));
    assert_eq!(take(&mut ring, 2).unwrap(), [101, 102]);
    assert_eq!((places(&ring), ring.unused()), ([(3, 1), (1, 1)], Some(0x8001_8001)));
    let _ = ring.complete([(102, 0)]).unwrap();
    assert_eq!(ring.unused(), None);
}

#[test]
fn a_batch_that_the_driver_has_seen_is_completed() {
    // As DPDK leaves it: of 0, 1 and 2, 1 is used, and what follows that is not written, or only some of it.
    for steps in 0..4 {
        let world = World::new();
        world.offer_all();
        world.free();
        [(0, 5), (1, 6), (2, 7)].into_iter().for_each(|(index, counter)| world.hold(index, counter, 3));
        world.desc(0, 0, 8, 101, AVAIL | USED);
        let before = [if steps > 1 { 1 } else { 3 }, u16::from(steps > 2)];
        world.header(Header { free: [1, before[0]], used: [(1, 1), (before[1], 1)] });
        if steps > 0 {
            world.unmark(1);
        }
        let mut ring = world.start().unwrap();
        assert_eq!(world.seen_header(), Header { free: [1, 1], used: [(1, 1), (1, 1)] });
        assert_eq!(world.marks(), [1, 0, 1, 0, 0, 0, 0, 0]);
        assert_eq!(take(&mut ring, 9).unwrap(), [100, 102, 103, 104, 105, 106, 107]);
        assert_eq!((places(&ring), world.seen(1).counter), ([(0, 0), (1, 1)], 8));
    }
}

#[test]
fn a_batch_that_the_driver_has_not_seen_is_taken_back() {
    for steps in 0..3 {
        let world = World::new();
        world.offer_all();
        world.free();
        [(0, 5), (1, 6), (2, 7)].into_iter().for_each(|(index, counter)| world.hold(index, counter, 3));
        // The third of a batch is written already: it would be seen behind the next that is used.
        world.desc(32, 0, 8, 101, AVAIL | USED);
        let header = [
            Header { free: [3, 3], used: [(0, 1), (0, 1)] },
            Header { free: [1, 3], used: [(0, 1), (0, 1)] },
            Header { free: [1, 3], used: [(3, 1), (0, 1)] },
        ];
        world.header(header[steps]);
        let mut ring = world.start().unwrap();
        assert_eq!(world.seen_header(), Header { free: [3, 3], used: [(0, 1), (0, 1)] });
        assert_eq!((world.slot(0), world.slot(2)), ((100, AVAIL), (101, AVAIL)));
        assert_eq!(take(&mut ring, 3).unwrap(), [100, 101, 102]);
        let _ = ring.complete([(102, 0)]).unwrap();
        assert_eq!([0, 1, 2].map(|index| world.slot(index).1 & USED), [USED, 0, 0]);
    }
}

#[test]
fn an_end_between_an_index_and_its_wrap_counter() {
    // All of the ring was one chain, and DPDK has stored all but the last byte of what ends it.
    let world = World::new();
    world.free();
    world.desc(0, 0, 0, 3, AVAIL | USED);
    world.header(Header { free: [0, 0], used: [(0, 0), (0, 1)] });
    let ring = world.start().unwrap();
    assert_eq!((world.seen_header().used, places(&ring)), ([(0, 0), (0, 0)], [(0, 0), (0, 0)]));
    // The same, with nothing ended: the first descriptor tells, which the driver may have made available again.
    for (flags, wrap, given) in [(AVAIL, 1, &[107][..]), (AVAIL | USED, 0, &[]), (USED, 0, &[50])] {
        let world = World::new();
        world.free();
        for index in 0..SIZE {
            world.hold(index, index.into(), index + 1);
            let flags = if index + 1 < SIZE { AVAIL | NEXT } else { AVAIL };
            let (mark, count) = if index == 0 { (1, SIZE) } else { (0, 0) };
            world.entry(index, Entry { mark, last: SIZE - 1, count, flags, ..world.seen(index) });
        }
        world.desc(0, BASE, 1, 50, flags);
        world.header(Header { free: [0, END], used: [(0, 0), (0, 1)] });
        let mut ring = world.start().unwrap();
        assert_eq!(places(&ring)[1], (0, wrap));
        assert_eq!(take(&mut ring, 9).unwrap(), given);
    }
}

#[test]
fn a_region_that_is_not_in_its_mapping() {
    let world = World::new();
    for offset in [BYTES, BYTES - 256, BYTES - 287, u64::MAX - 7, 1 << 63] {
        assert_eq!(name(world.start_at(&world.mapping, offset, None)), "inflight-size", "{offset:#x}");
    }
    assert!(world.start_at(&world.mapping, BYTES - 288, None).is_ok());
    assert_eq!(name(world.start_at(&world.mapping, 4, None)), "inflight-misaligned");
}

#[test]
fn headers_that_do_not_fit() {
    let world = World::new();
    world.free();
    for version in [2, 256, u16::MAX] {
        world.version(version, SIZE);
        assert_eq!(name(world.start()), "inflight-version");
    }
    for count in [0, 7, 9, 16, u16::MAX] {
        world.version(1, count);
        assert_eq!(name(world.start()), "inflight-size");
    }
    world.version(1, SIZE);
    world.region.store64(0, 1 << 63, Ordering::Relaxed);
    assert_eq!(name(world.start()), "inflight-features");
}

#[test]
fn used_places_that_there_cannot_be() {
    let world = World::new();
    world.free();
    // The driver has seen whatever it is.
    world.desc(0, 0, 0, 1, AVAIL | USED);
    for used in [[(0, 1), (8, 1)], [(0, 1), (0, 2)], [(8, 1), (0, 1)], [(0, 0xff), (0, 1)], [(1, 0), (0, 1)]] {
        world.header(Header { free: [0, 1], used });
        assert_eq!(name(world.start()), "inflight-used-index", "{used:?}");
    }
    world.desc(3 * 16, 0, 0, 1, AVAIL | USED);
    world.header(Header { free: [0, 1], used: [(2, 1), (3, 1)] });
    assert_eq!(name(world.start()), "inflight-used-index", "backwards");
    // What is taken back is not looked at.
    world.desc(0, 0, 0, 1, AVAIL);
    world.header(Header { free: [9999, 0], used: [(9999, 77), (0, 1)] });
    assert_eq!(places(&world.start().unwrap()), [(0, 1), (0, 1)]);
}

#[test]
fn lists_that_go_wrong() {
    let lists = |change: &dyn Fn(&World)| {
        let world = World::new();
        world.free();
        world.hold(0, 1, 7);
        world.hold(1, 2, 7);
        world.header(Header { free: [2, 2], used: [(0, 1), (0, 1)] });
        change(&world);
        world.start().map(|mut ring| take(&mut ring, 9).unwrap())
    };
    assert_eq!(lists(&|_| ()).unwrap(), [100, 101]);
    let next = |index, next| move |world: &World| world.entry(index, Entry { next, ..world.seen(index) });
    assert_eq!(name(lists(&next(4, 2))), "inflight-loop", "free entries in a ring");
    assert_eq!(name(lists(&next(4, 4))), "inflight-loop");
    assert_eq!(name(lists(&next(4, END))), "inflight-next", "some are nowhere");
    assert_eq!(name(lists(&next(4, u16::MAX))), "inflight-next");
    // The free list goes on in what is in flight: that is free, then, and no more in flight.
    assert_eq!(name(lists(&next(7, 0))), "inflight-loop");
    let chain =
        |index, count, last| move |world: &World| world.entry(index, Entry { count, last, ..world.seen(index) });
    assert_eq!(name(lists(&chain(0, 0, 0))), "inflight-next");
    assert_eq!(name(lists(&chain(0, 1, 1))), "inflight-next");
    assert_eq!(name(lists(&chain(0, 2, 7))), "inflight-next", "one that does not say that it goes on");
    assert_eq!(name(lists(&chain(0, u16::MAX, 0))), "inflight-next");
    let long = |next, last| {
        move |world: &World| {
            let flags = AVAIL | NEXT;
            world.entry(0, Entry { count: 2, next, last, flags, ..world.seen(0) });
        }
    };
    assert_eq!(name(lists(&long(1, 1))), "inflight-loop", "the one behind is a chain itself");
    assert_eq!(name(lists(&long(0, 0))), "inflight-next", "it is behind itself");
    assert_eq!(name(lists(&long(5, 5))), "inflight-loop", "the one behind is free");
    assert_eq!(name(lists(&long(SIZE, SIZE))), "inflight-next");
    assert_eq!(name(lists(&long(u16::MAX, 3))), "inflight-next");
    // Marks in the free list are of a chain that was not taken whole.
    let marked = |world: &World| world.entry(5, Entry { mark: 0x80, ..world.seen(5) });
    assert_eq!(lists(&marked).unwrap(), [100, 101]);
}

#[test]
fn what_cannot_be_in_flight() {
    let world = World::new();
    world.free();
    world.header(Header { free: [2, 2], used: [(0, 1), (0, 1)] });
    world.hold(0, 5, 9);
    world.hold(1, 5, 9);
    assert_eq!(name(world.start()), "inflight-counter");
    world.hold(1, u64::MAX, 9);
    assert_eq!(name(world.start()), "inflight-counter");
    world.hold(1, 4, 9);
    assert_eq!(take(&mut world.start().unwrap(), 2).unwrap(), [101, 100]);
    world.entry(1, Entry { id: 100, ..world.seen(1) });
    let mut ring = world.start().unwrap();
    assert_eq!(take(&mut ring, 9).unwrap(), [100]);
    assert_eq!(name(take(&mut ring, 9)), "descriptor-in-use", "the id of two");
    world.entry(1, Entry { address: 0, ..world.seen(1) });
    assert_eq!(name(take(&mut world.start().unwrap(), 9)), "address-outside-memory");
}

#[test]
fn what_a_front_end_writes_later_is_not_looked_at() {
    let world = World::new();
    world.offer_all();
    let mut ring = world.start().unwrap();
    assert_eq!(take(&mut ring, 2).unwrap(), [100, 101]);
    let mut ring = world.start().unwrap();
    let noise = Entry {
        mark: 0xff,
        next: 0xffff,
        last: 0xffff,
        count: 0xffff,
        counter: u64::MAX,
        id: 0xffff,
        flags: 0xffff,
        size: u32::MAX,
        address: u64::MAX,
    };
    (0..SIZE).for_each(|index| world.entry(index, noise));
    world.header(Header { free: [0xffff, 0x1234], used: [(0xffff, 0xff), (0xffff, 0xff)] });
    assert_eq!(take(&mut ring, 2).unwrap(), [100, 101]);
    let _ = ring.complete([(101, 0), (100, 0)]).unwrap();
    assert_eq!(take(&mut ring, 9).unwrap(), [102, 103, 104, 105, 106, 107]);
    assert_eq!(world.seen_header(), Header { free: [6, 6], used: [(2, 1), (2, 1)] });
    assert_eq!((world.seen(0).next, world.seen(1).next, world.seen(0).counter), (1, 2, 2));
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    let flags = prop_oneof![Just(AVAIL), Just(AVAIL | NEXT), Just(AVAIL | WRITE)];
    let count = prop_oneof![4 => 1..3u16, 1 => 0..10u16];
    let entry = (0..2u8, 0..9u16, 0..9u16, count, 0..20u64, 0..6u16, flags).prop_map(
        |(mark, next, last, count, counter, id, flags)| Entry {
            mark,
            next,
            last,
            count,
            counter,
            id,
            flags,
            size: 8,
            address: BASE + 0x400,
        },
    );
    proptest::collection::vec(entry, usize::from(SIZE))
}

/// Entries of which each is free or of one chain, and where the list of the free ones begins: what is not far from them
/// comes further than what is random.
fn good_entries() -> impl Strategy<Value = (Vec<Entry>, u16)> {
    let order = Just((0..SIZE).collect::<Vec<_>>()).prop_shuffle();
    (order, entries(), proptest::collection::vec(1..4usize, 8), 0..=8usize).prop_map(
        |(order, mut entries, spans, free)| {
            let (held, free) = order.split_at(8 - free);
            let follow = |entries: &mut Vec<Entry>, list: &[u16], end| {
                for (number, index) in list.iter().enumerate() {
                    entries[usize::from(*index)].next = list.get(number + 1).copied().unwrap_or(end);
                }
            };
            follow(&mut entries, free, END);
            let mut rest = held;
            for (number, span) in spans.into_iter().enumerate() {
                let (chain, behind) = rest.split_at(span.min(rest.len()));
                rest = behind;
                follow(&mut entries, chain, 0xffff);
                for (place, index) in chain.iter().enumerate() {
                    let entry = &mut entries[usize::from(*index)];
                    entry.mark = u8::from(place == 0);
                    entry.flags = if place + 1 < chain.len() { AVAIL | NEXT } else { AVAIL };
                    (entry.last, entry.count) = (chain[chain.len() - 1], chain.len() as u16);
                    (entry.id, entry.counter) = (number as u16, number as u64);
                }
            }
            (entries, free.first().copied().unwrap_or(END))
        },
    )
}

/// Start with a region of these entries. Refused by a name of its own, or each id is given once, and all that is in flight
/// is of the ring.
fn no_harm(world: &World, header: Header, entries: &[Entry]) -> Result<Option<Vec<u16>>, TestCaseError> {
    world.offer_all();
    world.header(header);
    (0..SIZE).zip(entries).for_each(|(index, entry)| world.entry(index, *entry));
    let mut ring = match world.start() {
        Err(violation) => {
            prop_assert!(violation.name().starts_with("inflight-"), "{}", violation);
            return Ok(None);
        }
        Ok(ring) => ring,
    };
    let mut given = Vec::new();
    loop {
        match take(&mut ring, 3) {
            Ok(heads) if heads.is_empty() => break,
            Ok(heads) => given.extend(heads),
            Err(violation) => {
                let may = ["descriptor-in-use", "descriptor-not-available", "chain-too-long"];
                prop_assert!(may.contains(&violation.name()), "{}", violation);
                break;
            }
        }
    }
    let mut once: BTreeMap<u16, usize> = BTreeMap::new();
    given.iter().for_each(|head| *once.entry(*head).or_default() += 1);
    prop_assert!(once.values().all(|count| *count == 1), "{:?}", given);
    prop_assert!(given.len() <= usize::from(SIZE));
    prop_assert_eq!(ring.in_flight(), given.len());
    let [next, used] = places(&ring);
    prop_assert!(next.0 < SIZE && used.0 < SIZE);
    // Whoever goes on is given the same, or as much of it as this one has.
    let _ = ring.complete(given.iter().map(|head| (*head, 0))).unwrap();
    prop_assert_eq!(ring.in_flight(), 0);
    prop_assert!(world.start().is_ok());
    Ok(Some(given))
}

proptest! {
    /// Whatever a region says, a ring is refused by a name of its own, or gives each id once.
    #[test]
    fn no_region_makes_a_chain_come_twice(
        free in (0..10u16, 0..10u16),
        used in ((0..9u16, 0..3u8), (0..9u16, 0..3u8)),
        entries in entries(),
    ) {
        no_harm(&World::new(), Header { free: [free.0, free.1], used: [used.0, used.1] }, &entries)?;
    }

    /// The same of regions that are right but for one entry.
    #[test]
    fn no_region_that_is_nearly_right_either(
        (mut good, free) in good_entries(),
        bad in (0..usize::from(SIZE), entries()),
        used in (0..SIZE, 0..2u8),
        change in any::<bool>(),
    ) {
        let world = World::new();
        if change {
            good[bad.0] = bad.1[bad.0];
        }
        let marked = good.iter().enumerate().filter(|(_, entry)| entry.mark != 0);
        let held: Vec<(u64, u16)> = marked
            .filter(|(index, _)| {
                let mut at = free;
                let mut steps = 0;
                while at < SIZE && usize::from(at) != *index && steps < 9 {
                    at = good[usize::from(at)].next;
                    steps += 1;
                }
                usize::from(at) != *index
            })
            .map(|(_, entry)| (entry.counter, good[usize::from(entry.last) % 8].id))
            .collect();
        let given = no_harm(&world, Header { free: [free, free], used: [used, used] }, &good)?;
        if !change {
            let mut held = held;
            held.sort_unstable();
            let held: Vec<u16> = held.into_iter().map(|(_, id)| id).collect();
            let given = given.expect("a good region");
            prop_assert_eq!(&given[..held.len()], &held[..]);
        }
    }
}
