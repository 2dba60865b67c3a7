//! The Python face of load generators and bare references: for `vbus bench`, and for nobody else.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use vbus_bench::frames;
use vbus_bench::load::{self, Buffers, LoadError, Report};
use vbus_bench::pingpong::{self, Echo, Ping, PingError, Rounds, Way};
use vbus_bench::reads;
use vbus_bench::work::{Numbered, RandomReads, Work};
use vbus_ring::mem;

use crate::area::value_error;
use crate::doorbell::Doorbell;
use crate::memory::Mapping;
use crate::ring::DriverQueue;
use crate::serve::call;
use crate::violation::{os_error, to_error};

/// As small as an object of Python's can be that native code makes for a call.
#[pyclass(frozen, module = "vbus._core")]
pub struct BenchRequest {
    number: u64,
}

#[pymethods]
impl BenchRequest {
    #[getter]
    fn number(&self) -> u64 {
        self.number
    }
}

/// Call `function(queue, request)` until there were `count` requests, or with lists of `batch` of them: seconds.
#[pyfunction]
#[pyo3(signature = (function, queue, count, batch = 0))]
pub fn bench_calls(
    py: Python<'_>,
    function: &Bound<'_, PyAny>,
    queue: &Bound<'_, PyAny>,
    count: u64,
    batch: u64,
) -> PyResult<f64> {
    if batch > 0 && count % batch != 0 {
        return Err(PyValueError::new_err("a count that is no multiple of the batch"));
    }
    let began = Instant::now();
    let mut number = 0;
    while number < count {
        if batch == 0 {
            let request = Bound::new(py, BenchRequest { number })?;
            call(function, queue, request.as_any())?;
            number += 1;
            continue;
        }
        let requests: PyResult<Vec<_>> =
            (number..number + batch).map(|number| Bound::new(py, BenchRequest { number })).collect();
        call(function, queue, PyList::new(py, requests?)?.as_any())?;
        number += batch;
    }
    Ok(began.elapsed().as_secs_f64())
}

/// A driver that keeps requests under way, without Python.
#[pyclass(frozen, module = "vbus._core")]
pub struct Load {
    ring: Py<DriverQueue>,
    arena: Arc<mem::Mapping>,
    address: u64,
    offset: usize,
    depth: usize,
}

#[pymethods]
impl Load {
    #[new]
    fn new(ring: Py<DriverQueue>, arena: &Mapping, address: u64, offset: usize, depth: usize) -> Self {
        Self { ring, arena: arena.0.clone(), address, offset, depth }
    }

    #[staticmethod]
    fn bytes_needed(depth: usize, size: usize) -> usize {
        depth * Buffers::stride(size)
    }

    #[pyo3(signature = (total, readable, writable, written, bell = None))]
    fn numbered<'py>(
        &self,
        py: Python<'py>,
        total: u64,
        readable: usize,
        writable: usize,
        written: u32,
        bell: Option<&Doorbell>,
    ) -> PyResult<Bound<'py, PyDict>> {
        if readable == 0 || readable % 8 != 0 || writable % 8 != 0 {
            return Err(PyValueError::new_err("sizes are multiples of 8, and there is something to read"));
        }
        self.run(py, Numbered { readable, writable, written }, total, bell)
    }

    #[pyo3(signature = (total, size, places, seed, bell = None))]
    fn random_reads<'py>(
        &self,
        py: Python<'py>,
        total: u64,
        size: usize,
        places: u64,
        seed: u64,
        bell: Option<&Doorbell>,
    ) -> PyResult<Bound<'py, PyDict>> {
        if size == 0 || size % 512 != 0 || places == 0 {
            return Err(PyValueError::new_err("reads are multiples of 512 bytes, and there is one at least"));
        }
        self.run(py, RandomReads { size, places, seed }, total, bell)
    }
}

impl Load {
    fn run<'py, W: vbus_bench::work::Work + Send>(
        &self,
        py: Python<'py>,
        mut work: W,
        total: u64,
        bell: Option<&Doorbell>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let size = work.readable() + work.writable();
        let needed = Self::bytes_needed(self.depth, size);
        if self.arena.size().checked_sub(self.offset).is_none_or(|left| left < needed) {
            return Err(PyValueError::new_err(format!("the arena has no {needed} bytes at {}", self.offset)));
        }
        let buffers = Buffers::new(&self.arena, self.address, self.offset, self.depth, size);
        let queue = self.ring.get();
        let signal = queue.signal.clone();
        let bell = bell.map(|bell| bell.0.clone());
        let result = py.detach(|| {
            let notify = || {
                if let Some(signal) = &signal {
                    signal.notify();
                }
            };
            let hush = || {
                if let Some(bell) = &bell {
                    bell.drain();
                }
            };
            let bell = bell.as_ref().map(|bell| (bell.as_raw_fd(), &hush as &dyn Fn()));
            load::run(&mut queue.lock(), &buffers, &mut work, total, notify, bell)
        });
        describe(py, &result.map_err(|error| load_error(py, error))?)
    }
}

fn load_error(py: Python<'_>, error: LoadError) -> PyErr {
    match error {
        LoadError::Violation(violation) => to_error(py, &violation),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}

/// A driver of a network card that gives back what it is sent, without Python.
#[pyclass(frozen, module = "vbus._core")]
pub struct Frames {
    sides: [FrameSide; 2],
}

struct FrameSide {
    ring: Py<DriverQueue>,
    arena: Arc<mem::Mapping>,
    address: u64,
    offset: usize,
}

type Lent = (Py<DriverQueue>, Py<Mapping>, u64, usize);

#[pymethods]
impl Frames {
    #[new]
    fn new(receive: Lent, transmit: Lent) -> Self {
        let sides = [receive, transmit].map(|(ring, arena, address, offset)| FrameSide {
            ring,
            arena: arena.get().0.clone(),
            address,
            offset,
        });
        Self { sides }
    }

    #[staticmethod]
    fn bytes_needed(burst: usize, size: usize) -> usize {
        burst * Buffers::stride(frames::HEADER + size)
    }

    fn run<'py>(&self, py: Python<'py>, count: u64, burst: usize, size: usize) -> PyResult<Bound<'py, PyDict>> {
        if size < frames::SHORTEST {
            return Err(PyValueError::new_err(format!("a frame has {} bytes at least", frames::SHORTEST)));
        }
        let needed = Self::bytes_needed(burst, size);
        if self.sides.iter().any(|side| side.arena.size().checked_sub(side.offset).is_none_or(|left| left < needed)) {
            return Err(PyValueError::new_err(format!("an arena has no {needed} bytes")));
        }
        let [receive, transmit] = &self.sides;
        let [receive_queue, transmit_queue] = [receive.ring.get(), transmit.ring.get()];
        let result = py.detach(|| {
            let notify = |queue: &DriverQueue| {
                if let Some(signal) = &queue.signal {
                    signal.notify();
                }
            };
            let (mut receive_ring, mut transmit_ring) = (receive_queue.lock(), transmit_queue.lock());
            let buffers =
                |side: &FrameSide| Buffers::new(&side.arena, side.address, side.offset, burst, frames::HEADER + size);
            let mut receive = frames::Side::new(&mut receive_ring, buffers(receive), || notify(receive_queue));
            let mut transmit = frames::Side::new(&mut transmit_ring, buffers(transmit), || notify(transmit_queue));
            frames::run(&mut receive, &mut transmit, size, count)
        });
        let report = result.map_err(|error| load_error(py, error))?;
        let found = PyDict::new(py);
        found.set_item("frames", report.frames)?;
        found.set_item("checksum", report.checksum)?;
        for (name, times) in
            [("alone", &report.alone), ("first", &report.first), ("last", &report.last), ("held", &report.held)]
        {
            for (part, percent) in [("p50", 50), ("p99", 99)] {
                found.set_item(format!("{name}_{part}_ns"), percentile(times, percent))?;
            }
        }
        Ok(found)
    }
}

/// The reads of a driver's load, from a file itself by io_uring.
#[pyfunction]
#[pyo3(signature = (fd, arena, total, size, places, seed, *, depth, batch))]
#[allow(clippy::too_many_arguments)]
pub fn bench_reads<'py>(
    py: Python<'py>,
    fd: RawFd,
    arena: &Mapping,
    total: u64,
    size: usize,
    places: u64,
    seed: u64,
    depth: usize,
    batch: usize,
) -> PyResult<Bound<'py, PyDict>> {
    if size == 0 || size % 512 != 0 || places == 0 || depth == 0 || batch == 0 {
        return Err(PyValueError::new_err("reads are multiples of 512 bytes, and there is one at a time at least"));
    }
    let mut work = RandomReads { size, places, seed };
    let all = work.readable() + work.writable();
    let needed = Load::bytes_needed(depth, all);
    if arena.0.size() < needed {
        return Err(PyValueError::new_err(format!("the arena has no {needed} bytes")));
    }
    let buffers = Buffers::new(&arena.0, 0, 0, depth, all);
    match py.detach(|| reads::run(fd, &buffers, &mut work, total, batch)) {
        Ok(report) => describe(py, &report),
        Err(LoadError::System(error)) => Err(os_error(py, error)),
        Err(error) => Err(PyRuntimeError::new_err(error.to_string())),
    }
}

/// How values travel, by name.
fn way_of(way: &str, notified: bool) -> PyResult<Way> {
    Ok(match way {
        "eventfd" => Way::Eventfds,
        "line" => Way::Lines,
        "bare split" => Way::BareSplit,
        "bare packed" => Way::BarePacked,
        "split" | "packed" => Way::Ring { packed: way == "packed", notified },
        _ => return Err(PyValueError::new_err(format!("there is no way {way:?}"))),
    })
}

fn ping_error(py: Python<'_>, error: PingError) -> PyErr {
    match error {
        PingError::Violation(violation) => to_error(py, &violation),
        error => PyRuntimeError::new_err(error.to_string()),
    }
}

fn describe_rounds<'py>(py: Python<'py>, rounds: &Rounds) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    found.set_item("round_trips", rounds.count)?;
    found.set_item("checksum", rounds.sum)?;
    found.set_item("seconds", rounds.nanoseconds as f64 / 1e9)?;
    for (name, percent) in [("p50_ns", 50), ("p99_ns", 99)] {
        found.set_item(name, percentile(&rounds.times, percent))?;
    }
    Ok(found)
}

/// One side of round trips through a shared area.
#[pyclass(frozen, module = "vbus._core")]
pub struct PingSide(Mutex<Ping>);

#[pymethods]
impl PingSide {
    #[new]
    fn new(py: Python<'_>, way: &str, notified: bool, area: &Mapping, kick: RawFd, call: RawFd) -> PyResult<Self> {
        let shared = pingpong::Shared::new(area.0.clone(), [kick, call]).map_err(value_error)?;
        Ok(Self(Mutex::new(Ping::new(shared, way_of(way, notified)?).map_err(|error| ping_error(py, error))?)))
    }

    #[staticmethod]
    fn bytes_needed() -> usize {
        pingpong::Shared::bytes_needed()
    }

    #[getter]
    fn places(&self) -> (u64, u64, u64) {
        let [desc, driver, device] = self.0.lock().unwrap_or_else(PoisonError::into_inner).places();
        (desc, driver, device)
    }

    fn run<'py>(&self, py: Python<'py>, count: u64, block: u64) -> PyResult<Bound<'py, PyDict>> {
        if block == 0 || count % block != 0 {
            return Err(PyValueError::new_err("a count that is no multiple of the block"));
        }
        let result = py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).run(count, block));
        describe_rounds(py, &result.map_err(|error| ping_error(py, error))?)
    }
}

/// The other side.
#[pyclass(frozen, module = "vbus._core")]
pub struct EchoSide(Mutex<Echo>);

#[pymethods]
impl EchoSide {
    #[new]
    fn new(
        py: Python<'_>,
        way: &str,
        notified: bool,
        area: &Mapping,
        kick: RawFd,
        call: RawFd,
        places: (u64, u64, u64),
    ) -> PyResult<Self> {
        let shared = pingpong::Shared::new(area.0.clone(), [kick, call]).map_err(value_error)?;
        let echo = Echo::new(shared, way_of(way, notified)?, places.into());
        Ok(Self(Mutex::new(echo.map_err(|error| ping_error(py, error))?)))
    }

    fn run<'py>(&self, py: Python<'py>, count: u64) -> PyResult<Bound<'py, PyDict>> {
        let result = py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).run(count));
        describe_rounds(py, &result.map_err(|error| ping_error(py, error))?)
    }
}

/// The value of ascending ones at or below which `percent` of 100 of them lie; 0 of none.
fn percentile(times: &[u64], percent: usize) -> u64 {
    let rank = (times.len() * percent).div_ceil(100).max(1) - 1;
    times.get(rank).copied().unwrap_or(0)
}

fn describe<'py>(py: Python<'py>, report: &Report) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    found.set_item("requests", report.requests)?;
    found.set_item("bytes_sent", report.bytes_sent)?;
    found.set_item("bytes_received", report.bytes_received)?;
    found.set_item("checksum", report.checksum)?;
    found.set_item("seconds", report.nanoseconds as f64 / 1e9)?;
    for (name, percent) in [("p50_us", 50), ("p99_us", 99), ("max_us", 100)] {
        found.set_item(name, percentile(&report.times, percent) as f64 / 1e3)?;
    }
    Ok(found)
}
