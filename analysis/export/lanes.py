"""Lays spans out on tracks whose slices nest, as Perfetto and other viewers demand."""

from __future__ import annotations

from heapq import heappop, heappush

End = tuple[int, int]
"""The lane on which a slice ends, and when."""


class Lanes:
    """The tracks of one thread: lane 0 is the thread's own, the others take what overlaps.

    A slice goes inside another one only if that is its parent: two requests that an event loop works
    on at the same time would otherwise look like caller and callee.

    >>> lanes = Lanes()
    >>> lanes.place(1, None, 0, 100), lanes.place(2, 1, 10, 20), lanes.place(3, None, 15, 50)
    ((0, []), (0, []), (1, []))
    >>> lanes.place(4, 1, 30, 40), lanes.finish()
    ((0, [(0, 20)]), [(0, 40), (1, 50), (0, 100)])
    """

    def __init__(self) -> None:
        self._open: list[list[int]] = [[]]  # per lane: span_ids, the outermost first
        self._free = [0]  # lanes with nothing open, as a heap
        self._ends: list[tuple[int, int, int]] = []  # end_ns, lane, span_id: a heap
        self._lane_of: dict[int, tuple[int, int]] = {}  # lane and end_ns of what is open

    def place(
        self, span_id: int, parent: int | None, start_ns: int, end_ns: int
    ) -> tuple[int, list[End]]:
        """The lane of a span, and what ends before it, in order.

        Spans come by their start; those that start together, the longest first.
        """
        ended = self._end_until(start_ns)
        lane, parent_end_ns = self._lane_of.get(parent, (-1, 0)) if parent is not None else (-1, 0)
        if lane < 0 or self._open[lane][-1] != parent or parent_end_ns < end_ns:
            if self._free:
                lane = heappop(self._free)
            else:
                lane = len(self._open)
                self._open.append([])
        self._open[lane].append(span_id)
        self._lane_of[span_id] = (lane, end_ns)
        heappush(self._ends, (end_ns, lane, span_id))
        return lane, ended

    def finish(self) -> list[End]:
        """What is still open."""
        return self._end_until(None)

    def _end_until(self, moment_ns: int | None) -> list[End]:
        ended = []
        while self._ends and (moment_ns is None or self._ends[0][0] <= moment_ns):
            end_ns, lane, _ = heappop(self._ends)
            # Of slices that end together, the innermost one goes first.
            del self._lane_of[self._open[lane].pop()]
            if not self._open[lane]:
                heappush(self._free, lane)
            ended.append((lane, end_ns))
        return ended
