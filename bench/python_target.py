"""A target for python_cost.py: says what its own work takes, whenever it is asked.

Usage: python_target.py WORK DEPTH. Reads a number from stdin, does the work so often, and writes the
nanoseconds of CPU time that one took, until stdin ends.
"""

import asyncio
import contextvars
import os
import socket
import sys
import time


def turns(count: int) -> None:
    """A message to itself and back: each way begins a turn, so that each call gets a stack."""
    here, there = socket.socketpair()
    send, receive = here.send, here.recv
    answer, get = there.send, there.recv
    with here, there:
        for _ in range(count // 4 + 1):
            send(b"x")
            get(1)
            answer(b"y")
            receive(1)


def calls(count: int) -> None:
    """System calls that do next to nothing."""
    getppid = os.getppid
    for _ in range(count):
        getppid()


def task_calls(count: int) -> None:
    """The same inside of an asyncio task."""

    async def work() -> None:
        calls(count)

    asyncio.run(work())


def contexts(count: int) -> None:
    """Contexts, as asyncio makes them for each task and callback."""
    copy = contextvars.copy_context
    for _ in range(count):
        copy()


def submits(count: int) -> None:
    """Work items through the queue of a thread pool."""
    from queue import SimpleQueue

    queue: SimpleQueue[int] = SimpleQueue()
    put, get = queue.put, queue.get
    for _ in range(count):
        put(1)
        get()


WORKS = {work.__name__: work for work in (turns, calls, task_calls, contexts, submits)}


def deep(depth: int, work: str, count: int) -> None:
    """The work at a depth of Python functions."""
    if depth > 1:
        deep(depth - 1, work, count)
    else:
        WORKS[work](count)


def main() -> None:
    """Answer until stdin ends."""
    work, depth = sys.argv[1], int(sys.argv[2])
    # main, deep and the work itself are frames, too
    depth = max(depth - 3, 1)
    deep(depth, work, 100)
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        began = time.thread_time_ns()
        deep(depth, work, count)
        print((time.thread_time_ns() - began) / count, flush=True)


if __name__ == "__main__":
    main()
