//! The Python face of mapped memory.

use std::ffi::c_int;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use pyo3::exceptions::{PyBufferError, PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use vbus_ring::mem::{self, MapError};

/// Bytes of a file, mapped shared into this process; unmapped when its last user (region, ring, view) is gone.
#[pyclass(frozen, module = "vbus._core")]
pub struct Mapping(pub Arc<mem::Mapping>);

#[pymethods]
impl Mapping {
    #[new]
    #[pyo3(signature = (fd, size, offset = 0, *, writable = true))]
    fn new(fd: RawFd, size: usize, offset: u64, writable: bool) -> PyResult<Self> {
        if fd < 0 {
            return Err(PyOSError::new_err((libc::EBADF, "a mapping needs an open file")));
        }
        // SAFETY: borrowed for this call only, with the interpreter's lock held; a closed one gives EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        match mem::Mapping::new(fd, size, offset, writable) {
            Ok(mapping) => Ok(Self(Arc::new(mapping))),
            Err(MapError::System(error)) => Err(error.into()),
            Err(error) => Err(PyValueError::new_err(error.to_string())),
        }
    }

    #[getter]
    fn size(&self) -> usize {
        self.0.size()
    }

    /// # Safety
    ///
    /// `view` is what the interpreter passes for `bf_getbuffer`.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill in"));
        }
        let mapping = slf.get().0.clone();
        let (base, size, read_only) = (mapping.as_ptr(), mapping.size(), c_int::from(!mapping.writable()));
        // SAFETY: the view owns a reference to this object, which keeps the mapping.
        let result = unsafe {
            ffi::PyBuffer_FillInfo(view, slf.as_ptr(), base.cast(), size as ffi::Py_ssize_t, read_only, flags)
        };
        if result == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}
