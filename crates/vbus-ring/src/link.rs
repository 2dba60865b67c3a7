//! One direction of a link in a shared area: whole messages, one producer, one consumer.
//!
//! ```text
//!  +0    u32 tail    bytes put in so far, written by the producer
//!  +64   u32 head    bytes taken out so far, written by the consumer
//!  +128  data        a power of two of bytes; messages start at multiples of 8 and wrap around
//! ```
//!
//! Both counters run freely and wrap at 2^32. A message has its length in bytes 6 and 7 of its header, little-endian.
//! Each side keeps its own counter privately and never reads it back; the other's is read once a call and refused when
//! it could not be true. A message is copied out whole before anybody looks at it, and its length is taken from the copy.

use crate::area::{check_range, Area, LayoutError};
use crate::sync::Ordering;
use crate::violation::{Rule, Violation};

/// Bytes before the data.
pub const HEADER: usize = 128;

const HEAD: usize = 64;
/// Bytes of a message's own header: no message is shorter.
const MESSAGE_HEADER: usize = 8;

/// Where a ring lies in its area.
#[derive(Clone, Copy, Debug)]
pub struct LinkLayout {
    offset: usize,
    size: u32,
}

impl LinkLayout {
    /// `offset`: of the ring, a multiple of 8; `size`: bytes of data, a power of two, at least 16.
    pub fn new(area_size: usize, offset: usize, size: usize) -> Result<Self, LayoutError> {
        if !size.is_power_of_two() || !(16..=1 << 31).contains(&size) {
            return Err(LayoutError::Count("a link ring's size must be a power of two, 16 to 2**31"));
        }
        check_range("link ring", area_size, offset, 1, HEADER + size, 8)?;
        Ok(Self { offset, size: size as u32 })
    }

    fn data(&self, position: u32) -> usize {
        self.offset + HEADER + (position & (self.size - 1)) as usize
    }
}

/// What the other side, or a caller of this side, did wrong.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum LinkError {
    /// The other side's counter is misaligned or further away than the ring is large.
    #[error("tail {tail} and head {head} cannot both be true of {size} bytes")]
    Index {
        /// The producer's counter.
        tail: u32,
        /// The consumer's counter.
        head: u32,
        /// Bytes of the ring.
        size: u32,
    },
    /// A message says that it is shorter than its header or longer than what was put in.
    #[error("a message of {length} bytes where {available} were put in")]
    MessageSize {
        /// What its header says.
        length: usize,
        /// What the counters say.
        available: u32,
    },
    /// The caller's message does not fit its own header, or no ring of this size carries it.
    #[error("{0}")]
    Caller(&'static str),
}

impl LinkError {
    /// What the other side did; None for a caller's mistake.
    pub fn violation(&self) -> Option<Violation> {
        let rule = match self {
            Self::Index { .. } => Rule::LinkIndex,
            Self::MessageSize { .. } => Rule::LinkMessageSize,
            Self::Caller(_) => return None,
        };
        Some(Violation::new(rule, self.to_string()))
    }
}

fn used(tail: u32, head: u32, size: u32) -> Result<u32, LinkError> {
    let used = tail.wrapping_sub(head);
    if used > size || used % 8 != 0 {
        return Err(LinkError::Index { tail, head, size });
    }
    Ok(used)
}

fn aligned(length: usize) -> u32 {
    (length as u32).next_multiple_of(8)
}

/// The length that a header says.
fn length_of(header: &[u8]) -> usize {
    usize::from(u16::from_le_bytes([header[6], header[7]]))
}

/// The producing side.
#[derive(Debug)]
pub struct LinkSender {
    layout: LinkLayout,
    tail: u32,
}

impl LinkSender {
    /// A sender into a ring that nobody has used yet.
    pub fn new(layout: LinkLayout) -> Self {
        Self { layout, tail: 0 }
    }

    /// Put in a message. False when there is no room now.
    pub fn send<A: Area>(&mut self, area: &A, message: &[u8]) -> Result<bool, LinkError> {
        let LinkLayout { offset, size } = self.layout;
        if message.len() < MESSAGE_HEADER {
            return Err(LinkError::Caller("a message is not shorter than its header of 8 bytes"));
        }
        if message.len() > size as usize / 2 {
            return Err(LinkError::Caller("a message is not longer than half of its ring"));
        }
        if length_of(message) != message.len() {
            return Err(LinkError::Caller("the length in the message's header is not its length"));
        }
        // Acquire: what the consumer read before it moved its head stays unwritten until then.
        let head = area.load32(offset + HEAD, Ordering::Acquire);
        let used = used(self.tail, head, size)?;
        let room = aligned(message.len());
        if room > size - used {
            return Ok(false);
        }
        for (index, chunk) in message.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let position = self.tail.wrapping_add(index as u32 * 8);
            area.store64(self.layout.data(position), u64::from_le_bytes(word), Ordering::Relaxed);
        }
        self.tail = self.tail.wrapping_add(room);
        // Release: whoever sees the new tail sees the message.
        area.store32(offset, self.tail, Ordering::Release);
        Ok(true)
    }
}

/// The consuming side.
#[derive(Debug)]
pub struct LinkReceiver {
    layout: LinkLayout,
    head: u32,
}

impl LinkReceiver {
    /// A receiver from a ring that nobody has used yet.
    pub fn new(layout: LinkLayout) -> Self {
        Self { layout, head: 0 }
    }

    /// Take out the next message; None when there is none. An error leaves the ring as it is: the link is over.
    pub fn receive<A: Area>(&mut self, area: &A) -> Result<Option<Vec<u8>>, LinkError> {
        let LinkLayout { offset, size } = self.layout;
        // Acquire: pairs with the release of the tail, so that the bytes below it are the message's.
        let tail = area.load32(offset, Ordering::Acquire);
        let available = used(tail, self.head, size)?;
        if available == 0 {
            return Ok(None);
        }
        let word = |index: u32| {
            let position = self.head.wrapping_add(index * 8);
            area.load64(self.layout.data(position), Ordering::Relaxed).to_le_bytes()
        };
        // The header is read once; what it says counts, whatever the ring says afterwards.
        let header = word(0);
        let length = length_of(&header);
        if length < MESSAGE_HEADER || aligned(length) > available || length > size as usize / 2 {
            return Err(LinkError::MessageSize { length, available });
        }
        let taken = aligned(length);
        let mut message = Vec::with_capacity(taken as usize);
        message.extend_from_slice(&header);
        for index in 1..taken / 8 {
            message.extend_from_slice(&word(index));
        }
        message.truncate(length);
        self.head = self.head.wrapping_add(taken);
        // Release: the copy is complete before the producer may write over it.
        area.store32(offset + HEAD, self.head, Ordering::Release);
        Ok(Some(message))
    }
}
