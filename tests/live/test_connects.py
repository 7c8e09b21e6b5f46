"""Connects: every call of connect() on an internet or Unix socket is one row, whatever came of it."""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest

from scope_ebpf.loaders.capture import Capture, CaptureOptions
from scope_ebpf.records import LossKind, RecordKind
from tests.live.programs.connects import TIMES
from tests.live.recording import attached, no_losses, python_target

pytestmark = pytest.mark.live

NOTED = ["fd", "kind", "remote_address", "remote_port", "remote_path", "inode", "result", "error"]


@pytest.mark.parametrize("families", ["processes,messages", "processes,syscalls,messages"])
def test_every_call_is_a_row(families, tmp_path):
    with (
        python_target("connects", tmp_path) as target,
        attached(tmp_path, target, "--families", families) as session,
    ):
        told = target.work()
    no_losses(session)
    notes, rows = told["notes"], session.table("connects").filter(tgid=session.target)
    assert rows.select(NOTED).to_dicts() == [{name: note[name] for name in NOTED} for note in notes]
    assert rows.select("tid", "context", "status").unique().rows() == [
        (session.target, 0, "complete")
    ]
    ended = rows["start_ns"] + rows["duration_ns"]
    assert (rows["duration_ns"] > 0).all()
    assert (rows["start_ns"][1:] >= ended[:-1]).all()
    # what the program itself made of it: it did what it is for
    seen = Counter((note["label"], note["error"]) for note in notes)
    expected = {
        ("tcp", None): TIMES, ("refused", "ECONNREFUSED"): TIMES, ("unix", None): TIMES,
        ("tcp6", None): 1, ("refused6", "ECONNREFUSED"): 1, ("mapped", None): 1,
        ("missing", "ENOENT"): 1, ("longest", "ENOENT"): 1, ("abstract", None): 1,
        ("nonblocking", "EINPROGRESS"): 1, ("nonblocking-again", None): 1,
        ("nonblocking-refused", "EINPROGRESS"): 1,
        ("nonblocking-refused-again", "ECONNREFUSED"): 1, ("udp", None): 1,
        ("disconnect", None): 1, ("bad-address", "EFAULT"): 1, ("too-short", "EINVAL"): 1,
    }  # fmt: skip
    assert seen == expected
    if "syscalls" in families:
        calls = session.table("syscalls").filter(tgid=session.target, name="connect")
        assert len(calls) == told["calls"]
        times = calls.select("start_ns", "duration_ns", result=pl.col("result").cast(pl.Int32))
        assert rows.join(times, on=["start_ns", "duration_ns", "result"]).height == len(rows)


def test_without_messages_there_are_none(tmp_path):
    with (
        python_target("connects", tmp_path) as target,
        attached(tmp_path, target, "--families", "processes,syscalls") as session,
    ):
        told = target.work()
    no_losses(session)
    assert session.table("connects").is_empty()
    assert session.table("syscalls").filter(name="connect").height == told["calls"]


def test_emitted_is_stored_plus_lost(tmp_path):
    with python_target("connects", tmp_path) as target:
        options = CaptureOptions(
            tgids=(target.pid,), families=("processes", "messages"), wide_slots=32
        )
        with Capture(options) as capture:
            capture.start()
            told = target.work()
            capture.stop()
            stored, lost = capture.drain(), capture.lost()
    kept = sum(int((run["kind"] == RecordKind.RECORD_CONNECT).sum()) for _, _, run in stored.wide)
    missing = int(lost[:, LossKind.LOSS_CONNECTS].sum())
    assert kept > 0
    assert missing > 0
    assert kept + missing == len(told["notes"])
