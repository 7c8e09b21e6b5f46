"""What the servers contexts_*.py ask: contexts_backend.py FD.

Answers `GET /b/ID/CALL` with a status line that carries the ID: of most requests at once, of every third
after a moment, so that answers do not come in the order of the requests.
"""

from __future__ import annotations

import asyncio
import socket
import sys

LATE_SECONDS = 0.003


class Protocol(asyncio.Protocol):
    """One connection; a client asks for one thing at a time."""

    def __init__(self) -> None:
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        while b"\r\n\r\n" in self.data:
            head, self.data = self.data.split(b"\r\n\r\n", 1)
            _, _, rid, call = head.split(b" ")[1].split(b"/")
            answer = b"HTTP/1.1 200 %s\r\nContent-Length: 7\r\n\r\n%s\n" % (rid, rid)
            if (int(rid) + int(call)) % 3:
                self.transport.write(answer)
            else:
                asyncio.get_running_loop().call_later(LATE_SECONDS, self.transport.write, answer)


async def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Protocol, sock=listener, backlog=4096)
    print("ready", flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
