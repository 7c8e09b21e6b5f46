"""Where the time of one request went, by Python stack, in every process that handled a part of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
import polars as pl

from scope_ebpf.analysis.chain import request_tree
from scope_ebpf.analysis.contexts import Lineage, read_lineage
from scope_ebpf.analysis.names import THREAD
from scope_ebpf.analysis.nesting import Flows, read_loops, works_alone
from scope_ebpf.analysis.schema import span_text
from scope_ebpf.analysis.stacks.loops import LOOP, PARTED, divide, done_for, find_calls
from scope_ebpf.analysis.stacks.missing import why_no_stacks
from scope_ebpf.analysis.stacks.profile import Frame, Profile, added
from scope_ebpf.analysis.stacks.whole import build, period_ns, ticks, waits
from scope_ebpf.recording.reader import Recording

NO_SAMPLE: Final = "[on the CPU, no sample]"
UNDIVIDED: Final = "[not divided: its thread served others, too]"
AT_ONCE: Final = "what went on at the same time shares that time"

Weighed: TypeAlias = tuple[tuple[int, ...], int, int]
"""A path of numbers of frames, its weight, and its samples."""


def of_request(
    recording: Recording, span_id: int, *, by_line: bool = False, by_thread: bool = False
) -> Profile:
    """What the threads did that handled a request and what it led to; see `request_tree`.

    Outside are the service and the operation of each span of a server or worker. If a thread had
    nothing else to do then, all that it did is the span's, and the weights add up to the span's
    duration: the time off the CPU as `off_cpu` divides it, the rest in equal parts for each
    tick of the sampling clock.

    In an event loop, it is what was done in the span's logical context and in those that were made from
    it meanwhile, in whatever thread, and by threads of pools for it; and its calls: the stack that sent
    it, and until its response `[waits for …]`, with the span of the server that answered inside. This
    adds up to the span's duration, too: see `loops.divide`. Calls after its end are not in it, and who
    answered them stands by itself.

    Of a thread that worked on several things without contexts only the span's calls are known, and
    all else is one frame.

    Raises `UsageError` if there is no such span.
    """
    spans = recording.collect(recording.spans())
    members = request_tree(spans, recording.collect(recording.edges()), span_id)
    first = members.row(0, named=True)
    title = " ".join(
        filter(None, ["request", span_text(span_id), first["service"], first["operation"]])
    )
    handled = _handled(members)
    loops = read_loops(recording)
    everything = _handled(spans)
    lineage = read_lineage(recording)
    lone, contextual = _ways(everything, loops, lineage)
    threads, tasks = (handled.join(ids, on="span_id", how="semi") for ids in (lone, contextual))
    notes: list[str] = []
    parts = [_of_threads(recording, _times(threads), notes)]
    looped, calls, remark = _of_loops(
        recording, members, handled, threads, tasks, everything, loops, lineage
    )
    parts.append(looped)
    weighed = pl.concat(parts).with_columns(
        # told apart until they are put into each other
        group=pl.col("span_id").cast(pl.String),
        innermost=pl.coalesce(pl.col("call_id").cast(pl.String), "innermost"),
        innermost_kind=pl.when(pl.col("call_id").is_not_null())
        .then(pl.lit("wait"))
        .otherwise("innermost_kind"),
    )
    flat = build(recording, weighed.lazy(), title, by_line=by_line, by_thread=by_thread)
    undivided = handled.join(pl.concat([threads, tasks]), on="span_id", how="anti")
    profile = _nested(flat, handled, set(undivided["span_id"]), members, calls)
    if span_id in set(undivided["span_id"]):
        notes.append(
            "its thread worked on other requests at the same time, in no logical context that was "
            "recorded: what it did for this one is not known, only what it called"
        )
    profile = replace(profile, notes=tuple(notes), remark=remark)
    if not profile.stacks:
        profile = replace(profile, empty=_why_empty(recording, handled))
    return profile


def _ways(
    handled: pl.DataFrame, loops: pl.DataFrame | None, lineage: Lineage | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`span_id` of those whose thread worked on nothing else, and of those whose context did."""
    context = handled["context"].to_numpy()
    thread_itself = context == 0
    if lineage is not None:
        # a thread's own stack may be a greenlet, and one that never switched is a thread
        thread_itself = lineage.is_stack(context)
    as_threads = _flows(handled, np.where(thread_itself, np.uint64(0), context))
    lone = works_alone(as_threads, loops) & thread_itself
    own = works_alone(_flows(handled, context), loops) & (context != 0) & ~lone
    ids = handled.select("span_id")
    return ids.filter(pl.Series(lone, dtype=pl.Boolean)), ids.filter(
        pl.Series(own, dtype=pl.Boolean)
    )


def _flows(handled: pl.DataFrame, context: np.ndarray) -> Flows:
    start_ns = handled["start_ns"].to_numpy()
    return Flows(
        tgid=handled["tgid"].to_numpy(),
        tid=handled["tid"].to_numpy(),
        context=context,
        begun_ns=start_ns,
        start_ns=start_ns,
        end_ns=start_ns + handled["duration_ns"].to_numpy(),
        line=np.zeros(len(handled), np.int64),
    )


def _times(spans: pl.DataFrame) -> pl.DataFrame:
    return spans.select(
        *THREAD,
        "span_id",
        from_ns="start_ns",
        to_ns=pl.col("start_ns") + pl.col("duration_ns"),
    )


def _seen(recording: Recording, times: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Ticks, and waits, of the processes of some spans while the first to the last of them went on."""
    tgids = times["tgid"].unique().to_list()
    within = pl.col("time_ns") < times["to_ns"].max()
    since = times["from_ns"].min()
    ran = recording.collect(ticks(recording, tgids).filter(within & (pl.col("time_ns") >= since)))
    waited = recording.collect(waits(recording, tgids).filter(within & (pl.col("upto_ns") > since)))
    return ran, waited


def _of_threads(recording: Recording, times: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """What the threads of spans did: rows PARTED."""
    if times.is_empty():
        return pl.DataFrame(schema=PARTED)
    ran, waited = _seen(recording, times)
    inside = (pl.col("time_ns") >= pl.col("from_ns")) & (pl.col("time_ns") < pl.col("to_ns"))
    on_cpu = ran.with_row_index("tick").join(times, on=THREAD).filter(inside)
    # of spans within each other, what was done is the inner one's
    on_cpu = on_cpu.sort("from_ns").unique("tick", keep="last", maintain_order=True)
    off_cpu = waited.join(times, on=THREAD).with_columns(
        weight_ns=pl.min_horizontal("upto_ns", "to_ns") - pl.max_horizontal("time_ns", "from_ns")
    )
    off_cpu = off_cpu.filter(pl.col("weight_ns") > 0)
    if "offcpu" in recording.meta.families:
        on_cpu = _divided(times, on_cpu, off_cpu)
    else:
        notes.append("off-CPU time was not recorded: only waits with a stack are here")
    parted = [
        rows.with_columns(call_id=pl.lit(None, pl.UInt64)).select(PARTED.names()).cast(PARTED)
        for rows in (on_cpu, off_cpu)
    ]
    return pl.concat(parted)


def _of_loops(
    recording: Recording, members: pl.DataFrame, handled: pl.DataFrame, threads: pl.DataFrame,
    tasks: pl.DataFrame, everything: pl.DataFrame, loops: pl.DataFrame | None,
    lineage: Lineage | None,
) -> tuple[pl.DataFrame, pl.DataFrame, str | None]:  # fmt: skip
    """What was done and called in spans of event loops: rows PARTED, the calls, and a remark."""
    spans = handled.join(threads, on="span_id", how="anti")
    calls = find_calls(recording, members, spans)
    if spans.is_empty():
        return pl.DataFrame(schema=PARTED), calls, None
    no_row = pl.DataFrame(schema={**PARTED, "context": pl.UInt64, "time_ns": pl.Int64})
    ran, waited = no_row, no_row
    if len(tasks) and lineage is not None:
        requests = everything.filter(pl.col("tgid").is_in(tasks["tgid"].unique().implode()))
        flows = _flows(requests, requests["context"].to_numpy())
        wanted = tasks.select("span_id")
        ran, waited = (
            done_for(recording, done, flows, requests["span_id"], lineage, loops).join(
                wanted, on="span_id", how="semi"
            )
            for done in _seen(recording, _times(tasks))
        )
    known = pl.col("span_id").is_in(tasks["span_id"].implode())
    times = _times(spans).with_columns(
        rest=pl.when(known).then(pl.lit(LOOP)).otherwise(pl.lit(UNDIVIDED))
    )
    parts, at_once = divide(recording, times, calls, ran, waited)
    return parts, calls, AT_ONCE if at_once else None


def _nested(
    flat: Profile, handled: pl.DataFrame, undivided: set[int], members: pl.DataFrame,
    calls: pl.DataFrame,
) -> Profile:  # fmt: skip
    """Spans in the calls that they answered, if these are drawn: else they stand by themselves.

    `flat`: outermost is the span_id of the span, innermost perhaps the call_id of its call. What was
    done in an answer has that share of the call's weight that it had of its duration.
    """
    frames: dict[Frame, int] = {}
    numbers = [frames.setdefault(frame, len(frames)) for frame in flat.frames]
    called = dict(calls.select("call_id", pl.col("upto_ns") - pl.col("time_ns")).iter_rows())
    answers: dict[int, list[int]] = defaultdict(list)
    for span_id, parent_id, kind in members.select("span_id", "parent_id", "kind").iter_rows():
        if parent_id in called and kind == "server":
            answers[parent_id].append(span_id)
    of_span: dict[int, list[tuple[tuple[int, ...], int | None, int, int]]] = defaultdict(list)
    for (outer, *path), (weight, samples) in flat.stacks.items():
        span_id, call_id = int(flat.frames[outer].name), None
        last = flat.frames[path[-1]]
        if last.kind == "wait" and last.name.isdecimal():
            call_id = int(last.name)
            path.pop()
        of_span[span_id].append((tuple(numbers[n] for n in path), call_id, weight, samples))
    labels = {}
    for span_id, service, what in handled.select(
        "span_id", "service", pl.coalesce("operation", "protocol", pl.col("kind").cast(pl.String))
    ).iter_rows():
        label = f"{service or '?'} {what}"
        if span_id in undivided:
            label += f" {UNDIVIDED}"
        labels[span_id] = frames.setdefault(Frame(label, "group"), len(frames))
    unknown = frames.get(Frame(UNDIVIDED, "note"))

    def drawn(span_id: int) -> list[Weighed]:
        found: list[Weighed] = []
        for path, call_id, weight, samples in of_span[span_id]:
            # its own frame says it
            whole = (labels[span_id], *(() if path[-1] == unknown else path))
            own = weight
            for answer in answers.get(call_id, []) if call_id is not None else []:
                inside = drawn(answer)
                of = max(called[call_id], sum(part for _, part, _ in inside))
                for below, part, count in inside:
                    share = min(part * weight // of, own)
                    own -= share
                    found.append(((*whole, *below), share, count))
            found.append((whole, own, samples))
        return found

    drawn_calls = {call_id for parts in of_span.values() for _, call_id, _, _ in parts}
    inner = {
        answer
        for call_id, several in answers.items()
        if call_id in drawn_calls
        for answer in several
    }
    tops = [span_id for span_id in handled["span_id"] if span_id not in inner]
    stacks = added(
        (path, weight, samples)
        for top in tops
        for path, weight, samples in drawn(top)
        if weight > 0
    )
    return replace(flat, frames=list(frames), stacks=stacks)


def _handled(spans: pl.DataFrame) -> pl.DataFrame:
    """Spans in which a thread that was recorded did something for the request."""
    return spans.filter(
        pl.col("kind").cast(pl.String).is_in(["server", "consumer"])
        & (pl.col("duration_ns") > 0)
        & pl.col("tid").is_not_null()
    )


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
        "span_id",
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


def _why_empty(recording: Recording, handled: pl.DataFrame) -> str:
    if handled.is_empty():
        return "no process that was recorded handled it: all that is known is how long it took"
    if why := why_no_stacks(recording):
        return why
    longest_us = max(handled["duration_ns"].to_list()) / 1000
    return (
        f"nothing was sampled in it: it took {longest_us:,.0f} µs at most in one thread, and samples "
        f"are {period_ns(recording) / 1000:,.0f} µs apart"
    )
