//! A driver's memory, as a device reaches it.
//!
//! A `Mapping` is a piece of a file, mapped shared. A `Memory` gives mappings driver addresses: it is a table of
//! regions that connectors change while rings use it. Users work on a snapshot of the table, translate a driver's (address,
//! length) into `Segments` of mappings, and from then on hold the mappings themselves, so that removing a region never
//! takes memory away under a user.
//!
//! Trust: addresses and lengths come from the driver and are checked here and nowhere else. The bytes behind them
//! belong to the driver too, and may change at any time: no Rust reference to them is ever formed. Words are accessed by
//! atomics (`Window`), bulk by volatile slices.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{fence, AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use smallvec::SmallVec;
use vm_memory::VolatileMemory;
pub use vm_memory::VolatileSlice;

use crate::dirty::Log;
use crate::guard;
use crate::violation::{Rule, Violation};

/// Bytes that come near together.
pub(crate) const LINE: usize = 64;

/// Why a file could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Nothing to map.
    #[error("a mapping needs at least one byte")]
    Empty,
    /// The file is shorter than what is to be mapped: touching the rest would be a bus error.
    #[error("the file ends at byte {end}, before {offset} + {size}")]
    PastEnd {
        /// Bytes of the file.
        end: u64,
        /// Where the mapping would begin.
        offset: u64,
        /// Bytes it would have.
        size: u64,
    },
    /// A process serves the file (FUSE), perhaps the peer itself: whoever touches its memory waits for that one.
    #[error("the file is served by a process (FUSE), which could make whoever touches its memory wait for ever")]
    Served,
    /// The system refused.
    #[error(transparent)]
    System(#[from] io::Error),
}

/// Bytes of a file, mapped shared into this process until the last user is gone.
///
/// vm-memory's own mapping keeps a duplicate of the descriptor for as long as it lives. Here the descriptors are a
/// peer's to spend, so this one needs none once it is made.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    size: usize,
    writable: bool,
    guard: Option<&'static guard::Slot>,
}

// SAFETY: the memory is shared with other processes anyway; all access goes through atomics and volatile slices.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map `size` bytes of `fd` from `offset`, which is a multiple of the page size. `fd` may be closed after.
    pub fn new(fd: BorrowedFd<'_>, size: usize, offset: u64, writable: bool) -> Result<Self, MapError> {
        Self::map(fd, size, offset, writable)
    }

    /// As `new`, of a file that its owner may truncate while it is mapped: touching what is not there any more gives
    /// zeroes in place of all of it, and it is lost from then on. Without this, it kills the process.
    ///
    /// A file of FUSE is refused, as there is no way out of a fault that its server does not answer.
    pub fn guarded(fd: BorrowedFd<'_>, size: usize, offset: u64, writable: bool) -> Result<Self, MapError> {
        if file_system(fd)?.f_type as u64 == FUSE_MAGIC {
            return Err(MapError::Served);
        }
        let mut mapping = Self::map(fd, size, offset, writable)?;
        mapping.guard = Some(guard::Slot::take(mapping.as_ptr() as usize, size, writable)?);
        Ok(mapping)
    }

    fn map(fd: BorrowedFd<'_>, size: usize, offset: u64, writable: bool) -> Result<Self, MapError> {
        if size == 0 {
            return Err(MapError::Empty);
        }
        let metadata = File::from(fd.try_clone_to_owned()?).metadata()?;
        if metadata.is_file() && offset.checked_add(size as u64).is_none_or(|end| end > metadata.len()) {
            return Err(MapError::PastEnd { end: metadata.len(), offset, size: size as u64 });
        }
        if huge_page(fd)?.is_some_and(|page| offset % page != 0 || size as u64 % page != 0) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL).into());
        }
        let offset = libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // NORESERVE: what the driver does not touch must not count against this process.
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the system's choice changes no memory that anything uses.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, fd.as_raw_fd(), offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        Ok(Self { base, size, writable, guard: None })
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether it was mapped for writing. A write to one that was not kills the process, so callers check.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Whether zeroes of our own are in its place since its file was truncated. Then it stays so.
    pub fn lost(&self) -> bool {
        self.guard.is_some_and(guard::Slot::lost)
    }

    /// The first byte, aligned to a page. Valid while `self` lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// A part of it; panics when it is not inside, which is a defect of the caller.
    pub fn slice(&self, offset: usize, size: usize) -> VolatileSlice<'_> {
        assert!(offset <= self.size && size <= self.size - offset, "a slice outside its mapping");
        // SAFETY: inside the mapping (checked above), which the slice's lifetime keeps.
        unsafe { VolatileSlice::new(self.as_ptr().add(offset), size) }
    }
}

/// `FUSE_SUPER_MAGIC` of Linux, which libc does not have for all of its systems.
const FUSE_MAGIC: u64 = 0x6573_5546;

/// What the system says of the file system that a file is on.
fn file_system(fd: BorrowedFd<'_>) -> io::Result<libc::statfs> {
    let mut about = std::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the system fills in as many bytes as the structure has, or fails.
    if unsafe { libc::fstatfs(fd.as_raw_fd(), about.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled in.
    Ok(unsafe { about.assume_init() })
}

/// The size of a file's pages when they are huge ones. There, a part of a page can be mapped but never unmapped: a peer
/// could make this process keep it for ever.
fn huge_page(fd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let about = file_system(fd)?;
    // The types of both differ between systems.
    let huge = about.f_type as u64 == libc::HUGETLBFS_MAGIC as u64;
    Ok(huge.then_some(about.f_bsize as u64))
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some(guard) = self.guard {
            guard.give_back();
        }
        // SAFETY: exactly what `map` mapped, and its last user is gone.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}

/// A piece of a mapping that holds words which two sides share: single loads and stores, always little-endian.
///
/// Offsets are bytes from the start of the window. Those outside it, or off their alignment, panic: rings derive them
/// from checked sizes.
#[derive(Clone, Debug)]
pub struct Window {
    /// Its first byte, which the mapping keeps.
    base: *mut u8,
    size: usize,
    writable: bool,
    mapping: Arc<Mapping>,
}

// SAFETY: as a mapping is, which it has a piece of.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

macro_rules! word {
    ($load:ident, $store:ident, $atomic:ty, $word:ty) => {
        /// Load a little-endian word.
        #[inline(always)]
        pub fn $load(&self, offset: usize, order: Ordering) -> $word {
            let word = self.word::<$word>(offset);
            // SAFETY: inside the mapping and aligned (`word` checks both); it lives while `self` does.
            <$word>::from_le(unsafe { <$atomic>::from_ptr(word) }.load(order))
        }

        /// Store a little-endian word.
        #[inline(always)]
        pub fn $store(&self, offset: usize, value: $word, order: Ordering) {
            assert!(self.writable, "a store to a read-only mapping");
            let word = self.word::<$word>(offset);
            #[cfg(test)]
            watch::look();
            // SAFETY: as for the load, and the mapping is writable.
            unsafe { <$atomic>::from_ptr(word) }.store(value.to_le(), order);
            #[cfg(test)]
            watch::look();
        }
    };
}

/// A test that wants to see the memory before and after each store of its thread.
#[cfg(test)]
pub(crate) mod watch {
    use std::cell::RefCell;

    thread_local! {
        static WATCHER: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
    }

    /// Call `watcher` before and after each store while `run` runs.
    pub fn stores<R>(watcher: impl FnMut() + 'static, run: impl FnOnce() -> R) -> R {
        WATCHER.with_borrow_mut(|slot| *slot = Some(Box::new(watcher)));
        let result = run();
        WATCHER.with_borrow_mut(Option::take);
        result
    }

    pub(super) fn look() {
        WATCHER.with_borrow_mut(|slot| slot.as_mut().map_or((), |watcher| watcher()));
    }
}

impl Window {
    /// A part of a mapping; panics when it is not inside.
    pub fn new(mapping: Arc<Mapping>, offset: usize, size: usize) -> Self {
        assert!(offset <= mapping.size && size <= mapping.size - offset, "a window outside its mapping");
        // SAFETY: inside the mapping.
        let base = unsafe { mapping.as_ptr().add(offset) };
        Self { base, size, writable: mapping.writable, mapping }
    }

    /// Whether its mapping is.
    pub fn lost(&self) -> bool {
        self.mapping.lost()
    }

    /// Bytes of the window.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether its first byte is aligned to `align` bytes in this process, whatever its driver address is.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.base as usize % align == 0
    }

    /// Whether `store` may be used.
    pub fn writable(&self) -> bool {
        self.writable
    }

    #[inline(always)]
    fn word<T>(&self, offset: usize) -> *mut T {
        let width = size_of::<T>();
        assert!(self.size >= width && offset <= self.size - width, "a word outside its window");
        // SAFETY: inside the window (checked above), which is inside the mapping.
        let word = unsafe { self.base.add(offset) }.cast::<T>();
        assert!(word.is_aligned(), "a misaligned word");
        word
    }

    word!(load8, store8, AtomicU8, u8);
    word!(load16, store16, AtomicU16, u16);
    word!(load32, store32, AtomicU32, u32);
    word!(load64, store64, AtomicU64, u64);

    /// As many words from here on, to be loaded one by one: little-endian, whatever this machine is.
    #[inline(always)]
    pub fn words64(&self, offset: usize, count: usize) -> &[AtomicU64] {
        let first = self.word::<u64>(offset);
        assert!(count <= (self.size - offset) / size_of::<u64>(), "words outside their window");
        // SAFETY: inside the mapping and aligned (`word` checks the first, and the others follow it); it lives while `self`
        // does. To load atomics takes no more than that others access them as such, or not at all.
        unsafe { std::slice::from_raw_parts(first.cast(), count) }
    }

    /// Have the cache lines near that begin among these bytes, as far as they are inside, to be read or written soon.
    #[inline]
    pub fn prepare(&self, offset: usize, size: usize, write: bool) {
        let base = self.base as usize;
        let mut at = (base + offset).next_multiple_of(LINE) - base;
        while at < (offset + size).min(self.size) {
            prefetch(self.base.wrapping_add(at), write);
            at += LINE;
        }
    }

    /// Have a byte near when it is read.
    #[inline(always)]
    pub fn prefetch(&self, offset: usize) {
        prefetch(self.word::<u8>(offset), false);
    }

    /// Set bits of a byte, whatever others do to it.
    pub fn or8(&self, offset: usize, bits: u8, order: Ordering) {
        assert!(self.writable, "a store to a read-only mapping");
        let byte = self.word::<u8>(offset);
        // SAFETY: as for a store.
        unsafe { AtomicU8::from_ptr(byte) }.fetch_or(bits, order);
    }
}

/// Have it near when it is needed. A hint: what it says of memory that is gone is nothing.
#[inline(always)]
pub(crate) fn prefetch(address: *const u8, write: bool) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: neither has an effect that a program could see, whatever the address is.
    unsafe {
        if write {
            // Not by the intrinsic, which prefetches for reading unless it is told of the processor: then a line comes
            // twice, as it has to be asked for again when it is written. Where there is no such instruction, it is none.
            std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
        } else {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, write);
}

/// A range of driver memory that is contiguous in one mapping.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Which of the mappings of its `Segments`.
    mapping: u32,
    /// Bytes of the range that come before this segment.
    start: u64,
    /// Driver address.
    address: u64,
    offset: usize,
    size: usize,
}

/// A range of driver memory, or several one after the other, translated: it stays mapped while this lives.
///
/// Made of segments in order; the bytes are counted from the first of the first segment.
#[derive(Clone, Debug, Default)]
pub struct Segments {
    /// In place for most requests: a network's packet is in one piece, a disk's data and its header or status in two.
    segments: SmallVec<[Segment; 2]>,
    /// Each once, not once a segment: usually there is one for all.
    mappings: SmallVec<[Arc<Mapping>; 1]>,
    total: u64,
}

impl Segments {
    /// Bytes of all segments.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many pieces.
    pub fn count(&self) -> usize {
        self.segments.len()
    }

    /// The pieces, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<Mapping>, usize, usize)> {
        self.segments.iter().map(|segment| (&self.mappings[segment.mapping as usize], segment.offset, segment.size))
    }

    /// Driver address and bytes of the pieces, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.segments.iter().map(|segment| (segment.address, segment.size as u64))
    }

    #[inline]
    fn push(&mut self, mapping: &Arc<Mapping>, address: u64, offset: usize, size: usize) {
        let index = match self.mappings.iter().rposition(|known| Arc::ptr_eq(known, mapping)) {
            Some(index) => index,
            None => {
                self.mappings.push(mapping.clone());
                self.mappings.len() - 1
            }
        };
        self.segments.push(Segment { mapping: index as u32, start: self.total, address, offset, size });
        self.total += size as u64;
    }

    /// Copy bytes out, from byte `at` on; panics when there are not as many.
    pub fn read(&self, at: u64, into: VolatileSlice<'_>) {
        self.walk(at, into.len(), |piece, done| {
            let rest = into.offset(done).expect("the walk is as long as the slice");
            piece.copy_to_volatile_slice(rest.subslice(0, piece.len()).expect("the piece is no longer than the rest"));
        });
    }

    /// Copy bytes out such that none is read twice, for what is checked and then used. (A plain copy to private memory
    /// gives no such promise: a compiler may read the original again instead of the copy.) Panics as `read` does.
    pub fn read_once(&self, at: u64, into: &mut [u8]) {
        self.walk(at, into.len(), |piece, done| {
            for index in 0..piece.len() {
                let byte = piece.get_ref::<u8>(index).expect("inside the piece");
                into[done + index] = byte.load();
            }
        });
    }

    /// Copy bytes in, from byte `at` on; panics when there is no room for them. The caller has checked that the
    /// segments may be written. The source may overlap the segments, as a driver can give one buffer twice.
    pub fn write(&self, at: u64, from: VolatileSlice<'_>) {
        self.walk(at, from.len(), |piece, done| {
            from.subslice(done, piece.len()).expect("the walk is as long as the slice").copy_to_volatile_slice(piece);
        });
    }

    /// Call `each` with every piece of `size` bytes from `at`, and how many bytes came before it.
    fn walk(&self, at: u64, size: usize, mut each: impl FnMut(VolatileSlice<'_>, usize)) {
        assert!(at <= self.total && size as u64 <= self.total - at, "bytes outside the segments");
        let mut done = 0;
        let first = self.segments.partition_point(|segment| segment.start + segment.size as u64 <= at);
        for segment in &self.segments[first..] {
            if done == size {
                return;
            }
            let skip = (at + done as u64 - segment.start) as usize;
            let count = (segment.size - skip).min(size - done);
            each(self.mappings[segment.mapping as usize].slice(segment.offset + skip, count), done);
            done += count;
        }
    }
}

/// What a range of driver memory is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The device reads it.
    Read,
    /// The device writes it.
    Write,
}

/// A piece of a mapping that has a driver address.
#[derive(Clone, Debug)]
pub struct Region {
    /// Driver address of its first byte.
    pub address: u64,
    /// Bytes, at least one.
    pub size: u64,
    /// Whether the device may write.
    pub writable: bool,
    mapping: Arc<Mapping>,
    offset: usize,
}

impl Region {
    /// Driver address of its last byte. (The address behind it may not exist.)
    fn last(&self) -> u64 {
        self.address + (self.size - 1)
    }

    /// Where a byte of it is, which is inside.
    #[inline]
    fn byte(&self, at: u64) -> *mut u8 {
        debug_assert!(at < self.size);
        // SAFETY: a region is inside its mapping, which it keeps, and the caller asks for a byte inside the region.
        unsafe { self.mapping.as_ptr().add(self.offset + at as usize) }
    }
}

/// Finds pieces of a table's regions, and first where the last one was.
pub(crate) struct Finder<'a> {
    table: &'a Table,
    index: usize,
    /// Of the region: driver address and bytes, none before one was found; whether it may be written, its first byte.
    address: u64,
    size: u64,
    writable: bool,
    base: *mut u8,
}

impl Finder<'_> {
    /// As `Table::piece`.
    #[inline(always)]
    pub fn piece(&mut self, address: u64, size: u32, write: bool) -> Option<(usize, *mut u8)> {
        // Below its beginning it wraps, above any size.
        let skip = address.wrapping_sub(self.address);
        let bytes = u64::from(size);
        if skip < self.size && bytes <= self.size - skip && bytes > 0 && (self.writable || !write) {
            // SAFETY: inside the region, which the table keeps.
            return Some((self.index, unsafe { self.base.add(skip as usize) }));
        }
        self.elsewhere(address, size, if write { Access::Write } else { Access::Read })
    }

    #[cold]
    #[inline(never)]
    fn elsewhere(&mut self, address: u64, size: u32, access: Access) -> Option<(usize, *mut u8)> {
        let found = self.table.piece(address, size, access)?;
        let region = &self.table.regions[found.0];
        (self.index, self.address, self.size) = (found.0, region.address, region.size);
        (self.writable, self.base) = (region.writable, region.byte(0));
        Some(found)
    }
}

/// A snapshot of a memory's regions.
#[derive(Debug, Default)]
pub struct Table {
    /// Sorted by address, never overlapping.
    regions: Vec<Region>,
    generation: u64,
    /// How many mappings were lost when last no region was among them.
    sound: AtomicU64,
}

impl Table {
    /// Differs from that of every other table of this memory.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// A region that was lost.
    fn lost(&self) -> Option<&Region> {
        let losses = guard::losses();
        if losses == self.sound.load(Ordering::Relaxed) {
            return None;
        }
        let lost = self.regions.iter().find(|region| region.mapping.lost());
        if lost.is_none() {
            self.sound.store(losses, Ordering::Relaxed);
        }
        lost
    }

    /// By address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Append the `size` bytes at `address` to `segments`; adjacent regions count as one. Nothing is appended when it
    /// fails.
    ///
    /// Violation: address-outside-memory, region-read-only.
    #[inline]
    pub fn translate(&self, address: u64, size: u64, access: Access, segments: &mut Segments) -> Result<(), Violation> {
        let first = self.first(address);
        if let Some(region) = self.regions.get(first) {
            // All in one region, as it nearly always is. (What does not fit a u64 is in none.)
            let skip = address.wrapping_sub(region.address);
            if region.address <= address
                && skip < region.size
                && size <= region.size - skip
                && size > 0
                && (access == Access::Read || region.writable)
            {
                segments.push(&region.mapping, address, region.offset + skip as usize, size as usize);
                return Ok(());
            }
        }
        self.translate_over(first, address, size, access, segments)
    }

    /// As `translate`, over several regions, from this one on, or in vain.
    #[cold]
    fn translate_over(
        &self,
        first: usize,
        address: u64,
        size: u64,
        access: Access,
        segments: &mut Segments,
    ) -> Result<(), Violation> {
        self.check(address, size, access)?;
        if size == 0 {
            return Ok(());
        }
        let (mut at, mut left) = (address, size);
        for region in &self.regions[first..] {
            let skip = at - region.address;
            let count = left.min(region.size - skip);
            segments.push(&region.mapping, at, region.offset + skip as usize, count as usize);
            left -= count;
            if left == 0 {
                break;
            }
            at += count;
        }
        Ok(())
    }

    /// The region, by its number, that holds all of these bytes, of which there are some, and where the first is.
    #[inline(always)]
    pub(crate) fn piece(&self, address: u64, size: u32, access: Access) -> Option<(usize, *mut u8)> {
        let index = self.first(address);
        let region = self.regions.get(index)?;
        // Below its beginning it wraps, above any size.
        let skip = address.wrapping_sub(region.address);
        let fits = address >= region.address && skip < region.size && u64::from(size) <= region.size - skip;
        (fits && size > 0 && (access == Access::Read || region.writable)).then(|| (index, region.byte(skip)))
    }

    /// As `piece`, for one after the other: nearly always they are in one region.
    #[inline(always)]
    pub(crate) fn finder(&self) -> Finder<'_> {
        Finder { table: self, index: 0, address: 0, size: 0, writable: false, base: std::ptr::null_mut() }
    }

    /// As `translate`, for whoever holds this table for as long: tells the region by its number, the first byte, its
    /// driver address, and how many there are. Something may have been told when it fails.
    #[inline]
    pub(crate) fn pieces(
        &self,
        address: u64,
        size: u32,
        access: Access,
        mut each: impl FnMut(usize, *mut u8, u64, u32),
    ) -> Result<(), Violation> {
        if let Some((region, base)) = self.piece(address, size, access) {
            each(region, base, address, size);
            return Ok(());
        }
        let mut index = self.first(address);
        self.check(address, u64::from(size), access)?;
        let (mut at, mut left) = (address, size);
        while left > 0 {
            let region = &self.regions[index];
            let skip = at - region.address;
            // No more than a u32.
            let count = u64::from(left).min(region.size - skip) as u32;
            each(index, region.byte(skip), at, count);
            left -= count;
            at = at.wrapping_add(u64::from(count));
            index += 1;
        }
        Ok(())
    }

    /// Append a piece of a region, which `pieces` told of, to `segments`.
    pub(crate) fn append(&self, region: usize, address: u64, size: u32, segments: &mut Segments) {
        let (mapping, offset) = self.place(region, address);
        segments.push(mapping, address, offset, size as usize);
    }

    /// Where a driver address of a region, which `pieces` told of, lies: its mapping, and the offset in it.
    pub(crate) fn place(&self, region: usize, address: u64) -> (&Arc<Mapping>, usize) {
        let region = &self.regions[region];
        (&region.mapping, region.offset + (address - region.address) as usize)
    }

    /// The `size` bytes at `address`, when one mapping holds them in one piece.
    pub fn window(&self, address: u64, size: u64, access: Access) -> Option<Window> {
        let region = self.regions.get(self.first(address))?;
        let skip = address.checked_sub(region.address)?;
        let fits = skip < region.size && size <= region.size - skip && (access == Access::Read || region.writable);
        fits.then(|| Window::new(region.mapping.clone(), region.offset + skip as usize, size as usize))
    }

    /// The first region that does not end before `address`.
    fn first(&self, address: u64) -> usize {
        self.regions.partition_point(|region| region.last() < address)
    }

    fn check(&self, address: u64, size: u64, access: Access) -> Result<(), Violation> {
        let outside = || Violation::new(Rule::AddressOutsideMemory, format!("{size} bytes at {address:#x}"));
        if size == 0 {
            return Ok(());
        }
        // Counted to the last byte: the end of a range at the top of the address space is not a number.
        let last = address.checked_add(size - 1).ok_or_else(outside)?;
        let mut at = address;
        for region in &self.regions[self.first(address)..] {
            if region.address > at {
                break;
            }
            if access == Access::Write && !region.writable {
                return Err(Violation::new(Rule::RegionReadOnly, format!("{size} bytes at {address:#x}")));
            }
            if region.last() >= last {
                return Ok(());
            }
            at = region.last() + 1;
        }
        Err(outside())
    }
}

/// A driver's memory: regions by driver address.
#[derive(Debug)]
pub struct Memory {
    table: RwLock<Arc<Table>>,
    /// That of the table, and which it is: what is looked at while it does not change.
    generation: AtomicU64,
    current: AtomicPtr<Table>,
    log: RwLock<Option<Log>>,
    /// Whether there is a log: what is looked at while there is none.
    logged: AtomicBool,
    /// Mappings of regions that were removed, of which some may be in use.
    removed: Mutex<Vec<Weak<Mapping>>>,
    max_regions: usize,
    max_bytes: u64,
}

impl Memory {
    /// No regions yet; at most so many, and so many bytes of them. Mapped are at most twice as many: with those that were
    /// removed and are still in use.
    pub fn new(max_regions: usize, max_bytes: u64) -> Self {
        let table = Arc::<Table>::default();
        Self {
            generation: AtomicU64::new(0),
            current: AtomicPtr::new(Arc::as_ptr(&table).cast_mut()),
            table: RwLock::new(table),
            log: RwLock::default(),
            logged: AtomicBool::new(false),
            removed: Mutex::default(),
            max_regions,
            max_bytes,
        }
    }

    /// The regions as they are now. Hold it shortly: it keeps all their mappings.
    #[inline]
    pub fn snapshot(&self) -> Arc<Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The generation of what `snapshot` gives, without its lock.
    #[inline]
    pub fn generation(&self) -> u64 {
        // Acquire: whoever sees a generation finds its table, or a later one.
        self.generation.load(Ordering::Acquire)
    }

    /// Whether a table is what `snapshot` gives, without its lock.
    #[inline]
    pub fn is_current(&self, table: &Arc<Table>) -> bool {
        // Whoever has the table keeps its place from being another's. Acquire: as above.
        std::ptr::eq(Arc::as_ptr(table), self.current.load(Ordering::Acquire))
    }

    /// Copy bytes out. Violation: address-outside-memory, region-lost.
    pub fn read(&self, address: u64, into: VolatileSlice<'_>) -> Result<(), Violation> {
        let mut segments = Segments::default();
        let table = self.snapshot();
        table.translate(address, into.len() as u64, Access::Read, &mut segments)?;
        segments.read(0, into);
        self.sound(&table)
    }

    /// Copy bytes in. Violation: address-outside-memory, region-read-only, region-lost; log-too-small, when they are
    /// written.
    pub fn write(&self, address: u64, from: VolatileSlice<'_>) -> Result<(), Violation> {
        let mut segments = Segments::default();
        let table = self.snapshot();
        table.translate(address, from.len() as u64, Access::Write, &mut segments)?;
        segments.write(0, from);
        // See `written`.
        fence(Ordering::SeqCst);
        let said = self.written(|| [(address, from.len() as u64)]);
        self.sound(&table).and(said)
    }

    /// To be asked after the memory of a table was used, and before what was read there is believed: whether it still
    /// was that of its files, and the log that of its own. Violation: region-lost.
    #[inline]
    pub fn sound(&self, table: &Table) -> Result<(), Violation> {
        if guard::losses() == 0 {
            return Ok(());
        }
        if let Some(region) = table.lost() {
            let detail = format!("the file of {} bytes at {:#x} was truncated", region.size, region.address);
            return Err(Violation::new(Rule::RegionLost, detail));
        }
        match &*self.log.read().unwrap_or_else(PoisonError::into_inner) {
            Some(log) if log.lost() => {
                Err(Violation::new(Rule::RegionLost, "the file of the log of written pages was truncated"))
            }
            _ => Ok(()),
        }
    }

    /// From now on, set the bit of each page that is written in this writable mapping; or in none.
    ///
    /// When this returns, whatever is shown to the driver later is said there, requests that were taken before included,
    /// and nothing is said in a log from before any more.
    pub fn log(&self, mapping: Option<Arc<Mapping>>) {
        let logged = mapping.is_some();
        let old = {
            // Waits for those who set bits in the old one.
            let mut log = self.log.write().unwrap_or_else(PoisonError::into_inner);
            self.logged.store(logged, Ordering::Relaxed);
            std::mem::replace(&mut *log, mapping.map(Log::new))
        };
        // See `written`.
        fence(Ordering::SeqCst);
        drop(old);
    }

    /// Say in the log, if there is one, that ranges (driver address, bytes) were written.
    ///
    /// The caller has written them and has then made a full fence, as `log` does behind its own store: so either this
    /// sees that there is a log, or whoever reads the memory after `log` sees the bytes.
    ///
    /// Violation: log-too-small; what follows is not said then.
    #[inline]
    pub(crate) fn written<R>(&self, ranges: impl FnOnce() -> R) -> Result<(), Violation>
    where
        R: IntoIterator<Item = (u64, u64)>,
    {
        if !self.logged.load(Ordering::Relaxed) {
            return Ok(());
        }
        match &*self.log.read().unwrap_or_else(PoisonError::into_inner) {
            Some(log) => ranges().into_iter().try_for_each(|(address, size)| log.mark(address, size)),
            None => Ok(()),
        }
    }

    /// Give `size` bytes of `mapping` from `offset` a driver address.
    ///
    /// Violation: region-empty, region-wraps, region-overlaps, region-outside-file, region-read-only, too-many-regions,
    /// too-much-memory.
    pub fn add(
        &self,
        address: u64,
        mapping: &Arc<Mapping>,
        offset: u64,
        size: u64,
        writable: bool,
    ) -> Result<(), Violation> {
        let violation = |rule, detail: &str| Violation::new(rule, format!("{size} bytes at {address:#x}{detail}"));
        if size == 0 {
            return Err(violation(Rule::RegionEmpty, ""));
        }
        let Some(last) = address.checked_add(size - 1) else {
            return Err(violation(Rule::RegionWraps, ""));
        };
        if offset.checked_add(size).is_none_or(|end| end > mapping.size as u64) {
            let detail = format!(", from {offset} of a mapping of {} bytes", mapping.size);
            return Err(violation(Rule::RegionOutsideFile, &detail));
        }
        if writable && !mapping.writable {
            return Err(violation(Rule::RegionReadOnly, ", writable, of a read-only mapping"));
        }
        self.change(|regions| {
            let place = regions.partition_point(|region| region.last() < address);
            if let Some(other) = regions.get(place).filter(|other| other.address <= last) {
                let detail = format!(", where {} bytes are at {:#x}", other.size, other.address);
                return Err(violation(Rule::RegionOverlaps, &detail));
            }
            if regions.len() >= self.max_regions {
                return Err(violation(Rule::TooManyRegions, &format!(", the limit is {}", self.max_regions)));
            }
            let used: u64 = regions.iter().map(|region| region.size).sum();
            if used.checked_add(size).is_none_or(|sum| sum > self.max_bytes) {
                return Err(violation(Rule::TooMuchMemory, &format!(", the limit is {}", self.max_bytes)));
            }
            let (count, bytes) = self.in_use(regions, mapping);
            if regions.len() + count >= self.max_regions.saturating_mul(2) {
                let detail = format!(", beside {count} that were removed and are in use");
                return Err(violation(Rule::TooManyRegions, &detail));
            }
            if used.saturating_add(bytes).saturating_add(size) > self.max_bytes.saturating_mul(2) {
                let detail = format!(", beside {bytes} that were removed and are in use");
                return Err(violation(Rule::TooMuchMemory, &detail));
            }
            let region = Region { address, size, writable, mapping: mapping.clone(), offset: offset as usize };
            regions.insert(place, region);
            Ok(())
        })
    }

    /// Take away the region that begins at `address`. Its mapping lives on while a request or a view uses it.
    ///
    /// Violation: region-unknown.
    pub fn remove(&self, address: u64) -> Result<(), Violation> {
        self.change(|regions| match regions.binary_search_by_key(&address, |region| region.address) {
            Ok(index) => {
                self.forget(&regions.remove(index).mapping);
                Ok(())
            }
            Err(_) => Err(Violation::new(Rule::RegionUnknown, format!("{address:#x}"))),
        })
    }

    /// Take away all regions.
    pub fn clear(&self) {
        let cleared: Result<(), Violation> = self.change(|regions| {
            regions.drain(..).for_each(|region| self.forget(&region.mapping));
            Ok(())
        });
        debug_assert!(cleared.is_ok());
    }

    fn forget(&self, mapping: &Arc<Mapping>) {
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        removed.retain(|other| other.strong_count() > 0 && other.as_ptr() != Arc::as_ptr(mapping));
        removed.push(Arc::downgrade(mapping));
    }

    /// How many mappings are in use that no region has any more, nor will have with this one, and their bytes.
    fn in_use(&self, regions: &[Region], new: &Arc<Mapping>) -> (usize, u64) {
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = 0;
        removed.retain(|other| {
            let Some(mapping) = other.upgrade() else { return false };
            let mut present = regions.iter().map(|region| &region.mapping).chain([new]);
            let kept = !present.any(|other| Arc::ptr_eq(other, &mapping));
            bytes += if kept { mapping.size as u64 } else { 0 };
            kept
        });
        (removed.len(), bytes)
    }

    /// Replace the table by a changed copy, unless the change fails: users of the old one are not disturbed.
    fn change(&self, change: impl FnOnce(&mut Vec<Region>) -> Result<(), Violation>) -> Result<(), Violation> {
        let old = {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            let mut regions = table.regions.clone();
            change(&mut regions)?;
            let generation = table.generation + 1;
            let new = Arc::new(Table { regions, generation, sound: AtomicU64::new(0) });
            self.current.store(Arc::as_ptr(&new).cast_mut(), Ordering::Release);
            let old = std::mem::replace(&mut *table, new);
            self.generation.store(generation, Ordering::Release);
            old
        };
        // Outside the lock: the last user of a mapping unmaps it, which can take long.
        drop(old);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd};

    const PAGE: u64 = 0x1_0000;

    fn file(size: u64) -> File {
        // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(size).unwrap();
        file
    }

    fn mapping(size: u64, writable: bool) -> Arc<Mapping> {
        Arc::new(Mapping::new(file(size).as_fd(), size as usize, 0, writable).unwrap())
    }

    fn name<T>(result: Result<T, Violation>) -> &'static str {
        result.err().expect("a violation").name()
    }

    fn translate(memory: &Memory, address: u64, size: u64, access: Access) -> Result<Segments, Violation> {
        let mut segments = Segments::default();
        memory.snapshot().translate(address, size, access, &mut segments).map(|()| segments)
    }

    #[test]
    fn a_mapping_is_refused_when_the_file_does_not_hold_it() {
        let file = file(2 * PAGE);
        let map = |size, offset| Mapping::new(file.as_fd(), size, offset, true);
        assert!(matches!(map(0, 0), Err(MapError::Empty)));
        assert!(matches!(map(2 * PAGE as usize + 1, 0), Err(MapError::PastEnd { .. })));
        assert!(matches!(map(PAGE as usize + 1, PAGE), Err(MapError::PastEnd { .. })));
        assert!(matches!(map(1, u64::MAX), Err(MapError::PastEnd { .. })));
        assert!(matches!(map(1, 1), Err(MapError::System(error)) if error.raw_os_error() == Some(libc::EINVAL)));
        assert_eq!(map(PAGE as usize, PAGE).unwrap().size(), PAGE as usize);
    }

    #[test]
    fn a_part_of_a_huge_page_is_refused() {
        let huge = 2 << 20;
        let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        // SAFETY: the name is a string constant.
        let fd = unsafe { libc::memfd_create(c"test".as_ptr(), flags) };
        if fd < 0 {
            return eprintln!("skipped: no huge pages of 2 MiB here");
        }
        // SAFETY: just made, and owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(2 * huge).unwrap();
        for (size, offset) in [(4096, 0), (huge as usize + 4096, 0), (huge as usize, 4096)] {
            let refused = Mapping::new(file.as_fd(), size, offset, true);
            assert!(matches!(refused, Err(MapError::System(error)) if error.raw_os_error() == Some(libc::EINVAL)));
        }
        assert_eq!(Mapping::new(file.as_fd(), huge as usize, huge, true).unwrap().size(), huge as usize);
    }

    #[test]
    fn regions_are_checked_when_they_are_added() {
        let memory = Memory::new(3, 4 * PAGE);
        let file = mapping(2 * PAGE, true);
        assert_eq!(name(memory.add(0, &file, 0, 0, true)), "region-empty");
        assert_eq!(name(memory.add(u64::MAX, &file, 0, 2, true)), "region-wraps");
        assert_eq!(name(memory.add(0, &file, 1, 2 * PAGE, true)), "region-outside-file");
        assert_eq!(name(memory.add(0, &file, u64::MAX, 2, true)), "region-outside-file");
        assert_eq!(name(memory.add(0, &mapping(PAGE, false), 0, PAGE, true)), "region-read-only");
        assert!(memory.snapshot().regions().is_empty());

        memory.add(PAGE, &file, 0, PAGE, true).unwrap();
        for (address, size) in [(PAGE, PAGE), (PAGE, 1), (1, PAGE), (2 * PAGE - 1, PAGE), (0, 2 * PAGE), (PAGE + 1, 2)]
        {
            assert_eq!(name(memory.add(address, &file, 0, size, true)), "region-overlaps", "{address:#x} {size:#x}");
        }
        memory.add(0, &file, 0, PAGE, false).unwrap();
        assert_eq!(name(memory.add(8 * PAGE, &file, 0, 2 * PAGE + 1, false)), "region-outside-file");
        assert_eq!(name(memory.add(8 * PAGE, &mapping(4 * PAGE, true), 0, 2 * PAGE + 1, true)), "too-much-memory");
        memory.add(u64::MAX - 15, &file, 0, 16, true).unwrap();
        assert_eq!(name(memory.add(8 * PAGE, &file, 0, 1, true)), "too-many-regions");
        let regions: Vec<_> =
            memory.snapshot().regions().iter().map(|region| (region.address, region.size, region.writable)).collect();
        assert_eq!(regions, [(0, PAGE, false), (PAGE, PAGE, true), (u64::MAX - 15, 16, true)]);

        assert_eq!(name(memory.remove(1)), "region-unknown");
        memory.remove(PAGE).unwrap();
        assert_eq!(name(memory.remove(PAGE)), "region-unknown");
        memory.add(PAGE, &file, 0, PAGE, true).unwrap();
        memory.clear();
        assert!(memory.snapshot().regions().is_empty());
    }

    #[test]
    fn a_range_is_inside_memory_or_refused() {
        let memory = Memory::new(8, 1 << 40);
        memory.add(PAGE, &mapping(PAGE, true), 0, PAGE, true).unwrap();
        memory.add(2 * PAGE, &mapping(PAGE, true), 0, PAGE, false).unwrap();
        memory.add(4 * PAGE, &mapping(PAGE, true), 0, PAGE, true).unwrap();
        memory.add(u64::MAX - 15, &mapping(PAGE, true), 0, 16, true).unwrap();
        for (address, size) in [
            (0, 1),
            (PAGE - 1, 2),
            (3 * PAGE, 1),
            (3 * PAGE - 1, 2),
            (PAGE, 2 * PAGE + 1),
            (PAGE, 4 * PAGE),
            (u64::MAX, 2),
            (u64::MAX - 15, 17),
            (0, u64::MAX),
            (PAGE, u64::MAX),
        ] {
            let result = translate(&memory, address, size, Access::Read);
            assert_eq!(name(result), "address-outside-memory", "{address:#x} {size:#x}");
        }
        for (address, size, pieces) in [
            (PAGE, 1, 1),
            (2 * PAGE - 1, 1, 1),
            (2 * PAGE - 1, 2, 2),
            (PAGE, 2 * PAGE, 2),
            (3 * PAGE - 1, 1, 1),
            (u64::MAX - 15, 16, 1),
            (u64::MAX, 1, 1),
            (0, 0, 0),
        ] {
            let segments = translate(&memory, address, size, Access::Read).unwrap();
            assert_eq!((segments.count(), segments.total()), (pieces, size), "{address:#x} {size:#x}");
        }
        assert_eq!(name(translate(&memory, 3 * PAGE - 1, 1, Access::Write)), "region-read-only");
        assert_eq!(name(translate(&memory, 2 * PAGE - 1, 2, Access::Write)), "region-read-only");
        assert_eq!(translate(&memory, 2 * PAGE - 1, 1, Access::Write).unwrap().total(), 1);
    }

    #[test]
    fn bytes_run_over_the_border_of_regions_and_of_appended_ranges() {
        let memory = Memory::new(8, 1 << 40);
        // Adjacent addresses, out of order in the file.
        let file = mapping(2 * PAGE, true);
        memory.add(PAGE, &file, PAGE, PAGE, true).unwrap();
        memory.add(2 * PAGE, &file, 0, PAGE, true).unwrap();
        let mut segments = translate(&memory, 2 * PAGE - 3, 6, Access::Write).unwrap();
        memory.snapshot().translate(PAGE, 4, Access::Write, &mut segments).unwrap();
        assert_eq!((segments.count(), segments.total(), segments.mappings.len()), (3, 10, 1));
        let mut bytes = *b"0123456789";
        segments.write(0, VolatileSlice::from(&mut bytes[..]));
        let mut at = |offset: u64, size: usize| {
            file.slice(offset as usize, size).copy_to(&mut bytes[..size]);
            String::from_utf8(bytes[..size].to_vec()).unwrap()
        };
        assert_eq!((at(2 * PAGE - 3, 3), at(0, 3), at(PAGE, 4)), ("012".into(), "345".into(), "6789".into()));
        for start in 0..10 {
            for end in start..=10 {
                let (mut plain, mut once) = (vec![0; end - start], vec![0; end - start]);
                segments.read(start as u64, VolatileSlice::from(&mut plain[..]));
                segments.read_once(start as u64, &mut once);
                assert_eq!(plain, b"0123456789"[start..end]);
                assert_eq!(once, plain);
            }
        }
    }

    #[test]
    fn what_was_removed_and_is_in_use_counts() {
        let memory = Memory::new(2, 4 * PAGE);
        let mut used = Vec::new();
        for _ in 0..3 {
            memory.add(0, &mapping(PAGE, true), 0, PAGE, true).unwrap();
            used.push(translate(&memory, 0, 8, Access::Write).unwrap());
            memory.remove(0).unwrap();
        }
        memory.add(0, &mapping(PAGE, true), 0, PAGE, true).unwrap();
        assert_eq!(name(memory.add(PAGE, &mapping(PAGE, true), 0, PAGE, true)), "too-many-regions");
        used.pop();
        memory.add(PAGE, &mapping(PAGE, true), 0, PAGE, true).unwrap();
        memory.clear();

        // One that comes back is not counted twice, and what nobody uses is not counted at all.
        used.clear();
        let file = mapping(4 * PAGE, true);
        for _ in 0..10 {
            memory.add(0, &file, 0, 4 * PAGE, true).unwrap();
            used.push(translate(&memory, 0, 8, Access::Write).unwrap());
            memory.clear();
        }
        drop(file);
        memory.add(0, &mapping(PAGE, true), 0, PAGE, true).unwrap();
        used.push(translate(&memory, 0, 8, Access::Write).unwrap());
        memory.clear();
        assert_eq!(name(memory.add(0, &mapping(4 * PAGE, true), 0, 4 * PAGE, true)), "too-much-memory");
        used.clear();
        memory.add(0, &mapping(4 * PAGE, true), 0, 4 * PAGE, true).unwrap();
    }

    #[test]
    fn a_mapping_lives_as_long_as_its_last_user() {
        let memory = Memory::new(8, 1 << 40);
        let file = mapping(PAGE, true);
        let weak = Arc::downgrade(&file);
        memory.add(0, &file, 0, PAGE, true).unwrap();
        drop(file);
        let segments = translate(&memory, 0, 8, Access::Write).unwrap();
        memory.remove(0).unwrap();
        let mut bytes = *b"still up";
        segments.write(0, VolatileSlice::from(&mut bytes[..]));
        assert!(weak.upgrade().is_some());
        drop(segments);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn words_are_little_endian() {
        let file = mapping(PAGE, true);
        let window = Window::new(file.clone(), 8, 16);
        window.store64(0, 0x0102_0304_0506_0708, Ordering::Relaxed);
        let mut bytes = [0u8; 8];
        file.slice(8, 8).copy_to(&mut bytes[..]);
        assert_eq!(bytes, [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(window.load32(4, Ordering::Relaxed), 0x0102_0304);
        assert_eq!(window.load16(2, Ordering::Relaxed), 0x0506);
    }
}
