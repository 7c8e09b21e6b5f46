"""The stacks of a recording as names and lines, and beside them what a target knows of its own.

The rule (see programs/self_stack.py): the target notes when it was exactly where. A sample between two
notes of one place shows that place. Between two places it shows one of them, or one on the way: the
frames that both have, and any part of what is left and entered. Nothing is tolerated in time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from scope_ebpf.analysis.stacks.frames import resolve
from scope_ebpf.recording.reader import Recording

ENTRIES = 1 << 22  # as in self_stack.py
ENTRY = np.dtype([("time_ns", "<i8"), ("node", "<u4"), ("kind", "<u2"), ("reserved", "<u2")])
ENTER, HERE, SPIN, LEAVE = 1, 2, 3, 4
ROOT = "run_tree"
HELPERS = frozenset({"here", "met", "begin"})
SHOWN = 5

Names = tuple[str, ...]


class Frame(NamedTuple):
    """One frame of a stack."""

    name: str | None
    file: str | None
    first_line: int | None
    line: int | None


class Stack(NamedTuple):
    """One stack; the outermost frame is the first."""

    frames: tuple[Frame, ...]
    truncated: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Of its frames; `?` is one that could not be read."""
        return tuple(frame.name or "?" for frame in self.frames)


def read_stacks(recording: Recording) -> dict[tuple[int, int], Stack]:
    """The stacks of a recording by (tgid, stack), as analysis resolves them."""
    frames: dict[tuple[int, int], list[Frame]] = {}
    truncated: dict[tuple[int, int], bool] = {}
    for row in resolve(recording).iter_rows(named=True):  # the innermost frame is the first
        key = (row["tgid"], row["stack"])
        frame = Frame(row["function"], row["file"], row["first_line"], row["line"])
        frames.setdefault(key, []).insert(0, frame)
        truncated[key] = row["truncated"]
    return {key: Stack(tuple(found), truncated[key]) for key, found in frames.items()}


def samples_of(recording: Recording, tgid: int) -> list[dict[str, Any]]:
    """The samples of a process in the order of time, each with `taken`: its Stack, or None."""
    stacks = read_stacks(recording)
    samples = recording.table("samples").filter(pl.col("tgid") == tgid).sort("time_ns")
    return [
        {**row, "taken": stacks.get((tgid, row["stack"]))}
        for row in recording.collect(samples).iter_rows(named=True)
    ]


class Place(NamedTuple):
    """What a thread may have looked like at a moment."""

    stacks: tuple[Names, ...]  # names of its frames, the outermost first
    spins: bool  # its innermost frame is on a line marked `# spin`


class Truth:
    """The log of one thread of self_stack.py."""

    def __init__(self, log: Path, number: int, told: Sequence[Any]) -> None:
        """Of the thread of that number, by what the target tells of it."""
        self.tid, count, nodes, self.cpu_seconds = told
        self._entries = np.memmap(
            log, ENTRY, "r", offset=number * ENTRIES * ENTRY.itemsize, shape=(count,)
        )
        self._times = np.asarray(self._entries["time_ns"])
        assert (np.diff(self._times) >= 0).all()
        self._parents = [parent for parent, _, _ in nodes]
        self._silent = [silent for _, _, silent in nodes]
        paths: list[Names] = []
        for number_, (parent, name, _) in enumerate(nodes):
            paths.append((*(paths[parent] if number_ else ()), name))
        self._paths = paths
        self.possible = frozenset(paths)

    @property
    def first_ns(self) -> int:
        """Its first entry."""
        return int(self._times[0])

    @property
    def last_ns(self) -> int:
        """Its last entry."""
        return int(self._times[-1])

    def at(self, time_ns: int) -> Place | None:
        """Where it was; None before its first entry and after its last one."""
        if not self.first_ns <= time_ns < self.last_ns:
            return None
        index = int(np.searchsorted(self._times, time_ns, side="right")) - 1
        before, after = self._entries[index], self._entries[index + 1]
        old, new = int(before["node"]), int(after["node"])
        here = self._paths[old]
        if old != new:
            return Place(_on_the_way(here, self._paths[new]), spins=False)
        if (before["kind"], after["kind"]) == (LEAVE, ENTER):
            # it left, and came in again
            above = [here]
            node = old
            while True:
                node = self._parents[node]
                above.append(self._paths[node])
                if not self._silent[node]:
                    return Place(tuple(above), spins=False)
        return Place((here,), spins=bool(before["kind"] == SPIN))


def _on_the_way(old: Names, new: Names) -> tuple[Names, ...]:
    common = 0
    while common < min(len(old), len(new)) and old[common] == new[common]:
        common += 1
    found = {old[:length] for length in range(common, len(old) + 1)}
    found |= {new[:length] for length in range(common, len(new) + 1)}
    return tuple(found)


class Source:
    """Which lines of self_stack.py may be current, by its own marks."""

    def __init__(self, program: Path) -> None:
        """Read the marks."""
        self.spins: set[int] = set()
        self._calls: dict[str, set[int]] = {}
        for number, line in enumerate(program.read_text().splitlines(), 1):
            if line.endswith("# spin"):
                self.spins.add(number)
            for name in re.findall(r"# calls (\S+)", line):
                self._calls.setdefault(name, set()).add(number)

    def calls(self, name: str, line: int | None) -> bool:
        """Whether that line calls the function."""
        own = name.rpartition(".")[2]
        return line in self._calls.get(own, ()) or line in self._calls["any"]


@dataclass
class Compared:
    """Samples beside the truth."""

    samples: int = 0  # while the truth is known
    right: int = 0
    impossible: int = 0  # no part of the tree looks like that
    moving: int = 0  # of the right ones: taken where more than one stack is right
    lines: int = 0  # lines that could be compared,
    wrong_lines: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the samples, those that are right."""
        return self.right / self.samples if self.samples else 0.0

    def complain(self, text: str) -> None:
        """Keep the first examples of what is wrong."""
        if len(self.examples) < SHOWN:
            self.examples.append(text)


def compare(samples: Sequence[dict[str, Any]], truth: Truth, source: Source) -> Compared:
    """Compare the samples of one process with what one of its threads says of itself."""
    found = Compared()
    for sample in samples:
        place = truth.at(sample["time_ns"]) if sample["tid"] == truth.tid else None
        if place is None:
            continue
        found.samples += 1
        found.reasons[str(sample["reason"])] += 1
        taken: Stack | None = sample["taken"]
        if taken is None:
            found.complain(f"no stack: {sample}")
            continue
        frames = list(taken.frames)
        helped = False
        while frames and frames[-1].name in HELPERS:
            helped = True
            frames.pop()
        # above the root there are frames of threading, or of the module
        names = [frame.name or "?" for frame in frames]
        cut = taken.truncated and ROOT not in names
        if not cut:
            if ROOT not in names:
                found.impossible += 1
                found.complain(f"not within {ROOT}: {taken.names}")
                continue
            frames, names = frames[names.index(ROOT) :], names[names.index(ROOT) :]
        seen = tuple(names)
        if any(_fits(seen, stack, cut) for stack in place.stacks):
            found.right += 1
            found.moving += len(place.stacks) > 1
            _compare_lines(frames, place, helped, source, found)
        else:
            if not any(_fits(seen, stack, cut) for stack in truth.possible):
                found.impossible += 1
            found.complain(f"{seen} at {sample['time_ns']} ({sample['reason']}): not {place}")
    return found


def _fits(seen: Names, stack: Names, truncated: bool) -> bool:
    return seen == (stack[max(len(stack) - len(seen), 0) :] if truncated else stack)


def _compare_lines(
    frames: Sequence[Frame], place: Place, helped: bool, source: Source, found: Compared
) -> None:
    for caller, callee in pairwise(frames):
        found.lines += 1
        if not source.calls(str(callee.name), caller.line):
            found.wrong_lines += 1
            found.complain(f"line {caller.line} of {caller.name} does not call {callee.name}")
    if place.spins and not helped:
        found.lines += 1
        if frames[-1].line not in source.spins:
            found.wrong_lines += 1
            found.complain(f"line {frames[-1].line} of {frames[-1].name} does not spin")
