"""ELF objects that are whole, cut off, or full of errors: a result or a FormatError."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import ElfObject

pytestmark = pytest.mark.pure

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
PROGBITS, SYMTAB, STRTAB = 1, 2, 3
REL, MACHINE_BPF = 1, 247
VARIABLES = {"recorder_tgid": (0, 4), "message_classes": (8, 512)}


def elf_object() -> bytes:
    """A relocatable BPF object with a section .rodata of two variables, as clang lays it out."""
    content = bytes(range(256)) * 2 + bytes(8)
    strings, symbols = b"\0", SYMBOL.pack(0, 0, 0, 0, 0, 0)
    for name, (offset, size) in VARIABLES.items():
        symbols += SYMBOL.pack(len(strings), 1 << 4 | 1, 0, 1, offset, size)  # GLOBAL OBJECT
        strings += name.encode() + b"\0"
    symbols += SYMBOL.pack(1, 1 << 4 | 2, 0, 1, 0, 0)  # a function: no variable
    names = b"\0.rodata\0.symtab\0.strtab\0"
    parts = [(1, PROGBITS, content, 0), (9, SYMTAB, symbols, 3), (17, STRTAB, strings + names, 0)]
    header_bytes, at = HEADER.size, HEADER.size
    table, body = SECTION.pack(*[0] * 10), b""
    for name_at, kind, data, link in parts:
        entry = SYMBOL.size if kind == SYMTAB else 0
        shift = len(strings) + name_at
        table += SECTION.pack(shift, kind, 0, 0, at, len(data), link, 1, 8, entry)
        body += data
        at += len(data)
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    count = len(parts) + 1
    return (
        HEADER.pack(identity, REL, MACHINE_BPF, 1, 0, 0, at, 0, header_bytes, 0, 0, 64, count, 3)
        + body
        + table
    )


WHOLE = elf_object()


def opened(data: bytes, folder: Path) -> ElfObject:
    file = folder / "object.o"
    file.write_bytes(data)
    return ElfObject(file)


def test_a_whole_object(tmp_path):
    whole = opened(WHOLE, tmp_path)
    assert whole.section(".rodata") == bytes(range(256)) * 2 + bytes(8)
    assert whole.variables(".rodata") == VARIABLES


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"it has no section \.BTF; run `make build`"):
        opened(WHOLE, tmp_path).section(".BTF")
    with pytest.raises(FormatError, match=r"it has no section \.bss"):
        opened(WHOLE, tmp_path).variables(".bss")
    with pytest.raises(FormatError, match="No such file or directory; run `make build`"):
        ElfObject(tmp_path / "missing.o")
    with pytest.raises(FormatError, match="Is a directory"):
        ElfObject(tmp_path)


def look(data: bytes, folder: Path) -> None:
    """Read all that can be read; only a FormatError of one line may come of it."""
    try:
        whole = opened(data, folder)
        assert len(whole.section(".rodata")) <= len(data)
        whole.variables(".rodata")
    except FormatError as error:
        text = str(error)
        assert "\n" not in text
        assert "; run `make build`" in text


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x7fELF")
@example(b"\x7fELF\x02\x01\x01" + bytes(9))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(tmp_path, data):
    look(data, tmp_path)


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=8)
)
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_flipped_bits(tmp_path, flips):
    data = bytearray(WHOLE)
    for at, mask in flips:
        data[at] ^= mask
    look(bytes(data), tmp_path)


def test_every_header_byte_flipped(tmp_path):
    """Each byte of the file header and of the section headers, to its extremes."""
    places = [*range(HEADER.size), *range(len(WHOLE) - 4 * SECTION.size, len(WHOLE))]
    for at in places:
        for value in (0x00, 0x7F, 0x80, 0xFF):
            look(WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :], tmp_path)


def test_every_length(tmp_path):
    for length in range(len(WHOLE)):
        look(WHOLE[:length], tmp_path)
