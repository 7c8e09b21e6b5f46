"""Where the time of requests went whose thread works on many of them: in event loops, by contexts.

A task that waits is nowhere: its thread runs others meanwhile, or is in the loop's epoll_wait, which
is no request's. But its calls are known, and where in Python each of them was sent.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl

from scope_ebpf.analysis.contexts import Lineage, Points, trace
from scope_ebpf.analysis.nesting import Flows, nest
from scope_ebpf.analysis.stacks.frames import resolve
from scope_ebpf.analysis.stacks.shares import around, shares, union, without
from scope_ebpf.analysis.stacks.whole import NOT_TAKEN, WEIGHED, period_ns
from scope_ebpf.recording.reader import Recording

LOOP: Final = "[in the event loop: ready, or waiting for its turn or a timer]"

# Where a thread of concurrent.futures waits for its next item: Lib/concurrent/futures/thread.py,
# _worker() calls SimpleQueue.get, which is C.
_POOL: Final = (pl.col("function") == "_worker") & pl.col("file").str.ends_with(
    "concurrent/futures/thread.py"
)

PARTED: Final = pl.Schema({**WEIGHED, "span_id": pl.UInt64(), "call_id": pl.UInt64()})
"""WEIGHED, the request's span, and the client span that a row is about; null: none."""


def find_calls(recording: Recording, members: pl.DataFrame, spans: pl.DataFrame) -> pl.DataFrame:
    """What `spans` called, of all the spans `members`: one row per client span.

    `span_id` (whose call it is), `call_id`, WEIGHED without a weight, `context`, `time_ns`, `upto_ns`.
    The stack is that of the first send: that is where a task waits for the response.
    """
    called = members.filter(
        (pl.col("kind").cast(pl.String) == "client")
        & (pl.col("duration_ns") > 0)
        & pl.col("parent_id").is_in(spans["span_id"].implode())
        & pl.col("tid").is_not_null()
    )
    calls = called.select(
        "tgid",
        "tid",
        "context",
        "connection",
        span_id="parent_id",
        call_id="span_id",
        time_ns="start_ns",
        upto_ns=pl.col("start_ns") + pl.col("duration_ns"),
        inner=pl.format(
            "[waits for {}: {}]",
            pl.coalesce("peer", pl.lit("?")),
            pl.coalesce("operation", "protocol", pl.lit("?")),
        ),
    )
    stacks = _stacks_of_calls(recording, calls)
    return calls.join(stacks, on="call_id", how="left", maintain_order="left").select(
        "tgid",
        "tid",
        "stack",
        "instead",
        "inner",
        "span_id",
        "call_id",
        "context",
        "time_ns",
        "upto_ns",
        inner_kind=pl.lit("network"),
        group=pl.lit(None, pl.String),
        innermost=pl.lit(None, pl.String),
        innermost_kind=pl.lit(None, pl.String),
    )


def _stacks_of_calls(recording: Recording, calls: pl.DataFrame) -> pl.DataFrame:
    """`call_id`, `stack`, and what is `instead` of it."""
    tgids = calls["tgid"].unique().to_list()
    first, last = calls["time_ns"].min(), calls["upto_ns"].max()
    sends = recording.collect(
        recording.messages.filter(
            pl.col("tgid").is_in(tgids)
            & (pl.col("direction") == "send")
            & pl.col("start_ns").is_between(first, last)
        ).select("tgid", "connection", "start_ns", sender="tid", sent_ns="start_ns")
    )
    # a call that made its connection begins with that, and its request comes later
    sent = (
        calls.sort("time_ns")
        .join_asof(
            sends.sort("start_ns"),
            left_on="time_ns",
            right_on="start_ns",
            by=["tgid", "connection"],
            strategy="forward",
            check_sortedness=False,
        )
        .with_columns(inside=pl.col("sent_ns") < pl.col("upto_ns"))
    )
    taken = (
        recording.collect(
            recording.samples.filter(
                pl.col("tgid").is_in(tgids)
                & (pl.col("reason") != "cpu")
                & pl.col("stack").is_not_null()
                & pl.col("time_ns").is_between(first, last)
            ).select("tgid", "tid", "time_ns", "stack")
        )
    ).unique(["tgid", "tid", "time_ns"], keep="first", maintain_order=True)
    looked_into = recording.collect(recording.interpreters.select("tgid").unique())
    python = looked_into["tgid"].implode()
    return (
        sent.join(
            taken.rename({"stack": "at_send"}),
            left_on=["tgid", "sender", "sent_ns"],
            right_on=["tgid", "tid", "time_ns"],
            how="left",
        )
        .join(taken.rename({"stack": "at_begin"}), on=["tgid", "tid", "time_ns"], how="left")
        .with_columns(stack=pl.coalesce(pl.when("inside").then("at_send"), "at_begin"))
        .select(
            "call_id",
            "stack",
            instead=pl.when(pl.col("stack").is_null() & pl.col("tgid").is_in(python)).then(
                pl.lit(NOT_TAKEN)
            ),
        )
    )


def done_for(
    recording: Recording, done: pl.DataFrame, requests: Flows, span_ids: pl.Series,
    lineage: Lineage, loops: pl.DataFrame | None,
) -> pl.DataFrame:  # fmt: skip
    """Those rows of `done` that are known to have been done for one of some requests, with `span_id`.

    `done` has WEIGHED, `time_ns`, `context`, and of waits `upto_ns`. `requests`: everything that was
    handled, each with its `span_ids`. In the request's context, in those made from it, and in
    threads of pools while they worked on items that were put there for it; but not what such a thread
    waited for at its queue. Short waits for locks have no stack that tells, and are left out there.
    """
    nothing = np.zeros(0, np.int64)
    none = Flows(
        nothing.astype(np.uint32), nothing.astype(np.uint32), nothing.astype(np.uint64),
        nothing, nothing, nothing, nothing,
    )  # fmt: skip
    replied_by = np.zeros(len(requests), np.intp)
    owners = nest(requests, none, loops, replied_by, lineage).handlers
    points = Points(*(done[name].to_numpy() for name in ("tgid", "tid", "context", "time_ns")))
    traced = trace(points, owners, lineage, loops)
    found = np.flatnonzero((traced.request >= 0) & ~traced.late)
    rows = done[found].with_columns(
        span_id=span_ids.gather(traced.request[found]),
        pooled=pl.Series(traced.by_item[found] & (points.context[found] == 0)),
    )
    if "upto_ns" not in rows.columns or not rows["pooled"].any():
        return rows.drop("pooled")
    innermost = resolve(recording, rows.filter("pooled").select("tgid", "stack").drop_nulls())
    idle = innermost.filter((pl.col("depth") == 0) & _POOL).select(
        "tgid", "stack", idle=pl.lit(value=True)
    )
    waits_for_items = pl.col("idle").fill_null(value=False) | (
        pl.col("stack").is_null() & pl.col("inner_kind").is_in(["lock", "gil"])
    )
    return (
        rows.join(idle, on=["tgid", "stack"], how="left", maintain_order="left")
        .filter(~(pl.col("pooled") & waits_for_items))
        .drop("pooled", "idle")
    )


def divide(
    recording: Recording, spans: pl.DataFrame, calls: pl.DataFrame, ran: pl.DataFrame,
    waited: pl.DataFrame,
) -> tuple[pl.DataFrame, bool]:  # fmt: skip
    """The time of each span among its calls, and what was done for it; and whether some overlapped.

    `spans`: `span_id`, `tgid`, `tid`, `from_ns`, `to_ns`, and `rest`: what the time is called of which
    nothing is known. `calls`, `ran` and `waited` have the `span_id` of whose they are, and a time or
    times. Returns rows PARTED; those of a span add up to its duration. Things that went on at once
    share their time, but a flow that waits in its own call waits for that. A tick of the sampling
    clock stands for a period at most, and for no more than the gap between calls that it fell into.
    """
    columns = [name for name in PARTED if name != "weight_ns"]
    by_span = [
        _by_span(rows, [*columns, "context", "time_ns", "upto_ns"]) for rows in (calls, waited, ran)
    ]
    nothing = pl.DataFrame(schema={name: PARTED.get(name, pl.Int64()) for name in by_span[0][0]})
    parts: list[pl.DataFrame] = []
    overlapped = False
    period = period_ns(recording)
    for span in spans.iter_rows(named=True):
        limits = span["from_ns"], span["to_ns"]
        asked, idled, ticked = (rows[1].get(span["span_id"], nothing) for rows in by_span)
        asked, idled = _inside(asked, limits), _apart(_inside(idled, limits), asked)
        begin, end = (
            np.concatenate([asked[name].to_numpy(), idled[name].to_numpy()])
            for name in ("time_ns", "upto_ns")
        )
        ticked = ticked.filter(pl.col("time_ns").is_between(*limits, closed="left"))
        on_cpu = around(ticked["time_ns"].to_numpy(), period, *union(begin, end), limits)
        weights, at_once = shares(
            np.concatenate([begin, on_cpu[0]]), np.concatenate([end, on_cpu[1]])
        )
        overlapped |= at_once
        left = pl.DataFrame(
            {
                "tgid": span["tgid"], "tid": span["tid"], "instead": span["rest"],
                "span_id": span["span_id"], "weight_ns": limits[1] - limits[0] - int(weights.sum()),
            },
            schema_overrides={name: PARTED[name] for name in ("tgid", "tid", "span_id")},
        )  # fmt: skip
        known = pl.concat([rows.select(columns) for rows in (asked, idled, ticked)])
        parts += [known.with_columns(weight_ns=pl.Series(weights, dtype=pl.Int64)), left]
    if not parts:
        return pl.DataFrame(schema=PARTED), False
    return pl.concat(parts, how="diagonal").select(PARTED.names()).cast(PARTED), overlapped


def _by_span(rows: pl.DataFrame, columns: list[str]) -> tuple[list[str], dict[int, pl.DataFrame]]:
    missing = [name for name in ("call_id", "upto_ns") if name not in rows.columns]
    whole = rows.with_columns(
        pl.lit(None, PARTED.get(name, pl.Int64())).alias(name) for name in missing
    ).select(columns)
    return columns, {
        key[0]: group for key, group in whole.partition_by("span_id", as_dict=True).items()
    }


def _inside(rows: pl.DataFrame, limits: tuple[int, int]) -> pl.DataFrame:
    begin, end = limits
    return rows.with_columns(
        time_ns=pl.max_horizontal("time_ns", pl.lit(begin)),
        upto_ns=pl.min_horizontal("upto_ns", pl.lit(end)),
    ).filter(pl.col("upto_ns") > pl.col("time_ns"))


def _apart(waits: pl.DataFrame, calls: pl.DataFrame) -> pl.DataFrame:
    """The waits without the time in which their flow waited in its own call."""
    if waits.is_empty() or calls.is_empty():
        return waits
    flow = ["tgid", "tid", "context"]
    own = {
        key: union(group["time_ns"].to_numpy(), group["upto_ns"].to_numpy())
        for key, group in calls.partition_by(flow, as_dict=True).items()
    }
    rows, begin, end = [], [], []
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for row, (*key, since, until) in enumerate(
        waits.select(*flow, "time_ns", "upto_ns").iter_rows()
    ):
        for left in without(since, until, *own.get(tuple(key), nothing)):
            rows.append(row)
            begin.append(left[0])
            end.append(left[1])
    return waits[rows].with_columns(
        time_ns=pl.Series(begin, dtype=pl.Int64), upto_ns=pl.Series(end, dtype=pl.Int64)
    )
