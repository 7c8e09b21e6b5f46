"""The arguments of USDT notes, in all forms that compilers write, and how the kernel is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from scope_ebpf.errors import LoadError, UsageError
from scope_ebpf.loaders.hits import (
    TEXT_BYTES,
    Argument,
    Pair,
    Places,
    argument_elements,
    probe_elements,
    text_places,
    typed_arguments,
)
from scope_ebpf.loaders.probed_files import ProbedFile
from scope_ebpf.loaders.usdt import (
    REGISTERS,
    Operand,
    UsdtSite,
    parse_operand,
    split_arguments,
)
from scope_ebpf.probe_specs import TYPES
from scope_ebpf.records import HitFlags, HitLimits, HitSource, PythonLimits

pytestmark = pytest.mark.pure

X86, ARM = REGISTERS["EM_X86_64"], REGISTERS["EM_AARCH64"]
ADDRESS = 0x1000


@dataclass
class Symbols:
    """What an operand may ask a file for."""

    machine: str = "EM_X86_64"

    def symbol(self, name: str) -> int | None:
        return {"limit": 0x4000, "a.b": 0x5000}.get(name)


def parse(text: str, machine: str = "EM_X86_64") -> Operand:
    return parse_operand(text, cast("ProbedFile", Symbols(machine)), ADDRESS)


def test_pt_regs():
    """As arch/x86/include/asm/ptrace.h has them; a lower part is where its register is."""
    assert [X86[name] for name in ("r15", "rbp", "rbx", "rax", "rdi", "rip", "rsp")] == [
        0, 32, 40, 80, 112, 128, 152,
    ]  # fmt: skip
    assert {X86[name] for name in ("rax", "eax", "ax", "al")} == {80}
    assert X86["ah"] == 81
    assert {X86[name] for name in ("r8", "r8d", "r8w", "r8b")} == {72}
    assert {X86[name] for name in ("rsi", "esi", "si", "sil")} == {104}
    assert (ARM["x0"], ARM["w3"], ARM["x30"], ARM["sp"]) == (0, 24, 240, 248)


@pytest.mark.parametrize(
    ("text", "operand"),
    [
        ("8@%rdi", Operand("register", 8, base=X86["rdi"])),
        ("-4@%ebx", Operand("register", 4, True, base=X86["rbx"])),
        ("1@%ah", Operand("register", 1, base=X86["rax"] + 1)),
        ("-2@%r9w", Operand("register", 2, True, base=X86["r9"])),
        ("8@$5", Operand("constant", value=5)),
        ("-8@$-5", Operand("constant", 8, True, value=-5)),
        ("4@$0x10", Operand("constant", 4, value=16)),
        ("-4@-20(%rbp)", Operand("memory", 4, True, value=-20, base=X86["rbp"])),
        ("8@(%rax)", Operand("memory", base=X86["rax"])),
        ("8@0x8(%rax)", Operand("memory", value=8, base=X86["rax"])),
        ("8@(%rax,%rbx,8)", Operand("memory", base=X86["rax"], index=X86["rbx"], shift=3)),
        ("8@-4(%rax,%rbx)", Operand("memory", value=-4, base=X86["rax"], index=X86["rbx"])),
        ("8@16(,%rbx,4)", Operand("memory", value=16, index=X86["rbx"], shift=2)),
        ("4@limit(%rip)", Operand("memory", 4, value=0x3000, base=X86["rip"])),
        ("4@40+limit(%rip)", Operand("memory", 4, value=0x3028, base=X86["rip"])),
        ("4@limit-8(%rip)", Operand("memory", 4, value=0x2FF8, base=X86["rip"])),
        ("4@a.b(%rip)", Operand("memory", 4, value=0x4000, base=X86["rip"])),
        ("4@limit", Operand("memory", 4, value=0x4000)),
        ("4@limit(,%rcx,4)", Operand("memory", 4, value=0x4000, index=X86["rcx"], shift=2)),
        ("8f@%rax", Operand("register", floating=True, base=X86["rax"])),
        ("-4@4196352", Operand("memory", 4, True, value=4196352)),
    ],
)
def test_x86_operands(text, operand):
    assert parse(text) == operand


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("8@%xmm0", "%xmm0 is no register that can be read"),
        ("4@%fs:16", "%fs:16"),
        ("4@other(%rip)", "the file has no symbol other"),
        ("4@$other", "the file has no symbol other"),
        ("8@(%xmm1)", "cannot be read"),
        ("8@8(%rip)", "unknown instruction"),
    ],
)
def test_what_cannot_be_read(text, why):
    operand = parse(text)
    assert operand.source == "nowhere"
    assert why in operand.why
    assert operand.size_bytes in (4, 8)


@pytest.mark.parametrize(
    "text", ["", "8", "8@", "3@%rax", "16@%rax", "x@%rax", "8@?", "8@$", "8@$1+"]
)
def test_what_is_no_argument(text):
    with pytest.raises(ValueError, match="is no"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "operand"),
    [
        ("8@x0", Operand("register", base=0)),
        ("-4@w3", Operand("register", 4, True, base=24)),
        ("8@-5", Operand("constant", value=-5)),
        ("4@#7", Operand("constant", 4, value=7)),
        ("8@[x1]", Operand("memory", base=8)),
        ("-4@[sp, 60]", Operand("memory", 4, True, value=60, base=248)),
        ("8@[x1, #-8]", Operand("memory", value=-8, base=8)),
        ("8@[x1, x2]", Operand("memory", base=8, index=16)),
        ("8@[x1, x2, lsl #3]", Operand("memory", base=8, index=16, shift=3)),
    ],
)
def test_arm64_operands(text, operand):
    assert parse(text, "EM_AARCH64") == operand


def test_other_machines_are_not_guessed():
    assert parse("8@%r3", "EM_S390").source == "nowhere"


def test_arguments_of_a_note():
    assert split_arguments("") == []
    assert split_arguments("-4@12(%rbx) 4@(%r12) 8@(%rax, %rbx, 8) 1@$0") == [
        "-4@12(%rbx)", "4@(%r12)", "8@(%rax, %rbx, 8)", "1@$0",
    ]  # fmt: skip
    assert split_arguments("8@[x1, x2, lsl #3] -4@[sp, 60] 8@x3") == [
        "8@[x1, x2, lsl #3]", "-4@[sp, 60]", "8@x3",
    ]  # fmt: skip


# ---- what the kernel gets ----


def test_elements():
    arguments = [
        Argument(TYPES["int"], Operand("constant", 4, value=0xFFFFFFFE)),
        Argument(TYPES["u64"], Operand("register", 4, base=80)),
        Argument(TYPES["sql"], Operand("memory", value=-8, base=32, index=40, shift=3)),
        Argument(TYPES["str"], Operand("nowhere")),
        Argument(TYPES["int"], None, 1),
    ]
    elements = argument_elements(arguments)
    assert len(elements) == PythonLimits.HIT_ARGUMENTS
    assert elements["source"].tolist()[:5] == [
        HitSource.HIT_CONSTANT, HitSource.HIT_REGISTER, HitSource.HIT_MEMORY,
        HitSource.HIT_NOWHERE, HitSource.HIT_CARRIED,
    ]  # fmt: skip
    # a signed constant is what it means, a register gives no more bytes than the note says
    assert int(elements[0]["value"]) == (1 << 64) - 2
    assert elements[1]["bytes"] == 4
    memory = elements[2]
    assert (int(memory["value"]), memory["base"], memory["index"]) == ((1 << 64) - 8, 32, 40)
    assert memory["shift"] == 3
    assert memory["flags"] == HitFlags.HIT_TEXT
    assert elements[1]["index"] == HitLimits.HIT_NO_REGISTER
    assert elements[4]["value"] == 1
    assert (elements[3]["text"], elements[3]["text_begin"]) == (1, TEXT_BYTES[2][0])


@pytest.mark.parametrize("count", TEXT_BYTES)
def test_texts_share_the_room(count):
    """Within the bounds that the program keeps to, and without overlap."""
    found = [place for place in text_places([TYPES["str"], TYPES["int"]] * count) if place]
    assert [number for number, _, _ in found] == list(range(count))
    end = 0
    for _, begin, size in found:
        assert begin == end
        assert not begin or (begin <= HitLimits.HIT_TEXT_LAST and size <= HitLimits.HIT_TEXT_MORE)
        end = begin + size
    assert end == PythonLimits.HIT_TEXT_BYTES


def site(name: str, *operands: Operand) -> UsdtSite:
    return UsdtSite("p", name, 0x10, 0x10, 0, "", operands)


def test_types_must_fit_the_note():
    four = site("a", Operand("register", 4, True, base=0))
    assert [one.type for one in typed_arguments(four, None)] == [TYPES["int"]]
    assert typed_arguments(four, ()) == ()
    with pytest.raises(UsageError, match="has 1 arguments"):
        typed_arguments(four, (TYPES["int"],) * 2)
    with pytest.raises(UsageError, match="that type needs 8"):
        typed_arguments(four, (TYPES["str"],))


def test_pairs():
    places = Places()
    begin, end = site("b", Operand("constant", value=1)), site("e", Operand("constant", value=2))
    pair = Pair("both", "b", "e", carried=(TYPES["int"],), nests=True)
    places.add_pair(pair, [begin], Path("/a"), "p")
    assert places.places == []  # without its end it means nothing
    places.add_pair(pair, [begin, end, end], Path("/a"), "p")
    elements = probe_elements(places.places)
    assert elements["pair"].tolist() == [1, 1, 1]
    nests = HitFlags.HIT_NESTS
    assert elements["role"].tolist() == [
        HitFlags.HIT_BEGINS | nests, *[HitFlags.HIT_ENDS | nests | HitFlags.HIT_ROW] * 2,
    ]  # fmt: skip
    assert [kind.label for kind in places.kinds()] == ["p:b", "p:both", "p:both"]
    assert elements["arguments"].tolist() == [1, 2, 2]


def test_there_is_room_for_so_many():
    places = Places()
    places.add_single("b", None, [site("b")] * HitLimits.HIT_PROBES, Path("/a"), "p")
    with pytest.raises(LoadError, match="ask for fewer"):
        places.add_single("b", None, [site("b")], Path("/a"), "p")
