//! What a load asks of a device, and how it checks the answers.

use std::sync::atomic::Ordering;

use vbus_ring::mem::Window;

/// An answer that is not what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("request {number}: {what}")]
pub struct Wrong {
    /// Which request, from 0.
    pub number: u64,
    /// What is wrong.
    pub what: String,
}

/// Requests of one shape. What the device reads comes first in a request's buffer, what it may write behind.
pub trait Work {
    /// Bytes that the device reads.
    fn readable(&self) -> usize;

    /// Bytes that it may write.
    fn writable(&self) -> usize;

    /// Fill in what the device reads of a request.
    fn ask(&mut self, number: u64, buffer: &Window);

    /// Look at what it wrote; the sum of all checks is compared with other runs of the same work.
    fn check(&mut self, number: u64, written: u32, buffer: &Window) -> Result<u64, Wrong>;
}

/// Requests that begin with their number, and are answered in any way: `written` bytes, or wrong.
#[derive(Clone, Copy, Debug)]
pub struct Numbered {
    /// Bytes that the device reads: a multiple of 8, at least 8.
    pub readable: usize,
    /// Bytes that it may write: a multiple of 8.
    pub writable: usize,
    /// Bytes that it writes.
    pub written: u32,
}

impl Work for Numbered {
    fn readable(&self) -> usize {
        self.readable
    }

    fn writable(&self) -> usize {
        self.writable
    }

    #[inline]
    fn ask(&mut self, number: u64, buffer: &Window) {
        buffer.store64(0, number, Ordering::Relaxed);
    }

    #[inline]
    fn check(&mut self, number: u64, written: u32, buffer: &Window) -> Result<u64, Wrong> {
        if written != self.written {
            return Err(Wrong { number, what: format!("{written} bytes were written, not {}", self.written) });
        }
        Ok(if written >= 8 { buffer.load64(self.readable, Ordering::Relaxed) } else { 0 })
    }
}

/// Random reads of a disk (virtio 1.3, section 5.2.6), the same ones for the same seed.
#[derive(Clone, Debug)]
pub struct RandomReads {
    /// Bytes of each read, a multiple of 512.
    pub size: usize,
    /// Reads that the disk has room for, one behind the other.
    pub places: u64,
    /// Of the generator of random numbers.
    pub seed: u64,
}

/// Bytes of a request's header: u32 type, u32 reserved, u64 sector.
const HEADER: usize = 16;
const SECTOR: u64 = 512;

impl RandomReads {
    /// The place of a read: any order of asking gives the same ones.
    pub(crate) fn place(&self, number: u64) -> u64 {
        // splitmix64: a permutation of its input, well mixed.
        let mut word = self.seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) % self.places
    }
}

impl Work for RandomReads {
    fn readable(&self) -> usize {
        HEADER
    }

    fn writable(&self) -> usize {
        // The status has the last byte.
        self.size + 1
    }

    fn ask(&mut self, number: u64, buffer: &Window) {
        buffer.store64(0, 0, Ordering::Relaxed);
        buffer.store64(8, self.place(number) * (self.size as u64 / SECTOR), Ordering::Relaxed);
    }

    fn check(&mut self, number: u64, written: u32, buffer: &Window) -> Result<u64, Wrong> {
        let status = buffer.load8(HEADER + self.size, Ordering::Relaxed);
        if status != 0 || written as usize != self.size + 1 {
            let what = format!("status {status}, {written} bytes written of {}", self.size + 1);
            return Err(Wrong { number, what });
        }
        // Enough to tell one block from another, and that it is there to its end; and little beside the read itself, which
        // would wait for whoever fetches all of it from another CPU's cache.
        let [first, last] = [0, self.size - 8].map(|at| buffer.load64(HEADER + at, Ordering::Relaxed));
        Ok(first.rotate_left(1).wrapping_add(last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_reads_are_the_same_for_a_seed_and_lie_on_the_disk() {
        let reads = RandomReads { size: 4096, places: 1000, seed: 7 };
        let places: Vec<u64> = (0..5000).map(|number| reads.place(number)).collect();
        assert!(places.iter().all(|&place| place < 1000));
        assert_eq!(places, (0..5000).map(|number| reads.clone().place(number)).collect::<Vec<_>>());
        let mut seen = places.clone();
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 950, "{} of 1000 places", seen.len());
        let other = RandomReads { seed: 8, ..reads };
        assert_ne!(places, (0..5000).map(|number| other.place(number)).collect::<Vec<_>>());
    }
}
