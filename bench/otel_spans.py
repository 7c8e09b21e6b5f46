"""Compares the parents of spans with those that OpenTelemetry's instrumentation of the shop gives.

Its spans are made in the services, around the calls of Python; ours are what went over connections.
They are paired by process, thread and time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from scope_ebpf.recording.reader import Recording

FLOW = ["tgid", "tid"]


@dataclass
class Agreed:
    """By kind of span: `same` parent, an`other`, `none`, or the span or its parent is `unseen`."""

    kinds: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """How many parents OpenTelemetry has."""
        return sum(counts.total() for counts in self.kinds.values())

    @property
    def share(self) -> float:
        """How many of them are ours, too."""
        same = sum(counts["same"] for counts in self.kinds.values())
        return same / self.total if self.total else 0.0


def agree(recording: Recording, otel: Sequence[dict[str, Any]]) -> Agreed:
    """Compare the parents of all of OpenTelemetry's spans that lie within the recording."""
    spans = recording.spans().collect()
    meta = recording.meta
    offset_ns = meta.clock.realtime_offset_ns
    theirs = pl.DataFrame(
        [
            {
                "id": span["span_id"],
                "parent": span["parent_id"],
                "kind": span["kind"],
                "protocol": _protocol(span),
                "tgid": span["attributes"]["process.pid"],
                "tid": span["attributes"]["thread.id"],
                "start_ns": span["start_ns"] - offset_ns,
                "end_ns": span["end_ns"] - offset_ns,
            }
            for span in otel
        ],
        schema_overrides={"tgid": pl.UInt32, "tid": pl.UInt32, "parent": pl.String},
    ).filter(pl.col("start_ns") >= meta.started_ns, pl.col("end_ns") <= (meta.ended_ns or 0))
    paired = pl.concat([_handlers(spans, theirs), _calls(spans, theirs)])
    ours = spans.select("span_id", "parent_id", evidence=pl.col("evidence").cast(pl.String))
    known = paired.join(ours, on="span_id", how="left")
    # it has no span of what put the job into the queue, only of the request that did
    above = ours.select(parent_id="span_id", above_id="parent_id")
    known = known.join(above, on="parent_id", how="left").with_columns(
        ours_id=pl.when(pl.col("kind") == "consumer").then("above_id").otherwise("parent_id")
    )
    wanted = known.join(paired.select(parent="id", expected_id="span_id"), on="parent", how="inner")
    verdict = (
        pl.when(pl.col("span_id").is_null() | pl.col("expected_id").is_null())
        .then(pl.lit("unseen"))
        .when(pl.col("ours_id").is_null() | (pl.col("evidence") == "guess"))
        .then(pl.lit("none"))
        .when(pl.col("ours_id") == pl.col("expected_id"))
        .then(pl.lit("same"))
        .otherwise(pl.lit("other"))
    )
    result = Agreed()
    judged = wanted.with_columns(verdict=verdict).group_by("kind", "protocol", "verdict").len()
    for kind, protocol, word, count in judged.sort("kind", "protocol").iter_rows():
        name = f"{kind} {protocol or ''}".rstrip()
        result.kinds.setdefault(name, Counter())[word] += count
    return result


def _protocol(span: dict[str, Any]) -> str | None:
    attributes = span["attributes"]
    if span["kind"] == "consumer":
        return None
    return str(attributes.get("db.system.name") or attributes.get("db.system") or "http")


def _handlers(spans: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Requests and jobs, each with the span of ours that it lies in: `span_id`, or null."""
    until_ns = pl.col("start_ns") + pl.col("duration_ns")
    pairs = []
    # a job may run in a fork of the worker, of which there is one; so it is found by time alone
    for kind, flow in (("server", FLOW), ("consumer", [])):
        ours = spans.filter(pl.col("kind").cast(pl.String) == kind)
        if kind == "server":
            ours = ours.filter(pl.col("protocol") == "http")
        pairs.append(
            theirs.filter(pl.col("kind") == kind)
            .sort("start_ns")
            .join_asof(
                ours.sort("start_ns").select(*flow, "start_ns", "span_id", until_ns=until_ns),
                on="start_ns",
                by=flow or None,
                check_sortedness=False,
            )
            .with_columns(span_id=pl.when(pl.col("start_ns") <= pl.col("until_ns")).then("span_id"))
            .drop("until_ns")
        )
    return pl.concat(pairs)


def _calls(spans: pl.DataFrame, theirs: pl.DataFrame) -> pl.DataFrame:
    """Calls, each with the last span of ours that began within it: `span_id`, or null."""
    ours = spans.filter(pl.col("kind") == "client").sort("start_ns")
    return (
        theirs.filter(pl.col("kind") == "client")
        .sort("end_ns")
        .join_asof(
            ours.select(*FLOW, "protocol", "span_id", begun_ns="start_ns", at_ns="start_ns"),
            left_on="end_ns",
            right_on="at_ns",
            by=[*FLOW, "protocol"],
            check_sortedness=False,
        )
        .with_columns(span_id=pl.when(pl.col("begun_ns") >= pl.col("start_ns")).then("span_id"))
        .select(*theirs.columns, "span_id")
    )
