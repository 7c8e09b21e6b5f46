"""Attempts to connect: calls of connect() on a socket, and what came of them."""

from __future__ import annotations

from typing import Final

import polars as pl

from scope_ebpf.recording.readable import syscall_numbers
from scope_ebpf.recording.reader import Recording

_KINDS: Final = ["tcp", "mptcp", "unix", "unix-seqpacket", "udp"]
_INTERNET: Final = ["tcp", "mptcp"]
# A connect() that is still under way: what came of it is told by a later call, or by messages. The
# kernel's own ERESTARTSYS: a signal came, and the call is made again.
_UNDER_WAY: Final = ["EINPROGRESS", "EALREADY", "EINTR", "ERESTARTSYS"]
# Calls on the socket that succeed only when it is connected.
_ONLY_CONNECTED: Final = ["getpeername", "shutdown"]
_POLLS: Final = ["poll", "ppoll"]
# A blocking connect() ends so when SO_SNDTIMEO is over; one that does not block returns at once.
_BLOCKED_NS: Final = 1_000_000
# Who connected so shortly before and after shows that somebody listened.
_NEARBY_NS: Final = 1_000_000_000

NOT_IN_TIME: Final = "not connected in time: given up here"
UNKNOWN: Final = "closed before any byte: refused, unreachable or given up"
FULL: Final = "EAGAIN: the queue of connections that wait there is full"


def read_connects(recording: Recording) -> pl.DataFrame:
    """Attempts to connect, sorted by `start_ns`; several calls for the same attempt are one row.

    - `start_ns`, `tgid`, `tid`, `context`, `fd`, `inode`, `kind`, `remote` (address or path),
      `remote_port`: of its first call
    - `until_ns`: end of its last call, or of the attempt if it was given up
    - `error`: of its last call, null if it succeeded or is under way; `came_to_nothing`: not an
      errno but why no connection came of an attempt that did not block
    """
    calls = recording.collect(
        recording.connects.filter(pl.col("kind").is_in(_KINDS)).select(
            "start_ns",
            (pl.col("start_ns") + pl.col("duration_ns").clip(lower_bound=0)).alias("until_ns"),
            "tgid",
            "tid",
            "context",
            pl.col("fd").cast(pl.Int64),
            "inode",
            "kind",
            pl.coalesce("remote_address", "remote_path").alias("remote"),
            "remote_port",
            "error",
        )
    ).sort("start_ns", "until_ns", "tgid", "tid", "fd", "inode")
    pending = pl.col("error").is_in(_UNDER_WAY)
    pending |= (pl.col("error") == "EAGAIN") & pl.col("kind").is_in(_INTERNET)
    same = ["tgid", "fd", "inode"]
    attempts = (
        calls.with_columns(pending=pending.fill_null(value=False))
        .with_columns(
            attempt=(~pl.col("pending")).cum_sum().over(same) - (~pl.col("pending")).cast(pl.UInt32)
        )
        .group_by([*same, "attempt"], maintain_order=True)
        .agg(
            pl.col("start_ns", "tid", "context", "kind").first(),
            pl.col("remote", "remote_port").drop_nulls().first(),
            pl.col("until_ns", "error", "pending").last(),
        )
        .with_columns(
            error=pl.when(~pl.col("pending") & (pl.col("error") != "EISCONN")).then("error")
        )
        .sort("start_ns", maintain_order=True)
        .with_row_index("row")
    )
    came_to = _came_to_nothing(recording, attempts)
    return (
        attempts.join(came_to, on="row", how="left", maintain_order="left")
        .with_columns(until_ns=pl.max_horizontal("closed_ns", "until_ns"))
        .drop("row", "attempt", "pending", "closed_ns")
    )


def _came_to_nothing(recording: Recording, attempts: pl.DataFrame) -> pl.DataFrame:
    """Attempts under way on whose socket no byte was ever moved until it was closed.

    Columns `row`, `closed_ns`, `came_to_nothing`. What getsockopt(SO_ERROR) said is not recorded, so
    an attempt that may as well have succeeded is left out: where the socket was seen to be
    connected, or others connected to the same place just before and just after.
    """
    nothing = pl.DataFrame(
        schema={"row": pl.UInt32, "closed_ns": pl.Int64, "came_to_nothing": pl.String}
    )
    waiting = attempts.filter(
        (
            (pl.col("pending") & pl.col("kind").is_in(_INTERNET))
            | ((pl.col("error") == "EAGAIN") & ~pl.col("kind").is_in(_INTERNET))
        )
        & (pl.col("inode") != 0)
        # through io_uring: who asked is told what came of it, in no call that is recorded
        & pl.col("fd").is_not_null()
    )
    families = recording.meta.families
    if waiting.is_empty() or "syscalls" not in families or "messages" not in families:
        return nothing
    lost = ["messages", "connections", "syscalls", "tasks"]
    if not recording.collect(recording.losses.filter(pl.col("table").is_in(lost))).is_empty():
        return nothing
    used = recording.collect(recording.connections.select("inode").unique())
    waiting = waiting.join(used, on="inode", how="anti", maintain_order="left")
    # an attempt that was made again on the same socket is told by the last one
    waiting = waiting.unique(["tgid", "inode"], keep="last", maintain_order=True)
    if waiting.is_empty():
        return nothing
    ended = pl.col("start_ns") + pl.col("duration_ns")
    numbers = syscall_numbers(recording.meta.host.machine, ["close", *_ONLY_CONNECTED, *_POLLS])
    calls = recording.collect(
        recording.syscalls.filter(pl.col("number").is_in(numbers))
        .join(waiting.lazy().select("tgid").unique(), on="tgid", how="semi")
        .select(
            "tgid", "tid", "name", "result", "arg1", until_ns="start_ns", end_ns=ended,
            fd=pl.col("arg0").cast(pl.Int64, strict=False),
        )
    ).sort("until_ns", "end_ns", "tid")  # fmt: skip
    closes = calls.filter(pl.col("name") == "close").select(
        "tgid", "fd", "until_ns", closed_ns="end_ns"
    )
    exits = recording.collect(
        recording.processes.filter(pl.col("event") == "exit").select(
            "tgid", until_ns="time_ns", exit_ns="time_ns"
        )
    ).sort("until_ns")
    forward = {"on": "until_ns", "strategy": "forward", "check_sortedness": False}
    closed = (
        waiting.sort("until_ns")
        .join_asof(closes, by=["tgid", "fd"], **forward)  # type: ignore[arg-type]
        .join_asof(exits, by="tgid", **forward)  # type: ignore[arg-type]
        .with_columns(closed_ns=pl.coalesce("closed_ns", "exit_ns"))
        .drop_nulls("closed_ns")
    )
    connected = closed.join(
        calls.filter(pl.col("name").is_in(_ONLY_CONNECTED) & (pl.col("result") == 0)).select(
            "tgid", "fd", seen_ns="until_ns"
        ),
        on=["tgid", "fd"],
    ).filter(pl.col("seen_ns").is_between("until_ns", "closed_ns"))
    polls = calls.filter(pl.col("name").is_in(_POLLS) & (pl.col("arg1") == 1)).select(
        "tgid", "tid", "until_ns", poll_ns="end_ns", ready="result"
    )
    told = closed.join(connected, on="row", how="anti", maintain_order="left").join_asof(
        polls,
        by=["tgid", "tid"],
        **forward,  # type: ignore[arg-type]
    )
    late = (pl.col("ready") == 0) & (pl.col("poll_ns") <= pl.col("closed_ns"))
    late = late.fill_null(value=False)
    late |= pl.col("pending") & (pl.col("until_ns") - pl.col("start_ns") >= _BLOCKED_NS)
    told = told.with_columns(
        came_to_nothing=pl.when(~pl.col("pending"))
        .then(pl.lit(FULL))
        .when(late)
        .then(pl.lit(NOT_IN_TIME))
        .otherwise(pl.lit(UNKNOWN))
    )
    unclear = told.filter(pl.col("came_to_nothing") == UNKNOWN)
    listened = _somebody_listened(unclear, attempts, used)
    return told.join(listened, on="row", how="anti", maintain_order="left").select(nothing.columns)


def _somebody_listened(
    unclear: pl.DataFrame, attempts: pl.DataFrame, used: pl.DataFrame
) -> pl.DataFrame:
    """Which attempts (`row`) lie closely between two others to the same place that succeeded."""
    place = ["remote", "remote_port"]
    made = (
        attempts.filter(pl.col("error").is_null() & pl.col("remote").is_not_null())
        .join(used, on="inode", how="semi", maintain_order="left")
        .select(*place, "start_ns", made_ns="start_ns")
    )
    near = unclear.sort("start_ns").select("row", *place, "start_ns")
    for strategy, name in (("backward", "before_ns"), ("forward", "after_ns")):
        near = near.join_asof(
            made.rename({"made_ns": name}),
            on="start_ns",
            by=place,
            strategy=strategy,  # type: ignore[arg-type]
            tolerance=_NEARBY_NS,
            check_sortedness=False,
        )
    return near.drop_nulls(["before_ns", "after_ns"]).select("row")
