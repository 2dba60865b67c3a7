//! The event ring against a model of itself in random order, against liars, and under real threads.
#![cfg(not(loom))]

mod common;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use common::shared;
use proptest::prelude::*;
use vbus_ring::area::LayoutError;
use vbus_ring::event::{Bell, Consumer, EventFault, Geometry, OpenError, Producer, Source};
use vbus_ring::mem::Window;

const SOURCES: u32 = 8;
const PRIORITIES: u32 = 3;
const SLEEP: usize = 0;
const TAKEN: usize = 512;
const STATS: usize = 1024;
const SLOTS: usize = 2048;
const SIZE: usize = 4096;
const GEOMETRY: Geometry =
    Geometry { slots: SLOTS, taken: TAKEN, sleep: SLEEP, max_sources: SOURCES, priorities: PRIORITIES };

/// Which priority's bell rang how often.
#[derive(Clone, Default)]
struct Counted(Arc<AtomicU64>);

impl Bell for Counted {
    fn ring(&self) -> bool {
        self.0.fetch_add(1, Ordering::SeqCst);
        true
    }
}

struct Pair {
    area: Window,
    producer: Producer<Window, Counted>,
    consumer: Consumer<Window>,
    bells: Vec<Counted>,
}

fn pair() -> Pair {
    let area = shared(SIZE);
    let bells: Vec<_> = (0..PRIORITIES).map(|_| Counted::default()).collect();
    let producer = Producer::new(area.clone(), GEOMETRY, STATS, bells.clone()).unwrap();
    let consumer = Consumer::new(area.clone(), GEOMETRY).unwrap();
    Pair { area, producer, consumer, bells }
}

impl Pair {
    fn open(&mut self, source: u32, generation: u32, priority: u32) -> Arc<Source> {
        self.consumer.open(source, generation, u64::from(source)).unwrap();
        self.producer.open(source, generation, priority).unwrap()
    }

    fn drain(&mut self) -> Vec<u64> {
        let mut keys = Vec::new();
        self.consumer.drain(1000, &mut keys);
        keys
    }

    fn rung(&self) -> Vec<u64> {
        self.bells.iter().map(|bell| bell.0.load(Ordering::SeqCst)).collect()
    }

    /// A slot as a hostile producer writes it.
    fn slot(&self, index: usize, sequence: u32, source: u32, generation: u32) {
        let offset = SLOTS + index * 16;
        self.area.store32(offset + 4, source, Ordering::Relaxed);
        self.area.store32(offset + 8, generation, Ordering::Relaxed);
        self.area.store32(offset, sequence, Ordering::Release);
    }
}

#[test]
fn many_signals_are_one_event() {
    let mut pair = pair();
    let source = pair.open(3, 1, 0);
    for _ in 0..10 {
        pair.producer.signal(&source);
    }
    assert_eq!(pair.drain(), [3]);
    assert!(pair.drain().is_empty());
    pair.producer.signal(&source);
    assert_eq!(pair.drain(), [3]);
    assert_eq!(pair.producer.counters(), [11, 2, 0]);
    let stats: Vec<_> = (0..4).map(|word| pair.area.load64(STATS + 3 * 32 + word * 8, Ordering::Relaxed)).collect();
    assert_eq!(stats, [11, 2, 0, 0]);
}

#[test]
fn a_sleep_costs_one_doorbell_a_priority() {
    let mut pair = pair();
    let sources: Vec<_> = (0..6).map(|source| pair.open(source, 1, source / 2)).collect();
    assert!(pair.consumer.sleep());
    for source in &sources {
        pair.producer.signal(source);
    }
    assert_eq!(pair.rung(), [1, 1, 1]);
    pair.consumer.wake();
    assert_eq!(pair.drain(), [0, 1, 2, 3, 4, 5]);
    pair.producer.signal(&sources[0]);
    assert_eq!(pair.rung(), [1, 1, 1], "awake consumers need no doorbell");
    assert!(!pair.consumer.sleep(), "the last look sees what came while awake");
    pair.consumer.wake();
    assert_eq!(pair.drain(), [0]);
    assert!(pair.consumer.sleep());
    pair.producer.signal(&sources[5]);
    pair.producer.signal(&sources[4]);
    assert_eq!(pair.rung(), [1, 1, 2]);
    assert_eq!(pair.producer.counters(), [9, 9, 4]);
}

#[test]
fn urgent_priorities_come_first_and_a_budget_keeps_the_rest() {
    let mut pair = pair();
    let sources: Vec<_> = (0..6).map(|source| pair.open(source, 1, 2 - source / 2)).collect();
    for source in &sources {
        pair.producer.signal(source);
    }
    let mut keys = Vec::new();
    assert!(pair.consumer.drain(3, &mut keys));
    assert_eq!(keys, [4, 5, 2]);
    pair.producer.signal(&sources[5]);
    assert_eq!(pair.drain(), [5, 3, 0, 1]);
}

#[test]
fn old_generations_and_closed_sources_are_dropped_without_taking() {
    let mut pair = pair();
    let old = pair.open(2, 1, 0);
    pair.producer.signal(&old);
    // Forged, since an honest producer's late event is a race: an event of generation 1 behind the reset.
    pair.consumer.open(2, 2, 22).unwrap();
    assert_eq!(pair.drain(), [2], "what was there at the reset was taken before it");
    let new = pair.producer.open(2, 2, 0).unwrap();
    pair.producer.signal(&old);
    assert_eq!(pair.producer.counters(), [1, 1, 0], "an old generation's signals do nothing");
    pair.slot(1, 2, 2, 1);
    assert!(pair.drain().is_empty());
    assert_eq!((pair.consumer.taken(), pair.consumer.dropped()), (1, 1));
    assert_eq!(pair.area.load32(TAKEN + 8, Ordering::Relaxed), 0, "taken belongs to the new generation");

    pair.consumer.close(2).unwrap();
    pair.slot(2, 3, 2, 2);
    assert!(pair.drain().is_empty());
    assert_eq!(pair.consumer.dropped(), 2);
    pair.producer.close(2).unwrap();
    pair.producer.signal(&new);
    assert_eq!(pair.producer.counters(), [1, 1, 0]);
}

#[test]
fn counters_go_on_over_generations_and_signals_begin_anew() {
    let mut pair = pair();
    let first = pair.open(1, 1, 0);
    pair.producer.signal(&first);
    let second = pair.open(1, 2, 1);
    pair.producer.signal(&second);
    pair.producer.signal(&second);
    assert_eq!(pair.producer.counters(), [3, 2, 0]);
    assert_eq!(second.counters().get(), [2, 1, 0]);
    assert_eq!(pair.area.load64(STATS + 32, Ordering::Relaxed), 3);
}

#[test]
fn resets_without_drains_do_not_fill_the_ring() {
    let mut pair = pair();
    for generation in 0..10 * SOURCES {
        let source = pair.open(0, generation, 0);
        pair.producer.signal(&source);
    }
    assert_eq!(pair.drain().len(), 2, "one of all old generations, one of the last");
    assert_eq!(pair.consumer.fault(), None);
}

#[test]
fn a_source_out_of_range_stops_the_receiver() {
    let mut pair = pair();
    let source = pair.open(1, 1, 0);
    pair.producer.signal(&source);
    pair.slot(1, 2, SOURCES, 1);
    pair.slot(2, 3, 1, 1);
    assert_eq!(pair.drain(), [1]);
    let fault = EventFault::SourceOutOfRange { priority: 0, claimed: SOURCES, max_sources: SOURCES };
    assert_eq!(pair.consumer.fault(), Some(fault));
    assert!(pair.drain().is_empty());
    assert!(pair.consumer.sleep());
}

#[test]
fn a_ring_that_was_overrun_stops_the_receiver() {
    let mut pair = pair();
    pair.open(1, 1, 1);
    pair.slot(SOURCES as usize, SOURCES + 1, 1, 1);
    assert!(!pair.consumer.sleep());
    assert!(pair.drain().is_empty());
    let fault = EventFault::Overrun { priority: 1, sequence: SOURCES + 1, expected: 1 };
    assert_eq!(pair.consumer.fault(), Some(fault));
}

#[test]
fn lies_of_a_consumer_stay_in_its_ring() {
    let mut pair = pair();
    let source = pair.open(1, 1, 0);
    pair.producer.signal(&source);
    // "I took what you never sent": nothing is sent, and nothing breaks.
    pair.area.store32(TAKEN + 4, 77, Ordering::Relaxed);
    pair.producer.signal(&source);
    // "I took it" for ever: every signal is an event, in slots of this ring only.
    for count in 1..100 {
        pair.area.store32(TAKEN + 4, count, Ordering::Relaxed);
        // "I sleep", each time another sleep.
        pair.area.store32(SLEEP, 2 * count + 1, Ordering::Relaxed);
        pair.producer.signal(&source);
    }
    assert_eq!(pair.producer.counters(), [101, 100, 99]);
    for word in (SLOTS + SOURCES as usize * 16..SIZE).step_by(4) {
        assert_eq!(pair.area.load32(word, Ordering::Relaxed), 0);
    }
}

#[test]
fn wrong_geometries_are_refused() {
    let area = shared(SIZE);
    let new = |geometry| Consumer::new(area.clone(), geometry).map(drop).unwrap_err();
    assert!(matches!(new(Geometry { max_sources: 6, ..GEOMETRY }), LayoutError::Count(_)));
    assert!(matches!(new(Geometry { max_sources: 0, ..GEOMETRY }), LayoutError::Count(_)));
    assert!(matches!(new(Geometry { priorities: 0, ..GEOMETRY }), LayoutError::Count(_)));
    assert!(matches!(new(Geometry { priorities: 9, ..GEOMETRY }), LayoutError::Count(_)));
    for geometry in [
        Geometry { slots: SIZE - 16, ..GEOMETRY },
        Geometry { taken: SIZE - 16, ..GEOMETRY },
        Geometry { sleep: SIZE - 128, ..GEOMETRY },
        Geometry { slots: usize::MAX - 15, ..GEOMETRY },
        Geometry { max_sources: 1 << 31, ..GEOMETRY },
    ] {
        assert!(matches!(new(geometry), LayoutError::Outside { .. }), "{geometry:?}");
    }
    for geometry in [
        Geometry { slots: SLOTS + 8, ..GEOMETRY },
        Geometry { taken: TAKEN + 2, ..GEOMETRY },
        Geometry { sleep: SLEEP + 32, ..GEOMETRY },
    ] {
        assert!(matches!(new(geometry), LayoutError::Misaligned { .. }), "{geometry:?}");
    }
    let producer = |stats, bells| Producer::new(area.clone(), GEOMETRY, stats, vec![Counted::default(); bells]);
    assert!(matches!(producer(STATS, 2).map(drop), Err(LayoutError::Count(_))));
    assert!(matches!(producer(STATS + 4, 3).map(drop), Err(LayoutError::Misaligned { .. })));
    assert!(matches!(producer(SIZE, 3).map(drop), Err(LayoutError::Outside { .. })));
}

#[test]
fn sources_and_priorities_out_of_range_are_refused() {
    let mut pair = pair();
    assert_eq!(pair.producer.open(8, 0, 0).map(drop), Err(OpenError::Source(8, 8)));
    assert_eq!(pair.producer.open(0, 0, 3).map(drop), Err(OpenError::Priority(3, 3)));
    assert_eq!(pair.producer.close(8), Err(OpenError::Source(8, 8)));
    assert_eq!(pair.consumer.open(8, 0, 0), Err(OpenError::Source(8, 8)));
    assert_eq!(pair.consumer.close(u32::MAX), Err(OpenError::Source(u32::MAX, 8)));
}

/// What may happen, in any order.
#[derive(Clone, Debug)]
enum Step {
    Signal(u32),
    Drain(usize),
    Sleep,
    Wake,
    Reopen(u32, u32),
    Close(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..SOURCES).prop_map(Step::Signal),
        3 => (0usize..6).prop_map(Step::Drain),
        2 => Just(Step::Sleep),
        2 => Just(Step::Wake),
        1 => (0..SOURCES, 0..PRIORITIES).prop_map(|(source, priority)| Step::Reopen(source, priority)),
        1 => (0..SOURCES).prop_map(Step::Close),
    ]
}

/// The contract, said as simply as it goes: a queue of sources a priority.
#[derive(Default)]
struct Contract {
    rings: [VecDeque<u32>; PRIORITIES as usize],
    opened: HashMap<u32, u32>,
    /// Taken by a reset, for the next drain.
    early: Vec<u64>,
    asleep: bool,
    rung: [bool; PRIORITIES as usize],
    doorbells: [u64; PRIORITIES as usize],
}

impl Contract {
    fn signal(&mut self, source: u32) {
        let Some(&priority) = self.opened.get(&source) else { return };
        let priority = priority as usize;
        if !self.rings[priority].contains(&source) {
            self.rings[priority].push_back(source);
            if self.asleep && !std::mem::replace(&mut self.rung[priority], true) {
                self.doorbells[priority] += 1;
            }
        }
    }

    fn take(&mut self, budget: usize) -> Vec<u64> {
        let all = self.rings.iter_mut().flat_map(|ring| std::iter::from_fn(|| ring.pop_front()));
        all.take(budget).map(u64::from).collect()
    }

    fn reset(&mut self) {
        let taken = self.take(usize::MAX);
        self.early.extend(taken);
        self.early.sort_unstable();
        self.early.dedup();
    }
}

proptest! {
    #[test]
    fn any_order_of_steps_keeps_the_contract(steps in prop::collection::vec(step(), 0..400)) {
        let mut pair = pair();
        let mut contract = Contract::default();
        let mut sources: HashMap<u32, Arc<Source>> = HashMap::new();
        let mut generation = 0;
        for step in steps {
            match step {
                Step::Signal(source) => {
                    contract.signal(source);
                    if let Some(opened) = sources.get(&source) {
                        pair.producer.signal(opened);
                    }
                }
                Step::Drain(budget) => {
                    let mut expected = std::mem::take(&mut contract.early);
                    expected.extend(contract.take(budget));
                    let mut keys = Vec::new();
                    pair.consumer.drain(budget, &mut keys);
                    prop_assert_eq!(keys, expected);
                }
                Step::Sleep => {
                    let nothing = contract.early.is_empty() && contract.rings.iter().all(VecDeque::is_empty);
                    if !contract.asleep {
                        contract.asleep = true;
                        contract.rung = Default::default();
                    }
                    prop_assert_eq!(pair.consumer.sleep(), nothing);
                }
                Step::Wake => {
                    contract.asleep = false;
                    pair.consumer.wake();
                }
                Step::Reopen(source, priority) => {
                    generation += 1;
                    contract.reset();
                    contract.opened.insert(source, priority);
                    sources.insert(source, pair.open(source, generation, priority));
                }
                Step::Close(source) => {
                    contract.reset();
                    contract.opened.remove(&source);
                    pair.producer.close(source).unwrap();
                    pair.consumer.close(source).unwrap();
                }
            }
            prop_assert_eq!(pair.rung(), contract.doorbells.to_vec());
        }
        prop_assert_eq!(pair.consumer.dropped(), 0);
        prop_assert_eq!(pair.consumer.fault(), None);
    }

    #[test]
    fn any_bytes_in_the_slots_are_survived(
        words in prop::collection::vec((0..SLOTS / 4, any::<u32>()), 0..200),
        near in prop::collection::vec((0usize..24, 0u32..20, 0u32..12, 0u32..3), 0..60),
    ) {
        let mut pair = pair();
        for source in 0..SOURCES {
            pair.open(source, 1, source % PRIORITIES);
        }
        let mut taken = 0;
        for (index, sequence, source, generation) in near {
            pair.slot(index, sequence, source, generation);
            taken += pair.drain().len();
        }
        for (word, value) in words {
            pair.area.store32(SLOTS + word % 96 * 4, value, Ordering::Relaxed);
            let mut keys = Vec::new();
            pair.consumer.drain(4, &mut keys);
            prop_assert!(keys.len() <= 4 && keys.iter().all(|key| *key < u64::from(SOURCES)));
            taken += keys.len();
        }
        prop_assert_eq!(pair.consumer.taken(), taken as u64);
    }
}

/// A doorbell for threads: counts, and wakes whoever waits.
#[derive(Clone, Default)]
struct Waking(Arc<(Mutex<u64>, Condvar)>);

impl Bell for Waking {
    fn ring(&self) -> bool {
        *self.0 .0.lock().unwrap() += 1;
        self.0 .1.notify_all();
        true
    }
}

/// Producers of several threads against one consumer that sleeps whenever it can. A lost wakeup hangs this test.
#[test]
fn threads_lose_nothing() {
    const THREADS: u64 = 3;
    const ROUNDS: u64 = 50_000;
    let area = shared(SIZE);
    let bell = Waking::default();
    let producer = Producer::new(area.clone(), GEOMETRY, STATS, vec![bell.clone(); PRIORITIES as usize]).unwrap();
    let mut consumer = Consumer::new(area.clone(), GEOMETRY).unwrap();
    let open = |source: u32| {
        consumer.open(source, 1, u64::from(source)).unwrap();
        producer.open(source, 1, source % PRIORITIES).unwrap()
    };
    let sources: Vec<_> = (0..SOURCES).map(open).collect();
    let available: Vec<AtomicU64> = sources.iter().map(|_| AtomicU64::new(0)).collect();

    let mut serviced = [0; SOURCES as usize];
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (producer, sources, available) = (&producer, &sources, &available);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let source = ((round * 7 + thread * 3) % u64::from(SOURCES)) as usize;
                    available[source].fetch_add(1, Ordering::Relaxed);
                    producer.signal(&sources[source]);
                    if round % 64 == thread {
                        std::thread::yield_now();
                    }
                }
            });
        }
        let mut keys = Vec::new();
        while serviced.iter().sum::<u64>() < THREADS * ROUNDS {
            keys.clear();
            if consumer.drain(4, &mut keys) {
                for &key in &keys {
                    serviced[key as usize] = available[key as usize].load(Ordering::Relaxed);
                }
                continue;
            }
            if consumer.sleep() {
                let (rings, condition) = &*bell.0;
                let mut rings = rings.lock().unwrap();
                while *rings == 0 {
                    rings = condition.wait(rings).unwrap();
                }
                *rings = 0;
            }
            consumer.wake();
        }
    });
    let [signalled, sent, rung] = producer.counters();
    assert_eq!(signalled, THREADS * ROUNDS);
    assert!(consumer.taken() <= sent && sent <= signalled && rung <= sent, "{signalled} {sent} {rung}");
    let shown = |which: usize| {
        (0..SOURCES as usize).map(|source| area.load64(STATS + source * 32 + which * 8, Ordering::Relaxed)).sum::<u64>()
    };
    assert_eq!([shown(0), shown(1), shown(2)], [signalled, sent, rung], "the shared words show what was counted");
    assert_eq!((consumer.dropped(), consumer.fault()), (0, None));
}
