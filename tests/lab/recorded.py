"""How the tests of the lab record the workload: by each loader and transport that this kernel must offer.

A way that the command line does not know yet is left out; one that it knows and that must work on this kernel
has to work, and a refusal there is a failure.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.live.recording import Session, Target, recorder

CHECKOUT = Path(__file__).resolve().parents[2]
WORKLOAD = Path(__file__).with_name("workload.py")
COMMAND = (sys.executable, "-m", "scope_ebpf")
ENVIRONMENT = {
    "PYTHONPATH": str(CHECKOUT),
    "PYTHONDONTWRITEBYTECODE": "1",
    "SCOPE_EBPF_TRACEBACK": "1",
}
# A compile of BCC on an emulated CPU that is shared takes that long.
ATTACH_SECONDS = 300.0
# What both loaders record.
CORE = ("processes", "syscalls", "messages", "offcpu")
KERNEL = tuple(map(int, re.findall(r"\d+", platform.release())[:2]))
# Atomic fetch-and-add in BPF is from 5.12 (commit 5ca419f2864a); storage of tasks for tracing programs, which
# that object uses, from 5.13 (commit a10787e6d58c).
FIRST_WITH_RINGS = (5, 13)
# There programs are interrupted by other tasks, which BCC cannot prevent: it is refused.
FIRST_WITHOUT_BCC = (7, 0)


@dataclass(frozen=True)
class Way:
    """A loader and a transport; None: the command line has no such option."""

    loader: str | None
    transport: str | None

    def __str__(self) -> str:
        return "-".join(filter(None, (self.loader, self.transport))) or "default"

    @property
    def options(self) -> tuple[str, ...]:
        """The same for the command line."""
        chosen = (("--loader", self.loader), ("--transport", self.transport))
        return tuple(part for option, value in chosen if value for part in (option, value))

    @property
    def all_families(self) -> bool:
        """Whether it records what is inside of Python, too."""
        return self.loader != "bcc"


@functools.cache
def known_options() -> frozenset[str]:
    """The options of `scope-ebpf attach`."""
    command = [*COMMAND, "attach", "--help"]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return frozenset(re.findall(r"--[a-z-]+", done.stdout))


def has_headers() -> bool:
    """Whether BCC can compile here: the headers of the running kernel, or those in the kernel itself."""
    build = Path("/lib/modules", platform.release(), "build")
    return build.is_dir() or Path("/sys/kernel/kheaders.tar.xz").exists()


def has_bcc() -> bool:
    """Whether the real BCC is installed: the package of that name on PyPI is another one."""
    code = "import bcc; bcc.BPF"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def ways() -> list[Way]:
    """All ways that must work here."""
    options = known_options()
    transports: list[str | None] = [None]
    if "--transport" in options:
        transports = [
            *(["rings"] if KERNEL >= FIRST_WITH_RINGS else []),
            "perf",
        ]
    if "--loader" not in options:
        return [Way(None, transport) for transport in transports]
    found = [Way("libbpf", transport) for transport in transports]
    if KERNEL < FIRST_WITHOUT_BCC and has_headers() and has_bcc():
        # a compile of BCC takes long in an emulated guest: one transport, the loader's own choice
        found.append(Way("bcc", None))
    return found


@contextmanager
def recording(
    folder: Path, target: Target, way: Way, *options: object, families: Sequence[str] = ()
) -> Iterator[Session]:
    """Run `scope-ebpf attach` on a target by this way; it ends with the target."""
    path = folder / "test.scope"
    if not families and not way.all_families:
        families = CORE
    chosen = ["--families", ",".join(families)] if families else []
    arguments = ["attach", "--pid", target.pid, "-o", path, *way.options, *chosen, *options]
    with recorder(
        path, *COMMAND, *arguments, environment=ENVIRONMENT, attach_seconds=ATTACH_SECONDS
    ) as session:
        session.target = target.pid
        yield session


def workload(folder: Path, *parts: str) -> Target:
    """The workload at its gate."""
    return Target(sys.executable, WORKLOAD, folder, *parts)


def record_workload(folder: Path, way: Way, *parts: str, families: Sequence[str] = ()) -> Session:
    """Record one run of the workload; `note` is what it told."""
    with (
        workload(folder, *parts) as target,
        recording(folder, target, way, families=families) as session,
    ):
        session.note = target.work()
    assert session.code == 0, "\n".join(session.talk)
    return session
