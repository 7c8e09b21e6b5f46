"""The same server as contexts_asyncio.py on trio: contexts_trio.py BACK FD PORT."""

from __future__ import annotations

import random
import socket
import sys
from functools import partial

import trio

from tests.live.programs.contexts_asyncio import HOST, MOST_SLEEP_SECONDS, POOL, answer, request


async def read_head(stream: trio.abc.ReceiveStream) -> bytes:
    """A head's bytes, perhaps with a body behind it; empty: the other side has closed."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = await stream.receive_some(65536)
        if not more:
            return b""
        data += more
    return data


class Backend:
    """How requests ask the backend."""

    def __init__(self, back: str, port: int) -> None:
        self.back = back
        self.port = port
        self.put, self.take = trio.open_memory_channel[trio.SocketStream](POOL)

    async def prepare(self) -> None:
        if self.back == "pool":
            for _ in range(POOL):
                await self.put.send(await trio.open_tcp_stream(HOST, self.port))

    async def ask(self, rid: bytes, call: int) -> None:
        if self.back == "pool":
            stream = await self.take.receive()
        else:
            stream = await trio.open_tcp_stream(HOST, self.port)
        await stream.send_all(request(rid, call))
        data = await read_head(stream)
        while not data.endswith(b"\n") or data.endswith(b"\r\n\r\n"):
            data += await stream.receive_some(65536)
        assert rid in data, (rid, data)
        if self.back == "pool":
            await self.put.send(stream)
        else:
            await stream.aclose()


async def handle(backend: Backend, stream: trio.SocketStream) -> None:
    """One connection."""
    while head := await read_head(stream):
        rid = head.split(b" ")[1][3:]
        await trio.sleep(random.random() * MOST_SLEEP_SECONDS)
        await backend.ask(rid, 0)
        await trio.sleep(random.random() * MOST_SLEEP_SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.ask, rid, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.ask, rid, 2)
            nursery.start_soon(backend.ask, rid, 3)
        await stream.send_all(answer(rid))


async def main(back: str, fd: int, port: int) -> None:
    listener = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
    backend = Backend(back, port)
    await backend.prepare()
    print("ready", flush=True)
    await trio.serve_listeners(partial(handle, backend), [trio.SocketListener(listener)])


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
