"""The CPythons of this machine, and two newer ones in a chroot: one of each version and build.

Tests run their targets in whatever there is. The project's own interpreter always is there; others
are looked for in PATH, where distributions, pyenv and uv put them, and below PREFIXES.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "chroot.sh"
UNAVAILABLE = 77  # as the script says it
OLDEST = (3, 8)
# Of Debian's next release; scripts/chroot.sh knows them, too.
CHROOT_VERSIONS = ("3.14", "3.15")
PLACES = (
    "/usr/bin/python3.*",
    "/usr/local/bin/python3.*",
    "/opt/python/*/bin/python3.*",
    "~/.pyenv/versions/*/bin/python3.*",
    "~/.local/share/uv/python/*/bin/python3.*",
)
# Debian's are static, although sysconfig says that they are shared.
ASK = (
    "import sys; print('%d.%d' % sys.version_info[:2], sys.implementation.name,"
    " int('/libpython3' in open('/proc/self/maps').read()))"
)


@dataclass(frozen=True)
class Interpreter:
    """One CPython to run targets in."""

    version: str  # such as 3.11
    path: str  # as it is seen from within `root`
    shared: bool = False  # it is in a libpython of its own
    root: Path | None = None  # of its chroot

    @property
    def name(self) -> str:
        """For the names of tests."""
        build = "chroot" if self.root is not None else "shared" if self.shared else "static"
        return f"{self.version}-{build}"

    def __str__(self) -> str:
        return self.name

    def at_least(self, version: str) -> bool:
        """Whether it is of that version or a newer one."""
        return _numbers(self.version) >= _numbers(version)

    def command(self, program: Path, *arguments: object) -> list[str]:
        """What runs a program in it; one in a chroot also has a mount namespace of its own."""
        if self.root is None:
            return [self.path, str(program), *map(str, arguments)]
        inside = self.root / "tmp" / program.name
        aside = inside.with_name(f"{program.name}.{os.getpid()}")
        shutil.copyfile(program, aside)
        aside.rename(inside)
        enter = ["unshare", "--mount", "chroot", str(self.root)]
        return [*enter, self.path, f"/tmp/{program.name}", *map(str, arguments)]

    def place(self, path: Path) -> tuple[Path, str]:
        """Where a file of that name is for us, and for the program in this interpreter."""
        if self.root is None:
            return path, str(path)
        name = f"{os.getpid()}-{path.name}"
        return self.root / "tmp" / name, f"/tmp/{name}"


@lru_cache
def found_interpreters() -> tuple[Interpreter, ...]:
    """Those of this machine itself: one of each version, shared and static, from OLDEST on."""
    candidates = [
        path
        for place in PLACES
        for path in sorted(glob.glob(os.path.expanduser(place)))
        if path.rpartition("python3.")[2].isdecimal()
    ]
    candidates += [
        path
        for minor in range(OLDEST[1], 20)
        if (path := shutil.which(f"python3.{minor}")) is not None
    ]
    found: dict[str, Interpreter] = {}
    for path in dict.fromkeys(os.path.realpath(path) for path in candidates):
        answer = subprocess.run(
            [path, "-I", "-S", "-c", ASK], capture_output=True, text=True, check=False, timeout=20
        ).stdout.split()
        if len(answer) != 3 or answer[1] != "cpython" or _numbers(answer[0]) < OLDEST:
            continue
        interpreter = Interpreter(answer[0], path, shared=answer[2] == "1")
        found.setdefault(interpreter.name, interpreter)
    return tuple(sorted(found.values(), key=lambda each: (_numbers(each.version), each.name)))


def interpreters() -> list[Interpreter | str]:
    """For the parameters of tests: the found ones, and the versions that a chroot is made for.

    `resolve` makes an Interpreter of either, when the test runs.
    """
    return [*found_interpreters(), *(f"{version}-chroot" for version in CHROOT_VERSIONS)]


def resolve(chosen: Interpreter | str) -> Interpreter:
    """An interpreter to run; makes the chroot at its first use."""
    if isinstance(chosen, Interpreter):
        return chosen
    version = chosen.partition("-")[0]
    root = chroot()
    return Interpreter(version, f"/usr/bin/python{version}", root=root)


@lru_cache
def chroot() -> Path:
    """The folder with the newer CPythons.

    Where the system has no way to Debian's packages the test is skipped, and may be; where it has
    one and that fails, the test fails.
    """
    made = subprocess.run([SCRIPT], capture_output=True, text=True, check=False, timeout=110)
    if made.returncode == UNAVAILABLE:
        pytest.skip(f"optional: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    return ROOT / made.stdout.strip()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
