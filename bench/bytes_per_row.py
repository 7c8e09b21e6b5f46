"""What a row takes on disk, of the shop's recording."""

from __future__ import annotations

import statistics

import tracers
from results import Section
from setting import SCOPE_EBPF, Setting
from shop_overhead import wait_until_steady

from scope_ebpf import open_recording
from scope_ebpf.recording.schema import SCHEMAS

NAME = "bytes-per-row"
TITLE = "Bytes on disk per row of the shop's recording"
REPEATS, QUICK_REPEATS = 3, 1
REQUESTS, QUICK_REQUESTS = 6000, 500
# Kept for summary_time.py.
RECORDING = "shop-kept.scope"


def measure(setting: Setting) -> Section:
    """scope-ebpf and perf record in turn, under the same load."""
    section = Section(NAME, TITLE)
    sizes: dict[str, list[float]] = {name: [] for name in SCHEMAS}
    rows: dict[str, list[int]] = {name: [] for name in SCHEMAS}
    everything: list[float] = []
    perf: list[float] = []
    requests = QUICK_REQUESTS if setting.quick else REQUESTS
    for number in range(QUICK_REPEATS if setting.quick else REPEATS):
        setting.say(f"{NAME}: round {number + 1}")
        record_shop(setting, requests, seed=number)
        recording = open_recording(setting.directory / RECORDING)
        total = 0
        for name in SCHEMAS:
            count, size = recording.rows(name), recording.size_bytes(name)
            total += size
            if count:
                rows[name].append(count)
                sizes[name].append(size / count)
        calls = recording.rows("syscalls")
        everything.append(total / calls)
        if setting.tools["perf"]:
            perf.append(perf_bytes(setting, requests, seed=number))
    for name, samples in sizes.items():
        if samples:
            note = f"{statistics.median(rows[name]):,.0f} rows"
            section.add(f"scope-ebpf: {name}", "B/row", samples, note)
    section.add("scope-ebpf: all tables per system call", "B", everything)
    if setting.tools["perf"]:
        section.add("perf record: per system call", "B", perf, "the raw system calls only")
    else:
        section.notes.append("perf record: not measured, perf is missing")
    section.ask("a row of syscalls: at most 12 B", 12, "B", statistics.median(sizes["syscalls"]))
    return section


def record_shop(setting: Setting, requests: int, *, seed: int) -> None:
    """Record the shop at its full speed; the recording stays at RECORDING."""
    shop = setting.shop()
    recording = setting.path(RECORDING)
    with tracers.scope_ebpf(SCOPE_EBPF, shop.pids, recording):
        wait_until_steady(recording)
        shop.load(requests, seed=seed)


def perf_bytes(setting: Setting, requests: int, *, seed: int) -> float:
    """Bytes per system call of perf record, under the same load."""
    shop = setting.shop()
    data = setting.path("shop.data")
    # perf follows the children to come, but has to be told of those that exist
    tracer = tracers.perf_record(shop.processes(), data)
    with tracer:
        shop.load(requests, seed=seed)
    size = data.stat().st_size
    setting.path("shop.data")
    return size / max(tracer.seen(), 1)
