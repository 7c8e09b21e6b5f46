"""What identifies the recorded host, and how its clocks relate."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ClockOffsets:
    """What to add to CLOCK_MONOTONIC, in nanoseconds."""

    realtime_ns: int
    boottime_ns: int


def boot_id() -> str:
    """The kernel's id of this boot."""
    return BOOT_ID.read_text().strip()


def machine() -> str:
    """The architecture, as uname -m."""
    return platform.machine()


def clock_offsets() -> ClockOffsets:
    """The offsets now, each from the closest of some pairs of readings."""
    return ClockOffsets(_offset(time.CLOCK_REALTIME), _offset(time.CLOCK_BOOTTIME))


def _offset(clock: int) -> int:
    readings = []
    for _ in range(5):
        before = time.monotonic_ns()
        there = time.clock_gettime_ns(clock)
        after = time.monotonic_ns()
        readings.append((after - before, there - (before + after) // 2))
    return min(readings)[1]


def name() -> str:
    """The host's name."""
    return os.uname().nodename


def kernel() -> str:
    """The kernel's release, as uname -r."""
    return os.uname().release


def cpus() -> int:
    """How many CPUs are online."""
    return os.cpu_count() or 1
