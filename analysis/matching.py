"""Finds for each message the other end's message that moved the same bytes.

A send and a receive belong together if their byte ranges in one stream overlap. Nothing is guessed:
what cannot be compared stays unmatched, with the reason.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.schema import MATCHED
from scope_ebpf.recording.reader import Recording

Rows = NDArray[np.intp]
Numbers = NDArray[np.int64]
Words = NDArray[np.uint64]
Mask = NDArray[np.bool_]

# Their positions are sequence numbers of 32 bits (RFC 9293, section 3.4); all others have 64.
WRAPPING_KINDS: Final = ("tcp", "mptcp")

# All streams are laid on one line of 64-bit positions; this much of it is used at most.
_LINE: Final = 2**62

_NEVER_NS: Final = np.iinfo(np.int64).max

REASONS: Final = (
    "inexact",
    "lost",
    "peer not traced",
    "before the recording",
    "never received",
)
_INEXACT, _LOST, _NOT_TRACED, _BEFORE, _NEVER = range(len(REASONS))
# Statuses of calls that ran when the recording began.
_BEGAN_BEFORE: Final = ("began_before", "throughout")

_SIDE: Final = ["start_ns", "duration_ns", "tgid", "tid", "context", "connection"]
# What has to be read of messages, and of connections.
MESSAGE_COLUMNS: Final = [
    *_SIDE, "direction", "peek", "exact", "length_bytes", "stream", "stream_end", "status",
]  # fmt: skip
CONNECTION_COLUMNS: Final = ["connection", "time_ns", "kind", "send_stream", "receive_stream"]


def match_messages(
    messages: pl.DataFrame,
    connections: pl.DataFrame | None = None,
    losses: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Match sends with receives by the bytes that both moved; columns are those of `MATCHED`.

    One row per overlap of a send with a receive, in the order of stream and position. Then one row
    per message of which no byte was matched, in the order of `messages`, with the reason in
    `unmatched`:

    - `inexact`: its position is not comparable, or contradicts other positions or the clock
    - `lost`: events were lost, so that the other side's message may be among them; or the row of
      its own connection is
    - `peer not traced`: no traced process was seen to hold the other end, or to move these bytes
    - `before the recording`: the other end moved them before anything of it was recorded
    - `never received`: the other end is recorded, and never read so far

    Peeks and messages without bytes have no row. Needs the columns `MESSAGE_COLUMNS` of a
    recording's messages, in any order of rows, and `CONNECTION_COLUMNS` of its connections. Without
    connections, messages must have `kind`, and an end that moved nothing counts as not traced.

    Positions are as exact as the recording: threads that read one pipe in the same instant may have
    their ranges swapped (see probes/messages.h).

    >>> matched = match_messages(messages, connections)  # doctest: +SKIP
    """
    length = messages["length_bytes"].to_numpy()
    receive = (messages["direction"] == "receive").to_numpy()
    moved = (length > 0) & ~messages["peek"].to_numpy()
    known = messages["stream"].is_not_null().to_numpy()
    exact = messages["exact"].to_numpy()
    rows = np.flatnonzero(moved & known)
    start = messages["start_ns"].to_numpy()
    duration = messages["duration_ns"].to_numpy()
    moved_ns = start + np.where(receive, duration, 0)
    group, wraps, two_ends = _groups(messages, rows, receive, moved_ns, connections)
    comparable = exact[rows]
    positioned = rows[comparable]
    sends, receives, unclear = _lay_out(
        messages, positioned, group[comparable], wraps[comparable], receive, moved_ns
    )
    first, count = overlaps(receives.begin, receives.end, sends.begin, sends.end)
    receive_at, send_at = expand(first, count)
    shared = np.minimum(sends.end[send_at], receives.end[receive_at]) - np.maximum(
        sends.begin[send_at], receives.begin[receive_at]
    )
    send_row, receive_row = sends.row[send_at], receives.row[receive_at]
    # nothing is received before it was sent: such a pair is of two connections, or of a wrong count
    possible = moved_ns[receive_row] >= moved_ns[send_row]
    send_row, receive_row, shared = send_row[possible], receive_row[possible], shared[possible]

    matched = np.zeros(len(messages), np.bool_)
    matched[send_row] = True
    matched[receive_row] = True
    reason = np.full(len(messages), _LOST, np.int8)
    reason[rows[~comparable]] = _INEXACT
    reason[unclear] = _INEXACT
    lost = _lost_messages(losses)
    for side, other, was_sent in ((sends, receives, True), (receives, sends, False)):
        open_ = ~matched[side.row]
        alone = side.take(open_)
        began = messages["status"].gather(alone.row).cast(pl.String).is_in(_BEGAN_BEFORE)
        early = began.fill_null(False).to_numpy() & (not was_sent)
        reason[alone.row] = _reasons(alone, other, two_ends, early, was_sent=was_sent, lost=lost)
    # a pair that the clock contradicts
    for at, side in ((send_at, sends), (receive_at, receives)):
        impossible = side.row[at[~possible]]
        reason[impossible] = _INEXACT
    rest = np.flatnonzero(moved & ~matched)
    return _frame(messages, send_row, receive_row, shared, rest, receive, reason)


def match_recording(recording: Recording) -> pl.DataFrame:
    """What `match_messages` finds in a recording; only the columns that it needs are read."""
    return match_messages(
        recording.collect(recording.messages.select(MESSAGE_COLUMNS)),
        recording.collect(recording.connections.select(CONNECTION_COLUMNS)),
        recording.collect(recording.losses.select("table")),
    )


def unwrap_positions(
    group: NDArray[np.int32], moved_ns: Numbers, stream_end: Words, wraps: Mask
) -> tuple[Rows, Numbers]:
    """Positions in streams as 64-bit numbers that do not wrap, the same for both ends.

    Each element is a message: `group` is a number for its stream, small and from 0 on, `moved_ns`
    when its bytes moved (the end of a receive, the start of a send), `stream_end` where they end,
    and `wraps` whether only 32 bits of that are meaningful.

    Returns the order of messages by group and time, and for each in that order where it ends,
    counted from the end of its group's first message. Each position follows from the one before it
    by a difference of less than 2**31 bytes, whichever end it is of, so both ends must be given.

    >>> end = np.array([2**32 - 5, 20, 2**32 - 1], np.uint64)
    >>> order, position = unwrap_positions(
    ...     np.zeros(3, np.int32), np.array([1, 3, 2]), end, np.ones(3, bool)
    ... )
    >>> order.tolist(), position.tolist()
    ([0, 2, 1], [0, 4, 25])
    """
    order = np.argsort(moved_ns, kind="stable")
    order = order[stable_order(group[order])]
    step = np.diff(stream_end[order], prepend=stream_end[order[:1]]).view(np.int64)
    narrow = step.astype(np.int32)  # the signed difference of 32 bits
    position = np.cumsum(np.where(wraps[order], narrow, step))
    begins = _run_begins(group[order])
    size = np.diff(np.append(begins, len(order)))
    return order, position - np.repeat(position[begins], size)


def overlaps(
    begin: Numbers, end: Numbers, other_begin: Numbers, other_end: Numbers
) -> tuple[Rows, Rows]:
    """For each range [begin, end) which of the other ranges it overlaps: the first, and how many.

    The other ranges must be sorted and must not overlap each other. None of the ranges is empty.

    >>> overlaps(np.array([5]), np.array([9]), np.array([0, 4, 8]), np.array([4, 8, 12]))
    (array([1]), array([2]))
    """
    first = np.searchsorted(other_end, begin, "right")
    behind = np.searchsorted(other_begin, end, "left")
    return first, np.maximum(behind - first, 0)


def expand(first: Rows, count: Rows) -> tuple[Rows, Rows]:
    """What `overlaps` returns as pairs: the number of the range, and of the other one.

    >>> expand(np.array([1, 7, 4]), np.array([2, 0, 1]))
    (array([0, 0, 2]), array([1, 2, 4]))
    """
    of = np.repeat(np.arange(len(first)), count)
    nth = np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
    return of, first[of] + nth


def stable_order(codes: NDArray[np.int32]) -> Rows:
    """The order that sorts numbers >= 0, equal ones as they come.

    NumPy sorts 16-bit numbers by radix, several times as fast as wider ones by merging.

    >>> stable_order(np.array([70000, 3, 70000, 1], np.int32)).tolist()
    [3, 1, 0, 2]
    """
    order = np.argsort((codes & 0xFFFF).astype(np.uint16), kind="stable")
    if codes.max(initial=0) > 0xFFFF:
        order = order[np.argsort((codes >> 16)[order].astype(np.uint16), kind="stable")]
    return order


def dense(keys: Numbers) -> tuple[Numbers, NDArray[np.int32]]:
    """The different numbers >= 0, sorted, and for each number which of them it is.

    >>> dense(np.array([7, 3, 7]))
    (array([3, 7]), array([1, 0, 1], dtype=int32))
    """
    top = int(keys.max(initial=0)) + 1
    if top > 4 * len(keys) + 1_000_000:
        different, which = np.unique(keys, return_inverse=True)
        return different, which.astype(np.int32)
    seen = np.zeros(top, np.bool_)
    seen[keys] = True
    number = np.cumsum(seen, dtype=np.int32) - np.int32(1)
    return np.flatnonzero(seen), number[keys]


class _Side:
    """Sends or receives, sorted by where they are on the line; none overlaps another."""

    def __init__(self, row: Rows, group: NDArray[np.int32], begin: Numbers, end: Numbers) -> None:
        self.row, self.group, self.begin, self.end = row, group, begin, end

    def take(self, which: Mask | Rows) -> _Side:
        return _Side(self.row[which], self.group[which], self.begin[which], self.end[which])


def _groups(
    messages: pl.DataFrame,
    rows: Rows,
    receive: Mask,
    moved_ns: Numbers,
    connections: pl.DataFrame | None,
) -> tuple[NDArray[np.int32], Mask, Mask]:
    """A number for the stream of each of the rows, and whether its positions wrap; per number
    whether both ends of the stream are recorded.

    A port that is used again gives a later connection the same stream: it gets another number.
    """
    key = messages["connection"].to_numpy().astype(np.int64)[rows] * 2 + receive[rows]
    keys, end_of = dense(key)
    del key
    example = np.zeros(len(keys), np.intp)
    example[end_of] = rows
    stream = messages["stream"].gather(example).to_numpy()
    first_ns, last_ns = np.full(len(keys), _NEVER_NS), np.zeros(len(keys), np.int64)
    np.minimum.at(first_ns, end_of, moved_ns[rows])
    np.maximum.at(last_ns, end_of, moved_ns[rows])
    silent = keys[:0]
    if connections is None:
        wraps = messages["kind"].gather(example).is_in(WRAPPING_KINDS).to_numpy()
    else:
        # also ends that moved nothing; of a pipe they cannot be told, it has one row for both
        table = _ends(connections)
        others = table.filter(~pl.col("pipe"))["end"].to_numpy()
        silent = np.setdiff1d(others, keys)
        told = pl.DataFrame({"end": np.concatenate([keys, silent])}).join(
            table, on="end", how="left", maintain_order="left"
        )
        wraps = told["wraps"].fill_null(False).to_numpy()[: len(keys)]
        of_silent = told[len(keys) :]
        stream = np.concatenate([stream, of_silent["stream"].to_numpy()])
        first_ns = np.concatenate([first_ns, of_silent["time_ns"].to_numpy()])
        last_ns = np.concatenate([last_ns, np.full(len(silent), _NEVER_NS)])
    receives = np.concatenate([keys, silent]) % 2 == 1
    number = _number_pairs(stream, receives, first_ns, last_ns)
    two_ends = np.bincount(number, minlength=1) > 1
    return number[end_of], wraps[end_of], two_ends


def _number_pairs(
    stream: Words, receives: Mask, first_ns: Numbers, last_ns: Numbers
) -> NDArray[np.int32]:
    """A number for each end, the same for the two ends of one connection.

    Ends of a stream follow each other in time as send, receive, send, receive, since the first byte
    is sent before it is received. Two of one kind in a row are of two connections, of which one has
    an end that is not recorded. So are a receive and a send if nothing was received after the send:
    a receive comes first only if the sender was recorded from later on.

    What is left is a sender of one connection and a receiver of a later one, while nothing at all is
    known of both other ends. Sequence numbers then differ, as they go on with time (RFC 6528).
    """
    order = np.lexsort((first_ns, stream))
    stream, receives = stream[order], receives[order]
    first_ns, last_ns = first_ns[order], last_ns[order]
    goes_on = np.zeros(len(order), np.bool_)
    goes_on[1:] = (stream[1:] == stream[:-1]) & (receives[1:] != receives[:-1])
    goes_on[1:] &= ~(receives[:-1] & (last_ns[:-1] < first_ns[1:]))
    place = np.arange(len(order))
    in_run = place - np.maximum.accumulate(np.where(goes_on, 0, place))
    number = np.empty(len(order), np.int32)
    number[order] = np.cumsum(in_run % 2 == 0) - 1
    return number


def _ends(connections: pl.DataFrame) -> pl.DataFrame:
    """Both directions of each connection, the sending one with an even number."""
    plain = connections.select(
        pl.col("connection").cast(pl.Int64) * 2,
        "time_ns",
        "send_stream",
        "receive_stream",
        (pl.col("send_stream") == pl.col("receive_stream")).alias("pipe"),
        pl.col("kind").is_in(WRAPPING_KINDS).alias("wraps"),
    ).unique("connection", keep="last")
    rest = ["time_ns", "pipe", "wraps"]
    end, stream = pl.col("connection").alias("end"), pl.col("send_stream").alias("stream")
    sends = plain.select(end, stream, *rest)
    receives = plain.select(end + 1, pl.col("receive_stream").alias("stream"), *rest)
    return pl.concat([sends, receives])


def _lay_out(
    messages: pl.DataFrame,
    rows: Rows,
    group: NDArray[np.int32],
    wraps: Mask,
    receive: Mask,
    moved_ns: Numbers,
) -> tuple[_Side, _Side, Rows]:
    """Sends and receives on one line, on which each stream has a part of its own.

    Returns also the rows whose ranges contradict others: two messages of one end cannot have moved
    the same bytes, and no stream is as long as garbage can make it.
    """
    stream_end = messages["stream_end"].to_numpy()[rows]
    order, end = unwrap_positions(group, moved_ns[rows], stream_end, wraps)
    del stream_end
    row, group = rows[order], group[order]
    begin = end - messages["length_bytes"].to_numpy()[row]
    if not len(row):
        nothing = _Side(row, group, begin, end)
        return nothing, nothing, row
    begins = _run_begins(group)
    size = np.diff(np.append(begins, len(row)))
    lowest = np.minimum.reduceat(begin, begins)
    highest = np.maximum.reduceat(end, begins)
    limit = _LINE // (2 * len(begins))
    sane = (lowest > -limit) & (highest < limit)
    # a gap of one, so that no range touches another stream's
    extent = np.where(sane, highest - lowest + 1, 0)
    shift = np.repeat(np.cumsum(extent) - extent - np.where(sane, lowest, 0), size)
    begin += shift
    end += shift
    sane_row = np.repeat(sane, size)
    unclear = [row[~sane_row]]
    sides = []
    for wanted in (False, True):
        side = _Side(row, group, begin, end).take(sane_row & (receive[row] == wanted))
        if np.any(side.begin[1:] < side.begin[:-1]):
            side = side.take(np.argsort(side.begin, kind="stable"))
        clear = np.ones(len(side.row), np.bool_)
        clear[1:] &= side.begin[1:] >= np.maximum.accumulate(side.end)[:-1]
        clear[:-1] &= side.end[:-1] <= side.begin[1:]
        unclear.append(side.row[~clear])
        sides.append(side if clear.all() else side.take(clear))
    return sides[0], sides[1], np.concatenate(unclear)


def _reasons(
    side: _Side, other: _Side, two_ends: Mask, early: Mask, *, was_sent: bool, lost: bool
) -> NDArray[np.int8]:
    """Why messages of one side have nothing on the other; `early`: the call began before."""
    absent = _LOST if lost else _NOT_TRACED
    reason = np.full(len(side.row), absent, np.int8)
    # streams lie on the line in the order of their numbers
    first = np.searchsorted(other.group, side.group, "left")
    behind = np.searchsorted(other.group, side.group, "right")
    some = behind > first
    at = np.where(some, first, 0)
    last = np.where(some, behind - 1, 0)
    if len(other.row):
        before = some & (side.end <= other.begin[at])
        after = some & (side.begin >= other.end[last])
    else:
        before = after = np.zeros(len(side.row), np.bool_)
    if was_sent:
        reason[after | ~some] = _LOST if lost else _NEVER
        reason[before] = _BEFORE
    else:
        # of an other end that sent nothing since, all was before
        reason[before | ~some | early] = _BEFORE
    reason[~two_ends[side.group]] = _NOT_TRACED
    return reason


def _lost_messages(losses: pl.DataFrame | None) -> bool:
    """Whether messages were lost, or threads that may have had some."""
    if losses is None:
        return False
    return not losses.filter(pl.col("table").is_in(["messages", "tasks"])).is_empty()


def _frame(
    messages: pl.DataFrame,
    send_row: Rows,
    receive_row: Rows,
    shared: Numbers,
    rest: Rows,
    receive: Mask,
    reason: NDArray[np.int8],
) -> pl.DataFrame:
    """The table, from pairs of rows and the rows that are left."""
    pairs = len(send_row)
    received = receive[rest]
    none = np.iinfo(np.uint32).max  # of a side that a row does not have
    sent_at = np.concatenate([send_row, np.where(received, none, rest)])
    received_at = np.concatenate([receive_row, np.where(received, rest, none)])
    either = np.concatenate([send_row, rest])
    why = np.concatenate([np.full(pairs, -1, np.int8), reason[rest]])
    length = messages["length_bytes"].to_numpy()[rest].astype(np.int64)
    columns = [
        messages["stream"].gather(either),
        pl.Series("length_bytes", np.concatenate([shared, length])),
    ]
    for prefix, at in (("send_", sent_at), ("receive_", received_at)):
        places = pl.Series(at.astype(np.uint32))
        places = places.set(places == none, None) if len(rest) else places
        columns += [messages[name].gather(places).alias(prefix + name) for name in _SIDE]
    texts = pl.Series(REASONS, dtype=pl.String)
    reasons = pl.Series(why)
    columns.append(texts.gather(reasons.set(reasons < 0, None)).alias("unmatched"))
    return pl.DataFrame(columns).select(pl.col(name).cast(dtype) for name, dtype in MATCHED.items())


def _run_begins(values: NDArray[np.int32]) -> Rows:
    """Where each run of equal neighbours begins."""
    if not len(values):
        return np.zeros(0, np.intp)
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
