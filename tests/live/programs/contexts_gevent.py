"""A server like contexts_asyncio.py on gevent: contexts_gevent.py FRONT BACK FD PORT.

FRONT: `stream`, a StreamServer with one greenlet for each connection, which asks the backend itself;
`spawn`, the same, but half of the calls are made in greenlets of their own; `pywsgi`, a WSGI server.
"""

from gevent import monkey

monkey.patch_all()

import http.client  # noqa: E402
import random  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterable  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
from gevent.pywsgi import WSGIServer  # noqa: E402
from gevent.queue import Queue  # noqa: E402
from gevent.server import StreamServer  # noqa: E402

from tests.live.programs.contexts_asyncio import (  # noqa: E402
    CALLS,
    HOST,
    MOST_SLEEP_SECONDS,
    POOL,
    answer,
)

front, back = sys.argv[1:3]
port = int(sys.argv[4])
pool: Any = Queue()


def ask(rid: bytes, call: int) -> None:
    """One call of the backend."""
    connection = pool.get() if back == "pool" else http.client.HTTPConnection(HOST, port)
    connection.request("GET", f"/b/{rid.decode()}/{call}")
    response = connection.getresponse()
    assert response.reason == rid.decode(), (rid, response.reason)
    response.read()
    if back == "pool":
        pool.put(connection)
    else:
        connection.close()


def handle(rid: bytes) -> None:
    """One request."""
    for call in range(CALLS):
        gevent.sleep(random.random() * MOST_SLEEP_SECONDS)
        if front == "spawn" and call % 2:
            gevent.spawn(ask, rid, call).get()
        else:
            ask(rid, call)


def serve(connection: socket.socket, _: Any) -> None:
    """A connection of the StreamServer."""
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return
            data += more
        head, data = data.split(b"\r\n\r\n", 1)
        rid = head.split(b" ")[1][3:]
        handle(rid)
        connection.sendall(answer(rid))


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Of the WSGI server."""
    rid = environ["PATH_INFO"][3:]
    handle(rid.encode())
    start_response(f"200 {rid}", [("Content-Length", "7")])
    return [f"{rid}\n".encode()]


if __name__ == "__main__":
    listener = socket.socket(fileno=int(sys.argv[3]))
    for _ in range(POOL):
        pool.put(http.client.HTTPConnection(HOST, port))
    if front == "pywsgi":
        server: Any = WSGIServer(listener, application, log=None)
    else:
        server = StreamServer(listener, serve)
    server.start()
    print("ready", flush=True)
    server.serve_forever()
