//! The device side of a split ring, with a driver that writes what it likes into its memory, moves and takes away
//! that memory, and says anything about its ring.
//!
//! An input is a list of steps. What must hold whatever they are: nothing panics; a violation is one of those that the
//! interface names, comes once, and then the ring gives nothing; at most as many chains as descriptors are in flight,
//! each head once; a chain lies in the regions that there are; and the device writes into its used ring and into
//! writable buffers, and nowhere else.
#![no_main]

use std::cell::RefCell;
use std::collections::BTreeSet;

use vbus_fuzz::world::{World, PLACES};
use vbus_fuzz::{target, word16, word32, Input, Seed};
use vbus_ring::ring::split::DeviceRing;
use vbus_ring::ring::{Chain, Features, Setup};

target!(one, seeds);

/// The largest size of a queue.
const MAX_SIZE: u32 = 1024;
/// Steps of an input: as many as are of use, so that a long input is no slow one.
const STEPS: usize = 300;

const TAKE_VIOLATIONS: [&str; 16] = [
    "ring-misaligned",
    "ring-outside-memory",
    "address-outside-memory",
    "region-read-only",
    "index-jump",
    "descriptor-out-of-range",
    "descriptor-loop",
    "chain-too-long",
    "chain-too-large",
    "readable-after-writable",
    "zero-length-descriptor",
    "descriptor-in-use",
    "too-many-buffers",
    "indirect-not-negotiated",
    "indirect-nested",
    "indirect-next",
];
const TABLE_VIOLATIONS: [&str; 2] = ["indirect-table-size", "indirect-table-too-long"];
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
    SetIndex,
    CompleteAny,
    Region,
    Start,
    GoOn,
    Copy,
    Clear,
}

const TABLE: [Step; 16] = {
    use Step::{Clear, Complete, CompleteAny, Copy, Descriptor, GoOn, Offer, Region, SetIndex, Start, Take, Write};
    [
        Offer,
        Take,
        Complete,
        Descriptor,
        Write,
        SetIndex,
        CompleteAny,
        Region,
        Start,
        GoOn,
        Copy,
        Clear,
        Take,
        Descriptor,
        Offer,
        Complete,
    ]
};

/// A ring under test, and what must be true of it.
struct Running {
    ring: DeviceRing,
    setup: Setup,
    held: Vec<Chain>,
    heads: BTreeSet<u16>,
    /// A violation was seen: it gives nothing any more.
    ended: bool,
    /// `take` has said so.
    told: bool,
    /// Nor does it complete anything.
    lost: bool,
    /// The used index.
    used: u16,
}

struct Target<'a> {
    world: &'a mut World,
    /// What the driver offers next.
    index: u16,
}

impl Target<'_> {
    /// Where the used ring is, when it is in memory: all that the device may write without a request.
    fn used_part(&self, setup: &Setup) -> Vec<(usize, usize, usize)> {
        let size = 4 + 8 * setup.size as usize + if setup.features.event_idx { 2 } else { 0 };
        self.world.find(setup.device, size).map(|(mapping, at)| (mapping, at, size)).into_iter().collect()
    }

    fn setup(input: &mut Input<'_>) -> Setup {
        let flags = input.u8();
        let size = match input.u8() {
            power @ 0..=11 => 1 << power,
            255 => input.u32(),
            size => u32::from(size),
        };
        let [desc, driver, device] = [(); 3].map(|()| World::address(input));
        let resume = (flags & 4 != 0).then(|| input.u16().into());
        let features = Features { event_idx: flags & 1 != 0, indirect: flags & 2 != 0, ..Features::default() };
        Setup { size, desc, driver, device, features, resume }
    }

    fn start(&mut self, setup: Setup) -> Option<Running> {
        match DeviceRing::new(self.world.memory.clone(), MAX_SIZE, setup) {
            Ok(ring) => {
                assert!(setup.size.is_power_of_two() && setup.size <= MAX_SIZE);
                assert_eq!((u32::from(ring.size()), ring.in_flight()), (setup.size, 0));
                assert_eq!(ring.next(), setup.resume.unwrap_or(0));
                let used = self.used_part(&setup);
                // Known before the look: what the ring may write at its start is not its used index.
                let (mapping, at, _) = used[0];
                let index = word16(self.world.bytes((mapping, at + 2), 2), 0);
                self.world.look(&used);
                self.index = ring.next() as u16;
                let used = setup.resume.map_or(0, |_| index);
                Some(Running {
                    ring,
                    setup,
                    held: vec![],
                    heads: BTreeSet::new(),
                    ended: false,
                    told: false,
                    lost: false,
                    used,
                })
            }
            Err(violation) => {
                let names = [&PLACE_VIOLATIONS[..], &["queue-size"]].concat();
                assert!(names.contains(&violation.name()), "{violation}");
                self.world.look(&[]);
                None
            }
        }
    }

    fn take(&mut self, running: &mut Running, limit: usize) {
        let Running { ring, setup, held, heads, ended, told, .. } = running;
        let before = held.len();
        let result = ring.take(limit, held);
        let chains = &held[before..];
        assert!(chains.len() <= limit);
        if *ended {
            assert!(chains.is_empty(), "a ring that is broken gives nothing");
        }
        let used = self.used_part(setup);
        self.world.look(&used);
        match result {
            Ok(()) => (),
            Err(violation) => {
                assert!(!*told, "a violation is told once: {violation}");
                assert!(chains.is_empty(), "with chains a call succeeds");
                let name = violation.name();
                assert!(TAKE_VIOLATIONS.contains(&name) || TABLE_VIOLATIONS.contains(&name), "{violation}");
                *ended = true;
                *told = true;
            }
        }
        for chain in chains {
            assert!(u32::from(chain.head()) < setup.size);
            assert!(heads.insert(chain.head()), "{} is in flight twice", chain.head());
            let [readable, writable] = [(chain.readable(), false), (chain.writable(), true)]
                .map(|(segments, write)| self.world.pieces(segments, write).len());
            // A piece for each descriptor, and one more for each border of regions that it goes over.
            assert!((1..=2 * setup.size as usize).contains(&(readable + writable)));
            assert!(chain.readable().total() + chain.writable().total() <= u64::from(u32::MAX));
        }
        assert_eq!(ring.in_flight(), heads.len());
        assert!(ring.in_flight() <= usize::from(ring.size()));
    }

    fn complete(&mut self, running: &mut Running, chains: &[(u16, u32)]) {
        let done: Vec<(u16, u32)> =
            chains.iter().copied().filter(|(head, _)| !running.lost && running.heads.remove(head)).collect();
        running.held.retain(|chain| running.heads.contains(&chain.head()));
        let used = self.used_part(&running.setup);
        match running.ring.complete(chains.iter().copied()) {
            Ok(_) if done.is_empty() => self.world.look(&[]),
            Ok(_) => {
                self.world.look(&used);
                let (mapping, at, size) = used[0];
                let bytes = self.world.bytes((mapping, at), size);
                let first = running.used;
                running.used = first.wrapping_add(done.len() as u16);
                assert_eq!(word16(bytes, 2), running.used, "the used index");
                for (number, &(head, written)) in done.iter().enumerate() {
                    let entry = first.wrapping_add(number as u16) & (running.ring.size() - 1);
                    let place = 4 + 8 * usize::from(entry);
                    assert_eq!((word32(bytes, place), word32(bytes, place + 4)), (u32::from(head), written));
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
            running.heads.clear();
        }
        assert_eq!(running.ring.in_flight(), running.heads.len());
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
                let resume = Some(old.ring.next());
                *running = self.start(Setup { resume, ..setup });
            }
            (Step::Offer, Some(setup), _) => {
                let head = input.u8();
                let entry = u64::from(self.index) % u64::from(setup.size);
                self.world.put(setup.driver + 4 + 2 * entry, &u16::from(head).to_le_bytes());
                self.index = self.index.wrapping_add(1);
                self.world.put(setup.driver + 2, &self.index.to_le_bytes());
            }
            (Step::SetIndex, Some(setup), _) => {
                self.index = input.u16();
                self.world.put(setup.driver + 2, &self.index.to_le_bytes());
            }
            (Step::Descriptor, Some(setup), _) => {
                // In the table, or behind the start of the second half of the first region, where tables may be.
                let (kind, index) = (input.u8(), u64::from(input.u8()));
                let table = if kind & 1 == 0 { setup.desc } else { PLACES[0].address + 0x2000 };
                let address = World::address(input);
                let size = if kind & 2 == 0 { u32::from(input.u8()) } else { input.u32() };
                let (flags, next) = (u16::from(input.u8()), u16::from(input.u8()));
                let words =
                    [&address.to_le_bytes()[..], &size.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
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
                let held = &running.held;
                let chains: Vec<_> = (first..=first + count)
                    .filter(|_| !held.is_empty())
                    .map(|number| (held[number % held.len()].head(), written))
                    .collect();
                self.complete(running, &chains);
            }
            (Step::CompleteAny, _, Some(running)) => {
                let chains: Vec<_> = (0..input.u8() & 3).map(|_| (input.u16(), input.u32())).collect();
                self.complete(running, &chains);
            }
            (Step::Copy, _, Some(running)) => {
                let (number, at) = (usize::from(input.u8()), u64::from(input.u16()));
                if !running.held.is_empty() {
                    self.world.copy(&running.held[number % running.held.len()], at);
                }
            }
            (Step::Clear, ..) => {
                self.world.clear();
            }
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
        let mut target = Target { world, index: 0 };
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

/// A ring of 8 with its parts one after the other, where a driver has them.
fn ring(flags: u8) -> Seed {
    let seed = Seed::default().u8(flags).u8(3).u8(0).u16(0).u8(0).u16(0x100).u8(0).u16(0x200);
    if flags & 4 != 0 {
        seed.u16(0xffff)
    } else {
        seed
    }
}

const NEXT: u8 = 1;
const WRITE: u8 = 2;
const INDIRECT: u8 = 4;

fn descriptor(seed: Seed, kind: u8, index: u8, at: u16, size: u8, flags: u8, next: u8) -> Seed {
    seed.u8(Step::Descriptor as u8).u8(kind).u8(index).u8(0).u16(at).u8(size).u8(flags).u8(next)
}

fn offer(seed: Seed, head: u8) -> Seed {
    seed.u8(Step::Offer as u8).u8(head)
}

/// Take all, look at one, answer it.
fn serve(seed: Seed) -> Seed {
    let seed = seed.u8(Step::Take as u8).u8(16).u8(Step::Copy as u8).u8(0).u16(0);
    seed.u8(Step::Complete as u8).u8(0).u8(0).u32(4)
}

fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for flags in 0..8 {
        // A request and its answer; twice, so that a used entry lies behind another.
        let chain = |seed| descriptor(descriptor(seed, 0, 0, 0x1000, 16, NEXT, 1), 0, 1, 0x1100, 16, WRITE, 0);
        let seed = serve(offer(chain(ring(flags)), 0));
        seeds.push(serve(offer(seed, 0)));
        // Through a table.
        let seed = descriptor(ring(flags), 0, 2, 0x2000, 32, INDIRECT, 0);
        let seed = descriptor(descriptor(seed, 1, 0, 0x1000, 16, NEXT, 1), 1, 1, 0x1100, 16, WRITE, 0);
        seeds.push(serve(offer(seed, 2)));
        // Memory that goes and comes again under a running ring, which then goes on.
        let seed = offer(offer(chain(ring(flags)), 0), 1).u8(Step::Take as u8).u8(1);
        let seed = seed.u8(Step::Region as u8).u8(1).u8(Step::Region as u8).u8(3);
        seeds.push(serve(seed.u8(Step::Clear as u8).u8(Step::Region as u8).u8(0).u8(Step::GoOn as u8)));
        // A table that alone would be good, behind a descriptor.
        let mut long = descriptor(ring(flags), 0, 0, 0x1000, 16, NEXT, 1);
        long = descriptor(long, 0, 1, 0x2000, 128, INDIRECT, 0);
        for entry in 0..8 {
            long = descriptor(long, 1, entry, 0x1000, 1, if entry < 7 { NEXT } else { 0 }, entry + 1);
        }
        seeds.push(serve(offer(long, 0)));
        // Over the border of two regions.
        let border = descriptor(ring(flags), 0, 0, 0x3ff0, 32, 0, 0);
        seeds.push(serve(offer(border, 0)));
    }
    seeds
}
