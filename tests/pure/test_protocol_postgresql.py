"""PostgreSQL's messages, made by hand after its manual; tests/live has those of real clients."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA, Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask, new_key
from scope_ebpf.protocols.postgresql import PROTOCOL

pytestmark = pytest.mark.pure


def message(kind: str, body: bytes = b"") -> bytes:
    return kind.encode() + (len(body) + 4).to_bytes(4, "big") + body


def heads_of(*values: bytes, missing: int = 0) -> Heads:
    totals = np.array([len(value) + missing for value in values])
    return Heads.of(pl.Series(values, dtype=pl.Binary), totals)


def role(value: bytes, missing: int = 0) -> int:
    return int(PROTOCOL.recognise(heads_of(value, missing=missing))[0])


def request(value: bytes) -> dict[str, object]:
    return PROTOCOL.parse_requests(heads_of(value)).row(0, named=True)


def response(value: bytes) -> dict[str, object]:
    return PROTOCOL.parse_responses(heads_of(value)).row(0, named=True)


SYNC = message("S")
READY = message("Z", b"I")
BIND = message("B", b"\0s1\0\0\0\0\1\0\0\0\3abc\0\0")
EXECUTE = message("E", b"\0\0\0\0\0")
PARSE = message("P", b"s1\0SELECT a FROM t WHERE b = $1\0\0\1\0\0\0\x17")
CLOSE = message("C", b"Ss_1\0")
STARTUP = b"\0\3\0\0user\0shop\0options\0-c x=topsecret\0\0"
STARTUP = (len(STARTUP) + 4).to_bytes(4, "big") + STARTUP
ROW = message("D", b"\0\2\0\0\0\3abc\xff\xff\xff\xff")
COLUMNS = message("T", b"\0\1a\0" + b"\0" * 18)
DONE = message("C", b"SELECT 3\0")
ERROR = message(
    "E", b"SERROR\0VERROR\0C23505\0Mduplicate key value topsecret\0DKey (a)=(topsecret)\0Fx.c\0\0"
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (message("Q", b"SELECT 1\0"), Role.REQUEST),
        (PARSE + BIND + EXECUTE + SYNC, Role.REQUEST),
        (EXECUTE + SYNC, Role.REQUEST),
        (CLOSE + SYNC, Role.REQUEST),
        (message("D", b"Ss1\0") + SYNC, Role.REQUEST),
        (SYNC, Role.REQUEST),
        (message("X"), Role.REQUEST),
        (message("d", b"1\t2\n") + message("c"), Role.REQUEST),
        (STARTUP, Role.REQUEST),
        (b"\0\0\0\x08\x04\xd2\x16\x2f", Role.REQUEST),
        (message("1") + message("2") + COLUMNS + ROW + DONE + READY, Role.RESPONSE),
        (DONE + READY, Role.RESPONSE),
        (ERROR + READY, Role.RESPONSE),
        (ROW + DONE + READY, Role.RESPONSE),
        (message("d", b"1\t2\n") + message("c") + message("C", b"COPY 1\0") + READY, Role.RESPONSE),
        (message("R", b"\0\0\0\0"), Role.RESPONSE),
        (message("S", b"TimeZone\0UTC\0"), Role.RESPONSE),
        (b"S", Role.NONE),
        (b"GET / HTTP/1.1\r\n\r\n", Role.NONE),
        (b"PING\r\n", Role.NONE),
        (b"", Role.NONE),
        (message("Q", b"SELECT 1\0") + b"junk.", Role.NONE),
    ],
)
def test_roles(value, expected):
    assert role(value) == expected


def test_truncated_heads_are_recognised():
    whole = message("1") + message("2") + COLUMNS + ROW * 50 + DONE + READY
    for length in (30, 100, 512):
        assert role(whole[:length], len(whole) - length) == Role.RESPONSE
    text = message("Q", b"INSERT INTO t VALUES ('" + b"x" * 2000 + b"')\0")
    assert role(text[:512], len(text) - 512) == Role.REQUEST


def test_requests():
    whole = request(PARSE + BIND + EXECUTE + BIND + EXECUTE + SYNC)
    assert whole["operation"] == "SELECT a FROM t WHERE b = ?"
    assert whole["detail"] == "SELECT a FROM t WHERE b = $1"
    assert (whole["defines"], whole["uses"], whole["requests"]) == ("s1", None, 2)
    later = request(BIND + EXECUTE + SYNC)
    assert (later["operation"], later["detail"]) == ("EXECUTE s1", None)
    assert (later["defines"], later["uses"]) == (None, "s1")
    begin = message("P", b"\0BEGIN\0\0\0")
    assert request(begin + BIND + EXECUTE + PARSE + BIND + EXECUTE)["defines"] == "s1"
    assert request(begin + EXECUTE)["operation"] == "BEGIN"
    assert request(message("Q", b"BEGIN; DELETE FROM t;\0"))["operation"] == "BEGIN; DELETE FROM t"
    assert request(message("X"))["answered"] is False
    cancel = b"\0\0\0\x10\x04\xd2\x16\x2e" + b"12345678"
    assert request(cancel)["operation"] == "CancelRequest"
    assert request(cancel)["answered"] is False
    assert request(STARTUP)["operation"] == "startup"
    assert request(b"\xffnothing at all")["operation"] is None


def test_responses():
    fine = response(message("1") + message("2") + COLUMNS + ROW * 9 + DONE + READY)
    assert (fine["status"], fine["error"], fine["transaction"]) == ("SELECT 3", None, "I")
    assert (fine["miss"], fine["interim"]) == (None, False)
    late = response(message("2") + ROW + ERROR + message("Z", b"E"))
    assert (late["status"], late["transaction"]) == ("23505", "E")
    assert late["error"] == "23505 duplicate key value topsecret"
    fatal = response(message("E", b"SFATAL\0C57P01\0Mterminating\0\0"))
    assert fatal["error"] == "FATAL 57P01 terminating"
    assert response(message("C", b"BEGIN\0") + message("C", b"DELETE 2\0"))["status"] == "DELETE 2"
    assert response(message("1") + READY)["status"] == "OK"
    told = response(message("A", b"\0\0\0\7mails\0job 7\0"))
    assert (told["queue"], told["element"], told["interim"]) == ("mails", "job 7", True)
    assert response(b"N")["status"] == "N"
    assert response(b"\xff garbage")["status"] is None


def test_masked_heads_say_the_same_without_the_secrets():
    asked = [
        message("Q", b"UPDATE t SET a = 'topsecret' WHERE b = 4711\0"),
        message("P", b"s1\0SELECT 'topsecret', $1\0\0\0") + BIND.replace(b"abc", b"777") + SYNC,
        STARTUP,
        message("p", b"topsecret\0"),
        message("d", b"topsecret\n") + message("c"),
        message("Q", b"NOTIFY mails, 'topsecret'\0"),
    ]
    told = [
        COLUMNS + ROW.replace(b"abc", b"777") + DONE + READY,
        ERROR + READY,
        message("A", b"\0\0\0\7mails\0topsecret\0"),
        message("R", b"\0\0\0\x0btopsecret"),
    ]
    for values, parse, same in (
        (asked, PROTOCOL.parse_requests, ["operation", "queue", "defines", "uses"]),
        (told, PROTOCOL.parse_responses, ["status", "queue", "transaction"]),
    ):
        heads = heads_of(*values)
        roles = PROTOCOL.recognise(heads)
        masked = mask(heads, PROTOCOL.keep(heads, roles), new_key())
        assert PROTOCOL.recognise(masked).tolist() == roles.tolist()
        assert parse(masked).select(same).equals(parse(heads).select(same))
        for secret in (b"topsecret", b"4711", b"777"):
            assert secret in heads.data.tobytes() or secret == b"4711"
            assert secret not in masked.data.tobytes()
        if values is told:
            assert parse(masked)["error"][1] == "23505 unique violation"


def test_random_bytes_are_not_claimed():
    chance = np.random.default_rng(7)
    lengths = chance.integers(0, 200, 200_000)
    data = chance.integers(0, 256, lengths.sum(), dtype=np.uint8)
    totals = lengths + chance.integers(0, 2, len(lengths)) * chance.integers(
        0, 100_000, len(lengths)
    )
    heads = Heads(data, np.cumsum(lengths) - lengths, lengths, totals)
    assert np.count_nonzero(PROTOCOL.recognise(heads)) < 20


def test_mutated_messages_do_no_harm():
    chance = np.random.default_rng(8)
    seeds = [PARSE + BIND + EXECUTE + SYNC, COLUMNS + ROW + ERROR + READY, STARTUP]
    values = []
    for number in range(6000):
        value = bytearray(seeds[number % 3])
        for _ in range(3):
            value[chance.integers(len(value))] = chance.choice([0, 1, 4, 255, 39, 36, 83, 69])
        values.append(bytes(value[: chance.integers(1, len(value) + 1)]))
    heads = heads_of(*values)
    kept = PROTOCOL.keep(heads, chance.integers(0, 3, len(heads)).astype(np.uint8))
    assert kept.shape == heads.data.shape
    assert PROTOCOL.parse_requests(heads).schema == REQUEST_SCHEMA
    assert PROTOCOL.parse_responses(heads).schema == RESPONSE_SCHEMA
    assert not PROTOCOL.keep(heads, np.zeros(len(heads), np.uint8)).any()
