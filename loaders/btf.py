"""BTF, the type information in a BPF object: record layouts, constants and where globals lie.

Format: Documentation/bpf/btf.rst in the Linux source. Only what events.h needs is understood: integers,
enums, arrays, structs without bit fields, typedefs, qualifiers, variables and data sections.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import ElfObject

MAGIC = 0xEB9F
MAX_DEPTH = 32

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)

# Bytes after the 12-byte type header: (fixed, per member), by kind.
TRAILERS = {
    INT: (4, 0),
    PTR: (0, 0),
    ARRAY: (12, 0),
    STRUCT: (0, 12),
    UNION: (0, 12),
    ENUM: (0, 8),
    FWD: (0, 0),
    TYPEDEF: (0, 0),
    VOLATILE: (0, 0),
    CONST: (0, 0),
    RESTRICT: (0, 0),
    FUNC: (0, 0),
    FUNC_PROTO: (0, 8),
    VAR: (4, 0),
    DATASEC: (0, 12),
    FLOAT: (0, 0),
    DECL_TAG: (4, 0),
    TYPE_TAG: (0, 0),
    ENUM64: (0, 12),
}
TRANSPARENT = {TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG}


HEADER = struct.Struct("<HBBIIIII")
TYPE = struct.Struct("<III")


@dataclass(frozen=True)
class BtfType:
    """One type: its kind, name, size or referred type, and the raw bytes of its members."""

    kind: int
    name: str
    size_or_type: int
    count: int
    body: bytes
    kind_flag: bool


class Btf:
    """All types of one BTF section; ids count from 1 as in the format."""

    def __init__(self, types: list[BtfType], strings: bytes) -> None:
        """Index the types by kind and name; the first of a name counts."""
        self.types = types
        self._strings = strings
        self._by_name: dict[tuple[int, str], BtfType] = {}
        self._dtypes: dict[str, np.dtype[np.void]] = {}
        for entry in types:
            if entry.name:
                self._by_name.setdefault((entry.kind, entry.name), entry)

    @classmethod
    def from_object(cls, path: Path) -> "Btf":
        """Parse the .BTF section of an ELF object.

        Raises:
            FormatError: the file is not an ELF object, or its BTF is missing or damaged.
        """
        return cls.from_bytes(ElfObject(path).section(".BTF"), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "Btf":
        """Parse the content of a .BTF section.

        Raises:
            FormatError: the bytes are not little-endian BTF as this reader knows it.
        """
        try:
            magic, version, _, header_bytes, type_at, type_bytes, name_at, name_bytes = (
                HEADER.unpack_from(data)
            )
            if magic != MAGIC or version != 1:
                raise ValueError("it does not begin as little-endian BTF of version 1")
            type_at, name_at = header_bytes + type_at, header_bytes + name_at
            if max(type_at + type_bytes, name_at + name_bytes) > len(data):
                raise ValueError("its header points outside of the section")
            strings = data[name_at : name_at + name_bytes]
            return cls(_parse_types(data[type_at : type_at + type_bytes], strings), strings)
        except (struct.error, ValueError) as error:
            raise FormatError(
                f"cannot read the BTF of {source}: {error}; build the probes anew with `make build`"
            ) from error

    def find(self, kind: int, name: str) -> BtfType:
        """The type of that kind and name.

        Raises:
            FormatError: there is none.
        """
        entry = self._by_name.get((kind, name))
        if entry is None:
            raise FormatError(
                f"the object's BTF has no type {name!r}: it was built from other sources;"
                " run `make build`"
            )
        return entry

    def record_dtype(self, name: str) -> np.dtype[np.void]:
        """The numpy dtype of a struct: one field per member, char arrays as bytes.

        Raises:
            FormatError: the struct is missing, or has a member that numpy cannot show.
        """
        return self._struct_dtype(name, 0)

    def _struct_dtype(self, name: str, depth: int) -> np.dtype[np.void]:
        # remembered: two members of each struct that is the next one would else take 2**depth steps
        if name in self._dtypes:
            return self._dtypes[name]
        entry = self.find(STRUCT, name)
        names: list[str] = []
        formats: list[np.dtype[np.generic]] = []
        offsets: list[int] = []
        for member in range(entry.count):
            name_offset, type_id, offset = struct.unpack_from("<III", entry.body, member * 12)
            if entry.kind_flag or offset % 8:
                raise FormatError(f"struct {name} has a bit field, which records must not have")
            names.append(self._name(name_offset))
            formats.append(self._member_dtype(type_id, depth))
            offsets.append(offset // 8)
        try:
            self._dtypes[name] = np.dtype(
                {
                    "names": names,
                    "formats": formats,
                    "offsets": offsets,
                    "itemsize": entry.size_or_type,
                }
            )
        except (ValueError, TypeError, OverflowError) as error:
            raise FormatError(f"struct {name} has an impossible layout: {error}") from error
        return self._dtypes[name]

    def enum_values(self, name: str) -> dict[str, int]:
        """The constants of an enum, by name.

        Raises:
            FormatError: there is no such enum.
        """
        entry = self.find(ENUM, name)
        layout = "<Ii" if entry.kind_flag else "<II"
        pairs = (struct.unpack_from(layout, entry.body, i * 8) for i in range(entry.count))
        return {self._name(offset): value for offset, value in pairs}

    def variables(self) -> dict[str, BtfType]:
        """The type of each global variable, by the variable's name, in the order of the BTF."""
        return {
            entry.name: self._type(entry.size_or_type) for entry in self.types if entry.kind == VAR
        }

    def _name(self, offset: int) -> str:
        try:
            return _string(self._strings, offset)
        except ValueError as error:
            raise FormatError(f"the BTF is damaged: {error}") from error

    def _type(self, number: int) -> BtfType:
        if not 1 <= number <= len(self.types):
            raise FormatError(f"the BTF refers to type {number} of {len(self.types)}")
        return self.types[number - 1]

    def _member_dtype(self, number: int, depth: int) -> np.dtype[np.generic]:
        entry = self._type(number)
        if depth > MAX_DEPTH:
            raise FormatError("the BTF has a type that refers to itself")
        if entry.kind in TRANSPARENT:
            return self._member_dtype(entry.size_or_type, depth + 1)
        if entry.kind == INT and entry.size_or_type in (1, 2, 4, 8):
            (encoding,) = struct.unpack("<I", entry.body)
            sign = "i" if (encoding >> 24) & 1 else "u"
            return np.dtype(f"<{sign}{entry.size_or_type}")
        if entry.kind == ENUM and entry.size_or_type in (1, 2, 4, 8):
            return np.dtype(f"<u{entry.size_or_type}")
        if entry.kind == STRUCT:
            return self._struct_dtype(entry.name, depth + 1)
        if entry.kind == ARRAY:
            element, _, count = struct.unpack("<III", entry.body)
            inner = self._member_dtype(element, depth + 1)
            try:
                if inner.itemsize == 1:
                    return np.dtype(f"V{count}") if count else np.dtype("V1")
                return np.dtype((inner, (count,)))
            except (ValueError, TypeError, OverflowError) as error:
                raise FormatError(f"the BTF has an impossible array: {error}") from error
        raise FormatError(f"a record has a member of a kind ({entry.kind}) that numpy cannot show")


def _string(strings: bytes, offset: int) -> str:
    """The zero-ended string at that offset."""
    end = strings.find(b"\0", offset)
    if offset >= len(strings) or end < 0:
        raise ValueError(f"a name lies outside of its strings (offset {offset})")
    return strings[offset:end].decode()


def _parse_types(data: bytes, strings: bytes) -> list[BtfType]:
    """Split the type section into its types."""
    types: list[BtfType] = []
    at = 0
    while at < len(data):
        name, info, size_or_type = TYPE.unpack_from(data, at)
        at += TYPE.size
        kind, count = (info >> 24) & 0x1F, info & 0xFFFF
        if kind not in TRAILERS:
            raise ValueError(f"type {len(types) + 1} is of the unknown kind {kind}")
        fixed, per_member = TRAILERS[kind]
        length = fixed + per_member * count
        if at + length > len(data):
            raise ValueError(f"type {len(types) + 1} ends outside of the section")
        types.append(
            BtfType(
                kind,
                _string(strings, name),
                size_or_type,
                count,
                data[at : at + length],
                bool(info >> 31),
            )
        )
        at += length
    return types
