"""A trial of the probes: a small process does a known number of things, and what was recorded is counted."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders import extras
from scope_ebpf.loaders.capture import Batch, Capture, CaptureOptions
from scope_ebpf.loaders.message_calls import number_of
from scope_ebpf.records import (
    CALL,
    MESSAGE,
    OFFCPU,
    SAMPLE,
    CallStatus,
    ProcessEvent,
    RecordFlags,
    RecordKind,
    RecordLimits,
    SampleReason,
)

TIMES = 23
SLEEP_NS = 500_000
# What counts as such a sleep: its timer starts before the thread leaves its CPU, which a busy host delays.
AT_LEAST_NS = SLEEP_NS // 10
# Writes one byte when it is ready and waits for one; then a call, a message and a sleep, 23 times. Where the
# timer was up before the thread had left its CPU it did not sleep, and tries again.
WORKLOAD = f"""
import os, resource, time
def waits():
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
os.write(1, b"r")
os.read(0, 1)
for _ in range({TIMES}):
    os.getppid()
    os.write(1, b"x")
    before = waits()
    while waits() == before:
        time.sleep({SLEEP_NS / 1e9})
"""
# The same for TLS, which it talks with itself, without a certificate.
TLS_WORKLOAD = f"""
import os, ssl
ends = [ssl.SSLContext(side) for side in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)]
ends[0].check_hostname = False
ends[0].verify_mode = ssl.CERT_NONE
for end in ends:
    end.maximum_version = ssl.TLSVersion.TLSv1_2
    end.set_ciphers("aNULL:@SECLEVEL=0")
wire = [ssl.MemoryBIO(), ssl.MemoryBIO()]
client = ends[0].wrap_bio(*wire)
server = ends[1].wrap_bio(*wire[::-1], server_side=True)
shaking = [client, server]
while shaking:
    for end in list(shaking):
        try:
            end.do_handshake()
            shaking.remove(end)
        except ssl.SSLWantReadError:
            pass
os.write(1, b"r")
os.read(0, 1)
for _ in range({TIMES}):
    client.write(b"x")
    server.read()
"""
# Contexts that are made, and times at which a thread wants the GIL that another one keeps. On a busy host
# that one may not have taken it yet when the first has slept: such a sleep does not count.
CONTEXT_WORKLOAD = f"""
import contextvars, os
os.write(1, b"r")
os.read(0, 1)
for _ in range({TIMES}):
    contextvars.copy_context()
"""
GIL_WORKLOAD = f"""
import os, threading, time
os.write(1, b"r")
os.read(0, 1)
done, turns = [], [0]
def spin():
    while not done:
        turns[0] += 1
threading.Thread(target=spin).start()
for _ in range({TIMES}):
    before = turns[0]
    while turns[0] == before:
        time.sleep({SLEEP_NS / 1e9})
done.append(True)
"""
# Messages over a pair of sockets that go through io_uring: a queue as long as there are messages, whose
# completions are counted, not taken. Numbers and offsets: include/uapi/linux/io_uring.h.
RING_WORKLOAD = f"""
import ctypes, mmap, os, socket, struct
call = ctypes.CDLL(None, use_errno=True).syscall
parameters = ctypes.create_string_buffer(120)
ring = call({number_of("io_uring_setup")}, 32, parameters)
tail, array = struct.unpack_from("<4xI16xI", parameters.raw, 40)
queue = mmap.mmap(ring, array + 4 * 32, offset=0)
entries = mmap.mmap(ring, 64 * 32, offset=0x10000000)
ends = socket.socketpair()
text = ctypes.create_string_buffer(b"x")
send = 26
os.write(1, b"r")
os.read(0, 1)
for n in range({TIMES}):
    entry = struct.pack("<BBHiQQI", send, 0, 0, ends[0].fileno(), 0, ctypes.addressof(text), 1)
    entries[64 * n:64 * n + 64] = entry.ljust(64, b"\\0")
    struct.pack_into("<I", queue, array + 4 * n, n)
    struct.pack_into("<I", queue, tail, n + 1)
    call({number_of("io_uring_enter")}, ring, 1, n + 1, 1, 0, 0)
"""
RINGS = "rings"  # not a family: messages that are sent through io_uring
WORKLOADS = {
    "tls": TLS_WORKLOAD,
    "contexts": CONTEXT_WORKLOAD,
    "gil": GIL_WORKLOAD,
    RINGS: RING_WORKLOAD,
}
# A busy host adds waits.
AT_LEAST = frozenset({"offcpu", "samples", "gil"})


def record_workload(family: str, transport: str = "auto") -> int:
    """Record a workload with one family of probes; returns how many of its events were seen.

    Instead of a family it may be RINGS.

    Raises:
        ScopeError: the kernel refuses the probes, with the reason.
    """
    with workload(WORKLOADS.get(family, WORKLOAD)) as (process, begin):
        options = CaptureOptions(
            tgids=(process.pid,),
            families=("messages" if family == RINGS else family,),
            follow=False,
            long_wait_ns=AT_LEAST_NS,
            transport=transport,
        )
        with Capture(options) as capture:
            capture.find_pythons(capture.start())
            begin()
            process.wait(timeout=10)
            capture.stop()
            found = count_events(family, capture.drain())
            reasons = [note for note in capture.notes if not note.startswith(extras.SEEN)]
            if not found and reasons:
                raise LoadError("; ".join(reasons))
            return found


@contextmanager
def workload(program: str) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], None]]]:
    """A process that waits to do its work, and the function that lets it; killed at the end."""
    command = [sys.executable, "-I", "-S", "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        ours, theirs = _pipe(process.stdin), _pipe(process.stdout)
        try:
            theirs.read(1)

            def begin() -> None:
                ours.write(b"g")
                ours.flush()

            yield process, begin
        finally:
            process.kill()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "it was asked for as a pipe"
    return stream


def count_events(family: str, batch: Batch) -> int:
    """How much of what the workload did is in a batch, by the family that recorded it."""
    if family == "processes":
        # in the head of a wide slot the event of a process stands where others have flags
        wide = [run[["kind", "flags"]] for _, _, run in batch.wide]
        exit_event = (RecordKind.RECORD_PROCESS, ProcessEvent.PROCESS_EXIT)
        return sum(row.item() == exit_event for run in wide for row in run)
    if not batch.hot:
        return 0
    hot = np.concatenate([run for _, _, run in batch.hot])
    if family == "tls":
        sent = hot["flags"] & RecordFlags.FLAG_RECEIVE == 0
        return int(((hot["kind"] == RecordKind.RECORD_TLS) & sent).sum())
    if family == "contexts":
        return int((hot["kind"] == RecordKind.RECORD_CONTEXT).sum())
    if family == "gil":
        return int((hot["kind"] == RecordKind.RECORD_GIL).sum())
    if family == "samples":
        samples = hot.view(SAMPLE)
        waits = (samples["kind"] == RecordKind.RECORD_SAMPLE) & (
            samples["flags"] == SampleReason.SAMPLE_WAIT
        )
        return int((waits & (samples["stack"] != 0)).sum())
    calls, messages, intervals = hot.view(CALL), hot.view(MESSAGE), hot.view(OFFCPU)
    if family == "syscalls":
        getppid = calls["number"] == number_of("getppid")
        chosen = (calls["kind"] == RecordKind.RECORD_CALL) & getppid
    elif family == RINGS:
        chosen = (messages["kind"] == RecordKind.RECORD_MESSAGE) & (
            messages["fd"] == RecordLimits.NO_DESCRIPTOR
        )
    elif family == "messages":
        received = messages["flags"] & RecordFlags.FLAG_RECEIVE != 0
        chosen = (messages["kind"] == RecordKind.RECORD_MESSAGE) & ~received
    else:
        complete = intervals["flags"] & RecordFlags.FLAG_STATUS == CallStatus.STATUS_COMPLETE
        slept = (intervals["state"] != 0) & (intervals["duration_ns"] >= AT_LEAST_NS)
        chosen = (intervals["kind"] == RecordKind.RECORD_OFFCPU) & complete & slept
    return int(chosen.sum())
