"""The threads that serve: a small pool, shared by all buses of a process, and the actors whose turns it runs.

An actor is a device or a connector's peer. Whatever happens to it (a request, a message, a readable descriptor, a
callback somebody posted) is a *key* of the native scheduler, which hands ready keys to the pool's threads, most urgent
first, and never two keys of one actor at once. So an actor's code needs no lock, and a hung actor holds one thread;
for one that is held for long, the pool gets another, so that the others are still served.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from vbus import _core

log = logging.getLogger("vbus.pool")
T = TypeVar("T")

THREADS = 2
"""One that works and one that waits for what is next. More only take the interpreter from each other: four serve a
third less, and something urgent waits ten times as long beside bulk load (`vbus bench signal`).
"""
MAX_THREADS = 64
STUCK_SECONDS = 0.5
"""A turn that takes longer counts as stuck: the pool may grow by one thread to make up for it."""


class Pool:
    """Threads that run the turns of one scheduler."""

    def __init__(self) -> None:
        self.scheduler = _core.Scheduler()
        self.callbacks: dict[int, Callable[[], bool]] = {}
        self._lock = threading.Lock()
        self._users = 0
        self._threads: set[threading.Thread] = set()
        self._turns: dict[threading.Thread, float] = {}
        self._supervisor: threading.Thread | None = None
        self._stopping = threading.Event()
        self._timers: list[tuple[float, int]] = []
        self._timed: dict[int, float] = {}
        """The next time of each key that has one: a driver's kicks must not add up."""
        self._timer_set = threading.Condition()
        self._poison = [self._make_poison() for _ in range(THREADS)]

    def _make_poison(self) -> int:
        """A key of an actor of its own whose turn does nothing: it makes one waiting thread look around."""
        return self.scheduler.key(self.scheduler.actor(), 0)

    def acquire(self) -> None:
        """One more user; the first starts the threads."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._stopping = threading.Event()
            for _ in range(THREADS):
                self._start_thread()
            self._supervisor = threading.Thread(
                target=self._supervise, args=(self._stopping,), name="vbus-supervisor", daemon=True
            )
            self._supervisor.start()

    def release(self) -> None:
        """One user fewer; the last stops the threads, and waits for those that are not stuck."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            self._stopping.set()
            with self._timer_set:
                self._timer_set.notify()
            threads = list(self._threads)
            supervisor = self._supervisor
        deadline = time.monotonic() + 1.0
        while any(t.is_alive() for t in threads if not self._stuck(t)) and time.monotonic() < deadline:
            for key in self._poison:
                self.scheduler.mark(key)
            time.sleep(0.001)
        if supervisor is not None and supervisor is not threading.current_thread():
            supervisor.join(timeout=1.0)

    def _stuck(self, thread: threading.Thread) -> bool:
        began = self._turns.get(thread)
        return began is not None and time.monotonic() - began > STUCK_SECONDS

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, args=(self._stopping,), name="vbus-worker", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _work(self, stopping: threading.Event) -> None:
        me = threading.current_thread()
        done: tuple[int, int, bool] | None = None
        try:
            while not stopping.is_set() and len(self._threads) <= THREADS + self._stuck_count():
                turn = self.scheduler.next(done=done)
                if turn is None:
                    return
                done = *turn, self._take_turn(me, turn[1])
            if done is not None:
                self.scheduler.done(done[0], done[1], again=done[2])
        finally:
            with self._lock:
                self._threads.discard(me)

    def _take_turn(self, me: threading.Thread, key: int) -> bool:
        """Call back; whether the key wants another turn."""
        self._turns[me] = time.monotonic()
        try:
            callback = self.callbacks.get(key)
            return callback() if callback is not None else False
        except Exception:
            log.exception("a turn failed")
            return False
        finally:
            self._turns.pop(me, None)

    def _stuck_count(self) -> int:
        return sum(self._stuck(thread) for thread in list(self._turns))

    def mark_later(self, key: int, delay: float) -> None:
        """Make a key ready in `delay` seconds, or a little later."""
        due = time.monotonic() + delay
        with self._timer_set:
            if self._timed.get(key, float("inf")) <= due:
                return
            self._timed[key] = due
            heapq.heappush(self._timers, (due, key))
            if self._timers[0][1] == key:
                self._timer_set.notify()

    def _due(self, deadline: float) -> list[int]:
        """Wait for the next timer, or until `deadline`; the keys whose time has come."""
        with self._timer_set:
            until = min(deadline, self._timers[0][0]) if self._timers else deadline
            delay = until - time.monotonic()
            if delay > 0 and not self._stopping.is_set():
                self._timer_set.wait(delay)
            now = time.monotonic()
            keys = []
            while self._timers and self._timers[0][0] <= now:
                due, key = heapq.heappop(self._timers)
                if self._timed.get(key) == due:
                    del self._timed[key]
                keys.append(key)
            return keys

    def _supervise(self, stopping: threading.Event) -> None:
        check = time.monotonic() + STUCK_SECONDS
        while not stopping.is_set():
            for key in self._due(check):
                self.scheduler.mark(key)
            if time.monotonic() < check:
                continue
            check = time.monotonic() + STUCK_SECONDS
            with self._lock:
                stuck = self._stuck_count()
                missing = min(THREADS - (len(self._threads) - stuck), MAX_THREADS - len(self._threads))
                if missing > 0 and not stopping.is_set():
                    # One that takes its time is no news as long as others were served meanwhile.
                    level = logging.WARNING if missing == THREADS else logging.INFO
                    log.log(level, "%d handlers are stuck; more threads serve the others", stuck)
                    for _ in range(missing):
                        self._start_thread()


class Actor:
    """One thing at a time for a device or a peer: keys whose callbacks never overlap, and a mailbox."""

    def __init__(self, pool: Pool, name: str) -> None:
        self.pool = pool
        self.name = name
        self.id = pool.scheduler.actor()
        self._mail: deque[Callable[[], object]] = deque()
        self._watched: dict[int, int] = {}
        self._keys: set[int] = set()
        self._running: int | None = None
        self.closed = False
        self._mail_key = self.key(self._read_mail, 0)

    def key(self, callback: Callable[[], bool], priority: int) -> int:
        """A key whose turns call back; a callback that gives True wants another turn."""
        key = self.pool.scheduler.key(self.id, priority)
        self._keys.add(key)

        def turn() -> bool:
            self._running = threading.get_ident()
            try:
                return callback()
            finally:
                self._running = None

        self.pool.callbacks[key] = turn
        return key

    def drop_key(self, key: int) -> None:
        """Forget a key."""
        self.pool.scheduler.drop_key(key)
        self.pool.callbacks.pop(key, None)
        self._keys.discard(key)

    def mark(self, key: int) -> None:
        """Make a key ready."""
        self.pool.scheduler.mark(key)

    def mark_later(self, key: int, delay: float) -> None:
        """Make a key ready in `delay` seconds, or a little later."""
        self.pool.mark_later(key, delay)

    def is_something_more_urgent(self, priority: int) -> bool:
        """Whether a key more urgent than `priority` waits for a thread, or for this actor's turn to end."""
        return priority > 0 and self.pool.scheduler.urgent(self.id, priority)

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is in a turn of this actor."""
        return self._running == threading.get_ident()

    def post(self, callback: Callable[[], object]) -> None:
        """Run `callback` in a turn of its own, in the order of posting, from any thread; never, once closed."""
        if self.closed:
            return
        self._mail.append(callback)
        self.pool.scheduler.mark(self._mail_key)

    def call(self, callback: Callable[[], T], timeout: float | None) -> T:
        """Run `callback` in a turn and give its result. TimeoutError when the actor is stuck for `timeout` seconds."""
        if self.is_here:
            return callback()
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(callback())
            except BaseException as error:
                future.set_exception(error)

        self.post(run)
        try:
            return future.result(timeout)
        finally:
            future.cancel()

    def _read_mail(self) -> bool:
        try:
            callback = self._mail.popleft()
        except IndexError:
            return False
        try:
            callback()
        except Exception:
            log.exception("%s: a posted call failed", self.name)
        return bool(self._mail)

    def watch(self, fd: int, callback: Callable[[], None], priority: int = 0) -> None:
        """Call back whenever `fd` is readable or hung up."""
        if fd in self._watched or self.closed:
            return

        def turn() -> bool:
            callback()
            return False

        key = self.key(turn, priority)
        self._watched[fd] = key
        self.pool.scheduler.add_fd(fd, key)

    def unwatch(self, fd: int) -> None:
        """Stop watching; call it before `fd` is closed."""
        key = self._watched.pop(fd, None)
        if key is not None:
            self.pool.scheduler.remove_fd(fd)
            self.drop_key(key)

    def close(self) -> None:
        """No more turns. One that is running goes on to its end."""
        self.closed = True
        for fd in list(self._watched):
            self.unwatch(fd)
        for key in list(self._keys):
            self.drop_key(key)
        self._mail.clear()
        self.pool.scheduler.drop_actor(self.id)


_pool: Pool | None = None
_pool_lock = threading.Lock()


def shared_pool() -> Pool:
    """The pool of this process."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = Pool()
        return _pool
