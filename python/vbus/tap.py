"""A tap: an interface of the kernel's network whose other end is a descriptor here.

Both sides of a bus use one: a network device whose backend it is, and a driver that gives its device to the kernel as
an interface. A frame has before it the header of virtio-net, 12 bytes, little-endian, so that what the kernel leaves to
the device (checksums, segmentation) goes through unchanged. Making a tap takes CAP_NET_ADMIN in the network namespace.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import re
import socket
import struct
from typing import TYPE_CHECKING

from vbus.errors import Error, UsageError
from vbus.virtio.net import HEADER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyroute2 import IPRoute

DEVICE = "/dev/net/tun"
MAX_NAME = 15
"""Characters of an interface's name (IFNAMSIZ less the end)."""
MAX_QUEUES = 256
NAME = re.compile(r"(?!\.{1,2}$)[^\s/:%\x00-\x1f]{1,15}")

# linux/if_tun.h
TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
TUNSETQUEUE, TUNSETVNETLE, TUNSETCARRIER = 0x400454D9, 0x400454DC, 0x400454E2
IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_VNET_HDR, IFF_TUN_EXCL = 0x0002, 0x0100, 0x1000, 0x4000, 0x8000
IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0200, 0x0400
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6 = 1, 2, 4, 8, 16, 32, 64
SIOCGIFHWADDR, SIOCGIFMTU = 0x8927, 0x8921
IFREQ = struct.Struct("16sH22x")


class Tap:
    """A tap of this name, open from `open` to `close`. `fds` has a non-blocking descriptor for each queue."""

    def __init__(self, name: str, fds: list[int], *, created: bool) -> None:
        self.name = name
        self.fds = fds
        self.created = created
        """Whether it was made here, and goes with `close`."""

    @classmethod
    def open(cls, name: str, *, queues: int = 1) -> Tap:
        """Make a tap, or take one that is there and that nobody has open.

        UsageError: no name, no right (CAP_NET_ADMIN), no /dev/net/tun, taken, an interface of another kind.
        """
        if not NAME.fullmatch(name):
            raise UsageError(f"tap {name!r}: an interface's name has 1 to {MAX_NAME} characters, no space / : %")
        if not 1 <= queues <= MAX_QUEUES:
            raise UsageError(f"tap {name}: {queues} queues: 1 to {MAX_QUEUES}")
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
        fds: list[int] = []
        try:
            first, created = _first_queue(name, flags)
            fds.append(first)
            for _ in range(queues - 1):
                fds.append(_queue(name, flags))
            for fd in fds:
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER.size))
                fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise UsageError(_why(name, error)) from None
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return cls(name, fds, created=created)

    # What the kernel does with frames.

    def set_offloads(self, flags: int) -> int:
        """What the kernel may leave out of frames that are read here: TUN_F_* bits. OSError when the tap is gone.

        Gives what was set: segmentation of UDP is left out where the kernel does not know it.
        """
        for wanted in (flags, flags & ~(TUN_F_USO4 | TUN_F_USO6), flags & ~(TUN_F_USO4 | TUN_F_USO6 | TUN_F_UFO)):
            try:
                for fd in self.fds:
                    fcntl.ioctl(fd, TUNSETOFFLOAD, wanted)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            else:
                return wanted
        raise UsageError(f"tap {self.name}: the kernel knows no offloads {flags:#x}")

    def set_carrier(self, on: bool) -> None:
        """Whether the interface has a carrier: LOWER_UP. OSError when the tap is gone."""
        fcntl.ioctl(self.fds[0], TUNSETCARRIER, struct.pack("i", on))

    def set_queue(self, index: int, enabled: bool) -> None:
        """Have the kernel use a queue of several, or not. OSError when the tap is gone."""
        flags = IFF_ATTACH_QUEUE if enabled else IFF_DETACH_QUEUE
        with contextlib.suppress(FileExistsError):
            try:
                fcntl.ioctl(self.fds[index], TUNSETQUEUE, IFREQ.pack(b"", flags))
            except OSError as error:
                # As it was already.
                if error.errno != errno.EINVAL:
                    raise

    # What `ip link` and `ip address` show.

    @property
    def mac(self) -> bytes:
        """The interface's address, 6 bytes. OSError when it is gone."""
        return self._ask(SIOCGIFHWADDR)[18:24]

    @property
    def mtu(self) -> int:
        """The interface's MTU. OSError when it is gone."""
        value: int = struct.unpack_from("i", self._ask(SIOCGIFMTU), 16)[0]
        return value

    def _ask(self, request: int) -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            return fcntl.ioctl(sock, request, struct.pack("16s24x", self.name.encode()))

    def configure(
        self,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        mac: str | None = None,
        address: str | None = None,
    ) -> None:
        """Change what is given: up or down, the MTU, the address ("52:54:00:12:34:56"), an IP address ("10.0.0.2/24").

        Error when the kernel refuses, or the tap is gone; UsageError for an address that is none.
        """
        wanted: dict[str, object] = {}
        if up is not None:
            wanted["state"] = "up" if up else "down"
        if mtu is not None and mtu != self._mtu_or_none():
            wanted["mtu"] = mtu
        if mac is not None:
            wanted["address"] = mac
        if not wanted and address is None:
            return
        interface = None
        if address is not None:
            try:
                interface = ipaddress.ip_interface(address)
            except ValueError as error:
                raise UsageError(f"tap {self.name}: address {address!r}: {error}") from None
        with self._netlink() as (route, index):
            if wanted:
                route.link("set", index=index, **wanted)
            if interface is not None:
                route.addr("replace", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen)

    def _mtu_or_none(self) -> int | None:
        try:
            return self.mtu
        except OSError:
            return None

    @contextlib.contextmanager
    def _netlink(self) -> Iterator[tuple[IPRoute, int]]:
        """The kernel's table of interfaces, and the index of this one. Error."""
        # A third of a second, paid by those who need it.
        from pyroute2 import IPRoute, NetlinkError

        try:
            index = socket.if_nametoindex(self.name)
            with IPRoute() as route:
                yield route, index
        except (NetlinkError, OSError) as error:
            text = os.strerror(error.code) if isinstance(error, NetlinkError) else error.strerror
            raise Error(f"tap {self.name}: {text or error}") from None

    def close(self) -> None:
        """Let go of it; one that was made here is gone."""
        fds, self.fds = self.fds, []
        for fd in fds:
            os.close(fd)


def _queue(name: str, flags: int) -> int:
    """One more descriptor of a tap. OSError."""
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), flags))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _first_queue(name: str, flags: int) -> tuple[int, bool]:
    """The first descriptor, and whether the tap was made for it. OSError."""
    try:
        return _queue(name, flags | IFF_TUN_EXCL), True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    return _queue(name, flags), False


def _why(name: str, error: OSError) -> str:
    """What a refusal means, and what to do."""
    match error.errno:
        case errno.ENOENT | errno.ENODEV | errno.ENXIO:
            return f"tap {name}: there is no {DEVICE}: load the kernel's module tun"
        case errno.EACCES:
            return f"tap {name}: no right to open {DEVICE}: run as root, or in a user and network namespace of your own"
        case errno.EPERM:
            return f"tap {name}: making a tap takes CAP_NET_ADMIN in this network namespace: run as root"
        case errno.EBUSY:
            return f"tap {name}: another process has it open: choose another name, or end that process"
        case errno.EINVAL | errno.E2BIG:
            return f"tap {name}: there is an interface of this name that is no such tap: choose another name"
    return f"tap {name}: {error.strerror}"
