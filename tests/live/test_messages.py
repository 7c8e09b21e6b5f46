"""Messages: every row against what two talking processes noted, byte by byte."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf.records import RecordLimits
from tests.live.programs.conversation import (
    ANY_RECEIVE,
    MANY_PIECES,
    PIPE_SEND,
    SOCKET_RECEIVE,
    SOCKET_SEND,
    TRANSPORTS,
    UNSEEN,
    cut,
    is_pipe,
    stream_bytes,
)
from tests.live.recording import Session, attached, no_losses, python_target

pytestmark = [pytest.mark.live, pytest.mark.usefixtures("each_transport")]

# Every kind of connection; how their records come out of the kernel makes no difference between them.
WAYS = pytest.mark.parametrize(
    ("each_transport", "transport"),
    [
        *(("rings", transport) for transport in TRANSPORTS),
        *(("perf", transport) for transport in ("tcp4", "unix-pair", "pipe")),
    ],
    indirect=["each_transport"],
)
TCP_MODULUS = 2**32
SEED = 7
TURN_GAP_NS = int(RecordLimits.TURN_GAP_NS)
PREFIX_BYTES = int(RecordLimits.PREFIX_BYTES)


class Talk:
    """A recorded conversation: what both processes noted, and the rows of the connection."""

    def __init__(self, directory: Path, transport: str, session: Session) -> None:
        """Read both."""
        self.transport = transport
        self.sides = [json.loads((directory / f"notes-{name}").read_text()) for name in ("A", "B")]
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
            (
                moved.filter(pl.col("stream") == stream, direction="send"),
                moved.filter(pl.col("stream") == stream, direction="receive"),
            )
            for stream in found
        ]

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
        python_target("conversation", transport, mode, SEED, directory, *more) as target,
        attached(directory, target, *options) as session,
    ):
        target.work()
    no_losses(session)
    return Talk(directory, transport, session), session


@pytest.mark.parametrize("waiting", [None, 0, 5003], ids=["after", "before", "waiting"])
@WAYS
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
@WAYS
def test_flood(transport, waiting, tmp_path):
    """With both directions at once and cut anew, the ranges of both ends still tile the stream."""
    talk, _ = record(tmp_path, transport, "flood", waiting)
    talk.check_calls()
    talk.check_tiles(waiting or 0)


@pytest.mark.parametrize(
    ("each_transport", "limit"),
    [("rings", 0), ("rings", 7), ("rings", 512), ("rings", 4000), ("perf", 512)],
    indirect=["each_transport"],
)
@pytest.mark.parametrize("transport", ["tcp4", "unix-path", "pipe"])
def test_payload_heads(transport, limit, tmp_path):
    """At the start of each turn the first bytes that moved, and nothing elsewhere."""
    talk, session = record(
        tmp_path, transport, "steps", None, "--payload-bytes", limit, "--unredacted"
    )
    assert session.recording.meta.payload_bytes == limit
    talk.check_calls()
    streams = {name: stream_bytes(SEED, name) for name in "AB"}
    seen = 0
    for side, (tgid, _, notes) in zip(talk.sides, talk.notes(), strict=True):
        others = {"A": "B", "B": "A"}[side["process"]]
        rows = talk.messages.filter(tgid=tgid).sort("start_ns").rows(named=True)
        last: dict[str, int] = {}
        short: dict[str, bool] = {}
        last_direction = ""
        for row, note in zip(rows, notes, strict=True):
            assert row["name"] == note["name"]
            direction, begins = row["direction"], row["start_ns"]
            turn = begins - last.get(direction, 0) > TURN_GAP_NS
            turn = turn or (not is_pipe(transport) and direction != last_direction)
            if not transport.startswith("tcp"):
                turn = turn or (short.get(direction, False) and note["length"] > PREFIX_BYTES)
            if is_pipe(transport):
                # both processes use one end: the other one's messages count for other directions only
                turn = row["turn"] if last.get(direction) is None else turn
            if note["peek"]:
                turn = False
            else:
                last[direction], last_direction = begins, direction
                short[direction] = note["length"] <= PREFIX_BYTES
            assert row["turn"] == turn, (row, note)
            stream = streams[side["process"] if direction == "send" else others]
            head = stream[note["offset"] : note["offset"] + note["length"]]
            if note["name"] in MANY_PIECES:
                head = cut(head if direction == "send" else bytes(note["size"]), 6)[0]
                head = stream[note["offset"] : note["offset"] + min(len(head), note["length"])]
            if turn and limit and note["length"] and note["name"] not in UNSEEN:
                assert row["payload"] == head[:limit], (row["name"], note)
                seen += 1
            else:
                assert row["payload"] is None
    if limit and not is_pipe(transport):
        assert seen > 40


def named(session: Session, inode: int) -> dict[str, Any]:
    """The only connection of a socket or pipe."""
    rows = session.table("connections").filter(inode=inode).rows(named=True)
    assert len(rows) == 1
    return rows[0]


@pytest.mark.parametrize("when", ["before", "after"])
def test_identity(when, tmp_path):
    """Addresses, ports, paths and inodes are those that the process itself sees."""
    with (
        python_target("sockets", "identity", tmp_path, when) as target,
        attached(tmp_path, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    assert len(noted) == 17
    for end in noted:
        found = named(session, end["inode"])
        for column, value in end["expected"].items():
            assert found[column] == value, (end["label"], column)
        assert found["tgid"] == target.pid
        rows = session.table("messages").filter(connection=found["connection"])
        assert rows.select("direction", "length_bytes").rows() == [
            tuple(moved) for moved in end["moved"]
        ], end["label"]
        assert rows["exact"].unique().to_list() == [end["exact"]], end["label"]
        assert sorted(rows["fd"].unique()) == sorted(end.get("fds", [end["fd"]]))
        for column in ("kind", "local_address", "local_port", "remote_port", "local_path"):
            assert rows[column].unique().to_list() == [found[column]]
    by_label = {end["label"]: named(session, end["inode"]) for end in noted}
    for label in ("tcp4", "tcp6", "tcp-mapped", "unix-path", "unix-abstract", "unix-pair"):
        client, server = by_label[f"{label} client"], by_label[f"{label} server"]
        assert client["send_stream"] == server["receive_stream"]
        assert server["send_stream"] == client["receive_stream"]
        assert client["send_stream"] != client["receive_stream"]
        assert client["netns"] == server["netns"]
        if label.startswith("unix"):
            assert client["peer_inode"] == server["inode"]
            assert server["peer_inode"] == client["inode"]
    every = [row["send_stream"] for row in by_label.values()]
    assert len(set(every)) == len(every)


def test_ends_of_tcp(tmp_path):
    """The last bytes and the end of file, read after the connection was closed from both sides."""
    with (
        python_target("sockets", "tcp-ends", tmp_path) as target,
        attached(tmp_path, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    messages = session.table("messages")
    for label, end in noted.items():
        connection = named(session, end["inode"])
        rows = messages.filter(connection=connection["connection"])
        assert rows.select("direction", "length_bytes").rows() == [
            tuple(moved) for moved in end["moved"]
        ], label
    for name in ("fin-with-data", "both-closed"):
        client, server = (
            named(session, noted[f"{name} {side}"]["inode"]) for side in ("client", "server")
        )
        for sender, receiver in ((client, server), (server, client)):
            assert sender["send_stream"] == receiver["receive_stream"]
            sends = messages.filter(connection=sender["connection"], direction="send")
            receives = messages.filter(connection=receiver["connection"], direction="receive")
            if len(sends) and len(receives):
                assert sends["stream"].unique().to_list() == receives["stream"].unique().to_list()
                # all receives after the last byte end where it ended: a FIN is no byte
                assert receives["stream_end"][-1] == sends["stream_end"][-1], name
                total = sends["length_bytes"].sum()
                assert receives["length_bytes"].sum() == total
                begin = (sends["stream_end"][0] - sends["length_bytes"][0]) % TCP_MODULUS
                assert (receives["stream_end"][0] - receives["length_bytes"][0] - begin) == 0


REUSED = ["tcp-port", "unix-path", "unix-pair", "unix-unaccepted", "pipe", "fd"]


@pytest.mark.parametrize(
    ("each_transport", "kind"),
    [*(("rings", kind) for kind in REUSED), ("perf", "tcp-port"), ("perf", "unix-pair")],
    indirect=["each_transport"],
)
def test_reuse(kind, tmp_path):
    """Sockets that follow each other at one port, path, descriptor or address stay apart."""
    rounds = 199
    with (
        python_target("sockets", "reuse", tmp_path, kind, rounds) as target,
        attached(tmp_path, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    assert len(noted) == rounds
    messages, connections = session.table("messages"), session.table("connections")
    ids = []
    for ends in noted:
        for end in ends:
            found = connections.filter(inode=end["inode"])
            assert len(found) == 1
            rows = messages.filter(connection=found["connection"][0])
            assert rows.select("direction", "length_bytes").rows() == [
                tuple(moved) for moved in end["moved"]
            ]
            ids.append(found["connection"][0])
        pairs = [ends] if len(ends) == 2 else [ends[1:3], ends[3:5]] if len(ends) == 5 else []
        for pair in pairs:
            a, b = (named(session, end["inode"]) for end in pair)
            assert a["send_stream"] == b["receive_stream"]
            assert b["send_stream"] == a["receive_stream"]
            sends = messages.filter(connection=a["connection"], direction="send")
            receives = messages.filter(connection=b["connection"], direction="receive")
            assert sends["stream_end"].to_list() == receives["stream_end"].to_list()
    assert len(set(ids)) == len(ids)


def test_ranges_that_cannot_be_compared(tmp_path):
    """Datagrams, packets and netlink: the rows are there, and marked."""
    with (
        python_target("sockets", "others", tmp_path) as target,
        attached(tmp_path, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    assert len(noted) == 5
    for end in noted:
        found = named(session, end["inode"])
        assert found["kind"] == end["label"]
        rows = session.table("messages").filter(connection=found["connection"])
        assert rows.select("direction", "length_bytes").rows() == [
            tuple(moved) for moved in end["moved"]
        ]
        assert not rows["exact"].any()
        assert rows["stream"].null_count() == 0
    assert len(session.table("connections").filter(pl.col("kind") != "pipe")) == len(noted)


def test_queue_too_long_to_measure(tmp_path):
    """What cannot be measured is not claimed to be exact."""
    with (
        python_target("sockets", "crowd", tmp_path) as target,
        attached(tmp_path, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    for end in noted:
        found = named(session, end["inode"])
        rows = session.table("messages").filter(connection=found["connection"])
        assert rows.select("direction", "length_bytes").rows() == [
            tuple(moved) for moved in end["moved"]
        ]
        assert not rows["exact"].any()


@pytest.mark.parametrize(
    ("who", "size"), [("reader", 101), ("short-writer", 101), ("writer", 16_000_057)]
)
@pytest.mark.parametrize("kind", ["tcp4", "unix-pair", "pipe"])
@pytest.mark.parametrize("each_transport", ["rings"], indirect=True)
def test_calls_under_way_at_the_start(kind, who, size, tmp_path):
    """A call that is under way when the recording begins is a row, and all later ranges fit."""
    with (
        python_target("sockets", "blocked", tmp_path, kind, who, size) as target,
        attached(tmp_path, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    inodes = list(set(noted["inodes"]))
    ours = session.table("connections").filter(pl.col("inode").is_in(inodes))
    assert len(ours) == len(inodes)
    rows = session.table("messages").filter(
        pl.col("connection").is_in(ours["connection"].implode())
    )
    first = rows.filter(tgid=noted["child"]).row(0, named=True)
    assert first["status"] == "began_before"
    assert (first["direction"], first["length_bytes"]) == (
        "receive" if who == "reader" else "send",
        size,
    )
    assert rows.filter(pl.col("status") != "complete").height == 1
    modulus = TCP_MODULUS if kind == "tcp4" else 2**64
    for stream in rows["stream"].unique():
        one = rows.filter(pl.col("stream") == stream)
        if not one["exact"].all():
            # a large write, part of which was in the queue already
            assert who == "writer" and kind != "tcp4"
            continue
        sends, receives = (one.filter(direction=name) for name in ("send", "receive"))
        assert len(sends) in (20, 21)
        for side in (sends, receives):
            ends, lengths = side["stream_end"].to_list(), side["length_bytes"].to_list()
            for before, after, length in zip(ends, ends[1:], lengths[1:], strict=False):
                assert (after - length - before) % modulus == 0
        assert sends["stream_end"][-20:].to_list() == receives["stream_end"][-20:].to_list()
        if noted["filled"] and len(sends) == 21:
            assert receives["length_bytes"].sum() == noted["filled"] + sends["length_bytes"].sum()
        elif len(sends) == 21:
            assert receives["length_bytes"].sum() == sends["length_bytes"].sum()
        assert sends["stream_end"][0] in receives["stream_end"].to_list()


def test_reconnect(tmp_path):
    """A socket that is connected anew is another connection."""
    with (
        python_target("sockets", "reconnect", tmp_path) as target,
        attached(tmp_path, target) as session,
    ):
        noted = target.work()
    no_losses(session)
    rows = session.table("connections").filter(pl.col("kind").is_in(["tcp", "udp"]))
    assert rows["connection"].n_unique() == len(rows) == len(noted) == 6
    for row, end in zip(rows.rows(named=True), noted, strict=True):
        assert row["inode"] == end["inode"]
        for column, value in end["expected"].items():
            assert row[column] == value
        own = session.table("messages").filter(connection=row["connection"])
        assert own.select("direction", "length_bytes").rows() == [
            tuple(moved) for moved in end["moved"]
        ]
