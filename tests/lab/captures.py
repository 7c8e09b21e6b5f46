"""Loads and unloads captures, and tells in JSON how it went.

    captures.py loads|kills PID COUNT SEED [OPTION=VALUE...]

The command line takes seconds to start where the CPU is emulated, and only a fraction of that is what touches
the kernel. So one process imports everything once. `loads`: it attaches to the process with this id so often,
and detaches again. `kills`: it forks recorders, and ends each with SIGKILL at a random moment.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import mmap
import os
import random
import signal
import sys
import time
from typing import Any

from scope_ebpf.families import FAMILIES
from scope_ebpf.loaders.capture import Capture, CaptureOptions

# Most use what every kernel has and what is quick to load; one of so many uses all of it, with uprobes.
QUICK = ("processes", "syscalls")
ALL_OF = 10
MOST_SECONDS = 0.02
# Small rings: what is tried is their coming and going, not what they hold.
SLOTS = {"hot_slots": 1024, "wide_slots": 256}
STAGES = ("starting", "loaded", "attached", "drained")


def options(pid: int, turn: int, chosen: dict[str, str]) -> CaptureOptions:
    """What the capture of this turn records."""
    families = FAMILIES if turn % ALL_OF == 0 else QUICK
    known = {field.name for field in dataclasses.fields(CaptureOptions)}
    unknown = chosen.keys() - known
    assert not unknown, unknown
    more: dict[str, Any] = {**SLOTS, **chosen}
    return CaptureOptions(tgids=(pid,), families=families, **more)


def held() -> list[str]:
    """What of BPF and perf this process still has."""
    links = []
    for entry in os.scandir("/proc/self/fd"):
        if entry.is_symlink():
            links.append(os.readlink(entry.path))
    return [link for link in links if "bpf" in link or "perf_event" in link]


def keep_what_is_there() -> None:
    """What the imports made stays anyway; to look through it at each turn takes as long as an attach."""
    gc.collect()
    gc.freeze()


def load(pid: int, count: int, seed: int, chosen: dict[str, str]) -> dict[str, Any]:
    """Attach and detach so often; nothing may be left in this process each time."""
    moments = random.Random(seed)
    seconds = []
    keep_what_is_there()
    for turn in range(count):
        began = time.monotonic()
        with Capture(options(pid, turn, chosen)) as capture:
            marked = capture.start()
            assert pid in marked["tgid"].tolist(), turn
            time.sleep(moments.random() * MOST_SECONDS)
            capture.drain()
            capture.stop()
        del capture
        gc.collect()
        assert not held(), (turn, held())
        seconds.append(time.monotonic() - began)
    return {"seconds": seconds}


def record(pid: int, turn: int, chosen: dict[str, str], stage: mmap.mmap) -> None:
    """Be a recorder until somebody ends it."""
    with Capture(options(pid, turn, chosen)) as capture:
        stage[0] = 1
        capture.start()
        stage[0] = 2
        while True:
            capture.drain()
            stage[0] = 3
            time.sleep(0.002)


def kill(pid: int, count: int, seed: int, chosen: dict[str, str]) -> dict[str, Any]:
    """Fork recorders, and end each at a moment up to some time after it would be at work."""
    moments = random.Random(seed)
    # what is read once per process is read before: recorders shall be met where they touch the kernel
    with Capture(options(pid, 0, chosen)):
        pass
    keep_what_is_there()
    stage = mmap.mmap(-1, 4096)
    tried: dict[bool, float] = {}
    stages = dict.fromkeys(STAGES, 0)
    for turn in range(-ALL_OF, count):
        thorough = turn % ALL_OF == 0
        if turn < 0 and turn not in (-ALL_OF, -1):
            continue
        stage[0] = 0
        began = time.monotonic()
        child = os.fork()
        if not child:
            try:
                record(pid, turn, chosen, stage)
            finally:
                os._exit(70)
        if turn < 0:  # how long each kind takes
            while stage[0] < len(STAGES) - 1:
                time.sleep(0.001)
            tried[thorough] = time.monotonic() - began
        else:
            time.sleep(moments.random() * tried[thorough] * 1.3)
            stages[STAGES[stage[0]]] += 1
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"the recorder of turn {turn} failed with {status}"
    return {"stages": stages, "seconds": list(tried.values())}


def main() -> None:
    mode, pid, count, seed, *rest = sys.argv[1:]
    chosen = dict(part.split("=", 1) for part in rest)
    work = {"loads": load, "kills": kill}[mode]
    print(json.dumps(work(int(pid), int(count), int(seed), chosen)), flush=True)


if __name__ == "__main__":
    main()
