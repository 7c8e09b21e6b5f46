"""`scope-ebpf summary` of a recording of ten million rows: its time and memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import polars as pl
from bytes_per_row import RECORDING, record_shop
from results import Section
from setting import SCOPE_EBPF, Setting

from scope_ebpf import open_recording
from scope_ebpf.recording.meta import read_meta
from scope_ebpf.recording.reader import Recording
from scope_ebpf.recording.schema import SCHEMAS
from scope_ebpf.recording.segments import list_segments
from scope_ebpf.recording.writer import RecordingWriter

NAME = "summary-time"
TITLE = "`scope-ebpf summary` of a recording of ten million rows"
ROWS, QUICK_ROWS = 10_000_000, 1_000_000
SEGMENT_ROWS = 250_000
REPEATS, QUICK_REPEATS = 5, 2
REQUESTS, QUICK_REQUESTS = 3000, 500


def measure(setting: Setting) -> Section:
    """Warm, as after a recording; once more with what is on disk not in memory."""
    section = Section(NAME, TITLE)
    kept = setting.directory / RECORDING
    if not kept.exists():
        record_shop(setting, QUICK_REQUESTS if setting.quick else REQUESTS, seed=1)
    setting.say(f"{NAME}: making the recording")
    large = setting.path("large.scope")
    wanted = QUICK_ROWS if setting.quick else ROWS
    rows = enlarge(kept, large, wanted)
    size = sum(file.stat().st_size for file in large.rglob("*.parquet"))
    section.notes.append(
        f"{rows:,} rows, {size / 1e6:.0f} MB: a recording of the shop over and over, in segments of"
        f" {SEGMENT_ROWS:,} rows"
    )
    setting.say(f"{NAME}: reading it")
    cold, _ = run_summary(large, cold=True)
    runs = [run_summary(large) for _ in range(QUICK_REPEATS if setting.quick else REPEATS)]
    seconds = section.add("summary", "s", [run[0] for run in runs])
    memory = section.add("summary: peak memory", "MB", [run[1] / 1e6 for run in runs])
    section.add("summary, nothing of the recording in memory", "s", [cold])
    note = f"of {rows:,} rows" if setting.quick else ""
    section.ask("summary of ten million rows: at most 2 s", 2, "s", seconds, note)
    section.ask("its peak memory: at most 500 MB", 500, "MB", memory, note)
    shutil.rmtree(large)
    return section


def enlarge(source: Path, path: Path, wanted: int) -> int:
    """A recording with all tables of another, over and over, each time later; returns its rows."""
    recording = open_recording(source)
    path.mkdir()
    writer = RecordingWriter(path, read_meta(source))
    have = sum(recording.rows(name) for name in SCHEMAS)
    span_ns = (recording.meta.ended_ns or 0) - recording.meta.started_ns
    for table in SCHEMAS:
        stored = stored_rows(recording, table)
        count = stored.height * wanted // have
        if not stored.height:
            continue
        segment, taken, at = [], 0, 0
        times = [name for name in ("start_ns", "syscall_start_ns", "time_ns") if name in stored]
        while count > 0:
            part = stored.head(min(count, SEGMENT_ROWS - taken))
            segment.append(part.with_columns(pl.col(times) + at * span_ns))
            count, taken, at = count - part.height, taken + part.height, at + 1
            if taken == SEGMENT_ROWS or not count:
                writer.write(table, pl.concat(segment))
                segment, taken = [], 0
    assert recording.meta.ended_ns is not None
    writer.write_meta({}, recording.meta.recorder, ended_ns=recording.meta.ended_ns, complete=True)
    return sum(writer.rows.values())


def stored_rows(recording: Recording, name: str) -> pl.DataFrame:
    """A table as it is on disk, without what reading adds."""
    files = [segment.file for segment in list_segments(recording.path / name)]
    if not files:
        return pl.DataFrame(schema=SCHEMAS[name])
    return pl.read_parquet(files, glob=False)


def run_summary(recording: Path, *, cold: bool = False) -> tuple[float, int]:
    """Wall clock seconds and peak memory in bytes of one run.

    Raises:
        RuntimeError: it failed.
    """
    if cold:
        forget(recording)
    begun = time.monotonic()
    with subprocess.Popen(
        [SCOPE_EBPF, "summary", recording, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        told = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"summary failed: {process.stderr.read().decode().strip()[-500:]}")
    assert json.loads(told)["lost_total"] == 0
    return seconds, used.ru_maxrss * 1024


def forget(recording: Path) -> None:
    """Have the kernel drop the files from its page cache, once they are on disk."""
    for file in recording.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
