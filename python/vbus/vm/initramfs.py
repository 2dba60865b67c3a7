"""A guest's files in one archive, as Linux unpacks them at its start: "newc" cpio, made without rights or tools.

Data flow: the trees, the modules and single files go in; `/init` loads the modules, and becomes the agent, which reads
commands from the console and answers each (`machine.py` is the other end).
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /disks /run /root /etc
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
export PATH=/sbin:/bin:/usr/sbin:/usr/bin HOME=/root
/bin/busybox --install -s /bin
mount -t tmpfs tmp /tmp
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
ip link set lo up
stty raw -echo </dev/console
while read -r module; do
    insmod /modules/$module 2>/tmp/insmod || { echo "init: $module: $(cat /tmp/insmod)"; }
done </modules/order
exec /agent </dev/console >/dev/console 2>&1
"""

# Each answer says how long it is, and is base64: nothing that a command or the kernel says can be taken for an answer.
# An emulated serial line loses characters now and then, so a command says how long it is, too, and may come twice.
AGENT = """#!/bin/busybox sh
echo "@ready"
last=0
while read -r mark number seconds command size; do
    if [ "$mark" != "@" ] || [ "${#command}" != "$size" ]; then
        echo "@again"
        continue
    fi
    [ "$number" = "$last" ] && continue
    last=$number
    echo "@got $number"
    echo "$command" | base64 -d >/tmp/.command
    timeout -s KILL "$seconds" setsid sh /tmp/.command </dev/null >/tmp/.output 2>&1
    status=$?
    echo "@answer $number $status $(wc -c </tmp/.output)"
    base64 /tmp/.output
    echo "@end $number"
done
echo o >/proc/sysrq-trigger
"""

SKIPPED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/bash-completion")


class Archive:
    """A cpio archive that grows."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._inode = 0
        self._names: set[str] = set()

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """A file of any kind, by its path without a slash in front, and the directories above it. The first stays."""
        if name in self._names:
            return
        above = os.path.dirname(name)
        if above and above not in self._names:
            self.add(above, stat.S_IFDIR | 0o755)
        self._names.add(name)
        self._entry(name, mode, data, device)

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int]) -> None:
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        self._out.write(b"070701" + b"".join(b"%08x" % field for field in fields) + path)
        self._pad()
        self._out.write(data)
        self._pad()

    def _pad(self) -> None:
        self._out.write(bytes(-self._out.tell() % 4))

    def tree(self, root: Path) -> None:
        """All that is below a directory, less what only people read. A link to a directory stays one."""
        for directory, folders, files in os.walk(root):
            below = os.path.relpath(directory, root)
            if below.startswith(SKIPPED):
                folders.clear()
                continue
            for name in sorted([*folders, *files]):
                path = Path(directory, name)
                inside = os.path.normpath(os.path.join(below, name))
                if path.is_symlink():
                    self.add(inside, stat.S_IFLNK | 0o777, os.readlink(path).encode())
                elif path.is_dir():
                    self.add(inside, stat.S_IFDIR | 0o755)
                else:
                    self.add(inside, stat.S_IFREG | (path.stat().st_mode & 0o777), path.read_bytes())

    def finish(self) -> bytes:
        """The archive, compressed little: unpacking is what takes the guest's time."""
        self._entry("TRAILER!!!", 0, b"", (0, 0))
        deflate = zlib.compressobj(1, wbits=31)
        return deflate.compress(self._out.getvalue()) + deflate.flush()


def initramfs(
    trees: Iterable[Path], modules: Iterable[tuple[str, bytes]], files: Mapping[str, bytes | str] | None = None
) -> bytes:
    """An archive with packages' files, modules in the order of loading, and files by path, which can be executed."""
    archive = Archive()
    # Debian's directories are one since its merge of /usr; its packages still name both.
    for name in ("bin", "sbin", "lib", "lib64"):
        archive.add(f"usr/{name}", stat.S_IFDIR | 0o755)
        archive.add(name, stat.S_IFLNK | 0o777, f"usr/{name}".encode())
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, text in {"init": INIT, "agent": AGENT, **(files or {})}.items():
        data = text.encode() if isinstance(text, str) else text
        archive.add(name.lstrip("/"), stat.S_IFREG | 0o755, data)
    for tree in trees:
        archive.tree(tree)
    order = []
    for name, module in modules:
        archive.add(f"modules/{name}", stat.S_IFREG | 0o644, module)
        order.append(name)
    archive.add("modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode())
    return archive.finish()
