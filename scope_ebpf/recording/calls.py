"""Calls of Python functions as rows of hits, with their arguments as text."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask
from scope_ebpf.recording.schema import SCHEMAS, frame
from scope_ebpf.records import ValueKind

Records = NDArray[np.void]

_ENCODINGS = {
    ValueKind.VALUE_LATIN1: ("latin-1", 1),
    ValueKind.VALUE_UCS2: ("utf-16-le", 2),
    ValueKind.VALUE_UCS4: ("utf-32-le", 4),
}
_TEXTS = 4  # that a record has room for
# What is neither a number nor a text, and says nothing about persons: it is never masked.
_PLAIN = ("None", "True", "False", "…")


def python_calls_frame(
    rows: Records, cpus: NDArray[np.uint16], functions: Sequence[str]
) -> pl.DataFrame:
    """Rows of hits, from PYTHON_CALL records and the names of the functions, sorted by time."""
    columns = frame(
        "hits",
        {
            "time_ns": rows["time_ns"],
            "duration_ns": rows["duration_ns"],
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "context": rows["context"],
            "probe": [functions[number] for number in rows["probe"].tolist()],
            "arguments": [arguments(row) for row in rows],
            "cpu": cpus,
        },
    )
    # UNKNOWN_NS, all bits set
    known = pl.when(pl.col("duration_ns") >= 0).then("duration_ns")
    return columns.with_columns(known).sort("time_ns")


def arguments(row: Any) -> list[str]:
    """The arguments of one PYTHON_CALL record, each as Python writes it.

    What was cut ends with `…`; what is of another type is `<module.type>`; what is not there is `…`.
    """
    texts = _texts(row)
    kinds = int(row["kinds"]).to_bytes(8, "little")
    result = []
    for index in range(int(row["arguments"])):
        kind, value = kinds[index], int(row["values"][index])
        text = next(texts, None) if kind >= ValueKind.VALUE_BYTES and _has_text(kind) else None
        result.append(_shown(kind, value, text))
    return result


def _has_text(kind: int) -> bool:
    return kind in _ENCODINGS or kind in (ValueKind.VALUE_BYTES, ValueKind.VALUE_OBJECT)


def _texts(row: Any) -> Any:
    data, at = bytes(row["text"]), 0
    for length in row["text_lengths"].tolist()[:_TEXTS]:
        yield data[at : at + length]
        at += length


def _shown(kind: int, value: int, text: bytes | None) -> str:
    if kind == ValueKind.VALUE_NONE:
        return "None"
    if kind == ValueKind.VALUE_BOOL:
        return str(bool(value))
    if kind == ValueKind.VALUE_INT:
        return str(value - (1 << 64) if value >> 63 else value)
    if kind == ValueKind.VALUE_LONG_INT:
        return f"<int of {30 * value} bits>"
    if kind == ValueKind.VALUE_FLOAT:
        return repr(struct.unpack("<d", struct.pack("<Q", value))[0])
    if kind == ValueKind.VALUE_OBJECT:
        return f"<{(text or b'').partition(bytes(1))[0].decode(errors='backslashreplace') or 'object'}>"
    if kind == ValueKind.VALUE_BYTES:
        return _cut(repr(text or b""), len(text or b""), value)
    if kind in _ENCODINGS:
        encoding, width = _ENCODINGS[ValueKind(kind)]
        whole = (text or b"")[: len(text or b"") // width * width].decode(
            encoding, "backslashreplace"
        )
        return _cut(repr(whole), len(text or b"") // width, value)
    return "…"


def _cut(shown: str, captured: int, total: int) -> str:
    return shown if captured >= total else f"{shown}…"


def mask_arguments(rows: pl.DataFrame, key: bytes) -> pl.DataFrame:
    """The same rows, with tokens in place of numbers and texts; names of types, None and bools stay."""
    flat = rows.select("arguments").with_row_index().explode("arguments")
    shown = flat["arguments"].to_list()
    some = [index for index, text in enumerate(shown) if text is not None and _is_masked(text)]
    if not some:
        return rows
    payloads = [shown[index].encode() for index in some]
    heads = Heads.of(
        pl.Series(payloads, dtype=pl.Binary), np.array([len(data) for data in payloads])
    )
    kept = np.zeros(len(heads.data), np.bool_)
    # the b of b'...'
    for begin, data in zip(heads.begins.tolist(), payloads, strict=True):
        kept[begin] = data[:2] in (b"b'", b'b"')
    for index, data in zip(some, mask(heads, kept, key).payloads().to_list(), strict=True):
        shown[index] = data.decode(errors="backslashreplace")
    masked: list[list[str]] = []
    at = 0
    for count in rows["arguments"].list.len().to_list():
        # an empty list explodes to one null
        masked.append(shown[at : at + count])
        at += max(count, 1)
    return rows.with_columns(pl.Series("arguments", masked, dtype=SCHEMAS["hits"]["arguments"]))


def _is_masked(text: str) -> bool:
    return text not in _PLAIN and not text.startswith("<")
