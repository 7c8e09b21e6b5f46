"""One look at a live CPython process: what each thread does, and where it stands in its Python code.

Everything is read from outside, through /proc: the process is not stopped, nothing attaches to it. So what
is told of different threads is of slightly different moments.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field

from scope_ebpf.errors import TargetError
from scope_ebpf.loaders.python.frames import Frames, Stack, ThreadState
from scope_ebpf.loaders.python.interpreters import (
    Interpreter,
    NotReady,
    Unsupported,
    find_interpreter,
    threads,
)
from scope_ebpf.loaders.python.memory import AddressError, ProcessGoneError, ProcessMemory
from scope_ebpf.loaders.python.objects import Objects, Unreadable
from scope_ebpf.loaders.python.tasks import Task, Tasks
from scope_ebpf.loaders.python.waits import Activity, Waits
from scope_ebpf.loaders.targets import PROC, command_line, split_arguments

_TRIES = 3


@dataclass
class Thread:
    """A thread that runs Python.

    Attributes:
        tid: as the kernel knows it; 0: it has ended.
        name: of its threading.Thread; None: it has none, or it could not be read.
        comm: its name for the kernel.
        state: running, sleeping, uninterruptible, stopped, traced, ended or unknown.
        syscall: the system call in which it is blocked; None: in none that is known.
        does: what it does or waits for, in words.
        holds_gil: it held the GIL when it was looked at.
        waits_for_gil: it waited for it.
        stack: its Python frames.
        interpreter: number of the interpreter that it runs; 0: the main one. CPython tells of a thread
            state of a sub-interpreter which thread made it, which need not be the one that runs in it.
    """

    tid: int
    name: str | None
    comm: str
    state: str
    syscall: str | None
    does: str
    holds_gil: bool
    waits_for_gil: bool
    stack: Stack
    interpreter: int = 0


@dataclass
class NativeThread:
    """A thread that never ran Python."""

    tid: int
    comm: str
    state: str
    does: str


@dataclass
class Look:
    """What was seen.

    Attributes:
        pid: the process.
        arguments: its command line.
        version: of CPython.
        file: the file that has the interpreter, as the process knows it.
        threads: that run Python, the oldest first.
        native_threads: the others.
        tasks: those of asyncio that are not done; None: they were not asked for.
        not_shown: what is there, but was not looked at, or could not be: ends of a sentence.
    """

    pid: int
    arguments: tuple[str, ...]
    version: tuple[int, int, int]
    file: str
    threads: list[Thread] = field(default_factory=list)
    native_threads: list[NativeThread] = field(default_factory=list)
    tasks: list[Task] | None = None
    not_shown: list[str] = field(default_factory=list)


def look_at(tgid: int, *, all_tasks: bool = False) -> Look:
    """Look at a process.

    Args:
        tgid: the process.
        all_tasks: also look at suspended asyncio tasks.

    Raises:
        TargetError: there is no such process, it is no CPython or one that is not known, it ended, or
            this process may not look into it.
    """
    _check(tgid)
    found = find_interpreter(tgid)
    if found is None:
        if not (PROC / str(tgid)).exists():
            raise ProcessGoneError(f"process {tgid} is gone")
        raise TargetError(
            f"cannot look into process {tgid}: no CPython is mapped in it;"
            " `pgrep -a python` lists candidates"
        )
    if isinstance(found, Unsupported):
        raise TargetError(f"cannot look into process {tgid}: {found.reason}")
    if isinstance(found, NotReady):
        raise TargetError(
            f"cannot look into process {tgid}: its Python is just starting, or ending; try again"
        )
    with ProcessMemory(tgid) as memory:
        try:
            return _Looking(found, memory).look(all_tasks)
        except (AddressError, Unreadable) as error:
            raise TargetError(
                f"cannot look into process {tgid}: its threads changed while they were read; try again"
            ) from error


def _check(tgid: int) -> None:
    """Refuse what is no process.

    Raises:
        TargetError: telling what it is.
    """
    try:
        text = (PROC / str(tgid) / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetError(
            f"cannot look into process {tgid}: there is none with that id;"
            " `pgrep -a python` lists candidates"
        ) from error
    except OSError as error:
        raise TargetError(
            f"cannot look into process {tgid}: {error.strerror}; run as root or grant CAP_SYS_PTRACE"
        ) from error
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "Tgid" and value.strip() != str(tgid):
            raise TargetError(
                f"cannot look into {tgid}: it is a thread of process {value.strip()}; look at that one"
            )
        if key == "State" and value.strip().startswith(("Z", "X")):
            raise TargetError(
                f"cannot look into process {tgid}: it has ended and waits for its parent"
            )


class _Looking:
    def __init__(self, interpreter: Interpreter, memory: ProcessMemory) -> None:
        self._found = interpreter
        self._layout = interpreter.layout
        self._objects = Objects(memory, interpreter.layout)
        self._frames = Frames(self._objects)
        self._waits = Waits(interpreter.tgid, memory)

    def look(self, all_tasks: bool) -> Look:
        found = self._found
        arguments = split_arguments(command_line(found.tgid))
        look = Look(found.tgid, arguments, found.version, found.path)
        states = threads(found)
        interpreters: dict[int, list[ThreadState]] = {found.address: []}
        for thread in states:
            owner = self._objects.word(thread.tstate + self._layout.tstate_interpreter)
            state = ThreadState(thread.tstate, owner)
            interpreters.setdefault(owner, []).append(state)
        names = self._thread_names(interpreters)
        tids = {thread.tstate: thread.tid for thread in states}
        for thread in sorted(states, key=lambda each: each.tid):
            owner = self._objects.word(thread.tstate + self._layout.tstate_interpreter)
            name = names.get(thread.thread_id)
            seen = self._thread(thread.tstate, owner, thread.tid, name, tids)
            if owner != found.address:
                seen.interpreter = self._objects.number(owner + self._layout.interpreter_id)
            look.threads.append(seen)
        look.native_threads = self._native_threads({thread.tid for thread in states})
        if all_tasks:
            look.tasks = []
            for address, members in interpreters.items():
                try:
                    look.tasks += Tasks(found.tgid, self._objects, self._frames).all(
                        address, members
                    )
                except Unreadable as error:
                    look.not_shown.append(f"tasks of asyncio: {error}")
            look.tasks.sort(key=_natural)
        self._tell_not_shown(look, interpreters)
        return look

    # ---- threads ----

    def _thread(
        self, tstate: int, owner: int, tid: int, name: str | None, tids: dict[int, int]
    ) -> Thread:
        if not tid:
            return Thread(
                0, name, "", "ended", None, "has ended", False, False, self._stack(tstate)
            )
        for _ in range(_TRIES):
            activity = self._waits.activity(tid)
            holder = self._holder(owner)
            stack = self._stack(tstate)
            if activity == self._waits.activity(tid):
                break
        if activity.state == "ended":
            stack = Stack()
        holds = holder == tstate and activity.state != "ended"
        waits_for_gil = self._in_gil(owner, activity.address)
        does = _does(activity, stack, holds)
        if waits_for_gil and not holds:
            by = tids.get(holder, 0)
            does = f"waits for the GIL, held by thread {by}" if by else "waits for the GIL"
        return Thread(
            tid,
            name,
            self._comm(tid),
            activity.state,
            activity.syscall,
            does,
            holds,
            waits_for_gil,
            stack,
        )

    def _stack(self, tstate: int) -> Stack:
        try:
            return self._frames.stack(tstate)
        except Unreadable:
            return Stack(torn=True, cut=True)

    def _gil(self, owner: int) -> int:
        """The GIL of an interpreter."""
        if self._layout.interpreter_gil is None:
            return self._found.gil
        return self._objects.word(owner + self._layout.interpreter_gil)

    def _holder(self, owner: int) -> int:
        """The thread state that holds the GIL, 0: nobody does."""
        gil = self._gil(owner)
        if self._objects.number(gil + self._layout.gil_locked, 4) != 1:
            return 0
        return self._objects.word(gil + self._layout.gil_holder)

    def _in_gil(self, owner: int, address: int) -> bool:
        gil = self._gil(owner)
        return gil <= address < gil + self._layout.gil_bytes

    def _comm(self, tid: int) -> str:
        with suppress(OSError):
            path = PROC / str(self._found.tgid) / "task" / str(tid) / "comm"
            return path.read_text(errors="replace").rstrip("\n")
        return ""

    def _native_threads(self, seen: set[int]) -> list[NativeThread]:
        found = []
        with suppress(OSError):
            for path in sorted((PROC / str(self._found.tgid) / "task").iterdir()):
                tid = int(path.name)
                if tid not in seen:
                    activity = self._waits.activity(tid)
                    if activity.state != "ended":
                        does = _does(activity, None, False)
                        found.append(NativeThread(tid, self._comm(tid), activity.state, does))
        return found

    def _thread_names(self, interpreters: dict[int, list[ThreadState]]) -> dict[int, str]:
        """Names by pthread_self: of the threading.Thread objects in threading._active."""
        names: dict[int, str] = {}
        for interpreter in interpreters:
            for _ in range(_TRIES):  # threads come and go
                try:
                    active = self._in_module(interpreter, "threading", "_active")
                    pairs = list(self._objects.pairs(active))
                except Unreadable:
                    continue
                for key, value in pairs:
                    with suppress(Unreadable):
                        name = self._objects.text(self._objects.attribute(value, "_name"), 1000)
                        names[self._objects.integer(key)] = name
                break
        return names

    def _in_module(self, interpreter: int, module: str, name: str) -> int:
        objects, layout = self._objects, self._layout
        modules = objects.word(interpreter + layout.interpreter_modules)
        found = objects.lookup(modules, module)
        return objects.lookup(objects.word(found + layout.module_dict), name)

    # ---- what is missing ----

    def _tell_not_shown(self, look: Look, interpreters: dict[int, list[ThreadState]]) -> None:
        if self._found.greenlets:
            look.not_shown.append("suspended greenlets")
        if self._imports(interpreters, "trio._core._run"):
            look.not_shown.append("suspended tasks of trio")
        if look.tasks is None and self._imports(interpreters, "asyncio.tasks"):
            look.not_shown.append("suspended tasks of asyncio (--all-tasks shows them)")

    def _imports(self, interpreters: dict[int, list[ThreadState]], module: str) -> bool:
        for interpreter in interpreters:
            with suppress(Unreadable):
                modules = self._objects.word(interpreter + self._layout.interpreter_modules)
                self._objects.lookup(modules, module)
                return True
        return False


def _natural(task: Task) -> list[tuple[int, str]]:
    """Sorts Task-2 before Task-10, and tasks without a name last."""
    parts = re.split(r"(\d+)", "\U0010ffff" if task.name is None else task.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _does(activity: Activity, stack: Stack | None, holds: bool) -> str:
    """What a thread does, in words."""
    if activity.state == "ended":
        return "has ended"
    if activity.state in ("stopped", "traced"):
        by = "by a signal" if activity.state == "stopped" else "by a debugger"
        return f"is stopped {by}{', and holds the GIL' if holds else ''}"
    if activity.wait is not None:
        return f"{activity.wait}{', and holds the GIL meanwhile' if holds else ''}"
    if activity.state == "running":
        if holds:
            return "runs, holds the GIL"
        return "runs" if stack is None or not stack.frames else "runs without the GIL"
    return f"{activity.state}{', holds the GIL' if holds else ''}"
