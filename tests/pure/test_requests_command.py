"""`scope-ebpf requests`: which requests there were, and where their time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner, Result

from scope_ebpf.analysis.schema import REQUESTS, span_text
from scope_ebpf.cli.requests import parts, render, requests
from scope_ebpf.errors import UsageError
from scope_ebpf.recording.reader import open_recording
from tests.pure.recordings import ROWS, at, make_recording
from tests.pure.shop_spans import CHECKOUT, MS, analysed_as, nth, request
from tests.pure.shop_spans import requests as request_frame

pytestmark = pytest.mark.pure

FAMILIES = ["processes", "syscalls", "messages", "offcpu"]


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    analysed_as(monkeypatch)
    return make_recording(tmp_path / "shop.scope", families=FAMILIES)


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(requests, [str(path), *arguments])


def ids(path: Path, *arguments: str) -> list[int]:
    result = run(path, *arguments, "--json")
    assert result.exit_code == 0, result.exception
    return [int(json.loads(line)["span_id"], 16) for line in result.stdout.splitlines()]


def refused(path: Path, *arguments: str) -> str:
    result = run(path, *arguments)
    assert isinstance(result.exception, UsageError), result.output
    assert result.stdout == ""
    return str(result.exception)


def test_entries_are_shown_in_the_order_of_time(path):
    result = run(path)
    assert result.stdout.splitlines() == [
        "id         start (UTC)   duration  service  operation       status  spans  "
        "where the time went",
        "3f2a91c0d  22:30:00.000   41.2 ms  nginx    POST /checkout  200        12  web http 40.6 ms",
        "3f2a91c0f  22:30:00.100   3.00 ms  web      GET /cart       500         1  "
        "Internal Server Error; cpu 2.80 ms, not understood 200 µs",
    ]
    assert result.stderr == ""


def test_narrow_terminals_get_a_line_for_the_time(path):
    rows = request_frame([request(CHECKOUT, duration_ns=100, cpu_ns=60, other_ns=40, error="x")])
    found = rows.with_columns(pl.lit(span_text(CHECKOUT)).alias("span_id"))
    lines = [line.plain for line in render(found, open_recording(path), 80, 8)]
    assert lines[1:] == [
        "3f2a91c0  22:30:00.000    100 ns  web      GET /      200         0",
        "          x",
        "          cpu 60 ns, not understood 40 ns",
    ]
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    ("families", "other_ns", "said"),
    [
        ([*FAMILIES, "samples"], 6, True),
        ([*FAMILIES, "samples"], 5, False),
        # without stacks there is nothing to divide it by
        (FAMILIES, 6, False),
    ],
)
def test_who_understands_little_is_told_what_tells_more(
    tmp_path, monkeypatch, families, other_ns, said
):
    analysed_as(monkeypatch, request_rows=[request(nth(1), duration_ns=10, other_ns=other_ns)])
    path = make_recording(tmp_path / "a.scope", families=families)
    told = run(path).stderr
    assert (f"`scope-ebpf flame REC --request {span_text(nth(1))[:8]} -o FILE.svg`" in told) == said
    assert run(path, "--json").stderr == ""


def test_choices_that_look_into_the_chain_see_all_requests(path):
    assert ids(path, "--service", "inventory") == [nth(9)]
    assert ids(path, "--where", "kind = 'consumer'") == [nth(12)]
    assert ids(path, "--where", "status = '500'", "--errors") == ids(path, "--errors")
    assert ids(path, "--slow", "1") == [CHECKOUT]
    assert ids(path, "--slow", "1", "--service", "web") == [nth(3)]


def test_ids_can_be_compared_as_they_are_shown(path):
    text = span_text(CHECKOUT)
    assert ids(path, "--where", f"request_id = '{text}' AND NOT entry") == [nth(3), nth(9), nth(12)]


def test_json_has_all_columns(path):
    first, *_ = run(path, "--json").stdout.splitlines()
    row = json.loads(first)
    assert list(row) == list(REQUESTS)
    assert row["span_id"] == row["request_id"] == "3f2a91c0d4e5f607"
    assert row["waits"] == [{"peer": "web", "protocol": "http", "wait_ns": 40_600_000}]
    assert (row["kind"], row["entry"], row["start_ns"], row["error"]) == (
        "server",
        True,
        at(0),
        None,
    )


def test_twenty_unless_asked(tmp_path, monkeypatch):
    rows = [request(nth(n), start_ns=at(n)) for n in range(1, 24)]
    analysed_as(monkeypatch, request_rows=rows)
    path = make_recording(tmp_path / "a.scope", families=FAMILIES)
    result = run(path)
    assert len(result.stdout.splitlines()) == 21
    assert result.stderr.startswith("the first 20 of 23; --limit N shows more")
    assert len(run(path, "--limit", "23").stdout.splitlines()) == 24
    assert run(path, "--limit", "23").stderr == ""
    assert len(run(path, "--slow", "22").stdout.splitlines()) == 23
    assert len(ids(path)) == 23
    assert ids(path, "--limit", "2") == [nth(1), nth(2)]


def test_dates_are_shown_where_they_differ(tmp_path, monkeypatch):
    days = [request(nth(n), start_ns=at(n * 86_400 * 10**9)) for n in (1, 2)]
    analysed_as(monkeypatch, request_rows=days)
    out = run(make_recording(tmp_path / "a.scope")).stdout
    assert "2023-11-15 22:30:00.000" in out
    assert "2023-11-16 22:30:00.000" in out


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("duration_ns >", "--where is not an SQL expression"),
        ("durations_ns > 5", "there is no column 'durations_ns'; did you mean duration_ns"),
        ('service = "web"', "SQL has text in single quotes"),
        ("duration_ns", "--where is not a condition"),
        ("true", "--where gives the same for all rows"),
        ("CAST(operation AS INT) = 1", "--where cannot be evaluated"),
        ("waits = 1", "--where"),
    ],
)
def test_wrong_expressions_are_explained(path, expression, expected):
    message = refused(path, "--where", expression)
    assert expected in message
    assert "\n" not in message


def test_slow_and_limit_exclude_each_other(path):
    assert refused(path, "--slow", "3", "--limit", "3").startswith("--slow N and --limit N exclude")


def test_an_unknown_service_gets_the_known_ones(path):
    result = run(path, "--service", "wbe")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert result.stderr == (
        "no service 'wbe' handled a request; there are inventory, nginx, rq:mail, web\n"
    )
    assert run(path, "--service", "nginx", "--errors").stderr == (
        "none of the 5 requests is like that\n"
    )
    assert run(path, "--service", "wbe", "--json").stdout == ""


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        (
            {"families": ["syscalls"]},
            ROWS,
            "holds no messages (only syscalls); record with messages",
        ),
        ({"payload_bytes": 0}, ROWS, "record with --payload-bytes 512"),
        ({}, {}, "neither sent nor received anything"),
        ({}, ROWS, "no traced process handled a request of a protocol that is known"),
    ],
)
def test_no_requests_have_a_likely_reason(tmp_path, monkeypatch, changes, rows, expected):
    analysed_as(monkeypatch, request_rows=[])
    result = run(make_recording(tmp_path / "a.scope", rows, **changes))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("there are no requests: ")
    assert expected in result.stderr


def test_text_of_traced_programs_cannot_steer_the_terminal(tmp_path, monkeypatch):
    evil = "[red]\x1b[2J\r\n"
    rows = [
        request(nth(1), service=evil, operation=evil, status=evil, error=evil,
                waits=[{"peer": evil, "protocol": evil, "wait_ns": 9 * MS}])
    ]  # fmt: skip
    analysed_as(monkeypatch, request_rows=rows)
    path = make_recording(tmp_path / "a.scope")
    result = run(path)
    assert result.exit_code == 0
    assert result.stdout.count("[red]\\x1b[2J") == 5
    for stream in (result.stdout, run(path, "--service", evil + "?").stderr):
        assert "\x1b" not in stream
        assert "\r" not in stream
    assert len(result.stdout.splitlines()) == 2


def test_what_is_not_known_is_a_dash(tmp_path, monkeypatch):
    rows = [
        request(nth(1), service=None, operation=None, protocol=None, status=None, duration_ns=None,
                spans=None, cpu_ns=None, waits=None)
    ]  # fmt: skip
    analysed_as(monkeypatch, request_rows=rows)
    line = run(make_recording(tmp_path / "a.scope")).stdout.splitlines()[1]
    assert line.split() == [span_text(nth(1))[:8], "22:30:00.000", "-", "-", "-", "-", "0"]


def where_it_went(**columns: Any) -> list[tuple[str, int]]:
    return parts({"duration_ns": 1000, "waits": [], "other_ns": 0, **columns})


def test_the_largest_parts_come_first():
    waits = [
        {"peer": "redis", "protocol": "redis", "wait_ns": 300},
        {"peer": "10.0.0.7:80", "protocol": None, "wait_ns": 100},
        {"peer": None, "protocol": None, "wait_ns": 90},
    ]
    assert where_it_went(cpu_ns=400, lock_ns=80, disk_ns=20, waits=waits) == [
        ("cpu", 400),
        ("redis", 300),
        ("10.0.0.7:80", 100),
        ("an unknown peer", 90),
    ]


def test_only_a_notable_remainder_is_not_understood():
    assert where_it_went(cpu_ns=951, other_ns=49) == [("cpu", 951)]
    assert where_it_went(cpu_ns=950, other_ns=50) == [("cpu", 950), ("not understood", 50)]
    assert where_it_went(other_ns=1000) == [("not understood", 1000)]
    assert where_it_went(duration_ns=0) == []


@pytest.mark.parametrize(
    ("families", "said"),
    [
        (["processes", "messages", "offcpu"], "system calls were not recorded"),
        (["processes", "messages", "syscalls"], "off-CPU time was not recorded"),
        (FAMILIES, ""),
    ],
)
def test_what_families_that_are_missing_cost(tmp_path, monkeypatch, families, said):
    analysed_as(monkeypatch)
    result = run(make_recording(tmp_path / "a.scope", families=families))
    assert result.stdout
    assert result.stderr.startswith(said)
    assert bool(result.stderr) == bool(said)
