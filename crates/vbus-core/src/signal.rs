//! The Python face of notifications: an opaque handle that a ring is given, made by a connector.

use std::sync::Arc;

use pyo3::prelude::*;
use vbus_ring::doorbell::DirectSignal;
use vbus_ring::schedule::LocalSignal;
use vbus_ring::signal::Notify;

use crate::area::{area, value_error};
use crate::doorbell::Doorbell;
use crate::memory::Mapping;
use crate::scheduler::Scheduler;

/// How one source says "look at this queue".
#[pyclass(frozen, module = "vbus._core")]
pub struct Signal(pub Arc<dyn Notify>);

#[pymethods]
impl Signal {
    #[staticmethod]
    #[pyo3(signature = (doorbell, stats = None))]
    fn direct(doorbell: PyRef<'_, Doorbell>, stats: Option<(PyRef<'_, Mapping>, usize)>) -> PyResult<Self> {
        let stats = match stats {
            Some((mapping, offset)) => Some((area(&mapping)?, offset)),
            None => None,
        };
        let signal = DirectSignal::new(doorbell.0.clone(), stats).map_err(value_error)?;
        Ok(Self(Arc::new(signal)))
    }

    #[staticmethod]
    fn local(scheduler: PyRef<'_, Scheduler>, key: u64) -> Self {
        Self(Arc::new(LocalSignal::new(scheduler.0.clone(), key)))
    }

    fn notify(&self) {
        self.0.notify();
    }

    #[getter]
    fn counters(&self) -> (u64, u64, u64) {
        let [signalled, sent, rung] = self.0.counters();
        (signalled, sent, rung)
    }
}
