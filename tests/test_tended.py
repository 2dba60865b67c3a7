"""What holds for all of the project's files: they speak of it alone, their links lead somewhere, walls stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LISTED = subprocess.run(
    # The checkout may belong to somebody else than who tests it.
    ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"],
    capture_output=True,
    text=True,
    check=True,
)
FILES = sorted(name for name in LISTED.stdout.split("\0") if name and (ROOT / name).is_file())
LICENCES = ("LICENSE", "guest/linux/COPYING")

# Each alternative has a letter in brackets, so that this file does not hold what it looks for.
FOREIGN = {
    "a path of one machine": r"(?<![\w.])/(wor[k]|hom[e]|User[s]|roo[t]|op[t]|mn[t])/\w",
    "a package registry": r"pyp[i]\.(org|io)|pythonhoste[d]|static\.crate[s]|artifactor[y]|index-ur[l]|find-link[s]",
    "how it is made": r"\bissu[e] #?\d|\b(this|last|next) sessio[n]\b|\bprompte[d] to\b|\bsub-?agen[t]",
    "its tools": r"\bclaud[e]\b|\banthropi[c]|\bopena[i]\b|\bchat-?gp[t]|\bcopilo[t]\b|\bLL[M]s?\b|\bA[I]\b",
    "a person": r"[\w.+-]+@[\w-]+\.(co[m]|or[g]|ne[t]|i[o])\b|^co-author[e]d|^signed-of[f]",
}


@pytest.mark.parametrize(
    "parts",
    [
        ("see /wor", "k/main/x.py"),
        ("open /hom", "e/someone/x"),
        ("--index-ur", "l=x"),
        ("as issu", "e 7 wants"),
        ("done in the last sessio", "n"),
        ("asked an A", "I about it"),
        ("me@example.or", "g"),
        ("Co-Author", "ed-By: me"),
    ],
)
def test_what_is_looked_for_is_found(parts: tuple[str, str]) -> None:
    assert any(re.search(pattern, "".join(parts), re.IGNORECASE) for pattern in FOREIGN.values())


@pytest.mark.parametrize("name", FILES)
def test_a_file_speaks_of_the_project_alone(name: str) -> None:
    text = (ROOT / name).read_text()
    found = [
        f"{name}:{number}: {what}: {line.strip()}"
        for what, pattern in FOREIGN.items()
        for number, line in enumerate(text.splitlines(), 1)
        if name not in LICENCES and re.search(pattern, line, re.IGNORECASE)
    ]
    assert found == []


@pytest.mark.parametrize("lock", ["Cargo.lock", "fuzz/Cargo.lock"])
def test_a_lock_names_the_public_registry_alone(lock: str) -> None:
    sources = set(re.findall(r'^source = "(.*)"$', (ROOT / lock).read_text(), re.MULTILINE))
    assert sources == {"registry+https://github.com/rust-lang/crates.io-index"}


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".md")])
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        page = (ROOT / name).parent / target if target else ROOT / name
        assert page.exists(), target
        if anchor:
            assert anchor in _anchors(page), f"{target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.startswith("python/") and name.endswith((".py", ".pyi"))]
)
def test_a_module_says_why_it_exists(name: str) -> None:
    words = ast.get_docstring(ast.parse((ROOT / name).read_text()))
    assert words
    assert len(words.split()) >= 3, words


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("crates/") and name.endswith(".rs")])
def test_a_crate_file_begins_with_its_purpose(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#![")]
    assert re.match(r"//! \S", next(line for line in lines if line))


def test_the_architecture_names_every_part() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    packages = {Path(name).parts[2] for name in FILES if name.startswith("python/vbus/") and name.count("/") >= 3}
    assert {"bus", "devices", "connectors", "proxy"} <= packages
    assert [part for part in sorted(packages) if not re.search(rf"`(vbus\.)?{part}`", page)] == []
    crates = {Path(name).parts[1] for name in FILES if name.startswith("crates/")}
    assert [crate for crate in sorted(crates) if f"`crates/{crate}`" not in page] == []


def test_every_dependency_has_a_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [re.split(r"[<>=\[ ]", line)[0] for line in project["dependencies"]]
    for crate in (ROOT / "crates").iterdir():
        manifest = tomllib.loads((crate / "Cargo.toml").read_text())
        wanted += [*manifest["dependencies"], *manifest.get("dev-dependencies", {})]
    table = (ROOT / "ARCHITECTURE.md").read_text().partition("## Dependencies")[2]
    assert [name for name in wanted if not name.startswith("vbus-") and not re.search(rf"\b{name}\b", table)] == []


def test_the_walls_between_the_packages_stand() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    contracts = (ROOT / "pyproject.toml").read_text().count("[[tool.importlinter.contracts]]")
    assert f"Contracts: {contracts} kept, 0 broken." in done.stdout
