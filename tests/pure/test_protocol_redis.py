"""Redis: what is recognised, kept and told of requests and replies, clear and masked."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA, Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import mask, new_key
from scope_ebpf.protocols.redis import PROTOCOL

pytestmark = pytest.mark.pure

KEY = new_key()
SHA = "0123456789abcdef0123456789abcdef01234567"


def heads_of(payloads: list[bytes], totals: list[int] | None = None) -> Heads:
    lengths = np.array([len(payload) for payload in payloads], np.int64)
    return Heads.of(
        pl.Series(payloads, dtype=pl.Binary), lengths if totals is None else np.array(totals)
    )


def command(*arguments: str | bytes) -> bytes:
    parts = [part.encode() if isinstance(part, str) else part for part in arguments]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)


def masked(heads: Heads) -> Heads:
    return mask(heads, PROTOCOL.keep(heads, PROTOCOL.recognise(heads)), KEY)


def request(payload: bytes) -> dict[str, Any]:
    """What one request tells; the role is checked, and that it survives masking."""
    heads = heads_of([payload])
    assert PROTOCOL.recognise(heads).tolist() == [Role.REQUEST]
    assert PROTOCOL.recognise(masked(heads)).tolist() == [Role.REQUEST]
    return PROTOCOL.parse_requests(heads).row(0, named=True)


def response(payload: bytes) -> dict[str, Any]:
    heads = heads_of([payload])
    assert PROTOCOL.recognise(heads).tolist() == [Role.RESPONSE]
    assert PROTOCOL.recognise(masked(heads)).tolist() == [Role.RESPONSE]
    return PROTOCOL.parse_responses(heads).row(0, named=True)


def kept_text(payload: bytes) -> str:
    text: str = masked(heads_of([payload])).text()[0]
    return text.replace("\r\n", " ").strip()


OPERATIONS = {
    command("GET", "product:17"): "GET product:?",
    command("get", "product:17"): "GET product:?",
    command("GET", "settings"): "GET settings",
    command("GET", "user:17:name"): "GET user:?:name",
    command("SET", "session:ab12", "x", "EX", "30"): "SET session:?",
    command("PING"): "PING",
    command("CLIENT", "SETINFO", "LIB-NAME", "redis-py"): "CLIENT SETINFO",
    command("EVALSHA", SHA, "1", "lock:17", "x"): "EVALSHA 01234567 lock:?",
    command("EVAL", "return redis.call('get', KEYS[1])", "1", "lock:17"): "EVAL lock:?",
    command("XREADGROUP", "GROUP", "g", "c", "COUNT", "1", "STREAMS", "orders", ">"): (
        "XREADGROUP orders"
    ),
    command("BRPOP", "celery", "1"): "BRPOP celery",
    command("LPUSH", "q", "a") + command("LTRIM", "q", "0", "9") + command("DEL", "x"): (
        "PIPELINE LPUSH, LTRIM, DEL"
    ),
    command("MULTI")
    + command("HSET", "rq:job:1", "a", "b")
    + command("RPUSH", "rq:queue:default", "1")
    + command("EXEC"): "MULTI HSET, RPUSH",
    b"PING\r\n": "PING",
}


@pytest.mark.parametrize(("payload", "operation"), OPERATIONS.items())
def test_operation(payload, operation):
    assert request(payload)["operation"] == operation


@pytest.mark.parametrize(
    "payload",
    [each for each, operation in OPERATIONS.items() if operation != "GET user:?:name"],
)
def test_operation_is_the_same_when_masked(payload):
    heads = heads_of([payload])
    clear, hidden = PROTOCOL.parse_requests(heads), PROTOCOL.parse_requests(masked(heads))
    same = ["operation", "requests", "answered", "waits", "queue_action"]
    assert clear.select(same).equals(hidden.select(same))


def test_detail_and_number_of_requests():
    payload = command("SET", "a", "1 2") + command("GET", "b") + command("INCR", "c")
    row = request(payload)
    assert row["detail"] == "SET a 1 2; GET b; INCR c"
    assert row["requests"] == 3
    both = PROTOCOL.parse_requests(heads_of([payload, command("GET", "z")]))
    assert both["detail"].to_list() == ["SET a 1 2; GET b; INCR c", "GET z"]
    assert both["requests"].to_list() == [3, 1]


@pytest.mark.parametrize(
    ("payload", "action", "queue", "element"),
    [
        (command("LPUSH", "celery", "{}"), "push", "celery", "{}"),
        (command("LPUSH", "celery", "a", "b"), "push", "celery", None),
        (command("RPUSH", "rq:queue:default", "id-1"), "push", "rq:queue:default", "id-1"),
        (
            command("MULTI") + command("SADD", "s", "x") + command("RPUSH", "q", "id-2")
            + command("EXEC"),
            "push", "q", "id-2",
        ),
        (command("LPUSH", "q", "1") + command("LPUSH", "q", "2"), "push", "q", None),
        (command("ZADD", "delayed", "1.5", "job"), "push", "delayed", "job"),
        (command("SADD", "set", "x"), None, None, None),
        (command("BRPOP", "celery", "celery2", "1"), "pop", "celery", None),
        (command("BLMOVE", "a", "b", "LEFT", "RIGHT", "0"), "pop", "a", None),
        (command("BLMPOP", "1", "2", "qa", "qb", "LEFT"), "pop", "qa", None),
        (command("XREAD", "BLOCK", "0", "STREAMS", "s", "$"), "pop", "s", None),
        (command("PUBLISH", "events", "hello"), "publish", "events", "hello"),
        (command("SUBSCRIBE", "events"), "subscribe", "events", None),
        (command("GET", "x"), None, None, None),
    ],
)  # fmt: skip
def test_queues(payload, action, queue, element):
    row = request(payload)
    assert (row["queue_action"], row["queue"], row["element"]) == (action, queue, element)


@pytest.mark.parametrize(
    ("payload", "waits"),
    [
        (command("BRPOP", "q", "1"), True),
        (command("RPOP", "q"), False),
        (command("XREAD", "BLOCK", "5", "STREAMS", "s", "$"), True),
        (command("XREAD", "STREAMS", "s", "$"), False),
        (command("SUBSCRIBE", "c"), True),
    ],
)
def test_waits(payload, waits):
    assert request(payload)["waits"] is waits


@pytest.mark.parametrize(
    ("payload", "status", "error", "miss"),
    [
        (b"+OK\r\n", "OK", None, False),
        (b"$-1\r\n", "nil", None, True),
        (b"*-1\r\n", "nil", None, True),
        (b"_\r\n", "nil", None, True),
        (b"$-1\r\n$-1\r\n", "nil", None, False),
        (b":42\r\n", "42", None, False),
        (b":-1\r\n", "-1", None, False),
        (b"*3\r\n:1\r\n:2\r\n:3\r\n", "*3", None, False),
        (b"*0\r\n", "*0", None, False),
        (b"%1\r\n$1\r\na\r\n:1\r\n", "%1", None, False),
        (b"#t\r\n", "t", None, False),
        (b"-ERR unknown command\r\n", "ERR", "ERR unknown command", False),
        (b"-WRONGTYPE Operation\r\n", "WRONGTYPE", "WRONGTYPE Operation", False),
        (b"+OK\r\n+QUEUED\r\n-EXECABORT no\r\n", "EXECABORT", "EXECABORT no", False),
        (b"$5\r\nhello\r\n", None, None, False),
    ],
)
def test_replies(payload, status, error, miss):
    row = response(payload)
    assert (row["status"], row["error"], row["miss"]) == (status, error, miss)


@pytest.mark.parametrize(
    ("payload", "queue", "element"),
    [
        (b"$5\r\nhello\r\n", None, "hello"),
        (b"$500\r\nhello", None, None),
        (command("celery", "{}"), "celery", "{}"),
        (command("delayed", "job", "1.5"), "delayed", "job"),
        (command("message", "events", "hi"), "events", "hi"),
        (command("pmessage", "ev*", "events", "hi"), "events", "hi"),
        (b">" + command("message", "events", "hi")[1:], "events", "hi"),
        (command("subscribe", "events")[:-8] + b"s\r\n", None, None),
    ],
)
def test_elements_that_come_out(payload, queue, element):
    row = PROTOCOL.parse_responses(heads_of([payload])).row(0, named=True)
    assert (row["queue"], row["element"]) == (queue, element)


@pytest.mark.parametrize(
    ("payload", "shown", "hidden"),
    [
        (command("SET", "user:hunter2", "s3cret", "EX", "30"), ["SET", "user:", "EX"],
         ["hunter2", "s3cret", "30 "]),
        (command("AUTH", "admin", "get"), ["AUTH"], ["admin", "get"]),
        (command("HELLO", "3", "AUTH", "admin", "pass"), ["HELLO", "AUTH"], ["admin", "pass"]),
        (command("RPUSH", "rq:queue:default", "left"), ["rq:queue:default"], ["left"]),
        (command("PUBLISH", "rq:pubsub:8c1d5e22f0", "x"), ["rq:pubsub:"], ["8c1d5e22f0"]),
        (command("EVAL", "secretscript", "1", "k", "v1"), ["EVAL", "k"], ["secretscript", "v1"]),
        (command("EVALSHA", SHA, "0", "v1"), [SHA], ["v1"]),
        (command("GET", "4111111111111111"), ["GET"], ["4111"]),
        (b"$6\r\ns3cret\r\n", ["$6"], ["s3cret"]),
        (b"*2\r\n$6\r\ns3cret\r\n:12345\r\n", ["*2 $6"], ["s3cret", "12345"]),
        (b"-ERR wrong 'hunter2'\r\n", ["-ERR"], ["hunter2", "wrong"]),
        (b"+OK\r\n+hunter2\r\n:7\r\n", ["+OK", ":7"], ["hunter2"]),
        (b">" + command("message", "events", "s3cret")[1:], ["message", "events"], ["s3cret"]),
        (b"INFO hunter2\r\n", ["INFO"], ["hunter2"]),
    ],
)  # fmt: skip
def test_kept_and_masked(payload, shown, hidden):
    text = kept_text(payload)
    assert [word for word in shown if word not in text] == [], text
    assert [word for word in hidden if word in text] == [], text


def test_element_has_the_same_tokens_at_both_ends():
    element = '{"id": "5f7c2b1a-0001", "n": [17]}'
    push = masked(heads_of([command("LPUSH", "celery", element)]))
    pop = masked(heads_of([command("celery", element)]))
    pushed = PROTOCOL.parse_requests(push)["element"][0]
    popped = PROTOCOL.parse_responses(pop)["element"][0]
    assert pushed == popped
    assert "5f7c2b1a" not in pushed
    assert len(pushed) == len(element)


def samples() -> list[bytes]:
    replies = [b"+OK\r\n", b"$-1\r\n", b":1\r\n", b"*2\r\n$1\r\na\r\n:1\r\n", b"-ERR x y\r\n",
               b"%1\r\n+a\r\n*1\r\n_\r\n", b">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$1\r\nx\r\n"]  # fmt: skip
    return [*OPERATIONS, *replies]


def mutated(count: int) -> list[bytes]:
    """Real heads with bytes changed, cut, joined, repeated."""
    choose = random.Random(5)
    found = []
    for _ in range(count):
        data = bytearray(choose.choice(samples()))
        for _ in range(choose.randrange(4)):
            place = choose.randrange(len(data) + 1)
            what = choose.randrange(4)
            if what == 0 and place < len(data):
                data[place] = choose.choice(b"*$>%-:+_,#0123456789\r\n a\x00\xff")
            elif what == 1:
                del data[place:]
            elif what == 2:
                data[place:place] = choose.choice(samples())
            else:
                data[place:place] = b"%d" % choose.choice([0, 9, -1, 10**9, 10**18])
        found.append(bytes(data))
    return found


def test_any_bytes_are_taken():
    payloads = [*mutated(20_000), b""]
    heads = heads_of(payloads, [len(payload) * 3 for payload in payloads])
    roles = PROTOCOL.recognise(heads)
    kept = PROTOCOL.keep(heads, roles)
    assert len(kept) == len(heads.data)
    assert not kept[np.repeat(roles == Role.NONE, heads.lengths)].any()
    hidden = mask(heads, kept, KEY)
    claimed = roles > 0
    assert (PROTOCOL.recognise(hidden)[claimed] == roles[claimed]).all()
    for each in (heads, hidden):
        requests, responses = PROTOCOL.parse_requests(each), PROTOCOL.parse_responses(each)
        assert requests.schema == REQUEST_SCHEMA
        assert responses.schema == RESPONSE_SCHEMA
        assert len(requests) == len(responses) == len(payloads)


def test_one_head_is_parsed_as_it_is_among_others():
    payloads = mutated(300)
    together = heads_of(payloads)
    requests, responses = PROTOCOL.parse_requests(together), PROTOCOL.parse_responses(together)
    roles, kept = (
        PROTOCOL.recognise(together),
        PROTOCOL.keep(together, PROTOCOL.recognise(together)),
    )
    for row, payload in enumerate(payloads):
        alone = heads_of([payload])
        assert PROTOCOL.recognise(alone)[0] == roles[row]
        assert PROTOCOL.parse_requests(alone).row(0) == requests.row(row), payload
        assert PROTOCOL.parse_responses(alone).row(0) == responses.row(row), payload
        begin = together.begins[row]
        mine = kept[begin : begin + len(payload)]
        assert PROTOCOL.keep(alone, roles[row : row + 1]).tolist() == mine.tolist(), payload


@pytest.mark.parametrize("length", [3, 4, 8, 64])
def test_random_bytes_are_not_claimed(length):
    count = 200_000
    data = np.random.default_rng(length).integers(0, 256, count * length, np.uint8)
    begins = np.arange(0, count * length, length)
    lengths = np.full(count, length)
    roles = PROTOCOL.recognise(Heads(data, begins, lengths, lengths))
    assert (roles > 0).sum() < count / 10_000


@pytest.mark.parametrize(
    "payload",
    [b"GET / HTTP/1.1\r\n\r\n", b"get foo\r\n", b"set foo 0 0 1\r\n", b"STORED\r\n", b"+", b"*",
     b"-----BEGIN X-----\r\n", b"- a list\r\n", b"EHLO x\r\n", b"{}", b"$5", b"QUIT\r\n"],
)  # fmt: skip
def test_other_protocols_are_not_claimed(payload):
    assert PROTOCOL.recognise(heads_of([payload])).tolist() == [Role.NONE]
