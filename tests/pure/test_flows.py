"""The logical context of each call: that of the latest row of `flows` of its thread."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_ebpf import open_recording
from scope_ebpf.errors import ScopeError
from scope_ebpf.recording import readable
from scope_ebpf.recording.flows import ThreadContexts
from tests.pure.recordings import at, frame, make_recording

pytestmark = pytest.mark.pure

Rows = dict[str, list[dict[str, Any]]]
FORK, THREAD, EXEC = 1, 2, 3


def flow(time: int, context: int, tid: int = 1, tgid: int = 1) -> dict[str, Any]:
    """From this time on the thread is in the context."""
    return {"start_ns": at(time), "tgid": tgid, "tid": tid, "context": context}


def calls(*times: int, tid: int = 1, tgid: int = 1) -> list[dict[str, Any]]:
    """Calls of a thread."""
    return [{"start_ns": at(time), "tgid": tgid, "tid": tid} for time in times]


def contexts(path: Path, rows: Rows, table: str = "syscalls") -> list[int]:
    """The context of each row of a table, in the order of the table."""
    found = open_recording(make_recording(path, rows)).table(table).collect()
    assert found.schema["context"] == pl.UInt64
    return found["context"].to_list()


def test_the_latest_change_before_a_call_counts(tmp_path: Path):
    rows: Rows = {
        "flows": [flow(10, 7), flow(20, 8), flow(30, 0), flow(40, 9, tid=2), flow(0, 3, tgid=2)],
        # not in the order of time
        "syscalls": calls(35, 9, 10, 19, 20, 29, 30) + calls(39, 40, tid=2) + calls(50, tid=3),
    }
    assert contexts(tmp_path / "a.scope", rows) == [0, 0, 7, 7, 8, 8, 0, 0, 9, 0]


def test_changes_may_be_stored_in_any_order(tmp_path: Path):
    changes = [flow(time, time) for time in range(10, 100, 10)]
    random.Random(1).shuffle(changes)
    rows: Rows = {"flows": changes, "syscalls": calls(*range(5, 100, 10))}
    assert contexts(tmp_path / "a.scope", rows) == list(range(0, 100, 10))


@pytest.mark.parametrize("event", [FORK, THREAD, EXEC])
def test_a_later_thread_with_the_same_number_begins_anew(tmp_path: Path, event: int):
    born = {"time_ns": at(20), "event": event, "tgid": 1, "tid": 1}
    rows: Rows = {
        "flows": [flow(10, 7), flow(30, 8)],
        "processes": [born, {**born, "tid": 2, "time_ns": at(12)}],
        "syscalls": calls(15, 20, 25, 30),
    }
    assert contexts(tmp_path / "a.scope", rows) == [7, 0, 0, 8]


def test_other_events_of_a_thread_change_nothing(tmp_path: Path):
    events = [{"time_ns": at(20), "event": event, "tgid": 1, "tid": 1} for event in (0, 4, 5)]
    rows: Rows = {"flows": [flow(10, 7)], "processes": events, "syscalls": calls(25)}
    assert contexts(tmp_path / "a.scope", rows) == [7]


def test_a_first_call_at_the_time_of_the_birth_is_the_new_threads(tmp_path: Path):
    born = {"time_ns": at(10), "event": THREAD, "tgid": 1, "tid": 1}
    rows: Rows = {"flows": [flow(10, 7)], "processes": [born], "syscalls": calls(10)}
    assert contexts(tmp_path / "a.scope", rows) == [7]


@pytest.mark.parametrize("table", ["syscalls", "messages", "connects"])
def test_all_tables_of_calls_have_it(tmp_path: Path, table: str):
    rows: Rows = {"flows": [flow(10, 7)], table: calls(5, 15)}
    assert contexts(tmp_path / "a.scope", rows, table) == [0, 7]


def test_an_interval_off_the_cpu_has_that_of_its_call(tmp_path: Path):
    intervals = [{"start_ns": at(25), "tgid": 1, "tid": 1, "syscall_start_ns": begun}
                 for begun in (at(15), None, at(5))]  # fmt: skip
    rows: Rows = {"flows": [flow(10, 7), flow(20, 8)], "offcpu": intervals}
    assert contexts(tmp_path / "a.scope", rows, "offcpu") == [7, 0, 0]


def test_a_call_of_tls_has_that_of_the_calls_within_it(tmp_path: Path):
    rows: Rows = {
        "flows": [flow(10, 7)],
        "tls": [{"start_ns": at(8), "duration_ns": 4, "tgid": 1, "tid": 1},
                {"start_ns": at(8), "duration_ns": 1, "tgid": 1, "tid": 1}],
    }  # fmt: skip
    assert contexts(tmp_path / "a.scope", rows, "tls") == [7, 0]


def test_without_changes_nothing_is_looked_up(tmp_path: Path):
    recording = open_recording(make_recording(tmp_path / "a.scope", {"syscalls": calls(1, 2)}))
    assert recording.syscalls.collect()["context"].to_list() == [0, 0]
    plan = recording.syscalls.explain()
    assert "python" not in plan.lower() and "JOIN" not in plan


def test_filters_and_columns_still_reach_the_files(tmp_path: Path):
    rows: Rows = {"flows": [flow(10, 7)], "syscalls": calls(1, 20)}
    read = open_recording(make_recording(tmp_path / "a.scope", rows)).syscalls
    plan = read.filter(pl.col("tid") == 1).select("start_ns", "context").explain()
    assert re.search(r"SELECTION: .*tid", plan)
    assert "PROJECT 3/" in plan
    # who does not ask for it does not pay for it
    assert "PROJECT 1/" in read.select("start_ns").explain()


def test_missing_changes_are_noticed(tmp_path: Path):
    path = make_recording(tmp_path / "a.scope", {"flows": [flow(10, 7)], "syscalls": calls(1)})
    next((path / "flows").iterdir()).unlink()
    with pytest.raises(ScopeError, match="segments are missing"):
        _ = open_recording(path).syscalls


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_it_is_what_a_search_row_by_row_finds(random: random.Random):
    threads = [(random.choice([1, 2, 2**32 - 1]), tid) for tid in (1, 2, 2**32 - 1)]

    def some(most: int) -> list[tuple[int, int, int]]:
        return [
            (*random.choice(threads), random.randrange(30)) for _ in range(random.randrange(most))
        ]

    told = {(tgid, tid, time): random.choice([0, 5, 2**64 - 1]) for tgid, tid, time in some(20)}
    born = set(some(6))
    changes = [flow(time, context, tid, tgid) for (tgid, tid, time), context in told.items()]
    random.shuffle(changes)
    births = pl.DataFrame(
        [(tgid, tid, at(time)) for tgid, tid, time in born],
        schema={"tgid": pl.UInt32, "tid": pl.UInt32, "time_ns": pl.Int64},
        orient="row",
    )
    asked = [*some(40), (*threads[0], 0)]

    def truth(tgid: int, tid: int, time: int) -> int:
        mine = [(when, 1, context) for (*who, when), context in told.items() if who == [tgid, tid]]
        mine += [(when, 0, 0) for *who, when in born if who == [tgid, tid]]
        return max([one for one in mine if one[0] <= time], default=(0, 0, 0))[2]

    if not changes:
        return
    lookup = ThreadContexts(frame("flows", changes), births)
    rows = pl.DataFrame(
        [(tgid, tid, at(time)) for tgid, tid, time in asked], schema=births.schema, orient="row"
    )
    found = rows.lazy().with_columns(lookup.expression(pl.col("time_ns"))).collect()
    assert found["context"].to_list() == [truth(*one) for one in asked]


def test_labels_are_those_of_the_records(tmp_path: Path):
    assert readable.CONTEXT_KIND.categories.to_list()[1:] == ["copied", "new", "met", "greenlet"]
    assert readable.REASON.categories.to_list()[1:] == ["cpu", "wait", "message", "fault"]
