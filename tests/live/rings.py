"""What the tests of messages through io_uring share: the cases, how they are recorded, what must be there."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_INET
from typing import Any

import numpy as np

from scope_ebpf import records
from scope_ebpf.loaders import privileges
from scope_ebpf.loaders.capture import Batch, Capture, CaptureOptions
from scope_ebpf.loaders.message_calls import number_of
from scope_ebpf.recording.meta import read_meta
from scope_ebpf.records import RecordFlags, RecordKind, RecordLimits
from tests.live.recording import Session, Target, compiled, recorder

NOBODY = 65534
# The command line, if need be with one way to see messages through io_uring.
ALL_WAYS = "from scope_ebpf.cli.main import main; main()"
ONE_WAY = f"""
from scope_ebpf.loaders import extras
extras.WAYS = {{{{"{{way}}": extras.WAYS["{{way}}"]}}}}
{ALL_WAYS}
"""
ROUNDS = 23
LENGTHS = [100 + number for number in range(ROUNDS)]
ALPHABET = bytes(ord("a") + number % 26 for number in range(512))
LOW = 0xFFFFFFFF  # of the index of a record as much as its sequence has
STREAMS = {"tcp", "tcp6", "unix", "pipe"}


@dataclass(frozen=True)
class Case:
    """One run of programs/uring.c, which says what the words mean."""

    kind: str
    calls: str
    way: str
    ring: str = "early"

    def __str__(self) -> str:
        """For messages of tests."""
        return f"{self.kind} {self.calls} {self.way} {self.ring}"


CASES = (
    Case("tcp", "send", "enter"),
    Case("tcp", "sendmsg", "sqpoll"),
    Case("tcp", "write", "async"),
    Case("tcp", "writev", "enter"),
    Case("tcp", "zc", "enter"),
    Case("tcp", "multishot", "enter"),
    Case("tcp6", "send", "sqpoll"),
    Case("tcp6", "writev", "async"),
    Case("udp", "send", "enter"),
    Case("unix", "send", "enter"),
    Case("unix", "sendmsg", "async"),
    Case("unix", "write", "sqpoll"),
    Case("unix", "multishot", "enter"),
    Case("dgram", "sendmsg", "enter"),
    Case("pipe", "write", "enter"),
    Case("pipe", "writev", "sqpoll"),
    Case("pipe", "write", "async"),
)


CONNECTS = tuple(Case("connect", "-", way) for way in ("enter", "sqpoll", "async"))


@dataclass
class Seen:
    """What was recorded of one case.

    Attributes:
        note: what the program told.
        rows: its messages over its two ends, as records.MESSAGE.
        heads: their payload heads, None where there is none.
        connects: its calls of connect(), as records.CONNECT.
    """

    note: dict[str, Any]
    rows: Any
    heads: list[bytes | None] = field(default_factory=list)
    connects: list[Any] = field(default_factory=list)


def record(
    directory: Path, cases: tuple[Case, ...], **options: Any
) -> tuple[list[Seen], list[str], int]:
    """Record each case with one capture; returns them, the notes, and how many events were lost."""
    program = compiled("uring", directory)
    with ExitStack() as stack:
        targets = [
            stack.enter_context(Target(program, c.kind, c.calls, c.way, c.ring, ROUNDS))
            for c in cases
        ]
        chosen = CaptureOptions(
            tgids=tuple(target.pid for target in targets), families=("messages",), **options
        )
        notes: list[str] = []
        told: dict[int, Any] = {}
        with Capture(chosen) as capture:
            capture.start()
            capture.prepare_rings()
            notes += capture.notes
            kept: list[Batch] = []
            for case, target in zip(cases, targets, strict=True):
                target.open_gate()
                if case.ring != "early":
                    assert target.next_line() == "made\n"
                    deadline = time.monotonic() + 20
                    while not (found := capture.watch_rings()) and time.monotonic() < deadline:
                        time.sleep(0.01)
                    notes += found
                    target.open_gate()
                told[target.pid] = target.note()
                kept.append(capture.drain())
            kept += [Batch(hot=[(0, 0, capture.stop())]), capture.drain()]
            lost = int(capture.lost().sum())
    return _by_target(told, kept), notes, lost


def attach_unprivileged(
    directory: Path, case: Case, way: str = "", *, keeps: Collection[str] = privileges.NEEDED
) -> Session:
    """Record a case with the command line, as nobody with those capabilities only.

    Args:
        directory: for the recording; nobody gets it.
        case: what is done; a ring that is made late is used once there is a note about it.
        way: the only one in WAYS of loaders/extras.py to be tried; empty: all are.
        keeps: the capabilities.
    """
    shutil.chown(directory, NOBODY, NOBODY)
    path = directory / "nobody.scope"
    chosen = ",".join(["-all", *(f"+{name.removeprefix('CAP_').lower()}" for name in keeps)])
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command += [f"--{kind}={chosen}" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    code = ONE_WAY.format(way=way) if way else ALL_WAYS
    command += ["--", sys.executable, "-c", code]
    program = compiled("uring", directory)
    with (
        Target(program, case.kind, case.calls, case.way, case.ring, ROUNDS) as target,
        recorder(
            path, *command, "attach", "--pid", target.pid, "-o", path, attach_seconds=120
        ) as session,
    ):
        session.target = target.pid
        target.open_gate()
        if case.ring != "early":
            assert target.next_line() == "made\n"
            deadline = time.monotonic() + 60
            while not ((path / "meta.json").exists() and read_meta(path).notes):
                assert time.monotonic() < deadline, session.talk
                time.sleep(0.01)
            target.open_gate()
        session.note = target.note()
    return session


def _by_target(told: dict[int, Any], batches: list[Batch]) -> list[Seen]:
    inode_of: dict[int, int] = {}
    heads: dict[tuple[int, int], bytes] = {}
    connects: dict[int, list[Any]] = {tgid: [] for tgid in told}
    begin = records.PAYLOAD.itemsize
    for batch in batches:
        for cpu, _, slots in batch.wide:
            raw = np.frombuffer(slots.tobytes(), np.uint8).reshape(len(slots), -1)
            for slot, data in zip(slots, raw, strict=True):
                if slot["kind"] == RecordKind.RECORD_CONNECTION:
                    row = np.frombuffer(data.tobytes(), records.CONNECTION, 1)[0]
                    inode_of[int(row["connection"])] = int(row["inode"])
                elif slot["kind"] == RecordKind.RECORD_CONNECT:
                    row = np.frombuffer(data.tobytes(), records.CONNECT, 1)[0]
                    connects[int(row["tgid"])].append(row)
                elif slot["kind"] == RecordKind.RECORD_PAYLOAD:
                    row = np.frombuffer(data.tobytes(), records.PAYLOAD, 1)[0]
                    length = int(row["length_bytes"])
                    head = data[begin : begin + length].tobytes()
                    heads[cpu, int(row["hot_index"]) & LOW] = head
    found: dict[int, list[tuple[Any, bytes | None]]] = {tgid: [] for tgid in told}
    inodes = {tgid: set(note.get("inodes", ())) for tgid, note in told.items()}
    kinds = (RecordKind.RECORD_MESSAGE, RecordKind.RECORD_MESSAGE_CALL)
    for batch in batches:
        for cpu, _, slots in batch.hot:
            for row in slots.view(records.MESSAGE):
                tgid = int(row["tgid"])
                if row["kind"] not in kinds:
                    continue
                if inode_of.get(int(row["connection"])) in inodes[tgid]:
                    found[tgid].append((row, heads.get((cpu, (int(row["sequence"]) - 1) & LOW))))
    result = []
    for tgid, note in told.items():
        pairs = sorted(found[tgid], key=lambda pair: int(pair[0]["start_ns"]))
        rows = np.array([row for row, _ in pairs], dtype=records.MESSAGE)
        result.append(Seen(note, rows, [head for _, head in pairs], connects[tgid]))
    return result


def check(case: Case, seen: Seen, way: str, kernel: tuple[int, ...]) -> None:
    """Everything that went through io_uring is there, once, and so is what went by itself.

    Args:
        case: what was done.
        seen: what was recorded of it.
        way: the name of the extras.Way in which it was recorded.
        kernel: its version.
    """
    if refused(case, seen, kernel):
        return
    exact = way != "tracepoints"  # which know neither the bytes nor how long it took
    if not way or (case.kind == "pipe" and not exact):
        plain = 2 if case.calls == "multishot" else 4
        assert seen.rows["length_bytes"].tolist() == [1] * plain, str(case)
        return
    rows, told = seen.rows, str(case)
    ring = rows["fd"] == RecordLimits.NO_DESCRIPTOR
    receive = rows["flags"] & RecordFlags.FLAG_RECEIVE != 0
    many = case.calls == "multishot"
    assert set(rows["tid"].tolist()) == {seen.note["tid"]}, told
    assert set(rows["number"][ring].tolist()) == {number_of("io_uring_enter")}, told
    assert rows["length_bytes"][ring & ~receive].tolist() == LENGTHS, told
    assert rows["length_bytes"][ring & receive].tolist() == LENGTHS, told
    # what went by write() and read()
    assert rows["length_bytes"][~ring].tolist() == [1, 1] * (1 if many else 2), told
    assert not (rows["flags"] & RecordFlags.FLAG_STATUS).any(), told
    assert bool((rows["duration_ns"][ring] > 0).all()) is exact, told
    if case.kind in STREAMS:
        assert not (rows["flags"] & RecordFlags.FLAG_INEXACT).any(), told
        ends = rows["stream_end"][~receive].astype(np.int64)
        assert np.diff(ends).tolist() == rows["length_bytes"][~receive].tolist()[1:], told
        assert sorted(rows["stream_end"][receive].tolist()) == ends.tolist(), told
    turns = ring & (rows["flags"] & RecordFlags.FLAG_TURN != 0)
    assert turns[ring & ~receive].any() and turns[ring & receive].any(), told
    for place in np.flatnonzero(ring).tolist():
        length = int(rows["length_bytes"][place])
        expected = ALPHABET[:length] if exact and turns[place] else None
        assert seen.heads[place] == expected, f"{told}: row {place}"


def check_connects(case: Case, seen: Seen, way: str) -> None:
    """Each connect has a row, with what it was for; what waits tells what came of it, too."""
    told = str(case)
    if way in {"", "tracepoints"}:
        assert not seen.connects, told
        return
    by_socket: dict[int, list[Any]] = {}
    for row in sorted(seen.connects, key=lambda row: int(row["start_ns"])):
        assert row["tid"] == seen.note["tid"], told
        assert row["fd"] == RecordLimits.NO_DESCRIPTOR, told
        assert row["family"] == row["remote_family"] == AF_INET, told
        assert bytes(row["remote_address"])[:4] == bytes((127, 0, 0, 1)), told
        by_socket.setdefault(int(row["inode"]), []).append(row)
    assert len(by_socket) == ROUNDS, told
    for number, rows in enumerate(by_socket.values()):
        port = seen.note["ports"][number & 1]
        assert {int(row["remote_port"]) for row in rows} == {port}, told
        results = [int(row["result"]) for row in rows]
        final = -errno.ECONNREFUSED if number & 1 else 0
        # workers wait in the call itself on some kernels
        in_progress = results[:1] == [-errno.EINPROGRESS]
        assert in_progress or case.way == "async", f"{told}: {results}"
        allowed: tuple[list[int], ...] = ([final],)
        if in_progress:
            results, allowed = results[1:], ([], [final], [-errno.EISCONN])
        assert results in allowed, f"{told}: {results}"


def refused(case: Case, seen: Seen, kernel: tuple[int, ...]) -> bool:
    """Whether the kernel had no such operation, which it may only where that is known."""
    if "refused" not in seen.note:
        return False
    offered = {"zc": (6, 0), "multishot": (6, 0)}.get(case.calls, (5, 10))
    assert kernel < offered, f"{case}: {os.strerror(seen.note['refused'])}"
    return True
