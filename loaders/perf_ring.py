"""Perf ring buffers that the probes fill: drained as numpy arrays, without a Python object per event.

Each is a perf event of one CPU for the output of BPF programs, mapped into memory: a page of control data
and then a power of two of bytes that the kernel writes records into, one after the other around the end.
Layout: include/uapi/linux/perf_event.h, perf_event_mmap_page and PERF_RECORD_SAMPLE with PERF_SAMPLE_RAW.
All samples of a ring have the same size, so that what lies between two other records is an array.
"""

import errno
import mmap
import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders.libbpf import perf_events_refused
from scope_ebpf.loaders.perf import open_bpf_output
from scope_ebpf.loaders.ring import Records

PERF_RECORD_LOST, PERF_RECORD_SAMPLE = 2, 9
HEADER = np.dtype([("type", "<u4"), ("misc", "<u2"), ("size", "<u2")])
# In the page of control data: where the kernel writes next, and up to where user space has read.
DATA_HEAD, DATA_TAIL = 1024, 1032
RAW_AT = HEADER.itemsize + 4  # behind the sample's header comes the size of what was sent


def sample_bytes(record_bytes: int) -> int:
    """What a record takes in a ring, with what the kernel puts around it."""
    return -(-(RAW_AT + record_bytes) // 8) * 8


def ring_bytes(wanted: int) -> int:
    """The power of two of pages that holds so many bytes, or half of what would be more."""
    pages = max(wanted // mmap.PAGESIZE, 1)
    return mmap.PAGESIZE << (pages.bit_length() - 1)


class PerfRing:
    """One CPU's perf ring buffer of records of one size.

    Args:
        control: the page of control data, shape (page size / 8,), in shared memory.
        data: the bytes of the ring, a power of two, in shared memory.
        dtype: of the records; it has `sequence`, which is the low half of the record's index, plus one.
        tail: the CPU's tail in cpu_state, shape (1,), in shared memory: records ever drained.
    """

    def __init__(
        self,
        control: NDArray[np.uint64],
        data: NDArray[np.uint8],
        dtype: np.dtype[Any],
        tail: NDArray[np.uint64],
    ) -> None:
        """Start where the ring was read up to."""
        self._head = control[DATA_HEAD // 8 : DATA_HEAD // 8 + 1]
        self._tail = control[DATA_TAIL // 8 : DATA_TAIL // 8 + 1]
        self._data = data
        self._dtype = dtype
        self._stride = sample_bytes(dtype.itemsize)
        self._drained = tail
        self._fence = threading.Lock()
        self._next = 0  # the index that is expected; the kernel's count says only its low half
        # records that the kernel says it could not write; the probes know that, and count it by kind
        self.unwritten = 0

    def fill(self) -> float:
        """The part of the ring that waits to be drained, 0 to 1."""
        return (int(self._head[0]) - int(self._tail[0])) / len(self._data)

    def drain(self, limit: int | None = None) -> tuple[int, Records] | None:
        """Copy out the records and give their room back to the kernel.

        Returns:
            The index of the first record and the records; None if there is none. Indices are told by
            `sequence`: they need not follow each other.

        Raises:
            LoadError: the ring holds what cannot be in it.
        """
        head, tail = int(self._head[0]), int(self._tail[0])
        if head == tail:
            return None
        self._order()
        waiting = self._copy(tail, head - tail)
        parts, used = self._split(waiting, limit)
        records = self._join(parts)
        self._order()
        self._tail[0] = tail + used
        self._drained[0] = int(self._drained[0]) + len(records)
        if not len(records):
            return None
        begin, end = records["sequence"][[0, -1]].tolist()
        first = self._next + _distance(self._next + 1, begin)
        self._next = first + _distance(begin, end) + 1
        return first, records

    def _copy(self, tail: int, length: int) -> NDArray[np.uint8]:
        """The bytes from `tail` on as one piece."""
        size = len(self._data)
        start = tail % size
        first = min(length, size - start)
        copied = np.empty(length, np.uint8)
        copied[:first] = self._data[start : start + first]
        copied[first:] = self._data[: length - first]
        return copied

    def _split(
        self, waiting: NDArray[np.uint8], limit: int | None
    ) -> tuple[list[NDArray[np.uint8]], int]:
        """Runs of samples as arrays (n, stride), and how many bytes were looked at."""
        parts: list[NDArray[np.uint8]] = []
        at, taken = 0, 0
        while len(waiting) - at >= HEADER.itemsize and (limit is None or taken < limit):
            kind, _, size = waiting[at : at + HEADER.itemsize].view(HEADER)[0].item()
            if size < HEADER.itemsize or at + size > len(waiting):
                raise LoadError(
                    f"cannot read a perf ring buffer: a record of {size} bytes is in it, where"
                    f" {len(waiting) - at} are left; record with --transport rings"
                )
            if kind != PERF_RECORD_SAMPLE or size != self._stride:
                if kind == PERF_RECORD_LOST:
                    # header, id of the event, count
                    self.unwritten += int(waiting[at + 16 : at + 24].view("<u8")[0])
                elif kind == PERF_RECORD_SAMPLE:
                    raise LoadError(
                        f"cannot read a perf ring buffer: its records have {size} bytes, not"
                        f" {self._stride}; build the probes anew with `make build`"
                    )
                at += size
                continue
            count = (len(waiting) - at) // self._stride
            if limit is not None:
                count = min(count, limit - taken)
            run = waiting[at : at + count * self._stride].reshape(count, self._stride)
            # not `misc`: that tells whether user space or the kernel was interrupted
            headers = run[:, : HEADER.itemsize].copy().view(HEADER)[:, 0]
            others = (headers["type"] != PERF_RECORD_SAMPLE) | (headers["size"] != self._stride)
            if others.any():
                run = run[: int(np.argmax(others))]
            parts.append(run)
            taken += len(run)
            at += len(run) * self._stride
        return parts, at

    def _join(self, parts: list[NDArray[np.uint8]]) -> Records:
        """The records of these runs, without what the kernel put around them."""
        size = self._dtype.itemsize
        inner = [run[:, RAW_AT : RAW_AT + size] for run in parts]
        joined = np.concatenate(inner) if inner else np.empty((0, size), np.uint8)
        return np.ascontiguousarray(joined).reshape(-1).view(self._dtype)

    def _order(self) -> None:
        """Keep the loads and stores before and after apart: see SlotRing."""
        with self._fence:
            pass


def _distance(begin: int, end: int) -> int:
    """From one sequence to another, of which only 32 bits are known."""
    return (end - begin + (1 << 31)) % (1 << 32) - (1 << 31)


class PerfMemory:
    """A perf event for the output of BPF programs on one CPU, and its mapped ring."""

    def __init__(self, cpu: int, size: int, *, timed: bool = False) -> None:
        """Open and map it; `descriptor` is -1 on a CPU that is not online.

        With `timed` each sample begins with its time.

        Raises:
            LoadError: with the kernel's reason.
        """
        self.cpu = cpu
        self.descriptor = open_bpf_output(cpu, timed=timed)
        self.size = size
        if self.descriptor == -errno.ENODEV:
            self.descriptor = -1
            return
        if self.descriptor == -errno.EACCES:
            raise perf_events_refused("open a perf ring buffer")
        if self.descriptor < 0:
            raise LoadError(
                f"cannot open a perf ring buffer on CPU {cpu}: {os.strerror(-self.descriptor)};"
                " run as root, or grant CAP_BPF and CAP_PERFMON"
            )
        try:
            self._memory = mmap.mmap(self.descriptor, mmap.PAGESIZE + size, mmap.MAP_SHARED)
        except OSError as error:
            os.close(self.descriptor)
            raise LoadError(
                f"cannot map a perf ring buffer of {size >> 10} KiB: {error.strerror};"
                " grant CAP_IPC_LOCK, or raise the limit of locked memory (ulimit -l) or the sysctl"
                " kernel.perf_event_mlock_kb"
            ) from error

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """The page of control data and the ring; of a CPU that is not online they stay empty."""
        if self.descriptor < 0:
            return np.zeros(mmap.PAGESIZE // 8, np.uint64), np.zeros(mmap.PAGESIZE, np.uint8)
        control = np.frombuffer(self._memory, np.uint64, mmap.PAGESIZE // 8)
        return control, np.frombuffer(self._memory, np.uint8, self.size, mmap.PAGESIZE)

    def close(self) -> None:
        """Close the event; its memory goes with the last array over it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
