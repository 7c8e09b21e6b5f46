"""What BCC says of the struct that a program submits, as a numpy dtype and the columns of a table.

BCC names each field's type as the source does ("pid_t", "char[16]"), but not its place: the places are
what the C compiler makes of their alignment. So a packed struct, or one with bit fields, is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scope_ebpf.errors import UsageError

# By name in C: the numpy type. What kernel headers and BCC's own tools use.
_UNSIGNED = {
    1: "unsigned char|u8|__u8|uint8_t|u_char",
    2: "unsigned short|unsigned short int|u16|__u16|uint16_t|__be16|__le16|umode_t|sa_family_t|ushort",
    4: "unsigned|unsigned int|u32|__u32|uint32_t|__be32|__le32|uid_t|gid_t|dev_t|uint|__wsum|fmode_t",
    8: "unsigned long|unsigned long int|unsigned long long|unsigned long long int|u64|__u64|uint64_t"
    "|size_t|uintptr_t|__be64|__le64|ino_t|sector_t|ulong",
}
_SIGNED = {
    1: "char|signed char|s8|__s8|int8_t",
    2: "short|short int|s16|__s16|int16_t",
    4: "int|signed int|s32|__s32|int32_t|pid_t|clockid_t",
    8: "long|long int|long long|long long int|s64|__s64|int64_t|ssize_t|loff_t|off_t|ktime_t|time_t",
}
TYPES = {
    **{name: f"<u{size}" for size, names in _UNSIGNED.items() for name in names.split("|")},
    **{name: f"<i{size}" for size, names in _SIGNED.items() for name in names.split("|")},
    "bool": "?",
    "_Bool": "?",
}
COLUMNS = {
    "?": "Boolean",
    **{f"<{kind}{size}": f"{word}{8 * size}" for kind, word in (("u", "UInt"), ("i", "Int"))
       for size in (1, 2, 4, 8)},
}  # fmt: skip
COLUMNS |= {"<u1": "UInt8", "<i1": "Int8"}
TIME = "time_ns"

_ARRAY = re.compile(r"(.*?) ?((?:\[\d+\])*)$")
_COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_PACKED = re.compile(r"\bpacked\b|\b__packed\b")
_BIT_FIELD = re.compile(r"\b\w+\s+\w+\s*:\s*\d+\s*;")


@dataclass(frozen=True)
class OwnTable:
    """A table that a program of the user's fills.

    Attributes:
        name: in the recording.
        source: the program's file.
        output: name of the map in it.
        dtype: a record as the program submits it.
        columns: the table's columns: name and polars type, such as UInt32, String, List(UInt8).
    """

    name: str
    source: str
    output: str
    dtype: np.dtype[Any]
    columns: tuple[tuple[str, str], ...]


def own_table(
    name: str, source: str, output: str, fields: Sequence[str], *, timed: bool
) -> OwnTable:
    """A table from the fields that BCC tells, each as `name#type`.

    Args:
        name: of the table.
        source: the program's file name.
        output: the map's name.
        fields: of the struct that is submitted.
        timed: the kernel says when each record was submitted: the first column, unless the struct has it.

    Raises:
        UsageError: a field has a type that no column can have.

    >>> own_table("p_events", "p.c", "events", ["tid#u32", "comm#char[16]"], timed=True).columns
    (('time_ns', 'Int64'), ('tid', 'UInt32'), ('comm', 'String'))
    """
    if not fields:
        raise UsageError(
            f"{source}: nothing is submitted to {output}, or what is submitted is no struct; define one,"
            " and give its address to perf_submit() or ringbuf_output()"
        )
    parts = [field.partition("#") for field in fields]
    described = [(field, *_describe(source, output, field, kind)) for field, _, kind in parts]
    dtype = np.dtype([(field, *form) for field, form, _ in described], align=True)
    columns = [(field, "Int64" if field == TIME and column == "UInt64" else column)
               for field, _, column in described]  # fmt: skip
    if timed and TIME not in dict(columns):
        columns.insert(0, (TIME, "Int64"))
    return OwnTable(name, source, output, dtype, tuple(columns))


def _describe(source: str, output: str, field: str, kind: str) -> tuple[tuple[Any, ...], str]:
    """The numpy type of a field, perhaps with a shape, and the type of its column."""
    match = _ARRAY.fullmatch(kind.strip())
    assert match is not None
    element = " ".join(word for word in match[1].split() if word not in ("const", "volatile"))
    shape = tuple(map(int, re.findall(r"\d+", match[2])))
    if element.endswith("*"):
        form = "<u8"
    elif element.startswith("enum "):
        form = "<i4"
    elif element in ("__int128", "unsigned __int128"):
        raise _no_column(source, output, field, kind)
    elif element in TYPES:
        form = TYPES[element]
    else:
        raise _no_column(source, output, field, kind)
    if not shape:
        return (form,), COLUMNS[form]
    if element == "char" and len(shape) <= 2 and 0 not in shape:
        text = f"S{shape[-1]}"
        return ((text,), "String") if len(shape) == 1 else ((text, shape[:1]), "List(String)")
    if len(shape) > 1 or 0 in shape:
        raise _no_column(source, output, field, kind)
    return (form, shape), f"List({COLUMNS[form]})"


def _no_column(source: str, output: str, field: str, kind: str) -> UsageError:
    return UsageError(
        f"{source}: the field {field} of what is submitted to {output} is {kind}, for which there is no"
        " column; submit integers, char[N], and arrays of integers"
    )


def plain_code(text: str) -> str:
    """C source without its comments, line for line."""
    return _COMMENTS.sub(lambda match: " " + "\n" * match[0].count("\n"), text)


def check_layout(source: str, code: str) -> None:
    """Refuse what would put fields elsewhere than BCC lets us know.

    Raises:
        UsageError: a struct is packed or has bit fields.
    """
    for found, what in ((_PACKED, "is packed"), (_BIT_FIELD, "has bit fields")):
        if match := found.search(code):
            line = code.count("\n", 0, match.start()) + 1
            raise UsageError(
                f"{source}:{line}: a struct {what}, and BCC does not tell where its fields are; use whole"
                " integers in their natural places"
            )
