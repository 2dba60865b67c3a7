"""Who may connect to a bus: its owner always, and the users and groups that it names.

A member is written `uid:1000`, `uid:alice`, `gid:36`, `gid:kvm`, or `tls:NAME`. Over a Unix socket the kernel says who
the peer is (SO_PEERCRED, SO_PEERGROUPS); over TCP on the loopback interface the kernel's table of sockets says whose
the other end is; over TLS a certificate says it, which an authority of the bus has signed. A peer that nobody can vouch
for is refused.
"""

from __future__ import annotations

import grp
import os
import pwd
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vbus.errors import UsageError

SO_PEERGROUPS = 59
NOBODY = -1
"""The user of a peer that is known by its certificate: no user at all, not even the owner."""
FORMS = "write uid:NUMBER, uid:NAME, gid:NUMBER, gid:NAME or tls:NAME"
_UCRED = struct.Struct("3i")


@dataclass(frozen=True)
class Credentials:
    """Who is at the other end of a socket, as the kernel says, or a certificate (`names`)."""

    uid: int
    gids: frozenset[int] = field(default_factory=frozenset)
    pid: int = 0
    names: tuple[str, ...] = ()

    @property
    def identities(self) -> list[str]:
        """The members that this is, as a bus names them."""
        if self.uid == NOBODY:
            return [f"tls:{name}" for name in self.names]
        return [f"uid:{self.uid}", *(f"gid:{gid}" for gid in sorted(self.gids))]

    def __str__(self) -> str:
        if self.uid == NOBODY:
            return ", ".join(self.identities) or "tls, without a name"
        return f"uid {self.uid}" + (f" pid {self.pid}" if self.pid else "")


class Members:
    """The owner of a bus and the members that it names. UsageError for a member that does not parse or exist."""

    def __init__(self, members: Iterable[str] = (), *, owner: int | None = None) -> None:
        self.owner = os.geteuid() if owner is None else owner
        self.names = list(members)
        self._uids = {self.owner}
        self._gids: set[int] = set()
        self._tls: set[str] = set()
        for member in self.names:
            kind, _, name = member.partition(":")
            if kind == "uid" and name:
                self._uids.add(_user(name))
            elif kind == "gid" and name:
                self._gids.add(_group(name))
            elif kind == "tls" and name:
                self._tls.add(name)
            else:
                raise UsageError(f"member {member!r}: {FORMS}")

    @staticmethod
    def canonical(member: str) -> str:
        """The member with its number: `uid:1000` for `uid:alice`. UsageError for one that is none."""
        kind, _, name = member.partition(":")
        if kind == "uid" and name:
            return f"uid:{_user(name)}"
        if kind == "gid" and name:
            return f"gid:{_group(name)}"
        if kind == "tls" and name:
            return member
        raise UsageError(f"member {member!r}: {FORMS}")

    def admits(self, who: Credentials) -> bool:
        """Whether this peer may connect."""
        if who.uid == NOBODY:
            return not self._tls.isdisjoint(who.names)
        return who.uid in self._uids or bool(self._gids & who.gids)


def _user(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise UsageError(f"member uid:{name}: there is no user {name!r}") from None


def _group(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(f"member gid:{name}: there is no group {name!r}") from None


def peer_credentials(sock: socket.socket) -> Credentials | None:
    """Who is at the other end of a connected socket; None when nobody can vouch for it."""
    if sock.family == socket.AF_UNIX:
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return Credentials(uid, frozenset({gid, *_peer_groups(sock)}), pid)
    return _loopback_owner(sock)


def _peer_groups(sock: socket.socket) -> list[int]:
    size = 4 * 64
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, size)
    except OSError:
        # More groups than the buffer holds, or an old kernel: the primary group still counts.
        return []
    return list(struct.unpack(f"{len(raw) // 4}I", raw))


def _loopback_owner(sock: socket.socket) -> Credentials | None:
    """The owner of the other end of a TCP connection within this machine, from the kernel's table of sockets."""
    table = Path("/proc/net/tcp" if sock.family == socket.AF_INET else "/proc/net/tcp6")
    here, there = sock.getsockname()[:2], sock.getpeername()[:2]
    wanted = (_hex_address(sock.family, *there), _hex_address(sock.family, *here))
    try:
        rows = table.read_text().splitlines()[1:]
    except OSError:
        return None
    for row in rows:
        columns = row.split()
        if (columns[1], columns[2]) == wanted:
            return Credentials(int(columns[7]))
    return None


def _hex_address(family: int, host: str, port: int) -> str:
    """An address as /proc/net/tcp writes it: 32-bit words in the machine's byte order."""
    packed = socket.inet_pton(family, host.partition("%")[0])
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
