"""Files that hold a CPython: a program or a libpython, and what of them a process's layout needs.

Only the headers and a few pages of the symbol tables are read: what an ELF file says about its dynamic
symbols, found through its hash table as the dynamic linker does it.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scope_ebpf.cpython import debug_offsets
from scope_ebpf.cpython.offsets import Version
from scope_ebpf.errors import FormatError

X86_64: Final = 62  # e_machine
EXECUTABLE: Final = 2  # e_type: loaded at the addresses in the file
PT_LOAD, PT_DYNAMIC = 1, 2
DT_NEEDED, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_SONAME = 1, 4, 5, 6, 14
DT_GNU_HASH: Final = 0x6FFFFEF5
SYMBOL: Final = struct.Struct("<IBBHQQ")
FINAL_RELEASE, CANDIDATE = 0xF, 0xC  # sys.hexversion >> 4 & 15
# How a function of a shared library ends that returns a thread-local variable: it adds the variable's
# place to what __tls_get_addr() gave it. mov disp8(%rax), %rax; disp32; none
VARIABLE: Final = re.compile(
    rb"\x48\x8b(?:\x40(.)|\x80(.{4})|\x00)(?:\x5d|\x48\x83\xc4.)?\xc3", re.S
)
# PY_VERSION, as Py_GetVersion() prints it; linkers let it be the end of another string, such as a path
NUMBER_BEFORE: Final = frozenset(bytes([byte]) for byte in b"0123456789._")  # GLIBC_2.7.5, 13.8.0
VERSION_TEXT: Final = re.compile(rb"(2\.7|3\.\d{1,2})\.(\d{1,3})(?:(a|b|rc)\d+)?\+?\0")


@dataclass(frozen=True)
class Segment:
    """A part of the file that is mapped."""

    address: int
    offset: int
    size: int
    writable: bool


class ElfFile:
    """An ELF file, mapped while it is needed."""

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            FormatError: it cannot be read, or is no 64-bit little-endian ELF file.
        """
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot read {path}: {error}") from error
        if self._data[:6] != b"\x7fELF\x02\x01" or len(self._data) < 64:
            self._data.close()
            raise FormatError(f"cannot read {path}: it is no 64-bit ELF file")
        try:
            self.type, self.machine = struct.unpack_from("<HH", self._data, 16)
            self._headers()
        except (struct.error, ValueError, IndexError) as error:
            self._data.close()
            raise FormatError(f"cannot read {path}: it is damaged") from error

    def close(self) -> None:
        """Unmap it."""
        self._data.close()

    def _headers(self) -> None:
        """Reads the program headers, and through them the dynamic section."""
        at, self._sections_at = struct.unpack_from("<QQ", self._data, 32)
        size, count, self._section_bytes, self._sections, _ = struct.unpack_from(
            "<5H", self._data, 54
        )
        self.segments: list[Segment] = []
        dynamic = (0, 0)
        for number in range(count):
            kind, flags, offset, address, _, length = struct.unpack_from(
                "<IIQQQQ", self._data, at + number * size
            )
            if kind == PT_LOAD:
                self.segments.append(Segment(address, offset, length, bool(flags & 2)))
            elif kind == PT_DYNAMIC:
                dynamic = (offset, length)
        self._dynamic: dict[int, int] = {}
        needed: list[int] = []
        start, length = dynamic
        table = self._data[start : start + length // 16 * 16]
        for tag, value in struct.iter_unpack("<QQ", table):
            if tag == DT_NEEDED:
                needed.append(value)
            self._dynamic.setdefault(tag, value)
        self._names = self._place(DT_STRTAB)
        self.needed = tuple(self._name(name) for name in needed)
        soname = self._dynamic.get(DT_SONAME)
        self.soname = b"" if soname is None else self._name(soname)

    def _place(self, tag: int) -> int:
        """Where a table that the dynamic section names is in the file; 0 if there is none."""
        address = self._dynamic.get(tag)
        return 0 if address is None else self.offset(address) or 0

    def _name(self, index: int, names: int | None = None) -> bytes:
        start = (self._names if names is None else names) + index
        return self._data[start : self._data.find(b"\0", start)]

    def offset(self, address: int) -> int | None:
        """The place in the file of an address; None if it is not in it."""
        for part in self.segments:
            if part.address <= address < part.address + part.size:
                return address - part.address + part.offset
        return None

    def read(self, address: int, size: int) -> bytes:
        """What the file has at an address; less where it ends."""
        at = self.offset(address)
        return b"" if at is None else self._data[at : at + size]

    def symbol(self, name: bytes) -> int | None:
        """The address of a symbol that the file defines and exports; None if it does not."""
        for place in self._same_hash(name):
            index, _, _, section, value, _ = SYMBOL.unpack_from(self._data, place)
            if section and self._name(index) == name:
                return int(value)
        return None

    def _same_hash(self, name: bytes) -> Iterator[int]:
        """Places in the file of dynamic symbols that may have a name."""
        symbols = self._place(DT_SYMTAB)
        if table := self._place(DT_GNU_HASH):
            yield from (symbols + SYMBOL.size * number for number in self._gnu_chain(table, name))
        elif table := self._place(DT_HASH):
            _, count = struct.unpack_from("<II", self._data, table)
            yield from (symbols + SYMBOL.size * number for number in range(count))

    def _gnu_chain(self, table: int, name: bytes) -> Iterator[int]:
        """Numbers of symbols in the chain of a name in a DT_GNU_HASH."""
        value = 5381
        for byte in name:
            value = (value * 33 + byte) & 0xFFFFFFFF
        buckets, first, words, _ = struct.unpack_from("<4I", self._data, table)
        if not buckets:
            return
        bucket_table = table + 16 + 8 * words
        (number,) = struct.unpack_from("<I", self._data, bucket_table + 4 * (value % buckets))
        chain = bucket_table + 4 * buckets
        while number >= first:
            (entry,) = struct.unpack_from("<I", self._data, chain + 4 * (number - first))
            if (entry | 1) == (value | 1):
                yield number
            if entry & 1:
                return
            number += 1

    def section(self, name: bytes) -> int | None:
        """The address of a section."""
        if not self._sections:
            return None
        (names_number,) = struct.unpack_from("<H", self._data, 62)
        names = self._section_header(names_number)[4]
        for header in self._section_headers():
            if self._name(header[0], names) == name:
                return header[3]
        return None

    def _section_header(self, number: int) -> tuple[int, ...]:
        """sh_name, sh_type, sh_flags, sh_addr, sh_offset, sh_size, sh_link."""
        return struct.unpack_from(
            "<IIQQQQI", self._data, self._sections_at + number * self._section_bytes
        )

    def _section_headers(self) -> Iterator[tuple[int, ...]]:
        return (self._section_header(number) for number in range(self._sections))

    def version_texts(self) -> set[tuple[Version, int]]:
        """What looks like PY_VERSION in the file, and which kind of release it would be."""
        levels = {b"a": 0xA, b"b": 0xB, b"rc": CANDIDATE, None: FINAL_RELEASE}
        return {
            ((int(found[1][:1]), int(found[1][2:]), int(found[2])), levels[found[3]])
            for part in self.segments
            if not part.writable
            for found in VERSION_TEXT.finditer(self._data, part.offset, part.offset + part.size)
            if self._data[found.start() - 1 : found.start()] not in NUMBER_BEFORE
        }


@dataclass(frozen=True)
class PythonBinary:
    """A file that has a CPython in it.

    Attributes:
        version: major, minor, micro; None if it does not tell.
        refusal: why it cannot be looked into; empty if it can.
        executable: it is loaded at the addresses in the file.
        segments: its parts that are mapped.
        runtime: the address of _PyRuntime in the file.
        runtime_data: how the file has the beginning of _PyRuntime.
        context_type: the address of PyContext_Type; None: it is not exported.
        dict_type: the address of PyDict_Type; None: it is not exported.
        gilstate: the first bytes of PyGILState_GetThisThreadState.
        gilstate_address: their address; None: it is not exported.
        gilstate_distance: of the thread-local variable that it returns, from the one with the thread state
            that runs; None: not known.
    """

    version: Version | None
    refusal: str
    executable: bool = False
    segments: tuple[Segment, ...] = ()
    runtime: int = 0
    runtime_data: bytes = b""
    context_type: int | None = None
    dict_type: int | None = None
    gilstate: bytes = b""
    gilstate_address: int | None = None
    gilstate_distance: int | None = None

    def bias(self, start: int, offset: int) -> int:
        """What to add to an address in the file, where a mapping at `start` has its `offset`."""
        if self.executable:
            return 0
        for part in self.segments:
            if part.offset // 4096 * 4096 <= offset < part.offset + part.size:
                return start - offset - (part.address - part.offset)
        return start - offset


@dataclass(frozen=True)
class OtherBinary:
    """A file with no CPython in it.

    Attributes:
        needs_python: it is linked with a libpython, which the dynamic linker maps before it starts.
    """

    needs_python: bool


def read_binary(path: Path) -> PythonBinary | OtherBinary:
    """What a file is.

    Raises:
        FormatError: it cannot be read, or is no ELF file.
    """
    file = ElfFile(path)
    try:
        return _read_binary(file, path)
    except (struct.error, ValueError, IndexError) as error:
        raise FormatError(f"cannot read {path}: it is damaged") from error
    finally:
        file.close()


def _read_binary(file: ElfFile, path: Path) -> PythonBinary | OtherBinary:
    runtime = file.symbol(b"_PyRuntime")
    if runtime is None and file.symbol(b"Py_Initialize") is None:
        # a program that exports nothing still has the section (Python/pylifecycle.c, from 3.10 on)
        runtime = file.section(b".PyRuntime")
        if runtime is None:
            return OtherBinary(any(name.startswith(b"libpython") for name in file.needed))
    version, level = _version(file, runtime, path)
    if version is None:
        return PythonBinary(None, "it does not tell its version")
    refusal = ""
    if file.machine != X86_64:
        refusal = "it is built for another machine than x86-64"
    elif runtime is None or version < (3, 7):
        refusal = f"it is Python {'.'.join(map(str, version))}; 3.8 is the oldest that is supported"
    elif level not in (FINAL_RELEASE, CANDIDATE):
        refusal = f"it is a pre-release of 3.{version[1]}, whose layout is not known"
    # Objects/object.c: only with Py_REF_DEBUG, which Py_DEBUG implies
    elif file.symbol(b"_Py_NegativeRefcount") is not None:
        refusal = "it is a debug build, whose layout is not known"
    gilstate = file.symbol(b"PyGILState_GetThisThreadState")
    return PythonBinary(
        version=version,
        refusal=refusal,
        executable=file.type == EXECUTABLE,
        segments=tuple(file.segments),
        runtime=runtime or 0,
        runtime_data=b"" if runtime is None else file.read(runtime, 4096),
        context_type=file.symbol(b"PyContext_Type"),
        dict_type=file.symbol(b"PyDict_Type"),
        gilstate=b"" if gilstate is None else file.read(gilstate, 32),
        gilstate_address=gilstate,
        gilstate_distance=_distance(file),
    )


def _distance(file: ElfFile) -> int | None:
    """Bytes from the variable with the running thread state to that of PyGILState, where both are alike."""
    places = []
    for name in (b"PyThreadState_GetUnchecked", b"PyGILState_GetThisThreadState"):
        address = file.symbol(name)
        code = b"" if address is None else file.read(address, 48)
        found = VARIABLE.search(code)
        if found is None or b"\xe8" not in code[: found.start()]:  # it calls nothing
            return None
        places.append(int.from_bytes(found[1] or found[2] or b"\0", "little", signed=True))
    return places[1] - places[0]


def _version(file: ElfFile, runtime: int | None, path: Path) -> tuple[Version | None, int]:
    """The version, and which kind of release it is."""
    number = 0
    if (symbol := file.symbol(b"Py_Version")) is not None:  # from 3.11 on
        number = int.from_bytes(file.read(symbol, 8), "little")
    elif runtime is not None and file.read(runtime, 8) == debug_offsets.COOKIE:
        number = int.from_bytes(file.read(runtime + 8, 8), "little")
    if number:
        return (number >> 24, number >> 16 & 255, number >> 8 & 255), number >> 4 & 15
    # up to 3.10, where find_interpreter() asks the process itself for the last number
    found = file.version_texts()
    name = re.search(rb"python([23])\.(\d+)", file.soname or path.name.encode())
    if name:
        found = {text for text in found if text[0][:2] == (int(name[1]), int(name[2]))}
    if len({version[:2] for version, _ in found}) != 1:
        return None, 0
    return max(found)
