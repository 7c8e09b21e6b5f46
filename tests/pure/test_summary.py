"""What `summarize` counts, and how the command shows it."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from scope_ebpf import open_recording
from scope_ebpf.analysis.summary import Summary, summarize
from scope_ebpf.cli import units
from scope_ebpf.cli.summary import print_summary, summary
from scope_ebpf.errors import FormatError, RecordingError
from scope_ebpf.recording.meta import Target, read_meta, write_meta
from scope_ebpf.recording.schema import SCHEMAS
from tests.pure.recordings import ENDED_NS, META, ROWS, STARTED_NS, at, make_recording

pytestmark = pytest.mark.pure


def call(name: int, duration_ns: int, result: int = 0) -> dict[str, Any]:
    return {"number": name, "duration_ns": duration_ns, "result": result}


def summary_of(tmp_path: Path, rows: dict[str, list[dict[str, Any]]], **changes: Any) -> Summary:
    return summarize(open_recording(make_recording(tmp_path / "a.scope", rows, **changes)))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(summary, [str(argument) for argument in arguments])


def test_it_counts_what_is_there(tmp_path):
    path = make_recording(tmp_path / "shop.scope", lost={"syscalls": 3, "payloads": 4})
    found = summarize(open_recording(path))
    assert found.complete
    assert found.duration_ns == ENDED_NS - STARTED_NS
    assert found.started_realtime_ns == STARTED_NS + META.clock.realtime_offset_ns
    assert found.targets == [
        {"tgid": 100, "comm": "gunicorn", "cmdline": ["gunicorn", "shop app:app"]}
    ]
    assert (found.processes, found.threads) == (2, 3)
    rows = {name: table.rows for name, table in found.tables.items()}
    assert rows == {name: len(ROWS[name]) for name in SCHEMAS}
    assert found.tables["syscalls"].lost == 3
    assert (found.lost_payloads, found.lost_tasks, found.lost_total) == (4, 0, 7)
    assert found.notes == []
    assert found.recorder["cpu_percent"] == 3.5
    assert found.recorder["peak_rss_bytes"] == 90_000_000


def test_bytes_are_those_of_the_files(tmp_path):
    path = make_recording(tmp_path / "a.scope")
    (path / "syscalls" / ".part").write_bytes(b"x" * 1000)
    found = summarize(open_recording(path))
    of_syscalls = sum(file.stat().st_size for file in (path / "syscalls").glob("*.parquet"))
    assert found.tables["syscalls"].bytes_on_disk == of_syscalls
    assert found.tables["syscalls"].bytes_per_row == round(of_syscalls / 5, 1)
    assert found.tables["losses"].bytes_per_row is None
    whole = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert found.bytes_on_disk == whole - 1000


def test_calls_are_counted_by_name(tmp_path):
    rows = [
        call(0, 1000), call(0, 3000, -11), call(0x8000 | 3, 1000, -4), call(0, 2000, -11),
        call(1, 50), call(1, 60, 2**40), call(1, 70, -5000),
    ]  # fmt: skip
    found = summary_of(tmp_path, {"syscalls": rows})
    read, write = found.syscalls
    assert (read.name, read.count, read.total_ns, read.errors) == ("read", 4, 7000, 3)
    assert read.most_frequent_error == "EAGAIN"
    assert (write.name, write.count, write.total_ns, write.errors) == ("write", 3, 180, 0)
    assert write.most_frequent_error is None


def test_quantiles_are_right_to_two_percent(tmp_path):
    random.seed(5)
    durations = [int(random.lognormvariate(9, 2)) for _ in range(4001)]
    rows = [call(0, duration) for duration in durations] + [call(1, 0), call(2, 10**12)]
    found = {c.name: c for c in summary_of(tmp_path, {"syscalls": rows}, per_segment=999).syscalls}
    exact = statistics.quantiles(durations, n=100, method="inclusive")
    assert found["read"].p50_ns == pytest.approx(exact[49], rel=0.023)
    assert found["read"].p99_ns == pytest.approx(exact[98], rel=0.03)  # between two samples
    assert found["write"].p50_ns <= 1
    assert found["open"].p50_ns == found["open"].p99_ns == pytest.approx(10**12, rel=0.022)


def test_offcpu_time_is_summed_by_program(tmp_path):
    intervals = [
        {"tgid": 100, "duration_ns": 100, "runnable_ns": 30},
        {"tgid": 101, "duration_ns": 10, "runnable_ns": 10},
        {"tgid": 200, "duration_ns": 500},
        {"tgid": 999, "duration_ns": 1},
    ]
    processes = [
        {"tgid": 101, "tid": 101, "comm": "gunicorn"},
        {"tgid": 200, "tid": 200, "comm": "sh"},
        {"tgid": 200, "tid": 200, "comm": "curl"},
        {"tgid": 200, "tid": 201, "comm": "resolver"},  # a thread's own name
    ]
    found = summary_of(tmp_path, {"offcpu": intervals, "processes": processes}).offcpu
    assert [(each.comm, each.intervals, each.waiting_ns, each.runnable_ns) for each in found] == [
        ("curl", 1, 500, 0),
        ("gunicorn", 2, 70, 40),
        (None, 1, 1, 0),
    ]


def test_losses_are_the_larger_of_both_counts(tmp_path):
    losses = [
        {"time_ns": at(0), "cpu": 0, "table": "syscalls", "lost": 5},
        {"time_ns": at(0), "cpu": 1, "table": "syscalls", "lost": 6},
        {"time_ns": at(9), "cpu": 1, "table": "payloads", "lost": 1},
        {"time_ns": at(9), "cpu": 1, "table": "tasks", "lost": 2},
    ]
    found = summary_of(tmp_path, {"losses": losses}, lost={"syscalls": 3, "offcpu": 9})
    assert found.tables["syscalls"].lost == 11
    assert found.tables["offcpu"].lost == 9
    assert (found.lost_payloads, found.lost_tasks, found.lost_total) == (1, 2, 11 + 9 + 3)


def test_a_killed_recorder_is_told(tmp_path):
    path = make_recording(
        tmp_path / "a.scope",
        complete=False,
        ended_ns=None,
        tables={},
        notes=["the clock jumped"],
    )
    found = summarize(open_recording(path))
    assert not found.complete
    assert found.notes == [
        "incomplete: the recorder was killed; at most the last second is missing",
        "the clock jumped",
    ]
    assert found.tables["syscalls"].rows == 5
    assert found.duration_ns == 902  # the end of the last call
    (path / "syscalls").rename(tmp_path / "away")
    write_meta(path, replace(read_meta(path), tables={"syscalls": found_count(5)}))
    assert (
        "at its end at least 5 rows of syscalls are missing"
        in summarize(open_recording(path)).notes[0]
    )


def found_count(rows: int) -> Any:
    from scope_ebpf.recording.meta import TableCount

    return TableCount(rows=rows, lost=0)


def test_an_early_end_is_told(tmp_path):
    found = summary_of(tmp_path, {}, complete=False, notes=["the disk was full"])
    assert found.notes[0].startswith("incomplete: the recorder had to end before")
    assert found.duration_ns == ENDED_NS - STARTED_NS


def test_an_empty_recording_has_a_summary(tmp_path):
    found = summary_of(tmp_path, {}, complete=False, ended_ns=None)
    assert (found.duration_ns, found.lost_total, found.syscalls, found.offcpu) == (0, 0, [], [])


def test_damage_is_an_error(tmp_path):
    path = make_recording(tmp_path / "a.scope")
    file = next((path / "losses").parent.glob("syscalls/*"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match="is damaged"):
        summarize(open_recording(path))


# The command


def test_json_is_one_object(tmp_path):
    path = make_recording(tmp_path / "a.scope")
    result = run(path, "--json")
    document = json.loads(result.stdout)
    assert document == summarize(open_recording(path)).to_dict()
    assert {"duration_ns", "targets", "tables", "lost_total", "bytes_on_disk", "recorder"} <= set(
        document
    )
    assert set(document["targets"][0]) == {"tgid", "comm", "cmdline"}
    assert result.exit_code == 0


def test_people_see_it_in_80_columns(tmp_path):
    random.seed(1)
    rows: dict[str, list[dict[str, Any]]] = {
        "syscalls": [
            call(n % 300, int(10 ** random.uniform(0, 11)), random.choice([0, -4, -512]))
            for n in range(3000)
        ],
        "offcpu": [{"tgid": 100, "duration_ns": 10**11}],
    }
    result = run(make_recording(tmp_path / "a.scope", rows, per_segment=5000))
    assert result.exit_code == 0
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    assert "\x1b" not in result.stdout
    assert "lost       0 events, 0 heads of payloads, 0 whole threads" in result.stdout
    assert "recorded   5.00 s from 2023-11-14 22:30:00 UTC" in result.stdout
    assert "recorder   3.5 % of one CPU, 90.0 MB of memory at most" in result.stdout
    assert _row(result, "syscalls")[:2] == ["3,000", "0"]
    assert _row(result, "gunicorn") == ["1", "1", "min", "40", "s", "0", "ns"]


def _row(result: Result, name: str) -> Sequence[str]:
    (line,) = (line for line in result.stdout.splitlines() if line.startswith(name + " "))
    return line.split()[1:]


def test_losses_and_notes_are_seen(tmp_path):
    path = make_recording(
        tmp_path / "a.scope", lost={"syscalls": 1}, lost_tasks=2, complete=False, ended_ns=None
    )
    out = run(path).stdout
    assert "lost       1 event, 0 heads of payloads, 2 whole threads" in out
    assert "note       incomplete: the recorder was killed" in out


def test_text_of_traced_programs_cannot_steer_the_terminal(tmp_path):
    evil = "\x1b[2J[bold]x[/bold]\n"
    path = make_recording(
        tmp_path / "a.scope",
        {"offcpu": [{"tgid": 100, "duration_ns": 1}]},
        targets=[Target(tgid=100, comm=evil, cmdline=[evil])],
    )
    out = run(path).stdout
    assert "\x1b" not in out
    assert "\\x1b[2J[bold]x[/bold]\\n" in out


def test_many_targets_are_counted(tmp_path):
    targets = [Target(tgid=n, comm="w", cmdline=[]) for n in range(20)]
    out = run(make_recording(tmp_path / "a.scope", {}, targets=targets)).stdout
    assert "target     7 w" in out
    assert "           and 12 more" in out


def test_a_clock_beyond_the_calendar_is_no_error(tmp_path):
    clock = replace(META.clock, realtime_offset_ns=2**63 - 1)
    path = make_recording(tmp_path / "a.scope", {}, clock=clock)
    assert "recorded   5.00 s from " in run(path).stdout


def test_errors_reach_the_command_line(tmp_path):
    result = run(tmp_path / "gone.scope")
    assert isinstance(result.exception, RecordingError)


def test_stdout_can_belong_to_someone_else(tmp_path, capsys):
    print_summary(make_recording(tmp_path / "a.scope"), to_stderr=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "recorded   5.00 s" in captured.err


def test_help_has_examples():
    assert "scope-ebpf summary shop.scope --json | jq .lost_total" in run("--help").stdout


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0 ns"), (999, "999 ns"), (1000, "1.00 µs"), (9_994, "9.99 µs"), (9_996, "10.0 µs"),
     (99_960, "100 µs"), (999_500, "1.00 ms"), (99_900_000_000, "99.9 s"),
     (100 * 10**9, "1 min 40 s"), (3_599_600_000_000, "1 h 00 min 00 s")],
)  # fmt: skip
def test_durations_have_three_digits(ns, text):
    assert units.duration(ns) == text


def test_services_are_grouped_by_where_they_run(tmp_path):
    """One row per service and unit or container; a number that is used again is another process."""
    unit, other = "/system.slice/shop.service", f"/docker/{'ab' * 32}"
    rows: dict[str, list[dict[str, Any]]] = {
        "processes": [
            {"time_ns": at(0), "event": 0, "tgid": 7, "tid": 7, "comm": "redis-server", "cgroup": unit},
            {"time_ns": at(0), "event": 0, "tgid": 8, "tid": 8, "comm": "redis-server", "cgroup": other},
            {"time_ns": at(50), "event": 4, "tgid": 8, "tid": 8, "comm": "redis-server",
             "cgroup": other},
            {"time_ns": at(60), "event": 1, "tgid": 8, "tid": 8, "comm": "true",
             "start_boottime_ns": 5},
        ],
        "syscalls": [
            {"start_ns": at(1), "duration_ns": 5, "tgid": 7, "tid": 7},
            {"start_ns": at(2), "duration_ns": 7, "tgid": 8, "tid": 8, "result": -2},
            {"start_ns": at(3), "duration_ns": 7, "tgid": 8, "tid": 8},
            {"start_ns": at(70), "duration_ns": 9, "tgid": 8, "tid": 8},
            {"start_ns": at(70), "duration_ns": 9, "tgid": 99, "tid": 99},
        ],
        "offcpu": [
            {"start_ns": at(1), "duration_ns": 100, "runnable_ns": 30, "tgid": 8, "state": 1},
        ],
    }  # fmt: skip
    found = summary_of(tmp_path, rows)
    assert (found.processes, found.threads) == (3, 3)
    told = [
        (row.service, row.place, row.processes, row.calls, row.errors, row.calls_ns, row.waiting_ns)
        for row in found.services
    ]
    assert told == [
        ("redis", "docker abababababab", 1, 2, 1, 14, 70),
        ("redis", "shop.service", 1, 1, 0, 5, 0),
        ("true", None, 1, 1, 0, 9, 0),
        (None, None, 0, 1, 0, 9, 0),
    ]
    shown = run(tmp_path / "a.scope").stdout
    assert "docker abababababab" in shown and "shop.service" in shown and "(name lost)" in shown
