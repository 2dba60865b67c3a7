//! The Python face of the rings: a device's queues, and a driver's.
//!
//! Locks are held shortly, never while Python code or a notification runs, and taken with the interpreter's lock held, or
//! by engines, which never want that: so no two of them can wait for each other.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vbus_engine::queue::{Queue, Running};
use vbus_ring::ring::{inflight_bytes, packed, DeviceRing, DriverRing, Features, Setup, MAX_SIZE};
use vbus_ring::signal::Notify;

use crate::memory::{Mapping, Memory};
use crate::request::{complete, Request};
use crate::scheduler::Scheduler;
use crate::serve::{By, Others, Server, Vain};
use crate::signal::Signal;
use crate::violation::to_error;

fn value_error(error: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// The device side of a ring.
#[pyclass(frozen, module = "vbus._core")]
pub struct DeviceQueue {
    pub shared: Arc<Queue>,
    max_size: u32,
    vain: Vain,
}

#[pymethods]
impl DeviceQueue {
    #[new]
    fn new(max_size: u32) -> PyResult<Self> {
        if !max_size.is_power_of_two() || max_size > MAX_SIZE {
            return Err(PyValueError::new_err("a queue's size is a power of two, 1 to 32768"));
        }
        Ok(Self { shared: Arc::default(), max_size, vain: Vain::default() })
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
    fn recover_place(memory: &Memory, size: u32, desc: u64, said: u32) -> u32 {
        packed::recover_place(&memory.0, desc, size, said)
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
        Ok(chains.into_iter().map(|chain| Request::own(chain, self.shared.clone(), run)).collect())
    }

    #[pyo3(signature = (handler, queue, limit, *, batch, charge = None, others = None))]
    #[allow(clippy::too_many_arguments)]
    fn serve(
        &self,
        py: Python<'_>,
        handler: Option<&Bound<'_, PyAny>>,
        queue: &Bound<'_, PyAny>,
        limit: usize,
        batch: bool,
        charge: Option<&Bound<'_, PyAny>>,
        others: Option<(PyRef<'_, Scheduler>, u64, u32)>,
    ) -> PyResult<bool> {
        let by = match handler {
            Some(handler) if !batch => By::Each(handler),
            None if !batch => return Err(PyValueError::new_err("without a handler there are only batches")),
            handler => By::Batch(handler),
        };
        let others = others.map(|(scheduler, actor, priority)| Others::new(scheduler.0.clone(), actor, priority));
        Server { py, shared: &self.shared, by, queue, limit, charge, others, vain: &self.vain }.serve()
    }

    fn complete(&self, py: Python<'_>, requests: Vec<Bound<'_, Request>>) -> PyResult<()> {
        if requests.iter().any(|request| !request.get().is_of(&self.shared)) {
            return Err(PyValueError::new_err("a request of another queue"));
        }
        complete(py, &self.shared, requests.iter().map(|request| request.get()))
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
