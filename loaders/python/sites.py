"""CPython: in which of its files uprobes go, and where in them, told from the files alone.

What the C API exports has a name. All else is static, and a distribution's build has no names of it; but
the address of each function that Python code can call stands in data: in a table of methods, which is known
by the names of its methods, or in a type, which is exported or refers to its table of methods. So nothing
has to run, and stripped builds, builds with link-time optimisation and modules that are built into the
program are all the same.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.elf_data import LinkedData
from scope_ebpf.loaders.uprobe_sites import choose_site, direct_callees

# Include/methodobject.h
METH_KEYWORDS, METH_NOARGS, METH_O, METH_FASTCALL, METH_METHOD = 0x2, 0x4, 0x8, 0x80, 0x200
METHOD_DEF_BYTES = 32  # struct PyMethodDef: name, function, flags, documentation
METHODS_AT_MOST = 400
# Include/cpython/object.h, struct _typeobject: the same from 3.8 to 3.14
TP_DEALLOC, TP_METHODS, TP_INIT, TP_NEW = 48, 232, 296, 312
# Include/typeslots.h: numbers of slots of a type that is made when its module is imported
PY_TP_INIT, PY_TP_METHODS = 60, 64
SLOTS_AT_MOST = 80
# How much is looked at for a call of a function whose length is not known.
FUNCTION_BYTES = 512
FUTURE = frozenset({"result", "set_result", "remove_done_callback"})
TASK = frozenset({"get_coro", "get_stack", "set_name"})
QUEUE = frozenset({"empty", "get", "get_nowait", "put", "put_nowait", "qsize"})
DEQUE = frozenset({"append", "appendleft", "extendleft", "popleft", "rotate"})
CONTEXT = frozenset({"copy", "run", "keys", "values", "items", "get"})


@dataclass(frozen=True)
class PythonSite:
    """A place for a uprobe, and where the object is that it is there for.

    Attributes:
        event: what it tells, one of EVENTS.
        function: of CPython, as its source calls it or by module and method.
        path: of the file.
        offset: in the file.
        at_return: when the function returns.
        argument: which of the C function's arguments holds the object (0 is the first); None: its result.
        indirect: that argument points to an array, whose first element is the object.
        emulated: the kernel emulates the instruction, so the probe is cheap; None: not known.
        instruction: its text.
    """

    event: str
    function: str
    path: Path
    offset: int
    at_return: bool
    argument: int | None
    indirect: bool
    emulated: bool | None
    instruction: str


# Events and their objects:
EVENTS = (
    "context_copied",  # the new context, a copy of the one that runs
    "context_made",  # the new context, empty or a copy of one that need not run
    "context_freed",
    "code_freed",
    "future_done",  # the future whose result is set, before its callbacks are scheduled
    "queue_put",  # the item
    "queue_got",  # the item; NULL: none came
    "deque_put",
    "deque_got",
)


@dataclass(frozen=True)
class Method:
    """A row of a table of methods: where its function is in the file, and how it is called."""

    offset: int
    flags: int


@dataclass(frozen=True)
class MethodTable:
    """A table of methods: its virtual address and its rows."""

    address: int
    methods: dict[str, Method]


# ---- tables and types in a file ----


def method_tables(
    data: LinkedData, names: frozenset[str], absent: frozenset[str] = frozenset()
) -> list[MethodTable]:
    """The static tables of methods that have all these names, and none of the absent ones."""
    rare = max(sorted(names), key=len)
    found: dict[int, MethodTable] = {}
    for place in data.words_that_are(data.texts(rare)):
        start = place
        while _method(data, start - METHOD_DEF_BYTES) is not None:
            start -= METHOD_DEF_BYTES
            if place - start > METHODS_AT_MOST * METHOD_DEF_BYTES:
                break
        methods: dict[str, Method] = {}
        for index in range(METHODS_AT_MOST):
            row = _method(data, start + index * METHOD_DEF_BYTES)
            if row is None:
                break
            methods.setdefault(row[0], row[1])
        if names <= methods.keys() and not absent & methods.keys():
            found[start] = MethodTable(start, methods)
    return list(found.values())


def method_table(
    data: LinkedData, names: frozenset[str], absent: frozenset[str] = frozenset()
) -> MethodTable | None:
    """The one table of method_tables(); None if there is none, or a doubt which it is."""
    found = method_tables(data, names, absent)
    return found[0] if len(found) == 1 else None


def _method(data: LinkedData, address: int) -> tuple[str, Method] | None:
    """The row at an address, if it looks like one."""
    name_at, function = data.word(address), data.word(address + 8)
    flags = data.word(address + 16)
    if not name_at or not function or flags is None:
        return None
    name, offset = data.text(name_at), data.library.offset(function)
    if name is None or not name.isidentifier() or offset is None:
        return None
    return name, Method(offset, flags & 0xFFFFFFFF)


def type_function(data: LinkedData, type_name: str, field: int) -> int | None:
    """The file offset of a function that an exported static type has in a field."""
    address = data.library.variable(type_name)
    function = None if address is None else data.word(address + field)
    return data.library.offset(function) if function else None


def init_of_type(data: LinkedData, methods: MethodTable) -> int | None:
    """The file offset of the tp_init of the type that refers to a table of methods."""
    for place in data.words_that_are([methods.address]):
        function = None
        if data.word(place - 8) == PY_TP_METHODS:  # an array of slots: number, pointer
            slots = [place - 8 + 16 * step for step in range(-SLOTS_AT_MOST, SLOTS_AT_MOST)]
            near = {data.word(slot): data.word(slot + 8) for slot in _slots_around(data, slots)}
            function = near.get(PY_TP_INIT)
        else:
            function = data.word(place - TP_METHODS + TP_INIT)
        if function and (offset := data.library.offset(function)) is not None:
            return offset
    return None


def _slots_around(data: LinkedData, slots: list[int]) -> Iterator[int]:
    """The slots of the array that the one in the middle is in: their numbers are small and not 0."""
    middle = len(slots) // 2
    for part in (reversed(slots[:middle]), slots[middle:]):
        for slot in part:
            if not 0 < (data.word(slot) or 0) < 256:
                break
            yield slot


def calls(data: LinkedData, caller: int, callee: int, depth: int = 3) -> bool:
    """Whether a function calls another one of the same file: itself, by its PLT, or through others."""
    if depth == 0:
        return False
    length = data.library.extent(caller) or FUNCTION_BYTES
    targets = set(direct_callees(data.library, caller, length)) - {caller}
    if any(target == callee or _plt_target(data, target) == callee for target in targets):
        return True
    outside = (target for target in targets if not caller < target < caller + length)
    return any(calls(data, target, callee, depth - 1) for target in outside)


PLT_JUMP = re.compile(rb"\A(?:\xf3\x0f\x1e\xfa)?(?:\xf2|\x66)?\xff\x25(.{4})", re.DOTALL)


def _plt_target(data: LinkedData, offset: int) -> int | None:
    """Where a PLT stub jumps to, if that is in the same file: jmp *distance(%rip)."""
    match = PLT_JUMP.match(data.library.code(offset, 12))
    start = data.library.address(offset)
    if match is None or start is None:
        return None
    distance = int.from_bytes(match[1], "little", signed=True)
    target = data.word(start + match.end() + distance)
    return data.library.offset(target) if target else None


# ---- sites ----


def context_sites(data: LinkedData) -> list[PythonSite]:
    """Where contexts are made and freed: of the file that defines the C API.

    Context objects are made by exported functions, which extension modules call by name. Code of the same
    file may have them inlined (link-time optimisation): copy_context(), Context.copy(), Context() and
    asyncio's Task.__init__, if their modules are built in. Those that do not call the exported function get
    a probe of their own, so that each context is seen once.
    """
    found = []
    library = data.library
    exported = {
        name: library.function(name)
        for name in ("PyContext_CopyCurrent", "PyContext_Copy", "PyContext_New")
    }
    for name, offset in exported.items():
        if offset is not None:
            event = "context_copied" if name == "PyContext_CopyCurrent" else "context_made"
            found.append(_at_return(data, event, name, offset))
    inner = {
        "_contextvars.copy_context": (
            "context_copied",
            _function(method_table(data, frozenset({"copy_context"})), "copy_context"),
            exported["PyContext_CopyCurrent"],
        ),
        "Context.copy": (
            "context_made",
            _function(method_table(data, CONTEXT), "copy"),
            exported["PyContext_Copy"],
        ),
        "Context.__new__": (
            "context_made",
            type_function(data, "PyContext_Type", TP_NEW),
            exported["PyContext_New"],
        ),
    }
    for name, (event, offset, outer) in inner.items():
        if offset is not None and outer is not None and not calls(data, offset, outer):
            found.append(_at_return(data, event, name, offset))
    freed = type_function(data, "PyContext_Type", TP_DEALLOC)
    if freed is not None:
        found.append(_at_entry(data, "context_freed", "context_tp_dealloc", freed, 0))
    return found


def tasks_call_copy(data: LinkedData) -> bool | None:
    """Whether Task.__init__ of a built-in _asyncio calls PyContext_CopyCurrent; None: not built in."""
    copy = data.library.function("PyContext_CopyCurrent")
    tasks = method_table(data, TASK)
    start = None if tasks is None else init_of_type(data, tasks)
    return None if copy is None or start is None else calls(data, start, copy)


def code_sites(data: LinkedData) -> list[PythonSite]:
    """Where code objects are freed, so that their addresses may be used again."""
    offset = type_function(data, "PyCode_Type", TP_DEALLOC)
    if offset is None:
        return []
    return [_at_entry(data, "code_freed", "code_dealloc", offset, 0)]


def queue_sites(data: LinkedData) -> list[PythonSite]:
    """put and get of _queue.SimpleQueue, which thread pools hand their work items over with."""
    return _handoffs(
        data, "_queue.SimpleQueue", method_table(data, QUEUE),
        {"put": "queue_put", "put_nowait": "queue_put", "get": "queue_got", "get_nowait": "queue_got"},
    )  # fmt: skip


def deque_sites(data: LinkedData) -> list[PythonSite]:
    """append and popleft of collections.deque, which queue.Queue is made of; every deque calls them."""
    return _handoffs(
        data, "collections.deque", method_table(data, DEQUE),
        {"append": "deque_put", "popleft": "deque_got"},
    )  # fmt: skip


def future_sites(data: LinkedData) -> list[PythonSite]:
    """set_result of _asyncio.Future: the future, whose callbacks are still in it."""
    table = method_table(data, FUTURE, absent=TASK)
    offset = _function(table, "set_result")
    if offset is None:
        return []
    return [_at_entry(data, "future_done", "_asyncio.Future.set_result", offset, 0)]


def _handoffs(
    data: LinkedData, owner: str, table: MethodTable | None, events: dict[str, str]
) -> list[PythonSite]:
    found: dict[int, PythonSite] = {}
    for name, event in events.items():
        method = None if table is None else table.methods.get(name)
        if method is None or method.offset in found:
            continue
        function = f"{owner}.{name}"
        if event.endswith("_got"):
            found[method.offset] = _at_return(data, event, function, method.offset)
            continue
        place = first_argument(method.flags)
        if place is not None:
            found[method.offset] = _at_entry(data, event, function, method.offset, *place)
    return list(found.values())


def first_argument(flags: int) -> tuple[int, bool] | None:
    """Where a method's C function finds its first Python argument: (number of its argument, indirect).

    None if it would have to be taken out of a tuple. A single argument that is passed by its name is at the
    same place as one that is passed by position.

    >>> first_argument(METH_O), first_argument(METH_FASTCALL | METH_KEYWORDS)
    ((1, False), (1, True))
    """
    if flags & METH_O:
        return 1, False
    if flags & METH_FASTCALL:
        return (2 if flags & METH_METHOD else 1), True  # the class comes before
    return None


def _function(table: MethodTable | None, name: str) -> int | None:
    method = None if table is None else table.methods.get(name)
    return None if method is None else method.offset


# The System V ABI's registers of the arguments.
REGISTERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")


def _at_entry(
    data: LinkedData, event: str, function: str, offset: int, argument: int, indirect: bool = False
) -> PythonSite:
    # what runs before the site must leave the argument, and the object itself, as they came
    place = choose_site(data.library, offset, keep=(REGISTERS[0], REGISTERS[argument]))
    return PythonSite(
        event, function, data.library.path, place.offset, False, argument, indirect,
        place.emulated, place.instruction,
    )  # fmt: skip


def _at_return(data: LinkedData, event: str, function: str, offset: int) -> PythonSite:
    place = choose_site(data.library, offset, keep=(), at_return=True)
    return PythonSite(
        event, function, data.library.path, place.offset, True, None, False,
        place.emulated, place.instruction,
    )  # fmt: skip


# ---- files ----


@functools.lru_cache(maxsize=64)
def _sites_of(path: Path, identity: tuple[int, int, int, int]) -> tuple[PythonSite, ...]:
    """Sites of one file; `identity` tells a file from a later one of the same name."""
    data = LinkedData(SharedLibrary(path))
    found = [*queue_sites(data), *future_sites(data), *deque_sites(data)]
    if data.library.variable("PyCode_Type") is not None:
        found += [*context_sites(data), *code_sites(data)]
    return tuple(found)


def file_sites(path: Path) -> list[PythonSite]:
    """All sites of a file: of an interpreter (program or libpython) or of an extension module.

    Raises:
        FormatError: it cannot be read, or is not ELF.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    return list(_sites_of(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)))
