"""A device's own state, to and from a back-end of vhost-user, over a channel that either side may choose."""

from __future__ import annotations

import errno
import os
import select
import time

from vbus.errors import DriverError
from vbus.proxy.connectors.vhost_user_link import BackEndLink
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import Request, StateDirection

MAX_STATE = 16 << 20
"""Bytes of a device's state that are taken from a back-end."""
PIECE = 4096
"""Bytes that a pipe which is writable takes without waiting."""


def save(link: BackEndLink) -> bytes:
    """Ask for the state of a device whose rings are stopped. DriverError EIO, EMSGSIZE, EPROTO, ETIMEDOUT."""
    mine, its = os.pipe2(os.O_CLOEXEC)
    fd = _channel(link, StateDirection.SAVE, mine, its)
    try:
        data = _read(fd, link.timeout)
    finally:
        os.close(fd)
    _check(link)
    return data


def load(link: BackEndLink, data: bytes) -> None:
    """Give a device whose rings are stopped a state. DriverError EIO when it does not take it, EPROTO, ETIMEDOUT."""
    its, mine = os.pipe2(os.O_CLOEXEC)
    fd = _channel(link, StateDirection.LOAD, mine, its)
    try:
        _write(fd, data, link.timeout)
    finally:
        os.close(fd)
    _check(link)


def _channel(link: BackEndLink, direction: StateDirection, mine: int, its: int) -> int:
    """Offer a pipe; our end of it, or of what the back-end wants instead, which is the caller's. DriverError."""
    try:
        answer, given = link.ask(Request.SET_DEVICE_STATE_FD, m.U64, m.DeviceState(direction, m.PHASE_STOPPED), [its])
    except BaseException:
        os.close(mine)
        raise
    finally:
        os.close(its)
    wrong = answer.value & m.STATE_ERROR
    if not wrong and given and not answer.value & m.NO_FD:
        os.close(mine)
        return given[0]
    if not wrong and not given and answer.value & m.NO_FD:
        return mine
    for fd in (mine, *given):
        os.close(fd)
    if wrong:
        what = direction.name.lower()
        raise DriverError(errno.EIO, f"the back-end cannot {what} the device's state: {wrong:#x}")
    raise DriverError(errno.EPROTO, f"the back-end says {answer.value:#x} of a channel, and sends {len(given)}")


def _read(fd: int, timeout: float) -> bytes:
    data = bytearray()
    deadline = time.monotonic() + timeout
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(fd, PIECE)
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > MAX_STATE:
            raise DriverError(errno.EMSGSIZE, f"the device's state has over {MAX_STATE} bytes")
    raise DriverError(errno.ETIMEDOUT, f"the device's state does not end within {timeout} s")


def _write(fd: int, data: bytes, timeout: float) -> None:
    left = memoryview(data)
    deadline = time.monotonic() + timeout
    try:
        while left:
            if not select.select([], [fd], [], max(0.0, deadline - time.monotonic()))[1]:
                raise DriverError(errno.ETIMEDOUT, f"the device's state is not read within {timeout} s")
            left = left[os.write(fd, left[:PIECE]) :]
    except BrokenPipeError:
        # It has closed its end: what is wrong it says when it is asked.
        return


def _check(link: BackEndLink) -> None:
    if value := link.number(Request.CHECK_DEVICE_STATE):
        raise DriverError(errno.EIO, f"the back-end could not give or take the device's state: {value:#x}")
