"""Programs that begin while everything is recorded: with files of their own, which probes have to get into.

A uprobe belongs to a file. Of named processes the files that they may use are found when the recording
begins; a host or a cgroup may get others at any time, with a container's image or a virtual environment. So
each program is looked at once, a moment after it began, when the dynamic linker has done its work. Once is
by its file and its mount namespace: the thousandth `true` costs two look-ups in /proc.

Misses: the first calls of a program of a new kind, until it was looked at; and a program that ended before
that, whose like is looked at the next time.
"""

import contextlib
import os
import time
from collections.abc import Iterable

from scope_ebpf.loaders.targets import PROC

# The dynamic linker is done by then, and so are the imports of a Python service that takes them early.
LINKED_SECONDS = 0.3
# A program may load its libraries later than that; it is looked at once more.
SETTLED_SECONDS = 5.0
# More processes than this that began within that time are not looked at: they are gone, or of one kind.
WAITING = 1024
KINDS = 1 << 14

Kind = tuple[str, int, int]


class Newcomers:
    """Which processes have to be looked at."""

    def __init__(self) -> None:
        """Nobody has come."""
        self._due: dict[tuple[int, bool], float] = {}
        self._seen: dict[tuple[Kind, bool], None] = {}

    def know(self, tgids: Iterable[int]) -> None:
        """These were looked at when the recording began."""
        for tgid in tgids:
            if (kind := kind_of(tgid)) is not None:
                self._seen[kind, False] = None

    def expect(self, tgids: Iterable[int]) -> None:
        """These executed a program just now."""
        now = time.monotonic()
        for tgid in tgids:
            if len(self._due) < WAITING:
                self._due[tgid, False] = now + LINKED_SECONDS
                self._due[tgid, True] = now + SETTLED_SECONDS

    def due(self) -> int | None:
        """One that has to be looked at now, if there is one."""
        now = time.monotonic()
        for (tgid, settled), at in list(self._due.items()):
            # what follows may have taken it out
            if at > now or self._due.pop((tgid, settled), None) is None:
                continue
            kind = kind_of(tgid)
            if kind is None:
                self._due.pop((tgid, True), None)
            elif (kind, settled) not in self._seen:
                self._seen[kind, settled] = None
                if len(self._seen) > KINDS:
                    del self._seen[next(iter(self._seen))]
                return tgid
        return None


def kind_of(tgid: int) -> Kind | None:
    """The mount namespace and the program of a process; None: it is gone, or may not be looked at."""
    folder = PROC / str(tgid)
    with contextlib.suppress(OSError):
        program = (folder / "exe").stat()
        return os.readlink(folder / "ns/mnt"), program.st_dev, program.st_ino
    return None
