"""Event channels of a bus as a guest's programs have them: `/dev/vbus/NAME`. The guest is booted once.

The bus has two functions there, one with tunnelled and one with direct signals, and its channels are behind both.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from conftest import wait_until
from guests import BACKPORTS, bus_modules, function_args, programs
from vbus.bus import Bus, Channel
from vbus.channel import EVENT_COST, MAX_EVENT, WINDOW, ChannelEnd
from vbus.connectors import Ivshmem
from vbus.connectors.ivshmem_peer import IvshmemPeer
from vbus.devices import Rng
from vbus.vm import Guest

pytestmark = pytest.mark.timeout(900)

SIGNALS = ("tunnelled", "direct")
CONCERNS = re.compile(r"BUG|WARNING|Oops|Call Trace|general protection|hung task|soft lockup|cannot create duplicate")


@dataclass
class Running:
    """The guest of these tests, and its bus."""

    vm: Guest
    bus: Bus
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def peer(self, signal: str) -> IvshmemPeer:
        """The session of a function."""
        (peer,) = self.bus.connectors[signal].peers  # type: ignore[attr-defined]
        assert isinstance(peer, IvshmemPeer)
        return peer

    def function(self, signal: str) -> str:
        """A function's directory in sysfs."""
        return self.vm.wait_for(
            f"d=$(grep -lx {signal} /sys/bus/vbus/devices/*/name) && realpath $(dirname $d)/.."
        ).strip()


class Place:
    """A channel as one function has it."""

    def __init__(self, here: Running, signal: str, channel: Channel) -> None:
        self.here = here
        self.vm = here.vm
        self.channel = channel
        self._signal = signal
        self._found = f"$(grep -lx {channel.name} {here.function(signal)}/vbus/*/name)"
        self.directory = self.vm.wait_for(f"f={self._found} && dirname $f").strip()
        self.node = f"/dev/vbus/{Path(self.directory).name}"
        # It comes a little after its directory, and until then a shell would make a file of that name.
        self.vm.wait_for(f"test -c {self.node}")

    def attribute(self, name: str) -> str:
        """What sysfs says."""
        return self.vm.run(f"cat {self.directory}/{name}").strip()

    def steps(self, *steps: str) -> list[str]:
        """What came of steps of a program that opens it."""
        return self.vm.run(f"channel_steps {self.node} {' '.join(map(repr, steps))} 2>&1").splitlines()

    def begin(self, *steps: str) -> Callable[[], list[str]]:
        """The same in the background: call what is returned for the lines that were said, once it has ended."""
        said = f"/tmp/said{next(self.here.numbers)}"
        words = " ".join(map(repr, steps))
        self.vm.run(f"(channel_steps {self.node} {words}; touch {said}.end) >{said} 2>&1 &")

        def result() -> list[str]:
            self.vm.wait_for(f"test -e {said}.end", seconds=120)
            return self.vm.run(f"cat {said}").splitlines()

        return result

    def flag(self) -> str:
        """A file that is not there yet."""
        return f"/tmp/flag{next(self.here.numbers)}"

    @property
    def ends(self) -> list[ChannelEnd]:
        """The bus's end of it."""
        return [end for end in self.channel.ends if end._carrier is self.here.peer(self._signal).channels]

    def end(self) -> ChannelEnd:
        """The bus's end, as soon as there is one."""
        assert wait_until(lambda: self.ends, 120)
        return self.ends[0]

    def is_left(self) -> bool:
        """Whether the guest has left it."""
        return wait_until(lambda: not self.ends, 120)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VBUS_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        with Bus("talk") as bus:
            args: list[str] = []
            for signal in SIGNALS:
                bus.plug(Rng(), signal)
                connector = Ivshmem(folder / f"{signal}.sock", devices=[signal], signal=signal)  # type: ignore[arg-type]
                bus.connect(connector, signal)
                args += function_args(connector)
            with Guest(
                args=args,
                modules=["virtio_rng", *bus_modules()],
                files=programs(folder, "channel_steps"),
                cpus=2,
                append="slub_debug=FZPU",
                backports=BACKPORTS,
            ) as vm:
                yield Running(vm, bus)


@pytest.fixture(params=SIGNALS)
def signal(request: pytest.FixtureRequest) -> str:
    """Each function in turn."""
    return str(request.param)


@pytest.fixture
def opened(here: Running, signal: str) -> Iterator[Callable[..., Place]]:
    """Channels of the bus, as the function under test has them; closed when the test ends."""
    channels: list[Channel] = []

    def make(name: str, **options: object) -> Place:
        channels.append(here.bus.open_channel(name, **options))  # type: ignore[arg-type]
        return Place(here, signal, channels[-1])

    yield make
    for channel in channels:
        channel.close()
    here.vm.wait_for('test -z "$(ls /sys/class/vbus)"', seconds=120)


def heard(channel: Channel) -> bytes:
    """The next event."""
    event = channel.receive(30)
    assert event is not None
    return event.data


def test_a_channel_is_a_file(here: Running, opened: Callable[..., Place]) -> None:
    place = opened("board.1-x_y", priority=3, memory=5000)
    assert [place.attribute(name) for name in ("name", "priority", "memory")] == ["board.1-x_y", "3", "5000"]
    assert [place.attribute(name) for name in ("sent", "received", "waiting")] == ["0", "0", "0"]
    mode, kind = here.vm.run(f"stat -c '%a %F' {place.node}").strip().split(" ", 1)
    assert (mode, kind) == ("600", "character special file")
    # Nobody has it open, so nobody hears.
    assert place.channel.send(b"anybody?") == 0


def test_a_name_that_both_functions_have_is_there_twice(here: Running, opened: Callable[..., Place]) -> None:
    places = [Place(here, signal, opened("both").channel) if not n else None for n, signal in enumerate(SIGNALS)]
    assert places[0] is not None
    other = Place(here, SIGNALS[1], places[0].channel)
    names = {Path(place.node).name for place in (places[0], other)}
    assert len(names) == 2
    assert "both" in names
    assert re.fullmatch(r"both@vbus\d+", (names - {"both"}).pop())


def test_a_shell_speaks_and_hears(here: Running, opened: Callable[..., Place]) -> None:
    place = opened("alarm", priority=0)
    here.vm.run(f"printf smoke >{place.node}")
    assert heard(place.channel) == b"smoke"
    assert place.is_left()
    here.vm.run(f"(dd if={place.node} of=/tmp/heard bs=4096 count=1; touch /tmp/over) >/dev/null 2>&1 &")
    place.end().send(b"where?\n")
    here.vm.wait_for("test -e /tmp/over")
    assert here.vm.run("cat /tmp/heard; rm /tmp/heard /tmp/over") == "where?\n"
    assert [place.attribute(name) for name in ("sent", "received", "waiting")] == ["1", "1", "0"]


@pytest.mark.parametrize("size", [1, 100, MAX_EVENT])
def test_every_size_of_event_goes_both_ways(here: Running, opened: Callable[..., Place], size: int) -> None:
    place = opened("sizes")
    data = bytes(ord("a") + n % 26 for n in range(size))
    here.vm.run(f"(dd if={place.node} of=/tmp/in bs=4096 count=1; dd if=/tmp/in of={place.node} bs=4096) 2>/dev/null &")
    place.end().send(data)
    assert heard(place.channel) == data


def test_what_is_no_event_is_refused_and_loses_nothing(opened: Callable[..., Place]) -> None:
    place = opened("odd")
    far = place.begin("hear=3", "hear=0", "hear=4", "hear", "hear=9", f"say={'x' * (MAX_EVENT + 1)}", "two=halves")
    end = place.end()
    end.send(b"four")
    end.send(b"")
    end.send(b"nine byte")
    assert heard(place.channel) == b"halves"
    assert far() == ["EMSGSIZE", "EMSGSIZE", "four", "", "nine byte", "EMSGSIZE", "6"]
    place.steps("say=")
    assert heard(place.channel) == b""


def test_a_thousand_events_each_way_in_order(opened: Callable[..., Place]) -> None:
    place = opened("feed")
    count = 1000
    far = place.begin(f"count={count}", f"counted={count}")
    end = place.end()
    assert [int.from_bytes(heard(place.channel), "little") for _ in range(count)] == list(range(count))
    for n in range(count):
        assert end.wait_writable(30)
        end.send(n.to_bytes(4, "little"))
    assert far() == [str(count)] * 2
    assert [int(place.attribute(name)) for name in ("sent", "received")] == [count, count]


def test_poll(opened: Callable[..., Place]) -> None:
    place = opened("polled")
    flags = [place.flag() for _ in range(2)]
    far = place.begin(
        *("poll=0", f"made={flags[0]}", "pollin=30000", "poll=0", "hear", "poll=0", "nonblock", "hear"),
        *(f"made={flags[1]}", "pollin=30000"),
    )
    place.vm.wait_for(f"test -e {flags[0]}")
    place.end().send(b"now")
    place.vm.wait_for(f"test -e {flags[1]}")
    place.channel.close()
    assert far() == ["OUT ", "0", "IN ", "IN OUT ", "now", "OUT ", "0", "EAGAIN", "0", "IN HUP "]


def test_a_window_that_is_full(opened: Callable[..., Place]) -> None:
    place = opened("full")
    flags = [place.flag() for _ in range(3)]
    far = place.begin(
        *("nonblock", "fill=100", "poll=0", f"made={flags[0]}", f"until={flags[1]}", "poll=30000", "say=more"),
        *(f"made={flags[2]}", "fill=4096"),
    )
    place.vm.wait_for(f"test -e {flags[0]}")
    # The last one may go beyond.
    most = WINDOW // (100 + EVENT_COST) + 1
    assert wait_until(lambda: len(place.channel.inbox) == most)
    for _ in range(most):
        assert heard(place.channel) == bytes(100)
    place.vm.run(f"touch {flags[1]}")
    assert heard(place.channel) == b"more"
    said = far()
    assert said[:5] == ["0", f"{most} EAGAIN", "", "0", "0"]
    assert said[5:7] == ["OUT ", "4"]
    assert said[8].endswith(" EAGAIN")


def test_a_writer_waits_for_room(opened: Callable[..., Place]) -> None:
    place = opened("waits")
    far = place.begin("nonblock", "fill=4096")
    (said,) = far()[1:]
    count = int(said.split()[0])
    assert wait_until(lambda: len(place.channel.inbox) == count)
    for _ in range(count):
        heard(place.channel)
    # Now one that waits: it has written more than a window when all of it was heard.
    far = place.begin("count=600")
    assert wait_until(lambda: len(place.channel.inbox) == WINDOW // (4 + EVENT_COST) + 1)
    assert [int.from_bytes(heard(place.channel), "little") for _ in range(600)] == list(range(600))
    assert far() == ["600"]


def test_whoever_does_not_read_fills_only_its_window(opened: Callable[..., Place]) -> None:
    place = opened("deaf")
    flags = [place.flag() for _ in range(2)]
    far = place.begin(f"until={flags[0]}", "drain=16", f"made={flags[1]}", "hear")
    end = place.end()
    told = [place.channel.send(bytes(1000)) for _ in range(50)]
    assert sum(told) == 16
    assert end.missed == 34
    assert wait_until(lambda: place.attribute("waiting") == "16", 120)
    place.vm.run(f"touch {flags[0]}")
    place.vm.wait_for(f"test -e {flags[1]}")
    assert end.wait_writable(30)
    end.send(b"again")
    assert far() == ["0", "16", "0", "again"]


def test_a_lane_that_is_full_is_waited_for(here: Running, signal: str, opened: Callable[..., Place]) -> None:
    """The bus reads nothing for a while, and six windows are more than a ring holds."""
    places = [opened(f"lane{n}", priority=7) for n in range(6)]
    sizes: list[list[int]] = [[] for _ in places]
    for place, mine in zip(places, sizes, strict=True):
        place.channel.on_event(lambda event, mine=mine: mine.append(len(event.data)))  # type: ignore[misc]
    other = opened("urgent", priority=0)
    flags = [place.flag() for place in places]
    begin, let_go, stands = places[0].flag(), threading.Event(), threading.Event()
    far = [
        place.begin("nonblock", f"until={begin}", "fill=4000", f"made={flag}", "poll=60000", "say=more")
        for place, flag in zip(places, flags, strict=True)
    ]
    for place in places:
        place.end()

    def stand_still() -> None:
        stands.set()
        let_go.wait(60)

    here.peer(signal).actor.post(stand_still)
    assert stands.wait(30)
    try:
        here.vm.run(f"touch {begin}")
        for flag in flags:
            here.vm.wait_for(f"test -e {flag}")
    finally:
        let_go.set()
    said = [result() for result in far]
    counts = [int(lines[2].split()[0]) for lines in said]
    assert {lines[2].split()[1] for lines in said} == {"EAGAIN"}
    # The ring has room for 16 of these, six windows for 30. Of two no credit tells: the ring's reader does.
    assert sum(counts) == 65536 // (4000 + 16)
    assert min(counts) <= 2
    assert [lines[4:] for lines in said] == [["OUT ", "4"]] * 6
    assert wait_until(lambda: sizes == [[4000] * count + [4] for count in counts], 120)
    other.steps("say=still there")
    assert heard(other.channel) == b"still there"


def test_an_event_rings_for_its_priority(here: Running, signal: str, opened: Callable[..., Place]) -> None:
    place = opened("five", priority=5)
    area = here.peer(signal).machine.area
    source = area.channel_source(5)
    vector = f"vbus-{Path(here.function(signal)).name}-5"

    def interrupts() -> int:
        # There is no vector before the first channel of its priority is open.
        words = here.vm.ask(f"grep {vector} /proc/interrupts").output.split()
        return sum(int(word) for word in words[1:3])

    before, sent = interrupts(), area.read_stats(source, to_device=True)[1]
    far = place.begin("hear", "say=back")
    place.end().send(b"there")
    assert far() == ["there", "4"]
    assert heard(place.channel) == b"back"
    # Another vector's handler may have read the event before this one is taken.
    assert wait_until(lambda: interrupts() > before, 120)
    assert area.read_stats(source, to_device=True)[1] > sent


def test_files_that_are_open_at_once_share_an_end(here: Running, opened: Callable[..., Place]) -> None:
    place = opened("shared")
    flags = [place.flag() for _ in range(2)]
    first = place.begin(f"made={flags[0]}", f"until={flags[1]}", "hear")
    here.vm.wait_for(f"test -e {flags[0]}")
    assert place.steps("say=second") == ["6"]
    assert heard(place.channel) == b"second"
    assert len(place.ends) == 1
    place.end().send(b"for the first")
    here.vm.run(f"touch {flags[1]}")
    assert first() == ["0", "0", "for the first"]
    assert place.is_left()


def test_it_is_opened_and_left_again_and_again(here: Running, opened: Callable[..., Place]) -> None:
    place = opened("again")
    here.vm.run(f"for i in $(seq 200); do printf $i >{place.node} || exit 1; done", seconds=120)
    assert [heard(place.channel) for _ in range(200)] == [b"%d" % n for n in range(1, 201)]
    assert place.is_left()
    assert place.attribute("sent") == "200"


def test_a_region_is_seen_by_both(here: Running, opened: Callable[..., Place]) -> None:
    place = opened("board", memory="64 KiB")
    flags = [place.flag() for _ in range(2)]
    far = place.begin(
        *("map=65536", "get=0,4", "put=10,hello", "put=65530,end", "say=look", "hear", "get=9,8"),
        *("private", "beyond=4096", f"made={flags[0]}", f"until={flags[1]}"),
    )
    event = place.channel.receive(30)
    assert event is not None
    memory = event.end.memory
    assert bytes(memory[9:16]) == b"\0hello\0"
    assert bytes(memory[65530:65534]) == b"end\0"
    memory[9] = ord("<")
    memory[15] = ord(">")
    event.reply(b"and you")
    here.vm.wait_for(f"test -e {flags[0]}")
    here.vm.run(f"touch {flags[1]}")
    assert far() == ["0", "....", "5", "3", "4", "and you", "<hello>.", "EINVAL", "EINVAL", "0", "0"]
    # The next one begins with nothing.
    assert place.is_left()
    assert place.steps("map=65536", "get=8,8") == ["0", "........"]


def test_a_region_ends_with_its_page(opened: Callable[..., Place]) -> None:
    whole = opened("whole", memory="64 KiB")
    assert whole.steps("map=65536", "put=4990,secrets of another") == ["0", "18"]
    assert whole.is_left()
    odd = opened("odd", memory=5000)
    # What is behind it on its last page is nobody else's.
    assert odd.steps("map=8192", "get=4985,30", "beyond=4096") == ["0", "." * 30, "EINVAL"]
    none = opened("none")
    assert none.steps("map=4096") == ["ENODEV"]


def test_channels_come_and_go(here: Running, signal: str, opened: Callable[..., Place]) -> None:
    for round_ in range(5):
        place = opened(f"come{round_}", priority=round_)
        place.channel.close()
        here.vm.wait_for(f"! test -e {place.node}", seconds=120)
    # Two of a name, one after the other, are two.
    first = opened("same", priority=1)
    first.channel.close()
    second = opened("same", priority=6)
    here.vm.wait_for(f'test "$(cat {second.directory}/priority)" = 6', seconds=120)
    assert second.steps("say=here") == ["4"]
    assert heard(second.channel) == b"here"


def test_hundreds_of_channels(here: Running, signal: str) -> None:
    channels = [here.bus.open_channel(f"many{n}", priority=n % 8) for n in range(300)]
    place = Place(here, signal, channels[299])
    directory = str(Path(place.directory).parent)
    here.vm.wait_for(f"test $(ls {directory} | wc -l) = 300", seconds=120)
    assert place.steps("say=one of them") == ["11"]
    assert heard(channels[299]) == b"one of them"
    for channel in channels:
        channel.close()
    here.vm.wait_for('test -z "$(ls /sys/class/vbus)"', seconds=120)


def test_a_channel_that_goes_while_it_is_open(here: Running, opened: Callable[..., Place]) -> None:
    place = opened("goes", memory="64 KiB")
    flags = [place.flag() for _ in range(3)]
    waiting = place.begin(f"made={flags[0]}", "map=65536", "hear", "hear", "hear")
    here.vm.wait_for(f"test -e {flags[0]}")
    far = place.begin(
        *("map=65536", "put=0,mine", f"made={flags[1]}", f"until={flags[2]}", "poll=0", "say=too late", "hear"),
        *("get=0,4", "put=0,harmless", "get=65532,4"),
    )
    here.vm.wait_for(f"test -e {flags[1]}")
    assert bytes(place.end().memory[:4]) == b"mine"
    place.channel.send(b"one")
    place.channel.send(b"two")
    place.channel.close()
    assert waiting() == ["0", "0", "one", "two", "ENODEV"]
    # Its region becomes another's, whom those who have the old one mapped neither see nor disturb.
    other = opened("other", memory="64 KiB")
    there = other.begin("map=65536", "put=0,another's", "say=look", "hear", "get=0,9")
    event = other.channel.receive(30)
    assert event is not None
    here.vm.run(f"touch {flags[2]}")
    said = far()
    assert said[:4] == ["0", "4", "0", "0"]
    assert said[4:7] == ["IN HUP ", "ENODEV", "ENODEV"]
    assert said[7] == "...."
    event.reply(b"and now")
    assert there() == ["0", "9", "4", "and now", "another's"]


def test_a_session_that_ends_while_channels_are_open(here: Running, signal: str, opened: Callable[..., Place]) -> None:
    place = opened("session", memory="64 KiB")
    flag = place.flag()
    waiting = place.begin("map=65536", "put=0,mine", f"made={flag}", "hear", "hear", "say=x", "get=0,4")
    here.vm.wait_for(f"test -e {flag}")
    place.end().send(b"last words")
    assert wait_until(lambda: place.attribute("received") == "1", 120)
    here.peer(signal).part("the test ends it")
    assert waiting() == ["0", "4", "0", "last words", "ENODEV", "ENODEV", "...."]
    # Whoever comes next has it again.
    again = Place(here, signal, place.channel)
    assert again.steps("map=65536", "get=0,4", "say=back") == ["0", "....", "4"]
    assert heard(again.channel) == b"back"


def test_the_most_there_may_be(here: Running) -> None:
    signal = SIGNALS[0]
    channels = [here.bus.open_channel(f"m{n:04}", priority=7) for n in range(4100)]
    try:
        directory = str(Path(Place(here, signal, channels[0]).directory).parent)
        here.vm.wait_for(f"test $(ls {directory} | wc -l) = 4096", seconds=120)
        assert "a channel of the bus cannot be used: -28" in here.vm.run("dmesg")
        place = Place(here, signal, channels[4000])
        assert place.steps("say=one of them") == ["11"]
        assert heard(channels[4000]) == b"one of them"
    finally:
        for channel in channels:
            channel.close()
    here.vm.wait_for('test -z "$(ls /sys/class/vbus)"', seconds=120)


def test_modules_that_go_while_channels_are_open(here: Running) -> None:
    channel = here.bus.open_channel("module")
    places = [Place(here, signal, channel) for signal in SIGNALS]
    flags = [place.flag() for place in places]
    far = [place.begin("hear", f"until={flag}") for place, flag in zip(places, flags, strict=True)]
    for place in places:
        place.end()
    here.vm.run("rmmod vbus_ivshmem virtio_vbus", seconds=120)
    # The guest said so before it went.
    assert all(place.is_left() for place in places)
    assert here.vm.run("ls /dev/vbus 2>/dev/null | wc -l") == "0\n"
    assert here.vm.ask("rmmod vbus_proxy").status != 0
    here.vm.run(f"touch {' '.join(flags)}")
    assert [result() for result in far] == [["ENODEV", "0"]] * 2
    here.vm.wait_for("rmmod vbus_proxy", seconds=120)
    here.vm.run(
        "".join(f"insmod /modules/{name}.ko && " for name in ("vbus_proxy", "virtio_vbus", "vbus_ivshmem")) + "true"
    )
    for signal in SIGNALS:
        assert Place(here, signal, channel).steps("say=again") == ["5"]
        assert heard(channel) == b"again"
    channel.close()


def test_nothing_was_wrong_in_the_kernel(here: Running) -> None:
    assert [line for line in here.vm.run("dmesg").splitlines() if CONCERNS.search(line)] == []
    assert "broke the protocol" not in here.vm.run("dmesg")
    assert here.vm.errors == ""
