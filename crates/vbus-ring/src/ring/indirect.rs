//! Indirect tables (sections 2.7.5.3 and 2.8.7), as the device's side reads them.

use std::sync::atomic::Ordering;

use super::chain::Gather;
use super::DESC_BYTES;
use crate::mem::{Access, Segments, Table, Window};
use crate::violation::{Rule, Violation};

/// An indirect table in the driver's memory: aligned or not, in one piece or several.
pub(super) struct Entries {
    bytes: Bytes,
    count: u32,
}

enum Bytes {
    Words(Window),
    Bytes(Segments),
}

impl Entries {
    /// The table of `size` bytes at `address`, which a chain of a ring of `most` descriptors refers to.
    ///
    /// Violation: indirect-table-size, indirect-table-too-long, address-outside-memory.
    pub fn find(table: &Table, address: u64, size: u32, most: u16, chain: &impl Gather) -> Result<Self, Violation> {
        let violation =
            |rule| Violation::new(rule, format!("{size} bytes at {address:#x}, in the chain of {}", chain.head()));
        if size == 0 || size % DESC_BYTES as u32 != 0 {
            return Err(violation(Rule::IndirectTableSize));
        }
        let count = size / DESC_BYTES as u32;
        if count > u32::from(most) {
            return Err(violation(Rule::IndirectTableTooLong));
        }
        let size = u64::from(size);
        let bytes = match table.window(address, size, Access::Read) {
            Some(window) if window.is_aligned(8) => Bytes::Words(window),
            _ => {
                let mut segments = Segments::default();
                table.translate(address, size, Access::Read, &mut segments)?;
                Bytes::Bytes(segments)
            }
        };
        Ok(Self { bytes, count })
    }

    /// Entries of the table: at least one.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// The two words of an entry, read once.
    #[inline]
    pub fn words(&self, index: u32) -> [u64; 2] {
        let place = DESC_BYTES * index as usize;
        match &self.bytes {
            // Relaxed: written before what made the chain available, which was acquired.
            Bytes::Words(window) => [0, 8].map(|at| window.load64(place + at, Ordering::Relaxed)),
            Bytes::Bytes(segments) => {
                let mut bytes = [0; DESC_BYTES];
                segments.read_once(place as u64, &mut bytes);
                [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte])))
            }
        }
    }
}
