"""The profile of one request: running and waiting of every thread that handled a part of it."""

from __future__ import annotations

import polars as pl
import pytest

from scope_ebpf.analysis.stacks.profile import Profile
from scope_ebpf.analysis.stacks.request import _with_descendants, of_request
from scope_ebpf.recording.reader import Recording
from tests.pure.recordings import at
from tests.pure.stacks import FAMILIES, PERIOD, StackStory
from tests.pure.stories import MS, US, answer, http, query, selected
from tests.pure.test_flame import weights

pytestmark = pytest.mark.pure

CLIENT, WEB, DB = 10, 20, 30
MAIN, VIEW, TASK = (2**46 + 512 * number for number in range(3))
TOOK = 100 * MS


def web() -> StackStory:
    """A worker that gets a request at 10 ms and answers it after 100 ms; its query takes 20 ms."""
    story = StackStory()
    story.process(CLIENT, "curl http://shop", "curl")
    story.process(WEB, "gunicorn shop.web:app", "gunicorn")
    story.process(DB, "postgres: shop", "postgres")
    story.met(WEB)
    story.code(WEB, MAIN, "main", "/srv/shop/main.py", 1)
    story.code(WEB, VIEW, "view", "/srv/shop/web.py", 30)
    story.code(WEB, TASK, "task", "/srv/shop/web.py", 60)
    story.stack(WEB, 1, [(VIEW, 1), (MAIN, 0)])
    story.stack(WEB, 2, [(TASK, 1), (MAIN, 0)])
    return story


def sequential() -> StackStory:
    story = web()
    front = story.link(CLIENT, WEB, 80)
    back = story.link(WEB, DB, 5432)
    story.ask(front, http("GET /cart"), answer(), 10 * MS, TOOK)
    story.ask(back, query("SELECT 1"), selected(1), 30 * MS, 20 * MS)
    return story


def request_of(recording: Recording) -> tuple[int, pl.DataFrame]:
    """The request that the worker handled, and its span."""
    spans = recording.collect(recording.spans())
    served = spans.filter((pl.col("kind") == "server") & (pl.col("tgid") == WEB))
    assert served.height >= 1
    return int(served["span_id"][0]), served


def profile_of(recording: Recording) -> tuple[Profile, int]:
    span_id, served = request_of(recording)
    return of_request(recording, span_id), int(served["duration_ns"][0])


CART = "web GET /cart;gunicorn"
PYTHON = "main (shop/main.py:1);view (shop/web.py:30)"


def test_a_request_of_a_worker_adds_up_to_its_duration(tmp_path):
    story = sequential()
    story.off(WEB, "recvfrom", 30 * MS + 10 * US, 19 * MS, ready_ns=MS, stack=1)
    story.off(WEB, "futex", 60 * MS, 3 * US)
    story.tick(WEB, 1, 15 * MS)
    story.tick(WEB, 2, 70 * MS)
    story.tick(WEB, 2, 80 * MS)
    story.tick(WEB, 1, 5 * MS)  # before it
    story.tick(WEB, 1, 200 * MS)  # after it
    story.off(WEB, "epoll_wait", 150 * MS, 40 * MS, stack=1)
    profile, took = profile_of(story.record(tmp_path / "a.scope"))
    found = weights(profile)
    cpu = took - 19 * MS - 3 * US
    task = f"{CART};main (shop/main.py:1);task (shop/web.py:60)"
    assert found[f"{CART};{PYTHON};recvfrom"] == 18 * MS
    assert found[f"{CART};{PYTHON};recvfrom;[ready to run]"] == MS
    assert found[f"{CART};[shorter waits];futex"] == 3 * US
    assert found[f"{CART};{PYTHON}"] + found[task] == cpu
    assert found[task] - 2 * found[f"{CART};{PYTHON}"] in (0, -1, -2, 1, 2)
    # the database's own thread is a part of it, too: no sample of it
    database = sum(ns for path, ns in found.items() if path.startswith("postgresql "))
    assert profile.total_ns == took + database
    assert 19 * MS < database < 20 * MS
    assert profile.notes == ()


def test_a_wait_that_reaches_out_of_the_request_counts_inside_of_it(tmp_path):
    story = sequential()
    story.off(WEB, "futex", 105 * MS, 50 * MS, stack=1)
    profile, took = profile_of(story.record(tmp_path / "a.scope"))
    _, served = request_of(story.record(tmp_path / "b.scope"))
    ended = served["start_ns"][0] + took
    assert weights(profile)[f"{CART};{PYTHON};futex"] == ended - at(105 * MS)


def test_a_request_shorter_than_a_period_keeps_its_time(tmp_path):
    story = sequential()
    profile, took = profile_of(story.record(tmp_path / "a.scope"))
    assert weights(profile)[f"{CART};[on the CPU, no sample]"] == took


def concurrent(*, contexts: bool) -> StackStory:
    """An event loop that handles two requests at once."""
    story = web()
    one, other = story.link(CLIENT, WEB, 80), story.link(CLIENT, WEB, 80)
    story.ask(one, http("GET /cart"), answer(), 10 * MS, TOOK)
    story.ask(other, http("GET /other"), answer(), 20 * MS, TOOK)
    if contexts:
        flows = [
            (10 * MS + 5 * US, 1),
            (20 * MS + 5 * US, 2),
            (10 * MS + TOOK, 1),
            (20 * MS + TOOK, 2),
        ]
        for time_ns, context in flows:
            story.row("flows", start_ns=at(time_ns), tgid=WEB, tid=WEB, context=context)
        for context, parent, time_ns in ((1, 0, 5 * MS), (2, 0, 5 * MS), (3, 1, 30 * MS), (4, 3, 31 * MS),
                                         (5, 2, 32 * MS), (6, 1, 6 * MS)):  # fmt: skip
            story.row("contexts", time_ns=at(time_ns), tgid=WEB, tid=WEB, context=context,
                      parent=parent, kind=1)  # fmt: skip
    return story


def test_in_an_event_loop_only_the_contexts_of_the_request_count(tmp_path):
    story = concurrent(contexts=True)
    story.tick(WEB, 1, 40 * MS, context=1)
    story.tick(WEB, 2, 41 * MS, context=4)  # a task of a task of it
    story.tick(WEB, 2, 42 * MS, context=4, tid=21)  # to_thread: in another thread
    story.thread(WEB, 21, "asyncio_0")
    story.tick(WEB, 1, 43 * MS, context=2)  # the other request's
    story.tick(WEB, 1, 44 * MS, context=5)
    story.tick(WEB, 1, 45 * MS, context=6)  # made before the request
    story.tick(WEB, 1, 46 * MS, context=0)  # the loop itself
    recording = story.record(tmp_path / "a.scope")
    spans = recording.collect(recording.spans()).filter(pl.col("kind") == "server")
    span = spans.filter(pl.col("detail").str.contains("cart")).row(0, named=True)
    if span["context"] != 1:
        pytest.fail(f"the span is in the context {span['context']}")
    found = weights(of_request(recording, span["span_id"]))
    task = "main (shop/main.py:1);task (shop/web.py:60)"
    assert found == {
        f"{CART};{PYTHON}": PERIOD,
        f"{CART};{task}": PERIOD,
        f"web GET /cart;asyncio_0;{task}": PERIOD,
    }


def test_of_a_thread_that_did_several_things_nothing_is_claimed(tmp_path):
    story = concurrent(contexts=False)
    story.tick(WEB, 1, 40 * MS)
    profile, _ = profile_of(story.record(tmp_path / "a.scope"))
    assert profile.stacks == {}
    assert "1 of 1 spans are left out" in profile.notes[0]
    assert "worked on other requests at the same time" in (profile.empty or "")


def test_without_offcpu_time_ticks_weigh_a_period(tmp_path):
    story = sequential()
    story.tick(WEB, 1, 40 * MS)
    families = [name for name in FAMILIES if name != "offcpu"]
    profile, _ = profile_of(story.record(tmp_path / "a.scope", families=families))
    assert weights(profile) == {f"{CART};{PYTHON}": PERIOD}
    assert "off-CPU time was not recorded" in profile.notes[0]


def test_without_anything_it_says_why(tmp_path):
    story = sequential()
    families = [name for name in FAMILIES if name != "offcpu"]
    profile, _ = profile_of(story.record(tmp_path / "a.scope", families=families))
    assert profile.stacks == {}
    assert "nothing was sampled in it" in (profile.empty or "")
    families.remove("samples")
    profile, _ = profile_of(story.record(tmp_path / "b.scope", families=families))
    assert "samples in --families" in (profile.empty or "")


def test_contexts_of_a_span_are_its_own_and_those_made_meanwhile(tmp_path):
    story = StackStory()
    for context, parent, time_ns in ((11, 1, 50), (12, 11, 60), (13, 1, 150), (14, 12, 160),
                                     (2, 1, 55), (21, 2, 70)):  # fmt: skip
        story.row("contexts", time_ns=at(time_ns), tgid=WEB, tid=WEB, context=context,
                  parent=parent, kind=1)  # fmt: skip
    # the third one is handled in a context that was made in the first one's
    spans = pl.DataFrame(
        {
            "tgid": WEB,
            "tid": WEB,
            "span_id": [1, 2, 3],
            "context": [1, 1, 2],
            "from_ns": [at(0), at(100), at(58)],
            "to_ns": [at(100), at(200), at(90)],
        },
        schema_overrides={"tgid": pl.UInt32, "context": pl.UInt64},
    )
    found = _with_descendants(story.record(tmp_path / "a.scope"), spans)
    contexts = found.group_by("span_id").agg(pl.col("context").sort()).sort("span_id")
    assert contexts.rows() == [(1, [1, 11, 12]), (2, [1, 13]), (3, [2, 21])]
