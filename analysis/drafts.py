"""Spans while they are made: exchanges with what their payloads say, known by a row number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import polars as pl

from scope_ebpf.analysis.services import add_services

# Columns of a draft beside those of SPANS that do not need other rows. `row`: its number. `kind`:
# also `delivery`, what a server pushed to a subscriber, which becomes no span of its own.
# `context`, `owned`: as contexts.own_requests gives them.
# `asked_ns`: when the request's last bytes moved. `end_ns`: null without a response. `until_ns`: end
# of the span, whatever ended it. `head` of the request and the response: rows in the heads.
DRAFT: Final = pl.Schema(
    {
        "row": pl.Int64(),
        "kind": pl.String(),
        "tgid": pl.UInt32(),
        "tid": pl.UInt32(),
        "context": pl.UInt64(),
        "owned": pl.UInt32(),
        "response_tid": pl.UInt32(),
        "service": pl.String(),
        "protocol": pl.String(),
        "operation": pl.String(),
        "detail": pl.String(),
        "start_ns": pl.Int64(),
        "sent_ns": pl.Int64(),
        "asked_ns": pl.Int64(),
        "end_ns": pl.Int64(),
        "until_ns": pl.Int64(),
        "status": pl.String(),
        "error": pl.String(),
        "miss": pl.Boolean(),
        "connection": pl.UInt32(),
        "fd": pl.Int64(),
        "request_bytes": pl.Int64(),
        "response_bytes": pl.Int64(),
        "state": pl.String(),
        "stream": pl.UInt64(),
        "begin": pl.UInt64(),
        "exact": pl.Boolean(),
        "eof_ns": pl.Int64(),
        "queue_action": pl.String(),
        "queue": pl.String(),
        "element": pl.String(),
        "response_queue": pl.String(),
        "response_element": pl.String(),
        "defines": pl.String(),
        "uses": pl.String(),
        "request_head": pl.Int64(),
        "response_head": pl.Int64(),
        "remote": pl.String(),
        "remote_port": pl.UInt16(),
    }
)


def draft_spans(
    exchanges: pl.DataFrame,
    requests: pl.DataFrame,
    responses: pl.DataFrame,
    connections: pl.DataFrame,
    services: pl.DataFrame,
    protocols: Sequence[str],
    ended_ns: int,
) -> pl.DataFrame:
    """One draft per exchange, with what its request and response say; all three have equal rows.

    Exchanges of no known protocol are kept where they are whole and went over TCP; of local sockets
    without one there is too much that asks nothing, such as logs and wakeups.
    """
    names = pl.Series(protocols, dtype=pl.String)
    number = exchanges["protocol"].cast(pl.Int64)
    spoken = names.gather(number.set(number < 0, None))
    # requests that came in one message are one span, and it says so
    more = requests["requests"].fill_null(1).cast(pl.Int64) - 1
    piped = pl.Series(more > 0) & (spoken == "http").fill_null(value=False)
    answered = requests["answered"].fill_null(value=True)
    told = exchanges.with_columns(
        protocol=spoken,
        operation=pl.when(piped)
        .then(pl.format("{} and {} more", requests["operation"], more))
        .otherwise(requests["operation"]),
        detail=requests["detail"],
        answered=answered,
        queue_action=requests["queue_action"].cast(pl.String),
        queue=requests["queue"],
        element=requests["element"],
        defines=pl.coalesce(requests["defines"], responses["defines"]),
        uses=requests["uses"],
        # what comes although no answer was asked for is the answer to something behind it
        status=pl.when(answered).then(responses["status"]),
        error=pl.when(answered).then(responses["error"]),
        miss=responses["miss"].fill_null(value=False) & answered,
        response_queue=responses["queue"],
        response_element=responses["element"],
    )
    remote = connections.select(
        "connection",
        pl.coalesce("remote_address", "remote_path").alias("remote"),
        "remote_port",
        carrier="kind",
    )
    told = told.join(
        remote.unique("connection", keep="last"), on="connection", how="left", maintain_order="left"
    )
    told = add_services(told, services, "start_ns")
    whole_tcp = (pl.col("carrier") == "tcp") & pl.col("end_ns").is_not_null() & ~pl.col("orphan")
    told = told.filter(pl.col("protocol").is_not_null() | (whole_tcp & ~pl.col("delivery")))
    kind = (
        pl.when("delivery")
        .then(pl.lit("delivery"))
        .when("client")
        .then(pl.lit("client"))
        .otherwise(pl.lit("server"))
    )
    state = (
        pl.when("orphan")
        .then(pl.lit("began_before"))
        .when(pl.col("end_ns").is_not_null())
        .then(pl.lit("complete"))
        .when(~pl.col("answered"))
        .then(pl.lit("one_way"))
        .when(pl.col("eof_ns").is_not_null())
        .then(pl.lit("no_response"))
        .otherwise(pl.lit("open"))
    )
    return (
        told.with_columns(kind=kind, state=state, sent_ns="start_ns")
        .with_columns(until_ns=until(ended_ns))
        .with_row_index("row")
        .select(pl.col(name).cast(dtype) for name, dtype in DRAFT.items())
    )


def until(ended_ns: int) -> pl.Expr:
    """When a span ended, from `state`, `end_ns`, `asked_ns`, `eof_ns`."""
    return (
        pl.when(pl.col("end_ns").is_not_null())
        .then("end_ns")
        .when(pl.col("state") == "one_way")
        .then("asked_ns")
        .when(pl.col("eof_ns").is_not_null())
        .then("eof_ns")
        .otherwise(pl.max_horizontal(pl.lit(ended_ns), "start_ns"))
    )


def resolve_statements(drafts: pl.DataFrame) -> pl.DataFrame:
    """Give executions of prepared statements the SQL that their connection had prepared by then."""
    uses = drafts.filter(pl.col("uses").is_not_null())
    if uses.is_empty():
        return drafts
    defined = (
        drafts.filter(pl.col("defines").is_not_null() & pl.col("detail").is_not_null())
        .select("connection", "start_ns", uses="defines", text="operation", whole="detail")
        .sort("start_ns")
    )
    found = (
        uses.select("row", "connection", "uses", "start_ns")
        .sort("start_ns")
        .join_asof(
            defined,
            on="start_ns",
            by=["connection", "uses"],
            allow_exact_matches=False,
            check_sortedness=False,
        )
        .drop_nulls("whole")
        .select("row", "text", "whole")
    )
    return (
        drafts.join(found, on="row", how="left", maintain_order="left")
        .with_columns(
            operation=pl.coalesce("text", "operation"), detail=pl.coalesce("whole", "detail")
        )
        .drop("text", "whole")
    )
