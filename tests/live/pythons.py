"""The CPythons of a machine, and programs that run under them.

Tests take whatever a machine has: what pyenv installed, the system's own, and those in the chroots that
build/chroots holds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scope_ebpf.cpython.offsets import NEWEST, OLDEST, Version

CHROOTS: Final = Path(__file__).resolve().parents[2] / "build/chroots"
NAME: Final = re.compile(r"python3\.\d+")
ASK: Final = (
    "import sys, sysconfig; print(*sys.version_info[:3], sys.implementation.name,"
    " sys.version_info.releaselevel, sysconfig.get_config_var('Py_DEBUG') or 0,"
    " sysconfig.get_config_var('Py_GIL_DISABLED') or 0)"
)


@dataclass(frozen=True)
class Python:
    """An interpreter.

    Attributes:
        path: as a program in `root` names it.
        version: major, minor, micro.
        root: of a chroot; None: it is in ours.
    """

    path: Path
    version: Version
    root: Path | None = None

    def __str__(self) -> str:
        where = f"-{self.root.name}" if self.root else "-system" if self.system else ""
        return ".".join(map(str, self.version)) + where

    @property
    def system(self) -> bool:
        """It is the system's own."""
        return self.path.parent == Path("/usr/bin")

    @property
    def minor(self) -> int:
        """Of version 3.minor."""
        return self.version[1]

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs it. The process that is started becomes the interpreter."""
        inside = [str(self.path), *arguments]
        return inside if self.root is None else ["chroot", str(self.root), *inside]


@functools.cache
def pythons() -> tuple[Python, ...]:
    """Every CPython here whose layout is known: final releases with a GIL, without Py_DEBUG."""
    places: list[tuple[Path, Path | None]] = [
        (path, None)
        for folder in (Path("/usr/bin"), Path("/usr/local/bin"))
        for path in sorted(folder.glob("python3.*"))
    ]
    places += [(path, None) for path in sorted(Path.home().glob(".pyenv/versions/*/bin/python3.*"))]
    places += [
        (Path("/") / path.relative_to(root), root)
        for root in sorted(CHROOTS.glob("*"))
        for path in sorted(root.glob("usr/bin/python3.*"))
    ]
    found: dict[tuple[int, int], Python] = {}
    for path, root in places:
        file = path if root is None else root / path.relative_to("/")
        if NAME.fullmatch(path.name) and file.exists():
            status = file.stat()
            version = _version(Python(path, (0, 0, 0), root))
            if version is not None:
                found.setdefault((status.st_dev, status.st_ino), Python(path, version, root))
    return tuple(sorted(found.values(), key=lambda python: (python.version, str(python))))


def _version(python: Python) -> Version | None:
    """What an interpreter says of itself; None if it is none of those that pythons() is about."""
    command = python.command("-S", "-c", ASK)
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    words = answer.stdout.split()
    if answer.returncode != 0 or words[3:] != ["cpython", "final", "0", "0"]:
        return None
    version = (int(words[0]), int(words[1]), int(words[2]))
    return version if OLDEST <= version[:2] <= NEWEST else None


@contextlib.contextmanager
def started(
    python: Python,
    program: str,
    *arguments: str,
    flags: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A program that runs under an interpreter until the end of the block, then it is killed.

    Its standard input and output are pipes of text. Nothing is waited for: let it print a line when it is
    ready, and read that.

    Args:
        program: its text, which is passed with -c; so a chroot needs no file.
        flags: of the interpreter.
        environment: added to ours.
    """
    process = subprocess.Popen(
        python.command(*flags, "-c", program, *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
