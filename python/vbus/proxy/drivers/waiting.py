"""Futures as drivers use them: waited for with a limit, converted, gathered, and drawn ahead in order."""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_futures
from typing import TypeVar

from vbus.errors import DriverError

T = TypeVar("T")
R = TypeVar("R")


def wait(future: Future[T], timeout: float | None, what: str) -> T:
    """The future's result. DriverError: what the request failed with, or ETIMEDOUT after `timeout` seconds."""
    if not wait_futures([future], timeout).done:
        raise DriverError(errno.ETIMEDOUT, f"no answer to {what} within {timeout} s")
    return future.result()


def in_order(futures: Iterable[Future[T]], window: int, timeout: float | None, what: str) -> Iterator[T]:
    """The results of `futures`, in order, with at most `window` of them drawn and not finished. DriverError as `wait`.

    After a request failed no more are drawn, and the error is raised only when none of those drawn is under way any
    more: so that nothing happens behind the back of a caller who has been told that it is over.
    """
    ahead: deque[Future[T]] = deque()
    try:
        for future in futures:
            ahead.append(future)
            if len(ahead) >= window:
                yield wait(ahead.popleft(), timeout, what)
        while ahead:
            yield wait(ahead.popleft(), timeout, what)
    except DriverError as error:
        if error.errno != errno.ETIMEDOUT:
            wait_futures(ahead, timeout)
        raise


def then(future: Future[T], convert: Callable[[T], R]) -> Future[R]:
    """A future of what `convert` makes of the result; what it raises is the new future's error."""
    converted: Future[R] = Future()
    converted.set_running_or_notify_cancel()

    def done(finished: Future[T]) -> None:
        try:
            converted.set_result(convert(finished.result()))
        except Exception as error:
            converted.set_exception(error)

    future.add_done_callback(done)
    return converted


def gather(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """A future of all results, in order. It ends when all have ended; if any failed, with the first of their errors."""
    gathered: Future[list[T]] = Future()
    gathered.set_running_or_notify_cancel()
    lock = threading.Lock()
    missing = len(futures)

    def done(_: Future[T]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        try:
            gathered.set_result([future.result() for future in futures])
        except Exception as error:
            gathered.set_exception(error)

    if not futures:
        gathered.set_result([])
    for future in futures:
        future.add_done_callback(done)
    return gathered
