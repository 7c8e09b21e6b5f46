"""Where in a function a uprobe is cheap: at an instruction that the kernel emulates.

A uprobe replaces an instruction by a breakpoint. The kernel emulates a few instructions; any other is
executed out of line and single-stepped, which costs a second trap. Measured per call with an empty program
on Linux 6.18 (virtual machine, x86-64), entry / return probe at a function that begins with

- push of a register, jmp, jcc or call (relative), nop of one or two bytes: 0.5 / 0.7 us
- nop of three or four bytes: 0.5 / 0.7 us; of five: 0.35 / 0.6 us. Before 6.18 they were single-stepped
- all else that was tried (endbr64, mov, sub, test, lea, xor, pop, ret, push of a number or memory, nop
  with an operand-size prefix and a long form): 9.6 / 10.1 us
- nop with a segment prefix (`cs nopw`), and `data16 rex.W call`, the padded call of __tls_get_addr:
  the kernel refuses the probe with ENOTSUPP

Sources: arch/x86/kernel/uprobes.c, branch_setup_xol_ops() and push_setup_xol_ops().
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from scope_ebpf.loaders.elf import SharedLibrary

if TYPE_CHECKING:
    from capstone import Cs

ARGUMENTS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
# How far from a function's entry an instruction is sought.
PROLOGUE_BYTES = 64
# How far jumps are sought that may come back to it, in a function whose length is not known.
BODY_BYTES = 2048
NAMES_OF_PARTS = {
    part: full
    for full, parts in {
        "rdi": "edi di dil", "rsi": "esi si sil", "rdx": "edx dx dl dh", "rcx": "ecx cx cl ch",
        "rax": "eax ax al ah", "rbx": "ebx bx bl bh", "rsp": "esp sp spl", "rbp": "ebp bp bpl",
        **{f"r{number}": f"r{number}d r{number}w r{number}b" for number in range(8, 16)},
    }.items()
    for part in parts.split()
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """An instruction for a uprobe.

    Attributes:
        offset: in the file.
        emulated: the kernel emulates it; None: not known on this machine.
        instruction: its text; empty if it was not looked at.
    """

    offset: int
    emulated: bool | None
    instruction: str = ""


def is_emulated(code: bytes) -> bool:
    """Whether every kernel emulates the x86-64 instruction that this is, or begins with.

    >>> is_emulated(bytes.fromhex("4154")), is_emulated(bytes.fromhex("4883ec08"))  # push, sub
    (True, False)
    """
    if code[:2] == b"\x66\x90":  # nop
        return True
    if code[:1] == b"\x41":  # push %r8 to %r15
        return 0x50 <= code[1] <= 0x57 if len(code) > 1 else False
    if code[:1] == b"\x0f":
        return 0x80 <= code[1] <= 0x8F if len(code) > 1 else False
    first = code[0] if code else 0
    return 0x50 <= first <= 0x57 or 0x70 <= first <= 0x7F or first in {0x90, 0xE8, 0xE9, 0xEB}


def choose_site(
    library: SharedLibrary,
    offset: int,
    *,
    keep: tuple[str, ...] = ARGUMENTS,
    at_return: bool = False,
) -> Place:
    """The best instruction for a uprobe at the beginning of a function.

    Every call must pass it exactly once before anything that matters has changed: it lies before the
    first branch, and no jump of the function leads back behind its entry up to there.

    Args:
        library: the file.
        offset: the function's in the file.
        keep: registers that must still hold what the caller left there; a return probe needs none.
        at_return: also for a return probe. Its breakpoint takes the return address from where the stack
            pointer shows, so that must be as at the entry.

    Returns:
        The first instruction that is emulated; the function's entry if there is none.
    """
    if library.machine != "EM_X86_64":
        return Place(offset, None)
    kept = {*keep, "rsp"} if at_return else set(keep)
    entry: Place | None = None
    length = min(library.extent(offset) or PROLOGUE_BYTES, PROLOGUE_BYTES)
    start = library.address(offset) or 0
    for instruction in _disassembler().disasm(library.code(offset, length), start):
        place = Place(
            instruction.address - start + offset,
            is_emulated(bytes(instruction.bytes)),
            f"{instruction.mnemonic} {instruction.op_str}".strip(),
        )
        entry = entry or place
        if place.emulated:
            if place.offset == offset or not _comes_back(library, offset, place.offset):
                return place
            break
        if _diverts(instruction) or kept & _written(instruction):
            break
    return entry or Place(offset, None)


def direct_callees(
    library: SharedLibrary, offset: int, length: int, *, jumps: bool = True
) -> list[int]:
    """Offsets in the file that a piece of x86-64 code calls, or jumps to, by distance, in order.

    Decoding starts at `offset`, which must be the beginning of an instruction, and ends at the first bytes
    that are none. Other machines: none.
    """
    start = library.address(offset)
    if library.machine != "EM_X86_64" or start is None:
        return []
    found = []
    for _, _, mnemonic, operand in _disassembler().disasm_lite(library.code(offset, length), start):
        leads = mnemonic == "call" or (jumps and mnemonic[0] == "j")
        if leads and operand.startswith("0x"):
            target = library.offset(int(operand, 16))
            if target is not None:
                found.append(target)
    return found


@cache
def _disassembler() -> "Cs":
    import capstone

    made = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    made.detail = True
    return made


def _written(instruction: Any) -> set[str]:
    """The registers that an instruction changes, by their full names."""
    names = (instruction.reg_name(number) for number in instruction.regs_access()[1])
    return {NAMES_OF_PARTS.get(name, name) for name in names}


def _diverts(instruction: Any) -> bool:
    import capstone

    groups = (capstone.CS_GRP_JUMP, capstone.CS_GRP_CALL, capstone.CS_GRP_RET, capstone.CS_GRP_INT)
    return any(instruction.group(number) for number in groups)


def _comes_back(library: SharedLibrary, entry: int, site: int) -> bool:
    """Whether a jump of the function leads behind the entry and not behind the site: a loop with it."""
    length = library.extent(entry) or BODY_BYTES  # another function behind it does not jump there
    return any(entry < target <= site for target in direct_callees(library, entry, length))
