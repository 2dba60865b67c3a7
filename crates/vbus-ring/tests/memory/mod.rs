//! Memory of a driver, for tests.

use std::os::fd::AsFd;
use std::sync::Arc;

use vbus_ring::mem::Mapping;

/// A mapping of `size` bytes of a file of zeroes, which takes no memory before it is touched.
pub fn mapping(size: u64, writable: bool) -> Arc<Mapping> {
    // SAFETY: the name is a string constant, and the descriptor is checked by the conversion of the file.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just made, and owned by nobody else.
    let file: std::fs::File = unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) };
    file.set_len(size).unwrap();
    Arc::new(Mapping::new(file.as_fd(), size as usize, 0, writable).unwrap())
}
