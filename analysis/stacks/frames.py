"""Stacks of CPython threads as functions, files and lines."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.asof import NONE, group_numbers, latest_before
from scope_ebpf.cpython.lines import line_of
from scope_ebpf.cpython.shims import INIT_CLEANUP
from scope_ebpf.recording.reader import Recording
from scope_ebpf.records import PythonLimits

NOT_RECORDED: Final = "[not recorded]"
"""What a frame is called whose code object was lost."""

# One row per frame of each stack that was described.
FRAMES: Final = pl.Schema(
    {
        "tgid": pl.UInt32(),
        "stack": pl.UInt64(),  # as in samples
        "depth": pl.UInt16(),  # 0: the innermost frame
        "function": pl.String(),  # null: its code object was lost, or its name could not be read
        "file": pl.String(),  # likewise
        "first_line": pl.UInt32(),  # of the function; null: not recorded
        "line": pl.UInt32(),  # at which it stood; null: not recorded, or it has none
        "truncated": pl.Boolean(),  # of an outermost frame: there are more frames further out
    }
)

_INIT_CLEANUP: Final = (pl.col("name") == INIT_CLEANUP) & (pl.col("file") == INIT_CLEANUP)

# A table of this length may have been cut, which matters to those up to 3.9 (see line_of).
_WHOLE_BYTES: Final = (
    PythonLimits.CODE_PART_BYTES + (PythonLimits.CODE_PARTS - 1) * PythonLimits.CODE_MORE_BYTES
)


def resolve(recording: Recording, wanted: pl.DataFrame | None = None) -> pl.DataFrame:
    """The frames of the stacks of a recording, with the schema FRAMES, sorted by all of its key.

    `wanted`: columns `tgid` and `stack`; only these. A stack that has no row in `stacks` has none
    here: what was sampled in it must be shown without frames, not left out.

    An address of a code object is used again after the object is gone: a stack's are those that were
    described last before the stack was. A frame whose code object was not described then has the
    function null, see NOT_RECORDED. A process that was forked has rows of its own in `codes`.
    """
    described = recording.stacks.filter(pl.col("codes").list.len() > 0)
    if wanted is not None:
        keys = wanted.lazy().select("tgid", "stack").unique()
        described = described.join(keys, on=["tgid", "stack"], how="semi")
    # The hash covers the frames, so a later description of the same stack says nothing new.
    stacks = (
        recording.collect(described)
        .sort("time_ns", maintain_order=True)
        .unique(["tgid", "stack"], keep="first", maintain_order=True)
    )
    if stacks.is_empty():
        return pl.DataFrame(schema=FRAMES)
    frames = stacks.select(
        "tgid",
        "stack",
        "time_ns",
        "truncated",
        pl.int_ranges(pl.col("codes").list.len()).alias("depth"),
        last=pl.col("codes").list.len() - 1,
        code="codes",
        offset="offsets",
    ).explode("depth", "code", "offset")
    codes = recording.collect(
        recording.codes.join(
            frames.lazy().select("tgid", "code").unique(), on=["tgid", "code"], how="semi"
        )
    )
    group, of_group = group_numbers(
        (codes["tgid"].to_numpy(), frames["tgid"].to_numpy()),
        (codes["code"].to_numpy(), frames["code"].to_numpy()),
    )
    row = latest_before(group, codes["time_ns"].to_numpy(), of_group, frames["time_ns"].to_numpy())
    known = codes.select("name", "file", "first_line").with_row_index("row")
    return (
        frames.with_columns(
            row=pl.Series(np.where(row == NONE, len(codes), row), dtype=pl.UInt32),
            line=_lines(codes, row, frames["offset"].to_numpy()),
        )
        .join(known, on="row", how="left", maintain_order="left")
        .filter(~_INIT_CLEANUP.fill_null(value=False))
        .with_columns(
            function="name",
            depth=pl.int_range(pl.len()).over("tgid", "stack"),
            outermost=pl.col("depth") == pl.col("last"),
        )
        .with_columns(truncated=pl.col("truncated") & pl.col("outermost"))
        .select(pl.col(name).cast(dtype) for name, dtype in FRAMES.items())
        .sort("tgid", "stack", "depth")
    )


def _lines(codes: pl.DataFrame, row: NDArray[np.intp], offset: NDArray[np.uint32]) -> pl.Series:
    """The line of each frame; every place in a code object is looked up once."""
    places, of_place = np.unique(
        np.stack([row.astype(np.int64), offset.astype(np.int64)], axis=1),
        axis=0,
        return_inverse=True,
    )
    columns = [
        codes[name].to_list() for name in ("first_line", "lines", "version", "first_instruction")
    ]
    found: list[int | None] = []
    for code, at in places.tolist():
        if code == NONE:
            found.append(None)
            continue
        first_line, lines, version, first_instruction = (column[code] for column in columns)
        if lines is None or first_line is None:
            found.append(None)
            continue
        whole = len(lines) < _WHOLE_BYTES
        found.append(line_of(at, first_line, lines, version, first_instruction, whole=whole))
    return pl.Series(found, dtype=pl.UInt32).gather(of_place.ravel())
