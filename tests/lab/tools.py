"""Tracers that others wrote, at work beside ours: started, waited for, ended, and read as numbers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.recorded import KERNEL

# A compile of BCC takes up to half a minute on an emulated guest, and more with several at once.
READY_SECONDS = 150.0
END_SECONDS = 60.0

# Follows forks, which bpftrace has no option for. Numbers of calls and times are of all that it follows;
# run time is as the scheduler itself counts it.
BPFTRACE = """
BEGIN { @in[(uint64)PID] = 1; }
tracepoint:sched:sched_process_fork /@in[(uint64)args->parent_pid]/ { @in[(uint64)args->child_pid] = 1; }
tracepoint:raw_syscalls:sys_enter /@in[(uint64)tid]/ { @begun[tid] = nsecs; }
tracepoint:raw_syscalls:sys_exit /@in[(uint64)tid]/ { @calls[args->id] = count(); }
tracepoint:raw_syscalls:sys_exit /@begun[tid]/ {
    @took[args->id] = sum(nsecs - @begun[tid]);
    @timed[args->id] = count();
    delete(@begun[tid]);
}
tracepoint:sched:sched_stat_runtime /@in[(uint64)args->pid]/ { @ran[args->pid] = sum(args->runtime); }
END { clear(@in); clear(@begun); }
"""


@dataclass(frozen=True)
class Kind:
    """A tool, and how it is run on a process.

    Attributes:
        name: as its command.
        package: which of Debian's it is in.
        arguments: for the process with this pid.
        ready: what it prints when its probes are at work.
        ends: by itself, when the process does; to interrupt it then costs its result.
    """

    name: str
    package: str
    arguments: Callable[[int], Sequence[str]]
    ready: str
    ends: bool = False

    def __str__(self) -> str:
        return self.name


STRACE = Kind(
    "strace",
    "strace",
    lambda pid: ["-c", "-f", "-U", "calls,name", "-p", str(pid)],
    r"Process \d+ attached",
    ends=True,
)
BPFTRACE_COUNTS = Kind(
    "bpftrace",
    "bpftrace",
    lambda pid: ["-e", BPFTRACE.replace("PID", str(pid))],
    "__BPFTRACE_NOTIFY_PROBES_ATTACHED",
)
SYSCOUNT = Kind(
    "syscount-bpfcc",
    "bpfcc-tools",
    lambda pid: ["-p", str(pid), "-L", "-T", "1000"],
    "Ctrl.C to quit",
)
EXECSNOOP = Kind("execsnoop-bpfcc", "bpfcc-tools", lambda pid: ["-x", "-P", str(pid)], "PCOMM")
TCPLIFE = Kind("tcplife-bpfcc", "bpfcc-tools", lambda pid: ["-s", "-p", str(pid)], "LADDR")
# bpftrace's tool of that name, where BCC's is not offered: it follows all processes.
TCPLIFE_BT = Kind("tcplife.bt", "bpftrace", lambda pid: [], "__BPFTRACE_NOTIFY_PROBES_ATTACHED")
OFFCPUTIME = Kind(
    "offcputime-bpfcc", "bpfcc-tools", lambda pid: ["-K", "-p", str(pid)], "Ctrl-C to end"
)
KINDS = (STRACE, BPFTRACE_COUNTS, SYSCOUNT, EXECSNOOP, TCPLIFE, TCPLIFE_BT, OFFCPUTIME)


@dataclass(frozen=True)
class NotOffered:
    """A tool that does not work on some kernels, and what it then says: that, or the table is wrong.

    Attributes:
        tool: its name.
        error: what it prints, as a regular expression.
        reason: why, in our words.
        since, before: the kernels; None: no bound.
    """

    tool: str
    error: str
    reason: str
    since: tuple[int, int] | None = None
    before: tuple[int, int] | None = None

    def holds(self) -> bool:
        """Whether this is such a kernel."""
        return (self.since is None or self.since <= KERNEL) and (
            self.before is None or self.before > KERNEL
        )


# Of the versions in Debian bookworm: BCC 0.26, bpftrace 0.17, strace 6.1.
NOT_OFFERED: tuple[NotOffered, ...] = (
    NotOffered(
        "tcplife-bpfcc",
        "incomplete type 'struct bpf_rb_root'",
        "BCC 0.26 brings a linux/bpf.h of its own, from before Linux 6.3, which lacks structs that the"
        " kernel's headers of sockets need",
        since=(6, 3),
    ),
    NotOffered(
        "execsnoop-bpfcc",
        r"static_assert failed due to requirement 'sizeof\(struct filename\) % 64 == 0'",
        "linux/fs.h has a struct that clang 14, which BCC 0.26 compiles with, lays out otherwise",
        since=(7, 0),
    ),
)


def not_offered(kind: Kind) -> NotOffered | None:
    """Why this tool does not work on this kernel; None: it has to."""
    return next((entry for entry in NOT_OFFERED if entry.tool == kind.name and entry.holds()), None)


class Tool:
    """A tool at work on a process; a context manager that ends it, whatever happens."""

    def __init__(self, kind: Kind, pid: int, folder: Path) -> None:
        """Start it; what it says goes to a file in the folder."""
        self.kind = kind
        path = shutil.which(kind.name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert path is not None, f"{kind.name} is missing: install the package {kind.package}"
        self._file = folder / f"{kind.name}.txt"
        with self._file.open("wb") as file:
            self.process = subprocess.Popen(
                [path, *kind.arguments(pid)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ
                | {"PYTHONUNBUFFERED": "1", "__BPFTRACE_NOTIFY_PROBES_ATTACHED": "1"},
            )

    def __enter__(self) -> Tool:
        """The tool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it; one that holds the target is asked first, so that it lets go."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        """What it printed so far."""
        return self._file.read_text(errors="replace")

    def is_ready(self) -> bool:
        """Wait until its probes are at work; False if it ended instead."""
        deadline = time.monotonic() + READY_SECONDS
        while not re.search(self.kind.ready, self.said):
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, (
                f"{self.kind} did not get ready: {self.said[-2000:]}"
            )
            time.sleep(0.02)
        return True

    def end(self) -> str:
        """End it as its user would; returns what it printed."""
        if not self.kind.ends and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        self.process.wait(END_SECONDS)
        return self.said


# ---- what they print ----


def strace_counts(said: str) -> dict[str, int]:
    """Calls by name."""
    found = re.findall(r"^ *(\d+) +([a-z_]\w*)$", said, re.MULTILINE)
    counts = {name: int(number) for number, name in found}
    counts.pop("total")
    return counts


def bpftrace_map(said: str, name: str) -> dict[int, int]:
    """A map with numbers as keys."""
    found = re.findall(rf"^@{name}\[(\d+)\]: (\d+)$", said, re.MULTILINE)
    return {int(key): int(value) for key, value in found}


def syscount_rows(said: str) -> dict[str, tuple[int, float]]:
    """Calls and their microseconds, by name; one that BCC has no name for as [unknown: 511]."""
    found = re.findall(r"^(\S+|\[unknown: \d+\]) +(\d+) +(\d+\.\d+)$", said, re.MULTILINE)
    return {name: (int(number), float(total)) for name, number, total in found}


def execsnoop_rows(said: str) -> list[tuple[int, int, int, str]]:
    """pid, ppid, result and arguments of each exec."""
    found = re.findall(r"^.{16} (\d+) +(\d+) +(-?\d+) (.*)$", said, re.MULTILINE)
    return [(int(pid), int(ppid), int(result), line) for pid, ppid, result, line in found]


@dataclass(frozen=True)
class Life:
    """A TCP connection's end, as tcplife tells it."""

    pid: int
    local_port: int
    remote_port: int
    sent_kib: int
    received_kib: int
    span_ms: float


def tcplife_rows(said: str) -> list[Life]:
    """One per end of a connection that was closed: of BCC's tool, or of bpftrace's."""
    host, tcp = r"127\.0\.0\.1", r"(\d+)"
    of_bcc = rf"^(\d+),[^,]*,4,{host},{tcp},{host},{tcp},(\d+),(\d+),(\d+\.\d+)$"
    # newer ones begin with the time of day
    time = r"(?:\d+:\d+:\d+ +)?"
    of_bpftrace = rf"^{time}(\d+) +\S+ +{host} +{tcp} +{host} +{tcp} +(\d+) +(\d+) +(\d+)$"
    found = [row for line in (of_bcc, of_bpftrace) for row in re.findall(line, said, re.MULTILINE)]
    return [
        Life(int(pid), int(local), int(remote), int(sent), int(received), float(span))
        for pid, local, remote, sent, received, span in found
    ]


def offcputime_totals(said: str) -> dict[int, int]:
    """Microseconds off the CPU by thread."""
    totals: dict[int, int] = {}
    for tid, time_us in re.findall(r"^ +- +.* \((\d+)\)\n +(\d+)$", said, re.MULTILINE):
        totals[int(tid)] = totals.get(int(tid), 0) + int(time_us)
    return totals
