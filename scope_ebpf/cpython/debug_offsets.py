"""_Py_DebugOffsets: what CPython 3.13 and later itself says of its structs, at the start of _PyRuntime.

Every release has all fields as 64-bit numbers, one after the other, but which there are is different in
each minor version (Include/internal/pycore_runtime.h in 3.13, pycore_debug_offsets.h from 3.14 on).
"""

import struct
from typing import Final

from scope_ebpf.errors import FormatError

COOKIE: Final = b"xdebugpy"
# sizes and offsets above this are none; the runtime itself, the largest struct, has about 400 KiB
PLAUSIBLE: Final = 1 << 24

# Section by section, with the version that brought a field where it is not 3.13.
_FIELDS: Final = """
version free_threaded
runtime: size finalizing interpreters_head
interpreter: size id next threads_head threads_main@14 gc imports_modules sysdict builtins ceval_gil
    gil gil_enabled gil_locked gil_holder code_object_generation@14 tlbc_generation@14
tstate: size prev next interp current_frame base_frame@15 last_profiled_frame@15
    last_profiled_frame_seq@15 thread_id native_thread_id datastack_chunk status holds_gil@15
    gil_requested@15 current_exception@15 exc_state@15
error: exc_value@15
frame: size previous executable instr_ptr localsplus owner stackpointer@14 tlbc_index@14
code: size filename name qualname linetable firstlineno argcount localsplusnames localspluskinds
    co_code_adaptive co_tlbc@14
object: size ob_type
type: size tp_name tp_repr tp_flags tp_basicsize@15 tp_dictoffset@15
heap_type: size@15 ht_cached_keys@15
tuple: size ob_item ob_size
list: size ob_item ob_size
set: size@14 used@14 table@14 mask@14
dict: size ma_keys ma_values
float: size ob_fval
int: size lv_tag ob_digit
bytes: size ob_size ob_sval
unicode: size state length ascii_size compact_size@15
gc: size collecting frame@15 generation_stats_size@15 generation_stats@15
generator: size@14 gi_name@14 gi_iframe@14 gi_frame_state@14
list_node: next@14 prev@14
debugger: eval_breaker@14 remote_debugger_support@14 remote_debugging_enabled@14
    debugger_pending_call@14 debugger_script_path@14 debugger_script_path_size@14
"""

# The field of a Layout that each one is.
LAYOUT_FIELDS: Final = {
    "runtime.size": "runtime_bytes",
    "runtime.interpreters_head": "runtime_interpreters_head",
    "interpreter.size": "interpreter_bytes",
    "interpreter.id": "interpreter_id",
    "interpreter.next": "interpreter_next",
    "interpreter.threads_head": "interpreter_threads_head",
    "interpreter.imports_modules": "interpreter_modules",
    "interpreter.sysdict": "interpreter_sysdict",
    "interpreter.builtins": "interpreter_builtins",
    "interpreter.ceval_gil": "interpreter_gil",
    "interpreter.gil": "interpreter_own_gil",
    "tstate.size": "tstate_bytes",
    "tstate.prev": "tstate_previous",
    "tstate.next": "tstate_next",
    "tstate.interp": "tstate_interpreter",
    "tstate.current_frame": "tstate_frame",
    "tstate.thread_id": "tstate_thread_id",
    "tstate.native_thread_id": "tstate_native_thread_id",
    "tstate.datastack_chunk": "tstate_datastack_chunk",
    "frame.previous": "frame_previous",
    "frame.executable": "frame_code",
    "frame.instr_ptr": "frame_instruction",
    "frame.localsplus": "frame_localsplus",
    "frame.owner": "frame_owner",
    "frame.stackpointer": "frame_stackpointer",
    "code.filename": "code_file",
    "code.name": "code_name",
    "code.qualname": "code_qualname",
    "code.linetable": "code_lines",
    "code.firstlineno": "code_first_line",
    "code.argcount": "code_argcount",
    "code.localsplusnames": "code_localsplusnames",
    "code.localspluskinds": "code_localspluskinds",
    "code.co_code_adaptive": "code_instructions",
    "object.ob_type": "object_type",
    "type.tp_name": "type_name",
    "type.tp_flags": "type_flags",
    "type.tp_basicsize": "type_basicsize",
    "type.tp_dictoffset": "type_dictoffset",
    "heap_type.ht_cached_keys": "heap_type_cached_keys",
    "tuple.ob_item": "tuple_items",
    "list.ob_item": "list_items",
    "set.used": "set_used",
    "set.table": "set_table",
    "set.mask": "set_mask",
    "dict.ma_keys": "dict_keys",
    "dict.ma_values": "dict_values",
    "float.ob_fval": "float_value",
    "int.lv_tag": "int_tag",
    "int.ob_digit": "int_digits",
    "bytes.ob_size": "bytes_size",
    "bytes.ob_sval": "bytes_data",
    "unicode.length": "unicode_length",
    "unicode.ascii_size": "unicode_ascii",
    "unicode.compact_size": "unicode_compact",
    "generator.gi_name": "generator_name",
    "generator.gi_iframe": "generator_frame",
    "generator.gi_frame_state": "generator_state",
}


def field_names(minor: int) -> list[str]:
    """Names of the fields behind the cookie, in their order, for CPython 3.minor.

    >>> field_names(13)[:5]
    ['version', 'free_threaded', 'runtime.size', 'runtime.finalizing', 'runtime.interpreters_head']
    """
    names = []
    section = ""
    for word in _FIELDS.split():
        if word.endswith(":"):
            section = word[:-1] + "."
            continue
        name, _, since = word.partition("@")
        if minor >= int(since or 13):
            names.append(section + name)
    return names


def debug_bytes(minor: int) -> int:
    """How long a _Py_DebugOffsets is, with its cookie."""
    return len(COOKIE) + 8 * len(field_names(minor))


def parse_debug_offsets(data: bytes, minor: int) -> dict[str, int]:
    """The numbers in a _Py_DebugOffsets, as `section.field`.

    Args:
        data: what is at _PyRuntime, debug_bytes(minor) bytes of it or more.
        minor: of CPython 3.minor; 13 or later.

    Raises:
        FormatError: it is of another version, or is none.
    """
    if not data.startswith(COOKIE):
        raise FormatError(f"no _Py_DebugOffsets are where Python 3.{minor} should have them")
    names = field_names(minor)
    if len(data) < debug_bytes(minor):
        raise FormatError(f"the _Py_DebugOffsets of Python 3.{minor} are cut off")
    numbers = dict(
        zip(names, struct.unpack_from(f"<{len(names)}Q", data, len(COOKIE)), strict=True)
    )
    if numbers["version"] >> 16 != 0x300 | minor:
        raise FormatError(
            f"_Py_DebugOffsets of version {numbers['version']:#x} are in a Python 3.{minor}"
        )
    for name, value in numbers.items():
        section, _, field = name.rpartition(".")
        if not section or field.endswith("size") or section in ("debugger", "error"):
            continue
        if value >= min(numbers.get(f"{section}.size", PLAUSIBLE), PLAUSIBLE):
            raise FormatError(
                f"the _Py_DebugOffsets of Python 3.{minor} say that {name} is at {value}, behind its end"
            )
    return numbers


def layout_changes(numbers: dict[str, int]) -> dict[str, int]:
    """What parse_debug_offsets() gave, as fields of a Layout."""
    changes = {field: numbers[name] for name, field in LAYOUT_FIELDS.items() if name in numbers}
    # they are counted from the start of the interpreter, in which the GIL is
    changes["gil_locked"] = numbers["interpreter.gil_locked"] - numbers["interpreter.gil"]
    changes["gil_holder"] = numbers["interpreter.gil_holder"] - numbers["interpreter.gil"]
    return changes
