"""Who is at the other end: by the bytes that it got, else by who is known to serve that address."""

from __future__ import annotations

from typing import Final

import polars as pl

# Mean something in their network namespace only.
_LOOPBACK: Final = r"^(127\.|::1$)"
# Where a datagram socket listens that has no address of its own.
_ANY: Final = ["0.0.0.0", "::"]  # noqa: S104 - nothing is bound here


def known_servers(drafts: pl.DataFrame, connections: pl.DataFrame) -> pl.DataFrame:
    """Who serves which address: `address`, `port`, `netns`, `service`, `tgid`, one row per process.

    From the local ends of connections over which requests were received. A Unix socket's address
    is its path, and its port null. `netns` is null unless the address is a loopback address.
    """
    local = connections.select(
        "connection",
        address=pl.coalesce("local_address", "local_path"),
        port="local_port",
        netns="netns",
    )
    served = drafts.filter(pl.col("kind") == "server").join(local, on="connection")
    return (
        served.filter(pl.col("address").is_not_null())
        .with_columns(netns=pl.when(_of_namespace("address")).then("netns"))
        .select("address", "port", "netns", "service", "tgid", "protocol")
        .unique()
        .sort("address", "port", "netns", "service", "tgid", "protocol", nulls_last=True)
    )


def name_peers(
    drafts: pl.DataFrame, matched: pl.DataFrame, connections: pl.DataFrame, servers: pl.DataFrame
) -> pl.DataFrame:
    """Add `peer`: the other end's service, or its address if nothing of it was recorded.

    A connection has one other end, so what one of its spans tells holds for all of them. An address
    tells a service only where all that are known to serve it are of one.
    """
    ends = drafts.select("row", "connection", "service")
    pairs = matched.join(ends.rename({"row": "cause"}), on="cause").join(
        ends.rename({"row": "effect"}), on="effect", suffix="_other"
    )
    told = (
        pl.concat(
            [
                pairs.select("connection", peer="service_other"),
                pairs.select(connection="connection_other", peer="service"),
            ]
        )
        .sort("connection", "peer", nulls_last=True)
        .unique("connection", keep="first", maintain_order=True)
    )
    namespaced = drafts.join(told, on="connection", how="left", maintain_order="left").join(
        namespaces(drafts, connections), on="row", how="left", maintain_order="left"
    )
    shown = (
        # a client's port says nothing
        pl.when(pl.col("remote_port").is_null() | (pl.col("kind") != "client"))
        .then("remote")
        .when(pl.col("remote").str.contains(":", literal=True))
        .then(pl.format("[{}]:{}", "remote", "remote_port"))
        .otherwise(pl.format("{}:{}", "remote", "remote_port"))
    )
    named = (
        namespaced.join(
            _services_of(servers, ["address", "port", "netns"]).rename({"service": "server"}),
            left_on=["remote", "remote_port", "netns"],
            right_on=["address", "port", "netns"],
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )
        .join(
            _services_of(servers, ["address", "port"]).rename({"service": "everywhere"}),
            left_on=["remote", "remote_port"],
            right_on=["address", "port"],
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )
        .join(
            _services_of(servers.filter(pl.col("address").is_in(_ANY)), ["port"]).rename(
                {"service": "anywhere"}
            ),
            left_on="remote_port",
            right_on="port",
            how="left",
            maintain_order="left",
        )
        .join(_inner_ends(drafts, connections), on="connection", how="left", maintain_order="left")
    )
    server = pl.when(pl.col("kind") == "client").then(
        pl.coalesce(
            "server",
            # a process of which no connection was seen may be in any namespace
            pl.when(pl.col("netns").is_null()).then("everywhere"),
            pl.when(_of_namespace("remote")).then("anywhere"),
        )
    )
    return named.with_columns(peer=pl.coalesce("peer", "inner", server, shown)).drop(
        "netns", "server", "everywhere", "anywhere", "inner"
    )


def namespaces(drafts: pl.DataFrame, connections: pl.DataFrame) -> pl.DataFrame:
    """In which network namespace each draft's loopback address is: `row`, `netns`.

    That of its connection; of a draft that has none, that of its process if it is in one only.
    """
    known = connections.filter(pl.col("netns").is_not_null())
    of_connection = known.select("connection", "netns").unique("connection", keep="last")
    of_process = known.select("tgid", own="netns").unique().unique("tgid", keep="none")
    return (
        drafts.filter(_of_namespace("remote"))
        .select("row", "connection", "tgid")
        .join(of_connection, on="connection", how="left")
        .join(of_process, on="tgid", how="left")
        .select("row", netns=pl.coalesce("netns", "own"))
    )


def _of_namespace(address: str) -> pl.Expr:
    return pl.col(address).str.contains(_LOOPBACK).fill_null(value=False)


def _services_of(servers: pl.DataFrame, place: list[str]) -> pl.DataFrame:
    """The service of each place that has only one."""
    return (
        servers.filter(pl.col("service").is_not_null())
        .select(*place, "service")
        .unique()
        .unique(place, keep="none")
    )


def _inner_ends(drafts: pl.DataFrame, connections: pl.DataFrame) -> pl.DataFrame:
    """By connection: `inner`, the service of the process that has the other end of a Unix socket.

    Pairs of sockets and clients' ends have no path by which they could be named.
    """
    unix = connections.filter(pl.col("kind").str.starts_with("unix"))
    services = drafts.select("tgid", inner="service").drop_nulls().unique()
    # a number that two processes had, one after the other, tells none
    services = services.unique("tgid", keep="none")
    return (
        unix.filter(pl.col("peer_inode").is_not_null())
        .select("connection", inode="peer_inode")
        .join(unix.select("inode", "tgid"), on="inode")
        .unique("connection", keep="none")
        .join(services, on="tgid")
        .select("connection", "inner")
    )
