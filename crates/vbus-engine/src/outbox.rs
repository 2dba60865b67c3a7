//! What an engine has for the device model that it works for: what went wrong, and requests that it does not serve.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vbus_ring::ring::Chain;
use vbus_ring::signal::Notify;
use vbus_ring::violation::Violation;

/// Messages that an engine remembers of one kind.
const MOST: usize = 64;

/// What is wrong with a queue: a ring's violation, or one of the device's own rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which of the engine's queues.
    pub queue: usize,
    /// The stable name of the rule.
    pub name: &'static str,
    /// What was seen, for people.
    pub detail: String,
}

impl Fault {
    /// A ring's violation.
    pub fn of(queue: usize, violation: &Violation) -> Self {
        Self { queue, name: violation.name(), detail: violation.detail.clone() }
    }
}

#[derive(Default)]
struct Mail {
    /// Each with the run of its queue.
    faults: Vec<(u64, Fault)>,
    errors: Vec<i32>,
    /// Errors that were told already.
    told: BTreeSet<i32>,
    /// Requests, each with the queue and its run.
    requests: VecDeque<(usize, u64, Chain)>,
}

/// From an engine to its device model, which is told by a notification that there is something.
pub struct Outbox {
    mail: Mutex<Mail>,
    signal: Arc<dyn Notify>,
}

impl Outbox {
    /// Nothing yet.
    pub fn new(signal: Arc<dyn Notify>) -> Self {
        Self { mail: Mutex::default(), signal }
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is wrong with a run of a queue: it is stopped, or to be stopped behind the requests that wait here.
    pub fn fault(&self, run: u64, fault: Fault) {
        {
            let mut mail = self.lock();
            if mail.faults.len() < MOST {
                mail.faults.push((run, fault));
            }
        }
        self.signal.notify();
    }

    /// What is behind the device failed with this errno. Each is told once, until `forget`.
    pub fn error(&self, errno: i32) {
        {
            let mut mail = self.lock();
            if mail.told.len() >= MOST || !mail.told.insert(errno) {
                return;
            }
            mail.errors.push(errno);
        }
        self.signal.notify();
    }

    /// A request for the device model itself. There are no more of them than a ring has in flight.
    pub fn request(&self, queue: usize, run: u64, chain: Chain) {
        self.lock().requests.push_back((queue, run, chain));
        self.signal.notify();
    }

    /// What is wrong, since it was last asked, each with the run of the queue: what is wrong with one that is over is
    /// nothing to whoever drives the queue now.
    pub fn faults(&self) -> Vec<(u64, Fault)> {
        std::mem::take(&mut self.lock().faults)
    }

    /// Errors, since it was last asked.
    pub fn errors(&self) -> Vec<i32> {
        std::mem::take(&mut self.lock().errors)
    }

    /// The next requests, at most `limit`.
    pub fn requests(&self, limit: usize) -> Vec<(usize, u64, Chain)> {
        let mut mail = self.lock();
        let count = limit.min(mail.requests.len());
        mail.requests.drain(..count).collect()
    }

    /// Another driver begins.
    pub fn forget(&self) {
        let old = std::mem::take(&mut *self.lock());
        drop(old);
    }
}
