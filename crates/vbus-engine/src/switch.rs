//! A learning switch between network devices: what is sent on a port comes to the port where its station is.
//!
//! A port's pairs of queues may be served by different workers, or by the device's model in Python. Whoever serves a
//! transmit queue also lays its frames into the receive buffers of whom they are for: a frame is copied once, from ring
//! to ring. Only what finds no buffer there, or is for a port that its model serves, is kept for a while.
//!
//! ```text
//!  transmit side of a pair ── its queue ──> table of stations ──> receive side of a pair ── its queue
//!     (one lock)           (one lock)        (one lock)              (one lock)          (one lock)
//! ```
//!
//! Locks are taken in this order from left to right; of a kind one at a time, and none of them is held for longer than a
//! batch. A receiver that gives no buffers, or is gone, holds up nobody: what is kept for it has a limit, and what is
//! beyond is dropped and counted as its own.

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vbus_ring::ring::{Burst, HEAVY};
use vbus_ring::signal::Notify;

use crate::net::{
    answer, count, packet, takes, wrong, Backlog, Counters, Fields, Frame, Header, Laid, Packet, Receiver, Rules,
};
use crate::offload::{finish, Cut, HEAD};
use crate::outbox::{Fault, Outbox};
use crate::queue::{Queue, Running};
use crate::stations::{Addresses, Counted, Stations, Way, BEGINNING};
use crate::worker::{Engine, Turn};

/// Frames that are shown together.
const BATCH: usize = 32;
/// Batches of a turn.
const BUDGET: usize = 8;
/// The queues of a pair, as faults name them.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// How many kinds of flows a port with several pairs tells apart.
const FLOWS: usize = 256;
/// Bytes of a frame by which its flow is known: an Ethernet header with a tag, the longest of IPv4, and two ports.
const FLOW_BEGINNING: usize = 18 + 60 + 4;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Ports = Arc<Vec<Option<Arc<Port>>>>;

struct Inside {
    stations: Stations,
    /// By their numbers.
    ports: Ports,
}

/// A switch. It is there as long as somebody holds it, or a port of it that has not left.
pub struct Switch {
    began: Instant,
    inside: Mutex<Inside>,
}

impl Switch {
    /// Without ports. `ageing`: nanoseconds for which a station that says nothing is known.
    pub fn new(ageing: u64) -> Self {
        let inside = Inside { stations: Stations::new(ageing), ports: Ports::default() };
        Self { began: Instant::now(), inside: Mutex::new(inside) }
    }

    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }
}

/// A pair of queues, as a port is made of them.
pub struct Pair {
    /// Where the driver's buffers are.
    pub receive: Arc<Queue>,
    /// Where its frames come from.
    pub transmit: Arc<Queue>,
    /// Tells the device model that there is something in the outbox,
    pub signal: Arc<dyn Notify>,
    /// or, while it serves the pair itself, that there are frames for it.
    pub wake: Arc<dyn Notify>,
}

#[derive(Default)]
struct Rx {
    rules: Rules,
    /// The run of the receive queue that the buffers at hand are of.
    run: u64,
    receiver: Receiver,
    backlog: Backlog,
}

#[derive(Default)]
struct Tx {
    rules: Rules,
    sent: Burst,
    written: Vec<u32>,
    scratch: Scratch,
}

/// Memory for frames that are finished here.
#[derive(Default)]
struct Scratch {
    frame: Vec<u8>,
    segment: Vec<u8>,
    /// Which of a batch go to which port.
    masks: Vec<u32>,
}

struct Lane {
    pair: Pair,
    rx: Mutex<Rx>,
    tx: Mutex<Tx>,
    counters: Counters,
    outbox: Outbox,
}

/// What is left to be done without locks.
#[derive(Default)]
struct After {
    notify: Vec<Arc<dyn Notify>>,
    /// Who did what, by port and pair, in which run of the queue.
    faults: Vec<(Arc<Port>, usize, u64, Fault)>,
    stopped: Vec<Running>,
    /// Whether it took long, as batches go.
    heavy: bool,
}

impl After {
    fn settle(self) {
        for signal in self.notify {
            signal.notify();
        }
        drop(self.stopped);
        for (port, pair, run, fault) in self.faults {
            port.lanes[pair].outbox.fault(run, fault);
        }
    }
}

/// A frame of a batch, and what was read of it.
struct Item<'a> {
    frame: Frame<'a>,
    size: u64,
    header: Header,
    addresses: Addresses,
    /// Of one that is to be cut: the first bytes, as they were checked, and how.
    head: Vec<u8>,
    cut: Option<Cut>,
}

impl Item<'_> {
    fn packet(&self) -> Packet<'_> {
        let frame = match (self.frame, &self.head[..]) {
            (frame, []) => frame,
            // What was checked is what goes on, whatever is there now.
            (Frame::Pieces(pieces), head) => Frame::Read(head, pieces),
            (frame, _) => frame,
        };
        Packet { header: self.header, frame, size: self.size }
    }

    /// As how many frames it counts when it goes to all.
    fn cost(&self) -> u32 {
        self.cut.map_or(1, |cut| cut.count(self.size as usize) as u32)
    }
}

/// What became of a frame that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It went out.
    Out,
    /// It goes nowhere, or to all beyond the limit.
    Dropped,
    /// It is not what its header says.
    Refused,
}

/// A device's place at a switch: one or several pairs of queues.
pub struct Port {
    switch: Arc<Switch>,
    number: usize,
    lanes: Vec<Lane>,
    /// How many of them are used.
    in_use: AtomicUsize,
    /// On which pair frames of a flow were sent last, by its hash: its answers are received there (automatic receive
    /// steering, section 5.1.6.5).
    flows: [AtomicU8; FLOWS],
}

impl Port {
    /// Join a switch. The port is down until rules say that its link is up.
    pub fn join(switch: &Arc<Switch>, pairs: Vec<Pair>) -> Arc<Self> {
        let mut inside = lock(&switch.inside);
        let number = inside.stations.join();
        let lane = |pair: Pair| {
            let outbox = Outbox::new(pair.signal.clone());
            Lane { pair, rx: Mutex::default(), tx: Mutex::default(), counters: Counters::default(), outbox }
        };
        let port = Arc::new(Self {
            switch: switch.clone(),
            number,
            lanes: pairs.into_iter().map(lane).collect(),
            in_use: AtomicUsize::new(0),
            flows: [const { AtomicU8::new(0) }; FLOWS],
        });
        let mut ports = (*inside.ports).clone();
        ports.resize(ports.len().max(number + 1), None);
        ports[number] = Some(port.clone());
        inside.ports = Arc::new(ports);
        port
    }

    /// Leave it: nothing comes any more. A second time does nothing.
    pub fn leave(self: &Arc<Self>) {
        for pair in 0..self.lanes.len() {
            self.set_rules(pair, Rules::default());
        }
        let mut inside = lock(&self.switch.inside);
        if inside.ports.get(self.number).and_then(Option::as_ref).is_some_and(|port| Arc::ptr_eq(port, self)) {
            inside.stations.leave(self.number);
            let mut ports = (*inside.ports).clone();
            ports[self.number] = None;
            inside.ports = Arc::new(ports);
        }
    }

    /// How many pairs.
    pub fn pairs(&self) -> usize {
        self.lanes.len()
    }

    fn is_there(self: &Arc<Self>, inside: &Inside) -> bool {
        inside.ports.get(self.number).and_then(Option::as_ref).is_some_and(|port| Arc::ptr_eq(port, self))
    }

    /// These hold for a pair from now on: no frame goes by others when this returns. A link that is down takes what was
    /// learned, and what waits, with it.
    pub fn set_rules(self: &Arc<Self>, pair: usize, rules: Rules) {
        let up = rules.link;
        if !up {
            self.set_up(false);
        }
        let lane = &self.lanes[pair];
        lock(&lane.tx).rules = rules.clone();
        {
            let mut rx = lock(&lane.rx);
            if !up || !rules.in_use {
                count(&lane.counters.rx_dropped, rx.backlog.len() as u64);
                rx.backlog.clear();
            }
            rx.rules = rules;
        }
        let used = self.lanes.iter().take_while(|lane| {
            let rx = lock(&lane.rx);
            rx.rules.in_use && rx.rules.link
        });
        self.in_use.store(used.count(), Ordering::Relaxed);
        if up {
            self.set_up(true);
        }
    }

    fn set_up(self: &Arc<Self>, up: bool) {
        let mut inside = lock(&self.switch.inside);
        if self.is_there(&inside) {
            inside.stations.set_up(self.number, up);
        }
    }

    /// Whether it talks with no other port that is isolated.
    pub fn isolate(self: &Arc<Self>, isolated: bool) {
        let mut inside = lock(&self.switch.inside);
        if self.is_there(&inside) {
            inside.stations.isolate(self.number, isolated);
        }
    }

    /// How many frames a second it may send to all.
    pub fn limit_floods(self: &Arc<Self>, a_second: u32) {
        let mut inside = lock(&self.switch.inside);
        if self.is_there(&inside) {
            inside.stations.limit_floods(self.number, a_second);
        }
    }

    /// What it counted beside its pairs, by name.
    pub fn counters(self: &Arc<Self>) -> Vec<(&'static str, u64)> {
        let (counted, known) = {
            let inside = lock(&self.switch.inside);
            let there = self.is_there(&inside);
            let counted = if there { inside.stations.counted(self.number) } else { Counted::default() };
            (counted, if there { inside.stations.known(self.number) } else { 0 })
        };
        let Counted { flooded, flood_dropped, learned, moved } = counted;
        vec![
            ("flooded", flooded),
            ("flood_dropped", flood_dropped),
            ("learned", learned),
            ("moved", moved),
            ("stations", known as u64),
        ]
    }

    // For a model that serves its pairs itself.

    /// Send a frame, whose header was checked.
    pub fn send(self: &Arc<Self>, pair: usize, header: Header, frame: &[u8]) -> Sent {
        let mut after = After::default();
        let sent = {
            let mut tx = lock(&self.lanes[pair].tx);
            match self.item(pair, header, Frame::Bytes(frame), frame.len() as u64) {
                None => Sent::Refused,
                Some(item) => {
                    let mut out = Sent::Out;
                    self.forward(&[item], &mut tx.scratch, &mut after, |_, way| {
                        if matches!(way, Way::Nowhere | Way::Limited) {
                            out = Sent::Dropped;
                        }
                    });
                    out
                }
            }
        };
        after.settle();
        sent
    }

    /// The oldest frame that waits for a pair, with its header.
    pub fn read(&self, pair: usize) -> Option<(Header, Vec<u8>)> {
        lock(&self.lanes[pair].rx).backlog.take_first()
    }

    // A frame's way.

    /// Read of a frame what decides about it; None when it is not what its header says.
    #[inline]
    fn item<'a>(&self, pair: usize, header: Header, frame: Frame<'a>, size: u64) -> Option<Item<'a>> {
        let fields = Fields::of(header);
        let mut beginning = [0; BEGINNING];
        let (mut head, mut cut) = (Vec::new(), None);
        if fields.gso == 0 {
            frame.beginning(&mut beginning);
        } else {
            head = vec![0; HEAD.min(size as usize)];
            frame.beginning(&mut head);
            let known = Cut::of(&head, size as usize, fields)?;
            head.truncate(known.headers);
            beginning.copy_from_slice(&head[..BEGINNING]);
            cut = Some(known);
        }
        let fields = Fields { header_size: cut.map_or(0, |cut: Cut| cut.headers as u16), ..fields };
        if self.in_use.load(Ordering::Relaxed) > 1 {
            self.flows[usize::from(flow_of(frame))].store(pair as u8, Ordering::Relaxed);
        }
        Some(Item { frame, size, header: fields.header(), addresses: Addresses::of(&beginning), head, cut })
    }

    /// Send a batch where it belongs. `each` is told of each frame's way.
    #[inline]
    fn forward(
        self: &Arc<Self>,
        items: &[Item<'_>],
        scratch: &mut Scratch,
        after: &mut After,
        mut each: impl FnMut(usize, Way),
    ) {
        let ports = {
            let mut inside = lock(&self.switch.inside);
            let Inside { stations, ports } = &mut *inside;
            if !ports.get(self.number).and_then(Option::as_ref).is_some_and(|port| Arc::ptr_eq(port, self)) {
                (0..items.len()).for_each(|index| each(index, Way::Nowhere));
                return;
            }
            scratch.masks.clear();
            scratch.masks.resize(ports.len(), 0);
            let now = self.switch.now();
            for (index, item) in items.iter().enumerate() {
                let way = stations.forward(self.number, item.addresses, item.cost(), now);
                match way {
                    Way::To(port) => scratch.masks[port] |= 1 << index,
                    Way::Flood => {
                        for (port, mask) in scratch.masks.iter_mut().enumerate() {
                            *mask |= u32::from(stations.may_go(self.number, port)) << index;
                        }
                    }
                    Way::Nowhere | Way::Limited => (),
                }
                each(index, way);
            }
            ports.clone()
        };
        for number in 0..scratch.masks.len() {
            let mask = scratch.masks[number];
            let Some(port) = ports[number].as_ref().filter(|_| mask != 0) else { continue };
            let in_use = port.in_use.load(Ordering::Relaxed);
            if in_use <= 1 {
                self.deliver(items, mask, port, 0, scratch, after);
                continue;
            }
            let mut masks = vec![0; in_use];
            for (index, item) in items.iter().enumerate().filter(|(index, _)| mask & 1 << index != 0) {
                masks[port.steer(flow_of(item.frame), in_use)] |= 1 << index;
            }
            for (pair, own) in masks.into_iter().enumerate().filter(|(_, own)| *own != 0) {
                self.deliver(items, own, port, pair, scratch, after);
            }
        }
    }

    fn steer(&self, flow: u8, in_use: usize) -> usize {
        let pair = usize::from(self.flows[usize::from(flow)].load(Ordering::Relaxed));
        if pair < in_use {
            pair
        } else {
            usize::from(flow) % in_use
        }
    }

    /// Lay those frames of a batch into the buffers of a pair, or keep them for it.
    fn deliver(
        &self,
        items: &[Item<'_>],
        mask: u32,
        port: &Arc<Port>,
        pair: usize,
        scratch: &mut Scratch,
        after: &mut After,
    ) {
        let lane = &port.lanes[pair];
        let mut rx = lock(&lane.rx);
        if !rx.rules.link || !rx.rules.in_use {
            count(&lane.counters.rx_dropped, u64::from(mask.count_ones()));
            return;
        }
        let was_empty = rx.backlog.is_empty();
        if !lane.pair.receive.native() {
            let mut giving = Giving { rx: &mut rx, running: None, left: 0, lane };
            for item in chosen(items, mask) {
                // Without buffers nothing can be wrong with them.
                let _ = self.give(item, &mut giving, scratch);
            }
            if was_empty && !rx.backlog.is_empty() {
                after.notify.push(lane.pair.wake.clone());
            }
            return;
        }
        lane.with_buffers(&mut rx, port, pair, after, |rx, running| {
            let mut giving = Giving { rx, running, left: mask.count_ones() as usize, lane };
            for item in chosen(items, mask) {
                if let Err(fault) = self.give(item, &mut giving, scratch) {
                    count(&lane.counters.rx_dropped, giving.left as u64);
                    return Err(fault);
                }
                giving.left -= 1;
            }
            Ok(())
        });
    }

    /// A frame for one receiver, as that one takes it.
    #[inline]
    fn give(&self, item: &Item<'_>, giving: &mut Giving<'_, '_>, scratch: &mut Scratch) -> Result<(), Fault> {
        let packet = item.packet();
        if takes(&giving.rx.rules, packet.header) {
            return giving.put(packet);
        }
        scratch.frame.clear();
        packet.frame.copy(&mut scratch.frame);
        let Scratch { frame, segment, .. } = scratch;
        let fields = Fields::of(packet.header);
        match &item.cut {
            None => {
                finish(frame, usize::from(fields.start), usize::from(fields.offset));
                giving.put(Packet::finished(Frame::Bytes(frame), packet.size))
            }
            Some(cut) => {
                let mut result = Ok(());
                cut.each(frame, segment, |segment| {
                    if result.is_ok() {
                        result = giving.put(Packet::finished(Frame::Bytes(segment), segment.len() as u64));
                    }
                });
                result
            }
        }
    }

    // Turns of a worker.

    /// Lay frames that waited into the buffers of a pair; whether there were any.
    fn drain(self: &Arc<Self>, pair: usize, ask: bool, after: &mut After) -> bool {
        let lane = &self.lanes[pair];
        let mut rx = lock(&lane.rx);
        let mut worked = false;
        if rx.backlog.is_empty() {
            return worked;
        }
        lane.with_buffers(&mut rx, self, pair, after, |rx, running| {
            let Some(running) = running else { return Ok(()) };
            let Rx { rules, receiver, backlog, .. } = rx;
            for _ in 0..BATCH {
                let Some(packet) = backlog.first() else { break };
                let more = (backlog.len().min(BATCH), ask);
                if !receiver.has_room(running, more.0, ask)? {
                    break;
                }
                if takes(rules, packet.header) {
                    let wanted = backlog.wanted;
                    let laid = receiver.put(running, packet, more, wanted, rules, &lane.counters)?;
                    if laid != Laid::Done {
                        backlog.wanted |= laid == Laid::Wanted;
                        break;
                    }
                } else {
                    // It did when it came.
                    count(&lane.counters.rx_dropped, 1);
                }
                worked = true;
                backlog.pop();
            }
            Ok(())
        });
        worked
    }

    /// Send what a pair's driver has for us: whether there was anything, and whether there may be more.
    fn transmit(self: &Arc<Self>, pair: usize, ask: bool, after: &mut After) -> (bool, bool) {
        let lane = &self.lanes[pair];
        let mut tx = lock(&lane.tx);
        let mut transmit = lane.pair.transmit.serve();
        let Some(running) = transmit.as_mut().filter(|_| !lane.pair.transmit.held()) else { return (false, false) };
        let mut fault = self.send_batch(pair, &mut tx, running, ask, after).err();
        let Tx { sent, written, .. } = &mut *tx;
        let taken = sent.len();
        after.heavy = sent.weight() >= HEAVY;
        match answer(&lane.pair.transmit, running, sent, written) {
            Ok(signal) => after.notify.extend(signal),
            Err(violation) => fault = Some(Fault::of(TRANSMIT, &violation)),
        }
        written.clear();
        sent.clear();
        if let Some(fault) = fault {
            after.stopped.extend(transmit.take());
            after.faults.push((self.clone(), pair, lane.pair.transmit.run(), fault));
        }
        (taken > 0, taken == BATCH)
    }

    /// What was answered is in `written`, whatever comes of it.
    fn send_batch(
        self: &Arc<Self>,
        pair: usize,
        tx: &mut Tx,
        running: &mut Running,
        ask: bool,
        after: &mut After,
    ) -> Result<(), Fault> {
        let Tx { rules, sent, written, scratch } = tx;
        let counters = &self.lanes[pair].counters;
        running.ring.burst(BATCH, sent, ask).map_err(|violation| Fault::of(TRANSMIT, &violation))?;
        let mut items = Vec::with_capacity(sent.len());
        let mut result = Ok(());
        for chain in 0..sent.len() {
            let (header, pieces, size) = match packet(sent, chain, TRANSMIT) {
                Ok(packet) => packet,
                Err(fault) => {
                    result = Err(fault);
                    break;
                }
            };
            written.push(0);
            if let Some(counter) = wrong(header, size, rules, counters) {
                count(counter, 1);
            } else if !rules.link {
                count(&counters.tx_dropped, 1);
            } else if let Some(item) = self.item(pair, header, Frame::Pieces(pieces), size) {
                items.push(item);
            } else {
                count(&counters.refused, 1);
            }
        }
        if items.is_empty() {
            return result;
        }
        let (mut packets, mut bytes, mut dropped) = (0, 0, 0);
        self.forward(&items, scratch, after, |index, way| match way {
            Way::Nowhere | Way::Limited => dropped += 1,
            Way::To(_) | Way::Flood => {
                packets += 1;
                bytes += items[index].size;
            }
        });
        count(&counters.tx_packets, packets);
        count(&counters.tx_bytes, bytes);
        count(&counters.tx_dropped, dropped);
        result
    }
}

impl Lane {
    /// Do something with the receive queue's buffers, if it runs, and show the driver what was filled.
    #[inline]
    fn with_buffers(
        &self,
        rx: &mut Rx,
        port: &Arc<Port>,
        pair: usize,
        after: &mut After,
        work: impl FnOnce(&mut Rx, Option<&mut Running>) -> Result<(), Fault>,
    ) {
        let queue = &self.pair.receive;
        let mut receive = queue.serve();
        if rx.run != queue.run() {
            rx.run = queue.run();
            rx.receiver.reset();
        }
        let mut fault = work(rx, receive.as_mut().filter(|_| !queue.held())).err();
        // Whatever went wrong, what was laid into buffers is the driver's.
        if let Some(running) = receive.as_mut() {
            match rx.receiver.show(running) {
                Ok((notify, chains, bytes)) => {
                    queue.count(chains, 0, bytes);
                    after.notify.extend(notify.then(|| running.signal.clone()));
                }
                Err(violation) => fault = Some(Fault::of(RECEIVE, &violation)),
            }
        }
        if let Some(fault) = fault {
            after.stopped.extend(receive.take());
            after.faults.push((port.clone(), pair, queue.run(), fault));
        }
    }
}

/// The receive side of a pair, while frames are given to it.
struct Giving<'a, 'b> {
    rx: &'a mut Rx,
    /// Its ring, unless only its model may take buffers.
    running: Option<&'b mut Running>,
    /// Frames that are to come, for a guess at how many buffers are needed.
    left: usize,
    lane: &'a Lane,
}

impl Giving<'_, '_> {
    #[inline]
    fn put(&mut self, packet: Packet<'_>) -> Result<(), Fault> {
        let Rx { rules, receiver, backlog, .. } = &mut *self.rx;
        let mut wanted = false;
        // Those that wait go first.
        if backlog.is_empty() {
            if let Some(running) = self.running.as_deref_mut() {
                // Whoever serves this pair hears of buffers from here on, when there are none.
                let more = (self.left.max(1), true);
                match receiver.put(running, packet, more, false, rules, &self.lane.counters)? {
                    Laid::Done => return Ok(()),
                    laid => wanted = laid == Laid::Wanted,
                }
            }
        }
        if backlog.push(packet) {
            backlog.wanted |= wanted;
        } else {
            count(&self.lane.counters.rx_dropped, 1);
        }
        Ok(())
    }
}

fn chosen<'a>(items: &'a [Item<'a>], mask: u32) -> impl Iterator<Item = &'a Item<'a>> {
    items.iter().enumerate().filter(move |(index, _)| mask & 1 << index != 0).map(|(_, item)| item)
}

/// A number that is the same for all frames of a flow, in both directions.
fn flow_of(frame: Frame<'_>) -> u8 {
    let mut bytes = [0; FLOW_BEGINNING];
    let size = frame.beginning(&mut bytes);
    let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|byte| bytes[at + byte]));
    let network = if bytes[12..14] == [0x81, 0] { 18 } else { 14 };
    let (mut hash, protocol, transport) = match [bytes[network - 2], bytes[network - 1]] {
        [0x08, 0x00] => {
            let whole = word(network + 4) & 0x3fff == 0;
            let behind = network + usize::from(bytes[network] & 15) * 4;
            let protocol = bytes[network + 9];
            (word(network + 12) ^ word(network + 16), protocol, if whole { behind } else { size })
        }
        [0x86, 0xdd] => {
            let addresses = (0..8).fold(0, |hash, index| hash ^ word(network + 8 + index * 4));
            (addresses, bytes[network + 6], network + 40)
        }
        _ => return 0,
    };
    if matches!(protocol, 6 | 17) && transport + 4 <= size {
        let ports = word(transport);
        hash ^= (ports ^ (ports >> 16)) & 0xffff;
    }
    hash ^= hash >> 16;
    (hash ^ hash >> 8) as u8
}

/// What serves one pair of a port.
pub struct SwitchPair {
    port: Arc<Port>,
    pair: usize,
}

impl SwitchPair {
    /// For a pair that the port has.
    pub fn new(port: Arc<Port>, pair: usize) -> Self {
        Self { port, pair }
    }

    /// Buffers that it has of the receive queue wait in that, for whoever serves it from now on. Gives the oldest frame
    /// that waits when it is known to be wanted; the others are to be read.
    pub fn hand_over(&self) -> Option<(Header, Vec<u8>)> {
        let mut rx = lock(&self.lane().rx);
        let mut receive = self.lane().pair.receive.lock();
        let chains = rx.receiver.hand_over();
        if let Some(running) = receive.as_mut().filter(|_| rx.run == self.lane().pair.receive.run()) {
            running.left.extend(chains);
        }
        if rx.backlog.wanted {
            rx.backlog.take_first()
        } else {
            None
        }
    }

    /// These hold for it from now on: see `Port`.
    pub fn set_rules(&self, rules: Rules) {
        self.port.set_rules(self.pair, rules);
    }

    fn lane(&self) -> &Lane {
        &self.port.lanes[self.pair]
    }
}

impl Engine for SwitchPair {
    fn turn(&self, ask: bool) -> Turn {
        let mut turn = Turn::default();
        for _ in 0..BUDGET {
            let mut after = After::default();
            let drained = self.port.drain(self.pair, ask, &mut after);
            let (sent, full) = self.port.transmit(self.pair, ask, &mut after);
            let heavy = after.heavy;
            after.settle();
            let worked = drained || sent;
            turn.worked |= worked;
            // With `ask`, notifications come when a look has found nothing, and not before.
            turn.more = full || (ask && worked);
            if !turn.more || heavy {
                break;
            }
        }
        turn
    }

    fn settle(&self, _timeout: Duration) -> bool {
        // Held for a batch, of this pair's worker or of another's: one that began before the queues were held is over.
        drop(lock(&self.lane().tx));
        drop(lock(&self.lane().rx));
        true
    }

    fn forget(&self) {
        self.set_rules(Rules::default());
        lock(&self.lane().rx).receiver.reset();
        self.outbox().forget();
    }

    fn outbox(&self) -> &Outbox {
        &self.lane().outbox
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.lane().counters.get()
    }

    fn failed(&self, reason: &str) {
        let Pair { receive, transmit, .. } = &self.lane().pair;
        for (queue, of) in [(RECEIVE, receive), (TRANSMIT, transmit)] {
            self.outbox().fault(of.fail(), Fault { queue, name: "engine-error", detail: reason.to_owned() });
        }
    }
}
