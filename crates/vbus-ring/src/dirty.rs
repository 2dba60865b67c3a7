//! Which pages of a driver's memory the device's side wrote, for a hypervisor that moves its guest while the device
//! runs (vhost-user, "Migration"): a bit a page, in memory that the hypervisor takes bits from at any time.
//!
//! A bit is set after the bytes of its page were written: the hypervisor takes the bit first and reads the page then.
//! What is written is said when it is shown to the driver, all that a request may have written at its completion. A
//! request that is never completed, because its ring was stopped or reset, is not said: a driver may not rely on what is
//! in buffers that it does not get back, and who goes on with the request elsewhere writes them there.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::mem::{Mapping, Window};
use crate::violation::{Rule, Violation};

/// Bytes that a bit stands for, whatever the pages of this system or of the guest are.
pub const PAGE: u64 = 4096;

/// A bit for each page from driver address 0 on: of byte page / 8, bit page % 8.
#[derive(Debug)]
pub(crate) struct Log {
    bits: Window,
}

impl Log {
    /// All of a writable mapping.
    pub fn new(mapping: Arc<Mapping>) -> Self {
        let size = mapping.size();
        Self { bits: Window::new(mapping, 0, size) }
    }

    /// Whether its mapping is.
    pub fn lost(&self) -> bool {
        self.bits.lost()
    }

    /// Say that these bytes were written. Violation: log-too-small, after all that there are bits for were set.
    #[cold]
    pub fn mark(&self, address: u64, size: u64) -> Result<(), Violation> {
        if size == 0 {
            return Ok(());
        }
        let (first, last) = (address / PAGE, (address + (size - 1)) / PAGE);
        for byte in first / 8..=last / 8 {
            if byte >= self.bits.size() as u64 {
                let detail = format!("{} bytes, and {size} bytes at {address:#x} are written", self.bits.size());
                return Err(Violation::new(Rule::LogTooSmall, detail));
            }
            let (low, high) = (first.saturating_sub(8 * byte), (last - 8 * byte).min(7));
            // Release: after the bytes of the pages.
            self.bits.or8(byte as usize, (0xff << low) & (0xff >> (7 - high)), Ordering::Release);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! A log that is switched on between any two stores of a ring's device side: what changes after that is in it.

    use std::cell::Cell;
    use std::fs::File;
    use std::os::fd::{AsFd, FromRawFd};
    use std::rc::Rc;

    use super::*;
    use crate::mem::{watch, Memory, VolatileSlice};
    use crate::ring::{DeviceRing, Features, Setup};

    const SIZE: u16 = 4096;
    const AVAIL: usize = 0x10_000;
    const USED: usize = 0x20_000;
    const DATA: usize = 0x30_000;
    const BYTES: usize = 0x40_000;

    fn mapping(size: usize) -> Arc<Mapping> {
        // SAFETY: the name is a string constant; the descriptor is new and owned by nobody else.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(size as u64).unwrap();
        Arc::new(Mapping::new(file.as_fd(), size, 0, true).unwrap())
    }

    fn bytes(mapping: &Mapping) -> Vec<u8> {
        let mut bytes = vec![0; mapping.size()];
        mapping.slice(0, bytes.len()).copy_to_volatile_slice(VolatileSlice::from(&mut bytes[..]));
        bytes
    }

    /// Run a ring over the end of its parts, and switch a log on when it is looked at for the time `at`; false when there
    /// are not as many.
    fn run(features: Features, at: usize) -> bool {
        let arena = mapping(BYTES);
        let memory = Arc::new(Memory::new(1, BYTES as u64));
        memory.add(0, &arena, 0, BYTES as u64, true).unwrap();
        let window = Window::new(arena.clone(), 0, BYTES);
        let begin = SIZE - 3;
        window.store16(AVAIL + 2, begin, Ordering::Relaxed);
        window.store16(USED + 2, begin, Ordering::Relaxed);
        for count in 0..8 {
            let (head, entry) = (usize::from(count), usize::from((begin + count) % SIZE));
            let buffer = (DATA + 0x1000 * head) as u64;
            if features.packed {
                // Writable, and available in the first lap or in the one behind it.
                let flags = 2 | if count < 3 { 0x80 } else { 0x8000u64 };
                window.store64(16 * entry, buffer, Ordering::Relaxed);
                window.store64(16 * entry + 8, 8 | u64::from(count) << 32 | flags << 48, Ordering::Relaxed);
            } else {
                window.store16(AVAIL + 4 + 2 * entry, count, Ordering::Relaxed);
                window.store64(16 * head, buffer, Ordering::Relaxed);
                window.store64(16 * head + 8, 8 | 2 << 32, Ordering::Relaxed);
            }
        }
        let (size, driver, device) = (u32::from(SIZE), AVAIL as u64, USED as u64);
        let resume = if features.packed { (0x8000 | u32::from(begin)) * 0x1_0001 } else { u32::from(begin) };
        let setup = Setup { size, desc: 0, driver, device, features, resume: Some(resume) };

        let log = mapping(BYTES / PAGE as usize / 8);
        let (looks, since) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(None)));
        let watcher = {
            let (log, arena, memory, since) = (log.clone(), arena.clone(), memory.clone(), since.clone());
            move || {
                looks.set(looks.get() + 1);
                if looks.get() == at {
                    memory.log(Some(log.clone()));
                    since.set(Some(bytes(&arena)));
                }
            }
        };
        watch::stores(watcher, || {
            let mut ring = DeviceRing::new(memory, size, setup).unwrap();
            for (count, limit) in [(1u16, 1), (2, 1), (4, 10), (4, 10), (8, 3), (8, 10), (8, 10)] {
                if !features.packed {
                    let index = begin + count;
                    // SAFETY: aligned, and inside the mapping.
                    let avail = unsafe { std::sync::atomic::AtomicU16::from_ptr(arena.as_ptr().add(AVAIL + 2).cast()) };
                    avail.store(index.to_le(), Ordering::Relaxed);
                }
                let mut chains = Vec::new();
                ring.take(limit, &mut chains).unwrap();
                for chain in &chains {
                    chain.writable().write(0, VolatileSlice::from(&mut [7u8; 8][..]));
                }
                let _ = ring.complete_chains(chains.iter().map(|chain| (chain, 8))).unwrap();
            }
        });
        let Some(since) = since.take() else {
            return false;
        };
        let (now, log) = (bytes(&arena), bytes(&log));
        for page in 0..BYTES / PAGE as usize {
            // The driver's own.
            if page == AVAIL / PAGE as usize {
                continue;
            }
            let range = page * PAGE as usize..(page + 1) * PAGE as usize;
            let said = log[page / 8] >> (page % 8) & 1 != 0;
            assert!(said || now[range.clone()] == since[range], "page {page:#x} changed after look {at}");
        }
        true
    }

    #[test]
    fn a_log_that_begins_at_any_store_misses_nothing() {
        for (packed, event_idx, in_order) in
            [(false, false, false), (false, true, true), (true, false, false), (true, true, false), (true, true, true)]
        {
            let features = Features { packed, event_idx, indirect: false, in_order };
            let looks = (1..).take_while(|at| run(features, *at)).count();
            assert!(looks > if packed { 20 } else { 40 }, "{looks}");
        }
    }
}
