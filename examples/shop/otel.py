"""OpenTelemetry in the shop: a second account of what happened, to compare a tracer's with.

With `SHOP_OTEL_URL` set, the services are instrumented by OpenTelemetry's own packages and send
their spans there. As a program, this is the receiver: OTLP over HTTP, as binary protobuf.

    python examples/shop/otel.py --port 4318 spans.jsonl
"""

import argparse
import gzip
import json
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

_URL = os.environ.get("SHOP_OTEL_URL")
ON = _URL is not None
TRACES_PATH = "/v1/traces"
# Short, so that one does not have to wait for the spans after a load.
_EXPORT_MILLISECONDS = 200


# --- In the services ------------------------------------------------------------------------------


def instrument(app: "Flask | None" = None) -> None:
    """Instrument this process: its app, psycopg2, redis and requests.

    Each span has also `process.pid` and `thread.id`, the kernel's own number of the thread.
    """
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.flask import FlaskInstrumentor
    from opentelemetry.instrumentation.psycopg2 import Psycopg2Instrumentor
    from opentelemetry.instrumentation.redis import RedisInstrumentor
    from opentelemetry.instrumentation.requests import RequestsInstrumentor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    class Place(SpanProcessor):
        def on_start(self, span: Span, parent_context: Any = None) -> None:
            span.set_attribute("process.pid", os.getpid())
            span.set_attribute("thread.id", threading.get_native_id())

    # The request's id, which the load sends and truth.py hands on.
    os.environ["OTEL_INSTRUMENTATION_HTTP_CAPTURE_HEADERS_SERVER_REQUEST"] = "X-Request-Id"
    service = os.environ.get("SHOP_SERVICE", "shop")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(Place())
    exporter = OTLPSpanExporter(endpoint=f"{_URL}{TRACES_PATH}")
    provider.add_span_processor(
        BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_MILLISECONDS)
    )
    trace.set_tracer_provider(provider)
    # It looks for the package psycopg2, which psycopg2-binary is, too.
    Psycopg2Instrumentor().instrument(skip_dep_check=True)
    RedisInstrumentor().instrument()
    RequestsInstrumentor().instrument()
    if app is not None:
        FlaskInstrumentor().instrument_app(app)  # type: ignore[no-untyped-call]


def carrier() -> dict[str, str]:
    """The trace's context to put into a job's `meta`; RQ itself is not instrumented."""
    found: dict[str, str] = {}
    if ON:
        from opentelemetry import propagate

        propagate.inject(found)
    return found


@contextmanager
def job(name: str) -> Iterator[None]:
    """Make the block the span of the job that RQ runs now; when off, only run it."""
    if not ON:
        yield
        return
    import rq
    from opentelemetry import propagate, trace
    from opentelemetry.sdk.trace import TracerProvider

    current = rq.get_current_job()
    cause = propagate.extract(current.meta if current is not None else {})
    tracer = trace.get_tracer("shop")
    with tracer.start_as_current_span(name, cause, kind=trace.SpanKind.CONSUMER):
        yield
    provider = trace.get_tracer_provider()
    # A work horse ends without a word.
    assert isinstance(provider, TracerProvider)
    provider.force_flush()


# --- The receiver ---------------------------------------------------------------------------------


class Receiver:
    """An OTLP/HTTP receiver of traces on loopback, as a context manager.

    `url` is where it listens, `spans` holds what came: of each span `trace_id`, `span_id`,
    `parent_id` (null at the root), `service`, `name`, `kind`, `start_ns` and `end_ns` (since 1970),
    `error`, `attributes`. With `path`, each is a line of JSON there as well.

        with Receiver() as receiver:
            export_to(receiver.url + "/v1/traces")
            print(receiver.spans)
    """

    def __init__(
        self, path: Path | None = None, *, listener: socket.socket | None = None, port: int = 0
    ) -> None:
        self.spans: list[dict[str, Any]] = []
        self._path = path
        self._lock = threading.Lock()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status, answer = receiver.receive(self.path, body)
                self.send_response(status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name there)
                pass

        self._server = ThreadingHTTPServer(
            ("127.0.0.1", port), Handler, bind_and_activate=listener is None
        )
        if listener is not None:
            self._server.socket.close()
            self._server.socket = listener
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"

    def __enter__(self) -> "Receiver":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def run(self) -> None:
        """Serve until the program is told to end."""
        self._server.serve_forever()

    def receive(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Take one request's body; returns the status and body of the answer."""
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
            ExportTraceServiceRequest,
            ExportTraceServiceResponse,
        )

        if path != TRACES_PATH:
            return 404, b""
        request = ExportTraceServiceRequest()
        try:
            request.ParseFromString(body)
        except DecodeError:
            return 400, b""
        spans = [
            {
                "trace_id": span.trace_id.hex(),
                "span_id": span.span_id.hex(),
                "parent_id": span.parent_span_id.hex() or None,
                "service": _attributes(resource.resource.attributes).get("service.name"),
                "name": span.name,
                "kind": span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                "start_ns": span.start_time_unix_nano,
                "end_ns": span.end_time_unix_nano,
                "error": span.status.code == span.status.STATUS_CODE_ERROR,
                "attributes": _attributes(span.attributes),
            }
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self.spans += spans
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write("".join(json.dumps(span) + "\n" for span in spans))
        return 200, ExportTraceServiceResponse().SerializeToString()


def _attributes(pairs: "Sequence[KeyValue]") -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: "AnyValue") -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    if kind == "bytes_value":
        return value.bytes_value.hex()
    return getattr(value, kind) if kind is not None else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Receive spans into a file until ended."""
    parser = argparse.ArgumentParser(
        description="Receive OpenTelemetry spans (OTLP over HTTP) on 127.0.0.1 into a file.",
        epilog="example: python examples/shop/otel.py --port 4318 spans.jsonl",
    )
    parser.add_argument("path", type=Path, help="the file: one line of JSON for each span")
    parser.add_argument("--port", type=int, default=4318, help="default: 4318, as in OTLP")
    parser.add_argument("--fd", type=int, help="a listening socket to use instead of a port")
    options = parser.parse_args(arguments)
    listener = None if options.fd is None else socket.socket(fileno=options.fd)
    Receiver(options.path, listener=listener, port=options.port).run()


if __name__ == "__main__":
    main()
