"""A million random and mutated heads for the parsers: none fails, hangs or claims what is not its own.

Each input goes to every protocol, so the million is one per protocol. Rows are made and changed as
matrices, so that it takes seconds.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import scope_ebpf.protocols
from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA, Protocol, Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask

pytestmark = [pytest.mark.pure, pytest.mark.timeout(120)]


def protocols() -> list[Protocol]:
    """Every protocol of the package."""
    modules = (
        importlib.import_module(f"scope_ebpf.protocols.{module.name}")
        for module in pkgutil.iter_modules(scope_ebpf.protocols.__path__)
    )
    return [
        value
        for module in modules
        if isinstance(value := getattr(module, "PROTOCOL", None), Protocol)
    ]


PROTOCOLS = protocols()

# What real software sends, for each protocol; mutations of these reach deeper than random bytes do.
SAMPLES: dict[str, list[bytes]] = {
    "http": [
        b"GET /users/17?full=1 HTTP/1.1\r\nHost: shop.example\r\nUser-Agent: curl/7.88.1\r\n"
        b"Accept: */*\r\nCookie: session=abcdef0123456789\r\n\r\n",
        b"GET http://joe:pw@shop.example/joe@example.com;a=b/c%40d#e HTTP/1.0\r\n\r\n",
        b'POST /orders HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"id": 1}GET /a HTTP/1.1\r\n\r\n',
        b"CONNECT shop.example:443 HTTP/1.1\r\nHost: shop.example:443\r\n\r\n",
        b"GET /a HTTP/1.1\r\n\r\n" * 20,
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 Internal Server Error\r\nServer: a\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
    "dns": [
        bytes.fromhex("1a2b01000001000000000000") + b"\x03www\x07example\x03com\0\0\x01\0\x01",
        bytes.fromhex("1a2b81830001000000010000") + b"\x03www\x07example\x03com\0\0\x01\0\x01"
        b"\xc0\x10\0\x06\0\x01\0\0\x0e\x10\0\x04\x01a\xc0\x10",
        bytes.fromhex("1a2b01200001000000000001") + b"\x01a" * 60 + b"\0\0\x1c\0\x01"
        b"\0\0\x29\x04\xd0\0\0\0\0\0\0",
    ],
    "memcached": [
        b"get user:17 user:18 :1:a.b/c|d\r\n",
        b"set user:17 0 60 6\r\nsecret\r\nset user:18 0 60 6 noreply\r\nsecret\r\nincr hits:1 5\r\n",
        b"mg user:17 v q Oabc\r\nms user:17 2 T60\r\nab\r\nmn\r\n",
        b"gets a\r\n" * 40,
        b"VALUE user:17 0 6\r\nsecret\r\nEND\r\n",
        b"STAT pid 17\r\nSTAT version 1.6.18\r\nEND\r\n",
        b"CLIENT_ERROR bad data chunk\r\n",
        b"1234\r\n",
    ],
    "redis": [
        b"*3\r\n$3\r\nSET\r\n$7\r\nuser:17\r\n$6\r\nsecret\r\n",
        b"*1\r\n$5\r\nMULTI\r\n*2\r\n$4\r\nINCR\r\n$1\r\na\r\n*1\r\n$4\r\nEXEC\r\n",
        b"*3\r\n$5\r\nBRPOP\r\n$6\r\nrq:jobs\r\n$1\r\n0\r\n",
        b'*2\r\n$4\r\njobs\r\n$13\r\n{"id": "abc"}\r\n',
        b"*4\r\n$7\r\nmessage\r\n:12\r\n$-1\r\n*-1\r\n",
        b"%1\r\n+server\r\n$5\r\nredis\r\n_\r\n#t\r\n,1.5\r\n",
        b"-WRONGTYPE Operation against a key\r\n",
        b"$-1\r\n",
        b"+OK\r\n:1\r\n",
        b"*99999999999999999999\r\n$99999999999\r\n",
        b"*1\r\n" * 100,
    ],
    "postgresql": [
        bytes.fromhex("0000002900030000") + b"user\0app\0database\0shop\0\0\0\0\0\0\0\0\0\0",
        bytes.fromhex("0000000804d2162f"),
        b"Q\0\0\0\x2bSELECT name FROM users WHERE id = 17 -- a\0",
        b"P\0\0\0\x1cs1\0SELECT $1::int AS a\0\0\0B\0\0\0\x13\0s1\0\0\0\0\x01\0\0\0\x0217\0\0"
        b"D\0\0\0\x06P\0E\0\0\0\x09\0\0\0\0\0S\0\0\0\x04",
        b"T\0\0\0\x1d\0\x01name\0\0\0\x40\x01\0\x02\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0"
        b"D\0\0\0\x0d\0\x01\0\0\0\x03joeC\0\0\0\x0dSELECT 1\0Z\0\0\0\x05I",
        b"E\0\0\0\x32SERROR\0VERROR\0C23505\0Mduplicate key value\0\0Z\0\0\0\x05E",
        b"1\0\0\0\x04" + b"2\0\0\0\x04" + b"n\0\0\0\x04" + b"C\0\0\0\x0bCOMMIT\0Z\0\0\0\x05I",
        b"X\0\0\0\x04",
        b"Q\0\0\0\x80SELECT '" + b"''" * 200,
        b"Q\0\0\1\x80SELECT " + b"((/* $a$" * 40,
    ],
    "mysql": [
        b"\x22\0\0\0\x03SELECT name FROM users WHERE id=17",
        b"\x1d\0\0\0\x16SELECT a FROM b WHERE c = ? ",
        b"\x12\0\0\0\x17\x01\0\0\0\0\x01\0\0\0\0\x01\x08\0\x11\0\0\0",
        b"\x07\0\0\x01\0\0\0\x02\0\0\0",
        b"\x0c\0\0\x01\0\x01\0\0\0\x01\0\x01\0\0\0\0",
        b"\x1d\0\0\x01\xff\x26\x04#23000Duplicate entry '17'",
        b"\x01\0\0\x01\x01\x1c\0\0\x02\x03def\x04shop\x05users\x05users\x04name\x04name\x0c\x2d\0\xff\0\0\0",
        b"J\0\0\0\x0a8.0.35\0\x08\0\0\0abcdefgh\0\xff\xff\xff\x02\0\xff\xdf\x15" + b"\0" * 10,
        b"\x01\0\0\0\x01",
        b"\x01\0\0\0\x0e",
    ],
}
CORPUS = [sample for samples in SAMPLES.values() for sample in samples]
LONGEST = 600

Matrix = NDArray[np.uint8]
Lengths = NDArray[np.int64]


def flat(rows: Matrix, lengths: Lengths, cut_bytes: Lengths) -> Heads:
    """Heads of the first bytes of each row."""
    inside = np.arange(rows.shape[1]) < lengths[:, None]
    return Heads(rows[inside], np.cumsum(lengths) - lengths, lengths, lengths + cut_bytes)


def random_bytes(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    rows = random.integers(0, 256, (count, LONGEST), dtype=np.uint8)
    return rows, random.integers(0, LONGEST + 1, count)


def short_bytes(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    return random.integers(0, 256, (count, 40), dtype=np.uint8), random.integers(0, 41, count)


def printable(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    """Text with many spaces, newlines and marks."""
    letters = np.frombuffer(
        bytes(range(0x20, 0x7F)) + b" \r\n\r\n\r\n  ??//::%%$$**00112233", np.uint8
    )
    return letters[random.integers(0, len(letters), (count, 200))], random.integers(0, 201, count)


def _samples(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    table = np.zeros((len(CORPUS), LONGEST), np.uint8)
    for row, sample in enumerate(CORPUS):
        table[row, : len(sample)] = np.frombuffer(sample, np.uint8)[:LONGEST]
    chosen = random.integers(0, len(CORPUS), count)
    sizes = np.array([min(len(sample), LONGEST) for sample in CORPUS])
    return table[chosen], sizes[chosen]


def flipped(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    """Real heads with 1 to 4 bytes changed, by a bit or altogether."""
    rows, lengths = _samples(random, count)
    line = np.arange(count)
    for _ in range(4):
        places = (random.random(count) * lengths).astype(np.int64)
        bits = np.left_shift(1, random.integers(0, 8, count)).astype(np.uint8)
        other = random.integers(0, 256, count, dtype=np.uint8)
        old = rows[line, places]
        kind = random.integers(0, 3, count)
        rows[line, places] = np.where(kind == 0, old, np.where(kind == 1, old ^ bits, other))
    return rows, lengths


def truncated(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    rows, lengths = flipped(random, count)
    return rows, (random.random(count) * (lengths + 1)).astype(np.int64)


def spliced(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    """The beginning of one head and the end of another."""
    rows, lengths = _samples(random, count)
    others, other_lengths = _samples(random, count)
    cuts = (random.random(count) * lengths).astype(np.int64)
    column = np.arange(LONGEST)
    moved = (column - cuts[:, None]) + (random.random(count) * other_lengths).astype(int)[:, None]
    tails = np.take_along_axis(others, np.clip(moved, 0, LONGEST - 1), axis=1)
    rows = np.where(column < cuts[:, None], rows, tails)
    return rows, random.integers(cuts, LONGEST + 1)


def repeated(random: np.random.Generator, count: int) -> tuple[Matrix, Lengths]:
    """A part of a head over and over."""
    rows, lengths = _samples(random, count)
    begins = (random.random(count) * lengths).astype(np.int64)
    sizes = random.integers(1, 40, count)
    column = np.arange(LONGEST)
    inside = (column - begins[:, None]) % sizes[:, None] + begins[:, None]
    places = np.where(column < begins[:, None], column, inside)
    rows = np.take_along_axis(rows, np.clip(places, 0, LONGEST - 1), axis=1)
    return rows, random.integers(begins, LONGEST + 1)


MAKERS: list[tuple[Callable[[np.random.Generator, int], tuple[Matrix, Lengths]], int]] = [
    (random_bytes, 200_000),
    (short_bytes, 150_000),
    (printable, 150_000),
    (flipped, 200_000),
    (truncated, 100_000),
    (spliced, 100_000),
    (repeated, 100_000),
]
BATCH = 25_000
assert sum(count for _, count in MAKERS) == 1_000_000


def check(protocol: Protocol, heads: Heads) -> NDArray[np.uint8]:
    """What the contract says of every function, for any heads; the roles."""
    roles = protocol.recognise(heads)
    assert roles.dtype == np.uint8
    assert roles.shape == (len(heads),)
    assert set(np.unique(roles)) <= set(Role)
    kept = protocol.keep(heads, roles)
    assert kept.dtype == np.bool_
    assert kept.shape == heads.data.shape
    kept_heads = np.concatenate(([0], np.cumsum(kept)))
    per_head = kept_heads[heads.begins + heads.lengths] - kept_heads[heads.begins]
    assert not per_head[roles == Role.NONE].any(), "kept bytes of what is not recognised"
    requests = heads.take(roles == Role.REQUEST)
    parsed = protocol.parse_requests(requests)
    assert parsed.schema == REQUEST_SCHEMA
    assert len(parsed) == len(requests)
    assert (parsed["requests"] >= 1).all()
    assert parsed["answered"].null_count() == parsed["waits"].null_count() == 0
    responses = heads.take(roles == Role.RESPONSE)
    parsed = protocol.parse_responses(responses)
    assert parsed.schema == RESPONSE_SCHEMA
    assert len(parsed) == len(responses)
    return roles


def test_the_corpus_is_recognised():
    """Else the mutations would all be of what a parser does not even look at."""
    assert {"http", "dns", "memcached"} <= {protocol.name for protocol in PROTOCOLS}
    for protocol in PROTOCOLS:
        samples = SAMPLES[protocol.name]
        totals = np.array([len(sample) for sample in samples])
        roles = protocol.recognise(Heads.of(pl.Series(samples, dtype=pl.Binary), totals))
        assert (roles != Role.NONE).sum() >= len(samples) // 2, protocol.name


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_a_million_inputs(protocol):
    claims = claimable = reached = 0
    for number, (maker, count) in enumerate(MAKERS):
        for batch in range(count // BATCH):
            random = np.random.default_rng([number, batch])
            rows, lengths = maker(random, BATCH)
            cut_bytes = random.integers(0, 2, BATCH) * random.integers(0, 100_000, BATCH)
            roles = check(protocol, flat(rows, lengths, cut_bytes))
            if maker in (random_bytes, short_bytes):
                long_enough = lengths >= 4
                claims += int((roles[long_enough] != Role.NONE).sum())
                claimable += int(long_enough.sum())
            else:
                reached += int((roles != Role.NONE).sum())
    assert claimable > 300_000
    assert claims * 10_000 < claimable, f"{claims} of {claimable} random heads were claimed"
    assert reached > 1_000


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
@pytest.mark.parametrize("maker", [flipped, truncated])
def test_masked_heads_are_recognised_as_they_were(protocol, maker):
    """Redaction must not hide what a message is: at most from 1 in 1,000 broken heads."""
    rows, lengths = maker(np.random.default_rng(3), 50_000)
    heads = flat(rows, lengths, np.zeros(len(rows), np.int64))
    roles = protocol.recognise(heads)
    stored = mask(heads, protocol.keep(heads, roles), bytes(16))
    claimed = roles != Role.NONE
    changed = int((protocol.recognise(stored) != roles)[claimed].sum())
    assert claimed.sum() > 100
    assert changed * 1_000 <= claimed.sum()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.binary(max_size=80) | st.sampled_from(CORPUS), max_size=6), st.integers(0, 3))
def test_any_few_heads_together(payloads, cut_bytes):
    totals = np.array([len(payload) + cut_bytes for payload in payloads], np.int64)
    heads = Heads.of(pl.Series(payloads, dtype=pl.Binary), totals)
    for protocol in PROTOCOLS:
        roles = check(protocol, heads)
        # A head means the same in whatever company it is.
        for row, role in enumerate(roles):
            alone = heads.take(np.array([row], np.intp))
            assert protocol.recognise(alone).tolist() == [role]
            begin = heads.begins[row]
            kept = protocol.keep(heads, roles)[begin : begin + heads.lengths[row]]
            assert (protocol.keep(alone, roles[row : row + 1]) == kept).all()


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_parsers_stand_heads_of_others(protocol):
    """A connection may be taken for what it is not, and bodies for beginnings."""
    for maker in (random_bytes, printable, truncated, spliced):
        random = np.random.default_rng(7)
        rows, lengths = maker(random, 5_000)
        heads = flat(rows, lengths, np.zeros(len(rows), np.int64))
        assert len(protocol.parse_requests(heads)) == len(heads)
        assert len(protocol.parse_responses(heads)) == len(heads)
        for role in (Role.REQUEST, Role.RESPONSE):
            kept = protocol.keep(heads, np.full(len(heads), role, np.uint8))
            assert kept.shape == heads.data.shape
