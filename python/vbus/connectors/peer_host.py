"""What connectors with a listening socket share: accepting peers, knowing them, and remembering why they went."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vbus.bus import Account, Actor, Bus, Connector, Credentials, Slot, peer_credentials
from vbus.connectors.listening import unix_listener
from vbus.connectors.peer import MessagePeer

log = logging.getLogger("vbus.connector")

MAX_PEERS = 64
"""Drivers behind one connector at a time."""
HISTORY = 16
GREETING_SECONDS = 10
"""How long a peer may be silent before its place is given to another."""


class PeerHost(Connector):
    """A connector whose drivers come through a listening socket."""

    def __init__(self, *, devices: Iterable[str] | None = None) -> None:
        super().__init__(devices=devices)
        self.peers: list[MessagePeer] = []
        self._departed: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._actor: Actor | None = None
        self._stopped = False
        self._peers_lock = threading.Lock()
        """Whoever comes while the connector stops is in its lists, or sees that it is stopped."""

    @abstractmethod
    def listen(self, bus: Bus, name: str) -> socket.socket:
        """A bound socket. UsageError."""

    @abstractmethod
    def greet(self, sock: socket.socket, bus: Bus, label: str, accounts: list[Account]) -> MessagePeer | None:
        """Make a peer of an admitted connection, or None: then peers are to come, by `add`. OSError."""

    @abstractmethod
    def refuse(self, sock: socket.socket, reason: str) -> None:
        """Say no, in the way of the connector; the socket is closed afterwards."""

    def admits(self, bus: Bus, who: Credentials | None) -> bool:
        """Whether this peer may connect."""
        return who is not None and bus.members.admits(who)

    def bind(self, bus: Bus, name: str) -> None:
        """Bind the socket and listen: whoever connects before `start` waits, and nobody takes the socket for stale."""
        self._listener = self.listen(bus, name)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self.bus, self.name = bus, name
        self._stopped = False

    def start(self) -> None:
        """Accept drivers."""
        assert self._listener is not None
        assert self.bus is not None
        if self._actor is None:
            self._actor = Actor(self.bus.pool, f"connector {self.name}")
            self._actor.watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        bus, listener = self.bus, self._listener
        if bus is None or listener is None:
            return
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, most likely: whoever waits stays in the backlog. Do not spin on it.
            log.error("%s/%s: cannot accept: %s", bus.name, self.name, error.strerror)
            time.sleep(0.05)
            return
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            try:
                who = peer_credentials(sock)
                label = f"{self.name}: {who if who is not None else 'unknown'}"
                if not self.admits(bus, who):
                    self._refuse(sock, label, "is not a member of this bus")
                elif not self.has_place():
                    self._refuse(sock, label, f"has no place: {MAX_PEERS} drivers are connected")
                else:
                    peer = self.greet(sock, bus, label, bus.accounts_of(who))
                    stack.pop_all()
                    if peer is not None:
                        self.add(peer)
            except OSError as error:
                self._note(f"{self.name}", f"could not be greeted: {error}")

    def add(self, peer: MessagePeer) -> None:
        """Know a peer, unless its turns have parted from it already; part from it when the connector is stopped."""
        with self._peers_lock:
            stopped = self._stopped
            if not stopped and not peer.parted:
                self.peers.append(peer)
        if stopped:
            peer.part("the bus stopped")

    def has_place(self) -> bool:
        """Whether one more driver can be taken; those that never introduced themselves make room."""
        if len(self.peers) >= MAX_PEERS:
            for peer in list(self.peers):
                if not peer.greeted and time.time() - peer.since > GREETING_SECONDS:
                    peer.part("it never said HELLO, and another driver came")
        return len(self.peers) < MAX_PEERS

    def _refuse(self, sock: socket.socket, label: str, reason: str) -> None:
        self._note(label, reason)
        with contextlib.suppress(OSError):
            self.refuse(sock, f"{label} {reason}")

    def identify(self, peer: MessagePeer, who: Credentials) -> bool:
        """Say who a peer is that is known only now; False when it is not a member."""
        assert self.bus is not None
        peer.label = f"{self.name}: {who}"
        peer.accounts[:] = self.bus.accounts_of(who)
        return self.admits(self.bus, who)

    def _note(self, label: str, reason: str) -> None:
        assert self.bus is not None
        log.info("%s/%s %s", self.bus.name, label, reason)
        self._departed.append({"peer": label, "reason": reason, "time": time.time()})

    def peer_parted(self, peer: MessagePeer, reason: str) -> None:
        """Keep why a peer went."""
        self._note(peer.label, reason)
        with self._peers_lock:
            if peer in self.peers:
                self.peers.remove(peer)

    def plugged(self, slot: Slot) -> None:
        """Offer the device to every peer."""
        for peer in list(self.peers):
            peer.plugged(slot)

    def unplugged(self, slot: Slot) -> None:
        """Tell every peer that the device is gone."""
        for peer in list(self.peers):
            peer.unplugged(slot)

    def channels_changed(self) -> None:
        """Tell every peer that wants to know."""
        for peer in list(self.peers):
            peer.channels_changed()

    def holds(self, number: int) -> bool:
        """Whether a driver has not let go of this number."""
        return any(number in peer.held for peer in list(self.peers))

    def stop(self) -> None:
        """Part from all peers and give the socket back."""
        if self._actor is not None:
            self._actor.close()
            self._actor = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._path = None
        with self._peers_lock:
            self._stopped = True
            closing = list(self.peers)
        for peer in closing:
            peer.part("the bus stopped")
        deadline = time.monotonic() + 2
        while any(not peer.actor.closed for peer in closing) and time.monotonic() < deadline:
            time.sleep(0.002)

    def describe(self) -> dict[str, Any]:
        """The connector's row in a listing."""
        return super().describe() | {
            "peers": [peer.describe() for peer in list(self.peers)],
            "departed": list(self._departed),
        }

    def unix_listener(self, path: Path, kind: socket.SocketKind) -> socket.socket:
        """A bound Unix socket at `path`, which is taken away in the end. UsageError."""
        sock = unix_listener(path, kind)
        self._path = path
        return sock
