"""Many short-lived contexts, whose memory comes again at once: recycle_contexts.py KIND COUNT.

KIND: asyncio, uvloop, trio: so many tasks, a few at a time; gevent: greenlets; run: contextvars alone;
loops: threads, a few at a time, each with an event loop of its own that has three tasks.

Each sends SENDS messages over a socket and lets others run in between. Tells each send as [tid, begin,
end, number] (CLOCK_MONOTONIC ns), and the descriptor.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable

SENDS = 3
AT_ONCE = 7
kind, total = sys.argv[1], int(sys.argv[2])
out, drain = socket.socketpair()
sends: list[tuple[int, int, int, int]] = []
now = time.monotonic_ns


def send(number: int) -> None:
    begin_ns = now()
    out.send(b"x")
    sends.append((threading.get_native_id(), begin_ns, now(), number))


async def task(number: int) -> None:
    for _ in range(SENDS):
        send(number)
        await asyncio.sleep(0)


async def tasks(first: int, count: int) -> None:
    for batch in range(first, first + count, AT_ONCE):
        numbers = range(batch, min(batch + AT_ONCE, first + count))
        await asyncio.gather(*map(task, numbers))
        drain.recv(65536)


def in_uvloop() -> None:
    import uvloop

    uvloop.run(tasks(0, total))


def in_trio() -> None:
    import trio

    async def short(number: int) -> None:
        for _ in range(SENDS):
            send(number)
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        for batch in range(0, total, AT_ONCE):
            async with trio.open_nursery() as nursery:
                for number in range(batch, min(batch + AT_ONCE, total)):
                    nursery.start_soon(short, number)
            drain.recv(65536)

    trio.run(main)


def in_gevent() -> None:
    import gevent

    def short(number: int) -> None:
        for _ in range(SENDS):
            send(number)
            gevent.sleep(0)

    for batch in range(0, total, AT_ONCE):
        numbers = range(batch, min(batch + AT_ONCE, total))
        gevent.joinall([gevent.spawn(short, number) for number in numbers])
        drain.recv(65536)


def by_hand() -> None:
    def short(number: int) -> None:
        for _ in range(SENDS):
            send(number)

    for number in range(total):
        contextvars.copy_context().run(short, number)
        drain.recv(65536)


def in_loops() -> None:
    def thread(first: int) -> None:
        async def three() -> None:
            await asyncio.gather(*map(task, range(first, min(first + 3, total))))

        asyncio.run(three())

    for batch in range(0, total, 3 * AT_ONCE):
        firsts = range(batch, min(batch + 3 * AT_ONCE, total), 3)
        threads = [threading.Thread(target=thread, args=(first,)) for first in firsts]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        drain.recv(65536)


KINDS: dict[str, Callable[[], None]] = {
    "asyncio": lambda: asyncio.run(tasks(0, total)),
    "uvloop": in_uvloop,
    "trio": in_trio,
    "gevent": in_gevent,
    "run": by_hand,
    "loops": in_loops,
}
work = KINDS[kind]
if kind in ("gevent", "trio", "uvloop"):
    # as in a server that runs for long, nothing is loaded any more when it is looked into
    importlib.import_module(kind)
print("ready", flush=True)
sys.stdin.read(1)
work()
print(json.dumps({"fd": out.fileno(), "sends": sends}), flush=True)
