//! Many requests at once, for whoever answers them right away: one allocation for all, and nothing kept for each.
//!
//! A `Chain` keeps the mappings of its memory. A burst keeps the tables of regions that its chains were translated by,
//! of which there is one, usually, and so all mappings in them: it is to be held for a moment, or to be small.

use std::sync::atomic::{AtomicU32, AtomicU8, Ordering};
use std::sync::Arc;

use super::chain::{Gather, Rules, Taken};
use super::device::{Chains, Single};
use super::Chain;
use crate::mem::{prefetch, Access, Mapping, Segments, Table, VolatileSlice, LINE};
use crate::violation::Violation;

/// A range of driver memory that is contiguous in one mapping, which the burst keeps that it is of.
#[derive(Debug)]
pub struct Piece {
    base: *mut u8,
    address: u64,
    size: u32,
    region: u32,
}

impl Piece {
    /// Bytes, at least one.
    #[inline]
    pub fn size(&self) -> usize {
        self.size as usize
    }

    /// The first byte. Valid while the burst is.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.base
    }

    /// Driver address and bytes.
    #[inline]
    pub fn range(&self) -> (u64, u64) {
        (self.address, u64::from(self.size))
    }

    /// Its bytes.
    #[inline]
    pub fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: inside a mapping, which the burst keeps that this was borrowed from.
        unsafe { VolatileSlice::new(self.base, self.size as usize) }
    }
}

/// Bytes that are moved in about the time that a piece of memory takes, wherever it is.
const PIECE_BYTES: u64 = 256;

#[derive(Debug)]
struct Entry {
    head: u16,
    span: u16,
    table: u32,
    first: u32,
    /// Pieces that the device may read; those that it may write come behind.
    readable: u32,
    count: u32,
    rules: Rules,
}

/// Chains that were taken together: read once, checked and translated.
#[derive(Debug, Default)]
pub struct Burst {
    tables: Vec<Arc<Table>>,
    entries: Vec<Entry>,
    pieces: Vec<Piece>,
    bytes: u64,
    /// Bytes at the beginning of what the device may write that it seldom changes.
    front: usize,
}

// SAFETY: the memory that pieces point to is shared with other processes anyway, and accessed by atomics and volatile
// slices; the tables keep it mapped.
unsafe impl Send for Burst {}
// SAFETY: as above.
unsafe impl Sync for Burst {}

impl Burst {
    /// For a device that seldom changes so many bytes at the beginning of what it may write: where those end a line, it is
    /// not taken from the driver before it is known that it must be.
    pub fn with_front(front: usize) -> Self {
        Self { front, ..Self::default() }
    }

    /// How many chains.
    #[inline]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How long serving all chains takes, roughly, in what a piece of memory takes.
    #[inline]
    pub fn weight(&self) -> usize {
        self.pieces.len() + (self.bytes / PIECE_BYTES) as usize
    }

    /// Forget all chains, and keep the last one's memory at hand, for whoever soon takes the next, or calls `clear`: it
    /// saves taking hold of it anew.
    #[inline]
    pub fn reuse(&mut self) {
        self.entries.clear();
        self.pieces.clear();
        self.tables.drain(..self.tables.len().saturating_sub(1));
        self.bytes = 0;
    }

    /// Have the memory of this table stay mapped.
    #[inline]
    fn keep(&mut self, table: &Arc<Table>) {
        if !self.tables.last().is_some_and(|known| Arc::ptr_eq(known, table)) {
            self.tables.push(table.clone());
        }
    }

    /// Forget all chains, and let go of their memory.
    #[inline]
    pub fn clear(&mut self) {
        self.entries.clear();
        self.pieces.clear();
        self.tables.clear();
        self.bytes = 0;
    }

    /// By it the driver knows a chain again.
    #[inline]
    pub fn head(&self, chain: usize) -> u16 {
        self.entries[chain].head
    }

    /// Bytes that the device may read.
    #[inline]
    pub fn readable_total(&self, chain: usize) -> u64 {
        self.entries[chain].rules.readable()
    }

    /// Bytes that the device may write.
    #[inline]
    pub fn writable_total(&self, chain: usize) -> u64 {
        self.entries[chain].rules.writable()
    }

    /// What the device may read, in order.
    #[inline]
    pub fn readable(&self, chain: usize) -> &[Piece] {
        let entry = &self.entries[chain];
        let first = entry.first as usize;
        &self.pieces[first..first + entry.readable as usize]
    }

    /// What the device may write, in order, in regions that allow it.
    #[inline]
    pub fn writable(&self, chain: usize) -> &[Piece] {
        let entry = &self.entries[chain];
        let first = entry.first as usize;
        &self.pieces[first + entry.readable as usize..first + entry.count as usize]
    }

    /// Where a piece of a chain lies: its mapping, and the offset in it.
    pub fn place(&self, chain: usize, piece: &Piece) -> (&Arc<Mapping>, usize) {
        self.table(chain).place(piece.region as usize, piece.address)
    }

    /// Driver address and bytes of what the device may write.
    pub fn ranges(&self, chain: usize) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.writable(chain).iter().map(Piece::range)
    }

    /// By what the driver knows the chains from `first` on.
    #[inline(always)]
    pub(super) fn heads(&self, first: usize, count: usize) -> impl Iterator<Item = u16> + '_ {
        self.entries[first..first + count].iter().map(|entry| entry.head)
    }

    /// Of the chains from `first` on, the one piece of each that the device may read; None when it has others, or none.
    #[inline(always)]
    pub fn single_readable(&self, first: usize) -> impl Iterator<Item = Option<&Piece>> {
        self.single(first, 1)
    }

    /// As above, of those that it may write.
    #[inline(always)]
    pub fn single_writable(&self, first: usize) -> impl Iterator<Item = Option<&Piece>> {
        self.single(first, 0)
    }

    #[inline(always)]
    fn single(&self, first: usize, readable: u32) -> impl Iterator<Item = Option<&Piece>> {
        self.entries.get(first..).unwrap_or_default().iter().map(move |entry| {
            let single = entry.count == 1 && entry.readable == readable;
            self.pieces.get(entry.first as usize).filter(|_| single)
        })
    }

    /// What keeps the memory of a chain mapped.
    pub fn table(&self, chain: usize) -> &Arc<Table> {
        &self.tables[self.entries[chain].table as usize]
    }

    /// The same, to be kept by itself.
    pub fn chain(&self, chain: usize) -> Chain {
        let entry = &self.entries[chain];
        let segments = |pieces: &[Piece]| {
            let mut segments = Segments::default();
            for piece in pieces {
                self.table(chain).append(piece.region as usize, piece.address, piece.size, &mut segments);
            }
            segments
        };
        Chain::of(entry.head, entry.span, segments(self.readable(chain)), segments(self.writable(chain)))
    }
}

/// The first little-endian words of pieces, each byte read once; None when there are not as many.
///
/// In registers: what is stored byte by byte and loaded as words right after makes the processor wait.
#[inline]
pub fn read_words<const WORDS: usize>(pieces: &[Piece]) -> Option<[u32; WORDS]> {
    if let Some(piece) = pieces.first() {
        if piece.size() >= 4 * WORDS && piece.base.align_offset(4) == 0 {
            return Some(std::array::from_fn(|word| {
                // SAFETY: inside the piece, which is mapped, and aligned.
                let word = unsafe { AtomicU32::from_ptr(piece.base.add(4 * word).cast()) };
                u32::from_le(word.load(Ordering::Relaxed))
            }));
        }
    }
    let mut bytes = [[0; 4]; WORDS];
    read_once(pieces, bytes.as_flattened_mut()).then(|| bytes.map(u32::from_le_bytes))
}

/// Copy bytes out of pieces, each read once; false when there are not as many.
#[inline]
pub fn read_once(pieces: &[Piece], into: &mut [u8]) -> bool {
    let mut bytes = into.iter_mut();
    for piece in pieces {
        for at in 0..piece.size() {
            let Some(byte) = bytes.next() else { return true };
            // SAFETY: inside the piece, which is mapped.
            *byte = unsafe { AtomicU8::from_ptr(piece.base.add(at)) }.load(Ordering::Relaxed);
        }
    }
    bytes.len() == 0
}

/// Copy bytes out of pieces, from byte `at` on; panics when there are not as many.
pub fn copy_out(pieces: &[Piece], at: u64, into: VolatileSlice<'_>) {
    walk(pieces, at, into.len(), |piece, done| {
        let rest = into.offset(done).expect("the walk is as long as the slice");
        piece.copy_to_volatile_slice(rest.subslice(0, piece.len()).expect("the piece is no longer than the rest"));
    });
}

/// Copy bytes into pieces, from byte `at` on; panics when there is no room for them. The caller has checked that they
/// are the device's to write. The source may overlap them, as a driver can give one buffer twice.
pub fn copy_in(pieces: &[Piece], at: u64, from: VolatileSlice<'_>) {
    walk(pieces, at, from.len(), |piece, done| {
        from.subslice(done, piece.len()).expect("the walk is as long as the slice").copy_to_volatile_slice(piece);
    });
}

/// Call `each` with every part of `size` bytes from `at`, and how many bytes came before it.
fn walk(pieces: &[Piece], at: u64, size: usize, mut each: impl FnMut(VolatileSlice<'_>, usize)) {
    let (mut skip, mut done) = (at, 0);
    for piece in pieces {
        if done == size {
            return;
        }
        if skip >= piece.size() as u64 {
            skip -= piece.size() as u64;
            continue;
        }
        let count = (piece.size() - skip as usize).min(size - done);
        each(piece.slice().subslice(skip as usize, count).expect("inside the piece"), done);
        (skip, done) = (0, done + count);
    }
    assert!(done == size, "bytes outside the pieces");
}

impl Gather for Burst {
    #[inline]
    fn head(&self) -> u16 {
        self.entries.last().map_or(0, |entry| entry.head)
    }

    #[inline]
    fn end(&mut self, id: u16, span: u16) {
        if let Some(entry) = self.entries.last_mut() {
            (entry.head, entry.span) = (id, span);
        }
    }

    #[inline]
    fn push(&mut self, table: &Table, address: u64, size: u32, write: bool, most: u16) -> Result<(), Violation> {
        let Some(entry) = self.entries.last_mut() else { return Ok(()) };
        entry.rules.admit(entry.head, size, write)?;
        self.bytes += u64::from(size);
        let access = if write { Access::Write } else { Access::Read };
        let (pieces, front) = (&mut self.pieces, self.front);
        table.pieces(address, size, access, |region, base, address, size| {
            near(base, size, write, front);
            pieces.push(Piece { base, address, size, region: region as u32 });
            entry.count += 1;
            entry.readable += u32::from(!write);
        })?;
        entry.rules.count(entry.head, most)
    }

    #[inline]
    fn taken(&self) -> Taken {
        self.entries.last().map_or(Taken { head: 0, span: 0, cost: 0, writable: false }, |entry| Taken {
            head: entry.head,
            span: entry.span,
            cost: entry.count as usize,
            writable: entry.rules.writable() > 0,
        })
    }
}

impl Chains for Burst {
    #[inline]
    fn count(&self) -> usize {
        self.entries.len()
    }

    fn truncate(&mut self, count: usize) {
        if let Some(entry) = self.entries.get(count) {
            self.pieces.truncate(entry.first as usize);
            self.entries.truncate(count);
            // Not less what those had that go: of a buffer that broke a rule, that may not have been counted.
            self.bytes = self.entries.iter().map(|entry| entry.rules.readable() + entry.rules.writable()).sum();
            // What keeps memory for none of them would keep it for long.
            self.tables.truncate(self.entries.last().map_or(0, |last| last.table as usize + 1));
        }
    }

    #[inline]
    fn weight(&self) -> usize {
        self.weight()
    }

    #[inline]
    fn open(&mut self, table: &Arc<Table>, name: u16) {
        self.keep(table);
        let (table, first) = (self.tables.len() as u32 - 1, self.pieces.len() as u32);
        self.entries.push(Entry { head: name, span: 1, table, first, readable: 0, count: 0, rules: Rules::default() });
    }

    const SINGLES: bool = true;

    #[inline]
    fn kept(&self) -> Option<&Arc<Table>> {
        self.tables.last()
    }

    #[inline(always)]
    fn open_singles(&mut self, table: &Arc<Table>, singles: &[Single], light: usize) -> usize {
        self.keep(table);
        let (number, front, mut finder) = (self.tables.len() as u32 - 1, self.front, table.finder());
        let Self { entries, pieces, bytes, .. } = self;
        let first = pieces.len();
        let room = light.saturating_sub(first);
        let (mut total, heavy) = (*bytes, room as u64 * PIECE_BYTES);
        for &Single { address, size, write, .. } in singles.iter().take(room) {
            if total >= heavy {
                break;
            }
            // Empty buffers are in no region.
            let Some((region, base)) = finder.piece(address, size, write) else { break };
            near(base, size, write, front);
            total += u64::from(size);
            pieces.push(Piece { base, address, size, region: region as u32 });
        }
        *bytes = total;
        let count = pieces.len() - first;
        entries.extend(singles[..count].iter().enumerate().map(|(piece, &Single { head, size, write, .. })| Entry {
            head,
            span: 1,
            table: number,
            first: (first + piece) as u32,
            readable: u32::from(!write),
            count: 1,
            rules: Rules::single(size, write),
        }));
        count
    }
}

/// Have the beginning of a piece near: a small frame behind its header, which begins anywhere in a line.
#[inline(always)]
fn near(base: *const u8, size: u32, write: bool, front: usize) {
    prefetch(base, write && base as usize % LINE + front != LINE);
    if size as usize > LINE {
        prefetch(base.wrapping_add(LINE), write);
    }
}
