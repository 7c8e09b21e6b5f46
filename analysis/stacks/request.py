"""Where the time of one request went, by Python stack, in every process that handled a part of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import polars as pl

from scope_ebpf.analysis.chain import request_tree
from scope_ebpf.analysis.names import THREAD
from scope_ebpf.analysis.nesting import Flows, read_loops, works_alone
from scope_ebpf.analysis.schema import span_text
from scope_ebpf.analysis.stacks.missing import why_no_stacks
from scope_ebpf.analysis.stacks.profile import Profile
from scope_ebpf.analysis.stacks.whole import WEIGHED, build, period_ns, ticks, waits
from scope_ebpf.recording.reader import Recording

NO_SAMPLE = "[on the CPU, no sample]"


def of_request(
    recording: Recording, span_id: int, *, by_line: bool = False, by_thread: bool = False
) -> Profile:
    """What the threads did that handled a request and what it led to; see `request_tree`.

    Outside are the service and the operation of each span of a server or worker. If a thread had
    nothing else to do then, all that it did is the span's, and the weights add up to the span's
    duration: the time off the CPU as `off_cpu` divides it, the rest in equal parts for each
    tick of the sampling clock. In an event loop, what was done in the span's logical context and in
    those that were made from it meanwhile is the span's, in whatever thread; ticks weigh a period
    there, and what a thread of a pool did for it without a copy of its context is left out. Of a thread
    that worked on several things without contexts, nothing is known.

    Raises `UsageError` if there is no such span.
    """
    spans = recording.collect(recording.spans())
    members = request_tree(spans, recording.collect(recording.edges()), span_id)
    first = members.row(0, named=True)
    title = " ".join(
        filter(None, ["request", span_text(span_id), first["service"], first["operation"]])
    )
    handled = _handled(members)
    alone = _alone(recording, _handled(spans))
    known = handled.join(alone, on="span_id", how="semi")
    weighed, notes = _weighed(recording, known)
    profile = build(recording, weighed.lazy(), title, by_line=by_line, by_thread=by_thread)
    others = handled.height - known.height
    if others:
        notes.append(
            f"{others} of {handled.height} spans are left out: their threads worked on other "
            "requests at the same time, in no logical context that was recorded"
        )
    profile = replace(profile, notes=tuple(notes))
    if not profile.stacks:
        profile = replace(profile, empty=_why_empty(recording, handled, known))
    return profile


def _handled(spans: pl.DataFrame) -> pl.DataFrame:
    """Spans in which a thread that was recorded did something for the request."""
    return spans.filter(
        pl.col("kind").cast(pl.String).is_in(["server", "consumer"])
        & (pl.col("duration_ns") > 0)
        & pl.col("tid").is_not_null()
    )


def _alone(recording: Recording, handled: pl.DataFrame) -> pl.DataFrame:
    """Those whose flow worked on nothing else."""
    start_ns = handled["start_ns"].to_numpy()
    flows = Flows(
        tgid=handled["tgid"].to_numpy(),
        tid=handled["tid"].to_numpy(),
        context=handled["context"].to_numpy(),
        begun_ns=start_ns,
        start_ns=start_ns,
        end_ns=start_ns + handled["duration_ns"].to_numpy(),
        line=np.zeros(len(handled), np.int64),
    )
    return handled.filter(pl.Series(works_alone(flows, read_loops(recording)), dtype=pl.Boolean))


def _weighed(recording: Recording, spans: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """What was done in spans: rows of WEIGHED, and what is to be known about them."""
    notes: list[str] = []
    if spans.is_empty():
        return pl.DataFrame(schema=WEIGHED), notes
    times = spans.select(
        *THREAD,
        "context",
        "span_id",
        label=pl.concat_str(
            [pl.col("service").fill_null("?"), pl.coalesce("operation", "protocol", "kind")],
            separator=" ",
        ),
        from_ns="start_ns",
        to_ns=pl.col("start_ns") + pl.col("duration_ns"),
    )
    sequential = times.filter(pl.col("context") == 0).drop("context")
    contextual = _with_descendants(recording, times.filter(pl.col("context") != 0)).drop("tid")
    tgids = times["tgid"].unique().to_list()
    within = pl.col("time_ns") < times["to_ns"].max()
    since = times["from_ns"].min()
    ran = recording.collect(ticks(recording, tgids).filter(within & (pl.col("time_ns") >= since)))
    waited = recording.collect(waits(recording, tgids).filter(within & (pl.col("upto_ns") > since)))
    parts = []
    for rows, keys in ((sequential, THREAD), (contextual, ["tgid", "context"])):
        inside = (pl.col("time_ns") >= pl.col("from_ns")) & (pl.col("time_ns") < pl.col("to_ns"))
        on_cpu = ran.with_row_index("tick").join(rows, on=keys).filter(inside)
        # of spans within each other, what was done is the inner one's
        on_cpu = on_cpu.sort("from_ns").unique("tick", keep="last", maintain_order=True)
        off_cpu = waited.join(rows, on=keys).with_columns(
            weight_ns=pl.min_horizontal("upto_ns", "to_ns")
            - pl.max_horizontal("time_ns", "from_ns")
        )
        off_cpu = off_cpu.filter(pl.col("weight_ns") > 0)
        if keys == THREAD and "offcpu" in recording.meta.families:
            on_cpu = _divided(rows, on_cpu, off_cpu)
        columns = [pl.col("label").alias(name) if name == "group" else name for name in WEIGHED]
        parts += [on_cpu.select(columns).cast(WEIGHED), off_cpu.select(columns).cast(WEIGHED)]
    if "offcpu" not in recording.meta.families:
        notes.append("off-CPU time was not recorded: only waits with a stack are here")
    return pl.concat(parts), notes


def _divided(spans: pl.DataFrame, on_cpu: pl.DataFrame, off_cpu: pl.DataFrame) -> pl.DataFrame:
    """Ticks that share exactly the time that the thread of their span was not off the CPU."""
    off = off_cpu.group_by("span_id").agg(off_ns=pl.col("weight_ns").sum())
    counted = on_cpu.group_by("span_id").agg(count=pl.len())
    cpu = (
        spans.join(off, on="span_id", how="left")
        .join(counted, on="span_id", how="left")
        .with_columns(
            cpu_ns=pl.max_horizontal(
                pl.col("to_ns") - pl.col("from_ns") - pl.col("off_ns").fill_null(0), 0
            )
        )
    )
    place = pl.int_range(pl.len()).over("span_id")
    shares = on_cpu.join(cpu.select("span_id", "cpu_ns", "count"), on="span_id").with_columns(
        weight_ns=pl.col("cpu_ns") // pl.col("count")
        + (place < pl.col("cpu_ns") % pl.col("count")).cast(pl.Int64)
    )
    unseen = cpu.filter(pl.col("count").is_null()).select(
        *THREAD,
        "label",
        group=pl.lit(None, pl.String),
        stack=pl.lit(None, pl.UInt64),
        instead=pl.lit(NO_SAMPLE),
        inner=pl.lit(None, pl.String),
        inner_kind=pl.lit(None, pl.String),
        innermost=pl.lit(None, pl.String),
        innermost_kind=pl.lit(None, pl.String),
        weight_ns=pl.col("cpu_ns"),
    )
    return pl.concat([shares.select(unseen.columns), unseen])


def _with_descendants(recording: Recording, spans: pl.DataFrame) -> pl.DataFrame:
    """One row per span and logical context of it: its own, and those made from it meanwhile."""
    if spans.is_empty():
        return spans
    made = recording.collect(
        recording.contexts.filter(pl.col("tgid").is_in(spans["tgid"].unique().to_list()))
        .filter(pl.col("time_ns").is_between(spans["from_ns"].min(), spans["to_ns"].max()))
        .select("parent", "context", "time_ns")
    )
    children: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for parent, context, time_ns in made.iter_rows():
        children[parent].append((context, time_ns))
    own = spans["context"].to_list()
    rows, contexts = [], []
    for row, (context, from_ns, to_ns) in enumerate(
        zip(own, spans["from_ns"], spans["to_ns"], strict=True)
    ):
        # a context that handles a request of its own is not this one's
        seen = {*own} - {context}
        waiting = [context]
        while waiting:
            at = waiting.pop()
            if at in seen:
                continue
            seen.add(at)
            rows.append(row)
            contexts.append(at)
            waiting += [child for child, time_ns in children[at] if from_ns <= time_ns < to_ns]
    return spans[rows].with_columns(context=pl.Series(contexts, dtype=pl.UInt64))


def _why_empty(recording: Recording, handled: pl.DataFrame, known: pl.DataFrame) -> str:
    if handled.is_empty():
        return "no process that was recorded handled it: all that is known is how long it took"
    if known.is_empty():
        return (
            "the threads that handled it worked on other requests at the same time, and their "
            "logical contexts were not recorded"
        )
    if why := why_no_stacks(recording):
        return why
    longest_us = max(known["duration_ns"].to_list()) / 1000
    return (
        f"nothing was sampled in it: it took {longest_us:,.0f} µs at most in one thread, and samples "
        f"are {period_ns(recording) / 1000:,.0f} µs apart"
    )
