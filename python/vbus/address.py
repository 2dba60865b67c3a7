"""Addresses: what a person types to say where a bus is.

`process:PATH` (a bare path is that), `unix:PATH`, `vhost-user:PATH`, `ivshmem:PATH`, `tcp:HOST:PORT`, `tls:HOST:PORT`.
IPv6 hosts are written in brackets.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from vbus.errors import UsageError

KINDS = ("process", "unix", "vhost-user", "ivshmem", "tcp", "tls")


@dataclass(frozen=True)
class Address:
    """A parsed address: `path` for process, unix, vhost-user and ivshmem, `host` and `port` for tcp and tls."""

    kind: str
    path: Path = Path()
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if not self.is_network:
            return f"{self.kind}:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.kind}:{host}:{self.port}"

    @property
    def is_network(self) -> bool:
        """Whether it has a host and a port."""
        return self.kind in ("tcp", "tls")

    @property
    def is_loopback(self) -> bool:
        """Whether an address with a host stays on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse(text: str) -> Address:
    """UsageError when `text` is no address."""
    kind, colon, rest = text.partition(":")
    if not colon or "/" in kind:
        kind, rest = "process", text
    if kind not in KINDS or not rest:
        raise UsageError(
            f"address {text!r}: write process:PATH, unix:PATH, vhost-user:PATH, ivshmem:PATH, tcp:HOST:PORT or "
            "tls:HOST:PORT"
        )
    if kind not in ("tcp", "tls"):
        return Address(kind, path=Path(rest))
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"address {text!r}: write {kind}:HOST:PORT, with a port from 0 to 65535")
    return Address(kind, host=host, port=int(port))
