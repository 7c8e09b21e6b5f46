"""Processes and threads: births, programs and deaths, as the parent and /proc tell of them."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf.records import RecordLimits
from tests.live.recording import Target, attached, compiled, no_losses

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("each_transport")]

KEPT = int(RecordLimits.COMMAND_LINE_BYTES)
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """The program whose processes and threads begin and end."""
    return compiled("lives", tmp_path_factory.mktemp("lives"))


def own_cgroup() -> str:
    """The path of this process in the unified hierarchy."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next(line.removeprefix("0::") for line in lines if line.startswith("0::"))


def test_ends(lives, tmp_path):
    with Target(lives, "ends") as target, attached(tmp_path, target) as session:
        noted = target.work()
    no_losses(session)
    rows = session.table("processes")
    parent = target.pid
    expected = {
        "normal": (0, None), "seven": (7, None), "killed": (None, signal.SIGKILL),
        "terminated": (None, signal.SIGTERM), "aborted": (None, signal.SIGABRT),
        "many-threads": (3, None), "last-thread": (5, None), "after-leader": (11, None),
        "exec": (8, None), "exec-thread": (9, None), "orphan": (0, None),
    }  # fmt: skip
    assert len(noted) == 3 * len(expected)
    for child in noted:
        pid, kind = child["pid"], child["kind"]
        own = rows.filter(tgid=pid)
        born, died = own.row(0, named=True), own.row(-1, named=True)
        assert born["event"] == "fork"
        assert (born["tid"], born["parent_tgid"], born["parent_tid"]) == (pid, parent, parent)
        assert born["comm"] == "lives"
        ends = own.filter(event="exit").rows(named=True)
        assert len(ends) == 1, (kind, own)
        end = ends[0]
        # what the parent got from waitpid
        status = child["status"]
        told = (
            os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        )
        if kind != "last-thread":
            assert told == expected[kind]
        assert (end["exit_code"], end["signal"]) == told, kind
        assert end["signal_name"] == (None if told[1] is None else signal.Signals(told[1]).name)
        assert end["parent_tgid"] == parent
        assert end["comm"] == ("lives" if "exec" in kind else f"l-{kind}"[:15])
        assert died["time_ns"] >= born["time_ns"]
        threads = own.filter(event="thread")
        assert len(threads) == {"many-threads": 23}.get(
            kind, kind in ("last-thread", "after-leader", "exec-thread")
        )
        assert own.filter(event="thread_exit").height == len(threads)
        ended = own.filter(pl.col("event").is_in(["exit", "thread_exit"]))
        if kind != "exec-thread":
            assert sorted(ended["tid"]) == sorted([pid, *threads["tid"]])
        else:
            # the thread takes the id of the first one, which ends
            assert ended["tid"].to_list() == [pid, pid]
        execs = own.filter(event="exec").rows(named=True)
        assert len(execs) == ("exec" in kind)
        for row in execs:
            assert (row["tid"], row["comm"]) == (pid, "lives")
            assert row["parent_tid"] == (pid if kind == "exec" else threads["tid"][0])
            assert row["command_line"] == f"renamed quits {8 if kind == 'exec' else 9}"
        assert own["start_boottime_ns"].n_unique() == 1 + len(threads)
        assert own["cgroup"].unique().to_list() == [own_cgroup()]
    orphans = rows.filter(event="exit", exit_code=13)
    parents = [child["pid"] for child in noted if child["kind"] == "orphan"]
    for parent_tgid in parents:
        born = rows.filter(event="fork", parent_tgid=parent_tgid).row(0, named=True)
        end = orphans.filter(tgid=born["tgid"]).row(0, named=True)
        assert end["parent_tgid"] != parent_tgid
    assert len(orphans) == 3
    # the target: alive at the start, ended last
    own = rows.filter(tgid=parent)
    assert own["event"].to_list() == ["alive", "exit"]
    assert own["exit_code"].to_list() == [None, 0]


def test_each_process_ends_once(lives, tmp_path):
    """Also when its threads end in the same instant on several CPUs."""
    with (
        Target(lives, "storm") as target,
        attached(tmp_path, target, "--families", "processes") as session,
    ):
        target.work()
    no_losses(session)
    rows = session.table("processes").filter(pl.col("tgid") != target.pid)
    born = rows.filter(event="fork")
    ends = rows.filter(event="exit")
    assert ends["tgid"].to_list() == born["tgid"].to_list()
    assert ends["exit_code"].to_list() == [i & 127 for i in range(199)]
    assert rows.filter(event="thread").height == rows.filter(event="thread_exit").height == 6 * 199
    ended = rows.filter(pl.col("event").is_in(["exit", "thread_exit"]))
    assert ended["tid"].n_unique() == len(ended) == 7 * 199


def test_alive(lives, tmp_path):
    with Target(lives, "alive", "argument", "x" * 1000, "with space") as target:
        child = int(Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text())
        seen = {
            int(task.name): (pid, (task / "comm").read_text().rstrip("\n"), start_ticks(task))
            for pid in (target.pid, child)
            for task in Path(f"/proc/{pid}/task").iterdir()
        }
        with attached(tmp_path, target) as session:
            target.work()
            os.kill(child, signal.SIGKILL)
    no_losses(session)
    rows = session.table("processes").filter(event="alive")
    found = {
        row["tid"]: (row["tgid"], row["comm"], row["start_boottime_ns"] // TICK_NS)
        for row in rows.rows(named=True)
    }
    assert found == seen
    assert len(rows) == len(found) == 8
    leaders = {row["tid"]: row for row in rows.rows(named=True) if row["tid"] == row["tgid"]}
    whole = shlex.join([str(lives), "alive", "argument", "x" * 1000, "with space"])
    size = len(str(lives)) + len("alive argument") + 1000 + len("with space") + 4
    for pid, parent in ((target.pid, os.getpid()), (child, target.pid)):
        assert leaders[pid]["parent_tgid"] == parent
        assert leaders[pid]["command_line"] == whole
        assert leaders[pid]["command_line_bytes"] == size
    assert rows["cgroup"].unique().to_list() == [own_cgroup()]
    started = session.recording.meta.started_ns
    assert rows["time_ns"].unique().to_list() == [started]
    threads = rows.filter(pl.col("tid") != pl.col("tgid"))
    assert threads["command_line"].null_count() == len(threads)


def test_crowd(lives, tmp_path):
    """Each of many processes that are there already is told once, however often the kernel is asked."""
    with Target(lives, "crowd") as target, attached(tmp_path, target) as session:
        children = target.work()
    no_losses(session)
    rows = session.table("processes").filter(parent_tgid=target.pid)
    for event in ("alive", "exit"):
        assert sorted(rows.filter(event=event)["tgid"]) == sorted(children)
    assert set(rows.filter(event="exit")["signal"]) == {signal.SIGKILL}


def start_ticks(task: Path) -> int:
    """When a thread began, in clock ticks since boot: field 22 of its stat."""
    return int((task / "stat").read_text().rpartition(")")[2].split()[19])


def test_command_lines(lives, tmp_path):
    with Target(lives, "arguments") as target, attached(tmp_path, target) as session:
        pids = target.work()
    no_losses(session)
    rows = session.table("processes").filter(event="exec")
    assert rows["tgid"].to_list() == pids
    program = str(lives)
    begin = [program, "quits", "0"]
    sizes = rows["command_line_bytes"].to_list()
    lines = rows["command_line"].to_list()
    plain = sum(len(part) + 1 for part in begin)
    assert shlex.split(lines[0]) == [*begin, "two words", "", "it's"]
    assert sizes[0] == plain + 10 + 1 + 5
    assert shlex.split(lines[1]) == [*begin, "\\xff\\xfe\tb", "$HOME;"]
    assert sizes[1] == plain + 5 + 7
    # cut, with the full length
    assert shlex.split(lines[2]) == [*begin, "x" * (KEPT - plain)]
    assert sizes[2] == plain + 5000 + 4
    assert shlex.split(lines[3]) == [*begin, "y" * (KEPT - plain - 1)]
    assert sizes[3] == KEPT
    assert shlex.split(lines[4]) == begin
    assert sizes[4] == plain
