"""From when to when each thread was there while the recording ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import polars as pl

from scope_ebpf.analysis.names import THREAD
from scope_ebpf.recording.reader import Recording

LIFE: Final = [*THREAD, "start_ns"]
"""What names a life: a later thread may get the tid of one that ended."""

LIVES: Final = pl.Schema(
    {
        "tgid": pl.UInt32(),
        "tid": pl.UInt32(),
        "start_ns": pl.Int64(),
        "wall_ns": pl.Int64(),
        "began": pl.Boolean(),  # during the recording: else it was there before
        "ended": pl.Boolean(),
    }
)

# Tables of which the rows tell that a thread was there, where its begin was lost.
_SEEN_IN: Final = {
    "syscalls": "start_ns", "offcpu": "start_ns", "samples": "time_ns", "gil": "start_ns",
}  # fmt: skip


def thread_lives(recording: Recording, tgids: Sequence[int] | None = None) -> pl.DataFrame:
    """One row per thread and life, with the schema LIVES, sorted by LIFE.

    A thread whose begin is not in `processes` (its row was lost) was there from the first that is known
    of it. One that did not end was there until the recording ended.
    """
    processes = recording.processes
    if tgids is not None:
        processes = processes.filter(pl.col("tgid").is_in(list(tgids)))
    events = recording.collect(
        processes.select(*THREAD, "time_ns", pl.col("event").cast(pl.String))
    ).sort("time_ns", maintain_order=True)
    begins = events.filter(pl.col("event").is_in(["alive", "fork", "thread"])).select(
        *THREAD, start_ns="time_ns", began=pl.col("event") != "alive"
    )
    begins = begins.unique(LIFE, keep="first", maintain_order=True)
    unseen = _without_begin(recording, tgids, begins)
    begins = pl.concat([begins, unseen]).sort("start_ns", maintain_order=True)
    own = events.filter(pl.col("event") == "thread_exit").select(*THREAD, own_ns="time_ns")
    process = events.filter(pl.col("event") == "exit").select("tgid", exit_ns="time_ns")
    # a program that replaces another one leaves none of the other's threads but the first
    replaced = events.filter(pl.col("event") == "exec").select("tgid", exec_ns="time_ns")
    last_ns = recording_end(recording, events)
    ends = begins
    for ended, name, keys in (
        (own, "own_ns", THREAD),
        (process, "exit_ns", ["tgid"]),
        (replaced, "exec_ns", ["tgid"]),
    ):
        ends = ends.join_asof(
            ended.sort(name), left_on="start_ns", right_on=name, by=keys, strategy="forward",
            coalesce=False, check_sortedness=False,
        )  # fmt: skip
    others = pl.col("tid") != pl.col("tgid")
    # a thread of that number was made again, and the end of the one before was lost
    again = pl.col("start_ns").shift(-1).over(THREAD)
    end = pl.min_horizontal("own_ns", "exit_ns", pl.when(others).then("exec_ns"), again)
    found = ends.sort(LIFE).with_columns(end_ns=end, ended=end.is_not_null())
    wall = pl.col("end_ns").fill_null(last_ns) - pl.col("start_ns")
    return found.with_columns(wall_ns=pl.max_horizontal(wall, 0)).select(
        pl.col(name).cast(dtype) for name, dtype in LIVES.items()
    )


def recording_end(recording: Recording, events: pl.DataFrame) -> int:
    """When the recording ended; if it has no end, when the last thing happened that it tells."""
    if recording.meta.ended_ns is not None:
        return recording.meta.ended_ns
    ends: list[int | None] = events["time_ns"].tail(1).to_list()
    for name in ("syscalls", "offcpu", "gil"):
        last = (pl.col("start_ns") + pl.col("duration_ns")).max()
        ends.append(recording.collect(recording.table(name).select(last)).item())
    return max(end for end in [*ends, recording.meta.started_ns] if end is not None)


def _without_begin(
    recording: Recording, tgids: Sequence[int] | None, begins: pl.DataFrame
) -> pl.DataFrame:
    """Threads that did something and never began, from the first of that on."""
    seen = []
    for table, time in _SEEN_IN.items():
        rows = recording.table(table).select(*THREAD, start_ns=time)
        if tgids is not None:
            rows = rows.filter(pl.col("tgid").is_in(list(tgids)))
        seen.append(rows.group_by(THREAD).agg(pl.col("start_ns").min()))
    first = pl.concat(seen).group_by(THREAD).agg(pl.col("start_ns").min())
    known = begins.lazy().select(THREAD).unique()
    return recording.collect(
        first.join(known, on=THREAD, how="anti").with_columns(
            pl.max_horizontal("start_ns", pl.lit(recording.since_ns)),
            began=pl.lit(value=False),
        )
    ).select(begins.columns)
