"""What runs already and what is still open, from /proc: BCC has no iterators.

Sees what the iterators of probes/processes.h see, but: when a thread was made only to the tick of the clock
(10 ms), and of a thread that is ready to run, not since when.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scope_ebpf import records
from scope_ebpf.loaders import bcc, cgroups
from scope_ebpf.loaders.ring import Records
from scope_ebpf.loaders.targets import PF_KTHREAD, PROC, parse_stat

# enum task_phase in probes/state.h
PHASE_ATTACHED, PHASE_DORMANT = 1, 3
# The kernel's task state bits, by the letter in /proc/PID/stat (fs/proc/array.c).
STATES = {"R": 0, "S": 1, "D": 2, "T": 4, "t": 8, "I": 0x402}
UNKNOWN_CONTEXT = (1 << 64) - 1
UNKNOWN_NS = (1 << 64) - 1
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
BPF_NOEXIST = 1


@dataclass(frozen=True)
class Thread:
    """A thread as /proc shows it."""

    tgid: int
    tid: int
    parent: int
    comm: str
    state: str
    flags: int
    start_ns: int


def threads() -> Iterator[Thread]:
    """All threads of the host, each process's first one first."""
    for entry in os.scandir(PROC):
        if not entry.name.isdecimal():
            continue
        with suppress(OSError):
            for tid in sorted(map(int, os.listdir(f"{entry.path}/task"))):
                if (thread := read_thread(int(entry.name), tid)) is not None:
                    yield thread


def read_thread(tgid: int, tid: int) -> Thread | None:
    """A thread; None: it is gone, or has ended and waits for its parent."""
    try:
        text = (PROC / str(tgid) / "task" / str(tid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    comm, fields = parse_stat(text)
    if fields[0] in "ZX":
        return None
    return Thread(
        tgid, tid, int(fields[1]), comm, fields[0], int(fields[6]), int(fields[19]) * TICK_NS
    )


def call_of(tid: int) -> list[int] | None:
    """Number and arguments of the system call that a sleeping thread is in; None: none, or not told."""
    try:
        words = (PROC / str(tid) / "syscall").read_text().split()
    except OSError:
        return None
    return parse_call(words)


def parse_call(words: list[str]) -> list[int] | None:
    """The words of /proc/PID/syscall.

    >>> parse_call("0 0x3 0x7f00 0x1000 0x0 0x0 0x0 0x7ffc 0x7f11".split())
    [0, 3, 32512, 4096]
    >>> parse_call(["running"]) is None, parse_call(["-1", "0x7ffc", "0x7f11"]) is None
    (True, True)
    """
    if len(words) < 4 or not words[0].isdecimal():
        return None
    return [int(words[0]), *(int(word, 16) for word in words[1:4])]


def cgroup_id(tgid: int, mount: Path | None) -> int:
    """The id of a process's cgroup in the unified hierarchy; 0: not known."""
    if mount is None:
        return 0
    try:
        for line in (PROC / str(tgid) / "cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return (mount / line[3:].lstrip("/")).stat().st_ino
    except OSError:
        pass
    return 0


class Life:
    """Marks threads in the map `tasks`, and reads what it remembers of them."""

    def __init__(
        self,
        tasks: Any,
        constants: Mapping[str, int],
        chosen: Mapping[str, Mapping[int, int]],
        states: Records,
    ) -> None:
        """Take what there is to work on.

        Args:
            tasks: BCC's table of what is remembered of each thread.
            constants: what the programs were compiled with.
            chosen: the maps `targets` and `cgroups`, which are filled later.
            states: the CPUs' states, in shared memory.
        """
        self._tasks = tasks
        self._constants = constants
        self._chosen = chosen
        self._states = states
        with suppress(OSError):
            self._mount = cgroups.mount_point()

    _mount: Path | None = None

    def mark(self) -> bytes:
        """Take up every thread that is wanted: records of MARKED_TASK."""
        found = list(threads())
        parents = {thread.tgid: thread.parent for thread in found}
        kinds: dict[int, int] = {}
        marked = []
        for thread in found:
            if thread.tgid not in kinds:
                kinds[thread.tgid] = self._wanted(thread, parents)
            if kinds[thread.tgid]:
                marked.append(self._mark(thread, kinds[thread.tgid]))
        return b"".join(marked)

    def _wanted(self, thread: Thread, parents: Mapping[int, int]) -> int:
        """As wanted() in probes/processes.h."""
        constants = self._constants
        if thread.flags & PF_KTHREAD or thread.tgid == constants["recorder_tgid"]:
            return 0
        if constants["record_everything"]:
            return records.TargetKind.TARGET_NOW
        if constants["seek_cgroups"]:
            inside = cgroup_id(thread.tgid, self._mount) in self._chosen["cgroups"]
            return records.TargetKind.TARGET_NOW if inside else 0
        tgid, seen = thread.tgid, set()
        while tgid not in seen:
            seen.add(tgid)
            if tgid in self._chosen["targets"]:
                return self._chosen["targets"][tgid]
            if not constants["follow_children"] or tgid <= 1:
                break
            tgid = parents.get(tgid, 0)
        return 0

    def _mark(self, thread: Thread, kind: int) -> bytes:
        key = self._tasks.Key(thread.tid)
        fresh = self._tasks.Leaf()
        fresh.marked_ns = time.monotonic_ns()
        fresh.context = UNKNOWN_CONTEXT
        fresh.start_boottime_ns = thread.start_ns
        dormant = kind == records.TargetKind.TARGET_AFTER_EXEC
        fresh.phase = PHASE_DORMANT if dormant else PHASE_ATTACHED
        # one that is ready to run may be running: it is taken for that
        if not dormant and STATES.get(thread.state):
            fresh.left_ns = fresh.marked_ns
            fresh.left_state = STATES[thread.state]
            fresh.left_status = records.CallStatus.STATUS_BEGAN_BEFORE
            if (call := call_of(thread.tid)) is not None:
                fresh.flight.number, fresh.flight.arg0, fresh.flight.arg1, fresh.flight.arg2 = call
                fresh.flight.start_ns = fresh.marked_ns
        seen_before = self._insert(key, fresh) != 0
        record = np.zeros((), records.MARKED_TASK)
        record["tgid"], record["tid"] = thread.tgid, thread.tid
        record["parent_tgid"] = thread.parent
        record["seen_before"] = seen_before
        record["cgroup"] = cgroup_id(thread.tgid, self._mount)
        record["start_boottime_ns"] = thread.start_ns
        record["comm"] = thread.comm.encode(errors="surrogateescape")[:15]
        return record.tobytes()

    def _insert(self, key: Any, leaf: Any) -> int:
        return bcc.update_element(self._tasks.get_fd(), key, leaf, BPF_NOEXIST)

    def still_open(self) -> bytes:
        """Records of CALL and OFFCPU for what has not ended: as on_list_open in probes/processes.h."""
        found = []
        for key, record in self._tasks.items():
            tid = int(key.value)
            tgid = thread_group(tid)
            if tgid is None or record.phase == PHASE_DORMANT:
                continue
            found += self._open_of(tgid, tid, record, time.monotonic_ns())
        return b"".join(found)

    def _open_of(self, tgid: int, tid: int, record: Any, now: int) -> list[bytes]:
        rows = []
        flight, status = None, records.CallStatus.STATUS_OPEN
        if record.in_flight:
            flight = record.flight
        elif record.phase == PHASE_ATTACHED and record.flight.start_ns:
            flight, status = record.flight, records.CallStatus.STATUS_THROUGHOUT
        else:
            for state in self._states:
                if state["recorded"] and state["tid"] == tid and state["in_flight"]:
                    flight = _Flight(state["flight"])
        number = records.RecordLimits.NO_SYSCALL if flight is None else flight.number
        if flight is not None and self._constants["record_syscalls"]:
            call = np.zeros((), records.CALL)
            call["number"], call["kind"], call["flags"] = (
                number,
                records.RecordKind.RECORD_CALL,
                status,
            )
            call["start_ns"], call["duration_ns"] = flight.start_ns, now - flight.start_ns
            call["tgid"], call["tid"] = tgid, tid
            call["arg0"], call["arg1"], call["arg2"] = flight.arg0, flight.arg1, flight.arg2
            rows.append(call.tobytes())
        if record.left_ns and self._constants["record_offcpu"]:
            began_before = record.left_status == records.CallStatus.STATUS_BEGAN_BEFORE
            offcpu = np.zeros((), records.OFFCPU)
            offcpu["waker_number"] = records.RecordLimits.NO_SYSCALL
            offcpu["number"], offcpu["kind"] = number, records.RecordKind.RECORD_OFFCPU
            offcpu["flags"] = (
                records.CallStatus.STATUS_THROUGHOUT
                if began_before
                else records.CallStatus.STATUS_OPEN
            )
            offcpu["start_ns"], offcpu["duration_ns"] = record.left_ns, now - record.left_ns
            offcpu["tgid"], offcpu["tid"], offcpu["state"] = tgid, tid, record.left_state
            offcpu["runnable_ns"] = UNKNOWN_NS
            if record.left_state == 0:
                offcpu["runnable_ns"] = offcpu["duration_ns"]
            elif not record.woken_ns and not began_before:
                offcpu["runnable_ns"] = 0
            offcpu["syscall_start_ns"] = 0 if flight is None else flight.start_ns
            rows.append(offcpu.tobytes())
        return rows


class _Flight:
    """A call in flight in a CPU's state, as BCC shows those of threads."""

    def __init__(self, row: Any) -> None:
        self.start_ns, self.number = int(row["start_ns"]), int(row["number"])
        self.arg0, self.arg1, self.arg2 = (int(row[name]) for name in ("arg0", "arg1", "arg2"))


def thread_group(tid: int) -> int | None:
    """The process of a thread; None: it has ended."""
    try:
        for line in (PROC / str(tid) / "status").read_text(errors="replace").splitlines():
            if line.startswith("State:") and line.split()[1] in "ZX":
                return None
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None
