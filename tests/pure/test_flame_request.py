"""The profile of one request: running and waiting of every thread that handled a part of it."""

from __future__ import annotations

import polars as pl
import pytest

from scope_ebpf.analysis.stacks.profile import Profile
from scope_ebpf.analysis.stacks.request import UNDIVIDED, of_request
from scope_ebpf.recording.reader import Recording
from scope_ebpf.records import ContextKind
from tests.pure.recordings import at
from tests.pure.stacks import FAMILIES, PERIOD, StackStory
from tests.pure.stories import MS, US, answer, http, query, selected
from tests.pure.test_flame import weights

pytestmark = pytest.mark.pure

CLIENT, WEB, DB, PROXY = 10, 20, 30, 40
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


def test_of_a_thread_that_did_several_things_nothing_is_claimed(tmp_path):
    story = web()
    one, other = story.link(CLIENT, WEB, 80), story.link(CLIENT, WEB, 80)
    story.ask(one, http("GET /cart"), answer(), 10 * MS, TOOK)
    story.ask(other, http("GET /other"), answer(), 20 * MS, TOOK)
    story.tick(WEB, 1, 40 * MS)
    profile, took = profile_of(story.record(tmp_path / "a.scope"))
    assert weights(profile) == {f"web GET /cart {UNDIVIDED}": took}
    assert "worked on other requests at the same time" in profile.notes[0]


def test_what_a_proxy_called_is_in_its_frame(tmp_path):
    story = web()
    story.process(PROXY, "nginx: worker process", "nginx")
    for path, begin in (("/cart", 10), ("/other", 12)):
        front, back = story.link(CLIENT, PROXY, 80), story.link(PROXY, WEB, 8000)
        story.say(front, http(f"GET {path}"), begin * MS, by_client=True)
        asked = begin * MS + 100 * US
        story.ask(back, http(f"GET {path}"), answer(), asked, 40 * MS, server_tid=WEB + begin)
        story.say(front, answer(), begin * MS + 60 * MS, by_client=False)
    recording = story.record(tmp_path / "a.scope")
    spans = recording.collect(recording.spans())
    cart = pl.col("detail").str.contains("cart") & (pl.col("tgid") == PROXY)
    span = spans.filter(cart & (pl.col("kind") == "server")).row(0, named=True)
    profile = of_request(recording, span["span_id"])
    whole = f"nginx GET /cart {UNDIVIDED}"
    call = f"{whole};nginx;[waits for web: GET /cart]"
    below = f"{call};web GET /cart;gunicorn;[on the CPU, no sample]"
    found = weights(profile)
    assert found.keys() == {whole, call, below}
    assert found[call] + found[below] == pytest.approx(40 * MS, abs=10 * US)
    assert profile.total_ns == span["duration_ns"]


def test_a_thread_whose_stack_is_met_as_a_greenlet_is_a_thread(tmp_path):
    story = web()
    front = story.link(CLIENT, WEB, 80)
    story.context(WEB, 7, 0, kind=ContextKind.CONTEXT_GREENLET)
    story.say(front, http("GET /cart"), 10 * MS, by_client=True, other_context=7)
    story.say(front, answer(), 110 * MS, by_client=False, context=7)
    recording = story.record(tmp_path / "a.scope")
    _, served = request_of(recording)
    assert served["context"][0] == 7
    profile, took = profile_of(recording)
    assert weights(profile) == {f"{CART};[on the CPU, no sample]": took}


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
