"""From the command to the first event: how long a user waits until a tracer sees something."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import polars as pl
import tracers
from getppid import Getppid
from results import Section
from setting import SCOPE_EBPF, Setting

from scope_ebpf import open_recording

NAME = "first-event"
TITLE = "From the command to the first event"
REPEATS, QUICK_REPEATS = 7, 2
# The target is never idle, and far from being the bottleneck.
RATE = 100_000
BATCH = 10
TIMEOUT_SECONDS = 60
BCC_PROGRAM = Path(__file__).with_name("bcc_first_event.py")
SCOPE, SCOPE_DISK, SCOPE_READY = (
    "scope-ebpf: first row's start",
    "scope-ebpf: first segment on disk",
    "scope-ebpf: says that it records",
)


def measure(setting: Setting) -> Section:
    """Every tool in turn, on the same target, which makes calls all the time."""
    section = Section(NAME, TITLE)
    repeats = QUICK_REPEATS if setting.quick else REPEATS
    found: dict[str, list[float]] = {SCOPE: [], SCOPE_DISK: [], SCOPE_READY: []}
    others: dict[str, tuple[str, Callable[[Setting, int], tuple[int, int]]]] = {
        "bpftrace": ("bpftrace", bpftrace),
        "perf record": ("perf", perf),
        "BCC": ("BCC", bcc),
    }
    failed: set[str] = set()
    for name, (tool, _) in others.items():
        if setting.tools[tool] is None:
            section.notes.append(f"{name}: not measured, {tool} is missing")
            failed.add(name)
    # one slow first run of each, which reads the programs from the disk, does not count
    for number in range(repeats + 1):
        setting.say(f"{NAME}: round {number}")
        with setting.getppid() as target:
            # more than it makes before it is ended
            target.begin(RATE * 600, batch=BATCH, rate=RATE)
            for name, seconds in scope(setting, target).items():
                if number:
                    found[name].append(seconds)
            for name, (_, run) in others.items():
                if name in failed:
                    continue
                begun_ns = time.monotonic_ns()
                try:
                    event_ns, seen_ns = run(setting, target.pid)
                except RuntimeError as error:
                    section.notes.append(f"{name}: {error}")
                    failed.add(name)
                    continue
                if number:
                    found.setdefault(f"{name}: first event", []).append((event_ns - begun_ns) / 1e9)
                    if seen_ns:
                        found.setdefault(f"{name}: first event is printed", []).append(
                            (seen_ns - begun_ns) / 1e9
                        )
    middle = {name: section.add(name, "s", seconds) for name, seconds in found.items()}
    section.ask("until the first stored event: at most 0.5 s", 0.5, "s", middle[SCOPE])
    return section


def scope(setting: Setting, target: Getppid) -> dict[str, float]:
    """scope-ebpf: seconds from the command to each step."""
    recording = setting.path("first.scope")
    begun_ns = time.monotonic_ns()
    tracer = tracers.scope_ebpf(SCOPE_EBPF, [target.pid], recording, cpus=setting.other_cpus)
    with tracer:
        ready_ns = time.monotonic_ns()
        segment = first_segment(recording / "syscalls")
        # renaming changed its inode; that is the moment from which it can be read
        written_ns = segment.stat().st_ctime_ns + time.monotonic_ns() - time.time_ns()
    calls = open_recording(recording).syscalls.filter(pl.col("status") == "complete")
    first_ns = int(calls.select(pl.col("start_ns").min()).collect().item())
    steps = {SCOPE: first_ns, SCOPE_DISK: written_ns, SCOPE_READY: ready_ns}
    return {name: (moment - begun_ns) / 1e9 for name, moment in steps.items()}


def first_segment(table: Path) -> Path:
    """Wait for the first segment of a table."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            for entry in os.scandir(table):
                if entry.name.startswith("000001-"):
                    return Path(entry.path)
        time.sleep(0.005)
    raise RuntimeError(f"no segment in {table.name} within {TIMEOUT_SECONDS} s")


def bpftrace(setting: Setting, pid: int) -> tuple[int, int]:
    """bpftrace: when its first event was, and when it was printed (CLOCK_MONOTONIC)."""
    action = 'printf("%llu\\n", nsecs); exit();'
    script = f"tracepoint:raw_syscalls:sys_enter /pid == {pid}/ {{ {action} }}"
    return first_number(["bpftrace", "-B", "line", "-e", script], setting)


def bcc(setting: Setting, pid: int) -> tuple[int, int]:
    """The same with BCC."""
    return first_number([sys.executable, str(BCC_PROGRAM), str(pid)], setting)


def first_number(command: list[str], setting: Setting) -> tuple[int, int]:
    """Run a command until it prints a number; the number, and when that was."""
    errors = setting.path("first.log")
    with errors.open("wb") as log, tracers.running_on(setting.other_cpus):
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.strip().isdigit():
                return int(line), time.monotonic_ns()
    finally:
        process.terminate()
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    told = [line.strip() for line in errors.read_text(errors="replace").splitlines()]
    telling = [line for line in told if "rror" in line or "ailed" in line or "nable" in line]
    raise RuntimeError(f"does not work here: {'; '.join((telling or told)[:2])}")


def perf(setting: Setting, pid: int) -> tuple[int, int]:
    """perf record: when its first sample was; it prints nothing."""
    data = setting.path("first.data")
    with tracers.perf_record([pid], data, cpus=setting.other_cpus):
        pass
    command = ["perf", "script", "-i", str(data), "--ns", "-F", "time"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    line = process.stdout.readline().strip().rstrip(":")
    process.kill()
    process.communicate()
    if not line:
        raise RuntimeError("recorded nothing")
    seconds, _, fraction = line.partition(".")
    return int(seconds) * 1_000_000_000 + int(fraction.ljust(9, "0")), 0
