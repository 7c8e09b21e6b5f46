"""`scope-ebpf services`: the map of who talks to whom."""

from __future__ import annotations

import io
import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from scope_ebpf.analysis.services import SERVICE_MAP, service_map
from scope_ebpf.cli.services import HEADINGS, render, services
from tests.pure.recordings import make_recording
from tests.pure.shop_spans import analysed_as, span, spans

pytestmark = pytest.mark.pure


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    analysed_as(monkeypatch)
    return make_recording(tmp_path / "shop.scope")


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(services, [str(path), *arguments])


def drawn(found: pl.DataFrame, width: int) -> list[str]:
    stream = io.StringIO()
    render(found, Console(file=stream, width=width))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_the_map_is_shown(path):
    result = run(path)
    assert result.exit_code == 0, result.exception
    heading, *lines = result.stdout.splitlines()
    assert heading.split() == list(HEADINGS)
    cells = [line.split() for line in lines]
    assert [row[:2] for row in cells] == [
        ["outside", "nginx"],
        ["nginx", "web"],
        ["web", "rq:mail"],
        ["web", "inventory"],
        ["inventory", "10.0.0.7:5432"],
        ["web", "postgresql"],
        ["outside", "web"],
        ["rq:mail", "postgresql"],
        ["web", "redis"],
    ]
    assert cells[2][2:6] == ["redis", "queue", "1", "0"]
    assert cells[8][2:5] == ["redis", "3", "1"]  # once it was not there
    assert result.stderr == ""


def test_json_has_exact_numbers(path):
    rows = [json.loads(line) for line in run(path, "--json").stdout.splitlines()]
    assert all(list(row) == list(SERVICE_MAP) for row in rows)
    redis = rows[8]
    assert (redis["calls"], redis["total_ns"], redis["p50_ns"]) == (3, 900_000, 400_000)


@pytest.mark.parametrize("width", [80, 100, 140])
def test_lines_fit_the_terminal(width):
    rows = [
        span(n, service="a-service-with-a-long-name-" * 2, peer="2001:db8::1234:5678:5432" * 2,
             duration_ns=n * 1_234_567)
        for n in range(1, 2000)
    ]  # fmt: skip
    heading, line = drawn(service_map(spans(rows).lazy()), width)
    assert len(heading) <= width
    assert len(line) <= width
    assert ("p95" in heading) == (width > 80)
    assert line.split()[0].startswith("a-servi")
    assert line.split()[1].startswith("2001:db8:")
    assert "1,999" in line


def test_names_that_fit_are_whole():
    lines = drawn(service_map(spans().lazy()), 80)
    assert any(line.startswith("inventory  10.0.0.7:5432  postgresql") for line in lines)


def test_text_of_traced_programs_cannot_steer_the_terminal(tmp_path, monkeypatch):
    evil = "[red]\x1b[2J\n"
    analysed_as(monkeypatch, span_rows=[span(1, service=evil, peer=evil, protocol=evil)])
    out = run(make_recording(tmp_path / "a.scope")).stdout
    assert out.count("[red]\\x1b[2J\\n") == 3
    assert "\x1b" not in out


def test_an_empty_map_has_a_likely_reason(tmp_path, monkeypatch):
    analysed_as(monkeypatch, span_rows=[])
    result = run(make_recording(tmp_path / "a.scope", payload_bytes=0))
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith(
        "no service talked to another one: the recording holds no heads"
    )
