"""Records of what happens inside CPython, turned into the tables of a recording."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf import records
from scope_ebpf.recording.schema import SCHEMAS, frame
from scope_ebpf.records import PythonLimits, RecordFlags, RecordKind, RecordLimits

Records = NDArray[np.void]
Cpus = NDArray[np.uint16]
NameNative = Callable[[int, int], str | None]

_HEADER = int(RecordLimits.WIDE_HEADER_BYTES)
_NAME = slice(_HEADER, _HEADER + PythonLimits.CODE_NAME_BYTES)
_FILE = slice(_NAME.stop, _NAME.stop + PythonLimits.CODE_FILE_BYTES)
# Python keeps a string with 1, 2 or 4 bytes per character (PEP 393), in the machine's order.
_ENCODINGS = {1: "latin-1", 2: "utf-16-le", 4: "utf-32-le"}


def samples_frame(slots: Records, cpus: Cpus, native: NameNative) -> pl.DataFrame:
    """Rows of samples; `native` names the function at an address of a process, if it can."""
    rows = slots.view(records.SAMPLE)
    names: list[str | None] = [None] * len(rows)
    for at in np.flatnonzero(rows["instruction"]).tolist():
        names[at] = native(int(rows["tgid"][at]), int(rows["instruction"][at]))
    for at in np.flatnonzero(rows["in_kernel"]).tolist():
        names[at] = "[kernel]"
    columns = frame(
        "samples",
        {
            "time_ns": rows["time_ns"],
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "context": rows["context"],
            "reason": rows["flags"],
            "duration_ns": rows["duration_ns"],
            "stack": rows["stack"],
            "native": names,
            "cpu": cpus,
        },
    )
    return columns.with_columns(pl.when(pl.col("stack") != 0).then("stack"))


def flows_frame(slots: Records, cpus: Cpus) -> pl.DataFrame:
    """Rows of flows."""
    rows = slots.view(records.FLOW)
    return frame("flows", {name: rows[name] for name in SCHEMAS["flows"]})


def contexts_frame(slots: Records, cpus: Cpus) -> pl.DataFrame:
    """Rows of contexts."""
    rows = slots.view(records.CONTEXT)
    named = {name: rows[name] for name in SCHEMAS["contexts"] if name != "kind"}
    return frame("contexts", {**named, "kind": rows["flags"]})


def handoffs_frame(slots: Records, cpus: Cpus) -> pl.DataFrame:
    """Rows of handoffs."""
    rows = slots.view(records.HANDOFF)
    named = {name: rows[name] for name in SCHEMAS["handoffs"] if name != "put"}
    return frame("handoffs", {**named, "put": rows["flags"] != 0})


def gil_frame(slots: Records, cpus: Cpus) -> pl.DataFrame:
    """Rows of gil."""
    rows = slots.view(records.GIL)
    return frame(
        "gil",
        {
            "start_ns": rows["start_ns"],
            "duration_ns": rows["duration_ns"],
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "holder_tid": rows["holder_tid"],
            "status": rows["flags"] & RecordFlags.FLAG_STATUS,
            "cpu": cpus,
        },
    ).with_columns(pl.when(pl.col("holder_tid") != 0).then("holder_tid"))


HOT_TABLES: dict[RecordKind, tuple[str, Callable[[Records, Cpus], pl.DataFrame]]] = {
    RecordKind.RECORD_FLOW: ("flows", flows_frame),
    RecordKind.RECORD_CONTEXT: ("contexts", contexts_frame),
    RecordKind.RECORD_HANDOFF: ("handoffs", handoffs_frame),
    RecordKind.RECORD_GIL: ("gil", gil_frame),
}


@dataclass
class _Parts:
    """What has arrived of one description."""

    missing: int
    parts: dict[int, bytes] = field(default_factory=dict)
    batches: int = 0


class Descriptions:
    """Stacks and code objects whose parts arrive in several slots, perhaps in several batches.

    A part that was lost keeps its description from being complete: a stack's is dropped after some
    batches (its hash stays without a row), a code object's is kept without the rest of its lines.
    """

    PATIENCE = 4  # batches

    def __init__(self) -> None:
        """Nothing has arrived."""
        self._stacks: dict[tuple[int, int, int], _Parts] = {}
        self._stack_heads: dict[tuple[int, int, int], Any] = {}
        self._codes: dict[tuple[int, int, int], _Parts] = {}
        self._code_heads: dict[tuple[int, int, int], tuple[Any, bytes]] = {}

    def add(self, slots: Records) -> None:
        """Take the descriptions among a CPU's wide slots, in the order of the ring."""
        kinds = slots["kind"]
        wanted = (kinds == RecordKind.RECORD_STACK) | (kinds == RecordKind.RECORD_CODE)
        for at in np.flatnonzero(wanted).tolist():
            data = slots[at].tobytes()
            if kinds[at] == RecordKind.RECORD_STACK:
                self._add_stack(data)
            else:
                self._add_code(data)

    def _add_stack(self, data: bytes) -> None:
        head = np.frombuffer(data, records.STACK_PART, 1)[0]
        key = (int(head["tgid"]), int(head["stack"]), int(head["time_ns"]))
        parts = self._stacks.setdefault(key, _Parts(int(head["total"])))
        frames = int(head["frames"])
        parts.parts[int(head["part"])] = data[_HEADER : _HEADER + frames * records.FRAME.itemsize]
        parts.missing -= frames
        self._stack_heads[key] = head

    def _add_code(self, data: bytes) -> None:
        head = np.frombuffer(data, records.CODE_PART, 1)[0]
        key = (int(head["tgid"]), int(head["code"]), int(head["time_ns"]))
        parts = self._codes.setdefault(key, _Parts(int(head["lines_total"])))
        number, size = int(head["part"]), int(head["line_bytes"])
        begin = _HEADER if number else _FILE.stop
        parts.parts[number] = data[begin : begin + size]
        parts.missing -= size
        if number == 0:
            self._code_heads[key] = (head, data)

    def take(self, *, last: bool = False) -> dict[str, pl.DataFrame]:
        """Rows of stacks and codes that are complete, or, at last, as they are."""
        frames = {}
        if rows := self._take_codes(last):
            frames["codes"] = pl.DataFrame(rows, schema=SCHEMAS["codes"]).sort("time_ns")
        if rows := self._take_stacks(last):
            frames["stacks"] = pl.DataFrame(rows, schema=SCHEMAS["stacks"]).sort("time_ns")
        return frames

    def _take_stacks(self, last: bool) -> list[dict[str, Any]]:
        rows = []
        for key, parts in list(self._stacks.items()):
            parts.batches += 1
            if parts.missing > 0 and not last and parts.batches < self.PATIENCE:
                continue
            head = self._stack_heads.pop(key)
            del self._stacks[key]
            if parts.missing > 0:
                continue
            data = b"".join(parts.parts[number] for number in sorted(parts.parts))
            frames = np.frombuffer(data, records.FRAME)
            rows.append(
                {
                    "time_ns": key[2],
                    "tgid": key[0],
                    "stack": key[1],
                    "codes": frames["code"].tolist(),
                    "offsets": frames["offset"].tolist(),
                    "truncated": bool(head["truncated"]),
                }
            )
        return rows

    def _take_codes(self, last: bool) -> list[dict[str, Any]]:
        rows = []
        longest = (
            PythonLimits.CODE_PART_BYTES
            + (PythonLimits.CODE_PARTS - 1) * PythonLimits.CODE_MORE_BYTES
        )
        for key, parts in list(self._codes.items()):
            parts.batches += 1
            whole = max(len(part) for part in parts.parts.values()) if parts.parts else 0
            cut = sum(len(part) for part in parts.parts.values()) >= longest
            unread = whole == 0  # the line table could not be read: no more will come
            waits = parts.missing > 0 and not cut and not unread
            if waits and not last and parts.batches < self.PATIENCE:
                continue
            del self._codes[key]
            described = self._code_heads.pop(key, None)
            if described is None:
                continue
            head, data = described
            rows.append(
                {
                    "time_ns": key[2],
                    "tgid": key[0],
                    "code": key[1],
                    "name": _text(data[_NAME], head["name_length"], head["name_width"]),
                    "file": _text(
                        data[_FILE], head["file_length"], head["file_width"], keep_end=True
                    ),
                    "first_line": int(head["first_line"]),
                    "lines": _in_sequence(parts.parts),
                    "version": int(head["version"]),
                    "first_instruction": int(head["first_instruction"]),
                }
            )
        return rows


def _in_sequence(parts: dict[int, bytes]) -> bytes:
    """The parts from the first one on, up to one that is missing."""
    found = []
    for number in range(len(parts)):
        if number not in parts:
            break
        found.append(parts[number])
    return b"".join(found)


def _text(data: bytes, length: Any, width: Any, *, keep_end: bool = False) -> str | None:
    """A string of Python by its characters' bytes; None if it could not be read.

    One that is longer than what was kept has … in place of the rest.
    """
    encoding = _ENCODINGS.get(int(width))
    if encoding is None:
        return None
    size = int(length) * int(width)
    kept = min(size, len(data)) // int(width) * int(width)
    # surrogateescape in a file's name is a lone surrogate, which Parquet's UTF-8 cannot hold
    text = data[:kept].decode(encoding, "replace" if width > 1 else "strict")
    text = text.encode("utf-8", "backslashreplace").decode()
    if kept == size:
        return text
    return f"…{text}" if keep_end else f"{text}…"
