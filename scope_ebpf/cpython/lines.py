"""Line numbers from the tables that CPython's compiler leaves in code objects.

Three formats, by version; in the CPython sources Objects/lnotab_notes.txt (3.8-3.10) and
Objects/locations.md (3.11, later InternalDocs/code_objects.md) describe them:

- co_lnotab (up to 3.9): pairs of an unsigned byte that adds to the offset and a signed one that adds to
  the line. It tells where lines begin, and not where the code ends.
- co_linetable of 3.10 (PEP 626): pairs of a range's length in bytes and a signed change of the line,
  -128: the range has no line.
- co_linetable from 3.11 on (PEP 657): entries whose first byte has its top bit set, 4 bits of kind and
  3 of length in code units; lines are signed variable-length integers, columns follow and are skipped.

An offset is what a frame holds: which instruction is the current one is settled there, so nothing is
added or taken away here. The result is that of PyCode_Addr2Line, which makes a traceback's lines.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

VERSION_3_10 = 0x030A
VERSION_3_11 = 0x030B
CODE_UNIT_BYTES = 2
# _PyCodeLocationInfoKind, Include/internal/pycore_code.h; the kinds 0 to 9 leave the line as it is
_ONE_LINE_0 = 10
_NO_COLUMNS = 13
_LONG = 14
_NO_LINE = 15
# lines above any source: a table of garbage must not make numbers that nothing can store
_MOST_LINE = 0x7FFFFFFF


class LineTable(NamedTuple):
    """Ranges of a code object's bytecode that belong to one line."""

    starts: tuple[int, ...]  # in bytes, ascending; the last one is the end of what is known
    lines: tuple[int | None, ...]  # of the range from the same start on; None: none, or not known


def line_of(
    offset: int,
    first_line: int,
    lines: bytes,
    version: int,
    first_instruction: int,
    *,
    whole: bool = True,
) -> int | None:
    """The line at which a frame stands, None if it has none or the table does not reach so far.

    Args:
        offset: as in the column `offsets` of stacks: from 3.11 on the distance in bytes from the code
            object to the frame's instruction pointer, before that f_lasti, unsigned or not.
        first_line: co_firstlineno.
        lines: co_linetable, or co_lnotab up to 3.9, or the beginning of one.
        version: of CPython, such as 0x030b.
        first_instruction: offset of the bytecode in the code object, before 3.11 unused.
        whole: False if `lines` is only the beginning. It matters up to 3.9, whose table does not tell
            where it ends.

    Tables are kept decoded, so the same code object costs a search only.

    >>> line_of(0x030B, 7, bytes([0x80, 0, 0xD8, 4, 8]), 0x030B, 0x030B), 7
    (7, 7)
    >>> line_of(2, 1, bytes([2, 1, 4, 1]), 0x0309, 0), line_of(2, 1, bytes([4, 1, 4, 1]), 0x030A, 0)
    (2, 3)
    """
    if version >= VERSION_3_11:
        position = offset - first_instruction
    else:
        position = offset - 2**32 if offset >= 2**31 else offset
        if version == VERSION_3_10:
            position *= CODE_UNIT_BYTES
    # a frame that has not begun: PyCode_Addr2Line says the first line (up to 3.9: by its table)
    if position < 0:
        return first_line
    table = line_table(lines, first_line, version, whole)
    index = bisect_right(table.starts, position) - 1
    return table.lines[index]


@lru_cache(maxsize=1 << 15)
def line_table(lines: bytes, first_line: int, version: int, whole: bool = True) -> LineTable:
    """All that a table says; offsets are those of the bytecode, in bytes, in every version.

    >>> line_table(bytes([2, 1, 4, 1]), 1, 0x0309)
    LineTable(starts=(0, 2, 6), lines=(1, 2, 3))
    >>> line_table(bytes([2, 1, 4, 0x80]), 1, 0x030A)
    LineTable(starts=(0, 2, 6), lines=(2, None, None))
    """
    if version >= VERSION_3_11:
        return _locations(lines, first_line)
    if version == VERSION_3_10:
        return _line_ranges(lines, first_line)
    return _lnotab(lines, first_line, whole)


def _lnotab(lines: bytes, line: int, whole: bool) -> LineTable:
    starts, numbers = [0], [line]
    position = 0
    for index in range(0, len(lines) - 1, 2):
        position += lines[index]
        line += _signed(lines[index + 1])
        if lines[index]:
            starts.append(position)
            numbers.append(line)
        else:
            numbers[-1] = line  # further steps of the same place
    known: list[int | None] = [*map(_plausible, numbers)]
    if not whole or len(lines) % 2:
        known[-1] = None  # the next pair may belong to the same place, and its end is not known
    return LineTable(tuple(starts), tuple(known))


def _line_ranges(lines: bytes, line: int) -> LineTable:
    starts: list[int] = []
    numbers: list[int | None] = []
    end = 0
    for index in range(0, len(lines) - 1, 2):
        change = _signed(lines[index + 1])
        if change != -128:
            line += change
        if lines[index]:
            starts.append(end)
            numbers.append(None if change == -128 else _plausible(line))
        end += lines[index]
    return _ended(starts, numbers, end)


def _locations(lines: bytes, line: int) -> LineTable:
    starts: list[int] = []
    numbers: list[int | None] = []
    end = index = 0
    while index < len(lines):
        first = lines[index]
        kind = first >> 3 & 15
        index += 1
        change = 0
        if kind in (_NO_COLUMNS, _LONG):
            number = shift = 0
            while index < len(lines):
                byte = lines[index]
                index += 1
                number |= (byte & 63) << shift
                shift += 6
                if not byte & 64:
                    break
            else:
                break  # the number is cut off
            change = -(number >> 1) if number & 1 else number >> 1
        elif _ONE_LINE_0 <= kind < _NO_COLUMNS:
            change = kind - _ONE_LINE_0
        line += change
        starts.append(end)
        numbers.append(None if kind == _NO_LINE else _plausible(line))
        end += ((first & 7) + 1) * CODE_UNIT_BYTES
        while index < len(lines) and not lines[index] & 128:
            index += 1
    return _ended(starts, numbers, end)


def _ended(starts: list[int], numbers: list[int | None], end: int) -> LineTable:
    """With a range without a line at the end; there is always one that begins at 0."""
    return LineTable((*starts, end), (*numbers, None))


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _plausible(line: int) -> int | None:
    return line if 0 <= line <= _MOST_LINE else None
