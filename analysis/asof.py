"""Looks up the latest or the next event of the same group, for many events at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rows = NDArray[np.intp]

NONE = -1


def group_numbers(*columns: tuple[Array, Array]) -> tuple[Rows, Rows]:
    """One number for each different combination of values, for two sets of rows alike.

    Each column is given as its values in the first and in the second set.

    >>> group_numbers((np.array([7, 8]), np.array([8, 9])))
    (array([0, 1]), array([1, 2]))
    """
    split = len(columns[0][0])
    number = np.zeros(split + len(columns[0][1]), np.intp)
    for first, second in columns:
        values = np.concatenate([first, second])
        if len(values) and values.dtype != np.bool_ and values.max() == values.min():
            continue
        _, code = np.unique(values, return_inverse=True)
        number = number * (int(code.max(initial=0)) + 1) + code
        if len(columns) > 1:
            _, number = np.unique(number, return_inverse=True)
    return number[:split], number[split:]


def latest_before(
    group: Rows, time: Array, of_group: Rows, of_time: Array, *, strictly: bool = False
) -> Rows:
    """For each (`of_group`, `of_time`) the row of (`group`, `time`) that is the latest up to then.

    Rows of other groups do not count; -1 where there is none. `strictly`: an equal time is too late.

    >>> latest_before(np.array([1, 1]), np.array([10, 20]), np.array([1, 2]), np.array([15, 15]))
    array([ 0, -1])
    """
    return _neighbour(group, time, of_group, of_time, strictly=strictly, before=True)


def first_after(
    group: Rows, time: Array, of_group: Rows, of_time: Array, *, strictly: bool = False
) -> Rows:
    """Likewise the row that is the first from then on."""
    return _neighbour(group, time, of_group, of_time, strictly=strictly, before=False)


def _neighbour(
    group: Rows, time: Array, of_group: Rows, of_time: Array, *, strictly: bool, before: bool
) -> Rows:
    count, wanted = len(group), len(of_group)
    if not count or not wanted:
        return np.full(wanted, NONE, np.intp)
    groups = np.concatenate([group, of_group])
    asks = np.zeros(count + wanted, np.int8)
    asks[count:] = 1
    # among equal times the asking row must come behind (or, strictly, before) the others
    tie = asks if before != strictly else 1 - asks
    order = np.lexsort((tie, np.concatenate([time, of_time]), groups))
    position = np.where(asks[order] == 0, np.arange(len(order)), NONE)
    if before:
        found = np.maximum.accumulate(position)
    else:
        position[position == NONE] = len(order)
        found = np.minimum.accumulate(position[::-1])[::-1]
        found[found == len(order)] = NONE
    asking = np.flatnonzero(asks[order])
    candidate = found[asking]
    row = order[np.maximum(candidate, 0)]
    fits = (candidate != NONE) & (groups[row] == groups[order[asking]])
    result = np.full(wanted, NONE, np.intp)
    result[order[asking] - count] = np.where(fits, row, NONE)
    return result


def count_before(group: Rows, time: Array, of_group: Rows, of_time: Array) -> Rows:
    """For each (`of_group`, `of_time`) how many rows of its group have a time before it."""
    groups = np.concatenate([group, of_group])
    asks = np.concatenate([np.zeros(len(group), np.int8), np.ones(len(of_group), np.int8)])
    # an equal time is not before: the asking row comes first
    order = np.lexsort((1 - asks, np.concatenate([time, of_time]), groups))
    counted = np.cumsum(asks[order] == 0)
    sorted_groups = groups[order]
    begins = np.r_[True, sorted_groups[1:] != sorted_groups[:-1]] if len(order) else np.zeros(0)
    first = np.flatnonzero(begins)
    base = (counted - (asks[order] == 0))[first]
    within = counted - base[np.cumsum(begins) - 1] if len(order) else counted
    result = np.zeros(len(of_group), np.intp)
    asking = np.flatnonzero(asks[order])
    result[order[asking] - len(group)] = within[asking]
    return result
