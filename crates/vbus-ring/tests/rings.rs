//! Both sides of a ring against each other, through shared memory, in both layouts.
//!
//! One model knows what each side must see: every byte, the order, what is free, and whether each publication and each
//! completion must notify. Random chains and interleavings run against it, over the end of the 16-bit indices and many laps of a packed ring too. Then
//! two threads that sleep whenever there is nothing to do show that no wakeup is lost.
#![cfg(not(loom))]

mod memory;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender, TrySendError};
use std::sync::Arc;
use std::time::Duration;

use memory::mapping;
use proptest::collection::vec;
use proptest::prelude::*;

use vbus_ring::mem::{Mapping, Memory, VolatileSlice};
use vbus_ring::ring::{AddError, Chain, DeviceRing, DriverRing, Features, Setup, INDIRECT_ENTRIES};
use vbus_ring::violation::Rule;

/// The arena, two adjacent regions of data, and where buffers are: each request has a slot of its own, and one of the
/// slots lies on the border.
const ARENA: u64 = 0x10_0000;
const ARENA_OFFSET: usize = 0x40;
const DATA: u64 = 0x8000_0000;
const DATA_BYTES: u64 = 0x1_0000;
const SLOTS: u64 = 63;
const SLOT_BYTES: u64 = 2048;
const FIRST_SLOT: u64 = DATA + SLOT_BYTES / 2;

#[derive(Clone, Copy, Debug)]
struct Shape {
    size: u32,
    features: Features,
}

impl Shape {
    fn new(size: u32, packed: bool, event_idx: bool, indirect: bool) -> Self {
        Self { size, features: Features { packed, event_idx, indirect, in_order: false } }
    }

    /// What an event counts: in a split ring entries, in a packed one descriptors.
    fn places(self, known: &Known) -> u64 {
        if self.features.packed {
            known.descriptors as u64
        } else {
            1
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Sizes of readable and of writable buffers, and the bytes between two buffers.
    Add(Vec<u64>, Vec<u64>, u64),
    Publish,
    Take(usize),
    /// Which of the requests in flight, one after the other, and how much of each is written.
    Complete(Vec<(usize, usize)>),
    Reap(usize),
}

/// A request, as the model knows it.
#[derive(Clone, Debug)]
struct Known {
    token: u16,
    slot: u64,
    descriptors: usize,
    readable: Vec<(u64, u64)>,
    writable: Vec<(u64, u64)>,
    sent: Vec<u8>,
    received: Vec<u8>,
}

/// By the text of the specification, over counters that do not wrap.
fn must_notify(shape: Shape, asked: Asked, old: u64, new: u64) -> bool {
    if shape.features.event_idx && shape.features.packed {
        !asked.silence && (old..new).contains(&asked.event)
    } else if shape.features.event_idx {
        // An event that was passed is met again after 65536 entries.
        (old..new).any(|entry| entry % 65536 == asked.event % 65536)
    } else {
        new != old && !asked.silence
    }
}

/// What a side last said about the other's index moving.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    silence: bool,
    /// The place that it waits for, by EVENT_IDX, which silence does not move.
    event: u64,
}

struct World {
    shape: Shape,
    memory: Arc<Memory>,
    driver: DriverRing,
    device: DeviceRing,
    fill: u8,
    free_slots: Vec<u64>,
    free: usize,
    added: VecDeque<Known>,
    published: VecDeque<Known>,
    taken: Vec<(Known, Chain)>,
    /// With IN_ORDER: what was taken and not shown, in order, and of those what is completed.
    order: VecDeque<u16>,
    waiting: Vec<Known>,
    completed: VecDeque<Known>,
    outstanding: usize,
    /// Counters of places.
    published_count: u64,
    taken_count: u64,
    completed_count: u64,
    reaped_count: u64,
    device_asked: Asked,
    driver_asked: Asked,
}

impl World {
    fn new(shape: Shape) -> Self {
        let Shape { size, features } = shape;
        let memory = Arc::new(Memory::new(8, 1 << 30));
        let bytes = DriverRing::bytes_needed(size, features.packed).unwrap();
        let arena: Arc<Mapping> = mapping((ARENA_OFFSET + bytes) as u64, true);
        // What was there before must not matter.
        let mut noise = vec![0xa5; arena.size()];
        VolatileSlice::from(&mut noise[..]).copy_to_volatile_slice(arena.slice(0, arena.size()));
        memory.add(ARENA, &arena, 0, arena.size() as u64, true).unwrap();
        for region in 0..2 {
            memory.add(DATA + region * DATA_BYTES, &mapping(DATA_BYTES, true), 0, DATA_BYTES, true).unwrap();
        }
        let driver = DriverRing::new(&arena, ARENA_OFFSET, ARENA, size, features).unwrap();
        let device = DeviceRing::new(memory.clone(), size, setup_of(&driver, features)).unwrap();
        Self {
            shape,
            memory,
            driver,
            device,
            fill: 0,
            free_slots: (0..SLOTS).collect(),
            free: size as usize,
            added: VecDeque::new(),
            published: VecDeque::new(),
            taken: Vec::new(),
            order: VecDeque::new(),
            waiting: Vec::new(),
            completed: VecDeque::new(),
            outstanding: 0,
            published_count: 0,
            taken_count: 0,
            completed_count: 0,
            reaped_count: 0,
            device_asked: Asked::default(),
            driver_asked: Asked::default(),
        }
    }

    fn noise(&mut self, size: u64) -> Vec<u8> {
        (0..size)
            .map(|_| {
                self.fill = self.fill.wrapping_mul(5).wrapping_add(7);
                self.fill
            })
            .collect()
    }

    fn segments(&self, address: u64, size: u64) -> vbus_ring::mem::Segments {
        let mut segments = vbus_ring::mem::Segments::default();
        let table = self.memory.snapshot();
        table.translate(address, size, vbus_ring::mem::Access::Write, &mut segments).unwrap();
        segments
    }

    fn load(&self, buffers: &[(u64, u64)]) -> Vec<u8> {
        let mut all = Vec::new();
        for &(address, size) in buffers {
            let mut bytes = vec![0; size as usize];
            self.segments(address, size).read(0, VolatileSlice::from(&mut bytes[..]));
            all.append(&mut bytes);
        }
        all
    }

    fn store(&self, buffers: &[(u64, u64)], mut bytes: &[u8]) {
        for &(address, size) in buffers {
            let (part, rest) = bytes.split_at(size as usize);
            self.segments(address, size).write(0, VolatileSlice::from(&mut part.to_vec()[..]));
            bytes = rest;
        }
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Add(readable, writable, gap) => self.add(readable, writable, *gap),
            Op::Publish => self.publish(),
            Op::Take(limit) => self.take(*limit),
            Op::Complete(which) => self.complete(which),
            Op::Reap(limit) => self.reap(*limit),
        }
        assert_eq!(self.driver.free(), self.free);
        assert_eq!(self.driver.outstanding(), self.outstanding);
        assert_eq!(self.device.in_flight(), self.taken.len() + self.waiting.len());
    }

    fn add(&mut self, readable: &[u64], writable: &[u64], gap: u64) {
        let Some(slot) = self.free_slots.pop() else {
            return;
        };
        let mut at = FIRST_SLOT + slot * SLOT_BYTES;
        let mut place = |size: &u64| {
            let address = at;
            at += size + gap;
            (address, *size)
        };
        let readable: Vec<_> = readable.iter().map(&mut place).collect();
        let writable: Vec<_> = writable.iter().map(&mut place).collect();
        let count = readable.len() + writable.len();
        let total = |buffers: &[(u64, u64)]| buffers.iter().map(|&(_, size)| size).sum();
        let (sent, before) = (self.noise(total(&readable)), self.noise(total(&writable)));
        self.store(&readable, &sent);
        self.store(&writable, &before);

        let size = self.shape.size as usize;
        let in_table = self.shape.features.indirect && count > 1 && count <= INDIRECT_ENTRIES.min(size);
        let descriptors = if in_table { 1 } else { count };
        match self.driver.add(&readable, &writable) {
            Err(error) => {
                assert_eq!(error, AddError::TooManyBuffers { count, size: size as u16 });
                assert!(count > size);
                self.free_slots.push(slot);
            }
            Ok(None) => {
                assert!(descriptors > self.free, "{descriptors} of {} were refused", self.free);
                self.free_slots.push(slot);
            }
            Ok(Some(token)) => {
                assert!(count <= size && descriptors <= self.free);
                self.free -= descriptors;
                self.added.push_back(Known { token, slot, descriptors, readable, writable, sent, received: before });
            }
        }
    }

    fn publish(&mut self) {
        let old = self.published_count;
        self.published_count += self.added.iter().map(|known| self.shape.places(known)).sum::<u64>();
        self.outstanding += self.added.len();
        self.published.append(&mut self.added);
        let want = must_notify(self.shape, self.device_asked, old, self.published_count);
        assert_eq!(self.driver.publish(), want, "publishing {old} to {}", self.published_count);
    }

    fn take(&mut self, limit: usize) {
        let mut chains = Vec::new();
        self.device.take(limit, &mut chains).unwrap();
        assert_eq!(chains.len(), limit.min(self.published.len()));
        if !chains.is_empty() {
            self.device_asked.silence = true;
        } else if limit > 0 {
            self.device_asked = Asked { silence: false, event: self.taken_count };
        }
        for chain in chains {
            let known = self.published.pop_front().unwrap();
            self.taken_count += self.shape.places(&known);
            assert_eq!(chain.head(), known.token);
            if self.shape.features.in_order {
                self.order.push_back(known.token);
            }
            assert_eq!(chain.writable().total(), known.received.len() as u64);
            let mut bytes = vec![0; chain.readable().total() as usize];
            chain.readable().read(0, VolatileSlice::from(&mut bytes[..]));
            assert_eq!(bytes, known.sent);
            self.taken.push((known, chain));
        }
    }

    fn complete(&mut self, which: &[(usize, usize)]) {
        let mut used = Vec::new();
        for (which, written) in which {
            if self.taken.is_empty() {
                break;
            }
            let (mut known, chain) = self.taken.swap_remove(which % self.taken.len());
            let written = written % (known.received.len() + 1);
            let mut bytes = self.noise(written as u64);
            chain.writable().write(0, VolatileSlice::from(&mut bytes[..]));
            known.received[..written].copy_from_slice(&bytes);
            used.push((chain, written as u32));
            self.waiting.push(known);
        }
        let shown = self.completed.len();
        if self.shape.features.in_order {
            while let Some(at) = self.waiting.iter().position(|known| Some(&known.token) == self.order.front()) {
                self.order.pop_front();
                self.completed.push_back(self.waiting.swap_remove(at));
            }
        } else {
            self.completed.extend(self.waiting.drain(..));
        }
        let old = self.completed_count;
        let places = self.completed.iter().skip(shown).map(|known| self.shape.places(known)).sum::<u64>();
        self.completed_count += places;
        let want = must_notify(self.shape, self.driver_asked, old, self.completed_count);
        let done = self.device.complete_chains(used.iter().map(|(chain, written)| (chain, *written)));
        assert_eq!(done.unwrap(), want, "completing {old} to {}", self.completed_count);
    }

    fn reap(&mut self, limit: usize) {
        let mut finished = Vec::new();
        self.driver.reap(limit, &mut finished).unwrap();
        assert_eq!(finished.len(), limit.min(self.completed.len()));
        self.outstanding -= finished.len();
        self.reaped_count +=
            self.completed.iter().take(finished.len()).map(|known| self.shape.places(known)).sum::<u64>();
        let left = self.completed.len() - finished.len();
        if limit > 0 && left > 0 {
            self.driver_asked.silence = true;
        } else if limit > 0 {
            self.driver_asked = Asked { silence: false, event: self.reaped_count };
        }
        for (token, written) in finished {
            let known = self.completed.pop_front().unwrap();
            assert_eq!(token, known.token);
            assert!(written as usize <= known.received.len());
            assert_eq!(self.load(&known.writable), known.received);
            assert_eq!(self.load(&known.readable), known.sent);
            self.free += known.descriptors;
            self.free_slots.push(known.slot);
        }
    }

    /// Small requests back and forth, to bring the indices near their end.
    fn hurry(&mut self, requests: u64) {
        let target = self.reaped_count + requests;
        let all = vec![(0, 0); 64];
        while self.reaped_count < target {
            for _ in 0..self.shape.size.min(16) {
                self.step(&Op::Add(vec![1], vec![], 0));
            }
            for op in [Op::Publish, Op::Take(64), Op::Complete(all.clone()), Op::Reap(64)] {
                self.step(&op);
            }
        }
    }
}

/// The device's side of what a driver has made.
fn setup_of(driver: &DriverRing, features: Features) -> Setup {
    Setup {
        size: driver.size().into(),
        desc: driver.desc(),
        driver: driver.driver(),
        device: driver.device(),
        features,
        resume: None,
    }
}

fn shape() -> impl Strategy<Value = Shape> {
    let size = prop_oneof![(0..7u32).prop_map(|power| 1 << power), 1..=64u32];
    (size, any::<[bool; 4]>()).prop_map(|(size, [packed, event_idx, indirect, in_order])| {
        let size = if packed { size } else { size.next_power_of_two() };
        Shape { size, features: Features { packed, event_idx, indirect, in_order } }
    })
}

fn op() -> impl Strategy<Value = Op> {
    let sizes = |most| vec(1..64u64, 0..=most);
    let add = (sizes(6), sizes(6), 0..3u64)
        .prop_filter("no buffers", |(readable, writable, _)| readable.len() + writable.len() > 0)
        .prop_map(|(readable, writable, gap)| Op::Add(readable, writable, gap * 7));
    let numbers = (0..1000usize, 0..1000usize);
    prop_oneof![
        6 => add,
        3 => Just(Op::Publish),
        3 => prop_oneof![Just(0usize), 1..4usize, Just(100)].prop_map(Op::Take),
        3 => vec(numbers, 0..6).prop_map(Op::Complete),
        3 => prop_oneof![Just(0usize), 1..4usize, Just(100)].prop_map(Op::Reap),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_sides_agree(shape in shape(), ops in vec(op(), 1..200)) {
        let mut world = World::new(shape);
        ops.iter().for_each(|op| world.step(op));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn both_sides_agree_over_the_end_of_the_indices(
        shape in shape(),
        before in 1..100u64,
        ops in vec(op(), 400..600),
    ) {
        let mut world = World::new(shape);
        world.hurry(65536 - before);
        ops.iter().for_each(|op| world.step(op));
        world.hurry(200);
        prop_assert!(world.reaped_count > 65536);
    }
}

/// Every layout, with and without EVENT_IDX.
fn all() -> impl Iterator<Item = Features> {
    [(false, false), (false, true), (true, false), (true, true)].into_iter().map(|(packed, event_idx)| Features {
        packed,
        event_idx,
        ..Features::default()
    })
}

/// A driver's ring, its memory, and behind it there room for a buffer.
fn plain(size: u32, features: Features) -> (Arc<Memory>, DriverRing, u64) {
    let memory = Arc::new(Memory::new(1, 1 << 30));
    let bytes = DriverRing::bytes_needed(size, features.packed).unwrap();
    let arena = mapping(bytes as u64 + 64, true);
    memory.add(ARENA, &arena, 0, arena.size() as u64, true).unwrap();
    let driver = DriverRing::new(&arena, 0, ARENA, size, features).unwrap();
    (memory, driver, ARENA + bytes as u64)
}

#[test]
fn the_largest_ring_is_filled_and_emptied_over_the_end_of_the_indices() {
    for features in all() {
        let (memory, mut driver, buffer) = plain(32768, features);
        let mut device = DeviceRing::new(memory, 32768, setup_of(&driver, features)).unwrap();
        for _ in 0..5 {
            for _ in 0..32768 {
                assert!(driver.add(&[(buffer, 64)], &[]).unwrap().is_some());
            }
            assert_eq!(driver.add(&[(buffer, 64)], &[]).unwrap(), None);
            assert!(driver.publish());
            let mut chains = Vec::new();
            device.take(usize::MAX, &mut chains).unwrap();
            assert_eq!(chains.len(), 32768);
            device.take(1, &mut Vec::new()).unwrap();
            assert!(device.complete_chains(chains.iter().map(|chain| (chain, 0))).unwrap());
            let mut finished = Vec::new();
            driver.reap(usize::MAX, &mut finished).unwrap();
            assert_eq!(finished.len(), 32768);
        }
    }
}

#[test]
fn wrong_buffers_are_refused() {
    for packed in [false, true] {
        let mut world = World::new(Shape::new(4, packed, false, false));
        let over = 1 << 32;
        assert_eq!(world.driver.add(&[], &[]), Err(AddError::NoBuffers));
        assert_eq!(world.driver.add(&[(DATA, 0)], &[]), Err(AddError::BufferSize(0)));
        assert_eq!(world.driver.add(&[], &[(DATA, over)]), Err(AddError::BufferSize(over)));
        assert_eq!(world.driver.add(&[(DATA, over - 1)], &[(DATA, 1)]), Err(AddError::RequestSize));
        let five = [(DATA, 1); 5];
        assert_eq!(world.driver.add(&five, &[]), Err(AddError::TooManyBuffers { count: 5, size: 4 }));
        assert_eq!(world.driver.free(), 4);
        assert!(!world.driver.publish(), "nothing was added");
    }
}

#[test]
fn a_ring_needs_its_place() {
    let arena = mapping(0x1_0000, true);
    for packed in [false, true] {
        let features = Features { packed, event_idx: true, indirect: true, in_order: false };
        let ring = |offset, address, size| DriverRing::new(&arena, offset, address, size, features).map(|_| ());
        let needed = DriverRing::bytes_needed(16, packed).unwrap();
        assert_eq!(ring(0x1_0000 - needed.next_multiple_of(16), ARENA, 16), Ok(()));
        for (offset, address, size) in [
            (0x1_0000 - needed + 16, ARENA, 16),
            (8, ARENA, 16),
            (usize::MAX - 15, ARENA, 16),
            (0, ARENA + 8, 16),
            (0, u64::MAX - 15, 16),
            (0, ARENA, 0),
            (0, ARENA, 65536),
            (0, ARENA, 32769),
            (0, ARENA, 32768),
        ] {
            assert!(ring(offset, address, size).is_err(), "{offset} {address:#x} {size}");
        }
        assert_eq!(ring(0, ARENA, 12).is_ok(), packed, "a split ring's size is a power of two");
        assert!(DriverRing::new(&mapping(0x1_0000, false), 0, ARENA, 16, features).is_err(), "read-only");
        for size in [0, 32769, 65536] {
            assert!(DriverRing::bytes_needed(size, packed).is_err());
        }
        assert_eq!(DriverRing::bytes_needed(3, packed).is_ok(), packed);
    }
}

#[test]
fn polling_asks_for_nothing() {
    for features in all() {
        let (memory, mut driver, buffer) = plain(8, features);
        let mut device = DeviceRing::new(memory, 8, setup_of(&driver, features)).unwrap();
        let mut chains = Vec::new();
        for round in 0..40 {
            assert!(driver.add(&[(buffer, 8)], &[]).unwrap().is_some());
            // Notifications are on from the start, and off from the first chain.
            assert_eq!(driver.publish(), round == 0, "round {round}");
            device.poll(8, &mut chains).unwrap();
            assert_eq!(chains.len(), 1);
            device.poll(8, &mut chains).unwrap();
            assert_eq!(chains.len(), 1);
            let _ = device.complete_chains(chains.iter().map(|chain| (chain, 0))).unwrap();
            chains.clear();
            driver.reap(8, &mut Vec::new()).unwrap();
        }
        device.take(8, &mut chains).unwrap();
        assert!(driver.add(&[(buffer, 8)], &[]).unwrap().is_some());
        assert!(driver.publish(), "it was asked for again");
    }
}

/// A doorbell of one place: what rings twice before it is heard is heard once.
fn bell() -> (impl Fn(), impl Fn()) {
    let (send, receive): (SyncSender<()>, Receiver<()>) = sync_channel(1);
    let ring = move || match send.try_send(()) {
        Ok(()) | Err(TrySendError::Full(())) | Err(TrySendError::Disconnected(())) => (),
    };
    // Far beyond what any machine needs: it turns a lost wakeup into a failure instead of a test that never ends.
    let wait = move || receive.recv_timeout(Duration::from_secs(60)).expect("a wakeup was lost");
    (ring, wait)
}

#[test]
fn no_wakeup_is_lost_between_two_sides_that_sleep() {
    const REQUESTS: u64 = 30_000;
    for size in [2, 4, 64] {
        for features in all() {
            let features = Features { indirect: size == 4, ..features };
            let World { mut driver, mut device, memory, .. } = World::new(Shape { size, features });
            let (ring_device, wait_device) = bell();
            let (ring_driver, wait_driver) = bell();
            let table = memory.snapshot();
            let number = |address: u64| {
                let mut segments = vbus_ring::mem::Segments::default();
                table.translate(address, 8, vbus_ring::mem::Access::Write, &mut segments).unwrap();
                segments
            };
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    let mut served = 0;
                    let mut chains = Vec::new();
                    while served < REQUESTS {
                        device.take(3, &mut chains).unwrap();
                        if chains.is_empty() {
                            wait_device();
                            continue;
                        }
                        for chain in chains.drain(..) {
                            let mut bytes = [0; 8];
                            chain.readable().read(0, VolatileSlice::from(&mut bytes[..]));
                            let mut answer = (u64::from_le_bytes(bytes) * 3).to_le_bytes();
                            chain.writable().write(0, VolatileSlice::from(&mut answer[..]));
                            served += 1;
                            if device.complete_chains([(&chain, 8)].into_iter()).unwrap() {
                                ring_driver();
                            }
                        }
                    }
                });
                let (mut sent, mut reaped) = (0u64, 0u64);
                let mut asked = vec![0; size as usize];
                let mut finished = Vec::new();
                while reaped < REQUESTS {
                    // In turns many and one at a time: the device falls asleep in between.
                    for _ in 0..1 + sent % 3 {
                        if sent == REQUESTS || driver.free() < 2 {
                            break;
                        }
                        let place = DATA + 16 * (sent % 2048);
                        number(place).write(0, VolatileSlice::from(&mut sent.to_le_bytes()[..]));
                        let token = driver.add(&[(place, 8)], &[(place + 8, 8)]).unwrap().unwrap();
                        asked[usize::from(token)] = sent;
                        sent += 1;
                    }
                    if driver.publish() {
                        ring_device();
                    }
                    driver.reap(2, &mut finished).unwrap();
                    if finished.is_empty() && (sent == REQUESTS || driver.free() < 2) {
                        wait_driver();
                    }
                    for (token, written) in finished.drain(..) {
                        assert_eq!(written, 8);
                        let mut bytes = [0; 8];
                        let sent = asked[usize::from(token)];
                        number(DATA + 16 * (sent % 2048) + 8).read(0, VolatileSlice::from(&mut bytes[..]));
                        assert_eq!(u64::from_le_bytes(bytes), sent * 3);
                        reaped += 1;
                    }
                }
            });
        }
    }
}

/// What a thread says: in which round it is, and whether it was told to notify there.
#[derive(Default)]
struct Said(AtomicU64);

impl Said {
    fn say(&self, round: u64, notify: bool) {
        self.0.store(round << 1 | u64::from(notify), Ordering::Release);
    }

    /// Wait until it has come to this round; whether it was told to notify.
    fn at(&self, round: u64) -> bool {
        loop {
            let word = self.0.load(Ordering::Acquire);
            assert_ne!(word, u64::MAX, "the other side has failed");
            if word >> 1 == round {
                return word & 1 == 1;
            }
            std::thread::yield_now();
        }
    }
}

/// Ends the other side's waiting when this side fails.
struct Failing<'a>(&'a Said);

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0 .0.store(u64::MAX, Ordering::Release);
        }
    }
}

/// The same question as above, asked without sleeping, a hundred thousand times at the moment that matters: a side that
/// asks for notifications and then finds nothing must get one for what comes next. Fails when any of the four fences is
/// taken out of either layout, some of them only in an optimised build, where stores have less time to become visible.
#[test]
fn whoever_found_nothing_is_notified() {
    const ROUNDS: u64 = 100_000;
    for features in all() {
        let World { mut driver, mut device, .. } = World::new(Shape { size: 4, features });
        let (published, completed) = (Said::default(), Said::default());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _failing = Failing(&completed);
                let mut chains = Vec::new();
                for round in 1..=ROUNDS {
                    device.take(8, &mut chains).unwrap();
                    if chains.is_empty() {
                        assert!(published.at(round), "the device found nothing, and was not notified");
                        device.take(8, &mut chains).unwrap();
                    }
                    assert_eq!(chains.len(), 3);
                    let _ = device.complete_chains(chains[..2].iter().map(|chain| (chain, 0))).unwrap();
                    (0..round % 13).for_each(|_| std::hint::spin_loop());
                    let notify = device.complete_chains(chains[2..].iter().map(|chain| (chain, 0))).unwrap();
                    chains.clear();
                    completed.say(round, notify);
                }
            });
            let _failing = Failing(&published);
            let mut finished = Vec::new();
            for round in 1..=ROUNDS {
                (0..3).for_each(|_| assert!(driver.add(&[(DATA, 8)], &[]).unwrap().is_some()));
                (0..round % 11).for_each(|_| std::hint::spin_loop());
                published.say(round, driver.publish());
                // One, with another behind it: interrupts are off.
                while finished.is_empty() {
                    assert_ne!(completed.0.load(Ordering::Relaxed), u64::MAX, "the device has failed");
                    driver.reap(1, &mut finished).unwrap();
                }
                // The other one, and on again, while the device completes the third.
                driver.reap(8, &mut finished).unwrap();
                if finished.len() < 3 {
                    assert!(completed.at(round), "the driver found nothing more, and was not notified");
                    driver.reap(8, &mut finished).unwrap();
                }
                assert_eq!(finished.len(), 3);
                finished.clear();
            }
        });
    }
}

#[test]
fn another_device_goes_on_where_one_stopped() {
    for features in all() {
        let size = if features.packed { 7 } else { 8 };
        let (memory, mut driver, buffer) = plain(size, features);
        let mut setup = setup_of(&driver, features);
        // Far enough that the indices wrap around several times, with a new device side after every three requests.
        for round in 0..40_000u32 {
            let mut device = DeviceRing::new(memory.clone(), size, setup).unwrap();
            let mut sent: Vec<_> = (0..3).map(|_| driver.add(&[(buffer, 64)], &[]).unwrap().unwrap()).collect();
            let _ = driver.publish();
            let mut chains = Vec::new();
            device.take(usize::MAX, &mut chains).unwrap();
            assert_eq!(chains.len(), 3, "round {round}");
            let begin = setup.resume.unwrap_or(if features.packed { 0x8000_8000 } else { 0 });
            assert_eq!(device.unused(), Some(begin));
            let _ = device.complete_chains(chains.iter().map(|chain| (chain, 0))).unwrap();
            assert_eq!(device.in_flight(), 0);
            let mut finished = Vec::new();
            driver.reap(8, &mut finished).unwrap();
            let mut answered: Vec<_> = finished.iter().map(|&(token, _)| token).collect();
            sent.sort_unstable();
            answered.sort_unstable();
            assert_eq!(sent, answered);
            let places = 3 * (round + 1);
            let word = (places % 7) | if places / 7 % 2 == 0 { 0x8000 } else { 0 };
            assert_eq!(device.next(), if features.packed { word * 0x1_0001 } else { places % 0x1_0000 });
            assert_eq!(device.unused(), Some(device.next()));
            setup.resume = Some(device.next());
        }
    }
}

#[test]
fn what_is_in_flight_is_given_again_unless_it_was_overtaken() {
    for features in all() {
        let (memory, mut driver, buffer) = plain(8, features);
        let mut setup = setup_of(&driver, features);
        let sent: Vec<_> = (0..5).map(|_| driver.add(&[], &[(buffer, 64)]).unwrap().unwrap()).collect();
        let _ = driver.publish();
        let mut device = DeviceRing::new(memory.clone(), 8, setup).unwrap();
        let mut chains = Vec::new();
        device.take(4, &mut chains).unwrap();
        let _ = device.complete_chains(chains[..2].iter().map(|chain| (chain, 1))).unwrap();
        setup.resume = device.unused();

        let mut device = DeviceRing::new(memory, 8, setup).unwrap();
        let mut chains = Vec::new();
        device.take(9, &mut chains).unwrap();
        assert_eq!(chains.iter().map(Chain::head).collect::<Vec<_>>(), sent[2..]);
        let _ = device.complete_chains(chains[1..2].iter().map(|chain| (chain, 1))).unwrap();
        assert_eq!(device.unused(), None, "the first is in flight, and the second is not");
        let _ = device.complete_chains([&chains[0], &chains[2]].into_iter().map(|chain| (chain, 1))).unwrap();
        assert_eq!(device.unused(), Some(device.next()), "nothing is");
        let mut finished = Vec::new();
        driver.reap(9, &mut finished).unwrap();
        let order = [0, 1, 3, 2, 4].map(|at| sent[at]);
        assert_eq!(finished.iter().map(|&(token, _)| token).collect::<Vec<_>>(), order);
    }
}

#[test]
fn whoever_says_where_to_go_on_may_lie() {
    let shape = Shape::new(8, false, false, false);
    let World { memory, driver, .. } = World::new(shape);
    let setup = Setup { resume: Some(9), ..setup_of(&driver, shape.features) };
    let mut device = DeviceRing::new(memory.clone(), 8, setup).unwrap();
    assert_eq!(device.take(1, &mut Vec::new()).unwrap_err().rule, Rule::IndexJump);
    let setup = Setup { resume: Some(0x1_0000), ..setup };
    assert_eq!(DeviceRing::new(memory, 8, setup).err().unwrap().rule, Rule::RingPosition);

    let shape = Shape::new(7, true, false, false);
    let World { memory, driver, .. } = World::new(shape);
    let at = |next: u32, used: u32| {
        let setup = Setup { resume: Some(next | used << 16), ..setup_of(&driver, shape.features) };
        DeviceRing::new(memory.clone(), 7, setup).map(|mut device| device.take(9, &mut Vec::new()))
    };
    for (next, used) in [(7, 6), (6, 7), (0x8007, 0x8007), (0x7fff, 0), (0, 1), (5, 0x8004), (0x8000, 0x8001)] {
        assert_eq!(at(next, used).unwrap_err().rule, Rule::RingPosition, "{next:#x} {used:#x}");
    }
    // A lap behind, or anywhere between: taken by somebody else.
    for (next, used) in [(6, 6), (0, 0x8000), (5, 0x8005), (3, 0x8006), (0x8000, 1)] {
        at(next, used).unwrap().unwrap();
    }
}
