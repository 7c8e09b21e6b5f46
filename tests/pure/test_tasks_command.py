"""`scope-ebpf tasks`: the tree of logical contexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from scope_ebpf import open_recording
from scope_ebpf.analysis.tasks import TASKS, find_tasks, outermost
from scope_ebpf.cli.tasks import MOST_LINES, task_lines, tasks
from scope_ebpf.records import ContextKind
from tests.pure.recordings import at, make_recording
from tests.pure.stories import MS, US, Story, answer, http, query, selected

pytestmark = pytest.mark.pure

WEB, DATABASE, CLIENT = 20, 40, 1
READER = 101
ASYNCIO = "/usr/lib/python3.11/asyncio"


def story() -> Story:
    """Two requests in an event loop; the second one still waits for the database."""
    told = Story()
    told.process(WEB, "/usr/bin/python /usr/bin/uvicorn web:app")
    told.process(DATABASE, "postgres: shop shop 127.0.0.1(40000) idle", "postgres")
    told.context(WEB, READER, 0, kind=ContextKind.CONTEXT_MET)
    link, sql = told.link(CLIENT, WEB, 8000), [told.link(WEB, DATABASE, 5432) for _ in range(2)]
    for index in range(2):
        begin = 10 * index * MS
        told.say(link, http(f"GET /{'ab'[index]}"), begin, by_client=True, other_context=READER)
        task = told.context(WEB, 200 + index, begin + 20 * US, parent=READER)
        told.context(WEB, 400 + index, begin + 30 * US, parent=task)  # a callback that did nothing
        child = told.context(WEB, 300 + index, begin + 40 * US, parent=400 + index)
        if index == 0:
            told.ask(sql[0], query("SELECT 1"), selected(1), begin + MS, MS, context=child,
                     read_in=READER)  # fmt: skip
            told.say(link, answer(), begin + 5 * MS, by_client=False, context=task)
        else:
            told.call(WEB, "close", begin + 35 * US)
            told.told[-1]["context"] = task
            told.say(sql[1], query("SELECT 2"), begin + MS, by_client=True, context=child)
    for message in told.rows["messages"]:
        told.row("syscalls", start_ns=message["start_ns"], duration_ns=US, tgid=message["tgid"],
                 tid=message["tid"], number=message["number"])  # fmt: skip
    return told


def with_stacks(told: Story) -> Story:
    """Stacks of the first request's task and of its child."""
    codes = {
        1: ("run", "/srv/main.py"), 2: ("BaseEventLoop._run_once", f"{ASYNCIO}/base_events.py"),
        3: ("Handle._run", f"{ASYNCIO}/events.py"), 4: ("handle", "/srv/web.py"),
        5: ("fetch", "/srv/web.py"), 6: ("Task.__step", f"{ASYNCIO}/tasks.py"),
    }  # fmt: skip
    for code, (name, file) in codes.items():
        told.row("codes", time_ns=at(0), tgid=WEB, code=code, name=name, file=file, version=0x30B)
    for stack, frames in ((71, [5, 4, 3, 2, 1]), (72, [5, 6, 3, 2, 1])):
        told.row("stacks", time_ns=at(0), tgid=WEB, stack=stack, codes=frames, offsets=[0] * 5)
    for context, stack in ((200, 71), (300, 72)):
        told.row(
            "samples", time_ns=at(MS), tgid=WEB, tid=WEB, context=context, stack=stack, reason=2
        )
    return told


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(tasks, [str(path), *arguments])


def rows(path: Path, *arguments: str) -> dict[int, dict[str, Any]]:
    result = run(path, "--json", *arguments)
    assert result.exit_code == 0, result.exception
    found = [json.loads(line) for line in result.stdout.splitlines()]
    return {task["context"]: task for task in found}


def test_what_each_task_did(tmp_path: Path):
    path = tmp_path / "a.scope"
    with_stacks(story()).record(path)
    found = rows(path)
    assert list(found) == [READER, 200, 300, 201, 301]
    assert {name: task["parent"] for name, task in found.items()} == {
        READER: 0, 200: READER, 300: 200, 201: READER, 301: 201,
    }  # fmt: skip
    assert [found[name]["name"] for name in (200, 300, 201)] == ["handle", "fetch", None]
    assert (found[200]["requests"], found[200]["operation"]) == (1, "GET /a")
    # the second request was not answered: its reader's context is all that is known of who works on it
    assert found[300]["waits"] == [
        {"peer": "postgresql", "protocol": "postgresql", "wait_ns": MS + 5 * US}
    ]
    assert found[300]["calls"] == 1
    assert (found[301]["state"], found[301]["last_wait"]) == ("waiting", "postgresql")
    assert (found[300]["state"], found[300]["last_wait"]) == ("last seen", "sendto")
    assert found[200]["made_ns"] == at(20 * US)
    assert found[READER]["made_ns"] is None
    assert found[READER]["service"] == "web"


def test_all_has_what_did_nothing(tmp_path: Path):
    path = tmp_path / "a.scope"
    story().record(path)
    found = rows(path, "--all")
    assert set(found) == {READER, 200, 300, 400, 201, 301, 401}
    assert found[300]["parent"] == 400
    assert "2 contexts that did nothing are left out; --all" in run(path).stderr
    assert run(path, "--all").stderr == ""


def test_the_tree_for_people(tmp_path: Path):
    path = tmp_path / "a.scope"
    with_stacks(story()).record(path)
    lines = run(path).stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "task", "(met)", "├ handle", "│ └ fetch", "└ (copied)", "",
    ]  # fmt: skip
    assert lines[5].startswith("  └ (copied)")
    assert "GET /a" in lines[2] and "web 20" in lines[2]
    assert "postgresql 1.00 ms" in lines[3]
    assert lines[5].endswith("waiting for postgresql")


def many(path: Path, number: int) -> Path:
    made = [{"time_ns": at(n * US), "tgid": WEB, "tid": WEB, "context": 1000 + n, "parent": 0,
             "kind": 1} for n in range(number)]  # fmt: skip
    told = [{"start_ns": at(n * US + 1), "tgid": WEB, "tid": WEB, "context": 1000 + n}
            for n in range(number)]  # fmt: skip
    calls = [{**one, "duration_ns": 1} for one in told]
    return make_recording(
        path, {"contexts": made, "flows": told, "syscalls": calls}, per_segment=9999
    )


def test_many_that_are_alike_are_one_line(tmp_path: Path):
    path = many(tmp_path / "a.scope", 500)
    lines = run(path).stdout.splitlines()
    assert len(lines) == 1 + 3 + 1
    assert lines[4].startswith("… 497 more (copied)")
    assert " 497 " in lines[4]
    assert len(run(path, "--all").stdout.splitlines()) == 501
    assert len(rows(path)) == 500


def test_a_long_chain_is_cut(tmp_path: Path):
    """A callback that calls itself later makes one context after the other."""
    number = 3 * MOST_LINES
    made = [{"time_ns": at(n), "tgid": WEB, "tid": WEB, "context": n + 1, "parent": n, "kind": 1}
            for n in range(number)]  # fmt: skip
    busy = [{"start_ns": at(n), "tgid": WEB, "tid": WEB, "context": n + 1} for n in range(number)]
    path = make_recording(
        tmp_path / "a.scope", {"contexts": made, "flows": busy, "syscalls": busy}, per_segment=9999
    )
    lines = run(path).stdout.splitlines()
    assert len(lines) == MOST_LINES + 2
    assert lines[-1] == f"… and {2 * MOST_LINES} lines more; --all shows them"


def test_idle_chains_of_any_length_are_left_out(tmp_path: Path):
    number = 3000
    made = [{"time_ns": at(n), "tgid": WEB, "tid": WEB, "context": n + 1, "parent": n, "kind": 1}
            for n in range(number)]  # fmt: skip
    busy = [{"start_ns": at(n), "tgid": WEB, "tid": WEB, "context": n + 1} for n in (0, number - 1)]
    path = make_recording(
        tmp_path / "a.scope", {"contexts": made, "flows": busy, "syscalls": busy}, per_segment=9999
    )
    assert {name: task["parent"] for name, task in rows(path).items()} == {1: 0, number: 1}


@pytest.mark.parametrize("width", [60, 80, 100, 250])
def test_lines_are_not_wider_than_they_need_to_be(tmp_path: Path, width: int):
    path = tmp_path / "a.scope"
    recording = with_stacks(story()).record(path)
    found = find_tasks(recording)
    assert found.schema == TASKS
    lines = list(task_lines(found, recording.meta.started_ns, width, everything=False))
    assert len(lines) == 6
    assert max(map(len, lines)) <= max(width, 80)


def test_contexts_whose_rows_were_lost_are_there(tmp_path: Path):
    told = story()
    told.rows["contexts"] = [row for row in told.rows["contexts"] if row["context"] != 200]
    path = tmp_path / "a.scope"
    told.record(path)
    found = rows(path)
    assert found[200]["kind"] is None
    assert found[200]["calls"] == 1
    assert found[300]["parent"] == 200


def test_of_a_process_that_exited(tmp_path: Path):
    told = story()
    told.exit(WEB, 100 * MS)
    path = tmp_path / "a.scope"
    told.record(path)
    assert rows(path)[200]["state"] == "exited"


@pytest.mark.parametrize(
    ("frames", "name"),
    [
        (["h web.py", "_run asyncio/events.py", "_run_once asyncio/base_events.py", "main m.py"], "h"),
        # what the task calls is not what it is, and __step is no task
        (["sendall asyncio/base_events.py", "h web.py", "__step asyncio/tasks.py",
          "_run asyncio/events.py", "main m.py"], "h"),
        # a loop within a task of another loop
        (["inner web.py", "_run asyncio/events.py", "run asyncio/runners.py", "outer web.py",
          "_run asyncio/events.py", "main m.py"], "inner"),
        # uvloop's own frames are C
        (["h web.py", "run asyncio/runners.py", "main m.py"], "h"),
        (["h web.py", "run concurrent/futures/thread.py", "_worker concurrent/futures/thread.py",
          "run threading.py"], "h"),
        (["h web.py", "main m.py"], "main"),
        (["h web.py", "unrolled_run trio/_core/_run.py", "run trio/_core/_run.py", "main m.py"], "h"),
        # a callback of the loop itself
        (["_read_ready asyncio/selector_events.py", "_run asyncio/events.py"], "_read_ready"),
        (["_run_once asyncio/base_events.py", "main m.py"], "main"),
        # my own file of that name is no loop
        (["h web.py", "_run my/events.py", "main m.py"], "main"),
    ],
)  # fmt: skip
def test_the_function_that_a_task_runs(frames: list[str], name: str):
    found = outermost(
        pl.DataFrame(
            [(1, 7, depth, *frame.split()) for depth, frame in enumerate(frames)],
            schema={"tgid": pl.UInt32, "stack": pl.UInt64, "depth": pl.UInt16, "function": pl.String,
                    "file": pl.String},
            orient="row",
        )
    )  # fmt: skip
    assert found["name"].to_list() == [name]


def test_no_tasks_have_a_reason(tmp_path: Path):
    nothing = run(make_recording(tmp_path / "a.scope", {}))
    assert nothing.stdout == ""
    assert "record with contexts in --families" in nothing.stderr
    families: Any = {"families": ["contexts"]}
    unseen = run(make_recording(tmp_path / "b.scope", {}, **families))
    assert "no Python process was looked into" in unseen.stderr
    row = {
        "tgid": 1,
        "version": "3.8.1",
        "path": "/p",
        "reason": "PyContext_CopyCurrent is missing",
    }
    refused = run(make_recording(tmp_path / "c.scope", {"interpreters": [row]}, **families))
    assert "PyContext_CopyCurrent is missing" in refused.stderr
    idle = {"interpreters": [{**row, "contexts": True}]}
    assert "made no task" in run(make_recording(tmp_path / "d.scope", idle, **families)).stderr


def test_it_is_lazy_about_nothing(tmp_path: Path):
    recording = open_recording(make_recording(tmp_path / "a.scope", {}))
    assert find_tasks(recording).schema == TASKS
    assert find_tasks(recording, everything=True).is_empty()
