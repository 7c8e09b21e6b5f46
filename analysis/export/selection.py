"""Chooses the spans of a recording that an export shows, and what each of them is linked to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl

from scope_ebpf.analysis.schema import span_text
from scope_ebpf.errors import UsageError
from scope_ebpf.recording.meta import Meta


class Traced(Protocol):
    """What an export takes from a `Recording`."""

    meta: Meta

    @property
    def processes(self) -> pl.LazyFrame:
        """See `Recording`."""

    @property
    def connections(self) -> pl.LazyFrame:
        """See `Recording`."""

    @property
    def offcpu(self) -> pl.LazyFrame:
        """See `Recording`."""

    def spans(self) -> pl.LazyFrame:
        """Columns of `analysis.schema.SPANS`."""

    def edges(self) -> pl.LazyFrame:
        """Columns of `analysis.schema.EDGES`."""

    def collect(self, frame: pl.LazyFrame) -> pl.DataFrame:
        """See `Recording`."""


@dataclass(frozen=True)
class Selection:
    """Spans to export, and their links.

    - `spans`: columns of `analysis.schema.SPANS`, by trace and `start_ns`, and
      - `trace`: span_id of the root of its trace, which ends where a parent is only guessed
      - `parent`: span_id of its parent, if that is in the recording and no guess
      - `end_ns`: its end, never before `start_ns`
    - `links`: what else led to these spans, and guessed parents: `effect_id`, `cause_id`,
      `cause_trace`, `edge`, `evidence`, `reason`
    - `traces`: how many different ones
    """

    spans: pl.DataFrame
    links: pl.DataFrame
    traces: int


def select_spans(recording: Traced, request: str | None = None) -> Selection:
    """The spans of the whole recording, or of one request's tree.

    `request`: the id of any span of the tree, or the beginning of one that no other request has.
    A parent that is only guessed is turned into a link, and its child begins a trace of its own:
    other tools show all parents alike, as facts.

    Raises `UsageError` if there is no such request, or more than one.
    """
    every = recording.collect(recording.spans())
    roots = _with_roots(every)
    trace_of = roots.select("span_id", "trace")
    if request is not None:
        roots = roots.filter(pl.col("request_id") == _find_request(every, request))
    effects = roots.select(pl.col("span_id").alias("effect_id"))
    links = recording.collect(
        recording.edges()
        .filter(~pl.col("parent") | (pl.col("evidence") == "guess"))
        .join(effects.lazy(), on="effect_id", how="semi")
        .join(
            trace_of.lazy().rename({"span_id": "cause_id", "trace": "cause_trace"}), on="cause_id"
        )
        .select("effect_id", "cause_id", "cause_trace", "edge", "evidence", "reason")
        .sort("effect_id", "cause_id")
    )
    began = pl.col("start_ns").min().over("trace")
    spans = roots.sort(began, "trace", "start_ns", -pl.col("end_ns"), "span_id")
    return Selection(spans, links, spans["trace"].n_unique())


def _with_roots(spans: pl.DataFrame) -> pl.DataFrame:
    """Adds `trace`, `parent` and `end_ns`."""
    sure = pl.when(pl.col("evidence").ne_missing(pl.lit("guess"))).then(pl.col("parent_id"))
    rows = spans.select("span_id").with_row_index("row")
    parents = (
        spans.select(sure.alias("parent"))
        .join(rows, left_on="parent", right_on="span_id", how="left", maintain_order="left")
        .with_row_index("own")
        .select(
            pl.when(pl.col("row").is_not_null()).then(pl.col("parent")).alias("parent"),
            pl.col("row").fill_null(pl.col("own")).alias("up"),
        )
    )
    up = parents["up"].to_numpy()
    # Each round doubles how far up a row looks. 64 are more than any tree needs, so that even
    # parents in a circle end it.
    for _ in range(64):
        further = up[up]
        if np.array_equal(further, up):
            break
        up = further
    return spans.with_columns(
        pl.Series("trace", spans["span_id"].to_numpy()[up], dtype=pl.UInt64),
        parents["parent"],
        (pl.col("start_ns") + pl.col("duration_ns").fill_null(0).clip(lower_bound=0)).alias(
            "end_ns"
        ),
    )


def _find_request(spans: pl.DataFrame, text: str) -> int:
    """The request_id of the tree that the span whose id begins with `text` is in."""
    wanted = text.strip().lower()
    if not re.fullmatch("[0-9a-f]{1,16}", wanted):
        raise UsageError(f"--request: {text!r} is no id; an id is up to 16 hexadecimal digits")
    low = int(wanted.ljust(16, "0"), 16)
    high = int(wanted.ljust(16, "f"), 16)
    found = spans.filter(
        pl.col("span_id").is_between(pl.lit(low, pl.UInt64), pl.lit(high, pl.UInt64))
    )
    # People copy the ids of requests; other spans only count where no request fits.
    requests = found.filter(pl.col("kind").is_in(["server", "consumer"]))
    ids = (requests if requests.height else found)["request_id"].unique().sort().to_list()
    if not ids:
        raise UsageError(f"--request: there is no request {text}; `scope-ebpf requests` lists them")
    if len(ids) > 1:
        several = ", ".join(map(span_text, ids[:3]))
        raise UsageError(
            f"--request: {len(ids)} requests have an id that begins with {text} ({several}, …); "
            "give more digits"
        )
    return int(ids[0])
