"""A network device as an interface of the kernel: its driver joined with a tap.

What the kernel sends is read from the tap by one thread for each pair of queues, and handed to the device as it is,
header and all. What the device gives is written to the tap on the thread that answers the bus; that never waits. So
missing checksums and segmentation go through from end to end, as far as both sides negotiated them. While the device
has as many frames as it may, the tap is not read: then the kernel keeps a few, drops the rest, and counts them.

The interface follows the device's link (as its carrier), MTU and address. Its kernel decides what it
wants to hear, so that the device is asked for everything.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from collections import Counter
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface

from vbus import tap as taps
from vbus.errors import DriverError, Error, UsageError
from vbus.proxy.drivers.net import LONGEST, OffloadNet
from vbus.virtio.net import HEADER, HeaderFlags

BATCH = 32
"""Frames that are read from the tap before the device is told of them."""
WINDOW = 64
"""Frames that the device may have of a pair."""
HIGHEST_MTU = 65535 - 14
"""The largest MTU that a tap takes."""

OFFLOADS = {
    "CSUM": taps.TUN_F_CSUM,
    "HOST_TSO4": taps.TUN_F_TSO4,
    "HOST_TSO6": taps.TUN_F_TSO6,
    "HOST_ECN": taps.TUN_F_TSO_ECN,
    "HOST_USO": taps.TUN_F_USO4 | taps.TUN_F_USO6,
}
"""What the kernel may leave to the device, by the feature with which the device says that it can."""

Address = IPv4Interface | IPv6Interface


def parse_address(text: str) -> Address:
    """An address with its prefix, "10.0.0.2/24". UsageError."""
    try:
        if "/" in text:
            return ip_interface(text)
        reason = f"say how long its prefix is, such as {ip_address(text)}/24"
    except ValueError:
        reason = "write it as 10.0.0.2/24, or fd00::2/64"
    raise UsageError(f"{text!r} is no address of an interface: {reason}")


def check_gateway(text: str, address: Address | None) -> str:
    """A gateway that an interface with this address reaches. UsageError."""
    try:
        gateway = ip_address(text)
    except ValueError:
        raise UsageError(f"{text!r} is no address of a gateway: write it as 10.0.0.1") from None
    if address is None:
        raise UsageError("a gateway needs an address: give both")
    if gateway not in address.network:
        raise UsageError(f"gateway {gateway} is not in the network of {address}")
    return str(gateway)


class Joined:
    """A driver and a tap of this name, joined from now until `close`, which leaves no tap behind.

    OSError or UsageError when there can be no such tap. `wait` gives the reason when they part by themselves.
    """

    def __init__(
        self, driver: OffloadNet, name: str, *, address: Address | None = None, gateway: str | None = None
    ) -> None:
        self.driver = driver
        self.name = name
        self.address = address
        self.dropped: Counter[str] = Counter()
        """Frames that were not passed on, by reason: refused (by the kernel: its header lies), down (the interface
        was), length (longer than the device takes now).
        """
        self._ended: BaseException | None = None
        self._over = False
        # Entered again where a signal's handler calls `end` while the same thread closes.
        self._ending = threading.RLock()
        self._end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._writing = threading.Lock()
        self._configuring = threading.Lock()
        self._closed = False
        self._windows: list[_Window] = []
        self._threads: list[threading.Thread] = []
        self._tap: taps.Tap | None = None
        try:
            self._tap = taps.Tap.open(name, queues=driver.max_pairs)
            if not self._tap.created:
                # Whoever made it may want it as it is; and nothing shall be left of us.
                raise UsageError(f"an interface {name} exists: choose another name, or delete that one")
            self._begin(self._tap, gateway)
        except BaseException:
            self.close()
            raise

    def _begin(self, tap: taps.Tap, gateway: str | None) -> None:
        driver = self.driver
        driver.on_failed = self.end
        driver.on_change = self._changed
        if driver.failed is not None:
            raise driver.failed
        if driver.max_pairs > 1:
            driver.set_queue_pairs(driver.max_pairs)
        if driver.has("CTRL_RX"):
            driver.set_promiscuous(True)
        tap.set_offloads(sum(bit for name, bit in OFFLOADS.items() if driver.has(name)))
        address = None if self.address is None else str(self.address)
        tap.configure(up=True, mtu=self.mtu, mac=driver.mac.hex(":"), address=address)
        tap.set_carrier(driver.link)
        if gateway is not None:
            _add_gateway(self.name, gateway)
        if isinstance(self.address, IPv4Interface):
            driver.addresses.add(self.address.ip)
        driver.deliver(self._write)
        for pair, fd in enumerate(tap.fds):
            window = _Window()
            self._windows.append(window)
            thread = threading.Thread(
                target=self._send, args=(pair, fd, window), name=f"{self.name}-{pair}", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        # What changed while this began.
        self._changed()

    @property
    def mtu(self) -> int:
        """The interface's MTU: the device's, as far as a tap takes it."""
        return min(self.driver.mtu, HIGHEST_MTU)

    # The end.

    def end(self, reason: BaseException | None = None) -> None:
        """Let `wait` return, or raise `reason`; the first one counts. From any thread, and from signal handlers."""
        with self._ending:
            if not self._over:
                self._over = True
                self._ended = reason
                os.eventfd_write(self._end, 1)

    def wait(self) -> None:
        """Until `end`, or until device, bus or tap are gone, which raises: DriverError, Error."""
        select.select([self._end], [], [])
        if self._ended is not None:
            raise self._ended

    def close(self) -> None:
        """Part, let go of the device, and remove the tap."""
        with self._ending:
            self._over = True
        os.eventfd_write(self._stop, 1)
        for window in self._windows:
            window.open()
        for thread in self._threads:
            thread.join()
        self.driver.on_change = self.driver.on_failed = None
        with contextlib.suppress(DriverError):
            self.driver.close()
        # What is being written or changed at this moment must not reach descriptors that are somebody else's by then.
        with self._writing, self._configuring:
            self._closed = True
        if self._tap is not None:
            # With the interface go its addresses and routes.
            self._tap.close()
        os.close(self._stop)
        os.close(self._end)

    # What the device says.

    def _changed(self) -> None:
        with self._configuring:
            if self._tap is None or self._closed:
                return
            try:
                self._tap.set_carrier(self.driver.link)
                self._tap.configure(mtu=self.mtu, mac=self.driver.mac.hex(":"))
            except (OSError, Error) as error:
                self.end(self._vanished(error))

    def _vanished(self, error: BaseException) -> Error:
        if isinstance(error, OSError) and not isinstance(error, Error):
            return Error(f"{self.name} is gone: somebody deleted the interface ({error.strerror})")
        return Error(str(error))

    def _write(self, pair: int, frame: bytes) -> None:
        """Give the kernel a frame. On the thread that answers the bus."""
        with self._writing:
            if self._closed or self._tap is None:
                return
            try:
                os.write(self._tap.fds[pair], frame)
            except OSError as error:
                self._not_written(error)

    def _not_written(self, error: OSError) -> None:
        match error.errno:
            case errno.EINVAL:
                # Offsets behind the frame's end, segments of no length: the kernel looks, so that nobody here need.
                self.dropped["refused"] += 1
            case errno.EIO | errno.EAGAIN | errno.ENOBUFS | errno.ENOMEM:
                self.dropped["down"] += 1
            case _:
                self.end(self._vanished(error))

    # What the kernel says.

    def _send(self, pair: int, fd: int, window: _Window) -> None:
        """Read what the kernel sends on this pair until the end."""
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.register(self._stop, select.POLLIN)
            buffer = bytearray(HEADER.size + LONGEST + 1)
            while not any(ready == self._stop for ready, _ in poll.poll()):
                frames = self._read(fd, buffer)
                window.sent += len(frames)
                self._pass_on(frames, pair, window)
                window.wait()
        except DriverError as error:
            self.end(error)
        except OSError as error:
            self.end(self._vanished(error))

    def _read(self, fd: int, buffer: bytearray) -> list[bytes]:
        """A batch of frames with their headers. OSError when the tap is gone."""
        frames = []
        with contextlib.suppress(BlockingIOError):
            for _ in range(BATCH):
                size = os.readv(fd, [buffer])
                # The kernel tells in the same header what it knows of frames that it received; and a part of it, which
                # means nothing when sending, it may leave as it finds it.
                buffer[0] &= HeaderFlags.NEEDS_CSUM
                buffer[10] = buffer[11] = 0
                frames.append(bytes(memoryview(buffer)[:size]))
        return frames

    def _pass_on(self, frames: list[bytes], pair: int, window: _Window) -> None:
        try:
            self.driver.send_raw(frames, pair=pair, answer=window)
        except DriverError as error:
            if error.errno not in (errno.EMSGSIZE, errno.EINVAL):
                raise
            # One of them is too long: the device's MTU has become smaller, and the kernel did not know yet.
            for frame in frames:
                try:
                    self.driver.send_raw([frame], pair=pair, answer=window)
                except DriverError as alone:
                    if alone.errno not in (errno.EMSGSIZE, errno.EINVAL):
                        raise
                    self.dropped["length"] += 1
                    window.set_result(b"")


class _Window:
    """How many frames of a pair the device has. Told of each."""

    def __init__(self) -> None:
        self.sent = 0
        self._done = 0
        self._lock = threading.Lock()
        self._room = threading.Event()
        self._opened = False

    def set_result(self, result: bytes, /) -> None:
        with self._lock:
            self._done += 1
        # Not for each: when half of them are done there is room for a batch.
        if self.sent - self._done <= WINDOW // 2:
            self._room.set()

    def set_exception(self, exception: BaseException, /) -> None:
        # The receive queue's buffers fail for the same reason, which is told there.
        self.open()

    def open(self) -> None:
        """Nobody waits any more."""
        self._opened = True
        self._room.set()

    def wait(self) -> None:
        """Until there is room for a batch."""
        while not self._opened and self.sent - self._done > WINDOW - BATCH:
            self._room.clear()
            if self.sent - self._done > WINDOW - BATCH and not self._opened:
                self._room.wait()


def _add_gateway(name: str, gateway: str) -> None:
    """A default route over this interface. Error."""
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as netlink:
            index = netlink.link_lookup(ifname=name)[0]
            netlink.route("add", dst="::/0" if ":" in gateway else "0.0.0.0/0", gateway=gateway, oif=index)
    except NetlinkError as error:
        raise Error(f"gateway {gateway}: {os.strerror(error.code)}") from None
