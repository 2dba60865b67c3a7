"""The verb `doctor`: does this machine have what vbus needs? A line for each thing, and what to do where it is missing.

Each check does what vbus itself would do, and gives a detail, or raises: then it is missing.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import re
import resource
import select
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from vbus.cli import output

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
ENOUGH_FILES = 1024
OLDEST_QEMU = 9
"""Before, its vhost-user front-ends fail on some machines."""


@dataclass(frozen=True)
class Finding:
    """What a check found: a row of `vbus doctor --json`."""

    check: str
    ok: bool
    required: bool
    detail: str
    todo: str


@dataclass(frozen=True)
class Check:
    """Something that vbus uses. `look` gives a detail, or raises what is wrong."""

    name: str
    look: Callable[[], str]
    todo: str
    required: bool = True

    def find(self) -> Finding:
        """Do it."""
        try:
            return Finding(self.name, True, self.required, self.look(), "")
        except Exception as error:
            detail = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
            return Finding(self.name, False, self.required, detail, self.todo)


def _system() -> str:
    if platform.system() != "Linux":
        raise RuntimeError(f"{platform.system()} is not Linux")
    return f"Linux {platform.release()}, Python {platform.python_version()}"


def _native() -> str:
    from vbus import _core

    return Path(_core.__file__ or "").name


def _memfd() -> str:
    fd = os.memfd_create("vbus-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) != SEALS:
            raise RuntimeError("seals do not stay")
    finally:
        os.close(fd)
    return "memfd_create, F_SEAL_SHRINK"


def _eventfd() -> str:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        os.eventfd_write(fd, 1)
        with select.epoll() as epoll:
            epoll.register(fd, select.EPOLLIN)
            if not epoll.poll(0) or os.eventfd_read(fd) != 1:
                raise RuntimeError("an eventfd was rung and not heard")
    finally:
        os.close(fd)
    return "eventfd, epoll"


def _sockets() -> str:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        pid, uid, _ = struct.unpack("3i", left.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if (pid, uid) != (os.getpid(), os.geteuid()):
            raise RuntimeError("SO_PEERCRED does not tell who is there")
    return "SOCK_SEQPACKET, SO_PEERCRED"


def _table() -> str:
    Path("/proc/net/tcp").read_text()
    return "/proc/net/tcp"


def _pty() -> str:
    for fd in os.openpty():
        os.close(fd)
    return "openpty"


def _files() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < ENOUGH_FILES:
        raise RuntimeError(f"{soft} open files are allowed")
    return f"{soft} open files of {hard}"


def _run_directory() -> str:
    from vbus import rundir

    with rundir.BusDirectory("vbus-doctor") as directory:
        directory.listen().close()
    return str(rundir.root())


def _libraries(*names: str) -> Callable[[], str]:
    def look() -> str:
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} missing")
        return ", ".join(names)

    return look


def _tool(name: str) -> Callable[[], str]:
    def look() -> str:
        # Not everybody has the directories of system tools on the path.
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if found is None:
            raise RuntimeError("not found")
        return found

    return look


def _qemu() -> str:
    program = _tool(f"qemu-system-{platform.machine().removesuffix('le')}")()
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version ((\d+)[\d.]*)", said)
    if found is None or int(found[2]) < OLDEST_QEMU:
        raise RuntimeError(f"{found[1] if found else 'its version'} is older than {OLDEST_QEMU}")
    return f"QEMU {found[1]}"


def _tap() -> str:
    os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    return "/dev/net/tun"


CHECKS = (
    Check("system", _system, "run on Linux"),
    Check("native module", _native, "build it: maturin develop --release, or install the wheel"),
    Check("sealed memory", _memfd, "run on Linux 4.0 or newer, with memfd_create allowed by the container"),
    Check("doorbells", _eventfd, "run where eventfd and epoll are allowed"),
    Check("peer credentials", _sockets, "run on Linux, with Unix sockets allowed"),
    Check("run directory", _run_directory, "set VBUS_RUNTIME_DIR to a directory of your own"),
    Check("libraries of the bus", _libraries("pydantic", "starlette", "uvicorn"), "pip install vbus"),
    Check("open files", _files, f"allow more: ulimit -n {ENOUGH_FILES}", required=False),
    Check("TCP membership", _table, "mount /proc; without it nobody is let in over TCP", required=False),
    Check("terminals", _pty, "mount /dev/pts, or give consoles another backend", required=False),
    Check("taps", _tap, "modprobe tun; networks have other backends, too", required=False),
    Check("guests", _qemu, f"install QEMU {OLDEST_QEMU} or newer, to give devices to guests", required=False),
    Check("mkfs.ext4", _tool("mkfs.ext4"), "apt-get install e2fsprogs; the demo does without", required=False),
    Check("e2fsck", _tool("e2fsck"), "apt-get install e2fsprogs; the demo does without", required=False),
)


@click.command("doctor", short_help="Check that this machine has what vbus needs.")
@output.json_option
def doctor_command(as_json: bool) -> int:
    """Check that this machine has what vbus needs, and say what to do where it has not.

    Exit status 1 when something is missing that vbus cannot do without.
    """
    findings = [check.find() for check in CHECKS]
    if as_json:
        output.print_json(asdict(finding) for finding in findings)
    else:
        output.print_table(
            ("CHECK", "RESULT", "DETAIL", "WHAT TO DO"),
            ([f.check, _result(f), f.detail, f.todo] for f in findings),
        )
    return 1 if any(finding.required and not finding.ok for finding in findings) else 0


def _result(finding: Finding) -> str:
    if finding.ok:
        return "ok"
    return "missing" if finding.required else "missing (not required)"
