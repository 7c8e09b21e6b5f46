"""Programs and files of targets that may be in a chroot, as pythons.py finds interpreters there.

One in a chroot also gets a mount namespace of its own, so that nothing of its files is at the same path
for whoever looks from outside.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

from tests.live.pythons import Python

ROOT: Final = Path(__file__).resolve().parents[2]
OWN: Final = Python(Path(sys.executable), sys.version_info[:3])


def running(python: Python, program: Path, *arguments: object) -> list[str]:
    """The command line that runs a program; it is copied to where the interpreter can reach it.

    Of programs that import each other only those without a chroot can.
    """
    if python.root is None:
        return python.command(str(program), *map(str, arguments))
    place, inside = within(python, program.name)
    shutil.copyfile(program, place)
    return ["unshare", "--mount", *python.command(inside, *map(str, arguments))]


def within(python: Python, name: str, directory: Path = Path("/tmp")) -> tuple[Path, str]:
    """Where a file of that name is for us, and for a program: in `directory`, or in the chroot's /tmp."""
    if python.root is None:
        return directory / name, str(directory / name)
    own = f"{os.getpid()}-{name}"
    return python.root / "tmp" / own, f"/tmp/{own}"


def clear(python: Python) -> None:
    """Remove from a chroot what was put there."""
    if python.root is not None:
        for file in (python.root / "tmp").glob(f"{os.getpid()}-*"):
            file.unlink()
