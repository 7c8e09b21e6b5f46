"""Calls of chosen Python functions: which addresses of a process are watched for them, and by what.

A hardware breakpoint on data costs nothing until the watched address is touched, and the bytecode and the
code object of a function are touched by nobody else: see probes/calls.h for what is watched and why that
is enough. Breakpoints are set per thread, and threads and processes that one makes later inherit them.
Nothing in the process is changed: debug registers are part of what the kernel keeps of a thread.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scope_ebpf import records
from scope_ebpf.errors import LoadError, ScopeError, TargetError, UsageError
from scope_ebpf.loaders.libbpf import BpfObject
from scope_ebpf.loaders.perf import open_breakpoint
from scope_ebpf.loaders.python.functions import Function, Namespace, Spec
from scope_ebpf.loaders.python.interpreters import (
    Interpreter,
    NotReady,
    Unsupported,
    find_interpreter,
)
from scope_ebpf.loaders.python.memory import ProcessMemory
from scope_ebpf.loaders.python.objects import Objects, Unreadable
from scope_ebpf.loaders.targets import PROC
from scope_ebpf.records import CallWatchFlags, CallWatchRole, InterpreterFlags, PythonLimits

PROGRAMS = ("on_call_watch",)
# Debug registers of x86-64 and, at least, of arm64.
REGISTERS = 4
TRIALS = 64
WORD = 8
UNKNOWN_NS = 2**64 - 1
# 3.11.0 gives a frame's references back while it still is the current one (changed in 3.11.1 by
# https://github.com/python/cpython/issues/99729), so its calls would seem not to end.
UNWATCHED = frozenset({(3, 11, 0)})


@dataclass(frozen=True)
class Watch:
    """A watched address.

    Attributes:
        address, length: of the bytes; aligned.
        writes: only writes count; else reads, too.
        record: a records.CALL_WATCH.
    """

    address: int
    length: int
    writes: bool
    record: Any


@dataclass(frozen=True)
class WatchedProcess:
    """A process in which functions were found, and what is to be watched in it."""

    tgid: int
    functions: tuple[Function, ...]
    watches: tuple[Watch, ...]


# ---- before attaching ----


def find_calls(specs: tuple[Spec, ...], tgids: Iterable[int]) -> list[WatchedProcess]:
    """Where the functions are, in those of the processes that have any of them.

    Raises:
        TargetError: none of the processes has a function, with the reason.
        UsageError: there are too many functions.
    """
    found: list[WatchedProcess] = []
    failures: dict[Spec, ScopeError] = {}
    seen: set[Spec] = set()
    for tgid in tgids:
        try:
            process, missing = _in_process(specs, tgid)
        except ScopeError as error:
            failures.update(dict.fromkeys(set(specs) - failures.keys(), error))
            continue
        failures.update({spec: error for spec, error in missing.items() if spec not in failures})
        if process is not None:
            found.append(process)
            seen |= {function.spec for function in process.functions}
    for spec in specs:
        if spec not in seen:
            raise failures.get(spec) or TargetError(
                f"cannot watch calls of {spec}: none of the processes is a CPython; name another one"
            )
    return found


def _in_process(
    specs: tuple[Spec, ...], tgid: int
) -> tuple[WatchedProcess | None, dict[Spec, ScopeError]]:
    """What of the functions is in a process, and why others are not; None: it has none of them."""
    python = find_interpreter(tgid)
    if python is None:
        return None, {}
    if isinstance(python, Unsupported):
        raise TargetError(f"cannot watch calls in process {tgid}: it {python.reason}")
    if isinstance(python, NotReady):
        raise TargetError(
            f"cannot watch calls in process {tgid}: its Python is just starting; try again"
        )
    layout = python.layout
    version = ".".join(map(str, layout.version))
    if layout.version in UNWATCHED:
        raise TargetError(
            f"cannot watch calls in process {tgid}: the ends of calls cannot be seen in Python {version};"
            " use a newer release"
        )
    missing: dict[Spec, ScopeError] = {}
    functions: list[Function] = []
    with ProcessMemory(tgid) as memory:
        modules = memory.u64(python.address + layout.interpreter_modules)
        space = Namespace(Objects(memory, layout), layout, modules)
        for spec in specs:
            try:
                functions.append(space.find(spec))
            except TargetError as error:
                missing[spec] = error
        if not functions:
            return None, missing
        watches: list[Watch] = []
        try:
            common = _common(space, python)
        except Unreadable as error:
            raise TargetError(
                f"cannot watch calls in process {tgid}: its builtins could not be read ({error});"
                " try again"
            ) from error
        for function in functions:
            watches += _watches(function, specs.index(function.spec), common, python, memory)
    if len(watches) > REGISTERS:
        each = len(watches) // len(functions)
        raise UsageError(
            f"cannot watch calls of {len(functions)} functions at once: in Python"
            f" {version} each needs {each} of the {REGISTERS} debug registers;"
            f" name {REGISTERS // each}"
        )
    return WatchedProcess(tgid, tuple(functions), tuple(watches)), missing


def _common(space: Namespace, python: Interpreter) -> Any:
    """A CALL_WATCH with what all functions of a process share."""
    layout = python.layout
    record = np.zeros((), records.CALL_WATCH)
    for field, name in (("none", "None"), *((f"{name}_type", name) for name in _TYPES)):
        record[field] = space.builtin(name)
    for field in ("tss", "tstate_frame", "cframe_frame", "frame_code", "frame_previous"):
        record[field] = python.record[field]
    for field in ("unicode_ascii", "unicode_compact", "bytes_data"):
        record[field] = getattr(layout, field)
    for field in ("frame_blocks", "frame_block_stack", "frame_state"):
        record[field] = getattr(layout, field) or 0
    record["frame_locals"] = layout.frame_localsplus
    record["frame_instruction"] = layout.frame_instruction
    flags = 0
    if python.record["flags"] & InterpreterFlags.INTERPRETER_HEAP_FRAMES:
        flags |= CallWatchFlags.CALL_HEAP_FRAMES
    if python.record["flags"] & InterpreterFlags.INTERPRETER_CFRAME:
        flags |= CallWatchFlags.CALL_CFRAME
    if layout.int_tag is not None:
        flags |= CallWatchFlags.CALL_INT_TAG
    if layout.version[:2] == (3, 10):
        flags |= CallWatchFlags.CALL_FRAME_STATE
    record["flags"] = flags
    return record


_TYPES = ("bool", "int", "float", "str", "bytes")


def _watches(
    function: Function, probe: int, common: Any, python: Interpreter, memory: ProcessMemory
) -> list[Watch]:
    """What is watched for a function: its first instruction, and what goes with the end of a call."""
    layout, code = python.layout, function.code
    if layout.code_instructions is not None:
        first = code + layout.code_instructions
    else:
        assert layout.code_code is not None
        first = memory.u64(code + layout.code_code) + layout.bytes_data

    frame_words = 0
    if layout.tstate_datastack_top is not None and layout.code_nlocalsplus is not None:
        # co_framesize
        frame_words = layout.frame_localsplus // WORD + memory.i32(code + layout.code_nlocalsplus)
        frame_words += memory.i32(code + layout.code_stacksize)
        common["tstate_datastack_top"] = layout.tstate_datastack_top

    def watch(address: int, length: int, role: CallWatchRole, *, writes: bool = False) -> Watch:
        record = common.copy()
        record["first_instruction"], record["frame_words"] = first, frame_words
        record["code"], record["probe"], record["role"] = code, probe, role
        record["arguments"] = min(function.arguments, PythonLimits.HIT_ARGUMENTS)
        if function.generator:
            record["flags"] = int(record["flags"]) | CallWatchFlags.CALL_NO_END
        return Watch(address, length, writes, record)

    # one byte: an interpreter may read an instruction and its argument one after the other
    found = [watch(first, 1, CallWatchRole.WATCH_BEGIN)]
    if function.generator:
        return found
    found.append(watch(code, WORD, CallWatchRole.WATCH_END, writes=True))  # ob_refcnt
    if layout.version[:2] == (3, 11) and layout.code_first_traceable is not None:
        # read when a frame that an exception left is taken over
        found.append(watch(code + layout.code_first_traceable, 4, CallWatchRole.WATCH_END))
    elif layout.heap_frames:
        found.append(watch(code + layout.code_lines, WORD, CallWatchRole.WATCH_UNWIND))
    return found


def describe_cost(found: list[WatchedProcess], trap_ns: float) -> list[str]:
    """A sentence per function: how its calls are watched, and what that costs.

    Args:
        found: the functions.
        trap_ns: what a breakpoint costs on this machine, from try_breakpoint().
    """
    lines: dict[str, str] = {}
    for process in found:
        for function in process.functions:
            traps = 1 if function.generator else 3
            lines[str(function.spec)] = (
                f"--calls {function.spec}: by hardware breakpoints on its code, about"
                f" {traps * trap_ns / 1000:.0f} us for each of its calls on this machine, nothing for"
                " other functions"
                + (
                    "; a call of it makes a generator or coroutine, and is told without a duration"
                    if function.generator
                    else ""
                )
            )
    return list(lines.values())


def try_breakpoint() -> float:
    """What a hardware breakpoint costs on this machine, in nanoseconds, tried on this process itself.

    Raises:
        LoadError: there is none that works.
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    place = np.frombuffer(memory, np.uint8)
    descriptor = open_breakpoint(0, int(place.ctypes.data), 1, writes=True, inherit=False)
    if descriptor < 0:
        raise LoadError(f"cannot watch calls: {_cause(descriptor)}")
    try:
        spent = []
        for _ in range(TRIALS):
            began = time.perf_counter_ns()
            place[0] = 1
            spent.append(time.perf_counter_ns() - began)
        hits = int.from_bytes(os.read(descriptor, 8), "little")
    finally:
        os.close(descriptor)
    if hits < TRIALS:
        raise LoadError(
            "cannot watch calls: this machine's hardware breakpoints do not work (some hypervisors do not"
            " pass them on); record without --calls"
        )
    return float(np.median(spent))


def _cause(descriptor: int) -> str:
    return BREAKPOINT_CAUSES.get(-descriptor, os.strerror(-descriptor))


BREAKPOINT_CAUSES = {
    errno.EOPNOTSUPP: "this kernel or virtual machine has no hardware breakpoints; record without --calls",
    errno.ENODEV: "this machine has no hardware breakpoints; record without --calls",
    errno.ENOENT: "this kernel was built without hardware breakpoints; record without --calls",
    errno.ENOSPC: "all debug registers are in use, by a debugger or another recording; end that first",
    errno.EMFILE: "too many open files; allow more with `ulimit -n`: each thread needs up to four",
    errno.EACCES: "permission denied; run as root, or grant CAP_PERFMON",
    errno.EPERM: "permission denied; run as root, or grant CAP_PERFMON",
}


# ---- attaching, and the end ----


def attach_calls(opened: BpfObject, found: list[WatchedProcess]) -> None:
    """Watch these processes, in all their threads; what they make later inherits it.

    Raises:
        LoadError: with the kernel's reason.
    """
    for process in found:
        for watch in process.watches:
            # forks have other ids and the same addresses
            for tgid in (process.tgid, 0):
                key = watch.address.to_bytes(8, "little") + tgid.to_bytes(8, "little")
                opened.update_element("call_watches", key, watch.record.tobytes())
        _watch_threads(opened, process)


def _watch_threads(opened: BpfObject, process: WatchedProcess) -> None:
    done: set[int] = set()
    first = True
    while True:
        try:
            tids = {int(name) for name in os.listdir(PROC / str(process.tgid) / "task")} - done
        except OSError:
            return  # it is gone
        if not tids:
            return
        for tid in tids:
            _watch_thread(opened, process, tid, perhaps_inherited=not first)
        done |= tids
        first = False


def _watch_thread(
    opened: BpfObject, process: WatchedProcess, tid: int, *, perhaps_inherited: bool
) -> None:
    for watch in process.watches:
        descriptor = open_breakpoint(tid, watch.address, watch.length, writes=watch.writes)
        if descriptor == -errno.ESRCH:
            return  # the thread has ended
        if descriptor == -errno.ENOSPC and perhaps_inherited:
            return  # it was made by one that is watched already, and has all that it needs
        if descriptor < 0:
            raise LoadError(f"cannot watch calls in process {process.tgid}: {_cause(descriptor)}")
        opened.attach_descriptor(PROGRAMS[0], descriptor)


def still_open(opened: BpfObject) -> list[bytes]:
    """The records of calls that have not ended, as records.PYTHON_CALL with an unknown duration."""
    # struct open_call_key and struct open_call of probes/calls.h: the record is the last of the latter
    size = records.PYTHON_CALL.itemsize
    found = []
    for value in opened.elements("open_calls", 24, 16 + size):
        record = np.frombuffer(value[-size:], records.PYTHON_CALL).copy()
        record["duration_ns"] = UNKNOWN_NS
        if record["kind"][0]:
            found.append(record.tobytes())
    return found
