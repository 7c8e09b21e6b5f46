"""A file that is to be probed: its functions by name, and where its instructions begin.

A uprobe in the middle of an instruction would change what the program does. So a place that is not the
beginning of a function is only taken when disassembling the function shows an instruction there.
"""

from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from elftools.elf.elffile import ELFFile
from numpy.typing import NDArray

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import DAMAGE

if TYPE_CHECKING:  # not every recording disassembles something
    from capstone import Cs

Symbols = NDArray[np.void]

SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
)  # fmt: skip
HIDDEN = 0x8000  # VERSYM_HIDDEN
FUNCTION, OF_THREADS, INDIRECT = 2, 6, 10  # STT_FUNC, STT_TLS, STT_GNU_IFUNC
# of .eh_frame_hdr: the table of functions as pairs of 32-bit distances from the section
_SORTED_TABLE, _COUNT_32 = 0x3B, 0x03
MOST_FUNCTION_BYTES = 1 << 20


class ProbedFile:
    """A program or library on disk."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            FormatError: there is no such file, or it is not a whole 64-bit ELF file.
        """
        self.path: Final = path
        try:
            self._data = path.read_bytes()
            self.elf = ELFFile(BytesIO(self._data))
            if self.elf.elfclass != 64 or not self.elf.little_endian:
                raise ValueError("it is not a 64-bit little-endian one")
            self.machine: Final = str(self.elf["e_machine"])
            segments = [
                (segment["p_vaddr"], segment["p_offset"], segment["p_filesz"], segment["p_flags"])
                for segment in self.elf.iter_segments("PT_LOAD")
            ]
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror}") from error
        except DAMAGE as error:
            raise FormatError(
                f"cannot put a probe into {path}: it is no program or library"
                f" ({str(error) or type(error).__name__})"
            ) from error
        self._code = [segment for segment in segments if segment[3] & 1]  # PF_X
        self._rest = [segment for segment in segments if not segment[3] & 1]

    def code_offset(self, address: int) -> int | None:
        """The offset in the file of code at an address; None if no code is there."""
        return _offset(self._code, address)

    def data_offset(self, address: int) -> int | None:
        """The offset in the file of data at an address; None if none is in the file."""
        return _offset(self._rest, address)

    def symbol(self, name: str) -> int | None:
        """The address of a variable or function; None if there is none of that name."""
        rows = self._rows(name)
        return int(rows[0]["value"]) if len(rows) else None

    def functions_named(self, name: str) -> list[int]:
        """The addresses of the functions of a name; of versions of one, the one that programs get."""
        rows = self._rows(name)
        return sorted({int(row["value"]) for row in rows[_is_function(rows)]})

    def functions(self) -> list[str]:
        """The names of all functions, sorted."""
        names = set()
        for table, strings in self._tables:
            for row in table[_is_function(table)]:
                begin = int(row["name"])
                names.add(strings[begin : strings.index(b"\0", begin)].decode(errors="replace"))
        return sorted(names)

    @property
    def is_stripped(self) -> bool:
        """Whether only what it exports has a name."""
        return self.elf.get_section_by_name(".symtab") is None

    def is_indirect(self, name: str) -> bool:
        """Whether a name is that of a function that chooses another one when the program starts."""
        rows = self._rows(name)
        return len(rows) > 0 and bool(((rows["info"] & 15) == INDIRECT).any())

    def begins_instruction(self, address: int) -> bool | None:
        """Whether an instruction begins at an address; None if that cannot be told."""
        start = self._function_start(address)
        if start is None:
            return None
        if start == address:
            return True
        offset = self.code_offset(start)
        if offset is None or address - start > MOST_FUNCTION_BYTES:
            return None
        code = self._data[offset : offset + address - start + 16]
        for at, size, _, _ in disassembler(self.machine).disasm_lite(code, start):
            if at <= address < at + size:
                return bool(at == address)
        return None  # something before it is no instruction

    def instruction(self, offset: int) -> str:
        """The instruction at an offset in the file, as text."""
        code = self._data[offset : offset + 16]
        for _, _, name, operands in disassembler(self.machine).disasm_lite(code, 0, 1):
            return f"{name} {operands}".strip()
        return "no known instruction"

    def code(self, offset: int, length: int) -> bytes:
        """Bytes of the file."""
        return self._data[offset : offset + length]

    def _rows(self, name: str) -> Symbols:
        """The defined symbols of a name."""
        found = []
        for table, strings in self._tables:
            wanted, places, at = name.encode() + b"\0", list[int](), -1
            # a name may be the end of a longer one
            while (at := strings.find(wanted, at + 1)) >= 0:
                places.append(at)
            rows = table[np.isin(table["name"], places) & (table["section"] != 0)]
            found.append(rows[(rows["value"] != 0) & (rows["info"] & 15 != OF_THREADS)])
        return np.concatenate([*found, np.empty(0, SYMBOL)])

    @cached_property
    def _tables(self) -> list[tuple[Symbols, bytes]]:
        """The tables of symbols, each with its strings; the complete one first."""
        tables = []
        try:
            for name in (".symtab", ".dynsym"):
                section = self.elf.get_section_by_name(name)
                if section is not None:
                    data = section.data()
                    rows = np.frombuffer(data, SYMBOL, len(data) // SYMBOL.itemsize)
                    if name == ".dynsym":
                        rows = self._default_versions(rows)
                    strings = self.elf.get_section(section["sh_link"]).data()
                    tables.append((rows, bytes(strings)))
        except DAMAGE as error:
            raise FormatError(f"cannot read the symbols of {self.path}: {error}") from error
        return tables

    def _default_versions(self, rows: Symbols) -> Symbols:
        """Exported symbols without those that only programs linked long ago get."""
        section = self.elf.get_section_by_name(".gnu.version")
        if section is None:
            return rows
        versions = np.frombuffer(section.data(), "<u2")
        if len(versions) != len(rows):
            return rows
        chosen: Symbols = rows[versions & HIDDEN == 0]
        return chosen

    def _function_start(self, address: int) -> int | None:
        """Where the function begins that an address lies in: by its symbols, or its unwind table."""
        best: int | None = None
        for table, _ in self._tables:
            functions = table[_is_function(table)]
            inside = (functions["value"] <= address) & (
                address < functions["value"] + functions["size"]
            )
            if inside.any():
                best = int(functions["value"][inside].max())
                break
        if best is None:
            starts = self._unwound
            before = int(np.searchsorted(starts, address, "right")) - 1
            best = int(starts[before]) if before >= 0 else None
        return best

    @cached_property
    def _unwound(self) -> NDArray[np.int64]:
        """The beginnings of functions in the sorted table of .eh_frame_hdr (Linux Standard Base 5.0)."""
        section = self.elf.get_section_by_name(".eh_frame_hdr")
        if section is None:
            return np.empty(0, np.int64)
        data = bytes(section.data())
        if len(data) < 12 or data[0] != 1 or data[2] != _COUNT_32 or data[3] != _SORTED_TABLE:
            return np.empty(0, np.int64)
        count = min(int.from_bytes(data[8:12], "little"), (len(data) - 12) // 8)
        pairs = np.frombuffer(data, "<i4", 2 * count, 12)
        return np.sort(pairs[::2].astype(np.int64) + int(section["sh_addr"]))


class MetFiles:
    """Files that were met, by device and inode: one may have several paths."""

    def __init__(self) -> None:
        """None was met."""
        self._identities: set[tuple[int, int]] = set()

    def is_new(self, path: Path) -> bool:
        """Whether a file is there and was not met before; from now on it was."""
        try:
            status = path.stat()
        except OSError:
            return False
        identity = (status.st_dev, status.st_ino)
        known = identity in self._identities
        self._identities.add(identity)
        return not known


def disassembler(machine: str) -> "Cs":
    """A disassembler for the machine of an ELF file.

    Raises:
        FormatError: there is none.
    """
    import capstone

    if machine == "EM_X86_64":
        return capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    if machine == "EM_AARCH64":
        return capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
    raise FormatError(f"cannot disassemble code of {machine}: only x86-64 and arm64 are known")


def _is_function(table: Symbols) -> NDArray[np.bool_]:
    kind = table["info"] & 15
    chosen: NDArray[np.bool_] = (kind == FUNCTION) & (table["section"] != 0) & (table["value"] != 0)
    return chosen


def _offset(segments: list[tuple[int, int, int, int]], address: int) -> int | None:
    for start, offset, size, _ in segments:
        if start <= address < start + size:
            return int(address - start + offset)
    return None
