"""Where the time of spans went: by hand, and that nothing is counted twice or left out."""

from __future__ import annotations

import random
from typing import Any

import polars as pl
import pytest

from scope_ebpf import open_recording
from scope_ebpf.analysis.parts import divide_time, time_parts
from scope_ebpf.analysis.schema import PARTS
from scope_ebpf.recording.readable import STATE
from scope_ebpf.syscalls import syscall_names
from tests.pure.recordings import META, at, make_recording

pytestmark = pytest.mark.pure

NUMBERS = {name: number for number, name in syscall_names("x86_64").items()}
OFFCPU: dict[str, Any] = {
    "tid": pl.UInt32, "start_ns": pl.Int64, "duration_ns": pl.Int64, "runnable_ns": pl.Int64,
    "state": STATE, "number": pl.UInt16, "syscall_start_ns": pl.Int64,
}  # fmt: skip
MESSAGES: dict[str, Any] = {
    "tid": pl.UInt32, "start_ns": pl.Int64, "connection": pl.UInt32, "asks": pl.Boolean,
}  # fmt: skip
CONNECTS: dict[str, Any] = {
    "tid": pl.UInt32, "start_ns": pl.Int64, "connection": pl.UInt32, "address": pl.String,
}  # fmt: skip
CALLS: dict[str, Any] = {"tid": pl.UInt32, "start_ns": pl.Int64}
SPANS: dict[str, Any] = {
    "row": pl.UInt32, "tid": pl.UInt32, "start_ns": pl.Int64, "duration_ns": pl.Int64,
}  # fmt: skip
PEERS = pl.DataFrame(
    {
        "connection": [1, 2, 3, 4],
        "peer": ["client", "database", "cache", "cache"],
        "protocol": ["http", "postgresql", "redis", "redis"],
    },
    schema_overrides={"connection": pl.UInt32},
)
Tuple = tuple[Any, ...]


def rows(schema: dict[str, Any], *values: Tuple) -> pl.DataFrame:
    return pl.DataFrame(list(values), schema=schema, orient="row")


def off(
    start: int, waiting: int, runnable: int = 0, *, call: str | None = None, call_ns: int = 0,
    state: str = "S", tid: int = 5,
) -> Tuple:  # fmt: skip
    """An interval of offcpu, in a call that began when the interval did, if not told else."""
    number = None if call is None else NUMBERS[call]
    began = None if call is None else call_ns or start
    return (tid, start, waiting + runnable, runnable, state, number, began)


def divided(
    intervals: list[Tuple], messages: list[Tuple] | None = None, start: int = 1000,
    duration: int = 1000, **more: Any,
) -> dict[Any, int]:  # fmt: skip
    """The parts of one span of thread 5; parts that are 0 are left out."""
    found = divide_time(
        rows(SPANS, (9, 5, start, duration)),
        rows(OFFCPU, *intervals),
        rows(MESSAGES, *(messages or [])),
        PEERS,
        **more,
    )
    (row,) = found.rows(named=True)
    assert row.pop("row") == 9
    waits = row.pop("waits")
    assert sum(row.values()) + sum(wait["wait_ns"] for wait in waits) == duration
    parts = {name.removesuffix("_ns"): value for name, value in row.items() if value}
    return parts | {(wait["peer"], wait["protocol"]): wait["wait_ns"] for wait in waits}


DATABASE, CACHE, CLIENT = ("database", "postgresql"), ("cache", "redis"), ("client", "http")


def test_all_on_the_cpu():
    assert divided([]) == {"cpu": 1000}
    others = [off(500, 500), off(2000, 10), off(1100, 10, tid=6)]
    assert divided(others) == {"cpu": 1000}


def test_a_receive_waits_for_its_peer():
    messages = [(5, 1100, 2, True), (5, 1200, 2, False), (5, 1700, 3, False)]
    intervals = [
        off(1210, 300, 40, call="recvfrom", call_ns=1200),
        off(1710, 50, 5, call="read", call_ns=1700),
        off(1800, 0, 25, state="R"),
    ]
    assert divided(intervals, messages) == {
        "cpu": 580, "runqueue": 70, DATABASE: 300, CACHE: 50,
    }  # fmt: skip


def test_longest_first_and_one_per_peer():
    """Connections 3 and 4 lead to the same peer."""
    messages = [(5, 1000, 2, False), (5, 1200, 3, False), (5, 1400, 4, False)]
    intervals = [off(start, 70, call="recvmsg") for start in (1000, 1200, 1400)]
    found = divided(intervals, messages)
    assert list(found.items()) == [("cpu", 790), (CACHE, 140), (DATABASE, 70)]


def test_a_poll_waits_for_the_next_message():
    messages = [(5, 1500, 2, False), (5, 2300, 3, False)]
    polls = [
        off(1100, 100, call=name) for name in ("poll", "epoll_wait", "select", "ppoll", "pselect6")
    ]
    for poll in polls:
        assert divided([poll], messages) == {"cpu": 900, DATABASE: 100}
    # the next message comes after the span
    late = [off(1600, 100, call="poll")]
    assert divided(late, messages) == {"cpu": 900, "other": 100}
    assert divided(late) == {"cpu": 900, "other": 100}
    # of another thread
    assert divided(late, [(6, 1750, 2, False)]) == {"cpu": 900, "other": 100}


def test_a_poll_in_vain_waits_for_whom_was_asked_last():
    """Else the response to the client, which comes next, would make the client the culprit."""
    messages = [(5, 1050, 2, True), (5, 1900, 1, True)]
    intervals = [off(1100, 700, call="poll")]
    assert divided(intervals, messages) == {"cpu": 300, CLIENT: 700}
    timed_out = rows(CALLS, (5, 1100), (6, 1100), (5, 3))
    assert divided(intervals, messages, timed_out=timed_out) == {"cpu": 300, DATABASE: 700}
    # nothing was asked since the last answer
    messages.insert(1, (5, 1060, 2, False))
    assert divided(intervals, messages, timed_out=timed_out) == {"cpu": 300, "other": 700}


def test_a_receive_in_vain():
    """A timeout or reset: there is no message of it."""
    intervals = [off(1100, 700, call="recvfrom")]
    assert divided(intervals, [(5, 1050, 2, True)]) == {"cpu": 300, DATABASE: 700}
    assert divided(intervals, [(5, 950, 2, True)]) == {"cpu": 300, "other": 700}
    assert divided(intervals) == {"cpu": 300, "other": 700}


def test_a_connect():
    connects = rows(CONNECTS, (5, 1100, None, "10.0.0.7:80"), (5, 1300, 3, "10.0.0.8:6379"))
    intervals = [off(1100, 50, call="connect"), off(1300, 60, call="connect")]
    assert divided(intervals, connects=connects) == {
        "cpu": 890, ("10.0.0.7:80", None): 50, CACHE: 60,
    }  # fmt: skip
    assert divided(intervals) == {"cpu": 890, "other": 110}
    # it goes on in the background, and nobody answers
    polled = [off(1200, 50, call="poll")]
    asked = rows(CONNECTS, (5, 1100, None, "10.0.0.7:80"))
    more: dict[str, Any] = {"connects": asked, "timed_out": rows(CALLS, (5, 1200))}
    messages = [(5, 1050, 2, True), (5, 1400, 1, True)]
    assert divided(polled, messages, **more) == {"cpu": 950, ("10.0.0.7:80", None): 50}


def test_locks_disks_and_the_rest():
    intervals = [
        off(1000, 10, call="futex"),
        off(1100, 20, call="read", state="D"),
        off(1200, 30, call="fsync"),
        off(1300, 40, state="D"),  # a page fault
        off(1400, 50, call="pread64"),
        off(1500, 60, call="clock_nanosleep"),
        off(1600, 70, call="wait4"),
        off(1700, 80),
        off(1800, 90, call="vfork", state="D"),
        off(1890, 5, call="read"),  # of a terminal, a timer or an eventfd
    ]
    assert divided(intervals) == {
        "cpu": 545, "lock": 10, "disk": 140, "other": 175,
        ("child process", None): 70, ("sleep", None): 60,
    }  # fmt: skip


def test_a_connection_that_nobody_knows():
    found = divided([off(1100, 10, call="recvfrom")], [(5, 1100, 77, False)])
    assert found == {"cpu": 990, (None, None): 10}


def test_intervals_are_cut_at_the_borders():
    """Waiting comes first, then being ready to run."""
    messages = [(5, 900, 2, False), (5, 1900, 3, False)]
    before = [off(900, 200, 50, call="recvfrom")]
    assert divided(before, messages) == {"cpu": 850, DATABASE: 100, "runqueue": 50}
    before = [off(900, 50, 150, call="recvfrom")]
    assert divided(before, messages) == {"cpu": 900, "runqueue": 100}
    after = [off(1900, 70, 100, call="recvfrom")]
    assert divided(after, messages) == {"cpu": 900, CACHE: 70, "runqueue": 30}
    after = [off(1900, 300, call="recvfrom")]
    assert divided(after, messages) == {"cpu": 900, CACHE: 100}
    whole = [off(500, 3000, call="futex")]
    assert divided(whole) == {"lock": 1000}


def test_a_wakeup_that_was_not_seen():
    number = NUMBERS["futex"]
    assert divided([(5, 1100, 30, None, "S", number, 1100)]) == {"cpu": 970, "lock": 30}


def test_intervals_that_overlap():
    """Of two that contradict each other, the first ends where the second begins."""
    intervals = [off(1000, 500, call="futex"), off(1300, 100, call="fsync")]
    assert divided(intervals) == {"cpu": 600, "lock": 300, "disk": 100}


def test_without_offcpu_nothing_is_known():
    spans = rows(SPANS, (1, 5, 1000, 70), (2, 6, 1000, 0))
    found = divide_time(spans, None, rows(MESSAGES), PEERS)
    assert found.select(pl.exclude("waits")).rows() == [(1, 0, 0, 0, 0, 70), (2, 0, 0, 0, 0, 0)]
    assert found["waits"].to_list() == [[], []]
    assert found["waits"].dtype == PARTS
    empty = divide_time(rows(SPANS), rows(OFFCPU, off(1, 1)), rows(MESSAGES), PEERS)
    assert empty.is_empty()
    assert empty.schema == found.schema


def by_hand(span: Tuple, intervals: list[Tuple]) -> dict[str, int]:
    """CPU, run queue, lock and disk, nanosecond by nanosecond."""
    _, tid, start, duration = span
    found = dict.fromkeys(("cpu_ns", "runqueue_ns", "lock_ns", "disk_ns"), 0)
    for now in range(start, start + duration):
        what = "cpu_ns"
        for of, begin, length, runnable, _, number, _ in intervals:
            if of == tid and begin <= now < begin + length:
                waits = now < begin + length - runnable
                name = "lock_ns" if number == NUMBERS["futex"] else "disk_ns"
                what = name if waits else "runqueue_ns"
        found[what] += 1
    return found


@pytest.mark.parametrize("seed", range(20))
def test_as_counted_one_by_one(seed):
    """Several threads, spans and intervals in any order, as long as they like."""
    rng = random.Random(seed)
    spans: list[Tuple] = []
    intervals: list[Tuple] = []
    for tid in range(1, rng.randint(2, 5)):
        now = rng.randint(0, 100)
        for _ in range(rng.randint(0, 8)):
            now += rng.randint(0, 40)
            spans.append((len(spans), tid, now, rng.randint(0, 60)))
            now += spans[-1][3]
        now = rng.randint(0, 100)
        for _ in range(rng.randint(0, 20)):
            now += rng.randint(0, 30)
            waiting, runnable = rng.randint(0, 40), rng.randint(0, 20)
            call = rng.choice(["futex", "fsync"])
            intervals.append(off(now, waiting, runnable, call=call, tid=tid))
            now += waiting + runnable
    rng.shuffle(spans)
    rng.shuffle(intervals)
    found = divide_time(rows(SPANS, *spans), rows(OFFCPU, *intervals), rows(MESSAGES), PEERS)
    assert found["row"].to_list() == [span[0] for span in spans]
    for span, row in zip(spans, found.rows(named=True), strict=True):
        expected = by_hand(span, intervals)
        assert {name: row[name] for name in expected} == expected
        assert sum(expected.values()) == span[3]


@pytest.mark.parametrize("seed", range(10))
def test_parts_add_up_whatever_happens(seed):
    rng = random.Random(seed)
    calls = ["recvfrom", "poll", "futex", "read", "connect", "fsync", "nanosleep", None]
    spans = [
        (at, rng.randint(1, 4), rng.randint(0, 10**6), rng.randint(0, 10**5)) for at in range(50)
    ]
    intervals = []
    for _ in range(500):
        runnable = rng.choice([None, 0, rng.randint(0, 3000)])
        call = rng.choice(calls)
        start = rng.randint(0, 10**6)
        intervals.append(
            (rng.randint(1, 5), start, (runnable or 0) + rng.randint(0, 10**4), runnable,
             rng.choice("RSD"), None if call is None else NUMBERS[call],
             None if call is None else start - rng.randint(0, 100))
        )  # fmt: skip
    own = [(of[0], of[6], rng.randint(1, 6), rng.random() < 0.5) for of in intervals if of[6]]
    found = divide_time(
        rows(SPANS, *spans),
        rows(OFFCPU, *intervals),
        rows(MESSAGES, *own[::2]),
        PEERS,
        connects=rows(CONNECTS, *((of[0], of[1], None, "x:1") for of in own[::5])),
        timed_out=rows(CALLS, *((of[0], of[1]) for of in own[::3])),
    )
    waits = found["waits"].list.eval(pl.element().struct.field("wait_ns"))
    numbers = found.select(pl.exclude("row", "waits"))
    total = numbers.sum_horizontal() + waits.list.sum()
    assert total.to_list() == [span[3] for span in spans]
    assert (numbers.min_horizontal() >= 0).all()
    assert (waits.explode().drop_nulls() > 0).all()
    assert waits.list.sort(descending=True).equals(waits)
    assert found["waits"].list.len().sum() > 20


def test_of_a_recording(tmp_path):
    """All that it needs is read, for the threads of the spans only."""
    common = {"tgid": 100, "tid": 5}
    tables: dict[str, list[dict[str, Any]]] = {
        "connections": [{"connection": 2, "kind": "tcp", "inode": 70}],
        "messages": [
            common | {"start_ns": at(10), "connection": 2},
            common | {"start_ns": at(20), "connection": 2, "receive": True},
            common | {"start_ns": at(300), "connection": 2},
        ],
        "connects": [
            common | {"start_ns": at(200), "remote_address": "::1", "remote_port": 80, "inode": 7},
            common | {"start_ns": at(230), "remote_path": "/run/x", "inode": 70},
        ],
        "syscalls": [
            common | {"start_ns": at(320), "duration_ns": 90, "number": NUMBERS["poll"]},
            common | {"start_ns": at(420), "duration_ns": 90, "number": NUMBERS["poll"], "result": 1},
        ],
        "offcpu": [
            common | {"start_ns": at(start), "duration_ns": 20, "number": NUMBERS[call], "state": 1,
                      "runnable_ns": 5, "syscall_start_ns": at(start)}
            for start, call in ((20, "read"), (200, "connect"), (230, "connect"), (320, "poll"),
                                (420, "poll"), (500, "futex"))
        ],
    }  # fmt: skip
    spans = rows(SPANS, (3, 5, at(0), 1000))
    families = ["messages", "offcpu"]
    path = make_recording(tmp_path / "a.scope", tables, families=families)
    (row,) = time_parts(open_recording(path), spans, PEERS).rows(named=True)
    assert row == {
        "row": 3, "cpu_ns": 880, "runqueue_ns": 30, "disk_ns": 0, "lock_ns": 15, "other_ns": 15,
        "waits": [
            {"peer": "database", "protocol": "postgresql", "wait_ns": 45},
            {"peer": "[::1]:80", "protocol": None, "wait_ns": 15},
        ],
    }  # fmt: skip
    path = make_recording(tmp_path / "b.scope", {}, families=["messages"])
    assert META.host.machine == "x86_64"
    assert time_parts(open_recording(path), spans, PEERS)["other_ns"].item() == 1000
