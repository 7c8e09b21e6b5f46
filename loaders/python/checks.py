"""What can be recorded of an interpreter, told from its files and, of a process, by looking into it."""

from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from scope_ebpf.cpython.offsets import UnknownLayoutError, layout_of
from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import DAMAGE, SharedLibrary
from scope_ebpf.loaders.elf_data import LinkedData
from scope_ebpf.loaders.python.binaries import PythonBinary, read_binary
from scope_ebpf.loaders.python.files import extension_files
from scope_ebpf.loaders.python.interpreters import (
    Interpreter,
    NotReady,
    Unsupported,
    find_interpreter,
)
from scope_ebpf.loaders.python.sites import PythonSite, file_sites, tasks_call_copy
from scope_ebpf.loaders.tls import root_of

# What is recorded by probes in CPython's files, with the events that it takes (loaders/python/sites.py).
BY_PROBES = {
    "contexts of tasks": ("context_copied", "context_made"),
    "work items of thread pools": ("queue_put", "queue_got"),
}
# Without this one what is recorded is still right, if no code is thrown away while the process runs.
CODE_FREED = "code_freed"
# CPython's own static probes (Include/pydtrace.d), by what the user calls them; and how they are built in.
USDT = {
    "audit": "audit",
    "function__return": "function__return",
    "gc__start": "gc",
    "import__find__load__start": "imports",
}


@dataclass(frozen=True)
class InterpreterReport:
    """What can be recorded of one interpreter.

    Attributes:
        name: its version, or the process that it is in.
        path: of its file, as its processes see it.
        recorded: what can be recorded.
        missing: clauses that each name what cannot, and why.
        usdt: static probes that it has.
        slow: probes of which the kernel has to single-step the instruction.
    """

    name: str
    path: str
    recorded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    usdt: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


def report_file(path: Path) -> InterpreterReport:
    """What can be recorded of processes with an interpreter's file.

    Raises:
        FormatError: it cannot be read, or there is no CPython in it.
    """
    binary = read_binary(path)
    if not isinstance(binary, PythonBinary):
        raise FormatError(f"cannot use {path}: there is no CPython in it")
    version = binary.version
    name = "Python" if version is None else f"Python {'.'.join(map(str, version))}"
    refusal = binary.refusal
    if not refusal and version is not None:
        try:
            layout_of(version, binary.runtime_data)
        except UnknownLayoutError as error:
            refusal = str(error)
    if refusal:
        return InterpreterReport(name, str(path), missing=(f"nothing of it: {refusal}",))
    return _with_probes(name, str(path), path)


def report_process(tgid: int) -> InterpreterReport | Unsupported | NotReady | None:
    """What can be recorded of a process; None: it is gone, or there is no CPython in it.

    Raises:
        NotPermittedError: this process may not look into it.
        FormatError: its file cannot be read.
    """
    found = find_interpreter(tgid)
    if not isinstance(found, Interpreter):
        return found
    version = ".".join(map(str, found.version))
    # where it is from, so that its extension modules are found beside it
    path = root_of(tgid) / found.path.lstrip("/")
    if not path.is_file():  # deleted: an upgrade; new processes will have another one
        path = found.file
    return _with_probes(f"process {tgid}: Python {version}", found.path, path)


def _with_probes(name: str, shown: str, path: Path) -> InterpreterReport:
    """The report of an interpreter whose layout is known."""
    files = [path, *extension_files(path)]
    sites = [site for file in files for site in file_sites(file)]
    events = {site.event for site in sites}
    recorded, missing = ["stacks", "waits for the GIL"], []
    for what, needed in BY_PROBES.items():
        absent = [event for event in needed if event not in events]
        if absent:
            missing.append(f"{what}: no place for a probe on {' and '.join(absent)} was found")
        else:
            recorded.append(what)
    if CODE_FREED not in events:
        missing.append("code that is thrown away: no place for a probe on code_freed was found")
    if tasks_call_copy(LinkedData(SharedLibrary(path))) is False:
        missing.append("contexts of tasks of the built-in _asyncio: Task.__init__ has its own code")
    probes = usdt_names(path)
    present = tuple(shown for probe, shown in USDT.items() if probe in probes)
    if not present:
        missing.append("static probes: it was built without --with-dtrace")
    return InterpreterReport(name, shown, tuple(recorded), tuple(missing), present, _slow(sites))


def _slow(sites: list[PythonSite]) -> tuple[str, ...]:
    """Functions of what is recorded by default whose probes are dear."""
    default = {CODE_FREED, *(event for events in BY_PROBES.values() for event in events)}
    return tuple(
        site.function for site in sites if site.emulated is False and site.event in default
    )


def usdt_names(path: Path, provider: str = "python") -> set[str]:
    """Names of the static probes of a provider that a file has, from its .note.stapsdt.

    Each note is an address, a base and a semaphore, of 8 bytes each, and three zero-ended strings: provider,
    name, arguments (sourceware.org/systemtap/wiki/UserSpaceProbeImplementation).

    Raises:
        FormatError: the file cannot be read.
    """
    found = set()
    try:
        with path.open("rb") as opened:
            section = ELFFile(opened).get_section_by_name(".note.stapsdt")
            data = b"" if section is None else bytes(section.data())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    except DAMAGE as error:
        raise FormatError(f"cannot read {path}: it is not a whole ELF file") from error
    at = 0
    while at + 12 <= len(data):
        name_bytes = int.from_bytes(data[at : at + 4], "little")
        content_bytes = int.from_bytes(data[at + 4 : at + 8], "little")
        start = at + 12 + -(-name_bytes // 4) * 4
        texts = data[start + 24 : start + content_bytes].split(b"\0")
        if len(texts) > 1 and texts[0] == provider.encode():
            found.add(texts[1].decode(errors="replace"))
        at = start + -(-content_bytes // 4) * 4
    return found
