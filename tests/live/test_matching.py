"""Matching: every byte of real conversations, against what both processes noted."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from scope_ebpf.analysis.matching import match_recording
from tests.live.programs.conversation import TRANSPORTS
from tests.live.recording import attached, no_losses, python_target
from tests.live.test_messages import Talk, record

pytestmark = pytest.mark.live

Range = tuple[int, int, int]


def noted_ranges(talk: Talk) -> dict[tuple[str, str], list[Range]]:
    """Start of the call, first byte and end in the stream; by the stream's sender and direction."""
    found: dict[tuple[str, str], list[Range]] = {}
    names = {side["tgid"]: side["process"] for side in talk.sides}
    for tgid, tid, notes in talk.notes():
        starts = talk.messages.filter(tgid=tgid, tid=tid)["start_ns"].to_list()
        for start, note in zip(starts, notes, strict=True):
            if note["peek"] or not note["length"]:
                continue
            me = names[tgid]
            sender = me if note["direction"] == "send" else {"A": "B", "B": "A"}[me]
            ranges = found.setdefault((sender, note["direction"]), [])
            ranges.append((start, note["offset"], note["offset"] + note["length"]))
    return found


@pytest.mark.parametrize("waiting", [None, 5003], ids=["after", "waiting"])
@pytest.mark.parametrize("mode", ["steps", "flood"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_byte(transport, mode, waiting, tmp_path):
    """Each send with each receive that got some of its bytes, and no other."""
    talk, session = record(tmp_path, transport, mode, waiting)
    ours = talk.messages["connection"].unique()
    of_us = pl.coalesce("send_connection", "receive_connection").is_in(ours.implode())
    matched = match_recording(session.recording).filter(of_us)
    ranges = noted_ranges(talk)
    expected = [
        (send, receive, min(end, upto) - max(begin, from_))
        for sender in "AB"
        for send, begin, end in ranges[sender, "send"]
        for receive, from_, upto in ranges[sender, "receive"]
        if begin < upto and from_ < end
    ]
    pairs = matched.filter(pl.col("unmatched").is_null())
    found = pairs.select("send_start_ns", "receive_start_ns", "length_bytes").rows()
    assert sorted(found) == sorted(expected)
    assert pairs["length_bytes"].sum() == sum(side["sent"] - (waiting or 0) for side in talk.sides)
    assert (pairs["send_tgid"] != pairs["receive_tgid"]).all()
    # what had been sent before the recording began, and nothing else
    alone = matched.filter(pl.col("unmatched").is_not_null())
    assert alone["length_bytes"].sum() == 2 * (waiting or 0)
    assert set(alone["unmatched"]) <= {"before the recording"}
    assert alone["send_start_ns"].null_count() == len(alone)


def reused(directory: Any, kind: str, rounds: int) -> tuple[list[Any], pl.DataFrame]:
    with (
        python_target("sockets", "reuse", directory, kind, rounds) as target,
        attached(directory, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    return noted, match_recording(session.recording)


@pytest.mark.parametrize("kind", ["tcp-port", "unix-path", "unix-pair", "pipe"])
def test_reuse(kind, tmp_path):
    """Connections that follow each other at one port, path or address do not mix."""
    rounds = 23
    noted, matched = reused(tmp_path, kind, rounds)
    assert len(noted) == rounds
    pairs = matched.filter(pl.col("unmatched").is_null())
    ends = pairs.select("send_connection", "receive_connection").unique()
    if kind == "pipe":
        assert (ends["send_connection"] == ends["receive_connection"]).all()
    else:
        other = dict(ends.iter_rows())
        assert len(other) == len(ends)
        assert len(set(other.values())) == len(ends)
    sent = sum(length for end in noted for one in end for way, length in one["moved"]
               if way == "send")  # fmt: skip
    received = sum(length for end in noted for one in end for way, length in one["moved"]
                   if way == "receive")  # fmt: skip
    assert pairs["length_bytes"].sum() == min(sent, received)


def test_a_peer_that_is_not_traced(tmp_path):
    """The gate of a target is a pipe from this process, which is not recorded."""
    with (
        python_target("sockets", "identity", tmp_path, "after") as target,
        attached(tmp_path, target) as session,
    ):
        target.work()
    no_losses(session)
    matched = match_recording(session.recording).filter(pl.col("unmatched").is_not_null())
    told = matched.filter(pl.col("send_tgid") == target.pid).sort("send_start_ns")
    assert told["unmatched"][-1] == "peer not traced", "its note on stdout"
