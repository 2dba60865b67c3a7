"""The two sockets between a front-end of vhost-user and its back-end.

On the first the front-end asks, and answers come in the order of the questions: the protocol has no tokens, so that an
answer which nobody waits for any more still takes its place in the row. On the second the back-end speaks of itself.
Whatever a back-end does wrong on either ends the link, with an errno.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

from vbus.errors import DriverError, Violation
from vbus.proxy.loop import Loop
from vbus.vhost_user import codec, wire
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import BackendRequest, Request

P = TypeVar("P", bound=m.Payload)
Answer = tuple[m.Payload, list[int]]

ANSWERS_WITH_FD = frozenset({Request.GET_INFLIGHT_FD, Request.SET_DEVICE_STATE_FD})
"""Requests whose answer may bring a descriptor."""


@dataclass(frozen=True)
class _Question:
    """What was asked, and who is told: the answer with its descriptors, or why there is none."""

    request: Request
    then: Callable[[Answer], None]
    failed: Callable[[DriverError], None]


class BackEndLink:
    """Questions to a back-end from any thread; its answers, and what it says by itself, on the loop's.

    `ended` is called once, with the reason, when the link is of no more use; `said` with each message of the back-end.
    """

    def __init__(
        self,
        sock: socket.socket,
        loop: Loop,
        timeout: float,
        ended: Callable[[DriverError], None],
        said: Callable[[BackendRequest, m.Payload], None],
    ) -> None:
        self.timeout = timeout
        self.acknowledges = False
        """Whether what wants no answer is acknowledged (REPLY_ACK)."""
        self._loop = loop
        self._ended = ended
        self._said = said
        self._lock = threading.Lock()
        self._questions: deque[_Question] = deque()
        self._lost: DriverError | None = None
        self._sock = sock
        sock.setblocking(False)
        self._reader = wire.Reader(sock)
        self._key = loop.key(self._readable, 0)
        self._channel: socket.socket | None = None
        self._channel_reader: wire.Reader | None = None
        self._channel_key = 0
        loop.scheduler.add_fd(sock.fileno(), self._key)

    # Asking.

    def post(
        self,
        request: Request,
        payload: m.Payload,
        fds: Sequence[int],
        then: Callable[[Answer], None],
        failed: Callable[[DriverError], None],
    ) -> None:
        """Ask, and be called back on the loop's thread: `then` must not wait. DriverError when nothing can be asked."""
        self._send(request, payload, fds, _Question(request, then, failed))

    def say(self, request: Request, payload: m.Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Say what is not answered, and do not wait. DriverError."""
        self._send(request, payload or m.Empty(), fds, None)

    def _send(self, request: Request, payload: m.Payload, fds: Sequence[int], question: _Question | None) -> None:
        needs = question is not None and m.TABLE[request].answer is None
        data = codec.encode(request, payload, need_reply=needs)
        with self._lock:
            if self._lost is not None:
                raise DriverError(self._lost.errno, self._lost.strerror)
            try:
                wire.send(self._sock, data, list(fds))
                error = None
            except BlockingIOError:
                # Its socket is full of what it was asked before.
                error = DriverError(errno.ETIMEDOUT, "the back-end does not read what it is asked")
            except OSError as wrong:
                error = DriverError(errno.ECONNRESET, f"the back-end is gone: {wrong.strerror}")
            else:
                if question is not None:
                    self._questions.append(question)
        if error is not None:
            self.fail(error)
            raise DriverError(error.errno, error.strerror)

    def ask(
        self, request: Request, wanted: type[P], payload: m.Payload | None = None, fds: Sequence[int] = ()
    ) -> tuple[P, list[int]]:
        """Ask and wait; the descriptors of the answer are the caller's. DriverError ETIMEDOUT, ECONNRESET, EPROTO."""
        future: Future[Answer] = Future()
        self.post(request, payload or m.Empty(), fds, future.set_result, future.set_exception)
        try:
            answer, given = future.result(self.timeout)
        except FutureTimeoutError:
            future.add_done_callback(_drop)
            raise DriverError(errno.ETIMEDOUT, f"no answer to {request.name} within {self.timeout} s") from None
        except DriverError as error:
            raise DriverError(error.errno, error.strerror) from None
        if not isinstance(answer, wanted):
            _close(given)
            raise DriverError(errno.EPROTO, f"{type(answer).__name__} came as the answer to {request.name}")
        return answer, given

    def number(self, request: Request) -> int:
        """The number that answers a question. DriverError."""
        return self.ask(request, m.U64)[0].value

    def tell(self, request: Request, payload: m.Payload | None = None, fds: Sequence[int] = ()) -> None:
        """Say something, and wait until it is acknowledged, where there is such a thing. DriverError EIO: refused."""
        if not self.acknowledges:
            self.say(request, payload, fds)
            return
        answer, _ = self.ask(request, m.U64, payload, fds)
        if answer.value:
            raise DriverError(errno.EIO, f"the back-end refuses {request.name}: {answer.value:#x}")

    def tell_later(
        self, request: Request, payload: m.Payload, fds: Sequence[int], done: Callable[[bool], None]
    ) -> None:
        """Say something; `done` is called on the loop's thread once it took effect, with whether it was taken.

        Never, when the link ends before. DriverError.
        """
        if self.acknowledges:

            def acknowledged(answer: Answer) -> None:
                done(answer[0] == m.U64(0))

            self.post(request, payload, fds, acknowledged, lambda _: None)
        else:
            self.say(request, payload, fds)
            self.post(Request.GET_FEATURES, m.Empty(), (), lambda _: done(True), lambda _: None)

    def settle(self) -> None:
        """Wait until what was told before has been read, also where nothing is acknowledged. DriverError."""
        if not self.acknowledges:
            # Answers come in order: any will do, and this one is always legal.
            self.number(Request.GET_FEATURES)

    # Answers. On the loop's thread.

    def _readable(self) -> bool:
        try:
            while (got := self._reader.read()) is not None:
                self._answered(*got)
        except BlockingIOError:
            return False
        except Violation as violation:
            self.fail(DriverError(errno.EPROTO, f"the back-end broke the protocol: {violation}"))
        except OSError as error:
            self.fail(DriverError(errno.ECONNRESET, f"the back-end is gone: {error.strerror}"))
        else:
            self.fail(DriverError(errno.ECONNRESET, "the back-end closed the connection"))
        return False

    def _answered(self, data: bytes, fds: list[int]) -> None:
        try:
            message = codec.decode(data)
            if isinstance(message, codec.Malformed):
                raise Violation(message.name, message.detail)
            if not message.reply:
                raise Violation("question-unasked", f"{message.request.name} on the front-end's own socket")
            with self._lock:
                if not self._questions or self._questions[0].request is not message.request:
                    wanted = self._questions[0].request.name if self._questions else "nothing"
                    raise Violation("answer-unasked", f"{message.request.name}, where {wanted} was asked")
                if len(fds) > (message.request in ANSWERS_WITH_FD):
                    raise Violation("descriptor-count", f"{len(fds)} with the answer to {message.request.name}")
                question = self._questions.popleft()
        except Violation:
            _close(fds)
            raise
        question.then((message.payload, fds))

    # What the back-end says by itself.

    def open_channel(self) -> None:
        """Give the back-end a socket of its own, and listen. DriverError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            ours.setblocking(False)
            self._channel, self._channel_reader = ours, wire.Reader(ours)
            self._channel_key = self._loop.key(self._channel_readable, 0)
            self._loop.scheduler.add_fd(ours.fileno(), self._channel_key)
            self.tell(Request.SET_BACKEND_REQ_FD, None, [theirs.fileno()])

    def _channel_readable(self) -> bool:
        reader, channel = self._channel_reader, self._channel
        if reader is None or channel is None or self._lost is not None:
            return False
        try:
            while (got := reader.read()) is not None:
                self._heard(channel, *got)
        except BlockingIOError:
            return False
        except Violation as violation:
            self.fail(DriverError(errno.EPROTO, f"the back-end broke its channel: {violation}"))
        except OSError as error:
            self.fail(DriverError(errno.ECONNRESET, f"the back-end's channel broke: {error.strerror}"))
        else:
            # It has no more to say: what it says on the other socket decides whether it is there.
            self._loop.scheduler.remove_fd(channel.fileno())
        return False

    def _heard(self, channel: socket.socket, data: bytes, fds: list[int]) -> None:
        _close(fds)
        message = codec.decode(data, backend=True)
        if isinstance(message, codec.Malformed):
            raise Violation(message.name, message.detail)
        request = message.request
        assert isinstance(request, BackendRequest)
        if message.reply:
            raise Violation("answer-unasked", request.name)
        if fds:
            raise Violation("descriptor-count", f"{len(fds)} with {request.name}")
        self._said(request, message.payload)
        if message.need_reply and self.acknowledges:
            wire.send(channel, codec.encode(request, m.U64(0), reply=True))

    # The end.

    def fail(self, error: DriverError) -> None:
        """The link is of no more use: whoever waits for an answer gets `error`."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = error
            questions = list(self._questions)
            self._questions.clear()
        # Nobody reads any more: what is readable would only keep the loop awake.
        self._unwatch()
        for question in questions:
            question.failed(DriverError(error.errno, error.strerror))
        self._ended(error)

    def _unwatch(self) -> None:
        for sock in (self._sock, self._channel):
            if sock is not None and sock.fileno() >= 0:
                self._loop.scheduler.remove_fd(sock.fileno())

    def close(self) -> None:
        """Close both sockets; the loop's thread has ended or reads no more."""
        self._unwatch()
        self._reader.close()
        self._sock.close()
        if self._channel_reader is not None:
            self._channel_reader.close()
        if self._channel is not None:
            self._channel.close()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


def _drop(late: Future[Any]) -> None:
    """An answer that comes when nobody waits for it any more: what it brings is given back."""
    if late.exception() is None:
        _close(late.result()[1])
