//! A disk's engine from end to end, with a driver that writes what it likes into its ring and all buffers, and moves and
//! takes away that memory.
//!
//! An input is a list of steps. What must hold whatever they are: nothing panics; the engine, and the kernel for it,
//! writes into regions that may be written and nowhere else, and nowhere at all once the queue was stopped and has
//! settled; nothing of the file changes beyond the disk's end, and nothing at all while it is read-only; what is wrong
//! has the number of its run; and no more is completed than was counted.
//!
//! The engine is one for all inputs: nothing of one reaches the next.
#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vbus_engine::blk::Blk;
use vbus_engine::queue::Queue;
use vbus_engine::worker::Engine;
use vbus_fuzz::queue::{describe_seed, start_seed, Side, Silent, NEXT, WRITE};
use vbus_fuzz::world::World;
use vbus_fuzz::{target, Input, Seed};

target!(one, seeds);

const STEPS: usize = 300;
const SECTOR: usize = 512;
/// Sectors of the disk, and of the file: what is behind the disk's end is nobody's.
const SECTORS: u64 = 24;
const FILE: usize = 32 * SECTOR;
/// What is there.
const NOBODYS: u8 = 0x5a;

#[derive(Clone, Copy)]
#[repr(u8)]
enum Step {
    Offer,
    Describe,
    Turn,
    Write,
    Region,
    Start,
    Stop,
    Answer,
    Pause,
    Native,
    Clear,
    Flags,
    Header,
}

const TABLE: [Step; 16] = {
    use Step::{Answer, Clear, Describe, Flags, Header, Native, Offer, Pause, Region, Start, Stop, Turn, Write};
    [
        Offer, Describe, Turn, Write, Region, Start, Stop, Answer, Pause, Native, Clear, Flags, Header, Offer,
        Describe, Turn,
    ]
};

/// Whether the kernel lets us; without, there is nothing to be found.
struct Disk {
    world: World,
    file: File,
    engine: Option<Blk>,
    side: Side,
}

impl Default for Disk {
    fn default() -> Self {
        // SAFETY: the name is a string constant, and the descriptor is checked below.
        let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: just made, and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(FILE as u64).unwrap();
        let side = Side::new(Arc::new(Queue::default()));
        let engine = Blk::new(side.queue.clone(), file.try_clone().unwrap().into(), Arc::new(Silent)).ok();
        if let Some(engine) = &engine {
            engine.settings.capacity.store(SECTORS, Ordering::Release);
            engine.begin();
        }
        Self { world: World::default(), file, engine, side }
    }
}

impl Disk {
    fn turn(&mut self, ask: bool) {
        let Some(engine) = &self.engine else { return };
        engine.turn(ask);
        self.world.look_outside();
        for (run, fault) in engine.outbox.faults() {
            assert!(run <= self.side.queue.run(), "{fault:?} of run {run}");
            assert_ne!(fault.name, "engine-error");
            if run == self.side.queue.run() {
                // As the slot does.
                self.stop();
                return;
            }
        }
    }

    /// Whoever stops it knows afterwards that nothing is written there.
    fn stop(&mut self) {
        self.side.stop();
        let Some(engine) = &self.engine else { return };
        let begun = Instant::now();
        while !engine.settle(Duration::ZERO) {
            assert!(begun.elapsed() < Duration::from_secs(5), "it does not settle");
            engine.turn(true);
        }
        self.world.look_outside();
        engine.turn(true);
        self.world.look(&[]);
    }

    /// What the device model would do with a request that it is left.
    fn answer(&mut self) {
        let Some(engine) = &self.engine else { return };
        for (_, run, chain) in engine.outbox.requests(4) {
            let mut current = self.side.queue.lock();
            if let Some(running) = current.as_mut().filter(|_| self.side.queue.run() == run) {
                let _ = running.ring.complete_chains([(&chain, 1)].into_iter());
            }
        }
        self.world.look_outside();
    }

    fn step(&mut self, step: Step, input: &mut Input<'_>) {
        let choice = input.u8();
        let Self { world, side, .. } = self;
        match step {
            Step::Offer => side.offer(world, input),
            Step::Describe => side.describe(world, input),
            Step::Turn => self.turn(choice & 1 == 0),
            Step::Write => {
                let (address, size) = (World::address(input), input.u8());
                world.put(address, input.bytes(size.into()));
            }
            Step::Header => {
                let (address, sector) = (World::address(input), u64::from(input.u8()));
                let words = [&u32::from(choice & 15).to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
                world.put(address, &words);
            }
            Step::Region => world.toggle(usize::from(choice & 3)),
            Step::Start => {
                self.stop();
                self.side.start(&self.world, input);
                self.world.look_outside();
            }
            Step::Stop => self.stop(),
            Step::Answer => self.answer(),
            Step::Pause => side.queue.pause(choice & 1 != 0),
            Step::Native => side.queue.set_native(choice & 1 != 0),
            Step::Clear => world.clear(),
            Step::Flags => {
                if let Some(engine) = &self.engine {
                    engine.settings.through.store(choice & 1 != 0, Ordering::Release);
                    engine.settings.flush.store(choice & 2 != 0, Ordering::Release);
                }
            }
        }
    }

    fn run(&mut self, data: &[u8]) {
        self.world.reset();
        let mut input = Input::new(data);
        let content = vec![NOBODYS; FILE];
        self.file.write_all_at(&content, 0).unwrap();
        let read_only = input.u8() & 1 != 0;
        self.side.queue.pause(false);
        self.side.queue.set_native(true);
        let completed = self.side.queue.completed.load(Ordering::Relaxed);
        let served = self.served();
        if let Some(engine) = &self.engine {
            engine.settings.read_only.store(read_only, Ordering::Release);
        }
        self.side.start(&self.world, &mut input);
        self.world.look_outside();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            let step = TABLE[usize::from(input.u8()) % TABLE.len()];
            self.step(step, &mut input);
        }
        self.stop();
        assert!(self.side.queue.completed.load(Ordering::Relaxed) - completed <= self.served() - served);
        if let Some(engine) = &self.engine {
            engine.forget();
        }
        let mut now = vec![0; FILE];
        self.file.read_exact_at(&mut now, 0).unwrap();
        let end = SECTORS as usize * SECTOR;
        assert!(now[end..] == content[end..], "beyond the disk's end");
        assert!(!read_only || now == content, "a read-only disk");
    }

    fn served(&self) -> u64 {
        self.engine.as_ref().map_or(0, |engine| engine.counters().iter().map(|counter| counter.1).sum())
    }
}

thread_local! {
    static DISK: RefCell<Disk> = RefCell::default();
}

fn one(data: &[u8]) {
    DISK.with_borrow_mut(|disk| disk.run(data));
}

/// A request of three buffers: header, data, status.
fn request(seed: Seed, (kind, sector): (u8, u8), size: u16, packed: bool) -> Seed {
    let mut seed = seed.u8(Step::Header as u8).u8(kind).u8(0).u16(0x1000).u8(sector);
    let data = if kind == 0 { WRITE } else { 0 };
    // The data are at the very end of the region: a byte more would be seen.
    let place = 0x4000 - size;
    for (index, at, size, flags) in [(0, 0x1000, 16, NEXT), (1, place, size, data | NEXT), (2, 0x1100, 1, WRITE)] {
        seed = describe_seed(seed.u8(Step::Describe as u8).u8(0), index, at, size, flags);
    }
    if packed {
        for (index, flags) in [(0, NEXT), (1, data | NEXT), (2, WRITE)] {
            seed = seed.u8(Step::Offer as u8).u8(0).u8(index).u8(flags);
        }
        return seed.u8(Step::Turn as u8).u8(0);
    }
    seed.u8(Step::Offer as u8).u8(0).u8(0).u8(0).u8(Step::Turn as u8).u8(0)
}

fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for flags in 0..8 {
        let packed = flags & 1 != 0;
        for (kind, sector, size) in [
            (0, 0, 512),
            (1, 1, 1024),
            (1, 23, 512),
            (0, 24, 512),
            (1, 24, 512),
            (1, 23, 1024),
            (4, 0, 512),
            (8, 0, 20),
            (1, 0, 511),
            (11, 0, 16),
        ] {
            let begin = start_seed(Seed::default().u8(flags >> 2), flags, 0).u8(Step::Flags as u8).u8(2 | flags & 1);
            let seed = request(begin, (kind, sector), size, packed);
            seeds.push(seed.clone().u8(Step::Answer as u8).u8(0));
            seeds.push(seed.u8(Step::Region as u8).u8(0).u8(Step::Turn as u8).u8(0).u8(Step::Stop as u8).u8(0));
        }
    }
    seeds
}
