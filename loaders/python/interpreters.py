"""Finding the CPython in a live process: which version it is, where its state is, and its threads.

What a process has mapped tells whether it is a Python at all: the program itself, or a libpython. An
interpreter that is linked into a library of another name, and one that was copied by a packer into
anonymous memory, are not found. The rest is read from the process, from `_PyRuntime` on, and checked
while it is read: that each thread state belongs to the interpreter, that sys.modules is a dict, that
each thread's slot holds its thread state, that contexts are contexts. What fails such a check is not
used, since it would show wrong stacks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from scope_ebpf.cpython.offsets import Layout, UnknownLayoutError, Version, layout_of
from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.python.binaries import OtherBinary, PythonBinary, read_binary
from scope_ebpf.loaders.python.memory import (
    AddressError,
    Mapping,
    ProcessGoneError,
    ProcessMemory,
    read_maps,
)
from scope_ebpf.loaders.targets import PROC
from scope_ebpf.records import InterpreterFlags

LIBRARY: Final = re.compile(r"^.*/lib(?:python|pypy)[^/\n]*$", re.M)
GREENLET: Final = re.compile(r"/_?greenlet\.[^/\n]*so$", re.M)
MUSL: Final = re.compile(r"/ld-musl-[^/\n]*$", re.M)
# nptl/descr.h: where specific_1stblock, of 32 entries {sequence, data}, is in glibc's struct pthread. It
# has been there since 2.4 on x86-64; a slot is used only if it holds what it should.
GLIBC_SPECIFIC: Final = 0x310
GLIBC_FIRST_BLOCK: Final = 32
GLIBC_TID: Final = 720  # `tid` in the same struct
PTHREAD_BYTES: Final = 0x800  # of it that may hold a slot
TLS_BYTES: Final = 0x1000  # below it: variables of the program and of libraries mapped with it
THREADS_MAX: Final = 65536
ATTEMPTS: Final = 3  # threads begin and end while they are read
ENDBR64: Final = b"\xf3\x0f\x1e\xfa"
READ_FS: Final = b"\x64\x48\x8b\x04\x25"  # mov %fs:disp32, %rax
READ_GOT: Final = b"\x48\x8b\x05"  # mov disp32(%rip), %rax
READ_FS_RAX: Final = b"\x64\x48\x8b\x00"  # mov %fs:(%rax), %rax
# Modules of programs in which contexts other than a thread's own are made.
CONTEXT_USERS: Final = (b"asyncio", b"trio", b"uvloop", b"curio", b"anyio", b"_asyncio")


@dataclass(frozen=True)
class NotReady:
    """A Python that has not come so far that it could be looked into: ask again."""


@dataclass(frozen=True)
class Unsupported:
    """A Python that cannot be looked into.

    Attributes:
        reason: a clause, such as: it is PyPy, not CPython.
    """

    reason: str


@dataclass(frozen=True)
class Thread:
    """A thread that runs Python.

    Attributes:
        tstate: address of its thread state.
        tid: as the kernel knows it, in our PID namespace; 0: its thread has no such number (any more).
        thread_id: pthread_self(), on glibc and musl also its thread pointer.
    """

    tstate: int
    tid: int
    thread_id: int


@dataclass(frozen=True)
class Interpreter:
    """A CPython process that can be looked into.

    Attributes:
        tgid: the process.
        version: major, minor, micro.
        layout: where things are in it.
        path: the file that has the interpreter, as the process's maps name it.
        file: where that very file can be opened, also if it was deleted or is in a container.
        bias: what to add to an address in the file.
        runtime: address of _PyRuntime.
        address: of the main PyInterpreterState.
        gil: address of the struct that holds the GIL.
        tss: where a thread's thread state is kept, from its thread pointer.
        thread_tid: where the kernel's tid is kept from there; 0: not known.
        context_type: address of PyContext_Type; 0: not known.
        greenlets: the greenlet extension is mapped.
        contexts: contexts other than those of threads are, or may be, made in it.
        record: all of that for the kernel, as records.INTERPRETER.
    """

    tgid: int
    version: Version
    layout: Layout
    path: str
    file: Path
    bias: int
    runtime: int
    address: int
    gil: int
    tss: int
    thread_tid: int
    context_type: int
    greenlets: bool
    contexts: bool
    record: np.ndarray[Any, np.dtype[Any]] = field(repr=False, compare=False)


# Files by device, inode and path: what they are, and the layouts of those that have an interpreter.
_binaries: dict[tuple[str, int, str], PythonBinary | OtherBinary] = {}
_layouts: dict[tuple[Version, bytes], Layout | Unsupported] = {}
REMEMBERED: Final = 4096


def find_interpreter(tgid: int) -> Interpreter | NotReady | Unsupported | None:
    """The CPython in a process; None if there is none, or no such process.

    NotReady is also what a process is that executed a program linked with libpython a moment ago. One that
    embeds Python, such as uwsgi with a plugin, is None until it loads the library.

    Raises:
        NotPermittedError: this process may not look into it.
    """
    try:
        maps = read_maps(tgid)
        found, waits = _find_binary(tgid, maps)
        if found is None:
            if re.search(r"/libpypy[^/\n]*$", maps, re.M):
                return Unsupported("it is PyPy, not CPython")
            return NotReady() if waits else None
        mapping, binary = found
        layout = _layout(binary)
        if isinstance(layout, Unsupported):
            return layout
        with ProcessMemory(tgid) as memory:
            return _Search(memory, maps, mapping, binary, layout).result()
    except ProcessGoneError:
        return None


def threads(interpreter: Interpreter) -> list[Thread]:
    """The threads of the process that run Python, the newest first, those of sub-interpreters last.

    Raises:
        ProcessGoneError: the process ended.
        NotPermittedError: this process may not look into it.
        AddressError: they changed all the time while they were read.
    """
    with ProcessMemory(interpreter.tgid) as memory:
        states = read_threads(memory, interpreter.layout, interpreter.runtime)
        tids = _tids(interpreter.tgid)
        found = []
        for tstate, thread_id, native in states:
            tid = 0
            if interpreter.thread_tid and thread_id:
                with contextlib.suppress(AddressError):  # its thread is gone
                    tid = memory.u32(thread_id + interpreter.thread_tid)
            # after a fork of 3.11 the native id is still that of the thread in the parent
            found.append(Thread(tstate, tids.get(tid) or tids.get(native, 0), thread_id))
        return found


# ---- files ----


def _find_binary(tgid: int, maps: str) -> tuple[tuple[Mapping, PythonBinary] | None, bool]:
    """The first mapping of the file with the interpreter, and whether one is going to be mapped."""
    waits = False
    candidates = [found[0] for found in LIBRARY.finditer(maps)] if "/libpy" in maps else []
    link = PROC / str(tgid) / "exe"
    try:
        program = os.readlink(link)
    except OSError:  # a kernel thread, or it has ended
        return None, False
    end = maps.find(f" {program}\n")
    if end >= 0:
        candidates.append(maps[maps.rfind("\n", 0, end) + 1 : maps.index("\n", end)])
    else:  # it is just being executed: what is mapped is not its own yet
        try:
            inode = link.stat().st_ino
        except OSError:
            return None, False
        binary = _binary(("", inode, program), lambda: link)
        return None, isinstance(binary, PythonBinary) or binary.needs_python
    seen = set()
    for line in candidates:
        mapping = Mapping.of_line(line)
        key = (mapping.device, mapping.inode, mapping.path)
        if key not in seen:
            seen.add(key)
            binary = _binary(key, functools.partial(mapping.open_path, tgid))
            if isinstance(binary, PythonBinary):
                return (mapping, binary), False
            waits = waits or binary.needs_python
    return None, waits


def _binary(key: tuple[str, int, str], open_path: Callable[[], Path]) -> PythonBinary | OtherBinary:
    """What a file is; one that cannot be read is none with a CPython."""
    binary = _binaries.get(key)
    if binary is None:
        if len(_binaries) >= REMEMBERED:
            _binaries.clear()
        try:
            binary = read_binary(open_path())
        except FormatError:
            binary = OtherBinary(needs_python=False)
        _binaries[key] = binary
    return binary


def _layout(binary: PythonBinary) -> Layout | Unsupported:
    """The layout of a file's interpreter."""
    if binary.refusal or binary.version is None:
        return Unsupported(binary.refusal)
    key = (binary.version, binary.runtime_data)
    found = _layouts.get(key)
    if found is None:
        try:
            found = layout_of(binary.version, binary.runtime_data)
        except UnknownLayoutError as error:
            found = Unsupported(str(error))
        _layouts[key] = found
    return found


class _Search:
    """What is looked for in one process whose file with the interpreter is known."""

    def __init__(
        self,
        memory: ProcessMemory,
        maps: str,
        mapping: Mapping,
        binary: PythonBinary,
        layout: Layout,
    ) -> None:
        self.memory = memory
        self.maps = maps
        self.mapping = mapping
        self.binary = binary
        self.layout = layout
        self.bias = binary.bias(mapping.start, mapping.offset)
        self.runtime = self.bias + binary.runtime

    def result(self) -> Interpreter | NotReady | Unsupported:
        """The interpreter, if it is one that can be used."""
        layout = self.layout
        try:
            ready = self.memory.i32(self.runtime + layout.runtime_initialized)
            main = self.memory.u64(self.runtime + layout.runtime_interpreters_main)
            if not ready or not main:
                return NotReady()
            version = self._version(main)
            if version is None:
                return self._unknown("sys.modules and sys.hexversion are not where they should be")
            states = read_threads(self.memory, layout, self.runtime)
        except AddressError as error:
            # while it starts or ends, that is when most is still or already 0
            return self._unknown(str(error)) if self._settled() else NotReady()
        if not any(thread_id for _, thread_id, _ in states):
            return NotReady()
        tss = self._slot(states)
        if not isinstance(tss, int):
            return tss
        layout, contexts = self._contexts(states, main)
        gil = self._gil(main)
        tid_place = self._tid_place(states)
        greenlets = GREENLET.search(self.maps) is not None
        record = layout.record()
        record["tss"] = tss
        flags = InterpreterFlags(int(record["flags"]))
        if gil:
            flags |= InterpreterFlags.INTERPRETER_GIL
            record["gil"] = gil
        if contexts:
            flags |= InterpreterFlags.INTERPRETER_CONTEXTS
        # up to 3.10 there are no data stacks that would tell them apart
        if greenlets and layout.tstate_datastack_chunk is not None:
            flags |= InterpreterFlags.INTERPRETER_GREENLETS
        if layout.tstate_native_thread_id is None:
            record["thread_tid"] = tid_place
        record["flags"] = int(flags)
        return Interpreter(
            tgid=self.memory.tgid,
            version=version,
            layout=layout,
            path=self.mapping.path,
            file=self.mapping.open_path(self.memory.tgid),
            bias=self.bias,
            runtime=self.runtime,
            address=main,
            gil=gil,
            tss=tss,
            thread_tid=tid_place,
            context_type=self._at_bias(self.binary.context_type),
            greenlets=greenlets,
            contexts=contexts,
            record=record,
        )

    def _at_bias(self, address: int | None) -> int:
        return 0 if address is None else self.bias + address

    def _unknown(self, what: str) -> Unsupported:
        version = ".".join(map(str, self.layout.version))
        return Unsupported(f"its layout is not that of Python {version}: {what}")

    def _settled(self) -> bool:
        """Whether it is still initialised."""
        try:
            return bool(self.memory.i32(self.runtime + self.layout.runtime_initialized))
        except AddressError:
            return False

    def _version(self, main: int) -> Version | None:
        """The version as it is known now; None if the interpreter is not of that layout."""
        layout = self.layout
        modules = self.memory.u64(main + layout.interpreter_modules)
        kind = self._at_bias(self.binary.dict_type)
        if kind and self.memory.u64(modules + layout.object_type) != kind:
            return None
        if layout.version >= (3, 11):  # the file had it
            return layout.version
        system = self.memory.u64(main + layout.interpreter_sysdict)
        number = dict_values(self.memory, layout, system, (b"hexversion",)).get(b"hexversion")
        if number is None:
            return None
        hexversion = self.memory.u32(number + layout.int_digits)
        version = (hexversion >> 24, hexversion >> 16 & 255, hexversion >> 8 & 255)
        return version if version[:2] == layout.version[:2] else None

    # ---- where a thread finds its thread state ----

    def _slot(self, states: list[State]) -> int | NotReady | Unsupported:
        """Its distance from the thread pointer."""
        layout = self.layout
        bound = [(tstate, thread_id) for tstate, thread_id, _ in states if thread_id]
        if layout.runtime_tss is None:
            place = self._variable()
            low, high = -TLS_BYTES, 0
        elif MUSL.search(self.maps):
            return Unsupported("its C library is musl, which keeps thread-specific data elsewhere")
        else:
            key = self.memory.u32(self.runtime + layout.runtime_tss + layout.tss_key)
            if not self.memory.i32(self.runtime + layout.runtime_tss + layout.tss_initialized):
                return NotReady()
            if key >= GLIBC_FIRST_BLOCK:
                return Unsupported(
                    f"it keeps its thread state under the thread-specific key {key}; glibc has only the"
                    f" first {GLIBC_FIRST_BLOCK} in a place that can be read without its help"
                )
            place = GLIBC_SPECIFIC + 16 * key + 8
            low, high = 0, PTHREAD_BYTES
        # a thread that is being started has no state in its slot yet: one that has it is enough
        if place is not None and any(
            self._holds(thread, place, tstate) for tstate, thread in bound
        ):
            return place
        common: set[int] | None = None
        for tstate, thread in bound:
            with contextlib.suppress(AddressError):
                words = np.frombuffer(self.memory.read(thread + low, high - low), "<u8")
                places = {low + 8 * int(at) for at in np.flatnonzero(words == tstate)}
                common = places if common is None else common & places
        if common is not None and len(common) == 1:
            return common.pop()
        if layout.runtime_tss is None and common:
            # also the variable with the thread state that runs has it, but only while it runs
            distance = self.binary.gilstate_distance
            places = {place for place in common if distance and place - distance in common}
            return places.pop() if len(places) == 1 else NotReady()
        return Unsupported("where its threads keep their thread state was not found")

    def _holds(self, thread: int, place: int, tstate: int) -> bool:
        try:
            return self.memory.u64(thread + place) == tstate
        except AddressError:
            return False

    def _variable(self) -> int | None:
        """Where _Py_tss_gilstate is, which replaced the key in 3.15 (Python/pystate.c).

        PyGILState_GetThisThreadState() does nothing but to return it.
        """
        code = self.binary.gilstate.removeprefix(ENDBR64)
        if code.startswith(READ_FS):
            return int(struct.unpack_from("<i", code, len(READ_FS))[0])
        if code.startswith(READ_GOT) and code[7:11] == READ_FS_RAX:
            skipped = len(self.binary.gilstate) - len(code)
            behind = self._at_bias(self.binary.gilstate_address) + skipped + 7
            with contextlib.suppress(AddressError):
                distance: int = struct.unpack_from("<i", code, len(READ_GOT))[0]
                return self.memory.i64(behind + distance)
        return None

    # ---- the rest ----

    def _contexts(self, states: list[State], main: int) -> tuple[Layout, bool]:
        """The layout with the place of contexts, and whether some are made in this process.

        They are if a thread has one now, or if a module has been imported that makes them. From 3.14 on
        threading runs every thread in a context of its own (Lib/threading.py), which does not count.
        """
        layout, kind = self.layout, self._at_bias(self.binary.context_type)
        blocks = []
        for tstate, _, _ in states:
            with contextlib.suppress(AddressError):
                blocks.append(
                    struct.unpack(
                        f"<{layout.tstate_bytes // 8}Q",
                        self.memory.read(tstate, layout.tstate_bytes // 8 * 8),
                    )
                )
        used = [context for block in blocks if (context := block[layout.tstate_context // 8])]
        if used and kind and not any(self._is(context, kind) for context in used):
            places = [
                {8 * at for at, word in enumerate(block) if self._is(word, kind)}
                for block in blocks
            ]
            places = [place for place in places if place]
            common = set.intersection(*places) if places else set()
            if len(common) != 1:  # what is there is no context
                return layout, False
            layout = replace(layout, tstate_context=common.pop())
            used = [context for block in blocks if (context := block[layout.tstate_context // 8])]
        if layout.version >= (3, 14):
            own = {
                block[layout.tstate_context // 8]
                for block in blocks
                if block[layout.tstate_thread_id // 8] != self._main_thread(blocks)
            }
            used = [
                context
                for context in used
                if context not in own or self._word(context + layout.context_previous)
            ]
        if used:
            return layout, True
        modules = self.memory.u64(main + layout.interpreter_modules)
        try:
            return layout, bool(dict_values(self.memory, layout, modules, CONTEXT_USERS))
        except AddressError:
            return layout, True

    def _main_thread(self, blocks: list[tuple[int, ...]]) -> int:
        """thread_id of the process's first thread: its state was made first, and has the lowest id."""
        layout = self.layout
        first = min(blocks, key=lambda block: block[layout.tstate_id // 8])
        return first[layout.tstate_thread_id // 8]

    def _word(self, address: int) -> int:
        """A word of the process, 0 if it is no more."""
        try:
            return self.memory.u64(address)
        except AddressError:
            return 0

    def _is(self, address: int, kind: int) -> bool:
        """Whether an object of a type is at an address."""
        if address % 8 or not 4096 <= address < 1 << 47:
            return False
        try:
            return self.memory.u64(address + self.layout.object_type) == kind
        except AddressError:
            return False

    def _gil(self, main: int) -> int:
        """The address of the GIL; 0 if what is there is none."""
        layout = self.layout
        try:
            if layout.runtime_gil is not None:
                gil = self.runtime + layout.runtime_gil
            else:
                assert layout.interpreter_gil is not None
                gil = self.memory.u64(main + layout.interpreter_gil)
            if self.memory.i32(gil + layout.gil_locked) not in (0, 1):
                return 0
            return gil
        except AddressError:
            return 0

    def _tid_place(self, states: list[State]) -> int:
        """Where struct pthread has the kernel's tid; 0 if that was not found."""
        tids = _tids(self.memory.tgid)
        common: set[int] | None = None
        for _, thread, _ in states:
            with contextlib.suppress(AddressError):
                words = np.frombuffer(self.memory.read(thread, PTHREAD_BYTES), "<u4")
                if thread and int(words[GLIBC_TID // 4]) in tids:
                    return GLIBC_TID
                places = {4 * int(at) for at in np.flatnonzero(np.isin(words, list(tids)))}
                common = places if common is None else common & places
        return common.pop() if common is not None and len(common) == 1 else 0


# ---- the state of a process ----

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


def _tids(tgid: int) -> dict[int, int]:
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


def _namespace_pids(status: Path) -> list[int]:
    for line in status.read_text(errors="replace").splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return [0]


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
    count = memory.i64(keys + layout.keys_entries)
    width = 3  # hash, key, value
    if layout.keys_size is not None:
        slots = memory.u64(keys + layout.keys_size)
        index_bytes = slots * (1 if slots <= 0xFF else 2 if slots <= 0xFFFF else 4)
    else:
        assert layout.keys_log2_index_bytes is not None and layout.keys_kind is not None
        index_bytes = 1 << memory.u8(keys + layout.keys_log2_index_bytes)
        if memory.u8(keys + layout.keys_kind) != layout.keys_kind_general:
            width = 2
    if not 0 <= count < 1 << 24 or index_bytes > 1 << 28:
        raise AddressError(f"process {memory.tgid} has no dict at {address:#x}")
    data = memory.read(keys + layout.keys_indices + index_bytes, count * width * 8)
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
