"""Which request a call belongs to, where one thread has many at the same time.

The targets answer requests that overlap on one thread, or change threads, and their bytes say whose they
are: see contexts.py. One recording has all kinds of servers of the project's own interpreter, one
has asyncio in all interpreters; and targets that make short-lived contexts all the time.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass

import polars as pl
import pytest

from tests.live.contexts import (
    CALLS,
    KINDS,
    Compared,
    Kind,
    compare,
    serving,
    serving_kind,
)
from tests.live.pythons import pythons
from tests.live.recording import Session, attached, no_losses, python_target

pytestmark = pytest.mark.live

# Requests by how many there are at the same time.
LOADS = {1: 11, 10: 53, 100: 203}
# and of these kinds, 1,000 at the same time
CROWDED = ("asyncio-streams-pool", "asyncio-protocol-fresh", "uvloop-protocol-pool", "threads-pool")
CROWD = 1000
BY_NAME = {kind.name: kind for kind in KINDS}
CASES = [(kind.name, load) for kind in KINDS for load in LOADS]
CASES += [(name, CROWD) for name in CROWDED]
EVERYWHERE = ("asyncio-streams-pool", "asyncio-protocol-fresh")
EVERYWHERE_LOAD = (53, 25)
SHORT = 2003


@dataclass(frozen=True)
class Run:
    """One recording: the server of each case, and the ids of its requests."""

    session: Session
    asked: dict[tuple[str, object], tuple[int, list[int]]]

    def compared(self, name: str, load: object) -> Compared:
        """One case beside the truth."""
        tgid, ids = self.asked[name, load]
        return compare(self.session.recording, tgid, ids)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All kinds of servers, one after the other."""
    asked: dict[tuple[str, object], tuple[int, list[int]]] = {}
    with ExitStack() as stack:
        backend = stack.enter_context(serving("contexts_backend"))
        servers = {kind: stack.enter_context(serving_kind(kind, backend)) for kind in KINDS}
        targets = [backend.target, *(server.target for server in servers.values())]
        directory = tmp_path_factory.mktemp("contexts")
        with attached(directory, targets, "--unredacted") as session:
            for kind, server in servers.items():
                for load, requests in LOADS.items():
                    asked[kind.name, load] = server.pid, server.ask(requests, load)
            for name in CROWDED:
                server = servers[BY_NAME[name]]
                asked[name, CROWD] = server.pid, server.ask(CROWD, CROWD)
            session.stop()
    return Run(session, asked)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """Two kinds of servers in each interpreter."""
    asked: dict[tuple[str, object], tuple[int, list[int]]] = {}
    with ExitStack() as stack:
        backend = stack.enter_context(serving("contexts_backend"))
        servers = {
            (str(python), name): stack.enter_context(serving_kind(BY_NAME[name], backend, python))
            for python in pythons()
            for name in EVERYWHERE
        }
        targets = [backend.target, *(server.target for server in servers.values())]
        directory = tmp_path_factory.mktemp("everywhere")
        with attached(directory, targets, "--unredacted") as session:
            for case, server in servers.items():
                asked[case] = server.pid, server.ask(*EVERYWHERE_LOAD)
            session.stop()
    return Run(session, asked)


def check(kind: Kind, found: Compared, requests: int) -> None:
    """It is as good as it has to be."""
    assert found.wrong == 0, found.examples
    assert found.wrong_edges == 0, found.examples
    assert found.unseen == 0 and found.share >= kind.share, (found.share, found)
    if kind.contexts:
        assert found.sends == CALLS * requests
        assert (found.wrong_contexts, found.no_context) == (0, 0), found.examples


def test_nothing_was_lost(run, everywhere):
    no_losses(run.session)
    no_losses(everywhere.session)


@pytest.mark.parametrize(("name", "load"), CASES, ids=str)
def test_calls_are_below_their_requests(name, load, run):
    check(BY_NAME[name], run.compared(name, load), LOADS.get(load, CROWD))


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("python", pythons(), ids=str)
def test_in_every_interpreter(python, name, everywhere):
    check(BY_NAME[name], everywhere.compared(str(python), name), EVERYWHERE_LOAD[0])


def test_work_items_are_put_and_got_once(run):
    """What the thread that waits for requests submits, and what the pool's threads take."""
    tgid, _ = run.asked["threads-pool", 100]
    handoffs = run.session.table("handoffs").filter(pl.col("tgid") == tgid)
    puts = handoffs.filter("put").sort("time_ns")
    gets = handoffs.filter(~pl.col("put")).sort("time_ns")
    assert puts["tid"].unique().to_list() == [tgid]
    assert tgid not in gets["tid"].to_list()
    # each item that was got is the latest one that was put at that address, and was got once
    put_before = gets.join_asof(
        puts.select("item", "time_ns", put_ns="time_ns"),
        on="time_ns",
        by="item",
        check_sortedness=False,
    )
    assert put_before["put_ns"].null_count() == 0
    assert put_before.select("item", "put_ns").is_unique().all()
    requests = sum(len(run.asked["threads-pool", load][1]) for load in (*LOADS, CROWD))
    assert len(puts) == len(gets) == requests


# ---- addresses that come again -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["asyncio", "uvloop", "trio", "gevent", "run", "loops"])
def test_short_contexts_do_not_merge(kind, tmp_path):
    """Each one's sends are in one context, which is no other one's."""
    with (
        python_target("recycle_contexts", kind, SHORT) as target,
        attached(tmp_path, target) as session,
    ):
        told = target.work()
    no_losses(session)
    sends = pl.DataFrame(
        told["sends"], schema=["tid", "begin_ns", "end_ns", "which"], orient="row"
    ).with_columns(pl.col("tid").cast(pl.UInt32))
    rows = (
        session.table("messages")
        .filter(
            pl.col("tgid") == target.pid,
            pl.col("fd") == told["fd"],
            pl.col("direction") == "send",
        )
        .sort("start_ns")
    )
    found = rows.join_asof(
        sends.sort("begin_ns"),
        left_on="start_ns",
        right_on="begin_ns",
        by="tid",
        check_sortedness=False,
    )
    assert len(found) == len(sends) == 3 * SHORT
    assert (found["start_ns"] < found["end_ns"]).all()
    contexts = defaultdict(set)
    for which, context in found.select("which", "context").iter_rows():
        contexts[which].add(context)
    assert {len(each) for each in contexts.values()} == {1}
    ids = [context for each in contexts.values() for context in each]
    assert 0 not in ids and len(set(ids)) == SHORT
    known = session.table("contexts").filter(pl.col("tgid") == target.pid)["context"]
    assert known.is_unique().all() and set(ids) <= set(known.to_list())
