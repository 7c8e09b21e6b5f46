"""Does 23 of the thing that each line of its input names; runs in any CPython from 3.8 on."""

from __future__ import annotations

import asyncio
import collections
import contextvars
import queue
import sys
from typing import Any

TIMES = 23


async def nothing():
    """Never runs."""


loop = asyncio.new_event_loop()
kept: list[Any] = []
contexts: list[contextvars.Context] = []
waiting: queue.SimpleQueue[object] = queue.SimpleQueue()
line: collections.deque[object] = collections.deque()
items = [object() for _ in range(TIMES)]


def copy_current():
    contexts.extend(contextvars.copy_context() for _ in range(TIMES))


def copy_other():
    contexts.extend(contexts[0].copy() for _ in range(TIMES))


def new():
    contexts.extend(contextvars.Context() for _ in range(TIMES))


def drop():
    del contexts[-TIMES:]


def tasks():
    coroutines = [nothing() for _ in range(TIMES)]
    kept.extend(loop.create_task(coroutine) for coroutine in coroutines)


def results():
    futures = [loop.create_future() for _ in range(TIMES)]
    for future in futures:
        future.set_result(None)


def put():
    for item in items:
        waiting.put(item)


def put_nowait():
    for item in items:
        waiting.put_nowait(item)


def get():
    for _ in items:
        waiting.get()


def get_nowait():
    for _ in items:
        waiting.get_nowait()


def append():
    for item in items:
        line.append(item)


def popleft():
    for _ in items:
        line.popleft()


def code():
    for number in range(TIMES):
        compile(f"x = {number}", "x.py", "exec")


WORK = {
    work.__name__: work
    for work in (
        copy_current, copy_other, new, drop, tasks, results, put, put_nowait, get,
        get_nowait, append, popleft, code,
    )
}  # fmt: skip
for work in (put, get, put_nowait, get_nowait, append, popleft, copy_current, drop):
    work()  # what is made at the first use is made
print("ready", flush=True)
for request in sys.stdin:
    WORK[request.strip()]()
    print("done", flush=True)
