"""Finding device classes by what a person types: a name, "module:Class" or "file.py:Class".

A name is a built-in's, or an entry point's of the group `vbus.devices` that any installed package may have. Files and
modules are looked for from a directory: that of the bus's file, or the current one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from vbus.bus import Device
from vbus.errors import NoSuchNameError, UsageError
from vbus.hints import did_you_mean

GROUP = "vbus.devices"
BUILT_IN = {
    "rng": "vbus.devices.rng:Rng",
    "console": "vbus.devices.console:Console",
    "blk": "vbus.devices.blk:Blk",
    "net": "vbus.devices.net:Net",
}
PLACE = re.compile(r"(?P<module>.+):(?P<name>[A-Za-z_][A-Za-z0-9_.]*)")
"""What is no plain name: the last colon parts a module, or a file, from a class."""

_IMPORTING = (__file__, importlib.__file__)
_files: dict[tuple[Path, int, int], ModuleType] = {}


def names() -> dict[str, str]:
    """Every type that has a plain name, and where its class is. Built-ins cannot be replaced by an entry point."""
    from importlib.metadata import entry_points  # not for free, and a file of built-ins does not need it

    return {point.name: point.value for point in entry_points(group=GROUP)} | BUILT_IN


def find(kind: str, directory: Path) -> type[Device]:
    """The device class that `kind` names. NoSuchNameError, or UsageError when it cannot be loaded."""
    place = PLACE.fullmatch(kind)
    if place is None and kind.endswith(".py"):
        raise UsageError(f"{kind!r} is a file; name a class in it: '{kind}:Class'")
    if place is None:
        known = BUILT_IN if kind in BUILT_IN else names()
        if kind not in known:
            hint = did_you_mean(kind, sorted(known))
            more = "" if hint.endswith("?") else ", or write 'module:Class' or 'file.py:Class'"
            raise NoSuchNameError(f"no device type {kind!r}: {hint}{more}")
        place = PLACE.fullmatch(known[kind])
        if place is None:
            raise UsageError(f"the entry point {kind!r} names {known[kind]!r}, which is no module:Class")
    module = _load(place["module"], directory)
    return _class_of(module, place["module"], place["name"])


def default_name(kind: str, cls: type[Device]) -> str:
    """What a type is called in listings: its plain name, or its class's in small letters."""
    if PLACE.fullmatch(kind) is None:
        return kind
    return re.sub(r"[^a-z0-9_]", "-", cls.__name__.lower()).strip("-_") or "device"


def _load(module: str, directory: Path) -> ModuleType:
    is_file = module.endswith(".py") or "/" in module
    path = directory / module
    if is_file and not path.is_file():
        raise UsageError(f"no such file '{module}': write it, or name another in 'file.py:Class'")
    # A model may import its neighbours. At the end, so that none of them stands in for a module of somebody else.
    neighbours = os.fspath((path.parent if is_file else directory).resolve())
    if neighbours not in sys.path:
        sys.path.append(neighbours)
    try:
        return _load_file(path.resolve()) if is_file else importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise UsageError(
                f"no module {error.name!r}: is it installed? A file is written with its ending, 'file.py:Class'"
            ) from error
        raise UsageError(_broken(module, error)) from error
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(_broken(module, error)) from error


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module; again only when it has changed, so that a type stays one class."""
    status = path.stat()
    key = (path, status.st_mtime_ns, status.st_size)
    if key in _files:
        return _files[key]
    name = path.stem
    if name in sys.modules or not name.isidentifier():
        name = f"{name}-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"'{path}' is no Python file: its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Annotations and dataclasses are resolved through sys.modules.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _files[key] = module
    return module


def _broken(module: str, error: BaseException) -> str:
    """What happened while a module was run, and where in it: the last line that is not of the importing itself."""
    if isinstance(error, SyntaxError):
        return f"cannot load {module}: {error.msg} ({Path(error.filename or module).name}, line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    last = frames[-1]
    where = f" ({Path(last.filename).name}, line {last.lineno})" if last.filename not in _IMPORTING else ""
    what = " ".join(str(error).split())
    return f"cannot load {module}: {type(error).__name__}{': ' if what else ''}{what}{where}"


def _class_of(module: ModuleType, where: str, name: str) -> type[Device]:
    found: object = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, type) and issubclass(found, Device):
        return found
    if found is not None:
        raise UsageError(f"{where}:{name} is no device: its class must derive from vbus.Device")
    classes = [
        key
        for key, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Device) and value.__module__ == module.__name__
    ]
    raise NoSuchNameError(f"{where} has no class {name!r}: {did_you_mean(name, classes)}")
