"""What a guest connector is: the driver side's end of one environment.

It carries messages, tells of their answers by token, and sets queues up; the remote bus above it knows nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vbus import _core, msg
from vbus.channel import Mirror
from vbus.errors import DriverError, Violation
from vbus.proxy.channels import RemoteChannels
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.shmem.arena import Arena

if TYPE_CHECKING:
    from vbus.proxy.remote import Remote, RemoteDevice

R = TypeVar("R")
LEAST_URGENT = 7


def _checked(wanted: type[R], on_answer: Callable[[R], None], result: object) -> None:
    """Call back with an answer of the kind that was asked for; `call` says what is wrong with another."""
    if isinstance(result, wanted):
        on_answer(result)


@dataclass(frozen=True)
class Question(Generic[R]):
    """What the bus was asked, until its answer is here."""

    body: msg.Body
    answer: type[R]
    dev_num: int
    token: int
    future: Future[Any]


class GuestConnector(ABC):
    """A connected link to a bus. `remote` is told of events and of the end."""

    def __init__(self, loop: Loop, timeout: float, arena: Arena | None = None) -> None:
        self.loop = loop
        self.timeout = timeout
        self.remote: Remote | None = None
        self.arena = arena if arena is not None else Arena()
        self.arena_lock = threading.Lock()
        self.max_request = 0
        self._tokens = itertools.cycle(range(1, 0x10000))
        self._calls: dict[int, tuple[Future[Any], Callable[[Any], None] | None]] = {}
        self._call_lock = threading.Lock()
        self.lost: DriverError | None = None
        self.max_message = 0
        """Bytes of a message that both sides take; known when the bus has introduced itself."""
        self.channels = RemoteChannels(self)

    # Messages.

    @abstractmethod
    def transmit(self, message: bytes, priority: int) -> None:
        """Put one message on the link, before less urgent ones if it can. Never blocks; OSError or Violation."""

    def send(self, body: msg.Body, dev_num: int = 0, token: int = 0, priority: int = 0) -> None:
        """Send one message that wants no answer."""
        self.transmit(msg.encode(msg.Frame(body=body, dev_num=dev_num, token=token)), priority)

    def call(
        self,
        body: msg.Body,
        answer: type[R],
        dev_num: int = 0,
        timeout: float | None = None,
        on_answer: Callable[[R], None] | None = None,
        channel_priority: int | None = None,
    ) -> R:
        """Ask, and wait for the answer. DriverError: what the bus refused, ETIMEDOUT, ECONNRESET, EPROTO.

        `on_answer` is called with it on the loop's thread, before anything else that the bus says is looked at. With
        `channel_priority` the question travels behind what was said on the channels of this priority; one about a
        device behind everything that was sent to its queues: a reset must not overtake requests from before it.
        """
        question = self.ask(body, answer, dev_num, on_answer, channel_priority)
        return self.answer_to(question, timeout)

    def ask(
        self,
        body: msg.Body,
        answer: type[R],
        dev_num: int = 0,
        on_answer: Callable[[R], None] | None = None,
        channel_priority: int | None = None,
    ) -> Question[R]:
        """As `call`, and do not wait: `answer_to` does. Who asks much waits now and then: a link holds only so much.

        DriverError: ECONNRESET, EPROTO.
        """
        if self.loop.is_here:
            raise RuntimeError("this thread answers the bus and must not wait for it; use a hook")
        future: Future[Any] = Future()
        with self._call_lock:
            if self.lost is not None:
                raise DriverError(self.lost.errno or errno.ECONNRESET, self.lost.strerror)
            token = next(t for t in self._tokens if t not in self._calls)
            self._calls[token] = future, None if on_answer is None else partial(_checked, answer, on_answer)
        question = Question(body, answer, dev_num, token, future)
        try:
            message = msg.encode(msg.Frame(body=body, dev_num=dev_num, token=token))
            if channel_priority is None or not self.transmit_on_channel(channel_priority, message):
                self.transmit(message, LEAST_URGENT if dev_num else 0)
        except Violation as violation:
            self._forget(token)
            raise DriverError(errno.EPROTO, str(violation)) from None
        except BaseException:
            self._forget(token)
            raise
        return question

    def answer_to(self, question: Question[R], timeout: float | None = None) -> R:
        """Wait for the answer. DriverError, as `call`."""
        limit = self.timeout if timeout is None else timeout
        asked = type(question.body).__name__
        try:
            result = question.future.result(limit)
        except FutureTimeoutError:
            raise DriverError(
                errno.ETIMEDOUT, f"no answer to {asked} of device {question.dev_num} within {limit} s"
            ) from None
        except Violation as violation:
            raise DriverError(errno.EPROTO, str(violation)) from None
        finally:
            self._forget(question.token)
        if not isinstance(result, question.answer):
            raise DriverError(errno.EPROTO, f"{type(result).__name__} came as the answer to {asked}")
        return result

    def _forget(self, token: int) -> None:
        with self._call_lock:
            self._calls.pop(token, None)

    def received(self, data: bytes) -> None:
        """Handle one message of the bus, on the loop's thread. Violation: malformed-message."""
        frame = msg.decode(data)
        if isinstance(frame, msg.Malformed):
            raise Violation("malformed-message", str(frame))
        body = frame.body
        if isinstance(body, msg.Error) and not frame.token:
            # No request bears token 0: the bus does not let this side in at all.
            self.end(DriverError(body.errno, body.text))
        elif isinstance(body, msg.Error):
            self._answer(frame.token, error=DriverError(body.errno, body.text))
        elif isinstance(body, msg.Ping):
            self.send(msg.PingResponse(body.data), token=frame.token)
        elif isinstance(body, msg.EventDevice):
            if self.remote is not None:
                self.remote.device_event(body.dev_num, body.state)
        elif isinstance(body, msg.EventConfig):
            if self.remote is not None:
                self.remote.config_event(frame.dev_num, body)
        elif not self.data_received(frame) and not self.channels.heard(body):
            self._answer(frame.token, result=body)

    def received_on_channel(self, data: bytes) -> None:
        """Handle a message that came where only channels speak. Violation."""
        frame = msg.decode(data)
        if isinstance(frame, msg.Malformed):
            raise Violation("malformed-message", str(frame))
        if not self.channels.heard(frame.body):
            raise Violation("not-on-channels", f"{type(frame.body).__name__} in a ring of channels")

    @abstractmethod
    def transmit_on_channel(self, priority: int, message: bytes) -> bool:
        """Send what is said on a channel; False when there is no room now: `channels.room` is called when there is."""

    @abstractmethod
    def has_room(self) -> bool:
        """Whether the bus has read most of what was sent."""

    @abstractmethod
    def map_region(self, offset: int, size: int) -> memoryview | Mirror:
        """A channel's region. Violation: channel-region."""

    def data_received(self, frame: msg.Frame) -> bool:
        """Handle a message of the data path, where the link has one; False when it is none."""
        return False

    def _answer(self, token: int, *, result: Any = None, error: DriverError | None = None) -> None:
        with self._call_lock:
            future, on_answer = self._calls.pop(token, (None, None))
        # An answer that nobody waits for any more: the call timed out.
        if future is None:
            return
        if error is not None:
            future.set_exception(error)
            return
        try:
            if on_answer is not None:
                on_answer(result)
        except Violation as violation:
            future.set_exception(violation)
            raise
        future.set_result(result)

    def end(self, error: DriverError) -> None:
        """The link is gone: every call and every request ends with `error`."""
        with self._call_lock:
            if self.lost is not None:
                return
            self.lost = error
            calls = [future for future, _ in self._calls.values()]
            self._calls.clear()
        for call in calls:
            with contextlib.suppress(Exception):
                call.set_exception(DriverError(error.errno or errno.ECONNRESET, error.strerror))
        self.channels.end(error.strerror)
        if self.remote is not None:
            self.remote.link_lost(error)

    @abstractmethod
    def accept(self, hello: msg.HelloResponse) -> None:
        """The bus has introduced itself: keep to its limits, and show it what it must see. DriverError."""

    # Queues.

    @abstractmethod
    def prepare(self, device: RemoteDevice) -> None:
        """After FEATURES_OK, before any queue of this device is set up."""

    @abstractmethod
    def open_queue(self, device: RemoteDevice, index: int, size: int) -> RemoteQueue:
        """Make a ring and tell the bus about it. DriverError."""

    def stop_queue(self, device: RemoteDevice, queue: RemoteQueue) -> None:
        """The queue is to be reset: send nothing more of it. DriverError EOPNOTSUPP where queues cannot be."""
        raise DriverError(errno.EOPNOTSUPP, f"{device.name}: one queue cannot be reset here")

    def renew_queue(self, device: RemoteDevice, queue: RemoteQueue, size: int) -> None:
        """The queue was reset: give it a new ring in place of its own, and tell the bus about it. DriverError."""
        raise NotImplementedError

    @contextlib.contextmanager
    def lent_bell(self, device: RemoteDevice, index: int) -> Iterator[_core.Doorbell | None]:
        """What the bus rings for this queue, for another to listen to than the loop; None where there is none."""
        yield None

    @abstractmethod
    def close_queues(self, device: RemoteDevice) -> None:
        """The device was reset, or is gone: forget its rings and give their memory back."""

    def counters(self, device: RemoteDevice, index: int) -> tuple[int, int, int]:
        """Events signalled, events sent, doorbells rung towards the device."""
        return (0, 0, 0)

    @abstractmethod
    def close(self) -> None:
        """Part from the bus and give everything back."""
