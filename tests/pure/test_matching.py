"""Matching of sends with receives, against streams whose true positions are known."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl
import pytest

from scope_ebpf.analysis.matching import (
    CONNECTION_COLUMNS,
    MESSAGE_COLUMNS,
    dense,
    expand,
    match_messages,
    overlaps,
    stable_order,
    unwrap_positions,
)
from scope_ebpf.analysis.schema import MATCHED
from scope_ebpf.recording.readable import DIRECTION, STATUS

pytestmark = pytest.mark.pure

MESSAGE_DTYPES: dict[str, Any] = {
    "start_ns": pl.Int64, "duration_ns": pl.Int64, "tgid": pl.UInt32, "tid": pl.UInt32,
    "context": pl.UInt64, "connection": pl.UInt32, "direction": DIRECTION, "peek": pl.Boolean,
    "exact": pl.Boolean, "length_bytes": pl.UInt32, "stream": pl.UInt64, "stream_end": pl.UInt64,
    "status": STATUS, "kind": pl.String,
}  # fmt: skip
CONNECTION_DTYPES: dict[str, Any] = {
    "connection": pl.UInt32, "time_ns": pl.Int64, "kind": pl.String, "send_stream": pl.UInt64,
    "receive_stream": pl.UInt64,
}  # fmt: skip

Row = dict[str, Any]
Pair = tuple[int, int, int]


def message(direction: str, start_ns: int, end: int, length: int, **more: Any) -> Row:
    """A row of messages: of connection 1 if it is a send, else of 2, which is its other end."""
    connection = 1 if direction == "send" else 2
    return {
        "start_ns": start_ns, "duration_ns": 5, "tgid": 100 * connection, "tid": connection,
        "context": 0, "connection": connection, "direction": direction, "peek": False,
        "exact": True, "length_bytes": length, "stream": 7, "stream_end": end,
        "status": "complete", "kind": "tcp", **more,
    }  # fmt: skip


def frame(rows: Iterable[Row]) -> pl.DataFrame:
    found = pl.DataFrame(list(rows), schema=MESSAGE_DTYPES)
    assert set(MESSAGE_COLUMNS) <= set(found.columns)
    return found


def connection(number: int, send: int, receive: int, kind: str = "tcp", time_ns: int = 0) -> Row:
    return {
        "connection": number, "time_ns": time_ns, "kind": kind, "send_stream": send,
        "receive_stream": receive,
    }  # fmt: skip


def connections(*rows: Row) -> pl.DataFrame:
    found = pl.DataFrame(list(rows), schema=CONNECTION_DTYPES)
    assert set(found.columns) == set(CONNECTION_COLUMNS)
    return found


BOTH = connections(connection(1, 7, 8), connection(2, 8, 7))


def pairs(matched: pl.DataFrame) -> list[Pair]:
    """Starts of the send and of the receive, and the bytes that both moved."""
    both = matched.filter(pl.col("unmatched").is_null())
    return sorted(both.select("send_start_ns", "receive_start_ns", "length_bytes").rows())


def reasons(matched: pl.DataFrame) -> dict[int, str]:
    """By the start of each message that is unmatched."""
    alone = matched.filter(pl.col("unmatched").is_not_null())
    start = pl.coalesce("send_start_ns", "receive_start_ns")
    assert alone.select(start).n_unique() == len(alone)
    return dict(alone.select(start, "unmatched").iter_rows())


class World:
    """Streams with true positions, cut at random at both ends, and what a recording has of them."""

    def __init__(self, seed: int, *, reuse: bool) -> None:
        self.rng = random.Random(seed)
        self.rows: list[Row] = []
        self.true: list[tuple[int, int, int]] = []  # of each row: its conversation, begin and end
        self.connections: list[Row] = []
        self.clock = 1_000_000
        for number in range(self.rng.randint(1, 5)):
            kind = self.rng.choice(["tcp", "tcp", "unix", "pipe"])
            stream = self.rng.getrandbits(64)
            for _ in range(self.rng.randint(1, 4) if reuse and kind == "tcp" else 1):
                self.clock += 1000  # longer than any call waits
                self.converse(kind, stream, number)

    def tick(self) -> int:
        self.clock += self.rng.randint(2, 50)
        return self.clock

    def converse(self, kind: str, stream: int, number: int) -> None:
        """One connection, or one pipe; the next one on the same stream comes after it."""
        rng = self.rng
        ids = [len(self.connections) + 1, len(self.connections) + 2]
        if kind == "pipe":
            ids[1] = ids[0]
            self.connections.append(connection(ids[0], stream, stream, kind, self.clock))
        else:
            self.connections.append(connection(ids[0], stream, stream ^ 1, kind, self.clock))
            self.connections.append(connection(ids[1], stream ^ 1, stream, kind, self.clock + 1))
        conversation = len(self.connections)
        largest = rng.choice([3, 40, 5000, 2**28])
        origin = rng.choice([rng.getrandbits(32), 2**32 - rng.randint(0, 3 * largest)])
        origin += 0 if kind == "tcp" else 2**40
        sent = received = 0
        total = rng.randint(1, 40) * largest // 2 + 1
        first_receives: list[int] = []
        while received < total:
            if sent < total and (
                sent == received or (rng.random() < 0.5 and sent - received < 2**30)
            ):
                size = min(rng.randint(1, largest), total - sent)
                waiting = rng.randint(0, 1)
                sent += size
                self.add(conversation, kind, stream, ids[0], "send", origin + sent, size, waiting)
                continue
            size = min(rng.randint(1, largest), sent - received)
            if rng.random() < 0.1:
                self.add(conversation, kind, stream, ids[1], "receive", origin + received + size,
                         size, 0, peek=True)  # fmt: skip
            received += size
            waited = rng.choice([0, 0, 400])
            self.add(conversation, kind, stream, ids[1], "receive", origin + received, size, waited)
            first_receives.append(self.clock)
        self.add(conversation, kind, stream, ids[1], "receive", origin + received, 0, 3)

    def add(self, conversation: int, kind: str, stream: int, of: int, direction: str, end: int,
            length: int, duration: int, *, peek: bool = False) -> None:  # fmt: skip
        """A call that moves bytes now, after it waited; a pipe has several readers and writers."""
        now = self.tick()
        start = now - duration if direction == "receive" else now
        # starts tell rows apart
        while any(row["start_ns"] == start for row in self.rows):
            start -= 1
        duration = now - start if direction == "receive" else duration
        tid = self.rng.randint(1, 3) if kind == "pipe" else 1
        self.rows.append(
            message(
                direction, start, end % 2**32 if kind == "tcp" else end, length, connection=of,
                stream=stream, kind=kind, duration_ns=duration, tid=1000 * of + tid, peek=peek,
            )
        )  # fmt: skip
        self.true.append((conversation, end - length, end))

    def expected(self, kept: Iterable[int]) -> list[Pair]:
        """Every pair of a send and a receive, compared by their true positions."""
        kept = [at for at in kept if self.rows[at]["length_bytes"] and not self.rows[at]["peek"]]
        found = []
        for send in (at for at in kept if self.rows[at]["direction"] == "send"):
            for receive in (at for at in kept if self.rows[at]["direction"] == "receive"):
                (one, begin, end), (other, from_, upto) = self.true[send], self.true[receive]
                shared = min(end, upto) - max(begin, from_)
                if one == other and shared > 0:
                    starts = self.rows[send]["start_ns"], self.rows[receive]["start_ns"]
                    found.append((*starts, shared))
        return sorted(found)


@pytest.mark.parametrize("given", ["connections", "no connections"])
@pytest.mark.parametrize("missing", ["nothing", "prefix", "suffix", "some"])
def test_as_the_true_positions_say(missing, given):
    """Any segmentation, wraps, ports that are used again, several readers; any rows missing."""
    checked = 0
    for seed in range(60):
        # a sender and a receiver of different connections look like one if that is all there is
        world = World(seed, reuse=given == "connections" or missing in ("nothing", "some"))
        rng = random.Random(-seed)
        numbers = list(range(len(world.rows)))
        if missing == "some":
            kept = [at for at in numbers if rng.random() < 0.8]
        elif missing == "nothing":
            kept = numbers
        else:
            # each end is recorded from, or up to, a moment of its own
            cut = {row["connection"]: rng.choice(world.rows)["start_ns"] for row in world.rows}
            kept = [
                at
                for at in numbers
                if (world.rows[at]["start_ns"] < cut[world.rows[at]["connection"]])
                == (missing == "suffix")
            ]
        rng.shuffle(kept)
        messages = frame(world.rows[at] for at in kept)
        table = connections(*world.connections) if given == "connections" else None
        matched = match_messages(messages, table)
        assert matched.schema == MATCHED
        expected = world.expected(kept)
        assert pairs(matched) == expected, f"seed {seed}"
        checked += len(expected)
        moved = messages.filter((pl.col("length_bytes") > 0) & ~pl.col("peek"))
        if missing == "nothing":
            assert matched["unmatched"].null_count() == len(matched)
            sends = moved.filter(pl.col("direction") == "send")
            assert matched["length_bytes"].sum() == sends["length_bytes"].cast(pl.Int64).sum()
        # every message is in a pair or has a reason, and never both
        paired = {start for pair in pairs(matched) for start in pair[:2]}
        alone = reasons(matched)
        assert paired.isdisjoint(alone)
        assert paired | set(alone) == set(moved["start_ns"])
        assert matched.equals(match_messages(messages, table))
    assert checked > 500


def test_columns_are_those_of_both_sides():
    rows = [
        message("send", 10, 100, 30, context=5, duration_ns=2),
        message("receive", 8, 95, 40, context=6, duration_ns=9),
    ]
    assert match_messages(frame(rows), BOTH).rows(named=True) == [
        {
            "stream": 7, "length_bytes": 25, "send_start_ns": 10, "send_duration_ns": 2,
            "send_tgid": 100, "send_tid": 1, "send_context": 5, "send_connection": 1,
            "receive_start_ns": 8, "receive_duration_ns": 9, "receive_tgid": 200, "receive_tid": 2,
            "receive_context": 6, "receive_connection": 2, "unmatched": None,
        }
    ]  # fmt: skip


def test_nothing():
    for table in (None, BOTH):
        matched = match_messages(frame([]), table)
        assert matched.is_empty()
        assert matched.schema == MATCHED


def test_an_unmatched_message_has_one_side_only():
    (row,) = match_messages(frame([message("receive", 8, 95, 40)]), BOTH).rows(named=True)
    assert row["length_bytes"] == 40
    assert [name for name, value in row.items() if name.startswith("send_") and value] == []
    assert (row["receive_start_ns"], row["receive_connection"], row["stream"]) == (8, 2, 7)


TALK = [
    message("send", 10, 100, 50),  # received before its receiver was recorded
    message("send", 20, 110, 10),
    message("receive", 21, 110, 10),
    message("send", 30, 120, 10),  # received by somebody who is not traced, or that was lost
    message("send", 40, 130, 10),
    message("receive", 41, 130, 10),
    message("send", 50, 140, 10),  # not received so far
]


def test_reasons_of_sends():
    matched = match_messages(frame(TALK), BOTH)
    assert pairs(matched) == [(20, 21, 10), (40, 41, 10)]
    assert reasons(matched) == {
        10: "before the recording", 30: "peer not traced", 50: "never received",
    }  # fmt: skip


def test_reasons_of_receives():
    rows = [
        message("receive", 10, 100, 50),
        message("send", 20, 110, 10),
        message("receive", 21, 110, 10),
        message("receive", 31, 120, 10),
        message("send", 40, 130, 10),
        message("receive", 41, 130, 10),
        message("receive", 51, 140, 10),
    ]
    matched = match_messages(frame(rows), BOTH)
    assert reasons(matched) == {
        10: "before the recording", 31: "peer not traced", 51: "peer not traced",
    }  # fmt: skip


def test_what_was_lost():
    """With losses, a message that should have another side may have lost it."""
    losses = pl.DataFrame({"table": ["offcpu", "messages"], "lost": [3, 1]})
    assert reasons(match_messages(frame(TALK), BOTH, losses)) == {
        10: "before the recording", 30: "lost", 50: "lost",
    }  # fmt: skip
    others = losses.filter(pl.col("table") == "offcpu")
    assert reasons(match_messages(frame(TALK), BOTH, others))[30] == "peer not traced"
    unknown = message("send", 5, 10, 3, stream=None)
    assert reasons(match_messages(frame([unknown]), BOTH)) == {5: "lost"}


def test_an_end_that_is_not_recorded():
    rows = frame(
        [message("send", 10, 100, 50), message("receive", 60, 9, 9, stream=8, connection=1)]
    )
    alone = connections(connection(1, 7, 8))
    assert reasons(match_messages(rows, alone)) == {10: "peer not traced", 60: "peer not traced"}
    # it is there, but moved nothing in this direction
    assert reasons(match_messages(rows, BOTH)) == {
        10: "never received", 60: "before the recording",
    }  # fmt: skip


def test_a_pipe_has_one_connection_for_both_ends():
    """Its row in connections does not tell whether anybody reads it."""
    rows = frame([message("send", 10, 2**30 + 50, 50, kind="pipe")])
    table = connections(connection(1, 7, 7, "pipe"))
    assert reasons(match_messages(rows, table)) == {10: "peer not traced"}


def test_what_cannot_be_compared():
    rows = [
        message("send", 10, 100, 50, exact=False),
        message("receive", 11, 100, 50, exact=False),
        # two sends of one end cannot have the same bytes
        message("send", 30, 200, 50),
        message("send", 31, 190, 50),
        message("receive", 32, 200, 60),
        message("send", 40, 210, 10),
        message("receive", 41, 210, 10),
    ]
    matched = match_messages(frame(rows), BOTH)
    assert pairs(matched) == [(40, 41, 10)]
    found = reasons(matched)
    assert {found[at] for at in (10, 11, 30, 31)} == {"inexact"}


def test_nothing_is_received_before_it_was_sent():
    rows = [
        message("receive", 10, 100, 50, duration_ns=4),
        message("send", 20, 100, 50),
        message("send", 30, 110, 10),
        message("receive", 31, 110, 10),
    ]
    matched = match_messages(frame(rows), BOTH)
    assert pairs(matched) == [(30, 31, 10)]
    assert reasons(matched) == {10: "inexact", 20: "inexact"}


def test_a_port_that_is_used_again_at_the_same_positions():
    """Two connections with the same addresses and sequence numbers do not mix."""
    rows = [message("send", 10, 100, 50), message("receive", 11, 100, 50)]
    rows += [message("send", 30, 100, 20, connection=3)]
    rows += [message("receive", 40, 100, 20, connection=4)]
    expected = [(10, 11, 50), (30, 40, 20)]
    assert pairs(match_messages(frame(rows))) == expected
    table = connections(
        connection(1, 7, 8, time_ns=1), connection(2, 8, 7, time_ns=2),
        connection(3, 7, 8, time_ns=25), connection(4, 8, 7, time_ns=26),
    )  # fmt: skip
    assert pairs(match_messages(frame(rows), table)) == expected
    # of the second only one end is recorded
    assert pairs(match_messages(frame(rows[:3]))) == expected[:1]
    assert reasons(match_messages(frame(rows[:3]))) == {30: "peer not traced"}
    # of the first only one end is recorded
    assert pairs(match_messages(frame([rows[0], *rows[2:]]))) == expected[1:]


@pytest.mark.parametrize("seed", range(5))
def test_garbage(seed):
    """Any columns give a table: each message that moved bytes has one row or more."""
    rng = np.random.default_rng(seed)
    count = 2000
    largest = 2**64 - 1

    def numbers(high: int) -> np.ndarray[Any, Any]:
        few = np.array([0, 1, high - 1, high, high // 2], np.uint64)
        return few[rng.integers(0, len(few), count)]

    rows = pl.DataFrame(
        {
            "start_ns": np.arange(count), "duration_ns": rng.integers(0, 9, count),
            "tgid": numbers(9), "tid": numbers(9), "context": numbers(9),
            "connection": numbers(2**32 - 2), "length_bytes": numbers(2**32 - 2),
            "stream": numbers(largest), "stream_end": rng.integers(0, largest, count, np.uint64),
            "direction": rng.choice(["send", "receive"], count), "kind": rng.choice(["tcp", "x"], count),
            "peek": rng.random(count) < 0.1, "exact": rng.random(count) < 0.9,
            "status": ["complete"] * count,
        },
        schema_overrides=MESSAGE_DTYPES,
    )  # fmt: skip
    matched = match_messages(rows.select(list(MESSAGE_DTYPES)))
    moved = rows.filter((pl.col("length_bytes") > 0) & ~pl.col("peek"))
    seen = pl.concat([matched["send_start_ns"], matched["receive_start_ns"]]).drop_nulls().unique()
    assert sorted(seen) == sorted(moved["start_ns"])
    assert (matched["length_bytes"] > 0).all()


def test_positions_do_not_wrap():
    """Any moves of less than 2**31 give back the true positions, stream by stream."""
    rng = np.random.default_rng(1)
    group = rng.integers(0, 70_000, 300_000).astype(np.int32)
    group[rng.random(len(group)) < 0.5] = 65_537
    time = rng.permutation(len(group))
    order = np.lexsort((time, group))
    true = np.empty(len(group), np.int64)
    true[order] = 2**50 + np.cumsum(rng.integers(-(2**30), 2**31, len(group)))
    wraps = group % 2 == 0
    shown = np.where(wraps, true % 2**32, true).astype(np.uint64)
    found, position = unwrap_positions(group, time, shown, wraps)
    assert np.array_equal(found, order)
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    begin = np.repeat(true[order][first], np.diff(np.append(first, len(order))))
    # steps within a stream are those of the true positions, as long as none is too large
    large = np.abs(np.diff(true[order], prepend=true[order][0])) >= 2**31
    assert not large.any()
    assert np.array_equal(position, true[order] - begin)


def test_the_arithmetic_of_ranges():
    rng = np.random.default_rng(3)
    for _ in range(200):
        edges = np.unique(rng.integers(0, 60, 12))
        begin, end = edges[:-1], edges[1:]
        kept = rng.random(len(begin)) < 0.7
        begin, end = begin[kept], end[kept]
        asked = rng.integers(0, 60, 9)
        upto = asked + rng.integers(1, 20, 9)
        found = zip(*expand(*overlaps(asked, upto, begin, end)), strict=True)
        expected = [
            (one, other)
            for one in range(9)
            for other in range(len(begin))
            if asked[one] < end[other] and begin[other] < upto[one]
        ]
        assert [(int(one), int(other)) for one, other in found] == expected


def test_small_numbers_and_orders():
    rng = np.random.default_rng(4)
    for high in (1, 300, 70_000, 2**31 - 1):
        codes = rng.integers(0, high, 5000).astype(np.int32)
        assert np.array_equal(stable_order(codes), np.argsort(codes, kind="stable"))
        different, which = dense(codes.astype(np.int64))
        assert np.array_equal(different, np.unique(codes))
        assert np.array_equal(different[which], codes)
