//! Workers, and the engines that they run, driven through real rings.

mod common;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use vbus_engine::blk::Blk;
use vbus_engine::loopback::Loopback;
use vbus_engine::net::{Filter, Rules};
use vbus_engine::outbox::Outbox;
use vbus_engine::queue::Queue;
use vbus_engine::worker::{Engine, Polling, Task, Turn, Worker};
use vbus_ring::doorbell::Doorbell;

use common::*;

fn open_rules() -> Rules {
    Rules { link: true, in_use: true, merge: true, ..Rules::default() }
}

#[test]
fn frames_come_back_whole_and_in_order_however_a_worker_waits() {
    for polling in POLLING {
        for packed in [false, true] {
            let mut arena = Arena::new();
            let (rx, tx) = (Arc::new(Queue::default()), Arc::new(Queue::default()));
            let engine = Arc::new(Loopback::new(rx.clone(), tx.clone(), Arc::new(Silent)));
            engine.set_rules(open_rules());
            let (mut receive, _) = arena.ring(64, packed, &rx);
            let (mut transmit, _) = arena.ring(64, packed, &tx);
            let worker = Worker::start("test", polling, &[]).unwrap();
            let task = worker.add(engine.clone(), 0);
            let (kick_rx, kick_tx) = (Arc::new(Doorbell::create().unwrap()), Arc::new(Doorbell::create().unwrap()));
            task.listen(&kick_rx).unwrap();
            task.listen(&kick_tx).unwrap();

            let mut numbers = Numbers(7);
            let (mut buffers, mut received) = (std::collections::HashMap::new(), Vec::<u8>::new());
            let (mut spare_rx, mut spare_tx) = (Vec::new(), Vec::new());
            spare_rx.extend((0..48).map(|_| arena.take(1024)));
            spare_tx.extend((0..48).map(|_| arena.take(4096)));
            let mut sent = std::collections::HashMap::new();
            let (mut expected, mut left) = (Vec::new(), 3000);
            let deadline = Instant::now() + LIMIT;
            while left > 0 || !sent.is_empty() || received.len() < expected.len() {
                assert_eq!(engine.outbox.faults(), []);
                assert!(Instant::now() < deadline, "{polling:?}, packed {packed}: {left} left");
                while let Some(address) = spare_rx.pop() {
                    let Some(token) = receive.add(&[], &[(address, 1024)]).unwrap() else {
                        spare_rx.push(address);
                        break;
                    };
                    buffers.insert(token, address);
                }
                if receive.publish() {
                    assert!(kick_rx.ring());
                }
                while left > 0 && numbers.below(8) > 0 {
                    let Some(address) = spare_tx.pop() else { break };
                    let size = 14 + numbers.below(3000) as usize;
                    let fill = numbers.below(256) as u8;
                    let frame: Vec<u8> = (0..size).map(|at| fill.wrapping_add(at as u8)).collect();
                    arena.put(address, &[&[0u8; 12][..], &frame].concat());
                    let cut = 1 + numbers.below(size as u64 + 11);
                    let parts = [(address, cut), (address + cut, size as u64 + 12 - cut)];
                    let Some(token) = transmit.add(&parts, &[]).unwrap() else {
                        spare_tx.push(address);
                        break;
                    };
                    sent.insert(token, address);
                    expected.extend_from_slice(&frame);
                    left -= 1;
                }
                if transmit.publish() {
                    assert!(kick_tx.ring());
                }
                for (token, _) in reap(&mut transmit) {
                    spare_tx.push(sent.remove(&token).unwrap());
                }
                let mut parts = 0u16;
                for (token, written) in reap(&mut receive) {
                    let address = buffers.remove(&token).unwrap();
                    let bytes = arena.get(address, written as usize);
                    if parts == 0 {
                        assert_eq!(bytes[..10], [0; 10]);
                        parts = u16::from_le_bytes([bytes[10], bytes[11]]);
                        received.extend_from_slice(&bytes[12..]);
                    } else {
                        received.extend_from_slice(&bytes);
                    }
                    parts -= 1;
                    spare_rx.push(address);
                }
                assert_eq!(parts, 0, "all buffers of a frame are shown at once");
            }
            assert!(received == expected, "{polling:?}, packed {packed}");
            let counted: Vec<u64> =
                [&engine.counters.tx_packets, &engine.counters.rx_packets, &engine.counters.rx_dropped]
                    .map(|counter| counter.load(Ordering::Relaxed))
                    .to_vec();
            assert_eq!(counted, [3000, 3000, 0]);
            task.remove();
            assert_eq!(worker.tasks(), 0);
        }
    }
}

/// An engine that notes its turns.
struct Noted {
    name: &'static str,
    turns: Arc<Mutex<Vec<&'static str>>>,
    left: AtomicU64,
    panics: bool,
    failed: AtomicU64,
    ended: AtomicU64,
    outbox: Outbox,
}

impl Noted {
    fn new(name: &'static str, left: u64, panics: bool, turns: &Arc<Mutex<Vec<&'static str>>>) -> Arc<Self> {
        let outbox = Outbox::new(Arc::new(Silent));
        let [failed, ended] = [0, 0].map(AtomicU64::new);
        Arc::new(Self { name, turns: turns.clone(), left: AtomicU64::new(left), panics, failed, ended, outbox })
    }
}

impl Engine for Noted {
    fn turn(&self, _ask: bool) -> Turn {
        assert!(!self.panics, "a defect");
        if self.left.load(Ordering::Relaxed) == 0 {
            return Turn::default();
        }
        let left = self.left.fetch_sub(1, Ordering::AcqRel) - 1;
        self.turns.lock().unwrap().push(self.name);
        Turn { worked: true, more: left > 0, watch: false }
    }

    fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn failed(&self, reason: &str) {
        assert_eq!(reason, "a defect");
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    fn end(&self) -> bool {
        self.ended.fetch_add(1, Ordering::Relaxed);
        true
    }
}

/// Holds the worker while the others are marked, so that they are all ready at once.
struct Gate(Mutex<()>, Outbox);

impl Engine for Gate {
    fn turn(&self, _ask: bool) -> Turn {
        drop(self.0.lock());
        Turn::default()
    }

    fn outbox(&self) -> &Outbox {
        &self.1
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn failed(&self, reason: &str) {
        panic!("{reason}");
    }
}

#[test]
fn what_is_urgent_goes_first_and_equals_take_turns() {
    for polling in POLLING {
        let turns = Arc::default();
        let worker = Worker::start("test", polling, &[]).unwrap();
        let gate = Arc::new(Gate(Mutex::new(()), Outbox::new(Arc::new(Silent))));
        let held = gate.0.lock().unwrap();
        worker.add(gate.clone(), 0);
        let engines = [Noted::new("a", 40, false, &turns), Noted::new("b", 40, false, &turns)];
        let urgent = Noted::new("urgent", 20, false, &turns);
        for engine in &engines {
            worker.add(engine.clone(), 4);
        }
        worker.add(urgent.clone(), 1);
        drop(held);
        wait("all turns", || turns.lock().unwrap().len() == 100);
        let turns = turns.lock().unwrap();
        assert!(turns[..20].iter().all(|name| *name == "urgent"), "{polling:?}: {turns:?}");
        // None of the two gets further ahead than a turn.
        let ahead = turns[20..].iter().scan(0i32, |ahead, name| {
            *ahead += if *name == "a" { 1 } else { -1 };
            Some(ahead.abs())
        });
        assert!(ahead.max().unwrap() <= 1, "{polling:?}: {turns:?}");
    }
}

#[test]
fn an_engine_that_panics_ends_alone() {
    let turns = Arc::default();
    let worker = Worker::start("test", Polling::Notified, &[]).unwrap();
    let (bad, good) = (Noted::new("bad", 1, true, &turns), Noted::new("good", 3, false, &turns));
    let task = worker.add(bad.clone(), 0);
    wait("its end", || bad.failed.load(Ordering::Relaxed) == 1);
    task.mark();
    worker.add(good.clone(), 0);
    wait("the other's turns", || turns.lock().unwrap().len() == 3);
    task.remove();
}

#[test]
fn an_engine_that_panics_has_no_turn_more_and_is_ended() {
    let turns = Arc::default();
    let worker = Worker::start("test", Polling::Always, &[]).unwrap();
    let (bad, good) = (Noted::new("bad", 1, true, &turns), Noted::new("good", 0, false, &turns));
    let task = worker.add(bad.clone(), 0);
    worker.add(good.clone(), 0);
    wait("its end", || bad.ended.load(Ordering::Relaxed) == 1);
    assert_eq!(worker.tasks(), 1);
    // The worker goes round and round.
    good.left.store(100, Ordering::Release);
    wait("the other's turns", || good.left.load(Ordering::Acquire) == 0);
    assert_eq!(bad.failed.load(Ordering::Relaxed), 1);
    task.remove();
    assert_eq!(bad.ended.load(Ordering::Relaxed), 1);
}

/// Has work without end, and does something in each turn.
struct Endless<F> {
    each: F,
    outbox: Outbox,
}

impl<F: Fn() + Send + Sync> Endless<F> {
    fn new(each: F) -> Arc<Self> {
        Arc::new(Self { each, outbox: Outbox::new(Arc::new(Silent)) })
    }
}

impl<F: Fn() + Send + Sync> Engine for Endless<F> {
    fn turn(&self, _ask: bool) -> Turn {
        (self.each)();
        Turn { worked: true, more: true, watch: false }
    }

    fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    fn failed(&self, reason: &str) {
        panic!("{reason}");
    }
}

#[test]
fn whoever_is_marked_without_end_starves_nobody_that_is_polled() {
    for polling in POLLING {
        let worker = Worker::start("test", polling, &[]).unwrap();
        let (own, marks) = (Arc::new(OnceLock::<Arc<Task>>::new()), AtomicU64::new(0));
        let mine = own.clone();
        let flood = Endless::new(move || {
            marks.fetch_add(1, Ordering::Relaxed);
            if let Some(task) = mine.get() {
                task.mark();
            }
        });
        let turns = Arc::default();
        let quiet = Noted::new("quiet", 0, false, &turns);
        let task = worker.add(quiet.clone(), 3);
        own.set(worker.add(flood.clone(), 3)).ok().unwrap();
        for count in 1..100 {
            quiet.left.store(1, Ordering::Release);
            if polling != Polling::Always {
                task.mark();
            }
            wait("a turn", || turns.lock().unwrap().len() == count);
        }
        own.get().unwrap().remove();
    }
}

#[test]
fn a_doorbell_of_what_is_urgent_is_heard_after_each_turn() {
    let worker = Worker::start("test", Polling::Notified, &[]).unwrap();
    let turns: Arc<Mutex<Vec<&'static str>>> = Arc::default();
    let urgent = Noted::new("urgent", 0, false, &turns);
    let bell = Arc::new(Doorbell::create().unwrap());
    worker.add(urgent.clone(), 0).listen(&bell).unwrap();
    let (noted, counted) = (turns.clone(), AtomicU64::new(0));
    let endless = Endless::new(move || {
        // Long, as turns go.
        std::thread::sleep(Duration::from_millis(1));
        let rings = counted.fetch_add(1, Ordering::Relaxed) % 3 == 2;
        noted.lock().unwrap().push(if rings { "rings" } else { "other" });
        if rings {
            urgent.left.store(1, Ordering::Release);
            bell.ring();
        }
    });
    worker.add(endless.clone(), 4);
    wait("many turns", || turns.lock().unwrap().len() > 60);
    worker.close();
    let turns = turns.lock().unwrap();
    for pair in turns.windows(2) {
        assert_eq!(pair[0] == "rings", pair[1] == "urgent", "{turns:?}");
    }
}

#[test]
fn a_priority_is_that_of_the_next_turns_however_a_worker_waits() {
    for polling in POLLING {
        let worker = Worker::start("test", polling, &[]).unwrap();
        let turns = Arc::default();
        let engines = [Noted::new("a", u64::MAX, false, &turns), Noted::new("b", u64::MAX, false, &turns)];
        let tasks = engines.each_ref().map(|engine| worker.add(engine.clone(), 4));
        for (index, name) in ["a", "b", "a"].into_iter().enumerate() {
            tasks[index % 2].set_priority(3 - index as u32);
            wait("turns of one alone", || {
                let turns = std::mem::take(&mut *turns.lock().unwrap());
                turns.len() > 10 && turns.iter().all(|other| *other == name)
            });
        }
        worker.close();
    }
}

#[test]
fn a_marked_task_is_never_forgotten() {
    for polling in POLLING {
        let turns = Arc::default();
        let worker = Worker::start("test", polling, &[]).unwrap();
        let engine = Noted::new("x", 0, false, &turns);
        let task: Arc<Task> = worker.add(engine.clone(), 0);
        for count in 1..3000 {
            engine.left.store(1, Ordering::Release);
            task.mark();
            wait("a turn", || turns.lock().unwrap().len() == count);
        }
        worker.close();
        // Of a worker that has ended.
        task.mark();
        task.remove();
    }
}

#[test]
fn a_filter_lets_through_what_it_is_told() {
    let frame = |to: [u8; 6], tag: Option<u16>| {
        let mut frame = [0; 16];
        frame[..6].copy_from_slice(&to);
        if let Some(tag) = tag {
            frame[12..14].copy_from_slice(&[0x81, 0]);
            frame[14..].copy_from_slice(&(0xe000 | tag).to_be_bytes());
        }
        frame
    };
    let (mine, other, group) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], [3, 0, 0, 0, 0, 1]);
    let filter = Filter { told: true, mac: mine, ..Filter::default() };
    assert!(!filter.is_open());
    let passes = |filter: &Filter, to| filter.passes(&frame(to, None));
    assert!(passes(&filter, mine) && passes(&filter, [0xff; 6]));
    assert!(!passes(&filter, other) && !passes(&filter, group));
    let filter = Filter { all_unicast: true, multicast: [group].into(), no_broadcast: true, ..filter };
    assert!(passes(&filter, other) && passes(&filter, group) && !passes(&filter, [0xff; 6]));
    let filter = Filter { no_unicast: true, no_multicast: true, ..filter };
    assert!(!passes(&filter, mine) && !passes(&filter, group));
    let filter = Filter { vlans: Some([5].into()), ..Filter::default() };
    assert!(!filter.is_open());
    assert!(filter.passes(&frame(other, None)) && filter.passes(&frame(other, Some(5))));
    assert!(!filter.passes(&frame(other, Some(6))));
}

#[test]
fn a_disk_answers_what_a_buffer_would_with_many_under_way() {
    const SECTORS: u64 = 512;
    for packed in [false, true] {
        let file = memfd(512 * SECTORS as usize);
        // SAFETY: a duplicate of an open descriptor, owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0)) };
        let mut arena = Arena::new();
        let queue = Arc::new(Queue::default());
        let engine = match Blk::new(queue.clone(), fd, Arc::new(Silent)) {
            Ok(engine) => Arc::new(engine),
            Err(error) => return eprintln!("skipped: io_uring is not permitted here: {error}"),
        };
        engine.settings.capacity.store(SECTORS, Ordering::Release);
        engine.settings.flush.store(true, Ordering::Release);
        let (mut ring, _) = arena.ring(256, packed, &queue);
        let worker = Worker::start("test", Polling::Notified, &[]).unwrap();
        let task = worker.add(engine.clone(), 0);
        let slots: Vec<u64> = (0..64).map(|_| arena.take(16 + 4096 + 1)).collect();
        let mut numbers = Numbers(3);
        let mut oracle = vec![0u8; 512 * SECTORS as usize];
        for _ in 0..200 {
            // Each in a part of the disk of its own, as those that are under way together have no order.
            let mut asked = Vec::new();
            for (place, &address) in slots.iter().enumerate() {
                let (kind, sector) = (numbers.below(3) as u32, place as u64 * 8);
                let size = 512 * (1 + numbers.below(8)) as usize;
                let fill = numbers.below(256) as u8;
                let kind = if kind == 2 { 4 } else { kind };
                let head: Vec<u8> = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()[..]].concat();
                arena.put(address, &head);
                arena.put(address + 16, &vec![fill; 4097]);
                let (data, status) = ((address + 16, size as u64), (address + 4112, 1));
                let token = match kind {
                    0 => ring.add(&[(address, 16)], &[data, status]),
                    1 => ring.add(&[(address, 16), data], &[status]),
                    _ => ring.add(&[(address, 16)], &[status]),
                };
                let Some(token) = token.unwrap() else { break };
                if kind == 1 {
                    let at = 512 * sector as usize;
                    oracle[at..at + size].fill(fill);
                }
                asked.push((token, kind, sector, size, address));
            }
            let _ = ring.publish();
            task.mark();
            let mut finished = Vec::new();
            wait("answers", || {
                finished.extend(reap(&mut ring));
                finished.len() == asked.len()
            });
            for (token, kind, sector, size, address) in asked {
                let (_, written) = finished.iter().find(|(other, _)| *other == token).unwrap();
                assert_eq!(*written as usize, if kind == 0 { size + 1 } else { 1 });
                assert_eq!(arena.get(address + 4112, 1), [0]);
                if kind == 0 {
                    let at = 512 * sector as usize;
                    assert_eq!(arena.get(address + 16, size), oracle[at..at + size]);
                }
            }
        }
        assert!(engine.outbox.requests(1).is_empty());
        // Whoever stops it knows that nothing is under way.
        for &address in &slots[..40] {
            let _ = ring.add(&[(address, 16)], &[(address + 16, 4096), (address + 4112, 1)]).unwrap();
        }
        let _ = ring.publish();
        task.mark();
        queue.replace(None);
        assert!(engine.settle(LIMIT));
        task.remove();
    }
}

/// A disk whose reads are under way until somebody writes to its other end; None where io_uring is not permitted.
fn slow_disk(queue: &Arc<Queue>) -> Option<(Arc<Blk>, File)> {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both are new, and owned by nobody else.
    let (disk, other) = unsafe { (OwnedFd::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
    match Blk::new(queue.clone(), disk, Arc::new(Silent)) {
        Ok(engine) => {
            engine.settings.capacity.store(1 << 20, Ordering::Release);
            Some((Arc::new(engine), other))
        }
        Err(error) => {
            eprintln!("skipped: io_uring is not permitted here: {error}");
            None
        }
    }
}

#[test]
fn what_is_wrong_with_a_run_that_is_over_is_nothing_to_the_next() {
    for stops in [false, true] {
        let queue = Arc::new(Queue::default());
        let Some((engine, mut other)) = slow_disk(&queue) else { return };
        let mut arena = Arena::new();
        let (mut ring, _) = arena.ring(8, false, &queue);
        let address = arena.take(4096);
        arena.put(address, &[0; 16]);
        let _ = ring.add(&[(address, 16)], &[(address + 16, 512), (address + 528, 1)]).unwrap();
        let _ = ring.add(&[(address, 4)], &[(address + 529, 1)]).unwrap();
        let _ = ring.publish();
        engine.begin();
        let turn = engine.turn(true);
        assert!(turn.watch && engine.outbox.faults().is_empty(), "a read comes before what is wrong");
        let run = queue.run();
        if stops {
            queue.replace(None);
            assert!(!engine.settle(Duration::ZERO), "the kernel may still write there");
        }
        other.write_all(&[7; 512]).unwrap();
        let mut faults = Vec::new();
        wait("its end", || {
            engine.turn(true);
            faults.extend(engine.outbox.faults());
            !faults.is_empty() && engine.settle(Duration::ZERO)
        });
        assert_eq!(faults.iter().map(|(of, fault)| (*of, fault.name)).collect::<Vec<_>>(), [(run, "blk-header-short")]);
        assert_eq!(queue.run() == run, !stops);
        assert_eq!(arena.get(address + 16, 512), [7; 512]);
        engine.end();
    }
}

#[test]
fn what_was_refused_keeps_no_memory() {
    let queue = Arc::new(Queue::default());
    let Some((engine, _other)) = slow_disk(&queue) else { return };
    engine.begin();
    for _ in 0..3 {
        let mut arena = Arena::new();
        let (mut ring, _) = arena.ring(8, false, &queue);
        let _ = ring.add(&[(1, 16)], &[(2, 1)]).unwrap();
        let _ = ring.publish();
        engine.turn(true);
        let names: Vec<_> = engine.outbox.faults().into_iter().map(|(_, fault)| fault.name).collect();
        assert_eq!(names, ["address-outside-memory"]);
        queue.replace(None);
        let mapping = Arc::downgrade(&arena.mapping);
        drop((arena, ring));
        assert!(mapping.upgrade().is_none());
    }
}

#[test]
fn requests_of_many_pieces_share_a_worker() {
    const CHAINS: u64 = 12;
    let (rx, tx) = (Arc::new(Queue::default()), Arc::new(Queue::default()));
    let engine = Loopback::new(rx.clone(), tx.clone(), Arc::new(Silent));
    engine.set_rules(open_rules());
    let mut arena = Arena::new();
    let (mut transmit, _) = arena.ring(32768, false, &tx);
    let address = arena.take(1000);
    arena.put(address, &[0; 1000]);
    let pieces: Vec<_> = (0..1000).map(|at| (address + at, 1)).collect();
    for _ in 0..CHAINS {
        let _ = transmit.add(&pieces, &[]).unwrap().expect("room");
    }
    let _ = transmit.publish();
    let mut seen = Vec::new();
    while seen.last() != Some(&CHAINS) {
        assert!(engine.turn(true).worked, "there are more");
        seen.push(engine.counters.tx_packets.load(Ordering::Relaxed));
    }
    assert_eq!(seen, [5, 10, 12], "of 1000 pieces each");
    assert_eq!(reap(&mut transmit).len() as u64, CHAINS);
}

#[test]
fn requests_of_many_bytes_share_a_worker() {
    const SIZE: u64 = 300 << 10;
    let queue = Arc::new(Queue::default());
    let Ok(engine) = Blk::new(queue.clone(), memfd(SIZE as usize).into(), Arc::new(Silent)) else {
        return eprintln!("skipped: io_uring is not permitted here");
    };
    engine.settings.capacity.store(SIZE / 512, Ordering::Release);
    engine.begin();
    let mut arena = Arena::new();
    let (mut ring, _) = arena.ring(64, false, &queue);
    let address = arena.take(SIZE as usize + 17);
    arena.put(address, &[0; 16]);
    for _ in 0..10 {
        let data = [(address + 16, SIZE), (address + 16 + SIZE, 1)];
        let _ = ring.add(&[(address, 16)], &data).unwrap().expect("room");
    }
    let _ = ring.publish();
    let mut most = 0;
    let mut answered = 0;
    while answered < 10 {
        let before = queue.lock().as_ref().unwrap().ring.next();
        engine.turn(true);
        most = most.max(queue.lock().as_ref().unwrap().ring.next() - before);
        answered += reap(&mut ring).len();
    }
    assert_eq!(most, 4, "a mebibyte, and what goes beyond it");
    engine.end();
}
