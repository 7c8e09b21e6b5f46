"""Tracers that others wrote see the same: the same workload at the same time, counted by both.

One run beside strace, which stops the process at each call, one beside bpftrace, and one beside the tools of
BCC (`-k 'not bcc and not bpfcc'` leaves out what compiles). The target waits at its gate until they are at
work, so each sees the same calls. Where they rightly count otherwise, the test says so by name; everything
else must be equal, also what is not deterministic, such as futex.

Times cannot be equal: both look at the clock at the same moment of the kernel's, but one after the other.
What lies between their two looks is a part of the BPF programs that run at that moment, with whatever
interrupts them, and the kernel's own steps from one program to the next. How long programs run the kernel
counts itself (program_times), also when an emulated CPU stops in the midst of one because its host does
something else. So:

- Over n moments two sums are apart by no more than all these programs ran in all, and n times STEPS_NS.
  That holds for every sum, and for all of them together.
- For one moment that is the mean of it; and by Markov's inequality no more than a third of what is positive
  is above three times its mean. So two thirds of the sums are within three times the mean for their events.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf.syscalls import syscall_name
from tests.lab import workload
from tests.lab.leftovers import identities
from tests.lab.program_times import Program, program_times
from tests.lab.recorded import CORE, Way, recording, ways
from tests.lab.recorded import workload as waiting_workload
from tests.lab.tools import (
    BPFTRACE_COUNTS,
    EXECSNOOP,
    KINDS,
    OFFCPUTIME,
    STRACE,
    SYSCOUNT,
    TCPLIFE,
    TCPLIFE_BT,
    Kind,
    Tool,
    bpftrace_map,
    execsnoop_rows,
    not_offered,
    offcputime_totals,
    strace_counts,
    syscount_rows,
    tcplife_rows,
)
from tests.live.recording import Session

# The tools of BCC are compiled one after the other on one emulated CPU.
pytestmark = [pytest.mark.lab, pytest.mark.timeout(400)]

# From one tracer's program to the next one's at the same moment, on an emulated CPU: a tracepoint calls them
# one after the other; from sched_switch to finish_task_switch() the switch itself has to be made.
STEPS_NS = {"call": 5_000, "switch": 75_000}
# Markov: at most 1 / TIMES_MEAN of the sums are further apart than that many times the mean.
TIMES_MEAN = 3
# Hundredths of a millisecond, and whole ones.
ROUNDED_NS = {TCPLIFE: 10_000, TCPLIFE_BT: 1_000_000}
# From the start of its timer until it is off its CPU, a thread that sleeps takes so long at most.
LEAVING_NS = 250_000
# Which programs run at these moments: ours, bpftrace's (after the tracepoint), BCC's (its function).
CALL_PROGRAMS = r"on_sys_(enter|exit).*|sys_enter|sys_exit|raw_syscalls__s"
SWITCH_PROGRAMS = "on_sched_switch|sched_stat_runt|oncpu"


@dataclass(frozen=True)
class Compared:
    """One run of the workload, with what ours recorded and the others printed."""

    session: Session
    said: dict[str, str]
    programs: list[Program]

    @property
    def note(self) -> Any:
        """What the workload told."""
        return self.session.note

    @cached_property
    def calls(self) -> pl.DataFrame:
        """The calls that returned: only these can be counted where they end."""
        table = self.session.table("syscalls")
        return table.filter(pl.col("status").is_in(["complete", "began_before"]))

    def by(self, column: str, *conditions: Any, **values: Any) -> dict[Any, int]:
        """How many of these calls there are."""
        found = self.calls.filter(*conditions, **values)
        return dict(found.group_by(column).len().iter_rows())

    def times(self, column: str, *conditions: Any, **values: Any) -> dict[Any, int]:
        """How long they took in all, of those that were seen from begin to end."""
        found = self.calls.filter(*conditions, status="complete", **values)
        return dict(found.group_by(column).agg(pl.col("duration_ns").sum()).iter_rows())

    def of(self, kind: Kind) -> str:
        """What a tool printed, if this kernel has it."""
        if (missing := not_offered(kind)) is not None:
            pytest.skip(f"optional: {kind} is not offered: {missing.reason}")
        return self.said[kind.name]


def run_beside(folder: Path, *kinds: Kind) -> Compared:
    """Run the workload under ours and these tools."""
    way: Way = ways()[0]
    said: dict[str, str] = {}
    before = identities("prog")
    with ExitStack() as stack:
        target = stack.enter_context(waiting_workload(folder))
        offered = [kind for kind in kinds if not_offered(kind) is None]
        tools = []
        for kind in offered:
            # one after the other: several compilers at once take more memory than the guest has
            tools.append(stack.enter_context(Tool(kind, target.pid, folder)))
            ready = tools[-1].is_ready()
            assert ready, f"{kind} does not work here: {tools[-1].said[-4000:]}"
        # Without uprobes: those make calls of the kernel's own (uprobe, uretprobe), at whose
        # numbers strace 6.1 crashes when it prints its summary.
        session = stack.enter_context(recording(folder, target, way, families=CORE))
        with program_times(before) as programs:
            session.note = target.work()
        assert session.wait() == 0, session.talk
        said = {tool.kind.name: tool.end() for tool in tools}
    assert session.table("losses").is_empty()
    return Compared(session, said, programs)


@pytest.fixture(scope="module")
def beside_strace(tmp_path_factory) -> Compared:
    """Strace stops each thread twice per call, so it has a run of its own: its times are its own, too."""
    return run_beside(tmp_path_factory.mktemp("strace"), STRACE)


@pytest.fixture(scope="module")
def beside_bpftrace(tmp_path_factory) -> Compared:
    """What bpftrace needs of the kernel is what ours needs: its types."""
    return run_beside(tmp_path_factory.mktemp("bpftrace"), BPFTRACE_COUNTS)


def tcplife() -> Kind:
    """BCC's or bpftrace's."""
    return TCPLIFE if not_offered(TCPLIFE) is None else TCPLIFE_BT


@pytest.fixture(scope="module")
def beside_bcc(tmp_path_factory) -> Compared:
    """The tools of BCC at once: they do not disturb each other's numbers."""
    kinds = (SYSCOUNT, EXECSNOOP, tcplife(), OFFCPUTIME)
    return run_beside(tmp_path_factory.mktemp("bcc"), *kinds)


def name_of(number: int) -> str:
    """The name of a call on this machine."""
    return syscall_name(number, platform.machine())


def assert_same_times(
    name: str,
    compared: Compared,
    sums: Mapping[Any, tuple[float, float, int]],
    moments: int,
    steps: str,
    programs: str,
) -> None:
    """That sums are the same within what lies between two looks at the clock.

    Args:
        name: of the file that gets the numbers.
        compared: where they come from.
        sums: nanoseconds of ours, of theirs, and over how many events.
        moments: at which each of both looks at the clock for one event.
        steps: which of STEPS_NS.
        programs: a regular expression for names of the programs that run at these moments.
    """
    assert sums
    events = sum(count for _, _, count in sums.values())
    at_work = [program for program in compared.programs if re.fullmatch(programs, program.name)]
    assert at_work
    between_ns = sum(program.ns for program in at_work) + events * moments * STEPS_NS[steps]
    apart = {key: abs(ours - theirs) for key, (ours, theirs, _) in sums.items()}
    together = abs(sum(ours - theirs for ours, theirs, _ in sums.values()))
    allowed = {key: TIMES_MEAN * between_ns * count / events for key, (_, _, count) in sums.items()}
    far = [str(key) for key in sums if apart[key] > allowed[key]]
    told = {
        "kernel": platform.release(),
        "events": events,
        "sum_ms": [round(sum(row[side] for row in sums.values()) / 1e6, 3) for side in (0, 1)],
        "together_ms": together / 1e6,
        "most_ms": max(apart.values()) / 1e6,
        "allowed_ms": between_ns / 1e6,
        "far": far,
        "sums": {str(key): row for key, row in sums.items()},
        "programs": {program.name: (program.runs, program.ns) for program in at_work},
    }
    folder = Path(os.environ["SCOPE_EBPF_LAB_RESULTS"])
    (folder / f"cross-{name}.json").write_text(json.dumps(told, indent=1))
    assert max(apart.values()) <= between_ns, told
    assert together <= between_ns, told
    assert len(far) <= len(sums) / TIMES_MEAN, told


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_tool_that_is_not_offered_fails_as_the_table_says(kind, tmp_path):
    """The table of exceptions is as much under test as the rest: one that works again must leave it."""
    missing = not_offered(kind)
    if missing is None:
        return  # that it works is what the other tests need
    with waiting_workload(tmp_path) as target, Tool(kind, target.pid, tmp_path) as tool:
        assert not tool.is_ready(), f"{kind} works here: strike it from NOT_OFFERED"
        assert re.search(missing.error, tool.said), tool.said


# ---- counts ----


def test_strace_counts(beside_strace):
    """Calls by name, of all processes together.

    Not comparable by name: strace leaves out numbers that it has no name for, and calls that
    do not return to the program, though the kernel's exit from the call is reached: a kill that ends its own
    process.
    """
    theirs = strace_counts(beside_strace.of(STRACE))
    ours = beside_strace.by("name")
    assert ours.pop(f"syscall_{workload.NO_SUCH_CALL}") == workload.UNKNOWN_CALLS
    assert ours.pop("kill") == 1
    theirs.pop("kill", None)
    assert differing(ours, theirs) == {}
    # the gate was open for both: that is one read of the target, whoever came first
    assert theirs["getppid"] == len(beside_strace.calls.filter(name="getppid"))


def differing(ours: dict[Any, Any], theirs: dict[Any, Any]) -> dict[Any, tuple[Any, Any]]:
    """What is not the same in both: ours, theirs."""
    return {
        key: (ours.get(key), theirs.get(key))
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key)
    }


def test_bpftrace_counts(beside_bpftrace):
    """Calls by number, of all processes together: those whose begin and end bpftrace saw.

    Its count of ends alone has each clone and clone3 twice: the child returns from it, too.
    """
    said = beside_bpftrace.of(BPFTRACE_COUNTS)
    # the read at the gate began before either
    ours = beside_bpftrace.by("number", status="complete")
    assert differing(ours, bpftrace_map(said, "timed")) == {}
    ends = bpftrace_map(said, "calls")
    born = {
        number: count for number, count in ours.items() if name_of(number) in ("clone", "clone3")
    }
    assert sum(born.values()) == len(
        beside_bpftrace.session.table("processes").filter(pl.col("event").is_in(["fork", "thread"]))
    )
    both = beside_bpftrace.by("number")
    assert differing({number: n + born.get(number, 0) for number, n in both.items()}, ends) == {}


def test_bcc_syscount_counts(beside_bcc):
    """Calls of the first process by name; it has no option to follow forks.

    With latencies it leaves out what began before, as the read at the gate.
    """
    theirs = {name: count for name, (count, _) in syscounted(beside_bcc).items()}
    ours = beside_bcc.by("name", tgid=beside_bcc.note["pid"], status="complete")
    assert differing(ours, theirs) == {}


def syscounted(compared: Compared) -> dict[str, tuple[int, float]]:
    """What syscount printed, with our names for what it has none for."""
    rows = syscount_rows(compared.of(SYSCOUNT))
    return {
        re.sub(r"\[unknown: (\d+)\]", lambda found: name_of(int(found[1])), name): row
        for name, row in rows.items()
    }


def test_bcc_execsnoop(beside_bcc):
    """Every exec of a child with its parent, arguments and result, also the one that failed."""
    pid, note = beside_bcc.note["pid"], beside_bcc.note["execs"]
    theirs = execsnoop_rows(beside_bcc.of(EXECSNOOP))
    lines = beside_bcc.session.table("processes").filter(event="exec")
    commands = dict(lines.select("tgid", "command_line").iter_rows())
    calls = beside_bcc.session.table("syscalls").filter(name="execve")
    ours = [(tgid, result) for tgid, result in calls.select("tgid", "result").iter_rows()]
    assert [(child, result) for child, _, result, _ in theirs] == ours
    assert {parent for _, parent, _, _ in theirs} == {pid}
    assert {child: line for child, _, result, line in theirs if not result} == commands
    assert [child for child, _, result, _ in theirs if result] == [note["failed"]]


def test_bcc_tcplife(beside_bcc):
    """Each end of each connection: its ports, and the bytes that went either way, in whole KiB."""
    said = beside_bcc.of(tcplife())
    theirs = {(row.local_port, row.remote_port): row for row in tcplife_rows(said)}
    messages = beside_bcc.session.table("messages").filter(kind="tcp")
    ends = messages.group_by("local_port", "remote_port").agg(
        pl.col("length_bytes").filter(pl.col("direction") == "send").sum().alias("sent"),
        pl.col("length_bytes").filter(pl.col("direction") == "receive").sum().alias("received"),
        pl.col("start_ns").min().alias("first_ns"),
        (pl.col("start_ns") + pl.col("duration_ns")).max().alias("last_ns"),
    )
    assert len(ends) == 2 * workload.CONNECTIONS
    ours = {(row["local_port"], row["remote_port"]): row for row in ends.to_dicts()}
    refused = (beside_bcc.note["connects"]["port"],)
    made = {ports: row for ports, row in theirs.items() if ports[1] not in refused}
    assert made.keys() == ours.keys()
    for ports, row in made.items():
        own = ours[ports]
        assert (row.sent_kib, row.received_kib) == (own["sent"] // 1024, own["received"] // 1024)
        # from its birth to its end: at least from its first message to its last
        assert row.span_ms * 1e6 >= own["last_ns"] - own["first_ns"] - ROUNDED_NS[tcplife()]


# ---- times ----


def test_bpftrace_times(beside_bpftrace):
    """The time in calls, by number; and how long threads ran, as the scheduler counts it."""
    said = beside_bpftrace.of(BPFTRACE_COUNTS)
    theirs, counts = bpftrace_map(said, "took"), bpftrace_map(said, "timed")
    ours = beside_bpftrace.times("number")
    assert ours.keys() == theirs.keys()
    sums = {name_of(number): (ours[number], theirs[number], counts[number]) for number in ours}
    assert_same_times("bpftrace-calls", beside_bpftrace, sums, 2, "call", CALL_PROGRAMS)


def test_bpftrace_run_time(beside_bpftrace):
    """What is left of a thread's time without its off-CPU intervals is what the scheduler let it run."""
    ran = bpftrace_map(beside_bpftrace.of(BPFTRACE_COUNTS), "ran")
    processes = beside_bpftrace.session.table("processes")
    offcpu = beside_bpftrace.session.table("offcpu")
    waits = beside_bpftrace.note["waits"]
    sums = {}
    for tid in (
        beside_bpftrace.note["pid"],
        waits["sleeper"],
        *beside_bpftrace.note["forks"]["pids"],
    ):
        away = offcpu.filter(tid=tid)
        ended = processes.filter(pl.col("event").is_in(["exit", "thread_exit"]), tid=tid)
        # the first thread stood at its gate when it was met; others begin with their birth
        first = away.filter(status="began_before")["start_ns"].to_list()
        born = processes.filter(pl.col("event").is_in(["fork", "thread"]), tid=tid)[
            "time_ns"
        ].to_list()
        began, end = (first or born)[0], ended["time_ns"][0]
        ours = end - began - away.filter(pl.col("start_ns") < end)["duration_ns"].sum()
        # a new thread waits for its first turn, and one that ends has work to do after its last event
        sums[tid] = (ours, ran[tid], len(away) + 20)
    assert_same_times("bpftrace-run-time", beside_bpftrace, sums, 1, "switch", SWITCH_PROGRAMS)


def test_bcc_syscount_times(beside_bcc):
    """The time in calls of the first process, by name."""
    theirs = syscounted(beside_bcc)
    ours = beside_bcc.times("name", tgid=beside_bcc.note["pid"])
    sums = {name: (ours[name], total * 1000, count) for name, (count, total) in theirs.items()}
    assert_same_times("bcc-syscount", beside_bcc, sums, 2, "call", CALL_PROGRAMS)


def test_bcc_offcputime(beside_bcc):
    """The time off the CPU by thread, of the intervals that both saw from begin to end."""
    theirs = offcputime_totals(beside_bcc.of(OFFCPUTIME))
    offcpu = beside_bcc.session.table("offcpu")
    # a new thread is ready to run from its birth on, and BCC first sees it when it leaves a CPU
    born = beside_bcc.session.table("processes").filter(pl.col("event").is_in(["fork", "thread"]))
    newborn = pl.col("tid").is_in(born["tid"].implode())
    newborn &= pl.col("start_ns") == pl.col("start_ns").min().over("tid")
    whole = offcpu.filter(~newborn, status="complete", tgid=beside_bcc.note["pid"])
    grouped = whole.group_by("tid").agg(pl.len(), pl.col("duration_ns").sum().alias("ns"))
    ours = {row["tid"]: (row["len"], row["ns"]) for row in grouped.to_dicts()}
    waits = beside_bcc.note["waits"]
    sure = {beside_bcc.note["pid"], waits["sleeper"], waits["waiter"]}
    sure |= {lock["tid"] for lock in waits["locks"]}
    assert sure <= ours.keys() & theirs.keys()
    sums = {
        tid: (ours.get(tid, (0, 0))[1], theirs.get(tid, 0) * 1000, ours.get(tid, (1, 0))[0])
        for tid in ours.keys() | theirs.keys()
    }
    assert_same_times("bcc-offcputime", beside_bcc, sums, 2, "switch", SWITCH_PROGRAMS)
    # the sleeper's own, with the tightest bound: nothing but its sleeps
    count, ns = ours[waits["sleeper"]]
    assert ns >= sum(workload.SLEEPS) - count * LEAVING_NS
    assert theirs[waits["sleeper"]] * 1000 >= sum(workload.SLEEPS) - count * LEAVING_NS
