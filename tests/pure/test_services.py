"""Services: the names of processes, and who talks to whom."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf.analysis.schema import SPANS
from scope_ebpf.analysis.services import (
    OUTSIDE,
    SERVICE_MAP,
    add_services,
    service_lives,
    service_map,
    service_names,
)

pytestmark = pytest.mark.pure
SCHEMA = {
    "time_ns": pl.Int64, "event": pl.String, "tgid": pl.UInt32, "tid": pl.UInt32,
    "parent_tgid": pl.UInt32, "comm": pl.String, "command_line": pl.String, "cgroup": pl.String,
}  # fmt: skip
CONTAINER = "4f1c2d3e5a6b" + "0" * 52


def process(tgid: int, command_line: str | None, **changes: Any) -> dict[str, Any]:
    row = {"time_ns": tgid, "event": "alive", "tgid": tgid, "tid": tgid, "parent_tgid": 1}
    return {**row, "comm": "python3", "command_line": command_line, "cgroup": "/", **changes}


def names(*rows: dict[str, Any]) -> dict[int, str]:
    found = service_names(pl.DataFrame(list(rows), schema=SCHEMA))
    return dict(found.iter_rows())


def name(command_line: str | None, **changes: Any) -> str:
    return names(process(7, command_line, **changes))[7]


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        ("gunicorn web:app", "web"),
        ("/usr/bin/python3 /usr/bin/gunicorn -w 4 -b :8000 -k gthread web:app", "web"),
        ("gunicorn -c conf.py 'shop.web:create_app()'", "web"),
        ("gunicorn -k uvicorn.workers.UvicornWorker shop.web.main:app", "web"),
        ("python -m gunicorn --bind localhost:80 --preload inventory", "inventory"),
        ("gunicorn --chdir /srv/shop --bind fd://3 app:app", "shop"),
        ("gunicorn --name=billing app:app", "billing"),
        ("gunicorn app:app", "app"),
        ("gunicorn -c conf.py", "gunicorn"),
        ("'gunicorn: worker [web:app]'", "web"),
        ("'gunicorn: master [billing service]'", "billing service"),
        ("uvicorn --reload shop.api.asgi:application --port 80", "api"),
        ("python -m uvicorn payments:app --factory", "payments"),
        ("uvicorn --app-dir /home/alice/orders/src main:app", "orders"),
        ("hypercorn shop.web:app", "web"),
        ("uwsgi --http :80 --module shop.wsgi:application", "shop"),
        ("uwsgi --wsgi-file /srv/shop/app.py", "shop"),
        ("uwsgi --ini /etc/uwsgi/billing.ini", "billing"),
        ("flask --app web run", "web"),
        ("python -m flask --app shop/app.py run", "shop"),
        ("celery -A proj worker -l info", "celery:proj"),
        ("python -m celery --app=shop.celery_app:app worker", "celery:shop"),
        ("/venv/bin/celery -Ashop.tasks beat", "celery-beat:shop"),
        ("'[celeryd: celery@host:MainProcess] -active- (worker -A proj)'", "celery:proj"),
        ("rq worker --url redis://localhost -v mail high", "rq:mail,high"),
        ("python /venv/bin/rq worker default", "rq"),
        ("rq worker", "rq"),
        ("'rq:worker:abc: Listening on mail'", "rq:mail"),
        ("'rq:worker:abc: Started 1 at 2'", "rq"),
        ("dramatiq shop.tasks -p 1", "dramatiq:shop"),
        ("dramatiq --processes 2 mailer:broker", "dramatiq:mailer"),
        ("python -X dev -u -m shop.jobs --all", "shop.jobs"),
        ("python -m shop.__main__", "shop"),
        ("python3.12 -W ignore worker.py --fast", "worker"),
        ("python /srv/orders/main.py", "orders"),
        ("python main.py", "main"),
        ("python /usr/bin/myservice", "myservice"),
        ("python /srv/shop/manage.py runserver", "shop"),
        ("python manage.py runserver 0:80", "manage"),
        ("python /srv/shop/manage.py qcluster", "shop:qcluster"),
        ("'postgres: shop shop 127.0.0.1(5444) idle'", "postgresql"),
        ("/usr/lib/postgresql/15/bin/postgres -D /data", "postgresql"),
        ("'/usr/bin/redis-server *:6379' ''", "redis"),
        ("/usr/bin/redis-server 127.0.0.1:6379", "redis"),
        ("'nginx: worker process'", "nginx"),
        ("/usr/sbin/mariadbd", "mysql"),
        ("memcached -m 64", "memcached"),
        ("python -c 'import shop'", "python3"),
        ("python", "python3"),
        ("sleep 'unfinished", "python3"),
    ],
)
def test_a_command_line_names_its_service(command_line, expected):
    assert name(command_line) == expected


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("/system.slice/billing.service", "billing"),
        ("/system.slice/system-shop.slice/shop@3.service", "shop"),
        ("/system.slice/my\\x2dshop.service/workers", "my-shop"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service", "shop"),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", "node"),
        ("/user.slice/user-1000.slice/session-2.scope", "node"),
        (f"/system.slice/docker-{CONTAINER}.scope", "node@4f1c2d3e5a6b"),
        (f"/kubepods/burstable/pod1-2/{CONTAINER}", "node@4f1c2d3e5a6b"),
        (None, "node"),
    ],
)
def test_where_it_runs_names_what_nothing_else_does(cgroup, expected):
    assert name("/usr/bin/node server.js", comm="node", cgroup=cgroup) == expected


def test_a_unit_counts_before_a_module_that_says_nothing_and_after_one_that_does():
    unit = "/system.slice/shop-web.service"
    assert name("gunicorn app:app", cgroup=unit) == "shop-web"
    assert name("gunicorn web:app", cgroup=unit) == "web"
    assert name("gunicorn -c conf.py", cgroup=unit) == "shop-web"


def test_the_last_command_line_counts():
    rows = [
        process(7, "sh -c 'exec gunicorn web:app'", time_ns=1, event="fork", comm="sh"),
        process(7, "gunicorn web:app", time_ns=3, event="exec", comm="gunicorn"),
        process(7, None, time_ns=4, event="thread", tid=9, comm="pool-1"),
        process(7, None, time_ns=5, event="exit", comm="gunicorn"),
        process(8, "gunicorn web:app", time_ns=4, event="fork", parent_tgid=7),
    ]
    assert names(*reversed(rows)) == {7: "web", 8: "web"}


def test_a_comm_of_a_thread_does_not_name_the_process():
    thread = process(7, None, time_ns=9, event="thread", tid=8, comm="io-thread")
    assert names(process(7, None, comm="java"), thread) == {7: "java"}
    assert names(thread) == {7: "io-thread"}
    assert name(None, comm=None) == "tgid-7"
    assert name(None, comm="redis-server") == "redis"


def test_spawned_children_are_named_like_their_parents():
    spawned = "python -c 'from multiprocessing.spawn import spawn_main; spawn_main(3)'"
    rows = [
        process(7, "uvicorn web:app --workers 2"),
        process(8, f"{spawned} --multiprocessing-fork", parent_tgid=7),
        process(9, spawned, parent_tgid=8),
        process(10, spawned, parent_tgid=99, cgroup="/system.slice/job.service"),
        process(11, spawned, parent_tgid=12),  # a cycle, since tgids are used again
        process(12, spawned, parent_tgid=11),
    ]
    assert names(*rows) == {7: "web", 8: "web", 9: "web", 10: "job", 11: "python", 12: "python"}


def test_different_programs_of_one_name_are_told_apart():
    rows = [
        process(1, "gunicorn shop.web:app"),
        process(2, "gunicorn billing.web:app"),
        process(3, "python /srv/a/worker.py"),
        process(4, "python /srv/b/worker.py"),
        process(5, "gunicorn api:app", cgroup="/system.slice/staging.service"),
        process(6, "gunicorn api:app", cgroup="/system.slice/live.service"),
        process(7, "gunicorn --chdir /srv/x/web main:app"),
    ]
    assert names(*rows) == {
        1: "shop.web",
        2: "billing.web",
        3: "/srv/a/worker.py",
        4: "/srv/b/worker.py",
        5: "api@staging",
        6: "api@live",
        7: "/srv/x/web/main",
    }


def test_replicas_and_what_may_be_the_same_share_a_name():
    rows = [
        process(1, "gunicorn -b :8001 web:app"),
        process(2, "gunicorn -b :8002 web:app", cgroup=f"/docker/{CONTAINER}"),
        process(3, "python worker.py"),
        process(4, "python /srv/shop/worker.py"),
        process(5, "gunicorn api:app", cgroup="/system.slice/api@1.service"),
        process(6, "gunicorn api:app", cgroup="/system.slice/api@2.service"),
        process(7, "/usr/lib/postgresql/15/bin/postgres -D /a"),
        process(8, "'postgres: checkpointer '"),
    ]
    assert list(names(*rows).values()) == [
        "web", "web", "worker", "worker", "api", "api", "postgresql", "postgresql"
    ]  # fmt: skip


def test_no_processes_have_no_names():
    assert names() == {}


def test_ten_thousand_backends_are_named():
    rows = [process(n, f"'postgres: shop shop 10.0.0.1({n}) idle'") for n in range(10_000)]
    assert set(names(*rows).values()) == {"postgresql"}


def span(span_id: int, **columns: Any) -> dict[str, Any]:
    usual = {"kind": "client", "service": "web", "protocol": "http", "duration_ns": 100}
    return {"span_id": span_id, "state": "complete", **usual, **columns}


def mapped(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    frame = service_map(pl.LazyFrame(list(rows), schema=SPANS))
    assert frame.schema == SERVICE_MAP
    return frame.to_dicts()


def test_calls_are_counted_as_their_clients_saw_them():
    rows = [
        span(n, peer="inventory", duration_ns=n, request_bytes=10, response_bytes=1)
        for n in range(1, 102)
    ]
    rows[3]["error"] = "Internal Server Error"
    # What the other end saw of the first, and one that the map cannot link to its client.
    rows.append(
        span(500, kind="server", service="inventory", peer="web", edge="calls", parent_id=1)
    )
    rows.append(span(501, kind="server", service="inventory", peer="web"))
    assert mapped(*rows) == [
        {
            "client": "web", "server": "inventory", "protocol": "http", "kind": "call",
            "calls": 101, "errors": 1, "p50_ns": 51, "p95_ns": 96, "p99_ns": 100,
            "total_ns": 5151, "bytes": 1111,
        }
    ]  # fmt: skip


def test_unrecorded_clients_are_outside():
    (row,) = mapped(span(1, kind="server", service="web", peer="10.0.0.9:4711"))
    assert (row["client"], row["server"], row["calls"]) == (OUTSIDE, "web", 1)


def test_unrecorded_servers_are_their_addresses():
    rows = mapped(span(1, peer="10.0.0.9:5432", protocol="postgresql"), span(2, protocol=None))
    assert [(row["server"], row["protocol"]) for row in rows] == [
        ("10.0.0.9:5432", "postgresql"),
        ("unknown", None),
    ]


def test_jobs_lead_from_who_queued_them_to_who_did_them():
    rows = mapped(
        span(1, protocol="redis", peer="redis"),
        span(2, kind="consumer", service="rq:mail", protocol="redis", edge="queued_by",
             parent_id=1, duration_ns=900, error="ValueError"),
        span(3, kind="consumer", service="rq:mail", protocol="redis", duration_ns=5),
    )  # fmt: skip
    assert [(r["client"], r["server"], r["kind"], r["calls"], r["errors"]) for r in rows] == [
        ("web", "rq:mail", "queue", 1, 1),
        ("web", "redis", "call", 1, 0),
        (OUTSIDE, "rq:mail", "queue", 1, 0),
    ]


def test_a_process_that_died_called_nobody():
    (row,) = mapped(
        span(1, peer="redis", operation="connect", error="ECONNREFUSED", state="no_response"),
        span(2, kind="fault", service="redis", error="killed by SIGKILL"),
    )
    assert (row["client"], row["server"], row["calls"], row["errors"]) == ("web", "redis", 1, 1)


def test_unfinished_calls_are_counted_but_have_no_quantiles():
    (row,) = mapped(
        span(1, peer="redis", state="open", duration_ns=7_000),
        span(2, peer="redis", state="no_response", duration_ns=1_000),
    )
    assert (row["calls"], row["total_ns"], row["p50_ns"], row["p99_ns"]) == (2, 8_000, None, None)


def test_no_spans_make_an_empty_map():
    assert mapped() == []


# ---- numbers that are used again ----


def lives(*rows: dict[str, Any]) -> list[tuple[int, int, str, str | None]]:
    return service_lives(pl.DataFrame(list(rows), schema=SCHEMA)).rows()


def test_a_number_that_is_used_again_is_another_process():
    first = process(7, "gunicorn web:app", time_ns=10)
    rows = [
        first,
        process(7, None, time_ns=15, event="thread", tid=8, comm="pool"),
        process(7, None, time_ns=20, event="exit"),
        process(7, None, time_ns=21, event="thread_exit", tid=8, comm="pool"),
        process(7, None, time_ns=30, event="fork", comm="sh"),
        process(7, "redis-server", time_ns=31, event="exec", cgroup="/system.slice/cache.service"),
        process(7, None, time_ns=40, event="exit", comm="redis-server", cgroup=None),
        # the row of its birth was lost
        process(7, "python /srv/mail.py", time_ns=50, event="exec"),
        process(9, "rq worker", time_ns=1),
    ]
    found = lives(*reversed(rows))
    assert [(tgid, service, place) for tgid, _, service, place in found] == [
        (7, "web", None),
        (7, "redis", "cache.service"),
        (7, "mail", None),
        (9, "rq", None),
    ]
    calls = pl.DataFrame(
        {"tgid": [7, 7, 9, 7, 5, 7, 7], "at": [5, 29, 99, 30, 1, 60, None]},
        schema={"tgid": pl.UInt32, "at": pl.Int64},
    )
    named = add_services(calls, service_lives(pl.DataFrame(rows, schema=SCHEMA)), "at")
    assert named["service"].to_list() == ["web", "web", "rq", "redis", None, "mail", "web"]
    assert names(*rows) == {7: "mail", 9: "rq"}


def test_what_was_forked_and_executed_nothing_is_what_its_parent_was():
    rows = [
        process(7, "gunicorn web:app", time_ns=1),
        process(8, None, time_ns=5, event="fork", parent_tgid=7, comm="gunicorn"),
        process(9, None, time_ns=6, event="fork", parent_tgid=8, comm="gunicorn"),
        process(7, "python /srv/other.py", time_ns=8, event="exec", parent_tgid=1),
        process(10, None, time_ns=9, event="fork", parent_tgid=7),
        # nobody forked that one, as far as is known: its comm is all that there is
        process(11, None, time_ns=9, event="alive", parent_tgid=7, comm="worker"),
    ]
    assert names(*rows) == {7: "other", 8: "web", 9: "web", 10: "other", 11: "worker"}


def test_a_helper_is_named_by_the_parent_that_had_the_number_then():
    spawned = "python -c 'from multiprocessing.spawn import spawn_main; spawn_main(3)'"
    rows = [
        process(7, "uvicorn web:app --workers 2", time_ns=1),
        process(8, spawned, time_ns=2, event="fork", parent_tgid=7),
        process(7, None, time_ns=3, event="exit"),
        process(7, None, time_ns=4, event="fork"),
        process(7, "uvicorn shop:app --workers 2", time_ns=5, event="exec"),
        process(9, spawned, time_ns=6, event="fork", parent_tgid=7),
    ]
    assert names(*rows) == {7: "shop", 8: "web", 9: "shop"}


@given(st.data())
def test_each_call_finds_the_process_that_made_it(data):
    """Against a plain search: the last birth of that number up to then, or its first one."""
    pairs = st.tuples(st.integers(1, 4), st.integers(0, 50))
    births = sorted(data.draw(st.sets(pairs, min_size=1, max_size=20)), key=lambda pair: pair[1])
    rows = [
        process(tgid, f"python /srv/s{at}x{tgid}.py", time_ns=at, event="fork")
        for tgid, at in births
    ]
    asked = data.draw(st.lists(pairs, max_size=20))
    calls = pl.DataFrame(asked, schema={"tgid": pl.UInt32, "at": pl.Int64}, orient="row")
    named = add_services(calls, service_lives(pl.DataFrame(rows, schema=SCHEMA)), "at")
    for (tgid, at), service in zip(asked, named["service"], strict=True):
        own = [when for number, when in births if number == tgid]
        before = [when for when in own if when <= at] or own[:1]
        assert service == (f"s{before[-1]}x{tgid}" if before else None)
