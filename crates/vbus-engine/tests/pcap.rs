//! Files that frames are written to: by the engine, through real rings, and by others beside it.

mod common;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use vbus_engine::net::{Frame, Rules};
use vbus_engine::pcap::Pcap;
use vbus_engine::queue::Queue;
use vbus_engine::recording::{Recording, Records, RECORD};
use vbus_engine::worker::{Engine, Worker};
use vbus_ring::doorbell::Doorbell;

use common::*;

const HEADER: &[u8; 24] = b"a header, as models have";

fn duplicate(file: &File) -> OwnedFd {
    // SAFETY: a duplicate of an open descriptor, owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0)) }
}

fn recording() -> (File, Arc<Recording>) {
    let file = memfd(100);
    let recording = Recording::begin(duplicate(&file), HEADER).unwrap();
    (file, Arc::new(recording))
}

/// (seconds and nanoseconds, frame) of each record.
fn read(mut file: &File) -> Vec<([u32; 2], Vec<u8>)> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let mut rest = bytes.strip_prefix(HEADER).expect("a header");
    let mut records = Vec::new();
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[4 * at..4 * at + 4].try_into().unwrap());
        let size = word(2) as usize;
        assert_eq!(word(3) as usize, size);
        assert!(word(1) < 1_000_000_000);
        records.push(([word(0), word(1)], rest[RECORD..RECORD + size].to_vec()));
        rest = &rest[RECORD + size..];
    }
    records
}

fn frames(file: &File) -> Vec<Vec<u8>> {
    read(file).into_iter().map(|(_, frame)| frame).collect()
}

fn records(frames: &[Vec<u8>]) -> Records {
    let mut records = Records::default();
    frames.iter().for_each(|frame| records.push(Frame::Bytes(frame), frame.len() as u32));
    records
}

struct Pair {
    engine: Arc<Pcap>,
    rx: Arc<Queue>,
    tx: Arc<Queue>,
}

fn pair(recording: &Arc<Recording>) -> Pair {
    let (rx, tx) = (Arc::new(Queue::default()), Arc::new(Queue::default()));
    let engine = Arc::new(Pcap::new(rx.clone(), tx.clone(), recording.clone(), Arc::new(Silent)));
    engine.set_rules(Rules { link: true, in_use: true, ..Rules::default() });
    Pair { engine, rx, tx }
}

#[test]
fn what_is_sent_is_written_whole_and_in_order_however_a_worker_waits() {
    for polling in POLLING {
        for packed in [false, true] {
            let (file, recording) = recording();
            let Pair { engine, rx, tx } = pair(&recording);
            let mut arena = Arena::new();
            let (mut receive, _) = arena.ring(64, packed, &rx);
            let (mut transmit, _) = arena.ring(256, packed, &tx);
            let worker = Worker::start("test", polling, &[]).unwrap();
            let task = worker.add(engine.clone(), 0);
            let kick = Arc::new(Doorbell::create().unwrap());
            task.listen(&kick).unwrap();
            // What is to be received is nobody's to fill.
            let address = arena.take(2000);
            let _ = receive.add(&[], &[(address, 2000)]).unwrap();
            let _ = receive.publish();
            task.mark();

            let mut numbers = Numbers(11);
            let mut spare: Vec<u64> = (0..100).map(|_| arena.take(4096)).collect();
            let (mut sent, mut expected, mut short) = (std::collections::HashMap::new(), Vec::new(), 0u64);
            for step in 0..2000 {
                let size = 1 + numbers.below(3000);
                let frame: Vec<u8> = (0..size).map(|at| (step + at) as u8).collect();
                wait("a place", || {
                    spare.extend(reap(&mut transmit).into_iter().map(|(token, written)| {
                        assert_eq!(written, 0);
                        sent.remove(&token).unwrap()
                    }));
                    !spare.is_empty()
                });
                let address = spare.pop().unwrap();
                arena.put(address, &[&[0; 12][..], &frame].concat());
                let cut = 1 + numbers.below(size + 11);
                let parts = [(address, cut), (address + cut, size + 12 - cut)];
                sent.insert(transmit.add(&parts, &[]).unwrap().expect("room"), address);
                if transmit.publish() {
                    assert!(kick.ring());
                }
                if size < 14 {
                    short += 1;
                } else {
                    expected.push(frame);
                }
            }
            wait("all answers", || {
                for (token, _) in reap(&mut transmit) {
                    sent.remove(&token);
                }
                sent.is_empty()
            });
            task.remove();
            let found = read(&file);
            assert!(found.iter().map(|(_, frame)| frame).eq(&expected), "{polling:?}, packed {packed}");
            assert!(found.is_sorted_by_key(|(time, _)| *time) && found[0].0[0] > 0);
            let counters = &engine.counters;
            let bytes = expected.iter().map(|frame| frame.len() as u64).sum::<u64>();
            let counted =
                [&counters.tx_packets, &counters.tx_bytes, &counters.tx_dropped, &counters.too_short, &counters.queue];
            assert_eq!(
                counted.map(|counter| counter.load(Ordering::Relaxed)),
                [expected.len() as u64, bytes, 0, short, 0]
            );
            assert_eq!(tx.completed.load(Ordering::Relaxed), 2000);
            assert!(reap(&mut receive).is_empty());
            assert_eq!(rx.lock().as_ref().unwrap().ring.in_flight(), 0, "nothing was taken");
            assert!(engine.outbox.faults().is_empty() && engine.outbox.errors().is_empty());
        }
    }
}

#[test]
fn rules_decide_and_those_before_what_breaks_one_of_the_queue_are_written() {
    let (file, recording) = recording();
    let Pair { engine, tx, .. } = pair(&recording);
    let mut arena = Arena::new();
    let (mut transmit, _) = arena.ring(64, false, &tx);
    let address = arena.take(200_000);
    let mut send = |header: [u8; 12], size: u64| {
        arena.put(address, &header);
        let _ = transmit.add(&[(address, 12 + size)], &[]).unwrap().unwrap();
        let _ = transmit.publish();
        assert!(engine.turn(true).worked);
        reap(&mut transmit).len()
    };
    let wrong = |first: u8, second: u8, size: u8| [first, second, size, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(send([0; 12], 13), 1);
    assert_eq!(send([0; 12], 70_000), 1);
    assert_eq!(send(wrong(1, 0, 0), 60), 1);
    assert_eq!(send(wrong(0, 1, 0), 60), 1);
    assert_eq!(send(wrong(0, 0, 61), 60), 1);
    // num_buffers means nothing from a driver, nor do flags that nobody knows.
    assert_eq!(send([0xfe, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 7], 14), 1);
    engine.set_rules(Rules { link: false, in_use: true, ..Rules::default() });
    assert_eq!(send([0; 12], 60), 1);
    engine.set_rules(Rules { link: true, in_use: false, ..Rules::default() });
    assert_eq!(send([0; 12], 60), 1);
    let counted: Vec<_> = engine.counters().into_iter().filter(|(_, count)| *count > 0).collect();
    let expected = [
        ("tx_packets", 1),
        ("tx_bytes", 14),
        ("tx_dropped", 1),
        ("too_short", 1),
        ("too_long", 1),
        ("checksum", 1),
        ("segments", 1),
        ("header", 1),
        ("queue", 1),
    ];
    assert_eq!(counted, expected);
    assert_eq!(frames(&file).len(), 1);
    engine.set_rules(Rules { link: true, in_use: true, ..Rules::default() });
    arena.put(address, &[0; 12]);
    for size in [26, 40, 11, 50] {
        let _ = transmit.add(&[(address, size)], &[]).unwrap().unwrap();
    }
    let _ = transmit.publish();
    let run = tx.run();
    engine.turn(true);
    let faults = engine.outbox.faults();
    assert_eq!(
        faults.iter().map(|(of, fault)| (*of, fault.queue, fault.name)).collect::<Vec<_>>(),
        [(run, 1, "tx-header-short")]
    );
    assert!(tx.lock().is_none(), "it gives nothing any more");
    assert_eq!(reap(&mut transmit).len(), 2);
    assert_eq!(frames(&file).iter().map(Vec::len).collect::<Vec<_>>(), [14, 14, 28]);
}

#[test]
fn of_what_a_disk_cuts_short_whole_records_stay_and_every_request_is_answered() {
    const SIZE: u64 = 3000;
    let file = sealable();
    let recording = Arc::new(Recording::begin(duplicate(&file), HEADER).unwrap());
    let Pair { engine, tx, .. } = pair(&recording);
    // There is room for so much, and no more.
    file.set_len(64 << 10).unwrap();
    // SAFETY: no pointers are involved.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) }, 0);
    let mut arena = Arena::new();
    let (mut transmit, _) = arena.ring(64, false, &tx);
    for fill in 0..40 {
        let address = arena.take(SIZE as usize);
        arena.put(address, &[&[0; 12][..], &[fill; SIZE as usize - 12]].concat());
        let _ = transmit.add(&[(address, SIZE)], &[]).unwrap().unwrap();
    }
    let _ = transmit.publish();
    while engine.turn(true).more {}
    assert_eq!(reap(&mut transmit).len(), 40);
    let found = frames(&file);
    assert!((1..=21).contains(&found.len()), "{}", found.len());
    assert!(found.iter().enumerate().all(|(at, frame)| *frame == vec![at as u8; SIZE as usize - 12]));
    let kept = found.len() as u64;
    let counters = &engine.counters;
    let counted = [&counters.tx_packets, &counters.tx_bytes, &counters.tx_dropped];
    let counted = counted.map(|counter| counter.load(Ordering::Relaxed));
    assert_eq!(counted, [kept, kept * (SIZE - 12), 40 - kept]);
    assert_eq!(engine.outbox.errors(), [libc::EPERM]);
    assert!(engine.outbox.faults().is_empty());
    // What fails as a whole leaves what is there.
    let written = recording.append(&records(&[vec![1; 60]]));
    assert_eq!((written.records, written.error.unwrap().raw_os_error()), (0, Some(libc::EPERM)));
    assert_eq!(frames(&file), found);
}

/// A file whose growth can be forbidden.
fn sealable() -> File {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
    unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), flags)) }
}

#[test]
fn a_file_that_is_cut_off_begins_anew() {
    let (file, recording) = recording();
    let sent = [vec![1; 60], vec![2; 14], vec![3; 1500]];
    assert_eq!(recording.record(&mut records(&sent)).records, 3);
    assert_eq!(frames(&file), sent);
    for size in [0, 10, 24, 50, 24 + RECORD as u64 + 60] {
        file.set_len(size).unwrap();
        assert_eq!(recording.record(&mut records(&sent[..2])).records, 2);
        assert_eq!(frames(&file), sent[..2], "cut to {size}");
        assert_eq!(recording.record(&mut records(&sent[2..])).records, 1);
        assert_eq!(frames(&file), sent);
    }
    recording.close();
    let written = recording.record(&mut records(&sent));
    assert_eq!((written.records, written.error.unwrap().raw_os_error()), (0, Some(libc::EBADF)));
}

#[test]
fn pairs_have_one_file_and_nothing_of_a_run_that_is_over_is_given_back() {
    let (file, recording) = recording();
    let pairs = [pair(&recording), pair(&recording)];
    let mut arena = Arena::new();
    let mut rings: Vec<_> = pairs.iter().map(|pair| arena.ring(64, false, &pair.tx).0).collect();
    let address = arena.take(8192);
    arena.put(address, &[0; 4096]);
    let workers: Vec<_> =
        pairs.iter().map(|_| Worker::start("test", vbus_engine::worker::Polling::Always, &[]).unwrap()).collect();
    let tasks: Vec<_> = pairs.iter().zip(&workers).map(|(pair, worker)| worker.add(pair.engine.clone(), 0)).collect();
    let mut sent = [0u64; 2];
    for step in 0..3000 {
        for (ring, sent) in rings.iter_mut().zip(&mut sent) {
            reap(ring);
            if ring.add(&[(address, 12 + 100)], &[]).unwrap().is_some() {
                *sent += 1;
            }
            let _ = ring.publish();
        }
        if step % 1000 == 999 {
            for (pair, ring) in pairs.iter().zip(&mut rings) {
                // Stopped in the middle of it.
                pair.tx.replace(None);
                assert!(pair.engine.settle(LIMIT));
                *ring = arena.ring(64, false, &pair.tx).0;
            }
        }
    }
    for task in tasks {
        task.remove();
    }
    let found = read(&file);
    assert!(found.iter().all(|(_, frame)| frame.len() == 100));
    assert!(found.is_sorted_by_key(|(time, _)| *time), "whichever pair it was");
    let counted: Vec<u64> = pairs.iter().map(|pair| pair.engine.counters.tx_packets.load(Ordering::Relaxed)).collect();
    assert_eq!(counted.iter().sum::<u64>(), found.len() as u64);
    for (pair, sent) in pairs.iter().zip(sent) {
        assert!(pair.tx.completed.load(Ordering::Relaxed) <= sent);
        assert!(pair.engine.outbox.faults().is_empty());
        assert!(pair.engine.settle(Duration::ZERO));
        pair.engine.hand_over();
    }
}
