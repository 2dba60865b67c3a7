//! One request: a chain of descriptors, read once, checked and translated.

use crate::mem::{Access, Segments, Table};
use crate::violation::{Rule, Violation};

/// A chain of buffers that a driver made available. Its memory stays mapped while this lives.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    span: u16,
    descriptors: u32,
    readable: Segments,
    writable: Segments,
}

impl Chain {
    /// By it the driver knows the request again: in a split ring the number of the first descriptor, in a packed one the
    /// buffer id.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read.
    pub fn readable(&self) -> &Segments {
        &self.readable
    }

    /// What the device may write, in regions that allow it.
    pub fn writable(&self) -> &Segments {
        &self.writable
    }

    /// By what the driver knows it, and how many places of the ring it has.
    #[inline]
    pub(super) fn name(&mut self, head: u16, span: u16) {
        (self.head, self.span) = (head, span);
    }

    /// How many places of the ring it has.
    pub(super) fn span(&self) -> u16 {
        self.span
    }

    /// Pieces of memory, which is what a chain costs in private memory.
    pub(super) fn cost(&self) -> usize {
        self.readable.count() + self.writable.count()
    }

    /// Append a buffer of the driver; a chain has no more than `most`.
    #[inline]
    pub(super) fn push(
        &mut self,
        table: &Table,
        address: u64,
        size: u32,
        write: bool,
        most: u16,
    ) -> Result<(), Violation> {
        if size == 0 {
            return Err(Violation::new(Rule::ZeroLengthDescriptor, format!("in the chain of {}", self.head)));
        }
        if !write && self.writable.count() > 0 {
            return Err(Violation::new(Rule::ReadableAfterWritable, format!("in the chain of {}", self.head)));
        }
        // Used lengths have 32 bits.
        let total = self.readable.total() + self.writable.total() + u64::from(size);
        if total > u64::from(u32::MAX) {
            return Err(Violation::new(Rule::ChainTooLarge, format!("{total} bytes in the chain of {}", self.head)));
        }
        let (access, segments) =
            if write { (Access::Write, &mut self.writable) } else { (Access::Read, &mut self.readable) };
        table.translate(address, u64::from(size), access, segments)?;
        self.descriptors += 1;
        if self.descriptors > u32::from(most) {
            let detail = format!("in a ring of {most}, the chain of {}", self.head);
            return Err(Violation::new(Rule::ChainTooLong, detail));
        }
        Ok(())
    }
}
