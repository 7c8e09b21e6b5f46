"""Where the time of threads went, by Python stack: on the CPU, off it, and waiting for the GIL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import polars as pl

from scope_ebpf.analysis.names import THREAD, thread_names
from scope_ebpf.analysis.stacks.frames import NOT_RECORDED, resolve
from scope_ebpf.analysis.stacks.missing import why_no_gil, why_no_samples, why_no_waits
from scope_ebpf.analysis.stacks.profile import Frame, Kind, Profile, added, file_kind
from scope_ebpf.analysis.waits import wait_kind
from scope_ebpf.recording.reader import Recording

NO_PYTHON: Final = "[no Python stack]"
STACK_LOST: Final = "[stack not recorded]"
NOT_TAKEN: Final = "[stack not taken]"
SHORTER: Final = "[shorter waits]"
MORE: Final = "[more frames]"
READY: Final = "[ready to run]"
PREEMPTED: Final = "[preempted]"
PAGE_FAULT: Final = "[page fault]"
NO_CALL: Final = "[in no call]"
GIL: Final = "[GIL]"

# Samples of a moment at which the thread was in a call, or waited.
_WAITS: Final = ["wait", "fault", "message"]

# As loaders.symbols names it: `libpython3.11.so.1.0 _PyEval_EvalFrameDefault`, `python3.11`.
_EVAL_LOOP: Final = r"(?:^|\s)_PyEval_EvalFrameDefault|^(?:lib)?python[\d.]*t?(?:\.so[\d.]*)?$"

# What profiles are made of, one row per sample or interval.
WEIGHED: Final = pl.Schema(
    {
        "tgid": pl.UInt32(),
        "tid": pl.UInt32(),
        "group": pl.String(),  # of a request: what stands outside of the thread; else null
        "stack": pl.UInt64(),  # in stacks; null: none
        "instead": pl.String(),  # what stands for the stack if there is none; null: nothing
        "inner": pl.String(),  # inside of the innermost Python frame; null: nothing
        "inner_kind": pl.String(),
        "innermost": pl.String(),  # and inside of that
        "innermost_kind": pl.String(),
        "weight_ns": pl.Int64(),
    }
)


def period_ns(recording: Recording) -> int:
    """What a tick of the sampling clock stands for."""
    return round(1e9 / max(recording.meta.sample_hz, 1))


def on_cpu(
    recording: Recording, tgids: Sequence[int] | None = None, *, by_line: bool = False,
    by_thread: bool = False,
) -> Profile:  # fmt: skip
    """What threads ran, by the ticks of the sampling clock; each weighs a period of it.

    The native function that ran is the innermost frame, where it is known. `tgids`: only these
    processes; `by_line`: see `Profile`; `by_thread`: threads of one name are told apart.
    """
    weighed = ticks(recording, tgids)
    title = f"on the CPU, {recording.meta.sample_hz} samples a second"
    profile = build(recording, weighed, title, by_line=by_line, by_thread=by_thread)
    return profile if profile.stacks else _because(profile, tgids, why_no_samples(recording))


def ticks(recording: Recording, tgids: Sequence[int] | None) -> pl.LazyFrame:
    """The ticks of the sampling clock: WEIGHED, and `time_ns` and `context`."""
    # the loop that runs bytecode is the Python function itself; so is a stripped interpreter, of
    # which only the file is known
    loop = pl.col("native").str.contains(_EVAL_LOOP) & pl.col("stack").is_not_null()
    native = pl.when(loop.not_().fill_null(value=False)).then("native")
    return (
        _of(recording.samples, tgids)
        .filter(pl.col("reason") == "cpu")
        .select(
            *THREAD,
            "time_ns",
            "context",
            "stack",
            group=pl.lit(None, pl.String),
            instead=pl.when(native.is_null()).then(pl.lit(NO_PYTHON)),
            inner=native,
            inner_kind=pl.when(native.is_not_null()).then(pl.lit("native")),
            innermost=pl.lit(None, pl.String),
            innermost_kind=pl.lit(None, pl.String),
            weight_ns=pl.lit(period_ns(recording), pl.Int64),
        )
    )


def off_cpu(
    recording: Recording, tgids: Sequence[int] | None = None, *, by_line: bool = False,
    by_thread: bool = False,
) -> Profile:  # fmt: skip
    """What threads waited in: the sums are those of the table `offcpu`.

    The call that a thread was in is inside of the Python stack, and inside of that the time after its
    wakeup in which it was ready to run. Stacks are taken of calls that wait for longer than a
    threshold; the others are `[shorter waits]` of their thread.
    """
    weighed = waits(recording, tgids)
    profile = build(recording, weighed, "off the CPU", by_line=by_line, by_thread=by_thread)
    if not profile.stacks:
        return _because(profile, tgids, why_no_waits(recording))
    if "offcpu" not in recording.meta.families:
        return _noted(profile, "off-CPU time was not recorded: only waits with a stack are here")
    return profile


def waits(recording: Recording, tgids: Sequence[int] | None) -> pl.LazyFrame:
    """Time off the CPU: WEIGHED, and `time_ns`, `upto_ns` and `context`.

    An interval is two rows if something woke the thread before it ran: waiting, and ready to run.
    """
    samples = _of(recording.samples, tgids)
    taken = (
        samples.filter(pl.col("reason").is_in(_WAITS))
        # a call may have a stack for its message and one for its wait, which is the same
        .sort("reason", maintain_order=True)
        .unique([*THREAD, "time_ns"], keep="first", maintain_order=True)
        .select(*THREAD, "stack", "reason", call_ns="time_ns", sampled="context")
    )
    stacked = samples.filter(pl.col("stack").is_not_null()).select("tgid").unique()
    python = stacked.with_columns(python=pl.lit(value=True))
    gil = recording.gil.select(*THREAD, call_ns="start_ns", gil=pl.lit(value=True))
    machine = recording.meta.host.machine
    if "offcpu" in recording.meta.families:
        intervals = _of(recording.offcpu, tgids).select(
            *THREAD, "context", "start_ns", "duration_ns", "number", "name", "state",
            ready_ns=pl.col("runnable_ns").fill_null(0),
            call_ns=pl.coalesce("syscall_start_ns", "start_ns"),
        )  # fmt: skip
    else:
        intervals = _only_sampled(recording, samples)
    fault = pl.col("reason") == "fault"
    in_call = pl.col("number").is_not_null()
    runs = pl.col("state").cast(pl.String) == "R"
    whole_ns = pl.col("duration_ns").sum().over(*THREAD, "call_ns")
    short = whole_ns < recording.meta.long_wait_ns
    joined = (
        intervals.join(taken, on=[*THREAD, "call_ns"], how="left")
        .join(gil.unique([*THREAD, "call_ns"]), on=[*THREAD, "call_ns"], how="left")
        .join(python, on="tgid", how="left")
        .with_columns(short=short)
    )
    # of a program that is no Python nothing is missing
    stack_due = pl.col("python") & (in_call | ~runs)
    inner = (
        pl.when(pl.col("gil")).then(pl.lit(GIL))
        .when(in_call).then("name")
        .when(runs).then(pl.lit(PREEMPTED))
        .when(fault | (pl.col("state").cast(pl.String) == "D")).then(pl.lit(PAGE_FAULT))
        .otherwise(pl.lit(NO_CALL))
    )  # fmt: skip
    kind = wait_kind(machine).cast(pl.String).replace({"stopped": "wait", "unknown": "wait"})
    inner_kind = (
        pl.when(pl.col("gil")).then(pl.lit("gil"))
        .when(~in_call & runs).then(pl.lit("runqueue"))
        .when(~in_call & fault).then(pl.lit("disk"))
        .otherwise(kind)
    )  # fmt: skip
    # the context of an interval is that of its call
    context = pl.when(in_call).then("context").otherwise(pl.col("sampled").fill_null(0))
    ready = pl.min_horizontal(pl.max_horizontal("ready_ns", 0), "duration_ns")
    # one that was preempted is ready to run all the time, and that says it already
    ready = pl.when(in_call | ~runs).then(ready).otherwise(0)
    described = joined.select(
        *THREAD, "stack", "duration_ns", "start_ns", context=context,
        group=pl.lit(None, pl.String),
        instead=pl.when(pl.col("stack").is_not_null()).then(None)
        .when(stack_due & pl.col("reason").is_not_null()).then(pl.lit(NO_PYTHON))
        .when(stack_due & pl.col("short")).then(pl.lit(SHORTER))
        .when(stack_due).then(pl.lit(NOT_TAKEN)),
        inner=inner,
        inner_kind=inner_kind,
        ready_ns=ready,
    )  # fmt: skip
    woken_ns = pl.col("start_ns") + pl.col("duration_ns") - pl.col("ready_ns")
    waiting = described.with_columns(
        innermost=pl.lit(None, pl.String),
        innermost_kind=pl.lit(None, pl.String),
        time_ns=pl.col("start_ns"),
        upto_ns=woken_ns,
    )
    runnable = described.with_columns(
        innermost=pl.lit(READY),
        innermost_kind=pl.lit("runqueue"),
        time_ns=woken_ns,
        upto_ns=pl.col("start_ns") + pl.col("duration_ns"),
    )
    return (
        pl.concat([waiting, runnable])
        .with_columns(weight_ns=pl.col("upto_ns") - pl.col("time_ns"))
        .filter(pl.col("weight_ns") > 0)
        .select(*WEIGHED, "time_ns", "upto_ns", "context")
    )


def _only_sampled(recording: Recording, samples: pl.LazyFrame) -> pl.LazyFrame:
    """Waits with a stack, as intervals of `offcpu`, where that table was not recorded."""
    calls = recording.syscalls.select(*THREAD, "number", "name", time_ns="start_ns")
    return (
        samples.filter(pl.col("reason").is_in(["wait", "fault"]))
        .join(calls.unique([*THREAD, "time_ns"]), on=[*THREAD, "time_ns"], how="left")
        .select(
            *THREAD, "context", "duration_ns", "number", "name",
            start_ns="time_ns",
            state=pl.lit("S"),
            ready_ns=pl.lit(0, pl.Int64),
            call_ns="time_ns",
        )
    )  # fmt: skip


def gil_waits(
    recording: Recording, tgids: Sequence[int] | None = None, *, by_line: bool = False,
    by_thread: bool = False,
) -> Profile:  # fmt: skip
    """Waiting for the GIL: the stack of who waited, and inside of it who held the GIL at the end.

    Stacks of other moments say nothing of this one: a call without a stack is `[stack not taken]`.
    """
    stored = _of(recording.gil, tgids)
    stacks = (
        _of(recording.samples, tgids)
        .filter(pl.col("reason").is_in(_WAITS))
        .sort("reason", maintain_order=True)
        .unique([*THREAD, "time_ns"], keep="first", maintain_order=True)
        .select(*THREAD, "stack", start_ns="time_ns")
    )
    calls = recording.collect(stored.join(stacks, on=[*THREAD, "start_ns"], how="left"))
    holders = calls.select("tgid", tid="holder_tid").drop_nulls().unique()
    named = thread_names(recording, holders).select(
        "tgid", holder_tid="tid", holder=pl.format("[GIL held by {} ({})]", "thread", "tid")
    )
    weighed = (
        calls.lazy()
        .join(named.lazy(), on=["tgid", "holder_tid"], how="left", maintain_order="left")
        .select(
            *THREAD,
            "stack",
            group=pl.lit(None, pl.String),
            instead=pl.when(pl.col("stack").is_null()).then(pl.lit(NOT_TAKEN)),
            inner=pl.coalesce("holder", pl.lit("[GIL, holder not known]")),
            inner_kind=pl.lit("gil"),
            innermost=pl.lit(None, pl.String),
            innermost_kind=pl.lit(None, pl.String),
            weight_ns="duration_ns",
        )
    )
    title = "waiting for the GIL"
    profile = build(recording, weighed, title, by_line=by_line, by_thread=by_thread)
    return profile if profile.stacks else _because(profile, tgids, why_no_gil(recording))


def build(
    recording: Recording, weighed: pl.LazyFrame, title: str, *, by_line: bool, by_thread: bool
) -> Profile:
    """The profile of rows with the schema WEIGHED."""
    keys = [name for name in WEIGHED if name != "weight_ns"]
    # millions of rows, of which few differ
    summed = recording.collect(
        weighed.group_by(keys)
        .agg(pl.col("weight_ns").sum(), samples=pl.len())
        .filter(pl.col("weight_ns") > 0)
        .sort(keys)
    )
    names = thread_names(recording, summed.select(THREAD).unique(maintain_order=True))
    summed = summed.join(names, on=THREAD, how="left", maintain_order="left")
    frames: dict[Frame, int] = {}

    def number(name: str, kind: Kind) -> int:
        return frames.setdefault(Frame(name, kind), len(frames))

    python = _python_paths(recording, summed, frames)
    weights = []
    for row in summed.iter_rows(named=True):
        thread = f"{row['thread']} ({row['tid']})" if by_thread else row["thread"]
        path = [number(row["group"] or row["service"], "group"), number(thread, "group")]
        if row["stack"] is not None:
            known = python.get((row["tgid"], row["stack"]))
            path += (number(STACK_LOST, "note"),) if known is None else known
        elif row["instead"] is not None:
            path.append(number(row["instead"], "note"))
        if row["inner"] is not None:
            path.append(number(row["inner"], row["inner_kind"]))
        if row["innermost"] is not None:
            path.append(number(row["innermost"], row["innermost_kind"]))
        weights.append((tuple(path), row["weight_ns"], row["samples"]))
    return Profile(title, list(frames), added(weights), by_line)


def _python_paths(
    recording: Recording, weighed: pl.DataFrame, frames: dict[Frame, int]
) -> dict[tuple[int, int], tuple[int, ...]]:
    """The numbers of the frames of each stack, outermost first."""
    resolved = resolve(recording, weighed.select("tgid", "stack").drop_nulls())
    place = ["function", "file", "first_line", "line"]
    distinct = resolved.select(place).unique(maintain_order=True)
    numbers = [
        frames.setdefault(
            Frame(function or NOT_RECORDED, file_kind(file), file, first_line, line), len(frames)
        )
        for function, file, first_line, line in distinct.iter_rows()
    ]
    paths = (
        resolved.join(
            distinct.with_columns(number=pl.Series(numbers, dtype=pl.UInt32)),
            on=place,
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )
        .sort("tgid", "stack", "depth", descending=[False, False, True])
        .group_by("tgid", "stack", maintain_order=True)
        .agg("number", truncated=pl.col("truncated").any())
    )
    more = (
        (frames.setdefault(Frame(MORE, "note"), len(frames)),) if paths["truncated"].any() else ()
    )
    return {
        (tgid, stack): (*(more if truncated else ()), *path)
        for tgid, stack, path, truncated in paths.iter_rows()
    }


def _of(frame: pl.LazyFrame, tgids: Sequence[int] | None) -> pl.LazyFrame:
    return frame if tgids is None else frame.filter(pl.col("tgid").is_in(list(tgids)))


def _because(profile: Profile, tgids: Sequence[int] | None, why: str) -> Profile:
    of = "" if tgids is None else f", as far as these {len(tgids)} processes go"
    return replace(profile, frames=[], stacks={}, empty=f"{why}{of}")


def _noted(profile: Profile, note: str) -> Profile:
    return replace(profile, notes=(*profile.notes, note))
