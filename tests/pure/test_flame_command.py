"""`scope-ebpf flame`: files, formats, and one sentence for what cannot be done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner, Result

from scope_ebpf.analysis.schema import span_text
from scope_ebpf.cli.flame import flame
from scope_ebpf.errors import RecordingError, ScopeError, UsageError
from tests.pure.stacks import PERIOD, StackStory
from tests.pure.stories import MS
from tests.pure.test_flame import PYTHON, SHOP, shop
from tests.pure.test_flame_request import request_of, sequential

pytestmark = pytest.mark.pure


@pytest.fixture
def path(tmp_path) -> Path:
    story = shop()
    story.tick(SHOP, 1)
    story.tick(SHOP, 2, native="libc.so.6 memcpy")
    story.off(SHOP, "recvfrom", 10 * MS, 2 * MS, stack=1)
    story.wait_for_gil(SHOP, 101, 20 * MS, 3 * MS, SHOP)
    return story.record(tmp_path / "shop.scope").path


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(flame, [str(path), *arguments])


def test_the_format_follows_the_name_of_the_file(path, tmp_path):
    for name in ("a.svg", "b.speedscope.json", "c.folded"):
        result = run(path, "-o", str(tmp_path / name))
        assert result.exit_code == 0, result.exception
        assert result.stdout == ""
        assert result.stderr.startswith("wrote 20.2 ms in 2 stacks to ")
        assert os.stat(tmp_path / name).st_mode & 0o777 == 0o600
    heading = ET.parse(tmp_path / "a.svg").find(".//*[@id='heading']")  # noqa: S314 - it is ours
    assert heading is not None
    assert heading.text == "on the CPU, 99 samples a second: shop.scope"
    scope = json.loads((tmp_path / "b.speedscope.json").read_text())
    assert scope["profiles"][0]["endValue"] == 2 * PERIOD
    assert (tmp_path / "c.folded").read_text().splitlines() == [
        f"web;gunicorn;{PYTHON} {PERIOD}",
        f"web;gunicorn;{PYTHON};libc.so.6 memcpy {PERIOD}",
    ]


def test_views(path):
    def folded(*arguments: str) -> list[str]:
        result = run(path, *arguments, "-o", "-", "--format", "folded")
        assert result.exit_code == 0, result.exception
        return result.stdout.splitlines()

    assert folded("--oncpu") == folded()
    assert folded("--offcpu") == [
        f"web;gunicorn;{PYTHON};recvfrom {2 * MS}",
        f"web;pool-0;[stack not taken];[GIL] {3 * MS - 2}",
    ]
    assert folded("--gil") == [
        f"web;pool-0;[stack not taken];[GIL held by gunicorn (100)] {3 * MS}"
    ]
    assert folded("--lines", "--threads")[0].startswith(
        "web;gunicorn (100);main (shop/main.py:1);view"
    )
    assert folded("--tgid", "100") == folded("--service", "web")


def test_json_has_exact_numbers(path):
    result = run(path, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["weight_ns"] for row in rows] == [PERIOD, PERIOD]
    assert rows[0]["samples"] == 1
    assert rows[0]["frames"][3] == {
        "name": "view", "kind": "python", "file": "/srv/shop/web.py", "line": 30,
    }  # fmt: skip


def test_a_request(tmp_path):
    recording = sequential().record(tmp_path / "shop.scope")
    span_id, _ = request_of(recording)
    result = run(recording.path, "--request", span_text(span_id)[:8], "--json")
    assert result.exit_code == 0, result.exception
    names = [json.loads(line)["frames"][0]["name"] for line in result.stdout.splitlines()]
    assert "web GET /cart" in names
    assert "is not an id" in str(run(recording.path, "--request", "zzzz", "--json").exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "-o FILE.svg"),
        (["-o", "a.txt"], "does not tell the format"),
        (["-o", "-"], "--format"),
        (["--oncpu", "--gil", "--json"], "--oncpu and --gil exclude each other"),
        (["--json", "-o", "a.svg"], "--json prints to stdout"),
        (["--request", "3f2a", "--service", "web", "--json"], "leave --service and --tgid out"),
        (["--json", "--force"], "--force is for -o FILE"),
        (["--json", "--service", "wbe"], "there are web"),
        (["--json", "--tgid", "4711"], "no process 4711 was recorded"),
        (["--json", "--tgid", "100", "--service", "rq"], "process 100 is of web"),
    ],
)
def test_misuse_is_one_sentence(path, tmp_path, arguments, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(path, *arguments)
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)
    assert not [*tmp_path.glob("a.*")]


def test_a_file_is_not_overwritten_by_accident(path, tmp_path):
    file = tmp_path / "a.svg"
    file.write_text("mine")
    result = run(path, "-o", str(file))
    assert "will not overwrite without --force" in str(result.exception)
    assert file.read_text() == "mine"
    assert run(path, "-o", str(file), "--force").exit_code == 0
    assert "<svg" in file.read_text()
    assert "directory" in str(run(path, "-o", str(tmp_path), "--format", "svg").exception)
    assert isinstance(run(tmp_path / "none.scope", "--json").exception, RecordingError)


def test_nothing_to_draw_says_why_and_writes_nothing(tmp_path):
    empty = StackStory().record(tmp_path / "empty.scope").path
    result = run(empty, "-o", str(tmp_path / "a.svg"))
    assert isinstance(result.exception, ScopeError)
    assert str(result.exception).startswith("there is nothing to draw: no Python process")
    assert not (tmp_path / "a.svg").exists()
    result = run(empty, "--json")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no Python process" in result.stderr
    result = run(empty, "--json", "--request", "3f2a")
    assert "there are no requests" in str(result.exception)
