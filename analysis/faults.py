"""What broke: connections that were refused, reset or left without an answer, and processes that died."""

from __future__ import annotations

from typing import Final

import polars as pl

from scope_ebpf.analysis.attempts import NOT_IN_TIME
from scope_ebpf.analysis.drafts import DRAFT
from scope_ebpf.analysis.links import link
from scope_ebpf.analysis.peers import namespaces
from scope_ebpf.analysis.services import add_services
from scope_ebpf.analysis.silence import GAVE_UP, REASONS

# Sockets that the C library asks first and does without; nobody misses them.
_OPTIONAL_PATHS: Final = (
    r"/(nscd|systemd/(userdb|io\.systemd|notify|journal)|avahi-daemon|lsassd)\b"
)
# A connection that was made right before it was used was made for that use.
_CONNECT_BEFORE_NS: Final = 1_000_000_000
# The end of a process is seen before its sockets are closed, but on another CPU.
_SAME_MOMENT_NS: Final = 5_000_000
_GIVEN_UP: Final = [NOT_IN_TIME, GAVE_UP]
# Signals by which people and supervisors end processes as a matter of course.
_ASKED: Final = ["SIGTERM", "SIGINT", "SIGHUP", "SIGPIPE", "SIGALRM"]


def begin_with_connects(
    drafts: pl.DataFrame, connects: pl.DataFrame, connections: pl.DataFrame
) -> pl.DataFrame:
    """Let the first request on a connection begin with the connect() that was made for it."""
    made = connects.filter(
        (pl.col("error").is_null() | (pl.col("error") == "EAGAIN")) & (pl.col("inode") != 0)
    )
    first = (
        drafts.filter((pl.col("kind") == "client") & (pl.col("state") != "began_before"))
        .sort("start_ns", "row")
        .unique("connection", keep="first", maintain_order=True)
        .select("row", "connection", "start_ns")
        .join(
            connections.select("connection", "inode").unique("connection", keep="last"),
            on="connection",
            maintain_order="left",
        )
    )
    begun = (
        first.join_asof(
            made.select("start_ns", "inode", connect_ns="start_ns", made_ns="until_ns"),
            on="start_ns",
            by="inode",
            check_sortedness=False,
        )
        .filter(pl.col("start_ns") - pl.col("made_ns") < _CONNECT_BEFORE_NS)
        .select("row", "connect_ns")
    )
    return (
        drafts.join(begun, on="row", how="left", maintain_order="left")
        .with_columns(start_ns=pl.coalesce("connect_ns", "start_ns"))
        .drop("connect_ns")
    )


def refused_connects(
    drafts: pl.DataFrame, connects: pl.DataFrame, services: pl.DataFrame
) -> pl.DataFrame:
    """A draft for each connect() that failed, also for one that never came to anything."""
    failed = connects.filter(
        (
            (pl.col("error").is_not_null() & (pl.col("error") != "EAGAIN"))
            | pl.col("came_to_nothing").is_not_null()
        )
        & (pl.col("kind") != "udp")
        & ~pl.col("remote").str.contains(_OPTIONAL_PATHS).fill_null(value=False)
    )
    spoken = (
        drafts.filter((pl.col("kind") == "client") & pl.col("protocol").is_not_null())
        .select("remote", "remote_port", "protocol")
        .unique(["remote", "remote_port"], keep="first", maintain_order=True)
    )
    reason = pl.col("error").replace_strict(REASONS, default=None)
    rows = failed.join(
        spoken,
        on=["remote", "remote_port"],
        how="left",
        nulls_equal=True,
        maintain_order="left",
    ).with_columns(
        reason=pl.when(pl.col("came_to_nothing").is_not_null())
        .then("came_to_nothing")
        .when(reason.is_null())
        .then("error")
        .otherwise(pl.format("{}: {}", "error", reason))
    )
    rows = add_services(rows, services, "start_ns")
    where = (
        pl.when(pl.col("remote_port").is_null())
        .then("remote")
        .otherwise(pl.format("{} port {}", "remote", "remote_port"))
    )
    return fill(
        rows.select(
            "tgid",
            "tid",
            "context",
            "fd",
            "service",
            "protocol",
            "start_ns",
            "until_ns",
            "remote",
            "remote_port",
            kind=pl.lit("client"),
            sent_ns="start_ns",
            asked_ns="start_ns",
            operation=pl.lit("connect"),
            detail=pl.format("connect {}", where),
            status="error",
            error="reason",
            state=pl.lit("no_response"),
            # tells apart what began in the same moment
            begin=pl.col("inode") * 2**16
            + pl.col("fd").fill_null(2**16 - 1).clip(0, 2**16 - 1).cast(pl.UInt64),
        ),
        first_row=len(drafts),
    )


def fill(columns: pl.DataFrame, *, first_row: int) -> pl.DataFrame:
    """Drafts from some of their columns; the others are null, zero or false."""
    defaults = {
        "context": 0,
        "response_tid": 0,
        "miss": False,
        "request_bytes": 0,
        "response_bytes": 0,
        "exact": False,
        "request_head": -1,
        "response_head": -1,
        "begin": 0,
        "stream": 0,
    }
    missing = [name for name in DRAFT if name not in columns.columns and name != "row"]
    return columns.with_columns(
        pl.lit(defaults.get(name), dtype=DRAFT[name]).alias(name) for name in missing
    ).select(
        (
            pl.int_range(first_row, first_row + pl.len()).alias("row")
            if name == "row"
            else pl.col(name)
        ).cast(dtype)
        for name, dtype in DRAFT.items()
    )


def find_faults(
    drafts: pl.DataFrame,
    matched: pl.DataFrame,
    processes: pl.DataFrame,
    servers: pl.DataFrame,
    services: pl.DataFrame,
    connections: pl.DataFrame,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Add a draft for each process that a signal ended, or whose end others felt.

    Returns the drafts, and links from these faults to the requests that failed because of them: the
    process that had the other end of the connection ended; or nobody listens any more where
    it did.
    """
    exits = (
        processes.filter(pl.col("event") == "exit")
        .select("tgid", "exit_code", "signal_name", exit_ns="time_ns")
        .sort("exit_ns", "tgid", "signal_name", "exit_code", nulls_last=True)
        .unique(["tgid", "exit_ns"], keep="first", maintain_order=True)
    )
    failed = drafts.filter(
        (pl.col("kind") == "client")
        & (pl.col("state") == "no_response")
        & pl.col("error").is_not_null()
    ).select(
        "row",
        "connection",
        "remote",
        "remote_port",
        "until_ns",
        grace_ns=_grace_ns(),
    )
    tgids = drafts.select("row", "tgid", "connection")
    others = (
        matched.join(tgids.select(cause="row", connection="connection"), on="cause")
        .join(tgids.select(effect="row", server_tgid="tgid"), on="effect")
        .select("connection", "server_tgid")
        .sort("connection", "server_tgid")
        .unique("connection", keep="first", maintain_order=True)
    )
    by_connection = failed.join(others, on="connection").select(
        "row", "until_ns", "grace_ns", "server_tgid"
    )
    listened = failed.join(by_connection, on="row", how="anti").join(
        servers.select("netns", remote="address", remote_port="port", server_tgid="tgid"),
        on=["remote", "remote_port"],
        nulls_equal=True,
    )
    # the same loopback address is another place in another network namespace
    own = namespaces(drafts, connections).rename({"netns": "own"})
    listened = listened.join(own, on="row", how="left").filter(
        pl.col("own").is_null() | pl.col("netns").is_null() | (pl.col("own") == pl.col("netns"))
    )
    felt = (
        pl.concat([by_connection, listened.select("row", "until_ns", "grace_ns", "server_tgid")])
        .join(exits, left_on="server_tgid", right_on="tgid", how="left")
        .with_columns(
            gone=(pl.col("exit_ns") <= pl.col("until_ns") + pl.col("grace_ns")).fill_null(
                value=False
            )
        )
    )
    born = (
        processes.filter(pl.col("event") == "fork")
        .group_by("tgid")
        .agg(born_ns=pl.col("time_ns").min())
    )
    felt = felt.join(born, left_on="server_tgid", right_on="tgid", how="left").filter(
        # one that was started again only later was not there
        pl.col("born_ns").is_null() | (pl.col("born_ns") <= pl.col("until_ns"))
    )
    # while one process that served the address is there, another one's end explains nothing
    felt = (
        felt.filter(pl.col("gone").all().over("row"))
        .sort("exit_ns", "server_tgid")
        .unique("row", keep="last", maintain_order=True)
        .select("row", "exit_ns", tgid="server_tgid")
    )
    # an end that was asked for is a fault only to who felt it
    shown = exits.filter(pl.col("signal_name").is_not_null() & ~pl.col("signal_name").is_in(_ASKED))
    shown = pl.concat([shown, exits.join(felt, on=["tgid", "exit_ns"], how="semi")]).unique(
        ["tgid", "exit_ns"], maintain_order=True
    )
    what = (
        pl.when(pl.col("signal_name").is_not_null())
        .then(pl.format("killed by {}", "signal_name"))
        .otherwise(pl.format("exited with code {}", "exit_code"))
    )
    faults = fill(
        add_services(shown, services, "exit_ns").select(
            "tgid",
            "service",
            kind=pl.lit("fault"),
            tid="tgid",
            operation=what,
            detail=pl.format("process {} {}", "tgid", what),
            start_ns="exit_ns",
            sent_ns="exit_ns",
            asked_ns="exit_ns",
            end_ns="exit_ns",
            until_ns="exit_ns",
            status=pl.coalesce("signal_name", pl.col("exit_code").cast(pl.String)),
            error=what,
            state=pl.lit("complete"),
        ),
        first_row=len(drafts),
    )
    ended = faults.select("tgid", exit_ns="start_ns", cause="row")
    links = link(
        felt.join(ended, on=["tgid", "exit_ns"]).rename({"row": "effect"}),
        "caused_by",
        "derived",
        "the process at the other end had ended",
        parent=False,
    )
    # what the process itself was working on
    cut = (
        drafts.filter(
            pl.col("kind").is_in(["server", "consumer"])
            & pl.col("state").is_in(["open", "no_response"])
        )
        .join(ended, on="tgid")
        .filter(
            (pl.col("sent_ns") <= pl.col("exit_ns")) & (pl.col("exit_ns") <= pl.col("until_ns"))
        )
        .sort("row", "exit_ns")
        .unique("row", keep="first", maintain_order=True)
    )
    inside = link(
        cut.rename({"row": "effect"}), "caused_by", "exact", "its own process ended", parent=False
    )
    died = cut.select("row", died_ns="exit_ns")
    drafts = (
        drafts.join(died, on="row", how="left", maintain_order="left")
        .with_columns(
            until_ns=pl.coalesce("died_ns", "until_ns"),
            error=pl.when(pl.col("died_ns").is_not_null())
            .then(pl.lit("its process ended before it was done"))
            .otherwise("error"),
            state=pl.when(pl.col("died_ns").is_not_null())
            .then(pl.lit("no_response"))
            .otherwise("state"),
        )
        .drop("died_ns")
    )
    return pl.concat([drafts, faults]), pl.concat([links, inside])


def _grace_ns() -> pl.Expr:
    """How much later a cause may be seen: who had given up felt nothing of what came after that."""
    return pl.when(pl.col("error").is_in(_GIVEN_UP)).then(0).otherwise(_SAME_MOMENT_NS)


def blame(drafts: pl.DataFrame, links: pl.DataFrame) -> pl.DataFrame:
    """Links from failures to what failed because of them.

    A request that failed points to the last call within it that failed, unless a later one to the
    same peer succeeded; if it went on to call others with success, that is a guess. A call whose
    server failed points to the server's span. Guessed parents blame nobody. `drafts` have their
    `peer`.
    """
    wrong = drafts.filter(pl.col("error").is_not_null()).select(
        "row", "kind", "until_ns", "end_ns", grace_ns=_grace_ns()
    )
    pairs = (
        links.filter(pl.col("parent") & (pl.col("evidence") != "guess"))
        .join(wrong.select("grace_ns", cause="row", above="kind", above_ns="until_ns"), on="cause")
        .join(
            wrong.select(effect="row", below="kind", below_ns="until_ns", answered="end_ns"),
            on="effect",
        )
    )
    # a call that was made again and succeeded is not why
    again = links.filter(pl.col("parent")).join(
        drafts.filter((pl.col("kind") == "client") & pl.col("error").is_null()).select(
            "peer", effect="row", again_ns="start_ns"
        ),
        on="effect",
    )
    went_on = again.group_by("cause").agg(on_ns=pl.col("again_ns").max())
    again = again.group_by("cause", "peer").agg(pl.col("again_ns").max())
    within = (
        pairs.filter(
            pl.col("above").is_in(["server", "consumer"])
            & (pl.col("below") == "client")
            & (pl.col("below_ns") <= pl.col("above_ns"))
        )
        .join(drafts.select("peer", effect="row"), on="effect")
        .join(again, on=["cause", "peer"], how="left", nulls_equal=True)
        .filter(pl.col("again_ns").is_null() | (pl.col("again_ns") < pl.col("below_ns")))
        .sort("below_ns", "effect")
        .unique("cause", keep="last", maintain_order=True)
        .join(went_on, on="cause", how="left")
    )
    # what failed below is the cause of what failed above
    turned = {"cause": "effect", "effect": "cause"}
    went_on_well = pl.col("on_ns") > pl.col("below_ns")
    within = link(
        within.rename(turned),
        "caused_by",
        pl.when(went_on_well).then(pl.lit("guess")).otherwise(pl.lit("derived")),
        "the last call that failed within it",
        parent=False,
    )
    # what became of it there after its client had given up is no cause
    answered = pl.col("answered").is_not_null()
    passed_on = pairs.filter(
        (pl.col("above") == "client")
        & (pl.col("below") == "server")
        & (pl.col("below_ns") <= pl.col("above_ns") + pl.col("grace_ns"))
    )
    passed_on = link(
        passed_on.rename(turned),
        "caused_by",
        pl.when(answered).then(pl.lit("exact")).otherwise(pl.lit("derived")),
        pl.when(answered)
        .then(pl.lit("the response that it got"))
        .otherwise(pl.lit("what became of its request there")),
        parent=False,
    )
    return pl.concat([within, passed_on])
