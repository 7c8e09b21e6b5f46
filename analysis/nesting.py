"""Which request a flow was working on when it called somebody else: proven, or not claimed.

A flow (process, thread, logical context) works on one request at a time if, from the request's arrival
to the end of its response, it received no other request and did not wait for several things at once
(epoll): then what it does in between is the request's. That is what a sync worker or a thread of a pool
does. In an event loop logical contexts tell whose a call is (contexts.py). Where they are not known,
only a proxied request is recognised, by its request line; else, while exactly one request is open,
belonging to it is a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.asof import NONE, count_before, group_numbers, latest_before
from scope_ebpf.analysis.contexts import Lineage, Owners, Points, trace, waited_for_several
from scope_ebpf.recording.readable import syscall_numbers
from scope_ebpf.recording.reader import Recording

Times = NDArray[np.int64]
Mask = NDArray[np.bool_]
Rows = NDArray[np.intp]

# Calls that wait for any of several descriptors.
MULTIPLEXING: Final = [
    "epoll_wait",
    "epoll_pwait",
    "epoll_pwait2",
    "select",
    "pselect6",
    "io_uring_enter",
]
_EPOLL_WAITS: Final = ["epoll_wait", "epoll_pwait", "epoll_pwait2"]
_EPOLL_ADD: Final = 1  # include/uapi/linux/eventpoll.h
# poll() with more descriptors than this does so, too; clients poll the one that they wait for.
_POLLED: Final = 2

EXACT, DERIVED, GUESS = range(3)


@dataclass(frozen=True)
class Flows:
    """Intervals of flows: `start_ns` to `end_ns` in the flow (`tgid`, `tid`, `context`).

    `begun_ns`: of a call, when it was decided on: if it made a connection first, at the connect().
    Of a request, when all of it was there: a proxy waits for the body before it passes it on.
    `line` is a number of what was asked (`GET /a?b=1`), equal where that is; 0 where it is not known
    or of no protocol that proxies pass on. `received_in`, `made_for`, `worked_…`: of requests,
    as contexts.own_requests gives them; or empty.
    """

    tgid: NDArray[np.uint32]
    tid: NDArray[np.uint32]
    context: NDArray[np.uint64]
    begun_ns: Times
    start_ns: Times
    end_ns: Times
    line: NDArray[Any]
    received_in: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    made_for: Mask = field(default_factory=lambda: np.zeros(0, np.bool_))
    worked_tid: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    worked_in: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    worked_ns: Times = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        """How many there are."""
        return len(self.tgid)


@dataclass(frozen=True)
class Nested:
    """For each call the row of the request that it belongs to (-1: none), and what proves it."""

    parent: Rows
    evidence: NDArray[np.int8]
    reason: NDArray[np.int8]
    sequential: Mask
    """For each request: its flow worked on nothing else."""
    late: Mask
    """For each call: it came after the request's end, from what the request had left behind."""
    handlers: Owners
    """The flows that worked on the requests."""


REASONS: Final = (
    "same task",
    "one request at a time in its thread",
    "same request line, no other such request open",
    "the only open request of its thread",
    "same greenlet",
    "child task",
    "work item of a thread pool",
)


def read_loops(recording: Recording) -> pl.DataFrame | None:
    """The calls that wait for several things: tgid, tid, context, start_ns.

    None if calls are not recorded.
    """
    if "syscalls" not in recording.meta.families:
        return None
    several = _is_call(recording, MULTIPLEXING)
    several |= _is_call(recording, ["poll", "ppoll"]) & (pl.col("arg1") > _POLLED)
    # one event at most: perhaps because there is one descriptor
    one = _is_call(recording, _EPOLL_WAITS) & (pl.col("arg2") == 1)
    calls = recording.collect(
        recording.syscalls.filter(several).select(
            "tgid", "tid", "context", "start_ns", "arg0", one=one
        )
    )
    waits = calls.filter("one")
    if not waits.is_empty():
        calls = pl.concat([calls.filter(~pl.col("one")), _of_several(recording, waits)])
    return calls.select("tgid", "tid", "context", "start_ns")


def _is_call(recording: Recording, names: list[str]) -> pl.Expr:
    return pl.col("number").is_in(syscall_numbers(recording.meta.host.machine, names))


def _of_several(recording: Recording, waits: pl.DataFrame) -> pl.DataFrame:
    """The calls of epoll_wait whose set was not seen to be made with one member and left so.

    psycopg 3 waits for its one socket in such a way, where others call poll.
    """
    made = recording.collect(
        recording.syscalls.filter(
            _is_call(recording, ["epoll_create", "epoll_create1"]) & (pl.col("result") >= 0)
        ).select("tgid", "start_ns", set=pl.col("result").cast(pl.UInt64))
    )
    added = recording.collect(
        recording.syscalls.filter(
            _is_call(recording, ["epoll_ctl"]) & (pl.col("arg1") == _EPOLL_ADD)
        ).select("tgid", "start_ns", set="arg0")
    )

    def of_sets(events: pl.DataFrame, asking: pl.DataFrame) -> tuple[Rows, Rows]:
        name = "set" if "set" in events.columns else "arg0"
        return group_numbers(
            (events["tgid"].to_numpy(), asking["tgid"].to_numpy()),
            (events[name].to_numpy(), asking["arg0"].to_numpy()),
        )

    times = waits["start_ns"].to_numpy()
    group, of_group = of_sets(made, waits)
    latest = latest_before(group, made["start_ns"].to_numpy(), of_group, times)
    begun = np.zeros(len(waits), np.int64)
    known = latest != NONE
    begun[known] = made["start_ns"].to_numpy()[latest[known]]
    group, of_group = of_sets(added, waits)
    since = added["start_ns"].to_numpy()
    members = count_before(group, since, of_group, times) - count_before(
        group, since, of_group, begun
    )
    return waits.filter(pl.Series(~known | (members > 1)))


def works_alone(requests: Flows, loops: pl.DataFrame | None) -> Mask:
    """Which requests' flows worked on nothing else while they were open, and can be shown to have."""
    return _working_alone(requests, _owners(requests), loops)


def _working_alone(requests: Flows, owners: Owners, loops: pl.DataFrame | None) -> Mask:
    alone: Mask = owners.apart[: len(requests)].copy()
    alone &= (requests.context != 0) | ~_looping(requests, loops)
    return alone


def nest(
    requests: Flows,
    calls: Flows,
    loops: pl.DataFrame | None,
    replied_by: Rows,
    lineage: Lineage | None = None,
) -> Nested:
    """Find the request that each call belongs to.

    `loops`: as `read_loops` gives it. `replied_by`: for each request the thread that sent the
    response, or 0. `lineage`: None if nothing is known of contexts and work items. The order of rows
    does not matter.
    """
    owners = _owners(requests)
    flow, of_flow = group_numbers(
        (requests.tgid, calls.tgid), (requests.tid, calls.tid), (requests.context, calls.context)
    )
    sequential = _working_alone(requests, owners, loops)
    by_itself = (replied_by == 0) | (replied_by == requests.tid)
    sequential &= by_itself | (requests.context != 0)
    latest = latest_before(flow, requests.start_ns, of_flow, calls.start_ns)
    at = np.maximum(latest, 0)
    inside = latest != NONE
    if len(requests):
        inside &= calls.start_ns < requests.end_ns[at]
        proven = inside & sequential[at]
    else:
        proven = inside
    parent = np.where(proven, latest, NONE)
    by_context = proven & (calls.context != 0)
    evidence = np.where(by_context, EXACT, DERIVED).astype(np.int8)
    reason = np.where(by_context, 0, 1).astype(np.int8)
    late = np.zeros(len(calls), np.bool_)
    if lineage is not None:
        _traced(calls, owners, lineage, loops, parent, evidence, reason, late)
    open_ones = np.flatnonzero(~sequential | (requests.context != 0))
    loose = np.flatnonzero((parent == NONE) & (calls.context == 0))
    if len(open_ones) and len(loose):
        _proxied(requests, calls, open_ones, loose, parent, reason)
        _only_open(requests, calls, open_ones, loose, parent, evidence, reason)
    return Nested(parent, evidence, reason, sequential, late, owners)


def _owners(requests: Flows) -> Owners:
    """The flows that worked on the requests: one for each, then the readers' contexts, then threads."""
    count = len(requests)
    read, worked = np.flatnonzero(requests.received_in), np.flatnonzero(requests.worked_tid)
    rows = np.r_[np.arange(count), read, worked]
    tgid, start_ns, end_ns = requests.tgid[rows], requests.start_ns[rows], requests.end_ns[rows]
    tid = np.r_[requests.tid, requests.tid[read], requests.worked_tid[worked]]
    context = np.r_[requests.context, requests.received_in[read], requests.worked_in[worked]]
    made_for, by_item = np.zeros(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
    made_for[: len(requests.made_for)] = requests.made_for
    if len(worked):
        start_ns[-len(worked) :] = requests.worked_ns[worked]
        by_item[-len(worked) :] = True
    # a context may move between threads
    flow, _ = group_numbers(
        (tgid, tgid[:0]), (np.where(context == 0, tid, 0), tid[:0]), (context, context[:0])
    )
    apart = ~_overlapping(flow, start_ns, end_ns)
    return Owners(tgid, tid, context, start_ns, end_ns, rows, made_for, by_item, apart)


def _traced(
    calls: Flows,
    owners: Owners,
    lineage: Lineage,
    loops: pl.DataFrame | None,
    parent: Rows,
    evidence: NDArray[np.int8],
    reason: NDArray[np.int8],
    late: Mask,
) -> None:
    """Give the calls of contexts, and of threads that work for others, their requests."""
    asking = np.flatnonzero((parent == NONE) | (calls.context != 0))
    points = Points(
        calls.tgid[asking], calls.tid[asking], calls.context[asking], calls.start_ns[asking]
    )
    found = trace(points, owners, lineage, loops)
    parent[asking] = found.request
    late[asking] = found.late
    # a task that outlives the request that made it may work for others by then
    doubtful = found.by_thread | (found.late & (found.steps > 0))
    evidence[asking] = np.where(doubtful, DERIVED, EXACT)
    own = np.where(lineage.is_greenlet(points.context), 4, 0)
    reason[asking] = np.where(found.by_item, 6, np.where(found.steps == 0, own, 5))


def _overlapping(flow: Rows, start_ns: Times, end_ns: Times) -> Mask:
    """Which intervals overlap another one of their flow."""
    count = len(flow)
    if not count:
        return np.zeros(0, np.bool_)
    order = np.lexsort((start_ns, flow))
    flows, starts, ends = flow[order], start_ns[order], end_ns[order]
    # ranks instead of times, so that the running maximum starts anew with each flow
    by_end = np.argsort(ends, kind="stable")
    rank = np.empty(count, np.int64)
    rank[by_end] = np.arange(count)
    reached = np.maximum.accumulate(flows.astype(np.int64) * count + rank)
    latest_end = ends[by_end[reached - flows.astype(np.int64) * count]]
    same = flows[1:] == flows[:-1]
    result = np.zeros(count, np.bool_)
    result[1:] |= same & (latest_end[:-1] > starts[1:])
    result[:-1] |= same & (ends[:-1] > starts[1:])
    answer = np.empty(count, np.bool_)
    answer[order] = result
    return answer


def _looping(requests: Flows, loops: pl.DataFrame | None) -> Mask:
    """Which requests' threads waited for several things while they were open."""
    # not recorded: nothing is proven
    return waited_for_several(
        loops, requests.tgid, requests.tid, requests.start_ns, requests.end_ns
    )


def _proxied(
    requests: Flows,
    calls: Flows,
    open_ones: Rows,
    loose: Rows,
    parent: Rows,
    reason: NDArray[np.int8],
) -> None:
    """Give each call the open request with the same request line, if there is only one.

    A request that is passed on at once (nothing of the same line arrived in between) is settled.
    Any other one stays a candidate for all later calls until it ends; two candidates: none.
    """
    lined = loose[calls.line[loose] != 0]
    passed = open_ones[requests.line[open_ones] != 0]
    if not len(lined) or not len(passed):
        return
    key, of_key = group_numbers(
        (requests.tgid[passed], calls.tgid[lined]),
        (requests.tid[passed], calls.tid[lined]),
        (requests.line[passed], calls.line[lined]),
    )
    starts, whole = requests.start_ns[passed], requests.begun_ns[passed]
    of_starts = calls.begun_ns[lined]
    latest = latest_before(key, whole, of_key, of_starts)
    has = latest != NONE
    at = np.maximum(latest, 0)
    has &= of_starts < requests.end_ns[passed][at]
    # nothing came between: a proxy that does not wait for the body may pass on a later request
    has &= count_before(key, starts, of_key, of_starts + 1) == count_before(
        key, starts, of_key, whole[at] + 1
    )
    # only the first call after a request is its own
    order = np.lexsort((of_starts, latest))
    first = np.zeros(len(lined), np.bool_)
    first[order] = np.r_[True, latest[order][1:] != latest[order][:-1]]
    has &= first
    while has.any():
        settled = np.zeros(len(passed), np.bool_)
        settled[latest[has]] = True
        # requests that wait to be passed on are candidates for every call until they end
        waiting = np.flatnonzero(~settled)
        begun = count_before(key[waiting], starts[waiting], of_key, of_starts)
        ended = count_before(key[waiting], requests.end_ns[passed][waiting], of_key, of_starts)
        kept = has & (begun == ended)
        if kept.sum() == has.sum():
            break
        # what is refused now leaves its request waiting, which may refuse others
        has = kept
    parent[lined[has]] = passed[latest[has]]
    reason[lined[has]] = 2


def _only_open(
    requests: Flows,
    calls: Flows,
    open_ones: Rows,
    loose: Rows,
    parent: Rows,
    evidence: NDArray[np.int8],
    reason: NDArray[np.int8],
) -> None:
    """Guess that a call belongs to the only request that is open in its thread."""
    left = loose[parent[loose] == NONE]
    thread, of_thread = group_numbers(
        (requests.tgid[open_ones], calls.tgid[left]), (requests.tid[open_ones], calls.tid[left])
    )
    starts, times = requests.start_ns[open_ones], calls.start_ns[left]
    begun = count_before(thread, starts, of_thread, times + 1)
    ended = count_before(thread, requests.end_ns[open_ones], of_thread, times + 1)
    latest = latest_before(thread, starts, of_thread, times)
    only = (begun - ended == 1) & (latest != NONE)
    only &= times < requests.end_ns[open_ones][np.maximum(latest, 0)]
    parent[left[only]] = open_ones[latest[only]]
    evidence[left[only]] = GUESS
    reason[left[only]] = 3
