"""What a recording contains, in numbers, without reading more columns of it than needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import polars as pl

from scope_ebpf.analysis.numbers import LifeOf
from scope_ebpf.analysis.services import service_lives
from scope_ebpf.recording.directory import META_FILE
from scope_ebpf.recording.reader import Recording
from scope_ebpf.syscalls import errno_name

# Durations are counted in buckets of this many per power of two, so that quantiles of any number of
# calls fit into memory. A bucket's middle is at most 2.2 % away from what is in it.
_BUCKETS_PER_OCTAVE: Final = 16


@dataclass(frozen=True, kw_only=True)
class TableSummary:
    """One table: rows on disk, events that were lost, and what the rows take."""

    rows: int
    lost: int
    bytes_on_disk: int
    bytes_per_row: float | None  # None: there are no rows
    dropped: int  # rows that the quota removed


@dataclass(frozen=True, kw_only=True)
class SyscallSummary:
    """All calls of one system call."""

    name: str
    count: int
    total_ns: int
    p50_ns: int  # both to 2.2 %
    p99_ns: int
    errors: int
    most_frequent_error: str | None


@dataclass(frozen=True, kw_only=True)
class OffCpuSummary:
    """Off-CPU time of all threads of the processes with one name."""

    comm: str | None  # None: the row that would name the process was lost
    intervals: int
    waiting_ns: int
    runnable_ns: int  # ready to run, waiting for a CPU


@dataclass(frozen=True, kw_only=True)
class ServiceSummary:
    """All processes of one service that run in the same unit or container."""

    service: str | None  # None: the rows that would name the processes were lost
    place: (
        str | None
    )  # such as `nginx.service` or `docker 4f1c2d3e5a6b`; None: in none, or not known
    processes: int
    calls: int
    errors: int
    calls_ns: int
    waiting_ns: int
    runnable_ns: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """See `summarize`."""

    path: str
    complete: bool
    started_realtime_ns: int
    duration_ns: int
    host: dict[str, Any]
    targets: list[dict[str, Any]]
    processes: int
    threads: int
    tables: dict[str, TableSummary]
    lost_total: int
    lost_payloads: int
    lost_tasks: int
    bytes_on_disk: int
    syscalls: list[SyscallSummary]
    offcpu: list[OffCpuSummary]
    services: list[ServiceSummary]
    payload_bytes: int  # of each head at most; 0: none was kept
    transport: str  # how records came out of the kernel: rings or perf
    redacted: bool  # heads were masked before they were written
    recorder: dict[str, Any]
    keep_bytes: int | None
    keep_ns: int | None
    dropped_rows: int
    kept_since_ns: (
        int | None
    )  # nothing of what was before is left, from the recording's start; None: all is
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain dicts and lists, ready for JSON."""
        return asdict(self)


def summarize(recording: Recording) -> Summary:
    """Summarise a recording.

    - `started_realtime_ns`: nanoseconds since 1970, UTC
    - `duration_ns`: from its start to its end; if it has none, to the last event on disk
    - `targets`: what was asked for (`tgid`, `comm`, `cmdline`); `processes`, `threads`: how many
      were seen, children included
    - `tables`: rows on disk and losses per table; `lost_total`: all losses, including heads of
      payloads (`lost_payloads`) and threads that were not taken up (`lost_tasks`)
    - `bytes_on_disk`: segments and meta.json
    - `syscalls`: per name, longest total time first; quantiles to 2.2 %
    - `offcpu`: per name of process, longest first
    - `services`: per service and where it runs, those with most calls first
    - `keep_bytes`, `keep_ns`: the quota, if there is one; `dropped_rows`: what it removed, and
      `kept_since_ns`: everything that was before, in nanoseconds since the start
    - `recorder`: what recording took: `cpu_percent` of one CPU, `peak_rss_bytes`
    - `notes`: sentences about what went wrong, first of all if it is not complete

    Raises `FormatError` or `RecordingError` if the recording is damaged.

    >>> from scope_ebpf import open_recording
    >>> summarize(open_recording("shop.scope")).lost_total  # doctest: +SKIP
    0
    """
    recording.check()
    meta = recording.meta
    lost = _losses(recording)
    lost_payloads = max(lost.pop("payloads", 0), _counted(recording, "payloads"))
    lost_tasks = max(lost.pop("tasks", 0), _counted(recording, "tasks"), meta.lost_tasks)
    tables = {name: _table(recording, name, lost.get(name, 0)) for name in recording.tables}
    comms = _comms(recording)
    lives = service_lives(recording.collect(recording.processes))
    # a later process or thread may have the number of one that ended
    told = recording.processes.select("tid", "start_boottime_ns").unique()
    threads = recording.collect(told).height
    return Summary(
        path=str(recording.path),
        complete=meta.complete,
        started_realtime_ns=meta.started_ns + meta.clock.realtime_offset_ns,
        duration_ns=_duration_ns(recording),
        host=asdict(meta.host),
        targets=[asdict(target) for target in meta.targets],
        processes=len(lives),
        threads=threads,
        tables=tables,
        lost_total=sum(table.lost for table in tables.values()) + lost_payloads + lost_tasks,
        lost_payloads=lost_payloads,
        lost_tasks=lost_tasks,
        bytes_on_disk=sum(table.bytes_on_disk for table in tables.values())
        + (recording.path / META_FILE).stat().st_size,
        syscalls=_syscalls(recording),
        offcpu=_offcpu(recording, comms),
        services=_services(recording, lives),
        payload_bytes=meta.payload_bytes,
        transport=meta.transport,
        redacted=meta.redacted,
        keep_bytes=meta.keep_bytes,
        keep_ns=meta.keep_ns,
        dropped_rows=sum(table.dropped for table in tables.values()),
        kept_since_ns=None
        if meta.dropped_until_ns is None
        else max(meta.dropped_until_ns - meta.started_ns, 0),
        recorder=asdict(meta.recorder),
        notes=[*_incomplete(recording), *meta.notes],
    )


def _losses(recording: Recording) -> dict[str, int]:
    frame = recording.collect(recording.losses.group_by("table").agg(pl.col("lost").sum()))
    return dict(frame.iter_rows())


def _counted(recording: Recording, table: str) -> int:
    """Losses by meta.json. It and the table `losses` are written at different moments."""
    count = recording.meta.tables.get(table)
    return count.lost if count else 0


def _table(recording: Recording, name: str, lost: int) -> TableSummary:
    rows, size = recording.rows(name), recording.size_bytes(name)
    return TableSummary(
        rows=rows,
        lost=max(lost, _counted(recording, name)),
        bytes_on_disk=size,
        bytes_per_row=round(size / rows, 1) if rows else None,
        dropped=count.dropped if (count := recording.meta.tables.get(name)) else 0,
    )


def _incomplete(recording: Recording) -> list[str]:
    if recording.meta.complete:
        return []
    if recording.running:
        return ["incomplete: it is still being recorded"]
    if recording.meta.ended_ns is not None:
        return ["incomplete: the recorder had to end before everything was written"]
    missing = {
        name: count.rows - recording.rows(name)
        for name, count in recording.meta.tables.items()
        if name in recording.tables and count.rows > recording.rows(name)
    }
    if missing:
        what = ", ".join(f"{rows} rows of {name}" for name, rows in missing.items())
        return [f"incomplete: the recorder was killed; at its end at least {what} are missing"]
    return ["incomplete: the recorder was killed; at most the last second is missing"]


def _duration_ns(recording: Recording) -> int:
    meta = recording.meta
    if meta.ended_ns is not None:
        return meta.ended_ns - meta.started_ns
    ends = [recording.processes.select(pl.col("time_ns").max())]
    ends += [
        recording.table(name).select((pl.col("start_ns") + pl.col("duration_ns")).max())
        for name in ("syscalls", "messages", "offcpu")
    ]
    last = [recording.collect(end).item() for end in ends]
    return max([int(end) - meta.started_ns for end in last if end is not None] + [0])


def _comms(recording: Recording) -> dict[int, str]:
    """The last name of each process."""
    comms = {target.tgid: target.comm for target in recording.meta.targets}
    named = recording.processes.filter(pl.col("comm").is_not_null()).select("tgid", "tid", "comm")
    # A thread may have a name of its own: it only counts where that of its process is missing.
    last = named.sort(pl.col("tgid") == pl.col("tid"), maintain_order=True)
    frame = recording.collect(last.unique("tgid", keep="last", maintain_order=True))
    comms.update(frame.select("tgid", "comm").iter_rows())
    return comms


def _syscalls(recording: Recording) -> list[SyscallSummary]:
    # One pass over three columns. What it groups by is small: no strings, few values.
    failed = pl.col("result").is_between(-4095, -1)
    bucket = (pl.col("duration_ns").clip(1).log(2) * _BUCKETS_PER_OCTAVE).floor()
    counted = (
        recording.syscalls.group_by(
            "number",
            pl.when(failed).then(pl.col("result")).otherwise(0).cast(pl.Int16).alias("result"),
            bucket.cast(pl.UInt16).alias("bucket"),
        )
        .agg(pl.len().alias("count"), pl.col("duration_ns").sum().alias("total_ns"))
        .with_columns(recording.syscall_name("number").alias("name"))
    )
    groups = recording.collect(counted)
    failures = (
        groups.lazy()
        .filter(pl.col("result") < 0)
        .group_by("name", "result")
        .agg(pl.col("count").sum())
        .sort("count", "result", descending=True)
        .group_by("name", maintain_order=True)
        .agg(pl.col("count").sum().alias("errors"), pl.col("result").first().alias("errno"))
    )
    upto = pl.col("count").cum_sum() / pl.col("count").sum()
    middle = (2 ** ((pl.col("bucket") + 0.5) / _BUCKETS_PER_OCTAVE)).round().cast(pl.Int64)
    by_name = (
        groups.lazy()
        .group_by("name", "bucket")
        .agg(pl.col("count", "total_ns").sum())
        .sort("bucket")
        .group_by("name", maintain_order=True)
        .agg(
            pl.col("count", "total_ns").sum(),
            middle.filter(upto >= 0.5).first().alias("p50_ns"),
            middle.filter(upto >= 0.99).first().alias("p99_ns"),
        )
        .join(failures, on="name", how="left")
        .sort("total_ns", "name", descending=[True, False])
    )
    return [
        SyscallSummary(
            name=row["name"],
            count=row["count"],
            total_ns=row["total_ns"],
            p50_ns=row["p50_ns"],
            p99_ns=row["p99_ns"],
            errors=row["errors"] or 0,
            most_frequent_error=errno_name(row["errno"]) if row["errno"] else None,
        )
        for row in recording.collect(by_name).iter_rows(named=True)
    ]


def _offcpu(recording: Recording, comms: dict[int, str]) -> list[OffCpuSummary]:
    per_process = recording.offcpu.group_by("tgid").agg(
        pl.len().alias("intervals"), pl.col("waiting_ns", "runnable_ns").sum()
    )
    name = pl.col("tgid").replace_strict(
        list(comms), list(comms.values()), default=None, return_dtype=pl.String
    )
    frame = (
        recording.collect(per_process)
        .group_by(name.alias("comm"))
        .agg(pl.col("intervals", "waiting_ns", "runnable_ns").sum())
        .sort(pl.col("waiting_ns") + pl.col("runnable_ns"), "comm", descending=[True, False])
    )
    return [OffCpuSummary(**row) for row in frame.iter_rows(named=True)]


def _services(recording: Recording, lives: pl.DataFrame) -> list[ServiceSummary]:
    life = LifeOf(lives).expression(pl.col("start_ns"))
    failed = pl.col("result").is_between(-4095, -1)
    calls = recording.syscalls.group_by(life).agg(
        calls=pl.len(), errors=failed.sum(), calls_ns=pl.col("duration_ns").sum()
    )
    off = recording.offcpu.group_by(life).agg(pl.col("waiting_ns", "runnable_ns").sum())
    counts = ["calls", "errors", "calls_ns", "waiting_ns", "runnable_ns"]
    found = (
        lives.with_row_index("life")
        .select(pl.col("life").cast(pl.Int64), "service", "place", processes=pl.lit(1))
        .join(recording.collect(calls), on="life", how="full", coalesce=True, nulls_equal=True)
        .join(recording.collect(off), on="life", how="full", coalesce=True, nulls_equal=True)
        .group_by("service", "place")
        .agg(pl.col("processes", *counts).sum())
        .sort("calls", "processes", "service", "place", descending=[True, True, False, False])
    )
    return [ServiceSummary(**row) for row in found.iter_rows(named=True)]
