//! One request: a chain of descriptors, read once, checked and translated.

use std::sync::Arc;

use super::device::Chains;
use crate::mem::{Access, Segments, Table};
use crate::violation::{Rule, Violation};

/// What a layout tells of a chain while it reads it. Made anew for each.
pub trait Gather {
    /// By what the driver knows the chain again.
    fn head(&self) -> u16;

    /// In a packed ring, the buffer id, which the last descriptor tells, and how many descriptors of the ring it took.
    fn end(&mut self, id: u16, span: u16);

    /// Append a buffer of the driver; a chain has no more than `most`.
    fn push(&mut self, table: &Table, address: u64, size: u32, write: bool, most: u16) -> Result<(), Violation>;

    /// What a ring remembers of it.
    fn taken(&self) -> Taken;
}

/// What a ring remembers of a chain that it gave out.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// By what the driver knows it.
    pub head: u16,
    /// How many places of the ring it has.
    pub span: u16,
    /// Pieces of memory, which is what a chain costs in private memory.
    pub cost: usize,
    /// Whether any of it is the device's to write.
    pub writable: bool,
}

/// What is known of a chain so far, and the rules that its next buffer must keep.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rules {
    descriptors: u32,
    /// Bytes that the device may read, and may write: together no more than a u32 has.
    readable: u32,
    writable: u32,
}

impl Rules {
    /// Of a chain of one buffer that is not empty.
    #[inline(always)]
    pub fn single(size: u32, write: bool) -> Self {
        let (readable, writable) = if write { (0, size) } else { (size, 0) };
        Self { descriptors: 1, readable, writable }
    }

    /// Bytes that the device may read.
    #[inline(always)]
    pub fn readable(&self) -> u64 {
        u64::from(self.readable)
    }

    /// Bytes that it may write.
    #[inline(always)]
    pub fn writable(&self) -> u64 {
        u64::from(self.writable)
    }

    /// Another buffer, or the rule that it breaks.
    #[inline]
    pub fn admit(&mut self, head: u16, size: u32, write: bool) -> Result<(), Violation> {
        if size == 0 {
            return Err(Violation::new(Rule::ZeroLengthDescriptor, format!("in the chain of {head}")));
        }
        if !write && self.writable > 0 {
            return Err(Violation::new(Rule::ReadableAfterWritable, format!("in the chain of {head}")));
        }
        // Used lengths have 32 bits.
        let total = self.readable() + self.writable() + u64::from(size);
        if total > u64::from(u32::MAX) {
            return Err(Violation::new(Rule::ChainTooLarge, format!("{total} bytes in the chain of {head}")));
        }
        *(if write { &mut self.writable } else { &mut self.readable }) += size;
        self.descriptors += 1;
        Ok(())
    }

    /// To be asked when the buffer was found in memory: a chain whose buffers are elsewhere is told of that first.
    #[inline]
    pub fn count(&self, head: u16, most: u16) -> Result<(), Violation> {
        if self.descriptors > u32::from(most) {
            return Err(Violation::new(Rule::ChainTooLong, format!("in a ring of {most}, the chain of {head}")));
        }
        Ok(())
    }
}

/// A chain of buffers that a driver made available. Its memory stays mapped while this lives.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    span: u16,
    rules: Rules,
    readable: Segments,
    writable: Segments,
}

impl Chain {
    /// Nothing yet, and one place of the ring.
    fn new(head: u16) -> Self {
        Self { head, span: 1, rules: Rules::default(), readable: Segments::default(), writable: Segments::default() }
    }

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
}

impl Chain {
    /// One that was read elsewhere.
    pub(super) fn of(head: u16, span: u16, readable: Segments, writable: Segments) -> Self {
        Self { head, span, rules: Rules::default(), readable, writable }
    }
}

impl Gather for Chain {
    fn head(&self) -> u16 {
        self.head
    }

    fn end(&mut self, id: u16, span: u16) {
        (self.head, self.span) = (id, span);
    }

    #[inline]
    fn push(&mut self, table: &Table, address: u64, size: u32, write: bool, most: u16) -> Result<(), Violation> {
        self.rules.admit(self.head, size, write)?;
        let (access, segments) =
            if write { (Access::Write, &mut self.writable) } else { (Access::Read, &mut self.readable) };
        table.translate(address, u64::from(size), access, segments)?;
        self.rules.count(self.head, most)
    }

    fn taken(&self) -> Taken {
        Taken {
            head: self.head,
            span: self.span,
            cost: self.readable.count() + self.writable.count(),
            writable: self.writable.count() > 0,
        }
    }
}

/// Of the last.
impl Gather for Vec<Chain> {
    #[inline]
    fn head(&self) -> u16 {
        self.last().map_or(0, Chain::head)
    }

    #[inline]
    fn end(&mut self, id: u16, span: u16) {
        if let Some(chain) = self.last_mut() {
            chain.end(id, span);
        }
    }

    #[inline]
    fn push(&mut self, table: &Table, address: u64, size: u32, write: bool, most: u16) -> Result<(), Violation> {
        self.last_mut().map_or(Ok(()), |chain| chain.push(table, address, size, write, most))
    }

    #[inline]
    fn taken(&self) -> Taken {
        self.last().map_or(Taken { head: 0, span: 0, cost: 0, writable: false }, Chain::taken)
    }
}

impl Chains for Vec<Chain> {
    fn count(&self) -> usize {
        self.len()
    }

    fn truncate(&mut self, count: usize) {
        self.truncate(count);
    }

    fn open(&mut self, _table: &Arc<Table>, name: u16) {
        self.push(Chain::new(name));
    }
}
