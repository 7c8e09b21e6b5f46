"""Asks a server of contexts_*.py: contexts_client.py PORT REQUESTS CONCURRENCY FIRST.

Sends REQUESTS requests over CONCURRENCY connections that are kept, with the ids FIRST, FIRST + 1, …; each
connection sends its next one when it has its answer. Every answer must carry the id of its request.
Tells the ids that were answered.
"""

from __future__ import annotations

import asyncio
import json
import sys

port, requests, concurrency, first = map(int, sys.argv[1:])
answered: list[int] = []


async def connection(ids: list[int]) -> None:
    """One connection's requests, one after the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for number in ids:
        rid = b"%06d" % number
        writer.write(b"GET /r/%s HTTP/1.1\r\nHost: server\r\n\r\n" % rid)
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(7)
        assert head.startswith(b"HTTP/1.1 200 " + rid) and body == rid + b"\n", (rid, head, body)
        answered.append(number)
    writer.close()


async def main() -> None:
    ids = list(range(first, first + requests))
    shares = [ids[number::concurrency] for number in range(concurrency)]
    await asyncio.gather(*map(connection, filter(None, shares)))


asyncio.run(main())
print(json.dumps(sorted(answered)))
