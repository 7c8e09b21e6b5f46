"""TLS libraries: which files of OpenSSL's libssl may be used, and where in them uprobes go.

A uprobe belongs to a file: it fires in every process that has it mapped, also in those that map it later. So
all that has to be known when a recording begins is which files may be used. They are sought

- among what the targets have mapped,
- in the packages beside their Python (psycopg2-binary brings its own libssl, and maps it when it is
  imported),
- in the cache of the dynamic linker, where Python's own ssl module and most programs find theirs,

all as the targets see them (/proc/PID/root). Looking again later would need the privileges that a recorder
gives up once its probes are attached. So a library that is in none of these places, as that of a
container or virtual environment that comes to life later, is missed; and so is OpenSSL inside of a program.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.targets import PROC, command_line, environment
from scope_ebpf.loaders.uprobe_sites import choose_site, direct_callees

PROGRAMS = (
    "on_tls_read",
    "on_tls_write",
    "on_tls_read_ex",
    "on_tls_write_ex",
    "on_tls_write_flags",
    "on_tls_return",
)
LIBRARY = re.compile(r"libssl[^/]*\.so[^/]*")
# The paths of lines of /proc/PID/maps with the permission to execute.
MAPPED_CODE = re.compile(r"^[^ ]+ ..x. [^ ]+ [^ ]+ [^ ]+ +(/.*)$", re.MULTILINE)
ROOT = Path("/")
IN_LINKER_CACHE = re.compile(rb"/[^\0]+/libssl\.so[^\0/]*")
# What a wrapper does before it calls: less than this many bytes of x86-64 code.
WRAPPER_BYTES = 64


@dataclass(frozen=True)
class Site:
    """A place for a uprobe.

    Attributes:
        program: of probes/tls.h.
        offset: in the file.
        at_return: when the function that begins there returns.
    """

    program: str
    offset: int
    at_return: bool = False


# ---- places in a library ----


def sites(library: SharedLibrary) -> list[Site]:
    """Where uprobes go in a libssl; none if it is not OpenSSL's.

    SSL_read and SSL_read_ex are wrappers of one function (ssl_read_internal), and so it is for writing.
    Their first instruction is `sub $n, %rsp`, which the kernel must single-step, for microseconds; that
    of the inner function is a push, which it emulates. The inner one is not exported: it is what both
    wrappers call first. Where they do not agree, and on other machines than x86-64, the wrappers
    themselves are taken.
    """
    found: list[Site] = []
    # from 3.3 on there is SSL_write_ex2, which SSL_write_ex jumps to, and the inner function has flags
    flags = library.function("SSL_write_ex2") is not None
    for plain, wrapper, program in (
        ("SSL_read", "SSL_read_ex", "on_tls_read"),
        ("SSL_write", "SSL_write_ex2" if flags else "SSL_write_ex", "on_tls_write"),
    ):
        inner = common_callee(library, plain, wrapper)
        if inner is not None:
            with_length = (
                f"{program}_flags" if program == "on_tls_write" and flags else f"{program}_ex"
            )
            found += [Site(with_length, inner), Site("on_tls_return", inner, True)]
            continue
        for name, entry in ((plain, program), (f"{plain}_ex", f"{program}_ex")):
            offset = library.function(name)
            if offset is not None:
                found += [Site(entry, offset), Site("on_tls_return", offset, True)]
    return found


def common_callee(library: SharedLibrary, first: str, second: str) -> int | None:
    """The function that two exported ones both call first: the place for its probes, or None."""
    if library.machine != "EM_X86_64":
        return None
    callees = {first_callee(library, name) for name in (first, second)}
    return callees.pop() if len(callees) == 1 else None


def first_callee(library: SharedLibrary, name: str) -> int | None:
    """The first function that begins with a push and that an exported one calls directly.

    Two functions that call the same one leave no doubt that it is the inner one.
    """
    start = library.function(name)
    if start is None:
        return None
    length = min(library.extent(start) or WRAPPER_BYTES, WRAPPER_BYTES)
    for target in direct_callees(library, start, length, jumps=False):
        place = choose_site(library, target, at_return=True)
        if place.emulated and place.instruction.startswith("push"):
            return place.offset
    return None


# ---- libraries ----


def find_libraries(tgids: Iterable[int], commands: Iterable[Path] = ()) -> list[Path]:
    """Files of libssl that these processes have mapped or may map, each once.

    Args:
        tgids: processes; those that are gone are left out.
        commands: programs that are about to be executed here.
    """
    found: dict[tuple[int, int], Path] = {}
    searched: set[Path] = set()
    for path in _candidates(sorted(set(tgids)), commands, searched):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def _candidates(
    tgids: Iterable[int], commands: Iterable[Path], searched: set[Path]
) -> Iterator[Path]:
    yield from _in_linker_cache(ROOT)
    places = [prefix for command in commands for prefix in _prefixes(ROOT, command)]
    yield from _in_prefixes(places, searched)
    for tgid in tgids:
        root, mapped = root_of(tgid), mapped_by(tgid)
        if not mapped:  # it is gone
            continue
        yield from (
            root / name.lstrip("/") for name in mapped if LIBRARY.fullmatch(name.rpartition("/")[2])
        )
        if root != ROOT and root not in searched:
            searched.add(root)
            yield from _in_linker_cache(root)
        yield from _in_packages(_package_folders(root, mapped), searched)
        yield from _in_prefixes(_python_prefixes(root, tgid), searched)


def mapped_files(maps: str) -> set[str]:
    """The files that a /proc/PID/maps shows to be mapped as code.

    >>> line = "7f00-7f01 r-xp 00001000 08:01 77 /usr/lib/libssl.so.3"
    >>> mapped_files(line)
    {'/usr/lib/libssl.so.3'}
    """
    return set(MAPPED_CODE.findall(maps))


def mapped_by(tgid: int) -> set[str]:
    """mapped_files() of a process; empty if it is gone, or a thread of the kernel."""
    # thousands of processes are looked at while a recording begins: this takes half of what pathlib does
    try:
        with open(f"{PROC}/{tgid}/maps", "rb") as file:
            return mapped_files(os.fsdecode(file.read()))
    except OSError:
        return set()


def root_of(tgid: int) -> Path:
    """Where a process's root directory is for us."""
    folder = f"{PROC}/{tgid}"
    try:
        if os.readlink(f"{folder}/root") == "/":
            namespace = os.readlink(f"{folder}/ns/mnt")
            if namespace == _own_namespace():
                return ROOT
            # a service that systemd gives another view of the files than the host's
            if namespace == os.readlink("/proc/1/ns/mnt"):
                return PROC / "1/root"
    except OSError:
        pass
    return PROC / str(tgid) / "root"


@lru_cache(maxsize=1)
def _own_namespace() -> str:
    return os.readlink("/proc/self/ns/mnt")


def _in_linker_cache(root: Path) -> Iterator[Path]:
    """Those that the dynamic linker would find: the cache holds their paths as strings."""
    with contextlib.suppress(OSError):
        for match in IN_LINKER_CACHE.finditer((root / "etc/ld.so.cache").read_bytes()):
            yield root / os.fsdecode(match[0]).lstrip("/")


def _package_folders(root: Path, mapped: Iterable[str]) -> set[Path]:
    """Folders of Python packages from which something is mapped."""
    folders = set()
    for name in mapped:
        for folder in ("/site-packages/", "/dist-packages/"):
            before, found, _ = name.partition(folder)
            if found:
                folders.add(root / (before + folder).strip("/"))
    return folders


def _python_prefixes(root: Path, tgid: int) -> Iterator[Path]:
    """Where a process's Python may be installed: by its first arguments and its environment."""
    folder = f"{PROC}/{tgid}"
    with contextlib.suppress(OSError):
        for argument in command_line(tgid).split(b"\0")[:2]:
            name = os.fsdecode(argument)
            if "/" in name:
                start = ROOT if name[0] == "/" else Path(os.readlink(f"{folder}/cwd"))
                yield from _prefixes(root, start / name)
        for setting in environment(tgid).split(b"\0"):
            if setting.startswith(b"VIRTUAL_ENV="):
                yield root / os.fsdecode(setting.partition(b"=")[2]).lstrip("/")


def _prefixes(root: Path, program: Path) -> Iterator[Path]:
    """The prefix of what lies in PREFIX/bin."""
    program = Path(os.path.normpath(program))
    if program.parent.name == "bin" and program.parent.parent != Path("/usr"):
        yield root / str(program.parent.parent).lstrip("/")


def _in_prefixes(prefixes: Iterable[Path], searched: set[Path]) -> Iterator[Path]:
    for prefix in prefixes:
        if prefix not in searched:
            searched.add(prefix)
            yield from prefix.glob("lib/libssl*.so*")
            yield from _in_packages(set(prefix.glob("lib*/python3*/site-packages")), searched)


def _in_packages(folders: set[Path], searched: set[Path]) -> Iterator[Path]:
    """Libraries that wheels bring with them: auditwheel puts them into PACKAGE.libs."""
    for folder in folders - searched:
        searched.add(folder)
        yield from folder.glob("*.libs/libssl*.so*")


def library_sites(path: Path) -> list[Site]:
    """sites() of a file; none if it is no library that can be read."""
    try:
        return sites(SharedLibrary(path))
    except FormatError:
        return []
