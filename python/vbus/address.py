"""Addresses: what a person types to say where a bus is.

`process:PATH` (a bare path is that), `unix:PATH`, `tcp:HOST:PORT`. IPv6 hosts are written in brackets.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from vbus.errors import UsageError

KINDS = ("process", "unix", "tcp")


@dataclass(frozen=True)
class Address:
    """A parsed address: `path` for process and unix, `host` and `port` for tcp."""

    kind: str
    path: Path = Path()
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.kind != "tcp":
            return f"{self.kind}:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether a tcp address stays on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse(text: str) -> Address:
    """UsageError when `text` is no address."""
    kind, colon, rest = text.partition(":")
    if not colon or "/" in kind:
        kind, rest = "process", text
    if kind == "tls":
        raise UsageError(f"address {text!r}: tls is not there yet; use unix: or tcp: on the loopback interface")
    if kind not in KINDS or not rest:
        raise UsageError(f"address {text!r}: write process:PATH, unix:PATH or tcp:HOST:PORT")
    if kind != "tcp":
        return Address(kind, path=Path(rest))
    host, _, port = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"address {text!r}: write tcp:HOST:PORT, with a port from 0 to 65535")
    return Address(kind, host=host, port=int(port))
