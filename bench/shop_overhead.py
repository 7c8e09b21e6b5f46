"""What tracing the shop costs the shop, and what it costs the recorder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import bpf_statistics
import numpy as np
import tracers
from call_cost import attached, build_empty
from numpy.typing import NDArray
from results import Row, Section
from setting import SCOPE_EBPF, Setting
from shop import MeasuredShop

Samples = NDArray[np.float64]

NAME = "shop-overhead"
TITLE = "Overhead on the shop, all families on"
ROUNDS, QUICK_ROUNDS = 32, 2
REQUESTS, QUICK_REQUESTS = 800, 300
# The first segment comes after the import of polars, which is not part of a steady recording.
STEADY_SECONDS = 15.0
EVENTS_PER_SECOND = 40_000
PACED_SECONDS, QUICK_PACED_SECONDS = 20.0, 5.0
PACED_RUNS, QUICK_PACED_RUNS = 3, 1
CLIENTS = 4
UNTRACED, SCOPE, PERF_BUFFERS = "untraced", "scope-ebpf", "scope-ebpf --transport perf"
TRANSPORTS = {"rings": "", "perf": "through perf buffers: "}
RESAMPLES = 20_000
CALL_PROGRAMS = ("on_sys_enter", "on_sys_exit")
CONFIDENCE = 95


def measure(setting: Setting) -> Section:
    """Rounds of windows, then the kernel's statistics, then the recorder at a steady rate."""
    section = Section(NAME, TITLE)
    shop = setting.shop()
    per_request = rounds(setting, section, shop)
    events = statistics_window(setting, section, shop, per_request)
    paced(setting, section, shop, events)
    return section


@contextmanager
def traced(setting: Setting, shop: MeasuredShop, transport: str) -> Iterator[None]:
    """scope-ebpf at work on the shop, with all families."""
    recording = setting.path("shop.scope")
    with tracers.scope_ebpf(SCOPE_EBPF, shop.pids, recording, transport=transport):
        wait_until_steady(recording)
        yield


@contextmanager
def traced_by_perf(setting: Setting, shop: MeasuredShop) -> Iterator[None]:
    """perf record at work on the shop: system calls only."""
    # it follows the children to come, but has to be told of those that exist
    with tracers.perf_record(shop.processes(), setting.path("shop.data")):
        yield


def wait_until_steady(recording: Path) -> None:
    """Until the recorder writes: it imports polars while it already records."""
    deadline = time.monotonic() + STEADY_SECONDS
    while not (recording / "meta.json").exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"the recorder has not begun to write after {STEADY_SECONDS:.0f} s")
        time.sleep(0.02)
    time.sleep(0.3)


def rounds(setting: Setting, section: Section, shop: MeasuredShop) -> float:
    """CPU time per request with each kind of tracing; returns what it is without any, in ns.

    All windows of a round make the same requests, one after the other; which is first rotates.
    Attaching and detaching are outside of what is counted.
    """
    variants: dict[str, Callable[[], AbstractContextManager[None]]] = {
        UNTRACED: nullcontext,
        SCOPE: lambda: traced(setting, shop, "rings"),
        PERF_BUFFERS: lambda: traced(setting, shop, "perf"),
    }
    built = build_empty(setting, section)
    if built is not None:
        empty = built
        variants["two empty programs: the floor"] = lambda: attached(empty)
    if setting.tools["perf"]:
        variants["perf record, system calls only"] = lambda: traced_by_perf(setting, shop)
    else:
        section.notes.append("perf record: not measured, perf is missing")
    names = list(variants)
    found: dict[str, list[float]] = {name: [] for name in names}
    count = QUICK_ROUNDS if setting.quick else ROUNDS
    requests = QUICK_REQUESTS if setting.quick else REQUESTS
    for number in range(count):
        setting.say(f"{NAME}: round {number + 1} of {count}")
        first = number % len(names)
        for name in names[first:] + names[:first]:
            with variants[name]():
                loaded = shop.load(requests, clients=CLIENTS, seed=number)
            found[name].append(loaded.cpu_ns_per_request / 1000)
    for name, taken in found.items():
        section.add(f"{name}: CPU time per request", "µs", taken)
    for name in names[1:]:
        percent = [
            100 * (with_it / without - 1)
            for with_it, without in zip(found[name], found[UNTRACED], strict=True)
        ]
        middle, low, high = center(percent)
        spread = f"{CONFIDENCE} % confidence"
        note = "mean of the middle half of the rounds"
        section.rows.append(
            Row(f"{name}: overhead", "%", middle, low, high, tuple(percent), spread, note)
        )
        if name == SCOPE:
            section.ask(
                "CPU time per request: at most 2 % over untraced",
                2,
                "%",
                middle,
                f"{spread}: {low:.1f} to {high:.1f} %, {count} rounds",
            )
    return 1000 * float(np.median(found[UNTRACED]))


def center(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of the middle half, and its bootstrap confidence interval.

    Windows that something else disturbed fall out, and it varies less than the median.
    """
    samples = np.array(values)
    drawn = np.random.default_rng(1).choice(samples, (RESAMPLES, len(samples)))
    low, high = np.percentile(middle_mean(drawn), [50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2])
    return float(middle_mean(samples[None])[0]), float(low), float(high)


def middle_mean(rows: Samples) -> Samples:
    """The mean of the middle half of each row."""
    cut = rows.shape[1] // 4
    middle: Samples = np.sort(rows, axis=1)[:, cut : rows.shape[1] - cut].mean(axis=1)
    return middle


def statistics_window(
    setting: Setting, section: Section, shop: MeasuredShop, plain_ns: float
) -> float:
    """Run times of the programs by the kernel's count; returns events per request.

    The count is of the whole host. What other processes (the load, the recorder) pay is estimated
    from a window in which an idle process is recorded instead, and taken off.
    """
    setting.say(f"{NAME}: the kernel's statistics")
    requests = QUICK_REQUESTS if setting.quick else 4 * REQUESTS
    empty_ns = empty_run_ns(setting, section, shop)
    with setting.getppid() as idle:
        idle_runs, _ = count_runs(setting, shop, (idle.pid,), requests)
    runs, tables = count_runs(setting, shop, shop.pids, requests)
    own_calls = tables["syscalls"]["rows"]
    net_ns = 0.0
    for name, each in runs.items():
        net_ns += each.run_time_ns - empty_ns * each.runs
        if name in CALL_PROGRAMS and name in idle_runs:
            others = max(each.runs - own_calls, 0)
            net_ns -= others * max(idle_runs[name].ns_per_run - empty_ns, 0)
    net_ns /= requests
    total_ns = sum(each.run_time_ns for each in runs.values()) / requests
    idle_ns = sum(each.run_time_ns for each in idle_runs.values()) / requests
    section.add(
        "programs: run time per request, whole host",
        "µs",
        [total_ns / 1000],
        f"with what the statistics take: {empty_ns:.0f} ns a run by an empty program",
    )
    section.add("the same while an idle process is recorded", "µs", [idle_ns / 1000])
    section.add(
        "programs: run time per request, net, in the shop",
        "µs",
        [net_ns / 1000],
        f"without the statistics and other processes' calls; {100 * net_ns / plain_ns:.2g} % of"
        " the CPU time of a request, to which the kernel's slow path comes",
    )
    for name, each in runs.items():
        there = idle_runs.get(name)
        beside = f"; not recorded: {there.ns_per_run:.0f} ns" if there else ""
        section.add(
            f"{name}: a run",
            "ns",
            [each.ns_per_run],
            f"{each.runs / requests:.1f} per request{beside}",
        )
    events = count_events(tables) / requests
    section.add("events per request", "", [events], "a message is a system call: counted once")
    return events


def count_runs(
    setting: Setting, shop: MeasuredShop, pids: Sequence[int], requests: int
) -> tuple[dict[str, bpf_statistics.ProgramRuns], dict[str, dict[str, int]]]:
    """What the programs do under the shop's load while `pids` are recorded, and what is stored."""
    recording = setting.path("shop.scope")
    with tracers.scope_ebpf(SCOPE_EBPF, pids, recording) as tracer:
        wait_until_steady(recording)
        with bpf_statistics.enabled():
            before = bpf_statistics.program_runs(tracer.pid)
            shop.load(requests, clients=CLIENTS)
            runs = bpf_statistics.since(before, bpf_statistics.program_runs(tracer.pid))
    return runs, tracers.recorded(recording)


def empty_run_ns(setting: Setting, section: Section, shop: MeasuredShop) -> float:
    """What a run of a program that does nothing takes by the kernel's count."""
    built = build_empty(setting, section)
    if built is None:
        return 0.0
    own = os.getpid()
    with attached(built), bpf_statistics.enabled():
        before = bpf_statistics.program_runs(own)
        shop.load(QUICK_REQUESTS, clients=CLIENTS)
        runs = bpf_statistics.since(before, bpf_statistics.program_runs(own)).values()
    return sum(each.run_time_ns for each in runs) / max(sum(each.runs for each in runs), 1)


def count_events(tables: dict[str, dict[str, int]]) -> int:
    """Events of a recording with all families: a message is a system call as well."""
    return sum(tables[name]["rows"] for name in ("syscalls", "offcpu", "processes", "connections"))


def paced(setting: Setting, section: Section, shop: MeasuredShop, events: float) -> None:
    """The recorder's CPU at a steady rate of events."""
    seconds = QUICK_PACED_SECONDS if setting.quick else PACED_SECONDS
    rate = EVENTS_PER_SECOND / events
    clients = 2 * CLIENTS
    setting.say(f"{NAME}: {rate:.0f} requests per second")
    latency = shop.load(200, clients=CLIENTS).p50_ms / 1000
    think = max(clients / rate - latency, 0.0)
    used: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    rates: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    lost: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    for _ in range(QUICK_PACED_RUNS if setting.quick else PACED_RUNS):
        for name in TRANSPORTS:
            recording = setting.path("shop.scope")
            tracer = tracers.scope_ebpf(SCOPE_EBPF, shop.pids, recording, transport=name)
            with tracer:
                wait_until_steady(recording)
                before = tracer.use_now()
                loaded = shop.load(int(rate * seconds), clients=clients, think_seconds=think)
                time.sleep(1)
                after = tracer.use_now()
            rates[name].append(count_events(tracers.recorded(recording)) / loaded.seconds)
            used[name].append(100 * (after.cpu_seconds - before.cpu_seconds) / loaded.seconds)
            lost[name].append(tracers.lost_in_all(recording))
            # the next run comes closer
            think = max(think + clients * (1 / rate - 1 / loaded.rate), 0.0)
    percent: dict[str, float | None] = {}
    for name, what in TRANSPORTS.items():
        section.add(f"{what}events per second", "/s", rates[name])
        percent[name] = section.add(f"{what}recorder's CPU", "% of one", used[name])
        section.add(f"{what}lost", "events", lost[name])
        scaled = [
            each * EVENTS_PER_SECOND / at for each, at in zip(used[name], rates[name], strict=True)
        ]
        title = f"{what}recorder's CPU scaled to {EVENTS_PER_SECOND:,} events/s"
        section.add(title, "% of one", scaled)
    at = float(np.median(rates["rings"]))
    section.ask(
        f"recorder's CPU at {EVENTS_PER_SECOND:,} events/s: at most 3 % of one",
        3,
        "%",
        percent["rings"],
        f"at {at:,.0f} events/s" if abs(at / EVENTS_PER_SECOND - 1) > 0.05 else "",
    )
