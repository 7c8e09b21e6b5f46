"""`scope-ebpf threads`: a table for people, exact numbers for programs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from scope_ebpf import open_recording
from scope_ebpf.analysis.threads import PARTS, thread_times
from scope_ebpf.cli.threads import render, threads
from scope_ebpf.errors import UsageError
from tests.pure.stacks import FAMILIES, StackStory
from tests.pure.stories import MS

pytestmark = pytest.mark.pure

WEB = 100


@pytest.fixture
def path(tmp_path) -> Path:
    story = StackStory()
    story.process(WEB, "gunicorn shop.web:app", "gunicorn")
    story.process(200, "rq worker mail", "rq\x1b[2J")
    story.met(WEB)
    story.begin(WEB, 101, "pool-0", 1_000 * MS)
    story.finish(WEB, 101, 3_000 * MS)
    story.tick(WEB, 1)
    story.off(WEB, "recvfrom", 10 * MS, 2_000 * MS)
    story.wait_for_gil(WEB, 101, 1_100 * MS, 500 * MS, WEB)
    story.off(200, "epoll_wait", 0, 4_990 * MS, result=0)
    return story.record(tmp_path / "shop.scope").path


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(threads, [str(path), *arguments])


def test_threads_are_shown(path):
    result = run(path)
    assert result.exit_code == 0, result.exception
    heading, *lines = result.stdout.splitlines()
    assert " ".join(heading.split()) == (
        "thread tid service seen Python running GIL wait network sleep GIL held by"
    )
    assert [" ".join(line.split()) for line in lines] == [
        "gunicorn 100 web 5.00 s 3.00 s - - 2.00 s -",
        "pool-0 101 web 2.00 s +- - 1.50 s 500 ms - - gunicorn (100) 500 ms",
        "rq\\x1b[2J 200 rq:mail 5.00 s - 10.0 ms - - 4.99 s",
    ]
    assert result.stderr == ""


def test_json_has_exact_numbers(path):
    rows = [json.loads(line) for line in run(path, "--json").stdout.splitlines()]
    assert [row["tid"] for row in rows] == [100, 101, 200]
    assert all(sum(row[part] for part in PARTS) == row["wall_ns"] for row in rows)
    assert rows[1]["gil_holders"] == [{"tid": 100, "thread": "gunicorn", "wait_ns": 500 * MS}]
    assert (rows[1]["began"], rows[1]["ended"]) == (True, True)


def test_a_narrow_terminal_gets_lines_that_fit(path):
    stream = io.StringIO()
    render(thread_times(open_recording(path)), Console(file=stream, width=60))
    lines = stream.getvalue().splitlines()
    assert all(len(line) <= 60 for line in lines)
    text = " ".join(stream.getvalue().split())
    assert "Python 3.00 s (60 %), network 2.00 s (40 %)" in text
    assert "GIL held by gunicorn (100) 500 ms" in text


def test_threads_can_be_chosen(path):
    assert len(run(path, "--service", "rq:mail", "--json").stdout.splitlines()) == 1
    assert len(run(path, "--tgid", "100", "--json").stdout.splitlines()) == 2
    result = run(path, "--limit", "1")
    assert len(result.stdout.splitlines()) == 2
    assert "the first 1 of 3" in result.stderr
    result = run(path, "--service", "web", "--tgid", "200")
    assert isinstance(result.exception, UsageError)
    assert "process 200 is of rq:mail" in str(result.exception)


def test_what_was_not_recorded_is_said(tmp_path):
    story = StackStory()
    story.process(WEB, "gunicorn shop.web:app", "gunicorn")
    without = story.record(tmp_path / "a.scope", families=["processes", "samples"]).path
    assert "record with offcpu in --families" in run(without).stderr
    without = story.record(tmp_path / "b.scope", families=FAMILIES).path
    assert "cannot be told apart: no Python process" in run(without).stderr
    empty = StackStory().record(tmp_path / "c.scope", families=FAMILIES).path
    assert "no thread was recorded" in run(empty).stderr
