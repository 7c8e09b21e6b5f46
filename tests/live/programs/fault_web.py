"""A web application of one thread, whose handlers ask backends that fail in many ways.

    fault_web.py PLACES

PLACES is JSON: the port or path of each backend. `GET /NAME` runs the handler NAME below; what it
raises becomes a 500.
"""

from __future__ import annotations

import asyncio
import json
import select
import socket
import struct
import sys
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

PATIENCE_SECONDS = 0.3
REQUEST = "GET {} HTTP/1.1\r\nHost: backend\r\n\r\n"
LOCAL = "127.0.0.1"
places: dict[str, Any] = json.loads(sys.argv[1])
pool: dict[str, socket.socket] = {}


def http(backend: str, path: str, seconds: float | None = None) -> None:
    connection = HTTPConnection(LOCAL, places[backend], timeout=seconds)
    try:
        connection.request("GET", path)
        connection.getresponse().read()
    finally:
        connection.close()


def ask(end: socket.socket, path: str) -> None:
    end.sendall(REQUEST.format(path).encode())
    if not end.recv(4096):
        raise ConnectionError("no answer")


def unix(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(path)
        ask(end, "/ok")


class Handlers:
    """What requests do, by their path."""

    def first(self) -> None:
        http("first", "/ok")

    def refused(self) -> None:
        http("first", "/ok")

    def refused_timeout(self) -> None:
        http("first", "/ok", seconds=5)

    def refused_asyncio(self) -> None:
        asyncio.run(asyncio.open_connection(LOCAL, places["first"]))

    def dies(self) -> None:
        http("second", "/die")

    def timeout(self) -> None:
        http("third", "/silent", PATIENCE_SECONDS)

    def receive_timeout(self) -> None:
        with socket.create_connection((LOCAL, places["third"])) as end:
            limit = struct.pack("ll", 0, int(PATIENCE_SECONDS * 1e6))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            ask(end, "/silent")

    def poll(self) -> None:
        with socket.create_connection((LOCAL, places["third"])) as end:
            end.sendall(REQUEST.format("/silent").encode())
            poll = select.poll()
            poll.register(end, select.POLLIN)
            if not poll.poll(PATIENCE_SECONDS * 1e3):
                raise TimeoutError

    def reset(self) -> None:
        http("third", "/reset")

    def pooled(self) -> None:
        end = pool["pooled"] = socket.create_connection((LOCAL, places["third"]))
        ask(end, "/closing")

    def broken_pipe(self) -> None:
        end = pool.pop("pooled")
        head = REQUEST.format("/ok").encode()
        try:
            end.send(head[:-2])
            # the reset that this brings is there before the rest is sent
            time.sleep(0.05)
            end.send(head[-2:])
        finally:
            end.close()

    def stalled(self) -> None:
        with socket.create_connection((LOCAL, places["third"])) as end:
            ask(end, "/last")
            end.settimeout(PATIENCE_SECONDS)
            ask(end, "/ok")

    def unix_first(self) -> None:
        unix(places["unix"])

    def unix_refused(self) -> None:
        unix(places["unix"])

    def unix_missing(self) -> None:
        unix(places["unix"] + ".missing")

    def backlog(self) -> None:
        socket.create_connection((LOCAL, places["full"]), timeout=PATIENCE_SECONDS)

    def unused(self) -> None:
        """Looks whether a port is open, and is no failure."""
        for used in (True, False, True):
            with socket.create_connection((LOCAL, places["third"]), timeout=5) as end:
                if used:
                    ask(end, "/ok")


class Handler(BaseHTTPRequestHandler):
    """Runs a handler."""

    def do_GET(self) -> None:
        try:
            getattr(Handlers(), self.path[1:])()
        except (OSError, asyncio.TimeoutError) as error:
            self.answer(500, repr(error))
        else:
            self.answer(200, "ok")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


def main() -> None:
    with HTTPServer((LOCAL, 0), Handler) as server:
        print("listening", server.server_port, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
