//! A network device behind which is a tap: a queue of it for each pair of queues.
//!
//! What a driver sends is written to the tap straight from its memory, behind a header of our own. What the tap has is
//! read only as long as the driver gives buffers, so that frames wait in the kernel, which tells its stack about it; it
//! is copied once more, as a frame shows only when it is read whether the driver wants it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vbus_ring::ring::{Burst, Piece};
use vbus_ring::signal::Notify;

use crate::net::{
    answer, count, packet, takes, wrong, Backlog, Counters, Fields, Frame, Header, Laid, Packet, Receiver, Rules,
};
use crate::net::{HEADER, LONGEST};
use crate::outbox::{Fault, Outbox};
use crate::queue::{Queue, Running};
use crate::worker::{Engine, Turn};

/// Frames that are shown together.
const BATCH: usize = 32;
/// Batches of a turn.
const BUDGET: usize = 8;
/// The engine's queues, as faults name them.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Parts that one system call takes.
const IOV_MAX: usize = 1024;

struct State {
    rules: Rules,
    /// The tap's queue.
    fd: Option<OwnedFd>,
    /// Whether there is no tap any more.
    gone: bool,
    sent: Burst,
    written: Vec<u32>,
    run: u64,
    receiver: Receiver,
    /// What was read and found too few buffers: one frame.
    kept: Backlog,
    packet: Vec<u8>,
}

/// The engine of one pair.
pub struct Tap {
    receive: Arc<Queue>,
    transmit: Arc<Queue>,
    state: Mutex<State>,
    /// What becomes readable.
    watched: RawFd,
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
    /// Whether everything was read that the tap has, and there are buffers for more.
    watch: bool,
    notify: Vec<Arc<dyn Notify>>,
    faults: Vec<(u64, Fault)>,
    stopped: Vec<Running>,
    error: Option<io::Error>,
}

impl Tap {
    /// For a pair of queues. `fd`: the tap's queue, which does not block, and has headers of 12 little-endian bytes.
    /// `signal`: tells the device model that there is something in the outbox.
    pub fn new(receive: Arc<Queue>, transmit: Arc<Queue>, fd: OwnedFd, signal: Arc<dyn Notify>) -> Self {
        let watched = fd.as_raw_fd();
        let state = State {
            rules: Rules::default(),
            sent: Burst::default(),
            written: Vec::new(),
            run: 0,
            receiver: Receiver::default(),
            kept: Backlog::default(),
            // One byte more shows that a frame is longer than any.
            packet: vec![0; HEADER + LONGEST as usize + 1],
            fd: Some(fd),
            gone: false,
        };
        let (counters, outbox) = (Counters::default(), Outbox::new(signal));
        Self { receive, transmit, state: Mutex::new(state), watched, counters, outbox }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change under this lock is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These hold from now on: no frame goes by others when this returns.
    pub fn set_rules(&self, rules: Rules) {
        self.lock().rules = rules;
    }

    /// Let go of the tap. Once no worker has this engine any more.
    pub fn close(&self) {
        let fd = self.lock().fd.take();
        drop(fd);
    }

    /// Buffers that it has of the receive queue wait in that, for whoever serves it from now on. Gives the frame that
    /// waits for more of them.
    pub fn hand_over(&self) -> Option<(Header, Vec<u8>)> {
        let mut state = self.lock();
        let mut receive = self.receive.lock();
        let chains = state.receiver.hand_over();
        if let Some(running) = receive.as_mut().filter(|_| state.run == self.receive.run()) {
            running.left.extend(chains);
        }
        state.kept.take_first()
    }

    fn batch(&self, ask: bool) -> After {
        let mut after = After::default();
        let mut state = self.lock();
        self.fill(&mut state, ask, &mut after);
        self.send(&mut state, ask, &mut after);
        if after.error.is_some() {
            state.gone = true;
        }
        after
    }

    /// Give the driver what the tap has, as far as there are buffers.
    fn fill(&self, state: &mut State, ask: bool, after: &mut After) {
        let mut receive = self.receive.serve();
        if state.run != self.receive.run() {
            state.run = self.receive.run();
            state.receiver.reset();
        }
        let Some(running) = receive.as_mut() else { return };
        let mut fault = None;
        if !self.receive.held() && state.rules.in_use {
            fault = self.read_batch(state, running, ask, after).err();
        }
        // Whatever went wrong, what was laid into buffers is the driver's.
        match state.receiver.show(running) {
            Ok((notify, chains, bytes)) => {
                self.receive.count(chains, 0, bytes);
                after.notify.extend(notify.then(|| running.signal.clone()));
            }
            Err(violation) => fault = Some(Fault::of(RECEIVE, &violation)),
        }
        if let Some(fault) = fault {
            after.stopped.extend(receive.take());
            after.faults.push((self.receive.run(), fault));
        }
    }

    fn read_batch(&self, state: &mut State, running: &mut Running, ask: bool, after: &mut After) -> Result<(), Fault> {
        let State { rules, fd, gone, receiver, kept, packet, .. } = state;
        let counters = &self.counters;
        for index in 0..BATCH {
            let more = (BATCH - index, ask);
            if let Some(packet) = kept.first() {
                if receiver.put(running, packet, more, kept.wanted, rules, counters)? == Laid::Done {
                    kept.pop();
                    after.worked = true;
                    continue;
                }
                return Ok(());
            }
            let Some(fd) = fd.as_ref().filter(|_| !*gone) else { return Ok(()) };
            if !receiver.has_room(running, more.0, ask)? {
                return Ok(());
            }
            let size = match read(fd.as_raw_fd(), packet) {
                Ok(Some(size)) => size,
                Ok(None) => {
                    after.watch = true;
                    return Ok(());
                }
                Err(error) => {
                    after.error = Some(error);
                    return Ok(());
                }
            };
            after.worked = true;
            let Some(header) = admitted(&packet[..size], rules) else {
                count(&counters.rx_dropped, 1);
                continue;
            };
            let frame = &packet[HEADER..size];
            let packet = Packet { header, frame: Frame::Bytes(frame), size: frame.len() as u64 };
            let laid = receiver.put(running, packet, more, false, rules, counters)?;
            if laid != Laid::Done {
                // There is room for one.
                kept.push(packet);
                kept.wanted = laid == Laid::Wanted;
                return Ok(());
            }
        }
        after.full = true;
        Ok(())
    }

    /// Give the tap what the driver has for it.
    fn send(&self, state: &mut State, ask: bool, after: &mut After) {
        let mut transmit = self.transmit.serve();
        let Some(running) = transmit.as_mut().filter(|_| !self.transmit.held()) else { return };
        let mut fault = self.write_batch(state, running, ask, after).err();
        let State { sent, written, .. } = state;
        after.worked |= !sent.is_empty();
        after.full |= sent.len() == BATCH;
        match answer(&self.transmit, running, sent, written) {
            Ok(signal) => after.notify.extend(signal),
            Err(violation) => fault = Some(Fault::of(TRANSMIT, &violation)),
        }
        written.clear();
        sent.clear();
        if let Some(fault) = fault {
            after.stopped.extend(transmit.take());
            after.faults.push((self.transmit.run(), fault));
        }
    }

    fn write_batch(&self, state: &mut State, running: &mut Running, ask: bool, after: &mut After) -> Result<(), Fault> {
        let State { rules, fd, gone, sent, written, .. } = state;
        let counters = &self.counters;
        running.ring.burst(BATCH, sent, ask).map_err(|violation| Fault::of(TRANSMIT, &violation))?;
        for chain in 0..sent.len() {
            let (header, pieces, size) = packet(sent, chain, TRANSMIT)?;
            written.push(0);
            if let Some(counter) = wrong(header, size, rules, counters) {
                count(counter, 1);
                continue;
            }
            let Some(fd) = fd.as_ref().filter(|_| rules.link && !*gone && after.error.is_none()) else {
                count(&counters.tx_dropped, 1);
                continue;
            };
            match write(fd.as_raw_fd(), Fields::of(header).header(), pieces) {
                Ok(()) => {
                    count(&counters.tx_packets, 1);
                    count(&counters.tx_bytes, size);
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINVAL | libc::EMSGSIZE) => count(&counters.refused, 1),
                    // An interface that an operator has set down, or a kernel without memory.
                    Some(libc::EIO | libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => count(&counters.tx_dropped, 1),
                    _ => {
                        count(&counters.tx_dropped, 1);
                        after.error = Some(error);
                    }
                },
            }
        }
        Ok(())
    }
}

/// What a packet's header tells the driver; None when the driver does not get it.
fn admitted(packet: &[u8], rules: &Rules) -> Option<Header> {
    let words = packet.get(..HEADER)?;
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| words[at + byte]));
    let header = [word(0), word(4), word(8)];
    // What was in the tap before the driver's choice is as it was.
    let fits = (packet.len() - HEADER) as u64 <= LONGEST && rules.link && takes(rules, header);
    let flags = if rules.guest_csum { header[0] } else { header[0] & !0xff };
    fits.then_some([flags, header[1], header[2]])
}

/// The next packet; None when there is none now.
fn read(fd: RawFd, into: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        // SAFETY: as many bytes may be written there.
        let size = unsafe { libc::read(fd, into.as_mut_ptr().cast(), into.len()) };
        if size >= 0 {
            return Ok(Some(size as usize));
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock => return Ok(None),
            io::ErrorKind::Interrupted => (),
            _ => return Err(error),
        }
    }
}

/// Write a frame, which is behind a header in these pieces, behind another.
fn write(fd: RawFd, header: Header, pieces: &[Piece]) -> io::Result<()> {
    let mut bytes = [0; HEADER];
    for (bytes, word) in bytes.chunks_exact_mut(4).zip(header) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let part = |at: *const u8, size: usize| libc::iovec { iov_base: at.cast_mut().cast(), iov_len: size };
    let mut parts = [part(bytes.as_ptr(), HEADER); 8];
    let (mut many, mut copy) = (Vec::new(), Vec::new());
    let frame = Frame::Pieces(pieces);
    let mut count = 1;
    frame.each(|at, size| {
        if let Some(place) = parts.get_mut(count) {
            *place = part(at, size);
        } else if count < IOV_MAX {
            if many.is_empty() {
                many.extend_from_slice(&parts);
            }
            many.push(part(at, size));
        }
        count += 1;
    });
    let parts = if count <= parts.len() {
        &parts[..count]
    } else if count <= IOV_MAX {
        &many[..]
    } else {
        copy.extend_from_slice(&bytes);
        frame.copy(&mut copy);
        &[part(copy.as_ptr(), copy.len())][..]
    };
    loop {
        // SAFETY: the parts are valid for as long as the pieces are; what cannot be read there is EFAULT.
        if unsafe { libc::writev(fd, parts.as_ptr(), parts.len() as libc::c_int) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl Engine for Tap {
    fn begin(&self) -> Option<RawFd> {
        Some(self.watched)
    }

    fn turn(&self, ask: bool) -> Turn {
        let mut turn = Turn::default();
        for _ in 0..BUDGET {
            let After { worked, full, watch, notify, faults, stopped, error } = self.batch(ask);
            for signal in notify {
                signal.notify();
            }
            drop(stopped);
            for (run, fault) in faults {
                self.outbox.fault(run, fault);
            }
            if let Some(errno) = error.and_then(|error| error.raw_os_error()) {
                self.outbox.error(errno);
            }
            turn.worked |= worked;
            turn.watch = watch;
            // With `ask`, notifications come when a look has found nothing, and not before.
            turn.more = full || (ask && worked);
            if !turn.more {
                break;
            }
        }
        turn
    }

    fn settle(&self, _timeout: Duration) -> bool {
        // Held for a batch: one that began before the queues were held is over.
        drop(self.lock());
        true
    }

    fn forget(&self) {
        let mut state = self.lock();
        count(&self.counters.rx_dropped, state.kept.len() as u64);
        state.kept.clear();
        state.receiver.reset();
        state.rules = Rules::default();
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
