//! The device side of a packed ring, with a driver that writes what it likes into its memory, moves and takes away that
//! memory, and says anything about its ring.
//!
//! An input is a list of steps. What must hold whatever they are: nothing panics; a violation is one of those that the
//! interface names, comes once, and then the ring gives nothing; at most as many descriptors as there are belong to
//! chains in flight, each id once; a chain lies in the regions that there are; the device writes what it uses over
//! descriptors that it has taken, such that a driver finds its way through them, says what it asks for, and writes into
//! writable buffers, and nowhere else.
#![no_main]

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

use vbus_fuzz::world::{World, PLACES};
use vbus_fuzz::{target, word16, word32, Input, Seed};
use vbus_ring::ring::packed::DeviceRing;
use vbus_ring::ring::{Chain, Features, Setup};

target!(one, seeds);

/// The largest size of a queue.
const MAX_SIZE: u32 = 1000;
/// Steps of an input: as many as are of use, so that a long input is no slow one.
const STEPS: usize = 300;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const AVAIL: u16 = 0x80;
const USED: u16 = 0x8000;

const TAKE_VIOLATIONS: [&str; 16] = [
    "ring-misaligned",
    "ring-outside-memory",
    "address-outside-memory",
    "region-read-only",
    "descriptor-not-available",
    "chain-too-long",
    "chain-too-large",
    "readable-after-writable",
    "zero-length-descriptor",
    "descriptor-in-use",
    "too-many-buffers",
    "indirect-not-negotiated",
    "indirect-next",
    "indirect-table-size",
    "indirect-table-too-long",
    "region-lost",
];
const PLACE_VIOLATIONS: [&str; 2] = ["ring-misaligned", "ring-outside-memory"];

/// What a step does, by its first byte. Those that an input needs most often come more than once.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Step {
    Offer,
    Take,
    Complete,
    Descriptor,
    Write,
    SetPlace,
    CompleteAny,
    Region,
    Start,
    GoOn,
    Copy,
    Clear,
}

const TABLE: [Step; 16] = {
    use Step::{Clear, Complete, CompleteAny, Copy, Descriptor, GoOn, Offer, Region, SetPlace, Start, Take, Write};
    [
        Offer,
        Take,
        Complete,
        Descriptor,
        Write,
        SetPlace,
        CompleteAny,
        Region,
        Start,
        GoOn,
        Copy,
        Clear,
        Take,
        Offer,
        Offer,
        Complete,
    ]
};

/// A place and the wrap counter of its lap, as `DeviceRing::next` tells two of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u64,
    wrap: bool,
}

impl Place {
    fn from_word(word: u32) -> Self {
        Self { index: u64::from(word & 0x7fff), wrap: word & 0x8000 != 0 }
    }

    fn after(self, count: u64, size: u64) -> Self {
        let index = self.index + count;
        Self { index: index % size, wrap: self.wrap ^ (index >= size) }
    }

    fn lap(self) -> u16 {
        if self.wrap {
            AVAIL
        } else {
            USED
        }
    }
}

/// What is in flight of a chain.
struct Held {
    chain: Chain,
    /// Descriptors of the ring.
    span: u64,
    /// Completed, with these bytes, behind one that is not.
    done: Option<u32>,
}

/// A ring under test, and what must be true of it.
struct Running {
    ring: DeviceRing,
    setup: Setup,
    held: BTreeMap<u16, Held>,
    /// Ids, as they were taken.
    order: VecDeque<u16>,
    /// A violation was seen: it gives nothing any more.
    ended: bool,
    /// `take` has said so.
    told: bool,
    /// Nor does it complete anything.
    lost: bool,
}

impl Running {
    /// Where it takes next, and where it uses next.
    fn places(&self) -> [Place; 2] {
        let next = self.ring.next();
        [Place::from_word(next), Place::from_word(next >> 16)]
    }
}

struct Target<'a> {
    world: &'a mut World,
    /// Where the driver offers next.
    place: Place,
}

impl Target<'_> {
    /// Where the device's event suppression is, when it is in memory: all that it may write without a request.
    fn event(&self, setup: &Setup) -> Vec<(usize, usize, usize)> {
        self.world.find(setup.device, 4).map(|(mapping, at)| (mapping, at, 4)).into_iter().collect()
    }

    fn setup(input: &mut Input<'_>) -> Setup {
        let flags = input.u8();
        let size = match input.u8() {
            255 => input.u32(),
            size => u32::from(size),
        };
        let [desc, driver, device] = [(); 3].map(|()| World::address(input));
        let resume = (flags & 4 != 0).then(|| input.u32());
        let [event_idx, indirect, in_order] = [1, 2, 8].map(|flag| flags & flag != 0);
        Setup { size, desc, driver, device, features: Features { packed: true, event_idx, indirect, in_order }, resume }
    }

    fn start(&mut self, setup: Setup) -> Option<Running> {
        match DeviceRing::new(self.world.memory.clone(), MAX_SIZE, setup) {
            Ok(mut ring) if setup.device.wrapping_sub(setup.desc) < 16 * u64::from(setup.size) => {
                // What it asks for it writes into its own descriptors: whatever they say then, it lives.
                let ring_part = self.world.find(setup.desc, 16 * setup.size as usize).expect("a ring in memory");
                let mut chains = Vec::new();
                let _ = ring.take(16, &mut chains);
                let _ = ring.complete(chains.iter().map(|chain| (chain.head(), 1)));
                self.world.look(&[(ring_part.0, ring_part.1, 16 * setup.size as usize)]);
                None
            }
            Ok(ring) => {
                assert!((1..=MAX_SIZE).contains(&setup.size));
                assert_eq!((u32::from(ring.size()), ring.in_flight()), (setup.size, 0));
                assert_eq!(ring.next(), setup.resume.unwrap_or(0x8000_8000));
                let event = self.event(&setup);
                self.world.look(&event);
                let running = Running {
                    ring,
                    setup,
                    held: BTreeMap::new(),
                    order: VecDeque::new(),
                    ended: false,
                    told: false,
                    lost: false,
                };
                self.place = running.places()[0];
                assert!(running.places().iter().all(|place| place.index < u64::from(setup.size)));
                Some(running)
            }
            Err(violation) => {
                let names = [&PLACE_VIOLATIONS[..], &["queue-size", "ring-position"]].concat();
                assert!(names.contains(&violation.name()), "{violation}");
                self.world.look(&[]);
                None
            }
        }
    }

    /// How many descriptors the chain at a place has, by the bytes in memory.
    fn span(&self, setup: &Setup, place: Place) -> u64 {
        let size = u64::from(setup.size);
        (0..size).find(|count| !self.has_next(setup, place.after(*count, size))).expect("a chain ends") + 1
    }

    fn has_next(&self, setup: &Setup, place: Place) -> bool {
        let at = self.world.find(setup.desc + 16 * place.index, 16).expect("a ring in memory");
        let bytes = self.world.bytes(at, 16);
        let flags = word16(bytes, 14);
        assert_eq!(flags & (AVAIL | USED), place.lap(), "what is taken is available");
        flags & NEXT != 0
    }

    fn take(&mut self, running: &mut Running, limit: usize) {
        let mut chains = Vec::new();
        let mut place = running.places()[0];
        let result = running.ring.take(limit, &mut chains);
        assert!(chains.len() <= limit);
        assert!(chains.is_empty() || !running.ended, "a ring that is broken gives nothing");
        let event = self.event(&running.setup);
        self.world.look(&event);
        if let Err(violation) = result {
            assert!(!running.told, "a violation is told once: {violation}");
            assert!(chains.is_empty(), "with chains a call succeeds");
            assert!(TAKE_VIOLATIONS.contains(&violation.name()), "{violation}");
            running.ended = true;
            running.told = true;
        }
        let size = u64::from(running.setup.size);
        for chain in chains {
            let [readable, writable] = [(chain.readable(), false), (chain.writable(), true)]
                .map(|(segments, write)| self.world.pieces(segments, write).len());
            // A piece for each descriptor, and one more for each border of regions that it goes over.
            assert!((1..=2 * size as usize).contains(&(readable + writable)));
            assert!(chain.readable().total() + chain.writable().total() <= u64::from(u32::MAX));
            let span = self.span(&running.setup, place);
            place = place.after(span, size);
            let head = chain.head();
            running.order.push_back(head);
            let before = running.held.insert(head, Held { chain, span, done: None });
            assert!(before.is_none(), "{head} is in flight twice");
        }
        assert_eq!(running.places()[0], place);
        assert_eq!(running.ring.in_flight(), running.held.len());
        assert!(running.held.values().map(|held| held.span).sum::<u64>() <= size);
    }

    fn complete(&mut self, running: &mut Running, chains: &[(u16, u32)]) {
        let size = u64::from(running.setup.size);
        let [next, first] = running.places();
        let mut shown = Vec::new();
        for &(head, written) in chains {
            let Some(held) = running.held.get_mut(&head).filter(|held| held.done.is_none() && !running.lost) else {
                continue;
            };
            held.done = Some(written);
            if !running.setup.features.in_order {
                shown.push((head, running.held.remove(&head).unwrap()));
                running.order.retain(|id| *id != head);
            }
        }
        while let Some(held) = running.order.front().and_then(|head| running.held.get(head)) {
            if held.done.is_none() {
                break;
            }
            let head = running.order.pop_front().unwrap();
            shown.push((head, running.held.remove(&head).unwrap()));
        }
        match running.ring.complete(chains.iter().copied()) {
            Ok(notify) => {
                assert!(!notify || !shown.is_empty());
                let span: u64 = shown.iter().map(|(_, held)| held.span).sum();
                assert_eq!(running.places(), [next, first.after(span, size)]);
                // The second words of the descriptors of what was used.
                let words: Vec<_> = (0..span)
                    .map(|count| running.setup.desc + 16 * first.after(count, size).index + 8)
                    .filter_map(|address| self.world.find(address, 8).map(|(mapping, at)| (mapping, at, 8)))
                    .collect();
                self.world.look(&words);
                if !shown.is_empty() {
                    self.follow(running, first, &shown);
                }
            }
            Err(violation) => {
                assert!(PLACE_VIOLATIONS.contains(&violation.name()), "{violation}");
                self.world.look(&[]);
                running.ended = true;
                running.lost = true;
            }
        }
        if running.lost {
            running.held.clear();
            running.order.clear();
        }
        assert_eq!(running.ring.in_flight(), running.held.len());
    }

    /// Find the way through used descriptors as a driver does, that knows how many each chain has.
    fn follow(&self, running: &Running, first: Place, shown: &[(u16, Held)]) {
        let size = u64::from(running.setup.size);
        let mut place = first;
        let mut rest = shown;
        while !rest.is_empty() {
            let at = self.world.find(running.setup.desc + 16 * place.index, 16).expect("a ring in memory");
            let bytes = self.world.bytes(at, 16);
            let (written, id, flags) = (word32(bytes, 8), word16(bytes, 12), word16(bytes, 14));
            let used = if place.wrap { AVAIL | USED } else { 0 };
            assert_eq!(flags, used | if written > 0 { WRITE } else { 0 });
            // With IN_ORDER it may be the last of several, of which the others had nothing to say.
            let count = 1 + rest.iter().position(|(head, _)| *head == id).expect("an id that was used");
            let (these, others) = rest.split_at(count);
            assert!(count == 1 || running.setup.features.in_order);
            assert!(these[..count - 1].iter().all(|(_, held)| held.chain.writable().total() == 0));
            assert_eq!(these[count - 1].1.done, Some(written));
            place = place.after(these.iter().map(|(_, held)| held.span).sum(), size);
            rest = others;
        }
    }

    fn step(&mut self, step: Step, input: &mut Input<'_>, running: &mut Option<Running>) {
        let setup = running.as_ref().map(|running| running.setup);
        match (step, setup, running.as_mut()) {
            (Step::Write, ..) => {
                let address = World::address(input);
                let size = input.u8();
                let bytes = input.bytes(size.into());
                self.world.put(address, bytes);
            }
            (Step::Region, ..) => self.world.toggle(usize::from(input.u8() & 3)),
            (Step::Start, ..) => {
                let setup = Self::setup(input);
                *running = self.start(setup);
            }
            (Step::GoOn, Some(setup), Some(old)) => {
                let resume = if input.u8() & 1 == 0 { Some(old.ring.next()) } else { old.ring.unused() };
                *running = self.start(Setup { resume, ..setup });
            }
            (Step::Offer, Some(setup), _) => {
                let (flags, id) = (u16::from(input.u8()), u16::from(input.u8()));
                let address = World::address(input);
                let size = u32::from(input.u8());
                let flags = flags & !AVAIL | self.place.lap();
                let words = [&address.to_le_bytes()[..], &size.to_le_bytes(), &id.to_le_bytes(), &flags.to_le_bytes()];
                self.world.put(setup.desc.wrapping_add(16 * self.place.index), &words.concat());
                self.place = self.place.after(1, u64::from(setup.size));
            }
            (Step::SetPlace, Some(setup), _) => {
                let word = u32::from(input.u16());
                self.place = Place::from_word(word);
                self.place.index %= u64::from(setup.size);
            }
            (Step::Descriptor, Some(setup), _) => {
                // In the ring, or behind the start of the second half of the first region, where tables may be.
                let (kind, index) = (input.u8(), u64::from(input.u8()));
                let table = if kind & 1 == 0 { setup.desc } else { PLACES[0].address + 0x2000 };
                let address = World::address(input);
                let size = if kind & 2 == 0 { u32::from(input.u8()) } else { input.u32() };
                let (id, flags) = (input.u16(), input.u16());
                let words = [&address.to_le_bytes()[..], &size.to_le_bytes(), &id.to_le_bytes(), &flags.to_le_bytes()];
                self.world.put(table.wrapping_add(16 * index), &words.concat());
            }
            (Step::Take, _, Some(running)) => {
                let limit = match input.u8() {
                    255 => usize::MAX,
                    limit => usize::from(limit),
                };
                self.take(running, limit);
            }
            (Step::Complete, _, Some(running)) => {
                let (first, count, written) = (usize::from(input.u8()), usize::from(input.u8() & 7), input.u32());
                let order = &running.order;
                let chains: Vec<_> = (first..=first + count)
                    .filter(|_| !order.is_empty())
                    .map(|number| (order[number % order.len()], written))
                    .collect();
                self.complete(running, &chains);
            }
            (Step::CompleteAny, _, Some(running)) => {
                let chains: Vec<_> = (0..input.u8() & 3).map(|_| (input.u16(), input.u32())).collect();
                self.complete(running, &chains);
            }
            (Step::Copy, _, Some(running)) => {
                let (number, at) = (usize::from(input.u8()), u64::from(input.u16()));
                if let Some(held) = running.held.values().nth(number % running.held.len().max(1)) {
                    self.world.copy(&held.chain, at);
                }
            }
            (Step::Clear, ..) => self.world.clear(),
            _ => (),
        }
    }
}

thread_local! {
    /// Mapped once: an input takes microseconds, and a mapping more.
    static WORLD: RefCell<World> = RefCell::default();
}

fn one(data: &[u8]) {
    WORLD.with_borrow_mut(|world| {
        world.reset();
        let mut input = Input::new(data);
        let mut target = Target { world, place: Place { index: 0, wrap: true } };
        let setup = Target::setup(&mut input);
        let mut running = target.start(setup);
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            let step = TABLE[usize::from(input.u8()) % TABLE.len()];
            target.step(step, &mut input, &mut running);
        }
    });
}

/// A ring of some size with its parts one after the other, where a driver has them.
fn ring(flags: u8, size: u8) -> Seed {
    let seed = Seed::default().u8(flags).u8(size).u8(0).u16(0).u8(0).u16(0x100).u8(0).u16(0x140);
    if flags & 4 != 0 {
        seed.u32(u32::from(size - 1) * 0x1_0001)
    } else {
        seed
    }
}

fn offer(seed: Seed, flags: u16, id: u8, at: u16, size: u8) -> Seed {
    seed.u8(Step::Offer as u8).u8(flags as u8).u8(id).u8(0).u16(at).u8(size)
}

fn entry(seed: Seed, index: u8, at: u16, size: u8, flags: u16) -> Seed {
    seed.u8(Step::Descriptor as u8).u8(1).u8(index).u8(0).u16(at).u8(size).u16(0).u16(flags)
}

/// Take all, look at one, answer it.
fn serve(seed: Seed) -> Seed {
    let seed = seed.u8(Step::Take as u8).u8(16).u8(Step::Copy as u8).u8(0).u16(0);
    seed.u8(Step::Complete as u8).u8(0).u8(0).u32(4)
}

fn seeds() -> Vec<Seed> {
    const INDIRECT: u16 = 4;
    let mut seeds = Vec::new();
    for flags in 0..16 {
        let size = 3 + flags % 4;
        // A request and its answer, again and again, over the end of the ring.
        let chain = |seed, id| offer(offer(seed, NEXT, id, 0x1000, 16), WRITE, id, 0x1100, 16);
        let round = (0..5).fold(ring(flags, size), |seed, id| serve(chain(seed, id)));
        seeds.push(round);
        // Through a table.
        let seed = entry(entry(ring(flags, size), 0, 0x1000, 16, 0), 1, 0x1100, 16, WRITE);
        seeds.push(serve(offer(seed, INDIRECT, 2, 0x2000, 32)));
        // Several that say nothing, then one that does; used together, and out of order.
        let seed = (0..3).fold(ring(flags, size), |seed, id| offer(seed, 0, id, 0x1000, 8));
        let seed = seed.u8(Step::Take as u8).u8(255).u8(Step::Complete as u8).u8(1).u8(0).u32(0);
        seeds.push(offer(seed, WRITE, 9, 0x1100, 8).u8(Step::Complete as u8).u8(0).u8(7).u32(0));
        // Memory that goes and comes again under a running ring, which then goes on.
        let seed = offer(chain(ring(flags, size), 0), 0, 1, 0x1000, 4).u8(Step::Take as u8).u8(1);
        let seed = seed.u8(Step::Region as u8).u8(1).u8(Step::Region as u8).u8(3);
        let seed = seed.u8(Step::Clear as u8).u8(Step::Region as u8).u8(0).u8(Step::GoOn as u8).u8(flags >> 3);
        seeds.push(serve(seed));
        // Over the border of two regions.
        seeds.push(serve(offer(ring(flags, size), 0, 0, 0x3ff0, 32)));
    }
    seeds
}
