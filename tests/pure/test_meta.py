"""meta.json: what is written is read, and whatever else is there is refused with a sentence."""

from __future__ import annotations

import json
import os
import stat
import zlib
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scope_ebpf.errors import FormatError, RecordingError, ScopeError
from scope_ebpf.recording.meta import Meta, Target, read_meta, write_meta
from tests.pure.recordings import META

pytestmark = pytest.mark.pure
fuzz = settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def content(path: Path) -> Any:
    return json.loads((path / "meta.json").read_text())


def replace_content(path: Path, changed: Any) -> None:
    """Write content of any kind, with a checksum that fits."""
    if isinstance(changed, dict):
        changed = {name: value for name, value in changed.items() if name != "checksum"}
        canonical = json.dumps(changed, sort_keys=True, separators=(",", ":"))
        changed["checksum"] = f"{zlib.crc32(canonical.encode()):08x}"
    (path / "meta.json").write_text(json.dumps(changed))


def test_what_is_written_is_read(tmp_path):
    write_meta(tmp_path, META, durable=True)
    assert read_meta(tmp_path) == META
    running = replace(META, complete=False, ended_ns=None, notes=["the disk was full"])
    write_meta(tmp_path, running)
    assert read_meta(tmp_path) == running


def test_file_is_private_and_nothing_else_remains(tmp_path):
    write_meta(tmp_path, META)
    assert [entry.name for entry in tmp_path.iterdir()] == ["meta.json"]
    assert stat.S_IMODE((tmp_path / "meta.json").stat().st_mode) == 0o600


def test_writing_does_not_follow_a_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".meta.json.part").symlink_to(victim)
    write_meta(tmp_path, META)
    assert victim.read_text() == "precious"
    assert read_meta(tmp_path) == META


def test_writing_into_nowhere_is_a_recording_error(tmp_path):
    with pytest.raises(RecordingError, match=r"cannot write .*meta\.json: No such file"):
        write_meta(tmp_path / "gone", META)


def test_undecodable_command_lines_become_printable(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    target = Target(tgid=1, comm="ps", cmdline=[odd, "naïve ✓"])
    write_meta(tmp_path, replace(META, targets=[target]))
    cmdline = read_meta(tmp_path).targets[0].cmdline
    assert cmdline == ["caf\\udce9", "naïve ✓"]
    "".join(cmdline).encode()


def test_unknown_keys_are_ignored(tmp_path):
    write_meta(tmp_path, META)
    replace_content(tmp_path, {**content(tmp_path), "weather": {"rain": True}})
    assert read_meta(tmp_path) == META


@pytest.mark.parametrize(("version", "hint"), [(4, "newer"), (2, "older"), (-5, "older")])
def test_other_versions_are_refused(tmp_path, version, hint):
    write_meta(tmp_path, META)
    replace_content(tmp_path, {**content(tmp_path), "format_version": version})
    with pytest.raises(FormatError, match=f"has format {version}, .* read it with an? {hint}"):
        read_meta(tmp_path)


def test_missing_file_is_no_recording(tmp_path):
    with pytest.raises(RecordingError, match=r"has no meta\.json: it is not a recording"):
        read_meta(tmp_path)


def test_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(FormatError, match="not a regular file"):
        read_meta(tmp_path)


def test_directory_is_refused(tmp_path):
    (tmp_path / "meta.json").mkdir()
    with pytest.raises(ScopeError, match=r"meta\.json"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format_version": NaN}', b"[" * 100_000,
     b'{"format_version": 1' + b"0" * 5000 + b"}", b'{"format_version": true}',
     b'{"format_version": 3}', b'{"format_version": 3, "x": ' + b"[" * 900 + b"]" * 900 + b"}"],
)  # fmt: skip
def test_no_meta_at_all(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text)
    with pytest.raises(FormatError, match=r"meta\.json is damaged: .*; copy the recording again"):
        read_meta(tmp_path)


def test_changed_value_does_not_fit_the_checksum(tmp_path):
    write_meta(tmp_path, META)
    file = tmp_path / "meta.json"
    file.write_text(file.read_text().replace("1700000000000000000", "1700000000000000001"))
    with pytest.raises(FormatError, match="checksum"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    "name",
    # those with a default are younger than the format
    [field.name for field in fields(Meta) if field.default is field.default_factory is MISSING],
)
def test_missing_fields_are_named(tmp_path, name):
    write_meta(tmp_path, META)
    changed = content(tmp_path)
    del changed[name]
    replace_content(tmp_path, changed)
    with pytest.raises(FormatError, match=f"{name} is missing"):
        read_meta(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("complete", 1), ("complete", None), ("started_ns", -1), ("started_ns", 1.5),
     ("started_ns", True), ("ended_ns", 2**63), ("command", "ls"), ("command", [1]),
     ("scope", "planet"), ("cgroup", 3), ("targets", {}), ("targets", [{"tgid": 1}]),
     ("tables", {"syscalls": 3}), ("tables", {"syscalls": {"rows": -1, "lost": 0}}),
     ("host", None), ("clock", {"realtime_offset_ns": "0"}), ("notes", None),
     ("recorder", {"tgid": 1, "cpu_seconds": True, "cpu_percent": 1, "peak_rss_bytes": 1}),
     ("recorder", {"tgid": 1, "cpu_seconds": 10**400, "cpu_percent": 1, "peak_rss_bytes": 1})],
)  # fmt: skip
def test_impossible_values_are_named(tmp_path, field, value):
    write_meta(tmp_path, META)
    replace_content(tmp_path, {**content(tmp_path), field: value})
    with pytest.raises(FormatError, match=field):
        read_meta(tmp_path)


def test_end_before_start_is_impossible(tmp_path):
    write_meta(tmp_path, replace(META, ended_ns=META.started_ns - 1))
    with pytest.raises(FormatError, match="ended_ns lies before started_ns"):
        read_meta(tmp_path)


@fuzz
@given(st.data())
def test_damaged_bytes_give_the_same_meta_or_an_error(tmp_path, data):
    write_meta(tmp_path, META)
    file = tmp_path / "meta.json"
    damaged = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(damaged) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
        if how == "flip":
            damaged[position] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del damaged[position + 1 :]
        elif how == "insert":
            damaged[position:position] = data.draw(st.binary(min_size=1, max_size=8))
        elif len(damaged) > 1:
            del damaged[position]
    file.write_bytes(damaged)
    try:
        found = read_meta(tmp_path)
    except ScopeError:
        return
    assert found == META


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@fuzz
@given(st.data())
def test_any_values_give_a_usable_meta_or_an_error(tmp_path, data):
    write_meta(tmp_path, META)
    changed = content(tmp_path)
    field = data.draw(st.sampled_from(sorted(changed)))
    target = changed
    if changed[field] and isinstance(changed[field], dict) and data.draw(st.booleans()):
        target, field = changed[field], data.draw(st.sampled_from(sorted(changed[field])))
    target[field] = data.draw(json_values)
    replace_content(tmp_path, changed)
    try:
        found = read_meta(tmp_path)
    except ScopeError:
        return
    write_meta(tmp_path, found)
    assert read_meta(tmp_path) == found
