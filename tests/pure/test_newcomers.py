"""Which of the programs that begin meanwhile are looked at: one of each kind, a moment after it began."""

from __future__ import annotations

import pytest

from scope_ebpf.loaders import newcomers
from scope_ebpf.loaders.newcomers import (
    KNOWN_SECONDS,
    LINKED_SECONDS,
    LOOKS,
    SETTLED_SECONDS,
    SURE_SECONDS,
    WAITING,
    Newcomers,
)

pytestmark = pytest.mark.pure


@pytest.fixture
def world(monkeypatch):
    """Kinds of processes by number, and a clock."""
    kinds: dict[int, tuple[str, int, int]] = {}
    clock = [0.0]
    monkeypatch.setattr(newcomers, "kind_of", kinds.get)
    monkeypatch.setattr("scope_ebpf.loaders.newcomers.time.monotonic", lambda: clock[0])
    return kinds, clock


def drained(found: Newcomers) -> list[int]:
    return list(iter(found.due, None))


def test_one_of_each_kind_is_looked_at_twice(world):
    kinds, clock = world
    kinds.update({7: ("host", 1, 1), 8: ("host", 1, 1), 9: ("container", 1, 1), 10: ("host", 1, 2)})
    found = Newcomers()
    found.know([10])
    found.expect([7, 8, 9, 10, 99])
    assert drained(found) == []
    clock[0] = LINKED_SECONDS
    assert drained(found) == [7, 9]
    clock[0] = SETTLED_SECONDS
    assert drained(found) == [7, 9, 10]
    found.expect([8])
    clock[0] += SETTLED_SECONDS
    assert drained(found) == []


def test_a_program_that_loads_its_libraries_late_is_looked_at_again(world):
    kinds, clock = world
    kinds[7] = ("host", 1, 1)
    found = Newcomers()
    found.expect([7])
    for seconds in LOOKS:
        clock[0] = seconds
        assert drained(found) == [7]
    clock[0] = 100 * SURE_SECONDS
    assert drained(found) == []


def test_another_of_a_kind_is_looked_at_when_that_was_long_ago(world):
    """Two services of one interpreter have libraries of their own."""
    kinds, clock = world
    kinds.update({7: ("host", 1, 1), 8: ("host", 1, 1)})
    found = Newcomers()
    found.know([7])
    clock[0] = KNOWN_SECONDS
    found.expect([8])
    clock[0] += LINKED_SECONDS
    assert drained(found) == [8]


def test_what_ended_is_forgotten_whatever_is_due_with_it(world):
    """Also when both looks at it have become due in the meantime."""
    kinds, clock = world
    found = Newcomers()
    found.expect([5, 6])
    clock[0] = SETTLED_SECONDS + 1
    assert drained(found) == []
    kinds[5] = ("host", 1, 1)
    found.expect([5])
    clock[0] += 2 * SETTLED_SECONDS
    assert drained(found) == [5, 5]


def test_a_storm_of_processes_is_bounded(world):
    kinds, clock = world
    found = Newcomers()
    kinds.update({tgid: ("host", 1, tgid) for tgid in range(1, 5000)})
    found.expect(range(1, 5000))
    clock[0] = SETTLED_SECONDS
    assert len(drained(found)) <= WAITING + 1
