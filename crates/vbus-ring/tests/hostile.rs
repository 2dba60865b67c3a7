//! Rings whose other side breaks the rules: each rule by its name, and what happens around it.
#![cfg(not(loom))]

mod memory;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use memory::mapping;
use vbus_ring::mem::{Mapping, Memory, VolatileSlice, Window};
use vbus_ring::ring::split::{DeviceRing, DriverRing};
use vbus_ring::ring::{Chain, Features, Setup};
use vbus_ring::violation::Violation;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Driver address of the first byte of a `Raw`'s memory.
const BASE: u64 = 0x10_0000;
const AVAIL: u64 = 0x8_0000;
const USED: u64 = 0x9_1000;
/// Offset of room for buffers and tables.
const ROOM: u64 = 0x10_0000;

/// Memory with a ring in it, at whose parts a test writes as it likes.
struct Raw {
    memory: Arc<Memory>,
    mapping: Arc<Mapping>,
    window: Window,
    setup: Setup,
    index: u16,
}

impl Raw {
    fn new(size: u32) -> Self {
        let bytes = 0x40_0000;
        let mapping = mapping(bytes, true);
        let memory = Arc::new(Memory::new(64, 1 << 40));
        memory.add(BASE, &mapping, 0, bytes, true).unwrap();
        let setup = Setup {
            size,
            desc: BASE,
            driver: BASE + AVAIL,
            device: BASE + USED,
            features: Features { indirect: true, ..Features::default() },
            resume: None,
        };
        Self { memory, window: Window::new(mapping.clone(), 0, bytes as usize), mapping, setup, index: 0 }
    }

    fn ring(&self) -> Result<DeviceRing, Violation> {
        DeviceRing::new(self.memory.clone(), 32768, self.setup)
    }

    /// Write a descriptor into the table, or into an indirect table at a multiple of 8.
    fn desc_at(&self, place: u64, address: u64, size: u32, flags: u16, next: u16) {
        let rest = u64::from(size) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.window.store64(place as usize, address, Ordering::Relaxed);
        self.window.store64(place as usize + 8, rest, Ordering::Relaxed);
    }

    fn desc(&self, index: u16, address: u64, size: u32, flags: u16, next: u16) {
        self.desc_at(16 * u64::from(index), address, size, flags, next);
    }

    /// Make a head available.
    fn offer(&mut self, head: u16) {
        let place = AVAIL + 4 + 2 * u64::from(self.index & (self.setup.size - 1) as u16);
        self.window.store16(place as usize, head, Ordering::Relaxed);
        self.set_index(self.index.wrapping_add(1));
    }

    fn set_index(&mut self, index: u16) {
        self.index = index;
        self.window.store16(AVAIL as usize + 2, index, Ordering::Release);
    }

    fn used_index(&self) -> u16 {
        self.window.load16(USED as usize + 2, Ordering::Acquire)
    }

    fn used_flags(&self) -> u16 {
        self.window.load16(USED as usize, Ordering::Acquire)
    }
}

/// What one call of `take` gives.
fn take(ring: &mut DeviceRing, limit: usize) -> Result<Vec<Chain>, Violation> {
    let mut chains = Vec::new();
    ring.take(limit, &mut chains).map(|()| chains)
}

const BUFFER: u64 = BASE + ROOM;

fn name<T>(result: Result<T, Violation>) -> &'static str {
    result.err().expect("a violation").name()
}

/// The name of what is wrong with the chain of descriptor 0, in a ring of 8 that is like every other before and after.
fn chain(write: impl FnOnce(&Raw)) -> &'static str {
    chain_of(Raw::new(8), 0, write)
}

fn chain_of(mut raw: Raw, head: u16, write: impl FnOnce(&Raw)) -> &'static str {
    let mut ring = raw.ring().unwrap();
    raw.desc(7, BUFFER, 4, 0, 0);
    raw.offer(7);
    write(&raw);
    raw.offer(head);
    let good = take(&mut ring, 10).unwrap();
    assert_eq!(good.iter().map(Chain::head).collect::<Vec<_>>(), [7], "the good one comes first");
    let name = name(take(&mut ring, 10));
    assert!(take(&mut ring, 10).unwrap().is_empty(), "then the ring gives nothing");
    raw.offer(7);
    assert!(take(&mut ring, 10).unwrap().is_empty());
    assert!(ring.complete([(7, 0)]).unwrap(), "what was given before may still be completed");
    assert_eq!(raw.used_index(), 1);
    raw.set_index(0);
    raw.offer(7);
    assert_eq!(take(&mut raw.ring().unwrap(), 10).unwrap().len(), 1, "a restart brings it back");
    name
}

#[test]
fn a_head_out_of_range() {
    assert_eq!(chain_of(Raw::new(8), 8, |_| ()), "descriptor-out-of-range");
}

#[test]
fn a_next_out_of_range() {
    assert_eq!(chain(|raw| raw.desc(0, BUFFER, 4, NEXT, 8)), "descriptor-out-of-range");
}

#[test]
fn a_chain_that_loops() {
    assert_eq!(chain(|raw| raw.desc(0, BUFFER, 4, NEXT, 0)), "descriptor-loop");
    let two = |raw: &Raw| {
        raw.desc(0, BUFFER, 4, NEXT, 1);
        raw.desc(1, BUFFER, 4, NEXT, 0);
    };
    assert_eq!(chain(two), "descriptor-loop");
}

#[test]
fn a_chain_as_long_as_the_ring_is_good() {
    let mut raw = Raw::new(8);
    (0..8).for_each(|index| raw.desc(index, BUFFER, 4, if index < 7 { NEXT } else { 0 }, index + 1));
    raw.offer(0);
    assert_eq!(take(&mut raw.ring().unwrap(), 1).unwrap()[0].readable().total(), 32);
}

#[test]
fn zero_length() {
    assert_eq!(chain(|raw| raw.desc(0, BUFFER, 0, 0, 0)), "zero-length-descriptor");
    assert_eq!(chain(|raw| raw.desc(0, BUFFER, 0, WRITE, 0)), "zero-length-descriptor");
}

#[test]
fn readable_after_writable() {
    let chain = chain(|raw| {
        raw.desc(0, BUFFER, 4, WRITE | NEXT, 1);
        raw.desc(1, BUFFER, 4, 0, 0);
    });
    assert_eq!(chain, "readable-after-writable");
}

#[test]
fn a_buffer_outside_memory() {
    let end = BASE + 0x40_0000;
    for (address, size) in
        [(0, 1), (BASE - 1, 1), (BASE - 1, 2), (end, 1), (end - 1, 2), (BASE, u32::MAX), (u64::MAX, 1), (u64::MAX, 2)]
    {
        assert_eq!(chain(|raw| raw.desc(0, address, size, 0, 0)), "address-outside-memory", "{address:#x} {size}");
        assert_eq!(chain(|raw| raw.desc(0, address, size, WRITE, 0)), "address-outside-memory", "{address:#x} {size}");
    }
}

#[test]
fn a_writable_buffer_in_read_only_memory() {
    let read_only = |raw: &Raw| raw.memory.add(0, &mapping(0x1000, false), 0, 0x1000, false).unwrap();
    let write = chain(|raw| {
        read_only(raw);
        raw.desc(0, 0x10, 4, WRITE, 0);
    });
    assert_eq!(write, "region-read-only");
    let mut raw = Raw::new(8);
    read_only(&raw);
    raw.desc(0, 0x10, 4, 0, 0);
    raw.offer(0);
    assert_eq!(take(&mut raw.ring().unwrap(), 1).unwrap().len(), 1, "reading it is good");
}

#[test]
fn more_bytes_than_a_used_length_can_tell() {
    let chain = chain(|raw| {
        let size = 1 << 31;
        raw.memory.add(1 << 40, &mapping(size, true), 0, size, true).unwrap();
        raw.desc(0, 1 << 40, size as u32, NEXT, 1);
        raw.desc(1, 1 << 40, size as u32, WRITE, 0);
    });
    assert_eq!(chain, "chain-too-large");
}

#[test]
fn an_index_that_jumps() {
    let mut raw = Raw::new(8);
    raw.desc(0, BUFFER, 4, 0, 0);
    let mut ring = raw.ring().unwrap();
    raw.set_index(9);
    assert_eq!(name(take(&mut ring, 1)), "index-jump");

    // Backwards is a jump, too.
    raw.set_index(0);
    raw.offer(0);
    let mut ring = raw.ring().unwrap();
    assert_eq!(take(&mut ring, 10).unwrap().len(), 1);
    raw.set_index(0);
    assert_eq!(name(take(&mut ring, 1)), "index-jump");
}

#[test]
fn a_head_that_is_still_in_flight() {
    let mut raw = Raw::new(8);
    raw.desc(3, BUFFER, 4, 0, 0);
    let mut ring = raw.ring().unwrap();
    raw.offer(3);
    assert_eq!(take(&mut ring, 1).unwrap().len(), 1);
    assert!(ring.complete([(3, 0)]).unwrap());
    raw.offer(3);
    raw.offer(3);
    assert_eq!(take(&mut ring, 10).unwrap().len(), 1, "the second time it was free");
    assert_eq!(name(take(&mut ring, 10)), "descriptor-in-use");
    assert_eq!(ring.in_flight(), 1);
}

#[test]
fn more_memory_in_flight_than_a_queue_remembers() {
    let mut raw = Raw::new(32768);
    for entry in 0..32768 {
        raw.desc_at(ROOM + 16 * entry, BUFFER, 1, if entry < 32767 { NEXT } else { 0 }, entry as u16 + 1);
    }
    for head in 0..40 {
        raw.desc(head, BUFFER, 16 * 32768, INDIRECT, 0);
        raw.offer(head);
    }
    let mut ring = raw.ring().unwrap();
    let chains = take(&mut ring, 100).unwrap();
    assert_eq!(chains.len(), 32);
    assert_eq!(name(take(&mut ring, 100)), "too-many-buffers");

    // Completing them gives the room back.
    raw.set_index(0);
    let mut ring = raw.ring().unwrap();
    for head in 0..64 {
        raw.desc(head, BUFFER, 16 * 32768, INDIRECT, 0);
        raw.offer(head);
        assert_eq!(take(&mut ring, 1).unwrap().len(), 1);
        assert!(ring.complete([(head, 0)]).unwrap());
    }
}

/// What is wrong with an indirect table at `BUFFER`, of `size` bytes.
fn table(size: u32, write: impl FnOnce(&Raw)) -> &'static str {
    chain(|raw| {
        raw.desc(0, BUFFER, size, INDIRECT, 0);
        write(raw);
    })
}

fn entry(raw: &Raw, index: u64, address: u64, size: u32, flags: u16, next: u16) {
    raw.desc_at(ROOM + 16 * index, address, size, flags, next);
}

#[test]
fn an_indirect_table_without_the_feature() {
    let mut raw = Raw::new(8);
    raw.setup.features.indirect = false;
    assert_eq!(chain_of(raw, 0, |raw| raw.desc(0, BUFFER, 16, INDIRECT, 0)), "indirect-not-negotiated");
}

#[test]
fn indirect_tables_of_odd_sizes() {
    for size in [0, 1, 15, 17, 32 + 8, u32::MAX] {
        assert_eq!(table(size, |_| ()), "indirect-table-size", "{size}");
    }
    assert_eq!(table(16 * 9, |_| ()), "indirect-table-too-long");
    assert_eq!(table(16 * 0x0fff_ffff, |_| ()), "indirect-table-too-long");
}

#[test]
fn an_indirect_descriptor_with_a_next_one() {
    assert_eq!(chain(|raw| raw.desc(0, BUFFER, 16, INDIRECT | NEXT, 1)), "indirect-next");
}

#[test]
fn a_table_in_a_table() {
    assert_eq!(table(16, |raw| entry(raw, 0, BUFFER, 16, INDIRECT, 0)), "indirect-nested");
}

#[test]
fn a_table_outside_memory() {
    assert_eq!(chain(|raw| raw.desc(0, 0, 16, INDIRECT, 0)), "address-outside-memory");
    assert_eq!(chain(|raw| raw.desc(0, BASE + 0x40_0000 - 8, 16, INDIRECT, 0)), "address-outside-memory");
    assert_eq!(chain(|raw| raw.desc(0, u64::MAX - 7, 16, INDIRECT, 0)), "address-outside-memory");
}

#[test]
fn a_next_outside_its_table() {
    assert_eq!(table(32, |raw| entry(raw, 0, BUFFER, 1, NEXT, 2)), "descriptor-out-of-range");
}

#[test]
fn a_loop_in_a_table() {
    assert_eq!(table(32, |raw| entry(raw, 0, BUFFER, 1, NEXT, 0)), "descriptor-loop");
}

#[test]
fn zero_length_in_a_table() {
    assert_eq!(table(16, |raw| entry(raw, 0, BUFFER, 0, 0, 0)), "zero-length-descriptor");
}

#[test]
fn a_chain_and_a_table_that_are_longer_than_the_ring_together() {
    let long = |direct: u16| {
        move |raw: &Raw| {
            (0..direct).for_each(|index| raw.desc(index, BUFFER, 1, NEXT, index + 1));
            raw.desc(direct, BUFFER, 16 * 6, INDIRECT, 0);
            (0..6).for_each(|index| entry(raw, index, BUFFER, 1, if index < 5 { NEXT } else { 0 }, index as u16 + 1));
        }
    };
    assert_eq!(chain(long(3)), "chain-too-long");
    let mut raw = Raw::new(8);
    long(2)(&raw);
    raw.offer(0);
    assert_eq!(take(&mut raw.ring().unwrap(), 1).unwrap()[0].readable().total(), 8, "8 descriptors are good");
}

#[test]
fn the_write_flag_of_a_descriptor_that_refers_to_a_table_means_nothing() {
    let mut raw = Raw::new(8);
    raw.desc(0, BUFFER, 16, INDIRECT | WRITE, 0);
    entry(&raw, 0, BUFFER, 5, 0, 0);
    raw.offer(0);
    let chains = take(&mut raw.ring().unwrap(), 1).unwrap();
    assert_eq!((chains[0].readable().total(), chains[0].writable().total()), (5, 0));
}

#[test]
fn a_table_may_lie_anywhere() {
    // Off any alignment, and over the border of two regions.
    let border = 1 << 32;
    let [low, high] = [mapping(0x1000, true), mapping(0x1000, true)];
    for start in (border - 40)..border {
        let mut raw = Raw::new(8);
        raw.memory.add(border - 0x1000, &low, 0, 0x1000, true).unwrap();
        raw.memory.add(border, &high, 0, 0x1000, true).unwrap();
        let place = |at: u64| if at < border { (&low, at + 0x1000 - border) } else { (&high, at - border) };
        let mut bytes = Vec::new();
        for (size, flags, next) in [(3u32, NEXT, 2u16), (0, 0, 0), (7, WRITE, 0)] {
            bytes.extend(BUFFER.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
        }
        for (index, byte) in bytes.iter_mut().enumerate() {
            let (mapping, offset) = place(start + index as u64);
            VolatileSlice::from(std::slice::from_mut(byte)).copy_to_volatile_slice(mapping.slice(offset as usize, 1));
        }
        raw.desc(0, start, 48, INDIRECT, 0);
        raw.offer(0);
        let chains = take(&mut raw.ring().unwrap(), 1).unwrap();
        assert_eq!((chains[0].readable().total(), chains[0].writable().total()), (3, 7), "{start:#x}");
    }
}

#[test]
fn queue_sizes() {
    for size in [0, 3, 6, 255, 65536, u32::MAX] {
        assert_eq!(name(Raw::new(size).ring()), "queue-size", "{size}");
    }
    let raw = Raw::new(8);
    assert_eq!(name(DeviceRing::new(raw.memory.clone(), 4, raw.setup)), "queue-size");
    for size in [1, 2, 32768] {
        assert_eq!(u32::from(Raw::new(size).ring().unwrap().size()), size);
    }
}

#[test]
fn rings_off_their_alignment() {
    type Spoil = fn(&mut Raw);
    let spoils: [Spoil; 3] = [|raw| raw.setup.desc += 8, |raw| raw.setup.driver += 1, |raw| raw.setup.device += 2];
    for spoil in spoils {
        let mut raw = Raw::new(8);
        spoil(&mut raw);
        assert_eq!(name(raw.ring()), "ring-misaligned");
    }
    // Aligned for the driver, but its region begins at an odd place of the file.
    let raw = Raw::new(8);
    raw.memory.clear();
    raw.memory.add(BASE, &raw.mapping, 1, 0x30_0000, true).unwrap();
    assert_eq!(name(raw.ring()), "ring-misaligned");
}

#[test]
fn rings_outside_memory() {
    for address in [0, BASE - 16, BASE + 0x40_0000 - 16, BASE + 0x40_0000, u64::MAX - 15] {
        for part in 0..3 {
            let mut raw = Raw::new(8);
            *[&mut raw.setup.desc, &mut raw.setup.driver, &mut raw.setup.device][part] = address;
            assert_eq!(name(raw.ring()), "ring-outside-memory", "{address:#x}");
        }
    }
    // The device has to write its used ring.
    let raw = Raw::new(8);
    raw.memory.clear();
    raw.memory.add(BASE, &raw.mapping, 0, 0x40_0000, false).unwrap();
    assert_eq!(name(raw.ring()), "ring-outside-memory");
}

#[test]
fn a_ring_may_end_where_its_memory_ends() {
    let mut raw = Raw::new(8);
    raw.setup.device = BASE + 0x40_0000 - (4 + 8 * 8);
    raw.ring().unwrap();
    raw.setup.features.event_idx = true;
    assert_eq!(name(raw.ring()), "ring-outside-memory", "the event field is missing");
    raw.setup.device -= 4;
    raw.ring().unwrap();
}

#[test]
fn memory_that_goes_away_under_a_running_ring() {
    let mut raw = Raw::new(8);
    raw.desc(0, BUFFER, 4, 0, 0);
    raw.offer(0);
    let mut ring = raw.ring().unwrap();
    let chains = take(&mut ring, 1).unwrap();
    raw.memory.clear();
    assert_eq!(name(ring.complete([(0, 0)])), "ring-outside-memory");
    assert!(take(&mut ring, 1).unwrap().is_empty());
    let mut bytes = [1; 4];
    chains[0].readable().read(0, VolatileSlice::from(&mut bytes[..]));
    assert_eq!(bytes, [0; 4], "a chain keeps its memory");

    raw.memory.add(BASE, &raw.mapping, 0, 0x40_0000, true).unwrap();
    let mut ring = raw.ring().unwrap();
    raw.memory.clear();
    assert_eq!(name(take(&mut ring, 1)), "ring-outside-memory");
}

#[test]
fn nothing_is_completed_after_memory_was_gone() {
    let mut raw = Raw::new(8);
    (0..2).for_each(|head| raw.desc(head, BUFFER, 4, 0, 0));
    raw.offer(0);
    raw.offer(1);
    let mut ring = raw.ring().unwrap();
    assert_eq!(take(&mut ring, 2).unwrap().len(), 2);
    raw.memory.clear();
    assert_eq!(name(ring.complete([(0, 0)])), "ring-outside-memory");
    assert_eq!(ring.in_flight(), 0);
    raw.memory.add(BASE, &raw.mapping, 0, 0x40_0000, true).unwrap();
    assert!(!ring.complete([(0, 0), (1, 0)]).unwrap());
    assert_eq!(raw.used_index(), 0);
}

#[test]
fn no_limit_is_too_large() {
    let mut raw = Raw::new(8);
    (0..2).for_each(|head| raw.desc(head, BUFFER, 4, 0, 0));
    let mut ring = raw.ring().unwrap();
    let mut chains = Vec::new();
    for head in 0..2 {
        raw.offer(head);
        ring.take(usize::MAX, &mut chains).unwrap();
    }
    assert_eq!(chains.iter().map(Chain::head).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn a_ring_follows_memory_that_moves() {
    let mut raw = Raw::new(8);
    raw.desc(0, BUFFER, 4, 0, 0);
    let mut ring = raw.ring().unwrap();
    // The same addresses, other memory behind them: what a memory table that is sent anew looks like.
    let other = Raw::new(8);
    raw.memory.remove(BASE).unwrap();
    raw.memory.add(BASE, &other.mapping, 0, 0x40_0000, true).unwrap();
    raw.offer(0);
    assert!(take(&mut ring, 1).unwrap().is_empty(), "the old memory is nobody's");
    (raw.mapping, raw.window) = (other.mapping, other.window);
    raw.set_index(0);
    raw.desc(0, BUFFER, 4, 0, 0);
    raw.offer(0);
    assert_eq!(take(&mut ring, 1).unwrap().len(), 1);
    assert!(ring.complete([(0, 0)]).unwrap());
    assert_eq!(raw.used_index(), 1);
}

#[test]
fn only_what_is_in_flight_is_completed_and_once() {
    let mut raw = Raw::new(8);
    (0..2).for_each(|head| raw.desc(head, BUFFER, 4, 0, 0));
    raw.offer(0);
    let mut ring = raw.ring().unwrap();
    assert_eq!(take(&mut ring, 10).unwrap().len(), 1);
    assert!(!ring.complete([(1, 0), (8, 0), (65535, 0)]).unwrap());
    assert_eq!(raw.used_index(), 0);
    assert!(ring.complete([(0, 0), (0, 0)]).unwrap());
    assert_eq!((raw.used_index(), ring.in_flight()), (1, 0));
}

#[test]
fn notifications_are_off_while_there_is_something_and_on_again_when_there_is_nothing() {
    let mut raw = Raw::new(8);
    (0..2).for_each(|head| raw.desc(head, BUFFER, 4, 0, 0));
    let mut ring = raw.ring().unwrap();
    assert_eq!(raw.used_flags(), 0);
    raw.offer(0);
    raw.offer(1);
    assert_eq!(take(&mut ring, 1).unwrap().len(), 1);
    assert_eq!(raw.used_flags(), 1);
    assert_eq!(take(&mut ring, 10).unwrap().len(), 1);
    assert_eq!(raw.used_flags(), 1);
    assert_eq!(take(&mut ring, 0).unwrap().len(), 0);
    assert_eq!(raw.used_flags(), 1, "nothing was asked for");
    assert_eq!(take(&mut ring, 10).unwrap().len(), 0);
    assert_eq!(raw.used_flags(), 0);
}

/// A thread that changes a descriptor under the device, between good and bad, as fast as it can.
fn mutate(place: impl Fn(u64) -> u64 + Sync, head: impl Fn(&Raw)) {
    const ROUNDS: usize = 20_000;
    let mut raw = Raw::new(8);
    head(&raw);
    let stop = AtomicBool::new(false);
    let variants = [
        (BUFFER, 16, 0),
        (BUFFER + 64, 32, WRITE),
        (0, 16, 0),
        (BUFFER, 0x7fff_ffff, 0),
        (BUFFER, 0, WRITE),
        (u64::MAX - 3, 8, 0),
        (BUFFER, 16, NEXT),
        (BUFFER, 48, INDIRECT),
    ];
    let (window, target) = (raw.window.clone(), place(0) as usize);
    let mut given = 0;
    let mut refused = 0;
    /// Ends the mutator when the test fails too, which would otherwise wait for it.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (address, size, flags) in variants {
                    window.store64(target, address, Ordering::Relaxed);
                    window.store64(target + 8, size | u64::from(flags) << 32, Ordering::Relaxed);
                }
            }
        });
        let mut ring = raw.ring().unwrap();
        for _ in 0..ROUNDS {
            raw.offer(0);
            match take(&mut ring, 1) {
                Ok(chains) => {
                    given += 1;
                    let chain = &chains[0];
                    for segments in [chain.readable(), chain.writable()] {
                        // What was checked is what is used: sizes that were written, all of it inside memory. The
                        // two words of a descriptor may be of different writes, and a chain may come back to it.
                        let total = segments.total();
                        assert!(total % 8 == 0 && total <= 8 * 48, "{total}");
                        let sum: usize = segments.iter().map(|(_, _, size)| size).sum();
                        assert_eq!(segments.total(), sum as u64);
                        let mut bytes = vec![0; sum];
                        segments.read(0, VolatileSlice::from(&mut bytes[..]));
                    }
                    assert!(ring.complete([(0, 0)]).unwrap());
                }
                Err(violation) => {
                    refused += 1;
                    let known = [
                        "address-outside-memory",
                        "zero-length-descriptor",
                        "descriptor-loop",
                        "indirect-table-size",
                        "indirect-table-too-long",
                        "indirect-nested",
                        "indirect-next",
                    ];
                    assert!(known.contains(&violation.name()), "{violation}");
                    raw.set_index(0);
                    ring = raw.ring().unwrap();
                }
            }
        }
    });
    assert_eq!(given + refused, ROUNDS);
}

#[test]
fn a_descriptor_that_changes_between_two_reads() {
    mutate(|_| 0, |_| ());
}

#[test]
fn a_table_entry_that_changes_between_two_reads() {
    mutate(|_| ROOM + 0x1000, |raw| raw.desc(0, BUFFER + 0x1000, 16, INDIRECT, 0));
}

// The driver side, with a device that lies.

struct Liar {
    ring: DriverRing,
    used: Window,
    index: u16,
}

impl Liar {
    fn new(indirect: bool) -> Self {
        Self::with(Features { indirect, ..Features::default() })
    }

    fn with(features: Features) -> Self {
        let arena: Arc<Mapping> = mapping(0x1_0000, true);
        let ring = DriverRing::new(&arena, 0, BASE, 8, features).unwrap();
        let offset = (ring.device() - BASE) as usize;
        Self { ring, used: Window::new(arena, offset, 0x100), index: 0 }
    }

    /// Add a request with so many bytes to write, and show it.
    fn request(&mut self, writable: u64) -> u16 {
        let token = self.ring.add(&[(BASE, 16)], &[(BASE, writable)]).unwrap().unwrap();
        let _ = self.ring.publish();
        token
    }

    fn uses(&mut self, id: u32, written: u32) {
        let place = 4 + 8 * usize::from(self.index % 8);
        self.used.store32(place, id, Ordering::Relaxed);
        self.used.store32(place + 4, written, Ordering::Relaxed);
        self.moves(self.index.wrapping_add(1));
    }

    fn moves(&mut self, index: u16) {
        self.index = index;
        self.used.store16(2, index, Ordering::Release);
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
fn a_used_index_that_jumps() {
    for indirect in [false, true] {
        let mut liar = Liar::new(indirect);
        liar.moves(1);
        assert_eq!(liar.caught(0), "used-index-jump", "nothing is outstanding");

        let mut liar = Liar::new(indirect);
        let first = liar.request(8);
        liar.request(8);
        liar.uses(first.into(), 8);
        assert_eq!(liar.reap().unwrap(), [(first, 8)]);
        liar.moves(3);
        assert_eq!(liar.caught(0), "used-index-jump");

        let mut liar = Liar::new(indirect);
        let first = liar.request(8);
        liar.uses(first.into(), 8);
        assert_eq!(liar.reap().unwrap(), [(first, 8)]);
        liar.moves(0);
        assert_eq!(liar.caught(0), "used-index-jump", "backwards");
    }
}

#[test]
fn a_used_id_that_is_not_outstanding() {
    for id in [1, 7, 8, 65536, 65537, u32::MAX] {
        let mut liar = Liar::new(true);
        liar.request(8);
        liar.uses(id, 0);
        assert_eq!(liar.caught(0), "used-id-unknown", "{id}");
    }
    // The second descriptor of a chain is no head.
    let mut liar = Liar::new(false);
    assert_eq!(liar.request(8), 0);
    liar.uses(1, 0);
    assert_eq!(liar.caught(0), "used-id-unknown");
}

#[test]
fn a_request_that_is_used_twice() {
    let mut liar = Liar::new(true);
    let first = liar.request(8);
    liar.request(8);
    liar.uses(first.into(), 8);
    liar.uses(first.into(), 8);
    assert_eq!(liar.caught(1), "used-id-unknown");
}

#[test]
fn a_request_that_was_never_shown() {
    let mut liar = Liar::new(true);
    liar.request(8);
    let hidden = liar.ring.add(&[], &[(BASE, 8)]).unwrap().unwrap();
    liar.uses(hidden.into(), 8);
    assert_eq!(liar.caught(0), "used-id-unknown");
}

#[test]
fn more_bytes_than_were_writable() {
    for indirect in [false, true] {
        let mut liar = Liar::new(indirect);
        let [first, second] = [liar.request(8), liar.request(8)];
        liar.uses(first.into(), 8);
        liar.uses(second.into(), 9);
        assert_eq!(liar.caught(1), "used-length");
    }
}

#[test]
fn in_order_a_device_may_say_only_the_last_of_several() {
    for round in 0..20 {
        let mut liar = Liar::with(Features { indirect: round % 2 == 0, in_order: true, ..Features::default() });
        for _ in 0..round {
            let tokens = [liar.request(8), liar.request(9), liar.request(10)];
            // In the entry of the first, and the index is behind all of them.
            liar.uses(tokens[1].into(), 3);
            liar.moves(liar.index.wrapping_add(1));
            let mut finished = Vec::new();
            liar.ring.reap(1, &mut finished).unwrap();
            assert_eq!((finished.pop(), liar.ring.outstanding()), (Some((tokens[0], 8)), 2));
            assert_eq!(liar.reap().unwrap(), [(tokens[1], 3)]);
            liar.uses(tokens[2].into(), 0);
            assert_eq!(liar.reap().unwrap(), [(tokens[2], 0)]);
        }
    }
}

#[test]
fn in_order_an_index_that_is_not_behind_the_last_of_several() {
    let mut liar = Liar::with(Features { in_order: true, ..Features::default() });
    let tokens = [liar.request(8), liar.request(8), liar.request(8)];
    liar.uses(tokens[0].into(), 8);
    liar.uses(tokens[2].into(), 8);
    assert_eq!(liar.caught(1), "used-index-jump");
}

#[test]
fn in_order_descriptors_are_taken_round_and_round() {
    let arena = mapping(0x1_0000, true);
    let features = Features { in_order: true, ..Features::default() };
    let mut liar = Liar {
        ring: DriverRing::new(&arena, 0, BASE, 8, features).unwrap(),
        used: Window::new(arena.clone(), 0, 16 * 8),
        index: 0,
    };
    let used = Window::new(arena, (liar.ring.device() - BASE) as usize, 0x100);
    let descriptors = std::mem::replace(&mut liar.used, used);
    for round in 0..30u16 {
        let token = liar.ring.add(&[(BASE, 1), (BASE, 2), (BASE, 3)], &[]).unwrap().unwrap();
        let _ = liar.ring.publish();
        assert_eq!(token, 3 * round % 8);
        let next = |index: u16| descriptors.load16(16 * usize::from(index % 8) + 14, Ordering::Relaxed);
        assert_eq!((next(token), next(token + 1)), ((token + 1) % 8, (token + 2) % 8));
        liar.uses(token.into(), 0);
        assert_eq!(liar.reap().unwrap(), [(token, 0)]);
    }
}

#[test]
fn a_device_that_writes_over_the_drivers_own_parts_changes_nothing_of_what_it_knows() {
    let arena = mapping(0x1_0000, true);
    let mut ring = DriverRing::new(&arena, 0, BASE, 8, Features::default()).unwrap();
    let all = Window::new(arena, 0, DriverRing::bytes_needed(8).unwrap());
    let used = (ring.device() - BASE) as usize;
    for round in 0..100u16 {
        let first = ring.add(&[(BASE, 1), (BASE, 2), (BASE, 3)], &[]).unwrap().unwrap();
        let second = ring.add(&[(BASE, 1)], &[(BASE, 2)]).unwrap().unwrap();
        let _ = ring.publish();
        assert_eq!(ring.free(), 3);
        (0..used).step_by(8).for_each(|place| all.store64(place, u64::MAX, Ordering::Relaxed));
        for (place, id) in [(2 * round, second), (2 * round + 1, first)] {
            all.store32(used + 4 + 8 * usize::from(place % 8), id.into(), Ordering::Relaxed);
            all.store32(used + 8 + 8 * usize::from(place % 8), 0, Ordering::Relaxed);
        }
        all.store16(used + 2, 2 * round + 2, Ordering::Release);
        let mut finished = Vec::new();
        ring.reap(10, &mut finished).unwrap();
        assert_eq!(finished, [(second, 0), (first, 0)]);
        assert_eq!(ring.free(), 8);
    }
}

#[test]
fn memory_that_one_driver_lists_twice_is_only_that_drivers_loss() {
    // Readable and writable are the same bytes: copying one into the other is no undefined behaviour.
    let memory = Memory::new(4, 1 << 20);
    memory.add(0, &mapping(0x1000, true), 0, 0x1000, true).unwrap();
    let mut segments = vbus_ring::mem::Segments::default();
    let table = memory.snapshot();
    table.translate(0, 100, vbus_ring::mem::Access::Write, &mut segments).unwrap();
    let (mapping, offset, size) = segments.iter().next().unwrap();
    let mut bytes: Vec<u8> = (0..100).collect();
    segments.write(0, VolatileSlice::from(&mut bytes[..]));
    segments.write(10, mapping.slice(offset, size - 10));
    segments.read(0, VolatileSlice::from(&mut bytes[..]));
    let want: Vec<u8> = (0..10).chain(0..90).collect();
    assert_eq!(bytes, want);
}
