//! The driver side of a ring, split or packed, with a device that writes what it likes into all of it.
//!
//! An input is a list of steps. What must hold whatever they are: nothing panics; a violation is one of those that the
//! interface names, comes once, and then the ring gives nothing; a request ends at most once, after it was shown, and
//! with no more bytes than it takes, with IN_ORDER in its turn; a chain reads as it was asked for; what is outstanding or free adds up; and the
//! driver writes into its own parts of the ring, and nowhere else.
#![no_main]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

use vbus_fuzz::{target, word16, word32, word64, Input, Seed, Watched};
use vbus_ring::ring::{AddError, DriverRing, Features, INDIRECT_ENTRIES};

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
/// Of a packed ring's descriptors.
const AVAIL: u16 = 0x80;
const USED: u16 = 0x8000;

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
    /// In a packed ring: how many descriptors were written before its first.
    place: usize,
    descriptors: usize,
    readable: usize,
    buffers: Vec<(u64, u64)>,
    in_table: bool,
    writable: u64,
    published: bool,
}

struct World<'a> {
    arena: &'a mut Watched,
    ring: DriverRing,
    features: Features,
    requests: BTreeMap<u16, Known>,
    /// Tokens, in the order in which they were added.
    order: VecDeque<u16>,
    /// In a packed ring: descriptors that were written.
    written: usize,
    /// The used index that the device shows; in a packed ring, how many descriptors it has used.
    used: u16,
    /// The device wrote where it likes since something was added that is not shown.
    spoiled: bool,
    ended: bool,
}

impl World<'_> {
    /// Offset in the arena of an address that the ring told.
    fn place(address: u64) -> usize {
        (address - ADDRESS) as usize
    }

    /// What the driver may write: everything of the ring but the used ring, or the device's event suppression.
    fn look(&mut self) {
        let used = Self::place(self.ring.device());
        let size = usize::from(self.ring.size());
        let tables = (used + if self.features.packed { 4 } else { 4 + 8 * size + 2 }).next_multiple_of(64);
        let end = OFFSET + DriverRing::bytes_needed(size as u32, self.features.packed).unwrap();
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
        let in_table = self.features.indirect && (2..=INDIRECT_ENTRIES.min(size)).contains(&count);
        let descriptors = if in_table { 1 } else { count };
        let free = self.ring.free();
        self.spoiled &= self.requests.values().any(|known| !known.published);
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
                let known = Known {
                    place: self.written,
                    descriptors,
                    readable: readable.len(),
                    buffers: all,
                    in_table,
                    writable,
                    published: false,
                };
                self.written += descriptors;
                if !self.features.packed {
                    self.check_chain(token, &known);
                }
                assert!(self.requests.insert(token, known).is_none(), "{token} was not free");
                self.order.push_back(token);
            }
        }
    }

    /// Of a descriptor: address, bytes, flags, next; in a packed ring id, flags.
    fn desc(&self, at: usize) -> (u64, u32, u16, u16) {
        let bytes = self.arena.known();
        (word64(bytes, at), word32(bytes, at + 8), word16(bytes, at + 12), word16(bytes, at + 14))
    }

    /// What the device finds behind a head that was just added.
    fn check_chain(&self, token: u16, known: &Known) {
        let mut table = Self::place(self.ring.desc());
        let mut index = token;
        if known.in_table {
            let (address, size, flags, _) = self.desc(table + 16 * usize::from(token));
            assert_eq!((size as usize, flags), (16 * known.buffers.len(), INDIRECT));
            (table, index) = (Self::place(address), 0);
        }
        for (number, &(address, size)) in known.buffers.iter().enumerate() {
            let more = number + 1 < known.buffers.len();
            let flags = if more { NEXT } else { 0 } | if number < known.readable { 0 } else { WRITE };
            let (at, bytes, found, next) = self.desc(table + 16 * usize::from(index));
            assert_eq!((at, u64::from(bytes), found), (address, size, flags), "descriptor {number} of {token}");
            index = next;
        }
    }

    /// The same in a packed ring, when it was published.
    fn check_packed(&self, token: u16, known: &Known) {
        let size = usize::from(self.ring.size());
        let ring = Self::place(self.ring.desc());
        let nth = |number: usize| {
            let place = known.place + number;
            let lap = if place / size % 2 == 0 { AVAIL } else { USED };
            (self.desc(ring + 16 * (place % size)), lap)
        };
        if known.in_table {
            let ((address, bytes, id, flags), lap) = nth(0);
            assert_eq!((bytes as usize, id, flags), (16 * known.buffers.len(), token, INDIRECT | lap));
            for (number, &(buffer, size)) in known.buffers.iter().enumerate() {
                let (at, bytes, _, flags) = self.desc(Self::place(address) + 16 * number);
                let want = if number < known.readable { 0 } else { WRITE };
                assert_eq!((at, u64::from(bytes), flags), (buffer, size, want), "entry {number} of {token}");
            }
            return;
        }
        for (number, &(buffer, size)) in known.buffers.iter().enumerate() {
            let ((at, bytes, id, flags), lap) = nth(number);
            let more = if number + 1 < known.buffers.len() { NEXT } else { 0 };
            let want = more | lap | if number < known.readable { 0 } else { WRITE };
            assert_eq!((at, u64::from(bytes), id, flags), (buffer, size, token, want), "{number} of {token}");
        }
    }

    fn publish(&mut self) {
        let before = self.arena.known().to_vec();
        let _ = self.ring.publish();
        self.look();
        if self.features.packed {
            // One word, the second of the first descriptor, shows all: nothing else is written now.
            let changed: Vec<_> =
                before.iter().zip(self.arena.known()).enumerate().filter(|(_, (a, b))| a != b).collect();
            assert!(changed.last().map_or(0, |last| last.0 - changed[0].0) < 8, "{changed:?}");
            let added: Vec<_> = self.requests.iter().filter(|(_, known)| !known.published).collect();
            if !self.spoiled {
                added.into_iter().for_each(|(token, known)| self.check_packed(*token, known));
            }
        }
        self.requests.values_mut().for_each(|known| known.published = true);
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
            if self.features.in_order {
                assert_eq!(self.order.pop_front(), Some(token), "out of order");
            }
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
                if self.features.packed {
                    let size = usize::from(self.ring.size());
                    let place = usize::from(self.used);
                    let lap = if place / size % 2 == 0 { AVAIL | USED } else { 0 };
                    let flags = lap | if written == 0 { 0 } else { WRITE };
                    let rest = [&written.to_le_bytes()[..], &(id as u16).to_le_bytes(), &flags.to_le_bytes()].concat();
                    self.arena.put(Self::place(self.ring.desc()) + 16 * (place % size) + 8, &rest);
                    let known = u16::try_from(id).ok().and_then(|id| self.requests.get(&id));
                    let descriptors = known.map_or(1, |known| known.descriptors) as u16;
                    self.used = (self.used + descriptors) % (2 * self.ring.size());
                    self.spoiled = true;
                } else {
                    let entry = usize::from(self.used & (self.ring.size() - 1));
                    let place = Self::place(self.ring.device());
                    self.arena.put(place + 4 + 8 * entry, &[id.to_le_bytes(), written.to_le_bytes()].concat());
                    self.used = self.used.wrapping_add(1);
                    self.arena.put(place + 2, &self.used.to_le_bytes());
                }
            }
            Step::SetIndex if self.features.packed => self.used = input.u16() % (2 * self.ring.size()),
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
                self.spoiled = true;
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
        let [event_idx, indirect, packed, in_order] = [1, 2, 4, 8].map(|flag| flags & flag != 0);
        let features = Features { packed, event_idx, indirect, in_order };
        let power = input.u8();
        let mut size = 1 << (power % (MAX_POWER + 1));
        if packed {
            // Any, up to the largest of the others.
            size = (size + u32::from(power >> 3)).min(1 << MAX_POWER);
        }
        let ring = DriverRing::new(&arena.mapping, OFFSET, ADDRESS, size, features).unwrap();
        let mut world = World {
            arena,
            ring,
            features,
            requests: BTreeMap::new(),
            order: VecDeque::new(),
            written: 0,
            used: 0,
            spoiled: false,
            ended: false,
        };
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
    for flags in 0..16 {
        for power in [0, 3, 0x1a] {
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
