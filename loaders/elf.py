"""ELF objects, read with pyelftools: a section's content, and where variables lie in one."""

from io import BytesIO
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import Section, SymbolTableSection

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
            return {
                symbol.name: (symbol["st_value"], symbol["st_size"])
                for symbol in table.iter_symbols()
                if symbol["st_shndx"] == number and symbol["st_info"]["type"] == "STT_OBJECT"
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
