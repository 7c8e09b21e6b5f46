"""What belongs to which request: proven by the flow, by the request line, or a guess."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest

from scope_ebpf.analysis.nesting import DERIVED, EXACT, GUESS, Flows, Nested, nest

pytestmark = pytest.mark.pure

NO_LOOPS = pl.DataFrame(schema={"tgid": pl.UInt32, "tid": pl.UInt32, "start_ns": pl.Int64})


def flows(*rows: dict[str, Any]) -> Flows:
    """Intervals in thread 1 of process 1 unless a row says otherwise."""

    def column(name: str, default: int, dtype: Any) -> Any:
        return np.array([row.get(name, default) for row in rows], dtype)

    start = column("start", 0, np.int64)
    return Flows(
        tgid=column("tgid", 1, np.uint32),
        tid=column("tid", 1, np.uint32),
        context=column("context", 0, np.uint64),
        begun_ns=np.array([row.get("begun", row["start"]) for row in rows], np.int64),
        start_ns=start,
        end_ns=column("end", 0, np.int64),
        line=column("line", 0, np.int64),
    )


def looped(*times: int) -> pl.DataFrame:
    """Calls of epoll_wait in thread 1."""
    return pl.DataFrame(
        {"tgid": [1] * len(times), "tid": [1] * len(times), "start_ns": list(times)},
        schema=NO_LOOPS.schema,
    )


def nested(
    requests: Flows,
    calls: Flows,
    loops: pl.DataFrame | None = NO_LOOPS,
    replied: Sequence[int] = (),
) -> Nested:
    """The result, each request answered by its own thread unless `replied` says by which."""
    by = np.array(replied or [0] * len(requests), np.intp)
    return nest(requests, calls, loops, by)


def test_calls_belong_to_the_request_that_is_open():
    requests = flows({"start": 10, "end": 20}, {"start": 30, "end": 40})
    calls = flows(*({"start": at, "end": at + 1} for at in (5, 10, 19, 20, 25, 35)))
    result = nested(requests, calls)
    assert result.parent.tolist() == [-1, 0, 0, -1, -1, 1]
    assert set(result.evidence[[1, 2, 5]]) == {DERIVED}


def test_a_long_request_overlaps_all_that_come_after_it():
    requests = flows({"start": 0, "end": 100}, {"start": 10, "end": 20}, {"start": 30, "end": 40})
    result = nested(requests, flows({"start": 35, "end": 36}))
    assert result.parent.tolist() == [-1]
    assert not result.sequential.any()


def test_contexts_are_flows_of_their_own():
    """Two tasks of one event loop, each with a request: the context tells them apart."""
    requests = flows({"start": 0, "end": 100, "context": 7}, {"start": 10, "end": 90, "context": 8})
    calls = flows(
        {"start": 20, "end": 21, "context": 8},
        {"start": 20, "end": 21, "context": 7},
        {"start": 20, "end": 21},
    )
    result = nested(requests, calls, looped(5, 15, 25))
    assert result.parent.tolist() == [1, 0, -1]
    assert set(result.evidence[:2]) == {EXACT}


def test_a_response_by_another_thread_proves_nothing():
    requests = flows({"start": 0, "end": 100})
    result = nested(requests, flows({"start": 20, "end": 21}), replied=[2])
    assert not result.sequential.any()
    assert result.evidence.tolist() == [GUESS]


@pytest.mark.parametrize(("wait", "evidence"), [(5, GUESS), (0, GUESS), (100, DERIVED)])
def test_waiting_for_several_things_within_the_request(wait, evidence):
    result = nested(flows({"start": 0, "end": 100}), flows({"start": 20, "end": 21}), looped(wait))
    assert result.parent.tolist() == [0]
    assert result.evidence.tolist() == [evidence]


def test_nothing_is_proven_if_calls_were_not_recorded():
    result = nested(flows({"start": 0, "end": 100}), flows({"start": 20, "end": 21}), None)
    assert result.evidence.tolist() == [GUESS]


def test_proxied_requests_are_told_by_their_line():
    requests = flows(
        {"start": 0, "end": 100, "line": 1}, {"start": 5, "end": 95, "line": 2},
        {"start": 7, "end": 95, "line": 1},
    )  # fmt: skip
    calls = flows(
        {"start": 2, "end": 90, "line": 1}, {"start": 6, "end": 90, "line": 2},
        {"start": 8, "end": 90, "line": 1}, {"start": 9, "end": 90, "line": 3},
    )  # fmt: skip
    result = nested(requests, calls, looped(1, 3, 50))
    assert result.parent.tolist() == [0, 1, 2, -1]
    assert set(result.evidence[:3]) == {DERIVED}


def test_a_proxy_waits_for_the_body():
    """The first request's body comes after the second request, which is passed on before it."""
    requests = flows(
        {"start": 0, "begun": 10, "end": 100, "line": 1}, {"start": 5, "end": 90, "line": 1}
    )
    calls = flows({"start": 6, "end": 80, "line": 1}, {"start": 11, "end": 80, "line": 1})
    result = nested(requests, calls, looped(1, 7, 50))
    assert result.parent.tolist() == [1, 0]


def test_a_proxy_that_does_not_wait_for_the_body_is_not_told_apart():
    """What is passed on second may be of the request that came last."""
    requests = flows(
        {"start": 0, "begun": 10, "end": 100, "line": 1},
        {"start": 12, "begun": 30, "end": 90, "line": 1},
    )
    calls = flows({"start": 14, "end": 80, "line": 1})
    result = nested(requests, calls, looped(1, 13, 50))
    assert result.parent.tolist() == [-1]


def test_a_pooled_connection_is_made_before_the_request():
    """The call began (connect) before the request, but was sent within it."""
    result = nested(flows({"start": 10, "end": 100}), flows({"begun": 5, "start": 20, "end": 30}))
    assert result.parent.tolist() == [0]
