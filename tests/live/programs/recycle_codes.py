"""Makes functions that block once each and are thrown away: recycle_codes.py KIND.

KIND: `names`: of the same shape, with names of the same length, so that a code object and its name
have the addresses of those before. `lengths`: with names of many lengths, at many lines. `threads`: each
in a thread of its own that ends with it, a few at a time, so that thread states come again.

Tells each block as [tid, begin, end, name] (CLOCK_MONOTONIC ns), their count, and how many addresses
of code objects there were.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

COUNT = 230
AT_ONCE = 5
# Twice what makes a wait long enough for its stack to be taken.
BLOCK_SECONDS = 0.002
SOURCE = """
def {name}(sleep=sleep, now=now, seconds=seconds):
    begin = now()
    sleep(seconds)
    return begin, now()
"""


def made(kind: str, number: int) -> tuple[str, Callable[[], tuple[int, int]]]:
    # the name must not live on: as a constant, a key or a name of another
    name = f"block_{number:06d}_{number * 7919 % 1000:03d}"
    source = SOURCE
    if kind == "lengths":
        name = f"block_{number}_" + "x" * (number % 97)
        source = "\n" * (number % 13) + SOURCE
    scope: dict[str, Any] = {
        "sleep": time.sleep,
        "now": time.monotonic_ns,
        "seconds": BLOCK_SECONDS,
    }
    exec(compile(source.format(name=name), "<made>", "exec"), scope)  # noqa: S102
    return name, scope[name]


blocks: list[tuple[int, int, int, str]] = []
addresses: set[int] = set()


def block(kind: str, number: int) -> None:
    name, function = made(kind, number)
    addresses.add(id(function.__code__))
    begin_ns, end_ns = function()
    # another string: the one in the code object goes with it
    copied = "".join(list(name))
    blocks.append((threading.get_native_id(), begin_ns, end_ns, copied))


kind = sys.argv[1]
print("ready", flush=True)
sys.stdin.read(1)
if kind == "threads":
    for first in range(0, COUNT, AT_ONCE):
        threads = [
            threading.Thread(target=block, args=("lengths", first + each))
            for each in range(AT_ONCE)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
else:
    for number in range(COUNT):
        block(kind, number)
print(json.dumps({"count": COUNT, "addresses": len(addresses), "blocks": blocks}), flush=True)
