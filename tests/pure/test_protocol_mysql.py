"""MySQL's packets, made by hand after its manual; tests/live has those of real clients."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA, Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask, new_key
from scope_ebpf.protocols.mysql import PROTOCOL

pytestmark = pytest.mark.pure


def packet(sequence: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([sequence]) + payload


def heads_of(*values: bytes, missing: int = 0) -> Heads:
    totals = np.array([len(value) + missing for value in values])
    return Heads.of(pl.Series(values, dtype=pl.Binary), totals)


def request(value: bytes) -> dict[str, object]:
    return PROTOCOL.parse_requests(heads_of(value)).row(0, named=True)


def response(value: bytes) -> dict[str, object]:
    return PROTOCOL.parse_responses(heads_of(value)).row(0, named=True)


QUERY = packet(0, b"\x03SELECT a FROM t WHERE b = 'topsecret' AND c = 4711")
PREPARE = packet(0, b"\x16SELECT a FROM t WHERE b = ?")
EXECUTE = packet(0, b"\x17\x07\0\0\0\0\1\0\0\0\0\1\xfd\0\x09topsecret")
CLOSE = packet(0, b"\x19\x07\0\0\0")
QUIT = packet(0, b"\x01")
COLUMN = b"\x03def\4shop\1t\1t\x09topsecret\1a\x0c\x3f\0\1\0\0\0\x03\0\0\0\0\0"
PREPARED = packet(1, b"\0\7\0\0\0\0\0\1\0\0\0\0") + packet(2, COLUMN)
OK = packet(1, b"\0\1\0\3\0\0\0")
ERROR = packet(1, b"\xff\x26\x04#23000Duplicate entry 'topsecret' for key 'x'")
ROWS = (
    packet(1, b"\1") + packet(2, COLUMN) + packet(3, b"\xfe\0\0\2\0") + packet(4, b"\x09topsecret")
)
GREETING = packet(0, b"\x0a8.0.36\0" + b"\1\0\0\0topsecret\0" + b"\xff" * 40)
LOGIN = packet(1, b"\x0f\xa2\x3a\0\0\0\0\1\x21" + b"\0" * 23 + b"shop\0\x09topsecret")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(value, Role.REQUEST) for value in (QUERY, PREPARE, EXECUTE, CLOSE, QUIT, LOGIN)],
        (CLOSE + QUERY, Role.REQUEST),
        *[(value, Role.RESPONSE) for value in (PREPARED, OK, ERROR, ROWS, GREETING)],
        (b"", Role.NONE),
        (QUERY + b"junk", Role.NONE),
        (b"Q\0\0\0\x0dSELECT 1\0", Role.NONE),
        (b"+PONG\r\n", Role.NONE),
    ],
)
def test_roles(value, expected):
    assert PROTOCOL.recognise(heads_of(value))[0] == expected


def test_truncated_heads_are_recognised():
    text = packet(0, b"\x03INSERT INTO t VALUES ('" + b"x" * 2000 + b"')")
    assert PROTOCOL.recognise(heads_of(text[:512], missing=len(text) - 512))[0] == Role.REQUEST
    assert PROTOCOL.recognise(heads_of(ROWS, missing=70_000))[0] == Role.RESPONSE


def test_requests():
    asked = request(QUERY)
    assert asked["operation"] == "SELECT a FROM t WHERE b = ? AND c = ?"
    assert asked["detail"] == QUERY[5:].decode()
    assert (asked["requests"], asked["answered"], asked["uses"]) == (1, True, None)
    assert request(packet(0, b"\x03\0\1SELECT 1"))["operation"] == "SELECT ?"
    assert request(EXECUTE)["uses"] == "7"
    assert request(EXECUTE)["operation"] == "EXECUTE ?"
    assert request(CLOSE)["answered"] is False
    assert request(QUIT)["answered"] is False
    assert request(CLOSE + QUERY)["operation"] == asked["operation"]
    assert request(CLOSE + QUERY)["answered"] is True
    assert request(packet(0, b"\x02shop"))["operation"] == "InitDB"
    assert request(LOGIN)["operation"] == "login"
    assert request(b"\xff\xff\xff\xff\xff nothing")["operation"] is None


def test_responses():
    assert response(OK)["status"] == "OK"
    assert response(OK)["transaction"] == "T"
    assert response(ROWS)["status"] == "OK"
    assert response(PREPARED)["defines"] == "7"
    failed = response(ERROR)
    assert failed["status"] == "23000"
    assert failed["error"] == "1062 Duplicate entry 'topsecret' for key 'x'"
    assert failed["transaction"] is None


def test_masked_heads_say_the_same_without_the_secrets():
    for values, parse, same in (
        ([QUERY, PREPARE, EXECUTE, LOGIN], PROTOCOL.parse_requests, ["operation", "uses"]),
        (
            [PREPARED, OK, ERROR, ROWS, GREETING],
            PROTOCOL.parse_responses,
            ["status", "defines", "transaction"],
        ),
    ):
        heads = heads_of(*values)
        roles = PROTOCOL.recognise(heads)
        masked = mask(heads, PROTOCOL.keep(heads, roles), new_key())
        assert PROTOCOL.recognise(masked).tolist() == roles.tolist()
        assert parse(masked).select(same).equals(parse(heads).select(same))
        assert b"topsecret" in heads.data.tobytes()
        assert b"topsecret" not in masked.data.tobytes()
        assert b"4711" not in masked.data.tobytes()
        if values[0] is PREPARED:
            assert str(parse(masked)["error"][2]).startswith("1062 duplicate entry")


def test_random_bytes_are_not_claimed():
    chance = np.random.default_rng(7)
    lengths = chance.integers(0, 200, 200_000)
    data = chance.integers(0, 256, lengths.sum(), dtype=np.uint8)
    totals = lengths + chance.integers(0, 2, len(lengths)) * chance.integers(
        0, 100_000, len(lengths)
    )
    heads = Heads(data, np.cumsum(lengths) - lengths, lengths, totals)
    assert np.count_nonzero(PROTOCOL.recognise(heads)) < 20


def test_mutated_packets_do_no_harm():
    chance = np.random.default_rng(8)
    seeds = [QUERY, EXECUTE, ROWS, PREPARED, ERROR, LOGIN]
    values = []
    for number in range(6000):
        value = bytearray(seeds[number % len(seeds)])
        for _ in range(3):
            value[chance.integers(len(value))] = chance.choice([0, 1, 4, 255, 39, 35, 92, 254])
        values.append(bytes(value[: chance.integers(1, len(value) + 1)]))
    heads = heads_of(*values)
    kept = PROTOCOL.keep(heads, chance.integers(0, 3, len(heads)).astype(np.uint8))
    assert kept.shape == heads.data.shape
    assert PROTOCOL.parse_requests(heads).schema == REQUEST_SCHEMA
    assert PROTOCOL.parse_responses(heads).schema == RESPONSE_SCHEMA
    assert not PROTOCOL.keep(heads, np.zeros(len(heads), np.uint8)).any()
