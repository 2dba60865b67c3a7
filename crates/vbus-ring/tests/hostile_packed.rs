//! Packed rings whose other side breaks the rules: each rule by its name, and what happens around it.
#![cfg(not(loom))]

mod memory;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use memory::mapping;
use vbus_ring::mem::{Mapping, Memory, Window};
use vbus_ring::ring::packed::{DeviceRing, DriverRing};
use vbus_ring::ring::{Chain, Features, Setup};
use vbus_ring::violation::Violation;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 0x80;
const USED: u16 = 0x8000;

/// Driver address of the first byte of a `Raw`'s memory.
const BASE: u64 = 0x10_0000;
const BYTES: u64 = 0x40_0000;
const DRIVER: u64 = 0x9_0000;
const DEVICE: u64 = 0x9_1000;
/// Offset of room for buffers and tables.
const ROOM: u64 = 0x10_0000;
const BUFFER: u64 = BASE + ROOM;

/// Memory with a ring in it, at whose parts a test writes as it likes.
struct Raw {
    memory: Arc<Memory>,
    mapping: Arc<Mapping>,
    window: Window,
    setup: Setup,
    /// Descriptors written since the beginning.
    count: u32,
}

impl Raw {
    fn new(size: u32) -> Self {
        let mapping = mapping(BYTES, true);
        let memory = Arc::new(Memory::new(64, 1 << 40));
        memory.add(BASE, &mapping, 0, BYTES, true).unwrap();
        let features = Features { packed: true, indirect: true, ..Features::default() };
        let setup = Setup { size, desc: BASE, driver: BASE + DRIVER, device: BASE + DEVICE, features, resume: None };
        Self { memory, window: Window::new(mapping.clone(), 0, BYTES as usize), mapping, setup, count: 0 }
    }

    fn ring(&self) -> Result<DeviceRing, Violation> {
        DeviceRing::new(self.memory.clone(), 32768, self.setup)
    }

    /// Write a descriptor into the ring, or into a table.
    fn write(&self, place: u64, address: u64, size: u32, id: u16, flags: u16) {
        let rest = u64::from(size) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.window.store64(place as usize, address, Ordering::Relaxed);
        self.window.store64(place as usize + 8, rest, Ordering::Release);
    }

    /// The flags of the lap of the next descriptor.
    fn available(&self) -> u16 {
        if self.count / self.setup.size % 2 == 0 {
            AVAIL
        } else {
            USED
        }
    }

    /// Make the next descriptor available.
    fn desc(&mut self, address: u64, size: u32, id: u16, flags: u16) {
        self.write(16 * u64::from(self.count % self.setup.size), address, size, id, flags | self.available());
        self.count += 1;
    }

    fn entry(&self, index: u64, address: u64, size: u32, flags: u16) {
        self.write(ROOM + 16 * index, address, size, 0x1234, flags);
    }

    /// Id, length and flags of a descriptor.
    fn seen(&self, index: u16) -> (u16, u32, u16) {
        let rest = self.window.load64(16 * usize::from(index) + 8, Ordering::Acquire);
        ((rest >> 32) as u16, rest as u32, (rest >> 48) as u16)
    }
}

fn take(ring: &mut DeviceRing, limit: usize) -> Result<Vec<Chain>, Violation> {
    let mut chains = Vec::new();
    ring.take(limit, &mut chains).map(|()| chains)
}

fn heads(ring: &mut DeviceRing, limit: usize) -> Vec<u16> {
    take(ring, limit).unwrap().iter().map(Chain::head).collect()
}

fn name<T>(result: Result<T, Violation>) -> &'static str {
    result.err().expect("a violation").name()
}

/// The name of what is wrong with what is written behind a good request, in a ring of 7 that is like every other before
/// and after.
fn chain(write: impl FnOnce(&mut Raw)) -> &'static str {
    chain_of(Raw::new(7), write)
}

fn chain_of(mut raw: Raw, write: impl FnOnce(&mut Raw)) -> &'static str {
    let mut ring = raw.ring().unwrap();
    raw.desc(BUFFER, 4, 500, 0);
    write(&mut raw);
    assert_eq!(heads(&mut ring, 10), [500], "the good one comes first");
    let name = name(take(&mut ring, 10));
    assert!(take(&mut ring, 10).unwrap().is_empty(), "then the ring gives nothing");
    assert!(ring.complete([(500, 0)]).unwrap(), "what was given before may still be completed");
    assert_eq!(raw.seen(0), (500, 0, AVAIL | USED));
    raw.count = 0;
    raw.desc(BUFFER, 4, 1, 0);
    assert_eq!(take(&mut raw.ring().unwrap(), 1).unwrap().len(), 1, "a restart brings it back");
    name
}

#[test]
fn a_good_chain() {
    let mut raw = Raw::new(3);
    let mut ring = raw.ring().unwrap();
    for round in 0..50u16 {
        raw.desc(BUFFER, 4, 0xffff, NEXT);
        raw.desc(BUFFER + 8, 5, 7 * round, WRITE);
        let chains = take(&mut ring, 9).unwrap();
        assert_eq!(chains.len(), 1);
        assert_eq!(
            (chains[0].head(), chains[0].readable().total(), chains[0].writable().total()),
            (7 * round, 4, 5),
            "the last descriptor tells its id"
        );
        let begin = 2 * u32::from(round);
        let used = if begin / 3 % 2 == 0 { AVAIL | USED } else { 0 };
        assert!(ring.complete([(7 * round, 5)]).unwrap());
        assert_eq!(raw.seen((begin % 3) as u16), (7 * round, 5, used | WRITE), "at the first of its places");
        assert_eq!(ring.in_flight(), 0);
    }
}

#[test]
fn a_chain_as_long_as_the_ring_is_good_and_no_longer() {
    let mut raw = Raw::new(7);
    let mut ring = raw.ring().unwrap();
    (0..7).for_each(|index| raw.desc(BUFFER, 4, 9, if index < 6 { NEXT } else { 0 }));
    assert_eq!(take(&mut ring, 1).unwrap()[0].readable().total(), 28);
    assert!(take(&mut ring, 1).unwrap().is_empty(), "all of it is taken");
    (0..7).for_each(|_| raw.desc(BUFFER, 4, 9, 0));
    assert!(take(&mut ring, 1).unwrap().is_empty(), "and nothing is looked at before it is used");

    let mut raw = Raw::new(7);
    let mut ring = raw.ring().unwrap();
    (0..7).for_each(|_| raw.desc(BUFFER, 4, 9, NEXT));
    assert_eq!(name(take(&mut ring, 1)), "chain-too-long");
}

#[test]
fn a_chain_that_goes_on_in_what_is_in_flight() {
    assert_eq!(chain(|raw| (0..6).for_each(|_| raw.desc(BUFFER, 4, 1, NEXT))), "descriptor-in-use");
}

#[test]
fn a_chain_that_is_not_all_there() {
    assert_eq!(chain(|raw| raw.desc(BUFFER, 4, 1, NEXT)), "descriptor-not-available");
    let of_the_lap_before = chain(|raw| {
        raw.desc(BUFFER, 4, 1, NEXT);
        raw.write(16 * 2, BUFFER, 4, 1, USED);
    });
    assert_eq!(of_the_lap_before, "descriptor-not-available");
}

#[test]
fn an_id_that_is_still_in_flight() {
    assert_eq!(chain(|raw| raw.desc(BUFFER, 4, 500, 0)), "descriptor-in-use");
    let mut raw = Raw::new(2);
    let mut ring = raw.ring().unwrap();
    for id in [3, 0xffff, 3, 3, 0, 0xffff] {
        raw.desc(BUFFER, 4, id, 0);
        assert_eq!(heads(&mut ring, 5), [id]);
        assert!(ring.complete([(id, 0), (id, 0), (id ^ 1, 0)]).unwrap(), "an id may be any number");
    }
    assert!(!ring.complete([(3, 0)]).unwrap(), "nothing is in flight");
}

#[test]
fn what_is_wrong_with_a_buffer() {
    assert_eq!(chain(|raw| raw.desc(BUFFER, 0, 1, 0)), "zero-length-descriptor");
    assert_eq!(chain(|raw| raw.desc(BUFFER, 0, 1, WRITE)), "zero-length-descriptor");
    let wrong_way = |raw: &mut Raw| {
        raw.desc(BUFFER, 4, 1, WRITE | NEXT);
        raw.desc(BUFFER, 4, 1, 0);
    };
    assert_eq!(chain(wrong_way), "readable-after-writable");
    for (address, size) in [(0, 1), (BASE - 1, 2), (BASE + BYTES - 1, 2), (BASE, u32::MAX), (u64::MAX, 2)] {
        assert_eq!(chain(|raw| raw.desc(address, size, 1, 0)), "address-outside-memory", "{address:#x} {size}");
        assert_eq!(chain(|raw| raw.desc(address, size, 1, WRITE)), "address-outside-memory", "{address:#x} {size}");
    }
    let read_only = |raw: &mut Raw| {
        raw.memory.add(0, &mapping(0x1000, false), 0, 0x1000, false).unwrap();
        raw.desc(0x10, 4, 1, WRITE);
    };
    assert_eq!(chain(read_only), "region-read-only");
    let too_large = |raw: &mut Raw| {
        raw.memory.add(1 << 40, &mapping(1 << 31, true), 0, 1 << 31, true).unwrap();
        raw.desc(1 << 40, 1 << 31, 1, NEXT);
        raw.desc(1 << 40, 1 << 31, 1, WRITE);
    };
    assert_eq!(chain(too_large), "chain-too-large");
}

#[test]
fn what_is_wrong_with_a_table() {
    let mut raw = Raw::new(7);
    raw.setup.features.indirect = false;
    assert_eq!(chain_of(raw, |raw| raw.desc(BUFFER, 16, 1, INDIRECT)), "indirect-not-negotiated");
    for size in [0, 1, 15, 17, 40, u32::MAX] {
        assert_eq!(chain(|raw| raw.desc(BUFFER, size, 1, INDIRECT)), "indirect-table-size", "{size}");
    }
    assert_eq!(chain(|raw| raw.desc(BUFFER, 16 * 8, 1, INDIRECT)), "indirect-table-too-long");
    assert_eq!(chain(|raw| raw.desc(BUFFER, 16, 1, INDIRECT | NEXT)), "indirect-next");
    assert_eq!(chain(|raw| raw.desc(8, 16, 1, INDIRECT)), "address-outside-memory");
    assert_eq!(chain(|raw| raw.desc(u64::MAX - 7, 16, 1, INDIRECT)), "address-outside-memory");
    assert_eq!(chain(|raw| raw.desc(BUFFER, 16, 1, INDIRECT)), "zero-length-descriptor");
    let together = |raw: &mut Raw| {
        (0..3).for_each(|_| raw.desc(BUFFER, 1, 1, NEXT));
        raw.desc(BUFFER, 16 * 5, 1, INDIRECT);
        (0..5).for_each(|index| raw.entry(index, BUFFER, 1, 0));
    };
    assert_eq!(chain(together), "chain-too-long");
}

#[test]
fn in_a_table_only_the_write_flag_means_anything() {
    let mut raw = Raw::new(7);
    raw.desc(BUFFER, 48, 77, INDIRECT | WRITE);
    raw.entry(0, BUFFER, 5, INDIRECT | AVAIL);
    raw.entry(1, BUFFER, 6, NEXT);
    raw.entry(2, BUFFER, 7, WRITE | NEXT | USED);
    let chains = take(&mut raw.ring().unwrap(), 1).unwrap();
    assert_eq!((chains[0].head(), chains[0].readable().total(), chains[0].writable().total()), (77, 11, 7));
}

#[test]
fn more_memory_in_flight_than_a_queue_remembers() {
    let mut raw = Raw::new(32768);
    (0..32768).for_each(|entry| raw.entry(entry, BUFFER, 1, 0));
    (0..40).for_each(|id| raw.desc(BUFFER, 16 * 32768, id, INDIRECT));
    let mut ring = raw.ring().unwrap();
    assert_eq!(take(&mut ring, 100).unwrap().len(), 32);
    assert_eq!(name(take(&mut ring, 100)), "too-many-buffers");
}

#[test]
fn queue_sizes() {
    for size in [0, 32769, 65536, u32::MAX] {
        assert_eq!(name(Raw::new(size).ring()), "queue-size", "{size}");
    }
    let raw = Raw::new(8);
    assert_eq!(name(DeviceRing::new(raw.memory.clone(), 7, raw.setup)), "queue-size");
    for size in [1, 2, 3, 255, 32767, 32768] {
        assert_eq!(u32::from(Raw::new(size).ring().unwrap().size()), size);
    }
}

#[test]
fn parts_where_they_cannot_be() {
    for (part, step) in [(0, 8), (1, 2), (2, 2)] {
        let mut raw = Raw::new(7);
        *[&mut raw.setup.desc, &mut raw.setup.driver, &mut raw.setup.device][part] += step;
        assert_eq!(name(raw.ring()), "ring-misaligned");
        for address in [0, BASE - 16, BASE + BYTES, u64::MAX - 15] {
            *[&mut raw.setup.desc, &mut raw.setup.driver, &mut raw.setup.device][part] = address;
            assert_eq!(name(raw.ring()), "ring-outside-memory", "{address:#x}");
        }
    }
    let mut raw = Raw::new(7);
    raw.setup.desc = BASE + BYTES - 16 * 7;
    raw.setup.driver = BASE + BYTES - 4;
    raw.ring().unwrap();
    raw.setup.desc += 16;
    assert_eq!(name(raw.ring()), "ring-outside-memory");
    // The device writes descriptors, too.
    let raw = Raw::new(7);
    raw.memory.clear();
    raw.memory.add(BASE, &raw.mapping, 0, DEVICE, false).unwrap();
    raw.memory.add(BASE + DEVICE, &raw.mapping, DEVICE, 0x1000, true).unwrap();
    assert_eq!(name(raw.ring()), "ring-outside-memory");
    // Aligned for the driver, but its region begins at an odd place of the file.
    let raw = Raw::new(7);
    raw.memory.clear();
    raw.memory.add(BASE, &raw.mapping, 2, 0x30_0000, true).unwrap();
    assert_eq!(name(raw.ring()), "ring-misaligned");
}

#[test]
fn memory_that_goes_away_and_comes_back_under_a_running_ring() {
    let mut raw = Raw::new(7);
    raw.desc(BUFFER, 4, 1, 0);
    raw.desc(BUFFER, 4, 2, 0);
    let mut ring = raw.ring().unwrap();
    assert_eq!(heads(&mut ring, 1), [1]);
    raw.memory.clear();
    assert_eq!(name(ring.complete([(1, 0)])), "ring-outside-memory");
    assert!(take(&mut ring, 1).unwrap().is_empty());
    raw.memory.add(BASE, &raw.mapping, 0, BYTES, true).unwrap();
    assert!(!ring.complete([(1, 0)]).unwrap(), "nothing is in flight any more");
    assert_eq!(raw.seen(0), (1, 4, AVAIL));

    // The same addresses, other memory behind them, after a descriptor was seen there.
    let mut ring = raw.ring().unwrap();
    assert_eq!(heads(&mut ring, 1), [1]);
    let other = Raw::new(7);
    raw.memory.remove(BASE).unwrap();
    raw.memory.add(BASE, &other.mapping, 0, BYTES, true).unwrap();
    assert!(take(&mut ring, 1).unwrap().is_empty(), "the old memory is nobody's");
    other.write(16, BUFFER, 4, 9, AVAIL);
    assert_eq!(heads(&mut ring, 1), [9]);
}

#[test]
fn a_batch_is_shown_by_the_flags_of_its_first_descriptor() {
    let mut raw = Raw::new(8);
    let mut ring = raw.ring().unwrap();
    (0..4).for_each(|id| raw.desc(BUFFER, 4, 10 + id, WRITE));
    assert_eq!(heads(&mut ring, 9), [10, 11, 12, 13]);
    // Out of order: nothing that was not taken is written over.
    raw.desc(BUFFER, 4, 14, WRITE);
    let _ = ring.complete([(13, 3), (11, 1), (12, 0)]).unwrap();
    let used = AVAIL | USED;
    let seen: Vec<_> = (0..5).map(|index| raw.seen(index)).collect();
    assert_eq!(
        seen,
        [(13, 3, used | WRITE), (11, 1, used | WRITE), (12, 0, used), (13, 4, WRITE | AVAIL), (14, 4, WRITE | AVAIL)]
    );
    assert_eq!(heads(&mut ring, 9), [14]);
}

#[test]
fn in_order_a_batch_that_says_nothing_of_its_own_is_one_descriptor() {
    let mut raw = Raw::new(8);
    raw.setup.features.in_order = true;
    let mut ring = raw.ring().unwrap();
    (0..3).for_each(|id| raw.desc(BUFFER, 4, id, 0));
    raw.desc(BUFFER, 4, 3, WRITE);
    (4..6).for_each(|id| raw.desc(BUFFER, 4, id, WRITE));
    assert_eq!(heads(&mut ring, 9), [0, 1, 2, 3, 4, 5]);
    assert!(!ring.complete([(2, 0), (1, 0)]).unwrap(), "the first is not used");
    assert_eq!((raw.seen(0).2, ring.in_flight()), (AVAIL, 6));
    assert!(ring.complete([(0, 0)]).unwrap());
    assert_eq!((raw.seen(0), raw.seen(1), ring.in_flight()), ((2, 0, AVAIL | USED), (1, 4, AVAIL), 3));
    assert!(ring.complete([(5, 1), (4, 2), (3, 4)]).unwrap());
    let used = AVAIL | USED | WRITE;
    assert_eq!([3, 4, 5].map(|index| raw.seen(index)), [(3, 4, used), (4, 2, used), (5, 1, used)]);
    // What is shown behind it follows in the right place: the driver knows how long the batch was.
    (6..9).for_each(|id| raw.desc(BUFFER, 4, id, 0));
    raw.desc(BUFFER, 4, 9, WRITE);
    assert_eq!(heads(&mut ring, 9), [6, 7, 8, 9]);
    let _ = ring.complete([(6, 0), (7, 0), (8, 0), (9, 3)]).unwrap();
    assert_eq!((raw.seen(6), raw.seen(7).0), ((9, 3, used), 7), "also with one that says something at its end");
    assert_eq!(ring.next(), 0x0002_0002);
}

/// A driver that rewrites what the ring has already read: what was checked is what is used.
#[test]
fn a_descriptor_that_changes_between_two_reads() {
    const ROUNDS: usize = 40_000;
    let done = AtomicBool::new(false);
    let raw = Raw::new(1);
    let mut ring = raw.ring().unwrap();
    let (mut given, mut refused) = (0, 0);
    let rest = |size: u64, flags: u16| size | 5 << 32 | u64::from(flags) << 48;
    std::thread::scope(|scope| {
        let window = raw.window.clone();
        let done = &done;
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                for (address, word) in [(BUFFER, rest(4, AVAIL)), (8, rest(u64::from(u32::MAX), AVAIL | WRITE))] {
                    window.store64(0, address, Ordering::Relaxed);
                    window.store64(8, word, Ordering::Relaxed);
                }
            }
        });
        for _ in 0..ROUNDS {
            match take(&mut ring, 1) {
                Ok(chains) => {
                    for chain in &chains {
                        given += 1;
                        // Either half may be of either, and none is trusted.
                        assert_eq!((chain.head(), chain.readable().total()), (5, 4));
                        assert_eq!(chain.readable().ranges().next(), Some((BUFFER, 4)));
                    }
                }
                Err(violation) => {
                    refused += 1;
                    assert_eq!(violation.name(), "address-outside-memory");
                }
            }
            ring = raw.ring().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(given + refused > 0 && given + refused <= ROUNDS);
}

// The driver side, with a device that lies.

struct Liar {
    ring: DriverRing,
    desc: Window,
    size: u16,
    used: u32,
}

impl Liar {
    fn new(size: u16, indirect: bool, in_order: bool) -> Self {
        let arena: Arc<Mapping> = mapping(0x1_0000, true);
        let features = Features { packed: true, indirect, in_order, ..Features::default() };
        let ring = DriverRing::new(&arena, 0, BASE, size.into(), features).unwrap();
        Self { ring, desc: Window::new(arena, 0, 16 * usize::from(size)), size, used: 0 }
    }

    /// Add a request of two descriptors, or one with a table, with so many bytes to write, and show it.
    fn request(&mut self, writable: u64) -> u16 {
        let token = self.ring.add(&[(BASE, 16)], &[(BASE, writable)]).unwrap().unwrap();
        let _ = self.ring.publish();
        token
    }

    /// Say of a request of so many descriptors that it is used.
    fn uses(&mut self, id: u16, written: u32, descriptors: u32) {
        let flags = if self.used / u32::from(self.size) % 2 == 0 { AVAIL | USED } else { 0 } | WRITE;
        let rest = u64::from(written) | u64::from(id) << 32 | u64::from(flags) << 48;
        self.desc.store64(16 * (self.used as usize % usize::from(self.size)) + 8, rest, Ordering::Release);
        self.used += descriptors;
    }

    fn reap(&mut self) -> Result<Vec<(u16, u32)>, Violation> {
        let mut finished = Vec::new();
        self.ring.reap(10, &mut finished).map(|()| finished)
    }

    /// The name of the violation, which comes once, after `before` good ones; then there is nothing more.
    fn caught(&mut self, before: usize) -> &'static str {
        if before > 0 {
            assert_eq!(self.reap().unwrap().len(), before);
        }
        let name = name(self.reap());
        assert!(self.reap().unwrap().is_empty());
        name
    }
}

#[test]
fn a_used_id_that_is_not_outstanding() {
    for (id, indirect, in_order) in [(1, true, false), (6, true, true), (7, false, false), (0xffff, false, true)] {
        let mut liar = Liar::new(7, indirect, in_order);
        liar.request(8);
        liar.uses(id, 0, 1);
        assert_eq!(liar.caught(0), "used-id-unknown", "{id}");
    }
    let mut liar = Liar::new(7, true, false);
    liar.uses(0, 0, 1);
    assert_eq!(liar.caught(0), "used-id-unknown", "nothing is outstanding");
    let mut liar = Liar::new(7, true, false);
    liar.request(8);
    let hidden = liar.ring.add(&[], &[(BASE, 8)]).unwrap().unwrap();
    liar.uses(hidden, 0, 1);
    assert_eq!(liar.caught(0), "used-id-unknown", "it was never shown");
}

#[test]
fn a_request_that_is_used_twice() {
    let mut liar = Liar::new(7, true, false);
    let first = liar.request(8);
    liar.request(8);
    liar.uses(first, 8, 1);
    liar.uses(first, 8, 1);
    assert_eq!(liar.caught(1), "used-id-unknown");
}

#[test]
fn more_bytes_than_were_writable() {
    for in_order in [false, true] {
        let mut liar = Liar::new(7, false, in_order);
        let [first, second] = [liar.request(8), liar.request(8)];
        liar.uses(first, 8, 2);
        liar.uses(second, 9, 2);
        assert_eq!(liar.caught(1), "used-length");
    }
}

#[test]
fn a_length_that_is_none() {
    let mut liar = Liar::new(3, true, false);
    let token = liar.request(8);
    // Without the flag of something written, the length means nothing.
    let rest = 0xffff_ffff | u64::from(token) << 32 | u64::from(AVAIL | USED) << 48;
    liar.desc.store64(8, rest, Ordering::Release);
    assert_eq!(liar.reap().unwrap(), [(token, 0)]);
}

#[test]
fn a_device_that_writes_over_the_drivers_descriptors_changes_nothing_of_what_it_knows() {
    let mut liar = Liar::new(7, false, false);
    for _ in 0..100 {
        let tokens = [liar.request(8), liar.request(4)];
        assert_eq!(liar.ring.free(), 3);
        for place in (0..16 * usize::from(liar.size)).step_by(8) {
            // Used in no lap.
            liar.desc.store64(place, 0xff7f_ffff_ffff_ffff, Ordering::Relaxed);
        }
        for (token, written) in [(tokens[1], 4), (tokens[0], 2)] {
            liar.uses(token, written, 2);
        }
        // What is not the next is not looked at, so what is left of the noise does not matter.
        assert_eq!(liar.reap().unwrap(), [(tokens[1], 4), (tokens[0], 2)]);
        assert_eq!(liar.ring.free(), 7);
    }
}

#[test]
fn in_order_a_device_may_say_only_the_last_of_several() {
    for round in 0..20 {
        let mut liar = Liar::new(7, round % 2 == 0, true);
        let descriptors = if round % 2 == 0 { 1 } else { 2 };
        for _ in 0..round {
            let tokens = [liar.request(8), liar.request(9), liar.request(10)];
            // In the place of the first; those before the last were written whole.
            liar.uses(tokens[1], 3, 2 * descriptors);
            let mut finished = Vec::new();
            liar.ring.reap(1, &mut finished).unwrap();
            assert_eq!((finished.pop(), liar.ring.outstanding()), (Some((tokens[0], 8)), 2));
            assert_eq!(liar.reap().unwrap(), [(tokens[1], 3)]);
            liar.uses(tokens[2], 0, descriptors);
            assert_eq!(liar.reap().unwrap(), [(tokens[2], 0)]);
        }
    }
}
