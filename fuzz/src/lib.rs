//! What the fuzz targets share: an input that is cut into values, memory that sees every write, and seeds.
//!
//! A target is one file in `src/bin`: `target!(one, seeds)` names the function that takes an input, and the one that
//! makes valid inputs to begin with. A finding is a panic.

pub mod queue;
pub mod world;

use std::os::fd::{AsFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;

use vbus_ring::mem::{Mapping, VolatileSlice};

#[doc(hidden)]
pub use libfuzzer_sys;

/// Make this file a target: `fn one(&[u8])`, and `fn seeds() -> Vec<Seed>`.
#[macro_export]
macro_rules! target {
    ($one:path, $seeds:path) => {
        $crate::libfuzzer_sys::fuzz_target!(init: $crate::write_seeds($seeds), |data: &[u8]| $one(data));
    };
}

/// With `--seeds DIRECTORY`: write the seeds there, and end.
pub fn write_seeds(seeds: fn() -> Vec<Seed>) {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() != Some("--seeds") {
        return;
    }
    let directory = words.next().expect("a directory for the seeds");
    for (number, seed) in seeds().iter().enumerate() {
        std::fs::write(Path::new(&directory).join(format!("seed-{number:03}")), &seed.0).expect("room for the seeds");
    }
    std::process::exit(0);
}

/// An input: values from its first byte on, and zeroes behind its last.
pub struct Input<'a>(&'a [u8]);

macro_rules! input {
    ($name:ident) => {
        /// The next number, little-endian.
        pub fn $name(&mut self) -> $name {
            let mut word = [0; size_of::<$name>()];
            let bytes = self.bytes(size_of::<$name>());
            word[..bytes.len()].copy_from_slice(bytes);
            $name::from_le_bytes(word)
        }
    };
}

impl<'a> Input<'a> {
    /// Of these bytes.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, fewer at the end.
    pub fn bytes(&mut self, size: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(size.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    input!(u8);
    input!(u16);
    input!(u32);
    input!(u64);
}

/// An input in the making: what `Input` reads, in the same order.
#[derive(Clone, Default)]
pub struct Seed(Vec<u8>);

macro_rules! seed {
    ($name:ident) => {
        /// Append a number.
        #[must_use]
        pub fn $name(mut self, value: $name) -> Self {
            self.0.extend(value.to_le_bytes());
            self
        }
    };
}

impl Seed {
    seed!(u8);
    seed!(u16);
    seed!(u32);
    seed!(u64);

    /// Append bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

/// A shared mapping and a private copy of it: what changed between two looks is known to the byte.
pub struct Watched {
    /// What the code under test is given.
    pub mapping: Arc<Mapping>,
    copy: Vec<u8>,
    now: Vec<u8>,
}

impl Watched {
    /// `size` bytes, all zero.
    pub fn new(size: usize) -> Self {
        // SAFETY: the name is a string constant, and the descriptor is checked below.
        let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: just made, and owned by nobody else.
        let file = unsafe { std::fs::File::from_raw_fd(fd) };
        file.set_len(size as u64).unwrap();
        let mapping = Arc::new(Mapping::new(file.as_fd(), size, 0, true).unwrap());
        Self { mapping, copy: vec![0; size], now: vec![0; size] }
    }

    /// All zero again.
    pub fn clear(&mut self) {
        self.copy.fill(0);
        self.put(0, &vec![0; self.copy.len()]);
    }

    /// Write as the other side, which is no change to be watched; what passes the end is left out.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        let size = bytes.len().min(self.copy.len().saturating_sub(at));
        if size > 0 {
            self.mapping.slice(at, size).copy_from(&bytes[..size]);
            self.copy[at..at + size].copy_from_slice(&bytes[..size]);
        }
    }

    /// The bytes as they were at the last look, or as the other side wrote them since.
    pub fn known(&self) -> &[u8] {
        &self.copy
    }

    /// Look again. Panics when a byte changed outside of these parts, each a place and a size.
    pub fn look(&mut self, allowed: &[(usize, usize)]) {
        self.mapping.slice(0, self.now.len()).copy_to_volatile_slice(VolatileSlice::from(&mut self.now[..]));
        for &(at, size) in allowed {
            self.copy[at..at + size].copy_from_slice(&self.now[at..at + size]);
        }
        if self.copy != self.now {
            let at = self.copy.iter().zip(&self.now).position(|(was, is)| was != is);
            panic!("byte {:#x} of the memory was written, and only {allowed:x?} may be", at.unwrap());
        }
    }
}

/// A little-endian number of these bytes.
pub fn word16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

/// A little-endian number of these bytes.
pub fn word32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// A little-endian number of these bytes.
pub fn word64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
