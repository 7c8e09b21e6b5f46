"""Targets: processes that the user names, and what /proc tells of them."""

import contextlib
import os
import select
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from scope_ebpf.errors import FormatError, TargetError

PROC = Path("/proc")
# The inode of the initial pid namespace, include/linux/proc_ns.h: PROC_PID_INIT_INO.
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
PF_KTHREAD = 0x00200000


@dataclass(frozen=True)
class Target:
    """A process as /proc shows it."""

    tgid: int
    comm: str
    arguments: tuple[str, ...]
    # when it began, in clock ticks: tells it from a later process with the same id; None: not known
    started_ticks: int | None = None


def parse_stat(text: str) -> tuple[str, list[str]]:
    """The comm of a /proc/PID/stat line, and its fields from the state on (field 3 in proc(5)).

    Raises:
        FormatError: it is no such line.

    >>> parse_stat("7 (a) b) S 1 7 7 0")
    ('a) b', ['S', '1', '7', '7', '0'])
    """
    start, end = text.find("("), text.rfind(")")
    rest = text[end + 1 :].split()
    if start < 1 or end < start or not rest or not text[:start].strip().isdecimal():
        raise FormatError(f"cannot read a line of /proc/PID/stat: {text[:60]!r}")
    return text[start + 1 : end], rest


def split_arguments(data: bytes) -> tuple[str, ...]:
    """The arguments in /proc/PID/cmdline without empty ones at the end; what is not UTF-8 is escaped.

    >>> split_arguments(b"python3\\0-m\\0app\\0")
    ('python3', '-m', 'app')
    """
    # a process that rewrote its title leaves zeros behind it
    data = data.rstrip(b"\0")
    if not data:
        return ()
    parts = data.split(b"\0")
    return tuple(part.decode(errors="backslashreplace") for part in parts)


def command_line(tgid: int) -> bytes:
    """The zero-ended arguments of a process; empty if it is gone or has none."""
    return _content(f"{PROC}/{tgid}/cmdline")


def environment(tgid: int) -> bytes:
    """The zero-ended settings that a process was started with; empty if it is gone or has none."""
    return _content(f"{PROC}/{tgid}/environ")


def _content(path: str) -> bytes:
    # thousands of processes are looked at while a recording begins: this takes half of what pathlib does
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""


def find_target(tgid: int) -> Target:
    """What /proc says of a process.

    Raises:
        TargetError: there is none of that number, or it cannot be traced.
    """
    try:
        status = (PROC / str(tgid) / "status").read_text(errors="replace")
        comm, fields = parse_stat((PROC / str(tgid) / "stat").read_text(errors="replace"))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetError(
            f"cannot attach to process {tgid}: there is none with that id;"
            " `pgrep -a python` lists candidates"
        ) from error
    except OSError as error:
        raise TargetError(
            f"cannot attach to process {tgid}: {error.strerror}; run as root, or grant CAP_SYS_PTRACE"
        ) from error
    leader = _field(status, "Tgid")
    if leader != str(tgid):
        raise TargetError(
            f"cannot attach to {tgid}: it is a thread of process {leader}; attach to {leader}"
        )
    if tgid == os.getpid():
        raise TargetError(
            f"cannot attach to process {tgid}: that is this recorder; name another one"
        )
    if len(fields) > 6 and int(fields[6]) & PF_KTHREAD:
        raise TargetError(
            f"cannot attach to process {tgid}: {comm} is a thread of the kernel, not a process;"
            " `pgrep -a python` lists candidates"
        )
    # field 20 counts threads: a process whose first thread has ended may go on in others
    if fields[0] in "ZX" and not (len(fields) > 17 and int(fields[17]) > 1):
        raise TargetError(
            f"cannot attach to process {tgid}: {comm} has ended and waits for its parent;"
            " to record it from its start, use `scope-ebpf run`"
        )
    return Target(tgid, comm, split_arguments(command_line(tgid)), _started_ticks(fields))


def with_descendants(tgids: Iterable[int]) -> list[int]:
    """Processes and all that they or their children started and that still run; each once."""
    found: dict[int, None] = {}
    waiting = list(tgids)
    while waiting:
        tgid = waiting.pop(0)
        if tgid in found:
            continue
        found[tgid] = None
        for children in (PROC / str(tgid) / "task").glob("*/children"):
            with contextlib.suppress(OSError):
                waiting += map(int, children.read_text().split())
    return list(found)


def check_same(targets: tuple[Target, ...]) -> None:
    """Refuse targets whose ids belong to other processes by now.

    Raises:
        TargetError: naming the first.
    """
    for target in targets:
        if target.started_ticks is None:
            continue
        try:
            text = (PROC / str(target.tgid) / "stat").read_text(errors="replace")
        except OSError:  # gone, and nobody has its id: the kernel will not find it either
            continue
        if _started_ticks(parse_stat(text)[1]) != target.started_ticks:
            raise TargetError(
                f"cannot attach to process {target.tgid}: it has ended meanwhile, and another one has its"
                " id; look up the one that you mean again"
            )


def _started_ticks(fields: list[str]) -> int | None:
    """Field 22 of /proc/PID/stat, from what parse_stat() returns."""
    return int(fields[19]) if len(fields) > 19 else None


def _field(status: str, name: str) -> str:
    for line in status.splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    raise FormatError(f"cannot read /proc/PID/status: it has no {name}")


def check_pid_namespace() -> None:
    """Refuse to take process ids from another pid namespace than the kernel's own.

    Raises:
        TargetError: ids here mean other processes to the kernel.
    """
    if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
        raise TargetError(
            "cannot attach by process id: this is a container with process ids of its own;"
            " run scope-ebpf on the host, or in a container with `--pid=host`"
        )


class LiveProcesses:
    """Tells when processes have ended, also if their ids are used again meanwhile.

    A context manager: it holds a pidfd per process (Linux 5.3).
    """

    def __init__(self, tgids: tuple[int, ...]) -> None:
        """Watch these processes; one that is gone already counts as ended."""
        self._poll = select.poll()
        self._descriptors: dict[int, int] = {}
        for tgid in tgids:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(tgid)
                self._descriptors[descriptor] = tgid
                self._poll.register(descriptor, select.POLLIN)

    def __enter__(self) -> "LiveProcesses":
        """The watch itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the descriptors."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def any(self) -> bool:
        """Whether at least one still runs."""
        for descriptor, _ in self._poll.poll(0):
            self._poll.unregister(descriptor)
            self._descriptors.pop(descriptor)
            os.close(descriptor)
        return bool(self._descriptors)
