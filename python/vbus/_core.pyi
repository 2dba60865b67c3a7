"""The native core: what runs once per descriptor or once per event, and nothing that decides policy.

Offsets and sizes are bytes. Driver addresses are numbers of the driver's address space, translated by `Memory`.
Everything that reads what the other side wrote raises `vbus.errors.Violation`, with a stable name.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypedDict, final, overload

from typing_extensions import disjoint_base

from vbus.errors import Violation

_ReadableBuffer: TypeAlias = bytes | bytearray | memoryview

__all__ = [
    "Batch",
    "BenchRequest",
    "BlkEngine",
    "DeviceQueue",
    "Doorbell",
    "DriverQueue",
    "EchoSide",
    "Engine",
    "EventReceiver",
    "EventSender",
    "Frames",
    "LinkRing",
    "Load",
    "LoopbackEngine",
    "Mapping",
    "Memory",
    "NetRules",
    "PcapEngine",
    "PcapFile",
    "PingSide",
    "Request",
    "Scheduler",
    "Signal",
    "Switch",
    "SwitchEngine",
    "SwitchPort",
    "TapEngine",
    "Task",
    "Worker",
    "bench_calls",
    "bench_reads",
]

@final
class Mapping:
    """Bytes of a file, mapped shared into this process; unmapped when its last user (region, ring, view) is gone."""

    def __new__(cls, fd: int, size: int, offset: int = 0, *, writable: bool = True, guarded: bool = False) -> Mapping:
        """Map `size` bytes of the file `fd` from `offset` (a multiple of the page size); `fd` may be closed after.

        `guarded`: should its owner truncate the file, then whoever touches what is gone goes on with zeroes in place of
        all of the mapping, and it is `lost`. Without it that is SIGBUS. The first one installs a handler for SIGBUS,
        which gives others to the one from before; one that is installed later must do the same. (The system's own
        accesses, as in `os.write` of a view, fail with EFAULT and lose nothing.)

        Raises OSError when the system refuses, ValueError when size is 0 or the file ends before offset + size.
        """
    @property
    def size(self) -> int: ...
    @property
    def lost(self) -> bool:
        """Its file was truncated and something touched what is gone. Stays true. Rings and memories that use it raise
        the violation region-lost.
        """
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Memory:
    """A driver's memory: regions by driver address, added and removed while rings use them.

    Translation checks bounds, overflow and protection; a range may run over adjacent regions. A removed region's
    mapping lives on while a request or a view uses it.
    """

    def __new__(cls, *, max_regions: int = 64, max_bytes: int = ...) -> Memory: ...
    def add(
        self, address: int, mapping: Mapping, offset: int = 0, size: int | None = None, *, writable: bool = True
    ) -> None:
        """Violation: region-empty, region-wraps, region-overlaps, region-outside-file, region-read-only (writable
        asked of a read-only mapping), too-many-regions, too-much-memory.
        """
    def remove(self, address: int) -> None:
        """Violation: region-unknown."""
    def clear(self) -> None: ...
    def regions(self) -> list[tuple[int, int, bool]]:
        """(address, size, writable) of each region, by address."""
    def read(self, address: int, size: int) -> bytes:
        """Violation: address-outside-memory, region-lost."""
    def write(self, address: int, data: _ReadableBuffer) -> None:
        """Violation: address-outside-memory, region-read-only, region-lost; log-too-small, when it is written."""
    def log(self, mapping: Mapping | None) -> None:
        """From now on, set a bit for each page of 4096 bytes that is written (page % 8 of byte page / 8, counted from
        driver address 0) in this writable mapping; None: no more. From any thread, while requests are in flight.

        A bit is set after the bytes were written: for `write` at once, for a request when it is completed (all that it
        could write, as `views` may have been written anywhere), for a ring whenever its device side writes it. What a
        request wrote that is never completed is not said: a driver may not look at buffers that it does not get back.
        """

@final
class Doorbell:
    """An eventfd that the other process shares: rung without ever being stuck in it, whatever that process does."""

    def __new__(cls, fd: int) -> Doorbell:
        """Takes a duplicate of `fd`."""
    def ring(self) -> bool:
        """Add one. False when the bell is full or jammed (then the other side already has more than it can hear)."""
    def drain(self) -> int:
        """How many rings since the last drain; 0 when none. Never blocks."""
    @property
    def jammed(self) -> bool:
        """The other side made the eventfd blocking and full, so that a ring had to be broken off. Stays true."""
    def fileno(self) -> int: ...

@final
class Signal:
    """How one source says "look at this queue"; rings call it themselves, after their own suppression."""

    @staticmethod
    def direct(doorbell: Doorbell, stats: tuple[Mapping, int] | None = None) -> Signal:
        """One notification, one doorbell. `stats`: where in shared memory the three counters are kept for the other
        side to see (3 little-endian u64: signalled, sent, rung), as `EventSender` does.
        """
    @staticmethod
    def local(scheduler: Scheduler, key: int) -> Signal:
        """Marks a key of a scheduler of this process."""
    def notify(self) -> None: ...
    @property
    def counters(self) -> tuple[int, int, int]:
        """Events signalled, events sent, doorbells rung, since this signal was made."""

@final
class EventSender:
    """The producing side of one direction's event rings, one ring a priority."""

    def __new__(
        cls,
        area: Mapping,
        *,
        slots: int,
        stats: int,
        taken: int,
        sleep: int,
        max_sources: int,
        priorities: int,
        doorbells: Sequence[Doorbell],
        always: bool = False,
    ) -> EventSender:
        """Offsets into `area`: `slots` (per priority, max_sources slots of 16 bytes: u32 sequence, source, generation,
        0), `stats` (per source 32 bytes: u64 signalled, sent, rung, 0), `taken` (u32 per source, the consumer's),
        `sleep` (per priority one u32 at the start of 64 bytes, the consumer's). max_sources is a power of two.
        One doorbell a priority; with `always` it rings for every signal, whether its consumer sleeps or not. ValueError
        when the geometry does not fit the area or is misaligned.
        """
    def open(self, source: int, generation: int, priority: int) -> Signal:
        """Start a generation of a source: clears this side's half of the pair. ValueError: out of range."""
    def close(self, source: int) -> None:
        """Signals of this source do nothing from now on."""
    @property
    def counters(self) -> tuple[int, int, int]:
        """Signalled, sent, rung: sums over all sources."""

@final
class EventReceiver:
    """The consuming side of one direction's event rings; a `Scheduler` drains it."""

    def __new__(
        cls, area: Mapping, *, slots: int, taken: int, sleep: int, max_sources: int, priorities: int
    ) -> EventReceiver: ...
    def open(self, source: int, generation: int, key: int) -> None:
        """Events of this source and generation mark `key`; clears this side's half of the pair."""
    def close(self, source: int) -> None: ...
    @property
    def taken(self) -> int:
        """Events taken that had an open source."""
    @property
    def dropped(self) -> int:
        """Events of an old generation or of a closed source."""
    @property
    def fault(self) -> Violation | None:
        """Why this receiver stopped draining (event-source-out-of-range), if it did."""

@final
class Scheduler:
    """Hands ready keys to threads, most urgent first; no two threads ever hold keys of one actor.

    A key becomes ready when it is marked, when its file descriptor is readable, or when an event of its source is
    taken. `next` waits without the interpreter lock; while any thread waits in it, the event rings are asleep and the
    doorbells wake it; they are drained again on every call.
    """

    def __new__(cls) -> Scheduler: ...
    def actor(self) -> int:
        """A new actor."""
    def key(self, actor: int, priority: int = 0) -> int:
        """A new key of this actor; priority 0 is the most urgent of 8."""
    def drop_key(self, key: int) -> None:
        """Forget a key: it is not handed out again. Unknown keys are ignored."""
    def drop_actor(self, actor: int) -> None:
        """Forget an actor and all its keys."""
    def mark(self, key: int) -> None:
        """Make a key ready, from any thread. Marking a ready key does nothing; a key marked while its own turn runs
        is ready again after `done`.
        """
    def route(self, key: int, task: Task | None) -> None:
        """From now on, whatever marks the key gives this task a turn at its worker instead; None: no more."""
    def add_fd(self, fd: int, key: int) -> None:
        """Readable (or hung up) marks `key`; looked at again after the key's turn. Several fds may share a key."""
    def remove_fd(self, fd: int) -> None: ...
    def add_events(self, receiver: EventReceiver, doorbells: Sequence[Doorbell], fault_key: int) -> None:
        """Drain `receiver` from now on; its fault marks `fault_key`."""
    def remove_events(self, receiver: EventReceiver) -> None: ...
    def next(
        self, timeout: float | None = None, *, done: tuple[int, int, bool] | None = None
    ) -> tuple[int, int] | None:
        """(actor, key), whose turn begins; None when `timeout` seconds passed or the scheduler was closed.

        `done`: the turn that is over (actor, key, again), as the method has it, for a thread that goes on.
        """
    def urgent(self, actor: int, priority: int) -> bool:
        """Whether a key more urgent than `priority` waits for a thread, or for `actor` to end its turn."""
    def done(self, actor: int, key: int, *, again: bool = False) -> None:
        """The turn is over; `again`: the key goes to the end of its priority."""
    @property
    def closed(self) -> bool: ...
    def close(self) -> None:
        """Every `next`, now and later, gives None."""

@final
class Request:
    """A chain of descriptors, read once, checked and translated; its memory stays mapped while this lives."""

    @property
    def index(self) -> int:
        """The head's number, as in the used ring."""
    @property
    def readable(self) -> int:
        """Bytes that are left to read."""
    @property
    def writable(self) -> int:
        """Bytes that may still be written."""
    @property
    def readable_total(self) -> int: ...
    @property
    def writable_total(self) -> int: ...
    @property
    def written(self) -> int:
        """The used length: what `write` wrote, or what was set after writing through views.
        Setting it below 0 or above the writable total is a ValueError.
        """
    @written.setter
    def written(self, value: int) -> None: ...
    def read(self, size: int = -1, /) -> bytes:
        """The next `size` bytes (all that is left by default; fewer when fewer are left)."""
    def readinto(self, buffer: bytearray | memoryview, /) -> int: ...
    def write(self, data: _ReadableBuffer, /) -> int:
        """Append to the writable part. Violation buffer-too-small when it does not fit; nothing is written then."""
    def views(self) -> tuple[list[memoryview], list[memoryview]]:
        """(readable, writable): the driver's own memory, from its beginning, without a copy. The same ones each time.

        They are released when the request is completed: to use one then is a ValueError, and so is `views` itself. What
        was made of one (a slice, an array) never faults, but shows memory that is the driver's again.
        """
    @property
    def done(self) -> bool:
        """Already completed, or its queue was stopped."""

@final
class Batch(Sequence[Request]):
    """Requests that a handler answers together; objects of Python only once somebody looks at one."""

    @overload
    def __getitem__(self, index: int, /) -> Request: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[Request]: ...
    def __len__(self) -> int: ...

@final
class DeviceQueue:
    """The device side of a ring, split or packed. All methods may be called from any thread."""

    def __new__(cls, max_size: int) -> DeviceQueue:
        """ValueError unless a power of two, 1 to 32768."""
    @property
    def max_size(self) -> int: ...
    @property
    def size(self) -> int:
        """0 while stopped."""
    @property
    def running(self) -> bool: ...
    def start(
        self,
        memory: Memory,
        size: int,
        desc: int,
        driver: int,
        device: int,
        *,
        event_idx: bool,
        indirect: bool,
        signal: Signal,
        packed: bool = False,
        in_order: bool = False,
        resume: int | None = None,
        inflight: tuple[Mapping, int] | None = None,
    ) -> None:
        """A new ring; or one that was in use before, to go on at `resume`, as `next` says it. A packed ring has any
        number of descriptors; its addresses are those of the descriptor ring and of the driver's and the device's event
        suppression. With `in_order`, requests that are completed early are shown when all before them are.

        `inflight`: a writable mapping and the offset in it where this queue keeps what is in flight, as vhost-user lays
        it out for rings of its layout. What a predecessor left there is given by `take` first, in the order in which it
        was taken. Then `resume` is not looked at: the ring goes on behind what is used and what is in flight, by the
        region and, of a split ring, the used ring's index. A region that was never used (version 0) begins at what is
        used: by that index, or by `resume`.

        Violation: queue-size (0, not a power of two in a split ring, above max_size), ring-position (`resume` is no
        place of such a ring), ring-misaligned, ring-outside-memory,
        inflight-size (outside the mapping; of another size than the ring), inflight-misaligned, inflight-version,
        inflight-features, inflight-used-index, inflight-next, inflight-loop, inflight-counter, inflight-too-many,
        region-lost, log-too-small.
        """
    @staticmethod
    def inflight_size(size: int, *, packed: bool = False) -> int:
        """Bytes that a queue of this size takes of what is in flight, rounded up to 64. ValueError: 0, above 32768."""
    @staticmethod
    def recover_place(memory: Memory, size: int, desc: int, said: int) -> int:
        """Where a packed ring goes on whose device ended without a word, as `next` says it, of which a front-end that
        may know no better says `said`. By the flags in its descriptors, of which `desc` is the address: for rings of
        chains of one descriptor each, which were used in order. A ring that tells nothing goes on where it is said.

        A batch that was written and never shown is given back before, with no bytes written: notify the driver.
        """
    @property
    def paused(self) -> bool:
        """Whether nothing more is to be taken for now: kept here for engines, `take` does not look."""
    @paused.setter
    def paused(self, paused: bool) -> None: ...
    @property
    def draining(self) -> bool:
        """The same, by the device's own wish. When it was set, no engine takes anything any more."""
    @draining.setter
    def draining(self, draining: bool) -> None: ...
    @property
    def native(self) -> bool:
        """Whether an engine is to take requests. When it was unset, none does any more."""
    @native.setter
    def native(self, native: bool) -> None: ...
    @property
    def next(self) -> int | None:
        """Where another may resume once nothing is in flight; None: stopped. In a split ring, the available entry that
        comes next. In a packed one, in the lower half, the place of the descriptor that comes next (15 bits) and its
        wrap counter (1), and in the upper half the same of the next used descriptor. What a predecessor left in flight
        and was not given yet is not counted as taken.
        """
    @property
    def unused(self) -> int | None:
        """Where another may resume and is given again what is in flight. None: stopped; or there is no such place,
        because a request was used before one that was taken earlier and is in flight.
        """
    def stop(self) -> None:
        """No more requests; completing old ones does nothing."""
    def take(self, limit: int) -> list[Request]:
        """The next requests in ring order, at most `limit`; [] when there are none or the queue is stopped.

        Notifications are off while the ring is not empty and on again in the call that gives none. Violations
        (index-jump, descriptor-out-of-range, descriptor-loop, descriptor-not-available, chain-too-long,
        chain-too-large, readable-after-writable, zero-length-descriptor, address-outside-memory, region-read-only,
        indirect-*, ...): raised after the good requests before it were given (on the next call). region-lost: at once,
        also for a mapping of the log or of what is in flight.
        """
    def serve(
        self,
        handler: Callable[..., object] | None,
        queue: object,
        limit: int,
        *,
        batch: bool,
        charge: Callable[[int, int], object] | None = None,
        others: tuple[Scheduler, int, int] | None = None,
    ) -> bool:
        """Let `handler(queue, request)` answer requests, each completed when it returns; with `batch`, let
        `handler(queue, requests)` answer all, completed together; None completes all with nothing in them, which shows
        what a ring costs alone. ValueError: None without `batch`. False when there are none, or none any more;
        notifications are on then.

        At most `limit` are taken from the ring, and none while some wait that a turn before put off: it does so with
        those behind one whose handler raised, which is raised here, and when something more urgent waits. `others`: a
        scheduler, the actor whose turn this is, and the priority of its key. As long as nobody else waits there, for a
        millisecond at most, up to `limit` more are taken, again and again, and looked for a little before notifications
        are asked for. `charge` is told of requests and bytes that were taken, before they are handled; nothing is taken
        a second time then. Violation: as `take` and `complete`.
        """
    def complete(self, requests: Sequence[Request]) -> None:
        """Give requests back as used, published together, and signal when the driver wants it. Requests that
        are done already are ignored. Violation: ring-outside-memory, region-lost; log-too-small, when they are
        completed.
        """
    @property
    def in_flight(self) -> int:
        """Taken and not shown as used."""
    @property
    def counters(self) -> tuple[int, int, int]:
        """Requests completed, bytes readable of them, bytes written of them; kept over stop and start."""

@final
class Worker:
    """A native thread that gives engines their turns, most urgent first; it never takes the interpreter's lock.

    `polling`: "notified" sleeps when there is nothing to do, "adaptive" waits a little first, as long as that paid,
    "always" never sleeps. `cpus`: where it runs; anywhere when there are none. `nice`: for the system's scheduler,
    where that is permitted. OSError when the system refuses.
    """

    def __new__(cls, name: str, *, polling: str = "notified", cpus: Sequence[int] = ..., nice: int = 0) -> Worker: ...
    def add(self, engine: Engine, priority: int = 0) -> Task:
        """Run an engine from now on; priority 0 is the most urgent of 8."""
    @property
    def tasks(self) -> int:
        """Engines that it has."""
    @property
    def counters(self) -> tuple[int, int, int, int]:
        """Turns that found work, turns that found none, how often it slept, and nanoseconds of turns with work."""
    def close(self) -> None:
        """End it, and its engines."""

@final
class Task:
    """An engine at its worker."""

    def mark(self) -> None:
        """Give the engine a turn soon."""
    def set_priority(self, priority: int) -> None: ...
    def listen(self, doorbell: Doorbell) -> None:
        """Have a turn whenever it rings. It is not drained; whoever drains it marks the task."""
    def ignore(self, doorbell: Doorbell) -> None: ...
    def remove(self) -> None:
        """Take the engine from its worker; when this returns it has no turn any more."""

@disjoint_base
class Engine:
    """What serves queues natively: those that are `native`, and neither `paused` nor `draining`.

    Whatever it has for its device model waits here, and the signal that it was made with tells of it.
    """

    @property
    def counters(self) -> dict[str, int]:
        """What it counted, by name."""
    def faults(self) -> list[tuple[int, Violation]]:
        """Queues of its own, by their order, that it stopped, and why; each once."""
    def errors(self) -> list[int]:
        """Error numbers of what is behind the device; each once until `forget`."""
    def requests(self, limit: int) -> list[tuple[int, Request]]:
        """Requests that the device model shall answer, at most `limit`, each with the queue."""
    def settle(self, timeout: float) -> bool:
        """Wait until nothing is under way in the driver's memory; False after `timeout` seconds."""
    def end(self) -> None:
        """Give back what it holds: one that no worker has had, whose workers do that."""
    def forget(self) -> None:
        """The driver is gone, and whatever waits for it."""

@final
class LoopbackEngine(Engine):
    """A pair of queues of a network device, which gives back what was sent."""

    def __new__(cls, receive: DeviceQueue, transmit: DeviceQueue, signal: Signal) -> LoopbackEngine: ...
    def set_rules(self, rules: NetRules) -> None:
        """These hold for frames from now on."""
    def hand_over(self) -> tuple[bool, list[bytearray]]:
        """Give what it keeps to whoever serves the queues from now on: buffers, which the receive queue gives first,
        and packets that wait for buffers and can be had in no other way, oldest first. The first of the two tells if
        the oldest is known to be wanted.
        """

@final
class TapEngine(Engine):
    """A pair of queues of a network device, with a queue of a tap behind it."""

    def __new__(cls, receive: DeviceQueue, transmit: DeviceQueue, fd: int, signal: Signal) -> TapEngine:
        """Takes a duplicate of `fd`, which does not block, and whose packets have a header of 12 little-endian bytes.
        OSError.
        """
    def set_rules(self, rules: NetRules) -> None:
        """These hold for frames from now on; those that the tap has wait there as long as there are no buffers."""
    def hand_over(self) -> tuple[bool, list[bytearray]]:
        """Give what it keeps to whoever serves the queues from now on: buffers, which the receive queue gives first,
        and packets that wait for buffers and can be had in no other way, oldest first. The first of the two tells if
        the oldest is known to be wanted.
        """
    def close(self) -> None:
        """Let go of the tap. Once no worker has this engine any more."""

@final
class PcapFile:
    """A file of frames that a network device has sent, for whoever of its engines and its model has some to write.

    What is in it is whole records: of a write that the disk cuts short, those that it took stay, and the rest is cut
    off. A file that somebody else cuts off begins anew, with a header.
    """

    def __new__(cls, fd: int, header: bytes) -> PcapFile:
        """Empties a regular file, and writes the header. Takes a duplicate of `fd`. OSError."""
    def write(self, records: Sequence[bytes]) -> tuple[int, int | None]:
        """Add records, each with its own header; how many of the first ones are in the file, and the errno that says
        why not all. It may take as long as the file system likes.
        """
    def close(self) -> None:
        """Let go of the file."""

@final
class PcapEngine(Engine):
    """A pair of queues of a network device, with a file behind it. A turn may take as long as the file system likes."""

    def __new__(cls, receive: DeviceQueue, transmit: DeviceQueue, file: PcapFile, signal: Signal) -> PcapEngine: ...
    def set_rules(self, rules: NetRules) -> None:
        """These hold for frames from now on."""
    def hand_over(self) -> tuple[bool, list[bytearray]]:
        """Let others serve its queues: what it has taken is in the file when this returns. No packets wait."""

@final
class NetRules:
    """What holds for the frames of a pair of queues of a network device."""

    def __new__(
        cls,
        *,
        link: bool,
        in_use: bool,
        merge: bool,
        csum: bool,
        host_kinds: Sequence[int],
        guest_csum: bool,
        guest_kinds: Sequence[int],
        promiscuous: bool,
        told: bool,
        modes: Sequence[str],
        mac: bytes,
        unicast: Sequence[bytes],
        multicast: Sequence[bytes],
        vlans: Sequence[int] | None,
    ) -> NetRules:
        """Link and pair, MRG_RXBUF and CSUM, values of gso_type that the driver may use; GUEST_CSUM, and values that
        it takes; and which frames it wants: all when `promiscuous`, or when it has `told` nothing and there are no
        `vlans`. `modes` are names of receive modes (ALLUNI, ALLMULTI, NOUNI, NOMULTI, NOBCAST).
        """

@final
class Switch:
    """A learning switch, whose ports are network devices."""

    def __new__(cls, ageing: float) -> Switch:
        """`ageing`: seconds for which a station that says nothing is known."""

@final
class SwitchPort:
    """A device's place at a switch, which is down until a pair's rules say that the link is up."""

    def __new__(
        cls, switch: Switch, pairs: Sequence[tuple[DeviceQueue, DeviceQueue, Signal]], signal: Signal
    ) -> SwitchPort:
        """`pairs`: receive queue, transmit queue, and what is notified when there are frames to `read`, which is
        where the receive queue is not `native`. `signal`: what tells of the engines' messages.
        """
    def leave(self) -> None:
        """Leave the switch. A second time does nothing."""
    def isolate(self, isolated: bool) -> None:
        """Isolated ports do not talk with each other."""
    def limit_floods(self, a_second: int) -> None:
        """How many frames a second may go to all, a tenth of them at once."""
    @property
    def counters(self) -> dict[str, int]:
        """What the port counted beside its pairs: flooded, flood_dropped, learned, moved; and how many stations are
        known there.
        """
    def send(self, pair: int, header: bytes, frame: bytes) -> bool | None:
        """Switch a frame whose header was checked; False when it goes nowhere, None when it is not what that says.
        ValueError for one that is too short or too long.
        """
    def read(self, pair: int) -> bytearray | None:
        """The oldest packet that waits for this pair, a header of 12 bytes before it."""

@final
class SwitchEngine(Engine):
    """Serves one pair of a port."""

    def __new__(cls, port: SwitchPort, pair: int) -> SwitchEngine: ...
    def set_rules(self, rules: NetRules) -> None:
        """These hold for frames from now on. A link that goes down takes what waits, and what was learned, with it."""
    def hand_over(self) -> tuple[bool, list[bytearray]]:
        """Give what it keeps to whoever serves the queues from now on: buffers, which the receive queue gives first,
        and packets that wait for buffers and can be had in no other way, oldest first. The first of the two tells if
        the oldest is known to be wanted.
        """

@final
class BlkEngine(Engine):
    """Reads, writes and flushes of one queue of a disk, by io_uring."""

    def __new__(cls, queue: DeviceQueue, fd: int, signal: Signal) -> BlkEngine:
        """Takes a duplicate of `fd`. OSError when io_uring is not permitted."""
    @staticmethod
    def permitted() -> None:
        """OSError when this process may not use io_uring."""
    def set(self, capacity: int, read_only: bool, through: bool, flush: bool) -> None:
        """What holds for requests from now on: sectors of the disk, whether writes are refused, whether they are on the
        disk when they are completed, and whether the driver may flush.
        """

@final
class DriverQueue:
    """The driver side of a ring, split or packed, in memory of its own. Not for several threads at once."""

    @staticmethod
    def bytes_needed(size: int, *, packed: bool = False) -> int:
        """Bytes of the arena that a ring of this size takes (with its indirect tables when those are used)."""
    def __new__(
        cls,
        arena: Mapping,
        offset: int,
        address: int,
        size: int,
        *,
        event_idx: bool,
        indirect: bool,
        signal: Signal | None = None,
        packed: bool = False,
        in_order: bool = False,
    ) -> DriverQueue:
        """A ring at `offset` (16-byte aligned) of `arena`, whose first byte has the driver address `address`."""
    @property
    def size(self) -> int: ...
    @property
    def desc(self) -> int:
        """Driver address of the descriptor table; `driver` and `device`: of the available and the used ring.

        In a packed ring, of the descriptor ring, and of the driver's and the device's event suppression.
        """
    @property
    def driver(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def free(self) -> int:
        """How many more requests `add` takes for certain (one descriptor each with indirect)."""
    def add(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int | None:
        """Queue a request of (driver address, size) buffers, unpublished; its token, None when the ring is full.
        ValueError: no buffers, or a size of 0 or over 2**32 - 1.
        """
    def publish(self) -> None:
        """Show what was added to the device, and signal when the device wants it."""
    def reap(self, limit: int) -> list[tuple[int, int]]:
        """(token, written) of finished requests, at most `limit`. Interrupts are off while there are some and on
        again when there are none. Violation: used-index-jump, used-id-unknown, used-length.
        """
    @property
    def outstanding(self) -> int: ...

@final
class LinkRing:
    """One direction of a link in a shared area: whole messages, one producer, one consumer.

    Layout at `offset`: u32 tail (producer's) at +0, u32 head (consumer's) at +64, `size` bytes of data at +128 (a power
    of two). Counters run freely. Messages are 8-byte aligned; their length is in bytes 6 and 7 of their header.
    """

    HEADER: int
    def __new__(cls, area: Mapping, offset: int, size: int) -> LinkRing: ...
    def send(self, message: _ReadableBuffer) -> bool:
        """False when there is no room now. ValueError: shorter than its header, longer than half the ring, or the
        length in its header is not its length. Violation: link-index.
        """
    def receive(self) -> bytes | None:
        """The next message, copied out; None when there is none. Violation: link-index, link-message-size."""

# Load generators and bare references, for `vbus bench` alone.

class _LoadReport(TypedDict):
    requests: int
    bytes_sent: int
    bytes_received: int
    checksum: int
    """Of what the device wrote; whatever the order of its answers."""
    seconds: float
    p50_us: float
    p99_us: float
    max_us: float

@final
class Load:
    """A driver that keeps `depth` requests under way, each answer bringing the next, without Python in its loop.

    `ring` is a driver's side with nothing outstanding; `arena` holds the buffers from `offset` on, and its first byte
    has the driver address `address`. Without a `bell`, answers are polled for; with one, this side sleeps on it.
    RuntimeError: a wrong answer, or none for 30 seconds. Violation: as `DriverQueue.reap`.
    """

    def __new__(cls, ring: DriverQueue, arena: Mapping, address: int, offset: int, depth: int) -> Load: ...
    @staticmethod
    def bytes_needed(depth: int, size: int) -> int:
        """Bytes of the arena that the buffers of requests take, each of `size` bytes."""
    def numbered(
        self, total: int, readable: int, writable: int, written: int, bell: Doorbell | None = None
    ) -> _LoadReport:
        """`total` requests of `readable` bytes that begin with their number, with room for `writable` bytes of which
        `written` must be written. ValueError: sizes that are no multiples of 8.
        """
    def random_reads(self, total: int, size: int, places: int, seed: int, bell: Doorbell | None = None) -> _LoadReport:
        """`total` reads of a disk of `places` times `size` bytes, at places that follow from `seed`."""

class _FramesReport(TypedDict):
    frames: int
    checksum: int
    """Of their numbers."""
    alone_p50_ns: int
    """Until a frame was back that was alone; of a burst, the first, and the last."""
    alone_p99_ns: int
    first_p50_ns: int
    first_p99_ns: int
    last_p50_ns: int
    last_p99_ns: int
    held_p50_ns: int
    """What the first of a burst took more than the frame before it that was alone."""
    held_p99_ns: int

@final
class Frames:
    """A driver of a network card that gives back what it is sent, without Python in its loop.

    Of both queues (receive, transmit): a driver's side with nothing outstanding, the arena that holds its buffers, the
    driver address of the arena's first byte, and where in it they begin.
    """

    def __new__(
        cls, receive: tuple[DriverQueue, Mapping, int, int], transmit: tuple[DriverQueue, Mapping, int, int]
    ) -> Frames: ...
    @staticmethod
    def bytes_needed(burst: int, size: int) -> int:
        """Bytes of each arena that the buffers of a burst take, for frames of `size` bytes."""
    def run(self, count: int, burst: int, size: int) -> _FramesReport:
        """A frame of `size` bytes alone and then `burst` of them at once, `count` times, each polled for.

        ValueError: a frame that is too short, an arena without room. RuntimeError: a frame came back wrong, or none for
        30 seconds. Violation: as `DriverQueue.reap`.
        """

class _Rounds(TypedDict):
    round_trips: int
    checksum: int
    """Of the values that this side sent or saw."""
    seconds: float
    p50_ns: int
    """Of a round trip, each the mean of a block of them; 0 on the side that answers."""
    p99_ns: int

@final
class PingSide:
    """The side that begins round trips through a shared area that is zero at first; the driver's side of a ring.

    `way`: "eventfd", "line" (a cache line in each direction), "bare split", "bare packed" (rings that check nothing),
    "split", "packed". Rings are `notified` through the eventfds `kick` and `call`, which block, or polled.
    """

    def __new__(cls, way: str, notified: bool, area: Mapping, kick: int, call: int) -> PingSide: ...
    @staticmethod
    def bytes_needed() -> int:
        """Bytes of the area."""
    @property
    def places(self) -> tuple[int, int, int]:
        """Where the parts of the ring are, for the other side."""
    def run(self, count: int, block: int) -> _Rounds:
        """`count` round trips, timed in blocks of `block`. RuntimeError: no answer for 30 seconds."""

@final
class EchoSide:
    """The side that answers, made after the other; the device's side of a ring."""

    def __new__(
        cls, way: str, notified: bool, area: Mapping, kick: int, call: int, places: tuple[int, int, int]
    ) -> EchoSide: ...
    def run(self, count: int) -> _Rounds:
        """Answer `count` times. RuntimeError: no question for 30 seconds. Violation: as `DeviceQueue.take`."""

@final
class BenchRequest:
    """What `bench_calls` calls with: as small as an object is that native code makes for a call."""

    @property
    def number(self) -> int: ...

def bench_reads(
    fd: int, arena: Mapping, total: int, size: int, places: int, seed: int, *, depth: int, batch: int
) -> _LoadReport:
    """The reads of `Load.random_reads`, from a file itself, by io_uring: `depth` under way, submitted up to `batch`
    together. `arena` has room for `Load.bytes_needed(depth, 16 + size + 1)` bytes.

    OSError: io_uring is not permitted, or the file cannot be read. RuntimeError: it is shorter.
    """

def bench_calls(function: Callable[..., object], queue: object, count: int, batch: int = 0) -> float:
    """Call `function(queue, BenchRequest)` `count` times, or `function(queue, list)` with `batch` of them each until
    there were as many; gives the seconds that it took. ValueError: `count` is no multiple of `batch`.
    """
