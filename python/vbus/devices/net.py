"""A network card (virtio 1.4, section 5.1), plugged into itself, a switch of its bus, a file, or a tap of this machine.

What a driver sends comes in batches; each frame's header is read once and checked, and header and frame go to the
backend in one system call on the driver's own memory. What the backend has for the driver is read only as fast as the
driver gives buffers: a tap is not watched while there are none, so that frames wait in the kernel, which tells its
stack about it. Commands change the filter, the pairs in use, and what the tap leaves to the driver.

A frame that is wrong is dropped and counted by what is wrong with it, and the next one goes on; only what breaks the
rules of the queue itself, so that there is nobody to answer, is a violation of the driver.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from uuid import UUID

from vbus import _core, virtio
from vbus.bus import Device, Engine, Queue, Request, attribute
from vbus.devices.buffers import clear, skip, split_last
from vbus.devices.engines import check_engine, not_native
from vbus.devices.net_backends import LONGEST, Backend, Loopback, Pcap, TapBackend
from vbus.devices.net_control import LONGEST_COMMAND, Filter, is_station, obey
from vbus.devices.net_receive import Receiver
from vbus.devices.net_switch import SwitchPort, check_flood_limit
from vbus.errors import Error, UsageError, Violation
from vbus.virtio.net import (
    ACK_ERR,
    ACK_OK,
    DUPLEX_UNKNOWN,
    HEADER,
    MIN_MTU,
    SPEED_UNKNOWN,
    Gso,
    GsoFlags,
    HeaderFlags,
    LinkStatus,
    RxCommand,
    controlq,
    receiveq,
    transmitq,
)

ETHERNET = 14
"""Bytes of a frame's own header: the shortest frame that there is."""
MAX_MTU = 65535
MAX_QUEUE_PAIRS = 8
BUDGET = 64
"""Frames for the driver in one turn; then whatever else waits for this device gets its turn."""
ALWAYS = (
    "MAC",
    "STATUS",
    "MTU",
    "MRG_RXBUF",
    "CTRL_VQ",
    "CTRL_RX",
    "CTRL_RX_EXTRA",
    "CTRL_VLAN",
    "CTRL_MAC_ADDR",
    "GUEST_ANNOUNCE",
)
_PLAIN = bytes(10)
"""A header, without num_buffers, of a frame that is finished."""
_NEEDS_CSUM = int(HeaderFlags.NEEDS_CSUM)
_HOST_KINDS = {"HOST_TSO4": Gso.TCPV4, "HOST_TSO6": Gso.TCPV6, "HOST_USO": Gso.UDP_L4}
_GUEST_KINDS = {
    "GUEST_TSO4": Gso.TCPV4,
    "GUEST_TSO6": Gso.TCPV6,
    "GUEST_USO4": Gso.UDP_L4,
    "GUEST_USO6": Gso.UDP_L4,
}
_QUEUE_SIZE = 256


def station(uuid: UUID) -> bytes:
    """The MAC of a device that was given none: of one station, and given by nobody who gives addresses worldwide."""
    digest = hashlib.sha256(uuid.bytes).digest()
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]


class Net(Device):
    """A network device (virtio 1.4, section 5.1).

    `backend`: `loopback` (what is sent comes back), `switch:NAME` (a port of the bus's switch of this name), `tap:NAME`
    (an interface of this machine, made at plug and gone at unplug, or a persistent tap that is there already) or
    `pcap:FILE` (what is sent is written for Wireshark). `mac`: such as "52:54:00:12:34:56", by default one that follows
    from the device's UUID. `mtu`: 68 to 65535. `queue_pairs`: 1 to 8. `link`: whether it begins up. `engine`: "native"
    or "python", by default native where the bus has workers. Of a switch's port, `isolated`: whether it
    talks with no other isolated one; `flood_limit`: how many frames a second may go to all.
    """

    device_id = virtio.DeviceID.NETWORK
    features = virtio.net.FEATURES
    queues = (Queue("receive0", pull=True, size=_QUEUE_SIZE), Queue("transmit0", size=_QUEUE_SIZE), "control")
    Config = virtio.net.Config
    config: virtio.net.Config

    link = attribute(
        bool,
        tells="status",
        get=lambda net: bool(net.config.status & LinkStatus.LINK_UP),
        set=lambda net, up: net._set_link(up),
        writable=True,
        doc="Whether the link is up. A tap's carrier follows.",
    )
    mac = attribute(
        str,
        tells="mac",
        get=lambda net: net.config.mac.hex(":"),
        set=lambda net, text: net._set_mac(text),
        writable=True,
        doc='The address that the driver is told, such as "52:54:00:12:34:56".',
    )
    mtu = attribute(
        int, config="mtu", set=lambda net, mtu: net._set_mtu(mtu), doc="Bytes of the longest packet, 68 to 65535."
    )
    announce = attribute(
        bool,
        tells="status",
        get=lambda net: bool(net.config.status & LinkStatus.ANNOUNCE),
        set=lambda net, on: net._set_announce(on),
        writable=True,
        doc="Whether the driver is asked to announce its addresses; off again when it has.",
    )
    backend = attribute(str, get=lambda net: str(net._backend), doc="What the device is plugged into.")
    queue_pairs = attribute(int, get=lambda net: net._max_pairs, doc="Pairs of queues that a driver may use.")
    pairs = attribute(int, get=lambda net: net._pairs, doc="Pairs of queues that the driver uses.")
    promiscuous = attribute(bool, get=lambda net: net.filter.promiscuous, doc="Whether frames to any address pass.")

    rx_packets = attribute(
        int,
        get=lambda net: net._counted("rx_packets") + sum(r.packets for r in net._receivers),
        doc="Frames given the driver.",
    )
    rx_bytes = attribute(
        int, get=lambda net: net._counted("rx_bytes") + sum(r.bytes for r in net._receivers), doc="Bytes of those."
    )
    rx_filtered = attribute(
        int,
        get=lambda net: net._counted("rx_filtered") + net._counts["filtered"],
        doc="Frames that the driver did not want.",
    )
    rx_too_long = attribute(
        int,
        get=lambda net: net._counted("rx_too_long") + sum(r.too_long for r in net._receivers),
        doc="Frames longer than the driver's buffers.",
    )
    rx_dropped = attribute(
        int,
        get=lambda net: net._counted("rx_dropped") + net._backend.unread + net._counts["unread"],
        doc="Frames for the driver that were dropped: no buffer, link down, an offload it does not do, or it left.",
    )
    tx_packets = attribute(
        int, get=lambda net: net._counted("tx_packets") + net._counts["sent"], doc="Frames of the driver that went out."
    )
    tx_bytes = attribute(
        int, get=lambda net: net._counted("tx_bytes") + net._counts["sent_bytes"], doc="Bytes of those."
    )
    tx_dropped = attribute(
        int,
        get=lambda net: net._counted("tx_dropped") + net._counts["unsent"],
        doc="Good frames that did not go out: link down, nobody there, or nowhere to go in a switch.",
    )
    tx_errors = attribute(
        int,
        get=lambda net: sum(map(net._wrongs, net._WRONG)),
        doc="Frames of the driver that were wrong, as told below.",
    )
    tx_too_short = attribute(int, get=lambda net: net._wrongs("too_short"), doc="Shorter than an Ethernet header.")
    tx_too_long = attribute(int, get=lambda net: net._wrongs("too_long"), doc="Longer than any packet.")
    tx_bad_checksum = attribute(
        int, get=lambda net: net._wrongs("checksum"), doc="Checksum outside the frame, or not negotiated."
    )
    tx_bad_segments = attribute(
        int, get=lambda net: net._wrongs("segments"), doc="Segments of no kind, size or checksum, or not negotiated."
    )
    tx_bad_header = attribute(int, get=lambda net: net._wrongs("header"), doc="Headers longer than the frame.")
    tx_bad_queue = attribute(int, get=lambda net: net._wrongs("queue"), doc="On a pair that is not in use.")
    tx_refused = attribute(
        int, get=lambda net: net._wrongs("refused"), doc="Not what their header says, says the switch, or the kernel."
    )
    commands = attribute(int, get=lambda net: net._counts["obeyed"], doc="Control commands that were obeyed.")
    commands_refused = attribute(int, get=lambda net: net._counts["refused"], doc="Control commands that were not.")
    tap_lost = attribute(int, get=lambda net: net._counts["lost"], doc="Times that the tap was deleted under us.")

    isolated = attribute(
        bool,
        get=lambda net: net._is_port and net._backend.isolated,
        set=lambda net, on: net._set_isolated(on),
        writable=True,
        doc="Whether this port of a switch talks with no other isolated one.",
    )
    flood_limit = attribute(
        int,
        get=lambda net: net._backend.flood_limit if net._is_port else 0,
        set=lambda net, limit: net._set_flood_limit(limit),
        writable=True,
        doc="Frames a second that this port of a switch may send to all.",
    )
    flooded = attribute(
        int, get=lambda net: net._switched("flooded"), doc="Frames of the driver that the switch sent to all."
    )
    flood_dropped = attribute(
        int, get=lambda net: net._switched("flood_dropped"), doc="Those that were to go to all, beyond the limit."
    )
    learned = attribute(int, get=lambda net: net._switched("learned"), doc="Stations that the switch learned here.")
    moved = attribute(
        int, get=lambda net: net._switched("moved"), doc="Those of them that were at another port before."
    )
    stations = attribute(int, get=lambda net: net._switched("stations"), doc="Stations that are known to be here.")

    def __init__(
        self,
        backend: str = "loopback",
        *,
        mac: str | None = None,
        mtu: int = 1500,
        queue_pairs: int = 1,
        link: bool = True,
        engine: str | None = None,
        isolated: bool = False,
        flood_limit: int | None = None,
    ) -> None:
        if not 1 <= queue_pairs <= MAX_QUEUE_PAIRS:
            raise UsageError(f"net: queue_pairs {queue_pairs} is out of range: 1 to {MAX_QUEUE_PAIRS}")
        self._wanted_engine = check_engine("net", engine)
        self._engines: Sequence[_core.LoopbackEngine | _core.PcapEngine | _core.SwitchEngine | _core.TapEngine] = []
        self._backend = make_backend(backend)
        self._is_port = isinstance(self._backend, SwitchPort)
        if isolated:
            self._set_isolated(isolated)
        if flood_limit is not None:
            self._set_flood_limit(flood_limit)
        self._max_pairs = queue_pairs
        self._pairs = 1
        self._own_mac = None if mac is None else _parse_mac(mac, "net")
        self._counts: Counter[str] = Counter()
        self._past: Counter[str] = Counter()
        """What engines of former places counted."""
        self._driven = False
        self._wrong: Counter[str] = Counter()
        queues = []
        for pair in range(queue_pairs):
            queues.append(Queue(f"receive{pair}", pull=True, size=_QUEUE_SIZE))
            queues.append(Queue(f"transmit{pair}", size=_QUEUE_SIZE))
        self.declare_queues([*queues, "control"])
        self._receivers = [Receiver(self._queues[receiveq(pair)]) for pair in range(queue_pairs)]
        self.config.mac = self._own_mac or bytes(6)
        self.config.status = int(LinkStatus.LINK_UP) if link else 0
        self.config.max_virtqueue_pairs = queue_pairs
        self.config.speed = SPEED_UNKNOWN
        self.config.duplex = DUPLEX_UNKNOWN
        self.mtu = mtu
        self.filter = Filter(self.config.mac)
        self._csum = False
        self._host_kinds: set[int] = set()
        self._guest_csum = False
        self._guest_kinds: set[int] = set()

    def offered_features(self) -> Iterable[str]:
        """What the class can, as far as the backend and the number of pairs go."""
        return (*ALWAYS, *(["MQ"] if self._max_pairs > 1 else []), *self._backend.features)

    # Coming and going.

    def plugged(self) -> None:
        """Open the backend. UsageError when it cannot be opened."""
        if self._own_mac is None:
            self._own_mac = station(self.slot.uuid)
            self.config.mac = self._own_mac
        with self._lock:
            if self._backend.lost:
                self.config.status |= LinkStatus.LINK_UP
            self._backend.open(self.log, pairs=self._max_pairs, mtu=self.config.mtu, link=self.link)
        if isinstance(self._backend, SwitchPort):
            # They are the port's pairs, whoever serves them.
            wakes = [self.slot.call_signal(partial(self._pump, pair)) for pair in range(self._max_pairs)]
            pairs = [(rx.core, tx.core, wake) for (rx, tx), wake in zip(self._pair_queues(), wakes, strict=True)]
            self._engines = self._backend.join(self.bus, pairs, self.slot.engine_signal())

    def unplugged(self) -> None:
        """Close the backend; a tap that was made for this is gone then."""
        self._unwatch()
        engines, self._engines = self._engines, []
        for engine in engines:
            self._past += Counter(engine.counters)
            if isinstance(engine, _core.TapEngine):
                engine.close()
        with self._lock:
            self._backend.close()

    def _pair_queues(self) -> list[tuple[Queue, Queue]]:
        return [(self._queues[receiveq(pair)], self._queues[transmitq(pair)]) for pair in range(self._max_pairs)]

    def engines(self) -> Sequence[Engine]:
        """One for each pair. UsageError when one was asked for in vain."""
        if self._wanted_engine == "python":
            not_native(self, None, "as it was asked for")
            return []
        if self.bus.workers.count == 0:
            not_native(self, self._wanted_engine, "the bus has no workers")
            return []
        signal = self.slot.engine_signal()
        if isinstance(self._backend, Loopback):
            self._engines = [_core.LoopbackEngine(rx.core, tx.core, signal) for rx, tx in self._pair_queues()]
        elif isinstance(self._backend, TapBackend):
            fds = self._backend.tap.fds
            pairs = zip(self._pair_queues(), fds, strict=True)
            self._engines = [_core.TapEngine(rx.core, tx.core, fd, signal) for (rx, tx), fd in pairs]
        elif isinstance(self._backend, Pcap):
            file = self._backend.file
            self._engines = [_core.PcapEngine(rx.core, tx.core, file, signal) for rx, tx in self._pair_queues()]
        self._tell_engines()
        may_wait = isinstance(self._backend, Pcap)
        return [Engine(core, queues, may_wait) for core, queues in zip(self._engines, self._pair_queues(), strict=True)]

    def engine_serves(self, queue: Queue) -> bool:
        """Without MQ there is one pair, and commands come on what would be the next."""
        return queue.index < controlq(1) or self.has("MQ")

    def engine_yielded(self, queue: Queue) -> None:
        """Frames that wait for buffers go on to wait here, before all that come."""
        pair, is_transmit = divmod(queue.index, 2)
        # Of one that leaves its bus there are none any more, and nothing waits.
        if not is_transmit and pair < len(self._engines):
            wanted, packets = self._engines[pair].hand_over()
            if wanted and packets:
                self._receivers[pair].keep(packets.pop(0))
            self._backend.put_back(pair, packets)

    def _tell_engines(self) -> None:
        """What holds now; no frame goes by what held before when this returns."""
        wanted = self.filter
        for pair, engine in enumerate(self._engines):
            rules = _core.NetRules(
                link=self._driven and bool(self.config.status & LinkStatus.LINK_UP),
                in_use=pair < self._pairs,
                merge=self._receivers[pair].merge,
                csum=self._csum,
                host_kinds=sorted(self._host_kinds),
                guest_csum=self._guest_csum,
                guest_kinds=sorted(self._guest_kinds),
                promiscuous=RxCommand.PROMISC in wanted.modes,
                told=wanted.told,
                modes=[mode.name for mode in wanted.modes],
                mac=wanted.mac,
                unicast=list(wanted.unicast),
                multicast=list(wanted.multicast),
                vlans=None if wanted.vlans is None else sorted(wanted.vlans),
            )
            engine.set_rules(rules)
            if isinstance(engine, _core.TapEngine):
                # What it left where it is may be to be read now.
                self.slot.mark(self._receivers[pair].queue)

    def engine_failed(self, error: OSError) -> None:
        """There is no tap any more, or a file takes no more."""
        if not self._backend.survives(error):
            self._lose(error)

    _WRONG = ("too_short", "too_long", "checksum", "segments", "header", "queue", "refused")

    def _counted(self, name: str) -> int:
        """What engines counted of this."""
        return self._past[name] + sum(engine.counters.get(name, 0) for engine in self._engines)

    def _switched(self, name: str) -> int:
        """What the port of a switch counted of this."""
        return self._backend.counted(name) if isinstance(self._backend, SwitchPort) else 0

    def _wrongs(self, name: str) -> int:
        return self._counted(name) + self._wrong[name]

    def ready(self) -> None:
        """A driver is there: what it negotiated decides what goes through."""
        self._driven = True
        self.filter = Filter(self.config.mac, vlans=self.has("CTRL_VLAN"))
        self._csum = self.has("CSUM")
        self._host_kinds = _kinds(_HOST_KINDS, [name for name in self.features if self.has(name)], "HOST_ECN")
        for receiver in self._receivers:
            receiver.reset()
            receiver.merge = self.has("MRG_RXBUF")
        self.use_offloads(tuple(name for name in self._backend.features if name[:6] == "GUEST_" and self.has(name)))
        self._tell_engines()
        self._watch(0)

    def queues_changed(self) -> None:
        """Without the control queue somebody else answers commands, and shows their effect by the queues that it has
        served; what is filtered is theirs too.
        """
        if not self._queues[controlq(self._max_pairs)].served:
            self.filter = Filter(self.config.mac)
            pairs = [
                self._queues[receiveq(p)].served and self._queues[transmitq(p)].served for p in range(self._max_pairs)
            ]
            self.use_pairs(max(1, sum(pairs)))
            self._tell_engines()

    def queue_stopping(self, queue: Queue) -> bool:
        """Buffers were taken ahead: a driver that stops its queue shall not wait for packets to come."""
        receiver = next((receiver for receiver in self._receivers if receiver.queue is queue), None)
        if receiver is not None:
            receiver.let_go()
        return receiver is not None

    def reset(self) -> None:
        """Forget the driver and all that it said."""
        self._driven = False
        self._unwatch()
        self._backend.forget()
        for receiver in self._receivers:
            self._counts["unread"] += receiver.forget()
            receiver.reset()
        if self.config.status & LinkStatus.ANNOUNCE or self.config.mac != self._own_mac:
            with self._lock:
                self.config.status &= ~LinkStatus.ANNOUNCE
                self.config.mac = self._own_mac or self.config.mac
            self.config_changed()
        self.filter = Filter(self.config.mac)
        self._csum = False
        self._host_kinds = set()
        self.use_offloads(())
        self.use_pairs(1)
        self._tell_engines()

    def _watch(self, pair: int) -> None:
        fd = self._backend.fileno(pair)
        if fd is not None and not self._receivers[pair].queue.core.native:
            self.watch(fd, partial(self._pump, pair))

    def _unwatch(self) -> None:
        for pair in range(self._max_pairs):
            fd = self._backend.fileno(pair)
            if fd is not None:
                self.unwatch(fd)

    # What an operator sets.

    def _set_link(self, up: bool) -> bool:
        with self._lock:
            if up == self.link:
                return up
            if self._slot is not None:
                if up and self._backend.lost:
                    raise UsageError(f"{self.name}: {self._backend} is gone: unplug the device, and plug it again")
                try:
                    if not self._backend.lost:
                        self._backend.set_link(up)
                except OSError as error:
                    raise UsageError(f"{self.name}: {self._backend}: {error.strerror}") from None
            status = self.config.status & ~LinkStatus.LINK_UP
            if up:
                status |= LinkStatus.LINK_UP
                # Others may have learned meanwhile that the driver's addresses are elsewhere.
                if self._slot is not None and self.has("GUEST_ANNOUNCE"):
                    status |= LinkStatus.ANNOUNCE
            self.config.status = int(status)
        self._tell_engines()
        self.config_changed()
        return up

    def _set_mac(self, text: str) -> str:
        mac = _parse_mac(text, self.name)
        with self._lock:
            self._own_mac = self.config.mac = self.filter.mac = mac
        self._tell_engines()
        self.config_changed()
        return text

    def _set_mtu(self, mtu: int) -> int:
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise UsageError(f"{self.name}: mtu {mtu} is out of range: {MIN_MTU} to {MAX_MTU}")
        if self._slot is not None and mtu != self.config.mtu:
            with self._lock:
                try:
                    self._backend.set_mtu(mtu)
                except Error as error:
                    raise UsageError(f"{self.name}: {error}") from None
        return mtu

    def _set_isolated(self, on: bool) -> bool:
        if not isinstance(self._backend, SwitchPort):
            raise UsageError(f"{self.name}: isolated: {self._backend} is no port of a switch (backend switch:NAME)")
        self._backend.isolate(on)
        return on

    def _set_flood_limit(self, limit: int) -> int:
        if not isinstance(self._backend, SwitchPort):
            raise UsageError(f"{self.name}: flood_limit: {self._backend} is no port of a switch (backend switch:NAME)")
        self._backend.limit_floods(check_flood_limit(self.name, limit))
        return limit

    def _set_announce(self, on: bool) -> bool:
        with self._lock:
            if on and not self.has("GUEST_ANNOUNCE"):
                raise UsageError(f"{self.name}: there is no driver that could announce anything")
            rest = self.config.status & ~LinkStatus.ANNOUNCE
            self.config.status = int(rest | LinkStatus.ANNOUNCE if on else rest)
        self.config_changed()
        return on

    # From the driver.

    def handle_batch(self, queue: Queue, requests: Sequence[Request]) -> None:
        """Send frames, or obey commands, in order. Violation: tx-header-short, control-no-ack, control-elsewhere."""
        pair, is_transmit = divmod(queue.index, 2)
        done = 0
        try:
            for request in requests:
                if is_transmit:
                    self._transmit(pair, request)
                else:
                    self._command(queue, request)
                done += 1
        finally:
            # Those before a bad one are answered, whatever it was.
            if is_transmit:
                lost, lost_bytes = self._backend.flush()
                self._counts["sent"] -= lost
                self._counts["sent_bytes"] -= lost_bytes
                self._counts["unsent"] += lost
            queue.complete(*requests[:done])
        if is_transmit and self._backend.echoes:
            self._pump(pair)

    def _transmit(self, pair: int, request: Request) -> None:
        size = request.readable_total - HEADER.size
        if size < 0:
            raise Violation("tx-header-short", f"{request.readable_total} readable bytes; a header has {HEADER.size}")
        header = request.read(HEADER.size)
        wrong = None
        if size < ETHERNET:
            wrong = "too_short"
        elif size > LONGEST:
            wrong = "too_long"
        elif pair >= self._pairs:
            wrong = "queue"
        elif header[:10] != _PLAIN:
            header, wrong = self._checked(header, size)
        if wrong is not None:
            self._wrong[wrong] += 1
            return
        if not self.config.status & LinkStatus.LINK_UP:
            self._counts["unsent"] += 1
            return
        try:
            self._backend.write(pair, header, skip(request.views()[0], HEADER.size))
        except OSError as error:
            self._not_sent(error)
            return
        self._counts["sent"] += 1
        self._counts["sent_bytes"] += size

    def _checked(self, header: bytes, size: int) -> tuple[bytes, str | None]:
        """What of a frame's header may go on, and what is wrong with it. `size`: bytes of the frame."""
        flags, gso, header_size, gso_size, start, offset, _ = HEADER.unpack(header)
        # Bits that a driver must not set, or that nobody knows, mean nothing (section 5.1.6.2.2).
        flags &= _NEEDS_CSUM
        if flags and (not self._csum or start < ETHERNET or start + offset + 2 > size):
            return header, "checksum"
        if header_size > size:
            return header, "header"
        if gso == Gso.NONE:
            gso_size = 0
        elif gso not in self._host_kinds or not flags or not 0 < gso_size <= size:
            return header, "segments"
        return HEADER.pack(flags, gso, header_size, gso_size, start, offset, 0), None

    def _not_sent(self, error: OSError) -> None:
        match error.errno:
            case errno.EINVAL | errno.EMSGSIZE:
                self._wrong["refused"] += 1
            case errno.EIO | errno.EAGAIN | errno.ENOBUFS | errno.ENOMEM:
                # A tap that an operator has set down, or a kernel without memory.
                self._counts["unsent"] += 1
            case _:
                self._counts["unsent"] += 1
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        """The other end is gone for good: to the driver, a link without a partner."""
        if self._backend.lost:
            return
        self._unwatch()
        with self._lock:
            self._backend.lost = True
            self._counts["lost"] += 1
            self.config.status &= ~LinkStatus.LINK_UP
        self.log.error("%s is gone (%s): the link is down until it is plugged again", self._backend, error.strerror)
        self._tell_engines()
        self.config_changed()

    # To the driver.

    def available(self, queue: Queue) -> None:
        """The driver has put up buffers, or, where pairs were not negotiated, commands."""
        if queue.index == controlq(1) and not self.has("MQ"):
            self._commands(queue)
            return
        pair = queue.index // 2
        if pair < self._pairs:
            # It waited for buffers, or was served natively before.
            self._watch(pair)
        self._pump(pair)

    def _pump(self, pair: int) -> None:
        """Give the driver what there is for this pair, within the budget."""
        receiver = self._receivers[pair]
        if pair >= self._pairs or receiver.queue.core.native:
            return
        try:
            self._fill(pair, receiver)
        except Violation as violation:
            receiver.publish()
            self.slot.violated(violation, receiver.queue)
        except OSError as error:
            self._lose(error)
        receiver.publish()

    def _fill(self, pair: int, receiver: Receiver) -> None:
        read = self._backend.read
        for _ in range(BUDGET):
            if not receiver.has_room():
                self._pause(pair)
                return
            packet = read(pair)
            if packet is None:
                return
            if self._admits(packet) and not receiver.put(packet):
                self._pause(pair)
                return
        # A descriptor that is still readable brings us back by itself.
        if self._backend.fileno(pair) is None:
            self.slot.mark(receiver.queue)

    def _pause(self, pair: int) -> None:
        """Leave what comes where it is, until there are buffers."""
        fd = self._backend.fileno(pair)
        if fd is not None:
            self.unwatch(fd)

    def _admits(self, packet: memoryview) -> bool:
        """Whether the driver gets this packet; what it must not see of the header is taken out."""
        if len(packet) > HEADER.size + LONGEST or not self.config.status & LinkStatus.LINK_UP:
            self._counts["unread"] += 1
            return False
        # What was in the tap before the driver's choice is as it was.
        if (packet[1] and packet[1] not in self._guest_kinds) or (packet[0] & _NEEDS_CSUM and not self._guest_csum):
            self._counts["unread"] += 1
            return False
        if not self._guest_csum:
            packet[0] = 0
        if not self.filter.is_open and not self.filter.passes(packet[HEADER.size :]):
            self._counts["filtered"] += 1
            return False
        return True

    # Commands.

    def _commands(self, queue: Queue) -> None:
        for _ in range(BUDGET):
            request = queue.take()
            if request is None:
                return
            self._command(queue, request)
            queue.complete(request)
        self.slot.mark(queue)

    def _command(self, queue: Queue, request: Request) -> None:
        if queue.index != controlq(self._max_pairs if self.has("MQ") else 1):
            raise Violation("control-elsewhere", f"commands on queue {queue.index}, without MQ")
        if not request.writable_total:
            raise Violation("control-no-ack", "no writable byte for the answer")
        fits = request.readable_total <= LONGEST_COMMAND
        obeyed = fits and self.has("CTRL_VQ") and obey(self, request.read())
        if obeyed:
            self._tell_engines()
        self._counts["obeyed" if obeyed else "refused"] += 1
        rest, ack = split_last(request.views()[1])
        clear(rest)
        ack[0] = ACK_OK if obeyed else ACK_ERR
        request.written = request.writable_total

    def use_mac(self, mac: bytes) -> None:
        """The driver changes its address, until it is reset."""
        with self._lock:
            self.config.mac = self.filter.mac = mac
        self.config_changed()

    def announced(self) -> None:
        """The driver has announced its addresses."""
        with self._lock:
            self.config.status &= ~LinkStatus.ANNOUNCE
        self.config_changed()

    def use_pairs(self, pairs: int) -> None:
        """Use the first `pairs`; what the tap had for others is lost, as it is when a queue of it is taken away."""
        before, self._pairs = self._pairs, pairs
        if pairs == before:
            return
        for pair in range(pairs, before):
            fd = self._backend.fileno(pair)
            if fd is not None:
                self.unwatch(fd)
            self._counts["unread"] += self._receivers[pair].forget()
        if pairs < before:
            # Before they are taken away: to read one then is an error.
            self._tell_engines()
        try:
            self._backend.set_pairs(pairs)
        except OSError as error:
            self._lose(error)
        for pair in range(before, pairs):
            self._watch(pair)

    def use_offloads(self, names: tuple[str, ...]) -> None:
        """What the driver finishes by itself: without checksums nothing at all (section 5.1.3.1)."""
        if "GUEST_CSUM" not in names:
            names = ()
        self._guest_csum = bool(names)
        self._guest_kinds = _kinds(_GUEST_KINDS, names, "GUEST_ECN")
        if not self._guest_kinds & {Gso.TCPV4, Gso.TCPV6}:
            names = tuple(name for name in names if name != "GUEST_ECN")
        try:
            self._backend.set_offloads(names)
        except OSError as error:
            self._lose(error)


def make_backend(text: str) -> Backend:
    """The backend that a person means. UsageError when it is none."""
    kind, colon, rest = text.partition(":")
    match kind:
        case "loopback" if not colon:
            return Loopback()
        case "switch" if rest:
            return SwitchPort(rest)
        case "tap" if rest:
            return TapBackend(rest)
        case "pcap" if rest:
            return Pcap(rest)
    near = difflib.get_close_matches(kind, ("loopback", "switch", "tap", "pcap"), n=1)
    hint = f"did you mean {near[0]!r}? " if near and near[0] != kind else ""
    raise UsageError(f"net backend {text!r}: {hint}it is loopback, switch:NAME, tap:NAME or pcap:FILE")


def _kinds(known: Mapping[str, Gso], names: Iterable[str], ecn: str) -> set[int]:
    """The values of gso_type that go with these features."""
    chosen = set(names)
    kinds = {int(kind) for name, kind in known.items() if name in chosen}
    return kinds | {kind | int(GsoFlags.ECN) for kind in kinds - {Gso.UDP_L4} if ecn in chosen}


def _parse_mac(text: str, where: str) -> bytes:
    """An address that a person wrote, with colons or dashes. UsageError."""
    try:
        mac = bytes(int(part, 16) for part in text.replace("-", ":").split(":"))
    except ValueError:
        mac = b""
    if not is_station(mac):
        raise UsageError(f"{where}: mac {text!r} is no address of a device, such as 52:54:00:12:34:56")
    return mac
