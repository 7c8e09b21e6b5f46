"""What a CPython keeps lists of, read with its layout: thread states, and dicts such as sys.modules."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import Final

import numpy as np

from scope_ebpf.cpython.offsets import Layout
from scope_ebpf.loaders.python.memory import AddressError, ProcessMemory
from scope_ebpf.loaders.targets import PROC

THREADS_MAX: Final = 65536
ATTEMPTS: Final = 10  # threads begin and end while they are read
# dk_kind is general, unicode or split; a dict whose index has more than 64 MiB is not read
DICT_KIND_MAX: Final = 2
DICT_INDEX_LOG_MAX: Final = 26
DICT_ENTRIES_MAX: Final = 1 << 19

State = tuple[int, int, int]  # address of a thread state, its thread_id, its native_thread_id or 0


def read_threads(memory: ProcessMemory, layout: Layout, runtime: int) -> list[State]:
    """The thread states of a process, of all interpreters, the main one's first.

    Raises:
        AddressError: they changed each time while they were read.
        ProcessGoneError: the process ended.
    """
    for attempt in range(ATTEMPTS):
        try:
            interpreters: list[int] = []
            address = memory.u64(runtime + layout.runtime_interpreters_head)
            while address and len(interpreters) < THREADS_MAX:
                interpreters.append(address)
                address = memory.u64(address + layout.interpreter_next)
            states: list[State] = []
            for interpreter in reversed(interpreters):  # the list begins with the newest
                states += _threads_of(memory, layout, interpreter)
            return states
        except AddressError:
            if attempt == ATTEMPTS - 1:
                raise
    return []


def _threads_of(memory: ProcessMemory, layout: Layout, interpreter: int) -> list[State]:
    native = layout.tstate_native_thread_id
    found: list[State] = []
    before = 0
    address = memory.u64(interpreter + layout.interpreter_threads_head)
    while address:
        words = struct.unpack(
            f"<{layout.tstate_bytes // 8}Q", memory.read(address, layout.tstate_bytes // 8 * 8)
        )
        owner, previous = words[layout.tstate_interpreter // 8], words[layout.tstate_previous // 8]
        if owner != interpreter or previous != before or len(found) >= THREADS_MAX:
            raise AddressError(
                f"process {memory.tgid} has no list of thread states at {interpreter:#x}"
            )
        found.append(
            (
                address,
                words[layout.tstate_thread_id // 8],
                0 if native is None else words[native // 8],
            )
        )
        before, address = address, words[layout.tstate_next // 8]
    return found


def tids_of(tgid: int) -> dict[int, int]:
    """The threads of a process: numbers in their own PID namespace to ours.

    What a process itself knows, as native_thread_id, is a number in its innermost namespace.
    """
    folder = PROC / str(tgid)
    try:
        numbers = [int(name) for name in os.listdir(folder / "task")]
        if len(_namespace_pids(folder / "status")) == 1:
            return {number: number for number in numbers}
        inner: dict[int, int] = {}
        for number in numbers:
            with contextlib.suppress(OSError):
                inner[_namespace_pids(folder / "task" / str(number) / "status")[-1]] = number
        return inner
    except OSError:
        return {}


def has_own_pids(tgid: int) -> bool:
    """Whether a process is in another PID namespace than ours; also True if it is gone."""
    try:
        return len(_namespace_pids(PROC / str(tgid) / "status")) > 1
    except OSError:
        return True


def _namespace_pids(status: Path) -> list[int]:
    for line in status.read_text(errors="replace").splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return [0]


def dict_entries(memory: ProcessMemory, layout: Layout, keys: int) -> tuple[int, int, int]:
    """Where a dict's entries are, how many are used, and of how many words each is.

    The last two words of an entry are key and value; those of one that was deleted are 0.

    Args:
        keys: address of its PyDictKeysObject.

    Raises:
        AddressError: there is none.
        ProcessGoneError: the process ended.
    """
    width = 3  # hash, key, value
    if layout.keys_size is not None:
        slots = memory.u64(keys + layout.keys_size)
        whole = slots > 0 and not slots & (slots - 1)
        # an index has as many bytes as it needs (Objects/dictobject.c, dk_get_index)
        index_bytes = slots * (1 if slots <= 0xFF else 2 if slots <= 0xFFFF else 4)
    else:
        assert layout.keys_log2_index_bytes is not None and layout.keys_kind is not None
        log_bytes = memory.u8(keys + layout.keys_log2_index_bytes)
        kind = memory.u8(keys + layout.keys_kind)
        whole = log_bytes <= DICT_INDEX_LOG_MAX and kind <= DICT_KIND_MAX
        index_bytes = 1 << log_bytes
        if kind != layout.keys_kind_general:
            width = 2
    count = memory.i64(keys + layout.keys_entries)
    if not whole or index_bytes > 1 << DICT_INDEX_LOG_MAX or not 0 <= count <= DICT_ENTRIES_MAX:
        raise AddressError(f"process {memory.tgid} has no keys of a dict at {keys:#x}")
    return keys + layout.keys_indices + index_bytes, count, width


def dict_values(
    memory: ProcessMemory, layout: Layout, address: int, names: tuple[bytes, ...]
) -> dict[bytes, int]:
    """Addresses of the values that a dict has for some names in ASCII, as sys.modules has them.

    Raises:
        AddressError: there is no dict at that address, or it changed while it was read.
        ProcessGoneError: the process ended.
    """
    keys = memory.u64(address + layout.dict_keys)
    values = memory.u64(address + layout.dict_values)
    place, count, width = dict_entries(memory, layout, keys)
    data = memory.read(place, count * width * 8)
    entries = np.frombuffer(data, "<u8").reshape(count, width)
    found_values = entries[:, width - 1]
    if values:  # a split one
        data = memory.read(values + layout.values_items, count * 8)
        found_values = np.frombuffer(data, "<u8")
    used = (entries[:, width - 2] != 0) & (found_values != 0)
    places, found_values = entries[:, width - 2][used], found_values[used]
    longest = max(map(len, names))
    texts = memory.read_many(places, layout.unicode_ascii + longest)
    lengths = texts[:, layout.unicode_length : layout.unicode_length + 8].copy().view("<u8")[:, 0]
    found = {}
    for name in names:
        same = texts[:, layout.unicode_ascii : layout.unicode_ascii + len(name)] == np.frombuffer(
            name, "u1"
        )
        for at in np.flatnonzero(same.all(axis=1) & (lengths == len(name))):
            found[name] = int(found_values[at])
    return found
