//! A driver of a network card that gives back what it is sent: frames alone and in bursts, in turns.
//!
//! A device that serves a burst at once has the first frame wait for the others. How long, is what the first of a burst
//! takes more than a frame that is alone; each burst is held against the frame before it, so that what drifts hits both.

use std::sync::atomic::Ordering;
use std::time::Instant;

use vbus_ring::ring::DriverRing;

use crate::load::{Buffers, LoadError};
use crate::wait::Patience;
use crate::work::Wrong;

/// Bytes of the header in front of a frame (virtio 1.4, section 5.1.6).
pub const HEADER: usize = 12;
/// Where a frame has its number: behind its addresses and its type, and aligned.
const NUMBER: usize = HEADER + 20;
/// The shortest frame that has a place for it.
pub const SHORTEST: usize = NUMBER + 8 - HEADER;

/// What was done, and how long it took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Frames that came back.
    pub frames: u64,
    /// Of their numbers.
    pub checksum: u64,
    /// Nanoseconds from when a frame was shown the device, that was alone, until it was back; ascending.
    pub alone: Vec<u64>,
    /// The same of the first of a burst; and of the last.
    pub first: Vec<u64>,
    /// As above.
    pub last: Vec<u64>,
    /// What the first of a burst took more than the frame before it that was alone; 0 when it was less.
    pub held: Vec<u64>,
}

/// One of the card's queues.
pub struct Side<'a, N: Fn()> {
    /// Its ring.
    pub ring: &'a mut DriverRing,
    /// One for each frame of a burst.
    pub buffers: Buffers,
    /// By token, the buffer of its chain.
    owners: Vec<usize>,
    notify: N,
}

impl<'a, N: Fn()> Side<'a, N> {
    /// `notify` tells the device that there is something.
    pub fn new(ring: &'a mut DriverRing, buffers: Buffers, notify: N) -> Self {
        let owners = vec![0; usize::from(ring.size())];
        Self { ring, buffers, owners, notify }
    }

    /// Put buffers into the ring, unpublished.
    fn add(&mut self, buffers: impl Iterator<Item = usize>, size: usize, writable: bool) -> Result<(), LoadError> {
        for buffer in buffers {
            let part = [(self.buffers.address(buffer), size as u64)];
            let token = if writable { self.ring.add(&[], &part) } else { self.ring.add(&part, &[]) };
            let token = token.ok().flatten().ok_or(LoadError::NoRoom(self.buffers.depth()))?;
            self.owners[usize::from(token)] = buffer;
        }
        Ok(())
    }

    fn publish(&mut self) {
        if self.ring.publish() {
            (self.notify)();
        }
    }
}

/// Send a frame of `size` bytes alone, and then as many at once as there are buffers, `count` times.
///
/// All frames are polled for, and must come back in their order and with the number that they were sent with.
pub fn run<R: Fn(), T: Fn()>(
    receive: &mut Side<'_, R>,
    transmit: &mut Side<'_, T>,
    size: usize,
    count: u64,
) -> Result<Report, LoadError> {
    assert!(size >= SHORTEST, "a frame without room for its number");
    let (burst, bytes) = (transmit.buffers.depth(), HEADER + size);
    let mut report = Report::default();
    let mut finished = Vec::with_capacity(burst);
    receive.add(0..burst, bytes, true)?;
    receive.publish();
    for _ in 0..count {
        let (alone, _) = exchange(receive, transmit, (1, bytes), &mut report, &mut finished)?;
        let (first, last) = exchange(receive, transmit, (burst, bytes), &mut report, &mut finished)?;
        report.alone.push(alone);
        report.first.push(first);
        report.last.push(last);
        report.held.push(first.saturating_sub(alone));
    }
    for times in [&mut report.alone, &mut report.first, &mut report.last, &mut report.held] {
        times.sort_unstable();
    }
    Ok(report)
}

/// Send `count` frames at once, and wait until they are back: how long the first took, and the last.
fn exchange<R: Fn(), T: Fn()>(
    receive: &mut Side<'_, R>,
    transmit: &mut Side<'_, T>,
    (count, bytes): (usize, usize),
    report: &mut Report,
    finished: &mut Vec<(u16, u32)>,
) -> Result<(u64, u64), LoadError> {
    let mut patience = Patience::default();
    let first_number = report.frames;
    for buffer in 0..count {
        transmit.buffers.window(buffer).store64(NUMBER, first_number + buffer as u64, Ordering::Relaxed);
    }
    transmit.add(0..count, bytes, false)?;
    let (mut first, mut back) = (0, 0);
    let mut again = Vec::with_capacity(count);
    let began = Instant::now();
    transmit.publish();
    while back < count {
        finished.clear();
        receive.ring.poll(count, finished)?;
        if finished.is_empty() {
            patience.glance()?;
            continue;
        }
        if back == 0 {
            first = began.elapsed().as_nanos() as u64;
        }
        for &(token, written) in &*finished {
            let buffer = receive.owners[usize::from(token)];
            let number = report.frames;
            let came = receive.buffers.window(buffer).load64(NUMBER, Ordering::Relaxed);
            if (written as usize, came) != (bytes, number) {
                let what = format!("{written} bytes, of frame {came}, came back, not {bytes}");
                return Err(Wrong { number, what }.into());
            }
            report.checksum = report.checksum.wrapping_add(came.wrapping_mul(came | 1));
            report.frames += 1;
            again.push(buffer);
        }
        back += finished.len();
    }
    let last = began.elapsed().as_nanos() as u64;
    // Not before: what has come back is known by tokens, which are given anew.
    receive.add(again.into_iter(), bytes, true)?;
    receive.publish();
    let mut left = count;
    while left > 0 {
        finished.clear();
        transmit.ring.poll(left, finished)?;
        left -= finished.len();
        patience.look_again()?;
    }
    Ok((first, last))
}
