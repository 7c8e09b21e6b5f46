"""Whose time it was when several things went on at once: each has an equal share of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]
Rows = NDArray[np.intp]


def shares(begin: Times, end: Times) -> tuple[Times, bool]:
    """What each interval has of the time that all of them cover, and whether any two overlap.

    The shares add up to the length of the union. `begin` <= `end`; the order does not matter.

    >>> shares(np.array([0, 10, 40]), np.array([20, 20, 50]))
    (array([15,  5, 10]), True)
    """
    if not len(begin):
        return np.zeros(0, np.int64), False
    edges = np.unique(np.concatenate([begin, end]))
    first, last = np.searchsorted(edges, begin), np.searchsorted(edges, end)
    at_once = np.cumsum(
        np.bincount(first, minlength=len(edges)) - np.bincount(last, minlength=len(edges))
    )
    each = np.diff(edges) / np.maximum(at_once[:-1], 1)
    upto = np.concatenate([[0.0], np.cumsum(each)])
    # rounded so that nothing is lost: each gets what its predecessors left of a nanosecond
    whole = np.round(np.cumsum(upto[last] - upto[first])).astype(np.int64)
    return np.diff(whole, prepend=0), bool((at_once[:-1] > 1).any())


def union(begin: Times, end: Times) -> tuple[Times, Times]:
    """The same time as intervals that do not touch each other, sorted; empty ones are left out.

    >>> union(np.array([30, 0, 10, 5]), np.array([40, 10, 20, 5]))
    (array([ 0, 30]), array([20, 40]))
    """
    order = np.argsort(begin, kind="stable")
    order = order[end[order] > begin[order]]
    starts, ends = begin[order], end[order]
    if not len(starts):
        return starts, ends
    reached = np.maximum.accumulate(ends)
    apart = np.flatnonzero(starts[1:] > reached[:-1]) + 1
    return starts[np.r_[0, apart]], reached[np.r_[apart - 1, len(starts) - 1]]


def without(begin: int, end: int, starts: Times, ends: Times) -> list[tuple[int, int]]:
    """What is left of an interval without others, which are sorted and apart as `union` gives them.

    >>> without(0, 50, np.array([-5, 20]), np.array([10, 30]))
    [(10, 20), (30, 50)]
    """
    left = []
    for other, until in zip(starts.tolist(), ends.tolist(), strict=True):
        if other >= end:
            break
        if begin < other:
            left.append((begin, other))
        begin = max(begin, until)
    if begin < end:
        left.append((begin, end))
    return left


def around(time: Times, period: int, starts: Times, ends: Times, limits: tuple[int, int]) -> Any:
    """A period around each moment, within the stretch of others, or between them, that it fell into.

    `starts`, `ends`: as `union` gives them; `limits`: begin and end of all. Returns begins and ends.

    >>> around(np.array([8, 25]), 20, np.array([10]), np.array([40]), (0, 100))
    (array([ 0, 15]), array([10, 35]))
    """
    edges = np.unique(np.concatenate([starts, ends, np.array(limits, np.int64)]))
    place = np.searchsorted(edges, time, "right")
    lowest, highest = edges[place - 1], edges[np.minimum(place, len(edges) - 1)]
    return np.maximum(time - period // 2, lowest), np.minimum(time + period // 2, highest)
