//! The Python face of the scheduler: the only place where Python's threads wait.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vbus_engine::worker::ToTask;
use vbus_ring::schedule::{self, ScheduleError};
use vbus_ring::signal::Route;

use crate::doorbell::{bells, Doorbell};
use crate::engine::Task;
use crate::event::EventReceiver;

/// Hands ready keys to threads, most urgent first; no two threads ever hold keys of one actor.
#[pyclass(frozen, module = "vbus._core")]
pub struct Scheduler(pub Arc<schedule::Scheduler>);

fn raise(error: ScheduleError) -> PyErr {
    match error {
        ScheduleError::Os(error) => error.into(),
        other => PyValueError::new_err(other.to_string()),
    }
}

#[pymethods]
impl Scheduler {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self(Arc::new(schedule::Scheduler::new()?)))
    }

    fn actor(&self) -> u64 {
        self.0.actor()
    }

    #[pyo3(signature = (actor, priority = 0))]
    fn key(&self, actor: u64, priority: u32) -> PyResult<u64> {
        self.0.key(actor, priority).map_err(raise)
    }

    fn drop_key(&self, key: u64) {
        self.0.drop_key(key);
    }

    fn drop_actor(&self, actor: u64) {
        self.0.drop_actor(actor);
    }

    fn mark(&self, key: u64) {
        self.0.mark(key);
    }

    #[pyo3(signature = (key, task))]
    fn route(&self, key: u64, task: Option<PyRef<'_, Task>>) {
        let route = task.map(|task| Arc::new(ToTask(task.0.clone())) as Arc<dyn Route>);
        self.0.route(key, route);
    }

    fn add_fd(&self, fd: RawFd, key: u64) -> PyResult<()> {
        self.0.add_fd(fd, key).map_err(raise)
    }

    fn remove_fd(&self, fd: RawFd) {
        self.0.remove_fd(fd);
    }

    fn add_events(
        &self,
        receiver: PyRef<'_, EventReceiver>,
        doorbells: Vec<PyRef<'_, Doorbell>>,
        fault_key: u64,
    ) -> PyResult<()> {
        self.0.add_events(&receiver.0, &bells(&doorbells), fault_key).map_err(raise)
    }

    fn remove_events(&self, receiver: PyRef<'_, EventReceiver>) {
        self.0.remove_events(&receiver.0);
    }

    #[pyo3(signature = (timeout = None, *, done = None))]
    fn next(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        done: Option<(u64, u64, bool)>,
    ) -> PyResult<Option<(u64, u64)>> {
        let timeout = match timeout {
            None => None,
            Some(seconds) if seconds.is_nan() => return Err(PyValueError::new_err("timeout is not a number")),
            // Longer than any clock goes: without a timeout.
            Some(seconds) => Duration::try_from_secs_f64(seconds.max(0.0)).ok(),
        };
        py.detach(|| match done {
            None => Ok(self.0.next(timeout)),
            Some((actor, key, again)) => self.0.go_on(actor, key, again, timeout),
        })
        .map_err(raise)
    }

    fn urgent(&self, actor: u64, priority: u32) -> bool {
        self.0.urgent(actor, priority)
    }

    #[pyo3(signature = (actor, key, *, again = false))]
    fn done(&self, actor: u64, key: u64, again: bool) -> PyResult<()> {
        self.0.done(actor, key, again).map_err(raise)
    }

    #[getter]
    fn closed(&self) -> bool {
        self.0.closed()
    }

    fn close(&self) {
        self.0.close();
    }
}
