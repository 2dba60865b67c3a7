"""Limits that an operator sets: how much a device serves, and how much a member of the bus may use.

An account belongs to a device, or to a member (a user, a group, a name in a certificate) whose drivers all share it.
Before a queue gives requests to its device, every account that is concerned is asked; when one says no, the queue gets
its turn again as soon as there may be room. Nothing is refused or lost: requests wait in the driver's own ring.

Rates are token buckets: `rate` a second, up to `burst` at once. A request may take more than there is; then the bucket
is in debt, and the next waits longer. So one request is never too large for a limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from vbus import hints
from vbus.errors import NoSuchNameError, UsageError
from vbus.units import parse_size

BURST_SECONDS = 0.1
"""What may come at once by default, as a time at the limit's rate."""
DEVICE_LIMITS: Mapping[str, str] = {
    "iops": "requests a second",
    "iops_burst": "requests at once, beyond the rate",
    "bps": "bytes a second, read and written",
    "bps_burst": "bytes at once, beyond the rate",
    "outstanding": "requests that the device has and has not answered",
}
MEMBER_LIMITS: Mapping[str, str] = {
    **DEVICE_LIMITS,
    "channels": "event channels that are open",
    "memory": "bytes of memory that are mapped",
}
SIZES = ("bps", "bps_burst", "memory")
"""Limits that may be written as sizes: "10 MiB"."""


def parse_limit(name: str, text: str, known: Mapping[str, str]) -> int | None:
    """The value that an operator typed for a limit of this name; None for "none". NoSuchNameError, UsageError."""
    if name not in known:
        raise NoSuchNameError(hints.no_such("limit", name, known, "what is served here"))
    if text.strip().lower() == "none":
        return None
    if name in SIZES:
        value = parse_size(text, f"limit.{name}")
    else:
        if not text.strip().lstrip("-").isdecimal():
            raise UsageError(f"limit.{name}: {text!r} is not a whole number, nor none")
        value = int(text.strip()[:20])
    if value < 1:
        raise UsageError(f"limit.{name}: {text} would stop everything: from 1 on, or none to take the limit away")
    return value


class Bucket:
    """Tokens that come back at `rate` a second, up to `burst`. With its account's lock held."""

    def __init__(self, rate: int, burst: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.burst = burst if burst is not None else max(1, int(rate * BURST_SECONDS))
        self._clock = clock
        self._tokens = float(self.burst)
        self._then = clock()

    def refresh(self) -> float:
        """The tokens that are there now; below zero is debt."""
        now = self._clock()
        self._tokens = min(float(self.burst), self._tokens + (now - self._then) * self.rate)
        self._then = now
        return self._tokens

    def take(self, amount: int) -> None:
        """Take tokens, as many as it needs, whether there are or not."""
        self._tokens -= amount

    def wait(self, wanted: float) -> float:
        """Seconds until there are `wanted` tokens."""
        return max(0.0, (wanted - self._tokens) / self.rate)


class Account:
    """What one device or one member uses, and may use."""

    def __init__(
        self, name: str, known: Mapping[str, str] = MEMBER_LIMITS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.limits: dict[str, int] = {}
        self.channels = 0
        self.memory = 0
        self.held = 0
        """How often a queue had to wait."""
        self._known = known
        self._clock = clock
        self._iops: Bucket | None = None
        self._bps: Bucket | None = None
        self._lock = threading.Lock()

    def set(self, name: str, text: str) -> int | None:
        """Set a limit to what an operator typed, or take it away ("none"). NoSuchNameError, UsageError."""
        value = parse_limit(name, text, self._known)
        with self._lock:
            if value is None:
                self.limits.pop(name, None)
            else:
                self.limits[name] = value
            iops, bps = self.limits.get("iops"), self.limits.get("bps")
            self._iops = Bucket(iops, self.limits.get("iops_burst"), self._clock) if iops is not None else None
            self._bps = Bucket(bps, self.limits.get("bps_burst"), self._clock) if bps is not None else None
        return value

    def admit(self, wanted: int, outstanding: Callable[[], int]) -> tuple[int, float]:
        """How many of `wanted` requests may come now, and when none, the seconds until it is worth asking again.

        `outstanding` gives how many are under way. A wait of 0 is one for a request to end.
        """
        with self._lock:
            if not self.limits:
                return wanted, 0.0
            if self._iops is not None:
                tokens = self._iops.refresh()
                if tokens < 1:
                    self.held += 1
                    return 0, self._iops.wait(1)
                wanted = min(wanted, int(tokens))
            if self._bps is not None:
                if self._bps.refresh() <= 0:
                    self.held += 1
                    return 0, self._bps.wait(1)
                # How large requests are is known when they are taken: one at a time, so that the debt is one's.
                wanted = min(wanted, 1)
            limit = self.limits.get("outstanding")
        if limit is not None:
            free = limit - outstanding()
            if free <= 0:
                self.held += 1
                return 0, 0.0
            wanted = min(wanted, free)
        return wanted, 0.0

    def charge(self, requests: int, size: int) -> None:
        """Requests came, of so many bytes together."""
        if not self.limits:
            return
        with self._lock:
            if self._iops is not None:
                self._iops.take(requests)
            if self._bps is not None:
                self._bps.take(size)

    def reserve(self, what: str, amount: int) -> bool:
        """Take `amount` more of "channels" or "memory"; False when that is beyond the limit."""
        with self._lock:
            limit = self.limits.get(what)
            now: int = getattr(self, what)
            if limit is not None and now + amount > limit:
                return False
            setattr(self, what, now + amount)
            return True

    def give_back(self, what: str, amount: int) -> None:
        """Use `amount` less of "channels" or "memory"."""
        with self._lock:
            setattr(self, what, getattr(self, what) - amount)


def reserve_all(accounts: Iterable[Account], what: str, amount: int) -> Account | None:
    """Take `amount` of "channels" or "memory" of every account; gives the one that refuses, and then takes nothing."""
    taken: list[Account] = []
    for account in accounts:
        if not account.reserve(what, amount):
            for other in taken:
                other.give_back(what, amount)
            return account
        taken.append(account)
    return None


class Gate:
    """What a slot's queues ask before they take requests: the device's account, and those of its driver."""

    def __init__(self, device: Account) -> None:
        self.device = device
        self.members: list[Account] = []
        """Of the driver that has the device."""

    def admit(self, wanted: int, outstanding: Callable[[Account], int]) -> tuple[int, float]:
        """How many of `wanted` requests may come now, and when none, the seconds until it is worth asking again."""
        for account in (self.device, *self.members):
            if account.limits:
                wanted, wait = account.admit(wanted, lambda account=account: outstanding(account))  # type: ignore[misc]
                if wanted == 0:
                    return 0, wait
        return wanted, 0.0

    def charge(self, requests: int, size: int) -> None:
        """Requests came, of so many bytes together."""
        for account in (self.device, *self.members):
            account.charge(requests, size)

    @property
    def is_open(self) -> bool:
        """Whether nobody has set a limit."""
        return not self.device.limits and not any(account.limits for account in self.members)
