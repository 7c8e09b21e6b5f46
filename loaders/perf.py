"""perf_event_open(2): the sampling clock of a CPU, breakpoints on data, output of BPF programs."""

import ctypes as c
import errno
import os
import struct

# include/uapi/linux/perf_event.h and hw_breakpoint.h, and the number of perf_event_open(2)
PERF_TYPE_SOFTWARE, PERF_TYPE_TRACEPOINT, PERF_TYPE_BREAKPOINT = 1, 2, 5
PERF_COUNT_SW_CPU_CLOCK, PERF_COUNT_SW_BPF_OUTPUT = 0, 10
PERF_SAMPLE_TIME, PERF_SAMPLE_RAW = 1 << 2, 1 << 10
PERF_WATERMARK, PERF_USE_CLOCKID = 1 << 14, 1 << 25
CLOCK_MONOTONIC = 1
NO_WAKEUP = 0xFFFFFFFF  # nobody waits for a ring: whoever reads it looks now and then
PERF_SAMPLE_ADDR, PERF_FLAG_FD_CLOEXEC = 1 << 3, 8
PERF_INHERIT, PERF_EXCLUDE_KERNEL, PERF_EXCLUDE_HYPERVISOR = 1 << 1, 1 << 5, 1 << 6
PERF_FREQUENCY = 1 << 10
PERF_REMOVE_ON_EXEC = 1 << 36  # 5.13, commit 2e498d0a74e5
HW_BREAKPOINT_W, HW_BREAKPOINT_RW = 2, 3
PERF_SYSCALL = {"x86_64": 298, "aarch64": 241}
# type, size, config, period or frequency, sample type, read format, flags, wakeup, bp_type, bp_addr, bp_len
ATTRIBUTES = struct.Struct("<2I5Q2I2Q")
# what follows in the fifth version: branches, user registers, user stack, clock, registers, the rest
CLOCK_ATTRIBUTES = struct.Struct("<2QIi2Q")
EVERY_PROCESS = ANY_CPU = NO_GROUP = -1


def open_cpu_clock(cpu: int, frequency_hz: int) -> int:
    """A clock that ticks so many times a second of time on a CPU: a descriptor, or -errno."""
    attributes = ATTRIBUTES.pack(
        PERF_TYPE_SOFTWARE, ATTRIBUTES.size, PERF_COUNT_SW_CPU_CLOCK, frequency_hz, 0, 0,
        PERF_FREQUENCY, 0, 0, 0, 0,
    )  # fmt: skip
    return open_event(attributes, EVERY_PROCESS, cpu)


def open_bpf_output(cpu: int, *, timed: bool = False) -> int:
    """An event for what BPF programs send on a CPU: a descriptor, or -errno.

    With `timed` each sample begins with the time of CLOCK_MONOTONIC.
    """
    kind, flags = PERF_SAMPLE_RAW, PERF_WATERMARK
    clock = b""
    if timed:
        kind, flags = kind | PERF_SAMPLE_TIME, flags | PERF_USE_CLOCKID
        clock = CLOCK_ATTRIBUTES.pack(0, 0, 0, CLOCK_MONOTONIC, 0, 0)
    attributes = ATTRIBUTES.pack(
        PERF_TYPE_SOFTWARE, ATTRIBUTES.size + len(clock), PERF_COUNT_SW_BPF_OUTPUT, 1, kind, 0,
        flags, NO_WAKEUP, 0, 0, 0,
    )  # fmt: skip
    return open_event(attributes + clock, EVERY_PROCESS, cpu)


def open_tracepoint(number: int) -> int:
    """An event for a tracepoint, by its number in tracefs: a descriptor, or -errno."""
    attributes = ATTRIBUTES.pack(
        PERF_TYPE_TRACEPOINT, ATTRIBUTES.size, number, 1, PERF_SAMPLE_RAW, 0, 0, 1, 0, 0, 0
    )
    return open_event(attributes, EVERY_PROCESS, 0)


def open_breakpoint(
    tid: int, address: int, length: int, *, writes: bool, inherit: bool = True
) -> int:
    """A hardware breakpoint on data of a thread: a descriptor, or -errno.

    It counts accesses from user mode: all (x86-64 has none for reads only), or `writes`. With `inherit` the
    threads and processes that the thread makes have it, too. Thread 0 is the calling one.
    """
    flags = PERF_EXCLUDE_KERNEL | PERF_EXCLUDE_HYPERVISOR
    if inherit:
        flags |= PERF_INHERIT | PERF_REMOVE_ON_EXEC
    kind = HW_BREAKPOINT_W if writes else HW_BREAKPOINT_RW
    result = _breakpoint(tid, address, length, kind, flags)
    if result == -errno.EINVAL and inherit:
        # a program that a child executes has other things at that address: traps for nothing
        return _breakpoint(tid, address, length, kind, flags & ~PERF_REMOVE_ON_EXEC)
    return result


def _breakpoint(tid: int, address: int, length: int, kind: int, flags: int) -> int:
    attributes = ATTRIBUTES.pack(
        PERF_TYPE_BREAKPOINT, ATTRIBUTES.size, 0, 1, PERF_SAMPLE_ADDR, 0, flags, 0,
        kind, address, length,
    )  # fmt: skip
    return open_event(attributes, tid, ANY_CPU)


def open_event(attributes: bytes, tid: int, cpu: int) -> int:
    """perf_event_open() without a group: a descriptor, or -errno."""
    call = c.CDLL(None, use_errno=True).syscall
    call.restype, call.argtypes = c.c_long, [c.c_long, c.c_char_p, *[c.c_int] * 3, c.c_ulong]
    number = PERF_SYSCALL.get(os.uname().machine)
    if number is None:
        return -errno.ENOSYS
    result = int(call(number, attributes, tid, cpu, NO_GROUP, PERF_FLAG_FD_CLOEXEC))
    return result if result >= 0 else -c.get_errno()
