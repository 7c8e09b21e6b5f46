"""What recorders could leave in a kernel: programs, maps, links, pins, probes, and complaints in its log.

For a guest of the lab, where nobody else uses BPF: what is there is compared as a whole.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)

TRACING = Path("/sys/kernel/tracing")
PINS = Path("/sys/fs/bpf")
# Each has a line per probe of its kind, whoever made it: uprobes and kprobes by tracefs, and functions that
# something is attached to (fentry, kprobes).
PROBE_LISTS = ("uprobe_events", "kprobe_events", "dynamic_events", "enabled_functions")
# Programs and maps are freed after a grace period of RCU, links by a worker.
PATIENCE_SECONDS = 30.0
COMPLAINTS = re.compile(
    r"WARNING|\bBUG\b|\bOops\b|general protection|Call Trace|cut here|use-after-free|refcount_t"
    r"|blocked for more than|self-detected stall|detected stalls|soft lockup|hard LOCKUP|scheduling while"
    r"|unable to handle|leaked|corrupt",
)


def identities(kind: str) -> set[int]:
    """The ids of all that the kernel has of a kind: prog, map or link."""
    found: set[int] = set()
    next_id, number = getattr(_libbpf, f"bpf_{kind}_get_next_id"), ctypes.c_uint32(0)
    while next_id(number, ctypes.byref(number)) == 0:
        found.add(number.value)
    return found


def pins() -> set[str]:
    """Names in the BPF filesystem."""
    return {str(path) for path in PINS.rglob("*")} if PINS.is_dir() else set()


def probes() -> set[str]:
    """Lines of what tracefs lists; the counts of hits in it are not what is meant."""
    found: set[str] = set()
    for name in PROBE_LISTS:
        with suppress(FileNotFoundError):
            found |= {f"{name}: {line}" for line in (TRACING / name).read_text().splitlines()}
    return found


def descriptors() -> set[tuple[int, str]]:
    """Descriptors of BPF and perf events that any process has open."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            target = os.readlink(entry)
            if re.search(r"bpf|perf_event", target):
                found.add((int(entry.parts[2]), target))
    return found


class Leftovers:
    """What there was before, to compare with."""

    def __init__(self) -> None:
        """Look now."""
        self.before = self.look()
        self._seen = self._log()

    @staticmethod
    def look() -> dict[str, set[object]]:
        """What is there now, by kind."""
        found: dict[str, set[object]] = {
            kind: set(identities(kind)) for kind in ("prog", "map", "link")
        }
        return found | {
            "pin": set(pins()),
            "probe": set(probes()),
            "descriptor": set(descriptors()),
        }

    def found(self) -> dict[str, set[object]]:
        """What is there now and was not before, after what is on its way out has gone."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            now = self.look()
            more = {name: now[name] - self.before[name] for name in now}
            more = {name: items for name, items in more.items() if items}
            if not more or time.monotonic() > deadline:
                return more
            time.sleep(0.05)

    @staticmethod
    def _log() -> list[str]:
        lines = []
        descriptor = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        try:
            while True:
                try:
                    lines.append(os.read(descriptor, 8192).decode(errors="replace"))
                except BrokenPipeError:  # what was to be read next is overwritten already
                    continue
                except BlockingIOError:
                    return lines
        finally:
            os.close(descriptor)

    def complaints(self) -> list[str]:
        """What the kernel has complained of since."""
        last = max((int(line.split(",", 2)[1]) for line in self._seen), default=-1)
        return [
            line.strip()
            for line in self._log()
            if int(line.split(",", 2)[1]) > last and COMPLAINTS.search(line)
        ]


@contextmanager
def nothing_left() -> Iterator[Leftovers]:
    """What is done inside leaves nothing in the kernel, and the kernel has nothing to say of it."""
    leftovers = Leftovers()
    yield leftovers
    assert leftovers.found() == {}
    assert leftovers.complaints() == []
