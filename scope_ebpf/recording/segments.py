"""The segments of one table: which there are, and whether each still is what was written.

Of 60 single flipped bits in a segment, polars 2.1 noticed 7 and gave a wrong table for 52. So every
byte is compared with the checksum in the file's name (zlib.crc32 reads some gigabytes per second),
and a missing segment shows as a gap in the numbers.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import polars as pl

from scope_ebpf.errors import FormatError, RecordingError
from scope_ebpf.recording.schema import parse_segment_name, segment_name

_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Segment:
    """One Parquet file of a table: the one of a number, or one that stands for those of several."""

    file: Path
    number: int
    last: int
    crc32: int
    size_bytes: int


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what polars and the file system raise while `what` is read into `RecordingError`.

    That includes panics of polars's Rust code, which are no `Exception`.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecordingError(f"cannot read {what}: {first}") from error
    except PermissionError as error:
        raise RecordingError(
            f"cannot read {what}: permission denied; recordings belong to who made them, "
            "often root: run with sudo, or change their owner"
        ) from error
    except OSError as error:
        raise RecordingError(f"cannot read {what}: {error.strerror or error}") from error


def list_segments(folder: Path, first: int = 1) -> list[Segment]:
    """The segments of a table in the order of their numbers; none if the folder is missing.

    Those before number `first` were dropped: one that is still there does not count, nor does one
    that another stands for. Parts (`.NAME.part`) and other hidden files are ignored. Raises
    `FormatError` for a Parquet file that is not named like a segment, and `RecordingError` if a
    segment is missing or there twice.
    """
    segments = []
    with reading(str(folder)):
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return []
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.endswith(".parquet"):
                continue
            parsed = parse_segment_name(entry.name)
            if parsed is None:
                raise FormatError(
                    f"{entry.path} is not named like a segment, {segment_name(1, 1, 0x9F3A12BC)}; "
                    "give it back its name, or move it out of the recording"
                )
            if not entry.is_file():  # opening a named pipe would wait for ever
                raise FormatError(f"{entry.path} is not a regular file; copy the recording again")
            if parsed[0] >= first:
                segments.append(Segment(Path(entry.path), *parsed, entry.stat().st_size))
    # of those that begin with the same number, the one that stands for most comes first
    segments.sort(key=lambda segment: (segment.number, -segment.last))
    chosen: list[Segment] = []
    for segment in segments:
        expected = chosen[-1].last + 1 if chosen else first
        if segment.number > expected:
            raise RecordingError(
                f"segment {expected:06d} of {folder} is missing; copy the recording again"
            )
        if segment.number == expected:
            chosen.append(segment)
        elif segment.last > chosen[-1].last or chosen[-1].number == chosen[-1].last:
            raise RecordingError(
                f"segment {segment.number:06d} of {folder} is there twice; copy the recording again"
            )
    return chosen


def verify_bytes(segments: Sequence[Segment], *, complete: bool) -> None:
    """Compare all bytes of the segments with the checksums in their names.

    `complete`: the recording ended properly. Raises `FormatError` for the first that differs.
    """
    buffer = bytearray(_CHUNK_BYTES)
    for segment in segments:
        with reading(str(segment.file)):
            crc32 = _crc32(segment.file, buffer)
        if crc32 != segment.crc32:
            # Without a proper end the segments may just as well stop before this one.
            salvage = "" if complete else ", or delete this segment and those after it"
            raise FormatError(
                f"{segment.file} is damaged: its bytes do not fit the checksum in its name; "
                f"copy the recording again{salvage}"
            )


def _crc32(file: Path, buffer: bytearray) -> int:
    view = memoryview(buffer)
    with open(file, "rb", buffering=0) as stream:
        crc32 = 0
        while length := stream.readinto(buffer):
            crc32 = zlib.crc32(view[:length], crc32)
    return crc32


def check_columns(segments: Sequence[Segment], schema: pl.Schema) -> None:
    """Compare the columns of the segments, which stand in their footers, with those of the table.

    Raises `FormatError` for the first that differs.
    """
    for segment in segments:
        with reading(str(segment.file)):
            # Not read_parquet_schema: it takes [, * and ? in a path for a pattern.
            found = pl.scan_parquet(segment.file, glob=False).collect_schema()
        if found != schema:
            wrong = [name for name, dtype in schema.items() if found.get(name) != dtype]
            wrong += [name for name in found if name not in schema]
            raise FormatError(
                f"{segment.file} does not have the columns of its table (see {', '.join(wrong)}); "
                "read it with the scope-ebpf that recorded it"
            )


def scan(segments: Sequence[Segment], schema: pl.Schema) -> pl.LazyFrame:
    """The rows of the segments as one lazy frame."""
    if not segments:
        return pl.LazyFrame(schema=schema)
    return pl.scan_parquet(
        [segment.file for segment in segments],
        schema=schema,
        glob=False,  # a recording's path may contain [, * and =
        hive_partitioning=False,
    )


def count_rows(segments: Sequence[Segment], schema: pl.Schema) -> int:
    """How many rows the segments have; only their footers are read."""
    if not segments:
        return 0
    with reading(str(segments[0].file.parent)):
        return int(scan(segments, schema).select(pl.len()).collect().item())
