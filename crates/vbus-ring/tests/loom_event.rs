//! The event ring under loom: every interleaving (up to a bound of preemptions) and every value that the memory model
//! lets a load see, of the functions that ship.
//!
//! A model has producers on threads of their own and the consumer on the main one. The queues' own state is in it: a
//! producer counts `available` up before it signals, and service reads it. When all producers are done and the consumer
//! sleeps without a doorbell, everything must have been serviced. The same models fail when any one of the four fences
//! is left out, which is tested too: a model that cannot fail proves nothing.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release -p vbus-ring --test loom_event`.
#![cfg(loom)]

use std::collections::HashMap;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::Arc;
use loom::thread;
use vbus_ring::area::Area;
use vbus_ring::event::{Bell, Consumer, Geometry, Producer, Source};
use vbus_ring::sync::{leave_out, Site};

/// Only the words that the rings use; counters for people are not part of the protocol.
#[derive(Clone)]
struct ModelArea {
    words: Arc<HashMap<usize, AtomicU32>>,
    size: usize,
}

impl ModelArea {
    fn new(geometry: &Geometry, size: usize) -> Self {
        let (sources, priorities) = (geometry.max_sources as usize, geometry.priorities as usize);
        let slots = (0..sources * priorities).flat_map(|slot| [0, 4, 8].map(|word| geometry.slots + slot * 16 + word));
        let taken = (0..sources).map(|source| geometry.taken + source * 4);
        let sleep = (0..priorities).map(|priority| geometry.sleep + priority * 64);
        let words = slots.chain(taken).chain(sleep).map(|offset| (offset, AtomicU32::new(0))).collect();
        Self { words: Arc::new(words), size }
    }
}

impl Area for ModelArea {
    fn size(&self) -> usize {
        self.size
    }
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        self.words[&offset].load(order)
    }
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.words[&offset].store(value, order);
    }
    fn load64(&self, _offset: usize, _order: Ordering) -> u64 {
        0
    }
    fn store64(&self, _offset: usize, _value: u64, _order: Ordering) {}
}

/// Rings since the consumer last looked, which it only does while asleep.
#[derive(Clone)]
struct ModelBell(Arc<AtomicU32>);

impl ModelBell {
    fn heard(&self) -> bool {
        self.0.swap(0, Ordering::Relaxed) > 0
    }
}

impl Bell for ModelBell {
    fn ring(&self) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed);
        true
    }
}

const STATS: usize = 1024;
const SIZE: usize = 2048;
const GEOMETRY: Geometry = Geometry { slots: 0, taken: 512, sleep: 576, max_sources: 2, priorities: 1 };

type Sender = std::sync::Arc<Producer<ModelArea, ModelBell>>;

/// Both sides, and the state of the queues that they talk about.
struct Model {
    producer: Sender,
    consumer: Consumer<ModelArea>,
    bells: Vec<ModelBell>,
    sources: Vec<std::sync::Arc<Source>>,
    available: Arc<Vec<AtomicU32>>,
    serviced: Vec<u32>,
    /// Keys in the order in which they were taken.
    order: Vec<u64>,
}

impl Model {
    /// One source a priority given, source 0 first.
    fn new(geometry: Geometry, priorities: &[u32]) -> Self {
        let area = ModelArea::new(&geometry, SIZE);
        let bells: Vec<_> = (0..geometry.priorities).map(|_| ModelBell(Arc::new(AtomicU32::new(0)))).collect();
        let producer = Producer::new(area.clone(), geometry, STATS, bells.clone()).unwrap();
        let mut consumer = Consumer::new(area, geometry).unwrap();
        let open = |(source, priority): (usize, &u32)| {
            consumer.open(source as u32, 7, source as u64).unwrap();
            producer.open(source as u32, 7, *priority).unwrap()
        };
        let sources: Vec<_> = priorities.iter().enumerate().map(open).collect();
        let available = Arc::new(sources.iter().map(|_| AtomicU32::new(0)).collect());
        let serviced = vec![0; sources.len()];
        let producer = std::sync::Arc::new(producer);
        Self { producer, consumer, bells, sources, available, serviced, order: Vec::new() }
    }

    /// A thread that makes something available to each of these sources in turn, and signals it.
    fn spawn(&self, signals: &'static [usize]) -> thread::JoinHandle<()> {
        let (producer, sources, available) = (self.producer.clone(), self.sources.clone(), self.available.clone());
        thread::spawn(move || {
            for &source in signals {
                // Relaxed: whatever order the ring needs is the ring's to make.
                available[source].fetch_add(1, Ordering::Relaxed);
                producer.signal(&sources[source]);
            }
        })
    }

    fn service(&mut self, keys: &[u64]) {
        for &key in keys {
            let source = key as usize;
            assert!(self.producer.outstanding(&self.sources[source]) <= 1, "one event of a source at most");
            self.serviced[source] = self.available[source].load(Ordering::Relaxed);
            self.order.push(key);
        }
    }

    /// Has any doorbell rung? Asks all of them, as a wait would.
    fn heard(&self) -> bool {
        self.bells.iter().filter(|bell| bell.heard()).count() > 0
    }

    /// Drain and service until there is nothing left, and sleep until no doorbell has rung yet.
    fn run(&mut self) {
        loop {
            let mut keys = Vec::new();
            if self.consumer.drain(8, &mut keys) {
                self.service(&keys);
            } else if self.consumer.sleep() && !self.heard() {
                return;
            } else {
                self.consumer.wake();
            }
        }
    }

    /// All producers are done, and the consumer sleeps: only doorbells can wake it.
    fn finish(&mut self) {
        while self.heard() {
            self.consumer.wake();
            self.run();
        }
        let available: Vec<_> = self.available.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        assert_eq!(self.serviced, available, "a wakeup was lost");
        assert_eq!(self.consumer.fault(), None);
    }
}

/// How often a thread may be interrupted against its will in one run; where each may happen is explored in full.
const PREEMPTIONS: usize = 3;

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(model);
}

/// Two producers of one source: they compete for `sent` and for `rung`.
fn same_source() {
    let mut model = Model::new(GEOMETRY, &[0]);
    let producers = [model.spawn(&[0]), model.spawn(&[0])];
    model.run();
    for producer in producers {
        producer.join().unwrap();
    }
    model.finish();
}

/// Two producers of sources of their own, in one ring: they compete for slots and for `rung`.
fn two_sources() {
    let mut model = Model::new(GEOMETRY, &[0, 0]);
    let producers = [model.spawn(&[0]), model.spawn(&[1])];
    model.run();
    for producer in producers {
        producer.join().unwrap();
    }
    model.finish();
}

/// One producer that signals again and again while its events are being taken.
fn again() {
    let mut model = Model::new(GEOMETRY, &[0]);
    let producer = model.spawn(&[0, 0, 0]);
    model.run();
    producer.join().unwrap();
    model.finish();
}

#[test]
fn two_producers_of_one_source_lose_nothing() {
    explore(same_source);
}

#[test]
fn two_producers_of_two_sources_lose_nothing() {
    explore(two_sources);
}

#[test]
fn a_producer_that_signals_again_loses_nothing() {
    explore(again);
}

#[test]
fn events_of_a_priority_come_out_in_order() {
    explore(|| {
        let geometry = Geometry { max_sources: 4, ..GEOMETRY };
        let mut model = Model::new(geometry, &[0, 0, 0]);
        // Source 1 is signalled behind source 0 by one thread; the other one competes for slots.
        let producers = [model.spawn(&[0, 1]), model.spawn(&[2])];
        model.run();
        for producer in producers {
            producer.join().unwrap();
        }
        model.finish();
        let first = |key| model.order.iter().position(|other| *other == key).unwrap();
        assert!(first(0) < first(1), "{:?}", model.order);
    });
}

#[test]
fn priorities_have_doorbells_of_their_own() {
    explore(|| {
        let geometry = Geometry { priorities: 2, ..GEOMETRY };
        let mut model = Model::new(geometry, &[1, 0]);
        let producers = [model.spawn(&[0]), model.spawn(&[1])];
        model.run();
        for producer in producers {
            producer.join().unwrap();
        }
        model.finish();
    });
}

#[test]
fn a_late_signal_of_an_old_generation_costs_the_new_one_nothing() {
    explore(|| {
        let mut model = Model::new(GEOMETRY, &[0]);
        let old = model.sources[0].clone();
        let producer = model.producer.clone();
        let late = thread::spawn(move || producer.signal(&old));
        model.consumer.open(0, 8, 0).unwrap();
        model.sources[0] = model.producer.open(0, 8, 0).unwrap();
        let new = model.spawn(&[0]);
        model.run();
        late.join().unwrap();
        new.join().unwrap();
        model.finish();
    });
}

fn explore_without(site: Site, model: fn()) {
    leave_out(Some(site));
    explore(model);
}

#[test]
#[should_panic(expected = "a wakeup was lost")]
fn without_the_fence_behind_publishing_a_wakeup_is_lost() {
    explore_without(Site::Published, again);
}

#[test]
#[should_panic(expected = "a wakeup was lost")]
fn without_the_fence_behind_the_slot_a_wakeup_is_lost() {
    explore_without(Site::Sent, same_source);
}

#[test]
#[should_panic(expected = "a wakeup was lost")]
fn without_the_fence_behind_taken_a_wakeup_is_lost() {
    explore_without(Site::Taken, again);
}

#[test]
#[should_panic(expected = "a wakeup was lost")]
fn without_the_fence_behind_sleep_a_wakeup_is_lost() {
    explore_without(Site::Asleep, same_source);
}
