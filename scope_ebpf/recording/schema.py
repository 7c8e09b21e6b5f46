"""What a recording is on disk: the tables, their columns and units, and meta.json.

A recording is a directory NAME.scope with `meta.json` and one folder per table, which holds Parquet
segments `000001-9f3a12bc.parquet`, `000002-04c1d77e.parquet`, …: a number that counts up from 1
without a gap, and the CRC-32 of the file's bytes, since Parquet readers do not notice most flipped
bits. Each segment is written aside as `.NAME.part` and renamed when it is complete, so that
whatever has its final name is whole, and says so. `000001-000032-5d0e4f81.parquet` has the rows of
segments 1 to 32 in their order, and stands for those of them that are still there. Segments follow
each other in time; rows within a segment are sorted by their first column, but for one that stands
for others. All times are CLOCK_MONOTONIC nanoseconds of the recorded host (meta.json tells how to
turn them into wall clock time).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

FORMAT_VERSION = 3

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
            "fd": pl.UInt32,  # null: through io_uring
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
            "fd": pl.UInt32,  # null: through io_uring
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
    # One row per CPython process that was met and looked into, and a second one when it has loaded
    # greenlets; a fork is like its parent.
    "interpreters": pl.Schema(
        {
            "time_ns": pl.Int64,
            "tgid": pl.UInt32,
            "version": pl.String,  # such as 3.11.2; null: it could not be looked into
            "path": pl.String,  # of the file with the interpreter, as the process sees it; or null
            "stacks": pl.Boolean,  # whether its stacks can be read,
            "contexts": pl.Boolean,  # its logical contexts,
            "greenlets": pl.Boolean,  # whether its greenlets are told apart,
            "gil": pl.Boolean,  # and whether waits for its GIL are
            "reason": pl.String,  # why something of that is missing; null: nothing is
        }
    ),
    # One row per stack that was taken.
    "samples": pl.Schema(
        {
            "time_ns": pl.Int64,  # of a call or interval: its start_ns
            **FLOW,
            "context": pl.UInt64,
            "reason": pl.UInt8,  # records.SampleReason
            "duration_ns": pl.Int64,  # of the call or interval; at a tick of the clock 0
            "stack": pl.UInt64,  # in stacks; null: it could not be read, or it is no Python thread
            "native": pl.String,  # at a tick: the native function that ran; null: not known
            "cpu": pl.UInt16,
        }
    ),
    # One row per different stack of a process; the same one may come more than once.
    "stacks": pl.Schema(
        {
            "time_ns": pl.Int64(),  # when it was first seen
            "tgid": pl.UInt32(),
            "stack": pl.UInt64(),
            "codes": pl.List(pl.UInt64()),  # code in codes; the innermost frame is the first
            "offsets": pl.List(pl.UInt32()),  # of each frame's instruction, see cpython.lines
            "truncated": pl.Boolean(),  # there are more frames further out
        }
    ),
    # One row per code object; a later one may have the same address: the latest before a stack counts.
    "codes": pl.Schema(
        {
            "time_ns": pl.Int64,
            "tgid": pl.UInt32,
            "code": pl.UInt64,  # its address
            "name": pl.String,  # co_qualname; up to 3.10 co_name; null: could not be read
            "file": pl.String,  # null: could not be read
            "first_line": pl.UInt32,
            "lines": pl.Binary,  # co_linetable, or co_lnotab up to 3.9; cut where it is very long
            "version": pl.UInt16,  # of CPython: 0x030b is 3.11
            "first_instruction": pl.UInt16,  # offset of the bytecode in the code object
        }
    ),
    # One row per logical context that was made, or met.
    "contexts": pl.Schema(
        {
            "time_ns": pl.Int64,
            **FLOW,  # who made it
            "context": pl.UInt64,  # unique within the recording, never 0
            "parent": pl.UInt64,  # the one that made it; 0: the thread itself, or not known
            "kind": pl.UInt8,  # records.ContextKind
        }
    ),
    # One row per change of a thread's logical context, as far as its calls show it.
    "flows": pl.Schema(
        {
            "start_ns": pl.Int64,  # of the first call in it
            **FLOW,
            "context": pl.UInt64,  # 0: the thread itself
        }
    ),
    # One row per work item that was put into or taken out of a queue between threads.
    "handoffs": pl.Schema(
        {
            "time_ns": pl.Int64,
            **FLOW,
            "context": pl.UInt64,  # of the thread at that moment
            "put": pl.Boolean,  # else: got
            "item": pl.UInt64,  # address of the object
            "queue": pl.UInt64,  # address of the queue, of what was put
        }
    ),
    # One row per system call that waited for the GIL; it is in syscalls, too.
    "gil": pl.Schema(
        {
            "start_ns": pl.Int64,
            "duration_ns": pl.Int64,
            **FLOW,
            "holder_tid": pl.UInt32,  # who held it when the wait ended; null: not known
            "status": pl.UInt8,
            "cpu": pl.UInt16,
        }
    ),
    # One row per hit of a probe that the user chose; meta.json says what the probes are.
    "hits": pl.Schema(
        {
            "time_ns": pl.Int64(),
            "duration_ns": pl.Int64(),  # of a call that was seen from its begin to its end; else null
            "tgid": pl.UInt32(),
            "tid": pl.UInt32(),
            "context": pl.UInt64(),
            "probe": pl.String(),  # its name
            "arguments": pl.List(pl.String()),  # as text, each as its type asks
            "cpu": pl.UInt16(),
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

_SEGMENT_NAME = re.compile(r"([0-9]{6,9})(?:-([0-9]{6,9}))?-([0-9a-f]{8})\.parquet")


def segment_name(first: int, last: int, crc32: int) -> str:
    """The file name of a segment: its number, counted from 1, and zlib.crc32 of all its bytes.

    One that stands for several, merged ones has the first and the last of their numbers.

    >>> segment_name(1, 1, 0x9F3A12BC)
    '000001-9f3a12bc.parquet'
    >>> segment_name(1, 32, 0x9F3A12BC)
    '000001-000032-9f3a12bc.parquet'
    """
    numbers = f"{first:06d}" if first == last else f"{first:06d}-{last:06d}"
    return f"{numbers}-{crc32:08x}.parquet"


def parse_segment_name(name: str) -> tuple[int, int, int] | None:
    """First and last number and CRC-32 of a segment by its file name; None if it is not a segment's name.

    >>> parse_segment_name("000001-9f3a12bc.parquet")
    (1, 1, 2671383228)
    >>> parse_segment_name("000001-000032-9f3a12bc.parquet")
    (1, 32, 2671383228)
    >>> parse_segment_name("000001.parquet") is None
    True
    """
    match = _SEGMENT_NAME.fullmatch(name)
    if match is None:
        return None
    first, last, crc32 = int(match[1]), int(match[2] or match[1]), int(match[3], 16)
    # One number has one spelling: 0000001 would be a second segment 1.
    right = 0 < first <= last and segment_name(first, last, crc32) == name
    return (first, last, crc32) if right else None


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
