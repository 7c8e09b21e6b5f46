"""BCC at its simplest: prints when it first saw a system call of a process, then ends.

    bcc_first_event.py PID

Run as a program of its own, since what is measured begins with the command.
"""

from __future__ import annotations

import ctypes
import sys

from bcc import BPF

PROGRAM = """
BPF_PERF_OUTPUT(events);

TRACEPOINT_PROBE(raw_syscalls, sys_enter) {
    u64 time = bpf_ktime_get_ns();
    if (bpf_get_current_pid_tgid() >> 32 == PID)
        events.perf_submit(args, &time, sizeof(time));
    return 0;
}
"""


def main() -> None:
    """Load, wait for one event, print it."""
    program = BPF(text=PROGRAM.replace("PID", str(int(sys.argv[1]))))
    found: list[int] = []

    def event(_cpu: int, data: int, _size: int) -> None:
        found.append(int.from_bytes(ctypes.string_at(data, 8), sys.byteorder))

    program["events"].open_perf_buffer(event, page_cnt=64)
    while not found:
        program.perf_buffer_poll(timeout=100)
    print(found[0], flush=True)


if __name__ == "__main__":
    main()
