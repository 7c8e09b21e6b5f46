"""Causal chains of a real shop: from the customer's request to the background job, across processes.

The whole shop (nginx, three services, PostgreSQL, Redis, an RQ worker that forks) is recorded three
times: redacted as by default, unredacted, and while Redis is killed. What must be found follows from
the shop's code and from the answers that its customers got.
"""

from __future__ import annotations

import http.client
import importlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import polars as pl
import psycopg2
import pytest

from scope_ebpf.analysis.schema import EDGE, EVIDENCE, REQUESTS
from scope_ebpf.analysis.services import SERVICE_MAP
from tests.live.recording import COMMAND, Session, no_losses, scope_ebpf_command

pytestmark = pytest.mark.live

SHOP = Path(__file__).resolve().parents[2] / "examples" / "shop"
CHECKOUTS = 23
CUSTOMERS = 4
JOBS_SECONDS = 30.0
KINDS = ("redacted", "unredacted")
CHAIN_FIELDS = {
    "span_id", "parent_id", "edge", "evidence", "service", "tgid", "tid", "protocol", "operation",
    "detail", "start_ns", "duration_ns", "status",
}  # fmt: skip
# What a checkout asks for and leads to, as (who asked, protocol, operation's beginning); see web.py,
# inventory.py, payment.py and mail.py.
ASKED = [
    ("nginx", "http", "POST /checkout"),
    ("web", "http", "POST /reserve"),
    ("inventory", "postgresql", "SELECT i.stock"),
    ("inventory", "postgresql", "UPDATE inventory"),
    ("web", "http", "POST /payments"),
    ("payment", "postgresql", "INSERT INTO payments"),
    ("web", "postgresql", "INSERT INTO orders"),
    ("web", "postgresql", "UPDATE payments"),
    ("web", "redis", "MULTI HSET"),  # the job, and its place in the queue behind it
    ("web", "redis", "DEL product"),
    ("rq", "postgresql", "SELECT p.name"),
    ("rq", "postgresql", "INSERT INTO mails"),
]


class Run:
    """One recording of the shop: its spans, its edges, and what the customers were answered."""

    def __init__(self, session: Session, orders: list[int]) -> None:
        """Read it."""
        self.path = session.path
        self.recording = session.recording
        no_losses(session)
        self.spans, self.edges = pl.collect_all([self.recording.spans(), self.recording.edges()])
        self.rows = {row["span_id"]: row for row in self.spans.iter_rows(named=True)}
        self.orders = orders

    def entries(self, operation: str) -> list[dict[str, Any]]:
        """What nginx was asked by customers."""
        return [
            row
            for row in self.rows.values()
            if (row["service"], row["kind"], row["operation"]) == ("nginx", "server", operation)
        ]

    def tree(self, root: int) -> list[dict[str, Any]]:
        """The spans of one request."""
        return [row for row in self.rows.values() if row["request_id"] == root]

    def path_to(self, row: dict[str, Any]) -> list[tuple[str, str]]:
        """Service and kind of a span and of everything above it, from the root down."""
        above: list[tuple[str, str]] = []
        while True:
            above.insert(0, (row["service"], row["kind"]))
            if row["parent_id"] is None:
                return above
            row = self.rows[row["parent_id"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """The three recordings; the shop has ended by then."""
    directory = tmp_path_factory.mktemp("chains")
    sys.path.insert(0, str(SHOP))
    try:
        service = importlib.import_module("service")
    finally:
        sys.path.remove(str(SHOP))
    found = {}
    with service.Market(workers=2) as shop:
        # each worker has its connections, so that all checkouts do the same
        buy(shop, CHECKOUTS)
        for kind, options in (("redacted", []), ("unredacted", ["--unredacted"])):
            with recorder(directory / f"{kind}.scope", shop, *options) as session:
                orders = buy(shop, CHECKOUTS)
                for number in range(1, CHECKOUTS + 1):
                    assert ask(shop, "GET", f"/products/{number}")[0] == 200
                session.stop()
            found[kind] = Run(session, orders)
        with recorder(directory / "broken.scope", shop) as session:
            assert ask(shop, "GET", "/products/90")[0] == 200
            shop.kill("redis")
            assert ask(shop, "GET", "/products/90")[0] >= 500
            time.sleep(0.2)
            session.stop()
        found["broken"] = Run(session, [])
    return found


def recorder(path: Path, shop: Any, *options: str) -> Any:
    """The recorder on all of the shop."""
    chosen = [part for pid in shop.pids.values() for part in ("--pid", pid)]
    return scope_ebpf_command(path, "attach", *chosen, "-o", path, *options)


def ask(shop: Any, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """One request of a customer; returns the status and the answer."""
    where = urlsplit(shop.url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=10)
    try:
        text = json.dumps(body) if body is not None else None
        connection.request(method, path, text, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def buy(shop: Any, count: int) -> list[int]:
    """So many checkouts by several customers at once; returns the orders when their mails are there."""
    mails = count_mails(shop)
    with ThreadPoolExecutor(CUSTOMERS) as customers:
        wanted = [{"product": number, "quantity": 1} for number in range(1, count + 1)]
        answers = list(customers.map(lambda body: ask(shop, "POST", "/checkout", body), wanted))
    assert [status for status, _ in answers] == [201] * count
    deadline = time.monotonic() + JOBS_SECONDS
    while count_mails(shop) < mails + count:
        assert time.monotonic() < deadline, "the mails do not come"
        time.sleep(0.05)
    # the worker's bookkeeping behind its last job
    time.sleep(0.3)
    return [answer["order"] for _, answer in answers]


def count_mails(shop: Any) -> int:
    """How many mails the worker has sent."""
    connection = psycopg2.connect(shop.urls["postgres"])
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM mails")
            (count,) = cursor.fetchone()
            return int(count)
    finally:
        connection.close()


def command(*arguments: object) -> str:
    """What a command prints."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_each_checkout_reaches_the_worker(kind, runs):
    run = runs[kind]
    checkouts = run.entries("POST /checkout")
    assert len(checkouts) == CHECKOUTS
    for entry in checkouts:
        assert entry["parent_id"] is None
        spans = run.tree(entry["span_id"])
        clients = [row for row in spans if row["kind"] == "client"]
        # all of them were seen from their beginning
        assert {row["state"] for row in spans} == {"complete"}
        for service, protocol, operation in ASKED:
            (found,) = [
                row
                for row in clients
                if (row["service"], row["protocol"]) == (service, protocol)
                and str(row["operation"]).startswith(operation)
            ]
            # the other end, which is a process of its own
            (served,) = [row for row in spans if row["parent_id"] == found["span_id"]][:1]
            assert (served["edge"], served["evidence"]) == ("calls", "exact")
            assert served["kind"] == "server" and served["tgid"] != found["tgid"]
        (job,) = [row for row in spans if row["kind"] == "consumer"]
        assert (job["service"], job["edge"], job["evidence"]) == ("rq", "queued_by", "derived")
        assert run.path_to(job) == [
            ("nginx", "server"),
            ("nginx", "client"),
            ("web", "server"),
            ("web", "client"),
            ("rq", "consumer"),
        ]
        assert run.rows[job["parent_id"]]["operation"].startswith("MULTI HSET")
        (mail,) = [row for row in clients if str(row["operation"]).startswith("INSERT INTO mails")]
        assert run.path_to(mail)[-2:] == [("rq", "consumer"), ("rq", "client")]
        assert mail["parent_id"] == job["span_id"]
        # it was sent by a fork of the worker
        assert (mail["edge"], mail["evidence"]) == ("forked_by", "exact")
        assert len({row["tgid"] for row in spans}) >= 4


def test_the_job_is_that_of_the_same_order(runs):
    """Independent of ids of jobs: what web and the mail's job say in SQL is about one order."""
    run = runs["unredacted"]
    orders = []
    for entry in run.entries("POST /checkout"):
        spans = run.tree(entry["span_id"])
        (paid,) = {
            re.search(r"SET order_id = (\d+)", row["detail"])[1]  # type: ignore[index]
            for row in spans
            if row["kind"] == "client" and str(row["operation"]).startswith("UPDATE payments")
        }
        (sent,) = {
            re.search(r"VALUES \((\d+)", row["detail"])[1]  # type: ignore[index]
            for row in spans
            if row["kind"] == "client" and str(row["operation"]).startswith("INSERT INTO mails")
        }
        assert paid == sent
        orders.append(int(paid))
    assert sorted(orders) == sorted(run.orders)


def test_redaction_changes_no_parent(runs):
    """All checkouts have the same tree, recorded in either way."""

    def shapes(run: Run) -> Counter[tuple[Any, ...]]:
        found: Counter[tuple[Any, ...]] = Counter()
        for entry in run.entries("POST /checkout"):
            for row in run.tree(entry["span_id"]):
                # the order of the worker's own commands around a job is not that of the job
                found[
                    (*run.path_to(row), row["protocol"], row["edge"], row["evidence"])
                    if row["service"] != "rq" or row["kind"] == "consumer"
                    else (row["edge"], row["evidence"])
                ] += 1
        return found

    assert shapes(runs["redacted"]) == shapes(runs["unredacted"])
    details = runs["redacted"].spans["detail"].drop_nulls()
    orders = details.str.extract(r"SET order_id = (\d+)").drop_nulls()
    assert orders.is_empty(), "it is not redacted"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_miss_triggers_what_fills_the_cache(kind, runs):
    run = runs[kind]
    misses = 0
    for entry in run.entries("GET /products/{id}"):
        spans = run.tree(entry["span_id"])
        clients = [row for row in spans if row["kind"] == "client" and row["service"] == "web"]
        (looked,) = [row for row in clients if row["operation"].startswith("GET product")]
        # the checkout has forgotten what was cached
        assert looked["miss"] and looked["status"] == "nil"
        misses += 1
        (asked,) = [row for row in clients if row["protocol"] == "http"]
        (filled,) = [row for row in clients if row["operation"].startswith("SET product")]
        assert {looked["parent_id"], asked["parent_id"], filled["parent_id"]} == {
            looked["parent_id"]
        }
        triggered = run.edges.filter(cause_id=looked["span_id"], edge="triggered_by")
        if kind == "unredacted":
            assert set(triggered["effect_id"]) == {asked["span_id"], filled["span_id"]}
        (query,) = [
            row for row in spans if row["service"] == "inventory" and row["kind"] == "client"
        ]
        assert run.path_to(query)[-3:-1] == [("web", "client"), ("inventory", "server")]
    assert misses == CHECKOUTS


@pytest.mark.parametrize("kind", [*KINDS, "broken"])
def test_time_runs_forward(kind, runs):
    run = runs[kind]
    linked = 0
    for row in run.rows.values():
        if row["parent_id"] is not None:
            linked += 1
            assert run.rows[row["parent_id"]]["start_ns"] <= row["start_ns"], row
    assert linked > 10
    forward = run.edges.filter(pl.col("edge") != "caused_by")
    for cause, effect in forward.select("cause_id", "effect_id").iter_rows():
        assert run.rows[cause]["start_ns"] <= run.rows[effect]["start_ns"]
    assert run.edges.filter(edge="queued_by").height == (0 if kind == "broken" else CHECKOUTS)


def test_a_failed_request_leads_to_the_killed_redis(runs):
    run = runs["broken"]
    (failed,) = [
        row for row in run.entries("GET /products/{id}") if int(row["status"] or "0") >= 500
    ]
    (death,) = [row for row in run.rows.values() if row["kind"] == "fault"]
    assert death["service"] == "redis" and "SIGKILL" in str(death["error"])
    causes = run.edges.filter(edge="caused_by")
    reached, wanted = set(), [failed["span_id"]]
    while wanted:
        effect = wanted.pop()
        reached.add(effect)
        wanted += [
            cause
            for cause in causes.filter(effect_id=effect)["cause_id"].to_list()
            if cause not in reached
        ]
    services = {(run.rows[one]["service"], run.rows[one]["kind"]) for one in reached}
    assert {("nginx", "server"), ("web", "server"), ("web", "client")} <= services
    assert death["span_id"] in reached
    # what went well before is nobody's fault
    (good,) = [row for row in run.entries("GET /products/{id}") if row["status"] == "200"]
    assert causes.filter(effect_id=good["span_id"]).is_empty()


@pytest.mark.parametrize("kind", KINDS)
def test_requests_command(kind, runs):
    run = runs[kind]
    rows = [json.loads(line) for line in command("requests", run.path, "--json").splitlines()]
    assert {"POST /checkout", "GET /products/{id}"} <= {row["operation"] for row in rows}
    everything = command("requests", run.path, "--json", "--where", "duration_ns >= 0").splitlines()
    assert len(everything) > len(rows) >= 2 * CHECKOUTS
    for row in map(json.loads, everything):
        assert set(row) == set(REQUESTS.names())
        parts = [row[f"{name}_ns"] for name in ("cpu", "runqueue", "disk", "lock", "other")]
        parts += [wait["wait_ns"] for wait in row["waits"]]
        assert min(parts) >= 0
        assert sum(parts) == row["duration_ns"], row
    web = [row for row in map(json.loads, everything) if row["service"] == "web"]
    peers = {(wait["peer"], wait["protocol"]) for row in web for wait in row["waits"]}
    assert {("inventory", "http"), ("postgresql", "postgresql"), ("redis", "redis")} <= peers


@pytest.mark.parametrize("kind", KINDS)
def test_chain_command(kind, runs):
    run = runs[kind]
    (first, *_) = [
        row["span_id"]
        for row in map(json.loads, command("requests", run.path, "--json").splitlines())
        if row["operation"] == "POST /checkout"
    ]
    told = json.loads(command("chain", run.path, first, "--json"))
    assert told["request_id"] == first
    ids = [span["span_id"] for span in told["spans"]]
    assert len(set(ids)) == len(ids) == len(run.tree(int(first, 16)))
    for span in told["spans"]:
        assert set(span) >= CHAIN_FIELDS
        if span["span_id"] == first:
            assert span["parent_id"] is None
        else:
            assert span["parent_id"] in ids
            assert span["edge"] in EDGE.categories and span["evidence"] in EVIDENCE.categories
    edges = {span["edge"] for span in told["spans"]}
    assert {"calls", "queued_by", "forked_by"} <= edges
    text = command("chain", run.path, first[:12])
    assert "POST /checkout" in text and "queued_by" in text


@pytest.mark.parametrize("kind", KINDS)
def test_services_command(kind, runs):
    run = runs[kind]
    rows = [json.loads(line) for line in command("services", run.path, "--json").splitlines()]
    for row in rows:
        assert set(row) == set(SERVICE_MAP.names())
    calls = {
        (row["client"], row["server"], row["protocol"], row["kind"]): row["calls"] for row in rows
    }
    # checkouts, and products that were looked at
    assert calls["outside", "nginx", "http", "call"] == 2 * CHECKOUTS
    assert calls["nginx", "web", "http", "call"] == 2 * CHECKOUTS
    assert calls["web", "inventory", "http", "call"] == 2 * CHECKOUTS
    assert calls["web", "payment", "http", "call"] == CHECKOUTS
    assert calls["web", "rq", "redis", "queue"] == CHECKOUTS
    for client in ("inventory", "web", "payment", "rq"):
        assert calls[client, "postgresql", "postgresql", "call"] >= CHECKOUTS
