"""What one recorded system call costs the process that makes it, and what it costs the others."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tracers
from getppid import Getppid
from results import Section
from setting import ROOT, SCOPE_EBPF, Setting

from scope_ebpf.loaders.libbpf import BpfObject

NAME = "call-cost"
TITLE = "Cost in the target of one recorded system call"
ROUNDS, QUICK_ROUNDS = 9, 2
BATCH = 10_000
OWN, PERF_BUFFERS = "scope-ebpf", "scope-ebpf --transport perf"
# Of the compilers that the Makefile knows, newest first.
COMPILERS = ("clang", *(f"clang-{version}" for version in (19, 18, 17, 16, 15, 14, 20, 21, 22)))
ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}


@dataclass
class Variant:
    """A way to trace, and what it was seen to cost.

    Attributes:
        name: in the results.
        calls: how many the target makes while it is traced so.
        needs: the tool that it takes.
        trace: starts it on a process; what it gives may be asked `seen()` after its end.
    """

    name: str
    calls: int
    needs: str | None
    trace: Callable[[int], AbstractContextManager[tracers.Tracer | None]]
    traced: list[float] = field(default_factory=list)
    added: list[float] = field(default_factory=list)
    unrelated: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)


def measure(setting: Setting) -> Section:
    """Each variant in each round on a new process: untraced, then traced, then one beside it.

    The cost that is added is the difference within a process, so that what changes between rounds
    falls out. The order of the variants rotates. strace and perf trace are not kept off the
    target's CPU: they would be slower for it (strace, which stops the target twice per call, seven
    times).
    """
    section = Section(NAME, TITLE)
    cpus = setting.other_cpus
    empty = build_empty(setting, section)
    variants = [
        Variant(
            OWN,
            1_000_000,
            None,
            lambda pid: tracers.scope_ebpf(
                SCOPE_EBPF, [pid], setting.path("cost.scope"), cpus=cpus
            ),
        ),
        Variant(
            PERF_BUFFERS,
            1_000_000,
            None,
            lambda pid: tracers.scope_ebpf(
                SCOPE_EBPF, [pid], setting.path("cost.scope"), transport="perf", cpus=cpus
            ),
        ),
        Variant(
            "scope-ebpf --families syscalls",
            1_000_000,
            None,
            lambda pid: tracers.scope_ebpf(
                SCOPE_EBPF, [pid], setting.path("cost.scope"), families="syscalls", cpus=cpus
            ),
        ),
        Variant(
            "perf record",
            100_000,
            "perf",
            lambda pid: tracers.perf_record([pid], setting.path("cost.data"), cpus=cpus),
        ),
        Variant(
            "perf trace",
            10_000,
            "perf",
            lambda pid: tracers.perf_trace(pid, setting.path("cost.txt")),
        ),
        Variant(
            "bpftrace printf",
            20_000,
            "bpftrace",
            lambda pid: tracers.bpftrace_printf(pid, setting.path("cost.txt"), cpus=cpus),
        ),
        Variant(
            "strace", 10_000, "strace", lambda pid: tracers.strace(pid, setting.path("cost.txt"))
        ),
    ]
    if empty is not None:
        program = empty
        variants.insert(
            0,
            Variant("two empty programs: the floor", 1_000_000, None, lambda _: attached(program)),
        )
    for variant in list(variants):
        if variant.needs is not None and not setting.tools[variant.needs]:
            section.notes.append(f"{variant.name}: not measured, {variant.needs} is missing")
            variants.remove(variant)
    untraced: list[float] = []
    for number in range(QUICK_ROUNDS if setting.quick else ROUNDS):
        setting.say(f"{NAME}: round {number + 1}")
        for variant in variants[number % len(variants) :] + variants[: number % len(variants)]:
            try:
                untraced.append(measure_once(setting, variant))
            except (RuntimeError, OSError) as error:
                section.notes.append(f"{variant.name}: {error}")
    report(section, untraced, variants)
    return section


def measure_once(setting: Setting, variant: Variant) -> float:
    """One variant on a new process; returns what a call cost that process before."""
    calls = variant.calls // 4 if setting.quick else variant.calls
    batch = min(BATCH, calls // 20)
    with setting.getppid() as target, setting.getppid() as beside:
        plain, plain_beside = (ns_per_call(each, 200_000, BATCH) for each in (target, beside))
        with variant.trace(target.pid) as tracer:
            traced = ns_per_call(target, calls, batch)
            beside_traced = ns_per_call(beside, 200_000, BATCH)
    variant.traced.append(traced)
    variant.added.append(traced - plain)
    variant.unrelated.append(beside_traced - plain_beside)
    if tracer is not None:
        variant.seen.append(100 * tracer.seen() / calls)
    return plain


def ns_per_call(target: Getppid, calls: int, batch: int) -> float:
    """What a call takes, in the median batch."""
    return target.make(calls, batch=batch).ns_per_call


def report(section: Section, untraced: list[float], variants: list[Variant]) -> None:
    """Rows and targets."""
    section.add("untraced: a call", "ns", untraced)
    middle = {}
    for variant in variants:
        section.add(f"{variant.name}: a call", "ns", variant.traced)
        seen = f"{statistics.median(variant.seen):.4g} % of the calls seen" if variant.seen else ""
        middle[variant.name] = section.add(
            f"{variant.name}: added by tracing", "ns", variant.added, seen
        )
    for variant in variants:
        section.add(f"{variant.name}: added to an unrelated process", "ns", variant.unrelated)
    own = middle.get(OWN)
    section.ask("added to a call: at most 200 ns", 200, "ns", own)
    for name, asked, limit in (
        ("perf record", "of what perf record adds: at most 1/4", 1 / 4),
        ("bpftrace printf", "of what bpftrace's printf adds: at most 1/40", 1 / 40),
        ("strace", "of what strace adds: at most 1/40", 1 / 40),
    ):
        other = middle.get(name)
        ratio = own / other if own is not None and other else None
        note = f"1/{1 / ratio:.1f}" if ratio else f"{name} was not measured"
        section.ask(asked, limit, "", ratio, note)
    through_perf = middle.get(PERF_BUFFERS)
    if own is not None and through_perf is not None:
        section.notes.append(
            f"scope-ebpf uses rings; through perf buffers a recorded call costs {through_perf - own:.0f} ns"
            " more"
        )
    floor = middle.get("two empty programs: the floor")
    if own is not None and floor is not None:
        section.notes.append(
            f"of the {own:.0f} ns that scope-ebpf adds, {floor:.0f} ns are the kernel's slow path"
            " and the entry of any two programs; the rest is recording"
        )


def build_empty(setting: Setting, section: Section) -> Path | None:
    """Compile the empty programs; None, with a note, where there is no clang."""
    compiler = next(
        (name for name in (os.environ.get("CLANG", ""), *COMPILERS) if name and shutil.which(name)),
        None,
    )
    if compiler is None:
        section.notes.append("two empty programs, the floor: not measured, clang is missing")
        return None
    built = setting.directory / "empty.bpf.o"
    architecture = ARCHITECTURES[os.uname().machine]
    command = [compiler, "-g", "-O2", "-target", "bpf", "-mcpu=v3", "-I", str(ROOT / "probes")]
    command += [f"-D__TARGET_ARCH_{architecture}", "-c", str(ROOT / "bench" / "empty.bpf.c")]
    subprocess.run([*command, "-o", str(built)], check=True)
    return built


@contextmanager
def attached(built: Path) -> Iterator[None]:
    """The empty programs at work; this process holds them."""
    with BpfObject(built) as programs:
        programs.load()
        programs.attach("empty_enter", "empty_exit")
        yield
