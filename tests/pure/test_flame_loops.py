"""The profile of a request of an event loop: its calls, its ticks and what nobody knows add up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf.analysis.stacks.loops import LOOP
from scope_ebpf.analysis.stacks.profile import Profile
from scope_ebpf.analysis.stacks.request import AT_ONCE, UNDIVIDED, of_request
from scope_ebpf.analysis.stacks.shares import shares, union, without
from scope_ebpf.recording.reader import Recording
from scope_ebpf.records import ContextKind, SampleReason
from tests.pure.recordings import at
from tests.pure.stacks import PERIOD, StackStory
from tests.pure.stories import MS, US, Link, answer, http, query, selected
from tests.pure.test_flame import weights

pytestmark = pytest.mark.pure

CLIENT, WEB, DB, POOL = 10, 20, 30, 21
LISTENER, READER, TASK = 100, 101, 200
MAIN, VIEW, SEND, WORKER = (2**46 + 512 * number for number in range(4))
IN_VIEW, IN_SEND, IN_WORK, IDLE = 1, 2, 3, 4
TOOK = 200 * MS
CART = "web GET /cart;uvicorn"
VIEWED = "main (shop/main.py:1);view (shop/web.py:30)"
SENT = f"{CART};main (shop/main.py:1);send (shop/db.py:60)"


def loop() -> tuple[StackStory, Link]:
    """An event loop; a request arrives at 10 ms, and its task is made."""
    story = StackStory()
    story.process(CLIENT, "curl http://shop", "curl")
    story.process(WEB, "/usr/bin/python /usr/bin/uvicorn shop.web:app", "uvicorn")
    story.process(DB, "postgres: shop", "postgres")
    story.thread(WEB, POOL, "pool_0")
    story.met(WEB)
    files = {MAIN: ("main", "/srv/shop/main.py", 1), VIEW: ("view", "/srv/shop/web.py", 30),
             SEND: ("send", "/srv/shop/db.py", 60),
             WORKER: ("_worker", "/usr/lib/python3.10/concurrent/futures/thread.py", 70)}  # fmt: skip
    for code, described in files.items():
        story.code(WEB, code, *described)
    for stack, frames in ((IN_VIEW, [VIEW, MAIN]), (IN_SEND, [SEND, MAIN]), (IN_WORK, [VIEW, WORKER]),
                          (IDLE, [WORKER])):  # fmt: skip
        story.stack(WEB, stack, [(code, 0) for code in frames])
    for context in (LISTENER, READER):
        story.context(WEB, context, 0, kind=ContextKind.CONTEXT_MET)
    for moment in range(100 * US, 400 * MS, 3 * MS + 700 * US):
        story.call(WEB, "epoll_wait", moment)
    front = story.link(CLIENT, WEB, 8000)
    story.say(front, http("GET /cart"), 10 * MS, by_client=True, other_context=READER)
    story.context(WEB, TASK, 10 * MS + 20 * US, parent=READER)
    return story, front


def ask(
    story: StackStory, name: str, time_ns: int, took_ns: int, context: int, *, sampled: bool = True
) -> None:
    """The server asks the database in a task, over a connection of its own."""
    link = story.link(WEB, DB, 5432)
    story.ask(link, query(f"SELECT {name}"), selected(1), time_ns, took_ns, context=context,
              read_in=LISTENER)  # fmt: skip
    if sampled:
        story.row("samples", time_ns=at(time_ns), tgid=WEB, tid=WEB, stack=IN_SEND, context=context,
                  reason=int(SampleReason.SAMPLE_MESSAGE))  # fmt: skip


def answered(story: StackStory, front: Link, path: Path) -> tuple[Profile, int, Recording]:
    """The profile of the request, which is answered at 210 ms, and how long it took."""
    story.say(front, answer(), 10 * MS + TOOK, by_client=False, context=TASK)
    recording = story.record(path)
    spans = recording.collect(recording.spans())
    span = spans.filter((pl.col("kind") == "server") & (pl.col("tgid") == WEB)).row(0, named=True)
    assert span["context"] == TASK
    return of_request(recording, span["span_id"]), span["duration_ns"], recording


def waited(name: str, found: dict[str, int]) -> int:
    """The time until the response to a call, with what its server did in it."""
    return sum(ns for path, ns in found.items() if f"[waits for postgresql: SELECT {name}]" in path)


def test_what_is_known_and_what_is_not_add_up_to_the_duration(tmp_path):
    story, front = loop()
    ask(story, "a", 20 * MS, 30 * MS, TASK)
    story.tick(WEB, IN_VIEW, 100 * MS, context=TASK)
    story.tick(WEB, IN_VIEW, 130 * MS, context=LISTENER)  # of no request
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    found = weights(profile)
    call = f"{SENT};[waits for postgresql: SELECT a]"
    below = f"{call};postgresql SELECT a;postgres;[on the CPU, no sample]"
    assert found.keys() == {call, below, f"{CART};{VIEWED}", f"{CART};{LOOP}"}
    # the database had it 5 µs after it was sent, and its answer was here 5 µs after that was sent
    assert found[call] + found[below] == pytest.approx(30 * MS, abs=10 * US)
    assert found[below] == pytest.approx(30 * MS - 5 * US, abs=10 * US)
    assert found[f"{CART};{VIEWED}"] == PERIOD // 2 * 2
    assert profile.total_ns == took
    assert (profile.notes, profile.remark) == ((), None)


def test_calls_at_once_share_their_time(tmp_path):
    story, front = loop()
    for child, name, begin, long in ((300, "a", 20, 40), (301, "b", 20, 20), (302, "c", 100, 10)):
        story.context(WEB, child, 15 * MS, parent=TASK)
        ask(story, name, begin * MS, long * MS, child)
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    found = weights(profile)
    assert waited("a", found) == pytest.approx(30 * MS, abs=20 * US)
    assert waited("b", found) == pytest.approx(10 * MS, abs=20 * US)
    assert waited("c", found) == pytest.approx(10 * MS, abs=20 * US)
    assert profile.total_ns == took
    assert profile.remark == AT_ONCE


def test_a_call_without_a_stack_and_one_after_the_end(tmp_path):
    story, front = loop()
    ask(story, "a", 20 * MS, 30 * MS, TASK, sampled=False)
    ask(story, "late", 220 * MS, 30 * MS, TASK)
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    found = weights(profile)
    call = f"{CART};[stack not taken];[waits for postgresql: SELECT a]"
    assert call in found
    # who answered the late one stands by itself
    late = "postgresql SELECT late;postgres;[on the CPU, no sample]"
    assert found[late] == pytest.approx(30 * MS, abs=10 * US)
    assert profile.total_ns == took + found[late]


def test_a_call_that_made_its_connection_has_the_stack_of_its_request(tmp_path):
    story, front = loop()
    link = story.link(WEB, DB, 5432)
    story.row("connects", start_ns=at(20 * MS), duration_ns=US, tgid=WEB, tid=WEB, kind="tcp", fd=9,
              remote_address="127.0.0.1", remote_port=5432, inode=link.end(client=True),
              result=-115)  # fmt: skip
    story.ask(
        link, query("SELECT a"), selected(1), 30 * MS, 10 * MS, context=TASK, read_in=LISTENER
    )
    story.row("samples", time_ns=at(30 * MS), tgid=WEB, tid=WEB, stack=IN_SEND, context=TASK,
              reason=int(SampleReason.SAMPLE_MESSAGE))  # fmt: skip
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    found = weights(profile)
    assert f"{SENT};[waits for postgresql: SELECT a]" in found
    assert waited("a", found) == pytest.approx(20 * MS, abs=20 * US)
    assert profile.total_ns == took


def test_a_thread_of_a_pool_works_for_the_request_until_its_item_is_done(tmp_path):
    story, front = loop()
    story.hand(WEB, 7000, 30 * MS, put=True, context=TASK)
    story.hand(WEB, 7000, 31 * MS, put=False, tid=POOL)
    story.tick(WEB, IN_WORK, 50 * MS, tid=POOL)
    story.off(WEB, "recvfrom", 60 * MS, 20 * MS, tid=POOL, stack=IN_WORK)
    story.off(WEB, "futex", 90 * MS, 50 * MS, tid=POOL, stack=IDLE)  # for its next item
    story.off(WEB, "futex", 150 * MS, 100 * US, tid=POOL)
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    work = "web GET /cart;pool_0;_worker (concurrent/futures/thread.py:70);view (shop/web.py:30)"
    found = weights(profile)
    assert found == {
        work: PERIOD // 2 * 2,
        f"{work};recvfrom": 20 * MS,
        f"{CART};{LOOP}": took - PERIOD // 2 * 2 - 20 * MS,
    }


def test_a_flow_that_waits_in_its_own_call_waits_for_that(tmp_path):
    """A call that blocks, in the loop itself."""
    story, front = loop()
    ask(story, "a", 20 * MS, 30 * MS, TASK)
    story.off(WEB, "recvfrom", 20 * MS + 20 * US, 29 * MS, stack=IN_VIEW, context=TASK)
    story.told.append({"start_ns": at(20 * MS + 20 * US), "tgid": WEB, "tid": WEB, "context": TASK})
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    found = weights(profile)
    assert not [path for path in found if path.endswith("recvfrom")]
    assert waited("a", found) == pytest.approx(30 * MS, abs=20 * US)
    assert profile.total_ns == took
    assert profile.remark is None


def test_only_the_contexts_of_the_request_count(tmp_path):
    story, front = loop()
    other = story.link(CLIENT, WEB, 8000)
    story.say(other, http("GET /other"), 11 * MS, by_client=True, other_context=LISTENER)
    story.context(WEB, 201, 11 * MS + 20 * US, parent=LISTENER)
    made = ((3, TASK, 30), (4, 3, 31), (5, 201, 32), (6, TASK, 9))
    for context, parent, time_ms in made:
        story.context(WEB, context, time_ms * MS, parent=parent)
    ticks = (
        (40, TASK, WEB),
        (60, 4, WEB),
        (80, 4, POOL),
        (100, 201, WEB),
        (120, 5, WEB),
        (140, 0, WEB),
        (160, 6, WEB),
    )
    for time_ms, context, tid in ticks:
        story.tick(WEB, IN_VIEW, time_ms * MS, context=context, tid=tid)
    story.say(other, answer(), 190 * MS, by_client=False, context=201)
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    each = PERIOD // 2 * 2
    assert weights(profile) == {
        f"{CART};{VIEWED}": 2 * each,
        f"web GET /cart;pool_0;{VIEWED}": each,
        f"{CART};{LOOP}": took - 3 * each,
    }


def test_a_server_that_is_not_divided_is_one_frame_in_the_call(tmp_path):
    story, front = loop()
    ask(story, "a", 20 * MS, 30 * MS, TASK)
    # the database's only thread serves somebody else meanwhile
    story.ask(story.link(CLIENT, DB, 5432), query("SELECT other"), selected(1), 25 * MS, 10 * MS)
    profile, took, _ = answered(story, front, tmp_path / "a.scope")
    found = weights(profile)
    below = f"{SENT};[waits for postgresql: SELECT a];postgresql SELECT a {UNDIVIDED}"
    assert found[below] == pytest.approx(30 * MS - 5 * US, abs=10 * US)
    assert profile.total_ns == took
    assert profile.notes == ()


intervals = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**5)), max_size=40)


def arrays(spans: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    begin = np.array([begin for begin, _ in spans], np.int64)
    yield begin
    yield begin + np.array([long for _, long in spans], np.int64)


@given(intervals)
def test_shares_add_up_to_the_union(spans):
    begin, end = arrays(spans)
    each, at_once = shares(begin, end)
    starts, ends = union(begin, end)
    assert each.sum() == (ends - starts).sum()
    assert (each <= end - begin + 1).all()
    assert (each >= 0).all()
    assert at_once == ((end - begin).sum() > each.sum())
    assert (starts[1:] > ends[:-1]).all()


@given(intervals, st.integers(0, 10**6), st.integers(1, 10**6))
def test_what_is_left_of_an_interval_is_in_no_other(spans, since, long):
    starts, ends = union(*arrays(spans))
    left = without(since, since + long, starts, ends)
    covered = np.minimum(ends, since + long) - np.maximum(starts, since)
    assert sum(end - begin for begin, end in left) == long - covered[covered > 0].sum()
    for begin, end in left:
        assert not ((starts < end) & (ends > begin)).any()
