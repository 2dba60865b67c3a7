//! The Python face of notifications: an opaque handle that a ring is given, made by a connector.

use std::sync::Arc;

use pyo3::prelude::*;
use vbus_ring::signal::Notify;

/// How one source says "look at this queue".
#[pyclass(frozen, module = "vbus._core")]
pub struct Signal(pub Arc<dyn Notify>);

#[pymethods]
impl Signal {
    fn notify(&self) {
        self.0.notify();
    }

    #[getter]
    fn counters(&self) -> (u64, u64, u64) {
        let [signalled, sent, rung] = self.0.counters();
        (signalled, sent, rung)
    }
}
