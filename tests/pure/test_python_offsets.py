"""The table of CPython's layouts: whole, as measured, and used only for what it is about."""

from __future__ import annotations

import dataclasses
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from scope_ebpf import records
from scope_ebpf.cpython import debug_offsets
from scope_ebpf.cpython.offsets import (
    NEWEST,
    NO_SHIM,
    OLDEST,
    Layout,
    UnknownLayoutError,
    layout_of,
)
from scope_ebpf.cpython.offsets_table import DIFFERENT, MEASURED, OFFSETS
from scope_ebpf.errors import FormatError
from scope_ebpf.records import InterpreterFlags

pytestmark = pytest.mark.pure

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "scripts/generate_python_offsets.py"
MINORS = range(8, 16)

# Of records.INTERPRETER: what only a live process tells, and what Layout works out.
LIVE = {"gil", "flags", "tss", "version", "thread_tid", "reserved"}
DERIVED = {"frame_bytes"}


def debug_data(minor: int, **changed: int) -> bytes:
    """What a process of 3.minor would have at _PyRuntime, with the offsets of the table."""
    numbers = dict.fromkeys(debug_offsets.field_names(minor), 8)
    table = OFFSETS[3, minor]
    for name in numbers:
        if name.endswith(".size"):
            numbers[name] = 1 << 20
        if name in debug_offsets.LAYOUT_FIELDS:
            numbers[name] = table[debug_offsets.LAYOUT_FIELDS[name]]
    own = table["interpreter_own_gil"]
    numbers |= {
        "version": 0x030000F0 | minor << 16,
        "free_threaded": 0,
        "unicode.state": table["unicode_state"],
        "interpreter.gil_locked": own + table["gil_locked"],
        "interpreter.gil_holder": own + table["gil_holder"],
    }
    numbers |= {name.replace("__", "."): value for name, value in changed.items()}
    return debug_offsets.COOKIE + struct.pack(f"<{len(numbers)}Q", *numbers.values())


def test_every_version_is_there():
    """One entry for each minor version, and each measured release belongs to one."""
    assert sorted(OFFSETS) == [(3, minor) for minor in MINORS]
    assert (OLDEST, NEWEST) == ((3, 8), (3, 15))
    assert {release[:2] for release in MEASURED} == set(OFFSETS)
    assert set(DIFFERENT) <= set(MEASURED)


@pytest.mark.parametrize("minor", MINORS)
def test_entry_is_whole(minor: int):
    """The table has exactly the fields of Layout, but for those that a version does not have."""
    fields = {field.name: field for field in dataclasses.fields(Layout)}
    assert set(OFFSETS[3, minor]) <= set(fields)
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING} - {
        "version"
    }
    assert required <= set(OFFSETS[3, minor])
    assert all(-64 <= value < 1 << 20 for value in OFFSETS[3, minor].values())


def test_no_field_is_unused():
    """Each field of Layout is one of some version."""
    fields = {field.name for field in dataclasses.fields(Layout)} - {"version"}
    assert fields == {name for entry in OFFSETS.values() for name in entry}


@pytest.mark.parametrize("release", MEASURED)
def test_only_sizes_differ_within_a_minor_version(release: tuple[int, int, int]):
    """What layout_of() promises for releases that were not measured.

    asyncio's fields of the thread state follow behind PyThreadState, whose size a process tells.
    """
    moved = {
        name
        for name in DIFFERENT.get(release, {})
        if not name.endswith("_bytes") and not name.startswith("tstate_asyncio_")
    }
    assert not moved


@pytest.mark.parametrize("minor", MINORS)
def test_record_is_whole(minor: int):
    """Each field of the kernel's record is filled by the layout, or is one that only a process tells."""
    layout = layout_of((3, minor, 0))
    fields = {field.name for field in dataclasses.fields(Layout)}
    names = set(records.INTERPRETER.names or ())
    assert names <= fields | LIVE | DERIVED
    record = layout.record()
    for name in names & fields - {"version", "code_name", "first_shim"}:
        assert int(record[name]) == (getattr(layout, name) or 0), name
    assert all(not record[name].any() for name in ("gil", "tss", "thread_tid", "reserved"))
    assert int(record["version"]) == 0x300 | minor
    assert int(record["first_shim"]) == (NO_SHIM if minor <= 11 else 3)
    assert int(record["code_name"]) == (layout.code_name if minor <= 10 else layout.code_qualname)
    flags = InterpreterFlags(int(record["flags"]))
    assert InterpreterFlags.INTERPRETER_STACKS in flags
    assert (InterpreterFlags.INTERPRETER_HEAP_FRAMES in flags) == (minor <= 10)
    assert (InterpreterFlags.INTERPRETER_CFRAME in flags) == (minor in (11, 12))
    # a read of frame_bytes has all that a walk needs
    for name in ("frame_code", "frame_previous", "frame_instruction", "frame_owner"):
        assert int(record[name]) < int(record["frame_bytes"]) <= 128


@pytest.mark.parametrize(
    ("minor", "field", "value"),
    [
        # found in live processes by other means, before this table was made
        (8, "tstate_thread_id", 176),
        (11, "tstate_context", 224),
        (11, "frame_instruction", 56),
        (11, "code_instructions", 184),
        (11, "interpreter_modules", 888),
        (11, "runtime_gil", 360),
        (13, "tstate_context", 208),
        (13, "interpreter_modules", 7656),
        (13, "code_instructions", 200),
        (13, "gil_switch_mutex", 168),
    ],
)
def test_known_offsets(minor: int, field: str, value: int):
    """Numbers that are known from elsewhere."""
    assert OFFSETS[3, minor][field] == value


# ---- versions that are not known ----


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 7, 16), (3, 16, 0), (4, 0, 0)])
def test_unknown_version(version: tuple[int, int, int]):
    """No guess: the reason has the version, and those that are known."""
    with pytest.raises(UnknownLayoutError, match=r"not known; known are 3\.8 to 3\.15") as caught:
        layout_of(version)
    assert ".".join(map(str, version)) in str(caught.value)


def test_free_threaded():
    """Its objects have another head."""
    with pytest.raises(UnknownLayoutError, match="free-threaded"):
        layout_of((3, 14, 0), debug_data(14, free_threaded=1))


# ---- what a process itself says ----


@pytest.mark.parametrize("minor", [13, 14, 15])
def test_debug_offsets_agree(minor: int):
    """A process that says what the table says has the table's layout."""
    newest = max(release for release in MEASURED if release[1] == minor)
    assert layout_of(newest, debug_data(minor)) == layout_of(newest)


@pytest.mark.parametrize("minor", [13, 14, 15])
def test_debug_offsets_go_first(minor: int):
    """What moved is where the process says, and so is what stands next to it."""
    table = layout_of((3, minor, 99))
    assert table.tstate_native_thread_id is not None and table.tstate_datastack_chunk is not None
    native, chunk = table.tstate_native_thread_id + 8, table.tstate_datastack_chunk + 16
    moved = {"tstate__native_thread_id": native, "tstate__datastack_chunk": chunk}
    layout = layout_of(
        (3, minor, 99), debug_data(minor, **moved, tstate__size=table.tstate_bytes + 16)
    )
    assert layout.tstate_native_thread_id == native
    assert layout.tstate_datastack_chunk == chunk and layout.tstate_datastack_top == chunk + 8
    assert table.tstate_asyncio_loop is not None
    assert layout.tstate_asyncio_loop == table.tstate_asyncio_loop + 16


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no _Py_DebugOffsets"),
        (b"\0" * 2000, "no _Py_DebugOffsets"),
        (debug_data(13)[:200], "cut off"),
        (debug_data(14), "of version 0x30e00f0 are in a Python 3.13"),
        (debug_data(13, code__qualname=1 << 21), "code.qualname is at 2097152"),
    ],
    ids=["empty", "zeros", "short", "other version", "behind the end"],
)
def test_damaged_debug_offsets(data: bytes, words: str):
    """What cannot be the offsets of the version is refused."""
    with pytest.raises(FormatError) as caught:
        debug_offsets.parse_debug_offsets(data, 13)
    assert words in str(caught.value)


def test_other_strings():
    """A state of strings that is not where the table has it is no reason to guess."""
    with pytest.raises(UnknownLayoutError, match="state at 64"):
        layout_of((3, 14, 0), debug_data(14, unicode__state=64))


# ---- the generator ----


def test_generator_writes_this_table(tmp_path: Path):
    """The headers of this machine still give what is committed; no package is downloaded."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    done = subprocess.run(
        [sys.executable, str(GENERATOR)], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    written = tmp_path / "offsets_table.py"
    written.write_text(done.stdout)
    table = runpy.run_path(str(written))
    for release in MEASURED:
        known = OFFSETS[release[:2]] | DIFFERENT.get(release, {})
        assert table["OFFSETS"][release[:2]] | table["DIFFERENT"].get(release, {}) == known
