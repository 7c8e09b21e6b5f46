"""Where the time of a request's handling thread went: on the CPU, or waiting, and for whom."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from scope_ebpf.analysis.matching import expand, overlaps
from scope_ebpf.analysis.schema import PARTS
from scope_ebpf.recording.readable import syscall_numbers
from scope_ebpf.recording.reader import Recording

Rows = NDArray[np.intp]
Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]

# What a thread waits for in a call, as far as the call's name tells.
OTHER, MOVE, POLL, CONNECT, LOCK, DISK, CHILD, AWAIT, SLEEP = range(9)
CALLS: Final = {
    # they move bytes: whose, the message tells; of files they wait in the state D
    MOVE: [
        "read", "readv", "preadv2", "recvfrom", "recvmsg", "recvmmsg", "write", "writev",
        "pwritev2", "sendto", "sendmsg", "sendmmsg", "sendfile", "sendfile64", "splice", "vmsplice",
    ],
    POLL: [
        "poll", "ppoll", "select", "_newselect", "pselect6", "epoll_wait", "epoll_pwait",
        "epoll_pwait2",
    ],
    CONNECT: ["connect"],
    LOCK: ["futex", "futex_waitv", "futex_wait", "flock", "semop", "semtimedop"],
    DISK: [
        "fsync", "fdatasync", "sync", "syncfs", "sync_file_range", "msync", "pread64", "pwrite64",
        "preadv", "pwritev",
    ],
    # until the child runs another program, in the state D, which has nothing to do with a disk
    CHILD: ["vfork", "clone", "clone3"],
    AWAIT: ["wait4", "waitid", "waitpid"],
    SLEEP: ["nanosleep", "clock_nanosleep"],
}  # fmt: skip
# Calls of MOVE on sockets only: without a message they failed, as by a timeout.
_SOCKET_CALLS: Final = ["recvfrom", "recvmsg", "recvmmsg", "sendto", "sendmsg", "sendmmsg"]
_NO_CALL: Final = 0xFFFF

_EVENTS: Final = {"tid": pl.UInt32, "start_ns": pl.Int64, "connection": pl.UInt32}
_NAMES: Final = ["peer", "protocol"]
# Waits that are nobody's at another end, by their place among the names; the first is nobody.
_NAMED: Final = {AWAIT: (1, "child process"), SLEEP: (2, "sleep")}


def time_parts(recording: Recording, spans: pl.DataFrame, peers: pl.DataFrame) -> pl.DataFrame:
    """Divide the time of spans; reads what is needed of a recording. See `divide_time`."""
    tids = spans.select("tid").unique().lazy()
    machine = recording.meta.host.machine
    offcpu = None
    if "offcpu" in recording.meta.families:
        offcpu = recording.collect(
            recording.offcpu.select(
                "tid", "start_ns", "duration_ns", "runnable_ns", "state", "number",
                "syscall_start_ns",
            ).join(tids, on="tid", how="semi")
        )  # fmt: skip
    messages = recording.messages.select(
        *_EVENTS, (pl.col("direction") == "send").alias("asks")
    ).join(tids, on="tid", how="semi")
    calls = syscall_numbers(machine, CALLS[POLL])
    timed_out = recording.syscalls.filter(
        pl.col("number").is_in(calls) & (pl.col("result") == 0)
    ).select("tid", "start_ns")
    ends = recording.connections.select("connection", "inode").unique("inode", keep="last")
    port = pl.format(":{}", "remote_port")
    address = pl.when(pl.col("remote_address").str.contains(":", literal=True))
    bracketed = address.then(pl.format("[{}]", "remote_address")).otherwise("remote_address")
    connects = (
        recording.connects.join(tids, on="tid", how="semi")
        .join(ends, on="inode", how="left")
        .select(*_EVENTS, pl.coalesce(bracketed + port, "remote_path").alias("address"))
    )
    return divide_time(
        spans,
        offcpu,
        recording.collect(messages),
        peers,
        connects=recording.collect(connects),
        timed_out=recording.collect(timed_out.join(tids, on="tid", how="semi")),
        machine=machine,
    )


def divide_time(
    spans: pl.DataFrame,
    offcpu: pl.DataFrame | None,
    messages: pl.DataFrame,
    peers: pl.DataFrame,
    *,
    connects: pl.DataFrame | None = None,
    timed_out: pl.DataFrame | None = None,
    machine: str = "x86_64",
) -> pl.DataFrame:
    """Where the time of each span's thread went, from its start to its end; no order is needed.

    - `spans`: `row` (any id), `tid`, `start_ns`, `duration_ns`. Each must have had its thread for
      itself, or the time is not the span's own.
    - `offcpu`: the recording's; None if that was not recorded
    - `messages`: `tid`, `start_ns`, `connection`, `asks` (it is a send)
    - `peers`: `connection`, and `peer` and `protocol` at its other end
    - `connects`: `tid`, `start_ns`, `address`, and `connection` if one came of it
    - `timed_out`: `tid`, `start_ns` of calls of poll, select or epoll_wait in which nothing came
    - `machine`: of which the numbers of system calls are

    Returns one row per span, in the order of `spans`: `row`, `cpu_ns`, `runqueue_ns`, `disk_ns`,
    `lock_ns`, `other_ns` and `waits` (`PARTS`, longest first), which add up to `duration_ns`.

    Waiting in a call that moved bytes is for the other end of that connection; in poll and its
    like, for that of the thread's next message within the span; in connect, for whom it asked. What
    ended without a message was a timeout or an error: if the thread had last sent something, in the
    span, or connected, it waited for that peer. A null `peer`: a connection that `peers` does not
    have. Uninterruptible waits (state D) are disk; on a lock of the kernel they are not, but the
    state does not tell. Waiting for a child of its own is for `child process`, and sleeping is
    `sleep`, both of no protocol.

    Without `offcpu`, all is `other_ns`. Where rows of offcpu were lost, their time counts as CPU.
    """
    start = spans["start_ns"].to_numpy()
    duration = spans["duration_ns"].to_numpy()
    if offcpu is None or offcpu.is_empty() or spans.is_empty():
        none = np.zeros(len(spans), np.int64)
        known = offcpu is not None
        cpu, other = (duration, none) if known else (none, duration)
        return _frame(spans, cpu, none, none, none, other, _no_waits())
    tids, of_span = np.unique(spans["tid"].to_numpy(), return_inverse=True)
    line = _Line.over(of_span, start, start + duration, len(tids))
    begin, end = line.at(of_span, start), line.at(of_span, start + duration)
    rows = _Intervals.of(offcpu, tids, line)
    span, interval = expand(*overlaps(begin, end, rows.begin, rows.end))
    from_ = np.maximum(begin[span], rows.begin[interval])
    upto = np.minimum(end[span], rows.end[interval])
    waiting = np.maximum(np.minimum(upto, rows.woken[interval]) - from_, 0)
    off = upto - from_
    cpu = duration - _sums(off, span, len(spans))
    runqueue = _sums(off - waiting, span, len(spans))
    waited = waiting > 0
    span, interval, waiting = span[waited], interval[waited], waiting[waited]

    events = _Events(messages, connects, peers)
    call_ns = rows.syscall_start_ns[interval]
    waits_in = _classes(machine)[rows.number[interval]]
    peer, certain = events.look_up(
        tids, of_span[span], start[span], (start + duration)[span], call_ns, waits_in == POLL,
        _among(tids, of_span[span], call_ns, timed_out),
    )  # fmt: skip
    disk = rows.disk[interval] & (waits_in != CHILD)
    socket_calls = syscall_numbers(machine, _SOCKET_CALLS)
    asked = certain | (waits_in == POLL) | np.isin(rows.number[interval], socket_calls)
    for_peer = np.isin(waits_in, [MOVE, POLL, CONNECT]) & asked & (peer >= 0) & ~disk
    for kind, (place, _) in _NAMED.items():
        named = waits_in == kind
        peer = np.where(named, place, peer)
        for_peer |= named & ~disk
    disk |= waits_in == DISK
    lock = (waits_in == LOCK) & ~disk
    rest = ~(disk | lock | for_peer)
    return _frame(
        spans,
        cpu,
        runqueue,
        _sums(np.where(disk, waiting, 0), span, len(spans)),
        _sums(np.where(lock, waiting, 0), span, len(spans)),
        _sums(np.where(rest, waiting, 0), span, len(spans)),
        _waits(span[for_peer], peer[for_peer], waiting[for_peer], events.names),
    )


class _Line:
    """Times of some threads on one line, on which each thread has a part of its own."""

    def __init__(self, lowest: Numbers, highest: Numbers) -> None:
        self.lowest, self.highest = lowest, highest
        extent = highest - lowest + 1
        self.base = np.cumsum(extent) - extent

    @staticmethod
    def over(thread: Rows, start: Numbers, end: Numbers, threads: int) -> _Line:
        lowest = np.full(threads, np.iinfo(np.int64).max)
        highest = np.full(threads, np.iinfo(np.int64).min)
        np.minimum.at(lowest, thread, start)
        np.maximum.at(highest, thread, end)
        return _Line(lowest, highest)

    def at(self, thread: Rows, time: Numbers) -> Numbers:
        """Where on the line; times before and after a thread's part are at its ends."""
        lowest = self.lowest[thread]
        place: Numbers = self.base[thread] + np.clip(time, lowest, self.highest[thread]) - lowest
        return place


class _Intervals:
    """Off-CPU intervals on a line, sorted, none overlapping the next."""

    def __init__(
        self,
        begin: Numbers,
        woken: Numbers,
        end: Numbers,
        number: NDArray[np.uint16],
        syscall_start_ns: Numbers,
        disk: Mask,
    ) -> None:
        self.begin, self.woken, self.end = begin, woken, end
        self.number, self.syscall_start_ns, self.disk = number, syscall_start_ns, disk

    @staticmethod
    def of(offcpu: pl.DataFrame, tids: NDArray[np.uint32], line: _Line) -> _Intervals:
        start = offcpu["start_ns"].to_numpy()
        duration = offcpu["duration_ns"].to_numpy()
        # the wakeup was not seen: all of it was waiting
        runnable = offcpu["runnable_ns"].fill_null(0).to_numpy()
        thread, known = _find(tids, offcpu["tid"].to_numpy())
        begin, end = line.at(thread, start), line.at(thread, start + duration)
        order = np.flatnonzero(known & (end > begin))
        order = order[np.argsort(begin[order], kind="stable")]
        begin, end = begin[order], end[order]
        # an end that was not seen in time may lie behind the next one's begin
        end[:-1] = np.minimum(end[:-1], begin[1:])
        woken = line.at(thread[order], (start + duration - runnable)[order])
        return _Intervals(
            begin,
            woken,
            end,
            offcpu["number"].fill_null(_NO_CALL).to_numpy()[order],
            offcpu["syscall_start_ns"].fill_null(offcpu["start_ns"]).to_numpy()[order],
            (offcpu["state"] == "D").to_numpy()[order],
        )


class _Events:
    """What threads asked whom, and got from whom: messages and connects."""

    def __init__(
        self, messages: pl.DataFrame, connects: pl.DataFrame | None, peers: pl.DataFrame
    ) -> None:
        if connects is None:
            connects = pl.DataFrame(schema={**_EVENTS, "address": pl.String})
        addresses = connects.select(
            pl.col("address").alias("peer"), pl.lit(None, pl.String).alias("protocol")
        )
        nobody = pl.DataFrame(
            {"peer": [None, *(name for _, name in _NAMED.values())], "protocol": None},
            schema_overrides=addresses.schema,
        )
        texts = peers.select("connection", *(pl.col(name).cast(pl.String) for name in _NAMES))
        distinct = pl.concat([nobody, texts.select(_NAMES), addresses]).unique(maintain_order=True)
        self.names = distinct
        numbered = distinct.with_row_index("code")
        codes = texts.join(numbered, on=_NAMES, how="left", nulls_equal=True)
        codes = codes.unique("connection", keep="last").sort("connection")
        of_message, found = _find(codes["connection"].to_numpy(), messages["connection"].to_numpy())
        code = np.append(codes["code"].to_numpy(), 0)
        asked = connects.join(
            codes.select("connection", "code"), on="connection", how="left", maintain_order="left"
        )
        by_address = addresses.join(
            numbered, on=_NAMES, how="left", nulls_equal=True, maintain_order="left"
        )
        asked_code = pl.select(pl.coalesce(asked["code"], by_address["code"])).to_series()
        self._code = np.concatenate(
            [code[np.where(found, of_message, -1)], asked_code.to_numpy()]
        ).astype(np.int64)
        self._tid = np.concatenate([messages["tid"].to_numpy(), connects["tid"].to_numpy()])
        self._time = np.concatenate(
            [messages["start_ns"].to_numpy(), connects["start_ns"].to_numpy()]
        )
        self._message = np.arange(len(self._time)) < len(messages)
        self._asks = ~self._message
        self._asks[: len(messages)] = messages["asks"].to_numpy()

    def look_up(
        self,
        tids: NDArray[np.uint32],
        thread: Rows,
        start: Numbers,
        end: Numbers,
        call_ns: Numbers,
        poll: Mask,
        timed_out: Mask,
    ) -> tuple[Numbers, Mask]:
        """For each call of a thread, in a span from `start` to `end`, a row of `names`; -1: none.

        And whether that is the call's own event.
        """
        line = _Line.over(thread, np.minimum(start, call_ns), end, len(tids))
        of, known = _find(tids, self._tid)
        known &= (self._time >= line.lowest[of]) & (self._time <= line.highest[of])
        places = line.at(of[known], self._time[known])
        order = np.argsort(places, kind="stable")
        # one more at both ends, which fits nothing
        places = np.concatenate([[-1], places[order], [np.iinfo(np.int64).max]])
        row = np.concatenate([[0], np.flatnonzero(known)[order], [0]])
        if not len(self._time):
            return np.full(len(thread), -1), np.zeros(len(thread), np.bool_)
        asked = line.at(thread, call_ns)
        after = np.searchsorted(places, asked, "left")
        own = places[after] == asked
        nearest = row[after]
        comes = poll & ~timed_out & (places[after] <= line.at(thread, end))
        comes &= self._message[nearest]
        before = row[after - 1]
        had_asked = (places[after - 1] >= line.at(thread, start)) & self._asks[before]
        had_asked &= ~poll | timed_out
        peer = np.where(own | comes, self._code[nearest], -1)
        return np.where(~(own | comes) & had_asked, self._code[before], peer), own


def _waits(span: Rows, peer: Numbers, waiting: Numbers, names: pl.DataFrame) -> pl.DataFrame:
    """`at` (the span) and `waits`."""
    if not len(span):
        return _no_waits()
    key = span * len(names) + peer
    order = np.argsort(key, kind="stable")
    begins = np.flatnonzero(np.diff(key[order], prepend=-1))
    total = np.add.reduceat(waiting[order], begins)
    key = key[order][begins]
    at, peer = key // len(names), key % len(names)
    order = np.lexsort((peer, -total, at))
    told = names[peer[order]].with_columns(pl.Series("wait_ns", total[order]))
    return (
        pl.DataFrame({"at": at[order], "waits": told.to_struct()})
        .group_by("at", maintain_order=True)
        .agg("waits")
    )


def _no_waits() -> pl.DataFrame:
    return pl.DataFrame(schema={"at": pl.Int64, "waits": PARTS})


def _frame(
    spans: pl.DataFrame,
    cpu: Numbers,
    runqueue: Numbers,
    disk: Numbers,
    lock: Numbers,
    other: Numbers,
    waits: pl.DataFrame,
) -> pl.DataFrame:
    found = pl.DataFrame(
        {
            "row": spans["row"],
            "cpu_ns": cpu,
            "runqueue_ns": runqueue,
            "disk_ns": disk,
            "lock_ns": lock,
            "other_ns": other,
            "at": np.arange(len(spans)),
        }
    )
    joined = found.join(waits, on="at", how="left", maintain_order="left").drop("at")
    return joined.with_columns(pl.col("waits").fill_null(pl.lit([], PARTS)))


def _sums(values: Numbers, span: Rows, spans: int) -> Numbers:
    """Sums per span; `span` is sorted."""
    upto = np.concatenate([[0], np.cumsum(values)])
    edges = np.searchsorted(span, np.arange(spans + 1))
    return np.diff(upto[edges])


def _find(keys: NDArray[np.uint32], wanted: NDArray[np.uint32]) -> tuple[Rows, Mask]:
    """Where each wanted number is in sorted keys, and whether it is there at all."""
    if not len(keys):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted


def _among(
    tids: NDArray[np.uint32], thread: Rows, call_ns: Numbers, calls: pl.DataFrame | None
) -> Mask:
    """Whether a thread's call is one of some calls."""
    if calls is None or calls.is_empty():
        return np.zeros(len(thread), np.bool_)
    of, known = _find(tids, calls["tid"].to_numpy())
    asked = pl.DataFrame({"thread": thread, "time": call_ns})
    given = pl.DataFrame({"thread": of, "time": calls["start_ns"]}).filter(known)
    found = asked.join(
        given.unique().with_columns(found=True),
        on=["thread", "time"],
        how="left",
        maintain_order="left",
    )
    return found["found"].fill_null(False).to_numpy()


@cache
def _classes(machine: str) -> NDArray[np.uint8]:
    """By the number of a system call, what a thread waits for in it."""
    classes = np.full(_NO_CALL + 1, OTHER, np.uint8)
    for kind, names in CALLS.items():
        classes[syscall_numbers(machine, names)] = kind
    return classes
