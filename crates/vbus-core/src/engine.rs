//! The Python face of workers and engines: made, told what holds, and asked what happened. Nothing here runs for a
//! request.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use vbus_engine::net::{Filter, Rules};
use vbus_engine::queue::Queue;
use vbus_engine::worker::{self, Polling, PRIORITIES};
use vbus_engine::{blk, loopback};

use crate::doorbell::Doorbell;
use crate::request::Request;
use crate::ring::DeviceQueue;
use crate::signal::Signal;
use crate::violation::{named, os_error};

/// A native thread that gives engines their turns; it never takes the interpreter's lock.
#[pyclass(frozen, module = "vbus._core")]
pub struct Worker(worker::Worker);

#[pymethods]
impl Worker {
    #[new]
    #[pyo3(signature = (name, *, polling = "notified", cpus = vec![]))]
    fn new(py: Python<'_>, name: &str, polling: &str, cpus: Vec<usize>) -> PyResult<Self> {
        let polling = match polling {
            "notified" => Polling::Notified,
            "adaptive" => Polling::Adaptive,
            "always" => Polling::Always,
            _ => return Err(PyValueError::new_err("polling is notified, adaptive or always")),
        };
        let started = py.detach(|| worker::Worker::start(name, polling, &cpus));
        started.map(Self).map_err(|error| os_error(py, error))
    }

    #[pyo3(signature = (engine, priority = 0))]
    fn add(&self, engine: PyRef<'_, Engine>, priority: u32) -> PyResult<Task> {
        if priority as usize >= PRIORITIES {
            return Err(PyValueError::new_err(format!("priority {priority} is out of range: 0 to 7")));
        }
        Ok(Task(self.0.add(engine.engine.clone(), priority)))
    }

    #[getter]
    fn tasks(&self) -> usize {
        self.0.tasks()
    }

    #[getter]
    fn counters(&self) -> (u64, u64, u64) {
        let [turns, idle_turns, sleeps] = self.0.counters();
        (turns, idle_turns, sleeps)
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

/// An engine at its worker.
#[pyclass(frozen, module = "vbus._core")]
pub struct Task(pub Arc<worker::Task>);

#[pymethods]
impl Task {
    fn mark(&self) {
        self.0.mark();
    }

    fn set_priority(&self, priority: u32) {
        self.0.set_priority(priority);
    }

    fn listen(&self, py: Python<'_>, doorbell: PyRef<'_, Doorbell>) -> PyResult<()> {
        self.0.listen(&doorbell.0).map_err(|error| os_error(py, error))
    }

    fn ignore(&self, doorbell: PyRef<'_, Doorbell>) {
        self.0.ignore(&doorbell.0);
    }

    fn remove(&self, py: Python<'_>) {
        py.detach(|| self.0.remove());
    }
}

/// What serves queues natively.
#[pyclass(frozen, subclass, module = "vbus._core")]
pub struct Engine {
    engine: Arc<dyn worker::Engine>,
    queues: Vec<Arc<Queue>>,
}

#[pymethods]
impl Engine {
    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, count) in self.engine.counters() {
            counters.set_item(name, count)?;
        }
        Ok(counters)
    }

    fn faults<'py>(&self, py: Python<'py>) -> PyResult<Vec<(usize, Bound<'py, PyAny>)>> {
        let faults = self.engine.outbox().faults().into_iter();
        let current = faults.filter(|(run, fault)| self.queues[fault.queue].run() == *run);
        current.map(|(_, fault)| Ok((fault.queue, named(py, fault.name, &fault.detail)?))).collect()
    }

    fn errors(&self) -> Vec<i32> {
        self.engine.outbox().errors()
    }

    fn requests(&self, limit: usize) -> Vec<(usize, Request)> {
        let requests = self.engine.outbox().requests(limit);
        let request = |(queue, run, chain)| {
            let of: &Arc<Queue> = &self.queues[queue];
            (queue, Request::own(chain, of.clone(), run))
        };
        requests.into_iter().map(request).collect()
    }

    fn settle(&self, py: Python<'_>, timeout: f64) -> PyResult<bool> {
        let timeout = Duration::try_from_secs_f64(timeout).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(py.detach(|| self.engine.settle(timeout)))
    }

    fn end(&self, py: Python<'_>) {
        py.detach(|| self.engine.end());
    }

    fn forget(&self, py: Python<'_>) {
        py.detach(|| self.engine.forget());
    }
}

/// Gives back on a pair of queues what was sent on it.
#[pyclass(frozen, extends = Engine, module = "vbus._core")]
pub struct LoopbackEngine(Arc<loopback::Loopback>);

#[pymethods]
impl LoopbackEngine {
    #[new]
    fn new(
        receive: PyRef<'_, DeviceQueue>,
        transmit: PyRef<'_, DeviceQueue>,
        signal: PyRef<'_, Signal>,
    ) -> PyClassInitializer<Self> {
        let queues = vec![receive.shared.clone(), transmit.shared.clone()];
        let engine = Arc::new(loopback::Loopback::new(queues[0].clone(), queues[1].clone(), signal.0.clone()));
        PyClassInitializer::from(Engine { engine: engine.clone(), queues }).add_subclass(Self(engine))
    }

    fn hand_over<'py>(&self, py: Python<'py>) -> (bool, Vec<Bound<'py, PyBytes>>) {
        let (wanted, frames) = py.detach(|| self.0.hand_over());
        (wanted, frames.iter().map(|frame| PyBytes::new(py, frame)).collect())
    }

    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (
        *, link, in_use, merge, csum, host_kinds, promiscuous, told, modes, mac, unicast, multicast, vlans
    ))]
    fn set_rules(
        &self,
        py: Python<'_>,
        link: bool,
        in_use: bool,
        merge: bool,
        csum: bool,
        host_kinds: Vec<u8>,
        promiscuous: bool,
        told: bool,
        modes: Vec<String>,
        mac: [u8; 6],
        unicast: Vec<[u8; 6]>,
        multicast: Vec<[u8; 6]>,
        vlans: Option<Vec<u16>>,
    ) {
        let has = |mode: &str| modes.iter().any(|other| other == mode);
        let filter = Filter {
            promiscuous,
            told,
            all_unicast: has("ALLUNI"),
            all_multicast: has("ALLMULTI"),
            no_unicast: has("NOUNI"),
            no_multicast: has("NOMULTI"),
            no_broadcast: has("NOBCAST"),
            mac,
            unicast: unicast.into_iter().collect(),
            multicast: multicast.into_iter().collect(),
            vlans: vlans.map(|vlans| vlans.into_iter().collect()),
        };
        let rules = Rules { link, in_use, merge, csum, host_kinds, filter };
        py.detach(|| self.0.set_rules(rules));
    }
}

/// Reads, writes and flushes of a disk, by io_uring.
#[pyclass(frozen, extends = Engine, module = "vbus._core")]
pub struct BlkEngine(Arc<blk::Blk>);

#[pymethods]
impl BlkEngine {
    #[new]
    fn new(
        py: Python<'_>,
        queue: PyRef<'_, DeviceQueue>,
        fd: RawFd,
        signal: PyRef<'_, Signal>,
    ) -> PyResult<PyClassInitializer<Self>> {
        if fd < 0 {
            return Err(os_error(py, std::io::Error::from_raw_os_error(libc::EBADF)));
        }
        // SAFETY: borrowed for this call only, and a closed descriptor gives EBADF.
        let own: std::io::Result<OwnedFd> = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
        let queues = vec![queue.shared.clone()];
        let made = own.and_then(|fd| blk::Blk::new(queues[0].clone(), fd, signal.0.clone()));
        let engine = Arc::new(made.map_err(|error| os_error(py, error))?);
        Ok(PyClassInitializer::from(Engine { engine: engine.clone(), queues }).add_subclass(Self(engine)))
    }

    #[staticmethod]
    fn permitted(py: Python<'_>) -> PyResult<()> {
        py.detach(blk::permitted).map_err(|error| os_error(py, error))
    }

    fn set(&self, capacity: u64, read_only: bool, through: bool, flush: bool) {
        let settings = &self.0.settings;
        settings.capacity.store(capacity, Ordering::Release);
        settings.read_only.store(read_only, Ordering::Release);
        settings.through.store(through, Ordering::Release);
        settings.flush.store(flush, Ordering::Release);
    }
}
