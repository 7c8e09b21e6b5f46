"""Recordings with a quota: what was dropped is said, what is left reads as if the recording began there."""

from __future__ import annotations

import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf import open_recording
from scope_ebpf.analysis.lives import thread_lives
from scope_ebpf.analysis.services import service_lives
from scope_ebpf.analysis.summary import summarize
from scope_ebpf.errors import RecordingError
from scope_ebpf.recording.meta import RecorderUse, TableCount, read_meta
from scope_ebpf.recording.rotation import disk_bytes, earlier_recordings, remove
from scope_ebpf.recording.schema import SCHEMAS
from scope_ebpf.recording.state import Connections
from scope_ebpf.recording.writer import RecordingWriter
from tests.pure.recordings import META, at, frame, make_recording

pytestmark = pytest.mark.pure
STILL = 7
USE = RecorderUse(tgid=1, cpu_seconds=0.0, cpu_percent=0.0, peak_rss_bytes=0)
QUOTA: dict[str, Any] = {"keep_bytes": 1 << 20, "keep_ns": None}


def calls(*starts: int) -> pl.DataFrame:
    return frame("syscalls", [{"start_ns": at(start), "tgid": 7, "tid": 7} for start in starts])


def writer(path: Path) -> RecordingWriter:
    path.mkdir()
    return RecordingWriter(path, replace(META, complete=False, ended_ns=None, **QUOTA))


def test_a_chunk_goes_as_a_whole_and_is_counted(tmp_path):
    path = tmp_path / "a.scope"
    written = writer(path)
    written.write("syscalls", calls(1, 2))
    written.write("syscalls", calls(3))
    written.write("gil", frame("gil", [{"start_ns": at(2)}]))
    written.begin_chunk(at(100))
    written.write("syscalls", calls(101, 102, 103, 104))
    before = written.disk_bytes
    reader = open_recording(path)
    written.drop_chunk({"syscalls": 5}, USE)
    # its files stay for readers that found them before, and count
    assert written.disk_bytes == before
    assert reader.collect(reader.syscalls).height == 7
    recording = open_recording(path)
    recording.check()
    assert recording.collect(recording.syscalls)["start_ns"].to_list() == [
        at(n) for n in (101, 102, 103, 104)
    ]
    assert recording.since_ns == at(100)
    assert recording.meta.tables["syscalls"] == TableCount(
        rows=4, lost=5, dropped=3, first_segment=3
    )
    assert recording.meta.tables["gil"] == TableCount(rows=0, lost=0, dropped=1, first_segment=2)
    assert not written.remove_dropped(only_due=True)
    assert written.remove_dropped() and not written.remove_dropped()
    assert 0 < written.disk_bytes < before
    assert [file.name[:6] for file in (path / "syscalls").iterdir()] == ["000003"]
    with pytest.raises(
        RecordingError, match=r"dropped the oldest rows of syscalls .* open it again"
    ):
        _ = reader.syscalls
    written.write("syscalls", calls(105))
    written.write_meta({}, USE, ended_ns=at(200), complete=True)
    recording = open_recording(path)
    recording.check()
    assert recording.rows("syscalls") == 5
    found = summarize(recording)
    assert (found.dropped_rows, found.kept_since_ns, found.keep_bytes) == (4, 100, 1 << 20)
    assert found.tables["syscalls"].dropped == 3


def test_room_is_made_before_a_segment_is_written(tmp_path):
    written = writer(tmp_path / "a.scope")
    asked = []

    def make_room(more_bytes: int) -> None:
        asked.append((more_bytes, disk_bytes(tmp_path)))

    written.make_room = make_room
    for _ in range(2):
        written.write("syscalls", calls(1, 2))
    (first, before), (second, between) = asked
    assert first == second == between - before == disk_bytes(tmp_path) - between


def test_a_segment_that_was_about_to_go_does_not_count(tmp_path):
    """The recorder was killed after it had said so, and before it removed it."""
    path = tmp_path / "a.scope"
    written = writer(path)
    written.write("syscalls", calls(1))
    written.begin_chunk(at(100))
    written.write("syscalls", calls(101))
    written.drop_chunk({}, USE)
    assert len(list((path / "syscalls").iterdir())) == 2
    recording = open_recording(path)
    recording.check()
    assert recording.collect(recording.syscalls)["start_ns"].to_list() == [at(101)]


def test_a_gap_is_still_a_gap(tmp_path):
    path = tmp_path / "a.scope"
    written = writer(path)
    for number in range(4):
        written.write("syscalls", calls(number))
        written.begin_chunk(at(number))
    written.drop_chunk({}, USE)
    sorted((path / "syscalls").iterdir())[2].unlink()
    with pytest.raises(RecordingError, match=r"segment 000003 of .* is missing"):
        open_recording(path)


LIFE: dict[str, Any] = {"tgid": 7, "tid": 7, "comm": "web", "start_boottime_ns": 50}


def recorded(tmp_path: Path, *rows: dict[str, Any], **more: Any) -> Any:
    tables = {"processes": list(rows), **more}
    return open_recording(make_recording(tmp_path / "a.scope", tables, **QUOTA))


def test_what_is_told_again_counts_only_where_the_first_is_gone(tmp_path):
    recording = recorded(
        tmp_path,
        # its fork is there
        {**LIFE, "time_ns": at(1), "event": 1},
        {**LIFE, "time_ns": at(2), "event": 3, "command_line": "gunicorn web:app"},
        {**LIFE, "time_ns": at(10), "event": STILL, "command_line": "gunicorn web:app"},
        {**LIFE, "time_ns": at(20), "event": STILL, "command_line": "gunicorn web:app"},
        # its fork was dropped; it is a later process with the same number
        {**LIFE, "time_ns": at(20), "event": STILL, "tgid": 8, "tid": 8, "comm": "cron"},
        {**LIFE, "time_ns": at(30), "event": STILL, "tgid": 8, "tid": 8, "comm": "cron"},
        {**LIFE, "time_ns": at(40), "event": 4},
        {**LIFE, "time_ns": at(50), "event": 1, "start_boottime_ns": 60},
        {**LIFE, "time_ns": at(60), "event": STILL, "start_boottime_ns": 60},
        # forked while it was told again: that row comes first
        {**LIFE, "time_ns": at(21), "event": STILL, "tgid": 9, "tid": 9, "start_boottime_ns": 70},
        {**LIFE, "time_ns": at(19), "event": 1, "tgid": 9, "tid": 9, "start_boottime_ns": 70},
    )
    rows = recording.collect(recording.processes.sort("tgid", "time_ns"))
    assert rows.select("tgid", "event").rows() == [
        (7, "fork"), (7, "exec"), (7, "exit"), (7, "fork"), (8, "alive"), (9, "fork")
    ]  # fmt: skip
    assert len(service_lives(rows)) == 4
    assert thread_lives(recording).select("tgid", "ended").rows() == [
        (7, True), (7, False), (8, False), (9, False)
    ]  # fmt: skip


def test_connections_that_are_told_again_are_one(tmp_path):
    told = {"connection": 1, "kind": "tcp", "send_stream": 1, "receive_stream": 2}
    recording = recorded(
        tmp_path,
        connections=[{**told, "time_ns": at(1)}, {**told, "time_ns": at(9)}, {"connection": 2}],
        messages=[{"start_ns": at(n), "tgid": 7, "connection": 1} for n in range(3)],
        interpreters=[{"time_ns": at(n), "tgid": 7, "version": "3.11.2"} for n in (1, 9)],
    )
    assert recording.collect(recording.connections)["connection"].to_list() == [1, 2]
    assert recording.collect(recording.messages)["kind"].to_list() == ["tcp"] * 3
    assert recording.collect(recording.interpreters).height == 1


def test_connections_that_nobody_described_are_lost():
    seen = Connections()

    def named(*numbers: int) -> pl.DataFrame:
        return pl.DataFrame({"connection": numbers}, schema={"connection": pl.UInt32})

    seen.follow({"messages": named(1, 2, 2, 5000)})
    assert seen.lost() == 3
    seen.follow({"connections": named(2, 5000, 3), "messages": named(3, 2)})
    assert seen.lost() == 1
    seen.follow({"messages": named(5000, 3)})
    seen.follow({"connections": named(1)})
    assert seen.lost() == 0


def test_earlier_recordings_are_those_that_share_the_quota(tmp_path):
    shared = {**QUOTA, "shares_quota": True}
    first = make_recording(tmp_path / "host-1.scope", ended_ns=META.started_ns + 5, **shared)
    second = make_recording(tmp_path / "host-0.scope", ended_ns=META.started_ns + 9, **shared)
    own = make_recording(tmp_path / "host-2.scope", **shared)
    make_recording(tmp_path / "mine.scope")
    (tmp_path / "torn.scope").mkdir()
    os.symlink(first, tmp_path / "link.scope")
    found = earlier_recordings(tmp_path, own)
    assert [earlier.path for earlier in found] == [first, second]
    assert all(earlier.disk_bytes > 0 for earlier in found)
    remove(found[0])
    assert not first.exists() and second.exists() and (tmp_path / "mine.scope").exists()


def test_recordings_without_a_quota_say_nothing_of_one(tmp_path):
    path = make_recording(tmp_path / "a.scope")
    found = summarize(open_recording(path))
    assert (found.keep_bytes, found.kept_since_ns, found.dropped_rows) == (None, None, 0)
    assert read_meta(path).tables.keys() == {*SCHEMAS, "payloads"}


def test_folders_that_go_while_they_are_measured(tmp_path):
    """As those do that another recorder removes: the rest counts, and nothing fails."""
    (tmp_path / "kept").write_bytes(bytes(10_000))
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / f"going-{number}" / "deeper").mkdir(parents=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"going-{number}")

    other = threading.Thread(target=come_and_go)
    other.start()
    try:
        assert all(disk_bytes(tmp_path) >= 10_000 for _ in range(200))
    finally:
        ended.set()
        other.join()
