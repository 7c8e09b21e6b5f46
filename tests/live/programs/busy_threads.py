"""Two threads that want the GIL all the time; each tells how long it took, and what it had of the CPU."""

from __future__ import annotations

import json
import sys
import threading
import time

SECONDS = 1.5
notes: dict[int, list[int]] = {}


def spin(begin: threading.Barrier) -> None:
    """Compute, and note the times of it."""
    begin.wait()
    wall, cpu = time.monotonic_ns(), time.thread_time_ns()
    end = wall + SECONDS * 1e9
    total = 0
    while time.monotonic_ns() < end:
        for number in range(1000):
            total += number
    notes[threading.get_native_id()] = [
        wall,
        time.monotonic_ns(),
        time.thread_time_ns() - cpu,
    ]


print("ready", flush=True)
sys.stdin.read(1)
barrier = threading.Barrier(2)
threads = [threading.Thread(target=spin, args=(barrier,)) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(notes), flush=True)
