"""Writes a recording: segments and meta.json, each aside and renamed when it is complete."""

import json
import os
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path

import polars as pl

from scope_ebpf.errors import RecordingError, ScopeError
from scope_ebpf.recording.directory import DIRECTORY_MODE
from scope_ebpf.recording.merging import Merged, Neighbours, merge
from scope_ebpf.recording.meta import Meta, RecorderUse, TableCount, write_meta
from scope_ebpf.recording.schema import SCHEMAS, segment_name
from scope_ebpf.recording.segments import Segment

FILE_MODE = 0o600
# Room for the last meta.json, so that a full disk does not keep the counts from being written.
RESERVE_FILE = ".reserve"
RESERVE_BYTES = 1 << 16
# Segments that another stands for, or that were dropped, stay so long for readers that found them before.
KEPT_SECONDS = 30.0
# What a file takes on the disk, in blocks of most file systems.
BLOCK_BYTES = 4096


@dataclass
class Chunk:
    """What was written from one telling (see loaders/capture.py) to the next: it goes as a whole."""

    began_ns: int
    began_at: float  # of time.monotonic()
    disk_bytes: int = 0
    files: dict[Path, None] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)
    segments: Counter[str] = field(default_factory=Counter)
    neighbours: defaultdict[str, Neighbours] = field(
        default_factory=lambda: defaultdict(Neighbours)
    )
    merged: deque[Merged] = field(default_factory=deque)  # whose parts are still there


class RecordingWriter:
    """Writes tables segment by segment. Not thread-safe; one thread writes."""

    def __init__(self, path: Path, meta: Meta) -> None:
        """Write the first meta.json into the recording's directory, which exists.

        Raises:
            RecordingError: the directory cannot be written to.
        """
        self.path = path
        self.meta = meta
        tables = [*SCHEMAS, *(own.name for own in meta.own_tables)]
        self.rows = dict.fromkeys(tables, 0)
        self.bytes_on_disk = 0
        # called before a segment is written, with what it will take on the disk
        self.make_room: Callable[[int], None] = lambda _: None
        self._numbers = dict.fromkeys(tables, 0)
        self._dropped_rows = Counter[str]()
        self._dropped_segments = Counter[str]()
        self.chunks = deque([Chunk(meta.started_ns, time.monotonic())])
        self._dropped: Chunk | None = None  # the last one, if its files are still there
        self._dropped_due = 0.0  # of time.monotonic()
        # the first segment of a table must not wait for its folder to be made
        for table in tables:
            self._make_folder(path / table)
        self._keep_reserve()
        write_meta(path, meta, durable=True)

    def _keep_reserve(self) -> None:
        # the part that grows with the targets, and room for counts and notes
        reserve = 2 * len(json.dumps(asdict(self.meta))) + RESERVE_BYTES
        try:
            with open(self.path / RESERVE_FILE, "xb", opener=_private) as stream:
                os.posix_fallocate(stream.fileno(), 0, reserve)
        except OSError as error:
            raise RecordingError(
                f"cannot write to {self.path}: {error.strerror}; choose another place with -o"
            ) from error

    def release_reserve(self) -> None:
        """Give back the room that is kept for the last meta.json, right before it is written."""
        with suppress(OSError):
            (self.path / RESERVE_FILE).unlink()

    def write(self, table: str, rows: pl.DataFrame) -> None:
        """Append a segment with these rows, sorted by their first column, to a table.

        Raises:
            RecordingError: it could not be written; the recording is whole without it.
        """
        if rows.is_empty():
            return
        number = self._numbers[table] + 1
        try:
            segment = self._put(table, rows, number, number)
        except OSError as error:
            raise RecordingError(
                f"cannot write to {self.path}: {error.strerror};"
                " what was recorded until then is in it, unless it was removed"
            ) from error
        self._numbers[table] = number
        self.rows[table] += len(rows)
        chunk = self.chunks[-1]
        chunk.rows[table] += len(rows)
        chunk.segments[table] += 1
        self._merge(table, segment)

    def _put(self, table: str, rows: pl.DataFrame, first: int, last: int) -> Segment:
        """Write a segment for these numbers; an OSError leaves everything as it was."""
        content = BytesIO()
        # The smallest and largest payload tell nobody anything, and cost a fifth of the encoding.
        rows.write_parquet(
            content, compression="zstd", compression_level=1, statistics=table != "messages"
        )
        data = content.getbuffer()
        self.make_room(_blocks(len(data)))
        crc32 = zlib.crc32(data)
        name = segment_name(first, last, crc32)
        folder = self.path / table
        part = folder / f".{name}.part"
        try:
            with open(part, "xb", opener=_private) as stream:
                stream.write(data)
            part.rename(folder / name)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
        self.bytes_on_disk += len(data)
        chunk = self.chunks[-1]
        chunk.files[folder / name] = None
        chunk.disk_bytes += _blocks(len(data))
        return Segment(folder / name, first, last, crc32, len(data))

    def _merge(self, table: str, segment: Segment, level: int = 0) -> None:
        """Make one segment of those that now should be one; if that fails, they stay as they are."""
        chunk = self.chunks[-1]
        parts = chunk.neighbours[table].add(segment, level)
        if not parts:
            return
        try:
            merged = self._put(table, merge(parts), parts[0].number, parts[-1].last)
        except (OSError, ScopeError):
            chunk.neighbours[table].part(level)
            return
        chunk.merged.append(Merged(merged, parts, time.monotonic() + KEPT_SECONDS))
        self._merge(table, merged, level + 1)

    def remove_parts(self, *, every: bool = False) -> None:
        """Remove segments that another stands for: since a while, or `every` one.

        What cannot be removed stays; readers pass over it.
        """
        for chunk in self.chunks:
            while chunk.merged and (every or chunk.merged[0].due <= time.monotonic()):
                merged = chunk.merged.popleft()
                try:
                    _flush(merged.segment.file)
                except OSError:  # the disk fails: then its parts are the only ones that are sure
                    continue
                for part in merged.parts:
                    with suppress(OSError):
                        part.file.unlink()
                        self.bytes_on_disk -= part.size_bytes
                        chunk.disk_bytes -= _blocks(part.size_bytes)
                        del chunk.files[part.file]

    @property
    def disk_bytes(self) -> int:
        """What the segments take on the disk, in whole blocks."""
        return sum(chunk.disk_bytes for chunk in (*self.chunks, self._dropped) if chunk)

    def begin_chunk(self, began_ns: int) -> None:
        """From here on, nothing refers to what was written before."""
        self.chunks.append(Chunk(began_ns, time.monotonic()))

    def note(self, sentence: str) -> None:
        """Add a sentence to meta.json when it is written next."""
        self.meta = replace(self.meta, notes=[*self.meta.notes, sentence])

    def drop_chunk(self, lost: dict[str, int], use: RecorderUse) -> None:
        """Drop the oldest chunk, of two or more; its files go later, with remove_dropped() or the next one.

        meta.json says so first, and waits for the disk: what it names is there whatever happens.

        Raises:
            RecordingError: meta.json could not be written, or a segment not be removed.
        """
        self.remove_dropped()
        chunk = self.chunks.popleft()
        for table, rows in chunk.rows.items():
            self.rows[table] -= rows
        self._dropped_rows += chunk.rows
        self._dropped_segments += chunk.segments
        self.meta = replace(self.meta, dropped_until_ns=self.chunks[0].began_ns)
        self.write_meta(lost, use, durable=True)
        self._dropped, self._dropped_due = chunk, time.monotonic() + KEPT_SECONDS

    def remove_dropped(self, *, only_due: bool = False) -> bool:
        """Remove the files of what was dropped last; returns whether there were any.

        Args:
            only_due: not before readers have had their time.

        Raises:
            RecordingError: one could not be removed.
        """
        chunk = self._dropped
        if chunk is None or (only_due and time.monotonic() < self._dropped_due):
            return False
        self._dropped = None
        for file in chunk.files:
            try:
                self.bytes_on_disk -= file.stat().st_size
                file.unlink()
            except FileNotFoundError:
                continue  # somebody was faster
            except OSError as error:
                raise RecordingError(
                    f"cannot remove {file}: {error.strerror}; the quota cannot be kept"
                ) from error
        return True

    def write_meta(
        self,
        lost: dict[str, int],
        use: RecorderUse,
        *,
        ended_ns: int | None = None,
        complete: bool = False,
        durable: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Write meta.json anew, with the counts so far.

        Args:
            lost: lost events by table, with `tasks` for threads that were not taken up.
            use: what recording took so far.
            ended_ns: when recording ended; None while it goes on.
            complete: everything that was drained is in the tables.
            durable: wait until it would survive a power cut, as at the end.
            notes: sentences to add.

        Raises:
            RecordingError: it could not be written.
        """
        counts = {
            table: TableCount(
                rows=self.rows[table],
                lost=lost.get(table, 0),
                dropped=self._dropped_rows[table],
                first_segment=self._dropped_segments[table] + 1,
            )
            for table in self.rows
        }
        counts["payloads"] = TableCount(rows=0, lost=lost.get("payloads", 0))
        self.meta = replace(
            self.meta,
            tables=counts,
            lost_tasks=lost.get("tasks", 0),
            recorder=use,
            ended_ns=ended_ns,
            complete=complete,
            notes=[*self.meta.notes, *notes],
        )
        write_meta(self.path, self.meta, durable=durable or ended_ns is not None)

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=DIRECTORY_MODE)
        except OSError as error:
            raise RecordingError(
                f"cannot create {folder}: {error.strerror}; choose another place with -o"
            ) from error


def _blocks(size_bytes: int) -> int:
    """What a file of this size takes on the disk."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _flush(file: Path) -> None:
    """Wait until a file would survive a power cut; its name is written before what is removed after it."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    """An opener for files that only their owner may read."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
