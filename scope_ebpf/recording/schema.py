"""What a recording is on disk: the tables, their columns and units, and meta.json.

A recording is a directory NAME.scope with `meta.json` and one folder per table, which holds Parquet
segments `000001-9f3a12bc.parquet`, `000002-04c1d77e.parquet`, …: a number that counts up from 1
without a gap, and the CRC-32 of the file's bytes, since Parquet readers do not notice most flipped
bits. Each segment is written aside as `.NAME.part` and renamed when it is complete, so that
whatever has its final name is whole, and says so. Segments follow each other in time; rows within a
segment are sorted by their first column. All times are CLOCK_MONOTONIC nanoseconds of the recorded
host (meta.json tells how to turn them into wall clock time).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

FORMAT_VERSION = 2

FLOW = {"tgid": pl.UInt32, "tid": pl.UInt32}

# Columns as they are stored. Numbers that have names (system calls, events, states) are stored as
# numbers, since that costs next to nothing; reading adds the names (see reader.py).
SCHEMAS: dict[str, pl.Schema] = {
    # One row per event in a process's or thread's life.
    "processes": pl.Schema(
        {
            "time_ns": pl.Int64,
            "event": pl.UInt8,  # records.ProcessEvent
            **FLOW,
            "parent_tgid": pl.UInt32,
            "parent_tid": pl.UInt32,  # fork, thread: the thread that made it; exec: the tid before
            "comm": pl.String,
            "command_line": pl.String,  # shell-quoted; null where it is not known
            "command_line_bytes": pl.UInt32,  # of the whole one; more than is kept: it was cut
            "cgroup": pl.String,  # path in the unified hierarchy; null if it could not be found
            "cgroup_id": pl.UInt64,
            "exit_code": pl.Int32,  # exit only, and null if a signal ended it
            "signal": pl.Int32,  # exit only, and null if it ended by itself
            "start_boottime_ns": pl.Int64,  # CLOCK_BOOTTIME; with tgid it names a process for good
        }
    ),
    # One row per completed system call, and per call that was open when the recording ended.
    "syscalls": pl.Schema(
        {
            "start_ns": pl.Int64,
            "duration_ns": pl.Int64,
            **FLOW,
            "number": pl.UInt16,  # with records.RecordLimits.COMPAT_SYSCALL for 32-bit calls
            "result": pl.Int64,  # -errno on errors, as the kernel returns it
            "arg0": pl.UInt64,
            "arg1": pl.UInt64,
            "arg2": pl.UInt64,
            "status": pl.UInt8,  # records.CallStatus
            "cpu": pl.UInt16,  # where it ended
        }
    ),
    # One row per read or write on a socket or pipe.
    "messages": pl.Schema(
        {
            "start_ns": pl.Int64,
            "duration_ns": pl.Int64,
            **FLOW,
            "number": pl.UInt16,
            "fd": pl.UInt32,
            "receive": pl.Boolean,  # else: send
            "peek": pl.Boolean,  # a receive that left the bytes where they are
            "turn": pl.Boolean,  # the first message of a turn of its connection
            "exact": pl.Boolean,  # stream_end is comparable with the other end's
            "length_bytes": pl.UInt32,
            "stream_end": pl.UInt64,  # the bytes are [stream_end - length_bytes, stream_end)
            "connection": pl.UInt32,
            "payload": pl.Binary,  # the head of the bytes, at a turn's start; else null
            "status": pl.UInt8,
            "cpu": pl.UInt16,
        }
    ),
    # One row per end of a connection, at its first message. A pipe has one row for both ends.
    "connections": pl.Schema(
        {
            "time_ns": pl.Int64,
            "connection": pl.UInt32,  # unique within the recording
            "kind": pl.String,  # tcp, udp, unix, pipe, or the address family's name
            "tgid": pl.UInt32,  # who was seen to use it first
            "local_address": pl.String,  # null for what has no address
            "local_port": pl.UInt16,
            "remote_address": pl.String,
            "remote_port": pl.UInt16,
            "local_path": pl.String,  # Unix; an abstract one begins with @
            "remote_path": pl.String,
            "inode": pl.UInt64,
            "peer_inode": pl.UInt64,  # Unix; null while the other end is not accepted
            "netns": pl.UInt32,  # inode of the network namespace
            "send_stream": pl.UInt64,  # names the bytes of one direction, the same at both ends
            "receive_stream": pl.UInt64,
        }
    ),
    # One row per call of connect() on an internet or Unix socket, whatever came of it.
    "connects": pl.Schema(
        {
            "start_ns": pl.Int64,
            "duration_ns": pl.Int64,
            **FLOW,
            "fd": pl.UInt32,
            "kind": pl.String,  # as in connections
            "remote_address": pl.String,  # as the program passed it; null: it was of no such kind
            "remote_port": pl.UInt16,
            "remote_path": pl.String,
            "inode": pl.UInt64,  # of the socket: as in connections
            "result": pl.Int32,  # 0 or -errno
            "status": pl.UInt8,
            "cpu": pl.UInt16,
        }
    ),
    # One row per call that moved plain text through OpenSSL.
    "tls": pl.Schema(
        {
            "start_ns": pl.Int64,
            "duration_ns": pl.Int64,
            **FLOW,
            "ssl": pl.UInt64,  # address of the SSL object in the process: one connection at a time
            "receive": pl.Boolean,  # else: send
            "turn": pl.Boolean,  # the first of a turn of its SSL object
            "length_bytes": pl.UInt32,  # of plain text
            "payload": pl.Binary,  # the head of the plain text, at a turn's start; else null
            "cpu": pl.UInt16,
        }
    ),
    # One row per interval that a thread was off the CPU.
    "offcpu": pl.Schema(
        {
            "start_ns": pl.Int64,
            "duration_ns": pl.Int64,  # waiting and runnable
            "runnable_ns": pl.Int64,  # of that: ready to run; null: the wakeup was not seen
            **FLOW,
            "state": pl.UInt32,  # the kernel's task state bits; 0: preempted, ready to run
            "number": pl.UInt16,  # the call that it was in; null: none
            "syscall_start_ns": pl.Int64,  # start_ns of that call in syscalls; null: none
            "waker_tgid": pl.UInt32,  # who ran where the wakeup came from; null: not woken
            "waker_tid": pl.UInt32,
            "waker_number": pl.UInt16,  # the call that the waker was in; null: none, or not traced
            "status": pl.UInt8,
            "cpu": pl.UInt16,  # where it came back
        }
    ),
    # One row per CPU, table and second in which events were lost. No row: nothing was.
    "losses": pl.Schema(
        {
            "time_ns": pl.Int64,  # begin of the second
            "cpu": pl.UInt16,
            "table": pl.String,  # a table, `payloads` (heads) or `tasks` (threads not taken up)
            "lost": pl.UInt64,
        }
    ),
}

_SEGMENT_NAME = re.compile(r"([0-9]{6,9})-([0-9a-f]{8})\.parquet")


def segment_name(number: int, crc32: int) -> str:
    """The file name of a segment: its number, counted from 1, and zlib.crc32 of all its bytes.

    >>> segment_name(1, 0x9F3A12BC)
    '000001-9f3a12bc.parquet'
    """
    return f"{number:06d}-{crc32:08x}.parquet"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """Number and CRC-32 of a segment by its file name; None if it is not a segment's name.

    >>> parse_segment_name("000001-9f3a12bc.parquet")
    (1, 2671383228)
    >>> parse_segment_name("000001.parquet") is None
    True
    """
    match = _SEGMENT_NAME.fullmatch(name)
    if match is None:
        return None
    number, crc32 = int(match[1]), int(match[2], 16)
    # One number has one spelling: 0000001 would be a second segment 1.
    return (number, crc32) if number and segment_name(number, crc32) == name else None


def frame(table: str, columns: Mapping[str, Any]) -> pl.DataFrame:
    """A DataFrame with the table's schema, from one array or series per column."""
    return pl.DataFrame(
        [column(name, columns[name], dtype) for name, dtype in SCHEMAS[table].items()]
    )


def column(name: str, values: Any, dtype: pl.DataType) -> pl.Series:
    """One column of a table. 64-bit times come unsigned and are taken as signed as they are."""
    if not isinstance(values, np.ndarray):
        return pl.Series(name, values, dtype=dtype, strict=False)
    values = np.ascontiguousarray(values)
    if dtype == pl.Int64 and values.dtype == np.uint64:
        values = values.view(np.int64)
    series = pl.Series(name, values)
    return series if series.dtype == dtype else series.cast(dtype)
