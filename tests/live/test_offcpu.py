"""Off-CPU intervals: threads that leave the CPU in known ways, as often and as long as they did."""

from __future__ import annotations

import polars as pl
import pytest

from tests.live.recording import Session, Target, attached, compiled, no_losses

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("each_transport")]


@pytest.fixture(scope="module")
def waits(tmp_path_factory):
    """The program whose threads leave the CPU."""
    return compiled("waits", tmp_path_factory.mktemp("waits"))


def record(waits, directory, *arguments) -> Session:
    """Record one run of the program."""
    with Target(waits, *arguments) as target, attached(directory, target) as session:
        session.note = target.work()
    no_losses(session)
    hold_together(session)
    return session


def hold_together(session: Session) -> None:
    """What holds for all intervals."""
    rows = session.table("offcpu")
    assert (rows["duration_ns"] > 0).all()
    known = rows.filter(pl.col("runnable_ns").is_not_null())
    assert (known["waiting_ns"] >= 0).all()
    assert (known["waiting_ns"] + known["runnable_ns"] == known["duration_ns"]).all()
    preempted = rows.filter(state="R")
    assert preempted["waker_tid"].null_count() == len(preempted)
    assert (preempted["waiting_ns"] == 0).all()
    # no thread is away twice at a time
    for _, own in rows.sort("start_ns").group_by("tid"):
        ended = own["start_ns"] + own["duration_ns"]
        assert (own["start_ns"][1:] >= ended[:-1]).all()
    # each interval within a call lies within that call
    inside = rows.filter(pl.col("syscall_start_ns").is_not_null())
    calls = session.table("syscalls")
    joined = inside.join(
        calls, left_on=["tid", "syscall_start_ns"], right_on=["tid", "start_ns"], how="left"
    )
    assert len(joined) == len(inside)
    assert joined["name_right"].null_count() == 0
    assert (joined["name"] == joined["name_right"]).all()
    ended = joined["syscall_start_ns"] + joined["duration_ns_right"]
    returns = joined["status_right"] != "no_return"
    assert (joined["start_ns"] >= joined["syscall_start_ns"]).all()
    late = joined["status"] == "end_late"
    assert ((joined["start_ns"] + joined["duration_ns"] <= ended) | ~returns | late).all()


def test_sleeps(waits, tmp_path):
    session = record(waits, tmp_path, "sleeps")
    calls = session.table("syscalls").filter(name="clock_nanosleep")
    assert len(calls) == 53
    rows = session.table("offcpu").filter(name="clock_nanosleep", state="S")
    assert rows["syscall_start_ns"].to_list() == calls["start_ns"].to_list()
    requested = pl.Series([1_000_000 * (1 + i % 5) for i in range(53)])
    # left a moment after the call began, so it may be short of the time by that
    begun = rows["start_ns"] - rows["syscall_start_ns"]
    assert (rows["duration_ns"] + begun >= requested).all()
    assert (rows["waiting_ns"].drop_nulls() > 0).all()
    assert rows["tid"].n_unique() == 1
    # a timer interrupt wakes: whoever ran there is named, and it was not the sleeper itself
    assert rows.filter(pl.col("waker_tid") == pl.col("tid")).is_empty()
    joiner = session.table("offcpu").filter(tid=session.target, name="futex", state="S")
    assert len(joiner) >= 1
    assert joiner["duration_ns"].sum() >= requested.sum() * 9 // 10


def between(session: Session, tid: int, note: dict[str, int]) -> pl.DataFrame:
    """The intervals of a thread in the time that it noted; there are as many as the kernel counted."""
    rows = session.table("offcpu").filter(
        pl.col("tid") == tid,
        pl.col("start_ns") >= note["began_ns"],
        pl.col("start_ns") < note["ended_ns"],
    )
    assert rows.filter(pl.col("state") != "R").height == note["waited"]
    # it may be preempted between looking at the clock and at the counter, at either end
    assert 0 <= rows.filter(state="R").height - note["preempted"] <= 2
    return rows


def test_ping_pong(waits, tmp_path):
    """Who waits in read is woken by the other process, in its write."""
    session = record(waits, tmp_path, "ping-pong", 307)
    reads = session.table("syscalls").filter(name="read").select("tid", "arg0", "start_ns")
    for mine, other in (session.note, session.note[::-1]):
        rows = between(session, mine["pid"], mine).filter(pl.col("state") != "R")
        assert len(rows) > 0
        assert rows["state"].unique().to_list() == ["S"]
        assert rows["name"].unique().to_list() == ["read"]
        assert rows["waker_tgid"].unique().to_list() == [other["pid"]]
        assert rows["waker_tid"].unique().to_list() == [other["pid"]]
        assert rows["waker_name"].unique().to_list() == ["write"]
        assert rows["runnable_ns"].null_count() == 0
        joined = rows.join(
            reads, left_on=["tid", "syscall_start_ns"], right_on=["tid", "start_ns"], how="left"
        )
        assert joined["arg0"].unique().to_list() == [mine["in"]]


def test_hogs(waits, tmp_path):
    """Two that want one CPU: each is ready to run while the other one has it."""
    session = record(waits, tmp_path, "hogs", 300)
    rows = session.table("offcpu").filter(pl.col("tgid").is_in(session.note))
    for pid in session.note:
        own = rows.filter(tgid=pid, state="R")
        assert len(own) > 5
        assert own["waker_tgid"].null_count() == len(own)
        assert (own["runnable_ns"] == own["duration_ns"]).all()
        assert own["cpu"].n_unique() == 1
        between = own.filter(pl.col("number").is_null())
        assert len(between) > 5
    # while both are there, one of them is always away
    bounds = [rows.filter(tgid=pid)["start_ns"] for pid in session.note]
    begin, end = max(part[0] for part in bounds), min(part[-1] for part in bounds)
    away = rows.filter(pl.col("start_ns") >= begin, pl.col("start_ns") < end)["duration_ns"].sum()
    assert away >= (end - begin) * 0.9


def test_on_and_off_make_the_whole(waits, tmp_path):
    """CPU time and time off the CPU add up to the time that passed."""
    session = record(waits, tmp_path, "mixed")
    note = session.note
    rows = between(session, session.target, note)
    assert rows.filter(name="clock_nanosleep", state="S").height == 30
    away, passed = rows["duration_ns"].sum(), note["ended_ns"] - note["began_ns"]
    assert 30 * 7_000_000 <= away <= passed
    assert away + note["cpu_ns"] == pytest.approx(passed, rel=0.1)


def test_beginning_and_end(tmp_path, tmp_path_factory):
    """Intervals that began before the recording, or go on after it, say so."""
    calls = compiled("calls", tmp_path_factory.mktemp("calls"))
    with Target(calls, "stays") as target, attached(tmp_path, target) as session:
        target.open_gate()
        target.note()
        target.wait_until_blocked()
        session.stop()
        assert session.wait() == 0
    no_losses(session)
    hold_together(session)
    rows = session.table("offcpu").filter(state="S")
    pauses = rows.filter(name="pause")
    assert sorted(pauses["status"]) == ["open", "throughout"]
    assert pauses["waker_tid"].null_count() == 2
    meta = session.recording.meta
    assert meta.ended_ns is not None
    throughout = pauses.filter(status="throughout").row(0, named=True)
    assert throughout["duration_ns"] <= meta.ended_ns - meta.started_ns
    own = rows.filter(tid=target.pid, name="read")
    assert own["status"].to_list() == ["began_before", "open"]
    assert own["duration_ns"][0] > 0
    # who opened the gate is not recorded, but known
    assert own["waker_tgid"][0] is not None
