"""What offsets_table does not have of objects: flags, suspended frames, and asyncio's tasks.

asyncio's structs are macros in Modules/_asynciomodule.c. The offsets were found by looking for known
values in a task of each version (3.8.18, 3.9.18, 3.10.13, 3.11.2, 3.11.7, 3.12.1, 3.13.0, 3.14.8, 3.15.0),
as tests/live/test_stack.py does it again. What they lead to is checked when it is read: a coroutine has
to be one.
"""

from dataclasses import dataclass
from typing import Final

# Include/object.h: what a type is, in tp_flags
FLAG_INLINE_VALUES: Final = 1 << 2  # from 3.13 on
FLAG_MANAGED_DICT: Final = 1 << 4  # from 3.11 on
FLAG_HEAP_TYPE: Final = 1 << 9
FLAG_INT: Final = 1 << 24
FLAG_LIST: Final = 1 << 25
FLAG_TUPLE: Final = 1 << 26
FLAG_BYTES: Final = 1 << 27
FLAG_STR: Final = 1 << 28
FLAG_DICT: Final = 1 << 29
FLAG_TYPE: Final = 1 << 31

# Include/code.h: CO_GENERATOR, CO_COROUTINE, CO_ITERABLE_COROUTINE, CO_ASYNC_GENERATOR
GENERATOR_FLAGS: Final = 0x20 | 0x80 | 0x100 | 0x200

# In frame_state: f_state of 3.10, and f_executing of 3.8 and 3.9 (cpython/frameobject.h).
FRAME_EXECUTING_3_10: Final = 0
FRAME_EXECUTING: Final = 1

# How a suspended frame is known to await, where its state does not tell (up to 3.12). Up to 3.10 the next
# instruction is YIELD_FROM; later it is a RESUME, or a specialised or instrumented one, whose argument says
# whether that is after a `yield` (1), a `yield from` (2) or an `await` (3). Include/opcode.h.
YIELD_FROM: Final = 72
RESUMES: Final = {(3, 11): (151, 150), (3, 12): (151, 240)}
AWAITS_FROM: Final = 2
RESUME_REASON: Final = 3

# In a frame that awaits, what it awaits is on top of its stack; in 3.15 an index or NULL is above that
# (Include/internal/pycore_interpframe.h, _PyFrame_StackPeek).
AWAITED_DEPTH_3_15: Final = 2
# FRAME_SUSPENDED_YIELD_FROM_LOCKED, which only 3.15 has.
AWAITING_LOCKED_3_15: Final = 3


@dataclass(frozen=True)
class TaskOffsets:
    """Where a TaskObj has its fields."""

    state: int  # int: one of STATES
    waiter: int  # the future or task that it waits for, or NULL
    coroutine: int
    name: int


STATES: Final = ("pending", "cancelled", "finished")

_TASKS: Final = {
    (3, 8): TaskOffsets(72, 104, 112, 120),
    (3, 9): TaskOffsets(80, 144, 152, 160),
    (3, 10): TaskOffsets(88, 152, 160, 168),
    (3, 11): TaskOffsets(88, 128, 136, 144),
    (3, 12): TaskOffsets(88, 128, 136, 144),
    (3, 13): TaskOffsets(96, 112, 120, 128),
    (3, 14): TaskOffsets(104, 120, 128, 136),
    (3, 15): TaskOffsets(104, 120, 128, 136),
}


def task_offsets(version: tuple[int, int, int]) -> TaskOffsets | None:
    """The offsets for a version of CPython, None if they are not known.

    >>> task_offsets((3, 11, 2)).name, task_offsets((3, 7, 0))
    (144, None)
    """
    return _TASKS.get(version[:2])
