#!/usr/bin/env python3
"""Writes scope_ebpf/cpython/offsets_table.py: where the fields of CPython's structs are, by version.

    scripts/generate_python_offsets.py [--write] [--debian] [INCLUDE...]

Without --write it prints the module. The numbers are what the C compiler makes of CPython's own
headers, the internal ones included. They are sought

- in each INCLUDE, a folder with a folder python3.X in it,
- in the prefixes of pyenv, and in /usr/include and /usr/local/include,
- with --debian, in packages of Debian's suites (libpython3.X-dev), which apt-get downloads into a
  folder of its own: the system's package lists are neither used nor changed.

A release whose headers were not found keeps the numbers that the committed table has for it, and
stderr says so. Where there is no C compiler for x86-64 it exits with status 77, as test runners
expect of a test that cannot run here.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TABLE = Path(__file__).resolve().parent.parent / "scope_ebpf/cpython/offsets_table.py"
NOT_POSSIBLE_HERE = 77
OLDEST, NEWEST = 8, 15  # minor versions of CPython 3
SUITES = ("bullseye", "bookworm", "trixie", "forky", "sid")


class Field(NamedTuple):
    """What one field of the table is in C."""

    name: str
    expression: str
    since: int = OLDEST  # first and last minor version that has it so
    until: int = NEWEST


class Group(NamedTuple):
    """Fields of one struct."""

    source: str  # where CPython defines it, for the reader of the table
    fields: tuple[Field, ...]


def at(name: str, struct: str, member: str, since: int = OLDEST, until: int = NEWEST) -> Field:
    """A field that is an offset."""
    return Field(name, f"offsetof({struct}, {member})", since, until)


GROUPS = (
    Group(
        "_PyRuntimeState: internal/pycore_runtime.h (3.8: pycore_pystate.h; 3.14+: pycore_runtime_structs.h)",
        (
            Field("runtime_bytes", "sizeof(_PyRuntimeState)"),
            at("runtime_initialized", "_PyRuntimeState", "initialized"),
            at("runtime_interpreters_head", "_PyRuntimeState", "interpreters.head"),
            at("runtime_interpreters_main", "_PyRuntimeState", "interpreters.main"),
            at("runtime_gil", "_PyRuntimeState", "ceval.gil", until=11),
            at("runtime_tss", "_PyRuntimeState", "gilstate.autoTSSkey", until=11),
            at("runtime_tss", "_PyRuntimeState", "autoTSSkey", since=12, until=14),
        ),
    ),
    Group(
        "Py_tss_t: cpython/pythread.h (3.8, 3.9: pythread.h)",
        (
            at("tss_initialized", "Py_tss_t", "_is_initialized"),
            at("tss_key", "Py_tss_t", "_key"),
        ),
    ),
    Group(
        "PyInterpreterState: internal/pycore_interp.h (3.8: pycore_pystate.h;"
        " 3.14+: pycore_interp_structs.h)",
        (
            Field("interpreter_bytes", "sizeof(PyInterpreterState)"),
            at("interpreter_next", "PyInterpreterState", "next"),
            at("interpreter_id", "PyInterpreterState", "id"),
            at("interpreter_threads_head", "PyInterpreterState", "tstate_head", until=10),
            at("interpreter_threads_head", "PyInterpreterState", "threads.head", since=11),
            at("interpreter_modules", "PyInterpreterState", "modules", until=11),
            at("interpreter_modules", "PyInterpreterState", "imports.modules", since=12),
            at("interpreter_sysdict", "PyInterpreterState", "sysdict"),
            at("interpreter_builtins", "PyInterpreterState", "builtins"),
            at("interpreter_gil", "PyInterpreterState", "ceval.gil", since=12),
            at("interpreter_own_gil", "PyInterpreterState", "_gil", since=12),
        ),
    ),
    Group(
        "struct _gil_runtime_state: internal/pycore_gil.h (3.14+: pycore_interp_structs.h)",
        (
            Field("gil_bytes", "sizeof(struct _gil_runtime_state)"),
            at("gil_holder", "struct _gil_runtime_state", "last_holder"),
            at("gil_locked", "struct _gil_runtime_state", "locked"),
            at("gil_switch_number", "struct _gil_runtime_state", "switch_number"),
            at("gil_cond", "struct _gil_runtime_state", "cond"),
            at("gil_mutex", "struct _gil_runtime_state", "mutex"),
            at("gil_switch_cond", "struct _gil_runtime_state", "switch_cond"),
            at("gil_switch_mutex", "struct _gil_runtime_state", "switch_mutex"),
        ),
    ),
    Group(
        "PyThreadState: cpython/pystate.h",
        (
            Field("tstate_bytes", "sizeof(PyThreadState)"),
            at("tstate_previous", "PyThreadState", "prev"),
            at("tstate_next", "PyThreadState", "next"),
            at("tstate_interpreter", "PyThreadState", "interp"),
            at("tstate_frame", "PyThreadState", "frame", until=10),
            at("tstate_frame", "PyThreadState", "cframe", since=11, until=12),
            at("tstate_frame", "PyThreadState", "current_frame", since=13),
            at("tstate_thread_id", "PyThreadState", "thread_id"),
            at("tstate_native_thread_id", "PyThreadState", "native_thread_id", since=11),
            at("tstate_context", "PyThreadState", "context"),
            at("tstate_id", "PyThreadState", "id"),
            at("tstate_dict", "PyThreadState", "dict"),
            at("tstate_datastack_chunk", "PyThreadState", "datastack_chunk", since=11),
            at("tstate_datastack_top", "PyThreadState", "datastack_top", since=11),
        ),
    ),
    Group(
        "_PyThreadStateImpl: internal/pycore_tstate.h",
        (
            at("tstate_asyncio_loop", "_PyThreadStateImpl", "asyncio_running_loop", since=13),
            at("tstate_asyncio_task", "_PyThreadStateImpl", "asyncio_running_task", since=14),
            at("tstate_asyncio_tasks", "_PyThreadStateImpl", "asyncio_tasks_head", since=14),
        ),
    ),
    Group(
        "_PyCFrame, _PyStackChunk: cpython/pystate.h",
        (
            at("cframe_frame", "_PyCFrame", "current_frame", since=11, until=12),
            at("chunk_previous", "_PyStackChunk", "previous", since=11),
            at("chunk_size", "_PyStackChunk", "size", since=11),
            at("chunk_top", "_PyStackChunk", "top", since=11),
            at("chunk_data", "_PyStackChunk", "data", since=11),
        ),
    ),
    Group(
        "up to 3.10 PyFrameObject: cpython/frameobject.h (3.8: frameobject.h); later"
        " _PyInterpreterFrame: internal/pycore_frame.h (3.14+: pycore_interpframe_structs.h)",
        (
            at("frame_code", "PyFrameObject", "f_code", until=10),
            at("frame_code", "_PyInterpreterFrame", "f_code", since=11, until=12),
            at("frame_code", "_PyInterpreterFrame", "f_executable", since=13),
            at("frame_previous", "PyFrameObject", "f_back", until=10),
            at("frame_previous", "_PyInterpreterFrame", "previous", since=11),
            at("frame_instruction", "PyFrameObject", "f_lasti", until=10),
            at("frame_instruction", "_PyInterpreterFrame", "prev_instr", since=11, until=12),
            at("frame_instruction", "_PyInterpreterFrame", "instr_ptr", since=13),
            at("frame_globals", "PyFrameObject", "f_globals", until=10),
            at("frame_globals", "_PyInterpreterFrame", "f_globals", since=11),
            at("frame_builtins", "PyFrameObject", "f_builtins", until=10),
            at("frame_builtins", "_PyInterpreterFrame", "f_builtins", since=11),
            at("frame_function", "_PyInterpreterFrame", "f_func", since=11, until=11),
            at("frame_function", "_PyInterpreterFrame", "f_funcobj", since=12),
            at("frame_localsplus", "PyFrameObject", "f_localsplus", until=10),
            at("frame_localsplus", "_PyInterpreterFrame", "localsplus", since=11),
            # how much of the value stack is in use, in three ways
            at("frame_valuestack", "PyFrameObject", "f_valuestack", until=10),
            at("frame_stackdepth", "PyFrameObject", "f_stackdepth", since=10, until=10),
            at("frame_stacktop", "_PyInterpreterFrame", "stacktop", since=11, until=13),
            at("frame_stackpointer", "PyFrameObject", "f_stacktop", until=9),
            at("frame_stackpointer", "_PyInterpreterFrame", "stackpointer", since=14),
            at("frame_generator", "PyFrameObject", "f_gen", until=10),
            at("frame_blocks", "PyFrameObject", "f_iblock", until=10),
            at("frame_block_stack", "PyFrameObject", "f_blockstack", until=10),
            at("frame_state", "PyFrameObject", "f_executing", until=9),
            at("frame_state", "PyFrameObject", "f_state", since=10, until=10),
            at("frame_owner", "_PyInterpreterFrame", "owner", since=11),
            Field("owner_thread", "FRAME_OWNED_BY_THREAD", since=11),
            Field("owner_generator", "FRAME_OWNED_BY_GENERATOR", since=11),
            Field("owner_frame_object", "FRAME_OWNED_BY_FRAME_OBJECT", since=11),
            Field("first_shim", "FRAME_OWNED_BY_CSTACK", since=12, until=13),
            Field("first_shim", "FRAME_OWNED_BY_INTERPRETER", since=14),
        ),
    ),
    Group(
        "PyCodeObject: cpython/code.h (3.8: code.h)",
        (
            at("code_argcount", "PyCodeObject", "co_argcount"),
            at("code_posonlyargcount", "PyCodeObject", "co_posonlyargcount"),
            at("code_kwonlyargcount", "PyCodeObject", "co_kwonlyargcount"),
            at("code_stacksize", "PyCodeObject", "co_stacksize"),
            at("code_first_traceable", "PyCodeObject", "_co_firsttraceable", since=11),
            at("code_nlocals", "PyCodeObject", "co_nlocals"),
            at("code_nlocalsplus", "PyCodeObject", "co_nlocalsplus", since=11),
            at("code_flags", "PyCodeObject", "co_flags"),
            at("code_first_line", "PyCodeObject", "co_firstlineno"),
            at("code_consts", "PyCodeObject", "co_consts"),
            at("code_names", "PyCodeObject", "co_names"),
            at("code_varnames", "PyCodeObject", "co_varnames", until=10),
            at("code_localsplusnames", "PyCodeObject", "co_localsplusnames", since=11),
            at("code_localspluskinds", "PyCodeObject", "co_localspluskinds", since=11),
            at("code_file", "PyCodeObject", "co_filename"),
            at("code_name", "PyCodeObject", "co_name"),
            at("code_qualname", "PyCodeObject", "co_qualname", since=11),
            at("code_lines", "PyCodeObject", "co_lnotab", until=9),
            at("code_lines", "PyCodeObject", "co_linetable", since=10),
            at("code_code", "PyCodeObject", "co_code", until=10),
            at("code_instructions", "PyCodeObject", "co_code_adaptive", since=11),
        ),
    ),
    Group(
        "PyGenObject, as PyCoroObject and PyAsyncGenObject: genobject.h (3.11+: cpython/genobject.h;"
        " 3.14+: internal/pycore_interpframe_structs.h); PyFrameState: internal/pycore_frame.h",
        (
            at("generator_name", "PyGenObject", "gi_name"),
            at("generator_qualname", "PyGenObject", "gi_qualname"),
            at("generator_frame_object", "PyGenObject", "gi_frame", until=10),
            at("generator_code", "PyGenObject", "gi_code", until=11),
            at("generator_frame", "PyGenObject", "gi_iframe", since=11),
            at("generator_state", "PyGenObject", "gi_frame_state", since=11),
            Field("state_created", "(int)FRAME_CREATED", since=11),
            Field("state_suspended", "(int)FRAME_SUSPENDED", since=11),
            Field("state_awaiting", "(int)FRAME_SUSPENDED_YIELD_FROM", since=13),
            Field("state_executing", "(int)FRAME_EXECUTING", since=11),
            Field("state_cleared", "(int)FRAME_CLEARED", since=11),
        ),
    ),
    Group(
        "PyObject, PyVarObject: object.h; values before the object: internal/pycore_object.h, pycore_dict.h",
        (
            at("object_refcount", "PyObject", "ob_refcnt"),
            at("object_type", "PyObject", "ob_type"),
            Field("object_bytes", "sizeof(PyObject)"),
            at("object_size", "PyVarObject", "ob_size"),
            Field("object_managed_values", "-4 * (long)sizeof(void *)", since=11, until=11),
            Field("object_managed_dict", "MANAGED_DICT_OFFSET", since=11, until=11),
            # _PyObject_DictOrValuesPointer: the same place holds values, then its lowest bit is set
            Field("object_managed_dict", "-3 * (long)sizeof(void *)", since=12, until=12),
            Field("object_managed_dict", "MANAGED_DICT_OFFSET", since=13),
        ),
    ),
    Group(
        "PyTypeObject: cpython/object.h",
        (
            at("type_name", "PyTypeObject", "tp_name"),
            at("type_basicsize", "PyTypeObject", "tp_basicsize"),
            at("type_flags", "PyTypeObject", "tp_flags"),
            at("type_methods", "PyTypeObject", "tp_methods"),
            at("type_members", "PyTypeObject", "tp_members"),
            at("type_getset", "PyTypeObject", "tp_getset"),
            at("type_base", "PyTypeObject", "tp_base"),
            at("type_dict", "PyTypeObject", "tp_dict"),
            at("type_dictoffset", "PyTypeObject", "tp_dictoffset"),
            at("type_init", "PyTypeObject", "tp_init"),
            at("type_new", "PyTypeObject", "tp_new"),
            at("type_iternext", "PyTypeObject", "tp_iternext"),
            at("type_mro", "PyTypeObject", "tp_mro"),
            Field("type_bytes", "sizeof(PyTypeObject)"),
            at("heap_type_cached_keys", "PyHeapTypeObject", "ht_cached_keys"),
        ),
    ),
    Group(
        "PyASCIIObject, PyCompactUnicodeObject, PyUnicodeObject: cpython/unicodeobject.h",
        (
            at("unicode_length", "PyASCIIObject", "length"),
            # kind is a bit field: where a 7 in it is found
            Field("unicode_state", "KIND_BYTE"),
            Field("unicode_kind_shift", "KIND_SHIFT"),
            Field("unicode_ascii", "sizeof(PyASCIIObject)"),
            Field("unicode_compact", "sizeof(PyCompactUnicodeObject)"),
            at("unicode_data", "PyUnicodeObject", "data"),
        ),
    ),
    Group(
        "PyBytesObject, PyTupleObject, PyListObject: cpython/{bytes,tuple,list}object.h",
        (
            at("bytes_size", "PyVarObject", "ob_size"),
            at("bytes_data", "PyBytesObject", "ob_sval"),
            at("tuple_items", "PyTupleObject", "ob_item"),
            at("list_items", "PyListObject", "ob_item"),
        ),
    ),
    Group(
        "struct _longobject: longintrepr.h (3.12+: cpython/longintrepr.h); PyFloatObject: floatobject.h",
        (
            # up to 3.11 the sign is that of ob_size; later lv_tag: digits << 3 | sign
            at("int_size", "struct _longobject", "ob_base.ob_size", until=11),
            at("int_tag", "struct _longobject", "long_value.lv_tag", since=12),
            at("int_digits", "struct _longobject", "ob_digit", until=11),
            at("int_digits", "struct _longobject", "long_value.ob_digit", since=12),
            at("float_value", "PyFloatObject", "ob_fval"),
        ),
    ),
    Group(
        "PyDictObject: cpython/dictobject.h; keys and values: internal/pycore_dict.h"
        " (up to 3.10: Objects/dict-common.h)",
        (
            at("dict_used", "PyDictObject", "ma_used"),
            at("dict_keys", "PyDictObject", "ma_keys"),
            at("dict_values", "PyDictObject", "ma_values"),
            at("keys_size", "struct _dictkeysobject", "dk_size", until=10),
            at("keys_log2_size", "struct _dictkeysobject", "dk_log2_size", since=11),
            at("keys_log2_index_bytes", "struct _dictkeysobject", "dk_log2_index_bytes", since=11),
            at("keys_kind", "struct _dictkeysobject", "dk_kind", since=11),
            at("keys_entries", "struct _dictkeysobject", "dk_nentries"),
            at("keys_indices", "struct _dictkeysobject", "dk_indices"),
            Field("keys_kind_general", "DICT_KEYS_GENERAL", since=11),
            Field("values_items", "0", until=10),
            at("values_items", "struct _dictvalues", "values", since=11),
        ),
    ),
    Group(
        "PySetObject: setobject.h (3.11+: cpython/setobject.h)",
        (
            at("set_used", "PySetObject", "used"),
            at("set_mask", "PySetObject", "mask"),
            at("set_table", "PySetObject", "table"),
            Field("set_entry_bytes", "sizeof(setentry)"),
        ),
    ),
    Group(
        "functions: funcobject.h, methodobject.h, classobject.h (3.9+: cpython/), descrobject.h",
        (
            at("function_code", "PyFunctionObject", "func_code"),
            at("function_closure", "PyFunctionObject", "func_closure"),
            at("function_dict", "PyFunctionObject", "func_dict"),
            at("cfunction_definition", "PyCFunctionObject", "m_ml"),
            at("cfunction_self", "PyCFunctionObject", "m_self"),
            at("method_function", "PyMethodObject", "im_func"),
            at("method_self", "PyMethodObject", "im_self"),
            at("method_descriptor", "PyMethodDescrObject", "d_method"),
            at("definition_function", "PyMethodDef", "ml_meth"),
            Field("definition_bytes", "sizeof(PyMethodDef)"),
        ),
    ),
    Group(
        "PyModuleObject: internal/pycore_moduleobject.h (3.8, 3.9: Objects/moduleobject.c)",
        (
            Field("module_dict", "sizeof(PyObject)", until=9),
            at("module_dict", "PyModuleObject", "md_dict", since=10),
        ),
    ),
    Group(
        "PyWeakReference: weakrefobject.h (3.11+: cpython/weakrefobject.h)",
        (
            at("weakref_object", "PyWeakReference", "wr_object"),
            at("weakref_callback", "PyWeakReference", "wr_callback"),
        ),
    ),
    Group(
        "struct _pycontextobject: internal/pycore_context.h",
        (
            at("context_previous", "struct _pycontextobject", "ctx_prev"),
            at("context_vars", "struct _pycontextobject", "ctx_vars"),
            at("context_entered", "struct _pycontextobject", "ctx_entered"),
        ),
    ),
)

# Headers beside Python.h, where the version has them.
HEADERS = (
    "frameobject.h",
    "setobject.h",
    "weakrefobject.h",
    "longintrepr.h",
    "cpython/longintrepr.h",
    "internal/pycore_pystate.h",
    "internal/pycore_interp.h",
    "internal/pycore_runtime.h",
    "internal/pycore_gil.h",
    "internal/pycore_context.h",
    "internal/pycore_dict.h",
    "internal/pycore_frame.h",
    "internal/pycore_interpframe.h",
    "internal/pycore_genobject.h",
    "internal/pycore_moduleobject.h",
    "internal/pycore_object.h",
    "internal/pycore_tstate.h",
)

# Objects/dict-common.h of 3.8 to 3.10, which is not installed.
DICT_COMMON = """
struct _dictkeysobject {
    Py_ssize_t dk_refcnt;
    Py_ssize_t dk_size;
    void *dk_lookup;
    Py_ssize_t dk_usable;
    Py_ssize_t dk_nentries;
    char dk_indices[];
};
"""

KIND = """
static int kind_place(void) {
    PyASCIIObject text;
    memset(&text, 0, sizeof(text));
    text.state.kind = 7;
    for (unsigned i = 0; i < sizeof(text); i++)
        if (((unsigned char *)&text)[i])
            return i << 8 | __builtin_ctz(((unsigned char *)&text)[i]);
    return -1;
}
#define KIND_BYTE (kind_place() >> 8)
#define KIND_SHIFT (kind_place() & 255)
"""

Version = tuple[int, int, int]
Offsets = dict[str, int]


def fields(minor: int) -> list[Field]:
    """Those that a minor version has."""
    return [
        field for group in GROUPS for field in group.fields if field.since <= minor <= field.until
    ]


def version_of(include: Path) -> Version | None:
    """What a folder pythonX.Y has the headers of; None for builds that are not in the table."""
    try:
        text = (include / "patchlevel.h").read_text()
    except OSError:
        return None
    numbers = [
        int(match[1])
        for part in ("MAJOR", "MINOR", "MICRO")
        if (match := re.search(rf"#define PY_{part}_VERSION\s+(\d+)", text))
    ]
    final = re.search(r"#define PY_RELEASE_LEVEL\s+PY_RELEASE_LEVEL_FINAL", text)
    if len(numbers) != 3 or not final or not OLDEST <= numbers[1] <= NEWEST or numbers[0] != 3:
        return None
    # debug and free-threaded builds have other structs, and folders such as python3.13t
    if not include.name.endswith(f"3.{numbers[1]}") or not (include / "internal").is_dir():
        return None
    return numbers[0], numbers[1], numbers[2]


def measured(include: Path, minor: int, folder: Path) -> Offsets:
    """The fields as the compiler sees them."""
    headers = [header for header in HEADERS if (include / header).exists()]
    lines = ["#define Py_BUILD_CORE 1", "#include <Python.h>", "#include <stddef.h>"]
    lines += [f'#include "{header}"' for header in headers]
    lines += [DICT_COMMON] if minor <= 10 else []
    lines += [KIND, "int main(void) {"]
    lines += [
        f'    printf("{field.name} %ld\\n", (long)({field.expression}));' for field in fields(minor)
    ]
    lines += ["    return 0;", "}"]
    source, program = folder / f"offsets{minor}.c", folder / f"offsets{minor}"
    source.write_text("\n".join(lines))
    # Debian's pyconfig.h includes the one in <x86_64-linux-gnu/python3.X/>
    command = [
        os.environ.get("CC") or "cc",
        "-w",
        "-I",
        str(include),
        "-I",
        str(include / "internal"),
    ]
    command += ["-I", str(include.parent), "-o", str(program), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"cannot compile the headers of Python 3.{minor}:\n{result.stderr}")
    output = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


# ---- headers ----


def installed() -> Iterator[Path]:
    """Folders that may have headers of a CPython."""
    yield from Path.home().glob(".pyenv/versions/3.*/include/python3.*")
    for prefix in ("/usr/include", "/usr/local/include"):
        yield from Path(prefix).glob("python3.*")


def from_debian(folder: Path) -> Iterator[Path]:
    """Headers in packages of Debian, unpacked in a folder.

    Raises:
        SystemExit: there is no apt-get, or it fails.
    """
    mirror, keyring = debian_mirror()
    (folder / "lists/partial").mkdir(parents=True)
    (folder / "cache/archives/partial").mkdir(parents=True)
    sources = folder / "sources.list"
    sources.write_text(
        "".join(f"deb [signed-by={keyring}] {mirror} {suite} main\n" for suite in SUITES)
    )
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Acquire::Languages": "none",
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "root",
    }
    flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    run(["apt-get", *flags, "-q", "update"], folder)
    listed = run(["apt-cache", *flags, "madison", *packages()], folder)
    wanted = {
        (row[0], row[1])
        for row in ([part.strip() for part in line.split("|")] for line in listed.splitlines())
        if len(row) == 3 and row[2].endswith("Packages")
    }
    for number, (package, version) in enumerate(sorted(wanted)):
        run(["apt-get", *flags, "-q", "download", f"{package}={version}"], folder)
        unpacked = folder / str(number)
        for archive in folder.glob("*.deb"):
            run(["dpkg", "-x", str(archive), str(unpacked)], folder)
            archive.unlink()
        yield from (unpacked / "usr/include").glob("python3.*")


def packages() -> list[str]:
    """Names of the packages with the headers."""
    return [f"libpython3.{minor}-dev" for minor in range(OLDEST, NEWEST + 1)]


def debian_mirror() -> tuple[str, str]:
    """The mirror and the keyring that this system itself uses."""
    for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        text = file.read_text()
        uri = re.search(r"^URIs:\s*(\S+/debian)/?\s*$", text, re.MULTILINE)
        key = re.search(r"^Signed-By:\s*(\S+)\s*$", text, re.MULTILINE)
        if uri and key:
            return uri[1], key[1]
    return sys.exit("cannot use --debian: no mirror of Debian in /etc/apt/sources.list.d")


def run(command: list[str], folder: Path) -> str:
    """The output of a command; the program ends if it fails."""
    if shutil.which(command[0]) is None:
        sys.exit(f"cannot use --debian: there is no {command[0]}")
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command[:1])} failed:\n{result.stderr}")
    return result.stdout


# ---- the table ----


def committed() -> dict[Version, Offsets]:
    """What the present table says, by release."""
    try:
        from scope_ebpf.cpython import offsets_table
    except ImportError:
        return {}
    return {
        release: offsets_table.OFFSETS[release[:2]] | offsets_table.DIFFERENT.get(release, {})
        for release in offsets_table.MEASURED
    }


def table(found: dict[Version, Offsets]) -> str:
    """The module's text."""
    newest = {minor: max(v for v in found if v[1] == minor) for _, minor, _ in found}
    lines = [
        '"""Where the fields of CPython\'s structs are: bytes from the start of the struct, x86-64 Linux.',
        "",
        "Generated by scripts/generate_python_offsets.py. Do not edit: change that script, then run",
        "it with --write. Read this through scope_ebpf.cpython.offsets.",
        '"""',
        "",
        "from typing import Final",
        "",
        "# The releases whose headers were measured.",
        "MEASURED: Final[tuple[tuple[int, int, int], ...]] = (",
        *(f"    {release}," for release in sorted(found)),
        ")",
        "",
        "# By minor version: what its newest release in MEASURED has.",
        "OFFSETS: Final[dict[tuple[int, int], dict[str, int]]] = {",
    ]
    for minor in sorted(newest):
        offsets = found[newest[minor]]
        lines.append(f"    (3, {minor}): {{")
        for group in GROUPS:
            present = [field.name for field in group.fields if field.since <= minor <= field.until]
            if present:
                lines += [f"        # {line}" for line in wrapped(group.source)]
                lines += [f'        "{name}": {offsets[name]},' for name in present]
        lines.append("    },")
    lines += [
        "}",
        "",
        "# By release: what is different in it.",
        "DIFFERENT: Final[dict[tuple[int, int, int], dict[str, int]]] = {",
    ]
    for release in sorted(found):
        base = found[newest[release[1]]]
        different = {name: v for name, v in found[release].items() if base[name] != v}
        if different:
            lines += [f"    {release}: {{"]
            lines += [f'        "{name}": {value},' for name, value in different.items()]
            lines += ["    },"]
    return "\n".join([*lines, "}"])


def wrapped(text: str, width: int = 88) -> Iterable[str]:
    """Text in lines."""
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line


def main() -> None:
    """Prints or writes the module."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None or platform.machine() != "x86_64":
        print("no C compiler for x86-64 here", file=sys.stderr)
        sys.exit(NOT_POSSIBLE_HERE)
    debian = "--debian" in sys.argv[1:]
    given = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--")]
    found: dict[Version, Offsets] = {}
    with tempfile.TemporaryDirectory(prefix="python-offsets-") as name:
        folder = Path(name)
        includes = [place for root in given for place in root.glob("python3.*")]
        includes += installed()
        includes += from_debian(folder) if debian else []
        for include in includes:
            version = version_of(include)
            if version is not None and version not in found:
                found[version] = measured(include, version[1], folder)
    for release, offsets in committed().items():
        if release not in found:
            print(f"no headers of {'.'.join(map(str, release))}: kept", file=sys.stderr)
            found[release] = offsets
    missing = set(range(OLDEST, NEWEST + 1)) - {release[1] for release in found}
    if missing:
        names = ", ".join(f"3.{minor}" for minor in sorted(missing))
        sys.exit(f"no headers of Python {names}; name their folders, or use --debian")
    if "--write" in sys.argv[1:]:
        TABLE.write_text(table(found) + "\n")
    else:
        print(table(found))


if __name__ == "__main__":
    main()
