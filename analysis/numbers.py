"""Whose a process's number was when: the kernel gives the numbers of processes that ended to others."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

Array = NDArray[Any]

_ALWAYS: Final = -(1 << 63)
# Processes that were forked from one another without executing anything, one after the other.
_GENERATIONS: Final = 32


def process_lives(processes: pl.DataFrame) -> pl.DataFrame:
    """One row per process, also where the numbers of processes are used again.

    `processes` is that table of a recording, in any order. Sorted by `tgid` and `since_ns`, from when on
    the number belongs to that process (of the first one: the smallest number). `row` counts them,
    `parent` is the row of the parent, null if it is not known; `comm`, `command_line` and `cgroup` are
    the last ones.

    A number is used again when a process of that number is born anew, or, where that row was lost, does
    something after its exit. What was forked and executed nothing is what its parent was at that moment.
    """
    event = pl.col("event").cast(pl.String)
    thread = event.is_in(["thread", "thread_exit"])
    own = pl.col("tgid") == pl.col("tid")
    born = event.is_in(["fork", "alive"]) & own
    # threads that end at the same moment as their process may be told after it
    ended = (event == "exit").shift(1, fill_value=False).over("tgid") & ~event.is_in(
        ["exit", "thread_exit"]
    )
    rows = (
        processes.lazy()
        .sort("time_ns", maintain_order=True)
        .with_columns(thread=thread, forked=(event == "fork") & own, begins=born | ended)
        .with_columns(life=pl.col("begins").cast(pl.UInt32).cum_sum().over("tgid").clip(1))
    )
    lives = (
        rows.group_by("tgid", "life")
        .agg(
            pl.col("time_ns").first().alias("since_ns"),
            pl.col("parent_tgid").first(),
            pl.coalesce(
                # threads have a comm of their own, which does not name the process
                pl.col("comm").filter(~pl.col("thread")).drop_nulls().last(),
                pl.col("comm").drop_nulls().last(),
            ),
            pl.col("command_line", "cgroup").drop_nulls().last(),
            pl.col("forked").first(),
        )
        .sort("tgid", "life")
        .drop("life")
        .collect()
        .with_row_index("row")
    )
    parents = lives.select("row", "since_ns", parent_tgid="tgid")
    joined = lives.sort("since_ns", maintain_order=True).join_asof(
        parents.rename({"row": "parent"}).sort("since_ns", maintain_order=True),
        on="since_ns", by="parent_tgid", check_sortedness=False,
    )  # fmt: skip
    # its parent may have been met, and have got its row, after it
    first = parents.unique("parent_tgid", keep="first", maintain_order=True)
    joined = joined.join(
        first.select("parent_tgid", first="row"), on="parent_tgid", how="left"
    ).with_columns(pl.coalesce("parent", "first").alias("parent"))
    lives = joined.sort("row").drop("first")
    told = (
        rows.filter(pl.col("command_line").is_not_null())
        .select("tgid", told_ns="time_ns", told="command_line")
        .collect()
    )
    again = ~pl.col("tgid").is_first_distinct()
    return _with_lines_of_parents(lives, told).with_columns(
        since_ns=pl.when(again).then("since_ns").otherwise(pl.lit(_ALWAYS, pl.Int64))
    )


def _with_lines_of_parents(lives: pl.DataFrame, told: pl.DataFrame) -> pl.DataFrame:
    """Give those that were forked, and executed nothing, the command line that their parent had then.

    `told`: `tgid`, `told_ns`, `told`, sorted by time.
    """
    for _ in range(_GENERATIONS):
        wanting = pl.col("forked") & pl.col("command_line").is_null()
        found = (
            lives.filter(wanting)
            .sort("since_ns", maintain_order=True)
            .join_asof(
                told, left_on="since_ns", right_on="told_ns",
                by_left="parent_tgid", by_right="tgid", check_sortedness=False,
            )
            .filter(pl.col("told").is_not_null())
        )  # fmt: skip
        if found.is_empty():
            break
        lives = lives.join(found.select("row", "told"), on="row", how="left", maintain_order="left")
        lives = lives.with_columns(pl.coalesce("command_line", "told")).drop("told")
        told = pl.concat([told, found.select("tgid", told_ns="since_ns", told="told")]).sort(
            "told_ns", maintain_order=True
        )
    return lives


class LifeOf:
    """Finds the process that had a number at a time."""

    def __init__(self, lives: pl.DataFrame) -> None:
        """From `tgid` and `since_ns`, as `process_lives` sorts them."""
        tgids, since_ns = lives["tgid"].to_numpy(), lives["since_ns"].to_numpy()
        self._tgids = np.unique(tgids)
        self._times = np.sort(since_ns)
        # Position in time within the number: one key, so that one binary search finds it.
        reached = np.searchsorted(self._times, since_ns, side="right")
        self._keys = self._key(np.searchsorted(self._tgids, tgids), reached)

    def at(self, tgid: Array, time_ns: Array) -> NDArray[np.int64]:
        """The row of each process, by its number and a time; -1: no process with that number is known."""
        if not len(self._keys):
            return np.full(len(tgid), -1, np.int64)
        number = np.searchsorted(self._tgids, tgid)
        known = self._tgids[np.minimum(number, len(self._tgids) - 1)] == tgid
        reached = np.searchsorted(self._times, time_ns, side="right")
        place = np.searchsorted(self._keys, self._key(number, reached), side="right") - 1
        return np.where(known, place, -1)

    def _key(self, number: Array, position: Array) -> NDArray[np.int64]:
        return number.astype(np.int64) * (len(self._times) + 1) + position

    def expression(self, time_ns: pl.Expr, tgid: str = "tgid") -> pl.Expr:
        """The row of the process `tgid` at a time, or null; a null time: of the first one."""
        return (
            pl.struct(tgid=pl.col(tgid), time_ns=time_ns.cast(pl.Int64).fill_null(_ALWAYS))
            .map_batches(self._of_batch, return_dtype=pl.Int64, is_elementwise=True)
            .alias("life")
        )

    def _of_batch(self, rows: pl.Series) -> pl.Series:
        tgid = rows.struct.field("tgid").fill_null(0).to_numpy()
        row = self.at(tgid, rows.struct.field("time_ns").to_numpy())
        return pl.Series("life", row, dtype=pl.Int64).replace(-1, None)
