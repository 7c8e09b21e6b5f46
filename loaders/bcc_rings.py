"""The kernel's own ring buffers, which a BCC program fills: drained as numpy arrays, without callbacks.

BPF_PERF_OUTPUT is a perf event per CPU, include/uapi/linux/perf_event.h; BPF_RINGBUF_OUTPUT is one
BPF_MAP_TYPE_RINGBUF, kernel/bpf/ringbuf.c. Records of one struct have one length, so runs of them are viewed
as an array. What did not fit is counted where it was submitted (probes/bcc/program.h), not here.
"""

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders import perf_ring

Bytes = NDArray[np.uint8]

PAGE = mmap.PAGESIZE
PERF_PAGES = 64  # per CPU and table, a power of two
SAMPLE_HEADER = 20  # header, time, and the length of what follows
RING_HEADER, RING_BUSY, RING_DISCARD, RING_LENGTH = 8, 1 << 31, 1 << 30, (1 << 30) - 1

_fence = threading.Lock()


def order() -> None:
    """Keep the loads before and after apart, as SlotRing does."""
    with _fence:
        pass


class PerfRing:
    """One CPU's perf event that a program's bpf_perf_event_output() fills with samples of any length."""

    def __init__(self, event: perf_ring.PerfMemory) -> None:
        """Start where it was read up to; the event is closed with this ring."""
        self.cpu, self.descriptor = event.cpu, event.descriptor
        self._event = event
        control, self._data = event.arrays()
        self._head = control[perf_ring.DATA_HEAD // 8 :]
        self._tail = control[perf_ring.DATA_TAIL // 8 :]

    def fill(self) -> float:
        """The part that waits to be drained, 0 to 1."""
        return int(self._head[0] - self._tail[0]) / len(self._data)

    def drain(self) -> Bytes:
        """Copy out all complete records and give their room back."""
        head, tail = int(self._head[0]), int(self._tail[0])
        order()
        copied = _unwrapped(self._data, tail, head - tail)
        order()
        self._tail[0] = head
        return copied

    def close(self) -> None:
        """Close the event; what is mapped goes with this object."""
        self._event.close()


class KernelRing:
    """A BPF_MAP_TYPE_RINGBUF, which all CPUs share."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Map it; the map stays its owner's.

        Raises:
            LoadError: the kernel refuses.
        """
        self.size = size
        try:
            self._consumer = mmap.mmap(descriptor, PAGE, mmap.MAP_SHARED)
            self._producer = mmap.mmap(
                descriptor, PAGE + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE
            )
        except OSError as error:
            raise LoadError(f"cannot map a ring buffer: {error.strerror}; run as root") from error
        self._tail = np.frombuffer(self._consumer, np.uint64, 1)
        self._head = np.frombuffer(self._producer, np.uint64, 1)
        self._data = np.frombuffer(self._producer, np.uint8, size, PAGE)

    def fill(self) -> float:
        """The part that waits to be drained, 0 to 1."""
        return int(self._head[0] - self._tail[0]) / self.size

    def drain(self) -> Bytes:
        """Copy out the records up to the first that is not complete, and give their room back."""
        tail, head = int(self._tail[0]), int(self._head[0])
        order()
        copied = _unwrapped(self._data, tail, head - tail)
        length = sum(run.size for _, run in _ring_runs(copied))
        order()
        self._tail[0] = tail + length
        return copied[:length]

    def close(self) -> None:
        """Nothing: what is mapped goes with this object."""


def perf_records(data: Bytes) -> Iterator[tuple[NDArray[np.int64], Bytes]]:
    """Runs of equally long samples: when each was submitted, and its bytes with up to 7 more.

    The bytes have the shape (samples, bytes of one).
    """
    for header, run in _runs(data, lambda header: int(header) >> 48):
        if header & 0xFFFFFFFF == perf_ring.PERF_RECORD_SAMPLE:
            times = np.ascontiguousarray(run[:, 8:16]).view(np.int64)[:, 0]
            yield times, run[:, SAMPLE_HEADER:]


def ring_records(data: Bytes) -> Iterator[Bytes]:
    """Runs of equally long records of a ring buffer: their bytes, shape (n, bytes)."""
    for header, run in _ring_runs(data):
        if not header & RING_DISCARD:
            yield run[:, RING_HEADER : RING_HEADER + (header & RING_LENGTH)]


def _ring_runs(data: Bytes) -> Iterator[tuple[int, Bytes]]:
    """Runs of records with the same length and flags, up to the first that is not complete."""
    for header, run in _runs(
        data, lambda header: _padded(RING_HEADER + (int(header) & RING_LENGTH)), mask=0xFFFFFFFF
    ):
        if header & RING_BUSY:
            return
        yield header, run


def _runs(
    data: Bytes, length_of: Callable[[np.uint64], int], mask: int = 0xFFFFFFFFFFFFFFFF
) -> Iterator[tuple[int, Bytes]]:
    """Runs of records whose first eight bytes, as far as `mask` says, are the same."""
    at = 0
    while at + 8 <= len(data):
        header = int(data[at : at + 8].view(np.uint64)[0]) & mask
        length = length_of(np.uint64(header))
        if length < 8:
            return
        rows = data[at : at + (len(data) - at) // length * length].reshape(-1, length)
        if not len(rows):
            return
        headers = np.ascontiguousarray(rows[:, :8]).view(np.uint64)[:, 0] & np.uint64(mask)
        other = headers != header
        count = int(np.argmax(other)) if other.any() else len(rows)
        yield header, rows[:count]
        at += count * length


def _unwrapped(ring: Bytes, start: int, length: int) -> Bytes:
    """A copy of so many bytes of a ring from a position on."""
    at = start % len(ring)
    first = min(length, len(ring) - at)
    return np.concatenate([ring[at : at + first], ring[: length - first]])


def _padded(length: int) -> int:
    return -(-length // 8) * 8


def open_rings(cpus: int) -> list[PerfRing]:
    """A perf ring for each CPU that is online.

    Raises:
        LoadError: the kernel refuses.
    """
    with ExitStack() as opened:
        events = []
        for cpu in range(cpus):
            events.append(perf_ring.PerfMemory(cpu, PERF_PAGES * PAGE, timed=True))
            opened.callback(events[-1].close)
        opened.pop_all()
    return [PerfRing(event) for event in events if event.descriptor >= 0]


def fitting(rows: Bytes, dtype: np.dtype[Any], spare: int) -> NDArray[Any] | None:
    """Rows of bytes as records; None if they are not as long as those, with up to `spare` bytes behind."""
    if not 0 <= rows.shape[1] - dtype.itemsize <= spare:
        return None
    return np.ascontiguousarray(rows[:, : dtype.itemsize]).view(dtype)[:, 0]
