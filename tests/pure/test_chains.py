"""Stories told as recordings, and the spans and edges that must come out of them."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf.analysis.schema import EDGES, REQUESTS, SPANS
from scope_ebpf.recording.reader import Recording
from tests.pure.stories import MS, US, Story, answer, http, query, resp, selected

pytestmark = pytest.mark.pure

NGINX, WEB, INVENTORY, DATABASE, REDIS, WORKER = 10, 20, 30, 40, 50, 60


def cast() -> Story:
    """The processes that play."""
    story = Story()
    story.process(NGINX, "nginx: worker process", "nginx")
    story.process(WEB, "/usr/bin/python /usr/bin/gunicorn web:app")
    story.process(INVENTORY, "/usr/bin/python /usr/bin/gunicorn inventory:app")
    story.process(DATABASE, "postgres: shop shop 127.0.0.1(40000) idle", "postgres")
    story.process(REDIS, "redis-server 127.0.0.1:6379", "redis-server")
    story.process(WORKER, "/usr/bin/python -m rq worker", "rq")
    return story


def spans_of(recording: Recording) -> list[dict[str, Any]]:
    """All spans, each with its parent's operation and service as `under`."""
    spans = recording.spans().collect()
    assert spans.schema == SPANS
    assert recording.edges().collect().schema == EDGES
    assert recording.requests().collect().schema == REQUESTS
    parents = spans.select(
        parent_id="span_id", under=pl.format("{} {}", "service", pl.col("kind").cast(pl.String))
    )
    return spans.join(parents, on="parent_id", how="left", maintain_order="left").to_dicts()


def one(spans: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The only span with these values."""
    found = [span for span in spans if all(span[name] == value for name, value in wanted.items())]
    assert len(found) == 1, [
        {name: span[name] for name in ("kind", "service", "operation", "error", "state")}
        for span in (found or spans)
    ]
    return found[0]


def checkout(story: Story) -> None:
    """A request that asks the inventory, which asks the database."""
    outer = story.link(1, WEB, 8000)
    inner = story.link(WEB, INVENTORY, 8001)
    sql = story.link(INVENTORY, DATABASE, 5432)
    story.say(outer, http("GET /products/17?full=1"), 0, by_client=True, sender_only=False)
    story.ask(inner, http("GET /stock/17"), answer(), 1 * MS, 4 * MS)
    story.ask(sql, query("SELECT stock FROM inventory WHERE id = 17"), selected(1), 2 * MS, MS)
    story.say(outer, answer(), 7 * MS, by_client=False)


def test_a_request_and_what_it_led_to(tmp_path: Path):
    story = cast()
    checkout(story)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    web = one(spans, kind="server", service="web")
    assert web["operation"] == "GET /products/{id}"
    assert web["detail"] == "GET /products/17?full=1"
    assert (web["status"], web["state"]) == ("200", "complete")
    call = one(spans, kind="client", service="web")
    assert (call["parent_id"], call["edge"], call["evidence"]) == (
        web["span_id"],
        "calls",
        "derived",
    )
    assert (call["peer"], call["duration_ns"]) == ("inventory", 4 * MS + 5 * US)
    handled = one(spans, kind="server", service="inventory")
    assert (handled["parent_id"], handled["evidence"]) == (call["span_id"], "exact")
    asked = one(spans, kind="client", service="inventory")
    assert (asked["protocol"], asked["under"]) == ("postgresql", "inventory server")
    database = one(spans, kind="server", service="postgresql")
    assert database["parent_id"] == asked["span_id"]
    outside = one(spans, kind="client", tgid=1)
    assert outside["parent_id"] is None
    assert {span["request_id"] for span in spans} == {outside["span_id"]}
    for span in spans:
        parent = next((other for other in spans if other["span_id"] == span["parent_id"]), None)
        if parent:
            assert parent["start_ns"] <= span["start_ns"]


def test_ids_are_the_same_each_time(tmp_path: Path):
    story = cast()
    checkout(story)
    first = story.record(tmp_path / "a.scope").spans().collect()
    second = story.record(tmp_path / "b.scope").spans().collect()
    assert first.equals(second)
    assert first["span_id"].n_unique() == len(first)


def test_an_overlapping_request_proves_nothing(tmp_path: Path):
    """One thread that has two requests open works on either."""
    story = cast()
    one_client, other = story.link(1, WEB, 8000), story.link(2, WEB, 8000)
    sql = story.link(WEB, DATABASE, 5432)
    story.say(one_client, http("GET /a"), 0, by_client=True)
    story.say(other, http("GET /b"), 1 * MS, by_client=True)
    story.ask(sql, query("SELECT 1"), selected(1), 2 * MS, MS)
    story.say(one_client, answer(), 5 * MS, by_client=False)
    story.say(other, answer(), 6 * MS, by_client=False)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    assert one(spans, kind="client", service="web")["parent_id"] is None


def test_threads_do_not_mix(tmp_path: Path):
    story = cast()
    for index, tid in enumerate((21, 22)):
        outer = story.link(1, WEB, 8000)
        sql = story.link(WEB, DATABASE, 5432)
        start = index * 100 * US
        story.say(outer, http(f"GET /{'ab'[index]}"), start, by_client=True, other_tid=tid)
        story.ask(sql, query(f"SELECT {'ab'[index]}"), selected(1), start + MS, MS, tid=tid)
        story.say(outer, answer(), start + 5 * MS, by_client=False, tid=tid)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    for letter in "ab":
        server = one(spans, kind="server", service="web", operation=f"GET /{letter}")
        call = one(spans, kind="client", service="web", operation=f"SELECT {letter}")
        assert call["parent_id"] == server["span_id"]


def test_an_event_loop_is_only_guessed(tmp_path: Path):
    story = cast()
    outer, sql = story.link(1, WEB, 8000), story.link(WEB, DATABASE, 5432)
    story.say(outer, http("GET /a"), 0, by_client=True)
    story.call(WEB, "epoll_wait", 500 * US)
    story.ask(sql, query("SELECT 1"), selected(1), MS, MS)
    story.say(outer, answer(), 4 * MS, by_client=False)
    call = one(spans_of(story.record(tmp_path / "a.scope")), kind="client", service="web")
    assert (call["edge"], call["evidence"]) == ("calls", "guess")


def test_nothing_is_proven_without_system_calls(tmp_path: Path):
    story = cast()
    checkout(story)
    recording = story.record(tmp_path / "a.scope", families=["processes", "messages"])
    call = one(spans_of(recording), kind="client", service="web")
    assert call["evidence"] == "guess"


def test_a_proxy_is_known_by_the_request_line(tmp_path: Path):
    """Two requests in an event loop, the second one's answer first."""
    story = cast()
    near = [story.link(1, NGINX, 80), story.link(2, NGINX, 80)]
    far = [story.link(NGINX, WEB, 8000, server_tid=21), story.link(NGINX, WEB, 8000, server_tid=22)]
    for index, path in enumerate(("/a", "/b")):
        story.say(near[index], http(f"GET {path}"), index * 100 * US, by_client=True)
        story.say(far[index], http(f"GET {path}"), index * 100 * US + 20 * US, by_client=True)
        story.call(NGINX, "epoll_wait", index * 100 * US + 40 * US)
    for index in (1, 0):
        story.say(far[index], answer(), 5 * MS - index * MS, by_client=False)
        story.say(near[index], answer(), 5 * MS - index * MS + 20 * US, by_client=False)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    for path in ("/a", "/b"):
        came = one(spans, kind="server", service="nginx", operation=f"GET {path}")
        passed = one(spans, kind="client", service="nginx", operation=f"GET {path}")
        handled = one(spans, kind="server", service="web", operation=f"GET {path}")
        assert (passed["parent_id"], passed["evidence"]) == (came["span_id"], "derived")
        assert (handled["parent_id"], handled["evidence"]) == (passed["span_id"], "exact")


def test_equal_requests_that_wait_for_the_proxy_are_not_told_apart(tmp_path: Path):
    story = cast()
    near = [story.link(1, NGINX, 80), story.link(2, NGINX, 80)]
    far = [story.link(NGINX, WEB, 8000, server_tid=21), story.link(NGINX, WEB, 8000, server_tid=22)]
    for index in (0, 1):
        story.say(near[index], http("GET /a"), index * 10 * US, by_client=True)
    story.call(NGINX, "epoll_wait", 40 * US)
    for index in (1, 0):
        story.say(far[index], http("GET /a"), 100 * US - index * 10 * US, by_client=True)
        story.say(far[index], answer(), MS, by_client=False)
        story.say(near[index], answer(), 2 * MS, by_client=False)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    passed = [span for span in spans if span["kind"] == "client" and span["service"] == "nginx"]
    assert len(passed) == 2
    assert [span["parent_id"] for span in passed] == [None, None]


def test_a_hundred_continue_is_no_response(tmp_path: Path):
    story = cast()
    outer = story.link(1, WEB, 8000)
    story.say(
        outer, http("POST /a", b"", "Expect: 100-continue", "Content-Length: 3"), 0, by_client=True
    )
    story.say(outer, b"HTTP/1.1 100 Continue\r\n\r\n", MS, by_client=False)
    story.say(outer, b"abc", 2 * MS, by_client=True)
    story.say(outer, answer("201 Created"), 5 * MS, by_client=False)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    server = one(spans, kind="server", service="web")
    assert (server["status"], server["state"]) == ("201", "complete")
    assert server["duration_ns"] > 4 * MS


def test_keep_alive_is_one_span_per_request(tmp_path: Path):
    story = cast()
    outer = story.link(1, WEB, 8000)
    for index in range(23):
        story.ask(outer, http(f"GET /a{index}/b"), answer(), index * 2 * MS, MS)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    servers = [span for span in spans if span["kind"] == "server"]
    assert len(servers) == 23
    assert [span["detail"] for span in servers] == [f"GET /a{index}/b" for index in range(23)]
    assert all(span["edge"] == "calls" and span["evidence"] == "exact" for span in servers)


def test_pipelined_requests_are_counted(tmp_path: Path):
    story = cast()
    outer = story.link(1, WEB, 8000)
    story.ask(outer, http("GET /a") + http("GET /b"), answer() + answer(), 0, MS)
    server = one(spans_of(story.record(tmp_path / "a.scope")), kind="server")
    assert (server["operation"], server["status"]) == ("GET /a and 1 more", "200")


def test_a_response_to_what_came_before_the_recording(tmp_path: Path):
    story = cast()
    outer = story.link(1, WEB, 8000)
    story.say(outer, answer(), MS, by_client=False)
    story.ask(outer, http("GET /a"), answer(), 2 * MS, MS)
    recording = story.record(tmp_path / "a.scope")
    states = [span["state"] for span in spans_of(recording) if span["service"] == "web"]
    assert states == ["began_before", "complete"]
    assert recording.requests().collect()["detail"].to_list() == ["GET /a"]


def test_a_connection_may_begin_anywhere_in_the_sequence_numbers(tmp_path: Path):
    story = cast()
    outer = story.link(1, WEB, 8000)
    outer.positions = {True: 2**32 - 30, False: 2**32 - 50}
    for index in range(5):
        story.ask(outer, http("GET /a"), answer(), index * 2 * MS, MS)
    servers = [s for s in spans_of(story.record(tmp_path / "a.scope")) if s["kind"] == "server"]
    assert [span["evidence"] for span in servers] == ["exact"] * 5


def queue_story(push: bytes, popped: bytes, ask: bytes) -> Story:
    """Web pushes within a request; the worker, which has waited, gets it."""
    story = cast()
    outer = story.link(1, WEB, 8000)
    put, taken = story.link(WEB, REDIS, 6379), story.link(WORKER, REDIS, 6379)
    sql = story.link(WORKER, DATABASE, 5432)
    story.say(taken, ask, 0, by_client=True)
    story.say(outer, http("POST /checkout"), MS, by_client=True)
    story.ask(put, push, b":1\r\n", 2 * MS, 100 * US)
    story.say(taken, popped, 2 * MS + 60 * US, by_client=False)
    story.say(outer, answer("201 Created"), 3 * MS, by_client=False)
    story.ask(sql, query("INSERT INTO mails VALUES (1)"), selected(0), 4 * MS, MS)
    story.say(taken, ask, 7 * MS, by_client=True)
    return story


@pytest.mark.parametrize(
    ("push", "popped", "ask"),
    [
        (
            resp("LPUSH", "shop:jobs", '{"job": 1}'),
            b'*2\r\n$9\r\nshop:jobs\r\n$10\r\n{"job": 1}\r\n',
            resp("BRPOP", "shop:jobs", "5"),
        ),
        (
            resp("LPUSH", "celery", '{"id": "0b4a41b9-2cf6-4a7c-8f3c-0d6c4c2f6a11", "retries": 0}'),
            b"*2\r\n$6\r\ncelery\r\n$61\r\n"
            b'{"id": "0b4a41b9-2cf6-4a7c-8f3c-0d6c4c2f6a11", "retries": 0}\r\n',
            resp("BRPOP", "celery", "0"),
        ),
        (
            resp("MULTI") + resp("HSET", "rq:job:0b4a41b9-2cf6-4a7c-8f3c-0d6c4c2f6a11", "a", "b")
            + resp("RPUSH", "rq:queue:default", "0b4a41b9-2cf6-4a7c-8f3c-0d6c4c2f6a11") + resp("EXEC"),
            b"$36\r\n0b4a41b9-2cf6-4a7c-8f3c-0d6c4c2f6a11\r\n",
            resp("BLMOVE", "rq:queue:default", "rq:intermediate:default", "RIGHT", "LEFT", "5"),
        ),
    ],
    ids=["element", "celery", "rq"],
)  # fmt: skip
def test_a_job_goes_through_a_queue(tmp_path: Path, push: bytes, popped: bytes, ask: bytes):
    spans = spans_of(queue_story(push, popped, ask).record(tmp_path / "a.scope"))
    producer = next(
        s
        for s in spans
        if s["kind"] == "client" and s["service"] == "web" and s["protocol"] == "redis"
    )
    job = one(spans, kind="consumer")
    assert (job["parent_id"], job["edge"]) == (producer["span_id"], "queued_by")
    assert (job["evidence"], job["service"]) == ("derived", "rq")
    assert job["start_ns"] >= producer["start_ns"]
    insert = one(spans, kind="client", service="rq", protocol="postgresql")
    assert (insert["parent_id"], insert["edge"]) == (job["span_id"], "calls")
    assert insert["request_id"] == one(spans, kind="client", tgid=1)["span_id"]


def test_another_job_is_not_linked(tmp_path: Path):
    """The pushed job and the popped one differ: theirs is not this producer."""
    story = queue_story(
        resp("LPUSH", "shop:jobs", '{"job": 1}'),
        b'*2\r\n$9\r\nshop:jobs\r\n$10\r\n{"job": 2}\r\n',
        resp("BRPOP", "shop:jobs", "5"),
    )
    job = one(spans_of(story.record(tmp_path / "a.scope")), kind="consumer")
    assert (job["parent_id"], job["edge"], job["evidence"]) == (None, None, None)


def test_equal_jobs_are_told_apart_by_order_or_not_at_all(tmp_path: Path):
    story = cast()
    put, taken = story.link(WEB, REDIS, 6379), story.link(WORKER, REDIS, 6379)
    push, ask = resp("LPUSH", "jobs", "same"), resp("BRPOP", "jobs", "5")
    popped = b"*2\r\n$4\r\njobs\r\n$4\r\nsame\r\n"
    for index in range(3):
        story.ask(put, push, b":1\r\n", (1 + 10 * index) * MS, 100 * US)
        story.ask(taken, ask, popped, (3 + 10 * index) * MS, MS)
    story.ask(put, push, b":1\r\n", 41 * MS, 100 * US)
    story.ask(put, push, b":2\r\n", 42 * MS, 100 * US)
    story.ask(taken, ask, popped, 43 * MS, MS)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    jobs = [span for span in spans if span["kind"] == "consumer"]
    pushes = [
        span["span_id"] for span in spans if span["kind"] == "client" and span["service"] == "web"
    ]
    assert [job["parent_id"] for job in jobs] == [*pushes[:3], None]


def test_a_thread_that_answers_requests_is_no_worker(tmp_path: Path):
    """It popped within a request; what it does in the next one is not the work on that."""
    story = cast()
    outer, cache = story.link(1, WEB, 8000), story.link(WEB, REDIS, 6379)
    sql = story.link(WEB, DATABASE, 5432)
    # another thread receives the requests, as with waitress
    for start, ask in ((0, resp("BLPOP", "tokens", "1")), (10 * MS, None)):
        story.say(outer, http("GET /a"), start, by_client=True, other_tid=21)
        if ask:
            story.ask(cache, ask, b"*2\r\n$6\r\ntokens\r\n$1\r\na\r\n", start + MS, MS)
        else:
            story.ask(sql, query("SELECT 1"), selected(1), start + MS, MS)
        story.say(outer, answer(), start + 5 * MS, by_client=False)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    assert not [span for span in spans if span["kind"] == "consumer"]
    asked = one(spans, kind="client", service="web", protocol="postgresql")
    assert asked["evidence"] in (None, "guess")


def test_what_popped_once_need_not_be_a_worker(tmp_path: Path):
    story = cast()
    put, taken = story.link(WEB, REDIS, 6379), story.link(WORKER, REDIS, 6379)
    sql = story.link(WORKER, DATABASE, 5432)
    story.ask(put, resp("LPUSH", "jobs", "a"), b":1\r\n", MS, 100 * US)
    popped = b"*2\r\n$4\r\njobs\r\n$1\r\na\r\n"
    story.ask(taken, resp("BRPOP", "jobs", "5"), popped, 2 * MS, MS)
    story.ask(sql, query("SELECT 1"), selected(1), 5 * MS, MS)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    assert one(spans, kind="consumer")["edge"] == "queued_by"
    asked = one(spans, kind="client", service="rq", protocol="postgresql")
    assert asked["evidence"] == "guess"


def test_requests_of_a_recorded_client_are_entries(tmp_path: Path):
    story = cast()
    checkout(story)
    requests = story.record(tmp_path / "a.scope").requests().collect()
    assert requests.select("service", "entry").rows() == [("web", True), ("inventory", False)]


def test_one_end_tells_what_the_other_did_not_see(tmp_path: Path):
    """The server read its request without a head that says anything."""
    story = cast()
    sql = story.link(WEB, DATABASE, 5432)
    story.ask(sql, query("SELECT a"), selected(1), MS, MS)
    story.ask(sql, query("SELECT b"), selected(1), 10 * MS, MS)
    for row in story.rows["messages"][4:]:
        if row["tgid"] == DATABASE:
            row["payload"] = None
    spans = spans_of(story.record(tmp_path / "a.scope"))
    server = one(spans, kind="server", operation="SELECT b")
    assert (server["status"], server["evidence"]) == ("SELECT 1", "exact")


def test_an_epoll_set_of_one_member_is_no_event_loop(tmp_path: Path):
    """psycopg 3 waits for its socket so; with a second member it may be one."""
    for members, evidence in ((1, "derived"), (2, "guess")):
        story = cast()
        outer, sql = story.link(1, WEB, 8000), story.link(WEB, DATABASE, 5432)
        story.say(outer, http("GET /a"), 0, by_client=True)
        story.call(WEB, "epoll_create1", 200 * US, result=9)
        for member in range(members):
            story.call(WEB, "epoll_ctl", (300 + member) * US, arg0=9, arg1=1, arg2=5 + member)
        story.call(WEB, "epoll_wait", 500 * US, arg0=9, arg2=1)
        story.ask(sql, query("SELECT 1"), selected(1), MS, MS)
        story.say(outer, answer(), 4 * MS, by_client=False)
        recording = story.record(tmp_path / f"{members}.scope")
        call = one(spans_of(recording), kind="client", service="web")
        assert call["evidence"] == evidence


def test_a_worker_that_forks(tmp_path: Path):
    """The forked child's calls belong to the job if the child ends within it."""
    story = cast()
    put, taken = story.link(WEB, REDIS, 6379), story.link(WORKER, REDIS, 6379)
    inside, after = story.link(61, DATABASE, 5432), story.link(62, DATABASE, 5432)
    ask = resp("BRPOP", "jobs", "5")
    story.say(taken, ask, 0, by_client=True)
    story.ask(put, resp("LPUSH", "jobs", "a"), b":1\r\n", MS, 100 * US)
    story.say(taken, b"*2\r\n$4\r\njobs\r\n$1\r\na\r\n", MS + 50 * US, by_client=False)
    story.fork(WORKER, 61, 2 * MS)
    story.fork(WORKER, 62, 2 * MS)
    story.ask(inside, query("SELECT a"), selected(1), 3 * MS, MS)
    story.ask(after, query("SELECT b"), selected(1), 3 * MS, MS)
    story.exit(61, 6 * MS)
    story.say(taken, ask, 7 * MS, by_client=True)
    story.exit(62, 9 * MS)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    job = one(spans, kind="consumer")
    child = one(spans, kind="client", tgid=61)
    assert (child["parent_id"], child["edge"], child["evidence"]) == (
        job["span_id"], "forked_by", "exact",
    )  # fmt: skip
    assert one(spans, kind="client", tgid=62)["parent_id"] is None


def test_a_cache_miss_triggers_what_fills_the_cache(tmp_path: Path):
    story = cast()
    outer, cache, sql = (
        story.link(1, WEB, 8000), story.link(WEB, REDIS, 6379), story.link(WEB, DATABASE, 5432)
    )  # fmt: skip
    story.say(outer, http("GET /products/1"), 0, by_client=True)
    story.ask(cache, resp("GET", "product:1"), b"$-1\r\n", MS, MS)
    story.ask(sql, query("SELECT * FROM products WHERE id = 1"), selected(1), 3 * MS, MS)
    story.ask(cache, resp("SET", "product:1", "x"), b"+OK\r\n", 5 * MS, MS)
    story.say(outer, answer(), 8 * MS, by_client=False)
    recording = story.record(tmp_path / "a.scope")
    spans = spans_of(recording)
    miss = one(spans, kind="client", service="web", status="nil")
    assert miss["miss"] is True
    sql_span = one(spans, kind="client", service="web", protocol="postgresql")
    edges = recording.edges().collect().filter(pl.col("edge") == "triggered_by").to_dicts()
    assert (miss["span_id"], sql_span["span_id"]) in {
        (e["cause_id"], e["effect_id"]) for e in edges
    }
    assert sql_span["under"] == "web server"


def test_a_failure_points_to_what_died(tmp_path: Path):
    """Redis is killed; the connect is refused; the request fails; each points to its cause."""
    story = cast()
    outer, cache = story.link(1, WEB, 8000), story.link(WEB, REDIS, 6379)
    story.ask(cache, resp("GET", "a"), b"$1\r\nb\r\n", MS, MS)
    story.exit(REDIS, 5 * MS, signal=9)
    story.say(outer, http("GET /products/1"), 10 * MS, by_client=True)
    refused = {"kind": "tcp", "remote_address": "127.0.0.1", "remote_port": 6379, "result": -111}
    story.row(
        "connects",
        start_ns=11 * MS + story_start(),
        duration_ns=US,
        tgid=WEB,
        tid=WEB,
        fd=9,
        **refused,
    )
    story.say(outer, answer("500 Internal Server Error"), 12 * MS, by_client=False)
    recording = story.record(tmp_path / "a.scope")
    spans = spans_of(recording)
    failed = one(spans, kind="server", service="web", status="500")
    call = one(spans, kind="client", operation="connect")
    fault = one(spans, kind="fault")
    assert (call["protocol"], call["peer"]) == ("redis", "redis")
    assert call["error"].startswith("ECONNREFUSED: connection refused")
    assert call["parent_id"] == failed["span_id"]
    assert (fault["service"], fault["operation"]) == ("redis", "killed by SIGKILL")
    edges = {
        (e["cause_id"], e["effect_id"], e["edge"]) for e in recording.edges().collect().to_dicts()
    }
    assert (fault["span_id"], call["span_id"], "caused_by") in edges
    assert (call["span_id"], failed["span_id"], "caused_by") in edges


def story_start() -> int:
    """When stories begin."""
    from tests.pure.recordings import STARTED_NS

    return STARTED_NS


def test_a_server_that_dies_while_it_works(tmp_path: Path):
    story = cast()
    outer = story.link(1, WEB, 8000)
    story.say(outer, http("GET /a"), MS, by_client=True)
    story.exit(WEB, 5 * MS, signal=11)
    story.close(outer, 5 * MS + 100 * US, by_client=False)
    recording = story.record(tmp_path / "a.scope")
    spans = spans_of(recording)
    server, client = one(spans, kind="server"), one(spans, kind="client")
    assert (server["state"], client["state"]) == ("no_response", "no_response")
    assert server["error"] == "its process ended before it was done"
    assert client["error"] == "the other end closed the connection without a response"
    fault = one(spans, kind="fault", status="SIGSEGV")
    effects = recording.edges().collect().filter(pl.col("cause_id") == fault["span_id"])
    assert set(effects["effect_id"]) == {server["span_id"], client["span_id"]}


def test_one_of_several_workers_that_dies_explains_no_refusal(tmp_path: Path):
    story = cast()
    story.process(21, "/usr/bin/python /usr/bin/gunicorn web:app")
    for worker in (WEB, 21):
        story.ask(story.link(NGINX, worker, 8000), http("GET /a"), answer(), MS, MS)
    story.exit(21, 5 * MS, signal=9)
    refused = {"kind": "tcp", "remote_address": "127.0.0.1", "remote_port": 8000, "result": -111}
    story.row(
        "connects",
        start_ns=11 * MS + story_start(),
        duration_ns=US,
        tgid=NGINX,
        tid=NGINX,
        fd=9,
        **refused,
    )
    recording = story.record(tmp_path / "a.scope")
    one(spans_of(recording), kind="fault")
    assert recording.edges().collect().filter(pl.col("edge") == "caused_by").is_empty()


def test_an_empty_recording(tmp_path: Path):
    recording = Story().record(tmp_path / "a.scope")
    assert spans_of(recording) == []
    assert recording.requests().collect().is_empty()


SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: WebSocket\r\nConnection: Upgrade\r\n\r\n"


def test_what_follows_an_upgrade_is_not_http(tmp_path: Path):
    story = cast()
    link = story.link(1, WEB, 8000)
    story.ask(link, http("GET /chat"), SWITCHED, 0, MS)
    # a word of a frame may look like the request line of another request
    story.ask(link, b"\x81\x85mask\x05\x04\x1f\x07\n", b"\x81\x02ok", 2 * MS, MS)
    story.ask(link, http("GET /nowhere"), b"\x81\x02ok", 4 * MS, MS)
    sql = story.link(WEB, DATABASE, 5432)
    story.say(link, b"\x81\x85mask\x05\x04\x1f\x07\n", 6 * MS, by_client=True)
    story.ask(sql, query("SELECT 1"), selected(1), 7 * MS, MS)
    story.say(link, b"\x81\x02ok", 9 * MS, by_client=False)
    recording = story.record(tmp_path / "a.scope")
    spans = spans_of(recording)
    served = [span for span in spans if span["kind"] == "server" and span["service"] == "web"]
    assert [(span["protocol"], span["operation"], span["status"]) for span in served] == [
        ("http", "GET /chat", "101"),
        *[("websocket", "WebSocket message", None)] * 3,
    ]
    asked = one(spans, kind="client", protocol="postgresql")
    assert asked["parent_id"] == served[-1]["span_id"]
    requests = recording.requests().collect()
    assert requests["operation"].to_list() == ["GET /chat", *["WebSocket message"] * 3]


@pytest.mark.parametrize(
    ("request_line", "response"),
    [("CONNECT example.com:443", answer(body=b"")), ("GET /", answer("101 Switching Protocols"))],
)
def test_what_a_tunnel_carries_is_not_http(tmp_path: Path, request_line: str, response: bytes):
    story = cast()
    link = story.link(1, WEB, 8000)
    story.ask(link, http(request_line), response, 0, MS)
    story.ask(link, b"\x16\x03\x01hello", b"\x16\x03\x03hello", 2 * MS, MS)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    served = [span for span in spans if span["kind"] == "server"]
    assert [(span["protocol"], span["operation"]) for span in served] == [
        ("http", request_line),
        (None, None),
    ]


def test_a_refused_upgrade_is_http(tmp_path: Path):
    story = cast()
    link = story.link(1, WEB, 8000)
    story.ask(link, http("CONNECT example.com:443"), answer("403 Forbidden"), 0, MS)
    story.ask(link, http("GET /a"), answer(), 2 * MS, MS)
    spans = spans_of(story.record(tmp_path / "a.scope"))
    served = [span["operation"] for span in spans if span["kind"] == "server"]
    assert served == ["CONNECT example.com:443", "GET /a"]
