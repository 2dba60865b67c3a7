//! Words of an area that two sides share.
//!
//! Everything shared is reached through `Area`: single loads and stores of aligned little-endian words. There is no
//! read-modify-write in it, on purpose: the other side may be a kernel whose atomics are not atomic against ours, or
//! sit behind a bus that has none. Production code works on `RawArea`, models on a table of loom's atomics.

use std::any::Any;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

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

/// Mapped memory as an `Area`.
pub struct RawArea {
    base: *const u8,
    size: usize,
    /// Whatever keeps the memory mapped.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory is only ever touched through atomics, and `_owner`, which keeps it mapped, is Send and Sync.
unsafe impl Send for RawArea {}
// SAFETY: as above.
unsafe impl Sync for RawArea {}

impl RawArea {
    /// # Safety
    ///
    /// `base..base + size` is readable and writable memory, stays so while `owner` lives, is aligned to 8 bytes, and
    /// nothing in this process forms references into it other than to atomics.
    pub unsafe fn new(base: *mut u8, size: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        assert_eq!(base.align_offset(8), 0, "an area is aligned to 8 bytes");
        Self { base, size, _owner: owner }
    }

    #[inline(always)]
    fn check(&self, offset: usize, width: usize) {
        assert!(
            offset % width == 0 && self.size >= width && offset <= self.size - width,
            "a word of {width} bytes at {offset} is outside an area of {} bytes",
            self.size
        );
    }

    #[inline(always)]
    fn word32(&self, offset: usize) -> &AtomicU32 {
        self.check(offset, 4);
        // SAFETY: inside the area and aligned (checked above; the base is aligned to 8), mapped while `self` lives.
        unsafe { AtomicU32::from_ptr(self.base.add(offset) as *mut u32) }
    }

    #[inline(always)]
    fn word64(&self, offset: usize) -> &AtomicU64 {
        self.check(offset, 8);
        // SAFETY: as for `word32`.
        unsafe { AtomicU64::from_ptr(self.base.add(offset) as *mut u64) }
    }
}

impl Area for RawArea {
    fn size(&self) -> usize {
        self.size
    }
    #[inline(always)]
    fn load32(&self, offset: usize, order: Ordering) -> u32 {
        u32::from_le(self.word32(offset).load(order))
    }
    #[inline(always)]
    fn store32(&self, offset: usize, value: u32, order: Ordering) {
        self.word32(offset).store(value.to_le(), order);
    }
    #[inline(always)]
    fn load64(&self, offset: usize, order: Ordering) -> u64 {
        u64::from_le(self.word64(offset).load(order))
    }
    #[inline(always)]
    fn store64(&self, offset: usize, value: u64, order: Ordering) {
        self.word64(offset).store(value.to_le(), order);
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
