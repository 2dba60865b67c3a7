//! The Python face of workers and engines: made, told what holds, and asked what happened. Nothing here runs for a
//! request.

use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict};
use vbus_engine::net::{Filter, Header, Rules, ETHERNET, HEADER, LONGEST};
use vbus_engine::queue::Queue;
use vbus_engine::worker::{self, Polling, PRIORITIES};
use vbus_engine::{blk, loopback, pcap, recording, switch, tap};

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
    #[pyo3(signature = (name, *, polling = "notified", cpus = vec![], nice = 0))]
    fn new(py: Python<'_>, name: &str, polling: &str, cpus: Vec<usize>, nice: i32) -> PyResult<Self> {
        let polling = match polling {
            "notified" => Polling::Notified,
            "adaptive" => Polling::Adaptive,
            "always" => Polling::Always,
            _ => return Err(PyValueError::new_err("polling is notified, adaptive or always")),
        };
        let started = py.detach(|| worker::Worker::start_nice(name, polling, &cpus, nice));
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
    fn counters(&self) -> (u64, u64, u64, u64) {
        let [turns, idle_turns, sleeps, busy] = self.0.counters();
        (turns, idle_turns, sleeps, busy)
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

/// A descriptor of our own for what somebody else has open.
fn duplicate(fd: RawFd) -> std::io::Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: borrowed for this call only, and a closed descriptor gives EBADF.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
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

    fn set_rules(&self, py: Python<'_>, rules: PyRef<'_, NetRules>) {
        let rules = rules.0.clone();
        py.detach(|| self.0.set_rules(rules));
    }

    fn hand_over<'py>(&self, py: Python<'py>) -> (bool, Vec<Bound<'py, PyByteArray>>) {
        let (wanted, packets) = py.detach(|| self.0.hand_over());
        (wanted, packets.into_iter().map(|packet| whole(py, packet)).collect())
    }
}

/// A packet, its header before it.
fn whole(py: Python<'_>, (header, frame): (Header, Vec<u8>)) -> Bound<'_, PyByteArray> {
    let mut packet = Vec::with_capacity(HEADER + frame.len());
    packet.extend(header.iter().flat_map(|word| word.to_le_bytes()));
    packet.extend(frame);
    PyByteArray::new(py, &packet)
}

/// Serves a pair of queues with a queue of a tap.
#[pyclass(frozen, extends = Engine, module = "vbus._core")]
pub struct TapEngine(Arc<tap::Tap>);

#[pymethods]
impl TapEngine {
    #[new]
    fn new(
        py: Python<'_>,
        receive: PyRef<'_, DeviceQueue>,
        transmit: PyRef<'_, DeviceQueue>,
        fd: RawFd,
        signal: PyRef<'_, Signal>,
    ) -> PyResult<PyClassInitializer<Self>> {
        let own = duplicate(fd).map_err(|error| os_error(py, error))?;
        let queues = vec![receive.shared.clone(), transmit.shared.clone()];
        let engine = Arc::new(tap::Tap::new(queues[0].clone(), queues[1].clone(), own, signal.0.clone()));
        Ok(PyClassInitializer::from(Engine { engine: engine.clone(), queues }).add_subclass(Self(engine)))
    }

    fn set_rules(&self, py: Python<'_>, rules: PyRef<'_, NetRules>) {
        let rules = rules.0.clone();
        py.detach(|| self.0.set_rules(rules));
    }

    fn hand_over<'py>(&self, py: Python<'py>) -> (bool, Vec<Bound<'py, PyByteArray>>) {
        let packet = py.detach(|| self.0.hand_over());
        (packet.is_some(), packet.into_iter().map(|packet| whole(py, packet)).collect())
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

/// A file of frames.
#[pyclass(frozen, module = "vbus._core")]
pub struct PcapFile(Arc<recording::Recording>);

#[pymethods]
impl PcapFile {
    #[new]
    fn new(py: Python<'_>, fd: RawFd, header: &[u8]) -> PyResult<Self> {
        let begun = py.detach(|| recording::Recording::begin(duplicate(fd)?, header));
        Ok(Self(Arc::new(begun.map_err(|error| os_error(py, error))?)))
    }

    fn write(&self, py: Python<'_>, records: Vec<Vec<u8>>) -> (usize, Option<i32>) {
        let recording::Written { records, error } = py.detach(|| {
            let mut whole = recording::Records::default();
            records.iter().for_each(|record| whole.push_whole(record));
            self.0.append(&whole)
        });
        (records, error.map(|error| error.raw_os_error().unwrap_or(libc::EIO)))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.0.close());
    }
}

/// Has what is sent on a pair of queues written to a file.
#[pyclass(frozen, extends = Engine, module = "vbus._core")]
pub struct PcapEngine(Arc<pcap::Pcap>);

#[pymethods]
impl PcapEngine {
    #[new]
    fn new(
        receive: PyRef<'_, DeviceQueue>,
        transmit: PyRef<'_, DeviceQueue>,
        file: PyRef<'_, PcapFile>,
        signal: PyRef<'_, Signal>,
    ) -> PyClassInitializer<Self> {
        let queues = vec![receive.shared.clone(), transmit.shared.clone()];
        let (receive, transmit) = (queues[0].clone(), queues[1].clone());
        let engine = Arc::new(pcap::Pcap::new(receive, transmit, file.0.clone(), signal.0.clone()));
        PyClassInitializer::from(Engine { engine: engine.clone(), queues }).add_subclass(Self(engine))
    }

    fn set_rules(&self, py: Python<'_>, rules: PyRef<'_, NetRules>) {
        let rules = rules.0.clone();
        py.detach(|| self.0.set_rules(rules));
    }

    fn hand_over<'py>(&self, py: Python<'py>) -> (bool, Vec<Bound<'py, PyByteArray>>) {
        py.detach(|| self.0.hand_over());
        (false, Vec::new())
    }
}

/// What holds for the frames of a pair of queues.
#[pyclass(frozen, module = "vbus._core")]
pub struct NetRules(Rules);

#[pymethods]
impl NetRules {
    #[new]
    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (
        *, link, in_use, merge, csum, host_kinds, guest_csum, guest_kinds, promiscuous, told, modes, mac, unicast,
        multicast, vlans
    ))]
    fn new(
        link: bool,
        in_use: bool,
        merge: bool,
        csum: bool,
        host_kinds: Vec<u8>,
        guest_csum: bool,
        guest_kinds: Vec<u8>,
        promiscuous: bool,
        told: bool,
        modes: Vec<String>,
        mac: [u8; 6],
        unicast: Vec<[u8; 6]>,
        multicast: Vec<[u8; 6]>,
        vlans: Option<Vec<u16>>,
    ) -> Self {
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
        Self(Rules { link, in_use, merge, csum, host_kinds, guest_csum, guest_kinds, filter })
    }
}

/// A learning switch.
#[pyclass(frozen, module = "vbus._core")]
pub struct Switch(Arc<switch::Switch>);

#[pymethods]
impl Switch {
    #[new]
    fn new(ageing: f64) -> PyResult<Self> {
        let ageing = Duration::try_from_secs_f64(ageing).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self(Arc::new(switch::Switch::new(ageing.as_nanos() as u64))))
    }
}

/// A device's place at a switch.
#[pyclass(frozen, module = "vbus._core")]
pub struct SwitchPort {
    port: Arc<switch::Port>,
    queues: Vec<[Arc<Queue>; 2]>,
}

impl SwitchPort {
    fn check(&self, pair: usize) -> PyResult<()> {
        if pair >= self.queues.len() {
            return Err(PyIndexError::new_err(format!("pair {pair} of {}", self.queues.len())));
        }
        Ok(())
    }
}

#[pymethods]
impl SwitchPort {
    #[new]
    fn new(
        switch: PyRef<'_, Switch>,
        pairs: Vec<(PyRef<'_, DeviceQueue>, PyRef<'_, DeviceQueue>, PyRef<'_, Signal>)>,
        signal: PyRef<'_, Signal>,
    ) -> Self {
        let queues: Vec<_> = pairs.iter().map(|(rx, tx, _)| [rx.shared.clone(), tx.shared.clone()]).collect();
        let pair = |(receive, transmit, wake): &(PyRef<'_, DeviceQueue>, PyRef<'_, DeviceQueue>, PyRef<'_, Signal>)| {
            let (receive, transmit) = (receive.shared.clone(), transmit.shared.clone());
            switch::Pair { receive, transmit, signal: signal.0.clone(), wake: wake.0.clone() }
        };
        let port = switch::Port::join(&switch.0, pairs.iter().map(pair).collect());
        Self { port, queues }
    }

    fn leave(&self, py: Python<'_>) {
        py.detach(|| self.port.leave());
    }

    fn isolate(&self, py: Python<'_>, isolated: bool) {
        py.detach(|| self.port.isolate(isolated));
    }

    fn limit_floods(&self, py: Python<'_>, a_second: u32) {
        py.detach(|| self.port.limit_floods(a_second));
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = PyDict::new(py);
        for (name, count) in py.detach(|| self.port.counters()) {
            counters.set_item(name, count)?;
        }
        Ok(counters)
    }

    fn send(&self, py: Python<'_>, pair: usize, header: [u8; 12], frame: &[u8]) -> PyResult<Option<bool>> {
        self.check(pair)?;
        if frame.len() < ETHERNET as usize || frame.len() as u64 > LONGEST {
            return Err(PyValueError::new_err(format!("a frame of {} bytes", frame.len())));
        }
        let words = [0, 4, 8].map(|at| u32::from_le_bytes(std::array::from_fn(|byte| header[at + byte])));
        Ok(match py.detach(|| self.port.send(pair, words, frame)) {
            switch::Sent::Out => Some(true),
            switch::Sent::Dropped => Some(false),
            switch::Sent::Refused => None,
        })
    }

    fn read<'py>(&self, py: Python<'py>, pair: usize) -> PyResult<Option<Bound<'py, PyByteArray>>> {
        self.check(pair)?;
        Ok(py.detach(|| self.port.read(pair)).map(|packet| whole(py, packet)))
    }
}

/// Serves one pair of a port.
#[pyclass(frozen, extends = Engine, module = "vbus._core")]
pub struct SwitchEngine(Arc<switch::SwitchPair>);

#[pymethods]
impl SwitchEngine {
    #[new]
    fn new(port: PyRef<'_, SwitchPort>, pair: usize) -> PyResult<PyClassInitializer<Self>> {
        port.check(pair)?;
        let engine = Arc::new(switch::SwitchPair::new(port.port.clone(), pair));
        let queues = port.queues[pair].to_vec();
        Ok(PyClassInitializer::from(Engine { engine: engine.clone(), queues }).add_subclass(Self(engine)))
    }

    fn set_rules(&self, py: Python<'_>, rules: PyRef<'_, NetRules>) {
        let rules = rules.0.clone();
        py.detach(|| self.0.set_rules(rules));
    }

    fn hand_over<'py>(&self, py: Python<'py>) -> (bool, Vec<Bound<'py, PyByteArray>>) {
        let packet = py.detach(|| self.0.hand_over());
        (packet.is_some(), packet.into_iter().map(|packet| whole(py, packet)).collect())
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
        let queues = vec![queue.shared.clone()];
        let made = duplicate(fd).and_then(|fd| blk::Blk::new(queues[0].clone(), fd, signal.0.clone()));
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
