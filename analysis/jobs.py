"""What each flow worked on: requests that it handled, jobs that it took from a queue, forks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.asof import NONE, count_before, first_after, group_numbers, latest_before
from scope_ebpf.analysis.contexts import OWNED, Lineage, Points, trace
from scope_ebpf.analysis.drafts import DRAFT
from scope_ebpf.analysis.handovers import hand_over
from scope_ebpf.analysis.links import link
from scope_ebpf.analysis.nesting import REASONS, Flows, Nested, nest
from scope_ebpf.analysis.queues import link_queues
from scope_ebpf.analysis.schema import EVIDENCE
from scope_ebpf.protocols.heads import Heads

Rows = NDArray[np.intp]

# Protocols whose request line a proxy passes on as it is.
_PROXIED: Final = "http"
# Requests that may put something into a queue although their head does not show it.
_MAY_PUSH: Final = r"^(PIPELINE|MULTI|EVAL|EVALSHA|FCALL|HSET|HMSET|SET|XADD|INSERT)\b"
# Replies of these may hold something that came out of a queue.
_MAY_POP: Final = r"^(EVAL|EVALSHA|FCALL)\b"
# What a statement with SKIP LOCKED answers when it found nothing.
_NOTHING: Final = ["SELECT 0", "UPDATE 0", "DELETE 0", "nil", "*0", "*-1"]
# What a blocking pop of Redis answers: the queue and the element, or the queue and several.
_POPPED: Final = ["*2", "*3"]
# What a pushed message has beside its channel and its text, at most: less than two of them have.
_MESSAGE_BYTES: Final = {"redis": 40, "postgresql": 11}
_GET: Final = r"^(?:GET|HGET|HGETALL|get|gets) (\S+)"
_SET: Final = r"^(?:SET|SETEX|PSETEX|SETNX|HSET|set|add) (\S+)"


def work_on(
    drafts: pl.DataFrame,
    owned: pl.DataFrame,
    heads: Heads,
    loops: pl.DataFrame | None,
    lineage: Lineage | None,
    processes: pl.DataFrame,
    pipes: Callable[[], pl.DataFrame],
    ended_ns: int,
) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
    """Add the jobs that were done, and tell what every request and job led to.

    `owned`: as contexts.own_requests gives it.

    Returns the drafts with one more of the kind `consumer` for each job, and frames of links:
    `cause`, `effect` (rows), `edge`, `evidence`, `reason`, `parent`. `pipes` reads what went over
    pipes (handovers.read_pipes), if there were jobs.
    """
    drafts = _prepared(_delivered(drafts))
    servers = drafts.filter((pl.col("kind") == "server") & (pl.col("state") != "began_before"))
    clients = drafts.filter(pl.col("kind") == "client")
    lines = _lines(drafts)
    first = nest(
        _flows(servers, lines, owned),
        _flows(clients, lines, owned),
        loops,
        _repliers(servers),
        lineage,
    )
    taken = _taken(drafts, clients.filter(pl.Series(first.parent == NONE)))
    consumers, linked, jobs = _consumers(drafts, taken, heads, ended_ns)
    # what brought a job is no part of the work on it
    popped = jobs.filter(pl.col("state") == "began_before")["row"]
    clients = clients.filter(~pl.col("row").is_in(popped.implode()))
    loops = _with_loops_of_jobs(loops, jobs, consumers["state"] == "open")
    drafts = pl.concat([drafts.join(consumers, on="row", how="anti"), consumers]).sort("row")
    # what was delivered to a flow that is no worker: nothing more is known of it
    left = pl.col("kind") == "delivery"
    drafts = drafts.with_columns(
        kind=pl.when(left).then(pl.lit("client")).otherwise("kind"),
        state=pl.when(left).then(pl.lit("began_before")).otherwise("state"),
    )
    if len(jobs):
        # a delivery's consumer keeps its row: the texts are in the order of the jobs
        passed, passed_on = hand_over(
            consumers,
            _texts(heads, jobs["response_head"]),
            pipes(),
            first_row=len(drafts),
            ended_ns=ended_ns,
        )
        drafts, consumers = pl.concat([drafts, passed]), pl.concat([consumers, passed])
        linked = pl.concat([linked, passed_on])
    handlers = pl.concat([servers, consumers])
    nested = nest(
        _flows(handlers, lines, owned),
        _flows(clients, lines, owned),
        loops,
        _repliers(handlers),
        lineage,
    )
    links = [
        _nested_links(handlers, clients, nested),
        linked,
        _forked_links(handlers, clients, nested, processes, loops, lineage),
    ]
    links.append(_cache_fills(clients, links[0]))
    return _within(drafts, links[0]), links


def _delivered(drafts: pl.DataFrame) -> pl.DataFrame:
    """Only what a subscriber received is a delivery; to the server that pushed it, it is a response.

    Such a response follows an earlier request, so nothing more is known of it.
    """
    subscribers = drafts.filter(pl.col("kind") == "client")["connection"].unique()
    pushed = (pl.col("kind") == "delivery") & ~pl.col("connection").is_in(subscribers.implode())
    return drafts.with_columns(
        kind=pl.when(pushed).then(pl.lit("server")).otherwise("kind"),
        state=pl.when(pushed).then(pl.lit("began_before")).otherwise("state"),
    )


def _prepared(drafts: pl.DataFrame) -> pl.DataFrame:
    """Executions of prepared statements use the queue that the statement's own text names."""
    same = ["protocol", "operation"]
    texts = drafts.filter(pl.col("queue_action").is_not_null() & pl.col("defines").is_not_null())
    if texts.is_empty():
        return drafts
    texts = texts.select(*same, action="queue_action", name="queue").unique(same, keep="any")
    uses = pl.col("uses").is_not_null() & pl.col("queue_action").is_null()
    return (
        drafts.join(texts, on=same, how="left", maintain_order="left")
        .with_columns(
            queue_action=pl.when(uses).then("action").otherwise("queue_action"),
            queue=pl.when(uses).then("name").otherwise("queue"),
        )
        .drop("action", "name")
    )


def _within(drafts: pl.DataFrame, nested: pl.DataFrame) -> pl.DataFrame:
    """A connection that was made before the request came was not made for it."""
    begins = drafts.select(cause="row", request_ns="start_ns")
    late = (
        nested.select("cause", row="effect")
        .join(begins, on="cause")
        .select("row", "request_ns")
        .unique("row")
    )
    return (
        drafts.join(late, on="row", how="left", maintain_order="left")
        .with_columns(
            start_ns=pl.when(pl.col("start_ns") < pl.col("request_ns"))
            .then("sent_ns")
            .otherwise("start_ns")
        )
        .drop("request_ns")
    )


def _lines(drafts: pl.DataFrame) -> NDArray[Any]:
    """A number for each different request line, by row; 0: none that a proxy passes on."""
    line = pl.when(pl.col("protocol") == _PROXIED).then("detail")
    return drafts.select(line.rank("dense").fill_null(0).cast(pl.Int64)).to_series().to_numpy()


def _flows(drafts: pl.DataFrame, lines: NDArray[Any], owned: pl.DataFrame) -> Flows:
    rows = drafts["row"].to_numpy()
    line = np.zeros(len(rows), np.int64)
    known = rows < len(lines)
    line[known] = lines[rows[known]]
    more = {}
    if not owned.is_empty():
        of_rows = owned.select(pl.all().gather(drafts["owned"]))
        more = {
            name: of_rows[name].fill_null(False if name == "made_for" else 0).to_numpy()
            for name in OWNED
        }
    return Flows(
        tgid=drafts["tgid"].to_numpy(),
        tid=drafts["tid"].to_numpy(),
        context=drafts["context"].to_numpy(),
        begun_ns=np.where(
            (drafts["kind"] == "client").to_numpy(),
            drafts["start_ns"].to_numpy(),
            np.maximum(drafts["asked_ns"].fill_null(0).to_numpy(), drafts["start_ns"].to_numpy()),
        ),
        start_ns=drafts["sent_ns"].to_numpy(),
        end_ns=drafts["until_ns"].to_numpy(),
        line=line,
        **more,
    )


def _repliers(drafts: pl.DataFrame) -> Rows:
    return drafts["response_tid"].fill_null(0).to_numpy().astype(np.intp)


def _nested_links(handlers: pl.DataFrame, clients: pl.DataFrame, nested: Nested) -> pl.DataFrame:
    found = np.flatnonzero(nested.parent != NONE)
    pairs = pl.DataFrame(
        {
            "cause": handlers["row"].to_numpy()[nested.parent[found]],
            "effect": clients["row"].to_numpy()[found],
            "evidence": EVIDENCE.categories.gather(nested.evidence[found]),
            "reason": pl.Series(REASONS).gather(nested.reason[found]),
            "late": nested.late[found],
        }
    )
    edge = pl.when("late").then(pl.lit("triggered_by")).otherwise(pl.lit("calls"))
    return link(pairs, edge, pl.col("evidence"), pl.col("reason"))


def _taken(drafts: pl.DataFrame, free: pl.DataFrame) -> pl.DataFrame:
    """What came out of queues outside of any request: `free` are the clients that no request made."""
    came = (pl.col("state") == "complete") & ~pl.col("miss") & pl.col("error").is_null()
    came &= ~pl.col("status").is_in(_NOTHING).fill_null(value=False)
    # a statement that was only prepared
    came &= (pl.col("protocol") != "postgresql") | (pl.col("status") != "OK").fill_null(value=True)
    # what a request from before the recording waited for may have come out of a queue, too
    begun = (pl.col("state") == "began_before") & (
        pl.col("response_element").is_not_null() | pl.col("status").is_in(_POPPED)
    )
    pops = free.filter(
        (begun & pl.col("error").is_null())
        | came
        & (
            (pl.col("queue_action") == "pop").fill_null(value=False)
            | pl.col("operation").str.contains(_MAY_POP).fill_null(value=False)
        )
    )
    taken = pl.concat([pops, drafts.filter(pl.col("kind") == "delivery")]).sort("row")
    # A flow that answers requests is no worker: what it does until it pops again may be of any.
    flow = ["tgid", "tid", "context"]
    served = drafts.filter((pl.col("kind") == "server") & pl.col("end_ns").is_not_null())
    received = served.select(flow)
    answered = served.select("tgid", pl.col("response_tid").alias("tid"), "context")
    return taken.join(pl.concat([received, answered]).unique(), on=flow, how="anti").sort("row")


def _consumers(
    drafts: pl.DataFrame, taken: pl.DataFrame, heads: Heads, ended_ns: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """A draft for each job or message that somebody worked on, and links from who produced it.

    The work on it ends when the same flow asks for the next. The third are the drafts of what
    brought the jobs, with `received_ns`.
    """
    received = pl.coalesce(
        pl.when(pl.col("kind") == "delivery").then("start_ns").otherwise("end_ns"), "until_ns"
    )
    taken = taken.with_columns(received_ns=received)
    text = _texts(heads, taken["response_head"])
    cut = _cut(heads, taken["response_head"])
    deliveries = taken.select(
        pl.col("row").cast(pl.UInt32),
        "received_ns",
        queue=pl.coalesce("response_queue", "queue"),
        element="response_element",
        text=text,
        truncated=cut,
    ).filter(pl.col("text").is_not_null())
    may_push = pl.col("queue_action").is_in(["push", "publish"]).fill_null(value=False)
    sent = drafts.filter(
        (pl.col("kind") == "client")
        & (may_push | pl.col("operation").str.contains(_MAY_PUSH).fill_null(value=False))
        & ~pl.col("row").is_in(taken["row"].implode())
    )
    producers = sent.select(
        pl.col("row").cast(pl.UInt32),
        "start_ns",
        "tgid",
        "tid",
        "queue",
        "element",
        pushes=may_push,
        text=_texts(heads, sent["request_head"]),
    )
    pairs = link_queues(producers, deliveries)
    # replies of scripts are only known to come out of a queue if somebody put it in
    known = (pl.col("queue_action") == "pop").fill_null(value=False) | (
        pl.col("kind") == "delivery"
    )
    known |= pl.col("row").is_in(pairs["delivery"].cast(pl.Int64).implode())
    jobs = taken.filter(known)
    asks = drafts.filter(
        (pl.col("kind") == "client") & (pl.col("queue_action") == "pop").fill_null(value=False)
    )
    asking = pl.concat([asks, jobs.drop("received_ns")])
    pop_flow, job_flow = group_numbers(
        (asking["tgid"].to_numpy(), jobs["tgid"].to_numpy()),
        (asking["tid"].to_numpy(), jobs["tid"].to_numpy()),
        (asking["context"].to_numpy(), jobs["context"].to_numpy()),
    )
    at = asking["start_ns"].to_numpy()
    following = first_after(pop_flow, at, job_flow, jobs["received_ns"].to_numpy(), strictly=True)
    until = np.where(following == NONE, ended_ns, at[np.maximum(following, 0)] if len(at) else 0)
    # a delivery becomes the work on it; a request that popped stays, and the work comes beside it
    beside = pl.col("kind") != "delivery"
    consumers = jobs.with_columns(
        kind=pl.lit("consumer"),
        row=pl.when(beside).then(len(drafts) - 1 + beside.cum_sum()).otherwise("row"),
        start_ns="received_ns",
        sent_ns="received_ns",
        end_ns=pl.Series(until),
        until_ns=pl.Series(until),
        operation=pl.format("process {}", pl.coalesce("response_queue", "queue", pl.lit("job"))),
        detail=pl.coalesce("response_element", "detail"),
        status=pl.lit(None, dtype=pl.String),
        state=pl.when(pl.Series(following == NONE))
        .then(pl.lit("open"))
        .otherwise(pl.lit("complete")),
        queue_action=pl.lit(None, dtype=pl.String),
        response_tid=pl.lit(0, dtype=pl.UInt32),
        owned=pl.lit(None, dtype=pl.UInt32),
        request_bytes="response_bytes",
        response_bytes=pl.lit(0, dtype=pl.Int64),
        exact=pl.lit(value=False),
    ).select(pl.col(name).cast(dtype) for name, dtype in DRAFT.items())
    numbers = jobs.select("row", "kind", "protocol").with_columns(
        delivery=pl.col("row").cast(pl.UInt32), effect=consumers["row"]
    )
    actions = sent.select(producer=pl.col("row").cast(pl.UInt32), action="queue_action")
    links = pairs.join(numbers, on="delivery").join(actions, on="producer", how="left")
    published = (pl.col("action") == "publish").fill_null(value=False)
    linked = link(
        links.rename({"producer": "cause"}),
        pl.when(published).then(pl.lit("triggered_by")).otherwise(pl.lit("queued_by")),
        "derived",
        pl.col("reason"),
    )
    return consumers, linked, jobs


def _with_loops_of_jobs(
    loops: pl.DataFrame | None, jobs: pl.DataFrame, last: pl.Series
) -> pl.DataFrame | None:
    """Add a wait for several things to each job that may not be the only one until its end.

    `last`: whether nothing else was asked for after it: what popped it need not be a worker.

    Such came while its thread waited for several things: until the next one is asked for, an event
    loop also works on what else came in the same turn, as Celery's main process does on the results
    of its children. Or other messages came behind a pushed one, without a head of their own.
    """
    if loops is None:
        return None
    thread, of_thread = group_numbers(
        (loops["tgid"].to_numpy(), jobs["tgid"].to_numpy()),
        (loops["tid"].to_numpy(), jobs["tid"].to_numpy()),
    )
    times = loops["start_ns"].to_numpy()
    asked = jobs["start_ns"].to_numpy() * (jobs["state"] != "began_before").to_numpy()
    received = jobs["received_ns"].to_numpy()
    waited = count_before(thread, times, of_thread, received) > count_before(
        thread, times, of_thread, asked
    )
    overhead = pl.col("protocol").replace_strict(_MESSAGE_BYTES, default=0, return_dtype=pl.Int64)
    # some replies hold the element only
    names = pl.col("response_queue").str.len_bytes().fill_null(0)
    names += pl.col("response_element").str.len_bytes()
    alone = (pl.col("response_bytes") <= names + overhead).fill_null(value=False)
    pushed = (pl.col("kind") == "delivery") | (pl.col("state") == "began_before")
    several = pushed & ~alone
    unsure = last & (jobs["kind"] != "delivery")
    looped = jobs.filter(pl.Series(waited) | several | unsure).select(
        "tgid", "tid", "context", start_ns="received_ns"
    )
    return pl.concat([loops, looped])


def _texts(heads: Heads, rows: pl.Series) -> pl.Series:
    known = rows.to_numpy() >= 0
    text = heads.take(rows.to_numpy()[known]).text()
    places = np.cumsum(known) - 1
    return text.gather(pl.Series(np.where(known, places, -1)).replace(-1, None))


def _cut(heads: Heads, rows: pl.Series) -> pl.Series:
    numbers = np.maximum(rows.to_numpy(), 0)
    if not len(heads):
        return pl.Series([False]).new_from_index(0, len(rows))
    return pl.Series((heads.totals > heads.lengths)[numbers] & (rows.to_numpy() >= 0))


def _forked_links(
    handlers: pl.DataFrame,
    clients: pl.DataFrame,
    nested: Nested,
    processes: pl.DataFrame,
    loops: pl.DataFrame | None,
    lineage: Lineage | None,
) -> pl.DataFrame:
    """What processes did that a request or job forked, and that ended before it did."""
    forks = processes.filter(pl.col("event") == "fork").sort("time_ns")
    exits = processes.filter(pl.col("event") == "exit").select("tgid", exit_ns="time_ns")
    forks = forks.join(exits, on="tgid", how="left").filter(
        pl.col("exit_ns").is_null() | (pl.col("exit_ns") >= pl.col("time_ns"))
    )
    forks = forks.unique(["tgid", "time_ns"], keep="first", maintain_order=True)
    flow, of_flow = group_numbers(
        (handlers["tgid"].to_numpy(), forks["parent_tgid"].to_numpy()),
        (handlers["tid"].to_numpy(), forks["parent_tid"].to_numpy()),
    )
    times = forks["time_ns"].to_numpy()
    latest = latest_before(flow, handlers["start_ns"].to_numpy(), of_flow, times)
    if len(handlers):
        alone = nested.sequential & (handlers["context"] == 0).to_numpy()
        latest = np.where(alone[np.maximum(latest, 0)], latest, NONE)
    if lineage is not None and lineage.threads is not None:
        # who forked in a context is told by that, and not by what its thread handled last
        tgid, tid = forks["parent_tgid"].to_numpy(), forks["parent_tid"].to_numpy()
        points = Points(tgid, tid, lineage.threads.at(tgid, tid, times), times)
        traced = trace(points, nested.handlers, lineage, loops)
        latest = np.where((points.context != 0) | (latest == NONE), traced.request, latest)
    at = np.maximum(latest, 0)
    made = latest != NONE
    if len(handlers):
        ends = handlers["until_ns"].to_numpy()[at]
        gone = forks["exit_ns"].fill_null(np.iinfo(np.int64).max).to_numpy()
        made &= (times < ends) & (gone <= ends)
    rows = handlers["row"].to_numpy()
    owner: dict[int, tuple[int, int, int]] = {}
    for index, (tgid, parent, begin, end) in enumerate(
        forks.select("tgid", "parent_tgid", "time_ns", "exit_ns").iter_rows()
    ):
        if made[index]:
            owner[tgid] = (int(rows[latest[index]]), begin, end)
        elif parent in owner and end is not None:
            # a child of a child
            cause, parent_begin, parent_end = owner[parent]
            if parent_begin <= begin and end <= parent_end:
                owner[tgid] = (cause, begin, end)
    children = pl.DataFrame(
        [(tgid, *one) for tgid, one in owner.items()],
        schema={"tgid": pl.UInt32, "cause": pl.Int64, "begin_ns": pl.Int64, "exit_ns": pl.Int64},
        orient="row",
    )
    free = clients.filter(pl.Series(nested.parent == NONE)).join(children, on="tgid")
    work = free.filter(pl.col("start_ns").is_between("begin_ns", "exit_ns"))
    return link(
        work.rename({"row": "effect"}),
        "forked_by",
        "exact",
        "its process was forked for it, and ended within it",
    )


def _cache_fills(clients: pl.DataFrame, nested: pl.DataFrame) -> pl.DataFrame:
    """Calls between a cache miss and the filling of the same key, by the same request."""
    mine = clients.join(
        nested.filter(pl.col("evidence") != "guess").select("cause", row="effect"), on="row"
    ).select("row", "cause", "miss", "detail", "start_ns", "until_ns")
    misses = mine.filter("miss").select(
        "cause", missed="row", missed_ns="until_ns", key=pl.col("detail").str.extract(_GET)
    )
    fills = mine.select(
        "cause", fill="row", filled_ns="start_ns", key=pl.col("detail").str.extract(_SET)
    )
    pairs = (
        misses.drop_nulls("key")
        .join(fills.drop_nulls("key"), on=["cause", "key"])
        .filter(pl.col("filled_ns") >= pl.col("missed_ns"))
        .sort("filled_ns")
        .unique("missed", keep="first", maintain_order=True)
    )
    between = mine.join(pairs, on="cause").filter(
        pl.col("start_ns").is_between("missed_ns", "filled_ns")
    )
    return link(
        between.select(cause="missed", effect="row"),
        "triggered_by",
        "derived",
        "between a cache miss and the filling of that key",
        parent=False,
    )
