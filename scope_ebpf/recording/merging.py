"""Small segments, put together while a recording goes on: to open a file costs more than to read a few rows.

Of an hour each table has four thousand segments, most with few rows. So FAN neighbours become one, and FAN of
those again, as long as it stays small. The new segment is written aside and renamed like every other, and its
name tells which numbers it stands for: from then on readers pass over the old ones, which stay for a while,
for readers that found them before. So nothing is lost whenever the recorder ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from scope_ebpf.recording.segments import Segment, reading, scan, verify_bytes

FAN = 32
# Together; what is larger is as quickly read in its parts.
MOST_BYTES = 2 << 20


@dataclass
class Neighbours:
    """Segments of a table, one after the other, that may become one: by how often they did already."""

    levels: list[list[Segment]] = field(default_factory=list)

    def add(self, segment: Segment, level: int = 0) -> list[Segment]:
        """Take the next segment of a level; returns those that now should become one of the next level."""
        if level == len(self.levels):
            self.levels.append([])
        group = self.levels[level]
        group.append(segment)
        if len(group) < FAN:
            return []
        self.levels[level] = []
        if sum(part.size_bytes for part in group) <= MOST_BYTES:
            return group
        self.part(level)
        return []

    def part(self, level: int) -> None:
        """A group of this level stays as it is: what came before is no neighbour of what comes."""
        for above in self.levels[level + 1 :]:
            above.clear()


@dataclass(frozen=True)
class Merged:
    """A segment that stands for others, which may go after a while."""

    segment: Segment
    parts: Sequence[Segment]
    due: float  # of time.monotonic()


def merge(parts: Sequence[Segment]) -> pl.DataFrame:
    """The rows of the segments in their order.

    Raises:
        FormatError, RecordingError: one is not what was written: it must not get a checksum that fits.
    """
    verify_bytes(parts, complete=False)
    with reading(str(parts[0].file.parent)):
        schema = pl.scan_parquet(parts[0].file, glob=False).collect_schema()
        return scan(parts, schema).collect()
