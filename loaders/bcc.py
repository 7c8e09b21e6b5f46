"""BCC: found where the distribution has it, and asked to compile; its words are kept for the error.

BCC compiles C at run time against the running kernel's headers. Its Python is a package of the distribution
(Debian and Ubuntu: python3-bpfcc) and nowhere else: the project of that name on PyPI is unrelated.
"""

import atexit
import contextlib
import ctypes as c
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from scope_ebpf.errors import LoadError, UsageError
from scope_ebpf.loaders.kernel import kernel_version

# Where distributions put Python packages of their own. BCC's is pure Python over libbcc.so, so that
# a virtual environment without the system's packages can use it, too.
SYSTEM_PACKAGES = (
    Path("/usr/lib/python3/dist-packages"),
    *(
        Path(f"/usr/{lib}/python3.{sys.version_info.minor}/site-packages")
        for lib in ("lib", "lib64")
    ),
)
INSTALL = "run `sudo apt install python3-bpfcc` (other distributions: python3-bcc)"
NEWER_HEADERS = Path(__file__).resolve().parent.parent / "probes" / "bcc" / "newer_headers.h"
# From this version on the kernel's headers need it (commit c4781dc3d1cf).
MICROSOFT_EXTENSIONS = (6, 19)
# From this version on another task may run before a program at a tracepoint has ended (commit a46023d5616e):
# what programs keep per CPU would be mixed up, and BCC cannot call what keeps the CPU.
PREEMPTED = (7, 0)
# Lines of the compiler and the verifier that are shown.
COMPILER_LINES = 24
VERIFIER_LINES = 4
NOISE = ("Unable to find kernel headers", "chdir(", "sh: ", "modprobe", "processed ")


def load_bcc() -> ModuleType:
    """The module bcc.

    Raises:
        LoadError: it is not installed, or something else has its name.
    """
    known = sys.modules.get("bcc")
    if known is not None and hasattr(known, "BPF"):
        return known
    path = find_bcc()
    spec = importlib.util.spec_from_file_location(
        "bcc", path / "__init__.py", submodule_search_locations=[str(path)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module  # its parts import each other by this name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules["bcc"]
        raise LoadError(
            f"cannot use BCC in {path}: {error}; install its library: {INSTALL}"
        ) from error
    return module


def find_bcc(folders: Sequence[Path] | None = None) -> Path:
    """The folder of the package bcc: of this environment, else of the system's Python.

    Raises:
        LoadError: there is none.
    """
    own = [Path(entry) for entry in sys.path if entry]
    others = []
    for folder in dict.fromkeys([*own, *SYSTEM_PACKAGES] if folders is None else folders):
        package = folder / "bcc"
        if (package / "libbcc.py").is_file():
            return package
        if (package / "__init__.py").is_file():
            others.append(package)
    if others:
        raise LoadError(
            f"cannot use BCC: {others[0]} is another project of that name, from PyPI;"
            f" `pip uninstall bcc`, then {INSTALL}"
        )
    raise LoadError(f"cannot use BCC: its Python package is not installed; {INSTALL}")


def headers(release: str | None = None) -> Path | None:
    """Where the running kernel's headers are, as BCC looks for them; None: nowhere."""
    if given := os.environ.get("BCC_KERNEL_SOURCE"):
        return Path(given) if Path(given).is_dir() else None
    build = Path("/lib/modules") / (release or os.uname().release) / "build"
    if build.is_dir():
        return build
    archive = Path("/sys/kernel/kheaders.tar.xz")
    return archive if archive.exists() else None


def check_headers() -> None:
    """Refuse to compile without the kernel's headers.

    Raises:
        LoadError: they are not there.
    """
    if headers() is None:
        release = os.uname().release
        raise LoadError(
            f"cannot compile with BCC: the headers of Linux {release} are not installed; run"
            f" `sudo apt install linux-headers-{release}`, or set BCC_KERNEL_SOURCE to where they are"
        )


def check_kernel(release: str) -> None:
    """Refuse kernels on which the capture cannot be right under BCC.

    Raises:
        LoadError: with the reason.
    """
    if kernel_version(release) >= PREEMPTED:
        raise LoadError(
            f"cannot record with --loader bcc on Linux {release}: since 7.0 programs can be interrupted by"
            " other tasks, which BCC cannot prevent; use --loader libbpf"
        )


def header_flags(release: str | None = None) -> list[str]:
    """What the compiler has to be told for this kernel's headers."""
    if kernel_version(release) >= MICROSOFT_EXTENSIONS:
        return ["-fms-extensions"]
    return []


def compile_program(
    text: str, name: str, flags: Sequence[str] = (), usdt: Sequence[Any] = ()
) -> Any:
    """A bcc.BPF of C source: compiled, and what it names by BCC's conventions loaded and attached.

    Args:
        text: the source, whose `#line` says how lines are counted.
        name: its file's name, for errors.
        flags: of the compiler.
        usdt: bcc.USDT contexts.

    Raises:
        UsageError: it does not compile.
        LoadError: the kernel refuses it, or BCC lacks something.
    """
    module = load_bcc()
    check_headers()
    text = NEWER_HEADERS.read_text() + text
    with captured_errors() as said:
        try:
            return module.BPF(text=text, cflags=[*header_flags(), *flags], usdt_contexts=list(usdt))
        except (Exception, SystemExit) as error:
            problem = error
    raise explain(name, str(problem), said()) from problem


def load_function(program: Any, function: str, name: str = "") -> Any:
    """Load a function of a compiled program as a raw tracepoint's; BCC's handle, with its descriptor `fd`.

    Raises:
        LoadError: the kernel refuses it.
    """
    with captured_errors() as said:
        try:
            return program.load_func(function, program.RAW_TRACEPOINT)
        except (Exception, SystemExit) as error:
            problem = error
    raise explain(name or function, str(problem), said()) from problem


def attach_raw_tracepoint(descriptor: int, tracepoint: str) -> int:
    """Attach a loaded program: the descriptor of the link, or -errno."""
    with captured_errors():
        link = int(load_bcc().lib.bpf_attach_raw_tracepoint(descriptor, tracepoint.encode()))
    return link if link >= 0 else -c.get_errno()


def update_element(descriptor: int, key: Any, value: Any, flags: int = 0) -> int:
    """Set an element of a map: 0, or -errno."""
    result = load_bcc().lib.bpf_update_elem(descriptor, c.byref(key), c.byref(value), flags)
    return -c.get_errno() if result < 0 else 0


def clean_up(program: Any) -> None:
    """Detach and unload a program; may be done again."""
    with captured_errors(), contextlib.suppress(Exception):
        program.cleanup()
    atexit.unregister(program.cleanup)


def explain(name: str, problem: str, said: str) -> UsageError | LoadError:
    """The error for what BCC raised and what was written to stderr meanwhile."""
    lines = [line.rstrip() for line in said.splitlines() if line.strip()]
    if any("Unable to find kernel headers" in line for line in lines):
        release = os.uname().release
        return LoadError(
            f"cannot compile {name}: BCC finds no headers of Linux {release}; run"
            f" `sudo apt install linux-headers-{release}`"
        )
    count = sum("error: " in line for line in lines)
    if count and "compile" in problem:
        errors = "an error" if count == 1 else f"{count} errors"
        wrong = UsageError(
            f"cannot compile {name}: the compiler found {errors}; mend what it says:"
        )
        first = next(at for at, line in enumerate(lines) if "error: " in line)
        wrong.said = _head(lines[first:], COMPILER_LINES)
        return wrong
    clause = " ".join(problem.replace("b'", "'").split()) or "BCC gave no reason"
    error = LoadError(f"cannot use {name}: {clause[:1].lower()}{clause[1:]}")
    error.said = tuple(line for line in lines if not line.startswith(NOISE))[-VERIFIER_LINES:]
    return error


def _head(lines: Sequence[str], most: int) -> tuple[str, ...]:
    """The first lines, and how many more there are."""
    more = [f"and {len(lines) - most} more lines"] if len(lines) > most else []
    return (*lines[:most], *more)


@contextlib.contextmanager
def captured_errors() -> Iterator[Any]:
    """Keep what C code writes to stderr: yields a function that returns it, also afterwards."""
    text: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as stream:

        def said() -> str:
            return "".join(text)

        os.dup2(stream.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            stream.seek(0)
            text.append(stream.read().decode(errors="replace"))
