"""Tracers that others wrote see the same: the same workload at the same time, counted by both.

One run beside strace, which stops the process at each call, one beside bpftrace, and one beside the tools of
BCC (`-k 'not bcc and not bpfcc'` leaves out what compiles). The target waits at its gate until they are at
work, so each sees the same calls. Where they rightly count otherwise, the test says so by name; everything
else must be equal, also what is not deterministic, such as futex.

Times cannot be equal: each tracer looks at the clock at another place of the same path, and the programs of
the others run in between. SLACK_NS is what that may be for one event. An emulated CPU also stops altogether
while its host does something else; where that falls between two tracers' looks at the clock, one sum has
the whole pause and the other has not. So a few sums may differ by more, but not all of them together.
"""

from __future__ import annotations

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

# For one event, of what two tracers measure between the same two moments; and in proportion.
SLACK_NS = 250_000
SLACK_PART = 0.05
# Sums that may be further apart, of all; and all together.
FAR_PART = 0.3
ALL_PART = 0.15


@dataclass(frozen=True)
class Compared:
    """One run of the workload, with what ours recorded and the others printed."""

    session: Session
    said: dict[str, str]

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
        session.note = target.work()
        assert session.wait() == 0, session.talk
        said = {tool.kind.name: tool.end() for tool in tools}
    assert session.table("losses").is_empty()
    return Compared(session, said)


@pytest.fixture(scope="module")
def beside_strace(tmp_path_factory) -> Compared:
    """Strace stops each thread twice per call, so it has a run of its own: its times are its own, too."""
    return run_beside(tmp_path_factory.mktemp("strace"), STRACE)


@pytest.fixture(scope="module")
def beside_bpftrace(tmp_path_factory) -> Compared:
    """What bpftrace needs of the kernel is what ours needs: its types."""
    return run_beside(tmp_path_factory.mktemp("bpftrace"), BPFTRACE_COUNTS)


@pytest.fixture(scope="module")
def beside_bcc(tmp_path_factory) -> Compared:
    """The tools of BCC at once: they do not disturb each other's numbers."""
    kinds = (SYSCOUNT, EXECSNOOP, TCPLIFE, OFFCPUTIME)
    return run_beside(tmp_path_factory.mktemp("bcc"), *kinds)


def name_of(number: int) -> str:
    """The name of a call on this machine."""
    return syscall_name(number, platform.machine())


def close(ours_ns: float, theirs_ns: float, events: int) -> bool:
    """Whether two sums over so many events are the same within the error of the clocks."""
    return abs(ours_ns - theirs_ns) <= events * SLACK_NS + SLACK_PART * max(ours_ns, theirs_ns)


def assert_same_times(sums: Mapping[Any, tuple[float, float, int]]) -> None:
    """That sums by some key (ours, theirs, events) are the same but for pauses of the whole machine."""
    assert sums
    far = {key: row for key, row in sums.items() if not close(*row)}
    assert len(far) <= FAR_PART * len(sums), far
    ours, theirs, events = (sum(column) for column in zip(*sums.values(), strict=True))
    apart = abs(ours - theirs)
    assert apart <= events * SLACK_NS + ALL_PART * max(ours, theirs), (ours, theirs, events, far)


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
    theirs = {
        (row.local_port, row.remote_port): row for row in tcplife_rows(beside_bcc.of(TCPLIFE))
    }
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
        assert row.span_ms * 1e6 >= own["last_ns"] - own["first_ns"] - SLACK_NS


# ---- times ----


def test_bpftrace_times(beside_bpftrace):
    """The time in calls, by number; and how long threads ran, as the scheduler counts it."""
    said = beside_bpftrace.of(BPFTRACE_COUNTS)
    theirs, counts = bpftrace_map(said, "took"), bpftrace_map(said, "timed")
    ours = beside_bpftrace.times("number")
    assert ours.keys() == theirs.keys()
    assert_same_times(
        {name_of(number): (ours[number], theirs[number], counts[number]) for number in ours}
    )


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
    assert_same_times(sums)


def test_bcc_syscount_times(beside_bcc):
    """The time in calls of the first process, by name."""
    theirs = syscounted(beside_bcc)
    ours = beside_bcc.times("name", tgid=beside_bcc.note["pid"])
    assert_same_times(
        {name: (ours[name], total * 1000, count) for name, (count, total) in theirs.items()}
    )


def test_bcc_offcputime(beside_bcc):
    """The time off the CPU by thread, of the intervals that both saw from begin to end."""
    theirs = offcputime_totals(beside_bcc.of(OFFCPUTIME))
    offcpu = beside_bcc.session.table("offcpu")
    whole = offcpu.filter(status="complete", tgid=beside_bcc.note["pid"])
    grouped = whole.group_by("tid").agg(pl.len(), pl.col("duration_ns").sum().alias("ns"))
    ours = {row["tid"]: (row["len"], row["ns"]) for row in grouped.to_dicts()}
    waits = beside_bcc.note["waits"]
    sure = {beside_bcc.note["pid"], waits["sleeper"], waits["waiter"]}
    sure |= {lock["tid"] for lock in waits["locks"]}
    assert sure <= ours.keys() & theirs.keys()
    assert_same_times(
        {
            tid: (ours.get(tid, (0, 0))[1], theirs.get(tid, 0) * 1000, ours.get(tid, (1, 0))[0])
            for tid in ours.keys() | theirs.keys()
        }
    )
    # the sleeper's own, with the tightest bound: nothing but its sleeps
    count, ns = ours[waits["sleeper"]]
    assert ns >= sum(workload.SLEEPS) - count * SLACK_NS
    assert theirs[waits["sleeper"]] * 1000 >= sum(workload.SLEEPS) - count * SLACK_NS
