"""Files that describe buses: what they become, and the line for each thing that can be wrong with them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from pydantic import Field

import vbus
from command import ONE_CLASS, fails, files
from vbus import config, loading
from vbus.bus import Bus
from vbus.devices import Blk, Console, Rng
from vbus.errors import NoSuchNameError, UsageError
from vbus.options import OptionErrors, Options, about


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "lamp.py").write_text(ONE_CLASS)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    return tmp_path


def load(folder: Path, text: str) -> config.BusSpec:
    path = folder / "bus.toml"
    path.write_text(text)
    return config.load(path)


def problems(folder: Path, text: str, *, made: bool = False) -> list[str]:
    """The lines that a file gets, without its name."""
    bus: Bus | None = None
    try:
        spec = load(folder, text)
        if made:
            bus = config.make(spec)
    except config.ConfigError as error:
        prefix = f"{folder / 'bus.toml'}: "
        lines = error.lines
    else:
        lines, prefix = [], ""
    finally:
        if bus is not None:
            bus.stop()
    assert all(line.startswith(prefix) and "\n" not in line for line in lines)
    return [line.removeprefix(prefix) for line in lines]


# What a file becomes.


def test_everything_that_a_file_says_arrives(folder: Path, runtime_dir: Path) -> None:
    spec = load(
        folder,
        """
        [bus]
        name = "demo"
        members = ["uid:1000", "gid:0"]
        uuid = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
        max_sources = 64

        [device.disk0]
        type = "blk"
        path = "disk.img"
        serial = "one"
        block_size = 4096
        priority = 2
        uuid = "00000000-0000-0000-0000-000000000001"
        features.mask = ["FLUSH"]

        [device.lamp]
        type = "lamp.py:Lamp"
        level = 7

        [device.rng0]
        type = "vbus.devices.rng:Rng"

        [connector.local]
        type = "process"
        devices = ["disk0", "lamp"]
        signal = "direct"

        [connector.far]
        type = "stream"
        listen = "unix:far.sock"
        """,
    )
    bus = config.make(spec)
    try:
        assert bus.uuid == UUID("6f9619ff-8b86-d011-b42d-00c04fc964ff")
        assert bus.members.names == ["uid:1000", "gid:0"]
        assert bus.max_sources == 64
        disk = bus.get("disk0", Blk)
        assert (disk.path, disk.serial, disk.block_size) == (str(folder / "disk.img"), "one", 4096)
        slot = bus.slot("disk0")
        assert (slot.priority, slot.uuid) == (2, UUID(int=1))
        row = bus.describe()[0]
        assert "FLUSH" in row["features"]["available"]
        assert "FLUSH" not in row["features"]["exposed"]
        assert [row["type"] for row in bus.describe()] == ["blk", "lamp", "rng"]
        assert bus.attributes("lamp") == {"level": 7}
        rows = {row["name"]: row for row in bus.describe_connectors()}
        assert rows["local"]["devices"] == ["disk0", "lamp"]
        assert rows["local"]["address"] == f"process:{runtime_dir}/sock/demo-local.sock"
        assert rows["far"]["devices"] is None
        assert rows["far"]["address"] == f"unix:{folder}/far.sock"
    finally:
        bus.stop()
    assert files(runtime_dir) == []
    assert not (folder / "far.sock").exists()


def test_channels_limits_and_priorities_arrive(folder: Path, runtime_dir: Path) -> None:
    (folder / "talk.toml").write_text(
        """
        [channel.alarm]
        priority = 0
        memory = "64 KiB"

        [channel.quiet]
        relay = false

        [device.rng0]
        type = "rng"
        priority = 6
        queue_priority.requests = 1
        limit.iops = 500
        limit.bps = "1 MiB"

        [member."uid:0"]
        limit.channels = 7
        """
    )
    bus = config.make(config.load(folder / "talk.toml"))
    try:
        rows = [(r["name"], r["priority"], r["memory"], r["relay"]) for r in bus.describe_channels()]
        assert rows == [("alarm", 0, 65536, True), ("quiet", 4, 0, False)]
        shown = bus.show("rng0")
        assert shown["priority"] == 6
        assert [queue["priority"] for queue in shown["queues"]] == [1]
        assert shown["limits"] == {"iops": 500, "bps": 1 << 20}
        assert [(row["member"], row["limits"]) for row in bus.describe_members()] == [("uid:0", {"channels": 7})]
    finally:
        bus.stop()


def test_a_queue_that_is_not_there_has_no_priority(folder: Path, runtime_dir: Path) -> None:
    text = '[device.x]\ntype = "rng"\nqueue_priority.request = 1\n'
    assert problems(folder, text, made=True) == ["device.x: Rng has no queue 'request': did you mean 'requests'?"]


def test_a_bus_is_called_as_its_file_and_listens_somewhere(folder: Path) -> None:
    spec = load(folder, '[device.rng0]\ntype = "rng"\n')
    assert spec.name == "bus"
    assert [(c.name, c.cls.type_name, c.options) for c in spec.connectors] == [("local", "process", {})]


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    spec = load(
        folder,
        """
        [device.disk0]
        type = "blk"
        path = "disk.img"
        [device.con0]
        type = "console"
        backend = "unix:con.sock"
        [device.con1]
        type = "console"
        backend = "file:/absolute"
        [device.con2]
        type = "console"
        backend = "pty"
        [connector.local]
        type = "process"
        socket = "here.sock"
        """,
    )
    assert [{key: str(value) for key, value in device.options.items()} for device in spec.devices] == [
        {"path": str(folder / "disk.img")},
        {"backend": f"unix:{folder}/con.sock"},
        {"backend": "file:/absolute"},
        {"backend": "pty"},
    ]
    assert str(spec.connectors[0].options["socket"]) == str(folder / "here.sock")


def test_a_file_that_another_names_is_a_neighbour(folder: Path) -> None:
    (folder / "neighbour_of_lamp.py").write_text("WORD = 'here'\n")
    (folder / "two.py").write_text("import neighbour_of_lamp\n" + ONE_CLASS + "    word = neighbour_of_lamp.WORD\n")
    cls = loading.find("two.py:Lamp", folder)
    assert cls.word == "here"  # type: ignore[attr-defined]
    assert loading.find("two.py:Lamp", folder) is cls
    text = (folder / "two.py").read_text().replace("WORD", "WORD + '!'")
    (folder / "two.py").write_text(text)
    assert loading.find("two.py:Lamp", folder).word == "here!"  # type: ignore[attr-defined]


def test_entry_points_are_types(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = folder / "site"
    info = package / "lamps-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lamps\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vbus.devices]\nlamp = lamps_of_a_user:Lamp\nrng = json:dumps\n")
    (package / "lamps_of_a_user.py").write_text(ONE_CLASS)
    monkeypatch.syspath_prepend(package)
    assert loading.find("lamp", folder).__name__ == "Lamp"
    assert loading.find("rng", folder) is Rng
    with pytest.raises(NoSuchNameError, match="no device type 'lampp': did you mean 'lamp'"):
        loading.find("lampp", folder)


# What is wrong with a file, before anything is made of it.

SYNTAX = [
    ("[device.rng0\n", "line 1, column 13: expected ']' at the end of a table declaration"),
    ("[device.rng0]\ntype\n", "line 2, column 5: expected '=' after a key in a key/value pair"),
    (
        "[device.rng0]\ntype = rng\n",
        "line 2, column 8: invalid value: a text stands in quotes, a list in brackets",
    ),
    (
        '[device.a]\ntype = "rng"\n[device.a]\n',
        "line 3, column 10: [device.a] is there twice: rename one of them",
    ),
    (
        '[device.a]\ntype = "rng"\ntype = "blk"\n',
        "line 3, column 13: 'type' is given twice: take one of them out",
    ),
]


@pytest.mark.parametrize(("text", "line"), SYNTAX)
def test_wrong_toml_is_said_with_its_place(folder: Path, text: str, line: str) -> None:
    assert problems(folder, text) == [line]


def test_a_file_that_is_no_text(folder: Path) -> None:
    path = folder / "bus.toml"
    path.write_bytes(b"# fine\nname = '\xff'\n")
    with pytest.raises(config.ConfigError, match=r"bus.toml: line 2: is not UTF-8: save the file as UTF-8 text"):
        config.load(path)
    path.write_bytes(b"#" * (config.MAX_FILE + 1))
    with pytest.raises(config.ConfigError, match="is larger than 1048576 bytes: this is no description of a bus"):
        config.load(path)
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(config.ConfigError, match=r"bus\.toml: "):
        config.load(path)
    with pytest.raises(config.ConfigError, match=r"bsu\.toml: there is no such file: did you mean '.*/bus\.toml'\?"):
        config.load(folder / "bsu.toml")
    with pytest.raises(config.ConfigError, match=r"cannot be read: Is a directory"):
        config.load(folder)


KEYS = [
    ("[devices.x]\n", "devices: unknown table: did you mean 'device'?"),
    (
        "[channel.Alarm]\n",
        "channel.Alarm: channel 'Alarm': a name is 1 to 63 of a-z 0-9 . _ - and begins with a letter or a digit",
    ),
    ("[channel]\nalarm = 3\n", "channel.alarm: is no table: write [channel.NAME], and 'alarm' below it"),
    ("[channel.alarm]\npriorty = 0\n", "channel.alarm.priorty: unknown key: did you mean 'priority'?"),
    (
        "[channel.alarm]\npriority = 8\n",
        "channel.alarm.priority: 8: should be less than or equal to 7",
    ),
    (
        '[channel.alarm]\nmemory = "1 GiB"\n',
        "channel.alarm.memory: memory: 1 GiB is too much: 4 MiB is the most",
    ),
    ("[member.root]\n", "member.'root': member 'root': write uid:NUMBER, uid:NAME, gid:NUMBER, gid:NAME or tls:NAME"),
    ('[member."uid:0"]\niops = 3\n', "member.'uid:0'.iops: unknown key: there is limit"),
    (
        '[member."uid:0"]\nlimit.iops = 0\n',
        "member.'uid:0'.limit.iops: 0 would stop everything: from 1 on, or none to take the limit away",
    ),
    (
        '[device.x]\ntype = "rng"\nlimit.iosp = 3\n',
        "device.x.limit.iosp: what is served here has no limit 'iosp': did you mean 'iops'?",
    ),
    (
        '[device.x]\ntype = "rng"\nlimit.bps = "ten"\n',
        "device.x.limit.bps: 'ten' is no size: write a number of bytes, or a text such as '64 MiB'",
    ),
    (
        '[device.x]\ntype = "rng"\nqueue_priority.requests = 8\n',
        "device.x.queue_priority.requests: 8 is no priority: 0 (the most urgent) to 7",
    ),
    ("bus = 3\n", "bus: is no table: write [bus]"),
    ("[device]\nrng0 = 3\n", "device.rng0: is no table: write [device.NAME], and 'rng0' below it"),
    ('[bus]\nnmae = "x"\n', "bus.nmae: unknown key: did you mean 'name'?"),
    ("[bus]\nname = 5\n", "bus.name: 5 does not fit: write a text"),
    (
        '[bus]\nname = "My Bus"\n',
        "bus.name: bus 'My Bus': a name is 1 to 63 of a-z 0-9 . _ - and begins with a letter or a digit",
    ),
    ('[bus]\nmembers = "uid:0"\n', 'bus.members: "uid:0" does not fit: write a list, each item a text'),
    (
        '[bus]\nmembers = ["root"]\n',
        "bus.members: member 'root': write uid:NUMBER, uid:NAME, gid:NUMBER, gid:NAME or tls:NAME",
    ),
    (
        '[bus]\nmembers = ["uid:nobody-at-all"]\n',
        "bus.members: member uid:nobody-at-all: there is no user 'nobody-at-all'",
    ),
    ("[bus]\nmax_sources = 100\n", "bus.max_sources: 100 is not a power of two from 16 to 65536: write 1024"),
    ('[bus]\nuuid = "x"\n', 'bus.uuid: "x" does not fit: write a UUID'),
    (
        "[device.a]\n",
        'device.a.type: is missing: write type = "blk", another type, "module:Class" or "file.py:Class"',
    ),
    ('[device.a]\ntype = "blkk"\n', "device.a.type: no device type 'blkk': did you mean 'blk'?"),
    (
        '[device.a]\ntype = "nothing.py:X"\n',
        "device.a.type: no such file 'nothing.py': write it, or name another in 'file.py:Class'",
    ),
    ('[device.a]\ntype = "lamp.py:Lmap"\n', "device.a.type: lamp.py has no class 'Lmap': did you mean 'Lamp'?"),
    (
        '[device.a]\ntype = "json:JSONDecoder"\n',
        "device.a.type: json:JSONDecoder is no device: its class must derive from vbus.Device",
    ),
    (
        '[device.a]\ntype = "nomodule:X"\n',
        "device.a.type: no module 'nomodule': is it installed? A file is written with its ending, 'file.py:Class'",
    ),
    ('[device.a]\ntype = "blk"\npth = "x"\n', "device.a.pth: unknown key: did you mean 'path'?"),
    (
        '[device.a]\ntype = "blk"\nmemory = "1 MiB"\nread_only = "yes"\n',
        'device.a.read_only: "yes" does not fit: write true or false',
    ),
    ('[device.a]\ntype = "rng"\npriority = 8\n', "device.a.priority: 8: should be less than or equal to 7"),
    ('[device.a]\ntype = "rng"\npriority = "1"\n', 'device.a.priority: "1" does not fit: write a whole number'),
    (
        '[device.A]\ntype = "rng"\n',
        "device.A: device 'A': a name is 1 to 63 of a-z 0-9 . _ - and begins with a letter or a digit",
    ),
    (
        '[device.a]\ntype = "lamp.py:Lamp"\nfeatures.mask = ["DIMABLE"]\n',
        "device.a.features.mask: no feature 'DIMABLE': did you mean 'DIMMABLE'?",
    ),
    (
        '[device.a]\ntype = "rng"\nfeatures.mask = ["VERSION_1"]\n',
        "device.a.features.mask: VERSION_1 cannot be masked: no driver could use the device",
    ),
    (
        '[device.a]\ntype = "rng"\nfeatures.mark = []\n',
        "device.a.features.mark: unknown key: did you mean 'mask'?",
    ),
    (
        '[connector.c]\ntype = "proces"\n',
        "connector.c.type: no connector type 'proces': did you mean 'process'?",
    ),
    ('[connector.c]\ntype = "stream"\n', "connector.c.listen: is missing: write a text"),
    (
        '[connector.c]\ntype = "process"\nsignal = "loud"\n',
        'connector.c.signal: "loud" does not fit: write "tunnelled" or "direct"',
    ),
    (
        '[device.rng0]\ntype = "rng"\n[connector.c]\ntype = "process"\ndevices = ["rgn0", "rng0"]\n',
        "connector.c.devices: no device 'rgn0' in this file: did you mean 'rng0'?",
    ),
    (
        '[device.a]\ntype = "rng"\n[device.b]\ntype = "rng"\n[connector.c]\ntype = "process"\ndevices = ["a"]\n',
        "device.b: no connector carries it: add 'b' to connector.c.devices, or take that key out",
    ),
]


@pytest.mark.parametrize(("text", "line"), KEYS)
def test_a_wrong_key_is_said_with_its_path(folder: Path, text: str, line: str) -> None:
    assert problems(folder, text) == [line]


def test_every_mistake_gets_its_line(folder: Path) -> None:
    text = """
    [bus]
    nmae = "x"
    [device.a]
    type = "blkk"
    [device.b]
    type = "blk"
    serial = 5
    block_size = "big"
    [connector.c]
    type = "proces"
    """
    assert problems(folder, text) == [
        "bus.nmae: unknown key: did you mean 'name'?",
        "device.a.type: no device type 'blkk': did you mean 'blk'?",
        "device.b.serial: 5 does not fit: write a text",
        'device.b.block_size: "big" does not fit: write a whole number',
        "connector.c.type: no connector type 'proces': did you mean 'process'?",
    ]


def test_two_files_cannot_have_one_bus(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.toml").write_text('[bus]\nname = "same"\n')
    with pytest.raises(config.ConfigError) as caught:
        config.load_all([folder / "a.toml", folder / "b.toml"])
    assert caught.value.lines == [f"{folder}/b.toml: bus.name: 'same' is the bus of {folder}/a.toml too: rename one"]


def test_what_a_module_raises_is_said_with_its_line(folder: Path) -> None:
    (folder / "broken.py").write_text("import os\n\nvalue = undefined\n")
    (folder / "open.py").write_text("x = (\n")
    (folder / "lacks.py").write_text("import nowhere_to_be_found\n")
    text = "".join(f'[device.{name}]\ntype = "{name}.py:X"\n' for name in ("broken", "open", "lacks"))
    assert problems(folder, text) == [
        "device.broken.type: cannot load broken.py: NameError: name 'undefined' is not defined (broken.py, line 3)",
        "device.open.type: cannot load open.py: '(' was never closed (open.py, line 1)",
        "device.lacks.type: cannot load lacks.py: "
        "ModuleNotFoundError: No module named 'nowhere_to_be_found' (lacks.py, line 1)",
    ]


# What shows only when the bus is made; nothing of it may stay.


def test_what_cannot_be_had_is_said_with_its_key(folder: Path, runtime_dir: Path, leftovers: Any) -> None:
    text = f"""
    [device.disk0]
    type = "blk"
    path = "none.img"
    [device.disk1]
    type = "blk"
    memory = "1 KB"
    [device.disk2]
    type = "blk"
    [device.lamp]
    type = "lamp.py:Lamp"
    colour = "black"
    [device.fine]
    type = "rng"
    [connector.long]
    type = "process"
    socket = "{"x" * 100}"
    [connector.fine]
    type = "process"
    [connector.open]
    type = "stream"
    listen = "tcp:0.0.0.0:0"
    """
    problems(folder, text, made=True)
    before = leftovers()
    lines = problems(folder, text, made=True)
    assert not leftovers().exceeds(before)
    assert lines == [
        f"connector.long.socket: socket path '{folder}/{'x' * 100}' has over 107 bytes: choose a shorter one",
        "connector.open.listen: listen 'tcp:0.0.0.0:0': plain TCP would let anybody in; "
        "listen on 127.0.0.1, or set insecure = true",
        f"device.disk0.path: disk {folder}/none.img does not exist: "
        f"create it first (truncate -s 64M {folder}/none.img)",
        "device.disk1.memory: blk: memory: '1 KB': 'KB' is no unit here: use one of B, KiB, MiB, GiB, TiB",
        "device.disk2: blk: give either path (a file or a block device) or memory (a size)",
        "device.lamp.colour: colour 'black' is none: choose another",
    ]
    assert files(runtime_dir) == []


def test_a_busy_socket_is_left_alone(folder: Path, runtime_dir: Path) -> None:
    text = '[device.r]\ntype = "rng"\n[connector.c]\ntype = "process"\nsocket = "busy.sock"\n'
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(folder / "busy.sock"))
        sock.listen()
        assert problems(folder, text, made=True) == [
            f"connector.c.socket: socket '{folder}/busy.sock' is in use: choose another, or end what listens there"
        ]
        assert (folder / "busy.sock").is_socket()
    # Its owner is gone: the socket is stale, and replaced.
    assert problems(folder, text, made=True) == []


def test_two_connectors_cannot_have_one_address(folder: Path) -> None:
    text = "".join(f'[connector.{name}]\ntype = "process"\nsocket = "one.sock"\n' for name in "ab")
    assert problems(folder, text, made=True) == [
        f"connector.b.socket: socket '{folder}/one.sock' is in use: choose another, or end what listens there"
    ]


def test_a_device_that_raises_is_one_line(folder: Path) -> None:
    (folder / "bad.py").write_text(
        "import vbus\n\nclass Bad(vbus.Device):\n    device_id = 1\n    queues = ('a',)\n"
        "    def __init__(self, where: str = 'init'):\n        self.where = where\n"
        "        if where == 'init':\n            raise RuntimeError('on\\npurpose')\n"
        "    def plugged(self):\n        raise RuntimeError('here')\n"
    )
    text = '[device.a]\ntype = "bad.py:Bad"\n[device.b]\ntype = "bad.py:Bad"\nwhere = "plugged"\n'
    assert problems(folder, text, made=True) == [
        "device.a: Bad: RuntimeError: on purpose",
        "device.b: Bad: RuntimeError: here",
    ]


# Options: what a constructor's annotations become.


class Many:
    def __init__(  # type: ignore[no-untyped-def]
        self,
        path: Path,
        number: int = 1,
        *,
        ratio: float = 0.5,
        flag: bool = False,
        kind: Literal["a", "b"] = "a",
        names: list[str] | None = None,
        paths: tuple[Path, ...] = (),
        small: Annotated[int, Field(ge=0, lt=10)] = 0,
        either: int | str = 0,
        who: UUID | None = None,
        _hidden: int = 0,
        unannotated=None,  # on purpose
    ) -> None: ...


def test_values_of_a_file_must_fit(tmp_path: Path) -> None:
    options = Options.of(Many)
    assert list(options.options) == [
        *("path", "number", "ratio", "flag", "kind", "names", "paths", "small", "either", "who"),
    ]
    given = {
        "path": "x",
        "number": 3,
        "ratio": 2,
        "flag": True,
        "kind": "b",
        "names": ["x", "unix:y"],
        "paths": ["p", "/q"],
        "small": 9,
        "either": "5",
        "who": "00000000-0000-0000-0000-000000000001",
    }
    assert options.check(given, tmp_path) == {
        "path": tmp_path / "x",
        "number": 3,
        "ratio": 2.0,
        "flag": True,
        "kind": "b",
        "names": ["x", f"unix:{tmp_path}/y"],
        "paths": (tmp_path / "p", Path("/q")),
        "small": 9,
        "either": "5",
        "who": UUID(int=1),
    }
    assert options.check({"path": "/x"}, tmp_path) == {"path": Path("/x")}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "is missing: write a path"),
        ({"path": 3}, "3 does not fit: write a path"),
        ({"number": "3"}, '"3" does not fit: write a whole number'),
        ({"number": True}, "true does not fit: write a whole number"),
        ({"number": 1.5}, "1.5 does not fit: write a whole number"),
        ({"ratio": "x"}, '"x" does not fit: write a number'),
        ({"flag": 1}, "1 does not fit: write true or false"),
        ({"kind": "c"}, '"c" does not fit: write "a" or "b"'),
        ({"names": "x"}, '"x" does not fit: write a list, each item a text'),
        ({"names": [1]}, "[1] does not fit: write a list, each item a text"),
        ({"small": 10}, "10: should be less than 10"),
        ({"either": []}, "[] does not fit: write a whole number or a text"),
        ({"who": "me"}, '"me" does not fit: write a UUID'),
        ({"_hidden": 1}, "unknown key: "),
        ({"unannotated": 1}, "unknown key: "),
        ({"numbr": 1}, "unknown key: did you mean 'number'?"),
        ({"prioritty": 1}, "unknown key: did you mean 'priority'?"),
    ],
)
def test_values_that_do_not_fit(tmp_path: Path, given: dict[str, Any], problem: str) -> None:
    values = {"path": "x", **given} if given else {}
    with pytest.raises(OptionErrors) as caught:
        Options.of(Many).check(values, tmp_path, also=["priority"])
    [(key, text)] = caught.value.problems
    assert key == next(iter(given), "path")
    assert text.startswith(problem)


def test_text_of_a_command_line_is_converted(tmp_path: Path) -> None:
    given = {"path": "x", "number": "3", "ratio": "2.5", "flag": "on", "names": "x", "small": "9", "either": "5"}
    assert Options.of(Many).check(given, tmp_path, strict=False) == {
        "path": tmp_path / "x",
        "number": 3,
        "ratio": 2.5,
        "flag": True,
        "names": ["x"],
        "small": 9,
        "either": "5",
    }
    with pytest.raises(OptionErrors, match=r'number: \["1", "2"\] does not fit: write a whole number'):
        Options.of(Many).check({"path": "x", "number": ["1", "2"]}, tmp_path, strict=False)


def test_constructors_that_make_no_sense() -> None:
    class Bare:
        def __init__(self, word) -> None: ...  # type: ignore[no-untyped-def]  # on purpose

    class Unknown:
        def __init__(self, word: Nothing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(UsageError, match="Bare: its parameter 'word' must be a keyword with an annotation"):
        Options.of(Bare)
    with pytest.raises(UsageError, match="Unknown: an annotation of its options cannot be resolved: name 'Nothing'"):
        Options.of(Unknown)
    assert Options.of(type("Plain", (), {})).options == {}
    for cls in (Rng, Console, Blk, vbus.connectors.Process, vbus.connectors.Stream):
        assert Options.of(cls).options


def test_what_an_error_is_about() -> None:
    given = {"path": Path("/a/disk.img"), "memory": "1 KB", "listen": "unix:/x/y.sock", "n": 3, "s": "a"}
    assert about(UsageError("disk /a/disk.img is missing"), given) == "path"
    assert about(UsageError("memory '1 KB': no unit"), given) == "memory"
    assert about(UsageError("socket '/x/y.sock': gone"), given) == "listen"
    assert about(UsageError("memory must be positive"), given) == "memory"
    assert about(UsageError("a thing is not so"), given) == ""


# As a user sees it: what the process prints, and what it leaves.


def test_a_bad_file_is_one_line_and_leaves_nothing(folder: Path, runtime_dir: Path) -> None:
    cases = {
        '[device.a]\ntype = "blk"\nmemory = "1 MiB"\nsize = 3\n': "device.a.size: unknown key: ",
        '[device.a]\ntype = "blk"\npath = 3\n': "device.a.path: 3 does not fit: write a path",
        '[device.a]\ntype = "rng"\n[device.a]\n': "line 3, column 10: [device.a] is there twice: rename one of them",
        '[device.a]\ntype = "blk"\npath = "none.img"\n': f"device.a.path: disk {folder}/none.img does not exist: ",
        f'[connector.c]\ntype = "process"\nsocket = "{"x" * 108}"\n': "connector.c.socket: socket path '",
    }
    for text, line in cases.items():
        (folder / "bus.toml").write_text(text)
        before = files(folder)
        [said] = fails("run", "bus.toml", cwd=folder)
        assert said.startswith(f"vbus: bus.toml: {line}")
        assert files(folder) == before
        assert files(runtime_dir) == []
        assert [path.name for path in runtime_dir.iterdir()] in ([], ["sock"])


def test_one_bad_file_keeps_the_others_from_being_served(folder: Path, runtime_dir: Path) -> None:
    (folder / "good.toml").write_text('[device.r]\ntype = "rng"\n[connector.c]\ntype = "process"\nsocket = "g.sock"\n')
    (folder / "bad.toml").write_text('[device.d]\ntype = "blk"\npath = "none.img"\n')
    [line] = fails("run", "good.toml", "bad.toml", cwd=folder)
    assert line.startswith("vbus: bad.toml: device.d.path: ")
    assert not (folder / "g.sock").exists()
    assert files(runtime_dir) == []
    assert sorted(os.listdir(runtime_dir)) in ([], ["sock"])
