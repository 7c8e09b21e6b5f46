"""The data of a library or program as the dynamic linker leaves it, computed from the file alone.

A pointer in the data of a program that is loaded anywhere (PIE) or of a library is zero in the file: the
linker writes it, as its relocations say. A RELR relocation has its value in place, and a program that is
loaded at a fixed address has all of them.
"""

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.loaders.elf import SharedLibrary

RELOCATION = np.dtype([("address", "<u8"), ("kind", "<u4"), ("symbol", "<u4"), ("addend", "<i8")])
SYMBOL = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"),
     ("size", "<u8")]
)  # fmt: skip
ADDRESSES = 1 << 56  # user space ends below
# by machine: relocations that are base + addend, and those that are symbol + addend
RELATIVE = {"EM_X86_64": 8, "EM_AARCH64": 1027}
SYMBOLIC = {"EM_X86_64": (1, 6, 7), "EM_AARCH64": (257, 1025, 1026)}


class LinkedData:
    """What a file's segments hold when it has been loaded at address 0 (or where it must be)."""

    def __init__(self, library: SharedLibrary) -> None:
        """Read the segments and apply the relocations."""
        self.library = library
        self._data = library.contents()
        # (address, offset, bytes) of what the file really has
        self._segments = [
            (address, offset, min(size, len(self._data) - offset))
            for address, offset, size in library.segments
            if offset < len(self._data) and address < ADDRESSES
        ]
        # the aligned words of each segment, and the address of the first one
        self._words: list[tuple[int, NDArray[np.uint64]]] = []
        for address, offset, size in self._segments:
            skipped = -address % 8
            if size >= skipped + 8:
                count = (size - skipped) // 8
                words = np.frombuffer(self._data, "<u8", count, offset + skipped)
                self._words.append((address + skipped, words.copy()))
        self._relocate()

    def word(self, address: int) -> int | None:
        """The aligned word at a virtual address; None if the file has none there."""
        for start, words in self._words:
            index, rest = divmod(address - start, 8)
            if not rest and 0 <= index < len(words):
                return int(words[index])
        return None

    def text(self, address: int, limit: int = 64) -> str | None:
        """The ASCII string at a virtual address; None if there is none that is shorter than the limit."""
        for start, offset, size in self._segments:
            if start <= address < start + size:
                at = address - start + offset
                found, end, _ = self._data[at : at + limit].partition(b"\0")
                return found.decode() if end and found.isascii() else None
        return None

    def texts(self, content: str) -> list[int]:
        """Addresses at which this string is, also as the end of a longer one: linkers merge them."""
        sought, found, at = content.encode() + b"\0", [], -1
        while (at := self._data.find(sought, at + 1)) >= 0:
            found += [
                at - offset + start
                for start, offset, size in self._segments
                if offset <= at < offset + size
            ]
        return found

    def words_that_are(self, values: list[int]) -> list[int]:
        """Addresses of the aligned words that have one of these values."""
        sought = np.array(values, np.uint64)
        return [
            start + 8 * int(index)
            for start, words in self._words
            for index in np.flatnonzero(np.isin(words, sought))
        ]

    def _relocate(self) -> None:
        dynamic = self.library.tags
        machine = self.library.machine
        if machine not in RELATIVE:
            return
        symbols = dynamic.get("DT_SYMTAB")
        for table, size in (("DT_RELA", "DT_RELASZ"), ("DT_JMPREL", "DT_PLTRELSZ")):
            if table in dynamic and size in dynamic:
                entries = self._array(dynamic[table], RELOCATION, dynamic[size] // 24)
                plain = entries[entries["kind"] == RELATIVE[machine]]
                self._write(plain["address"], plain["addend"].astype(np.uint64))
                named = entries[np.isin(entries["kind"], SYMBOLIC[machine])]
                if len(named) and symbols is not None:
                    known = self._array(symbols, SYMBOL, int(named["symbol"].max()) + 1)
                    named = named[named["symbol"] < len(known)]
                    target = known[named["symbol"]]
                    values = target["value"] + named["addend"].astype(np.uint64)
                    self._write(named["address"], np.where(target["section"] == 0, 0, values))

    def _array(self, address: int, dtype: np.dtype[np.void], count: int) -> NDArray[np.void]:
        """A table of the dynamic linker, as far as the file has it."""
        for start, offset, size in self._segments:
            if start <= address < start + size:
                at = address - start + offset
                room = (offset + size - at) // dtype.itemsize
                return np.frombuffer(self._data, dtype, min(count, room), at)
        return np.empty(0, dtype)

    def _write(self, addresses: NDArray[np.uint64], values: NDArray[np.uint64]) -> None:
        for start, words in self._words:
            inside = (addresses >= start) & (addresses < start + 8 * len(words))
            inside &= addresses % 8 == 0
            words[(addresses[inside] - start) // 8] = values[inside]
