"""USDT probes of a file: the notes that <sys/sdt.h> leaves in it, and the places of their arguments.

A note (systemtap's UserSpaceProbeImplementation, which other makers of such probes follow) has the address
of a nop, that of `.stapsdt.base` when it was made, that of a semaphore or 0, the provider, the name, and a
string with the arguments: `8@%rdi -4@-20(%rbp) 4@$5 4@limit(%rip) 8@8(%rax,%rbx,8)`. A program may ask its
semaphore, a counter in its memory, whether anybody listens before it hits the nop; the kernel counts it up
in every process while a uprobe names it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elftools.elf.elffile import ELFFile

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import DAMAGE
from scope_ebpf.loaders.probed_files import ProbedFile

NOTE_TYPE = 3  # of owner stapsdt

# Where struct pt_regs keeps each register: arch/x86/include/asm/ptrace.h and, for arm64,
# arch/arm64/include/uapi/asm/ptrace.h.
_X86_ORDER = "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs flags rsp"
_X86 = {name: 8 * place for place, name in enumerate(_X86_ORDER.split())}
# their lower parts; the second byte of four of them has a name, too
for _letter in "abcd":
    _whole = _X86[f"r{_letter}x"]
    _X86 |= {f"e{_letter}x": _whole, f"{_letter}x": _whole, f"{_letter}l": _whole}
    _X86[f"{_letter}h"] = _whole + 1
for _short in ("si", "di", "bp", "sp"):
    _X86 |= dict.fromkeys((f"e{_short}", _short, f"{_short}l"), _X86[f"r{_short}"])
for _number in range(8, 16):
    _X86 |= dict.fromkeys((f"r{_number}{part}" for part in "dwb"), _X86[f"r{_number}"])
_ARM64 = {f"{letter}{number}": 8 * number for number in range(31) for letter in "xw"}
_ARM64 |= {"sp": 248, "pc": 256}
REGISTERS = {"EM_X86_64": _X86, "EM_AARCH64": _ARM64}
# The registers of a function's arguments, and of its result.
FUNCTION_ARGUMENTS = {
    "EM_X86_64": ("rdi", "rsi", "rdx", "rcx", "r8", "r9"),
    "EM_AARCH64": tuple(f"x{number}" for number in range(8)),
}
FUNCTION_RESULT = {"EM_X86_64": "rax", "EM_AARCH64": "x0"}

_SIZED = re.compile(r"(-?)([1248])(f?)@(.+)")
_X86_MEMORY = re.compile(
    r"(?P<sum>[^(%$]*)\((?:%(?P<base>\w+))?(?:,\s*%(?P<index>\w+)(?:,\s*(?P<scale>[1248]))?)?\)"
)
_ARM64_MEMORY = re.compile(
    r"\[(?P<base>\w+)(?:,\s*(?:#?(?P<offset>-?\d+)|(?P<index>x\d+)(?:,\s*lsl\s*#(?P<shift>\d))?))?\]"
)
_SYMBOL = r"[A-Za-z_.$][\w.$@]*"


@dataclass(frozen=True)
class Operand:
    """Where an argument is when a probe is hit.

    Attributes:
        source: a constant, a register, memory, or nowhere that can be read.
        size_bytes, signed, floating: what is there.
        value: the constant, or what is added to the address.
        base, index: registers by their place in struct pt_regs; None: there is none.
        shift: of the index register.
        why: of nowhere: the reason.
    """

    source: Literal["constant", "register", "memory", "nowhere"]
    size_bytes: int = 8
    signed: bool = False
    floating: bool = False
    value: int = 0
    base: int | None = None
    index: int | None = None
    shift: int = 0
    why: str = ""

    @property
    def type_name(self) -> str:
        """Its type as a probe's specification names it."""
        return f"{'f' if self.floating else 'i' if self.signed else 'u'}{8 * self.size_bytes}"


@dataclass(frozen=True)
class UsdtSite:
    """One place of a USDT probe.

    Attributes:
        provider, name: of the probe.
        address: of the nop, in the file's own numbers.
        offset: of the nop in the file.
        semaphore: offset of the semaphore in the file; 0: it has none.
        arguments: the note's own words.
        operands: what they mean.
    """

    provider: str
    name: str
    address: int
    offset: int
    semaphore: int
    arguments: str
    operands: tuple[Operand, ...]


def read_sites(file: ProbedFile) -> list[UsdtSite]:
    """The USDT probes of a file, in the order of its notes.

    Raises:
        FormatError: a note is damaged.
    """
    try:
        notes, base = _notes(file.elf)
        return [_site(file, note, base) for note in notes]
    except DAMAGE as error:
        raise FormatError(
            f"cannot read the USDT probes of {file.path}: {str(error) or type(error).__name__}"
        ) from error


def may_have_probes(path: Path) -> bool:
    """Whether a file has notes of USDT probes; reads no more of it than its table of sections."""
    try:
        with path.open("rb") as stream:
            return ELFFile(stream).get_section_by_name(".note.stapsdt") is not None
    except (OSError, *DAMAGE):
        return False


def _notes(elf: ELFFile) -> tuple[list[bytes], int | None]:
    """The notes' contents, and where .stapsdt.base is."""
    section = elf.get_section_by_name(".note.stapsdt")
    found = elf.get_section_by_name(".stapsdt.base")
    if section is None:
        return [], None
    data, at, notes = section.data(), 0, []
    while at + 12 <= len(data):
        name_bytes, content_bytes, kind = (
            int.from_bytes(data[at + 4 * word : at + 4 * word + 4], "little") for word in range(3)
        )
        begin = at + 12 + -(-name_bytes // 4) * 4
        if begin + content_bytes > len(data):
            raise ValueError("its notes are cut")
        if kind == NOTE_TYPE and data[at + 12 : at + 12 + name_bytes] == b"stapsdt\0":
            notes.append(data[begin : begin + content_bytes])
        at = begin + -(-content_bytes // 4) * 4
    return notes, None if found is None else found["sh_addr"]


def _site(file: ProbedFile, note: bytes, base: int | None) -> UsdtSite:
    address, noted_base, semaphore = (
        int.from_bytes(note[8 * word : 8 * word + 8], "little") for word in range(3)
    )
    provider, name, arguments = (part.decode() for part in note[24:].split(b"\0")[:3])
    # prelink moves addresses, but not those in notes
    moved = 0 if base is None or not noted_base else base - noted_base
    address += moved
    offset = file.code_offset(address)
    if offset is None:
        raise ValueError(f"{provider}:{name} is at {address:#x}, where no code is")
    counter = file.data_offset(semaphore + moved) if semaphore else 0
    if counter is None:
        raise ValueError(f"the semaphore of {provider}:{name} is not in the file")
    operands = tuple(parse_operand(text, file, address) for text in split_arguments(arguments))
    return UsdtSite(provider, name, address, offset, counter, arguments, operands)


def split_arguments(arguments: str) -> list[str]:
    """The arguments one by one; those of ARM have blanks within.

    >>> split_arguments("8@%rdi -4@-20(%rbp)")
    ['8@%rdi', '-4@-20(%rbp)']
    >>> split_arguments("8@[x0, 16] 4@5")
    ['8@[x0, 16]', '4@5']
    """
    return re.findall(r"\S+@(?:\[[^\]]*\]|\([^)]*\)|[^\s(\[]+(?:\([^)]*\))?)", arguments)


def parse_operand(text: str, file: ProbedFile, address: int) -> Operand:
    """One argument of a note.

    `address` is that of the probe: what is relative to %rip is found from there.

    Raises:
        ValueError: it is no argument.
    """
    match = _SIZED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no argument of a probe")
    sign, size, floating, place = match.groups()
    operand = _operand(place, file, address)
    return Operand(
        operand.source, int(size), bool(sign), bool(floating), operand.value,
        operand.base, operand.index, operand.shift, operand.why,
    )  # fmt: skip


def _operand(place: str, file: ProbedFile, address: int) -> Operand:
    registers = REGISTERS.get(file.machine)
    if registers is None:
        return Operand("nowhere", why=f"the registers of {file.machine} are not known")
    if file.machine == "EM_AARCH64":
        return _arm64_operand(place, registers)
    if place.startswith("$"):
        return _sum(place[1:], file, "constant")
    if place.startswith("%"):
        if place[1:] not in registers:
            return Operand("nowhere", why=f"{place} is no register that can be read")
        return Operand("register", base=registers[place[1:]])
    match = _X86_MEMORY.fullmatch(place)
    if match is None:
        if re.fullmatch(r"%?[dcsefg]s:.*", place):
            return Operand("nowhere", why=f"{place} is relative to a segment")
        return _sum(place, file, "memory")
    base, index = match["base"], match["index"]
    if any(name is not None and name not in registers for name in (base, index)):
        return Operand("nowhere", why=f"{place} uses a register that cannot be read")
    total = _sum(match["sum"] or "0", file, "memory")
    if total.source == "nowhere":
        return total
    value = total.value
    if base == "rip" and re.search(r"[A-Za-z_]", match["sum"]):
        value -= address  # the symbol's distance from the probe, where %rip will be
    elif base == "rip":
        return Operand("nowhere", why=f"{place} is relative to an unknown instruction")
    return Operand(
        "memory",
        value=value,
        base=None if base is None else registers[base],
        index=None if index is None else registers[index],
        shift=int(match["scale"] or 1).bit_length() - 1,
    )


def _sum(text: str, file: ProbedFile, source: Literal["constant", "memory"]) -> Operand:
    """A sum of numbers and symbols, such as 40+CheckpointStats."""
    total = 0
    if not re.fullmatch(
        rf"[-+]?(?:0x[0-9a-fA-F]+|\d+|{_SYMBOL})(?:[-+](?:0x[0-9a-fA-F]+|\d+|{_SYMBOL}))*", text
    ):
        raise ValueError(f"{text!r} is no place of an argument")
    for sign, term in re.findall(rf"([-+]?)(0x[0-9a-fA-F]+|\d+|{_SYMBOL})", text):
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", term):
            number = int(term, 16 if term.startswith("0x") else 10)
        else:
            found = file.symbol(term)
            if found is None:
                return Operand("nowhere", why=f"the file has no symbol {term}")
            number = found
        total += -number if sign == "-" else number
    return Operand(source, value=total)


def _arm64_operand(place: str, registers: dict[str, int]) -> Operand:
    if re.fullmatch(r"#?-?\d+", place):
        return Operand("constant", value=int(place.lstrip("#")))
    if place in registers:
        return Operand("register", base=registers[place])
    match = _ARM64_MEMORY.fullmatch(place)
    if match is None or match["base"] not in registers:
        return Operand("nowhere", why=f"{place} cannot be read")
    return Operand(
        "memory",
        value=int(match["offset"] or 0),
        base=registers[match["base"]],
        index=None if match["index"] is None else registers[match["index"]],
        shift=int(match["shift"] or 0),
    )
