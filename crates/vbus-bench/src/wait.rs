//! How a side waits for the other: it polls, or sleeps until an eventfd is written.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

/// How long the other side may say nothing.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Looks between two looks at the clock.
const LOOKS: u32 = 1 << 16;

/// The other side says nothing any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other side says nothing for {} seconds", PATIENCE.as_secs())]
pub struct Silence;

/// Counts looks that found nothing.
#[derive(Debug, Default)]
pub struct Patience {
    looks: u32,
    since: Option<Instant>,
}

impl Patience {
    /// Something was found.
    #[inline]
    pub fn renew(&mut self) {
        (self.looks, self.since) = (0, None);
    }

    /// Nothing was found: make room for the other thread of this core, and give up in the end.
    #[inline]
    pub fn look_again(&mut self) -> Result<(), Silence> {
        std::hint::spin_loop();
        self.looks += 1;
        if self.looks % LOOKS == 0 && self.since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            return Err(Silence);
        }
        Ok(())
    }
}

/// Sleep until `fd` is readable.
pub fn sleep(fd: RawFd) -> io::Result<()> {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which outlives the call.
    match unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as i32) } {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, Silence.to_string())),
        1.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
    }
}

/// Read an eventfd that nobody else reads, sleeping until it is written. It must be a blocking one.
pub fn hear(fd: &impl AsRawFd) -> io::Result<u64> {
    let mut count = 0u64;
    // SAFETY: eight bytes are written to `count`, which outlives the call.
    match unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) } {
        8 => Ok(count),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Write an eventfd.
pub fn say(fd: &impl AsRawFd) -> io::Result<()> {
    let one = 1u64.to_ne_bytes();
    // SAFETY: eight bytes are read from `one`.
    match unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), one.len()) } {
        8 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
