"""Threads that are preempted, also inside of a probe, leave no other rows than those that are not.

From Linux 7.0 on programs at tracepoints are preempted (probes/state.h). Without what is done about it, the
kernel leaves out most probes of system calls for whoever runs meanwhile, and what it does not leave out
mixes the calls of several threads. `lab.py run --append preempt=full` preempts most.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import polars as pl
import pytest

from tests.lab import preempted as w
from tests.lab.recorded import CHECKOUT, Way, recording, ways
from tests.live.recording import Session, Target

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]

CALLS, TURNS = 3000, 400
MASK = 2**64 - 1


# BCC is refused where programs are preempted.
WAYS = [way for way in ways() if way.loader == "libbpf"]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def session(request, tmp_path_factory) -> Session:
    """The processes, recorded by each way."""
    way: Way = request.param
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    folder = tmp_path_factory.mktemp(str(way))
    with (
        Target(
            sys.executable, "-m", "tests.lab.preempted", CALLS, TURNS, env=environment
        ) as target,
        recording(folder, target, way, "--unredacted", "--payload-bytes", 512) as recorded,
    ):
        recorded.note = target.work()
    return recorded


def of_children(session: Session, table: str) -> pl.DataFrame:
    """The rows of the children, with their numbers."""
    children = {pid: number for number, pid in enumerate(session.note["pids"])}
    found = session.table(table).filter(pl.col("tid").is_in(list(children)))
    return found.with_columns(child=pl.col("tid").replace_strict(children, return_dtype=pl.Int64))


def test_the_children_were_preempted(session):
    away = of_children(session, "offcpu").filter(state="R")
    assert len(away) > w.CHILDREN * 10


def test_nothing_is_lost(session):
    assert session.table("losses").is_empty()
    assert session.recording.meta.complete


def test_each_call_is_that_of_its_thread(session):
    calls = of_children(session, "syscalls").filter(name="getppid")
    for child, own in calls.sort("start_ns").group_by("child"):
        assert own["arg0"].unique().to_list() == [w.FIRST_TAG + child[0]]
        assert own["arg1"].to_list() == list(range(CALLS))
        assert own["arg2"].to_list() == [~turn & MASK for turn in range(CALLS)]
        assert own["status"].unique().to_list() == ["complete"]
    assert calls["child"].n_unique() == w.CHILDREN


def test_calls_take_turns(session):
    for _, own in of_children(session, "syscalls").sort("start_ns").group_by("child"):
        ended = own["start_ns"] + own["duration_ns"]
        assert (own["start_ns"][1:] >= ended[:-1]).all()
        # the last one ends the process
        assert own["status"].to_list() == ["complete"] * (len(own) - 1) + ["no_return"]


def test_each_message_is_that_of_its_thread(session):
    messages = of_children(session, "messages")
    assert len(messages) == w.CHILDREN * TURNS * w.ROWS_PER_TURN
    for child, own in messages.sort("start_ns").group_by("child"):
        expected: list[Any] = []
        for turn in range(TURNS):
            asked = b"".join(w.message(child[0], turn))
            expected += [asked, asked, w.ANSWER, w.ANSWER]
        assert own["length_bytes"].to_list() == [len(data) for data in expected]
        assert own["payload"].to_list() == expected
