"""A device's own state, given to a front-end or taken from one while the device's rings are stopped (DEVICE_STATE).

A front-end offers a channel, which it could make block at any time, as it shares it; the protocol lets the back-end
choose one of its own instead, and that is done here. What is saved comes as a file that has all of it already; what is
loaded comes through a pipe whose near end nobody else has, read as it arrives. So no thread ever waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from vbus.bus import Actor, Attachment, Slot
from vbus.errors import Violation
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import Request, StateDirection

MAX_STATE = 16 << 20
"""Bytes of a device's state."""
PIECE = 1 << 16
FAILED = 1
"""What is answered instead of 0."""


class Answerer(Protocol):
    """The front-end, as far as it is needed here."""

    slot: Slot
    actor: Actor

    def answer(self, request: Request, payload: m.Payload, fds: list[int] | None = None) -> None:
        """Send an answer."""


class StateTransfer:
    """One transfer at a time, in turns of the front-end's actor."""

    def __init__(self, front_end: Answerer, attachment: Attachment) -> None:
        self._front_end = front_end
        self._attachment = attachment
        self._direction: StateDirection | None = None
        self._pipe: int | None = None
        self._data = bytearray()
        self._failed = False

    def begin(self, asked: m.DeviceState, resumed: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """A transfer, instead of whatever was before. Violation: device-state-direction, device-state-phase.

        `resumed` is what makes a callback that lets the front-end go on from any thread.
        """
        if asked.direction not in list(StateDirection):
            raise Violation("device-state-direction", f"{asked.direction}; 0 saves, 1 loads")
        if asked.phase != m.PHASE_STOPPED:
            raise Violation("device-state-phase", f"{asked.phase}; 0 is the only one that there is")
        self.close()
        self._direction = StateDirection(asked.direction)
        self._failed = False
        if self._direction is StateDirection.LOAD:
            self._open_pipe()
            return
        saved: list[bytes | None] = []
        told = resumed(lambda: self._give(saved[0]))

        def done(data: bytes | None) -> None:
            saved.append(data)
            told()

        self._front_end.slot.save_state(self._attachment, done)

    def _give(self, data: bytes | None) -> None:
        if data is None or len(data) > MAX_STATE:
            self._failed = True
            self._front_end.answer(Request.SET_DEVICE_STATE_FD, m.U64(FAILED | m.NO_FD))
            return
        fd = os.memfd_create("vbus-state", os.MFD_CLOEXEC)
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(fd, left) :]
            os.lseek(fd, 0, os.SEEK_SET)
            self._front_end.answer(Request.SET_DEVICE_STATE_FD, m.U64(0), [fd])
        finally:
            os.close(fd)

    def _open_pipe(self) -> None:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        # Ours alone: whoever has the other end cannot make it block.
        os.set_blocking(ours, False)
        try:
            self._front_end.answer(Request.SET_DEVICE_STATE_FD, m.U64(0), [theirs])
        finally:
            os.close(theirs)
        self._pipe = ours
        self._front_end.actor.watch(ours, self._read)

    def _read(self) -> None:
        """Take what has come, up to the end or what is too much."""
        while self._pipe is not None:
            try:
                data = os.read(self._pipe, PIECE)
            except BlockingIOError:
                return
            self._data += data
            if len(self._data) > MAX_STATE:
                self._failed = True
                self._data.clear()
            if not data or self._failed:
                self._close_pipe()

    def check(self, resumed: Callable[[Callable[[], None]], Callable[[], None]]) -> None:
        """Say whether the transfer succeeded, which for one to the device is now. Violation: device-state-none."""
        if self._direction is None:
            raise Violation("device-state-none", "there was no transfer to check")
        direction, self._direction = self._direction, None
        if direction is StateDirection.LOAD:
            self._read()
            if self._pipe is not None:
                # Whoever asks has written all of it, and closed its end.
                self._failed = True
                self._close_pipe()
        data, self._data = bytes(self._data), bytearray()
        if direction is StateDirection.SAVE or self._failed:
            self._front_end.answer(Request.CHECK_DEVICE_STATE, m.U64(FAILED if self._failed else 0))
            return
        loaded: list[bool] = []
        told = resumed(lambda: self._front_end.answer(Request.CHECK_DEVICE_STATE, m.U64(0 if loaded[0] else FAILED)))

        def done(taken: bool) -> None:
            loaded.append(taken)
            told()

        self._front_end.slot.load_state(self._attachment, data, done)

    def _close_pipe(self) -> None:
        if self._pipe is not None:
            self._front_end.actor.unwatch(self._pipe)
            os.close(self._pipe)
            self._pipe = None

    def close(self) -> None:
        """Give up what is under way."""
        self._close_pipe()
        self._direction = None
        self._data = bytearray()
