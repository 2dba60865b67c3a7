//! The Python face of the event rings: one object a side and direction.

use std::sync::Arc;

use pyo3::prelude::*;
use vbus_ring::doorbell;
use vbus_ring::event::{Consumer, EventSignal, Geometry, Producer};
use vbus_ring::mem::Window;
use vbus_ring::schedule::Receiver;

use crate::area::{area, value_error};
use crate::doorbell::{bells, Doorbell};
use crate::memory::Mapping;
use crate::signal::Signal;
use crate::violation::to_object;

/// The producing side of one direction's event rings, one ring a priority.
#[pyclass(frozen, module = "vbus._core")]
pub struct EventSender(Arc<Producer<Window, Arc<doorbell::Doorbell>>>);

#[pymethods]
impl EventSender {
    #[new]
    #[pyo3(signature = (area, *, slots, stats, taken, sleep, max_sources, priorities, doorbells, always = false))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        area: PyRef<'_, Mapping>,
        slots: usize,
        stats: usize,
        taken: usize,
        sleep: usize,
        max_sources: u32,
        priorities: u32,
        doorbells: Vec<PyRef<'_, Doorbell>>,
        always: bool,
    ) -> PyResult<Self> {
        let geometry = Geometry { slots, taken, sleep, max_sources, priorities };
        let producer = Producer::new(self::area(&area)?, geometry, stats, bells(&doorbells)).map_err(value_error)?;
        Ok(Self(Arc::new(producer.always(always))))
    }

    fn open(&self, source: u32, generation: u32, priority: u32) -> PyResult<Signal> {
        let opened = self.0.open(source, generation, priority).map_err(value_error)?;
        Ok(Signal(Arc::new(EventSignal::new(self.0.clone(), opened))))
    }

    fn close(&self, source: u32) -> PyResult<()> {
        self.0.close(source).map_err(value_error)
    }

    #[getter]
    fn counters(&self) -> (u64, u64, u64) {
        let [signalled, sent, rung] = self.0.counters();
        (signalled, sent, rung)
    }
}

/// The consuming side of one direction's event rings; a `Scheduler` drains it.
#[pyclass(frozen, module = "vbus._core")]
pub struct EventReceiver(pub Arc<Receiver>);

#[pymethods]
impl EventReceiver {
    #[new]
    #[pyo3(signature = (area, *, slots, taken, sleep, max_sources, priorities))]
    fn new(
        area: PyRef<'_, Mapping>,
        slots: usize,
        taken: usize,
        sleep: usize,
        max_sources: u32,
        priorities: u32,
    ) -> PyResult<Self> {
        let geometry = Geometry { slots, taken, sleep, max_sources, priorities };
        let consumer = Consumer::new(self::area(&area)?, geometry).map_err(value_error)?;
        Ok(Self(Arc::new(Receiver::new(consumer))))
    }

    fn open(&self, source: u32, generation: u32, key: u64) -> PyResult<()> {
        self.0.consumer().open(source, generation, key).map_err(value_error)
    }

    fn close(&self, source: u32) -> PyResult<()> {
        self.0.consumer().close(source).map_err(value_error)
    }

    #[getter]
    fn taken(&self) -> u64 {
        self.0.consumer().taken()
    }

    #[getter]
    fn dropped(&self) -> u64 {
        self.0.consumer().dropped()
    }

    #[getter]
    fn fault<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let fault = self.0.consumer().fault();
        fault.map(|fault| to_object(py, &fault.into())).transpose()
    }
}
