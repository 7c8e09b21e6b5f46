"""The tracers that are compared: each started on processes, awaited until it sees them, and ended.

They run on other CPUs than the synthetic target. What they write goes to the temporary directory.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_SECONDS = 30.0
# perf reads again all that it has written before it ends.
END_SECONDS = 120.0
# A tool that opens its events one by one has opened all when there were no new ones for so long.
QUIET_SECONDS = 0.3


@dataclass(frozen=True)
class Use:
    """CPU time and memory of a process."""

    cpu_seconds: float
    peak_rss_bytes: int


class Tracer:
    """One running tracer; a context manager that ends it and then knows what it saw."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        *,
        is_ready: Callable[[Tracer], bool],
        count: Callable[[Tracer], int],
        cpus: Collection[int] | None = None,
    ) -> None:
        """Prepare.

        Args:
            name: what it is called in the results.
            command: what to run.
            log: where its stdout and stderr go.
            is_ready: whether it sees its target now.
            count: how many system calls it has, after its end.
            cpus: where it may run; anywhere by default.
        """
        self.name = name
        self.log = log
        self._command = command
        self._is_ready = is_ready
        self._count = count
        self._cpus = cpus
        self.use: Use | None = None  # of the whole process, after its end
        self._descriptors = (0, 0.0)

    def __enter__(self) -> Tracer:
        """Start it, and wait until it sees its target."""
        with open(self.log, "wb") as log, running_on(self._cpus):
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.pid = self._process.pid
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it as Ctrl-C does."""
        self.stop()

    def stop(self) -> None:
        """End it as Ctrl-C does, and wait; may be called again."""
        if self._process.returncode is not None:
            return
        os.kill(self.pid, signal.SIGINT)
        deadline = time.monotonic() + END_SECONDS
        while self._process.returncode is None:
            ended, status, used = os.wait4(self.pid, os.WNOHANG)
            if ended:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.use = Use(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
            elif time.monotonic() > deadline:
                self._process.kill()
                deadline = float("inf")
            else:
                time.sleep(0.005)

    def text(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def seen(self) -> int:
        """How many system calls it has; after its end."""
        return self._count(self)

    def use_now(self) -> Use:
        """CPU time and peak memory so far, while it runs."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        status = Path(f"/proc/{self.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+) kB", status)
        ticks = int(fields[11]) + int(fields[12])
        return Use(ticks / os.sysconf("SC_CLK_TCK"), int(peak[1]) * 1024 if peak else 0)

    def has_events(self) -> bool:
        """Whether it has opened all its perf events."""
        count = 0
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                count += os.readlink(descriptor) == "anon_inode:[perf_event]"
            except OSError:
                continue
        known, since = self._descriptors
        if count != known:
            self._descriptors = (count, time.monotonic())
        return bool(count) and count == known and time.monotonic() - since > QUIET_SECONDS

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready(self):
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended early: {self.text().strip()[-500:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name} is not ready after {READY_SECONDS:.0f} s")
            time.sleep(0.01)


@contextmanager
def running_on(cpus: Collection[int] | None) -> Iterator[None]:
    """Processes that are started in the block run on these CPUs."""
    before = os.sched_getaffinity(0)
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def scope_ebpf(
    program: Path,
    pids: Sequence[int],
    recording: Path,
    *,
    families: str | None = None,
    transport: str = "rings",
    cpus: Collection[int] | None = None,
    more: Sequence[str] = (),
) -> Tracer:
    """The real `scope-ebpf attach`, with the families that it has by default."""
    command: list[str | Path] = [program, "attach", "-o", recording, *more]
    command += ["--transport", transport]
    for pid in pids:
        command += ["--pid", str(pid)]
    if families is not None:
        command += ["--families", families]
    return Tracer(
        "scope-ebpf" if families is None else f"scope-ebpf --families {families}",
        command,
        recording.with_suffix(".log"),
        is_ready=lambda tracer: "Ctrl-C ends it" in tracer.text(),
        count=lambda _: int(recorded(recording)["syscalls"]["rows"]),
        cpus=cpus,
    )


def recorded(recording: Path) -> dict[str, dict[str, int]]:
    """The counts of a recording that has ended: rows and lost by table.

    Raises:
        RuntimeError: it is not complete.
    """
    tables: dict[str, dict[str, int]] = complete_meta(recording)["tables"]
    return tables


def lost_in_all(recording: Path) -> int:
    """Everything that a recording counts as lost; raises RuntimeError if it is not complete."""
    meta = complete_meta(recording)
    return int(sum(table["lost"] for table in meta["tables"].values()) + meta["lost_tasks"])


def complete_meta(recording: Path) -> dict[str, Any]:
    """meta.json of a recording that ended in good order.

    Raises:
        RuntimeError: it did not.
    """
    file = recording / "meta.json"
    meta: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"complete": False}
    if not meta["complete"]:
        log = recording.with_suffix(".log").read_text().strip()
        raise RuntimeError(f"{recording.name} is not complete: {log[-500:]}")
    return meta


def perf_record(pids: Sequence[int], data: Path, *, cpus: Collection[int] | None = None) -> Tracer:
    """`perf record` of both raw tracepoints; a call is two samples."""

    def count(tracer: Tracer) -> int:
        found = re.search(r"\((\d+) samples\)", tracer.text())
        return int(found[1]) // 2 if found else 0

    command = ["perf", "record", "-e", "raw_syscalls:sys_enter", "-e", "raw_syscalls:sys_exit"]
    command += ["-k", "CLOCK_MONOTONIC", "-p", ",".join(map(str, pids)), "-o", str(data)]
    return Tracer(
        "perf record",
        command,
        data.with_suffix(".log"),
        is_ready=Tracer.has_events,
        count=count,
        cpus=cpus,
    )


def perf_trace(pid: int, output: Path, *, cpus: Collection[int] | None = None) -> Tracer:
    """`perf trace`: one line per call."""
    return Tracer(
        "perf trace",
        ["perf", "trace", "-p", str(pid), "-o", output],
        output.with_suffix(".log"),
        is_ready=Tracer.has_events,
        count=lambda _: lines_with(output, b"getppid("),
        cpus=cpus,
    )


def bpftrace_printf(pid: int, output: Path, *, cpus: Collection[int] | None = None) -> Tracer:
    """bpftrace that prints a line at the end of each call, from a start that a map keeps."""
    script = f"""
tracepoint:raw_syscalls:sys_enter /pid == {pid}/ {{ @start[tid] = nsecs; }}
tracepoint:raw_syscalls:sys_exit /pid == {pid} && @start[tid]/ {{
    printf("%llu %llu %d %ld %ld\\n", @start[tid], nsecs - @start[tid], tid, args->id, args->ret);
    delete(@start[tid]);
}}
interval:s:600 {{ exit(); }}
"""
    return Tracer(
        "bpftrace printf",
        ["bpftrace", "-o", output, "-e", script],
        output.with_suffix(".log"),
        is_ready=Tracer.has_events,
        count=lambda _: lines_with(output, b" "),
        cpus=cpus,
    )


def strace(pid: int, output: Path, *, cpus: Collection[int] | None = None) -> Tracer:
    """`strace -f -p`, into a file."""

    def is_ready(_: Tracer) -> bool:
        status = Path(f"/proc/{pid}/status").read_text()
        return "TracerPid:\t0\n" not in status

    return Tracer(
        "strace",
        ["strace", "-f", "-p", str(pid), "-o", output],
        output.with_suffix(".log"),
        is_ready=is_ready,
        count=lambda _: lines_with(output, b"getppid("),
        cpus=cpus,
    )


def lines_with(file: Path, part: bytes) -> int:
    """How many lines of a file contain this."""
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        return sum(part in line for line in stream)
