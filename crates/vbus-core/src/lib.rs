//! The extension module `vbus._core`: the Python face of `vbus-ring`, and the scheduler.

use pyo3::prelude::*;

mod area;
mod bench;
mod doorbell;
mod engine;
mod event;
mod link;
mod memory;
mod request;
mod ring;
mod scheduler;
mod serve;
mod signal;
mod violation;

/// The native core of vbus; `_core.pyi` beside it is its documentation.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::bench::{bench_calls, bench_reads, BenchRequest, EchoSide, Frames, Load, PingSide};
    #[pymodule_export]
    use crate::doorbell::Doorbell;
    #[pymodule_export]
    use crate::engine::{
        BlkEngine, Engine, LoopbackEngine, NetRules, PcapEngine, PcapFile, Switch, SwitchEngine, SwitchPort, TapEngine,
        Task, Worker,
    };
    #[pymodule_export]
    use crate::event::{EventReceiver, EventSender};
    #[pymodule_export]
    use crate::link::LinkRing;
    #[pymodule_export]
    use crate::memory::{Mapping, Memory};
    #[pymodule_export]
    use crate::request::Request;
    #[pymodule_export]
    use crate::ring::{DeviceQueue, DriverQueue};
    #[pymodule_export]
    use crate::scheduler::Scheduler;
    #[pymodule_export]
    use crate::serve::Batch;
    #[pymodule_export]
    use crate::signal::Signal;
}
