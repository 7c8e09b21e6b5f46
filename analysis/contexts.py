"""Which request a logical context works for: by what made it, and by what its thread was given.

A logical context is an asyncio task's or callback's PyContext, a trio task's, or a greenlet. A task's
context is a copy of the one in which it was made (CPython's Lib/asyncio/tasks.py, `Task.__init__`), and
`asyncio.to_thread` runs a copy in another thread: so a call belongs to the request that its context, or
one above it, handled. A thread of a pool that has no such context works on the item that it took from
the pool's queue last, and so for whoever put it there.

Where a process has greenlets, a thread's own stack is met as one, too. So a thread itself is context 0,
or the greenlet that waits for several things, as the event loop does; other greenlets never do.

An event loop receives in contexts of its own, one for each connection's reader. A server's span is
therefore owned by the context that sent its response, or the topmost one above that which was made
after the request had come (a task for each request, as uvicorn and aiohttp make them); if none was,
the sender is a task that handles its connection's requests one after the other. What the reader's
context made while the request was open is the request's, too. Likewise a thread of a pool that took an
item after the request had come, and answered it before it took the next one, worked on it.

Two requests at once in one context prove nothing: their calls belong to neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.asof import NONE, count_before, group_numbers, latest_before
from scope_ebpf.recording.flows import BIRTHS, ThreadContexts
from scope_ebpf.recording.reader import Recording

Mask = NDArray[np.bool_]
Rows = NDArray[np.intp]
Times = NDArray[np.int64]

# Tasks make tasks, and items are put by those who work on items. Longer ways are not followed.
_STEPS: Final = 64

OWNED: Final = pl.Schema(
    {
        "received_in": pl.UInt64(),
        "made_for": pl.Boolean(),
        "worked_tid": pl.UInt32(),
        "worked_in": pl.UInt64(),
        "worked_ns": pl.Int64(),
    }
)
"""What own_requests finds out of a request beside its context."""


@dataclass(frozen=True)
class Points:
    """Moments of flows: thread `tgid`, `tid` in `context` (0: the thread itself) at `time_ns`."""

    tgid: NDArray[Any]
    tid: NDArray[Any]
    context: NDArray[np.uint64]
    time_ns: Times

    def __len__(self) -> int:
        """How many there are."""
        return len(self.tgid)

    def columns(self) -> tuple[NDArray[Any], ...]:
        """The four arrays."""
        return self.tgid, self.tid, self.context, self.time_ns

    def of(self, rows: NDArray[Any]) -> Points:
        """Some of them."""
        return Points(*(column[rows] for column in self.columns()))


class Lineage:
    """Where contexts and work items came from."""

    def __init__(
        self,
        contexts: pl.DataFrame,
        handoffs: pl.DataFrame,
        births: pl.DataFrame,
        threads: ThreadContexts | None = None,
    ) -> None:
        """From tables of a recording.

        `births` has `tgid`, `tid`, `time_ns` of threads that began; `threads` tells the context of any
        thread at any time.
        """
        self.threads = threads
        known = contexts.sort("time_ns", maintain_order=True).unique("context", keep="first")
        known = known.sort("context")
        self._context = known["context"].to_numpy()
        self._made = Points(
            known["tgid"].to_numpy(),
            known["tid"].to_numpy(),
            known["parent"].to_numpy(),
            known["time_ns"].to_numpy(),
        )
        # Of one that was met only, nobody knows when and where it was made. A new, empty one is what from
        # CPython 3.14 on each thread gets from whoever starts it: a pool's thread, which that request
        # happened to be the first to need, works for others later.
        kind = pl.col("kind").cast(pl.String)
        self._copied = (
            known.select((kind == "copied").fill_null(value=False)).to_series().to_numpy()
        )
        self._greenlet = known.select((kind == "greenlet").fill_null(value=False)).to_series()
        threads_themselves = (pl.col("context") == 0) | pl.col("context").is_in(
            known.filter(kind == "greenlet")["context"].implode()
        )
        self._taken = _taken_items(handoffs, births, threads_themselves)

    def rows_of(self, context: NDArray[np.uint64]) -> Rows:
        """Where the contexts stand here; -1: what made them is not known."""
        if not len(self._context):
            return np.full(len(context), NONE, np.intp)
        place = np.minimum(np.searchsorted(self._context, context), len(self._context) - 1)
        return np.where(self._context[place] == context, place, NONE)

    def is_greenlet(self, context: NDArray[np.uint64]) -> Mask:
        """Which contexts are greenlets."""
        rows = self.rows_of(context)
        found = np.asarray(rows != NONE)
        found[found] = self._greenlet.to_numpy()[rows[found]]
        return found

    def is_stack(self, context: NDArray[np.uint64]) -> Mask:
        """Which are stacks of threads or greenlets, and no copies of contexts."""
        stack: Mask = self.is_greenlet(context) | (context == 0)
        return stack

    def makers(self, context: NDArray[np.uint64]) -> tuple[Points, Mask]:
        """Where contexts were made, and of which that is known."""
        rows = self.rows_of(context)
        known: Mask = rows != NONE
        if not len(self._context):
            nobody, never = np.zeros(len(context), np.uint32), np.zeros(len(context), np.int64)
            return Points(nobody, nobody, context, never), known
        known &= self._copied[np.maximum(rows, 0)]
        return self._made.of(np.maximum(rows, 0)), known

    def only_children(self, points: Points, rows: Rows) -> NDArray[np.uint64]:
        """The only context that each of some points made before the next point of its context did.

        For each of `rows`, which say which points; 0: it made none or several.
        """
        copies = np.flatnonzero(self._copied & (self._made.context != 0))
        made = self._made.of(copies)
        group, of_group = group_numbers((points.context, made.context), (points.tgid, made.tgid))
        maker = latest_before(group, points.time_ns, of_group, made.time_ns)
        known = maker != NONE
        times = np.bincount(maker[known], minlength=len(points))
        child = np.zeros(len(points), np.uint64)
        child[maker[known]] = self._context[copies[known]]
        return np.where(times[rows] == 1, child[rows], np.uint64(0))

    def last_taken_ns(self, points: Points) -> Times:
        """When the flows of some points took their last item up to then; 0: they took none."""
        last = self._last_taken(points)
        taken_ns = pl.when("got").then("time_ns").otherwise(0).cast(pl.Int64)
        times = np.r_[self._taken.select(taken_ns).to_series().to_numpy(), 0]
        return np.where(last == NONE, 0, times[last])

    def _last_taken(self, points: Points) -> Rows:
        taken = self._taken
        group, of_group = group_numbers(
            (taken["tgid"].to_numpy(), points.tgid),
            (taken["tid"].to_numpy(), points.tid),
            (taken["context"].to_numpy(), points.context),
        )
        return latest_before(group, taken["time_ns"].to_numpy(), of_group, points.time_ns)

    def origins(self, points: Points) -> tuple[Points, Mask, Mask]:
        """Where what happens at some points comes from: where its context was made, or item put.

        Returns points, for which of the given ones there is one, and which of these are of items.
        """
        made, known = self.makers(points.context)
        known &= points.context != 0
        taken, last = self._taken, self._last_taken(points)
        by_item: Mask = last != NONE
        at = last[by_item]
        by_item[by_item] = taken["paired"].to_numpy()[at]
        at = last[by_item]
        before = Points(*(column.copy() for column in made.columns()))
        names = ("tgid", "put_tid", "put_context", "put_ns")
        for column, name in zip(before.columns(), names, strict=True):
            column[by_item] = taken[name].to_numpy()[at]
        known |= by_item
        known &= before.time_ns <= points.time_ns
        return before, known, by_item


def _taken_items(
    handoffs: pl.DataFrame, births: pl.DataFrame, threads_themselves: pl.Expr
) -> pl.DataFrame:
    """What threads took from queues, and their births.

    `tgid`, `tid`, `context`, `time_ns`; `got`: else a birth; `paired`: it is known who put it there;
    `put_tid`, `put_context`, `put_ns`. An address is used again: an item that was got is the one that was
    put there last, unless two were on their way at once, as the same small number or None may be.
    """
    item = ["tgid", "item"]
    events = handoffs.with_columns(move=pl.when("put").then(1).otherwise(-1)).sort(
        "time_ns", pl.col("put").not_(), maintain_order=True
    )
    total = pl.col("move").cum_sum()
    # gots whose puts were not seen leave nothing behind
    waiting = total - pl.min_horizontal(total.cum_min(), pl.lit(0))
    events = events.with_columns(
        waiting=waiting.shift(1).over(item),
        put_before=pl.col("put").shift(1).over(item),
        put_tid=pl.col("tid").shift(1).over(item),
        put_context=pl.col("context").shift(1).over(item),
        put_ns=pl.col("time_ns").shift(1).over(item),
    )
    paired = pl.col("put_before") & (pl.col("waiting") == 1)
    # What is got within a task is the task's affair: its thread goes on with what it did.
    gots = events.filter(~pl.col("put") & threads_themselves).select(
        "tgid",
        "tid",
        "context",
        "time_ns",
        pl.col("put_tid").fill_null(0),
        pl.col("put_context").fill_null(0),
        pl.col("put_ns").fill_null(0),
        paired=paired.fill_null(value=False),
        got=pl.lit(value=True),
    )
    born = births.join(gots, on=["tgid", "tid"], how="semi").select(
        "tgid",
        "tid",
        pl.lit(0, dtype=pl.UInt64).alias("context"),
        "time_ns",
        put_tid=pl.lit(0, dtype=pl.UInt32),
        put_context=pl.lit(0, dtype=pl.UInt64),
        put_ns=pl.lit(0, dtype=pl.Int64),
        paired=pl.lit(value=False),
        got=pl.lit(value=False),
    )
    return pl.concat([born, gots])


def read_lineage(recording: Recording) -> Lineage | None:
    """The lineage of a recording's contexts and items; None if it has neither."""
    if not any(recording.rows(name) for name in ("contexts", "flows", "handoffs")):
        return None
    births = recording.processes.filter(pl.col("event").is_in(BIRTHS))
    return Lineage(
        recording.collect(recording.contexts),
        recording.collect(recording.handoffs),
        recording.collect(births.select("tgid", "tid", "time_ns")),
        recording.thread_contexts(),
    )


def own_requests(
    exchanges: pl.DataFrame, lineage: Lineage | None, loops: pl.DataFrame | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Tell which context works on each request that a server received.

    `exchanges`: as find_exchanges gives them, with `response_context`; `loops`: as nesting.read_loops
    gives it. Returns them with `context` (of a server: the request's own, as far as it is known) and
    `owned`: the row of what else is known in the second frame, or null. That has the columns

    - `received_in`: the reader's context that received it, if that is another one; else 0
    - `made_for`: whether `context` was made for the request, after it had come
    - `worked_tid`, `worked_in`, `worked_ns`: the thread of a pool that worked on it, its context (0 or
      a greenlet), and since when; or 0
    """
    if lineage is None or exchanges.is_empty():
        return exchanges.with_columns(owned=pl.lit(None, dtype=pl.UInt32)), pl.DataFrame(
            schema=OWNED
        )
    received = ~exchanges["client"] & ~exchanges["delivery"] & ~exchanges["orphan"]
    rows = np.flatnonzero(received.to_numpy())
    tgid, tid, reader, came = (
        exchanges[name].to_numpy()[rows] for name in ("tgid", "tid", "context", "start_ns")
    )
    sender = exchanges["response_context"].to_numpy()[rows]
    top = _topmost_since(lineage, sender, came)
    made, _ = lineage.makers(top)
    own = top != 0
    # A task of another request may answer this one. Then nothing is known of who worked on it.
    group, of_group = group_numbers((tgid, made.tgid), (reader, made.context))
    latest = latest_before(group, came, of_group, made.time_ns)
    other = own & (made.context != 0) & (latest != NONE) & (latest != np.arange(len(rows)))
    # A thread that handles it alone, and made a context on the way
    ends = exchanges["end_ns"].fill_null(np.iinfo(np.int64).max).to_numpy()[rows]
    within = own & lineage.is_stack(reader) & (made.context == reader)
    within &= (made.tid == tid) & (exchanges["response_tid"].to_numpy()[rows] == tid)
    within &= ~waited_for_several(loops, tgid, tid, came, ends)
    own &= ~other & ~within
    owner = np.where(own, top, np.where((sender != 0) & ~other & ~within, sender, reader))
    # not answered yet: the only context that was made where it was received
    unanswered = np.flatnonzero((sender == 0) & (reader != 0))
    only = lineage.only_children(Points(tgid, tid, reader, came), unanswered)
    owner[unanswered] = np.where(only != 0, only, owner[unanswered])
    own[unanswered] = only != 0
    # a pool's thread: by the item that it took after the request had come
    answerer = exchanges["response_tid"].to_numpy()[rows]
    taken_ns = lineage.last_taken_ns(Points(tgid, answerer, sender, ends))
    pooled = (answerer != 0) & lineage.is_stack(sender) & (taken_ns >= came)
    pooled &= (answerer != tid) | (sender != reader)
    owner = np.where(pooled, reader, owner)
    context = exchanges["context"].to_numpy().copy()
    context[rows] = owner
    owned = np.full(len(exchanges), NONE, np.int64)
    owned[rows] = np.arange(len(rows))
    known = {
        "received_in": np.where((reader != owner) & ~lineage.is_stack(reader), reader, 0),
        "made_for": own & ~pooled,
        "worked_tid": np.where(pooled, answerer, 0),
        "worked_in": np.where(pooled, sender, 0),
        "worked_ns": np.where(pooled, taken_ns, 0),
    }
    told = exchanges.with_columns(
        context=pl.Series(context, dtype=pl.UInt64),
        owned=pl.Series(owned).replace(NONE, None).cast(pl.UInt32),
    )
    return told, pl.DataFrame(known).cast(OWNED)


def _topmost_since(
    lineage: Lineage, context: NDArray[np.uint64], since_ns: Times
) -> NDArray[np.uint64]:
    """Of each context and those above it the topmost that was made after a time; 0: none was."""
    top = np.zeros(len(context), np.uint64)
    active, current = np.flatnonzero(context), context.copy()
    for _ in range(_STEPS):
        if not len(active):
            break
        made, known = lineage.makers(current[active])
        known &= made.time_ns >= since_ns[active]
        active = active[known]
        top[active] = current[active]
        current[active] = made.context[known]
        active = active[current[active] != 0]
    # a way that is longer was not followed to its top
    top[active] = 0
    return top


def waited_for_several(
    loops: pl.DataFrame | None,
    tgid: NDArray[Any],
    tid: NDArray[Any],
    since: Times,
    until: Times,
    *,
    context: NDArray[np.uint64] | None = None,
) -> Mask:
    """Which threads waited for several things in [since, until); all, if that was not recorded.

    `context`: only waits in it.
    """
    if loops is None:
        return np.ones(len(tgid), np.bool_)
    columns = [(loops["tgid"].to_numpy(), tgid), (loops["tid"].to_numpy(), tid)]
    if context is not None:
        columns.append((loops["context"].to_numpy(), context))
    thread, of_thread = group_numbers(*columns)
    times = loops["start_ns"].to_numpy()
    before = count_before(thread, times, of_thread, since)
    waited: Mask = count_before(thread, times, of_thread, until) > before
    return waited


@dataclass(frozen=True)
class Owners:
    """Intervals in which a context, or a thread without one, worked on a request.

    - `tgid`, `tid`, `context`; `start_ns`, `end_ns`
    - `request`: its row
    - `made_for`: the context was made for it: what it does after the request's end is because of it
    - `by_item`: it is known by a work item that its thread took
    - `apart`: no other interval of the same flow overlaps it
    """

    tgid: NDArray[Any]
    tid: NDArray[Any]
    context: NDArray[np.uint64]
    start_ns: Times
    end_ns: Times
    request: Rows
    made_for: Mask
    by_item: Mask
    apart: Mask


@dataclass(frozen=True)
class Traced:
    """For each point the row of the request it belongs to (-1: none), and how that is known."""

    request: Rows
    late: Mask
    """It came after the request's end."""
    by_thread: Mask
    """At the end of the way was a thread that worked on nothing else, no context."""
    by_item: Mask
    """On the way was a work item."""
    steps: Rows


def trace(points: Points, owners: Owners, lineage: Lineage, loops: pl.DataFrame | None) -> Traced:
    """Find the request that each point belongs to: its own flow's, or that of where it comes from.

    Flows of a thread itself are asked only for where something comes from, not for the points.
    """
    count = len(points)
    traced = Traced(
        np.full(count, NONE, np.intp),
        np.zeros(count, np.bool_),
        np.zeros(count, np.bool_),
        np.zeros(count, np.bool_),
        np.zeros(count, np.intp),
    )
    owned = Points(owners.tgid, owners.tid, owners.context, owners.start_ns)
    active, at = np.arange(count), points
    for step in range(_STEPS):
        if not len(active):
            break
        flow, of_flow = group_numbers(
            (owned.tgid, at.tgid), (_thread_of(owned), _thread_of(at)), (owned.context, at.context)
        )
        latest = latest_before(flow, owners.start_ns, of_flow, at.time_ns)
        row = np.maximum(latest, 0)
        found: Mask = latest != NONE
        blocked: Mask = np.isin(of_flow, flow) & (at.context != 0)
        if len(owned):
            inside = found & (at.time_ns < owners.end_ns[row])
            found &= owners.apart[row] & (inside | owners.made_for[row])
            item = owners.by_item[row]
            found &= inside | ~item
            if step == 0:
                found &= (at.context != 0) | item
            stacks = np.flatnonzero(found & lineage.is_stack(at.context) & ~item)
            if len(stacks):
                found[stacks] &= inside[stacks] & ~waited_for_several(
                    loops,
                    at.tgid[stacks],
                    at.tid[stacks],
                    owners.start_ns[row[stacks]],
                    at.time_ns[stacks],
                    context=at.context[stacks],
                )
            hit = active[found]
            traced.request[hit] = owners.request[row[found]]
            traced.late[hit] = points.time_ns[hit] >= owners.end_ns[row[found]]
            traced.by_thread[hit] = (at.context[found] == 0) & ~item[found]
            traced.by_item[hit] |= item[found]
            traced.steps[hit] = step
        # What a flow that handles requests does between them belongs to none.
        active, at = active[~found & ~blocked], at.of(~found & ~blocked)
        before, known, by_item = lineage.origins(at)
        traced.by_item[active[by_item]] = True
        active, at = active[known], before.of(known)
    return traced


def _thread_of(points: Points) -> NDArray[Any]:
    """The thread as far as it is part of the flow: a context may move between threads."""
    return np.where(points.context == 0, points.tid, 0)
