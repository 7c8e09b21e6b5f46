"""`scope-ebpf chain`: one request's tree, for people and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from scope_ebpf.analysis.chain import failed, request_tree
from scope_ebpf.analysis.schema import span_text
from scope_ebpf.cli.chain import chain
from scope_ebpf.cli.tree import LEGEND, tree_lines
from scope_ebpf.errors import ScopeError, UsageError
from tests.pure.recordings import at, make_recording
from tests.pure.shop_spans import CART, CHECKOUT, KILLED, analysed_as, edges, nth, span, spans

pytestmark = pytest.mark.pure


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    analysed_as(monkeypatch)
    return make_recording(tmp_path / "shop.scope")


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(chain, [str(path), *arguments])


def chain_object(path: Path, span_id: int) -> dict[str, Any]:
    result = run(path, span_text(span_id), "--json")
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def lines_of(width: int, rows: list[dict[str, Any]], root: int) -> list[str]:
    tree = request_tree(spans(rows), edges([]), root).with_columns(failed().alias("failed"))
    return [line.plain for line in tree_lines(tree.to_dicts(), width)]


def test_a_chain_is_drawn_as_a_tree(path):
    result = run(path, "3f2a91c0d")
    assert result.exit_code == 0, result.exception
    title, heading, *lines = result.stdout.splitlines()
    assert title == (
        "request 3f2a91c0d4e5f607, 2023-11-14 22:30:00.000 UTC: 13 spans in 6 services"
    )
    assert heading.split() == ["span", "time", "start", "duration", "status", "edge"]
    labels = [line[:42].rstrip() for line in lines]
    assert labels == [
        "nginx  POST /checkout",
        "└ nginx → web  POST /checkout",
        "  └ web",  # what it handled stands above
        "    ├ web → redis  GET product:?",
        "    │ └ redis",
        "    ├ web → postgresql  SELECT name, price",
        "    │ └ postgresql",
        "    ├ web → inventory  GET /stock/{id}",
        "    │ └ inventory",
        "    │   └ inventory → 10.0.0.7:5432  SELEC",
        "    └ web → redis  LPUSH rq:queue:mail",
        "      └ rq:mail  shop.jobs.send_mail",
        "        └ rq:mail → postgresql  INSERT INT",
    ]
    ends = [line.split()[-2:] for line in lines]
    assert ends[0] == ["200", "-"]
    assert ends[3] == ["nil", "continues"]
    assert ends[4] == ["nil", "~calls"]
    assert ends[11] == ["OK", "queued_by"]
    assert result.stderr == LEGEND + "\n"


def test_bars_show_when_it_was(path):
    lines = run(path, "3f2a91c0d").stdout.splitlines()[2:]
    bars = [line[line.index("█") :] if "█" in line else line for line in lines]
    # 75 ms in 20 cells: the request takes the first 11, and the job the last 8.
    assert bars[0].startswith("███████████ ")
    assert bars[11].startswith("████████ ")
    begins = [lines[index].index("█") for index in (0, 11)]
    assert begins[1] - begins[0] == 12
    assert "45.0 ms" in lines[11]


def test_a_part_of_a_request_says_so(path):
    result = run(path, span_text(nth(8)))
    assert result.stdout.startswith(f"span {span_text(nth(8))}, ")
    assert len(result.stdout.splitlines()) == 5
    assert (
        f"part of the request {span_text(CHECKOUT)}; `scope-ebpf chain shop.scope "
        f"{span_text(CHECKOUT)}` shows all of it\n"
    ) in result.stderr


def test_failures_tell_their_reasons(path):
    lines = run(path, "3f2a91c0ffff").stdout.splitlines()[2:]
    assert lines[1].rstrip() == "│ error: Internal Server Error"
    assert lines[2].startswith("└ web → redis  connect ")
    assert lines[2].split()[-2:] == ["error", "continues"]
    assert lines[3].strip(" │") == "error: ECONNREFUSED: nobody listens there"
    # what broke follows below what it broke
    assert lines[4].startswith("  └ redis  killed by SIGKILL  ")
    assert lines[4].split()[-2:] == ["SIGKILL", "caused_by"]


def test_a_process_that_died_is_a_line_of_its_own(path):
    lines = run(path, "77000000").stdout.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("redis  killed by SIGKILL  ")
    assert lines[2].split()[-2:] == ["SIGKILL", "-"]


def test_json_is_one_object(path):
    found = chain_object(path, CHECKOUT)
    assert found["request_id"] == "3f2a91c0d4e5f607"
    assert len(found["spans"]) == 13
    first, second, *_ = found["spans"]
    assert first["parent_id"] is first["edge"] is first["evidence"] is None
    assert second == {
        "span_id": span_text(nth(2)), "parent_id": "3f2a91c0d4e5f607", "edge": "continues",
        "evidence": "exact", "service": "nginx", "tgid": 10, "tid": 10, "protocol": "http",
        "operation": "POST /checkout", "detail": "POST /checkout?a=?b7",
        "start_ns": at(300_000), "duration_ns": 40_600_000, "status": "200", "kind": "client",
        "error": None, "miss": False, "peer": "web", "state": "complete", "depth": 1, "links": [],
    }  # fmt: skip


def test_json_has_the_other_causes_as_links(path):
    found = chain_object(path, CART)
    assert found["spans"][1]["links"] == [
        {"span_id": span_text(KILLED), "edge": "caused_by", "evidence": "exact",
         "reason": "the process at the other end had ended", "service": "redis",
         "operation": "killed by SIGKILL",
         "error": "killed by SIGKILL"}
    ]  # fmt: skip
    assert chain_object(path, nth(21))["request_id"] == span_text(CART)


def test_unknown_and_ambiguous_ids_are_refused(path):
    for text, expected in (("beef", "no span has the id beef"), ("3f2a91c0", "give more digits")):
        result = run(path, text)
        assert isinstance(result.exception, UsageError)
        assert expected in str(result.exception)
        assert result.stdout == ""


def test_nothing_has_a_likely_reason(tmp_path, monkeypatch):
    analysed_as(monkeypatch, span_rows=[])
    result = run(make_recording(tmp_path / "a.scope", families=["offcpu"]), "beef")
    assert isinstance(result.exception, ScopeError)
    assert str(result.exception).startswith(
        "there are no requests: the recording holds no messages"
    )


def test_text_of_traced_programs_cannot_steer_the_terminal(tmp_path, monkeypatch):
    evil = "[red]\x1b[2J\x9b\r\n"
    rows = [
        span(nth(1), request_id=nth(1), kind="server", service=evil, operation=evil, status=evil),
        span(nth(2), request_id=nth(1), parent_id=nth(1), service=evil, peer=evil, operation=evil,
             error=f"{evil}!"),
    ]  # fmt: skip
    link = {"cause_id": nth(2), "effect_id": nth(1), "edge": "woken_by", "evidence": "guess",
            "reason": evil, "parent": False}  # fmt: skip
    analysed_as(monkeypatch, span_rows=rows, edge_rows=[link])
    result = run(make_recording(tmp_path / "a.scope"), span_text(nth(1)))
    assert result.exit_code == 0, result.exception
    assert result.stdout.count("[red]\\x1b[2J\\x9b\\r\\n") >= 8
    assert not set("\x1b\x9b\r") & set(result.stdout)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_lines_fit_the_terminal(width):
    rows = [
        span(n, request_id=1, parent_id=n - 1, service="a-rather-long-service-name",
             peer="another-service", operation="SELECT something FROM somewhere WHERE it = ?",
             edge="triggered_by", evidence="guess", status="undefined_table", error="why " * 60)
        for n in range(1, 31)
    ]  # fmt: skip
    lines = lines_of(width, rows, 1)
    assert max(map(len, lines)) <= width
    assert sum("?triggere" in line for line in lines) == 30


def test_a_deep_branch_leaves_room_for_the_span():
    rows = [span(n, request_id=1, parent_id=n - 1, peer=f"peer-{n}") for n in range(1, 101)]
    last = lines_of(80, rows, 1)[-1]
    assert last.startswith("…")
    assert "└ web → peer" in last


def test_a_server_repeats_its_client_only_where_it_differs():
    client = span(1, request_id=1, protocol="http", operation="GET /", peer="api")
    server = span(2, request_id=1, parent_id=1, kind="server", service="api", protocol="http")
    (line,) = lines_of(80, [client, {**server, "operation": "GET /"}], 1)[2:]
    assert line.split()[:2] == ["└", "api"]
    assert "GET" not in line
    (line,) = lines_of(80, [client, {**server, "operation": "GET /other"}], 1)[2:]
    assert "GET /other" in line


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"state": "open"}, "open"),
        ({"state": "no_response"}, "no answer"),
        ({"state": "one_way"}, "one way"),
        ({"error": "connection reset"}, "failed"),
        ({"kind": "fault"}, "failed"),
        ({"status": "404", "state": "open"}, "404"),
        ({}, "-"),
    ],
)
def test_a_span_without_a_status_says_why(columns, expected):
    line = lines_of(120, [span(1, request_id=1, **columns)], 1)[1]
    assert line.split("1.00 ms")[1].split("  ")[1] == expected


def test_no_time_and_no_duration_are_no_problem():
    rows = [span(1, request_id=1, duration_ns=None), span(2, request_id=1, duration_ns=0)]
    lines = lines_of(80, rows, 1)
    assert len(lines) == 3
    assert "▏" in lines[1]


def test_failures_are_red_and_misses_yellow():
    rows = [
        span(1, request_id=1, kind="server", protocol="http", status="503"),
        span(2, request_id=1, parent_id=1, status="nil", miss=True),
    ]
    tree = request_tree(spans(rows), edges([]), 1).with_columns(failed().alias("failed"))
    lines = list(tree_lines(tree.to_dicts(), 120))[1:]
    styles = [{line.plain[part.start : part.end].strip(): part.style for part in line.spans}
              for line in lines]  # fmt: skip
    assert styles[0]["503"] == "red"
    assert styles[1]["nil"] == "yellow"
