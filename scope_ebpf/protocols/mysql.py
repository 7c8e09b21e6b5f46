"""MySQL and MariaDB: text queries, prepared statements, errors; not compressed, not encrypted.

Packets: three bytes of length (little-endian), a sequence number that begins at 0 with each command,
a payload. https://mariadb.com/kb/en/clientserver-protocol/,
https://dev.mysql.com/doc/dev/mysql-server/latest/PAGE_PROTOCOL.html
"""

from __future__ import annotations

from dataclasses import dataclass
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
from scope_ebpf.protocols.sql_errors import MYSQL_ERRORS

# Further packets of one head are not looked at, and not stored while payloads are redacted.
_MOST_PACKETS = 32
_MOST_LENGTH = (1 << 24) - 1

_QUIT, _INIT_DB, _QUERY, _PREPARE, _EXECUTE = 0x01, 0x02, 0x03, 0x16, 0x17
_LONG_DATA, _CLOSE, _BULK_EXECUTE = 0x18, 0x19, 0xFA
# Command -> what it is called, and the payload's smallest and largest length.
_COMMANDS: Final = {
    _QUIT: ("Quit", 1, 1),
    _INIT_DB: ("InitDB", 2, 256),
    _QUERY: ("Query", 2, _MOST_LENGTH),
    0x04: ("FieldList", 3, 512),
    0x08: ("Shutdown", 1, 2),
    0x09: ("Statistics", 1, 1),
    0x0C: ("ProcessKill", 5, 5),
    0x0D: ("Debug", 1, 1),
    0x0E: ("Ping", 1, 1),
    0x11: ("ChangeUser", 4, 4096),
    _PREPARE: ("Prepare", 2, _MOST_LENGTH),
    _EXECUTE: ("EXECUTE ?", 10, _MOST_LENGTH),
    _LONG_DATA: ("SendLongData", 7, _MOST_LENGTH),
    _CLOSE: ("CLOSE", 5, 5),
    0x1A: ("ResetStatement", 5, 5),
    0x1B: ("SetOption", 3, 3),
    0x1C: ("Fetch", 9, 9),
    0x1F: ("ResetConnection", 1, 1),
    _BULK_EXECUTE: ("EXECUTE ?", 7, _MOST_LENGTH),
}
_SMALLEST: Final = np.full(256, _MOST_LENGTH + 1, np.int64)
_LARGEST: Final = np.zeros(256, np.int64)
for _command, (_, _low, _high) in _COMMANDS.items():
    _SMALLEST[_command], _LARGEST[_command] = _low, _high

_SILENT: Final = np.array([_QUIT, _LONG_DATA, _CLOSE])  # commands that nobody answers
_LOGIN: Final = 256  # stands for a command: the client's first packet has none
_TLS_LOGIN = 36  # length of the login that asks for TLS
_LAST_PREPARED: Final = 0xFFFFFFFF  # MariaDB: the statement of the Prepare right before
_IN_TRANSACTION = 0x0001


@dataclass(frozen=True)
class _Packets:
    """The packets of some heads, in the order of the data, as far as they were captured.

    - `rows`: the head, `kinds`: the first byte of the payload, `sequence`: of the header
    - `bodies`: where the payload begins, `stops`: where it ends, at most the head's end
    - `lengths`: the payload's real length
    """

    rows: Numbers
    kinds: Numbers
    sequence: Numbers
    bodies: Numbers
    stops: Numbers
    lengths: Numbers

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> _Packets:
        return _Packets(
            self.rows[rows],
            self.kinds[rows],
            self.sequence[rows],
            self.bodies[rows],
            self.stops[rows],
            self.lengths[rows],
        )

    def of(self, *kinds: int) -> _Packets:
        return self.take(np.isin(self.kinds, kinds))

    def first(self) -> _Packets:
        """The first one of each head that has one."""
        return self.take(np.diff(self.rows, prepend=-1) != 0)


def _packets(heads: Heads, rows: NDArray[np.intp]) -> _Packets:
    """Split heads into packets; one walk over all of them at once."""
    data, ends = heads.data, heads.begins + heads.lengths
    rows = rows[heads.lengths[rows] >= 5]
    here = heads.begins[rows]
    found = []
    for _ in range(_MOST_PACKETS):
        if not len(rows):
            break
        length = _number(data, here, 3)
        bodies = here + 4
        stops = np.minimum(bodies + length, ends[rows])
        found.append(np.stack([rows, data[bodies], data[here + 3], bodies, stops, length]))
        more = (bodies + length + 5 <= ends[rows]) & (length > 0)
        rows, here = rows[more], (bodies + length)[more]
    if not found:
        return _Packets(*[np.empty(0, np.int64)] * 6)
    columns = np.concatenate(found, axis=1)
    return _Packets(*columns[:, np.argsort(columns[3], kind="stable")])


def _number(data: Bytes, at: Numbers, size: int) -> Numbers:
    """Little-endian numbers of `size` bytes; zeros where the data have ended."""
    value = np.zeros(len(at), np.int64)
    if len(data):
        for byte in range(size):
            places = at + byte
            there = places < len(data)
            value |= np.where(there, data[np.minimum(places, len(data) - 1)], 0).astype(
                np.int64
            ) << (8 * byte)
    return value


def _string_ends(data: Bytes, begins: Numbers, stops: Numbers) -> Numbers:
    zeros = np.append(np.flatnonzero(data == 0), len(data))
    return np.asarray(np.minimum(zeros[np.searchsorted(zeros, begins)], stops))


def _recognise(heads: Heads) -> Roles:
    found = [_recognise_some(some) for some in sql.chunks(heads, sql.RECOGNISED_CHUNK)]
    return np.concatenate(found) if found else np.zeros(0, np.uint8)


def _recognise_some(heads: Heads) -> Roles:
    roles = np.zeros(len(heads), np.uint8)
    if not len(heads.data):
        return roles
    front = heads.matrix(60).astype(np.int64)
    length = front[:, 0] | front[:, 1] << 8 | front[:, 2] << 16
    sequence, after = front[:, 3], heads.totals - length - 4
    seen = (heads.lengths >= 5) & (length > 0)
    request = seen & (sequence == 0) & _plausible_command(front, length, after)
    login = seen & _login(front, length, after)
    response = seen & _plausible_response(heads, front, length, after)
    roles[request | login] = Role.REQUEST
    roles[response] = Role.RESPONSE
    return roles


def _plausible_command(front: Numbers, length: Numbers, after: Numbers) -> NDArray[np.bool_]:
    command, payload = front[:, 4], front[:, 5:]
    fits = (length >= _SMALLEST[command]) & (length <= _LARGEST[command])
    # A client may send the next commands without waiting: MariaDB's pipelines, a Close.
    follows = np.isin(command, [_CLOSE, _PREPARE, _EXECUTE, _LONG_DATA, 0x1A, _BULK_EXECUTE])
    plausible = fits & ((after == 0) | (follows & (after >= 5) & (_following(front, length) >= 0)))
    plausible |= fits & (length == _MOST_LENGTH) & (after > 0) & (command == _QUERY)
    printable = ((payload >= ord(" ")) & (payload < 0x7F)) | ((payload >= 9) & (payload <= 13))
    # With query attributes (MySQL 8), two numbers stand before the text.
    attributes = (payload[:, 0] == 0) & (payload[:, 1] == 1)
    texts = np.where(attributes, printable[:, 2], printable[:, 0])
    is_text = np.isin(command, [_QUERY, _PREPARE])
    is_name = command == _INIT_DB
    execute = (payload[:, 4] <= 7) & (front[:, 10:14] == [1, 0, 0, 0]).all(axis=1)
    return np.asarray(
        plausible
        & (~is_text | texts)
        & (~is_name | printable[:, 0])
        & ((command != _EXECUTE) | execute)
    )


def _following(front: Numbers, length: Numbers) -> Numbers:
    """The second packet's command; -1 if it cannot be one, 0 if it is out of sight."""
    width = front.shape[1]
    at = np.minimum(length + 4, width - 5)
    row = np.arange(len(front))
    command = front[row, at + 4]
    good = (front[row, at + 3] == 0) & (_LARGEST[command] > 0)
    return np.where(length + 9 > width, 0, np.where(good, command, -1))


def _login(front: Numbers, length: Numbers, after: Numbers) -> NDArray[np.bool_]:
    """HandshakeResponse41, or the first half of it, which asks for TLS."""
    protocol_41 = (front[:, 5] & 0x02) > 0
    zeros = (front[:, 13:32] == 0).all(axis=1)
    return np.asarray(
        (front[:, 3] == 1) & protocol_41 & zeros & (length >= _TLS_LOGIN - 4) & (after == 0)
    )


def _plausible_response(
    heads: Heads, front: Numbers, length: Numbers, after: Numbers
) -> NDArray[np.bool_]:
    sequence, kind, payload = front[:, 3], front[:, 4], front[:, 5:]
    digit = (payload[:, 0] >= ord("0")) & (payload[:, 0] <= ord("9"))
    greeting = (kind == 10) & digit & np.isin(payload[:, 1], [*b".0123456789"]) & (length >= 40)
    greeting &= (sequence == 0) & (after == 0)
    code = payload[:, 0] | payload[:, 1] << 8
    failed = (kind == 0xFF) & (code >= 1000) & (code < 10000) & (length > 3) & (after == 0)
    failed &= (payload[:, 2] == ord("#")) | ((sequence <= 2) & (payload[:, 2] >= ord(" ")))
    fine = (kind == 0) & (after == 0) & (length >= 7)
    # Few rows changed, no new id: these packets have nothing that could be recognised but this.
    warnings = (payload[:, 2] | payload[:, 3] << 8) & 0xFF00
    fine &= (length <= 11) | (warnings == 0)
    prepared = _prepared(front, length, after)
    # A number of columns, then the first column, which begins with its catalog: always "def".
    next_at = 4 + length
    row = np.arange(len(front))
    second = [front[row, np.minimum(next_at + at, front.shape[1] - 1)] for at in range(8)]
    columns = ((length == 1) & (kind > 0) & (kind < 0xFB)) | ((length == 3) & (kind == 0xFC))
    columns |= (length == 2) & (kind > 0) & (kind < 0xFB) & (payload[:, 0] <= 1)
    columns &= (second[3] == 2) & (heads.lengths >= next_at + 8)
    for place, byte in zip(second[4:], b"\x03def", strict=True):
        columns &= place == byte
    end = (kind == 0xFE) & (after == 0) & (length == 5)
    local_file = (kind == 0xFB) & (after == 0) & (length > 1)
    local_file &= ((payload[:, :4] > ord(" ")) & (payload[:, :4] < 0x7F)).all(axis=1)
    answers = failed | fine | prepared | columns | end | local_file
    return np.asarray(greeting | (answers & (sequence >= 1) & (sequence <= 16)))


def _prepared(front: Numbers, length: Numbers, after: Numbers) -> NDArray[np.bool_]:
    """The answer to a Prepare: the statement's number, numbers of columns and parameters, zero."""
    payload = front[:, 5:]
    some = (payload[:, 4:8] > 0).any(axis=1)
    good = (front[:, 4] == 0) & (length == 12) & (payload[:, 8] == 0) & (front[:, 3] == 1)
    good &= (payload[:, :4] > 0).any(axis=1)
    return np.asarray(good & (some == (after > 0)))


def _commands(heads: Heads) -> _Packets:
    """Commands of clients; a login has the kind _LOGIN."""
    front = heads.matrix(40).astype(np.int64)
    found = _packets(heads, np.arange(len(heads)))
    length = front[:, 0] | front[:, 1] << 8 | front[:, 2] << 16
    logins = _login(front, length, heads.totals - length - 4)[found.rows]
    known = _LARGEST[found.kinds] > 0
    kinds = np.where(logins, _LOGIN, np.where(known & (found.sequence == 0), found.kinds, -1))
    return _Packets(
        found.rows, kinds, found.sequence, found.bodies, found.stops, found.lengths
    ).take(kinds >= 0)


def _statements(data: Bytes, found: _Packets) -> Numbers:
    """Where the SQL of Query and Prepare begins."""
    begins = np.minimum(found.bodies + 1, found.stops)
    attributes = (_number(data, begins, 2) == 0x0100) & (found.kinds == _QUERY)
    return np.minimum(np.where(attributes, begins + 2, begins), found.stops)


def _keep(heads: Heads, roles: Roles) -> Kept:
    data = heads.data
    ranges: list[tuple[Numbers, Numbers, int]] = []
    asking = np.flatnonzero(roles == Role.REQUEST)
    texts = np.zeros(len(data), np.bool_)
    if len(asking):
        few = heads.take(asking)
        # Places in `few`, whose heads stand one behind the other, as places in the data.
        found = _commands(few)
        shift = (heads.begins[asking] - few.begins)[found.rows]
        found = _Packets(
            asking[found.rows],
            found.kinds,
            found.sequence,
            found.bodies + shift,
            found.stops + shift,
            found.lengths,
        )
        ranges.append((found.bodies - 4, np.minimum(found.bodies + 1, found.stops), 1))
        queries = found.of(_QUERY, _PREPARE)
        begins = _statements(data, queries)
        ranges.append((queries.bodies, begins, 1))
        texts = sql.visible(data, begins, queries.stops, sql.MYSQL)
        plain = found.take(np.isin(found.kinds, [_INIT_DB, 0x04, 0x0C, _CLOSE, 0x1A, 0x1B, 0x1C]))
        ranges.append((plain.bodies + 1, plain.stops, 1))
        # The statement's number, flags, how many rows; then come the values.
        execute = found.of(_EXECUTE, _LONG_DATA, _BULK_EXECUTE)
        ends = execute.bodies + np.where(execute.kinds == _EXECUTE, 10, 7)
        ranges.append((execute.bodies + 1, np.minimum(ends, execute.stops), 1))
        logins = found.of(_LOGIN)
        names = np.minimum(logins.bodies + 32, logins.stops)
        # Capabilities and the user's name, not the proof of the password.
        ranges.append((logins.bodies, _after(data, names, logins.stops), 1))
    answering = np.flatnonzero(roles == Role.RESPONSE)
    if len(answering):
        ranges += _kept_of_responses(data, _packets(heads, answering))
    return sql.between(len(data), ranges) | texts


def _after(data: Bytes, begins: Numbers, stops: Numbers) -> Numbers:
    return np.minimum(_string_ends(data, begins, stops) + 1, stops)


def _kept_of_responses(data: Bytes, found: _Packets) -> list[tuple[Numbers, Numbers, int]]:
    """Headers, states, numbers and codes; no rows, no names of columns (`SELECT 'secret'`)."""
    first = np.diff(found.rows, prepend=-1) != 0
    ranges = [(found.bodies - 4, found.bodies, 1)]
    opening = found.take(first)
    begins, stops, kinds = opening.bodies, opening.stops, opening.kinds
    size = np.ones(len(begins), np.int64)
    size[(kinds > 0) & (kinds < 0xFB) & (opening.lengths <= 2)] = 2
    size[(kinds == 0xFC) & (opening.lengths == 3)] = 3
    size = np.where(kinds == 0xFE, np.where(opening.lengths <= 5, 5, 1), size)
    # Error: its number and SQLSTATE.
    stated = (kinds == 0xFF) & (_number(data, begins + 3, 1) == ord("#"))
    size = np.where(kinds == 0xFF, np.where(stated, 9, 3), size)
    greeting = (kinds == 10) & (opening.sequence == 0)
    size = np.where(greeting, _after(data, begins + 1, stops) - begins + 4, size)
    fine = kinds == 0
    flags, _ = _flags(data, begins)
    size = np.where(
        fine, np.maximum(flags + 4 - begins, np.where(opening.lengths == 12, 12, 7)), size
    )
    ranges.append((begins, np.minimum(begins + size, stops), 1))
    later = found.take(~first)
    is_definition = _number(data, later.bodies, 4) == int.from_bytes(b"\x03def", "little")
    is_end = np.isin(later.kinds, [0xFE, 0xFF]) & (later.lengths < 9)
    kept = np.where(is_definition, 4, np.where(is_end, 5, 0))
    ranges.append((later.bodies, np.minimum(later.bodies + kept, later.stops), 1))
    return ranges


def _flags(data: Bytes, bodies: Numbers) -> tuple[Numbers, Numbers]:
    """Where the state of an OK packet stands, behind two numbers of variable length; and it."""
    here = bodies + 1
    for _ in range(2):
        lead = _number(data, here, 1)
        here = here + np.select([lead == 0xFC, lead == 0xFD, lead == 0xFE], [3, 4, 9], 1)
    return here, _number(data, here, 2)


def _parse_requests(heads: Heads) -> pl.DataFrame:
    found = [_some_requests(some) for some in sql.chunks(heads, sql.PARSED_CHUNK)]
    return pl.concat(found) if found else REQUEST_SCHEMA.to_frame()


def _some_requests(heads: Heads) -> pl.DataFrame:
    size, data = len(heads), heads.data
    found = _commands(heads)
    # What a head is about: its statement if it has one, but not the Close before it.
    order = np.lexsort((found.bodies, found.kinds == _CLOSE, found.rows))
    first = order[np.diff(found.rows[order], prepend=-1) != 0]
    main = found.take(first)
    texts = np.isin(main.kinds, [_QUERY, _PREPARE])
    begins, ends = heads.begins.copy(), heads.begins.copy()
    begins[main.rows[texts]] = _statements(data, main.take(texts))
    ends[main.rows[texts]] = main.stops[texts]
    folded = sql.fold(data, begins, ends, sql.MYSQL)
    kinds, statement = np.full(size, -1, np.int64), np.full(size, -1, np.int64)
    kinds[main.rows] = main.kinds
    executes = np.isin(main.kinds, [_EXECUTE, _BULK_EXECUTE])
    statement[main.rows[executes]] = _number(data, main.bodies[executes] + 1, 4)
    requests = np.bincount(found.take(~np.isin(found.kinds, _SILENT)).rows, minlength=size)
    names = {code: name for code, (name, _, _) in _COMMANDS.items()} | {_LOGIN: "login"}
    codes = pl.col("kind")
    return (
        folded.with_columns(
            kind=pl.Series(kinds),
            text=sql.texts(data, begins, ends),
            statement=pl.Series(statement),
            requests=pl.Series(np.maximum(requests, 1), dtype=pl.UInt32),
        )
        .with_columns(
            operation=pl.coalesce(
                "operation", codes.replace_strict(names, default=None, return_dtype=pl.String)
            ),
            detail=pl.when(pl.col("text") != "").then(pl.col("text")),
            answered=~codes.is_in(_SILENT.tolist()),
            waits=pl.lit(value=False),
            element=pl.lit(None, pl.String),
            defines=pl.lit(None, pl.String),
            uses=pl.when(~pl.col("statement").is_in([-1, _LAST_PREPARED])).then(
                pl.col("statement").cast(pl.String)
            ),
        )
        .select(REQUEST_SCHEMA.names())
        .cast(REQUEST_SCHEMA)
    )


def _parse_responses(heads: Heads) -> pl.DataFrame:
    found = [_some_responses(some) for some in sql.chunks(heads, sql.PARSED_CHUNK)]
    return pl.concat(found) if found else RESPONSE_SCHEMA.to_frame()


def _some_responses(heads: Heads) -> pl.DataFrame:
    size, data = len(heads), heads.data
    front = heads.matrix(60).astype(np.int64)
    length = front[:, 0] | front[:, 1] << 8 | front[:, 2] << 16
    after = heads.totals - length - 4
    first = _packets(heads, np.arange(size)).first()
    kinds = np.full(size, -1, np.int64)
    kinds[first.rows] = np.where(first.sequence > 0, first.kinds, -1)
    kinds[first.rows[(first.kinds == 10) & (first.sequence == 0)]] = 10
    bodies, stops = heads.begins + 4, heads.begins + np.minimum(length + 4, heads.lengths)
    failed = kinds == 0xFF
    stated = failed & (front[:, 7] == ord("#"))
    text_begins = np.minimum(np.where(stated, bodies + 9, bodies + 3), stops)
    empty = heads.begins
    state = sql.texts(
        data, np.where(stated, bodies + 4, empty), np.where(stated, bodies + 9, empty)
    )
    message = sql.texts(data, np.where(failed, text_begins, empty), np.where(failed, stops, empty))
    prepared = _prepared(front, length, after)
    place, flags = _flags(data, bodies)
    told = (kinds == 0) & ~prepared & (place + 2 <= stops)
    frame = pl.DataFrame(
        {
            "failed": failed,
            "known": kinds >= 0,
            "state": state,
            "message": message,
            "code": (front[:, 5] | front[:, 6] << 8).astype(str),
            "prepared": prepared,
            "statement": _number(data, bodies + 1, 4).astype(str),
            "told": told,
            "in_transaction": (flags & _IN_TRANSACTION) > 0,
        },
        schema_overrides={"code": pl.String, "statement": pl.String},
    )
    masked = pl.col("message").str.contains(rf"^{TOKEN_PATTERN}")
    name = pl.col("code").replace_strict(MYSQL_ERRORS, default=None, return_dtype=pl.String)
    text = pl.when(masked).then(name).otherwise(pl.col("message"))
    return (
        frame.select(
            status=pl.when("failed")
            .then(
                pl.when(pl.col("state").str.len_bytes() == 5)
                .then(pl.col("state"))
                .otherwise(pl.lit("HY000"))
            )
            .when("known")
            .then(pl.lit("OK")),
            error=pl.when("failed").then(
                pl.concat_str("code", text, separator=" ", ignore_nulls=True).str.strip_chars()
            ),
            miss=pl.lit(None, pl.Boolean),
            interim=pl.lit(value=False),
            queue=pl.lit(None, pl.String),
            element=pl.lit(None, pl.String),
            defines=pl.when("prepared").then(pl.col("statement")),
            transaction=pl.when("told").then(
                pl.when("in_transaction").then(pl.lit("T")).otherwise(pl.lit("I"))
            ),
        )
        .select(RESPONSE_SCHEMA.names())
        .cast(RESPONSE_SCHEMA)
    )


PROTOCOL: Final = Protocol(
    name="mysql",
    recognise=_recognise,
    keep=_keep,
    parse_requests=_parse_requests,
    parse_responses=_parse_responses,
)
