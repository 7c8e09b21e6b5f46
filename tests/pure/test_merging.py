"""Small segments that become one: the rows stay the same whenever the recorder ends."""

import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from scope_ebpf import open_recording
from scope_ebpf.errors import FormatError, RecordingError
from scope_ebpf.recording import merging, writer
from scope_ebpf.recording.reader import Recording
from scope_ebpf.recording.segments import list_segments
from scope_ebpf.recording.writer import RecordingWriter
from tests.pure.recordings import META, frame

pytestmark = pytest.mark.pure

FAN = merging.FAN
# groups of each level, and some segments that are in none
SEGMENTS = FAN * FAN + 3 * FAN + 5


def opened(path: Path) -> RecordingWriter:
    path.mkdir()
    return RecordingWriter(path, replace(META, complete=False, ended_ns=None, tables={}))


def write(made: RecordingWriter, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        rows = [{"start_ns": 10 * number + at, "arg0": number} for at in range(number % 3 + 1)]
        made.write("syscalls", frame("syscalls", rows))


def expected(count: int, first: int = 0) -> list[int]:
    return [number for number in range(first, first + count) for _ in range(number % 3 + 1)]


def stored(recording: Recording) -> list[int]:
    return recording.syscalls.collect()["arg0"].to_list()


def end(made: RecordingWriter) -> None:
    made.remove_parts(every=True)
    made.release_reserve()
    made.write_meta({}, META.recorder, ended_ns=2 * META.started_ns, complete=True)


def names(path: Path) -> list[str]:
    return sorted(file.name[:13] for file in (path / "syscalls").glob("*.parquet"))


def test_merged_rows_are_the_same(tmp_path):
    path = tmp_path / "a.scope"
    made = opened(path)
    write(made, SEGMENTS)
    assert stored(open_recording(path)) == expected(SEGMENTS)  # each is there more than once
    end(made)
    recording = open_recording(path)
    recording.check()
    assert stored(recording) == expected(SEGMENTS)
    assert len(list_segments(path / "syscalls")) == 1 + 3 + 5
    assert names(path)[:2] == ["000001-001024", "001025-001056"]
    sizes = [file.stat().st_size for file in (path / "syscalls").glob("*.parquet")]
    assert made.bytes_on_disk == sum(sizes)
    assert made.disk_bytes == sum(-(-size // 4096) * 4096 for size in sizes)


@pytest.mark.parametrize("gone", [0, 1, FAN // 2, FAN])
def test_an_end_while_parts_are_removed(tmp_path, gone):
    path = tmp_path / "a.scope"
    write(opened(path), FAN + 2)
    parts = [file for file in (path / "syscalls").glob("*.parquet") if file.name[7:13] != "000032"]
    assert len(parts) == FAN + 2
    for file in sorted(parts)[:gone]:
        file.unlink()
    (path / "syscalls" / ".000033-000064-00000000.parquet.part").write_bytes(b"half")
    recording = open_recording(path)
    recording.check()
    assert stored(recording) == expected(FAN + 2)


def test_who_has_found_the_parts_reads_on(tmp_path):
    path = tmp_path / "a.scope"
    made = opened(path)
    write(made, FAN + 2)
    merged = next((path / "syscalls").glob("000001-000032-*"))
    aside = merged.rename(tmp_path / merged.name)
    early, checked = open_recording(path), open_recording(path)
    assert stored(checked) == expected(FAN + 2)
    aside.rename(merged)
    made.remove_parts(every=True)
    write(made, 5, FAN + 2)
    for recording in (early, checked):
        assert stored(recording) == expected(FAN + 2)
        assert recording.rows("syscalls") == len(expected(FAN + 2))
        recording.check("syscalls")


def test_parts_stay_for_a_while(tmp_path, monkeypatch):
    made = opened(tmp_path / "a.scope")
    write(made, FAN)
    made.remove_parts()
    assert len(names(made.path)) == FAN + 1
    monkeypatch.setattr(writer, "KEPT_SECONDS", 0.0)
    write(made, FAN, FAN)
    made.remove_parts()  # in their order
    assert len(names(made.path)) == 2 * FAN + 2
    made.remove_parts(every=True)
    assert len(names(made.path)) == 2


def test_large_segments_stay_as_they_are(tmp_path, monkeypatch):
    path = tmp_path / "a.scope"
    made = opened(path)
    write(made, FAN - 1)
    monkeypatch.setattr(merging, "MOST_BYTES", 100)
    write(made, 1, FAN - 1)
    monkeypatch.undo()
    write(made, FAN, FAN)
    end(made)
    assert stored(open_recording(path)) == expected(2 * FAN)
    assert len(names(path)) == FAN + 1


def test_damage_is_not_merged(tmp_path):
    path = tmp_path / "a.scope"
    made = opened(path)
    write(made, FAN - 1)
    damaged = next((path / "syscalls").glob("000007-*"))
    data = bytearray(damaged.read_bytes())
    data[len(data) // 3] ^= 1
    damaged.write_bytes(data)
    write(made, FAN + 1, FAN - 1)
    end(made)
    assert len(names(path)) == FAN + 1
    with pytest.raises(FormatError, match=f"{damaged.name} is damaged"):
        open_recording(path).check()


def test_a_segment_that_is_gone_is_not_merged(tmp_path):
    path = tmp_path / "a.scope"
    made = opened(path)
    write(made, FAN - 1)
    next((path / "syscalls").glob("000007-*")).unlink()
    write(made, 1, FAN - 1)
    end(made)
    with pytest.raises(RecordingError, match=r"segment 000007 of .*/syscalls is missing"):
        open_recording(path)


def test_merged_segments_are_checked(tmp_path):
    path = tmp_path / "a.scope"
    made = opened(path)
    write(made, 2 * FAN)
    end(made)
    first, second = sorted((path / "syscalls").glob("*.parquet"))
    saved = first.read_bytes()
    first.write_bytes(saved[:9] + bytes([saved[9] ^ 1]) + saved[10:])
    with pytest.raises(FormatError, match=f"{first.name} is damaged"):
        open_recording(path).check()
    first.unlink()
    with pytest.raises(RecordingError, match=r"segment 000001 of .*/syscalls is missing"):
        open_recording(path)
    first.write_bytes(saved)
    shutil.copy(second, second.with_name(f"000050-000070{second.name[13:]}"))
    with pytest.raises(RecordingError, match=r"segment 000050 of .*/syscalls is there twice"):
        open_recording(path)


def test_chunks_of_a_quota_are_merged_apart(tmp_path):
    path = tmp_path / "a.scope"
    path.mkdir()
    meta = replace(META, keep_bytes=1 << 24, complete=False, ended_ns=None, tables={})
    made = RecordingWriter(path, meta)
    write(made, FAN + 3)
    made.begin_chunk(META.started_ns + 1000)
    write(made, 2 * FAN, FAN + 3)
    made.drop_chunk({}, META.recorder)
    made.remove_dropped()  # parts and what stands for them
    recording = open_recording(path)
    assert stored(recording) == expected(2 * FAN, FAN + 3)
    end(made)
    recording = open_recording(path)
    recording.check()
    assert stored(recording) == expected(2 * FAN, FAN + 3)
    assert names(path) == ["000036-000067", "000068-000099"]
    dropped = recording.meta.tables["syscalls"]
    assert (dropped.first_segment, dropped.dropped) == (FAN + 4, len(expected(FAN + 3)))
    assert made.bytes_on_disk == sum(file.stat().st_size for file in path.rglob("*.parquet"))


def test_columns_stay_the_same(tmp_path):
    path = tmp_path / "a.scope"
    made = opened(path)
    rows = frame("messages", [{"start_ns": 1, "payload": b"a"}, {"start_ns": 2}])
    for _ in range(FAN):
        made.write("messages", rows)
    end(made)
    found = pl.read_parquet(next((path / "messages").glob("*.parquet")))
    assert found.equals(pl.concat([rows] * FAN))
