"""The asyncio tasks of another process: what each one waits for, and through which coroutines.

Which tasks there are asyncio itself keeps, so those of uvloop are seen, too:

- up to 3.11 in asyncio.tasks._all_tasks, a WeakSet,
- in 3.12 and 3.13 in _scheduled_tasks, a WeakSet, and _eager_tasks, a set,
- from 3.14 on in linked lists, one of each thread and one of each interpreter for threads that ended; the
  offsets for them are in a section of _asyncio (_Py_AsyncioModuleDebugOffsets). The WeakSet is there, too,
  for tasks of other makes.

What is not asyncio's is not seen: tasks of trio, greenlets of gevent that are switched out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from scope_ebpf.cpython import object_offsets as known
from scope_ebpf.cpython.offsets import CODE_TAG
from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.python.binaries import ElfFile
from scope_ebpf.loaders.python.frames import Frame, Frames, ThreadState
from scope_ebpf.loaders.python.memory import Mapping, mappings
from scope_ebpf.loaders.python.objects import Objects, Unreadable

TASK_TYPE = "_asyncio.Task"
GENERATORS = ("coroutine", "generator", "async_generator")
WRAPPERS = (
    "FutureIter",
    "coroutine_wrapper",
    "async_generator_asend",
    "async_generator_athrow",
    "anext_awaitable",
)
_SECTION = b".AsyncioDebug"
# task: size, name, awaited_by, is_task, awaited_by_is_set, coro, node; interpreter: size, tasks_head;
# thread: size, running_loop, running_task, tasks_head (Modules/_asynciomodule.c, from 3.14 on)
_DEBUG_OFFSETS = struct.Struct("<13Q")
_MOST_TASKS = 1 << 18
_MOST_AWAITED = 1000
_MOST_NAMED = 5
_TRIES = 5


@dataclass
class Task:
    """A task that is not done.

    Attributes:
        name: as Task.get_name() says it; None: it could not be read.
        state: waiting, ready (it waits for its turn), running, or created (it has not begun).
        awaits: what it waits for, in words; None unless it is waiting.
        frames: of its coroutine and of what that awaits, innermost first.
        torn: it went on while it was read.
    """

    name: str | None
    state: str
    awaits: str | None = None
    frames: list[Frame] = field(default_factory=list)
    torn: bool = False


@dataclass(frozen=True)
class _Debug:
    """Offsets of 3.14 and later."""

    task_node: int
    interpreter_head: int
    thread_head: int


class Tasks:
    """Reads the asyncio tasks of one process."""

    def __init__(self, tgid: int, objects: Objects, frames: Frames) -> None:
        """Nothing is read yet."""
        self._tgid = tgid
        self._objects = objects
        self._frames = frames
        self._layout = objects.layout
        self._offsets = known.task_offsets(objects.layout.version)

    def all(self, interpreter: int, threads: list[ThreadState]) -> list[Task]:
        """The tasks of an interpreter that are not done, in no order that means something.

        Raises:
            Unreadable: the process uses asyncio, but it is not known where its tasks are.
        """
        try:
            modules = self._objects.word(interpreter + self._layout.interpreter_modules)
            module = self._objects.lookup(modules, "asyncio.tasks")
        except Unreadable:
            return []  # asyncio is not imported
        if self._offsets is None:
            raise Unreadable("the layout of asyncio's tasks is not known for this version")
        addresses = dict.fromkeys(self._kept(module))
        if self._layout.version >= (3, 14):
            addresses.update(dict.fromkeys(self._listed(interpreter, threads)))
        tasks = (self._task(address) for address in addresses)
        return [task for task in tasks if task is not None]

    # ---- which there are ----

    def _kept(self, module: int) -> Iterator[int]:
        objects = self._objects
        names = objects.word(module + self._layout.module_dict)
        for name in ("_all_tasks", "_scheduled_tasks", "_eager_tasks"):
            try:
                held = objects.lookup(names, name)
                if objects.type_name(held) == "WeakSet":
                    references = objects.items(objects.attribute(held, "data"))
                    for reference in references:
                        with suppress(Unreadable):
                            yield objects.referent(reference)
                else:
                    yield from objects.items(held)
            except Unreadable:
                continue

    def _listed(self, interpreter: int, threads: list[ThreadState]) -> Iterator[int]:
        debug = self._debug()
        if debug is None:
            raise Unreadable("its _asyncio module does not tell where its tasks are")
        heads = [thread.address + debug.thread_head for thread in threads]
        for head in [interpreter + debug.interpreter_head, *heads]:
            with suppress(Unreadable):
                node = self._objects.word(head)
                for _ in range(_MOST_TASKS):
                    if not node or node == head:
                        break
                    yield node - debug.task_node
                    node = self._objects.word(node)

    def _debug(self) -> _Debug | None:
        for mapping in mappings(self._tgid):
            name = mapping.path.rpartition("/")[2]
            # built into the program or libpython, or a module of its own
            if mapping.inode and mapping.offset == 0 and ("python" in name or "_asyncio" in name):
                with suppress(FormatError, Unreadable, OSError):
                    found = self._debug_in(mapping)
                    if found is not None:
                        return found
        return None

    def _debug_in(self, mapping: Mapping) -> _Debug | None:
        file = ElfFile(mapping.open_path(self._tgid))
        try:
            address = file.section(_SECTION)
            first = min(part.address for part in file.segments) // 4096 * 4096
        finally:
            file.close()
        if address is None:
            return None
        data = self._objects.bytes_at(mapping.start + address - first, _DEBUG_OFFSETS.size)
        words = _DEBUG_OFFSETS.unpack(data)
        if max(words) >= 1 << 20:
            raise Unreadable("no offsets")
        return _Debug(task_node=words[6], interpreter_head=words[8], thread_head=words[12])

    # ---- one task ----

    def _task(self, address: int) -> Task | None:
        """A task, None if it is done or not to be read."""
        before = None
        for _ in range(_TRIES):
            try:
                task = self._read(address)
            except Unreadable:
                return None
            if task is None or task == before:
                return task
            before = task
        if before is not None:
            before.torn = True
        return before

    def _read(self, address: int) -> Task | None:
        objects, offsets = self._objects, self._offsets
        assert offsets is not None
        if TASK_TYPE in objects.base_names(address):
            if objects.number(address + offsets.state, 4) != known.STATES.index("pending"):
                return None
            coroutine = objects.word(address + offsets.coroutine)
            waiter = objects.word(address + offsets.waiter)
            name = self._name(objects.word(address + offsets.name))
        else:  # made in Python, as by asyncio without its C module, or by others
            if self._python_state(address) != known.STATES[0]:
                return None
            coroutine = objects.attribute(address, "_coro")
            waiter = objects.attribute(address, "_fut_waiter")
            name = self._name(objects.attribute(address, "_name"))
        if waiter and objects.full_type_name(waiter) == "NoneType":
            waiter = 0
        frames, state, last = self._chain(coroutine)
        if state == "suspended":
            state = "waiting" if waiter else "ready"
        awaits = None
        if state == "waiting":
            awaits = self._awaited(waiter or last)
        return Task(name, state, awaits, frames)

    def _python_state(self, address: int) -> str:
        try:
            state = self._objects.attribute(address, "_state")
        except Unreadable:  # as long as it is pending it is an attribute of the class only
            return known.STATES[0]
        return self._objects.text(state).lower()

    def _name(self, address: int) -> str | None:
        with suppress(Unreadable):
            flags = self._objects.flags(address)
            if flags & known.FLAG_INT:  # from 3.12 on a number, until it is asked for
                return f"Task-{self._objects.integer(address)}"
            return self._objects.text(address, 1000)
        return None

    def _chain(self, coroutine: int) -> tuple[list[Frame], str, int]:
        """Frames of a coroutine and all that it awaits, innermost first; its state; what it awaits last."""
        frames: list[Frame] = []
        state, address = "", coroutine
        for _ in range(_MOST_AWAITED):
            name = self._objects.type_name(address)
            if name in GENERATORS:
                own, frame = self._state(address)
                state = state or own
                if not frame:
                    break
                frames.append(self._frames.at(frame))
                awaited = self._awaits(address, frame, own)
            elif name in WRAPPERS:
                # what it stands for is its first field (_asynciomodule.c, genobject.c)
                awaited = self._objects.word(address + self._layout.object_bytes)
            else:
                break
            if not awaited or awaited == address:
                break
            address = awaited
        return frames[::-1], state or "suspended", address

    def _state(self, generator: int) -> tuple[str, int]:
        """What a generator does: created, suspended, running or ended; and the address of its frame."""
        objects, layout = self._objects, self._layout
        if layout.generator_frame is not None and layout.generator_state is not None:
            number = objects.number(generator + layout.generator_state, 1)
            frame = generator + layout.generator_frame
            if number == layout.state_created:
                return "created", frame
            if number == layout.state_executing:
                return "running", frame
            # 3.15 has further states between these two
            lowest, highest = layout.state_suspended or 0, layout.state_executing or 0
            return ("suspended", frame) if lowest <= number < highest else ("ended", 0)
        frame = objects.word(generator + (layout.generator_frame_object or 0))
        if not frame:
            return "ended", 0
        lasti = objects.number(frame + layout.frame_instruction, 4)
        # of both kinds one byte is enough
        number = objects.number(frame + (layout.frame_state or 0), 1)
        counted = layout.version >= (3, 10)
        running = number == (known.FRAME_EXECUTING_3_10 if counted else known.FRAME_EXECUTING)
        return "running" if running else "created" if lasti < 0 else "suspended", frame

    def _awaits(self, generator: int, frame: int, state: str) -> int:
        """What a suspended generator waits for by `await` or `yield from`; 0: it does not (_PyGen_yf)."""
        if state != "suspended" or not self._in_await(generator, frame):
            return 0
        objects, layout = self._objects, self._layout
        if layout.frame_stacktop is not None:
            count = objects.number(frame + layout.frame_stacktop, 4)
            base = frame + layout.frame_localsplus
        elif layout.frame_stackdepth is not None:
            count = objects.number(frame + layout.frame_stackdepth, 4)
            base = objects.word(frame + (layout.frame_valuestack or 0))
        else:
            base, count = objects.word(frame + (layout.frame_stackpointer or 0)), 0
            if not base:
                return 0
        if not 0 <= count < 1 << 20:
            return 0
        depth = known.AWAITED_DEPTH_3_15 if layout.version >= (3, 15) else 1
        return objects.word(base + 8 * (count - depth)) & ~CODE_TAG

    def _in_await(self, generator: int, frame: int) -> bool:
        objects, layout = self._objects, self._layout
        if layout.state_awaiting is not None:
            number = objects.number(generator + (layout.generator_state or 0), 1)
            locked = layout.version >= (3, 15) and number == known.AWAITING_LOCKED_3_15
            return number == layout.state_awaiting or locked
        if layout.code_code is not None:
            code = objects.word(frame + layout.frame_code)
            lasti = objects.number(frame + layout.frame_instruction, 4) * layout.lasti_unit
            instructions = objects.data(objects.word(code + layout.code_code))
            return lasti + 2 < len(instructions) and instructions[lasti + 2] == known.YIELD_FROM
        instruction = objects.word(frame + layout.frame_instruction)
        opcode, argument = objects.bytes_at(instruction + 2, 2)
        resumes = known.RESUMES.get(layout.version[:2], ())
        return opcode in resumes and argument & known.RESUME_REASON >= known.AWAITS_FROM

    def _awaited(self, address: int) -> str:
        """What is awaited, in words."""
        try:
            names = list(self._objects.base_names(address))
        except Unreadable:
            return "something that could not be read"
        name = names[0].rpartition(".")[2]
        if TASK_TYPE in names:
            assert self._offsets is not None
            with suppress(Unreadable):
                told = self._name(self._objects.word(address + self._offsets.name))
                return f"task {told}" if told is not None else "a task"
        if name == "_GatheringFuture":
            return self._gathered(address)
        return "a future" if name == "Future" else f"a {name}"

    def _gathered(self, address: int) -> str:
        with suppress(Unreadable):
            children = self._objects.items(self._objects.attribute(address, "_children"))
            shown = [self._awaited(child) for child in children[:_MOST_NAMED]]
            more = len(children) - len(shown)
            return f"all of {', '.join(shown)}{f' and {more} more' if more else ''} (gather)"
        return "several futures (gather)"
