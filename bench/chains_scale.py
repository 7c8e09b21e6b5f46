"""`requests()` and `edges()` of recordings of 0.1, 1 and 10 million events: time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from bytes_per_row import RECORDING, record_shop
from results import Section
from setting import Setting
from summary_time import SEGMENT_ROWS, stored_rows

from scope_ebpf import open_recording
from scope_ebpf.recording.meta import read_meta
from scope_ebpf.recording.schema import SCHEMAS
from scope_ebpf.recording.writer import RecordingWriter

NAME = "chains-scale"
TITLE = "Requests and edges of recordings of 0.1, 1 and 10 million events"
SIZES, QUICK_SIZES = (100_000, 1_000_000, 10_000_000), (100_000, 300_000)
REPEATS, QUICK_REPEATS = 3, 1
# Some ten thousand events of the shop are recorded, and repeated.
REQUESTS, QUICK_REQUESTS = 1000, 400
# Asked for, by the number of events: seconds, and peak memory in MB.
LIMITS = {1_000_000: (2, None), 10_000_000: (20, 4000)}

# Columns that tell copies apart. Ports stay: a server keeps its own, and the others come again.
TIMES = ("time_ns", "start_ns", "syscall_start_ns", "start_boottime_ns")
FLOWS = ("tgid", "tid", "parent_tgid", "parent_tid", "waker_tgid", "waker_tid")
STREAMS = ("send_stream", "receive_stream")
INODES = ("inode", "peer_inode")
# Odd, and without a pattern: 2**64 divided by the golden ratio.
SPREAD = 0x9E3779B97F4A7C15
INODE_STEP = 1 << 40

ANALYSIS = """
import json, sys, time
import polars as pl
from scope_ebpf import open_recording

begun = time.monotonic()
recording = open_recording(sys.argv[1])
requests, edges = pl.collect_all([recording.requests(), recording.edges()])
seconds = time.monotonic() - begun
print(json.dumps({"seconds": seconds, "requests": len(requests), "edges": len(edges)}))
"""


@dataclass(frozen=True)
class Analysed:
    """One run of the analysis in a process of its own."""

    requests: int
    edges: int
    seconds: float  # from opening the recording to both tables
    process_seconds: float  # with the start of Python
    cpu_seconds: float
    peak_rss_bytes: int


def measure(setting: Setting) -> Section:
    """The shop's recording, over and over, as if ever more of the same requests had come."""
    section = Section(NAME, TITLE)
    kept = setting.directory / RECORDING
    record_shop(setting, QUICK_REQUESTS if setting.quick else REQUESTS, seed=1)
    for wanted in QUICK_SIZES if setting.quick else SIZES:
        setting.say(f"{NAME}: {wanted:,} events")
        path = setting.path(f"{wanted}.scope")
        events = tile(kept, path, wanted)
        runs = [analyse(path) for _ in range(QUICK_REPEATS if setting.quick else REPEATS)]
        shutil.rmtree(path)
        what = f"{events:,} events"
        note = f"{runs[0].requests:,} requests, {runs[0].edges:,} edges"
        seconds = section.add(what, "s", [run.seconds for run in runs], note)
        section.add(f"{what}: with the start of Python", "s", [run.process_seconds for run in runs])
        section.add(f"{what}: CPU", "s", [run.cpu_seconds for run in runs])
        memory = section.add(
            f"{what}: peak memory", "MB", [run.peak_rss_bytes / 1e6 for run in runs]
        )
        if wanted in LIMITS:
            most_seconds, most_memory = LIMITS[wanted]
            million = f"{wanted // 1_000_000} million events"
            section.ask(
                f"requests and edges of {million}: at most {most_seconds} s",
                most_seconds, "s", seconds, note,
            )  # fmt: skip
            if most_memory:
                section.ask(
                    f"their peak memory: at most {most_memory} MB", most_memory, "MB", memory
                )
    return section


def tile(source: Path, path: Path, wanted: int) -> int:
    """A recording of so many rows in all tables together, made of another's; returns its rows.

    Each copy is later than the one before, and has processes, connections and streams of its own,
    as if the same had happened once more. Copies are whole, so the number is met roughly.
    """
    recording = open_recording(source)
    tables = {table: stored_rows(recording, table) for table in SCHEMAS if table != "losses"}
    have = sum(rows.height for rows in tables.values())
    copies = max(1, round(wanted / have))
    flow_step, connection_step = (
        step_between_copies(tables, names, copies) for names in (FLOWS, ("connection",))
    )
    assert recording.meta.ended_ns is not None
    span_ns = recording.meta.ended_ns - recording.meta.started_ns
    path.mkdir()
    writer = RecordingWriter(path, read_meta(source))
    for table, rows in tables.items():
        if rows.is_empty():
            continue
        at_once = max(1, SEGMENT_ROWS // rows.height)
        for first in range(0, copies, at_once):
            numbers = range(first, min(first + at_once, copies))
            writer.write(
                table,
                pl.concat(
                    copy(rows, number, span_ns, flow_step, connection_step) for number in numbers
                ),
            )
    writer.write_meta(
        {}, recording.meta.recorder,
        ended_ns=recording.meta.ended_ns + (copies - 1) * span_ns, complete=True,
    )  # fmt: skip
    return sum(writer.rows.values())


def copy(
    rows: pl.DataFrame, number: int, span_ns: int, flow_step: int, connection_step: int
) -> pl.DataFrame:
    """Rows of a table as they are in a copy."""

    def present(names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name in rows.columns]

    flows = pl.col(present(FLOWS))
    inodes = pl.col(present(INODES))
    spread = pl.lit(number * SPREAD % 2**64, pl.UInt64)
    return rows.with_columns(
        pl.col(present(TIMES)) + number * span_ns,
        # 0 is nobody, and stays so
        pl.when(flows > 0).then(flows + number * flow_step).otherwise(flows),
        pl.when(inodes > 0).then(inodes + number * INODE_STEP).otherwise(inodes),
        pl.col(present(("connection",))) + number * connection_step,
        pl.col(present(STREAMS)) ^ spread,
    )


def step_between_copies(
    tables: dict[str, pl.DataFrame], names: tuple[str, ...], copies: int
) -> int:
    """How far the 32-bit numbers in columns of these names move from one copy to the next.

    Raises:
        RuntimeError: there is no room for so many copies.
    """
    columns = [rows[name] for rows in tables.values() for name in names if name in rows.columns]
    numbers = pl.concat([column.drop_nulls().unique().cast(pl.Int64) for column in columns])
    taken = numbers.filter(numbers > 0)
    lowest, highest = int(taken.min()), int(taken.max())  # type: ignore[arg-type]
    step = highest - lowest + 1
    if highest + copies * step >= 2**32:
        raise RuntimeError(f"{copies} copies of the recording have too many numbers: record more")
    return step


def analyse(recording: Path) -> Analysed:
    """Make requests and edges in a fresh process.

    Raises:
        RuntimeError: it failed.
    """
    begun = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", ANALYSIS, recording], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        told = process.stdout.read()
        errors = process.stderr.read().decode().strip()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"requests and edges failed: {errors[-500:]}")
    return Analysed(
        **json.loads(told),
        process_seconds=seconds,
        cpu_seconds=used.ru_utime + used.ru_stime,
        peak_rss_bytes=used.ru_maxrss * 1024,
    )
