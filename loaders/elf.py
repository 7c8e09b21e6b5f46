"""ELF files, read with pyelftools: sections and variables of BPF objects, functions of libraries."""

import struct
from bisect import bisect_right
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.dynamic import DynamicSegment, DynamicTag
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import Section, SymbolTableSection
from numpy.typing import NDArray

from scope_ebpf.errors import FormatError

# What pyelftools lets through on damaged files besides its own error.
DAMAGE = (
    ELFError,
    ConstructError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    AssertionError,
    MemoryError,
)


# elf.h: Elf64_Sym, and some of its values
SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
     ("size", "<u8")]
)  # fmt: skip
SHN_UNDEF, STT_OBJECT, STT_FUNC = 0, 1, 2


class ElfObject:
    """One ELF file in memory."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            FormatError: there is no such file, or it is not ELF.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(
                f"cannot read {path}: {error.strerror}; run `make build` to build the probes"
            ) from error
        self.path = path
        try:
            self._file = ELFFile(BytesIO(data))
        except DAMAGE as error:
            raise self._damaged(error) from error

    def section(self, name: str) -> bytes:
        """The content of a section.

        Raises:
            FormatError: there is no such section, or the file is damaged.
        """
        try:
            return bytes(self._section(name).data())
        except DAMAGE as error:
            raise self._damaged(error) from error

    def variables(self, section: str) -> dict[str, tuple[int, int]]:
        """Offset and size in bytes of each variable in a section such as .rodata.

        The symbol table knows; the BTF of an object that was not linked has zeros in that place.

        Raises:
            FormatError: there is no such section, or the file is damaged.
        """
        try:
            self._section(section)
            number = self._file.get_section_index(section)
            table = self._section(".symtab")
            if not isinstance(table, SymbolTableSection):
                raise ValueError("its symbol table is not one")
            names, symbols = table.stringtable.data(), _symbols(table)
            chosen = (symbols["section"] == number) & (symbols["info"] & 15 == STT_OBJECT)
            return {
                names[at : names.index(0, at)].decode(): (value, size)
                for at, value, size in symbols[["name", "value", "size"]][chosen].tolist()
            }
        except DAMAGE as error:
            raise self._damaged(error) from error

    def _section(self, name: str) -> Section:
        found = self._file.get_section_by_name(name)
        if found is None:
            raise FormatError(f"cannot use {self.path}: it has no section {name}; run `make build`")
        return found

    def _damaged(self, error: BaseException) -> FormatError:
        return FormatError(
            f"cannot read {self.path}: it is not a whole ELF object"
            f" ({str(error) or type(error).__name__}); run `make build`"
        )


def _symbols(table: SymbolTableSection) -> NDArray[np.void]:
    """All symbols of a table.

    Not by pyelftools' own way over them, which takes 40 us for each: CPython exports 2,000.
    """
    data = table.data()
    return np.frombuffer(data, SYMBOL, len(data) // SYMBOL.itemsize)


def _exported_symbols(file: ELFFile) -> tuple[dict[str, int], dict[str, int]]:
    """Virtual addresses of the functions and of the variables that a file exports, by name."""
    table = file.get_section_by_name(".dynsym")
    if not isinstance(table, SymbolTableSection):
        return {}, {}
    symbols = _symbols(table)
    names = table.stringtable.data()
    kinds = symbols["info"] & 15
    functions, variables = (
        {
            names[at : names.index(0, at)].decode(errors="surrogateescape"): address
            for at, address in symbols[["name", "value"]][
                (symbols["section"] != SHN_UNDEF) & (kinds == kind)
            ].tolist()
        }
        for kind in (STT_FUNC, STT_OBJECT)
    )
    return functions, variables


class SharedLibrary:
    """A shared library that programs have mapped: where its exported functions are in the file."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            FormatError: there is no such file, or it is not a whole 64-bit ELF file.
        """
        self.path: Final = path
        try:
            self._data = path.read_bytes()
            file = ELFFile(BytesIO(self._data))
            if file.elfclass != 64:
                raise ValueError("it is not a 64-bit one")
            self.machine: Final = str(file["e_machine"])
            segments = list(file.iter_segments())  # each time they are made anew
            loaded = [segment for segment in segments if segment["p_type"] == "PT_LOAD"]
            self._code = [
                (segment["p_vaddr"], segment["p_offset"], segment["p_filesz"])
                for segment in loaded
                if segment["p_flags"] & 1  # PF_X
            ]
            # what is loaded: (virtual address, offset in the file, bytes in the file)
            self.segments: Final[list[tuple[int, int, int]]] = [
                (segment["p_vaddr"], segment["p_offset"], segment["p_filesz"]) for segment in loaded
            ]
            tags = [
                tag
                for segment in segments
                if isinstance(segment, DynamicSegment)
                for tag in segment.iter_tags()
            ]
            self._frame_header = next(
                (
                    (segment["p_vaddr"], segment["p_offset"])
                    for segment in segments
                    if segment["p_type"] == "PT_GNU_EH_FRAME"
                ),
                None,
            )
            # the dynamic linker's tables: where they are and how long; which files it loads, and where from
            self.tags: Final = {str(tag.entry.d_tag): int(tag.entry.d_val) for tag in tags}
            self.needed: Final = [_name(tag) for tag in tags if tag.entry.d_tag == "DT_NEEDED"]
            self.search_path: Final = [
                folder
                for tag in tags
                if tag.entry.d_tag in {"DT_RUNPATH", "DT_RPATH"}
                for folder in _name(tag).split(":")
            ]
            self._exported, self._variables = _exported_symbols(file)
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror}") from error
        except DAMAGE as error:
            raise FormatError(
                f"cannot read {path}: it is no library ({str(error) or type(error).__name__})"
            ) from error

    def function(self, name: str) -> int | None:
        """The offset in the file of an exported function; None if there is none."""
        address = self._exported.get(name)
        return None if address is None else self.offset(address)

    def variable(self, name: str) -> int | None:
        """The virtual address of an exported variable; None if there is none."""
        return self._variables.get(name)

    def offset(self, address: int) -> int | None:
        """The offset in the file of code at a virtual address; None if no code is there."""
        for start, offset, size in self._code:
            if start <= address < start + size:
                return int(address - start + offset)
        return None

    def address(self, offset: int) -> int | None:
        """The opposite of offset()."""
        for start, at, size in self._code:
            if at <= offset < at + size:
                return int(offset - at + start)
        return None

    def code(self, offset: int, length: int) -> bytes:
        """Bytes of the file."""
        return self._data[offset : offset + length]

    def extent(self, offset: int) -> int | None:
        """How long the function at an offset is, in bytes; None if its unwind information does not say.

        A function of which the compiler moved a part elsewhere has only its first part here.
        """
        address = self.address(offset)
        starts, entries = self._unwinding
        if address is None or self._frame_header is None:
            return None
        base, at = self._frame_header
        index = bisect_right(starts, address - base) - 1
        if index < 0:
            return None
        # an FDE: length, CIE, start, length of the code (DWARF 5, 6.4.1; LSB 5, 10.6.1)
        entry = at + entries[index] + 12
        length = int.from_bytes(self._data[entry : entry + 4], "little")
        end = base + starts[index] + length
        return end - address if address < end else None

    @cached_property
    def _unwinding(self) -> tuple[list[int], list[int]]:
        """The sorted table of .eh_frame_hdr: where functions start and where their FDEs are.

        Both count from the header. Empty for another encoding than the usual one of 4 bytes each.
        """
        if self._frame_header is None:
            return [], []
        at = self._frame_header[1]
        if self._data[at : at + 4] != b"\x01\x1b\x03\x3b":
            return [], []
        count = int.from_bytes(self._data[at + 8 : at + 12], "little")
        count = min(count, (len(self._data) - at - 12) // 8)
        numbers = struct.unpack_from(f"<{2 * count}i", self._data, at + 12)
        return list(numbers[::2]), list(numbers[1::2])

    def contents(self) -> bytes:
        """The whole file."""
        return self._data


def _name(tag: DynamicTag) -> str:
    """The text of a tag of the dynamic section that is one: pyelftools names it after the tag."""
    return str(getattr(tag, str(tag.entry.d_tag)[3:].lower()))
