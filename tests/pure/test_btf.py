"""BTF that is right, wrong, or meant to hang its reader: a layout or a FormatError."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.btf import ARRAY, CONST, ENUM, INT, PTR, STRUCT, TYPEDEF, VAR, Btf

pytestmark = pytest.mark.pure

SIGNED = 1 << 24


class Section:
    """A .BTF section that is put together type by type; ids count from 1."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"
        self.count = 0

    def name(self, text: str) -> int:
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at if text else 0

    def add(self, kind, name, size_or_type, tail=b"", count=0, flag=False) -> int:
        info = kind << 24 | count | flag << 31
        self.types += struct.pack("<III", self.name(name), info, size_or_type) + tail
        self.count += 1
        return self.count

    def integer(self, name, size, encoding=0) -> int:
        return self.add(INT, name, size, struct.pack("<I", encoding | size * 8))

    def array(self, element, count) -> int:
        return self.add(ARRAY, "", 0, struct.pack("<III", element, element, count))

    def struct(self, name, size, *members, flag=False) -> int:
        tail = b"".join(
            struct.pack("<III", self.name(member), kind, offset * 8)
            for member, kind, offset in members
        )
        return self.add(STRUCT, name, size, tail, len(members), flag)

    def bytes(self) -> bytes:
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


def whole() -> bytes:
    """One of everything that records are made of."""
    section = Section()
    u8, u32 = section.integer("unsigned char", 1), section.integer("unsigned int", 4)
    s64 = section.integer("long long", 8, SIGNED)
    word = section.add(TYPEDEF, "__u32", u32)
    frozen = section.add(CONST, "", word)
    inner = section.struct("inner", 8, ("a", word, 0), ("b", frozen, 4))
    name, words = section.array(u8, 16), section.array(u32, 2)
    kind = section.add(
        ENUM, "kind", 4, struct.pack("<IIII", section.name("A"), 1, section.name("B"), 7), 2
    )
    fields = [("time", s64, 0), ("name", name, 8), ("pair", words, 24), ("inner", inner, 32)]
    outer = section.struct("outer", 48, *fields, ("kind", kind, 40), ("last", u8, 44))
    section.add(VAR, "anchor", outer, struct.pack("<I", 1))
    return section.bytes()


WHOLE = whole()
NAMES = ("outer", "inner", "kind", "absent", "")


def test_the_layout():
    btf = Btf.from_bytes(WHOLE, "test")
    inner = np.dtype([("a", "<u4"), ("b", "<u4")])
    assert btf.record_dtype("inner") == inner
    assert btf.record_dtype("outer") == np.dtype(
        {
            "names": ["time", "name", "pair", "inner", "kind", "last"],
            "formats": ["<i8", "V16", ("<u4", (2,)), inner, "<u4", "u1"],
            "offsets": [0, 8, 24, 32, 40, 44],
            "itemsize": 48,
        }
    )
    assert btf.enum_values("kind") == {"A": 1, "B": 7}
    assert list(btf.variables()) == ["anchor"]
    assert btf.variables()["anchor"].name == "outer"


def test_what_is_not_there_is_named():
    btf = Btf.from_bytes(WHOLE, "test")
    with pytest.raises(FormatError, match="no type 'absent': it was built from other sources"):
        btf.record_dtype("absent")
    with pytest.raises(FormatError, match="no type 'inner'"):
        btf.enum_values("inner")


def look(data: bytes) -> None:
    """Ask for everything; only a FormatError of one line may come of it."""

    def only_format_error(question):
        try:
            return question()
        except FormatError as error:
            text = str(error)
            assert "\n" not in text
            return None

    btf = only_format_error(lambda: Btf.from_bytes(data, "test"))
    if btf is None:
        return
    assert len(btf.types) <= len(data) // 12
    only_format_error(btf.variables)
    for name in NAMES:
        only_format_error(lambda name=name: btf.record_dtype(name))
        only_format_error(lambda name=name: btf.enum_values(name))


@given(st.binary(max_size=300))
@example(b"")
@example(WHOLE[:24])
def test_any_bytes(data):
    look(data)


@given(st.binary(max_size=200), st.binary(max_size=30))
def test_any_types_behind_a_good_header(types, strings):
    sizes = (0, len(types), len(types), len(strings))
    look(struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + types + strings)


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=8)
)
@settings(max_examples=500, deadline=None)
def test_changed_bytes(changes):
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    look(bytes(data))


def test_every_byte_changed():
    for at in range(len(WHOLE)):
        for value in (0x00, 0x01, 0x7F, 0x80, 0xFF):
            look(WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :])


def test_every_length():
    for length in range(len(WHOLE)):
        look(WHOLE[:length])


def refused(section: Section, name: str) -> str:
    with pytest.raises(FormatError) as caught:
        Btf.from_bytes(section.bytes(), "test").record_dtype(name)
    return str(caught.value)


def test_a_struct_within_itself():
    section = Section()
    section.struct("loop", 8, ("next", 1, 0))
    assert "refers to itself" in refused(section, "loop")


def test_structs_within_each_other():
    section = Section()
    section.struct("one", 8, ("two", 2, 0))
    section.struct("two", 8, ("one", 1, 0))
    assert "refers to itself" in refused(section, "one")


@pytest.mark.parametrize("kind", [TYPEDEF, CONST])
def test_a_name_of_itself(kind):
    section = Section()
    section.add(kind, "loop" if kind == TYPEDEF else "", 1)
    section.struct("record", 8, ("loop", 1, 0))
    assert "refers to itself" in refused(section, "record")


def test_an_array_of_itself():
    section = Section()
    section.array(1, 2)
    section.struct("record", 8, ("loop", 1, 0))
    assert "refers to itself" in refused(section, "record")


@pytest.mark.timeout(10)
def test_two_members_of_each_struct_that_is_the_next_one():
    """2**30 ways to walk it, and each step must be taken once only."""
    section = Section()
    depth = 30
    for level in range(depth):
        kind = level + 2
        section.struct(f"level{level}", 4, ("left", kind, 0), ("right", kind, 0))
    section.integer("int", 4)
    dtype = Btf.from_bytes(section.bytes(), "test").record_dtype("level0")
    assert (dtype.names, dtype.itemsize) == (("left", "right"), 4)


@pytest.mark.parametrize("count", [0, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("size", [1, 8])
def test_arrays_that_fit_nowhere(size, count):
    section = Section()
    section.array(section.integer("int", size), count)
    section.struct("record", 8, ("array", 2, 0))
    data = section.bytes()
    if count:
        assert "impossible" in refused(section, "record")
    else:
        look(data)


@pytest.mark.parametrize("kind", [PTR, 0, 31])
def test_kinds_that_no_record_has(kind):
    section = Section()
    section.integer("int", 4)
    section.add(kind, "", 1)
    section.struct("record", 8, ("member", 2, 0))
    with pytest.raises(FormatError, match="kind"):
        Btf.from_bytes(section.bytes(), "test").record_dtype("record")


def test_bit_fields_and_members_outside():
    section = Section()
    section.integer("int", 4)
    section.struct("bits", 4, ("member", 1, 0), flag=True)
    section.struct("outside", 4, ("member", 1, 4))
    section.struct("huge", 0xFFFFFFFF, ("member", 1, 0))
    assert "has a bit field" in refused(section, "bits")
    assert "impossible layout" in refused(section, "outside")
    assert "impossible layout" in refused(section, "huge")


def test_what_is_no_btf():
    with pytest.raises(FormatError, match="does not begin as little-endian BTF"):
        Btf.from_bytes(b"\xeb\x9f" + WHOLE[2:], "test")
    with pytest.raises(FormatError, match="points outside of the section"):
        Btf.from_bytes(WHOLE[:12] + struct.pack("<I", 1 << 31) + WHOLE[16:], "test")
    section = Section()
    section.add(31, "", 0)
    with pytest.raises(FormatError, match="unknown kind 31"):
        Btf.from_bytes(section.bytes(), "test")
