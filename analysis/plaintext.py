"""Plain text of TLS connections, tied to the connection that carried it as ciphertext.

OpenSSL is given sockets in two ways. With a socket BIO (Python's blocking ssl, nginx, libpq, libcurl) it
reads and writes the socket itself, within SSL_read and SSL_write. With a memory BIO (asyncio, uvloop) it
only turns bytes into bytes: the program receives before SSL_read and sends after SSL_write. Either way the
same thread touches the socket next to the call, and that says which connection an SSL object is for.
"""

from __future__ import annotations

from typing import Literal

import polars as pl

AsofJoinStrategy = Literal["backward", "forward"]

# What ciphertext is longer than its plain text, at least: a record's header and a tag, or a MAC.
RECORD_OVERHEAD_BYTES = 5 + 16
FLOW = ["tgid", "tid"]
SESSION = ["tgid", "ssl"]
# What the plain text takes over from the message that carried its last byte.
CARRIED = ["fd", "stream", "stream_end", "exact"]
ENDS = ["kind", "local_address", "local_port", "local_path"]
ENDS += ["remote_address", "remote_port", "remote_path"]


def tie_to_connections(tls: pl.DataFrame | pl.LazyFrame, messages: pl.DataFrame) -> pl.DataFrame:
    """The rows of `tls` as rows of `messages`, with the connection that carried each.

    Args:
        tls: `Recording.tls`, in any order.
        messages: `Recording.messages`, in any order; those of other threads do not matter.

    Returns:
        One row per row of `tls`, sorted by `start_ns`, with the columns of `messages` and three more.

        - `start_ns`, `duration_ns`, `tgid`, `tid`, `context`, `direction`, `turn`, `length_bytes`,
          `payload`, `cpu`: of the plain text; `name`: `SSL_read` or `SSL_write`; `number`: null
          What was sent has the `context` of the message that carried it: a change shows there first
        - `connection`, its ends, and `stream`; null if it is not known
        - `stream_end`, `fd`, `exact`: of the ciphertext message that carried the last byte, as far as
          can be told; null if there is none
        - `ssl`: as in `tls`; `tls`: true; `untied`: why the connection is not known, else null
    """
    rows = tls.lazy().collect().sort("start_ns", maintain_order=True).with_row_index("row")
    rows = rows.with_columns(end_ns=pl.col("start_ns") + pl.col("duration_ns"))
    moved = _messages_of(rows, messages)
    settled = _settle(_vote(rows, moved), moved)
    ends = moved.unique("connection", keep="last", maintain_order=True).select("connection", *ENDS)
    carried = _carriers(settled, moved)
    sent = pl.col("direction").cast(pl.String) == "send"
    return (
        settled.join(carried, on="row", how="left", maintain_order="left")
        .with_columns(pl.when(sent).then(pl.coalesce("carried_in", "context")).otherwise("context"))
        .join(ends, on="connection", how="left", maintain_order="left")
        .with_columns(
            _streams_of(moved, settled),
            pl.lit(True).alias("tls"),
            pl.lit(False).alias("peek"),
            pl.lit("complete").cast(messages.schema["status"]).alias("status"),
            pl.lit(None).cast(messages.schema["number"]).alias("number"),
            pl.when(pl.col("direction").cast(pl.String) == "receive")
            .then(pl.lit("SSL_read"))
            .otherwise(pl.lit("SSL_write"))
            .alias("name"),
            _why_untied(moved),
        )
        .select(
            *(
                pl.col(name).cast(dtype)
                for name, dtype in messages.schema.items()
                if name != "name"
            ),
            "name",
            "ssl",
            "tls",
            "untied",
        )
        .select(*messages.columns, "ssl", "tls", "untied")
    )


def _messages_of(rows: pl.DataFrame, messages: pl.DataFrame) -> pl.DataFrame:
    """The messages that may have carried TLS: of these threads, on sockets, in order."""
    return (
        messages.filter(
            pl.col("kind").is_in(["tcp", "unix"]) & ~pl.col("peek") & (pl.col("length_bytes") > 0)
        )
        .join(rows.select(FLOW).unique(), on=FLOW, how="semi")
        .select(
            *("start_ns", *FLOW, "direction", "length_bytes", "connection", *CARRIED, *ENDS),
            carried_in="context",
        )
        .with_columns(pl.col("direction").cast(pl.String))
        .sort("start_ns", maintain_order=True)
    )


def _vote(rows: pl.DataFrame, moved: pl.DataFrame) -> pl.DataFrame:
    """Adds `vote`, the connection that each row speaks for, and `socket`: its SSL object has a socket."""
    rows = rows.with_columns(pl.col("direction").cast(pl.String))
    # the last message that began before the call ended; and for what is sent after it, the next one
    before = _nearest(rows, moved, "end_ns", "backward", "before")
    after = _nearest(rows, moved, "end_ns", "forward", "after")
    found = rows.join(before, on="row", how="left").join(after, on="row", how="left").sort("row")
    inside = pl.col("before_start_ns") >= pl.col("start_ns")
    found = found.with_columns(inside.fill_null(False).alias("inside"))
    found = found.with_columns(pl.col("inside").any().over(SESSION).alias("socket"))
    receive = pl.col("direction") == "receive"
    # another SSL object's reads lie between: what was received last was for that one
    same = _same_reader(found)
    found = found.join(same, on="row", how="left", maintain_order="left").with_columns(
        pl.when("inside")
        .then("before_connection")
        .when(~pl.col("socket") & receive & pl.col("same_reader"))
        .then("before_connection")
        .alias("vote")
    )
    heard = pl.col("vote").is_not_null().any().over(SESSION)
    fits = pl.col("after_length_bytes") >= pl.col("length_bytes") + RECORD_OVERHEAD_BYTES
    # Sends may be put off and so come after those of others: they are asked if nothing was received.
    return found.with_columns(
        pl.when(heard | receive | pl.col("socket") | ~fits)
        .then("vote")
        .otherwise("after_connection")
        .alias("vote")
    ).drop("before_start_ns", "before_length_bytes", "before_connection", "same_reader", "inside")


def _nearest(
    rows: pl.DataFrame, moved: pl.DataFrame, at: str, strategy: AsofJoinStrategy, prefix: str
) -> pl.DataFrame:
    """Per row the nearest message of its thread in its direction before or after a moment."""
    return (
        rows.select("row", *FLOW, "direction", at)
        .sort(at)
        .join_asof(
            moved.select("start_ns", *FLOW, "direction", "length_bytes", "connection"),
            left_on=at,
            right_on="start_ns",
            by=[*FLOW, "direction"],
            strategy=strategy,
            coalesce=False,
            check_sortedness=False,
        )
        .select(
            "row",
            pl.col("start_ns").alias(f"{prefix}_start_ns"),
            pl.col("length_bytes").alias(f"{prefix}_length_bytes"),
            pl.col("connection").alias(f"{prefix}_connection"),
        )
    )


def _same_reader(found: pl.DataFrame) -> pl.DataFrame:
    """Whether a row's SSL object is the first that read in its thread after the row's last receive."""
    return found.filter(pl.col("direction") == "receive").select(
        "row",
        (pl.col("ssl") == pl.col("ssl").first().over([*FLOW, "before_start_ns"])).alias(
            "same_reader"
        ),
    )


def _settle(found: pl.DataFrame, moved: pl.DataFrame) -> pl.DataFrame:
    """Adds `connection`: what an SSL object's rows agree on, from one use of its address to the next."""
    found = found.sort(*SESSION, "row").with_columns(_without_strays(found).alias("vote"))
    first_seen = moved.group_by("tgid", "connection").agg(pl.col("start_ns").min().alias("seen_ns"))
    found = found.with_columns(
        pl.col("vote").forward_fill().over(SESSION).alias("earlier"),
        pl.col("vote").backward_fill().over(SESSION).alias("later"),
    ).join(
        first_seen,
        left_on=["tgid", "later"],
        right_on=["tgid", "connection"],
        how="left",
        maintain_order="left",
    )
    # The address belongs to the later connection as soon as that was there: its handshake came first.
    begun = pl.col("seen_ns") <= pl.col("start_ns")
    return (
        found.with_columns(
            pl.when(pl.col("vote").is_not_null())
            .then("vote")
            .when(pl.col("earlier").is_null() | (pl.col("later").is_not_null() & begun))
            .then("later")
            .otherwise("earlier")
            .alias("connection")
        )
        .drop("vote", "earlier", "later", "seen_ns")
        .sort("row")
    )


def _without_strays(found: pl.DataFrame) -> pl.Series:
    """The votes without single ones whose neighbours agree on something else, by session and row."""
    votes = found.sort(*SESSION, "row").select("row", *SESSION, "vote")
    given = votes.filter(pl.col("vote").is_not_null()).with_columns(
        pl.col("vote").shift(1).over(SESSION).alias("left"),
        pl.col("vote").shift(-1).over(SESSION).alias("right"),
    )
    stray = (pl.col("left") == pl.col("right")) & (pl.col("vote") != pl.col("left"))
    kept = given.filter(~stray.fill_null(False)).select("row", "vote")
    return votes.select("row").join(kept, on="row", how="left", maintain_order="left")["vote"]


def _carriers(settled: pl.DataFrame, moved: pl.DataFrame) -> pl.DataFrame:
    """Per row the ciphertext message of its connection that carried its last byte.

    The last one until the call ended; what a memory BIO wrote is sent after it.
    """
    by = [*FLOW, "direction", "connection"]
    carriers = moved.select("start_ns", *by, *CARRIED, "carried_in")
    later = ~pl.col("socket") & (pl.col("direction") == "send")
    tied = settled.filter(pl.col("connection").is_not_null()).sort("end_ns")
    sides: list[tuple[pl.Expr, AsofJoinStrategy]] = [(later, "forward"), (~later, "backward")]
    return pl.concat(
        tied.filter(chosen)
        .select("row", "end_ns", *by)
        .join_asof(
            carriers,
            left_on="end_ns",
            right_on="start_ns",
            by=by,
            strategy=strategy,
            check_sortedness=False,
        )
        .select("row", *CARRIED, "carried_in")
        for chosen, strategy in sides
    )


def _streams_of(moved: pl.DataFrame, settled: pl.DataFrame) -> pl.Series:
    """The stream of each row's connection in its direction, also where no message carried it."""
    streams = moved.filter(pl.col("stream").is_not_null()).unique(
        ["connection", "direction"], keep="last", maintain_order=True
    )
    return settled.select("connection", "direction").join(
        streams.select("connection", "direction", "stream"),
        on=["connection", "direction"],
        how="left",
        maintain_order="left",
    )["stream"]


def _why_untied(moved: pl.DataFrame) -> pl.Expr:
    """The reason why a row has no connection."""
    seen = moved.select(pl.struct(FLOW).unique()).to_series()
    return (
        pl.when(pl.col("connection").is_not_null())
        .then(None)
        .when(pl.struct(FLOW).is_in(seen.implode()))
        .then(pl.lit("no message of its thread belongs to it"))
        .otherwise(pl.lit("its thread has no messages"))
        .alias("untied")
    )
