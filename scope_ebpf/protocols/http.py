"""HTTP/1.0 and HTTP/1.1 (RFC 9110, RFC 9112), from the first bytes of messages.

A request is a line `METHOD target HTTP/1.x`; a response begins `HTTP/1.x` and three digits. HTTP/2
(`PRI * HTTP/2.0`) is another protocol and not claimed. Bytes without either line are NONE: bodies
that go on in further messages. A message may hold more than one request (pipelining), or interim
responses and the final one; `walk` steps from one to the next as far as their framing proves where
the next begins.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols.contract import (
    REQUEST_SCHEMA,
    RESPONSE_SCHEMA,
    Kept,
    Protocol,
    Role,
    Roles,
)
from scope_ebpf.protocols.heads import Bytes, Heads, Numbers
from scope_ebpf.protocols.http_framing import (
    LF,
    LONGEST_METHOD,
    ODD,
    QUERY,
    SPACE,
    Part,
    cut_off,
    goes_on,
    kinds_of,
    line_ends_of,
    next_place,
    padded,
    request_lines,
    status_lines,
    walk,
)
from scope_ebpf.protocols.http_targets import LONG_SECRET_BYTES, operations, secret_bytes

# So many heads at a time that what numpy makes of them stays in a CPU's cache: twice as fast.
_BLOCK: Final = 4096


def _blocks(heads: Heads) -> list[tuple[slice, Heads]]:
    """The heads in blocks, with their rows."""
    blocks = []
    for first in range(0, len(heads), _BLOCK):
        rows = slice(first, first + _BLOCK)
        begins, lengths = heads.begins[rows], heads.lengths[rows]
        data = heads.data[begins[0] : begins[-1] + lengths[-1]]
        blocks.append((rows, Heads(data, begins - begins[0], lengths, heads.totals[rows])))
    return blocks


def recognise(heads: Heads) -> Roles:
    """Role of each head: by a whole request or status line, or one that is cut off by the head."""
    roles = np.zeros(len(heads), np.uint8)
    for rows, block in _blocks(heads):
        data = padded(block.data)
        roles[rows] = _recognise(block, data, np.flatnonzero(data == LF))
    return roles


def recognise_and_keep(heads: Heads) -> tuple[Roles, Kept]:
    """What both say, after one look for lines."""
    roles, kept = [np.zeros(0, np.uint8)], [np.zeros(0, np.bool_)]
    for _, block in _blocks(heads):
        data = padded(block.data)
        newlines = np.flatnonzero(data == LF)
        role = _recognise(block, data, newlines)
        roles.append(role)
        kept.append(_keep(block, role, data, newlines))
    return np.concatenate(roles), np.concatenate(kept)


def _recognise(heads: Heads, data: Bytes, newlines: Numbers) -> Roles:
    roles = np.zeros(len(heads), np.uint8)
    first = data[heads.begins]
    rows = np.flatnonzero((first >= 0x41) & (first <= 0x5A) & (heads.lengths >= 5))
    if not len(rows):
        return roles
    begins = heads.begins[rows]
    ends = begins + heads.lengths[rows]
    roles[rows[status_lines(data, begins, ends)]] = Role.RESPONSE
    rest = np.flatnonzero(roles[rows] == Role.NONE)
    right, _ = request_lines(data, newlines, begins[rest], ends[rest])
    roles[rows[rest[right]]] = Role.REQUEST
    rest = rest[~right]
    cut = cut_off(data, newlines, begins[rest], ends[rest])
    roles[rows[rest[cut]]] = Role.REQUEST
    return roles


def keep(heads: Heads, roles: Roles) -> Kept:
    """Kept: method, path, version, status line, names of headers, and the values of KEPT_HEADERS.

    Masked: the query string, a fragment, user and password in a target, parameters of a path
    (`;jsessionid=`), segments like e-mail addresses and long secrets, other values, and bodies.
    """
    kept = [np.zeros(0, np.bool_)]
    for rows, block in _blocks(heads):
        data = padded(block.data)
        kept.append(_keep(block, roles[rows], data, np.flatnonzero(data == LF)))
    return np.concatenate(kept)


def _keep(heads: Heads, roles: Roles, data: Bytes, newlines: Numbers) -> Kept:
    if not roles.any():
        return np.zeros(len(heads.data), np.bool_)
    kinds = kinds_of(data)
    # Ranges as +1 where one begins and -1 where it ends: their running sum is what is kept.
    steps = np.zeros(len(data) + 1, np.int8)
    marks = np.flatnonzero(kinds >= QUERY)
    queries = marks[(kinds[marks] & QUERY) > 0]
    odd_bytes = marks[(kinds[marks] & ODD) > 0]
    odd_begins: list[Numbers] = []
    odd_ends: list[Numbers] = []
    for part in walk(heads, roles, data, kinds, newlines):
        steps[part.begins] += 1
        steps[part.line_ends] -= 1
        named = part.colons >= 0
        begins, colons = part.header_begins[named], part.colons[named]
        valued = part.header_names[named] > 0
        steps[begins] += 1
        steps[np.where(valued, part.header_ends[named], colons)] -= 1

        asked = roles[part.rows] == Role.REQUEST
        lines = part.begins[asked]
        limits = (heads.begins + heads.lengths)[part.rows[asked]]
        _, ends = request_lines(data, newlines, lines, limits)
        query = next_place(queries, lines, ends)
        steps[query] -= 1
        steps[ends] += 1
        odd = (query - lines >= LONG_SECRET_BYTES) | (next_place(odd_bytes, lines, query) < query)
        lines, query = lines[odd], query[odd]
        space = data[lines[:, None] + np.arange(LONGEST_METHOD + 1)] == SPACE
        odd_begins.append(np.minimum(lines + space.argmax(axis=1) + 1, query))
        odd_ends.append(query)
    kept: Kept = np.cumsum(steps[: len(heads.data)], dtype=np.int8) > 0
    if odd_begins:
        begins = np.concatenate(odd_begins)
        lengths = np.concatenate(odd_ends) - begins
        moved = np.cumsum(lengths) - lengths
        places = np.repeat(begins - moved, lengths) + np.arange(lengths.sum())
        kept[places[secret_bytes(data[places], moved)]] = False
    return kept


def parse_requests(heads: Heads) -> pl.DataFrame:
    """Columns of REQUEST_SCHEMA: `GET /users/{id}` as operation, `GET /users/17?full=1` as detail."""
    data = padded(heads.data)
    newlines = np.flatnonzero(data == LF)
    ends = heads.begins + heads.lengths
    right, target_ends = request_lines(data, newlines, heads.begins, ends)
    lines = Heads(heads.data, heads.begins, target_ends - heads.begins, heads.totals)
    text = (
        lines.take(np.arange(len(lines)))
        .text()
        .str.replace_all("\x7f", "\ufffd", literal=True)
        .rename("detail")
    )
    if not right.all():
        cut = text.str.replace(r"^(\S+ \S+) [!-~]{0,9}\r?$", "${1}")
        text = pl.select(pl.when(pl.Series(right)).then(text).otherwise(cut).alias("detail"))[
            "detail"
        ]
    return (
        pl.DataFrame(
            {"detail": text, "operation": operations(text), "requests": _counts(heads)},
            schema_overrides={"requests": pl.UInt32},
        )
        .with_columns(
            answered=pl.lit(True),
            waits=pl.lit(False),
            **{
                name: pl.lit(None, dtype=REQUEST_SCHEMA[name])
                for name in ("queue_action", "queue", "element", "defines", "uses")
            },
        )
        .select(REQUEST_SCHEMA.names())
        .cast(REQUEST_SCHEMA)
    )


def _counts(heads: Heads) -> NDArray[np.uint32]:
    """How many requests each head holds."""
    counts = np.ones(len(heads), np.uint32)
    rows = np.flatnonzero(goes_on(heads))
    longer = heads.take(rows)
    roles = np.full(len(rows), Role.REQUEST, np.uint8)
    for part in _walked(longer, roles)[1:]:
        counts[rows[part.rows]] += 1
    return counts


def _walked(heads: Heads, roles: Roles) -> list[Part]:
    data = padded(heads.data)
    return walk(heads, roles, data, kinds_of(data), np.flatnonzero(data == LF))


_REASONS: Final = {str(status.value): status.phrase for status in HTTPStatus}


def parse_responses(heads: Heads) -> pl.DataFrame:
    """Columns of RESPONSE_SCHEMA, of the last response in the head: after interim ones, the final."""
    begins = heads.begins.copy()
    ends = heads.begins + heads.lengths
    data = padded(heads.data)
    rows = np.flatnonzero((data[begins + 9] == 0x31) & goes_on(heads))
    longer = heads.take(rows)
    roles = np.full(len(rows), Role.RESPONSE, np.uint8)
    for part in _walked(longer, roles):
        begins[rows[part.rows]] = heads.begins[rows[part.rows]] + (
            part.begins - longer.begins[part.rows]
        )
    line_ends = line_ends_of(data, np.flatnonzero(data == LF), begins, ends)
    text = Heads(heads.data, begins, line_ends - begins, heads.totals).text()
    line = text.str.replace_all("\x7f", "\ufffd", literal=True).rename("line").to_frame()
    reason = pl.col("line").str.slice(13).str.strip_chars()
    return (
        line.with_columns(status=pl.col("line").str.extract(r"^HTTP/1\.[01] ([1-9][0-9]{2})"))
        .with_columns(
            reason=pl.when(reason != "")
            .then(reason)
            .otherwise(pl.col("status").replace_strict(_REASONS, default=""))
        )
        .select(
            "status",
            error=pl.when(pl.col("status").str.starts_with("5")).then(
                pl.concat_str("status", "reason", separator=" ").str.strip_chars()
            ),
            miss=pl.lit(False),
            interim=(pl.col("status").str.starts_with("1") & (pl.col("status") != "101")).fill_null(
                False
            ),
            **{
                name: pl.lit(None, dtype=RESPONSE_SCHEMA[name])
                for name in ("queue", "element", "defines", "transaction")
            },
        )
        .select(RESPONSE_SCHEMA.names())
        .cast(RESPONSE_SCHEMA)
    )


PROTOCOL: Final = Protocol(
    "http",
    recognise,
    keep,
    parse_requests,
    parse_responses,
    recognise_and_keep=recognise_and_keep,
)
