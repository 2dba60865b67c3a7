//! Errors, raised from native code as Python expects them: `vbus.errors.Violation`, and OSError with its errno.

use std::io;

use pyo3::exceptions::{PyBaseException, PyOSError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use vbus_ring::violation::Violation;

/// The Python class, imported once: the errors are Python, because people read and catch them there.
fn class(py: Python<'_>) -> PyResult<&Bound<'_, PyType>> {
    static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    CLASS.import(py, "vbus.errors", "Violation")
}

/// A violation as the Python object, raised or kept.
pub fn to_object<'py>(py: Python<'py>, violation: &Violation) -> PyResult<Bound<'py, PyAny>> {
    named(py, violation.name(), &violation.detail)
}

/// One of a device's own rules.
pub fn named<'py>(py: Python<'py>, name: &str, detail: &str) -> PyResult<Bound<'py, PyAny>> {
    class(py)?.call1((name, detail))
}

/// A violation as a Python error.
pub fn to_error(py: Python<'_>, violation: &Violation) -> PyErr {
    match to_object(py, violation).and_then(|object| Ok(object.cast_into::<PyBaseException>()?)) {
        Ok(object) => PyErr::from_value(object.into_any()),
        Err(error) => error,
    }
}

/// What the system refused, with its errno: PyO3's own conversion keeps only the text of it.
pub fn os_error(py: Python<'_>, error: io::Error) -> PyErr {
    let Some(code) = error.raw_os_error() else {
        return error.into();
    };
    match py.import("os").and_then(|os| os.call_method1("strerror", (code,))) {
        Ok(text) => PyOSError::new_err((code, text.unbind())),
        Err(error) => error,
    }
}
