"""Places in the CPythons of this machine, compared with the symbol tables of those that have one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.elf_data import LinkedData
from scope_ebpf.loaders.python.files import (
    extension_files,
    interpreter_files,
    is_interpreter,
    resolve_in,
)
from scope_ebpf.loaders.python.sites import (
    CONTEXT,
    TASK,
    file_sites,
    init_of_type,
    method_table,
    tasks_call_copy,
)
from tests.live.pythons import Python, pythons, started

pytestmark = pytest.mark.object

# What CPython's source calls the functions; those that are inlined have more than one name.
NAMES = {
    "PyContext_CopyCurrent": "PyContext_CopyCurrent",
    "PyContext_Copy": "PyContext_Copy",
    "PyContext_New": "PyContext_New",
    "Context.copy": "_contextvars_Context_copy",
    "Context.__new__": "context_tp_new",
    "context_tp_dealloc": "context_tp_dealloc",
    "code_dealloc": "code_dealloc",
    "collections.deque.append": "deque_append",
    "collections.deque.popleft": "deque_popleft",
    "_queue.SimpleQueue.put": "_queue_SimpleQueue_put",
    "_queue.SimpleQueue.put_nowait": "_queue_SimpleQueue_put_nowait",
    "_queue.SimpleQueue.get": "_queue_SimpleQueue_get",
    "_queue.SimpleQueue.get_nowait": "_queue_SimpleQueue_get_nowait",
    "_asyncio.Future.set_result": "_asyncio_Future_set_result",
}


@pytest.fixture(params=[python for python in pythons() if python.root is None], ids=str)
def python(request) -> Python:
    """Each CPython of this machine itself."""
    found: Python = request.param
    return found


def library_of(python: Python) -> Path:
    """The file with its C API, as a process of it has it mapped: its libpython, or the program."""
    with started(python, "print(flush=True); input()") as process:
        assert process.stdout is not None
        process.stdout.readline()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
    mapped = {line.split()[-1] for line in maps.splitlines() if "/libpython3" in line}
    return Path(*mapped) if mapped else python.path.resolve()


def is_shared(python: Python) -> bool:
    """Whether it is in a libpython of its own."""
    return library_of(python) != python.path.resolve()


def functions(path: Path) -> dict[str, tuple[int, int]]:
    """Offset in the file and length of each function in the symbol table; empty if it is stripped."""
    with path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        library = SharedLibrary(path)
        return {
            symbol.name: (library.offset(symbol["st_value"]) or 0, symbol["st_size"])
            for symbol in (table.iter_symbols() if isinstance(table, SymbolTableSection) else ())
            if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] != "SHN_UNDEF"
        }


def test_sites_are_in_the_functions_that_they_name(python):
    main = library_of(python)
    seen, named = set(), 0
    for path in [main, *extension_files(main)]:
        known = functions(path)
        for site in file_sites(path):
            seen.add(site.event)
            if known:
                start, length = known[NAMES[site.function]]
                assert start <= site.offset < start + length, site
                named += 1
    assert seen == {
        "context_copied", "context_made", "context_freed", "code_freed", "future_done",
        "queue_put", "queue_got", "deque_put", "deque_got",
    }  # fmt: skip
    if not is_shared(python) and not named:
        pytest.skip(f"optional: {main} is stripped; the live tests count its calls")
    assert named > 10


def test_an_interpreter_is_told_by_its_content(python, tmp_path):
    assert is_interpreter(library_of(python))
    assert is_interpreter(python.path) != is_shared(python)
    assert not is_interpreter(tmp_path)
    assert not is_interpreter(tmp_path / "missing")


def test_extension_modules_are_those_that_it_imports(python):
    code = (
        "import _queue, _asyncio; print(*(getattr(m, '__file__', '') for m in (_queue, _asyncio)))"
    )
    answer = subprocess.run(
        [python.path, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    found = {path.resolve() for path in extension_files(library_of(python))}
    assert {Path(name).resolve() for name in answer.stdout.split()} <= found


def test_where_a_task_begins(python):
    """The type of tasks is found by its table of methods, whether it is static or made of slots."""
    main = library_of(python)
    assert method_table(LinkedData(SharedLibrary(main)), CONTEXT) is not None
    for path in extension_files(main):
        if path.name.startswith("_asyncio."):
            data = LinkedData(SharedLibrary(path))
            table = method_table(data, TASK)
            assert table is not None
            start = init_of_type(data, table)
            assert start is not None
            known = functions(path)
            if known:
                assert start == known["_asyncio_Task___init__"][0]
            assert tasks_call_copy(data) is None  # it calls what another file defines


def test_programs_and_scripts_of_a_virtual_environment(python, tmp_path):
    """By its link, by the first line of its scripts, and by the home of an environment of copies."""
    wanted = library_of(python)
    for index, what in enumerate(("link", "script", "home")):
        folder = tmp_path / str(index) / "bin"
        folder.mkdir(parents=True)
        command = folder / "serve"
        if what == "link":
            (folder / "python3").symlink_to(python.path)
        elif what == "script":
            command.write_text(f"#!{python.path} -I\n")
        else:
            home = python.path.parent
            (folder.parent / "pyvenv.cfg").write_text(f"home = {home}\nversion = 3\n")
        assert any(path.samefile(wanted) for path in interpreter_files([], [command])), what


def test_links_count_from_the_root_of_the_target(tmp_path):
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3").write_text("")
    (tmp_path / "bin").symlink_to("/usr/bin")
    (tmp_path / "up").symlink_to("../../usr")
    (tmp_path / "round").symlink_to("round")
    program = tmp_path / "usr/bin/python3"
    assert resolve_in(tmp_path, "/bin/python3") == program
    assert resolve_in(tmp_path, "/up/bin/../bin/./python3") == program
    assert resolve_in(tmp_path, "/round/x") is None
    assert resolve_in(tmp_path, "/missing/x") is None
