"""Where the time of each thread went, from its begin to its end: running, or waiting for what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.asof import NONE, first_after, group_numbers, latest_before
from scope_ebpf.analysis.lives import LIFE, thread_lives
from scope_ebpf.analysis.names import THREAD, thread_names
from scope_ebpf.analysis.parts import CALLS, POLL
from scope_ebpf.analysis.waits import WAIT_KIND, wait_kind
from scope_ebpf.recording.readable import syscall_numbers
from scope_ebpf.recording.reader import Recording

Rows = NDArray[np.intp]
Numbers = NDArray[np.int64]

HOLDERS: Final = pl.List(
    pl.Struct({"tid": pl.UInt32(), "thread": pl.String(), "wait_ns": pl.Int64()})
)
PARTS: Final = (
    "python_ns", "native_ns", "running_ns", "gil_ns", "runqueue_ns", "lock_ns", "disk_ns",
    "network_ns", "sleep_ns", "stopped_ns", "unknown_ns",
)  # fmt: skip
"""The parts of a thread's time: they add up to `wall_ns`."""

# One row per thread that ran while the recording did.
THREADS: Final = pl.Schema(
    {
        "service": pl.String(),
        "thread": pl.String(),
        "tgid": pl.UInt32(),
        "tid": pl.UInt32(),
        "start_ns": pl.Int64(),  # when it was first there, CLOCK_MONOTONIC
        "wall_ns": pl.Int64(),
        "began": pl.Boolean(),  # during the recording
        "ended": pl.Boolean(),
        "python_ns": pl.Int64(),  # on the CPU in the interpreter, by its share of the samples
        "native_ns": pl.Int64(),  # on the CPU in other code: C extensions, libraries, the kernel
        "running_ns": pl.Int64(),  # on the CPU, and never sampled
        "gil_ns": pl.Int64(),  # in calls that wait for the GIL, to their end
        "runqueue_ns": pl.Int64(),  # ready to run, waiting for a CPU
        "lock_ns": pl.Int64(),  # other locks
        "disk_ns": pl.Int64(),
        "network_ns": pl.Int64(),  # sockets and pipes, polling included if something came
        "sleep_ns": pl.Int64(),  # sleeping, idle, waiting for children
        "stopped_ns": pl.Int64(),  # by a signal or tracer
        "unknown_ns": pl.Int64(),
        "samples": pl.UInt32(),  # ticks of the sampling clock, on the CPU
        "gc_ns": pl.Int64(),  # in collections of garbage: a part of the others; null: no such probe
        "gil_holders": HOLDERS,  # who held the GIL when a wait was over, longest first
    }
)
_GC: Final = "gc"
# Functions of the interpreter's own binary are Python's work, as is the loop that runs bytecode.
_INTERPRETER: Final = re.compile(
    r"^(?:lib)?(?:python|pypy)[\d.]*t?(?:\.so[\d.]*)?(?:\s|$)|_PyEval_"
)


def thread_times(recording: Recording, tgids: Sequence[int] | None = None) -> pl.DataFrame:
    """Divide the time of threads; the result has the schema THREADS, longest on the CPU first.

    The time of a thread is what the recording saw of it: from its begin, or the recording's, to its
    end. Off the CPU it is what the rows of `offcpu` say; calls that waited for the GIL count as
    that from begin to end, once where they overlap; the rest was on the CPU. Where rows of offcpu
    were lost, their time counts as on the CPU. If off-CPU time was not recorded, all but the GIL is
    `unknown_ns`.

    `python_ns` and `native_ns` are estimates by samples; all other numbers are exact.
    """
    lives = thread_lives(recording, tgids)
    threads = lives.select(THREAD).unique(maintain_order=True)
    off = _off(recording, lives)
    gil = recording.collect(
        recording.gil.join(threads.lazy(), on=THREAD, how="semi")
        .select(*THREAD, "start_ns", "duration_ns", "holder_tid")
    )  # fmt: skip
    line = _Line(lives)
    covered = _Covered(*line.intervals(lives, gil))
    base, ends = line.base, line.base + lives["wall_ns"].to_numpy()
    gil_ns = covered.upto(ends) - covered.upto(base)
    parts = {"gil_ns": gil_ns}
    known = "offcpu" in recording.meta.families
    parts |= _divided(lives, line, off, covered)
    rest = lives["wall_ns"].to_numpy() - sum(parts.values())
    if not known:
        parts["unknown_ns"] = parts["unknown_ns"] + rest
        rest = np.zeros(len(lives), np.int64)
    python, native, samples = _ticks(recording, lives)
    ticked = python + native
    share = np.divide(python, ticked, out=np.zeros(len(lives)), where=ticked > 0)
    in_python = np.minimum(np.round(rest * share).astype(np.int64), rest)
    parts["python_ns"] = np.where(ticked > 0, in_python, 0)
    parts["native_ns"] = np.where(ticked > 0, rest - in_python, 0)
    parts["running_ns"] = np.where(ticked > 0, 0, rest)
    names = thread_names(recording, lives.select(LIFE))
    found = lives.with_columns(
        **{name: pl.Series(values, dtype=pl.Int64) for name, values in parts.items()},
        samples=pl.Series(samples),
        gc_ns=_collections(recording, lives),
    )
    return (
        found.join(names, on=LIFE, how="left", maintain_order="left")
        .join(_holders(recording, lives, gil), on=LIFE, how="left", maintain_order="left")
        .with_columns(pl.col("gil_holders").fill_null(pl.lit([], HOLDERS)))
        .select(pl.col(name).cast(dtype) for name, dtype in THREADS.items())
        .sort(
            pl.col("wall_ns") == 0,
            -pl.sum_horizontal("python_ns", "native_ns", "running_ns"),
            -pl.col("gil_ns"),
            "tgid",
            "tid",
            "start_ns",
        )
    )


def _off(recording: Recording, lives: pl.DataFrame) -> pl.DataFrame:
    """Intervals off the CPU, with what they were for."""
    machine = recording.meta.host.machine
    polls = pl.col("number").is_in(syscall_numbers(machine, CALLS[POLL]))
    timed_out = (
        recording.syscalls.filter(polls & (pl.col("result") == 0))
        .select(*THREAD, syscall_start_ns="start_ns", nothing_came=pl.lit(value=True))
        .unique([*THREAD, "syscall_start_ns"])
    )
    rows = (
        recording.offcpu.join(lives.lazy().select(THREAD).unique(), on=THREAD, how="semi")
        .join(timed_out, on=[*THREAD, "syscall_start_ns"], how="left")
        .select(
            *THREAD,
            "start_ns",
            "duration_ns",
            ready_ns=pl.col("runnable_ns").fill_null(0),
            kind=wait_kind(machine, pl.col("nothing_came").fill_null(value=False)).to_physical(),
        )
    )
    return recording.collect(rows)


class _Line:
    """The times of all lives on one line, on which each life has a part of its own."""

    def __init__(self, lives: pl.DataFrame) -> None:
        wall = lives["wall_ns"].to_numpy() + 1
        self._start = lives["start_ns"].to_numpy()
        self._extent = wall - 1
        self.base: Numbers = np.cumsum(wall) - wall

    def life(self, lives: pl.DataFrame, rows: pl.DataFrame, time: str) -> Rows:
        """The life in which a row begins; of one before the first, that one. -1: none."""
        group, of_group = group_numbers(
            (lives["tgid"].to_numpy(), rows["tgid"].to_numpy()),
            (lives["tid"].to_numpy(), rows["tid"].to_numpy()),
        )
        found = latest_before(group, self._start, of_group, rows[time].to_numpy())
        lost = found == NONE
        if lost.any():
            never = np.full(int(lost.sum()), np.iinfo(np.int64).min)
            found[lost] = first_after(group, self._start, of_group[lost], never)
        return found

    def at(self, life: Rows, time: Numbers) -> Numbers:
        """Where a time is; before a life and after it, at its ends."""
        place: Numbers = self.base[life] + np.clip(time - self._start[life], 0, self._extent[life])
        return place

    def intervals(self, lives: pl.DataFrame, rows: pl.DataFrame) -> tuple[Numbers, Numbers]:
        """Begin and end of rows with `start_ns` and `duration_ns`, as far as they are in a life."""
        life = self.life(lives, rows, "start_ns")
        known = life != NONE
        start = rows["start_ns"].to_numpy()[known]
        end = start + rows["duration_ns"].to_numpy()[known]
        return self.at(life[known], start), self.at(life[known], end)


class _Covered:
    """How much of a line is covered by intervals, which may overlap."""

    def __init__(self, begin: Numbers, end: Numbers) -> None:
        order = np.argsort(begin, kind="stable")
        begin, end = begin[order], np.maximum.accumulate(end[order]) if len(end) else end
        # what overlaps counts from where the ones before it end
        reached = np.concatenate([begin[:1], end[:-1]])
        self._begin = np.maximum(begin, reached)
        self._length = np.maximum(end - self._begin, 0)
        self._before = np.concatenate([[0], np.cumsum(self._length)]).astype(np.int64)

    def upto(self, place: Numbers) -> Numbers:
        """How much is covered before each place."""
        if not len(self._begin):
            return np.zeros(len(place), np.int64)
        count = np.searchsorted(self._begin, place, side="right")
        last = np.maximum(count - 1, 0)
        partly = np.where(count > 0, np.clip(place - self._begin[last], 0, self._length[last]), 0)
        covered: Numbers = self._before[last] + partly
        return covered


def _divided(
    lives: pl.DataFrame, line: _Line, off: pl.DataFrame, covered: _Covered
) -> dict[str, Numbers]:
    """Sums of what threads waited for off the CPU, outside of what is covered already."""
    life = line.life(lives, off, "start_ns")
    known = life != NONE
    off, life = off.filter(pl.Series(known)), life[known]
    start = off["start_ns"].to_numpy()
    end_ns = start + off["duration_ns"].to_numpy()
    begin, end = line.at(life, start), line.at(life, end_ns)
    woken = line.at(life, end_ns - off["ready_ns"].to_numpy())
    order = np.argsort(begin, kind="stable")
    begin, end, woken, life = begin[order], end[order], woken[order], life[order]
    kind = off["kind"].to_numpy()[order]
    # an end that was not seen in time may lie behind the next one's begin
    end[:-1] = np.minimum(end[:-1], begin[1:])
    woken = np.clip(woken, begin, end)
    at_begin, at_woken, at_end = map(covered.upto, (begin, woken, end))
    waiting = (woken - begin) - (at_woken - at_begin)
    ready = (end - woken) - (at_end - at_woken)
    sums = {"runqueue_ns": _sums(ready, life, len(lives))}
    for number, name in enumerate(WAIT_KIND.categories):
        chosen = kind == number
        sums[f"{name}_ns"] = _sums(waiting[chosen], life[chosen], len(lives))
    return sums


def _sums(values: Numbers, life: Rows, count: int) -> Numbers:
    """Exact sums per life: floats would round nanoseconds of a day."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, life, values)
    return sums


def _ticks(recording: Recording, lives: pl.DataFrame) -> tuple[Numbers, Numbers, Numbers]:
    """How often each life was sampled on the CPU in Python, in native code, and at all."""
    ticks = recording.collect(
        recording.samples.filter(pl.col("reason") == "cpu").select(
            *THREAD, "time_ns", "native", python=pl.col("stack").is_not_null()
        )
    )
    # names are few
    names = ticks["native"].unique().drop_nulls().to_list()
    own = [name for name in names if is_interpreter(name)]
    python = (ticks["python"] & (ticks["native"].is_null() | ticks["native"].is_in(own))).to_numpy()
    life = _Line(lives).life(lives, ticks, "time_ns")
    python, life = python[life != NONE], life[life != NONE]
    counted = np.bincount(life, minlength=len(lives)).astype(np.int64)
    in_python = np.bincount(life[python], minlength=len(lives)).astype(np.int64)
    return in_python, counted - in_python, counted


def is_interpreter(native: str) -> bool:
    """Whether a native function (`library function`) is of the interpreter itself.

    >>> is_interpreter("libpython3.11.so.1.0 PyDict_GetItem"), is_interpreter("libc.so.6 memcpy")
    (True, False)
    >>> is_interpreter("python3.11"), is_interpreter("uwsgi _PyEval_EvalFrameDefault")
    (True, True)
    """
    return _INTERPRETER.search(native) is not None


def _collections(recording: Recording, lives: pl.DataFrame) -> pl.Series:
    """How long each life collected garbage, if there was a probe for that."""
    hits = recording.collect(
        recording.hits.filter(pl.col("probe") == _GC).select(
            *THREAD, "time_ns", pl.col("duration_ns").fill_null(0)
        )
    )
    if hits.is_empty():
        return pl.Series([None] * len(lives), dtype=pl.Int64)
    life = _Line(lives).life(lives, hits, "time_ns")
    known = life != NONE
    return pl.Series(_sums(hits["duration_ns"].to_numpy()[known], life[known], len(lives)))


def _holders(recording: Recording, lives: pl.DataFrame, gil: pl.DataFrame) -> pl.DataFrame:
    """Who held the GIL when waits of a life were over: LIFE, and `gil_holders`."""
    life = _Line(lives).life(lives, gil, "start_ns")
    rows = lives.select(LIFE).with_row_index("life")
    waited = (
        gil.with_columns(life=pl.Series(life))
        .filter((pl.col("life") != NONE) & pl.col("holder_tid").is_not_null())
        .group_by("life", "tgid", "holder_tid")
        .agg(wait_ns=pl.col("duration_ns").sum())
        .rename({"holder_tid": "tid"})
    )
    names = thread_names(recording, waited.select(THREAD).unique())
    return (
        waited.join(names, on=THREAD, how="left")
        .sort("life", "wait_ns", "tid", descending=[False, True, False])
        .group_by("life", maintain_order=True)
        .agg(gil_holders=pl.struct("tid", "thread", "wait_ns"))
        .join(rows.with_columns(pl.col("life").cast(pl.Int64)), on="life")
        .select(*LIFE, pl.col("gil_holders").cast(HOLDERS))
    )
