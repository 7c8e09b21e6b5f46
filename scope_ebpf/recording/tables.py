"""Records as the probes write them, turned into the tables of a recording."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf import records
from scope_ebpf.loaders.hits import HitKind
from scope_ebpf.loaders.targets import split_arguments
from scope_ebpf.recording.calls import python_calls_frame
from scope_ebpf.recording.connections import connections_frame, connects_frame
from scope_ebpf.recording.hits import hits_frame
from scope_ebpf.recording.python_tables import (
    HOT_TABLES,
    Descriptions,
    NameNative,
    samples_frame,
)
from scope_ebpf.recording.schema import SCHEMAS, frame
from scope_ebpf.records import ProcessEvent, RecordFlags, RecordKind, RecordLimits

# An index so far behind the newest one may still come: see probes/perf.h.
INTERRUPTED = 128

Records = NDArray[np.void]
Run = tuple[int, int, Records]  # cpu, index of the first slot in that CPU's ring, slots

NO_VALUE = RecordLimits.NO_SYSCALL
# uretprobe and uprobe of x86-64 (Linux 6.11, 6.18): calls that the kernel's trampolines make where a probe
# is, not the program. Elsewhere these numbers are free.
PROBE_CALLS = (335, 336)


def join_runs(runs: Iterable[Run]) -> tuple[NDArray[np.uint16], NDArray[np.uint64], Records]:
    """All slots of some runs as one array, with each slot's CPU and index.

    The index is told by `sequence`: in a perf buffer some are left out, and an interrupt's may come first.
    """
    chosen = list(runs)
    cpus = np.concatenate([np.full(len(slots), cpu, np.uint16) for cpu, _, slots in chosen])
    indices = np.concatenate(
        [
            (slots["sequence"] - slots["sequence"][0]).astype(np.int32).astype(np.int64) + first
            for _, first, slots in chosen
        ]
    )
    return cpus, indices.astype(np.uint64), np.concatenate([slots for _, _, slots in chosen])


def calls_frame(slots: Records, cpus: NDArray[np.uint16]) -> pl.DataFrame:
    """Rows of syscalls, from slots that are calls or messages that are calls, too."""
    calls, messages = slots.view(records.CALL), slots.view(records.MESSAGE)
    # a message that is a call keeps what was passed in other places of the slot
    both = slots["kind"] == RecordKind.RECORD_MESSAGE_CALL

    def either(message_field: str, call_field: str) -> NDArray[Any]:
        return np.where(
            both, messages[message_field].astype(calls[call_field].dtype), calls[call_field]
        )

    return frame(
        "syscalls",
        {
            "start_ns": calls["start_ns"],
            "duration_ns": calls["duration_ns"],
            "tgid": calls["tgid"],
            "tid": calls["tid"],
            "number": calls["number"],
            "result": either("length_bytes", "result"),
            "arg0": either("fd", "arg0"),
            "arg1": either("arg1", "arg1"),
            "arg2": either("arg2", "arg2"),
            "status": calls["flags"] & RecordFlags.FLAG_STATUS,
            "cpu": cpus,
        },
    )


def offcpu_frame(slots: Records, cpus: NDArray[np.uint16]) -> pl.DataFrame:
    """Rows of offcpu."""
    rows = slots.view(records.OFFCPU)
    columns = frame(
        "offcpu",
        {
            "start_ns": rows["start_ns"],
            "duration_ns": rows["duration_ns"],
            "runnable_ns": rows["runnable_ns"].view(np.int64),
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "state": rows["state"],
            "number": rows["number"],
            "syscall_start_ns": rows["syscall_start_ns"],
            "waker_tgid": rows["waker_tgid"],
            "waker_tid": rows["waker_tid"],
            "waker_number": rows["waker_number"],
            "status": rows["flags"] & RecordFlags.FLAG_STATUS,
            "cpu": cpus,
        },
    )
    # Who wakes from the idle CPU is an interrupt: tid 0 stays. "Not woken" is told by the state, and a
    # wakeup that was not seen by the unknown runnable_ns.
    woken = (
        (pl.col("state") != 0)
        & (pl.col("runnable_ns") >= 0)
        & ~pl.col("status").is_in(
            [records.CallStatus.STATUS_OPEN, records.CallStatus.STATUS_THROUGHOUT]
        )
    )
    # a probe's own call is none of the program's: it has no row
    in_no_call = [NO_VALUE, *PROBE_CALLS]
    in_call = ~pl.col("number").is_in(in_no_call)
    return columns.with_columns(
        # UNKNOWN_NS, all bits set
        pl.when(pl.col("runnable_ns") >= 0).then("runnable_ns"),
        pl.when(in_call).then("number"),
        pl.when(in_call & (pl.col("syscall_start_ns") != 0)).then("syscall_start_ns"),
        pl.when(woken).then("waker_tgid"),
        pl.when(woken).then("waker_tid"),
        pl.when(~pl.col("waker_number").is_in(in_no_call)).then("waker_number"),
    )


@dataclass
class _Heads:
    """Payload heads of one run of slots: what is known of each, and where its bytes are."""

    owners: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.intp]  # in `raw`
    raw: NDArray[np.uint8]  # the run's slots, not copied

    def of(self, chosen: NDArray[np.bool_]) -> "_Heads":
        """Some of them."""
        return _Heads(self.owners[chosen], self.lengths[chosen], self.rows[chosen], self.raw)


class Payloads:
    """Payload heads that wait for their messages; both come from the same CPU's rings."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._waiting: dict[int, list[_Heads]] = {}

    def add(self, cpu: int, slots: Records) -> None:
        """Take the payloads among a CPU's wide slots, in the order of the ring."""
        rows = np.flatnonzero(slots["kind"] == RecordKind.RECORD_PAYLOAD)
        if not len(rows):
            return
        raw = slots.view(np.uint8).reshape(len(slots), slots.dtype.itemsize)
        heads = raw[:, : records.PAYLOAD.itemsize].view(records.PAYLOAD)[rows, 0]
        lengths = heads["length_bytes"].astype(np.int64)
        self._waiting.setdefault(cpu, []).append(_Heads(heads["hot_index"], lengths, rows, raw))

    def take(
        self, cpus: NDArray[np.uint16], indices: NDArray[np.uint64], flags: NDArray[np.uint8]
    ) -> pl.Series:
        """The payload of each message, or null: a Binary series as long as the arguments."""
        flagged = np.flatnonzero(flags & RecordFlags.FLAG_PAYLOAD)
        places = np.full(len(cpus), -1, np.int64)
        taken: list[pl.Series] = []
        count = 0
        for cpu in list(self._waiting):
            mine = flagged[cpus[flagged] == cpu]
            mine = mine[np.argsort(indices[mine])]
            wanted, drained = indices[mine], indices[cpus == cpu]
            for heads in self._waiting.pop(cpu):
                at = np.searchsorted(wanted, heads.owners)
                found = at < len(wanted)
                found[found] = wanted[at[found]] == heads.owners[found]
                if not found.all():
                    # their messages were drained after them: they come with the next ones
                    # (or at the end of a program that was interrupted)
                    later = ~found
                    if len(drained):
                        later &= heads.owners > max(int(drained.max()) - INTERRUPTED, 0)
                    if later.any():
                        self._waiting.setdefault(cpu, []).append(heads.of(later))
                if found.any():
                    at = at[found]
                    places[mine[at]] = np.arange(count, count + len(at))
                    taken.append(_bytes_of(heads.of(found)))
                    count += len(at)
        if not taken:
            return pl.Series("payload", [None], dtype=pl.Binary).new_from_index(0, len(cpus))
        return pl.concat(taken).gather(pl.Series(places).replace(-1, None))


def _bytes_of(heads: _Heads) -> pl.Series:
    """The captured bytes of each payload, as Binary."""
    begin = records.PAYLOAD.itemsize
    longest = max(int(heads.lengths.max()), 1)
    content = pl.Series("payload", heads.raw[heads.rows, begin : begin + longest])
    return (
        pl.DataFrame({"payload": content, "length": heads.lengths})
        .select(pl.col("payload").arr.to_list().cast(pl.Binary).bin.head("length"))
        .to_series()
    )


def messages_frame(slots: Records, cpus: NDArray[np.uint16], heads: pl.Series) -> pl.DataFrame:
    """Rows of messages, with the payload head of each."""
    rows = slots.view(records.MESSAGE)
    flags = rows["flags"]
    columns = frame(
        "messages",
        {
            "start_ns": rows["start_ns"],
            "duration_ns": rows["duration_ns"],
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "number": rows["number"],
            "fd": rows["fd"],
            "receive": (flags & RecordFlags.FLAG_RECEIVE) != 0,
            "peek": (flags & RecordFlags.FLAG_PEEK) != 0,
            "turn": (flags & RecordFlags.FLAG_TURN) != 0,
            "exact": (flags & RecordFlags.FLAG_INEXACT) == 0,
            "length_bytes": rows["length_bytes"],
            "stream_end": rows["stream_end"],
            "connection": rows["connection"],
            "payload": heads,
            "status": flags & RecordFlags.FLAG_STATUS,
            "cpu": cpus,
        },
    )
    return columns.with_columns(pl.when(pl.col("fd") != RecordLimits.NO_DESCRIPTOR).then("fd"))


def tls_frame(slots: Records, cpus: NDArray[np.uint16], heads: pl.Series) -> pl.DataFrame:
    """Rows of tls, with the payload head of each."""
    rows = slots.view(records.TLS)
    return frame(
        "tls",
        {
            "start_ns": rows["start_ns"],
            "duration_ns": rows["duration_ns"],
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "ssl": rows["ssl"],
            "receive": (rows["flags"] & RecordFlags.FLAG_RECEIVE) != 0,
            "turn": (rows["flags"] & RecordFlags.FLAG_TURN) != 0,
            "length_bytes": rows["length_bytes"],
            "payload": heads,
            "cpu": cpus,
        },
    )


def hot_frames(
    runs: Iterable[Run], payloads: Payloads, native: NameNative
) -> dict[str, pl.DataFrame]:
    """The hot slots as rows of their tables, each sorted by its first column.

    `native` names the function at an address of a process, if it can.
    """
    cpus, indices, slots = join_runs(runs)
    kinds = slots["kind"]
    frames = {}
    message = (kinds == RecordKind.RECORD_MESSAGE) | (kinds == RecordKind.RECORD_MESSAGE_CALL)
    call = (kinds == RecordKind.RECORD_CALL) & ~np.isin(slots["number"], PROBE_CALLS)
    call |= kinds == RecordKind.RECORD_MESSAGE_CALL
    if len(rows := in_order(slots, call)):
        frames["syscalls"] = calls_frame(slots[rows], cpus[rows])
    # together, since a payload that none of these rows takes is given up
    if len(rows := in_order(slots, message | (kinds == RecordKind.RECORD_TLS))):
        heads = payloads.take(cpus[rows], indices[rows], slots["flags"][rows])
        tls = kinds[rows] == RecordKind.RECORD_TLS
        for table, chosen, to_frame in (
            ("messages", ~tls, messages_frame),
            ("tls", tls, tls_frame),
        ):
            if chosen.any():
                mine = rows[chosen]
                frames[table] = to_frame(slots[mine], cpus[mine], heads.filter(pl.Series(chosen)))
    if len(rows := in_order(slots, kinds == RecordKind.RECORD_OFFCPU)):
        frames["offcpu"] = offcpu_frame(slots[rows], cpus[rows])
    if len(rows := in_order(slots, kinds == RecordKind.RECORD_SAMPLE)):
        frames["samples"] = samples_frame(slots[rows], cpus[rows], native)
    for kind, (table, make_frame) in HOT_TABLES.items():
        if len(rows := in_order(slots, kinds == kind)):
            frames[table] = make_frame(slots[rows], cpus[rows])
    return frames


def in_order(slots: Records, wanted: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Where the wanted slots are, by their start: nearly sorted runs, which timsort merges."""
    rows = np.flatnonzero(wanted)
    return rows[np.argsort(slots["start_ns"][rows], kind="stable")]


def text(data: Any) -> str:
    """Bytes up to the first zero, as text; what is not UTF-8 is escaped."""
    return bytes(data).split(b"\0", 1)[0].decode(errors="backslashreplace")


def command_line(data: bytes) -> str | None:
    """Zero-ended arguments as one shell-quoted line; None if there are none."""
    return shlex.join(split_arguments(data)) or None


def process_row(
    record: Any, cgroup_path: Callable[[int], str | None], arguments: bytes | None = None
) -> dict[str, Any]:
    """One row of processes, from a PROCESS record; `arguments` in place of the record's, if given."""
    exited = record["event"] in (ProcessEvent.PROCESS_EXIT, ProcessEvent.PROCESS_THREAD_EXIT)
    status = int(record["exit_code"])
    size = int(record["command_line_total_bytes"])
    if arguments is None:
        arguments = bytes(record["command_line"])[: int(record["command_line_bytes"])]
    else:
        size = len(arguments)
    return {
        "time_ns": int(record["time_ns"]),
        "event": int(record["event"]),
        "tgid": int(record["tgid"]),
        "tid": int(record["tid"]),
        "parent_tgid": int(record["parent_tgid"]),
        "parent_tid": int(record["parent_tid"]),
        "comm": text(record["comm"]),
        "command_line": command_line(arguments),
        "command_line_bytes": size,
        "cgroup": cgroup_path(int(record["cgroup"])),
        "cgroup_id": int(record["cgroup"]),
        "exit_code": (status >> 8) & 0xFF if exited and not status & 0x7F else None,
        "signal": status & 0x7F if exited and status & 0x7F else None,
        "start_boottime_ns": int(record["start_boottime_ns"]),
    }


def new_cgroups(runs: Iterable[Run]) -> Iterator[tuple[int, str]]:
    """Ids and paths of the cgroups that were made, among the wide slots."""
    for _, _, slots in runs:
        for record in typed(slots[slots["kind"] == RecordKind.RECORD_CGROUP], records.PROCESS):
            if record["command_line_bytes"]:
                yield int(record["cgroup"]), text(record["command_line"])


def wide_frames(
    runs: Iterable[Run],
    payloads: Payloads,
    descriptions: Descriptions,
    cgroup_path: Callable[[int], str | None],
    hit_kinds: Sequence[HitKind] = (),
    functions: Sequence[str] = (),
) -> dict[str, pl.DataFrame]:
    """The wide slots as rows of processes, connections, connects and hits.

    Calls of Python `functions` are rows of hits, too, under a name of their own: `calls`.

    Payloads, stacks and code objects go to their waiting places.
    """
    processes: list[dict[str, Any]] = []
    connections: list[Records] = []
    connects: list[Run] = []
    hits: list[Run] = []
    calls: list[Run] = []
    for cpu, _, slots in runs:
        kinds = slots["kind"]
        payloads.add(cpu, slots)
        descriptions.add(slots)
        for record in typed(slots[kinds == RecordKind.RECORD_PROCESS], records.PROCESS):
            processes.append(process_row(record, cgroup_path))
        connections.append(typed(slots[kinds == RecordKind.RECORD_CONNECTION], records.CONNECTION))
        tried = typed(slots[kinds == RecordKind.RECORD_CONNECT], records.CONNECT)
        connects += [(cpu, 0, tried)] if len(tried) else []
        hit = typed(slots[kinds == RecordKind.RECORD_HIT], records.HIT)
        hits += [(cpu, 0, hit)] if len(hit) else []
        call = typed(slots[kinds == RecordKind.RECORD_PYTHON_CALL], records.PYTHON_CALL)
        calls += [(cpu, 0, call)] if len(call) else []
    frames = {}
    if processes:
        frames["processes"] = rows_frame("processes", processes)
    if connections and sum(map(len, connections)):
        frames["connections"] = connections_frame(np.concatenate(connections))
    if connects:
        cpus, _, rows = join_runs(connects)
        frames["connects"] = connects_frame(rows, cpus)
    if hits:
        cpus, _, rows = join_runs(hits)
        frames["hits"] = hits_frame(rows, cpus, hit_kinds)
    if calls:
        cpus, _, rows = join_runs(calls)
        frames["calls"] = python_calls_frame(rows, cpus, functions)
    return frames


def typed(slots: Records, dtype: np.dtype[Any]) -> Records:
    """Wide slots as records of one kind, which may be shorter than the slot."""
    raw = slots.view(np.uint8).reshape(len(slots), slots.dtype.itemsize)[:, : dtype.itemsize]
    return np.ascontiguousarray(raw).view(dtype).reshape(len(slots))


def rows_frame(table: str, rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Rows as a DataFrame with the table's schema, sorted by time."""
    return pl.DataFrame(rows, schema=SCHEMAS[table]).sort("time_ns")
