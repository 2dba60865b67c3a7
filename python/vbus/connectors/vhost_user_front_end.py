"""One front-end of vhost-user, as the `vhost-user` connector sees it: what it says, and what becomes of its queues.

A queue runs from the moment that its place and its kick are known. It takes requests while it is enabled: a kick that
came before is not lost, because a queue is looked at whenever either changes. The device begins with the first queue
that is started and enabled: some front-ends never say DRIVER_OK although they speak of status.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from vbus import _core
from vbus.bus import Account, Actor, Attachment, Queue, RefusedError, Ring, Slot
from vbus.bus.queue import MAX_QUEUE_SIZE
from vbus.bus.slot import InUseError, SignalCounters
from vbus.connectors.eventfd import is_eventfd
from vbus.connectors.vhost_user_classes import owns
from vbus.connectors.vhost_user_memory import MAX_MEMORY_SLOTS, GuestMemory, Inflight, is_size
from vbus.connectors.vhost_user_state import StateTransfer
from vbus.errors import Error, Violation
from vbus.vhost_user import codec, wire
from vbus.vhost_user import messages as m
from vbus.vhost_user.messages import BackendRequest, ProtocolFeature, Request
from vbus.virtio import Status, features

log = logging.getLogger("vbus.connector")

PROTOCOL = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.INBAND_NOTIFICATIONS
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.LOG_SHMFD
)
"""What every class is offered with."""
NEEDED_IN_BAND = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
"""Without these the protocol has no in-band notifications."""
LOOK_SECONDS = 0.5
"""How often to look whether a front-end that waits for an answer is there still."""
REFUSED = 1
"""The acknowledgement of what was not done."""


class Host(Protocol):
    """The connector that a front-end came through."""

    name: str

    def parted(self, front_end: FrontEnd, reason: str) -> None:
        """The front-end is gone."""


class Vring:
    """What a front-end said of one queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.size = 0
        self.base: int | None = None
        self.addr: m.VringAddr | None = None
        self.kick: _core.Doorbell | None = None
        self.kicked_in_band = False
        self.enabled = False
        self.started = False
        self.is_known = False
        """Whether its front-end has seen it run here, and so knows where it goes on."""
        # The descriptor behind it is replaced when the front-end names another, while the ring goes on.
        fd = _nobody_listens()
        self.call = _core.Doorbell(fd)
        # The bell has a duplicate.
        os.close(fd)
        self.signal = _core.Signal.direct(self.call)
        self.has_call = False
        """Whether the front-end gave a descriptor for calls."""
        self.called_in_band = False
        self.err: _core.Doorbell | None = None


class FrontEnd(Attachment):
    """One front-end: an actor whose messages are handled one after the other, each to its end."""

    def __init__(self, host: Host, slot: Slot, sock: socket.socket, label: str, accounts: list[Account]) -> None:
        self.host = host
        self.slot = slot
        self.label = label
        self.connector_name = host.name
        self.accounts = accounts
        self._guest = GuestMemory()
        self.memory = self._guest.core
        self.since = time.time()
        self.actor = Actor(slot.bus.pool, f"front-end {label}")
        self.class_ = owns(int(slot.device.device_id))
        self.vrings = [Vring(queue) for queue in slot.queues]
        self.features: int | None = None
        self.protocol = ProtocolFeature(0)
        self.status = Status(0)
        self.launched = False
        self.is_parted = False
        self._inflight: Inflight | None = None
        self._state = StateTransfer(self, self)
        self._sock = sock
        self._backend: socket.socket | None = None
        self._lock = threading.Lock()
        self._waiting = False
        self._dirty = False
        sock.setblocking(False)
        self._reader = wire.Reader(sock)
        self._look_key = self.actor.key(self._look, 0)
        self.actor.watch(sock.fileno(), self._readable)

    # Messages.

    def _readable(self) -> None:
        """Handle messages until one has to wait for its effect, or there are no more."""
        while not self.is_parted and not self._waiting:
            try:
                got = self._reader.read()
            except BlockingIOError:
                return
            except Violation as violation:
                self.part(str(violation))
                return
            except OSError as error:
                self.part(f"the socket broke: {error.strerror}")
                return
            if got is None:
                self.part("it closed the connection")
                return
            self._handle(*got)

    def _handle(self, data: bytes, fds: list[int]) -> None:
        left = _Descriptors(fds)
        try:
            message = codec.decode(data)
            if isinstance(message, codec.Malformed):
                raise Violation(message.name, message.detail)
            assert isinstance(message.request, Request)
            if message.reply:
                raise Violation("answer-unasked", message.request.name)
            log.debug("%s: %s", self.label, message)
            row = m.TABLE[message.request]
            if not row.least_fds <= len(fds) <= row.most_fds:
                raise Violation(
                    "descriptor-count",
                    f"{message.request.name} with {len(fds)}; {row.least_fds} to {row.most_fds} belong to it",
                )
            self._dispatch(message, left)
        except (RefusedError, InUseError) as error:
            self.part(f"refused: {error}")
        except Violation as violation:
            self.part(str(violation))
        except Exception:
            log.exception("%s: a message could not be handled", self.label)
            self.part("a defect of this bus: its log has the traceback")
        finally:
            left.close()

    def _dispatch(self, message: codec.Message, fds: _Descriptors) -> None:
        request, payload = message.request, message.payload
        assert isinstance(request, Request)
        needed = NEEDS.get(request)
        if needed is not None and not needed & self.protocol:
            raise Violation("not-negotiated", f"{request.name} without {needed.name}")
        acknowledge = message.need_reply and bool(self.protocol & ProtocolFeature.REPLY_ACK)

        def done(wrong: int = 0) -> None:
            if acknowledge:
                self.answer(request, m.U64(wrong))

        match request, payload:
            case Request.GET_FEATURES, _:
                self.answer(request, m.U64(self.offered))
            case Request.SET_FEATURES, m.U64(value=bits):
                self._set_features(bits, done)
            case Request.GET_PROTOCOL_FEATURES, _:
                self.answer(request, m.U64(int(self.offered_protocol)))
            case Request.SET_PROTOCOL_FEATURES, m.U64(value=bits):
                self._set_protocol(bits)
                done()
            case Request.GET_QUEUE_NUM, _:
                self.answer(request, m.U64((len(self.vrings) - self.class_.queues_own) // self.class_.queues_each))
            case Request.GET_MAX_MEM_SLOTS, _:
                self.answer(request, m.U64(MAX_MEMORY_SLOTS))
            case Request.SET_OWNER, _:
                done()
            case ((Request.RESET_OWNER | Request.RESET_DEVICE), _):
                self._reset(done)
            case Request.SET_MEM_TABLE, m.MemTable(regions=regions):
                self._change_memory(self._guest.replacing(list(regions), fds.fds), done)
            case Request.ADD_MEM_REG, m.MemRegion() as region:
                self._guest.add(m.Region(region.guest, region.size, region.user, region.offset), fds.fds[0])
                done()
            case Request.REM_MEM_REG, m.MemRegion() as region:
                self._change_memory(partial(self._guest.remove, region), done)
            case Request.SET_BACKEND_REQ_FD, _:
                self._set_backend(fds.take())
                done()
            case Request.GET_CONFIG, m.Config(offset=offset, flags=flags, data=data):
                _, found = self.slot.read_config(offset, len(data))
                # Front-ends ask for the whole layout of their time; what this device has not is zero.
                self.answer(request, m.Config(offset, flags, found.ljust(len(data), b"\0")))
            case Request.SET_CONFIG, m.Config(offset=offset, data=data):
                self._set_config(offset, data, lambda taken: done(0 if taken else REFUSED))
            case Request.SET_STATUS, m.U64(value=value):
                self._set_status(value, done)
            case Request.GET_STATUS, _:
                needs = self.slot.status & Status.DEVICE_NEEDS_RESET if self.slot.owner is self else 0
                self.answer(request, m.U64(int(self.status) | int(needs)))
            case ((Request.SEND_RARP | Request.NET_SET_MTU | Request.SET_LOG_FD), _):
                done()
            case Request.GET_INFLIGHT_FD, m.Inflight(num_queues=queues, queue_size=size):
                self._make_inflight(queues, size)
            case Request.SET_INFLIGHT_FD, m.Inflight() as inflight:
                self._inflight = Inflight.map(inflight, fds.fds[0], len(self.vrings), packed=self._is_packed)
                done()
            case Request.SET_LOG_BASE, m.Log() as dirty:
                self._guest.set_log(dirty, fds.fds[0])
                self._log_writes()
                self.answer(request, m.U64(0))
            case Request.SET_DEVICE_STATE_FD, m.DeviceState() as asked:
                self._must_be_stopped()
                self._state.begin(asked, self._wait_for)
            case Request.CHECK_DEVICE_STATE, _:
                self._must_be_stopped()
                self._state.check(self._wait_for)
            case _:
                self._about_queue(message, fds, done)

    def _about_queue(self, message: codec.Message, fds: _Descriptors, done: Callable[[], None]) -> None:
        request = message.request
        match request, message.payload:
            case Request.SET_VRING_NUM, m.VringState(index=index, num=num):
                vring = self._vring(index)
                # No message says what the device would like: guests of memory-mapped virtio take what QEMU has.
                if not is_size(num, packed=self._is_packed):
                    raise Violation("queue-size", f"queue {index}: {num}; powers of two to {MAX_QUEUE_SIZE}")
                vring.size = num
            case Request.SET_VRING_ADDR, m.VringAddr(index=index) as addr:
                self._vring(index).addr = addr
            case Request.SET_VRING_BASE, m.VringState(index=index, num=num):
                if num > 0xFFFF and not self._is_packed:
                    raise Violation("vring-base", f"queue {index}: {num:#x}")
                if self._is_packed and not num >> 16:
                    # Some say only where to take on: nothing is in flight there.
                    num *= 0x10001
                self._vring(index).base = num
            case Request.GET_VRING_BASE, m.VringState(index=index):
                self._stop(index)
                return
            case Request.SET_VRING_KICK, m.U64(value=value):
                vring = self._vring(value & m.INDEX)
                vring.kick = self._bell(value, fds)
                vring.kicked_in_band = vring.kick is None
                self._listen_to_calls(vring)
                if vring.started:
                    self._listen_to_kicks([vring])
                if vring.kick is not None or not self.protocol & ProtocolFeature.INBAND_NOTIFICATIONS:
                    self._start(vring, done)
                    return
            case Request.SET_VRING_CALL, m.U64(value=value):
                vring = self._vring(value & m.INDEX)
                self._set_call(vring, value, fds)
            case Request.SET_VRING_ERR, m.U64(value=value):
                self._vring(value & m.INDEX).err = self._bell(value, fds)
            case Request.SET_VRING_ENABLE, m.VringState(index=index, num=num):
                if num > 1:
                    raise Violation("vring-enable", f"queue {index}: {num}")
                vring = self._vring(index)
                vring.enabled = bool(num)
                self.slot.pause_queue(self, vring.queue, not vring.enabled)
                if vring.enabled and vring.started and not self.launched:
                    self._launch(done)
                    return
            case Request.VRING_KICK, m.VringState(index=index):
                vring = self._vring(index)
                if self.slot.owner is self:
                    self.slot.kicks[index] += 1
                if vring.kick is None and not vring.kicked_in_band:
                    # Nobody needs to say that there will be no descriptor.
                    vring.kicked_in_band = True
                    self._listen_to_calls(vring)
                if not vring.started:
                    self._start(vring, done)
                    return
                self.slot.mark(vring.queue)
            case _:
                raise Violation("not-offered", f"{request.name}")
        done()

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise Violation("queue-index", f"{index}; {self.slot.name} has {len(self.vrings)} queues")
        return self.vrings[index]

    def answer(self, request: Request, payload: m.Payload, fds: list[int] | None = None) -> None:
        """Send an answer. A front-end that does not read its answers is parted from."""
        if self.is_parted:
            return
        try:
            wire.send(self._sock, codec.encode(request, payload, reply=True), fds)
        except OSError as error:
            self.part(f"its answers cannot be sent: {error.strerror}")

    def _wait(self) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """Read no more until the callback that this makes is called, from any thread: its effect comes first."""
        self._waiting = True
        self.actor.unwatch(self._sock.fileno())
        self.actor.mark_later(self._look_key, LOOK_SECONDS)

        def then(callback: Callable[[], None]) -> Callable[[], None]:
            def resume() -> None:
                if self.is_parted:
                    return
                callback()
                self._waiting = False
                if not self.is_parted:
                    self.actor.watch(self._sock.fileno(), self._readable)

            return lambda: self.actor.post(resume)

        return then

    def _wait_for(self, callback: Callable[[], None]) -> Callable[[], None]:
        """What to call, from any thread, when a message has had its effect, which `callback` then answers."""
        return self._wait()(callback)

    def _look(self) -> bool:
        """Whoever waits for what never comes (a request that is not ended) may go all the same."""
        if self._waiting and not self.is_parted:
            poll = select.poll()
            # Not its own end alone: it may read its last answer.
            poll.register(self._sock, 0)
            if poll.poll(0):
                self.part("it closed the connection")
            else:
                self.actor.mark_later(self._look_key, LOOK_SECONDS)
        return False

    def _must_be_stopped(self) -> None:
        running = [vring.queue.name for vring in self.vrings if vring.started]
        if running:
            raise Violation("device-state-running", f"queues run: {', '.join(running)}")

    # Features and status.

    @property
    def offered(self) -> int:
        """The feature bits, with the one that says that there are protocol features.

        Not RING_RESET: front-ends have no message for it, and some take it for granted that none is needed.
        """
        return self.slot.exposed & ~(1 << features.RING_RESET) | 1 << m.PROTOCOL_FEATURES | 1 << m.LOG_ALL

    @property
    def _is_packed(self) -> bool:
        return bool((self.features or 0) >> features.RING_PACKED & 1)

    @property
    def offered_protocol(self) -> ProtocolFeature:
        """The protocol features of this class of device."""
        offered = PROTOCOL
        if self.class_.config:
            offered |= ProtocolFeature.CONFIG
        if self.slot.has_state:
            offered |= ProtocolFeature.DEVICE_STATE
        return offered

    def _set_protocol(self, bits: int) -> None:
        if bits & ~int(self.offered_protocol):
            raise Violation("protocol-features", f"{bits:#x} of {int(self.offered_protocol):#x}")
        protocol = ProtocolFeature(bits)
        if protocol & ProtocolFeature.INBAND_NOTIFICATIONS and NEEDED_IN_BAND & ~protocol:
            raise Violation("protocol-features", "in-band notifications without BACKEND_REQ and REPLY_ACK")
        self.protocol = protocol

    def _set_features(self, bits: int, done: Callable[[], None]) -> None:
        if bits & ~self.offered:
            raise Violation("features-not-offered", f"{bits:#x} of {self.offered:#x}")
        wanted = self._negotiated(bits)
        self.features = bits
        # That comes and goes with a migration, while the device runs.
        self._log_writes()
        if self.launched and wanted != self.slot.negotiated:
            # A driver that begins anew, without a word of its end.
            self._reset(done, features=bits)
        else:
            done()

    def _negotiated(self, bits: int) -> int:
        """What the device is told of the features that a front-end sets."""
        return bits & ~(1 << m.PROTOCOL_FEATURES | 1 << m.LOG_ALL) | self.class_.features_own & self.slot.exposed

    def _set_status(self, value: int, done: Callable[[], None]) -> None:
        if value == 0:
            self._reset(done, features=self.features)
            return
        self.status = Status(value & 0xFF)
        if self.status & Status.DRIVER_OK and not self.launched:
            self._launch(done)
        else:
            done()

    def _launch(self, done: Callable[[], None]) -> None:
        """The driver is there: start its device, with every ring that is known."""
        rings = {vring.queue.index: self._ring(vring) for vring in self.vrings if vring.started}
        bits = self._negotiated(self.features or 0)
        then = self._wait()
        self.launched = True
        wrong: list[Error] = []

        def launched() -> None:
            if wrong:
                self.part(str(wrong[0]))
            done()

        resumed = then(self._called([self.vrings[index] for index in rings], launched))

        def answered(error: Error | None) -> None:
            if error is not None:
                wrong.append(error)
            resumed()

        self.slot.launch(self, bits, rings, answered)

    def _reset(self, done: Callable[[], None], features: int | None = None) -> None:
        """The driver is gone: its device is reset, and every ring forgotten."""
        then = self._wait()

        def forgotten() -> None:
            self.launched = False
            self.status = Status(0)
            self.features = features
            for vring in self.vrings:
                vring.started = vring.enabled = False
                vring.addr = vring.base = None
            done()

        resumed = then(forgotten)

        def answered(status: int) -> None:
            if status and not self.is_parted:
                # Something of it does not end. The protocol has no word for that: the front-end waits.
                self.slot.set_status(self, 0, answered)
            else:
                resumed()

        if self.slot.owner is self:
            self.slot.set_status(self, 0, answered)
        else:
            resumed()

    # Config space.

    def _set_config(self, offset: int, data: bytes, done: Callable[[bool], None]) -> None:
        answers: list[bool] = []
        resumed = self._wait()(lambda: done(answers[0]))

        def written(taken: bool) -> None:
            if not taken:
                log.debug("%s: %d bytes of config space at %d were refused", self.label, len(data), offset)
            answers.append(taken)
            resumed()

        self.slot.write_config(self, None, offset, data, written)

    # Memory.

    def _change_memory(self, change_it: Callable[[], None], done: Callable[[], None]) -> None:
        """Take memory away, and perhaps give other: when this is answered, nothing uses what was taken."""
        resumed = self._wait()(done)

        def change() -> None:
            # In a turn of the device: none of its queues looks for memory now.
            try:
                if not self.slot.undisturbed(change_it):
                    self.part(f"its memory is in use: what is under way on {self.slot.name} does not end")
            except Violation as violation:
                self.part(str(violation))
            resumed()

        self.slot.actor.post(change)

    def _make_inflight(self, queues: int, queue_size: int) -> None:
        """Memory for requests under way: the front-end keeps it, and gives it to whoever serves it next."""
        Inflight.check(queues, queue_size, len(self.vrings), packed=self._is_packed)
        size = Inflight.room(queues, queue_size)
        fd = os.memfd_create("vbus-inflight", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            self.answer(Request.GET_INFLIGHT_FD, m.Inflight(size, 0, queues, queue_size), [fd])
        finally:
            os.close(fd)

    def _log_writes(self) -> None:
        self._guest.log_writes(bool((self.features or 0) >> m.LOG_ALL & 1))

    # Queues.

    def _bell(self, value: int, fds: _Descriptors) -> _core.Doorbell | None:
        if value & m.NO_FD:
            return None
        fd = fds.take()
        try:
            if not is_eventfd(fd):
                raise Violation("doorbell-kind", "a doorbell that is no eventfd")
            return _core.Doorbell(fd)
        finally:
            os.close(fd)

    def _set_call(self, vring: Vring, value: int, fds: _Descriptors) -> None:
        # Before the descriptor behind it is another.
        self._unlisten(vring)
        vring.has_call = not value & m.NO_FD
        fd = _nobody_listens() if value & m.NO_FD else fds.take()
        try:
            if not is_eventfd(fd):
                raise Violation("doorbell-kind", "a doorbell that is no eventfd")
            os.dup2(fd, vring.call.fileno(), inheritable=False)
        finally:
            os.close(fd)
        self._listen_to_calls(vring)
        if vring.started:
            # What was rung on the descriptor before may have been heard by nobody: QEMU enables a queue with one that
            # it throws away, and names the right one then.
            vring.call.ring()

    def _speaks_in_band(self, vring: Vring) -> bool:
        """Whether its front-end is told in messages about a queue: where it says itself that it kicks so.

        QEMU accepts every protocol feature that it has a number for. It does not know these messages, and closes the
        backend channel at the first.
        """
        return bool(self.protocol & ProtocolFeature.INBAND_NOTIFICATIONS) and vring.kicked_in_band

    def _listen_to_calls(self, vring: Vring) -> None:
        """Hear calls here, to tell them in messages, or do so no more."""
        in_band = self._speaks_in_band(vring) and not vring.has_call
        if in_band and not vring.called_in_band:
            self.actor.watch(vring.call.fileno(), lambda: self._call_in_band(vring))
            vring.called_in_band = True
        elif not in_band:
            self._unlisten(vring)

    def _unlisten(self, vring: Vring) -> None:
        if vring.called_in_band:
            self.actor.unwatch(vring.call.fileno())
            vring.called_in_band = False

    def _call_in_band(self, vring: Vring) -> None:
        """The core rang, and nobody else hears it: say so on the backend channel."""
        vring.call.drain()
        self._say_in_band(BackendRequest.VRING_CALL, vring)

    def _say_in_band(self, request: BackendRequest, vring: Vring) -> None:
        if self._backend is None or self.is_parted:
            return
        try:
            wire.send(self._backend, codec.encode(request, m.VringState(vring.queue.index, 0)), wait=False)
        except OSError as error:
            # A call that is lost is a driver that waits for ever.
            self.part(f"its queues' {request.name} cannot be sent: {error.strerror}")

    def _is_enabled(self, vring: Vring) -> bool:
        """Without protocol features there is no word for it: every queue is."""
        return vring.enabled or not (self.features or 0) >> m.PROTOCOL_FEATURES & 1

    def _start(self, vring: Vring, done: Callable[[], None]) -> None:
        """The queue has its kick: it runs from now on, or as soon as its device does."""
        if vring.addr is None or vring.size == 0:
            raise Violation("ring-not-set-up", f"queue {vring.queue.index} is kicked without an address or a size")
        if vring.started:
            done()
            return
        vring.started = True
        if self.launched:
            ring = self._ring(vring)
            self.slot.start_queue(self, vring.queue.index, ring, self._wait()(self._called([vring], done)))
        elif self._is_enabled(vring):
            self._launch(done)
        else:
            done()

    def _listen_to_kicks(self, vrings: list[Vring]) -> None:
        """Hear the kicks of rings that run: until then, a device's doorbells may be those of another driver."""
        if self.slot.owner is self:
            for vring in vrings:
                if vring.kick is not None:
                    self.slot.attach_doorbell(vring.queue, vring.kick)

    def _called(self, vrings: list[Vring], done: Callable[[], None]) -> Callable[[], None]:
        """Call once for each ring, now that it runs: whoever served it before may have died before it could.

        A driver that is called in vain looks, and waits again. One that is not called waits for ever: with EVENT_IDX
        its event lies behind what is used by then, and nothing that is used later passes it.
        """

        def called() -> None:
            self._listen_to_kicks(vrings)
            for vring in vrings:
                vring.call.ring()
            done()

        return called

    def _ring(self, vring: Vring) -> Ring:
        """Where the core finds it. Violation when that is nowhere."""
        addr = vring.addr
        assert addr is not None
        index = vring.queue.index
        packed = self._is_packed
        inflight = self._inflight.of(index, vring.size, packed=packed) if self._inflight is not None else None
        desc = self._guest.guest_address(f"queue {index}: descriptors", addr.desc)
        base = vring.base
        if inflight is None and packed and not vring.is_known:
            base = self._find(vring, desc)
        vring.is_known = True
        return Ring(
            vring.size,
            desc,
            self._guest.guest_address(f"queue {index}: available ring", addr.avail),
            self._guest.guest_address(f"queue {index}: used ring", addr.used),
            base,
            inflight,
            paused=not self._is_enabled(vring),
        )

    def _find(self, vring: Vring, desc: int) -> int:
        """Where a packed ring goes on whose front-end may know no better than where it began.

        Of a split ring that was served by a process that was killed, a front-end finds the place in the ring (QEMU does
        so of a network, whose requests it keeps nowhere). Of a packed one it does not.
        """
        said = vring.base if vring.base is not None else m.PACKED_BASE
        ring = features.of_ring(self.features or 0)
        if ring["in_order"] or not ring["indirect"] or not self.slot.device.in_order:
            return said
        found = _core.DeviceQueue.recover_place(self.memory, vring.size, desc, said)
        if found != said:
            log.info("%s: queue %d goes on at %#x, not at %#x", self.label, vring.queue.index, found, said)
        return found

    def _stop(self, index: int) -> None:
        vring = self._vring(index)
        then = self._wait()
        base = vring.base if vring.base is not None else m.PACKED_BASE if self._is_packed else 0
        ended: list[int | None] = []

        def stopped() -> None:
            vring.started = False
            end = ended[0] if ended[0] is not None else base
            vring.base = None
            if self.slot.owner is self:
                self.slot.detach_doorbell(vring.queue)
            vring.kick = None
            self.answer(Request.GET_VRING_BASE, m.VringState(index, end))

        resumed = then(stopped)

        def stop(end: int | None) -> None:
            ended.append(end)
            resumed()

        self.slot.stop_queue(self, index, stop)

    # What the slot says.

    def signal(self, slot: Slot, queue: Queue) -> _core.Signal:
        """The queue's call descriptor."""
        return self.vrings[queue.index].signal

    def counters(self, slot: Slot, queue: Queue) -> SignalCounters:
        """Towards the device, every kick is a doorbell; towards the driver, what was counted here."""
        kicks = slot.count_kicks(queue)
        return (kicks, kicks, kicks), self.vrings[queue.index].signal.counters

    def config_changed(self, slot: Slot) -> None:
        """Tell the front-end, once for however many changes it has not heard of."""
        with self._lock:
            first, self._dirty = not self._dirty, True
        if first:
            self.actor.post(self._tell_config)

    def _tell_config(self) -> None:
        with self._lock:
            self._dirty = False
        if self._backend is None or not self.protocol & ProtocolFeature.CONFIG:
            return
        try:
            wire.send(self._backend, codec.encode(BackendRequest.CONFIG_CHANGE_MSG, m.Empty()), wait=False)
        except OSError as error:
            log.warning("%s: a change of config space could not be told: %s", self.label, error.strerror)

    def _set_backend(self, fd: int) -> None:
        try:
            backend = socket.socket(fileno=fd)
        except OSError as error:
            os.close(fd)
            raise Violation("backend-channel", f"is no socket: {error.strerror}") from None
        backend.setblocking(False)
        if self._backend is not None:
            self._backend.close()
        self._backend = backend

    def refuses(self, slot: Slot, field: str) -> str | None:
        """What this class of front-end does not forward."""
        forwarded = self.class_.forwarded
        return None if forwarded is None or field in forwarded else self.class_.why

    def queue_failed(self, slot: Slot, queue: Queue) -> None:
        """Say it on the queue's error descriptor, or in-band."""
        vring = self.vrings[queue.index]
        if vring.err is not None:
            vring.err.ring()
        elif self._speaks_in_band(vring):
            self.actor.post(lambda: self._say_in_band(BackendRequest.VRING_ERR, vring))

    def slot_reset(self, slot: Slot) -> None:
        """Nothing of a reset is left behind: rings are forgotten where it was asked for."""
        slot.kicks = [0] * len(slot.kicks)
        for vring in self.vrings:
            # Its counters begin anew.
            vring.signal = _core.Signal.direct(vring.call)

    # The end.

    def part(self, reason: str) -> None:
        """Part from the front-end: the device is reset, everything is given back, the reason is kept."""
        with self._lock:
            if self.is_parted:
                return
            self.is_parted = True
        self.slot.detach(self)
        self.actor.post(lambda: self._close(reason))

    def _close(self, reason: str) -> None:
        self.slot.detach(self)
        self.actor.unwatch(self._sock.fileno())
        self._reader.close()
        self._sock.close()
        if self._backend is not None:
            self._backend.close()
        for vring in self.vrings:
            self._unlisten(vring)
        self._state.close()
        # It refers to this: doorbells would stay open until cycles are looked for.
        del self._state
        self._guest.clear()
        self._inflight = None
        self.host.parted(self, reason)
        self.actor.close()

    @property
    def is_leaving(self) -> bool:
        """Whether it has gone, or closed its end, even if its last words have not been read yet. From any thread."""
        if self.is_parted:
            return True
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLRDHUP)
            return bool(poll.poll(0))
        except (OSError, ValueError):
            # Closed since.
            return True

    def describe(self) -> dict[str, Any]:
        """The front-end's row in a listing."""
        names = [self.slot.name] if self.slot.owner is self else []
        row = {"peer": self.label, "since": self.since, "devices": names, "channels": []}
        return row | {"memory": "shared", "not_shared": None}


class _Descriptors:
    """The descriptors of one message: whoever takes one has it, the rest are closed."""

    def __init__(self, fds: list[int]) -> None:
        self.fds = fds

    def take(self) -> int:
        if not self.fds:
            raise Violation("descriptor-count", "a descriptor is missing")
        return self.fds.pop(0)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


NEEDS: dict[Request, ProtocolFeature] = {
    Request.GET_QUEUE_NUM: ProtocolFeature.MQ,
    Request.SET_BACKEND_REQ_FD: ProtocolFeature.BACKEND_REQ,
    Request.GET_CONFIG: ProtocolFeature.CONFIG,
    Request.SET_CONFIG: ProtocolFeature.CONFIG,
    Request.RESET_DEVICE: ProtocolFeature.RESET_DEVICE,
    Request.VRING_KICK: ProtocolFeature.INBAND_NOTIFICATIONS,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_LOG_BASE: ProtocolFeature.LOG_SHMFD,
    Request.GET_MAX_MEM_SLOTS: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.ADD_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.REM_MEM_REG: ProtocolFeature.CONFIGURE_MEM_SLOTS,
    Request.SET_STATUS: ProtocolFeature.STATUS,
    Request.GET_STATUS: ProtocolFeature.STATUS,
    Request.SET_DEVICE_STATE_FD: ProtocolFeature.DEVICE_STATE,
    Request.CHECK_DEVICE_STATE: ProtocolFeature.DEVICE_STATE,
}
"""Requests that only a protocol feature allows."""


def _nobody_listens() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
