"""Makes small recordings of known content."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from scope_ebpf.recording.meta import (
    Clock,
    Host,
    Meta,
    RecorderUse,
    TableCount,
    Target,
    write_meta,
)
from scope_ebpf.recording.schema import SCHEMAS, segment_name

STARTED_NS = 1_000_000_000_000
ENDED_NS = STARTED_NS + 5_000_000_000

META = Meta(
    scope_ebpf_version="0.1.0",
    complete=True,
    host=Host(name="web1", kernel="6.1.0", machine="x86_64", boot_id="b0", cpus=2),
    clock=Clock(realtime_offset_ns=1_700_000_000_000_000_000, boottime_offset_ns=7_000),
    started_ns=STARTED_NS,
    ended_ns=ENDED_NS,
    command=["scope-ebpf", "attach", "--pid", "100"],
    families=["syscalls", "messages"],
    probes=[],
    payload_bytes=128,
    sample_hz=99,
    long_wait_ns=1_000_000,
    redacted=False,
    scope="pids",
    cgroup=None,
    targets=[Target(tgid=100, comm="gunicorn", cmdline=["gunicorn", "shop app:app"])],
    tables={},
    lost_tasks=0,
    recorder=RecorderUse(tgid=77, cpu_seconds=0.15, cpu_percent=3.5, peak_rss_bytes=90_000_000),
    notes=[],
)


def at(offset_ns: int) -> int:
    """A moment of the recording, as the tables hold it."""
    return STARTED_NS + offset_ns


# What a row does not mention is 0, or null where that is allowed.
ROWS: dict[str, list[dict[str, Any]]] = {
    "processes": [
        {"time_ns": at(0), "event": 0, "tgid": 100, "tid": 100, "comm": "gunicorn"},
        {"time_ns": at(10), "event": 2, "tgid": 100, "tid": 101, "comm": "worker"},
        {"time_ns": at(20), "event": 1, "tgid": 200, "tid": 200, "comm": "sh"},
        {"time_ns": at(30), "event": 3, "tgid": 200, "tid": 200, "comm": "curl"},
        {"time_ns": at(40), "event": 4, "tgid": 200, "tid": 200, "signal": 9},
    ],
    "syscalls": [
        {"start_ns": at(1), "duration_ns": 500, "tgid": 100, "tid": 100, "number": 0, "result": 12},
        {"start_ns": at(2), "duration_ns": 900, "tgid": 100, "tid": 101, "number": 257,
         "result": -2},
        {"start_ns": at(3), "duration_ns": 90, "tgid": 200, "tid": 200, "number": 3 | 0x8000},
        {"start_ns": at(4), "duration_ns": 7, "tgid": 200, "tid": 200, "number": 9999, "status": 2},
        {"start_ns": at(5), "duration_ns": 1, "tgid": 200, "tid": 200, "number": 9,
         "result": -4096},
    ],
    "messages": [
        {"start_ns": at(1), "tgid": 100, "tid": 100, "number": 1, "connection": 1,
         "payload": b"a\xff\n"},
        {"start_ns": at(2), "tgid": 200, "tid": 200, "receive": True, "connection": 1},
        {"start_ns": at(3), "tgid": 200, "tid": 200, "connection": 99, "length_bytes": 5},
    ],
    "connections": [
        {
            "connection": 1,
            "kind": "tcp",
            "local_address": "127.0.0.1",
            "local_port": 80,
            "send_stream": 11,
            "receive_stream": 22,
        },
        {"connection": 2, "kind": "unix", "remote_path": "@bus", "send_stream": 33},
    ],
    "connects": [
        {"start_ns": at(1), "tgid": 100, "tid": 101, "kind": "tcp", "remote_address": "127.0.0.1",
         "remote_port": 5432, "result": -111},
        {"start_ns": at(2), "tgid": 100, "tid": 101, "kind": "unix", "remote_path": "@bus"},
    ],
    "tls": [
        {"start_ns": at(1), "tgid": 100, "tid": 100, "ssl": 2**47, "receive": True, "turn": True,
         "length_bytes": 3, "payload": b"GET"},
        {"start_ns": at(2), "tgid": 100, "tid": 100, "ssl": 2**47, "length_bytes": 5},
    ],
    "offcpu": [
        {"start_ns": at(1), "duration_ns": 100, "runnable_ns": 30, "tgid": 100, "state": 1},
        {"start_ns": at(2), "duration_ns": 50, "runnable_ns": 50, "tgid": 200, "state": 0},
        {"start_ns": at(3), "duration_ns": 10, "tgid": 999, "state": 0x402, "number": 0},
    ],
    "interpreters": [
        {"time_ns": at(1), "tgid": 100, "version": "3.11.2", "path": "/usr/bin/python3.11",
         "stacks": True, "contexts": True, "reason": "no greenlets are used"},
    ],
    "samples": [
        {"time_ns": at(1), "tgid": 100, "tid": 100, "context": 5, "reason": 1, "stack": 77},
        {"time_ns": at(2), "tgid": 100, "tid": 101, "reason": 250, "duration_ns": 9},
    ],
    "stacks": [
        {"time_ns": at(1), "tgid": 100, "stack": 77, "codes": [2**46, 2**47], "offsets": [4, 180]},
    ],
    "codes": [
        {"time_ns": at(1), "tgid": 100, "code": 2**46, "name": "handle", "file": "app.py",
         "first_line": 7, "lines": b"\x80\x00", "version": 0x30B, "first_instruction": 184},
        {"time_ns": at(1), "tgid": 100, "code": 2**47},
    ],
    "contexts": [
        {"time_ns": at(1), "tgid": 100, "tid": 100, "context": 5, "kind": 1},
        {"time_ns": at(3), "tgid": 100, "tid": 100, "context": 6, "parent": 5, "kind": 250},
    ],
    "flows": [],
    "handoffs": [
        {"time_ns": at(1), "tgid": 100, "tid": 100, "context": 5, "put": True, "item": 2**45},
        {"time_ns": at(2), "tgid": 100, "tid": 101, "item": 2**45},
    ],
    "gil": [
        {"start_ns": at(1), "duration_ns": 50, "tgid": 100, "tid": 100, "holder_tid": 101},
        {"start_ns": at(2), "duration_ns": 50, "tgid": 100, "tid": 101, "status": 2},
    ],
    "hits": [
        {"time_ns": at(1), "tgid": 100, "tid": 100, "context": 5, "probe": "app:pay",
         "arguments": ["7", "'a'"]},
    ],
    "losses": [],
}  # fmt: skip
NULLABLE = {
    "command_line", "cgroup", "exit_code", "signal", "syscall_start_ns", "waker_tgid", "waker_tid",
    "waker_number", "payload", "local_address", "remote_address", "local_port", "remote_port",
    "local_path", "remote_path", "peer_inode", "comm", "stack", "native", "holder_tid", "name",
    "file",
}  # fmt: skip
# Likewise in these tables only.
NULLABLE_IN = {("offcpu", "number"), ("interpreters", "reason"), ("hits", "duration_ns")}


def frame(table: str, rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows of a table as they are stored."""
    zeros = {pl.String: "", pl.Binary: b"", pl.Boolean: False}
    columns = {}
    for name, dtype in SCHEMAS[table].items():
        nullable = name in NULLABLE or (table, name) in NULLABLE_IN
        zero: Any = [] if isinstance(dtype, pl.List) else zeros.get(dtype, 0)  # type: ignore[call-overload]
        default = None if nullable else zero
        columns[name] = pl.Series(name, [row.get(name, default) for row in rows], dtype=dtype)
    return pl.DataFrame(columns)


def write_segment(folder: Path, number: int, rows: pl.DataFrame) -> Path:
    """Write a segment as the recorder does."""
    buffer = io.BytesIO()
    rows.write_parquet(buffer)
    return write_bytes(folder, number, buffer.getvalue())


def write_bytes(folder: Path, number: int, data: bytes) -> Path:
    """Write bytes under the name of a segment that fits them."""
    folder.mkdir(exist_ok=True)
    file = folder / segment_name(number, number, zlib.crc32(data))
    file.write_bytes(data)
    return file


def make_recording(
    path: Path,
    rows: Mapping[str, Sequence[Mapping[str, Any]]] = ROWS,
    *,
    lost: Mapping[str, int] | None = None,
    per_segment: int = 2,
    **changes: Any,
) -> Path:
    """Write a recording with these rows; `changes` are to its meta.json."""
    path.mkdir(parents=True)
    counts = {
        table: TableCount(rows=len(rows.get(table, ())), lost=(lost or {}).get(table, 0))
        for table in [*SCHEMAS, "payloads"]
    }
    for table in SCHEMAS:
        whole = frame(table, rows.get(table, ()))
        for number, start in enumerate(range(0, whole.height, per_segment), start=1):
            write_segment(path / table, number, whole.slice(start, per_segment))
    write_meta(path, replace(META, **{"tables": counts, **changes}))
    return path
