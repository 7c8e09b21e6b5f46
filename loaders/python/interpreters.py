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
from scope_ebpf.loaders.python.slots import NoSlotError, find_slot
from scope_ebpf.loaders.python.states import ATTEMPTS, State, dict_values, read_threads, tids_of
from scope_ebpf.loaders.targets import PROC
from scope_ebpf.records import InterpreterFlags

LIBRARY: Final = re.compile(r"^.*/lib(?:python|pypy)[^/\n]*$", re.M)
GREENLET: Final = re.compile(r"/_?greenlet\.[^/\n]*so$", re.M)
GLIBC_TID: Final = 720  # `tid` in glibc's struct pthread
PTHREAD_BYTES: Final = 0x800  # of it that are searched
# What asyncio leaves in the dict of a thread that runs, or ran, an event loop; uvloop, too
# (Modules/_asynciomodule.c, set_running_loop()). From 3.14 on the thread state has a field for it.
RUNNING_LOOP: Final = b"__asyncio_running_event_loop__"
# Modules that run contexts without that; whoever imports them does so to use them.
CONTEXT_USERS: Final = (b"trio", b"curio")


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
        tids = tids_of(interpreter.tgid)
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
        except FormatError as error:
            binary = OtherBinary(needs_python=False)
            if isinstance(error.__cause__, OSError):
                # its process may have ended just now: the next one of its kind can tell
                return binary
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
        try:
            tss = find_slot(self.memory, layout, self.binary, self.bias, self.maps, states)
            layout, contexts = self._contexts(main)
        except NoSlotError as error:
            return Unsupported(str(error))
        except AddressError as error:
            return self._unknown(str(error)) if self._settled() else NotReady()
        if tss is None:
            return NotReady()
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

    def _contexts(self, main: int) -> tuple[Layout, bool]:
        """The layout with the place of contexts, and whether some are made in this process.

        They are if a thread has entered one now, or runs an event loop, or if trio has been imported. To
        have imported asyncio means nothing: so do many libraries for the case that it is used. If contexts
        are made later, the probes see it. From 3.14 on threading runs every thread in a context of its
        own (Lib/threading.py), which does not count.

        Raises:
            AddressError: what the threads have in that place, and nowhere else, are no contexts.
        """
        layout, kind = self.layout, self._at_bias(self.binary.context_type)
        for _ in range(ATTEMPTS):
            blocks = self._thread_blocks()
            used = [place for block in blocks if (place := block[layout.tstate_context // 8])]
            if not used or not kind or any(self._is(context, kind) for context in used):
                break
            found = [{8 * at for at, word in enumerate(b) if self._is(word, kind)} for b in blocks]
            held = [places for places in found if places]
            common = set.intersection(*held) if held else set()
            if len(common) == 1:
                layout = replace(layout, tstate_context=common.pop())
        else:
            raise AddressError("its threads have no contexts where they should be")
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
        if any(self._entered(context) for context in used) or self._runs_loop():
            return layout, True
        modules = self.memory.u64(main + layout.interpreter_modules)
        try:
            return layout, bool(dict_values(self.memory, layout, modules, CONTEXT_USERS))
        except AddressError:
            return layout, True

    def _entered(self, context: int) -> bool:
        """Whether a context runs; that which a thread made for itself is never entered."""
        try:
            return self.memory.i32(context + self.layout.context_entered) != 0
        except AddressError:
            return True

    def _runs_loop(self) -> bool:
        """Whether an event loop runs, or ran, in a thread."""
        layout = self.layout
        for tstate, _, _ in read_threads(self.memory, layout, self.runtime):
            try:
                if layout.tstate_asyncio_loop is not None:
                    if self.memory.u64(tstate + layout.tstate_asyncio_loop):
                        return True
                    continue
                attributes = self.memory.u64(tstate + layout.tstate_dict)
                if attributes and dict_values(self.memory, layout, attributes, (RUNNING_LOOP,)):
                    return True
            except AddressError:  # it changes while it is read: to look for contexts is safe
                return True
        return False

    def _thread_blocks(self) -> list[tuple[int, ...]]:
        """The thread states, as words."""
        size = self.layout.tstate_bytes // 8
        blocks = []
        for tstate, _, _ in read_threads(self.memory, self.layout, self.runtime):
            with contextlib.suppress(AddressError):
                blocks.append(struct.unpack(f"<{size}Q", self.memory.read(tstate, size * 8)))
        return blocks

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
        tids = tids_of(self.memory.tgid)
        common: set[int] | None = None
        for _, thread, _ in states:
            with contextlib.suppress(AddressError):
                words = np.frombuffer(self.memory.read(thread, PTHREAD_BYTES), "<u4")
                if thread and int(words[GLIBC_TID // 4]) in tids:
                    return GLIBC_TID
                places = {4 * int(at) for at in np.flatnonzero(np.isin(words, list(tids)))}
                common = places if common is None else common & places
        return common.pop() if common is not None and len(common) == 1 else 0
