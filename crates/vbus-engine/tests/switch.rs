//! The switch: where stations are, what is finished for whom, and frames through real rings.

mod common;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Instant;

use common::{reap, wait, Arena, Numbers, Silent, LIMIT, POLLING};
use proptest::prelude::*;
use vbus_engine::net::{Fields, Rules};
use vbus_engine::offload::{finish, Cut, HEAD, SEGMENTS};
use vbus_engine::queue::Queue;
use vbus_engine::stations::{Addresses, Counted, Stations, Way, AGEING, BEGINNING, MOST, MOST_OF_PORT};
use vbus_engine::switch::{Pair, Port, Sent, Switch, SwitchPair};
use vbus_engine::worker::{Engine, Task, Worker};
use vbus_ring::doorbell::Doorbell;
use vbus_ring::ring::DriverRing;
use vbus_ring::signal::Notify;

const SECOND: u64 = 1_000_000_000;
const ALL: [u8; 6] = [0xff; 6];

// Stations.

fn mac(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_be_bytes();
    [0x52, 0x54, a, b, c, d]
}

fn addresses(to: [u8; 6], from: [u8; 6], tag: Option<u16>) -> Addresses {
    let mut bytes = [0; BEGINNING];
    bytes[..6].copy_from_slice(&to);
    bytes[6..12].copy_from_slice(&from);
    if let Some(tag) = tag {
        bytes[12..14].copy_from_slice(&[0x81, 0]);
        bytes[14..].copy_from_slice(&tag.to_be_bytes());
    }
    Addresses::of(&bytes)
}

fn stations(ports: usize) -> Stations {
    let mut stations = Stations::new(AGEING);
    for port in 0..ports {
        assert_eq!(stations.join(), port);
        stations.set_up(port, true);
        stations.limit_floods(port, 1_000_000);
    }
    stations
}

#[test]
fn a_station_is_known_for_as_long_as_it_says_something_now_and_then() {
    let mut table = stations(3);
    let (to, from) = (addresses(mac(1), mac(2), None), addresses(ALL, mac(1), None));
    assert_eq!(table.forward(1, to, 1, 0), Way::Flood);
    for now in [1, AGEING, 2 * AGEING] {
        assert_eq!(table.forward(0, from, 1, now), Way::Flood);
        assert_eq!(table.forward(1, to, 1, now + AGEING), Way::To(0));
    }
    assert_eq!(table.forward(1, to, 1, 3 * AGEING + 1), Way::Flood);
    // Whoever comes with its address then has not taken it from anybody.
    assert_eq!(table.forward(2, from, 1, 4 * AGEING), Way::Flood);
    assert_eq!(table.counted(2), Counted { flooded: 1, learned: 1, ..Counted::default() });
    assert_eq!((table.known(0), table.known(2)), (0, 1));
}

#[test]
fn the_same_address_is_another_station_in_another_network() {
    let mut table = stations(3);
    table.forward(0, addresses(ALL, mac(1), Some(5)), 1, 0);
    table.forward(2, addresses(ALL, mac(1), Some(6)), 1, 0);
    // The priority is no part of the tag.
    assert_eq!(table.forward(1, addresses(mac(1), mac(2), Some(0xe005)), 1, 0), Way::To(0));
    assert_eq!(table.forward(1, addresses(mac(1), mac(2), Some(6)), 1, 0), Way::To(2));
    assert_eq!(table.forward(1, addresses(mac(1), mac(2), None), 1, 0), Way::Flood);
    assert_eq!(table.counted(2).moved, 0);
}

#[test]
fn places_are_limited_and_come_back_with_time() {
    let mut table = stations(6);
    for port in 0..5 {
        for number in 0..2000 {
            table.forward(port, addresses(ALL, mac(port as u32 * 10_000 + number), None), 1, SECOND);
        }
    }
    let known: Vec<usize> = (0..6).map(|port| table.known(port)).collect();
    assert_eq!(known, [MOST_OF_PORT, MOST_OF_PORT, MOST_OF_PORT, MOST_OF_PORT, 0, 0]);
    assert_eq!(known.iter().sum::<usize>(), MOST);
    let late = addresses(ALL, mac(77_777), None);
    table.forward(5, late, 1, SECOND + AGEING);
    assert_eq!(table.known(5), 0);
    // A full port takes no station from another one.
    table.forward(5, addresses(ALL, mac(10_001), None), 1, SECOND + AGEING);
    table.forward(0, addresses(ALL, mac(10_002), None), 1, SECOND + AGEING);
    assert_eq!((table.known(5), table.known(1), table.known(0)), (1, MOST_OF_PORT - 1, MOST_OF_PORT));
    table.forward(5, late, 1, 3 * SECOND + AGEING);
    assert_eq!((0..6).map(|port| table.known(port)).collect::<Vec<_>>(), [0, 0, 0, 0, 0, 2]);
}

#[test]
fn floods_have_a_rate() {
    let mut table = stations(2);
    let all = addresses(ALL, mac(1), None);
    for rate in [1, 9, 100, 10_000] {
        table.limit_floods(0, rate);
        let at_once = u64::from(rate / 10).max(1);
        let begin = u64::from(rate) * 1000 * SECOND;
        let mut admitted = 0;
        for step in 0..20_000u64 {
            admitted += u64::from(table.forward(0, all, 1, begin + step * SECOND / 2000) == Way::Flood);
        }
        // Ten seconds of it.
        let wanted = (u64::from(rate) * 10 + at_once).min(20_000);
        assert!(admitted.abs_diff(wanted) <= 2, "{rate}: {admitted}");
    }
    // What costs more lets the next wait longer.
    table.limit_floods(0, 10);
    let begin = 100_000_000 * SECOND;
    assert_eq!(table.forward(0, all, 50, begin), Way::Flood);
    assert_eq!(table.forward(0, all, 1, begin + 49 * SECOND / 10), Way::Limited);
    assert_eq!(table.forward(0, all, 1, begin + 5 * SECOND), Way::Flood);
}

#[test]
fn a_number_of_a_port_that_left_is_given_again_and_knows_nothing() {
    let mut table = stations(2);
    table.forward(0, addresses(ALL, mac(1), None), 1, 0);
    table.isolate(0, true);
    table.leave(0);
    assert_eq!(table.forward(1, addresses(mac(1), mac(2), None), 1, 0), Way::Flood);
    assert!(!table.may_go(1, 0));
    assert_eq!(table.join(), 0);
    assert_eq!(table.counted(0), Counted::default());
    table.set_up(0, true);
    table.isolate(1, true);
    assert!(table.may_go(1, 0) && table.may_go(0, 1) && !table.may_go(0, 0));
}

// Offloads.

fn words(bytes: &[u8]) -> u32 {
    let word = |word: &[u8]| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

proptest! {
    #[test]
    fn a_finished_checksum_adds_up(
        mut frame in proptest::collection::vec(any::<u8>(), 40..2000), start in 14usize..30, offset in 0usize..4
    ) {
        let (start, offset) = (start, offset * 2);
        let old = frame[start + offset..start + offset + 2].to_vec();
        finish(&mut frame, start, offset);
        // With what was there before, which stands for addresses and lengths, all of it is minus zero.
        prop_assert_eq!(words(&[&(words(&frame[start..]) as u16).to_be_bytes()[..], &old].concat()), 0xffff);
        prop_assert_ne!(words(&frame[start + offset..start + offset + 2]), 0);
    }

    #[test]
    fn whatever_is_said_of_whatever_is_cut_within_bounds(
        head in proptest::collection::vec(any::<u8>(), 0..HEAD), version in any::<bool>(), size in 14usize..70_000,
        gso in prop_oneof![Just(1u8), Just(4), Just(5), Just(0x81), any::<u8>()], gso_size in any::<u16>(),
        start in 14u16..80, offset in prop_oneof![Just(16u16), Just(6), any::<u16>()]
    ) {
        let mut head = head;
        head.resize(size.min(HEAD), 7);
        let kind: [u8; 2] = if version { [8, 0] } else { [0x86, 0xdd] };
        head[12..14].copy_from_slice(&kind);
        if head.len() > 60 {
            head[14] = if version { 0x45 } else { 0x60 };
            head[20] = if version { 0 } else { 6 };
            head[21] = 0;
            head[23] = 6;
        }
        let said = Fields { csum: true, gso, header_size: 0, gso_size, start, offset };
        if let Some(cut) = Cut::of(&head, size, said) {
            let mut frame = head.clone();
            frame.resize(size, 9);
            let (mut count, mut payload) = (0, 0);
            cut.each(&frame, &mut Vec::new(), |segment| {
                count += 1;
                payload += segment.len() - cut.headers;
            });
            prop_assert_eq!((count, payload), (cut.count(size), size - cut.headers));
            prop_assert!(count <= SEGMENTS);
        }
    }
}

// Frames.

/// A driver at a port, with one pair.
struct End {
    arena: Arena,
    port: Arc<Port>,
    engine: Arc<SwitchPair>,
    queues: [Arc<Queue>; 2],
    receive: DriverRing,
    transmit: DriverRing,
    buffers: HashMap<u16, u64>,
    sent: HashMap<u16, u64>,
    spare: [Vec<u64>; 2],
    kicks: [Arc<Doorbell>; 2],
}

const ROOM: usize = 1024;

#[derive(Default)]
struct Called(AtomicU64);

impl Notify for Called {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn counters(&self) -> [u64; 3] {
        [0; 3]
    }
}

fn pair(queues: &[Arc<Queue>; 2], wake: Arc<dyn Notify>) -> Pair {
    Pair { receive: queues[0].clone(), transmit: queues[1].clone(), signal: Arc::new(Silent), wake }
}

fn rules() -> Rules {
    Rules { link: true, in_use: true, merge: true, ..Rules::default() }
}

impl End {
    fn new(switch: &Arc<Switch>, packed: bool) -> Self {
        let mut arena = Arena::new();
        let queues: [Arc<Queue>; 2] = Default::default();
        let (receive, _) = arena.ring(64, packed, &queues[0]);
        let (transmit, _) = arena.ring(64, packed, &queues[1]);
        let port = Port::join(switch, vec![pair(&queues, Arc::new(Silent))]);
        port.limit_floods(1_000_000_000);
        let engine = Arc::new(SwitchPair::new(port.clone(), 0));
        engine.set_rules(rules());
        let spare = std::array::from_fn(|_| (0..48).map(|_| arena.take(ROOM)).collect());
        let kicks = std::array::from_fn(|_| Arc::new(Doorbell::create().unwrap()));
        Self {
            arena,
            port,
            engine,
            queues,
            receive,
            transmit,
            buffers: HashMap::new(),
            sent: HashMap::new(),
            spare,
            kicks,
        }
    }

    fn listen(&self, task: &Arc<Task>) {
        for kick in &self.kicks {
            task.listen(kick).unwrap();
        }
    }

    fn post(&mut self, count: usize) {
        for _ in 0..count {
            let Some(address) = self.spare[0].pop() else { break };
            match self.receive.add(&[], &[(address, ROOM as u64)]).unwrap() {
                Some(token) => drop(self.buffers.insert(token, address)),
                None => {
                    self.spare[0].push(address);
                    break;
                }
            }
        }
        if self.receive.publish() {
            assert!(self.kicks[0].ring());
        }
    }

    /// Send a frame that ends with a number; false when there is no room for it now.
    fn send(&mut self, to: [u8; 6], from: [u8; 6], size: usize, number: u32) -> bool {
        let Some(address) = self.spare[1].pop() else { return false };
        let mut frame = vec![0; 12 + size];
        frame[12..18].copy_from_slice(&to);
        frame[18..24].copy_from_slice(&from);
        frame[size + 8..].copy_from_slice(&number.to_le_bytes());
        self.arena.put(address, &frame);
        let token = self.transmit.add(&[(address, frame.len() as u64)], &[]).unwrap().unwrap();
        self.sent.insert(token, address);
        if self.transmit.publish() {
            assert!(self.kicks[1].ring());
        }
        true
    }

    fn reclaim(&mut self) {
        for (token, _) in reap(&mut self.transmit) {
            self.spare[1].push(self.sent.remove(&token).unwrap());
        }
    }

    /// (sender, number) of each frame that came.
    fn received(&mut self) -> Vec<([u8; 6], u32)> {
        let mut frames = Vec::new();
        for (token, written) in reap(&mut self.receive) {
            let address = self.buffers.remove(&token).unwrap();
            let bytes = self.arena.get(address, written as usize);
            assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
            let number = u32::from_le_bytes(bytes[bytes.len() - 4..].try_into().unwrap());
            frames.push((bytes[18..24].try_into().unwrap(), number));
            self.spare[0].push(address);
        }
        frames
    }
}

#[test]
fn ports_of_several_workers_send_to_each_other_and_lose_nothing() {
    const ENDS: usize = 4;
    for polling in POLLING {
        for packed in [false, true] {
            let switch = Arc::new(Switch::new(AGEING));
            let workers = [0, 1].map(|_| Worker::start("test", polling, &[]).unwrap());
            let mut ends: Vec<End> = (0..ENDS).map(|_| End::new(&switch, packed)).collect();
            let add = |(index, end): (usize, &End)| {
                let task = workers[index % 2].add(end.engine.clone(), 0);
                end.listen(&task);
                task
            };
            let tasks: Vec<_> = ends.iter().enumerate().map(add).collect();
            let mut numbers = Numbers(11);
            // By receiver and sender: what is to come.
            let mut expected: HashMap<(usize, [u8; 6]), VecDeque<u32>> = HashMap::new();
            for (index, end) in ends.iter_mut().enumerate() {
                end.post(48);
                // Known from the first frame on.
                assert_eq!(end.port.send(0, [0; 3], &[&ALL[..], &mac(index as u32), &[9; 48]].concat()), Sent::Out);
            }
            for (index, end) in ends.iter_mut().enumerate() {
                let mut count = 0;
                wait("the first frames", || {
                    count += end.received().len();
                    count == ENDS - 1
                });
                assert_eq!(end.engine.outbox().faults(), [], "{index}");
            }
            let (mut left, mut number) = (4000, 0);
            let deadline = Instant::now() + LIMIT;
            while left > 0 || expected.values().any(|numbers| !numbers.is_empty()) {
                assert!(Instant::now() < deadline, "{polling:?}, packed {packed}: {left} left, {expected:?}");
                for (index, end) in ends.iter_mut().enumerate() {
                    for (from, number) in end.received() {
                        assert_eq!(expected.entry((index, from)).or_default().pop_front(), Some(number));
                    }
                    end.reclaim();
                    end.post(numbers.below(30) as usize);
                    // Not more than what is kept for who has no buffers.
                    let waiting: usize = expected.values().map(VecDeque::len).sum();
                    let room = 1000usize.saturating_sub(waiting) as u64 / ENDS as u64;
                    for _ in 0..numbers.below(12).min(left).min(room) {
                        let to = numbers.below(ENDS as u64 + 1) as usize;
                        let address = if to < ENDS { mac(to as u32) } else { ALL };
                        number += 1;
                        if !end.send(address, mac(index as u32), 20 + numbers.below(900) as usize, number) {
                            break;
                        }
                        left -= 1;
                        for other in (0..ENDS).filter(|other| *other != index && (to >= ENDS || to == *other)) {
                            expected.entry((other, mac(index as u32))).or_default().push_back(number);
                        }
                    }
                }
            }
            for end in &ends {
                assert_eq!(end.engine.outbox().faults(), []);
                let counters: HashMap<_, _> = end.engine.counters().into_iter().collect();
                assert_eq!((counters["rx_dropped"], counters["rx_filtered"]), (0, 0));
            }
            for task in tasks {
                task.remove();
            }
        }
    }
}

#[test]
fn a_receiver_that_lies_about_its_buffers_is_found_out_by_a_sender_and_pays_alone() {
    for packed in [false, true] {
        let switch = Arc::new(Switch::new(AGEING));
        let mut ends: Vec<End> = (0..3).map(|_| End::new(&switch, packed)).collect();
        ends[1].receive.add(&[], &[(0xdead_0000, 512)]).unwrap().unwrap();
        let _ = ends[1].receive.publish();
        ends[2].post(8);
        for number in 0..3 {
            assert!(ends[0].send(ALL, mac(1), 60, number));
            ends[0].engine.turn(true);
        }
        assert_eq!(ends[2].received().iter().map(|(_, number)| *number).collect::<Vec<_>>(), [0, 1, 2]);
        ends[0].reclaim();
        assert_eq!((ends[0].spare[1].len(), ends[0].engine.outbox().faults().len()), (48, 0));
        let faults = ends[1].engine.outbox().faults();
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert_eq!(faults[0].1.queue, 0);
        assert!(ends[1].queues[0].lock().is_none() && ends[1].queues[1].lock().is_some());
        // It may send still, until it is reset.
        assert!(ends[1].send(ALL, mac(2), 60, 9));
        ends[1].engine.turn(true);
        assert_eq!(ends[2].received(), [(mac(2), 9)]);
    }
}

#[test]
fn a_model_is_told_once_that_frames_wait_and_gets_them_in_order() {
    let switch = Arc::new(Switch::new(AGEING));
    let mut end = End::new(&switch, false);
    let queues: [Arc<Queue>; 2] = Default::default();
    let called = Arc::new(Called::default());
    let port = Port::join(&switch, vec![pair(&queues, called.clone())]);
    let engine = SwitchPair::new(port.clone(), 0);
    engine.set_rules(rules());
    for round in 1..3 {
        for number in 0..10 {
            assert!(end.send(ALL, mac(1), 60, number));
            end.engine.turn(true);
        }
        end.reclaim();
        assert_eq!(called.0.load(Ordering::Relaxed), round);
        let read = std::iter::from_fn(|| port.read(0));
        let numbers: Vec<u8> = read.map(|(_, bytes)| bytes[bytes.len() - 4]).collect();
        assert_eq!(numbers, (0..10).collect::<Vec<u8>>());
    }
    // Nothing comes for one that left, and it sends nothing.
    port.leave();
    port.leave();
    assert!(end.send(ALL, mac(1), 60, 0));
    end.engine.turn(true);
    assert!(port.read(0).is_none());
    assert_eq!(port.send(0, [0; 3], &[7; 60]), Sent::Dropped);
}
