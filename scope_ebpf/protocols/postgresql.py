"""PostgreSQL, protocol 3: simple and extended queries, COPY, notifications, errors.

https://www.postgresql.org/docs/current/protocol.html. Single bytes (the answer to an SSLRequest) and
what follows a TLS handshake are not recognised. A statement's text is looked for in the first
messages of a head, so a pipeline is named after its first statement that is no BEGIN.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.protocols import sql
from scope_ebpf.protocols.contract import (
    REQUEST_SCHEMA,
    RESPONSE_SCHEMA,
    Kept,
    Protocol,
    Role,
    Roles,
)
from scope_ebpf.protocols.heads import Bytes, Heads, Numbers
from scope_ebpf.protocols.masking import TOKEN_PATTERN
from scope_ebpf.protocols.postgresql_kept import (
    CANCEL,
    NOTIFY_BY_PARAMETERS,
    NOTIFY_CALL,
    STARTUPS,
    fields_of_errors,
    keep,
    keep_of,
    number_in,
    startups,
    values_of_bind,
)
from scope_ebpf.protocols.postgresql_messages import (
    FROM_CLIENT,
    FROM_SERVER,
    Messages,
    Strings,
    bytes_among,
    messages,
)
from scope_ebpf.protocols.sql_errors import POSTGRESQL_CONDITIONS

# What a request is called that brings no statement, the first that is there.
_NAMES: Final = {
    "X": "Terminate",
    "d": "COPY data",
    "c": "COPY done",
    "f": "COPY fail",
    "p": "authenticate",
    "F": "function call",
    "D": "DESCRIBE",
    "C": "CLOSE",
    "S": "Sync",
    "H": "Flush",
}


def _recognise(heads: Heads) -> Roles:
    found = [_recognise_some(some)[0] for some in sql.chunks(heads, sql.RECOGNISED_CHUNK)]
    return np.concatenate(found) if found else np.zeros(0, np.uint8)


def _recognise_and_keep(heads: Heads) -> tuple[Roles, Kept]:
    roles, kept = [np.zeros(0, np.uint8)], [np.zeros(0, np.bool_)]
    for some in sql.chunks(heads, sql.RECOGNISED_CHUNK):
        role, asked, told = _recognise_some(some)
        started = startups(some) > 0
        asked = asked.take((role == Role.REQUEST)[asked.rows] & ~started[asked.rows])
        told = told.take((role == Role.RESPONSE)[told.rows])
        roles.append(role)
        kept.append(keep_of(some, asked, told, np.flatnonzero(started)))
    return np.concatenate(roles), np.concatenate(kept)


def _recognise_some(heads: Heads) -> tuple[Roles, Messages, Messages]:
    """Roles, and the messages of the heads that may be a client's, and a server's."""
    roles = np.zeros(len(heads), np.uint8)
    if not len(heads.data):
        nothing = messages(heads, FROM_CLIENT, roles > 0)
        return roles, nothing, nothing
    front = heads.matrix(12)
    kinds = front[:, 0]
    length = number_in(front, 1)
    seen = heads.lengths >= 6
    request = _plausible_request(heads, front)
    response = seen & (kinds != 0) & _plausible_response(front, length)
    # A long message that was sent in pieces is only taken when its text looks like a text.
    beyond = length + 1 > heads.totals
    text = ((front[:, 5:12] >= 9) & (front[:, 5:12] < 0x7F)).all(axis=1)
    request &= ~beyond | (text & bytes_among("QP")[kinds] & (length < 1 << 26))
    response &= ~beyond | (bytes_among("TD")[kinds] & (length < 1 << 24))
    told = messages(heads, FROM_SERVER, response)
    server = told.tiled.copy()
    # COPY goes both ways; what a server sends begins with a CopyOutResponse, or ends with more.
    copies = bytes_among("dc")[kinds]
    asked = messages(heads, FROM_CLIENT, request & (~server | copies))
    client = asked.tiled
    server &= ~client
    roles[client] = Role.REQUEST
    roles[server] = Role.RESPONSE
    roles[startups(heads) > 0] = Role.REQUEST
    return roles, asked, told


def _plausible_request(heads: Heads, front: Bytes) -> NDArray[np.bool_]:
    """Whether the first message may come from a client: its type, and its body's first bytes."""
    kinds, body, length = front[:, 0], front[:, 5], number_in(front, 1)
    text = (body >= 9) & (body < 0x7F)
    name = text | (body == 0)
    stop = heads.begins + 1 + length
    whole = stop <= heads.begins + heads.lengths
    last = heads.data[np.clip(stop - 1, 0, len(heads.data) - 1)]
    closed = ~whole | (last == 0)
    cases = {
        "Q": name & closed,
        "P": name,
        "B": name,
        "D": ((body == ord("S")) | (body == ord("P"))) & closed,
        # Else it is the CommandComplete of a server.
        "C": ((body == ord("S")) | (body == ord("P"))) & closed & ~_command_tag(front),
        "E": name & _execute(heads, length),
        "F": body == 0,
        "f": name & closed,
        "p": ~((length + 1) != heads.totals),
    }
    plausible = bytes_among("HSXdc")[kinds] & (length + 1 <= heads.totals)
    for kind, good in cases.items():
        plausible |= (kinds == ord(kind)) & good
    return plausible


def _execute(heads: Heads, length: Numbers) -> NDArray[np.bool_]:
    """Whether the only zero byte before the number of rows ends the portal's name.

    It tells an Execute from an ErrorResponse, which has the same type byte.
    """
    places = np.minimum(heads.begins + length - 4, len(heads.data) - 1)
    seen = length - 4 < heads.lengths
    unnamed = (heads.data[np.minimum(heads.begins + 5, len(heads.data) - 1)] == 0) & (length == 9)
    error = heads.matrix(2, skip=5)
    severity = (error[:, 0] == ord("S")) & (error[:, 1] >= ord("A")) & (error[:, 1] <= ord("Z"))
    return np.asarray(unnamed | (seen & (heads.data[np.maximum(places, 0)] == 0) & ~severity))


def _command_tag(front: Bytes) -> NDArray[np.bool_]:
    """Whether the body of the first message begins with a word of capital letters."""
    word = front[:, 5:9]
    capitals = (word >= ord("A")) & (word <= ord("Z"))
    fourth = capitals[:, 3] | (word[:, 3] == ord(" ")) | (word[:, 3] == 0)
    third = capitals[:, 2] & fourth
    two = (word[:, 2] == 0) & (word[:, 3] != 0)  # DO
    return np.asarray(capitals[:, 0] & capitals[:, 1] & (third | two))


def _plausible_response(front: Bytes, length: Numbers) -> NDArray[np.bool_]:
    kinds, body = front[:, 0], front[:, 5].astype(np.int64)
    letter = ((body | 0x20) >= ord("a")) & ((body | 0x20) <= ord("z"))
    columns = (body << 8) | front[:, 6]
    severity = (body == ord("S")) & (front[:, 6] >= ord("A"))
    cases = {
        "R": (front[:, 5:8] == 0).all(axis=1) & (front[:, 8] <= 12),
        "S": letter,
        "Z": bytes_among("ITE")[front[:, 5]],
        "K": length >= 12,
        "t": length == 6 + 4 * columns,
        "T": (columns < 1665) & (length >= 6 + 19 * columns),
        "D": (columns < 1665) & (length >= 6 + 4 * columns),
        "C": _command_tag(front),
        "E": severity,
        "N": severity,
        "A": front[:, 9] >= ord(" "),
        "G": (body <= 1) & (length >= 7),
        "H": (body <= 1) & (length >= 7),
        "W": (body <= 1) & (length >= 7),
        "v": (front[:, 5:7] == 0).all(axis=1),
    }
    plausible = bytes_among("123nsIdcV")[kinds]
    for kind, good in cases.items():
        plausible |= (kinds == ord(kind)) & good
    return plausible


def _column(size: int, rows: Numbers, values: pl.Series) -> pl.Series:
    """Values of some rows as a column of all, null elsewhere."""
    places = np.full(size, -1, np.int64)
    places[rows] = np.arange(len(rows))
    wanted = (
        pl.Series(places)
        .to_frame("at")
        .select(pl.when(pl.col("at") >= 0).then(pl.col("at")).cast(pl.UInt32))
    )
    return values.gather(wanted.to_series())


def _parse_requests(heads: Heads) -> pl.DataFrame:
    found = [_some_requests(some) for some in sql.chunks(heads, sql.PARSED_CHUNK)]
    return pl.concat(found) if found else REQUEST_SCHEMA.to_frame()


def _some_requests(heads: Heads) -> pl.DataFrame:
    size, data, strings = len(heads), heads.data, Strings(heads.data)
    starts = startups(heads)
    found = messages(heads, FROM_CLIENT, starts == 0)
    texts = found.of("Q", "P")
    parsed = texts.kinds == ord("P")
    name_ends = np.where(parsed, strings.ends(texts.bodies, texts.stops), texts.bodies)
    begins = np.minimum(name_ends + parsed, texts.stops)
    ends = strings.ends(begins, texts.stops)
    chosen = _chosen(data, texts.rows, begins, ends)
    rows = texts.rows[chosen]
    statement_begins, statement_ends = np.zeros(size, np.int64), np.zeros(size, np.int64)
    statement_begins[rows], statement_ends[rows] = begins[chosen], ends[chosen]
    # Heads without a statement stand in order, too, as the folding expects.
    empty = np.ones(size, np.bool_)
    empty[rows] = False
    statement_begins[empty] = statement_ends[empty] = heads.begins[empty]
    folded = sql.fold(data, statement_begins, statement_ends, sql.POSTGRESQL)
    named = chosen[parsed[chosen]]
    bound = found.of("B").first()
    portals_end = np.minimum(strings.ends(bound.bodies, bound.stops) + 1, bound.stops)
    uses = sql.texts(data, portals_end, strings.ends(portals_end, bound.stops))
    # Which of them is executed without its text: none of that name is parsed before it.
    every = np.flatnonzero(parsed & (name_ends > texts.bodies))
    unnamed = np.flatnonzero(parsed & (name_ends == texts.bodies))[::-1]
    unnamed_at = np.full(size, len(data), np.int64)
    unnamed_at[texts.rows[unnamed]] = texts.bodies[unnamed]  # the first one stays
    nameless = strings.ends(portals_end, bound.stops) == portals_end
    names = pl.DataFrame(
        {
            "row": texts.rows[every],
            "name": sql.texts(data, texts.bodies[every], name_ends[every]),
            "parsed_at": texts.bodies[every],
        },
        schema_overrides={"name": pl.String},
    ).unique(["row", "name"], keep="first", maintain_order=True)
    used = (
        pl.DataFrame({"row": bound.rows, "name": uses, "at": bound.bodies})
        .join(names, on=["row", "name"], how="left", maintain_order="left")
        .select((pl.col("parsed_at") < pl.col("at")).fill_null(value=False))
        .to_series()
        .to_numpy()
    ) | (nameless & (unnamed_at[bound.rows] < bound.bodies))
    requests = np.bincount(found.of("Q", "E").rows, minlength=size)
    frame = folded.with_columns(
        detail=_column(size, rows, sql.texts(data, begins[chosen], ends[chosen])),
        requests=pl.Series(np.maximum(requests, 1), dtype=pl.UInt32),
        answered=pl.Series(
            ~(np.isin(heads.matrix(1)[:, 0], [ord("X")]) & (starts == 0)) & (starts != CANCEL)
        ),
        waits=pl.lit(value=False),
        element=pl.lit(None, pl.String),
        defines=_column(
            size, texts.rows[named], sql.texts(data, texts.bodies[named], name_ends[named])
        ),
        uses=_column(size, bound.rows[~used], uses.filter(~pl.Series(used))),
        other=_others(size, found, starts),
    ).with_columns(
        operation=pl.coalesce(
            "operation",
            pl.format("EXECUTE {}", "uses").str.strip_chars(" "),
            "other",
        )
    )
    frame = _with_notifications(frame, data, strings, found.of("B").first())
    return frame.select(REQUEST_SCHEMA.names()).cast(REQUEST_SCHEMA)


def _chosen(data: Bytes, rows: Numbers, begins: Numbers, ends: Numbers) -> NDArray[np.intp]:
    """The first statement of each head that is no BEGIN, or else the first."""
    word = data[np.minimum(begins[:, None] + np.arange(5), len(data) - 1)] if len(rows) else None
    if word is None:
        return np.empty(0, np.intp)
    is_begin = ((word | 0x20) == np.frombuffer(b"begin", np.uint8)).all(axis=1)
    is_begin &= ends - begins <= 80  # a text with more statements in it has a name of its own
    order = np.lexsort((begins, is_begin, rows))
    first = np.append(True, rows[order][1:] != rows[order][:-1])
    return np.asarray(order[first])


def _others(size: int, found: Messages, starts: Numbers) -> pl.Series:
    """What to call requests without a statement, by their first message."""
    codes = np.zeros(size, np.int64)
    first = found.first()
    codes[first.rows] = first.kinds
    codes = np.where(starts > 0, np.where(starts < CANCEL, 256, starts), codes)
    names = {ord(kind): name for kind, name in _NAMES.items()} | {256: "startup", **STARTUPS}
    return pl.Series(codes).replace_strict(names, default=None, return_dtype=pl.String)


def _with_notifications(
    frame: pl.DataFrame, data: Bytes, strings: Strings, bound: Messages
) -> pl.DataFrame:
    """Add channel and payload of NOTIFY and pg_notify, which are in the text or in parameters."""
    notifies = (frame["queue_action"] == "publish").fill_null(value=False)
    if not notifies.any():
        return frame
    notify = pl.col("detail").str.extract(r"(?is)^\s*NOTIFY\s[^']*'((?:[^']|'')*)'")
    channel = pl.col("detail").str.extract(NOTIFY_CALL + r"E?'([^']*)'")
    payload = pl.col("detail").str.extract(NOTIFY_CALL + r"E?'[^']*'\s*,\s*E?'((?:[^']|'')*)'")
    _, values = values_of_bind(data, strings, bound)
    parameters = [
        _column(len(frame), bound.rows[known], sql.texts(data, begins[known], ends[known]))
        for begins, ends in (values[:2] if len(values) > 3 else [])
        for known in [bound.whole & (ends < bound.stops)]
    ] or [pl.Series([None] * len(frame), dtype=pl.String)] * 2
    bare = pl.col("detail").str.contains(NOTIFY_BY_PARAMETERS)
    return frame.with_columns(first=parameters[0], second=parameters[1]).with_columns(
        queue=pl.when(notifies)
        .then(pl.coalesce("queue", channel, pl.when(bare).then(pl.col("first"))))
        .otherwise(pl.col("queue")),
        element=pl.when(notifies).then(
            pl.coalesce(
                pl.coalesce(notify, payload).str.replace_all("''", "'", literal=True),
                pl.when(bare).then(pl.col("second")),
            )
        ),
    )


def _parse_responses(heads: Heads) -> pl.DataFrame:
    found = [_some_responses(some) for some in sql.chunks(heads, sql.PARSED_CHUNK)]
    return pl.concat(found) if found else RESPONSE_SCHEMA.to_frame()


def _some_responses(heads: Heads) -> pl.DataFrame:
    size, data, strings = len(heads), heads.data, Strings(heads.data)
    found = messages(heads, FROM_SERVER, np.ones(size, np.bool_))
    tags = found.of("C")
    tag_ends = strings.ends(tags.bodies, tags.stops)
    chosen = _chosen(data, tags.rows, tags.bodies, tag_ends)
    ready = found.of("Z")
    ready = ready.take(np.flatnonzero(ready.bodies < ready.stops)[::-1]).first()
    failed = found.of("E").first()
    told = found.of("A").first()
    channels = np.minimum(told.bodies + 4, told.stops)
    channels_end = strings.ends(channels, told.stops)
    payloads = np.minimum(channels_end + 1, told.stops)
    whole = told.whole
    # A notice, a notification or a changed setting comes whenever it likes, and answers nothing.
    answers = ~np.isin(found.kinds, [*b"ANS"])
    unasked = np.zeros(size, np.bool_)
    unasked[found.rows] = True
    unasked[found.rows[answers | ~found.whole]] = False
    unasked &= found.tiled & (heads.totals == heads.lengths)
    alone = heads.matrix(1)[:, 0]
    single = np.where((heads.totals == 1) & (heads.lengths == 1), alone, 0)
    errors = _errors(data, strings, failed)
    understood = np.zeros(size, np.bool_)
    understood[found.rows] = True
    return (
        pl.DataFrame(
            {
                "tag": _column(
                    size, tags.rows[chosen], sql.texts(data, tags.bodies[chosen], tag_ends[chosen])
                ),
                "code": _column(size, failed.rows, errors["code"]),
                "error": _column(size, failed.rows, errors["error"]),
                "understood": understood,
                "single": pl.Series(single).replace_strict(
                    {ord("S"): "S", ord("N"): "N"}, default=None, return_dtype=pl.String
                ),
                "interim": unasked,
                "queue": _column(size, told.rows, sql.texts(data, channels, channels_end)),
                "element": _column(
                    size,
                    told.rows[whole],
                    sql.texts(data, payloads[whole], strings.ends(payloads, told.stops)[whole]),
                ),
                "transaction": _column(
                    size, ready.rows, sql.texts(data, ready.bodies, ready.bodies + 1)
                ),
            }
        )
        .with_columns(
            status=pl.coalesce(
                "code", "tag", "single", pl.when(pl.col("understood")).then(pl.lit("OK"))
            ),
            miss=pl.lit(None, pl.Boolean),
            defines=pl.lit(None, pl.String),
        )
        .select(RESPONSE_SCHEMA.names())
        .cast(RESPONSE_SCHEMA)
    )


def _errors(data: Bytes, strings: Strings, failed: Messages) -> pl.DataFrame:
    """SQLSTATE and text of errors; a masked text gives way to the condition's name."""
    places = {code: np.zeros((2, len(failed.rows)), np.int64) for code in b"SCM"}
    for codes, begins, ends in fields_of_errors(data, strings, failed):
        for code, place in places.items():
            here = codes == code
            place[0][here], place[1][here] = begins[here] + 1, ends[here]
    severity, state, message = (sql.texts(data, *places[field]) for field in b"SCM")
    condition = pl.col("code").replace_strict(
        POSTGRESQL_CONDITIONS, default=None, return_dtype=pl.String
    )
    masked = pl.col("message").str.contains(rf"^{TOKEN_PATTERN}")
    return pl.DataFrame({"severity": severity, "code": state, "message": message}).select(
        pl.when(pl.col("code").str.len_bytes() == 5)
        .then(pl.col("code"))
        .otherwise(pl.lit("error")),
        error=pl.concat_str(
            pl.when(~pl.col("severity").is_in(["ERROR", ""])).then(pl.col("severity")),
            pl.col("code"),
            pl.when(masked).then(condition).otherwise(pl.col("message")),
            separator=" ",
            ignore_nulls=True,
        ).str.strip_chars(),
    )


PROTOCOL: Final = Protocol(
    name="postgresql",
    recognise=_recognise,
    keep=keep,
    parse_requests=_parse_requests,
    parse_responses=_parse_responses,
    recognise_and_keep=_recognise_and_keep,
)
