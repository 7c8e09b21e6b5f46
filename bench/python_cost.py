"""What it costs a Python program to be followed inside: stacks, contexts, work items."""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tracers
from programs import ToldProgram
from results import Section
from setting import SCOPE_EBPF, Setting

NAME = "python-cost"
TITLE = "Cost in a Python program of stacks and logical contexts"
ROUNDS, QUICK_ROUNDS = 7, 2
TARGET = Path(__file__).with_name("python_target.py")
SPINE = "processes,syscalls,messages,offcpu"
LONG_WAIT = "10s"  # so that only turns of messages get stacks


@dataclass
class Case:
    """What is compared: a kind of work, without and with some families.

    Attributes:
        name: in the results.
        work, depth: as python_target.py has them.
        count: how often the work is done in a batch.
        before, after: the families of both recordings; None: not traced.
        unit: of what is done.
    """

    name: str
    work: str
    depth: int
    count: int
    before: str | None
    after: str
    added: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


CASES = (
    ("a stack at depth 20", "turns", 20, 20_000, SPINE, f"{SPINE},samples"),
    ("a stack at depth 60", "turns", 60, 20_000, SPINE, f"{SPINE},samples"),
    ("a system call in an asyncio task, its context", "task_calls", 6, 50_000, SPINE,
     f"{SPINE},contexts"),
    ("a system call of a thread without contexts", "calls", 6, 50_000, SPINE,
     f"{SPINE},samples,contexts,gil"),
    ("a context that is made", "contexts", 6, 20_000, None, "processes,contexts"),
    ("a work item, put and got", "submits", 6, 20_000, None, "processes,contexts"),
)  # fmt: skip


class Target(ToldProgram):
    """python_target.py at work; a context manager that ends it."""

    def __init__(self, work: str, depth: int) -> None:
        """Prepare."""
        super().__init__("the Python target", [sys.executable, str(TARGET), work, str(depth)])

    def ns(self, count: int) -> float:
        """What one piece of work takes: the median of some batches."""
        found = []
        for _ in range(5):
            self.tell(str(count))
            found.append(float(self.answer(1)[0]))
        return statistics.median(found)


def measure(setting: Setting) -> Section:
    """Each case in each round, on one process: with the first families, then with the second."""
    section = Section(NAME, TITLE)
    cases = [Case(*case) for case in CASES]
    for number in range(QUICK_ROUNDS if setting.quick else ROUNDS):
        setting.say(f"{NAME}: round {number + 1}")
        for case in cases[number % len(cases) :] + cases[: number % len(cases)]:
            with Target(case.work, case.depth) as target:
                before = traced(setting, target, case, case.before)
                after = traced(setting, target, case, case.after)
            case.plain.append(before)
            case.added.append(after - before)
    middle = {}
    for case in cases:
        section.add(f"{case.name}: before", "ns", case.plain)
        middle[case.name] = section.add(f"{case.name}: added", "ns", case.added)
    section.ask("a stack at depth 20: at most 1 µs", 1000, "ns", middle[CASES[0][0]])
    return section


def traced(setting: Setting, target: Target, case: Case, families: str | None) -> float:
    """What the work takes while these families are recorded."""
    if families is None:
        return target.ns(case.count)
    with tracers.scope_ebpf(
        SCOPE_EBPF,
        [target.pid],
        setting.path("python.scope"),
        families=families,
        cpus=setting.other_cpus,
        more=("--stacks-over", LONG_WAIT),
    ):
        return target.ns(case.count)
