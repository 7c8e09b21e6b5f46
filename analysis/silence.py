"""Why requests got no response: what the waiting end did next, and whether its bytes arrived."""

from __future__ import annotations

import errno
from typing import Final

import polars as pl

from scope_ebpf.recording.readable import syscall_numbers
from scope_ebpf.recording.reader import Recording

REASONS: Final = {
    "ECONNREFUSED": "connection refused: nobody listens there",
    "ECONNRESET": "connection reset by the other end",
    "EPIPE": "the other end had closed the connection",
    "ETIMEDOUT": "timed out",
    "EHOSTUNREACH": "host unreachable",
    "ENETUNREACH": "network unreachable",
    "ECONNABORTED": "connection aborted",
    "ENOENT": "there is no such socket",
    "EACCES": "permission denied",
    "EADDRNOTAVAIL": "no free local port",
}
# Of calls on a connection; the others are said of paths and processes, too.
_BROKEN: Final = [
    "ECONNREFUSED",
    "ECONNRESET",
    "EPIPE",
    "ETIMEDOUT",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "ECONNABORTED",
]
# Calls that end with EAGAIN when SO_RCVTIMEO is over.
_RECEIVES: Final = ["read", "readv", "recvfrom", "recvmsg"]
_POLLS: Final = ["poll", "ppoll"]
# A call that took less did not wait for anything.
_WAITED_NS: Final = 1_000_000

_CLOSED_THERE: Final = "the other end closed the connection without a response"
_CLOSED_HERE: Final = "closed here without a response"
GAVE_UP: Final = "no response in time: gave up here"


def explain_silence(recording: Recording, drafts: pl.DataFrame) -> pl.DataFrame:
    """Tell why requests got no response, and end their drafts there.

    By what came first: the end of the stream, a failed call on the descriptor, or its close(). Before
    a close(), a last wait of the same thread that ended without anything tells that it gave up.
    """
    silent = drafts.filter(
        pl.col("state").is_in(["open", "no_response"])
        & pl.col("kind").is_in(["client", "server"])
        & pl.col("connection").is_not_null()
    ).sort("sent_ns", "row")
    if silent.is_empty():
        return drafts
    told = _what_came_next(recording, silent)
    unheard = _never_received(recording, told.filter(pl.col("hopeless")), drafts)
    told = told.join(unheard, on="row", how="left", maintain_order="left").with_columns(
        told=pl.coalesce("unheard", "told")
    )
    return (
        drafts.join(
            told.select("row", "told", "told_ns"), on="row", how="left", maintain_order="left"
        )
        .with_columns(
            error=pl.coalesce("error", "told"),
            until_ns=pl.when(pl.col("told_ns").is_not_null())
            .then(pl.max_horizontal("told_ns", "asked_ns", "sent_ns"))
            .otherwise("until_ns"),
            state=pl.when(pl.col("told").is_not_null())
            .then(pl.lit("no_response"))
            .otherwise("state"),
        )
        .drop("told", "told_ns")
    )


def _what_came_next(recording: Recording, silent: pl.DataFrame) -> pl.DataFrame:
    """The silent drafts of which it is known why, with `told`, `told_ns`, `hopeless`.

    `hopeless`: a client's request that was given up without a sign from the other end.
    """
    columns = ["row", "kind", "tgid", "tid", "fd", "sent_ns", "asked_ns", "eof_ns"]
    columns += ["connection", "stream", "begin", "exact", "request_bytes"]
    silent = silent.select(columns).with_columns(
        why=pl.lit(None, dtype=pl.String),
        why_ns=pl.lit(None, dtype=pl.Int64),
        gave_up_ns=pl.lit(None, dtype=pl.Int64),
    )
    if "syscalls" in recording.meta.families:
        silent = _next_calls(recording, silent)
    waited = pl.col("gave_up_ns").is_not_null() & (pl.col("kind") == "client")
    closed = pl.col("eof_ns").is_not_null() & (
        pl.col("why_ns").is_null() | (pl.col("eof_ns") <= pl.col("why_ns"))
    )
    broken = pl.col("why").is_in(_BROKEN)
    reason = pl.format("{}: {}", "why", pl.col("why").replace_strict(REASONS, default="failed"))
    return silent.with_columns(
        told=pl.when(closed)
        .then(pl.lit(_CLOSED_THERE))
        .when(broken)
        .then(reason)
        .when(waited)
        .then(pl.lit(GAVE_UP))
        .when(pl.col("why") == "close")
        .then(pl.lit(_CLOSED_HERE)),
        told_ns=pl.when(closed)
        .then("eof_ns")
        .when(waited & ~broken)
        .then("gave_up_ns")
        .otherwise("why_ns"),
        hopeless=~closed
        & (pl.col("kind") == "client")
        & (waited | pl.col("why").is_in(["close", "ETIMEDOUT"]).fill_null(value=False)),
    ).filter(pl.col("told").is_not_null())


def _next_calls(recording: Recording, silent: pl.DataFrame) -> pl.DataFrame:
    """`why` and `why_ns`: the first call that ended it; `gave_up_ns`: the last wait before a close()."""
    ended = pl.col("start_ns") + pl.col("duration_ns")
    polled = pl.col("name").is_in(_POLLS) & (pl.col("arg1") == 1)
    receives = pl.col("name").is_in(_RECEIVES)
    numbers = syscall_numbers(recording.meta.host.machine, ["close", *_POLLS, *_RECEIVES])
    errnos = [-getattr(errno, name) for name in _BROKEN]
    calls = recording.collect(
        recording.syscalls.filter(
            pl.col("number").is_in(numbers) | pl.col("result").is_in(errnos)
        )
        .filter(
            (pl.col("name") == "close") | pl.col("error").is_in(_BROKEN) | polled
            | (receives & (pl.col("error") == "EAGAIN") & (pl.col("duration_ns") >= _WAITED_NS))
        )
        .join(silent.lazy().select("tgid").unique(), on="tgid", how="semi")
        .select(
            "tgid", "tid", "name", "error", "result", "duration_ns",
            fd=pl.col("arg0").cast(pl.Int64, strict=False), sent_ns="start_ns", end_ns=ended,
        )
    ).sort("sent_ns", "end_ns", "tid")  # fmt: skip
    polls = pl.col("name").is_in(_POLLS)
    ends = calls.filter(~polls & (pl.col("error").is_null() | (pl.col("error") != "EAGAIN")))
    silent = silent.drop("why", "why_ns", "gave_up_ns").join_asof(
        ends.select(
            "tgid", "fd", "sent_ns", why_ns="end_ns",
            why=pl.when(pl.col("name") == "close").then(pl.lit("close")).otherwise("error"),
        ),
        on="sent_ns",
        by=["tgid", "fd"],
        strategy="forward",
        check_sortedness=False,
    )  # fmt: skip
    # the last wait of the thread that ended before that; its result tells whether anything came
    waits = calls.filter(polls).select("tgid", "tid", "end_ns", "result", "duration_ns", "sent_ns")
    blocked = calls.filter(pl.col("error") == "EAGAIN").select(
        "tgid", "fd", "end_ns", gave_up_ns="end_ns"
    )
    ready = (pl.col("result") != 0) | (pl.col("duration_ns") < _WAITED_NS)
    ask = silent.filter(pl.col("why") == "close").select(
        "row", "tgid", "tid", "fd", "sent_ns", end_ns="why_ns"
    ).sort("end_ns")  # fmt: skip
    by_poll = (
        ask.join_asof(
            waits.rename({"sent_ns": "wait_ns"}).with_columns(over_ns="end_ns").sort("end_ns"),
            on="end_ns",
            by=["tgid", "tid"],
            check_sortedness=False,
        )
        .filter((pl.col("wait_ns") >= pl.col("sent_ns")) & ~ready)
        .select("row", gave_up_ns="over_ns")
    )
    by_receive = (
        ask.join_asof(
            blocked.sort("end_ns"), on="end_ns", by=["tgid", "fd"], check_sortedness=False
        )
        .filter(pl.col("gave_up_ns") >= pl.col("sent_ns"))
        .select("row", "gave_up_ns")
    )
    gave_up = pl.concat([by_receive, by_poll]).group_by("row").agg(pl.col("gave_up_ns").max())
    return silent.join(gave_up, on="row", how="left", maintain_order="left")


def _never_received(
    recording: Recording, hopeless: pl.DataFrame, drafts: pl.DataFrame
) -> pl.DataFrame:
    """Requests of which the other end, recorded and alive, never received a byte: `row`, `unheard`.

    That is so when packets are dropped on the way, and when the server does not read.
    """
    nothing = pl.DataFrame(schema={"row": pl.Int64, "unheard": pl.String})
    asked = hopeless.filter(pl.col("exact") & pl.col("stream").is_not_null())
    if asked.is_empty():
        return nothing
    lost = recording.losses.filter(pl.col("table").is_in(["messages", "connections", "tasks"]))
    if not recording.collect(lost).is_empty():
        return nothing
    # an address and port that were used again: which connection it was is not clear
    ends = recording.collect(
        recording.connections.select(
            "time_ns", "receive_stream", peer="connection", peer_tgid="tgid"
        )
    ).unique("receive_stream", keep="none")
    asked = asked.join(ends, left_on="stream", right_on="receive_stream").filter(
        (pl.col("time_ns") <= pl.col("asked_ns")) & (pl.col("peer") != pl.col("connection"))
    )
    if asked.is_empty():
        return nothing
    exits = recording.collect(
        recording.processes.filter(pl.col("event") == "exit")
        .group_by("tgid")
        .agg(exit_ns=pl.col("time_ns").min())
    )
    asked = asked.join(exits, left_on="peer_tgid", right_on="tgid", how="left").filter(
        pl.col("exit_ns").is_null() | (pl.col("exit_ns") > pl.col("told_ns"))
    )
    # any receive that ended after the request had been sent may have had its bytes
    ended = pl.col("start_ns") + pl.col("duration_ns")
    last = recording.collect(
        recording.messages.filter(
            (pl.col("direction") == "receive") & ~pl.col("peek") & (pl.col("length_bytes") > 0)
        )
        .join(asked.lazy().select(connection="peer").unique(), on="connection", how="semi")
        .group_by(peer="connection")
        .agg(received_ns=ended.max())
    )
    names = drafts.drop_nulls("service").select("service", peer_tgid="tgid").unique("peer_tgid")
    return (
        asked.join(last, on="peer", how="left")
        .filter(pl.col("received_ns").is_null() | (pl.col("received_ns") < pl.col("sent_ns")))
        .join(names, on="peer_tgid", how="left")
        .select(
            "row",
            unheard=pl.format(
                "sent, but never received by {}",
                pl.coalesce("service", pl.lit("the process at the other end")),
            ),
        )
    )
