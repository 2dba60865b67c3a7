"""The rings of a front-end of vhost-user: made in its arena, told to the back-end, and signalled.

A ring's kick and call are eventfds; or, in-band, a message on either socket, of which no more than one a ring and
direction is ever on its way. One ring may be the front-end's own: a network's control queue, whose device is here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vbus import _core
from vbus.errors import DriverError, Violation
from vbus.proxy.connectors.vhost_user_classes import OwnNet
from vbus.proxy.connectors.vhost_user_link import BackEndLink
from vbus.proxy.connectors.vhost_user_memory import SharedArena
from vbus.proxy.loop import Loop
from vbus.proxy.queue import RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import Request
from vbus.virtio import features
from vbus.virtio.net import ACK_ERR, ACK_OK

MAX_QUEUE_SIZE = 1024
"""Descriptors that a ring may have: no message tells, and every back-end takes so many."""
CONTROL_SIZE = 64
"""Descriptors of the front-end's own ring."""


@dataclass
class _Vring:
    """A ring of ours, and how it is signalled."""

    index: int
    size: int
    place: int
    ring: _core.DriverQueue
    queue: RemoteQueue
    signal: _core.Signal
    keys: list[int]
    """The first reaps what is finished; where a signal is a key, the last takes the kick."""
    packed: bool
    base: int
    """Where the back-end goes on."""
    bells: dict[str, _core.Doorbell] = field(default_factory=dict)
    """`kick`, `call`, `err`: those that are descriptors."""
    served_here: _core.DeviceQueue | None = None
    """Where the front-end itself is the device."""
    started: bool = False
    may_kick: bool = False
    """Whether a kick may be said now: one that comes behind the word that ends the ring is an offence."""
    enabled: bool = True
    kicks: int = 0
    """In-band."""
    kicking: bool = False
    """A kick in-band has not been acknowledged yet."""
    kick_again: bool = False


class Rings:
    """The rings of one device. `failed` is called on the loop's thread when the back-end gave up a ring."""

    def __init__(
        self,
        link: BackEndLink,
        loop: Loop,
        memory: SharedArena,
        *,
        served: int,
        has_enable: bool,
        in_band: bool,
        own_net: OwnNet | None,
        failed: Callable[[], None],
    ) -> None:
        self.served = served
        """Rings of the back-end; what comes behind them is ours."""
        self._link = link
        self._loop = loop
        self._memory = memory
        self._has_enable = has_enable
        self._in_band = in_band
        self._own_net = own_net
        self._failed = failed
        self._vrings: dict[int, _Vring] = {}
        self._kick_lock = threading.Lock()
        self._own_memory = _core.Memory()
        self._own_memory.add(memory.arena.address, memory.arena.mapping)

    # Made and forgotten.

    def open(self, device: RemoteDevice, index: int, size: int) -> RemoteQueue:
        """Make a ring; the back-end hears of it at `start`. DriverError ENOMEM."""
        loop, arena = self._loop, self._memory.arena
        ring_features = features.of_ring(device.negotiated)
        packed = ring_features["packed"]
        place = self._memory.take(_core.DriverQueue.bytes_needed(size, packed=packed))
        queues: list[RemoteQueue] = []
        priority = device.queue_priority(index)
        keys = [loop.key(lambda: queues[0].reap() if queues else False, priority)]
        bells: dict[str, _core.Doorbell] = {}
        if index >= self.served:
            keys.append(loop.key(lambda: self._serve_own(device, index), priority))
            signal = _core.Signal.local(loop.scheduler, keys[-1])
        elif self._in_band:
            keys.append(loop.key(lambda: self._kick_in_band(index), priority))
            signal = _core.Signal.local(loop.scheduler, keys[-1])
        else:
            bells = {name: _new_bell() for name in ("kick", "call", "err")}
            signal = _core.Signal.direct(bells["kick"])
            for name, turn in (("call", lambda: self._called(index)), ("err", lambda: self._err(index))):
                keys.append(loop.key(turn, priority))
                loop.scheduler.add_fd(bells[name].fileno(), keys[-1])
        ring = _core.DriverQueue(arena.mapping, place, arena.address, size, signal=signal, **ring_features)
        queues.append(RemoteQueue(device, index, arena, self._memory.lock, ring))
        base = m.PACKED_BASE if packed else 0
        vring = _Vring(index, size, place, ring, queues[0], signal, keys, packed, base, bells)
        if index >= self.served:
            vring.served_here = _core.DeviceQueue(size)
            vring.served_here.start(
                self._own_memory,
                size,
                ring.desc,
                ring.driver,
                ring.device,
                signal=_core.Signal.local(loop.scheduler, keys[0]),
                **ring_features,
            )
        self._vrings[index] = vring
        return queues[0]

    def close(self) -> None:
        """Forget every ring, and give its memory back: the back-end has stopped them all, or is gone."""
        vrings, self._vrings = list(self._vrings.values()), {}
        for vring in vrings:
            if vring.served_here is not None:
                vring.served_here.stop()
            for name in vring.bells.keys() & {"call", "err"}:
                self._loop.scheduler.remove_fd(vring.bells[name].fileno())
            for key in vring.keys:
                self._loop.drop_key(key)
            self._memory.give_back(vring.place)

    def counters(self, index: int) -> tuple[int, int, int]:
        """Events signalled and sent, and doorbells rung, or messages, towards the back-end."""
        vring = self._vrings.get(index)
        if vring is None:
            return (0, 0, 0)
        signalled, sent, rung = vring.signal.counters
        return signalled, sent, vring.kicks if self._in_band else rung

    @contextlib.contextmanager
    def lent_bell(self, index: int) -> Iterator[_core.Doorbell | None]:
        """A ring's call, which the loop does not listen to meanwhile; None where there is no eventfd."""
        vring = self._vrings.get(index)
        bell = vring.bells.get("call") if vring is not None else None
        if vring is None or bell is None:
            yield None
            return
        scheduler = self._loop.scheduler
        scheduler.remove_fd(bell.fileno())
        try:
            yield bell
        finally:
            if self._vrings.get(index) is vring:
                scheduler.add_fd(bell.fileno(), vring.keys[1])

    # Started and stopped.

    def _of_back_end(self) -> list[_Vring]:
        return [vring for _, vring in sorted(self._vrings.items()) if vring.served_here is None]

    @property
    def running(self) -> bool:
        """Whether the back-end has any."""
        return any(vring.started for vring in self._of_back_end())

    def begin(self) -> None:
        """Start the rings of a driver that begins. DriverError."""
        if any(vring.served_here is not None for vring in self._vrings.values()):
            # Of several pairs a driver says how many it uses; until then it is one (section 5.1.6.5.6).
            for vring in self._of_back_end():
                vring.enabled = vring.index < 2
        self.start()

    def start(self) -> None:
        """Give the back-end every ring, from where it stopped if it did, and let it look at each. DriverError."""
        link, vrings = self._link, self._of_back_end()
        where = self._memory.arena.user_address
        for vring in vrings:
            index, ring = vring.index, vring.ring
            link.tell(Request.SET_VRING_NUM, m.VringState(index, vring.size))
            link.tell(Request.SET_VRING_BASE, m.VringState(index, vring.base))
            places = where(ring.desc), where(ring.device), where(ring.driver)
            link.tell(Request.SET_VRING_ADDR, m.VringAddr(index, 0, *places, ring.device))
            # The kick comes last: with it the ring may start.
            bells = {"call": Request.SET_VRING_CALL, "err": Request.SET_VRING_ERR, "kick": Request.SET_VRING_KICK}
            for name, request in bells.items():
                if name in vring.bells:
                    link.tell(request, m.U64(index), [vring.bells[name].fileno()])
            vring.started = True
        if self._has_enable:
            for vring in vrings:
                link.tell(Request.SET_VRING_ENABLE, m.VringState(vring.index, int(vring.enabled)))
        link.settle()
        self.let_kick(True)
        for vring in vrings:
            # A ring starts with its first kick, and one that goes on may have missed some.
            if self._in_band:
                self._loop.scheduler.mark(vring.keys[-1])
            else:
                vring.bells["kick"].ring()

    def stop(self) -> None:
        """Stop them, when nothing is in flight any more, and keep where each stopped. DriverError ETIMEDOUT, EPROTO."""
        self.let_kick(False)
        for vring in self._of_back_end():
            if not vring.started:
                continue
            answer, _ = self._link.ask(Request.GET_VRING_BASE, m.VringState, m.VringState(vring.index, 0))
            if answer.index != vring.index or (answer.num > 0xFFFF and not vring.packed):
                raise DriverError(errno.EPROTO, f"queue {vring.index} stopped, says the back-end, as {answer}")
            vring.started, vring.base = False, answer.num

    # Signals. On the loop's thread.

    def look(self) -> None:
        """Look at every ring: who waits for room may find some. From any thread."""
        for vring in list(self._vrings.values()):
            self._loop.scheduler.mark(vring.keys[0])

    def called(self, index: int) -> None:
        """The back-end called in-band."""
        vring = self._vrings.get(index)
        if vring is not None:
            self._loop.scheduler.mark(vring.keys[0])

    def _called(self, index: int) -> bool:
        vring = self._vrings.get(index)
        if vring is None:
            return False
        vring.bells["call"].drain()
        return vring.queue.reap()

    def gave_up(self, index: int) -> None:
        """The back-end says, of a ring that it has, that it cannot go on."""
        if index in self._vrings:
            self._failed()

    def _err(self, index: int) -> bool:
        vring = self._vrings.get(index)
        if vring is not None:
            vring.bells["err"].drain()
            self._failed()
        return False

    def _kick_in_band(self, index: int) -> bool:
        """At most one kick of a ring is on its way: the next waits until the back-end has read it."""
        vring = self._vrings.get(index)
        if vring is None:
            return False
        if vring.kicking:
            vring.kick_again = True
            return False

        def kicked(taken: bool) -> None:
            vring.kicking = False
            if not taken:
                self.gave_up(index)
            elif vring.kick_again:
                vring.kick_again = False
                self._kick_in_band(index)

        # When the link is gone, the queues hear it from elsewhere.
        with self._kick_lock, contextlib.suppress(DriverError):
            if vring.may_kick:
                vring.kicking, vring.kicks = True, vring.kicks + 1
                self._link.tell_later(Request.VRING_KICK, m.VringState(index, 0), (), kicked)
        return False

    def let_kick(self, allowed: bool) -> None:
        """Whether kicks are told in-band; once they are not, none is on its way behind what is said next."""
        with self._kick_lock:
            for vring in self._of_back_end():
                vring.may_kick = allowed and vring.started

    # The ring that a network's front-end serves itself. On the loop's thread.

    def _serve_own(self, device: RemoteDevice, index: int) -> bool:
        vring = self._vrings.get(index)
        if vring is None or vring.served_here is None or self._own_net is None:
            return False
        try:
            requests = vring.served_here.take(CONTROL_SIZE)
        except Violation as violation:
            device.broken(f"its control queue: {violation}")
            return False
        for request in requests:
            pairs = self._own_net.pairs_asked(request.read()) if request.writable else None
            if pairs is None:
                _acknowledge(vring.served_here, request, ACK_ERR)
            else:
                self._use_pairs(pairs, vring.served_here, request)
        # Until there are none: it is then that the driver is asked to say when there are.
        return bool(requests)

    def _use_pairs(self, pairs: int, served: _core.DeviceQueue, request: _core.Request) -> None:
        """Enable as many pairs as a driver wants; answer when the back-end knows."""
        changed = [vring for vring in self._of_back_end() if vring.enabled != (vring.index < 2 * pairs)]
        left, refused = len(changed), 0
        if not changed or not self._has_enable:
            _acknowledge(served, request, ACK_OK)
            return

        def told(taken: bool) -> None:
            nonlocal left, refused
            left, refused = left - 1, refused + (not taken)
            if not left:
                _acknowledge(served, request, ACK_ERR if refused else ACK_OK)

        for vring in changed:
            vring.enabled = not vring.enabled
            with contextlib.suppress(DriverError):
                state = m.VringState(vring.index, int(vring.enabled))
                self._link.tell_later(Request.SET_VRING_ENABLE, state, (), told)


def _acknowledge(served: _core.DeviceQueue, request: _core.Request, ack: int) -> None:
    if request.writable:
        request.write(bytes([ack]))
    served.complete([request])


def _new_bell() -> _core.Doorbell:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        return _core.Doorbell(fd)
    finally:
        os.close(fd)
