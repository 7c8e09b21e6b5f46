"""Profiles: what ran, what waited, who waited for the GIL; weights are exact."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from scope_ebpf import open_recording
from scope_ebpf.analysis.stacks.profile import Profile
from scope_ebpf.analysis.stacks.whole import gil_waits, off_cpu, on_cpu
from scope_ebpf.records import SampleReason
from tests.pure.recordings import at, make_recording
from tests.pure.stacks import FAMILIES, PERIOD, StackStory
from tests.pure.stories import MS, US

pytestmark = pytest.mark.pure

MAIN, VIEW, QUERY, OTHER = (2**46 + 512 * number for number in range(4))
SHOP, WORKER = 100, 200


def shop() -> StackStory:
    """A process with a thread of its own name, and a forked worker; two stacks in each."""
    story = StackStory()
    story.process(SHOP, "/usr/bin/python3 /usr/bin/gunicorn shop.web:app", "gunicorn")
    story.thread(SHOP, 101, "pool-0")
    story.row("processes", time_ns=at(2), event=1, tgid=WORKER, tid=WORKER, parent_tgid=SHOP,
              comm="python", command_line="gunicorn shop.web:app")  # fmt: skip
    for tgid in (SHOP, WORKER):
        story.met(tgid)
        story.code(tgid, MAIN, "main", "/srv/shop/main.py", 1)
        story.code(tgid, VIEW, "view", "/srv/shop/web.py", 30)
        story.code(tgid, QUERY, "Cursor.execute", "/x/lib/python3.10/site-packages/db/cursor.py", 5)
        story.stack(tgid, 1, [(VIEW, 1), (MAIN, 0)])
        story.stack(tgid, 2, [(VIEW, 2), (MAIN, 0)])
        story.stack(tgid, 3, [(QUERY, 0), (VIEW, 2), (MAIN, 0)])
    return story


def weights(profile: Profile) -> dict[str, int]:
    """Nanoseconds by path, as folded text."""
    _, frames = profile.shown_frames()
    return {
        ";".join(frames[number].label() for number in path): weight
        for path, (weight, _) in profile.shown_stacks().items()
    }


PYTHON = "main (shop/main.py:1);view (shop/web.py:30)"


def test_each_tick_weighs_a_period_and_functions_merge(tmp_path):
    story = shop()
    for stack in (1, 2, 2, 3):
        story.tick(SHOP, stack)
    story.tick(SHOP, 3, native="libc.so.6 memcpy")
    story.tick(SHOP, 1, tid=101)
    story.tick(WORKER, 1)
    profile = on_cpu(story.record(tmp_path / "a.scope"))
    assert profile.empty is None
    query = f"{PYTHON};Cursor.execute (db/cursor.py:5)"
    assert weights(profile) == {
        f"web;gunicorn;{PYTHON}": 3 * PERIOD,
        f"web;gunicorn;{query}": PERIOD,
        f"web;gunicorn;{query};libc.so.6 memcpy": PERIOD,
        f"web;pool-0;{PYTHON}": PERIOD,
        f"web;python;{PYTHON}": PERIOD,  # the worker has its own code objects and comm
    }
    assert profile.total_ns == 7 * PERIOD


def test_the_loop_that_runs_bytecode_is_the_python_function_itself(tmp_path):
    story = shop()
    for native in ("libpython3.10.so.1.0 _PyEval_EvalFrameDefault", "python3.10",
                   "python _PyEval_EvalFrameDefault.cold", None):  # fmt: skip
        story.tick(SHOP, 1, native=native)
    story.tick(SHOP, 1, native="python3.10 PyDict_GetItem")
    story.tick(SHOP, None, native="python3.10")  # without a stack it is all that is known
    story.tick(SHOP, 1, native="[kernel]")
    assert weights(on_cpu(story.record(tmp_path / "a.scope"))) == {
        f"web;gunicorn;{PYTHON}": 4 * PERIOD,
        f"web;gunicorn;{PYTHON};python3.10 PyDict_GetItem": PERIOD,
        f"web;gunicorn;{PYTHON};[kernel]": PERIOD,
        "web;gunicorn;python3.10": PERIOD,
    }


def test_the_period_is_the_recordings(tmp_path):
    story = shop()
    story.tick(SHOP, 1)
    assert on_cpu(story.record(tmp_path / "a.scope", sample_hz=997)).total_ns == 1_003_009


def test_lines_split_a_function_if_asked(tmp_path):
    story = shop()
    for stack in (1, 2, 2):
        story.tick(SHOP, stack)
    recording = story.record(tmp_path / "a.scope")
    assert weights(on_cpu(recording, by_line=True)) == {
        "web;gunicorn;main (shop/main.py:1);view (shop/web.py:31)": PERIOD,
        "web;gunicorn;main (shop/main.py:1);view (shop/web.py:32)": 2 * PERIOD,
    }
    assert len(weights(on_cpu(recording))) == 1


def test_threads_of_one_name_can_be_told_apart(tmp_path):
    story = shop()
    story.thread(SHOP, 102, "pool-0")
    story.tick(SHOP, 1, tid=101)
    story.tick(SHOP, 1, tid=102)
    recording = story.record(tmp_path / "a.scope")
    assert [*weights(on_cpu(recording)).values()] == [2 * PERIOD]
    apart = weights(on_cpu(recording, by_thread=True))
    assert {path.split(";")[1] for path in apart} == {"pool-0 (101)", "pool-0 (102)"}


def test_processes_can_be_chosen(tmp_path):
    story = shop()
    story.tick(SHOP, 1)
    story.tick(WORKER, 1)
    recording = story.record(tmp_path / "a.scope")
    assert [*weights(on_cpu(recording, [WORKER]))] == [f"web;python;{PYTHON}"]
    assert on_cpu(recording, [4711]).empty is not None


def test_what_was_lost_keeps_its_time(tmp_path):
    story = shop()
    story.stack(SHOP, 9, [(OTHER, 0), (MAIN, 0)])  # OTHER was never described
    story.stack(SHOP, 10, [(VIEW, 0)] * 128, truncated=True)
    story.tick(SHOP, 9)
    story.tick(SHOP, 404)
    story.tick(SHOP, None)
    story.tick(SHOP, None, native="libz.so.1 deflate")
    story.tick(SHOP, 10)
    view = "view (shop/web.py:30)"
    assert weights(on_cpu(story.record(tmp_path / "a.scope"))) == {
        "web;gunicorn;main (shop/main.py:1);[not recorded]": PERIOD,
        "web;gunicorn;[stack not recorded]": PERIOD,
        "web;gunicorn;[no Python stack]": PERIOD,
        "web;gunicorn;libz.so.1 deflate": PERIOD,
        f"web;gunicorn;[more frames];{';'.join([view] * 128)}": PERIOD,
    }


def test_waits_add_up_to_the_offcpu_table(tmp_path):
    story = shop()
    # one call, two intervals, one stack
    story.off(SHOP, "epoll_wait", 1 * MS, 2 * MS, ready_ns=300, stack=1)
    story.row("offcpu", start_ns=at(3 * MS + US), duration_ns=7 * US, runnable_ns=0, tgid=SHOP,
              tid=SHOP, state=1, number=232, syscall_start_ns=at(1 * MS))  # fmt: skip
    story.off(SHOP, "read", 10 * MS, 40 * US, ready_ns=None)  # too short for a stack
    story.off(SHOP, "futex", 20 * MS, 5 * MS)  # long, and its sample was lost
    story.off(SHOP, "read", 30 * MS, 3 * MS, sampled=True)  # sampled, no stack could be read
    story.off(SHOP, None, 40 * MS, 11 * US, ready_ns=11 * US, state=0)  # preempted
    story.off(SHOP, None, 50 * MS, 13 * US, state=2, stack=2, reason=SampleReason.SAMPLE_FAULT)
    story.off(
        SHOP, "recvfrom", 60 * MS, 17 * US, tid=101, stack=3, reason=SampleReason.SAMPLE_MESSAGE
    )
    recording = story.record(tmp_path / "a.scope")
    profile = off_cpu(recording)
    assert weights(profile) == {
        f"web;gunicorn;{PYTHON};epoll_wait": 2 * MS - 300 + 7 * US,
        f"web;gunicorn;{PYTHON};epoll_wait;[ready to run]": 300,
        "web;gunicorn;[shorter waits];read": 40 * US,
        "web;gunicorn;[stack not taken];futex": 5 * MS,
        "web;gunicorn;[no Python stack];read": 3 * MS,
        "web;gunicorn;[preempted]": 11 * US,
        f"web;gunicorn;{PYTHON};[page fault]": 13 * US,
        f"web;pool-0;{PYTHON};Cursor.execute (db/cursor.py:5);recvfrom": 17 * US,
    }
    assert (
        profile.total_ns == recording.collect(recording.offcpu.select("duration_ns").sum()).item()
    )
    kinds = {frame.name: frame.kind for frame in profile.frames}
    assert (kinds["epoll_wait"], kinds["futex"]) == ("network", "lock")


def test_a_program_that_is_no_python_misses_no_stack(tmp_path):
    story = shop()
    story.process(300, "nginx: worker process", "nginx")
    story.off(300, "epoll_wait", 1 * MS, 9 * MS)
    profile = off_cpu(story.record(tmp_path / "a.scope"))
    assert weights(profile) == {"nginx;nginx;epoll_wait": 9 * MS}


def test_a_futex_of_the_gil_is_called_so(tmp_path):
    story = shop()
    story.wait_for_gil(SHOP, 101, 1 * MS, 2 * MS, SHOP, stack=1)
    profile = off_cpu(story.record(tmp_path / "a.scope"))
    assert [*weights(profile)] == [f"web;pool-0;{PYTHON};[GIL]"]


def test_waits_without_the_offcpu_table_are_those_with_a_stack(tmp_path):
    story = shop()
    story.off(SHOP, "epoll_wait", 1 * MS, 2 * MS, stack=1)
    story.off(SHOP, "read", 10 * MS, 40 * US)
    story.rows.pop("offcpu")
    families = [name for name in FAMILIES if name != "offcpu"]
    profile = off_cpu(story.record(tmp_path / "a.scope", families=families))
    assert weights(profile) == {f"web;gunicorn;{PYTHON};epoll_wait": 2 * MS}
    assert "off-CPU time was not recorded" in profile.notes[0]


def test_gil_waits_have_the_stack_of_that_very_call_and_the_holder(tmp_path):
    story = shop()
    story.wait_for_gil(SHOP, 101, 1 * MS, 2 * MS, SHOP, stack=1)
    story.wait_for_gil(SHOP, 101, 5 * MS, 30 * US, SHOP)
    story.wait_for_gil(SHOP, 101, 6 * MS, 40 * US, None)
    story.tick(SHOP, 2, 5 * MS - 1, tid=101)  # at another moment: not the wait's
    profile = gil_waits(story.record(tmp_path / "a.scope"))
    assert weights(profile) == {
        f"web;pool-0;{PYTHON};[GIL held by gunicorn (100)]": 2 * MS,
        "web;pool-0;[stack not taken];[GIL held by gunicorn (100)]": 30 * US,
        "web;pool-0;[stack not taken];[GIL, holder not known]": 40 * US,
    }


@pytest.mark.parametrize(
    ("met", "changes", "why"),
    [
        (None, {}, "no Python process was looked into"),
        ({}, {}, "no thread of a traced Python process ran"),
        ({"stacks": False, "reason": "PyPy"}, {}, "could not be read: PyPy"),
        ({}, {"families": ["syscalls"]}, "holds no samples (only syscalls)"),
        ({}, {"sample_hz": 0}, "--sample-hz"),
    ],
)
def test_an_empty_profile_says_why(tmp_path, met, changes, why):
    story = StackStory()
    if met is not None:
        story.met(SHOP, **met)
    profile = on_cpu(story.record(tmp_path / "a.scope", **changes))
    assert profile.stacks == {}
    assert why in (profile.empty or "")


def test_no_wait_for_the_gil_says_why(tmp_path):
    story = StackStory()
    story.met(SHOP, gil=False, reason="a build without symbols")
    assert "a build without symbols" in (gil_waits(story.record(tmp_path / "a.scope")).empty or "")
    story = StackStory()
    story.met(SHOP)
    assert gil_waits(story.record(tmp_path / "b.scope")).empty == "no thread waited for the GIL"
    without = StackStory().record(tmp_path / "c.scope", families=["processes"])
    assert "gil in --families" in (gil_waits(without).empty or "")
    assert "offcpu in --families" in (off_cpu(without).empty or "")


def test_a_million_samples_take_seconds(tmp_path):
    path = make_recording(tmp_path / "big.scope", {}, families=FAMILIES)
    write_million(path)
    recording = open_recording(path)
    began = time.process_time()  # of this process: others may be at work
    profile = on_cpu(recording)
    took = time.process_time() - began
    assert profile.total_ns == 1_000_000 * PERIOD
    assert took < 3


def write_million(path: Path) -> None:
    """A million ticks in 40 threads, of 2000 stacks that are 5 to 64 frames deep."""
    from tests.pure.recordings import frame, write_segment

    random = np.random.default_rng(23)
    codes = [
        {"time_ns": at(0), "tgid": SHOP, "code": 2**46 + number * 512, "name": f"function_{number}",
         "file": f"/srv/shop/module_{number % 40}.py", "first_line": 1 + number, "version": 0x030A,
         "lines": bytes([2, 0] + [2, 1] * 60)}
        for number in range(1500)
    ]  # fmt: skip
    stacks = [
        {"time_ns": at(1), "tgid": SHOP, "stack": 1 + number,
         "codes": (2**46 + 512 * random.integers(0, 1500, 5 + number % 60)).tolist(),
         "offsets": random.integers(0, 60, 5 + number % 60).tolist()}
        for number in range(2000)
    ]  # fmt: skip
    count = 1_000_000
    samples = frame("samples", [])
    values: dict[str, Any] = {
        "time_ns": at(0) + np.arange(count) * 1000,
        "tgid": np.full(count, SHOP),
        "tid": SHOP + random.integers(0, 40, count),
        "context": np.zeros(count, np.uint64),
        "reason": np.ones(count, np.uint8),
        "duration_ns": np.zeros(count, np.int64),
        "stack": 1 + random.integers(0, 2000, count),
        "native": pl.Series(["libc.so.6 memcpy", None])[random.integers(0, 2, count)],
        "cpu": np.zeros(count, np.uint16),
    }
    whole = pl.DataFrame(
        {name: pl.Series(values[name]).cast(t) for name, t in samples.schema.items()}
    )
    for table, rows in {
        "codes": frame("codes", codes),
        "stacks": frame("stacks", stacks),
        "samples": whole,
    }.items():
        write_segment(path / table, 1, rows)
    # meta.json counts no rows
    rewrite_counts(path)


def rewrite_counts(path: Path) -> None:
    """Let meta.json say that the recorder was killed: it then counts at least what it says."""
    from dataclasses import replace

    from scope_ebpf.recording.meta import read_meta, write_meta

    write_meta(path, replace(read_meta(path), complete=False))
