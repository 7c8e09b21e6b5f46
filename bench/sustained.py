"""A million events per second for a minute, and a burst: what is lost, and what recording takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import polars as pl
import tracers
from getppid import Made, getppid_number
from results import Row, Section
from setting import SCOPE_EBPF, Setting

from scope_ebpf import open_recording

NAME = "sustained"
TITLE = "A million events per second, and a burst"
RATE = 1_000_000
BATCH = 100
SECONDS, QUICK_SECONDS = 60, 5
# perf writes some 150 bytes per call: a minute of it would be 10 GB.
PERF_SECONDS, PERF_QUICK_SECONDS = 10, 2
BURST_CALLS = 1_000_000
BURSTS, QUICK_BURSTS = 9, 2
# By then the last segment is on disk: the recorder writes one every 0.7 s.
SETTLE_SECONDS = 2.0


def measure(setting: Setting) -> Section:
    """First the minute, then perf record at the same rate, then bursts."""
    section = Section(NAME, TITLE)
    seconds = QUICK_SECONDS if setting.quick else SECONDS
    setting.say(f"{NAME}: {seconds} s of {RATE:,} calls per second")
    sustain(setting, section, seconds)
    if setting.tools["perf"]:
        seconds = PERF_QUICK_SECONDS if setting.quick else PERF_SECONDS
        setting.say(f"{NAME}: perf record, {seconds} s")
        sustain_perf(setting, section, seconds)
    else:
        section.notes.append("perf record: not measured, perf is missing")
    setting.say(f"{NAME}: bursts")
    bursts(setting, section)
    return section


def sustain(setting: Setting, section: Section, seconds: int) -> None:
    """scope-ebpf at the full rate."""
    recording = setting.path("sustained.scope")
    calls = RATE * seconds
    with setting.getppid() as target:
        tracer = tracers.scope_ebpf(SCOPE_EBPF, [target.pid], recording)
        with tracer:
            time.sleep(1)
            before = tracer.use_now()
            made = target.make(calls, batch=BATCH, rate=RATE)
            time.sleep(SETTLE_SECONDS)
            after = tracer.use_now()
    lost, rows = tracers.lost_in_all(recording), stored_calls(recording)
    cpu = 100 * (after.cpu_seconds - before.cpu_seconds) / (made.elapsed_ns / 1e9)
    size = sum(file.stat().st_size for file in recording.rglob("*.parquet"))
    single(section, "calls per second that were made", "/s", made.rate)
    single(section, "scope-ebpf: recorder's CPU", "% of one", cpu, "up to the last segment on disk")
    single(
        section, "scope-ebpf: peak memory", "MB", after.peak_rss_bytes / 1e6, "96 MB of it is rings"
    )
    if tracer.use is not None:
        single(
            section,
            "scope-ebpf: peak memory with the summary at the end",
            "MB",
            tracer.use.peak_rss_bytes / 1e6,
        )
    single(section, "scope-ebpf: on disk per call", "B", size / calls)
    section.ask(f"lost of {calls:,} calls at {RATE:,} per second: 0", 0, "calls", lost)
    section.ask(
        "rows more or less than calls: 0",
        0,
        "rows",
        abs(calls - rows),
        f"{rows - calls:+,}" if rows != calls else "",
    )
    slow = abs(made.rate / RATE - 1) > 0.02
    note = f"at {made.rate:,.0f} calls/s: the machine could not make more" if slow else ""
    section.ask("recorder's CPU: at most 50 % of one", 50, "%", cpu, note)
    section.ask("recorder's memory: at most 300 MB", 300, "MB", after.peak_rss_bytes / 1e6)
    setting.path("sustained.scope")


def stored_calls(recording: Path) -> int:
    """Rows of getppid, all complete."""
    calls = open_recording(recording).syscalls.filter(
        (pl.col("number") == getppid_number()) & (pl.col("status") == "complete")
    )
    return int(calls.select(pl.len()).collect().item())


def sustain_perf(setting: Setting, section: Section, seconds: int) -> None:
    """perf record at the same rate."""
    data = setting.path("sustained.data")
    calls = RATE * seconds
    with setting.getppid() as target:
        tracer = tracers.perf_record([target.pid], data)
        with tracer:
            before = tracer.use_now()
            made = target.make(calls, batch=BATCH, rate=RATE)
            after = tracer.use_now()
    size = data.stat().st_size
    lost = 100 * (1 - tracer.seen() / calls)
    note = f"of {seconds} s"
    single(section, "perf record: calls per second that could be made", "/s", made.rate, note)
    single(
        section,
        "perf record: its CPU",
        "% of one",
        100 * (after.cpu_seconds - before.cpu_seconds) / (made.elapsed_ns / 1e9),
        "while it records",
    )
    single(
        section,
        "perf record: its CPU per million calls",
        "s",
        (tracer.use.cpu_seconds if tracer.use else 0) / calls * 1e6,
        "with its end",
    )
    single(section, "perf record: lost", "%", max(lost, 0.0))
    single(section, "perf record: on disk per call", "B", size / max(tracer.seen(), 1))
    setting.path("sustained.data")


def bursts(setting: Setting, section: Section) -> None:
    """As fast as possible: from one CPU, and from all at once."""
    cpus = sorted({setting.target_cpu, *setting.other_cpus})
    shapes = {"one CPU": [setting.target_cpu], f"{len(cpus)} CPUs at once": cpus}
    for shape, places in shapes.items():
        took: list[float] = []
        lost: list[float] = []
        wrong: list[float] = []
        for _ in range(QUICK_BURSTS if setting.quick else BURSTS):
            recording = setting.path("burst.scope")
            with ExitStack() as stack:
                targets = [stack.enter_context(setting.getppid(cpu)) for cpu in places]
                tracer = tracers.scope_ebpf(
                    SCOPE_EBPF, [target.pid for target in targets], recording
                )
                with tracer:
                    time.sleep(1)
                    share = BURST_CALLS // len(targets)
                    waiting: list[Callable[[], Made]] = [target.begin(share) for target in targets]
                    made = [wait() for wait in waiting]
            ended = max(each.begun_ns + each.elapsed_ns for each in made)
            took.append((ended - min(each.begun_ns for each in made)) / 1e9)
            lost.append(tracers.lost_in_all(recording))
            wrong.append(abs(stored_calls(recording) - sum(each.calls for each in made)))
        section.add(f"burst of {BURST_CALLS:,} calls from {shape}", "s", took)
        section.add(f"burst from {shape}: lost", "calls", lost)
        section.ask(
            f"lost in {len(lost)} bursts from {shape}: 0",
            0,
            "calls",
            sum(lost),
            f"the slowest took {max(took):.2f} s" if max(took) > 0.5 else "",
        )
        section.ask("rows more or less than calls in these bursts: 0", 0, "rows", sum(wrong))


def single(section: Section, what: str, unit: str, value: float, note: str = "") -> None:
    """A row of one value."""
    section.rows.append(Row(what, unit, value, value, value, (value,), note=note))
