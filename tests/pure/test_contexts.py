"""Requests in event loops, thread pools and greenlets: whose a call is, told by logical contexts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_ebpf.records import ContextKind
from tests.pure.stories import MS, US, Link, Story, answer, http, query, selected

pytestmark = pytest.mark.pure

WEB, DATABASE, CLIENT = 20, 40, 1
POOL = [21, 22]
# Contexts of the connections' readers, and of others that come with the loop.
LISTENER, READER, OTHER_READER, SQL_READER = 100, 101, 102, 103
MET, GREENLET = ContextKind.CONTEXT_MET, ContextKind.CONTEXT_GREENLET

Edge = tuple[str | None, str | None, str | None, str | None]


def cast() -> Story:
    """A server in an event loop, and a database."""
    story = Story()
    story.process(WEB, "/usr/bin/python /usr/bin/uvicorn web:app")
    story.process(DATABASE, "postgres: shop shop 127.0.0.1(40000) idle", "postgres")
    for context in (LISTENER, READER, OTHER_READER, SQL_READER):
        story.context(WEB, context, 0, kind=MET)
    for moment in range(100 * US, 100 * MS, 700 * US):
        story.call(WEB, "epoll_wait", moment)
    return story


def edges_of(story: Story, path: Path) -> dict[str, Edge]:
    """For each query that the server made: its request's operation, the edge, evidence and reason."""
    recording = story.record(path)
    spans = recording.spans().collect()
    names = dict(zip(spans["span_id"], spans["operation"], strict=True))
    reasons = {
        edge["effect_id"]: edge["reason"]
        for edge in recording.edges().collect().iter_rows(named=True)
        if edge["parent"]
    }
    return {
        span["operation"]: (
            names.get(span["parent_id"]), span["edge"], span["evidence"], reasons.get(span["span_id"])
        )
        for span in spans.iter_rows(named=True)
        if span["kind"] == "client" and span["tgid"] == WEB
    }  # fmt: skip


NOBODY: Edge = (None, None, None, None)


def asked(link: Link, story: Story, name: str, time: int, context: int, **more: Any) -> None:
    """The server asks the database, in a context; the loop's reader gets the answer."""
    read_in = more.pop("read_in", SQL_READER if context else 0)
    story.ask(
        link,
        query(f"SELECT {name}"),
        selected(1),
        time,
        MS,
        context=context,
        read_in=read_in,
        **more,
    )


def test_interleaved_tasks_of_an_event_loop(tmp_path: Path):
    """As uvicorn does it: a task for each request, made where the request was received."""
    story = cast()
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    sql = [story.link(WEB, DATABASE, 5432) for _ in range(2)]
    for index, reader in enumerate((READER, OTHER_READER)):
        begin = index * MS
        story.say(links[index], http(f"GET /{'ab'[index]}"), begin, by_client=True,
                  other_context=reader)  # fmt: skip
        task = story.context(WEB, 200 + index, begin + 20 * US, parent=reader)
        asked(sql[index], story, "ab"[index], begin + 2 * MS, task)
        story.say(links[index], answer(), begin + 8 * MS, by_client=False, context=task)
    path = tmp_path / "a.scope"
    edges = edges_of(story, path)
    for letter in "ab":
        assert edges[f"SELECT {letter}"] == (f"GET /{letter}", "calls", "exact", "same task")


def test_spans_have_the_contexts_of_the_work(tmp_path: Path):
    story = cast()
    link, sql = story.link(CLIENT, WEB, 8000), story.link(WEB, DATABASE, 5432)
    story.say(link, http("GET /a"), 0, by_client=True, other_context=READER)
    story.context(WEB, 200, 20 * US, parent=READER)
    asked(sql, story, "a", MS, 200)
    story.say(link, answer(), 8 * MS, by_client=False, context=200)
    recording = story.record(tmp_path / "a.scope")
    spans = recording.spans().collect().filter(tgid=WEB)
    assert dict(zip(spans["kind"], spans["context"], strict=True)) == {"server": 200, "client": 200}
    request = recording.requests().collect().row(0, named=True)
    # the thread is the loop's: of its time only what the request waited for is known
    assert (request["cpu_ns"], request["lock_ns"]) == (0, 0)
    assert [wait["peer"] for wait in request["waits"]] == ["postgresql"]


def test_a_handler_of_a_connection_takes_turns(tmp_path: Path):
    """As asyncio.start_server does it: one task for all requests of a connection."""
    story = cast()
    handlers = [story.context(WEB, 200 + index, 10 * US, parent=LISTENER) for index in range(2)]
    links = [story.link(CLIENT, WEB, 8000) for _ in handlers]
    sql = [story.link(WEB, DATABASE, 5432) for _ in handlers]
    expected: dict[str, Edge] = {}
    for turn in range(3):
        for index, reader in enumerate((READER, OTHER_READER)):
            begin, name = 10 * MS * turn + index * MS, f"{'ab'[index]}{'xyz'[turn]}"
            story.say(links[index], http(f"GET /{name}"), begin, by_client=True,
                      other_context=reader)  # fmt: skip
            asked(sql[index], story, name, begin + 2 * MS, handlers[index])
            story.say(links[index], answer(), begin + 6 * MS, by_client=False,
                      context=handlers[index])  # fmt: skip
            asked(sql[index], story, f"{name}_after", begin + 7 * MS, handlers[index])
            expected[f"SELECT {name}"] = (f"GET /{name}", "calls", "exact", "same task")
            expected[f"SELECT {name}_after"] = NOBODY
    assert edges_of(story, tmp_path / "a.scope") == expected


@pytest.mark.parametrize("made_by_reader", [True, False])
def test_children_that_are_gathered(tmp_path: Path, made_by_reader: bool):
    story = cast()
    link, sql = story.link(CLIENT, WEB, 8000), [story.link(WEB, DATABASE, 5432) for _ in range(3)]
    story.say(link, http("GET /a"), 0, by_client=True, other_context=READER)
    parent = READER if made_by_reader else story.context(WEB, 150, 0, parent=LISTENER)
    task = story.context(WEB, 200, 20 * US, parent=parent)
    for index in range(3):
        child = story.context(WEB, 300 + index, MS, parent=task)
        grandchild = story.context(WEB, 400 + index, 2 * MS, parent=child)
        asked(sql[index], story, "abc"[index], 3 * MS + index * US, grandchild)
    story.say(link, answer(), 8 * MS, by_client=False, context=task)
    edges = edges_of(story, tmp_path / "a.scope")
    assert set(edges.values()) == {("GET /a", "calls", "exact", "child task")}
    assert len(edges) == 3


def test_a_child_that_answers(tmp_path: Path):
    """Starlette's middleware sends from a task of a task group: the request is the outer one's."""
    story = cast()
    link, sql = story.link(CLIENT, WEB, 8000), [story.link(WEB, DATABASE, 5432) for _ in range(2)]
    story.say(link, http("GET /a"), 0, by_client=True, other_context=READER)
    task = story.context(WEB, 200, 20 * US, parent=READER)
    child = story.context(WEB, 201, MS, parent=task)
    asked(sql[0], story, "a", 2 * MS, task)
    asked(sql[1], story, "b", 3 * MS, child)
    story.say(link, answer(), 8 * MS, by_client=False, context=child)
    edges = edges_of(story, tmp_path / "a.scope")
    assert edges["SELECT a"] == ("GET /a", "calls", "exact", "same task")
    assert edges["SELECT b"] == ("GET /a", "calls", "exact", "child task")


def test_a_thread_that_runs_a_copy_of_the_context(tmp_path: Path):
    """asyncio.to_thread and anyio's worker threads; the thread itself takes part in many requests."""
    story = cast()
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    sql = story.link(WEB, DATABASE, 5432)
    for index, reader in enumerate((READER, OTHER_READER)):
        begin = index * MS
        story.say(links[index], http(f"GET /{'ab'[index]}"), begin, by_client=True,
                  other_context=reader)  # fmt: skip
        task = story.context(WEB, 200 + index, begin + 20 * US, parent=reader)
        copy = story.context(WEB, 300 + index, begin + 30 * US, parent=task)
        at = (3 + 2 * index) * MS
        asked(sql, story, "ab"[index], at, copy, read_in=copy, tid=POOL[0])
        story.say(links[index], answer(), 9 * MS + begin, by_client=False, context=task)
    edges = edges_of(story, tmp_path / "a.scope")
    for letter in "ab":
        assert edges[f"SELECT {letter}"] == (f"GET /{letter}", "calls", "exact", "child task")


def pooled(story: Story, *, item: int | None = None) -> None:
    """Two requests hand an item each to one thread of a pool, which has no context of its own."""
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    sql = story.link(WEB, DATABASE, 5432)
    for index, reader in enumerate((READER, OTHER_READER)):
        begin, address = 2 * index * MS, item or 7000 + index
        story.say(links[index], http(f"GET /{'ab'[index]}"), begin, by_client=True,
                  other_context=reader)  # fmt: skip
        task = story.context(WEB, 200 + index, begin + 20 * US, parent=reader)
        story.hand(WEB, address, begin + 100 * US, put=True, context=task)
        story.hand(WEB, address, begin + 200 * US, put=False, tid=POOL[0])
        asked(sql, story, "ab"[index], begin + 300 * US, 0, tid=POOL[0])
        story.say(links[index], answer(), begin + 8 * MS, by_client=False, context=task)


@pytest.mark.parametrize("item", [None, 7000])
def test_items_of_a_thread_pool_whose_addresses_come_again(tmp_path: Path, item: int | None):
    story = cast()
    pooled(story, item=item)
    edges = edges_of(story, tmp_path / "a.scope")
    for letter in "ab":
        assert edges[f"SELECT {letter}"] == (
            f"GET /{letter}", "calls", "exact", "work item of a thread pool",
        )  # fmt: skip


@pytest.mark.parametrize("stack", [ContextKind.CONTEXT_COPIED, GREENLET])
def test_a_pool_that_answers_what_another_thread_received(tmp_path: Path, stack: ContextKind):
    """One thread waits for requests, and hands them to others, which work on them and answer.

    Where a process has greenlets, each thread is met as one.
    """
    story = cast()
    own = {tid: story.context(WEB, 500 + tid, 0, kind=GREENLET, tid=tid) if stack == GREENLET else 0
           for tid in (WEB, *POOL)}  # fmt: skip
    links = [story.link(CLIENT, WEB, 8000) for _ in range(4)]
    sql = {tid: story.link(WEB, DATABASE, 5432) for tid in POOL}
    for index, link in enumerate(links):
        story.say(link, http(f"GET /{'abcd'[index]}"), index * 10 * US, by_client=True,
                  other_context=own[WEB])  # fmt: skip
        story.hand(WEB, 7000 + index, (1 + index) * 10 * US, put=True, context=own[WEB])
    for index, link in enumerate(links):
        tid = POOL[index % 2]
        begin = (1 + 10 * (index // 2)) * MS
        story.hand(WEB, 7000 + index, begin, put=False, tid=tid, context=own[tid])
        asked(sql[tid], story, "abcd"[index], begin + MS, own[tid], tid=tid, read_in=own[tid])
        story.say(link, answer(), begin + 8 * MS, by_client=False, tid=tid, context=own[tid])
        asked(sql[tid], story, f"{'abcd'[index]}_after", begin + 8500 * US, own[tid], tid=tid,
              read_in=own[tid])  # fmt: skip
    edges = edges_of(story, tmp_path / "a.scope")
    for letter in "abcd":
        assert edges[f"SELECT {letter}"] == (
            f"GET /{letter}", "calls", "exact", "work item of a thread pool",
        )  # fmt: skip
        assert edges[f"SELECT {letter}_after"] == NOBODY


def test_the_same_object_put_twice_is_nobodys(tmp_path: Path):
    """None, or a small number: who got which is not known."""
    story = cast()
    pooled(story, item=7000)
    for moment in (50 * US, 60 * US):
        story.hand(WEB, 7000, moment, put=True)
    assert set(edges_of(story, tmp_path / "a.scope").values()) == {NOBODY}


def test_an_item_whose_put_was_not_seen_is_nobodys(tmp_path: Path):
    story = cast()
    pooled(story)
    # between the item and the call the thread took another one
    story.hand(WEB, 9999, 250 * US, put=False, tid=POOL[0])
    edges = edges_of(story, tmp_path / "a.scope")
    assert edges["SELECT a"] == NOBODY
    assert edges["SELECT b"][0] == "GET /b"


def test_a_new_thread_with_an_old_number_has_no_item(tmp_path: Path):
    story = cast()
    pooled(story)
    story.row("processes", time_ns=1_000_000_000_000 + 250 * US, event=2, tgid=WEB, tid=POOL[0],
              parent_tgid=WEB, parent_tid=WEB, comm="python")  # fmt: skip
    assert edges_of(story, tmp_path / "a.scope")["SELECT a"] == NOBODY


def test_an_item_that_a_thread_without_contexts_put(tmp_path: Path):
    """A sync worker that works on one request at a time, and lets a pool do a part of it."""
    story = Story()
    story.process(WEB, "/usr/bin/python /usr/bin/gunicorn web:app")
    story.process(DATABASE, "postgres: shop shop 127.0.0.1(40000) idle", "postgres")
    link, sql = story.link(CLIENT, WEB, 8000), story.link(WEB, DATABASE, 5432)
    story.say(link, http("GET /a"), 0, by_client=True)
    story.hand(WEB, 7000, MS, put=True)
    story.hand(WEB, 7000, 2 * MS, put=False, tid=POOL[0])
    asked(sql, story, "a", 3 * MS, 0, tid=POOL[0])
    story.say(link, answer(), 8 * MS, by_client=False)
    edges = edges_of(story, tmp_path / "a.scope")
    # one request at a time in its thread: that is no proof by bytes or items alone
    assert edges["SELECT a"] == ("GET /a", "calls", "derived", "work item of a thread pool")


def test_work_after_the_response_was_triggered_by_the_request(tmp_path: Path):
    """Starlette's background task runs in the request's task, and create_task() makes another."""
    story = cast()
    link, sql = story.link(CLIENT, WEB, 8000), [story.link(WEB, DATABASE, 5432) for _ in range(3)]
    story.say(link, http("GET /a"), 0, by_client=True, other_context=READER)
    task = story.context(WEB, 200, 20 * US, parent=READER)
    child = story.context(WEB, 201, MS, parent=task)
    story.say(link, answer(), 3 * MS, by_client=False, context=task)
    later = story.context(WEB, 202, 4 * MS, parent=task)
    for index, context in enumerate((task, child, later)):
        asked(sql[index], story, "abc"[index], 5 * MS + index * US, context)
    edges = edges_of(story, tmp_path / "a.scope")
    assert edges["SELECT a"] == ("GET /a", "triggered_by", "exact", "same task")
    assert edges["SELECT b"] == ("GET /a", "triggered_by", "derived", "child task")
    assert edges["SELECT c"] == ("GET /a", "triggered_by", "derived", "child task")


def test_greenlets_are_told_apart(tmp_path: Path):
    story = cast()
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    sql = [story.link(WEB, DATABASE, 5432) for _ in range(2)]
    for index in range(2):
        begin, name = index * MS, "ab"[index]
        greenlet = story.context(WEB, 200 + index, 10 * US, kind=GREENLET)
        for turn in range(2):
            begin = index * MS + turn * 20 * MS
            story.say(links[index], http(f"GET /{name}{'xy'[turn]}"), begin, by_client=True,
                      other_context=greenlet)  # fmt: skip
            asked(
                sql[index], story, f"{name}{'xy'[turn]}", begin + 2 * MS, greenlet, read_in=greenlet
            )
            story.say(links[index], answer(), begin + 8 * MS, by_client=False, context=greenlet)
    edges = edges_of(story, tmp_path / "a.scope")
    assert len(edges) == 4
    for name, edge in edges.items():
        assert edge == (f"GET /{name[-2:]}", "calls", "exact", "same greenlet")


def test_two_requests_at_once_in_one_task_are_not_mixed(tmp_path: Path):
    story = cast()
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    sql = story.link(WEB, DATABASE, 5432)
    task = story.context(WEB, 200, 0, parent=LISTENER)
    child = story.context(WEB, 201, 2 * MS, parent=task)
    for index, reader in enumerate((READER, OTHER_READER)):
        story.say(links[index], http(f"GET /{'ab'[index]}"), index * MS, by_client=True,
                  other_context=reader)  # fmt: skip
        story.say(links[index], answer(), (8 + index) * MS, by_client=False, context=task)
    asked(sql, story, "a", 500 * US, task)
    asked(sql, story, "b", 3 * MS, task)
    asked(sql, story, "c", 5 * MS, child)
    assert set(edges_of(story, tmp_path / "a.scope").values()) == {NOBODY}


def test_a_context_of_no_request_is_not_guessed(tmp_path: Path):
    """A background task runs while one request is open."""
    story = cast()
    link, sql = story.link(CLIENT, WEB, 8000), [story.link(WEB, DATABASE, 5432) for _ in range(3)]
    story.say(link, http("GET /a"), 0, by_client=True, other_context=READER)
    task = story.context(WEB, 200, 20 * US, parent=READER)
    cron = story.context(WEB, 300, 0, parent=0)
    asked(sql[0], story, "a", MS, cron)
    # nothing is known of what made it
    asked(sql[1], story, "b", MS + US, 999)
    asked(sql[2], story, "c", MS + 2 * US, SQL_READER)
    story.say(link, answer(), 8 * MS, by_client=False, context=task)
    assert set(edges_of(story, tmp_path / "a.scope").values()) == {NOBODY}


def test_a_handler_that_was_made_for_its_first_request(tmp_path: Path):
    story = cast()
    link, sql = story.link(CLIENT, WEB, 8000), story.link(WEB, DATABASE, 5432)
    handler = 0
    expected: dict[str, Edge] = {}
    for turn in range(3):
        begin, name = 10 * MS * turn, "abc"[turn]
        story.say(link, http(f"GET /{name}"), begin, by_client=True, other_context=READER)
        handler = handler or story.context(WEB, 200, begin + 20 * US, parent=READER)
        asked(sql, story, name, begin + 2 * MS, handler)
        story.say(link, answer(), begin + 6 * MS, by_client=False, context=handler)
        expected[f"SELECT {name}"] = (f"GET /{name}", "calls", "exact", "same task")
    child = story.context(WEB, 201, 35 * MS, parent=handler)
    asked(sql, story, "after", 37 * MS, handler)
    asked(sql, story, "child", 39 * MS, child)
    expected |= {"SELECT after": NOBODY, "SELECT child": NOBODY}
    assert edges_of(story, tmp_path / "a.scope") == expected


def test_what_else_the_reader_made_for_the_request(tmp_path: Path):
    story = cast()
    link, sql = story.link(CLIENT, WEB, 8000), [story.link(WEB, DATABASE, 5432) for _ in range(2)]
    early = story.context(WEB, 199, 0, parent=READER)
    story.say(link, http("GET /a"), 10 * US, by_client=True, other_context=READER)
    task = story.context(WEB, 200, 20 * US, parent=READER)
    other = story.context(WEB, 201, 30 * US, parent=READER)
    asked(sql[0], story, "a", MS, other)
    asked(sql[1], story, "b", MS + US, early)
    story.say(link, answer(), 8 * MS, by_client=False, context=task)
    edges = edges_of(story, tmp_path / "a.scope")
    assert edges["SELECT a"] == ("GET /a", "calls", "exact", "child task")
    assert edges["SELECT b"] == NOBODY


def test_an_item_that_a_task_took_is_not_its_threads(tmp_path: Path):
    """The thread of the event loop takes an item within a task, and goes on without a context."""
    story = cast()
    pooled(story)
    other = story.context(WEB, 300, 0, parent=LISTENER)
    story.hand(WEB, 8000, 4 * MS, put=True, context=200)
    story.hand(WEB, 8000, 4 * MS + 100 * US, put=False, context=other, tid=POOL[1])
    asked(story.link(WEB, DATABASE, 5432), story, "c", 5 * MS, 0, tid=POOL[1])
    assert edges_of(story, tmp_path / "a.scope")["SELECT c"] == NOBODY


@pytest.mark.parametrize("answered", [True, False])
def test_a_request_that_is_still_open(tmp_path: Path, answered: bool):
    story = cast()
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    sql = [story.link(WEB, DATABASE, 5432) for _ in range(2)]
    for index, reader in enumerate((READER, OTHER_READER)):
        story.say(links[index], http(f"GET /{'ab'[index]}"), index * MS, by_client=True,
                  other_context=reader)  # fmt: skip
        task = story.context(WEB, 200 + index, index * MS + 20 * US, parent=reader)
        asked(sql[index], story, "ab"[index], 3 * MS + index * US, task)
        if answered and index:
            story.say(links[index], answer(), 8 * MS, by_client=False, context=task)
    edges = edges_of(story, tmp_path / "a.scope")
    for letter in "ab":
        assert edges[f"SELECT {letter}"][:3] == (f"GET /{letter}", "calls", "exact")


def test_a_request_that_another_ones_task_answers(tmp_path: Path):
    """A long poll: what is published by the second request is the answer to the first."""
    story = cast()
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    sql = [story.link(WEB, DATABASE, 5432) for _ in range(2)]
    tasks = []
    for index, reader in enumerate((READER, OTHER_READER)):
        story.say(links[index], http(f"GET /{'ab'[index]}"), index * MS, by_client=True,
                  other_context=reader)  # fmt: skip
        tasks += [story.context(WEB, 200 + index, index * MS + 20 * US, parent=reader)]
        asked(sql[index], story, "ab"[index], 2 * MS + index * US, tasks[index])
    for index in range(2):
        story.say(links[index], answer(), (8 + index) * MS, by_client=False, context=tasks[1])
    edges = edges_of(story, tmp_path / "a.scope")
    for letter in "ab":
        assert edges[f"SELECT {letter}"][0] == f"GET /{letter}"


def test_a_handler_thread_that_runs_an_event_loop_of_its_own(tmp_path: Path):
    """A sync worker whose view is async: the loop's contexts were made while it had one request."""
    story = Story()
    story.process(WEB, "/usr/bin/python /usr/bin/gunicorn web:app")
    story.process(DATABASE, "postgres: shop shop 127.0.0.1(40000) idle", "postgres")
    link, sql = story.link(CLIENT, WEB, 8000), story.link(WEB, DATABASE, 5432)
    story.say(link, http("GET /a"), 0, by_client=True)
    main = story.context(WEB, 200, MS)
    story.call(WEB, "epoll_wait", 2 * MS)
    task = story.context(WEB, 201, 3 * MS, parent=main)
    asked(sql, story, "a", 4 * MS, task)
    story.say(link, answer(), 8 * MS, by_client=False)
    edges = edges_of(story, tmp_path / "a.scope")
    assert edges["SELECT a"] == ("GET /a", "calls", "derived", "child task")


def test_processes_that_a_task_forked(tmp_path: Path):
    story = cast()
    links = [story.link(CLIENT, WEB, 8000) for _ in range(2)]
    child = story.link(99, DATABASE, 5432)
    tasks = []
    for index, reader in enumerate((READER, OTHER_READER)):
        story.say(links[index], http(f"GET /{'ab'[index]}"), index * MS, by_client=True,
                  other_context=reader)  # fmt: skip
        tasks += [story.context(WEB, 200 + index, index * MS + 20 * US, parent=reader)]
    # the first task goes on after the second request came
    story.call(WEB, "clone", 3 * MS)
    story.told[-1]["context"] = tasks[0]
    story.fork(WEB, 99, 3 * MS + US)
    story.ask(child, query("SELECT 1"), selected(1), 4 * MS, MS)
    story.exit(99, 6 * MS)
    for index in range(2):
        story.say(links[index], answer(), (8 + index) * MS, by_client=False, context=tasks[index])
    recording = story.record(tmp_path / "a.scope")
    spans = recording.spans().collect()
    names = dict(zip(spans["span_id"], spans["operation"], strict=True))
    forked = spans.row(by_predicate=pl.col("tgid") == 99, named=True)
    assert (names[forked["parent_id"]], forked["edge"]) == ("GET /a", "forked_by")


# Random interleavings


@dataclass
class Loop:
    """What an event loop does, in a random order; knows whose each query is."""

    random: random.Random
    story: Story = field(default_factory=cast)
    moments: Iterator[int] = field(default_factory=lambda: count(10 * US, 40 * US))
    contexts: Iterator[int] = field(default_factory=lambda: count(1000))
    queries: Iterator[int] = field(default_factory=lambda: count(1))
    truth: dict[str, str | None] = field(default_factory=dict)
    owners: dict[int, str | None] = field(default_factory=dict)

    def now(self) -> int:
        return next(self.moments)

    def make(self, parent: int, owner: str | None) -> int:
        context = next(self.contexts)
        if self.random.random() < 0.9:  # else its row was lost
            self.story.context(WEB, context, self.now(), parent=parent)
        self.owners[context] = owner
        return context

    def ask(self, context: int, owner: str | None, tid: int | None = None) -> None:
        name = f"q{next(self.queries)}"
        self.truth[f"SELECT {name}"] = owner
        link = self.story.link(WEB, DATABASE, 5432)
        asked(link, self.story, name, self.now(), context, tid=tid)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_no_edge_is_ever_wrong(random: random.Random):
    loop = Loop(random)
    story = loop.story
    connections: list[dict[str, Any]] = [
        {
            "link": story.link(CLIENT, WEB, 8000),
            "reader": loop.make(LISTENER, None),
            "handler": loop.make(LISTENER, None),
            "style": random.choice(["task", "handler", "mixed"]),
            "request": None,
            "tasks": [],
        }
        for _ in range(random.randrange(1, 4))
    ]
    cron = loop.make(0, None)
    past: list[tuple[int, str]] = []  # contexts that may go on after their request's end
    addresses = [7000, 7001, None]
    pool: dict[int, tuple[str | None, int] | None] = dict.fromkeys(POOL)
    pending: list[tuple[int, str]] = []
    number = count(1)
    for _ in range(random.randrange(5, 60)):
        one = random.choice(connections)
        action = random.choice(
            ["request", "request", "query", "query", "child", "answer", "cron", "late", "submit",
             "take", "work", "reader"]
        )  # fmt: skip
        if action == "request" and one["request"] is None:
            one["request"] = name = f"GET /r{next(number)}x"
            story.say(
                one["link"], http(name), loop.now(), by_client=True, other_context=one["reader"]
            )
            if one["style"] == "handler":
                one["tasks"] = [one["handler"]]
            else:
                parent = one["reader"] if random.random() < 0.5 else one["handler"]
                one["tasks"] = [loop.make(parent, name)]
        elif action == "cron":
            loop.ask(cron, None)
        elif action == "reader":
            loop.ask(loop.make(SQL_READER, None), None)
        elif action == "late" and past:
            loop.ask(*random.choice(past))
        elif action == "take" and pending:
            item, owner = pending.pop(0)
            tid = random.choice(POOL)
            story.hand(WEB, item, loop.now(), put=False, tid=tid)
            pool[tid] = (owner, item)
        elif action == "work":
            tid = random.choice(POOL)
            if taken := pool[tid]:
                loop.ask(0, taken[0], tid)
        elif one["request"] is None:
            continue
        elif action == "query":
            loop.ask(random.choice(one["tasks"]), one["request"])
        elif action == "child":
            one["tasks"].append(loop.make(random.choice(one["tasks"]), one["request"]))
        elif action == "submit":
            item = random.choice(addresses) or next(loop.contexts)
            story.hand(WEB, item, loop.now(), put=True, context=random.choice(one["tasks"]))
            pending.append((item, one["request"]))
        elif action == "answer":
            sender = one["tasks"][0] if random.random() < 0.7 else random.choice(one["tasks"])
            story.say(one["link"], answer(), loop.now(), by_client=False, context=sender)
            past += [(task, one["request"]) for task in one["tasks"] if task != one["handler"]]
            one["request"], one["tasks"] = None, []
    with TemporaryDirectory() as folder:
        edges = edges_of(story, Path(folder) / "a.scope")
    assert edges.keys() == loop.truth.keys()
    for name, (found, edge, evidence, _) in edges.items():
        assert found in (None, loop.truth[name]), (name, found, loop.truth[name])
        # what a child task does after the response may be for others by then
        assert evidence in (None, "exact") or (edge, evidence) == ("triggered_by", "derived")
        assert edge in (None, "calls", "triggered_by")
