"""What really caused what, noted by the services themselves, to compare a tracer's findings with.

On when `SHOP_TRUTH` names a file. Then each request's id (32 hex digits, header `X-Request-Id`)
goes through every hop in what is sent anyway: as that header to other services, as a comment
behind each SQL statement, as an `ECHO` before the Redis commands, in the arguments of jobs. And
each request handled (`kind` server), each job run (job) and each call made (client) becomes one
line of JSON in the file:

    id, parent      this line, and the line that caused it (null for a request from outside)
    rid             the request's id
    service, tgid, tid
    kind, target    target: of a client "redis", "postgresql", "inventory" or "payment", else null
    what            method and path, statement, or names of Redis commands
    start_ns, end_ns  CLOCK_MONOTONIC; a server's end is after its last byte was sent
    port            the client's own port of the connection, null where it is not easily known
    status, error   HTTP status, and the exception's name of what failed; else null

What is sent outside of any request (a worker's own polling, health checks of drivers) is not
noted. Without `SHOP_TRUTH` nothing of this is used.
"""

import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psycopg2.extensions
import redis
import redis.client
import requests
from werkzeug.wsgi import ClosingIterator

_PATH = os.environ.get("SHOP_TRUTH")
ON = _PATH is not None
_SERVICE = os.environ.get("SHOP_SERVICE", "")
_SERVICES = {
    urlsplit(url).netloc: name
    for name in ("inventory", "payment")
    if (url := os.environ.get(f"SHOP_{name.upper()}_URL")) is not None
}
_REQUEST_ID = re.compile(r"[0-9a-f]{32}")
_PUSHES = frozenset(("LPUSH", "RPUSH"))
_REQUEST_HEADER, _PARENT_HEADER = "X-Request-Id", "X-Truth-Parent"


@dataclass
class Span:
    """One line to be."""

    rid: str
    kind: str
    parent: str | None
    target: str | None = None
    what: str = ""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    start_ns: int = field(default_factory=time.monotonic_ns)
    port: int | None = None
    status: int | None = None
    error: str | None = None
    # Decided before the call: the job that it queues has to carry it.
    push_id: str | None = None

    def end(self) -> None:
        """Write the line."""
        line = {
            "id": self.id,
            "parent": self.parent,
            "rid": self.rid,
            "service": _SERVICE,
            "tgid": os.getpid(),
            "tid": threading.get_native_id(),
            "kind": self.kind,
            "target": self.target,
            "what": self.what,
            "start_ns": self.start_ns,
            "end_ns": time.monotonic_ns(),
            "port": self.port,
            "status": self.status,
            "error": self.error,
        }
        os.write(_log(), json.dumps(line).encode() + b"\n")


_serving: ContextVar[Span | None] = ContextVar("serving", default=None)
_descriptors: list[int] = []


def _log() -> int:
    # One descriptor per process or inherited across a fork: each line is one write that appends.
    if not _descriptors:
        assert _PATH is not None
        _descriptors.append(os.open(_PATH, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    return _descriptors[0]


@contextmanager
def _call(cause: Span, target: str, what: str) -> Iterator[Span]:
    """Note a call that the block makes because of `cause`."""
    span = Span(cause.rid, "client", cause.id, target, what)
    try:
        yield span
    except BaseException as error:
        span.error = type(error).__name__
        raise
    finally:
        span.end()


class Middleware:
    """Notes each request that a WSGI application handles, until its last byte is sent."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        rid = environ.get("HTTP_X_REQUEST_ID", "")
        # What is not such an id must not get into a statement.
        if not _REQUEST_ID.fullmatch(rid):
            rid = secrets.token_hex(16)
        span = Span(rid, "server", environ.get("HTTP_X_TRUTH_PARENT"))
        span.what = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"

        def start(status: str, headers: Any, *more: Any) -> Any:
            span.status = int(status.split(maxsplit=1)[0])
            return start_response(status, headers, *more)

        def end() -> None:
            _serving.set(None)
            span.end()

        _serving.set(span)
        return ClosingIterator(self._application(environ, start), end)


def job_arguments() -> dict[str, str]:
    """What a job needs to know of the request that queues it: arguments for `job`."""
    serving = _serving.get()
    if serving is None:
        return {}
    serving.push_id = secrets.token_hex(8)
    return {"rid": serving.rid, "parent": serving.push_id}


@contextmanager
def job(what: str, rid: str = "", parent: str = "") -> Iterator[None]:
    """Note the block as the job that a request queued; without a request, note nothing."""
    if not ON or not rid:
        yield
        return
    span = Span(rid, "job", parent, what=what)
    _serving.set(span)
    try:
        yield
    except BaseException as error:
        span.error = type(error).__name__
        raise
    finally:
        _serving.set(None)
        span.end()


class Cursor(psycopg2.extensions.cursor):  # type: ignore[misc]
    """A cursor that notes its statements, and says in each which request it is for."""

    def execute(self, query: str, values: Any = None) -> None:
        """Execute a statement."""
        serving = _serving.get()
        if serving is None:
            super().execute(query, values)
            return
        with _call(serving, "postgresql", query):
            super().execute(f"{query} /* rid={serving.rid} */", values)


class Redis(redis.Redis):
    """A client that notes its commands, and sends the request's id before them."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send one command, in a pipeline with the id."""
        if _serving.get() is None:
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        pipeline = self.pipeline(transaction=False)
        pipeline.execute_command(*args, **options)  # type: ignore[no-untyped-call]
        return pipeline.execute()[0]

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> "Pipeline":
        """Make a pipeline that does the same."""
        return Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class Pipeline(redis.client.Pipeline):
    """A pipeline that is noted as one call."""

    _span: Span | None = None

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Send the commands, the id first."""
        serving = _serving.get()
        if serving is None or not self.command_stack:
            return super().execute(raise_on_error)
        names = [str(command[0][0]) for command in self.command_stack]
        self.command_stack.insert(0, (("ECHO", serving.rid), {}))
        with _call(serving, "redis", " ".join(names)) as self._span:
            if serving.push_id is not None and not _PUSHES.isdisjoint(names):
                self._span.id, serving.push_id = serving.push_id, None
            return super().execute(raise_on_error)[1:]

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Read one answer, and note where it comes from."""
        if self._span is not None and self._span.port is None:
            with suppress(AttributeError, OSError):
                self._span.port = connection._sock.getsockname()[1]
        return super().parse_response(  # type: ignore[no-untyped-call]
            connection, command_name, **options
        )


class Session(requests.Session):
    """A session that notes its requests, and sends the request's id with them."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request to one of the services."""
        serving = _serving.get()
        if serving is None:
            return super().send(request, **options)
        where = urlsplit(request.url or "")
        target = _SERVICES.get(str(where.netloc), str(where.netloc))
        with _call(serving, target, f"{request.method} {where.path}") as span:

            def note(response: requests.Response, **_options: Any) -> None:
                # Before the body is read, and the connection given back.
                with suppress(AttributeError, OSError):
                    connection = response.raw._original_response.fp.raw._sock
                    span.port = connection.getsockname()[1]

            headers: Mapping[str, str] = {_REQUEST_HEADER: serving.rid, _PARENT_HEADER: span.id}
            request.headers.update(headers)
            request.register_hook("response", note)
            response = super().send(request, **options)
            span.status = response.status_code
            return response
