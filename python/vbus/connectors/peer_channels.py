"""The event channels that one driver's side has open: from its messages to the channels of the bus, and back.

Control (open, close, which are there) comes on the link like everything else; events and credits come wherever the
connector carries them. Everything that the driver's side says is checked here or in the end (`vbus.channel`) that it is
about.
"""

from __future__ import annotations

import errno
import threading
import weakref
from typing import TYPE_CHECKING

from vbus import msg
from vbus.bus import Channel, ChannelExistsError, ChannelTakenError, NoSuchChannelError, check_name, reserve_all
from vbus.channel import MAX_EVENT, WINDOW, ChannelClosedError, ChannelEnd, Mirror
from vbus.errors import UsageError
from vbus.shmem.area import REGION_ALIGN, REGIONS_SIZE
from vbus.shmem.buddy import Buddy

if TYPE_CHECKING:
    from vbus.connectors.peer import MessagePeer

MAX_CHANNELS = 4096
"""Channels that one driver's side may have open."""
EVENT_MESSAGE = msg.FRAME_HEADER_SIZE + 4 + MAX_EVENT
"""Bytes of the largest CHANNEL_EVENT: a driver's side that takes less cannot open channels."""


class PeerChannels:
    """A driver's side's channels, by the number that they have on its link. Its ends' carrier."""

    def __init__(self, peer: MessagePeer) -> None:
        # The peer has this; its descriptors go with it, not when a cycle is collected.
        self._link = weakref.ref(peer)
        self._accounts = peer.accounts
        self._ends: dict[int, ChannelEnd] = {}
        self._channels: dict[int, tuple[Channel, int | None]] = {}
        self._regions = Buddy(REGIONS_SIZE, REGION_ALIGN)
        self._names: set[str] = set()
        self._owing: set[ChannelEnd] = set()
        self._refused: set[ChannelEnd] = set()
        """Ends whose last event found no room: they alone are told when there is some."""
        self._lock = threading.Lock()
        self.interested = False
        """Whether the driver's side has shown that it knows of channels."""

    @property
    def _peer(self) -> MessagePeer:
        """The peer, in its turns."""
        peer = self._link()
        assert peer is not None
        return peer

    # What the driver's side says. In the peer's turn.

    def handle(self, frame: msg.Frame) -> bool:
        """Handle a message about channels; False when it is about something else. Violation."""
        match frame.body:
            case msg.ChannelOpen() as wanted:
                self.interested = True
                self._open(frame, wanted)
            case msg.NextChannel(name=name):
                self.interested = True
                channel = self._peer.bus.channels.after(name, self._peer)
                found = (0, 0, "") if channel is None else (channel.priority, channel.memory_size, channel.name)
                self._peer.send(msg.NextChannelResponse(*found), token=frame.token)
            case _:
                return self.heard(frame)
        return True

    def heard(self, frame: msg.Frame) -> bool:
        """Handle what is said on a channel; False when it is something else. Violation."""
        match frame.body:
            case msg.ChannelEvent(channel=number, data=data):
                end = self._ends.get(number)
                if end is not None:
                    end.arrived(data)
                    self._channels[number][0].heard(end, data)
            case msg.ChannelCredit(channel=number, consumed=consumed):
                end = self._ends.get(number)
                if end is not None:
                    end.credited(consumed)
            case msg.ChannelMemory(channel=number, offset=offset, data=data):
                end = self._ends.get(number)
                if end is not None and end.mirror is not None:
                    end.mirror.write(offset, data)
            case msg.ChannelClose(channel=number):
                end = self._ends.get(number)
                if end is not None and end.ended("the driver left"):
                    self._forget(end)
                self._peer.send(msg.ChannelCloseResponse(), token=frame.token)
            case _:
                return False
        return True

    def _open(self, frame: msg.Frame, wanted: msg.ChannelOpen) -> None:
        peer = self._peer
        if peer.limit < EVENT_MESSAGE:
            text = f"events come in messages of up to {EVENT_MESSAGE} bytes; this link takes {peer.limit}"
            peer.refuse(frame, errno.EMSGSIZE, text)
            return
        if len(self._ends) >= MAX_CHANNELS:
            peer.refuse(frame, errno.EMFILE, f"{MAX_CHANNELS} channels are open, the most for one driver")
            return
        if wanted.channel in self._ends:
            peer.refuse(frame, errno.EALREADY, f"there is a channel {wanted.channel} on this link")
            return
        refusing = reserve_all(peer.accounts, "channels", 1)
        if refusing is not None:
            limit = refusing.limits["channels"]
            peer.refuse(frame, errno.EMFILE, f"{refusing.name} may have {limit} channels open here")
            return
        before = len(self._ends)
        try:
            self._open_within_limits(frame, wanted)
        finally:
            if len(self._ends) == before:
                self._give_back()

    def _give_back(self) -> None:
        for account in self._accounts:
            account.give_back("channels", 1)

    def _open_within_limits(self, frame: msg.Frame, wanted: msg.ChannelOpen) -> None:
        peer, channels = self._peer, self._peer.bus.channels
        created = None
        try:
            if wanted.flags & msg.ChannelFlags.CREATE:
                check_name("channel", wanted.name)
                channel = created = channels.open(
                    wanted.name, priority=wanted.priority, memory=wanted.memory, owner=peer
                )
            else:
                channel = channels.for_driver(wanted.name, peer)
                if wanted.name in self._names:
                    peer.refuse(frame, errno.EALREADY, f"channel {wanted.name!r} is open on this link")
                    return
            self._join(frame, channel, wanted.channel)
        except NoSuchChannelError as error:
            peer.refuse(frame, errno.ENOENT, str(error))
        except ChannelTakenError as error:
            peer.refuse(frame, errno.EBUSY, str(error))
        except ChannelExistsError as error:
            peer.refuse(frame, errno.EEXIST, str(error))
        except ChannelClosedError as error:
            peer.refuse(frame, errno.ENOENT, str(error))
        except UsageError as error:
            peer.refuse(frame, errno.EINVAL, str(error))
        except MemoryError:
            if created is not None:
                created.close()
            peer.refuse(frame, errno.ENOMEM, f"no room for a region of {channel.memory_size} bytes")

    def _join(self, frame: msg.Frame, channel: Channel, number: int) -> None:
        """Make this side's end. MemoryError, ChannelClosedError."""
        size = channel.memory_size
        place = self._regions.take(size) if size else None
        if size and place is None:
            raise MemoryError
        offset, memory = self._peer.map_region(place, size) if place is not None else (0, None)
        end = ChannelEnd(
            self,
            number=number,
            name=channel.name,
            priority=channel.priority,
            window=WINDOW,
            deliver=channel.inbox.deliver,
            memory=memory if isinstance(memory, memoryview) else None,
            mirror=memory if isinstance(memory, Mirror) else None,
            label=self._peer.label,
        )
        self._channels[number] = channel, place
        self._ends[number] = end
        self._names.add(channel.name)
        # Whoever speaks on the channel from now on waits until the answer is under way: it says what the region is.
        with end.held():
            try:
                channel.joined(end)
            except ChannelClosedError:
                self._remove(end)
                raise
            self._peer.send(msg.ChannelOpenResponse(channel.priority, WINDOW, offset, size), token=frame.token)

    # What the bus says: the carrier of the ends. From any thread.

    def carry(self, end: ChannelEnd, data: bytes) -> bool:
        """Send an event, and before it what was written to a copied region."""
        peer = self._link()
        if peer is None:
            return False
        if end.mirror is not None:
            if not peer.has_room():
                with self._lock:
                    self._refused.add(end)
                return False
            piece = peer.limit - MEMORY_HEAD
            for offset, changed in end.mirror.changes():
                for at in range(0, len(changed), piece):
                    self._say(end, msg.ChannelMemory(end.number, offset + at, changed[at : at + piece]))
        if self._say(end, msg.ChannelEvent(end.number, data)):
            return True
        with self._lock:
            self._refused.add(end)
        return False

    def _say(self, end: ChannelEnd, body: msg.Body) -> bool:
        peer = self._link()
        return peer is not None and peer.transmit_on_channel(end.priority, msg.encode(msg.Frame(body)))

    def carry_credit(self, end: ChannelEnd) -> None:
        """Tell what was consumed, or remember to."""
        # One at a time: a credit that was overtaken by a later one would take it back.
        with end.held():
            told = self._say(end, msg.ChannelCredit(end.number, end.take_credit()))
        if not told:
            with self._lock:
                self._owing.add(end)

    def leave(self, end: ChannelEnd) -> None:
        """The bus closed the channel: say so behind what was said on it, or at least on the link."""
        peer = self._link()
        if peer is None:
            return
        closed = msg.ChannelClosed(end.number, end.closed)
        if not self._say(end, closed):
            peer.send(closed)
        peer.actor.post(lambda: self._forget(end))

    def room(self, priority: int | None = None) -> None:
        """There is room again (for messages of one priority): pay what is owed, and let senders know."""
        with self._lock:
            owing = [end for end in self._owing if priority is None or end.priority == priority]
            self._owing.difference_update(owing)
            refused = [end for end in self._refused if priority is None or end.priority == priority]
            self._refused.difference_update(refused)
        for end in owing:
            self.carry_credit(end)
        for end in refused:
            end.has_room()

    # The end.

    def _forget(self, end: ChannelEnd) -> None:
        channel = self._remove(end)
        if channel is not None:
            self._give_back()
            channel.left(end)

    def _remove(self, end: ChannelEnd) -> Channel | None:
        if self._ends.pop(end.number, None) is None:
            return None
        channel, place = self._channels.pop(end.number)
        self._names.discard(end.name)
        if place is not None:
            self._regions.give_back(place)
        with self._lock:
            self._owing.discard(end)
            self._refused.discard(end)
        return channel

    def close(self) -> None:
        """The driver's side is gone: so are its ends, and the channels that it made."""
        for end in list(self._ends.values()):
            end.ended("the driver is gone")
            self._forget(end)

    def describe(self) -> list[str]:
        """The names of the channels that are open."""
        return sorted(end.name for end in list(self._ends.values()))


MEMORY_HEAD = 16
"""Bytes of CHANNEL_MEMORY before its data."""
