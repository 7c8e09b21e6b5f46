"""A server on asyncio whose requests ask a backend: contexts_asyncio.py FRONT BACK LOOP FD PORT.

    FRONT   streams: one task for each connection; protocol: one for each request;
            to_thread, run_in_executor: streams whose requests ask the backend in a thread
    BACK    fresh: a connection for each call; pool: a few that all requests share
    LOOP    asyncio or uvloop
    FD      the socket to listen on
    PORT    of the backend

`GET /r/ID` calls the backend CALLS times with the same ID: in the request's own task, in one that it
makes, in two at once. It sleeps in between, so that requests overlap. The answer carries the ID in its
first bytes. So what is of which request can be read from the heads of messages alone.
"""

import asyncio
import contextlib
import functools
import http.client
import random
import socket
import sys
import threading
from typing import Any

CALLS = 4
POOL = 8
LINE_BYTES = 1 << 16
MOST_SLEEP_SECONDS = 0.004
HOST = "127.0.0.1"


def request(rid, call):
    return b"GET /b/%s/%d HTTP/1.1\r\nHost: backend\r\n\r\n" % (rid, call)


def answer(rid):
    return b"HTTP/1.1 200 %s\r\nContent-Length: 7\r\n\r\n%s\n" % (rid, rid)


async def read_head(reader):
    """The first line of a head, which is read to its end; empty: the other side has closed."""
    try:
        return (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0]
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return b""


class Backend:
    """How requests ask the backend."""

    def __init__(self, back, port):
        self.back = back
        self.port = port

    async def connect(self):
        return await asyncio.open_connection(HOST, self.port)

    async def prepare(self):
        # not in __init__: up to 3.9 a queue belongs to the loop of the thread that makes it
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        if self.back == "pool":
            for _ in range(POOL):
                self.queue.put_nowait(await self.connect())

    async def ask(self, rid, call):
        """One call."""
        reader, writer = await (self.queue.get() if self.back == "pool" else self.connect())
        writer.write(request(rid, call))
        await writer.drain()
        head = await read_head(reader)
        await reader.readexactly(7)
        assert rid in head, (rid, head)
        if self.back == "pool":
            self.queue.put_nowait((reader, writer))
        else:
            writer.close()


class ThreadBackend:
    """The same from threads of a pool, each with a connection of its own."""

    def __init__(self, back, port, how):
        self.back = back
        self.port = port
        self.how = how
        self.kept = threading.local()

    async def prepare(self):
        pass

    async def ask(self, rid, call):
        if self.how == "to_thread":
            await asyncio.to_thread(self.ask_blocking, rid, call)
        else:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, functools.partial(self.ask_blocking, rid, call))

    def ask_blocking(self, rid, call):
        """One call, in a thread."""
        connection = getattr(self.kept, "connection", None)
        if connection is None or self.back == "fresh":
            connection = self.kept.connection = http.client.HTTPConnection(HOST, self.port)
        connection.request("GET", f"/b/{rid.decode()}/{call}")
        response = connection.getresponse()
        assert response.reason == rid.decode(), (rid, response.reason)
        response.read()
        if self.back == "fresh":
            connection.close()


async def handle(backend, rid):
    """One request; returns the answer."""
    await asyncio.sleep(random.random() * MOST_SLEEP_SECONDS)
    await backend.ask(rid, 0)
    await asyncio.sleep(random.random() * MOST_SLEEP_SECONDS)
    await asyncio.ensure_future(backend.ask(rid, 1))
    await asyncio.gather(backend.ask(rid, 2), backend.ask(rid, 3))
    return answer(rid)


async def serve_stream(backend, reader, writer):
    while True:
        head = await read_head(reader)
        if not head:
            break
        writer.write(await handle(backend, head.split(b" ")[1][3:]))
        await writer.drain()
    writer.close()


class Protocol(asyncio.Protocol):
    """A task for each request; callbacks of the loop read."""

    def __init__(self, backend):
        self.backend = backend
        self.data = b""
        self.tasks = set()

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.data += data
        while b"\r\n\r\n" in self.data:
            head, self.data = self.data.split(b"\r\n\r\n", 1)
            task = asyncio.ensure_future(self.work(head.split(b" ")[1][3:]))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def work(self, rid):
        self.transport.write(await handle(self.backend, rid))


async def main(front, back, listener, port):
    threads = front in ("to_thread", "run_in_executor")
    backend = ThreadBackend(back, port, front) if threads else Backend(back, port)
    await backend.prepare()
    loop = asyncio.get_running_loop()
    if front == "protocol":
        server = await loop.create_server(lambda: Protocol(backend), sock=listener, backlog=2048)
    else:
        serve = functools.partial(serve_stream, backend)
        server = await asyncio.start_server(serve, sock=listener, backlog=2048, limit=LINE_BYTES)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    front, back, chosen = sys.argv[1:4]
    listener = socket.socket(fileno=int(sys.argv[4]))
    work = main(front, back, listener, int(sys.argv[5]))
    with contextlib.suppress(KeyboardInterrupt):
        if chosen == "uvloop":
            import uvloop

            uvloop.run(work)
        else:
            asyncio.run(work)
