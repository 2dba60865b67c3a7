//! A turn of a queue: requests are taken off the ring together, and Python is entered once for each, or once for all.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PyList};
use vbus_engine::queue::{Begun, Queue};
use vbus_ring::event::MAX_PRIORITIES;
use vbus_ring::ring::Burst;
use vbus_ring::schedule::Scheduler;
use vbus_ring::violation::Violation;

use crate::request::{complete, Request, Turn};
use crate::violation::to_error;

/// How long something more urgent may wait before a turn looks for it: looking takes longer than a short handler.
const LOOK: Duration = Duration::from_micros(10);
/// How long a turn may go on while nobody waits: beginning another takes longer than a few short handlers.
const TURN: Duration = Duration::from_millis(1);
/// How long a turn looks for what comes next before it ends: less than what ending it and waking up again takes.
const LINGER: Duration = Duration::from_micros(5);

/// Who else may want a turn.
pub struct Others {
    scheduler: Arc<Scheduler>,
    actor: u64,
    priority: u32,
    last: Instant,
}

impl Others {
    /// Beside a turn of this actor, of a key of this priority, which begins.
    pub fn new(scheduler: Arc<Scheduler>, actor: u64, priority: u32) -> Self {
        Self { scheduler, actor, priority, last: Instant::now() }
    }

    /// Whether the turn should make room for something more urgent, as far as it is time to look.
    fn are_urgent(&mut self) -> bool {
        // Who holds a key of the highest priority makes room for nobody.
        if self.priority == 0 {
            return false;
        }
        let now = Instant::now();
        if now - self.last < LOOK {
            return false;
        }
        self.last = now;
        self.scheduler.urgent(self.actor, self.priority)
    }

    /// Whether anybody waits.
    fn wait(&self) -> bool {
        self.scheduler.urgent(self.actor, MAX_PRIORITIES)
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

/// How often a queue's turns looked in vain for what comes next, one after the other.
///
/// A driver that runs beside us is back soon; one that has to wait for our CPU never is while we look for it.
#[derive(Default)]
pub struct Vain(AtomicU32);

impl Vain {
    /// Turns that look in vain before only every so manieth does.
    const FEW: u32 = 4;
    const EVERY: u32 = 16;

    /// How long a turn may look that has worked for so long: no longer than that, as a driver that asks one thing at a
    /// time does not come back before it has its answer.
    fn patience(&self, worked: Duration) -> Duration {
        static CPUS: OnceLock<usize> = OnceLock::new();
        let cpus = *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
        let turns = self.0.load(Ordering::Relaxed);
        if cpus > 1 && (turns < Self::FEW || turns % Self::EVERY == 0) {
            worked.min(LINGER)
        } else {
            Duration::ZERO
        }
    }

    fn found(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn found_nothing(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Who answers requests.
#[derive(Clone, Copy)]
pub enum By<'a, 'py> {
    /// `handler(queue, request)`.
    Each(&'a Bound<'py, PyAny>),
    /// `handler(queue, requests)`; without one, each is completed with nothing, and no Python is run.
    Batch(Option<&'a Bound<'py, PyAny>>),
}

/// Serves what a queue holds.
pub struct Server<'a, 'py> {
    pub py: Python<'py>,
    pub shared: &'a Arc<Queue>,
    pub by: By<'a, 'py>,
    pub queue: &'a Bound<'py, PyAny>,
    /// How many are taken off the ring at once.
    pub limit: usize,
    /// Told how many requests and bytes were taken off the ring, before they are handled.
    pub charge: Option<&'a Bound<'py, PyAny>>,
    pub others: Option<Others>,
    /// Of this queue.
    pub vain: &'a Vain,
}

impl Server<'_, '_> {
    /// Serve; false when there was nothing, or there is nothing any more, and notifications are on. Each request is
    /// completed when its handler returns.
    ///
    /// What a handler raises ends the turn; those behind it wait for another, as they do when something more urgent
    /// comes. As long as nobody waits the turn goes on, if it has not taken too long; except with a `charge`, which may
    /// have brought about that nothing more is to be taken.
    pub fn serve(mut self) -> PyResult<bool> {
        let began = Instant::now();
        let mut spare = Burst::default();
        let mut patience = None;
        loop {
            let Some((turn, first)) = self.begin(spare, patience)? else { return Ok(false) };
            let by = self.by;
            match by {
                By::Batch(handler) => self.together(&turn, first, handler)?,
                By::Each(handler) if self.each(&turn, first, handler)? => (),
                By::Each(_) => return Ok(true),
            }
            let alone = || self.others.as_ref().is_some_and(|others| !others.wait());
            let spent = began.elapsed();
            let last = self.limit == 0 || self.charge.is_some() || spent >= TURN;
            if last || self.shared.paused() || self.shared.draining() || !alone() {
                return Ok(true);
            }
            patience = Some(self.vain.patience(spent));
            spare = Arc::into_inner(turn).and_then(|turn| Arc::into_inner(turn.burst)).unwrap_or_default();
        }
    }

    /// What there is on the queue now or, for a turn that goes on, soon.
    fn look(&self, mut spare: Burst, patience: Option<Duration>) -> Result<Begun, Violation> {
        let Some(patience) = patience else { return self.shared.begin(self.limit, spare, true) };
        let mut empty_since: Option<Instant> = None;
        while empty_since.is_none_or(|since| since.elapsed() < patience) {
            match self.shared.begin(self.limit, spare, false)? {
                Begun::Nothing(burst) => spare = burst,
                begun => {
                    if empty_since.is_some() {
                        self.vain.found();
                    }
                    return Ok(begun);
                }
            }
            empty_since.get_or_insert_with(Instant::now);
            std::hint::spin_loop();
        }
        self.vain.found_nothing();
        self.shared.begin(self.limit, spare, true)
    }

    /// What is to be done, and the first of it that is.
    fn begin(&self, spare: Burst, patience: Option<Duration>) -> PyResult<Option<(Arc<Turn>, usize)>> {
        let turn = |burst, run| Arc::new(Turn { queue: self.shared.clone(), run, burst });
        match self.look(spare, patience).map_err(|violation| to_error(self.py, &violation))? {
            Begun::Nothing(_) => Ok(None),
            Begun::Again { burst, first, run } => Ok(Some((turn(burst, run), first))),
            Begun::Fresh { burst, run } => {
                if let Some(charge) = self.charge {
                    let bytes = |chain| burst.readable_total(chain) + burst.writable_total(chain);
                    charge.call1((burst.len(), (0..burst.len()).map(bytes).sum::<u64>()))?;
                }
                Ok(Some((turn(Arc::new(burst), run), 0)))
            }
        }
    }

    /// One after the other; false when something more urgent waits.
    fn each(&mut self, turn: &Arc<Turn>, first: usize, handler: &Bound<'_, PyAny>) -> PyResult<bool> {
        let mut next = first;
        let result = self.each_until(turn, &mut next, handler);
        if next < turn.burst.len() {
            self.shared.put_off(turn.run, turn.burst.clone(), next);
        }
        result
    }

    fn each_until(&mut self, turn: &Arc<Turn>, next: &mut usize, handler: &Bound<'_, PyAny>) -> PyResult<bool> {
        let mut known: Option<Bound<'_, Request>> = None;
        while *next < turn.burst.len() {
            let request = match known.take() {
                Some(request) if Request::renew(&request, *next) => request,
                _ => Bound::new(self.py, Request::of_turn(turn, *next))?,
            };
            *next += 1;
            call(handler, self.queue, request.as_any())?;
            complete(self.py, self.shared, std::iter::once(request.get()))?;
            if *next < turn.burst.len() && self.others.as_mut().is_some_and(Others::are_urgent) {
                return Ok(false);
            }
            known = Some(request);
        }
        Ok(true)
    }

    fn together(&self, turn: &Arc<Turn>, first: usize, handler: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let Some(handler) = handler else { return turn.complete(self.py, first) };
        let batch = Bound::new(self.py, Batch { turn: turn.clone(), first, list: OnceLock::new() })?;
        call(handler, self.queue, batch.as_any())?;
        batch.get().complete(self.py)
    }
}

/// Requests that a handler answers together: objects of Python only once somebody looks at one.
#[pyclass(frozen, sequence, module = "vbus._core")]
pub struct Batch {
    turn: Arc<Turn>,
    first: usize,
    list: OnceLock<Py<PyList>>,
}

impl Batch {
    fn list<'py>(&self, py: Python<'py>) -> PyResult<&Bound<'py, PyList>> {
        if self.list.get().is_none() {
            let requests =
                (self.first..self.turn.burst.len()).map(|number| Py::new(py, Request::of_turn(&self.turn, number)));
            let list = PyList::new(py, requests.collect::<PyResult<Vec<_>>>()?)?;
            // Making it may have run Python code that looked.
            let _ = self.list.set(list.unbind());
        }
        Ok(self.list.get().expect("made above").bind(py))
    }

    fn complete(&self, py: Python<'_>) -> PyResult<()> {
        match self.list.get() {
            None => self.turn.complete(py, self.first),
            Some(list) => {
                let requests: Vec<Bound<'_, Request>> = list.bind(py).extract()?;
                complete(py, &self.turn.queue, requests.iter().map(|request| request.get()))
            }
        }
    }
}

#[pymethods]
impl Batch {
    fn __len__(&self) -> usize {
        self.turn.burst.len() - self.first
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
        format!("<Batch of {} requests>", self.__len__())
    }
}
