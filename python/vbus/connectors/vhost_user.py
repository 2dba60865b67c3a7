"""The `vhost-user` connector: one device for one front-end (QEMU, crosvm, DPDK), whose guest it serves.

Link: vhost-user's own messages on a Unix socket, where vbus listens, or to which it connects again and again. Memory:
the guest's, mapped from the descriptors that the front-end sends. Signal: direct, an eventfd a queue and direction; or
in-band, messages on the same sockets. Here is how front-ends come and go; each is a `FrontEnd`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

from vbus import rundir
from vbus.bus import Actor, Bus, Connector, Device, Slot, peer_credentials
from vbus.connectors.listening import unix_listener
from vbus.connectors.vhost_user_front_end import FrontEnd
from vbus.errors import UsageError

log = logging.getLogger("vbus.connector")

RECONNECT_SECONDS = 0.5
HISTORY = 16


class VhostUser(Connector):
    """Lets a front-end of vhost-user (a hypervisor) drive one device.

    `device` is its name, or a device that is plugged already. `socket` is where the front-end attaches, by default a
    path that is printed; with `connect`, the front-end listens there and vbus comes, and comes again. UsageError.
    """

    type_name: ClassVar[str] = "vhost-user"

    def __init__(self, device: str | Device, socket: Path | str | None = None, *, connect: bool = False) -> None:
        name = device.name if isinstance(device, Device) else device
        super().__init__(devices=[name])
        if connect and socket is None:
            raise UsageError("connect: needs the path of a socket at which the front-end listens")
        self.device_name = name
        self.socket = Path(socket) if socket is not None else None
        self.connect = connect
        self.front_end: FrontEnd | None = None
        self._successor: Any = None
        """The socket of a front-end that came before the end of the last one was seen."""
        self._listener: Any = None
        self._actor: Actor | None = None
        self._departed: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._lock = threading.Lock()
        self._connect_key = 0
        self._told = ""

    @property
    def address(self) -> str:
        """`vhost-user:PATH`."""
        return f"vhost-user:{self.socket}"

    def bind(self, bus: Bus, name: str) -> None:
        """Bind the socket and listen, unless it is the front-end that listens."""
        if self.socket is None:
            self.socket = rundir.socket_path(bus.name, name)
        if not self.connect:
            self._listener = unix_listener(self.socket, socket.SOCK_STREAM)
            self._listener.listen(1)
            self._listener.setblocking(False)
        self.bus, self.name = bus, name

    def start(self) -> None:
        """Accept the front-end, or go to it."""
        assert self.bus is not None
        if self._actor is not None:
            return
        self._actor = Actor(self.bus.pool, f"connector {self.name}")
        if self._listener is not None:
            self._actor.watch(self._listener.fileno(), self._accept)
        else:
            self._connect_key = self._actor.key(self._connect, 0)
            self._actor.mark(self._connect_key)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            log.error("%s: cannot accept: %s", self.name, error.strerror)
            time.sleep(0.05)
            return
        self._greet(sock)

    def _connect(self) -> bool:
        """Go to a front-end that listens; when it does not yet, or has gone, try again soon."""
        assert self._actor is not None
        if self.front_end is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.connect(str(self.socket))
            except OSError as error:
                sock.close()
                if self._told != (text := f"{self.socket}: {error.strerror}"):
                    self._told = text
                    log.info("%s: nobody listens yet: %s", self.name, text)
            else:
                self._told = ""
                self._greet(sock)
        if self.front_end is None:
            self._actor.mark_later(self._connect_key, RECONNECT_SECONDS)
        return False

    def _greet(self, sock: socket.socket) -> None:
        assert self.bus is not None
        who = peer_credentials(sock)
        label = f"{self.name}: {who if who is not None else 'unknown'}"
        slot = next((slot for slot in self.bus.slots() if slot.name == self.device_name), None)
        reason = None
        present = self.front_end
        if who is None or not self.bus.members.admits(who):
            reason = "is not a member of this bus"
        elif slot is None:
            reason = f"there is no device {self.device_name} now"
        elif present is not None and present.is_leaving and self._successor is None:
            # Whoever closes a connection and opens another is not to be refused for having been quick.
            self._successor = sock
            if self.front_end is None:
                self._succeed()
            return
        elif present is not None:
            reason = f"{self.device_name} has a front-end already, {present.label}"
        if reason is not None or slot is None:
            sock.close()
            self._note(label, reason or "")
            return
        self.front_end = FrontEnd(self, slot, sock, label, self.bus.accounts_of(who))

    def _note(self, label: str, reason: str) -> None:
        assert self.bus is not None
        log.info("%s/%s: %s", self.bus.name, label, reason)
        self._departed.append({"peer": label, "reason": reason, "time": time.time()})

    def parted(self, front_end: FrontEnd, reason: str) -> None:
        """Keep why a front-end went, and make room for the next."""
        self._note(front_end.label, reason)
        with self._lock:
            if self.front_end is front_end:
                self.front_end = None
        actor = self._actor
        if actor is not None:
            actor.post(self._succeed)
        if self.connect and self._actor is not None and not self._actor.closed:
            self._actor.mark_later(self._connect_key, RECONNECT_SECONDS)

    def _succeed(self) -> None:
        """Let in who has waited for the last front-end to be gone."""
        sock, self._successor = self._successor, None
        if sock is not None:
            self._greet(sock)

    def plugged(self, slot: Slot) -> None:
        """Its device arrived: a front-end may come now."""

    def unplugged(self, slot: Slot) -> None:
        """Its device is gone."""
        front_end = self.front_end
        if front_end is not None and front_end.slot is slot:
            front_end.part("the device was unplugged")

    def channels_changed(self) -> None:
        """No channel reaches a front-end."""

    def stop(self) -> None:
        """Part from the front-end and give the socket back."""
        if self._actor is not None:
            self._actor.close()
            self._actor = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                assert self.socket is not None
                self.socket.unlink()
        if self._successor is not None:
            self._successor.close()
            self._successor = None
        front_end = self.front_end
        if front_end is not None:
            front_end.part("the bus stopped")
            deadline = time.monotonic() + 2
            while not front_end.actor.closed and time.monotonic() < deadline:
                time.sleep(0.002)

    def describe(self) -> dict[str, Any]:
        """The connector's row in a listing."""
        front_end = self.front_end
        return super().describe() | {
            "peers": [] if front_end is None else [front_end.describe()],
            "departed": list(self._departed),
            "connects": self.connect,
        }
