//! A driver that keeps a number of requests under way, each answer bringing the next, until a fixed number is done.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Instant;

use vbus_ring::mem::{Mapping, Window};
use vbus_ring::ring::DriverRing;
use vbus_ring::violation::Violation;

use crate::wait::{sleep, Patience, Silence};
use crate::work::{Work, Wrong};

/// Requests that are shown to a device at a time: one that is awake need not wait for all that many answers bring.
const PART: usize = 16;

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The device broke the ring.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The device does not answer.
    #[error(transparent)]
    Silence(#[from] Silence),
    /// It answered wrong.
    #[error(transparent)]
    Wrong(#[from] Wrong),
    /// The eventfd broke.
    #[error(transparent)]
    System(#[from] io::Error),
    /// The ring does not take what it should.
    #[error("the ring has no room for {0} requests")]
    NoRoom(usize),
}

/// What was done, and how long it took.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes that the device could read.
    pub bytes_sent: u64,
    /// Bytes that it wrote.
    pub bytes_received: u64,
    /// Of what it wrote.
    pub checksum: u64,
    /// From before the first request until after the last answer.
    pub nanoseconds: u64,
    /// Nanoseconds from a request to its answer, ascending.
    pub times: Vec<u64>,
}

/// Where the buffers of requests are.
pub struct Buffers {
    arena: Arc<Mapping>,
    places: Vec<usize>,
    windows: Vec<Window>,
    addresses: Vec<u64>,
}

impl Buffers {
    /// `depth` buffers of `size` bytes, each at a cache line of its own, in an arena from `offset`; its first byte has the
    /// driver address `address`. Panics when they are not inside.
    pub fn new(arena: &Arc<Mapping>, address: u64, offset: usize, depth: usize, size: usize) -> Self {
        let places: Vec<usize> = (0..depth).map(|number| offset + number * Self::stride(size)).collect();
        let windows = places.iter().map(|&place| Window::new(arena.clone(), place, size)).collect();
        let addresses = places.iter().map(|&place| address + place as u64).collect();
        Self { arena: arena.clone(), places, windows, addresses }
    }

    /// Bytes from one buffer to the next.
    pub fn stride(size: usize) -> usize {
        size.next_multiple_of(64)
    }

    /// Where the device finds it.
    pub fn address(&self, number: usize) -> u64 {
        self.addresses[number]
    }

    /// How many.
    pub fn depth(&self) -> usize {
        self.windows.len()
    }

    /// One of them.
    pub fn window(&self, buffer: usize) -> &Window {
        &self.windows[buffer]
    }

    /// Where one is in this process, as long as these buffers are.
    pub fn as_ptr(&self, buffer: usize) -> *mut u8 {
        // SAFETY: inside the mapping, as its window is.
        unsafe { self.arena.as_ptr().add(self.places[buffer]) }
    }
}

/// What is under way in a buffer.
#[derive(Clone, Copy, Default)]
pub(crate) struct Request {
    pub number: u64,
    pub began: u64,
}

/// Drive a ring until `total` requests are done.
///
/// `notify` tells the device that there is something. Without a `bell` the answers are polled for; with one, this
/// thread sleeps on it while there are none, and `hush` takes what it was rung.
pub fn run<W: Work>(
    ring: &mut DriverRing,
    buffers: &Buffers,
    work: &mut W,
    total: u64,
    notify: impl Fn(),
    bell: Option<(RawFd, &dyn Fn())>,
) -> Result<Report, LoadError> {
    let (readable, writable) = (work.readable() as u64, work.writable() as u64);
    let mut under_way = vec![Request::default(); buffers.depth()];
    // By token, the buffer of its request.
    let mut owners = vec![0; usize::from(ring.size())];
    let mut free: Vec<usize> = (0..buffers.depth()).rev().collect();
    let mut finished = Vec::with_capacity(buffers.depth());
    let mut patience = Patience::default();
    let mut report = Report { times: Vec::with_capacity(total as usize), ..Report::default() };
    let mut asked = 0;
    let began = Instant::now();
    let clock = || began.elapsed().as_nanos() as u64;
    while report.requests < total {
        // Once for all that are asked together: a clock takes as long as a request.
        let now = clock();
        let (mut unseen, mut awaited) = (0, false);
        while asked < total {
            let Some(buffer) = free.pop() else { break };
            work.ask(asked, &buffers.windows[buffer]);
            let address = buffers.addresses[buffer];
            let parts = [(address, readable), (address + readable, writable)];
            let token = ring.add(&parts[..1], if writable > 0 { &parts[1..] } else { &[] });
            let token = token.ok().flatten().ok_or(LoadError::NoRoom(buffers.depth()))?;
            owners[usize::from(token)] = buffer;
            under_way[buffer] = Request { number: asked, began: now };
            asked += 1;
            unseen += 1;
            if unseen == PART {
                unseen = 0;
                awaited |= ring.publish();
            }
        }
        // Behind all of them: one that sleeps is to find enough to do.
        if ring.publish() || awaited {
            notify();
        }
        finished.clear();
        match bell {
            None => ring.poll(buffers.depth(), &mut finished)?,
            Some(_) => ring.reap(buffers.depth(), &mut finished)?,
        }
        if finished.is_empty() {
            match bell {
                None => patience.look_again()?,
                Some((fd, hush)) => {
                    sleep(fd)?;
                    hush();
                }
            }
            continue;
        }
        patience.renew();
        let now = clock();
        for &(token, written) in &finished {
            let buffer = owners[usize::from(token)];
            let Request { number, began } = under_way[buffer];
            let sum = work.check(number, written, &buffers.windows[buffer])?;
            // Whatever the order of answers.
            report.checksum = report.checksum.wrapping_add(sum.wrapping_mul(number | 1));
            report.requests += 1;
            report.bytes_sent += readable;
            report.bytes_received += u64::from(written);
            report.times.push(now - began);
            free.push(buffer);
        }
    }
    report.nanoseconds = clock();
    report.times.sort_unstable();
    Ok(report)
}
