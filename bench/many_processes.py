"""Thousands of processes at once, and storms of short ones: what is seen, and what it takes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import tracers
from getppid import getppid_number
from many_tree import SOURCE, Tree
from programs import compile_c
from results import Row, Section
from setting import SCOPE_EBPF, Setting
from summary_time import run_summary

from scope_ebpf import open_recording

NAME = "many-processes"
TITLE = "Thousands of processes, and storms of short ones"
SIZES, QUICK_SIZES = (100, 1000, 4000), (100, 1000)
PYTHONS = 50
# Shared by all children, so that trees differ by the number of processes only.
CALLS_PER_SECOND = 20_000
SECONDS, QUICK_SECONDS = 10.0, 3.0
OTHER_SECONDS, OTHER_QUICK_SECONDS = 3.0, 1.0
# The recorder looks at what is in each process for a while after it said that it records.
SETTLE_SECONDS = 3.0
TRUE = Path("/bin/true")
STORM, STORMS, QUICK_STORMS = 1000, 5, 1
# A thousand a minute, and for how many processes.
PACE = 1000 / 60
PACED, QUICK_PACED = 1000, 100


def measure(setting: Setting) -> Section:
    """Trees of each size, with scope-ebpf and then with the others, and storms."""
    section = Section(NAME, TITLE)
    program = compile_c(SOURCE, setting.directory)
    attached: dict[int, float] = {}
    cpu: dict[int, float] = {}
    memory: dict[int, float] = {}
    wrong: list[int] = []
    lost: list[int] = []
    for size in QUICK_SIZES if setting.quick else SIZES:
        setting.say(f"{NAME}: {size:,} processes and {PYTHONS} Pythons")
        with Tree(program, size, PYTHONS) as tree:
            time.sleep(1)  # the Pythons have begun by then
            attached[size], cpu[size], memory[size], *counts = record(setting, section, tree)
            lost.append(counts[0])
            wrong.append(counts[1])
            beside(setting, section, tree)
    storms(setting, section, program, lost, wrong)
    largest, smallest = max(attached), min(attached)
    section.ask(f"until it records {largest:,} processes: at most 2 s", 2, "s", attached[largest])
    section.ask(
        f"recorder's CPU with {largest:,} processes beside {smallest:,} that make as many calls:"
        " at most 2 times",
        2,
        "×",
        cpu[largest] / cpu[smallest],
    )
    section.ask(
        f"recorder's memory with {largest:,} processes: at most 300 MB", 300, "MB", memory[largest]
    )
    section.ask("lost in all: 0", 0, "events", sum(lost))
    section.ask("processes, names and calls that are not as they were: 0", 0, "", sum(wrong))
    return section


def record(setting: Setting, section: Section, tree: Tree) -> tuple[float, float, float, int, int]:
    """scope-ebpf on a tree; returns seconds, CPU in %, memory in MB, and what is lost and wrong."""
    recording = setting.path("many.scope")
    what = f"{tree.children:,} processes"
    begun = time.monotonic()
    tracer = tracers.scope_ebpf(SCOPE_EBPF, [tree.pid], recording)
    with tracer:
        attached = time.monotonic() - begun
        time.sleep(SETTLE_SECONDS)
        looked = tracer.use_now()
        time.sleep(SETTLE_SECONDS)
        before = tracer.use_now()
        made = tree.work(QUICK_SECONDS if setting.quick else SECONDS, CALLS_PER_SECOND)
        time.sleep(1)  # the last segment is on disk by then
        after = tracer.use_now()
        shared = proportional_bytes(tracer.pid)
        ending = time.monotonic()
    ended = time.monotonic() - ending
    lost = tracers.lost_in_all(recording)
    cpu = 100 * (after.cpu_seconds - before.cpu_seconds) / (made.elapsed_ns / 1e9)
    idle = 100 * (before.cpu_seconds - looked.cpu_seconds) / SETTLE_SECONDS
    size = sum(file.stat().st_size for file in recording.rglob("*.parquet"))
    rows = sum(table["rows"] for table in tracers.recorded(recording).values())
    calls = made.count / (made.elapsed_ns / 1e9)
    note = f"{rows:,} rows; {calls:,.0f} calls/s of getppid"
    single(section, f"{what}: until it says that it records", "s", attached)
    single(section, f"{what}: recorder's CPU", "% of one", cpu, note)
    single(section, f"{what}: recorder's CPU while only the Pythons work", "% of one", idle)
    single(section, f"{what}: recorder's peak memory", "MB", after.peak_rss_bytes / 1e6)
    single(section, f"{what}: its proportional share", "MB", shared / 1e6)
    single(section, f"{what}: on disk", "MB", size / 1e6, f"{size / max(rows, 1):.1f} B per row")
    single(section, f"{what}: from Ctrl-C to the end", "s", ended, "with the summary")
    if not lost:
        seconds = [run_summary(recording)[0] for _ in range(2 if setting.quick else 5)]
        section.add(f"{what}: summary", "s", seconds)
    wrong = check_tree(section, tree, recording, made.count)
    return attached, cpu, after.peak_rss_bytes / 1e6, lost, wrong


def check_tree(section: Section, tree: Tree, recording: Path, calls: int) -> int:
    """How many processes, command lines, interpreters and calls are missing or too many."""
    opened = open_recording(recording)
    alive = opened.processes.filter(pl.col("event") == "alive").collect()
    stored = opened.syscalls.filter(
        (pl.col("number") == getppid_number()) & (pl.col("status") == "complete")
    )
    told = opened.interpreters.filter(pl.col("stacks")).select(pl.len()).collect().item()
    expected = {f"many child {number} {tree.children}" for number in range(tree.children)}
    lines = alive["command_line"].drop_nulls()
    off = {
        "processes": abs(alive["tgid"].n_unique() - tree.children - tree.pythons - 1),
        "command lines": len(expected - set(lines)),
        "interpreters": abs(int(told) - tree.pythons),
        "calls": abs(int(stored.select(pl.len()).collect().item()) - calls),
    }
    for what, count in off.items():
        if count:
            section.notes.append(f"{tree.children:,} processes: {count:,} {what} missing or wrong")
    return sum(off.values())


def proportional_bytes(pid: int) -> int:
    """Memory of a process, where what is shared counts in parts: Pss in smaps_rollup."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    return int(found[1]) * 1024 if found else 0


# ---- the alternatives ----


def beside(setting: Setting, section: Section, tree: Tree) -> None:
    """Tools that count the calls of the same tree: until they see it, their CPU, what they saw."""
    tools: dict[str, tuple[str, Callable[[], tracers.Tracer]]] = {
        "bpftrace, a count": ("bpftrace", lambda: bpftrace_count(setting.path("many.txt"))),
        "perf trace -s": ("perf", lambda: perf_trace_count(tree, setting.path("many.txt"))),
        "strace -c": ("strace", lambda: strace_count(tree, setting.path("many.txt"))),
    }
    for name, (needs, start) in tools.items():
        what = f"{tree.children:,} processes: {name}"
        if not setting.tools[needs]:
            section.notes.append(f"{what}: not measured, {needs} is missing")
            continue
        setting.say(f"{NAME}: {what}")
        try:
            begun = time.monotonic()
            tracer = start()
            with tracer:
                ready = time.monotonic() - begun
                before = tracer.use_now()
                made = tree.work(
                    OTHER_QUICK_SECONDS if setting.quick else OTHER_SECONDS, CALLS_PER_SECOND
                )
                after = tracer.use_now()
            seen = tracer.seen()
        except (RuntimeError, OSError) as error:
            section.notes.append(f"{what}: {error}")
            continue
        seconds = made.elapsed_ns / 1e9
        cpu = 100 * (after.cpu_seconds - before.cpu_seconds) / seconds
        note = f"{made.count / seconds:,.0f} calls/s could be made"
        if made.count:
            note += f"; {100 * seen / made.count:.4g} % of them seen"
        single(section, f"{what}: until it is ready", "s", ready)
        single(section, f"{what}: its CPU", "% of one", cpu, note)


def bpftrace_count(output: Path) -> tracers.Tracer:
    """bpftrace that counts calls by number in a map, of processes of that name."""
    script = (
        'tracepoint:raw_syscalls:sys_enter /comm == "exe"/ { @calls[args->id] = count(); }'
        " interval:s:600 { exit(); }"
    )

    def count(_: tracers.Tracer) -> int:
        found = re.search(rf"^@calls\[{getppid_number()}\]: (\d+)", output.read_text(), re.M)
        return int(found[1]) if found else 0

    return tracers.Tracer(
        "bpftrace",
        ["bpftrace", "-o", output, "-e", script],
        output.with_suffix(".log"),
        is_ready=tracers.Tracer.has_events,
        count=count,
    )


def perf_trace_count(tree: Tree, output: Path) -> tracers.Tracer:
    """`perf trace -s`: calls by process and name."""

    def count(_: tracers.Tracer) -> int:
        return sum(map(int, re.findall(r"^ +getppid +(\d+)", output.read_text(), re.M)))

    processes = ",".join(map(str, [tree.pid, *tree.processes()]))
    return tracers.Tracer(
        "perf trace",
        ["perf", "trace", "-s", "-p", processes, "-o", output],
        output.with_suffix(".log"),
        is_ready=tracers.Tracer.has_events,
        count=count,
    )


def strace_count(tree: Tree, output: Path) -> tracers.Tracer:
    """`strace -f -c`, told of each process that there is: -f is for those to come."""
    processes = tree.processes()
    last = processes[-1]

    def is_ready(_: tracers.Tracer) -> bool:
        return "TracerPid:\t0\n" not in Path(f"/proc/{last}/status").read_text()

    def count(_: tracers.Tracer) -> int:
        found = re.search(r"^ *\S+ +\S+ +\S+ +(\d+) .*getppid$", output.read_text(), re.M)
        return int(found[1]) if found else 0

    return tracers.Tracer(
        "strace",
        ["strace", "-f", "-c", "-p", ",".join(map(str, [tree.pid, *processes])), "-o", output],
        output.with_suffix(".log"),
        is_ready=is_ready,
        count=count,
    )


# ---- storms ----


def storms(
    setting: Setting, section: Section, program: Path, lost: list[int], wrong: list[int]
) -> None:
    """`true`, a thousand in a minute and as fast as possible, untraced and recorded."""
    repeats = QUICK_STORMS if setting.quick else STORMS
    with Tree(program, 0, 0) as tree:
        plain: list[float] = []
        fast: list[float] = []
        for number in range(repeats):
            setting.say(f"{NAME}: storm {number + 1} of {repeats}")
            made = tree.storm(STORM, 0, TRUE)
            plain.append(made.elapsed_ns / made.count / 1000)
            took, _ = record_storm(setting, section, tree, STORM, 0, lost, wrong)
            fast.append(took / STORM / 1000)
        name = f"{STORM:,} `true`, one after the other"
        section.add(f"{name}: each, untraced", "µs", plain)
        section.add(f"{name}: each, recorded", "µs", fast)
        count = QUICK_PACED if setting.quick else PACED
        setting.say(f"{NAME}: a thousand a minute, {count:,}")
        _, cpu = record_storm(setting, section, tree, count, PACE, lost, wrong)
        single(section, "a thousand `true` a minute: recorder's CPU", "% of one", cpu, f"{count:,}")


def record_storm(
    setting: Setting,
    section: Section,
    tree: Tree,
    count: int,
    rate: float,
    lost: list[int],
    wrong: list[int],
) -> tuple[int, float]:
    """One recorded storm; returns its time in ns and the recorder's CPU in %."""
    recording = setting.path("storm.scope")
    tracer = tracers.scope_ebpf(SCOPE_EBPF, [tree.pid], recording)
    with tracer:
        time.sleep(1)
        before = tracer.use_now()
        made = tree.storm(count, rate, TRUE)
        time.sleep(1)
        after = tracer.use_now()
    lost.append(tracers.lost_in_all(recording))
    lives = open_recording(recording).processes.collect()
    children = lives.filter(pl.col("parent_tgid") == tree.pid)
    executed = children.filter(pl.col("event") == "exec")
    names = executed.filter(pl.col("comm") == TRUE.name)["command_line"].to_list()
    off = {
        "births": abs(children.filter(pl.col("event") == "fork").height - count),
        "ends": abs(
            children.filter((pl.col("event") == "exit") & (pl.col("exit_code") == 0)).height - count
        ),
        "names": len({f"{TRUE} {number}" for number in range(count)} ^ set(names))
        + abs(len(names) - count),
    }
    for what, number in off.items():
        if number:
            section.notes.append(f"a storm of {count:,}: {number:,} {what} missing or wrong")
    wrong.append(sum(off.values()))
    cpu = 100 * (after.cpu_seconds - before.cpu_seconds) / (made.elapsed_ns / 1e9)
    return made.elapsed_ns, cpu


def single(section: Section, what: str, unit: str, value: float, note: str = "") -> None:
    """A row of one value."""
    section.rows.append(Row(what, unit, value, value, value, (value,), note=note))
