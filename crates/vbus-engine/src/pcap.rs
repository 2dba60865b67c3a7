//! A network device that writes what is sent to a file, for people to look at; nothing comes from it.
//!
//! A burst of frames is copied, each behind the header of a record, and written to the file at once; then it is given
//! back. The driver's memory and its ring are nobody's to wait for meanwhile: a file system may take its time, or never
//! answer. Whoever stops the queue waits for the end of it (`settle`), and for no longer than it wants to.
//!
//! All pairs of a device have one file.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vbus_ring::ring::{Burst, HEAVY};
use vbus_ring::signal::Notify;

use crate::net::{answer, count, packet, wrong, Counters, Frame, Rules};
use crate::outbox::{Fault, Outbox};
use crate::queue::Queue;
use crate::recording::{Recording, Records, Written};
use crate::worker::{Engine, Turn};

/// Frames that are written together. With `LONGEST`, what there may be to write at a time: four mebibytes.
const BATCH: usize = 64;
/// Batches of a turn.
const BUDGET: usize = 8;
/// The engine's queues, as faults name them.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// What a batch needs, kept for its allocations.
#[derive(Default)]
struct Work {
    sent: Burst,
    records: Records,
    written: Vec<u32>,
}

/// The engine of one pair.
pub struct Pcap {
    receive: Arc<Queue>,
    transmit: Arc<Queue>,
    file: Arc<Recording>,
    rules: Mutex<Rules>,
    /// Of whoever has a turn.
    work: Mutex<Work>,
    /// Whether a batch was taken and not given back. True only from within the queue's lock.
    busy: Mutex<bool>,
    settled: Condvar,
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
    heavy: bool,
    notify: Option<Arc<dyn Notify>>,
    /// With the run of the queue.
    fault: Option<(u64, Fault)>,
    errno: Option<i32>,
}

/// Nothing is under way any more, however that came about.
struct UnderWay<'a>(&'a Pcap);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        *self.0.busy() = false;
        self.0.settled.notify_all();
    }
}

impl Pcap {
    /// For a pair of queues. `signal`: tells the device model that there is something in the outbox.
    pub fn new(receive: Arc<Queue>, transmit: Arc<Queue>, file: Arc<Recording>, signal: Arc<dyn Notify>) -> Self {
        Self {
            receive,
            transmit,
            file,
            rules: Mutex::default(),
            work: Mutex::default(),
            busy: Mutex::default(),
            settled: Condvar::new(),
            counters: Counters::default(),
            outbox: Outbox::new(signal),
        }
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn busy(&self) -> MutexGuard<'_, bool> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These hold from now on: no frame is looked at by others when this returns.
    pub fn set_rules(&self, rules: Rules) {
        *self.rules() = rules;
    }

    /// Others serve its queues: all that it has taken is in the file when this returns, before what they write.
    pub fn hand_over(&self) {
        drop(self.transmit.lock());
        drop(self.settled.wait_while(self.busy(), |busy| *busy).unwrap_or_else(PoisonError::into_inner));
    }

    fn batch(&self, ask: bool) -> After {
        let mut after = After::default();
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        // One that panicked has left something.
        let Work { sent, records, written } = &mut *work;
        sent.clear();
        records.clear();
        written.clear();
        let (run, mut fault) = {
            let mut transmit = self.transmit.serve();
            let Some(running) = transmit.as_mut().filter(|_| !self.transmit.held()) else { return after };
            *self.busy() = true;
            let taken = running.ring.burst(BATCH, sent, ask).map_err(|violation| Fault::of(TRANSMIT, &violation));
            (self.transmit.run(), taken.and_then(|()| self.lay(sent, records, written)).err())
        };
        let _under_way = UnderWay(self);
        after.worked = !sent.is_empty();
        after.full = sent.len() == BATCH;
        after.heavy = sent.weight() >= HEAVY;
        if !records.is_empty() {
            let Written { records: kept, error } = self.file.record(records);
            count(&self.counters.tx_packets, kept as u64);
            count(&self.counters.tx_bytes, records.frame_bytes(kept));
            count(&self.counters.tx_dropped, (records.len() - kept) as u64);
            after.errno = error.and_then(|error| error.raw_os_error());
        }
        if written.is_empty() && fault.is_none() {
            return after;
        }
        let mut transmit = self.transmit.serve();
        let mut stopped = None;
        // Of another run it is nobody's any more.
        if let Some(running) = transmit.as_mut().filter(|_| self.transmit.run() == run) {
            match answer(&self.transmit, running, sent, written) {
                Ok(signal) => after.notify = signal,
                Err(violation) => fault = Some(Fault::of(TRANSMIT, &violation)),
            }
            if let Some(fault) = fault {
                stopped = transmit.take();
                after.fault = Some((run, fault));
            }
        }
        drop(transmit);
        drop(stopped);
        // Nothing of the driver's memory is kept mapped for the next batch.
        sent.clear();
        after
    }

    /// Copy what is to be written of frames. Before one that breaks a rule of the queue, all are handled.
    fn lay(&self, sent: &Burst, records: &mut Records, written: &mut Vec<u32>) -> Result<(), Fault> {
        let (rules, counters) = (self.rules(), &self.counters);
        for chain in 0..sent.len() {
            let (header, pieces, size) = packet(sent, chain, TRANSMIT)?;
            written.push(0);
            if let Some(counter) = wrong(header, size, &rules, counters) {
                count(counter, 1);
            } else if !rules.link {
                count(&counters.tx_dropped, 1);
            } else {
                // No longer than `LONGEST`.
                records.push(Frame::Pieces(pieces), size as u32);
            }
        }
        Ok(())
    }
}

impl Engine for Pcap {
    fn turn(&self, ask: bool) -> Turn {
        let mut turn = Turn::default();
        for _ in 0..BUDGET {
            let After { worked, full, heavy, notify, fault, errno } = self.batch(ask);
            if let Some(signal) = notify {
                signal.notify();
            }
            if let Some(errno) = errno {
                self.outbox.error(errno);
            }
            if let Some((run, fault)) = fault {
                self.outbox.fault(run, fault);
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

    fn settle(&self, timeout: Duration) -> bool {
        // Held while a batch is taken: one that began before the queue was held shows.
        drop(self.transmit.lock());
        let waited = self.settled.wait_timeout_while(self.busy(), timeout, |busy| *busy);
        let (busy, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !*busy
    }

    fn forget(&self) {
        *self.rules() = Rules::default();
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
