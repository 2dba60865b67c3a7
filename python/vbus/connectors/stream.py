"""The `stream` connector: drivers at the far end of a byte stream, with no memory in common.

Link and signal are the stream itself; memory is copied. A driver's requests arrive as messages, each with the bytes
that the device may read. Behind the connector is a private ring, driven from here, in an arena of its own, so that
every device runs behind it as it does behind any other ring; what the device has written goes back with the completion.
No address and no index of a ring ever crosses the stream.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vbus import _core, address, msg
from vbus.bus import Account, Bus, Credentials, Queue, Ring, Slot
from vbus.bus.members import NOBODY
from vbus.bus.slot import SignalCounters
from vbus.channel import Mirror
from vbus.connectors.peer import HEADROOM, MessagePeer
from vbus.connectors.peer_host import PeerHost
from vbus.errors import TlsError, UsageError, Violation
from vbus.msg.wire import WireWriter, tune
from vbus.shmem.arena import Arena
from vbus.virtio import features

if TYPE_CHECKING:
    import ssl

    # A tenth of a second that only those pay who want it.
    from vbus.tls import Tls

MAX_MESSAGE = 65528
MAX_REQUEST = 4 << 20
READ_SIZE = 1 << 18
REAP = 64


class Stream(PeerHost):
    """Lets drivers reach the bus over TCP or a Unix stream socket.

    `listen` is `tcp:HOST:PORT` (port 0: any, see `address`), `tls:HOST:PORT` or `unix:PATH`. Plain TCP stays on the
    loopback interface, where the kernel tells whose the other end is, unless `insecure` lets anybody in. TLS takes the
    files `certificate`, `key` and `authority`, and asks drivers for certificates which that authority has signed; who
    is let in is said by members `tls:NAME`. UsageError.
    """

    type_name: ClassVar[str] = "stream"

    def __init__(
        self,
        listen: str,
        *,
        devices: Iterable[str] | None = None,
        insecure: bool = False,
        certificate: Path | str | None = None,
        key: Path | str | None = None,
        authority: Path | str | None = None,
    ) -> None:
        super().__init__(devices=devices)
        self._where = address.parse(listen)
        self._insecure = insecure
        if self._where.kind in ("process", "vhost-user"):
            raise UsageError(f"listen {listen!r}: a stream listens on tcp:HOST:PORT, tls:HOST:PORT or unix:PATH")
        self._context: ssl.SSLContext | None = None
        if self._where.kind == "tls":
            if insecure:
                raise UsageError(f"listen {listen!r}: insecure says that anybody may come: that is for tcp")
            from vbus import tls

            self._context = tls.server_context(certificate, key, authority)
        elif certificate is not None or key is not None or authority is not None:
            raise UsageError(f"listen {listen!r}: certificate, key and authority are for tls:HOST:PORT")
        if self._where.kind == "tcp" and not self._where.is_loopback and not insecure:
            raise UsageError(
                f"listen {listen!r}: plain TCP would let anybody in; listen on 127.0.0.1, or set insecure = true"
            )

    @property
    def address(self) -> str:
        """`tcp:HOST:PORT` or `tls:HOST:PORT` with the port that was bound, or `unix:PATH`."""
        return str(self._where)

    def listen(self, bus: Bus, name: str) -> socket.socket:
        """Bind the socket."""
        where = self._where
        if where.kind == "unix":
            return self.unix_listener(where.path, socket.SOCK_STREAM)
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0]
            sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            raise UsageError(f"listen {where}: {error.strerror}") from None
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(place)
        except OSError as error:
            sock.close()
            raise UsageError(f"listen {where}: {error.strerror}; choose another port, or 0 for any") from None
        self._where = address.Address(where.kind, host=where.host, port=sock.getsockname()[1])
        return sock

    def admits(self, bus: Bus, who: Credentials | None) -> bool:
        """Members, and over insecure TCP whoever comes."""
        if self._context is not None and (who is None or who.uid != NOBODY):
            # Who it is, its certificate says, later; the user that the kernel might know does not count.
            return True
        return super().admits(bus, who) or (self._insecure and self._where.kind == "tcp")

    def greet(self, sock: socket.socket, bus: Bus, label: str, accounts: list[Account]) -> StreamPeer:
        """The driver speaks first; there is nothing to send."""
        if self._context is None:
            return StreamPeer(self, bus, label, accounts, sock)
        from vbus.tls import Tls

        return StreamPeer(self, bus, f"{self.name}: tls", [], sock, Tls(self._context, server_side=True))

    def refuse(self, sock: socket.socket, reason: str) -> None:
        """Say why, as an answer to the HELLO that is on its way; over TLS there is no way to say it yet."""
        if self._context is not None:
            return
        sock.setblocking(False)
        sock.send(msg.encode(msg.Frame(body=msg.Error(13, msg.message_id(msg.Hello), reason), dev_num=0, token=0)))


@dataclass(slots=True)
class Transfer:
    """A request on its way through: where its bytes are in the arena, and how many have come."""

    id: int
    start: int
    readable: int
    writable: int
    received: int = 0


class Bridge:
    """One queue of a remote driver: requests of the stream in, a private ring towards the device out."""

    def __init__(self, peer: StreamPeer, slot: Slot, queue: Queue, size: int) -> None:
        self.peer = peer
        self.number, self.index = slot.number, queue.index
        self.size = size
        ring_size = 1 << max(size - 1, 0).bit_length()
        self._arena = peer.arena
        ring_features = features.of_ring(slot.negotiated)
        place = self._arena.take(_core.DriverQueue.bytes_needed(ring_size, packed=ring_features["packed"]))
        if place is None:
            raise Violation("too-much-memory", f"no room for a queue of {size} in the arena of this driver")
        self._place = place
        self.ring = _core.DriverQueue(
            self._arena.mapping,
            place,
            self._arena.address,
            ring_size,
            signal=_core.Signal.local(peer.bus.pool.scheduler, slot.key(queue)),
            **ring_features,
        )
        self.priority = slot.queue_priorities[queue.index]
        self.key = peer.actor.key(self.reap, self.priority)
        self.requests = 0
        self.completions = 0
        self._arriving: dict[int, Transfer] = {}
        self._under_way: dict[int, Transfer] = {}
        self._ids: set[int] = set()
        self.closed = False

    def begin(self, request: msg.Request) -> bool:
        """Take a request, or the first part of one; False when the arena has no room now. Violation."""
        total = request.readable_total + request.writable_total
        if request.id in self._ids:
            raise Violation("request-id-twice", f"request {request.id} is outstanding already")
        if len(self._ids) >= self.size:
            raise Violation("too-many-requests", f"queue {self.index} takes {self.size} at a time")
        if not 0 < total <= MAX_REQUEST:
            raise Violation("request-size", f"{total} bytes; 1 to {MAX_REQUEST} are taken")
        if len(request.data) > request.readable_total:
            raise Violation("request-size", f"{len(request.data)} bytes of {request.readable_total}")
        start = self._arena.take(total)
        if start is None:
            return False
        self._ids.add(request.id)
        transfer = Transfer(request.id, start, request.readable_total, request.writable_total)
        self._arriving[request.id] = transfer
        self.requests += 1
        self._arrived(transfer, request.data)
        return True

    def more(self, data: msg.Data) -> None:
        """Take a further part of a request. Violation."""
        transfer = self._arriving.get(data.id)
        if transfer is None or data.direction != msg.Direction.TO_DEVICE:
            raise Violation("data-unasked", f"a part of request {data.id}, which waits for none")
        if data.offset != transfer.received or data.offset + len(data.data) > transfer.readable:
            raise Violation("data-offset", f"bytes {data.offset} + {len(data.data)} of {transfer.readable}")
        self._arrived(transfer, data.data)

    def _arrived(self, transfer: Transfer, data: bytes | memoryview) -> None:
        at = transfer.start + transfer.received
        self._arena.view[at : at + len(data)] = data
        transfer.received += len(data)
        if transfer.received < transfer.readable:
            return
        del self._arriving[transfer.id]
        base = self._arena.address + transfer.start
        token = self.ring.add(
            [(base, transfer.readable)] if transfer.readable else [],
            [(base + transfer.readable, transfer.writable)] if transfer.writable else [],
        )
        if token is None:
            raise Violation("too-many-requests", f"queue {self.index} is full")
        self._under_way[token] = transfer
        self.ring.publish()

    def reap(self) -> bool:
        """Send what the device has finished; bytes that it did not write stay here. In the peer's turn."""
        if self.closed:
            return False
        used = self.ring.reap(REAP)
        fragment = self.peer.limit - HEADROOM
        for token, written in used:
            transfer = self._under_way.pop(token)
            self._ids.discard(transfer.id)
            begin = transfer.start + transfer.readable
            data = bytes(self._arena.view[begin : begin + written])
            self._arena.give_back(transfer.start)
            self.completions += 1
            sent = 0
            while written - sent > fragment:
                part = data[sent : sent + fragment]
                self._say(msg.Data(self.index, transfer.id, msg.Direction.TO_DRIVER, sent, part))
                sent += fragment
            self._say(msg.Complete(self.index, transfer.id, written, data[sent:]))
        if used:
            self.peer.resume()
        return len(used) == REAP

    def _say(self, body: msg.Body) -> None:
        self.peer.send(body, self.number, priority=self.priority)

    def close(self) -> None:
        """Give the arena's memory back. The ring is stopped already; in the peer's turn."""
        if self.closed:
            return
        self.closed = True
        self.peer.actor.drop_key(self.key)
        for transfer in (*self._arriving.values(), *self._under_way.values()):
            self._arena.give_back(transfer.start)
        self._arena.give_back(self._place)
        self.peer.resume()


class StreamPeer(MessagePeer):
    """One driver's side at the far end of a stream."""

    memory_kind = msg.MemoryKind.COPIED
    signal_kind = msg.SignalKind.IN_BAND
    max_message = MAX_MESSAGE
    max_request = MAX_REQUEST

    def __init__(
        self,
        host: Stream,
        bus: Bus,
        label: str,
        accounts: list[Account],
        sock: socket.socket,
        tls: Tls | None = None,
    ) -> None:
        super().__init__(host, bus, label, accounts)
        tune(sock)
        self._sock = sock
        self._tls = tls
        self._admitted = tls is None
        """Nothing is listened to before it is known who speaks."""
        self.arena = Arena()
        self.memory.add(self.arena.address, self.arena.mapping)
        self._splitter = msg.Splitter(MAX_MESSAGE)
        self._inbox: deque[bytes] = deque()
        self._stalled = False
        self._bridges: dict[tuple[int, int], Bridge] = {}
        self._writer = WireWriter(sock, bus.name, lambda why: self.part(f"the stream broke: {why}"), self._room, tls)
        self.actor.watch(sock.fileno(), self._readable)

    def transmit(self, message: bytes, priority: int) -> None:
        """Queue for the writer."""
        if not self._writer.send(message, priority) and not self.parted:
            raise Violation("link-not-read", "the driver does not read what it asked for")

    def has_room(self) -> bool:
        """Whether little waits for the driver."""
        return self._writer.has_room

    def _room(self) -> None:
        """The driver has read what waited: changes and channels may speak again."""
        self.actor.post(self.flush_events)
        self.actor.post(self.channels.room)

    def transmit_on_channel(self, priority: int, message: bytes) -> bool:
        """Queue for the writer."""
        if self.parted:
            return False
        try:
            self.transmit(message, priority)
        except Violation as violation:
            self.part(str(violation))
            return False
        return True

    def map_region(self, place: int, size: int) -> tuple[int, memoryview | Mirror]:
        """A copy of the region."""
        return 0, Mirror(size)

    def _readable(self) -> None:
        if self.parted or self._stalled:
            return
        try:
            data = self._sock.recv(READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self.part(f"the stream broke: {error.strerror}")
            return
        if not data:
            self.part("the driver closed the stream")
            return
        if self._tls is not None:
            data = self._decrypt(self._tls, data)
        for piece in self._splitter.feed(data):
            if isinstance(piece, msg.Malformed):
                self.part(f"malformed-message: {piece}")
                return
            self._inbox.append(piece)
        self._work_off()
        self.flush_events()

    def _decrypt(self, tls: Tls, data: bytes) -> bytes:
        """What the driver said; nothing while its handshake is under way, or when it is not let in."""
        try:
            plain = tls.feed(data)
        except TlsError as error:
            if not self._admitted:
                with contextlib.suppress(OSError):
                    # The alert that says why: there is nothing else yet that the writer could be writing.
                    self._sock.send(tls.wrap([]), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self.part(f"tls: {error}")
            return b""
        if tls.ready and not self._admitted:
            names = tuple(tls.names)
            if not self.host.identify(self, Credentials(NOBODY, names=names)):
                reason = f"{self.label} is not a member of this bus"
                refusal = msg.encode(msg.Frame(msg.Error(errno.EACCES, msg.message_id(msg.Hello), reason)))
                with contextlib.suppress(OSError):
                    self._sock.send(tls.wrap([refusal]), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self.part("is not a member of this bus")
                return b""
            self._admitted = True
        self._writer.poke()
        if tls.over:
            self.actor.post(lambda: self.part("the driver closed the stream"))
        return plain if self._admitted else b""

    def _work_off(self) -> None:
        while self._inbox and not self.parted:
            message = self._inbox.popleft()
            self.received(message)
            if self._stalled:
                # No room for this request now. Its driver's stream waits, in order; nobody else's does.
                self._inbox.appendleft(message)
                self.actor.unwatch(self._sock.fileno())
                return

    def resume(self) -> None:
        """The arena has room again: go on where it had none."""
        if self._stalled and not self.parted:
            self._stalled = False
            self.actor.post(self._go_on)

    def _go_on(self) -> None:
        if self.parted or self._stalled:
            return
        self._work_off()
        if not self._stalled:
            self.actor.watch(self._sock.fileno(), self._readable)

    def bodied(self, frame: msg.Frame) -> bool:
        """The data path."""
        match frame.body:
            case msg.Request() as request:
                bridge = self._bridge(frame.dev_num, request.vq_index)
                if bridge is not None:
                    self._stalled = not bridge.begin(request)
            case msg.Data() as data:
                bridge = self._bridge(frame.dev_num, data.vq_index)
                if bridge is not None:
                    bridge.more(data)
            case msg.Cancel():
                # What a device has begun cannot be taken back; a driver that lost interest ignores the completion.
                pass
            case _:
                return False
        return True

    def _bridge(self, number: int, index: int) -> Bridge | None:
        """The bridge of a queue. None when the device is gone or was reset, while its requests were on their way."""
        return self._bridges.get((number, index))

    def set_queue(self, slot: Slot, index: int, ring: Ring, done: Callable[[], None]) -> None:
        """Make the private ring, whose place is what the slot is told."""
        queue = slot.queue_at(index)
        size = ring.size
        if (slot.number, index) in self._bridges:
            raise Violation("queue-twice", f"queue {index} of device {slot.number} is set up already")
        if not 0 < size <= queue.max_size or ring != Ring(size):
            raise Violation("queue-size", f"{ring}; a size up to {queue.max_size}, and no addresses")
        bridge = Bridge(self, slot, queue, size)
        # Before the slot is told: a queue that was reset starts at once, and asks for its signal.
        self._bridges[slot.number, index] = bridge
        core = bridge.ring
        try:
            super().set_queue(slot, index, Ring(core.size, core.desc, core.driver, core.device), done)
        except BaseException:
            del self._bridges[slot.number, index]
            bridge.close()
            raise

    def signal(self, slot: Slot, queue: Queue) -> _core.Signal:
        """A turn of the peer, which sends the completions."""
        return _core.Signal.local(self.bus.pool.scheduler, self._bridges[slot.number, queue.index].key)

    def queue_reset(self, slot: Slot, queue: Queue) -> None:
        """Close the queue's bridge, in the peer's turn: this is the device's."""
        bridge = self._bridges.pop((slot.number, queue.index), None)
        if bridge is not None:
            self.actor.post(bridge.close)

    def slot_reset(self, slot: Slot) -> None:
        """Close the slot's bridges, in the peer's turn: this is the device's."""
        closing = [self._bridges.pop(key) for key in list(self._bridges) if key[0] == slot.number]
        for bridge in closing:
            self.actor.post(bridge.close)

    def counters(self, slot: Slot, queue: Queue) -> SignalCounters:
        """In band, every message is an event, sent, and a doorbell."""
        bridge = self._bridges.get((slot.number, queue.index))
        if bridge is None:
            return (0, 0, 0), (0, 0, 0)
        return (bridge.requests,) * 3, (bridge.completions,) * 3

    def close(self) -> None:
        """End the writer, close the socket, give the arena back."""
        self.actor.unwatch(self._sock.fileno())
        self._writer.close()
        with contextlib.suppress(OSError):
            self._sock.close()
        for bridge in list(self._bridges.values()):
            bridge.close()
        self._bridges.clear()
        self._inbox.clear()
        self.arena.close()
