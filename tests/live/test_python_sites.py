"""Probes in CPython: the place of each is passed exactly once per call.

Whether the objects are where the sites say is told by the tests of what is recorded from them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from scope_ebpf.loaders.python.files import probed_files
from scope_ebpf.loaders.python.sites import PythonSite, file_sites
from tests.live.pythons import pythons
from tests.live.recording import PROGRAMS, Target
from tests.live.roots import clear, running

pytestmark = pytest.mark.live

TIMES = 23
PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
INHERIT = 1 << 1
UPROBES = Path("/sys/bus/event_source/devices/uprobe")
# What is done, and how often each event has to come: nothing else may.
EXPECTED = {
    "copy_current": {"context_copied": TIMES},
    "copy_other": {"context_made": TIMES},
    "new": {"context_made": TIMES},
    "drop": {"context_freed": TIMES},
    "tasks": {"context_copied": TIMES},
    "results": {"future_done": TIMES},
    "put": {"queue_put": TIMES},
    "get": {"queue_got": TIMES},
    "put_nowait": {"queue_put": TIMES},
    "get_nowait": {"queue_got": TIMES},
    "append": {"deque_put": TIMES},
    "popleft": {"deque_got": TIMES},
    "code": {"code_freed": TIMES},
}
# Python's own code, between a request and its answer, also makes these.
OWN = {"deque_put", "deque_got"}


class Count:
    """How often a process passes a site: a perf event that only counts (perf_event_open(2))."""

    def __init__(self, site: PythonSite, pid: int) -> None:
        kind = int((UPROBES / "type").read_text())
        path = ctypes.create_string_buffer(os.fsencode(site.path))
        attributes = bytearray(128)
        struct.pack_into("<IIQ", attributes, 0, kind, len(attributes), int(site.at_return))
        struct.pack_into("<Q", attributes, 40, INHERIT)
        struct.pack_into("<QQ", attributes, 56, ctypes.addressof(path), site.offset)
        call = ctypes.CDLL(None, use_errno=True).syscall
        place = (ctypes.c_char * len(attributes)).from_buffer(attributes)
        number = PERF_EVENT_OPEN[os.uname().machine]
        self.descriptor = int(call(number, place, pid, -1, -1, 8))  # 8: PERF_FLAG_FD_CLOEXEC
        assert self.descriptor >= 0, os.strerror(ctypes.get_errno())

    def __enter__(self) -> Count:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def read(self) -> int:
        return int.from_bytes(os.read(self.descriptor, 8), "little")


@pytest.fixture(params=pythons(), ids=str)
def target(request) -> Iterator[Target]:
    """tests/live/programs/python_sites.py in one of the CPythons of this machine."""
    with Target(*running(request.param, PROGRAMS / "python_sites.py")) as process:
        yield process
    clear(request.param)


def do(target: Target, work: str) -> None:
    """Have it do 23 of something."""
    assert target.process.stdout is not None
    assert target.process.stdin is not None
    target.process.stdin.write(work + "\n")
    target.process.stdin.flush()
    assert target.process.stdout.readline() == "done\n"


def sites_of(target: Target) -> list[PythonSite]:
    """Sites in the files that it has mapped: others would be of other interpreters."""
    maps = (Path("/proc") / str(target.pid) / "maps").read_text()
    inodes = {int(line.split()[4]) for line in maps.splitlines()}
    files = [path for path in probed_files([target.pid]) if path.stat().st_ino in inodes]
    return [site for path in files for site in file_sites(path)]


def test_each_call_is_seen_once(target):
    sites = sites_of(target)
    assert {site.event for site in sites} >= {
        event for expected in EXPECTED.values() for event in expected
    }
    with ExitStack() as stack:
        counts = [(site, stack.enter_context(Count(site, target.pid))) for site in sites]
        for work, expected in EXPECTED.items():
            before = [count.read() for _, count in counts]
            do(target, work)
            seen: dict[str, int] = {}
            for (site, count), start in zip(counts, before, strict=True):
                if (passed := count.read() - start) and (
                    site.event in expected or site.event not in OWN
                ):
                    seen[site.event] = seen.get(site.event, 0) + passed
            assert seen == expected, work
