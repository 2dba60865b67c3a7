//! The scheduler against a plain list in random order, and with real threads, descriptors and event rings.
#![cfg(not(loom))]

mod common;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use common::shared;
use proptest::prelude::*;
use vbus_ring::doorbell::Doorbell;
use vbus_ring::event::{Consumer, Geometry, Producer, Source};
use vbus_ring::mem::Window;
use vbus_ring::schedule::{Receiver, ScheduleError, Scheduler};

const NOW: Option<Duration> = Some(Duration::ZERO);

const GEOMETRY: Geometry = Geometry { slots: 0, taken: 2048, sleep: 2560, max_sources: 16, priorities: 2 };
const STATS: usize = 3072;

struct Events {
    producer: Producer<Window, Arc<Doorbell>>,
    receiver: Arc<Receiver>,
    bells: Vec<Arc<Doorbell>>,
}

fn events() -> Events {
    let area = shared(4096);
    let bells: Vec<_> = (0..2).map(|_| Arc::new(Doorbell::create().unwrap())).collect();
    let producer = Producer::new(area.clone(), GEOMETRY, STATS, bells.clone()).unwrap();
    let receiver = Arc::new(Receiver::new(Consumer::new(area, GEOMETRY).unwrap()));
    Events { producer, receiver, bells }
}

impl Events {
    fn open(&self, source: u32, priority: u32, key: u64) -> Arc<Source> {
        self.receiver.consumer().open(source, 1, key).unwrap();
        self.producer.open(source, 1, priority).unwrap()
    }
}

#[test]
fn mistakes_are_refused() {
    let scheduler = Scheduler::new().unwrap();
    let actor = scheduler.actor();
    let key = scheduler.key(actor, 7).unwrap();
    assert!(matches!(scheduler.key(actor, 8), Err(ScheduleError::Priority(8))));
    assert!(matches!(scheduler.key(actor + 100, 0), Err(ScheduleError::Actor(_))));
    assert!(matches!(scheduler.done(actor, key, false), Err(ScheduleError::NoTurn(..))));
    assert!(matches!(scheduler.add_fd(0, key + 100), Err(ScheduleError::Key(_))));
    assert!(matches!(scheduler.add_fd(-1, key), Err(ScheduleError::Os(_))));
    let events = events();
    assert!(matches!(scheduler.add_events(&events.receiver, &[], key + 100), Err(ScheduleError::Key(_))));
    scheduler.add_events(&events.receiver, &events.bells, key).unwrap();
    let other = Scheduler::new().unwrap();
    let elsewhere = other.key(other.actor(), 0).unwrap();
    assert!(matches!(other.add_events(&events.receiver, &[], elsewhere), Err(ScheduleError::Attached)));
    drop(scheduler);
    other.add_events(&events.receiver, &events.bells, elsewhere).unwrap();
}

#[test]
fn ten_thousand_keys_come_in_the_order_of_their_marks() {
    let scheduler = Scheduler::new().unwrap();
    let keys: Vec<_> = (0..10_000).map(|_| scheduler.key(scheduler.actor(), 3).unwrap()).collect();
    for key in keys.iter().rev() {
        assert!(scheduler.mark(*key));
        assert!(!scheduler.mark(*key));
    }
    for key in keys.iter().rev() {
        let turn = scheduler.next(NOW).unwrap();
        assert_eq!(turn.1, *key);
        scheduler.done(turn.0, turn.1, false).unwrap();
    }
    assert_eq!(scheduler.next(NOW), None);
}

#[test]
fn descriptors_mark_once_a_turn() {
    let scheduler = Scheduler::new().unwrap();
    let actor = scheduler.actor();
    let key = scheduler.key(actor, 0).unwrap();
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let (second, mut far) = UnixStream::pair().unwrap();
    scheduler.add_fd(ours.as_raw_fd(), key).unwrap();
    scheduler.add_fd(second.as_raw_fd(), key).unwrap();
    assert_eq!(scheduler.next(NOW), None);
    theirs.write_all(b"a").unwrap();
    assert_eq!(scheduler.next(None), Some((actor, key)));
    assert_eq!(scheduler.next(NOW), None, "its turn runs");
    scheduler.done(actor, key, false).unwrap();
    assert_eq!(scheduler.next(None), Some((actor, key)), "still readable");
    ours.read_exact(&mut [0]).unwrap();
    far.write_all(b"b").unwrap();
    assert_eq!(scheduler.next(NOW), None);
    scheduler.done(actor, key, false).unwrap();
    assert_eq!(scheduler.next(NOW), Some((actor, key)), "the second one, which became readable during the turn");
    scheduler.remove_fd(second.as_raw_fd());
    scheduler.done(actor, key, false).unwrap();
    assert_eq!(scheduler.next(NOW), None);
    drop(theirs);
    assert_eq!(scheduler.next(None), Some((actor, key)), "hung up");
    let number = ours.as_raw_fd();
    drop(ours);
    scheduler.remove_fd(number);
    scheduler.remove_fd(number);
    scheduler.done(actor, key, false).unwrap();
    assert_eq!(scheduler.next(NOW), None);
}

#[test]
fn a_number_that_is_used_again_is_another_descriptor() {
    let scheduler = Scheduler::new().unwrap();
    let keys = [0; 2].map(|_| scheduler.key(scheduler.actor(), 0).unwrap());
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    scheduler.add_fd(ours.as_raw_fd(), keys[0]).unwrap();
    scheduler.add_fd(ours.as_raw_fd(), keys[1]).unwrap();
    theirs.write_all(b"a").unwrap();
    assert_eq!(scheduler.next(None).unwrap().1, keys[1]);
    assert_eq!(scheduler.next(NOW), None);
    scheduler.drop_key(keys[1]);
    scheduler.add_fd(ours.as_raw_fd(), keys[0]).unwrap();
    assert_eq!(scheduler.next(None).unwrap().1, keys[0]);
}

#[test]
fn events_mark_keys_and_doorbells_ring_only_for_sleepers() {
    let scheduler = Scheduler::new().unwrap();
    let actor = scheduler.actor();
    let (urgent, normal) = (scheduler.key(actor, 0).unwrap(), scheduler.key(actor, 5).unwrap());
    let events = events();
    scheduler.add_events(&events.receiver, &events.bells, urgent).unwrap();
    let (first, second) = (events.open(1, 1, normal), events.open(2, 0, urgent));
    events.producer.signal(&first);
    events.producer.signal(&second);
    events.producer.signal(&second);
    assert_eq!(events.producer.counters(), [3, 2, 0], "nobody sleeps");
    assert_eq!(scheduler.next(NOW), Some((actor, urgent)));
    scheduler.done(actor, urgent, false).unwrap();
    assert_eq!(scheduler.next(NOW), Some((actor, normal)));
    scheduler.done(actor, normal, false).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| scheduler.next(None));
        while events.receiver.consumer().sleep_seq() & 1 == 0 {
            std::thread::yield_now();
        }
        events.producer.signal(&first);
        assert_eq!(waiting.join().unwrap(), Some((actor, normal)));
    });
    assert_eq!(events.producer.counters()[2], 1);
    assert_eq!(events.receiver.consumer().sleep_seq() & 1, 0);
    scheduler.remove_events(&events.receiver);
    scheduler.done(actor, normal, false).unwrap();
    events.producer.signal(&first);
    assert_eq!(scheduler.next(NOW), None);
}

#[test]
fn a_receiver_that_is_added_while_a_thread_sleeps_is_heard() {
    let scheduler = Scheduler::new().unwrap();
    let key = scheduler.key(scheduler.actor(), 0).unwrap();
    let (before, after) = (events(), events());
    scheduler.add_events(&before.receiver, &before.bells, key).unwrap();
    let source = after.open(0, 0, key);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| scheduler.next(None));
        while before.receiver.consumer().sleep_seq() & 1 == 0 {
            std::thread::yield_now();
        }
        scheduler.add_events(&after.receiver, &after.bells, key).unwrap();
        while after.receiver.consumer().sleep_seq() & 1 == 0 {
            std::thread::yield_now();
        }
        after.producer.signal(&source);
        assert_eq!(waiting.join().unwrap().unwrap().1, key);
    });
}

/// Every key of an actor counts without a lock what only exclusion protects.
#[test]
fn turns_of_an_actor_never_overlap_and_no_mark_is_lost() {
    const ACTORS: usize = 3;
    const KEYS: usize = 3;
    const MARKS: u64 = 5_000;
    let scheduler = Scheduler::new().unwrap();
    let actors: Vec<_> = (0..ACTORS).map(|_| scheduler.actor()).collect();
    let keys: Vec<_> =
        (0..ACTORS * KEYS).map(|index| scheduler.key(actors[index % ACTORS], index as u32 % 8).unwrap()).collect();
    let busy: Vec<_> = actors.iter().map(|_| AtomicBool::new(false)).collect();
    let marked: Vec<_> = keys.iter().map(|_| AtomicU64::new(0)).collect();
    let seen: Vec<_> = keys.iter().map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    while let Some((actor, key)) = scheduler.next(None) {
                        let index = keys.iter().position(|other| *other == key).unwrap();
                        let owner = actors.iter().position(|other| *other == actor).unwrap();
                        assert_eq!(owner, index % ACTORS);
                        assert!(!busy[owner].swap(true, Ordering::SeqCst), "two turns of one actor");
                        let count = marked[index].load(Ordering::SeqCst);
                        std::thread::yield_now();
                        seen[index].store(count, Ordering::SeqCst);
                        busy[owner].store(false, Ordering::SeqCst);
                        scheduler.done(actor, key, false).unwrap();
                        let all = |counts: &[AtomicU64]| counts.iter().all(|c| c.load(Ordering::SeqCst) == 2 * MARKS);
                        if all(&seen) {
                            scheduler.close();
                        }
                    }
                })
            })
            .collect();
        for _ in 0..2 {
            scope.spawn(|| {
                for round in 0..MARKS {
                    for (key, count) in keys.iter().zip(&marked) {
                        count.fetch_add(1, Ordering::SeqCst);
                        scheduler.mark(*key);
                    }
                    if round % 16 == 0 {
                        std::thread::yield_now();
                    }
                }
            });
        }
        for worker in workers {
            worker.join().unwrap();
        }
    });
    assert!(scheduler.closed());
}

/// Producers on threads, several workers, real doorbells. A lost wakeup hangs this test.
#[test]
fn workers_service_everything_that_event_rings_bring() {
    const SOURCES: u32 = 8;
    const ROUNDS: u64 = 20_000;
    let scheduler = Scheduler::new().unwrap();
    let actors: Vec<_> = (0..SOURCES).map(|_| scheduler.actor()).collect();
    let keys: Vec<_> = actors.iter().map(|actor| scheduler.key(*actor, 0).unwrap()).collect();
    let connections = [events(), events()];
    let open = |source: u32| {
        let index = source as usize;
        connections[index % 2].open(source, source / 4, keys[index])
    };
    let sources: Vec<_> = (0..SOURCES).map(open).collect();
    for events in &connections {
        scheduler.add_events(&events.receiver, &events.bells, keys[0]).unwrap();
    }
    let available: Vec<_> = keys.iter().map(|_| AtomicU64::new(0)).collect();
    let serviced: Vec<_> = keys.iter().map(|_| AtomicU64::new(0)).collect();
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let (connections, sources, available) = (&connections, &sources, &available);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let source = ((round * 5 + thread) % u64::from(SOURCES)) as usize;
                    available[source].fetch_add(1, Ordering::Relaxed);
                    connections[source % 2].producer.signal(&sources[source]);
                    if round % 8 == 0 {
                        std::thread::yield_now();
                    }
                }
            });
        }
        for _ in 0..3 {
            scope.spawn(|| {
                while let Some((actor, key)) = scheduler.next(None) {
                    let index = keys.iter().position(|other| *other == key).unwrap();
                    serviced[index].store(available[index].load(Ordering::Relaxed), Ordering::Relaxed);
                    scheduler.done(actor, key, false).unwrap();
                    if serviced.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>() == 2 * ROUNDS {
                        scheduler.close();
                    }
                }
            });
        }
    });
    for events in &connections {
        let [signalled, sent, rung] = events.producer.counters();
        assert!(rung <= sent && sent <= signalled);
        assert_eq!(events.receiver.consumer().fault(), None);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Mark(usize),
    Next,
    Done(usize, bool),
    DropKey(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..12).prop_map(Step::Mark),
        4 => Just(Step::Next),
        4 => (0usize..4, any::<bool>()).prop_map(|(turn, again)| Step::Done(turn, again)),
        1 => (0usize..12).prop_map(Step::DropKey),
    ]
}

/// A key as a plain list sees it.
#[derive(Clone, Default)]
struct Plain {
    actor: u64,
    key: u64,
    priority: u32,
    /// When it became ready.
    since: Option<u64>,
    marked: bool,
    gone: bool,
}

proptest! {
    #[test]
    fn turns_come_as_from_a_plain_list(steps in prop::collection::vec(step(), 0..300)) {
        let scheduler = Scheduler::new().unwrap();
        let actors = [0; 4].map(|_| scheduler.actor());
        let mut plain: Vec<_> = (0..12)
            .map(|index| {
                let (actor, priority) = (actors[index % 4], index as u32 / 5);
                Plain { actor, key: scheduler.key(actor, priority).unwrap(), priority, ..Plain::default() }
            })
            .collect();
        let mut turns: Vec<usize> = Vec::new();
        let mut clock = 0;
        for step in steps {
            clock += 1;
            match step {
                Step::Mark(index) => {
                    scheduler.mark(plain[index].key);
                    let entry = &mut plain[index];
                    if entry.gone {
                    } else if turns.contains(&index) {
                        entry.marked = true;
                    } else if entry.since.is_none() {
                        entry.since = Some(clock);
                    }
                }
                Step::Next => {
                    let busy: Vec<_> = turns.iter().map(|turn| plain[*turn].actor).collect();
                    let best = (0..plain.len())
                        .filter(|index| plain[*index].since.is_some() && !busy.contains(&plain[*index].actor))
                        .min_by_key(|index| (plain[*index].priority, plain[*index].since));
                    let expected = best.map(|index| (plain[index].actor, plain[index].key));
                    prop_assert_eq!(scheduler.next(NOW), expected);
                    if let Some(index) = best {
                        plain[index].since = None;
                        turns.push(index);
                    }
                }
                Step::Done(turn, again) => {
                    if turn < turns.len() {
                        let index = turns.remove(turn);
                        let entry = &mut plain[index];
                        scheduler.done(entry.actor, entry.key, again).unwrap();
                        if !entry.gone && (std::mem::take(&mut entry.marked) || again) {
                            entry.since = Some(clock);
                        }
                    }
                }
                Step::DropKey(index) => {
                    scheduler.drop_key(plain[index].key);
                    plain[index].gone = true;
                    plain[index].since = None;
                }
            }
        }
    }
}

#[test]
fn a_turn_hears_of_what_is_more_urgent() {
    let scheduler = Scheduler::new().unwrap();
    let (busy, other) = (scheduler.actor(), scheduler.actor());
    let (bulk, own) = (scheduler.key(busy, 7).unwrap(), scheduler.key(busy, 1).unwrap());
    let (equal, fast) = (scheduler.key(other, 7).unwrap(), scheduler.key(other, 0).unwrap());
    scheduler.mark(bulk);
    assert_eq!(scheduler.next(NOW), Some((busy, bulk)));
    assert!(!scheduler.urgent(busy, 7));
    scheduler.mark(bulk);
    scheduler.mark(equal);
    assert!(!scheduler.urgent(busy, 7), "its own key and its equals can wait");
    scheduler.mark(own);
    assert!(scheduler.urgent(busy, 7), "another key of the same actor");
    assert!(!scheduler.urgent(busy, 1));
    scheduler.mark(fast);
    assert!(scheduler.urgent(busy, 1), "a key of another actor");
    assert!(!scheduler.urgent(busy, 0), "nothing is more urgent");
    assert_eq!(scheduler.next(NOW), Some((other, fast)));
    scheduler.done(busy, bulk, true).unwrap();
    assert_eq!(scheduler.next(NOW), Some((busy, own)));
}

#[test]
fn a_turn_hears_of_events_and_descriptors() {
    let scheduler = Scheduler::new().unwrap();
    let (busy, other) = (scheduler.actor(), scheduler.actor());
    let bulk = scheduler.key(busy, 7).unwrap();
    let (event, socket) = (scheduler.key(other, 1).unwrap(), scheduler.key(scheduler.actor(), 0).unwrap());
    let events = events();
    scheduler.add_events(&events.receiver, &events.bells, bulk).unwrap();
    let source = events.open(3, 1, event);
    let (here, mut there) = UnixStream::pair().unwrap();
    scheduler.add_fd(here.as_raw_fd(), socket).unwrap();
    scheduler.mark(bulk);
    assert_eq!(scheduler.next(NOW), Some((busy, bulk)));
    assert!(!scheduler.urgent(busy, 7));
    events.producer.signal(&source);
    assert!(scheduler.urgent(busy, 7));
    assert!(!scheduler.urgent(busy, 1));
    there.write_all(b"x").unwrap();
    assert!(scheduler.urgent(busy, 1));
}
