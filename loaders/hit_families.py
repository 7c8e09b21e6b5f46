"""Families of USDT probes: what PostgreSQL and CPython tell of themselves where they were built to do so.

Names and arguments: PostgreSQL's documentation, "Dynamic Tracing" (src/backend/utils/probes.d), and
CPython's "Instrumenting CPython with DTrace and SystemTap" (Include/pydtrace.d).
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scope_ebpf.errors import FormatError, ScopeError
from scope_ebpf.loaders.hits import Pair, Places
from scope_ebpf.loaders.probed_files import ProbedFile
from scope_ebpf.loaders.targets import PROC
from scope_ebpf.loaders.tls import mapped_files
from scope_ebpf.loaders.usdt import may_have_probes, read_sites
from scope_ebpf.probe_specs import TYPES, ArgumentType

SQL, NAME, UINT, INT, BOOL, LONG = (
    TYPES[name] for name in ("sql", "name", "uint", "int", "bool", "long")
)
INTERPRETER = re.compile(r"python\d[\d.]*|libpython\d[\d.]*[a-z]*\.so[\d.]*")
# What names the lock that is waited for: LOCKTAG's fields, then the mode that is wanted.
LOCK = (UINT, UINT, UINT, UINT, UINT, INT)
SCRIPT_LINE_BYTES = 256  # as much as the kernel looks at


@dataclass(frozen=True)
class HitFamily:
    """Probes that belong together.

    Attributes:
        provider: of all of them.
        program: what the files that have them are, in words.
        pairs: begins and ends, one row for both.
        singles: others, with the types of their arguments.
    """

    provider: str
    program: str
    pairs: tuple[Pair, ...]
    singles: dict[str, tuple[ArgumentType, ...]]


HIT_FAMILIES = {
    "postgres": HitFamily(
        "postgresql",
        "PostgreSQL",
        (
            # a statement of the simple protocol, such as psql's and psycopg2's
            Pair("query", "query__start", "query__done", (SQL,), nests=True),
            Pair("query__plan", "query__plan__start", "query__plan__done", nests=True),
            # also that of the extended protocol, such as psycopg's and asyncpg's
            Pair("query__execute", "query__execute__start", "query__execute__done", nests=True),
            # a wait that ends in an error has a begin only
            Pair("lock__wait", "lock__wait__start", "lock__wait__done", LOCK, begin_types=LOCK),
            Pair("lwlock__wait", "lwlock__wait__start", "lwlock__wait__done", (NAME, INT)),
            Pair("checkpoint", "checkpoint__start", "checkpoint__done", carried=(INT,)),
            Pair(
                "wal__buffer__write__dirty",
                "wal__buffer__write__dirty__start",
                "wal__buffer__write__dirty__done",
            ),
        ),
        {
            "transaction__start": (UINT,),
            "transaction__commit": (UINT,),
            "transaction__abort": (UINT,),
            # a statement began, by any protocol; null: it ended
            "statement__status": (SQL,),
            "deadlock__found": (),
        },
    ),
    "runtime": HitFamily(
        "python",
        "CPython",
        (
            # the generation that was asked for, and how many objects were collected
            Pair("gc", "gc__start", "gc__done", (LONG,), carried=(INT,)),
            # the module's name, and whether it was found
            Pair(
                "import", "import__find__load__start", "import__find__load__done", (NAME, BOOL),
                nests=True,
            ),
        ),
        {"audit": (NAME,)},
    ),
}  # fmt: skip


def add_family(
    places: Places, name: str, tgids: Iterable[int], commands: Iterable[Path]
) -> list[str]:
    """Find a family's places in the programs of these processes, and of commands to come.

    Returns:
        Sentences about what has no such probes.
    """
    family = HIT_FAMILIES[name]
    found, notes = 0, []
    for path in program_files(tgids, commands, interpreters=name == "runtime"):
        before = len(places.places)
        try:
            sites = read_sites(ProbedFile(path)) if may_have_probes(path) else []
            for pair in family.pairs:
                places.add_pair(pair, sites, path, family.provider)
            for single, types in family.singles.items():
                places.add_single(single, types, sites, path, family.provider)
        except FormatError:
            continue  # no ELF file: nothing to be found in it
        except ScopeError as error:
            notes.append(f"{name}: the probes of {path} are not used: {error}")
            continue
        found += len(places.places) > before
        if len(places.places) == before and name == "runtime":
            notes.append(
                f"runtime: {path} was built without probes (--with-dtrace), so its garbage collections,"
                " imports and audit events are not recorded"
            )
    if not found and not notes:
        notes.append(
            f"{name}: none of the recorded processes ran a {family.program} that has probes when the"
            " recording began"
        )
    return notes


def program_files(
    tgids: Iterable[int], commands: Iterable[Path], *, interpreters: bool
) -> list[Path]:
    """The programs of these processes and commands, each file once.

    With `interpreters` only CPython's: the shared library with the interpreter where there is one.
    """
    found: dict[tuple[int, int], Path] = {}
    for path in [*_of_processes(tgids, interpreters), *_of_commands(commands, interpreters)]:
        with contextlib.suppress(OSError):
            status = path.stat()
            found.setdefault((status.st_dev, status.st_ino), path)
    return list(found.values())


def _of_processes(tgids: Iterable[int], interpreters: bool) -> Iterator[Path]:
    for tgid in sorted(set(tgids)):
        try:
            program = seen_by(tgid, os.readlink(PROC / str(tgid) / "exe"))
            maps = (PROC / str(tgid) / "maps").read_text(errors="surrogateescape")
        except OSError:  # it is gone, or a thread of the kernel
            continue
        if not interpreters:
            yield program
            continue
        libraries = [
            seen_by(tgid, name) for name in mapped_files(maps) if _is_interpreter(Path(name), ".so")
        ]
        yield from libraries or ([program] if _is_interpreter(program) else [])


def _of_commands(commands: Iterable[Path], interpreters: bool) -> Iterator[Path]:
    """Programs that are about to be executed: a script is executed by its interpreter."""
    for command in commands:
        with contextlib.suppress(OSError):
            program = command.resolve(strict=True)
            with program.open("rb") as stream:
                line = stream.readline(SCRIPT_LINE_BYTES)
            if line.startswith(b"#!"):
                words = os.fsdecode(line[2:]).split()
                program = Path(words[0]).resolve(strict=True) if words else program
            if not interpreters:
                yield program
            elif _is_interpreter(program):
                beside = program.parent.parent / "lib"
                yield from [*beside.glob(f"lib{program.name}*.so.1.0")] or [program]


def _is_interpreter(path: Path, part: str = "") -> bool:
    return bool(INTERPRETER.fullmatch(path.name)) and part in path.name


def seen_by(tgid: int, name: str) -> Path:
    """Where a file is for us that a process sees under that name."""
    theirs = PROC / str(tgid) / "root" / name.lstrip("/")
    with contextlib.suppress(OSError):
        if Path(name).samefile(theirs):
            return Path(name)
    return theirs
