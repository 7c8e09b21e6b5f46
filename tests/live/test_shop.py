"""The shop that is traced elsewhere: it answers, and its own account of who caused what is sound.

Nothing is traced here. It is a live test because its servers run as other users, which takes root.
"""

from __future__ import annotations

import http.client
import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg2
import pytest
import redis
import rq.job

pytestmark = pytest.mark.live

SHOP = Path(__file__).resolve().parents[2] / "examples" / "shop"
SEEDED_ORDERS = 20
STOCK = 1_000_000
REQUESTS = 199
VARIANTS: dict[str, dict[str, Any]] = {
    "sync": {"workers": 2},
    "gthread": {"workers": 2, "threads": 4, "simple_worker": True},
}
MAIN_PROCESSES = {"nginx", "web", "inventory", "payment", "postgres", "redis", "worker"}


@pytest.fixture(scope="module")
def modules():
    """The shop's own modules, which are no package."""
    sys.path.insert(0, str(SHOP))
    try:
        yield importlib.import_module("service"), importlib.import_module("load")
    finally:
        sys.path.remove(str(SHOP))


@pytest.fixture(scope="module", params=VARIANTS)
def market(request, modules):
    """The whole shop, with its truth."""
    service, _ = modules
    with service.Market(truth=True, **VARIANTS[request.param]) as running:
        yield running


def ask(market: Any, method: str, path: str, body: object = None, rid: str = "") -> tuple[int, Any]:
    """One request to nginx; returns the status and the answer's JSON."""
    where = urlsplit(market.url)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=10)
    headers = {"Content-Type": "application/json"} | ({"X-Request-Id": rid} if rid else {})
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def query(market: Any, sql: str, *values: object) -> list[tuple[Any, ...]]:
    """Rows of the shop's database."""
    connection = psycopg2.connect(market.urls["postgres"])
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql, values)
            rows: list[tuple[Any, ...]] = cursor.fetchall()
            return rows
    finally:
        connection.close()


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def job_status(market: Any, job_id: str) -> str:
    """What RQ says of a job."""
    with redis.Redis.from_url(market.urls["redis"]) as client:
        return str(rq.job.Job.fetch(job_id, connection=client).get_status().value)


def test_processes(market):
    assert market.pids.keys() == MAIN_PROCESSES
    for name in ("web", "inventory", "payment"):
        # by which a tracer names the service
        command = psutil.Process(market.pids[name]).cmdline()
        assert "gunicorn" in command and command[-1] == f"{name}:app"
        assert len(psutil.Process(market.pids[name]).children()) == market.workers
    assert psutil.Process(market.pids["worker"]).cmdline()[1:3][0].endswith("/rq")
    assert len(psutil.Process(market.pids["nginx"]).children()) == 1
    for name in ("nginx", "postgres", "redis"):
        assert psutil.Process(market.pids[name]).uids().effective != 0


def test_endpoints(market):
    assert ask(market, "GET", "/health") == (200, {"status": "ok"})
    status, listed = ask(market, "GET", "/products")
    assert status == 200 and len(listed["products"]) == 50
    status, product = ask(market, "GET", "/products/7")
    assert status == 200 and product["id"] == 7 and product["price_cents"] > 0
    assert ask(market, "GET", "/products/7") == (200, product)
    status, order = ask(market, "POST", "/checkout", {"product": 7, "quantity": 3})
    assert status == 201 and order["total_cents"] == 3 * product["price_cents"]
    # the cached page is forgotten
    assert ask(market, "GET", "/products/7")[1]["stock"] == product["stock"] - 3
    status, shown = ask(market, "GET", f"/orders/{order['order']}")
    assert status == 200
    assert (shown["product"], shown["quantity"], shown["payment"]) == (7, 3, "captured")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/products/999", None, 404),
        ("GET", "/orders/999999", None, 404),
        ("GET", "/nothing", None, 404),
        ("POST", "/checkout", {"product": 101, "quantity": 1}, 409),
        ("POST", "/checkout", {"product": 999, "quantity": 1}, 404),
        ("POST", "/checkout", {"product": 1, "quantity": 0}, 400),
        ("POST", "/checkout", ["no"], 400),
    ],
)
def test_refusals(method, path, body, status, market):
    answer = ask(market, method, path, body)
    assert answer[0] == status and answer[1]["error"]


def test_order_mail(market):
    status, answer = ask(market, "POST", "/checkout", {"product": 3, "quantity": 2})
    assert status == 201
    assert wait_until(lambda: job_status(market, answer["job_id"]) == "finished")
    ((subject,),) = query(market, "SELECT subject FROM mails WHERE order_id = %s", answer["order"])
    assert str(answer["order"]) in subject


def test_load_and_truth(market, modules):
    _, load = modules
    result = load.run_load(market.url, requests=REQUESTS, clients=5, with_ids=True)
    assert result.complete and not result.errors
    assert len({each.rid for each in result.sent}) == REQUESTS
    lines = complete_truth(market, {each.rid for each in result.sent})
    check_truth(market, lines)
    served = {line["rid"]: line for line in lines if is_outermost(line)}
    for each in result.sent:
        line = served[each.rid]
        assert line["what"] == f"{each.method} {each.path}" and line["status"] == each.status
        assert each.start_ns < line["start_ns"] < each.end_ns
        if each.kind == "checkout":
            check_checkout([line for line in lines if line["rid"] == each.rid])
    # nothing that was sold was forgotten: without `race` the stock is exact
    ((sold,),) = query(market, "SELECT sum(%s - stock) FROM inventory WHERE stock > 0", STOCK)
    ((ordered,),) = query(market, "SELECT sum(quantity) FROM orders WHERE id > %s", SEEDED_ORDERS)
    assert sold == ordered > 0


def test_ids_on_the_way(market):
    """nginx notes the id as well; an id that could break out of a comment is not taken."""
    status, _ = ask(market, "GET", "/products", rid="*/ SELECT 1 --")
    assert status == 200
    rid = "0123456789abcdef" * 2
    ask(market, "GET", "/products", rid=rid)
    log = market.directory / "nginx" / "access.log"
    assert wait_until(lambda: rid in log.read_text())
    assert all(len(line["rid"]) == 32 for line in market.truth_lines())


def is_outermost(line: dict[str, Any]) -> bool:
    """Whether it is of a request from outside."""
    return bool(line["kind"] == "server" and line["parent"] is None)


def complete_truth(market: Any, rids: set[str]) -> list[dict[str, Any]]:
    """The lines, once each request's own is there, and the job of each checkout."""

    def is_complete() -> bool:
        lines = market.truth_lines()
        served = {line["rid"] for line in lines if is_outermost(line)}
        sold = {
            line["rid"]
            for line in lines
            if line["what"] == "POST /checkout" and line["status"] == 201
        }
        return bool(
            rids <= served and sold == {line["rid"] for line in lines if line["kind"] == "job"}
        )

    assert wait_until(is_complete, 20)
    lines: list[dict[str, Any]] = market.truth_lines()
    return lines


def check_truth(market: Any, lines: list[dict[str, Any]]) -> None:
    """Every line has its cause, of the same request, and not after it."""
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines)
    for line in lines:
        assert line["start_ns"] < line["end_ns"] and line["tgid"] > 0 and line["tid"] > 0
        if is_outermost(line):
            # besides those through nginx, the others' health is asked at the start
            assert line["service"] == "web" or line["what"] == "GET /health"
            continue
        cause = by_id[line["parent"]]
        assert cause["rid"] == line["rid"] and cause["start_ns"] < line["start_ns"]
        if line["kind"] == "client":
            assert cause["kind"] in ("server", "job") and line["end_ns"] < cause["end_ns"]
            assert (line["service"], line["tgid"], line["tid"]) == (
                cause["service"], cause["tgid"], cause["tid"],
            )  # fmt: skip
            assert (line["port"] is None) == (line["target"] == "postgresql")
        elif line["kind"] == "server":
            assert cause["kind"] == "client" and cause["target"] == line["service"]
            assert cause["what"] == line["what"] and cause["status"] == line["status"]
        else:
            assert cause["target"] == "redis" and "RPUSH" in cause["what"].split()
            assert line["service"] == "worker" and cause["service"] == "web"
    jobs = {line["tgid"] for line in lines if line["kind"] == "job"}
    assert (jobs == {market.pids["worker"]}) == market.simple_worker


def check_checkout(lines: list[dict[str, Any]]) -> None:
    """A sold checkout went through all of the shop."""
    kinds = Counter((line["service"], line["kind"], line["target"]) for line in lines)
    redis_calls = kinds.pop(("web", "client", "redis"))
    assert redis_calls >= 2  # RQ's own number, and the one that forgets the page
    assert kinds == {
        ("web", "server", None): 1,
        ("web", "client", "inventory"): 1,
        ("inventory", "server", None): 1,
        ("inventory", "client", "postgresql"): 4,
        ("web", "client", "payment"): 1,
        ("payment", "server", None): 1,
        ("payment", "client", "postgresql"): 1,
        ("web", "client", "postgresql"): 4,
        ("worker", "job", None): 1,
        ("worker", "client", "postgresql"): 4,
    }


def test_redis_killed_then_ended(modules):
    """Without Redis product pages fail, and all else goes on; at the end nothing is left."""
    service, _ = modules
    with service.Market(workers=1, keep_alive=False) as market:
        directory = market.directory
        family = [psutil.Process(pid) for pid in market.pids.values()]
        family += [child for each in family for child in each.children(recursive=True)]
        assert ask(market, "GET", "/products/1")[0] == 200
        market.kill("redis")
        status, answer = ask(market, "GET", "/products/1")
        assert status == 503 and "does not answer" in answer["error"]
        assert ask(market, "GET", "/health")[0] == 503
        assert ask(market, "GET", "/products")[0] == 200
        status, answer = ask(market, "POST", "/checkout", {"product": 1, "quantity": 1})
        assert status == 201 and answer["job_id"] is None
        with pytest.raises(service.ShopError, match="redis has ended by itself"):
            market.check()
        # without `truth`, nothing is noted
        assert market.truth_lines() == []
    assert len(family) >= len(MAIN_PROCESSES) + 4
    assert wait_until(lambda: not any(process.is_running() for process in family))
    assert not directory.exists()


def test_race(modules):
    """With `race`, checkouts at one time forget each other's."""
    service, load = modules
    with service.Market(workers=4, race=True) as market:
        lost = 0
        for seed in range(20):
            load.run_load(market.url, requests=100, clients=8, seed=seed, mix={"checkout": 1})
            ((lost,),) = query(
                market,
                "SELECT (SELECT sum(quantity) FROM orders WHERE id > %s)"
                " - (SELECT sum(%s - stock) FROM inventory WHERE stock > 0)",
                SEEDED_ORDERS,
                STOCK,
            )
            if lost:
                break
        assert lost > 0


def test_opentelemetry(modules):
    """The other account: one trace from web to the mail job, with the request's id at its root."""
    service, _ = modules
    rid = "fedcba9876543210" * 2
    with service.Market(workers=1, otel=True) as market:
        status, _ = ask(market, "POST", "/checkout", {"product": 5, "quantity": 1}, rid)
        assert status == 201

        def names() -> set[tuple[str, str]]:
            return {(span["service"], span["name"]) for span in market.otel_spans()}

        wanted = {
            ("web", "POST /checkout"),
            ("inventory", "POST /reserve"),
            ("payment", "POST /payments"),
            ("worker", "send_order_mail"),
        }
        assert wait_until(lambda: wanted <= names())
        spans = {span["span_id"]: span for span in market.otel_spans()}
    roots = [span for span in spans.values() if span["name"] == "POST /checkout"]
    assert len(roots) == 1 and roots[0]["parent_id"] is None
    assert roots[0]["attributes"]["http.request.header.x_request_id"] == [rid]
    for name in ("POST /reserve", "POST /payments", "send_order_mail", "COMMIT"):
        for span in (each for each in spans.values() if each["name"] == name):
            assert root_of(span, spans) is roots[0]


def root_of(span: dict[str, Any], spans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Where its trace begins."""
    while span["parent_id"] is not None:
        span = spans[span["parent_id"]]
    return span
