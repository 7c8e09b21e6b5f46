"""Where the recorder's batches go: turned into tables, counted, and written as segments."""

import errno
import os
import time
from collections import Counter
from typing import Any, Literal

import numpy as np
import polars as pl

from scope_ebpf import records
from scope_ebpf.errors import RecordingError
from scope_ebpf.loaders import host
from scope_ebpf.loaders.bcc_fields import OwnTable
from scope_ebpf.loaders.cgroups import CgroupPaths
from scope_ebpf.loaders.hits import Places
from scope_ebpf.loaders.symbols import Symbols
from scope_ebpf.recorder import Drained, Marked, Plan, Use
from scope_ebpf.recording import meta
from scope_ebpf.recording.meta import Clock, Host, Meta, RecorderUse, Target
from scope_ebpf.recording.own_tables import own_frame
from scope_ebpf.recording.python_tables import Descriptions
from scope_ebpf.recording.redaction import Redactor
from scope_ebpf.recording.rotation import earlier_recordings, remove
from scope_ebpf.recording.state import Connections, States
from scope_ebpf.recording.tables import (
    Payloads,
    hot_frames,
    new_cgroups,
    process_row,
    rows_frame,
    wide_frames,
)
from scope_ebpf.recording.writer import RecordingWriter
from scope_ebpf.version import __version__

META_SECONDS = 5.0
# A quota is kept by dropping so much of it at once.
CHUNKS = 16
# Of the quota, for meta.json and the room that is kept for it.
OTHER_BYTES = 1 << 18
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
PROCESS_EXIT = int(records.ProcessEvent.PROCESS_EXIT)
BEGINNINGS = (int(records.ProcessEvent.PROCESS_FORK), int(records.ProcessEvent.PROCESS_EXEC))
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
        own_tables: tuple[OwnTable, ...] = (),
    ) -> None:
        """Write the recording's beginning; `notes` are sentences about what is not recorded.

        `places` are those of the user's own probes, `own_tables` the tables of the user's programs.

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
        self._own_tables = own_tables
        self._cgroups = CgroupPaths()
        self._lost: Counter[str] = Counter()
        self._connections = Connections()
        self._states = States()
        self._keep = (plan.keep_bytes, plan.keep_seconds)
        self._earlier = earlier_recordings(plan.path.parent, plan.path) if plan.shares_quota else []
        self._newest_bytes = 0
        self._failed: RecordingError | None = None
        self._writer = RecordingWriter(
            plan.path, first_meta(plan, started_ns, notes, places, own_tables)
        )
        self._writer.make_room = self._make_room
        self._next_meta = time.monotonic() + META_SECONDS

    def rows(self) -> dict[str, int]:
        """Rows written so far, by table."""
        return dict(self._writer.rows)

    def bytes_on_disk(self) -> int:
        """Bytes of segments written so far."""
        return self._writer.bytes_on_disk

    def wants_telling(self) -> bool:
        """Whether the next batch should tell again what is needed to read it; any thread may ask."""
        chunk = self._writer.chunks[-1]
        most_bytes, most_seconds = self._keep
        full = most_bytes is not None and chunk.disk_bytes * CHUNKS >= most_bytes
        age = (time.monotonic() - chunk.began_at) * CHUNKS
        return full or (most_seconds is not None and age >= most_seconds)

    def save(self, batch: Drained) -> None:
        """Write a batch's rows; after a failure they are only counted, as lost.

        Raises:
            RecordingError: writing failed, now for the first time.
        """
        failed_before = self._failed is not None
        before = self._writer.disk_bytes
        for note in batch.notes:
            self._writer.note(note)
        if batch.told_again:
            self._writer.begin_chunk(batch.since_ns)
        for identity, path in new_cgroups(batch.wide):
            self._cgroups.learn(identity, path)
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
        ended = self._forget_programs(frames.get("processes"))
        if batch.hot:
            frames |= hot_frames(batch.hot, self._payloads, self._symbols.name)
        for tgid in ended:
            self._symbols.forget(tgid)
        if batch.interpreters:
            frames["interpreters"] = rows_frame("interpreters", batch.interpreters)
        if self._keep != (None, None):
            self._states.follow(frames, batch)
        for number, own in enumerate(self._own_tables):
            if runs := [(times, rows) for which, times, rows in batch.own if which == number]:
                frames[own.name] = own_frame(own, runs)
        if losses := self._loss_rows(batch):
            frames["losses"] = rows_frame("losses", losses)
        self._redactor.redact_all(frames)
        for table, rows in frames.items():
            self._save(table, rows)
        self._connections.follow(frames)
        self._newest_bytes = max(self._writer.disk_bytes - before, self._newest_bytes // 2)
        self._keep_quota()
        if (batch.notes or time.monotonic() >= self._next_meta) and self._failed is None:
            self._remove_old()
            self._writer.write_meta(self._lost_now(), self._recorder_use())
            self._next_meta = time.monotonic() + META_SECONDS
        if self._failed is not None and not failed_before:
            raise self._failed

    def finish(self, failure: BaseException | None = None) -> None:
        """Write the recording's end; `failure` is why it ended too early, if it did.

        Raises:
            RecordingError: it could not be written.
        """
        notes: tuple[str, ...] = ()
        self._remove_old(every=True)
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
        while self._failed is None:
            try:
                self._writer.write(table, rows)
                return
            except RecordingError as error:
                full = isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_SPACE
                if not full or not self._drop_oldest():
                    self._failed = error
        self._lost[table] += len(rows)

    def _remove_old(self, *, every: bool = False) -> None:
        """Remove what stayed for readers only: what they had time for, or `every` file."""
        self._writer.remove_parts(every=every)
        try:
            self._writer.remove_dropped(only_due=not every)
        except RecordingError as error:
            self._failed = error

    def _keep_quota(self) -> None:
        """Drop the oldest chunks that the quota has no room for, with room for another batch."""
        self._make_room(self._newest_bytes)
        _, most_seconds = self._keep
        chunks = self._writer.chunks
        while self._failed is None:
            age = 0.0
            if self._earlier:
                age = (time.time_ns() - self._earlier[0].ended_realtime_ns) / 1e9
            elif len(chunks) > 1:
                age = time.monotonic() - chunks[1].began_at
            too_old = most_seconds is not None and age > most_seconds
            if not too_old or not self._drop_oldest():
                break

    def _make_room(self, more_bytes: int) -> None:
        """Drop the oldest chunks until the quota has room for so many bytes, or nothing is left to drop."""
        most_bytes, _ = self._keep
        while most_bytes is not None and self._failed is None:
            used = self._writer.disk_bytes + more_bytes + OTHER_BYTES
            used += sum(earlier.disk_bytes for earlier in self._earlier)
            if used <= most_bytes or not self._drop_oldest():
                break

    def _drop_oldest(self) -> bool:
        """Drop an earlier recording, or a chunk if there is a quota and it is not the newest one.

        Returns whether something was dropped, or removed that had been dropped before.
        """
        if not self._earlier and self._keep == (None, None):
            return False
        try:
            if self._earlier:
                remove(self._earlier[0])
                gone = self._earlier.pop(0)
                self._writer.note(f"{gone.path.name} was removed, as the quota has it")
                return True
            if len(self._writer.chunks) < 2:
                return self._writer.remove_dropped()
            self._writer.drop_chunk(self._lost_now(), self._recorder_use())
        except RecordingError as error:
            self._failed = error
            return False
        return True

    def _forget_programs(self, processes: pl.DataFrame | None) -> list[int]:
        """Forget where in memory programs were that were replaced; returns the processes that ended."""
        if processes is None:
            return []
        events = processes.select("tgid", "event")
        begun = events.filter(pl.col("event").is_in(BEGINNINGS))["tgid"]
        for tgid in begun.unique().to_list():
            self._symbols.forget(tgid)
        return events.filter(pl.col("event") == PROCESS_EXIT)["tgid"].to_list()

    def _lost_now(self) -> dict[str, int]:
        """Lost events by table; a connection that messages name but nobody described is lost."""
        lost = self._lost.copy()
        lost["connections"] += self._connections.lost()
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
                record["event"] = run.event
                # a thread that is not the first one has none
                arguments = run.command_lines.get(int(task["tid"]), b"")
                rows.append(process_row(record, self._cgroups.path, arguments))
        return rows

    def _loss_rows(self, batch: Drained) -> list[dict[str, Any]]:
        """Rows of losses for a batch, and the counts by table."""
        if batch.lost is None:
            return []
        found = [
            (int(cpu), LOSS_TABLES[records.LossKind(kind)], int(batch.lost[cpu, kind]))
            for cpu, kind in zip(*np.nonzero(batch.lost), strict=True)
        ]
        if batch.own_lost is not None:
            found += [
                (int(cpu), self._own_tables[number].name, int(batch.own_lost[number, cpu]))
                for number, cpu in zip(*np.nonzero(batch.own_lost), strict=True)
            ]
        for _, table, count in found:
            self._lost[table] += count
        return [
            {"time_ns": batch.since_ns, "cpu": cpu, "table": table, "lost": count}
            for cpu, table, count in found
        ]


def first_meta(
    plan: Plan,
    started_ns: int,
    notes: tuple[str, ...] = (),
    places: Places | None = None,
    own_tables: tuple[OwnTable, ...] = (),
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
        keep_bytes=plan.keep_bytes,
        shares_quota=plan.shares_quota,
        keep_ns=None if plan.keep_seconds is None else round(plan.keep_seconds * 1e9),
        lost_tasks=0,
        recorder=RecorderUse(tgid=os.getpid(), cpu_seconds=0.0, cpu_percent=0.0, peak_rss_bytes=0),
        notes=list(notes),
        loader=options.loader,
        own_tables=[
            meta.OwnTable(
                name=table.name,
                source=table.source,
                output=table.output,
                columns=[list(column) for column in table.columns],
            )
            for table in own_tables
        ],
    )
