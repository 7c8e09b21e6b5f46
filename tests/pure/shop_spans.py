"""Spans, edges and requests of a small shop, as analysis gives them: two requests and a job.

`checkout` goes through nginx, web, Redis (a miss), PostgreSQL and inventory, and queues a job that
rq does after the response. `cart` fails, since Redis was killed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import pytest

from scope_ebpf.analysis.schema import EDGES, REQUESTS, SPANS
from scope_ebpf.recording.reader import Recording
from tests.pure.recordings import at

CHECKOUT = 0x3F2A91C0D4E5F607
CART = 0x3F2A91C0FFFF0001
KILLED = 0x77000000000000AA
US, MS = 1_000, 1_000_000


def nth(number: int) -> int:
    """An id like those of analysis, in which all digits differ from one to the next."""
    return number * 0x9E3779B97F4A7C15 % 2**64


_TGIDS = {
    "nginx": 10, "web": 20, "inventory": 30, "postgresql": 40, "redis": 50, "rq:mail": 60,
}  # fmt: skip


def span(number: int, **columns: Any) -> dict[str, Any]:
    """A row of spans; what is not given is that of a usual client span."""
    service = columns.get("service", "web")
    tgid = _TGIDS.get(service, 99)
    return {
        "span_id": number, "kind": "client", "service": service, "tgid": tgid, "tid": tgid,
        "context": 0, "start_ns": at(0), "duration_ns": MS, "state": "complete", "miss": False,
        "request_bytes": 100, "response_bytes": 200, **columns,
    }  # fmt: skip


def _led(parent: int, edge: str = "calls", evidence: str = "exact") -> dict[str, Any]:
    return {"parent_id": parent, "edge": edge, "evidence": evidence}


def _when(start_us: int, duration_us: int) -> dict[str, int]:
    return {"start_ns": at(start_us * US), "duration_ns": duration_us * US}


_HTTP = {"protocol": "http", "operation": "POST /checkout", "detail": "POST /checkout?a=?b7"}
_STOCK = {"protocol": "http", "operation": "GET /stock/{id}", "detail": "GET /stock/?x"}
_SQL = {
    "protocol": "postgresql",
    "operation": "SELECT name, price FROM products WHERE id = ? AND shop = ? FOR UPDATE",
}
_INSERT = {"protocol": "postgresql", "operation": "INSERT INTO mails VALUES (?, ?)"}
_GET = {"protocol": "redis", "operation": "GET product:?", "status": "nil", "miss": True}
_PUSH = {"protocol": "redis", "operation": "LPUSH rq:queue:mail", "status": "OK"}

_CHECKOUT_SPANS = [
    span(CHECKOUT, kind="server", service="nginx", peer="10.0.0.9:51312", status="200", **_HTTP,
         **_when(0, 41_200)),
    span(nth(2), service="nginx", peer="web", status="200", **_HTTP, **_led(CHECKOUT, "continues"),
         **_when(300, 40_600)),
    span(nth(3), kind="server", service="web", peer="nginx", status="200", **_HTTP, **_led(nth(2)),
         **_when(500, 40_200)),
    span(nth(4), peer="redis", **_GET, **_led(nth(3), "continues"), **_when(1_200, 400)),
    span(nth(5), kind="server", service="redis", peer="web", **_GET, **_led(nth(4), "calls", "derived"),
         **_when(1_300, 200)),
    span(nth(6), peer="postgresql", status="OK", **_SQL, **_led(nth(3), "continues"), **_when(2_000, 12_000)),
    span(nth(7), kind="server", service="postgresql", peer="web", status="OK", **_SQL, **_led(nth(6)),
         **_when(2_100, 11_800)),
    span(nth(8), peer="inventory", status="200", **_STOCK, **_led(nth(3), "continues"),
         **_when(15_000, 20_000)),
    span(nth(9), kind="server", service="inventory", peer="web", status="200", **_STOCK, **_led(nth(8)),
         **_when(15_400, 19_000)),
    span(nth(10), service="inventory", peer="10.0.0.7:5432", status="OK", protocol="postgresql",
         operation="SELECT count(*) FROM stock", **_led(nth(9), "continues"), **_when(16_000, 17_000)),
    span(nth(11), peer="redis", **_PUSH, **_led(nth(3), "continues"), **_when(38_000, 300)),
    span(nth(12), kind="consumer", service="rq:mail", protocol="redis", operation="shop.jobs.send_mail",
         status="OK", **_led(nth(11), "queued_by"), **_when(45_000, 30_000)),
    span(nth(13), service="rq:mail", peer="postgresql", status="OK", **_INSERT,
         **_led(nth(12), "continues"), **_when(50_000, 2_000)),
]  # fmt: skip
_CART_SPANS = [
    span(CART, kind="server", service="web", peer="10.0.0.9:51313", protocol="http",
         operation="GET /cart", status="500", error="Internal Server Error",
         **_when(100_000, 3_000)),
    span(nth(21), peer="redis", protocol="redis", operation="connect", status="error",
         error="ECONNREFUSED: nobody listens there", state="no_response",
         **_led(CART, "continues"), **_when(101_000, 200)),
]  # fmt: skip
_KILLED_SPANS = [
    span(KILLED, kind="fault", service="redis", operation="killed by SIGKILL", status="SIGKILL",
         error="killed by SIGKILL", **_when(90_000, 0)),
]  # fmt: skip


def _rows(request_id: int, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "request_id": request_id} for row in rows]


SPAN_ROWS = (
    _rows(KILLED, _KILLED_SPANS) + _rows(CART, _CART_SPANS) + _rows(CHECKOUT, _CHECKOUT_SPANS)
)
EDGE_ROWS = [
    {"cause_id": row["parent_id"], "effect_id": row["span_id"], "edge": row["edge"],
     "evidence": row["evidence"], "reason": "same bytes", "parent": True}
    for row in SPAN_ROWS
    if row.get("parent_id")
] + [
    {"cause_id": KILLED, "effect_id": nth(21), "edge": "caused_by", "evidence": "exact",
     "reason": "the process at the other end had ended", "parent": False},
    {"cause_id": nth(21), "effect_id": CART, "edge": "caused_by", "evidence": "derived",
     "reason": "the last thing before it failed", "parent": False},
]  # fmt: skip


def request(number: int, **columns: Any) -> dict[str, Any]:
    """A row of requests; what is not given is that of a usual entry request of web."""
    usual = {
        "span_id": number, "request_id": number, "kind": "server", "entry": True,
        "start_ns": at(0), "duration_ns": 10 * MS, "service": "web", "tgid": 20, "tid": 20,
        "protocol": "http", "operation": "GET /", "detail": "GET /", "status": "200",
        "state": "complete", "spans": 0, "cpu_ns": 0, "runqueue_ns": 0, "disk_ns": 0, "lock_ns": 0,
        "other_ns": 0, "waits": [],
    }  # fmt: skip
    return {**usual, **columns}


def _wait(peer: str, protocol: str, wait_ns: int) -> dict[str, Any]:
    return {"peer": peer, "protocol": protocol, "wait_ns": wait_ns}


REQUEST_ROWS = [
    request(CHECKOUT, service="nginx", tgid=10, tid=10, operation="POST /checkout", spans=12,
            start_ns=at(0), duration_ns=41_200 * US, cpu_ns=400 * US, other_ns=200 * US,
            waits=[_wait("web", "http", 40_600 * US)]),
    request(nth(3), request_id=CHECKOUT, entry=False, operation="POST /checkout", spans=10,
            start_ns=at(500 * US), duration_ns=40_200 * US, cpu_ns=3 * MS, runqueue_ns=1 * MS,
            other_ns=3_500 * US,
            waits=[_wait("inventory", "http", 20 * MS), _wait("postgresql", "postgresql", 12 * MS),
                   _wait("redis", "redis", 700 * US)]),
    request(nth(9), request_id=CHECKOUT, entry=False, service="inventory", spans=1,
            operation="GET /stock/{id}", start_ns=at(15_400 * US), duration_ns=19 * MS,
            cpu_ns=2 * MS, waits=[_wait("10.0.0.7:5432", "postgresql", 17 * MS)]),
    request(nth(12), request_id=CHECKOUT, entry=False, kind="consumer", service="rq:mail", spans=1,
            protocol="redis", operation="shop.jobs.send_mail", status="OK", start_ns=at(45 * MS),
            duration_ns=30 * MS, cpu_ns=28 * MS, waits=[_wait("postgresql", "postgresql", 2 * MS)]),
    request(CART, operation="GET /cart", status="500", error="Internal Server Error", spans=1,
            start_ns=at(100 * MS), duration_ns=3 * MS, cpu_ns=2_800 * US, other_ns=200 * US),
]  # fmt: skip


def spans(rows: Sequence[Mapping[str, Any]] = SPAN_ROWS) -> pl.DataFrame:
    """Rows of spans."""
    return pl.DataFrame(list(rows), schema=SPANS)


def edges(rows: Sequence[Mapping[str, Any]] = EDGE_ROWS) -> pl.DataFrame:
    """Rows of edges."""
    return pl.DataFrame(list(rows), schema=EDGES)


def requests(rows: Sequence[Mapping[str, Any]] = REQUEST_ROWS) -> pl.DataFrame:
    """Rows of requests."""
    return pl.DataFrame(list(rows), schema=REQUESTS)


def analysed_as(
    monkeypatch: pytest.MonkeyPatch,
    span_rows: Sequence[Mapping[str, Any]] = SPAN_ROWS,
    edge_rows: Sequence[Mapping[str, Any]] = EDGE_ROWS,
    request_rows: Sequence[Mapping[str, Any]] = REQUEST_ROWS,
) -> None:
    """Let every recording have these spans, edges and requests: commands only show them."""
    tables = {
        "spans": spans(span_rows),
        "edges": edges(edge_rows),
        "requests": requests(request_rows),
    }
    for name, frame in tables.items():
        monkeypatch.setattr(Recording, name, lambda _, frame=frame: frame.lazy())
