"""HTTP heads: what is recognised, what is told of them, and what may be stored."""

from __future__ import annotations

import http.client
import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.contract import REQUEST_SCHEMA, RESPONSE_SCHEMA, Role
from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.http import PROTOCOL
from scope_ebpf.protocols.masking import mask

pytestmark = pytest.mark.pure

END = b" HTTP/1.1\r\nHost: shop.example\r\n\r\n"


def heads(*payloads: bytes, cut_bytes: int = 0) -> Heads:
    totals = np.array([len(payload) + cut_bytes for payload in payloads], np.int64)
    return Heads.of(pl.Series(payloads, dtype=pl.Binary), totals)


def masked(payload: bytes) -> bytes:
    """The payload as a redacted recording holds it."""
    head = heads(payload)
    stored = mask(head, PROTOCOL.keep(head, PROTOCOL.recognise(head)), bytes(16))
    return stored.data.tobytes()


def request(payload: bytes, cut_bytes: int = 0) -> dict[str, object]:
    head = heads(payload, cut_bytes=cut_bytes)
    assert PROTOCOL.recognise(head).tolist() == [Role.REQUEST]
    frame = PROTOCOL.parse_requests(head)
    assert frame.schema == REQUEST_SCHEMA
    return frame.row(0, named=True)


def response(payload: bytes) -> dict[str, object]:
    head = heads(payload)
    assert PROTOCOL.recognise(head).tolist() == [Role.RESPONSE]
    frame = PROTOCOL.parse_responses(head)
    assert frame.schema == RESPONSE_SCHEMA
    return frame.row(0, named=True)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/", "/"),
        ("/users/17?full=1", "/users/{id}"),
        ("/users/17/orders/18", "/users/{id}/orders/{id}"),
        ("/users/", "/users/"),
        ("/v1/health", "/v1/health"),
        ("/invoices/17.pdf", "/invoices/{id}.pdf"),
        ("/days/2024-01-05", "/days/{id}"),
        ("/o/9f1c2d3e-0a1b-4c2d-8e3f-123456789abc/x", "/o/{id}/x"),
        ("/commits/deadbeef01", "/commits/{id}"),
        ("/sessions/aBcDeF123456", "/sessions/{id}"),
        ("/tokens/k3j4h5g6k3j4h5g6k3j4", "/tokens/{id}"),
        ("/people/joe@example.com/mail", "/people/{id}/mail"),
        ("/people/joe%40example.com", "/people/{id}"),
        ("/@types/node", "/@types/node"),
        ("/cart;jsessionid=AB12/items", "/cart/items"),
        ("/a#part", "/a"),
        ("http://joe:word@shop.example/users/17?x=1", "/users/{id}"),
        ("http://shop.example?next=1", "/"),
        ("/reset/" + "a1b2c3d4" * 6, "/reset/{id}"),
        ("/reset/" + "a1b2c3d4" * 3 + "%2B" + "a1b2c3d4" * 3, "/reset/{id}"),
        ("/login/?next=/users/17", "/login/"),
        ("/login/?page", "/login/"),
    ],
)
def test_operations_fold_ids_also_when_masked(target, path):
    clear = b"GET " + target.encode() + END
    assert request(clear)["operation"] == f"GET {path}"
    assert request(clear)["detail"] == f"GET {target}"
    assert request(masked(clear))["operation"] == f"GET {path}"


def test_other_forms_of_targets():
    assert request(b"CONNECT shop.example:443" + END)["operation"] == "CONNECT shop.example:443"
    assert request(b"OPTIONS *" + END)["operation"] == "OPTIONS *"
    assert request(b"PURGE /a" + END)["operation"] == "PURGE /a"
    assert request(b"GET /a HTTP/1.0\n\n")["operation"] == "GET /a"
    assert request("GET /caf\u00e9".encode() + END)["operation"] == "GET /caf\ufffd\ufffd"


def test_a_host_that_is_masked_for_what_follows_it():
    line = b"CONNECT shop.example:443 @"
    assert PROTOCOL.recognise(heads(line, masked(line))).tolist() == [Role.REQUEST] * 2


@pytest.mark.parametrize("line", [b"GET /users/17?a=" + b"b" * 90, b"GET /users/17?a=b HTT"])
def test_a_line_that_is_longer_than_the_head(line):
    assert request(line, cut_bytes=50)["operation"] == "GET /users/{id}"
    assert request(masked(line), cut_bytes=50)["operation"] == "GET /users/{id}"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET key\r\n",
        b"GET /key\r\n",
        b"get / HTTP/1.1\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 20",
        b"HTTP/1.1 2000\r\n",
        b'{"a body": "GET / HTTP/1.1"}',
        b"OPTIONS rtsp://a/b RTSP/1.0\r\n\r\n",
        b"SELECT 1",
    ],
)
def test_what_is_not_http(payload):
    assert PROTOCOL.recognise(heads(payload)).tolist() == [Role.NONE]


def test_pipelined_requests_are_counted_as_far_as_their_framing_is_sure():
    one = b"GET /a" + END
    assert request(one * 5)["requests"] == 5
    assert request(one + b"GET /b HT")["requests"] == 2
    post = b"POST /a HTTP/1.1\r\nContent-Length: 32\r\n\r\n"
    body = b"GET /forged HTTP/1.1\r\n\r\n12345678"
    assert request(post + body + one)["requests"] == 2
    chunked = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert request(chunked + one)["requests"] == 1
    for payload in (one * 5, post + body + one):
        assert request(masked(payload))["requests"] == request(payload)["requests"]


def test_pipelined_requests_of_several_heads_stay_apart():
    one = b"GET /a" + END
    # A head that ends in a newline, before one that begins with an empty line.
    both = heads(one * 3, b"GET /b HTTP/1.1\r\n", b"\r\n\r\n", one, b"POST /c" + END + b"x\r\n\r\n")
    roles = PROTOCOL.recognise(both)
    assert roles.tolist() == [1, 1, 0, 1, 1]
    asked = both.take(roles == Role.REQUEST)
    assert PROTOCOL.parse_requests(asked)["requests"].to_list() == [3, 1, 1, 1]
    assert len(PROTOCOL.keep(both, roles)) == len(both.data)


@pytest.mark.parametrize(
    ("payload", "status", "error", "interim"),
    [
        (b"HTTP/1.1 200 OK\r\nServer: a\r\n\r\n", "200", None, False),
        (b"HTTP/1.0 404", "404", None, False),
        (b"HTTP/1.1 204\r\n\r\n", "204", None, False),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", "304", None, False),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n\x81\x05", "101", None, False),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "100", None, True),
        (b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n", "103", None, True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\n\r\n", "201", None, False),
        (b"HTTP/1.1 500 Oh no\r\n\r\n", "500", "500 Oh no", False),
        (b"HTTP/1.1 503 \r\n\r\n", "503", "503 Service Unavailable", False),
        (b"HTTP/1.1 599\r\n\r\n", "599", "599", False),
    ],
)
def test_responses(payload, status, error, interim):
    for form in (payload, masked(payload)):
        told = response(form)
        assert (told["status"], told["error"], told["interim"]) == (status, error, interim)
        assert told["miss"] is False


@pytest.mark.parametrize(
    "payload",
    [
        b"GET /a?q=SECRET1&SECRET2 HTTP/1.1\r\nCookie: s=SECRET3\r\nAuthorization: Basic SECRET4\r\n\r\n",
        b"GET /a?q=SECRET1",
        b"GET /a?q=SECRET1 HT",
        b"GET /a#SECRET1" + END,
        b"GET http://SECRET1:SECRET2@shop.example/a" + END,
        b"GET /a/SECRET1@example.com/b;x=SECRET2/c" + END,
        b"GET /a/" + b"SECRET1" * 6 + END,
        b"GET /a/" + b"x" * 40 + b"-SECRET1" + END,
        b"POST /a HTTP/1.1\r\nContent-Length: 99\r\n\r\nSECRET1\r\nHost: SECRET2\r\n\r\nSECRET3",
        b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n7\r\nSECRET1\r\n0\r\n\r\n",
        b"GET /a" + END + b"GET /b?SECRET1" + END + b"SECRET2",
        b"GET /a HTTP/1.1\r\nX-A: b\r\n SECRET1\r\nSECRET2\r\nX SECRET3: a\r\n: SECRET4\r\nX-SECRET5",
        b"HTTP/1.1 200 OK\r\nSet-Cookie: SECRET1\r\nLocation: /SECRET2\r\n\r\nSECRET3\r\nServer: SECRET4",
        b"HTTP/1.1 200 OK\r\nX-Server: SECRET1\r\n\r\nHTTP/1.1 200 SECRET2\r\n\r\n",
    ],
)
def test_secrets_are_not_kept(payload):
    stored = masked(payload)
    assert b"SECRET" not in stored
    assert len(stored) == len(payload)
    first = payload.split()[0]
    assert stored.startswith(first)


def test_what_is_kept():
    payload = (
        b"PUT /users/17 HTTP/1.1\r\nHOST: shop.example:80\r\nContent-Type: text/html; charset=a\r\n"
        b"content-length:5\r\nTransfer-Encoding: chunked\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Expect: 100-continue\r\nServer: nginx/1.22\r\n\r\n"
    )
    assert masked(payload) == payload
    named = masked(b"GET /a HTTP/1.1\r\nX-Trace-Id: abc\r\n\r\n")
    assert named.startswith(b"GET /a HTTP/1.1\r\nX-Trace-Id: ?")
    # Nothing is kept of what is not recognised, wherever it stands among others.
    both = heads(b"Host: SECRET\r\n\r\n", payload, b"Host: SECRET\r\n\r\n")
    kept = PROTOCOL.keep(both, PROTOCOL.recognise(both))
    assert kept.nonzero()[0].min() == 16
    assert kept.nonzero()[0].max() < 16 + len(payload)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(404 if "none" in self.path else 200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(b"5\r\nhello\r\n0\r\n\r\n")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def recorded() -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
    """A real server behind a relay that notes each piece of bytes and where it came from."""
    pieces: list[tuple[str, bytes]] = []
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        serving = threading.Thread(target=server.serve_forever)
        serving.start()

        def relay() -> None:
            client, _ = listener.accept()
            with client, socket.create_connection(("127.0.0.1", server.server_port)) as upstream:
                ends = {"client": (client, upstream), "server": (upstream, client)}

                def pump(name: str) -> None:
                    source, sink = ends[name]
                    while piece := source.recv(65536):
                        pieces.append((name, piece))
                        sink.sendall(piece)
                    sink.shutdown(socket.SHUT_WR)

                back = threading.Thread(target=pump, args=("server",))
                back.start()
                pump("client")
                back.join()

        relaying = threading.Thread(target=relay)
        relaying.start()
        yield listener.getsockname()[1], pieces
        relaying.join()
        server.shutdown()
        serving.join()


def test_what_python_sends_and_answers():
    with recorded() as (port, pieces):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        said = []
        for method, target in (("GET", "/users/17?a=b"), ("HEAD", "/users/17"), ("GET", "/none")):
            client.request(method, target)
            reply = client.getresponse()
            said.append((reply.status, reply.read()))
        client.putrequest("POST", "/orders")
        client.putheader("Content-Length", "3")
        client.putheader("Expect", "100-continue")
        client.endheaders()
        # http.client reads past 100 by itself, once the body is there.
        client.send(b"abc")
        said.append((client.getresponse().status, b""))
        client.close()
    assert [status for status, _ in said] == [200, 200, 404, 500]

    sent = heads(*(piece for name, piece in pieces if name == "client"))
    roles = PROTOCOL.recognise(sent)
    requests = PROTOCOL.parse_requests(sent.take(roles == Role.REQUEST))
    assert requests["operation"].to_list() == [
        "GET /users/{id}",
        "HEAD /users/{id}",
        "GET /none",
        "POST /orders",
    ]
    received = heads(*(piece for name, piece in pieces if name == "server"))
    roles = PROTOCOL.recognise(received)
    responses = PROTOCOL.parse_responses(received.take(roles == Role.RESPONSE))
    final = responses.filter(~pl.col("interim"))
    assert final["status"].to_list() == ["200", "200", "404", "500"]
    assert final["error"].to_list() == [None, None, None, "500 Internal Server Error"]
