"""Messages grouped into exchanges: a request and its response, as one end of a connection saw them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.conversations import Conversations
from scope_ebpf.analysis.wire import Wire
from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA
from scope_ebpf.protocols.heads import Heads

Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]

NO_ROW = -1


@dataclass(frozen=True)
class Turns:
    """Where turns begin: runs of messages of one connection in one direction.

    - `first`: positions in the wire; the end of a stream is no turn
    - `asks`: whether the turn is of requests
    - `requests`, `responses`: what their heads say, one row per turn of its kind in that order;
      all null where there is no head, or none that its protocol recognises
    - `parsed`: for each turn its row there
    - `head`: for each turn its first message's row in the heads, -1: none
    """

    first: Rows
    asks: Mask
    requests: pl.DataFrame
    responses: pl.DataFrame
    parsed: Rows
    head: Rows


def find_turns(wire: Wire, spoken: Conversations, heads: Heads, rows: Rows) -> Turns:
    """Find the turns, and parse the head of each.

    A message that tells something by itself although the direction did not change is a turn of its
    own: what a server pushes to a subscriber (`queue` and `element` of a response).
    """
    bytes_moved = np.flatnonzero(wire.length > 0)
    connection, receive = wire.connection[bytes_moved], wire.receive[bytes_moved]
    changes = np.ones(len(bytes_moved), np.bool_)
    changes[1:] = (connection[1:] != connection[:-1]) | (receive[1:] != receive[:-1])
    asks_all = spoken.client != wire.receive
    head_of = np.full(len(wire), NO_ROW, np.intp)
    head_of[rows] = np.arange(len(rows))
    # candidates: each turn's first message, and responses that came after a pause
    pushed = ~changes & (head_of[bytes_moved] != NO_ROW) & ~asks_all[bytes_moved]
    first = bytes_moved[changes | pushed]
    pushed = pushed[changes | pushed]
    asks = asks_all[first]
    any_head = head_of[first]
    head = np.where(spoken.role[first] == 0, NO_ROW, any_head)
    protocol = spoken.protocol[first]
    requests, request_rows = _parse(spoken, heads, head, protocol, asks, requests=True)
    responses, response_rows = _parse(spoken, heads, head, protocol, ~asks, requests=False)
    parsed = np.where(asks, request_rows, response_rows)
    delivered = responses["queue"].is_not_null() & responses["element"].is_not_null()
    delivers = np.zeros(len(first), np.bool_)
    delivers[~asks] = delivered.to_numpy()[response_rows[~asks]]
    chosen = ~pushed | delivers
    return Turns(first[chosen], asks[chosen], requests, responses, parsed[chosen], any_head[chosen])


def _parse(
    spoken: Conversations,
    heads: Heads,
    head: Rows,
    protocol: NDArray[np.int8],
    wanted: Mask,
    *,
    requests: bool,
) -> tuple[pl.DataFrame, Rows]:
    """What the wanted turns say: a frame, and the row of each turn in it."""
    schema = REQUEST_SCHEMA if requests else RESPONSE_SCHEMA
    places = np.full(len(head), NO_ROW, np.intp)
    frames: list[pl.DataFrame] = []
    count = 0
    for index, one in enumerate(spoken.protocols):
        mine = np.flatnonzero(wanted & (protocol == index) & (head != NO_ROW))
        if not len(mine):
            continue
        parse = one.parse_requests if requests else one.parse_responses
        frames.append(parse(heads.take(head[mine])))
        places[mine] = np.arange(count, count + len(mine))
        count += len(mine)
    # one row of nulls for all that say nothing
    frames.append(pl.DataFrame({name: [None] for name in schema}, schema=schema))
    places[places == NO_ROW] = count
    return pl.concat(frames), places


def find_exchanges(
    wire: Wire, spoken: Conversations, turns: Turns
) -> tuple[pl.DataFrame, Rows, Rows]:
    """Pair the turns of each connection: each turn of requests with the responses that follow.

    Returns one row per exchange, sorted by connection and time, and for each the row of its
    request in `turns.requests` and of its response in `turns.responses`:

    - `connection`, `fd`, `protocol` (number, -1: unknown), `client` (this end asked)
    - `tgid`, `tid`, `context`: who sent or received the request's first bytes; `response_tid`: who
      moved the response's last ones; `response_context`: in which context its first ones moved
    - `start_ns`: the request was sent, or had been received; `end_ns`: the response's last bytes
      had been received or sent, null without a response
    - `asked_ns`: when the last bytes of the request moved
    - `stream`, `begin`, `exact`: the request's first byte
    - `request_bytes`, `response_bytes`
    - `delivery`: no request came first: a server pushed it to a subscriber
    - `eof_ns`: the end of the stream was read; null: it was not
    - `request_head`, `response_head`: rows in the heads, -1: none

    An HTTP 1xx response does not end its exchange: the request's body and the response follow.
    """
    if not len(turns.first):
        return _no_exchanges(), np.zeros(0, np.intp), np.zeros(0, np.intp)
    connection = wire.connection[turns.first]
    same = np.r_[False, connection[1:] == connection[:-1]]
    response_interim = np.zeros(len(turns.first), np.bool_)
    interim = turns.responses["interim"].fill_null(value=False).to_numpy()
    response_interim[~turns.asks] = interim[turns.parsed[~turns.asks]]
    after_interim = same & np.r_[False, response_interim[:-1]]
    pushed = same & ~turns.asks & np.r_[False, ~turns.asks[:-1]]
    # the end of what was asked, which came late (PostgreSQL)
    ends = turns.requests["operation"].is_in(["Flush", "Sync"]).fill_null(value=False).to_numpy()
    late = np.zeros(len(turns.first), np.bool_)
    late[turns.asks] = ends[turns.parsed[turns.asks]]
    opens = (turns.asks & ~after_interim & ~(late & same)) | pushed
    # a response whose request came before the recording
    orphans = ~turns.asks & ~same
    starts = np.flatnonzero(opens | orphans)
    first_row = turns.first[starts]
    # messages of the exchange: up to the next exchange, or the end of the connection's rows
    number = np.zeros(len(wire), np.intp)
    number[first_row] = 1
    number = np.cumsum(number) - 1
    inside = number >= 0
    # the end of a stream before a connection's first turn belongs to nobody
    inside &= wire.connection == wire.connection[first_row[np.maximum(number, 0)]]
    rows = np.flatnonzero(inside)
    groups = number[rows]
    cuts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    asks = (spoken.client != wire.receive)[rows]
    length, moved, end = wire.length[rows], wire.moved_ns[rows], wire.end_ns[rows]
    answer = ~asks & (length > 0)
    finish = np.where(answer, end, np.iinfo(np.int64).min)
    end_ns = np.maximum.reduceat(finish, cuts)
    place = np.where(answer, np.arange(len(rows)), -1)
    last_answer = np.maximum.reduceat(place, cuts)
    asked_ns = np.maximum.reduceat(np.where(asks & (length > 0), moved, 0), cuts)
    none = np.iinfo(np.int64).max
    eof_ns = np.minimum.reduceat(np.where((length == 0) & wire.receive[rows], end, none), cuts)
    tid = wire.tid[rows]
    frame = pl.DataFrame(
        {
            "connection": wire.connection[first_row],
            "fd": wire.fd[first_row],
            "protocol": spoken.protocol[first_row],
            "client": spoken.client[first_row],
            "tgid": wire.tgid[first_row],
            "tid": wire.tid[first_row],
            "context": wire.context[first_row],
            "response_tid": np.where(last_answer >= 0, tid[np.maximum(last_answer, 0)], 0),
            "response_context": np.zeros(len(starts), np.uint64),
            "start_ns": wire.moved_ns[first_row],
            "end_ns": end_ns,
            "asked_ns": asked_ns,
            "stream": wire.stream[first_row],
            "begin": wire.begin[first_row],
            "exact": wire.exact[first_row],
            "request_bytes": np.add.reduceat(np.where(asks, length, 0), cuts),
            "response_bytes": np.add.reduceat(np.where(asks, 0, length), cuts),
            "orphan": orphans[starts],
            "delivery": pushed[starts],
            "eof_ns": eof_ns,
        }
    ).with_columns(
        pl.when(pl.col("end_ns") >= 0).then("end_ns"),
        pl.when(pl.col("eof_ns") < none).then("eof_ns"),
    )
    request_turn, response_turn = _turns_of(turns, starts)
    found = response_turn >= 0
    requests = np.where(turns.asks[starts], turns.parsed[starts], len(turns.requests) - 1)
    responses = np.where(found, turns.parsed[response_turn], len(turns.responses) - 1)
    if wire.context.any():
        first_answer = turns.first[np.maximum(response_turn, 0)]
        response_context = np.where(found, wire.context[first_answer], np.uint64(0))
        frame = frame.with_columns(response_context=pl.Series(response_context))
    frame = frame.with_columns(
        request_head=np.where(turns.asks[starts], turns.head[request_turn], NO_ROW),
        response_head=np.where(found, turns.head[response_turn], NO_ROW),
    )
    return frame, requests, responses


def _turns_of(turns: Turns, starts: Rows) -> tuple[Rows, Rows]:
    """For each exchange the turn of its request, and of its response: the first not interim one."""
    number = np.zeros(len(turns.first), np.intp)
    number[starts] = 1
    number = np.cumsum(number) - 1
    response_turn = np.full(len(starts), NO_ROW, np.intp)
    answers = np.flatnonzero(~turns.asks & (number >= 0))
    interim = turns.responses["interim"].fill_null(value=False).to_numpy()
    # what begins an exchange by itself (pushed to a subscriber) is all there is of it
    final = answers[~interim[turns.parsed[answers]] | np.isin(answers, starts)]
    response_turn[number[final][::-1]] = final[::-1]
    return starts, response_turn


def _no_exchanges() -> pl.DataFrame:
    return pl.DataFrame(
        schema={
            "connection": pl.UInt32,
            "fd": pl.UInt32,
            "protocol": pl.Int8,
            "client": pl.Boolean,
            "tgid": pl.UInt32,
            "tid": pl.UInt32,
            "context": pl.UInt64,
            "response_tid": pl.UInt32,
            "response_context": pl.UInt64,
            "start_ns": pl.Int64,
            "end_ns": pl.Int64,
            "asked_ns": pl.Int64,
            "stream": pl.UInt64,
            "begin": pl.UInt64,
            "exact": pl.Boolean,
            "request_bytes": pl.Int64,
            "response_bytes": pl.Int64,
            "orphan": pl.Boolean,
            "delivery": pl.Boolean,
            "eof_ns": pl.Int64,
            "request_head": pl.Int64,
            "response_head": pl.Int64,
        }
    )
