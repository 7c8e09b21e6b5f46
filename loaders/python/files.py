"""Which files of CPython processes use or may start: programs, libpython, and extension modules with probes.

A uprobe belongs to a file, so all that has to be known when a recording begins is which files may be used
(see loaders/tls.py). They are sought as the targets see them (/proc/PID/root),

- among what the targets have mapped, whatever its name is: a server may contain CPython,
- as python3* in their PATH, beside their program and their Python's virtual environment, beside the
  commands that are about to be executed, and in the first line of those that are scripts,
- for a program without an interpreter of its own, where the dynamic linker finds its libpython.

An interpreter that is in none of these places, as one that is installed later, is missed.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from scope_ebpf.errors import FormatError
from scope_ebpf.loaders.elf import SharedLibrary
from scope_ebpf.loaders.targets import PROC, command_line, environment
from scope_ebpf.loaders.tls import mapped_by, root_of

PROGRAM = re.compile(r"python(3(\.\d+)?t?)?")
LIBPYTHON = re.compile(r"libpython3\.\d+[^/]*\.so[^/]*")
DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
# Modules that have places for probes (loaders/python/sites.py), where they are not built in.
EXTENSIONS = ("_queue", "_asyncio", "_contextvars", "_collections")
LINKS_AT_MOST = 40  # as the kernel: include/linux/namei.h, MAXSYMLINKS


def interpreter_files(tgids: Iterable[int], commands: Iterable[Path] = ()) -> list[Path]:
    """Files with a CPython in them that these processes have mapped or may start, each once.

    Args:
        tgids: processes; those that are gone are left out.
        commands: programs that are about to be executed here.
    """
    mapped = {tgid: _mapped(tgid) for tgid in sorted(set(tgids))}
    return _interpreters(mapped, commands)


def interpreters_in_path() -> list[Path]:
    """Files with the CPythons that commands in our own PATH are, each once."""
    search = os.environ.get("PATH", DEFAULT_PATH)
    return _once(path for path in _programs(Path("/"), [], search) if is_interpreter(path))


def probed_files(tgids: Iterable[int], commands: Iterable[Path] = ()) -> list[Path]:
    """interpreter_files() and the extension modules with places for probes, each once."""
    mapped = {tgid: _mapped(tgid) for tgid in sorted(set(tgids))}
    interpreters = _interpreters(mapped, commands)
    found = [*interpreters]
    for path in dict.fromkeys(path for paths in mapped.values() for path in paths):
        if path.name.partition(".")[0] in EXTENSIONS:
            found.append(path)
    for path in interpreters:
        found += extension_files(path)
    return _once(found)


def extension_files(interpreter: Path) -> list[Path]:
    """Files of EXTENSIONS that an interpreter (program or libpython) would import, if it has such files.

    CPython finds its modules from where its program is: PREFIX/lib/python3.Y/lib-dynload, for PREFIX/bin
    and PREFIX/lib, or below, as Debian has its libpython (Modules/getpath.py).
    """
    version = re.search(r"3\.\d+", interpreter.name)
    library = f"python{version[0] if version else '3.*'}"
    found: list[Path] = []
    for folder in list(interpreter.parents)[:4]:
        for pattern in (f"lib*/{library}", library):
            for name in EXTENSIONS:
                found += folder.glob(f"{pattern}/lib-dynload/{name}.*so")
        if found:
            break
    return _once(found)


def is_interpreter(path: Path) -> bool:
    """Whether a file defines CPython's C API: a program, a libpython, or a server that contains it."""
    try:
        status = path.stat()
        if not path.is_file():
            return False
    except OSError:
        return False
    return _look(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))[0]


def resolve_in(root: Path, path: Path | str) -> Path | None:
    """Where a path leads for a process with another root directory; None: nowhere.

    Absolute links count from that root, so Path.resolve() would leave it.

    >>> resolve_in(Path("/"), "/proc/1/../self/../1") == Path("/proc/1")
    True
    """
    done: list[str] = []
    rest = str(path).strip("/").split("/")[::-1]
    links = 0
    while rest:
        part = rest.pop()
        if part == "..":
            done = done[:-1]
        elif part not in {"", "."}:
            done.append(part)
            try:
                target = os.readlink(root.joinpath(*done))
            except FileNotFoundError:
                return None
            except OSError:  # no link
                continue
            links += 1
            if links > LINKS_AT_MOST:
                return None
            done = [] if target.startswith("/") else done[:-1]
            rest += target.strip("/").split("/")[::-1]
    return root.joinpath(*done)


# ---- where they may be ----


def _interpreters(mapped: dict[int, list[Path]], commands: Iterable[Path]) -> list[Path]:
    """interpreter_files() for processes of which it is known what they have mapped."""
    # each path once: thousands of processes may run one program
    return _once(filter(is_interpreter, dict.fromkeys(_candidates(mapped, commands))))


def _candidates(mapped: dict[int, list[Path]], commands: Iterable[Path]) -> Iterator[Path]:
    for command in commands:
        search = os.environ.get("PATH", DEFAULT_PATH)
        yield from _programs(Path("/"), _of_command(Path("/"), command), search)
    seen: set[tuple[Path, str, tuple[Path, ...]]] = set()
    for tgid, paths in mapped.items():
        yield from paths
        search = DEFAULT_PATH
        for setting in environment(tgid).split(b"\0"):
            name, _, value = setting.partition(b"=")
            if name == b"PATH":
                search = os.fsdecode(value)
            elif name == b"VIRTUAL_ENV":
                search = f"{os.fsdecode(value)}/bin:{search}"
        root = root_of(tgid)
        key = (root, search, tuple(_arguments(tgid)))
        if key not in seen:  # workers of one service are alike
            seen.add(key)
            places = [place for path in key[2] for place in _of_command(root, path)]
            yield from _programs(root, places, search)


def _mapped(tgid: int) -> list[Path]:
    """Files that a process has mapped as code and that may be or contain CPython, its program first."""
    try:
        program = os.readlink(f"{PROC}/{tgid}/exe")
    except OSError:  # it is gone, or a thread of the kernel
        return []
    found = [
        name
        for name in mapped_by(tgid)
        if name == program
        or LIBPYTHON.fullmatch(last := name.rpartition("/")[2])
        or last.partition(".")[0] in EXTENSIONS
    ]
    root = root_of(tgid)
    return [
        root / name.lstrip("/") for name in sorted(found, key=lambda name: (name != program, name))
    ]


def _arguments(tgid: int) -> Iterator[Path]:
    """Programs and scripts that a process was started as, by its first arguments."""
    for argument in command_line(tgid).split(b"\0")[:2]:
        name = os.fsdecode(argument)
        if "/" in name and not name.startswith("-"):
            with contextlib.suppress(OSError):
                start = "/" if name[0] == "/" else os.readlink(f"{PROC}/{tgid}/cwd")
                yield Path(start) / name


def _of_command(root: Path, command: Path) -> Iterator[Path]:
    """A command, and the program that its first line names if it is a script."""
    command = Path(os.path.normpath(command))
    yield command
    found = resolve_in(root, command)
    with contextlib.suppress(OSError):
        if found is not None and found.is_file():
            with found.open("rb") as file:
                words = file.readline(256).split()
            if words and words[0].startswith(b"#!/"):
                yield Path(os.fsdecode(words[0][2:]))


def _programs(root: Path, commands: Iterable[Path], search: str) -> Iterator[Path]:
    """Interpreters that commands are or stand beside, that their environment is made of, or in a PATH."""
    folders: dict[Path, None] = {}
    for command in commands:
        yield from _with_library(root, command)
        folders[command.parent] = None
        home = _home(root, command.parent.parent / "pyvenv.cfg")
        if home is not None:
            folders[home] = None
    folders.update(dict.fromkeys(Path(folder) for folder in search.split(":") if folder))
    for folder in folders:
        found = resolve_in(root, folder)
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = os.listdir(found) if found is not None else []
        for name in sorted(filter(PROGRAM.fullmatch, names)):
            yield from _with_library(root, folder / name)


def _home(root: Path, settings: Path) -> Path | None:
    """The folder of the Python that a virtual environment was made with: `home` in its pyvenv.cfg."""
    found = resolve_in(root, settings)
    with contextlib.suppress(OSError):
        for line in found.read_text(errors="replace").splitlines() if found else ():
            key, _, value = line.partition("=")
            if key.strip().lower() == "home":
                return Path(value.strip())
    return None


def _with_library(root: Path, program: Path) -> Iterator[Path]:
    """A program, and the libpython that the dynamic linker would load for it."""
    found = resolve_in(root, program)
    if found is None or not found.is_file():
        return
    yield found
    status = found.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    _, needed, search_path = _look(found, identity)
    inside = Path("/") / found.relative_to(root)
    for name in filter(LIBPYTHON.fullmatch, needed):
        folders = [folder.replace("$ORIGIN", str(inside.parent)) for folder in search_path]
        places = [*(f"{folder}/{name}" for folder in folders), f"{inside.parent.parent}/lib/{name}"]
        for place in [*places, *_in_linker_cache(root, name)]:
            library = resolve_in(root, os.path.normpath(place))
            if library is not None and library.is_file():
                yield library
                break


def _in_linker_cache(root: Path, name: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for match in re.finditer(
            rb"/[^\0]*/" + re.escape(name.encode()) + rb"(?=\0)",
            (root / "etc/ld.so.cache").read_bytes(),
        ):
            yield os.fsdecode(match[0])


@lru_cache(maxsize=256)
def _look(path: Path, identity: tuple[int, int, int, int]) -> tuple[bool, list[str], list[str]]:
    """Whether a file defines CPython's C API, which libraries it needs, and where it has them sought."""
    try:
        library = SharedLibrary(path)
    except FormatError:
        return False, [], []
    defined = library.variable("PyCode_Type") is not None
    return defined, library.needed, library.search_path


def _once(paths: Iterable[Path]) -> list[Path]:
    """Each file once, by device and inode, whatever names it has."""
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = path.stat()
            found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())
