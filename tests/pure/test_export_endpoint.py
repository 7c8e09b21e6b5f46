"""What an OTLP/HTTP receiver is sent, and what its answers lead to."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from scope_ebpf.analysis.export import otlp, otlp_http
from scope_ebpf.analysis.export.selection import select_spans
from scope_ebpf.errors import UsageError
from tests.pure.test_export_otlp import by_id, exported
from tests.pure.traced import SPAN_ROWS, Traced, make_traced

pytestmark = pytest.mark.pure

CHECKOUT = Path(__file__).resolve().parents[2]
AGENT = CHECKOUT / "build" / "otlp-receiver" / "bin" / "ddapm-test-agent"


@pytest.fixture
def traced(tmp_path) -> Traced:
    return make_traced(tmp_path / "shop.scope")


class Receiver:
    """An OTLP/HTTP receiver on loopback, on Python's own HTTP server.

    It takes what the specification lets a receiver take, decodes it with the official protobuf
    class, and answers with the official response. `answers` are given to the first requests: a
    status, a response, or None to hang up without an answer.
    """

    def __init__(self, *answers: int | ExportTraceServiceResponse | None) -> None:
        self.answers = list(answers)
        self.batches: list[dict[int, Span]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.connections: set[int] = set()
        self.retry_after: str | None = None
        self.url = ""


@contextmanager
def receiving(receiver: Receiver) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.connections.add(self.client_address[1])
            receiver.headers.append(dict(self.headers.items()))
            receiver.paths.append(self.path)
            answer = receiver.answers.pop(0) if receiver.answers else 200
            if answer is None:
                self.close_connection = True
                return
            response, status = ExportTraceServiceResponse(), 200
            if isinstance(answer, int):
                status = answer
            else:
                response = answer
            if status == 200:
                assert self.headers["Content-Type"] == "application/x-protobuf"
                assert self.headers["Content-Encoding"] == "gzip"
                receiver.batches.append(
                    by_id(ExportTraceServiceRequest.FromString(gzip.decompress(body)))
                )
            data = response.SerializeToString() if status == 200 else b"not today"
            self.send_response(status)
            kind = "application/x-protobuf" if status == 200 else "text/plain"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if receiver.retry_after is not None:
                self.send_header("Retry-After", receiver.retry_after)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def send(traced: Traced, url: str, batch: int = 4) -> otlp_http.Sent:
    messages = otlp.protobuf_messages(traced, select_spans(traced), batch=batch)
    return otlp_http.send(url, messages, headers={"X-Key": "k"}, first_wait_s=0.01)


def received(receiver: Receiver) -> set[int]:
    ids = [key for batch in receiver.batches for key in batch]
    assert len(ids) == len(set(ids))
    return set(ids)


def test_a_receiver_gets_all_spans_in_batches_over_one_connection(traced):
    with receiving(Receiver()) as receiver:
        sent = send(traced, receiver.url)
    assert sent == otlp_http.Sent(spans=len(SPAN_ROWS))
    assert received(receiver) == {row["span_id"] for row in SPAN_ROWS}
    assert [len(batch) for batch in receiver.batches] == [4, 4, 1]
    assert set(receiver.paths) == {"/v1/traces"}
    assert len(receiver.connections) == 1
    assert all(headers["X-Key"] == "k" for headers in receiver.headers)
    assert receiver.headers[0]["User-Agent"].startswith("scope-ebpf/")


def test_a_receiver_that_others_wrote_understands_it(traced, tmp_path):
    """Datadog's test agent, which has an OTLP/HTTP receiver, started as a process of its own.

    Its pins do not fit ours, so it lives in an environment of its own, which `make test` makes.
    """
    if not AGENT.exists():
        pytest.skip("optional: ddapm-test-agent is not installed (scripts/setup.sh --test does)")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    names = ("--port", "--otlp-http-port", "--otlp-grpc-port")
    options = [text for pair in zip(names, map(str, ports), strict=True) for text in pair]
    url = f"http://127.0.0.1:{ports[1]}"
    with (tmp_path / "agent.log").open("wb") as log:
        process = subprocess.Popen(
            [AGENT, "--host", "127.0.0.1", *options], stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        for _ in range(300):
            with suppress(OSError), socket.create_connection(("127.0.0.1", ports[1])):
                break
            assert process.poll() is None, (tmp_path / "agent.log").read_text()
            time.sleep(0.1)
        assert send(traced, url).spans == len(SPAN_ROWS)
        with urlopen(f"{url}/test/session/traces", timeout=10) as answer:  # noqa: S310 - loopback
            messages = json.load(answer)
    finally:
        process.terminate()
        process.wait(30)
    names_seen = {
        int.from_bytes(base64.b64decode(span["span_id"]), "big"): span["name"]
        for message in messages
        for resource in message["resource_spans"]
        for scope in resource["scope_spans"]
        for span in scope["spans"]
    }
    assert names_seen == {key: span.name for key, span in by_id(exported(traced)).items()}


def test_a_path_and_a_query_of_the_endpoint_are_kept(traced):
    with receiving(Receiver()) as receiver:
        send(traced, receiver.url + "/otlp/v1/traces?tenant=7", batch=2000)
    assert receiver.paths == ["/otlp/v1/traces?tenant=7"]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_receiver_is_asked_again(traced, status):
    with receiving(Receiver(status, status)) as receiver:
        sent = send(traced, receiver.url)
    assert sent.spans == len(received(receiver)) == len(SPAN_ROWS)
    assert len(receiver.paths) == 5


def test_the_receiver_says_how_long_to_wait(traced, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    receiver = Receiver(503, 503)
    receiver.retry_after = "7"
    with receiving(receiver):
        send(traced, receiver.url, batch=2000)
    assert waits == [7.0, 7.0]


def test_waits_grow_and_end(traced, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with (
        receiving(Receiver(*[503] * 20)) as receiver,
        pytest.raises(otlp_http.EndpointError, match=r"in 6 attempts: 503 .*; try again later"),
    ):
        send(traced, receiver.url)
    assert waits == [0.01, 0.02, 0.04, 0.08, 0.16]


def test_a_connection_that_breaks_later_is_made_again(traced):
    with receiving(Receiver(200, None)) as receiver:
        sent = send(traced, receiver.url)
    assert sent.spans == len(received(receiver)) == len(SPAN_ROWS)
    assert len(receiver.connections) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_refusal_is_final_and_says_why(traced, status):
    with (
        receiving(Receiver(status)) as receiver,
        pytest.raises(
            otlp_http.EndpointError,
            match=rf"^http://127.0.0.1:\d+/v1/traces refused the spans: {status} .*\(not today\)$",
        ),
    ):
        send(traced, receiver.url)
    assert len(receiver.paths) == 1


def test_a_redirect_is_not_followed_but_named(traced):
    with (
        receiving(Receiver(308)) as receiver,
        pytest.raises(otlp_http.EndpointError, match=r"answered 308 .* give that as --endpoint"),
    ):
        send(traced, receiver.url)


def test_partial_success_is_counted_and_quoted(traced):
    answers = []
    for rejected, message in [(2, "too old"), (1, "too old"), (0, "please update")]:
        answer = ExportTraceServiceResponse()
        answer.partial_success.rejected_spans = rejected
        answer.partial_success.error_message = message
        answers.append(answer)
    with receiving(Receiver(*answers)) as receiver:
        sent = send(traced, receiver.url)
    assert (sent.spans, sent.rejected) == (len(SPAN_ROWS), 3)
    assert sent.messages == ["too old", "please update"]


def test_nobody_listens(traced):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        otlp_http.EndpointError, match=r"cannot reach .*: connection refused; is an"
    ):
        send(traced, f"http://127.0.0.1:{port}")


def test_what_listens_speaks_no_http(traced):
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"-ERR unknown command\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        with pytest.raises(otlp_http.EndpointError, match="it does not speak HTTP"):
            send(traced, f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("localhost:4318", "must begin with http"),
        ("grpc://localhost:4317", "must begin with http"),
        ("file:///etc/passwd", "must begin with http"),
        ("http://", "names no host"),
        ("http://:4318", "names no host"),
        ("http://h:99999", "not a URL"),
        ("http://h:x", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://user:secret@h", "may not hold a password"),
        ("http://h/a b", "characters that no URL has"),
        ("http://h/a\r\nX: y", "characters that no URL has"),
        ("", "must begin with http"),
    ],
)
def test_what_is_no_endpoint(endpoint, message):
    with pytest.raises(UsageError, match=message) as raised:
        otlp_http.send(endpoint, [])
    assert "secret" not in str(raised.value)
