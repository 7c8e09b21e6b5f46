"""The built object: its records are the ones that Python reads, and it compiles for arm64, too."""

from __future__ import annotations

import platform
import random
import shutil
import struct
import subprocess
import sys
from enum import EnumMeta
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from scope_ebpf import records
from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.btf import Btf
from scope_ebpf.loaders.capture import (
    CALL_PROGRAMS,
    CGROUP_PROGRAMS,
    ITERATORS,
    LIFE_PROGRAMS,
    hot_dtype,
)
from scope_ebpf.loaders.elf import ElfObject
from scope_ebpf.loaders.libbpf import BpfObject
from scope_ebpf.loaders.tls import PROGRAMS as TLS_PROGRAMS
from scope_ebpf.loaders.transport import OBJECT, PERF_OBJECT, STAGED_HOT, STAGED_WIDE, STAGES

pytestmark = pytest.mark.object

CHECKOUT = Path(__file__).resolve().parents[2]
IN_OBJECT = (
    "call", "message", "offcpu", "tls", "payload", "process", "connection", "connect",
    "marked_task", "cpu_state", "flight",
)  # fmt: skip
HOT = ("call", "message", "offcpu", "tls")
WIDE = ("payload", "process", "connection", "connect")
CONSTANTS = {
    "record_syscalls": 1, "record_messages": 1, "record_offcpu": 1, "record_everything": 1,
    "follow_children": 1, "seek_cgroups": 1, "switch_tells_state": 1, "recorder_tgid": 4,
    "hot_slots": 4, "wide_slots": 4, "payload_limit": 4, "message_classes": 512,
}  # fmt: skip
# 445 KiB with all families; more than that and a margin is a loop that was unrolled, or debug sections.
MAX_BYTES = 512 << 10
# As the Makefile has it: the newest up to the one of CI, then newer ones that may work as well.
CLANGS = [f"clang-{version}" for version in (19, 18, 17, 16, 15, 14, 20, 21, 22)]
FLAGS = ["-g", "-O2", "-Wall", "-Wextra", "-Wpadded", "-Werror", "-mcpu=v3", "-target", "bpf"]


@pytest.fixture(scope="module")
def btf():
    if not OBJECT.exists():
        pytest.fail(f"{OBJECT} is missing: run `make build`")
    return Btf.from_object(OBJECT)


@pytest.fixture(scope="module")
def clang():
    found = next(filter(None, map(shutil.which, [*CLANGS, "clang"])), None)
    if found is None:
        pytest.skip("needs clang: run `make setup`")
    return found


def compiled(clang: str, source: str, machine: str, to: Path) -> Path:
    command = [clang, *FLAGS, "-Iprobes", f"-D__TARGET_ARCH_{machine}", "-c", source, "-o", str(to)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return to


def machine() -> str:
    return {"x86_64": "x86", "aarch64": "arm64"}[platform.machine()]


@pytest.mark.parametrize("name", IN_OBJECT)
def test_layouts_are_those_of_records_py(btf, name):
    assert btf.record_dtype(name) == getattr(records, name.upper())


@pytest.mark.parametrize("name", IN_OBJECT)
def test_no_holes(btf, name):
    """A hole would hand stale ring memory to user space."""
    dtype = btf.record_dtype(name)
    at = 0
    for field in dtype.names:
        kind, offset = dtype.fields[field][:2]
        assert offset == at, field
        at += kind.itemsize
    assert at == dtype.itemsize
    assert (
        at % 8 == 0
    )  # slots in an array, and records one behind the other in an iterator's output


@pytest.mark.parametrize("name", HOT)
def test_hot_records_fill_a_slot(btf, name):
    dtype = btf.record_dtype(name)
    assert dtype.itemsize == hot_dtype().itemsize == 64
    assert int(records.RecordLimits.HOT_SLOT_BYTES) == 64
    before_kind, fields = hot_dtype().fields, dtype.fields
    assert before_kind is not None
    for field in ("sequence", "kind", "flags", "start_ns"):
        assert fields[field][:2] == before_kind[field][:2]


@pytest.mark.parametrize("name", WIDE)
def test_wide_records_fit_the_smallest_slot(btf, name):
    dtype = btf.record_dtype(name)
    assert dtype.itemsize <= records.RecordLimits.WIDE_HEADER_BYTES + 448
    assert (dtype.fields["sequence"][1], dtype.fields["kind"][1]) == (0, 6)


def test_cpu_state_keeps_its_writers_apart(btf):
    """Cache lines of the running thread, of the producers, and of user space."""
    fields = btf.record_dtype("cpu_state").fields
    lines = {name: fields[name][1] // 64 for name in ("traced", "hot_head", "lost", "hot_tail")}
    assert len({lines["traced"], lines["hot_head"], lines["hot_tail"]}) == 3
    assert btf.record_dtype("cpu_state").itemsize % 64 == 0
    lost, offset = fields["lost"][:2]
    assert lost.shape == (records.LossKind.LOSS_KINDS,)
    assert (offset + lost.itemsize - 1) // 64 < lines["hot_tail"]


def test_constants_that_user_space_sets():
    found = ElfObject(OBJECT).variables(".rodata")
    assert {name: size for name, (_, size) in found.items() if name in CONSTANTS} == CONSTANTS
    assert "marks_wanted" in ElfObject(OBJECT).variables(".bss")


def test_programs_are_there(btf):
    functions = {entry.name for entry in btf.types if entry.kind == 12}
    wanted = {
        *TLS_PROGRAMS,
        *LIFE_PROGRAMS,
        *CALL_PROGRAMS,
        *CGROUP_PROGRAMS,
        *ITERATORS,
        "on_sched_waking",
    }
    assert wanted <= functions


def test_size_and_no_debug_sections():
    assert OBJECT.stat().st_size < MAX_BYTES
    with pytest.raises(FormatError):
        ElfObject(OBJECT).section(".debug_info")


def test_license_is_one_that_the_kernel_takes():
    assert ElfObject(OBJECT).section("license") == b"Dual BSD/GPL\0"


def test_generated_records_are_up_to_date(clang, tmp_path):
    """The same names, values and layouts; how it is formatted does not matter."""
    compiled(clang, "probes/records.c", machine(), tmp_path / "records.o")
    result = subprocess.run(
        [sys.executable, "scripts/generate_records.py", str(tmp_path / "records.o")],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    fresh: dict[str, object] = {}
    exec(compile(result.stdout, "records.py", "exec"), fresh)  # noqa: S102 - our own generator's
    names = {name for name in fresh if not name.startswith("_")}
    assert names == {name for name in vars(records) if not name.startswith("_")}
    for name in names:
        theirs, ours = fresh[name], getattr(records, name)
        if isinstance(theirs, np.dtype):
            assert theirs == ours, name
        elif isinstance(theirs, EnumMeta):
            assert theirs.__members__ == ours.__members__, name
            assert theirs.__mro__[1] is ours.__mro__[1]  # IntEnum or IntFlag


@pytest.mark.parametrize("target", ["x86", "arm64"])
def test_it_compiles(clang, target, tmp_path):
    file = compiled(clang, "probes/capture.bpf.c", target, tmp_path / "capture.bpf.o")
    other = Btf.from_object(file)
    for name in IN_OBJECT:
        assert other.record_dtype(name) == getattr(records, name.upper())


def test_damaged_btf_of_the_object():
    """Flipped bits and cut ends: a layout or a FormatError, and no other exception."""
    data = ElfObject(OBJECT).section(".BTF")
    header = struct.calcsize("<HBBIIIII")
    chance = random.Random(7)
    places = [*range(header), *(chance.randrange(header, len(data)) for _ in range(300))]
    for at in places:
        for value in (0x00, 0x80, 0xFF, data[at] ^ 1 << chance.randrange(8)):
            look(data[:at] + bytes([value]) + data[at + 1 :])
    for _ in range(60):
        look(data[: chance.randrange(len(data))])


def look(data: bytes) -> None:
    try:
        damaged = Btf.from_bytes(data, "test")
    except FormatError:
        return
    for name in IN_OBJECT:
        try:
            damaged.record_dtype(name)
        except FormatError as error:
            text = str(error)
            assert "\n" not in text
    try:
        damaged.variables()
    except FormatError as error:
        text = str(error)
        assert "\n" not in text


def test_no_program_for_old_kernels_has_an_atomic_that_fetches():
    """The verifier refuses these before 5.12, even where they are never reached."""
    opened = ElfObject(PERF_OBJECT)
    fetching = []
    for section in sections(PERF_OBJECT):
        code = opened.section(section)
        for at in range(0, len(code), 8):
            opcode, immediate = code[at], int.from_bytes(code[at + 4 : at + 8], "little")
            if opcode in {0xC3, 0xDB} and immediate:  # BPF_STX | BPF_ATOMIC, 32 and 64 bits
                fetching.append((section, at))
    assert fetching == []


def sections(path):
    """The sections of an object that hold instructions."""
    with path.open("rb") as stream:
        found = [each.name for each in ELFFile(stream).iter_sections() if each["sh_flags"] & 4]
    assert len(found) > 10
    return found


def test_both_objects_have_the_same_programs_but_for_what_old_kernels_need():
    programs = [symbols(path) for path in (OBJECT, PERF_OBJECT)]
    assert programs[1] - programs[0] == {"on_free"}
    assert programs[0] - programs[1] == set()


def symbols(path):
    with BpfObject(path) as opened:
        return set(opened.program_names())


def test_python_and_the_probes_agree_on_the_stages():
    source = (CHECKOUT / "probes" / "perf.h").read_text()
    for text in (
        "TASK_STAGES = 4,",
        f"STAGED_HOT = {STAGED_HOT},",
        "STAGED_WIDE = 256,",
        "STAGED_FEW = 8,",
    ):
        assert text in source
    assert STAGES == 6
    assert STAGED_WIDE == 4 * 8 + 2 * 256
