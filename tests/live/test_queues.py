"""Jobs through real queues: each must lead back to who enqueued it, and none to anybody else.

What is right is known from what producer and workers note themselves (programs/queue_notes.py): when
which thread put which job in, did it, and called for it. Payloads play no part in that.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import psycopg
import pytest

from tests.live.recording import Session, no_losses, python_target, scope_ebpf_command

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]
SHOP = ROOT / "examples" / "shop"
JOBS = 23
DONE_SECONDS = 20.0
# Apart enough for each message to be the head of a turn: records.RecordLimits.TURN_GAP_NS is 10 ms.
APART_SECONDS = 0.025


@pytest.fixture(scope="module")
def servers() -> Iterator[Any]:
    """Redis and PostgreSQL as the shop starts them: `pids` and `environment`."""
    sys.path.insert(0, str(SHOP))
    try:
        starting = importlib.import_module("servers")
        supervision = importlib.import_module("supervision")
    finally:
        sys.path.remove(str(SHOP))

    class Servers(supervision.Supervisor):  # type: ignore[name-defined,misc]
        def start(self) -> None:
            self.redis = starting.start_redis(self, "redis-password")
            self.postgres = starting.start_postgres(self, "postgres-password", 20)

    with Servers(60.0) as running:
        with psycopg.connect(running.postgres, autocommit=True) as connection:
            connection.execute("CREATE TABLE jobs (number serial PRIMARY KEY, job text)")
            connection.execute("CREATE TABLE done (job text PRIMARY KEY)")
        yield running


@dataclass
class Worked:
    """What a recorded run of producer and worker says: notes, and spans with their edges."""

    notes: pl.DataFrame
    spans: pl.DataFrame
    edges: pl.DataFrame

    def __post_init__(self) -> None:
        """Find which span each note is."""
        clients = self.spans.filter(pl.col("kind") == "client")
        self.puts = self._first_within(self._notes("put"), clients)
        self.calls = self._first_within(self._notes("call"), clients)
        takes = self.notes.filter(kind="take")
        jobs = self._notes("job" if takes.is_empty() else "take").sort("start_ns")
        consumers = self.spans.filter(pl.col("kind") == "consumer").sort("start_ns")
        doing = consumers.select(
            "span_id", "tgid", "tid", "start_ns", end_ns=pl.col("start_ns") + pl.col("duration_ns")
        )
        self.jobs = jobs.join_asof(
            doing, on="start_ns", by=["tgid", "tid"], suffix="_span", check_sortedness=False
        ).filter(pl.col("end_ns") <= pl.col("end_ns_span"))
        # one that follows before the next is known to have come is another one
        self.jobs = self.jobs.sort("start_ns").unique("span_id", keep="first")

    def _notes(self, kind: str) -> pl.DataFrame:
        found = self.notes.filter(kind=kind)
        assert found["job_id"].n_unique() == len(found) == JOBS
        return found

    def _first_within(self, notes: pl.DataFrame, clients: pl.DataFrame) -> pl.DataFrame:
        """All spans within each note: a job may be put in by several requests."""
        return notes.join(
            clients.select("span_id", "tgid", "tid", "operation", begun_ns="start_ns"),
            on=["tgid", "tid"],
        ).filter(pl.col("begun_ns").is_between("start_ns", "end_ns"))

    def check_links(self, least: int = JOBS) -> None:
        """So many of the jobs are linked, each to the producer's own request, and none wrong."""
        assert self.puts["job_id"].n_unique() == JOBS
        links = self.edges.filter(pl.col("edge").is_in(["queued_by", "triggered_by"]))
        consumers = self.spans.filter(pl.col("kind") == "consumer")
        links = links.join(consumers.select(effect_id="span_id"), on="effect_id")
        known = self.jobs.select("job_id", effect_id="span_id").join(links, on="effect_id")
        right = known.join(
            self.puts.select("job_id", cause_id="span_id"), on=["job_id", "cause_id"], how="semi"
        )
        wrong = known.join(right, on=["job_id", "cause_id"], how="anti")
        assert wrong.is_empty(), wrong
        # nothing else of the worker's is said to be queued
        assert links.join(known, on="effect_id", how="anti").is_empty()
        assert (right["evidence"] == "derived").all()
        assert right["job_id"].n_unique() >= least
        assert right["parent"].all()

    def check_calls(self, least: int = JOBS, *, guesses: bool = False) -> None:
        """What jobs called for themselves stands under them, and nothing under another job."""
        assert self.calls["job_id"].n_unique() == JOBS
        # a child of the process that took the job goes on with it
        passed_on = self.spans.filter(
            (pl.col("kind") == "consumer") & (pl.col("edge") == "continues")
        ).select(parent_id="span_id", taken_by="parent_id")
        spans = self.spans.select("span_id", "parent_id", "evidence").join(
            passed_on, on="parent_id", how="left"
        )
        spans = spans.with_columns(parent_id=pl.coalesce("taken_by", "parent_id"))
        parents = self.calls.join(spans, on="span_id").join(
            self.jobs.select("job_id", expected_id="span_id"), on="job_id", how="left"
        )
        claimed = parents.filter(
            pl.col("parent_id").is_not_null() & (guesses | (pl.col("evidence") != "guess"))
        )
        right = claimed.filter(pl.col("parent_id") == pl.col("expected_id"))
        wrong = claimed.join(right, on="span_id", how="anti")
        assert wrong.is_empty(), wrong
        assert right["job_id"].n_unique() >= least, parents

    def check_acknowledgements(self) -> None:
        """Celery acknowledges each delivery by its tag: never as part of the work on another one."""
        tag = pl.col("detail").str.extract(
            r"unacked_index .*?([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-\w{12})"
        )
        clients = self.spans.filter(pl.col("kind") == "client").with_columns(tag=tag)
        proven = pl.col("evidence").is_in(["exact", "derived"])
        taken = clients.filter(pl.col("operation").str.starts_with("MULTI ZADD"))
        acknowledged = clients.filter(pl.col("operation").str.starts_with("MULTI ZREM"))
        assert taken["tag"].n_unique() == acknowledged["tag"].n_unique() == JOBS
        pairs = acknowledged.filter(proven).join(taken.filter(proven), on="tag")
        assert (pairs["parent_id"] == pairs["parent_id_right"]).all(), pairs


def work(
    directory: Path,
    servers: Any,
    producer: str,
    worker: str,
    *,
    steps: bool = False,
    redacted: bool = False,
) -> Worked:
    """Record a producer of 23 jobs, the worker that does them, and the servers between.

    With `steps`, each job is done before the next one is put in.
    """
    log = directory / "notes.jsonl"
    environment = {
        **os.environ,
        "QUEUE_LOG": str(log),
        "QUEUE_REDIS_URL": servers.redis,
        "QUEUE_DATABASE_URL": servers.postgres,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
    }
    with (
        python_target("queue_worker", worker, env=environment) as working,
        python_target("queue_producer", producer, *["steps"] * steps, env=environment) as producing,
    ):
        pids = [working.pid, producing.pid, *servers.pids.values()]
        chosen = [part for pid in pids for part in ("--pid", pid)]
        path = directory / "test.scope"
        clear = [] if redacted else ["--unredacted"]
        with scope_ebpf_command(path, "attach", *chosen, "-o", path, *clear) as session:
            working.open_gate()
            producing.open_gate()
            for number in range(1, JOBS + 1) if steps else ():
                wait_for_jobs(log, number)
                time.sleep(APART_SECONDS)
                producing.open_gate()
            ids = producing.note()
            assert len(set(ids)) == JOBS
            wait_for_jobs(log, JOBS)
            # what follows the last job, such as its acknowledgement
            time.sleep(0.3)
            session.stop()
        working.process.terminate()
        working.process.wait(10)
    return read(session, log)


def wait_for_jobs(log: Path, wanted: int) -> None:
    """Wait until so many jobs are done."""
    deadline = time.monotonic() + DONE_SECONDS
    while (done := log.read_text().count('"kind": "job"') if log.exists() else 0) < wanted:
        assert time.monotonic() < deadline, f"{done} of {wanted} jobs are done"
        time.sleep(0.005)


def read(session: Session, log: Path) -> Worked:
    """Notes and spans of a run that has ended."""
    recording = session.recording
    no_losses(session)
    notes = pl.DataFrame([json.loads(line) for line in log.read_text().splitlines()])
    notes = notes.with_columns(pl.col("tgid", "tid").cast(pl.UInt32))
    spans, edges = pl.collect_all([recording.spans(), recording.edges()])
    return Worked(notes, spans, edges)


def test_rq(tmp_path, servers):
    worked = work(tmp_path, servers, "rq", "rq")
    worked.check_links()
    worked.check_calls()


def test_celery_solo(tmp_path, servers):
    worked = work(tmp_path, servers, "celery", "celery-solo")
    worked.check_links()
    # its event loop may do other things between two jobs, so that nothing is proven
    worked.check_calls(least=0)
    worked.check_calls(guesses=True)


def test_celery_prefork(tmp_path, servers):
    worked = work(tmp_path, servers, "celery", "celery-prefork")
    worked.check_links()
    # the main process passes jobs to its children over pipes
    worked.check_calls()
    worked.check_acknowledgements()


@pytest.mark.parametrize("worker", ["rq", "celery-prefork"])
def test_redacted(worker, tmp_path, servers):
    """Tokens of ids are equal at the producer's, the worker's and its children's."""
    worked = work(tmp_path, servers, worker.partition("-")[0], worker, redacted=True)
    worked.check_links()
    worked.check_calls()


@pytest.mark.parametrize(("worker", "least"), [("dramatiq-one", JOBS), ("dramatiq", 0)])
def test_dramatiq(worker, least, tmp_path, servers):
    """Of eight messages in one answer, its head holds the first: nothing is claimed of them."""
    worked = work(tmp_path, servers, "dramatiq", worker)
    worked.check_links(least)
    # another thread than the one that got the job does it
    worked.check_calls(least=0)


def test_publish(tmp_path, servers):
    worked = work(tmp_path, servers, "publish", "subscribe", steps=True)
    worked.check_links()
    worked.check_calls()


def test_publish_at_once(tmp_path, servers):
    """Messages that come together are not all known by their heads, and none may be linked wrongly."""
    worked = work(tmp_path, servers, "publish", "subscribe")
    worked.check_links(least=1)
    worked.check_calls(least=0)


@pytest.mark.parametrize("listener", ["listen", "listen2"])
def test_notify(listener, tmp_path, servers):
    worked = work(tmp_path, servers, "notify", listener, steps=True)
    worked.check_links()
    # psycopg2 is waited for by select(), as an event loop waits
    worked.check_calls(least=JOBS - 1 if listener == "listen" else 0)


@pytest.mark.parametrize("worker", ["table", "table3"])
def test_table(worker, tmp_path, servers):
    worked = work(tmp_path, servers, "table", worker)
    worked.check_links()
    worked.check_calls()
