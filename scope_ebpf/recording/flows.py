"""The logical context of a thread at a moment: that of the latest row of `flows` up to then.

The kernel tells a thread's context when it changes, not with each call, and so 10 million calls
have their contexts looked up in one go: as an expression over whole columns, which keeps the order of
the rows, works on the parts of a table as they come, and is not computed where nobody asks for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Array = NDArray[Any]

# What begins a thread, or another program in it, also begins its calls anew: with no context.
BIRTHS = ("fork", "thread", "exec")


class ThreadContexts:
    """The contexts of all threads over time."""

    def __init__(self, flows: pl.DataFrame, births: pl.DataFrame) -> None:
        """From `flows` as they are stored, and `births`: tgid, tid and time_ns of new threads.

        A thread may have the number of one that ended: what was told before its birth is of that one.
        """
        told = flows.select("tgid", "tid", "start_ns", "context")
        born = births.join(told, on=["tgid", "tid"], how="semi").select(
            "tgid", "tid", start_ns="time_ns", context=pl.lit(0, dtype=pl.UInt64)
        )
        # of a birth and a call at the same time the call is the later one
        rows = pl.concat([born, told]).sort("start_ns", maintain_order=True)
        threads = _thread(rows["tgid"].to_numpy(), rows["tid"].to_numpy())
        self._threads = np.unique(threads)
        self._times = rows["start_ns"].to_numpy()
        # Position in time within the thread: one number, so that one binary search finds it.
        keys = self._key(np.searchsorted(self._threads, threads), np.arange(1, len(rows) + 1))
        order = np.argsort(keys)
        self._keys = keys[order]
        self._contexts = rows["context"].to_numpy()[order]

    def at(self, tgid: Array, tid: Array, time_ns: Array) -> NDArray[np.uint64]:
        """The context of each thread at the time beside it; 0: the thread itself, or not known."""
        thread = _thread(tgid, tid)
        number = np.searchsorted(self._threads, thread)
        known = self._threads[np.minimum(number, len(self._threads) - 1)] == thread
        # how many rows of any thread came up to then
        reached = np.searchsorted(self._times, time_ns, side="right")
        place = np.searchsorted(self._keys, self._key(number, reached), side="right") - 1
        # the row that was found may be the last one of the thread before
        own = self._keys[np.maximum(place, 0)] >= self._key(number, np.zeros(1, np.int64))
        return np.where(known & (place >= 0) & own, self._contexts[np.maximum(place, 0)], 0)

    def _key(self, number: Array, position: Array) -> NDArray[np.int64]:
        return number.astype(np.int64) * (len(self._times) + 1) + position

    def expression(self, time_ns: pl.Expr) -> pl.Expr:
        """`context` of the threads `tgid`, `tid` at a time; a null time: 0."""
        return (
            pl.struct("tgid", "tid", time_ns=time_ns.fill_null(np.iinfo(np.int64).min))
            .map_batches(self._of_batch, return_dtype=pl.UInt64, is_elementwise=True)
            .alias("context")
        )

    def _of_batch(self, rows: pl.Series) -> pl.Series:
        tgid, tid, time_ns = (
            rows.struct.field(name).to_numpy() for name in ("tgid", "tid", "time_ns")
        )
        return pl.Series("context", self.at(tgid, tid, time_ns), dtype=pl.UInt64)


def _thread(tgid: Array, tid: Array) -> NDArray[np.uint64]:
    return tgid.astype(np.uint64) << np.uint64(32) | tid.astype(np.uint64)
