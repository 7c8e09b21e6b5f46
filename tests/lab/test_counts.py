"""The same workload gives the same rows on every kernel, by every loader and over every transport.

Each way is one recording of tests/lab/workload.py, which knows its numbers. Whatever differs between
kernels or loaders stands in DIFFERENCES with its reason, and must be seen there: a number that is nowhere
in that table is expected everywhere.
"""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pytest

from tests.lab import workload
from tests.lab.recorded import CORE, KERNEL, Way, record_workload, ways
from tests.live.recording import Session

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]

MASK = 2**64 - 1
ERRNO = {"close": 9, "openat": 2, "dup3": 22}
# Samples come by the clock: a virtual CPU that waits for the real one has fewer ticks than CPU time.
SAMPLE_HZ = 99


@dataclass(frozen=True)
class Difference:
    """One number that is another one somewhere, and why.

    Attributes:
        number: its name, as in the fixture `expected`.
        value: what it is there.
        reason: why, with the kernel's commit or the loader's limit.
        since, before: kernels where it is so, by version; None: no bound.
        loader: only by this one; None: by each.
    """

    number: str
    value: Any
    reason: str
    since: tuple[int, int] | None = None
    before: tuple[int, int] | None = None
    loader: str | None = None

    def holds(self, way: Way) -> bool:
        """Whether this is the kernel and way."""
        return (
            (self.since is None or self.since <= KERNEL)
            and (self.before is None or self.before > KERNEL)
            and (self.loader is None or self.loader == way.loader)
        )


DIFFERENCES: tuple[Difference, ...] = ()


def expected_numbers() -> dict[str, Any]:
    """What is expected of every way on every kernel."""
    w = workload
    turns = [w.turns(number) for number in range(w.CONNECTIONS)]
    return {
        "getppid": w.GETPPIDS,
        **{name: times for name, (times, _) in w.FAILING.items()},
        "unknown": w.UNKNOWN_CALLS,
        "threads": [w.CALLS_PER_THREAD] * w.THREADS,
        "children": [w.CALLS_PER_CHILD] * w.CHILDREN,
        "child_exits": list(range(w.CHILDREN)),
        "execs": [f"{w.EXEC_PROGRAM} {w.EXEC_WORD} {number}" for number in range(w.EXECS)],
        "forks": w.CHILDREN + 1 + w.EXECS + 1 + 1,
        # by direction, of each end: messages and bytes; the server's last receive is the end, 0 bytes
        "tcp": [
            {
                "client": {"send": [n, n * w.ASKED_BYTES], "receive": [n, n * w.ANSWERED_BYTES]},
                "server": {
                    "send": [n, n * w.ANSWERED_BYTES],
                    "receive": [n + 1, n * w.ASKED_BYTES],
                },
            }
            for n in turns
        ],
        "unix": {
            "client": {
                "send": [w.UNIX_TURNS, w.UNIX_TURNS * w.UNIX_BYTES],
                "receive": [w.UNIX_TURNS, w.UNIX_TURNS * w.UNIX_BYTES * 2],
            },
            "server": {
                "send": [w.UNIX_TURNS, w.UNIX_TURNS * w.UNIX_BYTES * 2],
                "receive": [w.UNIX_TURNS, w.UNIX_TURNS * w.UNIX_BYTES],
            },
        },
        "udp": {
            "client": {"send": [w.DATAGRAMS, w.DATAGRAMS * w.DATAGRAM_BYTES]},
            "server": {"receive": [w.DATAGRAMS, w.DATAGRAMS * w.DATAGRAM_BYTES]},
        },
        "pipe_there": [w.PIPE_BYTES + number for number in range(w.PIPE_TURNS)],
        "pipe_back": [2 * (w.PIPE_BYTES + number) for number in range(w.PIPE_TURNS)],
        "vectors": [
            *[("writev", "send", sum(w.VECTOR_BYTES)), ("readv", "receive", sum(w.VECTOR_BYTES))]
            * w.VECTORS,
            *[("sendfile", "send", w.SENDFILE_BYTES), ("read", "receive", w.SENDFILE_BYTES)]
            * w.SENDFILES,
        ],
        "refused": w.REFUSED,
        "no_socket": w.NO_SOCKET,
        "connected": w.CONNECTIONS,
        "sleeps": len(w.SLEEPS),
        "timeouts": w.TIMEOUTS,
        "locks": w.LOCKS,
        "tasks": [w.CALLS_PER_TASK] * w.TASKS,
    }


@dataclass(frozen=True)
class Recorded:
    """One recording of the workload, and what is expected of it."""

    way: Way
    session: Session
    expected: Mapping[str, Any]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)

    def table(self, name: str) -> pl.DataFrame:
        """One table, sorted by its first column; read once."""
        if name not in self.tables:
            self.tables[name] = self.session.table(name)
        return self.tables[name]

    def rows(self, table: str, *conditions: Any, **values: Any) -> pl.DataFrame:
        """Chosen rows of a table."""
        return self.table(table).filter(*conditions, **values)

    @property
    def note(self) -> Any:
        """What the workload told."""
        return self.session.note


@pytest.fixture(scope="module", params=ways(), ids=str)
def recorded(request, tmp_path_factory) -> Recorded:
    """The workload, recorded by each way."""
    way: Way = request.param
    session = record_workload(tmp_path_factory.mktemp(str(way)), way)
    expected = expected_numbers()
    for difference in DIFFERENCES:
        assert difference.number in expected, difference
        if difference.holds(way):
            assert expected[difference.number] != difference.value, f"no difference: {difference}"
            expected[difference.number] = difference.value
    return Recorded(way, session, expected)


# ---- what was counted ----


def marked(recorded: Recorded, tag: int) -> pl.DataFrame:
    """The getppid calls with this tag: complete, in order, each once, with all arguments."""
    found = recorded.rows("syscalls", name="getppid", arg0=tag)
    assert found["arg1"].to_list() == list(range(len(found)))
    assert found["arg2"].to_list() == [~turn & MASK for turn in range(len(found))]
    assert found["status"].unique().to_list() == ["complete"]
    assert found["tid"].n_unique() == 1
    return found


def moved(recorded: Recorded, inode: int) -> dict[str, list[int]]:
    """How many messages the end with this inode had, and of how many bytes, by direction."""
    ends = recorded.rows("connections", inode=inode)
    assert len(ends) == 1
    found = recorded.rows("messages", connection=ends["connection"][0])
    counted = found.group_by("direction").agg(pl.len(), pl.col("length_bytes").sum().alias("bytes"))
    return {row["direction"]: [row["len"], row["bytes"]] for row in counted.to_dicts()}


def both_ends(recorded: Recorded, ends: list[Any]) -> dict[str, dict[str, list[int]]]:
    """The same of a connection's two ends."""
    client, server = ends
    return {
        "client": moved(recorded, client["inode"]),
        "server": moved(recorded, server["inode"]),
    }


# ---- tests ----


def test_nothing_is_lost(recorded):
    assert recorded.table("losses").is_empty()
    assert recorded.session.recording.meta.complete


def test_the_way_that_was_asked_for_is_the_one_that_was_used(recorded):
    """An `auto` that falls back to another way must not pass for this one."""
    meta = json.loads((recorded.session.path / "meta.json").read_text())
    for key, value in (("loader", recorded.way.loader), ("transport", recorded.way.transport)):
        if value is not None:
            assert meta[key] == value


def test_system_calls(recorded):
    expected = recorded.expected
    main = marked(recorded, workload.MAIN_TAG)
    assert len(main) == expected["getppid"]
    assert main["result"].unique().to_list() == [os.getpid()]
    for name, (_, error) in workload.FAILING.items():
        first = 0 if name == "dup3" else workload.FIRST_FD
        found = recorded.rows(
            "syscalls",
            pl.col("arg0").is_between(first, first + 10_000),
            name=name,
            error=error,
        )
        assert found["arg0"].to_list() == [first + turn for turn in range(expected[name])]
        assert found["result"].unique().to_list() == [-ERRNO[name]]
        assert found["tgid"].unique().to_list() == [recorded.note["pid"]]
    unknown = recorded.rows("syscalls", name=f"syscall_{workload.NO_SUCH_CALL}")
    assert unknown["arg0"].to_list() == list(range(expected["unknown"]))
    assert unknown["error"].unique().to_list() == ["ENOSYS"]


def test_calls_take_turns(recorded):
    """No call of a thread begins before the one before it has ended."""
    for _, own in recorded.table("syscalls").sort("start_ns").group_by("tid"):
        begun = own.filter(pl.col("status").is_in(["complete", "began_before"]))
        ended = begun["start_ns"] + begun["duration_ns"]
        assert (begun["start_ns"][1:] >= ended[:-1]).all()


def test_threads(recorded):
    tids = recorded.note["threads"]["tids"]
    counted = [marked(recorded, workload.THREAD_TAG + n) for n in range(workload.THREADS)]
    assert [len(calls) for calls in counted] == recorded.expected["threads"]
    assert [calls["tid"][0] for calls in counted] == tids
    assert {calls["tgid"][0] for calls in counted} == {recorded.note["pid"]}
    lives = recorded.rows("processes", pl.col("tid").is_in(tids))
    # a tid may be given again to a later thread; here none is, so soon
    assert sorted(lives["event"]) == sorted(["thread", "thread_exit"] * workload.THREADS)


def test_children(recorded):
    pids = recorded.note["forks"]["pids"]
    counted = [marked(recorded, workload.CHILD_TAG + n) for n in range(workload.CHILDREN)]
    assert [len(calls) for calls in counted] == recorded.expected["children"]
    assert [calls["tgid"][0] for calls in counted] == pids
    exits = recorded.rows("processes", pl.col("tgid").is_in(pids), event="exit")
    assert exits["tgid"].to_list() == pids
    assert exits["exit_code"].to_list() == recorded.expected["child_exits"]
    killed = recorded.rows("processes", tgid=recorded.note["forks"]["killed"], event="exit")
    assert killed.select("exit_code", "signal").rows() == [(None, int(signal.SIGKILL))]


def test_forks_and_execs(recorded):
    pid, note = recorded.note["pid"], recorded.note["execs"]
    forks = recorded.rows("processes", event="fork")
    assert len(forks) == recorded.expected["forks"]
    assert forks["parent_tgid"].unique().to_list() == [pid]
    execs = recorded.rows("processes", event="exec")
    assert execs["tgid"].to_list() == note["pids"]
    assert execs["command_line"].to_list() == recorded.expected["execs"]
    calls = recorded.rows("syscalls", name="execve")
    assert calls.select("tgid", "error").rows() == [
        *((child, None) for child in note["pids"]),
        (note["failed"], "ENOENT"),
    ]
    failed = recorded.rows("processes", tgid=note["failed"], event="exit")
    assert failed["exit_code"].to_list() == [workload.FAILED_EXEC_CODE]


def test_tcp(recorded):
    connections = recorded.note["tcp"]["connections"]
    assert [both_ends(recorded, told["ends"]) for told in connections] == recorded.expected["tcp"]
    for told in connections:
        client, server = told["ends"]
        found = recorded.rows("connections", inode=client["inode"])
        assert found.select("kind", "local_address", "local_port", "remote_port").rows() == [
            ("tcp", "127.0.0.1", client["port"], server["port"])
        ]
        matched = pair_ends(recorded, client["inode"], server["inode"])
        assert matched.height == matched.filter(pl.col("length_bytes") > 0).height > 0


def pair_ends(recorded: Recorded, client: int, server: int) -> pl.DataFrame:
    """Each send of one end with the receive of the same bytes at the other; every send must have one."""
    numbers = [
        recorded.rows("connections", inode=inode)["connection"][0] for inode in (client, server)
    ]
    own = recorded.rows("messages", pl.col("connection").is_in(numbers))
    sends = own.filter(direction="send")
    receives = own.filter(pl.col("length_bytes") > 0, direction="receive")
    joined = sends.join(receives, on=["stream", "stream_end", "length_bytes"], how="full")
    assert len(joined) == len(sends) == len(receives)
    assert joined["tid_right"].null_count() == 0
    return joined


def test_unix(recorded):
    note = recorded.note["unix"]
    assert both_ends(recorded, note["ends"]) == recorded.expected["unix"]
    client, server = (end["inode"] for end in note["ends"])
    found = recorded.rows("connections", inode=client)
    assert found.select("kind", "local_path", "remote_path", "peer_inode").rows() == [
        ("unix", None, note["path"], server)
    ]
    assert len(pair_ends(recorded, client, server)) == 2 * workload.UNIX_TURNS


def test_udp(recorded):
    assert both_ends(recorded, recorded.note["udp"]["ends"]) == recorded.expected["udp"]


def test_pipes(recorded):
    note, pid = recorded.note["pipes"], recorded.note["pid"]
    there, back, vectors = note["inodes"]
    for inode, sender, receiver, lengths in (
        (there, pid, note["child"], recorded.expected["pipe_there"]),
        (back, note["child"], pid, recorded.expected["pipe_back"]),
    ):
        found = of_pipe(recorded, inode)
        for direction, tgid in (("send", sender), ("receive", receiver)):
            own = found.filter(direction=direction)
            assert own["tgid"].unique().to_list() == [tgid]
            assert own["length_bytes"].to_list() == lengths
        ends = found.group_by("direction", maintain_order=True).agg("stream_end")["stream_end"]
        assert ends[0].to_list() == ends[1].to_list()
    own = of_pipe(recorded, vectors).select("name", "direction", "length_bytes")
    assert own.rows() == recorded.expected["vectors"]


def of_pipe(recorded: Recorded, inode: int) -> pl.DataFrame:
    """The messages of a pipe."""
    found = recorded.rows("connections", inode=inode)
    assert found["kind"].to_list() == ["pipe"]
    return recorded.rows("messages", connection=found["connection"][0])


def test_connects(recorded):
    note, expected = recorded.note["connects"], recorded.expected
    refused = recorded.rows("connects", remote_port=note["port"], kind="tcp")
    assert refused["error"].to_list() == ["ECONNREFUSED"] * expected["refused"]
    assert refused["remote_address"].unique().to_list() == ["127.0.0.1"]
    missing = recorded.rows("connects", remote_path=note["path"])
    assert missing["error"].to_list() == ["ENOENT"] * expected["no_socket"]
    servers = {told["ends"][1]["port"] for told in recorded.note["tcp"]["connections"]}
    made = recorded.rows("connects", pl.col("remote_port").is_in(list(servers)))
    assert made["error"].to_list() == [None] * expected["connected"]
    calls = recorded.rows("syscalls", name="connect")
    assert calls["start_ns"].to_list() == recorded.table("connects")["start_ns"].to_list()


def asleep(recorded: Recorded, tid: int, name: str) -> pl.DataFrame:
    """The intervals in which a thread waited in calls of that name."""
    return recorded.rows("offcpu", tid=tid, name=name, state="S")


def test_sleeps(recorded):
    tid = recorded.note["waits"]["sleeper"]
    calls = recorded.rows("syscalls", tid=tid, name="clock_nanosleep")
    intervals = asleep(recorded, tid, "clock_nanosleep")
    assert len(calls) == len(intervals) == recorded.expected["sleeps"]
    assert intervals["syscall_start_ns"].to_list() == calls["start_ns"].to_list()
    # the call lasts as long as was asked for, and the thread is away for that but the moment before
    least = pl.Series(workload.SLEEPS)
    before = intervals["start_ns"] - calls["start_ns"]
    assert (intervals["duration_ns"] + before >= least).all()
    assert (intervals["duration_ns"] <= calls["duration_ns"]).all()
    assert intervals["runnable_ns"].null_count() == 0


def test_timeouts(recorded):
    note = recorded.note["waits"]
    calls = recorded.rows("syscalls", name="futex", arg0=note["word"])
    assert calls["error"].to_list() == ["ETIMEDOUT"] * recorded.expected["timeouts"]
    assert calls["tid"].unique().to_list() == [note["waiter"]]
    intervals = asleep(recorded, note["waiter"], "futex").filter(
        pl.col("syscall_start_ns").is_in(calls["start_ns"].to_list())
    )
    assert len(intervals) == recorded.expected["timeouts"]
    before = intervals["start_ns"] - calls["start_ns"]
    assert (intervals["duration_ns"] + before >= workload.TIMEOUT_NS).all()


def test_locks(recorded):
    told = recorded.note["waits"]["locks"]
    assert len(told) == recorded.expected["locks"]
    for lock in told:
        waited = asleep(recorded, lock["tid"], "futex").filter(
            pl.col("start_ns").is_between(lock["began_ns"], lock["ended_ns"])
        )
        whole = lock["ended_ns"] - lock["began_ns"]
        assert workload.LEAST_LOCKED_NS <= waited["duration_ns"].sum() <= whole
        # who let it go: the main thread, in futex
        assert waited["waker_tid"][-1] == recorded.note["pid"]
        assert waited["waker_name"][-1] == "futex"


def test_what_is_off_the_cpu_is_not_on_it(recorded):
    """No thread is away twice at a time, and each interval in a call lies in that call."""
    table = recorded.table("offcpu")
    for _, own in table.sort("start_ns").group_by("tid"):
        ended = own["start_ns"] + own["duration_ns"]
        assert (own["start_ns"][1:] >= ended[:-1]).all()
    inside = table.filter(pl.col("syscall_start_ns").is_not_null())
    calls = recorded.table("syscalls").select("tid", "start_ns", "duration_ns", "status")
    joined = inside.join(
        calls, left_on=["tid", "syscall_start_ns"], right_on=["tid", "start_ns"], how="left"
    )
    assert len(joined) == len(inside)
    assert joined["status_right"].null_count() == 0
    ended = joined["syscall_start_ns"] + joined["duration_ns_right"]
    assert (
        (joined["start_ns"] + joined["duration_ns"] <= ended)
        | (joined["status_right"] == "no_return")
        | (joined["status"] == "end_late")
    ).all()


def test_python(recorded):
    """Tasks have a context each; busy code is sampled about as often as the clock ticked."""
    if not recorded.way.all_families:
        assert set(recorded.session.recording.meta.tables) >= set(CORE)
        return
    counted = [marked(recorded, workload.TASK_TAG + number) for number in range(workload.TASKS)]
    assert [len(calls) for calls in counted] == recorded.expected["tasks"]
    contexts = [calls["context"].unique().to_list() for calls in counted]
    told = recorded.table("interpreters").select("version", "contexts", "reason").rows()
    assert all(len(own) == 1 and own[0] for own in contexts), (contexts, told)
    assert len({own[0] for own in contexts}) == workload.TASKS
    version = recorded.table("interpreters")["version"].unique().to_list()
    assert version == [platform.python_version()]
    begin, end = (marked(recorded, workload.BUSY_TAG + n)["start_ns"][0] for n in (0, 1))
    ticks = recorded.rows(
        "samples",
        pl.col("time_ns").is_between(begin, end),
        tid=recorded.note["pid"],
        reason="cpu",
    )
    most = recorded.note["busy"]["cpu_ns"] / 1e9 * SAMPLE_HZ
    assert most / 3 <= len(ticks) <= most * 1.2 + 2
    names = [innermost(recorded, stack) for stack in ticks["stack"].drop_nulls()]
    assert names.count("lab_busy") >= 0.9 * len(ticks)


def innermost(recorded: Recorded, stack: int) -> str:
    """The name of a stack's innermost function."""
    code = recorded.rows("stacks", stack=stack)["codes"][0][0]
    return str(recorded.rows("codes", code=code)["name"][-1])


def test_what_every_kernel_must_agree_on(recorded, results):
    """A histogram of the calls that the workload makes itself; left for comparing kernels with each other."""
    own = recorded.rows("syscalls", status="complete")
    # Python waits and allocates as it likes
    free = ("futex", "mmap", "munmap", "mprotect", "madvise", "brk", "clock_gettime", "getrandom")
    counted = own.filter(~pl.col("name").is_in(free)).group_by("name").len().sort("name")
    histogram = dict(counted.iter_rows())
    assert histogram["clone"] == recorded.expected["forks"]
    assert histogram["wait4"] == recorded.expected["forks"]
    assert histogram["kill"] == 1
    told = {"kernel": platform.release(), "way": str(recorded.way), "calls": histogram}
    (results / f"counts-{recorded.way}.json").write_text(json.dumps(told, indent=1))
