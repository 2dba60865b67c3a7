//! What a ring has in flight, kept in memory that outlives this process (vhost-user, "Inflight I/O tracking"): what the
//! regions of both layouts have in common.
//!
//! The front-end keeps the region, and gives it to whoever serves the ring next, so that wherever its predecessor ended
//! what was completed is told from the rest.
//!
//! The region is a peer's memory, too: it is read when a ring starts, once, and checked; from then on it is written
//! only. A process that ends leaves what it stored in the order of its program, so that every store is a release:
//! that keeps the compiler to it.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use crate::mem::{Mapping, Window};
use crate::violation::{Rule, Violation};

/// Where every region begins: u64 features, u16 version, u16 descriptors.
pub(super) const FEATURES: usize = 0;
pub(super) const VERSION: usize = 8;
pub(super) const DESC_NUM: usize = 10;

/// The only version there is; 0 stands for a region that was never used.
pub(super) const THE_VERSION: u16 = 1;

/// What the regions of queues are aligned to.
pub(super) const ALIGN: usize = 64;

/// The `bytes` at `offset` of a writable mapping, for a ring of `size`, and whether they were used before.
///
/// Violation: inflight-misaligned, inflight-size, inflight-version, inflight-features.
pub(super) fn find(mapping: &Arc<Mapping>, offset: u64, bytes: usize, size: u16) -> Result<(Window, bool), Violation> {
    if offset.checked_add(bytes as u64).is_none_or(|end| end > mapping.size() as u64) {
        let detail = format!("{bytes} bytes at {offset:#x} of {}", mapping.size());
        return Err(Violation::new(Rule::InflightSize, detail));
    }
    let window = Window::new(mapping.clone(), offset as usize, bytes);
    if !window.is_aligned(8) {
        return Err(Violation::new(Rule::InflightMisaligned, format!("{offset:#x}")));
    }
    match window.load16(VERSION, Ordering::Acquire) {
        0 => return Ok((window, false)),
        THE_VERSION => (),
        version => return Err(Violation::new(Rule::InflightVersion, format!("{version}"))),
    }
    let features = window.load64(FEATURES, Ordering::Acquire);
    if features != 0 {
        return Err(Violation::new(Rule::InflightFeatures, format!("{features:#x}")));
    }
    let count = window.load16(DESC_NUM, Ordering::Acquire);
    if count != size {
        return Err(Violation::new(Rule::InflightSize, format!("of {count} descriptors, for a ring of {size}")));
    }
    Ok((window, true))
}

/// Bring what is in flight into the order in which it was taken, by the counters that come first; the next counter.
/// Violation: inflight-counter.
pub(super) fn sort<T>(again: &mut [(u64, T)]) -> Result<u64, Violation> {
    again.sort_unstable_by_key(|(counter, _)| *counter);
    if let Some(pair) = again.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Violation::new(Rule::InflightCounter, format!("{} of two", pair[0].0)));
    }
    match again.last() {
        // No ring ever gets there, and the next number would come first.
        Some((u64::MAX, _)) => Err(Violation::new(Rule::InflightCounter, format!("{}", u64::MAX))),
        Some((counter, _)) => Ok(counter + 1),
        None => Ok(0),
    }
}

/// A ring that was started with a region of this mapping, if that is still what its file says.
pub(super) fn sound<R>(mapping: &Mapping, ring: Result<R, Violation>) -> Result<R, Violation> {
    // Before anything that is wrong with it: it may be made of zeroes. What is wrong with the driver's memory, even
    // more so, was said first.
    match ring {
        Err(violation) if violation.rule == Rule::RegionLost => Err(violation),
        _ if mapping.lost() => Err(lost()),
        ring => ring,
    }
}

/// The region is lost.
pub(super) fn lost() -> Violation {
    Violation::new(Rule::RegionLost, "the file of what is in flight was truncated")
}
