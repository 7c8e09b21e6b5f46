"""SlotRing against a producer that takes, fills and commits slots as the probes do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scope_ebpf.loaders.ring import SlotRing, array_in

pytestmark = pytest.mark.pure

SLOT = np.dtype([("sequence", "<u4"), ("kind", "<u4"), ("value", "<u8"), ("rest", "V48")])


class Producer:
    """What probes/state.h does: reserve moves the head, commit writes the sequence last."""

    def __init__(self, capacity: int, start: int = 0) -> None:
        self.capacity = capacity
        self.slots = array_in(bytearray(capacity * SLOT.itemsize), SLOT, capacity)
        # what the ring held one round before: slots that look complete, but for another index
        for index in range(max(start - capacity, 0), start):
            self.slots[index % capacity] = (np.uint32((index + 1) & 0xFFFFFFFF), 9, index, b"")
        self.head = np.array([start], np.uint64)
        self.tail = np.array([start], np.uint64)
        self.ring = SlotRing(self.slots, self.head, self.tail)

    def reserve(self, margin: int = 0) -> int | None:
        if int(self.head[0]) - int(self.tail[0]) >= self.capacity - margin:
            return None
        index = int(self.head[0])
        self.head[0] = index + 1
        self.slots[index % self.capacity]["value"] = index  # part of it is written, not all
        return index

    def commit(self, index: int) -> None:
        slot = self.slots[index % self.capacity]
        slot["kind"], slot["rest"] = 7, index.to_bytes(6, "little") * 8
        slot["sequence"] = (index + 1) & 0xFFFFFFFF

    def produce(self, count: int) -> None:
        for _ in range(count):
            index = self.reserve()
            assert index is not None
            self.commit(index)


def check(first: int, slots) -> list[int]:
    """The indices that were drained: every slot is whole and is the one for its index."""
    indices = list(range(first, first + len(slots)))
    assert slots["value"].tolist() == indices
    assert (slots["kind"] == 7).all()
    assert [bytes(rest) for rest in slots["rest"]] == [i.to_bytes(6, "little") * 8 for i in indices]
    return indices


def drained(producer: Producer, limit: int | None = None) -> list[int]:
    run = producer.ring.drain(limit)
    if run is None:
        return []
    assert len(run[1]) > 0
    assert int(producer.tail[0]) == producer.ring.tail == run[0] + len(run[1])
    return check(*run)


def test_nothing():
    producer = Producer(8)
    assert producer.ring.drain() is None
    assert producer.ring.fill() == 0
    producer.reserve()
    assert producer.ring.drain() is None
    assert producer.ring.fill() == 1 / 8


@pytest.mark.parametrize("start", [0, 5, 8, 2**32 - 8, 2**32 - 3, 2**32, 2**40 - 1])
def test_full_from_anywhere(start):
    producer = Producer(8, start)
    for round_start in range(start, start + 40, 8):
        producer.produce(8)
        assert producer.ring.fill() == 1
        assert producer.reserve() is None
        assert drained(producer) == list(range(round_start, round_start + 8))
        assert producer.ring.drain() is None


@pytest.mark.parametrize("start", [0, 4, 2**32 - 4])
@pytest.mark.parametrize("open_at", range(8))
def test_an_incomplete_slot_holds_back_what_follows(start, open_at):
    producer = Producer(8, start)
    indices = [producer.reserve() for _ in range(8)]
    for place, index in enumerate(indices):
        assert index is not None
        if place != open_at:
            producer.commit(index)
    assert drained(producer) == indices[:open_at]
    assert drained(producer) == []
    late = indices[open_at]
    assert late is not None
    producer.commit(late)
    assert drained(producer) == indices[open_at:]


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 100])
def test_limit(limit):
    producer = Producer(8, 5)
    producer.produce(8)
    rounds = []
    while run := drained(producer, limit):
        assert len(run) <= limit
        rounds.append(run)
    assert [index for run in rounds for index in run] == list(range(5, 13))
    assert len(rounds) == -(-8 // limit)


def test_what_was_drained_is_a_copy():
    """The probes write the slots again at once."""
    producer = Producer(8)
    producer.produce(8)
    run = producer.ring.drain()
    assert run is not None
    producer.produce(8)
    check(*run)


def test_a_reader_that_begins_late():
    """A ring is taken up where its tail is, not at 0."""
    producer = Producer(8, 3)
    producer.produce(4)
    producer.ring = SlotRing(producer.slots, producer.head, producer.tail)
    assert drained(producer) == [3, 4, 5, 6]


@given(
    st.integers(0, 2**33),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20) | st.none()), max_size=30),
)
@settings(deadline=None)
def test_every_slot_once_or_lost(start, rounds):
    """What a reader that is too slow does not get is exactly what reserve() refused."""
    producer = Producer(16, start)
    seen: list[int] = []
    asked = lost = 0
    for count, limit in rounds:
        for _ in range(count):
            asked += 1
            index = producer.reserve()
            if index is None:
                lost += 1
            else:
                producer.commit(index)
        seen += drained(producer, limit)
    seen += drained(producer)
    assert seen == list(range(start, start + asked - lost))


class Interleaved(RuleBasedStateMachine):
    """Producers that interrupt each other: they reserve in order and commit in any."""

    @initialize(
        bits=st.integers(2, 6),
        start=st.integers(0, 200) | st.integers(2**32 - 70, 2**32 + 70),
        margin=st.sampled_from([0, 3]),
    )
    def begin(self, bits, start, margin):
        self.producer = Producer(1 << bits, start)
        self.margin = margin
        self.expected = start
        self.open: list[int] = []
        self.reserved = start

    @rule()
    def reserve(self):
        index = self.producer.reserve(self.margin)
        if index is not None:
            assert index == self.reserved
            self.reserved += 1
            self.open.append(index)

    @precondition(lambda self: self.open)
    @rule(choice=st.data())
    def commit(self, choice):
        self.producer.commit(self.open.pop(choice.draw(st.integers(0, len(self.open) - 1))))

    @rule(count=st.integers(1, 40))
    def burst(self, count):
        for _ in range(count):
            index = self.producer.reserve(self.margin)
            if index is None:
                break
            self.reserved += 1
            self.producer.commit(index)

    @rule(limit=st.none() | st.integers(0, 70))
    def drain(self, limit):
        complete = min(self.open, default=self.reserved) - self.expected
        expected = complete if limit is None else min(complete, limit)
        found = drained(self.producer, limit)
        assert found == list(range(self.expected, self.expected + expected))
        self.expected += expected

    @invariant()
    def fill_is_what_waits(self):
        waiting = self.reserved - self.expected
        assert self.producer.ring.fill() == waiting / self.producer.capacity
        assert waiting <= self.producer.capacity


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
