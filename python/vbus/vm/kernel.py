"""The stock kernel of an architecture, from Debian's package, and the files of its modules in the order of loading."""

from __future__ import annotations

import lzma
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vbus.vm.debian import FetchError, cache, depends, unpacked

PACKAGES = {"amd64": "linux-image-amd64", "s390x": "linux-image-s390x", "ppc64el": "linux-image-powerpc64le"}
"""The package, by Debian's name of the architecture, that depends on the newest kernel."""


IMAGE = "linux-image-"


@dataclass(frozen=True)
class Kernel:
    """A kernel and its modules."""

    image: Path
    modules: Path
    """`lib/modules/RELEASE`"""

    @cached_property
    def release(self) -> str:
        """What `uname -r` says in the guest."""
        return self.modules.name

    @cached_property
    def _files(self) -> dict[str, Path]:
        found = self.modules.glob("kernel/**/*.ko*")
        return {path.name.split(".ko")[0].replace("-", "_"): path for path in found}

    @cached_property
    def _builtin(self) -> set[str]:
        lines = (self.modules / "modules.builtin").read_text().splitlines()
        return {Path(line).stem.replace("-", "_") for line in lines}

    def closure(self, modules: Collection[str | Path]) -> Iterator[tuple[str, bytes]]:
        """File names and contents of these modules and of those that they need, each after what it needs.

        A path is a module's that was built for this kernel; the others are the kernel's own. One that the kernel has
        built in is left out; KeyError for one that it does not have.
        """
        built = {module.stem.replace("-", "_"): module for module in modules if isinstance(module, Path)}
        done: set[str] = set()
        for module in modules:
            name = module.stem if isinstance(module, Path) else module
            yield from self._with_needs(name.replace("-", "_"), self._files | built, done)

    def _with_needs(self, name: str, files: Mapping[str, Path], done: set[str]) -> Iterator[tuple[str, bytes]]:
        if name in done or name in self._builtin:
            return
        done.add(name)
        path = files[name]
        module = path.read_bytes()
        if path.suffix == ".xz":
            module = lzma.decompress(module)
        # The package holds no modules.dep: that is made where it is installed, from the same words.
        needs = re.search(rb"\0depends=([^\0]*)\0", module)
        for needed in needs[1].decode().split(",") if needs else []:
            if needed:
                yield from self._with_needs(needed.replace("-", "_"), files, done)
        yield f"{name}.ko", module


def stock(architecture: str, *, backports: bool = False) -> Kernel:
    """Debian's kernel for an architecture: the release's, or the newer one of its backports. Raises FetchError."""
    name = newest(architecture, "linux-image-", backports=backports)
    files = unpacked(architecture, [name], alone_without=True, backports=backports)
    images = sorted((files / "boot").glob("vmlinu[xz]-*"))
    modules = sorted((files / "lib/modules").iterdir())
    return Kernel(images[0], modules[0])


def newest(architecture: str, kind: str, *, backports: bool = False) -> str:
    """The package of a kind of the newest kernel: `linux-image-`, `linux-headers-`. Raises FetchError."""
    known = cache() / architecture / ("kernel-backports" if backports else "kernel")
    if not known.exists():
        package = PACKAGES[architecture]
        packages = [name for name in depends(architecture, package, backports=backports) if name.startswith(IMAGE)]
        if not packages:
            raise FetchError(f"{package} names no kernel")
        known.write_text(packages[0])
    return kind + known.read_text().removeprefix(IMAGE)
