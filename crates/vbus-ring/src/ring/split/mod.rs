//! The split ring (virtio 1.x, section 2.7), both sides.
//!
//! Three parts in the driver's memory: the descriptor table and the available ring, written by the driver, and the used
//! ring, written by the device. Indices count without end, modulo 2^16; an entry's place is its index modulo the size.

mod device;
mod driver;
mod inflight;

pub use device::DeviceRing;
pub use driver::DriverRing;
pub use inflight::inflight_bytes;

/// Bytes of a used element: u32 id, u32 length.
const USED_BYTES: usize = 8;
/// Offset of the index in the available and in the used ring; flags come before it.
const INDEX: usize = 2;
/// Offset of the entries in the available and in the used ring.
const ENTRIES: usize = 4;

/// In the flags of the available ring: the driver wants no interrupts. In those of the used ring: the device wants no
/// notifications. Both only without EVENT_IDX.
const SUPPRESS: u16 = 1;

/// Bytes of the available ring without its event field.
const fn avail_bytes(size: u16) -> usize {
    ENTRIES + 2 * size as usize
}

/// Bytes of the used ring without its event field.
const fn used_bytes(size: u16) -> usize {
    ENTRIES + USED_BYTES * size as usize
}

/// With EVENT_IDX: whether moving an index from `old` to `new` passes the `event` that the other side waits for
/// (section 2.7.7.1).
const fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A descriptor in private memory: u64 address, u32 length, u16 flags, u16 next.
#[derive(Clone, Copy, Debug)]
struct Desc {
    address: u64,
    size: u32,
    flags: u16,
    next: u16,
}

impl Desc {
    /// From the two little-endian words that it is made of.
    #[inline(always)]
    const fn from_words([address, rest]: [u64; 2]) -> Self {
        Self { address, size: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// The second of its words.
    #[inline(always)]
    const fn rest(&self) -> u64 {
        self.size as u64 | (self.flags as u64) << 32 | (self.next as u64) << 48
    }

    const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_exactly_when_its_entry_is_among_the_new_ones() {
        // The entry with index `event` is among those from `old` up to but not including `new`.
        for (event, new, old, want) in [
            (0, 1, 0, true),
            (0, 0, 0, false),
            (1, 1, 0, false),
            (4, 9, 4, true),
            (8, 9, 4, true),
            (9, 9, 4, false),
            (3, 9, 4, false),
            (65535, 0, 65535, true),
            (65535, 3, 65530, true),
            (2, 3, 65530, true),
            (3, 3, 65530, false),
            (65529, 3, 65530, false),
        ] {
            assert_eq!(passes(event, new, old), want, "{event} {new} {old}");
        }
    }

    #[test]
    fn a_descriptor_is_made_of_two_words() {
        let desc = Desc { address: 0x1122_3344_5566_7788, size: 0x99aa_bbcc, flags: 0xddee, next: 0x1357 };
        let back = Desc::from_words([desc.address, desc.rest()]);
        assert_eq!((back.address, back.size, back.flags, back.next), (desc.address, desc.size, desc.flags, desc.next));
    }
}
