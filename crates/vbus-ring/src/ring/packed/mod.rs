//! The packed ring (virtio 1.x, section 2.8), both sides.
//!
//! One ring of descriptors, in the driver's memory, which both sides write: the driver makes a descriptor available, the
//! device puts one that says that a buffer is used in the place of one that it has taken. Two flags of a descriptor, of
//! which each side turns over the meaning whenever it comes to the end of the ring, tell what it is. Beside it lie two
//! small structures in which each side says when it wants to be notified.

mod device;
mod driver;
mod inflight;
mod place;

pub use device::DeviceRing;
pub use driver::DriverRing;
pub use inflight::inflight_bytes;
pub use place::recover_place;

use super::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE};

const DESC_AVAIL: u16 = 1 << 7;
const DESC_USED: u16 = 1 << 15;

/// Bytes of an event suppression structure: u16 place and wrap counter, u16 flags.
const EVENT_BYTES: usize = 4;
/// Flags of event suppression: notify always, never, or when a descriptor is reached.
const EVENT_ENABLE: u32 = 0;
const EVENT_DISABLE: u32 = 1;
const EVENT_DESC: u32 = 2;

/// The second word of a descriptor, as both sides load and store it, at once: u32 length, u16 buffer id, u16 flags. The
/// first is the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rest(u64);

impl Rest {
    #[inline(always)]
    const fn new(size: u32, id: u16, flags: u16) -> Self {
        Self(size as u64 | (id as u64) << 32 | (flags as u64) << 48)
    }

    #[inline(always)]
    const fn size(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    const fn id(self) -> u16 {
        (self.0 >> 32) as u16
    }

    #[inline(always)]
    const fn has(self, flag: u16) -> bool {
        (self.0 >> 48) as u16 & flag != 0
    }

    /// Whether these are its flags, of those two that say what a descriptor is.
    #[inline(always)]
    const fn is(self, flags: u16) -> bool {
        (self.0 >> 48) as u16 & (DESC_AVAIL | DESC_USED) == flags
    }

    /// Whether it is available to a side that is in the lap of `wrap`.
    #[inline(always)]
    const fn is_available(self, wrap: bool) -> bool {
        self.is(if wrap { DESC_AVAIL } else { DESC_USED })
    }

    /// Whether it says that a buffer is used, to a side that is in the lap of `wrap`.
    #[inline(always)]
    const fn is_used(self, wrap: bool) -> bool {
        self.is(if wrap { DESC_AVAIL | DESC_USED } else { 0 })
    }
}

/// A place in the ring and the wrap counter of its lap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    /// Where every ring begins.
    const FIRST: Self = Self { index: 0, wrap: true };

    /// So many descriptors further on, at most a lap.
    #[inline(always)]
    const fn after(self, count: u16, size: u16) -> Self {
        let index = self.index as u32 + count as u32;
        if index >= size as u32 {
            Self { index: (index - size as u32) as u16, wrap: !self.wrap }
        } else {
            Self { index: index as u16, wrap: self.wrap }
        }
    }

    /// The flags that make a descriptor here available.
    #[inline(always)]
    const fn available(self) -> u16 {
        if self.wrap {
            DESC_AVAIL
        } else {
            DESC_USED
        }
    }

    /// The flags that make a descriptor here a used one.
    #[inline(always)]
    const fn used(self) -> u16 {
        if self.wrap {
            DESC_AVAIL | DESC_USED
        } else {
            0
        }
    }

    /// Descriptors from here to another place, forwards: None when that is more than a lap away, or behind.
    fn count_to(self, other: Self, size: u16) -> Option<u16> {
        let lap = if self.wrap == other.wrap { 0 } else { u32::from(size) };
        let count = (u32::from(other.index) + lap).checked_sub(u32::from(self.index))?;
        (count <= u32::from(size)).then_some(count as u16)
    }

    /// As in event suppression: 15 bits of place, 1 of wrap counter.
    #[inline(always)]
    const fn word(self) -> u16 {
        self.index | (self.wrap as u16) << 15
    }

    const fn from_word(word: u16) -> Self {
        Self { index: word & 0x7fff, wrap: word >> 15 != 0 }
    }
}

/// Whether a side that said `event` in its event suppression is to be notified: the other one has come to `new`, by
/// `count` descriptors since it looked last (section 2.8.14).
#[inline]
const fn is_awaited(event: u32, event_idx: bool, new: Place, count: u16, size: u16) -> bool {
    match event >> 16 & 3 {
        EVENT_DISABLE => false,
        EVENT_DESC if event_idx => {
            // Counted from the first place of the lap of `new`; what is of another lap is of the one before.
            let event = Place::from_word(event as u16);
            let lap = if event.wrap == new.wrap { 0 } else { size as i32 };
            let (event, new) = (event.index as i32 - lap, new.index as i32);
            new - count as i32 <= event && event < new
        }
        // Also what there is no meaning for: once too often is better than never.
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_goes_round() {
        let mut place = Place::FIRST;
        for step in 1..=21 {
            place = place.after(1, 7);
            assert_eq!((place.index, place.wrap), (step % 7, step / 7 % 2 == 0));
        }
        assert_eq!(Place::FIRST.after(7, 7), Place { index: 0, wrap: false });
        assert_eq!(Place { index: 6, wrap: false }.after(7, 7), Place { index: 6, wrap: true });
        assert_eq!(Place::from_word(place.word()), place);
        let last = Place { index: 32767, wrap: true };
        assert_eq!((last.word(), last.after(32768, 32768)), (0xffff, Place { index: 32767, wrap: false }));
    }

    #[test]
    fn flags_say_what_a_descriptor_is_in_a_lap() {
        for wrap in [false, true] {
            let place = Place { index: 3, wrap };
            let [available, used] = [place.available(), place.used()].map(|flags| Rest::new(9, 7, flags | DESC_WRITE));
            assert!(available.is_available(wrap) && !available.is_used(wrap) && !available.is_used(!wrap));
            assert!(used.is_used(wrap) && !used.is_available(wrap) && !used.is_available(!wrap));
            assert!(!available.is_available(!wrap) && !used.is_used(!wrap));
            assert_eq!((used.size(), used.id(), used.has(DESC_WRITE), used.has(DESC_NEXT)), (9, 7, true, false));
        }
        // Zeroes, in the first lap, are neither.
        assert!(!Rest(0).is_available(true) && !Rest(0).is_used(true));
    }

    #[test]
    fn an_event_is_awaited_exactly_when_it_was_passed() {
        const SIZE: u16 = 5;
        let ask = |index, wrap: bool| u32::from(Place { index, wrap }.word()) | EVENT_DESC << 16;
        for start in 0..4 * SIZE {
            let old = (0..start).fold(Place::FIRST, |place, _| place.after(1, SIZE));
            for count in 1..=SIZE {
                let new = old.after(count, SIZE);
                for ahead in 0..2 * SIZE {
                    let event = (0..ahead).fold(old, |place, _| place.after(1, SIZE));
                    let event = ask(event.index, event.wrap);
                    assert_eq!(is_awaited(event, true, new, count, SIZE), ahead < count, "{start} {count} {ahead}");
                    assert!(is_awaited(event, false, new, count, SIZE), "a word of no meaning");
                }
            }
        }
        let new = Place { index: 3, wrap: true };
        assert!(is_awaited(EVENT_ENABLE << 16 | 0x8000, true, new, 1, SIZE));
        assert!(!is_awaited(EVENT_DISABLE << 16 | 0x8002, true, new, 1, SIZE));
        assert!(is_awaited(3 << 16, true, new, 1, SIZE));
        assert!(!is_awaited(EVENT_DESC << 16 | 0xffff, true, new, 1, SIZE), "a place that there is not");
    }
}
