"""Connections that begin with HTTP and then speak something else: WebSocket, and tunnels of proxies.

RFC 9110, 7.8 (Upgrade, answered with 101) and 9.3.6 (CONNECT, answered with 2xx).
"""

from __future__ import annotations

import numpy as np
import polars as pl

from scope_ebpf.protocols.heads import Heads

_NAME = r"(?i)\nupgrade:[ \t]*([a-z0-9./-]+)"
_MESSAGE = {"websocket": "WebSocket message"}


def name_upgraded(drafts: pl.DataFrame, heads: Heads) -> pl.DataFrame:
    """Give what follows such an answer on its connection the protocol that was agreed on, or none.

    The name is that of the answer's Upgrade header in lower case: `websocket`. A WebSocket has no requests:
    an operation is a run of messages from the client, up to the last ones that come back before
    the next.
    """
    switching = pl.col("status") == "101"
    tunnel = pl.col("operation").str.starts_with("CONNECT ") & pl.col("status").str.starts_with("2")
    agreed = (
        drafts.filter((pl.col("protocol") == "http") & (switching | tunnel).fill_null(value=False))
        .sort("start_ns")
        .unique("connection", keep="first")
        .select("connection", "status", "response_head", agreed_ns="start_ns")
    )
    if agreed.is_empty():
        return drafts
    answers = heads.take(agreed["response_head"].to_numpy().astype(np.intp)).text()
    name = answers.str.extract(_NAME).str.to_lowercase()
    agreed = agreed.select(
        "connection", "agreed_ns", agreed=pl.when(pl.col("status") == "101").then(name)
    )
    after = (pl.col("start_ns") > pl.col("agreed_ns")).fill_null(value=False)
    told = ("operation", "detail", "status", "error")
    return (
        drafts.join(agreed, on="connection", how="left", maintain_order="left")
        .with_columns(
            pl.when(after).then("agreed").otherwise("protocol").alias("protocol"),
            *(pl.when(~after).then(name).alias(name) for name in told),
        )
        .with_columns(
            operation=pl.when(after)
            .then(pl.col("protocol").replace_strict(_MESSAGE, default=None, return_dtype=pl.String))
            .otherwise("operation")
        )
        .drop("agreed", "agreed_ns")
    )
