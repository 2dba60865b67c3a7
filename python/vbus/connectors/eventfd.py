"""What a descriptor that another process sent may be rung as: an eventfd, and nothing else."""

import os


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor that the other side sent is an eventfd: only those can be rung without being stuck."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    except OSError:
        return False
