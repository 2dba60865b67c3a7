//! The Python face of doorbells, and of the signal that is nothing but one.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vbus_ring::doorbell;

/// An eventfd that the other process shares: rung without ever being stuck in it, whatever that process does.
#[pyclass(frozen, module = "vbus._core")]
pub struct Doorbell(pub Arc<doorbell::Doorbell>);

#[pymethods]
impl Doorbell {
    #[new]
    fn new(fd: RawFd) -> PyResult<Self> {
        if fd < 0 {
            return Err(PyValueError::new_err(format!("{fd} is no file descriptor")));
        }
        // SAFETY: borrowed for this call only, in which it is duplicated; a closed one gives EBADF. The interpreter's
        // lock is held, so that no other Python code closes it meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        Ok(Self(Arc::new(doorbell::Doorbell::new(fd)?)))
    }

    fn ring(&self, py: Python<'_>) -> bool {
        // Without the lock: breaking off a jammed ring takes a moment.
        py.detach(|| self.0.ring())
    }

    fn drain(&self) -> u64 {
        self.0.drain()
    }

    #[getter]
    fn jammed(&self) -> bool {
        self.0.jammed()
    }

    fn fileno(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The doorbells behind Python's.
pub fn bells(doorbells: &[PyRef<'_, Doorbell>]) -> Vec<Arc<doorbell::Doorbell>> {
    doorbells.iter().map(|doorbell| doorbell.0.clone()).collect()
}
