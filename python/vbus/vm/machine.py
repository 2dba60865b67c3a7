"""A guest that runs: QEMU's options for the machine, its start, commands in it, and its end.

Data flow: `run` writes a line with a number and a command on the guest's console and waits for the answer with that
number, which the agent of `initramfs.py` gives. A thread collects what the console says, so that nothing is lost and
the guest never waits for a reader. What the guest's devices are is the caller's: QEMU's options in `args`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vbus.vm import kernel
from vbus.vm.debian import FetchError, cache, unpacked
from vbus.vm.initramfs import initramfs

BOOT_SECONDS = 120
"""How long a start may take: ten times what it takes on a busy machine without KVM."""
END_SECONDS = 10
SENDINGS = 12
"""How often a command is sent before the guest counts as deaf."""
SENDING_SECONDS = 5
POKE_SECONDS = 15
SHELL_SECONDS = 365 * 86400
"""A shell is left when somebody leaves it."""


class GuestError(Exception):
    """A guest could not be started, or a command in it failed; with what it said."""


@dataclass(frozen=True)
class Machine:
    """What QEMU and the kernel are told about a kind of machine."""

    architecture: str
    """Debian's name."""
    qemu: str
    options: tuple[str, ...]
    console: str
    """The options of the device behind the console, whose characters come from the chardev `console`."""
    terminal: str
    """The kernel's name of it."""
    modules: tuple[str, ...]
    """The transport of virtio."""
    emulated: str = ""
    """What the kernel is told beside, where there is no KVM."""


X86 = ("amd64", "qemu-system-x86_64")
MACHINES = {
    "q35": Machine(*X86, ("-M", "q35,memory-backend=mem"), "isa-serial", "ttyS0", ("virtio_pci",)),
    "microvm": Machine(
        *X86,
        # Without the interrupt controller and the clocks of old, Debian's kernel does not start; without the last, it
        # is shown the legacy interface, which vhost-user devices refuse.
        # The usual firmware looks at each disk with buffers that QEMU does not share; this one looks at none.
        (
            *("-M", "microvm,pit=on,pic=on,rtc=on,isa-serial=off,memory-backend=mem", "-bios", "qboot.rom"),
            *("-global", "virtio-mmio.force-legacy=false"),
        ),
        "isa-serial",
        "ttyS0",
        ("virtio_mmio",),
        # On a busy host neither the processor's clock nor its speed can be measured by the one timer that there is, and
        # the kernel would wait for that for ever. What it is told instead need not be right: it finds out later.
        emulated="tsc_early_khz=1000000 lpj=4000000",
    ),
    "s390x": Machine(
        *("s390x", "qemu-system-s390x"),
        ("-M", "s390-ccw-virtio,memory-backend=mem"),
        "sclpconsole",
        "ttysclp0",
        (),
    ),
    "pseries": Machine(
        *("ppc64el", "qemu-system-ppc64"),
        ("-M", "pseries,memory-backend=mem,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off"),
        "spapr-vty",
        "hvc0",
        ("virtio_pci",),
    ),
}
"""By the name that a guest is asked for with."""


@dataclass(frozen=True)
class Answer:
    """What a command in the guest came to."""

    status: int
    data: bytes

    @property
    def output(self) -> str:
        """What it said, as text."""
        return self.data.decode(errors="replace")


class Guest:
    """A running guest, for a `with` block. Its memory is a shared memory file, as vhost-user needs it.

    >>> with Guest(args=["-device", "virtio-rng-pci"], modules=["virtio_rng"]) as guest:
    ...     guest.run("head -c 4 /dev/hwrng | xxd -p")

    `modules` are kernel modules beside the machine's own, loaded in their order: names of the kernel's, or files that
    were built for it; `packages` are names of Debian packages; `files` are texts or bytes by path; `memory` is in MiB,
    in `memory_file` where others shall find it by its path. `backports`: with the newer kernel of Debian's backports.
    Raises GuestError when it does not start within `BOOT_SECONDS`.
    """

    def __init__(
        self,
        machine: str = "q35",
        *,
        args: Sequence[str] = (),
        modules: Sequence[str | Path] = (),
        packages: Sequence[str] = (),
        files: Mapping[str, bytes | str] | None = None,
        memory: int = 256,
        memory_file: Path | None = None,
        cpus: int = 1,
        append: str = "",
        accelerator: str | None = None,
        backports: bool = False,
        wait: bool = True,
    ) -> None:
        self._machine = MACHINES[machine]
        self._answered = threading.Condition()
        self._said = bytearray()
        self._ended = False
        self._number = 0
        self._stack = contextlib.ExitStack()
        try:
            place = "memory-backend-memfd" if memory_file is None else f"memory-backend-file,mem-path={memory_file}"
            backend = f"{place},id=mem,size={memory}M,share=on", "-m", f"{memory}M"
            self._start(machine, args, modules, packages, files, backend, cpus, append, accelerator, backports, wait)
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        name: str,
        args: Sequence[str],
        modules: Sequence[str | Path],
        packages: Sequence[str],
        files: Mapping[str, bytes | str] | None,
        memory: Sequence[str],
        cpus: int,
        append: str,
        accelerator: str | None,
        backports: bool,
        wait: bool,
    ) -> None:
        machine = self._machine
        if shutil.which(machine.qemu) is None:
            raise GuestError(f"no {machine.qemu} on this machine: install QEMU 9 or newer")
        try:
            stock = kernel.stock(machine.architecture, backports=backports)
            trees = [unpacked(machine.architecture, ["busybox-static"])]
            if packages:
                trees.append(unpacked(machine.architecture, packages))
            loaded = list(stock.closure([*machine.modules, *modules]))
        except FetchError as error:
            raise GuestError(str(error)) from None
        except KeyError as error:
            raise GuestError(f"{stock.release} has no module {error.args[0]}") from None
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vbus-vm-")))
        ramdisk = self.directory / "initramfs"
        ramdisk.write_bytes(initramfs(trees, loaded, files))
        self.qmp_socket = self.directory / "qmp"
        console = self.directory / "console"
        listening = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listening.bind(str(console))
        listening.listen(1)
        listening.settimeout(END_SECONDS)
        accelerator = accelerator or fastest(name)
        emulated = machine.emulated if accelerator.startswith("tcg") else ""
        command = [
            *(machine.qemu, *machine.options, "-accel", accelerator),
            *("-object", *memory, "-smp", str(cpus)),
            *("-nodefaults", "-no-reboot", "-display", "none", "-no-user-config"),
            *("-chardev", f"socket,id=console,path={console}", "-device", f"{machine.console},chardev=console"),
            *("-qmp", f"unix:{self.qmp_socket},server=on,wait=off"),
            *("-kernel", str(stock.image), "-initrd", str(ramdisk)),
            *(
                "-append",
                " ".join([f"console={machine.terminal} quiet loglevel=1 panic=-1", emulated, append]).rstrip(),
            ),
            *args,
        ]
        self._errors = self.directory / "qemu.err"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, cwd=self.directory
            )
        self._stack.callback(self._end)
        while True:
            try:
                listening.settimeout(0.2)
                self._console, _ = listening.accept()
                break
            except TimeoutError:
                if self._process.poll() is not None:
                    raise GuestError(f"{machine.qemu} ended: {self._errors.read_text().strip()}") from None
        self._reader = threading.Thread(target=self._collect, name="guest's console", daemon=True)
        self._reader.start()
        if wait:
            self.wait()

    # What it is asked.

    def run(self, command: str, *, seconds: float = 60, check: bool = True) -> str:
        """What a command of the shell says on both its outputs.

        A status that is not 0 raises GuestError with that, unless `check` is False; so does a guest that ends, or does
        not answer some seconds after the command has been killed.
        """
        answer = self.ask(command, seconds=seconds)
        if check and answer.status:
            raise GuestError(f"{command!r} ended with {answer.status} in the guest:\n{answer.output}")
        return answer.output

    def ask(self, command: str, *, seconds: float = 60) -> Answer:
        """What a command of the shell came to, whatever its status."""
        number, line = self._numbered(command, seconds)
        self._send(line, re.compile(rb"@got %d\n" % number))
        pattern = re.compile(rb"@answer %d (\d+) (\d+)\n(.*?)@end %d\n" % (number, number), re.DOTALL)
        found = self._await(pattern, seconds + END_SECONDS, repr(command))
        try:
            output = base64.b64decode(found[3])
        except binascii.Error as error:
            raise GuestError(f"the answer to {command!r} is damaged ({error}):\n{self.console}") from None
        if len(output) != int(found[2]):
            raise GuestError(f"the answer to {command!r} is damaged: {len(output)} bytes of {int(found[2])}")
        return Answer(int(found[1]), output)

    def shell(self, show: Callable[[bytes], object], *, size: tuple[int, int] = (80, 24)) -> int:
        """A shell on the guest's console until it is left; its status. `size` is columns and lines.

        What it says is shown as it comes; what is typed is given to `type_keys` by another thread. GuestError when the
        guest ends, or is closed.
        """
        columns, lines = size
        terminal = self.terminal
        # The agent waits for the command, and reads nothing meanwhile: the console is the shell's alone.
        command = (
            f"exec <{terminal} >{terminal} 2>&1; stty sane rows {lines} cols {columns}; cd /root; sh -i; "
            "status=$?; stty raw -echo; exit $status"
        )
        # Nothing that is said in the shell can be taken for its answer: nobody there knows the number.
        self._number = secrets.randbelow(1 << 30)
        number, line = self._numbered(command, SHELL_SECONDS)
        start = seen = self._send(line, re.compile(rb"@got %d\n" % number))
        mark = b"@answer %d " % number
        end = re.compile(mark + rb"(\d+) 0\n@end %d\n" % number)
        while True:
            with self._answered:
                while len(self._said) == seen and not self._ended:
                    self._answered.wait()
                new, seen, ended = bytes(self._said[start:]), len(self._said), self._ended
            found = end.search(new)
            # What may be the beginning of the answer waits until it is known whether it is.
            at = new.find(mark) if mark in new else new.rfind(b"@")
            shown = at if at >= 0 and mark.startswith(new[at : at + len(mark)]) else len(new)
            show(new[:shown])
            start += shown
            if found is not None:
                return int(found[1])
            if ended:
                raise GuestError("the guest has ended")

    def hear(self, words: str, *, seconds: float = 60) -> None:
        """Wait until the console says, or has said, a line. Raises GuestError when it does not in time, or cannot."""
        self._await(re.compile(re.escape(words.encode()) + rb"\r?\n"), seconds, repr(words))

    def type_keys(self, keys: bytes) -> None:
        """Give the console what somebody typed. Nothing happens when the guest has ended."""
        with contextlib.suppress(OSError):
            self._console.sendall(keys)

    def _numbered(self, command: str, seconds: float) -> tuple[int, bytes]:
        """A command's number, and the line that asks the agent for it."""
        self._number += 1
        encoded = base64.b64encode(command.encode())
        return self._number, b"@ %d %d %b %d\n" % (self._number, max(1, round(seconds)), encoded, len(encoded))

    def _send(self, line: bytes, taken: re.Pattern[bytes]) -> int:
        """Send a line until the guest has all of it; where in what it said the rest begins."""
        for _ in range(SENDINGS):
            with self._answered:
                start = len(self._said)
            self._console.sendall(line)
            with contextlib.suppress(GuestError):
                pattern = re.compile(rb"@again\n|" + taken.pattern)
                found = self._await(pattern, SENDING_SECONDS, "a command", start)
                if taken.match(found[0]):
                    return found.end()
            if self._ended:
                break
        return self._await(taken, 0, "a command").end()

    def wait(self, seconds: float = BOOT_SECONDS) -> None:
        """Until it has started, within so many seconds. Raises GuestError."""
        pattern = re.compile(rb"@(ready|again)\n")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline - POKE_SECONDS and not self._ended:
            with contextlib.suppress(GuestError):
                self._await(pattern, POKE_SECONDS, "its start")
                return
            # Its word may have been damaged on the way: to an empty line it says that it does not understand.
            self.type_keys(b"\n")
        self._await(pattern, POKE_SECONDS, "its start")

    def reset(self) -> None:
        """Press the reset button, and wait until it has started again. Raises GuestError."""
        with self._answered:
            start = len(self._said)
        self.qmp("set-action", reboot="reset")
        self.qmp("system_reset")
        self._await(re.compile(rb"@ready\n"), BOOT_SECONDS, "its start", start)

    def wait_for(self, command: str, *, seconds: float = 60) -> str:
        """What a command says once its status is 0: it is asked again and again. GuestError after some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            answer = self.ask(command, seconds=seconds)
            if answer.status == 0:
                return answer.output
            if time.monotonic() > deadline:
                raise GuestError(f"{command!r} still ends with {answer.status} in the guest:\n{answer.output}")
            time.sleep(0.1)

    def take_over(self, other: Guest) -> None:
        """Be asked from now on what the other was, which was migrated here and owes no answer."""
        self._number = other._number

    @property
    def console(self) -> str:
        """All that its console has said so far."""
        with self._answered:
            return self._said.decode(errors="replace")

    @property
    def terminal(self) -> str:
        """The path of the console in the guest. While a command runs, nobody else reads from it."""
        return f"/dev/{self._machine.terminal}"

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether QEMU is there."""
        return self._process.poll() is None

    @property
    def errors(self) -> str:
        """What QEMU has said."""
        return self._errors.read_text()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """What QEMU answers to a command of QMP; the names' underscores become dashes. Raises GuestError."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        return asyncio.run(self._qmp(command, words))

    async def _qmp(self, command: str, arguments: dict[str, Any]) -> Any:
        from qemu.qmp import ExecuteError, QMPClient

        client = QMPClient("vbus")
        await client.connect(str(self.qmp_socket))
        try:
            return await client.execute(command, arguments)
        except ExecuteError as error:
            raise GuestError(f"QEMU refuses {command}: {error}") from None
        finally:
            await client.disconnect()

    # Its end.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End QEMU, and wait for that."""
        self._stack.close()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(AttributeError):
            self._reader.join()
            self._console.close()

    # The console.

    def _collect(self) -> None:
        """Until the console is closed."""
        while True:
            try:
                data = self._console.recv(1 << 16)
            except OSError:
                data = b""
            with self._answered:
                self._said += data
                self._ended = not data
                self._answered.notify_all()
            if not data:
                return

    def _await(self, pattern: re.Pattern[bytes], seconds: float, what: str, start: int = 0) -> re.Match[bytes]:
        """What the console says, or has said behind a place. GuestError when it does not in time, or cannot."""
        deadline = time.monotonic() + seconds
        with self._answered:
            while True:
                found = pattern.search(self._said, start)
                if found is not None:
                    return found
                left = deadline - time.monotonic()
                if self._ended and not self._said:
                    raise GuestError(f"{self._machine.qemu} ended: {self._errors.read_text().strip()}")
                if self._ended or left <= 0:
                    why = "the guest has ended" if self._ended else f"nothing after {seconds:.0f} s"
                    tail = self._said[-4000:].decode(errors="replace")
                    errors = self._errors.read_text()
                    raise GuestError(f"{what}: {why}\n{errors}--- the console's last words:\n{tail}")
                self._answered.wait(left)


_probing = threading.Lock()


def fastest(machine: str = "q35") -> str:
    """QEMU's words for the fastest accelerator that starts Debian's kernel here: found once, by starting it."""
    emulated = "tcg,thread=multi"
    if (
        MACHINES[machine].architecture != "amd64"
        or os.uname().machine != "x86_64"
        or not os.access("/dev/kvm", os.W_OK)
    ):
        return emulated
    with _probing:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        known = cache() / "accelerator"
        with contextlib.suppress(OSError, ValueError):
            when, accelerator = known.read_text().split()
            if when == boot:
                return accelerator
        accelerator = "kvm" if _starts("kvm") else emulated
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(f"{boot} {accelerator}\n")
        return accelerator


PROBE_SECONDS = 15


def _starts(accelerator: str) -> bool:
    """Whether a guest starts with an accelerator: within seconds, as it does where it works at all."""
    try:
        with Guest(accelerator=accelerator, wait=False) as guest:
            guest._await(re.compile(rb"@ready\n"), PROBE_SECONDS, "its start")
            return True
    except GuestError:
        return False
