"""Where threads of a CPython keep their thread state: one distance from each one's thread pointer.

Up to 3.14 that is the thread-specific data of `autoTSSkey`, which PyGILState reads; on glibc it is in the
thread's struct pthread, where the thread pointer points. From 3.15 on it is a thread-local variable, below
the thread pointer. Either keeps the state while the thread waits without the GIL, other than
`_Py_tss_tstate`. A thread that runs in sub-interpreters has its first state there up to 3.11, and from 3.12
on the one that it used last (Python/pystate.c).
"""

from __future__ import annotations

import contextlib
import re
import struct
from typing import Final

import numpy as np

from scope_ebpf.cpython.offsets import Layout
from scope_ebpf.errors import TargetError
from scope_ebpf.loaders.python.binaries import PythonBinary
from scope_ebpf.loaders.python.memory import AddressError, ProcessMemory
from scope_ebpf.loaders.python.states import State

MUSL: Final = re.compile(r"/ld-musl-[^/\n]*$", re.M)
# nptl/descr.h: where specific_1stblock, of 32 entries {sequence, data}, is in glibc's struct pthread. It
# has been there since 2.4 on x86-64; a slot is used only if it holds what it should.
GLIBC_SPECIFIC: Final = 0x310
GLIBC_FIRST_BLOCK: Final = 32
PTHREAD_BYTES: Final = 0x800  # of it that may hold a slot
TLS_BYTES: Final = 0x1000  # below it: variables of the program and of libraries mapped with it
ENDBR64: Final = b"\xf3\x0f\x1e\xfa"
READ_FS: Final = b"\x64\x48\x8b\x04\x25"  # mov %fs:disp32, %rax
READ_GOT: Final = b"\x48\x8b\x05"  # mov disp32(%rip), %rax
READ_FS_RAX: Final = b"\x64\x48\x8b\x00"  # mov %fs:(%rax), %rax


class NoSlotError(TargetError):
    """The place is none that can be read; the message is a clause."""


def find_slot(
    memory: ProcessMemory,
    layout: Layout,
    binary: PythonBinary,
    bias: int,
    maps: str,
    states: list[State],
) -> int | None:
    """The distance of the slot from the thread pointer; None: it cannot be told yet, ask again.

    Raises:
        NoSlotError: there is none.
        AddressError: the runtime cannot be read.
    """
    bound = [(tstate, thread_id) for tstate, thread_id, _ in states if thread_id]
    if layout.runtime_tss is None:
        place = _variable(memory, binary, bias)
        low, high = -TLS_BYTES, 0
    elif MUSL.search(maps):
        raise NoSlotError("its C library is musl, which keeps thread-specific data elsewhere")
    else:
        tss = bias + binary.runtime + layout.runtime_tss
        if not memory.i32(tss + layout.tss_initialized):
            return None
        key = memory.u32(tss + layout.tss_key)
        if key >= GLIBC_FIRST_BLOCK:
            raise NoSlotError(
                f"it keeps its thread state under the thread-specific key {key}; glibc has only the"
                f" first {GLIBC_FIRST_BLOCK} in a place that can be read without its help"
            )
        place = GLIBC_SPECIFIC + 16 * key + 8
        low, high = 0, PTHREAD_BYTES
    # a thread that is being started has no state in its slot yet: one that has it is enough
    if place is not None and any(
        _holds(memory, thread + place, tstate) for tstate, thread in bound
    ):
        return place
    common: set[int] | None = None
    for tstate, thread in bound:
        with contextlib.suppress(AddressError):
            words = np.frombuffer(memory.read(thread + low, high - low), "<u8")
            places = {low + 8 * int(at) for at in np.flatnonzero(words == tstate)}
            common = places if common is None else common & places
    if not common:
        raise NoSlotError("where its threads keep their thread state was not found")
    if len(common) > 1 and layout.runtime_tss is None:
        # also the variable with the thread state that runs has it, but only while it runs
        distance = binary.gilstate_distance
        common = {place for place in common if distance and place - distance in common}
    return common.pop() if len(common) == 1 else None


def _holds(memory: ProcessMemory, address: int, tstate: int) -> bool:
    try:
        return memory.u64(address) == tstate
    except AddressError:
        return False


def _variable(memory: ProcessMemory, binary: PythonBinary, bias: int) -> int | None:
    """Where _Py_tss_gilstate is, which replaced the key in 3.15 (Python/pystate.c).

    PyGILState_GetThisThreadState() does nothing but to return it.
    """
    code = binary.gilstate.removeprefix(ENDBR64)
    if code.startswith(READ_FS):
        return int(struct.unpack_from("<i", code, len(READ_FS))[0])
    if code.startswith(READ_GOT) and code[7:11] == READ_FS_RAX:
        assert binary.gilstate_address is not None
        behind = bias + binary.gilstate_address + len(binary.gilstate) - len(code) + 7
        with contextlib.suppress(AddressError):
            distance: int = struct.unpack_from("<i", code, len(READ_GOT))[0]
            return memory.i64(behind + distance)
    return None
