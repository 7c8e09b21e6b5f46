"""Plain text and the connections that carried it: each way of using OpenSSL, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf.analysis.plaintext import tie_to_connections
from scope_ebpf.recording.reader import open_recording
from tests.pure.recordings import make_recording

pytestmark = pytest.mark.pure

TGID, TID, SSL = 100, 101, 0x5000
RECEIVED, SENT = 21, 22  # of a connection: 10 * its number is added


def moved(start_ns: int, receive: bool, connection: int, end: int, **more: Any) -> dict[str, Any]:
    """A message of 10 ns."""
    base = {"start_ns": start_ns, "duration_ns": 10, "tgid": TGID, "tid": TID, "fd": connection}
    base |= {"receive": receive, "connection": connection, "stream_end": end, "exact": True}
    return base | {"length_bytes": 100} | more


def text(start_ns: int, duration_ns: int, receive: bool, **more: Any) -> dict[str, Any]:
    """A call of SSL_read or SSL_write."""
    base = {"start_ns": start_ns, "duration_ns": duration_ns, "tgid": TGID, "tid": TID}
    return base | {"ssl": SSL, "receive": receive, "length_bytes": 50} | more


def tied(path: Path, tls: list[dict[str, Any]], messages: list[dict[str, Any]]) -> pl.DataFrame:
    """The ties of a recording with these rows; connection N is at local port N."""
    ends = [
        {"connection": number, "kind": "tcp", "local_port": number, "local_address": "127.0.0.1",
         "receive_stream": 10 * number + RECEIVED, "send_stream": 10 * number + SENT}
        for number in sorted({row["connection"] for row in messages})
    ]  # fmt: skip
    rows = {"tls": tls, "messages": messages, "connections": ends}
    recording = open_recording(make_recording(path / "a.scope", rows))
    whole = recording.messages.collect()
    found = tie_to_connections(recording.tls, whole)
    assert found.schema == {
        **whole.schema, "ssl": pl.UInt64, "tls": pl.Boolean, "untied": pl.String,
    }  # fmt: skip
    assert len(found) == len(tls)
    assert found["tls"].all()
    return found


def test_a_socket_within_the_calls(tmp_path):
    """The header, the body, two reads from OpenSSL's buffer, and a send; beside another connection."""
    found = tied(
        tmp_path,
        [text(100, 100, True), text(300, 10, True), text(320, 10, True), text(400, 100, False)],
        [
            moved(10, True, 2, 1), moved(110, True, 1, 5), moved(130, True, 1, 105),
            moved(310, True, 2, 2, tid=TID + 1), moved(440, False, 1, 77), moved(600, False, 2, 9),
        ],
    )  # fmt: skip
    assert found["connection"].to_list() == [1] * 4
    assert found["local_port"].to_list() == [1] * 4
    assert found["stream"].to_list() == [31, 31, 31, 32]
    assert found["stream_end"].to_list() == [105, 105, 105, 77]
    assert found["name"].to_list() == ["SSL_read"] * 3 + ["SSL_write"]
    assert found["fd"].to_list() == [1] * 4
    assert found["length_bytes"].to_list() == [50] * 4


def test_memory_between_socket_and_calls(tmp_path):
    """Two SSL objects in one thread; the second one's send comes before the first one's."""
    found = tied(
        tmp_path,
        [
            text(100, 10, True), text(115, 10, True, ssl=SSL + 8),
            text(200, 10, False), text(220, 10, False, ssl=SSL + 8),
        ],
        [
            moved(80, True, 1, 5), moved(112, True, 2, 6, duration_ns=1),
            moved(300, False, 2, 7), moved(320, False, 1, 8),
        ],
    )  # fmt: skip
    assert found["connection"].to_list() == [1, 2, 1, 2]
    assert found["stream_end"].to_list() == [5, 6, 8, 7]


def test_memory_and_nothing_received(tmp_path):
    """The next send decides, if it is long enough to hold the plain text."""
    wakeup = moved(150, False, 3, 1, length_bytes=1)
    found = tied(
        tmp_path, [text(100, 10, False)], [moved(200, False, 1, 7), moved(90, False, 2, 6)]
    )
    assert found["connection"].to_list() == [1]
    found = tied(tmp_path / "b", [text(100, 10, False)], [wakeup])
    assert found["connection"].to_list() == [None]


def test_an_address_that_is_used_again(tmp_path):
    """What is read from the buffer belongs to the later connection once that was there."""
    found = tied(
        tmp_path,
        [
            text(100, 50, True), text(200, 10, True), text(400, 10, True), text(500, 50, True),
        ],
        [moved(110, True, 1, 5), moved(300, True, 2, 6), moved(510, True, 2, 7)],
    )  # fmt: skip
    assert found["connection"].to_list() == [1, 1, 2, 2]


def test_a_stray_vote_is_overruled(tmp_path):
    """A read that was put off comes after what another connection received."""
    reads = [text(start, 10, True) for start in (100, 200, 300, 400)]
    receives = [moved(start - 15, True, 1, start) for start in (100, 200, 300, 400)]
    found = tied(tmp_path, reads, [*receives, moved(287, True, 2, 9, duration_ns=1)])
    assert found["connection"].to_list() == [1] * 4
    assert found["stream_end"].to_list() == [100, 200, 300, 400]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (moved(110, True, 1, 5, tid=TID + 1), "its thread has no messages"),
        (moved(110, True, 1, 5, peek=True), "its thread has no messages"),
        (moved(500, True, 1, 5), "no message of its thread belongs to it"),
    ],
)
def test_what_cannot_be_tied_says_why(tmp_path, message, reason):
    (row,) = tied(tmp_path, [text(100, 50, True, payload=b"GET")], [message]).to_dicts()
    assert row["untied"] == reason
    assert row["payload"] == b"GET"
    assert {row[name] for name in ("connection", "stream", "stream_end", "kind", "fd")} == {None}


def test_nothing_at_all(tmp_path):
    assert tied(tmp_path, [], [moved(1, True, 1, 5)]).is_empty()
    assert tied(tmp_path / "b", [text(100, 50, True)], [])["connection"].to_list() == [None]
    assert tied(tmp_path / "c", [], []).is_empty()
