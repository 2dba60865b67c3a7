//! Workers and engines: queues served by native threads, which know nothing of Python.
//!
//! A `Queue` is a device's side of a ring that may run, pause and stop. An engine is what serves one or several of them:
//! it takes a batch of chains, does the work, and gives them back as one, with one decision whether to notify. A
//! `Worker` is a thread that gives engines their turns, most urgent first, and sleeps or polls when there is nothing to
//! do.

pub mod blk;
pub mod loopback;
pub mod net;
pub mod offload;
pub mod outbox;
pub mod pcap;
pub mod queue;
pub mod recording;
pub mod stations;
pub mod switch;
pub mod tap;
pub mod worker;
