"""What each logical context was for: its name, who made it, what it did and waited for."""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.names import thread_names
from scope_ebpf.analysis.schema import PARTS
from scope_ebpf.analysis.stacks.frames import resolve
from scope_ebpf.recording.readable import CONTEXT_KIND
from scope_ebpf.recording.reader import Recording

Rows = NDArray[np.intp]

TASK_STATE: Final = pl.Enum(["waiting", "exited", "last seen"])

# One row per logical context.
TASKS: Final = pl.Schema(
    {
        "context": pl.UInt64(),
        "parent": pl.UInt64(),  # as in contexts, but the nearest that is in the table
        "kind": CONTEXT_KIND,  # null: it was not recorded how it came about
        "name": pl.String(),  # the function that it runs; null: no stack of it was taken
        "file": pl.String(),  # of that function
        "service": pl.String(),
        "tgid": pl.UInt32(),
        "tid": pl.UInt32(),  # the thread that it was made in, or first seen in
        "made_ns": pl.Int64(),  # null: before it was met, or not recorded
        "first_ns": pl.Int64(),  # its first call; null: it made none
        "last_ns": pl.Int64(),  # the end of its last one
        "calls": pl.UInt32(),  # system calls
        "samples": pl.UInt32(),  # stacks that were taken in it
        "requests": pl.UInt32(),  # that it handled
        "operation": pl.String(),  # of the first of them
        "wait_ns": pl.Int64(),  # in requests to others
        "waits": PARTS,  # for each kind of peer, longest first
        # waiting: for a peer when the recording ended. exited: its process did. Else no more is known:
        # nothing tells that a task ended
        "state": TASK_STATE,
        "last_wait": pl.String(),  # the peer or system call that it waited in last
    }
)

# The frame behind which a task's or callback's own code begins, by the end of its file's name.
_ENTRIES: Final = [
    ("asyncio/events.py", r"(^|\.)_run$"),
    ("asyncio/runners.py", r"(^|\.)run$"),
    ("uvloop/__init__.py", r"(^|\.)run$"),
    ("trio/_core/_run.py", "."),
    ("concurrent/futures/thread.py", r"(^|\.)(run|_worker)$"),
    ("anyio/_backends/_asyncio.py", r"(^|\.)run$"),
    ("gevent/greenlet.py", r"(^|\.)run$"),
    ("threading.py", r"(^|\.)(run|_bootstrap|_bootstrap_inner)$"),
]
# Between that frame and the task's own code.
_STEPS: Final = r"asyncio/(tasks|base_events|runners|events)\.py$|gevent/(greenlet|baseserver)\.py$"


def find_tasks(recording: Recording, *, everything: bool = False) -> pl.DataFrame:
    """One row per logical context, with the schema TASKS, sorted by when it was made or first seen.

    Without those that did nothing: no call, no sample, no request, and none below them did either;
    `everything`: with these. An event loop makes a context for each callback, too.
    """
    calls = _calls(recording)
    spans = recording.collect(recording.spans()).filter(pl.col("context") != 0)
    made = recording.collect(
        recording.contexts.select("context", "parent", "kind", "tgid", "tid", made_ns="time_ns")
    ).unique("context", keep="first", maintain_order=True)
    seen = pl.concat(
        [calls.select("context", "tgid", "tid"), spans.select("context", "tgid", "tid")]
    ).unique("context", keep="first", maintain_order=True)
    # what was made before the recording, or whose row was lost
    unknown = seen.join(made, on="context", how="anti", maintain_order="left")
    tasks = pl.concat([made, unknown], how="diagonal")
    tasks = tasks.with_columns(
        pl.col("parent").fill_null(0),
        made_ns=pl.when(pl.col("kind").cast(pl.String) != "met").then("made_ns"),
    )
    for more in (calls.drop("tgid", "tid"), _requests(spans), _waits(spans), _names(recording)):
        tasks = tasks.join(more, on="context", how="left", maintain_order="left")
    names = thread_names(recording, tasks.select("tgid", "tid").unique(maintain_order=True))
    tasks = (
        tasks.join(names, on=["tgid", "tid"], how="left", maintain_order="left")
        .join(_exits(recording), on="tgid", how="left", maintain_order="left")
        .with_columns(
            pl.col("calls", "samples", "requests", "wait_ns").fill_null(0),
            pl.col("waits").fill_null([]),
            pl.coalesce("waited_for", "last_wait").alias("last_wait"),
            state=pl.when(pl.col("waited_for").is_not_null())
            .then(pl.lit("waiting"))
            .when(pl.col("exit_ns") >= pl.coalesce("last_ns", "made_ns", "exit_ns"))
            .then(pl.lit("exited"))
            .otherwise(pl.lit("last seen")),
        )
        .sort(pl.min_horizontal("made_ns", "first_ns"), "context", nulls_last=False)
    )
    if not everything:
        tasks = _that_did_something(tasks)
    return tasks.select(pl.col(name).cast(dtype) for name, dtype in TASKS.items())


def _calls(recording: Recording) -> pl.DataFrame:
    """What is known of each context from its system calls."""
    end = pl.col("start_ns") + pl.col("duration_ns")
    called = recording.syscalls.filter(pl.col("context") != 0)
    return recording.collect(
        called.group_by("context").agg(
            pl.col("tgid").first(),
            pl.col("tid").sort_by("start_ns").first(),
            first_ns=pl.col("start_ns").min(),
            last_ns=end.max(),
            calls=pl.len().cast(pl.UInt32),
            last_wait=pl.col("name").sort_by("start_ns").last(),
        )
    )


def _requests(spans: pl.DataFrame) -> pl.DataFrame:
    """What each context handled."""
    return (
        spans.filter(pl.col("kind").cast(pl.String).is_in(["server", "consumer"]))
        .group_by("context")
        .agg(requests=pl.len().cast(pl.UInt32), operation=pl.col("operation").drop_nulls().first())
    )


def _waits(spans: pl.DataFrame) -> pl.DataFrame:
    """How long each context waited for its requests to others, by peer; where they overlap, once."""
    end = pl.col("start_ns") + pl.col("duration_ns")
    calls = (
        spans.filter(pl.col("kind").cast(pl.String) == "client")
        .sort("start_ns", maintain_order=True)
        .with_columns(reached=end.cum_max().shift(1).over("context").fill_null(0), end_ns=end)
        .with_columns(
            wait_ns=pl.max_horizontal(
                pl.col("end_ns") - pl.max_horizontal("start_ns", "reached"), 0
            )
        )
    )
    waits = (
        calls.group_by("context", "peer", "protocol", maintain_order=True)
        .agg(pl.col("wait_ns").sum())
        .sort("wait_ns", descending=True, maintain_order=True)
        .group_by("context", maintain_order=True)
        .agg(waits=pl.struct("peer", "protocol", "wait_ns"), wait_ns=pl.col("wait_ns").sum())
    )
    open_ones = (
        calls.filter(pl.col("state").cast(pl.String) == "open")
        .group_by("context")
        .agg(waited_for=pl.coalesce("peer", "protocol", pl.lit("a request")).last())
    )
    return waits.join(open_ones, on="context", how="left")


def _exits(recording: Recording) -> pl.DataFrame:
    return recording.collect(
        recording.processes.filter(pl.col("event").cast(pl.String) == "exit")
        .group_by("tgid")
        .agg(exit_ns=pl.col("time_ns").max())
    )


def _names(recording: Recording) -> pl.DataFrame:
    """The function that each context runs: the first one behind the event loop's own, in its stacks.

    Of several the one that was met most often: a callback may be followed by another one.
    """
    samples = recording.collect(
        recording.samples.filter((pl.col("context") != 0) & pl.col("stack").is_not_null()).select(
            "context", "tgid", "stack"
        )
    )
    counted = samples.group_by("context").agg(samples=pl.len().cast(pl.UInt32))
    stacks = samples.group_by("context", "tgid", "stack", maintain_order=True).agg(times=pl.len())
    functions = outermost(resolve(recording, stacks.select("tgid", "stack")))
    named = (
        stacks.join(functions, on=["tgid", "stack"], maintain_order="left")
        .filter(pl.col("name").is_not_null())
        .group_by("context", "name", "file", maintain_order=True)
        .agg(pl.col("times").sum())
        .sort("times", "name", descending=[True, False], maintain_order=True)
        .unique("context", keep="first", maintain_order=True)
        .select("context", "name", "file")
    )
    return counted.join(named, on="context", how="left", maintain_order="left")


def outermost(frames: pl.DataFrame) -> pl.DataFrame:
    """The function that a stack's task runs: `tgid`, `stack`, `name`, `file`.

    `frames` has `tgid`, `stack`, `depth` (0: the innermost), `function`, `file`, as frames.resolve
    gives them. It is the outermost one that the event loop, or the thread, called; what of the loop
    itself comes next is passed over, unless there is nothing else.
    """
    path = pl.col("file").fill_null("").str.replace_all(r"\\", "/")
    entry = pl.any_horizontal(
        path.str.ends_with(file) & pl.col("function").fill_null("").str.contains(function)
        for file, function in _ENTRIES
    )
    stack = ["tgid", "stack"]
    # a loop within a loop: the inner one runs the task that is current
    behind = frames.with_columns(
        entered=pl.col("depth").filter(entry).min().over(stack), step=path.str.contains(_STEPS)
    ).filter(pl.col("entered").is_null() | (pl.col("depth") < pl.col("entered")))
    return (
        behind.sort("step", pl.col("depth").cast(pl.Int32).neg(), maintain_order=True)
        .unique(stack, keep="first", maintain_order=True)
        .select(*stack, name="function", file="file")
    )


def _that_did_something(tasks: pl.DataFrame) -> pl.DataFrame:
    """Tasks that did something, each with the nearest such one above it as its parent."""
    did = (pl.col("calls") > 0) | (pl.col("samples") > 0) | (pl.col("requests") > 0)
    kept = tasks.select(did | (pl.col("wait_ns") > 0)).to_series().to_numpy()
    direct = rows_of_parents(tasks)
    # the last place is nobody's; what did something stays, and each round doubles the distance
    nearest = np.r_[np.where(kept, np.arange(len(tasks)), direct), -1]
    for _ in range(40):
        further = nearest[nearest]
        if np.array_equal(further, nearest):
            break
        nearest = further
    above = nearest[direct]
    context = tasks["context"].to_numpy()
    # a parent that is not in the table stays as it is told
    told = tasks["parent"].to_numpy()
    parent = np.where(above >= 0, context[np.maximum(above, 0)], np.where(direct >= 0, 0, told))
    return tasks.with_columns(parent=pl.Series(parent, dtype=pl.UInt64)).filter(pl.Series(kept))


def rows_of_parents(tasks: pl.DataFrame) -> Rows:
    """The row of each task's parent in the same frame, -1: it is not there."""
    context, parent = tasks["context"].to_numpy(), tasks["parent"].to_numpy()
    if not len(context):
        return np.zeros(0, np.intp)
    order = np.argsort(context)
    place = np.minimum(np.searchsorted(context[order], parent), len(context) - 1)
    found = order[place]
    # nothing is its own parent
    fits = (context[found] == parent) & (found != np.arange(len(context)))
    return np.where(fits, found, -1)
