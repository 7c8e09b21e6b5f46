"""`scope-ebpf events`: rows for people, for jq and for spreadsheets."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scope_ebpf import open_recording
from scope_ebpf.cli.events import SHOWN, events
from scope_ebpf.errors import RecordingError, ScopeError, UsageError
from scope_ebpf.families import TABLES
from scope_ebpf.recording.schema import SCHEMAS
from tests.pure.recordings import ROWS, at, make_recording

pytestmark = pytest.mark.pure
ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path) -> Path:
    return make_recording(tmp_path / "shop.scope")


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(events, [str(path), *arguments])


def objects(path: Path, *arguments: str) -> list[dict[str, Any]]:
    result = run(path, *arguments, "--json")
    assert result.exit_code == 0, result.exception
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(path: Path, *arguments: str) -> str:
    result = run(path, *arguments)
    assert isinstance(result.exception, UsageError), result.output
    assert result.stdout == ""
    return str(result.exception)


def process(*arguments: str, stdout: int) -> subprocess.Popen[bytes]:
    """The real command, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "scope_ebpf", "events", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_tables_and_their_columns_exist(path):
    assert list(TABLES) == list(SCHEMAS)
    recording = open_recording(path)
    for table, names in SHOWN.items():
        assert set(names.split()) <= set(recording.table(table).collect_schema())


@pytest.mark.parametrize("table", TABLES)
def test_json_has_all_columns_of_all_rows(path, table):
    rows = objects(path, table)
    assert len(rows) == len(ROWS[table])
    columns = open_recording(path).table(table).collect_schema().names()
    assert all(list(row) == columns for row in rows)


def test_json_keeps_exact_values(tmp_path):
    calls = [{"start_ns": at(0), "arg0": 2**64 - 1, "result": -(2**63), "number": 257}]
    (row,) = objects(make_recording(tmp_path / "a.scope", {"syscalls": calls}), "syscalls")
    assert (row["start_ns"], row["arg0"], row["result"]) == (at(0), 2**64 - 1, -(2**63))
    assert (row["name"], row["status"], row["error"]) == ("openat", "complete", None)


def test_csv_has_a_line_of_names(path):
    rows = list(csv.DictReader(io.StringIO(run(path, "messages", "--csv").stdout)))
    assert [row["direction"] for row in rows] == ["send", "receive", "send"]
    assert [row["payload"] for row in rows] == ["a\\xff\\n", "", ""]


def test_empty_csv_still_has_its_names(path):
    assert run(path, "losses", "--csv").stdout == "time_ns,cpu,table,lost\n"


def test_people_see_aligned_lines(path):
    result = run(path, "syscalls", "--limit", "2")
    assert result.stdout.splitlines() == [
        "  start_ns  duration_ns  tgid  tid  name    result  error   status",
        "0.000000 s       500 ns   100  100  read        12  -       complete",
        "0.000000 s       900 ns   100  101  openat      -2  ENOENT  complete",
    ]
    assert result.stderr == "and 3 more rows; --limit shows more of them\n"


def test_people_see_no_more_than_there_is(path):
    result = run(path, "syscalls")
    assert len(result.stdout.splitlines()) == 6
    assert result.stderr == ""
    assert run(path, "syscalls", "--limit", "5").stderr == ""


def test_fifty_rows_unless_asked(tmp_path):
    rows = {"syscalls": [{"start_ns": at(n)} for n in range(60)]}
    path = make_recording(tmp_path / "a.scope", rows, per_segment=60)
    result = run(path, "syscalls")
    assert len(result.stdout.splitlines()) == 51
    assert "and 10 more rows" in result.stderr
    assert len(objects(path, "syscalls")) == 60
    assert len(objects(path, "syscalls", "--limit", "7")) == 7
    assert len(run(path, "syscalls", "--limit", "55").stdout.splitlines()) == 56


def test_long_values_are_cut_for_people_only(tmp_path):
    rows = {"processes": [{"comm": "sh", "command_line": "x" * 3000}]}
    path = make_recording(tmp_path / "a.scope", rows)
    (line,) = run(path, "processes").stdout.splitlines()[1:]
    assert len(line) < 300
    assert line.rstrip().endswith("x…")
    assert objects(path, "processes")[0]["command_line"] == "x" * 3000


def test_payloads_are_escaped(path):
    assert "a\\xff\\n" in run(path, "messages").stdout


def test_text_of_traced_programs_cannot_steer_the_terminal(tmp_path):
    rows = {"processes": [{"comm": "\x1b[2J", "command_line": "[red]\x9b\r\n"}]}
    out = run(make_recording(tmp_path / "a.scope", rows), "processes").stdout
    assert "\\x1b[2J" in out
    assert "[red]\\x9b\\r\\n" in out


def test_times_count_from_the_start(tmp_path):
    rows: dict[str, list[dict[str, Any]]] = {
        "processes": [{"time_ns": at(1_500_000_000), "start_boottime_ns": at(7_000 - 10**9)}],
        "offcpu": [{"start_ns": at(-(10**6)), "duration_ns": 2 * 10**6, "state": 1}],
    }
    path = make_recording(tmp_path / "a.scope", rows)
    out = run(path, "processes", "--columns", "time_ns,start_boottime_ns").stdout
    assert out.splitlines()[1].split() == ["1.500000", "s", "-1.000000", "s"]
    out = run(path, "offcpu", "--columns", "start_ns,duration_ns,state_bits,name").stdout
    assert out.splitlines()[1].split() == ["-0.001000", "s", "2.00", "ms", "0x1", "-"]


# Choosing


@pytest.mark.parametrize(
    ("table", "where", "found"),
    [
        ("syscalls", "duration_ns > 400", 2),
        ("syscalls", "error = 'ENOENT'", 1),
        ("syscalls", "error IS NULL AND name LIKE 'r%'", 2),
        ("syscalls", "status LIKE 'comp%'", 4),
        ("syscalls", "tgid IN (200, 300) OR tid = 101", 4),
        ("messages", "payload LIKE 'a\\xff%'", 1),
        ("messages", "direction = 'receive'", 1),
        ("messages", "kind IS NULL", 1),
        ("processes", "event = 'exit' AND signal_name = 'SIGKILL'", 1),
        ("offcpu", "state = 'S' AND waiting_ns = 70", 1),
        ("offcpu", "waiting_ns = max(waiting_ns)", 1),
        ("connections", "remote_path = '@bus'", 1),
        ("losses", "\"table\" = 'syscalls'", 0),
    ],
)
def test_where_chooses_rows(path, table, where, found):
    assert len(objects(path, table, "--where", where)) == found


def test_where_uses_columns_that_are_not_shown(path):
    rows = objects(path, "syscalls", "--where", "name = 'openat'", "--columns", "tid,start_ns")
    assert rows == [{"tid": 101, "start_ns": at(2)}]
    assert list(rows[0]) == ["tid", "start_ns"]


@pytest.mark.parametrize(
    ("where", "answer"),
    [
        ("tigd = 1", "there is no column 'tigd'; did you mean tid or tgid"),
        ("xyzzy = 1", "there is no column 'xyzzy'; there are start_ns, duration_ns, tgid"),
        ("TGID = 1", "did you mean tgid"),
        ('name = "read"', "SQL has text in single quotes"),
        ("tgid =", "is not an SQL expression: .*; write it like"),
        ("", "is not an SQL expression"),
        ("tgid = 1; DROP TABLE x", "is not an SQL expression"),
        ("name", "'name' is String, not true or false"),
        ("name > 3", "cannot be evaluated: cannot compare string with numeric type"),
        ("tgid IN (SELECT 1)", "cannot hold a query of its own"),
        ("count(*) > 3", "gives the same for all rows"),
        ("name ~ '('", "cannot be evaluated: regex"),
    ],
)
@pytest.mark.parametrize("output", [(), ("--json",), ("--csv",)])
def test_bad_conditions_are_misuse(path, where, answer, output):
    with pytest.raises(UsageError, match=answer):
        raise UsageError(refused(path, "syscalls", "--where", where, *output))


@pytest.mark.parametrize("output", [(), ("--json",), ("--csv",)])
def test_conditions_that_fail_on_a_value_are_misuse(path, output):
    result = run(path, "syscalls", "--where", "CAST(name AS INT) = 3", *output)
    assert isinstance(result.exception, UsageError)
    assert "cannot be evaluated: conversion from `str`" in str(result.exception)


def test_bad_columns_are_misuse(path):
    assert "no column 'nme'; did you mean name" in refused(path, "syscalls", "--columns", "tid,nme")
    assert "names tid twice" in refused(path, "syscalls", "--columns", "tid, tid")
    assert "no column ''" in refused(path, "syscalls", "--columns", "")


def test_other_misuse(path):
    assert "exclude each other" in refused(path, "syscalls", "--json", "--csv")
    assert "there is no table 'nothing'" in refused(path, "nothing")
    for arguments in (["syscalls", "--limit", "0"], []):
        assert run(path, *arguments).exit_code == 2


def test_no_rows_are_told_on_stderr(path):
    assert run(path, "losses").stderr == "losses has no rows\n"
    assert run(path, "offcpu", "--where", "tgid = 5").stderr == "no such rows in offcpu\n"
    assert objects(path, "losses") == []


def test_help_has_examples_and_escapes():
    out = CliRunner().invoke(events, ["--help"]).stdout
    assert "--where \"error = 'ENOENT'\"" in out
    assert "\\xNN" in out


# Damage and closed pipes


@pytest.mark.parametrize("output", [(), ("--json",), ("--csv",)])
@pytest.mark.parametrize("damaged", ["messages", "connections"])
def test_damage_comes_before_any_row(path, damaged, output):
    file = max((path / damaged).iterdir())
    file.write_bytes(file.read_bytes()[:-9] + b"\0" * 9)
    result = run(path, "messages", *output)
    assert isinstance(result.exception, ScopeError)
    assert result.stdout == ""
    assert run(path, "syscalls", *output).exit_code == 0


def test_missing_recordings_are_errors(tmp_path):
    assert isinstance(run(tmp_path / "x", "syscalls").exception, RecordingError)


@pytest.fixture(scope="module")
def long_recording(tmp_path_factory) -> Path:
    rows = [{"start_ns": at(n), "number": n % 300} for n in range(3000)]
    path: Path = tmp_path_factory.mktemp("long") / "a.scope"
    return make_recording(path, {"syscalls": rows * 20}, per_segment=20_000)


@pytest.mark.parametrize("output", [("--limit", "60000"), ("--json",), ("--csv",)])
def test_a_reader_that_goes_ends_it_quietly(long_recording, output):
    with process(str(long_recording), "syscalls", *output, stdout=subprocess.PIPE) as running:
        assert running.stdout and running.stderr
        assert running.stdout.readline()
        running.stdout.close()
        assert b"rror" not in running.stderr.read()
        # by SIGPIPE, like cat, or by noticing
        assert running.wait(60) in {0, -13}


@pytest.mark.parametrize("output", [(), ("--json",), ("--csv",)])
def test_a_full_disk_is_an_error(long_recording, output):
    with open("/dev/full", "wb") as full:
        running = process(str(long_recording), "syscalls", *output, stdout=full.fileno())
        _, err = running.communicate(timeout=60)
    assert b"error: cannot write to stdout: No space left on device\n" in err
    assert b"Traceback" not in err
    assert running.returncode == 1


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(payloads=st.lists(st.none() | st.binary(max_size=40), min_size=1, max_size=5))
def test_payloads_can_be_unescaped(tmp_path_factory, payloads: Sequence[bytes | None]):
    path = tmp_path_factory.mktemp("payloads") / "a.scope"
    make_recording(path, {"messages": [{"payload": payload} for payload in payloads]})
    texts = [row["payload"] for row in objects(path, "messages", "--columns", "payload")]
    assert all(text is None or (text.isascii() and text.isprintable()) for text in texts)
    restored = [None if text is None else codecs.escape_decode(text.encode())[0] for text in texts]
    assert restored == list(payloads)
