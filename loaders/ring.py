"""Rings that the probes fill: drained as numpy arrays, without a Python object per event.

A ring is a run of slots in a memory-mapped BPF array (probes/state.h). The probes move the head and write
each slot's `sequence` last; this side copies what is complete and moves the tail.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

Records = NDArray[np.void]


class SlotRing:
    """One CPU's ring of slots of one size.

    Args:
        slots: the CPU's slots, shape (n,), n a power of two, in shared memory; the dtype has `sequence`.
        head: the CPU's head, shape (1,), in shared memory: slots ever reserved.
        tail: the CPU's tail, shape (1,), in shared memory: slots ever given back.
    """

    def __init__(self, slots: Records, head: NDArray[np.uint64], tail: NDArray[np.uint64]) -> None:
        """Start where the tail is."""
        self._slots = slots
        self._sequences = slots["sequence"]
        self._head = head
        self._tail_shared = tail
        self._fence = threading.Lock()
        self.tail = int(tail[0])

    def fill(self) -> float:
        """The part of the ring that waits to be drained, 0 to 1."""
        return (int(self._head[0]) - self.tail) / len(self._slots)

    def drain(self, limit: int | None = None) -> tuple[int, Records] | None:
        """Copy out the complete slots and give them back to the probes.

        Returns:
            The index of the first slot, counted from the ring's start, and the copied slots; None if
            there is none. A slot that is reserved but not complete ends the run; it comes next time.
        """
        available = int(self._head[0]) - self.tail
        if limit is not None:
            available = min(available, limit)
        if available <= 0:
            return None
        capacity = len(self._slots)
        start = self.tail % capacity
        first = min(available, capacity - start)
        complete = self._complete(start, first, self.tail)
        if complete == first and available > first:
            complete += self._complete(0, available - first, self.tail + first)
        if not complete:
            return None
        self._order()
        first = min(complete, capacity - start)
        copied: Records = np.empty(complete, dtype=self._slots.dtype)
        # byte views: a plain memory copy instead of one per field
        target, source = copied.view(np.uint8), self._slots
        size = source.dtype.itemsize
        target[: first * size] = source[start : start + first].view(np.uint8)
        if complete > first:
            target[first * size :] = source[: complete - first].view(np.uint8)
        self._order()
        index = self.tail
        self.tail += complete
        self._tail_shared[0] = self.tail
        return index, copied

    def _complete(self, start: int, count: int, index: int) -> int:
        """How many slots from `start` on hold the sequence for their index."""
        expected = np.arange(index + 1, index + 1 + count, dtype=np.uint64).astype(np.uint32)
        wrong = self._sequences[start : start + count] != expected
        return int(np.argmax(wrong)) if wrong.any() else count

    def _order(self) -> None:
        """Keep the loads before and after apart (release, then acquire).

        x86 does so by itself; on arm64 the slot's content could else be read before its sequence, or the
        tail be seen before the content was read.
        """
        with self._fence:
            pass


def array_in(memory: Any, dtype: np.dtype[Any], count: int) -> Records:
    """A numpy array over mapped memory, without a copy."""
    return np.frombuffer(memory, dtype=dtype, count=count)
