//! What network engines have in common (virtio 1.4, section 5.1): headers, rules, filters, and laying frames into buffers.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{fence, AtomicU64, Ordering};
use std::sync::Arc;

use vbus_ring::ring::{read_words, Burst, Chain, Piece, Shown};
use vbus_ring::signal::Notify;
use vbus_ring::violation::Violation;

use crate::outbox::Fault;
use crate::queue::{Queue, Running};

/// Bytes of a header.
pub const HEADER: usize = 12;
/// Bytes of a frame's own header: the shortest frame that there is.
pub const ETHERNET: u64 = 14;
/// Bytes of the longest frame: Ethernet's header, IPv6's, and its payload.
pub const LONGEST: u64 = 14 + 40 + 65535;

/// A flag of a header: somebody has to finish the checksum.
pub const NEEDS_CSUM: u8 = 1;
const BROADCAST: [u8; 6] = [0xff; 6];
const VLAN_TYPE: [u8; 2] = [0x81, 0];

/// Which frames a driver wants (section 5.1.6.5).
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Everything.
    pub promiscuous: bool,
    /// Whether the driver has said anything about addresses.
    pub told: bool,
    /// All frames to one station, to several; none of those, none of these, none to all.
    pub all_unicast: bool,
    /// As above.
    pub all_multicast: bool,
    /// As above.
    pub no_unicast: bool,
    /// As above.
    pub no_multicast: bool,
    /// As above.
    pub no_broadcast: bool,
    /// The device's own address.
    pub mac: [u8; 6],
    /// Others that the driver wants.
    pub unicast: HashSet<[u8; 6]>,
    /// As above.
    pub multicast: HashSet<[u8; 6]>,
    /// Only tagged frames with these tags, when there is such a rule.
    pub vlans: Option<HashSet<u16>>,
}

impl Filter {
    /// Whether everything passes.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.promiscuous || (!self.told && self.vlans.is_none())
    }

    /// Whether a frame that begins so passes. There are at least 14 bytes of it.
    pub fn passes(&self, frame: &[u8]) -> bool {
        if self.promiscuous {
            return true;
        }
        if let (Some(vlans), true) = (&self.vlans, frame[12..14] == VLAN_TYPE) {
            let tag = match frame {
                [.., high, low] if frame.len() == 16 => u16::from_be_bytes([*high, *low]) % 4096,
                // Cut short: as if zeroes followed.
                [.., high] if frame.len() == 15 => u16::from_be_bytes([*high, 0]) % 4096,
                _ => 0,
            };
            if !vlans.contains(&tag) {
                return false;
            }
        }
        if !self.told {
            return true;
        }
        let to: [u8; 6] = std::array::from_fn(|at| frame[at]);
        if to == BROADCAST {
            !self.no_broadcast
        } else if to[0] & 1 != 0 {
            (self.all_multicast || self.multicast.contains(&to)) && !self.no_multicast
        } else {
            (self.all_unicast || to == self.mac || self.unicast.contains(&to)) && !self.no_unicast
        }
    }
}

/// What holds for the frames of a pair of queues.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Whether the link is up.
    pub link: bool,
    /// Whether the driver uses this pair.
    pub in_use: bool,
    /// Whether a packet may lie in several of the driver's buffers (MRG_RXBUF).
    pub merge: bool,
    /// Whether the driver may leave checksums to us (CSUM).
    pub csum: bool,
    /// Values of gso_type that it may use.
    pub host_kinds: Vec<u8>,
    /// Whether checksums may be left to it (GUEST_CSUM).
    pub guest_csum: bool,
    /// Values of gso_type that it takes.
    pub guest_kinds: Vec<u8>,
    /// Which frames it wants.
    pub filter: Filter,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What an engine counted. Only its worker writes; anybody reads.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        impl Counters {
            /// All of them, by name.
            pub fn get(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Frames given the driver.
    rx_packets,
    /// Bytes of those.
    rx_bytes,
    /// Frames that it did not want.
    rx_filtered,
    /// Frames longer than its buffers.
    rx_too_long,
    /// Frames that there was no buffer for, for long.
    rx_dropped,
    /// Frames of the driver that went out.
    tx_packets,
    /// Bytes of those.
    tx_bytes,
    /// Good frames that did not go out.
    tx_dropped,
    /// Frames of the driver that were wrong: shorter than an Ethernet header,
    too_short,
    /// longer than any,
    too_long,
    /// with a checksum outside the frame, or not negotiated,
    checksum,
    /// with segments of no kind, size or checksum, or not negotiated,
    segments,
    /// with a header longer than the frame,
    header,
    /// on a pair that is not in use,
    queue,
    /// or not what its header says.
    refused,
}

/// Count one more, or several. Of the one thread that counts.
#[inline]
pub fn count(counter: &AtomicU64, more: u64) {
    counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
}

/// A packet that a driver sent: its header, which is read once, all of its pieces, and the bytes of its frame.
/// Fault: tx-header-short, of the queue of this index.
#[inline(always)]
pub fn packet(sent: &Burst, chain: usize, queue: usize) -> Result<(Header, &[Piece], u64), Fault> {
    let (total, pieces) = (sent.readable_total(chain), sent.readable(chain));
    match (total.checked_sub(HEADER as u64), read_words(pieces)) {
        (Some(size), Some(header)) => Ok((header, pieces, size)),
        _ => Err(short(total, queue)),
    }
}

#[cold]
#[inline(never)]
fn short(total: u64, queue: usize) -> Fault {
    let detail = format!("{total} readable bytes; a header has {HEADER}");
    Fault { queue, name: "tx-header-short", detail }
}

/// Give back what was sent, the first of a burst, as many as there are in `written`; what is to be notified of it.
/// Violation: as `complete_burst`.
pub fn answer(
    queue: &Queue,
    running: &mut Running,
    sent: &Burst,
    written: &[u32],
) -> Result<Option<Arc<dyn Notify>>, Violation> {
    if written.is_empty() {
        return Ok(None);
    }
    let notify = running.ring.complete_burst(sent, 0, written)?;
    count_answered(queue, sent, written);
    Ok(notify.then(|| running.signal.clone()))
}

/// Count what was sent and is given back, the first of a burst, as many as there are in `written`.
#[inline]
pub fn count_answered(queue: &Queue, sent: &Burst, written: &[u32]) {
    queue.count(written.len() as u64, (0..written.len()).map(|chain| sent.readable_total(chain)).sum(), 0);
}

/// What is wrong with a frame of `size` bytes that a driver sent with this header, in words, if anything (section
/// 5.1.6.2.2).
#[inline(always)]
pub fn wrong<'a>(header: [u32; 3], size: u64, rules: &Rules, counters: &'a Counters) -> Option<&'a AtomicU64> {
    if size < ETHERNET {
        return Some(&counters.too_short);
    }
    if size > LONGEST {
        return Some(&counters.too_long);
    }
    if !rules.in_use {
        return Some(&counters.queue);
    }
    if !asks(header) {
        return None;
    }
    wrong_offload(header, size, rules, counters)
}

/// Whether a header that a driver sent says anything: all but its last two bytes, which mean nothing from a driver.
#[inline(always)]
fn asks([first, second, third]: Header) -> bool {
    first | second | (third & 0xffff) != 0
}

/// As `wrong`, of a header that asks for something.
#[inline(never)]
fn wrong_offload<'a>(header: [u32; 3], size: u64, rules: &Rules, counters: &'a Counters) -> Option<&'a AtomicU64> {
    let Fields { csum, gso, header_size, gso_size, start, offset } = Fields::of(header);
    let (start, offset) = (u64::from(start), u64::from(offset));
    if csum && (!rules.csum || start < ETHERNET || start + offset + 2 > size) {
        return Some(&counters.checksum);
    }
    if u64::from(header_size) > size {
        return Some(&counters.header);
    }
    if gso != 0 && (!rules.host_kinds.contains(&gso) || !csum || gso_size == 0 || u64::from(gso_size) > size) {
        return Some(&counters.segments);
    }
    None
}

/// What a header says of a frame (section 5.1.6), as three little-endian words; num_buffers, the last two bytes, is none
/// of it.
pub type Header = [u32; 3];

/// The same, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields {
    /// Whether the checksum is to be finished. Other flags, which a driver must not set, or that nobody knows, mean
    /// nothing.
    pub csum: bool,
    /// As what it is cut into segments, or 0.
    pub gso: u8,
    /// hdr_len.
    pub header_size: u16,
    /// Bytes of a segment.
    pub gso_size: u16,
    /// csum_start.
    pub start: u16,
    /// csum_offset.
    pub offset: u16,
}

impl Fields {
    /// Taken apart.
    #[inline]
    pub fn of([first, second, third]: Header) -> Self {
        Self {
            csum: first as u8 & NEEDS_CSUM != 0,
            gso: (first >> 8) as u8,
            header_size: (first >> 16) as u16,
            gso_size: second as u16,
            start: (second >> 16) as u16,
            offset: third as u16,
        }
    }

    /// Together again; what means nothing is 0.
    #[inline]
    pub fn header(self) -> Header {
        let Self { csum, gso, header_size, gso_size, start, offset } = self;
        let word = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
        let (header_size, gso_size) = if gso != 0 { (header_size, gso_size) } else { (0, 0) };
        let (start, offset) = if csum { (start, offset) } else { (0, 0) };
        [word(u16::from(gso) << 8 | u16::from(csum), header_size), word(gso_size, start), word(offset, 0)]
    }
}

/// Whether a driver takes a frame with what its header leaves undone.
#[inline]
pub fn takes(rules: &Rules, header: Header) -> bool {
    if header[0] == 0 {
        return true;
    }
    let Fields { csum, gso, .. } = Fields::of(header);
    (!csum || rules.guest_csum) && (gso == 0 || rules.guest_kinds.contains(&gso))
}

/// A frame on its way to a driver.
#[derive(Clone, Copy)]
pub enum Frame<'a> {
    /// In the memory of whoever sent it, behind a header.
    Pieces(&'a [Piece]),
    /// As above, but for its first bytes, which were read.
    Read(&'a [u8], &'a [Piece]),
    /// In our own.
    Bytes(&'a [u8]),
}

/// A frame with what is said of it.
#[derive(Clone, Copy)]
pub struct Packet<'a> {
    /// What of it is to be done still. Nobody's words but our own.
    pub header: Header,
    /// The frame.
    pub frame: Frame<'a>,
    /// Its bytes.
    pub size: u64,
}

impl<'a> Packet<'a> {
    /// One that is finished.
    pub fn finished(frame: Frame<'a>, size: u64) -> Self {
        Self { header: [0; 3], frame, size }
    }
}

impl Frame<'_> {
    /// Its first bytes, as many as there is room for, and how many those are.
    #[inline]
    pub fn beginning(&self, into: &mut [u8]) -> usize {
        let mut count = 0;
        self.each(|at, size| {
            let size = size.min(into.len() - count);
            // SAFETY: as many bytes are there, and there is room for them.
            unsafe { std::ptr::copy(at, into[count..].as_mut_ptr(), size) };
            count += size;
        });
        count
    }

    /// Call with each part of it, in order.
    #[inline]
    pub fn each(&self, mut part: impl FnMut(*const u8, usize)) {
        match *self {
            Frame::Bytes(bytes) => part(bytes.as_ptr(), bytes.len()),
            Frame::Pieces(pieces) => for_each(pieces, HEADER, |at, size| part(at, size)),
            Frame::Read(bytes, pieces) => {
                part(bytes.as_ptr(), bytes.len());
                for_each(pieces, HEADER + bytes.len(), |at, size| part(at, size));
            }
        }
    }

    /// Append a copy.
    pub fn copy(&self, into: &mut Vec<u8>) {
        self.each(|at, size| {
            let before = into.len();
            into.resize(before + size, 0);
            // SAFETY: as many bytes are there, and there is room for them.
            unsafe { std::ptr::copy(at, into[before..].as_mut_ptr(), size) };
        });
    }
}

/// Call with each part of pieces but their first `skip` bytes.
#[inline]
fn for_each(pieces: &[Piece], mut skip: usize, mut each: impl FnMut(*mut u8, usize)) {
    for piece in pieces {
        if skip >= piece.size() {
            skip -= piece.size();
            continue;
        }
        // SAFETY: inside the piece.
        each(unsafe { piece.as_ptr().add(skip) }, piece.size() - skip);
        skip = 0;
    }
}

/// Where bytes go, one after the other, over several chains.
struct Room<'a> {
    burst: &'a Burst,
    chain: usize,
    piece: usize,
    at: usize,
}

impl Room<'_> {
    /// Lay bytes there; what there is no room for is left out.
    #[inline]
    fn put(&mut self, mut from: *const u8, mut size: usize) {
        while size > 0 {
            if self.chain >= self.burst.len() {
                return;
            }
            let Some(piece) = self.burst.writable(self.chain).get(self.piece) else {
                (self.chain, self.piece, self.at) = (self.chain + 1, 0, 0);
                continue;
            };
            let part = size.min(piece.size() - self.at);
            // SAFETY: `from` has `size` bytes by the caller's word, and the piece has room for these. They may overlap,
            // as a driver can give one buffer twice.
            unsafe {
                std::ptr::copy(from, piece.as_ptr().add(self.at), part);
                from = from.add(part);
            }
            size -= part;
            self.at += part;
            if self.at == piece.size() {
                (self.piece, self.at) = (self.piece + 1, 0);
            }
        }
    }
}

/// What became of a frame for a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Laid {
    /// It lies in the driver's buffers, or is dropped and counted.
    Done,
    /// There is no buffer now.
    NoRoom,
    /// It is one that the driver wants, and is longer than the buffers that there are now.
    Wanted,
}

/// The receive side of a pair: buffers that were taken off the ring, and what of them is filled.
pub struct Receiver {
    burst: Burst,
    /// Chains that were given back, and that are filled.
    shown: usize,
    filled: usize,
    /// Bytes written to each chain from `shown` to `filled`.
    written: Vec<u32>,
}

impl Default for Receiver {
    fn default() -> Self {
        Self { burst: Burst::with_front(HEADER), shown: 0, filled: 0, written: Vec::new() }
    }
}

impl Receiver {
    /// The driver's buffers are gone.
    pub fn reset(&mut self) {
        self.burst.clear();
        self.written.clear();
        (self.shown, self.filled) = (0, 0);
    }

    /// What is at hand and not filled, in order, for whoever serves the queue from now on.
    pub fn hand_over(&mut self) -> Vec<Chain> {
        let chains = (self.filled..self.burst.len()).map(|chain| self.burst.chain(chain)).collect();
        self.reset();
        chains
    }

    /// Have `count` more buffers at hand, as far as there are. With `ask`, be notified when there are none.
    fn take(&mut self, running: &mut Running, count: usize, ask: bool) -> Result<usize, Fault> {
        let before = self.burst.len();
        running.ring.burst(count, &mut self.burst, ask).map_err(|violation| Fault::of(0, &violation))?;
        for chain in before..self.burst.len() {
            let room = self.burst.writable_total(chain);
            if room < HEADER as u64 {
                let detail = format!("{room} writable bytes; a header has {HEADER}");
                return Err(Fault { queue: 0, name: "rx-buffer-too-small", detail });
            }
        }
        Ok(self.burst.len() - before)
    }

    /// Whether there is a buffer at hand; `more`: for how many frames.
    #[inline]
    pub fn has_room(&mut self, running: &mut Running, more: usize, ask: bool) -> Result<bool, Fault> {
        Ok(self.filled < self.burst.len() || self.take(running, more, ask)? > 0)
    }

    /// As `put`, of frames that were sent, from the chain `first` on, for as long as each is as nearly all are: in one piece
    /// behind a header that asks for nothing, wanted, and there is a buffer at hand that is one piece, too. How many frames,
    /// and their bytes; whatever is with the one behind them, nothing was done with it.
    pub fn put_whole(&mut self, sent: &Burst, first: usize, rules: &Rules, counters: &Counters) -> (u64, u64) {
        let (mut frames, mut bytes) = (0, 0);
        if !(rules.in_use && rules.link && rules.filter.is_open()) {
            return (frames, bytes);
        }
        for (from, to) in sent.single_readable(first).zip(self.burst.single_writable(self.filled)) {
            let (Some(from), Some(to)) = (from, to) else { break };
            let total = from.size();
            let size = total.saturating_sub(HEADER);
            if size < ETHERNET as usize || size > LONGEST as usize || to.size() < total {
                break;
            }
            if read_words(std::slice::from_ref(from)).is_none_or(asks) {
                break;
            }
            // SAFETY: both are mapped, and have `total` bytes.
            unsafe {
                let (to, from) = (to.as_ptr(), from.as_ptr());
                head(to, 0, (1u32 << 16).to_le());
                copy(from.add(HEADER), to.add(HEADER), size);
            }
            self.written.push(total as u32);
            frames += 1;
            bytes += size as u64;
        }
        self.filled += frames as usize;
        self::count(&counters.rx_packets, frames);
        self::count(&counters.rx_bytes, bytes);
        (frames, bytes)
    }

    /// Lay a frame into buffers, behind its header. `more`: how many may come with it, itself included. `wanted`: it was
    /// before. With `ask`, be notified of more buffers when there are too few.
    pub fn put(
        &mut self,
        running: &mut Running,
        packet: Packet<'_>,
        (more, ask): (usize, bool),
        wanted: bool,
        rules: &Rules,
        counters: &Counters,
    ) -> Result<Laid, Fault> {
        if !self.has_room(running, more, ask)? {
            return Ok(Laid::NoRoom);
        }
        if !wanted && !rules.filter.is_open() {
            let mut beginning = [0; 16];
            let count = packet.frame.beginning(&mut beginning);
            if !rules.filter.passes(&beginning[..count]) {
                self::count(&counters.rx_filtered, 1);
                return Ok(Laid::Done);
            }
        }
        let total = packet.size + HEADER as u64;
        let mut chains = 1;
        if self.burst.writable_total(self.filled) < total {
            if !rules.merge {
                self::count(&counters.rx_too_long, 1);
                return Ok(Laid::Done);
            }
            let mut room = self.burst.writable_total(self.filled);
            while room < total {
                if self.filled + chains == self.burst.len() && self.take(running, 1, ask)? == 0 {
                    if chains < usize::from(running.ring.size()) {
                        return Ok(Laid::Wanted);
                    }
                    // Every buffer that the driver could ever have there at a time.
                    self::count(&counters.rx_too_long, 1);
                    return Ok(Laid::Done);
                }
                room += self.burst.writable_total(self.filled + chains);
                chains += 1;
            }
        }
        self.lay(packet, total, chains);
        self::count(&counters.rx_packets, 1);
        self::count(&counters.rx_bytes, packet.size);
        Ok(Laid::Done)
    }

    #[inline]
    fn lay(&mut self, Packet { header: [first, second, third], frame, .. }: Packet<'_>, total: u64, chains: usize) {
        let third = third & 0xffff | (chains as u32) << 16;
        let mut header = [0; HEADER];
        for (bytes, word) in header.chunks_exact_mut(4).zip([first, second, third]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut room = Room { burst: &self.burst, chain: self.filled, piece: 0, at: 0 };
        room.put(header.as_ptr(), HEADER);
        frame.each(|at, size| room.put(at, size));
        let mut left = total;
        for _ in 0..chains {
            // A chain has no more than a u32.
            let written = left.min(self.burst.writable_total(self.filled));
            self.written.push(written as u32);
            left -= written;
            self.filled += 1;
        }
    }

    /// Give the driver all that was laid into buffers; whether it is to be notified, and how many chains, and bytes.
    pub fn show(&mut self, running: &mut Running) -> Result<(bool, u64, u64), Violation> {
        let shown = self.show_unfenced(running)?;
        if shown != Shown::Nothing {
            fence(Ordering::SeqCst);
        }
        self.say(running, shown)
    }

    /// The first half of `show`. A full fence comes behind it, if anything was shown, and then `say`.
    #[inline]
    pub fn show_unfenced(&mut self, running: &mut Running) -> Result<Shown, Violation> {
        if self.written.is_empty() {
            return Ok(Shown::Nothing);
        }
        running.ring.show_burst(&self.burst, self.shown, &self.written)
    }

    /// The second half of `show`.
    #[inline]
    pub fn say(&mut self, running: &mut Running, shown: Shown) -> Result<(bool, u64, u64), Violation> {
        if self.written.is_empty() {
            return Ok((false, 0, 0));
        }
        let notify = running.ring.say_burst(shown, &self.burst, self.shown, &self.written)?;
        let bytes = self.written.iter().map(|written| u64::from(*written)).sum();
        let chains = self.written.len() as u64;
        self.written.clear();
        self.shown = self.filled;
        if self.filled == self.burst.len() {
            self.burst.reuse();
            (self.shown, self.filled) = (0, 0);
        }
        Ok((notify, chains, bytes))
    }

    /// Let go of memory in which there is no buffer at hand.
    pub fn rest(&mut self) {
        if self.burst.is_empty() {
            self.burst.clear();
        }
    }
}

/// Have a header lie here: in its first eight bytes, and in the four behind them.
///
/// What lies there already is not written again. A driver that uses its buffers again reads the headers of those that it
/// gets back, and changes none: then their lines stay with both sides, and neither waits for them. One that changes a
/// buffer that it gave away gets what it wrote.
///
/// # Safety
///
/// There are 12 bytes to read and write.
#[inline(always)]
unsafe fn head(to: *mut u8, first: u64, last: u32) {
    // SAFETY: by the caller's word.
    unsafe {
        let (front, back) = (to.cast::<u64>(), to.add(8).cast::<u32>());
        if front.read_unaligned() != first {
            front.write_unaligned(first);
        }
        if back.read_unaligned() != last {
            back.write_unaligned(last);
        }
    }
}

/// Copy bytes that may overlap; few, as they often are, by moves of a fixed size.
///
/// # Safety
///
/// As for `std::ptr::copy`.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, size: usize) {
    /// What the processor moves at once.
    #[cfg(target_arch = "x86_64")]
    type Part = std::arch::x86_64::__m128i;
    #[cfg(not(target_arch = "x86_64"))]
    type Part = u128;
    const BYTES: usize = size_of::<Part>();
    /// Its first bytes and its last ones, which are all: read before anything is written.
    #[inline(always)]
    unsafe fn both<const PARTS: usize>(from: *const u8, to: *mut u8, size: usize) {
        let end = size - PARTS * BYTES;
        // SAFETY: as many bytes are there at least, by the caller's word, and at most twice as many.
        unsafe {
            let first: [Part; PARTS] =
                std::array::from_fn(|part| from.add(part * BYTES).cast::<Part>().read_unaligned());
            let last: [Part; PARTS] =
                std::array::from_fn(|part| from.add(end + part * BYTES).cast::<Part>().read_unaligned());
            for (part, bytes) in first.into_iter().enumerate() {
                to.add(part * BYTES).cast::<Part>().write_unaligned(bytes);
            }
            for (part, bytes) in last.into_iter().enumerate() {
                to.add(end + part * BYTES).cast::<Part>().write_unaligned(bytes);
            }
        }
    }
    // SAFETY: by the caller's word.
    unsafe {
        match size {
            32..=64 => both::<2>(from, to, size),
            65..=128 => both::<4>(from, to, size),
            _ => std::ptr::copy(from, to, size),
        }
    }
}

/// Frames that wait for buffers of a driver, copied.
#[derive(Default)]
pub struct Backlog {
    frames: VecDeque<(Header, Vec<u8>)>,
    bytes: usize,
    /// Whether the oldest is known to be wanted, whatever is said since.
    pub wanted: bool,
    /// Kept for their allocations.
    spare: Vec<Vec<u8>>,
}

impl Backlog {
    const FRAMES: usize = 1024;
    const BYTES: usize = 4 << 20;
    const SPARE: usize = 64;

    /// The oldest.
    #[inline]
    pub fn first(&self) -> Option<Packet<'_>> {
        let (header, bytes) = self.frames.front()?;
        Some(Packet { header: *header, frame: Frame::Bytes(bytes), size: bytes.len() as u64 })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The oldest is not waiting any more: here it is.
    pub fn take_first(&mut self) -> Option<(Header, Vec<u8>)> {
        let oldest = self.frames.pop_front()?;
        self.bytes -= oldest.1.len() + HEADER;
        self.wanted = false;
        Some(oldest)
    }

    /// The oldest is not waiting any more.
    pub fn pop(&mut self) {
        if let Some((_, mut bytes)) = self.take_first() {
            if self.spare.len() < Self::SPARE {
                bytes.clear();
                self.spare.push(bytes);
            }
        }
    }

    /// Keep a copy; false when there is no room for it.
    pub fn push(&mut self, packet: Packet<'_>) -> bool {
        let total = packet.size as usize + HEADER;
        if self.frames.len() >= Self::FRAMES || self.bytes + total > Self::BYTES {
            return false;
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        packet.frame.copy(&mut bytes);
        self.bytes += total;
        self.frames.push_back((packet.header, bytes));
        true
    }

    /// None waits any more.
    pub fn clear(&mut self) {
        self.frames.clear();
        (self.bytes, self.wanted) = (0, false);
    }

    /// None waits any more; gives whether the oldest was known to be wanted, and all of them.
    pub fn take(&mut self) -> (bool, VecDeque<(Header, Vec<u8>)>) {
        self.bytes = 0;
        (std::mem::take(&mut self.wanted), std::mem::take(&mut self.frames))
    }
}
