"""PerfRing against a kernel that writes samples, and others' records, around the end of a ring."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_ebpf.errors import LoadError
from scope_ebpf.loaders.perf_ring import (
    DATA_HEAD,
    DATA_TAIL,
    PERF_RECORD_LOST,
    PERF_RECORD_SAMPLE,
    PerfRing,
    ring_bytes,
    sample_bytes,
)

pytestmark = pytest.mark.pure

SLOT = np.dtype([("sequence", "<u4"), ("kind", "<u4"), ("value", "<u8"), ("rest", "V48")])
STRIDE = 80


class Kernel:
    """What perf_output_begin() and perf_event_output() do (kernel/events/ring_buffer.c)."""

    def __init__(self, size: int = 4096, start: int = 0) -> None:
        self.control = np.zeros(512, np.uint64)
        self.control[DATA_HEAD // 8] = self.control[DATA_TAIL // 8] = start
        self.data = np.full(size, 0xEE, np.uint8)
        self.tail = np.zeros(1, np.uint64)
        self.ring = PerfRing(self.control, self.data, SLOT, self.tail)
        self.unwritten = 0

    def write(self, record: bytes) -> bool:
        head, tail = int(self.control[DATA_HEAD // 8]), int(self.control[DATA_TAIL // 8])
        if head + len(record) - tail > len(self.data):
            return False
        for at, byte in enumerate(record, head):
            self.data[at % len(self.data)] = byte
        self.control[DATA_HEAD // 8] = head + len(record)
        return True

    def output(self, index: int, misc: int = 1) -> bool:
        """A record with this index; if records could not be written before, that comes first."""
        lost = b""
        if self.unwritten:
            lost = struct.pack("<IHHQQ", PERF_RECORD_LOST, 0, 24, 5, self.unwritten)
        slot = np.zeros(1, SLOT)
        slot["sequence"], slot["kind"], slot["value"] = (index + 1) & 0xFFFFFFFF, 7, index
        slot["rest"] = index.to_bytes(8, "little") * 6
        header = struct.pack("<IHHI", PERF_RECORD_SAMPLE, misc, STRIDE, STRIDE - 12)
        if not self.write(lost + header + slot.tobytes() + bytes(4)):
            self.unwritten += 1
            return False
        self.unwritten = 0
        return True


def drained(kernel: Kernel, limit: int | None = None) -> list[int]:
    """The indices that were drained: every record is whole and is the one for its index."""
    run = kernel.ring.drain(limit)
    if run is None:
        return []
    first, slots = run
    assert slots.flags.c_contiguous
    assert (slots["kind"] == 7).all()
    distances = (slots["sequence"] - slots["sequence"][0]).astype(np.int32)
    indices = [first + int(distance) for distance in distances]
    assert slots["value"].tolist() == indices
    assert [bytes(rest) for rest in slots["rest"]] == [i.to_bytes(8, "little") * 6 for i in indices]
    return indices


def test_sizes():
    assert sample_bytes(SLOT.itemsize) == STRIDE
    assert sample_bytes(60) == 72
    assert [ring_bytes(wanted) for wanted in (1, 4096, 8191, 8192, 1 << 20)] == [
        4096, 4096, 4096, 8192, 1 << 20,
    ]  # fmt: skip


def test_empty():
    kernel = Kernel()
    assert drained(kernel) == []
    assert kernel.ring.fill() == 0


def test_around_the_end():
    """80 does not divide the ring: records lie across its end, at every place in them."""
    kernel = Kernel()
    for index in range(0, 500, 5):
        assert all(kernel.output(number) for number in range(index, index + 5))
        assert kernel.ring.fill() == 5 * STRIDE / 4096
        assert drained(kernel) == list(range(index, index + 5))
        assert int(kernel.tail[0]) == index + 5


def test_other_bits_in_the_header():
    """An interrupt of user mode has another `misc` than one of the kernel."""
    kernel = Kernel()
    for index in range(9):
        kernel.output(index, misc=1 + index % 2)
    assert drained(kernel) == list(range(9))


def test_full_then_lost():
    kernel = Kernel()
    written = [index for index in range(60) if kernel.output(index)]
    assert written == list(range(51))
    assert drained(kernel, limit=10) == list(range(10))
    assert kernel.output(60)
    assert drained(kernel) == [*range(10, 51), 60]
    assert kernel.ring.unwritten == 9
    assert int(kernel.tail[0]) == 52
    assert kernel.ring.fill() == 0


def test_a_part_at_a_time():
    kernel = Kernel()
    for index in range(20):
        kernel.output(index)
    assert [drained(kernel, limit=8) for _ in range(4)] == [
        list(range(8)), list(range(8, 16)), list(range(16, 20)), [],
    ]  # fmt: skip


def test_sequences_wrap():
    kernel = Kernel()
    for first in (2**32 - 24, 2**32 + 8, 2**33 - 8):
        # the reader follows as long as no 2**31 are left out
        for index in range(kernel.ring._next, first - 2**30, 2**30):
            kernel.output(index)
            drained(kernel)
        indices = [first, first + 16, first + 8, first + 24]
        for index in indices:
            kernel.output(index)
        assert drained(kernel) == indices


@pytest.mark.parametrize("size", [0, 4, 4000])
def test_what_cannot_be_there(size):
    kernel = Kernel()
    kernel.output(0)
    kernel.write(struct.pack("<IHH", 77, 0, size))
    with pytest.raises(LoadError, match="--transport rings"):
        kernel.ring.drain()


def test_samples_of_another_size():
    kernel = Kernel()
    kernel.write(struct.pack("<IHHI", PERF_RECORD_SAMPLE, 0, 72, 60) + bytes(60))
    with pytest.raises(LoadError, match="72 bytes, not 80"):
        kernel.ring.drain()


@given(
    start=st.integers(0, 2**40).map(lambda number: number * 8),
    steps=st.lists(st.tuples(st.integers(0, 70), st.none() | st.integers(1, 60)), max_size=25),
)
@settings(deadline=None)
def test_everything_comes_once_or_is_lost(start, steps):
    kernel = Kernel(start=start)
    index, expected, found = 0, [], []
    for count, limit in steps:
        for _ in range(count):
            if kernel.output(index):
                expected.append(index)
            index += 1
        found += drained(kernel, limit)
    found += drained(kernel)
    assert found == expected
    assert len(found) + kernel.ring.unwritten + kernel.unwritten == index
