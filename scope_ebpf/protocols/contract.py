"""What a protocol must tell about payload heads; each protocol is one module with one `PROTOCOL`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.heads import Heads

Roles = NDArray[np.uint8]
Kept = NDArray[np.bool_]


class Role(IntEnum):
    """What a message is in its protocol."""

    NONE = 0
    """not of this protocol, as far as its bytes tell"""
    REQUEST = 1
    RESPONSE = 2


QUEUE_ACTION: Final = pl.Enum(["push", "pop", "publish", "subscribe"])

REQUEST_SCHEMA: Final = pl.Schema(
    {
        # What was asked for, without what differs from one request to the next: `GET /users/{id}`,
        # `SELECT name FROM users WHERE id = ?`, `GET product:?`. Few different ones.
        "operation": pl.String(),
        # The same as it was sent, as far as the head goes: `GET /users/17?full=1`, the SQL text.
        "detail": pl.String(),
        # How many requests this message holds (pipelines); at least 1.
        "requests": pl.UInt32(),
        # Whether the other end answers it. No: PostgreSQL's Terminate, memcached's noreply.
        "answered": pl.Boolean(),
        # Whether the answer may wait for somebody else on purpose: BLPOP, SUBSCRIBE, XREAD BLOCK.
        "waits": pl.Boolean(),
        # What it does to a queue or channel, whose name is `queue`; null: nothing.
        "queue_action": QUEUE_ACTION,
        "queue": pl.String(),
        # The element that is pushed or published, if the head holds all of it.
        "element": pl.String(),
        # Prepared statements: the name that this message gives to the SQL in `detail`, or the name
        # of the one that it executes without its text. An empty name is a name, too.
        "defines": pl.String(),
        "uses": pl.String(),
    }
)

RESPONSE_SCHEMA: Final = pl.Schema(
    {
        # As the protocol says it: `200`, `OK`, a SQLSTATE, `nil`, `NXDOMAIN`.
        "status": pl.String(),
        # Why it failed, for people; null: it did not. HTTP: 500 and above. SQL: any error.
        "error": pl.String(),
        # The cache or table had nothing: Redis nil, memcached END without VALUE.
        "miss": pl.Boolean(),
        # Another response to the same request follows: HTTP 1xx other than 101.
        "interim": pl.Boolean(),
        # The queue and the element that came out of it, as far as the head holds all of it.
        "queue": pl.String(),
        "element": pl.String(),
        # The name that the server gave to the statement that was just prepared (MySQL).
        "defines": pl.String(),
        # State of the transaction after it, as PostgreSQL says it: I (none), T (in one), E (failed).
        "transaction": pl.String(),
    }
)


@dataclass(frozen=True)
class Protocol:
    """One protocol. All functions are vectorised: they get many heads and answer for each.

    Heads are of any bytes: truncated, from the middle of a stream, garbage. No function may raise.
    """

    name: str
    """Lower case, as it is shown: http, postgresql, redis, mysql, memcached, dns."""

    recognise: Callable[[Heads], Roles]
    """`Role` of each head, uint8. From the bytes alone, and with fewer than 1 false claim in 10,000
    random heads. NONE is no shame: a connection is known by the heads that are recognised."""

    keep: Callable[[Heads, Roles], Kept]
    """Which bytes may be stored although payloads are redacted: one boolean for each byte of
    `heads.data`. Kept: what the protocol's own grammar needs (verbs, lengths, message types, SQL
    keywords and names, queue names); not kept: literals, values, query strings, bodies. Bytes
    that are not kept are masked in place, so lengths never change, and a masked head is
    recognised and parsed as the head itself would be, but for the masked parts."""

    parse_requests: Callable[[Heads], pl.DataFrame]
    """Columns of REQUEST_SCHEMA, one row per head; all heads are of requests of this protocol.
    Also from masked heads. A field that the head does not tell is null."""

    parse_responses: Callable[[Heads], pl.DataFrame]
    """Columns of RESPONSE_SCHEMA, likewise."""

    datagrams: bool = False
    """Spoken over UDP, where each message stands alone."""

    recognise_and_keep: Callable[[Heads], tuple[Roles, Kept]] | None = None
    """What `recognise` and `keep` say, in one look at the heads, where that is faster than two.
    Nothing is kept of heads that are not recognised."""
