"""Where the recorder's batches go: turned into tables, counted, and written as segments."""

import os
import time
from collections import Counter
from typing import Any, Literal

import numpy as np
import polars as pl

from scope_ebpf import records
from scope_ebpf.errors import RecordingError
from scope_ebpf.loaders import host
from scope_ebpf.loaders.cgroups import CgroupPaths
from scope_ebpf.loaders.hits import Places
from scope_ebpf.loaders.symbols import Symbols
from scope_ebpf.recorder import Drained, Marked, Plan, Use
from scope_ebpf.recording.meta import Clock, Host, Meta, RecorderUse, Target
from scope_ebpf.recording.python_tables import Descriptions
from scope_ebpf.recording.redaction import Redactor
from scope_ebpf.recording.tables import (
    Payloads,
    hot_frames,
    process_row,
    rows_frame,
    wide_frames,
)
from scope_ebpf.recording.writer import RecordingWriter
from scope_ebpf.version import __version__

META_SECONDS = 5.0
LOSS_TABLES = {
    records.LossKind.LOSS_SYSCALLS: "syscalls",
    records.LossKind.LOSS_MESSAGES: "messages",
    records.LossKind.LOSS_OFFCPU: "offcpu",
    records.LossKind.LOSS_PROCESSES: "processes",
    records.LossKind.LOSS_CONNECTIONS: "connections",
    records.LossKind.LOSS_PAYLOADS: "payloads",
    records.LossKind.LOSS_TASKS: "tasks",
    records.LossKind.LOSS_CONNECTS: "connects",
    records.LossKind.LOSS_TLS: "tls",
    records.LossKind.LOSS_SAMPLES: "samples",
    records.LossKind.LOSS_STACKS: "stacks",
    records.LossKind.LOSS_CONTEXTS: "contexts",
    records.LossKind.LOSS_HANDOFFS: "handoffs",
    records.LossKind.LOSS_GIL: "gil",
    records.LossKind.LOSS_HITS: "hits",
}


class Store:
    """A recording that is being written. One thread uses it; rows() and bytes_on_disk() any."""

    def __init__(
        self,
        plan: Plan,
        started_ns: int,
        use: Use,
        notes: tuple[str, ...] = (),
        places: Places | None = None,
    ) -> None:
        """Write the recording's beginning; `notes` are sentences about what is not recorded.

        `places` are those of the user's own probes.

        Raises:
            RecordingError: its directory cannot be written to.
        """
        self._use = use
        self._payloads = Payloads()
        self._descriptions = Descriptions()
        self._symbols = Symbols()
        places = places or Places()
        self._hit_kinds = places.kinds()
        self._redactor = Redactor(plan.unredacted, hit_kinds=self._hit_kinds)
        self._calls = tuple(map(str, plan.options.calls))
        self._cgroups = CgroupPaths()
        self._lost: Counter[str] = Counter()
        self._announced: set[int] = set()
        self._used: set[int] = set()
        self._failed: RecordingError | None = None
        self._writer = RecordingWriter(plan.path, first_meta(plan, started_ns, notes, places))
        self._next_meta = time.monotonic() + META_SECONDS

    def rows(self) -> dict[str, int]:
        """Rows written so far, by table."""
        return dict(self._writer.rows)

    def bytes_on_disk(self) -> int:
        """Bytes of segments written so far."""
        return self._writer.bytes_on_disk

    def save(self, batch: Drained) -> None:
        """Write a batch's rows; after a failure they are only counted, as lost.

        Raises:
            RecordingError: writing failed, now for the first time.
        """
        failed_before = self._failed is not None
        frames = wide_frames(
            batch.wide,
            self._payloads,
            self._descriptions,
            self._cgroups.path,
            self._hit_kinds,
            self._calls,
        )
        frames |= self._descriptions.take(last=batch.last)
        if alive := self._alive_rows(batch.marked):
            rows = rows_frame("processes", alive)
            frames["processes"] = pl.concat([rows, frames.get("processes", rows.clear())])
        if batch.hot:
            frames |= hot_frames(batch.hot, self._payloads, self._symbols.name)
        if batch.interpreters:
            frames["interpreters"] = rows_frame("interpreters", batch.interpreters)
        if losses := self._loss_rows(batch):
            frames["losses"] = rows_frame("losses", losses)
        self._redactor.redact_all(frames)
        for table, rows in frames.items():
            self._save(table, rows)
        if "messages" in frames:
            self._used.update(frames["messages"]["connection"].unique().to_list())
        if "connections" in frames:
            self._announced.update(frames["connections"]["connection"].to_list())
        if (batch.notes or time.monotonic() >= self._next_meta) and self._failed is None:
            self._writer.write_meta(
                self._lost_now(), self._recorder_use(), notes=tuple(batch.notes)
            )
            self._next_meta = time.monotonic() + META_SECONDS
        if self._failed is not None and not failed_before:
            raise self._failed

    def finish(self, failure: BaseException | None = None) -> None:
        """Write the recording's end; `failure` is why it ended too early, if it did.

        Raises:
            RecordingError: it could not be written.
        """
        notes: tuple[str, ...] = ()
        failure = self._failed if self._failed is not None else failure
        if failure is not None:
            notes = (f"recording ended early: {str(failure) or type(failure).__name__}",)
        self._writer.release_reserve()
        self._writer.write_meta(
            self._lost_now(),
            self._recorder_use(),
            ended_ns=time.monotonic_ns(),
            complete=failure is None,
            notes=notes,
        )

    def _save(self, table: str, rows: pl.DataFrame) -> None:
        if self._failed is None:
            try:
                self._writer.write(table, rows)
                return
            except RecordingError as error:
                self._failed = error
        self._lost[table] += len(rows)

    def _lost_now(self) -> dict[str, int]:
        """Lost events by table; a connection that messages name but nobody described is lost."""
        lost = self._lost.copy()
        lost["connections"] += len(self._used - self._announced)
        return dict(lost)

    def _recorder_use(self) -> RecorderUse:
        return RecorderUse(
            tgid=os.getpid(),
            cpu_seconds=self._use.cpu_seconds(),
            cpu_percent=self._use.cpu_percent(),
            peak_rss_bytes=self._use.peak_rss_bytes(),
        )

    def _alive_rows(self, marked: list[Marked]) -> list[dict[str, Any]]:
        """Rows of processes for threads that ran when they were taken up."""
        rows = []
        for run in marked:
            for task in run.tasks:
                record = np.zeros((), records.PROCESS)
                for name in ("tgid", "tid", "parent_tgid", "cgroup", "start_boottime_ns", "comm"):
                    record[name] = task[name]
                record["time_ns"] = run.time_ns
                record["event"] = records.ProcessEvent.PROCESS_ALIVE
                # a thread that is not the first one has none
                arguments = run.command_lines.get(int(task["tid"]), b"")
                rows.append(process_row(record, self._cgroups.path, arguments))
        return rows

    def _loss_rows(self, batch: Drained) -> list[dict[str, Any]]:
        """Rows of losses for a batch, and the counts by table."""
        if batch.lost is None:
            return []
        rows = []
        for cpu, kind in zip(*np.nonzero(batch.lost), strict=True):
            table, count = LOSS_TABLES[records.LossKind(kind)], int(batch.lost[cpu, kind])
            self._lost[table] += count
            rows.append({"time_ns": batch.since_ns, "cpu": int(cpu), "table": table, "lost": count})
        return rows


def first_meta(
    plan: Plan, started_ns: int, notes: tuple[str, ...] = (), places: Places | None = None
) -> Meta:
    """meta.json as it is when the recording begins."""
    options, offsets = plan.options, host.clock_offsets()
    scope: Literal["pids", "cgroup", "host"] = "pids"
    if options.everything or options.cgroup is not None:
        scope = "host" if options.everything else "cgroup"
    return Meta(
        scope_ebpf_version=__version__,
        complete=False,
        host=Host(
            name=host.name(),
            kernel=host.kernel(),
            machine=host.machine(),
            boot_id=host.boot_id(),
            cpus=host.cpus(),
        ),
        clock=Clock(realtime_offset_ns=offsets.realtime_ns, boottime_offset_ns=offsets.boottime_ns),
        started_ns=started_ns,
        ended_ns=None,
        command=list(plan.command),
        transport=options.transport,
        families=list(options.families),
        probes=[place.description for place in places.places if place.description]
        if places
        else [],
        payload_bytes=options.payload_bytes,
        sample_hz=options.sample_hz,
        long_wait_ns=options.long_wait_ns,
        redacted=not plan.unredacted,
        scope=scope,
        cgroup=None if options.cgroup is None else str(options.cgroup),
        targets=[
            Target(tgid=target.tgid, comm=target.comm, cmdline=list(target.arguments))
            for target in plan.targets
        ],
        tables={},
        lost_tasks=0,
        recorder=RecorderUse(tgid=os.getpid(), cpu_seconds=0.0, cpu_percent=0.0, peak_rss_bytes=0),
        notes=list(notes),
    )
