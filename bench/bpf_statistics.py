"""The kernel's BPF statistics: how long each program ran, and how often.

They are on only as long as a descriptor is open (BPF_ENABLE_STATS, Linux 5.8), so that they are off
again however this process ends. Measuring a run takes time, too, and some of it is counted: see
what an empty program takes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RUN_TIME = 0  # enum bpf_stats_type: BPF_STATS_RUN_TIME
INFO_BYTES = 80  # struct bpf_prog_info up to and with `name`
NAME_OFFSET = 64


@dataclass(frozen=True)
class ProgramRuns:
    """What a program did: run_time_ns and run_cnt of its fdinfo."""

    runs: int
    run_time_ns: int

    @property
    def ns_per_run(self) -> float:
        """The mean."""
        return self.run_time_ns / self.runs


@contextmanager
def enabled() -> Iterator[None]:
    """Statistics are on in the block.

    Raises:
        OSError: the kernel refuses.
    """
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    descriptor = libbpf.bpf_enable_stats(RUN_TIME)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "cannot switch the kernel's BPF statistics on")
    try:
        yield
    finally:
        os.close(descriptor)


def program_runs(pid: int) -> dict[str, ProgramRuns]:
    """By program, what ran since it was loaded: all programs that a process holds."""
    found = {}
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            text = entry.read_text()
        except FileNotFoundError:
            continue  # closed meanwhile
        fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        if "run_cnt" in fields:
            name = program_name(int(fields["prog_id"]))
            found[name] = ProgramRuns(int(fields["run_cnt"]), int(fields["run_time_ns"]))
    return found


def since(before: dict[str, ProgramRuns], after: dict[str, ProgramRuns]) -> dict[str, ProgramRuns]:
    """What ran between two readings; programs that did not run are left out."""
    none = ProgramRuns(0, 0)
    between = {
        name: ProgramRuns(
            runs.runs - before.get(name, none).runs,
            runs.run_time_ns - before.get(name, none).run_time_ns,
        )
        for name, runs in after.items()
    }
    return {name: runs for name, runs in sorted(between.items()) if runs.runs}


def program_name(identity: int) -> str:
    """The name of a loaded program, of which the kernel keeps 15 letters."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    descriptor = libbpf.bpf_prog_get_fd_by_id(identity)
    if descriptor < 0:
        return str(identity)
    try:
        info = ctypes.create_string_buffer(INFO_BYTES)
        size = ctypes.c_uint32(INFO_BYTES)
        if libbpf.bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size)):
            return str(identity)
        return info.raw[NAME_OFFSET:].split(b"\0")[0].decode()
    finally:
        os.close(descriptor)
