"""Programs that begin while everything is recorded: with files of their own, which probes have to get into.

A uprobe belongs to a file. Of named processes the files that they may use are found when the recording
begins; a host or a cgroup may get others at any time, with a container's image or a virtual environment. So
each program is looked at a moment after it began, when the dynamic linker has done its work, and twice later.
What is of one kind, by its file and its mount namespace, is looked at once a minute: the thousandth `true`
costs two look-ups in /proc, and the next service of the same interpreter is met with libraries of its own.

Misses: the first calls of a program of a new kind, until it was looked at; a program that ended before that,
whose like is looked at the next time; and libraries of a second program of a kind within the same minute.
"""

import contextlib
import os
import time
from collections.abc import Iterable

from scope_ebpf.loaders.targets import PROC

# The dynamic linker is done by then, and so are the imports of a Python service that takes them early.
LINKED_SECONDS = 0.3
# A program may load its libraries later than that, on a busy host much later; it is looked at again.
SETTLED_SECONDS = 5.0
SURE_SECONDS = 15.0
LOOKS = (LINKED_SECONDS, SETTLED_SECONDS, SURE_SECONDS)
# Then a kind that was looked at is as good as new: another program of it may have libraries of its own.
KNOWN_SECONDS = 60.0
# More processes than this that began within that time are not looked at: they are gone, or of one kind.
WAITING = 1024
KINDS = 1 << 14

Kind = tuple[str, int, int]


class Newcomers:
    """Which processes have to be looked at."""

    def __init__(self) -> None:
        """Nobody has come."""
        # by process and the number of the look: when it is due
        self._due: dict[tuple[int, int], float] = {}
        # by kind and the number of the look: until when it counts, the oldest first
        self._seen: dict[tuple[Kind, int], float] = {}

    def know(self, tgids: Iterable[int]) -> None:
        """These were looked at when the recording began."""
        for tgid in tgids:
            if (kind := kind_of(tgid)) is not None:
                self._see(kind, 0)

    def expect(self, tgids: Iterable[int]) -> None:
        """These executed a program just now."""
        now = time.monotonic()
        for tgid in tgids:
            if len(self._due) < WAITING:
                for look, after in enumerate(LOOKS):
                    self._due[tgid, look] = now + after

    def due(self) -> int | None:
        """One that has to be looked at now, if there is one."""
        now = time.monotonic()
        for (tgid, look), at in list(self._due.items()):
            # what follows may have taken it out
            if at > now or self._due.pop((tgid, look), None) is None:
                continue
            kind = kind_of(tgid)
            if kind is None:
                for later in range(look + 1, len(LOOKS)):
                    self._due.pop((tgid, later), None)
            elif self._seen.get((kind, look), 0.0) <= now:
                self._see(kind, look)
                return tgid
        return None

    def _see(self, kind: Kind, look: int) -> None:
        self._seen.pop((kind, look), None)
        self._seen[kind, look] = time.monotonic() + KNOWN_SECONDS
        if len(self._seen) > KINDS:
            del self._seen[next(iter(self._seen))]


def kind_of(tgid: int) -> Kind | None:
    """The mount namespace and the program of a process; None: it is gone, or may not be looked at."""
    folder = PROC / str(tgid)
    with contextlib.suppress(OSError):
        program = (folder / "exe").stat()
        return os.readlink(folder / "ns/mnt"), program.st_dev, program.st_ino
    return None
