"""Attaches to processes and detaches again: harmless_attach.py COUNT PID...

Without the rest of a recorder, which takes longer than both. Looks after each time whether a program or map
of its own is left.
"""

from __future__ import annotations

import os
import random
import sys
import time

from scope_ebpf.loaders.capture import Capture, CaptureOptions

MOST_SECONDS = 0.03


def held() -> list[str]:
    """What of BPF this process still has."""
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()]
    return [link for link in links if "bpf" in link]


def attach(pids: list[int], seconds: float) -> None:
    """Once; what of the rings was mapped goes with the capture."""
    with Capture(CaptureOptions(tgids=tuple(pids))) as capture:
        marked = capture.start()
        assert set(pids) <= set(marked["tgid"].tolist())
        time.sleep(seconds)


def main() -> None:
    count, *pids = map(int, sys.argv[1:])
    moments = random.Random(count)
    for turn in range(count):
        attach(pids, moments.random() * MOST_SECONDS)
        assert not held(), (turn, held())
    print(f"{count} times, nothing left")


main()
