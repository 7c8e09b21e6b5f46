"""memcached's text protocol: what is recognised, told and stored."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from pymemcache.client.base import Client

from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA, Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask
from scope_ebpf.protocols.memcached import PROTOCOL

pytestmark = pytest.mark.pure


def heads(*payloads: bytes, cut_bytes: int = 0) -> Heads:
    totals = np.array([len(payload) + cut_bytes for payload in payloads], np.int64)
    return Heads.of(pl.Series(payloads, dtype=pl.Binary), totals)


def masked(payload: bytes) -> bytes:
    """The payload as a redacted recording holds it."""
    head = heads(payload)
    stored = mask(head, PROTOCOL.keep(head, PROTOCOL.recognise(head)), bytes(16))
    return stored.data.tobytes()


def request(payload: bytes, cut_bytes: int = 0) -> tuple[object, ...]:
    head = heads(payload, cut_bytes=cut_bytes)
    assert PROTOCOL.recognise(head).tolist() == [Role.REQUEST]
    frame = PROTOCOL.parse_requests(head)
    assert frame.schema == REQUEST_SCHEMA
    return frame.select("operation", "requests", "answered").row(0)


def response(payload: bytes) -> tuple[object, ...]:
    head = heads(payload)
    assert PROTOCOL.recognise(head).tolist() == [Role.RESPONSE]
    frame = PROTOCOL.parse_responses(head)
    assert frame.schema == RESPONSE_SCHEMA
    return frame.select("status", "error", "miss").row(0)


@pytest.mark.parametrize(
    ("payload", "operation", "requests", "answered"),
    [
        (b"get user:17\r\n", "get user:?", 1, True),
        (b"gets user:17 user:18\r\n", "gets user:? …", 1, True),
        (b"gat 60 user:17\r\n", "gat user:?", 1, True),
        (b"get :1:Key_17\r\n", "get :?:?", 1, True),
        (b"set user:17 0 60 6\r\nget a\r\n\r\n", "set user:?", 1, True),
        (b"cas user:17 0 60 1 99 noreply\r\na\r\n", "cas user:?", 1, False),
        (b"delete user:17 noreply\r\n", "delete user:?", 1, False),
        (b"incr hits:17 5\r\n", "incr hits:?", 1, True),
        (b"touch user:17 60\r\n", "touch user:?", 1, True),
        (b"flush_all noreply\r\n", "flush_all", 1, False),
        (b"stats items\r\n", "stats", 1, True),
        (b"version\r\n", "version", 1, True),
        (b"quit\r\n", "quit", 1, False),
        (b"mg user:17 v t Oabc\r\n", "mg user:?", 1, True),
        (b"ms user:17 2 T60\r\nab\r\n", "ms user:?", 1, True),
        (b"mg user:17 q\r\nmg user:18 q\r\nmn\r\n", "mg user:?", 1, True),
        (b"get a:1\r\n" * 7, "get a:?", 7, True),
        (b"set a:1 0 0 3 noreply\r\nabc\r\n" * 3, "set a:?", 3, False),
        (b"set a:1 0 0 9\r\nget b\r\n\r\n\r\nget c\r\n", "set a:?", 2, True),
        (b"set a:1 0 0 900\r\nabc", "set a:?", 1, True),
    ],
)
def test_requests_clear_and_masked(payload, operation, requests, answered):
    assert request(payload) == (operation, requests, answered)
    assert request(masked(payload)) == (operation, requests, answered)


def test_words_of_keys_are_told_where_the_head_is_clear():
    assert request(b"get user:17:profile\r\n")[0] == "get user:?:profile"
    assert request(b"get settings\r\n")[0] == "get settings"


def test_a_command_that_is_longer_than_the_head():
    assert request(b"get user:17 user:18 us", cut_bytes=90)[0] == "get user:? …"


@pytest.mark.parametrize(
    ("payload", "status", "error", "miss"),
    [
        (b"VALUE user:17 0 6\r\nsecret\r\nEND\r\n", "hit", None, False),
        (b"END\r\n", "miss", None, True),
        (b"STORED\r\n", "STORED", None, False),
        (b"NOT_STORED\r\n", "NOT_STORED", None, False),
        (b"EXISTS\r\n", "EXISTS", None, False),
        (b"NOT_FOUND\r\n", "NOT_FOUND", None, True),
        (b"DELETED\r\n", "DELETED", None, False),
        (b"1234\r\n", "OK", None, False),
        (b"VA 2 t60\r\nab\r\n", "hit", None, False),
        (b"EN\r\n", "miss", None, True),
        (b"HD\r\n", "HD", None, False),
        (b"ERROR\r\n", "ERROR", "ERROR", False),
        (b"CLIENT_ERROR bad data chunk\r\n", "CLIENT_ERROR", "CLIENT_ERROR bad data chunk", False),
        (b"SERVER_ERROR out of memory\r\n", "SERVER_ERROR", "SERVER_ERROR out of memory", False),
        (b"STAT pid 17\r\nEND\r\n", "STAT", None, False),
    ],
)
def test_responses_clear_and_masked(payload, status, error, miss):
    assert response(payload) == (status, error, miss)
    assert response(masked(payload)) == (status, error, miss)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"get\r\n",
        b"get \r\n",
        b"GET a\r\n",
        b"set a b\r\n",
        b"set a 0 0\r\n",
        b"getting on\r\n",
        b"get a",
        b"END",
        b"OK ready\r\n",
        b"12\r\n34\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_memcached(payload):
    assert PROTOCOL.recognise(heads(payload)).tolist() == [Role.NONE]


@pytest.mark.parametrize(
    "payload",
    [
        b"get SECRET1\r\n",
        b"get user:SECRET1 SECRET2:x SECRET3\r\n",
        b"get user_17:SECRET1\r\n",
        b"gat 60 SECRET1\r\n",
        b"set user:SECRET1 0 60 16\r\nget user SECRET2\r\nget SECRET3\r\n",
        b"set user:1 0 60 2\r\nSECRET1\r\nSECRET2",
        b"incr a SECRET1\r\n",
        b"mg a:SECRET1 OSECRET2 v\r\n",
        b"ms a 7 OSECRET2\r\nSECRET1\r\n",
        b"VALUE user:SECRET1 0 7\r\nSECRET2\r\nEND\r\n",
        b"VA 7 OSECRET1 kSECRET2\r\nSECRET3\r\n",
        b"STAT a SECRET1\r\nSTAT b SECRET2\r\n",
    ],
)
def test_secrets_are_not_kept(payload):
    stored = masked(payload)
    assert b"SECRET" not in stored
    assert len(stored) == len(payload)
    assert stored.split()[0] == payload.split()[0]


def test_keep_finds_its_bytes_among_other_heads():
    both = heads(b"get SECRET\r", b"get user:1\r\n", b"", b"END\r\n", b"x", b"delete user:2\r\n")
    roles = PROTOCOL.recognise(both)
    assert roles.tolist() == [0, 1, 0, 2, 0, 1]
    shown = np.where(PROTOCOL.keep(both, roles), both.data, ord("*")).astype(np.uint8).tobytes()
    assert (
        shown == b"*" * 11 + b"get user**\r\n"[:10] + b"**" + b"END\r\n" + b"*" + b"delete user****"
    )


class Wire:
    """A connection that keeps what a client sends, and answers with what is in `answers`."""

    def __init__(self, answers: bytes) -> None:
        self.answers, self.sent = answers, b""

    def sendall(self, payload: bytes) -> None:
        self.sent += payload

    def recv(self, size: int) -> bytes:
        piece, self.answers = self.answers[:size], self.answers[size:]
        return piece

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("call", "answer", "told"),
    [
        (lambda client: client.get("user:17"), b"END\r\n", ("get user:?", 1, True)),
        (lambda client: client.get_many(["a:1", "a:2"]), b"END\r\n", ("get a:? …", 1, True)),
        (lambda client: client.set("user:17", "v"), b"", ("set user:?", 1, False)),
        (
            lambda client: client.set_many({"a:1": "v", "a:2": "w"}, noreply=False),
            b"STORED\r\nSTORED\r\n",
            ("set a:?", 2, True),
        ),
        (lambda client: client.incr("hits:17", 1), b"8\r\n", ("incr hits:?", 1, True)),
        (
            lambda client: client.delete("a:1", noreply=False),
            b"DELETED\r\n",
            ("delete a:?", 1, True),
        ),
    ],
)
def test_what_pymemcache_sends(call, answer, told):
    client = Client(("127.0.0.1", 1))
    wire = Wire(answer)
    client.sock = wire
    call(client)
    assert request(wire.sent) == told
