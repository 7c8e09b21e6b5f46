"""Neighbours in time, compared with a search through everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_ebpf.analysis.asof import count_before, first_after, group_numbers, latest_before

pytestmark = pytest.mark.pure

events = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), max_size=20)


def arrays(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([row[0] for row in rows], np.intp), np.array([row[1] for row in rows], np.int64)


@given(events, events, st.booleans())
def test_neighbours_are_the_nearest_of_the_same_group(rows, asking, strictly):
    group, time = arrays(rows)
    of_group, of_time = arrays(asking)
    before = latest_before(group, time, of_group, of_time, strictly=strictly)
    after = first_after(group, time, of_group, of_time, strictly=strictly)
    for index, (wanted, moment) in enumerate(asking):
        mine = [(at, row) for row, (of, at) in enumerate(rows) if of == wanted]
        earlier = [at for at, _ in mine if at < moment or (at == moment and not strictly)]
        later = [at for at, _ in mine if at > moment or (at == moment and not strictly)]
        for found, times, nearest in ((before, earlier, max), (after, later, min)):
            if not times:
                assert found[index] == -1
            else:
                assert (group[found[index]], time[found[index]]) == (wanted, nearest(times))


@given(events, events)
def test_counts_are_of_earlier_events_of_the_same_group(rows, asking):
    counted = count_before(*arrays(rows), *arrays(asking))
    expected = [sum(of == wanted and at < moment for of, at in rows) for wanted, moment in asking]
    assert counted.tolist() == expected


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12),
)
def test_numbers_are_equal_where_all_columns_are(first, second):
    a, b = arrays(first), arrays(second)
    numbers, of_numbers = group_numbers((a[0], b[0]), (a[1], b[1]))
    every, values = [*numbers, *of_numbers], [*first, *second]
    for i, one in enumerate(values):
        for j, other in enumerate(values):
            assert (every[i] == every[j]) == (one == other)
