//! What tests of engines have in common: a driver's memory with rings in it.

// Not every test needs all of it.
#![allow(dead_code)]

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vbus_engine::queue::{Queue, Running};
use vbus_engine::worker::Polling;
use vbus_ring::doorbell::{DirectSignal, Doorbell};
use vbus_ring::mem::{Mapping, Memory, VolatileSlice};
use vbus_ring::ring::{DeviceRing, DriverRing, Features, Setup};
use vbus_ring::signal::Notify;

pub const LIMIT: Duration = Duration::from_secs(20);
pub const POLLING: [Polling; 3] = [Polling::Notified, Polling::Adaptive, Polling::Always];

pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

pub struct Silent;

impl Notify for Silent {
    fn notify(&self) {}
    fn counters(&self) -> [u64; 3] {
        [0; 3]
    }
}

pub fn memfd(size: usize) -> File {
    // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(size as u64).unwrap();
    file
}

/// A driver's memory, with rings one after the other and buffers behind them.
pub struct Arena {
    pub mapping: Arc<Mapping>,
    pub memory: Arc<Memory>,
    used: usize,
}

pub const ADDRESS: u64 = 0x1000_0000;

impl Arena {
    pub fn new() -> Self {
        let size = 64 << 20;
        let mapping = Arc::new(Mapping::new(memfd(size).as_fd(), size, 0, true).unwrap());
        let memory = Arc::new(Memory::new(8, 1 << 40));
        memory.add(ADDRESS, &mapping, 0, size as u64, true).unwrap();
        Self { mapping, memory, used: 0 }
    }

    pub fn take(&mut self, size: usize) -> u64 {
        let at = self.used;
        self.used = (at + size).next_multiple_of(64);
        ADDRESS + at as u64
    }

    /// Both sides of a ring; the device's is given to the queue.
    pub fn ring(&mut self, size: u32, packed: bool, queue: &Queue) -> (DriverRing, Arc<Doorbell>) {
        self.ring_with(size, Features { packed, event_idx: true, indirect: false, in_order: false }, queue)
    }

    /// As `ring`, with what DPDK's driver negotiates.
    pub fn in_order_ring(&mut self, size: u32, packed: bool, queue: &Queue) -> (DriverRing, Arc<Doorbell>) {
        self.ring_with(size, Features { packed, event_idx: false, indirect: false, in_order: true }, queue)
    }

    fn ring_with(&mut self, size: u32, features: Features, queue: &Queue) -> (DriverRing, Arc<Doorbell>) {
        let packed = features.packed;
        let offset = self.used.next_multiple_of(4096);
        self.used = offset + DriverRing::bytes_needed(size, packed).unwrap();
        let driver = DriverRing::new(&self.mapping, offset, ADDRESS, size, features).unwrap();
        let (desc, avail, used) = (driver.desc(), driver.driver(), driver.device());
        let setup = Setup { size, desc, driver: avail, device: used, features, resume: None };
        let ring = DeviceRing::new(self.memory.clone(), 32768, setup).unwrap();
        let call = Arc::new(Doorbell::create().unwrap());
        let signal = Arc::new(DirectSignal::new(call.clone(), None).unwrap());
        queue.replace(Some(Running::new(ring, signal)));
        queue.set_native(true);
        (driver, call)
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        let offset = (address - ADDRESS) as usize;
        let from = VolatileSlice::from(&mut bytes[..]);
        from.copy_to_volatile_slice(self.mapping.slice(offset, from.len()));
    }

    pub fn get(&self, address: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        let offset = (address - ADDRESS) as usize;
        self.mapping.slice(offset, size).copy_to_volatile_slice(VolatileSlice::from(&mut bytes[..]));
        bytes
    }
}

/// A counter that only looks random.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) % limit
    }
}

pub fn reap(ring: &mut DriverRing) -> Vec<(u16, u32)> {
    let mut finished = Vec::new();
    ring.reap(1024, &mut finished).unwrap();
    finished
}
