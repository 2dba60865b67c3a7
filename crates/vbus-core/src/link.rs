//! The Python face of link rings: both halves in one object, of which a side uses one.

use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use vbus_ring::link::{self, LinkError, LinkLayout, LinkReceiver, LinkSender};
use vbus_ring::mem::Window;

use crate::area::{area, value_error};
use crate::memory::Mapping;
use crate::violation::to_error;

/// One direction of a link in a shared area: whole messages, one producer, one consumer.
#[pyclass(frozen, module = "vbus._core")]
pub struct LinkRing {
    area: Window,
    sender: Mutex<LinkSender>,
    receiver: Mutex<LinkReceiver>,
}

fn raise(py: Python<'_>, error: LinkError) -> PyErr {
    match error.violation() {
        Some(violation) => to_error(py, &violation),
        None => PyValueError::new_err(error.to_string()),
    }
}

#[pymethods]
impl LinkRing {
    #[classattr]
    const HEADER: usize = link::HEADER;

    #[new]
    fn new(area: PyRef<'_, Mapping>, offset: usize, size: usize) -> PyResult<Self> {
        let area = self::area(&area)?;
        let layout = LinkLayout::new(area.size(), offset, size).map_err(value_error)?;
        let (sender, receiver) = (LinkSender::new(layout), LinkReceiver::new(layout));
        Ok(Self { area, sender: Mutex::new(sender), receiver: Mutex::new(receiver) })
    }

    fn send(&self, py: Python<'_>, message: &Bound<'_, PyAny>) -> PyResult<bool> {
        let message = match message.cast::<PyBytes>() {
            Ok(bytes) => Cow::Borrowed(bytes.as_bytes()),
            Err(_) => Cow::Owned(PyBuffer::<u8>::get(message)?.to_vec(py)?),
        };
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.send(&self.area, &message).map_err(|error| raise(py, error))
    }

    fn receive<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        let message = receiver.receive(&self.area).map_err(|error| raise(py, error))?;
        Ok(message.map(|message| PyBytes::new(py, &message)))
    }
}
