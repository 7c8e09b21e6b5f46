"""Makes recordings whose spans and edges are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from scope_ebpf import open_recording
from scope_ebpf.analysis.schema import EDGES, SPANS
from scope_ebpf.recording.reader import Recording
from tests.pure.recordings import ROWS, at, make_recording

# A request to nginx (100) that gunicorn (200) handled: it ran SQL, missed the cache and queued a
# job, which a worker (300) did and failed. What follows is somebody else's, on the same thread.
SPAN_ROWS: list[dict[str, Any]] = [
    {"span_id": 0xA1, "kind": "server", "service": "nginx", "tgid": 100, "protocol": "http",
     "operation": "GET /users/{id}", "detail": "GET /users/17?full=1", "start_ns": at(1_000),
     "duration_ns": 90_000, "status": "200", "peer": "10.0.0.9:5555", "connection": 1,
     "request_bytes": 120, "response_bytes": 2_000},
    {"span_id": 0xA2, "parent_id": 0xA1, "kind": "client", "service": "nginx", "tgid": 100,
     "protocol": "http", "operation": "GET /users/{id}", "detail": "GET /users/17?full=1",
     "start_ns": at(2_000), "duration_ns": 80_000, "status": "200", "peer": "web"},
    {"span_id": 0xA3, "parent_id": 0xA2, "kind": "server", "service": "web", "tgid": 200,
     "protocol": "http", "operation": "GET /users/{id}", "detail": "GET /users/17?full=1",
     "start_ns": at(3_000), "duration_ns": 70_000, "status": "200", "peer": "nginx"},
    {"span_id": 0xA4, "parent_id": 0xA3, "kind": "client", "service": "web", "tgid": 200,
     "protocol": "postgresql", "operation": "SELECT name FROM users WHERE id = ?",
     "detail": "SELECT name FROM users WHERE id = 17", "start_ns": at(4_000),
     "duration_ns": 10_000, "status": "SELECT", "peer": "127.0.0.1:5432"},
    {"span_id": 0xA5, "parent_id": 0xA3, "evidence": "derived", "kind": "client", "service": "web",
     "tgid": 200, "protocol": "redis", "operation": "GET user:?", "detail": "GET user:17",
     "start_ns": at(15_000), "duration_ns": 5_000, "status": "nil", "miss": True, "peer": "redis"},
    {"span_id": 0xA6, "parent_id": 0xA3, "edge": "queued_by", "kind": "consumer",
     "service": "worker", "tgid": 300, "protocol": "redis", "operation": "send_mail",
     "start_ns": at(200_000), "duration_ns": 50_000, "error": "connection refused"},
    {"span_id": 0xA7, "parent_id": 0xA6, "edge": "caused_by", "evidence": "guess",
     "kind": "fault", "service": "worker", "tgid": 300, "operation": "connection refused",
     "start_ns": at(210_000), "duration_ns": 1_000, "error": "nobody listens on port 25"},
    {"span_id": 0xA8, "parent_id": 0xA7, "kind": "client", "service": "worker", "tgid": 300,
     "start_ns": at(210_100), "duration_ns": 100, "state": "no_response"},
    {"span_id": 0xFFFFFFFFFFFFFFFF, "kind": "server", "service": "web", "tgid": 200,
     "protocol": "http", "operation": "BREW /pot", "detail": "BREW /pot", "start_ns": at(50_000),
     "duration_ns": 100_000, "status": "503", "error": "503", "context": 2**63 + 5},
]  # fmt: skip
EDGE_ROWS: list[dict[str, Any]] = [
    {"cause_id": 0xA1, "effect_id": 0xA2, "edge": "calls", "evidence": "exact", "parent": True,
     "reason": "same thread"},
    {"cause_id": 0xA6, "effect_id": 0xA7, "edge": "caused_by", "evidence": "guess", "parent": True,
     "reason": "at the same time"},
    {"cause_id": 0xFFFFFFFFFFFFFFFF, "effect_id": 0xA4, "edge": "woken_by", "evidence": "exact",
     "parent": False, "reason": "released the lock"},
    {"cause_id": 0xDEAD, "effect_id": 0xA4, "edge": "woken_by", "evidence": "exact",
     "parent": False, "reason": "no such span"},
]  # fmt: skip
TREE = {0xA1, 0xA2, 0xA3, 0xA4, 0xA5, 0xA6, 0xA7, 0xA8}


class Traced(Recording):
    """A recording on disk with spans that a test chose."""

    span_frame: pl.DataFrame
    edge_frame: pl.DataFrame

    def spans(self) -> pl.LazyFrame:
        """As the test said."""
        return self.span_frame.lazy()

    def edges(self) -> pl.LazyFrame:
        """As the test said."""
        return self.edge_frame.lazy()


def span_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Spans; `request_id` is made of the parents, `tid` is `tgid` where it is not given."""
    parents = {row["span_id"]: row.get("parent_id") for row in rows}
    full = []
    for row in rows:
        root = row["span_id"]
        while parents.get(root) is not None:
            root = parents[root]
        parent = {"edge": "calls", "evidence": "exact"} if row.get("parent_id") else {}
        given = {"tid": row["tgid"], "context": 0, "miss": False, "state": "complete", **parent}
        full.append({"request_id": root, **given, **row})
    return pl.DataFrame(
        {name: pl.Series(name, [row.get(name) for row in full], dtype=dtype)
         for name, dtype in SPANS.items()}
    )  # fmt: skip


def make_traced(
    path: Path,
    spans: Sequence[Mapping[str, Any]] | pl.DataFrame = SPAN_ROWS,
    edges: Sequence[Mapping[str, Any]] = EDGE_ROWS,
    **tables: Any,
) -> Traced:
    """Write a recording, and give it these spans."""
    opened = open_recording(make_recording(path, tables or ROWS))
    traced = Traced(opened.path, opened.meta, opened._segments, verify=True)
    traced.span_frame = spans if isinstance(spans, pl.DataFrame) else span_frame(spans)
    traced.edge_frame = pl.DataFrame(
        {name: pl.Series(name, [row[name] for row in edges], dtype=dtype)
         for name, dtype in EDGES.items()}
    )  # fmt: skip
    return traced
