"""Probes as users ask for them: `usdt:PATH:PROVIDER:NAME`, `uprobe:PATH:SYMBOL(int, str)`, …

Apart from the rest so that the command line can refuse a misspelt one before it needs numpy, root or the
file. Whether the file has such a probe is found out by loaders/hits.py.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scope_ebpf.errors import UsageError

Where = Literal["usdt", "uprobe", "uretprobe"]
Form = Literal["number", "pointer", "boolean", "float", "text", "sql", "name"]
WHERE: tuple[Where, ...] = ("usdt", "uprobe", "uretprobe")
FORMS = {
    "usdt": "usdt:/path/of/file:provider:name",
    "uprobe": "uprobe:/path/of/file:symbol(int, str)",
    "uretprobe": "uretprobe:/path/of/file:symbol(int)",
}


@dataclass(frozen=True)
class ArgumentType:
    """How an argument is read and shown.

    Attributes:
        form: numbers are decimal, pointers hexadecimal. A text is masked as payloads are, an SQL text only
            in its literals, and a name is stored as it is.
        size_bytes: in the register or memory; of a text: of its address.
        signed: whether the highest bit is the sign.
    """

    form: Form
    size_bytes: int = 8
    signed: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it is the address of a zero-ended string."""
        return self.form in ("text", "sql", "name")


def _number(size_bytes: int, signed: bool) -> ArgumentType:
    return ArgumentType("number", size_bytes, signed)


TYPES = {
    "str": ArgumentType("text"),
    "sql": ArgumentType("sql"),
    "name": ArgumentType("name"),
    "ptr": ArgumentType("pointer"),
    "bool": ArgumentType("boolean", 1),
    "char": _number(1, True),
    "uchar": _number(1, False),
    "short": _number(2, True),
    "ushort": _number(2, False),
    "int": _number(4, True),
    "uint": _number(4, False),
    "long": _number(8, True),
    "ulong": _number(8, False),
    "size_t": _number(8, False),
    **{f"i{8 * size}": _number(size, True) for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": _number(size, True) for size in (1, 2, 4, 8)},
    **{f"u{8 * size}": _number(size, False) for size in (1, 2, 4, 8)},
    "f32": ArgumentType("float", 4),
    "f64": ArgumentType("float", 8),
}
MOST_ARGUMENTS, MOST_TEXTS = 8, 4  # as in records.PythonLimits, which needs numpy


@dataclass(frozen=True)
class ProbeSpec:
    """A probe that a user asked for.

    Attributes:
        text: as it was written.
        where: what kind of place it is at.
        path: the file.
        provider, name: of a USDT probe; of others the provider is empty and the name is the symbol, which
            is empty for an address.
        offset: bytes from the symbol, or with an empty name the address in the file's own numbers.
        types: of the arguments, or of the result; None: not told.
    """

    text: str
    where: Where
    path: Path
    provider: str
    name: str
    offset: int = 0
    types: tuple[ArgumentType, ...] | None = None

    @property
    def label(self) -> str:
        """Its name in the table of hits."""
        if self.where == "usdt":
            return f"{self.provider}:{self.name}"
        place = self.name or f"{self.offset:#x}"
        if self.name and self.offset:
            place += f"+{self.offset:#x}"
        return f"{self.path.name}:{place}" + (":return" if self.where == "uretprobe" else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause with the names that are like this one; empty if none is.

    >>> did_you_mean("gc__dome", ["gc__start", "gc__done", "line"])
    '; did you mean gc__done?'
    """
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def parse_probe(text: str) -> ProbeSpec:
    """Read what a user wrote.

    Raises:
        UsageError: it is no probe, with what is wrong.

    >>> spec = parse_probe("uprobe:/usr/lib/libz.so.1:deflate(ptr, int)")
    >>> spec.label, [kind.form for kind in spec.types or ()]
    ('libz.so.1:deflate', ['pointer', 'number'])
    >>> parse_probe("usdt:/usr/bin/python3.11:python:gc__start").label
    'python:gc__start'
    """
    where, colon, rest = text.strip().partition(":")
    if where not in FORMS or not colon:
        forms = " or ".join(FORMS.values())
        raise UsageError(f"{text!r} is no probe{did_you_mean(where, FORMS)}; write {forms}")
    kind = next(each for each in WHERE if each == where)
    place, types = _split_types(text, rest)
    path, names = _split_path(text, place, 2 if kind == "usdt" else 1)
    if kind == "usdt":
        return ProbeSpec(text, kind, path, names[0], names[1], 0, types)
    if types is not None and kind == "uretprobe" and len(types) > 1:
        raise UsageError(f"{text!r}: a function has one result; give one type, such as (int)")
    name, offset = _symbol(text, names[0])
    if kind == "uretprobe" and (offset or not name):
        raise UsageError(
            f"{text!r}: only a whole function returns; give its name without an offset, or use uprobe"
        )
    return ProbeSpec(text, kind, path, "", name, offset, types)


def _split_types(text: str, rest: str) -> tuple[str, tuple[ArgumentType, ...] | None]:
    """What stands before the brackets, and the types within; None without brackets."""
    match = re.fullmatch(r"(?s)([^(]*)(?:\(([^()]*)\))?\s*", rest)
    if match is None:
        raise UsageError(
            f"{text!r}: the types of arguments are written at its end, like (int, str)"
        )
    place, inside = match[1], match[2]
    if inside is None:
        return place, None
    names = [name.strip() for name in inside.split(",")] if inside.strip() else []
    for name in names:
        if name not in TYPES:
            raise UsageError(
                f"{text!r}: there is no type {name!r}{did_you_mean(name, TYPES)};"
                f" choose from {', '.join(TYPES)}"
            )
    types = tuple(TYPES[name] for name in names)
    if len(types) > MOST_ARGUMENTS:
        raise UsageError(
            f"{text!r}: {MOST_ARGUMENTS} arguments are recorded at most; give fewer types"
        )
    if sum(one.is_text for one in types) > MOST_TEXTS:
        raise UsageError(f"{text!r}: {MOST_TEXTS} texts are recorded at most; make others ptr")
    return place, types


def _split_path(text: str, place: str, count: int) -> tuple[Path, list[str]]:
    """The file, which may have colons in its name, and `count` names behind it."""
    parts = place.split(":")
    names = parts[len(parts) - count :]
    path = ":".join(parts[: len(parts) - count])
    if not path or not all(names) or any("/" in name for name in names):
        form = FORMS[text.strip().partition(":")[0]]
        raise UsageError(f"{text!r} does not name a file and a place in it; write {form}")
    return Path(path), names


def _symbol(text: str, name: str) -> tuple[str, int]:
    """`symbol`, `symbol+0x12` or `0x1234`."""
    match = re.fullmatch(r"(?:([^+]+)\+)?(0x[0-9a-fA-F]+|[0-9]+)", name)
    if match is None:
        if "+" in name:
            raise UsageError(f"{text!r}: behind + an offset is expected, like +0x12")
        return name, 0
    if match[1] is None and not match[2].startswith("0x"):
        raise UsageError(f"{text!r}: {name} is no symbol; an address is written like 0x{name}")
    return match[1] or "", int(match[2], 0)
