"""A driver for the network device (virtio 1.4, section 5.1): frames, sent and received in batches.

Receive buffers are always with the device while somebody takes the frames. What arrives is put together where it came
in several buffers, checked, and waits for `recv`, or goes straight to a sink on the thread that answers the bus. When
too much waits, the device gets no more buffers, and drops. Buffers go back to the device a quarter of them at a time,
frames are sent as many as there are: either side is signalled once for all of them.

With offloads a frame may be larger than any wire takes, and its checksum may be missing: the header in front of it
says what is to be done. So only those negotiate them that pass the header on (`OffloadNet`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from ipaddress import IPv4Address
from typing import ClassVar

from vbus import virtio
from vbus.errors import DriverError, UsageError
from vbus.proxy.driver import Driver
from vbus.proxy.drivers.waiting import wait
from vbus.proxy.queue import Answer, RemoteQueue
from vbus.proxy.remote import RemoteDevice
from vbus.virtio.net import (
    ACK_ERR,
    ACK_OK,
    CONTROL,
    HEADER,
    MAX_QUEUE_PAIRS,
    MIN_MTU,
    AnnounceCommand,
    ControlClass,
    Gso,
    GsoFlags,
    HeaderFlags,
    LinkStatus,
    MacCommand,
    MqCommand,
    RxCommand,
    controlq,
    receiveq,
    transmitq,
)

Buffer = bytes | bytearray | memoryview

ETHERNET = 14
"""Bytes of a frame's own header, the shortest frame that there is."""
VLAN_TAG = 4
DEFAULT_MTU = 1500
LONGEST = ETHERNET + 40 + 65535
"""Bytes of the longest frame: 14 of Ethernet, 40 of IPv6, and its payload."""
NO_HEADER = bytes(HEADER.size)
"""The header of a frame that is finished."""
PAGE = 4096
BIG = 64 << 10
"""Bytes of a receive buffer that most of the longest frames fit into."""
RECEIVE_BYTES = 8 << 20
"""Bytes of receive buffers of all pairs together."""
FEWEST = 8
"""Receive buffers of a pair, if the ring takes them."""
UNREAD_FRAMES, UNREAD_BYTES = 1024, 4 << 20
"""What may wait for a reader before the device gets no more buffers."""
MOST_PAIRS = 16
"""Pairs of queues that are set up; a device that has more is used with one."""

NEEDS = {
    "CTRL_RX": ("CTRL_VQ",),
    "CTRL_VLAN": ("CTRL_VQ",),
    "CTRL_MAC_ADDR": ("CTRL_VQ",),
    "GUEST_ANNOUNCE": ("CTRL_VQ", "STATUS"),
    "MQ": ("CTRL_VQ",),
    "GUEST_TSO4": ("GUEST_CSUM",),
    "GUEST_TSO6": ("GUEST_CSUM",),
    "GUEST_ECN": ("GUEST_CSUM", "GUEST_TSO4", "GUEST_TSO6"),
    "HOST_TSO4": ("CSUM",),
    "HOST_TSO6": ("CSUM",),
    "HOST_ECN": ("CSUM", "HOST_TSO4", "HOST_TSO6"),
    "GUEST_USO4": ("GUEST_CSUM",),
    "GUEST_USO6": ("GUEST_CSUM",),
    "HOST_USO": ("CSUM",),
}
"""Features that must not be taken without others (section 5.1.3.1)."""


class Net(Driver):
    """A network interface that moves whole Ethernet frames. Any thread may use it.

    Frames are bytes, without checksum at the end. Errors are `DriverError`s: EMSGSIZE and EINVAL for a frame that is
    too long or too short, EOPNOTSUPP for what was not negotiated, EIO when the device broke a rule, ENODEV,
    ECONNRESET, ESHUTDOWN, ETIMEDOUT.
    """

    device_id = virtio.DeviceID.NETWORK
    features = virtio.net.FEATURES
    # Not CTRL_VLAN: whoever takes it gets no tagged frames until it has asked for each tag.
    wanted: ClassVar[tuple[str, ...]] = (
        "MAC",
        "STATUS",
        "MTU",
        "MRG_RXBUF",
        "CTRL_VQ",
        "CTRL_RX",
        "CTRL_MAC_ADDR",
        "GUEST_ANNOUNCE",
        "MQ",
    )
    Config = virtio.net.Config

    on_change: Callable[[], None] | None = None
    """Called when `link`, `mtu` or `mac` has changed, on the hooks' thread, which may ask the bus."""
    on_failed: Callable[[DriverError], None] | None = None
    """Called when the device serves no more, on any thread; must not wait for the bus."""

    def __init__(self, device: RemoteDevice) -> None:
        self._arrived = threading.Condition()
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._error: DriverError | None = None
        self._sink: Callable[[int, bytes], None] | None = None
        self._receivers: list[_Receiver] = []
        self._link = True
        self._mtu = DEFAULT_MTU
        self._mac = b""
        self._own_mac = False
        self._pairs = 1
        self._following = threading.Lock()
        self.addresses: set[IPv4Address] = set()
        """Addresses that are announced when the device asks for that."""
        self.dropped: Counter[str] = Counter()
        """Frames of the device that were not passed on, by reason: short, long, header."""
        self.received = 0
        """Frames that were passed on."""
        names = self._agreeable(device)
        self.max_pairs = self._pairs_of(device) if "MQ" in names else 1
        """Pairs of queues that `set_queue_pairs` takes."""
        if self.max_pairs > MOST_PAIRS:
            names.remove("MQ")
            self.max_pairs = 1
        count = controlq(self.max_pairs) + ("CTRL_VQ" in names)
        # What a class says of all of its drivers depends here on the device.
        self.wanted, self.queue_count = tuple(names), count  # type: ignore[misc]
        super().__init__(device)

    def _agreeable(self, device: RemoteDevice) -> list[str]:
        """The wanted features that the device offers together with what they need."""
        offered = self.features.names_of(device.offered)
        names = [name for name in self.wanted if name in offered]
        for name in list(names):
            needed = NEEDS.get(name, ())
            # ECN needs one of the two kinds of segmentation, everything else all that it names.
            enough = any if name.endswith("_ECN") else all
            if needed and not (needed[0] in names and enough(other in names for other in needed[1:] or needed)):
                names.remove(name)
        return names

    def _pairs_of(self, device: RemoteDevice) -> int:
        pairs = virtio.net.Config.from_bytes(device.config()).max_virtqueue_pairs
        if not 1 <= pairs <= MAX_QUEUE_PAIRS or controlq(pairs) >= device.max_queues:
            raise DriverError(
                errno.EIO, f"{device.name} says that it has {pairs} pairs of queues, and has {device.max_queues} queues"
            )
        return pairs

    def started(self) -> None:
        """Read what the device is like, and give it its first receive buffers. DriverError EIO for nonsense."""
        if len(self.device.queues) < self.queue_count:
            raise DriverError(
                errno.EIO, f"{self.device.name} has {len(self.device.queues)} queues of {self.queue_count}"
            )
        config = self._read_config()
        if self.has("MAC") and not _is_station(config.mac):
            raise DriverError(errno.EIO, f"{self.device.name} says that its address is {config.mac.hex(':')}")
        self._mac = bytes([0x52, 0x54, 0x00]) + os.urandom(3)
        if self.has("MTU") and config.mtu < MIN_MTU:
            raise DriverError(errno.EIO, f"{self.device.name} says that its mtu is {config.mtu}")
        self._follow(config)
        csum = self.has("GUEST_CSUM")
        self._no_flags = 0 if csum else int(HeaderFlags.NEEDS_CSUM)
        self._gso = {int(Gso.NONE)}
        for name, kind in (("GUEST_TSO4", Gso.TCPV4), ("GUEST_TSO6", Gso.TCPV6)):
            if self.has(name):
                self._gso |= {int(kind)} | ({kind | GsoFlags.ECN} if self.has("GUEST_ECN") else set())
        if self.has("GUEST_USO4") or self.has("GUEST_USO6"):
            self._gso.add(int(Gso.UDP_L4))
        self._receivers = [
            _Receiver(self, pair, self.queue(receiveq(pair)), self.max_pairs) for pair in range(self.max_pairs)
        ]
        self._receivers[0].post()
        if config.status & LinkStatus.ANNOUNCE:
            self._announce()

    def removed(self) -> None:
        """Let nobody wait any more."""
        error = self.device.remote.lost or DriverError(errno.ENODEV, f"{self.device.name} was removed")
        self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Nothing comes any more: the first reason stays."""
        if not isinstance(error, DriverError):
            error = DriverError(errno.EIO, str(error))
        with self._arrived:
            if self._error is not None:
                return
            self._error = error
            self._arrived.notify_all()
        if self.on_failed is not None:
            self.on_failed(error)

    def _violated(self, name: str, detail: str) -> None:
        """The device broke a rule: nothing that it says can be believed until it is reset."""
        reason = f"{name}: {detail}"
        self._fail(DriverError(errno.EIO, f"{self.device.name} needs a reset: {reason}"))
        self.device.broken(reason)

    # What the device is like.

    def _read_config(self) -> virtio.net.Config:
        return virtio.net.Config.from_bytes(self.device.config())

    def config_changed(self) -> None:
        """Follow link, MTU and address, and announce the addresses when the device asks for that."""
        # An error here is one of the device or the link, which the queues will tell.
        with contextlib.suppress(DriverError):
            # Asked under the lock, so that of two answers the later one stays.
            with self._following:
                config = self._read_config()
                before = self._link, self._mtu, self._mac
                if self.has("MTU") and config.mtu < MIN_MTU:
                    self._violated("net-mtu", f"an mtu of {config.mtu}")
                    return
                self._follow(config)
                changed = before != (self._link, self._mtu, self._mac)
            if changed and self.on_change is not None:
                self.on_change()
            if self.has("GUEST_ANNOUNCE") and config.status & LinkStatus.ANNOUNCE:
                self._announce()

    def _follow(self, config: virtio.net.Config) -> None:
        if self.has("STATUS"):
            self._link = bool(config.status & LinkStatus.LINK_UP)
        if self.has("MTU"):
            self._mtu = config.mtu
        if self.has("MAC") and not self._own_mac and _is_station(config.mac):
            self._mac = config.mac

    @property
    def mac(self) -> bytes:
        """The device's address, 6 bytes; one of our own where it has none. Follows the device until `set_mac`."""
        return self._mac

    @property
    def mtu(self) -> int:
        """Bytes of the longest packet, Ethernet's header apart; follows the device."""
        return self._mtu

    @property
    def link(self) -> bool:
        """Whether the link is up; follows the device."""
        return self._link

    @property
    def pairs(self) -> int:
        """Pairs of queues in use."""
        return self._pairs

    @property
    def failed(self) -> DriverError | None:
        """Why the device serves no more, if it does not."""
        return self._error

    # Sending.

    def send(self, frames: Iterable[Buffer], *, pair: int = 0) -> Future[int]:
        """Send a batch of finished frames; the future gives their number when the device has taken all of them.

        DriverError EMSGSIZE, EINVAL at once for a frame that is too long or too short; then none of them is sent. More
        than the ring takes wait in order: whoever never waits for a future has all of them in memory.
        """
        longest = ETHERNET + VLAN_TAG + self._mtu
        batch = []
        for frame in frames:
            if not ETHERNET <= len(frame) <= longest:
                raise self._wrong_length(len(frame), longest)
            batch.append(NO_HEADER + frame)
        return self._send(batch, pair)

    def send_raw(self, frames: Iterable[Buffer], *, pair: int = 0, answer: Answer | None = None) -> Future[int]:
        """As `send`, for frames with their header of 12 bytes in front, which says what the device has to finish.

        `answer`, if given, is told of every frame by itself, and the future of nothing.
        """
        batch = []
        for frame in frames:
            # The kind of segmentation: a frame that the device cuts up may be of any length.
            if len(frame) < HEADER.size + ETHERNET:
                raise self._wrong_length(len(frame) - HEADER.size, LONGEST)
            longest = LONGEST if frame[1] else ETHERNET + VLAN_TAG + self._mtu
            if len(frame) > HEADER.size + longest:
                raise self._wrong_length(len(frame) - HEADER.size, longest)
            batch.append(frame)
        return self._send(batch, pair, answer)

    def _wrong_length(self, length: int, longest: int) -> DriverError:
        number = errno.EINVAL if length < ETHERNET else errno.EMSGSIZE
        return DriverError(number, f"{self.device.name}: a frame of {length} bytes; {ETHERNET} to {longest} are frames")

    def _send(self, batch: Sequence[Buffer], pair: int, answer: Answer | None = None) -> Future[int]:
        if not 0 <= pair < self._pairs:
            raise DriverError(errno.EINVAL, f"{self.device.name}: no pair {pair}, {self._pairs} in use")
        sent = _Batch(len(batch))
        told = answer or sent
        if batch:
            self.queue(transmitq(pair)).submit_many((told, (frame,), 0) for frame in batch)
        return sent.future

    # Receiving.

    def recv(self, max: int = 64, timeout: float | None = None) -> list[bytes]:
        """The frames that there are, at least one and at most `max`; waits for the first.

        None waits for as long as the device serves. What arrived before an error is given first. UsageError when
        offloads were negotiated: then frames may be unfinished, and `recv_raw` gives the headers that say so.
        """
        if self.has("GUEST_CSUM"):
            raise UsageError(f"{self.device.name} may give unfinished frames: recv_raw gives them with their headers")
        return [frame[HEADER.size :] for frame in self.recv_raw(max, timeout)]

    def recv_raw(self, max: int = 64, timeout: float | None = None) -> list[bytes]:
        """As `recv`, each frame with its header of 12 bytes in front; `num_buffers` in it means nothing any more."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._arrived:
            while not self._frames:
                if self._error is not None:
                    raise DriverError(self._error.errno or errno.EIO, self._error.strerror)
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise DriverError(errno.ETIMEDOUT, f"{self.device.name}: no frame within {timeout} s")
                self._arrived.wait(left)
            frames = [self._frames.popleft() for _ in range(min(max, len(self._frames)))]
            self._bytes -= sum(map(len, frames))
        self._refill()
        return frames

    def deliver(self, sink: Callable[[int, bytes], None]) -> None:
        """From now on call `sink` with the pair and each frame, its header in front, instead of keeping it for `recv`.

        On the thread that answers the bus: it must not wait. What waits for `recv` now goes to it first.
        """
        with self._arrived:
            waiting, self._frames, self._bytes = self._frames, deque(), 0
            for frame in waiting:
                sink(0, frame)
            self._sink = sink
        self._refill()

    @property
    def _may_post(self) -> bool:
        return self._error is None and len(self._frames) < UNREAD_FRAMES and self._bytes < UNREAD_BYTES

    def _refill(self) -> None:
        for receiver in self._receivers[: self._pairs]:
            receiver.post()

    def _take(self, pair: int, frame: bytes) -> None:
        """One whole frame with its header, as the device gave it."""
        if len(frame) < HEADER.size + ETHERNET:
            self.dropped["short"] += 1
        elif len(frame) > HEADER.size + LONGEST:
            self.dropped["long"] += 1
        elif frame[0] & self._no_flags or frame[1] not in self._gso:
            # It asks for what was not negotiated, so that nobody here could finish the frame.
            self.dropped["header"] += 1
        else:
            with self._arrived:
                self.received += 1
                sink = self._sink
                if sink is None:
                    self._frames.append(frame)
                    self._bytes += len(frame)
                    self._arrived.notify()
            if sink is not None:
                sink(pair, frame)

    def _buffer_size(self, count: int) -> int:
        """Bytes of a receive buffer, of which the device gets so many."""
        gso = len(self._gso) > 1
        whole = HEADER.size + (LONGEST if gso else ETHERNET + VLAN_TAG + max(self._mtu, DEFAULT_MTU))
        if self.has("MRG_RXBUF"):
            # Frames may go over several. Each piece costs the same however small it is, so that few are better.
            whole = min(whole, BIG) if gso else min(whole, max(PAGE, -(-whole // max(1, count // 4))))
        return min(whole, self.device.max_request or whole)

    # The control queue.

    def control(self, class_: int, command: int, data: Buffer = b"") -> None:
        """One command (section 5.1.6.5). DriverError EINVAL when the device refuses it, EPROTO for no real answer."""
        if not self.has("CTRL_VQ"):
            raise DriverError(errno.EOPNOTSUPP, f"{self.device.name} has no control queue")
        queue = self.queue(controlq(self.max_pairs))
        answer = wait(queue.submit([CONTROL.pack(class_, command) + data], 1), self.timeout, "a control command")
        if answer == bytes([ACK_ERR]):
            raise DriverError(errno.EINVAL, f"{self.device.name} refuses command {command} of class {class_}")
        if answer != bytes([ACK_OK]):
            raise DriverError(errno.EPROTO, f"{self.device.name} answers a command with {answer.hex() or 'nothing'}")

    def _want(self, feature: str) -> None:
        if not self.has(feature):
            raise DriverError(errno.EOPNOTSUPP, f"{self.device.name} has no {feature}")

    def set_mac(self, mac: bytes) -> None:
        """Have another address, of 6 bytes."""
        if len(mac) != 6 or not _is_station(mac):
            raise DriverError(errno.EINVAL, f"{mac.hex(':')} is no address of an interface")
        self._want("CTRL_MAC_ADDR")
        with self._following:
            self.control(ControlClass.MAC, MacCommand.ADDR_SET, mac)
            self._mac, self._own_mac = bytes(mac), True

    def set_promiscuous(self, on: bool) -> None:
        """Receive every frame, whoever it is for."""
        self._want("CTRL_RX")
        self.control(ControlClass.RX, RxCommand.PROMISC, bytes([on]))

    def set_queue_pairs(self, pairs: int) -> None:
        """Use so many pairs of queues, 1 to `max_pairs`; at first it is one."""
        if not 1 <= pairs <= self.max_pairs:
            raise DriverError(errno.EINVAL, f"{self.device.name} has {self.max_pairs} pairs of queues, not {pairs}")
        if pairs == self._pairs:
            return
        for receiver in self._receivers[self._pairs : pairs]:
            receiver.post()
        self.control(ControlClass.MQ, MqCommand.VQ_PAIRS_SET, struct.pack("<H", pairs))
        self._pairs = pairs

    def _announce(self) -> None:
        """Tell the neighbours where our addresses are now (section 5.1.6.5.4), and the device that we did."""
        arps = [gratuitous_arp(self._mac, address) for address in self.addresses]
        if arps:
            self.send(arps)
        self.control(ControlClass.ANNOUNCE, AnnounceCommand.ACK)


class OffloadNet(Net):
    """Negotiates missing checksums and segmentation too: for who passes the headers of frames on, as a tap does."""

    wanted: ClassVar[tuple[str, ...]] = (
        *Net.wanted,
        "CSUM",
        "GUEST_CSUM",
        "HOST_TSO4",
        "HOST_TSO6",
        "HOST_ECN",
        "GUEST_TSO4",
        "GUEST_TSO6",
        "GUEST_ECN",
        "HOST_USO",
        "GUEST_USO4",
        "GUEST_USO6",
    )


class _Batch:
    """What becomes of frames that were sent together."""

    def __init__(self, frames: int) -> None:
        self.future: Future[int] = Future()
        self.future.set_running_or_notify_cancel()
        self._frames = self._missing = frames
        self._error: BaseException | None = None
        # Frames may fail on one thread while others are answered on another.
        self._lock = threading.Lock()
        if not frames:
            self.future.set_result(0)

    def set_result(self, result: bytes, /) -> None:
        self._ended(None)

    def set_exception(self, exception: BaseException, /) -> None:
        self._ended(exception)

    def _ended(self, error: BaseException | None) -> None:
        with self._lock:
            self._missing -= 1
            self._error = self._error or error
            if self._missing:
                return
        if self._error is not None:
            self.future.set_exception(self._error)
        else:
            self.future.set_result(self._frames)


class _Receiver:
    """The receive queue of a pair: keeps the device in buffers, and puts frames together. Told of each buffer."""

    def __init__(self, net: Net, pair: int, queue: RemoteQueue, pairs: int) -> None:
        self._net = net
        self._pair = pair
        self._queue = queue
        self._merging = net.has("MRG_RXBUF")
        # The arena gives powers of two.
        block = 1 << (net._buffer_size(queue.size) - 1).bit_length()
        self._count = min(queue.size, max(FEWEST, RECEIVE_BYTES // pairs // block))
        self._enough = max(1, self._count // 4)
        self._parts: list[bytes] = []
        self._missing = 0
        # Both only grow. Of the first the lock's holder is the only writer, of the second whoever reaps the queue.
        self._posted = 0
        self._used = 0
        self._lock = threading.Lock()

    def post(self) -> None:
        """Give the device buffers again, if it is worth it and nobody has too much to read."""
        net = self._net
        if not net._may_post or self._count - (self._posted - self._used) < self._enough:
            return
        try:
            with self._lock:
                count = self._count - (self._posted - self._used)
                size = net._buffer_size(self._count)
                # Before they are: the device may have used some before this call returns.
                self._posted += count
                self._queue.submit_many((self, (), size) for _ in range(count))
        except DriverError as error:
            net._fail(error)

    def set_result(self, data: bytes, /) -> None:
        """The device has used a buffer."""
        self._used += 1
        if self._net._error is not None:
            return
        if self._missing:
            self._parts.append(data)
            self._missing -= 1
        elif self._begun(data):
            self._parts = [data]
        else:
            return
        if not self._missing:
            frame = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts = []
            self._net._take(self._pair, frame)
        self.post()

    def _begun(self, data: bytes) -> bool:
        """Whether a frame may begin so; then `_missing` says how many buffers more it has."""
        if len(data) < HEADER.size:
            self._net._violated("net-header", f"a receive buffer of {len(data)} bytes, shorter than a header")
            return False
        if self._merging:
            count = int.from_bytes(data[10:12], "little")
            left = self._posted - self._used
            if not 1 <= count <= left + 1:
                self._net._violated("net-num-buffers", f"a frame in {count} buffers; the device has {left} more")
                return False
            self._missing = count - 1
        return True

    def set_exception(self, exception: BaseException, /) -> None:
        """The queue serves no more."""
        self._net._fail(exception)


def _is_station(mac: bytes) -> bool:
    """Whether one interface may have this address: no group's, and not all zeros."""
    return not mac[0] & 1 and any(mac)


def gratuitous_arp(mac: bytes, address: IPv4Address) -> bytes:
    """The frame that tells everybody that `address` is at `mac` (RFC 5227's announcement)."""
    packet = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 1, mac, address.packed, bytes(6), address.packed)
    return b"\xff" * 6 + mac + b"\x08\x06" + packet
