//! The driver side of a split ring, with a device that writes what it likes into all of it.
//!
//! An input is a list of steps. What must hold whatever they are: nothing panics; a violation is one of those that the
//! interface names, comes once, and then the ring gives nothing; a request ends at most once, after it was shown, and
//! with no more bytes than it takes; a chain reads as it was asked for; what is outstanding or free adds up; and the
//! driver writes into its own parts of the ring, and nowhere else.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeMap;

use vbus_fuzz::{target, word16, word32, word64, Input, Seed, Watched};
use vbus_ring::ring::split::{AddError, DriverRing, INDIRECT_ENTRIES};

target!(one, seeds);

/// Bytes of the arena, and where the ring begins in it: both ends are nobody's.
const ARENA: usize = 0x8000;
const OFFSET: usize = 0x1000;
/// Driver address of the arena's first byte.
const ADDRESS: u64 = 0x4000_0000;
/// The largest size: a ring of it ends before the arena does.
const MAX_POWER: u8 = 7;
const STEPS: usize = 300;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Clone, Copy)]
#[repr(u8)]
enum Step {
    Add,
    Publish,
    Use,
    Reap,
    SetIndex,
    Write,
}

const TABLE: [Step; 8] =
    [Step::Add, Step::Publish, Step::Use, Step::Reap, Step::SetIndex, Step::Write, Step::Add, Step::Use];

/// A request, as the test knows it.
struct Known {
    descriptors: usize,
    writable: u64,
    published: bool,
}

struct World<'a> {
    arena: &'a mut Watched,
    ring: DriverRing,
    indirect: bool,
    requests: BTreeMap<u16, Known>,
    /// The used index that the device shows.
    used: u16,
    ended: bool,
}

impl World<'_> {
    /// Offset in the arena of an address that the ring told.
    fn place(address: u64) -> usize {
        (address - ADDRESS) as usize
    }

    /// What the driver may write: everything of the ring but the used ring.
    fn look(&mut self) {
        let used = Self::place(self.ring.device());
        let tables = (used + 4 + 8 * usize::from(self.ring.size()) + 2).next_multiple_of(64);
        let end = OFFSET + DriverRing::bytes_needed(self.ring.size().into()).unwrap();
        self.arena.look(&[(OFFSET, used - OFFSET), (tables, end - tables)]);
    }

    fn add_up(&self) {
        let taken: usize = self.requests.values().map(|known| known.descriptors).sum();
        let size = usize::from(self.ring.size());
        assert_eq!(self.ring.free(), size - taken, "descriptors got lost, or were found");
        let published = self.requests.values().filter(|known| known.published).count();
        assert_eq!(self.ring.outstanding(), published);
        assert!(published <= size);
    }

    fn add(&mut self, readable: &[(u64, u64)], writable: &[(u64, u64)]) {
        let all: Vec<_> = readable.iter().chain(writable).copied().collect();
        let count = all.len();
        let total: u64 = all.iter().map(|buffer| buffer.1).fold(0, u64::saturating_add);
        let wrong = all.iter().any(|&(_, size)| size == 0 || size > u64::from(u32::MAX));
        let size = usize::from(self.ring.size());
        let in_table = self.indirect && (2..=INDIRECT_ENTRIES.min(size)).contains(&count);
        let descriptors = if in_table { 1 } else { count };
        let free = self.ring.free();
        let result = self.ring.add(readable, writable);
        self.look();
        match result {
            Err(AddError::NoBuffers) => assert_eq!(count, 0),
            Err(AddError::TooManyBuffers { .. }) => assert!(count > size),
            Err(AddError::BufferSize(size)) => assert!(wrong && (size == 0 || size > u64::from(u32::MAX))),
            Err(AddError::RequestSize) => assert!(!wrong && total > u64::from(u32::MAX)),
            Ok(None) => assert!(descriptors > free),
            Ok(Some(token)) => {
                assert!(count > 0 && count <= size && !wrong && total <= u64::from(u32::MAX));
                assert!(descriptors <= free);
                let writable: u64 = writable.iter().map(|buffer| buffer.1).sum();
                let known = Known { descriptors, writable, published: false };
                assert!(self.requests.insert(token, known).is_none(), "{token} was not free");
                self.check_chain(token, readable.len(), &all, in_table);
            }
        }
    }

    /// What the device finds behind a head that was just added.
    fn check_chain(&self, token: u16, readable: usize, buffers: &[(u64, u64)], in_table: bool) {
        let bytes = self.arena.known();
        let desc =
            |at: usize| (word64(bytes, at), word32(bytes, at + 8), word16(bytes, at + 12), word16(bytes, at + 14));
        let mut table = Self::place(self.ring.desc());
        let mut index = token;
        if in_table {
            let (address, size, flags, _) = desc(table + 16 * usize::from(token));
            assert_eq!((size as usize, flags), (16 * buffers.len(), INDIRECT));
            (table, index) = (Self::place(address), 0);
        }
        for (number, &(address, size)) in buffers.iter().enumerate() {
            let more = number + 1 < buffers.len();
            let flags = if more { NEXT } else { 0 } | if number < readable { 0 } else { WRITE };
            let (at, bytes, found, next) = desc(table + 16 * usize::from(index));
            assert_eq!((at, u64::from(bytes), found), (address, size, flags), "descriptor {number} of {token}");
            index = next;
        }
    }

    fn publish(&mut self) {
        let _ = self.ring.publish();
        self.requests.values_mut().for_each(|known| known.published = true);
        self.look();
    }

    fn reap(&mut self, limit: usize) {
        // Appended to what is there already.
        let mut finished = vec![(u16::MAX, 0)];
        let result = self.ring.reap(limit, &mut finished);
        assert_eq!(finished.remove(0), (u16::MAX, 0));
        self.look();
        assert!(finished.len() <= limit);
        assert!(finished.is_empty() || !self.ended, "a ring that is broken gives nothing");
        if let Err(violation) = result {
            let names = ["used-index-jump", "used-id-unknown", "used-length"];
            assert!(names.contains(&violation.name()), "{violation}");
            assert!(!self.ended, "a violation is told once: {violation}");
            assert!(finished.is_empty(), "with requests a call succeeds");
            self.ended = true;
        }
        for (token, written) in finished {
            let known = self.requests.remove(&token).expect("a request that is under way");
            assert!(known.published, "{token} was never shown");
            assert!(u64::from(written) <= known.writable, "{written} bytes in a request of {}", known.writable);
        }
    }

    fn step(&mut self, step: Step, input: &mut Input<'_>) {
        match step {
            Step::Add => {
                let counts = input.u8();
                let mut buffers = |count| -> Vec<(u64, u64)> { (0..count).map(|_| buffer(input)).collect() };
                let (readable, writable) = (buffers(counts & 15), buffers(counts >> 4));
                self.add(&readable, &writable);
            }
            Step::Publish => self.publish(),
            Step::Use => {
                // A request that the device has, or any number.
                let (number, written) = (input.u8(), input.u32());
                let shown: Vec<u16> =
                    self.requests.iter().filter(|entry| entry.1.published).map(|entry| *entry.0).collect();
                let id = match number {
                    0..=127 if !shown.is_empty() => u32::from(shown[usize::from(number) % shown.len()]),
                    number => u32::from(number) * 0x101,
                };
                let entry = usize::from(self.used & (self.ring.size() - 1));
                let place = Self::place(self.ring.device());
                self.arena.put(place + 4 + 8 * entry, &[id.to_le_bytes(), written.to_le_bytes()].concat());
                self.used = self.used.wrapping_add(1);
                self.arena.put(place + 2, &self.used.to_le_bytes());
            }
            Step::SetIndex => {
                self.used = input.u16();
                self.arena.put(Self::place(self.ring.device()) + 2, &self.used.to_le_bytes());
            }
            Step::Reap => {
                let limit = match input.u8() {
                    255 => usize::MAX,
                    limit => usize::from(limit),
                };
                self.reap(limit);
            }
            Step::Write => {
                let (at, size) = (usize::from(input.u16()), input.u8());
                let bytes = input.bytes(size.into());
                self.arena.put(at, bytes);
            }
        }
        self.add_up();
    }
}

/// A buffer; most are small, so that a request of several is none that is too large.
fn buffer(input: &mut Input<'_>) -> (u64, u64) {
    match input.u8() {
        255 => (input.u64(), input.u64()),
        254 => (input.u64(), u64::from(input.u32())),
        size => (0x1_0000 + u64::from(size), u64::from(size)),
    }
}

thread_local! {
    /// Mapped once: an input takes microseconds, and a mapping more.
    static ARENAS: RefCell<Watched> = RefCell::new(Watched::new(ARENA));
}

fn one(data: &[u8]) {
    ARENAS.with_borrow_mut(|arena| {
        arena.clear();
        let mut input = Input::new(data);
        let flags = input.u8();
        let size = 1 << (input.u8() % (MAX_POWER + 1));
        let (event_idx, indirect) = (flags & 1 != 0, flags & 2 != 0);
        let ring = DriverRing::new(&arena.mapping, OFFSET, ADDRESS, size, event_idx, indirect).unwrap();
        let mut world = World { arena, ring, indirect, requests: BTreeMap::new(), used: 0, ended: false };
        world.look();
        world.add_up();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            let step = TABLE[usize::from(input.u8()) % TABLE.len()];
            world.step(step, &mut input);
        }
    });
}

fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for flags in 0..4 {
        for power in [0, 3] {
            let start = Seed::default().u8(flags).u8(power);
            // One request of a buffer, shown, used, taken back; then with several buffers, and two at once.
            let round = |seed: Seed, buffers: &[u8]| {
                let add = seed.u8(Step::Add as u8).bytes(buffers).u8(Step::Publish as u8);
                add.u8(Step::Use as u8).u8(0).u32(4).u8(Step::Reap as u8).u8(16)
            };
            let seed = round(start.clone(), &[0x10, 8]);
            seeds.push(round(seed, &[0x12, 8, 8, 8]));
            let two = start.u8(Step::Add as u8).bytes(&[0x11, 8, 8]).u8(Step::Add as u8).bytes(&[0x01, 8]);
            seeds.push(round(two, &[0x10, 8]).u8(Step::Use as u8).u8(1).u32(0).u8(Step::Reap as u8).u8(255));
        }
    }
    seeds
}
