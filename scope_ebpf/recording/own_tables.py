"""Tables that programs of the user's fill: from records as they were submitted to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.bcc_fields import TIME, OwnTable

_NUMBERS: Final = {
    f"{word}{bits}": getattr(pl, f"{word}{bits}")
    for word in ("Int", "UInt")
    for bits in (8, 16, 32, 64)
}
COLUMN_TYPES: Final[Mapping[str, Any]] = {
    **_NUMBERS,
    "Boolean": pl.Boolean,
    "String": pl.String,
    **{f"List({name})": pl.List(kind) for name, kind in _NUMBERS.items()},
    "List(Boolean)": pl.List(pl.Boolean),
    "List(String)": pl.List(pl.String),
}
"""Types of columns, by the names that meta.json has for them."""

Run = tuple[NDArray[np.int64] | None, NDArray[Any]]


def schema_of(columns: Sequence[Sequence[str]]) -> pl.Schema:
    """The schema of a table from names and types as in meta.json.

    Raises `FormatError` for a type that is unknown.

    >>> schema_of([["tid", "UInt32"], ["comm", "String"]])
    Schema({'tid': UInt32, 'comm': String})
    """
    for column in columns:
        if len(column) != 2 or column[1] not in COLUMN_TYPES:
            raise FormatError(
                f"cannot read a table with the column {' '.join(column)!r}; read it with the scope-ebpf that"
                " recorded it"
            )
    return pl.Schema({name: COLUMN_TYPES[kind] for name, kind in columns})


def own_frame(table: OwnTable, runs: Sequence[Run]) -> pl.DataFrame:
    """Rows of a table, sorted by `time_ns` if it has that; texts end at their first zero byte."""
    schema = schema_of(table.columns)
    records = np.concatenate([run for _, run in runs])
    columns = []
    for name, dtype in schema.items():
        if name in (table.dtype.names or ()):
            values = records[name]
        else:
            values = np.concatenate([times for times, _ in runs if times is not None])
        columns.append(_column(name, values, dtype))
    frame = pl.DataFrame(columns)
    return frame.sort(TIME, maintain_order=True) if TIME in schema else frame


def _column(name: str, values: NDArray[Any], dtype: pl.DataType) -> pl.Series:
    if values.dtype.kind == "S":
        flat = pl.Series(name, _texts(values.reshape(-1)), dtype=pl.String)
        return flat if values.ndim == 1 else flat.reshape(values.shape).arr.to_list()
    values = np.ascontiguousarray(values)
    if dtype == pl.Int64 and values.dtype == np.uint64:
        values = values.view(np.int64)
    if values.ndim == 1:
        return pl.Series(name, values, dtype=dtype)
    flat = pl.Series(name, values.reshape(-1)).reshape(values.shape)
    return flat.arr.to_list().cast(dtype)


def _texts(values: NDArray[Any]) -> list[str]:
    """Each different text is decoded once; what is not UTF-8 is escaped."""
    different, places = np.unique(values, return_inverse=True)
    decoded = [
        bytes(text).split(b"\0", 1)[0].decode(errors="backslashreplace") for text in different
    ]
    return [decoded[place] for place in places.tolist()]
