//! The Python face of a driver's memory: mappings, regions, and views that keep their memory mapped.

use std::ffi::c_int;
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyBufferError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use vbus_ring::mem::{self, Access, MapError, Segments, VolatileSlice};

use crate::violation::{os_error, to_error};

/// Bytes of regions that a memory has at most unless its owner says otherwise: address space, which costs nothing.
const MAX_BYTES: u64 = 1 << 40;

/// Bytes of a file, mapped shared into this process; unmapped when its last user (region, ring, view) is gone.
#[pyclass(frozen, module = "vbus._core")]
pub struct Mapping(pub Arc<mem::Mapping>);

#[pymethods]
impl Mapping {
    #[new]
    #[pyo3(signature = (fd, size, offset = 0, *, writable = true, guarded = false))]
    fn new(py: Python<'_>, fd: RawFd, size: usize, offset: u64, writable: bool, guarded: bool) -> PyResult<Self> {
        if fd < 0 {
            return Err(os_error(py, io::Error::from_raw_os_error(libc::EBADF)));
        }
        // SAFETY: borrowed for this call only, and a closed descriptor gives EBADF. A caller that closes it meanwhile
        // has lost track of its own descriptors; nothing here owns or closes it.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // Without the interpreter's lock: a file system may take its time.
        let map = if guarded { mem::Mapping::guarded } else { mem::Mapping::new };
        match py.detach(|| map(fd, size, offset, writable)) {
            Ok(mapping) => Ok(Self(Arc::new(mapping))),
            Err(MapError::System(error)) => Err(os_error(py, error)),
            Err(error) => Err(PyValueError::new_err(error.to_string())),
        }
    }

    #[getter]
    fn size(&self) -> usize {
        self.0.size()
    }

    #[getter]
    fn lost(&self) -> bool {
        self.0.lost()
    }

    /// # Safety
    ///
    /// `view` is what the interpreter passes to fill in a buffer request.
    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let mapping = &slf.get().0;
        // SAFETY: the object that exports it keeps the mapping.
        unsafe { fill(view, slf.as_any(), mapping, 0, mapping.size(), !mapping.writable(), flags) }
    }
}

/// A part of a mapping that a memoryview shows.
#[pyclass(frozen, module = "vbus._core")]
struct View {
    mapping: Arc<mem::Mapping>,
    offset: usize,
    size: usize,
    read_only: bool,
}

#[pymethods]
impl View {
    /// # Safety
    ///
    /// `view` is what the interpreter passes to fill in a buffer request.
    unsafe fn __getbuffer__(slf: &Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let View { mapping, offset, size, read_only } = slf.get();
        // SAFETY: the object that exports it keeps the mapping.
        unsafe { fill(view, slf.as_any(), mapping, *offset, *size, *read_only, flags) }
    }
}

/// Answer a buffer request.
///
/// # Safety
///
/// `view` is what the interpreter passed, `owner` is the object that was asked and keeps `mapping`.
unsafe fn fill(
    view: *mut ffi::Py_buffer,
    owner: &Bound<'_, PyAny>,
    mapping: &mem::Mapping,
    offset: usize,
    size: usize,
    read_only: bool,
    flags: c_int,
) -> PyResult<()> {
    if view.is_null() {
        return Err(PyBufferError::new_err("no view to fill in"));
    }
    let base = mapping.slice(offset, size).ptr_guard_mut().as_ptr();
    let size = ffi::Py_ssize_t::try_from(size).map_err(|_| PyBufferError::new_err("too large for a view"))?;
    // SAFETY: `view` is valid by the caller's word; base and size are inside the mapping, which the owner keeps, and
    // the view takes a reference to the owner.
    let result =
        unsafe { ffi::PyBuffer_FillInfo(view, owner.as_ptr(), base.cast(), size, c_int::from(read_only), flags) };
    if result == 0 {
        Ok(())
    } else {
        Err(PyErr::fetch(owner.py()))
    }
}

/// A memoryview over a part of a mapping.
pub fn view(
    py: Python<'_>,
    mapping: &Arc<mem::Mapping>,
    offset: usize,
    size: usize,
    read_only: bool,
) -> PyResult<Py<PyMemoryView>> {
    let view = Bound::new(py, View { mapping: mapping.clone(), offset, size, read_only })?;
    Ok(PyMemoryView::from(view.as_any())?.unbind())
}

/// Call `use_it` with the bytes of a buffer, which Python code may change at the same time, or which may be the very
/// memory that is written to.
pub fn with_bytes<R>(data: &Bound<'_, PyAny>, use_it: impl FnOnce(VolatileSlice<'_>) -> R) -> PyResult<R> {
    if let Ok(bytes) = data.cast::<PyBytes>() {
        let bytes = bytes.as_bytes();
        // SAFETY: valid while `bytes` is borrowed; `use_it` only reads what it is given here.
        return Ok(use_it(unsafe { VolatileSlice::new(bytes.as_ptr().cast_mut(), bytes.len()) }));
    }
    let buffer = contiguous(data)?;
    // SAFETY: the buffer is held until after the call and contiguous; `use_it` only reads what it is given here.
    Ok(use_it(unsafe { VolatileSlice::new(buffer.buf_ptr().cast(), buffer.len_bytes()) }))
}

/// Call `fill` with the bytes of a writable buffer.
pub fn with_bytes_mut<R>(buffer: &Bound<'_, PyAny>, fill: impl FnOnce(VolatileSlice<'_>) -> R) -> PyResult<R> {
    let buffer = contiguous(buffer)?;
    if buffer.readonly() {
        return Err(PyBufferError::new_err("the buffer is read-only"));
    }
    // SAFETY: the buffer is held until after the call, contiguous and writable.
    Ok(fill(unsafe { VolatileSlice::new(buffer.buf_ptr().cast(), buffer.len_bytes()) }))
}

fn contiguous(data: &Bound<'_, PyAny>) -> PyResult<PyUntypedBuffer> {
    let buffer = PyUntypedBuffer::get(data)?;
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err("the buffer is not contiguous"));
    }
    Ok(buffer)
}

/// A bytes object of `size` bytes that `fill` fills, without clearing it first.
pub fn new_bytes<'py>(
    py: Python<'py>,
    size: usize,
    fill: impl FnOnce(VolatileSlice<'_>),
) -> PyResult<Bound<'py, PyBytes>> {
    let length = ffi::Py_ssize_t::try_from(size).map_err(|_| PyValueError::new_err("too many bytes"))?;
    // SAFETY: without a source it makes an object whose bytes may be written while nobody else knows it.
    let bytes = unsafe {
        let object = ffi::PyBytes_FromStringAndSize(std::ptr::null(), length);
        Bound::from_owned_ptr_or_err(py, object)?.cast_into_unchecked::<PyBytes>()
    };
    // SAFETY: as many bytes, of an object that nobody else knows yet.
    fill(unsafe { VolatileSlice::new(ffi::PyBytes_AsString(bytes.as_ptr()).cast(), size) });
    Ok(bytes)
}

/// A driver's memory: regions by driver address, added and removed while rings use them.
#[pyclass(frozen, module = "vbus._core")]
pub struct Memory(pub Arc<mem::Memory>);

#[pymethods]
impl Memory {
    #[new]
    #[pyo3(signature = (*, max_regions = 64, max_bytes = MAX_BYTES))]
    fn new(max_regions: usize, max_bytes: u64) -> Self {
        Self(Arc::new(mem::Memory::new(max_regions, max_bytes)))
    }

    #[pyo3(signature = (address, mapping, offset = 0, size = None, *, writable = true))]
    fn add(
        &self,
        py: Python<'_>,
        address: u64,
        mapping: &Mapping,
        offset: u64,
        size: Option<u64>,
        writable: bool,
    ) -> PyResult<()> {
        let size = size.unwrap_or_else(|| (mapping.0.size() as u64).saturating_sub(offset));
        self.0.add(address, &mapping.0, offset, size, writable).map_err(|violation| to_error(py, &violation))
    }

    fn remove(&self, py: Python<'_>, address: u64) -> PyResult<()> {
        self.0.remove(address).map_err(|violation| to_error(py, &violation))
    }

    fn clear(&self) {
        self.0.clear();
    }

    fn regions(&self) -> Vec<(u64, u64, bool)> {
        let table = self.0.snapshot();
        table.regions().iter().map(|region| (region.address, region.size, region.writable)).collect()
    }

    fn read<'py>(&self, py: Python<'py>, address: u64, size: u64) -> PyResult<Bound<'py, PyBytes>> {
        let raise = |violation| to_error(py, &violation);
        // Before the bytes are made: a size that is nonsense must not cost memory.
        self.0.snapshot().translate(address, size, Access::Read, &mut Segments::default()).map_err(raise)?;
        let mut result = Ok(());
        let bytes = new_bytes(py, size as usize, |bytes| result = self.0.read(address, bytes))?;
        result.map_err(raise)?;
        Ok(bytes)
    }

    fn write(&self, py: Python<'_>, address: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
        with_bytes(data, |bytes| self.0.write(address, bytes))?.map_err(|violation| to_error(py, &violation))
    }

    fn log(&self, mapping: Option<&Mapping>) -> PyResult<()> {
        if mapping.is_some_and(|mapping| !mapping.0.writable()) {
            return Err(PyValueError::new_err("a log needs a writable mapping"));
        }
        self.0.log(mapping.map(|mapping| mapping.0.clone()));
        Ok(())
    }
}
