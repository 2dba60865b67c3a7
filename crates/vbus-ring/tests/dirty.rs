//! The log of written pages: which bits are set and when, and that none is missed while it is switched on.
#![cfg(not(loom))]

mod memory;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use memory::mapping;
use vbus_ring::dirty::PAGE;
use vbus_ring::mem::{Mapping, Memory, VolatileSlice, Window};
use vbus_ring::ring::split::DeviceRing;
use vbus_ring::ring::Chain;
use vbus_ring::ring::{Features, Setup};
use vbus_ring::violation::Violation;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Driver addresses: each part of the ring on pages of its own, 2 MiB of buffers behind.
const DESC: u64 = 0x10_0000;
const AVAIL: u64 = 0x20_0000;
const USED: u64 = 0x30_0000;
const DATA: u64 = 0x40_0000;
const END: u64 = 0x60_0000;

struct World {
    memory: Arc<Memory>,
    window: Window,
    size: u16,
    event_idx: bool,
    avail: u16,
}

impl World {
    fn new(size: u16, event_idx: bool) -> Self {
        let mapping = mapping(END - DESC, true);
        let memory = Arc::new(Memory::new(1, END));
        memory.add(DESC, &mapping, 0, END - DESC, true).unwrap();
        Self { memory, window: Window::new(mapping, 0, (END - DESC) as usize), size, event_idx, avail: 0 }
    }

    fn ring(&self) -> Result<DeviceRing, Violation> {
        let (size, event_idx) = (u32::from(self.size), self.event_idx);
        let features = Features { event_idx, ..Features::default() };
        let setup = Setup { size, desc: DESC, driver: AVAIL, device: USED, features, resume: None };
        DeviceRing::new(self.memory.clone(), size, setup)
    }

    fn desc(&self, index: u16, address: u64, size: u32, flags: u16) {
        let place = 16 * usize::from(index);
        let rest = u64::from(size) | u64::from(flags) << 32 | u64::from(index + 1) << 48;
        self.window.store64(place, address, Ordering::Relaxed);
        self.window.store64(place + 8, rest, Ordering::Relaxed);
    }

    fn offer(&mut self, head: u16) {
        let place = (AVAIL - DESC) as usize;
        let entry = place + 4 + 2 * usize::from(self.avail & (self.size - 1));
        self.window.store16(entry, head, Ordering::Relaxed);
        self.avail = self.avail.wrapping_add(1);
        self.window.store16(place + 2, self.avail, Ordering::Release);
    }

    fn log(&self) -> Arc<Mapping> {
        let log = mapping(END / PAGE / 8, true);
        self.memory.log(Some(log.clone()));
        log
    }
}

fn take(ring: &mut DeviceRing) -> Vec<Chain> {
    let mut chains = Vec::new();
    ring.take(100, &mut chains).unwrap();
    chains
}

fn complete(ring: &mut DeviceRing, chains: &[Chain]) -> Result<bool, Violation> {
    ring.complete_chains(chains.iter().map(|chain| (chain, 0)))
}

/// The pages whose bits are set, taken away as a hypervisor does.
fn taken(log: &Arc<Mapping>) -> BTreeSet<u64> {
    let words = Window::new(log.clone(), 0, log.size());
    let mut pages = BTreeSet::new();
    for word in 0..log.size() / 8 {
        // SAFETY: inside the mapping, and aligned.
        let bits = unsafe { AtomicU64::from_ptr(log.as_ptr().cast::<u64>().add(word)) }.swap(0, Ordering::AcqRel);
        pages.extend((0..64).filter(|bit| u64::from_le(bits) >> bit & 1 != 0).map(|bit| 64 * word as u64 + bit));
    }
    drop(words);
    pages
}

fn pages<const N: usize>(addresses: [u64; N]) -> BTreeSet<u64> {
    addresses.into_iter().map(|address| address / PAGE).collect()
}

#[test]
fn bytes_that_are_written_have_their_pages_said() {
    let world = World::new(8, false);
    let write = |address, size| {
        let mut bytes = vec![7; size];
        world.memory.write(address, VolatileSlice::from(&mut bytes[..])).unwrap();
    };
    write(DATA, 1);
    let log = world.log();
    assert_eq!(taken(&log), pages([]));
    for (address, size, want) in [
        (DATA, 1, vec![0]),
        (DATA + PAGE - 1, 1, vec![0]),
        (DATA + PAGE - 1, 2, vec![0, 1]),
        (DATA + 7 * PAGE, 4096, vec![7]),
        (DATA + 7 * PAGE, 4097, vec![7, 8]),
        (DATA + 5 * PAGE + 1, 20 * 4096, (5..26).collect()),
        (DATA + 8 * PAGE, 16 * 4096, (8..24).collect()),
        (END - 1, 1, vec![511]),
        (DATA, 0, vec![]),
    ] {
        write(address, size);
        assert_eq!(taken(&log), want.into_iter().map(|page: u64| DATA / PAGE + page).collect(), "{address:#x} {size}");
    }
    let byte = (DATA / PAGE / 8) as usize;
    write(DATA + 3 * PAGE, 1);
    assert_eq!(Window::new(log.clone(), byte, 1).load8(0, Ordering::Relaxed), 8, "bit 3 of byte page / 8");
    world.memory.log(None);
    write(DATA + 9 * PAGE, 1);
    assert_eq!(taken(&log), pages([DATA + 3 * PAGE]));
}

#[test]
fn a_request_is_said_when_it_is_completed() {
    for event_idx in [false, true] {
        let mut world = World::new(8, event_idx);
        let mut ring = world.ring().unwrap();
        world.desc(0, DATA + 10 * PAGE, 4096, NEXT);
        world.desc(1, DATA + 20 * PAGE + 5, 8192, WRITE | NEXT);
        world.desc(2, DATA + 30 * PAGE, 1, WRITE);
        world.desc(3, DATA + 40 * PAGE, 1, WRITE);
        world.offer(0);
        world.offer(3);
        let chains = take(&mut ring);
        assert!(take(&mut ring).is_empty());
        // Taken before there was a log; all that may have been written, whatever is said to be.
        let log = world.log();
        let _ = complete(&mut ring, &chains[..1]).unwrap();
        let data = [20, 21, 22, 30].map(|page| DATA + page * PAGE);
        assert_eq!(taken(&log), &pages(data) | &pages([USED]));
        let _ = complete(&mut ring, &chains[..1]).unwrap();
        assert_eq!(taken(&log), pages([]), "nothing of it is in flight");
        let _ = complete(&mut ring, &chains[1..]).unwrap();
        assert_eq!(taken(&log), pages([DATA + 40 * PAGE, USED]));
        // Off, and what is in flight then is not said.
        world.offer(3);
        let chains = take(&mut ring);
        let said = taken(&log);
        assert_eq!(said, if event_idx { pages([]) } else { pages([USED]) }, "silence is a flag, or nothing");
        world.memory.log(None);
        let _ = complete(&mut ring, &chains).unwrap();
        assert_eq!(taken(&log), pages([]));
    }
}

#[test]
fn the_words_of_the_used_ring_that_are_written_are_said() {
    // Of 4096, the used ring takes 8 pages and the event field one more.
    let mut world = World::new(4096, true);
    world.desc(0, DATA, 1, WRITE);
    let mut ring = world.ring().unwrap();
    let log = world.log();
    assert!(take(&mut ring).is_empty());
    assert_eq!(taken(&log), pages([USED + 4 + 8 * 4096]), "the event field");
    for index in 0..4096 + 600_u64 {
        world.offer(0);
        let chains = take(&mut ring);
        taken(&log);
        let _ = complete(&mut ring, &chains).unwrap();
        let entry = USED + 4 + 8 * (index % 4096);
        assert_eq!(taken(&log), pages([USED, entry, entry + 7, DATA]), "{index}");
    }
    // A batch over the end of the ring.
    world.desc(1, DATA, 1, WRITE);
    let mut world = World::new(4096, true);
    (0..8).for_each(|head| world.desc(head, DATA, 1, 0));
    let mut ring = world.ring().unwrap();
    for _ in 0..4092 {
        world.offer(0);
        let chains = take(&mut ring);
        let _ = complete(&mut ring, &chains).unwrap();
    }
    (0..8).for_each(|head| world.offer(head));
    let chains = take(&mut ring);
    let log = world.log();
    let _ = complete(&mut ring, &chains).unwrap();
    assert_eq!(taken(&log), pages([USED, USED + 4 + 8 * 4092, USED + 4 + 8 * 4096 - 1]));
}

#[test]
fn a_ring_that_starts_says_what_it_asks_for() {
    for (event_idx, place) in [(false, 0), (true, 4 + 8 * 4096)] {
        let world = World::new(4096, event_idx);
        let log = world.log();
        let _ring = world.ring().unwrap();
        assert_eq!(taken(&log), pages([USED + place]));
    }
}

#[test]
fn a_log_without_a_bit_for_the_page() {
    let mut world = World::new(8, false);
    world.desc(0, DATA, 9 * 4096, WRITE);
    let mut ring = world.ring().unwrap();
    world.offer(0);
    let chains = take(&mut ring);
    let log = mapping(DATA / PAGE / 8 + 1, true);
    world.memory.log(Some(log.clone()));
    let refused = complete(&mut ring, &chains).unwrap_err();
    assert_eq!(refused.name(), "log-too-small");
    let byte = Window::new(log.clone(), log.size() - 1, 1).load8(0, Ordering::Relaxed);
    assert_eq!(byte, 0xff, "what there is room for is said");
    world.offer(0);
    assert!(take(&mut ring).is_empty(), "the ring is broken");
    world.memory.log(Some(mapping(1, true)));
    let mut bytes = [0; 8];
    assert_eq!(world.memory.write(DATA, VolatileSlice::from(&mut bytes[..])).unwrap_err().name(), "log-too-small");
    assert_eq!(world.ring().err().unwrap().name(), "log-too-small");
}

/// A ring is at work all the time. Whatever changed in its memory since a log was switched on is in that log.
#[test]
fn no_write_is_missed_while_logs_come_and_go() {
    const HEADS: u16 = 256;
    let mut world = World::new(4096, false);
    (0..HEADS).for_each(|head| world.desc(head, DATA + PAGE * u64::from(head), 8, WRITE));
    let mut ring = world.ring().unwrap();
    let (memory, window) = (world.memory.clone(), world.window.clone());
    let stop = AtomicBool::new(false);
    // Held by the worker for each batch, so that the test can look at a ring that rests.
    let rest = Mutex::new(());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut head, mut count) = (0, 0u64);
            while !stop.load(Ordering::Relaxed) {
                let _working = rest.lock().unwrap();
                for _ in 0..50 {
                    for _ in 0..3 {
                        world.offer(head);
                        head = (head + 1) % HEADS;
                    }
                    let chains = take(&mut ring);
                    count += 1;
                    for chain in &chains {
                        chain.writable().write(0, VolatileSlice::from(&mut count.to_le_bytes()[..]));
                    }
                    let _ = complete(&mut ring, &chains).unwrap();
                }
            }
        });
        let place = |address: u64| (address - DESC) as usize;
        let end = Instant::now() + Duration::from_secs(1);
        let mut moved = 0;
        while Instant::now() < end {
            let log = mapping(END / PAGE / 8, true);
            memory.log(Some(log.clone()));
            let before: Vec<u64> =
                (0..HEADS).map(|head| window.load64(place(DATA + PAGE * u64::from(head)), Ordering::SeqCst)).collect();
            let used = window.load16(place(USED) + 2, Ordering::SeqCst);
            let resting = rest.lock().unwrap();
            let said = taken(&log);
            let now = window.load16(place(USED) + 2, Ordering::SeqCst);
            if now != used {
                moved += 1;
                assert!(said.contains(&(USED / PAGE)), "the index moved from {used} to {now}");
            }
            // More than a ring of them may have passed.
            for count in 0..now.wrapping_sub(used).min(4096) {
                let slot = u64::from(now.wrapping_sub(count + 1) % 4096);
                assert!(said.contains(&((USED + 4 + 8 * slot) / PAGE)), "entry {slot}");
            }
            for (head, before) in before.into_iter().enumerate() {
                let address = DATA + PAGE * head as u64;
                if window.load64(place(address), Ordering::SeqCst) != before {
                    assert!(said.contains(&(address / PAGE)), "the buffer of {head}");
                }
            }
            drop(resting);
            memory.log(None);
        }
        stop.store(true, Ordering::Relaxed);
        assert!(moved > 10);
    });
}
