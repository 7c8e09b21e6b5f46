"""A million events per second for a minute, and a burst: what is lost, and what recording takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
# Rings and perf buffers in turn.
TRANSPORTS = {"rings": "scope-ebpf, rings", "perf": "scope-ebpf, perf buffers"}
TURN_SECONDS, TURN_QUICK_SECONDS = 6, 2
TURNS, QUICK_TURNS = 5, 1
BURST_CALLS = 1_000_000
BURSTS, QUICK_BURSTS = 9, 2
# By then the last segment is on disk: the recorder writes one every 0.7 s.
SETTLE_SECONDS = 2.0


def measure(setting: Setting) -> Section:
    """First the minute, then both transports in turn, then perf record at the same rate, then bursts."""
    section = Section(NAME, TITLE)
    seconds = QUICK_SECONDS if setting.quick else SECONDS
    setting.say(f"{NAME}: {seconds} s of {RATE:,} calls per second")
    sustain(setting, section, seconds)
    in_turn(setting, section)
    if setting.tools["perf"]:
        seconds = PERF_QUICK_SECONDS if setting.quick else PERF_SECONDS
        setting.say(f"{NAME}: perf record, {seconds} s")
        sustain_perf(setting, section, seconds)
    else:
        section.notes.append("perf record: not measured, perf is missing")
    setting.say(f"{NAME}: bursts")
    bursts(setting, section)
    return section


@dataclass(frozen=True)
class Sustained:
    """One recording at the full rate.

    Attributes:
        made: what the target did.
        cpu: of the recorder, in percent of one, up to the last segment on disk.
        peak_bytes, ended_peak_bytes: the recorder's memory, without and with the summary at its end.
        lost, rows: events that it lost, and calls that it stored.
        unexplained: calls that are neither stored nor counted as lost.
        stored_bytes: on disk.
    """

    made: Made
    cpu: float
    peak_bytes: int
    ended_peak_bytes: int | None
    lost: int
    rows: int
    unexplained: int
    stored_bytes: int


def record(setting: Setting, seconds: int, transport: str) -> Sustained:
    """scope-ebpf at the full rate."""
    recording = setting.path("sustained.scope")
    with setting.getppid() as target:
        tracer = tracers.scope_ebpf(SCOPE_EBPF, [target.pid], recording, transport=transport)
        with tracer:
            time.sleep(1)
            before = tracer.use_now()
            made = target.make(RATE * seconds, batch=BATCH, rate=RATE)
            time.sleep(SETTLE_SECONDS)
            after = tracer.use_now()
    found = Sustained(
        made,
        100 * (after.cpu_seconds - before.cpu_seconds) / (made.elapsed_ns / 1e9),
        after.peak_rss_bytes,
        tracer.use.peak_rss_bytes if tracer.use is not None else None,
        tracers.lost_in_all(recording),
        stored_calls(recording),
        unexplained_calls(recording, made.calls),
        sum(file.stat().st_size for file in recording.rglob("*.parquet")),
    )
    setting.path("sustained.scope")
    return found


def sustain(setting: Setting, section: Section, seconds: int) -> None:
    """A minute of it, through rings."""
    calls = RATE * seconds
    found = record(setting, seconds, "rings")
    rate, cpu = found.made.rate, found.cpu
    single(section, "calls per second that were made", "/s", rate)
    single(section, "scope-ebpf: recorder's CPU", "% of one", cpu, "up to the last segment on disk")
    single(section, "scope-ebpf: peak memory", "MB", found.peak_bytes / 1e6, "96 MB of it is rings")
    if found.ended_peak_bytes is not None:
        single(
            section,
            "scope-ebpf: peak memory with the summary at the end",
            "MB",
            found.ended_peak_bytes / 1e6,
        )
    single(section, "scope-ebpf: on disk per call", "B", found.stored_bytes / calls)
    section.ask(f"lost of {calls:,} calls at {RATE:,} per second: 0", 0, "calls", found.lost)
    section.ask(
        "rows more or less than calls: 0",
        0,
        "rows",
        abs(calls - found.rows),
        f"{found.rows - calls:+,}" if found.rows != calls else "",
    )
    slow = abs(rate / RATE - 1) > 0.02
    note = f"at {rate:,.0f} calls/s: the machine could not make more" if slow else ""
    section.ask("recorder's CPU: at most 50 % of one", 50, "%", cpu, note)
    section.ask("recorder's memory: at most 300 MB", 300, "MB", found.peak_bytes / 1e6)


def unexplained_calls(recording: Path, made: int) -> int:
    """How many of the calls that were made are neither stored nor counted as lost, or stored twice.

    A few of those that were lost may be others than getppid: what the target does besides.
    """
    rows, lost = stored_calls(recording), tracers.recorded(recording)["syscalls"]["lost"]
    return max(made - rows - lost, rows - made, 0)


def in_turn(setting: Setting, section: Section) -> None:
    """Both transports at the full rate, one after the other, which is first alternating."""
    turns = QUICK_TURNS if setting.quick else TURNS
    seconds = TURN_QUICK_SECONDS if setting.quick else TURN_SECONDS
    found: dict[str, list[Sustained]] = {name: [] for name in TRANSPORTS}
    for number in range(turns):
        setting.say(f"{NAME}: rings and perf buffers, {seconds} s each, {number + 1} of {turns}")
        for name in sorted(TRANSPORTS, reverse=number % 2 == 0):
            found[name].append(record(setting, seconds, name))
    for name, what in TRANSPORTS.items():
        runs = found[name]
        note = f"of {seconds} s at {RATE:,} per second"
        section.add(
            f"{what}: calls per second that were made", "/s", [run.made.rate for run in runs]
        )
        section.add(f"{what}: recorder's CPU", "% of one", [run.cpu for run in runs], note)
        section.add(f"{what}: peak memory", "MB", [run.peak_bytes / 1e6 for run in runs])
        section.add(f"{what}: lost", "%", [100 * run.lost / (RATE * seconds) for run in runs], note)
        unexplained = sum(run.unexplained for run in runs)
        section.ask(
            f"{what}: calls that are neither stored nor counted as lost: 0", 0, "calls", unexplained
        )


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
    """As fast as possible: from one CPU, and from all at once; through rings and perf buffers in turn."""
    cpus = sorted({setting.target_cpu, *setting.other_cpus})
    shapes = {"one CPU": [setting.target_cpu], f"{len(cpus)} CPUs at once": cpus}
    for shape, places in shapes.items():
        found: dict[str, list[Burst]] = {name: [] for name in TRANSPORTS}
        for _ in range(QUICK_BURSTS if setting.quick else BURSTS):
            for name, runs in found.items():
                runs.append(burst(setting, places, name))
        for name, what in TRANSPORTS.items():
            took, lost, unexplained = zip(*found[name], strict=True)
            section.add(f"{what}: burst of {BURST_CALLS:,} calls from {shape}", "s", took)
            section.add(f"{what}: burst from {shape}: lost", "calls", lost)
            asked = f"{what}: calls of bursts from {shape} neither stored nor counted as lost: 0"
            section.ask(asked, 0, "calls", sum(unexplained))
            if name == "rings":
                section.ask(
                    f"lost in {len(lost)} bursts from {shape}: 0",
                    0,
                    "calls",
                    sum(lost),
                    f"the slowest took {max(took):.2f} s" if max(took) > 0.5 else "",
                )


class Burst(NamedTuple):
    """Its seconds, what was lost, and how many calls are neither stored nor counted as lost."""

    seconds: float
    lost: int
    unexplained: int


def burst(setting: Setting, places: list[int], transport: str) -> Burst:
    """One burst from these CPUs."""
    recording = setting.path("burst.scope")
    with ExitStack() as stack:
        targets = [stack.enter_context(setting.getppid(cpu)) for cpu in places]
        pids = [target.pid for target in targets]
        with tracers.scope_ebpf(SCOPE_EBPF, pids, recording, transport=transport):
            time.sleep(1)
            share = BURST_CALLS // len(targets)
            waiting: list[Callable[[], Made]] = [target.begin(share) for target in targets]
            made = [wait() for wait in waiting]
    ended = max(each.begun_ns + each.elapsed_ns for each in made)
    return Burst(
        (ended - min(each.begun_ns for each in made)) / 1e9,
        tracers.lost_in_all(recording),
        unexplained_calls(recording, sum(each.calls for each in made)),
    )


def single(section: Section, what: str, unit: str, value: float, note: str = "") -> None:
    """A row of one value."""
    section.rows.append(Row(what, unit, value, value, value, (value,), note=note))
