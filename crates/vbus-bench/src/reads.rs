//! Random reads of a file by io_uring and nothing else: the limit of whoever serves a disk with it.
//!
//! As the engine of a disk does it: a batch of operations is submitted with one system call, and what is ready after
//! that is taken off together. There is no driver and no ring.

use std::io;
use std::os::fd::RawFd;
use std::time::Instant;

use io_uring::{opcode, types, IoUring};

use crate::load::{Buffers, LoadError, Report, Request};
use crate::work::{RandomReads, Work, Wrong};

const GET_EVENTS: u32 = 1;

fn make_ring(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
    match builder.build(entries) {
        // Before Linux 6.0.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::builder().build(entries),
        made => made,
    }
}

/// Do `total` reads of a file, as many at a time as there are buffers, submitted up to `batch` together.
///
/// What is read is checked and summed up as `load::run` does it. The error is the system's when io_uring is not
/// permitted or a read fails, and Wrong when one ends short.
pub fn run(
    fd: RawFd,
    buffers: &Buffers,
    work: &mut RandomReads,
    total: u64,
    batch: usize,
) -> Result<Report, LoadError> {
    let depth = buffers.depth();
    let mut ring = make_ring(depth as u32)?;
    ring.submitter().register_files(&[fd])?;
    let mut under_way = vec![Request::default(); depth];
    let mut free: Vec<usize> = (0..depth).rev().collect();
    let mut report = Report { times: Vec::with_capacity(total as usize), ..Report::default() };
    let (size, written) = (work.size, work.writable() as u32);
    let mut asked = 0;
    let began = Instant::now();
    let clock = || began.elapsed().as_nanos() as u64;
    while report.requests < total {
        let now = clock();
        let mut queued = 0;
        while asked < total && (queued as usize) < batch {
            let Some(buffer) = free.pop() else { break };
            under_way[buffer] = Request { number: asked, began: now };
            // SAFETY: where the driver of a disk would have it read to, inside the buffer.
            let place = unsafe { buffers.as_ptr(buffer).add(work.readable()) };
            let at = work.place(asked) * size as u64;
            let read = opcode::Read::new(types::Fixed(0), place, size as u32).offset(at).build();
            // SAFETY: the buffers outlive the ring; there are as many places in it.
            unsafe { ring.submission().push(&read.user_data(buffer as u64)) }.map_err(|_| LoadError::NoRoom(depth))?;
            asked += 1;
            queued += 1;
        }
        let wanted = u32::from(queued == 0);
        // SAFETY: no argument but numbers.
        match unsafe { ring.submitter().enter::<()>(queued, wanted, GET_EVENTS, None) } {
            Ok(taken) if taken == queued as usize => (),
            Ok(taken) => return Err(io::Error::other(format!("{taken} of {queued} operations were taken")).into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error.into()),
        }
        let now = clock();
        for entry in ring.completion() {
            let buffer = entry.user_data() as usize;
            let Request { number, began } = under_way[buffer];
            match entry.result() {
                result if result < 0 => return Err(io::Error::from_raw_os_error(-result).into()),
                result if result as usize == size => (),
                result => return Err(Wrong { number, what: format!("{result} bytes were read of {size}") }.into()),
            }
            let sum = work.check(number, written, buffers.window(buffer))?;
            report.checksum = report.checksum.wrapping_add(sum.wrapping_mul(number | 1));
            report.requests += 1;
            report.bytes_received += size as u64;
            report.times.push(now - began);
            free.push(buffer);
        }
    }
    report.nanoseconds = clock();
    report.times.sort_unstable();
    Ok(report)
}
