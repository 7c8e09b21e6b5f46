"""Threads, tasks, code objects and frames that come and go all the time."""

from __future__ import annotations

import asyncio
import threading
from typing import Any


def walk(depth):
    return walk(depth - 1) if depth else 0


def threads():
    made: dict[str, str] = {}
    while True:
        scope: dict[str, Any] = {}
        exec(compile("def fresh(f):\n\n    return f(9)", "fresh.py", "exec"), scope)  # noqa: S102 - of this file
        thread = threading.Thread(target=scope["fresh"], args=(walk,))
        thread.start()
        made[str(len(made) % 5000)] = thread.name
        thread.join()


async def step(depth):
    if depth:
        await step(depth - 1)
    else:
        await asyncio.sleep(0)
        walk(5)
        await asyncio.sleep(0.0001)


async def worker(number):
    for turn in range(number % 7):
        await step(turn)


async def main():
    while True:
        await asyncio.gather(*(worker(number) for number in range(50)))


threading.Thread(target=threads, daemon=True).start()
print("ready", flush=True)
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
loop.run_until_complete(main())
