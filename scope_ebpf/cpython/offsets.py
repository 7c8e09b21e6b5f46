"""Where things are in a CPython process: the layout of each version that we know.

All offsets are bytes from the start of the struct, for builds of CPython with a GIL and without Py_DEBUG
on 64-bit x86 Linux. They come from offsets_table, which is measured from CPython's own headers; from
3.13 on what a process itself says (debug_offsets) goes first. A version that is not in the table is
refused: to guess would mean to show wrong stacks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np

from scope_ebpf import records
from scope_ebpf.cpython import debug_offsets
from scope_ebpf.cpython.offsets_table import DIFFERENT, OFFSETS
from scope_ebpf.errors import FormatError, ScopeError

OLDEST: Final = min(OFFSETS)
NEWEST: Final = max(OFFSETS)
# From 3.14 on pointers in a frame are _PyStackRef (pycore_stackref.h), whose lowest bits are a tag. To
# clear three bits is right in every version: objects are aligned to 16 bytes.
CODE_TAG: Final = 7
NO_SHIM: Final = 0xFF

Version = tuple[int, int, int]


class UnknownLayoutError(ScopeError):
    """A CPython whose layout is not known."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the fields of CPython's structs are; None: this version does not have the field.

    A name is the struct's and the field's, as in records.INTERPRETER. Sizes end in _bytes. What is no
    offset but a constant of that version begins with owner_, state_ and first_shim.
    """

    version: Version
    # _PyRuntime
    runtime_bytes: int
    runtime_initialized: int  # int: Python is fully initialized
    runtime_interpreters_head: int  # newest first
    runtime_interpreters_main: int
    runtime_gil: int | None = None  # up to 3.11: the struct itself
    runtime_tss: int | None = (
        None  # Py_tss_t of the thread state; 3.15 has a thread-local variable instead
    )
    # Py_tss_t
    tss_initialized: int
    tss_key: int
    # PyInterpreterState
    interpreter_bytes: int
    interpreter_next: int
    interpreter_id: int
    interpreter_threads_head: int  # newest first
    interpreter_modules: int  # sys.modules, a dict
    interpreter_sysdict: int  # a dict: the names in module sys
    interpreter_builtins: int
    interpreter_gil: int | None = None  # from 3.12 on: pointer to the struct
    interpreter_own_gil: int | None = (
        None  # the struct, which an interpreter with a GIL of its own uses
    )
    # the GIL's struct
    gil_bytes: int
    gil_holder: int  # pointer to the thread state that has it, or had it last
    gil_locked: int  # int: 1 while it is held; -1: there is none
    gil_switch_number: int
    gil_cond: int
    gil_mutex: int
    gil_switch_cond: int
    gil_switch_mutex: int
    # PyThreadState
    tstate_bytes: int
    tstate_previous: int
    tstate_next: int
    tstate_interpreter: int
    tstate_frame: int  # 3.11, 3.12: pointer to a _PyCFrame; else to the innermost frame
    tstate_thread_id: int  # pthread_self()
    tstate_native_thread_id: int | None = None  # as gettid() says in the thread's own PID namespace
    tstate_context: int
    tstate_id: int
    tstate_dict: int
    tstate_datastack_chunk: int | None = None
    tstate_datastack_top: int | None = None
    # _PyThreadStateImpl, which begins with the PyThreadState
    tstate_asyncio_loop: int | None = None  # the running event loop
    tstate_asyncio_task: int | None = None  # the running task
    tstate_asyncio_tasks: int | None = None  # list node: head of all tasks
    # _PyCFrame and _PyStackChunk
    cframe_frame: int | None = None
    chunk_previous: int | None = None
    chunk_size: int | None = None
    chunk_top: int | None = None
    chunk_data: int | None = None
    # PyFrameObject up to 3.10, _PyInterpreterFrame later
    frame_code: int  # from 3.14 on with a tag in its lowest bits: see CODE_TAG
    frame_previous: int
    frame_instruction: int  # f_lasti (int), prev_instr, instr_ptr
    frame_globals: int
    frame_builtins: int
    frame_function: int | None = None
    frame_localsplus: int
    frame_valuestack: int | None = None  # pointer to the first value behind the locals
    frame_stackdepth: int | None = None  # 3.10: int, values on the stack
    frame_stacktop: int | None = None  # 3.11 to 3.13: int, index into localsplus; -1 while it runs
    frame_stackpointer: int | None = (
        None  # others: pointer behind the last value; NULL while it runs
    )
    frame_generator: int | None = None  # the generator, or NULL
    frame_blocks: int | None = None  # up to 3.10: int, how many blocks of `try` and such it is in
    frame_block_stack: int | None = None  # these blocks
    frame_state: int | None = (
        None  # up to 3.9: char, 1 while it runs; 3.10: int8, see object_offsets
    )
    frame_owner: int | None = None  # char: one of owner_…
    owner_thread: int | None = None
    owner_generator: int | None = None
    owner_frame_object: int | None = None
    first_shim: int | None = None  # owners from this number on are no Python frames
    # PyCodeObject
    code_argcount: int
    code_posonlyargcount: int
    code_kwonlyargcount: int
    code_stacksize: int
    code_first_traceable: int | None = None  # int, read when an exception is unwound into a frame
    code_nlocals: int
    code_nlocalsplus: int | None = None
    code_flags: int
    code_first_line: int
    code_consts: int
    code_names: int
    code_varnames: int | None = None
    code_localsplusnames: int | None = None
    code_localspluskinds: int | None = None
    code_file: int
    code_name: int
    code_qualname: int | None = None
    code_lines: int  # co_lnotab up to 3.9, then co_linetable
    code_code: int | None = None  # co_code, bytes
    code_instructions: int | None = None  # the bytecode itself
    # generators, coroutines and asynchronous generators
    generator_name: int
    generator_qualname: int
    generator_frame_object: int | None = None  # pointer to a PyFrameObject, NULL at its end
    generator_code: int | None = None
    generator_frame: int | None = None  # the frame itself
    generator_state: int | None = None  # int8: one of state_…
    state_created: int | None = None
    state_suspended: int | None = None
    state_awaiting: int | None = None  # from 3.13 on: in `yield from` or `await`
    state_executing: int | None = None
    state_cleared: int | None = None
    # objects
    object_refcount: int
    object_type: int
    object_bytes: int
    object_size: int
    object_managed_values: int | None = (
        None  # 3.11 only: pointer to values before the object, or NULL
    )
    object_managed_dict: int | None = (
        None  # dict before the object; in 3.12 values less one if it is odd
    )
    # types
    type_name: int
    type_basicsize: int
    type_flags: int
    type_methods: int
    type_members: int
    type_getset: int
    type_base: int
    type_dict: int
    type_dictoffset: int
    type_init: int
    type_new: int
    type_iternext: int
    type_mro: int
    type_bytes: int
    heap_type_cached_keys: int
    # str
    unicode_length: int
    unicode_state: int  # the byte with kind, compact and ascii
    unicode_kind_shift: int  # of kind, 3 bits; the next two are compact and ascii
    unicode_ascii: int
    unicode_compact: int
    unicode_data: int  # pointer, where the text is not compact
    # bytes, tuple, list
    bytes_size: int
    bytes_data: int
    tuple_items: int
    list_items: int
    # int, float
    int_size: int | None = None  # its sign is that of the number
    int_tag: int | None = (
        None  # digits << 3, and in the low two bits 0: positive, 1: zero, 2: negative
    )
    int_digits: int
    float_value: int
    # dict
    dict_used: int
    dict_keys: int
    dict_values: int
    keys_size: int | None = None  # slots of the hash table
    keys_log2_size: int | None = None
    keys_log2_index_bytes: int | None = None
    keys_kind: int | None = (
        None  # u8; keys_kind_general: entries are hash, key, value, else key, value
    )
    keys_entries: int  # how many are used
    keys_indices: int  # the entries follow behind them
    keys_kind_general: int | None = None
    values_items: int  # in ma_values of a split dict
    # set
    set_used: int
    set_mask: int
    set_table: int
    set_entry_bytes: int  # key, hash
    # functions and methods
    function_code: int
    function_closure: int
    function_dict: int  # its attributes, or NULL
    cfunction_definition: int  # pointer to a PyMethodDef
    cfunction_self: int
    method_function: int
    method_self: int
    method_descriptor: int  # pointer to a PyMethodDef
    definition_function: int  # ml_meth
    definition_bytes: int
    # modules
    module_dict: int
    # weak references
    weakref_object: int  # None when it is gone
    weakref_callback: int
    # PyContext
    context_previous: int
    context_vars: int
    context_entered: int  # int: a thread runs in it

    @property
    def heap_frames(self) -> bool:
        """Frames are objects, linked by f_back."""
        return self.version < (3, 11)

    @property
    def in_cframe(self) -> bool:
        """The current frame is in a _PyCFrame, to which the thread state points."""
        return self.cframe_frame is not None

    @property
    def lasti_unit(self) -> int:
        """Bytes that one step of f_lasti is, where frames are objects: 3.10 counts instructions."""
        return 2 if self.version >= (3, 10) else 1

    @property
    def frame_bytes(self) -> int:
        """How much of a frame has the fields that a walk needs."""
        ends = [self.frame_code + 8, self.frame_previous + 8, self.frame_instruction + 8]
        ends += [] if self.frame_owner is None else [self.frame_owner + 1]
        return (max(ends) + 7) // 8 * 8

    def record(self) -> np.ndarray[Any, np.dtype[Any]]:
        """A record of records.INTERPRETER with all that is the same in every process of this layout.

        `gil`, `tss` and `thread_tid` are left 0, and so is what this version does not have; of the flags
        those are set that say how frames are linked.

        >>> int(layout_of((3, 12, 1)).record()["version"])
        780
        """
        record = np.zeros((), records.INTERPRETER)
        names = {field.name for field in fields(self)}
        for name in records.INTERPRETER.names or ():
            value = getattr(self, name) if name in names and name != "version" else None
            if value is not None:
                record[name] = value
        record["version"] = self.version[0] << 8 | self.version[1]
        record["frame_bytes"] = self.frame_bytes
        record["first_shim"] = NO_SHIM if self.first_shim is None else self.first_shim
        if self.code_qualname is not None:
            record["code_name"] = self.code_qualname
        flags = records.InterpreterFlags.INTERPRETER_STACKS
        if self.heap_frames:
            flags |= records.InterpreterFlags.INTERPRETER_HEAP_FRAMES
        if self.in_cframe:
            flags |= records.InterpreterFlags.INTERPRETER_CFRAME
        record["flags"] = int(flags)
        return record


def layout_of(version: Version, runtime: bytes = b"") -> Layout:
    """The layout of a CPython.

    Args:
        version: major, minor, micro. Within a minor version the fields that we use have not moved in any
            release that was measured, so one that was not has the layout of its minor version.
        runtime: what is at _PyRuntime. From 3.13 on its debug offsets go before the table.

    Raises:
        UnknownLayoutError: the version is not in the table, or the build is a free-threaded one, or its debug
            offsets are not those of the version.
    """
    known = OFFSETS.get(version[:2])
    name = ".".join(map(str, version))
    if known is None:
        raise UnknownLayoutError(
            f"the layout of Python {name} is not known; known are 3.{OLDEST[1]} to 3.{NEWEST[1]}"
        )
    layout = Layout(version=version, **(known | DIFFERENT.get(version, {})))
    if version < (3, 13) or not runtime:
        return layout
    try:
        numbers = debug_offsets.parse_debug_offsets(runtime, version[1])
    except FormatError as error:
        raise UnknownLayoutError(
            f"the layout of this Python {name} is not known: {error}"
        ) from error
    if numbers["free_threaded"]:
        raise UnknownLayoutError(f"the free-threaded build of Python {name} is not supported")
    return _corrected(layout, numbers)


def _corrected(layout: Layout, numbers: dict[str, int]) -> Layout:
    """A layout with what the process itself says, and with what stands next to that moved along."""
    changes: dict[str, Any] = dict(debug_offsets.layout_changes(numbers))
    assert layout.tstate_datastack_top is not None and layout.tstate_datastack_chunk is not None
    changes["tstate_datastack_top"] = (
        layout.tstate_datastack_top
        + changes["tstate_datastack_chunk"]
        - layout.tstate_datastack_chunk
    )
    longer = changes["tstate_bytes"] - layout.tstate_bytes
    for name in ("tstate_asyncio_loop", "tstate_asyncio_task", "tstate_asyncio_tasks"):
        if (offset := getattr(layout, name)) is not None:
            changes[name] = offset + longer
    if not 0 <= layout.unicode_state - numbers["unicode.state"] < 4:
        raise UnknownLayoutError(
            f"the layout of this Python {'.'.join(map(str, layout.version))} is not known: its strings"
            f" have their state at {numbers['unicode.state']}"
        )
    return replace(layout, **changes)
