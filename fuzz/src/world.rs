//! The memory of a driver that writes what it likes into it, moves it and takes it away, and what a device may do there.

use std::sync::Arc;

use vbus_ring::mem::{Memory, Segments, VolatileSlice};
use vbus_ring::ring::Chain;

use crate::{Input, Watched};

/// Bytes of the two mappings. No region has the first or the last page of either: a write there would be seen.
const SIZES: [usize; 2] = [0x6000, 0x5000];
/// Bytes that are copied from and to a chain in one step, at most.
const MOST: u64 = 0x2000;
/// A region that the driver may have: its address and bytes, whether it may be written, its mapping and place there.
pub struct Place {
    /// Driver address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    writable: bool,
    mapping: usize,
    offset: usize,
}

/// The ring's own; one that is adjacent and read-only; one at the end of all addresses; one at an odd place of its file.
pub const PLACES: [Place; 4] = [
    Place { address: 0x1_0000, size: 0x4000, writable: true, mapping: 0, offset: 0x1000 },
    Place { address: 0x1_4000, size: 0x1000, writable: false, mapping: 1, offset: 0x1000 },
    Place { address: u64::MAX - 0xfff, size: 0x1000, writable: true, mapping: 1, offset: 0x2000 },
    Place { address: 0x10_0000, size: 0xfff, writable: true, mapping: 1, offset: 0x3001 },
];

/// Regions by place, and all bytes behind them.
pub struct World {
    watched: [Watched; 2],
    /// What the code under test is given.
    pub memory: Arc<Memory>,
    present: [bool; 4],
}

impl Default for World {
    fn default() -> Self {
        Self {
            watched: SIZES.map(Watched::new),
            memory: Arc::new(Memory::new(PLACES.len(), u64::MAX)),
            present: [false; 4],
        }
    }
}

impl World {
    /// All zero again, with the first three regions.
    pub fn reset(&mut self) {
        self.watched.iter_mut().for_each(Watched::clear);
        self.memory = Arc::new(Memory::new(PLACES.len(), u64::MAX));
        self.present = [false; 4];
        (0..3).for_each(|number| self.toggle(number));
    }

    /// Without any region.
    pub fn clear(&mut self) {
        self.memory.clear();
        self.present = [false; 4];
    }

    /// The bytes of a part of a mapping, as `find` names it, as they were at the last look.
    pub fn bytes(&self, (mapping, at): (usize, usize), size: usize) -> &[u8] {
        &self.watched[mapping].known()[at..at + size]
    }

    /// Add a region, or take it away.
    pub fn toggle(&mut self, number: usize) {
        let place = &PLACES[number];
        if self.present[number] {
            self.memory.remove(place.address).unwrap();
        } else {
            let mapping = &self.watched[place.mapping].mapping;
            self.memory.add(place.address, mapping, place.offset as u64, place.size, place.writable).unwrap();
        }
        self.present[number] = !self.present[number];
    }

    /// Where in which mapping these bytes are, if one region has them all. Not by the code under test.
    pub fn find(&self, address: u64, size: usize) -> Option<(usize, usize)> {
        PLACES.iter().zip(self.present).find_map(|(place, present)| {
            let skip = u128::from(address).checked_sub(u128::from(place.address))?;
            let inside = skip + size as u128 <= u128::from(place.size);
            (present && inside).then(|| (place.mapping, place.offset + skip as usize))
        })
    }

    /// Write as the driver does, which may be anything, but not outside of its regions.
    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        if let Some((mapping, at)) = self.find(address, bytes.len()) {
            self.watched[mapping].put(at, bytes);
        }
    }

    /// No byte changed but these.
    pub fn look(&mut self, allowed: &[(usize, usize, usize)]) {
        for (number, watched) in self.watched.iter_mut().enumerate() {
            let here: Vec<_> =
                allowed.iter().filter(|part| part.0 == number).map(|&(_, at, size)| (at, size)).collect();
            watched.look(&here);
        }
    }

    /// No byte changed but in regions that may be written, whether they are there now or not.
    pub fn look_outside(&mut self) {
        let writable = PLACES.iter().filter(|place| place.writable);
        let parts: Vec<_> = writable.map(|place| (place.mapping, place.offset, place.size as usize)).collect();
        self.look(&parts);
    }

    /// The pieces of a chain, each in a region that there is, and that may be written if it must.
    pub fn pieces(&self, segments: &Segments, write: bool) -> Vec<(usize, usize, usize)> {
        let mut total = 0;
        let mut pieces = Vec::new();
        for (mapping, offset, size) in segments.iter() {
            let number = self.watched.iter().position(|watched| Arc::ptr_eq(&watched.mapping, mapping)).unwrap();
            let good = PLACES.iter().zip(self.present).any(|(place, present)| {
                let end = place.offset + place.size as usize;
                let inside = place.mapping == number && place.offset <= offset && offset + size <= end;
                present && inside && (place.writable || !write)
            });
            assert!(good && size > 0, "{size} bytes at {offset:#x} of mapping {number} are no buffer");
            total += size as u64;
            pieces.push((number, offset, size));
        }
        assert_eq!(total, segments.total());
        pieces
    }

    /// An address: mostly in a region, and aligned.
    pub fn address(input: &mut Input<'_>) -> u64 {
        let kind = input.u8();
        if kind & 0x80 != 0 {
            return input.u64();
        }
        let address = PLACES[usize::from(kind & 3)].address.wrapping_add(u64::from(input.u16()));
        if kind & 0x40 != 0 {
            address
        } else {
            address & !15
        }
    }

    /// Read and write a chain's buffers as a device does, from some byte on: memory that the driver took away is there.
    pub fn copy(&mut self, chain: &Chain, at: u64) {
        let rest = |segments: &Segments| (at.min(segments.total()), segments.total().saturating_sub(at).min(MOST));
        let (from, size) = rest(chain.readable());
        let (mut plain, mut once) = (vec![0; size as usize], vec![0; size as usize]);
        chain.readable().read(from, VolatileSlice::from(&mut plain[..]));
        chain.readable().read_once(from, &mut once);
        assert_eq!(plain, once);
        let all = self.known(chain.readable(), from, size as usize);
        assert_eq!(plain, all, "what is read is what the driver wrote");

        let (from, size) = rest(chain.writable());
        let mut bytes: Vec<u8> = (0..size).map(|byte| byte as u8 ^ 0xa5).collect();
        chain.writable().write(from, VolatileSlice::from(&mut bytes[..]));
        let allowed: Vec<_> = chain
            .writable()
            .iter()
            .map(|(mapping, at, size)| {
                let number = self.watched.iter().position(|watched| Arc::ptr_eq(&watched.mapping, mapping));
                (number.unwrap(), at, size)
            })
            .collect();
        self.look(&allowed);
    }

    /// What is in a range of a chain, by the copies.
    fn known(&self, segments: &Segments, from: u64, size: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut start = 0;
        for (mapping, at, length) in segments.iter() {
            let watched = self.watched.iter().find(|watched| Arc::ptr_eq(&watched.mapping, mapping)).unwrap();
            let skip = from.saturating_sub(start).min(length as u64) as usize;
            let count = (length - skip).min(size - bytes.len());
            bytes.extend(&watched.known()[at + skip..at + skip + count]);
            start += length as u64;
        }
        bytes
    }
}
