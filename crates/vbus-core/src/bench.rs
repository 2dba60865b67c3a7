//! The Python face of load generators and bare references: for `vbus bench`, and for nobody else.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use vbus_bench::load::{self, Buffers, LoadError, Report};
use vbus_bench::work::{Numbered, RandomReads};
use vbus_ring::mem;

use crate::doorbell::Doorbell;
use crate::memory::Mapping;
use crate::ring::DriverQueue;
use crate::serve::call;
use crate::violation::to_error;

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
        match result {
            Ok(report) => describe(py, &report),
            Err(LoadError::Violation(violation)) => Err(to_error(py, &violation)),
            Err(error) => Err(PyRuntimeError::new_err(error.to_string())),
        }
    }
}

fn describe<'py>(py: Python<'py>, report: &Report) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    found.set_item("requests", report.requests)?;
    found.set_item("bytes_sent", report.bytes_sent)?;
    found.set_item("bytes_received", report.bytes_received)?;
    found.set_item("checksum", report.checksum)?;
    found.set_item("seconds", report.nanoseconds as f64 / 1e9)?;
    for (name, percent) in [("p50_us", 50), ("p99_us", 99), ("max_us", 100)] {
        let rank = (report.times.len() * percent).div_ceil(100).max(1) - 1;
        found.set_item(name, report.times.get(rank).copied().unwrap_or(0) as f64 / 1e3)?;
    }
    Ok(found)
}
