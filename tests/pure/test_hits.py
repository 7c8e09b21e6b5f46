"""Hits as rows: arguments as text, what is masked of them, and what must not be."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from scope_ebpf.cli.events import events
from scope_ebpf.loaders.hits import HitKind, text_places
from scope_ebpf.probe_specs import TYPES
from scope_ebpf.recording.hits import CUT, hits_frame
from scope_ebpf.recording.meta import read_meta, write_meta
from scope_ebpf.recording.redaction import Redactor
from scope_ebpf.recording.schema import SCHEMAS
from scope_ebpf.records import HIT
from tests.pure.recordings import META, make_recording

pytestmark = pytest.mark.pure


def kind(label: str, *types: str) -> HitKind:
    return HitKind(label, tuple(TYPES[name] for name in types))


def record(number: int, kinds: list[HitKind], *values: Any, **fields: Any) -> Any:
    """A hit as the probes write it: bytes for texts, None for what could not be read."""
    row = np.zeros((), HIT)
    row["probe"], row["tgid"], row["tid"] = number, 7, 8
    text = bytearray(HIT["text"].itemsize)
    types = kinds[number].types
    for place, (value, where) in enumerate(zip(values, text_places(types), strict=True)):
        if value is None:
            row["unread"] |= 1 << place
            row["values"][place] = 0xFFFF  # which means nothing
        elif where is not None:
            which, begin, size = where
            kept = value[: size - 1]
            text[begin : begin + len(kept)] = kept
            row["text_lengths"][which] = len(kept)
            row["values"][place] = len(kept) < len(value)
        else:
            row["values"][place] = value & (1 << 64) - 1
    row["text"] = bytes(text)
    for name, value in fields.items():
        row[name] = value
    return row


def frame_of(kinds: list[HitKind], *rows: Any) -> pl.DataFrame:
    frame = hits_frame(np.stack(rows), np.arange(len(rows), dtype=np.uint16), kinds)
    assert frame.schema == SCHEMAS["hits"]
    return frame


def test_arguments_as_their_types_ask():
    kinds = [kind("a", "int", "u64", "ptr", "bool", "f64", "f32"), kind("b", "str"), kind("c")]
    bits64 = struct.unpack("<Q", struct.pack("<d", 2.5))[0]
    bits32 = struct.unpack("<I", struct.pack("<f", -0.5))[0]
    frame = frame_of(
        kinds,
        record(0, kinds, -5, (1 << 64) - 1, 0xDEAD0, 1, bits64, bits32, time_ns=30),
        record(1, kinds, "é".encode(), time_ns=10, duration_ns=4, began=1),
        record(2, kinds, time_ns=20),
        record(0, kinds, None, None, None, None, None, None, time_ns=40),
        record(0, kinds, 0, 0, 0, 0, 0, 0, time_ns=50),
        record(1, kinds, None, time_ns=60, began=1),
    )
    assert frame["time_ns"].to_list() == [10, 20, 30, 40, 50, 60]
    assert frame["probe"].to_list() == ["b", "c", "a", "a", "a", "b"]
    assert frame["arguments"].to_list() == [
        ["é"], [], ["-5", str((1 << 64) - 1), "0xdead0", "true", "2.5", "-0.5"], [None] * 6,
        ["0", "0", "0x0", "false", "0.0", "0.0"], [None],
    ]  # fmt: skip
    assert frame["duration_ns"].to_list() == [4, None, None, None, None, 0]
    assert frame["cpu"].to_list() == [1, 2, 0, 3, 4, 5]


def test_texts_that_are_cut_or_no_text():
    kinds = [kind("a", "str", "int", "str")]
    frame = frame_of(
        kinds, record(0, kinds, b"x" * 400, 3, b"caf\xc3"), record(0, kinds, b"", 4, b"y" * 104)
    )
    assert frame["arguments"].to_list() == [
        ["x" * 215 + CUT, "3", "caf\\xc3"], ["", "4", "y" * 103 + CUT],
    ]  # fmt: skip


KINDS = [kind("q", "sql", "int", "str", "name"), kind("none"), kind("n", "int")]


def redacted(*rows: Any, kinds: list[HitKind] = KINDS, unredacted: bool = False) -> list[Any]:
    frame = frame_of(kinds, *rows)
    result = Redactor(unredacted, hit_kinds=kinds).redact_hits(frame)
    assert result.schema == frame.schema
    assert result.drop("arguments").equals(frame.drop("arguments"))
    return result["arguments"].to_list()


def test_what_is_masked():
    sql = b"SELECT a FROM t WHERE b = 'hunter2' AND c = 4711"
    rows = [
        record(0, KINDS, sql, 4711, b"hunter2 secret", b"json.decoder", time_ns=1),
        record(1, KINDS, time_ns=2),
        record(2, KINDS, 5, time_ns=3),
        record(0, KINDS, None, None, None, None, time_ns=4),
        record(0, KINDS, sql, 1, b"hunter2", b"", time_ns=5),
    ]
    first, second, third, fourth, fifth = redacted(*rows)
    assert first[0].startswith("SELECT a FROM t WHERE b = '?")
    assert len(first[0]) == len(sql)
    assert "hunter2" not in first[0] and "4711" not in first[0]
    assert first[1] == "4711"  # a number that is an argument of its own
    assert "hunter2" not in first[2] and "secret" not in first[2]
    assert first[3] == "json.decoder"
    assert (second, third, fourth) == ([], ["5"], [None] * 4)
    # equal words have equal tokens
    assert fifth[0] == first[0]
    assert first[2].split()[0] == fifth[2]
    assert redacted(*rows, unredacted=True)[0][0] == sql.decode()


@pytest.mark.parametrize("cut_at", range(20, 60, 3))
def test_literals_that_are_cut_are_masked(cut_at):
    """Wherever the captured part of a statement ends."""
    secret = "hunter2secret"
    statement = ("x" * (215 - cut_at) + f" WHERE a = '{secret}' AND b = 4711474711").ljust(400, "y")
    kinds = [kind("q", "sql", "str")]
    ((text, _),) = redacted(record(0, kinds, statement.encode(), b""), kinds=kinds)
    assert text.endswith(CUT)
    assert "hun" not in text and "4711" not in text


def test_bytes_that_are_no_text_are_masked():
    kinds = [kind("q", "str"), kind("r", "sql")]
    rows = redacted(
        record(0, kinds, b"caf\xc3\xa9 \xff\xfe", time_ns=1),
        record(1, kinds, "SELECT 'é' FROM tä".encode(), time_ns=2),
        kinds=kinds,
    )
    assert "caf" not in rows[0][0] and "é" not in rows[0][0] and "xff" not in rows[0][0]
    assert rows[1][0].startswith("SELECT '?")
    assert rows[1][0].endswith("FROM tä")


def test_the_stricter_of_two_types_counts():
    """Two probes of one name, as of two files."""
    kinds = [kind("q", "name"), kind("q", "str")]
    rows = redacted(record(0, kinds, b"hunter2"), record(1, kinds, b"hunter2"), kinds=kinds)
    assert all("hunter2" not in row[0] for row in rows)


def test_probes_in_meta(tmp_path):
    write_meta(tmp_path, replace(META, probes=["usdt:/a:p:n: at 0x12"]))
    assert read_meta(tmp_path).probes == ["usdt:/a:p:n: at 0x12"]


def test_the_command_that_shows_rows(tmp_path):
    arguments = ["SELECT 1", None, "é"]
    rows = {"hits": [{"time_ns": 1, "probe": "p:n", "arguments": arguments, "tgid": 7}]}
    path = make_recording(tmp_path / "a.scope", rows)
    shown = CliRunner().invoke(events, [str(path), "hits"])
    assert shown.exit_code == 0, shown.output
    assert "p:n    SELECT 1, -, é" in shown.output
    printed = CliRunner().invoke(events, [str(path), "hits", "--json"])
    assert json.loads(printed.output)["arguments"] == arguments
    listed = CliRunner().invoke(events, [str(path), "hits", "--csv"])
    assert listed.output.splitlines()[1].endswith('p:n,"SELECT 1, -, é",0')
    # within EXPR an argument is one of a list
    for where, count in (("arguments[1] = 'SELECT 1'", 1), ("arguments[1] = 'SELECT 2'", 0)):
        chosen = CliRunner().invoke(events, [str(path), "hits", "--json", "--where", where])
        assert chosen.output.count("time_ns") == count, chosen.output
