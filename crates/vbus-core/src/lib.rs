//! The extension module `vbus._core`: the Python face of `vbus-ring`, and the scheduler.

use pyo3::prelude::*;

mod signal;
mod violation;

/// The native core of vbus; `_core.pyi` beside it is its documentation.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::signal::Signal;
}
