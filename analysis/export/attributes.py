"""Attributes of spans by OpenTelemetry's semantic conventions (1.37).

https://opentelemetry.io/docs/specs/semconv/: http, db, messaging, network, server, url, error. What
they have no name for begins with `scope.`.
"""

from __future__ import annotations

import ipaddress
from typing import Final

import polars as pl

_DATABASES: Final = ["postgresql", "mysql", "redis", "memcached"]
_SQL: Final = ["postgresql", "mysql"]
_TRANSPORTS: Final = ["tcp", "udp", "unix", "pipe"]
# Others would make the number of different values endless: they are _OTHER.
_METHODS: Final = [
    "CONNECT",
    "DELETE",
    "GET",
    "HEAD",
    "OPTIONS",
    "PATCH",
    "POST",
    "PUT",
    "QUERY",
    "TRACE",
]


def attribute_columns() -> list[pl.Expr]:
    """One column per attribute, under its name; null: the span does not have it.

    They are made of the columns of `analysis.schema.SPANS` (enums as text), `transport`, `remote`
    and `remote_port` of the span's connection, and the columns of `peer_addresses`. Integers are
    Int64, as attributes are.
    """
    protocol, status, error = pl.col("protocol"), pl.col("status"), pl.col("error")
    http = (protocol == "http").fill_null(False)
    database = protocol.is_in(_DATABASES).fill_null(False)
    columns = {
        "thread.id": pl.col("tid").cast(pl.Int64),
        **_http(http, status),
        # Databases, and caches, which are databases to the conventions.
        "db.system.name": _when(database, protocol),
        "db.operation.name": _when(database, _verb().str.to_uppercase()),
        "db.query.summary": _when(database, pl.col("operation")),
        "db.query.text": _when(database, pl.col("detail")),
        "db.response.status_code": _when(protocol.is_in(_SQL) & error.is_not_null(), status),
        "messaging.system": _when(pl.col("kind") == "consumer", protocol),
        "messaging.operation.type": _when(pl.col("kind") == "consumer", pl.lit("process")),
        **_peer(),
        "network.protocol.name": _when(~database, protocol),
        "error.type": _when(error.is_not_null(), pl.coalesce(status, pl.lit("_OTHER"))),
        "scope.edge": pl.col("edge"),
        "scope.evidence": pl.col("evidence"),
        "scope.state": pl.col("state"),
        "scope.fault": _when(pl.col("kind") == "fault", pl.lit(True)),
        # 64 bits without a sign fit no integer attribute.
        "scope.context": _when(pl.col("context") != 0, pl.format("{}", pl.col("context"))),
        "scope.cache_miss": _when(pl.col("miss"), pl.lit(True)),
        "scope.status": _when(~http, status),
        "scope.detail": _when(~http & ~database, pl.col("detail")),
        "scope.request_bytes": _when(~http, pl.col("request_bytes")),
        "scope.response_bytes": _when(~http, pl.col("response_bytes")),
    }
    return [value.alias(name) for name, value in columns.items()]


def peer_addresses(peers: pl.Series) -> pl.DataFrame:
    """Tells services from addresses among the values of `peer`.

    One row per value: `peer`, `peer_service`, `peer_address`, `peer_port`.

    >>> peer_addresses(pl.Series(["db", "10.0.0.7:5432"])).rows()
    [('10.0.0.7:5432', None, '10.0.0.7', 5432), ('db', 'db', None, None)]
    """
    names = peers.drop_nulls().unique().sort().to_list()
    rows = [(name, *_split_address(name)) for name in names]
    schema = {
        "peer": pl.String,
        "peer_service": pl.String,
        "peer_address": pl.String,
        "peer_port": pl.Int64,
    }
    return pl.DataFrame(rows, schema=schema, orient="row")


def _split_address(peer: str) -> tuple[str | None, str | None, int | None]:
    if peer.startswith(("/", "@")):  # a Unix socket
        return None, peer, None
    host, colon, port = peer.rpartition(":")
    numbered = bool(colon) and port.isdecimal() and port.isascii()
    for address, number in ((host, int(port) if numbered else None), (peer, None)):
        if address == host and not numbered:
            continue
        bare = address.removeprefix("[").removesuffix("]")
        try:
            ip = ipaddress.ip_address(bare)
        except ValueError:
            continue
        # Without brackets, 2001:db8::1:80 is an address, not an address and a port.
        if number is None or ip.version == 4 or address != bare:
            return None, bare, number
    return peer, None, None


def _http(http: pl.Expr, status: pl.Expr) -> dict[str, pl.Expr]:
    known = _verb().is_in(_METHODS)
    target = (
        pl.col("detail")
        .str.extract(r"^\S+\s+(\S+)")
        .str.replace(r"^[a-z]+://[^/?]*", "")  # proxies get the whole URL
    )
    # Where values are masked, `?` also begins a token, as in /users/?4f: that one follows
    # punctuation, and the one before a query a name. The root's query has neither: /?page=2.
    of_root = target.str.extract(r"^[^?]*/\?(\??[0-9A-Za-z_\-]*[=&].*)$")
    of_name = target.str.extract(r"^/.*?[0-9A-Za-z_\-]\?(.*)$")
    path = (
        pl.when(of_root.is_not_null())
        .then(target.str.extract(r"^([^?]*/)\?"))
        .when(of_name.is_not_null())
        .then(target.str.extract(r"^(/.*?[0-9A-Za-z_\-])\?"))
        .otherwise(target.str.extract(r"^(/.*)$"))
    )
    method = pl.when(known).then(_verb()).when(_verb().is_not_null()).then(pl.lit("_OTHER"))
    return {
        "http.request.method": _when(http, method),
        "http.request.method_original": _when(http & ~known, _verb()),
        "url.path": _when(http, path),
        "url.query": _when(http, pl.coalesce(of_root, of_name)),
        "url.template": _when(http, pl.col("operation").str.extract(r"^\S+\s+(/\S*)")),
        "http.response.status_code": _when(http, status.cast(pl.Int64, strict=False)),
        "http.request.size": _when(http, pl.col("request_bytes")),
        "http.response.size": _when(http, pl.col("response_bytes")),
    }


def _peer() -> dict[str, pl.Expr]:
    address = pl.coalesce("remote", "peer_address")
    port = pl.when(pl.col("remote").is_null()).then("peer_port").otherwise("remote_port")
    client = pl.col("kind") == "client"
    return {
        "peer.service": pl.col("peer_service"),
        "network.transport": _when(pl.col("transport").is_in(_TRANSPORTS), pl.col("transport")),
        "network.peer.address": address,
        "network.peer.port": port,
        "server.address": _when(client, address),
        "server.port": _when(client, port),
    }


def _verb() -> pl.Expr:
    return pl.col("operation").str.extract(r"^([A-Za-z]+)")


def _when(condition: pl.Expr, value: pl.Expr) -> pl.Expr:
    return pl.when(condition).then(value)
