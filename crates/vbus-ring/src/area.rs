//! Words of an area that two sides share.
//!
//! Everything shared is reached through `Area`: single loads and stores of aligned little-endian words. There is no
//! read-modify-write in it, on purpose: the other side may be a kernel whose atomics are not atomic against ours, or
//! sit behind a bus that has none. Production code works on a window of a mapping, models on a table of loom's
//! atomics.

use std::sync::atomic::Ordering;

use crate::mem::Window;

/// Aligned little-endian words, shared with a side that is not trusted. Offsets are bytes.
pub trait Area: Send + Sync {
    /// Bytes of the area.
    fn size(&self) -> usize;
    /// Load a word; panics outside the area or when misaligned.
    fn load32(&self, offset: usize, order: Ordering) -> u32;
    /// Store a word; panics outside the area or when misaligned.
    fn store32(&self, offset: usize, value: u32, order: Ordering);
    /// Load a double word; panics outside the area or when misaligned.
    fn load64(&self, offset: usize, order: Ordering) -> u64;
    /// Store a double word; panics outside the area or when misaligned.
    fn store64(&self, offset: usize, value: u64, order: Ordering);
}

impl Area for Window {
    fn size(&self) -> usize {
        Window::size(self)
    }
    #[inline(always)]
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        Window::load32(self, offset, order)
    }
    #[inline(always)]
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        Window::store32(self, offset, value, order);
    }
    #[inline(always)]
    fn load64(&self, offset: usize, order: Ordering) -> u64 {
        Window::load64(self, offset, order)
    }
    #[inline(always)]
    fn store64(&self, offset: usize, value: u64, order: Ordering) {
        Window::store64(self, offset, value, order);
    }
}

/// Where a range would leave an area, or start off its alignment.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Starts off its alignment.
    #[error("{what} at offset {offset} must be aligned to {align} bytes")]
    Misaligned {
        /// Which part.
        what: &'static str,
        /// Where it was put.
        offset: usize,
        /// What it must be a multiple of.
        align: usize,
    },
    /// Ends behind the area.
    #[error("{what} at offset {offset} does not fit an area of {size} bytes")]
    Outside {
        /// Which part.
        what: &'static str,
        /// Where it was put.
        offset: usize,
        /// Bytes of the area.
        size: usize,
    },
    /// A count that the layout does not allow.
    #[error("{0}")]
    Count(&'static str),
}

/// Check that `count` items of `each` bytes at `offset` lie in an area of `size` bytes, aligned to `align`.
pub fn check_range(
    what: &'static str,
    size: usize,
    offset: usize,
    count: usize,
    each: usize,
    align: usize,
) -> Result<(), LayoutError> {
    if offset % align != 0 {
        return Err(LayoutError::Misaligned { what, offset, align });
    }
    match count.checked_mul(each).and_then(|bytes| bytes.checked_add(offset)) {
        Some(end) if end <= size => Ok(()),
        _ => Err(LayoutError::Outside { what, offset, size }),
    }
}
