//! A network's engine from end to end, with a driver that writes what it likes into both of its rings and all buffers,
//! and moves and takes away that memory.
//!
//! An input is a list of steps. What must hold whatever they are: nothing panics; the engine writes into regions that
//! may be written and nowhere else, and nowhere at all while no queue runs; what is wrong has the number of the run that
//! it stopped; and its counters add up, to the last frame.
#![no_main]

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use vbus_engine::loopback::Loopback;
use vbus_engine::net::{Filter, Rules};
use vbus_engine::queue::Queue;
use vbus_engine::worker::Engine;
use vbus_fuzz::queue::{describe_seed, start_seed, Side, Silent, NEXT, WRITE};
use vbus_fuzz::world::World;
use vbus_fuzz::{target, Input, Seed};

target!(one, seeds);

const STEPS: usize = 300;

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
    Rules,
    Pause,
    Native,
    Clear,
    Forget,
}

const TABLE: [Step; 16] = {
    use Step::{Clear, Describe, Forget, Native, Offer, Pause, Region, Rules, Start, Stop, Turn, Write};
    [
        Offer, Describe, Turn, Write, Region, Start, Stop, Rules, Pause, Native, Clear, Forget, Offer, Describe, Turn,
        Turn,
    ]
};

struct Target<'a> {
    world: &'a mut World,
    engine: Loopback,
    /// What is received, and what is sent.
    sides: [Side; 2],
    /// Frames that were handed over, and wait nowhere any more.
    handed_over: u64,
}

impl Target<'_> {
    fn runs(&self, index: usize) -> bool {
        self.sides[index].queue.lock().is_some()
    }

    fn turn(&mut self, ask: bool) {
        let ran = self.runs(0) || self.runs(1);
        let turn = self.engine.turn(ask);
        if ran {
            self.world.look_outside();
        } else {
            assert!(!turn.worked && !turn.more);
            self.world.look(&[]);
        }
        for (run, fault) in self.engine.outbox.faults() {
            let queue = &self.sides[fault.queue].queue;
            assert!(run == queue.run() && queue.lock().is_none(), "{fault:?} of run {run}");
            assert_ne!(fault.name, "engine-error");
        }
        self.count();
    }

    /// Every frame that was taken is somewhere.
    fn count(&self) {
        let count = |name: &str| self.engine.counters().iter().find(|counter| counter.0 == name).unwrap().1;
        let wrong: u64 =
            ["too_short", "too_long", "checksum", "segments", "header", "queue"].into_iter().map(count).sum();
        let completed = self.sides[1].queue.completed.load(Ordering::Relaxed);
        assert!(completed <= count("tx_packets") + count("tx_dropped") + wrong);
        let arrived: u64 = ["rx_packets", "rx_filtered", "rx_too_long", "rx_dropped"].into_iter().map(count).sum();
        let waiting = count("tx_packets") - arrived - self.handed_over;
        assert!(waiting <= 1024, "{waiting} frames wait");
    }

    fn rules(input: &mut Input<'_>) -> Rules {
        let flags = input.u8();
        let [link, in_use, merge, csum, promiscuous, told, vlans, all_unicast] =
            std::array::from_fn(|bit| flags >> bit & 1 == 0);
        let vlans = (!vlans).then(|| [input.u16() % 4096].into());
        let filter = Filter { promiscuous, told: !told, all_unicast, vlans, ..Filter::default() };
        let kinds = vec![input.u8()];
        Rules { link, in_use, merge, csum, host_kinds: kinds.clone(), guest_csum: csum, guest_kinds: kinds, filter }
    }

    fn step(&mut self, step: Step, input: &mut Input<'_>) {
        let choice = input.u8();
        let index = usize::from(choice & 1);
        let Self { world, engine, sides, .. } = self;
        let side = &mut sides[index];
        match step {
            Step::Offer => side.offer(world, input),
            Step::Describe => side.describe(world, input),
            Step::Turn => self.turn(choice & 1 == 0),
            Step::Write => {
                let (address, size) = (World::address(input), input.u8());
                world.put(address, input.bytes(size.into()));
            }
            Step::Region => world.toggle(usize::from(choice & 3)),
            Step::Start => {
                side.start(world, input);
                world.look_outside();
            }
            Step::Stop => {
                side.stop();
                assert!(engine.settle(Duration::ZERO));
            }
            Step::Rules => engine.set_rules(Self::rules(input)),
            Step::Pause => side.queue.pause(choice & 2 != 0),
            Step::Native => {
                let native = choice & 2 != 0;
                side.queue.set_native(native);
                if !native {
                    self.handed_over += engine.hand_over().1.len() as u64;
                }
            }
            Step::Clear => world.clear(),
            Step::Forget => {
                sides.iter_mut().for_each(Side::stop);
                engine.forget();
                // Nothing waits any more.
                self.count();
            }
        }
    }
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

fn one(data: &[u8]) {
    WORLD.with_borrow_mut(|world| {
        world.reset();
        let mut input = Input::new(data);
        let sides = [(); 2].map(|()| Side::new(Arc::new(Queue::default())));
        let engine = Loopback::new(sides[0].queue.clone(), sides[1].queue.clone(), Arc::new(Silent));
        engine.set_rules(Target::rules(&mut input));
        let mut target = Target { world, engine, sides, handed_over: 0 };
        for index in 0..2 {
            target.sides[index].start(target.world, &mut input);
        }
        target.world.look_outside();
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            let step = TABLE[usize::from(input.u8()) % TABLE.len()];
            target.step(step, &mut input);
        }
        target.sides.iter_mut().for_each(Side::stop);
        target.turn(true);
    });
}

/// A frame, and a buffer for it.
fn exchange(seed: Seed, [room, size]: [u16; 2], packed: bool) -> Seed {
    // No header is all that begins with zeroes.
    let mut seed = seed.u8(Step::Write as u8).u8(0).u8(0x40).u16(0x180c).u8(255).bytes(&[0xee; 255]);
    // At the very end of the region: a byte more would be seen.
    for (index, at, size, flags) in [(0u8, 0x4000 - room, room, WRITE), (1, 0x1800, size, 0)] {
        seed = describe_seed(seed.u8(Step::Describe as u8).u8(index), 0, at, size, flags);
        seed = seed.u8(Step::Offer as u8).u8(index).u8(0).u8(if packed { flags } else { 0 });
    }
    seed.u8(Step::Turn as u8).u8(0).u8(Step::Turn as u8).u8(1)
}

fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    for flags in 0..16 {
        let packed = flags & 1 != 0;
        for [room, size] in [[100, 80], [40, 80], [11, 80], [100, 8], [2000, 1500], [79, 80], [80, 80]] {
            let begin = start_seed(start_seed(Seed::default().u8(0).u8(0), flags, 0), flags, 0x800);
            let seed = exchange(begin.clone(), [room, size], packed);
            seeds.push(seed.clone());
            // Over two buffers, which come one after the other; and what waits is handed over.
            let more = describe_seed(seed.u8(Step::Describe as u8).u8(0), 1, 0x1400, 60, WRITE);
            let more = more.u8(Step::Offer as u8).u8(0).u8(1).u8(if packed { WRITE } else { 0 });
            seeds.push(more.clone().u8(Step::Turn as u8).u8(0));
            seeds.push(more.u8(Step::Native as u8).u8(0).u8(Step::Turn as u8).u8(0).u8(Step::Forget as u8).u8(0));
            let cut = describe_seed(begin.u8(Step::Describe as u8).u8(1), 0, 0x1800, 12, NEXT);
            let cut = describe_seed(cut.u8(Step::Describe as u8).u8(1), 1, 0x1900, size, 0);
            let cut = cut.u8(Step::Offer as u8).u8(1).u8(0).u8(if packed { NEXT } else { 0 });
            seeds.push(cut.u8(Step::Offer as u8).u8(1).u8(1).u8(0).u8(Step::Turn as u8).u8(0));
        }
    }
    seeds
}
