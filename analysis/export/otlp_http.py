"""Sends OTLP messages to a receiver: a collector, Jaeger, Tempo and the like (OTLP/HTTP, binary).

https://opentelemetry.io/docs/specs/otlp/#otlphttp tells which answers mean what.
"""

from __future__ import annotations

import gzip
import http.client
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, urlsplit

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from scope_ebpf.errors import ScopeError, UsageError
from scope_ebpf.version import __version__

TRACES_PATH: Final = "/v1/traces"
ATTEMPTS: Final = 6
"""How often a message is tried when the receiver is busy; with the waits, about half a minute."""

_RETRYABLE: Final = {429, 502, 503, 504}
_TIMEOUT_S: Final = 30.0
_FIRST_WAIT_S: Final = 0.5
_LONGEST_WAIT_S: Final = 30.0
_MAX_ANSWER_BYTES: Final = 4 << 20  # what the specification advises


class EndpointError(ScopeError):
    """The endpoint is not there, or did not take what it was sent."""


@dataclass
class Sent:
    """What became of the spans."""

    spans: int = 0  # that the receiver was sent
    rejected: int = 0  # of these, it refused so many
    messages: list[str] = field(default_factory=list)  # what it said of them, each once


def send(
    endpoint: str,
    messages: Iterable[tuple[bytes, int]],
    *,
    headers: Mapping[str, str] | None = None,
    first_wait_s: float = _FIRST_WAIT_S,
) -> Sent:
    """Send messages (see `otlp.protobuf_messages`) one after the other over one connection.

    `endpoint`: an http or https URL; without a path it gets `/v1/traces`. A busy receiver (429, 502,
    503, 504) and a connection that broke are tried again, with growing waits or after the time that
    the receiver asks for. A message whose answer got lost arrives twice then: its spans have the
    same ids.

    Raises `UsageError` for what is no such URL, and `EndpointError` if the endpoint is unreachable
    or refuses.
    """
    channel = _Channel(urlsplit(traces_url(endpoint)), headers or {}, first_wait_s)
    sent = Sent()
    try:
        for body, spans in messages:
            answer = channel.post(gzip.compress(body, compresslevel=4))
            sent.spans += spans
            _note_partial_success(answer, sent)
    finally:
        channel.close()
    return sent


def traces_url(endpoint: str) -> str:
    """The URL that spans are sent to: `endpoint` with `/v1/traces` where it has no path.

    Raises `UsageError` if it is no URL that could be meant.

    >>> traces_url("http://localhost:4318")
    'http://localhost:4318/v1/traces'
    """
    example = "write it like http://localhost:4318"
    try:
        url = urlsplit(endpoint)
        port = url.port
    except ValueError as error:
        raise UsageError(f"--endpoint is not a URL: {error}; {example}") from None
    if url.scheme not in ("http", "https"):
        raise UsageError(f"--endpoint must begin with http:// or https://; {example}")
    if not url.hostname or port == 0:
        raise UsageError(f"--endpoint names no host and port; {example}")
    if url.username is not None:
        raise UsageError("--endpoint may not hold a password; send it with --header")
    if not (endpoint.isascii() and endpoint.isprintable()) or " " in endpoint:
        raise UsageError(f"--endpoint holds characters that no URL has; {example}")
    path = TRACES_PATH if url.path in ("", "/") else url.path
    return url._replace(path=path, fragment="").geturl()


def _note_partial_success(answer: bytes, sent: Sent) -> None:
    response = ExportTraceServiceResponse()
    try:
        response.ParseFromString(answer)
    except DecodeError:
        return  # it took the spans, which the status said, and answers in its own words
    partial = response.partial_success
    sent.rejected += partial.rejected_spans
    if partial.error_message and partial.error_message not in sent.messages:
        sent.messages.append(partial.error_message)


class _BusyError(Exception):
    """It may take the message later."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


class _Channel:
    """A connection that is made again when it broke."""

    def __init__(self, url: SplitResult, headers: Mapping[str, str], first_wait_s: float) -> None:
        self._name = f"{url.scheme}://{url.netloc}{url.path}"  # a query may hold a key
        self._target = url.path + (f"?{url.query}" if url.query else "")
        self._headers = {
            "Content-Type": "application/x-protobuf",
            "Content-Encoding": "gzip",
            "User-Agent": f"scope-ebpf/{__version__}",
            **headers,
        }
        self._first_wait_s = first_wait_s
        self._reached = False
        secure = url.scheme == "https"
        connection = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert url.hostname is not None
        self._connection = connection(url.hostname, url.port, timeout=_TIMEOUT_S)

    def close(self) -> None:
        self._connection.close()

    def post(self, body: bytes) -> bytes:
        """The answer's body."""
        wait_s = self._first_wait_s
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._try(body)
            except _BusyError as busy:
                if attempt == ATTEMPTS:
                    raise EndpointError(
                        f"{self._name} did not take the spans in {ATTEMPTS} attempts: {busy}; "
                        "try again later"
                    ) from None
                pause_s = wait_s if busy.after_s is None else busy.after_s
                time.sleep(min(pause_s, _LONGEST_WAIT_S))
                wait_s *= 2
        raise AssertionError("unreachable")

    def _try(self, body: bytes) -> bytes:
        try:
            self._connection.request("POST", self._target, body, self._headers)
            response = self._connection.getresponse()
            answer = response.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            why = _reason(error)
            if self._reached and not isinstance(error, ssl.SSLError):
                raise _BusyError(why) from None
            raise EndpointError(
                f"cannot reach {self._name}: {why}; is an OTLP/HTTP receiver listening there? "
                "(usually on port 4318)"
            ) from None
        self._reached = True
        if not response.isclosed():  # more than anybody should say: the rest stays unread
            self._connection.close()
        status = f"{response.status} {response.reason}".strip()
        if 200 <= response.status < 300:
            return answer
        if response.status in _RETRYABLE:
            raise _BusyError(status, _retry_after_s(response.headers.get("Retry-After")))
        if 300 <= response.status < 400:
            place = response.headers.get("Location", "nowhere")
            raise EndpointError(
                f"{self._name} answered {status} and points to {place}; give that as --endpoint"
            )
        raise EndpointError(f"{self._name} refused the spans: {status}{_said(response, answer)}")


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_S:.0f} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({error.verify_message})"
    if isinstance(error, http.client.RemoteDisconnected):
        return "it closed the connection without an answer"
    if isinstance(error, http.client.HTTPException):
        return "it does not speak HTTP"
    if isinstance(error, OSError):
        return (error.strerror or str(error) or type(error).__name__).lower()
    return str(error)


def _retry_after_s(text: str | None) -> float | None:
    # The other form, a date, is for clocks that agree: the growing wait does as well.
    return float(text) if text is not None and text.isascii() and text.isdecimal() else None


def _said(response: http.client.HTTPResponse, answer: bytes) -> str:
    """What a refusal says for people, if it is text."""
    kind = response.headers.get_content_type()
    if kind != "application/json" and not kind.startswith("text/plain"):
        return ""
    text = " ".join(answer[:300].decode("utf-8", "replace").split())
    return f" ({text})" if text else ""
