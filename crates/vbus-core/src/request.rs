//! The Python face of a device's requests, and their completion.
//!
//! What a turn takes off the ring together stays together: its requests share one burst, and are small. A request that
//! is taken by itself, for whoever keeps it for as long as it takes, has its own chain, which keeps no other memory.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyMemoryView};
use vbus_engine::queue::{Queue, Running};
use vbus_ring::mem::{Segments, VolatileSlice};
use vbus_ring::ring::{copy_in, copy_out, Burst, Chain, Piece};
use vbus_ring::signal::Notify;
use vbus_ring::violation::{Rule, Violation};

use crate::memory::{new_bytes, view, with_bytes, with_bytes_mut};
use crate::violation::to_error;

/// What a turn has to do.
pub struct Turn {
    /// Where it is from.
    pub queue: Arc<Queue>,
    /// Which run of the queue.
    pub run: u64,
    /// What was taken.
    pub burst: Arc<Burst>,
}

impl Turn {
    /// Complete all from `first` on, none of which wrote anything.
    pub fn complete(&self, py: Python<'_>, first: usize) -> PyResult<()> {
        let count = self.burst.len() - first;
        let result = finish(&self.queue, |running| {
            if self.queue.run() != self.run {
                return Ok(false);
            }
            let notify = running.ring.complete_burst(&self.burst, first, &vec![0; count])?;
            let readable = (first..self.burst.len()).map(|number| self.burst.readable_total(number)).sum();
            self.queue.count(count as u64, readable, 0);
            Ok(notify)
        });
        notify(py, result)
    }
}

/// A chain that is nobody else's.
struct Own {
    queue: Arc<Queue>,
    run: u64,
    chain: Chain,
}

enum Of {
    /// One of a turn. Which one is changed only while nobody but the turn knows the request.
    Turn(Arc<Turn>, AtomicUsize),
    Own(Box<Own>),
}

/// A part of a request's memory.
enum Data<'a> {
    Pieces(&'a [Piece]),
    Segments(&'a Segments),
}

impl Data<'_> {
    fn read(&self, at: u64, into: VolatileSlice<'_>) {
        match self {
            Self::Pieces(pieces) => copy_out(pieces, at, into),
            Self::Segments(segments) => segments.read(at, into),
        }
    }

    fn write(&self, at: u64, from: VolatileSlice<'_>) {
        match self {
            Self::Pieces(pieces) => copy_in(pieces, at, from),
            Self::Segments(segments) => segments.write(at, from),
        }
    }
}

/// (readable, writable) memoryviews.
type Views = (Vec<Py<PyMemoryView>>, Vec<Py<PyMemoryView>>);

/// A chain of descriptors, read once, checked and translated; its memory stays mapped while this lives.
#[pyclass(frozen, module = "vbus._core")]
pub struct Request {
    of: Of,
    read: AtomicU64,
    written: AtomicU64,
    completed: AtomicBool,
    /// As soon as somebody asks for them.
    views: OnceLock<Box<Views>>,
}

impl Request {
    fn new(of: Of) -> Self {
        let (read, written, completed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self { of, read, written, completed, views: OnceLock::new() }
    }

    /// A chain that was taken in this run of its queue.
    pub fn own(chain: Chain, queue: Arc<Queue>, run: u64) -> Self {
        Self::new(Of::Own(Box::new(Own { queue, run, chain })))
    }

    /// One of those of a turn.
    pub fn of_turn(turn: &Arc<Turn>, number: usize) -> Self {
        Self::new(Of::Turn(turn.clone(), AtomicUsize::new(number)))
    }

    /// Make a completed request of a turn another one of the same turn. False when somebody else knows it, or may: it
    /// has to stay what it is.
    pub fn renew(request: &Bound<'_, Self>, number: usize) -> bool {
        let Self { of, read, written, completed, views } = request.get();
        let Of::Turn(_, own) = of else { return false };
        // SAFETY: an object that is alive.
        let users = unsafe { ffi::Py_REFCNT(request.as_ptr()) };
        if users != 1 || views.get().is_some() {
            return false;
        }
        own.store(number, Ordering::Relaxed);
        read.store(0, Ordering::Relaxed);
        written.store(0, Ordering::Relaxed);
        completed.store(false, Ordering::Relaxed);
        true
    }

    /// Whether it is one of this queue's.
    pub fn is_of(&self, other: &Arc<Queue>) -> bool {
        Arc::ptr_eq(self.queue().0, other)
    }

    fn queue(&self) -> (&Arc<Queue>, u64) {
        match &self.of {
            Of::Turn(turn, _) => (&turn.queue, turn.run),
            Of::Own(own) => (&own.queue, own.run),
        }
    }

    fn stopped(&self) -> bool {
        let (queue, run) = self.queue();
        queue.run() != run
    }

    fn is_completed(&self) -> bool {
        self.completed.load(Ordering::Relaxed)
    }

    fn to_read(&self) -> Data<'_> {
        match &self.of {
            Of::Turn(turn, number) => Data::Pieces(turn.burst.readable(number.load(Ordering::Relaxed))),
            Of::Own(own) => Data::Segments(own.chain.readable()),
        }
    }

    fn to_write(&self) -> Data<'_> {
        match &self.of {
            Of::Turn(turn, number) => Data::Pieces(turn.burst.writable(number.load(Ordering::Relaxed))),
            Of::Own(own) => Data::Segments(own.chain.writable()),
        }
    }

    /// Driver address and bytes of what the device may write.
    fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let (pieces, segments) = match self.to_write() {
            Data::Pieces(pieces) => (Some(pieces), None),
            Data::Segments(segments) => (None, Some(segments)),
        };
        let pieces = pieces.into_iter().flatten().map(Piece::range);
        pieces.chain(segments.into_iter().flat_map(Segments::ranges))
    }

    fn memoryviews<'py>(&self, py: Python<'py>, data: &Data<'_>, read_only: bool) -> PyResult<Vec<Py<PyMemoryView>>> {
        match (data, &self.of) {
            (Data::Pieces(pieces), Of::Turn(turn, number)) => {
                let number = number.load(Ordering::Relaxed);
                let places = pieces.iter().map(|piece| (turn.burst.place(number, piece), piece.size()));
                places.map(|((mapping, offset), size)| view(py, mapping, offset, size, read_only)).collect()
            }
            (Data::Segments(segments), _) => {
                segments.iter().map(|(mapping, offset, size)| view(py, mapping, offset, size, read_only)).collect()
            }
            (Data::Pieces(_), Of::Own(_)) => unreachable!("a chain of its own has no pieces"),
        }
    }

    /// Take views back that were given out: the memory is the driver's again.
    fn release(&self, py: Python<'_>) {
        let Some(views) = self.views.get() else { return };
        for view in views.0.iter().chain(&views.1) {
            // Not while something else shows the same, an array for example, which then goes on to.
            let _ = view.call_method0(py, "release");
        }
    }

    fn left_to_read(&self) -> u64 {
        self.readable_total() - self.read.load(Ordering::Relaxed)
    }
}

#[pymethods]
impl Request {
    #[getter]
    fn index(&self) -> u16 {
        match &self.of {
            Of::Turn(turn, number) => turn.burst.head(number.load(Ordering::Relaxed)),
            Of::Own(own) => own.chain.head(),
        }
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
        match &self.of {
            Of::Turn(turn, number) => turn.burst.readable_total(number.load(Ordering::Relaxed)),
            Of::Own(own) => own.chain.readable().total(),
        }
    }

    #[getter]
    fn writable_total(&self) -> u64 {
        match &self.of {
            Of::Turn(turn, number) => turn.burst.writable_total(number.load(Ordering::Relaxed)),
            Of::Own(own) => own.chain.writable().total(),
        }
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
        let bytes = new_bytes(py, size as usize, |bytes| self.to_read().read(at, bytes))?;
        self.read.store(at + size, Ordering::Relaxed);
        Ok(bytes)
    }

    #[pyo3(signature = (buffer, /))]
    fn readinto(&self, buffer: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes_mut(buffer, |bytes| {
            // Looked at only now: getting at the buffer may have run Python code that read.
            let at = self.read.load(Ordering::Relaxed);
            let size = self.left_to_read().min(bytes.len() as u64);
            let bytes = bytes.subslice(0, size as usize).map_err(|error| PyValueError::new_err(error.to_string()))?;
            self.to_read().read(at, bytes);
            self.read.store(at + size, Ordering::Relaxed);
            Ok(size as usize)
        })?
    }

    #[pyo3(signature = (data, /))]
    fn write(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<usize> {
        with_bytes(data, |bytes| {
            if self.is_completed() {
                return Err(completed());
            }
            let (at, size) = (self.written(), bytes.len() as u64);
            if size > self.writable_total() - at {
                let detail = format!("{size} bytes, {} are left in request {}", self.writable(), self.index());
                return Err(to_error(py, &Violation::new(Rule::BufferTooSmall, detail)));
            }
            // A driver that has reset its device may use the memory for something else; the device need not know.
            if !self.stopped() {
                self.to_write().write(at, bytes);
            }
            self.written.store(at + size, Ordering::Relaxed);
            Ok(size as usize)
        })?
    }

    fn views<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyList>)> {
        if self.is_completed() {
            return Err(completed());
        }
        if self.views.get().is_none() {
            let made = (self.memoryviews(py, &self.to_read(), true)?, self.memoryviews(py, &self.to_write(), false)?);
            // Making them may have run Python code that made some.
            let _ = self.views.set(Box::new(made));
        }
        let (readable, writable) = &**self.views.get().expect("made above");
        Ok((PyList::new(py, readable)?, PyList::new(py, writable)?))
    }

    #[getter]
    fn done(&self) -> bool {
        self.is_completed() || self.stopped()
    }
}

fn completed() -> PyErr {
    PyValueError::new_err("the request is completed: its memory is the driver's again")
}

/// Complete requests, shown together, and notify their driver if it waits for that. Those that are done already are
/// left out.
pub fn complete<'a>(
    py: Python<'_>,
    queue: &Queue,
    requests: impl Iterator<Item = &'a Request> + Clone,
) -> PyResult<()> {
    let result = finish(queue, |running| {
        let fresh = requests.clone().filter(|request| !request.is_completed() && !request.stopped());
        // Never above the chain's total, which has 32 bits.
        let heads = fresh.clone().map(|request| (request.index(), request.written() as u32));
        let result = running.ring.complete_heads(heads, fresh.clone().flat_map(Request::ranges));
        for request in fresh {
            request.completed.store(true, Ordering::Relaxed);
            if result.is_ok() {
                queue.count(1, request.readable_total(), request.written());
            }
        }
        result
    });
    for request in requests {
        request.release(py);
    }
    notify(py, result)
}

/// Use the ring, when there is one; whom to notify then.
fn finish(
    queue: &Queue,
    complete: impl FnOnce(&mut Running) -> Result<bool, Violation>,
) -> Result<Option<Arc<dyn Notify>>, Violation> {
    let mut current = queue.lock();
    match current.as_mut() {
        Some(running) => Ok(complete(running)?.then(|| running.signal.clone())),
        None => Ok(None),
    }
}

/// Notify, if there is somebody to be notified.
fn notify(py: Python<'_>, signal: Result<Option<Arc<dyn Notify>>, Violation>) -> PyResult<()> {
    match signal {
        Ok(None) => Ok(()),
        Ok(Some(signal)) => {
            // Without the interpreter's lock: ringing is a system call, and a hostile driver can make it take a moment.
            py.detach(|| signal.notify());
            Ok(())
        }
        Err(violation) => Err(to_error(py, &violation)),
    }
}
