"""Names of native code: in which file, and in which of its functions, an instruction of a process is.

Names come from the symbol tables of the files that a process has mapped: .symtab, or .dynsym of a stripped
file, which has exported functions only. Separate debug files are not sought. Code that no symbol covers has
the name of its file alone: to name the nearest function before it would often be wrong.
"""

import contextlib
import time
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from numpy.typing import NDArray

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import DAMAGE, SYMBOL
from scope_ebpf.loaders.targets import PROC
from scope_ebpf.loaders.tls import root_of

FUNCTIONS = (2, 10)  # STT_FUNC, STT_GNU_IFUNC
# Symbols within one another, such as those of assembler code: so many before an address are looked at.
NESTED = 8
MAPPINGS_AGAIN_SECONDS = 0.05
PROCESSES_KEPT = 1024
ADDRESSES_KEPT = 1 << 16  # of each process
GENERATED = "[jit]"


class NativeFile:
    """The functions of one ELF file.

    Attributes:
        name: its soname, else its file name.
    """

    def __init__(self, path: Path) -> None:
        """Read the symbol table.

        Raises:
            FormatError: the file cannot be read, or is not a whole 64-bit ELF file.
        """
        try:
            with path.open("rb") as opened:
                self._read_file(ELFFile(opened), path.name)
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror}") from error
        except DAMAGE as error:
            raise FormatError(
                f"cannot read {path}: it is no ELF file ({str(error) or type(error).__name__})"
            ) from error

    def function(self, offset: int) -> str | None:
        """The function that an offset in the file is in; None: no symbol covers it."""
        address = self._address(offset)
        if address is None:
            return None
        index = int(np.searchsorted(self._starts, np.uint64(address), "right")) - 1
        for at in range(index, max(index - NESTED, -1), -1):
            if address < self._ends[at]:
                return min(self._names_at(self._starts[at]), key=_preference)
        return None

    def _read_file(self, file: ELFFile, file_name: str) -> None:
        if file.elfclass != 64:
            raise ValueError("it is not a 64-bit one")
        sonames = [
            str(getattr(tag, "soname", ""))
            for segment in file.iter_segments("PT_DYNAMIC")
            if isinstance(segment, DynamicSegment)
            for tag in segment.iter_tags("DT_SONAME")
        ]
        self.name = next(filter(None, sonames), file_name)
        self._segments = [
            (segment["p_offset"], segment["p_filesz"], segment["p_vaddr"])
            for segment in file.iter_segments("PT_LOAD")
        ]
        self._starts: NDArray[np.uint64] = np.empty(0, np.uint64)
        self._sections = [
            section["sh_addr"] + section["sh_size"] for section in file.iter_sections()
        ]
        for section in (".symtab", ".dynsym"):
            table = file.get_section_by_name(section)
            if isinstance(table, SymbolTableSection) and table["sh_type"] != "SHT_NOBITS":
                self._read(bytes(table.data()), bytes(table.stringtable.data()))
            if len(self._starts):
                break

    def _read(self, table: bytes, names: bytes) -> None:
        symbols = np.frombuffer(table, SYMBOL, len(table) // SYMBOL.itemsize)
        chosen = np.isin(symbols["info"] & 0xF, FUNCTIONS) & (symbols["section"] != 0)
        chosen &= symbols["section"] < len(self._sections)
        symbols = symbols[chosen]
        symbols = symbols[np.lexsort((symbols["size"], symbols["value"]))]
        self._starts, ends = symbols["value"].copy(), symbols["value"] + symbols["size"]
        # what is written in assembler may have no size: it reaches to the next one in its section
        following = np.append(self._starts[1:], np.uint64(1 << 63))
        bound = np.array(self._sections, np.uint64)[symbols["section"]]
        self._ends = np.where(symbols["size"] == 0, np.minimum(following, bound), ends)
        self._places, self._names = symbols["name"].copy(), names

    def _address(self, offset: int) -> int | None:
        for start, size, address in self._segments:
            if start <= offset < start + size:
                return int(offset - start + address)
        return None

    def _names_at(self, start: np.uint64) -> list[str]:
        """Names of the functions that begin at an address."""
        first = np.searchsorted(self._starts, start)
        places = self._places[first : np.searchsorted(self._starts, start, "right")]
        ends = [self._names.find(b"\0", int(place)) for place in places]
        return [
            # a symbol of .symtab may carry its version
            self._names[place:end].decode(errors="replace").partition("@")[0]
            for place, end in zip(places.tolist(), ends, strict=True)
        ]


def _preference(name: str) -> tuple[bool, int, str]:
    """Of several names of one function the public one: read, not __read."""
    return name.startswith("_"), len(name), name


@dataclass(frozen=True)
class Mapping:
    """A range of a process's memory that it can execute.

    Attributes:
        start, end: addresses.
        offset: of `start` in the file.
        inode: of the file; 0: none.
        path: of the file as the process sees it, or what /proc/PID/maps tells instead; may be empty.
    """

    start: int
    end: int
    offset: int
    inode: int
    path: str


def executable_mappings(maps: str) -> list[Mapping]:
    """What a /proc/PID/maps shows to be executable, by address.

    >>> executable_mappings("7f00-7f80 r-xp 00001000 08:01 77 /usr/lib/libc.so.6")
    [Mapping(start=32512, end=32640, offset=4096, inode=77, path='/usr/lib/libc.so.6')]
    """
    found = []
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) >= 5 and "x" in fields[1]:
            start, _, end = fields[0].partition("-")
            path = fields[5] if len(fields) == 6 else ""
            found.append(
                Mapping(int(start, 16), int(end, 16), int(fields[2], 16), int(fields[4]), path)
            )
    return sorted(found, key=lambda mapping: mapping.start)


@dataclass
class _Process:
    mappings: list[Mapping]
    read_at: float
    root: Path
    starts: list[int] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.starts = [mapping.start for mapping in self.mappings]

    def mapping(self, address: int) -> Mapping | None:
        index = bisect_right(self.starts, address) - 1
        if index >= 0 and address < self.mappings[index].end:
            return self.mappings[index]
        return None


class Symbols:
    """Names of instructions of processes; files are read once, however many processes map them."""

    def __init__(self) -> None:
        """Nothing is read before it is asked for."""
        self._processes: dict[int, _Process] = {}
        self._files: dict[tuple[int, int, int, int], NativeFile | None] = {}

    def name(self, tgid: int, address: int) -> str | None:
        """Where an instruction of a process is, such as `libc.so.6 memcpy`.

        Only the file's name where no symbol covers it; `[vdso]` and its like as /proc/PID/maps has them;
        `[jit]` for code that was made at run time. None if nothing is mapped there (any longer), or the
        process is gone or must not be looked at.
        """
        process = self._processes.get(tgid)
        if process is not None and (known := process.names.get(address)) is not None:
            return known
        mapping = None if process is None else process.mapping(address)
        if mapping is None:
            process = self._look_at(tgid)
            mapping = None if process is None else process.mapping(address)
        if process is None or mapping is None:
            return None
        found = self._describe(process, mapping, address)
        if len(process.names) >= ADDRESSES_KEPT:
            process.names.clear()
        process.names[address] = found
        return found

    def forget(self, tgid: int) -> None:
        """Look at a process anew when it is asked for next: it executed another program, or ended."""
        self._processes.pop(tgid, None)

    def _look_at(self, tgid: int) -> _Process | None:
        now, known = time.monotonic(), self._processes.get(tgid)
        if known is not None and now - known.read_at < MAPPINGS_AGAIN_SECONDS:
            return known
        self._processes.pop(tgid, None)
        try:
            maps = (PROC / str(tgid) / "maps").read_text(errors="surrogateescape")
        except OSError:  # it is gone, or privileges are
            return None
        mappings = executable_mappings(maps)
        if len(self._processes) >= PROCESSES_KEPT:
            self._processes.pop(next(iter(self._processes)))  # the oldest
        self._processes[tgid] = process = _Process(mappings, now, root_of(tgid))
        return process

    def _describe(self, process: _Process, mapping: Mapping, address: int) -> str:
        path = mapping.path
        if not path.startswith("/") or path.startswith("/memfd:"):
            # anonymous memory may have a name in brackets: [anon:…], [heap], [stack]
            made = path == "" or path.startswith(("[anon", "[heap", "[stack", "/memfd:", "//"))
            return GENERATED if made else path
        last = path.rpartition("/")[2]
        file = self._file(process.root, mapping)
        if file is None:
            return last.removesuffix(" (deleted)")
        function = file.function(address - mapping.start + mapping.offset)
        return file.name if function is None else f"{file.name} {function}"

    def _file(self, root: Path, mapping: Mapping) -> NativeFile | None:
        """The file of a mapping; None if it is another one by now, or cannot be read."""
        path = root / mapping.path.lstrip("/")
        with contextlib.suppress(OSError):
            status = path.stat()
            if status.st_ino != mapping.inode:
                return None
            key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if key not in self._files:
                self._files[key] = None
                with contextlib.suppress(FormatError):
                    self._files[key] = NativeFile(path)
            return self._files[key]
        return None
