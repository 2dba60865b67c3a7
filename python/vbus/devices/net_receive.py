"""A receive queue of a network device: packets go into the buffers that a driver has put there, in one or several.

Buffers are taken off the ring ahead, as many as there are up to a burst, and given back together when a burst of
packets ends, so that the driver is signalled once. A packet that finds too few buffers is kept, and goes first when
there are more; nothing behind it is read meanwhile.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from vbus.bus import Queue, Request
from vbus.errors import Violation
from vbus.virtio.net import HEADER

BURST = 64


class Receiver:
    """The receive side of one pair."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.merge = False
        """Whether a packet may lie in several buffers (MRG_RXBUF)."""
        self.packets = 0
        self.bytes = 0
        self.too_long = 0
        """Packets that fitted into no buffer of the driver, or into not all of them."""
        self._stock: deque[Request] = deque()
        self._filled: list[Request] = []
        self._kept: memoryview | None = None

    def reset(self) -> None:
        """The driver's buffers are gone, and so is what was kept for it."""
        self._stock.clear()
        self._filled.clear()
        self.forget()

    def let_go(self) -> None:
        """The queue stops, and may go on: what is filled is the driver's, what is empty comes again."""
        self.publish()
        self._stock.clear()

    def forget(self) -> int:
        """Nothing more is to come; gives how many packets were kept, and are lost."""
        kept, self._kept = self._kept, None
        return kept is not None

    def keep(self, packet: bytes | bytearray) -> None:
        """Have a packet go first that is known to be wanted."""
        self._kept = memoryview(bytearray(packet))

    def has_room(self) -> bool:
        """Whether there is a buffer, and no packet that it is for. Violation: rx-buffer-too-small."""
        if self._stock and self._stock[0].done:
            # The queue was stopped, and these went with it.
            self._stock.clear()
            self._filled.clear()
        if self._kept is not None:
            packet, self._kept = self._kept, None
            if not self.put(packet):
                return False
        return bool(self._stock) or self._take()

    def _take(self) -> bool:
        taken = self.queue.take_batch(BURST)
        for request in taken:
            if request.writable_total < HEADER.size:
                raise Violation(
                    "rx-buffer-too-small", f"{request.writable_total} writable bytes; a header has {HEADER.size}"
                )
        self._stock += taken
        return bool(taken)

    def put(self, packet: memoryview) -> bool:
        """Lay a packet into buffers; False when there are too few: then it is kept. Violation: rx-buffer-too-small.

        The last two bytes of its header, num_buffers, are written here.
        """
        size = len(packet)
        if not self._stock and not self._take():
            self._kept = memoryview(bytearray(packet))
            return False
        first = self._stock[0]
        if first.writable_total >= size:
            packet[10], packet[11] = 1, 0
            first.write(packet)
            self._filled.append(self._stock.popleft())
        elif not self.merge:
            self.too_long += 1
            return True
        elif not self._spread(packet):
            return False
        self.packets += 1
        self.bytes += size - HEADER.size
        return True

    def _spread(self, packet: memoryview) -> bool:
        """Lay a packet over several buffers, all but the last of them to their end."""
        size = len(packet)
        room = count = 0
        while room < size:
            if count == len(self._stock) and not self._take():
                if count < self.queue.core.size:
                    self._kept = memoryview(bytearray(packet))
                    return False
                # Every buffer that the driver could ever have there at a time.
                self.too_long += 1
                self.packets -= 1
                self.bytes -= size - HEADER.size
                return True
            for request in islice(self._stock, count, None):
                room += request.writable_total
                count += 1
                if room >= size:
                    break
        packet[10:12] = count.to_bytes(2, "little")
        start = 0
        for _ in range(count):
            request = self._stock.popleft()
            end = start + request.writable_total
            request.write(packet[start:end])
            self._filled.append(request)
            start = end
        return True

    def publish(self) -> None:
        """Give the driver all that was laid into buffers."""
        if self._filled:
            filled, self._filled = self._filled, []
            self.queue.complete(*filled)
