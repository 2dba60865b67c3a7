"""A tap: a network interface of this machine whose frames a program reads and writes instead of a wire.

Both sides of a bus use it: a network device whose backend is a tap, and a driver that gives its network namespace an
interface. Every descriptor carries whole Ethernet frames, each behind a header of 12 little-endian bytes that is the
one of virtio (section 5.1.6), so that what the kernel leaves to others (checksums, segmentation) goes through
unchanged. A tap with several queues has a descriptor for each pair of them.

What the interface looks like from outside (up, MTU, address) goes through netlink, in the network namespace where the
interface is by then: an operator may have moved it into a container, or renamed it. Names and ioctls are those of
Linux, `if_tun.h`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from vbus.errors import Error, UsageError

T = TypeVar("T")

CLONE = "/dev/net/tun"
MAX_NAME = 15
"""Bytes of an interface's name (IFNAMSIZ less its end)."""
MAX_QUEUES = 256
"""MAX_TAP_QUEUES of the kernel."""
VNET_HEADER = 12

IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE, IFF_TUN_EXCL = 0x0002, 0x1000, 0x4000, 0x0100, 0x8000
IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE = 0x0200, 0x0400
IFF_UP = 1
IFA_F_NODAD = 0x02

TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 0x01, 0x02, 0x04, 0x08
TUN_F_UFO, TUN_F_USO4, TUN_F_USO6 = 0x10, 0x20, 0x40
TUN_F_USO = TUN_F_USO4 | TUN_F_USO6

TUN_TYPE_TAP = 2
"""IFLA_TUN_TYPE of a tap; that of a tun is 1."""

_NONE, _READ, _WRITE = (1, 2, 4) if os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha")) else (0, 2, 1)
_DIRECTION = 29 if _NONE else 30


def _ioctl(direction: int, number: int, size: int = 4) -> int:
    return direction << _DIRECTION | size << 16 | ord("T") << 8 | number


TUNSETIFF = _ioctl(_WRITE, 202)
TUNSETOFFLOAD = _ioctl(_WRITE, 208)
TUNGETIFF = _ioctl(_READ, 210)
TUNSETVNETHDRSZ = _ioctl(_WRITE, 216)
TUNSETQUEUE = _ioctl(_WRITE, 217)
TUNSETVNETLE = _ioctl(_WRITE, 220)
TUNSETCARRIER = _ioctl(_WRITE, 226)
TUNGETDEVNETNS = _ioctl(_NONE, 227, 0)
SIOCGIFHWADDR = 0x8927
IFREQ = struct.Struct("=16sH22x")
CLONE_NEWNET = 0x4000_0000

VANISHED = frozenset({errno.EBADFD, errno.EFAULT, errno.ENODEV, errno.ENXIO})
"""What a descriptor says whose interface was deleted. EIO says so too when it is read; written, the interface may only
be down.
"""


class Tap:
    """A tap that this process serves. Any thread may use it; closing is for one.

    What a person can do something about is a `UsageError` of one line; a tap that is gone is an `Error`. Reading and
    writing `fds` is the caller's: BlockingIOError when there is nothing, one of `VANISHED` when the tap is gone.
    """

    name: str
    """As it was asked for; an operator may have renamed the interface since."""
    created: bool
    """Whether it was made here, and so goes with its last descriptor."""
    fds: list[int]
    """One descriptor for each pair of queues, which never block. Closed by `close`."""
    offloads: int
    """What `set_offloads` made of its flags: TUN_F_*."""

    def __init__(self, name: str, fds: list[int], *, created: bool) -> None:
        """For `open`: takes the descriptors over."""
        self.name = name
        self.created = created
        self.fds = fds
        self.offloads = 0
        self._before: dict[str, Any] = {}
        self._addresses: list[tuple[str, int]] = []

    @classmethod
    def open(cls, name: str, *, queues: int = 1) -> Tap:
        """Make the tap `name`, or take a persistent one that nobody else has.

        UsageError: no name of an interface, too many queues, an interface that is no tap, that has one queue where
        more are asked for, or that another process has; no right; no /dev/net/tun.
        """
        if len(name.encode()) > MAX_NAME:
            raise UsageError(f"tap {name!r}: the name of an interface has up to {MAX_NAME} bytes")
        if not name.isprintable() or name in ("", ".", "..") or re.search(r"[\s/:%]", name):
            raise UsageError(f"tap {name!r} is no name of an interface: letters, digits, '-', '_' and '.' are")
        if not 1 <= queues <= MAX_QUEUES:
            raise UsageError(f"tap {name}: {queues} queues; a tap has 1 to {MAX_QUEUES}")
        with contextlib.ExitStack() as undo:
            fds = [_open_clone(name)]
            undo.callback(lambda: _close_all(fds))
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
            created = _make(fds[0], name, flags)
            if not created:
                flags |= _check_existing(name, queues)
                _attach(fds[0], name, flags)
            for _ in range(queues - 1):
                fds.append(_open_clone(name))
                _attach(fds[-1], name, flags)
            tap = cls(name, fds, created=created)
            try:
                for fd in fds:
                    fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER))
                    fcntl.ioctl(fd, TUNSETVNETLE, struct.pack("i", 1))
                tap.set_offloads(0)
            except OSError as error:
                raise _refused(name, error) from None
            undo.pop_all()
        return tap

    def close(self) -> None:
        """Let go of the tap: one that was made here is gone, a persistent one is as it was before `configure`."""
        if not self.fds:
            return
        if not self.created:
            with contextlib.suppress(Error, OSError):
                self._restore()
        fds, self.fds = self.fds, []
        _close_all(fds)

    # The descriptors' side. All of it raises OSError when the tap is gone.

    def set_offloads(self, flags: int) -> int:
        """What the reader of `fds` can finish by itself: TUN_F_CSUM, and kinds of segments that are not cut up.

        All of them need TUN_F_CSUM. UDP's are left out where this kernel does not know them; gives what it took.
        """
        for known in (flags, flags & ~TUN_F_USO, flags & ~TUN_F_USO & ~TUN_F_UFO):
            try:
                fcntl.ioctl(self.fds[0], TUNSETOFFLOAD, known)
            except OSError as error:
                refused = error
                if error.errno != errno.EINVAL:
                    break
            else:
                self.offloads = known
                return known
        raise refused

    def set_carrier(self, on: bool) -> None:
        """Whether the interface has a carrier (`ip link`: LOWER_UP, or NO-CARRIER)."""
        fcntl.ioctl(self.fds[0], TUNSETCARRIER, struct.pack("i", on))

    def set_queue(self, index: int, enabled: bool) -> None:
        """Give a queue of a tap with several its share of the frames, or none: what waited there is lost then."""
        flags = IFF_ATTACH_QUEUE if enabled else IFF_DETACH_QUEUE
        try:
            fcntl.ioctl(self.fds[index], TUNSETQUEUE, IFREQ.pack(b"", flags))
        except OSError as error:
            # It is so already.
            if error.errno != errno.EINVAL:
                raise

    # The interface's side.

    @property
    def mac(self) -> bytes:
        """The interface's address, 6 bytes. OSError when it is gone."""
        return bytes(fcntl.ioctl(self.fds[0], SIOCGIFHWADDR, bytes(IFREQ.size))[18:24])

    @property
    def mtu(self) -> int:
        """The interface's MTU in bytes. Error when it is gone."""
        return int(self._in_its_namespace(lambda ip, index: ip.get_links(index)[0].get_attr("IFLA_MTU")))

    @property
    def up(self) -> bool:
        """Whether somebody set the interface up. Error when it is gone."""
        return bool(self._in_its_namespace(lambda ip, index: ip.get_links(index)[0]["flags"]) & IFF_UP)

    def configure(
        self,
        *,
        up: bool | None = None,
        mtu: int | None = None,
        mac: bytes | str | None = None,
        address: str | None = None,
    ) -> None:
        """Change what is given of the interface, wherever it is. `address`: such as "10.0.0.2/24", IPv4 or IPv6.

        UsageError when the kernel refuses; Error when the interface is gone.
        """
        place: tuple[str, int] | None = None
        flags: dict[str, int] = {}
        if address is not None:
            from ipaddress import ip_interface

            try:
                parsed = ip_interface(address)
            except ValueError:
                raise UsageError(
                    f"tap {self.name}: {address!r} is no address with a prefix, such as 10.0.0.2/24"
                ) from None
            place = str(parsed.ip), parsed.network.prefixlen
            if parsed.version == 6:
                # Nobody could answer before the other side is ready (RFC 4862, section 5.4).
                flags["flags"] = IFA_F_NODAD
        changes: dict[str, Any] = {}
        if mtu is not None:
            changes["mtu"] = mtu
        if mac is not None:
            changes["address"] = mac if isinstance(mac, str) else mac.hex(":")
        if up is not None:
            changes["state"] = "up" if up else "down"

        def change(ip: Any, index: int) -> None:
            self._remember(ip, index, changes)
            if changes:
                ip.link("set", index=index, **changes)
            if place is not None and place not in _addresses(ip, index):
                ip.addr("add", index=index, address=place[0], prefixlen=place[1], **flags)
                self._addresses.append(place)

        self._in_its_namespace(change)

    def _remember(self, ip: Any, index: int, changes: dict[str, Any]) -> None:
        link = ip.get_links(index)[0]
        now = {
            "mtu": link.get_attr("IFLA_MTU"),
            "address": link.get_attr("IFLA_ADDRESS"),
            "state": "up" if link["flags"] & IFF_UP else "down",
        }
        for key in changes:
            self._before.setdefault(key, now[key])

    def _restore(self) -> None:
        def restore(ip: Any, index: int) -> None:
            there = _addresses(ip, index)
            for place in self._addresses:
                if place in there:
                    ip.addr("del", index=index, address=place[0], prefixlen=place[1])
            if self._before:
                ip.link("set", index=index, **self._before)

        if self._addresses or self._before:
            self._in_its_namespace(restore)

    def _in_its_namespace(self, task: Callable[[Any, int], T]) -> T:
        """Do something over netlink in the namespace where the interface is; gives the task its index there."""

        def run() -> T:
            name = fcntl.ioctl(self.fds[0], TUNGETIFF, bytes(IFREQ.size))[:16].rstrip(b"\0").decode()
            with _netlink() as ip:
                found = ip.link_lookup(ifname=name)
                if not found:
                    raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
                return task(ip, found[0])

        try:
            there = self._namespace()
            try:
                return _in_thread(run, there)
            finally:
                if there is not None:
                    os.close(there)
        except OSError as error:
            raise _refused(self.name, error) from None
        except Exception as error:
            # pyroute2's NetlinkError is no OSError; its `code` is the errno.
            code = getattr(error, "code", None)
            if not isinstance(code, int):
                raise
            raise _refused(self.name, OSError(code, os.strerror(code))) from None

    def _namespace(self) -> int | None:
        """A descriptor of the interface's network namespace when that is not this thread's."""
        try:
            there = fcntl.ioctl(self.fds[0], TUNGETDEVNETNS)
        except OSError as error:
            if error.errno in VANISHED:
                raise
            return None
        if os.path.samestat(os.fstat(there), os.stat("/proc/thread-self/ns/net")):
            os.close(there)
            return None
        return there


def _netlink() -> Any:
    from pyroute2 import IPRoute  # 0.2 s, so only when there is a tap

    return IPRoute()


def _addresses(ip: Any, index: int) -> list[tuple[str, int]]:
    return [(found.get_attr("IFA_ADDRESS"), found["prefixlen"]) for found in ip.get_addr(index=index)]


def _in_thread(task: Callable[[], T], namespace: int | None = None) -> T:
    """Run `task` in a thread of its own, which may enter a network namespace.

    A namespace is a thread's; and pyroute2 runs an event loop, of which a thread that has one already can run no other.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if namespace is not None:
                _enter(namespace)
            results.append(task())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="vbus-netlink", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(namespace: int) -> None:
    import ctypes  # Python 3.12 has os.setns

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _open_clone(name: str) -> int:
    try:
        return os.open(CLONE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO):
            raise UsageError(f"tap {name}: there is no {CLONE} here: load the kernel's module (modprobe tun)") from None
        raise _refused(name, error) from None


def _make(fd: int, name: str, flags: int) -> bool:
    """Make a new tap; False when an interface of this name exists."""
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), flags | IFF_TUN_EXCL))
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EEXIST):
            return False
        raise _refused(name, error) from None
    return True


def _attach(fd: int, name: str, flags: int) -> None:
    try:
        fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(name.encode(), flags))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _taken(name) from None
        raise _refused(name, error) from None


def _check_existing(name: str, queues: int) -> int:
    """Further flags that an existing tap has to be opened with. UsageError when it cannot be taken."""

    def look() -> Any:
        with _netlink() as ip:
            found = ip.link_lookup(ifname=name)
            return ip.get_links(found[0])[0] if found else None

    link = _in_thread(look)
    if link is None:
        return 0
    info = link.get_attr("IFLA_LINKINFO")
    if info is None or info.get_attr("IFLA_INFO_KIND") != "tun":
        raise UsageError(f"tap {name}: an interface of this name exists and is no tap: choose another name")
    tun = info.get_attr("IFLA_INFO_DATA")
    if tun.get_attr("IFLA_TUN_TYPE") != TUN_TYPE_TAP:
        raise UsageError(f"tap {name}: the interface is a tun, which has no Ethernet frames: choose another name")
    # With several queues the kernel would let two processes share the frames.
    if (tun.get_attr("IFLA_TUN_NUM_QUEUES") or 0) + (tun.get_attr("IFLA_TUN_NUM_DISABLED_QUEUES") or 0):
        raise _taken(name)
    if tun.get_attr("IFLA_TUN_MULTI_QUEUE"):
        return IFF_MULTI_QUEUE
    if queues > 1:
        raise UsageError(f"tap {name} was made with one queue, not {queues}: make it anew with multi_queue")
    return 0


def _taken(name: str) -> UsageError:
    return UsageError(f"tap {name} is in use by another process or device: stop that one, or choose another name")


def _refused(name: str, error: OSError) -> Error:
    if error.errno in (errno.EPERM, errno.EACCES):
        return UsageError(f"tap {name}: no right to use it: that takes CAP_NET_ADMIN, or a tap that is yours")
    if error.errno in VANISHED:
        return Error(f"tap {name} is gone: somebody deleted the interface")
    return UsageError(f"tap {name}: the kernel refuses: {error.strerror}")


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
