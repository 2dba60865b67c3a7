//! A mapping as a shared area of rings.

use std::fmt::Display;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use vbus_ring::mem::Window;

use crate::memory::Mapping;

/// The whole of a mapping, which both sides write to.
pub fn area(mapping: &Mapping) -> PyResult<Window> {
    let mapping = mapping.0.clone();
    if !mapping.writable() {
        return Err(PyValueError::new_err("the area must be mapped writable: both sides write to it"));
    }
    let size = mapping.size();
    Ok(Window::new(mapping, 0, size))
}

/// A wrong argument, in the words of the ring.
pub fn value_error(error: impl Display) -> PyErr {
    PyValueError::new_err(error.to_string())
}
