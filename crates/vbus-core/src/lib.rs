//! The extension module `vbus._core`: the Python face of `vbus-ring`, and the scheduler.

use pyo3::prelude::*;

/// The native core of vbus; `_core.pyi` beside it is its documentation.
#[pymodule]
mod _core {}
