"""A slot: the place on a bus where a device is, and the device's virtio state towards its driver.

A connector turns whatever its environment says into the verbs of this class (info, features, config, status, queues)
and never sees the device; the device never sees the connector. Everything here is checked as if the driver were
hostile: what it sends wrong becomes a refusal or a violation of this slot alone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from vbus import _core
from vbus.bus.device import Device, has_state, is_async
from vbus.bus.limits import DEVICE_LIMITS, Account, Gate
from vbus.bus.pool import Actor
from vbus.bus.queue import Queue
from vbus.bus.runner import BUDGET, AsyncRunner, SyncRunner
from vbus.bus.workers import Engine
from vbus.errors import Error, Violation
from vbus.virtio import Status, features

if TYPE_CHECKING:
    from vbus.bus.bus import Bus

log = logging.getLogger("vbus.bus")

RING_FEATURES = (
    features.VERSION_1,
    features.RING_INDIRECT_DESC,
    features.RING_EVENT_IDX,
    features.RING_PACKED,
    features.RING_RESET,
)
"""Bits that the rings offer for every device (section 6); beside them IN_ORDER, for most."""

STOP_LOOK = 0.001
"""Seconds between two looks at a queue that is to stop when nothing is in flight."""
PULLED_SECONDS = 5.0
"""How long a device may keep buffers of a pull queue that is to stop."""
LOOK_AGAIN = 1.0
"""Seconds, at most, between two looks of a queue that waits for a limit."""
SETTLE_SECONDS = 3.0
"""How long whoever stops a queue waits for what an engine has under way: less than a driver waits for its answer."""
LATE_SECONDS = 0.5
"""Seconds between two looks at what should have ended by then."""
HISTORY = 16
"""How many reasons a slot or a connector remembers."""


SignalCounters = tuple[tuple[int, int, int], tuple[int, int, int]]
"""(signalled, sent, rung) towards the device, and towards the driver."""


class InUseError(Error):
    """Another driver has the device: the first to leave status 0 has it until it resets it or goes."""


class RefusedError(Error):
    """The driver asked for something that this device's state or shape does not allow."""


@dataclass(frozen=True)
class Ring:
    """Where a queue's ring is, in driver addresses, and how many entries it has.

    `desc`, `driver`, `device`: descriptor table, available and used ring, or what a packed ring has instead. `resume`:
    where to go on in a ring that was in use before, as the core's `next` says it. `inflight`: the mapping, and the
    offset in it, where requests under way are kept for a successor of this process. `paused`: nothing is taken off it
    until `pause_queue` says so.
    """

    size: int = 0
    desc: int = 0
    driver: int = 0
    device: int = 0
    resume: int | None = None
    inflight: tuple[_core.Mapping, int] | None = None
    paused: bool = False


class Attachment(ABC):
    """A driver's side as a slot sees it: made by a connector for each peer."""

    label: str
    """Who this is, for people: connector, process, user."""
    connector_name: str
    memory: _core.Memory
    """Where the driver's buffers are."""
    accounts: list[Account]
    """Of the members that this is."""

    @abstractmethod
    def signal(self, slot: Slot, queue: Queue) -> _core.Signal:
        """How used buffers of this queue are announced."""

    @abstractmethod
    def config_changed(self, slot: Slot) -> None:
        """Announce that config space or status changed (section 2.5, 2.1.2). Never blocks."""

    def queue_failed(self, slot: Slot, queue: Queue) -> None:  # noqa: B027 - most environments have no word for it
        """A queue stopped because of a violation, or a failure of the device. From any thread."""

    def refuses(self, slot: Slot, field: str) -> str | None:
        """Why a change of this field of config space could not reach the driver; None when it can."""
        return None

    def queue_reset(self, slot: Slot, queue: Queue) -> None:  # noqa: B027 - most have nothing of a queue's own
        """One queue was reset, and is stopped. In the device's turn."""

    @abstractmethod
    def slot_reset(self, slot: Slot) -> None:
        """The slot was reset: forget its signals. Called with the slot's queues stopped."""

    @abstractmethod
    def counters(self, slot: Slot, queue: Queue) -> SignalCounters:
        """(signalled, sent, rung) towards the device, as far as it can be known here, and towards the driver."""


class Slot:
    """A device's address, name and virtio state on one bus."""

    def __init__(
        self,
        bus: Bus,
        device: Device,
        number: int,
        name: str,
        uuid: UUID,
        *,
        type_name: str,
        priority: int,
        queue_priorities: Mapping[str, int],
        mask: int,
    ) -> None:
        self.bus = bus
        self.device = device
        self.number = number
        self.name = name
        self.uuid = uuid
        self.type_name = type_name
        self.priority = priority
        self.queues = device._queues
        self.first_source = 0
        self.status = Status(0)
        self.negotiated = 0
        self.mask = mask
        self.generation = 1
        self.config_generation = 0
        self.owner: Attachment | None = None
        self.present = True
        self.draining = False
        self.violations: Counter[str] = Counter()
        self.reasons: deque[tuple[float, str]] = deque(maxlen=HISTORY)
        self._told: set[str] = set()
        self._rings: dict[int, Ring] = {}
        self.kicks = [0] * len(self.queues)
        """How often each queue's own doorbell was rung."""
        self._lock = threading.RLock()
        self.gate = Gate(Account(name, DEVICE_LIMITS))
        self._held: set[Queue] = set()
        """Queues that wait for a request to end, because of a limit on outstanding ones."""
        ring = sum(1 << bit for bit in RING_FEATURES) | int(device.in_order) << features.IN_ORDER
        self.available = ring | device.features.mask(device.offered_features())
        self.actor = Actor(bus.pool, f"device {name}")
        self.runner = AsyncRunner(self, bus.loop.starts()) if is_async(device) else SyncRunner(self)
        self._wanted_priorities = dict(queue_priorities)
        self.queue_priorities = [queue_priorities.get(queue.name, priority) for queue in self.queues]
        """From 0, the most urgent, to 7: the device's, but for queues that have one of their own."""
        self._keys = [self.actor.key(self._turn_of(q), self.queue_priorities[q.index]) for q in self.queues]
        self._bells: dict[int, _core.Doorbell] = {}
        self._engines: list[Engine] = []
        self._own_worker: _core.Worker | None = None
        """What runs those of them that may wait."""
        self._tasks: dict[int, _core.Task] = {}
        """Who serves a queue natively, by its index."""
        self._native = False
        self._yielded: list[Queue] = []
        """Queues that an engine serves no more, until the model has taken over."""
        self._holds = 0
        self._outbox_key: int | None = None
        self._late_key: int | None = None
        """There while a reset waits for an engine that has something under way for too long."""
        self._past: list[SignalCounters] = [((0, 0, 0), (0, 0, 0)) for _ in self.queues]

    def __repr__(self) -> str:
        return f"<Slot {self.number} {self.name}>"

    # Turns.

    def is_something_more_urgent(self, queue: Queue) -> bool:
        """Whether a turn that serves this queue should make room: for another device, or another queue of this one."""
        return self.actor.is_something_more_urgent(self.queue_priorities[queue.index])

    def _turn_of(self, queue: Queue) -> Callable[[], bool]:
        def turn() -> bool:
            if queue.core.native:
                return False
            self._take_over()
            bell = self._bells.get(queue.index)
            if bell is not None:
                self.kicks[queue.index] += bell.drain()
            return queue.core.running and self.runner.turn(queue, finish=self.draining or queue.paused)

        return turn

    def key(self, queue: Queue) -> int:
        """The scheduler's key whose turn serves this queue: what a connector's notification marks."""
        return self._keys[queue.index]

    def mark(self, queue: Queue) -> None:
        """Give the queue a turn."""
        self.actor.mark(self._keys[queue.index])

    def attach_doorbell(self, queue: Queue, bell: _core.Doorbell) -> None:
        """Serve the queue whenever `bell` rings (direct notification)."""
        with self._lock:
            self.detach_doorbell(queue)
            self._bells[queue.index] = bell
            self._listen(queue, bell)

    def detach_doorbell(self, queue: Queue) -> None:
        """Stop listening to the queue's doorbell."""
        with self._lock:
            bell = self._bells.get(queue.index)
            if bell is not None:
                self._ignore(queue, bell)
                self.count_kicks(queue)
                del self._bells[queue.index]

    def _listen(self, queue: Queue, bell: _core.Doorbell) -> None:
        if queue.core.native:
            self._tasks[queue.index].listen(bell)
        else:
            self.actor.pool.scheduler.add_fd(bell.fileno(), self.key(queue))

    def _ignore(self, queue: Queue, bell: _core.Doorbell) -> None:
        if queue.core.native:
            self._tasks[queue.index].ignore(bell)
        else:
            self.actor.pool.scheduler.remove_fd(bell.fileno())

    def count_kicks(self, queue: Queue) -> int:
        """How often the queue's own doorbell was rung. A worker hears it and does not count."""
        with self._lock:
            bell = self._bells.get(queue.index)
            rung = bell.drain() if bell is not None and queue.core.native else 0
            self.kicks[queue.index] += rung
        if rung:
            # It may not have been heard yet.
            self.mark(queue)
        return self.kicks[queue.index]

    # Engines.

    def engine_signal(self) -> _core.Signal:
        """By what an engine of this device tells that it has something for the device."""
        if self._outbox_key is None:
            self._outbox_key = self.actor.key(self._read_outboxes, self.priority)
        return _core.Signal.local(self.actor.pool.scheduler, self._outbox_key)

    def call_signal(self, callback: Callable[[], None]) -> _core.Signal:
        """What calls back in a turn of the device when it is notified, from any thread, with or without Python."""

        def turn() -> bool:
            self.runner.call(callback)
            return False

        return _core.Signal.local(self.actor.pool.scheduler, self.actor.key(turn, self.priority))

    def adopt(self, engines: Sequence[Engine]) -> None:
        """Have workers run these engines for queues of this device. In the turn that plugs it. UsageError."""
        for engine in engines:
            priority = min(self.queue_priorities[q.index] for q in engine.queues)
            try:
                if engine.may_wait:
                    self._own_worker = self._own_worker or self.bus.workers.start_own()
                    task = self._own_worker.add(engine.core, priority)
                else:
                    task = self.bus.workers.add(engine.core, priority)
            except Error:
                # A worker ends those that it has; of the rest, nothing may be held any more.
                for other in engines:
                    if other not in self._engines:
                        other.core.end()
                raise
            self._engines.append(engine)
            self._tasks.update({queue.index: task for queue in engine.queues})
        self._use_engines()

    @property
    def engine(self) -> str:
        """What serves its queues, and why it is not native where it could be."""
        if self._native:
            return "native"
        return f"python ({'limits are set' if self._engines else self.device.no_engine})"

    def _use_engines(self, *, allowed: bool = True) -> None:
        """Have queues served by engines, when there are any and no limits; or else all by the model's handlers.

        What is under way ends where it is.
        """
        changed = []
        with self._lock:
            # Looked at with the lock held: whoever sets limits comes here next, and sees what was chosen.
            native = allowed and bool(self._engines) and self.gate.is_open
            self._native = native
            for queue in (queue for engine in self._engines for queue in engine.queues):
                wanted = native and self.device.engine_serves(queue)
                if wanted == queue.core.native:
                    continue
                changed.append(queue)
                if not wanted:
                    # First: a turn that finds the queue its own finds this.
                    self._yielded.append(queue)
                bell = self._bells.get(queue.index)
                if bell is not None:
                    self._ignore(queue, bell)
                queue.core.native = wanted
                self._route(queue)
                if bell is not None:
                    self._listen(queue, bell)
        for queue in changed:
            self.mark(queue)

    def _take_over(self) -> None:
        """In a turn: let the model have what engines keep of queues that they serve no more."""
        if self._yielded:
            with self._lock:
                yielded, self._yielded = self._yielded, []
            for queue in yielded:
                self.runner.hook(self.device.engine_yielded, queue, of=queue)

    def _route(self, queue: Queue) -> None:
        task = self._tasks.get(queue.index) if queue.core.native else None
        self.actor.pool.scheduler.route(self._keys[queue.index], task)

    def limits_changed(self) -> None:
        """Limits were set or taken away, which engines know nothing of; queues that waited for them look again."""
        with self._lock:
            yields = self._native and not self.gate.is_open
            if yields:
                self._use_engines()
        if yields:
            log.warning("%s/%s: limits are set: it is served in Python", self.bus.name, self.name)
        self.completed()

    def _settle(self, engines: Iterable[Engine] | None = None, seconds: float = SETTLE_SECONDS) -> bool:
        """Wait until nothing is under way in engines whose queues are stopped or held; False when that takes longer."""
        deadline = time.monotonic() + seconds
        return all(
            engine.core.settle(max(deadline - time.monotonic(), 0))
            for engine in (self._engines if engines is None else engines)
        )

    def _hangs(self) -> None:
        """What an engine has under way does not end: the driver's memory is in use for so long."""
        self._need_reset("io-hangs", f"what is under way has not ended within {SETTLE_SECONDS:g} s", None)

    def _reset_late(self) -> bool:
        """Reset as soon as what is under way has ended. In a turn."""
        if self._late_key is not None:
            if self._settle(seconds=0):
                self._end_reset()
            else:
                self.actor.mark_later(self._late_key, LATE_SECONDS)
        return False

    @contextmanager
    def _engines_hold(self) -> Iterator[None]:
        """In a turn of the device: engines take nothing meanwhile, just as its own handlers have no turn."""
        queues = [self.queues[index] for index in self._tasks]
        self._holds += 1
        for queue in queues:
            queue.core.draining = True
        try:
            yield
        finally:
            self._holds -= 1
            with self._lock:
                # A device that is about to leave goes on holding.
                resumed = [] if self._holds or self.draining else queues
                for queue in resumed:
                    queue.core.draining = False
            for queue in resumed:
                if queue.core.native:
                    self.mark(queue)

    def undisturbed(self, change: Callable[[], None]) -> bool:
        """Call `change` in a turn of the device, when no engine uses the driver's memory.

        False when that does not come about: the device needs a reset then.
        """
        with self._engines_hold():
            settled = self._settle()
            if settled:
                change()
        if not settled:
            self._hangs()
        return settled

    def _read_outboxes(self) -> bool:
        """Do what engines leave to the device. In a turn."""
        more = False
        for engine in self._engines:
            for errno in engine.core.errors():
                self.runner.hook(self.device.engine_failed, OSError(errno, os.strerror(errno)))
            # Asked for first, and told last: requests from before are answered.
            faults = engine.core.faults()
            more |= self._serve_left(engine)
            while faults and self._serve_left(engine):
                pass
            for index, violation in faults:
                self.violated(violation, engine.queues[index])
        return more

    def _serve_left(self, engine: Engine) -> bool:
        """Answer requests that an engine left to the device; True when there may be more."""
        requests = engine.core.requests(BUDGET)
        for index, queue in enumerate(engine.queues):
            own = [request for of, request in requests if of == index and not request.done]
            if own and isinstance(self.runner, SyncRunner):
                self.runner.serve(queue, own)
        return len(requests) == BUDGET

    # Priorities.

    def set_priority(self, priority: int, queue: str | None = None) -> None:
        """Make the device, or one of its queues, this urgent; from the next reset on when a driver has it now."""
        with self._lock:
            if queue is None:
                self.priority = priority
            else:
                self._wanted_priorities[queue] = priority
        self.actor.post(lambda: None if self.status else self._apply_priorities())

    def _apply_priorities(self) -> None:
        """In a turn, with nobody driving: both sides of a connector learn priorities when a driver begins."""
        with self._lock:
            wanted = [self._wanted_priorities.get(queue.name, self.priority) for queue in self.queues]
            if wanted == self.queue_priorities:
                return
            self.queue_priorities = wanted
            old, self._keys = self._keys, [self.actor.key(self._turn_of(q), wanted[q.index]) for q in self.queues]
            for queue in self.queues:
                self._route(queue)
            for engine in self._engines:
                priority = min(wanted[queue.index] for queue in engine.queues)
                self._tasks[engine.queues[0].index].set_priority(priority)
        for key in old:
            self.actor.drop_key(key)

    # Limits.

    def admit(self, queue: Queue, wanted: int) -> int:
        """How many of `wanted` requests the queue may take; when none, it gets a turn as soon as there may be room."""
        with self._lock:
            # A request that ends from now on finds this queue waiting.
            self._held.add(queue)
        allowed, wait = self.gate.admit(wanted, self._outstanding)
        if allowed or wait:
            with self._lock:
                self._held.discard(queue)
        if not allowed and wait:
            # A debt may be long, and the limit be gone before: look again now and then.
            self.actor.mark_later(self.key(queue), min(wait, LOOK_AGAIN))
        return allowed

    def _outstanding(self, account: Account) -> int:
        """Requests under way that count for this account; buffers that wait in pull queues are none."""
        if account is self.gate.device:
            slots = [self]
        else:
            slots = [slot for slot in self.bus.slots() if account in slot.gate.members]
        return sum(queue.core.in_flight for slot in slots for queue in slot.queues if not queue.pull)

    def completed(self) -> None:
        """Requests ended: queues that waited for that, of this device or of its driver's others, look again."""
        self._wake_held(everywhere=bool(self.gate.members))

    def _wake_held(self, *, everywhere: bool) -> None:
        for slot in [s for s in self.bus.slots() if s.owner is not None] if everywhere else [self]:
            with slot._lock:
                held, slot._held = slot._held, set()
            for queue in held:
                slot.mark(queue)

    # Features (section 2.2).

    @property
    def exposed(self) -> int:
        """What a driver is offered: what is available, less what the operator masks."""
        return self.available & ~self.mask

    def set_driver_features(self, attachment: Attachment, bits: int) -> None:
        """The driver's choice; FEATURES_OK says later whether it stands. RefusedError once it does."""
        with self._lock:
            self._check_owner(attachment)
            if self.status & Status.FEATURES_OK:
                raise RefusedError("the features are negotiated; reset the device first")
            self.negotiated = bits

    # Config space (section 2.5).

    def read_config(self, offset: int, length: int) -> tuple[int, bytes]:
        """(generation, bytes): fewer bytes than asked for at the end of config space."""
        with self.device._lock:
            return self.config_generation, self.device.config.to_bytes()[offset : offset + length]

    @property
    def config_size(self) -> int:
        """Bytes of config space."""
        return self.device.config.size

    def write_config(
        self, attachment: Attachment, generation: int | None, offset: int, data: bytes, reply: Callable[[bool], None]
    ) -> None:
        """Write config space in a turn of the device, which then hears of it; `reply` tells whether it was taken.

        Without a generation: from an environment that writes config space whole, and before its driver is known. What
        of it may be written is.
        """
        with self._lock:
            if generation is not None or self.owner is not None:
                self._check_owner(attachment)

        def write() -> None:
            device = self.device
            fields: set[str] = set()
            with device._lock:
                if generation is None:
                    parts = self._writable_parts(offset, data)
                else:
                    taken = generation == self.config_generation and self._may_write(offset, len(data))
                    parts = [(offset, data)] if taken else []
                for at, part in parts:
                    fields |= device.config.write(at, part)
            if fields:
                self.runner.hook(device.config_written, frozenset(fields))
            reply(bool(parts))

        self.actor.post(write)

    def _writable_parts(self, offset: int, data: bytes) -> list[tuple[int, bytes]]:
        config = self.device.config
        parts = []
        for field in self.device.config_writable:
            start = config.offset_of(field) - offset
            end = start + config.size_of(field)
            if start >= 0 and end <= len(data):
                parts.append((start + offset, data[start:end]))
        return parts

    def _may_write(self, offset: int, length: int) -> bool:
        config = self.device.config
        for field in self.device.config_writable:
            start = config.offset_of(field)
            if start <= offset and offset + length <= start + config.size_of(field):
                return length > 0
        return False

    def config_changed(self) -> None:
        """Count up the generation and tell the driver that has the device. From any thread."""
        with self._lock:
            self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
            owner = self.owner
        if owner is not None and self.status & Status.DRIVER_OK:
            owner.config_changed(self)

    # What a driver cannot restore, for another device that goes on in place of this one.

    @property
    def has_state(self) -> bool:
        """Whether the device says what its state is."""
        return has_state(self.device)

    def save_state(self, attachment: Attachment, done: Callable[[bytes | None], None]) -> None:
        """Ask the device for its state, in a turn of it; `done` gets None when it failed, or is another driver's."""

        def save() -> None:
            said: list[bytes] = []
            if self.owner in (None, attachment):
                self.runner.hook(lambda: said.append(bytes(self.device.save_state())))
            done(said[0] if said else None)

        self.actor.post(save)

    def load_state(self, attachment: Attachment, data: bytes, done: Callable[[bool], None]) -> None:
        """Give the device a state, in a turn of it; `done` tells whether it took it."""

        def load() -> None:
            taken: list[bool] = []

            def take() -> None:
                self.device.load_state(data)
                taken.append(True)

            if self.owner in (None, attachment):
                # What it raises is a violation or a failure of this device, as in any hook.
                self.runner.hook(take)
            done(bool(taken))

        self.actor.post(load)

    # Status (section 2.1).

    def _check_owner(self, attachment: Attachment) -> None:
        if self.owner is not None and self.owner is not attachment:
            raise InUseError(f"{self.name} is in use by {self.owner.label}")
        if self.owner is None:
            raise RefusedError(f"{self.name} has not been claimed: set its status first")

    def set_status(self, attachment: Attachment, value: int, reply: Callable[[int], None]) -> None:
        """Take a driver's status write; `reply` gets the status that came of it, perhaps from another thread.

        Zero resets: the reply comes when nothing of the device is under way any more. When that does not end, the reply
        is a status that says NEEDS_RESET, and not zero: the driver's memory is in use until the status is zero, as soon
        as it can be. Anything else claims the device for this driver. InUseError when another has it.
        """
        with self._lock:
            if self.owner is not None and self.owner is not attachment:
                if value == 0:
                    reply(int(self.status))
                    return
                raise InUseError(f"{self.name} is in use by {self.owner.label}")
            if value and not self.present:
                raise RefusedError(f"{self.name} is being removed")
            if value and self._late_key is not None:
                raise RefusedError(f"{self.name} is being reset, and what is under way has not ended")
            if value:
                self.owner = attachment
                self.gate.members = attachment.accounts
        if value == 0:
            self.actor.post(lambda: self._change_status(None, reply))
        else:
            self.actor.post(lambda: self._change_status(Status(value & 0xFF), reply))

    def _change_status(self, wanted: Status | None, reply: Callable[[int], None]) -> None:
        if wanted is None:
            self._reset()
        else:
            with self._engines_hold():
                self._raise_status(wanted)
        reply(int(self.status))

    def _raise_status(self, wanted: Status) -> None:
        """Add status bits, in a turn of the device; bits that would lie are left out (section 3.1)."""
        new = wanted & ~self.status & ~Status.DEVICE_NEEDS_RESET
        if new & Status.FEATURES_OK and not self._features_stand():
            new &= ~(Status.FEATURES_OK | Status.DRIVER_OK)
        if new & Status.DRIVER_OK and not (self.status | new) & Status.FEATURES_OK:
            new &= ~Status.DRIVER_OK
        self.status |= new
        if new & Status.DRIVER_OK:
            self._start()

    def _features_stand(self) -> bool:
        return not self.negotiated & ~self.exposed and bool(self.negotiated >> features.VERSION_1 & 1)

    def _start(self) -> None:
        """Start the queues that the driver has set up, then let the device know, then look at them once."""
        owner = self.owner
        if owner is None:
            return
        # Once for a driver: what a model keeps of a queue that it serves, an engine does not know, nor the other way.
        self._use_engines()
        # Copies: the driver may set queues up, too late, at this very moment.
        rings = dict(self._rings)
        for index, ring in rings.items():
            self._start_ring(owner, self.queues[index], ring)
        self.runner.hook(self.device.ready)
        # A driver may have kicked before DRIVER_OK took effect; that kick must not be lost.
        for index in rings:
            self.mark(self.queues[index])

    def _start_ring(self, owner: Attachment, queue: Queue, ring: Ring) -> None:
        queue.paused = ring.paused
        try:
            queue.core.start(
                owner.memory,
                ring.size,
                ring.desc,
                ring.driver,
                ring.device,
                signal=owner.signal(self, queue),
                **features.of_ring(self.negotiated),
                resume=ring.resume,
                inflight=ring.inflight,
            )
        except Violation as violation:
            self.violated(violation, queue)

    # Rings that come and go one at a time, while the device has a driver.

    def launch(
        self, attachment: Attachment, bits: int, rings: Mapping[int, Ring], done: Callable[[Error | None], None]
    ) -> None:
        """Make this the driver of the device at once, with features that were agreed on elsewhere, and these rings.

        For environments that have no device status. `done` gets None or what is wrong: InUseError, RefusedError,
        Violation.
        """

        def launch() -> None:
            # A driver that went before this one was reset in a turn before.
            try:
                self._claim(attachment, bits)
            except Error as error:
                done(error)
                return
            self._rings.update(rings)
            with self._engines_hold():
                self._raise_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
                self._tell_queues()
            done(None)

        self.actor.post(launch)

    def _claim(self, attachment: Attachment, bits: int) -> None:
        with self._lock:
            if self.owner is not None and self.owner is not attachment:
                raise InUseError(f"{self.name} is in use by {self.owner.label}")
            if not self.present:
                raise RefusedError(f"{self.name} is being removed")
            if bits & ~self.exposed or not bits >> features.VERSION_1 & 1:
                raise Violation("features-not-offered", f"{bits:#x} of {self.exposed:#x}; VERSION_1 must be among them")
            self.owner = attachment
            self.gate.members = attachment.accounts
            self.negotiated = bits

    def start_queue(self, attachment: Attachment, index: int, ring: Ring, done: Callable[[], None]) -> None:
        """Start one queue of a device that has its driver, and look at it once: a kick from before is not lost."""
        queue = self.queue_at(index)

        def start() -> None:
            if self.owner is attachment and self.status & Status.DRIVER_OK and not queue.core.running:
                with self._engines_hold():
                    self._start_ring(attachment, queue, ring)
                    self._tell_queues()
                self.mark(queue)
            done()

        self.actor.post(start)

    def pause_queue(self, attachment: Attachment, queue: Queue, paused: bool) -> None:
        """Take nothing more off the ring, or go on and look at it. What was taken is handled.

        Nothing, from who does not drive the device.
        """
        if self.owner is not attachment:
            return
        if paused:
            queue.paused = True

        def change() -> None:
            if self.owner is not attachment:
                return
            with self._engines_hold():
                queue.paused = paused
                self._tell_queues()
            self.mark(queue)

        self.actor.post(change)

    def _tell_queues(self) -> None:
        if self.status & Status.DRIVER_OK:
            self.runner.hook(self.device.queues_changed)

    def stop_queue(self, attachment: Attachment, index: int, done: Callable[[int | None], None]) -> None:
        """Stop one queue; `done` gets where its ring may be gone on with, as soon as nothing is in flight any more.

        None when it did not run for this driver. Buffers of a pull queue that the device lets go of (`queue_stopping`),
        or keeps for longer than five seconds, are given back to the ring: they come again when it is started there. (If
        the device has given others back before them, that cannot be told, and its driver does not see them again before
        it resets the queue.)
        """
        queue = self.queue_at(index)
        if self.owner is attachment:
            queue.paused = True
        deadline = time.monotonic() + PULLED_SECONDS

        def look() -> bool:
            if self.owner is not attachment:
                # It never was its driver's, or is no more: the ring that runs now is another's.
                self.actor.drop_key(key)
                done(None)
                return False
            # Anew each time: its driver may have let it go on just before, and that takes effect in a turn, too.
            queue.paused = True
            kept = queue.pull and queue.core.running and self._lets_go(queue, late=time.monotonic() > deadline)
            held = queue.core.in_flight
            if held and queue.core.running and not kept:
                self.mark(queue)
                self.actor.mark_later(key, STOP_LOOK)
                return False
            self.actor.drop_key(key)
            end = queue.core.next
            if kept and queue.core.unused is not None:
                end = queue.core.unused
            queue.core.stop()
            queue.paused = False
            self._tell_queues()
            done(end)
            return False

        key = self.actor.key(look, 0)
        self.actor.mark(key)

    def _lets_go(self, queue: Queue, *, late: bool) -> bool:
        """Ask the device for what it has taken of a pull queue that stops: whether nothing of that is used any more."""
        answers: list[bool] = []
        self.runner.hook(lambda: answers.append(self.device.queue_stopping(queue)), of=queue)
        return late or answers == [True]

    def reset_queue(self, attachment: Attachment, index: int, done: Callable[[Error | None], None]) -> None:
        """Reset one queue (section 2.6.1): its driver gets nothing back of what is in flight, and may set it up anew.

        `done` is called when nothing of the queue is under way any more; with a RefusedError when that does not end.
        RefusedError without RING_RESET.
        """
        queue = self.queue_at(index)
        with self._lock:
            self._check_owner(attachment)
            if not self.negotiated >> features.RING_RESET & 1 or not self.status & Status.DRIVER_OK:
                raise RefusedError(f"{self.name}: a queue is reset with RING_RESET, and after DRIVER_OK")

        def reset() -> None:
            if self.owner is attachment and self._rings.pop(index, None) is not None:
                queue.core.stop()
                if not self._settle(engine for engine in self._engines if queue in engine.queues):
                    self._hangs()
                    done(RefusedError(f"{self.name}: what is under way on queue {index} does not end"))
                    return
                self.runner.cancel(queue)
                attachment.queue_reset(self, queue)
                self._tell_queues()
                self.completed()
            done(None)

        self.actor.post(reset)

    def reset(self, timeout: float) -> None:
        """Reset from this side. TimeoutError when the device is stuck for `timeout` seconds."""
        self.actor.call(self._reset, timeout)

    def _reset(self) -> None:
        self._stop_queues()
        if self._settle():
            self._end_reset()
        elif self._late_key is None:
            # Nobody is told that the driver's memory is free before it is.
            self._hangs()
            self._late_key = self.actor.key(self._reset_late, 0)
            self.actor.mark_later(self._late_key, LATE_SECONDS)

    def _end_reset(self) -> None:
        """Forget the driver, with nothing of its memory in use any more."""
        if self._late_key is not None:
            self.actor.drop_key(self._late_key)
            self._late_key = None
        for engine in self._engines:
            engine.core.forget()
        self.runner.cancel()
        with self._lock:
            owner, self.owner = self.owner, None
            members, self.gate.members = self.gate.members, []
            self._held.clear()
            was = self.status
            self.status = Status(0)
            self.negotiated = 0
            self._rings.clear()
            self._told.clear()
            self.generation = (self.generation + 1) & 0xFFFF_FFFF
        if owner is not None:
            self._part(owner)
        self._apply_priorities()
        if members:
            # What ended here made room for the driver's other devices.
            self._wake_held(everywhere=True)
        if was:
            self.runner.hook(self.device.reset)

    def _part(self, owner: Attachment) -> None:
        """Keep what the driver's signals counted, then let its connector forget them."""
        for queue in self.queues:
            self._past[queue.index] = _sum(self._past[queue.index], owner.counters(self, queue))
        owner.slot_reset(self)

    def signal_counters(self, queue: Queue) -> SignalCounters:
        """(signalled, sent, rung) towards the device and towards its drivers, since it was plugged."""
        owner = self.owner
        past = self._past[queue.index]
        return past if owner is None else _sum(past, owner.counters(self, queue))

    def _stop_queues(self) -> None:
        for queue in self.queues:
            queue.core.stop()
            queue.paused = False
            self.detach_doorbell(queue)

    def detach(self, attachment: Attachment) -> None:
        """The driver's side is gone: when it had the device, the device is reset and free."""
        with self._lock:
            if self.owner is not attachment:
                return
        # At once, so that a hung handler cannot go on writing into memory that nobody owns; the rest in a turn.
        self._stop_queues()
        self.actor.post(lambda: self._reset() if self.owner is attachment else None)

    # Queues (section 2.6).

    def queue_at(self, index: int) -> Queue:
        """The queue of this index; RefusedError when there is none."""
        if not 0 <= index < len(self.queues):
            raise RefusedError(f"{self.name} has {len(self.queues)} queues, none is {index}")
        return self.queues[index]

    def ring_of(self, index: int) -> Ring:
        """The ring as the driver set it; zeros before."""
        self.queue_at(index)
        return self._rings.get(index, Ring())

    def set_queue(self, attachment: Attachment, index: int, ring: Ring, done: Callable[[], None]) -> None:
        """Where a ring is; checked when DRIVER_OK starts it, or at once for a queue that was reset since.

        `done` is called when it took effect. RefusedError.
        """
        with self._lock:
            self._check_owner(attachment)
            queue = self.queue_at(index)
            running = bool(self.status & Status.DRIVER_OK)
            if running and (index in self._rings or not self.negotiated >> features.RING_RESET & 1):
                raise RefusedError(f"{self.name}: queue {index} cannot be set up after DRIVER_OK, unless it was reset")
            if ring.size > queue.max_size:
                raise RefusedError(f"{self.name}: queue {index} takes up to {queue.max_size}, not {ring.size}")
            self._rings[index] = ring
        if running:
            self.start_queue(attachment, index, ring, done)
        else:
            done()

    # When something breaks (section 2.1.2).

    def violated(self, violation: Violation, queue: Queue | None = None) -> None:
        """The driver broke a rule: count it, say it once, and need a reset. From any thread."""
        where = f"queue {queue.name}: " if queue is not None else ""
        self._need_reset(violation.name, f"{where}{violation}", queue)

    def failed(self, error: Exception, queue: Queue | None = None) -> None:
        """The device model itself raised: the same for the driver, and a traceback in the log for its author."""
        trace = "".join(traceback.format_exception(error))
        logging.getLogger(f"vbus.device.{self.name}").error("%s raised\n%s", type(self.device).__name__, trace)
        self._need_reset("device-error", f"{type(error).__name__}: {error}", queue)

    def _need_reset(self, name: str, reason: str, queue: Queue | None) -> None:
        if queue is not None:
            queue.core.stop()
        with self._lock:
            self.violations[name] += 1
            self.reasons.append((time.time(), reason))
            first = name not in self._told
            self._told.add(name)
            tell = bool(self.status & Status.DRIVER_OK) and not self.status & Status.DEVICE_NEEDS_RESET
            if self.status:
                self.status |= Status.DEVICE_NEEDS_RESET
            owner = self.owner
        if first:
            log.warning("%s/%s: %s (%s)", self.bus.name, self.name, reason, owner.label if owner else "no driver")
        if tell and owner is not None:
            owner.config_changed(self)
        if queue is not None and owner is not None:
            owner.queue_failed(self, queue)
        # What was under way on the queue has ended with it.
        self.completed()

    # Coming and going.

    def plug(self, timeout: float) -> None:
        """Let the device open what it serves; what it raises is raised here."""
        if self.runner.is_here:
            # On the loop that a turn of the device would wait for. Nothing else of it can be under way yet.
            self.runner.plugged()
        else:
            self.actor.call(self.runner.plugged, timeout)

    def idle(self) -> bool:
        """Whether no request is under way."""
        return all(queue.core.in_flight == 0 for queue in self.queues if not queue.pull)

    def drain(self, timeout: float) -> bool:
        """Take no more requests, and wait for those under way; False when `timeout` seconds were not enough."""
        with self._lock:
            self.draining = True
            for queue in self.queues:
                queue.core.draining = True
        deadline = time.monotonic() + timeout
        while not self.idle() and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.idle()

    def halt(self) -> bool:
        """Stop serving at once, before the driver hears of it: from then on it may reuse its buffers.

        False when what an engine has under way does not end: then it may not yet.
        """
        self.present = False
        self._stop_queues()
        settled = self._settle()
        if not settled:
            log.error("%s/%s: what is under way does not end: it is left behind", self.bus.name, self.name)
        return settled

    @property
    def is_settled(self) -> bool:
        """Whether engines have nothing under way."""
        return self._settle(seconds=0)

    def remove(self, timeout: float) -> bool:
        """Stop the device for good; False when it hangs longer than `timeout` seconds (it is left behind then)."""
        self.present = False
        ended = self.is_settled
        try:
            # What has not ended keeps its memory mapped.
            self.actor.call(self._leave, timeout)
        except TimeoutError:
            ended = False
            log.error("%s/%s hangs: it was left behind", self.bus.name, self.name)
            with self._lock:
                owner, self.owner = self.owner, None
            if owner is not None:
                self._part(owner)
        self.actor.close()
        return ended

    def _leave(self) -> None:
        self._stop_queues()
        self._settle(seconds=LATE_SECONDS)
        self._end_reset()
        self._use_engines(allowed=False)
        for engine in self._engines:
            self._tasks[engine.queues[0].index].remove()
        if self._own_worker is not None:
            self._own_worker.close()
            self._own_worker = None
        self._engines.clear()
        self._tasks.clear()
        self.runner.stop()
        self.runner.hook(self.device.unplugged)


def _sum(a: SignalCounters, b: SignalCounters) -> SignalCounters:
    (a1, a2, a3), (a4, a5, a6) = a
    (b1, b2, b3), (b4, b5, b6) = b
    return (a1 + b1, a2 + b2, a3 + b3), (a4 + b4, a5 + b5, a6 + b6)
