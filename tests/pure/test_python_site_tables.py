"""Tables of methods in the data of a file: with pointers in place, and with relocations for them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.elf_data import LinkedData
from scope_ebpf.loaders.python.sites import (
    METH_FASTCALL,
    METH_KEYWORDS,
    METH_METHOD,
    METH_NOARGS,
    METH_O,
    QUEUE,
    calls,
    file_sites,
    first_argument,
    init_of_type,
    method_table,
    method_tables,
)
from tests.pure.elf_files import CODE_AT, CODE_OFFSET, DATA_AT, RELATIVE, library

pytestmark = pytest.mark.pure

Row = tuple[str, int, int]
METHODS: list[Row] = [
    ("empty", 0x10, METH_NOARGS),
    ("get", 0x20, METH_METHOD | METH_FASTCALL | METH_KEYWORDS),
    ("get_nowait", 0x30, METH_NOARGS),
    ("put", 0x40, METH_FASTCALL | METH_KEYWORDS),
    ("put_nowait", 0x40, METH_FASTCALL | METH_KEYWORDS),
    ("qsize", 0x60, METH_NOARGS),
]
CODE = bytes.fromhex("53c3").ljust(16, b"\xcc") * 16


def laid_out(tables: list[list[Row]], relocated: bool) -> tuple[bytes, list[tuple[int, int, int]]]:
    """Data that holds these tables, and its relocations; the first table is at DATA_AT."""
    table_bytes = sum(32 * (len(table) + 1) for table in tables)
    strings, rows, relocations = b"", b"", []
    for table in tables:
        for name, function, flags in table:
            pointers = (DATA_AT + table_bytes + len(strings), CODE_AT + function)
            strings += name.encode() + b"\0"
            at = DATA_AT + len(rows)
            if relocated:
                relocations += [(at, RELATIVE, pointers[0]), (at + 8, RELATIVE, pointers[1])]
                pointers = (0, 0)
            rows += struct.pack("<QQiIQ", *pointers, flags, 0, 0)
        rows += bytes(32)
    return rows + strings, relocations


def read(folder, tables: list[list[Row]], relocated: bool = False) -> LinkedData:
    data, relocations = laid_out(tables, relocated)
    return LinkedData(SharedLibrary(library(folder, CODE, data, relocations)))


@pytest.mark.parametrize("relocated", [False, True])
def test_a_table_of_methods(relocated, tmp_path):
    other = [("put", 0, METH_O), ("get_nowait_twice", 0, METH_O)]
    found = method_table(read(tmp_path, [METHODS, other], relocated), QUEUE)
    assert found is not None
    assert found.address == DATA_AT
    assert {name: (row.offset, row.flags) for name, row in found.methods.items()} == {
        name: (CODE_OFFSET + function, flags) for name, function, flags in METHODS
    }


def test_two_tables_are_a_doubt(tmp_path):
    data = read(tmp_path, [METHODS, METHODS])
    assert len(method_tables(data, QUEUE)) == 2
    assert method_table(data, QUEUE) is None


def test_a_name_that_must_not_be_there(tmp_path):
    more = [*METHODS, ("join", 0, METH_NOARGS)]
    found = method_tables(read(tmp_path, [more, METHODS]), QUEUE, frozenset({"join"}))
    assert [table.address for table in found] == [DATA_AT + 32 * (len(more) + 1)]


def test_a_table_without_one_of_the_names(tmp_path):
    assert method_tables(read(tmp_path, [METHODS[1:]]), QUEUE) == []
    assert method_tables(read(tmp_path, [[]]), QUEUE) == []


def test_sites_of_a_queue(tmp_path):
    """Two methods with one function get one probe; there is nothing else in this file."""
    data, relocations = laid_out([METHODS], True)
    path = library(tmp_path, CODE, data, relocations)
    got = [
        (site.event, site.function, site.offset - CODE_OFFSET, site.argument, site.indirect)
        for site in file_sites(path)
    ]
    assert got == [
        ("queue_put", "_queue.SimpleQueue.put", 0x40, 1, True),
        ("queue_got", "_queue.SimpleQueue.get", 0x20, None, False),
        ("queue_got", "_queue.SimpleQueue.get_nowait", 0x30, None, False),
    ]
    assert [site.at_return for site in file_sites(path)] == [False, True, True]
    assert {site.emulated for site in file_sites(path)} == {True}


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    data, relocations = laid_out([METHODS], True)
    path = library(tmp_path, CODE, data, relocations)
    assert file_sites(path)
    path.unlink()
    assert file_sites(library(tmp_path, CODE, bytes(64))) == []
    path.unlink()
    with pytest.raises(FormatError, match=r"cannot read .*: No such file"):
        file_sites(path)


@pytest.mark.parametrize(
    ("flags", "place"),
    [(METH_O, (1, False)), (METH_FASTCALL, (1, True)), (METH_NOARGS, None), (METH_KEYWORDS, None),
     (METH_METHOD | METH_FASTCALL | METH_KEYWORDS, (2, True))],
)  # fmt: skip
def test_first_arguments(flags, place):
    assert first_argument(flags) == place


@pytest.mark.parametrize("kind", ["type", "slots"])
def test_the_init_of_the_type_of_a_table(kind, tmp_path):
    """Of a static type, and of one that is made of slots: number, pointer."""
    data, _ = laid_out([METHODS], False)
    at = len(data) + -len(data) % 8
    data = data.ljust(at, b"\0")
    init = CODE_AT + 0x80
    if kind == "type":
        data += bytes(232) + struct.pack("<Q", DATA_AT) + bytes(56) + struct.pack("<Q", init)
    else:
        data += struct.pack("<10Q", 0, 0, 60, init, 74, 1, 64, DATA_AT, 0, 0)
    found = LinkedData(SharedLibrary(library(tmp_path, CODE, data)))
    table = method_table(found, QUEUE)
    assert table is not None
    assert init_of_type(found, table) == CODE_OFFSET + 0x80


def test_calls_through_others(tmp_path):
    """0 calls 0x400, which jumps to a PLT stub at 0x800 for 0xc00; 0x1000 calls nothing."""
    code = bytearray(b"\xcc" * 0x1400)
    code[0x000:0x006] = b"\xe8" + (0x400 - 5).to_bytes(4, "little") + b"\xc3"
    code[0x400:0x405] = b"\xe9" + (0x400 - 5).to_bytes(4, "little")
    code[0x800:0x806] = b"\xff\x25" + (DATA_AT - CODE_AT - 0x806).to_bytes(4, "little")
    data = struct.pack("<Q", CODE_AT + 0xC00)
    found = LinkedData(SharedLibrary(library(tmp_path, bytes(code), data)))
    at = CODE_OFFSET
    assert calls(found, at, at + 0xC00)
    assert calls(found, at + 0x400, at + 0xC00, depth=1)
    assert not calls(found, at, at + 0xC00, depth=1)
    assert not calls(found, at + 0x1000, at + 0xC00)


@given(
    st.lists(st.tuples(st.integers(0, 0x2500), st.integers(1, 255)), min_size=1, max_size=8),
    st.booleans(),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_flipped_bits(tmp_path, flips, relocated):
    """A damaged file has no sites or others, or is refused in one sentence."""
    data, relocations = laid_out([METHODS], relocated)
    path = library(tmp_path, CODE, data, relocations)
    damaged = bytearray(path.read_bytes())
    for at, mask in flips:
        damaged[at % len(damaged)] ^= mask
    path.write_bytes(damaged)
    try:
        found = file_sites(path)
    except FormatError as error:
        text = str(error)
        assert "\n" not in text
        return
    assert len(found) <= 8
