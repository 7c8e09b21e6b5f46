"""Which instruction of a function gets the probe: the first that the kernel emulates, if nothing is lost."""

from __future__ import annotations

import pytest

from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.uprobe_sites import (
    PROLOGUE_BYTES,
    Place,
    choose_site,
    direct_callees,
    is_emulated,
)
from tests.pure.elf_files import AARCH64, CODE_AT, CODE_OFFSET, library

pytestmark = pytest.mark.pure

ENDBR64 = "f30f1efa"
SUB_RSP, RET = "4883ec08", "c3"
PUSH_RBX, PUSH_R12 = "53", "4154"
MOV_RBX_RDI, MOV_EDI_EAX, XOR_ESI_ESI, MOV_CL_1 = "4889fb", "89c7", "31f6", "b101"
CMP_RDX_1, JE_FORWARD, JMP_FORWARD, CALL = "4883fa01", "7402", "eb02", "e800010000"
NOP, NOP5, TLS_CALL = "90", "0f1f440000", "666648e800010000"
INT3 = "cc"


def chosen(folder, *code: str, **options) -> tuple[int, bool | None]:
    """The distance of the chosen instruction from the function's entry, and whether it is emulated."""
    found = SharedLibrary(library(folder, bytes.fromhex("".join(code)).ljust(200, b"\xcc")))
    place = choose_site(found, CODE_OFFSET, **options)
    return place.offset - CODE_OFFSET, place.emulated


@pytest.mark.parametrize(
    ("code", "emulated"),
    [
        ("55", True), ("4157", True), ("41", False), ("4158", False), ("4855", False), ("fff3", False),
        ("6a01", False), ("90", True), ("6690", True), ("f390", False), ("0f1f00", False),
        ("e900000000", True), ("eb00", True), ("e800000000", True), ("7500", True),
        ("0f8400000000", True), ("0f", False), ("66e800000000", False), ("2e0f1f00", False),
        (ENDBR64, False), (SUB_RSP, False), (RET, False), ("", False),
    ],
)  # fmt: skip
def test_what_is_emulated(code, emulated):
    assert is_emulated(bytes.fromhex(code)) is emulated


@pytest.mark.parametrize(
    ("code", "entry", "at_return"),
    [
        ((PUSH_RBX, RET), (0, True), (0, True)),
        ((ENDBR64, PUSH_R12, RET), (4, True), (4, True)),
        # the return address is no longer where a return probe seeks it
        ((SUB_RSP, PUSH_RBX), (4, True), (0, False)),
        ((MOV_RBX_RDI, SUB_RSP, CMP_RDX_1, JE_FORWARD), (11, True), (0, False)),
        ((MOV_RBX_RDI, CMP_RDX_1, JE_FORWARD), (7, True), (7, True)),
        # an argument is gone, in whichever width it was written
        ((MOV_EDI_EAX, PUSH_RBX), (0, False), (0, False)),
        ((XOR_ESI_ESI, PUSH_RBX), (0, False), (0, False)),
        ((MOV_CL_1, PUSH_RBX), (0, False), (0, False)),
        # only some calls pass what is behind a branch
        ((ENDBR64, RET, PUSH_RBX), (0, False), (0, False)),
        ((ENDBR64, INT3, PUSH_RBX), (0, False), (0, False)),
        # not emulated before 6.18, refused by the kernel
        ((NOP5, PUSH_RBX), (5, True), (5, True)),
        ((MOV_RBX_RDI, TLS_CALL, PUSH_RBX), (0, False), (0, False)),
        ((JMP_FORWARD,), (0, True), (0, True)),
        ((CALL,), (0, True), (0, True)),
        ((NOP,), (0, True), (0, True)),
        (("06",), (0, None), (0, None)),  # no instruction
        ((MOV_RBX_RDI * (PROLOGUE_BYTES // 3 + 1), PUSH_RBX), (0, False), (0, False)),
    ],
)
def test_choices(code, entry, at_return, tmp_path):
    assert chosen(tmp_path, *code) == entry
    assert chosen(tmp_path, *code, at_return=True) == at_return


def test_registers_that_nobody_reads_may_change(tmp_path):
    code = (XOR_ESI_ESI, PUSH_RBX)
    assert chosen(tmp_path, *code, keep=("rdi",)) == (2, True)
    assert chosen(tmp_path, *code, keep=("rdi", "rsi")) == (0, False)
    assert chosen(tmp_path, *code, keep=(), at_return=True) == (2, True)


def test_a_loop_that_comes_back_is_not_a_place(tmp_path):
    """Each round of it would count as a call."""
    back_to_2 = "ebfa"  # at 6, ends at 8: to 2
    code = (XOR_ESI_ESI, PUSH_RBX, "5b", "9090", back_to_2)
    assert len(bytes.fromhex("".join(code))) == 8
    assert chosen(tmp_path, XOR_ESI_ESI, PUSH_RBX, "5b", "9090", "ebfb", keep=("rdi",)) == (2, True)
    assert chosen(tmp_path, *code, keep=("rdi",)) == (0, False)
    assert chosen(tmp_path, PUSH_RBX, "5b", "ebfc", keep=("rdi",)) == (0, True)


def test_other_machines_have_the_entry(tmp_path):
    found = SharedLibrary(library(tmp_path, bytes.fromhex(PUSH_RBX), machine=AARCH64))
    assert choose_site(found, CODE_OFFSET) == Place(CODE_OFFSET, None)
    assert direct_callees(found, CODE_OFFSET, 8) == []


def test_the_instruction_is_told(tmp_path):
    found = SharedLibrary(library(tmp_path, bytes.fromhex(ENDBR64 + PUSH_R12 + RET)))
    assert choose_site(found, CODE_OFFSET).instruction == "push r12"


def test_callees(tmp_path):
    code = bytes.fromhex("e805000000" + "7403" + "ffd0" + "c3" + "e9f1ffffff").ljust(64, b"\x90")
    found = SharedLibrary(library(tmp_path, code))
    assert direct_callees(found, CODE_OFFSET, 15) == [
        CODE_OFFSET + 10, CODE_OFFSET + 10, CODE_OFFSET,
    ]  # fmt: skip
    assert direct_callees(found, CODE_OFFSET, 15, jumps=False) == [CODE_OFFSET + 10]
    assert found.address(CODE_OFFSET) == CODE_AT
    assert direct_callees(found, 1 << 40, 15) == []
