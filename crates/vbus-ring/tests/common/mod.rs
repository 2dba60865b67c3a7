//! Shared memory for tests, mapped from a file as in earnest.

use std::ffi::CString;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vbus_ring::mem::{Mapping, Window};

/// `size` bytes of zeroes, shared.
pub fn shared(size: usize) -> Window {
    let name = CString::new("test").unwrap();
    // SAFETY: the name outlives the call; the descriptor is new and owned by nobody else.
    let fd = unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    let file = std::fs::File::from(fd);
    file.set_len(size as u64).unwrap();
    let mapping = Mapping::new(file.as_fd(), size, 0, true).unwrap();
    Window::new(Arc::new(mapping), 0, size)
}
