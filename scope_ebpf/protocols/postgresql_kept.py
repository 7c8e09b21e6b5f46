"""PostgreSQL: which bytes of messages may be stored, and where values stand in them."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.protocols import sql
from scope_ebpf.protocols.contract import Kept, Role, Roles
from scope_ebpf.protocols.heads import Bytes, Heads, Numbers
from scope_ebpf.protocols.postgresql_messages import (
    FROM_CLIENT,
    FROM_SERVER,
    Messages,
    Strings,
    bytes_among,
    messages,
    number_at,
)

_MOST_FIELDS = 16  # of an ErrorResponse, columns of a row, parameters of a Bind
_MOST_SETTINGS = 24  # of a startup message

# Startup messages have no type byte; the second number says what they are.
_PROTOCOL_3 = 3 << 16
CANCEL, _SSL, _GSS = 80877102, 80877103, 80877104
STARTUPS: Final = {
    CANCEL: "CancelRequest",
    _SSL: "SSLRequest",
    _GSS: "GSSENCRequest",
}
_KEPT_SETTINGS: Final = (b"user", b"database", b"application_name", b"client_encoding")
_SETTING_BYTES: Final = np.arange(max(map(len, _KEPT_SETTINGS)))

# Fields of errors that say nothing about values: severity, code, places, names of objects.
_KEPT_ERROR_FIELDS: Final = bytes_among("SVCPpFLRstcdn")

NOTIFY_CALL: Final = r"(?is)\bpg_notify\s*\(\s*"
NOTIFY_BY_PARAMETERS: Final = NOTIFY_CALL + r"\$1\s*(?:::\w+\s*)?,\s*\$2"


def number_in(front: Bytes, at: int) -> Numbers:
    return np.ascontiguousarray(front[:, at : at + 4]).view(">u4").ravel().astype(np.int64)


def startups(heads: Heads) -> Numbers:
    """The code of each startup message, 0 for anything else."""
    front = heads.matrix(8)
    length, code = number_in(front, 0), number_in(front, 4)
    short = np.isin(code, [_SSL, _GSS]) & (length == 8)
    cancel = (code == CANCEL) & (length >= 16) & (length <= 268)
    # 3.0, and what later versions of libpq ask for.
    begins = (code >= _PROTOCOL_3) & (code <= _PROTOCOL_3 + 0x27FF) & (length > 8)
    # libpq asks for TLS, or for GSSAPI, before; what follows is another message.
    valid = (short | cancel | begins) & (length == heads.totals) & (heads.lengths >= 8)
    return np.where(valid, code, 0)


def keep(heads: Heads, roles: Roles) -> Kept:
    starts = startups(heads) > 0
    asked = messages(heads, FROM_CLIENT, (roles == Role.REQUEST) & ~starts)
    told = messages(heads, FROM_SERVER, roles == Role.RESPONSE)
    return keep_of(heads, asked, told, np.flatnonzero((roles == Role.REQUEST) & starts))


def keep_of(heads: Heads, asked: Messages, told: Messages, starts: NDArray[np.intp]) -> Kept:
    """What is kept of requests and responses made of these messages, and of startup messages."""
    kept = np.zeros(len(heads.data), np.bool_)
    if len(asked.rows):
        kept |= _keep_of_requests(heads, asked)
    if len(starts):
        kept |= _keep_of_startups(heads, starts)
    if len(told.rows):
        kept |= _keep_of_responses(heads, told)
    return kept


def _keep_of_requests(heads: Heads, found: Messages) -> Kept:
    data, strings = heads.data, Strings(heads.data)
    headers = found.bodies - 5
    ranges = [(headers, found.bodies, 1)]
    named = found.of("D", "C", "E")
    ranges.append((named.bodies, named.stops, 1))
    parsed = found.of("P")
    names = np.minimum(strings.ends(parsed.bodies, parsed.stops) + 1, parsed.stops)
    ends = strings.ends(names, parsed.stops)
    # Names, and the types of the parameters behind the text.
    ranges += [(parsed.bodies, names, 1), (ends, parsed.stops, 1)]
    queries = found.of("Q")
    query_ends = strings.ends(queries.bodies, queries.stops)
    ranges.append((query_ends, queries.stops, 1))
    bound = found.of("B")
    _, values = values_of_bind(data, strings, bound)
    ranges.append((bound.bodies, values[0][0], 1))
    if len(values) > 2:
        # The first argument of pg_notify is the name of a channel.
        notifies = np.isin(bound.rows, parsed.rows[_notify_by_parameters(data, names, ends)])
        ranges.append((values[0][0][notifies], values[0][1][notifies], 1))
    for (_, stops), (begins, _) in pairwise(values):
        ranges.append((stops, np.maximum(begins, stops), 1))
    begins = np.concatenate([queries.bodies, names])
    order = np.argsort(begins)
    texts = sql.visible(
        data, begins[order], np.concatenate([query_ends, ends])[order], sql.POSTGRESQL
    )
    return sql.between(len(data), ranges) | texts


def _notify_by_parameters(data: Bytes, begins: Numbers, ends: Numbers) -> NDArray[np.bool_]:
    """Which statements are pg_notify($1, $2)."""
    if b"pg_notify" not in data.tobytes().lower():
        return np.zeros(len(begins), np.bool_)
    return sql.texts(data, begins, ends).str.contains(NOTIFY_BY_PARAMETERS).to_numpy()


def values_of_bind(
    data: Bytes, strings: Strings, bound: Messages
) -> tuple[Numbers, list[tuple[Numbers, Numbers]]]:
    """Where the statement's name of each Bind begins, and where the values of its parameters are.

    The first values; from the last in the list on, everything may be a value.
    """
    limit = bound.stops
    names = np.minimum(strings.ends(bound.bodies, limit) + 1, limit)
    here = np.minimum(strings.ends(names, limit) + 1, limit)
    here = np.minimum(here + 2 + 2 * number_at(data, here, 2), limit)
    count = np.where(here + 2 <= limit, number_at(data, here, 2), 0)
    return names, _sized(data, np.minimum(here + 2, limit), count, limit)


def _sized(
    data: Bytes, here: Numbers, count: Numbers, limit: Numbers
) -> list[tuple[Numbers, Numbers]]:
    """The places of values that each have their length before them; -1 is a null."""
    values = []
    for number in range(min(_MOST_FIELDS, int(count.max(initial=0)))):
        there = (number < count) & (here + 4 <= limit)
        length = np.where(there, number_at(data, here, 4), 0)
        length[length >= 1 << 31] = 0
        begins = np.where(there, here + 4, here)
        here = np.minimum(begins + length, limit)
        values.append((begins, here))
    rest = count > _MOST_FIELDS
    values.append((here, np.where(rest, limit, here)))
    values.append((limit, limit))
    return values


def _keep_of_startups(heads: Heads, rows: NDArray[np.intp]) -> Kept:
    """Names of parameters, and the values of those that are no secret."""
    data, strings = heads.data, Strings(heads.data)
    limit = heads.begins[rows] + heads.lengths[rows]
    here = heads.begins[rows] + 8
    ranges = [(here - 8, np.minimum(here, limit), 1)]
    cancel = startups(heads)[rows] == CANCEL  # its secret key stays hidden
    here = np.where(cancel, limit, here)
    for _ in range(_MOST_SETTINGS):
        ends = strings.ends(here, limit)
        values = np.minimum(ends + 1, limit)
        after = strings.ends(values, limit)
        known = np.zeros(len(rows), np.bool_)
        start = data[np.minimum(here[:, None] + _SETTING_BYTES, len(data) - 1)]
        for name in _KEPT_SETTINGS:
            same = (start[:, : len(name)] == np.frombuffer(name, np.uint8)).all(axis=1)
            known |= same & (ends - here == len(name))
        following = np.minimum(after + 1, limit)
        ranges += [(here, values, 1), (np.where(known, values, after), following, 1)]
        here = following
        if (here >= limit).all():
            break
    return sql.between(len(data), ranges)


def _keep_of_responses(heads: Heads, found: Messages) -> Kept:
    data, strings = heads.data, Strings(heads.data)
    ranges = [(found.bodies - 5, found.bodies, 1)]
    plain = found.of(*"SZ123nsItTCGHWv")
    ranges.append((plain.bodies, plain.stops, 1))
    # Of an authentication only its kind: a salt and a proof of the password may follow.
    asked = found.of("R")
    ranges.append((asked.bodies, np.minimum(asked.bodies + 4, asked.stops), 1))
    told = found.of("A")
    names = np.minimum(told.bodies + 4, told.stops)
    payloads = np.minimum(strings.ends(names, told.stops) + 1, told.stops)
    ranges += [
        (told.bodies, payloads, 1),
        (strings.ends(payloads, told.stops), told.stops, 1),
    ]
    rows = found.of("D")
    firsts = np.minimum(rows.bodies + 2, rows.stops)
    count = np.where(rows.bodies + 2 <= rows.stops, number_at(data, rows.bodies, 2), 0)
    values = _sized(data, firsts, count, rows.stops)
    ranges.append((rows.bodies, values[0][0], 1))
    for (_, stops), (begins, _) in pairwise(values):
        ranges.append((stops, np.maximum(begins, stops), 1))
    failed = found.of("E", "N")
    for codes, begins, ends in fields_of_errors(data, strings, failed):
        hidden = ~_KEPT_ERROR_FIELDS[codes]
        texts = np.minimum(begins + 1, ends)
        after = np.minimum(ends + 1, failed.stops)
        ranges += [(begins, texts, 1), (np.where(hidden, ends, texts), after, 1)]
    return sql.between(len(data), ranges)


def fields_of_errors(
    data: Bytes, strings: Strings, failed: Messages
) -> list[tuple[Bytes, Numbers, Numbers]]:
    """The fields of errors: code (0: none any more), where it stands, where its text ends."""
    here, found = failed.bodies, []
    for _ in range(_MOST_FIELDS):
        codes = np.where(here < failed.stops, data[np.minimum(here, len(data) - 1)], 0)
        ends = np.where(codes > 0, strings.ends(here + 1, failed.stops), here)
        ends = np.minimum(ends, failed.stops)
        found.append((codes.astype(np.uint8), here, ends))
        here = np.where(codes > 0, np.minimum(ends + 1, failed.stops), here)
        if not codes.any():
            break
    return found
