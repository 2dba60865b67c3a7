//! The Python face of the rings: a device's requests, its queues, and a driver's.
//!
//! Locks are held shortly, never while Python code or a notification runs, and taken with the interpreter's lock held, or
//! by engines, which never want that: so no two of them can wait for each other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use vbus_engine::queue::{Queue, Running};
use vbus_ring::ring::{inflight_bytes, packed, Chain, DeviceRing, DriverRing, Features, Setup, MAX_SIZE};
use vbus_ring::signal::Notify;
use vbus_ring::violation::{Rule, Violation};

use crate::memory::{new_bytes, views, with_bytes, with_bytes_mut, Mapping, Memory};
use crate::scheduler::Scheduler;
use crate::serve::{serve, Urgent};
use crate::signal::Signal;
use crate::violation::to_error;

/// Notify, if there is somebody to be notified.
pub fn ring(py: Python<'_>, signal: Option<Arc<dyn Notify>>) {
    if let Some(signal) = signal {
        // Without the interpreter's lock: ringing is a system call, and a hostile driver can make it take a moment.
        py.detach(|| signal.notify());
    }
}

/// (readable, writable) memoryviews.
type Views<'py> = (Vec<Bound<'py, PyMemoryView>>, Vec<Bound<'py, PyMemoryView>>);

fn value_error(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Put requests into the used ring; what to notify, if anything.
pub fn put<'a>(
    queue: &Queue,
    requests: impl Iterator<Item = &'a Request> + Clone,
) -> Result<Option<Arc<dyn Notify>>, Violation> {
    let mut current = queue.lock();
    let Some(running) = current.as_mut() else {
        return Ok(None);
    };
    let fresh = |request: &&Request| !request.stopped() && !request.completed.load(Ordering::Relaxed);
    let requests = requests.filter(fresh);
    // Never above the chain's total, which has 32 bits.
    let chains = requests.clone().map(|request| (&request.chain, request.written() as u32));
    let result = running.ring.complete_chains(chains);
    for request in requests {
        request.completed.store(true, Ordering::Relaxed);
        if result.is_ok() {
            queue.count(1, request.readable_total(), request.written());
        }
    }
    Ok(result?.then(|| running.signal.clone()))
}

/// A chain of descriptors, read once, checked and translated; its memory stays mapped while this lives.
#[pyclass(frozen, module = "vbus._core")]
pub struct Request {
    chain: Chain,
    queue: Arc<Queue>,
    run: u64,
    read: AtomicU64,
    written: AtomicU64,
    completed: AtomicBool,
}

impl Request {
    /// A chain that was taken in this run of its queue.
    pub fn new(chain: Chain, queue: Arc<Queue>, run: u64) -> Self {
        let (read, written, completed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self { chain, queue, run, read, written, completed }
    }

    fn stopped(&self) -> bool {
        self.queue.run() != self.run
    }

    fn left_to_read(&self) -> u64 {
        self.chain.readable().total() - self.read.load(Ordering::Relaxed)
    }
}

#[pymethods]
impl Request {
    #[getter]
    fn index(&self) -> u16 {
        self.chain.head()
    }

    #[getter]
    fn readable(&self) -> u64 {
        self.left_to_read()
    }

    #[getter]
    fn writable(&self) -> u64 {
        self.writable_total() - self.written()
    }

    #[getter]
    fn readable_total(&self) -> u64 {
        self.chain.readable().total()
    }

    #[getter]
    fn writable_total(&self) -> u64 {
        self.chain.writable().total()
    }

    #[getter]
    fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    #[setter]
    fn set_written(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<()> {
        let total = self.writable_total();
        match value.extract::<u64>() {
            Ok(value) if value <= total => {
                self.written.store(value, Ordering::Relaxed);
                Ok(())
            }
            Err(error) if !error.is_instance_of::<PyOverflowError>(py) => Err(error),
            _ => Err(PyValueError::new_err(format!("written must be 0 to {total}, not {value}"))),
        }
    }

    #[pyo3(signature = (size = -1, /), text_signature = "($self, size=-1, /)")]
    fn read<'py>(&self, py: Python<'py>, size: i64) -> PyResult<Bound<'py, PyBytes>> {
        let left = self.left_to_read();
        let size = u64::try_from(size).map_or(left, |size| size.min(left));
        let at = self.read.load(Ordering::Relaxed);
        let bytes = new_bytes(py, size as usize, |bytes| self.chain.readable().read(at, bytes))?;
        self.read.store(at + size, Ordering::Relaxed);
        Ok(bytes)
    }

    #[pyo3(signature = (buffer, /))]
    fn readinto(&self, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes_mut(buffer, |bytes| {
            // Looked at only now: getting at the buffer may have run Python code that read.
            let at = self.read.load(Ordering::Relaxed);
            let size = self.left_to_read().min(bytes.len() as u64);
            let bytes = bytes.subslice(0, size as usize).map_err(value_error)?;
            self.chain.readable().read(at, bytes);
            self.read.store(at + size, Ordering::Relaxed);
            Ok(size as usize)
        })?
    }

    #[pyo3(signature = (data, /))]
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            if self.completed.load(Ordering::Relaxed) {
                return Err(PyValueError::new_err("the request is completed: its memory is the driver's again"));
            }
            let (at, size) = (self.written(), bytes.len() as u64);
            if size > self.writable_total() - at {
                let detail = format!("{size} bytes, {} are left in request {}", self.writable(), self.chain.head());
                return Err(to_error(py, &Violation::new(Rule::BufferTooSmall, detail)));
            }
            // A driver that has reset its device may use the memory for something else; the device need not know.
            if !self.stopped() {
                self.chain.writable().write(at, bytes);
            }
            self.written.store(at + size, Ordering::Relaxed);
            Ok(size as usize)
        })?
    }

    fn views<'py>(&self, py: Python<'py>) -> PyResult<Views<'py>> {
        Ok((views(py, self.chain.readable(), true)?, views(py, self.chain.writable(), false)?))
    }

    #[getter]
    fn done(&self) -> bool {
        self.completed.load(Ordering::Relaxed) || self.stopped()
    }
}

/// The device side of a ring.
#[pyclass(frozen, module = "vbus._core")]
pub struct DeviceQueue {
    pub shared: Arc<Queue>,
    max_size: u32,
}

#[pymethods]
impl DeviceQueue {
    #[new]
    fn new(max_size: u32) -> PyResult<Self> {
        if !max_size.is_power_of_two() || max_size > MAX_SIZE {
            return Err(PyValueError::new_err("a queue's size is a power of two, 1 to 32768"));
        }
        Ok(Self { shared: Arc::default(), max_size })
    }

    #[staticmethod]
    #[pyo3(signature = (size, *, packed = false))]
    fn inflight_size(size: u32, packed: bool) -> PyResult<usize> {
        if size == 0 || size > MAX_SIZE {
            return Err(PyValueError::new_err("a queue's size is 1 to 32768"));
        }
        Ok(inflight_bytes(size as u16, packed))
    }

    #[staticmethod]
    fn find_place(memory: &Memory, size: u32, desc: u64, said: u32) -> u32 {
        packed::find_place(&memory.0, desc, size, said)
    }

    #[getter]
    fn max_size(&self) -> u32 {
        self.max_size
    }

    #[getter]
    fn size(&self) -> u16 {
        self.shared.lock().as_ref().map_or(0, |running| running.ring.size())
    }

    #[getter]
    fn running(&self) -> bool {
        self.shared.lock().is_some()
    }

    #[allow(clippy::too_many_arguments)]
    #[pyo3(signature = (
        memory, size, desc, driver, device, *, event_idx, indirect, signal, packed = false, in_order = false,
        resume = None, inflight = None
    ))]
    fn start(
        &self,
        py: Python<'_>,
        memory: &Memory,
        size: u32,
        desc: u64,
        driver: u64,
        device: u64,
        event_idx: bool,
        indirect: bool,
        signal: &Signal,
        packed: bool,
        in_order: bool,
        resume: Option<u32>,
        inflight: Option<(PyRef<'_, Mapping>, u64)>,
    ) -> PyResult<()> {
        if inflight.as_ref().is_some_and(|(mapping, _)| !mapping.0.writable()) {
            return Err(PyValueError::new_err("what is in flight needs a writable mapping"));
        }
        self.shared.replace(None);
        let features = Features { packed, event_idx, indirect, in_order };
        let setup = Setup { size, desc, driver, device, features, resume };
        let memory = memory.0.clone();
        let ring = match inflight {
            None => DeviceRing::new(memory, self.max_size, setup),
            Some((mapping, offset)) => DeviceRing::tracked(memory, self.max_size, setup, &mapping.0, offset),
        };
        let ring = ring.map_err(|violation| to_error(py, &violation))?;
        self.shared.replace(Some(Running::new(ring, signal.0.clone())));
        Ok(())
    }

    fn stop(&self) {
        self.shared.replace(None);
    }

    fn take(&self, py: Python<'_>, limit: usize) -> PyResult<Vec<Request>> {
        let mut chains = Vec::new();
        let run = self.shared.take(limit, &mut chains).map_err(|violation| to_error(py, &violation))?;
        Ok(chains.into_iter().map(|chain| Request::new(chain, self.shared.clone(), run)).collect())
    }

    #[pyo3(signature = (handler, queue, limit, *, batch, charge = None, urgent = None))]
    #[allow(clippy::too_many_arguments)]
    fn serve(
        &self,
        py: Python<'_>,
        handler: &Bound<'_, PyAny>,
        queue: &Bound<'_, PyAny>,
        limit: usize,
        batch: bool,
        charge: Option<&Bound<'_, PyAny>>,
        urgent: Option<(PyRef<'_, Scheduler>, u64, u32)>,
    ) -> PyResult<bool> {
        let urgent = urgent.map(|(scheduler, actor, priority)| Urgent::new(scheduler.0.clone(), actor, priority));
        serve(py, &self.shared, handler, queue, limit, batch, charge, urgent)
    }

    fn complete(&self, py: Python<'_>, requests: Vec<Bound<'_, Request>>) -> PyResult<()> {
        if requests.iter().any(|request| !Arc::ptr_eq(&request.get().queue, &self.shared)) {
            return Err(PyValueError::new_err("a request of another queue"));
        }
        let notify = put(&self.shared, requests.iter().map(|request| request.get()));
        ring(py, notify.map_err(|violation| to_error(py, &violation))?);
        Ok(())
    }

    #[getter]
    fn paused(&self) -> bool {
        self.shared.paused()
    }

    #[setter]
    fn set_paused(&self, paused: bool) {
        self.shared.pause(paused);
    }

    #[getter]
    fn draining(&self) -> bool {
        self.shared.draining()
    }

    #[setter]
    fn set_draining(&self, draining: bool) {
        self.shared.drain(draining);
        // Behind it, nobody takes anything that has not seen it.
        drop(self.shared.lock());
    }

    #[getter]
    fn native(&self) -> bool {
        self.shared.native()
    }

    #[setter]
    fn set_native(&self, native: bool) {
        self.shared.set_native(native);
        drop(self.shared.lock());
    }

    #[getter]
    fn next(&self) -> Option<u32> {
        self.shared.lock().as_ref().map(|running| running.ring.next())
    }

    #[getter]
    fn unused(&self) -> Option<u32> {
        self.shared.lock().as_ref().and_then(|running| running.ring.unused())
    }

    #[getter]
    fn in_flight(&self) -> usize {
        self.shared.lock().as_ref().map_or(0, |running| running.ring.in_flight())
    }

    #[getter]
    fn counters(&self) -> (u64, u64, u64) {
        let Queue { completed, bytes_readable, bytes_written, .. } = &*self.shared;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (get(completed), get(bytes_readable), get(bytes_written))
    }
}

/// The driver side of a ring, in memory of its own.
#[pyclass(frozen, module = "vbus._core")]
pub struct DriverQueue {
    ring: Mutex<DriverRing>,
    pub signal: Option<Arc<dyn Notify>>,
}

impl DriverQueue {
    pub fn lock(&self) -> MutexGuard<'_, DriverRing> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl DriverQueue {
    #[staticmethod]
    #[pyo3(signature = (size, *, packed = false))]
    fn bytes_needed(size: u32, packed: bool) -> PyResult<usize> {
        DriverRing::bytes_needed(size, packed).map_err(value_error)
    }

    #[allow(clippy::too_many_arguments)]
    #[new]
    #[pyo3(signature = (
        arena, offset, address, size, *, event_idx, indirect, signal = None, packed = false, in_order = false
    ))]
    fn new(
        arena: &Mapping,
        offset: usize,
        address: u64,
        size: u32,
        event_idx: bool,
        indirect: bool,
        signal: Option<&Signal>,
        packed: bool,
        in_order: bool,
    ) -> PyResult<Self> {
        let features = Features { packed, event_idx, indirect, in_order };
        let ring = DriverRing::new(&arena.0, offset, address, size, features).map_err(value_error)?;
        Ok(Self { ring: Mutex::new(ring), signal: signal.map(|signal| signal.0.clone()) })
    }

    #[getter]
    fn size(&self) -> u16 {
        self.lock().size()
    }

    #[getter]
    fn desc(&self) -> u64 {
        self.lock().desc()
    }

    #[getter]
    fn driver(&self) -> u64 {
        self.lock().driver()
    }

    #[getter]
    fn device(&self) -> u64 {
        self.lock().device()
    }

    #[getter]
    fn free(&self) -> usize {
        self.lock().free()
    }

    fn add(&self, readable: Vec<(u64, u64)>, writable: Vec<(u64, u64)>) -> PyResult<Option<u16>> {
        self.lock().add(&readable, &writable).map_err(value_error)
    }

    fn publish(&self, py: Python<'_>) {
        let notify = self.lock().publish();
        if let (true, Some(signal)) = (notify, &self.signal) {
            // Without the interpreter's lock: as for a device's.
            py.detach(|| signal.notify());
        }
    }

    fn reap(&self, py: Python<'_>, limit: usize) -> PyResult<Vec<(u16, u32)>> {
        let mut finished = Vec::new();
        let result = self.lock().reap(limit, &mut finished);
        result.map_err(|violation| to_error(py, &violation))?;
        Ok(finished)
    }

    #[getter]
    fn outstanding(&self) -> usize {
        self.lock().outstanding()
    }
}
