"""Recordings as they are read: readable columns, lazily, and never a wrong table."""

from __future__ import annotations

import doctest
import functools
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scope_ebpf import open_recording
from scope_ebpf.analysis import summary as analysis_summary
from scope_ebpf.cli import units
from scope_ebpf.errors import RecordingError, ScopeError, UsageError
from scope_ebpf.recording import meta, reader, schema
from scope_ebpf.recording.meta import read_meta, write_meta
from scope_ebpf.recording.reader import Recording
from scope_ebpf.recording.schema import SCHEMAS, parse_segment_name
from tests.pure.recordings import META, ROWS, frame, make_recording, write_bytes, write_segment

pytestmark = pytest.mark.pure


@pytest.fixture
def path(tmp_path) -> Path:
    return make_recording(tmp_path / "shop.scope")


def segments(path: Path, table: str) -> list[Path]:
    return sorted((path / table).iterdir())


def column(recording: Recording, table: str, name: str) -> list[object]:
    return recording.table(table).collect()[name].to_list()


@pytest.mark.parametrize("module", [analysis_summary, units, meta, reader, schema])
def test_examples_in_docstrings_hold(module):
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


# What is read


@pytest.mark.parametrize("table", SCHEMAS)
def test_stored_columns_are_read_as_they_are(path, table):
    stored = frame(table, ROWS[table])
    read = open_recording(path).table(table).collect()
    same = [name for name in stored.columns if read.schema.get(name) == stored.schema[name]]
    readable = {"event", "status", "state", "receive", "reason", "kind"}
    assert set(stored.columns) - set(same) <= readable
    assert read.select(same).equals(stored.select(same))


@pytest.mark.parametrize("table", SCHEMAS)
def test_every_column_is_documented(path, table):
    documentation = getattr(Recording, table).__doc__
    if table in {"messages", "connects", "tls", "offcpu", "gil"}:  # they refer to it
        documentation += Recording.syscalls.__doc__ or ""
    documented = set(re.findall(r"`(\w+)`", documentation))
    assert set(open_recording(path).table(table).collect_schema()) <= documented


def test_system_calls_and_errors_have_names(path):
    recording = open_recording(path)
    # 3 of i386 is read; 9999 is nothing yet
    names = ["read", "openat", "read", "syscall_9999", "mmap"]
    assert column(recording, "syscalls", "name") == names
    # -4096 is an address
    assert column(recording, "syscalls", "error") == [None, "ENOENT", None, None, None]
    assert column(recording, "syscalls", "context") == [0] * 5
    assert column(recording, "syscalls", "status") == ["complete"] * 3 + ["open", "complete"]


@pytest.mark.parametrize(
    ("machine", "number", "name"),
    [("x86_64", 0, "read"), ("amd64", 1, "write"), ("x86_64", 0x8000 | 4, "write"),
     ("x86_64", 0x8000 | 9999, "compat_syscall_9999"), ("aarch64", 63, "read"),
     ("aarch64", 0x8000 | 3, "compat_syscall_3"), ("x86_64", 0xFFFF, "compat_syscall_32767"),
     ("x86_64", 0x7FFF, "syscall_32767"), ("i686", 3, "read")],
)  # fmt: skip
def test_names_are_those_of_the_recorded_machine(tmp_path, machine, number, name):
    host = replace(META.host, machine=machine)
    path = make_recording(tmp_path / "a.scope", {"syscalls": [{"number": number}]}, host=host)
    assert column(open_recording(path), "syscalls", "name") == [name]


def test_results_have_error_names_from_1_to_4095(tmp_path):
    results = [0, -1, -11, -512, -4095, -4096, 1, 2**63 - 1, -(2**63)]
    path = make_recording(tmp_path / "a.scope", {"syscalls": [{"result": r} for r in results]})
    errors = [None, "EPERM", "EAGAIN", "ERESTARTSYS", "errno_4095"] + [None] * 4
    assert column(open_recording(path), "syscalls", "error") == errors


def test_refused_connects_have_error_names(path):
    recording = open_recording(path)
    assert column(recording, "connects", "error") == ["ECONNREFUSED", None]
    assert column(recording, "connects", "context") == [0, 0]
    assert column(recording, "connects", "status") == ["complete"] * 2


def test_unknown_status_and_event_are_null(tmp_path):
    rows: dict[str, list[dict[str, int]]] = {
        "syscalls": [{"status": 250}],
        "processes": [{"event": 99, "signal": 200}],
    }
    recording = open_recording(make_recording(tmp_path / "a.scope", rows))
    assert column(recording, "syscalls", "status") == [None]
    assert column(recording, "processes", "event") == [None]
    assert column(recording, "processes", "signal_name") == [None]


def test_messages_take_over_their_connection(path):
    messages = open_recording(path).messages.collect()
    assert "receive" not in messages.columns
    assert messages["direction"].to_list() == ["send", "receive", "send"]
    assert messages["stream"].to_list() == [11, 22, None]
    assert messages["kind"].to_list() == ["tcp", "tcp", None]
    assert messages["local_port"].to_list() == [80, 80, None]
    assert messages["connection"].to_list() == [1, 1, 99]
    assert messages["name"].to_list() == ["write", "read", "read"]


def test_a_connection_that_is_there_twice_does_not_double_messages(tmp_path):
    ends = [{"connection": 7, "kind": "unix", "peer_inode": peer} for peer in (None, 5)]
    rows: dict[str, list[dict[str, Any]]] = {
        "messages": [{"connection": 7}] * 3,
        "connections": ends,
    }
    recording = open_recording(make_recording(tmp_path / "a.scope", rows))
    assert recording.messages.collect().height == 3


@pytest.mark.parametrize(
    ("bits", "letter"),
    [(0, "R"), (1, "S"), (2, "D"), (0x102, "D"), (0x402, "I"), (4, "T"), (0x104, "T"), (8, "t"),
     (0x10, "X"), (0x20, "Z"), (0x40, "P"), (0x80, "X"), (0x2001, "S"), (0x1000, "D"),
     (0x8000, "D"), (0x100, "R")],
)  # fmt: skip
def test_states_are_letters(tmp_path, bits, letter):
    path = make_recording(tmp_path / "a.scope", {"offcpu": [{"state": bits}]})
    read = open_recording(path).offcpu.collect()
    assert read["state"].to_list() == [letter]
    assert read["state_bits"].to_list() == [bits]


def test_offcpu_tells_waiting_from_runnable(path):
    read = open_recording(path).offcpu.collect()
    assert read["waiting_ns"].to_list() == [70, 0, 10]
    assert read["name"].to_list() == [None, None, "read"]
    assert read["waker_name"].to_list() == [None] * 3


def test_processes_have_events_and_signals(path):
    read = open_recording(path).processes.collect()
    assert read["event"].to_list() == ["alive", "thread", "fork", "exec", "exit"]
    assert read["signal_name"].to_list() == [None] * 4 + ["SIGKILL"]


@pytest.mark.parametrize("table", SCHEMAS)
@pytest.mark.parametrize("folders", ["empty", "missing"])
def test_empty_tables_have_their_columns(path, tmp_path, table, folders):
    empty = make_recording(tmp_path / "empty.scope", {})
    for name in SCHEMAS if folders == "empty" else ():
        (empty / name).mkdir()
    read = open_recording(empty).table(table)
    assert read.collect_schema() == open_recording(path).table(table).collect_schema()
    assert read.collect().height == 0


def test_empty_connections_keep_messages(tmp_path):
    path = make_recording(tmp_path / "a.scope", {"messages": ROWS["messages"]})
    read = open_recording(path).messages.collect()
    assert read["connection"].to_list() == [1, 1, 99]
    assert read["kind"].to_list() == [None] * 3


# How lazily


@pytest.mark.parametrize("table", ["syscalls", "messages", "offcpu"])
def test_filters_and_columns_reach_the_files(path, table):
    read = open_recording(path).table(table)
    plan = read.filter(pl.col("tgid") == 7, pl.col("start_ns") > 5).select("start_ns", "tid")
    scan = re.search(rf"Parquet SCAN [^\n]*/{table}/.*?SELECTION: [^\n]*", plan.explain(), re.S)
    assert scan
    assert re.search(r'col\("tgid"\)\) ?== ?\(?7|col\("tgid"\) == 7', scan[0])
    assert 'col("start_ns")' in scan[0].split("SELECTION")[1]
    # those two, those of the filter and, for the join, connection
    assert f"PROJECT {4 if table == 'messages' else 3}/" in scan[0]


@pytest.mark.parametrize("table", ["processes", "syscalls", "offcpu", "connections"])
def test_two_columns_read_two_columns(path, table):
    read = open_recording(path).table(table)
    names = read.collect_schema().names()
    assert "PROJECT 2/" in read.select(names[0], "tgid").explain()


# Names and places


def test_unknown_tables_have_near_names(path):
    with pytest.raises(UsageError, match="no table 'syscall'; did you mean syscalls"):
        open_recording(path).table("syscall")
    with pytest.raises(UsageError, match="there are processes, syscalls"):
        open_recording(path).table("xyz")


def test_near_paths_are_told(path):
    parent, name = path.parent, str(path)
    with pytest.raises(RecordingError, match=f"there is no recording .*; did you mean {name}"):
        open_recording(parent / "shop")
    with pytest.raises(RecordingError, match=f"no recording .*; did you mean {name}"):
        open_recording(parent / "shoop.scope")
    with pytest.raises(RecordingError, match=f"is not a recording: .*; did you mean {name}"):
        open_recording(parent)
    with pytest.raises(RecordingError, match=f"it has no meta.json; did you mean {name}"):
        open_recording(path / "syscalls")
    with pytest.raises(RecordingError, match=f"it is a file.*; did you mean {name}"):
        open_recording(path / "meta.json")
    with pytest.raises(RecordingError, match=r"there is no recording [^;]*$"):
        open_recording(parent / "other" / "thing")
    plain = path.rename(parent / "shop")
    with pytest.raises(RecordingError, match=f"did you mean {plain}"):
        open_recording(parent / "shop.scope")


@pytest.mark.parametrize("name", ["a b=c [1] *.scope", "x%20?&.scope", "tgid=5", "naïve ✓.scope"])
def test_odd_paths_are_read(tmp_path, name):
    recording = open_recording(make_recording(tmp_path / name))
    recording.check()
    assert recording.syscalls.collect().height == 5
    assert recording.messages.collect().height == 3


def test_undecodable_paths_have_a_sentence(tmp_path):
    path = make_recording(tmp_path / os.fsdecode(b"caf\xe9.scope"))
    with pytest.raises(RecordingError, match="is not UTF-8"):
        open_recording(path)


def test_a_recording_survives_chdir(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    recording = open_recording("shop.scope")
    monkeypatch.chdir("/")
    assert recording.syscalls.collect().height == 5


# Unfinished recordings


def test_killed_recordings_open_and_ignore_parts(path):
    write_meta(path, replace(read_meta(path), complete=False, ended_ns=None))
    (path / "syscalls" / ".000004-00000000.parquet.part").write_bytes(b"PAR1 half")
    (path / ".meta.json.part").write_bytes(b"{")
    write_segment(path / "syscalls", 4, frame("syscalls", ROWS["syscalls"][:1]))
    recording = open_recording(path)
    recording.check()
    assert recording.rows("syscalls") == 6  # although meta.json says 5
    assert not recording.running
    segments(path, "offcpu")[-1].unlink()
    assert open_recording(path).offcpu.collect().height == 2


def test_running_recordings_are_told_from_killed_ones(path):
    me = psutil.Process()
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    running = replace(
        read_meta(path),
        complete=False,
        ended_ns=None,
        host=replace(META.host, boot_id=boot_id),
        recorder=replace(META.recorder, tgid=me.pid),
        started_ns=int((me.create_time() + 1) * 1e9),
        clock=replace(META.clock, realtime_offset_ns=0),
    )
    write_meta(path, running)
    assert open_recording(path).running
    # another process with this number, one that began after the recording
    write_meta(path, replace(running, started_ns=int((me.create_time() - 60) * 1e9)))
    assert not open_recording(path).running
    write_meta(path, replace(running, host=META.host))
    assert not open_recording(path).running


# Damage


def assert_refused(path: Path, table: str, match: str) -> None:
    """Whoever opens, checks or reads the recording gets this error."""
    with pytest.raises(ScopeError, match=match):
        open_recording(path).check()
    with pytest.raises(ScopeError, match=match):
        open_recording(path).table(table)


def test_a_flipped_bit_is_noticed(path):
    file = segments(path, "syscalls")[1]
    data = bytearray(file.read_bytes())
    data[40] ^= 4
    file.write_bytes(data)
    assert_refused(path, "syscalls", f"{file} is damaged: .*; copy the recording again$")
    assert open_recording(path).offcpu.collect().height == 3  # other tables are still good


def test_damage_after_a_crash_can_be_cut_off(path):
    write_meta(path, replace(read_meta(path), complete=False, ended_ns=None))
    file = segments(path, "syscalls")[-1]
    file.write_bytes(b"")
    assert_refused(path, "syscalls", "copy the recording again, or delete this segment")
    file.unlink()
    recording = open_recording(path)
    recording.check()
    assert recording.syscalls.collect().height == 4


def test_missing_segments_are_noticed(path):
    first, _, last = segments(path, "syscalls")
    saved = last.read_bytes()
    last.unlink()
    assert_refused(path, "syscalls", "has 4 rows, and meta.json counts 5: segments are missing")
    last.write_bytes(saved)
    first.unlink()
    assert_refused(path, "syscalls", "segment 000001 of .*/syscalls is missing")


def test_strange_segments_are_noticed(path):
    write_segment(path / "syscalls", 2, frame("syscalls", []))
    assert_refused(path, "syscalls", "segment 000002 of .*/syscalls is there twice")
    shutil.rmtree(path / "syscalls")
    (path / "syscalls").mkdir()
    (path / "syscalls" / "000001.parquet").write_bytes(b"")
    assert_refused(path, "syscalls", r"000001\.parquet is not named like a segment")


@pytest.mark.parametrize(
    "rows",
    [
        frame("syscalls", ROWS["syscalls"]).drop("cpu"),
        frame("syscalls", ROWS["syscalls"]).with_columns(cpu=pl.lit("0")),
        frame("syscalls", ROWS["syscalls"]).with_columns(more=pl.lit(0)),
    ],
)
def test_wrong_columns_are_noticed(path, rows):
    shutil.rmtree(path / "syscalls")
    write_segment(path / "syscalls", 1, rows)
    assert_refused(path, "syscalls", r"columns of its table \(see (cpu|more)\)")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 5, b"\xff" * 300])
def test_garbage_with_a_fitting_checksum_is_noticed(path, data):
    shutil.rmtree(path / "syscalls")
    write_bytes(path / "syscalls", 1, data)
    assert_refused(path, "syscalls", "cannot read .*000001-.*parquet: ")


def test_pipes_and_directories_do_not_hang(path):
    file = segments(path, "offcpu")[0]
    file.unlink()
    os.mkfifo(file)
    assert_refused(path, "offcpu", "not a regular file")
    file.unlink()
    file.mkdir()
    assert_refused(path, "offcpu", "not a regular file")


def test_table_folder_that_is_a_file(path):
    shutil.rmtree(path / "offcpu")
    (path / "offcpu").write_text("")
    with pytest.raises(RecordingError, match=r"cannot read .*/offcpu: Not a directory"):
        open_recording(path)


def test_segments_that_vanish_while_reading_have_a_sentence(path):
    recording = open_recording(path)
    read = recording.syscalls
    shutil.rmtree(path / "syscalls")
    with pytest.raises(RecordingError, match="cannot read "):
        recording.collect(read)


def test_unverified_recordings_still_check_the_columns(path):
    file = segments(path, "syscalls")[0]
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(RecordingError, match="cannot read"):
        _ = open_recording(path, verify=False).syscalls


def test_segment_names_have_one_spelling():
    assert parse_segment_name("1000000-0000000a.parquet") == (1_000_000, 1_000_000, 10)
    assert parse_segment_name("000001-1000000-0000000a.parquet") == (1, 1_000_000, 10)
    for numbers in ("0000001", "000000", "000001-000001", "000032-000001", "000001-0000032"):
        assert parse_segment_name(f"{numbers}-0000000a.parquet") is None
    assert parse_segment_name("000001-A.parquet") is None


DAMAGES = ["flip", "cut", "append", "empty", "remove", "duplicate", "exchange", "junk", "folder"]


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), complete=st.booleans())
def test_damaged_recordings_give_correct_tables_or_errors(tmp_path_factory, data, complete):
    path = make_recording(
        tmp_path_factory.mktemp("fuzz") / "a.scope",
        complete=complete,
        ended_ns=META.ended_ns if complete else None,
    )
    try:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for damage in data.draw(st.lists(st.sampled_from(DAMAGES), min_size=1, max_size=3)):
            file = data.draw(st.sampled_from(files))
            other = data.draw(st.sampled_from(files))
            if file.exists() and other.exists():
                _damage(file, other, damage, data)
        _assert_correct_or_refused(path, complete=complete)
    finally:
        shutil.rmtree(path.parent)


def _damage(file: Path, other: Path, damage: str, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    if damage == "flip" and content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif damage == "append":
        file.write_bytes(content + data.draw(st.binary(min_size=1, max_size=20)))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "remove":
        file.unlink()
    elif damage == "duplicate" and file.parent != other.parent:
        shutil.copy(file, other.parent / file.name)
    elif damage == "exchange":
        saved = other.read_bytes()
        other.write_bytes(content)
        file.write_bytes(saved)
    elif damage == "junk":
        name = data.draw(st.sampled_from([".x.part", "x", "9.parquet", "000009-00000000.parquet"]))
        (file.parent / name).write_bytes(data.draw(st.binary(max_size=20)))
    elif damage == "folder" and file.parent.name in SCHEMAS:
        shutil.rmtree(file.parent)


def _assert_correct_or_refused(path: Path, *, complete: bool) -> None:
    try:
        recording = open_recording(path)
    except ScopeError:
        return
    for table, correct in _undamaged().items():
        try:
            read = recording.collect(recording.table(table))
        except ScopeError:
            continue
        # Without a proper end, their connections may be missing, too.
        columns = SAFE if table == "messages" and not complete else correct.columns
        # Of one whose recorder was killed, the end may be missing.
        assert read.select(columns).equals(correct.select(columns).head(read.height))
        assert read.height == correct.height or not complete


SAFE = ["start_ns", "tgid", "direction", "connection", "payload"]


@functools.cache
def _undamaged() -> dict[str, pl.DataFrame]:
    with tempfile.TemporaryDirectory() as folder:
        recording = open_recording(make_recording(Path(folder) / "a.scope"))
        return {table: recording.table(table).collect() for table in SCHEMAS}
