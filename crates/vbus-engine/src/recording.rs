//! A file of frames as Wireshark and tcpdump read it (pcap), written by whoever has some: the engines of a device, and
//! its model.
//!
//! A writer lays its records one after the other into memory of its own, and has them written together. What is in the
//! file is whole records, whatever happens: of a write that the disk cuts short, those that it took stay, and the rest is
//! cut off; a file that somebody cuts off meanwhile begins anew.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::net::Frame;

/// Bytes before each frame: seconds, nanoseconds, bytes that follow, bytes that there were; little-endian words.
pub const RECORD: usize = 16;

/// What is kept of a writer's memory for its next records.
const KEPT: usize = 256 << 10;

/// Records that are to be written together.
#[derive(Debug, Default)]
pub struct Records {
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Records {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// There are none any more.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(KEPT);
        self.ends.clear();
    }

    /// One more, of a frame of so many bytes. Its time is told when it is written: see `Recording::record`.
    pub fn push(&mut self, frame: Frame<'_>, size: u32) {
        self.bytes.reserve(RECORD + size as usize);
        for word in [0, 0, size, size] {
            self.bytes.extend_from_slice(&word.to_le_bytes());
        }
        frame.copy(&mut self.bytes);
        self.ends.push(self.bytes.len());
    }

    /// One more that is finished.
    pub fn push_whole(&mut self, record: &[u8]) {
        self.bytes.extend_from_slice(record);
        self.ends.push(self.bytes.len());
    }

    /// Bytes of the frames in the first so many.
    pub fn frame_bytes(&self, records: usize) -> u64 {
        (self.end(records) - records * RECORD) as u64
    }

    /// Where the first so many end.
    fn end(&self, records: usize) -> usize {
        records.checked_sub(1).map_or(0, |last| self.ends[last])
    }

    fn stamp(&mut self, time: [u8; 8]) {
        let mut start = 0;
        for &end in &self.ends {
            self.bytes[start..start + 8].copy_from_slice(&time);
            start = end;
        }
    }
}

/// What became of records.
#[derive(Debug)]
pub struct Written {
    /// So many are in the file: the first ones.
    pub records: usize,
    /// Why not all.
    pub error: Option<io::Error>,
}

struct File {
    fd: Option<OwnedFd>,
    /// Bytes of it that are whole records, and what is before them.
    size: u64,
}

/// The file. Nobody else writes to it.
pub struct Recording {
    file: Mutex<File>,
    header: Vec<u8>,
}

impl Recording {
    /// Begin a regular file anew, with this header. The error is the system's.
    pub fn begin(fd: OwnedFd, header: &[u8]) -> io::Result<Self> {
        let size = anew(fd.as_raw_fd(), header)?;
        Ok(Self { file: Mutex::new(File { fd: Some(fd), size }), header: header.to_vec() })
    }

    fn lock(&self) -> MutexGuard<'_, File> {
        // What is wrong after a panic is behind `size`, where the next records go.
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Write records of now; it may take as long as the file system likes. All of them have one time, and those of a
    /// later call none that is earlier, as far as the clock does not go back.
    pub fn record(&self, records: &mut Records) -> Written {
        let mut file = self.lock();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Seconds have 32 bits there.
        let words = [now.as_secs() as u32, now.subsec_nanos()].map(u32::to_le_bytes);
        let mut time = [0; 8];
        time.copy_from_slice(words.as_flattened());
        records.stamp(time);
        file.write(records, &self.header)
    }

    /// Write records that have their time.
    pub fn append(&self, records: &Records) -> Written {
        self.lock().write(records, &self.header)
    }

    /// Let go of the file.
    pub fn close(&self) {
        let fd = self.lock().fd.take();
        drop(fd);
    }
}

impl File {
    fn write(&mut self, records: &Records, header: &[u8]) -> Written {
        let Some(fd) = self.fd.as_ref().map(AsRawFd::as_raw_fd) else {
            return Written { records: 0, error: Some(io::Error::from_raw_os_error(libc::EBADF)) };
        };
        if size(fd).is_ok_and(|size| size < self.size) {
            match anew(fd, header) {
                Ok(size) => self.size = size,
                Err(error) => return Written { records: 0, error: Some(error) },
            }
        }
        let (written, error) = write_at(fd, &records.bytes, self.size);
        let whole = records.ends.partition_point(|end| *end <= written);
        let end = records.end(whole);
        self.size += end as u64;
        if written > end {
            // Behind what was cut short nothing could be read. Should this fail, the next records go over it.
            let _ = truncate(fd, self.size);
        }
        Written { records: whole, error }
    }
}

/// An empty file with a header in it, and the bytes of that. One that is cut short is none.
fn anew(fd: RawFd, header: &[u8]) -> io::Result<u64> {
    truncate(fd, 0)?;
    match write_at(fd, header, 0) {
        (_, None) => Ok(header.len() as u64),
        (_, Some(error)) => {
            let _ = truncate(fd, 0);
            Err(error)
        }
    }
}

/// How many bytes were written, and why not all.
fn write_at(fd: RawFd, bytes: &[u8], at: u64) -> (usize, Option<io::Error>) {
    let mut written = 0;
    while written < bytes.len() {
        let rest = &bytes[written..];
        // SAFETY: as many bytes may be read there.
        let more = unsafe { libc::pwrite64(fd, rest.as_ptr().cast(), rest.len(), (at + written as u64) as i64) };
        match usize::try_from(more) {
            Ok(0) => return (written, Some(io::Error::from_raw_os_error(libc::ENOSPC))),
            // A disk that is full says so when it is asked for the rest.
            Ok(more) => written += more,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return (written, Some(error));
                }
            }
        }
    }
    (written, None)
}

fn truncate(fd: RawFd, size: u64) -> io::Result<()> {
    // SAFETY: no pointers are involved.
    match unsafe { libc::ftruncate64(fd, size as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn size(fd: RawFd) -> io::Result<u64> {
    // SAFETY: a structure of integers, which the call fills in.
    let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
    // SAFETY: there is room for it.
    match unsafe { libc::fstat64(fd, &mut stat) } {
        0 => Ok(stat.st_size as u64),
        _ => Err(io::Error::last_os_error()),
    }
}
