"""Hits of the user's own probes, turned into rows: each argument as text, as its type asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.loaders.hits import HitKind, text_places
from scope_ebpf.probe_specs import ArgumentType
from scope_ebpf.recording.schema import SCHEMAS

Records = NDArray[np.void]

CUT: Final = "…"
"""Ends a text of which there is more than was captured."""


def hits_frame(rows: Records, cpus: NDArray[np.uint16], kinds: Sequence[HitKind]) -> pl.DataFrame:
    """Rows of hits, sorted by time; `kinds` tells what their numbers stand for."""
    parts = []
    for number in np.unique(rows["probe"]).tolist():
        chosen = rows["probe"] == number
        parts.append(_frame_of(rows[chosen], cpus[chosen], kinds[number]))
    return pl.concat(parts).sort("time_ns", maintain_order=True)


def _frame_of(rows: Records, cpus: NDArray[np.uint16], kind: HitKind) -> pl.DataFrame:
    schema = SCHEMAS["hits"]
    texts = text_places(kind.types)
    columns = [
        _shown(rows, place, argument, text)
        for place, (argument, text) in enumerate(zip(kind.types, texts, strict=True))
    ]
    arguments = (
        pl.DataFrame(columns).select(pl.concat_list(pl.all()).alias("arguments")).to_series()
        if columns
        else pl.Series("arguments", [[]], dtype=schema["arguments"]).new_from_index(0, len(rows))
    )
    return pl.DataFrame(
        {
            "time_ns": rows["time_ns"].astype(np.int64),
            "duration_ns": pl.Series(rows["duration_ns"].astype(np.int64)).set(
                pl.Series(rows["began"] == 0), None
            ),
            "tgid": rows["tgid"],
            "tid": rows["tid"],
            "context": rows["context"],
            "probe": pl.Series([kind.label]).new_from_index(0, len(rows)),
            "arguments": arguments,
            "cpu": cpus,
        },
        schema=schema,
    )


def _shown(
    rows: Records, place: int, kind: ArgumentType, text: tuple[int, int, int] | None
) -> pl.Series:
    """One argument of each row; null where it could not be read."""
    values = np.ascontiguousarray(rows["values"][:, place])
    name = f"argument{place}"
    if text is not None:
        number, begin, size = text
        shown = _texts(rows, number, begin, size, values)
    elif kind.form == "pointer":
        data = pl.Series(values.astype(">u8").view("V8").tolist(), dtype=pl.Binary)
        digits = data.bin.encode("hex").str.strip_chars_start("0")
        shown = "0x" + digits.replace("", "0")
    elif kind.form == "boolean":
        shown = pl.Series(values != 0).cast(pl.String)
    elif kind.form == "float":
        bits = f"{kind.size_bytes}"
        shown = pl.Series(values.astype(f"u{bits}").view(f"f{bits}")).cast(pl.String)
    else:
        shown = pl.Series(values.view(np.int64) if kind.signed else values).cast(pl.String)
    unread = pl.Series((rows["unread"] >> np.uint32(place)) & np.uint32(1) == 1)
    return shown.set(unread, None).alias(name)


def _texts(
    rows: Records, number: int, begin: int, size: int, more: NDArray[np.uint64]
) -> pl.Series:
    """A text of each row; bytes that are not UTF-8 are escaped."""
    raw = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
    assert rows.dtype.fields is not None
    begin += rows.dtype.fields["text"][1]
    data = (
        pl.DataFrame(
            {
                "data": pl.Series(raw[:, begin : begin + size]),
                "length": rows["text_lengths"][:, number].astype(np.uint32),
            }
        )
        .select(pl.col("data").arr.to_list().cast(pl.Binary).bin.head("length"))
        .to_series()
    )
    shown = as_text(data)
    return pl.select(
        pl.when(pl.lit(pl.Series(more != 0))).then(shown + CUT).otherwise(shown)
    ).to_series()


def as_text(data: pl.Series) -> pl.Series:
    """Bytes as text; those that are not UTF-8, such as a letter that is cut, are escaped."""
    try:
        return data.cast(pl.String)
    except pl.exceptions.ComputeError:
        return pl.Series(
            data.name, [value.decode(errors="backslashreplace") for value in data.to_list()]
        )


# What is done to an argument before it is written, the strictest last.
_PLAIN, _SQL, _TEXT = range(3)
_TREATMENTS: Final = {"sql": _SQL, "text": _TEXT}


def treatments(kinds: Sequence[HitKind]) -> pl.DataFrame:
    """How each argument of each probe that has a text is redacted: `probe`, `place`, `treatment`."""
    found: dict[tuple[str, int], int] = {}
    for kind in kinds:
        for place, argument in enumerate(kind.types):
            key = (kind.label, place)
            # two places of one name may differ in their types
            found[key] = max(found.get(key, _PLAIN), _TREATMENTS.get(argument.form, _PLAIN))
    rows = [(*key, treatment) for key, treatment in found.items() if treatment != _PLAIN]
    schema = {"probe": pl.String, "place": pl.Int64, "treatment": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row")


TEXT_TREATMENT: Final = _TEXT
