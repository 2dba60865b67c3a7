//! A network device that is plugged into itself: what is sent on a pair of queues comes back on it.
//!
//! A frame is copied once, from the buffer that it was sent in to one that is to be received in. Only what finds no
//! buffer there is copied twice, and kept for a while.

use std::collections::VecDeque;
use std::sync::atomic::{fence, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vbus_ring::ring::{Burst, Shown, HEAVY};
use vbus_ring::signal::Notify;

use crate::net::{
    count, count_answered, packet, wrong, Backlog, Counters, Frame, Header, Laid, Packet, Receiver, Rules,
};
use crate::outbox::{Fault, Outbox};
use crate::queue::{Queue, Running};
use crate::worker::{Engine, Turn};

/// Frames that are shown together.
const BATCH: usize = 16;
/// Batches of a turn.
const BUDGET: usize = 16;
/// The engine's queues, as faults name them.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

#[derive(Default)]
struct State {
    rules: Rules,
    sent: Burst,
    /// The run of the receive queue that the buffers at hand are of.
    run: u64,
    receiver: Receiver,
    backlog: Backlog,
    written: Vec<u32>,
}

impl State {
    /// Nothing is to be done: hold on to no memory that its driver may take back.
    fn rest(&mut self) {
        self.sent.clear();
        self.receiver.rest();
    }
}

/// The engine of one pair.
pub struct Loopback {
    receive: Arc<Queue>,
    transmit: Arc<Queue>,
    state: Mutex<State>,
    /// What it counted.
    pub counters: Counters,
    /// What its device model hears of.
    pub outbox: Outbox,
}

/// What a batch leaves to be done without locks.
#[derive(Default)]
struct After {
    worked: bool,
    full: bool,
    notify: [Option<Arc<dyn Notify>>; 2],
    /// With the run of its queue.
    fault: Option<(u64, Fault)>,
    /// Whether it took long, as batches go.
    heavy: bool,
}

impl Loopback {
    /// For a pair of queues. `signal`: tells the device model that there is something in the outbox.
    pub fn new(receive: Arc<Queue>, transmit: Arc<Queue>, signal: Arc<dyn Notify>) -> Self {
        let (counters, outbox) = (Counters::default(), Outbox::new(signal));
        Self { receive, transmit, state: Mutex::default(), counters, outbox }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These hold from now on: no frame goes by others when this returns.
    pub fn set_rules(&self, rules: Rules) {
        self.lock().rules = rules;
    }

    /// Everything that it keeps of its queues, when others serve them: buffers wait for those in the queue. Gives the
    /// frames that wait, oldest first, and whether the oldest is known to be wanted.
    pub fn hand_over(&self) -> (bool, VecDeque<(Header, Vec<u8>)>) {
        let mut state = self.lock();
        let mut receive = self.receive.lock();
        let chains = state.receiver.hand_over();
        if let Some(running) = receive.as_mut().filter(|_| state.run == self.receive.run()) {
            running.left.extend(chains);
        }
        state.backlog.take()
    }

    fn batch(&self, ask: bool) -> After {
        let mut state = self.lock();
        let mut receive = self.receive.serve();
        let mut transmit = self.transmit.serve();
        let mut after = After::default();
        let state = &mut *state;
        if state.run != self.receive.run() {
            state.run = self.receive.run();
            state.receiver.reset();
        }
        let room = receive.as_mut().filter(|_| !self.receive.held());
        let result = self.exchange(state, room, transmit.as_mut().filter(|_| !self.transmit.held()), ask, &mut after);
        // Whatever went wrong, what was laid into buffers is the driver's. Both rings show theirs, at the price of one fence.
        let State { sent, receiver, written, .. } = state;
        let mut shown = [None; 2];
        let mut fault = result.err();
        if let Some(running) = receive.as_mut() {
            match receiver.show_unfenced(running) {
                Ok(some) => shown[RECEIVE] = Some(some),
                Err(violation) => fault = Some(Fault::of(RECEIVE, &violation)),
            }
        }
        if let Some(Running { ring, .. }) = transmit.as_mut().filter(|_| !written.is_empty()) {
            match ring.show_burst(sent, 0, written) {
                Ok(some) => shown[TRANSMIT] = Some(some),
                Err(violation) => fault = Some(Fault::of(TRANSMIT, &violation)),
            }
        }
        if shown.iter().flatten().any(|shown| *shown != Shown::Nothing) {
            fence(Ordering::SeqCst);
        }
        if let (Some(running), Some(shown)) = (receive.as_mut(), shown[RECEIVE]) {
            match receiver.say(running, shown) {
                Ok((notify, chains, bytes)) => {
                    self.receive.count(chains, 0, bytes);
                    after.notify[RECEIVE] = notify.then(|| running.signal.clone());
                }
                Err(violation) => fault = Some(Fault::of(RECEIVE, &violation)),
            }
        }
        if let (Some(Running { ring, signal, .. }), Some(shown)) = (transmit.as_mut(), shown[TRANSMIT]) {
            match ring.say_burst(shown, sent, 0, written) {
                Ok(notify) => {
                    count_answered(&self.transmit, sent, written);
                    after.notify[TRANSMIT] = notify.then(|| signal.clone());
                }
                Err(violation) => fault = Some(Fault::of(TRANSMIT, &violation)),
            }
        }
        written.clear();
        sent.reuse();
        after.fault = fault.map(|fault| {
            // At once: the driver is told by whoever hears of the fault.
            let (queue, current) =
                if fault.queue == RECEIVE { (&self.receive, &mut receive) } else { (&self.transmit, &mut transmit) };
            let (stopped, run) = (current.take(), queue.run());
            drop((receive, transmit));
            drop(stopped);
            (run, fault)
        });
        after
    }

    /// Frames that waited first, then those that come now.
    fn exchange(
        &self,
        state: &mut State,
        mut receive: Option<&mut Running>,
        transmit: Option<&mut Running>,
        ask: bool,
        after: &mut After,
    ) -> Result<(), Fault> {
        let State { rules, sent, receiver, backlog, written, .. } = state;
        let counters = &self.counters;
        if let Some(running) = receive.as_mut().filter(|_| rules.in_use) {
            for _ in 0..BATCH {
                let Some(frame) = backlog.first() else { break };
                let more = (backlog.len().min(BATCH), ask);
                if !receiver.has_room(running, more.0, ask)? {
                    break;
                }
                let wanted = backlog.wanted;
                if !rules.link && !wanted {
                    count(&counters.rx_dropped, 1);
                } else {
                    let laid = receiver.put(running, frame, more, wanted, rules, counters)?;
                    if laid != Laid::Done {
                        backlog.wanted |= laid == Laid::Wanted;
                        break;
                    }
                }
                after.worked = true;
                backlog.pop();
            }
        }
        let Some(running) = transmit else { return Ok(()) };
        running.ring.burst(BATCH, sent, ask).map_err(|violation| Fault::of(TRANSMIT, &violation))?;
        let taken = sent.len();
        after.worked |= taken > 0;
        after.full = taken == BATCH;
        let (mut packets, mut bytes, mut answered) = (0, 0, 0);
        let mut result = Ok(());
        while answered < taken {
            if backlog.is_empty() && receive.is_some() {
                let (frames, size) = receiver.put_whole(sent, answered, rules, counters);
                answered += frames as usize;
                packets += frames;
                bytes += size;
                if answered == taken {
                    break;
                }
            }
            let chain = answered;
            let (header, pieces, size) = match packet(sent, chain, TRANSMIT) {
                Ok(packet) => packet,
                Err(fault) => {
                    result = Err(fault);
                    break;
                }
            };
            answered += 1;
            if let Some(counter) = wrong(header, size, rules, counters) {
                count(counter, 1);
                continue;
            }
            if !rules.link {
                count(&counters.tx_dropped, 1);
                continue;
            }
            packets += 1;
            bytes += size;
            let packet = Packet::finished(Frame::Pieces(pieces), size);
            let mut wanted = false;
            if backlog.is_empty() {
                if let Some(running) = &mut receive {
                    // Notifications of buffers are for frames that wait.
                    let more = (taken - chain, false);
                    match receiver.put(running, packet, more, false, rules, counters) {
                        Ok(Laid::Done) => continue,
                        Ok(laid) => wanted = laid == Laid::Wanted,
                        Err(fault) => {
                            result = Err(fault);
                            receive = None;
                        }
                    }
                }
            }
            // With a frame that waits, another turn asks to be notified of buffers.
            after.full = true;
            if !backlog.push(packet) {
                count(&counters.rx_dropped, 1);
            }
            backlog.wanted |= wanted;
        }
        written.resize(answered, 0);
        count(&counters.tx_packets, packets);
        count(&counters.tx_bytes, bytes);
        after.heavy = sent.weight() >= HEAVY;
        result
    }
}

impl Engine for Loopback {
    fn turn(&self, ask: bool) -> Turn {
        let mut turn = Turn::default();
        for _ in 0..BUDGET {
            let After { worked, full, notify, fault, heavy } = self.batch(ask);
            for signal in notify.into_iter().flatten() {
                signal.notify();
            }
            if let Some((run, fault)) = fault {
                self.outbox.fault(run, fault);
            }
            if !worked {
                self.lock().rest();
            }
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
        // Held for a batch: one that began before the queues were held is over.
        self.lock().rest();
        true
    }

    fn forget(&self) {
        let mut state = self.lock();
        count(&self.counters.rx_dropped, state.backlog.take().1.len() as u64);
        state.receiver.reset();
        state.rest();
        drop(state);
        self.outbox.forget();
    }

    fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.get()
    }

    fn failed(&self, reason: &str) {
        for (queue, of) in [(RECEIVE, &self.receive), (TRANSMIT, &self.transmit)] {
            self.outbox.fault(of.fail(), Fault { queue, name: "engine-error", detail: reason.to_owned() });
        }
    }
}
