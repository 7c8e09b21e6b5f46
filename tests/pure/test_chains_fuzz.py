"""Random recordings: whatever the tables hold, spans and edges are made, and are consistent."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from scope_ebpf import open_recording
from scope_ebpf.analysis.schema import EDGES, MATCHED, REQUESTS, SPANS
from scope_ebpf.recording.reader import Recording
from scope_ebpf.recording.schema import SCHEMAS
from tests.pure.recordings import at, make_recording
from tests.pure.stories import MS, NUMBERS, US, answer, http, query, resp, selected

pytestmark = pytest.mark.pure

Rows = dict[str, list[dict[str, Any]]]
Frames = dict[str, pl.DataFrame]
SEEDS = range(30)

PROCESSES = [10, 20, 30, 40]
UNKNOWN_PROCESS = 99
COMMANDS = [
    "/usr/bin/python /usr/bin/gunicorn web:app", "nginx: worker process", "redis-server *:6379",
    "postgres: shop shop [local] idle", "/usr/bin/python -m rq worker", None,
]  # fmt: skip
ASKED = [
    http("GET /products/17?full=1"), http("POST /checkout", b'{"product": 7}'),
    http("GET /a") + http("GET /b"), query("SELECT 1"), query("SELECT * FROM t WHERE id = 3"),
    resp("GET", "page:1"), resp("SET", "page:1", "x"), resp("LPUSH", "jobs", "job-1"),
    resp("BRPOP", "jobs", "0"), resp("SUBSCRIBE", "news"), resp("BLMOVE", "a", "b", "RIGHT", "LEFT", "5"),
    b"P\0\0\0\x12s1\0SELECT $1\0\0\0", b"get key\r\n", b"set key 0 0 1\r\nx\r\n",
    b"X\0\0\0\x04", b"set key 0 0 1 noreply\r\nx\r\n",
    b"\xab\xcd\x01\0\0\x01\0\0\0\0\0\0\x04shop\x05local\0\0\x01\0\x01",
]  # fmt: skip
ANSWERED = [
    answer(), answer("404 Not Found"), answer("500 Internal Server Error"), answer("100 Continue", b""),
    selected(1), selected(0), b"$-1\r\n", b"+OK\r\n", b"-ERR no\r\n", b"$1\r\nx\r\n",
    b"*2\r\n$4\r\njobs\r\n$5\r\njob-1\r\n", b"*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$1\r\nx\r\n",
    b"END\r\n", b"E\0\0\0\x10SERROR\0C23505\0\0Z\0\0\0\x05E",
    b"", b"",  # nothing is answered: the end of the stream
    b"\xab\xcd\x81\x83\0\x01\0\0\0\0\0\0\x04shop\x05local\0\0\x01\0\x01",
]  # fmt: skip
KINDS = [
    "tcp",
    "tcp",
    "tcp",
    "tcp",
    "tcp",
    "tcp",
    "mptcp",
    "unix",
    "unix-seqpacket",
    "udp",
    "pipe",
    "netlink",
]
CALLS = [
    "close", "poll", "ppoll", "epoll_wait", "select", "recvfrom", "read", "write", "sendto",
    "getpeername", "shutdown", "futex", "openat", "connect",
]  # fmt: skip

# of connect(): 0 and errnos, known and unknown ones
RESULTS = [0, -115, -115, -114, -106, -11, -4, -512, -111, -2, -110, -9999]


class Chaos:
    """Makes the rows of one recording."""

    def __init__(self, seed: int) -> None:
        """The same seed gives the same rows."""
        self.random = random.Random(seed)
        self.rows: Rows = {table: [] for table in SCHEMAS}
        # how much of it is nonsense: from conversations that make sense to none that does
        self.nonsense = self.random.choice([0.0, 0.0, 0.01, 0.05, 0.2, 1.0])

    def odd(self) -> bool:
        """Whether the next thing makes no sense."""
        return self.random.random() < self.nonsense

    def time(self) -> int:
        """A moment; few different ones, so that some are equal."""
        moment = self.random.randrange(0, 200) * 100 * US
        return at(self.random.choice([-3 * MS, 10**12]) if self.odd() and self.odd() else moment)

    def duration(self) -> int:
        """How long a call took."""
        usual = self.random.choice([0, US, 50 * US, MS, 5 * MS])
        return self.random.choice([-MS, -1, 10**15]) if self.odd() and self.odd() else usual

    def process(self) -> int:
        """Somebody."""
        return self.random.choice([*PROCESSES, UNKNOWN_PROCESS])

    def thread(self, tgid: int) -> int:
        """A thread of a process."""
        return tgid + self.random.choice([0, 0, 1])

    def processes(self) -> None:
        for tgid in PROCESSES:
            if not self.odd():
                command = self.random.choice(COMMANDS)
                self.rows["processes"].append(
                    {"time_ns": at(0), "event": 0, "tgid": tgid, "tid": tgid, "comm": "python",
                     "command_line": command}
                )  # fmt: skip
        for _ in range(self.random.randrange(6)):
            tgid, event = self.process(), self.random.randrange(1, 6)
            signal = self.random.choice([None, 9, 11])
            self.rows["processes"].append(
                {"time_ns": self.time(), "event": event, "tgid": tgid, "tid": self.thread(tgid),
                 "parent_tgid": self.process(), "parent_tid": self.process(), "comm": "python",
                 "signal": signal if event == 4 else None,
                 "exit_code": 1 if event == 4 and signal is None else None}
            )  # fmt: skip

    def pair(self, number: int) -> None:
        """A connection with both ends, and what is said over it."""
        client, server = self.process(), self.process()
        kind = self.random.choice(KINDS)
        streams = [1000 + 2 * number, 1001 + 2 * number]
        if self.odd():
            streams = [1000 + self.random.randrange(6), 1000 + self.random.randrange(6)]
        port = self.random.choice([8000, 5432, 6379])
        internet = kind in {"tcp", "mptcp", "udp"}
        ends = [2 * number, 2 * number + 1]
        for end, tgid in zip(ends, (client, server), strict=True):
            ours = end == ends[0]
            ports = (40_000 + number, port) if ours else (port, 40_000 + number)
            if self.odd():
                continue
            row: dict[str, Any] = {
                "time_ns": self.time() if self.odd() else at(0), "connection": end, "kind": kind,
                "tgid": tgid, "inode": end if self.random.random() < 0.9 else 7,
                "send_stream": streams[0 if ours else 1], "receive_stream": streams[1 if ours else 0],
                "netns": self.random.choice([0, 1, 2]),
            }  # fmt: skip
            if internet:
                row |= {
                    "local_address": "127.0.0.1",
                    "remote_address": self.random.choice(["127.0.0.1", None, "::1"]),
                    "local_port": ports[0], "remote_port": ports[1],
                }  # fmt: skip
            elif kind.startswith("unix"):
                row |= {"remote_path" if ours else "local_path": "/run/s", "peer_inode": end ^ 1}
            self.rows["connections"] += [row] * (2 if self.odd() and self.odd() else 1)
        moment, positions = self.time(), [self.random.randrange(2**32), 2**32 - 40]
        tids = [self.thread(client), self.thread(server)]
        missing = self.random.choice([0.0, 0.0, 0.1])
        said = self.random.randrange(len(ASKED))
        for _ in range(self.random.randrange(10)):
            moment += self.random.choice([0, 10 * US, MS])
            choice = said if self.random.random() < 0.8 else self.random.randrange(len(ASKED))
            for data, sends in (
                (ASKED[choice], 0),
                (self.random.choice([ANSWERED[choice], self.random.choice(ANSWERED)]), 1),
            ):
                if self.random.random() < missing:
                    continue
                positions[sends] += len(data)
                moment += self.random.choice([0, 20 * US, MS])
                for side in (0, 1):
                    if self.random.random() < missing:
                        continue
                    receive = side != sends
                    tid = tids[side] if not self.odd() else self.thread((client, server)[side])
                    self.message(ends[side], (client, server)[side], tid, data,
                                 moment + 5 * US * receive, positions[sends], receive)  # fmt: skip
                moment += 10 * US

    def message(
        self,
        connection: int,
        tgid: int,
        tid: int,
        data: bytes,
        moment: int,
        end: int,
        receive: bool,
    ) -> None:
        if self.odd():
            cut = self.random.randrange(len(data) + 1)
            data = data[:cut] + self.random.randbytes(self.random.randrange(20)) + data[cut:]
        length = self.random.choice([0, 1, 2**32 - 1]) if self.odd() else len(data)
        wait = self.duration() if receive else self.random.choice([0, 2 * US])
        turn = not self.odd()
        self.rows["messages"].append(
            {"start_ns": moment - (wait if receive else 0), "duration_ns": wait, "tgid": tgid,
             "tid": tid, "number": NUMBERS["recvfrom" if receive else "sendto"],
             "fd": 3 + connection % 7, "receive": receive, "turn": turn, "peek": self.odd() and receive,
             "exact": not self.odd(), "length_bytes": length, "connection": connection,
             "stream_end": self.random.getrandbits(64) if self.odd() else end % 2**32,
             "payload": data if turn and length else None, "status": self.random.choice([0, 0, 0, 1, 2])}
        )  # fmt: skip

    def calls(self) -> None:
        for _ in range(self.random.randrange(30)):
            tgid = self.process()
            self.rows["syscalls"].append(
                {"start_ns": self.time(), "duration_ns": self.duration(), "tgid": tgid,
                 "tid": self.thread(tgid), "number": NUMBERS[self.random.choice(CALLS)],
                 "arg0": self.random.choice([3, 4, 5, 6, 7, 8, 9, 2**64 - 1]),
                 "arg1": self.random.choice([0, 1, 2, 9]),
                 "result": self.random.choice([0, 0, 1, -11, -32, -104, -110, -107])}
            )  # fmt: skip
        for _ in range(self.random.randrange(8)):
            tgid = self.process()
            unix = self.random.random() < 0.3
            place: dict[str, Any] = {
                "kind": "unix", "remote_path": self.random.choice(["/run/s", "/run/nscd/socket", None])
            }  # fmt: skip
            if not unix:
                place = {
                    "kind": self.random.choice(["tcp", "mptcp", "udp", "unix-datagram"]),
                    "remote_address": self.random.choice(["127.0.0.1", "::1", None]),
                    "remote_port": self.random.choice([8000, 5432, 6379, None]),
                }
            self.rows["connects"].append(
                {"start_ns": self.time(), "duration_ns": self.duration(), "tgid": tgid,
                 "tid": self.thread(tgid), "fd": self.random.randrange(3, 10),
                 "inode": self.random.randrange(0, 30),
                 "result": self.random.choice(RESULTS),
                 **place}
            )  # fmt: skip
        for nth in range(self.random.randrange(20)):
            tgid, duration = self.process(), self.duration()
            self.rows["offcpu"].append(
                {"start_ns": self.time() + nth, "duration_ns": duration,
                 "runnable_ns": self.random.choice([0, duration // 2, duration]), "tgid": tgid,
                 "tid": self.thread(tgid), "state": self.random.choice([0, 1, 2, 0x402]),
                 "number": self.random.choice([None, NUMBERS["futex"], NUMBERS["recvfrom"]]),
                 "waker_tgid": self.process(), "waker_tid": self.process()}
            )  # fmt: skip
        if self.odd():
            lost = self.random.choice(["messages", "syscalls", "payloads", "tasks"])
            self.rows["losses"].append({"time_ns": at(0), "table": lost, "lost": 3})

    def make(self) -> Rows:
        """All rows, with equal first columns as they come."""
        self.processes()
        for number in range(self.random.randrange(4, 16)):
            self.pair(number)
        for _ in range(self.random.randrange(4)):
            if self.odd():
                data = self.random.choice(ASKED + ANSWERED)
                self.message(self.random.choice([500, 501]), 10, 10, data, self.time(), 77, True)
        self.calls()
        for table, rows in self.rows.items():
            first = next(iter(SCHEMAS[table]))
            rows.sort(key=lambda row, first=first: row[first])  # type: ignore[misc]
        return self.rows


def record(path: Path, rows: Rows, seed: int) -> Recording:
    """The rows as a recording; which kinds of events it has depends on the seed."""
    families = ["processes", "syscalls", "messages", "offcpu"]
    if seed % 5 == 0:
        families.remove("syscalls")
        rows = {**rows, "syscalls": [], "offcpu": []}
    ended = {} if seed % 7 else {"ended_ns": None}
    return open_recording(
        make_recording(path, rows, per_segment=10_000, families=families, **ended)
    )


def analyse(recording: Recording) -> Frames:
    """All that analysis makes of it."""
    made = {
        "spans": recording.spans(), "edges": recording.edges(), "requests": recording.requests(),
        "matched": recording.messages_matched(),
    }  # fmt: skip
    return {name: frame.collect() for name, frame in made.items()}


def check(rows: Rows, found: Frames) -> None:
    """What holds for every recording."""
    spans, edges, requests = found["spans"], found["edges"], found["requests"]
    schemas = {"spans": SPANS, "edges": EDGES, "requests": REQUESTS, "matched": MATCHED}
    assert {name: frame.schema for name, frame in found.items()} == schemas
    ids = spans["span_id"]
    assert ids.n_unique() == len(ids)
    assert (ids != 0).all()
    assert spans["parent_id"].drop_nulls().is_in(ids.implode()).all()
    assert spans["start_ns"].is_sorted()
    assert (spans["duration_ns"] >= 0).all(), spans.filter(pl.col("duration_ns") < 0)
    for name in (
        "span_id",
        "request_id",
        "kind",
        "tgid",
        "tid",
        "start_ns",
        "duration_ns",
        "state",
    ):
        assert spans[name].null_count() == 0, name
    known = spans.filter(pl.col("tgid").is_in([row["tgid"] for row in rows["processes"]]))
    assert known["service"].null_count() == 0
    parents = dict(zip(ids, spans["parent_id"], strict=True))
    for span_id, request_id in zip(ids, spans["request_id"], strict=True):
        above, seen = span_id, set()
        while parents[above] is not None:
            assert above not in seen, "a circle"
            seen.add(above)
            above = parents[above]
        assert above == request_id
    no_parent = pl.col("parent_id").is_null()
    assert spans.filter(no_parent != pl.col("edge").is_null()).is_empty()
    assert spans.filter(no_parent != pl.col("evidence").is_null()).is_empty()
    # edges
    assert edges["cause_id"].is_in(ids.implode()).all()
    assert edges["effect_id"].is_in(ids.implode()).all()
    assert (edges["cause_id"] != edges["effect_id"]).all()
    for name in edges.columns:
        assert edges[name].null_count() == 0, name
    of_parents = edges.filter("parent")
    assert of_parents["effect_id"].n_unique() == len(of_parents)
    told = of_parents.select("effect_id", "cause_id", "edge", "evidence").sort("effect_id")
    wanted = spans.filter(~no_parent).select("span_id", "parent_id", "edge", "evidence")
    assert told.rows() == wanted.sort("span_id").rows()
    times = spans.select("span_id", "start_ns", "kind")
    proven = of_parents.filter(pl.col("evidence") != "guess")
    pairs = proven.join(times, left_on="cause_id", right_on="span_id").join(
        times, left_on="effect_id", right_on="span_id", suffix="_effect"
    )
    backwards = pairs.filter(pl.col("start_ns") > pl.col("start_ns_effect"))
    assert backwards.is_empty(), backwards
    # requests
    assert requests["span_id"].is_in(ids.implode()).all()
    assert requests["span_id"].n_unique() == len(requests)
    waited = pl.col("waits").list.eval(pl.element().struct.field("wait_ns")).list.sum()
    parts = ["cpu_ns", "runqueue_ns", "disk_ns", "lock_ns", "other_ns"]
    total = requests.select(
        "duration_ns", *parts, waited.alias("waited_ns"), sum=pl.sum_horizontal(*parts, waited)
    )
    assert (total["sum"] == total["duration_ns"]).all(), total
    assert all((total[name] >= 0).all() for name in [*parts, "waited_ns"]), total
    below = dict.fromkeys(ids, 0)
    for span_id in ids:
        above = parents[span_id]
        while above is not None:
            below[above] += 1
            above = parents[above]
    assert all(below[row["span_id"]] == row["spans"] for row in requests.to_dicts())
    # every message that moved something is somewhere
    moved = [row for row in rows["messages"] if row["length_bytes"] and not row["peek"]]
    matched = found["matched"]
    single = matched.filter(pl.col("unmatched").is_not_null())
    assert len(single) <= len(moved)
    assert len(single) + 2 * (len(matched) - len(single)) >= len(moved) or not moved


def shuffled(rows: Rows, seed: int) -> Rows:
    """The same rows of each table in another order.

    But not those of off-CPU intervals: of two that overlap, which no thread has, the first is cut.
    """
    chance = random.Random(~seed)
    other = {table: chance.sample(of, len(of)) for table, of in rows.items()}
    return other | {"offcpu": rows["offcpu"]}


def run(seed: int, path: Path, change: Callable[[Rows, int], Rows] | None = None) -> Frames:
    rows = Chaos(seed).make()
    recording = record(path / "a.scope", rows, seed)
    found = analyse(recording)
    check(rows, found)
    again = analyse(record(path / "b.scope", shuffled(rows, seed), seed))
    for name, frame in found.items():
        columns = [column for column in frame.columns if frame.schema[column] != REQUESTS["waits"]]
        first, second = frame.sort(columns), again[name].sort(columns)
        assert first.equals(second), (name, first, second)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_recorded(tmp_path: Path, seed: int):
    run(seed, tmp_path)


def test_the_fuzz_reaches_what_it_is_for(tmp_path: Path):
    """Random recordings are not all nonsense: the seeds together have every kind of span and edge."""
    kinds: set[str] = set()
    states: set[str] = set()
    edges: set[str] = set()
    for seed in SEEDS:
        recording = record(tmp_path / f"{seed}.scope", Chaos(seed).make(), seed)
        spans = recording.spans().collect()
        kinds |= set(spans["kind"].cast(pl.String))
        states |= set(spans["state"].cast(pl.String))
        edges |= set(recording.edges().collect()["edge"].cast(pl.String))
    assert kinds == {"server", "client", "consumer", "fault"}
    assert states == {"complete", "began_before", "open", "no_response", "one_way"}
    assert {"calls", "caused_by", "queued_by"} <= edges
