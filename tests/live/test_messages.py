"""Messages: every row against what two talking processes noted, byte by byte."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.live.programs.conversation import (
    ANY_RECEIVE,
    ANY_SEND,
    PIPE_SEND,
    SOCKET_RECEIVE,
    SOCKET_SEND,
    TRANSPORTS,
    is_pipe,
    stream_bytes,
)
from tests.live.recording import Session, attached, no_losses, python_target

pytestmark = pytest.mark.live

TCP_MODULUS = 2**32


class Talk:
    """A recorded conversation: what both processes noted, and the rows of the connection."""

    def __init__(self, directory: Path, transport: str, session: Session) -> None:
        """Read both."""
        self.transport = transport
        self.sides = [
            json.loads((directory / f"notes-{name}").read_text()) for name in ("A", "B")
        ]
        self.rows = session.table("messages")
        self.connections = session.table("connections")
        inodes = {note["inode"] for side in self.sides for note in side["notes"]}
        ours = self.connections.filter(pl.col("inode").is_in(list(inodes)))
        self.messages = self.rows.filter(pl.col("connection").is_in(ours["connection"].implode()))
        self.modulus = TCP_MODULUS if transport.startswith("tcp") else 2**64

    def notes(self) -> list[tuple[int, int, list[dict[str, Any]]]]:
        """What each thread noted, in its order: (tgid, tid, notes)."""
        return [
            (side["tgid"], tid, [note for note in side["notes"] if note["tid"] == tid])
            for side in self.sides
            for tid in sorted({note["tid"] for note in side["notes"]})
        ]

    def check_calls(self) -> None:
        """Each call that was noted is one row, and there is no other row."""
        expected = sum(len(notes) for _, _, notes in self.notes())
        for tgid, tid, notes in self.notes():
            rows = self.messages.filter(tgid=tgid, tid=tid)
            assert rows.select("name", "direction", "length_bytes", "peek", "fd").rows() == [
                (note["name"], note["direction"], note["length"], note["peek"], note["fd"])
                for note in notes
            ]
            assert rows["status"].unique().to_list() == ["complete"]
            assert rows["exact"].all()
        assert len(self.messages) == expected

    def streams(self) -> list[tuple[pl.DataFrame, pl.DataFrame]]:
        """The sends and the receives of each direction, without the peeks."""
        moved = self.messages.filter(~pl.col("peek"))
        found = moved["stream"].unique().to_list()
        assert None not in found
        assert len(found) == 2
        return [
            tuple(
                moved.filter(pl.col("stream") == stream, pl.col("direction") == direction)
                for direction in ("send", "receive")
            )
            for stream in found
        ]  # type: ignore[misc]

    def check_tiles(self, waiting: int = 0) -> None:
        """Each end's ranges follow each other without a gap, and both cover the same bytes."""
        totals = {side["process"]: side["sent"] for side in self.sides}
        for sends, receives in self.streams():
            for rows in (sends, receives):
                ends = rows["stream_end"].to_list()
                lengths = rows["length_bytes"].to_list()
                gaps = [
                    (number, (after - length - before) % self.modulus)
                    for number, ((before, after), length) in enumerate(
                        zip(pairwise(ends), lengths[1:], strict=True), 1
                    )
                    if (after - length - before) % self.modulus
                ]
                assert gaps == [], rows["direction"][0]
            assert sends["stream_end"][-1] == receives["stream_end"][-1]
            assert sends["length_bytes"].sum() + waiting == receives["length_bytes"].sum()
            assert receives["length_bytes"].sum() in totals.values()
            assert receives["length_bytes"][-1] == 0, "the end of file"

    def check_pairs(self) -> None:
        """Where each send was read to its end, its end is the end of a receive."""
        pairs = 0
        for sends, receives in self.streams():
            joined = sends.join(
                receives.filter(pl.col("length_bytes") > 0), on=["stream", "stream_end"], how="left"
            )
            assert len(joined) == len(sends)
            assert joined["tid_right"].null_count() == 0
            assert (joined["tgid"] != joined["tgid_right"]).all()
            begun = joined["start_ns"]
            ended = joined["start_ns_right"] + joined["duration_ns_right"]
            assert (begun < ended).all(), "received before it was sent"
            pairs += len(joined)
        assert pairs >= 60

    def check_peeks(self) -> None:
        """A peek covers the bytes that the next receive of its thread begins with."""
        receives = self.messages.filter(pl.col("direction") == "receive").sort("start_ns")
        for tgid in receives["tgid"].unique():
            rows = receives.filter(pl.col("tgid") == tgid).rows(named=True)
            for peek, after in pairwise(rows):
                if peek["peek"]:
                    begins = [row["stream_end"] - row["length_bytes"] for row in (peek, after)]
                    assert (begins[0] - begins[1]) % self.modulus == 0


def record(
    directory: Path, transport: str, mode: str, waiting: int | None, *options: object
) -> tuple[Talk, Session]:
    """Record a conversation; the notes are in the same directory."""
    more = [] if waiting is None else [waiting]
    with (
        python_target("conversation", transport, mode, 7, directory, *more) as target,
        attached(directory, target, *options) as session,
    ):
        target.work()
    no_losses(session)
    return Talk(directory, transport, session), session


@pytest.mark.parametrize("waiting", [None, 0, 5003], ids=["after", "before", "waiting"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_steps(transport, waiting, tmp_path):
    """In lock-step, each send finds its receive, by every call there is."""
    talk, _ = record(tmp_path, transport, "steps", waiting)
    talk.check_calls()
    talk.check_tiles(waiting or 0)
    talk.check_pairs()
    talk.check_peeks()
    for direction, calls in (
        ("send", PIPE_SEND if is_pipe(transport) else SOCKET_SEND),
        ("receive", ANY_RECEIVE if is_pipe(transport) else SOCKET_RECEIVE),
    ):
        seen = talk.messages.filter(pl.col("direction") == direction)["name"].unique()
        assert sorted(seen) == sorted(calls)


@pytest.mark.parametrize("waiting", [None, 0, 5003], ids=["after", "before", "waiting"])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_flood(transport, waiting, tmp_path):
    """With both directions at once and cut anew, the ranges of both ends still tile the stream."""
    talk, _ = record(tmp_path, transport, "flood", waiting)
    talk.check_calls()
    talk.check_tiles(waiting or 0)
