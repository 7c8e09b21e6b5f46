"""Tells stories with Python stacks: who ran what, waited where, and had to wait for the GIL."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scope_ebpf.recording.reader import Recording
from scope_ebpf.records import ProcessEvent, SampleReason
from tests.pure.recordings import at
from tests.pure.stories import NUMBERS, Story

PERIOD = 10_101_010  # of 99 Hz, in nanoseconds
FAMILIES = ["processes", "syscalls", "messages", "offcpu", "samples", "contexts", "gil"]
# A table of CPython 3.10 in which every instruction has a line of its own, and there the offset in
# stacks counts instructions: offset 3 is the third line after the first.
LINES = bytes([2, 0] + [2, 1] * 100)
VERSION = 0x030A

Frame = tuple[int, int]
"""Address of a code object, and line after its first."""


class StackStory(Story):
    """A story with threads that have stacks. Times are nanoseconds since its start."""

    def begin(self, tgid: int, tid: int, comm: str, time_ns: int, **more: Any) -> None:
        """A thread begins."""
        self.row("processes", time_ns=at(time_ns), event=int(ProcessEvent.PROCESS_THREAD), tgid=tgid,
                 tid=tid, comm=comm, **more)  # fmt: skip

    def thread(self, tgid: int, tid: int, comm: str) -> None:
        """A thread that runs already."""
        self.row("processes", time_ns=at(0), event=0, tgid=tgid, tid=tid, comm=comm)

    def finish(self, tgid: int, tid: int, time_ns: int) -> None:
        """A thread ends."""
        self.row("processes", time_ns=at(time_ns), event=int(ProcessEvent.PROCESS_THREAD_EXIT),
                 tgid=tgid, tid=tid)  # fmt: skip

    def code(
        self, tgid: int, code: int, name: str | None, file: str | None = "/srv/shop/app.py",
        first_line: int = 10, time_ns: int = 0,
    ) -> None:  # fmt: skip
        """A code object is described."""
        self.row("codes", time_ns=at(time_ns), tgid=tgid, code=code, name=name, file=file,
                 first_line=first_line, lines=LINES, version=VERSION, first_instruction=0)  # fmt: skip

    def stack(
        self, tgid: int, stack: int, frames: Sequence[Frame], time_ns: int = 1, *,
        truncated: bool = False,
    ) -> None:  # fmt: skip
        """A stack is described, innermost frame first."""
        self.row("stacks", time_ns=at(time_ns), tgid=tgid, stack=stack,
                 codes=[code for code, _ in frames], offsets=[line for _, line in frames],
                 truncated=truncated)  # fmt: skip

    def tick(
        self, tgid: int, stack: int | None, time_ns: int = 5, *, tid: int | None = None,
        native: str | None = None, context: int = 0,
    ) -> None:  # fmt: skip
        """The sampling clock ticks while a thread runs."""
        self.row("samples", time_ns=at(time_ns), tgid=tgid, tid=tid or tgid, stack=stack,
                 reason=int(SampleReason.SAMPLE_CPU), native=native, context=context)  # fmt: skip

    def off(
        self, tgid: int, name: str | None, time_ns: int, duration_ns: int, *, tid: int | None = None,
        ready_ns: int | None = 0, state: int = 1, stack: int | None = None, sampled: bool = False,
        call_ns: int | None = None, context: int = 0, result: int = 1,
        reason: SampleReason = SampleReason.SAMPLE_WAIT,
    ) -> None:  # fmt: skip
        """A thread is off the CPU in a call (None: in none), with a stack if `sampled`."""
        tid = tid or tgid
        call_ns = time_ns if call_ns is None else call_ns
        self.row("offcpu", start_ns=at(time_ns), duration_ns=duration_ns, runnable_ns=ready_ns,
                 tgid=tgid, tid=tid, state=state, number=NUMBERS[name] if name else None,
                 syscall_start_ns=at(call_ns) if name else None)  # fmt: skip
        if name:
            self.row("syscalls", start_ns=at(call_ns), duration_ns=time_ns + duration_ns - call_ns,
                     tgid=tgid, tid=tid, number=NUMBERS[name], result=result)  # fmt: skip
        if sampled or stack is not None:
            self.row("samples", time_ns=at(call_ns), tgid=tgid, tid=tid, stack=stack, context=context,
                     reason=int(reason), duration_ns=duration_ns)  # fmt: skip

    def wait_for_gil(
        self, tgid: int, tid: int, time_ns: int, duration_ns: int, holder: int | None,
        *, off_ns: int | None = None, stack: int | None = None,
    ) -> None:  # fmt: skip
        """A call waits for the GIL; off the CPU but for a little at its begin and end."""
        off_ns = duration_ns - 2 if off_ns is None else off_ns
        self.off(tgid, "futex", time_ns + 1, off_ns, tid=tid, call_ns=time_ns, stack=stack)
        self.row("gil", start_ns=at(time_ns), duration_ns=duration_ns, tgid=tgid, tid=tid,
                 holder_tid=holder)  # fmt: skip

    def met(self, tgid: int, **more: Any) -> None:
        """A CPython process is looked into."""
        self.row("interpreters", time_ns=at(0), tgid=tgid, version="3.10.1",
                 **{"stacks": True, "contexts": True, "gil": True, "reason": None, **more})  # fmt: skip

    def record(self, path: Path, **changes: Any) -> Recording:
        """The recording, with all families."""
        return super().record(path, **{"families": FAMILIES, **changes})
