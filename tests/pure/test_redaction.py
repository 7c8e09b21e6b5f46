"""Redaction of a recording's payloads: what of a connection is masked, and what may be read."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.contract import Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.http import PROTOCOL as HTTP
from scope_ebpf.protocols.redis import PROTOCOL as REDIS
from scope_ebpf.protocols.registry import PROTOCOLS
from scope_ebpf.recording.meta import read_meta, write_meta
from scope_ebpf.recording.redaction import Redactor
from tests.pure.recordings import META

pytestmark = pytest.mark.pure

SECRET = b"hunter2secret"
GET = b"*2\r\n$3\r\nGET\r\n$10\r\nproduct:17\r\n"
REPLY = b"$13\r\nhunter2secret\r\n"
WEB = b"POST /login?token=hunter2secret HTTP/1.1\r\nHost: a\r\nCookie: s=hunter2secret\r\n\r\n"


def messages(rows: list[tuple[int, bytes | None]]) -> pl.DataFrame:
    """Messages of some connections, by time."""
    return pl.DataFrame(
        {
            "start_ns": range(len(rows)),
            "connection": pl.Series([connection for connection, _ in rows], dtype=pl.UInt32),
            "receive": [False] * len(rows),
            "length_bytes": pl.Series([len(head or b"") for _, head in rows], dtype=pl.UInt32),
            "payload": pl.Series([head for _, head in rows], dtype=pl.Binary),
        }
    )


def redacted(rows: list[tuple[int, bytes | None]], redactor: Redactor | None = None) -> list[Any]:
    frame = messages(rows)
    result = (redactor or Redactor(unredacted=False)).redact(frame)
    assert result.drop("payload").equals(frame.drop("payload"))
    assert result.schema == frame.schema
    return result["payload"].to_list()


def test_lengths_and_missing_payloads_stay():
    rows = [(1, GET), (1, None), (2, b""), (3, WEB), (1, REPLY), (4, b"\x16\x03\x01\xff")]
    for (_, before), after in zip(rows, redacted(rows), strict=True):
        assert (before is None) == (after is None)
        assert len(before or b"") == len(after or b"")
        assert SECRET not in (after or b"")


def test_each_connection_is_read_by_its_protocol():
    request, reply, web = redacted([(1, GET), (1, REPLY), (2, WEB)])
    assert request.startswith(b"*2\r\n$3\r\nGET\r\n$10\r\nproduct:?")
    assert reply.startswith(b"$13\r\n?")
    assert web.startswith(b"POST /login?")


def test_what_the_known_protocol_does_not_recognise_is_masked_wholly():
    body = b"plain words"
    redactor = Redactor(unredacted=False)
    alone = redacted([(9, GET)], redactor)[0]
    web, inside, words = redacted([(1, WEB), (1, GET), (1, body)], redactor)
    assert b"POST" in web
    assert b"GET" in alone
    assert b"GET" not in inside and b"product" not in inside, "a body that looks like Redis"
    assert b"plain" not in words
    # it is remembered from one batch to the next
    later = redacted([(1, GET), (2, GET)], redactor)
    assert b"GET" not in later[0]
    assert later[1] == alone


def test_what_nobody_recognises_is_masked_wholly():
    choose = random.Random(1)
    rows: list[tuple[int, bytes | None]]
    rows = [(number, choose.randbytes(60)) for number in range(500)]
    rows += [(1000, b"\x17\x03\x03\x00\x30" + choose.randbytes(48)), (1001, b"USER bob PASS x1y2")]
    for (_, before), after in zip(rows, redacted(rows), strict=True):
        assert before is not None
        for first in range(len(before) - 7):
            assert before[first : first + 8] != after[first : first + 8]


def test_equal_words_are_equal_tokens_everywhere():
    redactor = Redactor(unredacted=False)
    job = b"5f7c2b1a-aaaa-bbbb-cccc-0123456789ab"
    push = b"*3\r\n$5\r\nLPUSH\r\n$6\r\ncelery\r\n$36\r\n" + job + b"\r\n"
    first = redacted([(1, push)], redactor)[0]
    second = redacted([(2, b"$36\r\n" + job + b"\r\n"), (3, b"job " + job)], redactor)
    token = first[-38:-2]
    assert b"celery" in first
    assert job not in first
    assert second[0] == b"$36\r\n" + token + b"\r\n"
    assert second[1][4:] == token
    assert redacted([(1, push)])[0] != first, "each recording has its own key"


def test_tls_connections_are_told_apart_by_process_and_object():
    frame = messages([(0, WEB), (0, GET), (0, GET)]).drop("connection")
    frame = frame.with_columns(
        tgid=pl.Series([1, 1, 2], dtype=pl.UInt32), ssl=pl.Series([5, 5, 5], dtype=pl.UInt64)
    )
    frames = {"tls": frame, "offcpu": pl.DataFrame({"start_ns": [1]})}
    Redactor(unredacted=False).redact_all(frames)
    web, inside, other = frames["tls"]["payload"].to_list()
    assert b"POST" in web
    assert b"GET" not in inside
    assert b"GET" in other
    assert frames["offcpu"].equals(pl.DataFrame({"start_ns": [1]}))


def test_unredacted_touches_nothing():
    rows = [(1, GET), (1, None), (2, WEB)]
    assert redacted(rows, Redactor(unredacted=True)) == [head for _, head in rows]


def test_redacted_heads_are_recognised_and_parsed():
    request, _, web = redacted([(1, GET), (1, REPLY), (2, WEB)])
    for protocol, head in ((REDIS, request), (HTTP, web)):
        frame = messages([(1, head)])
        heads = Heads.of(frame["payload"], frame["length_bytes"].to_numpy().astype("int64"))
        assert protocol.recognise(heads).tolist() == [Role.REQUEST]
        assert protocol.parse_requests(heads)["operation"].to_list()[0] in (
            "GET product:?",
            "POST /login",
        )


def test_equal_heads_of_different_connections_are_masked_each_by_its_protocol():
    redactor = Redactor(unredacted=False)
    redacted([(1, GET), (2, WEB), (3, b"nobody knows")], redactor)
    rows: list[tuple[int, bytes | None]]
    rows = [(connection, head) for head in (GET, WEB, REPLY) for connection in (1, 2, 3, 1)]
    together = redacted(rows, redactor)
    assert together == [redacted([row], redactor)[0] for row in rows]
    assert len(set(together[:4])) == 2, "Redis's request is masked wholly on the others"


def test_one_look_says_what_two_say():
    choose = random.Random(2)
    heads = [
        GET,
        REPLY,
        WEB,
        b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n",
        b"Q\0\0\0\x10SELECT 'a'\0",
        b"D\0\0\0\x0b\0\1\0\0\0\1aZ\0\0\0\5I",
        b"",
    ]
    for head in [head for head in heads for _ in range(300)]:
        changed = bytearray(head[: choose.randrange(len(head) + 1)] + choose.choice(heads))
        if changed and choose.random() < 0.5:
            changed[choose.randrange(len(changed))] = choose.choice(b"\0\r\n$*'1?")
        heads.append(bytes(changed))
    # what is cut off goes on for some bytes
    lengths = np.array([len(head) + choose.choice([0, 0, 7]) for head in heads], np.int64)
    every = Heads.of(pl.Series(heads, dtype=pl.Binary), lengths)
    for protocol in PROTOCOLS:
        if protocol.recognise_and_keep is None:
            continue
        for some in (every, every.take(np.zeros(0, np.intp)), every.take(np.array([6]))):
            roles, kept = protocol.recognise_and_keep(some)
            recognised = protocol.recognise(some)
            assert roles.tolist() == recognised.tolist()
            wanted = protocol.keep(some, recognised) & np.repeat(recognised > 0, some.lengths)
            assert kept.tolist() == wanted.tolist()
        assert {Role.REQUEST, Role.RESPONSE} <= set(protocol.recognise(every).tolist())


def test_meta_tells_whether_payloads_are_redacted(tmp_path):
    assert not META.redacted, "a recording that does not say so was made before"
    for value in (True, False):
        write_meta(tmp_path, type(META)(**{**vars(META), "redacted": value}))
        assert read_meta(tmp_path).redacted is value
