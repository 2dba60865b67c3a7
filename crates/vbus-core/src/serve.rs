//! A turn of a queue: requests are taken off the ring together, and Python is entered once for each, or once for all.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList};
use vbus_engine::queue::Queue;
use vbus_ring::ring::Chain;
use vbus_ring::schedule::Scheduler;

use crate::ring::{put, ring, Request};
use crate::violation::to_error;

/// How long something more urgent may wait before a turn looks for it: looking takes longer than a short handler.
const LOOK: Duration = Duration::from_micros(10);

/// Who looks whether something more urgent waits.
pub struct Urgent {
    scheduler: Arc<Scheduler>,
    actor: u64,
    priority: u32,
    last: Instant,
}

impl Urgent {
    /// For a turn of this actor, of a key of this priority, which begins.
    pub fn new(scheduler: Arc<Scheduler>, actor: u64, priority: u32) -> Self {
        Self { scheduler, actor, priority, last: Instant::now() }
    }

    /// Whether the turn should make room, as far as it is time to look.
    fn waits(&mut self) -> bool {
        let now = Instant::now();
        if now - self.last < LOOK {
            return false;
        }
        self.last = now;
        self.scheduler.urgent(self.actor, self.priority)
    }
}

/// Call `function` with two arguments: without a tuple of them, which the general way makes.
pub fn call<'py>(function: &Bound<'py, PyAny>, one: &Bound<'py, PyAny>, two: &Bound<'py, PyAny>) -> PyResult<()> {
    // SAFETY: objects that are alive, and a null at the end; the result is owned.
    let result = unsafe {
        let end = std::ptr::null_mut::<ffi::PyObject>();
        let result = ffi::PyObject_CallFunctionObjArgs(function.as_ptr(), one.as_ptr(), two.as_ptr(), end);
        Bound::from_owned_ptr_or_err(function.py(), result)?
    };
    drop(result);
    Ok(())
}

/// Serve what the queue holds, at most `limit` from the ring, by `handler(queue, request)` or, for a `batch`,
/// `handler(queue, requests)`; each is completed when its handler returns. True when there was something.
///
/// `charge(requests, bytes)` is told what was taken off the ring, before it is handled. What a handler raises ends the
/// turn; those behind it wait for another, as they do when something more urgent comes.
#[allow(clippy::too_many_arguments)]
pub fn serve(
    py: Python<'_>,
    shared: &Arc<Queue>,
    handler: &Bound<'_, PyAny>,
    queue: &Bound<'_, PyAny>,
    limit: usize,
    batch: bool,
    charge: Option<&Bound<'_, PyAny>>,
    urgent: Option<Urgent>,
) -> PyResult<bool> {
    let mut chains = Vec::with_capacity(limit);
    let (taken, run) = shared.begin(limit, &mut chains).map_err(|violation| to_error(py, &violation))?;
    if chains.is_empty() {
        return Ok(false);
    }
    if let (Some(charge), 1..) = (charge, taken) {
        let bytes: u64 = chains.iter().map(|chain| chain.readable().total() + chain.writable().total()).sum();
        charge.call1((taken, bytes))?;
    }
    if batch {
        serve_together(py, shared, run, handler, queue, chains)?;
    } else {
        let mut left = chains.into_iter();
        let result = serve_each(py, shared, run, handler, queue, &mut left, urgent);
        if left.len() > 0 {
            shared.put_off(run, left);
        }
        result?;
    }
    Ok(true)
}

fn serve_each(
    py: Python<'_>,
    shared: &Arc<Queue>,
    run: u64,
    handler: &Bound<'_, PyAny>,
    queue: &Bound<'_, PyAny>,
    chains: &mut std::vec::IntoIter<Chain>,
    mut urgent: Option<Urgent>,
) -> PyResult<()> {
    while let Some(chain) = chains.next() {
        let request = Bound::new(py, Request::new(chain, shared.clone(), run))?;
        call(handler, queue, request.as_any())?;
        let notify = put(shared, std::iter::once(request.get()));
        ring(py, notify.map_err(|violation| to_error(py, &violation))?);
        if chains.len() > 0 && urgent.as_mut().is_some_and(Urgent::waits) {
            break;
        }
    }
    Ok(())
}

fn serve_together(
    py: Python<'_>,
    shared: &Arc<Queue>,
    run: u64,
    handler: &Bound<'_, PyAny>,
    queue: &Bound<'_, PyAny>,
    chains: Vec<Chain>,
) -> PyResult<()> {
    let requests: Vec<Request> = chains.into_iter().map(|chain| Request::new(chain, shared.clone(), run)).collect();
    let count = requests.len();
    let batch = Bound::new(py, Batch { shared: shared.clone(), count, held: Mutex::new(Held::Natives(requests)) })?;
    call(handler, queue, batch.as_any())?;
    batch.get().complete(py)
}

enum Held {
    /// Nobody has looked at them.
    Natives(Vec<Request>),
    /// Somebody looks at them for the first time.
    Between,
    List(Py<PyList>),
}

/// Requests that a handler answers together: objects of Python only once somebody looks at one.
#[pyclass(frozen, sequence, module = "vbus._core")]
pub struct Batch {
    shared: Arc<Queue>,
    count: usize,
    held: Mutex<Held>,
}

impl Batch {
    fn list<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        // Not locked while objects are made, which may run Python code.
        let held = std::mem::replace(&mut *self.lock(), Held::Between);
        let list = match held {
            Held::List(list) => list.into_bound(py),
            Held::Natives(requests) => PyList::new(
                py,
                requests.into_iter().map(|request| Py::new(py, request)).collect::<PyResult<Vec<_>>>()?,
            )?,
            Held::Between => return Err(PyRuntimeError::new_err("the requests are being looked at")),
        };
        *self.lock() = Held::List(list.clone().unbind());
        Ok(list)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, py: Python<'_>) -> PyResult<()> {
        let notify = match &*self.lock() {
            Held::Natives(requests) => put(&self.shared, requests.iter()),
            Held::List(list) => {
                let requests: Vec<Bound<'_, Request>> = list.bind(py).extract()?;
                put(&self.shared, requests.iter().map(|request| request.get()))
            }
            Held::Between => return Err(PyRuntimeError::new_err("the requests are being looked at")),
        };
        ring(py, notify.map_err(|violation| to_error(py, &violation))?);
        Ok(())
    }
}

#[pymethods]
impl Batch {
    fn __len__(&self) -> usize {
        self.count
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.list(py)?.as_any().get_item(index)
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyIterator>> {
        self.list(py)?.try_iter()
    }

    fn __contains__(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<bool> {
        self.list(py)?.contains(value)
    }

    #[pyo3(signature = (value, start = 0, stop = isize::MAX, /))]
    fn index(&self, py: Python<'_>, value: &Bound<'_, PyAny>, start: isize, stop: isize) -> PyResult<usize> {
        self.list(py)?.call_method1("index", (value, start, stop))?.extract()
    }

    #[pyo3(signature = (value, /))]
    fn count(&self, py: Python<'_>, value: &Bound<'_, PyAny>) -> PyResult<usize> {
        Ok(usize::from(self.list(py)?.contains(value)?))
    }

    fn __repr__(&self) -> String {
        format!("<Batch of {} requests>", self.count)
    }
}
