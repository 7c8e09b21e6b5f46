"""What the kernel does not show to the probes is told: from 7.0 on it preempts those at system calls.

The kernel runs no program a second time on a CPU where it is at work already. Until 7.0 nothing preempts one
at a system call; since then another thread may run before it ends, and its calls are left out meanwhile.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from scope_ebpf.loaders.capture import Capture, CaptureOptions
from scope_ebpf.records import RecordKind
from tests.lab.recorded import KERNEL
from tests.lab.workload import NUMBER

pytestmark = [pytest.mark.lab, pytest.mark.timeout(300)]
FIRST_PREEMPTED = (7, 0)
PROCESSES, CALLS = 3, 20_011
PROGRAM = f"import os, sys; sys.stdin.read(1)\nfor _ in range({CALLS}): os.getppid()"


def test_what_was_left_out_is_told():
    """Several processes at once on one CPU, which take turns in the midst of their calls."""
    command = [sys.executable, "-c", PROGRAM]
    targets = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(PROCESSES)]
    tgids = tuple(target.pid for target in targets)
    options = CaptureOptions(tgids=tgids, families=("processes", "syscalls"), hot_slots=1 << 18)
    try:
        with Capture(options) as capture:
            capture.start()
            for target in targets:
                assert target.stdin is not None
                target.stdin.write(b"x")
                target.stdin.close()
            assert [target.wait(200) for target in targets] == [0] * PROCESSES
            capture.stop()
            runs = [run for _, _, run in capture.drain().hot]
            lost, told = int(capture.lost().sum()), capture.skipped()
    finally:
        for target in targets:
            target.kill()
            target.wait()
    calls = [run["number"][run["kind"] == RecordKind.RECORD_CALL].tolist() for run in runs]
    missing = PROCESSES * CALLS - sum(numbers.count(NUMBER["getppid"]) for numbers in calls)
    left_out = (
        sum(map(int, re.findall(r"at (\d+) beginnings and (\d+)", told[0])[0])) if told else 0
    )
    assert lost == 0
    assert 0 <= missing <= left_out
    if KERNEL < FIRST_PREEMPTED:
        assert told == []
