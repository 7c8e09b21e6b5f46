"""Where the time of threads went: parts that add up exactly, whatever overlaps or was lost."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_ebpf.analysis.threads import PARTS, THREADS, is_interpreter, thread_times
from scope_ebpf.recording.reader import Recording
from tests.pure.recordings import ENDED_NS, STARTED_NS, at
from tests.pure.stacks import FAMILIES, StackStory
from tests.pure.stories import MS, NUMBERS, US

pytestmark = pytest.mark.pure

ALL = ENDED_NS - STARTED_NS
WEB = 100


def web() -> StackStory:
    story = StackStory()
    story.process(WEB, "gunicorn shop.web:app", "gunicorn")
    story.met(WEB)
    return story


def check_sums(found: pl.DataFrame) -> None:
    """The parts of each thread are its time, and none is negative."""
    assert found.schema == THREADS
    assert found.select(pl.sum_horizontal(PARTS) == pl.col("wall_ns")).to_series().all()
    assert found.select(pl.min_horizontal(PARTS) >= 0).to_series().all()


def only(recording: Recording, tid: int = WEB) -> dict[str, Any]:
    """The one row of a thread."""
    found = thread_times(recording)
    check_sums(found)
    rows = found.filter(pl.col("tid") == tid).to_dicts()
    assert len(rows) == 1
    return rows[0]


def parts_of(row: dict[str, Any]) -> dict[str, int]:
    """The parts that are not 0."""
    return {name.removesuffix("_ns"): row[name] for name in PARTS if row[name]}


def test_each_wait_is_what_it_was_for(tmp_path):
    story = web()
    story.off(WEB, "recvfrom", 10 * MS, 100 * US)  # a socket
    story.off(WEB, "epoll_wait", 20 * MS, 200 * US, result=3)  # something came
    story.off(WEB, "epoll_wait", 30 * MS, 400 * US, result=0)  # nothing did
    story.off(WEB, "poll", 35 * MS, 800 * US, result=-4)  # a signal
    story.off(WEB, "futex", 40 * MS, 1_600 * US, ready_ns=600 * US)
    story.off(WEB, "read", 50 * MS, 3_200 * US, state=2)  # a file
    story.off(WEB, "fsync", 60 * MS, 6_400 * US)
    story.off(WEB, "clock_nanosleep", 70 * MS, 12_800 * US)
    story.off(WEB, "wait4", 90 * MS, 25_600 * US)
    story.off(WEB, "vfork", 120 * MS, 51_200 * US, state=2)
    story.off(WEB, None, 200 * MS, 102_400 * US, state=0, ready_ns=102_400 * US)  # preempted
    story.off(WEB, None, 400 * MS, 204_800 * US, state=4)  # stopped
    story.off(WEB, "ioctl", 700 * MS, 409_600 * US)
    row = only(story.record(tmp_path / "a.scope"))
    off = 100 * US * (2**13 - 1)
    assert parts_of(row) == {
        "running": ALL - off,
        "network": (100 + 200 + 800) * US,
        "sleep": (400 + 12_800 + 25_600 + 51_200) * US,
        "lock": 1_000 * US,
        "runqueue": (600 + 102_400) * US,
        "disk": (3_200 + 6_400) * US,
        "stopped": 204_800 * US,
        "unknown": 409_600 * US,
    }
    assert (row["service"], row["thread"], row["wall_ns"]) == ("web", "gunicorn", ALL)


def test_waits_for_the_gil_are_no_other_locks_and_name_who_held_it(tmp_path):
    story = web()
    story.thread(WEB, 101, "pool-0")
    story.thread(WEB, 102, "pool-1")
    # 5 ms of switching interval, then again, as CPython's take_gil does: one acquisition
    story.wait_for_gil(WEB, 101, 10 * MS, 5 * MS, WEB)
    story.wait_for_gil(WEB, 101, 15 * MS + 900, 2 * MS, 102)
    story.wait_for_gil(WEB, 101, 30 * MS, 1 * MS, WEB)
    story.wait_for_gil(WEB, 101, 40 * MS, 1 * MS, None)
    story.off(WEB, "futex", 50 * MS, 7 * MS, tid=101)
    row = only(story.record(tmp_path / "a.scope"), 101)
    assert parts_of(row) == {"running": ALL - 16 * MS, "gil": 9 * MS, "lock": 7 * MS}
    assert row["gil_holders"] == [
        {"tid": WEB, "thread": "gunicorn", "wait_ns": 6 * MS},
        {"tid": 102, "thread": "pool-1", "wait_ns": 2 * MS},
    ]


def test_waits_for_the_gil_that_overlap_count_once(tmp_path):
    story = web()
    for start_ns in (10 * MS, 12 * MS, 12 * MS + 10):
        story.row("gil", start_ns=at(start_ns), duration_ns=5 * MS, tgid=WEB, tid=WEB)
    story.row("offcpu", start_ns=at(16 * MS), duration_ns=4 * MS, runnable_ns=MS, tgid=WEB, tid=WEB,
              state=1, number=NUMBERS["futex"], syscall_start_ns=at(12 * MS))  # fmt: skip
    row = only(story.record(tmp_path / "a.scope"))
    gil = 7 * MS + 10
    assert parts_of(row) == {
        "gil": gil,
        "lock": 2 * MS - 10,
        "runqueue": MS,
        "running": ALL - gil - 3 * MS + 10,
    }


def test_time_on_the_cpu_is_divided_as_its_samples_are(tmp_path):
    story = web()
    story.off(WEB, "recvfrom", 10 * MS, 1_000 * MS)
    for number, native in enumerate(
        [None, "python3.11 _PyEval_EvalFrameDefault", "libc.so.6 memcpy", "_json.so encode"]
    ):
        story.tick(WEB, 1, number, native=native)
    row = only(story.record(tmp_path / "a.scope"))
    assert parts_of(row) == {
        "python": (ALL - 1_000 * MS) // 2,
        "native": (ALL - 1_000 * MS) // 2,
        "network": 1_000 * MS,
    }
    assert row["samples"] == 4


def test_a_thread_without_python_runs_native_code(tmp_path):
    story = web()
    story.tick(WEB, None, native="redis-server main")
    story.tick(WEB, None)
    assert parts_of(only(story.record(tmp_path / "a.scope"))) == {"native": ALL}


@pytest.mark.parametrize(
    ("native", "own"),
    [
        ("libpython3.11.so.1.0 PyDict_SetItem", True),
        ("python3.12 take_gil", True),
        ("python", True),
        ("uwsgi _PyEval_EvalFrameDefault.cold", True),
        ("libpython_extras.so f", False),
        ("_multiarray_umath.cpython-311-x86_64-linux-gnu.so dot", False),
        ("libc.so.6", False),
    ],
)
def test_what_is_the_interpreter(native, own):
    assert is_interpreter(native) is own


def test_threads_that_begin_and_end(tmp_path):
    story = web()
    story.begin(WEB, 101, "pool-0", 1_000 * MS)
    story.finish(WEB, 101, 3_000 * MS)
    story.begin(WEB, 102, "pool-1", 4_000 * MS)
    story.fork(WEB, 200, 500 * MS)
    story.begin(200, 201, "side", 600 * MS)
    story.exit(200, 900 * MS)
    found = thread_times(story.record(tmp_path / "a.scope"))
    check_sums(found)
    rows = {row["tid"]: row for row in found.to_dicts()}
    seen = {tid: (row["began"], row["ended"], row["wall_ns"] // MS) for tid, row in rows.items()}
    assert seen == {
        WEB: (False, False, 5_000),
        101: (True, True, 2_000),
        102: (True, False, 1_000),
        200: (True, True, 400),
        201: (True, True, 300),  # it ended with its process
    }


def test_a_thread_id_that_is_used_again_is_another_thread(tmp_path):
    story = web()
    story.begin(WEB, 101, "first", 1_000 * MS)
    story.finish(WEB, 101, 2_000 * MS)
    story.begin(WEB, 101, "second", 3_000 * MS)
    story.off(WEB, "recvfrom", 1_500 * MS, 100 * MS, tid=101)
    story.off(WEB, "futex", 3_500 * MS, 100 * MS, tid=101)
    found = thread_times(story.record(tmp_path / "a.scope")).filter(pl.col("tid") == 101)
    check_sums(found)
    rows = sorted(found.to_dicts(), key=lambda row: row["start_ns"])
    assert [parts_of(row) for row in rows] == [
        {"running": 900 * MS, "network": 100 * MS},
        {"running": 1_900 * MS, "lock": 100 * MS},
    ]


def test_a_thread_whose_end_was_lost_ends_where_its_number_is_used_again(tmp_path):
    story = web()
    story.begin(WEB, 101, "first", 1_000 * MS)
    story.begin(WEB, 101, "second", 3_000 * MS)
    found = thread_times(story.record(tmp_path / "a.scope")).filter(pl.col("tid") == 101)
    rows = found.sort("start_ns").select("wall_ns", "ended").rows()
    assert rows == [(2_000 * MS, True), (2_000 * MS, False)]


def test_exec_ends_the_other_threads(tmp_path):
    story = web()
    story.thread(WEB, 101, "pool-0")
    story.row("processes", time_ns=at(1_000 * MS), event=3, tgid=WEB, tid=WEB, comm="other")
    found = thread_times(story.record(tmp_path / "a.scope"))
    wall = {row["tid"]: row["wall_ns"] for row in found.to_dicts()}
    assert wall == {WEB: ALL, 101: 1_000 * MS}


def test_a_thread_whose_begin_was_lost_is_there_from_what_it_did_first(tmp_path):
    story = web()
    story.off(WEB, "futex", 1_000 * MS, 100 * MS, tid=150)
    row = only(story.record(tmp_path / "a.scope"), 150)
    assert row["wall_ns"] == ALL - 1_000 * MS
    assert parts_of(row) == {"running": ALL - 1_100 * MS, "lock": 100 * MS}
    assert row["thread"] == "gunicorn"


def test_what_reaches_out_of_a_thread_s_time_is_cut(tmp_path):
    story = web()
    story.row("offcpu", start_ns=STARTED_NS - 50, duration_ns=150, runnable_ns=20, tgid=WEB, tid=WEB,
              state=1, number=NUMBERS["futex"], syscall_start_ns=STARTED_NS - 50, status=1)  # fmt: skip
    story.off(WEB, "recvfrom", ALL - 70, 100, ready_ns=40)
    # its end was not seen in time
    story.off(WEB, "futex", 1_000, 5_000)
    story.off(WEB, "recvfrom", 3_000, 1_000)
    row = only(story.record(tmp_path / "a.scope"))
    assert parts_of(row) == {
        "running": ALL - 80 - 20 - 60 - 10 - 2_000 - 1_000,
        "lock": 80 + 2_000,
        "runqueue": 20 + 10,
        "network": 60 + 1_000,
    }


def test_without_off_cpu_time_only_the_gil_is_known(tmp_path):
    story = web()
    story.wait_for_gil(WEB, WEB, 10 * MS, 5 * MS, None)
    story.rows.pop("offcpu")
    families = [name for name in FAMILIES if name != "offcpu"]
    row = only(story.record(tmp_path / "a.scope", families=families))
    assert parts_of(row) == {"gil": 5 * MS, "unknown": ALL - 5 * MS}


def test_collections_of_garbage_are_a_part_of_the_others(tmp_path):
    story = web()
    story.thread(WEB, 101, "pool-0")
    for duration_ns in (3 * MS, 4 * MS, None):
        story.row("hits", time_ns=at(MS), duration_ns=duration_ns, tgid=WEB, tid=WEB, probe="gc")
    story.row("hits", time_ns=at(MS), duration_ns=5, tgid=WEB, tid=WEB, probe="gc_like")
    recording = story.record(tmp_path / "a.scope")
    assert (only(recording)["gc_ns"], only(recording, 101)["gc_ns"]) == (7 * MS, 0)
    assert only(web().record(tmp_path / "b.scope"))["gc_ns"] is None


def test_threads_of_a_process_can_be_chosen(tmp_path):
    story = web()
    story.process(200, "rq worker", "rq")
    recording = story.record(tmp_path / "a.scope")
    assert thread_times(recording, [200])["tid"].to_list() == [200]
    assert thread_times(recording, []).is_empty()
    assert thread_times(recording)["wall_ns"].sum() == 2 * ALL


def test_an_empty_recording_has_no_threads(tmp_path):
    found = thread_times(StackStory().record(tmp_path / "a.scope"))
    assert found.schema == THREADS
    assert found.is_empty()


intervals = st.lists(
    st.tuples(
        st.sampled_from([WEB, 101]),
        st.integers(-100, ALL + 100),
        st.integers(0, ALL),
        st.integers(0, ALL),
        st.sampled_from(["futex", "recvfrom", None]),
        st.booleans(),
    ),
    max_size=25,
)


@given(intervals)
@settings(max_examples=25, deadline=None)
def test_the_parts_add_up_whatever_the_rows_say(tmp_path_factory, rows):
    story = web()
    story.begin(WEB, 101, "pool-0", 1_000)
    for tid, start_ns, duration_ns, ready_ns, name, gil in rows:
        story.row("offcpu", start_ns=at(start_ns), duration_ns=duration_ns, runnable_ns=ready_ns,
                  tgid=WEB, tid=tid, state=1, number=NUMBERS[name] if name else None,
                  syscall_start_ns=at(start_ns) if name else None)  # fmt: skip
        if gil:
            story.row(
                "gil", start_ns=at(start_ns - 7), duration_ns=duration_ns // 2, tgid=WEB, tid=tid
            )
    found = thread_times(story.record(tmp_path_factory.mktemp("threads") / "a.scope"))
    check_sums(found)
    assert sorted(found["wall_ns"].to_list()) == [ALL - 1_000, ALL]
