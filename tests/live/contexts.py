"""Servers whose requests carry their ids in their bytes, and what a recording says of whose is what.

The truth is in the payloads: a call of the backend with the id X belongs to the request with the id X. It
is compared with what was recorded at two levels. Rows: each send is in the logical context of the
request, or in one that descends from it. Spans: each call is below the span of its request, and no edge
joins spans of different ids.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import polars as pl

from scope_ebpf.recording.reader import Recording
from tests.live.pythons import Python
from tests.live.recording import PROGRAMS, Target
from tests.live.roots import OWN, ROOT, clear, running

CALLS = 4  # of each request, as the programs make them
# 1,000 connections can be waiting to be accepted.
BACKLOG = 4096
THREADS = 16
CLIENT_SECONDS = 60
SHOWN = 5
_ids = count(1)


@dataclass(frozen=True)
class Kind:
    """One kind of server; `run` runs its program."""

    name: str
    program: str
    arguments: tuple[str, ...]
    contexts: bool = True  # its requests are told apart by contexts; else by threads
    share: float = 0.995  # of the calls, those that have to be found below their request

    def __str__(self) -> str:
        return self.name


def _asyncio_kinds() -> Iterator[Kind]:
    for loop, share in (("asyncio", 0.995), ("uvloop", 0.98)):
        for front in ("streams", "protocol"):
            for back in ("fresh", "pool"):
                arguments = (front, back, loop)
                yield Kind(f"{loop}-{front}-{back}", "contexts_asyncio", arguments, share=share)


KINDS = (
    *_asyncio_kinds(),
    *(Kind(f"trio-{back}", "contexts_trio", (back,)) for back in ("fresh", "pool")),
    *(
        Kind(f"gevent-{front}-{back}", "contexts_gevent", (front, back))
        for front in ("stream", "pywsgi")
        for back in ("fresh", "pool")
    ),
    # What made a greenlet is not known, so half of the calls are nobody's; none must be another's.
    Kind("gevent-spawn-pool", "contexts_gevent", ("spawn", "pool"), contexts=False, share=0.5),
    *(
        # run_in_executor does not pass the context on
        Kind(f"{how}-{back}", "contexts_asyncio", (how, back, "asyncio"), contexts=contexts)
        for how, contexts in (("to_thread", True), ("run_in_executor", False))
        for back in ("fresh", "pool")
    ),
    *(
        Kind(f"threads-{back}", "contexts_threads", (back,), contexts=False)
        for back in ("fresh", "pool")
    ),
)


class Server:
    """A server at work, with a listening socket that was there before it."""

    def __init__(self, target: Target, port: int) -> None:
        """Use `serving`."""
        self.target = target
        self.pid = target.pid
        self.port = port

    def ask(self, requests: int, concurrency: int) -> list[int]:
        """Have so many requests answered; returns their ids, which no other request has."""
        first = next(_ids) * 1000
        for _ in range(1000, requests, 1000):
            next(_ids)
        client = PROGRAMS / "contexts_client.py"
        arguments = map(str, (self.port, requests, concurrency, first))
        done = subprocess.run(
            [sys.executable, client, *arguments],
            capture_output=True,
            text=True,
            timeout=CLIENT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answered: list[int] = json.loads(done.stdout)
        assert answered == list(range(first, first + requests))
        return answered


@contextmanager
def serving(
    program: str,
    *arguments: object,
    python: Python = OWN,
    after: Sequence[object] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a program that listens; its descriptor comes between the arguments and those after."""
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as listener:
        fd = listener.fileno()
        path = PROGRAMS / f"{program}.py"
        command = running(python, path, *arguments, fd, *after)
        # programs import from each other
        full = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        with Target(*command, pass_fds=[fd], env={**full, **(environment or {})}) as target:
            clear(python)
            yield Server(target, listener.getsockname()[1])


@contextmanager
def serving_kind(
    kind: Kind,
    backend: Server,
    python: Python = OWN,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server of that kind in front of a backend."""
    after: tuple[object, ...] = (backend.port,)
    if kind.program == "contexts_threads":
        after = (*after, THREADS)
    with serving(
        kind.program, *kind.arguments, python=python, after=after, environment=environment
    ) as server:
        yield server


@dataclass
class Compared:
    """What was recorded of some requests beside the truth."""

    calls: int = 0  # spans of calls with an id, and calls that have none
    linked: int = 0  # below the span of their request
    unlinked: int = 0  # below none
    wrong: int = 0  # below another one
    unseen: int = 0  # there is no span of them
    wrong_edges: int = 0
    sends: int = 0  # of the backend's calls and of answers
    wrong_contexts: int = 0
    no_context: int = 0
    evidence: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the calls, those that are linked with their request."""
        return self.linked / self.calls if self.calls else 0.0

    def complain(self, text: str) -> None:
        """Keep the first examples of what is wrong."""
        if len(self.examples) < SHOWN:
            self.examples.append(text)


# What is asked for carries the request's id, and its calls their number behind it.
RID = r"/[rb]/(\d{6})"
CALL = r"/b/\d{6}/(\d+)"
ANSWER_RID = r"^HTTP/1\.1 200 (\d{6})"


def compare(recording: Recording, tgid: int, ids: Sequence[int]) -> Compared:
    """Compare what was recorded of a server's requests with their ids (recorded unredacted)."""
    found = compare_spans(recording, tgid, dict.fromkeys(ids, CALLS))
    compare_contexts(recording, tgid, set(ids), found)
    return found


def compare_spans(
    recording: Recording, tgid: int, ids: Mapping[int, int], rid: str = RID, call: str = CALL
) -> Compared:
    """Compare spans and edges with the ids of requests and how many calls each makes.

    `rid` and `call` find the id and the call's number in what was sent.
    """
    found = Compared()
    spans = (
        recording.spans()
        .with_columns(
            rid=pl.col("detail").str.extract(rid).cast(pl.Int64),
            call=pl.col("detail").str.extract(call).cast(pl.Int64),
        )
        .collect()
    )
    rows = {row["span_id"]: row for row in spans.iter_rows(named=True)}
    own = [row for row in rows.values() if row["tgid"] == tgid and row["rid"] in ids]
    servers = {row["span_id"]: row["rid"] for row in own if row["kind"] == "server"}
    seen = Counter(servers.values())
    for number in ids:
        if seen[number] != 1:
            found.complain(f"request {number} has {seen[number]} spans")
    unseen = {(number, call) for number, calls in ids.items() for call in range(calls)}
    for row in own:
        if row["kind"] != "client":
            continue
        found.calls += 1
        unseen.discard((row["rid"], row["call"]))
        above = _above(rows, row, servers)
        if above is None:
            found.unlinked += 1
            found.complain(f"no request is known of: {_shown(row)}")
        elif servers[above] == row["rid"]:
            found.linked += 1
            found.evidence[str(row["evidence"])] += 1
        else:
            found.wrong += 1
            found.complain(f"below request {servers[above]}: {_shown(row)}")
    found.unseen = len(unseen)
    found.calls += found.unseen
    for missing in sorted(unseen)[:SHOWN]:
        found.complain(f"no span of call {missing}")
    for row in recording.edges().collect().iter_rows(named=True):
        cause, effect = rows.get(row["cause_id"]), rows.get(row["effect_id"])
        if cause is None or effect is None or str(row["evidence"]) == "guess":
            continue
        pair = {cause["rid"], effect["rid"]}
        if len(pair) == 2 and pair <= ids.keys():
            found.wrong_edges += 1
            found.complain(f"wrong edge: {row}")
    return found


def _above(rows: dict[int, Any], row: dict[str, Any], servers: dict[int, int]) -> int | None:
    """The span of a request that a span is below."""
    while row["parent_id"] is not None and str(row["evidence"]) != "guess":
        row = rows[row["parent_id"]]
        if row["span_id"] in servers:
            return int(row["span_id"])
    return None


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("detail", "start_ns", "tid", "context", "rid")}


def compare_contexts(recording: Recording, tgid: int, ids: set[int], found: Compared) -> None:
    """Compare the logical contexts of sends: a call is in that of its answer, or in one below it."""
    parents = {
        row["context"]: row["parent"]
        for row in recording.collect(
            recording.table("contexts").filter(pl.col("tgid") == tgid)
        ).iter_rows(named=True)
    }
    messages = recording.messages.filter(
        pl.col("tgid") == tgid, pl.col("direction") == "send", pl.col("payload").is_not_null()
    )
    sends = (
        recording.collect(messages.sort("start_ns"))
        .with_columns(text=pl.col("payload").map_elements(_text, return_dtype=pl.String))
        .with_columns(
            call=pl.col("text").str.extract(RID).cast(pl.Int64),
            answer=pl.col("text").str.extract(ANSWER_RID).cast(pl.Int64),
        )
    )
    homes = {}
    for row in sends.drop_nulls("answer").iter_rows(named=True):
        homes[row["answer"]] = row["context"]
    for row in sends.drop_nulls("call").iter_rows(named=True):
        if row["call"] not in ids:
            continue
        found.sends += 1
        home, context = homes.get(row["call"]), row["context"]
        if not home or not context:
            found.no_context += 1
            found.complain(f"no context: home {home}, {row['text'][:40]!r} in {context}")
            continue
        while context and context != home:
            context = parents.get(context, 0)
        if context != home:
            found.wrong_contexts += 1
            found.complain(f"not within {home}: {row['text'][:40]!r} in {row['context']}")


def _text(payload: bytes) -> str:
    return payload.decode("latin-1")
