"""Files that describe buses: TOML in, buses out, and one line for whatever is wrong with them.

    file -> tables (tomllib) -> a `BusSpec`, every key checked -> a `Bus` with its devices plugged and sockets bound

Reading touches nothing but the file and the modules of the classes that it names. Making a bus opens its disks and
binds its sockets, and undoes all of it when anything fails. Nobody is served before `Bus.start`. A line names the file
and the path of the key, and says what to do; a file with several mistakes gets several lines.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from uuid import UUID

from pydantic import Field

from vbus import loading
from vbus.bus import Bus, Connector, Device, Members, check_name
from vbus.bus.channel import check_region
from vbus.bus.limits import DEVICE_LIMITS, MEMBER_LIMITS, parse_limit
from vbus.bus.workers import MAX_WORKERS
from vbus.connectors import CONNECTORS
from vbus.errors import NoSuchNameError, UsageError
from vbus.hints import did_you_mean
from vbus.options import OptionErrors, Options, about
from vbus.virtio import features

T = TypeVar("T")
TABLES = ("bus", "device", "channel", "connector", "member")
DEFAULT_CONNECTOR = "local"
"""The connector of a bus whose file names none, of type `process`."""
MAX_FILE = 1 << 20
TOML_PLACE = re.compile(r"(?P<text>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)", re.S)


class ConfigError(UsageError):
    """What is wrong with a file: one line for each mistake."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = list(lines)
        super().__init__("\n".join(self.lines))


@dataclass
class DeviceSpec:
    """A device that is to be plugged."""

    name: str | None
    type_name: str
    cls: type[Device]
    options: dict[str, Any] = field(default_factory=dict)
    priority: int = 4
    uuid: UUID | None = None
    mask: list[str] = field(default_factory=list)
    queue_priorities: dict[str, int] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)

    def make(self) -> Device:
        """The device, on no bus yet. UsageError in one line, also for what its own code raises."""
        with self._in_one_line():
            device: Device = self.cls(**self.options)
        return device

    def plug(self, bus: Bus) -> Device:
        """Make the device and plug it. UsageError in one line, also for what the device's own code raises."""
        device = self.make()
        with self._in_one_line():
            bus.plug(
                device,
                self.name,
                uuid=self.uuid,
                priority=self.priority,
                queue_priorities=self.queue_priorities,
                mask=self.mask,
                type_name=self.type_name,
            )
            for name, text in self.limits.items():
                bus.set(device.name, f"limit.{name}", text)
        return device

    @contextlib.contextmanager
    def _in_one_line(self) -> Iterator[None]:
        try:
            yield
        except UsageError:
            raise
        except TimeoutError:
            raise UsageError(f"{self.cls.__name__} does not come back from being plugged: see its log") from None
        except Exception as error:
            raise UsageError(f"{self.cls.__name__}: {type(error).__name__}: {' '.join(str(error).split())}") from error


@dataclass
class ConnectorSpec:
    """A connector that is to be bound; without a name, it gets that of its type."""

    name: str | None
    cls: type[Connector]
    options: dict[str, Any] = field(default_factory=dict)

    def bind(self, bus: Bus) -> Connector:
        """Make the connector and bind it. UsageError, OSError."""
        return bus.connect(self.cls(**self.options), self.name)


@dataclass
class BusSpec:
    """A bus as a file, or a command line, describes it; every key is checked."""

    source: str
    """What its lines of errors begin with: the file, or the class."""
    name: str
    uuid: UUID | None = None
    members: list[str] = field(default_factory=list)
    max_sources: int = 1024
    workers: int | None = None
    polling: str = "notified"
    affinity: list[int] = field(default_factory=list)
    devices: list[DeviceSpec] = field(default_factory=list)
    connectors: list[ConnectorSpec] = field(default_factory=list)
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What `Bus.open_channel` takes, by name."""
    members_limits: dict[str, dict[str, str]] = field(default_factory=dict)

    def error(self, key: str, text: object) -> ConfigError:
        """A mistake that shows only when the bus is made."""
        return ConfigError([f"{self.source}: {key}: {text}"])


# The keys that the file itself knows, in the same form as those of a device: keywords with annotations.


def _bus_keys(
    *,
    name: str = "",
    members: list[str] | None = None,
    uuid: UUID | None = None,
    max_sources: int = 1024,
    workers: Annotated[int, Field(ge=0, le=MAX_WORKERS)] | None = None,
    polling: Literal["notified", "adaptive", "always"] = "notified",
    affinity: list[int] | None = None,
) -> None: ...


Priority = Annotated[int, Field(ge=0, le=7)]


def _device_keys(*, type: str, priority: Priority = 4, uuid: UUID | None = None) -> None: ...


def _channel_keys(*, priority: Priority = 4, memory: int | str = 0, relay: bool = True) -> None: ...


def _feature_keys(*, mask: list[str] | None = None) -> None: ...


def _connector_keys(*, type: str) -> None: ...


BUS_KEYS = Options(_bus_keys, "bus")
DEVICE_KEYS = Options(_device_keys, "device")
CHANNEL_KEYS = Options(_channel_keys, "channel")
DEVICE_TABLES = ("features", "limit", "queue_priority")
FEATURE_KEYS = Options(_feature_keys, "features")
CONNECTOR_KEYS = Options(_connector_keys, "connector")


def load(path: Path) -> BusSpec:
    """Read and check one file. ConfigError."""
    return _Reader(str(path), path.absolute().parent).bus(_tables(path), path.stem)


def load_all(paths: Iterable[Path]) -> list[BusSpec]:
    """Read and check files that shall run together. ConfigError with the lines of all of them."""
    specs: list[BusSpec] = []
    lines: list[str] = []
    for path in paths:
        try:
            spec = load(path)
        except ConfigError as error:
            lines += error.lines
            continue
        for other in specs:
            if other.name == spec.name:
                lines.append(f"{spec.source}: bus.name: {spec.name!r} is the bus of {other.source} too: rename one")
        specs.append(spec)
    if lines:
        raise ConfigError(lines)
    return specs


def device_spec(
    kind: str,
    values: Mapping[str, Any],
    directory: Path,
    *,
    name: str | None = None,
    priority: int = 4,
    uuid: UUID | None = None,
    mask: Iterable[str] = (),
) -> DeviceSpec:
    """Check a device that a command line or the control API asks for. UsageError; OptionErrors for `values`."""
    cls = loading.find(kind, directory)
    masked = list(mask)
    _check_mask(cls, masked)
    options = Options.of(cls).check(values, directory, strict=False)
    return DeviceSpec(name, loading.default_name(kind, cls), cls, options, priority, uuid, masked)


def connector_spec(kind: str, values: Mapping[str, Any], directory: Path, *, name: str | None = None) -> ConnectorSpec:
    """Check a connector that the control API asks for. UsageError; OptionErrors for `values`."""
    cls = CONNECTORS.get(kind)
    if cls is None:
        raise NoSuchNameError(f"no connector type {kind!r}: {did_you_mean(kind, CONNECTORS)}")
    return ConnectorSpec(name, cls, Options.of(cls).check(values, directory, strict=False))


def default_connector() -> ConnectorSpec:
    """What a bus listens with when nothing else was said."""
    return ConnectorSpec(DEFAULT_CONNECTOR, CONNECTORS["process"])


def check_names(spec: BusSpec) -> None:
    """UsageError when a name is none."""
    check_name("bus", spec.name)
    for device in spec.devices:
        if device.name is not None:
            check_name("device", device.name)


def make(spec: BusSpec) -> Bus:
    """The bus, with its devices plugged and its connectors bound, serving nobody yet.

    ConfigError, with a line for each thing that cannot be had; then nothing is left behind.
    """
    try:
        bus = Bus(
            spec.name,
            uuid=spec.uuid,
            members=spec.members,
            max_sources=spec.max_sources,
            workers=spec.workers,
            polling=spec.polling,
            affinity=spec.affinity,
        )
    except UsageError as error:
        raise spec.error("bus", error) from None
    lines: list[str] = []
    try:
        for member, limits in spec.members_limits.items():
            for limit, text in limits.items():
                _attempt(spec, lines, f"member.{member}", {}, lambda m=member, k=limit, t=text: bus.set_member(m, k, t))
        for name, options in spec.channels.items():
            _attempt(spec, lines, f"channel.{name}", options, lambda n=name, o=options: bus.open_channel(n, **o))
        for connector in spec.connectors:
            _attempt(spec, lines, f"connector.{connector.name}", connector.options, lambda c=connector: c.bind(bus))
        for device in spec.devices:
            _attempt(spec, lines, f"device.{device.name}", device.options, lambda d=device: d.plug(bus))
        if lines:
            raise ConfigError(lines)
    except BaseException:
        bus.stop()
        raise
    return bus


def check_carried(bus: Bus, name: str | None) -> None:
    """UsageError when no connector of the bus would show a device of this name (None: any other) to a driver."""
    connectors = bus.connectors.values()
    if connectors and not any(c.device_names is None or name in c.device_names for c in connectors):
        raise UsageError(
            f"no connector of bus {bus.name} would carry the device: it needs a connector without a list of 'devices'"
        )


def _attempt(spec: BusSpec, lines: list[str], key: str, options: Mapping[str, Any], action: Any) -> None:
    try:
        action()
    except UsageError as error:
        option = about(error, options)
        lines.append(f"{spec.source}: {key}{'.' if option else ''}{option}: {error}")
    except (OSError, ValueError, TypeError) as error:
        lines.append(f"{spec.source}: {key}: {' '.join(str(error).split())}")


def _tables(path: Path) -> dict[str, Any]:
    """The tables of a file. ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, [other.stem for other in path.parent.glob("*.toml")], n=1)
        hint = f"did you mean '{path.with_name(near[0] + path.suffix)}'?" if near else "write it, or name another"
        raise ConfigError([f"{path}: there is no such file: {hint}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    if len(raw) > MAX_FILE:
        raise ConfigError([f"{path}: is larger than {MAX_FILE} bytes: this is no description of a bus"])
    try:
        text = raw.decode()
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}: line {line}: is not UTF-8: save the file as UTF-8 text"]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path}: {_syntax(str(error), text)}"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: is nested too deeply: this is no description of a bus"]) from None


def _syntax(message: str, text: str) -> str:
    """Where the TOML is wrong, and how."""
    match = TOML_PLACE.fullmatch(message)
    if match is None:
        return message
    if match["line"] is None:
        return f"line {text.count(chr(10)) + 1}: {_lower(match['text'])}: the file ends too early"
    lines = text.split("\n")
    number = int(match["line"])
    line = lines[number - 1] if number <= len(lines) else ""
    what = _lower(match["text"])
    if what.endswith(" twice"):
        what = f"{line.strip()} is there twice: rename one of them"
    elif what == "cannot overwrite a value":
        what = f"{line.partition('=')[0].strip()!r} is given twice: take one of them out"
    elif what == "invalid value":
        what = "invalid value: a text stands in quotes, a list in brackets"
    return f"line {number}, column {match['column']}: {what}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _check_mask(cls: type[Device], names: Iterable[str]) -> None:
    for name in names:
        try:
            bit = (cls.features | features.TRANSPORT).bit(name)
        except ValueError as error:
            raise UsageError(f"features.mask: {error}") from None
        if bit == features.VERSION_1:
            raise UsageError(f"features.mask: {name} cannot be masked: no driver could use the device")


class _Reader:
    """Checks the tables of one file, and collects what is wrong with them."""

    def __init__(self, source: str, directory: Path) -> None:
        self.source = source
        self.directory = directory
        self.lines: list[str] = []

    def problem(self, key: str, text: object) -> None:
        self.lines.append(f"{self.source}: {key}: {text}")

    @contextlib.contextmanager
    def problems_at(self, key: str) -> Iterator[None]:
        """Whatever is raised inside is a line about `key`, or one for each key below it."""
        try:
            yield
        except OptionErrors as errors:
            for name, text in errors.problems:
                self.problem(f"{key}.{name}", text)
        except UsageError as error:
            self.problem(key, error)

    def bus(self, tables: dict[str, Any], stem: str) -> BusSpec:
        spec = BusSpec(self.source, "")
        for key in tables:
            if key not in TABLES:
                self.problem(key, f"unknown table: {did_you_mean(key, TABLES)}")
        self._bus_table(spec, self._table("bus", tables.get("bus", {})), stem)
        spec.devices = list(filter(None, (self._device(*item) for item in self._named("device", tables))))
        spec.connectors = list(filter(None, (self._connector(*item) for item in self._named("connector", tables))))
        spec.channels = {name: self._channel(name, table) for name, table in self._named("channel", tables)}
        members = self._table("member", tables.get("member", {}))
        spec.members_limits = {name: self._member(name, value) for name, value in members.items()}
        if not tables.get("connector"):
            spec.connectors = [default_connector()]
        self._check_carrying(spec, tables)
        if self.lines:
            raise ConfigError(self.lines)
        return spec

    def _table(self, key: str, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.problem(key, f"is no table: write [{key}]")
        return {}

    def _named(self, kind: str, tables: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The tables [kind.NAME]."""
        for name, value in self._table(kind, tables.get(kind, {})).items():
            key = f"{kind}.{name}"
            if not isinstance(value, dict):
                self.problem(key, f"is no table: write [{kind}.NAME], and {name!r} below it")
                continue
            with self.problems_at(key):
                yield check_name(kind, name), value

    def _bus_table(self, spec: BusSpec, table: dict[str, Any], stem: str) -> None:
        with self.problems_at("bus"):
            values = BUS_KEYS.check(table, self.directory)
            spec.uuid = values.get("uuid")
            spec.members = values.get("members") or []
            spec.max_sources = values.get("max_sources", spec.max_sources)
            spec.workers = values.get("workers")
            spec.polling = values.get("polling", spec.polling)
            spec.affinity = values.get("affinity") or []
            spec.name = values.get("name", stem)
            with self.problems_at("bus.name"):
                hint = "" if "name" in table else '; write name = "..." in [bus]'
                try:
                    check_name("bus", spec.name)
                except UsageError as error:
                    raise UsageError(f"{error}{hint}") from None
            for member in spec.members:
                with self.problems_at("bus.members"):
                    Members([member])
            sources = spec.max_sources
            if not 16 <= sources <= 1 << 16 or sources & (sources - 1):
                self.problem("bus.max_sources", f"{sources} is not a power of two from 16 to {1 << 16}: write 1024")

    def _split(self, keys: Options, table: dict[str, Any], options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of the file's own keys, and of the class's."""
        own = {key: value for key, value in table.items() if key in keys.options}
        rest = {key: value for key, value in table.items() if key not in keys.options}
        problems: list[tuple[str, str]] = []
        checked: list[dict[str, Any]] = []
        for known, values, also in ((keys, own, ()), (options, rest, keys.options)):
            try:
                checked.append(known.check(values, self.directory, also=also))
            except OptionErrors as errors:
                problems += errors.problems
        if problems:
            raise OptionErrors(problems)
        return checked[0], checked[1]

    def _type(self, key: str, table: dict[str, Any], what: str) -> str | None:
        """The value of `type`; a problem when it is not there."""
        kind = table.get("type")
        if isinstance(kind, str) and kind:
            return kind
        self.problem(f"{key}.type", f"is missing: write {what}" if kind is None else f"is no text: write {what}")
        return None

    def _device(self, name: str, table: dict[str, Any]) -> DeviceSpec | None:
        key = f"device.{name}"
        kind = self._type(key, table, 'type = "blk", another type, "module:Class" or "file.py:Class"')
        if kind is None:
            return None
        with self.problems_at(f"{key}.type"):
            cls = loading.find(kind, self.directory)
            options = Options.of(cls)
            for clash in {*DEVICE_KEYS.options, *DEVICE_TABLES} & set(options.options):
                raise UsageError(f"{cls.__name__} has a keyword {clash!r}, which is a key of every device: rename it")
            table = dict(table)
            mask = self._mask(f"{key}.features", cls, table.pop("features", {}))
            limits = self._limits(f"{key}.limit", table.pop("limit", {}), DEVICE_LIMITS)
            priorities = self._priorities(f"{key}.queue_priority", table.pop("queue_priority", {}))
            with self.problems_at(key):
                own, given = self._split(DEVICE_KEYS, table, options)
                return DeviceSpec(
                    name,
                    loading.default_name(kind, cls),
                    cls,
                    given,
                    own.get("priority", 4),
                    own.get("uuid"),
                    mask,
                    priorities,
                    limits,
                )
        return None

    def _limits(self, key: str, value: Any, known: Mapping[str, str]) -> dict[str, str]:
        """A table of limits: what is written, checked."""
        limits: dict[str, str] = {}
        for name, limit in self._table(key, value).items():
            with self.problems_at(f"{key}.{name}"):
                if isinstance(limit, bool) or not isinstance(limit, int | str):
                    raise UsageError('write a whole number, or a size such as "10 MiB"')
                try:
                    parse_limit(name, str(limit), known)
                except UsageError as error:
                    raise UsageError(str(error).removeprefix(f"limit.{name}: ")) from None
                limits[name] = str(limit)
        return limits

    def _priorities(self, key: str, value: Any) -> dict[str, int]:
        """A table of priorities, by the names of queues."""
        priorities: dict[str, int] = {}
        for name, priority in self._table(key, value).items():
            if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= 7:
                self.problem(f"{key}.{name}", f"{priority!r} is no priority: 0 (the most urgent) to 7")
            else:
                priorities[name] = priority
        return priorities

    def _channel(self, name: str, table: dict[str, Any]) -> dict[str, Any]:
        with self.problems_at(f"channel.{name}"):
            options = CHANNEL_KEYS.check(table, self.directory)
            with self.problems_at(f"channel.{name}.memory"):
                check_region(options.get("memory", 0))
            # In a daemon nobody else would hear what a driver says: the other drivers do.
            return {"relay": True, **options}
        return {}

    def _member(self, name: str, value: Any) -> dict[str, str]:
        key = f"member.{name!r}"
        with self.problems_at(key):
            Members.canonical(name)
        table = self._table(key, value)
        for other in set(table) - {"limit"}:
            self.problem(f"{key}.{other}", f"unknown key: {did_you_mean(other, ['limit'])}")
        return self._limits(f"{key}.limit", table.get("limit", {}), MEMBER_LIMITS)

    def _mask(self, key: str, cls: type[Device], value: Any) -> list[str]:
        with self.problems_at(key):
            mask: list[str] = FEATURE_KEYS.check(self._table(key, value), self.directory).get("mask") or []
            try:
                _check_mask(cls, mask)
            except UsageError as error:
                self.problem(f"{key}.mask", str(error).removeprefix("features.mask: "))
            return mask
        return []

    def _connector(self, name: str, table: dict[str, Any]) -> ConnectorSpec | None:
        key = f"connector.{name}"
        kind = self._type(key, table, f"type = {' or '.join(repr(known) for known in CONNECTORS)}")
        if kind is None:
            return None
        cls = CONNECTORS.get(kind)
        if cls is None:
            self.problem(f"{key}.type", f"no connector type {kind!r}: {did_you_mean(kind, CONNECTORS)}")
            return None
        with self.problems_at(key):
            return ConnectorSpec(name, cls, self._split(CONNECTOR_KEYS, table, Options.of(cls))[1])
        return None

    def _check_carrying(self, spec: BusSpec, tables: dict[str, Any]) -> None:
        """Every device that a connector names is there, and every device is carried by a connector."""
        names = list(tables["device"]) if isinstance(tables.get("device"), dict) else []
        alone = {c.name for c in spec.connectors if "device" in c.options}
        lists = {
            c.name: [c.options["device"]] if c.name in alone else c.options.get("devices") for c in spec.connectors
        }
        for connector, listed in lists.items():
            for name in listed or ():
                if name not in names:
                    hint = did_you_mean(name, names)
                    key = "device" if connector in alone else "devices"
                    self.problem(f"connector.{connector}.{key}", f"no device {name!r} in this file: {hint}")
        # A connector that is wrong in itself might have carried what the others do not.
        if len(lists) < len(tables.get("connector", {})) or any(listed is None for listed in lists.values()):
            return
        for device in spec.devices:
            if not any(device.name in (listed or ()) for listed in lists.values()):
                first = next((name for name in lists if name not in alone), None)
                self.problem(
                    f"device.{device.name}",
                    f"no connector carries it: add {device.name!r} to connector.{first}.devices, or take that key out"
                    if first is not None
                    else f'no connector carries it: write [connector.NAME] with device = "{device.name}"',
                )
