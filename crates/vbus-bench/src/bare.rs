//! Rings of both layouts that check nothing, keep nothing and ask for nothing: what the words alone cost.
//!
//! One request at a time, of one buffer that the device reads; polled on both sides. They touch the lines that a ring
//! must touch, in its order, and believe what they read: nothing but a measure.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use vbus_ring::mem::Mapping;

use crate::wait::{Patience, Silence};

/// Write an eventfd with a value.
pub fn say_value(fd: RawFd, value: u64) -> io::Result<()> {
    let value = value.to_ne_bytes();
    // SAFETY: eight bytes are read from `value`.
    match unsafe { libc::write(fd, value.as_ptr().cast(), value.len()) } {
        8 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Words of an area by their offsets, looked up without a check where it is built without assertions.
#[derive(Clone)]
pub struct Words {
    base: *mut u8,
    area: Arc<Mapping>,
}

// SAFETY: the memory is shared anyway, and accessed by atomics.
unsafe impl Send for Words {}

macro_rules! word {
    ($load:ident, $store:ident, $atomic:ty, $word:ty) => {
        /// Load a word.
        #[inline(always)]
        pub fn $load(&self, offset: usize, order: Ordering) -> $word {
            debug_assert!(offset + size_of::<$word>() <= self.area.size());
            // SAFETY: offsets are those of a layout that fits the area, aligned to their words.
            unsafe { <$atomic>::from_ptr(self.base.add(offset).cast()) }.load(order)
        }

        /// Store a word.
        #[inline(always)]
        pub fn $store(&self, offset: usize, value: $word, order: Ordering) {
            debug_assert!(offset + size_of::<$word>() <= self.area.size());
            // SAFETY: as above.
            unsafe { <$atomic>::from_ptr(self.base.add(offset).cast()) }.store(value, order);
        }
    };
}

impl Words {
    /// Of an area that is as large as its layout.
    pub fn new(area: Arc<Mapping>) -> Self {
        Self { base: area.as_ptr(), area }
    }

    word!(load16, store16, AtomicU16, u16);
    word!(load32, store32, AtomicU32, u32);
    word!(load64, store64, AtomicU64, u64);

    /// Poll a word until it is what is waited for.
    #[inline(always)]
    pub fn wait64(&self, offset: usize, good: impl Fn(u64) -> bool) -> Result<u64, Silence> {
        let mut patience = Patience::default();
        loop {
            let word = self.load64(offset, Ordering::Acquire);
            if good(word) {
                return Ok(word);
            }
            patience.glance()?;
        }
    }

    /// As `wait64`.
    #[inline(always)]
    fn wait16(&self, offset: usize, good: impl Fn(u16) -> bool) -> Result<u16, Silence> {
        let mut patience = Patience::default();
        loop {
            let word = self.load16(offset, Ordering::Acquire);
            if good(word) {
                return Ok(word);
            }
            patience.glance()?;
        }
    }
}

const LINE: u32 = 64;

/// Where the parts of a split ring lie from its start: as `vbus_ring` lays them out.
struct Split {
    avail: usize,
    used: usize,
    size: u16,
}

impl Split {
    fn new(ring: usize, size: u16) -> Self {
        let avail = ring + 16 * usize::from(size);
        let used = (avail + 4 + 2 * usize::from(size) + 2).next_multiple_of(64);
        Self { avail, used, size }
    }

    #[inline(always)]
    fn avail(&self, index: u16) -> usize {
        self.avail + 4 + 2 * usize::from(index & (self.size - 1))
    }

    #[inline(always)]
    fn used(&self, index: u16) -> usize {
        self.used + 4 + 8 * usize::from(index & (self.size - 1))
    }
}

/// The driver of a split ring.
pub struct SplitDriver {
    words: Words,
    ring: usize,
    layout: Split,
    data: usize,
    address: u64,
    index: u16,
}

impl SplitDriver {
    /// A ring and a line of data at these offsets.
    pub fn new(words: Words, ring: usize, data: usize, size: u16) -> Self {
        let address = (1 << 32) + data as u64;
        Self { words, ring, layout: Split::new(ring, size), data, address, index: 0 }
    }

    /// One round trip.
    #[inline]
    pub fn round(&mut self, value: u64) -> Result<(), Silence> {
        let Self { words, layout, index, .. } = self;
        words.store64(self.data, value, Ordering::Relaxed);
        words.store64(self.ring, self.address, Ordering::Relaxed);
        words.store64(self.ring + 8, u64::from(LINE), Ordering::Relaxed);
        words.store16(layout.avail(*index), 0, Ordering::Relaxed);
        let used = *index;
        *index = index.wrapping_add(1);
        words.store16(layout.avail + 2, *index, Ordering::Release);
        words.wait16(layout.used + 2, |seen| seen == *index)?;
        let _id = words.load32(layout.used(used), Ordering::Relaxed);
        let _written = words.load32(layout.used(used) + 4, Ordering::Relaxed);
        Ok(())
    }
}

/// The device of a split ring.
pub struct SplitDevice {
    words: Words,
    ring: usize,
    layout: Split,
    address: u64,
    index: u16,
}

impl SplitDevice {
    /// A ring at an offset of an area that begins at a driver's address.
    pub fn new(words: Words, ring: usize, address: u64, size: u16) -> Self {
        Self { words, ring, layout: Split::new(ring, size), address, index: 0 }
    }

    /// One answer: the value.
    #[inline]
    pub fn round(&mut self) -> Result<u64, Silence> {
        let Self { words, layout, index, .. } = self;
        words.wait16(layout.avail + 2, |seen| seen != *index)?;
        let head = words.load16(layout.avail(*index), Ordering::Relaxed);
        let desc = self.ring + 16 * usize::from(head);
        let address = words.load64(desc, Ordering::Relaxed);
        let _size = words.load64(desc + 8, Ordering::Relaxed);
        let value = words.load64((address - self.address) as usize, Ordering::Relaxed);
        let used = layout.used(*index);
        words.store32(used, u32::from(head), Ordering::Relaxed);
        words.store32(used + 4, 0, Ordering::Relaxed);
        *index = index.wrapping_add(1);
        words.store16(layout.used + 2, *index, Ordering::Release);
        Ok(value)
    }
}

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// A place in a packed ring.
#[derive(Clone, Copy)]
struct Place {
    index: u16,
    wrap: bool,
    size: u16,
}

impl Place {
    fn first(size: u16) -> Self {
        Self { index: 0, wrap: true, size }
    }

    #[inline(always)]
    fn desc(self, ring: usize) -> usize {
        ring + 16 * usize::from(self.index)
    }

    #[inline(always)]
    fn next(&mut self) {
        self.index += 1;
        if self.index == self.size {
            (self.index, self.wrap) = (0, !self.wrap);
        }
    }

    #[inline(always)]
    fn available(self) -> u16 {
        if self.wrap {
            AVAIL
        } else {
            USED
        }
    }

    #[inline(always)]
    fn used(self) -> u16 {
        if self.wrap {
            AVAIL | USED
        } else {
            0
        }
    }
}

/// The driver of a packed ring.
pub struct PackedDriver {
    words: Words,
    ring: usize,
    data: usize,
    address: u64,
    place: Place,
}

impl PackedDriver {
    /// A ring and a line of data at these offsets.
    pub fn new(words: Words, ring: usize, data: usize, size: u16) -> Self {
        let address = (1 << 32) + data as u64;
        Self { words, ring, data, address, place: Place::first(size) }
    }

    /// One round trip.
    #[inline]
    pub fn round(&mut self, value: u64) -> Result<(), Silence> {
        let Self { words, place, .. } = self;
        let desc = place.desc(self.ring);
        words.store64(self.data, value, Ordering::Relaxed);
        words.store64(desc, self.address, Ordering::Relaxed);
        words.store32(desc + 8, LINE, Ordering::Relaxed);
        words.store16(desc + 12, 0, Ordering::Relaxed);
        words.store16(desc + 14, place.available(), Ordering::Release);
        let used = place.used();
        words.wait16(desc + 14, |flags| flags & (AVAIL | USED) == used)?;
        let _written = words.load32(desc + 8, Ordering::Relaxed);
        let _id = words.load16(desc + 12, Ordering::Relaxed);
        place.next();
        Ok(())
    }
}

/// The device of a packed ring.
pub struct PackedDevice {
    words: Words,
    ring: usize,
    address: u64,
    place: Place,
}

impl PackedDevice {
    /// A ring at an offset of an area that begins at a driver's address.
    pub fn new(words: Words, ring: usize, address: u64, size: u16) -> Self {
        Self { words, ring, address, place: Place::first(size) }
    }

    /// One answer: the value.
    #[inline]
    pub fn round(&mut self) -> Result<u64, Silence> {
        let Self { words, place, .. } = self;
        let desc = place.desc(self.ring);
        let available = place.available();
        words.wait16(desc + 14, |flags| flags & (AVAIL | USED) == available)?;
        let address = words.load64(desc, Ordering::Relaxed);
        let _size = words.load32(desc + 8, Ordering::Relaxed);
        let id = words.load16(desc + 12, Ordering::Relaxed);
        let value = words.load64((address - self.address) as usize, Ordering::Relaxed);
        words.store32(desc + 8, 0, Ordering::Relaxed);
        words.store16(desc + 12, id, Ordering::Relaxed);
        words.store16(desc + 14, place.used(), Ordering::Release);
        place.next();
        Ok(value)
    }
}
