"""The requests and jobs of a recording, with where the time of each went."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.chains import Chains
from scope_ebpf.analysis.nesting import Flows, works_alone
from scope_ebpf.analysis.parts import time_parts
from scope_ebpf.analysis.schema import PARTS, REQUESTS
from scope_ebpf.recording.reader import Recording

# Protocols of applications: what they handled is a request also where another service asked.
_APPLICATIONS = ("http", "websocket")


def find_requests(recording: Recording, chains: Chains) -> pl.DataFrame:
    """One row per request that a recorded server handled and per job, with the schema REQUESTS.

    A request is a server's span that nothing recorded caused, any
    server's span of HTTP or WebSocket, or a consumer's span. Of those whose request was not seen, because it
    came before the recording, nothing is known: they are left out.
    """
    spans = chains.spans
    handled = (pl.col("kind") == "consumer") | (
        (pl.col("kind") == "server")
        & (pl.col("parent_id").is_null() | pl.col("protocol").is_in(_APPLICATIONS))
    )
    found = (
        spans.filter(
            handled & (pl.col("state") != "began_before") & pl.col("protocol").is_not_null()
        )
        .with_row_index("row")
        .with_columns(entry=~pl.col("span_id").is_in(_inner(spans).implode()))
    )
    counts = count_downstream(spans)
    found = found.join(counts, on="span_id", how="left", maintain_order="left")
    parts = _parts(recording, chains, found)
    return (
        found.join(parts, on="row", how="left", maintain_order="left")
        .with_columns(pl.col("spans").fill_null(0))
        .select(pl.col(name).cast(dtype) for name, dtype in REQUESTS.items())
    )


def _inner(spans: pl.DataFrame) -> pl.Series:
    """The ids of spans that belong to a request or job that was handled by something recorded."""
    parent = _parents(spans)
    handles = spans["kind"].is_in(["server", "consumer"]).to_numpy()
    inside = np.zeros(len(spans), np.bool_)
    above = parent.copy()
    # generations are few; a circle, which nothing here makes, would end the loop, too
    for _ in range(len(spans)):
        there = above >= 0
        if not there.any():
            break
        inside |= there & handles[np.maximum(above, 0)]
        above = np.where(there & ~inside, parent[np.maximum(above, 0)], -1)
    return spans["span_id"].filter(pl.Series(inside))


def _parents(spans: pl.DataFrame) -> NDArray[np.intp]:
    """The row of each span's parent, -1: none."""
    ids = spans["span_id"].to_numpy()
    order = np.argsort(ids)
    parents = spans["parent_id"].fill_null(0).to_numpy()
    place = np.minimum(np.searchsorted(ids[order], parents), max(len(ids) - 1, 0))
    return np.where(ids[order][place] == parents, order[place], -1) if len(ids) else place


def count_downstream(spans: pl.DataFrame) -> pl.DataFrame:
    """`span_id` and `spans`: how many spans each one caused, all levels."""
    return pl.DataFrame({"span_id": spans["span_id"], "spans": _subtree_sizes(_parents(spans))})


def _subtree_sizes(parent: NDArray[np.intp]) -> NDArray[np.uint32]:
    depth = np.zeros(len(parent), np.intp)
    above = parent.copy()
    while (above >= 0).any() and depth.max(initial=0) <= len(parent):
        depth[above >= 0] += 1
        above = np.where(above >= 0, parent[np.maximum(above, 0)], -1)
    sizes = np.zeros(len(parent), np.uint32)
    by_depth = np.argsort(depth, kind="stable")
    cuts = np.searchsorted(depth[by_depth], np.arange(1, depth.max(initial=0) + 2))
    for level in range(len(cuts) - 2, -1, -1):
        rows = by_depth[cuts[level] : cuts[level + 1]]
        np.add.at(sizes, parent[rows], sizes[rows] + 1)
    return sizes


def _parts(recording: Recording, chains: Chains, found: pl.DataFrame) -> pl.DataFrame:
    """Where the time of each request went: `row`, and the columns of REQUESTS from `cpu_ns` on.

    Of a thread that worked on nothing else, all its time is the request's: see `time_parts`. In an
    event loop, whose thread works for many contexts, only what the request itself is known to have
    waited for is.
    """
    peers = (
        chains.spans.filter(pl.col("connection").is_not_null() & pl.col("peer").is_not_null())
        .select("connection", "peer", "protocol")
        .unique("connection", keep="first", maintain_order=True)
    )
    alone = pl.Series(works_alone(_threads(found), chains.loops))
    by_thread = time_parts(recording, found.filter(alone), peers)
    by_calls = _calls_of(found.filter(~alone), chains.spans)
    return pl.concat([by_thread.select(by_calls.columns), by_calls])


def _threads(found: pl.DataFrame) -> Flows:
    start_ns = found["start_ns"].to_numpy()
    return Flows(
        tgid=found["tgid"].to_numpy(),
        tid=found["tid"].to_numpy(),
        context=np.zeros(len(found), np.uint64),
        begun_ns=start_ns,
        start_ns=start_ns,
        end_ns=start_ns + found["duration_ns"].to_numpy(),
        line=np.zeros(len(found), np.int64),
    )


def _calls_of(found: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """Waiting for each peer by the calls that a request made; where they overlap, for the first."""
    begin, end = pl.col("start_ns"), pl.col("start_ns") + pl.col("duration_ns")
    requests = found.select("row", parent_id="span_id", from_ns=begin, upto_ns=end)
    calls = (
        spans.filter((pl.col("kind") == "client") & (pl.col("evidence").cast(pl.String) != "guess"))
        .select("parent_id", "peer", "protocol", begin_ns=begin, end_ns=end)
        .join(requests, on="parent_id")
        .sort("begin_ns")
        .with_columns(
            pl.max_horizontal("begin_ns", "from_ns").alias("begin_ns"),
            pl.min_horizontal("end_ns", "upto_ns").alias("end_ns"),
        )
        .with_columns(
            reached=pl.col("end_ns").cum_max().over("row").shift(1).over("row").fill_null(0)
        )
    )
    waited = pl.col("end_ns") - pl.max_horizontal("begin_ns", "reached")
    waits = (
        calls.with_columns(wait_ns=pl.max_horizontal(waited, 0))
        .group_by("row", "peer", "protocol", maintain_order=True)
        .agg(pl.col("wait_ns").sum())
        .filter(pl.col("wait_ns") > 0)
        .sort("wait_ns", descending=True, maintain_order=True)
        .group_by("row", maintain_order=True)
        .agg(
            waits=pl.struct("peer", "protocol", "wait_ns"),
            waited_ns=pl.col("wait_ns").sum(),
        )
    )
    zero = pl.lit(0, dtype=pl.Int64)
    return found.join(waits, on="row", how="left", maintain_order="left").select(
        pl.col("row").cast(pl.UInt32),
        cpu_ns=zero,
        runqueue_ns=zero,
        disk_ns=zero,
        lock_ns=zero,
        other_ns=pl.col("duration_ns") - pl.col("waited_ns").fill_null(0),
        waits=pl.col("waits").fill_null([]).cast(PARTS),
    )
