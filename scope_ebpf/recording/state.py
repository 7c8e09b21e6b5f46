"""What a recorder remembers of what it wrote, so that older rows can go.

Connections, stacks and code objects are told again by the kernel side (see Capture.tell_again), and so
are processes. What else holds until something else is written, each thread's logical context and each
process's interpreter, is remembered here and written again at that moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.loaders import host
from scope_ebpf.recording.schema import SCHEMAS
from scope_ebpf.records import ProcessEvent

if TYPE_CHECKING:
    from scope_ebpf.recorder import Drained

_THREAD: Final = ["tgid", "tid"]


class Connections:
    """Connections that messages name, and those that were described: what is left of the first is lost."""

    def __init__(self) -> None:
        """None was seen."""
        # ids count up from 1
        self._described: NDArray[np.bool_] = np.zeros(1 << 10, np.bool_)
        self._waiting: set[int] = set()

    def follow(self, frames: Mapping[str, pl.DataFrame]) -> None:
        """Take the messages and connections of a batch."""
        if "connections" in frames:
            found = frames["connections"]["connection"].to_numpy()
            if int(found.max()) >= len(self._described):
                larger = np.zeros(2 * int(found.max()), np.bool_)
                larger[: len(self._described)] = self._described
                self._described = larger
            self._described[found] = True
            self._waiting.difference_update(found.tolist())
        if "messages" in frames:
            named = frames["messages"]["connection"].unique().to_numpy()
            inside = named[named < len(self._described)]
            self._waiting.update(inside[~self._described[inside]].tolist())
            self._waiting.update(named[named >= len(self._described)].tolist())

    def lost(self) -> int:
        """How many were named and not described."""
        return len(self._waiting)


class States:
    """What holds of threads and processes until something else is written."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._flows = pl.DataFrame(schema=SCHEMAS["flows"])
        self._pythons: dict[int, dict[str, Any]] = {}

    def follow(self, frames: dict[str, pl.DataFrame], batch: Drained) -> None:
        """Remember a batch's rows; to one that tells again, add what holds."""
        if batch.told_again:
            self._tell_again(frames, batch)
        if "flows" in frames:
            both = pl.concat([self._flows, frames["flows"]])
            self._flows = both.unique(_THREAD, keep="last", maintain_order=True)
        if "processes" in frames:
            self._follow_processes(frames["processes"])
        if "interpreters" in frames:
            for row in frames["interpreters"].iter_rows(named=True):
                self._pythons[row["tgid"]] = row

    def _follow_processes(self, processes: pl.DataFrame) -> None:
        """A fork has its parent's interpreter, until it executes another program."""
        if not self._pythons:
            return
        lives = processes.filter(pl.col("tgid") == pl.col("tid"))
        for event, tgid, parent in lives.select("event", "tgid", "parent_tgid").iter_rows():
            if event == ProcessEvent.PROCESS_FORK and parent in self._pythons:
                self._pythons[tgid] = {**self._pythons[parent], "tgid": tgid}
            elif event in (ProcessEvent.PROCESS_EXEC, ProcessEvent.PROCESS_EXIT):
                self._pythons.pop(tgid, None)

    def _tell_again(self, frames: dict[str, pl.DataFrame], batch: Drained) -> None:
        """Add rows of flows and interpreters for what lives; forget the rest."""
        schema = {**SCHEMAS["flows"], "born_ns": pl.Int64()}
        offset = host.clock_offsets().boottime_ns
        living = pl.concat(
            [
                pl.DataFrame(
                    {
                        "tgid": run.tasks["tgid"],
                        "tid": run.tasks["tid"],
                        "born_ns": run.tasks["start_boottime_ns"].astype(np.int64) - offset,
                    },
                    schema_overrides={name: schema[name] for name in (*_THREAD, "born_ns")},
                )
                for run in batch.marked
            ]
            or [pl.DataFrame(schema={name: schema[name] for name in (*_THREAD, "born_ns")})]
        ).unique(_THREAD)
        # a later thread of that number has not told its context yet
        self._flows = (
            self._flows.join(living, on=_THREAD, how="inner", maintain_order="left")
            .filter(pl.col("born_ns") <= pl.col("start_ns"))
            .drop("born_ns")
        )
        held = self._flows.filter(pl.col("context") != 0).with_columns(
            start_ns=pl.lit(batch.since_ns, pl.Int64)
        )
        if len(held):
            frames["flows"] = pl.concat([held, *([frames["flows"]] if "flows" in frames else [])])
        tgids = set(living["tgid"].to_list())
        self._pythons = {tgid: row for tgid, row in self._pythons.items() if tgid in tgids}
        if self._pythons:
            again = [{**row, "time_ns": batch.since_ns} for row in self._pythons.values()]
            rows = pl.DataFrame(again, schema=SCHEMAS["interpreters"])
            new = [frames["interpreters"]] if "interpreters" in frames else []
            frames["interpreters"] = pl.concat([rows, *new])
