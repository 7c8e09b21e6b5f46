"""Losses: with rings that are too small, what is stored and what is counted as lost is all there was.

A second capture of the same target, with rings that are large enough, says how much there was.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from scope_ebpf.loaders.capture import Batch, Capture, CaptureOptions
from scope_ebpf.records import MESSAGE, PAYLOAD, LossKind, RecordFlags, RecordKind
from tests.live.recording import PROGRAMS, Target, attached, compiled, recorder

pytestmark = pytest.mark.live

BURST = 2003  # of each kind in each of two threads; every 20th time a child
CALL_KINDS = (RecordKind.RECORD_CALL, RecordKind.RECORD_MESSAGE_CALL)
MESSAGE_KINDS = (RecordKind.RECORD_MESSAGE, RecordKind.RECORD_MESSAGE_CALL)
KINDS = {
    LossKind.LOSS_SYSCALLS: CALL_KINDS,
    LossKind.LOSS_MESSAGES: MESSAGE_KINDS,
    LossKind.LOSS_OFFCPU: (RecordKind.RECORD_OFFCPU,),
    LossKind.LOSS_PROCESSES: (RecordKind.RECORD_PROCESS,),
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The program that makes the events."""
    return compiled("calls", tmp_path_factory.mktemp("calls"))


def burst(target: Target) -> None:
    """Let it make its events, until it stands at its second gate and nothing happens any more."""
    target.open_gate()
    target.note()
    target.wait_at_gate()
    target.wait_until_blocked()


def counts(batch: Batch) -> Counter[tuple[int, int]]:
    """How many records there are, by CPU and loss kind."""
    found: Counter[tuple[int, int]] = Counter()
    for cpu, _, slots in (*batch.hot, *batch.wide):
        for loss, kinds in KINDS.items():
            found[cpu, loss] += int(np.isin(slots["kind"], kinds).sum())
    return found


def payload_counts(batch: Batch) -> tuple[Counter[int], Counter[int]]:
    """By CPU: payloads that are there, each with its message; and messages that are to have one."""
    there: Counter[int] = Counter()
    wanted: Counter[int] = Counter()
    owners: set[tuple[int, int]] = set()
    for cpu, first, slots in batch.hot:
        rows = slots[np.isin(slots["kind"], MESSAGE_KINDS)].view(MESSAGE)
        wanted[cpu] += int(((rows["flags"] & RecordFlags.FLAG_TURN) != 0).sum())
        flagged = slots["flags"] & RecordFlags.FLAG_PAYLOAD != 0
        flagged &= np.isin(slots["kind"], MESSAGE_KINDS)
        # the sequence tells the index: in a perf buffer some are left out
        indices = first + (slots["sequence"] - slots["sequence"][0]).astype(np.int32).astype(
            np.int64
        )
        owners |= {(cpu, index) for index in indices[flagged].tolist()}
    for cpu, _, slots in batch.wide:
        rows = slots[slots["kind"] == RecordKind.RECORD_PAYLOAD]
        raw = rows.view(np.uint8).reshape(len(rows), rows.itemsize)[:, : PAYLOAD.itemsize]
        for index in np.ascontiguousarray(raw).view(PAYLOAD)["hot_index"].ravel().tolist():
            assert (cpu, index) in owners
            owners.remove((cpu, index))
            there[cpu] += 1
    assert not owners, "messages whose payload is missing"
    return there, wanted


@pytest.mark.parametrize("transport", ["rings", "perf"])
def test_emitted_is_stored_plus_lost(calls, transport):
    """On each CPU, for each kind of record, exactly."""
    with Target(calls, "burst", BURST) as target:
        options = CaptureOptions(tgids=(target.pid,), payload_bytes=16, transport=transport)
        with (
            Capture(replace(options, hot_slots=1024, wide_slots=256)) as small,
            Capture(replace(options, hot_slots=1 << 16, wide_slots=1 << 15)) as large,
        ):
            for capture in (small, large):
                capture.start()
            burst(target)
            stored, everything = small.drain(), large.drain()
            lost = small.lost()
            assert not large.lost().any()
    emitted, kept = counts(everything), counts(stored)
    for cpu in range(len(lost)):
        for loss in KINDS:
            assert kept[cpu, loss] + int(lost[cpu, loss]) == emitted[cpu, loss], (cpu, loss)
    # the rings were full, and there was something of every kind
    for loss in KINDS:
        total = sum(emitted[cpu, loss] for cpu in range(len(lost)))
        assert lost[:, loss].sum() > 0
        assert total > sum(kept[cpu, loss] for cpu in range(len(lost))) > 0
    assert sum(emitted[cpu, LossKind.LOSS_MESSAGES] for cpu in range(len(lost))) == 8 * BURST + 3
    there, wanted = payload_counts(stored)
    for cpu in range(len(lost)):
        assert there[cpu] + int(lost[cpu, LossKind.LOSS_PAYLOADS]) == wanted[cpu]
    assert not lost[:, LossKind.LOSS_TASKS].any()


@pytest.mark.parametrize("transport", ["rings", "perf"])
def test_losses_of_payloads_alone(calls, transport):
    """When only the wide ring is full, the messages are there without their payloads."""
    with Target(calls, "burst", 307) as target:
        options = CaptureOptions(
            tgids=(target.pid,),
            families=("processes", "messages"),
            payload_bytes=16,
            hot_slots=1 << 14,
            wide_slots=256,
            transport=transport,
        )
        with Capture(options) as capture:
            capture.start()
            burst(target)
            stored, lost = capture.drain(), capture.lost()
    there, wanted = payload_counts(stored)
    assert wanted.total() >= 8 * 307
    assert lost[:, LossKind.LOSS_PAYLOADS].sum() > 0
    for cpu in range(len(lost)):
        assert there[cpu] + int(lost[cpu, LossKind.LOSS_PAYLOADS]) == wanted[cpu]
    assert not lost[:, LossKind.LOSS_MESSAGES].any()


def test_recorder_that_is_stopped_for_a_while(calls, tmp_path):
    """What the recorder could not store while it stood still is in `losses`, to the last event."""
    tables = ("syscalls", "messages", "offcpu", "processes")
    small_path = tmp_path / "small.scope"
    with (
        Target(calls, "burst", BURST) as target,
        attached(tmp_path, target, "--payload-bytes", 0) as large,
        recorder(
            small_path, sys.executable, PROGRAMS / "tiny_recorder.py", target.pid, small_path
        ) as small,
    ):
        small.process.send_signal(signal.SIGSTOP)
        target.open_gate()
        target.note()
        small.process.send_signal(signal.SIGCONT)
        # it goes on: the end is recorded again
        target.wait_at_gate()
        while not any((small_path / "losses").glob("*.parquet")):
            time.sleep(0.01)
        target.open_gate()
        target.note()
        # it has ended, but its parent does not wait for it before the recorders have stopped
        small.wait()
        large.wait()
    assert large.table("losses").is_empty()
    losses = small.table("losses")
    by_table = dict(losses.group_by("table").agg(pl.col("lost").sum()).iter_rows())
    assert (losses["lost"] > 0).all()
    for table in tables:
        assert by_table[table] > 0
        stored, everything = len(small.table(table)), len(large.table(table))
        assert stored + by_table[table] == everything, table
        assert small.recording.meta.tables[table].lost == by_table[table]
        assert small.recording.meta.tables[table].rows == stored
    turns = small.table("messages").filter("turn")
    assert (
        len(turns) == turns["payload"].len() - turns["payload"].null_count() + by_table["payloads"]
    )
    # per CPU, too
    for table in ("syscalls", "messages", "offcpu"):
        lost = dict(
            losses.filter(table=table).group_by("cpu").agg(pl.col("lost").sum()).iter_rows()
        )
        for cpu, rows in large.table(table).group_by("cpu"):
            own = small.table(table).filter(cpu=cpu[0])
            assert len(own) + lost.get(cpu[0], 0) == len(rows)
    assert small.table("syscalls")["start_ns"].to_list()[-1] > losses["time_ns"].to_list()[-1]
    for session in (small, large):
        assert session.table("offcpu").filter(status="open").is_empty(), "of a process that ended"
